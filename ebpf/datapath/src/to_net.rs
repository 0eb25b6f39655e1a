//! What leaves the node by an uplink: its egress hook. Here, and nowhere before, sources change:
//!
//! ```text
//! answer of a backend       tracked as a reply  ->  from the Service's address
//! a Pod, to the outside     masquerade          ->  from the node's address
//! a client, to a backend of another node        ->  from the node's address
//! the node itself           its tuple is claimed, so that no Pod is given it
//!                           to a Service: to `from_host`, which gives it a backend
//! ```
//!
//! So it is right whichever way the packet came, by the host's stack or by a redirect, and the
//! stack never meets its own address as somebody else's source.

use hachi_abi::{ConfigFlags, CtFlags, Reason};

use crate::{
    Outcome,
    conntrack::{alive, is_current, renew, translate},
    ethernet::at,
    family::Family,
    host, icmp, nat, overlay,
    parse::{Kind, has_ports, note_fragment, parse},
    rewrite,
    scratch::{Event, Scratch},
    traits::{Maps, Packet},
};

/// Decides about a packet of the family on its way out of the node.
#[inline(always)]
pub fn to_net<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Outcome {
    const PASS: Outcome = Outcome::Pass(Reason::PassedToNetwork);
    scratch.event = Event::Unknown;
    let Some(address) = maps.uplink(packet.ifindex()) else {
        return PASS;
    };
    // What cannot be read is not of a Pod: `from_pod` has dropped it, unless it is a fragment whose
    // first one was forgotten since. It must not show a Pod's address to the world.
    if let Err(reason) = parse::<N, F, P, M>(packet, maps, &mut scratch.parsed) {
        return match packet.load::<N>(at(F::SOURCE)) {
            Some(source) if maps.endpoint(&source).is_some() => Outcome::Drop(reason),
            _ => PASS,
        };
    }
    scratch.event = Event::Parsed;
    if scratch.parsed.tuple.src == address && overlay::carries(maps, &scratch.parsed) {
        // Of the VXLAN device: what is inside has been seen, and nobody else has this tuple.
        return PASS;
    }
    scratch.address = address;
    decided::<N, F, P, M>(packet, maps, scratch)
}

/// Decides about a packet that has been read; `scratch.address` is the node's on the device.
#[inline(always)]
pub(crate) fn decided<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Outcome {
    const PASS: Outcome = Outcome::Pass(Reason::PassedToNetwork);
    // Whose it is was asked where it came in.
    note_fragment(maps, &scratch.parsed);
    match decide::<N, F, P, M>(packet, maps, scratch) {
        Ok(()) if scratch.node != 0 => Outcome::Out {
            ifindex: maps.host().near,
        },
        Ok(()) if scratch.translated != 0 => Outcome::Pass(Reason::Translated),
        Ok(()) => PASS,
        Err(reason) => Outcome::Drop(reason),
    }
}

#[inline(always)]
fn decide<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    scratch.translated = 0;
    scratch.node = 0;
    scratch.after = scratch.parsed.tuple;
    let dst = &scratch.parsed.tuple.dst;
    if scratch.parsed.kind == Kind::Link || F::is_multicast(dst) || F::is_link_scope(dst) {
        return Ok(());
    }
    if scratch.parsed.kind == Kind::IcmpError {
        let ports = icmp::inside::<N, F, P>(packet, scratch);
        if error::<N, F, M>(maps, scratch, ports)? {
            // The router that reports may be the next one on this way, and takes nothing from others
            // in its own name.
            icmp::rewrite_ends::<N, F, P>(packet, scratch, ports, true)?;
        }
        return Ok(());
    }
    source::<N, F, M>(maps, scratch, packet.is_own())?;
    if scratch.after == scratch.parsed.tuple {
        return Ok(());
    }
    rewrite::apply::<N, F, P>(packet, scratch)
}

/// Finds what the packet leaves as, and leaves that in `after`.
#[inline(never)]
fn source<const N: usize, F: Family<N>, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
    own: bool,
) -> Result<(), Reason> {
    if !own {
        nat::follow::<N, F, M>(maps, scratch);
        if scratch.translated != 0 {
            return Ok(());
        }
    }
    if has_ports(scratch.parsed.tuple.proto) {
        restore(maps, scratch, own)?;
        if scratch.translated != 0 || scratch.node != 0 {
            return Ok(());
        }
    }
    if own {
        if scratch.parsed.tuple.src == scratch.address {
            nat::own::<N, F, M>(maps, scratch)?;
        }
        return Ok(());
    }
    if needed(maps, scratch) {
        if overlay::carries(maps, &scratch.parsed) {
            // Under the node's address it would be taken for a tunnel packet of the node's.
            return Err(Reason::TunnelSource);
        }
        nat::allocate::<N, F, M>(maps, scratch)?;
    }
    Ok(())
}

/// The answer of a Service's backend becomes the Service's. `own`: the node itself has sent the packet;
/// then one to a Service is left to `from_host`, which [`Scratch::node`] tells.
#[inline(never)]
pub(crate) fn restore<const N: usize, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
    own: bool,
) -> Result<(), Reason> {
    const ANSWER: u8 = CtFlags::NAT | CtFlags::REPLY;
    let found = !scratch.parsed.opens() && maps.flow(&scratch.parsed.tuple, &mut scratch.entry);
    let answers = found && scratch.entry.flags & (ANSWER | CtFlags::HAIRPIN) == ANSWER;
    if !own && !answers {
        return Ok(());
    }
    scratch.now = maps.now();
    let known = found && alive(&scratch.entry, scratch.parsed.tuple.proto, scratch.now);
    if own && !(known && scratch.entry.flags & CtFlags::REPLY != 0) {
        let captured = if known {
            scratch.entry.flags & CtFlags::NAT != 0 && maps.host().near != 0
        } else {
            host::is_asked(maps, scratch)
        };
        scratch.node = u32::from(captured);
        return Ok(());
    }
    if !known || !answers {
        return Ok(());
    }
    {
        let Scratch {
            parsed,
            entry,
            after,
            translated,
            ..
        } = scratch;
        translate(&parsed.tuple, entry, after);
        *translated = 1;
    }
    if is_current(maps, scratch) {
        return Ok(());
    }
    renew(maps, scratch)
}

/// Whether a packet of no translated flow must leave with the node's address.
#[inline(never)]
fn needed<const N: usize, M: Maps<N>>(maps: &M, scratch: &mut Scratch<N>) -> bool {
    const ANSWER: u8 = CtFlags::NAT | CtFlags::REPLY;
    let Scratch {
        parsed,
        reply,
        known,
        now,
        ..
    } = scratch;
    let tuple = &parsed.tuple;
    *now = maps.now();
    if maps.endpoint(&tuple.src).is_some() {
        if maps.flags() & ConfigFlags::MASQUERADE == 0 || maps.is_exempt(&tuple.dst) {
            return false;
        }
        // Who was reached at its own address answers from there.
        return !(maps.flow(tuple, known)
            && known.flags & CtFlags::REPLY != 0
            && alive(known, tuple.proto, *now));
    }
    // A client's packet that `from_net` has sent on to a backend, which must answer this node.
    *reply = tuple.reversed();
    has_ports(tuple.proto)
        && maps.flow(reply, known)
        && known.flags & (ANSWER | CtFlags::HAIRPIN) == ANSWER
        && alive(known, tuple.proto, *now)
}

/// Finds what becomes of the packet inside an ICMP error; `false` if nothing does.
#[inline(never)]
fn error<const N: usize, F: Family<N>, M: Maps<N>>(
    maps: &M,
    scratch: &mut Scratch<N>,
    ports: usize,
) -> Result<bool, Reason> {
    if ports != icmp::INVALID && scratch.parsed.tuple.dst == scratch.reply.dst {
        nat::follow_error::<N, F, M>(maps, scratch);
        if scratch.translated == 0 && icmp::restore(maps, scratch, CtFlags::REPLY)? {
            scratch.translated = 1;
        }
        if scratch.translated != 0 {
            return Ok(true);
        }
        if icmp::is_tracked(maps, scratch) {
            return Ok(false);
        }
    }
    // Nobody outside would know what to do with a Pod's address.
    let pod = maps.endpoint(&scratch.parsed.tuple.src).is_some();
    if pod && needed(maps, scratch) {
        return Err(Reason::IcmpUnrelated);
    }
    Ok(false)
}
