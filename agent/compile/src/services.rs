//! Services: every address and port that one answers on, with the backends behind it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
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

pub(crate) fn compile(
    desired: &Desired,
    problems: &mut Vec<Problem>,
) -> BTreeMap<Frontend, ServiceImage> {
    let claims = claims(desired, problems);
    let mut keys: Vec<Key<'_>> = claims.values().map(|claim| claim.key).collect();
    keys.sort_unstable();
    keys.dedup();
    let hashes: Vec<u64> = keys.iter().map(hash::stable).collect();
    let ids = hash::assign(&hashes, &[], |a, b| a.cmp(&b));
    let id_of = |key: &Key<'_>| keys.binary_search(key).map_or(0, |at| ids[at]);
    claims
        .iter()
        .map(|(frontend, claim)| (*frontend, claim.image(id_of(&claim.key))))
        .collect()
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
        for address in &service.external_ips {
            claim(name, service, *address, false);
        }
    }
    claims
}

impl Claim<'_> {
    fn image(&self, id: u32) -> ServiceImage {
        let Key { local, v6, .. } = self.key;
        let of_family = |backends: &[SocketAddr]| -> Vec<SocketAddr> {
            backends
                .iter()
                .copied()
                .filter(|b| b.is_ipv6() == v6)
                .collect()
        };
        let everywhere = of_family(&self.port.backends);
        let (backends, flags) = if local {
            let here = of_family(&self.port.local_backends);
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
            affinity: self.service.affinity.unwrap_or_default(),
            backends,
        }
    }
}
