//! The datapath as pure functions: parse, decide, rewrite.
//!
//! Nothing here touches the kernel: packets and maps are the traits [`Packet`] and [`Maps`], which
//! `ebpf/programs` implements with helpers, and the tests with byte vectors and hash maps. One
//! source serves both families; `N` is the length of an address in bytes (4 or 16), and each is
//! compiled on its own.
//!
//! ```text
//! parse ──> conntrack ──hit──> (stale? judge again) ──> rewrite ──> deliver
//!               └─miss─> Service? choose a backend ──> judge ──> track ──> rewrite ──> deliver
//! ```
//!
//! The shape of the code is the verifier's: functions that are not inlined return one register
//! (`Result<(), Reason>`, `bool`) and leave everything else in [`Scratch`], which lives outside
//! the 512 bytes of stack.
#![no_std]
#![forbid(unsafe_code)]

mod begin;
mod checksum;
mod conntrack;
mod crc32c;
mod deliver;
mod ethernet;
mod exhausted;
mod express;
mod family;
mod from_net;
mod from_pod;
mod hash;
mod host;
mod icmp;
mod ip;
mod judge;
mod link;
mod nat;
mod open;
mod overlay;
mod parse;
mod reject;
mod rewrite;
mod scratch;
mod service;
mod socket;
mod to_net;
mod to_pod;
mod traits;

pub use checksum::adjusted;
pub use deliver::{hop, longest};
pub use ethernet::ETH_LEN;
pub use exhausted::{Refusal, refuse};
pub use express::{Express, depart, express};
pub use family::{Family, V4, V6};
pub use from_net::from_net;
pub use from_pod::from_pod;
pub use host::{from_host, to_host, to_self};
pub use link::{Frame, frame, network_frame, overlay_frame};
pub use overlay::{from_overlay, to_overlay};
pub use parse::{Kind, Parsed};
pub use scratch::{Event, Scratch};
pub use socket::{Answer, Socket, Sockets, from_backend, to_service};
pub use to_net::to_net;
pub use to_pod::to_pod;
pub use traits::{Maps, Packet, Part};

use hachi_abi::Reason;

/// What becomes of a packet. The programs turn it into a return code in one match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Goes on to the host's stack (from a Pod), or to the Pod (out of the host's stack).
    Pass(Reason),
    /// Goes straight into the namespace of the peer of this interface.
    RedirectPeer {
        /// Index of the veth's host side.
        ifindex: u32,
    },
    /// Goes on to another node, or to the outside, past the host's stack where that can be.
    Forward,
    /// Goes out by this device as it is: into the tunnel to another node, or on the way between the node
    /// and Services.
    Out {
        /// Index of the device.
        ifindex: u32,
    },
    /// Has become its own answer, and goes back into the namespace that it came from.
    Answer,
    /// Ends here.
    Drop(Reason),
}

impl Outcome {
    /// The reason to count.
    #[must_use]
    #[inline(always)]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Pass(reason) | Self::Drop(reason) => *reason,
            Self::RedirectPeer { .. } => Reason::DeliveredLocal,
            Self::Forward | Self::Out { .. } => Reason::Forwarded,
            Self::Answer => Reason::Rejected,
        }
    }
}
