//! The local cluster: nodes and Pods as network namespaces on one machine, with the real plugin and
//! the real agent, and an API double that kubectl and the agents talk to.
//!
//! ```text
//!   kubectl ──> API (127.0.0.1) <── bridge <── agents (one process a node)
//!                 │                              ^ socket
//!            kubelets ──CNI──> hachi-cni ────────┘
//!                 └──> hachi-pod serve (one process a Pod)
//! ```
//! [`Cluster`] is what tests use; `hachi-cluster` keeps one running in the background. All that a
//! cluster makes lives by open descriptors and by processes that die with their parent, so nothing
//! stays behind however it ends; see [`cleanup`] for the few things that need removing.
//!
//! Nothing outside the cluster's own namespaces is changed, except for symbolic links below
//! `/run/netns`, a cgroup, and the directory that the cluster was given.
#![forbid(unsafe_code)]

mod agent;
mod api;
pub mod bed;
pub mod cgroup;
pub mod cleanup;
pub mod client;
mod cluster;
pub mod cni;
pub mod command;
pub mod demo;
pub mod enter;
pub mod image;
mod kubelet;
pub mod machine;
pub mod matrix;
mod mntns;
pub mod names;
pub mod netns;
mod node;
pub mod options;
mod pod;
mod run;
pub mod spawn;
pub mod state;
pub mod workload;

pub use agent::{ask, capabilities, status};
pub use cluster::{Cluster, NetnsRef, eventually};
pub use kubelet::Running;
pub use mntns::Mntns;
pub use names::ClusterId;
pub use netns::Netns;
pub use node::Node;
pub use options::{Family, Kubelets, Network, Options, Server};
pub use pod::{PHASE_ANNOTATION, READY_ANNOTATION};
pub use state::State;
pub use workload::probe::{Outcome, Protocol, Target};
