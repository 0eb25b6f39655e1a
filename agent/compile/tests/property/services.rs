//! Every state of the Services' slots, with so few ids that they often change hands.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use hachi_compile::{Frontend, Image, ServiceImage, diff};
use proptest::prelude::*;

use crate::{maps::Kernel, rng::Rng};

fn image(rng: &mut Rng) -> Image {
    let mut backends: BTreeMap<(bool, u32), Vec<SocketAddr>> = BTreeMap::new();
    let mut services = BTreeMap::new();
    for n in 0..6_u8 {
        if rng.one_in(4) {
            continue;
        }
        let v6 = n % 2 == 1;
        let host = |n: usize| {
            if v6 {
                format!("[fd00::{n}]:80")
            } else {
                format!("10.0.0.{n}:80")
            }
        };
        let addr = if v6 {
            format!("fd96::{n}")
        } else {
            format!("10.96.0.{n}")
        };
        let frontend = Frontend {
            addr: addr.parse().unwrap(),
            port: 80,
            proto: 6,
            scope: 0,
        };
        let id = 1 + rng.below(4) as u32;
        let backends = backends.entry((v6, id)).or_insert_with(|| {
            let chosen: BTreeSet<usize> = (0..rng.below(5)).map(|_| 1 + rng.below(9)).collect();
            chosen
                .into_iter()
                .map(|n| host(n).parse().unwrap())
                .collect()
        });
        let affinity = rng.below(2) as u32;
        services.insert(
            frontend,
            ServiceImage {
                id,
                flags: 0,
                affinity,
                backends: backends.clone(),
            },
        );
    }
    Image {
        services,
        ..Image::default()
    }
}

proptest! {
    #![proptest_config(crate::rng::cases(3000))]

    #[test]
    fn no_packet_meets_a_backend_of_another_service(seed: u64) {
        let rng = &mut Rng::new(seed);
        let (old, new) = (image(rng), image(rng));
        let mut kernel = Kernel::from(&old);
        let of = |image: &Image, frontend: &Frontend| -> BTreeSet<SocketAddr> {
            let service = image.services.get(frontend);
            service.into_iter().flat_map(|s| s.backends.iter().copied()).collect()
        };
        for op in diff(&old, &new) {
            kernel.apply(&op);
            for (frontend, service) in &kernel.services {
                let allowed = &of(&old, frontend) | &of(&new, frontend);
                for slot in 0..service.count {
                    let at = (frontend.addr.is_ipv6(), service.id, slot);
                    let backend = kernel.slots.get(&at);
                    prop_assert!(
                        backend.is_some_and(|b| allowed.contains(b)),
                        "{frontend:?} slot {slot} leads to {backend:?} after {op:?}"
                    );
                }
            }
            for frontend in old.services.keys().filter(|f| new.services.contains_key(f)) {
                prop_assert!(kernel.services.contains_key(frontend), "{frontend:?} is away");
            }
        }
        prop_assert_eq!(kernel, Kernel::from(&new));
    }
}
