//! The datapath over a packet of bytes and maps of the standard library: every rule, for both
//! families, with checksums computed from scratch.

mod flows;
mod fragments;
mod icmp;
mod lab;
mod links;
mod malformed;
mod model;
mod policy;
mod rejects;
mod services;
mod sockets;
mod wire;
