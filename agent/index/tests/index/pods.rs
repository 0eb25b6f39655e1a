//! Who has which address, and what applies to this node's Pods.

use std::{collections::BTreeSet, net::IpAddr};

use crate::objects::{endpoint, index, namespace, object, pod};
use hachi_index::{ADDRESSES_ANNOTATION, Enforcement, Index, Kind, PodName};
use serde_json::json;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The label `app` of the Pod that has the address.
fn holder(index: &mut Index, address: &str) -> Option<String> {
    let peer = index.desired().peers.get(&ip(address))?;
    peer.labels.get("app").map(str::to_owned)
}

fn enforcement(index: &mut Index, ifindex: u32) -> Enforcement {
    let of = |index: u32| format!("c{index}");
    let endpoints = &index.desired().endpoints;
    let found = endpoints
        .iter()
        .find(|(key, _)| key.container_id == of(ifindex));
    found.expect("the endpoint").1.enforcement.clone()
}

#[test]
fn addresses_come_from_the_status_of_both_families() {
    let mut dual = pod("web", "1", "10.0.0.1");
    dual["status"]["podIPs"] = json!([{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]);
    let mut old_style = pod("db", "2", "10.0.0.2");
    old_style["status"] = json!({"phase": "Running", "podIP": "10.0.0.2"});
    let mut index = index([object(dual), object(old_style)]);
    for (address, name) in [("10.0.0.1", "web"), ("fd00::1", "web"), ("10.0.0.2", "db")] {
        assert_eq!(
            holder(&mut index, address).as_deref(),
            Some(name),
            "{address}"
        );
    }
}

#[test]
fn host_network_and_finished_pods_are_no_peers() {
    let mut host = pod("host", "1", "192.0.2.1");
    host["spec"]["hostNetwork"] = json!(true);
    let mut index = index([object(host)]);
    for phase in ["Succeeded", "Failed"] {
        let mut done = pod("done", "2", "10.0.0.2");
        index.apply(object(done.clone()));
        assert_eq!(holder(&mut index, "10.0.0.2").as_deref(), Some("done"));
        done["status"]["phase"] = json!(phase);
        index.apply(object(done));
        assert_eq!(holder(&mut index, "10.0.0.2"), None, "{phase}");
    }
    assert!(index.desired().peers.is_empty());
}

#[test]
fn a_terminating_pod_counts_until_it_is_gone() {
    let mut leaving = pod("web", "1", "10.0.0.1");
    leaving["metadata"]["deletionTimestamp"] = json!("2024-01-02T00:00:00Z");
    let mut index = index([object(leaving)]);
    assert_eq!(holder(&mut index, "10.0.0.1").as_deref(), Some("web"));
    index.delete(Kind::Pod, "a", "web");
    assert_eq!(holder(&mut index, "10.0.0.1"), None);
}

#[test]
fn a_reused_address_is_the_living_pods_in_any_order() {
    let mut leaving = pod("old", "1", "10.0.0.1");
    leaving["metadata"]["deletionTimestamp"] = json!("2024-01-02T00:00:00Z");
    leaving["metadata"]["creationTimestamp"] = json!("2025-01-01T00:00:00Z");
    let mut younger = pod("younger", "0", "10.0.0.2");
    younger["metadata"]["creationTimestamp"] = json!("2025-01-01T00:00:00Z");
    let objects = [
        object(leaving),
        object(pod("new", "2", "10.0.0.1")),
        object(younger),
        object(pod("older", "3", "10.0.0.2")),
    ];
    for reverse in [false, true] {
        let mut objects = objects.to_vec();
        if reverse {
            objects.reverse();
        }
        let mut index = index(objects);
        assert_eq!(holder(&mut index, "10.0.0.1").as_deref(), Some("new"));
        assert_eq!(holder(&mut index, "10.0.0.2").as_deref(), Some("younger"));
        index.delete(Kind::Pod, "a", "new");
        assert_eq!(
            holder(&mut index, "10.0.0.1").as_deref(),
            Some("old"),
            "it is still there"
        );
    }
}

#[test]
fn the_plugin_knows_a_local_address_before_the_status_does() {
    let mut starting = pod("web", "1", "10.0.0.1");
    starting["status"] = json!({"phase": "Pending"});
    let mut index = index([object(starting)]);
    assert_eq!(holder(&mut index, "10.0.0.1"), None);
    index.add_endpoint(endpoint(Some(("web", "1")), 7, "10.0.0.1"));
    assert_eq!(holder(&mut index, "10.0.0.1").as_deref(), Some("web"));
    assert!(index.remove_endpoint(&endpoint(None, 7, "10.0.0.1").key));
    assert_eq!(holder(&mut index, "10.0.0.1"), None);
    assert!(!index.remove_endpoint(&endpoint(None, 7, "10.0.0.1").key));
}

#[test]
fn an_interface_outweighs_what_the_api_still_says() {
    let mut index = index([object(pod("old", "1", "10.0.0.1"))]);
    index.add_endpoint(endpoint(Some(("new", "2")), 8, "10.0.0.1"));
    assert_eq!(
        holder(&mut index, "10.0.0.1"),
        None,
        "the new Pod is not known yet"
    );
    index.apply(object(pod("new", "2", "10.0.0.1")));
    assert_eq!(holder(&mut index, "10.0.0.1").as_deref(), Some("new"));
}

#[test]
fn of_two_interfaces_with_one_address_the_newer_has_it() {
    let pods = [
        object(pod("old", "1", "10.0.0.1")),
        object(pod("new", "2", "10.0.0.1")),
    ];
    let mut index = index(pods);
    index.add_endpoint(endpoint(Some(("new", "2")), 9, "10.0.0.1"));
    index.add_endpoint(endpoint(Some(("old", "1")), 8, "10.0.0.1"));
    assert_eq!(holder(&mut index, "10.0.0.1").as_deref(), Some("new"));
    let known_by: Vec<_> = index
        .desired()
        .endpoints
        .values()
        .map(|e| (e.endpoint.ifindex, e.addresses.len()))
        .collect();
    assert_eq!(known_by, [(8, 0), (9, 1)]);
}

#[test]
fn a_pod_is_its_uid_not_its_name() {
    let mut index = index([object(pod("web-0", "old", "10.0.0.1"))]);
    index.add_endpoint(endpoint(Some(("web-0", "new")), 7, "10.0.0.2"));
    assert!(index.knows_pod("a", "web-0", Some("old")));
    assert!(!index.knows_pod("a", "web-0", Some("new")));
    assert!(
        index.knows_pod("a", "web-0", None),
        "a runtime that passes no UID goes by the name"
    );
    assert_eq!(enforcement(&mut index, 7), Enforcement::Quarantined);
    assert_eq!(holder(&mut index, "10.0.0.2"), None);
    index.apply(object(pod("web-0", "new", "10.0.0.2")));
    assert!(matches!(
        enforcement(&mut index, 7),
        Enforcement::Pod { .. }
    ));
    index.delete(Kind::Pod, "a", "web-0");
    assert_eq!(enforcement(&mut index, 7), Enforcement::Quarantined);
}

#[test]
fn what_applies_to_an_endpoint() {
    let policy = |name: &str, app: &str| {
        object(
            json!({"kind": "NetworkPolicy", "metadata": {"namespace": "a", "name": name},
            "spec": {"podSelector": {"matchLabels": {"app": app}}}}),
        )
    };
    let mut index = index([
        object(pod("web", "1", "10.0.0.1")),
        policy("z", "web"),
        policy("y", "web"),
        policy("x", "db"),
    ]);
    index.add_endpoint(endpoint(Some(("web", "1")), 7, "10.0.0.1"));
    index.add_endpoint(endpoint(None, 8, "10.0.0.8"));
    let selected = |index: &mut Index| match enforcement(index, 7) {
        Enforcement::Pod { policies, .. } => policies
            .iter()
            .map(|p| p.id.name.to_string())
            .collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(selected(&mut index), ["y", "z"]);
    assert_eq!(enforcement(&mut index, 8), Enforcement::Unmanaged);
    let mut relabelled = pod("web", "1", "10.0.0.1");
    relabelled["metadata"]["labels"]["app"] = json!("db");
    index.apply(object(relabelled.clone()));
    assert_eq!(selected(&mut index), ["x"]);
    index.delete(Kind::NetworkPolicy, "a", "x");
    assert_eq!(selected(&mut index), Vec::<String>::new());
    relabelled["status"]["phase"] = json!("Succeeded");
    index.apply(object(relabelled));
    assert_eq!(
        enforcement(&mut index, 7),
        Enforcement::Quarantined,
        "nobody is in there"
    );
}

#[test]
fn namespace_labels_reach_the_pods_in_any_order() {
    let mut index = index([object(pod("web", "1", "10.0.0.1"))]);
    let team = |index: &mut Index| {
        let labels = index.desired().peers[&ip("10.0.0.1")]
            .namespace_labels
            .clone()?;
        labels.get("team").map(str::to_owned)
    };
    assert_eq!(team(&mut index), None);
    index.apply(namespace("a", json!({"team": "x"})));
    assert_eq!(team(&mut index).as_deref(), Some("x"));
    index.apply(namespace("a", json!({"team": "y"})));
    assert_eq!(team(&mut index).as_deref(), Some("y"));
    index.delete(Kind::Namespace, "", "a");
    assert_eq!(
        index.desired().peers[&ip("10.0.0.1")].namespace_labels,
        None
    );
}

#[test]
fn local_addresses_are_those_that_no_pod_has() {
    let mut index = index([object(pod("web", "1", "10.0.0.1"))]);
    let all = [
        "192.0.2.1",
        "127.0.0.1",
        "::",
        "10.0.0.1",
        "10.0.0.2",
        "fe80::1",
    ];
    index.set_local_addresses(all.iter().map(|a| ip(a)).collect());
    index.add_endpoint(endpoint(Some(("unknown", "2")), 7, "10.0.0.2"));
    let expected: BTreeSet<_> = ["192.0.2.1", "fe80::1"].iter().map(|a| ip(a)).collect();
    assert_eq!(index.desired().local_addresses, expected);
}

#[test]
fn nodes_have_addresses_and_blocks() {
    let node = |name: &str, spec| {
        object(
            json!({"kind": "Node", "metadata": {"name": name}, "spec": spec, "status": {
            "addresses": [{"type": "Hostname", "address": name},
                          {"type": "InternalIP", "address": "192.0.2.1"}]}}),
        )
    };
    let mut index = index([
        node(
            "n1",
            json!({"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00:1::/64"]}),
        ),
        node("n2", json!({"podCIDR": "10.2.0.0/24"})),
    ]);
    let desired = index.desired();
    assert_eq!(desired.pod_cidrs().len(), 2);
    let others: Vec<_> = desired.other_nodes().collect();
    assert_eq!(others[0].0, "n2");
    assert_eq!(others[0].1.pod_cidrs, ["10.2.0.0/24".parse().unwrap()]);
    assert_eq!(others[0].1.internal_ips, [ip("192.0.2.1")]);
    index.delete(Kind::Node, "", "n1");
    assert!(index.desired().own_node().is_none());
}

#[test]
fn reset_replaces_everything_of_one_kind() {
    let broken = json!({"kind": "Pod", "metadata": {"namespace": "a", "name": "broken"},
        "status": {"podIPs": [{"ip": "10.0.0"}]}});
    let mut index = index([
        object(pod("web", "1", "10.0.0.1")),
        object(broken),
        namespace("a", json!({})),
    ]);
    assert_eq!(index.problems().len(), 1);
    index.reset(Kind::Pod, vec![object(pod("db", "2", "10.0.0.2"))]);
    assert_eq!(holder(&mut index, "10.0.0.1"), None);
    assert_eq!(holder(&mut index, "10.0.0.2").as_deref(), Some("db"));
    assert_eq!(index.problems(), []);
    assert!(
        index.desired().peers[&ip("10.0.0.2")]
            .namespace_labels
            .is_some()
    );
}

#[test]
fn named_ports_are_those_of_containers_that_keep_running() {
    let mut web = pod("web", "1", "10.0.0.1");
    web["spec"]["initContainers"] = json!([
        {"name": "i", "ports": [{"name": "init", "containerPort": 1}]},
        {"name": "s", "restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 2}]},
    ]);
    let mut index = index([object(web)]);
    let names: Vec<_> = index.desired().peers[&ip("10.0.0.1")]
        .ports
        .iter()
        .map(|p| (p.name.to_string(), p.port))
        .collect();
    assert_eq!(names, [("http".to_owned(), 8080), ("side".to_owned(), 2)]);
}

#[test]
fn a_pod_asks_for_addresses_in_an_annotation() {
    let mut object_ = pod("web", "u1", "10.0.0.1");
    let name = PodName {
        namespace: "a".into(),
        name: "web".into(),
        uid: Some("u1".into()),
    };
    let mut index = index([]);
    assert_eq!(index.wanted_addresses(&name), None, "not shown yet");
    index.apply(object(object_.clone()));
    assert_eq!(index.wanted_addresses(&name), Some(Ok(vec![])));
    object_["metadata"]["annotations"] = json!({ADDRESSES_ANNOTATION: "10.0.0.7, fd00::7"});
    index.apply(object(object_.clone()));
    let wanted = ["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()];
    assert_eq!(index.wanted_addresses(&name), Some(Ok(wanted.to_vec())));
    object_["metadata"]["annotations"] = json!({ADDRESSES_ANNOTATION: "ten"});
    index.apply(object(object_));
    let wrong = index.wanted_addresses(&name).unwrap().unwrap_err();
    assert!(wrong.contains("\"ten\""), "{wrong}");
    let other = PodName {
        uid: Some("u2".into()),
        ..name
    };
    assert_eq!(
        index.wanted_addresses(&other),
        None,
        "another Pod of that name"
    );
}

/// The kubelet gives the runtime the UID of the static Pod, the API has another for its mirror.
#[test]
fn a_static_pod_is_known_by_its_mirror() {
    let mut mirror = pod("static", "api-uid", "10.0.0.1");
    mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "config-hash"});
    let index = index([object(mirror)]);
    assert!(index.knows_pod("a", "static", Some("config-hash")));
    assert!(index.knows_pod("a", "static", None));
    assert!(!index.knows_pod("a", "static", Some("other")));
}
