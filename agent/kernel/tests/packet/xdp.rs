//! The uplinks' XDP program: what it sends on by itself comes out as by the long way, every checksum
//! right; it drops what source ranges forbid, and leaves everything else as it was.

use std::{fs, net::IpAddr};

use hachi_abi::{Reason, Service, ServiceFlags};
use hachi_compile::{Frontend, Op};

use crate::{
    lab::{CLIENT_PORT, Lab, Net, PORT, SERVICE_PORT, both_families},
    support::ip,
    uplinks::body,
    wire::{ACK, Body, ETHERNET, FIN, Packet, RST, SYN, TCP, UDP},
};

const DROP: i32 = 1;
const PASS: i32 = 2;
const TX: i32 = 3;
/// The neighbour that the lab's routes name.
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 5, 1];
const EXTERNAL: u8 = 1;

impl Lab {
    /// Routes to the client and the backend by the loopback device, where XDP's test runs come from.
    fn route(&self) {
        ip(&["link", "set", "lo", "up"]);
        let forwarding = match self.net {
            Net::V4 => "/proc/sys/net/ipv4/conf/all/forwarding",
            Net::V6 => "/proc/sys/net/ipv6/conf/all/forwarding",
        };
        fs::write(forwarding, "1").expect("forwarding");
        let mac = "02:00:00:00:05:01";
        for to in [self.world, self.remote] {
            let to = to.to_string();
            ip(&["route", "replace", &to, "dev", "lo"]);
            ip(&[
                "neigh",
                "replace",
                &to,
                "lladdr",
                mac,
                "dev",
                "lo",
                "nud",
                "permanent",
            ]);
        }
    }

    /// Runs the XDP program; one counter rises if it decides, none if it leaves the packet alone.
    fn early(&mut self, packet: &[u8]) -> (i32, Option<Reason>, Vec<u8>) {
        let before = self.datapath.counters().expect("counters");
        let run = self
            .datapath
            .test_run_xdp(packet, 1)
            .expect("the program runs");
        let now = self.datapath.counters().expect("counters");
        let risen: Vec<_> = before
            .into_iter()
            .zip(now)
            .filter(|((_, old), (_, new))| old != new)
            .collect();
        let reason = match risen[..] {
            [] => None,
            [((reason, old), (_, new))] => {
                assert_eq!(new.packets, old.packets + 1);
                assert_eq!(new.bytes, old.bytes + packet.len() as u64);
                Some(reason)
            }
            _ => panic!("{risen:?}"),
        };
        if run.verdict == PASS {
            assert_eq!((reason, &run.packet[..]), (None, packet), "it is changed");
        }
        (run.verdict, reason, run.packet)
    }

    #[track_caller]
    fn left_early(&mut self, packet: &[u8]) {
        assert_eq!(self.early(packet).0, PASS);
    }

    /// Opens the flow from a client through the node to a backend elsewhere, by the long way, and has
    /// all of it noted just now; returns a later packet of either direction.
    fn open(&mut self, proto: u8) -> [Packet; 2] {
        self.publish(SERVICE_PORT, proto, &[self.remote]);
        let out = |lab: &Self, flags| {
            lab.wire(
                lab.world,
                lab.node,
                body(proto, (CLIENT_PORT, SERVICE_PORT), flags),
            )
        };
        let back = |lab: &Self, flags| {
            lab.wire(
                lab.remote,
                lab.node,
                body(proto, (PORT, CLIENT_PORT), flags),
            )
        };
        for packet in [
            out(self, SYN),
            back(self, SYN | ACK),
            out(self, ACK),
            back(self, ACK),
        ] {
            self.through_either(&packet);
        }
        [out(self, ACK), back(self, ACK)]
    }

    /// The long way, whether the route takes it past the stack or not.
    fn through_either(&self, packet: &Packet) -> Packet {
        let outcome = self.arrive(&packet.bytes());
        self.leave(&outcome.packet).translated()
    }
}

fn ends(packet: &Packet) -> (IpAddr, IpAddr, (u16, u16)) {
    (packet.source, packet.destination, packet.body.ports())
}

both_families! {
    /// Established: addresses, ports, checksums, hops and MAC addresses.
    fn established_flows_are_sent_on(lab) {
        lab.connect();
        lab.route();
        let tries = if hachi_testutil::in_guest() { 20 } else { 3 };
        // The program is loaded when it is first run, which takes seconds there.
        let stranger = lab.wire(lab.remote, lab.node, body(UDP, (PORT, CLIENT_PORT), 0));
        assert_eq!(lab.early(&stranger.bytes()).0, PASS);
        for proto in [TCP, UDP] {
            for direction in 0..2 {
                // A second may end between the long way and the short one: then it is left, once; in a
                // guest that is translated more often.
                let sent = (0..tries).any(|_| {
                    let packet = lab.open(proto)[direction].clone();
                    let expected = lab.through_either(&packet);
                    let (verdict, reason, after) = lab.early(&packet.bytes());
                    if verdict == PASS {
                        return false;
                    }
                    assert_eq!((verdict, reason), (TX, Some(Reason::Forwarded)));
                    let seen = Packet::parse(&after);
                    assert_eq!(ends(&seen), ends(&expected));
                    assert_eq!(seen.body, expected.body);
                    assert_eq!((seen.destination_mac, seen.source_mac), (NEIGHBOUR, [0; 6]));
                    let hops = ETHERNET + if lab.net == Net::V4 { 8 } else { 7 };
                    assert_eq!(after[hops], packet.bytes()[hops] - 1);
                    true
                });
                assert!(sent, "protocol {proto}, direction {direction}");
            }
        }
    }

    /// What opens or ends a flow, is cut short, has no route or a checksum for hardware to complete.
    fn the_rest_is_left(lab) {
        lab.connect();
        let [out, back] = lab.open(TCP);
        // No route.
        ip(&["link", "set", "lo", "down"]);
        lab.left_early(&out.bytes());
        lab.route();
        for flags in [SYN, SYN | ACK, FIN | ACK, RST] {
            for packet in [&out, &back] {
                let body = Body::Tcp { ports: packet.body.ports(), flags, data: Vec::new() };
                lab.left_early(&Packet { body, ..packet.clone() }.bytes());
            }
        }
        let bytes = out.bytes();
        for length in ETHERNET..bytes.len() {
            lab.left_early(&bytes[..length]);
        }
        let at = ETHERNET + if lab.net == Net::V4 { 20 } else { 40 } + 16;
        let mut partial = bytes.clone();
        let sum = out.pseudo_sum().to_be_bytes();
        partial[at..at + 2].copy_from_slice(&sum);
        lab.left_early(&partial);
        let stranger = lab.wire(lab.world, lab.node, body(TCP, (9, SERVICE_PORT), ACK));
        lab.left_early(&stranger.bytes());
        let forged = lab.wire(lab.client.ip, lab.node, body(TCP, (CLIENT_PORT, SERVICE_PORT), ACK));
        lab.left_early(&forged.bytes());
        lab.apply(&[Op::RaiseRevision]);
        lab.left_early(&bytes);
    }

    /// A client outside of a load balancer's ranges ends here.
    fn source_ranges_are_kept(lab) {
        lab.connect();
        let frontend = Frontend { addr: lab.service, port: SERVICE_PORT, proto: TCP, scope: EXTERNAL };
        let flags = ServiceFlags::SOURCE_RANGES;
        let service = Service { id: 9, count: 0, flags, affinity: 0, table: 0 };
        lab.apply(&[Op::PutService(frontend, service)]);
        let syn = lab.wire(lab.world, lab.service, body(TCP, (CLIENT_PORT, SERVICE_PORT), SYN)).bytes();
        let (verdict, reason, _) = lab.early(&syn);
        assert_eq!((verdict, reason), (DROP, Some(Reason::SourceRange)));
        lab.arrive(&syn).dropped(Reason::SourceRange);
        let other = lab.wire(lab.world, lab.service, body(TCP, (CLIENT_PORT, 81), SYN)).bytes();
        lab.left_early(&other);
    }

    /// Whatever the bytes are: it is sent on as it should, dropped by its name, or left as it was.
    fn noise_is_no_harm(lab) {
        lab.connect();
        lab.route();
        let packets = lab.open(UDP);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            // xorshift64*, by Vigna (2016).
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            u8::try_from(state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56).expect("eight bits")
        };
        let rounds = if hachi_testutil::in_guest() { 200_usize } else { 1000 };
        for round in 0..rounds {
            let mut packet = packets[round % 2].bytes();
            for _ in 0..=random() % 3 {
                let at = usize::from(random()) % packet.len();
                packet[at] = random();
            }
            let (verdict, reason, _) = lab.early(&packet);
            match verdict {
                PASS => assert_eq!(reason, None),
                TX => assert_eq!(reason, Some(Reason::Forwarded)),
                other => panic!("verdict {other}, {reason:?}"),
            }
        }
    }
}
