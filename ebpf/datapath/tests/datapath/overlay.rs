//! Tunnels: who may speak through them, and what goes into them.

use hachi_abi::{ConfigFlags, Reason, Scope, Tunnel, TunnelDevice, TunnelFlags};
use hachi_datapath::Outcome;

use crate::{
    lab::{
        CLIENT, CLIENT_PORT, FAR, FAR_POD, Lab, NODE, Net, OVERLAY, PORT, REMOTE, SERVER,
        SERVICE_PORT, SET, TCP, UDP, UPLINK, WORLD, both_families,
    },
    wire::{self, ACK, Frame, SYN},
};

const VXLAN: u16 = 8472;
/// Two nodes' tunnel addresses.
const FAR_END: [u8; 16] = [7; 16];
const NEAR_END: [u8; 16] = [8; 16];

const fn tunnel(remote: [u8; 16], flags: u32) -> Tunnel {
    Tunnel { remote, flags }
}

/// A node behind a router, and one on the link.
fn far<const N: usize, F: Net<N>>(lab: &mut Lab<N, F>) {
    use TunnelFlags as Flags;
    let entries = [
        (FAR_POD, Flags::SEND),
        (FAR, Flags::SEND | Flags::NODE),
        (REMOTE, 0),
        (CLIENT, Flags::LOCAL),
        (SERVER, Flags::LOCAL),
    ];
    for (address, flags) in entries {
        let end = if address == REMOTE { NEAR_END } else { FAR_END };
        let entry = (F::addr(address), N * 8, tunnel(end, flags));
        lab.tables.tunnels.push(entry);
    }
    lab.tables.tunnel_device = TunnelDevice {
        ifindex: OVERLAY,
        vni: 1,
        mtu: 200,
        port: VXLAN.to_be_bytes(),
        pad: [0; 2],
    };
    lab.tables.uplinks.insert(OVERLAY, F::addr(NODE));
    for exempt in [FAR, FAR_POD] {
        lab.tables.exempt.push((F::addr(exempt), N * 8));
    }
}

fn syn<const N: usize, F: Net<N>>(lab: &Lab<N, F>, from: u8, to: u8) -> Frame {
    lab.wire(from, to, TCP, &wire::tcp((CLIENT_PORT, PORT), SYN, b""))
}

both_families! {
    /// A node speaks for its own Pods and for itself.
    fn only_nodes_speak_and_only_for_their_own(lab) {
        far(lab);
        let far_node = tunnel(FAR_END, TunnelFlags::SEND | TunnelFlags::NODE);
        for from in [FAR_POD, FAR] {
            let (outcome, _) = lab.emerge(&syn(lab, from, SERVER), Some(&far_node));
            assert!(matches!(outcome, Outcome::RedirectPeer { .. }), "{from}: {outcome:?}");
            let (outcome, _) = lab.emerge(&syn(lab, from, NODE), Some(&far_node));
            assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
        }
        let near = tunnel(NEAR_END, TunnelFlags::NODE);
        let (outcome, _) = lab.emerge(&syn(lab, REMOTE, SERVER), Some(&near));
        assert!(matches!(outcome, Outcome::RedirectPeer { .. }), "{outcome:?}");

        let v6 = tunnel(FAR_END, far_node.flags | TunnelFlags::V6);
        let pod = tunnel(FAR_END, TunnelFlags::SEND);
        let own = tunnel(FAR_END, TunnelFlags::LOCAL | TunnelFlags::NODE);
        let forged = [
            // From nobody that is known, another node, another family, a Pod.
            (FAR_POD, None),
            (FAR_POD, Some(&near)),
            (FAR_POD, Some(&v6)),
            (FAR_POD, Some(&pod)),
            (REMOTE, Some(&far_node)),
            // For the world, this node, its Pods.
            (WORLD, Some(&far_node)),
            (NODE, Some(&far_node)),
            (CLIENT, Some(&far_node)),
            (CLIENT, Some(&own)),
        ];
        for (from, outer) in forged {
            let (outcome, _) = lab.emerge(&syn(lab, from, SERVER), outer);
            assert_eq!(outcome, Outcome::Drop(Reason::TunnelSource), "{from} {outer:?}");
        }
    }

    /// Policies hold behind the tunnel.
    fn policy_holds_through_the_tunnel(lab) {
        far(lab);
        let outer = tunnel(FAR_END, TunnelFlags::SEND | TunnelFlags::NODE);
        lab.isolate(SERVER, SET, 0);
        let (outcome, _) = lab.emerge(&syn(lab, FAR_POD, SERVER), Some(&outer));
        assert_eq!(outcome, Outcome::Drop(Reason::PolicyIngress));
        lab.isolate(CLIENT, 0, SET);
        lab.refused(&lab.tcp(CLIENT, FAR_POD, (CLIENT_PORT, PORT), SYN), Reason::PolicyEgress);
    }

    /// Pods reach far Pods and far nodes through the tunnel; nodes reach nodes by the network.
    fn pods_go_into_the_tunnel(lab) {
        far(lab);
        for to in [FAR_POD, FAR] {
            let (outcome, after) = lab.send(&lab.tcp(CLIENT, to, (CLIENT_PORT, PORT), SYN));
            assert_eq!(outcome, Outcome::Out { ifindex: OVERLAY });
            let (outcome, out, tunnel) = lab.submerge(&after);
            assert_eq!(outcome, Outcome::Pass(Reason::PassedToNetwork));
            assert_eq!(tunnel.remote, FAR_END);
            assert_eq!(out.bytes, after.bytes, "under the Pod's own address");
        }
        let (outcome, _) = lab.send(&lab.tcp(CLIENT, REMOTE, (CLIENT_PORT, PORT), SYN));
        assert_eq!(outcome, Outcome::Forward);
        // The stack's way, and its answers to what is too long or has come too far.
        lab.tables.flags = ConfigFlags::REDIRECT_PEER | ConfigFlags::MASQUERADE;
        let (outcome, _) = lab.send(&lab.tcp(CLIENT, FAR_POD, (CLIENT_PORT, PORT), SYN));
        assert_eq!(outcome, Outcome::Pass(Reason::PassedToStack));
        let (outcome, _) = lab.send(&lab.tcp(CLIENT, FAR, (CLIENT_PORT, PORT), SYN));
        assert_eq!(outcome, Outcome::Out { ifindex: OVERLAY });
    }

    fn what_is_too_long_is_left_to_the_stack(lab) {
        far(lab);
        let sized = |lab: &Lab<_, _>, length: usize| {
            lab.from(CLIENT, FAR_POD, UDP, &wire::udp((CLIENT_PORT, PORT), &vec![7; length]))
        };
        let fits = 200 - 8 - if lab.tables.exempt[0].1 == 32 { 20 } else { 40 };
        assert_eq!(lab.send(&sized(lab, fits)).0, Outcome::Out { ifindex: OVERLAY });
        let stack = Outcome::Pass(Reason::PassedToStack);
        assert_eq!(lab.send(&sized(lab, fits + 1)).0, stack);
        // One that will be cut may be as long as it likes, if its parts fit.
        let mut large = sized(lab, 4_000);
        large.segment = u32::try_from(fits).unwrap();
        assert_eq!(lab.send(&large).0, Outcome::Out { ifindex: OVERLAY });
        large.segment += 1;
        assert_eq!(lab.send(&large).0, stack);
    }

    /// What leaves by the device but leads nowhere ends there.
    fn nothing_leaves_for_nowhere(lab) {
        far(lab);
        for to in [WORLD, CLIENT, NODE] {
            let (outcome, _, tunnel) = lab.submerge(&syn(lab, FAR, to));
            assert_eq!(outcome, Outcome::Drop(Reason::UnknownEndpoint), "{to}");
            assert_eq!(tunnel, Tunnel::default());
        }
    }

    /// A Service's backend behind the tunnel is reached with this node's address, like any elsewhere.
    fn a_far_backend_answers_through_this_node(lab) {
        far(lab);
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[FAR_POD]);
        let ask = wire::tcp((CLIENT_PORT, SERVICE_PORT), SYN, b"");
        let (outcome, after) = lab.arrive(&lab.wire(WORLD, NODE, TCP, &ask));
        assert_eq!(outcome, Outcome::Out { ifindex: OVERLAY });
        let (outcome, out, tunnel) = lab.submerge(&after);
        assert_eq!(outcome, Outcome::Pass(Reason::Translated));
        assert_eq!(tunnel.remote, FAR_END);
        let view = out.check();
        let (port, _) = view.ports();
        assert_eq!((view.src, view.dst), (F::addr(NODE).to_vec(), F::addr(FAR_POD).to_vec()));
        let outer = self::tunnel(FAR_END, TunnelFlags::SEND | TunnelFlags::NODE);
        let answer = lab.wire(FAR_POD, NODE, TCP, &wire::tcp((PORT, port), SYN | ACK, b""));
        let (outcome, after) = lab.emerge(&answer, Some(&outer));
        assert_eq!(outcome, Outcome::Forward);
        let view = lab.translated(&after);
        assert_eq!((view.src, view.dst), (F::addr(NODE).to_vec(), F::addr(WORLD).to_vec()));
    }

    /// "Too big" from the way back to the client reaches the far backend from this node, as nobody else
    /// may speak to it by this tunnel; and is about what it has sent.
    fn an_error_about_a_far_backends_answer_is_passed_on(lab) {
        far(lab);
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[FAR_POD]);
        let ask = wire::tcp((CLIENT_PORT, SERVICE_PORT), SYN, b"");
        let (_, after) = lab.arrive(&lab.wire(WORLD, NODE, TCP, &ask));
        let (port, _) = lab.submerge(&after).1.check().ports();

        let router = 72;
        let [kind, code] = F::PORT_UNREACHABLE;
        let back = wire::tcp((SERVICE_PORT, CLIENT_PORT), ACK, b"x");
        let quoted = wire::ip(F::addr(NODE), F::addr(WORLD), TCP, &back);
        let error = wire::icmp(kind, code, [0; 4], &quoted[..F::HEADER + 8]);
        let (outcome, after) = lab.arrive(&lab.wire(router, NODE, F::ICMP, &error));
        assert_eq!(outcome, Outcome::Out { ifindex: OVERLAY });
        let (outcome, out, tunnel) = lab.submerge(&after);
        assert_eq!(outcome, Outcome::Pass(Reason::Translated));
        assert_eq!(tunnel.remote, FAR_END);
        let view = out.check();
        assert_eq!((view.src.clone(), view.dst.clone()), (F::addr(NODE).to_vec(), F::addr(FAR_POD).to_vec()));
        let ip = &view.body()[8..];
        let at = |offset: usize| u16::from_be_bytes([ip[F::HEADER + offset], ip[F::HEADER + offset + 1]]);
        assert_eq!((ip[F::SOURCE + N - 1], at(0)), (FAR_POD, PORT));
        assert_eq!((ip[F::DESTINATION + N - 1], at(2)), (NODE, port));
    }

    /// A far Pod that is itself the backend sees this node, and its answers come back to it as the
    /// Service's.
    fn a_far_pod_reaches_itself_through_this_node(lab) {
        far(lab);
        lab.serve_in(Scope::EXTERNAL, NODE, TCP, &[FAR_POD]);
        let outer = tunnel(FAR_END, TunnelFlags::SEND | TunnelFlags::NODE);
        let ask = wire::tcp((CLIENT_PORT, SERVICE_PORT), SYN, b"");
        let (outcome, after) = lab.emerge(&lab.wire(FAR_POD, NODE, TCP, &ask), Some(&outer));
        assert_eq!(outcome, Outcome::Out { ifindex: OVERLAY });
        let view = lab.submerge(&after).1.check();
        let (port, _) = view.ports();
        assert_eq!((view.src, view.dst), (F::addr(NODE).to_vec(), F::addr(FAR_POD).to_vec()));
        let answer = lab.wire(FAR_POD, NODE, TCP, &wire::tcp((PORT, port), SYN | ACK, b""));
        let (outcome, after) = lab.emerge(&answer, Some(&outer));
        assert_eq!(outcome, Outcome::Out { ifindex: OVERLAY });
        let view = lab.submerge(&after).1.check();
        assert_eq!(view.ports(), (SERVICE_PORT, CLIENT_PORT));
        assert_eq!((view.src, view.dst), (F::addr(NODE).to_vec(), F::addr(FAR_POD).to_vec()));
    }

    /// On the uplink there are tunnel packets, which are let through, and forgeries.
    fn pods_addresses_do_not_arrive_by_the_network(lab) {
        far(lab);
        for from in [FAR_POD, CLIENT] {
            let (outcome, _) = lab.arrive(&syn(lab, from, SERVER));
            assert_eq!(outcome, Outcome::Drop(Reason::SpoofedSource), "{from}");
        }
        for from in [REMOTE, FAR, WORLD] {
            let (outcome, _) = lab.arrive(&syn(lab, from, SERVER));
            assert!(matches!(outcome, Outcome::RedirectPeer { .. }), "{from}: {outcome:?}");
        }
        for from in [FAR, WORLD] {
            let packet = lab.wire(from, NODE, UDP, &wire::udp((CLIENT_PORT, VXLAN), b"inside"));
            assert_eq!(lab.arrive(&packet).0, Outcome::Pass(Reason::PassedToStack));
        }
        assert_eq!(lab.tracked(), 6, "what was let in, and nothing else");
    }

    /// The device's own packets leave as they are and claim nothing; a Pod does not get to send such
    /// under the node's address.
    fn tunnel_packets_leave_as_they_are(lab) {
        far(lab);
        let body = wire::udp((CLIENT_PORT, VXLAN), b"inside");
        lab.left(&lab.own(FAR, UDP, &body));
        assert!(lab.tables.nat.borrow().is_empty());
        let pods = lab.from(CLIENT, WORLD, UDP, &body);
        assert_eq!(lab.leave(&pods).0, Outcome::Drop(Reason::TunnelSource));
        let mut other = lab.from(CLIENT, WORLD, UDP, &wire::udp((CLIENT_PORT, 53), b"question"));
        other.ifindex = UPLINK;
        lab.translated(&other);
    }
}
