//! Tunnels (VXLAN, RFC 7348) to nodes that share no link with this one.
//!
//! One device in external mode carries all of them: `to_overlay` writes where a packet goes to
//! into its tunnel key, `from_overlay` reads there where it comes from. `TUNNELS` says both: behind
//! which node's tunnel address a Pod's block, or another node's own address, is.

/// Whose an address is, among nodes; value of the `TUNNELS` maps.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tunnel {
    /// The node's tunnel address: IPv6, or IPv4 in the first four bytes and zeros.
    pub remote: [u8; 16],
    /// Bits of [`TunnelFlags`].
    pub flags: u32,
}

/// Bits of [`Tunnel::flags`].
pub struct TunnelFlags;

impl TunnelFlags {
    /// The tunnel address is one of IPv6.
    pub const V6: u32 = 1 << 0;
    /// What this node sends there goes through the tunnel, and nothing from there comes any other
    /// way. Without it the node is reached directly, and what it sends through the tunnel all the
    /// same is taken.
    pub const SEND: u32 = 1 << 1;
    /// The address is the node's own, not a Pod's: the tunnel itself, and what nodes say to each
    /// other, come from there by the network.
    pub const NODE: u32 = 1 << 2;
    /// This node's own Pods: nothing from there comes from outside.
    pub const LOCAL: u32 = 1 << 3;
}

/// The node's own end of its tunnels; part of [`crate::Config`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TunnelDevice {
    /// Index of the VXLAN device; 0: there is none.
    pub ifindex: u32,
    /// The network identifier (VNI) of the cluster, 24 bits.
    pub vni: u32,
    /// The longest packet, from the IP header on, that fits into a tunnel packet of the uplink.
    pub mtu: u32,
    /// The UDP port that tunnel packets are sent to, network order.
    pub port: [u8; 2],
    /// Zero.
    pub pad: [u8; 2],
}

const _: () = assert!(size_of::<Tunnel>() == 20);
const _: () = assert!(size_of::<TunnelDevice>() == 16);
