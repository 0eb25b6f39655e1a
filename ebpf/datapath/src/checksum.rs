//! Internet checksums and their differences (RFC 1071, RFC 1624).
//!
//! Sums and differences are 32-bit one's complement sums over the bytes as native-endian words,
//! which is what `bpf_l3_csum_replace` and `bpf_l4_csum_replace` take with a size of 0.

/// One's complement addition. The carry is no branch: one at each step would double the ways
/// through a loop, all of which the verifier walks.
#[inline(always)]
const fn add(a: u32, b: u32) -> u32 {
    let sum = a as u64 + b as u64;
    (sum as u32).wrapping_add((sum >> 32) as u32)
}

/// Adds to `difference` what replacing `old` by `new` does to a sum. The field must lie on an even
/// offset of the summed data, and `L` must be even.
#[inline(always)]
pub(crate) fn replace<const L: usize>(difference: u32, old: &[u8; L], new: &[u8; L]) -> u32 {
    let mut sum = difference;
    let mut i = 0;
    while i + 1 < L {
        sum = add(sum, u16::from_ne_bytes([new[i], new[i + 1]]) as u32);
        sum = add(sum, !u16::from_ne_bytes([old[i], old[i + 1]]) as u32);
        i += 2;
    }
    sum
}

/// Adds bytes to a sum. Even lengths only.
#[inline(always)]
pub(crate) fn sum<const L: usize>(start: u32, bytes: &[u8; L]) -> u32 {
    let mut sum = start;
    let mut i = 0;
    while i + 1 < L {
        sum = add(sum, u16::from_ne_bytes([bytes[i], bytes[i + 1]]) as u32);
        i += 2;
    }
    sum
}

/// The checksum field of a sum, ready to be written.
#[inline(always)]
pub(crate) fn finish(sum: u32) -> [u8; 2] {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}

/// A checksum field after what it covers has changed by `difference` (RFC 1624).
#[must_use]
#[inline(always)]
pub fn adjusted(field: [u8; 2], difference: u32) -> [u8; 2] {
    finish(add(u32::from(!u16::from_ne_bytes(field)), difference))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 1071 section 3: 0001 f203 f4f5 f6f7 sum up to ddf2.
    #[test]
    fn the_rfc_s_example() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(finish(sum(0, &bytes)), (!0xddf2_u16).to_be_bytes());
    }

    /// Replacing a field by difference gives what summing anew gives.
    #[test]
    fn a_difference_is_as_good_as_a_new_sum() {
        let mut bytes = [0x45, 0x00, 0xfe, 0xff, 0xff, 0xff, 0x00, 0x01, 0x12, 0x34];
        for new in [[0, 0, 0, 0], [0xff; 4], [1, 2, 3, 4], [0xff, 0, 0, 0xff]] {
            let before = sum(0, &bytes);
            let old: [u8; 4] = [bytes[4], bytes[5], bytes[6], bytes[7]];
            bytes[4..8].copy_from_slice(&new);
            let after = add(before, replace(0, &old, &new));
            assert_eq!(finish(after), finish(sum(0, &bytes)), "{old:?} to {new:?}");
            let field = finish(before);
            assert_eq!(adjusted(field, replace(0, &old, &new)), finish(after));
        }
    }
}
