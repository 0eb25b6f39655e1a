//! A Pod sends from its own address and MAC only.

use hachi_abi::{Endpoint, Reason};
use hachi_compile::Op;

use crate::{
    lab::{OK, PORT, both_families, syn},
    wire::ETHERNET,
};

both_families! {
    /// Another Pod's address, or anybody's.
    fn a_borrowed_address_is_dropped(lab) {
        for source in [lab.server.ip, lab.remote, lab.node, lab.world, lab.service] {
            let mut packet = lab.packet(lab.client, lab.other.ip, syn(PORT));
            packet.source = source;
            lab.send(lab.client, &packet.bytes()).dropped(Reason::SpoofedSource);
        }
        assert!(lab.datapath.conntrack().expect("the flows").is_empty());
    }

    /// Another MAC address.
    fn a_borrowed_mac_is_dropped(lab) {
        let mut packet = lab.packet(lab.client, lab.server.ip, syn(PORT));
        packet.source_mac = lab.server.mac;
        lab.send(lab.client, &packet.bytes()).dropped(Reason::SpoofedSource);
        for bit in 0..48 {
            packet.source_mac = lab.client.mac;
            packet.source_mac[bit / 8] ^= 1 << (bit % 8);
            lab.send(lab.client, &packet.bytes()).dropped(Reason::SpoofedSource);
        }
    }

    /// The right address and MAC on another Pod's interface.
    fn anothers_interface_is_dropped(lab) {
        let packet = lab.packet(lab.client, lab.server.ip, syn(PORT));
        lab.send(lab.other, &packet.bytes()).dropped(Reason::SpoofedSource);
        lab.send(lab.client, &packet.bytes()).delivered();
    }

    /// An address that moved to another interface.
    fn a_reused_address_belongs_to_the_new_pod(lab) {
        let endpoint = Endpoint {
            ifindex: lab.other.ifindex,
            mac: lab.other.mac,
            host_mac: lab.other.host_mac,
            ..Endpoint::default()
        };
        lab.apply(&[Op::PutEndpoint(lab.client.ip, endpoint), Op::RaiseRevision]);
        let packet = lab.packet(lab.client, lab.server.ip, syn(PORT));
        lab.send(lab.client, &packet.bytes()).dropped(Reason::SpoofedSource);
        let packet = crate::wire::Packet { source_mac: lab.other.mac, ..packet };
        lab.send(lab.other, &packet.bytes()).delivered();
    }

    /// ARP and other link protocols that are not IP go to the stack; VLAN tags do not.
    fn only_plain_frames_leave_a_pod(lab) {
        let packet = lab.packet(lab.client, lab.server.ip, syn(PORT)).bytes();
        let mut arp = packet.clone();
        arp[12..ETHERNET].copy_from_slice(&[0x08, 0x06]);
        let outcome = lab.send(lab.client, &arp);
        assert_eq!((outcome.verdict, outcome.reason), (OK, Reason::NotIp));
        for tag in [[0x81, 0x00], [0x88, 0xa8]] {
            let tagged = [&packet[..12], &tag[..], &[0, 5], &packet[12..]].concat();
            lab.send(lab.client, &tagged).dropped(Reason::UnsupportedLink);
        }
    }
}
