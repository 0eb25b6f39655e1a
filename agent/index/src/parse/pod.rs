//! Pods.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hachi_policy::{ContainerPort, Labels, Protocol};
use k8s_openapi::api::core::v1 as core;

use super::{Complaints, address, created, labels, port};
use crate::model::{Service, ServicePort};

/// What the index keeps of a Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodRecord {
    pub(crate) uid: Option<Box<str>>,
    pub(crate) created: i64,
    /// It is being deleted. It counts in full until it is gone.
    pub(crate) terminating: bool,
    /// It ran to its end (`Succeeded`, `Failed`): it has no address and no policies any more.
    pub(crate) finished: bool,
    /// It uses its node's network: to policies it is the node, not a Pod.
    pub(crate) host_network: bool,
    pub(crate) labels: Arc<Labels>,
    pub(crate) ports: Arc<[ContainerPort]>,
    pub(crate) addresses: Vec<IpAddr>,
}

impl PodRecord {
    /// Whether policies see a Pod in it.
    pub(crate) const fn is_peer(&self) -> bool {
        !self.finished && !self.host_network
    }
}

pub(crate) fn pod(object: &core::Pod, complaints: &mut Complaints) -> PodRecord {
    let metadata = &object.metadata;
    let spec = object.spec.as_ref();
    let status = object.status.as_ref();
    let phase = status.and_then(|s| s.phase.as_deref());
    let mut addresses: Vec<IpAddr> = status
        .and_then(|s| s.pod_ips.as_ref())
        .into_iter()
        .flatten()
        .filter_map(|ip| address(&ip.ip, "podIP", complaints))
        .collect();
    if addresses.is_empty()
        && let Some(ip) = status
            .and_then(|s| s.pod_ip.as_deref())
            .filter(|ip| !ip.is_empty())
    {
        addresses.extend(address(ip, "podIP", complaints));
    }
    addresses.sort_unstable();
    addresses.dedup();
    PodRecord {
        uid: metadata.uid.as_deref().map(Into::into),
        created: created(metadata),
        terminating: metadata.deletion_timestamp.is_some(),
        finished: matches!(phase, Some("Succeeded" | "Failed")),
        host_network: spec.and_then(|s| s.host_network).unwrap_or_default(),
        labels: Arc::new(labels(metadata)),
        ports: spec
            .map(|spec| named_ports(spec, complaints))
            .unwrap_or_default(),
        addresses,
    }
}

/// The ports of the containers that run as long as the Pod does: init containers have none, save
/// those that restart (sidecars).
fn declared_ports(spec: &core::PodSpec) -> impl Iterator<Item = &core::ContainerPort> {
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let containers = spec.containers.iter().chain(sidecars);
    containers.flat_map(|c| c.ports.iter().flatten())
}

/// The `hostPort`s of a Pod that runs on this node, as node ports with one backend.
pub(crate) fn host_ports(object: &core::Pod, record: &PodRecord, node: &str) -> Option<Service> {
    let spec = object.spec.as_ref()?;
    // With the node's network a hostPort is the container's own doing.
    if !record.is_peer() || spec.node_name.as_deref() != Some(node) {
        return None;
    }
    let mut ports = Vec::new();
    for declared in declared_ports(spec) {
        let (Some(protocol), Some(target), Some(host)) = (
            Protocol::parse(declared.protocol.as_deref()),
            port(declared.container_port),
            declared.host_port.and_then(port),
        ) else {
            continue;
        };
        let host_ip = declared.host_ip.as_deref().and_then(|ip| ip.parse().ok());
        let backends: Vec<SocketAddr> = record
            .addresses
            .iter()
            .map(|address| SocketAddr::new(*address, target))
            .collect();
        ports.push(ServicePort {
            name: "".into(),
            protocol,
            port: host,
            node_port: Some(host),
            host_ip: host_ip.filter(|ip: &IpAddr| !ip.is_unspecified()),
            local_backends: backends.clone(),
            backends,
            draining: Vec::new(),
        });
    }
    (!ports.is_empty()).then(|| Service {
        created: record.created,
        // The client's own address is kept: the Pod is here.
        external_local: true,
        ports,
        ..Service::default()
    })
}

/// The named ports of the containers.
fn named_ports(spec: &core::PodSpec, complaints: &mut Complaints) -> Arc<[ContainerPort]> {
    let mut ports = Vec::new();
    for declared in declared_ports(spec) {
        let Some(name) = declared.name.as_deref().filter(|n| !n.is_empty()) else {
            continue;
        };
        match (
            Protocol::parse(declared.protocol.as_deref()),
            port(declared.container_port),
        ) {
            (Some(protocol), Some(port)) => {
                ports.push(ContainerPort {
                    name: name.into(),
                    protocol,
                    port,
                });
            }
            _ => complaints.push(format!(
                "container port {name:?} has a protocol or number that does not exist: rules that \
                 name it do not match this Pod; correct it"
            )),
        }
    }
    ports.sort_unstable();
    ports.dedup();
    ports.into()
}
