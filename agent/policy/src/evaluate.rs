//! The oracle: what the policies of a cluster say of one flow, written for clarity and straight from
//! the API documentation. It looks at everything every time.
//!
//! Precedence:
//! 1. A Pod always reaches itself at its own address.
//! 2. Both sides must let the flow pass: the source's for egress (4), the destination's for ingress
//!    (3, 4).
//! 3. Traffic enters a Pod whose own node is the source.
//! 4. A side without a Pod lets everything pass. Otherwise the policies that select its Pod in this
//!    direction are asked, tier by tier:
//!    1. Admin: the policies by priority, of equals by id, their rules in order. The first rule that
//!       matches decides: Accept lets the flow pass and Deny drops it; Pass goes on with the next
//!       tier, past what is left of this one.
//!    2. `NetworkPolicy`: if any selects the Pod, the flow passes if a rule of one of them matches, and
//!       is dropped otherwise. Either way the next tier is not asked.
//!    3. Baseline: as Admin; Pass lets the flow pass.
//!    4. What nobody decided passes.

use std::net::IpAddr;

use crate::model::{Action, Direction, Peers, PodIdentity, Policy, Ports, Rule, RuleRef, Tier};

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
    /// No policy has a say: there is no Pod, or nothing isolates it and no rule matches, or the flow is
    /// exempt.
    NotIsolated,
    /// These rules accept it. Of `NetworkPolicy` all that do, in the order of their policies; of the
    /// other tiers the first.
    Allowed(Vec<RuleRef>),
    /// This rule denies it; without one, the Pod is isolated and no rule of a `NetworkPolicy` accepts.
    Denied(Option<RuleRef>),
}

impl Side {
    /// Whether the flow may pass, as far as this side goes.
    #[must_use]
    pub const fn allows(&self) -> bool {
        !matches!(self, Self::Denied(_))
    }
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
        self.egress.allows() && self.ingress.allows()
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
    let one = |policies, direction, subject| {
        let selecting = selected(policies, direction, subject);
        side(&selecting, direction, flow)
    };
    Decision {
        egress: one(policies.clone(), Direction::Egress, &flow.source),
        ingress: if flow.from_own_node {
            Side::NotIsolated
        } else {
            one(policies, Direction::Ingress, &flow.destination)
        },
    }
}

/// The policies that have a say in a side, in the order in which they are asked.
pub(crate) fn selected<'p>(
    policies: impl IntoIterator<Item = &'p Policy>,
    direction: Direction,
    subject: &Party<'_>,
) -> Vec<&'p Policy> {
    let Some(pod) = subject.pod else {
        return Vec::new();
    };
    let mut selecting: Vec<&Policy> = policies
        .into_iter()
        .filter(|p| p.rules(direction).is_some() && p.subject.selects(pod))
        .collect();
    selecting.sort_by_key(|policy| (policy.rank, &policy.id));
    selecting
}

pub(crate) fn side(selecting: &[&Policy], direction: Direction, flow: &Flow<'_>) -> Side {
    let peer = match direction {
        Direction::Ingress => flow.source,
        Direction::Egress => flow.destination,
    };
    let of = |tier: Tier| {
        let policies = selecting.iter().filter(move |p| p.rank.tier == tier);
        policies.flat_map(|policy| {
            let rules = policy.rules(direction).into_iter().flatten().enumerate();
            rules.map(|(index, rule)| (policy.rule_ref(direction, index), rule))
        })
    };
    let matching =
        |tier| of(tier).filter(|(_, rule)| names_peer(rule, &peer) && names_port(rule, flow));
    let first = |tier| {
        let (name, rule) = matching(tier).next()?;
        match rule.action {
            Action::Accept => Some(Side::Allowed(vec![name])),
            Action::Deny => Some(Side::Denied(Some(name))),
            Action::Pass => None,
        }
    };
    if let Some(decided) = first(Tier::Admin) {
        return decided;
    }
    if selecting.iter().any(|p| p.rank.tier == Tier::Network) {
        let accepting: Vec<RuleRef> = matching(Tier::Network).map(|(name, _)| name).collect();
        return if accepting.is_empty() {
            Side::Denied(None)
        } else {
            Side::Allowed(accepting)
        };
    }
    first(Tier::Baseline).unwrap_or(Side::NotIsolated)
}

pub(crate) fn names_peer(rule: &Rule, peer: &Party<'_>) -> bool {
    match &rule.peers {
        Peers::Any => true,
        Peers::Listed(peers) => peers.iter().any(|p| p.matches(peer.address, peer.pod)),
    }
}

pub(crate) fn names_port(rule: &Rule, flow: &Flow<'_>) -> bool {
    match &rule.ports {
        Ports::Any => true,
        Ports::Listed(ports) => ports
            .iter()
            .any(|p| p.matches(flow.protocol, flow.port, flow.destination.pod)),
    }
}

#[cfg(test)]
mod tests;
