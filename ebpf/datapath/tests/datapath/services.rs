//! Services: choice, rewriting there and back, collisions, hairpin.

use std::collections::{BTreeMap, BTreeSet};

use hachi_abi::{CtFlags, MaglevKey, Reason, Service, ServiceFlags, ServiceKey, proto};
use hachi_datapath::Outcome;

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, Lab, OTHER, PORT, REMOTE, SERVER, SERVICE, SERVICE_PORT, SERVICE_TWO,
        SET, TCP, UDP, both_families,
    },
    wire::{self, ACK, FIN, Frame, RST, SYN, View},
};

const OUT: (u16, u16) = (CLIENT_PORT, SERVICE_PORT);
const THERE: (u16, u16) = (CLIENT_PORT, PORT);
const BACK: (u16, u16) = (PORT, CLIENT_PORT);

fn ends(view: &View) -> (u8, u16, u8, u16) {
    let (source, destination) = view.ports();
    (
        view.src[view.src.len() - 1],
        source,
        view.dst[view.dst.len() - 1],
        destination,
    )
}

/// The same frame with a complete and with a partial checksum.
fn sums(frame: Frame) -> [Frame; 2] {
    [frame.clone(), frame.partial()]
}

both_families! {
    /// To a backend of the node and back, with either kind of checksum.
    fn a_local_backend_and_back(lab) {
        for proto in [TCP, UDP] {
            lab.serve(SERVICE, proto, &[SERVER]);
            let body = |ports, flags| match proto {
                TCP => wire::tcp(ports, flags, b"odd"),
                _ => wire::udp(ports, b"odd"),
            };
            for frame in sums(lab.from(CLIENT, SERVICE, proto, &body(OUT, SYN))) {
                let seen = lab.delivered(&frame, SERVER);
                assert_eq!(ends(&seen), (CLIENT, CLIENT_PORT, SERVER, PORT));
            }
            for frame in sums(lab.from(SERVER, CLIENT, proto, &body(BACK, SYN | ACK))) {
                let seen = lab.delivered(&frame, CLIENT);
                assert_eq!(ends(&seen), (SERVICE, SERVICE_PORT, CLIENT, CLIENT_PORT));
            }
            let seen = lab.delivered(&lab.from(CLIENT, SERVICE, proto, &body(OUT, ACK)), SERVER);
            assert_eq!(ends(&seen), (CLIENT, CLIENT_PORT, SERVER, PORT));
        }
    }

    /// To a backend of another node and back through the stack.
    fn a_remote_backend_and_back(lab) {
        lab.serve(SERVICE, TCP, &[REMOTE]);
        let seen = lab.passed(&lab.tcp(CLIENT, SERVICE, OUT, SYN));
        assert_eq!(ends(&seen), (CLIENT, CLIENT_PORT, REMOTE, PORT));
        let seen = lab.received(&lab.to(REMOTE, CLIENT, TCP, &wire::tcp(BACK, SYN | ACK, b"")));
        assert_eq!(ends(&seen), (SERVICE, SERVICE_PORT, CLIENT, CLIENT_PORT));
    }

    /// Without redirection the rewritten packets come by again, both ways, and nothing is done
    /// twice; a new policy still binds them there.
    fn through_the_stack_between_pods(lab) {
        lab.tables.flags = 0;
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.allow(SET, CLIENT, TCP, PORT);
        lab.isolate(SERVER, SET, SET + 1);
        lab.isolate(CLIENT, SET + 2, 0);
        for flags in [SYN, ACK] {
            let seen = lab.passed(&lab.tcp(CLIENT, SERVICE, OUT, flags));
            assert_eq!(ends(&seen), (CLIENT, CLIENT_PORT, SERVER, PORT));
            let between = lab.to(CLIENT, SERVER, TCP, &wire::tcp(THERE, flags, b"data"));
            assert_eq!(ends(&lab.received(&between)), (CLIENT, CLIENT_PORT, SERVER, PORT));
            let seen = lab.passed(&lab.tcp(SERVER, CLIENT, BACK, flags & ACK | ACK));
            assert_eq!(ends(&seen), (SERVICE, SERVICE_PORT, CLIENT, CLIENT_PORT));
            let answer = wire::tcp((SERVICE_PORT, CLIENT_PORT), ACK, b"data");
            lab.received(&lab.to(SERVICE, CLIENT, TCP, &answer));
        }
        assert_eq!(lab.tracked(), 2);
        lab.tables.policy.clear();
        lab.tables.revision += 1;
        let between = lab.to(CLIENT, SERVER, TCP, &wire::tcp(THERE, ACK, b"data"));
        lab.kept_out(&between, Reason::PolicyIngress);
        let answer = wire::tcp((SERVICE_PORT, CLIENT_PORT), ACK, b"data");
        lab.kept_out(&lab.to(SERVICE, CLIENT, TCP, &answer), Reason::PolicyIngress);
    }

    /// The verdict is about the backend and its port.
    fn policy_is_asked_about_the_backend(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.isolate(CLIENT, 0, SET);
        lab.allow(SET, SERVER, TCP, SERVICE_PORT);
        lab.refused(&lab.tcp(CLIENT, SERVICE, OUT, SYN), Reason::PolicyEgress);
        lab.allow(SET, SERVER, TCP, PORT);
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER);
        lab.tables.revision += 1;
        lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, SYN | ACK), CLIENT);
        lab.tables.policy.clear();
        lab.tables.revision += 1;
        lab.refused(&lab.tcp(SERVER, CLIENT, BACK, ACK), Reason::PolicyEgress);
        lab.refused(&lab.tcp(CLIENT, SERVICE, OUT, ACK), Reason::PolicyEgress);
    }

    /// UDP without a checksum keeps none (IPv4); a sum of zero is written as all ones.
    fn udp_without_a_checksum_keeps_none(lab) {
        lab.serve(SERVICE, UDP, &[SERVER]);
        let mut frame = lab.from(CLIENT, SERVICE, UDP, &wire::udp(OUT, b"x"));
        let at = View::of(&frame.bytes).l4 + 6;
        frame.bytes[at..at + 2].copy_from_slice(&[0; 2]);
        frame.complete = wire::sum(&frame.bytes[14..]);
        let (outcome, after) = lab.send(&frame);
        assert_eq!(outcome.reason(), Reason::DeliveredLocal);
        assert_eq!(after.bytes[at..at + 2], [0, 0]);
        // Some payload among all makes the sum zero after the rewrite.
        for word in 0..=u16::MAX {
            let frame = lab.from(CLIENT, SERVICE, UDP, &wire::udp(OUT, &word.to_be_bytes()));
            let (_, after) = lab.send(&frame);
            assert_ne!(after.bytes[at..at + 2], [0, 0], "{word}");
        }
    }

    /// SCTP's checksum covers no address, but the ports: it is right after the rewrite, both ways.
    fn sctp_gets_a_right_checksum(lab) {
        lab.serve(SERVICE, proto::SCTP, &[SERVER]);
        for size in [0, 1, 4, 100, 1_399] {
            let chunk: Vec<u8> = (0..size).map(|i| i as u8).collect();
            let there = lab.from(CLIENT, SERVICE, proto::SCTP, &wire::sctp(OUT, &chunk));
            let seen = lab.delivered(&there, SERVER);
            assert_eq!(ends(&seen), (CLIENT, CLIENT_PORT, SERVER, PORT));
            assert_eq!(seen.body(), wire::sctp(THERE, &chunk));
            let back = lab.from(SERVER, CLIENT, proto::SCTP, &wire::sctp(BACK, &chunk));
            let seen = lab.delivered(&back, CLIENT);
            assert_eq!(ends(&seen), (SERVICE, SERVICE_PORT, CLIENT, CLIENT_PORT));
            assert_eq!(seen.body(), wire::sctp((SERVICE_PORT, CLIENT_PORT), &chunk));
        }
    }

    /// A checksum that was left to hardware stays for it to fill in.
    fn sctp_without_a_checksum_gets_none(lab) {
        lab.serve(SERVICE, proto::SCTP, &[SERVER]);
        let mut body = wire::sctp(OUT, b"chunk");
        body[8..12].fill(0);
        let seen = lab.delivered(&lab.from(CLIENT, SERVICE, proto::SCTP, &body), SERVER);
        assert_eq!(ends(&seen), (CLIENT, CLIENT_PORT, SERVER, PORT));
        assert_eq!(seen.body()[8..12], [0; 4]);
    }

    /// Flows spread evenly; a SYN that is repeated goes where it went.
    fn flows_spread_and_stay(lab) {
        let backends: Vec<u8> = (100..110).collect();
        lab.serve(SERVICE, TCP, &backends);
        let mut chosen = BTreeMap::new();
        for port in 10_000..30_000_u16 {
            let syn = lab.tcp(CLIENT, SERVICE, (port, SERVICE_PORT), SYN);
            let seen = ends(&lab.passed(&syn)).2;
            *chosen.entry(seen).or_insert(0_u32) += 1;
            if port % 100 == 0 {
                for _ in 0..5 {
                    lab.wait(3);
                    assert_eq!(ends(&lab.passed(&syn)).2, seen);
                }
            }
        }
        assert_eq!(chosen.len(), backends.len());
        for (backend, count) in chosen {
            assert!((1_800..2_200).contains(&count), "{backend}: {count} of 2 000");
        }
    }

    /// 100 000 connections over 10 backends: within 5% of even.
    fn a_hundred_thousand_flows_are_even(lab) {
        lab.serve(SERVICE, TCP, &(100..110).collect::<Vec<u8>>());
        let mut chosen = BTreeMap::new();
        for client in [CLIENT, SERVER, OTHER] {
            for port in 0..33_334_u16 {
                let syn = lab.tcp(client, SERVICE, (port + 1_024, SERVICE_PORT), SYN);
                let seen = ends(&lab.passed(&syn)).2;
                *chosen.entry(seen).or_insert(0_u32) += 1;
            }
        }
        assert_eq!(chosen.values().sum::<u32>(), 100_002);
        for (backend, count) in chosen {
            assert!((9_500..10_500).contains(&count), "{backend}: {count} of 10 000");
        }
    }

    /// Affinity: all flows of a client go to one backend, whatever the others do, for exactly as long
    /// as the Service says after the last one began.
    fn affinity_holds_exactly(lab) {
        const BACKENDS: std::ops::Range<u8> = 100..150;
        lab.serve(SERVICE, TCP, &BACKENDS.collect::<Vec<u8>>());
        lab.service(SERVICE, TCP).affinity = 30;
        let mut port = 1_000;
        let mut connect = |lab: &mut Lab<N, F>, client| {
            port += 1;
            let syn = lab.tcp(client, SERVICE, (port, SERVICE_PORT), SYN);
            ends(&lab.passed(&syn)).2
        };
        let mut fresh = 0;
        for _ in 0..40 {
            let first = connect(lab, CLIENT);
            connect(lab, OTHER);
            for wait in [0, 1, 29, 30, 30] {
                lab.wait(wait);
                assert_eq!(connect(lab, CLIENT), first, "{wait} s later");
            }
            // Backends come and go, and change their slots: this one stays.
            lab.serve(SERVICE, TCP, &BACKENDS.rev().filter(|b| b % 2 == first % 2).collect::<Vec<u8>>());
            lab.service(SERVICE, TCP).affinity = 30;
            assert_eq!(connect(lab, CLIENT), first);
            lab.wait(31);
            fresh += u32::from(connect(lab, CLIENT) != first);
            lab.wait(31);
            lab.serve(SERVICE, TCP, &BACKENDS.collect::<Vec<u8>>());
            lab.service(SERVICE, TCP).affinity = 30;
        }
        assert!(fresh > 20, "a client that was away chooses anew: {fresh} of 40 did");
    }

    /// A client's backend that is gone is another one from then on.
    fn affinity_to_a_backend_that_is_gone_is_over(lab) {
        lab.serve(SERVICE, TCP, &[100, 101]);
        lab.service(SERVICE, TCP).affinity = 30;
        let first = ends(&lab.passed(&lab.tcp(CLIENT, SERVICE, OUT, SYN))).2;
        let other = 201 - first;
        lab.serve(SERVICE, TCP, &[other]);
        lab.service(SERVICE, TCP).affinity = 30;
        assert_eq!(ends(&lab.passed(&lab.tcp(CLIENT, SERVICE, OUT, SYN))).2, other);
        lab.serve(SERVICE, TCP, &[first, other]);
        lab.service(SERVICE, TCP).affinity = 30;
        for port in 1..100 {
            let syn = lab.tcp(CLIENT, SERVICE, (port, SERVICE_PORT), SYN);
            assert_eq!(ends(&lab.passed(&syn)).2, other, "what it has now counts");
        }
    }

    /// A flow that policy denies gives its client no backend.
    fn a_denied_flow_leaves_no_affinity(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.service(SERVICE, TCP).affinity = 30;
        lab.isolate(CLIENT, 0, SET);
        lab.refused(&lab.tcp(CLIENT, SERVICE, OUT, SYN), Reason::PolicyEgress);
        assert!(lab.tables.affinity.borrow().is_empty());
    }

    /// The table decides where there is one; where it is half written, any backend does.
    fn tables_decide(lab) {
        lab.serve(SERVICE, TCP, &(100..110).collect::<Vec<u8>>());
        let id = lab.service(SERVICE, TCP).id;
        lab.service(SERVICE, TCP).table = 100;
        let all_to = |slot: u16| vec![slot; 64];
        for piece in 0..2 {
            lab.tables.maglev.insert(MaglevKey { service: id, piece }, all_to(7));
        }
        for port in 1..200 {
            let syn = lab.tcp(CLIENT, SERVICE, (port, SERVICE_PORT), SYN);
            assert_eq!(ends(&lab.passed(&syn)).2, 107);
        }
        // Beyond the count, and missing.
        lab.tables.maglev.insert(MaglevKey { service: id, piece: 0 }, all_to(10));
        lab.tables.maglev.remove(&MaglevKey { service: id, piece: 1 });
        let mut seen = BTreeSet::new();
        for port in 1..200 {
            let syn = lab.tcp(CLIENT, SERVICE, (port, SERVICE_PORT), SYN);
            seen.insert(ends(&lab.passed(&syn)).2);
        }
        assert_eq!(seen.len(), 10);
    }

    /// A source outside the ranges is dropped; the node is let in.
    fn source_ranges(lab) {
        for proto in [TCP, UDP] {
            lab.serve(SERVICE, proto, &[SERVER]);
            lab.service(SERVICE, proto).flags = ServiceFlags::SOURCE_RANGES;
        }
        let id = lab.service(SERVICE, TCP).id;
        let datagram = lab.from(CLIENT, SERVICE, UDP, &wire::udp(OUT, b""));
        lab.refused(&lab.tcp(CLIENT, SERVICE, OUT, SYN), Reason::SourceRange);
        lab.refused(&datagram, Reason::SourceRange);
        assert_eq!(lab.tracked(), 0);
        lab.tables.ranges.push((id, F::addr(CLIENT), N * 8 - 1));
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER);
        lab.refused(&lab.tcp(SERVER, SERVICE, OUT, SYN), Reason::SourceRange);
        lab.refused(&datagram, Reason::SourceRange);
        let id = lab.service(SERVICE, UDP).id;
        lab.tables.ranges.push((id, F::addr(CLIENT), 0));
        lab.delivered(&datagram, SERVER);
    }

    /// A backend that is gone gets no new flow, not even a repeated SYN; live flows stay.
    fn a_removed_backend_gets_no_new_flow(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER);
        lab.serve(SERVICE, TCP, &[OTHER]);
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, ACK), SERVER);
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), OTHER);
        lab.tables.backends.clear();
        lab.refused(&lab.tcp(CLIENT, SERVICE, OUT, SYN), Reason::NoBackend);
    }

    /// A flow that was there before its Service begins anew within a second.
    fn a_new_service_takes_over_its_address(lab) {
        let datagram = lab.from(CLIENT, SERVICE, UDP, &wire::udp(OUT, b"?"));
        assert_eq!(ends(&lab.passed(&datagram)).2, SERVICE);
        lab.serve(SERVICE, UDP, &[SERVER]);
        lab.wait(1);
        assert_eq!(ends(&lab.delivered(&datagram, SERVER)).2, SERVER);
    }

    /// From one port to two Services over one backend: replies are never taken for the other's.
    fn two_services_over_one_backend(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.serve(SERVICE_TWO, TCP, &[SERVER]);
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER);
        // The second has another port on the way, and so has one to the backend itself.
        let mut ports = vec![CLIENT_PORT];
        for (to, out) in [(SERVICE_TWO, OUT), (SERVER, THERE)] {
            let seen = ends(&lab.delivered(&lab.tcp(CLIENT, to, out, SYN), SERVER));
            assert_eq!((seen.0, seen.2, seen.3), (CLIENT, SERVER, PORT));
            assert!((32_768..=60_999).contains(&seen.1) && !ports.contains(&seen.1), "{seen:?}");
            // A SYN that is sent again is the same flow, and what follows is of it.
            for flags in [SYN, ACK] {
                let again = lab.delivered(&lab.tcp(CLIENT, to, out, flags), SERVER);
                assert_eq!(ends(&again), seen);
            }
            ports.push(seen.1);
        }
        for (from, port) in [(SERVICE, 0), (SERVICE_TWO, 1), (SERVER, 2)] {
            let answer = lab.tcp(SERVER, CLIENT, (PORT, ports[port]), SYN | ACK);
            let service_port = if from == SERVER { PORT } else { SERVICE_PORT };
            let seen = lab.delivered(&answer, CLIENT);
            assert_eq!(ends(&seen), (from, service_port, CLIENT, CLIENT_PORT));
        }
        // The backend cannot take a tuple over.
        for port in &ports {
            lab.refused(&lab.tcp(SERVER, CLIENT, (PORT, *port), SYN), Reason::TupleInUse);
        }
        // Nor can a later flow of the client's from the port that it does not know of.
        let late = ends(&lab.delivered(&lab.tcp(CLIENT, SERVER, (ports[1], PORT), SYN), SERVER));
        assert!(!ports.contains(&late.1), "{late:?}");
        // The first one ends: its tuple is free, and the others keep theirs.
        lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, FIN | ACK), CLIENT);
        let seen = lab.delivered(&lab.tcp(CLIENT, SERVICE_TWO, OUT, SYN), SERVER);
        assert_eq!(ends(&seen).1, ports[1], "a SYN of a live flow");
        lab.delivered(&lab.tcp(CLIENT, SERVICE_TWO, OUT, RST), SERVER);
        let seen = lab.delivered(&lab.tcp(CLIENT, SERVICE_TWO, OUT, SYN), SERVER);
        assert_eq!(ends(&seen).1, CLIENT_PORT);
        let seen = lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, SYN | ACK), CLIENT);
        assert_eq!(ends(&seen).0, SERVICE_TWO);
    }

    /// So it is for datagrams, for SCTP, and for a Pod that is its own backend at two ports.
    fn two_ways_to_one_backend_of_every_kind(lab) {
        for number in [UDP, proto::SCTP] {
            let body = |ports: (u16, u16)| match number {
                UDP => wire::udp(ports, b"odd"),
                _ => wire::sctp(ports, &[1, 0, 0, 4]),
            };
            lab.serve(SERVICE, number, &[SERVER]);
            lab.serve(SERVICE_TWO, number, &[SERVER]);
            for service in [SERVICE, SERVICE_TWO] {
                let seen = ends(&lab.delivered(&lab.from(CLIENT, service, number, &body(OUT)), SERVER));
                assert_eq!(seen.1 == CLIENT_PORT, service == SERVICE, "{seen:?}");
                let back = lab.from(SERVER, CLIENT, number, &body((PORT, seen.1)));
                let seen = lab.delivered(&back, CLIENT);
                assert_eq!(ends(&seen), (service, SERVICE_PORT, CLIENT, CLIENT_PORT));
            }
        }
        lab.serve(SERVICE, TCP, &[CLIENT]);
        let other = ServiceKey {
            addr: F::addr(SERVICE),
            port: 81_u16.to_be_bytes(),
            proto: TCP,
            scope: 0,
        };
        let service = *lab.service(SERVICE, TCP);
        lab.tables.services.insert(other, service);
        for port in [SERVICE_PORT, 81] {
            let syn = lab.tcp(CLIENT, SERVICE, (CLIENT_PORT, port), SYN);
            let seen = ends(&lab.delivered(&syn, CLIENT));
            assert_eq!((seen.0, seen.2, seen.3), (SERVICE, CLIENT, PORT));
            let back = lab.tcp(CLIENT, SERVICE, (PORT, seen.1), SYN | ACK);
            let seen = lab.delivered(&back, CLIENT);
            assert_eq!(ends(&seen), (SERVICE, port, CLIENT, CLIENT_PORT));
        }
    }

    /// With no port left a new flow is refused by name, and no live one is touched.
    fn a_port_that_is_left_for_nobody(lab) {
        lab.tables.ports = (50_000, 50_003);
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER);
        let mut ports = BTreeSet::new();
        for service in 0..6 {
            let address = SERVICE_TWO + service;
            lab.serve(address, TCP, &[SERVER]);
            let syn = lab.tcp(CLIENT, address, OUT, SYN);
            if service < 4 {
                assert!(ports.insert(ends(&lab.delivered(&syn, SERVER)).1));
            } else {
                lab.refused(&syn, Reason::TupleInUse);
            }
        }
        assert_eq!(ports, (50_000..=50_003).collect());
        for service in 0..4 {
            lab.delivered(&lab.tcp(CLIENT, SERVICE_TWO + service, OUT, ACK), SERVER);
        }
    }

    /// Another CPU may take the tuple between the look at it and the claim: it is not taken over.
    fn a_claim_is_never_taken_over(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.serve(SERVICE_TWO, TCP, &[SERVER]);
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER);
        let claim = Lab::<N, F>::tuple(SERVER, CLIENT, BACK);
        let entry = lab.tables.flows.borrow_mut().remove(&claim).expect("tracked");
        lab.tables.late.set(Some((claim, entry)));
        lab.refused(&lab.tcp(CLIENT, SERVICE_TWO, OUT, SYN), Reason::TupleInUse);
        let seen = lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, SYN | ACK), CLIENT);
        assert_eq!(ends(&seen).0, SERVICE);
    }

    /// The other order: a direct flow first, then a Service over the same backend.
    fn a_direct_flow_owns_its_tuple(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, SYN), SERVER);
        let port = ends(&lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER)).1;
        assert_ne!(port, CLIENT_PORT);
        let seen = lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, SYN | ACK), CLIENT);
        assert_eq!(ends(&seen), (SERVER, PORT, CLIENT, CLIENT_PORT));
        let seen = lab.delivered(&lab.tcp(SERVER, CLIENT, (PORT, port), SYN | ACK), CLIENT);
        assert_eq!(ends(&seen), (SERVICE, SERVICE_PORT, CLIENT, CLIENT_PORT));
    }

    /// A Pod that is its own backend talks to itself through the Service's address, whatever
    /// policy isolates it.
    fn a_pod_reaches_itself_through_a_service(lab) {
        for proto in [TCP, UDP] {
            lab.serve(SERVICE, proto, &[CLIENT]);
            let body = |ports, flags| match proto {
                TCP => wire::tcp(ports, flags, b"me"),
                _ => wire::udp(ports, b"me"),
            };
            for egress in [0, SET] {
                lab.isolate(CLIENT, egress, egress);
                for flags in [SYN, ACK] {
                    for frame in sums(lab.from(CLIENT, SERVICE, proto, &body(OUT, flags))) {
                        let seen = lab.delivered(&frame, CLIENT);
                        assert_eq!(ends(&seen), (SERVICE, CLIENT_PORT, CLIENT, PORT));
                    }
                    for frame in sums(lab.from(CLIENT, SERVICE, proto, &body(BACK, flags | ACK))) {
                        if proto == TCP && flags == SYN && frame.partial {
                            continue;
                        }
                        let seen = lab.delivered(&frame, CLIENT);
                        assert_eq!(ends(&seen), (SERVICE, SERVICE_PORT, CLIENT, CLIENT_PORT));
                    }
                }
            }
        }
        let flows = lab.tables.flows.borrow();
        assert!(flows.values().all(|entry| entry.flags & CtFlags::HAIRPIN != 0), "{flows:?}");
    }

    /// What an address of a Service has no port for is rejected, whatever the protocol.
    fn an_undefined_port_is_rejected(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        let wildcard = ServiceKey { addr: F::addr(SERVICE), port: [0; 2], proto: 0, scope: 0 };
        lab.tables.services.insert(wildcard, Service::default());
        let wrong = (CLIENT_PORT, SERVICE_PORT + 1);
        for frame in [
            lab.tcp(CLIENT, SERVICE, wrong, SYN),
            lab.from(CLIENT, SERVICE, UDP, &wire::udp(OUT, b"")),
            lab.from(CLIENT, SERVICE, proto::SCTP, &wire::sctp(OUT, b"")),
        ] {
            assert_eq!(lab.send(&frame).0, Outcome::Answer);
        }
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER);
        assert_eq!(lab.tracked(), 2);
    }

    /// Nothing but the Service's own port and protocol is rewritten.
    fn other_ports_are_not_the_services(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        let seen = lab.passed(&lab.tcp(CLIENT, SERVICE, (CLIENT_PORT, SERVICE_PORT + 1), SYN));
        assert_eq!(ends(&seen).2, SERVICE);
        let seen = lab.passed(&lab.from(CLIENT, SERVICE, UDP, &wire::udp(OUT, b"")));
        assert_eq!(ends(&seen).2, SERVICE);
    }

    /// A half that was evicted comes back, rewriting as before.
    fn an_evicted_half_comes_back(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER);
        lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, SYN | ACK), CLIENT);
        let there = Lab::<N, F>::tuple(CLIENT, SERVICE, OUT);
        let back = Lab::<N, F>::tuple(SERVER, CLIENT, BACK);
        for gone in [there, back] {
            let old = lab.tables.flows.borrow_mut().remove(&gone).expect("tracked");
            lab.wait(1);
            if gone == back {
                lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, ACK), SERVER);
            } else {
                lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, ACK), CLIENT);
            }
            let new = lab.flow(&gone).expect("restored");
            assert_eq!((new.flags, new.nat_addr, new.nat_port), (old.flags, old.nat_addr, old.nat_port));
        }
    }

    /// No backend, and silence asked for.
    fn an_empty_service_may_be_silent(lab) {
        for proto in [TCP, UDP] {
            lab.serve(SERVICE, proto, &[]);
            lab.service(SERVICE, proto).flags = ServiceFlags::DROP_WHEN_EMPTY;
        }
        lab.refused(&lab.tcp(CLIENT, SERVICE, OUT, SYN), Reason::NoBackend);
        lab.refused(&lab.from(CLIENT, SERVICE, UDP, &wire::udp(OUT, b"")), Reason::NoBackend);
    }
}
