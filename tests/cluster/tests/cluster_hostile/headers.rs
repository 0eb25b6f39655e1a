//! Headers of the link and of IP: tags, options, extensions, lengths.

use std::net::IpAddr;

use crate::{
    cases::{
        Cases,
        Open::{self, Maybe, Never},
        Scene,
    },
    forge::{
        Head4, ICMPV6, OPTIONS, SYN, TCP, UDP, V4, V6, ethernet, fragment_header, icmp, ip,
        kind_of, octets, tcp, udp, v6,
    },
};

impl Cases {
    /// Tags, other protocols of the link, and the wrong one of two.
    pub(crate) fn links(&mut self) {
        let ends = self.ends();
        let Scene {
            mac,
            gateway,
            victim_mac,
            ..
        } = self.scene;
        let kind = kind_of(ends.0);
        let other = if kind == V4 { V6 } else { V4 };
        let packet = |cases: &Self| ip(ends, UDP, &udp(ends, 80, &cases.payload()));
        let tag = |tpid: u16, vid: u16| [tpid.to_be_bytes(), vid.to_be_bytes()].concat();
        let tags: [(&str, Vec<u8>); 8] = [
            ("802.1Q", tag(0x8100, 5)),
            ("a priority tag", tag(0x8100, 0)),
            ("802.1ad", tag(0x88a8, 5)),
            ("QinQ", [tag(0x88a8, 5), tag(0x8100, 6)].concat()),
            ("802.1Q twice", [tag(0x8100, 5), tag(0x8100, 6)].concat()),
            (
                "802.1Q thrice",
                [tag(0x8100, 0), tag(0x8100, 0), tag(0x8100, 0)].concat(),
            ),
            ("0x9100", tag(0x9100, 5)),
            ("MPLS", [&[0x88, 0x47][..], &[0, 1, 0x11, 64]].concat()),
        ];
        for to in [gateway, victim_mac, [0xff; 6]] {
            for (name, tags) in &tags {
                let inner = if *name == "MPLS" {
                    packet(self)
                } else {
                    [kind.to_be_bytes().to_vec(), packet(self)].concat()
                };
                let frame = [&to[..], &mac, tags, &inner].concat();
                self.frames(format!("{name} to {to:x?}"), Never, vec![frame]);
            }
            for kind in [
                other, 0x0040, 0x05dc, 0x0805, 0x8035, 0x8847, 0x8863, 0x8864, 0x886d, 0x888e,
                0x88cc, 0x88e5, 0x88f7, 0x9000, 0xffff,
            ] {
                let frame = ethernet(to, mac, kind, &packet(self));
                self.frames(
                    format!("EtherType {kind:#06x} to {to:x?}"),
                    Never,
                    vec![frame],
                );
            }
            let snap = [
                &[0xaa, 0xaa, 3, 0, 0, 0][..],
                &kind.to_be_bytes(),
                &packet(self),
            ]
            .concat();
            let length = u16::try_from(snap.len()).unwrap_or(100);
            let frame = ethernet(to, mac, length, &snap);
            self.frames(format!("SNAP to {to:x?}"), Never, vec![frame]);
        }
    }

    pub(crate) fn headers_v4(&mut self) {
        let ends = self.ends();
        let IpAddr::V4(victim) = self.scene.victim else {
            return;
        };
        let body = |cases: &Self| udp(ends, 81, &cases.payload());
        // Only the whole way around is as long as it says.
        for first in [0x44, 0x40, 0x05, 0x55, 0xf5, 0x65] {
            let head = Head4 {
                first,
                ..Head4::default()
            };
            let packet = head.on(ends, UDP, &body(self));
            self.packets(
                format!("a header that begins {first:#04x}"),
                Never,
                vec![packet],
            );
        }
        for total in [0, 1, 19, 20, 27, 1400, 0xffff] {
            let head = Head4 {
                total: Some(total),
                ..Head4::default()
            };
            let packet = head.on(ends, UDP, &body(self));
            self.packets(format!("a length of {total}"), Never, vec![packet]);
        }
        for (name, head) in [
            (
                "no hops left",
                Head4 {
                    ttl: 0,
                    ..Head4::default()
                },
            ),
            (
                "one hop left",
                Head4 {
                    ttl: 1,
                    ..Head4::default()
                },
            ),
            (
                "a wrong header checksum",
                Head4 {
                    spoil: 0x33,
                    ..Head4::default()
                },
            ),
            (
                "the evil bit",
                Head4 {
                    fragment: 0x8000,
                    ..Head4::default()
                },
            ),
            (
                "DF",
                Head4 {
                    fragment: 0x4000,
                    ..Head4::default()
                },
            ),
        ] {
            let packet = head.on(ends, UDP, &body(self));
            self.packets(name, Maybe, vec![packet]);
        }
        let hop = victim.octets();
        let route =
            |kind: u8, pointer: u8| [vec![kind, 7, pointer], hop.to_vec(), vec![1]].concat();
        let options: Vec<(&str, Open, Vec<u8>)> = vec![
            ("nothing but NOPs", Maybe, vec![1; 40]),
            ("an end of options", Maybe, vec![0; 8]),
            ("record route", Maybe, [vec![7, 11, 4], vec![0; 9]].concat()),
            (
                "timestamps",
                Maybe,
                [vec![68, 12, 5, 0], vec![0; 8]].concat(),
            ),
            ("router alert", Maybe, vec![148, 4, 0, 0]),
            ("security", Maybe, vec![130, 4, 0, 0]),
            ("an unknown option", Maybe, vec![222, 4, 0, 0]),
            ("an option without a length", Maybe, vec![1, 1, 1, 222]),
            ("an option of length 0", Maybe, vec![222, 0, 0, 0]),
            ("an option of length 1", Maybe, vec![222, 1, 0, 0]),
            ("an option that is too long", Maybe, vec![222, 200, 0, 0]),
            ("loose source route", Never, route(131, 4)),
            ("strict source route", Never, route(137, 4)),
            ("a loose source route that is done", Never, route(131, 8)),
            (
                "a source route behind NOPs",
                Never,
                [vec![1, 1, 1, 1], route(131, 4)].concat(),
            ),
            (
                "a source route behind an option",
                Never,
                [vec![222, 4, 0, 0], route(137, 4)].concat(),
            ),
            (
                "a source route at the end",
                Never,
                [vec![1; 32], route(131, 4)].concat(),
            ),
        ];
        for (name, open, options) in options {
            let head = Head4 {
                options,
                ..Head4::default()
            };
            let packet = head.on(ends, UDP, &body(self));
            self.packets(format!("{name}, to the victim"), open, vec![packet]);
            if open != Never {
                continue;
            }
            for by in [
                self.scene.nodes.clone(),
                vec![self.scene.friend, self.scene.outside, self.scene.service],
            ]
            .concat()
            {
                let ends = (ends.0, by);
                let packet = head.on(ends, UDP, &udp(ends, 81, &self.payload()));
                self.packets(format!("{name}, by {by}"), Never, vec![packet]);
            }
        }
    }

    pub(crate) fn headers_v6(&mut self) {
        let ends = self.ends();
        let body = |cases: &Self| udp(ends, 81, &cases.payload());
        let pad = |next: u8| vec![next, 0, 1, 4, 0, 0, 0, 0];
        for first in [0x00, 0x40, 0x45, 0x50, 0x70, 0xf0] {
            let mut packet = v6(ends, UDP, 64, &body(self));
            packet[0] = first;
            self.packets(
                format!("a header that begins {first:#04x}"),
                Never,
                vec![packet],
            );
        }
        for length in [0_u16, 1, 7, 1400, 0xffff] {
            let mut packet = v6(ends, UDP, 64, &body(self));
            packet[4..6].copy_from_slice(&length.to_be_bytes());
            self.packets(format!("a length of {length}"), Never, vec![packet]);
        }
        for hops in [0, 1, 2, 255] {
            let packet = v6(ends, UDP, hops, &body(self));
            self.packets(format!("{hops} hops left"), Maybe, vec![packet]);
        }
        let mut chains: Vec<(String, Open, u8, Vec<u8>)> = vec![
            ("hop-by-hop options".into(), Maybe, 0, pad(UDP)),
            (
                "a router alert".into(),
                Maybe,
                0,
                vec![UDP, 0, 5, 2, 0, 0, 1, 0],
            ),
            (
                "a jumbo length".into(),
                Maybe,
                0,
                vec![UDP, 0, 0xc2, 4, 0, 1, 0, 0],
            ),
            ("destination options".into(), Maybe, OPTIONS, pad(UDP)),
            (
                "both options".into(),
                Maybe,
                0,
                [pad(OPTIONS), pad(UDP)].concat(),
            ),
            (
                "long options".into(),
                Maybe,
                OPTIONS,
                [vec![UDP, 3, 1, 28], vec![0; 28]].concat(),
            ),
            (
                "an unknown option".into(),
                Maybe,
                OPTIONS,
                vec![UDP, 0, 0xde, 4, 0, 0, 0, 0],
            ),
            (
                "hop-by-hop options later".into(),
                Never,
                OPTIONS,
                [pad(0), pad(UDP)].concat(),
            ),
            (
                "hop-by-hop options twice".into(),
                Never,
                0,
                [pad(0), pad(UDP)].concat(),
            ),
            (
                "options beyond the end".into(),
                Never,
                OPTIONS,
                vec![UDP, 200, 1, 4, 0, 0, 0, 0],
            ),
            (
                "a chain of eight".into(),
                Never,
                OPTIONS,
                [pad(OPTIONS).repeat(7), pad(UDP)].concat(),
            ),
            (
                "a chain of forty".into(),
                Never,
                OPTIONS,
                [pad(OPTIONS).repeat(39), pad(UDP)].concat(),
            ),
            (
                "a fragment in a fragment".into(),
                Never,
                44,
                [
                    fragment_header(44, 200, 0, true),
                    fragment_header(UDP, 201, 0, true),
                ]
                .concat(),
            ),
            (
                "options in a fragment".into(),
                Never,
                44,
                [fragment_header(OPTIONS, 202, 0, true).to_vec(), pad(UDP)].concat(),
            ),
            (
                "routing in a fragment".into(),
                Never,
                44,
                [
                    fragment_header(43, 203, 0, false).to_vec(),
                    vec![UDP, 0, 0, 0, 0, 0, 0, 0],
                ]
                .concat(),
            ),
            (
                "an atomic fragment".into(),
                Maybe,
                44,
                fragment_header(UDP, 204, 0, false).to_vec(),
            ),
            (
                "an atomic fragment in another".into(),
                Maybe,
                44,
                [
                    fragment_header(44, 205, 0, false),
                    fragment_header(UDP, 206, 0, false),
                ]
                .concat(),
            ),
            (
                "options, then an atomic fragment".into(),
                Maybe,
                OPTIONS,
                [pad(44), fragment_header(UDP, 207, 0, false).to_vec()].concat(),
            ),
            (
                "an authentication header".into(),
                Maybe,
                51,
                [vec![UDP, 4], vec![0; 22]].concat(),
            ),
            (
                "mobility".into(),
                Maybe,
                135,
                vec![UDP, 0, 0, 0, 0, 0, 0, 0],
            ),
            (
                "host identity".into(),
                Maybe,
                139,
                vec![UDP, 0, 0, 0, 0, 0, 0, 0],
            ),
            ("shim6".into(), Maybe, 140, vec![UDP, 0, 0, 0, 0, 0, 0, 0]),
        ];
        for kind in [0, 1, 2, 3, 4, 253] {
            for left in [0, 1] {
                let head = [vec![UDP, 2, kind, left, 0, 0, 0, 0], octets(ends.1)].concat();
                chains.push((
                    format!("routing header {kind} with {left} left"),
                    Never,
                    43,
                    head.clone(),
                ));
                chains.push((
                    format!("options, then routing header {kind} with {left} left"),
                    Never,
                    OPTIONS,
                    [pad(43), head].concat(),
                ));
            }
        }
        for (name, open, next, chain) in chains {
            let packet = v6(ends, next, 64, &[chain.clone(), body(self)].concat());
            self.packets(format!("{name}, to the victim"), open, vec![packet]);
            if name.starts_with("routing") {
                for by in [
                    self.scene.nodes.clone(),
                    vec![self.scene.friend, self.scene.outside],
                ]
                .concat()
                {
                    let ends = (ends.0, by);
                    let packet = v6(
                        ends,
                        next,
                        64,
                        &[chain.clone(), udp(ends, 81, &self.payload())].concat(),
                    );
                    self.packets(format!("{name}, by {by}"), Never, vec![packet]);
                }
            }
        }
        for (port, eighty) in [(80, true), (81, false)] {
            let segment = tcp(ends, port, SYN, &self.payload());
            let packet = v6(ends, OPTIONS, 64, &[pad(TCP), segment].concat());
            self.packets(format!("options, then TCP to {port}"), Maybe, vec![packet]);
            if eighty {
                self.is_eighty();
            }
        }
        // A length that a jumbo option would have to tell.
        let mut packet = v6(
            ends,
            0,
            64,
            &[vec![UDP, 0, 0xc2, 4, 0, 1, 0, 0], body(self)].concat(),
        );
        packet[4..6].fill(0);
        self.packets("a jumbogram", Never, vec![packet]);
        let nested = v6(
            ends,
            ICMPV6,
            255,
            &icmp(ends, 136, 0, [0x20, 0, 0, 0], &self.payload()),
        );
        let first = v6(
            ends,
            44,
            255,
            &[&fragment_header(ICMPV6, 208, 0, true)[..], &nested[40..]].concat(),
        );
        self.packets("discovery in fragments", Never, vec![first]);
    }
}
