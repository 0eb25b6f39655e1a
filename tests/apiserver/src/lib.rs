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
//!
//! # How it differs from the real one
//! What Hachi counts on is stated in the suite `cluster_apiserver`, which holds this server and, where
//! the machine has them, the real etcd and kube-apiserver to the same words. What is known to be
//! otherwise here:
//! - Only the kinds of the [`resource`] table are served, each in one version; of custom resources
//!   ClusterNetworkPolicy alone. There are no webhooks, quotas, TokenRequests or API priorities.
//! - Rights are given at the start ([`Grant`]), not by RBAC objects.
//! - Objects have no `managedFields`. Only who applies owns fields, so an apply never conflicts with an
//!   update, and lists of every kind are merged by the keys of the built-in kinds' lists.
//! - An unknown field of a built-in kind whose value is null is not told of. Apply patches are JSON
//!   alone, not any YAML.
//! - Definitions are established at once. A schema with patterns, defaults, formats but times, `oneOf` and
//!   the like, or rules beyond a little of CEL, is refused rather than checked by half; a flaw that
//!   a custom resource had before is refused as a new one is.
//! - A healthCheckNodePort that is taken is an invalid value, not an internal error.
//! - Lists are of the newest version whatever version is asked for, further pages too. Bookmarks come
//!   every 5 s, not every minute; a watch from a version that is yet to come is refused at once.
//! - What a message says of a value that could not be decoded is in each server's own words.
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
pub use controllers::endpoints::{Slice, slices};
pub use failure::{About, Cause, Failure};
pub use resource::Resource;
pub use server::{Handle, Server};
pub use store::{Change, Event, Object, Since, Store, Watch};
