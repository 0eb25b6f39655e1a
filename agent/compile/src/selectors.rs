//! Selectors: the different lists of peers that the rules in force have, and which Pods each matches.
//!
//! A whole list is one selector: what a rule cannot tell apart, its classes need not. A rule with
//! thousands of blocks so has one class for all of them, not one for each.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use hachi_policy::{Namespaces, Peer, Peers, PodIdentity, Protocol, Requirement};

use crate::{
    hash,
    sets::{Content, SetPort},
};

/// A name for ports that the peer's Pod has to resolve.
pub(crate) type PortName = (Arc<str>, Protocol);

/// One list of peers.
#[derive(Debug)]
pub(crate) struct Selector {
    pub(crate) peers: Arc<BTreeSet<Peer>>,
    pub(crate) hash: u64,
    /// Named ports of the egress rules that have this list.
    pub(crate) names: BTreeSet<PortName>,
}

/// All selectors in force.
#[derive(Debug, Default)]
pub(crate) struct Selectors {
    pub(crate) list: Vec<Selector>,
    index: HashMap<Arc<BTreeSet<Peer>>, u32>,
    /// Named ports of the egress rules for any peer.
    pub(crate) names_of_any: BTreeSet<PortName>,
}

impl Selectors {
    pub(crate) fn collect<'a>(contents: impl IntoIterator<Item = &'a Content>) -> Self {
        let mut all = Self::default();
        for rule in contents.into_iter().flat_map(|c| &c.rules) {
            let names = rule.ports.iter().filter_map(|port| match port {
                SetPort::Named { name, protocol } => Some((name.clone(), *protocol)),
                SetPort::Any | SetPort::Prefix { .. } => None,
            });
            match &rule.peers {
                Peers::Any => all.names_of_any.extend(names),
                Peers::Listed(peers) if peers.is_empty() => {}
                Peers::Listed(peers) => {
                    let at = all.intern(peers);
                    all.list[at as usize].names.extend(names);
                }
            }
        }
        all
    }

    fn intern(&mut self, peers: &Arc<BTreeSet<Peer>>) -> u32 {
        if let Some(at) = self.index.get(peers) {
            return *at;
        }
        let at = self.list.len() as u32;
        self.index.insert(peers.clone(), at);
        let hash = hash::stable(peers);
        self.list.push(Selector {
            peers: peers.clone(),
            hash,
            names: BTreeSet::new(),
        });
        at
    }

    /// The selector of a rule's peers; `None` if they match everything or nothing.
    pub(crate) fn of(&self, peers: &Arc<BTreeSet<Peer>>) -> Option<u32> {
        self.index.get(peers).copied()
    }

    /// For every Pod the selectors that match it by its labels, sorted.
    pub(crate) fn match_pods(&self, pods: &[Arc<PodIdentity>]) -> Vec<Vec<u32>> {
        let candidates = Candidates::new(pods);
        let mut matched = vec![Vec::new(); pods.len()];
        for (at, selector) in self.list.iter().enumerate() {
            for peer in selector.peers.iter() {
                candidates.visit(peer, |pod| {
                    let matched: &mut Vec<u32> = &mut matched[pod as usize];
                    if matched.last() != Some(&(at as u32)) && peer.matches_pod(&pods[pod as usize])
                    {
                        matched.push(at as u32);
                    }
                });
            }
        }
        matched
    }
}

/// Pods by what selectors most often ask for, so that a selector looks at few of them.
struct Candidates<'a> {
    all: u32,
    by_namespace: HashMap<&'a str, Vec<u32>>,
    by_label: HashMap<(&'a str, &'a str), Vec<u32>>,
}

impl<'a> Candidates<'a> {
    fn new(pods: &'a [Arc<PodIdentity>]) -> Self {
        let mut by_namespace: HashMap<&str, Vec<u32>> = HashMap::new();
        let mut by_label: HashMap<(&str, &str), Vec<u32>> = HashMap::new();
        for (at, pod) in (0..).zip(pods) {
            by_namespace.entry(&pod.namespace).or_default().push(at);
            for label in pod.labels.iter() {
                by_label.entry(label).or_default().push(at);
            }
        }
        Self {
            all: pods.len() as u32,
            by_namespace,
            by_label,
        }
    }

    /// Visits every Pod that the peer may match, and maybe others, each once.
    fn visit(&self, peer: &Peer, mut visit: impl FnMut(u32)) {
        let Peer::Pods { namespaces, pods } = peer else {
            return;
        };
        if let Namespaces::Named(name) = namespaces {
            self.by_namespace
                .get(&**name)
                .into_iter()
                .flatten()
                .copied()
                .for_each(visit);
            return;
        }
        let asked = pods.requirements().find_map(|r| match r {
            Requirement::In(key, values) => Some((key, values)),
            Requirement::NotIn(..) | Requirement::Exists(_) | Requirement::DoesNotExist(_) => None,
        });
        match asked {
            Some((key, values)) => {
                for value in values {
                    let with = self.by_label.get(&(key.as_str(), value.as_str()));
                    with.into_iter().flatten().copied().for_each(&mut visit);
                }
            }
            None => (0..self.all).for_each(visit),
        }
    }
}
