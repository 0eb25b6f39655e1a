//! Source address translation: what leaves the node by an uplink under the node's own address.
//!
//! A stage of its own beside connection tracking, on the wire's side of it:
//!
//! ```text
//! leaving the node     tracked tuple P:p -> W:w   forward entry: the source becomes N:a
//! coming back          W:w -> N:a                 reply entry:   the destination becomes P:p
//! ```
//!
//! P is a Pod of this node (masquerade), or a client whose packets go on to a backend of another
//! node. The reply entry's key is what makes a translation exclusive: it is only ever added where
//! there is none. The node's own connections claim theirs too, with a reply entry that changes
//! nothing.

use crate::proto;

/// One direction of a translated flow; its key is the [`crate::Tuple`] that packets carry before
/// they are translated.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NatEntry<const N: usize> {
    /// When a packet of either direction was last noted, seconds of the coarse monotonic clock.
    pub last_seen: u32,
    /// The address to put in: the destination's with [`NatFlags::REPLY`], else the source's.
    pub addr: [u8; N],
    /// Its port (or ICMP identifier), network order.
    pub port: [u8; 2],
    /// Bits of [`NatFlags`].
    pub flags: u8,
    /// Zero.
    pub pad: u8,
}

/// Bits of [`NatEntry::flags`].
pub struct NatFlags;

impl NatFlags {
    /// The entry of packets that come back: their destination is what changes.
    pub const REPLY: u8 = 1 << 0;
    /// A TCP FIN has left the node.
    pub const FIN_OUT: u8 = 1 << 1;
    /// A TCP FIN has come back.
    pub const FIN_IN: u8 = 1 << 2;
    /// A TCP RST went either way.
    pub const RESET: u8 = 1 << 3;
    /// TCP: nothing has come back yet.
    pub const OPENING: u8 = 1 << 4;
}

/// Seconds without a packet in either direction after which a translation is over: its tuple may
/// be given to another flow, and user space may delete its entries.
///
/// A TCP connection that both sides have ended keeps its tuple for a moment longer, so that what is
/// still under way finds its receiver.
#[must_use]
#[inline(always)]
pub const fn nat_lifetime(number: u8, flags: u8) -> u32 {
    const CLOSED: u8 = NatFlags::FIN_IN | NatFlags::FIN_OUT;
    match number {
        proto::TCP if flags & NatFlags::RESET != 0 || flags & CLOSED == CLOSED => 10,
        proto::TCP if flags & (CLOSED | NatFlags::OPENING) != 0 => 120,
        proto::TCP => 86_400,
        proto::UDP => 180,
        proto::SCTP => 3_600,
        proto::ICMP | proto::ICMPV6 => 30,
        _ => 600,
    }
}

/// A device by which the node talks to other nodes and the world; value of the `UPLINKS` map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uplink {
    /// The node's IPv4 address on it, that translated packets leave with; zeros: none.
    pub v4: [u8; 4],
    /// The node's IPv6 address on it; zeros: none.
    pub v6: [u8; 16],
    /// Zero; room for bits.
    pub flags: u32,
}

const _: () = assert!(size_of::<NatEntry<4>>() == 12);
const _: () = assert!(size_of::<NatEntry<16>>() == 24);
const _: () = assert!(size_of::<Uplink>() == 24);
