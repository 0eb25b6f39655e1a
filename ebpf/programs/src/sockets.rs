//! Cgroup programs: sockets that connect or send to a Service, and what they are told of their peer.
//!
//! An IPv6 socket that speaks IPv4 has IPv4-mapped addresses (RFC 4291 section 2.5.5.2) in all hooks
//! but `sendmsg`, for which the kernel calls the IPv4 program.

use core::ptr;

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_addr,
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use hachi_abi::{
    Affinity, AffinityKey, Backend, BackendKey, Member, Service, ServiceKey, SocketEntry, SocketKey,
};
use hachi_datapath::{Answer, Socket, Sockets, from_backend, to_service};

use crate::{maps, tables::seconds};

/// The number of the node's network namespace; patched in by the loader.
#[unsafe(no_mangle)]
static NODE_NETNS: u64 = 0;
/// Whether sockets of other namespaces (Pods') are served too; patched in by the loader.
#[unsafe(no_mangle)]
static SERVE_PODS: u8 = 1;
/// Whether the kernel lets these programs choose an error (Linux 6.1); patched in by the loader.
/// Elsewhere that branch is dead, and every error is EPERM.
#[unsafe(no_mangle)]
static HAS_RETVAL: u8 = 0;

const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;

/// The system call goes on.
const GO_ON: i32 = 1;
/// The system call fails.
const FAIL: i32 = 0;

/// The first twelve bytes of an IPv4-mapped address, as three words of network order.
const MAPPED: [u32; 3] = [0, 0, 0xffff_u32.to_be()];

#[cgroup_sock_addr(connect4)]
fn sock_connect4(ctx: SockAddrContext) -> i32 {
    to_v4(&ctx, false)
}

#[cgroup_sock_addr(connect6)]
fn sock_connect6(ctx: SockAddrContext) -> i32 {
    to_v6(&ctx, false)
}

#[cgroup_sock_addr(sendmsg4)]
fn sock_sendmsg4(ctx: SockAddrContext) -> i32 {
    to_v4(&ctx, true)
}

#[cgroup_sock_addr(sendmsg6)]
fn sock_sendmsg6(ctx: SockAddrContext) -> i32 {
    to_v6(&ctx, true)
}

#[cgroup_sock_addr(recvmsg4)]
fn sock_recvmsg4(ctx: SockAddrContext) -> i32 {
    from_v4(&ctx);
    GO_ON
}

#[cgroup_sock_addr(recvmsg6)]
fn sock_recvmsg6(ctx: SockAddrContext) -> i32 {
    from_v6(&ctx);
    GO_ON
}

#[cgroup_sock_addr(getpeername4)]
fn sock_getpeername4(ctx: SockAddrContext) -> i32 {
    from_v4(&ctx);
    GO_ON
}

#[cgroup_sock_addr(getpeername6)]
fn sock_getpeername6(ctx: SockAddrContext) -> i32 {
    from_v6(&ctx);
    GO_ON
}

/// A constant that the loader patches.
#[inline(always)]
fn patched<T: Copy>(value: &T) -> T {
    // SAFETY: a reference to an initialised static; volatile, as the loader changes it afterwards.
    unsafe { ptr::read_volatile(value) }
}

/// The socket, if it is one to serve.
#[inline(always)]
fn socket(ctx: &SockAddrContext) -> Option<Socket> {
    // SAFETY: the context is the kernel's, and its protocol is readable in every hook.
    let proto = unsafe { ptr::read_volatile(&raw const (*ctx.sock_addr).protocol) };
    // SAFETY: the helper takes the context (for these programs Linux 4.18).
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the helper takes the context (for these programs Linux 5.7).
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let node = netns == patched(&NODE_NETNS);
    if !node && patched(&SERVE_PODS) == 0 {
        return None;
    }
    Some(Socket {
        cookie,
        netns,
        proto: u8::try_from(proto).ok()?,
        node,
        bound: is_bound(ctx),
    })
}

/// Whether the socket has a port.
#[inline(always)]
fn is_bound(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context is the kernel's, and names the socket in every hook (Linux 5.3).
    let socket = unsafe { ptr::read_volatile(&raw const (*ctx.sock_addr).__bindgen_anon_1.sk) };
    // SAFETY: the socket is there while its owner uses it, and the field is readable as a whole word.
    let port = unsafe { ptr::read_volatile(&raw const (*socket).src_port) };
    port != 0
}

/// Fails the system call where there is no backend.
#[inline(always)]
fn verdict(answer: Answer) -> i32 {
    let error = match answer {
        Answer::Unchanged | Answer::Given => return GO_ON,
        Answer::Refused => ECONNREFUSED,
        Answer::Unreachable => EHOSTUNREACH,
    };
    if patched(&HAS_RETVAL) != 0 {
        // SAFETY: the helper takes a number; where the kernel lacks it, this is never reached and
        // the verifier has removed it.
        unsafe { bpf_set_retval(-error) };
    }
    FAIL
}

#[inline(always)]
fn to_v4(ctx: &SockAddrContext, keep: bool) -> i32 {
    let Some(socket) = socket(ctx) else {
        return GO_ON;
    };
    let mut addr = ip4(ctx).to_ne_bytes();
    let mut port = port(ctx);
    let answer = to_service(&Sockets4, &socket, &mut addr, &mut port, keep);
    if answer == Answer::Given {
        set_ip4(ctx, u32::from_ne_bytes(addr));
        set_port(ctx, port);
    }
    verdict(answer)
}

#[inline(always)]
fn to_v6(ctx: &SockAddrContext, keep: bool) -> i32 {
    let Some(socket) = socket(ctx) else {
        return GO_ON;
    };
    let words = ip6(ctx);
    let mut port = port(ctx);
    let answer = if is_mapped(&words) {
        let mut addr = words[3].to_ne_bytes();
        let answer = to_service(&Sockets4, &socket, &mut addr, &mut port, keep);
        if answer == Answer::Given {
            set_ip6(ctx, 3, u32::from_ne_bytes(addr));
        }
        answer
    } else {
        let mut addr = bytes(&words);
        let answer = to_service(&Sockets6, &socket, &mut addr, &mut port, keep);
        if answer == Answer::Given {
            set_ip6_all(ctx, &addr);
        }
        answer
    };
    if answer == Answer::Given {
        set_port(ctx, port);
    }
    verdict(answer)
}

#[inline(always)]
fn from_v4(ctx: &SockAddrContext) {
    let Some(socket) = socket(ctx) else { return };
    let mut addr = ip4(ctx).to_ne_bytes();
    let mut port = port(ctx);
    if from_backend(&Sockets4, &socket, &mut addr, &mut port) {
        set_ip4(ctx, u32::from_ne_bytes(addr));
        set_port(ctx, port);
    }
}

#[inline(always)]
fn from_v6(ctx: &SockAddrContext) {
    let Some(socket) = socket(ctx) else { return };
    let words = ip6(ctx);
    let mut port = port(ctx);
    if is_mapped(&words) {
        let mut addr = words[3].to_ne_bytes();
        if from_backend(&Sockets4, &socket, &mut addr, &mut port) {
            set_ip6(ctx, 3, u32::from_ne_bytes(addr));
            set_port(ctx, port);
        }
    } else {
        let mut addr = bytes(&words);
        if from_backend(&Sockets6, &socket, &mut addr, &mut port) {
            set_ip6_all(ctx, &addr);
            set_port(ctx, port);
        }
    }
}

#[inline(always)]
fn is_mapped(words: &[u32; 4]) -> bool {
    words[0] == MAPPED[0] && words[1] == MAPPED[1] && words[2] == MAPPED[2]
}

#[inline(always)]
fn bytes(words: &[u32; 4]) -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 4 {
        let word = words[i].to_ne_bytes();
        let at = i * 4;
        bytes[at] = word[0];
        bytes[at + 1] = word[1];
        bytes[at + 2] = word[2];
        bytes[at + 3] = word[3];
        i += 1;
    }
    bytes
}

/// The context's fields; each is accessed as a word of its own, which is what the verifier takes.
type Field = bpf_sock_addr;

#[inline(always)]
fn ip4(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the context is the kernel's, and the field is readable in the IPv4 hooks.
    unsafe { ptr::read_volatile(&raw const (*ctx.sock_addr).user_ip4) }
}

#[inline(always)]
fn set_ip4(ctx: &SockAddrContext, word: u32) {
    // SAFETY: as in `ip4`; these hooks let programs write it.
    unsafe { ptr::write_volatile(&raw mut (*ctx.sock_addr).user_ip4, word) }
}

#[inline(always)]
fn ip6(ctx: &SockAddrContext) -> [u32; 4] {
    let field: *const Field = ctx.sock_addr;
    // SAFETY: the context is the kernel's, and the field is readable in the IPv6 hooks.
    let words = unsafe { &raw const (*field).user_ip6 }.cast::<u32>();
    let word = |i: usize| {
        // SAFETY: `i` is below 4, the number of words.
        let word = unsafe { words.add(i) };
        // SAFETY: as above.
        unsafe { ptr::read_volatile(word) }
    };
    [word(0), word(1), word(2), word(3)]
}

#[inline(always)]
fn set_ip6(ctx: &SockAddrContext, index: usize, word: u32) {
    // SAFETY: as in `ip6`; these hooks let programs write it.
    let words = unsafe { &raw mut (*ctx.sock_addr).user_ip6 }.cast::<u32>();
    // SAFETY: the callers' indices are below 4.
    let at = unsafe { words.add(index) };
    // SAFETY: as above.
    unsafe { ptr::write_volatile(at, word) }
}

#[inline(always)]
fn set_ip6_all(ctx: &SockAddrContext, addr: &[u8; 16]) {
    let word = |i: usize| {
        u32::from_ne_bytes([
            addr[i * 4],
            addr[i * 4 + 1],
            addr[i * 4 + 2],
            addr[i * 4 + 3],
        ])
    };
    set_ip6(ctx, 0, word(0));
    set_ip6(ctx, 1, word(1));
    set_ip6(ctx, 2, word(2));
    set_ip6(ctx, 3, word(3));
}

#[inline(always)]
fn port(ctx: &SockAddrContext) -> [u8; 2] {
    // SAFETY: as in `ip4`; the field has the port in network order in its first two bytes.
    let word = unsafe { ptr::read_volatile(&raw const (*ctx.sock_addr).user_port) };
    let bytes = word.to_ne_bytes();
    [bytes[0], bytes[1]]
}

#[inline(always)]
fn set_port(ctx: &SockAddrContext, port: [u8; 2]) {
    let word = u32::from(u16::from_ne_bytes(port));
    // SAFETY: as in `set_ip4`.
    unsafe { ptr::write_volatile(&raw mut (*ctx.sock_addr).user_port, word) }
}

macro_rules! sockets {
    ($name:ident, $n:literal, $services:ident, $backends:ident, $members:ident, $affinity:ident,
     $sockets:ident) => {
        struct $name;

        impl Sockets<$n> for $name {
            #[inline(always)]
            fn service(&self, key: &ServiceKey<$n>) -> Option<Service> {
                // SAFETY: user space replaces elements whole, it never changes one in place, and
                // the memory stays an element's until the program ends.
                unsafe { maps::$services.get(key).copied() }
            }

            #[inline(always)]
            fn backend(&self, key: &BackendKey) -> Option<Backend<$n>> {
                // SAFETY: as in `service`.
                unsafe { maps::$backends.get(key).copied() }
            }

            #[inline(always)]
            fn is_member(&self, member: &Member<$n>) -> bool {
                // SAFETY: nothing is read of the element.
                unsafe { maps::$members.get(member) }.is_some()
            }

            #[inline(always)]
            fn affinity(&self, key: &AffinityKey<$n>) -> Option<Affinity<$n>> {
                // SAFETY: as in `socket`.
                unsafe { maps::$affinity.get(key).copied() }
            }

            #[inline(always)]
            fn put_affinity(&self, key: &AffinityKey<$n>, value: &Affinity<$n>) {
                // A client that is not remembered chooses anew.
                let _ = maps::$affinity.insert(key, value, 0);
            }

            #[inline(always)]
            fn now(&self) -> u32 {
                seconds()
            }

            #[inline(always)]
            fn socket(&self, key: &SocketKey<$n>) -> Option<SocketEntry<$n>> {
                // SAFETY: as in `service`; an element that the LRU reuses under this copy yields a
                // mixture of two, none of whose fields addresses memory.
                unsafe { maps::$sockets.get(key).copied() }
            }

            #[inline(always)]
            fn put_socket(&self, key: &SocketKey<$n>, entry: &SocketEntry<$n>) -> bool {
                maps::$sockets.insert(key, entry, 0).is_ok()
            }
        }
    };
}

sockets!(
    Sockets4,
    4,
    SERVICES_V4,
    BACKENDS_V4,
    MEMBERS_V4,
    AFFINITY_V4,
    SOCKETS_V4
);
sockets!(
    Sockets6,
    16,
    SERVICES_V6,
    BACKENDS_V6,
    MEMBERS_V6,
    AFFINITY_V6,
    SOCKETS_V6
);
