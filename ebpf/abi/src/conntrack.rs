//! Connection tracking: two entries a flow, each under the tuple that its packets carry when they
//! reach a program, so that an established packet costs one lookup in either direction.
//!
//! ```text
//! client -> 10.96.0.10:80   original entry: rewrite destination to the backend
//! backend:8080 -> client    reply entry:    rewrite source to 10.96.0.10:80
//! ```

use crate::proto;

/// The tuple of a packet, as seen on the wire before any rewrite of ours.
///
/// ICMP echo has its identifier as both ports; other ICMP has zeros.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple<const N: usize> {
    /// Source address.
    pub src: [u8; N],
    /// Destination address.
    pub dst: [u8; N],
    /// Source port, network order.
    pub sport: [u8; 2],
    /// Destination port, network order.
    pub dport: [u8; 2],
    /// IANA protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

impl<const N: usize> Tuple<N> {
    /// The tuple of the opposite direction.
    #[must_use]
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            proto: self.proto,
            pad: [0; 3],
        }
    }
}

/// How many seconds [`CtEntry::last_seen`] may lag behind packets of the other direction.
pub const REFRESH_OTHER: u32 = 10;

/// One direction of a flow.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CtEntry<const N: usize> {
    /// When a packet of the flow was last noted (the other direction's may be noted up to
    /// [`REFRESH_OTHER`] seconds late), seconds of the coarse monotonic clock.
    pub last_seen: u32,
    /// [`crate::Config::revision`] under which the flow was last judged.
    pub revision: u32,
    /// The rule of the sender's egress that allowed the flow, or [`crate::RULE_NONE`].
    pub egress_rule: u32,
    /// The rule of the receiver's ingress that allowed the flow, or [`crate::RULE_NONE`].
    pub ingress_rule: u32,
    /// With [`CtFlags::NAT`]: on an original entry the backend's address, which becomes the
    /// destination; on a reply entry the Service's address, which becomes the source.
    pub nat_addr: [u8; N],
    /// With [`CtFlags::NAT`]: the port that belongs to `nat_addr`, network order.
    pub nat_port: [u8; 2],
    /// Bits of [`CtFlags`].
    pub flags: u8,
    /// The programs' own: low bits of a cheaper and coarser clock at `last_seen`, which spares a
    /// packet the look at the other one.
    pub tick: u8,
    /// With [`CtFlags::PORT`]: the port of the end that `nat_addr` does not stand for, network
    /// order. On an original entry it becomes the source's, on a reply entry the destination's.
    pub port: [u8; 2],
    /// Zero.
    pub pad: [u8; 2],
}

/// Bits of [`CtEntry::flags`].
pub struct CtFlags;

impl CtFlags {
    /// The entry of the direction that did not open the flow.
    pub const REPLY: u8 = 1 << 0;
    /// The packets of this entry are rewritten.
    pub const NAT: u8 = 1 << 1;
    /// A TCP FIN went this way, or a RST either way.
    pub const CLOSING: u8 = 1 << 2;
    /// The opener is its own backend: both addresses are rewritten, the Service's address standing
    /// for the Pod as its peer. `C:s -> V:v` becomes `V:s -> C:b`, the reply `C:b -> V:s` becomes
    /// `V:v -> C:s`.
    pub const HAIRPIN: u8 = 1 << 3;
    /// The opener's port is rewritten as well, because another live flow of the opener has the
    /// replies' tuple. `C:s -> V:v` becomes `C:p -> B:b`, the reply `B:b -> C:p` becomes
    /// `V:v -> C:s`. Always with [`Self::NAT`], which changes nothing where V:v is B:b.
    pub const PORT: u8 = 1 << 4;
    /// TCP: nothing has answered yet. What only asks, as a port scan does, is soon forgotten.
    pub const OPENING: u8 = 1 << 5;
}

/// Seconds without a packet in either direction after which an entry means nothing any more: the
/// programs ignore it, user space may delete it.
#[must_use]
#[inline(always)]
pub const fn lifetime(proto: u8, flags: u8) -> u32 {
    match proto {
        proto::TCP if flags & (CtFlags::CLOSING | CtFlags::OPENING) != 0 => 120,
        proto::TCP => 86_400,
        proto::UDP => 180,
        proto::SCTP => 3_600,
        proto::ICMP | proto::ICMPV6 => 30,
        _ => 600,
    }
}

/// Names a fragmented datagram (RFC 791 section 3.2, RFC 8200 section 4.5).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FragKey<const N: usize> {
    /// Source address.
    pub src: [u8; N],
    /// Destination address.
    pub dst: [u8; N],
    /// Identification, network order; IPv4's 16 bits in the first two bytes.
    pub id: [u8; 4],
    /// IANA protocol number of the datagram.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// The ports of a fragmented datagram, from its first fragment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FragValue {
    /// Source port, network order.
    pub sport: [u8; 2],
    /// Destination port, network order.
    pub dport: [u8; 2],
}

const _: () = assert!(size_of::<Tuple<4>>() == 16);
const _: () = assert!(size_of::<Tuple<16>>() == 40);
const _: () = assert!(size_of::<CtEntry<4>>() == 28);
const _: () = assert!(size_of::<CtEntry<16>>() == 40);
const _: () = assert!(size_of::<FragKey<4>>() == 16);
const _: () = assert!(size_of::<FragKey<16>>() == 40);
const _: () = assert!(size_of::<FragValue>() == 4);
