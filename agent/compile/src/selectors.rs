//! Selectors: the different lists of peers that the rules in force have.
//!
//! A whole list is one selector: what a rule cannot tell apart, its classes need not.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use hachi_policy::{Peer, Peers, PodIdentity, SmallSet};

use crate::{
    asked::{Asked, PortName},
    sets::{Content, SetPort},
};

/// One list of peers.
#[derive(Debug)]
pub(crate) struct Selector {
    pub(crate) peers: Arc<SmallSet<Peer>>,
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
    /// By the hash of the peers.
    index: HashMap<u64, Vec<u32>>,
    /// What the selectors in force ask for.
    pub(crate) asked: Asked,
    /// Named ports of the egress rules that may match a Pod otherwise than by its labels: those for any
    /// peer, and those with blocks.
    pub(crate) names_of_any: BTreeSet<PortName>,
}

impl Selectors {
    /// Takes in what is in force now; true if addresses may have other classes for it.
    pub(crate) fn update<'a>(&mut self, contents: impl IntoIterator<Item = &'a Content>) -> bool {
        let before: Vec<bool> = self.list.iter().map(|s| s.in_force).collect();
        for selector in &mut self.list {
            selector.in_force = false;
        }
        let names_before = std::mem::take(&mut self.names_of_any);
        let mut asked = Asked::default();
        for rule in contents.into_iter().flat_map(|c| &c.rules) {
            let names = rule.ports.iter().filter_map(|port| match port {
                SetPort::Named { name, protocol } => Some((name.clone(), *protocol)),
                SetPort::Any | SetPort::Prefix { .. } => None,
            });
            match &rule.peers {
                Peers::Any => self.names_of_any.extend(names),
                Peers::Listed(peers) if peers.is_empty() => {}
                Peers::Listed(peers) => {
                    if peers.iter().any(is_block) {
                        self.names_of_any.extend(names.clone());
                    }
                    names.for_each(|name| asked.add_port(peers, &name));
                    let at = self.intern(peers, rule.peers_hash) as usize;
                    if !self.list[at].in_force {
                        self.list[at].in_force = true;
                        peers.iter().for_each(|peer| asked.add(peer));
                    }
                }
            }
        }
        asked.add_ports_of_any(&self.names_of_any);
        let now = self.list.iter().map(|s| s.in_force);
        let changed = !now.eq(before) || names_before != self.names_of_any || asked != self.asked;
        self.asked = asked;
        changed
    }

    fn intern(&mut self, peers: &Arc<SmallSet<Peer>>, hash: u64) -> u32 {
        if let Some(at) = self.of(peers, hash) {
            return at;
        }
        let at = self.list.len() as u32;
        self.index.entry(hash).or_default().push(at);
        self.list.push(Selector {
            peers: peers.clone(),
            hash,
            in_force: false,
        });
        at
    }

    /// The selector of a rule's peers, which have this hash; `None` if they match everything or
    /// nothing.
    pub(crate) fn of(&self, peers: &Arc<SmallSet<Peer>>, hash: u64) -> Option<u32> {
        let same = |at: &&u32| {
            let known = &self.list[**at as usize].peers;
            Arc::ptr_eq(known, peers) || known == peers
        };
        self.index.get(&hash)?.iter().find(same).copied()
    }
}

/// Whether the peer is a block of addresses.
pub(crate) fn is_block(peer: &Peer) -> bool {
    matches!(peer, Peer::Block(_))
}
