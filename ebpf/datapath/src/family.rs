//! What differs between IPv4 and IPv6.

use crate::parse::ETH_LEN;

/// One of the two families; `N` is the length of its addresses in bytes.
pub trait Family<const N: usize> {
    /// EtherType, network order.
    const ETHERTYPE: [u8; 2];
    /// Protocol number of the family's ICMP.
    const ICMP: u8;
    /// Offset of the source address in an IP header.
    const SOURCE: usize;
    /// Offset of the destination address in an IP header.
    const DESTINATION: usize;
    /// Offset of the header checksum in an IP header, if it has one.
    const CHECKSUM: Option<usize>;
    /// Length of the header without options.
    const HEADER: usize;

    /// Whether an ICMP type is an echo request or reply.
    fn is_echo(kind: u8) -> bool;
    /// Whether an ICMP type reports an error, with the packet it is about inside.
    fn is_error(kind: u8) -> bool;
    /// Whether an ICMP type is neighbour discovery or multicast listener discovery, which belong
    /// to the link and are never judged (RFC 4861, RFC 3810).
    fn is_link(kind: u8) -> bool;
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
    const SOURCE: usize = 12;
    const DESTINATION: usize = 16;
    const CHECKSUM: Option<usize> = Some(10);
    const HEADER: usize = 20;

    #[inline(always)]
    fn is_echo(kind: u8) -> bool {
        kind == 0 || kind == 8
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Unreachable, source quench, time exceeded, parameter problem (RFC 792).
        matches!(kind, 3 | 4 | 11 | 12)
    }

    #[inline(always)]
    fn is_link(_: u8) -> bool {
        false
    }
}

impl Family<16> for V6 {
    const ETHERTYPE: [u8; 2] = [0x86, 0xdd];
    const ICMP: u8 = hachi_abi::proto::ICMPV6;
    const SOURCE: usize = 8;
    const DESTINATION: usize = 24;
    const CHECKSUM: Option<usize> = None;
    const HEADER: usize = 40;

    #[inline(always)]
    fn is_echo(kind: u8) -> bool {
        kind == 128 || kind == 129
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // RFC 4443: unreachable, packet too big, time exceeded, parameter problem.
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn is_link(kind: u8) -> bool {
        matches!(kind, 130..=137 | 143)
    }
}

/// Where a field of the IP header lies in the packet.
#[inline(always)]
pub(crate) const fn at(field: usize) -> usize {
    ETH_LEN + field
}
