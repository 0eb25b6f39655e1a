//! Differences of Internet checksums (RFC 1071, RFC 1624).
//!
//! A difference is a 32-bit one's complement sum over the bytes as native-endian words, which is
//! what `bpf_l3_csum_replace` and `bpf_l4_csum_replace` take with a size of 0.

/// One's complement addition.
#[inline(always)]
const fn add(a: u32, b: u32) -> u32 {
    let (sum, carry) = a.overflowing_add(b);
    sum.wrapping_add(carry as u32)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071: the folded sum over native words.
    fn sum(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_ne_bytes([pair[0], pair[1]]));
        }
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn fold(mut sum: u32) -> u16 {
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn a_difference_turns_the_old_checksum_into_the_new_one() {
        let mut data = [10, 0, 0, 1, 0xff, 0xff, 0, 80, 1, 2];
        let before = sum(&data);
        let old = [10, 0, 0, 1];
        let new = [192, 168, 255, 254];
        let difference = replace(0, &old, &new);
        data[..4].copy_from_slice(&new);
        // As csum_replace_by_diff does: sum = fold(add(difference, !old)).
        assert_eq!(fold(add(difference, u32::from(!before))), sum(&data));
    }
}
