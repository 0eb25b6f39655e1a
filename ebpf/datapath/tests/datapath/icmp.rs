//! ICMP: echoes are flows, errors follow theirs, rewritten.

use hachi_abi::{Reason, Verdict};

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, NODE, Net, OTHER, PORT, REMOTE, SERVER, SERVICE, SERVICE_PORT, SET,
        TCP, UDP, WORLD, both_families, class, host_mac,
    },
    wire::{self, ACK, Frame, SYN, View},
};

const THERE: (u16, u16) = (CLIENT_PORT, PORT);
const OUT: (u16, u16) = (CLIENT_PORT, SERVICE_PORT);
const BACK: (u16, u16) = (PORT, CLIENT_PORT);

/// The packet that an error quotes.
pub(crate) fn quote<const N: usize, F: Net<N>>(from: u8, to: u8, body: &[u8]) -> Vec<u8> {
    let ip = wire::ip(F::addr(from), F::addr(to), TCP, body);
    ip[..F::HEADER + 8].to_vec()
}

pub(crate) fn unreachable<const N: usize, F: Net<N>>(quote: &[u8]) -> Vec<u8> {
    let [kind, code] = F::PORT_UNREACHABLE;
    wire::icmp(kind, code, [0; 4], quote)
}

/// Source, destination and ports of the packet inside an error, whose IPv4 header must be whole.
pub(crate) fn inside<const N: usize, F: Net<N>>(view: &View) -> (u8, u16, u8, u16) {
    let ip = &view.body()[8..];
    if N == 4 {
        assert_eq!(wire::sum(&ip[..20]), 0xffff, "the inner header's checksum");
    }
    let last = |at: usize| ip[at + N - 1];
    let port = |at: usize| u16::from_be_bytes([ip[F::HEADER + at], ip[F::HEADER + at + 1]]);
    (last(F::SOURCE), port(0), last(F::DESTINATION), port(2))
}

both_families! {
    /// A ping is judged once, its answer passes.
    fn an_echo_is_a_flow(lab) {
        let ping = |kind: usize| wire::icmp(F::ECHO[kind], 0, [0x12, 0x34, 0, 1], b"ping");
        lab.isolate(CLIENT, SET, 0);
        lab.refused(&lab.from(SERVER, CLIENT, F::ICMP, &ping(1)), Reason::PolicyIngress);
        lab.delivered(&lab.from(CLIENT, SERVER, F::ICMP, &ping(0)), SERVER);
        lab.delivered(&lab.from(SERVER, CLIENT, F::ICMP, &ping(1)), CLIENT);
        let other = wire::icmp(F::ECHO[1], 0, [0x12, 0x35, 0, 1], b"ping");
        lab.refused(&lab.from(SERVER, CLIENT, F::ICMP, &other), Reason::PolicyIngress);
        lab.isolate(SERVER, SET, 0);
        lab.refused(&lab.from(CLIENT, SERVER, F::ICMP, &ping(0)), Reason::PolicyIngress);
        lab.received(&lab.to(NODE, SERVER, F::ICMP, &ping(0)));
        lab.entry(SET, class(CLIENT), F::ICMP, 0, 0, Verdict::Allow);
        lab.delivered(&lab.from(CLIENT, SERVER, F::ICMP, &ping(0)), SERVER);
    }

    /// Requests of both sides may have one identifier, and so one pair of tuples: none of them is
    /// the answer to the other's.
    fn a_request_is_no_answer(lab) {
        let ping = |kind: usize| wire::icmp(F::ECHO[kind], 0, [0x12, 0x34, 0, 1], b"ping");
        lab.isolate(SERVER, 0, SET);
        lab.delivered(&lab.from(CLIENT, SERVER, F::ICMP, &ping(0)), SERVER);
        lab.refused(&lab.from(SERVER, CLIENT, F::ICMP, &ping(0)), Reason::PolicyEgress);
        lab.delivered(&lab.from(SERVER, CLIENT, F::ICMP, &ping(1)), CLIENT);
        // Allowed, both go on side by side.
        lab.isolate(SERVER, 0, 0);
        for (from, to) in [(CLIENT, SERVER), (SERVER, CLIENT), (CLIENT, SERVER)] {
            lab.delivered(&lab.from(from, to, F::ICMP, &ping(0)), to);
            lab.delivered(&lab.from(to, from, F::ICMP, &ping(1)), from);
        }
    }

    /// An error about a live flow reaches the isolated Pod that it concerns, from whoever says it.
    fn errors_follow_their_flow(lab) {
        lab.isolate(CLIENT, SET, 0);
        let error = unreachable::<N, F>(&quote::<N, F>(CLIENT, REMOTE, &wire::tcp(THERE, SYN, b"")));
        for by in [REMOTE, WORLD] {
            lab.kept_out(&lab.to(by, CLIENT, F::ICMP, &error), Reason::IcmpUnrelated);
        }
        lab.passed(&lab.tcp(CLIENT, REMOTE, THERE, SYN));
        for by in [REMOTE, WORLD] {
            lab.received(&lab.to(by, CLIENT, F::ICMP, &error));
        }
        // To a Pod whose flow it is not, and of a Pod that the packet was not for.
        lab.isolate(SERVER, SET, SET);
        lab.kept_out(&lab.to(WORLD, SERVER, F::ICMP, &error), Reason::IcmpUnrelated);
        lab.refused(&lab.from(SERVER, CLIENT, F::ICMP, &error), Reason::IcmpUnrelated);
        // When the flow is forbidden, so are its errors.
        lab.isolate(CLIENT, SET, SET);
        lab.kept_out(&lab.to(WORLD, CLIENT, F::ICMP, &error), Reason::IcmpUnrelated);
    }

    /// Errors about nothing known pass where no policy isolates.
    fn unrelated_errors_are_for_unisolated_pods(lab) {
        let error = unreachable::<N, F>(&quote::<N, F>(SERVER, CLIENT, &wire::tcp(THERE, SYN, b"")));
        lab.delivered(&lab.from(CLIENT, SERVER, F::ICMP, &error), SERVER);
        lab.received(&lab.to(WORLD, SERVER, F::ICMP, &error));
        lab.isolate(SERVER, SET, 0);
        lab.refused(&lab.from(CLIENT, SERVER, F::ICMP, &error), Reason::IcmpUnrelated);
        lab.kept_out(&lab.to(WORLD, SERVER, F::ICMP, &error), Reason::IcmpUnrelated);
        lab.received(&lab.to(NODE, SERVER, F::ICMP, &error));
        lab.isolate(SERVER, 0, 0);
        lab.isolate(CLIENT, 0, SET);
        lab.refused(&lab.from(CLIENT, SERVER, F::ICMP, &error), Reason::IcmpUnrelated);
        assert_eq!(lab.tracked(), 0);
        // An error with nothing in it, and one whose packet is cut within its ports.
        for quoted in [vec![], quote::<N, F>(SERVER, CLIENT, &wire::tcp(THERE, SYN, b""))[..F::HEADER + 2].to_vec()] {
            let error = unreachable::<N, F>(&quoted);
            lab.refused(&lab.from(CLIENT, SERVER, F::ICMP, &error), Reason::IcmpUnrelated);
        }
    }

    /// A Pod is no router: what it says about packets that were not for it is forged, whomever it
    /// says it to, and whoever is isolated.
    fn a_pod_errs_about_its_own_packets_only(lab) {
        for to in [REMOTE, WORLD, NODE, OTHER] {
            let error = unreachable::<N, F>(&quote::<N, F>(CLIENT, to, &wire::tcp(THERE, SYN, b"")));
            lab.refused(&lab.from(SERVER, CLIENT, F::ICMP, &error), Reason::IcmpUnrelated);
            lab.send(&lab.tcp(CLIENT, to, THERE, SYN));
            lab.refused(&lab.from(SERVER, CLIENT, F::ICMP, &error), Reason::IcmpUnrelated);
        }
    }

    /// A translated flow is known by the packet behind its Service too; when policy ends it, errors
    /// about that end as well.
    fn an_error_of_a_forbidden_translated_flow(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER);
        let error = unreachable::<N, F>(&quote::<N, F>(SERVER, CLIENT, &wire::tcp(BACK, ACK, b"")));
        let frame = lab.from(CLIENT, SERVER, F::ICMP, &error);
        lab.delivered(&frame, SERVER);
        lab.isolate(SERVER, SET, 0);
        lab.refused(&frame, Reason::IcmpUnrelated);
    }

    /// What a router or the backend says about a packet to the backend is, to the client, about
    /// one to the Service.
    fn an_error_about_a_backend_is_about_the_service(lab) {
        lab.serve(SERVICE, TCP, &[REMOTE]);
        lab.isolate(CLIENT, SET, 0);
        lab.passed(&lab.tcp(CLIENT, SERVICE, OUT, SYN));
        let error = unreachable::<N, F>(&quote::<N, F>(CLIENT, REMOTE, &wire::tcp(THERE, SYN, b"")));
        for (by, shown) in [(WORLD, WORLD), (REMOTE, SERVICE)] {
            let seen = lab.received(&lab.to(by, CLIENT, F::ICMP, &error));
            assert_eq!(seen.src[N - 1], shown);
            assert_eq!(inside::<N, F>(&seen), (CLIENT, CLIENT_PORT, SERVICE, SERVICE_PORT));
        }
    }

    /// The same from a backend on this node; and what the client says about an answer is, to the
    /// backend, about what it has sent.
    fn errors_between_pods_are_translated(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.isolate(CLIENT, SET, 0);
        lab.delivered(&lab.tcp(CLIENT, SERVICE, OUT, SYN), SERVER);
        let error = unreachable::<N, F>(&quote::<N, F>(CLIENT, SERVER, &wire::tcp(THERE, SYN, b"")));
        let seen = lab.delivered(&lab.from(SERVER, CLIENT, F::ICMP, &error), CLIENT);
        assert_eq!(seen.src[N - 1], SERVICE);
        assert_eq!(inside::<N, F>(&seen), (CLIENT, CLIENT_PORT, SERVICE, SERVICE_PORT));

        let answer = quote::<N, F>(SERVICE, CLIENT, &wire::tcp((SERVICE_PORT, CLIENT_PORT), ACK, b""));
        let error = unreachable::<N, F>(&answer);
        let seen = lab.delivered(&lab.from(CLIENT, SERVICE, F::ICMP, &error), SERVER);
        assert_eq!((seen.src[N - 1], seen.dst[N - 1]), (CLIENT, SERVER));
        assert_eq!(inside::<N, F>(&seen), (SERVER, PORT, CLIENT, CLIENT_PORT));
    }

    /// Without redirection the translated error comes by again, and is known.
    fn a_translated_error_passes_the_stack(lab) {
        lab.tables.flags = 0;
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.isolate(CLIENT, SET, 0);
        lab.passed(&lab.tcp(CLIENT, SERVICE, OUT, SYN));
        let error = unreachable::<N, F>(&quote::<N, F>(CLIENT, SERVER, &wire::tcp(THERE, SYN, b"")));
        let (_, after) = lab.send(&lab.from(SERVER, CLIENT, F::ICMP, &error));
        after.check();
        let onward = Frame::new(host_mac(CLIENT), u32::from(CLIENT) + 10, F::ETHERTYPE, &after.bytes[14..]);
        let seen = lab.received(&onward);
        assert_eq!(inside::<N, F>(&seen), (CLIENT, CLIENT_PORT, SERVICE, SERVICE_PORT));
    }

    /// Errors about datagrams and echoes as well.
    fn errors_about_other_protocols(lab) {
        lab.isolate(CLIENT, SET, 0);
        lab.passed(&lab.from(CLIENT, WORLD, UDP, &wire::udp(THERE, b"?")));
        let ip = wire::ip(F::addr(CLIENT), F::addr(WORLD), UDP, &wire::udp(THERE, b"?"));
        lab.received(&lab.to(OTHER + 100, CLIENT, F::ICMP, &unreachable::<N, F>(&ip)));
        let ping = wire::icmp(F::ECHO[0], 0, [1, 2, 0, 1], b"ping");
        lab.passed(&lab.from(CLIENT, WORLD, F::ICMP, &ping));
        let ip = wire::ip(F::addr(CLIENT), F::addr(WORLD), F::ICMP, &ping);
        lab.received(&lab.to(OTHER + 100, CLIENT, F::ICMP, &unreachable::<N, F>(&ip)));
        let reply = wire::ip(F::addr(WORLD), F::addr(CLIENT), TCP, &wire::tcp(BACK, ACK, b""));
        lab.kept_out(&lab.to(WORLD, CLIENT, F::ICMP, &unreachable::<N, F>(&reply)), Reason::IcmpUnrelated);
    }
}
