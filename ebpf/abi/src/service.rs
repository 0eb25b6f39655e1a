//! Services: `(address, port, protocol, scope) -> service`, then `(service, slot) -> backend`.
//!
//! What else a Service may need is in maps of its own, asked for new flows alone, and only where the
//! Service says so:
//! - `MAGLEV`: consistent hashing, `(service, slot of the table) -> slot`;
//! - `AFFINITY`: which backend a client had, and `MEMBERS`: whether the Service still has it;
//! - `RANGES`: who may use a load balancer's address.

/// Values of [`ServiceKey::scope`].
pub struct Scope;

impl Scope {
    /// Sent by a Pod of this node, or by the node itself: `externalTrafficPolicy` does not bind it.
    pub const INTERNAL: u8 = 0;
    /// Arrived on an uplink. ClusterIPs are not served there.
    pub const EXTERNAL: u8 = 1;
}

/// Key of the `SERVICES` maps.
///
/// With port 0 and protocol 0 it stands for all ports of an address that have no entry of their own:
/// its Service has no backend, so that they are rejected. Asked only for flows that no other entry
/// takes, of TCP, UDP and SCTP.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey<const N: usize> {
    /// The frontend's address.
    pub addr: [u8; N],
    /// The frontend's port, network order.
    pub port: [u8; 2],
    /// IANA protocol number.
    pub proto: u8,
    /// Where the packet comes from, see [`Scope`].
    pub scope: u8,
}

/// Value of the `SERVICES` maps.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Service {
    /// The first half of the backends' keys.
    pub id: u32,
    /// Number of backends: slots 0 to `count - 1` are valid.
    pub count: u32,
    /// Bits of [`ServiceFlags`].
    pub flags: u32,
    /// Session affinity by client address, in seconds; 0 for none.
    pub affinity: u32,
    /// Size of the Service's table in `MAGLEV`; 0: the hash chooses a slot itself.
    pub table: u32,
}

/// Bits of [`Service::flags`].
pub struct ServiceFlags;

impl ServiceFlags {
    /// With no backend the packet is dropped in silence (a traffic policy of Local with endpoints
    /// on other nodes alone), not rejected.
    pub const DROP_WHEN_EMPTY: u32 = 1 << 0;
    /// Only sources in `RANGES` are served; the node itself always is.
    pub const SOURCE_RANGES: u32 = 1 << 1;
}

/// Key of the `BACKENDS` maps.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendKey {
    /// [`Service::id`].
    pub service: u32,
    /// 0 to [`Service::count`] - 1.
    pub slot: u32,
}

/// Value of the `BACKENDS` maps.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend<const N: usize> {
    /// The backend's address.
    pub addr: [u8; N],
    /// The backend's port, network order.
    pub port: [u8; 2],
    /// Zero.
    pub pad: [u8; 2],
}

/// Key of the `MAGLEV` maps: a piece of a Service's table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MaglevKey {
    /// [`Service::id`].
    pub service: u32,
    /// The first entry's place in the table, divided by [`MAGLEV_PIECE`].
    pub piece: u32,
}

/// Entries in one value of the `MAGLEV` maps.
pub const MAGLEV_PIECE: usize = 64;

/// Value of the `MAGLEV` maps: slots of backends; zeros beyond the table's end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MaglevPiece {
    /// [`BackendKey::slot`].
    pub slots: [u16; MAGLEV_PIECE],
}

/// Key of the `MEMBERS` maps: every backend of a Service with affinity, or of UDP, whose unconnected
/// sockets keep theirs. The value is 1.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Member<const N: usize> {
    /// [`Service::id`].
    pub service: u32,
    /// The backend.
    pub backend: Backend<N>,
}

/// Key of the `AFFINITY` maps.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AffinityKey<const N: usize> {
    /// [`Service::id`].
    pub service: u32,
    /// The client's address; zero for the sockets of the node's own processes.
    pub client: [u8; N],
}

/// Value of the `AFFINITY` maps.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Affinity<const N: usize> {
    /// The backend that the client had.
    pub backend: Backend<N>,
    /// When it last opened a flow to it, in seconds of the coarse monotonic clock.
    pub last_used: u32,
}

/// Key of the `RANGES` maps, behind the prefix length, which counts the bits of both fields.
/// The value is 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RangeKey<const N: usize> {
    /// [`Service::id`], in native order: it is matched whole.
    pub service: [u8; 4],
    /// The source.
    pub source: [u8; N],
}

const _: () = assert!(size_of::<ServiceKey<4>>() == 8);
const _: () = assert!(size_of::<ServiceKey<16>>() == 20);
const _: () = assert!(size_of::<Service>() == 20);
const _: () = assert!(size_of::<BackendKey>() == 8);
const _: () = assert!(size_of::<Backend<4>>() == 8);
const _: () = assert!(size_of::<Backend<16>>() == 20);
const _: () = assert!(size_of::<MaglevKey>() == 8);
const _: () = assert!(size_of::<MaglevPiece>() == 2 * MAGLEV_PIECE);
const _: () = assert!(size_of::<Member<4>>() == 12);
const _: () = assert!(size_of::<Member<16>>() == 24);
const _: () = assert!(size_of::<AffinityKey<4>>() == 8);
const _: () = assert!(size_of::<AffinityKey<16>>() == 20);
const _: () = assert!(size_of::<Affinity<4>>() == 12);
const _: () = assert!(size_of::<Affinity<16>>() == 24);
const _: () = assert!(size_of::<RangeKey<4>>() == 8);
const _: () = assert!(size_of::<RangeKey<16>>() == 20);
