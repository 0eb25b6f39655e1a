//! What a Pod's object asks of its kubelet.

use k8s_openapi::api::core::v1::{ContainerPort, Pod};
use kube::ResourceExt as _;
use serde_json::{Value, json};

use super::PHASE_ANNOTATION;

/// Whether the Pod's containers have ended for good.
pub(crate) fn finished(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The phase that the annotation asks for.
pub(super) fn ended(pod: &Pod) -> Option<String> {
    let phase = pod.annotations().get(PHASE_ANNOTATION)?;
    ["Succeeded", "Failed"]
        .contains(&phase.as_str())
        .then(|| phase.clone())
}

/// The ports of the Pod's containers, and which of them are SCTP's; 80 if it names none.
pub(super) fn ports(pod: &Pod) -> Vec<(i32, bool)> {
    let mut ports: Vec<_> = container_ports(pod)
        .map(|port| {
            (
                port.container_port,
                port.protocol.as_deref() == Some("SCTP"),
            )
        })
        .collect();
    ports.sort_unstable();
    ports.dedup();
    if ports.is_empty() {
        vec![(80, false)]
    } else {
        ports
    }
}

/// The ports that are to be mapped to the node's, as containerd writes the capability `portMappings`.
pub(super) fn host_ports(pod: &Pod) -> Vec<Value> {
    container_ports(pod)
        .filter_map(|port| {
            Some(json!({
                "HostPort": port.host_port?,
                "ContainerPort": port.container_port,
                "Protocol": port.protocol.as_deref().unwrap_or("TCP").to_lowercase(),
                "HostIP": port.host_ip.as_deref().unwrap_or(""),
            }))
        })
        .collect()
}

fn container_ports(pod: &Pod) -> impl Iterator<Item = &ContainerPort> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers.flat_map(|container| container.ports.iter().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(value: Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_pod_without_ports_serves_on_80() {
        let plain = pod(json!({"spec": {"containers": [{"name": "main"}]}}));
        assert_eq!(ports(&plain), [(80, false)]);
        let both = pod(json!({"spec": {"containers": [
            {"name": "one", "ports": [{"containerPort": 53, "protocol": "UDP"},
                                      {"containerPort": 53, "protocol": "TCP"}]},
            {"name": "two", "ports": [{"containerPort": 9, "protocol": "SCTP"}]},
        ]}}));
        assert_eq!(ports(&both), [(9, true), (53, false)]);
    }

    #[test]
    fn host_ports_become_mappings() {
        let mapped = pod(json!({"spec": {"containers": [{"name": "main", "ports": [
            {"containerPort": 80, "hostPort": 8080}, {"containerPort": 81},
        ]}]}}));
        assert_eq!(
            host_ports(&mapped),
            [json!({"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""})]
        );
    }

    #[test]
    fn only_the_two_last_phases_end_a_pod() {
        let with =
            |phase: &str| pod(json!({"metadata": {"annotations": {PHASE_ANNOTATION: phase}}}));
        assert_eq!(ended(&with("Failed")).as_deref(), Some("Failed"));
        assert_eq!(ended(&with("Running")), None);
        assert!(finished(&pod(json!({"status": {"phase": "Succeeded"}}))));
        assert!(!finished(&pod(json!({"status": {"phase": "Running"}}))));
    }
}
