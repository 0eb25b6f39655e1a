//! What the slices of a Service should hold: its Pods' addresses and ports, grouped by the ports
//! that the Service's resolve to on them.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::{Value, json};

use crate::{
    alloc::Family,
    json::{is_empty, list, text},
    store::Object,
};

/// Slices of one family whose endpoints share their ports.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) family: Family,
    pub(super) ports: Value,
    /// By the Pod's name.
    pub(super) endpoints: BTreeMap<String, Value>,
}

/// The groups of a Service; a family without endpoints has one group without ports.
pub(super) fn groups<'a>(
    service: &Object,
    pods: impl Iterator<Item = &'a Object> + Clone,
    zone: impl Fn(&str) -> Option<String>,
) -> Vec<Group> {
    let families = list(&service["spec"]["ipFamilies"]);
    let mut groups = Vec::new();
    for family in families.iter().filter_map(|name| Family::parse(text(name))) {
        let mut found: Vec<Group> = Vec::new();
        for pod in pods.clone() {
            let Some(address) = address(pod, family) else {
                continue;
            };
            let ports = ports(service, pod);
            let endpoint = endpoint(service, pod, address, &zone);
            let position = found.iter().position(|group| group.ports == ports);
            let place = position.unwrap_or_else(|| {
                found.push(Group {
                    family,
                    ports,
                    endpoints: BTreeMap::new(),
                });
                found.len() - 1
            });
            found[place]
                .endpoints
                .insert(pod.name().to_owned(), endpoint);
        }
        if found.is_empty() {
            found.push(Group {
                family,
                ports: json!([]),
                endpoints: BTreeMap::new(),
            });
        }
        groups.extend(found);
    }
    groups
}

/// What a slice of a Service holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Slice {
    /// `IPv4` or `IPv6`.
    pub family: &'static str,
    /// The `ports` of the slice.
    pub ports: Value,
    /// The `endpoints` of the slice, by the names of their Pods.
    pub endpoints: Vec<Value>,
}

/// The slices of a Service, out of the Pods that it selects and the zones of nodes: what the real
/// controller would write, but for how many endpoints a slice may have.
#[must_use]
pub fn slices(
    service: &Value,
    pods: &[Value],
    zone: impl Fn(&str) -> Option<String>,
) -> Vec<Slice> {
    let service = Object::new(service.clone(), 0);
    let pods: Vec<_> = pods.iter().map(|pod| Object::new(pod.clone(), 0)).collect();
    let groups = groups(&service, pods.iter(), zone).into_iter();
    let slices = groups.map(|group| Slice {
        family: group.family.name(),
        ports: group.ports,
        endpoints: group.endpoints.into_values().collect(),
    });
    slices.collect()
}

/// The address that a Pod is reached at; none if it has ended or has no address yet.
fn address(pod: &Object, family: Family) -> Option<IpAddr> {
    if matches!(text(&pod["status"]["phase"]), "Succeeded" | "Failed") {
        return None;
    }
    let addresses = list(&pod["status"]["podIPs"])
        .iter()
        .map(|entry| text(&entry["ip"]));
    let addresses = addresses.chain([text(&pod["status"]["podIP"])]);
    addresses
        .filter_map(|ip| ip.parse().ok())
        .find(|ip| Family::of(*ip) == family)
}

fn endpoint(
    service: &Object,
    pod: &Object,
    address: IpAddr,
    zone: impl Fn(&str) -> Option<String>,
) -> Value {
    let conditions = list(&pod["status"]["conditions"]);
    let is_ready = |c: &Value| text(&c["type"]) == "Ready" && text(&c["status"]) == "True";
    let serving = conditions.iter().any(is_ready);
    let terminating = pod.is_terminating();
    let publish = service["spec"]["publishNotReadyAddresses"] == json!(true);
    let mut endpoint = json!({
        "addresses": [address.to_string()],
        "conditions": {
            "ready": publish || serving && !terminating,
            "serving": serving,
            "terminating": terminating,
        },
        "targetRef": {
            "kind": "Pod",
            "namespace": pod.namespace(),
            "name": pod.name(),
            "uid": pod.uid(),
        },
    });
    let (node, hostname) = (text(&pod["spec"]["nodeName"]), &pod["spec"]["hostname"]);
    if !node.is_empty() {
        endpoint["nodeName"] = json!(node);
        if let Some(zone) = zone(node) {
            endpoint["zone"] = json!(zone);
        }
    }
    // A preference of the Service is for whoever is in the endpoint's own zone or on its own node
    // (KEP-4444, KEP-3015); only ready endpoints have hints.
    if endpoint["conditions"]["ready"] == json!(true) {
        let preference = text(&service["spec"]["trafficDistribution"]);
        let of = |field: &str| json!([{"name": endpoint[field].clone()}]);
        let (nodes, zones) = (of("nodeName"), of("zone"));
        if preference == "PreferSameNode" && !endpoint["nodeName"].is_null() {
            endpoint["hints"]["forNodes"] = nodes;
        }
        let has_preference =
            ["PreferClose", "PreferSameZone", "PreferSameNode"].contains(&preference);
        if has_preference && !endpoint["zone"].is_null() {
            endpoint["hints"]["forZones"] = zones;
        }
    }
    if !is_empty(hostname) && text(&pod["spec"]["subdomain"]) == service.name() {
        endpoint["hostname"] = hostname.clone();
    }
    endpoint
}

/// The Service's ports as they are on a Pod; a named one that the Pod lacks is left out.
fn ports(service: &Object, pod: &Object) -> Value {
    let ports = list(&service["spec"]["ports"]).iter().filter_map(|port| {
        let target = &port["targetPort"];
        let number = match target.as_str() {
            Some(name) => container_port(pod, name, &port["protocol"])?,
            None => target.as_u64()?,
        };
        let name = text(&port["name"]);
        let mut resolved = json!({"name": name, "port": number, "protocol": port["protocol"]});
        if !is_empty(&port["appProtocol"]) {
            resolved["appProtocol"] = port["appProtocol"].clone();
        }
        Some(resolved)
    });
    ports.collect()
}

fn container_port(pod: &Object, name: &str, protocol: &Value) -> Option<u64> {
    let spec = &pod["spec"];
    // Init containers that restart are sidecars, and serve like containers.
    let sidecars = list(&spec["initContainers"]).iter();
    let sidecars = sidecars.filter(|container| text(&container["restartPolicy"]) == "Always");
    let containers = list(&spec["containers"]).iter().chain(sidecars);
    let mut ports = containers.flat_map(|container| list(&container["ports"]));
    let port = ports.find(|port| text(&port["name"]) == name && port["protocol"] == *protocol)?;
    port["containerPort"].as_u64()
}
