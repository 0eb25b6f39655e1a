//! What a network policy means: domain types, label selectors, and [`evaluate()`], the oracle that
//! every faster implementation is compared with. No I/O, no Kubernetes types.
#![forbid(unsafe_code)]

mod evaluate;
mod labels;
mod model;
mod set;
mod trace;

pub use evaluate::{Decision, Flow, Party, Side, evaluate};
pub use labels::{InvalidSelector, Labels, Operator, Requirement, Selector};
pub use model::{
    Action, ContainerPort, Direction, InvalidBlock, IpBlock, Namespaces, Peer, Peers, PodIdentity,
    Policy, PolicyId, PolicyKind, PortMatch, PortSpec, Ports, Protocol, Rank, Rule, RuleRef,
    Subject, Tier,
};
pub use set::SmallSet;
pub use trace::{RuleTrace, SideTrace, trace};
