//! A node with three Pods, and what tests do with it.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
};

use hachi_abi::{
    Backend, BackendKey, ConfigFlags, CtEntry, Endpoint, HostDevice, Member, NatEntry, Peer,
    PeerFlags, PolicyEntry, PolicyKey, SHAPE_ANY_PROTO, Scope, Service, ServiceKey, TunnelDevice,
    Tuple, Verdict, proto,
};
use hachi_datapath::{Event, Family, Kind, Parsed, Scratch, V4, V6};

use crate::tables::Tables;

mod traffic;

pub(crate) const TCP: u8 = proto::TCP;
pub(crate) const UDP: u8 = proto::UDP;

/// Pods of this node, by number.
pub(crate) const CLIENT: u8 = 1;
pub(crate) const SERVER: u8 = 2;
pub(crate) const OTHER: u8 = 3;
/// A Pod of another node.
pub(crate) const REMOTE: u8 = 50;
/// This node.
pub(crate) const NODE: u8 = 60;
/// The index of the node's uplink.
pub(crate) const UPLINK: u32 = 5;
/// The index of the VXLAN device.
pub(crate) const OVERLAY: u32 = 6;
/// Another node, behind a router, and a Pod of it.
pub(crate) const FAR: u8 = 100;
pub(crate) const FAR_POD: u8 = 110;
/// Somewhere out there.
pub(crate) const WORLD: u8 = 70;
/// The MAC addresses of a route by the uplink: the neighbour's, the node's.
pub(crate) const ROUTE: [u8; 12] = [2, 0, 0, 0, 4, 1, 2, 0, 0, 0, 4, 2];
/// Addresses of Services.
pub(crate) const SERVICE: u8 = 90;
pub(crate) const SERVICE_TWO: u8 = 91;

/// The ports that most flows use.
pub(crate) const PORT: u16 = 8080;
pub(crate) const SERVICE_PORT: u16 = 80;
pub(crate) const CLIENT_PORT: u16 = 40_000;

/// A policy set.
pub(crate) const SET: u32 = 7;

/// A family as tests need it.
pub(crate) trait Net<const N: usize>: Family<N> {
    /// An address of the lab.
    fn addr(number: u8) -> [u8; N];
    /// An address of the link.
    fn link_local(number: u8) -> [u8; N];
    /// Echo request and reply.
    const ECHO: [u8; 2];
}

impl Net<4> for V4 {
    fn addr(number: u8) -> [u8; 4] {
        [10, 0, 0, number]
    }

    fn link_local(number: u8) -> [u8; 4] {
        [169, 254, 1, number]
    }

    const ECHO: [u8; 2] = [8, 0];
}

impl Net<16> for V6 {
    fn addr(number: u8) -> [u8; 16] {
        [
            0xfd, 0, 0, 0xff, 0xff, 1, 0, 0, 0, 0, 0x80, 0, 0, 0, 0, number,
        ]
    }

    fn link_local(number: u8) -> [u8; 16] {
        [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, number]
    }

    const ECHO: [u8; 2] = [128, 129];
}

/// Runs each test for both families.
macro_rules! both_families {
    ($($(#[$doc:meta])* fn $name:ident($lab:ident) $body:block)*) => {
        $($(#[$doc])* fn $name<const N: usize, F: $crate::lab::Net<N>>(
            $lab: &mut $crate::lab::Lab<N, F>,
        ) $body)*

        mod v4 {
            $(#[test]
            fn $name() {
                super::$name(&mut $crate::lab::Lab::<4, hachi_datapath::V4>::new());
            })*
        }

        mod v6 {
            $(#[test]
            fn $name() {
                super::$name(&mut $crate::lab::Lab::<16, hachi_datapath::V6>::new());
            })*
        }
    };
}
pub(crate) use both_families;

/// The lab.
pub(crate) struct Lab<const N: usize, F> {
    pub(crate) tables: Tables<N>,
    pub(crate) scratch: Scratch<N>,
    family: core::marker::PhantomData<F>,
}

pub(crate) fn mac(pod: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, pod]
}

pub(crate) fn host_mac(pod: u8) -> [u8; 6] {
    [2, 0, 0, 0, 2, pod]
}

/// The class of an address of the lab.
pub(crate) fn class(number: u8) -> u32 {
    u32::from(number) + 100
}

/// What no packet may be judged by: the remains of another.
pub(crate) fn poison<const N: usize>() -> Scratch<N> {
    let tuple = Tuple {
        src: [0xa5; N],
        dst: [0xa5; N],
        sport: [0xa5; 2],
        dport: [0xa5; 2],
        proto: 6,
        pad: [0; 3],
    };
    let entry = CtEntry {
        last_seen: 0xa5a5_a5a5,
        revision: 0xa5a5_a5a5,
        egress_rule: 0xa5a5_a5a5,
        ingress_rule: 0xa5a5_a5a5,
        nat_addr: [0xa5; N],
        nat_port: [0xa5; 2],
        flags: 0x1f,
        tick: 0xa5,
        port: [0xa5; 2],
        pad: [0xa5; 2],
    };
    let nat = NatEntry {
        last_seen: 0xa5a5_a5a5,
        addr: [0xa5; N],
        port: [0xa5; 2],
        flags: 0x0f,
        pad: 0xa5,
    };
    Scratch {
        parsed: Parsed {
            tuple,
            kind: Kind::Link,
            l4: 0xa5a5,
            end: 0xa5a5,
            tcp_flags: 0xa5,
            icmp_type: 0xa5,
            pad: [0xa5; 2],
            id: [0xa5; 4],
        },
        after: tuple,
        reply: tuple,
        opener: tuple,
        entry,
        other: entry,
        known: entry,
        nat,
        other_nat: nat,
        known_nat: nat,
        address: [0xa5; N],
        target: [0xa5; N],
        translated: 0xa5a5_a5a5,
        port: 0xa5a5_a5a5,
        wanted: [0xa5; 2],
        pad: [0xa5; 2],
        now: 0xa5a5_a5a5,
        egress_rule: 0xa5a5_a5a5,
        ingress_rule: 0xa5a5_a5a5,
        service: 0xa5a5_a5a5,
        backends: 0xa5a5_a5a5,
        slot: 0xa5a5_a5a5,
        affinity: 0xa5a5_a5a5,
        had: 0xa5a5_a5a5,
        fresh: 0xa5a5_a5a5,
        scope: 0xa5a5_a5a5,
        node: 0xa5a5_a5a5,
        event: Event::Opened,
    }
}

impl<const N: usize, F: Net<N>> Lab<N, F> {
    /// Three Pods that no policy selects.
    pub(crate) fn new() -> Self {
        let mut tables = Tables {
            revision: 1,
            flags: ConfigFlags::REDIRECT_PEER
                | ConfigFlags::REDIRECT_NEIGH
                | ConfigFlags::MASQUERADE,
            now: Cell::new(1_000),
            endpoints: HashMap::new(),
            peers: HashMap::new(),
            blocks: Vec::new(),
            policy: HashMap::new(),
            services: HashMap::new(),
            backends: HashMap::new(),
            maglev: HashMap::new(),
            members: HashSet::new(),
            affinity: RefCell::default(),
            ranges: Vec::new(),
            flows: RefCell::default(),
            fragments: RefCell::default(),
            uplinks: HashMap::from([(UPLINK, F::addr(NODE))]),
            exempt: vec![(F::addr(REMOTE), N * 8), (F::addr(NODE), N * 8)],
            tunnels: Vec::new(),
            tunnel_device: TunnelDevice::default(),
            host: HostDevice::default(),
            ports: (32_768, 60_999),
            nat: RefCell::default(),
            late: Cell::new(None),
            full: false,
            writes: Cell::new(0),
        };
        for number in [CLIENT, SERVER, OTHER, REMOTE] {
            tables.peers.insert(
                F::addr(number),
                Peer {
                    class: class(number),
                    flags: 0,
                },
            );
        }
        let node = Peer {
            class: 0,
            flags: PeerFlags::LOCAL_NODE,
        };
        tables.peers.insert(F::addr(NODE), node);
        let mut lab = Self {
            tables,
            scratch: poison(),
            family: core::marker::PhantomData,
        };
        for pod in [CLIENT, SERVER, OTHER] {
            lab.isolate(pod, 0, 0);
        }
        lab
    }

    /// Sets the policy sets of a Pod's two directions (0: not isolated), and has live flows judged
    /// again.
    pub(crate) fn isolate(&mut self, pod: u8, ingress: u32, egress: u32) {
        let shapes = (1 << (SHAPE_ANY_PROTO + 1)) - 1;
        let endpoint = Endpoint {
            ifindex: u32::from(pod) + 10,
            ingress_set: ingress,
            egress_set: egress,
            ingress_shapes: shapes,
            egress_shapes: shapes,
            mac: mac(pod),
            host_mac: host_mac(pod),
        };
        self.tables.endpoints.insert(F::addr(pod), endpoint);
        self.tables.revision += 1;
    }

    /// Adds an entry of a set for one port.
    pub(crate) fn allow(&mut self, set: u32, peer: u8, proto: u8, port: u16) {
        self.entry(set, class(peer), proto, port, 16, Verdict::Allow);
    }

    /// Adds an entry of a set; its rule is the number of the port.
    pub(crate) fn entry(
        &mut self,
        set: u32,
        class: u32,
        proto: u8,
        port: u16,
        plen: u8,
        verdict: Verdict,
    ) {
        let key = PolicyKey {
            set,
            class,
            port: port.to_be_bytes(),
            plen,
            proto,
        };
        let entry = PolicyEntry {
            verdict: verdict as u32,
            rule: u32::from(port),
        };
        self.tables.policy.insert(key, entry);
    }

    /// Makes an address a Service's, with these backends, all on [`PORT`].
    pub(crate) fn serve(&mut self, address: u8, proto: u8, backends: &[u8]) {
        self.serve_in(Scope::INTERNAL, address, proto, backends);
    }

    /// As [`Lab::serve`], for packets of one scope.
    pub(crate) fn serve_in(&mut self, scope: u8, address: u8, proto: u8, backends: &[u8]) {
        let key = ServiceKey {
            addr: F::addr(address),
            port: SERVICE_PORT.to_be_bytes(),
            proto,
            scope,
        };
        let id = u32::from(address) * 1_000 + u32::from(scope) * 500 + u32::from(proto);
        let count = u32::try_from(backends.len()).expect("few");
        self.tables.services.insert(
            key,
            Service {
                id,
                count,
                flags: 0,
                affinity: 0,
                table: 0,
            },
        );
        self.tables.members.retain(|member| member.service != id);
        for (slot, backend) in (0..).zip(backends) {
            let value = Backend {
                addr: F::addr(*backend),
                port: PORT.to_be_bytes(),
                pad: [0; 2],
            };
            self.tables
                .backends
                .insert(BackendKey { service: id, slot }, value);
            self.tables.members.insert(Member {
                service: id,
                backend: value,
            });
        }
    }

    pub(crate) fn service(&mut self, address: u8, proto: u8) -> &mut Service {
        let key = ServiceKey {
            addr: F::addr(address),
            port: SERVICE_PORT.to_be_bytes(),
            proto,
            scope: 0,
        };
        self.tables.services.get_mut(&key).expect("a Service")
    }

    /// Some seconds go by.
    pub(crate) fn wait(&mut self, seconds: u32) {
        self.tables.now.set(self.tables.now.get() + seconds);
    }

    /// The number of tracked halves.
    pub(crate) fn tracked(&self) -> usize {
        self.tables.flows.borrow().len()
    }

    /// The tuple of a TCP packet between addresses of the lab.
    pub(crate) fn tuple(from: u8, to: u8, ports: (u16, u16)) -> Tuple<N> {
        Tuple {
            src: F::addr(from),
            dst: F::addr(to),
            sport: ports.0.to_be_bytes(),
            dport: ports.1.to_be_bytes(),
            proto: TCP,
            pad: [0; 3],
        }
    }

    pub(crate) fn flow(&self, tuple: &Tuple<N>) -> Option<CtEntry<N>> {
        self.tables.flows.borrow().get(tuple).copied()
    }
}
