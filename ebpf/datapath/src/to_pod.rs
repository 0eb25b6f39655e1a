//! What the host's stack sends to a Pod: the egress hook of its veth's host side. Packets between
//! Pods of one node do not come this way, unless redirection is turned off.

use hachi_abi::{CtFlags, Reason};

use crate::{
    Outcome,
    family::Family,
    flow, icmp,
    parse::{Kind, parse},
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
    if maps.revision() == 0 {
        return Err(Reason::NotConfigured);
    }
    parse::<N, F, P, M>(packet, maps, &mut scratch.parsed)?;
    if scratch.parsed.kind == Kind::Link {
        return Ok(());
    }
    match maps.endpoint(&scratch.parsed.tuple.dst) {
        Some(own) if own.ifindex == packet.ifindex() => {}
        Some(_) | None => return Err(Reason::UnknownEndpoint),
    }
    if scratch.parsed.kind == Kind::IcmpError {
        return icmp::error::<N, F, P, M>(packet, maps, scratch);
    }
    if !scratch.parsed.opens() && flow::find(maps, &scratch.parsed.tuple, &mut scratch.entry) {
        flow::refresh(maps, scratch)?;
        if scratch.entry.flags & CtFlags::NAT != 0 {
            flow::apply::<N, F, P>(packet, scratch)?;
        }
        return Ok(());
    }
    open(maps, scratch)
}

/// A new flow, which policy must allow, unless `from_pod` has judged and translated this very
/// packet and left it to the stack: then the flow's other half, as this packet's receiver answers,
/// is known and of this revision.
#[inline(never)]
fn open<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    scratch.reply = scratch.parsed.tuple.reversed();
    if flow::find(maps, &scratch.reply, &mut scratch.known)
        && scratch.known.flags & CtFlags::NAT != 0
        && scratch.known.revision == maps.revision()
    {
        return Ok(());
    }
    flow::track(maps, scratch, false)
}
