//! Packets as bytes: made from scratch, checked from scratch, changed as the kernel's helpers do.

use hachi_abi::proto;
use hachi_datapath::{ETH_LEN, Packet, Part};

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// RFC 1071, over network order words.
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u64;
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u16::from(carry)
}

/// The sum over the pseudo header of a transport protocol.
pub(crate) fn pseudo(src: &[u8], dst: &[u8], number: u8, length: usize) -> u16 {
    let length = u32::try_from(length).expect("short").to_be_bytes();
    add(
        add(sum(src), sum(dst)),
        add(sum(&length), u16::from(number)),
    )
}

/// Offset of the checksum in a transport header.
fn checksum_at(number: u8) -> Option<usize> {
    match number {
        proto::TCP => Some(16),
        proto::UDP => Some(6),
        proto::ICMP | proto::ICMPV6 => Some(2),
        _ => None,
    }
}

/// A TCP segment; its checksum is filled in by [`ip`].
pub(crate) fn tcp(ports: (u16, u16), flags: u8, data: &[u8]) -> Vec<u8> {
    let mut tcp = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    tcp.extend([0, 0, 3, 232, 0, 0, 7, 208, 0x50, flags, 0x10, 0, 0, 0, 0, 0]);
    tcp.extend(data);
    tcp
}

/// A UDP datagram.
pub(crate) fn udp(ports: (u16, u16), data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).expect("short");
    let mut udp = [
        ports.0.to_be_bytes(),
        ports.1.to_be_bytes(),
        length.to_be_bytes(),
    ]
    .concat();
    udp.extend([0, 0]);
    udp.extend(data);
    udp
}

/// An SCTP packet with a right checksum; nothing here looks at the chunks.
pub(crate) fn sctp(ports: (u16, u16), chunks: &[u8]) -> Vec<u8> {
    let mut sctp = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    sctp.extend([0, 0, 0, 1, 0, 0, 0, 0]);
    sctp.extend(chunks);
    let checksum = crc32c(&sctp);
    sctp[8..12].copy_from_slice(&checksum.to_le_bytes());
    sctp
}

/// CRC32c, bit by bit (RFC 9260 appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
    let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc));
    !bytes.iter().fold(u32::MAX, byte)
}

/// An ICMP message.
pub(crate) fn icmp(kind: u8, code: u8, rest: [u8; 4], data: &[u8]) -> Vec<u8> {
    let mut icmp = vec![kind, code, 0, 0];
    icmp.extend(rest);
    icmp.extend(data);
    icmp
}

/// An IP packet, transport checksum included.
pub(crate) fn ip<const N: usize>(src: [u8; N], dst: [u8; N], number: u8, body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    if let Some(at) = checksum_at(number)
        && body.len() >= at + 2
    {
        let field = !transport_sum(&src, &dst, number, &body);
        let field = if number == proto::UDP && field == 0 {
            0xffff
        } else {
            field
        };
        body[at..at + 2].copy_from_slice(&field.to_be_bytes());
    }
    [header(src, dst, number, 64, body.len()), body].concat()
}

/// The sum over a transport header, its data and its pseudo header.
pub(crate) fn transport_sum(src: &[u8], dst: &[u8], number: u8, body: &[u8]) -> u16 {
    if number == proto::ICMP {
        sum(body)
    } else {
        add(pseudo(src, dst, number, body.len()), sum(body))
    }
}

/// An IP header without options.
pub(crate) fn header<const N: usize>(
    src: [u8; N],
    dst: [u8; N],
    number: u8,
    hops: u8,
    length: usize,
) -> Vec<u8> {
    if N == 4 {
        header_v4(&src, &dst, number, [0, 7, 0, 0], hops, &[], length)
    } else {
        let mut ip = vec![0x60, 0, 0, 0];
        ip.extend(u16::try_from(length).expect("short").to_be_bytes());
        ip.extend([number, hops]);
        ip.extend(src);
        ip.extend(dst);
        ip
    }
}

/// An IPv4 header with identification, flags and offset (`fragment`) and options.
pub(crate) fn header_v4(
    src: &[u8],
    dst: &[u8],
    number: u8,
    fragment: [u8; 4],
    hops: u8,
    options: &[u8],
    length: usize,
) -> Vec<u8> {
    let words = u8::try_from(5 + options.len() / 4).expect("few options");
    let total = u16::try_from(usize::from(words) * 4 + length).expect("short");
    let mut ip = vec![0x40 | words, 0];
    ip.extend(total.to_be_bytes());
    ip.extend(fragment);
    ip.extend([hops, number, 0, 0]);
    ip.extend(src);
    ip.extend(dst);
    ip.extend(options);
    let field = !sum(&ip);
    ip[10..12].copy_from_slice(&field.to_be_bytes());
    ip
}

/// A frame, and what the kernel knows of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) bytes: Vec<u8>,
    pub(crate) ifindex: u32,
    pub(crate) vlan: bool,
    /// Bytes of payload of every packet that it will be cut into; 0: it is one.
    pub(crate) segment: u32,
    /// The node's own stack made it.
    pub(crate) own: bool,
    /// The transport checksum was left to hardware: its field holds the pseudo header's sum.
    pub(crate) partial: bool,
    /// The sum that a device took over all that follows the Ethernet header.
    pub(crate) complete: u16,
    /// That sum is of the Ethernet header too, as once a redirect has put it before the packet.
    pub(crate) linked: bool,
}

impl Frame {
    pub(crate) fn new(source: [u8; 6], ifindex: u32, ethertype: [u8; 2], ip: &[u8]) -> Self {
        let bytes = [&[2, 0, 0, 0, 9, 9][..], &source, &ethertype, ip].concat();
        Self {
            complete: sum(ip),
            linked: false,
            bytes,
            ifindex,
            vlan: false,
            segment: 0,
            own: false,
            partial: false,
        }
    }

    /// As its sender's stack hands it to a veth pair: no checksum computed yet.
    pub(crate) fn partial(mut self) -> Self {
        let view = View::of(&self.bytes);
        let at = view.l4 + checksum_at(view.number).expect("a checksum");
        let field = pseudo(&view.src, &view.dst, view.number, view.body().len());
        self.bytes[at..at + 2].copy_from_slice(&field.to_be_bytes());
        self.partial = true;
        self
    }

    /// As [`Self::check`], of an answer that was made of the packet: the kernel sums anew what it is
    /// handed.
    #[track_caller]
    pub(crate) fn check_answer(mut self) -> View {
        self.complete = sum(&self.bytes[ETH_LEN..]);
        self.partial = false;
        self.check()
    }

    /// Checks every checksum, and lengths.
    #[track_caller]
    pub(crate) fn check(&self) -> View {
        let view = View::of(&self.bytes);
        if view.src.len() == 4 {
            assert_eq!(
                sum(&self.bytes[ETH_LEN..view.l4]),
                0xffff,
                "the header's checksum"
            );
        }
        if !self.partial {
            let now = sum(&self.bytes[if self.linked { 0 } else { ETH_LEN }..]);
            // One's complement has two zeros.
            let same = now % 0xffff == self.complete % 0xffff;
            assert!(same, "the device's sum: {now:#x} {:#x}", self.complete);
        }
        if view.fragment {
            return view;
        }
        if let Some(at) = checksum_at(view.number) {
            let field = u16::from_be_bytes([view.body()[at], view.body()[at + 1]]);
            if self.partial {
                let pseudo = pseudo(&view.src, &view.dst, view.number, view.body().len());
                assert!(
                    field == pseudo || field % 0xffff == pseudo % 0xffff,
                    "partial checksum"
                );
            } else if view.number != proto::UDP || field != 0 {
                let all = transport_sum(&view.src, &view.dst, view.number, view.body());
                assert_eq!(all, 0xffff, "the transport checksum of {view:?}");
            }
        }
        view
    }
}

/// A packet, read without the code under test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) macs: [u8; 12],
    pub(crate) src: Vec<u8>,
    pub(crate) dst: Vec<u8>,
    pub(crate) number: u8,
    pub(crate) l4: usize,
    pub(crate) fragment: bool,
    bytes: Vec<u8>,
}

impl View {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let macs = bytes[..12].try_into().expect("twelve bytes");
        let ip = &bytes[ETH_LEN..];
        let (src, dst, number, l4, fragment) = if ip[0] >> 4 == 4 {
            let l4 = ETH_LEN + usize::from(ip[0] & 15) * 4;
            let fragment = u16::from_be_bytes([ip[6] & 0x3f, ip[7]]) != 0;
            (
                ip[12..16].to_vec(),
                ip[16..20].to_vec(),
                ip[9],
                l4,
                fragment,
            )
        } else {
            let mut number = ip[6];
            let mut l4 = ETH_LEN + 40;
            let mut fragment = false;
            while matches!(number, 0 | 44 | 60) {
                fragment |= number == 44;
                let length = if number == 44 {
                    8
                } else {
                    (usize::from(bytes[l4 + 1]) + 1) * 8
                };
                number = bytes[l4];
                l4 += length;
            }
            (
                ip[8..24].to_vec(),
                ip[24..40].to_vec(),
                number,
                l4,
                fragment,
            )
        };
        Self {
            macs,
            src,
            dst,
            number,
            l4,
            fragment,
            bytes: bytes.to_vec(),
        }
    }

    pub(crate) fn body(&self) -> &[u8] {
        &self.bytes[self.l4..]
    }

    pub(crate) fn ports(&self) -> (u16, u16) {
        let body = self.body();
        (
            u16::from_be_bytes([body[0], body[1]]),
            u16::from_be_bytes([body[2], body[3]]),
        )
    }
}

/// One's complement, as the kernel folds it; words are native, as is `difference`.
fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

impl Packet for Frame {
    fn len(&self) -> u32 {
        u32::try_from(self.bytes.len()).expect("short")
    }

    fn segment(&self) -> u32 {
        self.segment
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn is_own(&self) -> bool {
        self.own
    }

    fn vlan_present(&self) -> bool {
        self.vlan
    }

    fn load<const L: usize>(&self, offset: usize) -> Option<[u8; L]> {
        self.bytes
            .get(offset..offset.checked_add(L)?)?
            .try_into()
            .ok()
    }

    fn store<const L: usize>(&mut self, offset: usize, bytes: &[u8; L], resum: bool) -> bool {
        let Some(place) = self.bytes.get_mut(offset..offset + L) else {
            return false;
        };
        if resum {
            // At an odd offset a byte is the other half of its word (csum_block_add).
            let sum = |bytes: &[u8]| {
                if offset.is_multiple_of(2) {
                    sum(bytes)
                } else {
                    sum(bytes).swap_bytes()
                }
            };
            let difference = u64::from(sum(bytes)) + u64::from(!sum(place));
            self.complete = fold(u64::from(self.complete) + difference);
        }
        place.copy_from_slice(bytes);
        true
    }

    // net/core/utils.c: csum_replace_by_diff.
    fn adjust_l3_checksum(&mut self, offset: usize, difference: u32) -> bool {
        let Some(field) = self.load::<2>(offset) else {
            return false;
        };
        let field = !u16::from_ne_bytes(field);
        let new = !fold(u64::from(field) + u64::from(difference));
        self.store(offset, &new.to_ne_bytes(), false)
    }

    // net/core/utils.c: inet_proto_csum_replace_by_diff; net/core/filter.c: bpf_l4_csum_replace.
    fn adjust_l4_checksum(
        &mut self,
        offset: usize,
        difference: u32,
        part: Part,
        udp: bool,
    ) -> bool {
        let Some(field) = self.load::<2>(offset) else {
            return false;
        };
        if udp && field == [0; 2] {
            return true;
        }
        let field = u16::from_ne_bytes(field);
        let mut new = field;
        if !self.partial {
            new = !fold(u64::from(!field) + u64::from(difference));
            if part == Part::Pseudo {
                let difference = u16::from_be(fold(u64::from(difference)));
                self.complete = fold(u64::from(self.complete) + u64::from(!difference));
            }
        } else if part == Part::Pseudo {
            new = fold(u64::from(field) + u64::from(difference));
        }
        if udp && new == 0 {
            new = 0xffff;
        }
        self.store(offset, &new.to_ne_bytes(), false)
    }

    fn resize(&mut self, len: u32) -> bool {
        self.bytes.resize(len as usize, 0);
        true
    }
}
