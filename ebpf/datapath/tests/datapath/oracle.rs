//! Random clusters through the compiler and the datapath against the oracle: what becomes of real
//! packets of a flow is what the API's documentation says, for new flows, for their answers, and
//! for flows that live while the cluster changes.

use std::{collections::HashMap, net::IpAddr};

use hachi_abi::{Peer, Reason, Tuple};
use hachi_compile::{Compiled, Image};
use hachi_datapath::{Outcome, V4, V6};
use hachi_policy::Side;
use proptest::prelude::*;

use crate::{
    flow::Flow,
    lab::{Lab, Net, TCP, UDP},
    rng::Rng,
    wire::{self, Frame},
    world::World,
};

const SYN: u8 = 2;
const ACK: u8 = 16;
const SCTP: u8 = 132;
const SPORT: u16 = 50_000;

fn bytes<const N: usize>(ip: IpAddr) -> Option<[u8; N]> {
    match ip {
        IpAddr::V4(ip) => ip.octets()[..].try_into().ok(),
        IpAddr::V6(ip) => ip.octets()[..].try_into().ok(),
    }
}

/// Puts an image into the lab's maps; the flows stay.
fn load<const N: usize, F: Net<N>>(lab: &mut Lab<N, F>, image: &Image) {
    let tables = &mut lab.tables;
    tables.revision += 1;
    tables.endpoints = of_family(&image.endpoints);
    tables.peers = of_family(&image.peers);
    let blocks = image.cidrs.iter();
    tables.blocks = blocks
        .filter_map(|(net, peer): (_, &Peer)| {
            Some((bytes(net.addr())?, usize::from(net.prefix_len()), *peer))
        })
        .collect();
    tables.policy = image.policy.iter().map(|(k, v)| (*k, *v)).collect();
}

fn of_family<const N: usize, T: Copy>(
    all: &std::collections::BTreeMap<IpAddr, T>,
) -> HashMap<[u8; N], T> {
    let own = all.iter();
    own.filter_map(|(ip, value)| Some((bytes(*ip)?, *value)))
        .collect()
}

/// A packet of a flow; `back`: one of its answers.
fn packet<const N: usize, F: Net<N>>(flow: &Flow, flags: u8, back: bool) -> Option<Vec<u8>> {
    let (source, destination) = (bytes::<N>(flow.source)?, bytes::<N>(flow.destination)?);
    let (source, destination, ports) = if back {
        (destination, source, (flow.port, SPORT))
    } else {
        (source, destination, (SPORT, flow.port))
    };
    let (number, body) = match flow.protocol {
        TCP => (TCP, wire::tcp(ports, flags, b"data")),
        UDP => (UDP, wire::udp(ports, b"data")),
        SCTP => (SCTP, wire::sctp(ports, &[1, 0, 0, 4])),
        _ => {
            let kind = F::ECHO[usize::from(back)];
            (F::ICMP, wire::icmp(kind, 0, [1, 2, 0, 1], b"data"))
        }
    };
    Some(wire::ip(source, destination, number, &body))
}

/// Sends it as this node would meet it; `None` if this node has neither end.
fn travel<const N: usize, F: Net<N>>(
    lab: &mut Lab<N, F>,
    from: IpAddr,
    to: IpAddr,
    ip: &[u8],
) -> Option<Outcome> {
    let sender = lab.tables.endpoints.get(&bytes::<N>(from)?).copied();
    let receiver = lab.tables.endpoints.get(&bytes::<N>(to)?).copied();
    if let Some(sender) = sender {
        let frame = Frame::new(sender.mac, sender.ifindex, F::ETHERTYPE, ip);
        let (outcome, _) = lab.send(&frame);
        if let (Outcome::RedirectPeer { ifindex }, Some(receiver)) = (outcome, receiver) {
            assert_eq!(ifindex, receiver.ifindex, "to another Pod");
        }
        return Some(outcome);
    }
    let receiver = receiver?;
    let frame = Frame::new(receiver.host_mac, receiver.ifindex, F::ETHERTYPE, ip);
    Some(lab.receive(&frame).0)
}

fn verdict(outcome: Outcome) -> Result<bool, String> {
    match outcome {
        Outcome::Drop(Reason::PolicyEgress | Reason::PolicyIngress) => Ok(false),
        Outcome::Drop(other) => Err(format!("dropped as {other:?}")),
        _ => Ok(true),
    }
}

/// One flow, from its first packet on.
fn check<const N: usize, F: Net<N>>(
    lab: &mut Lab<N, F>,
    world: &World,
    compiled: &Compiled,
    flow: &Flow,
    flags: u8,
) -> Result<(), String> {
    let Some(ip) = packet::<N, F>(flow, flags, false) else {
        return Ok(());
    };
    let (egress, ingress) = world.expected(flow);
    let allowed = egress.allows() && ingress.allows();
    let Some(outcome) = travel(lab, flow.source, flow.destination, &ip) else {
        return Ok(());
    };
    let told = |what: &str| format!("{flow:?}: {what} {outcome:?} against {egress:?}, {ingress:?}");
    if verdict(outcome).map_err(|error| told(&error))? != allowed {
        return Err(told("it is"));
    }
    if !allowed || flow.source == flow.destination {
        return Ok(());
    }
    if flow.protocol == TCP || flow.protocol == UDP || flow.protocol == SCTP {
        let tuple = Tuple {
            src: bytes(flow.source).expect("of this family"),
            dst: bytes(flow.destination).expect("of this family"),
            sport: SPORT.to_be_bytes(),
            dport: flow.port.to_be_bytes(),
            proto: flow.protocol,
            pad: [0; 3],
        };
        let entry = lab.tables.flows.borrow().get(&tuple).copied();
        let entry = entry.ok_or_else(|| told("it is not tracked"))?;
        for (side, rule) in [(&egress, entry.egress_rule), (&ingress, entry.ingress_rule)] {
            if let Side::Allowed(rules) = side
                && !compiled.rules.get(&rule).is_some_and(|r| rules.contains(r))
            {
                return Err(told(&format!("rule {rule} does not allow it:")));
            }
        }
    }
    let answer = packet::<N, F>(flow, SYN | ACK, true).expect("of this family");
    match travel(lab, flow.destination, flow.source, &answer) {
        Some(Outcome::Drop(reason)) => Err(told(&format!("its answer is dropped as {reason:?}:"))),
        _ => Ok(()),
    }
}

fn history<const N: usize, F: Net<N>>(seed: u64) -> Result<(), TestCaseError> {
    let rng = &mut Rng::new(seed);
    let mut world = World::new(rng);
    let lab = &mut Lab::<N, F>::new();
    lab.tables.services.clear();
    let flows: Vec<Flow> = (0..60).map(|_| world.random_flow(rng)).collect();
    for round in 0..3 {
        let compiled = world.compile(rng);
        load(lab, &compiled.image);
        for flow in &flows {
            // Later rounds go on with what lives.
            let flags = if round == 0 { SYN } else { ACK };
            let checked = check(lab, &world, &compiled, flow, flags);
            prop_assert!(
                checked.is_ok(),
                "round {round}: {}\n{world:#?}",
                checked.unwrap_err()
            );
        }
        for _ in 0..=rng.below(4) {
            world.change(rng);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(crate::cases::cases(60))]

    #[test]
    fn packets_meet_what_the_oracle_says_v4(seed: u64) {
        history::<4, V4>(seed)?;
    }

    #[test]
    fn packets_meet_what_the_oracle_says_v6(seed: u64) {
        history::<16, V6>(seed)?;
    }
}
