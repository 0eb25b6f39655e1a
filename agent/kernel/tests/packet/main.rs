//! The real programs on made packets (BPF_PROG_TEST_RUN): what they decide, what they rewrite and
//! what they count, for both families.
//!
//! Every packet is judged with exactly one counter rising by one packet of the right length: see
//! [`lab::Lab::send`].

#[path = "../support/mod.rs"]
mod support;

mod conntrack;
mod crowd;
#[path = "../../../compile/tests/property/flow.rs"]
mod flow;
mod fragments;
mod full;
mod icmp;
mod lab;
mod logs;
mod malformed;
mod oracle;
mod policy;
mod pool;
#[path = "../../../compile/tests/property/rng.rs"]
mod rng;
mod services;
mod spoofing;
mod uplinks;
mod wire;
#[path = "../../../compile/tests/property/world/mod.rs"]
#[expect(dead_code, reason = "the compiler's own tests use all of it")]
mod world;
mod xdp;
