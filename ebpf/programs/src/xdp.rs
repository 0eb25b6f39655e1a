//! The uplinks' XDP program: [`hachi_datapath::express`] on frames by direct access, which every driver
//! and every supported kernel has (`bpf_xdp_load_bytes` came with Linux 5.18).

use core::{ffi::c_void, mem::zeroed, ptr};

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as Route, xdp_action, xdp_md},
    helpers::bpf_fib_lookup,
    macros::xdp,
    programs::XdpContext,
};
use hachi_abi::Reason;
use hachi_datapath::{
    ETH_LEN, Express, Family, Packet, Part, Scratch, V4, V6, adjusted, depart, express,
};

use crate::{
    maps::{SCRATCH_V4, SCRATCH_V6, count},
    net::{INET, INET6, words},
    tables::{Tables4, Tables6},
};

/// Headers end before this offset, whatever the packet.
const REACH: usize = 255;

/// The frame of an XDP program.
struct Frame {
    raw: *mut xdp_md,
}

impl Frame {
    /// The address of `L` bytes at an offset; `None` if the frame ends before.
    #[inline(always)]
    fn at<const L: usize>(&self, offset: usize) -> Option<*mut [u8; L]> {
        if offset > REACH {
            return None;
        }
        let (data, end) = self.bounds();
        let start = data + offset;
        (start + L <= end).then_some(start as *mut [u8; L])
    }

    /// Where the frame begins and ends. Volatile: the verifier knows what these two loads are, and
    /// nothing that a compiler might make of them.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        // SAFETY: the kernel hands a valid context to the program for its whole run.
        let data = unsafe { ptr::read_volatile(&raw const (*self.raw).data) };
        // SAFETY: as above.
        let end = unsafe { ptr::read_volatile(&raw const (*self.raw).data_end) };
        (data as usize, end as usize)
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn len(&self) -> u32 {
        let (data, end) = self.bounds();
        (end - data) as u32
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: as in `bounds`.
        unsafe { (*self.raw).ingress_ifindex }
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn is_own(&self) -> bool {
        false
    }

    #[inline(always)]
    fn vlan_present(&self) -> bool {
        false
    }

    #[inline(always)]
    fn load<const L: usize>(&self, offset: usize) -> Option<[u8; L]> {
        // SAFETY: `at` has compared with the frame's end; an array of bytes has no alignment.
        self.at::<L>(offset).map(|bytes| unsafe { *bytes })
    }

    #[inline(always)]
    fn store<const L: usize>(&mut self, offset: usize, bytes: &[u8; L], _: bool) -> bool {
        let Some(place) = self.at::<L>(offset) else {
            return false;
        };
        // SAFETY: as in `load`; nothing else refers to the frame.
        unsafe { *place = *bytes };
        true
    }

    #[inline(always)]
    fn adjust_l3_checksum(&mut self, offset: usize, difference: u32) -> bool {
        let Some(field) = self.load::<2>(offset) else {
            return false;
        };
        self.store(offset, &adjusted(field, difference), false)
    }

    #[inline(always)]
    fn adjust_l4_checksum(&mut self, offset: usize, difference: u32, _: Part, udp: bool) -> bool {
        let Some(field) = self.load::<2>(offset) else {
            return false;
        };
        if udp && field == [0; 2] {
            return true;
        }
        let mut new = adjusted(field, difference);
        if udp && new == [0; 2] {
            new = [0xff; 2];
        }
        self.store(offset, &new, false)
    }

    #[inline(always)]
    fn resize(&mut self, _: u32) -> bool {
        false
    }
}

/// Packets that an uplink receives, before the stack.
#[xdp]
fn xdp_net(ctx: XdpContext) -> u32 {
    let frame = Frame { raw: ctx.ctx };
    match frame.load::<2>(ETH_LEN - 2) {
        Some([0x08, 0x00]) => net_v4(ctx.ctx),
        Some([0x86, 0xdd]) => net_v6(ctx.ctx),
        _ => xdp_action::XDP_PASS,
    }
}

#[inline(never)]
fn net_v4(raw: *mut xdp_md) -> u32 {
    let Some(scratch) = SCRATCH_V4.get_ptr_mut(0) else {
        return xdp_action::XDP_PASS;
    };
    // SAFETY: the element is this CPU's own, every byte pattern that the programs leave is valid, as is
    // the initial zero, and neither an XDP nor a tc program is interrupted by another on its CPU.
    let scratch = unsafe { &mut *scratch };
    let frame = Frame { raw };
    match express::<4, V4, _, _>(&frame, &Tables4, scratch) {
        Express::Leave => xdp_action::XDP_PASS,
        Express::Drop(reason) => dropped(reason, frame.len()),
        Express::Send => send_v4(raw, scratch),
    }
}

#[inline(never)]
fn net_v6(raw: *mut xdp_md) -> u32 {
    let Some(scratch) = SCRATCH_V6.get_ptr_mut(0) else {
        return xdp_action::XDP_PASS;
    };
    // SAFETY: as in `net_v4`.
    let scratch = unsafe { &mut *scratch };
    let frame = Frame { raw };
    match express::<16, V6, _, _>(&frame, &Tables6, scratch) {
        Express::Leave => xdp_action::XDP_PASS,
        Express::Drop(reason) => dropped(reason, frame.len()),
        Express::Send => send_v6(raw, scratch),
    }
}

/// Sends the packet on. A function of its own, so that its stack is not added to the decision's.
#[inline(never)]
fn send_v4(raw: *mut xdp_md, scratch: &Scratch<4>) -> u32 {
    // SAFETY: integers and arrays of them; zero is a value of each.
    let mut route: Route = unsafe { zeroed() };
    route.family = INET;
    route.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(scratch.after.src);
    route.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(scratch.after.dst);
    send::<4, V4>(&mut Frame { raw }, scratch, &mut route)
}

/// Sends the packet on. A function of its own, so that its stack is not added to the decision's.
#[inline(never)]
fn send_v6(raw: *mut xdp_md, scratch: &Scratch<16>) -> u32 {
    // SAFETY: integers and arrays of them; zero is a value of each.
    let mut route: Route = unsafe { zeroed() };
    route.family = INET6;
    route.__bindgen_anon_3.ipv6_src = words(&scratch.after.src);
    route.__bindgen_anon_4.ipv6_dst = words(&scratch.after.dst);
    send::<16, V6>(&mut Frame { raw }, scratch, &mut route)
}

#[inline(always)]
fn dropped(reason: Reason, length: u32) -> u32 {
    count(reason as u32, length);
    xdp_action::XDP_DROP
}

/// Sends the packet out by the device that it came from, if its route leads there and the neighbour is
/// known. Anything else (another device, no route, too long) is left to the stack, unchanged.
#[inline(always)]
fn send<const N: usize, F: Family<N>>(
    frame: &mut Frame,
    scratch: &Scratch<N>,
    route: &mut Route,
) -> u32 {
    let ifindex = frame.ifindex();
    let length = frame.len();
    route.l4_protocol = scratch.parsed.tuple.proto;
    route.ifindex = ifindex;
    // Compared with the device's MTU.
    route.__bindgen_anon_1.tot_len = scratch.parsed.end.wrapping_sub(ETH_LEN as u32) as u16;
    // SAFETY: the context is the program's own, and the parameters are as long as is said.
    let found = unsafe {
        bpf_fib_lookup(
            frame.raw.cast::<c_void>(),
            route,
            size_of::<Route>() as i32,
            0,
        )
    };
    if found != i64::from(BPF_FIB_LKUP_RET_SUCCESS) || route.ifindex != ifindex {
        return xdp_action::XDP_PASS;
    }
    let mut macs = [0; 12];
    macs[..6].copy_from_slice(&route.dmac);
    macs[6..].copy_from_slice(&route.smac);
    if !depart::<N, F, _>(frame, scratch, &macs) {
        return dropped(Reason::RewriteFailed, length);
    }
    count(Reason::Forwarded as u32, length);
    xdp_action::XDP_TX
}
