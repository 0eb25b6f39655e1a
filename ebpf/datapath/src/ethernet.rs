//! Where things are in a frame.

/// Length of an Ethernet header without tags.
pub const ETH_LEN: usize = 14;

/// Where a field of the IP header lies in the packet.
#[inline(always)]
pub(crate) const fn at(field: usize) -> usize {
    ETH_LEN + field
}
