//! What xtask and the guest's init say to each other: a plan in, marked lines out.
//!
//! ```text
//! xtask ──/plan──> init: "module PATH", "env NAME=VALUE", "test NAME LIMIT DIRECTORY PROGRAM ARGS..."
//! init ──ttyS1──> xtask: "@up", "@begin NAME", the test's own output, "@end NAME STATUS MILLISECONDS", "@done"
//! ```
//! Nothing in the plan has white space in it, so a line is split at blanks.

/// The plan's path in the guest.
pub(crate) const PLAN: &str = "/plan";
/// The first word: the kernel has booted.
pub(crate) const UP: &str = "@up";
/// Before a test.
pub(crate) const BEGIN: &str = "@begin ";
/// After a test.
pub(crate) const END: &str = "@end ";
/// After the last one.
pub(crate) const DONE: &str = "@done";
/// The plan's words.
pub(crate) const MODULE: &str = "module";
/// The plan's words.
pub(crate) const ENV: &str = "env";
/// The plan's words.
pub(crate) const TEST: &str = "test";
/// The plan's word for a test without which the later ones make no sense.
pub(crate) const GATE: &str = "gate";
/// The plan's word that makes init hang, to see that it is noticed.
pub(crate) const HANG: &str = "hang";
