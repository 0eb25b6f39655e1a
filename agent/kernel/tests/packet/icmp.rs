//! ICMP: echo is a flow, errors follow the flow that they are about, neighbour discovery works.

use hachi_abi::Reason;

use crate::{
    lab::{
        CLASS_CLIENT, CLIENT_PORT, Lab, Net, OK, PORT, SERVICE_PORT, SET, ack, both_families,
        opener, syn,
    },
    support::require_datapath,
    wire::{Body, ETHERNET, ICMP, ICMPV6, Packet, TCP},
};

/// An echo request or reply.
fn echo(lab: &Lab, reply: bool) -> Body {
    let kind = match (lab.net, reply) {
        (Net::V4, false) => 8,
        (Net::V4, true) => 0,
        (Net::V6, false) => 128,
        (Net::V6, true) => 129,
    };
    Body::Icmp {
        kind,
        code: 0,
        rest: [0x12, 0x34, 0, 1],
        data: b"ping".to_vec(),
    }
}

/// "Destination unreachable" about `packet`, quoting its IP header and eight bytes more.
fn unreachable(net: Net, packet: &Packet) -> Body {
    let quote = packet.ip();
    let header = if net == Net::V4 { 20 } else { 40 };
    let (kind, code) = if net == Net::V4 { (3, 3) } else { (1, 4) };
    Body::Icmp {
        kind,
        code,
        rest: [0; 4],
        data: quote[..header + 8].to_vec(),
    }
}

both_families! {
    /// An echo request is judged, its replies follow it.
    fn echo_is_a_flow(lab) {
        let ping = lab.packet(lab.client, lab.server.ip, echo(lab, false)).bytes();
        let pong = lab.packet(lab.server, lab.client.ip, echo(lab, true)).bytes();
        lab.isolate(lab.client, SET, 0);
        lab.send(lab.server, &pong).dropped(Reason::PolicyIngress);
        lab.send(lab.client, &ping).delivered();
        lab.send(lab.server, &pong).delivered();
        lab.isolate(lab.server, SET, 0);
        lab.send(lab.client, &ping).dropped(Reason::PolicyIngress);
        let proto = if lab.net == Net::V4 { ICMP } else { ICMPV6 };
        lab.apply(&[crate::lab::entry(SET, CLASS_CLIENT, proto, 0, 0, hachi_abi::Verdict::Allow)]);
        lab.send(lab.client, &ping).delivered();
    }

    /// An error about a live flow passes an isolated Pod's policy, one about nothing does not.
    fn errors_follow_their_flow(lab) {
        lab.isolate(lab.client, SET, 0);
        let out = lab.packet(lab.client, lab.remote, syn(PORT));
        let error = lab.packet_to(lab.remote, lab.client, unreachable(lab.net, &out));
        lab.receive(lab.client, &error.bytes()).dropped(Reason::IcmpUnrelated);
        lab.send(lab.client, &out.bytes()).passed();
        lab.receive(lab.client, &error.bytes()).received();
        // A router on the way may say so as well.
        let router = lab.packet_to(lab.world, lab.client, unreachable(lab.net, &out));
        lab.receive(lab.client, &router.bytes()).received();
    }

    /// An error about a packet that went to a backend reaches the client as one about the Service.
    fn an_error_about_a_backend_is_translated(lab) {
        lab.serve(TCP, &[std::net::SocketAddr::new(lab.remote, PORT)]);
        let out = lab.packet(lab.client, lab.service, opener(TCP, SERVICE_PORT));
        let sent = lab.send(lab.client, &out.bytes()).passed();
        let error = lab.packet_to(lab.remote, lab.client, unreachable(lab.net, &sent));
        let seen = lab.receive(lab.client, &error.bytes()).received();
        let Body::Icmp { data, .. } = seen.body else { panic!("{seen:?}") };
        let header = if lab.net == Net::V4 { 20 } else { 40 };
        let address = crate::wire::octets(lab.service);
        assert_eq!(data[header - address.len()..header], address[..], "the quoted destination");
        let ports = [CLIENT_PORT.to_be_bytes(), SERVICE_PORT.to_be_bytes()].concat();
        assert_eq!(data[header..header + 4], ports[..]);
    }

    /// An error that claims to be about another Pod's flow does not reach it.
    fn an_error_about_anothers_flow_is_dropped(lab) {
        lab.isolate(lab.server, SET, 0);
        let theirs = lab.packet(lab.client, lab.remote, syn(PORT));
        lab.send(lab.client, &theirs.bytes()).passed();
        let error = lab.packet_to(lab.remote, lab.server, unreachable(lab.net, &theirs));
        let outcome = lab.receive(lab.server, &error.bytes());
        assert!(outcome.reason.is_drop(), "{outcome:?}");
        let quoted = lab.packet(lab.client, lab.remote, ack((1, 2)));
        let error = lab.packet_to(lab.remote, lab.server, unreachable(lab.net, &quoted));
        lab.receive(lab.server, &error.bytes()).dropped(Reason::IcmpUnrelated);
    }
}

/// Where a frame has IPv6's hop limit.
const HOP_LIMIT: usize = ETHERNET + 7;

/// Neighbour discovery between a Pod and its gateway, whatever the policy.
#[test]
fn neighbour_discovery_works_for_isolated_pods() {
    require_datapath!();
    crate::pool::run(Net::V6, |lab| {
        lab.isolate(lab.client, SET, SET);
        let link_local = "fe80::1".parse().expect("an address");
        let target = |address| {
            let mut data = crate::wire::octets(address);
            // Source link-layer address.
            data.extend_from_slice(&[1, 1]);
            data.extend_from_slice(&lab.client.mac);
            data
        };
        let solicitation = Body::Icmp {
            kind: 135,
            code: 0,
            rest: [0; 4],
            data: target(link_local),
        };
        let advertisement = Body::Icmp {
            kind: 136,
            code: 0,
            rest: [0x60, 0, 0, 0],
            data: target(lab.client.ip),
        };
        for body in [solicitation, advertisement] {
            let mut out = lab.packet(lab.client, link_local, body.clone()).bytes();
            let mut into = lab.packet_to(link_local, lab.client, body).bytes();
            // From beyond a router it is no neighbour (RFC 4861 section 6.1): policy holds.
            lab.send(lab.client, &out).dropped(Reason::PolicyEgress);
            lab.receive(lab.client, &into)
                .dropped(Reason::PolicyIngress);
            out[HOP_LIMIT] = 255;
            into[HOP_LIMIT] = 255;
            let outcome = lab.send(lab.client, &out);
            assert_eq!(
                (outcome.verdict, outcome.reason),
                (OK, Reason::PassedToStack)
            );
            let outcome = lab.receive(lab.client, &into);
            assert_eq!(
                (outcome.verdict, outcome.reason),
                (OK, Reason::DeliveredFromStack)
            );
        }
    });
}
