//! Services.

use std::{net::IpAddr, sync::Arc};

use hachi_policy::Protocol;
use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;

use super::{Complaints, address, created, port};

/// Set by who serves the Service instead of us.
pub(super) const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Set on what no proxy has to serve.
pub(super) const HEADLESS: &str = "service.kubernetes.io/headless";
/// The API's default for `sessionAffinityConfig.clientIP.timeoutSeconds`.
const DEFAULT_AFFINITY: i32 = 10_800;

/// What the index keeps of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServiceRecord {
    pub(crate) created: i64,
    pub(crate) cluster_ips: Vec<IpAddr>,
    pub(crate) external_ips: Vec<IpAddr>,
    pub(crate) load_balancer_ips: Vec<IpAddr>,
    pub(crate) source_ranges: Option<Vec<IpNet>>,
    pub(crate) internal_local: bool,
    pub(crate) external_local: bool,
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
    /// On the node's own addresses.
    pub(crate) node_port: Option<u16>,
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
    external_ips.sort_unstable();
    external_ips.dedup();

    // Whatever an earlier type left in fields of the others does not count.
    let balanced = spec.type_.as_deref() == Some("LoadBalancer");
    let on_nodes = balanced || spec.type_.as_deref() == Some("NodePort");
    let load_balancer_ips = if balanced {
        ingress(object, complaints)
    } else {
        Vec::new()
    };
    let source_ranges = if balanced {
        source_ranges(spec, complaints)
    } else {
        None
    };
    let external_local = spec.external_traffic_policy.as_deref() == Some("Local")
        && (on_nodes || !external_ips.is_empty());

    let mut ports = Vec::new();
    for declared in spec.ports.iter().flatten() {
        match (
            Protocol::parse(declared.protocol.as_deref()),
            port(declared.port),
        ) {
            (Some(protocol), Some(port)) => {
                let name = declared.name.as_deref().unwrap_or_default().into();
                let node_port = declared
                    .node_port
                    .filter(|_| on_nodes)
                    .and_then(super::port);
                ports.push(PortRecord {
                    name,
                    protocol,
                    port,
                    node_port,
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
        load_balancer_ips,
        source_ranges,
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_local,
        affinity: affinity(spec),
        health_check_port: health_check_port(spec, complaints),
        ports,
    })
}

/// The addresses of the load balancer, which whoever runs it writes into the status.
fn ingress(object: &core::Service, complaints: &mut Complaints) -> Vec<IpAddr> {
    let status = object
        .status
        .as_ref()
        .and_then(|s| s.load_balancer.as_ref());
    let mut addresses: Vec<IpAddr> = status
        .and_then(|s| s.ingress.as_ref())
        .into_iter()
        .flatten()
        // With the mode "Proxy" the traffic has to pass the load balancer itself (KEP-1860).
        .filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"))
        .filter_map(|ingress| ingress.ip.as_deref().filter(|ip| !ip.is_empty()))
        .filter_map(|ip| address(ip, "load balancer address", complaints))
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Who may use the load balancer's addresses. A range that cannot be read lets nobody in.
fn source_ranges(spec: &core::ServiceSpec, complaints: &mut Complaints) -> Option<Vec<IpNet>> {
    let texts = spec
        .load_balancer_source_ranges
        .as_ref()
        .filter(|ranges| !ranges.is_empty())?;
    let mut ranges: Vec<IpNet> = texts
        .iter()
        .filter_map(|text| match text.trim().parse::<IpNet>() {
            Ok(range) => Some(range.trunc()),
            Err(_) => {
                complaints.push(format!(
                    "loadBalancerSourceRanges {text:?} is not an address block: it lets nobody in; \
                     correct it"
                ));
                None
            }
        })
        .collect();
    ranges.sort_unstable();
    ranges.dedup();
    Some(ranges)
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
