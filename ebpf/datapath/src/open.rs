//! New flows: chosen, judged, tracked.
//!
//! Two flows must never share a tuple on the way back, or replies would be translated for the
//! wrong one. A client that uses one source port both to a Service and to another Service over the
//! same backend (or to that backend itself) comes close: then another backend is tried, and if
//! there is none that would do, the packet is dropped as [`Reason::TupleInUse`].

use hachi_abi::{CtFlags, Reason};

use crate::{
    conntrack::{alike, find, opener, opposite, translate},
    judge::judge,
    scratch::{Event, Scratch},
    service,
    traits::Maps,
};

/// Backends that are tried for a tuple that nobody uses.
const ATTEMPTS: u32 = 4;

/// Opens the flow of a packet that a Pod has sent.
///
/// # Errors
/// The reason to drop it; [`Reason::Rejected`] if the client is to be told instead.
#[inline(never)]
pub(crate) fn from_pod<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    service::find(maps, scratch)?;
    attempts(maps, scratch)
}

/// Opens the flow with the first backend whose answers cannot be taken for another flow's.
#[inline(always)]
fn attempts<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    if is_reply(maps, scratch) {
        return Err(Reason::TupleInUse);
    }
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        if attempt != 0 && attempt >= scratch.backends {
            break;
        }
        prepare(maps, scratch, attempt)?;
        if is_free(maps, scratch) {
            return admit(maps, scratch);
        }
        attempt += 1;
    }
    Err(Reason::TupleInUse)
}

/// Opens the flow of a packet from the network to a Service. To any other destination nothing is
/// tracked: the entry in `scratch` has no flags then.
///
/// # Errors
/// As [`from_pod`].
#[inline(never)]
pub(crate) fn from_net<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    service::find(maps, scratch)?;
    if scratch.backends == 0 {
        scratch.entry.flags = 0;
        return Ok(());
    }
    attempts(maps, scratch)
}

/// Opens the flow of a packet that the host's stack sends to a Pod.
///
/// The packet may be one that `from_pod` has judged, tracked and rewritten already, and left to
/// the stack. Its tuple, reversed, is then that under which the receiver's answers are tracked.
///
/// # Errors
/// The reason to drop it.
#[inline(never)]
pub(crate) fn to_pod<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    scratch.reply = scratch.parsed.tuple.reversed();
    if find(maps, scratch.now, &scratch.reply, &mut scratch.known)
        && scratch.known.flags & CtFlags::NAT != 0
    {
        if scratch.known.revision == maps.revision() || scratch.known.flags & CtFlags::HAIRPIN != 0
        {
            return Ok(());
        }
        translate(&scratch.reply, &scratch.known, &mut scratch.after);
        scratch.opener = opener(&scratch.reply, &scratch.known, &scratch.after);
        return judge(maps, scratch);
    }
    if is_reply(maps, scratch) {
        return Err(Reason::TupleInUse);
    }
    scratch.backends = 0;
    prepare(maps, scratch, 0)?;
    admit(maps, scratch)
}

/// Whether a SYN's tuple is that of the replies of a live flow through a Service, which would be
/// lost with them.
#[inline(always)]
fn is_reply<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> bool {
    const TRANSLATED: u8 = CtFlags::NAT | CtFlags::REPLY;
    let Scratch {
        parsed, known, now, ..
    } = scratch;
    parsed.opens()
        && find(maps, *now, &parsed.tuple, known)
        && known.flags & (TRANSLATED | CtFlags::CLOSING) == TRANSLATED
}

/// Makes both halves of the flow, with the backend of this attempt.
#[inline(never)]
fn prepare<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
    attempt: u32,
) -> Result<(), Reason> {
    scratch.entry.last_seen = scratch.now;
    scratch.entry.revision = maps.revision();
    scratch.entry.tick = maps.tick();
    if scratch.backends == 0 {
        scratch.entry.flags = 0;
        scratch.entry.nat_addr = [0; N];
        scratch.entry.nat_port = [0; 2];
    } else {
        service::choose(maps, scratch, attempt)?;
        scratch.entry.flags = if scratch.entry.nat_addr == scratch.parsed.tuple.src {
            CtFlags::NAT | CtFlags::HAIRPIN
        } else {
            CtFlags::NAT
        };
    }
    let Scratch {
        parsed,
        entry,
        after,
        other,
        ..
    } = scratch;
    translate(&parsed.tuple, entry, after);
    opposite(&parsed.tuple, entry, other);
    scratch.reply = after.reversed();
    Ok(())
}

/// Whether no live flow but an earlier one of the same kind has the tuple of the replies.
#[inline(always)]
fn is_free<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> bool {
    let Scratch {
        reply,
        known,
        other,
        now,
        ..
    } = scratch;
    !find(maps, *now, reply, known) || known.flags & CtFlags::CLOSING != 0 || alike(known, other)
}

/// Judges the flow, and tracks it if it may be. A denied flow leaves the table as it was.
#[inline(never)]
fn admit<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    if scratch.entry.flags & CtFlags::HAIRPIN == 0 {
        scratch.opener = scratch.after;
    } else {
        // To itself, as far as policy goes.
        scratch.opener = scratch.parsed.tuple;
        scratch.opener.dst = scratch.opener.src;
    }
    judge(maps, scratch)?;
    let Scratch {
        entry,
        other,
        egress_rule,
        ingress_rule,
        ..
    } = scratch;
    entry.egress_rule = *egress_rule;
    entry.ingress_rule = *ingress_rule;
    other.egress_rule = *egress_rule;
    other.ingress_rule = *ingress_rule;
    if !maps.put_flow(&scratch.reply, other) || !maps.put_flow(&scratch.parsed.tuple, entry) {
        return Err(Reason::ConntrackFull);
    }
    service::remember(maps, scratch);
    scratch.event = Event::Opened;
    Ok(())
}
