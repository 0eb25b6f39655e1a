//! Random clusters through the compiler, the kernel's own maps and the real programs, against the
//! oracle: what becomes of packets is what the API's documentation says, for new flows, for their
//! answers, and for flows that live while the cluster changes.
//!
//! A sample of what the compiler's and the datapath's property tests try by the thousand without a
//! kernel. It ends after [`TIME`]; each case is made by its seed alone, which a failure prints, and
//! `HACHI_SEED` repeats.

use std::{
    net::IpAddr,
    time::{Duration, Instant, SystemTime},
};

use hachi_abi::{ConfigFlags, Endpoint, Reason};
use hachi_compile::{Image, Op, diff};
use hachi_kernel::{Datapath, Hook};
use hachi_policy::Side;

use crate::{
    flow::Flow,
    rng::Rng,
    support::{self, World as Surroundings, isolated},
    wire::{ACK, Body, Packet, SYN, TCP, UDP},
    world::{self, World},
};

/// For how long cases are tried.
const TIME: Duration = Duration::from_secs(8);
/// So many in any case.
const CASES: u64 = 10;
const FLOWS: usize = 60;
const ROUNDS: usize = 3;
const SCTP: u8 = 132;
const SPORT: u16 = 50_000;

/// The real node.
struct Node {
    datapath: Datapath,
    image: Image,
    /// Interfaces by the last part of Pods' addresses, two each: a Pod that is replaced gets another.
    interfaces: Vec<[u32; 2]>,
}

impl Node {
    fn new(surroundings: &Surroundings) -> Self {
        let veth = |host: u8, turn: u8| surroundings.veth(&format!("pod{host}x{turn}"));
        Self {
            datapath: surroundings.load(),
            image: Image::default(),
            interfaces: (0..=15)
                .map(|host| [veth(host, 0), veth(host, 1)])
                .collect(),
        }
    }

    /// Forgets everything.
    fn clear(&mut self) {
        self.datapath.clear().expect("empty tables");
        self.image = Image::default();
    }

    /// Brings the maps to what the compiler says.
    fn load(&mut self, mut image: Image) {
        image.flags = ConfigFlags::REDIRECT_PEER;
        for host in 1..=15 {
            for address in world::addresses(host) {
                if let Some(endpoint) = image.endpoints.get_mut(&address) {
                    let turn = endpoint.ifindex as usize % 2;
                    endpoint.ifindex = self.interfaces[usize::from(host)][turn];
                }
            }
        }
        let mut ops = diff(&self.image, &image);
        if self.datapath.revision().expect("a revision") == 0 {
            ops.push(Op::RaiseRevision);
        }
        self.datapath.apply(&ops).expect("the writes");
        self.image = image;
    }

    /// Sends a packet as this node would meet it; `None` if this node has neither end. Otherwise the
    /// reason that it is dropped for, if it is.
    fn travel(&self, flow: &Flow, flags: u8, back: bool) -> Option<Option<Reason>> {
        let (from, to, ports) = match back {
            false => (flow.source, flow.destination, (SPORT, flow.port)),
            true => (flow.destination, flow.source, (flow.port, SPORT)),
        };
        let body = match flow.protocol {
            TCP => Body::Tcp {
                ports,
                flags,
                data: b"data".to_vec(),
            },
            UDP => Body::Udp {
                ports,
                data: b"data".to_vec(),
            },
            SCTP => Body::Sctp {
                ports,
                chunks: vec![1, 0, 0, 4],
            },
            _ => Body::Icmp {
                kind: echo(from, back),
                code: 0,
                rest: [1, 2, 0, 1],
                data: b"data".to_vec(),
            },
        };
        let (hook, own, macs) = match (self.endpoint(from), self.endpoint(to)) {
            (Some(sender), _) => (Hook::FromPod, sender, (sender.mac, sender.host_mac)),
            (None, Some(receiver)) => (Hook::ToPod, receiver, (receiver.host_mac, receiver.mac)),
            (None, None) => return None,
        };
        let packet = Packet {
            source_mac: macs.0,
            destination_mac: macs.1,
            source: from,
            destination: to,
            body,
        };
        let drops = || -> Vec<(Reason, u64)> {
            let counters = self.datapath.counters().expect("counters");
            let drops = counters.into_iter().filter(|(reason, _)| reason.is_drop());
            drops.map(|(reason, it)| (reason, it.packets)).collect()
        };
        let before = drops();
        (self.datapath)
            .test_run(hook, own.ifindex, &packet.bytes(), 1)
            .expect("the program runs");
        let risen = before.iter().zip(drops()).find(|(b, after)| b.1 != after.1);
        Some(risen.map(|(_, (reason, _))| reason))
    }

    fn endpoint(&self, address: IpAddr) -> Option<&Endpoint> {
        self.image.endpoints.get(&address)
    }
}

/// The type of an echo request or its answer (RFC 792, RFC 4443).
fn echo(family: IpAddr, back: bool) -> u8 {
    match (family.is_ipv6(), back) {
        (false, false) => 8,
        (false, true) => 0,
        (true, false) => 128,
        (true, true) => 129,
    }
}

/// One flow, from its first packet on.
fn check(node: &Node, world: &World, flow: &Flow, flags: u8) -> Result<bool, String> {
    let (egress, ingress) = world.expected(flow);
    let Some(dropped) = node.travel(flow, flags, false) else {
        return Ok(false);
    };
    let told =
        |what: &str| format!("{flow:?}: {what} ({dropped:?}) against {egress:?}, {ingress:?}");
    match dropped {
        None if !(egress.allows() && ingress.allows()) => return Err(told("it passes")),
        None => {}
        Some(reason) => {
            let expected = match reason {
                Reason::PolicyEgress => matches!(egress, Side::Denied(_)),
                Reason::PolicyIngress => matches!(ingress, Side::Denied(_)),
                _ => false,
            };
            return if expected {
                Ok(true)
            } else {
                Err(told("it is dropped"))
            };
        }
    }
    if flow.source == flow.destination {
        return Ok(true);
    }
    match node.travel(flow, SYN | ACK, true) {
        Some(Some(reason)) => Err(told(&format!("its answer is dropped as {reason:?}"))),
        _ => Ok(true),
    }
}

/// One cluster that changes; returns how many packets were judged.
fn case(node: &mut Node, seed: u64) -> Result<usize, String> {
    let rng = &mut Rng::new(seed);
    let mut world = World::new(rng);
    let flows: Vec<Flow> = (0..FLOWS).map(|_| world.random_flow(rng)).collect();
    let mut judged = 0;
    for round in 0..ROUNDS {
        node.load(world.compile(rng).image);
        // Later rounds go on with what lives.
        let flags = if round == 0 { SYN } else { ACK };
        for flow in &flows {
            let checked = check(node, &world, flow, flags);
            judged +=
                usize::from(checked.map_err(|why| format!("round {round}: {why}\n{world:#?}"))?);
        }
        for _ in 0..=rng.below(4) {
            world.change(rng);
        }
    }
    Ok(judged)
}

#[test]
fn packets_meet_what_the_oracle_says() {
    support::require_datapath!();
    let given = std::env::var("HACHI_SEED").ok();
    let given: Option<u64> = given.map(|text| text.parse().expect("HACHI_SEED is a number"));
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let first = given.unwrap_or(now.as_nanos() as u64);
    isolated(|surroundings| {
        let node = &mut Node::new(surroundings);
        let end = Instant::now() + TIME;
        let (mut cases, mut judged) = (0, 0);
        while cases < CASES || Instant::now() < end {
            let seed = first.wrapping_add(cases);
            match case(node, seed) {
                Ok(more) => judged += more,
                Err(why) => panic!("HACHI_SEED={seed}: {why}"),
            }
            node.clear();
            cases += 1;
            if given.is_some() {
                break;
            }
        }
        println!("{cases} clusters from seed {first} on, {judged} flows judged");
        assert!(
            judged > 500 || given.is_some(),
            "{judged} flows are too few"
        );
    });
}
