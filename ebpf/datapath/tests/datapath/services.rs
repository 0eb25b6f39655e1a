//! Services: choice, rewriting there and back, collisions, hairpin.

use std::collections::BTreeMap;

use hachi_abi::{CtFlags, Reason, ServiceFlags, proto};

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, Lab, OTHER, PORT, REMOTE, SERVER, SERVICE, SERVICE_PORT, SERVICE_TWO,
        SET, TCP, UDP, both_families,
    },
    wire::{self, ACK, FIN, Frame, SYN, View},
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

    /// SCTP's checksum covers no address: with the same port all is well, with another one the
    /// packet would arrive broken, and is dropped.
    fn sctp_keeps_its_port(lab) {
        lab.serve(SERVICE, proto::SCTP, &[SERVER]);
        let frame = lab.from(CLIENT, SERVICE, proto::SCTP, &wire::sctp(OUT));
        lab.refused(&frame, Reason::UnsupportedRewrite);
        for backend in lab.tables.backends.values_mut() {
            backend.port = SERVICE_PORT.to_be_bytes();
        }
        lab.tables.flows.borrow_mut().clear();
        let seen = lab.delivered(&frame, SERVER);
        assert_eq!(ends(&seen), (CLIENT, CLIENT_PORT, SERVER, SERVICE_PORT));
        assert_eq!(seen.body()[4..], wire::sctp(OUT)[4..]);
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

    /// Affinity: all flows of a client go to one backend.
    fn affinity_keeps_a_client_together(lab) {
        lab.serve(SERVICE, TCP, &(100..120).collect::<Vec<u8>>());
        lab.service(SERVICE, TCP).affinity = 10_800;
        let first = ends(&lab.passed(&lab.tcp(CLIENT, SERVICE, OUT, SYN))).2;
        for port in 1..500 {
            let syn = lab.tcp(CLIENT, SERVICE, (port, SERVICE_PORT), SYN);
            assert_eq!(ends(&lab.passed(&syn)).2, first);
        }
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
        lab.refused(&lab.tcp(CLIENT, SERVICE_TWO, OUT, SYN), Reason::TupleInUse);
        let seen = lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, SYN | ACK), CLIENT);
        assert_eq!(ends(&seen).0, SERVICE);
        // To the backend itself, from the same port: the same tuple again.
        lab.refused(&lab.tcp(CLIENT, SERVER, THERE, SYN), Reason::TupleInUse);
        // The backend cannot take the tuple over either.
        lab.refused(&lab.tcp(SERVER, CLIENT, BACK, SYN), Reason::TupleInUse);
        // With another backend there is a way, whatever the hash prefers.
        lab.serve(SERVICE_TWO, TCP, &[SERVER, OTHER]);
        lab.delivered(&lab.tcp(CLIENT, SERVICE_TWO, OUT, SYN), OTHER);
        // When the first flow has ended, its tuple is free.
        lab.serve(SERVICE_TWO, TCP, &[SERVER]);
        lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, FIN | ACK), CLIENT);
        lab.delivered(&lab.tcp(CLIENT, SERVICE_TWO, OUT, SYN), SERVER);
        let seen = lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, SYN | ACK), CLIENT);
        assert_eq!(ends(&seen).0, SERVICE_TWO);
    }

    /// The other order: a direct flow first, then a Service over the same backend.
    fn a_direct_flow_owns_its_tuple(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, SYN), SERVER);
        lab.refused(&lab.tcp(CLIENT, SERVICE, OUT, SYN), Reason::TupleInUse);
        let seen = lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, SYN | ACK), CLIENT);
        assert_eq!(ends(&seen), (SERVER, PORT, CLIENT, CLIENT_PORT));
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
