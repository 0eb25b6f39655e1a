//! Images made at random instead of compiled: few sets and classes, so that they change hands in
//! every way, also those that need two changes of the cluster at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use hachi_abi::{Endpoint, Peer, PolicyEntry, PolicyKey, SHAPE_ANY_PROTO, Tunnel, Uplink};
use hachi_compile::{Image, diff};
use proptest::prelude::*;

use crate::{flow::Flow, maps::Kernel, rng::Rng, transitions::walk};

const BLOCKS: [&str; 7] = [
    "0.0.0.0/0",
    "10.0.0.0/29",
    "10.0.0.0/30",
    "10.0.0.4/30",
    "10.0.0.0/31",
    "10.0.0.2/31",
    "10.0.0.6/31",
];
const PORT: [u8; 2] = 80_u16.to_be_bytes();

/// What every set says of every class. It is the same in all images: ids are made of contents.
type Meaning = BTreeMap<PolicyKey, PolicyEntry>;

fn meaning(rng: &mut Rng) -> Meaning {
    let mut meaning = Meaning::new();
    for (set, class) in (1..5).flat_map(|set| (0..5).map(move |class| (set, class))) {
        let allow = PolicyEntry {
            verdict: 1,
            rule: 100 * set + class,
        };
        let any = PolicyKey {
            set,
            class,
            ..PolicyKey::default()
        };
        match rng.below(3) {
            0 => drop(meaning.insert(any, allow)),
            1 => drop(meaning.insert(
                PolicyKey {
                    port: PORT,
                    plen: 16,
                    proto: 6,
                    ..any
                },
                allow,
            )),
            _ => {}
        }
    }
    meaning
}

fn address(host: usize) -> IpAddr {
    format!("10.0.0.{host}").parse().unwrap()
}

fn image(rng: &mut Rng, meaning: &Meaning) -> Image {
    let mut image = Image::default();
    image.ports.1 = rng.below(3) as u16;
    for index in 1..4 {
        if rng.one_in(2) {
            let flags = rng.below(2) as u32;
            image.uplinks.insert(
                index,
                Uplink {
                    flags,
                    ..Uplink::default()
                },
            );
        }
    }
    for block in BLOCKS {
        if rng.one_in(3) {
            image.non_masquerade.insert(block.parse().unwrap());
        }
        if rng.one_in(3) {
            let flags = rng.below(2) as u32;
            let tunnel = Tunnel {
                flags,
                ..Tunnel::default()
            };
            image.tunnels.insert(block.parse().unwrap(), tunnel);
        }
    }
    image.tunnel.ifindex = rng.below(3) as u32;
    image.host.near = rng.below(3) as u32;
    let class = |rng: &mut Rng| Peer {
        class: rng.below(5) as u32,
        flags: 0,
    };
    for block in BLOCKS {
        if rng.one_in(2) {
            image.cidrs.insert(block.parse().unwrap(), class(rng));
        }
    }
    for host in 0..8 {
        if rng.one_in(3) {
            image.peers.insert(address(host), class(rng));
        }
    }
    for host in 0..4 {
        if rng.one_in(5) {
            continue;
        }
        let shapes = 1 << 16 | 1 << SHAPE_ANY_PROTO;
        let endpoint = Endpoint {
            ifindex: host as u32,
            ingress_set: rng.below(5) as u32,
            egress_set: rng.below(5) as u32,
            ingress_shapes: shapes,
            egress_shapes: shapes,
            ..Endpoint::default()
        };
        image.endpoints.insert(address(host), endpoint);
    }
    let peers = image.peers.values().chain(image.cidrs.values());
    let classes: BTreeSet<u32> = peers.map(|p| p.class).chain([0]).collect();
    let sets: BTreeSet<u32> = image
        .endpoints
        .values()
        .flat_map(|e| [e.ingress_set, e.egress_set])
        .collect();
    let in_use = |k: &PolicyKey| sets.contains(&k.set) && classes.contains(&k.class);
    image.policy = meaning
        .iter()
        .filter(|(k, _)| in_use(k))
        .map(|(k, entry)| (*k, *entry))
        .collect();
    image
}

fn flows() -> Vec<Flow> {
    let pairs = (0..8).flat_map(|from| (0..8).map(move |to| (from, to)));
    let near = pairs.filter(|(from, to)| *from < 4 || *to < 4);
    near.flat_map(|(from, to)| {
        [80, 81].map(|port| Flow {
            source: address(from),
            destination: address(to),
            protocol: 6,
            port,
        })
    })
    .collect()
}

proptest! {
    #![proptest_config(crate::cases::cases(200))]

    #[test]
    fn no_packet_meets_a_third_verdict(seed: u64) {
        let rng = &mut Rng::new(seed);
        let meaning = meaning(rng);
        walk(&image(rng, &meaning), &image(rng, &meaning), &flows())?;
    }

    #[test]
    fn no_address_has_a_third_class(seed: u64) {
        let rng = &mut Rng::new(seed);
        let addresses_only = |image: Image| {
            let Image { peers, cidrs, .. } = image;
            Image { peers, cidrs, ..Image::default() }
        };
        let old = addresses_only(image(rng, &Meaning::new()));
        let new = addresses_only(image(rng, &Meaning::new()));
        let (before, after) = (Kernel::from(&old), Kernel::from(&new));
        let mut kernel = before.clone();
        for op in diff(&old, &new) {
            kernel.apply(&op);
            for address in (0..9).map(address) {
                let class = kernel.peer(address).class;
                let known = [before.peer(address).class, after.peer(address).class];
                prop_assert!(known.contains(&class), "{address} after {op:?}");
            }
        }
        prop_assert_eq!(kernel, after);
    }
}
