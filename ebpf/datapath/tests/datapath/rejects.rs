//! What a Service without a backend answers.

use hachi_abi::{Reason, proto};
use hachi_datapath::Outcome;

use crate::{
    lab::{CLIENT, CLIENT_PORT, Lab, Net, SERVICE, SERVICE_PORT, TCP, UDP, both_families, mac},
    wire::{self, ACK, FIN, Frame, RST, SYN, View},
};

const OUT: (u16, u16) = (CLIENT_PORT, SERVICE_PORT);

/// The answer, all checksums right, addressed to the Pod that asked.
fn answer<const N: usize, F: Net<N>>(lab: &mut Lab<N, F>, frame: &Frame) -> View {
    let (outcome, after) = lab.send(frame);
    assert_eq!(outcome, Outcome::Answer);
    let view = after.check_answer();
    assert_eq!(view.macs[..6], mac(CLIENT));
    assert_eq!(
        (&view.src[..], &view.dst[..]),
        (&F::addr(SERVICE)[..], &F::addr(CLIENT)[..])
    );
    view
}

both_families! {
    /// RFC 9293 section 3.10.7.1: what a closed port answers.
    fn tcp_is_reset(lab) {
        lab.serve(SERVICE, TCP, &[]);
        // Sequence 1000, acknowledgement 2000 (see `wire::tcp`), four bytes of data.
        for (flags, sequence, acknowledgement, answered) in [
            (SYN, 0_u32, 1005_u32, RST | ACK),
            (SYN | FIN, 0, 1006, RST | ACK),
            (ACK, 2000, 0, RST),
            (FIN | ACK, 2000, 0, RST),
        ] {
            let syn = lab.tcp(CLIENT, SERVICE, OUT, flags);
            for frame in [syn.clone(), syn.partial()] {
                let view = answer(lab, &frame);
                let tcp = view.body();
                assert_eq!(view.ports(), (SERVICE_PORT, CLIENT_PORT));
                assert_eq!(tcp.len(), 20);
                assert_eq!(tcp[4..8], sequence.to_be_bytes());
                assert_eq!(tcp[8..12], acknowledgement.to_be_bytes());
                assert_eq!(tcp[13], answered);
            }
        }
        assert_eq!(lab.tracked(), 0);
    }

    /// Nothing answers a reset.
    fn a_reset_is_not_answered(lab) {
        lab.serve(SERVICE, TCP, &[]);
        lab.refused(&lab.tcp(CLIENT, SERVICE, OUT, RST), Reason::NoBackend);
        lab.refused(&lab.tcp(CLIENT, SERVICE, OUT, RST | ACK), Reason::NoBackend);
    }

    /// "Port unreachable", quoting the packet as the Pod has sent it.
    fn datagrams_are_unreachable(lab) {
        for (proto, body) in [
            (UDP, wire::udp(OUT, b"")),
            (UDP, wire::udp(OUT, &[7; 1400])),
            (proto::SCTP, wire::sctp(OUT, b"")),
        ] {
            lab.serve(SERVICE, proto, &[]);
            let frame = lab.from(CLIENT, SERVICE, proto, &body);
            let view = answer(lab, &frame);
            assert_eq!(view.number, F::ICMP);
            let icmp = view.body();
            assert_eq!(icmp[..2], F::PORT_UNREACHABLE);
            assert_eq!(icmp[8..], frame.bytes[14..14 + F::HEADER + 8]);
        }
    }

    /// A fragment is not answered: the datagram is dropped.
    fn fragments_are_not_answered(lab) {
        lab.serve(SERVICE, UDP, &[]);
        let (first, later) = crate::fragments::halves::<N, F>(CLIENT, SERVICE, UDP, &wire::udp(OUT, &[1; 32]), 16);
        lab.refused(&lab.frame(CLIENT, &first), Reason::NoBackend);
        lab.refused(&lab.frame(CLIENT, &later), Reason::NoBackend);
    }
}
