//! Services: what is filled in, what is refused, and the addresses and ports handed out to them.

mod check;

use std::{collections::BTreeSet, net::IpAddr};

use serde_json::{Value, json};

pub(crate) use self::check::check;
use self::check::{ADDRESS, BALANCED, EXTERNAL, INTERNAL};
use crate::{
    alloc::{Family, NODE_PORTS, Ranges, Refusal},
    failure::Cause,
    json::{is_empty, list, list_mut, object_at, remove, set_default, text},
};

/// The port of every node where load balancers ask about its endpoints.
const HEALTH: &str = "healthCheckNodePort";

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

/// Whether load balancers ask a port of every node about its endpoints.
fn has_health_port(object: &Value) -> bool {
    kind(object) == "LoadBalancer" && object["spec"]["externalTrafficPolicy"] == "Local"
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
    }
    if kind == "LoadBalancer" {
        set_default(spec, "allocateLoadBalancerNodePorts", true);
    }
    if let Some(old) = old {
        take_over(object, old);
    }
    if kind != "ExternalName" {
        complete_families(object, families);
    }
    if object_at(object, "status").is_some() {
        set_default(&mut object["status"], "loadBalancer", json!({}));
    }
}

/// Keeps the handed-out numbers of a Service that an update does not name, and drops what the old
/// type had and the new one has not, if the update leaves it as it was.
fn take_over(object: &mut Value, old: &Value) {
    if kind(object) != kind(old) {
        let dropped: &[&str] = match kind(object) {
            "LoadBalancer" => &[],
            "NodePort" => &BALANCED,
            "ExternalName" => &[&BALANCED[..], &EXTERNAL, &INTERNAL].concat(),
            _ => &[&BALANCED[..], &EXTERNAL].concat(),
        };
        for key in dropped {
            if object["spec"][*key] == old["spec"][*key] {
                remove(&mut object["spec"], key);
            }
        }
    }
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
    let number = &old["spec"][HEALTH];
    if has_health_port(old) && !number.is_null() {
        if has_health_port(object) {
            set_default(&mut object["spec"], HEALTH, number.clone());
        } else if object["spec"][HEALTH] == *number {
            remove(&mut object["spec"], HEALTH);
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
    if has_health_port(object) {
        causes.extend(allocate_health_port(object, &held_ports, ranges));
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
        let Ok(address) = text(given).parse::<IpAddr>() else {
            return vec![Cause::invalid(path, given, ADDRESS)];
        };
        if Family::of(address) != *family {
            let why = format!(
                "expected an {} value as indicated by `ipFamilies[{place}]`",
                family.name()
            );
            return vec![Cause::invalid(path, given, &why)];
        }
        if !held.contains(&address)
            && let Err(refusal) = ranges.claim_ip(address)
        {
            let why = match refusal {
                Refusal::Outside => {
                    format!("the provided IP ({address}) is not in the valid range")
                }
                Refusal::Taken => "provided IP is already allocated".to_owned(),
            };
            let why = format!("failed to allocate IP {address}: {why}");
            return vec![Cause::invalid("spec.clusterIPs", &spec["clusterIPs"], &why)];
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
    let mut taken: BTreeSet<u16> = held
        .iter()
        .filter(|(_, of)| of != HEALTH)
        .map(|(port, _)| *port)
        .collect();
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
        if taken.contains(&port_number(&given)) {
            continue;
        }
        match claim_port(path, &given, ranges) {
            None => _ = taken.insert(port_number(&given)),
            Some(cause) => causes.push(cause),
        }
    }
    causes
}

fn allocate_health_port(
    object: &mut Value,
    held: &BTreeSet<(u16, String)>,
    ranges: &mut Ranges,
) -> Option<Cause> {
    let given = object["spec"][HEALTH].clone();
    let path = format!("spec.{HEALTH}");
    if given.is_null() || given == json!(0) {
        let Some(number) = ranges.take_port() else {
            return Some(Cause::required(path, "the range of node ports is used up"));
        };
        object["spec"][HEALTH] = json!(number);
        return None;
    }
    let before = held.iter().find(|(_, of)| of == HEALTH);
    let number = port_number(&given);
    match before {
        Some((before, _)) if *before == number => None,
        Some(_) => Some(Cause::forbidden(path, "field is immutable")),
        None => claim_port(path, &given, ranges),
    }
}

fn port_number(given: &Value) -> u16 {
    let number = given.as_u64().map(u16::try_from);
    number.and_then(Result::ok).unwrap_or(0)
}

fn claim_port(path: String, given: &Value, ranges: &mut Ranges) -> Option<Cause> {
    let why = match ranges.claim_port(port_number(given)) {
        Ok(()) => return None,
        Err(Refusal::Taken) => "provided port is already allocated".to_owned(),
        Err(Refusal::Outside) => {
            let (first, last) = (NODE_PORTS.start(), NODE_PORTS.end());
            format!("provided port is not in the valid range {first}-{last}")
        }
    };
    Some(Cause::invalid(path, given, &why))
}

/// The ClusterIPs and ports of nodes that a Service holds, each port with what it is for: a protocol or
/// [`HEALTH`].
fn held(object: &Value) -> (BTreeSet<IpAddr>, BTreeSet<(u16, String)>) {
    let ips = list(&object["spec"]["clusterIPs"]).iter();
    let ports = list(&object["spec"]["ports"]).iter().filter_map(|port| {
        let number = u16::try_from(port["nodePort"].as_u64()?).ok()?;
        Some((number, text(&port["protocol"]).to_owned()))
    });
    let health = object["spec"][HEALTH].as_u64();
    let health = health.and_then(|number| u16::try_from(number).ok());
    let health = health.map(|number| (number, HEALTH.to_owned()));
    (
        ips.filter_map(|ip| text(ip).parse().ok()).collect(),
        ports.chain(health).collect(),
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
