//! Changes of addresses and ports, with the checksums that cover them.

use hachi_abi::{Reason, Tuple, proto};

use crate::{
    checksum, crc32c,
    ethernet::at,
    family::Family,
    parse::{Kind, Parsed},
    scratch::Scratch,
    traits::{Packet, Part},
};

/// Success, or a failed rewrite.
#[inline(always)]
pub(crate) fn done(success: bool) -> Result<(), Reason> {
    if success {
        Ok(())
    } else {
        Err(Reason::RewriteFailed)
    }
}

/// Makes the packet's tuple what `scratch.after` says.
///
/// # Errors
/// [`Reason::RewriteFailed`], or [`Reason::UnsupportedRewrite`] of the port of a fragmented SCTP
/// packet. The packet may be half rewritten then; it must be dropped.
#[inline(never)]
pub(crate) fn apply<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &Scratch<N>,
) -> Result<(), Reason> {
    let Scratch { parsed, after, .. } = scratch;
    let before = &parsed.tuple;
    // Both of ICMP's ports are its identifier: it is written with the source.
    let icmp = before.proto == F::ICMP;
    if before.dst != after.dst || (!icmp && before.dport != after.dport) {
        let change = Change {
            field: F::DESTINATION,
            port_field: 2,
            addr: (before.dst, after.dst),
            port: if icmp {
                ([0; 2], [0; 2])
            } else {
                (before.dport, after.dport)
            },
        };
        rewrite::<N, F, P>(packet, parsed, &change)?;
    }
    if before.src != after.src || before.sport != after.sport {
        let change = Change {
            field: F::SOURCE,
            port_field: if icmp { 4 } else { 0 },
            addr: (before.src, after.src),
            port: (before.sport, after.sport),
        };
        rewrite::<N, F, P>(packet, parsed, &change)?;
    }
    match before.proto {
        proto::TCP | proto::UDP => Ok(()),
        number if number == F::ICMP => Ok(()),
        _ => sctp(packet, parsed, after),
    }
}

/// What becomes of one end, from and to.
struct Change<const N: usize> {
    field: usize,
    port_field: usize,
    addr: ([u8; N], [u8; N]),
    port: ([u8; 2], [u8; 2]),
}

/// Gives one end of the packet another address and port, and corrects the checksums.
#[inline(always)]
fn rewrite<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<N>,
    change: &Change<N>,
) -> Result<(), Reason> {
    // IPv4's header checksum makes up for the address within the sum over the whole packet.
    done(packet.store(at(change.field), &change.addr.1, F::CHECKSUM.is_none()))?;
    let difference = checksum::replace(0, &change.addr.0, &change.addr.1);
    if let Some(offset) = F::CHECKSUM {
        done(packet.adjust_l3_checksum(at(offset), difference))?;
    }
    if parsed.kind == Kind::LaterFragment {
        return Ok(());
    }
    let l4 = parsed.l4();
    let checksum = match parsed.tuple.proto {
        proto::TCP => Some((l4 + 16, false)),
        proto::UDP => Some((l4 + 6, true)),
        number if number == F::ICMP => Some((l4 + 2, false)),
        _ => None,
    };
    // ICMP has no pseudo header, ICMPv6 has one.
    if let Some((offset, udp)) = checksum
        && (parsed.tuple.proto != F::ICMP || F::CHECKSUM.is_none())
    {
        done(packet.adjust_l4_checksum(offset, difference, Part::Pseudo, udp))?;
    }
    if change.port.0 == change.port.1 {
        return Ok(());
    }
    done(packet.store(l4 + change.port_field, &change.port.1, checksum.is_none()))?;
    match checksum {
        Some((offset, udp)) => {
            let difference = checksum::replace(0, &change.port.0, &change.port.1);
            done(packet.adjust_l4_checksum(offset, difference, Part::Segment, udp))
        }
        // SCTP's covers both ports, and is corrected when both are written.
        None => Ok(()),
    }
}

/// Corrects SCTP's checksum (RFC 9260 appendix A), which covers no address, but the ports and all that
/// follows them: from what has changed and the number of bytes behind it. Of a fragment that number is
/// not known.
#[inline(always)]
fn sctp<const N: usize, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<N>,
    after: &Tuple<N>,
) -> Result<(), Reason> {
    let ports = |tuple: &Tuple<N>| {
        let ([a, b], [c, d]) = (tuple.sport, tuple.dport);
        u32::from_le_bytes([a, b, c, d])
    };
    let difference = ports(&parsed.tuple) ^ ports(after);
    if difference == 0 || parsed.kind == Kind::LaterFragment {
        return Ok(());
    }
    if parsed.kind != Kind::Whole || parsed.tuple.proto != proto::SCTP {
        return Err(Reason::UnsupportedRewrite);
    }
    let at = parsed.l4() + 8;
    let Some(checksum) = packet.load::<4>(at) else {
        return Err(Reason::RewriteFailed);
    };
    let checksum = u32::from_le_bytes(checksum);
    // The sender has left it to hardware, which takes it of what the packet will be (Linux:
    // net/sctp/output.c). One packet in four billion has this checksum by chance; it is lost.
    if checksum == 0 {
        return Ok(());
    }
    let checksum = checksum ^ crc32c::difference(difference, parsed.end - parsed.l4);
    done(packet.store(at, &checksum.to_le_bytes(), true))
}
