//! After how long without a packet tracked flows and their translations are deleted.
//!
//! The programs ignore an entry after [`hachi_abi::lifetime`] (a translation after
//! [`hachi_abi::nat_lifetime`]); options only shorten that. When a family's table is nearly full, what
//! costs nothing to lose (TCP that closes or was never answered, UDP, ICMP, others) goes after a tenth
//! of its time.

use std::time::Duration;

use hachi_abi::{CtFlags, NatFlags, REFRESH_OTHER, lifetime, nat_lifetime, proto};
use hachi_kernel::{Flow, Translation};

/// By how much times shrink under pressure, and the least that they shrink to.
const HURRY: (u32, Duration) = (10, Duration::from_secs(5));

/// After how long without a packet entries are deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timeouts {
    pub(crate) tcp: Duration,
    pub(crate) tcp_opening: Duration,
    pub(crate) tcp_closing: Duration,
    pub(crate) udp: Duration,
    pub(crate) sctp: Duration,
    pub(crate) icmp: Duration,
    pub(crate) other: Duration,
}

/// How far a TCP connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Opening,
    Open,
    Closing,
}

impl Timeouts {
    /// The limit of a flow.
    pub(crate) fn of(&self, flow: &Flow, pressed: bool) -> Duration {
        let (phase, flags) = match (flow.closing, flow.opening) {
            (true, _) => (Phase::Closing, CtFlags::CLOSING),
            (false, true) => (Phase::Opening, CtFlags::OPENING),
            (false, false) => (Phase::Open, 0),
        };
        self.limit(flow.proto, phase, lifetime(flow.proto, flags), pressed)
    }

    /// The limit of a translation: that of a flow, but for a TCP connection that both sides have ended,
    /// which gives its port back in seconds. The time of packets that went the other way is noted late.
    pub(crate) fn of_translation(&self, translation: &Translation, pressed: bool) -> Duration {
        const ENDED: u8 = NatFlags::FIN_IN | NatFlags::FIN_OUT | NatFlags::RESET;
        let phase = if translation.phase & ENDED != 0 {
            Phase::Closing
        } else if translation.phase & NatFlags::OPENING != 0 {
            Phase::Opening
        } else {
            Phase::Open
        };
        let most = nat_lifetime(translation.proto, translation.phase);
        let late = Duration::from_secs(u64::from(REFRESH_OTHER) + 1);
        self.limit(translation.proto, phase, most, pressed)
            .max(late)
    }

    /// `most`: what the programs know, in seconds.
    fn limit(&self, number: u8, phase: Phase, most: u32, pressed: bool) -> Duration {
        let limit = match (number, phase) {
            (proto::TCP, Phase::Opening) => self.tcp_opening,
            (proto::TCP, Phase::Open) => self.tcp,
            (proto::TCP, Phase::Closing) => self.tcp_closing,
            (proto::UDP, _) => self.udp,
            (proto::SCTP, _) => self.sctp,
            (proto::ICMP | proto::ICMPV6, _) => self.icmp,
            _ => self.other,
        };
        let limit = limit.min(Duration::from_secs(most.into()));
        let lasting = matches!(
            (number, phase),
            (proto::TCP, Phase::Open) | (proto::SCTP, _)
        );
        if pressed && !lasting {
            (limit / HURRY.0).max(HURRY.1.min(limit))
        } else {
            limit
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: Timeouts = Timeouts {
        tcp: Duration::from_secs(86_400),
        tcp_opening: Duration::from_secs(120),
        tcp_closing: Duration::from_secs(120),
        udp: Duration::from_secs(180),
        sctp: Duration::from_secs(3_600),
        icmp: Duration::from_secs(30),
        other: Duration::from_secs(600),
    };

    fn flow(proto: u8, closing: bool, opening: bool) -> Flow {
        Flow {
            source: "10.0.0.1:4000".parse().unwrap(),
            destination: "10.96.0.10:53".parse().unwrap(),
            proto,
            reply: false,
            rewrite: "10.0.0.2:5353".parse().ok(),
            closing,
            opening,
            idle: Duration::ZERO,
            revision: 1,
            egress_rule: 0,
            ingress_rule: 0,
        }
    }

    fn translation(proto: u8, phase: u8) -> Translation {
        Translation {
            source: "10.0.0.1:4000".parse().unwrap(),
            destination: "192.0.2.1:53".parse().unwrap(),
            proto,
            reply: false,
            address: "172.18.0.2:4000".parse().unwrap(),
            phase,
            idle: Duration::ZERO,
        }
    }

    #[test]
    fn options_shorten_times_and_never_lengthen_them() {
        let seconds = |timeouts: &Timeouts, proto, closing, opening| {
            timeouts.of(&flow(proto, closing, opening), false).as_secs()
        };
        assert_eq!(seconds(&SHIPPED, proto::TCP, false, false), 86_400);
        assert_eq!(seconds(&SHIPPED, proto::TCP, true, false), 120);
        assert_eq!(seconds(&SHIPPED, proto::TCP, false, true), 120);
        assert_eq!(seconds(&SHIPPED, proto::UDP, false, false), 180);
        assert_eq!(seconds(&SHIPPED, proto::SCTP, false, false), 3_600);
        assert_eq!(seconds(&SHIPPED, proto::ICMPV6, false, false), 30);
        assert_eq!(seconds(&SHIPPED, 47, false, false), 600);
        let other = Timeouts {
            udp: Duration::from_secs(30),
            icmp: Duration::from_secs(900),
            ..SHIPPED
        };
        assert_eq!(seconds(&other, proto::UDP, false, false), 30);
        assert_eq!(seconds(&other, proto::ICMP, false, false), 30);
    }

    #[test]
    fn under_pressure_connections_stay_and_the_rest_hurries() {
        let seconds =
            |proto, closing, opening| SHIPPED.of(&flow(proto, closing, opening), true).as_secs();
        assert_eq!(seconds(proto::TCP, false, false), 86_400);
        assert_eq!(seconds(proto::SCTP, false, false), 3_600);
        assert_eq!(seconds(proto::TCP, true, false), 12);
        assert_eq!(seconds(proto::TCP, false, true), 12);
        assert_eq!(seconds(proto::UDP, false, false), 18);
        assert_eq!(seconds(proto::ICMP, false, false), 5);
    }

    #[test]
    fn translations_last_as_long_as_their_flows() {
        let seconds = |timeouts: &Timeouts, proto, phase, pressed| {
            let translation = translation(proto, phase);
            timeouts.of_translation(&translation, pressed).as_secs()
        };
        let both = NatFlags::FIN_IN | NatFlags::FIN_OUT;
        assert_eq!(seconds(&SHIPPED, proto::TCP, 0, false), 86_400);
        assert_eq!(seconds(&SHIPPED, proto::TCP, NatFlags::OPENING, false), 120);
        assert_eq!(seconds(&SHIPPED, proto::TCP, NatFlags::FIN_IN, false), 120);
        assert_eq!(seconds(&SHIPPED, proto::UDP, 0, false), 180);
        assert_eq!(seconds(&SHIPPED, proto::UDP, 0, true), 18);
        assert_eq!(seconds(&SHIPPED, proto::TCP, 0, true), 86_400);
        // Not sooner than the note of a packet of the other direction may come.
        for phase in [both, NatFlags::RESET] {
            assert_eq!(seconds(&SHIPPED, proto::TCP, phase, false), 11);
        }
        let short = Timeouts {
            udp: Duration::from_secs(1),
            ..SHIPPED
        };
        assert_eq!(seconds(&short, proto::UDP, 0, false), 11);
    }
}
