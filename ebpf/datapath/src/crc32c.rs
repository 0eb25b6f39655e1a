//! SCTP's checksum (CRC32c, RFC 9260 appendix A) after a change of a few bytes, without a look at the
//! others.
//!
//! A CRC is linear: the difference of two messages' checksums is the CRC of their difference, from a
//! zero register. Where only one word differs, that is the word, moved on by the bytes that follow: a
//! multiplication by a power of x modulo the polynomial. The powers for 1, 2, 4 ... bytes are made when
//! this is compiled, so a length of 16 bits takes 16 multiplications at most.

/// The polynomial, bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Bits of a length.
const BITS: usize = 16;

/// The polynomial 1.
const ONE: u32 = 1 << 31;

/// x to the power of 8, 16, 32 ...
const POWERS: [u32; BITS] = {
    let mut powers = [0; BITS];
    // The highest bit is 1, the next x: bits are reversed.
    let mut power = 1 << 30;
    let mut i = 0;
    while i < 3 + BITS {
        if i >= 3 {
            powers[i - 3] = power;
        }
        power = multiply(power, power);
        i += 1;
    }
    powers
};

/// The product of two polynomials modulo CRC32c's. No step is a branch: one at each would double the
/// ways through the loop, all of which the verifier walks.
#[inline(always)]
const fn multiply(mut a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut i = 0;
    while i < 32 {
        product ^= b & (a >> 31).wrapping_neg();
        a <<= 1;
        b = (b >> 1) ^ (POLYNOMIAL & (b & 1).wrapping_neg());
        i += 1;
    }
    product
}

/// What to change the checksum by (exclusive or, of its bytes in the packet as a little-endian number)
/// when the first four bytes of `length` change by `difference` (exclusive or, likewise). Only 16 bits
/// of the length count.
#[inline(never)]
pub(crate) fn difference(difference: u32, length: u32) -> u32 {
    let mut crc = difference;
    let mut i = 0;
    while i < BITS {
        // The power, or 1.
        let is_set = ((length >> i) & 1).wrapping_neg();
        crc = multiply(crc, (POWERS[i] & is_set) | (ONE & !is_set));
        i += 1;
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 9260 appendix A, bit by bit.
    fn crc32c(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 };
            }
        }
        !crc
    }

    /// RFC 3720 appendix B.4.
    #[test]
    fn the_test_is_crc32c() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn a_difference_is_as_good_as_a_new_checksum() {
        for length in (4..600).chain([1_500, 9_000, 0x8000, 0xfffe, 0xffff]) {
            let mut bytes = [0; 0xffff];
            let bytes = &mut bytes[..length];
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = (i * 7 + length) as u8;
            }
            let before = crc32c(bytes);
            let old = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            let new = old ^ 0x8001_f00d_u32.wrapping_mul(length as u32);
            bytes[..4].copy_from_slice(&new.to_le_bytes());
            let after = before ^ difference(old ^ new, length as u32);
            assert_eq!(after, crc32c(bytes), "{length}");
        }
    }
}
