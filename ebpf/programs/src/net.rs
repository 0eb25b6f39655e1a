//! The entry points of uplinks, and the ways out of the node.

use core::{ffi::c_void, mem::zeroed};

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as Route,
    },
    helpers::{bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_skb_change_type},
    macros::classifier,
    programs::TcContext,
};
use hachi_abi::Reason;
use hachi_datapath::{
    Maps as _, Outcome, Packet as _, Scratch, V4, V6, hop, longest, network_frame,
};

use crate::{
    action::{Action, Kind},
    log,
    maps::{SCRATCH_V4, SCRATCH_V6, UPLINKS},
    packet::Skb,
    run,
    tables::{Tables4, Tables6},
    with,
};

/// Families as `bpf_fib_lookup` names them (`AF_INET`, `AF_INET6`).
pub(crate) const INET: u8 = 2;
pub(crate) const INET6: u8 = 10;

/// `PACKET_HOST` of `linux/if_packet.h`.
const PACKET_HOST: u32 = 0;

/// Packets that an uplink receives: its tc ingress.
#[classifier]
fn from_net(ctx: TcContext) -> i32 {
    run(
        ctx.skb.skb,
        |packet, _| network_frame(packet, Reason::PassedToStack),
        |skb, _, action| from_net_v4(skb, action),
        |skb, _, action| from_net_v6(skb, action),
    )
}

/// Packets that leave by an uplink: its tc egress.
#[classifier]
fn to_net(ctx: TcContext) -> i32 {
    run(
        ctx.skb.skb,
        |packet, _| network_frame(packet, Reason::PassedToNetwork),
        |skb, _, action| {
            to_net_v4(skb, action);
            if action.reason() == Reason::NatExhausted as u32 {
                refuse_v4(skb, action);
            }
        },
        |skb, _, action| {
            to_net_v6(skb, action);
            if action.reason() == Reason::NatExhausted as u32 {
                refuse_v6(skb, action);
            }
        },
    )
}

#[inline(never)]
fn from_net_v4(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V4, action, log::detail_v4, |skb, scratch| {
        hachi_datapath::from_net::<4, V4, _, _>(skb, &Tables4, scratch)
    });
    leave(skb, action, route_v4);
}

#[inline(never)]
fn from_net_v6(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V6, action, log::detail_v6, |skb, scratch| {
        hachi_datapath::from_net::<16, V6, _, _>(skb, &Tables6, scratch)
    });
    leave(skb, action, route_v6);
}

#[inline(never)]
fn to_net_v4(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V4, action, log::detail_v4, |skb, scratch| {
        hachi_datapath::to_net::<4, V4, _, _>(skb, &Tables4, scratch)
    });
}

#[inline(never)]
fn to_net_v6(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V6, action, log::detail_v6, |skb, scratch| {
        hachi_datapath::to_net::<16, V6, _, _>(skb, &Tables6, scratch)
    });
}

#[inline(never)]
fn refuse_v4(raw: *mut __sk_buff, action: &mut Action) {
    let Some(scratch) = SCRATCH_V4.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: as in `with`; it is of the packet that was just decided about.
    let scratch = unsafe { &mut *scratch };
    let mut skb = Skb::new(raw);
    let refusal = hachi_datapath::refuse::<4, V4, _, _>(&mut skb, &Tables4, scratch);
    action.refuse(refusal, skb.ifindex(), Tables4.host().far);
}

#[inline(never)]
fn refuse_v6(raw: *mut __sk_buff, action: &mut Action) {
    let Some(scratch) = SCRATCH_V6.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: as in `refuse_v4`.
    let scratch = unsafe { &mut *scratch };
    let mut skb = Skb::new(raw);
    let refusal = hachi_datapath::refuse::<16, V6, _, _>(&mut skb, &Tables6, scratch);
    action.refuse(refusal, skb.ifindex(), Tables6.host().far);
}

/// Says by which device a packet leaves that is not for this node.
#[inline(always)]
pub(crate) fn leave(skb: *mut __sk_buff, action: &mut Action, route: fn(*mut __sk_buff) -> u32) {
    if action.kind() == Kind::Answer {
        action.back(Skb::new(skb).ifindex());
    }
    leave_pod(skb, action, route);
}

/// As [`leave`], of a packet that a Pod has sent.
#[inline(always)]
pub(crate) fn leave_pod(
    skb: *mut __sk_buff,
    action: &mut Action,
    route: fn(*mut __sk_buff) -> u32,
) {
    if action.kind() == Kind::Forward {
        match route(skb) {
            // No route, a packet that is too long, no hop left, a device that is none of ours: the
            // stack knows what to do or to answer.
            0 => action.set(&Outcome::Pass(Reason::PassedToStack)),
            ifindex => action.forward(ifindex),
        }
    }
}

/// The index of the device that a packet is routed to, and one hop less for it to go; 0 if it must
/// not be forwarded here.
#[inline(never)]
pub(crate) fn route_v4(skb: *mut __sk_buff) -> u32 {
    let Some(scratch) = SCRATCH_V4.get_ptr(0) else {
        return 0;
    };
    // SAFETY: as in `with`.
    let scratch: &Scratch<4> = unsafe { &*scratch };
    // SAFETY: integers and arrays of them; zero is a value of each.
    let mut params: Route = unsafe { zeroed() };
    params.family = INET;
    params.l4_protocol = scratch.parsed.tuple.proto;
    params.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(scratch.parsed.tuple.src);
    params.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(scratch.target);
    lookup::<4, V4>(skb, scratch, &mut params)
}

/// As [`route_v4`].
#[inline(never)]
pub(crate) fn route_v6(skb: *mut __sk_buff) -> u32 {
    let Some(scratch) = SCRATCH_V6.get_ptr(0) else {
        return 0;
    };
    // SAFETY: as in `with`.
    let scratch: &Scratch<16> = unsafe { &*scratch };
    // SAFETY: as in `route_v4`.
    let mut params: Route = unsafe { zeroed() };
    params.family = INET6;
    params.l4_protocol = scratch.parsed.tuple.proto;
    params.__bindgen_anon_3.ipv6_src = words(&scratch.parsed.tuple.src);
    params.__bindgen_anon_4.ipv6_dst = words(&scratch.target);
    lookup::<16, V6>(skb, scratch, &mut params)
}

#[inline(always)]
pub(crate) fn words(addr: &[u8; 16]) -> [u32; 4] {
    let word = |i: usize| u32::from_ne_bytes([addr[i], addr[i + 1], addr[i + 2], addr[i + 3]]);
    [word(0), word(4), word(8), word(12)]
}

/// Asks for the route (Linux 4.18). Its MTU counts for every packet that this one is cut into on its
/// way out (since 5.12, which also knows what was learned of the path).
#[inline(always)]
fn lookup<const N: usize, F: hachi_datapath::Family<N>>(
    raw: *mut __sk_buff,
    scratch: &Scratch<N>,
    params: &mut Route,
) -> u32 {
    let mut skb = Skb::new(raw);
    params.ifindex = skb.ifindex();
    params.__bindgen_anon_1.tot_len = longest(&skb, scratch).min(u32::from(u16::MAX)) as u16;
    // SAFETY: the context is the program's own, and the parameters are as long as is said.
    let result =
        unsafe { bpf_fib_lookup(raw.cast::<c_void>(), params, size_of::<Route>() as i32, 0) };
    let routed = result == i64::from(BPF_FIB_LKUP_RET_SUCCESS)
        || result == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH);
    // SAFETY: nothing of the element is read.
    let known = routed && unsafe { UPLINKS.get(&params.ifindex) }.is_some();
    if known && hop::<N, F, _>(&mut skb) {
        params.ifindex
    } else {
        0
    }
}

/// What is left to the stack came from another device's Ethernet address, and is for this node all
/// the same.
#[inline(always)]
pub(crate) fn take_in(skb: *mut __sk_buff, action: &Action) {
    if action.kind() == Kind::Pass {
        // SAFETY: the helper takes no pointer but the context (Linux 4.8). Where it fails the stack
        // drops the packet.
        let _ = unsafe { bpf_skb_change_type(skb, PACKET_HOST) };
    }
}

/// Sends the packet out by a device, to the neighbour that the routes name (Linux 5.10).
#[inline(always)]
pub(crate) fn forward(ifindex: u32) -> i32 {
    // SAFETY: no parameters, so that the kernel finds the neighbour by itself; an index without a
    // device fails the redirect, which drops the packet.
    let verdict = unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) };
    verdict as i32
}

/// Sends the packet out by a device as it is, or has it come in by that (`BPF_F_INGRESS`).
#[inline(always)]
pub(crate) fn back(ifindex: u32, flags: u32) -> i32 {
    // SAFETY: the helper takes no pointer.
    let verdict = unsafe { bpf_redirect(ifindex, flags.into()) };
    verdict as i32
}
