//! The Ethernet header, and what is no IP.

use hachi_abi::Reason;

use crate::{
    Outcome,
    ethernet::ETH_LEN,
    family::{Family, V4, V6},
    traits::Packet,
};

const ARP: [u8; 2] = [0x08, 0x06];

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// Something that is decided already.
    Decided(Outcome),
}

/// Reads the Ethernet header, and the sender's MAC address into `source`.
///
/// ARP is the business of the link between the Pod and its host. A tag, or any other protocol,
/// would be a way around the policies.
#[inline(always)]
pub fn frame<P: Packet>(packet: &P, source: &mut [u8; 6]) -> Frame {
    let Some(ethernet) = packet.load::<ETH_LEN>(0) else {
        return Frame::Decided(Outcome::Drop(Reason::Malformed));
    };
    source.copy_from_slice(&ethernet[6..12]);
    if packet.vlan_present() {
        return Frame::Decided(Outcome::Drop(Reason::UnsupportedLink));
    }
    let kind = [ethernet[12], ethernet[13]];
    if kind == <V4 as Family<4>>::ETHERTYPE {
        Frame::V4
    } else if kind == <V6 as Family<16>>::ETHERTYPE {
        Frame::V6
    } else if kind == ARP {
        Frame::Decided(Outcome::Pass(Reason::NotIp))
    } else {
        Frame::Decided(Outcome::Drop(Reason::UnsupportedLink))
    }
}

/// Reads the Ethernet header of a packet on an uplink. What is no IP, and what carries a tag and so
/// belongs to a device above this one, is none of our business.
#[inline(always)]
pub fn network_frame<P: Packet>(packet: &P, pass: Reason) -> Frame {
    let other = Frame::Decided(Outcome::Pass(pass));
    if packet.vlan_present() {
        return other;
    }
    let Some([a, b]) = packet.load::<2>(ETH_LEN - 2) else {
        return other;
    };
    if [a, b] == <V4 as Family<4>>::ETHERTYPE {
        Frame::V4
    } else if [a, b] == <V6 as Family<16>>::ETHERTYPE {
        Frame::V6
    } else {
        other
    }
}

/// Reads the Ethernet header of a packet in the tunnel, which carries IP and nothing else.
#[inline(always)]
pub fn overlay_frame<P: Packet>(packet: &P) -> Frame {
    network_frame(packet, Reason::UnsupportedLink).refuse()
}

impl Frame {
    /// As it is, but what would pass undecided is dropped.
    #[inline(always)]
    const fn refuse(self) -> Self {
        match self {
            Self::V4 | Self::V6 => self,
            Self::Decided(_) => Self::Decided(Outcome::Drop(Reason::UnsupportedLink)),
        }
    }
}
