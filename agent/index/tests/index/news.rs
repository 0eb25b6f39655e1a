//! What an object says anew: most events of an API are about a status, and mean nothing here.

use serde_json::{Value, json};

use crate::objects::{index, object, pod};

fn node(spec: &Value, heartbeat: &str) -> Value {
    json!({
        "kind": "Node",
        "metadata": {"name": "n2", "resourceVersion": heartbeat},
        "spec": spec,
        "status": {
            "addresses": [{"type": "InternalIP", "address": "192.0.2.2"}],
            "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": heartbeat}],
            "images": [{"names": [heartbeat], "sizeBytes": 1}],
        },
    })
}

#[test]
fn a_heartbeat_of_a_node_is_no_news() {
    let mut index = index([]);
    let block = json!({"podCIDR": "10.2.0.0/24"});
    assert!(index.apply(object(node(&block, "2024-01-01T00:00:00Z"))));
    assert!(!index.apply(object(node(&block, "2024-01-01T00:05:00Z"))));
    let other = json!({"podCIDR": "10.3.0.0/24"});
    assert!(index.apply(object(node(&other, "2024-01-01T00:05:00Z"))));
    let marked =
        json!({"podCIDR": "10.3.0.0/24", "taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]});
    let mut marked = node(&marked, "2024-01-01T00:05:00Z");
    marked["spec"]["taints"][0]["effect"] = json!("NoSchedule");
    assert!(index.apply(object(marked.clone())));
    assert!(!index.apply(object(marked)));
    index.delete(hachi_index::Kind::Node, "", "n2");
    assert!(index.apply(object(node(&other, "2024-01-01T00:10:00Z"))));
}

#[test]
fn what_is_wrong_with_an_object_is_news_once() {
    let mut index = index([]);
    let wrong = json!({"podCIDR": "10.2.0.0"});
    assert!(index.apply(object(node(&wrong, "2024-01-01T00:01:00Z"))));
    assert!(!index.apply(object(node(&wrong, "2024-01-01T00:02:00Z"))));
    // The same to the datapath, but nobody need complain any more.
    assert!(index.apply(object(node(&json!({}), "2024-01-01T00:03:00Z"))));
    assert!(!index.apply(object(node(&json!({}), "2024-01-01T00:04:00Z"))));
}

#[test]
fn a_status_of_anything_else_is_no_news() {
    let slice = json!({
        "kind": "EndpointSlice",
        "metadata": {"namespace": "a", "name": "s-1",
                     "labels": {"kubernetes.io/service-name": "s"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": true}}],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
    });
    let service = json!({
        "kind": "Service",
        "metadata": {"namespace": "a", "name": "s"},
        "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"],
                 "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
    });
    let policy = json!({
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "a", "name": "p"},
        "spec": {"podSelector": {}},
    });
    let namespace = json!({"kind": "Namespace", "metadata": {"name": "a", "labels": {"x": "y"}}});
    let mut index = index([]);
    for value in [
        pod("web", "1", "10.0.0.1"),
        service,
        slice,
        policy,
        namespace,
    ] {
        let kind = value["kind"].clone();
        assert!(index.apply(object(value.clone())), "{kind}: it is new");
        let mut again = value.clone();
        again["metadata"]["resourceVersion"] = json!("7");
        again["metadata"]["annotations"] = json!({"example.org/seen": "now"});
        assert!(!index.apply(object(again)), "{kind}: it says nothing new");
    }
    let mut moved = pod("web", "1", "10.0.0.1");
    moved["metadata"]["labels"] = json!({"app": "other"});
    assert!(index.apply(object(moved)));
}
