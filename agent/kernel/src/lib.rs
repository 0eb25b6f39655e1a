//! The datapath as seen from user space: load, attach, pin, write, read back.
//!
//! The only crate that uses aya. It takes the compiler's ordered writes and returns what the maps
//! hold; it knows nothing of Pods or policies.
//!
//! ```text
//!              Op, Op, Op ──> apply ──> BPF_MAP_UPDATE_BATCH ──> pinned maps <── programs
//!   Image <── snapshot <── BPF_MAP_LOOKUP_BATCH <──────────────────┘              │ tcx or clsact
//!   counters, conntrack, use of the maps <─────────────────────────┘              v
//!                                                          pinned links on the Pods' interfaces
//! ```
//!
//! Whatever an earlier agent left pinned is taken over: maps with their content, links by an
//! atomic change of their program. So the datapath works on while there is no agent.

mod apply;
mod attach;
mod bytes;
mod clsact;
mod conntrack;
mod datapath;
mod error;
mod features;
mod flows;
mod heap;
mod judge;
mod layout;
mod logs;
mod meter;
mod nat;
mod netlink;
mod object;
mod pins;
mod snapshot;
mod sockets;
mod sys;
mod table;
mod takeover;
mod test_run;
mod verify;
mod xdp;

pub use attach::{AttachKind, AttachMode, Hook, Role};
pub use conntrack::Flow;
pub use datapath::{Datapath, LoadOptions};
pub use error::KernelError;
pub use features::{Feature, Features, Finding, Try};
pub use flows::{Flows, Given, Part, Walk};
pub use heap::share_one_heap;
pub use judge::Live;
pub use layout::Capacities;
pub use logs::LogForwarder;
pub use meter::Meter;
pub use nat::Translation;
pub use object::built_with_object;
pub use pins::{DEFAULT_PIN_ROOT, remove_all};
pub use sockets::{SocketHook, SocketLb, cgroup_root, cgroup2_at};
pub use test_run::{Origin, Run};
pub use verify::{Verified, verify};
pub use xdp::XdpMode;
