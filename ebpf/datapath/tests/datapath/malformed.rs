//! Packets that are cut short or contradict themselves, extended ones, and bytes of no meaning.

use hachi_abi::{Reason, proto};
use hachi_datapath::{V4, V6};
use proptest::prelude::*;

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, Lab, NODE, Net, PORT, REMOTE, SERVER, SERVICE, SERVICE_PORT, SET, TCP,
        UDP, both_families,
    },
    wire::{self, ACK, SYN},
};

/// One packet of each kind.
fn samples<const N: usize, F: Net<N>>() -> Vec<(u8, Vec<u8>)> {
    let quote = wire::ip(
        F::addr(SERVER),
        F::addr(CLIENT),
        TCP,
        &wire::tcp((1, 2), ACK, b""),
    );
    let [kind, code] = F::PORT_UNREACHABLE;
    vec![
        (TCP, wire::tcp((CLIENT_PORT, SERVICE_PORT), SYN, b"data")),
        (UDP, wire::udp((CLIENT_PORT, SERVICE_PORT), b"data")),
        (proto::SCTP, wire::sctp((CLIENT_PORT, PORT), b"")),
        (F::ICMP, wire::icmp(F::ECHO[0], 0, [1, 2, 3, 4], b"ping")),
        (F::ICMP, wire::icmp(kind, code, [0; 4], &quote)),
    ]
}

both_families! {
    /// Wherever a packet is cut, it is dropped.
    fn a_packet_cut_short_is_dropped(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        lab.serve(SERVICE, UDP, &[SERVER]);
        for (proto, body) in samples::<N, F>() {
            for to in [SERVER, REMOTE, SERVICE] {
                let frame = lab.from(CLIENT, to, proto, &body);
                for length in 0..frame.bytes.len() {
                    let mut cut = frame.clone();
                    cut.bytes.truncate(length);
                    lab.refused(&cut, Reason::Malformed);
                }
            }
            let frame = lab.to(REMOTE, SERVER, proto, &body);
            for length in 0..frame.bytes.len() {
                let mut cut = frame.clone();
                cut.bytes.truncate(length);
                lab.kept_out(&cut, Reason::Malformed);
            }
        }
        assert_eq!(lab.tracked(), 0);
    }

    /// An IP length that ends within the transport header, however many bytes follow.
    fn a_length_that_cuts_the_header_is_dropped(lab) {
        for (proto, body) in samples::<N, F>() {
            let least = match proto { TCP => 20, proto::SCTP => 12, _ => 8 };
            for length in 0..least {
                let header = wire::header(F::addr(CLIENT), F::addr(SERVER), proto, 64, length);
                lab.refused(&lab.frame(CLIENT, &[&header[..], &body].concat()), Reason::Malformed);
            }
        }
    }

    /// Bytes behind the packet's own length (Ethernet padding) do no harm.
    fn padding_is_no_harm(lab) {
        lab.serve(SERVICE, TCP, &[SERVER]);
        let mut frame = lab.tcp(CLIENT, SERVICE, (CLIENT_PORT, SERVICE_PORT), SYN);
        frame.bytes.extend([0xee; 20]);
        assert_eq!(lab.send(&frame).0.reason(), Reason::DeliveredLocal);
    }

    /// A version that does not fit, a header length below the least.
    fn a_contradiction_is_dropped(lab) {
        let frame = lab.tcp(CLIENT, SERVER, (CLIENT_PORT, PORT), SYN);
        for first in 0..=255_u8 {
            let mut bad = frame.clone();
            bad.bytes[14] = first;
            let reason = lab.send(&bad).0.reason();
            // A longer IPv4 header takes the segment's first bytes for options.
            let fits = first >> 4 == if N == 4 { 4 } else { 6 } && (N == 16 || first & 15 >= 5);
            assert!(fits || reason == Reason::Malformed, "{first:#x}: {reason:?}");
            let same = first == if N == 4 { 0x45 } else { 0x60 };
            assert!(!same || reason == Reason::DeliveredLocal, "{reason:?}");
        }
        let mut short = frame;
        short.bytes[14 + F::HEADER + 12] = 0x40;
        lab.refused(&short, Reason::Malformed);
    }
}

/// IPv4 options stand before the ports, and are stepped over.
#[test]
fn ipv4_options_are_stepped_over() {
    let mut lab = Lab::<4, V4>::new();
    lab.serve(SERVICE, TCP, &[SERVER]);
    lab.allow(SET, CLIENT, TCP, PORT);
    lab.isolate(SERVER, SET, 0);
    let plain = wire::ip(
        V4::addr(CLIENT),
        V4::addr(SERVICE),
        TCP,
        &wire::tcp((CLIENT_PORT, SERVICE_PORT), SYN, b""),
    );
    for words in 1..=10 {
        let options = vec![1; words * 4];
        let body = &plain[20..];
        let (src, dst) = (V4::addr(CLIENT), V4::addr(SERVICE));
        let header = wire::header_v4(&src, &dst, TCP, [0; 4], 64, &options, body.len());
        let frame = lab.frame(CLIENT, &[&header[..], body].concat());
        let seen = lab.delivered(&frame, SERVER);
        assert_eq!(seen.ports(), (CLIENT_PORT, PORT));
    }
}

/// A source route would have the packet go on to where nobody judged it.
#[test]
fn ipv4_source_routes_are_refused() {
    let mut lab = Lab::<4, V4>::new();
    let tcp = wire::tcp((CLIENT_PORT, PORT), SYN, b"");
    let mut send = |options: &[u8]| {
        let (src, dst) = (V4::addr(CLIENT), V4::addr(SERVER));
        let header = wire::header_v4(&src, &dst, TCP, [0; 4], 64, options, tcp.len());
        let frame = lab.frame(CLIENT, &[&header[..], &tcp].concat());
        let kept = lab.receive(&frame).0.reason();
        let reason = lab.send(&frame).0.reason();
        assert!(
            reason == Reason::DeliveredLocal || kept == reason,
            "{kept:?}"
        );
        reason
    };
    for kind in [131, 137] {
        let route = [kind, 7, 4, 10, 0, 0, 9, 0];
        for before in [
            &[][..],
            &[1; 32],
            &[222, 4, 0, 0],
            &[1, 222, 2, 1],
            &[222, 32].repeat(16),
        ] {
            let options = [before, &route].concat();
            assert_eq!(send(&options), Reason::UnsupportedHeader, "{options:?}");
        }
    }
    for other in [&[1; 40][..], &[7, 7, 4, 0, 0, 0, 0, 0], &[148, 4, 0, 0]] {
        assert_eq!(send(other), Reason::DeliveredLocal, "{other:?}");
    }
}

/// IPv6 extension headers: options are stepped over, what would lead elsewhere is refused.
#[test]
fn ipv6_extension_headers() {
    let mut lab = Lab::<16, V6>::new();
    lab.allow(SET, CLIENT, TCP, PORT);
    lab.isolate(SERVER, SET, 0);
    let tcp = wire::tcp((CLIENT_PORT, PORT), SYN, b"");
    let mut send = |first: u8, chain: &[u8]| {
        let body = [chain, &tcp].concat();
        let header = wire::header(V6::addr(CLIENT), V6::addr(SERVER), first, 64, body.len());
        let frame = lab.frame(CLIENT, &[header, body].concat());
        lab.send(&frame).0.reason()
    };
    let options = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
    let long = |next: u8| [&[next, 3, 1, 28][..], &[0; 28]].concat();
    assert_eq!(send(0, &options(TCP)), Reason::DeliveredLocal);
    assert_eq!(send(60, &options(TCP)), Reason::DeliveredLocal);
    assert_eq!(
        send(0, &[&options(60)[..], &long(TCP)].concat()),
        Reason::DeliveredLocal
    );
    // Routing headers, hop-by-hop options that are not first, endless chains, a fragment within a
    // fragment, options behind a first fragment.
    assert_eq!(send(43, &options(TCP)), Reason::UnsupportedHeader);
    assert_eq!(
        send(60, &[options(0), options(TCP)].concat()),
        Reason::UnsupportedHeader
    );
    assert_eq!(
        send(60, &[options(60); 8].concat()),
        Reason::UnsupportedHeader
    );
    let first = |next: u8| [next, 0, 0, 1, 0, 0, 0, 1];
    assert_eq!(
        send(44, &[first(44), first(TCP)].concat()),
        Reason::UnsupportedHeader
    );
    assert_eq!(
        send(44, &[first(60), options(TCP)].concat()),
        Reason::UnsupportedHeader
    );
    // An authentication header is judged as the protocol that it is.
    assert_eq!(send(51, &[TCP, 4, 0, 0, 0, 0, 0, 0]), Reason::PolicyIngress);
    // Longer than the packet.
    assert_eq!(send(60, &[TCP, 200, 1, 4, 0, 0, 0, 0]), Reason::Malformed);
}

fn random<const N: usize, F: Net<N>>(noise: &[u8], edits: &[(usize, u8)], cut: usize) {
    let mut lab = Lab::<N, F>::new();
    lab.serve(SERVICE, TCP, &[SERVER, REMOTE]);
    lab.serve(SERVICE, UDP, &[]);
    lab.isolate(SERVER, SET, SET);
    let raw = lab.frame(CLIENT, noise);
    lab.send(&raw);
    lab.receive(&raw);
    for (proto, body) in samples::<N, F>() {
        for to in [SERVER, SERVICE, REMOTE, NODE] {
            let mut frame = lab.from(CLIENT, to, proto, &body);
            for (at, byte) in edits {
                let at = at % frame.bytes.len();
                frame.bytes[at] = *byte;
            }
            frame.bytes.truncate(frame.bytes.len() - cut);
            lab.send(&frame);
            lab.receive(&frame);
        }
    }
    // Whatever came, nothing opened a flow to the Pod that allows nothing.
    let flows = lab.tables.flows.borrow();
    let opened = flows.iter().any(|(tuple, entry)| {
        entry.flags & 1 == 0
            && tuple.dst == F::addr(SERVER)
            && tuple.src != F::addr(NODE)
            && tuple.src != F::addr(SERVER)
    });
    assert!(!opened, "{flows:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// No bytes make the datapath panic, and none get past a policy.
    #[test]
    fn noise_is_harmless(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        edits in prop::collection::vec((any::<usize>(), any::<u8>()), 0..4),
        cut in 0..24_usize,
    ) {
        random::<4, V4>(&noise, &edits, cut);
        random::<16, V6>(&noise, &edits, cut);
    }
}
