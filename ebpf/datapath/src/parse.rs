//! A packet's tuple, and the little else that decisions need.

use hachi_abi::{FragKey, FragValue, Reason, Tuple, proto};

use crate::{
    family::Family,
    ip::{Fragment, Header, within},
    traits::{Maps, Packet},
};

/// Types of ICMP (RFC 792) and ICMPv6 (RFC 4443).
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const TCP_FIN: u8 = 1;
const TCP_SYN: u8 = 2;
const TCP_RST: u8 = 4;
const TCP_ACK: u8 = 16;

/// What kind of packet it is, where that matters.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole datagram.
    Whole = 0,
    /// The first fragment of one; it has the transport header.
    FirstFragment = 1,
    /// A fragment after the first: the tuple's ports come from the first one.
    LaterFragment = 2,
    /// An ICMP error; the packet that it is about begins 8 bytes after the ICMP header's start.
    IcmpError = 3,
    /// Neighbour or multicast listener discovery, not forwarded by anyone.
    Link = 4,
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
    /// Offset of the packet's end as the IP header claims it.
    pub end: u32,
    /// TCP flags, 0 for other protocols.
    pub tcp_flags: u8,
    /// ICMP's type, 0 for other protocols.
    pub icmp_type: u8,
    /// Zero.
    pub pad: [u8; 2],
    /// Identification of a fragmented datagram, network order.
    pub id: [u8; 4],
}

impl<const N: usize> Parsed<N> {
    /// Whether the packet can only be its sender's wish, and no answer to anything: a SYN without
    /// ACK, or an echo request. (Requests both ways may share an identifier, and so the tuples.)
    #[must_use]
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        let request = if N == 4 {
            ECHO_REQUEST
        } else {
            ECHO_REQUEST_V6
        };
        self.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST) == TCP_SYN || self.icmp_type == request
    }

    /// Whether the packet ends its direction of a TCP connection, or all of it.
    #[must_use]
    #[inline(always)]
    pub const fn closes(&self) -> bool {
        self.tcp_flags & (TCP_FIN | TCP_RST) != 0
    }

    /// Whether the packet ends a TCP connection at once.
    #[must_use]
    #[inline(always)]
    pub const fn resets(&self) -> bool {
        self.tcp_flags & TCP_RST != 0
    }

    /// Offset of the transport header.
    #[must_use]
    #[inline(always)]
    pub const fn l4(&self) -> usize {
        self.l4 as usize
    }
}

/// Whether a protocol's tuple has ports, and so can be a Service's.
#[inline(always)]
pub(crate) const fn has_ports(number: u8) -> bool {
    matches!(number, proto::TCP | proto::UDP | proto::SCTP)
}

/// The bytes of a transport header that must be there, and whole.
#[inline(always)]
const fn least(number: u8, icmp: u8) -> usize {
    match number {
        proto::TCP => 20,
        proto::UDP => 8,
        proto::SCTP => 12,
        number if number == icmp => 8,
        _ => 0,
    }
}

/// Parses a packet of the family into `parsed`.
///
/// # Errors
/// The reason to drop it.
#[inline(never)]
pub(crate) fn parse<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &P,
    maps: &M,
    parsed: &mut Parsed<N>,
) -> Result<(), Reason> {
    let header = F::header(packet)?;
    parsed.tuple.src = header.src;
    parsed.tuple.dst = header.dst;
    parsed.tuple.sport = [0; 2];
    parsed.tuple.dport = [0; 2];
    parsed.tuple.proto = header.proto;
    parsed.tuple.pad = [0; 3];
    parsed.l4 = header.l4 as u32;
    parsed.end = header.end as u32;
    parsed.tcp_flags = 0;
    parsed.icmp_type = 0;
    parsed.pad = [0; 2];
    parsed.id = header.id;
    match header.fragment {
        Fragment::Whole => {
            parsed.kind = Kind::Whole;
            transport::<N, F, P>(packet, &header, parsed)
        }
        Fragment::First => {
            parsed.kind = Kind::FirstFragment;
            transport::<N, F, P>(packet, &header, parsed)?;
            if parsed.kind == Kind::Link {
                // RFC 6980 section 5 forbids fragmented neighbour discovery.
                return Err(Reason::Malformed);
            }
            Ok(())
        }
        Fragment::Later => {
            parsed.kind = Kind::LaterFragment;
            if header.offset < least(header.proto, F::ICMP) {
                // It would overwrite the header that was judged (RFC 1858, RFC 3128).
                return Err(Reason::Malformed);
            }
            let value = maps.fragment(&key(parsed)).ok_or(Reason::FragmentUnknown)?;
            parsed.tuple.sport = value.sport;
            parsed.tuple.dport = value.dport;
            Ok(())
        }
    }
}

#[inline(always)]
fn key<const N: usize>(parsed: &Parsed<N>) -> FragKey<N> {
    FragKey {
        src: parsed.tuple.src,
        dst: parsed.tuple.dst,
        id: parsed.id,
        proto: parsed.tuple.proto,
        pad: [0; 3],
    }
}

/// Notes the ports of a first fragment for those that follow. Only of a packet whose source is known
/// to be its sender's: else anybody could say what another's fragments are.
#[inline(never)]
pub(crate) fn note_fragment<const N: usize, M: Maps<N>>(maps: &M, parsed: &Parsed<N>) {
    if parsed.kind == Kind::FirstFragment {
        let value = FragValue {
            sport: parsed.tuple.sport,
            dport: parsed.tuple.dport,
        };
        // A table that does not take it only makes the later fragments unknown.
        maps.put_fragment(&key(parsed), &value);
    }
}

/// Reads ports (or what stands for them) of a packet that has its transport header.
#[inline(always)]
fn transport<const N: usize, F: Family<N>, P: Packet>(
    packet: &P,
    header: &Header<N>,
    parsed: &mut Parsed<N>,
) -> Result<(), Reason> {
    let Header { l4, end, .. } = *header;
    if l4 + least(header.proto, F::ICMP) > end {
        return Err(Reason::Malformed);
    }
    match header.proto {
        proto::TCP => {
            let tcp: [u8; 14] = within(packet, l4, end)?;
            if tcp[12] >> 4 < 5 {
                return Err(Reason::Malformed);
            }
            parsed.tuple.sport = [tcp[0], tcp[1]];
            parsed.tuple.dport = [tcp[2], tcp[3]];
            parsed.tcp_flags = tcp[13];
        }
        proto::UDP | proto::SCTP => {
            let ports: [u8; 4] = within(packet, l4, end)?;
            parsed.tuple.sport = [ports[0], ports[1]];
            parsed.tuple.dport = [ports[2], ports[3]];
        }
        number if number == F::ICMP => {
            let icmp: [u8; 8] = within(packet, l4, end)?;
            parsed.icmp_type = icmp[0];
            if F::is_echo(icmp[0]) {
                parsed.tuple.sport = [icmp[4], icmp[5]];
                parsed.tuple.dport = [icmp[4], icmp[5]];
            } else if F::is_error(icmp[0]) && header.fragment == Fragment::Whole {
                parsed.kind = Kind::IcmpError;
            } else if F::is_link(icmp[0], header.hops) {
                parsed.kind = Kind::Link;
            }
        }
        _ => {}
    }
    Ok(())
}
