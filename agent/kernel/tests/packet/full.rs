//! Tables that are full: new flows are refused and counted, live ones go on; and the walks that make
//! room again.

use hachi_abi::{Reason, map};
use hachi_compile::Op;
use hachi_kernel::{Flows, Walk};

use crate::{
    lab::{CLIENT_PORT, Lab, Net, PORT, ack, both_families, syn, syn_ack, udp},
    wire::{Body, RST, TCP},
};

/// Opens the connection from client to server.
fn open(lab: &Lab) {
    let there = lab.packet(lab.client, lab.server.ip, syn(PORT));
    lab.send(lab.client, &there.bytes()).delivered();
    let back = lab.packet(lab.server, lab.client.ip, syn_ack(PORT));
    lab.send(lab.server, &back.bytes()).delivered();
}

/// Deletes translations until the walk ends; returns how many entries `doomed` was true for.
fn collect(flows: &Flows, mut doomed: impl FnMut(&hachi_kernel::Translation) -> bool) -> u32 {
    let mut walk = Walk::default();
    let mut deleted = 0;
    loop {
        let part = flows
            .next_translations(&mut walk, &mut doomed)
            .expect("a walk");
        deleted += part.deleted;
        if part.last {
            return deleted;
        }
    }
}

fn used(lab: &Lab, names: [&str; 2]) -> u32 {
    let name = names[usize::from(lab.net == Net::V6)];
    lab.datapath.map_use().expect("maps")[name].0
}

both_families! {
    /// Conntrack: half of a flow is never left behind either.
    fn a_full_table_refuses_new_flows_only(lab) {
        open(lab);
        let capacity = lab.datapath.capacity(map::CONNTRACK[0]).expect("a map");
        let mut opened = 1;
        for port in 1.. {
            let out = lab.packet(lab.client, lab.remote, udp((port, PORT))).bytes();
            let outcome = lab.send(lab.client, &out);
            if outcome.reason == Reason::ConntrackFull {
                break;
            }
            outcome.passed();
            opened += 1;
            assert!(opened <= capacity / 2, "{opened} flows, {capacity} entries");
        }
        // All but what each CPU may hold back.
        assert!(opened * 2 + 2 >= capacity - capacity / 8, "{opened} flows, {capacity} entries");
        assert_eq!(used(lab, map::CONNTRACK), opened * 2);
        for _ in 0..100 {
            let there = lab.packet(lab.client, lab.server.ip, ack((CLIENT_PORT, PORT)));
            lab.send(lab.client, &there.bytes()).delivered();
            let back = lab.packet(lab.server, lab.client.ip, ack((PORT, CLIENT_PORT)));
            lab.send(lab.server, &back.bytes()).delivered();
        }
        // Also when they have to be written, as after every change of a policy.
        lab.apply(&[Op::RaiseRevision]);
        let there = lab.packet(lab.client, lab.server.ip, ack((CLIENT_PORT, PORT)));
        lab.send(lab.client, &there.bytes()).delivered();

        let flows = lab.datapath.flows().expect("the tables");
        let part = flows.all(|flow| flow.proto != TCP).expect("a walk");
        assert_eq!(part.deleted, (opened - 1) * 2);
        let out = lab.packet(lab.client, lab.remote, udp((9, PORT))).bytes();
        lab.send(lab.client, &out).passed();
    }

    /// Translations: those that are there keep their ports, and none is shared.
    fn a_full_table_of_translations_refuses_new_ones_only(lab) {
        lab.connect();
        let capacity = lab.datapath.capacity(map::NAT[0]).expect("a map");
        let out = |lab: &Lab, port| {
            let packet = lab.packet(lab.client, lab.world, udp((port, PORT))).bytes();
            lab.leave(&lab.send(lab.client, &packet).packet)
        };
        let mut ports = std::collections::BTreeMap::new();
        for port in 40_000.. {
            let outcome = out(lab, port);
            if outcome.reason == Reason::NatExhausted {
                break;
            }
            let seen = outcome.translated().body.ports().0;
            assert_eq!(ports.insert(seen, port), None, "{seen} is shared");
        }
        let count = u32::try_from(ports.len()).expect("few");
        assert!(count * 2 + 2 >= capacity - capacity / 8, "{count} flows, {capacity} entries");
        assert_eq!(used(lab, map::NAT), count * 2, "no half is left behind");
        for (seen, port) in &ports {
            assert_eq!(out(lab, *port).translated().body.ports().0, *seen);
        }
        let flows = lab.datapath.flows().expect("the tables");
        let deleted = collect(&flows, |one| one.reply && one.address.port() < 40_010);
        assert_eq!(deleted, 10);
        assert_eq!(used(lab, map::NAT), (count - 10) * 2, "both halves went");
        out(lab, 1_000).translated();
    }

    /// A connection's end is told to the walk, and its port is another's once it is deleted.
    fn a_port_is_free_when_its_flow_is_deleted(lab) {
        lab.connect();
        lab.apply(&[Op::SetPorts(50_000, 50_000)]);
        let out = |lab: &Lab, pod, port, flags| {
            let body = Body::Tcp { ports: (port, PORT), flags, data: Vec::new() };
            let packet = lab.packet(pod, lab.world, body).bytes();
            lab.leave(&lab.send(pod, &packet).packet)
        };
        out(lab, lab.client, 1_000, crate::wire::SYN).translated();
        out(lab, lab.other, 2_000, crate::wire::SYN).told(Reason::NatExhausted);
        let flows = lab.datapath.flows().expect("the tables");
        let phases = |flows: &Flows| {
            let mut seen = Vec::new();
            collect(flows, |one| { seen.push(one.phase); false });
            seen
        };
        assert_eq!(phases(&flows), [hachi_abi::NatFlags::OPENING; 2]);
        let body = Body::Tcp { ports: (PORT, 50_000), flags: crate::wire::SYN | crate::wire::ACK, data: Vec::new() };
        lab.arrive(&lab.wire(lab.world, lab.node, body).bytes()).delivered();
        assert_eq!(phases(&flows), [0; 2]);
        out(lab, lab.client, 1_000, RST).translated();
        assert_eq!(phases(&flows), [hachi_abi::NatFlags::RESET; 2]);
        assert_eq!(collect(&flows, |one| one.phase & hachi_abi::NatFlags::RESET != 0), 2);
        let seen = out(lab, lab.other, 2_000, crate::wire::SYN).translated();
        assert_eq!(seen.body.ports().0, 50_000);
    }
}
