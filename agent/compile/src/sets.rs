//! Policy sets: all rules that select a Pod in one direction, and the map entries they become.
//!
//! The content of a set does not depend on which classes there are. Neither do the shapes that are
//! derived from it, so that a class may come and go without a write to the endpoints.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use hachi_abi::{PolicyEntry, PolicyKey, SET_ALLOW_ALL, SHAPE_ANY_PROTO, Shapes, Verdict};
use hachi_index::{Desired, EndpointKey, Enforcement};
use hachi_policy::{Direction, Peers, PodIdentity, Policy, PortSpec, Ports, Protocol, RuleRef};

use crate::{classes::Classes, hash, ports::prefixes};

/// The id of a set that has no entries: it denies everything.
pub const SET_QUARANTINE: u32 = u32::MAX;

/// The content of a set. Rules are in the order of their policies.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Content {
    pub(crate) rules: Vec<SetRule>,
}

/// A rule as it applies to the Pods of one set.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SetRule {
    pub(crate) rule: RuleRef,
    pub(crate) peers: Peers,
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
        let mut isolated = false;
        let mut set = Vec::new();
        for policy in policies {
            let Some(rules) = policy.rules(direction) else {
                continue;
            };
            isolated = true;
            for (index, rule) in rules.iter().enumerate() {
                set.push(SetRule {
                    rule: policy.rule_ref(direction, index),
                    peers: rule.peers.clone(),
                    ports: set_ports(&rule.ports, direction, pod),
                });
            }
        }
        isolated.then_some(Self { rules: set })
    }

    /// Every shape that an entry of the set can have.
    pub(crate) fn shapes(&self) -> Shapes {
        self.rules
            .iter()
            .flat_map(|r| &r.ports)
            .fold(0, |shapes, port| shapes | port.shape())
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

/// All sets of the node, and who has which.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    pub(crate) contents: Vec<Content>,
    pub(crate) ids: Vec<u32>,
    /// Ingress and egress.
    pub(crate) of: BTreeMap<EndpointKey, [SetOf; 2]>,
    /// Ids of all rules.
    pub(crate) rules: BTreeMap<RuleRef, u32>,
}

impl Sets {
    pub(crate) fn collect(desired: &Desired) -> Self {
        let mut sets = Self::default();
        let mut known: HashMap<Content, usize> = HashMap::new();
        // Pods alike get the same content, so it is made once.
        let mut seen: HashMap<*const PodIdentity, [SetOf; 2]> = HashMap::new();
        for (key, endpoint) in &desired.endpoints {
            let of = match &endpoint.enforcement {
                Enforcement::Quarantined => [SetOf::Quarantine; 2],
                Enforcement::Unmanaged => [SetOf::AllowAll; 2],
                Enforcement::Pod { identity, policies } => {
                    *seen.entry(Arc::as_ptr(identity)).or_insert_with(|| {
                        [Direction::Ingress, Direction::Egress].map(|direction| {
                            let Some(content) = Content::new(policies, direction, identity) else {
                                return SetOf::AllowAll;
                            };
                            let next = sets.contents.len();
                            let at = *known.entry(content.clone()).or_insert(next);
                            if at == next {
                                sets.contents.push(content);
                            }
                            SetOf::At(at)
                        })
                    })
                }
            };
            sets.of.insert(key.clone(), of);
        }
        let hashes: Vec<u64> = sets.contents.iter().map(hash::stable).collect();
        sets.ids = hash::assign(&hashes, &[SET_ALLOW_ALL, SET_QUARANTINE], |a, b| {
            sets.contents[a].cmp(&sets.contents[b])
        });
        sets.name_rules();
        sets
    }

    fn name_rules(&mut self) {
        let rules: BTreeSet<&RuleRef> = self
            .contents
            .iter()
            .flat_map(|c| &c.rules)
            .map(|r| &r.rule)
            .collect();
        let rules: Vec<RuleRef> = rules.into_iter().cloned().collect();
        let hashes: Vec<u64> = rules.iter().map(hash::stable).collect();
        let ids = hash::assign(&hashes, &[hachi_abi::RULE_NONE], |a, b| a.cmp(&b));
        self.rules = rules.into_iter().zip(ids).collect();
    }

    /// The id and the shapes of an endpoint's set.
    pub(crate) fn resolve(&self, of: SetOf) -> (u32, Shapes) {
        match of {
            SetOf::AllowAll => (SET_ALLOW_ALL, 0),
            SetOf::Quarantine => (SET_QUARANTINE, 0),
            SetOf::At(at) => (self.ids[at], self.contents[at].shapes()),
        }
    }

    /// The entries of one set for all classes.
    pub(crate) fn entries(
        &self,
        at: usize,
        classes: &Classes<'_>,
    ) -> BTreeMap<PolicyKey, PolicyEntry> {
        let set = self.ids[at];
        let mut entries = BTreeMap::new();
        // A class that may use every protocol needs no other entry.
        let mut open = BTreeSet::new();
        let rules = &self.contents[at].rules;
        for rule in rules.iter().filter(|r| r.ports.contains(&SetPort::Any)) {
            for class in classes.of_peers(&rule.peers) {
                if open.insert(class) {
                    let key = PolicyKey {
                        set,
                        class: classes.id(class),
                        ..PolicyKey::default()
                    };
                    entries.insert(key, self.allow(rule));
                }
            }
        }
        for rule in rules {
            for class in classes.of_peers(&rule.peers) {
                if open.contains(&class) {
                    continue;
                }
                let mut put = |proto, port: u16, plen| {
                    let class = classes.id(class);
                    let key = PolicyKey {
                        set,
                        class,
                        port: port.to_be_bytes(),
                        plen,
                        proto,
                    };
                    entries.entry(key).or_insert_with(|| self.allow(rule));
                };
                for port in &rule.ports {
                    match port {
                        SetPort::Any => {}
                        SetPort::Prefix { proto, port, plen } => put(*proto, *port, *plen),
                        SetPort::Named { name, protocol } => classes
                            .resolve(class, name, *protocol)
                            .for_each(|port| put(protocol.number(), port, 16)),
                    }
                }
            }
        }
        entries
    }

    fn allow(&self, rule: &SetRule) -> PolicyEntry {
        let rule = self
            .rules
            .get(&rule.rule)
            .copied()
            .unwrap_or(hachi_abi::RULE_NONE);
        PolicyEntry {
            verdict: Verdict::Allow as u32,
            rule,
        }
    }
}
