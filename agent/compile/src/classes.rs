//! Classes: addresses that no rule in force can tell apart.
//!
//! ```text
//! sets ─> selectors ─> blocks ─┐               (Matcher: stays while the sets stay)
//! peers, those that changed ───┴─> signatures ─> Classes: ids, PEERS, CIDRS
//! ```

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use hachi_abi::{CLASS_WORLD, Peer, PeerFlags};
use hachi_index::Desired;
use hachi_policy::{Peers, PodIdentity, Protocol};
use ipnet::IpNet;

use crate::{
    blocks, hash,
    lpm::Lpm,
    selectors::{PortName, Selectors},
    sets::Sets,
};

/// What the rules in force can see of an address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Signature {
    /// Selectors that match, sorted.
    selectors: Vec<u32>,
    /// What the Pod calls by the names that matching egress rules use, sorted.
    names: Vec<(PortName, u16)>,
}

/// The signature of the world, by index.
const WORLD: u32 = 0;

/// Where an address was found to be.
#[derive(Debug)]
struct Placed {
    pod: Arc<PodIdentity>,
    class: u32,
    block: u32,
}

/// Finds the signatures of addresses, and remembers them for as long as the sets stay the same.
#[derive(Debug)]
pub(crate) struct Matcher {
    selectors: Selectors,
    signatures: Signatures,
    /// Signatures of all blocks in force, and of those that differ from what is around them.
    blocks: BTreeMap<IpNet, u32>,
    needed: BTreeMap<IpNet, u32>,
    placed: BTreeMap<IpAddr, Placed>,
    /// By the address in memory of the identity, which is kept so that no other gets it.
    pods: HashMap<usize, (Arc<PodIdentity>, Vec<u32>)>,
    combined: HashMap<(usize, u32), u32>,
}

fn memory(pod: &Arc<PodIdentity>) -> usize {
    Arc::as_ptr(pod).addr()
}

impl Matcher {
    pub(crate) fn new(sets: &Sets) -> Self {
        let selectors = Selectors::collect(&sets.contents);
        let mut signatures = Signatures::default();
        signatures.intern(Signature::default(), &selectors);
        let matched = blocks::matched(&selectors).into_iter();
        let blocks: BTreeMap<IpNet, u32> = matched
            .map(|(net, matching)| {
                let signature = Signature {
                    selectors: matching,
                    names: Vec::new(),
                };
                (net, signatures.intern(signature, &selectors))
            })
            .collect();
        Self {
            needed: needed(&blocks),
            selectors,
            signatures,
            blocks,
            placed: BTreeMap::new(),
            pods: HashMap::new(),
            combined: HashMap::new(),
        }
    }

    /// The classes of all addresses. Only those that are new or have another Pod are looked at.
    pub(crate) fn classes(&mut self, desired: &Desired) -> Classes<'_> {
        self.place(desired);
        let lpm = Lpm::new(&self.blocks);
        let mut peers: BTreeMap<IpAddr, (u32, u32)> = self
            .placed
            .iter()
            .filter(|(_, placed)| placed.class != placed.block)
            .map(|(address, placed)| (*address, (placed.class, 0)))
            .collect();
        for address in &desired.local_addresses {
            let block = lpm.get(*address).copied().unwrap_or(WORLD);
            peers.insert(*address, (block, PeerFlags::LOCAL_NODE));
        }
        Classes::new(self, &peers)
    }

    fn place(&mut self, desired: &Desired) {
        let placed = &self.placed;
        let known = |address: &IpAddr, pod: &Arc<PodIdentity>| {
            placed
                .get(address)
                .is_some_and(|placed| Arc::ptr_eq(&placed.pod, pod))
        };
        let new: Vec<(IpAddr, &Arc<PodIdentity>)> = desired
            .peers
            .iter()
            .filter(|(address, pod)| !known(address, pod))
            .map(|(address, pod)| (*address, pod))
            .collect();
        let added = new
            .iter()
            .filter(|(address, _)| !placed.contains_key(address))
            .count();
        if placed.len() + added > desired.peers.len() {
            self.placed
                .retain(|address, _| desired.peers.contains_key(address));
        }
        if new.is_empty() {
            return;
        }
        // What is remembered of Pods that are gone is forgotten now and then.
        if self.pods.len() > 2 * desired.peers.len() + 64 {
            self.pods.clear();
            self.combined.clear();
        }
        let mut strangers: BTreeMap<usize, Arc<PodIdentity>> = BTreeMap::new();
        for (_, pod) in &new {
            if !self.pods.contains_key(&memory(pod)) {
                strangers.insert(memory(pod), Arc::clone(pod));
            }
        }
        let strangers: Vec<Arc<PodIdentity>> = strangers.into_values().collect();
        let matched = self.selectors.match_pods(&strangers);
        for (pod, matched) in strangers.into_iter().zip(matched) {
            self.pods.insert(memory(&pod), (pod, matched));
        }
        let lpm = Lpm::new(&self.blocks);
        for (address, pod) in new {
            let block = lpm.get(address).copied().unwrap_or(WORLD);
            let class = *self
                .combined
                .entry((memory(pod), block))
                .or_insert_with(|| {
                    let by_labels = self.pods.get(&memory(pod)).map_or(&[][..], |(_, m)| m);
                    let by_block = &self.signatures.all[block as usize].0.selectors;
                    let signature = signature(&self.selectors, by_labels, by_block, pod);
                    self.signatures.intern(signature, &self.selectors)
                });
            self.placed.insert(
                address,
                Placed {
                    pod: Arc::clone(pod),
                    class,
                    block,
                },
            );
        }
    }
}

/// All classes in force, and the addresses that have them.
#[derive(Debug)]
pub(crate) struct Classes<'a> {
    matcher: &'a Matcher,
    ids: HashMap<u32, u32>,
    /// The classes that every selector matches.
    with: Vec<Vec<u32>>,
    /// Every class that an address has, by index.
    all: Vec<u32>,
    pub(crate) peers: BTreeMap<IpAddr, Peer>,
    pub(crate) cidrs: BTreeMap<IpNet, Peer>,
}

impl<'a> Classes<'a> {
    fn new(matcher: &'a Matcher, peers: &BTreeMap<IpAddr, (u32, u32)>) -> Self {
        let of_peers = peers.values().map(|(class, _)| *class);
        let used: BTreeSet<u32> = of_peers
            .chain(matcher.needed.values().copied())
            .chain([WORLD])
            .collect();
        let ids = ids(matcher, &used);
        let mut with = vec![Vec::new(); matcher.selectors.list.len()];
        for class in &used {
            for selector in &matcher.signatures.all[*class as usize].0.selectors {
                with[*selector as usize].push(*class);
            }
        }
        let peer = |class: u32, flags| Peer {
            class: ids[&class],
            flags,
        };
        Self {
            peers: peers
                .iter()
                .map(|(a, (class, flags))| (*a, peer(*class, *flags)))
                .collect(),
            cidrs: matcher
                .needed
                .iter()
                .map(|(net, class)| (*net, peer(*class, 0)))
                .collect(),
            matcher,
            with,
            all: used.into_iter().collect(),
            ids,
        }
    }

    /// The index and the id of every class that an address has.
    pub(crate) fn used(&self) -> Vec<(u32, u32)> {
        self.all
            .iter()
            .map(|class| (*class, self.id(*class)))
            .collect()
    }

    /// The classes that a rule's peers match, by index.
    pub(crate) fn of_peers(&self, peers: &Peers) -> impl Iterator<Item = u32> {
        let classes = match peers {
            Peers::Any => self.all.as_slice(),
            Peers::Listed(list) => self
                .matcher
                .selectors
                .of(list)
                .map_or(&[][..], |at| &self.with[at as usize]),
        };
        classes.iter().copied()
    }

    /// The id of the class at an index.
    pub(crate) fn id(&self, class: u32) -> u32 {
        self.ids[&class]
    }

    /// The ports that the Pods of a class call by a name.
    pub(crate) fn resolve(
        &self,
        class: u32,
        name: &str,
        protocol: Protocol,
    ) -> impl Iterator<Item = u16> {
        self.matcher.signatures.all[class as usize]
            .0
            .names
            .iter()
            .filter(move |((n, p), _)| **n == *name && *p == protocol)
            .map(|(_, port)| *port)
    }
}

/// Signatures with their hashes.
#[derive(Debug, Default)]
struct Signatures {
    all: Vec<(Signature, u64)>,
    index: HashMap<Signature, u32>,
}

impl Signatures {
    fn intern(&mut self, signature: Signature, selectors: &Selectors) -> u32 {
        if let Some(at) = self.index.get(&signature) {
            return *at;
        }
        let at = self.all.len() as u32;
        // Selectors by content, not by index: the index depends on what else there is.
        let of = |at: &u32| selectors.list[*at as usize].hash;
        let mut lists: Vec<u64> = signature.selectors.iter().map(of).collect();
        lists.sort_unstable();
        let hash = hash::stable(&(lists, &signature.names));
        self.all.push((signature.clone(), hash));
        self.index.insert(signature, at);
        at
    }
}

fn signature(
    selectors: &Selectors,
    by_labels: &[u32],
    by_block: &[u32],
    pod: &PodIdentity,
) -> Signature {
    let mut matching: Vec<u32> = by_labels.iter().chain(by_block).copied().collect();
    matching.sort_unstable();
    matching.dedup();
    let asked = matching
        .iter()
        .flat_map(|at| &selectors.list[*at as usize].names);
    let names: BTreeSet<(PortName, u16)> = asked
        .chain(&selectors.names_of_any)
        .flat_map(|name| {
            pod.resolve(&name.0, name.1)
                .map(|port| (name.clone(), port))
        })
        .collect();
    Signature {
        selectors: matching,
        names: names.into_iter().collect(),
    }
}

/// Ids by content; that of the world is fixed.
fn ids(matcher: &Matcher, used: &BTreeSet<u32>) -> HashMap<u32, u32> {
    let content = |class: u32| {
        let (signature, _) = &matcher.signatures.all[class as usize];
        let mut lists: Vec<_> = signature
            .selectors
            .iter()
            .map(|at| &matcher.selectors.list[*at as usize])
            .map(|selector| (selector.hash, &selector.peers))
            .collect();
        lists.sort();
        (lists, &signature.names)
    };
    let others: Vec<u32> = used
        .iter()
        .copied()
        .filter(|class| *class != WORLD)
        .collect();
    let hashes: Vec<u64> = others
        .iter()
        .map(|class| matcher.signatures.all[*class as usize].1)
        .collect();
    let assigned = hash::assign(&hashes, &[CLASS_WORLD], |a, b| {
        content(others[a]).cmp(&content(others[b]))
    });
    others
        .into_iter()
        .zip(assigned)
        .chain([(WORLD, CLASS_WORLD)])
        .collect()
}

/// The blocks whose class is not that of the block around them.
fn needed(blocks: &BTreeMap<IpNet, u32>) -> BTreeMap<IpNet, u32> {
    let mut around: Vec<(IpNet, u32)> = Vec::new();
    let mut needed = BTreeMap::new();
    for (net, class) in blocks {
        while around.last().is_some_and(|(outer, _)| !outer.contains(net)) {
            around.pop();
        }
        if around.last().map_or(WORLD, |(_, class)| *class) != *class {
            needed.insert(*net, *class);
            around.push((*net, *class));
        }
    }
    needed
}
