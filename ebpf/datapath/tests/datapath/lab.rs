//! A node with three Pods, and what tests do with it.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
};

use hachi_abi::{
    Affinity, AffinityKey, Backend, BackendKey, ConfigFlags, CtEntry, Endpoint, FragKey, FragValue,
    MaglevKey, Member, NatEntry, Peer, PeerFlags, PolicyEntry, PolicyKey, RangeKey, Reason,
    SHAPE_ANY_PROTO, Scope, Service, ServiceKey, Tuple, Verdict, proto,
};
use hachi_datapath::{Event, Family, Frame as Link, Kind, Maps, Outcome, Parsed, Scratch, V4, V6};

use crate::wire::{self, Frame, View};

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
/// Somewhere out there.
pub(crate) const WORLD: u8 = 70;
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

/// The maps.
#[derive(Debug)]
pub(crate) struct Tables<const N: usize> {
    pub(crate) revision: u32,
    pub(crate) flags: u32,
    pub(crate) now: Cell<u32>,
    pub(crate) endpoints: HashMap<[u8; N], Endpoint>,
    pub(crate) peers: HashMap<[u8; N], Peer>,
    pub(crate) blocks: Vec<([u8; N], usize, Peer)>,
    pub(crate) policy: HashMap<PolicyKey, PolicyEntry>,
    pub(crate) services: HashMap<ServiceKey<N>, Service>,
    pub(crate) backends: HashMap<BackendKey, Backend<N>>,
    pub(crate) maglev: HashMap<MaglevKey, Vec<u16>>,
    pub(crate) members: HashSet<Member<N>>,
    pub(crate) affinity: RefCell<HashMap<AffinityKey<N>, Affinity<N>>>,
    pub(crate) ranges: Vec<(u32, [u8; N], usize)>,
    pub(crate) flows: RefCell<HashMap<Tuple<N>, CtEntry<N>>>,
    pub(crate) fragments: RefCell<HashMap<FragKey<N>, FragValue>>,
    pub(crate) uplinks: HashMap<u32, [u8; N]>,
    pub(crate) exempt: Vec<([u8; N], usize)>,
    pub(crate) ports: (u16, u16),
    pub(crate) nat: RefCell<HashMap<Tuple<N>, NatEntry<N>>>,
    /// The flow table takes nothing.
    pub(crate) full: bool,
    /// Writes to the flow table.
    pub(crate) writes: Cell<usize>,
}

fn is_inside<const N: usize>(addr: &[u8; N], block: &[u8; N], length: usize) -> bool {
    (0..length).all(|bit| (block[bit / 8] ^ addr[bit / 8]) & (0x80 >> (bit % 8)) == 0)
}

impl<const N: usize> Maps<N> for Tables<N> {
    fn revision(&self) -> u32 {
        self.revision
    }

    fn flags(&self) -> u32 {
        self.flags
    }

    fn endpoint(&self, addr: &[u8; N]) -> Option<Endpoint> {
        self.endpoints.get(addr).copied()
    }

    fn peer(&self, addr: &[u8; N]) -> Option<Peer> {
        self.peers.get(addr).copied()
    }

    fn block(&self, addr: &[u8; N]) -> Option<Peer> {
        let inside = |(block, length, _): &&([u8; N], usize, Peer)| is_inside(addr, block, *length);
        let found = self
            .blocks
            .iter()
            .filter(inside)
            .max_by_key(|(_, length, _)| *length);
        found.map(|(_, _, peer)| *peer)
    }

    fn policy(&self, key: &PolicyKey) -> Option<PolicyEntry> {
        self.policy.get(key).copied()
    }

    fn service(&self, key: &ServiceKey<N>) -> Option<Service> {
        self.services.get(key).copied()
    }

    fn backend(&self, key: &BackendKey) -> Option<Backend<N>> {
        self.backends.get(key).copied()
    }

    fn maglev(&self, key: &MaglevKey, entry: usize) -> Option<u16> {
        self.maglev.get(key)?.get(entry).copied()
    }

    fn is_member(&self, member: &Member<N>) -> bool {
        self.members.contains(member)
    }

    fn affinity(&self, key: &AffinityKey<N>) -> Option<Affinity<N>> {
        self.affinity.borrow().get(key).copied()
    }

    fn put_affinity(&self, key: &AffinityKey<N>, value: &Affinity<N>) {
        self.affinity.borrow_mut().insert(*key, *value);
    }

    fn is_in_range(&self, key: &RangeKey<N>) -> bool {
        let service = u32::from_ne_bytes(key.service);
        let found = |(of, block, length): &(u32, [u8; N], usize)| {
            *of == service && is_inside(&key.source, block, *length)
        };
        self.ranges.iter().any(found)
    }

    fn flow(&self, tuple: &Tuple<N>, into: &mut CtEntry<N>) -> bool {
        assert_eq!(tuple.pad, [0; 3], "a key's padding is zero");
        let found = self.flows.borrow().get(tuple).copied();
        if let Some(entry) = found {
            *into = entry;
        }
        found.is_some()
    }

    fn put_flow(&self, tuple: &Tuple<N>, entry: &CtEntry<N>) -> bool {
        assert_eq!(tuple.pad, [0; 3], "a key's padding is zero");
        if self.full {
            return false;
        }
        self.writes.set(self.writes.get() + 1);
        self.flows.borrow_mut().insert(*tuple, *entry);
        true
    }

    fn fragment(&self, key: &FragKey<N>) -> Option<FragValue> {
        self.fragments.borrow().get(key).copied()
    }

    fn put_fragment(&self, key: &FragKey<N>, value: &FragValue) -> bool {
        self.fragments.borrow_mut().insert(*key, *value);
        true
    }

    fn uplink(&self, ifindex: u32) -> Option<[u8; N]> {
        self.uplinks.get(&ifindex).copied()
    }

    fn is_exempt(&self, addr: &[u8; N]) -> bool {
        let inside = |(block, length): &([u8; N], usize)| is_inside(addr, block, *length);
        self.exempt.iter().any(inside)
    }

    fn ports(&self) -> (u16, u16) {
        self.ports
    }

    fn nat(&self, tuple: &Tuple<N>, into: &mut NatEntry<N>) -> bool {
        assert_eq!(tuple.pad, [0; 3], "a key's padding is zero");
        let found = self.nat.borrow().get(tuple).copied();
        if let Some(entry) = found {
            *into = entry;
        }
        found.is_some()
    }

    fn put_nat(&self, tuple: &Tuple<N>, entry: &NatEntry<N>) -> bool {
        assert_eq!(tuple.pad, [0; 3], "a key's padding is zero");
        if self.full {
            return false;
        }
        self.nat.borrow_mut().insert(*tuple, *entry);
        true
    }

    fn claim_nat(&self, tuple: &Tuple<N>, entry: &NatEntry<N>) -> bool {
        !self.nat.borrow().contains_key(tuple) && self.put_nat(tuple, entry)
    }

    fn drop_nat(&self, tuple: &Tuple<N>) {
        self.nat.borrow_mut().remove(tuple);
    }

    fn now(&self) -> u32 {
        self.now.get()
    }

    fn tick(&self) -> u8 {
        self.now.get() as u8
    }
}

/// The lab.
pub(crate) struct Lab<const N: usize, F> {
    pub(crate) tables: Tables<N>,
    scratch: Scratch<N>,
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
fn poison<const N: usize>() -> Scratch<N> {
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
        flags: 0x0f,
        tick: 0xa5,
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
        translated: 0xa5a5_a5a5,
        port: 0xa5a5_a5a5,
        now: 0xa5a5_a5a5,
        egress_rule: 0xa5a5_a5a5,
        ingress_rule: 0xa5a5_a5a5,
        service: 0xa5a5_a5a5,
        backends: 0xa5a5_a5a5,
        slot: 0xa5a5_a5a5,
        affinity: 0xa5a5_a5a5,
        had: 0xa5a5_a5a5,
        scope: 0xa5a5_a5a5,
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
            ports: (32_768, 60_999),
            nat: RefCell::default(),
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

    /// A frame of a Pod.
    pub(crate) fn frame(&self, pod: u8, ip: &[u8]) -> Frame {
        Frame::new(mac(pod), u32::from(pod) + 10, F::ETHERTYPE, ip)
    }

    /// A packet of a Pod.
    pub(crate) fn from(&self, pod: u8, to: u8, proto: u8, body: &[u8]) -> Frame {
        self.frame(pod, &wire::ip(F::addr(pod), F::addr(to), proto, body))
    }

    /// A packet that the host's stack sends to a Pod.
    pub(crate) fn to(&self, from: u8, pod: u8, proto: u8, body: &[u8]) -> Frame {
        let ip = wire::ip(F::addr(from), F::addr(pod), proto, body);
        Frame::new(host_mac(pod), u32::from(pod) + 10, F::ETHERTYPE, &ip)
    }

    /// A TCP segment of a Pod.
    pub(crate) fn tcp(&self, pod: u8, to: u8, ports: (u16, u16), flags: u8) -> Frame {
        self.from(pod, to, TCP, &wire::tcp(ports, flags, b"data"))
    }

    /// Runs the program of what Pods send.
    pub(crate) fn send(&mut self, frame: &Frame) -> (Outcome, Frame) {
        let mut frame = frame.clone();
        let mut source = [0xa5; 6];
        let outcome = match hachi_datapath::frame(&frame, &mut source) {
            Link::Decided(outcome) => outcome,
            Link::V4 | Link::V6 => hachi_datapath::from_pod::<N, F, _, _>(
                &mut frame,
                &self.tables,
                &mut self.scratch,
                &source,
            ),
        };
        self.after(outcome, frame)
    }

    /// Runs the program of what Pods receive from the stack.
    pub(crate) fn receive(&mut self, frame: &Frame) -> (Outcome, Frame) {
        let mut frame = frame.clone();
        let mut source = [0xa5; 6];
        let outcome = match hachi_datapath::frame(&frame, &mut source) {
            Link::Decided(outcome) => outcome,
            Link::V4 | Link::V6 => {
                hachi_datapath::to_pod::<N, F, _, _>(&mut frame, &self.tables, &mut self.scratch)
            }
        };
        self.after(outcome, frame)
    }

    /// A packet on the uplink.
    pub(crate) fn wire(&self, from: u8, to: u8, proto: u8, body: &[u8]) -> Frame {
        let ip = wire::ip(F::addr(from), F::addr(to), proto, body);
        Frame::new([2, 0, 0, 0, 3, from], UPLINK, F::ETHERTYPE, &ip)
    }

    /// A packet that the node's own stack has made, on its way out.
    pub(crate) fn own(&self, to: u8, proto: u8, body: &[u8]) -> Frame {
        let mut frame = self.wire(NODE, to, proto, body);
        frame.own = true;
        frame
    }

    /// Runs the program of what an uplink receives.
    pub(crate) fn arrive(&mut self, frame: &Frame) -> (Outcome, Frame) {
        let mut frame = frame.clone();
        let outcome = match hachi_datapath::network_frame(&frame, Reason::PassedToStack) {
            Link::Decided(outcome) => outcome,
            Link::V4 | Link::V6 => {
                hachi_datapath::from_net::<N, F, _, _>(&mut frame, &self.tables, &mut self.scratch)
            }
        };
        self.after(outcome, frame)
    }

    /// Runs the program of what leaves by an uplink.
    pub(crate) fn leave(&mut self, frame: &Frame) -> (Outcome, Frame) {
        let mut frame = frame.clone();
        frame.ifindex = UPLINK;
        let outcome = match hachi_datapath::network_frame(&frame, Reason::PassedToNetwork) {
            Link::Decided(outcome) => outcome,
            Link::V4 | Link::V6 => {
                hachi_datapath::to_net::<N, F, _, _>(&mut frame, &self.tables, &mut self.scratch)
            }
        };
        self.after(outcome, frame)
    }

    /// The packet must leave translated; returns it.
    #[track_caller]
    pub(crate) fn translated(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.leave(frame);
        assert_eq!(outcome, Outcome::Pass(Reason::Translated));
        after.check()
    }

    /// The packet must leave as it is.
    #[track_caller]
    pub(crate) fn left(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.leave(frame);
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToNetwork));
        assert_eq!(after.bytes[14..], frame.bytes[14..], "it is changed");
        after.check()
    }

    /// The packet from the uplink must go to a Pod; returns it.
    #[track_caller]
    pub(crate) fn arrived(&mut self, frame: &Frame, pod: u8) -> View {
        let (outcome, after) = self.arrive(frame);
        let ifindex = u32::from(pod) + 10;
        assert_eq!(outcome, Outcome::RedirectPeer { ifindex });
        after.check()
    }

    /// The packet from the uplink must be forwarded; returns it.
    #[track_caller]
    pub(crate) fn forwarded(&mut self, frame: &Frame) -> (View, Frame) {
        let (outcome, after) = self.arrive(frame);
        assert_eq!(outcome, Outcome::Forward);
        (after.check(), after)
    }

    /// The packet from the uplink must go to the stack.
    #[track_caller]
    pub(crate) fn taken_in(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.arrive(frame);
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
        after.check()
    }

    fn after(&mut self, outcome: Outcome, frame: Frame) -> (Outcome, Frame) {
        self.scratch = poison();
        let drop = matches!(outcome, Outcome::Drop(_));
        assert_eq!(drop, outcome.reason().is_drop(), "{outcome:?}");
        (outcome, frame)
    }

    /// The packet must go straight to the Pod; returns it, all its checksums right.
    #[track_caller]
    pub(crate) fn delivered(&mut self, frame: &Frame, pod: u8) -> View {
        let (outcome, after) = self.send(frame);
        assert_eq!(
            outcome,
            Outcome::RedirectPeer {
                ifindex: u32::from(pod) + 10
            }
        );
        let view = after.check();
        assert_eq!(view.macs, [mac(pod), host_mac(pod)].concat()[..]);
        view
    }

    /// The packet must go to the stack.
    #[track_caller]
    pub(crate) fn passed(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.send(frame);
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
        after.check()
    }

    /// The packet must reach the Pod from the stack.
    #[track_caller]
    pub(crate) fn received(&mut self, frame: &Frame) -> View {
        let (outcome, after) = self.receive(frame);
        assert_eq!(outcome, Outcome::Pass(Reason::DeliveredFromStack));
        after.check()
    }

    /// What a Pod sends must be dropped.
    #[track_caller]
    pub(crate) fn refused(&mut self, frame: &Frame, reason: Reason) {
        assert_eq!(self.send(frame).0, Outcome::Drop(reason));
    }

    /// What the stack sends must be dropped.
    #[track_caller]
    pub(crate) fn kept_out(&mut self, frame: &Frame, reason: Reason) {
        assert_eq!(self.receive(frame).0, Outcome::Drop(reason));
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
