//! What arrives on an uplink: Services from outside, Pods' packets, forgeries.

use hachi_abi::{ConfigFlags, Reason, Scope};
use hachi_datapath::{Outcome, Refusal};

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, Lab, NODE, Net, OTHER, PORT, REMOTE, SERVER, SERVICE_PORT, SET, TCP,
        UDP, WORLD, both_families,
    },
    wire::{self, ACK, Frame, RST, SYN, View},
};

const OUT: (u16, u16) = (CLIENT_PORT, SERVICE_PORT);

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

/// Sends a packet on that `from_net` has forwarded: out by the uplink.
fn onward<const N: usize, F: Net<N>>(lab: &mut Lab<N, F>, frame: &Frame) -> View {
    let (_, after) = lab.forwarded(frame);
    lab.translated(&after)
}

both_families! {
    /// A client outside, a backend here: it sees the client, the client sees the Service.
    fn a_local_backend_sees_the_client(lab) {
        for number in [TCP, UDP] {
            lab.serve_in(Scope::EXTERNAL, NODE, number, &[SERVER]);
            for partial in [false, true] {
                let mut frame = lab.wire(WORLD, NODE, number, &body(number, OUT, SYN));
                if partial {
                    frame = frame.partial();
                }
                let got = lab.arrived(&frame, SERVER);
                assert_eq!(ends(&got), (WORLD, CLIENT_PORT, SERVER, PORT));
            }
            let answer = lab.from(SERVER, WORLD, number, &body(number, (PORT, CLIENT_PORT), ACK));
            let (outcome, out) = lab.send(&answer);
            assert_eq!(outcome, Outcome::Forward);
            assert_eq!(ends(&lab.translated(&out)), (NODE, SERVICE_PORT, WORLD, CLIENT_PORT));
        }
    }

    /// A backend of another node gets the node's address, and its answer finds the way back.
    fn a_remote_backend_answers_the_node(lab) {
        for number in [TCP, UDP] {
            lab.serve_in(Scope::EXTERNAL, NODE, number, &[REMOTE]);
            let there = onward(lab, &lab.wire(WORLD, NODE, number, &body(number, OUT, SYN)));
            assert_eq!(ends(&there), (NODE, CLIENT_PORT, REMOTE, PORT));
            let answer = lab.wire(REMOTE, NODE, number, &body(number, (PORT, CLIENT_PORT), ACK));
            assert_eq!(ends(&onward(lab, &answer)), (NODE, SERVICE_PORT, WORLD, CLIENT_PORT));
            // And on.
            let again = onward(lab, &lab.wire(WORLD, NODE, number, &body(number, OUT, ACK)));
            assert_eq!(ends(&again), (NODE, CLIENT_PORT, REMOTE, PORT));
        }
    }

    /// Without redirects the stack carries what is half translated, and nothing else changes.
    fn the_stack_may_carry_it(lab) {
        lab.tables.flags = ConfigFlags::MASQUERADE;
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[REMOTE]);
        let syn = lab.wire(WORLD, NODE, TCP, &wire::tcp(OUT, SYN, b""));
        let (outcome, after) = lab.arrive(&syn);
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
        assert_eq!(ends(&lab.translated(&after)), (NODE, CLIENT_PORT, REMOTE, PORT));
        let answer = lab.wire(REMOTE, NODE, TCP, &wire::tcp((PORT, CLIENT_PORT), SYN | ACK, b""));
        let (outcome, after) = lab.arrive(&answer);
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
        // Not from the node's own address: the stack would drop that.
        assert_eq!(ends(&after.check()), (REMOTE, PORT, WORLD, CLIENT_PORT));
        assert_eq!(ends(&lab.translated(&after)), (NODE, SERVICE_PORT, WORLD, CLIENT_PORT));

        lab.serve_in(Scope::EXTERNAL, NODE, UDP, &[SERVER]);
        let asked = lab.wire(WORLD, NODE, UDP, &wire::udp(OUT, b""));
        let (outcome, after) = lab.arrive(&asked);
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
        let view = after.check();
        assert_eq!(ends(&view), (WORLD, CLIENT_PORT, SERVER, PORT));
        lab.received(&lab.to(WORLD, SERVER, UDP, &wire::udp((CLIENT_PORT, PORT), b"")));
    }

    /// Scopes are apart: what is for Pods alone is nothing to the network.
    fn cluster_addresses_are_not_served_to_the_network(lab) {
        lab.serve(NODE, TCP, &[SERVER]);
        lab.taken_in(&lab.wire(WORLD, NODE, TCP, &wire::tcp(OUT, SYN, b"")));
        assert_eq!(lab.tracked(), 0, "the node's own traffic is not tracked");
    }

    /// With no backend the client is told.
    fn an_empty_service_answers(lab) {
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[]);
        let (outcome, after) = lab.arrive(&lab.wire(WORLD, NODE, TCP, &wire::tcp(OUT, SYN, b"")));
        assert_eq!(outcome, Outcome::Answer);
        assert_eq!(ends(&after.check()), (NODE, SERVICE_PORT, WORLD, CLIENT_PORT));
    }

    /// With no port left for a backend of another node the client is told, from the address that it asked:
    /// by a reset, or by "port unreachable" about its own packet.
    fn exhaustion_is_told_to_the_client(lab) {
        lab.tables.ports = (0, 0);
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[REMOTE]);
        lab.serve_in(Scope::EXTERNAL, NODE, UDP, &[REMOTE]);
        // A port that is in nobody's range is not kept.
        for number in [TCP, UDP] {
            let asked = lab.wire(WORLD, NODE, number, &body(number, OUT, SYN));
            let (_, between) = lab.forwarded(&asked);
            let (refusal, answer) = lab.refusal(&between);
            assert_eq!(refusal, Refusal::Outward);
            let view = answer.check_answer();
            if number == TCP {
                assert_eq!(ends(&view), (NODE, SERVICE_PORT, WORLD, CLIENT_PORT));
                assert_eq!(view.body()[13], RST | ACK);
            } else {
                assert_eq!((&view.src[..], &view.dst[..]), (&F::addr(NODE)[..], &F::addr(WORLD)[..]));
                assert_eq!(view.body()[..2], F::PORT_UNREACHABLE);
                let quote = &view.body()[8 + F::HEADER..];
                assert_eq!(quote[..4], asked.bytes[14 + F::HEADER..][..4], "its ports");
            }
        }
        assert!(lab.tables.nat.borrow().is_empty());
    }

    /// Policy judges the client's own address behind the Service, live flows too.
    fn policy_holds_from_outside(lab) {
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[SERVER]);
        lab.arrived(&lab.wire(WORLD, NODE, TCP, &wire::tcp(OUT, SYN, b"")), SERVER);
        lab.isolate(SERVER, SET, 0);
        for flags in [ACK, SYN] {
            let frame = lab.wire(WORLD, NODE, TCP, &wire::tcp(OUT, flags, b""));
            assert_eq!(lab.arrive(&frame).0, Outcome::Drop(Reason::PolicyIngress));
        }
        let direct = lab.wire(WORLD, SERVER, TCP, &wire::tcp((5, PORT), SYN, b""));
        assert_eq!(lab.arrive(&direct).0, Outcome::Drop(Reason::PolicyIngress));
        lab.allow(SET, REMOTE, TCP, PORT);
        let allowed = lab.wire(REMOTE, SERVER, TCP, &wire::tcp((CLIENT_PORT, PORT), SYN, b""));
        lab.arrived(&allowed, SERVER);
    }

    /// Nobody outside is a Pod of this node, or this node, which policy trusts.
    fn a_forged_source_is_dropped(lab) {
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[SERVER]);
        for from in [CLIENT, NODE] {
            for to in [SERVER, NODE, REMOTE] {
                let frame = lab.wire(from, to, TCP, &wire::tcp(OUT, SYN, b""));
                assert_eq!(lab.arrive(&frame).0, Outcome::Drop(Reason::SpoofedSource));
            }
        }
        assert_eq!(lab.tracked(), 0);
    }

    /// The node stays reachable: before it is configured, and for what cannot be read.
    fn the_node_stays_reachable(lab) {
        let short = lab.wire(WORLD, NODE, TCP, &[0; 4]);
        assert_eq!(lab.arrive(&short).0, Outcome::Pass(Reason::PassedToStack));
        lab.tables.revision = 0;
        lab.taken_in(&lab.wire(WORLD, NODE, TCP, &wire::tcp(OUT, SYN, b"")));
    }

    /// A Pod of another node, straight to one of this.
    fn pods_of_other_nodes_are_delivered(lab) {
        let frame = lab.wire(REMOTE, OTHER, TCP, &wire::tcp((CLIENT_PORT, PORT), SYN, b""));
        assert_eq!(ends(&lab.arrived(&frame, OTHER)), (REMOTE, CLIENT_PORT, OTHER, PORT));
    }

    /// "Too big" from the way to a remote backend reaches the client, as if about the Service.
    fn errors_on_the_way_to_a_backend_reach_the_client(lab) {
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[REMOTE]);
        let there = onward(lab, &lab.wire(WORLD, NODE, TCP, &wire::tcp(OUT, SYN, b"")));
        let router = 72;
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
        let (_, port, _, _) = ends(&there);
        let error = lab.wire(router, NODE, F::ICMP, &quote(NODE, REMOTE, (port, PORT)));
        let view = onward(lab, &error);
        // The router may be the next hop to the client, and takes nothing in its own name.
        assert_eq!((view.src[N - 1], view.dst[N - 1]), (NODE, WORLD));
        assert_eq!(inside(&view), (WORLD, CLIENT_PORT, NODE, SERVICE_PORT));

        // And from the way back to the backend.
        let back = (SERVICE_PORT, CLIENT_PORT);
        let error = lab.wire(router, NODE, F::ICMP, &quote(NODE, WORLD, back));
        let view = onward(lab, &error);
        assert_eq!((view.src[N - 1], view.dst[N - 1]), (NODE, REMOTE));
        assert_eq!(inside(&view), (REMOTE, PORT, NODE, port));
    }
}
