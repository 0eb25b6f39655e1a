//! What of a Service is refused, the handed-out numbers apart.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use serde_json::Value;

use super::{
    super::meta::{check_labels, is_label},
    has_cluster_ip, is_headless, kind,
};
use crate::{
    alloc::Family,
    failure::Cause,
    json::{is_empty, list, text},
};

/// Checks everything but the handed-out numbers.
pub(crate) fn check(object: &Value) -> Vec<Cause> {
    let spec = &object["spec"];
    let mut causes = check_labels(&spec["selector"], "spec.selector");
    for (key, known) in [
        (
            "type",
            &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"][..],
        ),
        ("sessionAffinity", &["ClientIP", "None"]),
        ("internalTrafficPolicy", &["Cluster", "Local"]),
        ("externalTrafficPolicy", &["Cluster", "Local"]),
        (
            "trafficDistribution",
            &["PreferClose", "PreferSameZone", "PreferSameNode"],
        ),
        (
            "ipFamilyPolicy",
            &["SingleStack", "PreferDualStack", "RequireDualStack"],
        ),
    ] {
        let value = &spec[key];
        if !value.is_null() && !known.contains(&text(value)) {
            causes.push(Cause::unsupported(format!("spec.{key}"), value, known));
        }
    }
    for (place, family) in list(&spec["ipFamilies"]).iter().enumerate() {
        if Family::parse(text(family)).is_none() {
            let path = format!("spec.ipFamilies[{place}]");
            causes.push(Cause::unsupported(path, family, &["IPv4", "IPv6"]));
        }
    }
    let timeout = &spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"];
    if timeout
        .as_i64()
        .is_some_and(|seconds| !(1..=86_400).contains(&seconds))
    {
        let path = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        let why = "must be greater than 0 and less than 86400";
        causes.push(Cause::invalid(path, timeout, why));
    }
    if kind(object) == "ExternalName" && is_empty(&spec["externalName"]) {
        causes.push(Cause::required("spec.externalName", ""));
    }
    if matches!(kind(object), "LoadBalancer" | "NodePort") && is_headless(object) {
        let why = format!("may not be set to 'None' for {} services", kind(object));
        let path = "spec.clusterIPs[0]";
        causes.push(Cause::invalid(path, &spec["clusterIP"], &why));
    }
    for (place, address) in list(&spec["externalIPs"]).iter().enumerate() {
        let path = format!("spec.externalIPs[{place}]");
        match text(address).parse::<IpAddr>() {
            Ok(ip) if ip.is_loopback() => {
                let why = "may not be in the loopback range (127.0.0.0/8, ::1/128)";
                causes.push(Cause::invalid(path, address, why));
            }
            Ok(_) => {}
            Err(_) => causes.push(Cause::invalid(path, address, ADDRESS)),
        }
    }
    causes.extend(check_fit(object));
    causes.extend(check_ports(object));
    causes
}

/// Fields of load balancers alone, of what can be reached from outside, and of what has a ClusterIP.
pub(super) const BALANCED: [&str; 3] = [
    "allocateLoadBalancerNodePorts",
    "loadBalancerClass",
    "healthCheckNodePort",
];
pub(super) const EXTERNAL: [&str; 1] = ["externalTrafficPolicy"];
pub(super) const INTERNAL: [&str; 4] = ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"];

pub(super) const ADDRESS: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";

/// Refuses fields that the Service's type does not have.
fn check_fit(object: &Value) -> Vec<Cause> {
    const RANGES: &str = "spec.LoadBalancerSourceRanges";
    let spec = &object["spec"];
    let balanced = kind(object) == "LoadBalancer";
    let mut causes = Vec::new();
    let only = "may only be used when `type` is 'LoadBalancer'";
    for key in &BALANCED[..2] {
        if !balanced && !spec[*key].is_null() {
            causes.push(Cause::forbidden(format!("spec.{key}"), only));
        }
    }
    let local = balanced && spec["externalTrafficPolicy"] == "Local";
    let number = &spec["healthCheckNodePort"];
    if !local && number.as_i64().is_some_and(|number| number != 0) {
        let why = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is \
                   'Local'";
        causes.push(Cause::invalid("spec.healthCheckNodePort", number, why));
    }
    let ranges = list(&spec["loadBalancerSourceRanges"]);
    if !balanced && !ranges.is_empty() {
        causes.push(Cause::forbidden(RANGES, only));
    }
    for (place, range) in ranges.iter().enumerate().filter(|_| balanced) {
        if text(range).trim().parse::<IpNet>().is_err() {
            let why = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            causes.push(Cause::invalid(format!("{RANGES}[{place}]"), range, why));
        }
    }
    let policy = &spec["externalTrafficPolicy"];
    let external = balanced
        || kind(object) == "NodePort"
        || has_cluster_ip(object) && !is_empty(&spec["externalIPs"]);
    if !external && !policy.is_null() {
        let why = "may only be set for externally-accessible services";
        causes.push(Cause::invalid("spec.externalTrafficPolicy", policy, why));
    }
    let named = !is_empty(&spec["clusterIP"]) || !is_empty(&spec["clusterIPs"]);
    if !has_cluster_ip(object) && named {
        let why = "may not be set for ExternalName services";
        causes.push(Cause::forbidden("spec.clusterIPs", why));
    }
    causes
}

fn check_ports(object: &Value) -> Vec<Cause> {
    const RANGE: &str = "must be between 1 and 65535, inclusive";
    let ports = list(&object["spec"]["ports"]);
    let mut causes = Vec::new();
    if ports.is_empty() && has_cluster_ip(object) && !is_headless(object) {
        causes.push(Cause::required("spec.ports", ""));
    }
    let in_range = |port: &Value| {
        port.as_i64()
            .is_some_and(|port| (1..=65_535).contains(&port))
    };
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (place, port) in ports.iter().enumerate() {
        let path = format!("spec.ports[{place}]");
        let name = &port["name"];
        if is_empty(name) {
            if ports.len() > 1 {
                causes.push(Cause::required(format!("{path}.name"), ""));
            }
        } else if !is_label(text(name)) {
            let why = "a lowercase RFC 1123 label must consist of lower case alphanumeric \
                       characters or '-'";
            causes.push(Cause::invalid(format!("{path}.name"), name, why));
        } else if !names.insert(text(name)) {
            causes.push(Cause::duplicate(format!("{path}.name"), name));
        }
        let protocol = text(&port["protocol"]);
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            let known = ["SCTP", "TCP", "UDP"];
            let path = format!("{path}.protocol");
            causes.push(Cause::unsupported(path, &port["protocol"], &known));
        }
        if !in_range(&port["port"]) {
            causes.push(Cause::invalid(format!("{path}.port"), &port["port"], RANGE));
        } else if !numbers.insert((port["port"].as_i64(), protocol)) {
            causes.push(Cause::duplicate(path.clone(), port));
        }
        let target = &port["targetPort"];
        if target.is_number() && !in_range(target) {
            causes.push(Cause::invalid(format!("{path}.targetPort"), target, RANGE));
        }
        if !port["nodePort"].is_null() && matches!(kind(object), "ClusterIP" | "ExternalName") {
            let why = format!("may not be used when `type` is '{}'", kind(object));
            causes.push(Cause::forbidden(format!("{path}.nodePort"), &why));
        }
    }
    causes
}
