//! Map keys and values as bytes and back.

use std::{mem::size_of, ptr, slice};

use aya::Pod;

/// The bytes of a key or value.
pub(crate) fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: `T: Pod` has no uninitialised byte (see hachi-abi: no implicit padding), the pointer
    // comes from a reference that lives as long as the slice, and the length is that of `T`.
    unsafe { slice::from_raw_parts(ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }
}

/// Reads a key or value from the bytes that the kernel returned.
///
/// # Panics
/// If the length is not that of `T`: every map's layout was checked when it was opened.
pub(crate) fn read<T: Pod>(bytes: &[u8]) -> T {
    assert_eq!(
        bytes.len(),
        size_of::<T>(),
        "a map's layout changed after it was checked"
    );
    // SAFETY: the length was checked above, `read_unaligned` needs no alignment, and every bit
    // pattern is a valid `T: Pod` (integers and arrays of integers).
    unsafe { ptr::read_unaligned(bytes.as_ptr().cast::<T>()) }
}

#[cfg(test)]
mod tests {
    use hachi_abi::{Peer, PolicyKey};

    use super::*;

    #[test]
    fn there_and_back() {
        let key = PolicyKey {
            set: 1,
            class: 0x0203_0405,
            port: [0, 80],
            plen: 16,
            proto: 6,
        };
        assert_eq!(bytes_of(&key).len(), 12);
        assert_eq!(&bytes_of(&key)[8..], [0, 80, 16, 6]);
        assert_eq!(read::<PolicyKey>(bytes_of(&key)), key);
    }

    #[test]
    #[should_panic(expected = "layout changed")]
    fn a_wrong_length_is_refused() {
        read::<Peer>(&[0; 7]);
    }
}
