//! The eBPF entry points: they read the link's header, ask `hachi-datapath` to decide, count, and
//! turn the outcome into a return code in one exhaustive match. Maps are in [`maps`], the helpers
//! behind the datapath's traits in [`packet`] and [`tables`], log records in [`log`].
//!
//! Everything here loads on Linux 6.1: no kernel functions, bounded loops, helpers of 5.13 and
//! before.
#![no_std]
#![no_main]

mod log;
mod maps;
mod packet;
mod tables;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect_peer,
    macros::classifier,
    maps::PerCpuArray,
    programs::TcContext,
};
use hachi_abi::Reason;
use hachi_datapath::{Frame, Outcome, Packet as _, Scratch, V4, V6, frame};

use crate::{
    maps::{SCRATCH_V4, SCRATCH_V6},
    packet::Skb,
    tables::{Tables4, Tables6},
};

/// Packets that a Pod sends: tc ingress of its veth's host side.
#[classifier]
fn from_pod(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    let mut source = [0; 6];
    match frame(&skb, &mut source) {
        Frame::V4 => from_pod_v4(ctx.skb.skb, &source),
        Frame::V6 => from_pod_v6(ctx.skb.skb, &source),
        Frame::Decided(outcome) => decided(ctx.skb.skb, outcome),
    }
}

/// Packets that the host's stack sends to a Pod: tc egress of its veth's host side.
#[classifier]
fn to_pod(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    let mut source = [0; 6];
    match frame(&skb, &mut source) {
        Frame::V4 => to_pod_v4(ctx.skb.skb),
        Frame::V6 => to_pod_v6(ctx.skb.skb),
        Frame::Decided(outcome) => decided(ctx.skb.skb, outcome),
    }
}

/// What the link's header alone decides; its own function, so that the entry points' frames, which
/// everything else adds to, stay within 32 bytes.
#[inline(never)]
fn decided(skb: *mut __sk_buff, outcome: Outcome) -> i32 {
    let skb = Skb::new(skb);
    finish(&skb, skb.len(), outcome)
}

// One function for each family, so that their stack frames are not added up.

#[inline(never)]
fn from_pod_v4(skb: *mut __sk_buff, source: &[u8; 6]) -> i32 {
    with(skb, &SCRATCH_V4, log::detail_v4, |skb, scratch| {
        hachi_datapath::from_pod::<4, V4, _, _>(skb, &Tables4, scratch, source)
    })
}

#[inline(never)]
fn from_pod_v6(skb: *mut __sk_buff, source: &[u8; 6]) -> i32 {
    with(skb, &SCRATCH_V6, log::detail_v6, |skb, scratch| {
        hachi_datapath::from_pod::<16, V6, _, _>(skb, &Tables6, scratch, source)
    })
}

#[inline(never)]
fn to_pod_v4(skb: *mut __sk_buff) -> i32 {
    with(skb, &SCRATCH_V4, log::detail_v4, |skb, scratch| {
        hachi_datapath::to_pod::<4, V4, _, _>(skb, &Tables4, scratch)
    })
}

#[inline(never)]
fn to_pod_v6(skb: *mut __sk_buff) -> i32 {
    with(skb, &SCRATCH_V6, log::detail_v6, |skb, scratch| {
        hachi_datapath::to_pod::<16, V6, _, _>(skb, &Tables6, scratch)
    })
}

/// Decides with this CPU's working memory, counts, and returns the verdict.
#[inline(always)]
fn with<const N: usize>(
    skb: *mut __sk_buff,
    map: &PerCpuArray<Scratch<N>>,
    log: impl FnOnce(&Scratch<N>, &Outcome),
    decide: impl FnOnce(&mut Skb, &mut Scratch<N>) -> Outcome,
) -> i32 {
    let mut skb = Skb::new(skb);
    // Before an answer changes it.
    let length = skb.len();
    let outcome = match map.get_ptr_mut(0) {
        Some(scratch) => {
            // SAFETY: the element is this CPU's own, every byte pattern that the programs leave in
            // it is valid, as is the initial zero, and a tc program is not interrupted by another
            // on its CPU: softirqs are off while it runs.
            let scratch = unsafe { &mut *scratch };
            let outcome = decide(&mut skb, scratch);
            log(scratch, &outcome);
            outcome
        }
        None => Outcome::Drop(Reason::NotConfigured),
    };
    finish(&skb, length, outcome)
}

/// Counts the packet, once, and turns its outcome into the hook's return code.
#[inline(always)]
fn finish(skb: &Skb, length: u32, outcome: Outcome) -> i32 {
    maps::count(outcome.reason(), length);
    match outcome {
        // UNSPEC, not OK: other programs and filters of the hook have their say.
        Outcome::Pass(reason) => {
            log::passed(skb, reason);
            TC_ACT_UNSPEC
        }
        Outcome::RedirectPeer { ifindex } => {
            log::delivered(skb, ifindex);
            redirect(ifindex)
        }
        // To the Pod that asked.
        Outcome::Answer => {
            log::answered(skb);
            redirect(skb.ifindex())
        }
        Outcome::Drop(reason) => {
            log::dropped(skb, reason);
            TC_ACT_SHOT
        }
    }
}

/// Hands the packet to the namespace behind a veth pair's host side (Linux 5.10).
#[inline(always)]
fn redirect(ifindex: u32) -> i32 {
    // SAFETY: the helper takes no pointer; an index without a device fails the redirect, which
    // drops the packet.
    let verdict = unsafe { bpf_redirect_peer(ifindex, 0) };
    verdict as i32
}

/// The loader refuses helpers that are for GPL-compatible programs alone without this.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: a program with a reachable panic does not pass the verifier.
    loop {}
}
