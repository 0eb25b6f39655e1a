//! Fragments: ports come from the first one, and nothing is judged by guess.

use hachi_abi::{Reason, proto};
use hachi_datapath::Outcome;

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, Lab, Net, OTHER, PORT, REMOTE, SERVER, SERVICE, SERVICE_PORT, SET,
        TCP, UDP, UPLINK, WORLD, both_families,
    },
    wire::{self, SYN, View},
};

/// A fragment: its share of the body from `offset` on.
pub(crate) fn fragment<const N: usize, F: Net<N>>(
    (from, to): (u8, u8),
    number: u8,
    id: u8,
    offset: usize,
    more: bool,
    body: &[u8],
) -> Vec<u8> {
    let units = u16::try_from(offset / 8).expect("short");
    let (src, dst) = (F::addr(from), F::addr(to));
    if N == 4 {
        let word = (units | if more { 0x2000 } else { 0 }).to_be_bytes();
        let header = wire::header_v4(
            &src,
            &dst,
            number,
            [0, id, word[0], word[1]],
            64,
            &[],
            body.len(),
        );
        [header, body.to_vec()].concat()
    } else {
        let word = (units << 3 | u16::from(more)).to_be_bytes();
        let extension = [number, 0, word[0], word[1], 0, 0, 0, id];
        let header = wire::header(src, dst, 44, 64, 8 + body.len());
        [&header[..], &extension[..], body].concat()
    }
}

/// A datagram in two fragments.
pub(crate) fn halves<const N: usize, F: Net<N>>(
    from: u8,
    to: u8,
    number: u8,
    body: &[u8],
    at: usize,
) -> (Vec<u8>, Vec<u8>) {
    // With the checksum of the whole.
    let whole = wire::ip(F::addr(from), F::addr(to), number, body);
    let body = &whole[F::HEADER..];
    (
        fragment::<N, F>((from, to), number, 9, 0, true, &body[..at]),
        fragment::<N, F>((from, to), number, 9, at, false, &body[at..]),
    )
}

/// The transport header and data of two fragments, put together.
fn joined(first: &View, later: &View) -> Vec<u8> {
    [first.body(), later.body()].concat()
}

both_families! {
    /// Later fragments follow the first one through a Service, and the datagram that is put
    /// together at the other end has a right checksum.
    fn a_fragmented_datagram_through_a_service(lab) {
        lab.serve(SERVICE, UDP, &[SERVER]);
        let body = wire::udp((CLIENT_PORT, SERVICE_PORT), &(0..100).collect::<Vec<u8>>());
        let (first, later) = halves::<N, F>(CLIENT, SERVICE, UDP, &body, 56);
        let later = lab.frame(CLIENT, &later);
        lab.refused(&later, Reason::FragmentUnknown);
        let first = lab.delivered(&lab.frame(CLIENT, &first), SERVER);
        let later = lab.delivered(&later, SERVER);
        assert_eq!(first.ports(), (CLIENT_PORT, PORT));
        assert_eq!((&later.src, &later.dst), (&first.src, &first.dst));
        let whole = joined(&first, &later);
        assert_eq!(wire::transport_sum(&first.src, &first.dst, UDP, &whole), 0xffff);

        let body = wire::udp((PORT, CLIENT_PORT), &(0..100).collect::<Vec<u8>>());
        let (first, later) = halves::<N, F>(SERVER, CLIENT, UDP, &body, 56);
        let first = lab.delivered(&lab.frame(SERVER, &first), CLIENT);
        let later = lab.delivered(&lab.frame(SERVER, &later), CLIENT);
        assert_eq!((&first.src[..], &later.src[..]), (&F::addr(SERVICE)[..], &F::addr(SERVICE)[..]));
        let whole = joined(&first, &later);
        assert_eq!(wire::transport_sum(&first.src, &first.dst, UDP, &whole), 0xffff);
    }

    /// All fragments of a denied datagram are dropped.
    fn a_denied_datagram_has_no_fragment_that_passes(lab) {
        lab.isolate(SERVER, SET, 0);
        lab.allow(SET, CLIENT, UDP, PORT);
        let body = wire::udp((CLIENT_PORT, PORT + 1), &[1; 64]);
        let (first, later) = halves::<N, F>(CLIENT, SERVER, UDP, &body, 16);
        lab.refused(&lab.frame(CLIENT, &first), Reason::PolicyIngress);
        lab.refused(&lab.frame(CLIENT, &later), Reason::PolicyIngress);
        let (first, later) = halves::<N, F>(REMOTE, SERVER, UDP, &body, 16);
        let stack = |ip: &[u8]| wire::Frame::new([2, 0, 0, 0, 2, SERVER], u32::from(SERVER) + 10, F::ETHERTYPE, ip);
        lab.kept_out(&stack(&later), Reason::FragmentUnknown);
        lab.kept_out(&stack(&first), Reason::PolicyIngress);
        lab.kept_out(&stack(&later), Reason::PolicyIngress);
    }

    /// A first fragment must hold the whole transport header (RFC 1858), a later one must not
    /// reach into it (RFC 3128).
    fn headers_are_not_split(lab) {
        let shortest = [(TCP, 20), (UDP, 8), (proto::SCTP, 12), (F::ICMP, 8)];
        for (number, shortest) in shortest {
            let body = match number {
                TCP => wire::tcp((1, PORT), SYN, &[0; 40]),
                UDP => wire::udp((1, PORT), &[0; 40]),
                proto::SCTP => [wire::sctp((1, PORT), b""), vec![0; 40]].concat(),
                _ => wire::icmp(F::ECHO[0], 0, [0; 4], &[0; 40]),
            };
            for length in 0..40 {
                let ip = fragment::<N, F>((CLIENT, SERVER), number, 1, 0, true, &body[..length]);
                let reason = lab.send(&lab.frame(CLIENT, &ip)).0.reason();
                let expected = if length < shortest { Reason::Malformed } else { Reason::DeliveredLocal };
                assert_eq!(reason, expected, "{number} {length}");
            }
            for offset in [8, 16, 24] {
                let ip = fragment::<N, F>((CLIENT, SERVER), number, 1, offset, false, &[0; 16]);
                let reason = lab.send(&lab.frame(CLIENT, &ip)).0.reason();
                let expected = if offset < shortest { Reason::Malformed } else { Reason::DeliveredLocal };
                assert_eq!(reason, expected, "{number} {offset}");
            }
        }
    }

    /// Nobody says for another which datagram its fragments are of.
    fn a_forged_first_fragment_is_not_noted(lab) {
        let body = wire::udp((CLIENT_PORT, PORT), &[1; 64]);
        let (first, later) = halves::<N, F>(CLIENT, SERVER, UDP, &body, 16);
        lab.refused(&lab.frame(OTHER, &first), Reason::SpoofedSource);
        let outside = wire::Frame::new([2, 0, 0, 0, 3, WORLD], UPLINK, F::ETHERTYPE, &first);
        assert_eq!(lab.arrive(&outside).0, Outcome::Drop(Reason::SpoofedSource));
        assert!(lab.tables.fragments.borrow().is_empty());
        lab.refused(&lab.frame(CLIENT, &later), Reason::FragmentUnknown);
        lab.delivered(&lab.frame(CLIENT, &first), SERVER);
        lab.delivered(&lab.frame(CLIENT, &later), SERVER);
    }

    /// Identifications, addresses and protocols are told apart.
    fn datagrams_are_told_apart(lab) {
        let body = wire::udp((CLIENT_PORT, PORT), &[1; 64]);
        let first = fragment::<N, F>((CLIENT, SERVER), UDP, 1, 0, true, &body[..16]);
        lab.delivered(&lab.frame(CLIENT, &first), SERVER);
        for (ends, number, id) in [((CLIENT, SERVER), UDP, 2), ((CLIENT, REMOTE), UDP, 1), ((CLIENT, SERVER), 47, 1)] {
            let later = fragment::<N, F>(ends, number, id, 16, false, &body[16..]);
            lab.refused(&lab.frame(CLIENT, &later), Reason::FragmentUnknown);
        }
    }
}

/// A fragment that is the whole datagram (RFC 6946) is no fragment.
#[test]
fn atomic_fragments_are_whole() {
    let mut lab = Lab::<16, hachi_datapath::V6>::new();
    let body = wire::ip(
        hachi_datapath::V6::addr(CLIENT),
        hachi_datapath::V6::addr(SERVER),
        TCP,
        &wire::tcp((CLIENT_PORT, PORT), SYN, b""),
    );
    let ip = fragment::<16, hachi_datapath::V6>((CLIENT, SERVER), TCP, 1, 0, false, &body[40..]);
    let (outcome, _) = lab.send(&lab.frame(CLIENT, &ip));
    assert_eq!(outcome.reason(), Reason::DeliveredLocal);
    assert!(lab.tables.fragments.borrow().is_empty());
}
