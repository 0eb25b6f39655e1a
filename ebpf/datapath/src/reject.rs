//! Answers for Services without a backend: a TCP reset, or "port unreachable", made of the very
//! packet that asked. The Pod's connection fails at once instead of timing out.

use hachi_abi::{Reason, proto};

use crate::{
    Outcome, checksum,
    ethernet::{ETH_LEN, at},
    family::Family,
    parse::Kind,
    scratch::Scratch,
    traits::Packet,
};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

const TCP_LEN: usize = 20;
const ICMP_LEN: usize = 8;
/// Bytes behind the quoted IP header; RFC 792 asks for no more.
const QUOTED: usize = 8;
const HOPS: u8 = 64;

/// What becomes of a packet that `reason` keeps from going on: where it was rejected the client is told,
/// if the packet permits an answer.
#[inline(always)]
pub(crate) fn outcome<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &Scratch<N>,
    reason: Reason,
) -> Outcome {
    match reason {
        Reason::Rejected if answer::<N, F, P>(packet, scratch) => Outcome::Answer,
        Reason::Rejected => Outcome::Drop(Reason::NoBackend),
        reason => Outcome::Drop(reason),
    }
}

/// Turns the packet into its answer; `false` if there is none to be given (RFC 9293 section
/// 3.10.7: nothing answers a reset; RFC 1122 section 3.2.2: nothing answers a later fragment).
#[inline(never)]
pub(crate) fn answer<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &Scratch<N>,
) -> bool {
    if scratch.parsed.kind != Kind::Whole {
        return false;
    }
    if scratch.parsed.tuple.proto == proto::TCP {
        scratch.parsed.tcp_flags & RST == 0 && reset::<N, F, P>(packet, scratch).is_some()
    } else {
        unreachable::<N, F, P>(packet, scratch).is_some()
    }
}

/// RFC 9293 section 3.5.2: a reset takes its sequence number from the segment's acknowledgement,
/// or else acknowledges all of the segment.
#[inline(always)]
fn reset<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &Scratch<N>,
) -> Option<()> {
    let parsed = &scratch.parsed;
    let asked: [u8; TCP_LEN] = packet.load(parsed.l4())?;
    let header = u32::from(asked[12] >> 4) * 4;
    let payload = (parsed.end - parsed.l4).checked_sub(header)?;
    let sequence = u32::from_be_bytes([asked[4], asked[5], asked[6], asked[7]]);
    let mut tcp = [0_u8; TCP_LEN];
    tcp[..2].copy_from_slice(&parsed.tuple.dport);
    tcp[2..4].copy_from_slice(&parsed.tuple.sport);
    tcp[12] = 5 << 4;
    if parsed.tcp_flags & ACK != 0 {
        tcp[4..8].copy_from_slice(&asked[8..12]);
        tcp[13] = RST;
    } else {
        let flags = u32::from(parsed.tcp_flags & SYN != 0) + u32::from(parsed.tcp_flags & FIN != 0);
        let acknowledged = sequence.wrapping_add(payload).wrapping_add(flags);
        tcp[8..12].copy_from_slice(&acknowledged.to_be_bytes());
        tcp[13] = RST | ACK;
    }
    let sum = checksum::sum(pseudo(scratch, proto::TCP, TCP_LEN), &tcp);
    tcp[16..18].copy_from_slice(&checksum::finish(sum));
    stored(packet.resize((ETH_LEN + F::HEADER + TCP_LEN) as u32))?;
    begin::<N, F, P>(packet, scratch, proto::TCP, TCP_LEN)?;
    packet.store(at(F::HEADER), &tcp, false).then_some(())
}

#[inline(always)]
fn unreachable<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &Scratch<N>,
) -> Option<()> {
    let parsed = &scratch.parsed;
    // Options would have to be quoted too.
    if parsed.l4() != at(F::HEADER) {
        return None;
    }
    let length = ICMP_LEN + F::HEADER + QUOTED;
    stored(packet.resize((ETH_LEN + F::HEADER + length) as u32))?;
    let mut sum = if F::CHECKSUM.is_some() {
        0
    } else {
        pseudo(scratch, F::ICMP, length)
    };
    // The quote begins where what is quoted ends, so nothing is overwritten before it is read.
    let mut offset = at(0);
    while offset < at(F::HEADER + QUOTED) {
        let bytes: [u8; 4] = packet.load(offset)?;
        stored(packet.store(offset + F::HEADER + ICMP_LEN, &bytes, false))?;
        sum = checksum::sum(sum, &bytes);
        offset += 4;
    }
    let mut icmp = [0_u8; ICMP_LEN];
    icmp[..2].copy_from_slice(&F::PORT_UNREACHABLE);
    let sum = checksum::finish(checksum::sum(sum, &icmp));
    icmp[2..4].copy_from_slice(&sum);
    begin::<N, F, P>(packet, scratch, F::ICMP, length)?;
    stored(packet.store(at(F::HEADER), &icmp, false))
}

#[inline(always)]
fn stored(success: bool) -> Option<()> {
    success.then_some(())
}

/// The sum over the answer's pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1).
#[inline(always)]
fn pseudo<const N: usize>(scratch: &Scratch<N>, number: u8, length: usize) -> u32 {
    let tuple = &scratch.parsed.tuple;
    let sum = checksum::sum(checksum::sum(0, &tuple.src), &tuple.dst);
    let [high, low] = (length as u16).to_be_bytes();
    checksum::sum(sum, &[0, number, high, low])
}

/// Writes the answer's Ethernet and IP headers.
#[inline(always)]
fn begin<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &Scratch<N>,
    number: u8,
    length: usize,
) -> Option<()> {
    let tuple = &scratch.parsed.tuple;
    let asked: [u8; 12] = packet.load(0)?;
    let mut macs = [0_u8; 12];
    macs[..6].copy_from_slice(&asked[6..]);
    macs[6..].copy_from_slice(&asked[..6]);
    stored(packet.store(0, &macs, false))?;
    if N == 4 {
        let mut ip = [0_u8; 20];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&((20 + length) as u16).to_be_bytes());
        // Do not fragment; an atomic datagram needs no identification (RFC 6864).
        ip[6] = 0x40;
        ip[8] = HOPS;
        ip[9] = number;
        ip[12..16].copy_from_slice(&tuple.dst[..4]);
        ip[16..20].copy_from_slice(&tuple.src[..4]);
        let sum = checksum::finish(checksum::sum(0, &ip));
        ip[10..12].copy_from_slice(&sum);
        stored(packet.store(at(0), &ip, false))
    } else {
        let mut ip = [0_u8; 8];
        ip[0] = 0x60;
        ip[4..6].copy_from_slice(&(length as u16).to_be_bytes());
        ip[6] = number;
        ip[7] = HOPS;
        stored(packet.store(at(0), &ip, false))?;
        stored(packet.store(at(F::SOURCE), &tuple.dst, false))?;
        stored(packet.store(at(F::DESTINATION), &tuple.src, false))
    }
}
