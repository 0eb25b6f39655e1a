//! Ids from content: the same content has the same id in every run of the same binary, on every node.
//!
//! A hash alone would let whoever may write policies make two contents meet (FNV is not hard to
//! collide with). So contents are compared too, and the later one in sorted order moves on to the
//! next free id.

use std::{
    cmp::Ordering,
    collections::BTreeSet,
    hash::{Hash, Hasher},
};

/// FNV-1a, 64 bits, with a final mix so that any 32 of them are good.
struct Stable(u64);

impl Hasher for Stable {
    fn finish(&self) -> u64 {
        // The finaliser of MurmurHash3.
        let mut h = self.0;
        h ^= h >> 33;
        h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
        h ^= h >> 33;
        h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        h ^ (h >> 33)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// The hash of a content.
pub(crate) fn stable(content: &impl Hash) -> u64 {
    let mut hasher = Stable(0xcbf2_9ce4_8422_2325);
    content.hash(&mut hasher);
    hasher.finish()
}

/// The id that a content of this hash has, unless another one has it.
pub(crate) const fn id(hash: u64) -> u32 {
    (hash >> 32) as u32
}

/// Gives every content an id, by its hash; none of the `reserved` ones, and 0 never. `compare` orders
/// contents whose hashes are equal, by their index.
pub(crate) fn assign(
    hashes: &[u64],
    reserved: &[u32],
    compare: impl Fn(usize, usize) -> Ordering,
) -> Vec<u32> {
    let natural = |i: usize| id(hashes[i]);
    let mut order: Vec<usize> = (0..hashes.len()).collect();
    order.sort_by(|a, b| natural(*a).cmp(&natural(*b)).then_with(|| compare(*a, *b)));
    let mut taken: BTreeSet<u32> = reserved.iter().copied().chain([0]).collect();
    let mut ids = vec![0; hashes.len()];
    for i in order {
        let mut id = natural(i);
        while !taken.insert(id) {
            id = id.wrapping_add(1);
        }
        ids[i] = id;
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_hashes_are_told_apart_in_sorted_order() {
        let contents = ["b", "a", "c"];
        let h = 7 << 32;
        let ids = assign(&[h, h, 8 << 32], &[], |a, b| contents[a].cmp(contents[b]));
        assert_eq!(ids, [8, 7, 9], "a has its own, b and c move on");
    }

    #[test]
    fn reserved_ids_and_zero_are_never_given() {
        let top = u64::from(u32::MAX) << 32;
        assert_eq!(assign(&[top, 0], &[u32::MAX], |a, b| a.cmp(&b)), [2, 1]);
    }

    #[test]
    fn the_hash_is_the_same_everywhere() {
        assert_eq!(stable(&1_u8), stable(&1_u8));
        assert_ne!(stable(&"ab"), stable(&"ba"));
    }
}
