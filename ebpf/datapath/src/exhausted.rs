//! A flow that finds no port under which it could leave the node: who asked is told at once, as if
//! the other end had refused, instead of trying until it gives up.
//!
//! ```text
//! a Pod              P:p -> W:w   the answer W:w -> P:p goes in by the device that it was to leave by
//! the node           N:n -> B:b   is N:n -> V:v again, and the answer V:v -> N:n goes the way of answers
//! a client outside   C:c -> B:b   is C:c -> V:v again, and the answer V:v -> C:c goes out by the device
//! ```
//! What the node sends to others than Services is dropped: its tuple is the one that another has, whose
//! the answer would be.

use hachi_abi::Reason;

use crate::{
    conntrack,
    family::Family,
    host, reject, rewrite,
    scratch::Scratch,
    traits::{Maps, Packet},
};

/// Where the answer goes.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is none to be given; the packet must be dropped.
    None = 0,
    /// In by the device that the packet was to leave by.
    Inward = 1,
    /// Out by that device, to the neighbour that routes name.
    Outward = 2,
    /// Out by the far side of the node's own way to Services.
    Host = 3,
}

/// Makes a packet that [`crate::to_net`] has dropped as [`Reason::NatExhausted`] its own refusal, with
/// what is known of it in `scratch`.
#[inline(always)]
pub fn refuse<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Refusal {
    let inward = maps.endpoint(&scratch.parsed.tuple.src).is_some();
    if !inward && (packet.is_own() || original::<N, F, P, M>(packet, maps, scratch).is_err()) {
        return Refusal::None;
    }
    if !reject::answer::<N, F, P>(packet, scratch) {
        return Refusal::None;
    }
    if inward {
        Refusal::Inward
    } else if host::is_node(maps, &scratch.parsed.tuple.src) {
        Refusal::Host
    } else {
        Refusal::Outward
    }
}

/// Makes the packet what the client outside has sent.
///
/// # Errors
/// [`Reason::NatExhausted`] if nobody knows, [`Reason::RewriteFailed`].
#[inline(always)]
fn original<const N: usize, F: Family<N>, P: Packet, M: Maps<N>>(
    packet: &mut P,
    maps: &M,
    scratch: &mut Scratch<N>,
) -> Result<(), Reason> {
    {
        let Scratch {
            parsed,
            after,
            reply,
            known,
            ..
        } = scratch;
        *reply = parsed.tuple.reversed();
        if !maps.flow(reply, known) {
            return Err(Reason::NatExhausted);
        }
        conntrack::translate(reply, known, after);
        *after = after.reversed();
    }
    rewrite::apply::<N, F, P>(packet, scratch)?;
    scratch.parsed.tuple = scratch.after;
    Ok(())
}
