//! Services joined with their slices. Only those that something happened to are looked at again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use crate::{
    model::{HealthCheck, Name, Service, ServicePort},
    parse::{ServiceRecord, SliceRecord},
};

/// All Services and slices.
#[derive(Debug, Default)]
pub(crate) struct Services {
    services: BTreeMap<Name, ServiceRecord>,
    slices: BTreeMap<Name, SliceRecord>,
    /// The slices of every Service, also of those that are not known (yet).
    slices_of: BTreeMap<Name, BTreeSet<Name>>,
    /// Services to be joined again.
    dirty: BTreeSet<Name>,
}

impl Services {
    pub(crate) fn set_service(&mut self, name: Name, record: Option<ServiceRecord>) {
        if self.services.get(&name) == record.as_ref() {
            return;
        }
        match record {
            Some(record) => self.services.insert(name.clone(), record),
            None => self.services.remove(&name),
        };
        self.dirty.insert(name);
    }

    pub(crate) fn set_slice(&mut self, name: Name, record: Option<SliceRecord>) {
        if self.slices.get(&name) == record.as_ref() {
            return;
        }
        let service_of = |record: &SliceRecord| Name {
            namespace: name.namespace.clone(),
            name: record.service.clone(),
        };
        let new = record.as_ref().map(service_of);
        let old = match record {
            Some(record) => self.slices.insert(name.clone(), record),
            None => self.slices.remove(&name),
        };
        let old = old.as_ref().map(service_of);
        if let Some(service) = old.filter(|old| Some(old) != new.as_ref()) {
            if let Some(slices) = self.slices_of.get_mut(&service) {
                slices.remove(&name);
                if slices.is_empty() {
                    self.slices_of.remove(&service);
                }
            }
            self.dirty.insert(service);
        }
        if let Some(service) = new {
            self.slices_of
                .entry(service.clone())
                .or_default()
                .insert(name);
            self.dirty.insert(service);
        }
    }

    pub(crate) fn service_names(&self) -> impl Iterator<Item = &Name> {
        self.services.keys()
    }

    pub(crate) fn slice_names(&self) -> impl Iterator<Item = &Name> {
        self.slices.keys()
    }

    /// Joins what changed since the last time.
    pub(crate) fn update(&mut self, joined: &mut BTreeMap<Name, Arc<Service>>) {
        for name in std::mem::take(&mut self.dirty) {
            match self.services.get(&name) {
                Some(record) => {
                    let service = self.join(&name, record);
                    if joined.get(&name).is_none_or(|old| **old != service) {
                        joined.insert(name, Arc::new(service));
                    }
                }
                None => {
                    joined.remove(&name);
                }
            }
        }
    }

    fn join(&self, name: &Name, record: &ServiceRecord) -> Service {
        let slices: Vec<&SliceRecord> = self
            .slices_of
            .get(name)
            .into_iter()
            .flatten()
            .filter_map(|slice| self.slices.get(slice))
            .collect();
        let ports = record.ports.iter().map(|port| {
            // An endpoint that two slices list counts once, by the better of what they say.
            let mut endpoints: BTreeMap<SocketAddr, State> = BTreeMap::new();
            for slice in &slices {
                for target in &slice.ports {
                    if target.name != port.name || target.protocol != port.protocol {
                        continue;
                    }
                    for endpoint in &slice.endpoints {
                        let state = endpoints.entry(endpoint.at(target.port)).or_default();
                        state.ready |= endpoint.ready;
                        state.serving_terminating |= endpoint.serving_terminating;
                        state.local |= endpoint.local;
                    }
                }
            }
            ServicePort {
                name: port.name.clone(),
                protocol: port.protocol,
                port: port.port,
                backends: usable(&endpoints, |_| true),
                local_backends: usable(&endpoints, |state| state.local),
                draining: endpoints
                    .iter()
                    .filter(|(_, state)| state.serving_terminating)
                    .map(|(address, _)| *address)
                    .collect(),
            }
        });
        let health_check = record.health_check_port.map(|port| {
            let ready = slices
                .iter()
                .flat_map(|slice| &slice.endpoints)
                .filter(|endpoint| endpoint.ready && endpoint.local)
                .map(|endpoint| endpoint.address);
            let local_endpoints = ready.collect::<BTreeSet<_>>().len();
            HealthCheck {
                port,
                local_endpoints: u32::try_from(local_endpoints).unwrap_or(u32::MAX),
            }
        });
        Service {
            created: record.created,
            cluster_ips: record.cluster_ips.clone(),
            external_ips: record.external_ips.clone(),
            internal_local: record.internal_local,
            affinity: record.affinity,
            health_check,
            ports: ports.collect(),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    ready: bool,
    serving_terminating: bool,
    local: bool,
}

/// The ready endpoints of a scope; without any, for each family on its own, those that still serve
/// while they terminate.
fn usable(
    endpoints: &BTreeMap<SocketAddr, State>,
    scope: impl Fn(&State) -> bool,
) -> Vec<SocketAddr> {
    let mut chosen = Vec::new();
    for v6 in [false, true] {
        let of = |pick: fn(&State) -> bool| {
            endpoints
                .iter()
                .filter(|(address, state)| address.is_ipv6() == v6 && scope(state) && pick(state))
                .map(|(address, _)| *address)
                .collect::<Vec<_>>()
        };
        let ready = of(|state| state.ready);
        chosen.extend(if ready.is_empty() {
            of(|s| s.serving_terminating)
        } else {
            ready
        });
    }
    chosen
}
