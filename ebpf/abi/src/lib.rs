//! What the eBPF programs and user space share: map names, keys, values, reasons.
//!
//! Everything here is plain bytes with explicit padding that is always zero (a map key is compared
//! byte by byte, padding included). Numbers of the wire (addresses, ports) are byte arrays in
//! **network order**; counters, ids and indices are native integers. The address length `N` is 4
//! (IPv4) or 16 (IPv6): one definition serves both families, in separate maps.
//!
//! Any change of a size, an offset or a meaning raises [`ABI_VERSION`]; `tests/layout.rs` fails
//! when the layout changes without it.
#![no_std]

mod conntrack;
mod host;
mod maps;
mod nat;
mod policy;
mod reason;
mod service;
mod socket;
mod tunnel;

pub use conntrack::{CtEntry, CtFlags, FragKey, FragValue, REFRESH_OTHER, Tuple, lifetime};
pub use host::HostDevice;
pub use maps::{Config, ConfigFlags, Counter, Endpoint, Peer, PeerFlags, map};
pub use nat::{NatEntry, NatFlags, Uplink, nat_lifetime};
pub use policy::{
    CLASS_WORLD, PolicyEntry, PolicyKey, RULE_NONE, SET_ALLOW_ALL, SHAPE_ANY_PROTO, Shapes, Verdict,
};
pub use reason::Reason;
pub use service::{
    Affinity, AffinityKey, Backend, BackendKey, MAGLEV_PIECE, MaglevKey, MaglevPiece, Member,
    RangeKey, Scope, Service, ServiceFlags, ServiceKey,
};
pub use socket::{SocketEntry, SocketKey, SocketWay};
pub use tunnel::{Tunnel, TunnelDevice, TunnelFlags};

/// The version of every layout in this crate. It is part of the pin path, so that programs and
/// maps of different versions never meet.
pub const ABI_VERSION: u32 = 4;

/// The version of what flows are remembered in (conntrack, NAT, fragments, affinity, sockets): layout and
/// meaning. It rises when any of these changes; as long as it does not, an agent of another
/// [`ABI_VERSION`] goes on with the flows that it finds.
pub const STATE_VERSION: u32 = 1;

/// IANA protocol numbers that the datapath knows by name.
pub mod proto {
    /// ICMP (RFC 792).
    pub const ICMP: u8 = 1;
    /// TCP (RFC 9293).
    pub const TCP: u8 = 6;
    /// UDP (RFC 768).
    pub const UDP: u8 = 17;
    /// ICMPv6 (RFC 4443).
    pub const ICMPV6: u8 = 58;
    /// SCTP (RFC 9260).
    pub const SCTP: u8 = 132;
}

/// The length of an IPv4 address in bytes.
pub const V4: usize = 4;
/// The length of an IPv6 address in bytes.
pub const V6: usize = 16;

#[cfg(feature = "user")]
mod user {
    use super::*;

    macro_rules! pod {
        ($($t:ty),* $(,)?) => {$(
            // SAFETY: the type is `repr(C)`, made of integers and byte arrays alone, without
            // implicit padding (asserted beside its definition): every byte of it is initialised,
            // and it holds no reference.
            unsafe impl aya::Pod for $t {}
        )*};
    }

    pod!(
        Config,
        Counter,
        Endpoint,
        Peer,
        PolicyKey,
        PolicyEntry,
        Service,
        BackendKey,
        MaglevKey,
        MaglevPiece,
        Uplink,
        Tunnel,
        TunnelDevice,
        HostDevice
    );
    pod!(ServiceKey<4>, ServiceKey<16>, Backend<4>, Backend<16>);
    pod!(Member<4>, Member<16>, RangeKey<4>, RangeKey<16>);
    pod!(AffinityKey<4>, AffinityKey<16>, Affinity<4>, Affinity<16>);
    pod!(Tuple<4>, Tuple<16>, CtEntry<4>, CtEntry<16>);
    pod!(FragKey<4>, FragKey<16>, FragValue);
    pod!(NatEntry<4>, NatEntry<16>);
    pod!(SocketKey<4>, SocketKey<16>, SocketEntry<4>, SocketEntry<16>);
}
