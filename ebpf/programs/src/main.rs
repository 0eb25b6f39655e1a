//! The eBPF entry points: they parse what the hook hands over, ask `hachi-datapath` to decide, and
//! turn its outcome into a return code in one exhaustive match. Maps are in [`maps`], the helpers
//! behind the datapath's traits in [`packet`] and [`tables`].
#![no_std]
#![no_main]

mod maps;
mod packet;
mod tables;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect_peer,
    macros::classifier,
    maps::PerCpuArray,
    programs::TcContext,
};
use aya_log_ebpf::{info, trace};
use hachi_abi::Reason;
use hachi_datapath::{Family, Outcome, Packet as _, Scratch, V4, V6, ethertype};

use crate::{
    maps::{SCRATCH_V4, SCRATCH_V6},
    packet::Skb,
    tables::{Tables4, Tables6},
};

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];

/// Packets that a Pod sends: tc ingress of its veth's host side.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let outcome = match ethertype(&skb) {
        None => Outcome::Drop(Reason::Malformed),
        Some((macs, kind)) if kind == <V4 as Family<4>>::ETHERTYPE => {
            from_pod_v4(&mut skb, &source(&macs))
        }
        Some((macs, kind)) if kind == <V6 as Family<16>>::ETHERTYPE => {
            from_pod_v6(&mut skb, &source(&macs))
        }
        Some((_, ETHERTYPE_ARP)) if !skb.vlan_present() => Outcome::Pass(Reason::NotIp),
        Some(_) => Outcome::Drop(Reason::UnsupportedLink),
    };
    finish(&ctx, &skb, outcome)
}

/// Packets that the host's stack sends to a Pod: tc egress of its veth's host side.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let outcome = match ethertype(&skb) {
        None => Outcome::Drop(Reason::Malformed),
        Some((_, kind)) if kind == <V4 as Family<4>>::ETHERTYPE => to_pod_v4(&mut skb),
        Some((_, kind)) if kind == <V6 as Family<16>>::ETHERTYPE => to_pod_v6(&mut skb),
        Some((_, ETHERTYPE_ARP)) => Outcome::Pass(Reason::NotIp),
        Some(_) => Outcome::Drop(Reason::UnsupportedLink),
    };
    finish(&ctx, &skb, outcome)
}

/// The source of the two MAC addresses.
#[inline(always)]
fn source(macs: &[u8; 12]) -> [u8; 6] {
    [macs[6], macs[7], macs[8], macs[9], macs[10], macs[11]]
}

// One function for each family, so that their stack frames are not added up.

#[inline(never)]
fn from_pod_v4(skb: &mut Skb<'_>, source: &[u8; 6]) -> Outcome {
    with(&SCRATCH_V4, |scratch| {
        hachi_datapath::from_pod::<4, V4, _, _>(skb, &Tables4, scratch, source)
    })
}

#[inline(never)]
fn from_pod_v6(skb: &mut Skb<'_>, source: &[u8; 6]) -> Outcome {
    with(&SCRATCH_V6, |scratch| {
        hachi_datapath::from_pod::<16, V6, _, _>(skb, &Tables6, scratch, source)
    })
}

#[inline(never)]
fn to_pod_v4(skb: &mut Skb<'_>) -> Outcome {
    with(&SCRATCH_V4, |scratch| {
        hachi_datapath::to_pod::<4, V4, _, _>(skb, &Tables4, scratch)
    })
}

#[inline(never)]
fn to_pod_v6(skb: &mut Skb<'_>) -> Outcome {
    with(&SCRATCH_V6, |scratch| {
        hachi_datapath::to_pod::<16, V6, _, _>(skb, &Tables6, scratch)
    })
}

/// Runs `decide` with this CPU's working memory.
#[inline(always)]
fn with<const N: usize>(
    map: &PerCpuArray<Scratch<N>>,
    decide: impl FnOnce(&mut Scratch<N>) -> Outcome,
) -> Outcome {
    match map.get_ptr_mut(0) {
        // SAFETY: the element is this CPU's own, every byte pattern that the programs leave in it
        // is valid, as is the initial zero, and a tc program is not interrupted by another on its
        // CPU: softirqs are off while it runs.
        Some(scratch) => decide(unsafe { &mut *scratch }),
        None => Outcome::Drop(Reason::NotConfigured),
    }
}

/// Counts the packet, once, and turns its outcome into the hook's return code.
#[inline(always)]
fn finish(ctx: &TcContext, skb: &Skb<'_>, outcome: Outcome) -> i32 {
    let reason = outcome.reason();
    maps::count(reason, skb.len());
    match outcome {
        // UNSPEC, not OK: other programs and filters of the hook have their say.
        Outcome::Pass(reason) => {
            trace!(ctx, "pass {} on {}", reason.name(), skb.ifindex());
            TC_ACT_UNSPEC
        }
        Outcome::RedirectPeer { ifindex } => {
            trace!(ctx, "deliver from {} to {}", skb.ifindex(), ifindex);
            // SAFETY: the helper takes no pointer; an index without a device fails the redirect,
            // which drops the packet.
            unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
        }
        Outcome::Drop(reason) => {
            info!(ctx, "drop {} on {}", reason.name(), skb.ifindex());
            TC_ACT_SHOT
        }
    }
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
