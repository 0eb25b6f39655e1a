//! Ten thousand connections of fifty Pods to one address and port, by one address of the node: the real
//! programs and tables.

use std::collections::{BTreeMap, BTreeSet};

use hachi_abi::{NatFlags, Reason, map};
use hachi_kernel::{Capacities, Hook, Origin, Walk};

use crate::{
    lab::{Lab, Net, PORT, Pod, endpoint},
    support::{World, isolated, require_datapath},
    wire::{ACK, Body, Packet, RST, SYN},
};

const PODS: u8 = 50;
/// Source ports of each Pod; every Pod uses the same. A guest that is translated does with fewer.
fn ports() -> std::ops::Range<u16> {
    let count = if hachi_testutil::in_guest() { 20 } else { 200 };
    40_000..40_000 + count
}

fn pods(lab: &Lab) -> Vec<Pod> {
    (0..PODS)
        .map(|number| Pod {
            ip: match lab.net {
                Net::V4 => [10, 0, 3, number].into(),
                Net::V6 => [0xfd00, 0, 0, 3, 0, 0, 0, u16::from(number)].into(),
            },
            ifindex: lab.client.ifindex,
            mac: [2, 0, 0, 1, 1, number],
            host_mac: [2, 0, 0, 1, 2, number],
        })
        .collect()
}

fn tcp(ports: (u16, u16), flags: u8) -> Body {
    Body::Tcp {
        ports,
        flags,
        data: Vec::new(),
    }
}

/// A Pod's segment as it leaves the node.
fn leave(lab: &Lab, pod: Pod, port: u16, flags: u8) -> Packet {
    let out = lab.packet(pod, lab.world, tcp((port, PORT), flags)).bytes();
    let run = |hook, ifindex, packet: &[u8]| {
        let run = lab
            .datapath
            .test_run_from(Origin::Received, hook, ifindex, packet, 1);
        run.expect("the program runs")
    };
    let sent = run(Hook::FromPod, pod.ifindex, &out);
    Packet::parse(&run(Hook::ToNet, lab.uplink, &sent.packet).packet)
}

/// Opens every connection, has each answered, and checks who gets the answer; returns the ports.
fn open(lab: &Lab, pods: &[Pod]) -> BTreeSet<u16> {
    let mut flows = BTreeMap::new();
    for pod in pods {
        for port in ports() {
            let left = leave(lab, *pod, port, SYN);
            assert_eq!((left.source, left.destination), (lab.node, lab.world));
            let seen = left.body.ports().0;
            let other = flows.insert(seen, (*pod, port));
            assert!(other.is_none(), "{seen} is shared: {other:?}");
        }
    }
    for (seen, (pod, port)) in &flows {
        let back = lab
            .wire(lab.world, lab.node, tcp((PORT, *seen), SYN | ACK))
            .bytes();
        let run = lab.datapath.test_run(Hook::FromNet, lab.uplink, &back, 1);
        let got = Packet::parse(&run.expect("the program runs").packet);
        assert_eq!((got.destination, got.destination_mac), (pod.ip, pod.mac));
        assert_eq!(got.body.ports(), (PORT, *port));
    }
    flows.into_keys().collect()
}

fn crowd(world: &World, net: Net) {
    let world = World {
        capacities: Capacities {
            conntrack: 32_768,
            nat: 32_768,
            ..world.capacities.clone()
        },
        ..world.clone()
    };
    let mut lab = Lab::bare(&world, net);
    lab.configure();
    lab.connect();
    let pods = pods(&lab);
    let ops: Vec<_> = pods.iter().map(|pod| endpoint(*pod, 0, 0)).collect();
    lab.apply(&ops);
    let first = open(&lab, &pods);
    assert_eq!(first.len(), usize::from(PODS) * ports().len());
    let drops: Vec<_> = lab
        .datapath
        .counters()
        .expect("counters")
        .into_iter()
        .filter(|(reason, counter)| reason.is_drop() && counter.packets > 0)
        .collect();
    assert!(drops.is_empty(), "{drops:?}");

    // They end; the collector takes their entries, and every port can be had again.
    for pod in &pods {
        for port in ports() {
            leave(&lab, *pod, port, RST);
        }
    }
    let flows = lab.datapath.flows().expect("the tables");
    let mut walk = Walk::default();
    while !flows
        .next_translations(&mut walk, |one| one.phase & NatFlags::RESET != 0)
        .expect("a walk")
        .last
    {}
    let family = usize::from(net == Net::V6);
    assert_eq!(lab.datapath.map_use().expect("maps")[map::NAT[family]].0, 0);
    let second = open(&lab, &pods);
    assert_eq!(second.len(), first.len());
    let exhausted = lab.datapath.counters().expect("counters");
    assert!(
        exhausted
            .iter()
            .all(|(reason, counter)| *reason != Reason::NatExhausted || counter.packets == 0)
    );
}

#[test]
fn ten_thousand_connections_v4() {
    require_datapath!();
    isolated(|world| crowd(world, Net::V4));
}

#[test]
fn ten_thousand_connections_v6() {
    require_datapath!();
    isolated(|world| crowd(world, Net::V6));
}
