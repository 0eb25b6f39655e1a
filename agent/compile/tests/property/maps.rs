//! A kernel's maps as plain maps: operations are applied to them, and flows judged by them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use hachi_abi::{
    Endpoint, Peer, PeerFlags, PolicyEntry, PolicyKey, RULE_NONE, SET_ALLOW_ALL, SHAPE_ANY_PROTO,
    Service, Shapes, Verdict,
};
use hachi_compile::{Frontend, Image, Op, ServiceImage};
use ipnet::IpNet;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kernel {
    flags: u32,
    endpoints: BTreeMap<IpAddr, Endpoint>,
    peers: BTreeMap<IpAddr, Peer>,
    cidrs: BTreeMap<IpNet, Peer>,
    policy: BTreeMap<PolicyKey, PolicyEntry>,
    pub(crate) services: BTreeMap<Frontend, Service>,
    pub(crate) slots: BTreeMap<(bool, u32, u32), SocketAddr>,
}

impl From<&Image> for Kernel {
    fn from(image: &Image) -> Self {
        let mut kernel = Self {
            flags: image.flags,
            endpoints: image.endpoints.clone(),
            peers: image.peers.clone(),
            cidrs: image.cidrs.clone(),
            policy: image.policy.clone(),
            ..Self::default()
        };
        for (frontend, service) in &image.services {
            let ServiceImage {
                id,
                flags,
                affinity,
                ref backends,
            } = *service;
            let count = backends.len() as u32;
            kernel.services.insert(
                *frontend,
                Service {
                    id,
                    count,
                    flags,
                    affinity,
                },
            );
            for (slot, backend) in (0..).zip(backends) {
                kernel
                    .slots
                    .insert((frontend.addr.is_ipv6(), id, slot), *backend);
            }
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
            } => {
                self.slots
                    .insert((backend.is_ipv6(), service, slot), backend);
            }
            Op::DeleteBackend { service, slot, v6 } => {
                self.slots.remove(&(v6, service, slot));
            }

            Op::PutService(frontend, service) => drop(self.services.insert(frontend, service)),
            Op::DeleteService(frontend) => drop(self.services.remove(&frontend)),
            Op::SetFlags(flags) => self.flags = flags,
            Op::RaiseRevision => {}
        }
    }

    /// What an agent that starts now would read back.
    pub(crate) fn snapshot(&self) -> Image {
        let services = self.services.iter().map(|(frontend, service)| {
            let v6 = frontend.addr.is_ipv6();
            let Service {
                id,
                count,
                flags,
                affinity,
            } = *service;
            let backends = (0..count).map(|slot| self.slots[&(v6, id, slot)]).collect();
            (
                *frontend,
                ServiceImage {
                    id,
                    flags,
                    affinity,
                    backends,
                },
            )
        });
        Image {
            flags: self.flags,
            endpoints: self.endpoints.clone(),
            peers: self.peers.clone(),
            cidrs: self.cidrs.clone(),
            policy: self.policy.clone(),
            services: services.collect(),
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

    fn side(&self, set: u32, shapes: Shapes, class: u32, flow: &Flow) -> Option<u32> {
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
        let entry = keys.find_map(|(shape, key)| {
            (shapes & (1 << shape) != 0)
                .then(|| self.policy.get(&key))
                .flatten()
        })?;
        (entry.verdict() == Verdict::Allow).then_some(entry.rule)
    }
}

/// The rules that allow a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) egress: u32,
    pub(crate) ingress: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sides {
    Both,
    Egress,
    Ingress,
}
