//! Nanoseconds a packet in the programs themselves (BPF_PROG_TEST_RUN), by kind of packet.
//!
//! Established packets are run many times in one call, so the clock's cost vanishes. A packet that
//! opens a flow differs from run to run (its source port), so each is one call of its own; the row
//! `floor` is what such a call measures of a packet that is let go at once.
//!
//! A run gets the packet as the run before left it. So the client's MAC address is that of every
//! gateway here, and there are two Services, each with the other's address as its backend: every
//! run rewrites the packet, to one and the other in turn.
//!
//! Usage, as root: `cargo run --release -p hachi-kernel --example packet_bench`

#[path = "../tests/support/mod.rs"]
#[expect(unused_macros, unused_imports, reason = "shared with the packet tests")]
mod support;

#[path = "../tests/packet/lab.rs"]
#[expect(
    dead_code,
    unused_macros,
    unused_imports,
    reason = "shared with the packet tests"
)]
mod lab;

#[path = "../tests/packet/wire.rs"]
#[expect(dead_code, reason = "shared with the packet tests")]
mod wire;

use std::net::SocketAddr;

use hachi_abi::Service;
use hachi_compile::{Frontend, Op, SlotsId};
use hachi_kernel::{Capacities, Hook};
use lab::{CLASS_CLIENT, CLASS_SERVER, CLIENT_PORT, Lab, Net, OTHER_SET, PORT, SET, ack, syn};
use support::{World, isolated};
use wire::{Body, Packet, SYN, TCP};

/// Runs in one call.
const REPEAT: u32 = 200_000;
/// Calls for one row of single runs.
const SINGLES: u16 = 20_000;
/// Repetitions of which the median counts.
const ROUNDS: usize = 7;

fn main() {
    if !hachi_testutil::is_root() || !hachi_kernel::built_with_object() {
        eprintln!("needs root and the eBPF object (cargo xtask build)");
        std::process::exit(1);
    }
    let mut rows = Vec::<(&str, Vec<u64>)>::new();
    for net in [Net::V4, Net::V6] {
        isolated(|world| {
            let world = World {
                capacities: Capacities::default(),
                ..world.clone()
            };
            let mut lab = Lab::bare(&world, net);
            for (name, value) in measure(&mut lab) {
                match rows.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, values)) => values.push(value),
                    None => rows.push((name, vec![value])),
                }
            }
        });
    }
    println!("{:<34}{:>8}{:>8}", "ns per packet", "IPv4", "IPv6");
    for (name, values) in rows {
        print!("{name:<34}");
        values.iter().for_each(|value| print!("{value:>8}"));
        println!();
    }
}

fn measure(lab: &mut Lab) -> Vec<(&'static str, u64)> {
    let mut rows = Vec::new();
    let mac = lab.client.mac;
    for pod in [&mut lab.client, &mut lab.server, &mut lab.other] {
        pod.host_mac = mac;
    }
    lab.configure();
    let there = lab.packet(lab.client, lab.server.ip, ack((CLIENT_PORT, PORT)));
    let open = lab.packet(lab.client, lab.server.ip, syn(PORT));

    let mut arp = there.bytes();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    rows.push(("floor, one call a packet", singles(lab, |_| arp.clone())));

    lab.send(lab.client, &open.bytes());
    rows.push(("established, no policy", repeated(lab, &there)));

    lab.allow(SET, CLASS_CLIENT, TCP, PORT);
    lab.allow(OTHER_SET, CLASS_SERVER, TCP, PORT);
    lab.isolate(lab.server, SET, 0);
    lab.isolate(lab.client, 0, OTHER_SET);
    lab.send(lab.client, &open.bytes());
    rows.push(("established, policy at both ends", repeated(lab, &there)));
    rows.push((
        "new, policy at both ends",
        singles(lab, |port| opener(lab, port)),
    ));

    let mut denied = there.clone();
    denied.destination = lab.other.ip;
    rows.push(("denied by policy", repeated(lab, &denied)));
    denied.source_mac[5] ^= 1;
    rows.push(("denied as spoofed", repeated(lab, &denied)));

    let class = hachi_abi::Peer {
        class: CLASS_SERVER,
        flags: 0,
    };
    lab.apply(&[
        Op::PutPeer(lab.other.ip, class),
        lab::endpoint(lab.other, SET, 0),
    ]);
    for (id, front, back) in [
        (1, lab.server.ip, lab.other.ip),
        (2, lab.other.ip, lab.server.ip),
    ] {
        let frontend = Frontend {
            addr: front,
            port: PORT,
            proto: TCP,
            scope: 0,
        };
        let backend = SocketAddr::new(back, PORT);
        lab.apply(&[
            Op::PutBackend {
                service: SlotsId {
                    v6: backend.is_ipv6(),
                    id,
                },
                slot: 0,
                backend,
            },
            Op::PutService(
                frontend,
                Service {
                    id,
                    count: 1,
                    flags: 0,
                    affinity: 0,
                    table: 0,
                },
            ),
            Op::RaiseRevision,
        ]);
    }
    let other = lab.packet(lab.client, lab.other.ip, syn(PORT));
    lab.send(lab.client, &other.bytes());
    let rewritten = lab.send(lab.client, &open.bytes()).delivered();
    assert_eq!(
        rewritten.destination, lab.other.ip,
        "each Service leads to the other"
    );
    rows.push(("established, through a Service", repeated(lab, &there)));
    rows.push((
        "new, through a Service",
        singles(lab, |port| opener(lab, port)),
    ));
    lab.apply(&many_services(lab));
    rows.push((
        "the same among 100 000 Services",
        singles(lab, |port| opener(lab, port)),
    ));
    rows
}

/// Services with three backends each, beside those that are asked.
fn many_services(lab: &Lab) -> Vec<Op> {
    let v6 = lab.server.ip.is_ipv6();
    let address = |block: u8, n: u32| -> std::net::IpAddr {
        let [_, a, b, c] = n.to_be_bytes();
        if v6 {
            let mut bytes = [0; 16];
            bytes[..2].copy_from_slice(&[0xfd, block]);
            bytes[13..].copy_from_slice(&[a, b, c]);
            bytes.into()
        } else {
            [block, a, b, c].into()
        }
    };
    let mut ops = Vec::new();
    let mut frontends = Vec::new();
    for n in 0..100_000 {
        let id = 1_000 + n;
        for slot in 0..3 {
            ops.push(Op::PutBackend {
                service: SlotsId { v6, id },
                slot,
                backend: SocketAddr::new(address(11, 3 * n + slot), PORT),
            });
        }
        let frontend = Frontend {
            addr: address(12, n),
            port: PORT,
            proto: TCP,
            scope: 0,
        };
        let service = Service {
            id,
            count: 3,
            ..Service::default()
        };
        frontends.push(Op::PutService(frontend, service));
    }
    ops.append(&mut frontends);
    ops
}

fn opener(lab: &Lab, port: u16) -> Vec<u8> {
    let body = Body::Tcp {
        ports: (port, PORT),
        flags: SYN,
        data: Vec::new(),
    };
    lab.packet(lab.client, lab.server.ip, body).bytes()
}

/// One packet, many times in each call.
fn repeated(lab: &Lab, packet: &Packet) -> u64 {
    let packet = packet.bytes();
    median((0..ROUNDS).map(|_| call(lab, &packet, REPEAT)).collect())
}

/// A packet a call, each from another port.
fn singles(lab: &Lab, packet: impl Fn(u16) -> Vec<u8>) -> u64 {
    median(
        (0..SINGLES)
            .map(|number| call(lab, &packet(1024 + number), 1))
            .collect(),
    )
}

fn call(lab: &Lab, packet: &[u8], repeat: u32) -> u64 {
    let run = lab
        .datapath
        .test_run(Hook::FromPod, lab.client.ifindex, packet, repeat)
        .expect("the program runs");
    u64::try_from(run.duration.as_nanos()).expect("a short time")
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}
