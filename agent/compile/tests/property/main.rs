//! Random clusters, policies and flows: what the compiled maps say through the datapath's own
//! functions is what the oracle says, in every state on the way from one image to the next.
//!
//! A failure prints the seed, which alone makes the case.

mod cases;
mod flow;
mod images;
mod maps;
mod rng;
mod services;
mod transitions;
mod verdicts;
mod world;
