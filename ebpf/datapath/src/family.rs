//! What differs between IPv4 and IPv6.

use hachi_abi::Reason;

use crate::{
    ip::{self, Header},
    traits::Packet,
};

/// One of the two families; `N` is the length of its addresses in bytes.
pub trait Family<const N: usize> {
    /// EtherType, network order.
    const ETHERTYPE: [u8; 2];
    /// Protocol number of the family's ICMP.
    const ICMP: u8;
    /// ICMP types of an echo request and of its reply.
    const ECHO_REQUEST: u8;
    /// See [`Self::ECHO_REQUEST`].
    const ECHO_REPLY: u8;
    /// Offset of the time to live, or hop limit, in an IP header.
    const HOPS: usize;
    /// Offset of the source address in an IP header.
    const SOURCE: usize;
    /// Offset of the destination address in an IP header.
    const DESTINATION: usize;
    /// Offset of the header checksum in an IP header, if it has one.
    const CHECKSUM: Option<usize>;
    /// Length of the header without options.
    const HEADER: usize;
    /// Type and code of "port unreachable".
    const PORT_UNREACHABLE: [u8; 2];

    /// Reads the IP header and what extends it.
    ///
    /// # Errors
    /// The reason to drop the packet.
    fn header<P: Packet>(packet: &P) -> Result<Header<N>, Reason>;
    /// Whether an ICMP type is an echo request or reply.
    fn is_echo(kind: u8) -> bool;
    /// Whether an ICMP type reports an error, with the packet it is about inside.
    fn is_error(kind: u8) -> bool;
    /// Whether an ICMP message belongs to the link: neighbour discovery or multicast listener
    /// discovery that no router can have forwarded (RFC 4861, RFC 3810).
    fn is_link(kind: u8, hops: u8) -> bool;
    /// Whether such a message is one that a host sends, not a router.
    fn is_host_link(kind: u8) -> bool;
    /// Whether such a message is of listener discovery, whose hop limit is 1.
    fn is_listener(kind: u8) -> bool;
    /// Whether an address is good on its link only, or a multicast group of the link.
    fn is_link_scope(addr: &[u8; N]) -> bool;
    /// Whether an address is the unspecified one.
    fn is_unspecified(addr: &[u8; N]) -> bool {
        *addr == [0; N]
    }
    /// Whether an address is a group's, or the link's broadcast address.
    fn is_multicast(addr: &[u8; N]) -> bool;
}

/// IPv4.
#[derive(Clone, Copy, Debug)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug)]
pub struct V6;

impl Family<4> for V4 {
    const ETHERTYPE: [u8; 2] = [0x08, 0x00];
    const ICMP: u8 = hachi_abi::proto::ICMP;
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    const HOPS: usize = 8;
    const SOURCE: usize = 12;
    const DESTINATION: usize = 16;
    const CHECKSUM: Option<usize> = Some(10);
    const HEADER: usize = 20;
    const PORT_UNREACHABLE: [u8; 2] = [3, 3];

    #[inline(always)]
    fn header<P: Packet>(packet: &P) -> Result<Header<4>, Reason> {
        ip::v4(packet)
    }

    #[inline(always)]
    fn is_echo(kind: u8) -> bool {
        kind == Self::ECHO_REQUEST || kind == Self::ECHO_REPLY
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Unreachable, source quench, time exceeded, parameter problem (RFC 792).
        matches!(kind, 3 | 4 | 11 | 12)
    }

    #[inline(always)]
    fn is_link(_: u8, _: u8) -> bool {
        false
    }

    #[inline(always)]
    fn is_host_link(_: u8) -> bool {
        false
    }

    #[inline(always)]
    fn is_listener(_: u8) -> bool {
        false
    }

    #[inline(always)]
    fn is_link_scope(_: &[u8; 4]) -> bool {
        false
    }

    #[inline(always)]
    fn is_multicast(addr: &[u8; 4]) -> bool {
        addr[0] & 0xf0 == 0xe0 || *addr == [255; 4]
    }
}

impl Family<16> for V6 {
    const ETHERTYPE: [u8; 2] = [0x86, 0xdd];
    const ICMP: u8 = hachi_abi::proto::ICMPV6;
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    const HOPS: usize = 7;
    const SOURCE: usize = 8;
    const DESTINATION: usize = 24;
    const CHECKSUM: Option<usize> = None;
    const HEADER: usize = 40;
    const PORT_UNREACHABLE: [u8; 2] = [1, 4];

    #[inline(always)]
    fn header<P: Packet>(packet: &P) -> Result<Header<16>, Reason> {
        ip::v6(packet)
    }

    #[inline(always)]
    fn is_echo(kind: u8) -> bool {
        kind == Self::ECHO_REQUEST || kind == Self::ECHO_REPLY
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // RFC 4443: unreachable, packet too big, time exceeded, parameter problem.
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn is_link(kind: u8, hops: u8) -> bool {
        if Self::is_listener(kind) {
            hops == 1
        } else {
            matches!(kind, 133..=137) && hops == 255
        }
    }

    #[inline(always)]
    fn is_listener(kind: u8) -> bool {
        matches!(kind, 130..=132 | 143)
    }

    #[inline(always)]
    fn is_host_link(kind: u8) -> bool {
        // Router solicitation, neighbour solicitation and advertisement, listener reports.
        matches!(kind, 133 | 135 | 136 | 131 | 132 | 143)
    }

    #[inline(always)]
    fn is_link_scope(addr: &[u8; 16]) -> bool {
        (addr[0] == 0xfe && addr[1] & 0xc0 == 0x80) || (addr[0] == 0xff && addr[1] & 0x0f == 2)
    }

    #[inline(always)]
    fn is_multicast(addr: &[u8; 16]) -> bool {
        addr[0] == 0xff
    }
}
