//! Consistent hashing: every node's table leads a flow to the same backend, and few flows move when a
//! backend comes or goes (Eisenbud et al., "Maglev", NSDI 2016, section 3.4).

use std::net::SocketAddr;

use crate::hash;

/// Sizes of tables: primes, so that every step visits every place. Few of them, for where one gives way
/// to the next nearly all flows move.
const SIZES: [usize; 3] = [1_021, 8_191, 65_521];
/// Places for each backend, as far as there is a size for that: shares differ by one in a hundred.
const PLACES: usize = 100;

/// The size of the table for so many backends; 0 where none is needed or possible.
fn size(backends: usize) -> usize {
    let largest = SIZES[SIZES.len() - 1];
    if backends < 2 || backends > largest {
        return 0;
    }
    let enough = SIZES.into_iter().find(|size| *size >= PLACES * backends);
    enough.unwrap_or(largest)
}

/// For every place of the table the slot of its backend. It depends on which backends there are, but not
/// on their slots.
pub(super) fn table(slots: &[SocketAddr]) -> Vec<u16> {
    let size = size(slots.len());
    if size == 0 {
        return Vec::new();
    }
    // In the order of their addresses, which is the same everywhere.
    let mut order: Vec<(SocketAddr, u16)> = slots.iter().copied().zip(0..).collect();
    order.sort_unstable();
    let mut turns: Vec<(usize, usize, u16)> = order
        .into_iter()
        .map(|(backend, slot)| {
            let hash = hash::stable(&backend);
            let offset = (hash >> 32) as usize % size;
            let skip = (hash & 0xffff_ffff) as usize % (size - 1) + 1;
            (offset, skip, slot)
        })
        .collect();
    let mut table = vec![None; size];
    let mut empty = size;
    loop {
        for (next, skip, slot) in &mut turns {
            while table[*next].is_some() {
                *next = (*next + *skip) % size;
            }
            table[*next] = Some(*slot);
            empty -= 1;
            if empty == 0 {
                return table.into_iter().flatten().collect();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(count: u16) -> Vec<SocketAddr> {
        let each = |n: u16| SocketAddr::from(([10, 1, (n >> 8) as u8, n as u8], 8080));
        (0..count).map(each).collect()
    }

    /// The backend at every place.
    fn owners(slots: &[SocketAddr]) -> Vec<SocketAddr> {
        table(slots)
            .into_iter()
            .map(|slot| slots[usize::from(slot)])
            .collect()
    }

    #[test]
    fn sizes_are_primes() {
        for size in SIZES {
            let divisor = (2..size).find(|n| size.is_multiple_of(*n));
            assert_eq!(divisor, None, "{size}");
        }
    }

    #[test]
    fn shares_are_even() {
        for count in [2, 3, 10, 11, 50, 81, 82, 600] {
            let slots = backends(count);
            let table = table(&slots);
            let mut shares = vec![0_usize; slots.len()];
            table
                .iter()
                .for_each(|slot| shares[usize::from(*slot)] += 1);
            let (least, most) = (shares.iter().min(), shares.iter().max());
            assert!(
                most.unwrap() - least.unwrap() <= 1,
                "{count}: from {least:?} to {most:?}"
            );
        }
    }

    #[test]
    fn slots_do_not_matter() {
        let slots = backends(20);
        let mut other = slots.clone();
        other.reverse();
        other.swap(3, 9);
        assert_eq!(owners(&slots), owners(&other));
    }

    /// One of fifty goes: its own flows move, and under 3% of the others. With fewer places for each
    /// it is a little more.
    #[test]
    fn few_others_move() {
        for (count, limit) in [(50, 3), (10, 5), (80, 5), (200, 3)] {
            let all = backends(count);
            let before = owners(&all);
            for gone in 0..all.len() {
                let mut rest = all.clone();
                rest.swap_remove(gone);
                let after = owners(&rest);
                let others = before
                    .iter()
                    .zip(&after)
                    .filter(|(old, _)| **old != all[gone]);
                let (moved, all_others) =
                    others.fold((0, 0), |(m, n), (a, b)| (m + usize::from(a != b), n + 1));
                assert!(
                    moved * 100 < all_others * limit,
                    "{count} less {gone}: {moved} of {all_others} moved"
                );
            }
        }
    }

    #[test]
    fn one_backend_needs_no_table() {
        assert!(table(&backends(0)).is_empty());
        assert!(table(&backends(1)).is_empty());
    }
}
