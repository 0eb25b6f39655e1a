//! The maps of a family as the datapath's [`Maps`].

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::{bpf_jiffies64, bpf_ktime_get_coarse_ns},
    maps::lpm_trie::Key,
};
use hachi_abi::{
    Affinity, AffinityKey, Backend, BackendKey, CtEntry, Endpoint, FragKey, FragValue, HostDevice,
    MAGLEV_PIECE, MaglevKey, Member, NatEntry, Peer, PolicyEntry, PolicyKey, RangeKey, Service,
    ServiceKey, Tunnel, TunnelDevice, Tuple,
};
use hachi_datapath::Maps;

use crate::maps::{self, CONFIG, POLICY, UPLINKS, families};

const NANOSECONDS: u64 = 1_000_000_000;

/// Seconds of the coarse monotonic clock.
#[inline(always)]
pub(crate) fn seconds() -> u32 {
    // SAFETY: the helper has no arguments (Linux 5.11).
    (unsafe { bpf_ktime_get_coarse_ns() } / NANOSECONDS) as u32
}

macro_rules! tables {
    ($n:literal, $name:ident, $address:ident, $endpoints:ident, $peers:ident, $cidrs:ident,
     $services:ident, $backends:ident, $maglev:ident, $members:ident, $affinity:ident, $ranges:ident,
     $ct:ident, $frags:ident, $nat:ident, $nonmasq:ident, $tunnels:ident, $sockets:ident,
     $scratch:ident) => {
        /// The maps of one family.
        pub(crate) struct $name;

        impl Maps<$n> for $name {
            #[inline(always)]
            fn revision(&self) -> u32 {
                CONFIG.get(0).map_or(0, |config| config.revision)
            }

            #[inline(always)]
            fn flags(&self) -> u32 {
                CONFIG.get(0).map_or(0, |config| config.flags)
            }

            #[inline(always)]
            fn endpoint(&self, addr: &[u8; $n]) -> Option<Endpoint> {
                // SAFETY: user space replaces elements whole, it never changes one in place, and
                // the memory stays an element's until the program ends. (Since Linux 6.1 it may
                // become another key's within this copy; but only elements that nothing refers
                // to any more are deleted.)
                unsafe { maps::$endpoints.get(addr).copied() }
            }

            #[inline(always)]
            fn peer(&self, addr: &[u8; $n]) -> Option<Peer> {
                // SAFETY: as in `endpoint`.
                unsafe { maps::$peers.get(addr).copied() }
            }

            #[inline(always)]
            fn block(&self, addr: &[u8; $n]) -> Option<Peer> {
                maps::$cidrs.get(&Key::new($n * 8, *addr)).copied()
            }

            #[inline(always)]
            fn policy(&self, key: &PolicyKey) -> Option<PolicyEntry> {
                // SAFETY: as in `endpoint`.
                unsafe { POLICY.get(key).copied() }
            }

            #[inline(always)]
            fn service(&self, key: &ServiceKey<$n>) -> Option<Service> {
                // SAFETY: as in `endpoint`.
                unsafe { maps::$services.get(key).copied() }
            }

            #[inline(always)]
            fn backend(&self, key: &BackendKey) -> Option<Backend<$n>> {
                // SAFETY: as in `endpoint`.
                unsafe { maps::$backends.get(key).copied() }
            }

            #[inline(always)]
            fn maglev(&self, key: &MaglevKey, entry: usize) -> Option<u16> {
                // SAFETY: as in `endpoint`.
                let piece = unsafe { maps::$maglev.get(key) }?;
                piece.slots.get(entry & (MAGLEV_PIECE - 1)).copied()
            }

            #[inline(always)]
            fn is_member(&self, member: &Member<$n>) -> bool {
                // SAFETY: nothing of the element is read.
                unsafe { maps::$members.get(member) }.is_some()
            }

            #[inline(always)]
            fn affinity(&self, key: &AffinityKey<$n>) -> Option<Affinity<$n>> {
                // SAFETY: as in `flow`.
                unsafe { maps::$affinity.get(key).copied() }
            }

            #[inline(always)]
            fn put_affinity(&self, key: &AffinityKey<$n>, value: &Affinity<$n>) {
                // A client that is not remembered chooses anew.
                let _ = maps::$affinity.insert(key, value, 0);
            }

            #[inline(always)]
            fn is_in_range(&self, key: &RangeKey<$n>) -> bool {
                maps::$ranges.get(&Key::new(32 + $n * 8, *key)).is_some()
            }

            #[inline(always)]
            fn flow(&self, tuple: &Tuple<$n>, into: &mut CtEntry<$n>) -> bool {
                // SAFETY: elements are replaced whole; an element that the LRU evicts and reuses
                // under this copy yields a mixture of two flows' bytes, as with any LRU map of
                // the kernel; none of its fields is used to address memory.
                match unsafe { maps::$ct.get(tuple) } {
                    Some(entry) => {
                        *into = *entry;
                        true
                    }
                    None => false,
                }
            }

            #[inline(always)]
            fn put_flow(&self, tuple: &Tuple<$n>, entry: &CtEntry<$n>) -> bool {
                maps::$ct.insert(tuple, entry, 0).is_ok()
            }

            #[inline(always)]
            fn claim_flow(&self, tuple: &Tuple<$n>, entry: &CtEntry<$n>) -> bool {
                maps::$ct
                    .insert(tuple, entry, u64::from(BPF_NOEXIST))
                    .is_ok()
            }

            #[inline(always)]
            fn drop_flow(&self, tuple: &Tuple<$n>) {
                // It may be gone already.
                let _ = maps::$ct.remove(tuple);
            }

            #[inline(always)]
            fn fragment(&self, key: &FragKey<$n>) -> Option<FragValue> {
                // SAFETY: as in `flow`.
                unsafe { maps::$frags.get(key).copied() }
            }

            #[inline(always)]
            fn put_fragment(&self, key: &FragKey<$n>, value: &FragValue) -> bool {
                maps::$frags.insert(key, value, 0).is_ok()
            }

            #[inline(always)]
            fn uplink(&self, ifindex: u32) -> Option<[u8; $n]> {
                // SAFETY: as in `endpoint`.
                unsafe { UPLINKS.get(&ifindex).map(|uplink| uplink.$address) }
            }

            #[inline(always)]
            fn is_exempt(&self, addr: &[u8; $n]) -> bool {
                maps::$nonmasq.get(&Key::new($n * 8, *addr)).is_some()
            }

            #[inline(always)]
            fn tunnel(&self, addr: &[u8; $n]) -> Option<Tunnel> {
                maps::$tunnels.get(&Key::new($n * 8, *addr)).copied()
            }

            #[inline(always)]
            fn tunnel_device(&self) -> TunnelDevice {
                CONFIG
                    .get(0)
                    .map_or_else(TunnelDevice::default, |config| config.tunnel)
            }

            #[inline(always)]
            fn host(&self) -> HostDevice {
                CONFIG
                    .get(0)
                    .map_or_else(HostDevice::default, |config| config.host)
            }

            #[inline(always)]
            fn ports(&self) -> (u16, u16) {
                CONFIG
                    .get(0)
                    .map_or((0, 0), |config| (config.port_low, config.port_high))
            }

            #[inline(always)]
            fn nat(&self, tuple: &Tuple<$n>, into: &mut NatEntry<$n>) -> bool {
                // SAFETY: as in `flow`.
                match unsafe { maps::$nat.get(tuple) } {
                    Some(entry) => {
                        *into = *entry;
                        true
                    }
                    None => false,
                }
            }

            #[inline(always)]
            fn put_nat(&self, tuple: &Tuple<$n>, entry: &NatEntry<$n>) -> bool {
                maps::$nat.insert(tuple, entry, 0).is_ok()
            }

            #[inline(always)]
            fn claim_nat(&self, tuple: &Tuple<$n>, entry: &NatEntry<$n>) -> bool {
                maps::$nat
                    .insert(tuple, entry, u64::from(BPF_NOEXIST))
                    .is_ok()
            }

            #[inline(always)]
            fn drop_nat(&self, tuple: &Tuple<$n>) {
                // It may be gone already.
                let _ = maps::$nat.remove(tuple);
            }

            #[inline(always)]
            fn tick(&self) -> u8 {
                // SAFETY: the helper has no arguments (Linux 5.5; the verifier makes it a load).
                // 256 jiffies are 0.26 to 2.6 seconds.
                (unsafe { bpf_jiffies64() } >> 8) as u8
            }

            #[inline(always)]
            fn now(&self) -> u32 {
                seconds()
            }
        }
    };
}

families!(tables);
