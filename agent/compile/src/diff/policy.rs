//! Endpoints, classes and policy entries.
//!
//! All addresses move to their new classes first, then every endpoint to its new sets. In between,
//! an endpoint looks the new class of an address up in its old set. For the answer to be the old one:
//! - a class that the old set does not know gets *bridge* entries: what the set said of the class that
//!   the address had before;
//! - where that cannot be, because the set already has something else to say of the class (others
//!   have it too), the address makes a *detour*: a class of its own for the time of the change, in
//!   which old sets say what they said of the old class, and new sets what they say of the new one;
//! - a set that some endpoints leave while others join it cannot say both of a detour. Those who join
//!   make a detour too: a copy of the set for the time of the change.
//!
//! Detours are rare: they need a change of policies and one of labels at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use hachi_abi::{Endpoint, PolicyEntry, PolicyKey, SET_ALLOW_ALL, Verdict};

use super::{
    classes::{self, Move},
    merge,
};
use crate::{Image, Op, Policies, sets::SET_QUARANTINE};

/// No interface has this index.
const NO_INTERFACE: u32 = 0;

type Entries = BTreeMap<PolicyKey, PolicyEntry>;

pub(super) fn diff(old: &Image, new: &Image, ops: &mut Vec<Op>) {
    let same_addresses = old.peers == new.peers && old.cidrs == new.cidrs;
    if same_addresses && old.endpoints == new.endpoints && old.policy == new.policy {
        return;
    }
    let plan = Plan::new(old, new);
    let Plan {
        live,
        used,
        extra,
        detours,
        copies,
        ..
    } = &plan;

    let gone_endpoints = old
        .endpoints
        .keys()
        .filter(|a| !new.endpoints.contains_key(a));
    ops.extend(gone_endpoints.map(|address| Op::DeleteEndpoint(*address)));

    // Whether some packet may still be judged by an entry of the old image.
    let needed = |key: &PolicyKey| live.contains(&key.set) && used.contains(&key.class);
    let (mut gone, mut puts) = (Vec::new(), Vec::new());
    // What an id stands for never changes, unless somebody else wrote to the maps.
    let mut tampered = false;
    for (key, before, after) in old.policy.changes(&new.policy) {
        if before.is_some_and(|entry| entry.verdict() == Verdict::Allow) {
            tampered |= plan.stays(key);
        }
        match after {
            Some(entry) => puts.push(Op::PutPolicy(*key, *entry)),
            None if extra.contains_key(key) => {}
            None if needed(key) => gone.push(Op::DeletePolicy(*key)),
            None => ops.push(Op::DeletePolicy(*key)),
        }
    }
    ops.append(&mut puts);
    let bridges = extra
        .iter()
        .filter(|(key, entry)| old.policy.get(key) != Some(entry));
    ops.extend(bridges.map(|(key, entry)| Op::PutPolicy(*key, *entry)));

    let half = if detours.is_empty() {
        None
    } else {
        Some(classes::half_way(old, new, detours))
    };
    classes::write(
        old.into(),
        half.as_ref().map_or(new.into(), Into::into),
        ops,
    );

    let raise = tampered || plan.can_end_flows();
    let (mut restore, mut open) = (Vec::new(), Vec::new());
    for (address, endpoint) in &new.endpoints {
        let before = old.endpoints.get(address);
        if before == Some(endpoint) {
            continue;
        }
        let mut first = *endpoint;
        let set = |after: u32, before: Option<u32>| match copies.get(&after) {
            Some(copy) if before != Some(after) => *copy,
            _ => after,
        };
        first.ingress_set = set(endpoint.ingress_set, before.map(|e| e.ingress_set));
        first.egress_set = set(endpoint.egress_set, before.map(|e| e.egress_set));
        let mut last = *endpoint;
        if raise && before.is_none_or(|before| before.ifindex != endpoint.ifindex) {
            // Flows to the address may be older than its Pod, and pass until the revision is raised:
            // until then they lead to no interface.
            first.ifindex = NO_INTERFACE;
            last.ifindex = NO_INTERFACE;
            open.push(Op::PutEndpoint(*address, *endpoint));
        }
        ops.push(Op::PutEndpoint(*address, first));
        if first != last {
            restore.push(Op::PutEndpoint(*address, last));
        }
    }
    if let Some(half) = &half {
        classes::write(half.into(), new.into(), ops);
    }
    ops.append(&mut restore);
    if raise {
        ops.push(Op::RaiseRevision);
    }
    ops.append(&mut open);
    ops.append(&mut gone);
    ops.extend(extra.keys().map(|key| Op::DeletePolicy(*key)));
}

struct Plan<'a> {
    old: &'a Image,
    new: &'a Image,
    /// Sets that endpoints of the old image have.
    live: BTreeSet<u32>,
    /// Classes that addresses of the old image have.
    used: BTreeSet<u32>,
    /// Classes that addresses of the new image have.
    used_after: BTreeSet<u32>,
    moves: BTreeSet<Move>,
    /// Old and new set of every endpoint that stays.
    switches: BTreeSet<(u32, u32)>,
    /// Entries for the time of the change.
    extra: Entries,
    /// The class half way of moves that cannot be made at once.
    detours: BTreeMap<Move, u32>,
    /// Copies of sets for the time of the change.
    copies: BTreeMap<u32, u32>,
}

impl<'a> Plan<'a> {
    fn new(old: &'a Image, new: &'a Image) -> Self {
        let mut plan = Self {
            old,
            new,
            live: sets_of(&old.endpoints).collect(),
            used: classes::used(old),
            used_after: classes::used(new),
            moves: classes::moves(old, new),
            switches: switches(old, new),
            extra: Entries::new(),
            detours: BTreeMap::new(),
            copies: BTreeMap::new(),
        };
        plan.bridge();
        plan
    }

    fn bridge(&mut self) {
        let changed = || self.switches.iter().filter(|(from, to)| from != to);
        let left: BTreeSet<u32> = changed()
            .map(|(from, _)| *from)
            .filter(|set| has_entries(*set))
            .collect();
        if left.is_empty() || self.moves.is_empty() {
            return;
        }
        let kept: BTreeSet<u32> = sets_of(&self.new.endpoints)
            .chain(self.new.policy.sets())
            .collect();
        // Where bridges begin: (old set, new class) to old class.
        let mut bridges: BTreeMap<(u32, u32), u32> = BTreeMap::new();
        // Few changes need any.
        let (old, new) = (self.old, self.new);
        let mut fresh = None;
        let make = || Fresh::new(old, new);
        for (from, to) in &self.moves {
            let fits = |set: &u32| {
                let old = &self.old.policy;
                let says = |there, class| says(old, *set, *from).eq(says(there, *set, class));
                if kept.contains(set) {
                    return says(&self.new.policy, *to);
                }
                if self.used.contains(to) {
                    return says(old, *to);
                }
                bridges
                    .get(&(*set, *to))
                    .is_none_or(|other| says(old, *other))
            };
            if left.iter().all(fits) {
                let free = |set: &&u32| !kept.contains(set) && !self.used.contains(to);
                for set in left.iter().filter(free) {
                    bridges.entry((*set, *to)).or_insert(*from);
                }
            } else {
                self.detours
                    .insert((*from, *to), fresh.get_or_insert_with(make).class());
            }
        }
        for ((set, to), from) in bridges {
            copy(&self.old.policy, (set, from), (set, to), &mut self.extra);
        }

        let joined: BTreeSet<u32> = joined(self.old, self.new).collect();
        for ((from, to), half) in &self.detours {
            for set in &left {
                copy(
                    &self.old.policy,
                    (*set, *from),
                    (*set, *half),
                    &mut self.extra,
                );
            }
            for set in kept.difference(&left) {
                copy(
                    &self.new.policy,
                    (*set, *to),
                    (*set, *half),
                    &mut self.extra,
                );
            }
        }
        if self.detours.is_empty() {
            return;
        }
        for set in left.intersection(&joined) {
            let copied = fresh.get_or_insert_with(make).set();
            self.copies.insert(*set, copied);
            for (key, entry) in self.new.policy.of_set(*set) {
                self.extra.insert(
                    PolicyKey {
                        set: copied,
                        ..*key
                    },
                    *entry,
                );
            }
            for ((_, to), half) in &self.detours {
                copy(
                    &self.new.policy,
                    (*set, *to),
                    (copied, *half),
                    &mut self.extra,
                );
            }
        }
    }

    /// Whether both images have the set and the class.
    fn stays(&self, key: &PolicyKey) -> bool {
        let PolicyKey { set, class, .. } = *key;
        let switch = self.switches.contains(&(set, set));
        switch && self.used.contains(&class) && self.used_after.contains(&class)
    }

    /// Whether a flow that was allowed may now have to end. What is only allowed in addition needs no
    /// second look at the flows that there are.
    fn can_end_flows(&self) -> bool {
        let (old, new) = (self.old, self.new);
        // An address may have flows from before it became this interface's, or stopped to be: somebody
        // may have sent to it while nobody was there.
        let isolated =
            |e: &Endpoint| e.ingress_set != SET_ALLOW_ALL || e.egress_set != SET_ALLOW_ALL;
        let other_hands =
            merge(&old.endpoints, &new.endpoints).any(|(_, before, after)| match (before, after) {
                (Some(before), Some(after)) => before.ifindex != after.ifindex,
                (None, Some(after)) => isolated(after),
                (_, None) => true,
            });
        if other_hands {
            return true;
        }
        let flags = |image: &Image, address| image.peers.get(address).map_or(0, |p| p.flags);
        if old
            .peers
            .iter()
            .any(|(address, peer)| peer.flags & !flags(new, address) != 0)
        {
            return true;
        }
        let stay = self.used.iter().map(|class| (*class, *class));
        let all: Vec<Move> = self.moves.iter().copied().chain(stay).collect();
        self.switches
            .iter()
            .any(|(before, after)| match (*before, *after) {
                (_, SET_ALLOW_ALL) | (SET_QUARANTINE, _) => false,
                (SET_ALLOW_ALL, _) => true,
                (before, after) => all.iter().any(|(from, to)| {
                    // What both images have means the same in both.
                    (before != after || from != to) && {
                        let small = || says(&old.policy, before, *from);
                        let large = || says(&new.policy, after, *to);
                        !small().eq(large()) && !covers(&large().collect(), &small().collect())
                    }
                }),
            })
    }
}

/// The verdict of every protocol and port of one class in one set.
type Says = BTreeMap<(u8, [u8; 2], u8), u32>;

fn says(policy: &Policies, set: u32, class: u32) -> impl Iterator<Item = ((u8, [u8; 2], u8), u32)> {
    let of = policy.of_class(set, class);
    of.map(|(key, entry)| ((key.proto, key.port, key.plen), entry.verdict))
}

/// Whether everything that `small` allows is allowed by `large` too. A no where it cannot be told
/// easily.
fn covers(large: &Says, small: &Says) -> bool {
    const ALLOW: u32 = Verdict::Allow as u32;
    if large
        .values()
        .chain(small.values())
        .any(|verdict| *verdict != ALLOW)
    {
        return false;
    }
    large.contains_key(&(0, [0, 0], 0))
        || small.keys().all(|(proto, port, plen)| {
            let port = u32::from(u16::from_be_bytes(*port));
            (0..=*plen).any(|bits| {
                let start = (port >> (16 - bits) << (16 - bits)) as u16;
                large.contains_key(&(*proto, start.to_be_bytes(), bits))
            })
        })
}

fn has_entries(set: u32) -> bool {
    set != SET_ALLOW_ALL && set != SET_QUARANTINE
}

fn sets_of(endpoints: &BTreeMap<IpAddr, Endpoint>) -> impl Iterator<Item = u32> {
    let sets = endpoints
        .values()
        .flat_map(|e| [e.ingress_set, e.egress_set]);
    sets.filter(|set| has_entries(*set))
}

fn switches(old: &Image, new: &Image) -> BTreeSet<(u32, u32)> {
    let both = new.endpoints.iter().filter_map(|(address, after)| {
        let before = old.endpoints.get(address)?;
        Some([
            (before.ingress_set, after.ingress_set),
            (before.egress_set, after.egress_set),
        ])
    });
    both.flatten().collect()
}

/// Sets that some endpoint has in the new image and had not in the old one.
fn joined(old: &Image, new: &Image) -> impl Iterator<Item = u32> {
    new.endpoints.iter().flat_map(|(address, after)| {
        let before = old.endpoints.get(address);
        let ingress = (before.map(|e| e.ingress_set), after.ingress_set);
        let egress = (before.map(|e| e.egress_set), after.egress_set);
        let changed = [ingress, egress]
            .into_iter()
            .filter(|(b, after)| *b != Some(*after));
        changed.map(|(_, after)| after)
    })
}

/// Copies what one set says of one class.
fn copy(policy: &Policies, from: (u32, u32), to: (u32, u32), into: &mut Entries) {
    for (key, entry) in policy.of_class(from.0, from.1) {
        into.insert(
            PolicyKey {
                set: to.0,
                class: to.1,
                ..*key
            },
            *entry,
        );
    }
}

/// Ids that neither image uses.
struct Fresh {
    classes: BTreeSet<u32>,
    sets: BTreeSet<u32>,
}

impl Fresh {
    fn new(old: &Image, new: &Image) -> Self {
        let keys = || old.policy.keys().chain(new.policy.keys());
        Self {
            classes: (classes::used(old).into_iter().chain(classes::used(new)))
                .chain(keys().map(|k| k.class))
                .collect(),
            sets: (sets_of(&old.endpoints).chain(sets_of(&new.endpoints)))
                .chain(old.policy.sets().chain(new.policy.sets()))
                .chain([SET_ALLOW_ALL, SET_QUARANTINE])
                .collect(),
        }
    }

    fn class(&mut self) -> u32 {
        take(&mut self.classes)
    }

    fn set(&mut self) -> u32 {
        take(&mut self.sets)
    }
}

fn take(taken: &mut BTreeSet<u32>) -> u32 {
    let mut id = 1;
    while !taken.insert(id) {
        id += 1;
    }
    id
}
