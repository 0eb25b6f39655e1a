//! The map entries of a set for a class: the order of the rules is resolved here, once and for every
//! port, so that the datapath only looks for the longest prefix.
//!
//! ```text
//! rules that match the class ─> every (protocol, port prefix) that one of them names
//!     ─> which rule decides there, the wider prefixes around it included ─> entries, where
//!        that differs from what the entry around says
//! ```

use std::collections::{BTreeMap, BTreeSet};

use hachi_abi::{CLASS_WORLD, PolicyEntry, PolicyKey, RULE_NONE, Verdict};
use hachi_policy::{Action, Tier};

use crate::{
    Policies,
    classes::{Class, Matcher},
    hash,
    sets::{Content, SetPort, SetRule, Sets},
};

/// What a set is called, and what a class is.
type Id = u32;

/// The entries of all sets for all classes, kept from one compilation to the next.
#[derive(Debug, Default)]
pub(crate) struct Entries {
    pub(crate) all: Policies,
    /// What they are made of: contents by set id, content hashes of classes by class id.
    sets: BTreeMap<Id, u64>,
    classes: BTreeMap<Id, u64>,
}

impl Entries {
    /// Removes what is gone and adds what is new.
    pub(crate) fn update(&mut self, sets: &Sets, matcher: &Matcher) {
        let hashes = sets.contents.iter().map(|content| content.hash);
        let now_sets: BTreeMap<Id, u64> = sets.ids.iter().copied().zip(hashes).collect();
        let now_classes: BTreeMap<Id, u64> = matcher
            .used()
            .filter(|(id, _)| *id != CLASS_WORLD)
            .map(|(id, class)| (id, class.hash))
            .collect();
        // Where two contents want one id, what an id stands for may change without a trace in these.
        let collided = |ids: &BTreeMap<Id, u64>| ids.iter().any(|(id, h)| *id != hash::id(*h));
        if collided(&now_sets)
            || collided(&now_classes)
            || collided(&self.sets)
            || collided(&self.classes)
        {
            *self = Self::default();
        }
        let gone = |before: &BTreeMap<Id, u64>, now: &BTreeMap<Id, u64>| -> BTreeSet<Id> {
            let gone = before
                .iter()
                .filter(|(id, hash)| now.get(id) != Some(*hash));
            gone.map(|(id, _)| *id).collect()
        };
        let gone_sets = gone(&self.sets, &now_sets);
        let gone_classes = gone(&self.classes, &now_classes);
        let new_sets = gone(&now_sets, &self.sets);
        let new_classes = gone(&now_classes, &self.classes);
        for set in &gone_sets {
            self.all.remove_set(*set);
        }
        for set in now_sets.keys() {
            for class in &gone_classes {
                self.all.remove_class(*set, *class);
            }
        }
        for (at, content) in sets.contents.iter().enumerate() {
            let set = sets.ids[at];
            let fresh = new_sets.contains(&set);
            if !fresh && new_classes.is_empty() {
                continue;
            }
            let selectors = matcher.selectors_of(content);
            for (id, class) in matcher.used() {
                if fresh || new_classes.contains(&id) {
                    let rules = matcher.matching(content, &selectors, class);
                    resolve(
                        content,
                        &rules,
                        class,
                        &mut |proto, port, plen, decision| {
                            let key = PolicyKey {
                                set,
                                class: id,
                                port: port.to_be_bytes(),
                                plen,
                                proto,
                            };
                            self.all.insert(key, decision.entry(content, sets));
                        },
                    );
                }
            }
        }
        (self.sets, self.classes) = (now_sets, now_classes);
    }

    /// The index of the set with the most entries.
    pub(crate) fn largest(&self, sets: &Sets) -> Option<usize> {
        let count = |at: &usize| (self.all.len_of(sets.ids[*at]), sets.ids[*at]);
        (0..sets.contents.len()).max_by_key(count)
    }
}

/// What is decided, and by which rule of the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Decision {
    allow: bool,
    rule: Option<usize>,
}

impl Decision {
    fn entry(self, content: &Content, sets: &Sets) -> PolicyEntry {
        let id = |at: usize| sets.rules.get(&content.rules[at].rule).copied();
        let verdict = if self.allow {
            Verdict::Allow
        } else {
            Verdict::Deny
        };
        PolicyEntry {
            verdict: verdict as u32,
            rule: self.rule.and_then(id).unwrap_or(RULE_NONE),
        }
    }
}

/// The rule of each tier that comes first, by index.
#[derive(Clone, Copy, Debug, Default)]
struct First {
    admin: Option<usize>,
    /// Of a `NetworkPolicy` any accepting rule will do: the widest, so that what is inside it needs no
    /// entry of its own.
    network: Option<usize>,
    baseline: Option<usize>,
}

impl First {
    fn add(&mut self, at: usize, tier: Tier) {
        let first = |known: Option<usize>| Some(known.map_or(at, |known| known.min(at)));
        match tier {
            Tier::Admin => self.admin = first(self.admin),
            Tier::Network => self.network = first(self.network),
            Tier::Baseline => self.baseline = first(self.baseline),
        }
    }

    fn inside(self, outer: Self) -> Self {
        let first = |a: Option<usize>, b: Option<usize>| a.into_iter().chain(b).min();
        Self {
            admin: first(self.admin, outer.admin),
            network: outer.network.or(self.network),
            baseline: first(self.baseline, outer.baseline),
        }
    }

    fn decide(self, content: &Content) -> Decision {
        let of = |at: usize| {
            let decided = |allow| {
                Some(Decision {
                    allow,
                    rule: Some(at),
                })
            };
            match content.rules[at].action {
                Action::Accept => decided(true),
                Action::Deny => decided(false),
                Action::Pass => None,
            }
        };
        if let Some(decision) = self.admin.and_then(of) {
            return decision;
        }
        if content.isolated {
            return Decision {
                allow: self.network.is_some(),
                rule: self.network,
            };
        }
        self.baseline.and_then(of).unwrap_or(Decision {
            allow: true,
            rule: None,
        })
    }
}

/// Tells `put` every entry of a set for a class that the rules of these indices match.
fn resolve(
    content: &Content,
    rules: &[usize],
    class: &Class,
    put: &mut impl FnMut(u8, u16, u8, Decision),
) {
    let mut everything = First::default();
    // A prefix comes before those inside it.
    let mut prefixes: BTreeMap<(u8, u16, u8), First> = BTreeMap::new();
    for &at in rules {
        let SetRule { tier, ports, .. } = &content.rules[at];
        let mut name = |proto, port, plen| {
            let first = prefixes.entry((proto, port, plen)).or_default();
            first.add(at, *tier);
        };
        for port in ports {
            match port {
                SetPort::Any => everything.add(at, *tier),
                SetPort::Prefix { proto, port, plen } => name(*proto, *port, *plen),
                SetPort::Named { name: of, protocol } => {
                    let ports = class.resolve(of, *protocol);
                    ports.for_each(|port| name(protocol.number(), port, 16));
                }
            }
        }
    }
    let outermost = everything.decide(content);
    let silent = Decision {
        allow: false,
        rule: None,
    };
    if outermost != silent {
        put(0, 0, 0, outermost);
    }
    let mut around: Vec<((u8, u16, u8), First, Decision)> = Vec::new();
    for (at, first) in prefixes {
        let covers = |outer: &(u8, u16, u8)| {
            outer.0 == at.0 && outer.2 <= at.2 && {
                let differing = u32::from(outer.1 ^ at.1) << 16;
                outer.2 == 0 || differing >> (32 - u32::from(outer.2)) == 0
            }
        };
        while around.last().is_some_and(|(outer, ..)| !covers(outer)) {
            around.pop();
        }
        let (outer, said) = around
            .last()
            .map_or((everything, outermost), |(_, first, said)| (*first, *said));
        let first = first.inside(outer);
        let decision = first.decide(content);
        if decision != said {
            put(at.0, at.1, at.2, decision);
        }
        around.push((at, first, decision));
    }
}
