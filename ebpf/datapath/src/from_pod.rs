//! What a Pod sends: the ingress hook of its veth's host side.

use hachi_abi::{ConfigFlags, CtFlags, Reason};

use crate::{
    Outcome,
    family::Family,
    flow, icmp,
    parse::{Kind, parse},
    scratch::Scratch,
    service,
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
    match decide::<N, F, P, M>(packet, maps, scratch, source) {
        Ok(outcome) => outcome,
        Err(reason) => Outcome::Drop(reason),
    }
}

#[inline(always)]
fn decide<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
    source: &[u8; 6],
) -> Result<Outcome, Reason> {
    if maps.revision() == 0 {
        return Err(Reason::NotConfigured);
    }
    if packet.vlan_present() {
        return Err(Reason::UnsupportedLink);
    }
    parse::<N, F, P, M>(packet, maps, &mut scratch.parsed)?;
    if scratch.parsed.kind == Kind::Link {
        // Neighbours and groups of the link between the Pod and its host: the stack's business,
        // and the only packets that come from link-local addresses.
        return Ok(Outcome::Pass(Reason::PassedToStack));
    }
    match maps.endpoint(&scratch.parsed.tuple.src) {
        Some(own) if own.ifindex == packet.ifindex() && own.mac == *source => {}
        Some(_) | None => return Err(Reason::SpoofedSource),
    }
    if scratch.parsed.kind == Kind::IcmpError {
        icmp::error::<N, F, P, M>(packet, maps, scratch)?;
        scratch.after.dst = scratch.parsed.tuple.dst;
    } else {
        if !scratch.parsed.opens() && flow::find(maps, &scratch.parsed.tuple, &mut scratch.entry) {
            flow::refresh(maps, scratch)?;
        } else {
            open(maps, scratch)?;
        }
        if scratch.entry.flags & CtFlags::NAT != 0 {
            flow::apply::<N, F, P>(packet, scratch)?;
        }
    }
    deliver(packet, maps, &scratch.after.dst)
}

/// A new flow, which policy must allow.
#[inline(never)]
fn open<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    let nat = service::choose(maps, scratch)?;
    flow::track(maps, scratch, nat)
}

/// To a Pod of this node directly, to anything else by the host's stack.
#[inline(always)]
fn deliver<const N: usize, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    destination: &[u8; N],
) -> Result<Outcome, Reason> {
    if maps.flags() & ConfigFlags::REDIRECT_PEER == 0 {
        return Ok(Outcome::Pass(Reason::PassedToStack));
    }
    let Some(receiver) = maps.endpoint(destination) else {
        return Ok(Outcome::Pass(Reason::PassedToStack));
    };
    let mut macs = [0; 12];
    macs[..6].copy_from_slice(&receiver.mac);
    macs[6..].copy_from_slice(&receiver.host_mac);
    if !packet.store(0, &macs) {
        return Err(Reason::RewriteFailed);
    }
    Ok(Outcome::RedirectPeer {
        ifindex: receiver.ifindex,
    })
}
