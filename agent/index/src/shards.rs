//! An ordered map in many parts, of which copies share what they have in common.
//!
//! The state of a hundred thousand Services is handed from stage to stage and compared with what it
//! was: with parts that are shared, a copy and a comparison cost what has changed, not what there is.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, btree_map},
    fmt,
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher, Hash},
    ops::Index,
    sync::Arc,
};

/// Enough for a part to have a hundred entries where there are a hundred thousand.
const PARTS: usize = 1024;

/// A map whose clone is cheap, and shares its parts until one of the two changes.
///
/// Iteration is in the order of the parts, which is the same for the same keys but not sorted.
pub struct Shards<K, V> {
    parts: Arc<[Arc<BTreeMap<K, V>>]>,
    len: usize,
}

impl<K, V> Clone for Shards<K, V> {
    fn clone(&self) -> Self {
        Self {
            parts: Arc::clone(&self.parts),
            len: self.len,
        }
    }
}

impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        let empty = Arc::new(BTreeMap::new());
        Self {
            parts: (0..PARTS).map(|_| Arc::clone(&empty)).collect(),
            len: 0,
        }
    }
}

/// Which part a key is in; a borrowed key hashes like its owner.
fn part<Q: Hash + ?Sized>(key: &Q) -> usize {
    let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(key);
    (hash % PARTS as u64) as usize
}

impl<K: Ord + Hash, V> Shards<K, V> {
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

    /// The value of a key.
    pub fn get<Q: Ord + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.parts[part(key)].get(key)
    }

    /// Whether a key is there.
    pub fn contains_key<Q: Ord + Hash + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.parts.iter().flat_map(|part| part.iter())
    }

    /// All keys.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// All values.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// All entries by key, for people.
    #[must_use]
    pub fn sorted(&self) -> BTreeMap<&K, &V> {
        self.iter().collect()
    }

    /// Every key whose value differs, with its value here and there. Parts that are shared are not
    /// looked at.
    pub fn changes<'a>(
        &'a self,
        other: &'a Self,
    ) -> impl Iterator<Item = (&'a K, Option<&'a V>, Option<&'a V>)>
    where
        V: PartialEq,
    {
        let pairs = self.parts.iter().zip(other.parts.iter());
        pairs
            .filter(|(a, b)| !Arc::ptr_eq(a, b))
            .flat_map(|(a, b)| {
                let here = a.iter().filter_map(|(key, value)| {
                    let there = b.get(key);
                    (there != Some(value)).then_some((key, Some(value), there))
                });
                let there = b.iter().filter(|(key, _)| !a.contains_key(*key));
                here.chain(there.map(|(key, value)| (key, None, Some(value))))
            })
    }
}

impl<K: Ord + Hash + Clone, V: Clone> Shards<K, V> {
    /// Writes an entry; returns the value that it replaces.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let at = part(&key);
        let old = Arc::make_mut(&mut Arc::make_mut(&mut self.parts)[at]).insert(key, value);
        self.len += usize::from(old.is_none());
        old
    }

    /// Removes an entry; returns its value.
    pub fn remove<Q: Ord + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let at = part(key);
        if !self.parts[at].contains_key(key) {
            return None;
        }
        let old = Arc::make_mut(&mut Arc::make_mut(&mut self.parts)[at]).remove(key);
        self.len -= usize::from(old.is_some());
        old
    }
}

impl<K: Ord + Hash + Clone, V: Clone> FromIterator<(K, V)> for Shards<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        map.extend(entries);
        map
    }
}

impl<K: Ord + Hash + Clone, V: Clone> Extend<(K, V)> for Shards<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        for (key, value) in entries {
            self.insert(key, value);
        }
    }
}

impl<'a, K, V> IntoIterator for &'a Shards<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = Iter<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        Iter {
            parts: self.parts.iter(),
            part: None,
        }
    }
}

/// The entries of a [`Shards`].
#[derive(Debug)]
pub struct Iter<'a, K, V> {
    parts: std::slice::Iter<'a, Arc<BTreeMap<K, V>>>,
    part: Option<btree_map::Iter<'a, K, V>>,
}

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.part.as_mut().and_then(Iterator::next) {
                return Some(entry);
            }
            self.part = Some(self.parts.next()?.iter());
        }
    }
}

impl<K: Ord + Hash, V, Q: Ord + Hash + ?Sized> Index<&Q> for Shards<K, V>
where
    K: Borrow<Q>,
{
    type Output = V;

    fn index(&self, key: &Q) -> &V {
        self.get(key).expect("no entry of this key")
    }
}

impl<K: PartialEq, V: PartialEq> PartialEq for Shards<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len
            && self
                .parts
                .iter()
                .zip(other.parts.iter())
                .all(|(a, b)| Arc::ptr_eq(a, b) || a == b)
    }
}

impl<K: Eq, V: Eq> Eq for Shards<K, V> {}

impl<K: Ord + Hash + fmt::Debug, V: fmt::Debug> fmt::Debug for Shards<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.sorted()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_shares_what_has_not_changed() {
        let mut map: Shards<u32, u32> = (0..5_000).map(|n| (n, n)).collect();
        let before = map.clone();
        assert_eq!((map.len(), map == before), (5_000, true));
        assert_eq!(map.changes(&before).count(), 0);
        assert_eq!(map.insert(7, 70), Some(7));
        assert_eq!(map.insert(9_000, 1), None);
        assert_eq!(map.remove(&8), Some(8));
        assert_eq!(map.remove(&8), None);
        assert_eq!((map.len(), before.len()), (5_000, 5_000));
        let shared = map
            .parts
            .iter()
            .zip(before.parts.iter())
            .filter(|(a, b)| Arc::ptr_eq(a, b));
        assert!(shared.count() >= PARTS - 3);
        let changes: BTreeMap<_, _> = before
            .changes(&map)
            .map(|(key, old, new)| (*key, (old.copied(), new.copied())))
            .collect();
        let expected = [
            (7, (Some(7), Some(70))),
            (8, (Some(8), None)),
            (9_000, (None, Some(1))),
        ];
        assert_eq!(changes, BTreeMap::from(expected));
        assert_eq!((map[&7], before[&7]), (70, 7));
    }

    #[test]
    fn what_was_built_in_another_order_is_equal() {
        let forth: Shards<u32, ()> = (0..100).map(|n| (n, ())).collect();
        let back: Shards<u32, ()> = (0..100).rev().map(|n| (n, ())).collect();
        assert_eq!(forth, back);
        assert!(forth.keys().eq(back.keys()));
        assert_eq!(forth.into_iter().count(), 100);
    }
}
