//! Selectors: the different lists of peers that the rules in force have, and what of labels they ask
//! for.
//!
//! A whole list is one selector: what a rule cannot tell apart, its classes need not.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use hachi_policy::{
    Labels, Namespaces, Peer, Peers, PodIdentity, Protocol, Requirement, Selector as LabelSelector,
};

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
    /// Whether a rule in force has it.
    pub(crate) in_force: bool,
}

impl Selector {
    /// Whether the Pod is matched by its labels.
    pub(crate) fn matches_pod(&self, pod: &PodIdentity) -> bool {
        self.peers.iter().any(|peer| peer.matches_pod(pod))
    }
}

/// All selectors that have been in force; the index of one never changes.
#[derive(Debug, Default)]
pub(crate) struct Selectors {
    pub(crate) list: Vec<Selector>,
    index: HashMap<Arc<BTreeSet<Peer>>, u32>,
    /// What the selectors in force ask for.
    pub(crate) asked: Asked,
    /// Named ports of the egress rules that may match a Pod otherwise than by its labels: those for any
    /// peer, and those with blocks.
    pub(crate) names_of_any: BTreeSet<PortName>,
}

impl Selectors {
    /// Takes in what is in force now.
    pub(crate) fn update<'a>(&mut self, contents: impl IntoIterator<Item = &'a Content>) {
        for selector in &mut self.list {
            selector.in_force = false;
        }
        self.names_of_any.clear();
        let mut asked = Asked::default();
        for rule in contents.into_iter().flat_map(|c| &c.rules) {
            let names = rule.ports.iter().filter_map(|port| match port {
                SetPort::Named { name, protocol } => Some((name.clone(), *protocol)),
                SetPort::Any | SetPort::Prefix { .. } => None,
            });
            asked.ports.extend(names.clone());
            match &rule.peers {
                Peers::Any => self.names_of_any.extend(names),
                Peers::Listed(peers) if peers.is_empty() => {}
                Peers::Listed(peers) => {
                    if peers.iter().any(is_block) {
                        self.names_of_any.extend(names);
                    }
                    let at = self.intern(peers) as usize;
                    if !self.list[at].in_force {
                        self.list[at].in_force = true;
                        peers.iter().for_each(|peer| asked.add(peer));
                    }
                }
            }
        }
        self.asked = asked;
    }

    fn intern(&mut self, peers: &Arc<BTreeSet<Peer>>) -> u32 {
        if let Some(at) = self.index.get(peers) {
            return *at;
        }
        let at = self.list.len() as u32;
        self.index.insert(peers.clone(), at);
        self.list.push(Selector {
            peers: peers.clone(),
            hash: hash::stable(peers),
            in_force: false,
        });
        at
    }

    /// The selector of a rule's peers; `None` if they match everything or nothing.
    pub(crate) fn of(&self, peers: &Arc<BTreeSet<Peer>>) -> Option<u32> {
        self.index.get(peers).copied()
    }
}

/// Whether the peer is a block of addresses.
pub(crate) fn is_block(peer: &Peer) -> bool {
    matches!(peer, Peer::Block(_))
}

/// Everything of a Pod that the rules in force can ask for. Two Pods that answer alike are the same
/// to every one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    namespaces: BTreeSet<Arc<str>>,
    /// Values that are asked for, by label of a namespace.
    namespace_labels: BTreeMap<String, BTreeSet<String>>,
    /// Whether it is asked for labels of namespaces at all, be it for none.
    by_namespace: bool,
    /// Values that are asked for, by label of a Pod.
    labels: BTreeMap<String, BTreeSet<String>>,
    ports: BTreeSet<PortName>,
}

/// What a Pod answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Answer {
    namespace: Option<Arc<str>>,
    /// `None` as long as the namespace is not known.
    namespace_labels: Option<Vec<(String, Option<String>)>>,
    /// Labels with their values; `None` for one that nobody asks for.
    labels: Vec<(String, Option<String>)>,
    pub(crate) ports: Vec<(PortName, u16)>,
}

impl Asked {
    fn add(&mut self, peer: &Peer) {
        let Peer::Pods { namespaces, pods } = peer else {
            return;
        };
        match namespaces {
            Namespaces::Named(name) => drop(self.namespaces.insert(name.clone())),
            Namespaces::Selected(selector) => {
                self.by_namespace = true;
                ask(&mut self.namespace_labels, selector);
            }
        }
        ask(&mut self.labels, pods);
    }

    pub(crate) fn of(&self, pod: &PodIdentity) -> Answer {
        let ports = self.ports.iter().flat_map(|name| {
            let ports = pod.resolve(&name.0, name.1);
            ports.map(|port| (name.clone(), port))
        });
        Answer {
            namespace: self.namespaces.get(&pod.namespace).cloned(),
            namespace_labels: pod
                .namespace_labels
                .as_ref()
                .filter(|_| self.by_namespace)
                .map(|labels| answer(&self.namespace_labels, labels)),
            labels: answer(&self.labels, &pod.labels),
            ports: ports.collect::<BTreeSet<_>>().into_iter().collect(),
        }
    }
}

fn ask(asked: &mut BTreeMap<String, BTreeSet<String>>, selector: &LabelSelector) {
    for requirement in selector.requirements() {
        let (key, values) = match requirement {
            Requirement::In(key, values) | Requirement::NotIn(key, values) => (key, Some(values)),
            Requirement::Exists(key) | Requirement::DoesNotExist(key) => (key, None),
        };
        if !asked.contains_key(key) {
            asked.insert(key.clone(), BTreeSet::new());
        }
        if let (Some(known), Some(values)) = (asked.get_mut(key), values) {
            known.extend(values.iter().cloned());
        }
    }
}

fn answer(
    asked: &BTreeMap<String, BTreeSet<String>>,
    labels: &Labels,
) -> Vec<(String, Option<String>)> {
    let told = labels.iter().filter_map(|(key, value)| {
        let values = asked.get(key)?;
        Some((key.to_owned(), values.get(value).cloned()))
    });
    told.collect()
}
