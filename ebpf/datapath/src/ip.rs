//! IP headers, with what extends them.
//!
//! Everything is read within the length that the header claims, never beyond: bytes after it are
//! link padding, whatever they look like.

use hachi_abi::Reason;

use crate::{ethernet::at, traits::Packet};

/// Extension headers that are followed before the packet counts as not understood.
const MAX_EXTENSIONS: usize = 6;

/// IPv4 options (RFC 791 section 3.1).
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;

/// The longest IPv4 header.
const LONGEST_HEADER: usize = 60;

/// IPv6 extension headers (RFC 8200 section 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
pub(crate) const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// Longest packet whose length the header can tell.
const MAX_CLAIM: usize = 65_535;

/// An IP header, read.
#[derive(Clone, Copy, Debug)]
pub struct Header<const N: usize> {
    pub(crate) src: [u8; N],
    pub(crate) dst: [u8; N],
    pub(crate) proto: u8,
    /// Time to live, or hop limit.
    pub(crate) hops: u8,
    /// Offset of what follows the header and its extensions.
    pub(crate) l4: usize,
    /// Offset of the packet's end as the header claims it.
    pub(crate) end: usize,
    pub(crate) fragment: Fragment,
    /// Offset of a later fragment's bytes in the datagram.
    pub(crate) offset: usize,
    /// Identification of a fragmented datagram, network order.
    pub(crate) id: [u8; 4],
}

/// Which part of its datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fragment {
    Whole,
    First,
    Later,
}

impl Fragment {
    #[inline(always)]
    const fn of(more: bool, offset: usize) -> Self {
        match (more, offset) {
            (false, 0) => Self::Whole,
            (true, 0) => Self::First,
            (_, _) => Self::Later,
        }
    }
}

/// Loads bytes that must lie before `end`.
#[inline(always)]
pub(crate) fn within<const L: usize, P: Packet>(
    packet: &P,
    offset: usize,
    end: usize,
) -> Result<[u8; L], Reason> {
    if offset + L > end {
        return Err(Reason::Malformed);
    }
    packet.load(offset).ok_or(Reason::Malformed)
}

/// Copies an address out of a header.
#[inline(always)]
pub(crate) fn address<const N: usize, const L: usize>(header: &[u8; L], offset: usize) -> [u8; N] {
    let mut address = [0; N];
    address.copy_from_slice(&header[offset..offset + N]);
    address
}

#[inline(always)]
pub(crate) fn v4<P: Packet>(packet: &P) -> Result<Header<4>, Reason> {
    let ip: [u8; 20] = packet.load(at(0)).ok_or(Reason::Malformed)?;
    let header = usize::from(ip[0] & 0x0f) * 4;
    if ip[0] >> 4 != 4 || header < 20 {
        return Err(Reason::Malformed);
    }
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let end = if total == 0 && packet.len() as usize > at(MAX_CLAIM) {
        // A segment of more than 64 KiB (BIG TCP, since Linux 6.3).
        packet.len() as usize
    } else {
        at(total)
    };
    let l4 = at(header);
    if l4 > end || end > packet.len() as usize {
        return Err(Reason::Malformed);
    }
    if header > 20 {
        options(packet, l4)?;
    }
    let word = u16::from_be_bytes([ip[6], ip[7]]);
    let offset = usize::from(word & 0x1fff) * 8;
    Ok(Header {
        src: address(&ip, 12),
        dst: address(&ip, 16),
        proto: ip[9],
        hops: ip[8],
        l4,
        end,
        fragment: Fragment::of(word & 0x2000 != 0, offset),
        offset,
        id: [ip[4], ip[5], 0, 0],
    })
}

/// Looks through the options between the header and `end` for a source route: as a routing header
/// of IPv6, it would have the packet go on to an address that nobody judged (RFC 7126 sections 4.3
/// and 4.4 have it dropped for that). Any byte that might be one counts, also in the data of another
/// option: a walk from option to option is more than verifiers bear.
#[inline(never)]
fn options<P: Packet>(packet: &P, end: usize) -> Result<(), Reason> {
    let mut offset = at(20);
    while offset < at(LONGEST_HEADER) && offset < end {
        let word: [u8; 4] = packet.load(offset).ok_or(Reason::Malformed)?;
        if word.contains(&LOOSE_SOURCE_ROUTE) || word.contains(&STRICT_SOURCE_ROUTE) {
            return Err(Reason::UnsupportedHeader);
        }
        offset += 4;
    }
    Ok(())
}

#[inline(always)]
pub(crate) fn v6<P: Packet>(packet: &P) -> Result<Header<16>, Reason> {
    let ip: [u8; 40] = packet.load(at(0)).ok_or(Reason::Malformed)?;
    if ip[0] >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    let payload = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
    let end = if payload == 0 && packet.len() as usize > at(40 + MAX_CLAIM) {
        // A segment of more than 64 KiB (BIG TCP, since Linux 5.19).
        packet.len() as usize
    } else {
        at(40 + payload)
    };
    if end > packet.len() as usize {
        return Err(Reason::Malformed);
    }
    let mut header = Header {
        src: address(&ip, 8),
        dst: address(&ip, 24),
        proto: ip[6],
        hops: ip[7],
        l4: at(40),
        end,
        fragment: Fragment::Whole,
        offset: 0,
        id: [0; 4],
    };
    // A routing header would have the packet go on to an address that nobody judged, and an
    // authentication header hides nothing but is no transport either: the one is refused, the
    // other judged as the protocol that it is.
    let mut i = 0;
    while i < MAX_EXTENSIONS {
        match header.proto {
            HOP_BY_HOP if i > 0 => return Err(Reason::UnsupportedHeader),
            HOP_BY_HOP | DESTINATION_OPTIONS => {
                // What a fragmented datagram continues with must be known from every fragment.
                if header.fragment != Fragment::Whole {
                    return Err(Reason::UnsupportedHeader);
                }
                let extension: [u8; 2] = within(packet, header.l4, end)?;
                header.proto = extension[0];
                header.l4 += (usize::from(extension[1]) + 1) * 8;
                if header.l4 > end {
                    return Err(Reason::Malformed);
                }
            }
            ROUTING => return Err(Reason::UnsupportedHeader),
            FRAGMENT => {
                if header.fragment != Fragment::Whole {
                    return Err(Reason::UnsupportedHeader);
                }
                let extension: [u8; 8] = within(packet, header.l4, end)?;
                let word = u16::from_be_bytes([extension[2], extension[3]]);
                header.proto = extension[0];
                header.l4 += 8;
                // An "atomic" fragment (RFC 6946: no offset, no more) is a whole packet.
                header.offset = usize::from(word & 0xfff8);
                header.fragment = Fragment::of(word & 1 != 0, header.offset);
                header.id = [extension[4], extension[5], extension[6], extension[7]];
            }
            _ => return Ok(header),
        }
        i += 1;
    }
    Err(Reason::UnsupportedHeader)
}
