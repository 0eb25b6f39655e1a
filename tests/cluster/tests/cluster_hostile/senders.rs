//! Who sends, and to whom: plain packets, forged addresses, groups, packets in packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{
    cases::{
        Cases,
        Open::{Arrives, Maybe, Never},
        Scene,
    },
    forge::{
        ACK, FIN, FROM, IPIP, Mac, PSH, RST, SCTP, SYN, TCP, UDP, URG, V6, ethernet, fragment,
        icmp, icmp_of, ip, kind_of, tcp, tcp_from, udp, udp_from, v6,
    },
};

impl Cases {
    pub(crate) fn plain(&mut self) {
        let ends = self.ends();
        for port in [80, 81] {
            self.body(
                format!("udp {port}"),
                Arrives,
                UDP,
                &udp(ends, port, &self.payload()),
            );
            let segment = tcp(ends, port, SYN, &self.payload());
            self.body(format!("syn {port}"), Arrives, TCP, &segment);
            if port == 80 {
                self.is_eighty();
            }
            let via = (ends.0, self.scene.service);
            let packet = ip(via, UDP, &udp_from(via, (FROM + 1, port), &self.payload()));
            self.packets(
                format!("udp {port} through a Service"),
                Arrives,
                vec![packet],
            );
            let packet = ip(
                via,
                TCP,
                &tcp_from(via, (FROM + 1, port), SYN, &self.payload()),
            );
            self.packets(
                format!("syn {port} through a Service"),
                Arrives,
                vec![packet],
            );
            if port == 80 {
                self.is_eighty();
            }
        }
        let flags = [
            0,
            FIN,
            FIN | PSH | URG,
            SYN | FIN,
            SYN | RST,
            SYN | FIN | RST | PSH | ACK | URG,
            SYN | ACK,
            RST,
            RST | ACK,
            ACK,
            PSH | ACK,
            SYN | 0xc0,
            0xff,
        ];
        for flags in flags {
            let segment = tcp(ends, 81, flags, &self.payload());
            self.body(
                format!("tcp 81 with flags {flags:#04x}"),
                Maybe,
                TCP,
                &segment,
            );
        }
        for port in [0, 1, 0xffff] {
            self.body(
                format!("udp {port}"),
                Maybe,
                UDP,
                &udp(ends, port, &self.payload()),
            );
            let segment = tcp(ends, port, SYN, &self.payload());
            self.body(format!("syn {port}"), Maybe, TCP, &segment);
        }
        let init = |payload: &[u8]| {
            let [port, from] = [81_u16, FROM].map(u16::to_be_bytes);
            [&from[..], &port, &[0; 8], &[1, 0, 0, 68], payload].concat()
        };
        self.body("sctp init", Arrives, SCTP, &init(&self.payload()));
        let (request, reply) = if ends.0.is_ipv4() { (8, 0) } else { (128, 129) };
        let ping = |payload: &[u8], kind| icmp(ends, kind, 0, [0x12, 0x34, 0, 1], payload);
        let proto = icmp_of(ends);
        self.body("ping", Arrives, proto, &ping(&self.payload(), request));
        for kind in [
            reply, 5, 9, 10, 13, 14, 17, 40, 100, 127, 138, 139, 160, 255,
        ] {
            self.body(
                format!("icmp type {kind}"),
                Maybe,
                proto,
                &ping(&self.payload(), kind),
            );
        }
        for number in [
            2, 3, 4, 8, 41, 47, 50, 51, 59, 89, 94, 103, 112, 115, 135, 136, 139, 140, 253, 255,
        ] {
            self.body(format!("protocol {number}"), Maybe, number, &self.payload());
        }
    }

    pub(crate) fn spoofed(&mut self) {
        let (own, victim) = self.ends();
        let Scene {
            mac,
            gateway,
            victim_mac,
            friend,
            outside,
            service,
            ..
        } = self.scene;
        let mut sources = vec![victim, friend, outside, service];
        sources.extend(self.scene.nodes.clone());
        if own.is_ipv4() {
            let more: [[u8; 4]; 7] = [
                [0; 4],
                [127, 0, 0, 1],
                [255; 4],
                [224, 0, 0, 1],
                [169, 254, 1, 1],
                [240, 0, 0, 1],
                [10, 244, 0, 255],
            ];
            sources.extend(more.map(|octets| IpAddr::V4(Ipv4Addr::from(octets))));
        } else {
            let more = [
                "::",
                "::1",
                "ff02::1",
                "fe80::1",
                "fe80::1234",
                "::ffff:10.0.0.1",
                "fd00:10:244::",
            ];
            sources.extend(more.iter().filter_map(|text| text.parse::<IpAddr>().ok()));
        }
        for source in sources {
            let ends = (source, victim);
            let datagram = ip(ends, UDP, &udp(ends, 80, &self.payload()));
            let segment = ip(ends, TCP, &tcp(ends, 80, SYN, &self.payload()));
            let kind = if own.is_ipv4() { 8 } else { 128 };
            let ping = ip(
                ends,
                icmp_of(ends),
                &icmp(ends, kind, 0, [1; 4], &self.payload()),
            );
            let first = fragment(ends, UDP, 7, (0, true), &udp(ends, 80, &self.payload()));
            let later = fragment(ends, UDP, 7, (72, false), &self.payload());
            self.packets(
                format!("from {source}"),
                Never,
                vec![datagram, segment, ping, first, later],
            );
        }
        let ends = (own, victim);
        let packet = |cases: &Self| ip(ends, UDP, &udp(ends, 80, &cases.payload()));
        let multicast = [0x01, 0, 0x5e, 0, 0, 1];
        for from in [
            victim_mac,
            gateway,
            [0; 6],
            [0xff; 6],
            multicast,
            [2, 1, 2, 3, 4, 5],
        ] {
            let frame = ethernet(gateway, from, kind_of(own), &packet(self));
            self.frames(
                format!("from the MAC address {from:x?}"),
                Never,
                vec![frame],
            );
        }
        for to in [
            victim_mac,
            mac,
            [0; 6],
            [0xff; 6],
            multicast,
            [0x33, 0x33, 0, 0, 0, 1],
        ] {
            let frame = ethernet(to, mac, kind_of(own), &packet(self));
            self.frames(format!("to the MAC address {to:x?}"), Maybe, vec![frame]);
        }
        // Addresses that would be another's way to write the victim's.
        if let IpAddr::V4(plain) = victim {
            let source = Ipv6Addr::LOCALHOST;
            let written = [
                plain.to_ipv6_mapped(),
                [&[0; 12][..], &plain.octets()]
                    .concat()
                    .try_into()
                    .map_or(source, |o: [u8; 16]| o.into()),
            ];
            for written in written {
                for source in [source, Ipv6Addr::UNSPECIFIED, written] {
                    let ends = (source.into(), written.into());
                    let packet = v6(ends, UDP, 64, &udp(ends, 80, &self.payload()));
                    let frame = ethernet(gateway, mac, V6, &packet);
                    self.frames(format!("IPv6 {source} to {written}"), Never, vec![frame]);
                }
            }
        } else {
            for written in [
                "::ffff:10.244.0.2",
                "64:ff9b::a0f:1",
                "2002:af4::1",
                "::10.244.0.2",
            ] {
                let Ok(written) = written.parse() else {
                    continue;
                };
                let ends = (own, written);
                let packet = v6(ends, UDP, 64, &udp(ends, 80, &self.payload()));
                self.packets(format!("to {written}"), Never, vec![packet]);
            }
        }
        // Not the victim's, whatever the frame says.
        for to in [
            own,
            "127.0.0.1".parse().unwrap_or(own),
            "::1".parse().unwrap_or(own),
        ] {
            if to.is_ipv4() != own.is_ipv4() {
                continue;
            }
            let ends = (own, to);
            let packet = ip(ends, UDP, &udp(ends, 80, &self.payload()));
            let frame = ethernet(victim_mac, mac, kind_of(own), &packet);
            self.frames(
                format!("to {to} at the victim's MAC address"),
                Never,
                vec![frame],
            );
        }
    }

    /// Groups and broadcasts, which the victim hears too on other networks.
    pub(crate) fn groups(&mut self) {
        let own = self.scene.own;
        let Scene {
            mac,
            gateway,
            victim_mac,
            victim,
            ..
        } = self.scene;
        let mut groups: Vec<(IpAddr, Mac)> = Vec::new();
        match victim {
            IpAddr::V4(victim) => {
                let [a, b, c, _] = victim.octets();
                let list: [[u8; 4]; 8] = [
                    [255; 4],
                    [a, b, c, 255],
                    [a, b, c, 0],
                    [224, 0, 0, 1],
                    [224, 0, 0, 22],
                    [224, 0, 0, 251],
                    [239, 1, 2, 3],
                    [0; 4],
                ];
                for to in list {
                    let group = if to[0] & 0xf0 == 0xe0 {
                        [1, 0, 0x5e, to[1] & 0x7f, to[2], to[3]]
                    } else {
                        [0xff; 6]
                    };
                    groups.push((Ipv4Addr::from(to).into(), group));
                }
            }
            IpAddr::V6(victim) => {
                let o = victim.octets();
                let solicited = Ipv6Addr::new(
                    0xff02,
                    0,
                    0,
                    0,
                    0,
                    1,
                    0xff00 | u16::from(o[13]),
                    u16::from_be_bytes([o[14], o[15]]),
                );
                let list = [
                    "ff01::1", "ff02::1", "ff02::2", "ff02::fb", "ff02::16", "ff05::2", "ff0e::1",
                    "ff00::1",
                ];
                for to in list
                    .iter()
                    .filter_map(|text| text.parse().ok())
                    .chain([solicited])
                {
                    let o = to.octets();
                    groups.push((to.into(), [0x33, 0x33, o[12], o[13], o[14], o[15]]));
                }
            }
        }
        for (to, group) in groups {
            let ends = (own, to);
            let kind = if own.is_ipv4() { 8 } else { 128 };
            for at in [group, gateway, victim_mac, [0xff; 6]] {
                let packets = [
                    ip(ends, UDP, &udp(ends, 5353, &self.payload())),
                    ip(
                        ends,
                        icmp_of(ends),
                        &icmp(ends, kind, 0, [1; 4], &self.payload()),
                    ),
                    ip(ends, 2, &self.payload()),
                ];
                let frames = packets
                    .iter()
                    .map(|p| ethernet(at, mac, kind_of(own), p))
                    .collect();
                self.frames(format!("to {to} at {at:x?}"), Never, frames);
            }
        }
    }

    /// Packets in packets, for nodes that might unpack them.
    pub(crate) fn tunnels(&mut self) {
        let Scene {
            mac,
            own,
            friend,
            victim,
            victim_mac,
            ..
        } = self.scene;
        let inner_ends = (friend, victim);
        for to in [self.scene.nodes.clone(), vec![victim]].concat() {
            let ends = (own, to);
            let open = if to == victim { Maybe } else { Never };
            let inner = ip(inner_ends, UDP, &udp(inner_ends, 80, &self.payload()));
            let number = if own.is_ipv4() { IPIP } else { 41 };
            let packet = ip(ends, number, &inner);
            self.packets(format!("IP in IP to {to}"), open, vec![packet]);
            let gre = [&[0, 0][..], &kind_of(own).to_be_bytes(), &inner].concat();
            self.packets(format!("GRE to {to}"), open, vec![ip(ends, 47, &gre)]);
            let frame = ethernet(
                victim_mac,
                mac,
                kind_of(own),
                &ip(inner_ends, UDP, &udp(inner_ends, 80, &self.payload())),
            );
            for (name, port, head) in [
                ("VXLAN", 8472, [8, 0, 0, 0, 0, 0, 1, 0]),
                ("VXLAN", 4789, [8, 0, 0, 0, 0, 0, 1, 0]),
                ("Geneve", 6081, [0, 0, 0x65, 0x58, 0, 0, 1, 0]),
            ] {
                let payload = [&head[..], &frame].concat();
                self.packets(
                    format!("{name} to {to}:{port}"),
                    open,
                    vec![ip(ends, UDP, &udp(ends, port, &payload))],
                );
            }
        }
    }
}
