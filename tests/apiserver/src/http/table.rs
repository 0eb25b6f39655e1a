//! Tables: what `kubectl get` prints, by kind.

use serde_json::{Value, json};

use super::reply::{Include, metadata};
use crate::{
    Resource, clock,
    json::{entries, is_empty, list, text},
    resource::{
        ENDPOINT_SLICES, NAMESPACES, NETWORK_POLICIES, NODES, PODS, SERVICE_ACCOUNTS, SERVICES,
    },
    store::Object,
};

/// A column: its title, whether only `-o wide` shows it, and its cell for an object.
type Column = (&'static str, bool, fn(&Value) -> Value);

const NAME: Column = ("Name", false, |object| object["metadata"]["name"].clone());
const AGE: Column = ("Age", false, |object| {
    age(&object["metadata"]["creationTimestamp"])
});

fn columns_of(resource: &Resource) -> &'static [Column] {
    if resource == PODS {
        &[
            NAME,
            ("Ready", false, ready),
            ("Status", false, status),
            ("Restarts", false, restarts),
            AGE,
            ("IP", true, |pod| {
                or_none(joined(&pod["status"]["podIPs"], "ip"))
            }),
            ("Node", true, |pod| {
                or_none(text(&pod["spec"]["nodeName"]).into())
            }),
            ("Nominated Node", true, |pod| {
                or_none(text(&pod["status"]["nominatedNodeName"]).into())
            }),
            ("Readiness Gates", true, |_| json!("<none>")),
        ]
    } else if resource == NODES {
        &[
            NAME,
            ("Status", false, node_status),
            ("Roles", false, roles),
            AGE,
            ("Version", false, |node| {
                node["status"]["nodeInfo"]["kubeletVersion"].clone()
            }),
            ("Internal-IP", true, internal_ip),
            ("Pod-CIDRs", true, |node| {
                or_none(texts(&node["spec"]["podCIDRs"]))
            }),
        ]
    } else if resource == SERVICES {
        &[
            NAME,
            ("Type", false, |service| service["spec"]["type"].clone()),
            ("Cluster-IP", false, |service| {
                or_none(text(&service["spec"]["clusterIP"]).into())
            }),
            ("External-IP", false, external_ip),
            ("Port(s)", false, |service| {
                or_none(ports(&service["spec"]["ports"], "port"))
            }),
            AGE,
            ("Selector", true, |service| {
                or_none(labels(&service["spec"]["selector"]))
            }),
        ]
    } else if resource == NAMESPACES {
        &[
            NAME,
            ("Status", false, |namespace| {
                namespace["status"]["phase"].clone()
            }),
            AGE,
        ]
    } else if resource == NETWORK_POLICIES {
        &[
            NAME,
            ("Pod-Selector", false, |policy| {
                or_none(selector(&policy["spec"]["podSelector"]))
            }),
            AGE,
        ]
    } else if resource == ENDPOINT_SLICES {
        &[
            NAME,
            ("AddressType", false, |slice| slice["addressType"].clone()),
            ("Ports", false, |slice| {
                or_unset(ports(&slice["ports"], "port"))
            }),
            ("Endpoints", false, |slice| or_unset(endpoints(slice))),
            AGE,
        ]
    } else if resource == SERVICE_ACCOUNTS {
        &[
            NAME,
            ("Secrets", false, |account| {
                json!(list(&account["secrets"]).len())
            }),
            AGE,
        ]
    } else if resource.kind == "ConfigMap" {
        &[
            NAME,
            ("Data", false, |map| json!(entries(&map["data"]).count())),
            AGE,
        ]
    } else if resource.kind == "Event" {
        &[
            ("Last Seen", false, |event| age(&event["lastTimestamp"])),
            ("Type", false, |event| event["type"].clone()),
            ("Reason", false, |event| event["reason"].clone()),
            ("Object", false, involved),
            ("Message", false, |event| event["message"].clone()),
        ]
    } else {
        &[NAME, AGE]
    }
}

/// The definitions of a kind's columns.
pub(super) fn columns(resource: &Resource) -> Value {
    let definition = |(title, wide, _): &Column| {
        json!({
            "name": title,
            "type": "string",
            "format": if *title == "Name" { "name" } else { "" },
            "description": "",
            "priority": u8::from(*wide),
        })
    };
    columns_of(resource).iter().map(definition).collect()
}

/// An object's row.
pub(super) fn row(resource: &Resource, object: &Object, include: Include) -> Value {
    let cells: Vec<_> = columns_of(resource)
        .iter()
        .map(|(.., cell)| cell(object))
        .collect();
    match include {
        Include::Nothing => json!({"cells": cells}),
        Include::Metadata => json!({"cells": cells, "object": metadata(object)}),
        Include::Object => json!({"cells": cells, "object": **object}),
    }
}

fn age(timestamp: &Value) -> Value {
    json!(clock::age(text(timestamp)))
}

fn or_none(text: String) -> Value {
    json!(if text.is_empty() {
        "<none>".to_owned()
    } else {
        text
    })
}

fn or_unset(text: String) -> Value {
    json!(if text.is_empty() {
        "<unset>".to_owned()
    } else {
        text
    })
}

fn texts(values: &Value) -> String {
    list(values).iter().map(text).collect::<Vec<_>>().join(",")
}

fn joined(values: &Value, key: &str) -> String {
    list(values)
        .iter()
        .map(|value| text(&value[key]))
        .collect::<Vec<_>>()
        .join(",")
}

fn labels(labels: &Value) -> String {
    let pairs = entries(labels).map(|(key, value)| format!("{key}={}", text(value)));
    pairs.collect::<Vec<_>>().join(",")
}

fn selector(selector: &Value) -> String {
    let expressions = list(&selector["matchExpressions"])
        .iter()
        .map(|expression| {
            let (key, values) = (text(&expression["key"]), texts(&expression["values"]));
            match text(&expression["operator"]) {
                "In" => format!("{key} in ({values})"),
                "NotIn" => format!("{key} notin ({values})"),
                "DoesNotExist" => format!("!{key}"),
                _ => key.to_owned(),
            }
        });
    let first = Some(labels(&selector["matchLabels"])).filter(|text| !text.is_empty());
    first
        .into_iter()
        .chain(expressions)
        .collect::<Vec<_>>()
        .join(",")
}

fn ports(ports: &Value, key: &str) -> String {
    let port = |port: &Value| {
        let number = &port[key];
        let protocol = text(&port["protocol"]);
        match port["nodePort"].as_u64() {
            Some(node) => format!("{number}:{node}/{protocol}"),
            None if port.get("targetPort").is_some() => format!("{number}/{protocol}"),
            None => number.to_string(),
        }
    };
    list(ports).iter().map(port).collect::<Vec<_>>().join(",")
}

fn endpoints(slice: &Value) -> String {
    let all = list(&slice["endpoints"]);
    let shown = all
        .iter()
        .take(3)
        .map(|endpoint| texts(&endpoint["addresses"]));
    let mut text = shown.collect::<Vec<_>>().join(",");
    if all.len() > 3 {
        text += &format!(" + {} more...", all.len() - 3);
    }
    text
}

fn ready(pod: &Value) -> Value {
    let statuses = list(&pod["status"]["containerStatuses"]);
    let ready = statuses
        .iter()
        .filter(|status| status["ready"] == json!(true))
        .count();
    json!(format!(
        "{ready}/{}",
        list(&pod["spec"]["containers"]).len()
    ))
}

fn restarts(pod: &Value) -> Value {
    let statuses = list(&pod["status"]["containerStatuses"]).iter();
    json!(
        statuses
            .filter_map(|status| status["restartCount"].as_u64())
            .sum::<u64>()
            .to_string()
    )
}

fn status(pod: &Value) -> Value {
    if pod["metadata"].get("deletionTimestamp").is_some() {
        return json!("Terminating");
    }
    let status = &pod["status"];
    for container in list(&status["containerStatuses"]) {
        for state in ["waiting", "terminated"] {
            let reason = &container["state"][state]["reason"];
            if !is_empty(reason) {
                return reason.clone();
            }
        }
    }
    if is_empty(&status["reason"]) {
        status["phase"].clone()
    } else {
        status["reason"].clone()
    }
}

fn node_status(node: &Value) -> Value {
    let conditions = list(&node["status"]["conditions"]);
    let ready = conditions
        .iter()
        .find(|condition| text(&condition["type"]) == "Ready");
    let mut status = match ready.map(|condition| text(&condition["status"])) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if node["spec"]["unschedulable"] == json!(true) {
        status += ",SchedulingDisabled";
    }
    json!(status)
}

fn roles(node: &Value) -> Value {
    let roles = entries(&node["metadata"]["labels"])
        .filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/"));
    or_none(roles.collect::<Vec<_>>().join(","))
}

fn internal_ip(node: &Value) -> Value {
    let addresses = list(&node["status"]["addresses"]).iter();
    let internal = addresses.filter(|address| text(&address["type"]) == "InternalIP");
    or_none(
        internal
            .map(|address| text(&address["address"]))
            .collect::<Vec<_>>()
            .join(","),
    )
}

fn external_ip(service: &Value) -> Value {
    let mut found = Vec::new();
    for ingress in list(&service["status"]["loadBalancer"]["ingress"]) {
        found.extend(["ip", "hostname"].map(|key| text(&ingress[key])));
    }
    found.extend(list(&service["spec"]["externalIPs"]).iter().map(text));
    found.push(text(&service["spec"]["externalName"]));
    found.retain(|address| !address.is_empty());
    if found.is_empty() && text(&service["spec"]["type"]) == "LoadBalancer" {
        found.push("<pending>");
    }
    or_none(found.join(","))
}

fn involved(event: &Value) -> Value {
    let object = &event["involvedObject"];
    let kind = text(&object["kind"]).to_lowercase();
    json!(format!("{kind}/{}", text(&object["name"])))
}
