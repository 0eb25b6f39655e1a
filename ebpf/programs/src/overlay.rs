//! The entry points of the VXLAN device, and its packets' tunnel keys.

use core::mem::{MaybeUninit, offset_of, zeroed};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key as TunnelKey},
    helpers::{bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key},
    macros::classifier,
    maps::lpm_trie::Key,
    programs::TcContext,
};
use hachi_abi::{Reason, Tunnel, TunnelFlags};
use hachi_datapath::{Maps as _, Outcome, V4, V6, overlay_frame};

use crate::{
    action::{Action, Kind},
    log,
    maps::{SCRATCH_V4, SCRATCH_V6, TUNNELS_V4, TUNNELS_V6},
    net::{leave, route_v4, route_v6, take_in},
    run,
    tables::{Tables4, Tables6},
    with,
};

/// Hops of a tunnel packet (RFC 1700).
const HOPS: u8 = 64;

/// Length of a tunnel key before Linux 6.0, which every kernel takes.
const KEY: u32 = offset_of!(TunnelKey, tunnel_label) as u32 + 4;

/// Packets that come out of the tunnel: tc ingress of the VXLAN device.
#[classifier]
fn from_overlay(ctx: TcContext) -> i32 {
    run(
        ctx.skb.skb,
        |packet, _| overlay_frame(packet),
        |skb, _, action| from_overlay_v4(skb, action),
        |skb, _, action| from_overlay_v6(skb, action),
    )
}

/// Packets that go into the tunnel: tc egress of the VXLAN device.
#[classifier]
fn to_overlay(ctx: TcContext) -> i32 {
    run(
        ctx.skb.skb,
        |packet, _| overlay_frame(packet),
        |skb, _, action| to_overlay_v4(skb, action),
        |skb, _, action| to_overlay_v6(skb, action),
    )
}

#[inline(never)]
fn from_overlay_v4(skb: *mut __sk_buff, action: &mut Action) {
    let outer = outer(skb);
    with(skb, &SCRATCH_V4, action, log::detail_v4, |skb, scratch| {
        hachi_datapath::from_overlay::<4, V4, _, _>(skb, &Tables4, scratch, outer)
    });
    leave(skb, action, route_v4);
    take_in(skb, action);
}

#[inline(never)]
fn from_overlay_v6(skb: *mut __sk_buff, action: &mut Action) {
    let outer = outer(skb);
    with(skb, &SCRATCH_V6, action, log::detail_v6, |skb, scratch| {
        hachi_datapath::from_overlay::<16, V6, _, _>(skb, &Tables6, scratch, outer)
    });
    leave(skb, action, route_v6);
    take_in(skb, action);
}

#[inline(never)]
fn to_overlay_v4(skb: *mut __sk_buff, action: &mut Action) {
    let mut tunnel = Tunnel::default();
    with(skb, &SCRATCH_V4, action, log::detail_v4, |skb, scratch| {
        hachi_datapath::to_overlay::<4, V4, _, _>(skb, &Tables4, scratch, &mut tunnel)
    });
    send(skb, action, &tunnel);
}

#[inline(never)]
fn to_overlay_v6(skb: *mut __sk_buff, action: &mut Action) {
    let mut tunnel = Tunnel::default();
    with(skb, &SCRATCH_V6, action, log::detail_v6, |skb, scratch| {
        hachi_datapath::to_overlay::<16, V6, _, _>(skb, &Tables6, scratch, &mut tunnel)
    });
    send(skb, action, &tunnel);
}

/// What is known of the address that a tunnel packet came from, if its network is ours. Not inlined:
/// its memory is free again when the rest begins.
#[inline(never)]
fn outer(skb: *mut __sk_buff) -> Option<&'static Tunnel> {
    let mut key = MaybeUninit::<TunnelKey>::uninit();
    let pointer = key.as_mut_ptr();
    // SAFETY: the helper writes as many bytes as it is told to, or fails.
    if unsafe { bpf_skb_get_tunnel_key(skb, pointer, KEY, 0) } == 0 {
        // SAFETY: the helper has written that much; the field is of the host's byte order.
        let (vni, remote) = unsafe {
            (
                (*pointer).tunnel_id,
                (*pointer).__bindgen_anon_1.remote_ipv4.to_be_bytes(),
            )
        };
        if vni != Tables4.tunnel_device().vni {
            return None;
        }
        return TUNNELS_V4.get(&Key::new(32, remote));
    }
    // SAFETY: as above. A tunnel packet of the other family is refused.
    let failed =
        unsafe { bpf_skb_get_tunnel_key(skb, pointer, KEY, u64::from(BPF_F_TUNINFO_IPV6)) };
    if failed != 0 {
        return None;
    }
    // SAFETY: as above; the field is of the network's byte order.
    let (vni, words) = unsafe {
        (
            (*pointer).tunnel_id,
            (*pointer).__bindgen_anon_1.remote_ipv6,
        )
    };
    if vni != Tables6.tunnel_device().vni {
        return None;
    }
    let mut remote = [0; 16];
    for (bytes, word) in remote.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    TUNNELS_V6.get(&Key::new(128, remote))
}

/// Writes into the packet's tunnel key where it goes.
#[inline(always)]
fn send(skb: *mut __sk_buff, action: &mut Action, tunnel: &Tunnel) {
    if action.kind() != Kind::Pass || tunnel.remote == [0; 16] {
        return;
    }
    // SAFETY: integers and arrays of them; zero is a value of each.
    let mut key: TunnelKey = unsafe { zeroed() };
    key.tunnel_id = Tables4.tunnel_device().vni;
    key.tunnel_ttl = HOPS;
    let flags = if tunnel.flags & TunnelFlags::V6 == 0 {
        let [a, b, c, d, ..] = tunnel.remote;
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes([a, b, c, d]);
        // RFC 7348: the checksum of a tunnel packet over IPv4 is zero.
        u64::from(BPF_F_ZERO_CSUM_TX)
    } else {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(tunnel.remote.chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        key.__bindgen_anon_1.remote_ipv6 = words;
        u64::from(BPF_F_TUNINFO_IPV6)
    };
    // SAFETY: the helper reads as many bytes of the key as it is told to.
    if unsafe { bpf_skb_set_tunnel_key(skb, &raw mut key, KEY, flags) } != 0 {
        action.set(&Outcome::Drop(Reason::RewriteFailed));
    }
}
