//! What arrives on an uplink: its ingress hook. Here destinations change, and sources never do:
//!
//! ```text
//! answer to a translated flow     -> to whom it is for: a Pod, or a client's address
//! to a Service of scope EXTERNAL  -> to its backend
//! then: a Pod of this node?  judged, and straight into its namespace
//!       another node's?      forwarded; `to_net` gives it this node's address
//!       else                 the host's stack
//! ```
//!
//! What the stack is left to do it could do all by itself, only slower: `to_pod` judges what it
//! forwards to Pods, `to_net` translates what it sends out.

use hachi_abi::{ConfigFlags, CtFlags, PeerFlags, Reason, Scope};

use crate::{
    Outcome,
    begin::begin,
    conntrack::{alive, is_current, renew, translate},
    deliver::{into, outward},
    family::Family,
    host, icmp, nat, open,
    overlay::{self, Arrival},
    parse::{Kind, has_ports, note_fragment},
    reject, rewrite,
    scratch::Scratch,
    to_pod::receive,
    traits::{Maps, Packet},
};

const PASS: Outcome = Outcome::Pass(Reason::PassedToStack);

/// What is left in [`Scratch::backends`] of a packet that goes on to a backend, and of one that comes
/// from another node's.
const ASKED: u32 = 1;
const ANSWER: u32 = 2;

/// Decides about a packet of the family that an uplink has received.
#[inline(always)]
pub fn from_net<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Outcome {
    // The node must stay reachable, whatever there is of an agent. Pods are guarded by `to_pod`,
    // which also drops what cannot be read.
    if begin::<N, F, P, M>(packet, maps, scratch).is_err() {
        return PASS;
    }
    match overlay::arrival(maps, &scratch.parsed, packet.ifindex()) {
        Arrival::Other => decided::<N, F, P, M>(packet, maps, scratch),
        Arrival::Carrier => PASS,
        Arrival::Forged => Outcome::Drop(Reason::SpoofedSource),
    }
}

/// Decides about a packet that has been read, and may come from where it says.
#[inline(always)]
pub(crate) fn decided<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Outcome {
    scratch.scope = Scope::EXTERNAL.into();
    scratch.node = 0;
    decide::<N, F, P, M>(packet, maps, scratch).unwrap_or_else(Outcome::Drop)
}

#[inline(always)]
fn decide<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<Outcome, Reason> {
    // A Pod of this node is behind its veth pair, and nowhere else.
    if maps.endpoint(&scratch.parsed.tuple.src).is_some() {
        return Err(Reason::SpoofedSource);
    }
    let dst = &scratch.parsed.tuple.dst;
    if scratch.parsed.kind == Kind::Link || F::is_multicast(dst) || F::is_link_scope(dst) {
        return Ok(PASS);
    }
    // Policy trusts the node, so nobody else may pass for it. (The stack refuses that too, but for
    // IPv4 alone, and not all packets go there.)
    if let Some(peer) = maps.peer(&scratch.parsed.tuple.src)
        && peer.flags & PeerFlags::LOCAL_NODE != 0
    {
        return Err(Reason::SpoofedSource);
    }
    note_fragment(maps, &scratch.parsed);
    scratch.after = scratch.parsed.tuple;
    scratch.backends = 0;
    scratch.fresh = 1;
    let done = if scratch.parsed.kind == Kind::IcmpError {
        reported::<N, F, P, M>(packet, maps, scratch)
    } else {
        translated::<N, F, P, M>(packet, maps, scratch)
    };
    if let Err(reason) = done {
        return Ok(reject::outcome::<N, F, P>(packet, scratch, reason));
    }
    // One way on, so that the verifier walks it once.
    let Some(receiver) = maps.endpoint(&scratch.parsed.tuple.dst) else {
        if scratch.backends == 0 {
            return Ok(PASS);
        }
        let dst = scratch.parsed.tuple.dst;
        if scratch.backends == ANSWER && host::is_node(maps, &dst) {
            return Ok(host::inward(maps));
        }
        return Ok(outward::<N, F, P, M>(packet, maps, scratch, dst, false));
    };
    if maps.flags() & ConfigFlags::REDIRECT_PEER == 0 {
        return Ok(PASS);
    }
    if scratch.backends == 0 {
        receive::<N, F, P, M>(packet, maps, scratch)?;
    }
    into(packet, &receiver)
}

/// Translates an ICMP error like the packet inside it; leaves in `backends` whether it goes on to
/// somebody else's end of a flow that this node stands between.
#[inline(never)]
fn reported<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    let ports = icmp::inside::<N, F, P>(packet, scratch);
    if !error::<N, F, M>(maps, scratch, ports)? {
        return Ok(());
    }
    scratch.fresh = 0;
    icmp::rewrite_ends::<N, F, P>(packet, scratch, ports, false)?;
    if maps.endpoint(&scratch.parsed.tuple.dst).is_none() {
        scratch.backends = if is_answer(maps, scratch) {
            ANSWER
        } else {
            ASKED
        };
    }
    Ok(())
}

/// Translates the destination of a packet; leaves in `backends` whether it is of a flow that this
/// node stands between.
#[inline(never)]
fn translated<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    nat::follow::<N, F, M>(maps, scratch);
    if maps.endpoint(&scratch.after.dst).is_none() && has_ports(scratch.parsed.tuple.proto) {
        between(maps, scratch)?;
    }
    if scratch.after == scratch.parsed.tuple {
        return Ok(());
    }
    scratch.fresh = 0;
    rewrite::apply::<N, F, P>(packet, scratch)?;
    scratch.parsed.tuple = scratch.after;
    Ok(())
}

/// Finds what becomes of the packet inside an ICMP error; `false` if nothing does here.
#[inline(never)]
fn error<const N: usize, F: Family<N>, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
    ports: usize,
) -> Result<bool, Reason> {
    if ports == icmp::INVALID || scratch.parsed.tuple.dst != scratch.reply.dst {
        return Ok(false);
    }
    nat::follow_error::<N, F, M>(maps, scratch);
    if scratch.translated != 0 {
        return Ok(true);
    }
    // What is for a Pod is its own affair.
    if maps.endpoint(&scratch.parsed.tuple.dst).is_some() {
        return Ok(false);
    }
    icmp::restore(maps, scratch, 0)
}

/// Finds or opens the flow of a packet that goes through this node to another, or to a Service;
/// leaves what becomes of it in `after`, and in `backends` whether it is such a packet at all.
#[inline(never)]
fn between<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    if scratch.translated != 0 {
        // The answer of another node's backend: `to_net` gives it the Service's address.
        if is_answer(maps, scratch) {
            scratch.backends = ANSWER;
        }
        return Ok(());
    }
    track(maps, scratch)?;
    let mine = scratch.entry.flags & (CtFlags::NAT | CtFlags::REPLY) == CtFlags::NAT;
    if !mine {
        scratch.after = scratch.parsed.tuple;
    }
    scratch.backends = if mine { ASKED } else { 0 };
    Ok(())
}

/// Whether what `after` says is of a backend, to its client.
#[inline(never)]
fn is_answer<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> bool {
    const REPLY: u8 = CtFlags::NAT | CtFlags::REPLY;
    let Scratch { after, entry, .. } = scratch;
    maps.flow(after, entry) && entry.flags & REPLY == REPLY
}

/// Finds the flow of a packet that is for no Pod of this node, or opens one if a Service has its
/// destination. The entry of what is nobody's has no flags.
#[inline(always)]
fn track<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> Result<(), Reason> {
    // A SYN opens afresh, whatever an earlier flow of the same ports left.
    if !scratch.parsed.opens() && maps.flow(&scratch.parsed.tuple, &mut scratch.entry) {
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
        scratch.now = maps.now();
        if alive(&scratch.entry, scratch.parsed.tuple.proto, scratch.now) {
            return renew(maps, scratch);
        }
    } else {
        scratch.now = maps.now();
    }
    open::from_net(maps, scratch)
}
