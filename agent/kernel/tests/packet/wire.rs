//! Packets, written out byte by byte and read back with every checksum verified from scratch: an
//! implementation of its own, so that it shares no mistake with the datapath.

use std::net::IpAddr;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const SCTP: u8 = 132;

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const RST: u8 = 0x04;

pub(crate) const ETHERNET: usize = 14;

/// A frame from one interface to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) source_mac: [u8; 6],
    pub(crate) destination_mac: [u8; 6],
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) body: Body,
}

/// What an IP packet carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Tcp {
        ports: (u16, u16),
        flags: u8,
        data: Vec<u8>,
    },
    Udp {
        ports: (u16, u16),
        data: Vec<u8>,
    },
    /// SCTP: what follows the common header.
    Sctp {
        ports: (u16, u16),
        chunks: Vec<u8>,
    },
    /// ICMP of the family: type, code, the second word, and what follows.
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
        data: Vec<u8>,
    },
    /// A protocol that the datapath does not know.
    Other {
        proto: u8,
        data: Vec<u8>,
    },
}

impl Body {
    pub(crate) fn ports(&self) -> (u16, u16) {
        match self {
            Self::Tcp { ports, .. } | Self::Udp { ports, .. } | Self::Sctp { ports, .. } => *ports,
            Self::Icmp { .. } | Self::Other { .. } => panic!("{self:?} has no ports"),
        }
    }

    fn proto(&self, v6: bool) -> u8 {
        match self {
            Self::Tcp { .. } => TCP,
            Self::Udp { .. } => UDP,
            Self::Sctp { .. } => SCTP,
            Self::Icmp { .. } => {
                if v6 {
                    ICMPV6
                } else {
                    ICMP
                }
            }
            Self::Other { proto, .. } => *proto,
        }
    }
}

impl Packet {
    /// The frame.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut frame = self.ethernet();
        frame.extend(self.ip());
        frame
    }

    /// The Ethernet header.
    pub(crate) fn ethernet(&self) -> Vec<u8> {
        let kind: u16 = if self.source.is_ipv6() {
            0x86dd
        } else {
            0x0800
        };
        [
            &self.destination_mac[..],
            &self.source_mac[..],
            &kind.to_be_bytes()[..],
        ]
        .concat()
    }

    /// The IP packet.
    pub(crate) fn ip(&self) -> Vec<u8> {
        let body = self.body_bytes();
        ip(self.source, self.destination, self.proto(), &body)
    }

    pub(crate) fn proto(&self) -> u8 {
        self.body.proto(self.source.is_ipv6())
    }

    /// What the IP packet carries, with its checksum.
    pub(crate) fn body_bytes(&self) -> Vec<u8> {
        let (mut bytes, at) = match &self.body {
            Body::Tcp { ports, flags, data } => {
                let mut bytes = both(*ports);
                bytes.extend_from_slice(&[
                    0,
                    0,
                    0,
                    1,
                    0,
                    0,
                    0,
                    2,
                    5 << 4,
                    *flags,
                    0xff,
                    0xff,
                    0,
                    0,
                    0,
                    0,
                ]);
                bytes.extend_from_slice(data);
                (bytes, 16)
            }
            Body::Udp { ports, data } => {
                let mut bytes = both(*ports);
                bytes.extend_from_slice(&length(8 + data.len()));
                bytes.extend_from_slice(&[0, 0]);
                bytes.extend_from_slice(data);
                (bytes, 6)
            }
            Body::Sctp { ports, chunks } => {
                let mut bytes = both(*ports);
                // The verification tag, and the checksum that is to come.
                bytes.extend_from_slice(&[0xde, 0xad, 0xbe, 0xef, 0, 0, 0, 0]);
                bytes.extend_from_slice(chunks);
                let sum = crc32c(&bytes);
                bytes[8..12].copy_from_slice(&sum.to_le_bytes());
                return bytes;
            }
            Body::Icmp {
                kind,
                code,
                rest,
                data,
            } => {
                let mut bytes = vec![*kind, *code, 0, 0];
                bytes.extend_from_slice(rest);
                bytes.extend_from_slice(data);
                (bytes, 2)
            }
            Body::Other { data, .. } => return data.clone(),
        };
        let sum = !self.body_sum(&bytes);
        bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    fn body_sum(&self, bytes: &[u8]) -> u16 {
        let pseudo =
            matches!(self.body, Body::Tcp { .. } | Body::Udp { .. }) || self.source.is_ipv6();
        if !pseudo {
            return sum(&[bytes]);
        }
        let proto = [0, self.proto()];
        sum(&[
            &octets(self.source),
            &octets(self.destination),
            &proto,
            &length(bytes.len()),
            bytes,
        ])
    }

    /// What a sender leaves in the checksum's field for hardware to complete.
    pub(crate) fn pseudo_sum(&self) -> u16 {
        let body = self.body_bytes();
        sum(&[
            &octets(self.source),
            &octets(self.destination),
            &[0, self.proto()],
            &length(body.len()),
        ])
    }

    /// Reads a frame back.
    ///
    /// # Panics
    /// If a length or a checksum is wrong.
    pub(crate) fn parse(frame: &[u8]) -> Self {
        let mac = |at: usize| frame[at..at + 6].try_into().expect("six bytes");
        let kind = u16::from_be_bytes([frame[12], frame[13]]);
        let ip = &frame[ETHERNET..];
        let (source, destination, proto, body) = match kind {
            0x0800 => {
                assert_eq!(sum(&[&ip[..20]]), 0xffff, "the IPv4 header's checksum");
                assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
                (address(&ip[12..16]), address(&ip[16..20]), ip[9], &ip[20..])
            }
            0x86dd => {
                assert_eq!(
                    usize::from(u16::from_be_bytes([ip[4], ip[5]])),
                    ip.len() - 40
                );
                (address(&ip[8..24]), address(&ip[24..40]), ip[6], &ip[40..])
            }
            other => panic!("not IP: {other:#x}"),
        };
        let packet = Self {
            source_mac: mac(6),
            destination_mac: mac(0),
            source,
            destination,
            body: parse_body(proto, body),
        };
        if matches!(packet.body, Body::Sctp { .. }) {
            assert_eq!(packet.body_bytes(), body, "checksum of {packet:?}");
        } else if !matches!(packet.body, Body::Other { .. }) {
            assert_eq!(packet.body_sum(body), 0xffff, "checksum of {packet:?}");
        }
        packet
    }
}

/// The sequence and acknowledgement numbers of a TCP segment without options.
pub(crate) fn tcp_numbers(frame: &[u8]) -> (u32, u32) {
    let tcp = &frame[frame.len() - 20..];
    let number = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().expect("four bytes"));
    (number(4), number(8))
}

fn parse_body(proto: u8, body: &[u8]) -> Body {
    let word = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
    match proto {
        TCP => Body::Tcp {
            ports: (word(0), word(2)),
            flags: body[13],
            data: body[20..].to_vec(),
        },
        UDP => Body::Udp {
            ports: (word(0), word(2)),
            data: body[8..].to_vec(),
        },
        SCTP => Body::Sctp {
            ports: (word(0), word(2)),
            chunks: body[12..].to_vec(),
        },
        ICMP | ICMPV6 => Body::Icmp {
            kind: body[0],
            code: body[1],
            rest: body[4..8].try_into().expect("four bytes"),
            data: body[8..].to_vec(),
        },
        _ => Body::Other {
            proto,
            data: body.to_vec(),
        },
    }
}

/// An IP packet around `body`.
pub(crate) fn ip(source: IpAddr, destination: IpAddr, proto: u8, body: &[u8]) -> Vec<u8> {
    if source.is_ipv4() {
        return ipv4(source, destination, proto, [0x12, 0x34, 0x40, 0], &[], body);
    }
    let mut header = vec![0x60, 0, 0, 0];
    header.extend_from_slice(&length(body.len()));
    header.extend_from_slice(&[proto, 64]);
    header.extend(octets(source));
    header.extend(octets(destination));
    header.extend_from_slice(body);
    header
}

/// An IPv4 packet with its identification, flags and fragment offset, and options.
pub(crate) fn ipv4(
    source: IpAddr,
    destination: IpAddr,
    proto: u8,
    fragment: [u8; 4],
    options: &[u8],
    body: &[u8],
) -> Vec<u8> {
    let words = 5 + options.len() / 4;
    let mut header = vec![0x40 | u8::try_from(words).expect("at most 15 words"), 0];
    header.extend_from_slice(&length(words * 4 + body.len()));
    header.extend_from_slice(&fragment);
    header.extend_from_slice(&[64, proto, 0, 0]);
    header.extend(octets(source));
    header.extend(octets(destination));
    header.extend_from_slice(options);
    let checksum = !sum(&[&header]);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    header.extend_from_slice(body);
    header
}

fn both(ports: (u16, u16)) -> Vec<u8> {
    [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat()
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).expect("a short packet").to_be_bytes()
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(crate) fn address(bytes: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(four) => four.into(),
        Err(_) => <[u8; 16]>::try_from(bytes).expect("sixteen bytes").into(),
    }
}

/// Whether an IPv4 header, options included, has a right checksum.
pub(crate) fn is_header_sum_right(header: &[u8]) -> bool {
    sum(&[header]) == 0xffff
}

/// The Internet checksum's sum (RFC 1071): 0xffff over what includes a right checksum.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut total = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            total += u32::from(u16::from_be_bytes([
                pair[0],
                pair.get(1).copied().unwrap_or(0),
            ]));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).expect("folded")
}

/// CRC32c, bit by bit (RFC 9260 appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    })
}

#[test]
fn the_known_crc() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn a_packet_is_read_back_as_it_was_written() {
    let known = [
        0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0x00,
        0x01, 0xc0, 0xa8, 0x00, 0xc7,
    ];
    assert_eq!(sum(&[&known]), 0xffff, "a header that is known to be right");
    for (source, destination) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
        for body in [
            Body::Tcp {
                ports: (1, 2),
                flags: SYN,
                data: b"odd".to_vec(),
            },
            Body::Udp {
                ports: (1, 2),
                data: vec![7; 100],
            },
            Body::Sctp {
                ports: (1, 2),
                chunks: vec![11, 0, 0, 4],
            },
            Body::Icmp {
                kind: 128,
                code: 0,
                rest: [1, 2, 3, 4],
                data: vec![9; 9],
            },
            Body::Other {
                proto: 47,
                data: vec![1; 12],
            },
        ] {
            let packet = Packet {
                source_mac: [2; 6],
                destination_mac: [4; 6],
                source: source.parse().expect("an address"),
                destination: destination.parse().expect("an address"),
                body,
            };
            assert_eq!(Packet::parse(&packet.bytes()), packet);
        }
    }
}
