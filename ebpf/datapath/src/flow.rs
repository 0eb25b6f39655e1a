//! Flows: what a tracked packet needs, and how one is tracked.

use hachi_abi::{CtEntry, CtFlags, RULE_NONE, Reason, Tuple, proto};

use crate::{
    family::Family,
    judge::judge,
    rewrite::{End, rewrite},
    scratch::Scratch,
    traits::{Maps, Packet},
};

/// For how long after its last packet a flow is remembered, in seconds, by protocol and state. The
/// numbers are those that Linux's own conntrack has for assured flows (net/netfilter/
/// nf_conntrack_proto_tcp.c, _udp.c, _generic.c, Linux 6.1), less for what is closing.
const TCP_ESTABLISHED: u32 = 86_400;
const TCP_CLOSING: u32 = 3_600;
const UDP: u32 = 180;
const OTHER: u32 = 600;

/// Copies the entry of a tuple out; `false` if there is none, or it is too old to count.
#[inline(always)]
pub(crate) fn find<const N: usize, M: Maps<N>>(
    maps: &M,
    tuple: &Tuple<N>,
    entry: &mut CtEntry<N>,
) -> bool {
    if !maps.flow(tuple, entry) {
        return false;
    }
    let age = maps.now().wrapping_sub(entry.last_seen);
    let limit = match tuple.proto {
        proto::TCP if entry.flags & CtFlags::CLOSING != 0 => TCP_CLOSING,
        proto::TCP => TCP_ESTABLISHED,
        proto::UDP => UDP,
        _ => OTHER,
    };
    // A clock read on another CPU a moment ago may be one ahead.
    age <= limit || age == u32::MAX
}

/// What rewriting makes of a tuple under an entry.
///
/// A hairpin flow (a Pod that its Service sent back to itself) has both ends rewritten, so that
/// the replies leave the Pod: `C:s -> V:v` becomes `V:s -> C:b`, and `C:b -> V:s` becomes
/// `V:v -> C:s`, where C is the Pod and V the Service.
#[inline(always)]
fn translate<const N: usize>(tuple: &Tuple<N>, entry: &CtEntry<N>, after: &mut Tuple<N>) {
    *after = *tuple;
    if entry.flags & CtFlags::NAT == 0 {
        return;
    }
    let hairpin = entry.flags & CtFlags::HAIRPIN != 0;
    if entry.flags & CtFlags::REPLY == 0 {
        after.dst = entry.nat_addr;
        after.dport = entry.nat_port;
        if hairpin {
            after.src = tuple.dst;
        }
    } else {
        after.src = entry.nat_addr;
        after.sport = entry.nat_port;
        if hairpin {
            after.dst = tuple.src;
        }
    }
}

/// Rewrites a packet as its entry says.
#[inline(never)]
pub(crate) fn apply<const N: usize, F: Family<N>, P: Packet>(
    packet: &mut P,
    scratch: &Scratch<N>,
) -> Result<(), Reason> {
    let (before, after) = (&scratch.parsed.tuple, &scratch.after);
    if before.dst != after.dst || before.dport != after.dport {
        rewrite::<N, F, P>(
            packet,
            &scratch.parsed,
            End::Destination,
            &after.dst,
            after.dport,
        )?;
    }
    if before.src != after.src || before.sport != after.sport {
        rewrite::<N, F, P>(
            packet,
            &scratch.parsed,
            End::Source,
            &after.src,
            after.sport,
        )?;
    }
    Ok(())
}

/// Brings the flow of a packet, whose entry is in `scratch`, up to date: judges it again if the
/// policy revision has moved on, and once a second notes the time on both halves, which restores
/// one that was evicted.
///
/// # Errors
/// The reason to drop the packet.
#[inline(always)]
pub(crate) fn refresh<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    translate(&scratch.parsed.tuple, &scratch.entry, &mut scratch.after);
    let closing = scratch.parsed.closes() && scratch.entry.flags & CtFlags::CLOSING == 0;
    if scratch.entry.revision == maps.revision()
        && scratch.entry.last_seen == maps.now()
        && !closing
    {
        return Ok(());
    }
    renew(maps, scratch)
}

/// The part of [`refresh`] that few packets need.
#[inline(never)]
fn renew<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    let revision = maps.revision();
    scratch.reply = scratch.after.reversed();
    if scratch.entry.revision != revision {
        if scratch.entry.flags & CtFlags::HAIRPIN == 0 {
            // A reply carries the opener's tuple reversed, before it is rewritten.
            scratch.opener = if scratch.entry.flags & CtFlags::REPLY == 0 {
                scratch.after
            } else {
                scratch.parsed.tuple.reversed()
            };
            let allowed = judge(maps, &scratch.opener).map_err(|denied| denied.reason)?;
            scratch.entry.egress_rule = allowed.egress_rule;
            scratch.entry.ingress_rule = allowed.ingress_rule;
        }
        scratch.entry.revision = revision;
    }
    if scratch.parsed.closes() {
        scratch.entry.flags |= CtFlags::CLOSING;
    }
    scratch.entry.last_seen = maps.now();
    opposite(scratch);
    if maps.flow(&scratch.reply, &mut scratch.known) {
        scratch.other.flags |= scratch.known.flags & CtFlags::CLOSING;
    }
    // A failure of either write leaves an older entry or none: the next packet tries again.
    maps.put_flow(&scratch.parsed.tuple, &scratch.entry);
    maps.put_flow(&scratch.reply, &scratch.other);
    Ok(())
}

/// Makes the other half of the entry. Its translation undoes this one's: the address that this
/// half rewrites is, seen from the other half, the one to restore.
#[inline(always)]
fn opposite<const N: usize>(scratch: &mut Scratch<N>) {
    let Scratch {
        parsed,
        entry,
        other,
        ..
    } = scratch;
    *other = *entry;
    other.flags = (entry.flags ^ CtFlags::REPLY) & !CtFlags::CLOSING;
    if entry.flags & CtFlags::NAT != 0 {
        if entry.flags & CtFlags::REPLY == 0 {
            other.nat_addr = parsed.tuple.dst;
            other.nat_port = parsed.tuple.dport;
        } else {
            other.nat_addr = parsed.tuple.src;
            other.nat_port = parsed.tuple.sport;
        }
    }
}

/// Tracks a new flow. With `nat` its backend is in the entry's `nat_addr` and `nat_port`.
///
/// # Errors
/// Who denied it; [`Reason::TupleInUse`] if replies could not be told from another flow's;
/// [`Reason::ConntrackFull`] if the table does not take it.
#[inline(always)]
pub(crate) fn track<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
    nat: bool,
) -> Result<(), Reason> {
    let entry = &mut scratch.entry;
    entry.last_seen = maps.now();
    entry.revision = maps.revision();
    entry.egress_rule = RULE_NONE;
    entry.ingress_rule = RULE_NONE;
    entry.flags = 0;
    entry.pad = 0;
    if nat {
        entry.flags = CtFlags::NAT;
        if entry.nat_addr == scratch.parsed.tuple.src {
            entry.flags |= CtFlags::HAIRPIN;
        }
    } else {
        entry.nat_addr = [0; N];
        entry.nat_port = [0; 2];
    }
    translate(&scratch.parsed.tuple, entry, &mut scratch.after);
    if entry.flags & CtFlags::HAIRPIN == 0 {
        let allowed = judge(maps, &scratch.after).map_err(|denied| denied.reason)?;
        entry.egress_rule = allowed.egress_rule;
        entry.ingress_rule = allowed.ingress_rule;
    }
    scratch.reply = scratch.after.reversed();
    opposite(scratch);
    if find(maps, &scratch.reply, &mut scratch.known) {
        let owner = &scratch.known;
        let theirs = owner.flags & (CtFlags::NAT | CtFlags::CLOSING) == CtFlags::NAT;
        if theirs
            && (owner.nat_addr != scratch.other.nat_addr
                || owner.nat_port != scratch.other.nat_port)
        {
            return Err(Reason::TupleInUse);
        }
    }
    if maps.put_flow(&scratch.parsed.tuple, &scratch.entry)
        && maps.put_flow(&scratch.reply, &scratch.other)
    {
        Ok(())
    } else {
        Err(Reason::ConntrackFull)
    }
}
