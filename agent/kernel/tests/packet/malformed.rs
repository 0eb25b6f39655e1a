//! Packets that are cut short or contradict themselves, and bytes of no meaning at all.

use hachi_abi::Reason;

use crate::{
    lab::{Net, PORT, both_families, syn, udp},
    wire::{self, ETHERNET, TCP, UDP},
};

both_families! {
    /// Wherever a packet is cut, it is dropped.
    fn a_packet_cut_short_is_dropped(lab) {
        for body in [syn(PORT), udp((1, 2))] {
            let out = lab.packet(lab.client, lab.server.ip, body.clone()).bytes();
            let into = lab.packet_to(lab.remote, lab.server, body).bytes();
            // BPF_PROG_TEST_RUN refuses frames that end within the IP header (since 6.18).
            let header = if lab.net == Net::V4 { 20 } else { 40 };
            for length in ETHERNET + header..out.len() {
                let outcome = lab.send(lab.client, &out[..length]);
                assert!(outcome.reason.is_drop(), "{length} of {}: {outcome:?}", out.len());
                let outcome = lab.receive(lab.server, &into[..length]);
                assert!(outcome.reason.is_drop(), "{length} of {}: {outcome:?}", into.len());
            }
        }
        assert!(lab.datapath.conntrack().expect("the flows").is_empty());
    }

    /// Bytes behind the IP packet's own length (Ethernet padding) do no harm.
    fn padding_is_no_harm(lab) {
        let mut out = lab.packet(lab.client, lab.server.ip, syn(PORT)).bytes();
        out.resize(out.len() + 20, 0xee);
        let outcome = lab.send(lab.client, &out);
        assert_eq!(outcome.reason, Reason::DeliveredLocal);
    }

    /// A version that does not fit the link's type, a header length below the minimum.
    fn a_header_that_contradicts_itself_is_dropped(lab) {
        let packet = lab.packet(lab.client, lab.server.ip, syn(PORT)).bytes();
        let mut firsts = vec![0x00, 0x55, 0xf5];
        firsts.extend(match lab.net {
            Net::V4 => vec![0x65, 0x40, 0x44],
            Net::V6 => vec![0x45, 0x40],
        });
        for first in firsts {
            let mut bad = packet.clone();
            bad[ETHERNET] = first;
            lab.send(lab.client, &bad).dropped(Reason::Malformed);
        }
    }

    /// IPv4 options, and IPv6 extension headers, stand before the ports.
    fn options_are_stepped_over(lab) {
        let inner = lab.packet(lab.client, lab.server.ip, syn(PORT));
        let body = inner.body_bytes();
        let (source, destination) = (inner.source, inner.destination);
        let (good, bad) = match lab.net {
            Net::V4 => {
                let options = |words: usize| {
                    wire::ipv4(source, destination, TCP, [0; 4], &vec![1; words * 4], &body)
                };
                (options(10), None)
            }
            Net::V6 => {
                // Hop-by-hop, then destination options, eight bytes each.
                let header = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
                let chain = [&header(60)[..], &header(TCP)[..], &body[..]].concat();
                let endless = [header(0).repeat(40), body.clone()].concat();
                (
                    wire::ip(source, destination, 0, &chain),
                    Some(wire::ip(source, destination, 0, &endless)),
                )
            }
        };
        lab.allow(crate::lab::SET, crate::lab::CLASS_CLIENT, TCP, PORT);
        lab.isolate(lab.server, crate::lab::SET, 0);
        let frame = |ip: Vec<u8>| [inner.ethernet(), ip].concat();
        let outcome = lab.send(lab.client, &frame(good));
        assert_eq!(outcome.reason, Reason::DeliveredLocal);
        if let Some(bad) = bad {
            lab.send(lab.client, &frame(bad)).dropped(Reason::UnsupportedHeader);
        }
    }

    /// Whatever the bytes are, one counter rises and the verdict fits it (see `Lab::send`).
    fn noise_is_judged_like_anything_else(lab) {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            // xorshift64*, by Vigna (2016).
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            u8::try_from(state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56).expect("eight bits")
        };
        let templates = [
            lab.packet(lab.client, lab.server.ip, syn(PORT)),
            lab.packet(lab.client, lab.remote, udp((1, 2))),
        ];
        let into = lab.packet_to(lab.remote, lab.server, syn(PORT)).bytes();
        // The bytes are the same on every kernel; a guest that is translated does with fewer.
        let rounds = if hachi_testutil::in_guest() { 200_usize } else { 2000 };
        for round in 0..rounds {
            let mut packet = templates[round % 2].bytes();
            for _ in 0..=random() % 4 {
                let at = ETHERNET + usize::from(random()) % (packet.len() - ETHERNET);
                packet[at] = random();
            }
            packet.truncate(packet.len() - usize::from(random() % 8));
            lab.send(lab.client, &packet);
            let mut packet = into.clone();
            let at = ETHERNET + usize::from(random()) % (packet.len() - ETHERNET);
            packet[at] = random();
            lab.receive(lab.server, &packet);
        }
    }

    /// A datagram's own length is no business of the datapath, as long as its header is there.
    fn a_udp_header_must_be_whole(lab) {
        let packet = lab.packet(lab.client, lab.server.ip, udp((1, 2)));
        for length in 0..8 {
            let ip = wire::ip(packet.source, packet.destination, UDP, &packet.body_bytes()[..length]);
            let outcome = lab.send(lab.client, &[packet.ethernet(), ip].concat());
            outcome.dropped(Reason::Malformed);
        }
    }
}
