//! Fragments: the first carries the ports, the later ones are judged by it.

use hachi_abi::Reason;

use crate::{
    lab::{CLASS_CLIENT, Lab, Net, PORT, SET, both_families, udp},
    wire::{self, UDP},
};

/// A fragment of a datagram from client to server: its offset in units of eight bytes, whether
/// more follow, and its share of the body.
fn fragment(lab: &Lab, id: u16, offset: u16, more: bool, body: &[u8]) -> Vec<u8> {
    let whole = lab.packet(lab.client, lab.server.ip, udp((1, PORT)));
    let (source, destination) = (whole.source, whole.destination);
    let ip = match lab.net {
        Net::V4 => {
            let word = offset | if more { 0x2000 } else { 0 };
            let [a, b] = id.to_be_bytes();
            let [c, d] = word.to_be_bytes();
            wire::ipv4(source, destination, UDP, [a, b, c, d], &[], body)
        }
        Net::V6 => {
            const FRAGMENT: u8 = 44;
            let mut header = vec![UDP, 0];
            header.extend_from_slice(&((offset << 3) | u16::from(more)).to_be_bytes());
            header.extend_from_slice(&u32::from(id).to_be_bytes());
            header.extend_from_slice(body);
            wire::ip(source, destination, FRAGMENT, &header)
        }
    };
    [whole.ethernet(), ip].concat()
}

/// The first eight and the next bytes of a datagram to a port.
fn halves(lab: &Lab, port: u16) -> (Vec<u8>, Vec<u8>) {
    let body = wire::Body::Udp {
        ports: (1, port),
        data: vec![7; 24],
    };
    let mut first = lab.packet(lab.client, lab.server.ip, body).body_bytes();
    let second = first.split_off(16);
    (first, second)
}

both_families! {
    /// The later fragments of an allowed datagram follow the first; a stranger's do not.
    fn later_fragments_follow_the_first(lab) {
        lab.allow(SET, CLASS_CLIENT, UDP, PORT);
        lab.isolate(lab.server, SET, 0);
        let (first, second) = halves(lab, PORT);
        let later = fragment(lab, 7, 2, false, &second);
        lab.send(lab.client, &later).dropped(Reason::FragmentUnknown);
        let outcome = lab.send(lab.client, &fragment(lab, 7, 0, true, &first));
        assert_eq!(outcome.reason, Reason::DeliveredLocal);
        assert_eq!(lab.send(lab.client, &later).reason, Reason::DeliveredLocal);
        let stranger = fragment(lab, 8, 2, false, &second);
        lab.send(lab.client, &stranger).dropped(Reason::FragmentUnknown);
    }

    /// A datagram that is denied is denied in every fragment.
    fn a_denied_datagram_has_no_fragment_that_passes(lab) {
        lab.allow(SET, CLASS_CLIENT, UDP, PORT);
        lab.isolate(lab.server, SET, 0);
        let (first, second) = halves(lab, PORT + 1);
        lab.send(lab.client, &fragment(lab, 7, 0, true, &first)).dropped(Reason::PolicyIngress);
        let outcome = lab.send(lab.client, &fragment(lab, 7, 2, false, &second));
        assert!(outcome.reason.is_drop(), "{outcome:?}");
    }

    /// A first fragment too short for the ports says nothing about them.
    fn a_tiny_first_fragment_is_dropped(lab) {
        let (first, _) = halves(lab, PORT);
        let outcome = lab.send(lab.client, &fragment(lab, 7, 0, true, &first[..2]));
        outcome.dropped(Reason::Malformed);
    }
}
