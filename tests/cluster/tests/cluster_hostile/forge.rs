//! Frames as bytes, right or wrong in any part.

use std::net::IpAddr;

pub(crate) const ICMP: u8 = 1;
pub(crate) const IPIP: u8 = 4;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const FRAGMENT: u8 = 44;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const OPTIONS: u8 = 60;
pub(crate) const SCTP: u8 = 132;

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;
pub(crate) const URG: u8 = 32;

/// The port that senders send from.
pub(crate) const FROM: u16 = 40_404;

/// EtherTypes.
pub(crate) const V4: u16 = 0x0800;
pub(crate) const ARP: u16 = 0x0806;
pub(crate) const V6: u16 = 0x86dd;

pub(crate) type Mac = [u8; 6];
/// Source and destination.
pub(crate) type Ends = (IpAddr, IpAddr);

pub(crate) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The Internet checksum of bytes at even offsets (RFC 1071), not yet inverted.
fn sum(parts: &[&[u8]]) -> u32 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum = words
        .map(|w| u32::from(u16::from_be_bytes([w[0], w.get(1).copied().unwrap_or(0)])))
        .sum();
    fold(sum)
}

fn fold(mut sum: u32) -> u32 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

fn short(number: usize) -> [u8; 2] {
    u16::try_from(number).unwrap_or(u16::MAX).to_be_bytes()
}

/// Puts a transport's checksum where it belongs.
pub(crate) fn summed((src, dst): Ends, proto: u8, mut body: Vec<u8>) -> Vec<u8> {
    let at = match proto {
        TCP => 16,
        UDP => 6,
        ICMP | ICMPV6 => 2,
        _ => return body,
    };
    if body.len() < at + 2 {
        return body;
    }
    let length = short(body.len());
    let pseudo = if proto == ICMP {
        Vec::new()
    } else {
        [
            octets(src),
            octets(dst),
            vec![0, proto, length[0], length[1]],
        ]
        .concat()
    };
    body[at..at + 2].fill(0);
    let sum = !u16::try_from(sum(&[&pseudo, &body])).unwrap_or_default();
    body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    body
}

pub(crate) fn udp(ends: Ends, port: u16, payload: &[u8]) -> Vec<u8> {
    udp_from(ends, (FROM, port), payload)
}

pub(crate) fn udp_from(ends: Ends, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let length = short(8 + payload.len());
    let (from, to) = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
    summed(
        ends,
        UDP,
        [&from[..], &to, &length, &[0; 2], payload].concat(),
    )
}

pub(crate) fn tcp(ends: Ends, port: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    tcp_from(ends, (FROM, port), flags, payload)
}

pub(crate) fn tcp_from(ends: Ends, ports: (u16, u16), flags: u8, payload: &[u8]) -> Vec<u8> {
    let (from, to) = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
    let rest = [0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
    summed(ends, TCP, [&from[..], &to, &rest, payload].concat())
}

/// An ICMP message of the ends' family.
pub(crate) fn icmp(ends: Ends, kind: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let proto = icmp_of(ends);
    summed(
        ends,
        proto,
        [&[kind, code, 0, 0][..], &rest, payload].concat(),
    )
}

pub(crate) fn icmp_of((src, _): Ends) -> u8 {
    if src.is_ipv4() { ICMP } else { ICMPV6 }
}

/// An IPv4 header that may say anything.
#[derive(Clone, Debug)]
pub(crate) struct Head4 {
    pub(crate) first: u8,
    /// The header's options, a multiple of 4 bytes.
    pub(crate) options: Vec<u8>,
    pub(crate) id: u16,
    /// Flags and offset.
    pub(crate) fragment: u16,
    pub(crate) ttl: u8,
    /// What it says its length is, where that is not true.
    pub(crate) total: Option<u16>,
    /// A change of the checksum.
    pub(crate) spoil: u8,
}

impl Default for Head4 {
    fn default() -> Self {
        Self {
            first: 0x45,
            options: Vec::new(),
            id: 1,
            fragment: 0,
            ttl: 64,
            total: None,
            spoil: 0,
        }
    }
}

impl Head4 {
    pub(crate) fn on(&self, (src, dst): Ends, proto: u8, body: &[u8]) -> Vec<u8> {
        let Self {
            first,
            options,
            id,
            fragment,
            ttl,
            total,
            spoil,
        } = self;
        let length = short(20 + options.len() + body.len());
        let length = total.map_or(length, u16::to_be_bytes);
        let (id, fragment) = (id.to_be_bytes(), fragment.to_be_bytes());
        let words = u8::try_from(options.len() / 4).unwrap_or(10);
        let mut header = vec![first.wrapping_add(words), 0, length[0], length[1]];
        header.extend([id[0], id[1], fragment[0], fragment[1], *ttl, proto, 0, 0]);
        header.extend(octets(src));
        header.extend(octets(dst));
        header.extend(options);
        let sum = !u16::try_from(sum(&[&header])).unwrap_or_default();
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header[10] ^= spoil;
        header.extend(body);
        header
    }
}

/// An IPv6 packet; `next` is the first header that follows.
pub(crate) fn v6((src, dst): Ends, next: u8, hops: u8, body: &[u8]) -> Vec<u8> {
    let length = short(body.len());
    let head = [0x60, 0, 0, 0, length[0], length[1], next, hops];
    [&head[..], &octets(src), &octets(dst), body].concat()
}

/// A packet of the ends' family with nothing odd about it.
pub(crate) fn ip(ends: Ends, proto: u8, body: &[u8]) -> Vec<u8> {
    if ends.0.is_ipv4() {
        Head4::default().on(ends, proto, body)
    } else {
        v6(ends, proto, 64, body)
    }
}

/// An IPv6 fragment header.
pub(crate) fn fragment_header(next: u8, id: u16, offset: usize, more: bool) -> [u8; 8] {
    let word = short(offset | usize::from(more));
    let id = id.to_be_bytes();
    [next, 0, word[0], word[1], 0, 0, id[0], id[1]]
}

/// A part of a datagram's body, `offset` bytes from its start.
pub(crate) fn fragment(
    ends: Ends,
    proto: u8,
    id: u16,
    (offset, more): (usize, bool),
    part: &[u8],
) -> Vec<u8> {
    if ends.0.is_ipv4() {
        let units = u16::try_from(offset / 8).unwrap_or(0x1fff);
        let head = Head4 {
            id,
            fragment: units | if more { 0x2000 } else { 0 },
            ..Head4::default()
        };
        return head.on(ends, proto, part);
    }
    let header = fragment_header(proto, id, offset, more);
    v6(ends, FRAGMENT, 64, &[&header[..], part].concat())
}

pub(crate) fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

pub(crate) fn kind_of(ip: IpAddr) -> u16 {
    if ip.is_ipv4() { V4 } else { V6 }
}
