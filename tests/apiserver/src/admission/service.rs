//! Services: what is filled in, what is refused, and the addresses and ports handed out to them.

use std::{collections::BTreeSet, net::IpAddr};

use serde_json::{Value, json};

use super::meta::{check_labels, is_label};
use crate::{
    alloc::{Family, NODE_PORTS, Ranges, Refusal},
    failure::Cause,
    json::{is_empty, list, list_mut, object_at, remove, set_default, text},
};

fn kind(object: &Value) -> &str {
    text(&object["spec"]["type"])
}

fn is_headless(object: &Value) -> bool {
    text(&object["spec"]["clusterIP"]) == "None"
}

/// Whether the Service has ClusterIPs (or is headless).
fn has_cluster_ip(object: &Value) -> bool {
    kind(object) != "ExternalName"
}

fn has_node_ports(object: &Value) -> bool {
    match kind(object) {
        "NodePort" => true,
        "LoadBalancer" => object["spec"]["allocateLoadBalancerNodePorts"] != json!(false),
        _ => false,
    }
}

/// Fills in what the writer left open; what an update leaves out of the handed-out numbers is
/// taken over from the stored Service.
pub(crate) fn complete(object: &mut Value, old: Option<&Value>, families: &[Family]) {
    if object_at(object, "spec").is_none() {
        return;
    }
    set_default(&mut object["spec"], "type", "ClusterIP");
    set_default(&mut object["spec"], "sessionAffinity", "None");
    let kind = kind(object).to_owned();
    let spec = &mut object["spec"];
    if text(&spec["sessionAffinity"]) == "ClientIP" {
        if spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].is_null() {
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 10_800}});
        }
    } else {
        remove(spec, "sessionAffinityConfig");
    }
    for port in list_mut(spec.get_mut("ports")) {
        set_default(port, "protocol", "TCP");
        let number = port["port"].clone();
        set_default(port, "targetPort", number);
    }
    let external = matches!(kind.as_str(), "NodePort" | "LoadBalancer");
    if kind != "ExternalName" {
        set_default(spec, "internalTrafficPolicy", "Cluster");
    }
    if external || !is_empty(&spec["externalIPs"]) && kind == "ClusterIP" {
        set_default(spec, "externalTrafficPolicy", "Cluster");
    } else {
        remove(spec, "externalTrafficPolicy");
    }
    if kind == "LoadBalancer" {
        set_default(spec, "allocateLoadBalancerNodePorts", true);
    } else {
        remove(spec, "allocateLoadBalancerNodePorts");
    }
    if let Some(old) = old {
        take_over(object, old);
    }
    if kind == "ExternalName" {
        for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            remove(&mut object["spec"], key);
        }
    } else {
        complete_families(object, families);
    }
    if object_at(object, "status").is_some() {
        set_default(&mut object["status"], "loadBalancer", json!({}));
    }
}

/// Keeps the handed-out numbers of a Service that an update does not name.
fn take_over(object: &mut Value, old: &Value) {
    if has_cluster_ip(object) && has_cluster_ip(old) {
        let spec = &mut object["spec"];
        if is_empty(&spec["clusterIP"]) && is_empty(&spec["clusterIPs"]) {
            for key in ["clusterIP", "clusterIPs"] {
                set_default(spec, key, old["spec"][key].clone());
            }
        }
        for key in ["ipFamilies", "ipFamilyPolicy"] {
            set_default(&mut object["spec"], key, old["spec"][key].clone());
        }
    }
    let keep = has_node_ports(object) && has_node_ports(old);
    let drop = !has_node_ports(object) && has_node_ports(old);
    for port in list_mut(object["spec"].get_mut("ports")) {
        let same =
            |other: &&Value| other["port"] == port["port"] && other["protocol"] == port["protocol"];
        let before = list(&old["spec"]["ports"])
            .iter()
            .find(same)
            .map(|port| &port["nodePort"]);
        let Some(before) = before.filter(|number| !number.is_null()).cloned() else {
            continue;
        };
        if keep && port["nodePort"].is_null() {
            port["nodePort"] = before;
        } else if drop && port["nodePort"] == before {
            remove(port, "nodePort");
        }
    }
}

fn complete_families(object: &mut Value, families: &[Family]) {
    let headless = is_headless(object);
    let spec = &mut object["spec"];
    if is_empty(&spec["clusterIPs"]) && !is_empty(&spec["clusterIP"]) {
        spec["clusterIPs"] = json!([spec["clusterIP"]]);
    }
    let open = headless && is_empty(&spec["selector"]);
    let policy = if open && families.len() > 1 {
        "RequireDualStack"
    } else {
        "SingleStack"
    };
    let listed = list(&spec["ipFamilies"])
        .len()
        .max(list(&spec["clusterIPs"]).len());
    set_default(
        spec,
        "ipFamilyPolicy",
        if listed > 1 {
            "RequireDualStack"
        } else {
            policy
        },
    );
    let mut wanted: Vec<Family> = list(&spec["ipFamilies"])
        .iter()
        .filter_map(|name| Family::parse(text(name)))
        .collect();
    if wanted.len() < list(&spec["ipFamilies"]).len() {
        // A name that is none is left for validation to refuse.
        return;
    }
    if wanted.is_empty() {
        let given = list(&spec["clusterIPs"])
            .iter()
            .filter_map(|ip| text(ip).parse().ok());
        wanted.extend(given.map(Family::of));
    }
    let dual = text(&spec["ipFamilyPolicy"]) != "SingleStack";
    for family in families {
        let room = if dual { 2 } else { 1 };
        if wanted.len() < room && !wanted.contains(family) {
            wanted.push(*family);
        }
    }
    if !dual {
        wanted.truncate(1);
        if let Some(addresses) = spec["clusterIPs"].as_array_mut() {
            addresses.truncate(1);
        }
    }
    let names: Vec<_> = wanted.iter().map(|family| family.name()).collect();
    spec["ipFamilies"] = json!(names);
}

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
    if kind(object) == "LoadBalancer" && is_headless(object) {
        let why = "may not be set to 'None' for LoadBalancer services";
        causes.push(Cause::invalid(
            "spec.clusterIPs[0]",
            &spec["clusterIP"],
            why,
        ));
    }
    for (place, address) in list(&spec["externalIPs"]).iter().enumerate() {
        if text(address).parse::<IpAddr>().is_err() {
            let path = format!("spec.externalIPs[{place}]");
            causes.push(Cause::invalid(path, address, "must be a valid IP address"));
        }
    }
    causes.extend(check_ports(object));
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

/// Takes the Service's ClusterIPs and node ports, and gives back what it no longer has.
pub(crate) fn allocate(object: &mut Value, old: Option<&Value>, ranges: &mut Ranges) -> Vec<Cause> {
    let mut causes = Vec::new();
    if has_cluster_ip(object) {
        let given = list(&object["spec"]["clusterIPs"]).first();
        let given = given.or(Some(&object["spec"]["clusterIP"]));
        let before = old
            .filter(|old| has_cluster_ip(old))
            .map(|old| &old["spec"]["clusterIP"]);
        if let (Some(before), Some(given)) = (before, given)
            && before != given
        {
            let why = "may not change once set";
            return vec![Cause::invalid("spec.clusterIPs[0]", given, why)];
        }
    }
    let (held_ips, held_ports) = old.map_or_else(Default::default, held);
    if has_cluster_ip(object) && !is_headless(object) {
        causes.extend(allocate_ips(object, &held_ips, ranges));
    } else if is_headless(object) {
        object["spec"]["clusterIPs"] = json!(["None"]);
    }
    if has_node_ports(object) {
        causes.extend(allocate_ports(object, &held_ports, ranges));
    }
    let (ips, ports) = held(object);
    held_ips
        .difference(&ips)
        .for_each(|ip| ranges.release_ip(*ip));
    held_ports.difference(&ports).for_each(|(port, _)| {
        if !ports.iter().any(|(other, _)| other == port) {
            ranges.release_port(*port);
        }
    });
    causes
}

fn allocate_ips(object: &mut Value, held: &BTreeSet<IpAddr>, ranges: &mut Ranges) -> Vec<Cause> {
    let spec = &mut object["spec"];
    let families: Vec<Family> = list(&spec["ipFamilies"])
        .iter()
        .filter_map(|name| Family::parse(text(name)))
        .collect();
    if text(&spec["ipFamilyPolicy"]) == "RequireDualStack" && families.len() < 2 {
        let why = "this cluster is not configured for dual-stack services";
        return vec![Cause::invalid(
            "spec.ipFamilyPolicy",
            &spec["ipFamilyPolicy"],
            why,
        )];
    }
    let mut addresses = Vec::new();
    for (place, family) in families.iter().enumerate() {
        let path = format!("spec.clusterIPs[{place}]");
        let given = &spec["clusterIPs"][place];
        if !ranges.families().contains(family) {
            let why = "not configured on this cluster";
            let value = json!(family.name());
            return vec![Cause::invalid(
                format!("spec.ipFamilies[{place}]"),
                &value,
                why,
            )];
        }
        if given.is_null() {
            match ranges.take_ip(*family) {
                Some(address) => addresses.push(address.to_string()),
                None => return vec![Cause::required(path, "the range of ClusterIPs is used up")],
            }
            continue;
        }
        let Some(address) = text(given)
            .parse()
            .ok()
            .filter(|ip| Family::of(*ip) == *family)
        else {
            let why = format!("must be a valid {} address", family.name());
            return vec![Cause::invalid(path, given, &why)];
        };
        if !held.contains(&address)
            && let Err(refusal) = ranges.claim_ip(address)
        {
            let why = match refusal {
                Refusal::Outside => {
                    "failed to allocate IP: the provided IP is not in the valid \
                                     range"
                }
                Refusal::Taken => "failed to allocate IP: provided IP is already allocated",
            };
            return vec![Cause::invalid(path, given, why)];
        }
        addresses.push(address.to_string());
    }
    if let Some(first) = addresses.first() {
        spec["clusterIP"] = json!(first);
        spec["clusterIPs"] = json!(addresses);
    }
    Vec::new()
}

fn allocate_ports(
    object: &mut Value,
    held: &BTreeSet<(u16, String)>,
    ranges: &mut Ranges,
) -> Vec<Cause> {
    let mut causes = Vec::new();
    // One number may serve one port of each protocol.
    let mut taken: BTreeSet<u16> = held.iter().map(|(port, _)| *port).collect();
    for (place, port) in list_mut(object["spec"].get_mut("ports"))
        .iter_mut()
        .enumerate()
    {
        let path = format!("spec.ports[{place}].nodePort");
        let given = port["nodePort"].clone();
        if given.is_null() || given == json!(0) {
            match ranges.take_port() {
                Some(number) => port["nodePort"] = json!(number),
                None => causes.push(Cause::required(path, "the range of node ports is used up")),
            }
            continue;
        }
        let number = given
            .as_u64()
            .and_then(|number| u16::try_from(number).ok())
            .unwrap_or(0);
        if taken.contains(&number) {
            continue;
        }
        match ranges.claim_port(number) {
            Ok(()) => {
                taken.insert(number);
            }
            Err(Refusal::Taken) => {
                causes.push(Cause::invalid(
                    path,
                    &given,
                    "provided port is already allocated",
                ));
            }
            Err(Refusal::Outside) => {
                let (first, last) = (NODE_PORTS.start(), NODE_PORTS.end());
                let why = format!("provided port is not in the valid range {first}-{last}");
                causes.push(Cause::invalid(path, &given, &why));
            }
        }
    }
    causes
}

/// The ClusterIPs and node ports that a Service holds.
fn held(object: &Value) -> (BTreeSet<IpAddr>, BTreeSet<(u16, String)>) {
    let ips = list(&object["spec"]["clusterIPs"]).iter();
    let ports = list(&object["spec"]["ports"]).iter().filter_map(|port| {
        let number = u16::try_from(port["nodePort"].as_u64()?).ok()?;
        Some((number, text(&port["protocol"]).to_owned()))
    });
    (
        ips.filter_map(|ip| text(ip).parse().ok()).collect(),
        ports.collect(),
    )
}

/// Gives back everything that a Service held.
pub(crate) fn release(object: &Value, ranges: &mut Ranges) {
    let (ips, ports) = held(object);
    ips.into_iter().for_each(|ip| ranges.release_ip(ip));
    ports
        .into_iter()
        .for_each(|(port, _)| ranges.release_port(port));
}
