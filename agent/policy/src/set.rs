//! A set of few values that hardly ever changes, in as much memory as they take.

use std::{fmt, slice};

/// An ordered set in one piece of memory. A B-tree has room for eleven values from the first on; a
/// policy has a dozen sets of one or two, and a cluster ten thousand policies.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SmallSet<T>(Box<[T]>);

impl<T> SmallSet<T> {
    /// All values, in order.
    pub fn iter(&self) -> slice::Iter<'_, T> {
        self.0.iter()
    }

    /// The number of values.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first value.
    #[must_use]
    pub fn first(&self) -> Option<&T> {
        self.0.first()
    }
}

impl<T: Ord> SmallSet<T> {
    /// Whether a value is there.
    #[must_use]
    pub fn contains<Q: Ord + ?Sized>(&self, value: &Q) -> bool
    where
        T: std::borrow::Borrow<Q>,
    {
        let found = self.0.binary_search_by(|known| known.borrow().cmp(value));
        found.is_ok()
    }

    /// Adds a value; false if it was there. Copies the set.
    pub fn insert(&mut self, value: T) -> bool {
        let Err(at) = self.0.binary_search(&value) else {
            return false;
        };
        let mut all = std::mem::take(&mut self.0).into_vec();
        all.insert(at, value);
        self.0 = all.into();
        true
    }
}

impl<T> Default for SmallSet<T> {
    fn default() -> Self {
        Self(Box::default())
    }
}

impl<T: Ord> FromIterator<T> for SmallSet<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        let mut all: Vec<T> = values.into_iter().collect();
        all.sort_unstable();
        all.dedup();
        Self(all.into())
    }
}

impl<T: Ord, const N: usize> From<[T; N]> for SmallSet<T> {
    fn from(values: [T; N]) -> Self {
        values.into_iter().collect()
    }
}

impl<T> IntoIterator for SmallSet<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_vec().into_iter()
    }
}

impl<'a, T> IntoIterator for &'a SmallSet<T> {
    type Item = &'a T;
    type IntoIter = slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<T: fmt::Debug> fmt::Debug for SmallSet<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_set_in_order() {
        let mut set: SmallSet<String> = ["b", "a", "b"].map(str::to_owned).into();
        assert!(set.iter().eq(["a", "b"]));
        assert!(set.contains("a") && !set.contains("c"));
        assert!(set.insert("ab".to_owned()) && !set.insert("a".to_owned()));
        assert!(set.iter().eq(["a", "ab", "b"]));
        assert_eq!((set.len(), set.first()), (3, Some(&"a".to_owned())));
        assert_eq!(set, ["b", "ab", "a"].map(str::to_owned).into());
        assert!(SmallSet::<u8>::default().is_empty());
    }
}
