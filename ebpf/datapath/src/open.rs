//! New flows: chosen, judged, tracked.
//!
//! Two flows must never share a tuple on the way back, or replies would be translated for the
//! wrong one. A client that uses one source port both to a Service and to another Service over the
//! same backend (or to that backend itself) comes close: then the later flow is given another
//! source port ([`CtFlags::PORT`]), which its replies name, and only this node knows.
//!
//! ```text
//! C:s -> V:v    the first    C:s -> B:b     replies B:b -> C:s
//! C:s -> W:w    the second   C:p -> B:b     replies B:b -> C:p
//! ```
//! Ports come from the range that the node gives its own connections. The reply's entry is the
//! claim: it is only added where there is none, in one step. With no port left among those that are
//! tried, or a protocol without ports, the packet is dropped as [`Reason::TupleInUse`].

use hachi_abi::{CtFlags, Reason, Scope, proto};

use crate::{
    conntrack::{alike, find, opener, opposite, translate},
    hash,
    judge::judge,
    parse::has_ports,
    scratch::{Event, Scratch},
    service,
    traits::Maps,
};

/// Ports that are tried for a flow whose own is in use; a range that is no larger is tried in full.
const ATTEMPTS: u32 = 8;

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

/// Opens the flow with a tuple whose answers cannot be taken for another flow's.
#[inline(never)]
fn attempts<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    existing(maps, scratch)?;
    prepare(maps, scratch)?;
    if scratch.wanted != [0; 2] || !is_free(maps, scratch) {
        another_port(maps, scratch)?;
    }
    admit(maps, scratch)
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

/// Opens the flow of a packet to a Pod, from the host's stack or from an uplink.
///
/// If it is not fresh ([`Scratch::fresh`]) it may be one that another program has judged, tracked and rewritten
/// already. Its tuple, reversed, is then that under which the receiver's answers are tracked.
///
/// # Errors
/// The reason to drop it.
#[inline(never)]
pub(crate) fn to_pod<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    scratch.reply = scratch.parsed.tuple.reversed();
    if scratch.fresh == 0
        && find(maps, scratch.now, &scratch.reply, &mut scratch.known)
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
    scratch.backends = 0;
    attempts(maps, scratch)
}

/// Looks at what an earlier flow of the same ports has left: a SYN that is sent again keeps the
/// port that it was given; one whose tuple is that of the replies of a live flow through a Service,
/// which would be lost with them, opens nothing.
#[inline(always)]
fn existing<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    const CHANGED: u8 = CtFlags::NAT | CtFlags::REPLY;
    let Scratch {
        parsed,
        known,
        now,
        wanted,
        ..
    } = scratch;
    *wanted = [0; 2];
    if !parsed.opens()
        || !find(maps, *now, &parsed.tuple, known)
        || known.flags & CtFlags::CLOSING != 0
    {
        return Ok(());
    }
    if known.flags & CHANGED == CHANGED {
        return Err(Reason::TupleInUse);
    }
    if known.flags & CtFlags::PORT != 0 {
        *wanted = known.port;
    }
    Ok(())
}

/// Makes both halves of the flow, with the backend that was chosen.
#[inline(never)]
fn prepare<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    scratch.entry.last_seen = scratch.now;
    scratch.entry.revision = maps.revision();
    scratch.entry.tick = maps.tick();
    scratch.entry.port = [0; 2];
    scratch.entry.pad = [0; 2];
    if scratch.backends == 0 {
        scratch.entry.flags = 0;
        scratch.entry.nat_addr = [0; N];
        scratch.entry.nat_port = [0; 2];
    } else {
        service::choose(maps, scratch)?;
        // A client of another node that is its own backend gets this node's address, as any.
        // The node that is its own answers by its loopback device, which sees it.
        let here = scratch.scope == u32::from(Scope::INTERNAL) && scratch.node == 0;
        scratch.entry.flags = if here && scratch.entry.nat_addr == scratch.parsed.tuple.src {
            CtFlags::NAT | CtFlags::HAIRPIN
        } else {
            CtFlags::NAT
        };
    }
    if scratch.parsed.tuple.proto == proto::TCP {
        scratch.entry.flags |= CtFlags::OPENING;
    }
    halves(scratch);
    Ok(())
}

/// Makes of the opener's half what follows from it.
#[inline(always)]
fn halves<const N: usize>(scratch: &mut Scratch<N>) {
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
}

/// Gives the flow another source port, which nobody else's replies name: the one that it had, or
/// one from a hash of the flow on.
#[inline(never)]
fn another_port<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    let (low, high) = maps.ports();
    if !has_ports(scratch.parsed.tuple.proto) || high < low || high == 0 {
        return Err(Reason::TupleInUse);
    }
    if scratch.backends == 0 {
        // To the backend itself: only the port changes.
        scratch.entry.nat_addr = scratch.parsed.tuple.dst;
        scratch.entry.nat_port = scratch.parsed.tuple.dport;
    }
    scratch.entry.flags |= CtFlags::NAT | CtFlags::PORT;
    if scratch.wanted != [0; 2] {
        scratch.entry.port = scratch.wanted;
        halves(scratch);
        if is_free(maps, scratch) {
            return Ok(());
        }
    }
    let range = u32::from(high.wrapping_sub(low)) + 1;
    let hash = hash::tuple(&scratch.parsed.tuple);
    let step = if range <= ATTEMPTS { 1 } else { hash >> 16 | 1 };
    let mut at = hash % range;
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        scratch.entry.port = low.wrapping_add(at as u16).to_be_bytes();
        if takes_port(maps, scratch) {
            return Ok(());
        }
        at = at.wrapping_add(step) % range;
        attempt += 1;
    }
    Err(Reason::TupleInUse)
}

/// Whether the port in the entry would do; leaves both halves with it.
#[inline(never)]
fn takes_port<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> bool {
    halves(scratch);
    // A flow of the opener's own from that port to the backend may have lost its other half.
    is_free(maps, scratch) && !find(maps, scratch.now, &scratch.after, &mut scratch.known)
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
    claim(maps, scratch)?;
    if !maps.put_flow(&scratch.parsed.tuple, &scratch.entry) {
        // Half a flow would be in the way of whole ones.
        maps.drop_flow(&scratch.reply);
        return Err(Reason::ConntrackFull);
    }
    service::remember(maps, scratch);
    scratch.event = Event::Opened;
    Ok(())
}

/// Adds the replies' half. Another CPU may have opened a flow in the meantime: a claim that is
/// another's is never taken.
#[inline(always)]
fn claim<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    let Scratch {
        reply,
        known,
        other,
        now,
        ..
    } = scratch;
    if maps.claim_flow(reply, other) {
        return Ok(());
    }
    if !maps.flow(reply, known) {
        return Err(Reason::ConntrackFull);
    }
    // The flow's own, or what one that is over has left.
    if alike(known, other) {
        return if maps.put_flow(reply, other) {
            Ok(())
        } else {
            Err(Reason::ConntrackFull)
        };
    }
    if find(maps, *now, reply, known) && known.flags & CtFlags::CLOSING == 0 {
        return Err(Reason::TupleInUse);
    }
    maps.drop_flow(reply);
    if maps.claim_flow(reply, other) {
        Ok(())
    } else {
        Err(Reason::TupleInUse)
    }
}
