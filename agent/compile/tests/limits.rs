//! What does not fit the maps is refused alone, and told.

use hachi_compile::{Compiler, Limits, Problem, SET_QUARANTINE};
use hachi_index::{Endpoint, EndpointKey, Index, Object, PodName};
use serde_json::{Value, json};

fn pod(name: &str, ip: &str) -> Object {
    let value = json!({"metadata": {"namespace": "a", "name": name, "labels": {"app": name}},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]}});
    Object::Pod(serde_json::from_value(value).expect("a Pod"))
}

fn policy(name: &str, ports: &[Value]) -> Object {
    Object::NetworkPolicy(Box::new(
        json!({"metadata": {"namespace": "a", "name": name}, "spec": {
            "podSelector": {"matchLabels": {"app": name}}, "ingress": [{"ports": ports}]}}),
    ))
}

#[test]
fn the_largest_set_is_refused_and_the_others_stay() {
    let mut index = Index::new("n1");
    for (n, name) in [(1, "small"), (2, "large")] {
        let ip = format!("10.0.0.{n}");
        index.apply(pod(name, &ip));
        index.add_endpoint(Endpoint {
            key: EndpointKey {
                container_id: name.to_owned(),
                ifname: "eth0".to_owned(),
            },
            pod: Some(PodName {
                namespace: "a".to_owned(),
                name: name.to_owned(),
                uid: None,
            }),
            ifindex: n,
            mac: [2; 6],
            host_mac: [2; 6],
            addresses: vec![ip.parse().expect("an address")],
            host_ports: Vec::new(),
        });
    }
    index.apply(policy("small", &[json!({"port": 80})]));
    let many: Vec<Value> = (1..200).map(|n| json!({"port": 2 * n})).collect();
    index.apply(policy("large", &many));
    let limits = Limits {
        policy: 100,
        ..Limits::NONE
    };
    let mut compiler = Compiler::default();
    for round in ["at once", "and again"] {
        let compiled = compiler.compile_within(index.desired(), &limits);
        let set = |ip: &str| {
            let address = ip.parse().expect("an address");
            compiled.image.endpoints[&address].ingress_set
        };
        assert_ne!(set("10.0.0.1"), SET_QUARANTINE, "{round}");
        assert_eq!(set("10.0.0.2"), SET_QUARANTINE, "{round}");
        assert_eq!(compiled.image.policy.len(), 1, "{round}");
        let [Problem::TooLarge { pods, policies, .. }] = compiled.problems.as_slice() else {
            panic!("{round}: {:?}", compiled.problems)
        };
        assert_eq!((pods.len(), &*pods[0].name), (1, "large"), "{round}");
        assert_eq!(&*policies[0].name, "large", "{round}");
    }
    // Once it is small enough it is in force.
    index.apply(policy("large", &[json!({"port": 81})]));
    let compiled = compiler.compile_within(index.desired(), &limits);
    assert_eq!(compiled.problems, []);
    assert_eq!(compiled.image.policy.len(), 2);
}
