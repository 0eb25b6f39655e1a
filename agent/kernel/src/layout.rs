//! What every map must look like: type, sizes, capacity.
//!
//! aya reuses a pinned map whatever its layout, and the verifier then judges the programs against
//! the wrong sizes; so both the pinned maps and those of the object are compared with this table.

use std::collections::BTreeMap;

use aya::maps::{MapInfo, MapType};
use hachi_abi::{
    Affinity, AffinityKey, Backend, BackendKey, Config, Counter, CtEntry, Endpoint, FragKey,
    FragValue, MaglevKey, MaglevPiece, Member, NatEntry, Peer, PolicyEntry, PolicyKey, RangeKey,
    Reason, Service, ServiceKey, SocketEntry, SocketKey, Tunnel, Tuple, Uplink, V4, V6, map,
};

use crate::KernelError;

/// How many entries each map can hold; the two families have a map each.
///
/// The defaults fit a cluster of 10 000 Pods and 100 000 Services. Maps that are pinned already
/// keep the capacity that they have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacities {
    /// Pods of this node.
    pub endpoints: u32,
    /// Single addresses with a class: Pods anywhere and nodes.
    pub peers: u32,
    /// Address blocks.
    pub cidrs: u32,
    /// Entries of all policy sets.
    pub policy: u32,
    /// Frontends: one for every address, port and protocol of a Service.
    pub services: u32,
    /// Backends: one for every endpoint of every port of a Service.
    pub backends: u32,
    /// Pieces of consistent hashing's tables, of 64 places: 16 for a Service of up to 10 backends
    /// that is reached from outside, 128 up to 81, 1 024 above.
    pub maglev: u32,
    /// Backends of Services with session affinity, and of those of UDP.
    pub members: u32,
    /// Clients of Services with session affinity. Allocated at once.
    pub affinity: u32,
    /// `loadBalancerSourceRanges`, for every port of a Service.
    pub ranges: u32,
    /// Connection tracking: two entries a flow. Allocated at once, unlike the others.
    pub conntrack: u32,
    /// Fragmented datagrams under way. Allocated at once.
    pub fragments: u32,
    /// Source address translation: two entries a flow. Allocated at once.
    pub nat: u32,
    /// Blocks that Pods reach under their own addresses.
    pub non_masquerade: u32,
    /// Devices that lead out of the node.
    pub uplinks: u32,
    /// Pods' blocks and addresses of nodes.
    pub tunnels: u32,
    /// Sockets that were given a backend for a Service's address. Allocated at once.
    pub sockets: u32,
}

impl Default for Capacities {
    fn default() -> Self {
        Self {
            endpoints: 4_096,
            peers: 131_072,
            cidrs: 32_768,
            policy: 524_288,
            services: 262_144,
            backends: 524_288,
            maglev: 65_536,
            members: 131_072,
            affinity: 65_536,
            ranges: 16_384,
            conntrack: 262_144,
            fragments: 8_192,
            nat: 131_072,
            non_masquerade: 16_384,
            uplinks: 64,
            tunnels: 65_536,
            sockets: 65_536,
        }
    }
}

/// One map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) name: &'static str,
    pub(crate) kind: MapType,
    pub(crate) key: u32,
    pub(crate) value: u32,
    pub(crate) capacity: Capacity,
}

/// How many entries a map may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capacity {
    /// Part of the ABI.
    Exactly(u32),
    /// A matter of configuration; a pinned map keeps what it has.
    Configured(u32),
}

impl Capacity {
    pub(crate) fn entries(self) -> u32 {
        match self {
            Self::Exactly(entries) | Self::Configured(entries) => entries,
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "keys and values are below 100 bytes"
)]
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// An LPM key is the prefix length, then the address.
const fn lpm(address: usize) -> u32 {
    size::<u32>() + address as u32
}

/// Every map, by name.
pub(crate) fn layouts(capacities: &Capacities) -> BTreeMap<&'static str, Layout> {
    use Capacity::{Configured, Exactly};
    use MapType::{Array, Hash, LpmTrie, LruHash, PerCpuArray};
    let c = capacities;
    let rows = [
        (map::ABI, Hash, size::<u32>(), size::<u32>(), Exactly(2)),
        (
            map::CONFIG,
            Array,
            size::<u32>(),
            size::<Config>(),
            Exactly(1),
        ),
        (
            map::COUNTERS,
            PerCpuArray,
            size::<u32>(),
            size::<Counter>(),
            Exactly(Reason::COUNT),
        ),
        (
            map::POLICY,
            Hash,
            size::<PolicyKey>(),
            size::<PolicyEntry>(),
            Configured(c.policy),
        ),
        (
            map::ENDPOINTS[0],
            Hash,
            V4 as u32,
            size::<Endpoint>(),
            Configured(c.endpoints),
        ),
        (
            map::ENDPOINTS[1],
            Hash,
            V6 as u32,
            size::<Endpoint>(),
            Configured(c.endpoints),
        ),
        (
            map::PEERS[0],
            Hash,
            V4 as u32,
            size::<Peer>(),
            Configured(c.peers),
        ),
        (
            map::PEERS[1],
            Hash,
            V6 as u32,
            size::<Peer>(),
            Configured(c.peers),
        ),
        (
            map::CIDRS[0],
            LpmTrie,
            lpm(V4),
            size::<Peer>(),
            Configured(c.cidrs),
        ),
        (
            map::CIDRS[1],
            LpmTrie,
            lpm(V6),
            size::<Peer>(),
            Configured(c.cidrs),
        ),
        (
            map::SERVICES[0],
            Hash,
            size::<ServiceKey<V4>>(),
            size::<Service>(),
            Configured(c.services),
        ),
        (
            map::SERVICES[1],
            Hash,
            size::<ServiceKey<V6>>(),
            size::<Service>(),
            Configured(c.services),
        ),
        (
            map::BACKENDS[0],
            Hash,
            size::<BackendKey>(),
            size::<Backend<V4>>(),
            Configured(c.backends),
        ),
        (
            map::BACKENDS[1],
            Hash,
            size::<BackendKey>(),
            size::<Backend<V6>>(),
            Configured(c.backends),
        ),
        (
            map::MAGLEV[0],
            Hash,
            size::<MaglevKey>(),
            size::<MaglevPiece>(),
            Configured(c.maglev),
        ),
        (
            map::MAGLEV[1],
            Hash,
            size::<MaglevKey>(),
            size::<MaglevPiece>(),
            Configured(c.maglev),
        ),
        (
            map::MEMBERS[0],
            Hash,
            size::<Member<V4>>(),
            size::<u32>(),
            Configured(c.members),
        ),
        (
            map::MEMBERS[1],
            Hash,
            size::<Member<V6>>(),
            size::<u32>(),
            Configured(c.members),
        ),
        (
            map::AFFINITY[0],
            LruHash,
            size::<AffinityKey<V4>>(),
            size::<Affinity<V4>>(),
            Configured(c.affinity),
        ),
        (
            map::AFFINITY[1],
            LruHash,
            size::<AffinityKey<V6>>(),
            size::<Affinity<V6>>(),
            Configured(c.affinity),
        ),
        (
            map::RANGES[0],
            LpmTrie,
            lpm(size_of::<RangeKey<V4>>()),
            size::<u32>(),
            Configured(c.ranges),
        ),
        (
            map::RANGES[1],
            LpmTrie,
            lpm(size_of::<RangeKey<V6>>()),
            size::<u32>(),
            Configured(c.ranges),
        ),
        (
            map::CONNTRACK[0],
            Hash,
            size::<Tuple<V4>>(),
            size::<CtEntry<V4>>(),
            Configured(c.conntrack),
        ),
        (
            map::CONNTRACK[1],
            Hash,
            size::<Tuple<V6>>(),
            size::<CtEntry<V6>>(),
            Configured(c.conntrack),
        ),
        (
            map::FRAGMENTS[0],
            LruHash,
            size::<FragKey<V4>>(),
            size::<FragValue>(),
            Configured(c.fragments),
        ),
        (
            map::FRAGMENTS[1],
            LruHash,
            size::<FragKey<V6>>(),
            size::<FragValue>(),
            Configured(c.fragments),
        ),
        (
            map::NAT[0],
            Hash,
            size::<Tuple<V4>>(),
            size::<NatEntry<V4>>(),
            Configured(c.nat),
        ),
        (
            map::NAT[1],
            Hash,
            size::<Tuple<V6>>(),
            size::<NatEntry<V6>>(),
            Configured(c.nat),
        ),
        (
            map::NON_MASQUERADE[0],
            LpmTrie,
            lpm(V4),
            size::<u32>(),
            Configured(c.non_masquerade),
        ),
        (
            map::NON_MASQUERADE[1],
            LpmTrie,
            lpm(V6),
            size::<u32>(),
            Configured(c.non_masquerade),
        ),
        (
            map::UPLINKS,
            Hash,
            size::<u32>(),
            size::<Uplink>(),
            Configured(c.uplinks),
        ),
        (
            map::TUNNELS[0],
            LpmTrie,
            lpm(V4),
            size::<Tunnel>(),
            Configured(c.tunnels),
        ),
        (
            map::TUNNELS[1],
            LpmTrie,
            lpm(V6),
            size::<Tunnel>(),
            Configured(c.tunnels),
        ),
        (
            map::SOCKETS[0],
            LruHash,
            size::<SocketKey<V4>>(),
            size::<SocketEntry<V4>>(),
            Configured(c.sockets),
        ),
        (
            map::SOCKETS[1],
            LruHash,
            size::<SocketKey<V6>>(),
            size::<SocketEntry<V6>>(),
            Configured(c.sockets),
        ),
    ];
    rows.into_iter()
        .map(|(name, kind, key, value, capacity)| {
            (
                name,
                Layout {
                    name,
                    kind,
                    key,
                    value,
                    capacity,
                },
            )
        })
        .collect()
}

impl Layout {
    /// Compares a map with what it must be; returns its capacity.
    pub(crate) fn check(&self, info: &MapInfo, pinned: bool) -> Result<u32, KernelError> {
        let differs = |what, found: String, expected: String| {
            Err(KernelError::Layout {
                map: self.name.to_owned(),
                what,
                found,
                expected,
                pinned,
            })
        };
        let kind = info.map_type().ok();
        if kind != Some(self.kind) {
            let found = kind.map_or_else(|| "unknown".to_owned(), |kind| format!("{kind:?}"));
            return differs("type", found, format!("{:?}", self.kind));
        }
        for (what, found, expected) in [
            ("key size", info.key_size(), self.key),
            ("value size", info.value_size(), self.value),
        ] {
            if found != expected {
                return differs(what, found.to_string(), expected.to_string());
            }
        }
        let found = info.max_entries();
        match self.capacity {
            Capacity::Exactly(expected) if found != expected => {
                differs("capacity", found.to_string(), expected.to_string())
            }
            Capacity::Configured(wanted) if pinned && found != wanted => {
                tracing::warn!(
                    map = self.name,
                    found,
                    wanted,
                    "the pinned map keeps its capacity; `hachi uninstall` and a restart change it"
                );
                Ok(found)
            }
            Capacity::Exactly(_) | Capacity::Configured(_) => Ok(found),
        }
    }
}
