//! The maps, under the names of [`hachi_abi::map`]. Sizes are the loader's business: the numbers
//! here are what a plain load gets.
//!
//! Hashes that hold configuration are not preallocated, so they take memory as they fill. The tables
//! that the datapath writes are. Those of flows are no LRUs: a full one refuses new flows, and never
//! forgets a live one.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray},
};
use hachi_abi::{
    Affinity, AffinityKey, Backend, BackendKey, Config, ConfigFlags, Counter, CtEntry, Endpoint,
    FragKey, FragValue, MaglevKey, MaglevPiece, Member, NatEntry, Peer, PolicyEntry, PolicyKey,
    RangeKey, Reason, Service, ServiceKey, SocketEntry, SocketKey, Tunnel, Tuple, Uplink,
};
use hachi_datapath::Scratch;

use crate::action::Action;

#[map]
pub(crate) static ABI: HashMap<u32, u32> = HashMap::with_max_entries(1, 0);
#[map]
pub(crate) static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
pub(crate) static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(Reason::COUNT, 0);
#[map]
pub(crate) static ACTION: PerCpuArray<Action> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub(crate) static POLICY: HashMap<PolicyKey, PolicyEntry> =
    HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static UPLINKS: HashMap<u32, Uplink> = HashMap::with_max_entries(64, BPF_F_NO_PREALLOC);

macro_rules! family {
    ($n:literal, $tables:ident, $address:ident, $endpoints:ident, $peers:ident, $cidrs:ident, $services:ident, $backends:ident,
     $maglev:ident, $members:ident, $affinity:ident, $ranges:ident,
     $ct:ident, $frags:ident, $nat:ident, $nonmasq:ident, $tunnels:ident, $sockets:ident,
     $scratch:ident) => {
        #[map]
        pub(crate) static $scratch: PerCpuArray<Scratch<$n>> = PerCpuArray::with_max_entries(1, 0);
        #[map]
        pub(crate) static $endpoints: HashMap<[u8; $n], Endpoint> =
            HashMap::with_max_entries(4_096, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $peers: HashMap<[u8; $n], Peer> =
            HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $cidrs: LpmTrie<[u8; $n], Peer> =
            LpmTrie::with_max_entries(16_384, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $services: HashMap<ServiceKey<$n>, Service> =
            HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $backends: HashMap<BackendKey, Backend<$n>> =
            HashMap::with_max_entries(262_144, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $maglev: HashMap<MaglevKey, MaglevPiece> =
            HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $members: HashMap<Member<$n>, u32> =
            HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $affinity: LruHashMap<AffinityKey<$n>, Affinity<$n>> =
            LruHashMap::with_max_entries(65_536, 0);
        #[map]
        pub(crate) static $ranges: LpmTrie<RangeKey<$n>, u32> =
            LpmTrie::with_max_entries(16_384, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $ct: HashMap<Tuple<$n>, CtEntry<$n>> =
            HashMap::with_max_entries(262_144, 0);
        #[map]
        pub(crate) static $frags: LruHashMap<FragKey<$n>, FragValue> =
            LruHashMap::with_max_entries(8_192, 0);
        #[map]
        pub(crate) static $nat: HashMap<Tuple<$n>, NatEntry<$n>> =
            HashMap::with_max_entries(131_072, 0);
        #[map]
        pub(crate) static $nonmasq: LpmTrie<[u8; $n], u32> =
            LpmTrie::with_max_entries(16_384, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $tunnels: LpmTrie<[u8; $n], Tunnel> =
            LpmTrie::with_max_entries(65_536, BPF_F_NO_PREALLOC);
        #[map]
        pub(crate) static $sockets: LruHashMap<SocketKey<$n>, SocketEntry<$n>> =
            LruHashMap::with_max_entries(65_536, 0);
    };
}

/// Names the maps of both families, in the order in which `family!` and `tables!` take them.
macro_rules! families {
    ($do:ident) => {
        $do!(
            4,
            Tables4,
            v4,
            ENDPOINTS_V4,
            PEERS_V4,
            CIDRS_V4,
            SERVICES_V4,
            BACKENDS_V4,
            MAGLEV_V4,
            MEMBERS_V4,
            AFFINITY_V4,
            RANGES_V4,
            CT_V4,
            FRAGS_V4,
            NAT_V4,
            NONMASQ_V4,
            TUNNELS_V4,
            SOCKETS_V4,
            SCRATCH_V4
        );
        $do!(
            16,
            Tables6,
            v6,
            ENDPOINTS_V6,
            PEERS_V6,
            CIDRS_V6,
            SERVICES_V6,
            BACKENDS_V6,
            MAGLEV_V6,
            MEMBERS_V6,
            AFFINITY_V6,
            RANGES_V6,
            CT_V6,
            FRAGS_V6,
            NAT_V6,
            NONMASQ_V6,
            TUNNELS_V6,
            SOCKETS_V6,
            SCRATCH_V6
        );
    };
}
pub(crate) use families;

families!(family);

/// Whether a packet that passes must not meet another program of ours at the same hook.
#[inline(always)]
pub(crate) fn is_once() -> bool {
    CONFIG
        .get(0)
        .is_some_and(|config| config.flags & ConfigFlags::ONCE != 0)
}

/// Adds a packet of `bytes` to the counter of a reason's number on this CPU.
#[inline(always)]
pub(crate) fn count(reason: u32, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason) {
        // SAFETY: the pointer is to this CPU's element, which user space only reads, and a tc
        // program is not preempted by another on its CPU (Linux 6.1: softirqs are off).
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
}
