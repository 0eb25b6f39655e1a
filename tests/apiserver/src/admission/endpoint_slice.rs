//! EndpointSlices: what is filled in, and what is refused.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use crate::{
    failure::Cause,
    json::{is_empty, list, list_mut, set_default, text},
};

/// Fills in the ports' names and protocols.
pub(crate) fn complete(object: &mut Value) {
    for port in list_mut(object.get_mut("ports")) {
        set_default(port, "protocol", "TCP");
        if port.get("name").is_none() {
            port["name"] = json!("");
        }
    }
    set_default(object, "endpoints", json!([]));
}

/// Checks addresses and ports.
pub(crate) fn check(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let family = &object["addressType"];
    match text(family) {
        "IPv4" | "IPv6" | "FQDN" => {}
        "" => causes.push(Cause::required("addressType", "")),
        _ => causes.push(Cause::unsupported(
            "addressType",
            family,
            &["FQDN", "IPv4", "IPv6"],
        )),
    }
    for (place, endpoint) in list(&object["endpoints"]).iter().enumerate() {
        let path = format!("endpoints[{place}].addresses");
        if is_empty(&endpoint["addresses"]) {
            causes.push(Cause::required(
                path.clone(),
                "must contain at least 1 address",
            ));
        }
        for address in list(&endpoint["addresses"]) {
            let good = match text(family) {
                "IPv4" => text(address).parse::<Ipv4Addr>().is_ok(),
                "IPv6" => text(address).parse::<Ipv6Addr>().is_ok(),
                _ => true,
            };
            if !good {
                let why = format!("must be a valid {} address", text(family));
                causes.push(Cause::invalid(path.clone(), address, &why));
            }
        }
    }
    for (place, port) in list(&object["ports"]).iter().enumerate() {
        if !matches!(text(&port["protocol"]), "TCP" | "UDP" | "SCTP") {
            let path = format!("ports[{place}].protocol");
            let known = ["SCTP", "TCP", "UDP"];
            causes.push(Cause::unsupported(path, &port["protocol"], &known));
        }
    }
    causes
}

/// A slice keeps its family.
pub(crate) fn check_update(old: &Value, object: &Value) -> Vec<Cause> {
    if old["addressType"] == object["addressType"] {
        return Vec::new();
    }
    vec![Cause::invalid(
        "addressType",
        &object["addressType"],
        "field is immutable",
    )]
}
