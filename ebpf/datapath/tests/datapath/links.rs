//! The link: MAC addresses, ARP, tags, neighbour and listener discovery, groups.

use hachi_abi::Reason;
use hachi_datapath::{Family as _, Outcome, V6};

use crate::{
    lab::{
        CLIENT, Lab, NODE, Net, OTHER, PORT, REMOTE, SERVER, SET, UDP, WORLD, both_families,
        host_mac, mac,
    },
    wire::{self, Frame, SYN},
};

both_families! {
    /// Address, MAC address and interface must be one Pod's.
    fn a_pod_sends_as_itself_only(lab) {
        let good = lab.tcp(CLIENT, SERVER, (1, PORT), SYN);
        let spoofed = |lab: &mut Lab<N, F>, change: &dyn Fn(&mut Frame)| {
            let mut frame = good.clone();
            change(&mut frame);
            lab.refused(&frame, Reason::SpoofedSource);
        };
        spoofed(lab, &|frame| frame.ifindex += 1);
        for bit in 0..48 {
            spoofed(lab, &|frame| frame.bytes[6 + bit / 8] ^= 1 << (bit % 8));
        }
        for other in [SERVER, OTHER, REMOTE, NODE, WORLD] {
            let ip = wire::ip(F::addr(other), F::addr(SERVER), UDP, &wire::udp((1, 2), b""));
            lab.refused(&lab.frame(CLIENT, &ip), Reason::SpoofedSource);
        }
        assert_eq!(lab.tracked(), 0);
        lab.delivered(&good, SERVER);
    }

    /// ARP is the link's; tags and other protocols are nobody's.
    fn only_plain_frames_pass(lab) {
        let ip = lab.tcp(CLIENT, SERVER, (1, PORT), SYN);
        let mut arp = ip.clone();
        arp.bytes[12..14].copy_from_slice(&[0x08, 0x06]);
        assert_eq!(lab.send(&arp).0, Outcome::Pass(Reason::NotIp));
        assert_eq!(lab.receive(&arp).0, Outcome::Pass(Reason::NotIp));
        for kind in [[0x81, 0x00], [0x88, 0xa8], [0x88, 0x47], [0x00, 0x40], [0x86, 0xde]] {
            let mut frame = ip.clone();
            frame.bytes[12..14].copy_from_slice(&kind);
            lab.refused(&frame, Reason::UnsupportedLink);
            lab.kept_out(&frame, Reason::UnsupportedLink);
        }
        for mut frame in [ip, arp] {
            frame.vlan = true;
            lab.refused(&frame, Reason::UnsupportedLink);
            lab.kept_out(&frame, Reason::UnsupportedLink);
        }
    }

    /// To a group the node may send; from elsewhere a group is no way around a policy.
    fn groups_are_the_nodes(lab) {
        let group: [u8; N] = if N == 4 { vec![224, 0, 0, 251] } else {
            [&[0xff, 0x02][..], &[0; 13], &[0xfb]].concat()
        }.try_into().expect("an address");
        let to = |from: [u8; N]| {
            let ip = wire::ip(from, group, UDP, &wire::udp((5353, 5353), b""));
            Frame::new(host_mac(SERVER), u32::from(SERVER) + 10, F::ETHERTYPE, &ip)
        };
        lab.received(&to(F::addr(NODE)));
        lab.kept_out(&to(F::addr(WORLD)), Reason::PolicyIngress);
        lab.isolate(CLIENT, 0, SET);
        let ip = wire::ip(F::addr(CLIENT), group, UDP, &wire::udp((5353, 5353), b""));
        lab.refused(&lab.frame(CLIENT, &ip), Reason::PolicyEgress);
        lab.isolate(CLIENT, 0, 0);
        lab.kept(&lab.frame(CLIENT, &ip));
    }
}

const UNSPECIFIED: [u8; 16] = [0; 16];
const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

fn isolated() -> Lab<16, V6> {
    let mut lab = Lab::new();
    for pod in [CLIENT, SERVER] {
        lab.isolate(pod, SET, SET);
    }
    lab
}

fn message(src: [u8; 16], dst: [u8; 16], kind: u8, hops: u8) -> Vec<u8> {
    let mut ip = wire::ip(src, dst, 58, &wire::icmp(kind, 0, [0; 4], &[0; 24]));
    ip[7] = hops;
    ip
}

/// Neighbour and listener discovery pass between a Pod and its host, whatever the policy.
#[test]
fn discovery_is_never_judged() {
    let mut lab = isolated();
    let (own, gateway) = (V6::addr(CLIENT), V6::link_local(1));
    for (src, dst, kind, hops) in [
        (own, gateway, 135, 255),
        (own, V6::addr(NODE), 136, 255),
        (V6::link_local(CLIENT), gateway, 136, 255),
        (UNSPECIFIED, ALL_NODES, 135, 255),
        (V6::link_local(CLIENT), ALL_NODES, 133, 255),
        (V6::link_local(CLIENT), ALL_NODES, 143, 1),
        (UNSPECIFIED, ALL_NODES, 131, 1),
    ] {
        let frame = lab.frame(CLIENT, &message(src, dst, kind, hops));
        assert_eq!(
            lab.send(&frame).0,
            Outcome::Pass(Reason::PassedToStack),
            "{kind} {src:?}"
        );
    }
    for (kind, hops) in [(133, 255), (134, 255), (135, 255), (136, 255), (130, 1)] {
        for dst in [own, ALL_NODES] {
            let ip = message(gateway, dst, kind, hops);
            let frame = Frame::new(host_mac(CLIENT), u32::from(CLIENT) + 10, V6::ETHERTYPE, &ip);
            assert_eq!(
                lab.receive(&frame).0,
                Outcome::Pass(Reason::DeliveredFromStack),
                "{kind}"
            );
        }
    }
}

/// A hop limit of 1 is no proof that nobody has forwarded a packet; its source is.
#[test]
fn forwarded_listener_messages_are_judged() {
    let mut lab = isolated();
    let own = V6::addr(CLIENT);
    for kind in [130, 131, 132, 143] {
        for from in [REMOTE, WORLD] {
            let ip = message(V6::addr(from), own, kind, 1);
            let frame = Frame::new(host_mac(CLIENT), u32::from(CLIENT) + 10, V6::ETHERTYPE, &ip);
            lab.kept_out(&frame, Reason::PolicyIngress);
        }
        for from in [V6::addr(NODE), V6::link_local(1), UNSPECIFIED] {
            let ip = message(from, own, kind, 1);
            let frame = Frame::new(host_mac(CLIENT), u32::from(CLIENT) + 10, V6::ETHERTYPE, &ip);
            lab.received(&frame);
        }
    }
}

/// A listener report has a hop-by-hop option (RFC 3810 section 5).
#[test]
fn listener_reports_with_a_router_alert_pass() {
    let mut lab = isolated();
    let report = message(V6::link_local(CLIENT), ALL_NODES, 143, 1);
    let alert = [58, 0, 5, 2, 0, 0, 1, 0];
    let header = wire::header(
        V6::link_local(CLIENT),
        ALL_NODES,
        0,
        1,
        8 + report.len() - 40,
    );
    let ip = [&header[..], &alert, &report[40..]].concat();
    let frame = lab.frame(CLIENT, &ip);
    assert_eq!(lab.send(&frame).0, Outcome::Pass(Reason::PassedToStack));
}

/// A Pod is no router, and discovery is no way to anyone but its node.
#[test]
fn discovery_is_no_way_out() {
    let mut lab = isolated();
    let own = V6::addr(CLIENT);
    let refused = |lab: &mut Lab<16, V6>, ip: Vec<u8>, reason| {
        let frame = lab.frame(CLIENT, &ip);
        lab.refused(&frame, reason);
    };
    // Router advertisements, redirects, listener queries.
    for (kind, hops) in [(134, 255), (137, 255), (130, 1)] {
        let ip = message(V6::link_local(CLIENT), ALL_NODES, kind, hops);
        refused(&mut lab, ip, Reason::UnsupportedLink);
    }
    // To another Pod, which would get it unchanged, and to the world.
    for dst in [V6::addr(SERVER), V6::addr(WORLD)] {
        refused(
            &mut lab,
            message(own, dst, 136, 255),
            Reason::UnsupportedLink,
        );
    }
    // A hop limit that a router has lowered: no discovery, but ICMP like any other.
    refused(
        &mut lab,
        message(own, V6::addr(SERVER), 136, 254),
        Reason::PolicyEgress,
    );
    refused(
        &mut lab,
        message(V6::link_local(7), V6::link_local(1), 136, 254),
        Reason::SpoofedSource,
    );
    // Anything else from a link-local address, another Pod's address, a group as the source.
    let udp = wire::ip(
        V6::link_local(CLIENT),
        V6::link_local(1),
        UDP,
        &wire::udp((1, 2), b""),
    );
    refused(&mut lab, udp, Reason::SpoofedSource);
    refused(
        &mut lab,
        message(V6::addr(SERVER), V6::link_local(1), 136, 255),
        Reason::SpoofedSource,
    );
    refused(
        &mut lab,
        message(ALL_NODES, V6::link_local(1), 136, 255),
        Reason::SpoofedSource,
    );
    // From the stack: forwarded discovery is judged.
    let ip = message(V6::addr(WORLD), own, 136, 254);
    let frame = Frame::new(mac(CLIENT), u32::from(CLIENT) + 10, V6::ETHERTYPE, &ip);
    lab.kept_out(&frame, Reason::PolicyIngress);
}
