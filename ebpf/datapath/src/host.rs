//! The node's own packets to Services, where no socket program has given them a backend: SCTP, sockets
//! that no cgroup program sees, and all of them where socket load balancing is off.
//!
//! ```text
//! uplink, egress    to_net ┐ captured                            ┌> Pod of this node
//! loopback, egress  to_self ┴─> near ══ far ─[from_host]─ DNAT ──┼> other node: by tunnel or uplink (to_net)
//!                                                                └> the node itself: its stack
//! node's stack <─────────────── near ══ far <─[to_host]── source: the Service <── what answers
//! ```
//! The stack has routed such a packet to wherever the Service's address would be. It is handed to one
//! side of a veth pair and comes out of the other as if a Pod had sent it: there it is translated, judged
//! and sent on. Answers go back through the pair, whose near side takes any source (`accept_local`): on
//! the interface that they came by the stack would take the Service's address for a forged one.

use hachi_abi::{CtFlags, PeerFlags, Reason, Scope, proto};

use crate::{
    Outcome,
    begin::{begin, read},
    conntrack::alive,
    deliver::{deliver, outward},
    family::Family,
    from_pod, icmp,
    judge::class,
    parse::{Kind, has_ports, note_fragment},
    reject, rewrite,
    rewrite::done,
    scratch::Scratch,
    service, to_net,
    traits::{Maps, Packet},
};

const STACK: Outcome = Outcome::Pass(Reason::PassedToStack);

/// Whether an address is one of the node's own.
#[inline(always)]
pub(crate) fn is_node<const N: usize, M: Maps<N>>(maps: &M, address: &[u8; N]) -> bool {
    class(maps, address).flags & PeerFlags::LOCAL_NODE != 0
}

/// To the node's stack by way of [`to_host`].
#[inline(always)]
pub(crate) fn inward<const N: usize, M: Maps<N>>(maps: &M) -> Outcome {
    match maps.host().far {
        0 => STACK,
        ifindex => Outcome::Out { ifindex },
    }
}

/// Whether a Service has the destination of a packet of no flow. Of a connection's packets but the first
/// knows.
#[inline(never)]
pub(crate) fn is_asked<const N: usize, M: Maps<N>>(maps: &M, scratch: &Scratch<N>) -> bool {
    let tuple = &scratch.parsed.tuple;
    (tuple.proto != proto::TCP || scratch.parsed.opens())
        && maps.host().near != 0
        && (service::frontend(maps, tuple, Scope::INTERNAL).is_some()
            || service::is_address(maps, &tuple.dst))
}

/// Decides about a packet of the family that the node sends to itself.
#[inline(always)]
pub fn to_self<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Outcome {
    let near = maps.host().near;
    if near == 0 || read::<N, F, P, M>(packet, maps, scratch).is_err() {
        return STACK;
    }
    note_fragment(maps, &scratch.parsed);
    if scratch.parsed.kind == Kind::IcmpError {
        // The stack's own, about what it was to send on for `from_host`.
        return match reported::<N, F, P, M>(packet, maps, scratch) {
            Ok(()) => STACK,
            Err(reason) => Outcome::Drop(reason),
        };
    }
    if has_ports(scratch.parsed.tuple.proto) && is_captured(maps, scratch) {
        Outcome::Out { ifindex: near }
    } else {
        STACK
    }
}

/// Whether a packet that the node sends to itself is to a Service, or is the answer of a backend that
/// the node is itself.
#[inline(never)]
fn is_captured<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> bool {
    let known =
        !scratch.parsed.opens() && maps.flow(&scratch.parsed.tuple, &mut scratch.entry) && {
            scratch.now = maps.now();
            alive(&scratch.entry, scratch.parsed.tuple.proto, scratch.now)
        };
    if known {
        scratch.entry.flags & CtFlags::NAT != 0
    } else {
        is_asked(maps, scratch)
    }
}

/// Translates an ICMP error about what this node has sent to a backend.
#[inline(never)]
fn reported<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    scratch.now = maps.now();
    let ports = icmp::inside::<N, F, P>(packet, scratch);
    if ports != icmp::INVALID
        && scratch.parsed.tuple.dst == scratch.reply.dst
        && icmp::restore(maps, scratch, CtFlags::REPLY)?
    {
        icmp::rewrite_ends::<N, F, P>(packet, scratch, ports, false)?;
    }
    Ok(())
}

/// Decides about a packet of the family that the node sends to a Service, or a backend that is the node
/// itself to the node.
#[inline(always)]
pub fn from_host<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Outcome {
    if let Err(reason) = begin::<N, F, P, M>(packet, maps, scratch) {
        return Outcome::Drop(reason);
    }
    if !has_ports(scratch.parsed.tuple.proto) {
        // The stack has nothing else to say to the device.
        return Outcome::Drop(Reason::UnsupportedLink);
    }
    scratch.scope = Scope::INTERNAL.into();
    scratch.node = 1;
    decide::<N, F, P, M>(packet, maps, scratch).unwrap_or_else(Outcome::Drop)
}

#[inline(always)]
fn decide<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<Outcome, Reason> {
    note_fragment(maps, &scratch.parsed);
    if let Err(reason) = from_pod::track(maps, scratch) {
        return Ok(reject::outcome::<N, F, P>(packet, scratch, reason));
    }
    if scratch.entry.flags & CtFlags::REPLY != 0 {
        return Ok(inward(maps));
    }
    if scratch.entry.flags & CtFlags::NAT != 0 {
        rewrite::apply::<N, F, P>(packet, scratch)?;
    }
    let dst = scratch.after.dst;
    if maps.endpoint(&dst).is_some() {
        return deliver(packet, maps, &dst);
    }
    Ok(outward::<N, F, P, M>(packet, maps, scratch, dst, false))
}

/// Decides about a packet of the family on its way back to the node's stack.
#[inline(always)]
pub fn to_host<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Outcome {
    if let Err(reason) = read::<N, F, P, M>(packet, maps, scratch) {
        return Outcome::Drop(reason);
    }
    note_fragment(maps, &scratch.parsed);
    match back::<N, F, P, M>(packet, maps, scratch) {
        Ok(()) => STACK,
        Err(reason) => Outcome::Drop(reason),
    }
}

#[inline(always)]
fn back<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    // The redirect to this device has made the link's header part of what a device's sum is of.
    done(packet.store(0, &maps.host().mac, true))?;
    if scratch.parsed.kind == Kind::IcmpError {
        return reported::<N, F, P, M>(packet, maps, scratch);
    }
    scratch.translated = 0;
    scratch.after = scratch.parsed.tuple;
    if has_ports(scratch.parsed.tuple.proto) {
        to_net::restore(maps, scratch, false)?;
    }
    if scratch.after == scratch.parsed.tuple {
        return Ok(());
    }
    rewrite::apply::<N, F, P>(packet, scratch)
}
