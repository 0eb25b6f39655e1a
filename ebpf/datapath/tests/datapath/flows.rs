//! Tracked flows: replies, revisions, time, ends.

use hachi_abi::{CtFlags, REFRESH_OTHER, Reason, lifetime};

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, Lab, NODE, OTHER, PORT, REMOTE, SERVER, SET, TCP, UDP, WORLD,
        both_families,
    },
    wire::{self, ACK, FIN, RST, SYN},
};

const THERE: (u16, u16) = (CLIENT_PORT, PORT);
const BACK: (u16, u16) = (PORT, CLIENT_PORT);

both_families! {
    /// Between Pods of the node, to and from elsewhere: one lookup finds either direction.
    fn a_flow_is_tracked_in_both_directions(lab) {
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, SYN), SERVER);
        assert_eq!(lab.tracked(), 2);
        lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, SYN | ACK), CLIENT);
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, ACK), SERVER);
        assert_eq!(lab.tracked(), 2);
        let (there, back) = (Lab::<N, F>::tuple(CLIENT, SERVER, THERE), Lab::<N, F>::tuple(SERVER, CLIENT, BACK));
        assert_eq!(lab.flow(&there).expect("tracked").flags, 0);
        assert_eq!(lab.flow(&back).expect("tracked").flags, CtFlags::REPLY);
        lab.passed(&lab.tcp(CLIENT, WORLD, THERE, SYN));
        lab.received(&lab.to(WORLD, CLIENT, TCP, &wire::tcp(BACK, SYN | ACK, b"")));
        assert_eq!(lab.tracked(), 4);
    }

    /// A Pod that becomes isolated keeps the replies of its open flows, and gets no new ones.
    fn isolation_keeps_replies(lab) {
        lab.passed(&lab.tcp(CLIENT, REMOTE, THERE, SYN));
        lab.passed(&lab.from(CLIENT, REMOTE, UDP, &wire::udp(THERE, b"?")));
        lab.isolate(CLIENT, SET, 0);
        lab.received(&lab.to(REMOTE, CLIENT, TCP, &wire::tcp(BACK, SYN | ACK, b"")));
        lab.received(&lab.to(REMOTE, CLIENT, UDP, &wire::udp(BACK, b"!")));
        lab.kept_out(&lab.to(REMOTE, CLIENT, UDP, &wire::udp((PORT, 1), b"!")), Reason::PolicyIngress);
        lab.kept_out(&lab.to(REMOTE, CLIENT, TCP, &wire::tcp(BACK, SYN, b"")), Reason::PolicyIngress);
    }

    /// A raised revision has both directions judged as the opener was, and stores the answer.
    fn a_raised_revision_judges_the_opener(lab) {
        lab.allow(SET, CLIENT, TCP, PORT);
        lab.isolate(SERVER, SET, 0);
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, SYN), SERVER);
        lab.tables.policy.clear();
        // Not judged again yet: the revision is the same.
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, ACK), SERVER);
        lab.tables.revision += 1;
        for _ in 0..2 {
            lab.refused(&lab.tcp(CLIENT, SERVER, THERE, ACK), Reason::PolicyIngress);
            lab.refused(&lab.tcp(SERVER, CLIENT, BACK, ACK), Reason::PolicyIngress);
        }
        lab.allow(SET, CLIENT, TCP, PORT);
        lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, ACK), CLIENT);
        let entry = lab.flow(&Lab::<N, F>::tuple(SERVER, CLIENT, BACK)).expect("tracked");
        assert_eq!((entry.revision, entry.ingress_rule), (lab.tables.revision, u32::from(PORT)));
        // The client's own egress is asked too.
        lab.isolate(CLIENT, 0, SET + 1);
        lab.refused(&lab.tcp(SERVER, CLIENT, BACK, ACK), Reason::PolicyEgress);
    }

    /// A SYN is judged anew whatever is tracked; a denied one leaves what is tracked alone.
    fn a_syn_opens_afresh(lab) {
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, SYN), SERVER);
        lab.tables.policy.clear();
        let revision = lab.tables.revision;
        lab.isolate(SERVER, SET, 0);
        lab.tables.revision = revision;
        lab.refused(&lab.tcp(CLIENT, SERVER, THERE, SYN), Reason::PolicyIngress);
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, ACK), SERVER);
        // A SYN of the other side is a flow of its own.
        lab.isolate(CLIENT, SET, 0);
        lab.refused(&lab.tcp(SERVER, CLIENT, BACK, SYN), Reason::PolicyIngress);
    }

    /// FIN closes its direction, RST both; a SYN opens both again.
    fn ends_are_remembered(lab) {
        let closing = |lab: &Lab<N, F>| {
            [Lab::<N, F>::tuple(CLIENT, SERVER, THERE), Lab::<N, F>::tuple(SERVER, CLIENT, BACK)]
                .map(|tuple| lab.flow(&tuple).expect("tracked").flags & CtFlags::CLOSING != 0)
        };
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, SYN), SERVER);
        assert_eq!(closing(lab), [false, false]);
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, FIN | ACK), SERVER);
        assert_eq!(closing(lab), [true, false]);
        lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, ACK), CLIENT);
        assert_eq!(closing(lab), [true, false]);
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, SYN), SERVER);
        assert_eq!(closing(lab), [false, false]);
        lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, RST), CLIENT);
        assert_eq!(closing(lab), [true, true]);
    }

    /// The end of one direction is not forgotten by packets of the other, and both halves are
    /// noted often enough for whoever collects old ones.
    fn packets_of_one_direction_keep_the_other_half(lab) {
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, SYN), SERVER);
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, FIN | ACK), SERVER);
        for _ in 0..3 * REFRESH_OTHER {
            lab.wait(1);
            lab.delivered(&lab.tcp(SERVER, CLIENT, BACK, ACK), CLIENT);
            let there = lab.flow(&Lab::<N, F>::tuple(CLIENT, SERVER, THERE)).expect("tracked");
            assert_eq!(there.flags, CtFlags::CLOSING);
            assert!(lab.tables.now.get() - there.last_seen < REFRESH_OTHER, "{there:?}");
        }
    }

    /// An established packet writes nothing within a second; then it notes the time, and restores
    /// the other half if that was evicted.
    fn entries_are_refreshed_once_a_second(lab) {
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, SYN), SERVER);
        let writes = lab.tables.writes.get();
        for _ in 0..10 {
            lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, ACK), SERVER);
        }
        assert_eq!(lab.tables.writes.get(), writes);
        let back = Lab::<N, F>::tuple(SERVER, CLIENT, BACK);
        let old = lab.tables.flows.borrow_mut().remove(&back).expect("tracked");
        lab.wait(1);
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, ACK), SERVER);
        let new = lab.flow(&back).expect("restored");
        assert_eq!((new.flags, new.last_seen), (old.flags, old.last_seen + 1));
        assert_eq!(lab.tables.writes.get(), writes + 2);
    }

    /// A flow with packets one way only does not lose its other half to time.
    fn one_direction_keeps_both_halves_alive(lab) {
        lab.isolate(CLIENT, SET, 0);
        lab.passed(&lab.from(CLIENT, REMOTE, UDP, &wire::udp(THERE, b"?")));
        for _ in 0..1_000 {
            lab.wait(1);
            lab.passed(&lab.from(CLIENT, REMOTE, UDP, &wire::udp(THERE, b"?")));
        }
        lab.received(&lab.to(REMOTE, CLIENT, UDP, &wire::udp(BACK, b"!")));
    }

    /// A reply that comes too late is none.
    fn a_flow_ends_with_its_time(lab) {
        lab.isolate(CLIENT, SET, 0);
        lab.passed(&lab.from(CLIENT, REMOTE, UDP, &wire::udp(THERE, b"?")));
        lab.wait(lifetime(UDP, 0));
        lab.received(&lab.to(REMOTE, CLIENT, UDP, &wire::udp(BACK, b"!")));
        lab.wait(lifetime(UDP, 0) + 1);
        lab.kept_out(&lab.to(REMOTE, CLIENT, UDP, &wire::udp(BACK, b"!")), Reason::PolicyIngress);
        lab.isolate(CLIENT, 0, 0);
        // What nobody answers is over soon, what was answered once is not.
        for answered in [false, true] {
            let back = lab.to(REMOTE, CLIENT, TCP, &wire::tcp(BACK, ACK, b""));
            lab.isolate(CLIENT, 0, 0);
            lab.passed(&lab.tcp(CLIENT, REMOTE, THERE, SYN));
            lab.isolate(CLIENT, SET, 0);
            if answered {
                lab.received(&back);
                lab.wait(lifetime(TCP, 0));
                lab.received(&back);
            } else {
                lab.wait(lifetime(TCP, CtFlags::OPENING) + 1);
                lab.kept_out(&back, Reason::PolicyIngress);
            }
        }
    }

    /// A table that takes nothing stops new flows, not live ones.
    fn a_full_table_stops_new_flows_only(lab) {
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, SYN), SERVER);
        lab.tables.full = true;
        lab.wait(5);
        lab.delivered(&lab.tcp(CLIENT, SERVER, THERE, ACK), SERVER);
        lab.refused(&lab.tcp(CLIENT, SERVER, (1, PORT), SYN), Reason::ConntrackFull);
        lab.kept_out(&lab.to(REMOTE, SERVER, TCP, &wire::tcp(THERE, SYN, b"")), Reason::ConntrackFull);
    }

    /// Without redirection the stack forwards, and `to_pod` judges and tracks nothing twice.
    fn the_stack_may_forward_between_pods(lab) {
        lab.tables.flags = 0;
        lab.allow(SET, CLIENT, TCP, PORT);
        lab.isolate(SERVER, SET, 0);
        lab.passed(&lab.tcp(CLIENT, SERVER, THERE, SYN));
        lab.received(&lab.to(CLIENT, SERVER, TCP, &wire::tcp(THERE, SYN, b"data")));
        lab.passed(&lab.tcp(SERVER, CLIENT, BACK, SYN | ACK));
        lab.received(&lab.to(SERVER, CLIENT, TCP, &wire::tcp(BACK, SYN | ACK, b"data")));
        assert_eq!(lab.tracked(), 2);
    }

    /// Nothing passes before the agent has written a configuration.
    fn nothing_passes_unconfigured(lab) {
        lab.tables.revision = 0;
        lab.refused(&lab.tcp(CLIENT, SERVER, THERE, SYN), Reason::NotConfigured);
        lab.kept_out(&lab.to(NODE, SERVER, TCP, &wire::tcp(THERE, SYN, b"")), Reason::NotConfigured);
    }

    /// From the stack to an address that is not behind the interface.
    fn an_unknown_receiver_gets_nothing(lab) {
        let mut frame = lab.to(NODE, SERVER, TCP, &wire::tcp(THERE, SYN, b""));
        frame.ifindex += 1;
        lab.kept_out(&frame, Reason::UnknownEndpoint);
        lab.kept_out(&lab.to(NODE, WORLD, TCP, &wire::tcp(THERE, SYN, b"")), Reason::UnknownEndpoint);
        lab.tables.endpoints.remove(&F::addr(OTHER));
        lab.kept_out(&lab.to(NODE, OTHER, TCP, &wire::tcp(THERE, SYN, b"")), Reason::UnknownEndpoint);
        lab.refused(&lab.tcp(OTHER, SERVER, THERE, SYN), Reason::SpoofedSource);
    }
}
