//! What IP carries: cut short, in fragments, and errors about what was never sent.

use crate::{
    cases::{
        Cases,
        Open::{Arrives, Maybe, Never},
    },
    forge::{Head4, SCTP, SYN, TCP, UDP, fragment, icmp, icmp_of, ip, summed, tcp, udp, v6},
};

impl Cases {
    /// Headers that end too soon, and lengths that are not true.
    pub(crate) fn cut_short(&mut self) {
        let ends = self.ends();
        let proto = icmp_of(ends);
        let kind = if ends.0.is_ipv4() { 8 } else { 128 };
        for (name, number, least) in [
            ("udp", UDP, 8),
            ("tcp", TCP, 20),
            ("icmp", proto, 8),
            ("sctp", SCTP, 12),
        ] {
            for length in [0, 1, 4, least - 1] {
                let payload = self.payload();
                let body = match number {
                    UDP => udp(ends, 80, &payload),
                    TCP => tcp(ends, 80, SYN, &payload),
                    SCTP => [&[0, 80, 0, 80][..], &payload].concat(),
                    _ => icmp(ends, kind, 0, [1; 4], &payload),
                };
                // The mark is behind the end that the header claims.
                let packet = if ends.0.is_ipv4() {
                    let total = u16::try_from(20 + length).unwrap_or_default();
                    let head = Head4 {
                        total: Some(total),
                        ..Head4::default()
                    };
                    head.on(ends, number, &body)
                } else {
                    let mut packet = v6(ends, number, 64, &body);
                    packet[4..6]
                        .copy_from_slice(&u16::try_from(length).unwrap_or_default().to_be_bytes());
                    packet
                };
                self.packets(format!("{name} of {length} bytes"), Never, vec![packet]);
            }
        }
        for offset in [0, 1, 4] {
            let mut segment = tcp(ends, 80, SYN, &self.payload());
            segment[12] = offset << 4;
            self.body(
                format!("tcp with a header of {offset} words"),
                Never,
                TCP,
                &summed(ends, TCP, segment),
            );
        }
        let mut segment = tcp(ends, 80, SYN, &self.payload());
        segment[12] = 0xf0;
        self.body(
            "tcp with a header of 15 words",
            Maybe,
            TCP,
            &summed(ends, TCP, segment),
        );
        self.is_eighty();
        for length in [0_u16, 7, 9, 0xffff] {
            let mut datagram = udp(ends, 81, &self.payload());
            datagram[4..6].copy_from_slice(&length.to_be_bytes());
            self.body(
                format!("udp that says {length} bytes"),
                Maybe,
                UDP,
                &datagram,
            );
        }
        let mut segment = tcp(ends, 81, SYN, &self.payload());
        segment[16] ^= 0x55;
        self.body("tcp with a wrong checksum", Maybe, TCP, &segment);
    }

    pub(crate) fn fragments(&mut self) {
        let ends = self.ends();
        let tcp_first = |cases: &Self, port| tcp(ends, port, SYN, &cases.payload());
        let later =
            |cases: &Self, id, proto, at| fragment(ends, proto, id, (at, false), &cases.payload());

        // Proper ones.
        let datagram = [udp(ends, 81, &self.payload()), self.payload()].concat();
        let whole = summed(ends, UDP, datagram);
        let halves = vec![
            fragment(ends, UDP, 100, (0, true), &whole[..72]),
            fragment(ends, UDP, 100, (72, false), &whole[72..]),
        ];
        self.packets("a datagram in two fragments", Arrives, halves);
        let halves = vec![
            fragment(ends, UDP, 101, (72, false), &whole[72..]),
            fragment(ends, UDP, 102, (8, false), &whole[72..]),
        ];
        self.packets("later fragments alone", Never, halves);

        // The header of the transport in more than one of them (RFC 1858).
        for (name, proto, least) in [("tcp", TCP, 20), ("udp", UDP, 8)] {
            for length in [0, 8, 16] {
                if length >= least {
                    continue;
                }
                // What little of the mark there is would not be found: it lies behind the header.
                let body = if proto == TCP {
                    tcp_first(self, 80)
                } else {
                    udp(ends, 80, &self.payload())
                };
                let mut packet = fragment(ends, proto, 103, (0, true), &body[..length]);
                packet.extend(self.payload());
                self.packets(
                    format!("a first fragment with {length} bytes of {name}"),
                    Never,
                    vec![packet],
                );
            }
            for at in [8, 16] {
                if at >= least {
                    continue;
                }
                let packet = later(self, 104, proto, at);
                self.packets(
                    format!("a later fragment in the header of {name}, at {at}"),
                    Never,
                    vec![packet],
                );
            }
        }

        // A datagram that begins as one thing and goes on as another.
        let first = |cases: &Self, id, port, proto| {
            let body = if proto == TCP {
                tcp_first(cases, port)
            } else {
                udp(ends, port, &cases.payload())
            };
            fragment(ends, proto, id, (0, true), &body[..72])
        };
        let frame = first(self, 110, 80, TCP);
        self.packets("a first fragment to 80", Arrives, vec![frame]);
        self.is_eighty();
        let frame = first(self, 110, 81, TCP);
        self.packets("a second first one, to 81", Maybe, vec![frame]);
        let frame = later(self, 110, TCP, 72);
        self.packets("the rest of what is now to 81", Maybe, vec![frame]);
        let frame = later(self, 110, UDP, 72);
        self.packets("a rest of another protocol", Never, vec![frame]);
        for at in [8, 16] {
            let frame = later(self, 110, TCP, at);
            self.packets(
                format!("a rest that overlaps the header at {at}"),
                Never,
                vec![frame],
            );
        }
        let frame = first(self, 111, 81, UDP);
        self.packets("a first fragment of UDP to 81", Maybe, vec![frame]);
        let frame = later(self, 111, TCP, 72);
        self.packets("a rest of TCP to that", Never, vec![frame]);
        let frame = first(self, 112, 80, TCP);
        self.packets("another first fragment to 80", Maybe, vec![frame]);
        self.is_eighty();
        for (name, at) in [
            ("overlaps the data", 24),
            ("overlaps the end", 64),
            ("goes on", 72),
            ("leaves a hole", 1024),
            ("ends beyond 64 KiB", 65_528),
        ] {
            let frame = later(self, 112, TCP, at);
            self.packets(format!("a rest that {name}"), Maybe, vec![frame]);
            self.is_eighty();
        }
        // The same identification under another name.
        for source in [self.scene.friend, self.scene.victim] {
            let ends = (source, ends.1);
            let frame = fragment(ends, TCP, 112, (72, false), &self.payload());
            self.packets(format!("a rest from {source}"), Never, vec![frame]);
        }
        let error = icmp(ends, 3, 3, [0; 4], &self.payload());
        let frame = fragment(ends, icmp_of(ends), 113, (0, true), &error[..72]);
        self.packets("an ICMP error in fragments", Maybe, vec![frame]);
    }

    /// Errors about packets that the victim never sent, or not to this Pod.
    pub(crate) fn errors(&mut self) {
        let ends @ (own, victim) = self.ends();
        let kinds: [u8; 4] = if own.is_ipv4() {
            [3, 4, 11, 12]
        } else {
            [1, 2, 3, 4]
        };
        let proto = icmp_of(ends);
        for kind in kinds {
            for (whom, other) in [
                ("this Pod", own),
                ("the friend", self.scene.friend),
                ("the outside", self.scene.outside),
                ("the node", self.scene.nodes[0]),
            ] {
                // (The mark is data of the packet inside.)
                let about = (victim, other);
                for (what, number) in [("tcp", TCP), ("udp", UDP), ("an unknown protocol", 253)] {
                    let payload = self.payload();
                    let body = match number {
                        TCP => tcp(about, 80, SYN, &payload),
                        UDP => udp(about, 80, &payload),
                        _ => payload,
                    };
                    let inside = ip(about, number, &body);
                    let error = icmp(ends, kind, 1, [0; 4], &inside);
                    let open = if other == own { Maybe } else { Never };
                    self.body(
                        format!("error {kind} about {what} to {whom}"),
                        open,
                        proto,
                        &error,
                    );
                }
            }
            let error = icmp(ends, kind, 0, [0; 4], &self.payload());
            self.body(format!("error {kind} about noise"), Maybe, proto, &error);
            let about = (victim, own);
            let mut inside = ip(about, UDP, &udp(about, 80, &[]));
            inside.truncate(inside.len() - 6);
            let error = icmp(ends, kind, 0, [0; 4], &inside);
            let packet = [ip(ends, proto, &error), self.payload()].concat();
            self.packets(
                format!("error {kind} about a packet cut short"),
                Maybe,
                vec![packet],
            );
            let inner = icmp((victim, own), kinds[0], 0, [0; 4], &self.payload());
            let inside = ip(about, proto, &inner);
            let error = icmp(ends, kind, 0, [0; 4], &inside);
            self.body(format!("error {kind} about an error"), Maybe, proto, &error);
        }
    }
}
