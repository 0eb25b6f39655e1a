//! The entries of all policy sets, set by set, of which copies share the sets that they have in common.
//!
//! A node with ten thousand policies has tens of thousands of entries, and an event concerns one set or
//! two: a copy, a comparison and a difference cost what has changed, not what there is.

use std::{
    collections::{BTreeMap, btree_map},
    fmt,
    sync::Arc,
};

use hachi_abi::{PolicyEntry, PolicyKey};

/// The entries of one set.
type Of = BTreeMap<PolicyKey, PolicyEntry>;

/// An ordered map of policy entries whose copies share the sets that are the same.
#[derive(Clone, Default)]
pub struct Policies {
    /// None is empty.
    sets: BTreeMap<u32, Arc<Of>>,
    len: usize,
}

impl Policies {
    /// The number of entries.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entry of a key.
    #[must_use]
    pub fn get(&self, key: &PolicyKey) -> Option<&PolicyEntry> {
        self.sets.get(&key.set)?.get(key)
    }

    /// Writes an entry; returns the one that it replaces.
    pub fn insert(&mut self, key: PolicyKey, entry: PolicyEntry) -> Option<PolicyEntry> {
        let old = Arc::make_mut(self.sets.entry(key.set).or_default()).insert(key, entry);
        self.len += usize::from(old.is_none());
        old
    }

    /// Removes an entry; returns it.
    pub fn remove(&mut self, key: &PolicyKey) -> Option<PolicyEntry> {
        self.get(key)?;
        let of = self.sets.get_mut(&key.set)?;
        let old = Arc::make_mut(of).remove(key);
        if of.is_empty() {
            self.sets.remove(&key.set);
        }
        self.len -= usize::from(old.is_some());
        old
    }

    /// Removes a whole set.
    pub fn remove_set(&mut self, set: u32) {
        self.len -= self.sets.remove(&set).map_or(0, |of| of.len());
    }

    /// Removes what is said of a class.
    pub fn remove_class(&mut self, set: u32, class: u32) {
        let keys: Vec<PolicyKey> = self.of_class(set, class).map(|(key, _)| *key).collect();
        for key in keys {
            self.remove(&key);
        }
    }

    /// The sets that have entries, in order.
    pub fn sets(&self) -> impl Iterator<Item = u32> {
        self.sets.keys().copied()
    }

    /// The number of entries of a set.
    #[must_use]
    pub fn len_of(&self, set: u32) -> usize {
        self.sets.get(&set).map_or(0, |of| of.len())
    }

    /// The entries of a set, in order.
    pub fn of_set(&self, set: u32) -> impl Iterator<Item = (&PolicyKey, &PolicyEntry)> {
        self.sets.get(&set).into_iter().flat_map(|of| of.iter())
    }

    /// What a set says of a class, in order.
    pub fn of_class(
        &self,
        set: u32,
        class: u32,
    ) -> impl Iterator<Item = (&PolicyKey, &PolicyEntry)> {
        let first = PolicyKey {
            set,
            class,
            ..PolicyKey::default()
        };
        let last = PolicyKey {
            port: [u8::MAX; 2],
            plen: u8::MAX,
            proto: u8::MAX,
            ..first
        };
        let of = self.sets.get(&set).into_iter();
        of.flat_map(move |of| of.range(first..=last))
    }

    /// All entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&PolicyKey, &PolicyEntry)> {
        self.sets.values().flat_map(|of| of.iter())
    }

    /// All keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &PolicyKey> {
        self.iter().map(|(key, _)| key)
    }

    /// Every key whose entry differs, with its entry here and there, in order. Sets that are shared are
    /// not looked at.
    pub fn changes<'a>(
        &'a self,
        other: &'a Self,
    ) -> impl Iterator<
        Item = (
            &'a PolicyKey,
            Option<&'a PolicyEntry>,
            Option<&'a PolicyEntry>,
        ),
    > {
        const NONE: &Of = &Of::new();
        crate::diff::merge(&self.sets, &other.sets)
            .filter(|(_, a, b)| match (a, b) {
                (Some(a), Some(b)) => !Arc::ptr_eq(a, b),
                _ => true,
            })
            .flat_map(|(_, a, b)| crate::diff::merge(a.map_or(NONE, |a| a), b.map_or(NONE, |b| b)))
            .filter(|(_, a, b)| a != b)
    }
}

impl FromIterator<(PolicyKey, PolicyEntry)> for Policies {
    fn from_iter<I: IntoIterator<Item = (PolicyKey, PolicyEntry)>>(entries: I) -> Self {
        let mut all = Self::default();
        for (key, entry) in entries {
            all.insert(key, entry);
        }
        all
    }
}

impl<'a> IntoIterator for &'a Policies {
    type Item = (&'a PolicyKey, &'a PolicyEntry);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Self::IntoIter {
        Iter {
            sets: self.sets.values(),
            set: None,
        }
    }
}

/// The entries of [`Policies`].
#[derive(Debug)]
pub struct Iter<'a> {
    sets: btree_map::Values<'a, u32, Arc<Of>>,
    set: Option<btree_map::Iter<'a, PolicyKey, PolicyEntry>>,
}

impl<'a> Iterator for Iter<'a> {
    type Item = (&'a PolicyKey, &'a PolicyEntry);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.set.as_mut().and_then(Iterator::next) {
                return Some(entry);
            }
            self.set = Some(self.sets.next()?.iter());
        }
    }
}

impl PartialEq for Policies {
    fn eq(&self, other: &Self) -> bool {
        let same = |(a, b): (&Arc<Of>, &Arc<Of>)| Arc::ptr_eq(a, b) || a == b;
        self.len == other.len
            && self.sets.keys().eq(other.sets.keys())
            && self.sets.values().zip(other.sets.values()).all(same)
    }
}

impl Eq for Policies {}

impl fmt::Debug for Policies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(set: u32, class: u32) -> PolicyKey {
        PolicyKey {
            set,
            class,
            ..PolicyKey::default()
        }
    }

    #[test]
    fn a_copy_shares_the_sets_that_have_not_changed() {
        let entry = PolicyEntry {
            verdict: 1,
            rule: 7,
        };
        let all = (1..4).flat_map(|set| (0..5).map(move |class| (key(set, class), entry)));
        let mut map: Policies = all.collect();
        let before = map.clone();
        assert_eq!((map.len(), map == before), (15, true));
        let other = PolicyEntry { rule: 8, ..entry };
        assert_eq!(map.insert(key(2, 1), other), Some(entry));
        map.remove_class(3, 4);
        map.remove_set(1);
        assert_eq!((map.len(), before.len(), map.len_of(3)), (9, 15, 4));
        assert!(Arc::ptr_eq(&before.clone().sets[&2], &before.sets[&2]));
        let changes: Vec<_> = before
            .changes(&map)
            .map(|(key, a, b)| (key.set, key.class, a.copied(), b.copied()))
            .collect();
        let mut expected: Vec<_> = (0..5).map(|class| (1, class, Some(entry), None)).collect();
        expected.push((2, 1, Some(entry), Some(other)));
        expected.push((3, 4, Some(entry), None));
        assert_eq!(changes, expected);
        assert!(map.of_class(2, 1).eq([(&key(2, 1), &other)]));
        assert!(map.into_iter().eq(map.iter()));
        (0..4).for_each(|class| map.remove_class(3, class));
        assert_eq!(map.sets().collect::<Vec<_>>(), [2], "no set is empty");
    }
}
