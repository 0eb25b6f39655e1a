//! What is refused, through the store: the rules of each kind have their tables beside them.

use hachi_apiserver::{
    Config, Handle, Resource,
    resource::{NAMESPACES, NETWORK_POLICIES, NODES, PODS, SERVICES},
};
use serde_json::{Value, json};

use crate::support::{self, pod};

/// Code and first field of a refusal; the code 200 stands for none.
fn refusal(server: &Handle, resource: &'static Resource, object: Value) -> (u16, String) {
    match server.store.create(resource, object) {
        Ok(_) => (200, String::new()),
        Err(failure) => {
            let field = failure.causes.first().map(|cause| cause.field.clone());
            (failure.code, field.unwrap_or_default())
        }
    }
}

fn service(spec: Value) -> Value {
    json!({"metadata": {"generateName": "s", "namespace": "default"}, "spec": spec})
}

#[test]
fn services_are_checked() {
    let server = support::start(Config::default());
    let port = |port: Value| service(json!({"ports": [port]}));
    for (object, code, field) in [
        (port(json!({"port": 80})), 200, ""),
        (service(json!({})), 422, "spec.ports"),
        (port(json!({"port": 0})), 422, "spec.ports[0].port"),
        (
            port(json!({"port": 80, "protocol": "ICMP"})),
            422,
            "spec.ports[0].protocol",
        ),
        (
            port(json!({"port": 80, "targetPort": 70_000})),
            422,
            "spec.ports[0].targetPort",
        ),
        (
            service(json!({"externalTrafficPolicy": "Local", "ports": [{"port": 1}]})),
            422,
            "spec.externalTrafficPolicy",
        ),
        (
            service(json!({"loadBalancerClass": "a/b", "ports": [{"port": 1}]})),
            422,
            "spec.loadBalancerClass",
        ),
        (
            service(json!({
                "type": "NodePort", "loadBalancerSourceRanges": ["10.0.0.0/8"],
                "ports": [{"port": 1}],
            })),
            422,
            "spec.LoadBalancerSourceRanges",
        ),
        (
            service(json!({
                "type": "LoadBalancer", "loadBalancerSourceRanges": [" 10.0.0.0/8 ", "10.0.0.0"],
                "ports": [{"port": 1}],
            })),
            422,
            "spec.LoadBalancerSourceRanges[1]",
        ),
        (
            service(json!({"type": "NodePort", "clusterIP": "None", "ports": [{"port": 1}]})),
            422,
            "spec.clusterIPs[0]",
        ),
        (
            service(json!({"externalIPs": ["127.0.0.1"], "ports": [{"port": 1}]})),
            422,
            "spec.externalIPs[0]",
        ),
        (
            service(json!({
                "type": "ExternalName", "externalName": "a.b", "clusterIP": "10.96.0.9",
            })),
            422,
            "spec.clusterIPs",
        ),
        (
            port(json!({"port": 80, "nodePort": 30_001})),
            422,
            "spec.ports[0].nodePort",
        ),
        (
            service(json!({"ports": [{"port": 1}, {"port": 2, "name": "b"}]})),
            422,
            "spec.ports[0].name",
        ),
        (
            service(json!({"ports": [{"port": 1, "name": "a"}, {"port": 1, "name": "b"}]})),
            422,
            "spec.ports[1]",
        ),
        (
            service(json!({"type": "Mesh", "ports": [{"port": 1}]})),
            422,
            "spec.type",
        ),
        (
            service(json!({"type": "ExternalName"})),
            422,
            "spec.externalName",
        ),
        (
            service(json!({"clusterIP": "192.0.2.1", "ports": [{"port": 1}]})),
            422,
            "spec.clusterIPs",
        ),
        (
            service(json!({"clusterIP": "10.96.0.1", "ports": [{"port": 1}]})),
            422,
            "spec.clusterIPs",
        ),
        (
            service(json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 80}]})),
            422,
            "spec.ports[0].nodePort",
        ),
        (
            service(json!({"selector": {"a": "-"}, "ports": [{"port": 1}]})),
            422,
            "spec.selector",
        ),
        (
            service(json!({"sessionAffinity": "Cookie", "ports": [{"port": 1}]})),
            422,
            "spec.sessionAffinity",
        ),
        (port(json!({"port": "eighty"})), 400, ""),
    ] {
        assert_eq!(
            refusal(&server, SERVICES, object.clone()),
            (code, field.into()),
            "{object}"
        );
    }
    // A refused Service has not used up an address.
    let again = service(json!({"clusterIP": "10.96.0.3", "ports": [{"port": 80}]}));
    let made = server.store.create(SERVICES, again).unwrap();
    let change = |service: &mut Value| {
        service["spec"]["clusterIP"] = json!("10.96.0.9");
        service["spec"]["clusterIPs"] = json!(["10.96.0.9"]);
    };
    let failure = server
        .store
        .modify(SERVICES, "default", made.name(), change)
        .unwrap_err();
    assert_eq!(failure.causes[0].field, "spec.clusterIPs[0]");
}

#[test]
fn dual_stack_needs_both_ranges() {
    let service_cidrs = vec!["10.96.0.0/16".parse().unwrap()];
    let server = support::start(Config {
        service_cidrs,
        ..Config::default()
    });
    let policy = |policy: &str| service(json!({"ipFamilyPolicy": policy, "ports": [{"port": 1}]}));
    assert_eq!(refusal(&server, SERVICES, policy("PreferDualStack")).0, 200);
    let refused = refusal(&server, SERVICES, policy("RequireDualStack"));
    assert_eq!(refused, (422, "spec.ipFamilyPolicy".into()));
    let six = service(json!({"ipFamilies": ["IPv6"], "ports": [{"port": 1}]}));
    assert_eq!(
        refusal(&server, SERVICES, six),
        (422, "spec.ipFamilies[0]".into())
    );
}

#[test]
fn names_types_and_places_are_checked() {
    let server = support::start(Config::default());
    let policy = |spec: Value| json!({"metadata": {"generateName": "p", "namespace": "default"}, "spec": spec});
    let mut elsewhere = pod("p", json!({}));
    elsewhere["metadata"]["namespace"] = json!("nowhere");
    let mut typed = pod("p", json!({}));
    typed["kind"] = json!("Service");
    let mut versioned = pod("p", json!({}));
    versioned["metadata"]["resourceVersion"] = json!("1");
    for (resource, object, code, field) in [
        (PODS, pod("p", json!({})), 200, ""),
        (PODS, pod("p", json!({})), 409, ""),
        (PODS, pod("P", json!({})), 422, "metadata.name"),
        (PODS, pod("q", json!({"a b": "c"})), 422, "metadata.labels"),
        (PODS, elsewhere, 404, ""),
        (PODS, typed, 400, ""),
        (PODS, versioned, 400, ""),
        (
            NAMESPACES,
            json!({"metadata": {"name": "a.b"}}),
            422,
            "metadata.name",
        ),
        (NAMESPACES, json!({"metadata": {}}), 422, "metadata.name"),
        (NAMESPACES, json!([]), 400, ""),
        (
            NETWORK_POLICIES,
            policy(json!({"podSelector": {}})),
            200,
            "",
        ),
        (
            NETWORK_POLICIES,
            policy(json!({"podSelector": []})),
            400,
            "",
        ),
        (
            NETWORK_POLICIES,
            policy(json!({"policyTypes": ["Up"]})),
            422,
            "spec.policyTypes[0]",
        ),
    ] {
        let refused = refusal(&server, resource, object.clone());
        assert_eq!(refused, (code, field.into()), "{object}");
    }
}

#[test]
fn updates_keep_what_the_server_owns() {
    let server = support::start(Config::default());
    let store = &server.store;
    let made = store.create(PODS, pod("p", json!({"app": "web"}))).unwrap();
    assert_eq!(made["status"]["phase"], "Pending");

    // A stale version conflicts, and so does another object of the same name.
    let label = |pod: &mut Value| pod["metadata"]["labels"]["app"] = json!("db");
    let changed = store.modify(PODS, "default", "p", label).unwrap();
    assert_eq!(
        store.update(PODS, (**made).clone()).unwrap_err().reason,
        "Conflict"
    );
    let mut other = (**changed).clone();
    other["metadata"]["uid"] = json!("another");
    assert_eq!(store.update(PODS, other).unwrap_err().reason, "Conflict");

    // Status and the rest are written apart; identity stays.
    let change = |pod: &mut Value| {
        pod["status"]["phase"] = json!("Running");
        pod["metadata"]["creationTimestamp"] = json!("1999-01-01T00:00:00Z");
        pod["metadata"]["annotations"] = json!({"a": "b"});
    };
    let changed = store.modify(PODS, "default", "p", change).unwrap();
    assert_eq!(changed["status"]["phase"], "Pending");
    assert_eq!(changed["metadata"]["annotations"]["a"], "b");
    assert_eq!(
        changed["metadata"]["creationTimestamp"],
        made["metadata"]["creationTimestamp"]
    );
    let change = |pod: &mut Value| {
        pod["status"]["phase"] = json!("Running");
        pod["metadata"]["labels"] = json!({});
    };
    let changed = store.modify_status(PODS, "default", "p", change).unwrap();
    assert_eq!(changed["status"]["phase"], "Running");
    assert_eq!(changed["metadata"]["labels"]["app"], "db");

    // A write that changes nothing is no event.
    let same = store.modify(PODS, "default", "p", |_| {}).unwrap();
    assert_eq!(same.version(), changed.version());

    let node = json!({"metadata": {"name": "n"}});
    store.create(NODES, node).unwrap();
    let change = |node: &mut Value| node["spec"]["podCIDR"] = json!("192.0.2.0/24");
    assert_eq!(store.modify(NODES, "", "n", change).unwrap_err().code, 422);
}

#[test]
fn generation_counts_changes_of_the_spec() {
    let server = support::start(Config::default());
    let store = &server.store;
    let policy = json!({"metadata": {"name": "p", "namespace": "default"}, "spec": {}});
    let generation = |value: &Value| value["metadata"]["generation"].as_u64();
    assert_eq!(
        generation(&store.create(NETWORK_POLICIES, policy).unwrap()),
        Some(1)
    );
    let label = |policy: &mut Value| policy["metadata"]["labels"] = json!({"a": "b"});
    let changed = store
        .modify(NETWORK_POLICIES, "default", "p", label)
        .unwrap();
    assert_eq!(generation(&changed), Some(1));
    let open = |policy: &mut Value| policy["spec"]["ingress"] = json!([{}]);
    let changed = store
        .modify(NETWORK_POLICIES, "default", "p", open)
        .unwrap();
    assert_eq!(generation(&changed), Some(2));
}
