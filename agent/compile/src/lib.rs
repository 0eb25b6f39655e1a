//! Desired state to map images, and the ordered difference of two images. Pure: no I/O.
//!
//! ```text
//! Desired ─┬─ endpoints x policies ─> sets ──┬─> selectors ─┐
//!          │                                 └─> entries <──┼─ classes ─> PEERS, CIDRS
//!          ├─ peers ────────────────────────────────────────┘
//!          └─ services ─> frontends, slots
//! ```
#![forbid(unsafe_code)]

mod asked;
mod blocks;
mod classes;
mod compile;
mod diff;
mod entries;
mod hash;
mod image;
mod lpm;
mod network;
mod policies;
mod ports;
mod problem;
mod retired;
mod selectors;
mod services;
mod sets;

pub use compile::{Compiled, Compiler, Limits, compile};
pub use diff::diff;
pub use image::{Frontend, Image, Op, Slots, SlotsId};
pub use policies::Policies;
pub use problem::Problem;
pub use retired::{Draining, Retired, Through, is_moved};
pub use services::{Claimant, Claimed, HealthChecks};
pub use sets::SET_QUARANTINE;
