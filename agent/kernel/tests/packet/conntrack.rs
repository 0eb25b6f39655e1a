//! Live flows: judged once, judged again when the policy changed, and never by half.

use hachi_abi::Reason;
use hachi_compile::Op;

use crate::{
    lab::{
        CLASS_CLIENT, CLASS_REMOTE, CLIENT_PORT, Lab, OTHER_SET, PORT, SET, ack, both_families,
        key, syn, syn_ack, udp,
    },
    wire::{ACK, Body, Packet, RST, SYN, TCP},
};

const THERE: (u16, u16) = (CLIENT_PORT, PORT);
const BACK: (u16, u16) = (PORT, CLIENT_PORT);

/// The later packets of the flow from client to server.
fn flow(lab: &Lab) -> (Packet, Packet) {
    (
        lab.packet(lab.client, lab.server.ip, ack(THERE)),
        lab.packet(lab.server, lab.client.ip, ack(BACK)),
    )
}

/// Opens the flow from client to server.
fn open(lab: &Lab) {
    let there = lab.packet(lab.client, lab.server.ip, syn(PORT));
    lab.send(lab.client, &there.bytes()).delivered();
    let back = lab.packet(lab.server, lab.client.ip, syn_ack(PORT));
    lab.send(lab.server, &back.bytes()).delivered();
}

both_families! {
    /// An established flow passes without another look at the policy until the revision rises.
    fn a_flow_is_judged_again_when_the_revision_rises(lab) {
        lab.allow(SET, CLASS_CLIENT, TCP, PORT);
        lab.isolate(lab.server, SET, 0);
        open(lab);
        let (there, back) = flow(lab);
        lab.apply(&[Op::DeletePolicy(key(SET, CLASS_CLIENT, TCP, PORT, 16))]);
        lab.send(lab.client, &there.bytes()).delivered();
        lab.send(lab.server, &back.bytes()).delivered();

        lab.apply(&[Op::RaiseRevision]);
        lab.send(lab.client, &there.bytes()).dropped(Reason::PolicyIngress);
        lab.send(lab.server, &back.bytes()).dropped(Reason::PolicyIngress);
        // The reply is judged as the flow's opener, not as a flow of the server's own.
        lab.allow(SET, CLASS_CLIENT, TCP, PORT);
        lab.send(lab.server, &back.bytes()).delivered();
        lab.send(lab.client, &there.bytes()).delivered();
    }

    /// The reply alone, first after the change, is judged as its opener is.
    fn a_reply_is_judged_as_its_opener(lab) {
        lab.allow(SET, CLASS_CLIENT, TCP, PORT);
        lab.isolate(lab.server, SET, 0);
        open(lab);
        let (_, back) = flow(lab);
        lab.apply(&[Op::RaiseRevision]);
        lab.send(lab.server, &back.bytes()).delivered();
        lab.isolate(lab.client, 0, OTHER_SET);
        lab.send(lab.server, &back.bytes()).dropped(Reason::PolicyEgress);
    }

    /// A Pod that becomes isolated keeps the replies of the flows that it had opened before.
    fn isolation_keeps_the_replies_of_open_flows(lab) {
        open(lab);
        let (there, back) = flow(lab);
        lab.isolate(lab.client, SET, 0);
        lab.send(lab.server, &back.bytes()).delivered();
        lab.send(lab.client, &there.bytes()).delivered();
        let fresh = lab.packet(lab.server, lab.client.ip, syn(PORT));
        lab.send(lab.server, &fresh.bytes()).dropped(Reason::PolicyIngress);
    }

    /// A TCP SYN opens afresh, whatever an earlier flow of the same ports left.
    fn a_syn_opens_afresh(lab) {
        open(lab);
        lab.isolate(lab.server, SET, 0);
        let again = lab.packet(lab.client, lab.server.ip, syn(PORT));
        lab.send(lab.client, &again.bytes()).dropped(Reason::PolicyIngress);
        lab.allow(SET, CLASS_CLIENT, TCP, PORT);
        lab.send(lab.client, &again.bytes()).delivered();
        // The other way round it is a flow of the server's own, not a reply.
        lab.isolate(lab.client, OTHER_SET, 0);
        let crossing = lab.packet(lab.server, lab.client.ip, Body::Tcp {
            ports: BACK,
            flags: SYN,
            data: Vec::new(),
        });
        lab.send(lab.server, &crossing.bytes()).dropped(Reason::PolicyIngress);
    }

    /// Flows through the host's stack: opened by a Pod of this node, and to one.
    fn flows_through_the_stack_are_tracked(lab) {
        lab.isolate(lab.client, SET, 0);
        let out = lab.packet(lab.client, lab.remote, syn(PORT));
        lab.send(lab.client, &out.bytes()).passed();
        let back = lab.packet_to(lab.remote, lab.client, syn_ack(PORT));
        lab.receive(lab.client, &back.bytes()).received();
        let fresh = lab.packet_to(lab.remote, lab.client, syn(PORT));
        lab.receive(lab.client, &fresh.bytes()).dropped(Reason::PolicyIngress);

        lab.allow(SET, CLASS_REMOTE, TCP, PORT);
        lab.isolate(lab.server, SET, OTHER_SET);
        let into = lab.packet_to(lab.remote, lab.server, syn(PORT));
        lab.receive(lab.server, &into.bytes()).received();
        let back = lab.packet(lab.server, lab.remote, syn_ack(PORT));
        lab.send(lab.server, &back.bytes()).passed();
        let own = lab.packet(lab.server, lab.remote, syn(PORT));
        lab.send(lab.server, &own.bytes()).dropped(Reason::PolicyEgress);
    }

    /// A flow is two entries, each under the tuple that its packets carry, with the rules.
    fn a_flow_has_an_entry_for_each_direction(lab) {
        lab.allow(SET, CLASS_CLIENT, TCP, PORT);
        lab.isolate(lab.server, SET, 0);
        open(lab);
        let mut flows = lab.datapath.conntrack().expect("the flows");
        flows.sort_by_key(|flow| flow.reply);
        let [there, back] = &flows[..] else { panic!("{flows:?}") };
        assert_eq!((there.reply, back.reply), (false, true));
        assert_eq!((there.source.ip(), there.source.port()), (lab.client.ip, CLIENT_PORT));
        assert_eq!((there.destination.ip(), there.destination.port()), (lab.server.ip, PORT));
        assert_eq!((back.source, back.destination), (there.destination, there.source));
        for flow in [there, back] {
            assert_eq!(flow.proto, TCP);
            assert_eq!(flow.rewrite, None);
            assert_eq!(flow.ingress_rule, SET);
            assert_eq!(flow.revision, lab.revision());
            assert!(flow.idle.as_secs() < 60, "{flow:?}");
        }
    }

    /// A RST passes and is remembered until a SYN of the same ports opens another flow.
    fn a_reset_closes_and_a_syn_opens(lab) {
        let closing = |lab: &Lab| {
            let flows = lab.datapath.conntrack().expect("the flows");
            flows.iter().filter(|flow| flow.closing).count()
        };
        open(lab);
        assert_eq!(closing(lab), 0);
        let reset = Body::Tcp { ports: BACK, flags: RST | ACK, data: Vec::new() };
        let reset = lab.packet(lab.server, lab.client.ip, reset);
        lab.send(lab.server, &reset.bytes()).delivered();
        assert!(closing(lab) > 0);
        open(lab);
        assert_eq!(closing(lab), 0);
    }

    /// A reply to nothing is judged as a flow of its own.
    fn a_reply_to_nothing_is_no_reply(lab) {
        lab.isolate(lab.client, SET, 0);
        let (_, back) = flow(lab);
        lab.send(lab.server, &back.bytes()).dropped(Reason::PolicyIngress);
        let datagram = lab.packet(lab.server, lab.client.ip, udp(BACK));
        lab.send(lab.server, &datagram.bytes()).dropped(Reason::PolicyIngress);
        assert!(lab.datapath.conntrack().expect("the flows").is_empty(), "a denied flow is not kept");
    }
}
