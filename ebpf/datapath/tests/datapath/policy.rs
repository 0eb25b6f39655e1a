//! Verdicts: precedence, classes, both sides, exemptions.

use hachi_abi::{Peer, Reason, SHAPE_ANY_PROTO, Verdict, proto};

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, Lab, NODE, PORT, REMOTE, SERVER, SET, TCP, UDP, WORLD, both_families,
        class,
    },
    wire::{self, SYN},
};

const THERE: (u16, u16) = (CLIENT_PORT, PORT);

both_families! {
    /// Both the sender and the receiver must allow.
    fn both_sides_are_asked(lab) {
        lab.isolate(CLIENT, 0, SET);
        lab.isolate(SERVER, SET + 1, 0);
        let syn = lab.tcp(CLIENT, SERVER, THERE, SYN);
        lab.refused(&syn, Reason::PolicyEgress);
        lab.allow(SET, SERVER, TCP, PORT);
        lab.refused(&syn, Reason::PolicyIngress);
        assert_eq!(lab.tracked(), 0);
        lab.allow(SET + 1, CLIENT, TCP, PORT);
        lab.delivered(&syn, SERVER);
        lab.refused(&lab.tcp(CLIENT, SERVER, (CLIENT_PORT, PORT + 1), SYN), Reason::PolicyEgress);
        lab.refused(&lab.from(CLIENT, SERVER, UDP, &wire::udp(THERE, b"")), Reason::PolicyEgress);
    }

    /// The longest prefix decides, then any protocol, then nothing: deny.
    fn the_longest_prefix_decides(lab) {
        lab.isolate(SERVER, SET, 0);
        let mut verdict = |entries: &[(u8, u16, u8, Verdict)], port: u16| {
            lab.tables.policy.clear();
            for (proto, prefix, plen, verdict) in entries {
                lab.entry(SET, class(CLIENT), *proto, *prefix, *plen, *verdict);
            }
            let (outcome, _) = lab.send(&lab.tcp(CLIENT, SERVER, (CLIENT_PORT, port), SYN));
            !outcome.reason().is_drop()
        };
        use Verdict::{Allow, Deny};
        assert!(!verdict(&[], 80));
        assert!(verdict(&[(0, 0, 0, Allow)], 80));
        assert!(verdict(&[(TCP, 0, 0, Allow)], 80));
        assert!(!verdict(&[(UDP, 0, 0, Allow)], 80));
        assert!(!verdict(&[(TCP, 0, 0, Deny), (0, 0, 0, Allow)], 80));
        assert!(verdict(&[(TCP, 80, 16, Allow), (TCP, 0, 0, Deny)], 80));
        assert!(!verdict(&[(TCP, 80, 16, Allow), (TCP, 0, 0, Deny)], 81));
        // 0x1f80/9 is 8064 to 8191.
        for (port, allowed) in [(8063, false), (8064, true), (8191, true), (8192, false)] {
            assert_eq!(verdict(&[(TCP, 0x1f80, 9, Allow)], port), allowed, "{port}");
        }
        for plen in 0..=16_u8 {
            let prefix = (0xffff_0000_u32 >> plen) as u16 & 0xabcd;
            assert!(verdict(&[(TCP, prefix, plen, Allow)], 0xabcd), "{plen}");
        }
    }

    /// Kinds of entry that the endpoint does not announce are not looked up.
    fn shapes_name_what_there_is(lab) {
        lab.isolate(SERVER, SET, 0);
        lab.allow(SET, CLIENT, TCP, PORT);
        lab.entry(SET, class(CLIENT), 0, 0, 0, Verdict::Allow);
        let syn = lab.tcp(CLIENT, SERVER, THERE, SYN);
        for (shapes, allowed) in [(0, false), (1 << 16, true), (1 << SHAPE_ANY_PROTO, true), (1 << 15, false)] {
            let endpoint = lab.tables.endpoints.get_mut(&F::addr(SERVER)).expect("a Pod");
            endpoint.ingress_shapes = shapes;
            assert_eq!(!lab.send(&syn).0.reason().is_drop(), allowed, "{shapes:#x}");
        }
    }

    /// An address of its own before blocks, longer blocks before shorter ones, else the world.
    fn classes_are_found(lab) {
        lab.isolate(CLIENT, 0, SET);
        let reached = |lab: &mut Lab<N, F>, class: u32| {
            lab.tables.policy.clear();
            lab.entry(SET, class, TCP, PORT, 16, Verdict::Allow);
            !lab.send(&lab.tcp(CLIENT, WORLD, THERE, SYN)).0.reason().is_drop()
        };
        assert!(reached(lab, 0));
        let peer = |class| Peer { class, flags: 0 };
        lab.tables.blocks.push((F::addr(0), N * 8 - 8, peer(5)));
        assert!(reached(lab, 5) && !reached(lab, 0));
        lab.tables.blocks.push((F::addr(WORLD), N * 8, peer(6)));
        assert!(reached(lab, 6) && !reached(lab, 5));
        lab.tables.peers.insert(F::addr(WORLD), peer(8));
        assert!(reached(lab, 8) && !reached(lab, 6));
    }

    /// The node always reaches its Pods, they do not always reach it; a Pod reaches itself.
    fn the_node_and_the_pod_itself_are_exempt(lab) {
        lab.isolate(SERVER, SET, SET);
        lab.received(&lab.to(NODE, SERVER, TCP, &wire::tcp(THERE, SYN, b"")));
        lab.kept_out(&lab.to(REMOTE, SERVER, TCP, &wire::tcp(THERE, SYN, b"")), Reason::PolicyIngress);
        lab.refused(&lab.tcp(SERVER, NODE, THERE, SYN), Reason::PolicyEgress);
        lab.delivered(&lab.tcp(SERVER, SERVER, THERE, SYN), SERVER);
    }

    /// Other protocols have no port: an entry for any port or any protocol allows them.
    fn other_protocols_have_no_port(lab) {
        const GRE: u8 = 47;
        lab.isolate(SERVER, SET, 0);
        let frame = lab.from(CLIENT, SERVER, GRE, &[0; 12]);
        lab.entry(SET, class(CLIENT), TCP, 0, 0, Verdict::Allow);
        lab.refused(&frame, Reason::PolicyIngress);
        lab.entry(SET, class(CLIENT), 0, 0, 0, Verdict::Allow);
        lab.delivered(&frame, SERVER);
        lab.tables.policy.clear();
        lab.tables.revision += 1;
        // The identifier of an echo is no port.
        lab.allow(SET, CLIENT, F::ICMP, 0x1234);
        let echo = wire::icmp(F::ECHO[0], 0, [0x12, 0x34, 0, 1], b"ping");
        lab.refused(&lab.from(CLIENT, SERVER, F::ICMP, &echo), Reason::PolicyIngress);
        lab.allow(SET, CLIENT, proto::SCTP, PORT);
        lab.delivered(&lab.from(CLIENT, SERVER, proto::SCTP, &wire::sctp(THERE, b"")), SERVER);
    }
}
