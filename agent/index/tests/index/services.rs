//! Services joined with their slices.

use std::sync::Arc;

use crate::objects::{endpoint, index, object};
use hachi_index::{Endpoint, HealthCheck, HostPort, Index, Kind, Name, Object, Service};
use hachi_policy::Protocol;
use serde_json::{Value, json};

fn service() -> Value {
    json!({"kind": "Service", "metadata": {"namespace": "a", "name": "web"}, "spec": {
        "type": "ClusterIP", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd96::1"],
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}})
}

fn slice(name: &str, endpoints: Value) -> Value {
    json!({"kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "a", "name": name, "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints})
}

fn joined(index: &mut Index) -> Option<Arc<Service>> {
    index
        .desired()
        .services
        .get(&Name::new("a", "web"))
        .cloned()
}

/// The backends of the only port.
fn backends(index: &mut Index) -> Vec<String> {
    let service = joined(index).expect("the Service");
    assert_eq!(service.ports.len(), 1);
    service.ports[0]
        .backends
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn several_slices_and_families_in_any_order() {
    let mut v6 = slice("s6", json!([{"addresses": ["fd00::1"]}]));
    v6["addressType"] = json!("IPv6");
    let objects = [
        object(service()),
        object(slice(
            "s1",
            json!([{"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.1"]}]),
        )),
        object(slice(
            "s2",
            json!([{"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.3"]}]),
        )),
        object(v6),
    ];
    let expected = [
        "10.0.0.1:8080",
        "10.0.0.2:8080",
        "10.0.0.3:8080",
        "[fd00::1]:8080",
    ];
    for reverse in [false, true] {
        let mut objects = objects.to_vec();
        if reverse {
            objects.reverse();
        }
        let mut index = index(objects);
        assert_eq!(backends(&mut index), expected);
        index.delete(Kind::EndpointSlice, "a", "s1");
        assert_eq!(backends(&mut index), expected[1..]);
        index.delete(Kind::Service, "a", "web");
        assert_eq!(joined(&mut index), None);
    }
}

#[test]
fn conditions() {
    let all = json!([
        {"addresses": ["10.0.0.1"]},
        {"addresses": ["10.0.0.2"], "conditions": {"ready": false}},
        {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": true, "terminating": true}},
        {"addresses": ["10.0.0.4"], "conditions": {"ready": false, "serving": false, "terminating": true}},
        {"addresses": ["10.0.0.5"], "conditions": {"ready": false, "serving": true, "terminating": false}},
    ]);
    let mut index = index([object(service()), object(slice("s", all.clone()))]);
    assert_eq!(backends(&mut index), ["10.0.0.1:8080"]);
    let mut none_ready = all;
    none_ready[0]["conditions"] = json!({"ready": false});
    index.apply(object(slice("s", none_ready)));
    assert_eq!(
        backends(&mut index),
        ["10.0.0.3:8080"],
        "the one that serves while it terminates"
    );
}

#[test]
fn terminating_endpoints_are_chosen_for_this_node_alone_too() {
    let endpoints = json!([
        {"addresses": ["10.0.0.1"], "nodeName": "n2"},
        {"addresses": ["10.0.0.2"], "nodeName": "n1",
         "conditions": {"ready": false, "serving": true, "terminating": true}},
    ]);
    let mut index = index([object(service()), object(slice("s", endpoints))]);
    let service = joined(&mut index).expect("the Service");
    assert_eq!(
        service.ports[0].backends,
        ["10.0.0.1:8080".parse().unwrap()]
    );
    assert_eq!(
        service.ports[0].local_backends,
        ["10.0.0.2:8080".parse().unwrap()]
    );
}

#[test]
fn what_still_serves_while_it_terminates_is_draining_whether_used_or_not() {
    let mut endpoints = json!([
        {"addresses": ["10.0.0.1"]},
        {"addresses": ["10.0.0.2"],
         "conditions": {"ready": false, "serving": true, "terminating": true}},
        {"addresses": ["10.0.0.3"],
         "conditions": {"ready": false, "serving": false, "terminating": true}},
    ]);
    let draining = ["10.0.0.2:8080".parse().unwrap()];
    let mut both = index([object(service()), object(slice("s", endpoints.clone()))]);
    assert_eq!(backends(&mut both), ["10.0.0.1:8080"]);
    assert_eq!(joined(&mut both).unwrap().ports[0].draining, draining);
    endpoints.as_array_mut().unwrap().remove(0);
    let mut last = index([object(service()), object(slice("s", endpoints))]);
    assert_eq!(backends(&mut last), ["10.0.0.2:8080"]);
    assert_eq!(joined(&mut last).unwrap().ports[0].draining, draining);
}

#[test]
fn a_health_check_counts_ready_addresses_of_this_node() {
    let endpoints = json!([
        {"addresses": ["10.0.0.1"], "nodeName": "n1"},
        {"addresses": ["10.0.0.2"], "nodeName": "n2"},
        {"addresses": ["10.0.0.3"], "nodeName": "n1",
         "conditions": {"ready": false, "serving": true, "terminating": true}},
    ]);
    let mut balanced = service();
    balanced["spec"]["type"] = json!("LoadBalancer");
    balanced["spec"]["externalTrafficPolicy"] = json!("Local");
    balanced["spec"]["healthCheckNodePort"] = json!(30_100);
    let check = |service: &Value| {
        let mut index = index([
            object(service.clone()),
            object(slice("s", endpoints.clone())),
            // Listed twice, counted once.
            object(slice(
                "t",
                json!([{"addresses": ["10.0.0.1"], "nodeName": "n1"}]),
            )),
        ]);
        joined(&mut index).expect("the Service").health_check
    };
    let expected = HealthCheck {
        port: 30_100,
        local_endpoints: 1,
    };
    assert_eq!(check(&balanced), Some(expected));
    // With the policy Cluster every node will do, and none is asked.
    balanced["spec"]["externalTrafficPolicy"] = json!("Cluster");
    assert_eq!(check(&balanced), None);
}

#[test]
fn slices_match_ports_by_name_and_protocol() {
    let mut other = slice("s", json!([{"addresses": ["10.0.0.1"]}]));
    other["ports"] = json!([
        {"name": "http", "port": 1, "protocol": "UDP"}, {"name": "admin", "port": 2},
        {"port": 3}, {"name": "http"}, {"name": "http", "port": 4}]);
    let mut index = index([object(service()), object(other)]);
    assert_eq!(backends(&mut index), ["10.0.0.1:4"]);
}

#[test]
fn what_needs_no_datapath() {
    let label = |value: &mut Value, key: &str| value["metadata"]["labels"][key] = json!("x");
    let mut proxied = service();
    label(&mut proxied, "service.kubernetes.io/service-proxy-name");
    let mut labelled = service();
    label(&mut labelled, "service.kubernetes.io/headless");
    let mut headless = service();
    headless["spec"]["clusterIP"] = json!("None");
    headless["spec"]["clusterIPs"] = json!(["None"]);
    let mut external = service();
    external["spec"] = json!({"type": "ExternalName", "externalName": "example.com"});
    for (i, other) in [proxied, labelled, headless, external]
        .into_iter()
        .enumerate()
    {
        let mut index = index([object(service())]);
        assert!(joined(&mut index).is_some());
        index.apply(object(other));
        assert_eq!(joined(&mut index), None, "case {i}");
    }
}

#[test]
fn names_instead_of_addresses_and_slices_of_nobody() {
    let mut names = slice("names", json!([{"addresses": ["example.com"]}]));
    names["addressType"] = json!("FQDN");
    let mut nobodys = slice("nobodys", json!([{"addresses": ["10.0.0.1"]}]));
    nobodys["metadata"]["labels"] = json!({});
    let mut index = index([object(service()), object(names), object(nobodys)]);
    assert_eq!(backends(&mut index), Vec::<String>::new());
    assert_eq!(index.problems(), []);
}

#[test]
fn a_slice_may_change_its_service() {
    let mut index = index([
        object(service()),
        object(slice("s", json!([{"addresses": ["10.0.0.1"]}]))),
    ]);
    assert_eq!(backends(&mut index).len(), 1);
    let mut moved = slice("s", json!([{"addresses": ["10.0.0.1"]}]));
    moved["metadata"]["labels"]["kubernetes.io/service-name"] = json!("other");
    index.apply(object(moved));
    assert_eq!(backends(&mut index), Vec::<String>::new());
}

#[test]
fn external_addresses_affinity_and_traffic_policy() {
    let mut full = service();
    full["spec"]["type"] = json!("LoadBalancer");
    full["spec"]["externalIPs"] = json!(["198.51.100.1"]);
    full["spec"]["sessionAffinity"] = json!("ClientIP");
    full["spec"]["internalTrafficPolicy"] = json!("Local");
    full["status"] = json!({"loadBalancer": {"ingress": [
        {"ip": "198.51.100.2"}, {"ip": "198.51.100.3", "ipMode": "Proxy"}, {"hostname": "lb"},
        {"ip": "198.51.100.4", "ipMode": "VIP"}]}});
    let mut index = index([object(full.clone())]);
    let service = joined(&mut index).expect("the Service");
    let external: Vec<_> = service
        .external_ips
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(external, ["198.51.100.1"]);
    let balanced: Vec<_> = service
        .load_balancer_ips
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(balanced, ["198.51.100.2", "198.51.100.4"]);
    assert_eq!(
        (service.affinity, service.internal_local),
        (Some(10_800), true)
    );
    full["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 60}});
    full["spec"]["type"] = json!("ClusterIP");
    index.apply(object(full));
    let service = joined(&mut index).expect("the Service");
    assert!(
        service.load_balancer_ips.is_empty(),
        "the load balancer is gone"
    );
    assert_eq!(service.affinity, Some(60));
}

#[test]
fn bad_addresses_are_told_and_left_out() {
    let mut bad = service();
    bad["spec"]["externalIPs"] = json!(["198.51.100"]);
    let endpoints = json!([{"addresses": ["10.0.0.x"]}, {"addresses": ["fd00::1"]},
                           {"addresses": []}, {"addresses": ["10.0.0.1"]}]);
    let mut index = index([object(bad), object(slice("s", endpoints))]);
    assert_eq!(backends(&mut index), ["10.0.0.1:8080"]);
    assert_eq!(index.problems().len(), 3);
    index.apply(object(service()));
    assert_eq!(
        index.problems().len(),
        2,
        "a corrected object is complained of no more"
    );
}

/// The slice's endpoints one by one: address, node, ready, hints.
fn hinted(endpoints: &[(&str, &str, bool, Value)]) -> Object {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|(address, node, ready, hints)| {
            json!({"addresses": [address], "nodeName": node, "hints": hints,
                   "conditions": {"ready": ready, "serving": true, "terminating": !ready}})
        })
        .collect();
    object(slice("s", json!(endpoints)))
}

fn zones(names: &[&str]) -> Value {
    json!({"forZones": names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>()})
}

fn nodes(names: &[&str]) -> Value {
    json!({"forNodes": names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>()})
}

fn node(name: &str, labels: Value) -> Object {
    object(json!({"kind": "Node", "metadata": {"name": name, "labels": labels}}))
}

#[test]
fn hints_count_where_every_ready_endpoint_has_them_and_one_is_ours() {
    const ALL: [&str; 2] = ["10.0.0.1:8080", "10.0.0.2:8080"];
    let ours = node("n1", json!({"topology.kubernetes.io/zone": "a"}));
    let cases: [(&str, Value, Value, &[&str]); 8] = [
        ("zones", zones(&["a"]), zones(&["b"]), &ALL[..1]),
        ("both zones", zones(&["b", "a"]), zones(&["a"]), &ALL),
        ("nobody's zone", zones(&["b"]), zones(&["c"]), &ALL),
        ("one without", zones(&["a"]), json!({}), &ALL),
        ("nodes", nodes(&["n2"]), nodes(&["n3", "n1"]), &ALL[1..]),
        ("nobody's node", nodes(&["n2"]), nodes(&["n3"]), &ALL),
        ("one without a node", nodes(&["n1"]), json!({}), &ALL),
        (
            "node before zone",
            json!({"forNodes": [{"name": "n1"}], "forZones": [{"name": "b"}]}),
            json!({"forNodes": [{"name": "n2"}], "forZones": [{"name": "a"}]}),
            &ALL[..1],
        ),
    ];
    for (what, one, two, expected) in cases {
        let endpoints = [
            ("10.0.0.1", "n2", true, one),
            ("10.0.0.2", "n1", true, two),
            ("10.0.0.3", "n1", false, json!({})),
        ];
        let mut index = index([object(service()), ours.clone(), hinted(&endpoints)]);
        assert_eq!(backends(&mut index), expected, "{what}");
        let service = joined(&mut index).expect("the Service");
        assert_eq!(
            service.ports[0].local_backends,
            ["10.0.0.2:8080".parse().unwrap()],
            "{what}: what is here needs no hint"
        );
    }
}

#[test]
fn the_zone_may_come_late_and_change() {
    let endpoints = [
        ("10.0.0.1", "n2", true, zones(&["a"])),
        ("10.0.0.2", "n2", true, zones(&["b"])),
    ];
    let mut index = index([object(service()), hinted(&endpoints)]);
    assert_eq!(backends(&mut index).len(), 2);
    for (zone, expected) in [("a", "10.0.0.1:8080"), ("b", "10.0.0.2:8080")] {
        index.apply(node("n1", json!({"topology.kubernetes.io/zone": zone})));
        index.apply(node("n2", json!({"topology.kubernetes.io/zone": "c"})));
        assert_eq!(backends(&mut index), [expected]);
    }
    index.delete(Kind::Node, "", "n1");
    assert_eq!(backends(&mut index).len(), 2);
}

#[test]
fn terminating_endpoints_take_over_whatever_their_hints() {
    let endpoints = [
        ("10.0.0.1", "n2", false, zones(&["a"])),
        ("10.0.0.2", "n2", false, json!({})),
    ];
    let ours = node("n1", json!({"topology.kubernetes.io/zone": "a"}));
    let mut index = index([object(service()), ours, hinted(&endpoints)]);
    assert_eq!(backends(&mut index).len(), 2);
}

#[test]
fn fields_count_for_the_types_that_have_them() {
    let mut full = service();
    full["spec"]["ports"][0]["nodePort"] = json!(30_080);
    full["spec"]["externalTrafficPolicy"] = json!("Local");
    full["spec"]["healthCheckNodePort"] = json!(30_099);
    full["spec"]["loadBalancerSourceRanges"] = json!(["192.0.2.0/24 ", "fd00:1::/64", "x"]);
    full["status"] = json!({"loadBalancer": {"ingress": [{"ip": "198.51.100.2"}]}});
    let endpoints = json!([
        {"addresses": ["10.0.0.1"], "nodeName": "n1"},
        {"addresses": ["10.0.0.2"], "nodeName": "n1", "conditions": {"ready": false}},
        {"addresses": ["10.0.0.3"], "nodeName": "n2"}]);
    let mut index = index([object(slice("s", endpoints))]);
    for (kind, node_port, balanced) in [
        ("ClusterIP", None, false),
        ("NodePort", Some(30_080), false),
        ("LoadBalancer", Some(30_080), true),
    ] {
        full["spec"]["type"] = json!(kind);
        index.apply(object(full.clone()));
        let service = joined(&mut index).expect("the Service");
        assert_eq!(service.ports[0].node_port, node_port, "{kind}");
        assert_eq!(service.external_local, node_port.is_some(), "{kind}");
        assert_eq!(
            service.load_balancer_ips.len(),
            usize::from(balanced),
            "{kind}"
        );
        let health = service.health_check.map(|h| (h.port, h.local_endpoints));
        assert_eq!(health, balanced.then_some((30_099, 1)), "{kind}");
        let ranges = service.source_ranges.as_ref().map(Vec::len);
        assert_eq!(
            ranges,
            balanced.then_some(2),
            "{kind}: what is no block lets nobody in"
        );
    }
    assert_eq!(index.problems().len(), 1);
}

#[test]
fn host_ports_are_node_ports_with_one_backend() {
    let name = Name::new("a", "pod/web");
    let with_ports = |ifindex, ip| {
        let host_port = |address: Option<&str>, protocol, port, target| HostPort {
            address: address.map(|text| text.parse().unwrap()),
            protocol,
            port,
            target,
        };
        Endpoint {
            host_ports: vec![
                host_port(Some("0.0.0.0"), Protocol::Tcp, 8080, 80),
                host_port(Some("192.0.2.1"), Protocol::Udp, 53, 53),
                host_port(Some("fd00::1"), Protocol::Tcp, 8080, 80),
            ],
            ..endpoint(Some(("web", "u1")), ifindex, ip)
        }
    };
    // The API need not know of the Pod yet.
    let mut index = index([]);
    index.add_endpoint(with_ports(5, "10.0.0.1"));
    let found = index.desired().services.get(&name).cloned();
    let service = found.expect("its ports");
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|p| (p.node_port, p.host_ip, format!("{:?}", p.backends)))
        .collect();
    let expected = [
        (Some(8080), None, "[10.0.0.1:80]".to_owned()),
        (
            Some(53),
            Some("192.0.2.1".parse().unwrap()),
            "[10.0.0.1:53]".to_owned(),
        ),
        // The Pod has no IPv6 address.
        (
            Some(8080),
            Some("fd00::1".parse().unwrap()),
            "[]".to_owned(),
        ),
    ];
    assert_eq!(ports, expected);

    // A new sandbox of the same Pod takes the ports over; the end of the old one is nothing to it.
    let backend = |index: &mut Index| {
        let services = &index.desired().services;
        let service = services.get(&name)?;
        Some(service.ports[0].backends[0].to_string())
    };
    index.add_endpoint(with_ports(6, "10.0.0.2"));
    assert_eq!(backend(&mut index).as_deref(), Some("10.0.0.2:80"));
    assert!(index.remove_endpoint(&endpoint(None, 5, "10.0.0.1").key));
    assert_eq!(backend(&mut index).as_deref(), Some("10.0.0.2:80"));
    // An interface that is added again without ports has none.
    index.add_endpoint(endpoint(Some(("web", "u1")), 6, "10.0.0.2"));
    assert!(index.desired().services.is_empty());
    index.add_endpoint(with_ports(6, "10.0.0.2"));
    assert!(index.remove_endpoint(&endpoint(None, 6, "10.0.0.2").key));
    assert!(index.desired().services.is_empty());
}
