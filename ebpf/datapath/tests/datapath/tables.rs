//! The maps of the lab: plain collections.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
};

use hachi_abi::{
    Affinity, AffinityKey, Backend, BackendKey, CtEntry, Endpoint, FragKey, FragValue, HostDevice,
    MaglevKey, Member, NatEntry, Peer, PolicyEntry, PolicyKey, RangeKey, Service, ServiceKey,
    Tunnel, TunnelDevice, Tuple,
};
use hachi_datapath::Maps;

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
    pub(crate) tunnels: Vec<([u8; N], usize, Tunnel)>,
    pub(crate) tunnel_device: TunnelDevice,
    pub(crate) host: HostDevice,
    pub(crate) ports: (u16, u16),
    pub(crate) nat: RefCell<HashMap<Tuple<N>, NatEntry<N>>>,
    /// What another CPU writes to the flow table just before it is claimed from.
    pub(crate) late: Cell<Option<(Tuple<N>, CtEntry<N>)>>,
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
        assert_eq!(entry.pad, [0; 2], "a value's padding is zero");
        if self.full {
            return false;
        }
        self.writes.set(self.writes.get() + 1);
        self.flows.borrow_mut().insert(*tuple, *entry);
        true
    }

    fn claim_flow(&self, tuple: &Tuple<N>, entry: &CtEntry<N>) -> bool {
        if let Some((tuple, entry)) = self.late.take() {
            self.flows.borrow_mut().insert(tuple, entry);
        }
        !self.flows.borrow().contains_key(tuple) && self.put_flow(tuple, entry)
    }

    fn drop_flow(&self, tuple: &Tuple<N>) {
        self.flows.borrow_mut().remove(tuple);
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

    fn tunnel(&self, addr: &[u8; N]) -> Option<Tunnel> {
        let around = self
            .tunnels
            .iter()
            .filter(|(block, length, _)| is_inside(addr, block, *length));
        around
            .max_by_key(|(_, length, _)| *length)
            .map(|found| found.2)
    }

    fn host(&self) -> HostDevice {
        self.host
    }

    fn tunnel_device(&self) -> TunnelDevice {
        self.tunnel_device
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
