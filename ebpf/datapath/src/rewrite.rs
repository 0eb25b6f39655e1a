//! Changes of addresses and ports, with the checksums that cover them.

use hachi_abi::{Reason, proto};

use crate::{
    checksum,
    family::{Family, at},
    parse::{Kind, Parsed},
    traits::Packet,
};

/// Offset of the transport checksum, and whether the protocol is UDP; none for protocols whose
/// checksum does not cover addresses.
#[inline(always)]
fn checksum_of(proto: u8) -> Option<(usize, bool)> {
    match proto {
        proto::TCP => Some((16, false)),
        proto::UDP => Some((6, true)),
        _ => None,
    }
}

/// Which end of the packet is rewritten.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// Gives one end of the packet another address and port, and corrects the checksums.
#[inline(always)]
pub(crate) fn rewrite<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<N>,
    end: End,
    addr: &[u8; N],
    port: [u8; 2],
) -> Result<(), Reason> {
    let (field, port_field, old_addr, old_port) = match end {
        End::Source => (F::SOURCE, 0, parsed.tuple.src, parsed.tuple.sport),
        End::Destination => (F::DESTINATION, 2, parsed.tuple.dst, parsed.tuple.dport),
    };
    let failed = |done: bool| {
        if done {
            Ok(())
        } else {
            Err(Reason::RewriteFailed)
        }
    };
    failed(packet.store(at(field), addr))?;
    let difference = checksum::replace(0, &old_addr, addr);
    if let Some(offset) = F::CHECKSUM {
        failed(packet.adjust_l3_checksum(at(offset), difference))?;
    }
    if parsed.kind == Kind::LaterFragment {
        return Ok(());
    }
    if let Some((offset, udp)) = checksum_of(parsed.tuple.proto) {
        let difference = checksum::replace(difference, &old_port, &port);
        // RFC 768: no checksum was computed. IPv6 forbids that (RFC 8200 section 8.1).
        let absent = udp
            && packet
                .load::<2>(parsed.l4() + offset)
                .ok_or(Reason::RewriteFailed)?
                == [0; 2];
        if !absent {
            failed(packet.adjust_l4_checksum(parsed.l4() + offset, difference, true, udp))?;
        }
    } else if port != old_port {
        // SCTP's checksum (RFC 9260 appendix A) is over the whole packet and does not cover the
        // addresses: a new port would need all of it computed again.
        return Err(Reason::RewriteFailed);
    }
    if port != old_port {
        failed(packet.store(parsed.l4() + port_field, &port))?;
    }
    Ok(())
}
