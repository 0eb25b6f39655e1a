//! The live flows, for `hachi get conntrack`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use hachi_abi::{CtEntry, CtFlags, Tuple, V4, V6, map};

use crate::{Datapath, KernelError, bytes::read};

/// One direction of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Source as the packets carry it; ICMP echo has its identifier as both ports.
    pub source: SocketAddr,
    /// Destination as the packets carry it.
    pub destination: SocketAddr,
    /// IANA protocol number.
    pub proto: u8,
    /// Whether this is the direction that did not open the flow.
    pub reply: bool,
    /// What the datapath rewrites: the destination to this backend, or on a reply the source to
    /// this Service. None where only a port changes ([`CtFlags::PORT`]).
    pub rewrite: Option<SocketAddr>,
    /// Whether TCP has begun to close this direction.
    pub closing: bool,
    /// Whether it is a TCP connection that nobody has answered yet.
    pub opening: bool,
    /// How long ago a packet was last noted; notes are a second apart at least.
    pub idle: Duration,
    /// The revision under which it was last judged.
    pub revision: u32,
    /// The rule of the sender's egress, or [`hachi_abi::RULE_NONE`].
    pub egress_rule: u32,
    /// The rule of the receiver's ingress, or [`hachi_abi::RULE_NONE`].
    pub ingress_rule: u32,
}

impl Datapath {
    /// All flows that are tracked, in no order.
    ///
    /// # Errors
    /// If a map cannot be read.
    pub fn conntrack(&self) -> Result<Vec<Flow>, KernelError> {
        let now = coarse_seconds();
        let mut flows = Vec::new();
        self.table(map::CONNTRACK[0])?.each(|key, value| {
            let tuple = read::<Tuple<V4>>(key);
            flows.push(flow(&tuple, &read::<CtEntry<V4>>(value), now, |a| {
                Ipv4Addr::from(a).into()
            }));
        })?;
        self.table(map::CONNTRACK[1])?.each(|key, value| {
            let tuple = read::<Tuple<V6>>(key);
            flows.push(flow(&tuple, &read::<CtEntry<V6>>(value), now, |a| {
                Ipv6Addr::from(a).into()
            }));
        })?;
        Ok(flows)
    }
}

pub(crate) fn flow<const N: usize>(
    tuple: &Tuple<N>,
    entry: &CtEntry<N>,
    now: u32,
    address: impl Fn([u8; N]) -> IpAddr,
) -> Flow {
    let socket = |addr, port| SocketAddr::new(address(addr), u16::from_be_bytes(port));
    let has = |flag| entry.flags & flag != 0;
    let own = if has(CtFlags::REPLY) {
        (tuple.src, tuple.sport)
    } else {
        (tuple.dst, tuple.dport)
    };
    let rewritten = has(CtFlags::NAT) && own != (entry.nat_addr, entry.nat_port);
    Flow {
        source: socket(tuple.src, tuple.sport),
        destination: socket(tuple.dst, tuple.dport),
        proto: tuple.proto,
        reply: has(CtFlags::REPLY),
        rewrite: rewritten.then(|| socket(entry.nat_addr, entry.nat_port)),
        closing: has(CtFlags::CLOSING),
        opening: has(CtFlags::OPENING),
        idle: Duration::from_secs(now.saturating_sub(entry.last_seen).into()),
        revision: entry.revision,
        egress_rule: entry.egress_rule,
        ingress_rule: entry.ingress_rule,
    }
}

/// Seconds of the clock that the programs stamp entries with.
pub(crate) fn coarse_seconds() -> u32 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is exclusive and has the type that the call writes.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    debug_assert_eq!(result, 0, "the clock exists since 2.6.32");
    u32::try_from(now.tv_sec).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_shows_the_service_that_it_seems_to_come_from() {
        let tuple = Tuple {
            src: [10, 0, 0, 2],
            dst: [10, 0, 0, 1],
            sport: 8080_u16.to_be_bytes(),
            dport: 40_000_u16.to_be_bytes(),
            proto: 6,
            pad: [0; 3],
        };
        let entry = CtEntry {
            last_seen: 95,
            revision: 3,
            egress_rule: 1,
            ingress_rule: 2,
            nat_addr: [10, 96, 0, 10],
            nat_port: 80_u16.to_be_bytes(),
            flags: CtFlags::REPLY | CtFlags::NAT,
            tick: 0,
            port: [0; 2],
            pad: [0; 2],
        };
        let shown = flow(&tuple, &entry, 100, |a| Ipv4Addr::from(a).into());
        let expected = Flow {
            source: "10.0.0.2:8080".parse().expect("an address"),
            destination: "10.0.0.1:40000".parse().expect("an address"),
            proto: 6,
            reply: true,
            rewrite: "10.96.0.10:80".parse().ok(),
            closing: false,
            opening: false,
            idle: Duration::from_secs(5),
            revision: 3,
            egress_rule: 1,
            ingress_rule: 2,
        };
        assert_eq!(shown, expected);
    }
}
