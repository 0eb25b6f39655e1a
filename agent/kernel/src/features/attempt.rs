//! Single system calls that try one thing each: the smallest map, the smallest program, a link.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use aya::maps::MapType;

use crate::{layout::Layout, sys};

/// `enum bpf_prog_type`.
pub(super) const SCHED_CLS: u32 = 3;
/// `enum bpf_prog_type`.
pub(super) const XDP: u32 = 6;
/// `enum bpf_prog_type`.
pub(super) const SOCK_ADDR: u32 = 18;
/// `enum bpf_attach_type`: programs at the hooks of sockets that load balancing needs, by name.
pub(super) const SOCKET_HOOKS: [(&str, u32); 8] = [
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
];
/// `enum bpf_attach_type`.
pub(super) const AT_XDP: u32 = 37;
/// `XDP_FLAGS_SKB_MODE`: generic.
pub(super) const XDP_GENERIC: u32 = 1 << 1;
/// `XDP_FLAGS_DRV_MODE`: in the driver.
pub(super) const XDP_NATIVE: u32 = 1 << 2;

/// `BPF_FUNC_redirect_peer`, Linux 5.10.
const REDIRECT_PEER: i32 = 155;

/// An instruction: `struct bpf_insn`.
const fn instruction(code: u8, registers: u8, immediate: i32) -> u64 {
    let [a, b, c, d] = immediate.to_le_bytes();
    u64::from_le_bytes([code, registers, 0, 0, a, b, c, d])
}

/// `reg = immediate`
const fn set(register: u8, immediate: i32) -> u64 {
    instruction(0xb7, register, immediate)
}

/// `return r0`
const RETURN: u64 = instruction(0x95, 0, 0);

/// `return verdict`
pub(super) const fn constant(verdict: i32) -> [u64; 2] {
    [set(0, verdict), RETURN]
}

/// `return bpf_redirect_peer(0, 0)`
pub(super) const fn redirect_peer() -> [u64; 4] {
    [
        set(1, 0),
        set(2, 0),
        instruction(0x85, 0, REDIRECT_PEER),
        RETURN,
    ]
}

/// Makes a map of a layout's type and sizes with few entries.
pub(super) fn map(layout: &Layout) -> io::Result<OwnedFd> {
    const NO_PREALLOC: u32 = 1;
    // LPM tries insist on it.
    let flags = if layout.kind == MapType::LpmTrie {
        NO_PREALLOC
    } else {
        0
    };
    sys::map_create(layout.kind as u32, layout.key, layout.value, 16, flags)
}

/// Makes the smallest hash.
pub(super) fn hash() -> io::Result<OwnedFd> {
    sys::map_create(MapType::Hash as u32, 4, 4, 16, 0)
}

/// Writes two entries in one call.
pub(super) fn batch(map: BorrowedFd<'_>) -> io::Result<()> {
    let keys: Vec<u8> = [1_u32, 2]
        .iter()
        .flat_map(|key| key.to_ne_bytes())
        .collect();
    sys::update_batch(map, &keys, &keys, 2).1
}

/// Loads a program that lets everything pass at a socket's hook.
pub(super) fn socket_program(kind: u32) -> io::Result<OwnedFd> {
    const ALLOW: i32 = 1;
    sys::prog_load(SOCK_ADDR, kind, &constant(ALLOW))
}

/// Attaches such a program to a hook of a cgroup, for a moment.
pub(super) fn socket_hook(cgroup: &impl AsRawFd, kind: u32) -> io::Result<()> {
    let program = socket_program(kind)?;
    sys::attach(program.as_fd(), cgroup.as_raw_fd().cast_unsigned(), kind, 0).map(drop)
}
