//! Services and their `EndpointSlice`s.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hachi_policy::Protocol;
use k8s_openapi::api::{core::v1 as core, discovery::v1::EndpointSlice};

use super::{Complaints, address, created, port};

/// Set by who serves the Service instead of us.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Set on what no proxy has to serve.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// On a slice: the Service that it belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// The API's default for `sessionAffinityConfig.clientIP.timeoutSeconds`.
const DEFAULT_AFFINITY: i32 = 10_800;

/// What the index keeps of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServiceRecord {
    pub(crate) created: i64,
    pub(crate) cluster_ips: Vec<IpAddr>,
    pub(crate) external_ips: Vec<IpAddr>,
    pub(crate) internal_local: bool,
    pub(crate) affinity: Option<u32>,
    pub(crate) health_check_port: Option<u16>,
    pub(crate) ports: Vec<PortRecord>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortRecord {
    pub(crate) name: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
}

/// `None` for a Service that needs no datapath: headless, `ExternalName`, or another proxy's.
pub(crate) fn service(
    object: &core::Service,
    complaints: &mut Complaints,
) -> Option<ServiceRecord> {
    let labels = object.metadata.labels.as_ref();
    let spec = object.spec.as_ref()?;
    let elsewhere = labels.is_some_and(|l| l.contains_key(PROXY_NAME) || l.contains_key(HEADLESS));
    if elsewhere || spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }

    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    let single = spec.cluster_ip.as_deref();
    let texts: Vec<&str> = if listed.is_empty() {
        single.into_iter().collect()
    } else {
        listed.iter().map(String::as_str).collect()
    };
    // No address yet, or none at all ("None").
    if texts.iter().all(|t| t.is_empty() || *t == "None") {
        return None;
    }
    let cluster_ips = texts
        .into_iter()
        .filter_map(|t| address(t, "clusterIP", complaints))
        .collect();

    let mut external_ips: Vec<IpAddr> = spec
        .external_ips
        .iter()
        .flatten()
        .filter_map(|t| address(t, "externalIP", complaints))
        .collect();
    if spec.type_.as_deref() == Some("LoadBalancer") {
        let status = object
            .status
            .as_ref()
            .and_then(|s| s.load_balancer.as_ref());
        external_ips.extend(
            status
                .and_then(|s| s.ingress.as_ref())
                .into_iter()
                .flatten()
                // With the mode "Proxy" the traffic has to pass the load balancer itself.
                .filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"))
                .filter_map(|ingress| ingress.ip.as_deref().filter(|ip| !ip.is_empty()))
                .filter_map(|ip| address(ip, "load balancer address", complaints)),
        );
    }
    external_ips.sort_unstable();
    external_ips.dedup();

    let mut ports = Vec::new();
    for declared in spec.ports.iter().flatten() {
        match (
            Protocol::parse(declared.protocol.as_deref()),
            port(declared.port),
        ) {
            (Some(protocol), Some(port)) => {
                let name = declared.name.as_deref().unwrap_or_default().into();
                ports.push(PortRecord {
                    name,
                    protocol,
                    port,
                });
            }
            _ => complaints.push(format!(
                "port {} has a protocol or number that does not exist: not served; correct it",
                declared.port
            )),
        }
    }
    Some(ServiceRecord {
        created: created(&object.metadata),
        cluster_ips,
        external_ips,
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        affinity: affinity(spec),
        health_check_port: health_check_port(spec, complaints),
        ports,
    })
}

/// Load balancers ask only where they may not send traffic to any node.
fn health_check_port(spec: &core::ServiceSpec, complaints: &mut Complaints) -> Option<u16> {
    let asked = spec.type_.as_deref() == Some("LoadBalancer")
        && spec.external_traffic_policy.as_deref() == Some("Local");
    let number = spec
        .health_check_node_port
        .filter(|port| asked && *port != 0)?;
    let valid = port(number);
    if valid.is_none() {
        complaints.push(format!(
            "healthCheckNodePort {number} does not exist: not served; correct it"
        ));
    }
    valid
}

fn affinity(spec: &core::ServiceSpec) -> Option<u32> {
    (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec
            .session_affinity_config
            .as_ref()
            .and_then(|c| c.client_ip.as_ref());
        let seconds = config
            .and_then(|c| c.timeout_seconds)
            .unwrap_or(DEFAULT_AFFINITY);
        u32::try_from(seconds).unwrap_or_default().max(1)
    })
}

/// What the index keeps of an `EndpointSlice`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SliceRecord {
    /// Name of the Service, in the slice's namespace.
    pub(crate) service: Arc<str>,
    /// Name, protocol and number of the ports of every endpoint.
    pub(crate) ports: Vec<PortRecord>,
    pub(crate) endpoints: Vec<SliceEndpoint>,
}

/// An endpoint of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SliceEndpoint {
    pub(crate) address: IpAddr,
    /// Takes new connections; a Pod's `publishNotReadyAddresses` is already in it.
    pub(crate) ready: bool,
    /// On its way out, but still able to serve.
    pub(crate) serving_terminating: bool,
    /// On this node.
    pub(crate) local: bool,
}

impl SliceEndpoint {
    pub(crate) const fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, port)
    }
}

/// `None` for a slice of no Service, or of one with names instead of addresses.
pub(crate) fn slice(
    object: &EndpointSlice,
    node_name: &str,
    complaints: &mut Complaints,
) -> Option<SliceRecord> {
    let labels = object.metadata.labels.as_ref()?;
    let service = labels.get(SERVICE_NAME).filter(|name| !name.is_empty())?;
    let v6 = match object.address_type.as_str() {
        "IPv4" => false,
        "IPv6" => true,
        _ => return None,
    };
    if labels.contains_key(PROXY_NAME) || labels.contains_key(HEADLESS) {
        return None;
    }
    let mut ports = Vec::new();
    for declared in object.ports.iter().flatten() {
        // No number means "all ports", which a Service cannot be served from.
        let Some(number) = declared.port else {
            continue;
        };
        match (Protocol::parse(declared.protocol.as_deref()), port(number)) {
            (Some(protocol), Some(port)) => {
                let name = declared.name.as_deref().unwrap_or_default().into();
                ports.push(PortRecord {
                    name,
                    protocol,
                    port,
                });
            }
            _ => complaints.push(format!(
                "port {number} has a protocol or number that does not exist: its endpoints get no \
                 traffic; correct it"
            )),
        }
    }
    let mut endpoints = Vec::new();
    for endpoint in &object.endpoints {
        // The addresses of one endpoint are interchangeable; one is enough.
        let Some(text) = endpoint.addresses.first() else {
            continue;
        };
        let Some(address) = address(text, "endpoint address", complaints) else {
            continue;
        };
        if address.is_ipv6() != v6 {
            complaints.push(format!(
                "endpoint address {address} is not {}: ignored; correct addressType",
                object.address_type
            ));
            continue;
        }
        let conditions = endpoint.conditions.as_ref();
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        let serving = conditions.and_then(|c| c.serving).unwrap_or(ready);
        let terminating = conditions.and_then(|c| c.terminating).unwrap_or_default();
        endpoints.push(SliceEndpoint {
            address,
            ready,
            serving_terminating: serving && terminating,
            local: endpoint.node_name.as_deref() == Some(node_name),
        });
    }
    Some(SliceRecord {
        service: service.as_str().into(),
        ports,
        endpoints,
    })
}
