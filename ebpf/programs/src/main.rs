//! The eBPF entry points: they read the link's header, ask `hachi-datapath` to decide, count, and
//! turn the outcome into a return code in one exhaustive match. Maps are in [`maps`], the helpers
//! behind the datapath's traits in [`packet`] and [`tables`], log records in [`log`].
//!
//! Everything here loads on Linux 6.1: no kernel functions, bounded loops, helpers of 5.13 and
//! before.
#![no_std]
#![no_main]

mod action;
mod host;
mod log;
mod maps;
mod net;
mod overlay;
mod packet;
mod sockets;
mod tables;
mod xdp;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_OK},
    helpers::bpf_redirect_peer,
    macros::classifier,
    maps::PerCpuArray,
    programs::TcContext,
};
use hachi_abi::Reason;
use hachi_datapath::{Frame, Outcome, Packet as _, Scratch, V4, V6, frame};

use crate::{
    action::{Action, Kind},
    maps::{ACTION, SCRATCH_V4, SCRATCH_V6},
    packet::Skb,
    tables::{Tables4, Tables6},
};

/// Packets that a Pod sends: tc ingress of its veth's host side.
#[classifier]
fn from_pod(ctx: TcContext) -> i32 {
    run(ctx.skb.skb, frame, from_pod_v4, from_pod_v6)
}

/// Packets that the host's stack sends to a Pod: tc egress of its veth's host side.
#[classifier]
fn to_pod(ctx: TcContext) -> i32 {
    run(
        ctx.skb.skb,
        frame,
        |skb, _, action| to_pod_v4(skb, action),
        |skb, _, action| to_pod_v6(skb, action),
    )
}

/// Reads the link's header, has the family decide, counts and acts.
#[inline(always)]
fn run(
    skb: *mut __sk_buff,
    link: impl FnOnce(&Skb, &mut [u8; 6]) -> Frame,
    v4: impl FnOnce(*mut __sk_buff, &[u8; 6], &mut Action),
    v6: impl FnOnce(*mut __sk_buff, &[u8; 6], &mut Action),
) -> i32 {
    let Some(action) = ACTION.get_ptr_mut(0) else {
        return Kind::Drop.verdict();
    };
    // SAFETY: the element is this CPU's own, every byte pattern is valid, and a tc program is not
    // interrupted by another on its CPU: softirqs are off while it runs.
    let action = unsafe { &mut *action };
    let packet = Skb::new(skb);
    // Before an answer changes it.
    let length = packet.len();
    let mut source = [0; 6];
    match link(&packet, &mut source) {
        Frame::V4 => v4(skb, &source, action),
        Frame::V6 => v6(skb, &source, action),
        Frame::Decided(outcome) => action.set(&outcome),
    }
    finish(skb, length, action)
}

// One function for each family, so that their stack frames are not added up.

#[inline(never)]
fn from_pod_v4(skb: *mut __sk_buff, source: &[u8; 6], action: &mut Action) {
    with(skb, &SCRATCH_V4, action, log::detail_v4, |skb, scratch| {
        hachi_datapath::from_pod::<4, V4, _, _>(skb, &Tables4, scratch, source)
    });
    net::leave_pod(skb, action, net::route_v4);
}

#[inline(never)]
fn from_pod_v6(skb: *mut __sk_buff, source: &[u8; 6], action: &mut Action) {
    with(skb, &SCRATCH_V6, action, log::detail_v6, |skb, scratch| {
        hachi_datapath::from_pod::<16, V6, _, _>(skb, &Tables6, scratch, source)
    });
    net::leave_pod(skb, action, net::route_v6);
}

#[inline(never)]
fn to_pod_v4(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V4, action, log::detail_v4, |skb, scratch| {
        hachi_datapath::to_pod::<4, V4, _, _>(skb, &Tables4, scratch)
    });
}

#[inline(never)]
fn to_pod_v6(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V6, action, log::detail_v6, |skb, scratch| {
        hachi_datapath::to_pod::<16, V6, _, _>(skb, &Tables6, scratch)
    });
}

/// Decides with this CPU's working memory.
#[inline(always)]
fn with<const N: usize>(
    skb: *mut __sk_buff,
    map: &PerCpuArray<Scratch<N>>,
    action: &mut Action,
    log: impl FnOnce(&Scratch<N>, &Action),
    decide: impl FnOnce(&mut Skb, &mut Scratch<N>) -> Outcome,
) {
    let Some(scratch) = map.get_ptr_mut(0) else {
        action.set(&Outcome::Drop(Reason::NotConfigured));
        return;
    };
    // SAFETY: as in `run`; every byte pattern that the programs leave is valid, as is the initial
    // zero.
    let scratch = unsafe { &mut *scratch };
    action.set(&decide(&mut Skb::new(skb), scratch));
    log(scratch, action);
}

/// Counts the packet, once, and does what was decided. Not inlined: the entry points' frames are
/// added to those of all that they call, and must stay within 32 bytes (the unit of Linux 6.1).
#[inline(never)]
fn finish(skb: *mut __sk_buff, length: u32, action: &Action) -> i32 {
    let skb = Skb::new(skb);
    maps::count(action.reason(), length);
    log::record(&skb, action);
    match action.kind() {
        Kind::Pass if maps::is_once() => TC_ACT_OK,
        Kind::Pass => Kind::Pass.verdict(),
        Kind::Redirect => redirect(action.ifindex()),
        // To the Pod that asked.
        Kind::Answer => redirect(skb.ifindex()),
        Kind::Forward => net::forward(action.ifindex()),
        Kind::Out => net::back(action.ifindex(), action.inward()),
        Kind::Drop => Kind::Drop.verdict(),
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
