//! A packet's tuple, and the little else that decisions need.
//!
//! Headers are read within the length that the IP header claims, never beyond: bytes after it are
//! link padding, whatever they look like.

use hachi_abi::{FragKey, FragValue, Reason, Tuple, proto};

use crate::{
    family::{Family, at},
    traits::{Maps, Packet},
};

/// Length of an Ethernet header without tags.
pub const ETH_LEN: usize = 14;

/// Extension headers that are followed before the packet counts as not understood.
const MAX_EXTENSIONS: usize = 6;

const TCP_FIN: u32 = 1;
const TCP_SYN: u32 = 2;
const TCP_RST: u32 = 4;
const TCP_ACK: u32 = 16;

/// What kind of packet it is, where that matters.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Has its transport header.
    Whole = 0,
    /// A fragment after the first: the tuple's ports come from the first one.
    LaterFragment = 1,
    /// An ICMP error; the packet that it is about begins 8 bytes after the ICMP header's start.
    IcmpError = 2,
    /// Neighbour or multicast listener discovery.
    Link = 3,
}

/// A parsed packet. All zeros is a valid value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed<const N: usize> {
    /// Its tuple as it is on the wire.
    pub tuple: Tuple<N>,
    /// Its kind.
    pub kind: Kind,
    /// Offset of the transport header.
    pub l4: u32,
    /// TCP flags, 0 for other protocols.
    pub tcp_flags: u32,
    /// Zero.
    pub pad: u32,
}

impl<const N: usize> Parsed<N> {
    /// Whether the packet asks for a new TCP connection (SYN without ACK).
    #[must_use]
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Whether the packet ends a TCP connection.
    #[must_use]
    #[inline(always)]
    pub const fn closes(&self) -> bool {
        self.tcp_flags & (TCP_FIN | TCP_RST) != 0
    }

    /// Offset of the transport header.
    #[must_use]
    #[inline(always)]
    pub const fn l4(&self) -> usize {
        self.l4 as usize
    }
}

/// The EtherType, network order, with the two MAC addresses before it.
#[inline(always)]
pub fn ethertype<P: Packet>(packet: &P) -> Option<([u8; 12], [u8; 2])> {
    let eth: [u8; ETH_LEN] = packet.load(0)?;
    let mut macs = [0; 12];
    macs.copy_from_slice(&eth[..12]);
    Some((macs, [eth[12], eth[13]]))
}

/// An IP header, read.
struct Header<const N: usize> {
    src: [u8; N],
    dst: [u8; N],
    proto: u8,
    /// Offset of what follows the header and its extensions.
    l4: usize,
    /// Offset of the packet's end as the header claims it.
    end: usize,
    /// [`WHOLE`], [`FIRST`] or [`LATER`].
    fragment: u32,
    /// Identification of a fragmented datagram, network order.
    id: [u8; 4],
}

const WHOLE: u32 = 0;
const FIRST: u32 = 1;
const LATER: u32 = 2;

/// Parses a packet of the family into `parsed`.
///
/// # Errors
/// The reason to drop it.
#[inline(never)]
pub fn parse<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &P,
    maps: &M,
    parsed: &mut Parsed<N>,
) -> Result<(), Reason> {
    let header = if N == 4 {
        header_v4(packet)?
    } else {
        header_v6(packet)?
    };
    parsed.tuple.src = header.src;
    parsed.tuple.dst = header.dst;
    parsed.tuple.sport = [0; 2];
    parsed.tuple.dport = [0; 2];
    parsed.tuple.proto = header.proto;
    parsed.tuple.pad = [0; 3];
    parsed.kind = Kind::Whole;
    parsed.l4 = header.l4 as u32;
    parsed.tcp_flags = 0;
    parsed.pad = 0;
    if header.fragment == WHOLE {
        return transport::<N, F, P>(packet, &header, parsed);
    }
    let key = FragKey {
        src: header.src,
        dst: header.dst,
        id: header.id,
        proto: header.proto,
        pad: [0; 3],
    };
    if header.fragment == LATER {
        let value = maps.fragment(&key).ok_or(Reason::FragmentUnknown)?;
        parsed.tuple.sport = value.sport;
        parsed.tuple.dport = value.dport;
        parsed.kind = Kind::LaterFragment;
        return Ok(());
    }
    transport::<N, F, P>(packet, &header, parsed)?;
    let value = FragValue {
        sport: parsed.tuple.sport,
        dport: parsed.tuple.dport,
    };
    // A table that does not take it only makes the later fragments unknown.
    maps.put_fragment(&key, &value);
    Ok(())
}

/// Reads ports (or what stands for them) of a packet that has its transport header.
#[inline(always)]
fn transport<const N: usize, F: Family<N>, P: Packet>(
    packet: &P,
    header: &Header<N>,
    parsed: &mut Parsed<N>,
) -> Result<(), Reason> {
    let Header { l4, end, .. } = *header;
    match header.proto {
        proto::TCP => {
            let tcp: [u8; 20] = within(packet, l4, end)?;
            parsed.tuple.sport = [tcp[0], tcp[1]];
            parsed.tuple.dport = [tcp[2], tcp[3]];
            parsed.tcp_flags = u32::from(tcp[13]);
        }
        proto::UDP => {
            let udp: [u8; 8] = within(packet, l4, end)?;
            parsed.tuple.sport = [udp[0], udp[1]];
            parsed.tuple.dport = [udp[2], udp[3]];
        }
        proto::SCTP => {
            let sctp: [u8; 12] = within(packet, l4, end)?;
            parsed.tuple.sport = [sctp[0], sctp[1]];
            parsed.tuple.dport = [sctp[2], sctp[3]];
        }
        number if number == F::ICMP => {
            let icmp: [u8; 8] = match within(packet, l4, end) {
                Ok(icmp) => icmp,
                Err(reason) => {
                    // Some ICMP messages have four bytes only, and none of those interests us.
                    let _: [u8; 4] = within(packet, l4, end).map_err(|_| reason)?;
                    return Ok(());
                }
            };
            if F::is_echo(icmp[0]) {
                parsed.tuple.sport = [icmp[4], icmp[5]];
                parsed.tuple.dport = parsed.tuple.sport;
            } else if F::is_error(icmp[0]) {
                parsed.kind = Kind::IcmpError;
            } else if F::is_link(icmp[0]) {
                parsed.kind = Kind::Link;
            }
        }
        _ => {}
    }
    Ok(())
}

#[inline(always)]
fn within<const L: usize, P: Packet>(
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
fn header_v4<const N: usize, P: Packet>(packet: &P) -> Result<Header<N>, Reason> {
    let ip: [u8; 20] = packet.load(at(0)).ok_or(Reason::Malformed)?;
    let header = usize::from(ip[0] & 0x0f) * 4;
    if ip[0] >> 4 != 4 || header < 20 {
        return Err(Reason::Malformed);
    }
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let end = end(packet, total, total)?;
    let l4 = at(header);
    if l4 > end {
        return Err(Reason::Malformed);
    }
    let fragment = u16::from_be_bytes([ip[6], ip[7]]);
    let (more, offset) = (fragment & 0x2000 != 0, fragment & 0x1fff);
    Ok(Header {
        src: address(&ip, 12),
        dst: address(&ip, 16),
        proto: ip[9],
        l4,
        end,
        fragment: match (more, offset) {
            (false, 0) => WHOLE,
            (true, 0) => FIRST,
            (_, _) => LATER,
        },
        id: [ip[4], ip[5], 0, 0],
    })
}

/// Where the packet ends. A claimed length of 0 is a segment of more than 64 KiB (BIG TCP, Linux
/// 5.19 for IPv6 and 6.3 for IPv4), whose length is the packet's own.
#[inline(always)]
fn end<P: Packet>(packet: &P, claimed: usize, total: usize) -> Result<usize, Reason> {
    let length = packet.len() as usize;
    if claimed == 0 {
        return Ok(length);
    }
    if at(total) > length {
        return Err(Reason::Malformed);
    }
    Ok(at(total))
}

#[inline(always)]
fn header_v6<const N: usize, P: Packet>(packet: &P) -> Result<Header<N>, Reason> {
    let ip: [u8; 40] = packet.load(at(0)).ok_or(Reason::Malformed)?;
    if ip[0] >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    let payload = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
    let end = end(packet, payload, 40 + payload)?;
    let mut header = Header {
        src: address(&ip, 8),
        dst: address(&ip, 24),
        proto: ip[6],
        l4: at(40),
        end,
        fragment: WHOLE,
        id: [0; 4],
    };
    let mut i = 0;
    while i < MAX_EXTENSIONS {
        // RFC 8200 section 4: the second byte is the length in units of 8 bytes beyond the first
        // 8; an authentication header (RFC 4302) counts in units of 4 beyond the first 8.
        match header.proto {
            0 | 43 | 60 => {
                let extension: [u8; 2] = within(packet, header.l4, end)?;
                header.proto = extension[0];
                header.l4 += (usize::from(extension[1]) + 1) * 8;
            }
            51 => {
                let extension: [u8; 2] = within(packet, header.l4, end)?;
                header.proto = extension[0];
                header.l4 += (usize::from(extension[1]) + 2) * 4;
            }
            44 => {
                let extension: [u8; 8] = within(packet, header.l4, end)?;
                let offset = u16::from_be_bytes([extension[2], extension[3]]);
                header.proto = extension[0];
                header.l4 += 8;
                // An "atomic" fragment (RFC 6946: no offset, no more) is a whole packet.
                if offset & 0xfff9 != 0 {
                    header.id = [extension[4], extension[5], extension[6], extension[7]];
                    if offset & 0xfff8 != 0 {
                        // What follows is the middle of the datagram, no header.
                        header.fragment = LATER;
                        return Ok(header);
                    }
                    header.fragment = FIRST;
                }
            }
            _ => return Ok(header),
        }
        i += 1;
    }
    Err(Reason::UnsupportedHeader)
}
