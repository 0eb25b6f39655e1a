//! Pods: what is filled in, and what is refused.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::meta::{is_label, is_port_name};
use crate::{
    failure::Cause,
    json::{is_empty, list, list_mut, object_at, remove, set_default, text},
    store::Part,
};

const CONTAINERS: [&str; 2] = ["initContainers", "containers"];

/// Fills in what the real API server would.
pub(crate) fn complete(object: &mut Value) {
    if object_at(object, "spec").is_some() {
        let spec = &mut object["spec"];
        for (key, default) in [
            ("restartPolicy", json!("Always")),
            ("dnsPolicy", json!("ClusterFirst")),
            ("schedulerName", json!("default-scheduler")),
            ("terminationGracePeriodSeconds", json!(30)),
            ("securityContext", json!({})),
            ("enableServiceLinks", json!(true)),
            ("serviceAccountName", json!("default")),
        ] {
            set_default(spec, key, default);
        }
        let host_network = spec["hostNetwork"].as_bool().unwrap_or(false);
        for key in CONTAINERS {
            list_mut(spec.get_mut(key))
                .iter_mut()
                .for_each(|c| container(c, host_network));
        }
    }
    if object_at(object, "status").is_some() {
        set_default(&mut object["status"], "phase", "Pending");
    }
}

fn container(container: &mut Value, host_network: bool) {
    let image = text(&container["image"]);
    let tag = image
        .rsplit('/')
        .next()
        .and_then(|name| name.split_once([':', '@']));
    let latest = tag.is_none_or(|(_, tag)| tag == "latest");
    let policy = if latest { "Always" } else { "IfNotPresent" };
    for (key, default) in [
        ("imagePullPolicy", json!(policy)),
        ("resources", json!({})),
        ("terminationMessagePath", json!("/dev/termination-log")),
        ("terminationMessagePolicy", json!("File")),
    ] {
        set_default(container, key, default);
    }
    for port in list_mut(container.get_mut("ports")) {
        set_default(port, "protocol", "TCP");
        if host_network {
            let number = port["containerPort"].clone();
            set_default(port, "hostPort", number);
        }
    }
}

/// Checks the containers and their ports.
pub(crate) fn check(object: &Value) -> Vec<Cause> {
    let spec = &object["spec"];
    let mut causes = Vec::new();
    if is_empty(&spec["containers"]) {
        causes.push(Cause::required("spec.containers", ""));
    }
    let policy = &spec["restartPolicy"];
    if !matches!(text(policy), "Always" | "OnFailure" | "Never") {
        let known = ["Always", "OnFailure", "Never"];
        causes.push(Cause::unsupported("spec.restartPolicy", policy, &known));
    }
    let mut names = BTreeSet::new();
    for key in CONTAINERS {
        for (place, container) in list(&spec[key]).iter().enumerate() {
            let path = format!("spec.{key}[{place}]");
            let name = &container["name"];
            if is_empty(name) {
                causes.push(Cause::required(format!("{path}.name"), ""));
            } else if !is_label(text(name)) {
                let why = "a lowercase RFC 1123 label must consist of lower case alphanumeric \
                           characters or '-', and must start and end with an alphanumeric \
                           character";
                causes.push(Cause::invalid(format!("{path}.name"), name, why));
            } else if !names.insert(text(name)) {
                causes.push(Cause::duplicate(format!("{path}.name"), name));
            }
            if is_empty(&container["image"]) {
                causes.push(Cause::required(format!("{path}.image"), ""));
            }
            for (place, port) in list(&container["ports"]).iter().enumerate() {
                causes.extend(check_port(port, &format!("{path}.ports[{place}]")));
            }
        }
    }
    causes
}

fn check_port(port: &Value, path: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    for key in ["containerPort", "hostPort"] {
        let number = &port[key];
        let in_range = number
            .as_u64()
            .is_some_and(|number| (1..=65_535).contains(&number));
        if !in_range && (key == "containerPort" || !number.is_null()) {
            let why = "must be between 1 and 65535, inclusive";
            causes.push(Cause::invalid(format!("{path}.{key}"), number, why));
        }
    }
    if !matches!(text(&port["protocol"]), "TCP" | "UDP" | "SCTP") {
        let known = ["SCTP", "TCP", "UDP"];
        causes.push(Cause::unsupported(
            format!("{path}.protocol"),
            &port["protocol"],
            &known,
        ));
    }
    if port
        .get("name")
        .is_some_and(|name| !is_port_name(text(name)))
    {
        let why = "must be a port name: at most 15 lower case alphanumeric characters or '-', \
                   with at least one letter";
        causes.push(Cause::invalid(format!("{path}.name"), &port["name"], why));
    }
    causes
}

/// Little of a Pod's spec changes once it is made; its node only by binding.
pub(crate) fn check_update(old: &Value, object: &Value, part: Part) -> Vec<Cause> {
    let fixed = |pod: &Value| {
        let mut spec = pod["spec"].clone();
        for key in [
            "activeDeadlineSeconds",
            "terminationGracePeriodSeconds",
            "tolerations",
        ] {
            remove(&mut spec, key);
        }
        for key in CONTAINERS {
            list_mut(spec.get_mut(key)).iter_mut().for_each(|c| {
                remove(c, "image");
                remove(c, "imagePullPolicy");
            });
        }
        if part == Part::Binding && is_empty(&old["spec"]["nodeName"]) {
            remove(&mut spec, "nodeName");
        }
        spec
    };
    if fixed(old) == fixed(object) {
        return Vec::new();
    }
    let why = "pod updates may not change fields other than `spec.containers[*].image`, \
               `spec.initContainers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations` \
               (only additions to existing tolerations), `spec.terminationGracePeriodSeconds`";
    vec![Cause::forbidden("spec", why)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_and_ports_are_checked() {
        let container = |extra: Value| {
            let mut container = json!({"name": "c", "image": "i"});
            for (key, value) in extra.as_object().unwrap() {
                container[key] = value.clone();
            }
            json!({"containers": [container]})
        };
        for (spec, field) in [
            (container(json!({})), None),
            (json!({}), Some("spec.containers")),
            (
                container(json!({"name": ""})),
                Some("spec.containers[0].name"),
            ),
            (
                container(json!({"name": "A"})),
                Some("spec.containers[0].name"),
            ),
            (
                container(json!({"image": ""})),
                Some("spec.containers[0].image"),
            ),
            (
                container(json!({"ports": [{"containerPort": 80, "name": "http"}]})),
                None,
            ),
            (
                container(json!({"ports": [{"containerPort": 0}]})),
                Some("spec.containers[0].ports[0].containerPort"),
            ),
            (
                container(json!({"ports": [{"containerPort": 80, "name": "HTTP"}]})),
                Some("spec.containers[0].ports[0].name"),
            ),
            (
                json!({"containers": [{"name": "c", "image": "i"}, {"name": "c", "image": "i"}]}),
                Some("spec.containers[1].name"),
            ),
        ] {
            let mut object = json!({"spec": spec});
            complete(&mut object);
            let causes = check(&object);
            let fields: Vec<_> = causes.iter().map(|cause| cause.field.as_str()).collect();
            assert_eq!(fields, field.into_iter().collect::<Vec<_>>(), "{spec}");
        }
    }

    #[test]
    fn only_a_binding_names_the_node() {
        let pod = |node: &str, image: &str| {
            let mut pod = json!({"spec": {"containers": [{"name": "c", "image": image}]}});
            if !node.is_empty() {
                pod["spec"]["nodeName"] = json!(node);
            }
            pod
        };
        assert!(check_update(&pod("", "a"), &pod("", "b"), Part::Object).is_empty());
        assert!(!check_update(&pod("", "a"), &pod("n", "a"), Part::Object).is_empty());
        assert!(check_update(&pod("", "a"), &pod("n", "a"), Part::Binding).is_empty());
        assert!(!check_update(&pod("m", "a"), &pod("n", "a"), Part::Binding).is_empty());
    }
}
