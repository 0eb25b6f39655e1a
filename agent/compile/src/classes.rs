//! Classes: addresses that no rule in force can tell apart.
//!
//! ```text
//! sets ─> selectors ─┬─> blocks ──────────────┐
//!                    └─> what they ask for ─┐ │
//! peers, those that changed ─> answers <────┘ │
//!                                 └───────────┴─> classes: ids, PEERS, CIDRS
//! ```
//! A Pod that some selector matches by its labels has a class of its own kind: its answer to all that
//! the rules in force ask for, and how the blocks in force treat its address. The latter is told as the
//! difference to how they treat the whole *region* of the address (such as 10.0.0.0/8), so that a block
//! around all Pods changes no class. A rule that asks for nothing new so changes no class either.
//!
//! Every other address has the class of the selectors whose blocks it is in.
//!
//! What was found is kept: answers by Pod until they are asked something else, the *spot* of an address
//! (how blocks treat it) until blocks change, the class of an answer at a spot. So after a change all
//! addresses are looked at, but only those that it is about cost more than that look.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use hachi_abi::{CLASS_WORLD, Peer, PeerFlags};
use hachi_index::Desired;
use hachi_policy::{Peers, PodIdentity, Protocol};
use ipnet::IpNet;

use crate::{
    asked::{Answer, PortName},
    blocks, hash,
    lpm::Lpm,
    selectors::{Selectors, is_block},
    sets::{Content, SetRule, Sets},
};

/// The class of the world, by index.
const WORLD: u32 = 0;

/// Blocks that Pods' addresses are usually taken from, whole: private ones, then everything.
const REGIONS: [&str; 7] = [
    "10.0.0.0/8",
    "100.64.0.0/10",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "0.0.0.0/0",
    "fc00::/7",
    "::/0",
];

/// What makes a class.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    /// Addresses without a Pod that a selector matches by labels: the selectors whose blocks they are
    /// in, sorted.
    Block(Vec<u32>),
    /// Pods.
    Pod {
        /// Index of the answer.
        answer: u32,
        spot: Spot,
    },
}

/// How blocks treat an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Spot {
    /// Index of the region.
    region: usize,
    /// Selectors whose blocks treat the address otherwise than its region, sorted.
    deviating: Vec<u32>,
}

/// A class.
#[derive(Debug)]
pub(crate) struct Class {
    key: Key,
    pub(crate) hash: u64,
    /// Selectors that match by blocks, sorted.
    by_block: Vec<u32>,
    /// What matching egress rules call its ports by.
    names: Vec<(PortName, u16)>,
}

impl Class {
    /// The ports that the Pods of the class call by a name.
    pub(crate) fn resolve(&self, name: &str, protocol: Protocol) -> impl Iterator<Item = u16> {
        self.names
            .iter()
            .filter(move |((n, p), _)| **n == *name && *p == protocol)
            .map(|(_, port)| *port)
    }
}

/// Pods that answer alike.
#[derive(Debug)]
struct Alike {
    answer: Arc<Answer>,
    /// Any one of them.
    one: Arc<PodIdentity>,
    /// Selectors that match by labels, of the first `seen`; sorted.
    by_labels: Vec<u32>,
    seen: usize,
}

/// Where an address was found to be.
#[derive(Debug)]
struct Placed {
    pod: Arc<PodIdentity>,
    /// Index of the spot.
    spot: u32,
    /// `None` where no rule asks for the Pod, so that the block around it counts.
    class: Option<u32>,
}

/// Finds the classes of addresses, and remembers them.
#[derive(Debug, Default)]
pub(crate) struct Matcher {
    selectors: Selectors,
    /// Selectors in force with blocks.
    block_selectors: Vec<u32>,
    /// All blocks in force, with the selectors that match their addresses.
    blocks: BTreeMap<IpNet, Vec<u32>>,
    regions: Vec<Region>,
    alike: Vec<Alike>,
    answers: HashMap<Arc<Answer>, u32>,
    /// By the address in memory of the identity, which is kept so that no other gets it.
    pods: HashMap<usize, (Arc<PodIdentity>, u32)>,
    spots: Vec<Spot>,
    spot_index: HashMap<Spot, u32>,
    classes: Vec<Class>,
    index: HashMap<Key, u32>,
    /// The class of an answer at a spot, both by index, as long as nothing changes.
    known: HashMap<(u32, u32), Option<u32>>,
    placed: BTreeMap<IpAddr, Placed>,
    /// The blocks whose class is not that of the block around them.
    needed: BTreeMap<IpNet, u32>,
    /// The classes that some address has, with their ids.
    used: BTreeMap<u32, u32>,
    /// Since addresses were placed, classes may have changed.
    stale: bool,
    /// Blocks have.
    moved: bool,
}

/// A region, and which selectors' blocks match it as a whole.
#[derive(Debug)]
struct Region {
    net: IpNet,
    matching: Vec<u32>,
}

fn memory(pod: &Arc<PodIdentity>) -> usize {
    Arc::as_ptr(pod).addr()
}

impl Matcher {
    /// The sets have changed.
    pub(crate) fn set(&mut self, sets: &Sets) {
        let used = self.used.len() + self.selectors.list.iter().filter(|s| s.in_force).count();
        let gathered = self.classes.len() + self.selectors.list.len() + self.alike.len();
        if gathered > 4 * used + 4096 {
            // What has gathered of old times is forgotten.
            *self = Self::default();
        }
        let asked = self.selectors.asked.clone();
        if !self.selectors.update(sets.contents.iter().map(|c| &**c)) && !self.regions.is_empty() {
            return;
        }
        let difference = asked.difference(&self.selectors.asked);
        // Of those who answer alike one stands for all: where that one may answer otherwise now, the
        // others are asked again too.
        let concerned: Vec<bool> = (self.alike.iter())
            .map(|alike| difference.concerns(&alike.one))
            .collect();
        self.answers.retain(|_, at| !concerned[*at as usize]);
        self.pods
            .retain(|_, (pod, at)| !concerned[*at as usize] && !difference.concerns(pod));
        let list = (0..).zip(&self.selectors.list);
        let with_blocks: Vec<u32> = list
            .filter(|(_, s)| s.in_force && s.peers.iter().any(is_block))
            .map(|(at, _)| at)
            .collect();
        if with_blocks != self.block_selectors || self.regions.is_empty() {
            self.block_selectors = with_blocks;
            self.blocks = blocks::matched(&self.selectors);
            let lpm = Lpm::new(&self.blocks);
            let nets = REGIONS.iter().filter_map(|net| net.parse::<IpNet>().ok());
            self.regions = nets
                .map(|net| Region {
                    net,
                    matching: lpm.get_net(net).cloned().unwrap_or_default(),
                })
                .collect();
            // What a class is besides its Pods' answers is told by how blocks treat them.
            self.spots.clear();
            self.spot_index.clear();
            self.index.clear();
            self.classes.clear();
            let world = self.class(Key::Block(Vec::new()));
            debug_assert_eq!(world, WORLD, "the world comes first");
            self.needed = self.needed();
            self.moved = true;
        }
        self.known.clear();
        self.stale = true;
    }

    /// Finds the classes of all addresses, and gives ids to those that there are.
    pub(crate) fn place(&mut self, desired: &Desired) {
        if self.regions.is_empty() {
            self.set(&Sets::default());
        }
        let mut placed = std::mem::take(&mut self.placed);
        let blocks = std::mem::take(&mut self.blocks);
        let lpm = Lpm::new(&blocks);
        let mut found = Vec::new();
        let mut gone = Vec::new();
        for (address, known, pod) in merge(&mut placed, &desired.peers) {
            let Some(pod) = pod else {
                gone.push(*address);
                continue;
            };
            match known {
                Some(known) => {
                    let other = !Arc::ptr_eq(&known.pod, pod);
                    if !(self.stale || other) {
                        continue;
                    }
                    if self.moved {
                        known.spot = self.spot(*address, &lpm);
                    }
                    if other {
                        known.pod = Arc::clone(pod);
                    }
                    known.class = self.class_of(pod, known.spot);
                }
                None => {
                    let spot = self.spot(*address, &lpm);
                    let class = self.class_of(pod, spot);
                    let pod = Arc::clone(pod);
                    found.push((*address, Placed { pod, spot, class }));
                }
            }
        }
        drop(lpm);
        self.blocks = blocks;
        if placed.is_empty() {
            placed = found.into_iter().collect();
        } else {
            placed.extend(found);
        }
        for address in gone {
            placed.remove(&address);
        }
        self.placed = placed;
        (self.stale, self.moved) = (false, false);
        if self.pods.len() > 2 * self.placed.len() + 64 {
            self.pods.clear();
        }
        let of_pods = self.placed.values().filter_map(|placed| placed.class);
        let mut is_used = vec![false; self.classes.len()];
        for class in of_pods.chain(self.needed.values().copied()).chain([WORLD]) {
            is_used[class as usize] = true;
        }
        let used = (0..).zip(is_used).filter(|(_, used)| *used);
        self.used = self.ids(&used.map(|(class, _)| class).collect());
    }

    /// How blocks treat the address.
    fn spot(&mut self, address: IpAddr, lpm: &Lpm<'_, Vec<u32>>) -> u32 {
        let region = (self.regions.iter()).position(|region| region.net.contains(&address));
        // The last two regions are everything.
        let region = region.unwrap_or(self.regions.len() - 1);
        let of_region = &self.regions[region].matching;
        let of_address = lpm.get(address).map_or(&[][..], Vec::as_slice);
        let deviating = if of_address == of_region.as_slice() {
            Vec::new()
        } else {
            difference(of_address, of_region)
        };
        let spot = Spot { region, deviating };
        if let Some(at) = self.spot_index.get(&spot) {
            return *at;
        }
        let at = self.spots.len() as u32;
        self.spot_index.insert(spot.clone(), at);
        self.spots.push(spot);
        at
    }

    fn class_of(&mut self, pod: &Arc<PodIdentity>, spot: u32) -> Option<u32> {
        let answer = self.answer(pod);
        if let Some(class) = self.known.get(&(answer, spot)) {
            return *class;
        }
        let Alike {
            by_labels,
            answer: said,
            ..
        } = &self.alike[answer as usize];
        let list = &self.selectors.list;
        let asked = by_labels.iter().any(|at| list[*at as usize].in_force)
            || (said.ports.iter()).any(|(name, _)| self.selectors.names_of_any.contains(name));
        let class = asked.then(|| {
            let key = Key::Pod {
                answer,
                spot: self.spots[spot as usize].clone(),
            };
            self.class(key)
        });
        self.known.insert((answer, spot), class);
        class
    }

    /// The answer of a Pod, and which selectors match it, brought up to date.
    fn answer(&mut self, pod: &Arc<PodIdentity>) -> u32 {
        let at = match self.pods.get(&memory(pod)) {
            Some((_, at)) => *at,
            None => {
                let answer = Arc::new(self.selectors.asked.answer(pod));
                let next = self.alike.len() as u32;
                let at = *self.answers.entry(Arc::clone(&answer)).or_insert(next);
                if at == next {
                    self.alike.push(Alike {
                        answer,
                        one: Arc::clone(pod),
                        by_labels: Vec::new(),
                        seen: 0,
                    });
                }
                self.pods.insert(memory(pod), (Arc::clone(pod), at));
                at
            }
        };
        let alike = &mut self.alike[at as usize];
        let unseen = (alike.seen..).zip(&self.selectors.list[alike.seen..]);
        let matching = unseen.filter(|(_, selector)| selector.matches_pod(&alike.one));
        alike.by_labels.extend(matching.map(|(at, _)| at as u32));
        alike.seen = self.selectors.list.len();
        at
    }

    fn class(&mut self, key: Key) -> u32 {
        if let Some(at) = self.index.get(&key) {
            return *at;
        }
        let at = self.classes.len() as u32;
        // By content, not by index: the index depends on what else there is.
        let hashes = |selectors: &[u32]| {
            let hash = |at: &u32| self.selectors.list[*at as usize].hash;
            let mut hashes: Vec<u64> = selectors.iter().map(hash).collect();
            hashes.sort_unstable();
            hashes
        };
        let class = match &key {
            Key::Block(selectors) => Class {
                hash: hash::stable(&hashes(selectors)),
                by_block: selectors.clone(),
                names: Vec::new(),
                key: key.clone(),
            },
            Key::Pod { answer, spot } => {
                let answer = &self.alike[*answer as usize].answer;
                let of_region = &self.regions[spot.region].matching;
                let region = REGIONS[spot.region];
                Class {
                    hash: hash::stable(&(&**answer, region, hashes(&spot.deviating))),
                    by_block: difference(of_region, &spot.deviating),
                    names: answer.ports.clone(),
                    key: key.clone(),
                }
            }
        };
        self.classes.push(class);
        self.index.insert(key, at);
        at
    }

    /// The blocks whose class is not that of the block around them.
    fn needed(&mut self) -> BTreeMap<IpNet, u32> {
        let mut around: Vec<(IpNet, u32)> = Vec::new();
        let mut needed = BTreeMap::new();
        for (net, selectors) in self.blocks.clone() {
            while around
                .last()
                .is_some_and(|(outer, _)| !outer.contains(&net))
            {
                around.pop();
            }
            let class = self.class(Key::Block(selectors));
            if around.last().map_or(WORLD, |(_, class)| *class) != class {
                needed.insert(net, class);
                around.push((net, class));
            }
        }
        needed
    }

    /// Ids by content; that of the world is fixed.
    fn ids(&self, used: &BTreeSet<u32>) -> BTreeMap<u32, u32> {
        let peers = |selectors: &[u32]| {
            let of = |at: &u32| {
                let selector = &self.selectors.list[*at as usize];
                (selector.hash, &selector.peers)
            };
            let mut all: Vec<_> = selectors.iter().map(of).collect();
            all.sort();
            all
        };
        let content = |class: u32| match &self.classes[class as usize].key {
            Key::Block(selectors) => (None, peers(selectors)),
            Key::Pod { answer, spot } => {
                let answer = &self.alike[*answer as usize].answer;
                (Some((answer, spot.region)), peers(&spot.deviating))
            }
        };
        let others: Vec<u32> = used.iter().copied().filter(|c| *c != WORLD).collect();
        let hash = |class: &u32| self.classes[*class as usize].hash;
        let hashes: Vec<u64> = others.iter().map(hash).collect();
        let ids = hash::assign(&hashes, &[CLASS_WORLD], |a, b| {
            content(others[a]).cmp(&content(others[b]))
        });
        others
            .into_iter()
            .zip(ids)
            .chain([(WORLD, CLASS_WORLD)])
            .collect()
    }

    /// Every class that an address has, with its id.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u32, &Class)> {
        (self.used.iter()).map(|(class, id)| (*id, &self.classes[*class as usize]))
    }

    /// The selector of every rule of a set; `None` for one whose peers match everything or nothing.
    pub(crate) fn selectors_of(&self, content: &Content) -> Vec<Option<u32>> {
        let of = |rule: &SetRule| match &rule.peers {
            Peers::Any => None,
            Peers::Listed(peers) => self.selectors.of(peers, rule.peers_hash),
        };
        content.rules.iter().map(of).collect()
    }

    /// The rules of a set whose peers include the class, by index; `selectors` are those of the set.
    pub(crate) fn matching(
        &self,
        content: &Content,
        selectors: &[Option<u32>],
        class: &Class,
    ) -> Vec<usize> {
        let by_labels = match &class.key {
            Key::Block(_) => &[][..],
            Key::Pod { answer, .. } => &self.alike[*answer as usize].by_labels,
        };
        let includes = |at: u32| {
            by_labels.binary_search(&at).is_ok() || class.by_block.binary_search(&at).is_ok()
        };
        let rules = content.rules.iter().zip(selectors).enumerate();
        let matching = rules.filter(|(_, (rule, selector))| match &rule.peers {
            Peers::Any => true,
            Peers::Listed(_) => selector.is_some_and(includes),
        });
        matching.map(|(at, _)| at).collect()
    }

    /// `PEERS`.
    pub(crate) fn peers(&self, desired: &Desired) -> BTreeMap<IpAddr, Peer> {
        let peer = |class: u32, flags| Peer {
            class: self.used.get(&class).copied().unwrap_or(CLASS_WORLD),
            flags,
        };
        let of_pods = self.placed.iter();
        let mut peers: BTreeMap<IpAddr, Peer> = of_pods
            .filter_map(|(address, placed)| Some((*address, peer(placed.class?, 0))))
            .collect();
        let lpm = Lpm::new(&self.needed);
        for address in &desired.local_addresses {
            let block = lpm.get(*address).copied().unwrap_or(WORLD);
            peers.insert(*address, peer(block, PeerFlags::LOCAL_NODE));
        }
        peers
    }

    /// `CIDRS`.
    pub(crate) fn cidrs(&self) -> BTreeMap<IpNet, Peer> {
        let peer = |class: &u32| Peer {
            class: self.used.get(class).copied().unwrap_or(CLASS_WORLD),
            flags: 0,
        };
        (self.needed.iter())
            .map(|(net, class)| (*net, peer(class)))
            .collect()
    }
}

/// What is in one of two sorted lists, but not in both; sorted.
fn difference(a: &[u32], b: &[u32]) -> Vec<u32> {
    let mut all: Vec<u32> = (a.iter().filter(|x| b.binary_search(x).is_err()))
        .chain(b.iter().filter(|x| a.binary_search(x).is_err()))
        .copied()
        .collect();
    all.sort_unstable();
    all
}

/// Every address of either map with its two values.
fn merge<'a>(
    placed: &'a mut BTreeMap<IpAddr, Placed>,
    peers: &'a BTreeMap<IpAddr, Arc<PodIdentity>>,
) -> impl Iterator<
    Item = (
        &'a IpAddr,
        Option<&'a mut Placed>,
        Option<&'a Arc<PodIdentity>>,
    ),
> {
    let mut placed = placed.iter_mut().peekable();
    let mut peers = peers.iter().peekable();
    std::iter::from_fn(move || {
        let order = match (placed.peek(), peers.peek()) {
            (None, None) => return None,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((a, _)), Some((b, _))) => (*a).cmp(b),
        };
        let known = if order.is_le() { placed.next() } else { None };
        let pod = if order.is_ge() { peers.next() } else { None };
        let address = known.as_ref().map(|(a, _)| *a).or(pod.map(|(a, _)| a))?;
        Some((
            address,
            known.map(|(_, known)| known),
            pod.map(|(_, pod)| pod),
        ))
    })
}
