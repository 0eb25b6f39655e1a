//! Classes: addresses that no rule in force can tell apart.

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
};

/// What the rules in force can see of an address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Signature {
    /// Selectors that match, sorted.
    selectors: Vec<u32>,
    /// What the Pod calls by the names that matching egress rules use, sorted.
    names: Vec<(PortName, u16)>,
}

/// All classes in force, and the addresses that have them.
#[derive(Debug)]
pub(crate) struct Classes<'a> {
    selectors: &'a Selectors,
    /// By index; the first is the world.
    signatures: Vec<Signature>,
    ids: Vec<u32>,
    /// The classes that every selector matches.
    with: Vec<Vec<u32>>,
    all: Vec<u32>,
    pub(crate) peers: BTreeMap<IpAddr, Peer>,
    pub(crate) cidrs: BTreeMap<IpNet, Peer>,
}

impl<'a> Classes<'a> {
    pub(crate) fn new(desired: &Desired, selectors: &'a Selectors) -> Self {
        let mut intern = Intern::default();
        let world = intern.signature(Signature::default());

        let matched = blocks::matched(selectors);
        let blocks: BTreeMap<IpNet, u32> = matched
            .into_iter()
            .map(|(net, selectors)| {
                (
                    net,
                    intern.signature(Signature {
                        selectors,
                        names: Vec::new(),
                    }),
                )
            })
            .collect();
        let lpm = Lpm::new(&blocks);
        let around = |address: IpAddr| lpm.get(address).copied().unwrap_or(world);

        let (pods, pod_at) = pods(desired);
        let matched = selectors.match_pods(&pods);
        let mut combined: HashMap<(u32, u32), u32> = HashMap::new();
        let mut peers: BTreeMap<IpAddr, (u32, u32)> = BTreeMap::new();
        for (address, pod) in pod_at {
            let block = around(address);
            let class = *combined.entry((pod, block)).or_insert_with(|| {
                let by_block = &intern.all[block as usize].selectors;
                let signature = signature(
                    selectors,
                    &matched[pod as usize],
                    by_block,
                    &pods[pod as usize],
                );
                intern.signature(signature)
            });
            if class != block {
                peers.insert(address, (class, 0));
            }
        }
        for address in &desired.local_addresses {
            peers.insert(*address, (around(*address), PeerFlags::LOCAL_NODE));
        }

        let signatures = intern.all;
        let ids = ids(selectors, &signatures);
        let peer = |(class, flags): (u32, u32)| Peer {
            class: ids[class as usize],
            flags,
        };
        let cidrs = needed(&blocks, world);
        let used: BTreeSet<u32> = peers
            .values()
            .map(|(class, _)| *class)
            .chain(cidrs.values().copied())
            .chain([world])
            .collect();
        let mut with = vec![Vec::new(); selectors.list.len()];
        for class in &used {
            for selector in &signatures[*class as usize].selectors {
                with[*selector as usize].push(*class);
            }
        }
        Self {
            selectors,
            with,
            all: used.into_iter().collect(),
            peers: peers
                .into_iter()
                .map(|(address, p)| (address, peer(p)))
                .collect(),
            cidrs: cidrs
                .into_iter()
                .map(|(net, class)| (net, peer((class, 0))))
                .collect(),
            signatures,
            ids,
        }
    }

    /// The classes that a rule's peers match, by index.
    pub(crate) fn of_peers(&self, peers: &Peers) -> impl Iterator<Item = u32> {
        let classes = match peers {
            Peers::Any => self.all.as_slice(),
            Peers::Listed(list) => self
                .selectors
                .of(list)
                .map_or(&[][..], |at| &self.with[at as usize]),
        };
        classes.iter().copied()
    }

    /// The id of the class at an index.
    pub(crate) fn id(&self, class: u32) -> u32 {
        self.ids[class as usize]
    }

    /// The ports that the Pods of a class call by a name.
    pub(crate) fn resolve(
        &self,
        class: u32,
        name: &str,
        protocol: Protocol,
    ) -> impl Iterator<Item = u16> {
        self.signatures[class as usize]
            .names
            .iter()
            .filter(move |((n, p), _)| **n == *name && *p == protocol)
            .map(|(_, port)| *port)
    }
}

#[derive(Default)]
struct Intern {
    all: Vec<Signature>,
    index: HashMap<Signature, u32>,
}

impl Intern {
    fn signature(&mut self, signature: Signature) -> u32 {
        if let Some(at) = self.index.get(&signature) {
            return *at;
        }
        let at = self.all.len() as u32;
        self.all.push(signature.clone());
        self.index.insert(signature, at);
        at
    }
}

/// The different Pods, and the address of each.
fn pods(desired: &Desired) -> (Vec<Arc<PodIdentity>>, Vec<(IpAddr, u32)>) {
    let mut index: HashMap<*const PodIdentity, u32> = HashMap::new();
    let mut pods = Vec::new();
    let mut at = Vec::with_capacity(desired.peers.len());
    for (address, pod) in &desired.peers {
        let pod = *index.entry(Arc::as_ptr(pod)).or_insert_with(|| {
            pods.push(pod.clone());
            pods.len() as u32 - 1
        });
        at.push((*address, pod));
    }
    (pods, at)
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
fn ids(selectors: &Selectors, signatures: &[Signature]) -> Vec<u32> {
    // Selectors by content, not by index: the index depends on what else there is.
    let content = |signature: &Signature| {
        let mut lists: Vec<_> = signature
            .selectors
            .iter()
            .map(|at| &selectors.list[*at as usize])
            .map(|selector| (selector.hash, selector.peers.clone()))
            .collect();
        lists.sort();
        (lists, signature.names.clone())
    };
    let hashes: Vec<u64> = signatures
        .iter()
        .map(|signature| {
            let of = |at: &u32| selectors.list[*at as usize].hash;
            let mut lists: Vec<u64> = signature.selectors.iter().map(of).collect();
            lists.sort_unstable();
            hash::stable(&(lists, &signature.names))
        })
        .collect();
    let is_world = |at: usize| signatures[at] == Signature::default();
    let others: Vec<usize> = (0..signatures.len()).filter(|at| !is_world(*at)).collect();
    let other_hashes: Vec<u64> = others.iter().map(|at| hashes[*at]).collect();
    let assigned = hash::assign(&other_hashes, &[CLASS_WORLD], |a, b| {
        content(&signatures[others[a]]).cmp(&content(&signatures[others[b]]))
    });
    let mut ids = vec![CLASS_WORLD; signatures.len()];
    for (at, id) in others.into_iter().zip(assigned) {
        ids[at] = id;
    }
    ids
}

/// The blocks whose class is not that of the block around them.
fn needed(blocks: &BTreeMap<IpNet, u32>, world: u32) -> BTreeMap<IpNet, u32> {
    let mut around: Vec<(IpNet, u32)> = Vec::new();
    let mut needed = BTreeMap::new();
    for (net, class) in blocks {
        while around.last().is_some_and(|(outer, _)| !outer.contains(net)) {
            around.pop();
        }
        if around.last().map_or(world, |(_, class)| *class) != *class {
            needed.insert(*net, *class);
            around.push((*net, *class));
        }
    }
    needed
}
