//! Flows that are tracked: two entries each, under the tuples that packets carry on arrival.

use hachi_abi::{CtEntry, CtFlags, REFRESH_OTHER, Reason, Tuple, lifetime};

use crate::{judge::judge, parse::has_ports, scratch::Scratch, service, traits::Maps};

/// Whether an entry still means something.
#[inline(always)]
pub(crate) fn alive<const N: usize>(entry: &CtEntry<N>, proto: u8, now: u32) -> bool {
    let age = now.wrapping_sub(entry.last_seen);
    // Another CPU may have noted a time that this one has not seen begin.
    age <= lifetime(proto, entry.flags) || age == u32::MAX
}

/// Copies the entry of a tuple out; `false` if there is none, or it is too old to count.
#[inline(always)]
pub(crate) fn find<const N: usize, M: Maps<N>>(
    maps: &M,
    now: u32,
    tuple: &Tuple<N>,
    entry: &mut CtEntry<N>,
) -> bool {
    maps.flow(tuple, entry) && alive(entry, tuple.proto, now)
}

/// Whether two entries rewrite their packets in the same way, and so can be of one flow.
#[inline(always)]
pub(crate) fn alike<const N: usize>(a: &CtEntry<N>, b: &CtEntry<N>) -> bool {
    const REWRITE: u8 = CtFlags::NAT | CtFlags::HAIRPIN | CtFlags::PORT;
    if (a.flags ^ b.flags) & REWRITE != 0 {
        return false;
    }
    a.flags & CtFlags::NAT == 0
        || ((a.flags ^ b.flags) & CtFlags::REPLY == 0
            && a.nat_addr == b.nat_addr
            && a.nat_port == b.nat_port
            && a.port == b.port)
}

/// What rewriting makes of a tuple under an entry.
///
/// A hairpin flow (a Pod that its Service sent back to itself) has both ends rewritten, so that
/// the replies leave the Pod: `C:s -> V:v` becomes `V:s -> C:b`, and `C:b -> V:s` becomes
/// `V:v -> C:s`, where C is the Pod and V the Service.
///
/// [`CtFlags::PORT`] has the opener's port changed too: `s` becomes the entry's.
#[inline(always)]
pub(crate) fn translate<const N: usize>(
    tuple: &Tuple<N>,
    entry: &CtEntry<N>,
    after: &mut Tuple<N>,
) {
    *after = *tuple;
    if entry.flags & CtFlags::NAT == 0 {
        return;
    }
    let hairpin = entry.flags & CtFlags::HAIRPIN != 0;
    let port = entry.flags & CtFlags::PORT != 0;
    if entry.flags & CtFlags::REPLY == 0 {
        after.dst = entry.nat_addr;
        after.dport = entry.nat_port;
        if hairpin {
            after.src = tuple.dst;
        }
        if port {
            after.sport = entry.port;
        }
    } else {
        after.src = entry.nat_addr;
        after.sport = entry.nat_port;
        if hairpin {
            after.dst = tuple.src;
        }
        if port {
            after.dport = entry.port;
        }
    }
}

/// Makes the other half of the entry of `tuple`. Its translation undoes this one's: the address
/// that this half rewrites is, seen from the other half, the one to restore.
#[inline(always)]
pub(crate) fn opposite<const N: usize>(
    tuple: &Tuple<N>,
    entry: &CtEntry<N>,
    other: &mut CtEntry<N>,
) {
    *other = *entry;
    other.flags = (entry.flags ^ CtFlags::REPLY) & !CtFlags::CLOSING;
    if entry.flags & CtFlags::NAT != 0 {
        if entry.flags & CtFlags::REPLY == 0 {
            other.nat_addr = tuple.dst;
            other.nat_port = tuple.dport;
            other.port = tuple.sport;
        } else {
            other.nat_addr = tuple.src;
            other.nat_port = tuple.sport;
            other.port = tuple.dport;
        }
        if entry.flags & CtFlags::PORT == 0 {
            other.port = [0; 2];
        }
    }
}

/// The opener's tuple behind the Service, for the entry under `tuple` that makes `after` of it.
#[inline(always)]
pub(crate) fn opener<const N: usize>(
    tuple: &Tuple<N>,
    entry: &CtEntry<N>,
    after: &Tuple<N>,
) -> Tuple<N> {
    // A reply carries the opener's tuple reversed, before it is rewritten.
    if entry.flags & CtFlags::REPLY == 0 {
        *after
    } else {
        tuple.reversed()
    }
}

/// Whether the packet's entry needs nothing done: it was judged under this revision, noted in this
/// tick, and the packet neither ends what is not known to end nor is the first answer. (An entry of long ago counts as
/// current in one tick of 256.)
#[inline(always)]
pub(crate) fn is_current<const N: usize, M: Maps<N>>(maps: &M, scratch: &Scratch<N>) -> bool {
    const ANSWERED: u8 = CtFlags::REPLY | CtFlags::OPENING;
    let Scratch { entry, parsed, .. } = scratch;
    entry.flags & ANSWERED != ANSWERED
        && entry.tick == maps.tick()
        && entry.revision == maps.revision()
        && (!parsed.closes() || entry.flags & CtFlags::CLOSING != 0)
}

/// Whether a Service has come to own the destination of a flow that was opened before it was
/// there; such a flow (of UDP, say) is to begin anew. Asked once a second.
#[inline(never)]
pub(crate) fn is_captured<const N: usize, M: Maps<N>>(maps: &M, scratch: &Scratch<N>) -> bool {
    let Scratch {
        entry,
        parsed,
        scope,
        ..
    } = scratch;
    entry.flags & (CtFlags::NAT | CtFlags::REPLY) == 0
        && has_ports(parsed.tuple.proto)
        && service::frontend(maps, &parsed.tuple, *scope as u8).is_some()
}

/// Brings the flow of a packet, whose entry is in `scratch`, up to date: judges it again if the
/// policy revision has moved on, and notes time and end on both halves, which restores one that
/// was evicted.
///
/// # Errors
/// Which side denies the flow now.
#[inline(never)]
pub(crate) fn renew<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    let revision = maps.revision();
    if scratch.entry.revision != revision {
        if scratch.entry.flags & CtFlags::HAIRPIN == 0 {
            scratch.opener = opener(&scratch.parsed.tuple, &scratch.entry, &scratch.after);
            judge(maps, scratch)?;
            scratch.entry.egress_rule = scratch.egress_rule;
            scratch.entry.ingress_rule = scratch.ingress_rule;
        }
        scratch.entry.revision = revision;
    }
    if scratch.parsed.closes() {
        scratch.entry.flags |= CtFlags::CLOSING;
    }
    if scratch.entry.flags & CtFlags::REPLY != 0 {
        scratch.entry.flags &= !CtFlags::OPENING;
    }
    scratch.entry.last_seen = scratch.now;
    scratch.entry.tick = maps.tick();
    // A write that fails leaves an older entry or none: the next packet tries again.
    maps.put_flow(&scratch.parsed.tuple, &scratch.entry);

    scratch.reply = scratch.after.reversed();
    opposite(&scratch.parsed.tuple, &scratch.entry, &mut scratch.other);
    let Scratch {
        other,
        known,
        parsed,
        now,
        ..
    } = scratch;
    if parsed.resets() {
        other.flags |= CtFlags::CLOSING;
    }
    let write = if find(maps, *now, &scratch.reply, known) {
        other.flags |= known.flags & CtFlags::CLOSING;
        // What is there may be of another flow, which keeps it.
        alike(known, other)
            && (now.wrapping_sub(known.last_seen) >= REFRESH_OTHER || other.flags != known.flags)
    } else {
        true
    };
    if write {
        maps.put_flow(&scratch.reply, other);
    }
    Ok(())
}
