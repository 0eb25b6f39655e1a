//! ICMP errors: they belong to the flow of the packet inside them (RFC 792, RFC 4443 section 3.1).
//!
//! The packet inside, reversed, is what the error's receiver of blame would have answered: under
//! that tuple the flow is tracked here, and as that answer would be rewritten, so is the error.
//!
//! ```text
//! router -> C: "unreachable" [C:s -> B:b]     flow: B:b -> C:s, from Service V:v
//! router -> C: "unreachable" [C:s -> V:v]
//! ```

use hachi_abi::{CtFlags, PeerFlags, Reason, SET_ALLOW_ALL, Tuple};

use crate::{
    checksum,
    conntrack::{find, opener, translate},
    ethernet::at,
    family::Family,
    ip::{FRAGMENT, address},
    judge::{class, judge},
    parse::has_ports,
    rewrite::done,
    scratch::Scratch,
    traits::{Maps, Packet, Part},
};

/// The offset that stands for "the packet inside has no ports".
const NONE: usize = 0;

/// The offset that stands for "there is no packet inside".
pub(crate) const INVALID: usize = 1;

/// Lets an ICMP error pass that belongs to a tracked flow, rewritten as the flow is. Others pass
/// only where no policy isolates the Pods concerned. Leaves where the error goes in `after.dst`.
///
/// `by_sender`: a Pod has sent it, which is no router: the packet inside must have been for it, or
/// the error is forged, whomever it is for.
///
/// # Errors
/// The reason to drop it.
#[inline(never)]
pub(crate) fn error<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
    by_sender: bool,
) -> Result<(), Reason> {
    scratch.now = maps.now();
    let ports = inside::<N, F, P>(packet, scratch);
    if ports != INVALID {
        let Scratch {
            parsed,
            reply,
            entry,
            after,
            now,
            ..
        } = scratch;
        let outer = &parsed.tuple;
        if by_sender && outer.src != reply.src {
            return Err(Reason::IcmpUnrelated);
        }
        if outer.dst == reply.dst {
            let mut found = find(maps, *now, reply, entry);
            let rewritten = !found;
            if rewritten {
                // By `from_pod` already, or the other half is lost.
                *reply = reply.reversed();
                found = find(maps, *now, reply, entry);
            }
            if found {
                translate(reply, entry, after);
                allowed(maps, scratch)?;
                if rewritten {
                    scratch.after = scratch.parsed.tuple;
                } else if scratch.entry.flags & CtFlags::NAT != 0 && ports != NONE {
                    rewrite_ends::<N, F, P>(packet, scratch, ports, false)?;
                }
                return Ok(());
            }
        }
    }
    scratch.after = scratch.parsed.tuple;
    scratch.entry.flags = 0;
    unrelated(maps, &scratch.parsed.tuple)
}

/// Looks up the Service's flow that the packet is of which `scratch.reply` says reversed, and leaves
/// what becomes of it in `after`; `false` if there is none.
///
/// `half`: the packet is tracked under the opener's half (0), or under the other
/// ([`CtFlags::REPLY`]). Where destinations change it is the one, where sources do the other.
///
/// # Errors
/// [`Reason::IcmpUnrelated`] if policy no longer allows the flow.
#[inline(never)]
pub(crate) fn restore<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
    half: u8,
) -> Result<bool, Reason> {
    let Scratch {
        reply,
        entry,
        after,
        now,
        ..
    } = scratch;
    if !find(maps, *now, reply, entry)
        || entry.flags & (CtFlags::NAT | CtFlags::REPLY) != CtFlags::NAT | half
    {
        return Ok(false);
    }
    translate(reply, entry, after);
    allowed(maps, scratch)?;
    Ok(true)
}

/// Whether policy still allows the flow whose entry for `scratch.reply` is in `scratch`.
#[inline(always)]
fn allowed<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    if scratch.entry.revision != maps.revision() && scratch.entry.flags & CtFlags::HAIRPIN == 0 {
        scratch.opener = opener(&scratch.reply, &scratch.entry, &scratch.after);
        if judge(maps, scratch).is_err() {
            return Err(Reason::IcmpUnrelated);
        }
    }
    Ok(())
}

/// Whether the packet that `scratch.reply` says reversed is of a tracked flow.
#[inline(never)]
pub(crate) fn is_tracked<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> bool {
    let Scratch {
        reply, known, now, ..
    } = scratch;
    find(maps, *now, reply, known)
}

/// Reads the packet inside, reversed, into `reply`; returns the offset of its ports, [`NONE`] or
/// [`INVALID`].
#[inline(never)]
fn inner<const N: usize, F: Family<N>, P: Packet>(
    packet: &P,
    inside: usize,
    reply: &mut Tuple<N>,
) -> usize {
    read::<N, F, P>(packet, inside, reply).unwrap_or(INVALID)
}

#[inline(always)]
fn read<const N: usize, F: Family<N>, P: Packet>(
    packet: &P,
    inside: usize,
    reply: &mut Tuple<N>,
) -> Option<usize> {
    let (ports, fragment) = if N == 4 {
        let ip: [u8; 20] = packet.load(inside)?;
        let header = usize::from(ip[0] & 0x0f) * 4;
        if ip[0] >> 4 != 4 || header < 20 {
            return None;
        }
        reply.src = address(&ip, 16);
        reply.dst = address(&ip, 12);
        reply.proto = ip[9];
        (inside + header, u16::from_be_bytes([ip[6] & 0x1f, ip[7]]))
    } else {
        let ip: [u8; 40] = packet.load(inside)?;
        if ip[0] >> 4 != 6 {
            return None;
        }
        reply.src = address(&ip, 24);
        reply.dst = address(&ip, 8);
        reply.proto = ip[6];
        if ip[6] == FRAGMENT {
            // What is too long for a hop is a fragment more often than not: they fill packets.
            let header: [u8; 4] = packet.load(inside + 40)?;
            reply.proto = header[0];
            let offset = u16::from_be_bytes([header[2], header[3]]) & 0xfff8;
            (inside + 48, offset)
        } else {
            (inside + 40, 0)
        }
    };
    reply.sport = [0; 2];
    reply.dport = [0; 2];
    reply.pad = [0; 3];
    if fragment != 0 {
        return None;
    }
    if has_ports(reply.proto) {
        let bytes: [u8; 4] = packet.load(ports)?;
        reply.dport = [bytes[0], bytes[1]];
        reply.sport = [bytes[2], bytes[3]];
        Some(ports)
    } else if reply.proto == F::ICMP {
        let bytes: [u8; 8] = packet.load(ports)?;
        if F::is_echo(bytes[0]) {
            reply.sport = [bytes[4], bytes[5]];
            reply.dport = [bytes[4], bytes[5]];
            return Some(ports);
        }
        Some(NONE)
    } else {
        Some(NONE)
    }
}

/// Makes the packet inside, which `reply` says reversed, what `after` says reversed, and the error
/// around it; `parsed.tuple` follows.
///
/// `relayed`: whoever has sent the error, it goes on from where the flow's own packets go on from, as
/// `nf_nat_icmp_reply_translation` of Linux has it.
///
/// # Errors
/// [`Reason::RewriteFailed`]; the packet must be dropped.
#[inline(never)]
pub(crate) fn rewrite_ends<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &mut Scratch<N>,
    ports: usize,
    relayed: bool,
) -> Result<(), Reason> {
    rewrite::<N, F, P>(packet, scratch, ports, true)?;
    rewrite::<N, F, P>(packet, scratch, ports, false)?;
    let Scratch {
        parsed,
        reply,
        after,
        ..
    } = scratch;
    if parsed.tuple.src == reply.src {
        parsed.tuple.src = after.src;
    }
    parsed.tuple.dst = after.dst;
    if relayed {
        speak::<N, F, P>(packet, scratch)?;
    }
    Ok(())
}

/// Has an error come from the address that the flow's packets come from here, `after.src`.
///
/// # Errors
/// [`Reason::RewriteFailed`]; the packet must be dropped.
#[inline(never)]
fn speak<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    let Scratch { parsed, after, .. } = scratch;
    if parsed.tuple.src == after.src {
        return Ok(());
    }
    let moved = checksum::replace(0, &parsed.tuple.src, &after.src);
    done(packet.store(at(F::SOURCE), &after.src, F::CHECKSUM.is_none()))?;
    match F::CHECKSUM {
        Some(offset) => done(packet.adjust_l3_checksum(at(offset), moved))?,
        None => done(packet.adjust_l4_checksum(parsed.l4() + 2, moved, Part::Pseudo, false))?,
    }
    parsed.tuple.src = after.src;
    Ok(())
}

/// Reads the packet inside an error, reversed, into `scratch.reply`; returns the offset of its
/// ports, or [`INVALID`] (as of an error that is not for the sender of the packet inside).
#[inline(always)]
pub(crate) fn inside<const N: usize, F: Family<N>, P: Packet>(
    packet: &P,
    scratch: &mut Scratch<N>,
) -> usize {
    let offset = scratch.parsed.l4() + 8;
    inner::<N, F, P>(packet, offset, &mut scratch.reply)
}

/// An error about nothing known: nobody's policy may forbid it.
#[inline(always)]
fn unrelated<const N: usize, M: Maps<N>>(maps: &M, outer: &Tuple<N>) -> Result<(), Reason> {
    if let Some(sender) = maps.endpoint(&outer.src)
        && sender.egress_set != SET_ALLOW_ALL
    {
        return Err(Reason::IcmpUnrelated);
    }
    if let Some(receiver) = maps.endpoint(&outer.dst)
        && receiver.ingress_set != SET_ALLOW_ALL
        && class(maps, &outer.src).flags & PeerFlags::LOCAL_NODE == 0
    {
        return Err(Reason::IcmpUnrelated);
    }
    Ok(())
}

/// Makes one end of the packet inside what it was before this node rewrote it (or what the other
/// side knows it as), and the same end of the error itself.
///
/// `by`: what answers is the destination inside, and the source of an error that it sends itself.
/// Otherwise: the source inside is where the error goes.
#[inline(never)]
fn rewrite<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &Scratch<N>,
    ports: usize,
    by: bool,
) -> Result<(), Reason> {
    let Scratch {
        parsed,
        reply,
        after,
        ..
    } = scratch;
    let l4 = parsed.l4();
    let sum = l4 + 2;
    let (inner_field, outer_field, port) = if by {
        (F::DESTINATION, F::SOURCE, ports + 2)
    } else {
        (F::SOURCE, F::DESTINATION, ports)
    };
    let (old, new) = if by {
        ((&reply.src, reply.sport), (&after.src, after.sport))
    } else {
        ((&reply.dst, reply.dport), (&after.dst, after.dport))
    };
    let outer = !by || parsed.tuple.src == reply.src;
    let mut difference = 0;
    let port = if reply.proto == F::ICMP {
        // An identifier, which both ends have; once is enough.
        if by { NONE } else { ports + 4 }
    } else {
        port
    };
    if old.1 != new.1 && ports != NONE && port != NONE {
        done(packet.store(port, &new.1, false))?;
        difference = checksum::replace(difference, &old.1, &new.1);
    }
    if old.0 != new.0 {
        let moved = checksum::replace(0, old.0, new.0);
        done(packet.store(l4 + 8 + inner_field, new.0, false))?;
        match F::CHECKSUM {
            // The inner header's own checksum takes up the change of address, so that the sum
            // over the header, which the ICMP checksum covers, stays as it was.
            Some(offset) => done(packet.adjust_l3_checksum(l4 + 8 + offset, moved))?,
            None => done(packet.adjust_l4_checksum(sum, moved, Part::Segment, false))?,
        }
        if outer {
            done(packet.store(at(outer_field), new.0, F::CHECKSUM.is_none()))?;
            match F::CHECKSUM {
                Some(offset) => done(packet.adjust_l3_checksum(at(offset), moved))?,
                // ICMPv6 has a pseudo header, ICMP has none.
                None => done(packet.adjust_l4_checksum(sum, moved, Part::Pseudo, false))?,
            }
        }
    }
    done(packet.adjust_l4_checksum(sum, difference, Part::Segment, false))
}
