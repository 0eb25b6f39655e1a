//! The datapath over a packet of bytes and maps of the standard library: every rule, for both
//! families, with checksums computed from scratch.

#[path = "../../../../agent/compile/tests/property/cases.rs"]
mod cases;
mod express;
#[path = "../../../../agent/compile/tests/property/flow.rs"]
mod flow;
mod flows;
mod fragments;
mod host;
mod icmp;
mod lab;
mod links;
mod malformed;
mod model;
mod nat;
mod nat_model;
mod oracle;
mod overlay;
mod policy;
mod rejects;
#[path = "../../../../agent/compile/tests/property/rng.rs"]
mod rng;
mod services;
mod sockets;
mod tables;
mod uplinks;
mod wire;
#[path = "../../../../agent/compile/tests/property/world/mod.rs"]
#[expect(dead_code, reason = "the compiler's own tests use all of it")]
mod world;
