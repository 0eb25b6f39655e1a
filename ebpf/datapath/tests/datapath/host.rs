//! The node's own packets to Services: handed over, translated, and back.

use hachi_abi::{CtFlags, HostDevice, Reason, Scope, Service, ServiceFlags, ServiceKey};
use hachi_datapath::{Outcome, Refusal};

use crate::{
    icmp::{inside, quote, unreachable},
    lab::{
        CLIENT, CLIENT_PORT, Lab, NODE, Net, PORT, REMOTE, SERVER, SERVICE_PORT, SET, TCP, UDP,
        WORLD, both_families, poison,
    },
    wire::{self, ACK, Frame, RST, SYN, View},
};

/// A Service's own address.
const SERVICE: u8 = 90;
const OUT: (u16, u16) = (CLIENT_PORT, SERVICE_PORT);
const NEAR: u32 = 80;
const FAR: u32 = 81;
const MAC: [u8; 6] = [2, 0, 0, 0, 9, 9];

fn ends(view: &View) -> (u8, u16, u8, u16) {
    let (source, destination) = view.ports();
    let last = |addr: &[u8]| addr[addr.len() - 1];
    (last(&view.src), source, last(&view.dst), destination)
}

fn body(number: u8, ports: (u16, u16), flags: u8) -> Vec<u8> {
    match number {
        TCP => wire::tcp(ports, flags, b"odd"),
        _ => wire::udp(ports, b"odd"),
    }
}

impl<const N: usize, F: Net<N>> Lab<N, F> {
    fn with_pair(&mut self) {
        self.tables.host = HostDevice {
            near: NEAR,
            far: FAR,
            mac: MAC,
            pad: [0; 2],
        };
    }

    fn host_program(
        &mut self,
        frame: &Frame,
        program: impl FnOnce(&mut Frame, &mut Self) -> Outcome,
    ) -> (Outcome, Frame) {
        let mut frame = frame.clone();
        frame.ifindex = FAR;
        let outcome = program(&mut frame, self);
        self.scratch = poison();
        assert_eq!(
            matches!(outcome, Outcome::Drop(_)),
            outcome.reason().is_drop()
        );
        (outcome, frame)
    }

    /// Runs the program of what the node sends to Services.
    fn asks(&mut self, frame: &Frame) -> (Outcome, Frame) {
        self.host_program(frame, |frame, lab| {
            frame.own = false;
            hachi_datapath::from_host::<N, F, _, _>(frame, &lab.tables, &mut lab.scratch)
        })
    }

    /// Runs the program of what comes back to it.
    #[track_caller]
    fn told(&mut self, frame: &Frame) -> View {
        let mut frame = frame.clone();
        // By a redirect, always.
        frame.linked = true;
        frame.complete = wire::sum(&frame.bytes);
        let (outcome, after) = self.host_program(&frame, |frame, lab| {
            hachi_datapath::to_host::<N, F, _, _>(frame, &lab.tables, &mut lab.scratch)
        });
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
        let view = after.check();
        assert_eq!(view.macs[..6], MAC);
        view
    }

    /// Runs the program of what the node sends to itself.
    fn self_sent(&mut self, frame: &Frame) -> (Outcome, Frame) {
        self.host_program(frame, |frame, lab| {
            frame.own = true;
            hachi_datapath::to_self::<N, F, _, _>(frame, &lab.tables, &mut lab.scratch)
        })
    }

    /// What the node sends out must be handed over as it is.
    #[track_caller]
    fn captured(&mut self, frame: &Frame) {
        let (outcome, after) = self.leave(frame);
        assert_eq!(outcome, Outcome::Out { ifindex: NEAR });
        assert_eq!(after.bytes, frame.bytes);
    }

    /// Makes an address a Service's that has no other ports.
    fn whole_address(&mut self, address: u8) {
        let key = ServiceKey {
            addr: F::addr(address),
            port: [0; 2],
            proto: 0,
            scope: Scope::INTERNAL,
        };
        let service = Service {
            id: 7,
            count: 0,
            flags: 0,
            affinity: 0,
            table: 0,
        };
        self.tables.services.insert(key, service);
    }
}

both_families! {
    /// A backend here: it sees the node, the node sees the Service.
    fn a_backend_of_this_node(lab) {
        lab.with_pair();
        for number in [TCP, UDP] {
            lab.serve(SERVICE, number, &[SERVER]);
            for flags in [SYN, ACK] {
                let own = lab.own(SERVICE, number, &body(number, OUT, flags)).partial();
                lab.captured(&own);
                let (outcome, after) = lab.asks(&own);
                assert_eq!(outcome, Outcome::RedirectPeer { ifindex: u32::from(SERVER) + 10 });
                assert_eq!(ends(&after.check()), (NODE, CLIENT_PORT, SERVER, PORT));
            }
            let answer = lab.from(SERVER, NODE, number, &body(number, (PORT, CLIENT_PORT), ACK));
            let (outcome, out) = lab.send(&answer);
            assert_eq!(outcome, Outcome::Out { ifindex: FAR });
            assert_eq!(ends(&lab.told(&out)), (SERVICE, SERVICE_PORT, NODE, CLIENT_PORT));
        }
    }

    /// A backend elsewhere: it leaves under the node's address, and what comes back is told from what is
    /// for others.
    fn a_backend_of_another_node(lab) {
        lab.with_pair();
        for number in [TCP, UDP] {
            lab.serve(SERVICE, number, &[REMOTE]);
            for flags in [SYN, ACK] {
                let own = lab.own(SERVICE, number, &body(number, OUT, flags));
                lab.captured(&own);
                let (outcome, after) = lab.asks(&own);
                assert_eq!(outcome, Outcome::Forward);
                // A device has received it since: it is not the node's own any more.
                let there = lab.translated(&after);
                assert_eq!(ends(&there), (NODE, CLIENT_PORT, REMOTE, PORT));
            }
            let answer = lab.wire(REMOTE, NODE, number, &body(number, (PORT, CLIENT_PORT), ACK));
            let (outcome, back) = lab.arrive(&answer);
            assert_eq!(outcome, Outcome::Out { ifindex: FAR });
            assert_eq!(ends(&lab.told(&back)), (SERVICE, SERVICE_PORT, NODE, CLIENT_PORT));
        }
        // The node's direct connections are nobody's business.
        let direct = lab.own(REMOTE, TCP, &wire::tcp((CLIENT_PORT + 1, PORT), SYN, b""));
        lab.left(&direct);
        lab.taken_in(&lab.wire(REMOTE, NODE, TCP, &wire::tcp((PORT, CLIENT_PORT + 1), SYN | ACK, b"")));
    }

    /// The node's own port, and a backend that is the node itself: both by the loopback device.
    fn the_node_asks_and_answers_itself(lab) {
        lab.with_pair();
        lab.serve(NODE, TCP, &[SERVER]);
        let own = lab.own(NODE, TCP, &wire::tcp(OUT, SYN, b""));
        assert_eq!(lab.self_sent(&own).0, Outcome::Out { ifindex: NEAR });
        let (_, after) = lab.asks(&own);
        assert_eq!(ends(&after.check()), (NODE, CLIENT_PORT, SERVER, PORT));
        // To any other port, and of connections that no Service has, it stays.
        for frame in [
            lab.own(NODE, TCP, &wire::tcp((CLIENT_PORT, 22), SYN, b"")),
            lab.own(NODE, TCP, &wire::tcp((CLIENT_PORT, 22), ACK, b"")),
            lab.own(NODE, UDP, &wire::udp(OUT, b"")),
        ] {
            let (outcome, after) = lab.self_sent(&frame);
            assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
            assert_eq!(after.bytes, frame.bytes);
        }

        lab.serve(SERVICE, UDP, &[NODE]);
        let own = lab.own(SERVICE, UDP, &wire::udp(OUT, b"asked"));
        lab.captured(&own);
        let (_, after) = lab.asks(&own);
        assert_eq!(ends(&after.check()), (NODE, CLIENT_PORT, NODE, PORT));
        let answer = lab.own(NODE, UDP, &wire::udp((PORT, CLIENT_PORT), b"answered"));
        assert_eq!(lab.self_sent(&answer).0, Outcome::Out { ifindex: NEAR });
        let (outcome, after) = lab.asks(&answer);
        assert_eq!(outcome, Outcome::Out { ifindex: FAR });
        assert_eq!(ends(&lab.told(&after)), (SERVICE, SERVICE_PORT, NODE, CLIENT_PORT));
    }

    /// With no backend, and at a port that the Service has not, the node is told at once.
    fn an_empty_service_answers_the_node(lab) {
        lab.with_pair();
        lab.serve(SERVICE, TCP, &[]);
        lab.whole_address(SERVICE);
        for port in [SERVICE_PORT, 1] {
            let own = lab.own(SERVICE, TCP, &wire::tcp((CLIENT_PORT, port), SYN, b""));
            lab.captured(&own);
            let (outcome, after) = lab.asks(&own);
            assert_eq!(outcome, Outcome::Answer);
            assert_eq!(ends(&lab.told(&after)), (SERVICE, port, NODE, CLIENT_PORT));
        }
        lab.service(SERVICE, TCP).flags = ServiceFlags::DROP_WHEN_EMPTY;
        let own = lab.own(SERVICE, TCP, &wire::tcp(OUT, SYN, b""));
        assert_eq!(lab.asks(&own).0, Outcome::Drop(Reason::NoBackend));
        assert_eq!(lab.tracked(), 0);
    }

    /// With no port left for a backend elsewhere the node is told, from the address that it asked.
    fn exhaustion_is_told_to_the_node(lab) {
        const BACKEND: u8 = 72;
        lab.with_pair();
        lab.serve(SERVICE, TCP, &[BACKEND]);
        lab.tables.ports = (CLIENT_PORT, CLIENT_PORT);
        lab.translated(&lab.wire(CLIENT, BACKEND, TCP, &wire::tcp((CLIENT_PORT, PORT), SYN, b"")));
        let own = lab.own(SERVICE, TCP, &wire::tcp(OUT, SYN, b""));
        let (outcome, after) = lab.asks(&own);
        assert_eq!(outcome, Outcome::Forward);
        let (refusal, answer) = lab.refusal(&after);
        assert_eq!(refusal, Refusal::Host);
        let view = lab.told(&answer);
        assert_eq!(ends(&view), (SERVICE, SERVICE_PORT, NODE, CLIENT_PORT));
        assert_eq!(view.body()[13], RST | ACK);
    }

    /// What the stack says of itself on the device is nothing that a Service could answer.
    fn what_has_no_ports_ends_there(lab) {
        lab.with_pair();
        let ping = lab.own(SERVICE, F::ICMP, &wire::icmp(F::ECHO[0], 0, [0, 1, 0, 1], b"ping"));
        assert_eq!(lab.asks(&ping).0, Outcome::Drop(Reason::UnsupportedLink));
    }

    /// A connection outlives its Service, as a Pod's does; without the pair nothing is captured.
    fn what_is_tracked_goes_on(lab) {
        lab.with_pair();
        lab.serve(SERVICE, TCP, &[SERVER]);
        let segment = |lab: &Lab<N, F>, flags| lab.own(SERVICE, TCP, &wire::tcp(OUT, flags, b""));
        lab.asks(&segment(lab, SYN));
        lab.tables.services.clear();
        let data = segment(lab, ACK);
        lab.captured(&data);
        let (_, after) = lab.asks(&data);
        assert_eq!(ends(&after.check()), (NODE, CLIENT_PORT, SERVER, PORT));
        let again = segment(lab, SYN);
        lab.left(&again);
        lab.tables.host = HostDevice::default();
        assert_eq!(lab.leave(&data).0, Outcome::Pass(Reason::PassedToNetwork));
    }

    /// Only the node's own packets are captured: others' to a cluster's address are nobody's business.
    fn what_is_forwarded_is_not_captured(lab) {
        lab.with_pair();
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.left(&lab.wire(WORLD, SERVICE, TCP, &wire::tcp(OUT, SYN, b"")));
        assert_eq!(lab.tracked(), 0);
    }

    /// Policy never stands between a Pod and its node; the Pod's own answers are part of the flow.
    fn a_pod_that_is_isolated_serves_its_node(lab) {
        lab.with_pair();
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.isolate(SERVER, SET, SET);
        let (outcome, _) = lab.asks(&lab.own(SERVICE, TCP, &wire::tcp(OUT, SYN, b"")));
        assert_eq!(outcome, Outcome::RedirectPeer { ifindex: u32::from(SERVER) + 10 });
        let answer = lab.tcp(SERVER, NODE, (PORT, CLIENT_PORT), SYN | ACK);
        assert_eq!(lab.send(&answer).0, Outcome::Out { ifindex: FAR });
        lab.refused(&lab.tcp(SERVER, CLIENT, (PORT, 1), SYN), Reason::PolicyEgress);
    }

    /// All processes of the node are one client, with the same memory as its sockets.
    fn the_node_is_one_client(lab) {
        lab.with_pair();
        lab.serve(SERVICE, TCP, &[SERVER, CLIENT]);
        lab.service(SERVICE, TCP).affinity = 100;
        let first = lab.asks(&lab.own(SERVICE, TCP, &wire::tcp(OUT, SYN, b""))).0;
        let clients: Vec<_> = lab.tables.affinity.borrow().keys().map(|key| key.client).collect();
        assert_eq!(clients, [[0; N]]);
        for port in 1..40 {
            let own = lab.own(SERVICE, TCP, &wire::tcp((port, SERVICE_PORT), SYN, b""));
            assert_eq!(lab.asks(&own).0, first);
        }
    }

    /// Errors come from whom the node has asked, about what it has sent: by the pair (a Pod's), by the
    /// uplink (a router's), and by the loopback device (the stack's own).
    fn errors_name_the_service(lab) {
        lab.with_pair();
        let quoted = |from: u8, to: u8, ports: (u16, u16)| {
            unreachable::<N, F>(&quote::<N, F>(from, to, &wire::tcp(ports, SYN, b"")))
        };
        let named = |view: &View| {
            (view.src[N - 1], view.dst[N - 1], inside::<N, F>(view))
        };
        for (backend, by_pod) in [(SERVER, true), (REMOTE, false)] {
            lab.serve(SERVICE, TCP, &[backend]);
            let ports = (CLIENT_PORT + u16::from(backend), SERVICE_PORT);
            let (_, after) = lab.asks(&lab.own(SERVICE, TCP, &wire::tcp(ports, SYN, b"")));
            let error = quoted(NODE, backend, (ports.0, PORT));
            let asked = (NODE, ports.0, SERVICE, SERVICE_PORT);
            if by_pod {
                let (outcome, out) = lab.send(&lab.from(SERVER, NODE, F::ICMP, &error));
                assert_eq!(outcome, Outcome::Out { ifindex: FAR });
                assert_eq!(named(&lab.told(&out)), (SERVICE, NODE, asked));
            } else {
                lab.translated(&after);
                let (outcome, back) = lab.arrive(&lab.wire(WORLD, NODE, F::ICMP, &error));
                assert_eq!(outcome, Outcome::Out { ifindex: FAR });
                assert_eq!(named(&lab.told(&back)), (WORLD, NODE, asked));
            }
            let own = lab.own(NODE, F::ICMP, &error);
            let (outcome, after) = lab.self_sent(&own);
            assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
            assert_eq!(named(&after.check()), (NODE, NODE, asked));
        }
    }

    /// A client that is a program of the node is no flow of `from_net`'s, and one of the network's is none
    /// of the node's.
    fn the_networks_answers_go_to_the_network(lab) {
        lab.with_pair();
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[REMOTE]);
        let (_, after) = lab.forwarded(&lab.wire(WORLD, NODE, TCP, &wire::tcp(OUT, SYN, b"")));
        lab.translated(&after);
        let answer = lab.wire(REMOTE, NODE, TCP, &wire::tcp((PORT, CLIENT_PORT), SYN | ACK, b""));
        lab.forwarded(&answer);
        // A backend that is the node itself, of a client outside, is for the stack.
        lab.serve_in(Scope::EXTERNAL, SERVICE, TCP, &[NODE]);
        let (outcome, after) = lab.arrive(&lab.wire(WORLD, SERVICE, TCP, &wire::tcp(OUT, SYN, b"")));
        assert_eq!(outcome, Outcome::Forward, "which has no route but to the node itself");
        assert_eq!(ends(&after.check()), (WORLD, CLIENT_PORT, NODE, PORT));
        let flow = lab.flow(&Lab::<N, F>::tuple(WORLD, SERVICE, OUT)).expect("a flow");
        assert_eq!(flow.flags & CtFlags::NAT, CtFlags::NAT);
    }
}
