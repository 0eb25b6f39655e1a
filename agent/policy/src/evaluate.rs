//! The oracle: what the policies of a cluster say of one flow, written for clarity and straight from
//! the API documentation. It looks at everything every time.
//!
//! Precedence:
//! 1. A Pod always reaches itself.
//! 2. Traffic leaves a source that is no Pod, or that no policy isolates for egress. Otherwise a rule
//!    of one of the policies that isolate it must allow the destination and its port.
//! 3. Traffic enters a destination that is no Pod, or that no policy isolates for ingress, or whose
//!    own node is the source. Otherwise a rule of one of the policies that isolate it must allow the
//!    source and the port.
//! 4. Both 2 and 3 must hold.

use std::net::IpAddr;

use crate::model::{Direction, Peers, PodIdentity, Policy, Ports, Rule, RuleRef};

/// One end of a flow.
#[derive(Clone, Copy, Debug)]
pub struct Party<'a> {
    /// Address.
    pub address: IpAddr,
    /// The Pod that has the address. Pods on the host's network have none of their own.
    pub pod: Option<&'a PodIdentity>,
}

/// The first packet of a flow, after a Service's address became a backend's.
#[derive(Clone, Copy, Debug)]
pub struct Flow<'a> {
    /// Who opens it.
    pub source: Party<'a>,
    /// Who is to answer.
    pub destination: Party<'a>,
    /// Whether the source is the node that the destination runs on.
    pub from_own_node: bool,
    /// IANA protocol number.
    pub protocol: u8,
    /// Destination port; 0 for protocols without ports.
    pub port: u16,
}

/// What one side says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// No policy has a say: there is no Pod, or none isolates it, or the flow is exempt.
    NotIsolated,
    /// These rules allow it, in the order of their policies.
    Allowed(Vec<RuleRef>),
    /// Isolated, and no rule allows it.
    Denied,
}

/// The verdict of both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Of the policies of the source.
    pub egress: Side,
    /// Of the policies of the destination.
    pub ingress: Side,
}

impl Decision {
    /// Whether the flow may pass.
    #[must_use]
    pub fn allowed(&self) -> bool {
        self.egress != Side::Denied && self.ingress != Side::Denied
    }
}

/// Judges a flow.
#[must_use]
pub fn evaluate<'p>(
    policies: impl IntoIterator<Item = &'p Policy> + Clone,
    flow: &Flow<'_>,
) -> Decision {
    if flow.source.address == flow.destination.address {
        return Decision {
            egress: Side::NotIsolated,
            ingress: Side::NotIsolated,
        };
    }
    let egress = side(policies.clone(), Direction::Egress, flow);
    let ingress = if flow.from_own_node {
        Side::NotIsolated
    } else {
        side(policies, Direction::Ingress, flow)
    };
    Decision { egress, ingress }
}

fn side<'p>(
    policies: impl IntoIterator<Item = &'p Policy>,
    direction: Direction,
    flow: &Flow<'_>,
) -> Side {
    let (subject, peer) = match direction {
        Direction::Ingress => (flow.destination, flow.source),
        Direction::Egress => (flow.source, flow.destination),
    };
    let Some(pod) = subject.pod else {
        return Side::NotIsolated;
    };
    let mut isolated = false;
    let mut allowing = Vec::new();
    for policy in policies {
        let Some(rules) = policy.rules(direction) else {
            continue;
        };
        if !policy.subject.selects(pod) {
            continue;
        }
        isolated = true;
        for (index, rule) in rules.iter().enumerate() {
            if names_peer(rule, &peer) && names_port(rule, flow) {
                allowing.push(policy.rule_ref(direction, index));
            }
        }
    }
    allowing.sort();
    match (isolated, allowing.is_empty()) {
        (false, _) => Side::NotIsolated,
        (true, false) => Side::Allowed(allowing),
        (true, true) => Side::Denied,
    }
}

fn names_peer(rule: &Rule, peer: &Party<'_>) -> bool {
    match &rule.peers {
        Peers::Any => true,
        Peers::Listed(peers) => peers.iter().any(|p| p.matches(peer.address, peer.pod)),
    }
}

fn names_port(rule: &Rule, flow: &Flow<'_>) -> bool {
    match &rule.ports {
        Ports::Any => true,
        Ports::Listed(ports) => ports
            .iter()
            .any(|p| p.matches(flow.protocol, flow.port, flow.destination.pod)),
    }
}

#[cfg(test)]
mod tests;
