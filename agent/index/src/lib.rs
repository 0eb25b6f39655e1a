//! Kubernetes objects in, one desired state of this node out. No I/O.
//!
//! ```text
//! Object ─ parse ─> compact record ─┬─ addresses -> Pod identities ──┐
//!  (apply, delete, reset)           ├─ Services + EndpointSlices ────┼─> Desired
//! Endpoint (add, remove) ───────────┴─ endpoints x policies, ports ──┘
//! ```
//!
//! An object is parsed into own types when it comes in and then dropped. What cannot be understood
//! is listed by [`Index::problems`] together with what was done instead, and fails closed: a peer or
//! a port that makes no sense matches nothing, a policy whose subject makes no sense isolates its
//! whole namespace.
#![forbid(unsafe_code)]

mod addresses;
mod endpoints;
mod host_ports;
mod index;
mod model;
mod object;
mod parse;
mod services;
mod shards;
mod topology;

pub use host_ports::pod_of_host_ports;
pub use index::Index;
pub use model::{
    Desired, DesiredEndpoint, Endpoint, EndpointKey, Enforcement, HealthCheck, HostPort, Name,
    Node, PodName, Service, ServicePort,
};
pub use object::{Kind, Object, Problem};
pub use parse::ADDRESSES_ANNOTATION;
pub use shards::Shards;
