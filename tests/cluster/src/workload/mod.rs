//! What runs in Pods: a server that tells its name, probes that ask for it, and a long stream.
//!
//! The protocol is made to be read by people: a UDP reply is `NAME ` and what was sent; a TCP
//! connection whose first bytes are an HTTP request gets a JSON answer, every other one gets the line
//! `NAME` and then its own bytes back.

pub mod arrivals;
pub mod ask;
pub mod asker;
pub mod hold;
pub mod load;
pub mod ping;
pub mod probe;
pub mod pulse;
mod sctp;
pub mod serve;
pub mod share;
pub mod stream;
pub mod wire;
