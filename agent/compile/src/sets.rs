//! Policy sets: all rules that select a Pod in one direction.
//!
//! The content of a set does not depend on which classes there are. Neither do the shapes that are
//! derived from it, so that a class may come and go without a write to the endpoints.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use hachi_abi::{SET_ALLOW_ALL, SHAPE_ANY_PROTO, Shapes};
use hachi_index::{Desired, EndpointKey, Enforcement};
use hachi_policy::{
    Action, Direction, Peers, PodIdentity, Policy, PortSpec, Ports, Protocol, RuleRef, Tier,
};

use crate::{hash, ports::prefixes};

/// The id of a set that has no entries: it denies everything.
pub const SET_QUARANTINE: u32 = u32::MAX;

/// The content of a set.
#[derive(Debug)]
pub(crate) struct Content {
    /// In the order in which they are asked.
    pub(crate) rules: Vec<SetRule>,
    /// Whether a `NetworkPolicy` is among the policies, so that what it does not accept is denied.
    pub(crate) isolated: bool,
    pub(crate) hash: u64,
}

/// A rule as it applies to the Pods of one set.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SetRule {
    pub(crate) rule: RuleRef,
    pub(crate) tier: Tier,
    pub(crate) action: Action,
    pub(crate) peers: Peers,
    /// Of the peers that are listed.
    pub(crate) peers_hash: u64,
    pub(crate) ports: BTreeSet<SetPort>,
}

/// A shape of destination port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum SetPort {
    /// Every protocol.
    Any,
    /// Ports of a protocol that begin with the same bits.
    Prefix { proto: u8, port: u16, plen: u8 },
    /// What the peer's Pod calls so; only on egress.
    Named { name: Arc<str>, protocol: Protocol },
}

impl SetPort {
    const fn shape(&self) -> Shapes {
        match self {
            Self::Any => 1 << SHAPE_ANY_PROTO,
            Self::Prefix { plen, .. } => 1 << *plen,
            Self::Named { .. } => 1 << 16,
        }
    }
}

impl Content {
    fn new(policies: &[Arc<Policy>], direction: Direction, pod: &PodIdentity) -> Option<Self> {
        let concerned = || policies.iter().filter(|p| p.rules(direction).is_some());
        concerned().next()?;
        let mut rules = Vec::new();
        for policy in concerned() {
            for (index, rule) in policy.rules(direction).into_iter().flatten().enumerate() {
                rules.push(SetRule {
                    rule: policy.rule_ref(direction, index),
                    tier: policy.rank.tier,
                    action: rule.action,
                    peers: rule.peers.clone(),
                    peers_hash: match &rule.peers {
                        Peers::Any => 0,
                        Peers::Listed(peers) => hash::stable(peers),
                    },
                    ports: set_ports(&rule.ports, direction, pod),
                });
            }
        }
        let isolated = concerned().any(|policy| policy.rank.tier == Tier::Network);
        Some(Self {
            hash: hash::stable(&(&rules, isolated)),
            rules,
            isolated,
        })
    }

    /// What tells contents apart.
    pub(crate) fn order(&self) -> (&[SetRule], bool) {
        (&self.rules, self.isolated)
    }

    /// Every shape that an entry of the set can have.
    pub(crate) fn shapes(&self) -> Shapes {
        let ports = self.rules.iter().flat_map(|r| &r.ports);
        let open = if self.isolated {
            0
        } else {
            SetPort::Any.shape()
        };
        ports.fold(open, |shapes, port| shapes | port.shape())
    }
}

fn set_ports(ports: &Ports, direction: Direction, pod: &PodIdentity) -> BTreeSet<SetPort> {
    let Ports::Listed(ports) = ports else {
        return BTreeSet::from([SetPort::Any]);
    };
    let mut all = BTreeSet::new();
    for port in ports {
        let proto = port.protocol.number();
        let mut range = |first, last| {
            let parts = prefixes(first, last).into_iter();
            all.extend(parts.map(|(port, plen)| SetPort::Prefix { proto, port, plen }));
        };
        match (&port.port, direction) {
            (PortSpec::Any, _) => range(0, u16::MAX),
            (PortSpec::Range(first, last), _) => range(*first, *last),
            (PortSpec::Named(name), Direction::Ingress) => {
                pod.resolve(name, port.protocol)
                    .for_each(|port| range(port, port));
            }
            (PortSpec::Named(name), Direction::Egress) => {
                all.insert(SetPort::Named {
                    name: name.clone(),
                    protocol: port.protocol,
                });
            }
        }
    }
    all
}

/// The set of an endpoint in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SetOf {
    /// Not isolated.
    AllowAll,
    /// Nothing may pass.
    Quarantine,
    /// The set at this index.
    At(usize),
}

/// Contents by what they are made from: the Pod's identity and the policies, both by their address in
/// memory, and kept so that nothing else gets it.
#[derive(Debug, Default)]
struct Known(HashMap<(usize, Vec<usize>), Made>);

#[derive(Clone, Debug)]
struct Made {
    contents: [Option<Arc<Content>>; 2],
    _kept: (Arc<PodIdentity>, Vec<Arc<Policy>>),
}

/// All sets of the node, and who has which.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    pub(crate) contents: Vec<Arc<Content>>,
    pub(crate) ids: Vec<u32>,
    /// Ingress and egress.
    pub(crate) of: BTreeMap<EndpointKey, [SetOf; 2]>,
    /// Ids of all rules.
    pub(crate) rules: Arc<BTreeMap<RuleRef, u32>>,
    /// Rules of all ids.
    pub(crate) names: Arc<BTreeMap<u32, RuleRef>>,
    known: Known,
}

impl Sets {
    /// Looks at all endpoints; true if the contents are not those of before. Those of `refused`
    /// contents, by hash, are quarantined.
    pub(crate) fn collect(&mut self, desired: &Desired, refused: &BTreeSet<u64>) -> bool {
        let mut known = Known::default();
        let mut contents: Vec<Arc<Content>> = Vec::new();
        let mut index: HashMap<u64, Vec<usize>> = HashMap::new();
        let mut of = BTreeMap::new();
        for (key, endpoint) in &desired.endpoints {
            let sets = match &endpoint.enforcement {
                Enforcement::Quarantined => [SetOf::Quarantine; 2],
                Enforcement::Unmanaged => [SetOf::AllowAll; 2],
                Enforcement::Pod { identity, policies } => {
                    let made = self.make(&mut known, identity, policies);
                    let mut intern = |content: &Option<Arc<Content>>| {
                        let Some(content) = content else {
                            return SetOf::AllowAll;
                        };
                        if refused.contains(&content.hash) {
                            return SetOf::Quarantine;
                        }
                        let with = index.entry(content.hash).or_default();
                        let same = with.iter().find(|at| {
                            let other = &contents[**at];
                            Arc::ptr_eq(other, content) || other.order() == content.order()
                        });
                        SetOf::At(same.copied().unwrap_or_else(|| {
                            contents.push(Arc::clone(content));
                            with.push(contents.len() - 1);
                            contents.len() - 1
                        }))
                    };
                    let sets = [intern(&made.contents[0]), intern(&made.contents[1])];
                    if sets.contains(&SetOf::Quarantine) {
                        [SetOf::Quarantine; 2]
                    } else {
                        sets
                    }
                }
            };
            of.insert(key.clone(), sets);
        }
        self.known = known;
        self.of = of;
        let same = self.contents.len() == contents.len()
            && (self.contents.iter().zip(&contents)).all(|(a, b)| Arc::ptr_eq(a, b));
        if same {
            return false;
        }
        self.contents = contents;
        let hashes: Vec<u64> = self.contents.iter().map(|content| content.hash).collect();
        self.ids = hash::assign(&hashes, &[SET_ALLOW_ALL, SET_QUARANTINE], |a, b| {
            self.contents[a].order().cmp(&self.contents[b].order())
        });
        self.name_rules();
        true
    }

    fn make(
        &self,
        known: &mut Known,
        identity: &Arc<PodIdentity>,
        policies: &[Arc<Policy>],
    ) -> Made {
        let pointers = policies.iter().map(|p| Arc::as_ptr(p).addr()).collect();
        let key = (Arc::as_ptr(identity).addr(), pointers);
        if let Some(made) = known.0.get(&key) {
            return made.clone();
        }
        let made = self.known.0.get(&key).cloned().unwrap_or_else(|| Made {
            contents: [Direction::Ingress, Direction::Egress]
                .map(|direction| Content::new(policies, direction, identity).map(Arc::new)),
            _kept: (Arc::clone(identity), policies.to_vec()),
        });
        known.0.insert(key, made.clone());
        made
    }

    fn name_rules(&mut self) {
        let rules = self.contents.iter().flat_map(|c| &c.rules);
        let rules: BTreeSet<&RuleRef> = rules.map(|r| &r.rule).collect();
        if rules.len() == self.rules.len() && rules.iter().all(|r| self.rules.contains_key(r)) {
            return;
        }
        let rules: Vec<RuleRef> = rules.into_iter().cloned().collect();
        let hashes: Vec<u64> = rules.iter().map(hash::stable).collect();
        let ids = hash::assign(&hashes, &[hachi_abi::RULE_NONE], |a, b| a.cmp(&b));
        let pairs = || rules.iter().cloned().zip(ids.iter().copied());
        self.names = Arc::new(pairs().map(|(rule, id)| (id, rule)).collect());
        self.rules = Arc::new(pairs().collect());
    }

    /// The id and the shapes of an endpoint's set.
    pub(crate) fn resolve(&self, of: SetOf) -> (u32, Shapes) {
        match of {
            SetOf::AllowAll => (SET_ALLOW_ALL, 0),
            SetOf::Quarantine => (SET_QUARANTINE, 0),
            SetOf::At(at) => (self.ids[at], self.contents[at].shapes()),
        }
    }
}
