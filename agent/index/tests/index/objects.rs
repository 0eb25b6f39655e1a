//! Objects from JSON, as the API serves them.

use hachi_index::{Endpoint, EndpointKey, Index, Object, PodName};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn parse<T: DeserializeOwned>(object: Value) -> Box<T> {
    Box::new(serde_json::from_value(object).expect("a valid object"))
}

pub(crate) fn object(value: Value) -> Object {
    match value["kind"].as_str().expect("a kind") {
        "Pod" => Object::Pod(parse(value)),
        "Namespace" => Object::Namespace(parse(value)),
        "Node" => Object::Node(parse(value)),
        "Service" => Object::Service(parse(value)),
        "EndpointSlice" => Object::EndpointSlice(parse(value)),
        "NetworkPolicy" => Object::NetworkPolicy(parse(value)),
        "ClusterNetworkPolicy" => Object::ClusterNetworkPolicy(parse(value)),
        "AdminNetworkPolicy" => Object::AdminNetworkPolicy(parse(value)),
        "BaselineAdminNetworkPolicy" => Object::BaselineAdminNetworkPolicy(parse(value)),
        other => panic!("no such kind: {other}"),
    }
}

pub(crate) fn namespace(name: &str, labels: Value) -> Object {
    object(json!({"kind": "Namespace", "metadata": {"name": name, "labels": labels}}))
}

/// A running Pod of namespace `a` on node `n1`.
pub(crate) fn pod(name: &str, uid: &str, ip: &str) -> Value {
    json!({
        "kind": "Pod",
        "metadata": {"namespace": "a", "name": name, "uid": uid, "labels": {"app": name},
                     "creationTimestamp": "2024-01-01T00:00:00Z"},
        "spec": {"nodeName": "n1", "containers": [
            {"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    })
}

pub(crate) fn endpoint(pod: Option<(&str, &str)>, ifindex: u32, ip: &str) -> Endpoint {
    Endpoint {
        key: EndpointKey {
            container_id: format!("c{ifindex}"),
            ifname: "eth0".into(),
        },
        pod: pod.map(|(name, uid)| PodName {
            namespace: "a".into(),
            name: name.into(),
            uid: Some(uid.into()),
        }),
        ifindex,
        mac: [2, 0, 0, 0, 0, 1],
        host_mac: [2, 0, 0, 0, 0, 2],
        addresses: vec![ip.parse().unwrap()],
        host_ports: Vec::new(),
    }
}

/// An index of node `n1` that has taken the objects in.
pub(crate) fn index(objects: impl IntoIterator<Item = Object>) -> Index {
    let mut index = Index::new("n1");
    for object in objects {
        index.apply(object);
    }
    index
}
