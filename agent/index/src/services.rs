//! Services joined with their slices. Only those that something happened to are looked at again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    host_ports,
    model::{HealthCheck, Name, Service, ServicePort},
    parse::{Hints, PortRecord, ServiceRecord, SliceEndpoint, SliceRecord},
    shards::Shards,
    topology::Preference,
};

/// All Services and slices.
#[derive(Debug, Default)]
pub(crate) struct Services {
    services: BTreeMap<Name, ServiceRecord>,
    slices: BTreeMap<Name, SliceRecord>,
    /// The slices of every Service, also of those that are not known (yet).
    slices_of: BTreeMap<Name, Vec<Name>>,
    /// `hostPort`s by the Pod's name, prefixed.
    host_ports: BTreeMap<Name, Service>,
    /// This node's.
    zone: Option<Arc<str>>,
    /// Services to be joined again.
    dirty: BTreeSet<Name>,
}

impl Services {
    pub(crate) fn set_service(&mut self, name: Name, record: Option<ServiceRecord>) -> bool {
        if self.services.get(&name) == record.as_ref() {
            return false;
        }
        match record {
            Some(record) => self.services.insert(name.clone(), record),
            None => self.services.remove(&name),
        };
        self.dirty.insert(name);
        true
    }

    pub(crate) fn set_slice(&mut self, name: Name, record: Option<SliceRecord>) -> bool {
        if self.slices.get(&name) == record.as_ref() {
            return false;
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
                slices.retain(|slice| *slice != name);
                if slices.is_empty() {
                    self.slices_of.remove(&service);
                }
            }
            self.dirty.insert(service);
        }
        if let Some(service) = new {
            let slices = self.slices_of.entry(service.clone()).or_default();
            if let Err(at) = slices.binary_search(&name) {
                slices.insert(at, name);
            }
            self.dirty.insert(service);
        }
        true
    }

    /// Takes in what a Pod of this node wants of the node's ports.
    pub(crate) fn set_host_ports(&mut self, pod: &Name, wanted: Option<Service>) {
        if wanted.is_none() && self.host_ports.is_empty() {
            return;
        }
        let name = host_ports::name(pod);
        if self.host_ports.get(&name) == wanted.as_ref() {
            return;
        }
        match wanted {
            Some(wanted) => self.host_ports.insert(name.clone(), wanted),
            None => self.host_ports.remove(&name),
        };
        self.dirty.insert(name);
    }

    /// Sets the zone of this node.
    pub(crate) fn set_zone(&mut self, zone: Option<Arc<str>>) {
        if self.zone == zone {
            return;
        }
        self.zone = zone;
        for (service, slices) in &self.slices_of {
            let mut slices = slices.iter().filter_map(|slice| self.slices.get(slice));
            if slices.any(|slice| slice.endpoints.iter().any(|e| !e.hints.zones.is_empty())) {
                self.dirty.insert(service.clone());
            }
        }
    }

    pub(crate) fn service_names(&self) -> impl Iterator<Item = &Name> {
        self.services.keys()
    }

    pub(crate) fn slice_names(&self) -> impl Iterator<Item = &Name> {
        self.slices.keys()
    }

    /// Joins what changed since the last time.
    pub(crate) fn update(&mut self, joined: &mut Shards<Name, Arc<Service>>) {
        for name in std::mem::take(&mut self.dirty) {
            let service = match self.services.get(&name) {
                Some(record) => Some(self.join(&name, record)),
                None => self.host_ports.get(&name).cloned(),
            };
            match service {
                Some(service) if joined.get(&name).is_some_and(|old| **old == service) => {}
                Some(service) => drop(joined.insert(name, Arc::new(service))),
                None => drop(joined.remove(&name)),
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
            let endpoints = Endpoints::of(&slices, port);
            ServicePort {
                name: port.name.clone(),
                protocol: port.protocol,
                port: port.port,
                node_port: port.node_port,
                host_ip: None,
                backends: endpoints.everywhere(self.zone.as_ref()),
                local_backends: endpoints.here(),
                draining: endpoints.draining(),
            }
        });
        let health_check = record.health_check_port.map(|port| HealthCheck {
            port,
            local_endpoints: ready_here(&slices),
        });
        Service {
            created: record.created,
            cluster_ips: record.cluster_ips.clone(),
            external_ips: record.external_ips.clone(),
            load_balancer_ips: record.load_balancer_ips.clone(),
            source_ranges: record.source_ranges.clone(),
            internal_local: record.internal_local,
            external_local: record.external_local,
            affinity: record.affinity,
            health_check,
            ports: ports.collect(),
        }
    }
}

/// How many ready endpoints are on this node, whatever their ports.
fn ready_here(slices: &[&SliceRecord]) -> u32 {
    let endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
    let here: BTreeSet<IpAddr> = endpoints
        .filter(|endpoint| endpoint.local && endpoint.ready)
        .map(|endpoint| endpoint.address)
        .collect();
    here.len() as u32
}

/// What several slices say of one endpoint: the better of it.
#[derive(Debug, Default)]
struct State<'a> {
    ready: bool,
    serving_terminating: bool,
    local: bool,
    hints: Option<&'a Hints>,
}

/// The endpoints of a port.
struct Endpoints<'a>(BTreeMap<SocketAddr, State<'a>>);

impl<'a> Endpoints<'a> {
    fn of(slices: &[&'a SliceRecord], port: &PortRecord) -> Self {
        let mut endpoints: BTreeMap<SocketAddr, State<'a>> = BTreeMap::new();
        for slice in slices {
            let targets = slice
                .ports
                .iter()
                .filter(|target| target.name == port.name && target.protocol == port.protocol);
            for target in targets {
                for endpoint in &slice.endpoints {
                    endpoints
                        .entry(endpoint.at(target.port))
                        .or_default()
                        .merge(endpoint);
                }
            }
        }
        Self(endpoints)
    }

    /// The ready endpoints, of each family those that topology prefers; without any, those that
    /// still serve while they terminate (KEP-1669).
    fn everywhere(&self, zone: Option<&Arc<str>>) -> Vec<SocketAddr> {
        self.each_family(|v6| {
            let of = || self.0.iter().filter(move |(at, _)| at.is_ipv6() == v6);
            let ready = || of().filter(|(_, state)| state.ready);
            let preference = Preference::of(ready().filter_map(|(_, s)| s.hints), zone);
            let chosen: Vec<SocketAddr> = ready()
                .filter(|(_, s)| s.hints.is_none_or(|hints| preference.takes(hints, zone)))
                .map(|(at, _)| *at)
                .collect();
            if chosen.is_empty() {
                of().filter(|(_, state)| state.serving_terminating)
                    .map(|(at, _)| *at)
                    .collect()
            } else {
                chosen
            }
        })
    }

    /// The same of this node alone; topology has no say in it.
    fn here(&self) -> Vec<SocketAddr> {
        self.each_family(|v6| {
            let of = |pick: fn(&State<'_>) -> bool| -> Vec<SocketAddr> {
                let all = self.0.iter().filter(|(at, _)| at.is_ipv6() == v6);
                all.filter(|(_, state)| state.local && pick(state))
                    .map(|(at, _)| *at)
                    .collect()
            };
            let ready = of(|state| state.ready);
            if ready.is_empty() {
                of(|state| state.serving_terminating)
            } else {
                ready
            }
        })
    }

    /// Those that still serve while they terminate, used or not.
    fn draining(&self) -> Vec<SocketAddr> {
        let draining = self.0.iter().filter(|(_, s)| s.serving_terminating);
        draining.map(|(at, _)| *at).collect()
    }

    /// The families are decided each on its own.
    fn each_family(&self, choose: impl Fn(bool) -> Vec<SocketAddr>) -> Vec<SocketAddr> {
        let mut chosen = choose(false);
        chosen.append(&mut choose(true));
        chosen
    }
}

impl<'a> State<'a> {
    fn merge(&mut self, endpoint: &'a SliceEndpoint) {
        // Of a ready entry and one that is not, the ready one's hints count.
        if self.hints.is_none() || (endpoint.ready && !self.ready) {
            self.hints = Some(&endpoint.hints);
        }
        self.ready |= endpoint.ready;
        self.serving_terminating |= endpoint.serving_terminating;
        self.local |= endpoint.local;
    }
}
