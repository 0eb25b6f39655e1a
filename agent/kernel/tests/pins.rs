//! What outlives an agent: maps with their content, and what a new agent makes of them.

mod support;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map, MapData};
use hachi_abi::{ABI_VERSION, Config, Endpoint, Peer, PolicyEntry, PolicyKey, Service};
use hachi_compile::{Frontend, Image, Op, Slots, SlotsId};
use hachi_kernel::{Capacities, Datapath, KernelError, LoadOptions, Role, remove_all};
use support::{ip, isolated, require_datapath};

fn addr(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn frontend(text: &str) -> Frontend {
    let socket: SocketAddr = text.parse().expect("a socket address");
    Frontend {
        addr: socket.ip(),
        port: socket.port(),
        proto: 6,
        scope: 0,
    }
}

fn policy_key(set: u32) -> PolicyKey {
    PolicyKey {
        set,
        class: 2,
        port: 80_u16.to_be_bytes(),
        plen: 16,
        proto: 6,
    }
}

/// Something in every map, of both families.
fn sample() -> (Vec<Op>, Image) {
    let mut image = Image {
        flags: 1,
        ..Image::default()
    };
    let mut ops = vec![Op::SetFlags(1)];
    for set in 1..4 {
        let entry = PolicyEntry {
            verdict: 1,
            rule: set + 10,
        };
        ops.push(Op::PutPolicy(policy_key(set), entry));
        image.policy.insert(policy_key(set), entry);
    }
    for (number, address) in ["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"]
        .into_iter()
        .enumerate()
    {
        let address = addr(address);
        let ifindex = u32::try_from(number).expect("few") + 7;
        let endpoint = Endpoint {
            ifindex,
            mac: [2, 0, 0, 0, 0, 1],
            ..Endpoint::default()
        };
        let peer = Peer {
            class: ifindex * 3,
            flags: 0,
        };
        ops.extend([
            Op::PutEndpoint(address, endpoint),
            Op::PutPeer(address, peer),
        ]);
        image.endpoints.insert(address, endpoint);
        image.peers.insert(address, peer);
    }
    for block in ["0.0.0.0/0", "10.1.0.0/16", "::/0", "fd00:1::/48"] {
        let block = block.parse().expect("a block");
        let peer = Peer { class: 5, flags: 0 };
        ops.push(Op::PutCidr(block, peer));
        image.cidrs.insert(block, peer);
    }
    for (id, front, backends) in [
        (21, "10.96.0.10:80", ["10.0.0.1:8080", "10.0.0.2:8080"]),
        (22, "[fd00:96::10]:80", ["[fd00::1]:8080", "[fd00::2]:8080"]),
    ] {
        let backends = backends
            .map(|text| text.parse::<SocketAddr>().expect("a socket"))
            .to_vec();
        for (slot, backend) in (0..).zip(&backends) {
            ops.push(Op::PutBackend {
                service: slots_id(id),
                slot,
                backend: *backend,
            });
        }
        let service = Service {
            id,
            count: 2,
            flags: 0,
            affinity: 30,
            table: 100,
        };
        let range = match id {
            21 => "192.0.2.0/24",
            _ => "2001:db8::/48",
        };
        let slots = Slots {
            members: backends.clone(),
            backends,
            table: (0..100).map(|place| place % 2).collect(),
            ranges: vec![range.parse().expect("a block")],
        };
        let members = slots.members.iter();
        ops.extend(members.map(|member| Op::PutMember(slots_id(id), *member)));
        ops.push(Op::PutRange(slots_id(id), slots.ranges[0]));
        for (piece, slots) in (0..).zip(slots.pieces()) {
            ops.push(Op::PutPiece {
                service: slots_id(id),
                piece,
                slots,
            });
        }
        ops.push(Op::PutService(frontend(front), service));
        image.services.insert(frontend(front), service);
        image.slots.insert(slots_id(id), Arc::new(slots));
    }
    ops.push(Op::RaiseRevision);
    (ops, image)
}

/// The family of the sample's ids.
fn slots_id(id: u32) -> SlotsId {
    SlotsId { v6: id == 22, id }
}

#[test]
fn a_new_agent_finds_what_the_last_one_wrote() {
    require_datapath!();
    isolated(|world| {
        let (ops, image) = sample();
        let mut datapath = world.load();
        assert_eq!(datapath.snapshot().expect("empty maps"), Image::default());
        assert_eq!(datapath.revision().expect("a revision"), 0);
        datapath.apply(&ops).expect("applied");
        assert_eq!(datapath.snapshot().expect("a snapshot"), image);
        drop(datapath);

        let mut datapath = world.load();
        assert_eq!(datapath.snapshot().expect("a snapshot"), image);
        assert_eq!(datapath.revision().expect("a revision"), 1);
        datapath.apply(&ops).expect("applied once more");
        assert_eq!(datapath.snapshot().expect("a snapshot"), image);
        assert_eq!(datapath.revision().expect("a revision"), 2);
    });
}

#[test]
fn every_write_can_be_taken_back() {
    require_datapath!();
    isolated(|world| {
        let (ops, image) = sample();
        let mut datapath = world.load();
        datapath.apply(&ops).expect("applied");
        let mut back = Vec::new();
        back.extend(image.services.keys().map(|key| Op::DeleteService(*key)));
        for (service, slots) in &image.slots {
            let service = *service;
            // Slots 2 and 3 were never there: passed over, in the middle of a batch.
            for slot in [2, 0, 3, 1] {
                back.push(Op::DeleteBackend { service, slot });
            }
            let members = slots.members.iter();
            back.extend(members.map(|member| Op::DeleteMember(service, *member)));
            back.push(Op::DeleteRange(service, slots.ranges[0]));
            back.extend((0..2).map(|piece| Op::DeletePiece { service, piece }));
        }
        back.extend(image.cidrs.keys().map(|key| Op::DeleteCidr(*key)));
        back.extend(image.peers.keys().map(|key| Op::DeletePeer(*key)));
        back.extend(image.endpoints.keys().map(|key| Op::DeleteEndpoint(*key)));
        back.push(Op::DeletePolicy(policy_key(99)));
        back.extend(image.policy.keys().map(|key| Op::DeletePolicy(*key)));
        back.push(Op::SetFlags(0));
        for _ in 0..2 {
            datapath
                .apply(&back)
                .expect("deleting what is not there is success");
            assert_eq!(datapath.snapshot().expect("a snapshot"), Image::default());
        }
        for (name, (entries, _)) in datapath.map_use().expect("the maps' use") {
            assert_eq!(entries, 0, "{name}");
        }
    });
}

#[test]
fn writes_keep_their_order_within_a_batch() {
    require_datapath!();
    isolated(|world| {
        let mut datapath = world.load();
        let (a, b) = (addr("10.0.0.1"), addr("10.0.0.2"));
        let peer = |class| Peer { class, flags: 0 };
        let ops = [
            Op::PutPeer(a, peer(1)),
            Op::PutPeer(b, peer(1)),
            Op::PutPeer(a, peer(2)),
            Op::DeletePeer(b),
            Op::DeletePeer(b),
            Op::PutPeer(b, peer(3)),
            Op::PutPeer(b, peer(4)),
        ];
        datapath.apply(&ops).expect("applied");
        let peers = datapath.snapshot().expect("a snapshot").peers;
        assert_eq!(peers, [(a, peer(2)), (b, peer(4))].into());
    });
}

#[test]
fn the_first_apply_configures_and_the_revision_is_never_zero() {
    require_datapath!();
    isolated(|world| {
        let mut datapath = world.load();
        datapath.apply(&[]).expect("applied");
        assert_eq!(datapath.revision().expect("a revision"), 1);
        datapath.apply(&[]).expect("applied");
        assert_eq!(datapath.revision().expect("a revision"), 1);

        let pin = world.pin_root.join(format!("v{ABI_VERSION}/CONFIG"));
        let map = Map::Array(MapData::from_pin(pin).expect("the pinned map"));
        let mut config = Array::<_, Config>::try_from(map).expect("an array");
        let last = Config {
            revision: u32::MAX,
            flags: 1,
            ..Config::default()
        };
        config.set(0, last, 0).expect("written");
        datapath.apply(&[Op::RaiseRevision]).expect("applied");
        assert_eq!(datapath.revision().expect("a revision"), 1);
        assert_eq!(datapath.snapshot().expect("a snapshot").flags, 1);
    });
}

#[test]
fn a_full_map_is_named() {
    require_datapath!();
    isolated(|world| {
        let capacities = Capacities {
            peers: 16,
            cidrs: 16,
            ..Capacities::default()
        };
        let options = LoadOptions {
            capacities,
            ..world.options()
        };
        let mut datapath = Datapath::load(&options).expect("loaded");
        let peer = Peer { class: 1, flags: 0 };
        for (map, one, many) in [
            (
                "PEERS_V4",
                Op::PutPeer(addr("10.9.9.9"), peer),
                addresses("10.0.0", peer),
            ),
            (
                "PEERS_V6",
                Op::PutPeer(addr("fd00::9"), peer),
                addresses("fd00::1", peer),
            ),
            (
                "CIDRS_V4",
                Op::PutCidr(addr("10.9.9.9").into(), peer),
                blocks("10.0.0", peer),
            ),
            (
                "CIDRS_V6",
                Op::PutCidr(addr("fd00::9").into(), peer),
                blocks("fd00::1", peer),
            ),
        ] {
            datapath.apply(&many[..16]).expect("it has room for 16");
            // As a batch and as a single write.
            for ops in [&many[..], &[one]] {
                let error = datapath.apply(ops).expect_err("no room");
                let KernelError::Full {
                    map: name,
                    capacity,
                    ..
                } = &error
                else {
                    panic!("{error}");
                };
                assert_eq!((name.as_str(), *capacity), (map, 16));
                assert!(error.to_string().contains("give it more room"), "{error}");
            }
            assert_eq!(datapath.map_use().expect("the use")[map], (16, 16));
        }
    });
}

fn addresses(prefix: &str, peer: Peer) -> Vec<Op> {
    let separator = if prefix.contains(':') { ':' } else { '.' };
    (0..40)
        .map(|n| Op::PutPeer(addr(&format!("{prefix}{separator}{n}")), peer))
        .collect()
}

fn blocks(prefix: &str, peer: Peer) -> Vec<Op> {
    let separator = if prefix.contains(':') { ':' } else { '.' };
    (0..40)
        .map(|n| Op::PutCidr(addr(&format!("{prefix}{separator}{n}")).into(), peer))
        .collect()
}

#[test]
fn a_map_of_another_layout_is_refused() {
    require_datapath!();
    isolated(|world| {
        drop(world.load());
        let pin = world.pin_root.join(format!("v{ABI_VERSION}/POLICY"));
        std::fs::remove_file(&pin).expect("the pin");
        let other = HashMap::<_, u32, u32>::create(8, 0).expect("a map");
        other.pin(&pin).expect("pinned");
        let error = Datapath::load(&world.options()).expect_err("refused");
        let text = error.to_string();
        let KernelError::Layout {
            map, what, pinned, ..
        } = error
        else {
            panic!("{text}")
        };
        assert_eq!((map.as_str(), what, pinned), ("POLICY", "key size", true));
        assert!(text.contains("hachi uninstall"), "{text}");

        std::fs::remove_file(&pin).expect("the pin");
        let other = Array::<_, u64>::create(8, 0).expect("a map");
        other.pin(&pin).expect("pinned");
        let error = Datapath::load(&world.options()).expect_err("refused");
        assert!(
            matches!(error, KernelError::Layout { what: "type", .. }),
            "{error}"
        );
    });
}

#[test]
fn a_pinned_map_keeps_its_capacity() {
    require_datapath!();
    isolated(|world| {
        let capacities = Capacities {
            services: 32,
            ..Capacities::default()
        };
        let options = LoadOptions {
            capacities,
            ..world.options()
        };
        drop(Datapath::load(&options).expect("loaded"));
        let datapath = world.load();
        assert_eq!(datapath.map_use().expect("the use")["SERVICES_V4"], (0, 32));
    });
}

#[test]
fn backends_without_a_service_are_removed_at_the_next_start() {
    require_datapath!();
    isolated(|world| {
        let backend = |id, slot, text: &str| {
            let backend: SocketAddr = text.parse().expect("a socket");
            let v6 = backend.is_ipv6();
            Op::PutBackend {
                service: SlotsId { v6, id },
                slot,
                backend,
            }
        };
        let member = |id| {
            let backend = "10.0.0.1:80".parse().expect("a socket");
            Op::PutMember(SlotsId { v6: false, id }, backend)
        };
        let range = |id| {
            let range = "10.0.0.0/8".parse().expect("a block");
            Op::PutRange(SlotsId { v6: false, id }, range)
        };
        let piece = |id, piece| Op::PutPiece {
            service: SlotsId { v6: false, id },
            piece,
            slots: [0; 64],
        };
        let mut datapath = world.load();
        let service = Service {
            id: 1,
            count: 1,
            flags: 0,
            affinity: 0,
            table: 64,
        };
        datapath
            .apply(&[
                member(1),
                member(2),
                range(1),
                range(2),
                piece(1, 0),
                piece(1, 1),
                piece(2, 0),
                backend(1, 0, "10.0.0.1:80"),
                backend(1, 1, "10.0.0.2:80"),
                backend(2, 0, "10.0.0.3:80"),
                backend(3, 0, "[fd00::3]:80"),
                Op::PutService(frontend("10.96.0.1:80"), service),
            ])
            .expect("applied");
        drop(datapath);
        let datapath = world.load();
        let entries = datapath.map_use().expect("the use");
        assert_eq!((entries["BACKENDS_V4"].0, entries["BACKENDS_V6"].0), (1, 0));
        for name in ["MEMBERS_V4", "RANGES_V4", "MAGLEV_V4"] {
            assert_eq!(entries[name].0, 1, "{name}");
        }
        let image = datapath.snapshot().expect("a snapshot");
        let backends = image.backends(&frontend("10.96.0.1:80"));
        assert_eq!(backends, &["10.0.0.1:80".parse().expect("a socket")]);
    });
}

#[test]
fn ten_thousand_services_are_written_and_read_at_once() {
    require_datapath!();
    isolated(|world| {
        let mut datapath = world.load();
        // A guest that is translated does with fewer, and its time says nothing.
        let guest = hachi_testutil::in_guest();
        let count = if guest { 1_000 } else { 10_000 };
        let (backends, services) = many_services(count);
        let ops = [backends.as_slice(), services.as_slice()].concat();
        // Service by Service, as changes come while the agent runs: a write of its own each.
        let (mut mixed, mut threes) = (Vec::new(), backends.chunks(3));
        for service in &services {
            mixed.extend_from_slice(threes.next().expect("three for each"));
            mixed.push(service.clone());
        }
        let start = Instant::now();
        datapath.apply(&mixed).expect("applied");
        let one_by_one = start.elapsed();
        println!("one Service after the other: {one_by_one:?}");
        assert!(
            guest || one_by_one < Duration::from_secs(4),
            "{one_by_one:?}"
        );
        let start = Instant::now();
        datapath.apply(&ops).expect("applied");
        let written = start.elapsed();
        let image = datapath.snapshot().expect("a snapshot");
        let read = start.elapsed() - written;
        assert_eq!(image.services.len(), services.len());
        assert!(image.slots.values().all(|slots| slots.backends.len() == 3));
        println!("{count} Services with 3 backends each: written in {written:?}, read in {read:?}");
        assert!(guest || written < Duration::from_secs(2), "{written:?}");
        assert!(guest || read < Duration::from_secs(2), "{read:?}");
    });
}

#[test]
fn a_hundred_thousand_services_are_written() {
    require_datapath!();
    isolated(|world| {
        let mut datapath = world.load();
        let (backends, services) = many_services(100_000);
        let ops = [backends, services].concat();
        let start = Instant::now();
        datapath.apply(&ops).expect("applied");
        let written = start.elapsed();
        println!("100 000 Services with 3 backends each: written in {written:?}");
        let entries = datapath.map_use().expect("the use");
        assert_eq!(entries["SERVICES_V4"].0, 100_000);
        assert_eq!(entries["BACKENDS_V4"].0, 300_000);
        assert!(
            hachi_testutil::in_guest() || written < Duration::from_secs(20),
            "{written:?}"
        );
    });
}

fn many_services(count: u32) -> (Vec<Op>, Vec<Op>) {
    let mut backends = Vec::new();
    let mut services = Vec::new();
    for id in 1..=count {
        let address = IpAddr::from((0x0a60_0000 + id).to_be_bytes());
        for slot in 0..3 {
            let backend = SocketAddr::new(IpAddr::from((0x0a00_0000 + id).to_be_bytes()), 8080);
            backends.push(Op::PutBackend {
                service: SlotsId { v6: false, id },
                slot,
                backend,
            });
        }
        let frontend = Frontend {
            addr: address,
            port: 80,
            proto: 6,
            scope: 0,
        };
        services.push(Op::PutService(
            frontend,
            Service {
                id,
                count: 3,
                flags: 0,
                affinity: 0,
                table: 0,
            },
        ));
    }
    (backends, services)
}

#[test]
fn uninstall_leaves_nothing() {
    require_datapath!();
    isolated(|world| {
        let mut datapath = world.load();
        for name in ["one", "with.dot"] {
            let ifindex = world.veth(name);
            datapath.attach(Role::Pod, ifindex, name).expect("attached");
        }
        ip(&["link", "del", "with.dot"]);
        drop(datapath);
        remove_all(&world.pin_root).expect("removed");
        assert!(!world.pin_root.exists());
        remove_all(&world.pin_root).expect("nothing left to remove");
        let datapath = world.load();
        assert_eq!(datapath.snapshot().expect("a snapshot"), Image::default());
        assert!(datapath.attached(Role::Pod).expect("a list").is_empty());
    });
}
