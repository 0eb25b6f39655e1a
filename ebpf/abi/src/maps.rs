//! Node-wide state: the configuration, endpoints, peers, counters.

use crate::{HostDevice, TunnelDevice};

/// Map names, as they appear in the object and under the pin directory.
pub mod map {
    /// `Array<Config>`, one entry.
    pub const CONFIG: &str = "CONFIG";
    /// `HashMap<[u8; N], Endpoint>`: the Pods of this node, by address.
    pub const ENDPOINTS: [&str; 2] = ["ENDPOINTS_V4", "ENDPOINTS_V6"];
    /// `HashMap<[u8; N], Peer>`: single addresses (Pods anywhere, node addresses) to their class.
    pub const PEERS: [&str; 2] = ["PEERS_V4", "PEERS_V6"];
    /// `LpmTrie<[u8; N], Peer>`: blocks of addresses to their class, asked after `PEERS`.
    pub const CIDRS: [&str; 2] = ["CIDRS_V4", "CIDRS_V6"];
    /// `HashMap<PolicyKey, PolicyEntry>`.
    pub const POLICY: &str = "POLICY";
    /// `HashMap<ServiceKey<N>, Service>`.
    pub const SERVICES: [&str; 2] = ["SERVICES_V4", "SERVICES_V6"];
    /// `HashMap<BackendKey, Backend<N>>`.
    pub const BACKENDS: [&str; 2] = ["BACKENDS_V4", "BACKENDS_V6"];
    /// `HashMap<MaglevKey, MaglevPiece>`: tables of consistent hashing.
    pub const MAGLEV: [&str; 2] = ["MAGLEV_V4", "MAGLEV_V6"];
    /// `HashMap<Member<N>, u32>`: backends of Services with affinity.
    pub const MEMBERS: [&str; 2] = ["MEMBERS_V4", "MEMBERS_V6"];
    /// `LruHashMap<AffinityKey<N>, Affinity<N>>`: which backend a client had.
    pub const AFFINITY: [&str; 2] = ["AFFINITY_V4", "AFFINITY_V6"];
    /// `LpmTrie<RangeKey<N>, u32>`: who may use load balancers' addresses.
    pub const RANGES: [&str; 2] = ["RANGES_V4", "RANGES_V6"];
    /// `HashMap<Tuple<N>, CtEntry<N>>`: two entries a flow, one for each direction.
    pub const CONNTRACK: [&str; 2] = ["CT_V4", "CT_V6"];
    /// `LruHashMap<FragKey<N>, FragValue>`: ports of fragmented datagrams.
    pub const FRAGMENTS: [&str; 2] = ["FRAGS_V4", "FRAGS_V6"];
    /// `HashMap<Tuple<N>, NatEntry<N>>`: source address translation.
    pub const NAT: [&str; 2] = ["NAT_V4", "NAT_V6"];
    /// `LpmTrie<[u8; N], u32>`: where Pods go under their own addresses; the value says nothing.
    pub const NON_MASQUERADE: [&str; 2] = ["NONMASQ_V4", "NONMASQ_V6"];
    /// `HashMap<u32, Uplink>`: devices that lead out of the node, by index.
    pub const UPLINKS: &str = "UPLINKS";
    /// `LpmTrie<[u8; N], Tunnel>`: Pods' blocks and nodes' addresses, by the node's tunnel address.
    pub const TUNNELS: [&str; 2] = ["TUNNELS_V4", "TUNNELS_V6"];
    /// `LruHashMap<SocketKey<N>, SocketEntry<N>>`: sockets that were given a backend.
    pub const SOCKETS: [&str; 2] = ["SOCKETS_V4", "SOCKETS_V6"];
    /// `PerCpuArray<Counter>`, indexed by `Reason`.
    pub const COUNTERS: &str = "COUNTERS";
    /// `HashMap<u32, u32>`: 0 to [`crate::ABI_VERSION`], 1 to [`crate::STATE_VERSION`], for people and
    /// other versions that look at the pins.
    pub const ABI: &str = "ABI";
}

/// The node's own settings; one entry, rewritten by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Config {
    /// Raised after every change that can alter a verdict: a flow judged under another revision is
    /// judged again at its next packet. Never 0 once the agent has written it.
    pub revision: u32,
    /// Bits of [`ConfigFlags`].
    pub flags: u32,
    /// The first port that translated flows are given.
    pub port_low: u16,
    /// The last one, inclusive; 0: no port may be given.
    pub port_high: u16,
    /// The node's end of its tunnels.
    pub tunnel: TunnelDevice,
    /// Where the node's own packets to Services go.
    pub host: HostDevice,
    /// Zero; room for later fields.
    pub reserved: [u32; 5],
}

/// Bits of [`Config::flags`].
pub struct ConfigFlags;

impl ConfigFlags {
    /// Deliver to local Pods with `bpf_redirect_peer`; otherwise the host's stack forwards.
    pub const REDIRECT_PEER: u32 = 1 << 0;
    /// What Pods send out of the cluster leaves with the node's address.
    pub const MASQUERADE: u32 = 1 << 1;
    /// Forward to other nodes with `bpf_redirect_neigh`; otherwise the host's stack forwards.
    pub const REDIRECT_NEIGH: u32 = 1 << 2;
    /// A program may be at a hook twice just now, as a link and as a filter: a packet that passes
    /// one of them is through, so that nothing is judged and rewritten a second time. Set by the
    /// loader while it changes from one to the other; other filters of the hook are skipped then.
    pub const ONCE: u32 = 1 << 3;
}

/// A Pod of this node, found by its address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// Index of the veth's host side.
    pub ifindex: u32,
    /// Policy set of traffic to the Pod; [`crate::SET_ALLOW_ALL`] if it is not isolated.
    pub ingress_set: u32,
    /// Policy set of traffic from the Pod; [`crate::SET_ALLOW_ALL`] if it is not isolated.
    pub egress_set: u32,
    /// [`crate::Shapes`] bits of the entries in `ingress_set`.
    pub ingress_shapes: u32,
    /// [`crate::Shapes`] bits of the entries in `egress_set`.
    pub egress_shapes: u32,
    /// MAC address of the Pod's interface.
    pub mac: [u8; 6],
    /// MAC address of the veth's host side (the Pod's gateway neighbour).
    pub host_mac: [u8; 6],
}

/// What policies can tell about an address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer {
    /// The class; addresses of one class are the same to every rule in force on this node.
    pub class: u32,
    /// Bits of [`PeerFlags`].
    pub flags: u32,
}

/// Bits of [`Peer::flags`].
pub struct PeerFlags;

impl PeerFlags {
    /// An address of this node itself, which may always reach its Pods (kubelet's probes).
    pub const LOCAL_NODE: u32 = 1 << 0;
}

/// Packets and bytes of one [`crate::Reason`] on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes, from the Ethernet header on.
    pub bytes: u64,
}

const _: () = assert!(size_of::<Config>() == 64);
const _: () = assert!(size_of::<Endpoint>() == 32);
const _: () = assert!(size_of::<Peer>() == 8);
const _: () = assert!(size_of::<Counter>() == 16);
