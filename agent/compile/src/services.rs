//! Services: every address and port that one answers on, with the backends behind it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hachi_abi::ServiceFlags;
use hachi_index::{Desired, Name, Service, ServicePort};

use crate::{Frontend, ServiceImage, compile::Problem, hash};

/// Which backends: the same key means the same slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key<'a> {
    service: &'a Name,
    proto: u8,
    port: u16,
    local: bool,
    v6: bool,
}

struct Claim<'a> {
    key: Key<'a>,
    service: &'a Service,
    port: &'a ServicePort,
}

/// What was compiled last.
#[derive(Debug, Default)]
pub(crate) struct State {
    services: BTreeMap<Name, Arc<Service>>,
    /// The frontends that every Service got.
    frontends: BTreeMap<Name, Vec<Frontend>>,
    image: BTreeMap<Frontend, ServiceImage>,
    problems: Vec<Problem>,
}

impl State {
    /// Every frontend. While Services keep their addresses and ports only the backends of those that
    /// changed are looked at.
    pub(crate) fn compile(
        &mut self,
        desired: &Desired,
    ) -> (BTreeMap<Frontend, ServiceImage>, Vec<Problem>) {
        let services: BTreeMap<Name, Arc<Service>> = desired
            .services
            .iter()
            .map(|(name, service)| (name.clone(), Arc::clone(service)))
            .collect();
        if self.services.len() == services.len() {
            let pairs = || self.services.iter().zip(&services);
            let same_shape = pairs().all(|((old_name, old), (name, new))| {
                old_name == name && (Arc::ptr_eq(old, new) || same_shape(old, new))
            });
            if same_shape {
                let changed: Vec<(Name, Arc<Service>)> = pairs()
                    .filter(|((_, old), (_, new))| !Arc::ptr_eq(old, new))
                    .map(|(_, (name, new))| (name.clone(), Arc::clone(new)))
                    .collect();
                for (name, service) in changed {
                    self.patch(&name, &service);
                    self.services.insert(name, service);
                }
                return (self.image.clone(), self.problems.clone());
            }
        }
        self.problems.clear();
        let claims = claims(desired, &mut self.problems);
        let mut keys: Vec<Key<'_>> = claims.values().map(|claim| claim.key).collect();
        keys.sort_unstable();
        keys.dedup();
        let hashes: Vec<u64> = keys.iter().map(hash::stable).collect();
        let ids = hash::assign(&hashes, &[], |a, b| a.cmp(&b));
        let id_of = |key: &Key<'_>| keys.binary_search(key).map_or(0, |at| ids[at]);
        self.frontends.clear();
        self.image.clear();
        for (frontend, claim) in &claims {
            let Claim { key, service, port } = claim;
            let image = image(service, port, key.local, key.v6, id_of(key));
            self.image.insert(*frontend, image);
            self.frontends
                .entry(key.service.clone())
                .or_default()
                .push(*frontend);
        }
        self.services = services;
        (self.image.clone(), self.problems.clone())
    }

    fn patch(&mut self, name: &Name, service: &Service) {
        for frontend in self.frontends.get(name).into_iter().flatten() {
            let port = service
                .ports
                .iter()
                .find(|p| p.port == frontend.port && p.protocol.number() == frontend.proto);
            if let (Some(port), Some(slot)) = (port, self.image.get_mut(frontend)) {
                let local = service.internal_local && service.cluster_ips.contains(&frontend.addr);
                *slot = image(service, port, local, frontend.addr.is_ipv6(), slot.id);
            }
        }
    }
}

/// Whether two versions of a Service answer on the same addresses and ports.
fn same_shape(a: &Service, b: &Service) -> bool {
    let ports = |s: &Service| {
        s.ports
            .iter()
            .map(|p| (p.port, p.protocol))
            .collect::<Vec<_>>()
    };
    a.created == b.created
        && a.cluster_ips == b.cluster_ips
        && a.external_ips == b.external_ips
        && a.load_balancer_ips == b.load_balancer_ips
        && a.internal_local == b.internal_local
        && ports(a) == ports(b)
}

/// Who answers on what. A Service's own address comes before any other, then the older Service.
fn claims<'a>(desired: &'a Desired, problems: &mut Vec<Problem>) -> BTreeMap<Frontend, Claim<'a>> {
    let mut claims: BTreeMap<Frontend, Claim<'a>> = BTreeMap::new();
    let mut claim = |name: &'a Name, service: &'a Service, addr: IpAddr, local: bool| {
        for port in &service.ports {
            let proto = port.protocol.number();
            let frontend = Frontend {
                addr,
                port: port.port,
                proto,
                scope: 0,
            };
            let key = Key {
                service: name,
                proto,
                port: port.port,
                local,
                v6: addr.is_ipv6(),
            };
            match claims.get(&frontend) {
                None => {
                    claims.insert(frontend, Claim { key, service, port });
                }
                Some(holder) if holder.key.service == name => {}
                Some(holder) => problems.push(Problem::FrontendTaken {
                    frontend,
                    service: name.clone(),
                    holder: holder.key.service.clone(),
                }),
            }
        }
    };
    let mut by_age: Vec<(&Name, &Service)> = desired
        .services
        .iter()
        .map(|(name, service)| (name, &**service))
        .collect();
    by_age.sort_by_key(|(name, service)| (service.created, *name));
    for (name, service) in &by_age {
        for address in &service.cluster_ips {
            claim(name, service, *address, service.internal_local);
        }
    }
    for (name, service) in &by_age {
        // From inside the cluster an external address leads to every backend, whatever
        // externalTrafficPolicy says of traffic from outside.
        for address in service
            .external_ips
            .iter()
            .chain(&service.load_balancer_ips)
        {
            claim(name, service, *address, false);
        }
    }
    claims
}

fn image(service: &Service, port: &ServicePort, local: bool, v6: bool, id: u32) -> ServiceImage {
    let of_family = |backends: &[SocketAddr]| -> Vec<SocketAddr> {
        backends
            .iter()
            .copied()
            .filter(|b| b.is_ipv6() == v6)
            .collect()
    };
    let everywhere = of_family(&port.backends);
    let (backends, flags) = if local {
        let here = of_family(&port.local_backends);
        let silent = here.is_empty() && !everywhere.is_empty();
        (
            here,
            if silent {
                ServiceFlags::DROP_WHEN_EMPTY
            } else {
                0
            },
        )
    } else {
        (everywhere, 0)
    };
    ServiceImage {
        id,
        flags,
        affinity: service.affinity.unwrap_or_default(),
        backends,
    }
}
