//! Every state of the Services' slots, with so few ids that they often change hands; and what a change
//! costs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use hachi_abi::Service;
use hachi_compile::{Compiler, Frontend, Image, Op, Retired, Slots, SlotsId, diff, is_moved};
use hachi_index::{Desired, HealthCheck, Name, Service as Wanted, ServicePort};
use hachi_policy::Protocol;
use proptest::prelude::*;

use crate::{maps::Kernel, rng::Rng};

fn backend(v6: bool, n: usize) -> SocketAddr {
    let text = if v6 {
        format!("[fd00::{n}]:80")
    } else {
        format!("10.0.0.{n}:80")
    };
    text.parse().unwrap()
}

fn slots(rng: &mut Rng, v6: bool) -> Slots {
    let chosen: BTreeSet<usize> = (0..rng.below(5)).map(|_| 1 + rng.below(9)).collect();
    let mut backends: Vec<SocketAddr> = chosen.into_iter().map(|n| backend(v6, n)).collect();
    let members = if rng.one_in(3) {
        backends.clone()
    } else {
        Vec::new()
    };
    for _ in 0..backends.len() {
        let (a, b) = (rng.below(backends.len()), rng.below(backends.len()));
        backends.swap(a, b);
    }
    let places = if backends.is_empty() || rng.one_in(2) {
        0
    } else {
        70 * (1 + rng.below(2))
    };
    let table = (0..places).map(|_| rng.below(backends.len()) as u16);
    let table = table.collect();
    let block = |n: usize| {
        if v6 {
            format!("fd0{n}::/16")
        } else {
            format!("{n}.0.0.0/8")
        }
    };
    let ranges: BTreeSet<usize> = (0..rng.below(3)).map(|_| 1 + rng.below(4)).collect();
    Slots {
        backends,
        members,
        table,
        ranges: ranges
            .into_iter()
            .map(|n| block(n).parse().unwrap())
            .collect(),
    }
}

fn image(rng: &mut Rng) -> Image {
    let mut image = Image::default();
    let mut all: BTreeMap<SlotsId, Arc<Slots>> = BTreeMap::new();
    for n in 0..6_u8 {
        if rng.one_in(4) {
            continue;
        }
        let v6 = n % 2 == 1;
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
        let id = SlotsId {
            v6,
            id: 1 + rng.below(4) as u32,
        };
        let slots = all
            .entry(id)
            .or_insert_with(|| Arc::new(slots(rng, v6)))
            .clone();
        if !slots.is_empty() {
            image.slots.insert(id, Arc::clone(&slots));
        }
        let value = Service {
            id: id.id,
            count: slots.backends.len() as u32,
            flags: 0,
            affinity: u32::from(!slots.members.is_empty()),
            table: slots.table.len() as u32,
        };
        image.services.insert(frontend, value);
    }
    image
}

proptest! {
    #![proptest_config(crate::cases::cases(3000))]

    #[test]
    fn no_packet_meets_a_backend_of_another_service(seed: u64) {
        let rng = &mut Rng::new(seed);
        let (old, new) = (image(rng), image(rng));
        let mut kernel = Kernel::from(&old);
        for op in diff(&old, &new) {
            kernel.apply(&op);
            for (frontend, service) in &kernel.services {
                let id = SlotsId::of(frontend, service);
                let allowed: BTreeSet<_> =
                    old.backends(frontend).iter().chain(new.backends(frontend)).collect();
                for slot in 0..service.count {
                    let backend = kernel.slots.get(&(id, slot));
                    prop_assert!(
                        backend.is_some_and(|b| allowed.contains(b)),
                        "{frontend:?} slot {slot} leads to {backend:?} after {op:?}"
                    );
                }
                // A client keeps its backend as long as both images have it.
                let affine = |image: &Image| {
                    let service = image.services.get(frontend);
                    service.is_some_and(|service| service.affinity != 0)
                };
                if service.affinity != 0 && affine(&old) && affine(&new) {
                    let both = old.backends(frontend).iter()
                        .filter(|b| new.backends(frontend).contains(b));
                    for backend in both {
                        prop_assert!(kernel.members.contains(&(id, *backend)), "{backend} after {op:?}");
                    }
                }
                let ranges = if service.count == 0 { BTreeSet::new() } else { kernel.ranges.clone() };
                for (_, range) in ranges.range((id, "0.0.0.0/0".parse().unwrap())..)
                    .take_while(|(of, _)| *of == id)
                {
                    let known = |image: &Image| image.services.get(frontend)
                        .and_then(|s| image.slots.get(&SlotsId::of(frontend, s)))
                        .is_some_and(|s| s.ranges.contains(range));
                    prop_assert!(known(&old) || known(&new), "{range} after {op:?}");
                }
            }
            for frontend in old.services.keys().filter(|f| new.services.contains_key(f)) {
                prop_assert!(kernel.services.contains_key(frontend), "{frontend:?} is away");
            }
        }
        prop_assert_eq!(kernel, Kernel::from(&new));
    }
}

/// Services of which some claim the same addresses and many change.
struct Services {
    all: BTreeMap<Name, Wanted>,
    node: BTreeSet<std::net::IpAddr>,
}

impl Services {
    fn change(&mut self, rng: &mut Rng) {
        if rng.one_in(10) {
            self.node = (0..rng.below(3))
                .map(|n| format!("192.0.2.{n}").parse().unwrap())
                .collect();
            return;
        }
        let n = rng.below(6);
        let name = Name::new("a", &format!("s{n}"));
        if rng.one_in(4) {
            self.all.remove(&name);
            return;
        }
        let mut backends = |limit: usize| -> Vec<SocketAddr> {
            let chosen: BTreeSet<usize> = (0..rng.below(limit)).map(|_| 1 + rng.below(9)).collect();
            let both = [false, true].into_iter();
            both.flat_map(|v6| chosen.iter().map(move |n| backend(v6, *n)))
                .collect()
        };
        let (backends, local_backends, draining) = (backends(6), backends(3), backends(3));
        let address = |n: usize| format!("198.51.100.{n}").parse().unwrap();
        let service = Wanted {
            created: rng.below(3) as i64,
            cluster_ips: vec![
                format!("10.96.0.{}", n % 4).parse().unwrap(),
                format!("fd96::{n}").parse().unwrap(),
            ],
            external_ips: (0..rng.below(3)).map(|_| address(rng.below(3))).collect(),
            load_balancer_ips: (0..rng.below(2)).map(|_| address(rng.below(3))).collect(),
            source_ranges: rng.one_in(2).then(|| vec!["192.0.2.0/24".parse().unwrap()]),
            internal_local: rng.one_in(3),
            external_local: rng.one_in(2),
            affinity: rng.one_in(3).then_some(60),
            health_check: rng.one_in(3).then(|| HealthCheck {
                port: 30_080 + rng.below(2) as u16,
                local_endpoints: rng.below(2) as u32,
            }),
            ports: vec![ServicePort {
                name: "".into(),
                protocol: if rng.one_in(2) {
                    Protocol::Tcp
                } else {
                    Protocol::Udp
                },
                port: 80 + rng.below(2) as u16,
                node_port: rng.one_in(2).then_some(30_080 + rng.below(2) as u16),
                host_ip: None,
                backends,
                local_backends,
                draining,
            }],
        };
        self.all.insert(name, service);
    }

    fn desired(&self) -> Desired {
        let all = self.all.iter();
        Desired {
            services: all.map(|(n, s)| (n.clone(), Arc::new(s.clone()))).collect(),
            local_addresses: self.node.clone(),
            ..Desired::default()
        }
    }
}

/// What a frontend leads to, whatever the slots: its value, its backends, its table.
type Meaning = (Service, BTreeSet<SocketAddr>, Vec<SocketAddr>);

pub(crate) fn meaning(image: &Image) -> BTreeMap<Frontend, Meaning> {
    let each = image.services.iter().map(|(frontend, service)| {
        let slots = image.slots.get(&SlotsId::of(frontend, service));
        let slots = slots.cloned().unwrap_or_default();
        let table = slots
            .table
            .iter()
            .map(|slot| slots.backends[usize::from(*slot)]);
        let backends = image.backends(frontend).iter().copied().collect();
        (*frontend, (*service, backends, table.collect()))
    });
    each.collect()
}

proptest! {
    #![proptest_config(crate::cases::cases(150))]

    /// Whatever came before, the result is that of a compiler that begins; an agent that begins finds
    /// nothing to do.
    #[test]
    fn history_does_not_matter(seed: u64) {
        let rng = &mut Rng::new(seed);
        let mut services = Services { all: BTreeMap::new(), node: BTreeSet::new() };
        let mut compiler = Compiler::default();
        let mut last = Image::default();
        let mut before = compiler.compile(&services.desired());
        for _ in 0..12 {
            for _ in 0..=rng.below(3) {
                services.change(rng);
            }
            let desired = services.desired();
            let next = compiler.compile(&desired);
            let fresh = Compiler::default().compile(&desired);
            prop_assert!(meaning(&next.image) == meaning(&fresh.image));
            prop_assert_eq!(&next.problems, &fresh.problems);
            prop_assert_eq!(&next.draining, &fresh.draining);
            prop_assert_eq!(&next.health_checks, &fresh.health_checks);
            // Flows to be moved are found by what was touched as among all.
            let (was, is) = ((&before.image, &before.draining), (&next.image, &next.draining));
            let moved = before.image.services.keys().filter(|f| is_moved(f.proto));
            prop_assert_eq!(
                Retired::between(was, is, compiler.touched()),
                Retired::between(was, is, moved)
            );
            before = next.clone();
            let mut kernel = Kernel::from(&last);
            diff(&last, &next.image).iter().for_each(|op| kernel.apply(op));
            prop_assert_eq!(&kernel, &Kernel::from(&next.image));
            last = kernel.snapshot();

            let mut restarted = Compiler::default();
            restarted.adopt(&last);
            let ops = diff(&last, &restarted.compile(&desired).image);
            prop_assert!(ops.is_empty(), "{} writes, first {:?}", ops.len(), ops.first());
        }
    }

    /// An endpoint that comes or goes costs writes of its own slot, the one that takes its place and
    /// the frontends' counts, and of UDP whether it is a member, however many endpoints and other
    /// Services there are.
    #[test]
    fn churn_costs_what_it_changes(seed: u64) {
        let rng = &mut Rng::new(seed);
        let mut services = Services { all: BTreeMap::new(), node: BTreeSet::new() };
        for _ in 0..20 {
            services.change(rng);
        }
        let name = Name::new("b", "busy");
        let of = |hosts: &BTreeSet<usize>| Wanted {
            cluster_ips: vec!["10.96.1.1".parse().unwrap()],
            ports: vec![ServicePort {
                name: "".into(), protocol: Protocol::Udp, port: 53, node_port: None, host_ip: None,
                backends: hosts.iter().map(|n| backend(false, *n)).collect(),
                local_backends: Vec::new(),
                draining: Vec::new(),
            }],
            ..Wanted::default()
        };
        let mut hosts: BTreeSet<usize> = (1..200).filter(|_| rng.one_in(2)).collect();
        services.all.insert(name.clone(), of(&hosts));
        let mut compiler = Compiler::default();
        let mut last = compiler.compile(&services.desired()).image;
        for _ in 0..20 {
            let n = 1 + rng.below(200);
            let gone = hosts.remove(&n);
            if !gone {
                hosts.insert(n);
            }
            services.all.insert(name.clone(), of(&hosts));
            let next = compiler.compile(&services.desired()).image;
            let ops = diff(&last, &next);
            let put = ops.iter().filter(|op| matches!(op, Op::PutBackend { .. })).count();
            let deleted = ops.iter().filter(|op| matches!(op, Op::DeleteBackend { .. })).count();
            prop_assert!(put <= 1 && deleted == usize::from(gone), "{:?}", ops);
            prop_assert!(ops.len() <= 4, "{:?}", ops);
            last = next;
        }
    }
}
