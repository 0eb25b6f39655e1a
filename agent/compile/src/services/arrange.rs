//! Which backend is in which slot: those that stay stay where they are, so that an endpoint that comes
//! or goes costs a write or two, however many there are.

use std::{collections::BTreeSet, net::SocketAddr};

/// Puts `wanted` (sorted, each once) into slots, with as few changes to `before` as there can be.
pub(super) fn arrange(before: &[SocketAddr], wanted: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut left: BTreeSet<SocketAddr> = wanted.iter().copied().collect();
    let mut slots: Vec<Option<SocketAddr>> = before
        .iter()
        .take(wanted.len())
        .map(|backend| left.take(backend))
        .collect();
    slots.resize(wanted.len(), None);
    let mut left = left.into_iter();
    let filled = slots.into_iter().map(|slot| slot.or_else(|| left.next()));
    filled.flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(hosts: &[u8]) -> Vec<SocketAddr> {
        let each = |host: &u8| SocketAddr::from(([10, 0, 0, *host], 80));
        hosts.iter().map(each).collect()
    }

    #[test]
    fn what_stays_stays_where_it_is() {
        for (before, wanted, expected) in [
            (&[][..], &[1, 2][..], &[1, 2][..]),
            (&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]),
            (&[3, 1, 2], &[1, 2, 3], &[3, 1, 2]),
            (&[1, 2, 3], &[2, 3], &[3, 2]),
            (&[1, 2, 3], &[1, 2], &[1, 2]),
            (&[1, 2, 3], &[0, 2, 3], &[0, 2, 3]),
            (&[1, 2], &[0, 1, 2, 3], &[1, 2, 0, 3]),
            (&[1, 1, 2], &[1, 2, 3], &[1, 3, 2]),
            (&[1, 2], &[], &[]),
        ] {
            let arranged = arrange(&backends(before), &backends(wanted));
            assert_eq!(arranged, backends(expected), "{before:?} {wanted:?}");
        }
    }
}
