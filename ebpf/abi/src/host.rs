//! The way of the node's own packets to Services.

/// A veth pair in the node's own namespace, whose far side has the programs that translate:
///
/// ```text
/// node's socket ─> route ─> uplink, to_net ─> near ══ far ─> from_host ─> backend
/// node's socket <─ near ══ far <─ to_host <─ what answers
/// ```
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostDevice {
    /// Index of the side that the node's stack receives from; 0: there is no pair.
    pub near: u32,
    /// Index of the side that has the programs.
    pub far: u32,
    /// Ethernet address of the near side.
    pub mac: [u8; 6],
    /// Zero.
    pub pad: [u8; 2],
}

const _: () = assert!(size_of::<HostDevice>() == 16);
