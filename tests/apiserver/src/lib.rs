//! A stand-in for kube-apiserver and for the controllers that a local cluster needs.
//!
//! It serves kubectl and the agent's watches over HTTPS, and its owner through [`Store`]. Storage
//! is generic over JSON objects and in memory; what is particular about a kind is in the
//! [`resource`] table, in its defaults and its validation.
//!
//! ```text
//!  kubectl, agent ── HTTPS ──> http ──> admission (defaults, validation, addresses)
//!                                            │
//!        the harness ── Store ───────────────┤
//!                                            v
//!  controllers <── watch ── store: objects, one version counter, a history of events per kind
//!  (scheduler, EndpointSlices, namespaces)
//! ```
#![forbid(unsafe_code)]

mod admission;
mod alloc;
mod clock;
mod config;
mod controllers;
mod failure;
mod http;
mod json;
mod patch;
pub mod resource;
mod server;
mod store;
mod tls;

pub use config::{Config, Grant, Rule, StartError};
pub use failure::{About, Cause, Failure};
pub use resource::Resource;
pub use server::{Handle, Server};
pub use store::{Change, Event, Object, Since, Store, Watch};
