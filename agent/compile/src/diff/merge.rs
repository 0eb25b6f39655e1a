//! Two ordered maps side by side, in one pass.

use std::{cmp::Ordering, collections::BTreeMap};

/// Every key of either map with its two values.
pub(crate) fn merge<'a, K: Ord, V>(
    a: &'a BTreeMap<K, V>,
    b: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, Option<&'a V>, Option<&'a V>)> {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    std::iter::from_fn(move || {
        let order = match (a.peek(), b.peek()) {
            (None, None) => return None,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((x, _)), Some((y, _))) => x.cmp(y),
        };
        match order {
            Ordering::Less => a.next().map(|(key, value)| (key, Some(value), None)),
            Ordering::Greater => b.next().map(|(key, value)| (key, None, Some(value))),
            Ordering::Equal => {
                let (key, value) = a.next()?;
                Some((key, Some(value), b.next().map(|(_, value)| value)))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_once() {
        let a = BTreeMap::from([(1, 'a'), (2, 'b'), (4, 'd')]);
        let b = BTreeMap::from([(2, 'B'), (3, 'C'), (4, 'd')]);
        let all: Vec<_> = merge(&a, &b)
            .map(|(k, x, y)| (*k, x.copied(), y.copied()))
            .collect();
        assert_eq!(
            all,
            [
                (1, Some('a'), None),
                (2, Some('b'), Some('B')),
                (3, None, Some('C')),
                (4, Some('d'), Some('d')),
            ]
        );
    }
}
