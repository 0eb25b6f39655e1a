//! What the host's stack sends to a Pod: the egress hook of its veth's host side. Packets between
//! Pods of one node do not come this way, unless redirection is turned off; those that do have
//! been judged and rewritten by `from_pod`, which the flow's entries tell (a mark on the packet
//! could be another's).

use hachi_abi::{CtFlags, PeerFlags, Reason};

use crate::{
    Outcome,
    begin::begin,
    conntrack::{alive, is_current, renew, translate},
    family::Family,
    icmp,
    judge::class,
    open,
    parse::{Kind, note_fragment},
    rewrite,
    scratch::Scratch,
    traits::{Maps, Packet},
};

/// Decides about a packet of the family on its way into a Pod.
#[inline(always)]
pub fn to_pod<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Outcome {
    if let Err(reason) = begin::<N, F, P, M>(packet, maps, scratch) {
        return Outcome::Drop(reason);
    }
    match decide::<N, F, P, M>(packet, maps, scratch) {
        Ok(()) => Outcome::Pass(Reason::DeliveredFromStack),
        Err(reason) => Outcome::Drop(reason),
    }
}

#[inline(always)]
fn decide<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    if scratch.parsed.kind == Kind::Link && is_from_link::<N, F, M>(maps, scratch) {
        return Ok(());
    }
    note_fragment(maps, &scratch.parsed);
    match maps.endpoint(&scratch.parsed.tuple.dst) {
        Some(own) if own.ifindex == packet.ifindex() => {}
        Some(_) => return Err(Reason::UnknownEndpoint),
        None => return group::<N, F, M>(maps, scratch),
    }
    scratch.fresh = 0;
    receive::<N, F, P, M>(packet, maps, scratch)
}

/// Lets a packet to a Pod of this node pass, as its flow and policy say; rewrites its source if a
/// Service stands there for it.
///
/// [`Scratch::fresh`] must be set.
///
/// # Errors
/// The reason to drop it.
#[inline(always)]
pub(crate) fn receive<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    const ANSWER: u8 = CtFlags::NAT | CtFlags::REPLY;
    if scratch.parsed.kind == Kind::IcmpError {
        return icmp::error::<N, F, P, M>(packet, maps, scratch, false);
    }
    // What was rewritten already has the tuple that another flow may begin with.
    let known = !scratch.parsed.opens()
        && maps.flow(&scratch.parsed.tuple, &mut scratch.entry)
        && (scratch.fresh != 0 || scratch.entry.flags & ANSWER != CtFlags::NAT);
    if known {
        let Scratch {
            parsed,
            entry,
            after,
            ..
        } = scratch;
        translate(&parsed.tuple, entry, after);
    }
    if !known || !is_current(maps, scratch) {
        scratch.now = maps.now();
        if !known || !alive(&scratch.entry, scratch.parsed.tuple.proto, scratch.now) {
            open::to_pod(maps, scratch)?;
            if scratch.fresh == 0 {
                return Ok(());
            }
        } else {
            renew(maps, scratch)?;
        }
    }
    if scratch.entry.flags & CtFlags::NAT != 0 {
        rewrite::apply::<N, F, P>(packet, scratch)?;
    }
    Ok(())
}

/// Whether discovery is the node's own. The hop limit of 255 says so; that of 1 which listener
/// discovery has may be what others' hops have left of a larger one, and there the source tells:
/// nobody forwards from an address of the link, nor from none (RFC 4291 sections 2.5.2 and 2.5.6).
#[inline(always)]
fn is_from_link<const N: usize, F: Family<N>, M: Maps<N>>(maps: &M, scratch: &Scratch<N>) -> bool {
    let source = &scratch.parsed.tuple.src;
    !F::is_listener(scratch.parsed.icmp_type)
        || F::is_link_scope(source)
        || F::is_unspecified(source)
        || class(maps, source).flags & PeerFlags::LOCAL_NODE != 0
}

/// To a group the node itself may send, and nobody else: which Pod it would reach, and so whose
/// policy to ask, the packet does not tell.
#[inline(always)]
fn group<const N: usize, F: Family<N>, M: Maps<N>>(
    maps: &M,
    scratch: &Scratch<N>,
) -> Result<(), Reason> {
    let tuple = &scratch.parsed.tuple;
    if !F::is_multicast(&tuple.dst) {
        return Err(Reason::UnknownEndpoint);
    }
    if F::is_link_scope(&tuple.src) || class(maps, &tuple.src).flags & PeerFlags::LOCAL_NODE != 0 {
        Ok(())
    } else {
        Err(Reason::PolicyIngress)
    }
}
