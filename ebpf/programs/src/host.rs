//! The entry points of the node's own way to Services: see `hachi_datapath`'s `host`.

use aya_ebpf::{bindings::__sk_buff, macros::classifier, programs::TcContext};
use hachi_abi::Reason;
use hachi_datapath::{V4, V6, network_frame, overlay_frame};

use crate::{
    action::Action,
    log,
    maps::{SCRATCH_V4, SCRATCH_V6},
    net::{leave, route_v4, route_v6, take_in},
    run,
    tables::{Tables4, Tables6},
    with,
};

/// Packets that the node sends to Services: tc ingress of the pair's far side.
#[classifier]
fn from_host(ctx: TcContext) -> i32 {
    run(
        ctx.skb.skb,
        |packet, _| overlay_frame(packet),
        |skb, _, action| from_host_v4(skb, action),
        |skb, _, action| from_host_v6(skb, action),
    )
}

/// Packets that come back: tc egress of the pair's far side.
#[classifier]
fn to_host(ctx: TcContext) -> i32 {
    run(
        ctx.skb.skb,
        |packet, _| overlay_frame(packet),
        |skb, _, action| to_host_v4(skb, action),
        |skb, _, action| to_host_v6(skb, action),
    )
}

/// Packets that the node sends to itself: tc egress of the loopback device.
#[classifier]
fn to_self(ctx: TcContext) -> i32 {
    run(
        ctx.skb.skb,
        |packet, _| network_frame(packet, Reason::PassedToStack),
        |skb, _, action| to_self_v4(skb, action),
        |skb, _, action| to_self_v6(skb, action),
    )
}

#[inline(never)]
fn from_host_v4(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V4, action, log::detail_v4, |skb, scratch| {
        hachi_datapath::from_host::<4, V4, _, _>(skb, &Tables4, scratch)
    });
    leave(skb, action, route_v4);
    take_in(skb, action);
}

#[inline(never)]
fn from_host_v6(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V6, action, log::detail_v6, |skb, scratch| {
        hachi_datapath::from_host::<16, V6, _, _>(skb, &Tables6, scratch)
    });
    leave(skb, action, route_v6);
    take_in(skb, action);
}

#[inline(never)]
fn to_host_v4(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V4, action, log::detail_v4, |skb, scratch| {
        hachi_datapath::to_host::<4, V4, _, _>(skb, &Tables4, scratch)
    });
}

#[inline(never)]
fn to_host_v6(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V6, action, log::detail_v6, |skb, scratch| {
        hachi_datapath::to_host::<16, V6, _, _>(skb, &Tables6, scratch)
    });
}

#[inline(never)]
fn to_self_v4(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V4, action, log::detail_v4, |skb, scratch| {
        hachi_datapath::to_self::<4, V4, _, _>(skb, &Tables4, scratch)
    });
}

#[inline(never)]
fn to_self_v6(skb: *mut __sk_buff, action: &mut Action) {
    with(skb, &SCRATCH_V6, action, log::detail_v6, |skb, scratch| {
        hachi_datapath::to_self::<16, V6, _, _>(skb, &Tables6, scratch)
    });
}
