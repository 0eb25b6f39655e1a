//! Verdicts: both directions, every kind of entry, and what no policy can forbid.

use hachi_abi::{Peer, Reason, Verdict};
use hachi_compile::Op;

use crate::{
    lab::{
        CLASS_CLIENT, CLASS_REMOTE, CLASS_SERVER, Lab, Net, OTHER_SET, PORT, SET, answer,
        both_families, entry, opener, syn, syn_ack,
    },
    support::{isolated, require_datapath},
    wire::{Body, TCP, UDP},
};

#[test]
fn nothing_passes_before_the_agent_has_configured_the_datapath() {
    require_datapath!();
    isolated(|world| {
        let mut lab = Lab::bare(world, Net::V4);
        for net in [Net::V4, Net::V6] {
            lab.of(net);
            let out = lab.packet(lab.client, lab.server.ip, syn(PORT)).bytes();
            lab.send(lab.client, &out).dropped(Reason::NotConfigured);
            let into = lab.packet_to(lab.remote, lab.server, syn(PORT)).bytes();
            lab.receive(lab.server, &into)
                .dropped(Reason::NotConfigured);
        }
    });
}

both_families! {
    /// Without policy, packets go straight to a Pod of this node, and to the stack for all else.
    fn without_policy_everything_passes(lab) {
        for proto in [TCP, UDP] {
            let body = opener(proto, PORT);
            let out = lab.packet(lab.client, lab.server.ip, body.clone());
            let seen = lab.send(lab.client, &out.bytes()).delivered();
            assert_eq!((seen.source, seen.destination), (lab.client.ip, lab.server.ip));
            assert_eq!(seen.body, out.body);
            for away in [lab.remote, lab.world, lab.node] {
                let out = lab.packet(lab.client, away, body.clone());
                assert_eq!(lab.send(lab.client, &out.bytes()).passed(), out);
            }
            for from in [lab.remote, lab.world, lab.node] {
                let into = lab.packet_to(from, lab.server, body.clone());
                assert_eq!(lab.receive(lab.server, &into.bytes()).received(), into);
            }
        }
    }

    /// The receiver's ingress set judges the sender's class, the protocol and the port.
    fn ingress_allows_what_its_set_says(lab) {
        lab.allow(SET, CLASS_CLIENT, TCP, PORT);
        lab.isolate(lab.server, SET, 0);
        let send = |pod, body| {
            let packet = lab.packet(pod, lab.server.ip, body);
            lab.send(pod, &packet.bytes())
        };
        send(lab.client, syn(PORT)).delivered();
        send(lab.client, syn(PORT + 1)).dropped(Reason::PolicyIngress);
        send(lab.client, opener(UDP, PORT)).dropped(Reason::PolicyIngress);
        send(lab.other, syn(PORT)).dropped(Reason::PolicyIngress);
        for from in [lab.remote, lab.world] {
            let into = lab.packet_to(from, lab.server, syn(PORT)).bytes();
            lab.receive(lab.server, &into).dropped(Reason::PolicyIngress);
        }
        // Other Pods are not concerned.
        let out = lab.packet(lab.client, lab.other.ip, syn(PORT)).bytes();
        lab.send(lab.client, &out).delivered();
    }

    /// The sender's egress set judges the receiver's class, wherever the receiver is.
    fn egress_allows_what_its_set_says(lab) {
        lab.allow(SET, CLASS_SERVER, TCP, PORT);
        lab.allow(SET, CLASS_REMOTE, TCP, PORT);
        lab.isolate(lab.client, 0, SET);
        let send = |to, body| {
            let packet = lab.packet(lab.client, to, body);
            lab.send(lab.client, &packet.bytes())
        };
        send(lab.server.ip, syn(PORT)).delivered();
        send(lab.remote, syn(PORT)).passed();
        send(lab.server.ip, syn(PORT + 1)).dropped(Reason::PolicyEgress);
        send(lab.remote, opener(UDP, PORT)).dropped(Reason::PolicyEgress);
        send(lab.other.ip, syn(PORT)).dropped(Reason::PolicyEgress);
        send(lab.world, syn(PORT)).dropped(Reason::PolicyEgress);
    }

    /// Between two Pods of a node both must allow; the sender is asked first.
    fn both_ends_must_allow(lab) {
        lab.isolate(lab.client, 0, SET);
        lab.isolate(lab.server, OTHER_SET, 0);
        let out = lab.packet(lab.client, lab.server.ip, syn(PORT)).bytes();
        lab.send(lab.client, &out).dropped(Reason::PolicyEgress);
        lab.allow(SET, CLASS_SERVER, TCP, PORT);
        lab.send(lab.client, &out).dropped(Reason::PolicyIngress);
        lab.allow(OTHER_SET, CLASS_CLIENT, TCP, PORT);
        lab.send(lab.client, &out).delivered();
    }

    /// Port prefixes: the longest that matches decides; then any port, then any protocol.
    fn the_longest_prefix_decides(lab) {
        lab.apply(&[
            entry(SET, CLASS_CLIENT, TCP, 0x1f80, 12, Verdict::Allow),
            entry(SET, CLASS_CLIENT, TCP, 0x1f90, 16, Verdict::Deny),
            entry(SET, CLASS_CLIENT, UDP, 0, 0, Verdict::Allow),
            entry(SET, CLASS_CLIENT, UDP, 53, 16, Verdict::Deny),
        ]);
        lab.isolate(lab.server, SET, 0);
        let send = |body| {
            let packet = lab.packet(lab.client, lab.server.ip, body);
            lab.send(lab.client, &packet.bytes())
        };
        send(syn(0x1f80)).delivered();
        send(syn(0x1f8f)).delivered();
        send(syn(0x1f90)).dropped(Reason::PolicyIngress);
        send(syn(0x1f7f)).dropped(Reason::PolicyIngress);
        send(opener(UDP, 1)).delivered();
        send(opener(UDP, 0xffff)).delivered();
        send(opener(UDP, 53)).dropped(Reason::PolicyIngress);
    }

    /// An entry for any protocol allows those that have no ports too.
    fn any_protocol_is_any(lab) {
        const GRE: u8 = 47;
        let packet = |lab: &Lab, pod| {
            lab.packet(pod, lab.server.ip, Body::Other { proto: GRE, data: vec![0; 24] }).bytes()
        };
        lab.apply(&[entry(SET, CLASS_CLIENT, 0, 0, 0, Verdict::Allow)]);
        lab.isolate(lab.server, SET, 0);
        lab.send(lab.client, &packet(lab, lab.client)).delivered();
        lab.send(lab.other, &packet(lab, lab.other)).dropped(Reason::PolicyIngress);
        let tcp = lab.packet(lab.client, lab.server.ip, syn(PORT)).bytes();
        lab.send(lab.client, &tcp).delivered();
    }

    /// Blocks of addresses: the longest prefix decides, and a single address before any block.
    fn blocks_give_addresses_their_class(lab) {
        let class = |class| Peer { class, flags: 0 };
        let (wide, narrow, far) = match lab.net {
            Net::V4 => ("192.0.0.0/16", "192.0.2.6/32", "192.0.3.1"),
            Net::V6 => ("2001:db8::/32", "2001:db8::6/128", "2001:db8:1::1"),
        };
        let [wide, narrow] = [wide, narrow].map(|text| text.parse().expect("a block"));
        lab.apply(&[Op::PutCidr(wide, class(201)), Op::PutCidr(narrow, class(202))]);
        lab.allow(SET, 201, TCP, PORT);
        lab.isolate(lab.server, SET, 0);
        let receive = |lab: &Lab, from| {
            let packet = lab.packet_to(from, lab.server, syn(PORT));
            lab.receive(lab.server, &packet.bytes())
        };
        receive(lab, far.parse().expect("an address")).received();
        receive(lab, lab.world).dropped(Reason::PolicyIngress);
        lab.apply(&[Op::DeleteCidr(narrow), Op::RaiseRevision]);
        receive(lab, lab.world).received();
        lab.apply(&[Op::PutPeer(lab.world, class(0)), Op::RaiseRevision]);
        receive(lab, lab.world).dropped(Reason::PolicyIngress);
    }

    /// The node may always reach its Pods; another node may not.
    fn the_own_node_always_reaches_its_pods(lab) {
        lab.isolate(lab.server, SET, SET);
        let probe = lab.packet_to(lab.node, lab.server, syn(PORT));
        lab.receive(lab.server, &probe.bytes()).received();
        let answer = lab.packet(lab.server, lab.node, syn_ack(PORT));
        lab.send(lab.server, &answer.bytes()).passed();
        lab.apply(&[Op::PutPeer(lab.node, Peer { class: 0, flags: 0 }), Op::RaiseRevision]);
        lab.receive(lab.server, &probe.bytes()).dropped(Reason::PolicyIngress);
    }

    /// A Pod that the agent does not know is denied in both directions.
    fn an_unknown_pod_is_denied(lab) {
        let stranger = lab.other;
        lab.apply(&[Op::DeleteEndpoint(stranger.ip), Op::RaiseRevision]);
        let out = lab.packet(stranger, lab.world, syn(PORT)).bytes();
        lab.send(stranger, &out).dropped(Reason::SpoofedSource);
        let into = lab.packet_to(lab.world, stranger, syn(PORT)).bytes();
        let outcome = lab.receive(stranger, &into);
        assert!(outcome.reason.is_drop(), "{outcome:?}");
    }

    /// Every flow that is allowed has its replies allowed, whatever the sets say of them.
    fn replies_are_implied(lab) {
        lab.isolate(lab.client, SET, 0);
        lab.isolate(lab.server, 0, SET);
        for proto in [TCP, UDP] {
            let out = lab.packet(lab.client, lab.server.ip, opener(proto, PORT)).bytes();
            lab.send(lab.client, &out).delivered();
            let back = lab.packet(lab.server, lab.client.ip, answer(proto, PORT)).bytes();
            lab.send(lab.server, &back).delivered();
            // A flow that the server opens itself is no reply.
            let own = lab.packet(lab.server, lab.client.ip, opener(proto, PORT)).bytes();
            lab.send(lab.server, &own).dropped(Reason::PolicyEgress);
        }
    }
}
