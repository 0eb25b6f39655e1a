//! Why a flow is judged as it is: every rule that applies to a side, what it matches of the flow, and
//! which decided.

use crate::{
    evaluate::{Flow, Side, names_peer, names_port, selected, side},
    model::{Action, Direction, Policy, Rank, RuleRef},
};

/// One rule of a policy that selects the Pod of a side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleTrace {
    /// The rule.
    pub rule: RuleRef,
    /// When its policy is asked.
    pub rank: Rank,
    /// What it does with what it matches.
    pub action: Action,
    /// Whether its peers include the other side.
    pub peer: bool,
    /// Whether its ports include the flow's.
    pub port: bool,
    /// Whether it is, or is one of, the rules that decided.
    pub decided: bool,
}

impl RuleTrace {
    /// Whether the flow is matched, and the rule spoken of at all.
    #[must_use]
    pub const fn matches(&self) -> bool {
        self.peer && self.port
    }

    /// Whether only one of peer and port fails: what a person who expected another verdict looks for.
    #[must_use]
    pub const fn nearly(&self) -> bool {
        self.peer != self.port
    }
}

/// One side of a flow, explained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideTrace {
    /// What the side says.
    pub side: Side,
    /// The policies that select its Pod in this direction, in the order in which they are asked.
    pub policies: Vec<(Rank, crate::PolicyId)>,
    /// Their rules, in the same order.
    pub rules: Vec<RuleTrace>,
}

/// Explains one side of a flow. Exemptions that depend on both sides (a Pod reaches itself, its node
/// reaches it) are those of [`evaluate`](crate::evaluate()), not of a side.
#[must_use]
pub fn trace<'p>(
    policies: impl IntoIterator<Item = &'p Policy>,
    direction: Direction,
    flow: &Flow<'_>,
) -> SideTrace {
    let (subject, peer) = match direction {
        Direction::Ingress => (flow.destination, flow.source),
        Direction::Egress => (flow.source, flow.destination),
    };
    let selecting = selected(policies, direction, &subject);
    let side = side(&selecting, direction, flow);
    let deciding: &[RuleRef] = match &side {
        Side::Allowed(rules) => rules,
        Side::Denied(rule) => rule.as_slice(),
        Side::NotIsolated => &[],
    };
    let mut rules = Vec::new();
    for policy in &selecting {
        for (index, rule) in policy.rules(direction).into_iter().flatten().enumerate() {
            let name = policy.rule_ref(direction, index);
            rules.push(RuleTrace {
                decided: deciding.contains(&name),
                rule: name,
                rank: policy.rank,
                action: rule.action,
                peer: names_peer(rule, &peer),
                port: names_port(rule, flow),
            });
        }
    }
    SideTrace {
        policies: selecting.iter().map(|p| (p.rank, p.id.clone())).collect(),
        rules,
        side,
    }
}
