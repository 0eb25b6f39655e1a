//! The real programs on made packets (BPF_PROG_TEST_RUN): what they decide, what they rewrite and
//! what they count, for both families.
//!
//! Every packet is judged with exactly one counter rising by one packet of the right length: see
//! [`lab::Lab::send`].

#[path = "../support/mod.rs"]
mod support;

mod conntrack;
mod fragments;
mod full;
mod icmp;
mod lab;
mod logs;
mod malformed;
mod policy;
mod pool;
mod services;
mod spoofing;
mod uplinks;
mod wire;
