//! The translations of flows that leave the node by an uplink.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use hachi_abi::{NatEntry, NatFlags, Tuple, proto};

/// One direction of a translated flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Source as the packets carry it before they are translated; ICMP echo has its identifier as both
    /// ports.
    pub source: SocketAddr,
    /// Destination likewise.
    pub destination: SocketAddr,
    /// IANA protocol number.
    pub proto: u8,
    /// Whether this is the direction of the answers, whose entry is the claim to the tuple.
    pub reply: bool,
    /// What is put in: for the source, or of a reply for the destination.
    pub address: SocketAddr,
    /// Bits of [`NatFlags`] that say how far a TCP connection has come.
    pub phase: u8,
    /// How long ago a packet was last noted.
    pub idle: Duration,
}

pub(crate) fn translation<const N: usize>(
    tuple: &Tuple<N>,
    entry: &NatEntry<N>,
    now: u32,
    address: impl Fn([u8; N]) -> IpAddr,
) -> Translation {
    let socket = |addr, port| SocketAddr::new(address(addr), u16::from_be_bytes(port));
    Translation {
        source: socket(tuple.src, tuple.sport),
        destination: socket(tuple.dst, tuple.dport),
        proto: tuple.proto,
        reply: entry.flags & NatFlags::REPLY != 0,
        address: socket(entry.addr, entry.port),
        phase: entry.flags & !NatFlags::REPLY,
        idle: Duration::from_secs(now.saturating_sub(entry.last_seen).into()),
    }
}

/// The key of the half that belongs to the entry of a reply; none for any other entry, and for the
/// node's own claims, which have one half.
pub(crate) fn forward_key<const N: usize>(
    tuple: &Tuple<N>,
    entry: &NatEntry<N>,
) -> Option<Tuple<N>> {
    if entry.flags & NatFlags::REPLY == 0 || (entry.addr, entry.port) == (tuple.dst, tuple.dport) {
        return None;
    }
    let echo = matches!(tuple.proto, proto::ICMP | proto::ICMPV6);
    Some(Tuple {
        src: entry.addr,
        dst: tuple.src,
        sport: entry.port,
        dport: if echo { entry.port } else { tuple.sport },
        proto: tuple.proto,
        pad: [0; 3],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(ports: (u16, u16), proto: u8) -> Tuple<4> {
        Tuple {
            src: [192, 0, 2, 7],
            dst: [172, 18, 0, 2],
            sport: ports.0.to_be_bytes(),
            dport: ports.1.to_be_bytes(),
            proto,
            pad: [0; 3],
        }
    }

    fn entry(addr: [u8; 4], port: u16, flags: u8) -> NatEntry<4> {
        NatEntry {
            last_seen: 0,
            addr,
            port: port.to_be_bytes(),
            flags,
            pad: 0,
        }
    }

    #[test]
    fn the_other_half_of_a_reply_is_found() {
        let reply = entry([10, 0, 0, 1], 4_000, NatFlags::REPLY | NatFlags::OPENING);
        let key = forward_key(&tuple((443, 50_000), 6), &reply).expect("a key");
        assert_eq!((key.src, key.dst), ([10, 0, 0, 1], [192, 0, 2, 7]));
        assert_eq!(
            (key.sport, key.dport),
            (4_000_u16.to_be_bytes(), 443_u16.to_be_bytes())
        );
        let key = forward_key(&tuple((9, 9), proto::ICMP), &reply).expect("a key");
        assert_eq!(
            (key.sport, key.dport),
            (4_000_u16.to_be_bytes(), 4_000_u16.to_be_bytes())
        );
        assert_eq!(
            forward_key(&tuple((1, 2), 6), &entry([10, 0, 0, 1], 3, 0)),
            None
        );
        let own = entry([172, 18, 0, 2], 50_000, NatFlags::REPLY);
        assert_eq!(forward_key(&tuple((443, 50_000), 6), &own), None);
    }
}
