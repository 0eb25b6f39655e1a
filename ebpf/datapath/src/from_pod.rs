//! What a Pod sends: the ingress hook of its veth's host side.

use hachi_abi::{CtFlags, PeerFlags, Reason, Scope};

use crate::{
    Outcome,
    begin::begin,
    conntrack::{alive, is_captured, is_current, renew, translate},
    deliver::{deliver, outward},
    family::Family,
    host, icmp,
    judge::class,
    open,
    parse::{Kind, note_fragment},
    reject, rewrite,
    scratch::Scratch,
    traits::{Maps, Packet},
};

/// Decides about a packet of the family that a Pod has sent. `source`: its source MAC address.
#[inline(always)]
pub fn from_pod<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
    source: &[u8; 6],
) -> Outcome {
    if let Err(reason) = begin::<N, F, P, M>(packet, maps, scratch) {
        return Outcome::Drop(reason);
    }
    scratch.scope = Scope::INTERNAL.into();
    scratch.node = 0;
    decide::<N, F, P, M>(packet, maps, scratch, source).unwrap_or_else(Outcome::Drop)
}

#[inline(always)]
fn decide<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
    source: &[u8; 6],
) -> Result<Outcome, Reason> {
    if scratch.parsed.kind == Kind::Link {
        return link::<N, F, P, M>(packet, maps, scratch, source);
    }
    owned(packet, maps, scratch, source)?;
    note_fragment(maps, &scratch.parsed);
    if scratch.parsed.kind == Kind::IcmpError {
        icmp::error::<N, F, P, M>(packet, maps, scratch, true)?;
    } else {
        if let Err(reason) = track(maps, scratch) {
            return Ok(reject::outcome::<N, F, P>(packet, scratch, reason));
        }
        if scratch.entry.flags & CtFlags::NAT != 0
            && !(is_answer(scratch) && maps.endpoint(&scratch.after.dst).is_none())
        {
            rewrite::apply::<N, F, P>(packet, scratch)?;
        }
    }
    let dst = scratch.after.dst;
    if maps.endpoint(&dst).is_some() {
        return deliver(packet, maps, &dst);
    }
    if is_answer(scratch) && host::is_node(maps, &dst) {
        return Ok(host::inward(maps));
    }
    Ok(outward::<N, F, P, M>(packet, maps, scratch, dst, true))
}

/// Whether the packet answers through a Service. If the client is outside, or the node itself, `to_net`
/// or `to_host` gives it the Service's address: from that, which may be the node's own, the host's stack
/// would not take it.
#[inline(always)]
fn is_answer<const N: usize>(scratch: &Scratch<N>) -> bool {
    const ANSWER: u8 = CtFlags::NAT | CtFlags::REPLY;
    scratch.entry.flags & (ANSWER | CtFlags::HAIRPIN) == ANSWER
}

/// Finds the packet's flow, or opens it; leaves what the packet's tuple becomes in `after`.
#[inline(always)]
pub(crate) fn track<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    // A SYN opens afresh, whatever an earlier flow of the same ports left.
    let known = !scratch.parsed.opens() && maps.flow(&scratch.parsed.tuple, &mut scratch.entry);
    if known {
        let Scratch {
            parsed,
            entry,
            after,
            ..
        } = scratch;
        translate(&parsed.tuple, entry, after);
        if is_current(maps, scratch) {
            return Ok(());
        }
    }
    scratch.now = maps.now();
    if known
        && alive(&scratch.entry, scratch.parsed.tuple.proto, scratch.now)
        && !is_captured(maps, scratch)
    {
        return renew(maps, scratch);
    }
    open::from_pod(maps, scratch)
}

/// A Pod sends from its own address and MAC address, through its own interface.
#[inline(always)]
fn owned<const N: usize, P: Packet, M: Maps<N>>(
    packet: &P,
    maps: &M,
    scratch: &Scratch<N>,
    source: &[u8; 6],
) -> Result<(), Reason> {
    match maps.endpoint(&scratch.parsed.tuple.src) {
        Some(own) if own.ifindex == packet.ifindex() && own.mac == *source => Ok(()),
        Some(_) | None => Err(Reason::SpoofedSource),
    }
}

/// Neighbours and groups of the link between the Pod and its host are the stack's business, and
/// theirs are the only packets from link-local addresses. What routers say, and what is meant for
/// anyone but this node, a Pod may not send: it would reach its neighbour unchanged.
#[inline(always)]
fn link<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &P,
    maps: &M,
    scratch: &Scratch<N>,
    source: &[u8; 6],
) -> Result<Outcome, Reason> {
    let tuple = &scratch.parsed.tuple;
    if !F::is_host_link(scratch.parsed.icmp_type) {
        return Err(Reason::UnsupportedLink);
    }
    if !F::is_link_scope(&tuple.dst) && class(maps, &tuple.dst).flags & PeerFlags::LOCAL_NODE == 0 {
        return Err(Reason::UnsupportedLink);
    }
    let anonymous = F::is_unspecified(&tuple.src)
        || (F::is_link_scope(&tuple.src) && !F::is_multicast(&tuple.src));
    if !anonymous {
        owned(packet, maps, scratch, source)?;
    }
    Ok(Outcome::Pass(Reason::PassedToStack))
}
