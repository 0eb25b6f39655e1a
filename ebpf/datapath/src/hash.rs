//! A hash of a flow that anything may be chosen by.

use hachi_abi::Tuple;

/// One round of MurmurHash3 (32 bits, by Appleby).
#[inline(always)]
pub(crate) const fn mix(hash: u32, word: u32) -> u32 {
    let word = word
        .wrapping_mul(0xcc9e_2d51)
        .rotate_left(15)
        .wrapping_mul(0x1b87_3593);
    (hash ^ word)
        .rotate_left(13)
        .wrapping_mul(5)
        .wrapping_add(0xe654_6b64)
}

/// MurmurHash3's last step, which spreads every bit over all of them.
#[inline(always)]
pub(crate) const fn finish(mut hash: u32) -> u32 {
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// A hash with the words of an address mixed in.
#[inline(always)]
pub(crate) fn address<const N: usize>(mut hash: u32, addr: &[u8; N]) -> u32 {
    let mut i = 0;
    while i + 3 < N {
        let word = u32::from_ne_bytes([addr[i], addr[i + 1], addr[i + 2], addr[i + 3]]);
        hash = mix(hash, word);
        i += 4;
    }
    hash
}

/// A hash of all of a tuple.
#[inline(always)]
pub(crate) fn tuple<const N: usize>(tuple: &Tuple<N>) -> u32 {
    let [a, b] = tuple.sport;
    let [c, d] = tuple.dport;
    let ends = address(address(u32::from(tuple.proto), &tuple.src), &tuple.dst);
    finish(mix(ends, u32::from_ne_bytes([a, b, c, d])))
}
