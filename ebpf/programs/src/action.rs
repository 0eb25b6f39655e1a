//! An outcome on its way to the end of a program.
//!
//! It goes through memory of a map, so that the verifier forgets which of the many ways led to it:
//! what follows (counting, logging, the verdict) is verified once instead of once for each.

use core::ptr::{from_mut, from_ref};

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC};
use hachi_abi::Reason;
use hachi_datapath::{Outcome, Refusal};

/// Of a device's index: in by it, not out. (The kernel's indices are positive.)
const INWARD: u32 = 1 << 31;

/// An outcome as plain numbers.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Action {
    kind: u32,
    reason: u32,
    ifindex: u32,
}

/// What to do with a packet.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Drop = 0,
    Pass = 1,
    Redirect = 2,
    Answer = 3,
    Forward = 4,
    /// Out by a device as it is, or in ([`Action::inward`]).
    Out = 5,
}

impl Kind {
    /// The return code of a packet that goes nowhere else. UNSPEC, not OK: other programs and
    /// filters of the hook have their say.
    #[inline(always)]
    pub(crate) const fn verdict(self) -> i32 {
        match self {
            Self::Pass => TC_ACT_UNSPEC,
            Self::Drop | Self::Redirect | Self::Answer | Self::Forward | Self::Out => TC_ACT_SHOT,
        }
    }
}

impl Action {
    #[inline(always)]
    pub(crate) fn set(&mut self, outcome: &Outcome) {
        let (kind, ifindex) = match outcome {
            Outcome::Pass(_) => (Kind::Pass, 0),
            Outcome::RedirectPeer { ifindex } => (Kind::Redirect, *ifindex),
            Outcome::Answer => (Kind::Answer, 0),
            Outcome::Forward => (Kind::Forward, 0),
            Outcome::Out { ifindex } => (Kind::Out, *ifindex),
            Outcome::Drop(_) => (Kind::Drop, 0),
        };
        self.put(kind, outcome.reason(), ifindex);
    }

    /// Forwards by the device that the routes name.
    #[inline(always)]
    pub(crate) fn forward(&mut self, ifindex: u32) {
        self.put(Kind::Forward, Reason::Forwarded, ifindex);
    }

    /// Sends an answer out by the device that asked.
    #[inline(always)]
    pub(crate) fn back(&mut self, ifindex: u32) {
        self.put(Kind::Out, Reason::Rejected, ifindex);
    }

    /// Sends the answer to what found no port where it has to go; it counts as what it was. `far`: of
    /// the node's own way to Services.
    #[inline(always)]
    pub(crate) fn refuse(&mut self, refusal: Refusal, ifindex: u32, far: u32) {
        match refusal {
            Refusal::None => {}
            Refusal::Inward => self.put(Kind::Out, Reason::NatExhausted, ifindex | INWARD),
            Refusal::Host => self.put(Kind::Out, Reason::NatExhausted, far),
            Refusal::Outward => self.put(Kind::Forward, Reason::NatExhausted, ifindex),
        }
    }

    #[inline(always)]
    fn put(&mut self, kind: Kind, reason: Reason, ifindex: u32) {
        let action = Self {
            kind: kind as u32,
            reason: reason as u32,
            ifindex,
        };
        // SAFETY: a reference is valid for writes; volatile, so that it is a write.
        unsafe { from_mut(self).write_volatile(action) };
    }

    #[inline(always)]
    fn get(&self) -> Self {
        // SAFETY: a reference is valid for reads; volatile, so that it is a read.
        unsafe { from_ref(self).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn kind(&self) -> Kind {
        match self.get().kind {
            1 => Kind::Pass,
            2 => Kind::Redirect,
            3 => Kind::Answer,
            4 => Kind::Forward,
            5 => Kind::Out,
            _ => Kind::Drop,
        }
    }

    /// The reason's number.
    #[inline(always)]
    pub(crate) fn reason(&self) -> u32 {
        self.get().reason
    }

    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        self.get().ifindex & !INWARD
    }

    /// The flags of a redirect as it is: `BPF_F_INGRESS`, or none.
    #[inline(always)]
    pub(crate) fn inward(&self) -> u32 {
        const { assert!(INWARD >> 31 == BPF_F_INGRESS) };
        self.get().ifindex >> 31
    }
}
