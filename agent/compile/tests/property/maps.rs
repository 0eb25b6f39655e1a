//! A kernel's maps as plain maps: operations are applied to them, and flows judged by them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hachi_abi::{
    Endpoint, HostDevice, MAGLEV_PIECE, Peer, PeerFlags, PolicyEntry, PolicyKey, RULE_NONE,
    SET_ALLOW_ALL, SHAPE_ANY_PROTO, Service, Shapes, Tunnel, TunnelDevice, Uplink, Verdict,
};
use hachi_compile::{Frontend, Image, Op, Slots, SlotsId};
use ipnet::IpNet;

use crate::flow::Flow;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kernel {
    flags: u32,
    ports: (u16, u16),
    uplinks: BTreeMap<u32, Uplink>,
    non_masquerade: BTreeSet<IpNet>,
    tunnel: TunnelDevice,
    host: HostDevice,
    tunnels: BTreeMap<IpNet, Tunnel>,
    endpoints: BTreeMap<IpAddr, Endpoint>,
    peers: BTreeMap<IpAddr, Peer>,
    cidrs: BTreeMap<IpNet, Peer>,
    policy: BTreeMap<PolicyKey, PolicyEntry>,
    pub(crate) services: BTreeMap<Frontend, Service>,
    pub(crate) slots: BTreeMap<(SlotsId, u32), SocketAddr>,
    pub(crate) members: BTreeSet<(SlotsId, SocketAddr)>,
    pub(crate) ranges: BTreeSet<(SlotsId, IpNet)>,
    pub(crate) pieces: BTreeMap<(SlotsId, u32), [u16; MAGLEV_PIECE]>,
}

impl From<&Image> for Kernel {
    fn from(image: &Image) -> Self {
        let mut kernel = Self {
            flags: image.flags,
            ports: image.ports,
            uplinks: image.uplinks.clone(),
            non_masquerade: image.non_masquerade.clone(),
            tunnel: image.tunnel,
            host: image.host,
            tunnels: image.tunnels.clone(),
            endpoints: image.endpoints.clone(),
            peers: image.peers.clone(),
            cidrs: image.cidrs.clone(),
            policy: image.policy.iter().map(|(k, e)| (*k, *e)).collect(),
            ..Self::default()
        };
        kernel.services = image.services.iter().map(|(f, s)| (*f, *s)).collect();
        for (id, slots) in &image.slots {
            let Slots {
                backends,
                members,
                table: _,
                ranges,
            } = &**slots;
            let backends = (0..).zip(backends);
            kernel
                .slots
                .extend(backends.map(|(slot, b)| ((*id, slot), *b)));
            kernel.members.extend(members.iter().map(|m| (*id, *m)));
            kernel.ranges.extend(ranges.iter().map(|r| (*id, *r)));
            let pieces = (0..).zip(slots.pieces());
            kernel
                .pieces
                .extend(pieces.map(|(piece, p)| ((*id, piece), p)));
        }
        kernel
    }
}

impl Kernel {
    pub(crate) fn apply(&mut self, op: &Op) {
        match *op {
            Op::PutPolicy(key, entry) => drop(self.policy.insert(key, entry)),
            Op::DeletePolicy(key) => drop(self.policy.remove(&key)),
            Op::PutPeer(address, peer) => drop(self.peers.insert(address, peer)),
            Op::DeletePeer(address) => drop(self.peers.remove(&address)),
            Op::PutCidr(net, peer) => drop(self.cidrs.insert(net, peer)),
            Op::DeleteCidr(net) => drop(self.cidrs.remove(&net)),
            Op::PutEndpoint(address, endpoint) => drop(self.endpoints.insert(address, endpoint)),
            Op::DeleteEndpoint(address) => drop(self.endpoints.remove(&address)),
            Op::PutBackend {
                service,
                slot,
                backend,
            } => drop(self.slots.insert((service, slot), backend)),
            Op::DeleteBackend { service, slot } => drop(self.slots.remove(&(service, slot))),
            Op::PutMember(service, backend) => {
                self.members.insert((service, backend));
            }
            Op::DeleteMember(service, backend) => {
                self.members.remove(&(service, backend));
            }
            Op::PutRange(service, range) => {
                self.ranges.insert((service, range));
            }
            Op::DeleteRange(service, range) => {
                self.ranges.remove(&(service, range));
            }
            Op::PutPiece {
                service,
                piece,
                slots,
            } => drop(self.pieces.insert((service, piece), slots)),
            Op::DeletePiece { service, piece } => drop(self.pieces.remove(&(service, piece))),
            Op::PutService(frontend, service) => drop(self.services.insert(frontend, service)),
            Op::DeleteService(frontend) => drop(self.services.remove(&frontend)),
            Op::SetFlags(flags) => self.flags = flags,
            Op::SetPorts(low, high) => self.ports = (low, high),
            Op::PutUplink(index, uplink) => drop(self.uplinks.insert(index, uplink)),
            Op::DeleteUplink(index) => drop(self.uplinks.remove(&index)),
            Op::PutNonMasquerade(net) => drop(self.non_masquerade.insert(net)),
            Op::DeleteNonMasquerade(net) => drop(self.non_masquerade.remove(&net)),
            Op::SetTunnel(device) => self.tunnel = device,
            Op::SetHost(device) => self.host = device,
            Op::PutTunnel(net, tunnel) => drop(self.tunnels.insert(net, tunnel)),
            Op::DeleteTunnel(net) => drop(self.tunnels.remove(&net)),
            Op::RaiseRevision => {}
        }
    }

    /// What an agent that starts now would read back.
    pub(crate) fn snapshot(&self) -> Image {
        let mut slots: BTreeMap<SlotsId, Slots> = BTreeMap::new();
        for ((id, _), backend) in &self.slots {
            slots.entry(*id).or_default().backends.push(*backend);
        }
        for (id, member) in &self.members {
            slots.entry(*id).or_default().members.push(*member);
        }
        for (id, range) in &self.ranges {
            slots.entry(*id).or_default().ranges.push(*range);
        }
        for ((id, _), piece) in &self.pieces {
            slots.entry(*id).or_default().table.extend(piece);
        }
        for (id, slots) in &mut slots {
            let users = self
                .services
                .iter()
                .filter(|(f, s)| SlotsId::of(f, s) == *id);
            let size = users
                .map(|(_, service)| service.table)
                .max()
                .unwrap_or_default();
            slots.table.truncate(size as usize);
        }
        Image {
            flags: self.flags,
            ports: self.ports,
            uplinks: self.uplinks.clone(),
            non_masquerade: self.non_masquerade.clone(),
            tunnel: self.tunnel,
            host: self.host,
            tunnels: self.tunnels.clone(),
            endpoints: self.endpoints.clone(),
            peers: self.peers.clone(),
            cidrs: self.cidrs.clone(),
            policy: self.policy.iter().map(|(k, e)| (*k, *e)).collect(),
            services: self.services.iter().map(|(f, s)| (*f, *s)).collect(),
            slots: slots.into_iter().map(|(id, s)| (id, Arc::new(s))).collect(),
        }
    }

    /// The verdict of the sides that are looked at: the rules that allow, or `None`. Written from the
    /// description of the maps in `hachi-abi`, apart from the datapath.
    pub(crate) fn judge(&self, flow: &Flow, sides: Sides) -> Option<Rules> {
        let mut rules = Rules {
            egress: RULE_NONE,
            ingress: RULE_NONE,
        };
        if flow.source == flow.destination {
            return Some(rules);
        }
        if sides != Sides::Ingress
            && let Some(sender) = self.endpoints.get(&flow.source)
            && sender.egress_set != SET_ALLOW_ALL
        {
            let class = self.peer(flow.destination).class;
            rules.egress = self.side(sender.egress_set, sender.egress_shapes, class, flow)?;
        }
        if sides != Sides::Egress
            && let Some(receiver) = self.endpoints.get(&flow.destination)
            && receiver.ingress_set != SET_ALLOW_ALL
        {
            let Peer { class, flags } = self.peer(flow.source);
            if flags & PeerFlags::LOCAL_NODE == 0 {
                rules.ingress =
                    self.side(receiver.ingress_set, receiver.ingress_shapes, class, flow)?;
            }
        }
        Some(rules)
    }

    pub(crate) fn peer(&self, address: IpAddr) -> Peer {
        let around = || {
            let all = self.cidrs.iter().filter(|(net, _)| net.contains(&address));
            all.max_by_key(|(net, _)| net.prefix_len())
                .map(|(_, peer)| peer)
        };
        self.peers
            .get(&address)
            .or_else(around)
            .copied()
            .unwrap_or_default()
    }

    /// The rule that denies one side of a flow; `None` if it is allowed.
    pub(crate) fn denied_by(&self, flow: &Flow, sides: Sides) -> Option<u32> {
        let (own, peer) = match sides {
            Sides::Ingress => (flow.destination, flow.source),
            Sides::Both | Sides::Egress => (flow.source, flow.destination),
        };
        let endpoint = self.endpoints.get(&own)?;
        let (set, shapes) = match sides {
            Sides::Ingress => (endpoint.ingress_set, endpoint.ingress_shapes),
            Sides::Both | Sides::Egress => (endpoint.egress_set, endpoint.egress_shapes),
        };
        let entry = self.find(set, shapes, self.peer(peer).class, flow);
        match entry {
            Some(entry) if entry.verdict() == Verdict::Allow => None,
            entry => Some(entry.map_or(RULE_NONE, |entry| entry.rule)),
        }
    }

    fn side(&self, set: u32, shapes: Shapes, class: u32, flow: &Flow) -> Option<u32> {
        let entry = self.find(set, shapes, class, flow)?;
        (entry.verdict() == Verdict::Allow).then_some(entry.rule)
    }

    fn find(&self, set: u32, shapes: Shapes, class: u32, flow: &Flow) -> Option<PolicyEntry> {
        let bits = format!("{:016b}", flow.port);
        let of_protocol = (0..=16_u8).rev().map(|plen| {
            let prefix = format!("{:0<16}", &bits[..usize::from(plen)]);
            let port = u16::from_str_radix(&prefix, 2).unwrap().to_be_bytes();
            (
                u32::from(plen),
                PolicyKey {
                    set,
                    class,
                    port,
                    plen,
                    proto: flow.protocol,
                },
            )
        });
        let any = PolicyKey {
            set,
            class,
            ..PolicyKey::default()
        };
        let mut keys = of_protocol.chain([(SHAPE_ANY_PROTO, any)]);
        keys.find_map(|(shape, key)| {
            (shapes & (1 << shape) != 0)
                .then(|| self.policy.get(&key))
                .flatten()
                .copied()
        })
    }
}

/// The rules that allow a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) egress: u32,
    pub(crate) ingress: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sides {
    Both,
    Egress,
    Ingress,
}
