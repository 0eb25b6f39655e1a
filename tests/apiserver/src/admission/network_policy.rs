//! NetworkPolicies: what is filled in, and what is refused.

use ipnet::IpNet;
use serde_json::{Value, json};

use super::meta::{check_selector, is_port_name};
use crate::{
    failure::Cause,
    json::{is_empty, list, list_mut, object_at, set_default, text},
};

const DIRECTIONS: [(&str, &str); 2] = [("ingress", "from"), ("egress", "to")];

/// Fills in policyTypes and protocols.
pub(crate) fn complete(object: &mut Value) {
    let Some(_) = object_at(object, "spec") else {
        return;
    };
    let spec = &mut object["spec"];
    set_default(spec, "podSelector", json!({}));
    if is_empty(&spec["policyTypes"]) {
        let mut types = vec!["Ingress"];
        if !is_empty(&spec["egress"]) {
            types.push("Egress");
        }
        spec["policyTypes"] = json!(types);
    }
    for (direction, _) in DIRECTIONS {
        for rule in list_mut(spec.get_mut(direction)) {
            for port in list_mut(rule.get_mut("ports")) {
                set_default(port, "protocol", "TCP");
            }
        }
    }
}

/// Checks the rules.
pub(crate) fn check(object: &Value) -> Vec<Cause> {
    let spec = &object["spec"];
    let mut causes = check_selector(&spec["podSelector"], "spec.podSelector");
    for (direction, peers) in DIRECTIONS {
        for (place, rule) in list(&spec[direction]).iter().enumerate() {
            let path = format!("spec.{direction}[{place}]");
            for (place, port) in list(&rule["ports"]).iter().enumerate() {
                causes.extend(check_port(port, &format!("{path}.ports[{place}]")));
            }
            for (place, peer) in list(&rule[peers]).iter().enumerate() {
                causes.extend(check_peer(peer, &format!("{path}.{peers}[{place}]")));
            }
        }
    }
    let types = list(&spec["policyTypes"]);
    if types.len() > 2 {
        let why = "may not specify more than two policyTypes";
        causes.push(Cause::invalid(
            "spec.policyTypes",
            &spec["policyTypes"],
            why,
        ));
    }
    for (place, kind) in types.iter().enumerate() {
        if !matches!(text(kind), "Ingress" | "Egress") {
            let path = format!("spec.policyTypes[{place}]");
            causes.push(Cause::unsupported(path, kind, &["Egress", "Ingress"]));
        }
    }
    causes
}

fn check_port(port: &Value, path: &str) -> Vec<Cause> {
    const RANGE: &str = "must be between 1 and 65535, inclusive";
    let mut causes = Vec::new();
    let protocol = &port["protocol"];
    if !matches!(text(protocol), "TCP" | "UDP" | "SCTP") {
        let known = ["SCTP", "TCP", "UDP"];
        causes.push(Cause::unsupported(
            format!("{path}.protocol"),
            protocol,
            &known,
        ));
    }
    let (number, end) = (&port["port"], &port["endPort"]);
    let end_path = format!("{path}.endPort");
    match number {
        Value::Null if !end.is_null() => {
            let why = "may not be specified when `port` is not specified";
            causes.push(Cause::invalid(end_path, end, why));
        }
        Value::Null => {}
        Value::Number(first) => {
            let in_range = |port: i64| (1..=65_535).contains(&port);
            let first = first.as_i64().unwrap_or(0);
            if !in_range(first) {
                causes.push(Cause::invalid(format!("{path}.port"), number, RANGE));
            }
            if let Some(last) = end.as_i64() {
                if last < first {
                    let why = "must be greater than or equal to `port`";
                    causes.push(Cause::invalid(end_path.clone(), end, why));
                }
                if !in_range(last) {
                    causes.push(Cause::invalid(end_path, end, RANGE));
                }
            }
        }
        _ => {
            if !end.is_null() {
                let why = "may not be specified when `port` is non-numeric";
                causes.push(Cause::invalid(end_path, end, why));
            }
            if !is_port_name(text(number)) {
                let why = "must be a port name: at most 15 lower case alphanumeric characters or \
                           '-', with at least one letter";
                causes.push(Cause::invalid(format!("{path}.port"), number, why));
            }
        }
    }
    causes
}

fn check_peer(peer: &Value, path: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    let mut selectors = 0;
    for key in ["podSelector", "namespaceSelector"] {
        if let Some(selector) = peer.get(key) {
            selectors += 1;
            causes.extend(check_selector(selector, &format!("{path}.{key}")));
        }
    }
    match (peer.get("ipBlock"), selectors) {
        (None, 0) => causes.push(Cause::required(path, "must specify a peer")),
        (None, _) => {}
        (Some(block), selectors) => {
            causes.extend(check_block(block, &format!("{path}.ipBlock")));
            if selectors > 0 {
                let why = "may not specify both ipBlock and another peer";
                causes.push(Cause::forbidden(path, why));
            }
        }
    }
    causes
}

fn check_block(block: &Value, path: &str) -> Vec<Cause> {
    const NO_CIDR: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
    let cidr = &block["cidr"];
    let cidr_path = format!("{path}.cidr");
    if is_empty(cidr) {
        return vec![Cause::required(cidr_path, "")];
    }
    let Ok(net) = text(cidr).parse::<IpNet>() else {
        return vec![Cause::invalid(cidr_path, cidr, NO_CIDR)];
    };
    let mut causes = Vec::new();
    for (place, except) in list(&block["except"]).iter().enumerate() {
        let path = format!("{path}.except[{place}]");
        match text(except).parse::<IpNet>() {
            Err(_) => causes.push(Cause::invalid(path, except, NO_CIDR)),
            Ok(hole) if !net.contains(&hole.network()) || hole.prefix_len() <= net.prefix_len() => {
                causes.push(Cause::invalid(
                    path,
                    except,
                    "must be a strict subset of `cidr`",
                ));
            }
            Ok(_) => {}
        }
    }
    causes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_protocols_are_filled_in() {
        for (spec, types) in [
            (json!({}), json!(["Ingress"])),
            (json!({"ingress": []}), json!(["Ingress"])),
            (json!({"egress": []}), json!(["Ingress"])),
            (json!({"egress": [{}]}), json!(["Ingress", "Egress"])),
            (json!({"policyTypes": ["Egress"]}), json!(["Egress"])),
        ] {
            let mut object = json!({"spec": spec});
            complete(&mut object);
            assert_eq!(object["spec"]["policyTypes"], types, "{spec}");
        }
        let mut object =
            json!({"spec": {"ingress": [{"ports": [{"port": 80}, {"protocol": "UDP"}]}]}});
        complete(&mut object);
        let ports = &object["spec"]["ingress"][0]["ports"];
        assert_eq!(
            ports,
            &json!([{"port": 80, "protocol": "TCP"}, {"protocol": "UDP"}])
        );
    }

    #[test]
    fn what_the_real_server_refuses_is_refused() {
        let rule = |ports: Value, from: Value| json!({"ingress": [{"ports": ports, "from": from}]});
        let port = |port: Value| rule(json!([port]), json!([]));
        let peer = |peer: Value| rule(json!([]), json!([peer]));
        for (spec, field) in [
            (port(json!({"port": 80})), None),
            (port(json!({"port": 80, "endPort": 80})), None),
            (port(json!({"port": "http"})), None),
            (port(json!({"protocol": "SCTP"})), None),
            (
                port(json!({"protocol": "ICMP"})),
                Some("spec.ingress[0].ports[0].protocol"),
            ),
            (
                port(json!({"port": 0})),
                Some("spec.ingress[0].ports[0].port"),
            ),
            (
                port(json!({"port": 65536})),
                Some("spec.ingress[0].ports[0].port"),
            ),
            (
                port(json!({"port": "UPPER"})),
                Some("spec.ingress[0].ports[0].port"),
            ),
            (
                port(json!({"port": 80, "endPort": 79})),
                Some("spec.ingress[0].ports[0].endPort"),
            ),
            (
                port(json!({"port": 80, "endPort": 65536})),
                Some("spec.ingress[0].ports[0].endPort"),
            ),
            (
                port(json!({"port": "http", "endPort": 90})),
                Some("spec.ingress[0].ports[0].endPort"),
            ),
            (
                port(json!({"endPort": 90})),
                Some("spec.ingress[0].ports[0].endPort"),
            ),
            (peer(json!({})), Some("spec.ingress[0].from[0]")),
            (
                peer(json!({"podSelector": {}, "namespaceSelector": {}})),
                None,
            ),
            (
                peer(json!({"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}})),
                Some("spec.ingress[0].from[0]"),
            ),
            (
                peer(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}})),
                None,
            ),
            (
                peer(json!({"ipBlock": {}})),
                Some("spec.ingress[0].from[0].ipBlock.cidr"),
            ),
            (
                peer(json!({"ipBlock": {"cidr": "10.0.0.0/33"}})),
                Some("spec.ingress[0].from[0].ipBlock.cidr"),
            ),
            (
                peer(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}})),
                Some("spec.ingress[0].from[0].ipBlock.except[0]"),
            ),
            (
                peer(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}})),
                Some("spec.ingress[0].from[0].ipBlock.except[0]"),
            ),
            (
                peer(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["fd00::/64"]}})),
                Some("spec.ingress[0].from[0].ipBlock.except[0]"),
            ),
            (
                json!({"policyTypes": ["Both"]}),
                Some("spec.policyTypes[0]"),
            ),
            (
                json!({"policyTypes": ["Ingress", "Egress", "Egress"]}),
                Some("spec.policyTypes"),
            ),
            (
                json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Is"}]}}),
                Some("spec.podSelector.matchExpressions[0].operator"),
            ),
        ] {
            let mut object = json!({"spec": spec});
            complete(&mut object);
            let causes = check(&object);
            let fields: Vec<_> = causes.iter().map(|cause| cause.field.as_str()).collect();
            assert_eq!(fields, field.into_iter().collect::<Vec<_>>(), "{spec}");
        }
    }
}
