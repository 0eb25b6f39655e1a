//! ICMP errors: they belong to the flow of the packet inside them (RFC 792, RFC 4443 section 3.1).

use hachi_abi::{CtFlags, Reason, SET_ALLOW_ALL, Tuple, proto};

use crate::{
    checksum,
    family::Family,
    flow,
    parse::address,
    scratch::Scratch,
    traits::{Maps, Packet},
};

/// The tuple of the packet inside an error, and the offset of its ports (0: it has none).
#[inline(always)]
fn inner_tuple<const N: usize, F: Family<N>, P: Packet>(
    packet: &P,
    inner: usize,
) -> Option<(Tuple<N>, usize)> {
    let (src, dst, number, ports) = if N == 4 {
        let ip: [u8; 20] = packet.load(inner)?;
        let header = usize::from(ip[0] & 0x0f) * 4;
        if header < 20 {
            return None;
        }
        (address(&ip, 12), address(&ip, 16), ip[9], inner + header)
    } else {
        let ip: [u8; 40] = packet.load(inner)?;
        (address(&ip, 8), address(&ip, 24), ip[6], inner + 40)
    };
    let mut tuple = Tuple {
        src,
        dst,
        sport: [0; 2],
        dport: [0; 2],
        proto: number,
        pad: [0; 3],
    };
    match number {
        proto::TCP | proto::UDP | proto::SCTP => {
            let bytes: [u8; 4] = packet.load(ports)?;
            tuple.sport = [bytes[0], bytes[1]];
            tuple.dport = [bytes[2], bytes[3]];
            Some((tuple, ports))
        }
        number if number == F::ICMP => {
            let bytes: [u8; 8] = packet.load(ports)?;
            if F::is_echo(bytes[0]) {
                tuple.sport = [bytes[4], bytes[5]];
                tuple.dport = tuple.sport;
            }
            Some((tuple, 0))
        }
        _ => Some((tuple, 0)),
    }
}

/// Lets an ICMP error pass that belongs to a tracked flow, with the packet inside it as the
/// receiver knows it: its destination is a Service's address again where it was translated.
/// Other errors pass only where no policy isolates the Pods concerned.
///
/// # Errors
/// The reason to drop it.
#[inline(never)]
pub(crate) fn error<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    let parsed = &scratch.parsed;
    let inner = parsed.l4() + 8;
    if let Some((tuple, ports)) = inner_tuple::<N, F, P>(packet, inner) {
        scratch.reply = tuple.reversed();
        let entry = &mut scratch.entry;
        if flow::find(maps, &scratch.reply, entry) {
            if entry.flags & (CtFlags::NAT | CtFlags::REPLY | CtFlags::HAIRPIN)
                == CtFlags::NAT | CtFlags::REPLY
                && ports != 0
            {
                let service = (entry.nat_addr, entry.nat_port);
                restore::<N, F, P>(packet, parsed.l4(), inner, ports, &tuple, service)?;
            }
            return Ok(());
        }
        scratch.reply = tuple;
        if flow::find(maps, &scratch.reply, entry) {
            return Ok(());
        }
    }
    let isolated = |addr: &[u8; N], egress: bool| {
        maps.endpoint(addr).is_some_and(|endpoint| {
            let set = if egress {
                endpoint.egress_set
            } else {
                endpoint.ingress_set
            };
            set != SET_ALLOW_ALL
        })
    };
    if isolated(&parsed.tuple.src, true) || isolated(&parsed.tuple.dst, false) {
        return Err(Reason::IcmpUnrelated);
    }
    Ok(())
}

/// Writes the Service's address and port over the backend's in the packet inside an error.
#[inline(always)]
fn restore<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    l4: usize,
    inner: usize,
    ports: usize,
    tuple: &Tuple<N>,
    (addr, port): ([u8; N], [u8; 2]),
) -> Result<(), Reason> {
    let failed = |done: bool| {
        if done {
            Ok(())
        } else {
            Err(Reason::RewriteFailed)
        }
    };
    let address_difference = checksum::replace(0, &tuple.dst, &addr);
    failed(packet.store(inner + F::DESTINATION, &addr))?;
    // The inner header's own checksum takes up the change of address, so that the sum over the
    // header, which the ICMP checksum covers, stays as it was. IPv6 has no such checksum.
    let mut difference = address_difference;
    if let Some(offset) = F::CHECKSUM {
        failed(packet.adjust_l3_checksum(inner + offset, address_difference))?;
        difference = 0;
    }
    failed(packet.store(ports + 2, &port))?;
    difference = checksum::replace(difference, &tuple.dport, &port);
    failed(packet.adjust_l4_checksum(l4 + 2, difference, false, false))
}
