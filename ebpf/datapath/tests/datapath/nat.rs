//! Masquerade: what Pods send out of the cluster, its answers, and the node's own connections.

use hachi_abi::{NatFlags, Reason, proto};
use hachi_datapath::{Outcome, Refusal};

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, Lab, NODE, Net, OTHER, PORT, REMOTE, TCP, UDP, WORLD, both_families,
    },
    wire::{self, ACK, FIN, Frame, RST, SYN, View},
};

const OUT: (u16, u16) = (CLIENT_PORT, PORT);

fn ends(view: &View) -> (u8, u16, u8, u16) {
    let (source, destination) = view.ports();
    let last = |addr: &[u8]| addr[addr.len() - 1];
    (last(&view.src), source, last(&view.dst), destination)
}

fn body(number: u8, ports: (u16, u16), flags: u8) -> Vec<u8> {
    match number {
        TCP => wire::tcp(ports, flags, b"odd"),
        UDP => wire::udp(ports, b"odd"),
        _ => wire::sctp(ports, b""),
    }
}

/// A Pod's TCP segment on its way out of the node.
fn segment<const N: usize, F: Net<N>>(lab: &Lab<N, F>, pod: u8, port: u16, flags: u8) -> Frame {
    lab.wire(pod, WORLD, TCP, &wire::tcp((port, PORT), flags, b""))
}

both_families! {
    /// There under the node's address, and back to the Pod; with either kind of checksum.
    fn there_and_back(lab) {
        for number in [TCP, UDP, proto::SCTP] {
            let out = lab.wire(CLIENT, WORLD, number, &body(number, OUT, SYN));
            let mut frames = vec![out.clone()];
            if number != proto::SCTP {
                frames.push(out.partial());
            }
            for frame in frames {
                assert_eq!(ends(&lab.translated(&frame)), (NODE, CLIENT_PORT, WORLD, PORT));
            }
            let back = lab.wire(WORLD, NODE, number, &body(number, (PORT, CLIENT_PORT), SYN | ACK));
            assert_eq!(ends(&lab.arrived(&back, CLIENT)), (WORLD, PORT, CLIENT, CLIENT_PORT));
        }
    }

    /// Two Pods with one source port leave by two, and each gets its own answers.
    fn two_pods_never_share_a_tuple(lab) {
        for number in [TCP, UDP, proto::SCTP] {
            let port = |lab: &mut Lab<N, F>, pod| {
                let frame = lab.wire(pod, WORLD, number, &body(number, OUT, SYN));
                ends(&lab.translated(&frame)).1
            };
            let (first, second) = (port(lab, CLIENT), port(lab, OTHER));
            assert_ne!(first, second);
            assert!((32_768..=60_999).contains(&second), "{second}");
            for (pod, port) in [(CLIENT, first), (OTHER, second)] {
                let back = lab.wire(WORLD, NODE, number, &body(number, (PORT, port), ACK));
                assert_eq!(ends(&lab.arrived(&back, pod)), (WORLD, PORT, pod, CLIENT_PORT));
            }
            let other = lab.wire(WORLD, NODE, number, &body(number, (PORT + 1, first), ACK));
            lab.taken_in(&other);
        }
    }

    /// What has no ports is one Pod's alone.
    fn a_protocol_without_ports_is_one_pod_s(lab) {
        let frame = |lab: &Lab<N, F>, pod| lab.wire(pod, WORLD, 47, b"tunnelled bytes");
        lab.translated(&frame(lab, CLIENT));
        assert_eq!(lab.leave(&frame(lab, OTHER)).0, Outcome::Drop(Reason::NatExhausted));
        let back = lab.arrived(&lab.wire(WORLD, NODE, 47, b"tunnelled bytes"), CLIENT);
        assert_eq!(back.dst[N - 1], CLIENT);
    }

    /// Echo requests are told apart by their identifier.
    fn pings_are_told_apart(lab) {
        let ping = |kind: usize, id: [u8; 2]| {
            wire::icmp(F::ECHO[kind], 0, [id[0], id[1], 0, 1], b"ping")
        };
        let id = |view: &View| [view.body()[4], view.body()[5]];
        let first = lab.translated(&lab.wire(CLIENT, WORLD, F::ICMP, &ping(0, [0, 7])));
        assert_eq!((first.src[N - 1], id(&first)), (NODE, [0, 7]));
        let second = lab.translated(&lab.wire(OTHER, WORLD, F::ICMP, &ping(0, [0, 7])));
        assert_ne!(id(&second), [0, 7]);
        for (pod, sent) in [(CLIENT, id(&first)), (OTHER, id(&second))] {
            let back = lab.arrived(&lab.wire(WORLD, NODE, F::ICMP, &ping(1, sent)), pod);
            assert_eq!((back.dst[N - 1], id(&back)), (pod, [0, 7]));
        }
        // What asks the node is for the node, whatever its identifier.
        lab.taken_in(&lab.wire(WORLD, NODE, F::ICMP, &ping(0, [0, 7])));
        // And the node's own pings are no Pod's.
        let own = lab.translated(&lab.own(WORLD, F::ICMP, &ping(0, [0, 7])));
        assert_ne!(id(&own), [0, 7]);
        lab.left(&lab.own(WORLD, F::ICMP, &ping(0, [0, 9])));
        let back = lab.taken_in(&lab.wire(WORLD, NODE, F::ICMP, &ping(1, id(&own))));
        assert_eq!((back.dst[N - 1], id(&back)), (NODE, [0, 7]));
    }

    /// Other nodes and their Pods know a Pod's address; so does everyone if it is turned off.
    fn who_knows_pods_sees_them(lab) {
        lab.left(&lab.wire(CLIENT, REMOTE, TCP, &wire::tcp(OUT, SYN, b"")));
        lab.tables.flags = 0;
        lab.left(&segment(lab, CLIENT, CLIENT_PORT, SYN));
    }

    /// A Pod that was reached at its own address answers from there.
    fn answers_leave_as_they_are(lab) {
        lab.arrived(&lab.wire(WORLD, CLIENT, TCP, &wire::tcp(OUT, SYN, b"")), CLIENT);
        lab.left(&lab.wire(CLIENT, WORLD, TCP, &wire::tcp((PORT, CLIENT_PORT), SYN | ACK, b"")));
    }

    /// The node's own ports are not given away, and where a Pod was first the node moves.
    fn the_node_keeps_its_own(lab) {
        let own = |lab: &Lab<N, F>, port| lab.own(WORLD, TCP, &wire::tcp((port, PORT), SYN, b""));
        lab.left(&own(lab, CLIENT_PORT));
        let port = ends(&lab.translated(&segment(lab, CLIENT, CLIENT_PORT, SYN))).1;
        assert_ne!(port, CLIENT_PORT);
        let back = wire::tcp((PORT, CLIENT_PORT), SYN | ACK, b"");
        lab.taken_in(&lab.wire(WORLD, NODE, TCP, &back));

        let moved = ends(&lab.translated(&own(lab, port)));
        assert_ne!(moved.1, port);
        let back = wire::tcp((PORT, moved.1), SYN | ACK, b"");
        let taken = lab.taken_in(&lab.wire(WORLD, NODE, TCP, &back));
        assert_eq!(ends(&taken), (WORLD, PORT, NODE, port));
        // Outside of the range nobody could have been given it: no entry is made.
        let before = lab.tables.nat.borrow().len();
        lab.left(&own(lab, 22));
        assert_eq!(lab.tables.nat.borrow().len(), before);
    }

    /// A range that is full refuses new flows by name, and gives nobody another's port.
    fn exhaustion_refuses(lab) {
        lab.tables.ports = (50_000, 50_063);
        let ports: std::collections::BTreeSet<_> = (0..64)
            .map(|i| ends(&lab.translated(&segment(lab, CLIENT, 1_000 + i, SYN))).1)
            .collect();
        assert_eq!(ports.len(), 64, "every port, once");
        let refused = segment(lab, OTHER, 2_000, SYN);
        assert_eq!(lab.leave(&refused).0, Outcome::Drop(Reason::NatExhausted));
        // The Pod is told, as if nobody listened there.
        let (refusal, answer) = lab.refusal(&refused);
        assert_eq!(refusal, Refusal::Inward);
        let view = answer.check_answer();
        assert_eq!(ends(&view), (WORLD, PORT, OTHER, 2_000));
        assert_eq!(view.body()[13], RST | ACK);
        // So is who sends datagrams. The node is not: an answer would be that of who has its tuple.
        let range = std::mem::replace(&mut lab.tables.ports, (PORT, PORT));
        let asked = |lab: &Lab<N, F>, pod| lab.wire(pod, 72, UDP, &wire::udp((PORT, 53), b""));
        lab.translated(&asked(lab, CLIENT));
        let asked = asked(lab, OTHER);
        let (refusal, answer) = lab.refusal(&asked);
        assert_eq!(refusal, Refusal::Inward);
        let view = answer.check_answer();
        assert_eq!((&view.src[..], &view.dst[..]), (&F::addr(72)[..], &F::addr(OTHER)[..]));
        assert_eq!(view.body()[..2], F::PORT_UNREACHABLE);
        assert_eq!(view.body()[8..], asked.bytes[14..14 + F::HEADER + 8]);
        let own = lab.own(72, UDP, &wire::udp((PORT, 53), b""));
        assert_eq!(lab.refusal(&own).0, Refusal::None);
        lab.tables.ports = range;
        // Nothing answers a reset.
        let reset = segment(lab, OTHER, 2_000, RST);
        assert_eq!(lab.refusal(&reset).0, Refusal::None);
        // To somebody else they are all free; and those that have one keep it.
        lab.translated(&lab.wire(OTHER, 71, TCP, &wire::tcp(OUT, SYN, b"")));
        lab.translated(&segment(lab, CLIENT, 1_063, ACK));
        // Ten seconds after a connection has ended its port is free again.
        lab.translated(&segment(lab, CLIENT, 1_063, RST));
        lab.wait(11);
        for i in 0..64 {
            let alive = segment(lab, CLIENT, 1_000 + i, if i == 63 { RST } else { ACK });
            if i != 63 {
                lab.translated(&alive);
            }
        }
        // Whoever comes first has it.
        for port in 2_000..2_064 {
            let outcome = lab.leave(&segment(lab, OTHER, port, SYN)).0;
            let refused = matches!(outcome, Outcome::Drop(Reason::NatExhausted));
            assert_eq!(refused, port != 2_000, "{port}: {outcome:?}");
        }
    }

    /// Nine ports of ten may be in use to one address and port, whatever the range can be divided by,
    /// and those whose flows are over are found again before user space has deleted them.
    fn a_crowd_finds_ports_twice(lab) {
        // 2^5 * 351
        lab.tables.ports = (32_768, 43_999);
        for pod in [CLIENT, OTHER] {
            let flows = 1..10_000;
            let ports: std::collections::BTreeSet<_> = flows
                .clone()
                .map(|port| ends(&lab.translated(&segment(lab, pod, port, SYN))).1)
                .collect();
            assert_eq!(ports.len(), flows.len(), "a port each");
            for port in flows {
                lab.translated(&segment(lab, pod, port, RST));
            }
            lab.wait(11);
        }
    }

    /// Where there is no address to put in nothing leaves under a Pod's.
    fn no_address_no_way_out(lab) {
        lab.tables.uplinks.insert(crate::lab::UPLINK, [0; N]);
        let frame = segment(lab, CLIENT, CLIENT_PORT, SYN);
        assert_eq!(lab.leave(&frame).0, Outcome::Drop(Reason::NatExhausted));
    }

    /// Either half is restored by the other one's packets.
    fn evicted_halves_come_back(lab) {
        let out = segment(lab, CLIENT, CLIENT_PORT, SYN);
        lab.translated(&out);
        let keys: Vec<_> = lab.tables.nat.borrow().keys().copied().collect();
        assert_eq!(keys.len(), 2);
        for key in keys {
            lab.tables.nat.borrow_mut().remove(&key);
            lab.wait(1);
            let reply = lab.tables.nat.borrow().values().any(|e| e.flags & NatFlags::REPLY != 0);
            if reply {
                let back = wire::tcp((PORT, CLIENT_PORT), ACK, b"");
                lab.arrived(&lab.wire(WORLD, NODE, TCP, &back), CLIENT);
            } else {
                lab.translated(&segment(lab, CLIENT, CLIENT_PORT, ACK));
            }
            assert_eq!(lab.tables.nat.borrow().len(), 2);
        }
    }

    /// Both sides' FIN ends a flow soon, one side's alone does not.
    fn the_end_of_a_connection_is_noted(lab) {
        lab.translated(&segment(lab, CLIENT, CLIENT_PORT, SYN));
        lab.translated(&segment(lab, CLIENT, CLIENT_PORT, FIN | ACK));
        let flags = |lab: &Lab<N, F>| {
            lab.tables.nat.borrow().values().fold(0xff, |all, entry| all & entry.flags)
        };
        assert_eq!(flags(lab) & NatFlags::FIN_OUT, NatFlags::FIN_OUT);
        let back = wire::tcp((PORT, CLIENT_PORT), FIN | ACK, b"");
        lab.arrived(&lab.wire(WORLD, NODE, TCP, &back), CLIENT);
        let both = NatFlags::FIN_OUT | NatFlags::FIN_IN;
        assert_eq!(flags(lab) & both, both);
        // The port is used again: it is alive again.
        lab.translated(&segment(lab, CLIENT, CLIENT_PORT, SYN));
        assert_eq!(flags(lab) & both, 0);
    }

    /// A router's error about what has left reaches the Pod, as if about what the Pod sent; and the
    /// Pod's error about what it got leaves as the node's.
    fn errors_are_translated_both_ways(lab) {
        let port = {
            lab.translated(&segment(lab, OTHER, CLIENT_PORT, SYN));
            ends(&lab.translated(&segment(lab, CLIENT, CLIENT_PORT, SYN))).1
        };
        let [kind, code] = F::PORT_UNREACHABLE;
        let quote = |from: u8, to: u8, ports| {
            let ip = wire::ip(F::addr(from), F::addr(to), TCP, &wire::tcp(ports, ACK, b"x"));
            wire::icmp(kind, code, [0; 4], &ip[..F::HEADER + 8])
        };
        let inside = |view: &View| {
            let ip = &view.body()[8..];
            let port = |at: usize| u16::from_be_bytes([ip[F::HEADER + at], ip[F::HEADER + at + 1]]);
            (ip[F::SOURCE + N - 1], port(0), ip[F::DESTINATION + N - 1], port(2))
        };
        let router = 72;
        let error = lab.wire(router, NODE, F::ICMP, &quote(NODE, WORLD, (port, PORT)));
        let view = lab.arrived(&error, CLIENT);
        assert_eq!((view.src[N - 1], view.dst[N - 1]), (router, CLIENT));
        assert_eq!(inside(&view), (CLIENT, CLIENT_PORT, WORLD, PORT));

        let error = lab.wire(CLIENT, WORLD, F::ICMP, &quote(WORLD, CLIENT, (PORT, CLIENT_PORT)));
        let view = lab.translated(&error);
        assert_eq!((view.src[N - 1], view.dst[N - 1]), (NODE, WORLD));
        assert_eq!(inside(&view), (WORLD, PORT, NODE, port));

        // The node's stack reports about a packet that it could not forward to the Pod.
        let mut error = lab.wire(NODE, WORLD, F::ICMP, &quote(WORLD, CLIENT, (PORT, CLIENT_PORT)));
        error.own = true;
        assert_eq!(inside(&lab.translated(&error)), (WORLD, PORT, NODE, port));

        // About nothing that was ever sent: nobody may learn of the Pod's address.
        let error = lab.wire(CLIENT, WORLD, F::ICMP, &quote(WORLD, CLIENT, (9, 9)));
        assert_eq!(lab.leave(&error).0, Outcome::Drop(Reason::IcmpUnrelated));
        let error = lab.wire(router, NODE, F::ICMP, &quote(NODE, WORLD, (9, 9)));
        lab.taken_in(&error);
    }

    /// Groups and the link's own addresses are left alone.
    fn what_is_not_for_the_world_stays_as_it_is(lab) {
        let group = if N == 4 { [224; N] } else { [0xff; N] };
        let ip = wire::ip(F::addr(CLIENT), group, UDP, &wire::udp(OUT, b""));
        lab.left(&Frame::new([2, 0, 0, 0, 3, 1], crate::lab::UPLINK, F::ETHERTYPE, &ip));
    }
}
