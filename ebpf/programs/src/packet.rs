//! A socket buffer as the datapath's [`Packet`], by helpers alone: they work on linear and paged
//! buffers alike, and the verifier needs no proof of bounds.

use core::{ffi::c_void, mem::MaybeUninit};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM},
    helpers::{
        bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_change_tail, bpf_skb_load_bytes,
        bpf_skb_store_bytes,
    },
};
use hachi_datapath::{Packet, Part};

/// Bytes that addresses can be read from a word at a time.
#[repr(align(8))]
struct Aligned<const L: usize>([u8; L]);

/// The packet of a tc program.
pub(crate) struct Skb {
    raw: *mut __sk_buff,
}

impl Skb {
    /// `raw` must be the program's context.
    #[inline(always)]
    pub(crate) fn new(raw: *mut __sk_buff) -> Self {
        Self { raw }
    }

    #[inline(always)]
    fn raw(&self) -> *mut __sk_buff {
        self.raw
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: the kernel hands a valid context to the program for its whole run.
        unsafe { (*self.raw()).len }
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        // SAFETY: as in `len` (Linux 5.7).
        unsafe { (*self.raw()).gso_size }
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: as in `len`.
        unsafe { (*self.raw()).ifindex }
    }

    #[inline(always)]
    fn is_own(&self) -> bool {
        // SAFETY: as in `len`.
        unsafe { (*self.raw()).ingress_ifindex == 0 }
    }

    #[inline(always)]
    fn vlan_present(&self) -> bool {
        // SAFETY: as in `len`.
        unsafe { (*self.raw()).vlan_present != 0 }
    }

    #[inline(always)]
    fn load<const L: usize>(&self, offset: usize) -> Option<[u8; L]> {
        let mut bytes = MaybeUninit::<Aligned<L>>::uninit();
        // SAFETY: the helper writes exactly `L` bytes to an array of `L` bytes, or fails.
        let failed = unsafe {
            bpf_skb_load_bytes(
                self.raw().cast::<c_void>(),
                offset as u32,
                bytes.as_mut_ptr().cast::<c_void>(),
                L as u32,
            )
        };
        if failed != 0 {
            return None;
        }
        // SAFETY: the helper has written all of it.
        let Aligned(bytes) = unsafe { bytes.assume_init() };
        Some(bytes)
    }

    #[inline(always)]
    fn store<const L: usize>(&mut self, offset: usize, bytes: &[u8; L], resum: bool) -> bool {
        let flags = if resum {
            u64::from(BPF_F_RECOMPUTE_CSUM)
        } else {
            0
        };
        // SAFETY: the helper reads exactly `L` bytes from an array of `L` bytes; it invalidates
        // pointers into the packet, of which this crate holds none.
        let failed = unsafe {
            bpf_skb_store_bytes(
                self.raw(),
                offset as u32,
                bytes.as_ptr().cast::<c_void>(),
                L as u32,
                flags,
            )
        };
        failed == 0
    }

    #[inline(always)]
    fn adjust_l3_checksum(&mut self, offset: usize, difference: u32) -> bool {
        // SAFETY: no pointer but the context; a size of 0 means that `difference` is one.
        unsafe { bpf_l3_csum_replace(self.raw(), offset as u32, 0, u64::from(difference), 0) == 0 }
    }

    #[inline(always)]
    fn adjust_l4_checksum(
        &mut self,
        offset: usize,
        difference: u32,
        part: Part,
        udp: bool,
    ) -> bool {
        let mut flags = 0;
        if part == Part::Pseudo {
            flags |= u64::from(BPF_F_PSEUDO_HDR);
        }
        if udp {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        // SAFETY: as in `adjust_l3_checksum`.
        unsafe {
            bpf_l4_csum_replace(self.raw(), offset as u32, 0, u64::from(difference), flags) == 0
        }
    }

    #[inline(always)]
    fn resize(&mut self, len: u32) -> bool {
        // SAFETY: as in `adjust_l3_checksum`.
        unsafe { bpf_skb_change_tail(self.raw(), len, 0) == 0 }
    }
}
