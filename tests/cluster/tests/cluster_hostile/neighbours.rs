//! What is forged on the link itself: ARP, DHCP, neighbour, router and listener discovery.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{
    cases::{
        Cases,
        Open::{Maybe, Never},
        Scene,
    },
    forge::{ARP, ICMPV6, UDP, V4, V6, ethernet, icmp, ip, octets, udp_from, v6},
};

impl Cases {
    /// Whatever the family, both are tried: a Pod's interface takes either.
    pub(crate) fn neighbours(&mut self) {
        self.arp();
        self.dhcp();
        self.discovery();
    }

    fn arp(&mut self) {
        let Scene {
            mac,
            gateway,
            victim_mac,
            victim,
            friend,
            own,
            ..
        } = self.scene;
        let v4 = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets(),
            IpAddr::V6(_) => [10, 244, 0, 2],
        };
        let gateways = [169, 254, 1, 1];
        for (name, operation, from, target) in [
            ("a question for the victim", 1_u16, v4(own), v4(victim)),
            ("an announcement of the gateway", 2, gateways, gateways),
            ("an answer for the gateway", 2, gateways, v4(victim)),
            ("an answer for the friend", 2, v4(friend), v4(victim)),
            ("an announcement of the victim", 1, v4(victim), v4(victim)),
        ] {
            for to in [[0xff; 6], gateway, victim_mac] {
                let operation = operation.to_be_bytes();
                let head = [0, 1, 8, 0, 6, 4, operation[0], operation[1]];
                let packet = [&head[..], &mac, &from, &to, &target, &self.payload()].concat();
                let frame = ethernet(to, mac, ARP, &packet);
                self.frames(format!("ARP: {name}, to {to:x?}"), Never, vec![frame]);
            }
        }
        let frame = ethernet([0xff; 6], mac, ARP, &self.payload());
        self.frames("ARP: noise", Never, vec![frame]);
        let frame = ethernet([0xff; 6], mac, 0x8035, &self.payload());
        self.frames("reverse ARP", Never, vec![frame]);
    }

    fn dhcp(&mut self) {
        let Scene {
            mac,
            gateway,
            victim_mac,
            own,
            ..
        } = self.scene;
        let broadcast = IpAddr::V4(Ipv4Addr::BROADCAST);
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let mut messages = vec![("DHCP discover", any, broadcast, (68, 67))];
        if own.is_ipv4() {
            let node = self.scene.nodes[0];
            messages.push(("DHCP offer", own, broadcast, (67, 68)));
            messages.push(("DHCP offer of the node's", node, broadcast, (67, 68)));
            messages.push(("DHCP offer to all", node, self.scene.victim, (67, 68)));
        }
        for (name, from, to, ports) in messages {
            for at in [[0xff; 6], gateway, victim_mac] {
                let ends = (from, to);
                let packet = ip(ends, UDP, &udp_from(ends, ports, &self.payload()));
                self.frames(
                    format!("{name} at {at:x?}"),
                    Never,
                    vec![ethernet(at, mac, V4, &packet)],
                );
            }
        }
        let local = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x99));
        let agents = IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2));
        for (name, to, ports) in [
            ("DHCPv6 solicit", agents, (546, 547)),
            ("DHCPv6 advertise", agents, (547, 546)),
        ] {
            for at in [[0x33, 0x33, 0, 1, 0, 2], victim_mac, gateway] {
                let ends = (local, to);
                let packet = ip(ends, UDP, &udp_from(ends, ports, &self.payload()));
                self.frames(
                    format!("{name} at {at:x?}"),
                    Never,
                    vec![ethernet(at, mac, V6, &packet)],
                );
            }
        }
    }

    fn discovery(&mut self) {
        let Scene {
            mac,
            gateway,
            victim_mac,
            victim,
            own,
            ..
        } = self.scene;
        let local = |last| IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last));
        let all = IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
        let mut sources = vec![IpAddr::V6(Ipv6Addr::UNSPECIFIED), local(1), local(0x77)];
        let mut targets = vec![all, local(1)];
        if own.is_ipv6() {
            let o = octets(victim);
            let low = u16::from_be_bytes([o[14], o[15]]);
            let high = 0xff00 | u16::from(o[13]);
            sources.extend([own, victim]);
            targets.extend([
                victim,
                self.scene.nodes[0],
                self.scene.nodes[1],
                IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, high, low)),
            ]);
        }
        for from in sources {
            for to in &targets {
                let ends = (from, *to);
                // Router solicitation and advertisement, neighbour solicitation and advertisement,
                // redirect, listener query, reports and done.
                for (kind, hops) in [
                    (133, 255),
                    (134, 255),
                    (135, 255),
                    (136, 255),
                    (137, 255),
                    (130, 1),
                    (131, 1),
                    (132, 1),
                    (143, 1),
                    (136, 64),
                    (130, 2),
                    (130, 3),
                    (143, 2),
                ] {
                    let claimed = if own.is_ipv6() { victim } else { local(1) };
                    let body = [octets(claimed), vec![2, 1], mac.to_vec(), self.payload()].concat();
                    let message = icmp(ends, kind, 0, [0x60, 0, 0, 0], &body);
                    let packet = v6(ends, ICMPV6, hops, &message);
                    // Without the hops of discovery it is a message like any other.
                    let open = if *to == victim && from == own && hops != 255 {
                        Maybe
                    } else {
                        Never
                    };
                    let frames = [[0x33, 0x33, 0, 0, 0, 1], gateway, victim_mac]
                        .map(|at| ethernet(at, mac, V6, &packet));
                    let name = format!("ICMPv6 {kind} with {hops} hops from {from} to {to}");
                    self.frames(name, open, frames.to_vec());
                }
            }
        }
    }
}
