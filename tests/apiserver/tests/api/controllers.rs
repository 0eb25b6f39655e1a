//! What the cluster does by itself: addresses, scheduling, EndpointSlices, deletion.

use hachi_apiserver::{
    Config, Handle,
    resource::{ENDPOINT_SLICES, NAMESPACES, NODES, PODS, SERVICE_ACCOUNTS, SERVICES},
};
use serde_json::{Value, json};

use crate::support::{self, eventually, pod};

fn node(name: &str, ready: &str) -> Value {
    json!({
        "metadata": {"name": name},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    })
}

fn service(name: &str, spec: Value) -> Value {
    json!({"metadata": {"name": name, "namespace": "default"}, "spec": spec})
}

/// What a kubelet reports of a running Pod.
fn run(server: &Handle, name: &str, ips: &[&str], ready: bool) {
    let ips: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    let report = |pod: &mut Value| {
        pod["status"] = json!({
            "phase": "Running",
            "podIP": ips[0]["ip"],
            "podIPs": ips,
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
        });
    };
    server
        .store
        .modify_status(PODS, "default", name, report)
        .unwrap();
}

/// The slices of a Service as lines: family, ports, and each endpoint with its conditions.
fn slices(server: &Handle, service: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for slice in server.store.list(ENDPOINT_SLICES, "default") {
        if slice["metadata"]["labels"]["kubernetes.io/service-name"] != service {
            continue;
        }
        let ports = slice["ports"].as_array().unwrap().iter();
        let ports: Vec<_> = ports
            .map(|p| format!("{}:{}", p["name"], p["port"]))
            .collect();
        let endpoints = slice["endpoints"]
            .as_array()
            .unwrap()
            .iter()
            .map(|endpoint| {
                let flag = |key: &str| endpoint["conditions"][key] == true;
                let flags = [("ready", 'r'), ("serving", 's'), ("terminating", 't')];
                let flags: String = flags.iter().filter(|f| flag(f.0)).map(|f| f.1).collect();
                format!(" {}/{flags}", endpoint["addresses"][0].as_str().unwrap())
            });
        let mut endpoints: Vec<String> = endpoints.collect();
        endpoints.sort();
        let family = slice["addressType"].as_str().unwrap();
        lines.push(format!(
            "{family} [{}]{}",
            ports.join(","),
            endpoints.concat()
        ));
    }
    lines.sort();
    lines
}

#[track_caller]
fn expect_slices(server: &Handle, service: &str, expected: &[&str]) {
    let start = std::time::Instant::now();
    loop {
        let found = slices(server, service);
        if found == expected {
            return;
        }
        let late = start.elapsed() > std::time::Duration::from_secs(10);
        assert!(!late, "found {found:#?}, expected {expected:#?}");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[test]
fn slices_follow_pods_and_services() {
    let server = support::start(Config {
        kubelets: true,
        ..Config::default()
    });
    let store = &server.store;
    store.create(NODES, node("n1", "True")).unwrap();
    let spec = json!({
        "selector": {"app": "web"},
        "ipFamilyPolicy": "RequireDualStack",
        "ports": [{"name": "web", "port": 80, "targetPort": "http"}],
    });
    store.create(SERVICES, service("web", spec)).unwrap();
    expect_slices(&server, "web", &["IPv4 []", "IPv6 []"]);

    for name in ["a", "b"] {
        store
            .create(PODS, pod(name, json!({"app": "web"})))
            .unwrap();
    }
    store
        .create(PODS, pod("other", json!({"app": "db"})))
        .unwrap();
    // As a kubelet does: it knows of a Pod when that is bound to its node.
    for name in ["a", "b", "other"] {
        eventually("the Pod is bound", || {
            let pod = store.get(PODS, "default", name).ok()?;
            (pod["spec"]["nodeName"] == "n1").then_some(())
        });
    }
    run(&server, "a", &["10.244.0.2", "fd00::2"], true);
    run(&server, "b", &["10.244.0.3", "fd00::3"], false);
    run(&server, "other", &["10.244.0.4", "fd00::4"], true);
    let four = r#"IPv4 ["web":8080] 10.244.0.2/rs 10.244.0.3/"#;
    let six = r#"IPv6 ["web":8080] fd00::2/rs fd00::3/"#;
    expect_slices(&server, "web", &[four, six]);

    // A slice that somebody deletes comes back.
    let slice = store.list(ENDPOINT_SLICES, "default");
    let slice = slice
        .iter()
        .find(|slice| slice.name().starts_with("web-"))
        .unwrap();
    assert_eq!(slice["metadata"]["ownerReferences"][0]["name"], "web");
    assert_eq!(slice["endpoints"][0]["nodeName"], "n1");
    assert_eq!(slice["endpoints"][0]["targetRef"]["kind"], "Pod");
    store
        .delete(ENDPOINT_SLICES, "default", slice.name(), None)
        .unwrap();
    expect_slices(&server, "web", &[four, six]);

    // Ready, relabelled away, terminating, ended, gone.
    run(&server, "b", &["10.244.0.3", "fd00::3"], true);
    let four = r#"IPv4 ["web":8080] 10.244.0.2/rs 10.244.0.3/rs"#;
    let six = r#"IPv6 ["web":8080] fd00::2/rs fd00::3/rs"#;
    expect_slices(&server, "web", &[four, six]);
    store.delete(PODS, "default", "b", None).unwrap();
    let four = r#"IPv4 ["web":8080] 10.244.0.2/rs 10.244.0.3/st"#;
    let six = r#"IPv6 ["web":8080] fd00::2/rs fd00::3/st"#;
    expect_slices(&server, "web", &[four, six]);
    let relabel = |pod: &mut Value| pod["metadata"]["labels"]["app"] = json!("db");
    store.modify(PODS, "default", "a", relabel).unwrap();
    let four = r#"IPv4 ["web":8080] 10.244.0.3/st"#;
    let six = r#"IPv6 ["web":8080] fd00::3/st"#;
    expect_slices(&server, "web", &[four, six]);
    store.delete(PODS, "default", "b", Some(0)).unwrap();
    expect_slices(&server, "web", &["IPv4 []", "IPv6 []"]);

    store
        .modify(SERVICES, "default", "web", |service| {
            service["spec"]["selector"] = json!({"app": "db"});
            service["spec"]["ports"][0]["targetPort"] = json!(53);
        })
        .unwrap();
    let four = r#"IPv4 ["web":53] 10.244.0.2/rs 10.244.0.4/rs"#;
    let six = r#"IPv6 ["web":53] fd00::2/rs fd00::4/rs"#;
    expect_slices(&server, "web", &[four, six]);
    let fail = |pod: &mut Value| pod["status"]["phase"] = json!("Failed");
    store.modify_status(PODS, "default", "other", fail).unwrap();
    let four = r#"IPv4 ["web":53] 10.244.0.2/rs"#;
    let six = r#"IPv6 ["web":53] fd00::2/rs"#;
    expect_slices(&server, "web", &[four, six]);
    store.delete(SERVICES, "default", "web", None).unwrap();
    expect_slices(&server, "web", &[]);
}

#[test]
fn not_ready_addresses_and_named_ports_are_as_the_service_says() {
    let server = support::start(Config::default());
    let store = &server.store;
    let spec = json!({
        "clusterIP": "None",
        "publishNotReadyAddresses": true,
        "selector": {"app": "web"},
        "ports": [
            {"name": "a", "port": 80, "targetPort": "http"},
            {"name": "b", "port": 81, "targetPort": "missing"},
        ],
    });
    store.create(SERVICES, service("web", spec)).unwrap();
    store.create(PODS, pod("a", json!({"app": "web"}))).unwrap();
    let mut other = pod("b", json!({"app": "web"}));
    other["spec"]["containers"][0]["ports"][0]["containerPort"] = json!(9090);
    store.create(PODS, other).unwrap();
    run(&server, "a", &["10.244.0.2"], false);
    run(&server, "b", &["10.244.0.3"], true);
    let expected = [
        r#"IPv4 ["a":8080] 10.244.0.2/r"#,
        r#"IPv4 ["a":9090] 10.244.0.3/rs"#,
    ];
    expect_slices(&server, "web", &expected);

    // Without a selector, slices are whoever writes them.
    let spec = json!({"ports": [{"port": 80}]});
    store.create(SERVICES, service("manual", spec)).unwrap();
    let slice = json!({
        "metadata": {
            "name": "manual-1",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "manual"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["192.0.2.1"], "conditions": {"ready": true}}],
        "ports": [{"port": 80}],
    });
    store.create(ENDPOINT_SLICES, slice).unwrap();
    store.create(PODS, pod("c", json!({"app": "web"}))).unwrap();
    run(&server, "c", &["10.244.0.4"], true);
    let expected = [
        r#"IPv4 ["a":8080] 10.244.0.2/r 10.244.0.4/rs"#,
        r#"IPv4 ["a":9090] 10.244.0.3/rs"#,
    ];
    expect_slices(&server, "web", &expected);
    assert_eq!(slices(&server, "manual"), [r#"IPv4 ["":80] 192.0.2.1/r"#]);
}

#[test]
fn a_slice_holds_a_hundred_endpoints_at_most() {
    let server = support::start(Config::default());
    let store = &server.store;
    let spec = json!({"selector": {"app": "web"}, "ports": [{"port": 80}]});
    store.create(SERVICES, service("web", spec)).unwrap();
    for place in 0..230 {
        let name = format!("p{place}");
        store
            .create(PODS, pod(&name, json!({"app": "web"})))
            .unwrap();
        run(&server, &name, &[&format!("10.244.1.{place}")], true);
    }
    let sizes = |want: [usize; 3]| {
        eventually(&format!("slices of {want:?}"), || {
            let slices = store.list(ENDPOINT_SLICES, "default");
            let slices = slices
                .iter()
                .filter(|slice| slice.name().starts_with("web-"));
            let sizes = slices.map(|slice| slice["endpoints"].as_array().unwrap().len());
            let mut sizes: Vec<usize> = sizes.collect();
            sizes.sort_unstable();
            (sizes == want).then_some(())
        });
    };
    sizes([30, 100, 100]);
}

#[test]
fn pods_are_spread_over_the_ready_nodes() {
    let server = support::start(Config::default());
    let store = &server.store;
    store.create(PODS, pod("early", json!({}))).unwrap();
    let why = eventually("the Pod waits", || {
        let pod = store.get(PODS, "default", "early").unwrap();
        pod["status"]["conditions"][0]["reason"]
            .as_str()
            .map(str::to_owned)
    });
    assert_eq!(why, "Unschedulable");
    for (name, ready) in [("n1", "True"), ("n2", "True"), ("n3", "False")] {
        store.create(NODES, node(name, ready)).unwrap();
    }
    let placed = |name: &str| {
        eventually("the Pod has a node", || {
            let pod = store.get(PODS, "default", name).unwrap();
            pod["spec"]["nodeName"].as_str().map(str::to_owned)
        })
    };
    placed("early");
    for place in 0..9 {
        store
            .create(PODS, pod(&format!("p{place}"), json!({})))
            .unwrap();
    }
    let mut pinned = pod("pinned", json!({}));
    pinned["spec"]["nodeName"] = json!("n3");
    store.create(PODS, pinned).unwrap();
    let nodes: Vec<_> = (0..9).map(|place| placed(&format!("p{place}"))).collect();
    let count = |name: &str| nodes.iter().filter(|node| *node == name).count();
    assert_eq!(
        (count("n1").abs_diff(count("n2")), count("n3")),
        (1, 0),
        "{nodes:?}"
    );
    assert_eq!(placed("pinned"), "n3");

    let mut picky = pod("picky", json!({}));
    picky["spec"]["nodeSelector"] = json!({"disk": "ssd"});
    store.create(PODS, picky).unwrap();
    let label = |node: &mut Value| node["metadata"]["labels"] = json!({"disk": "ssd"});
    store.modify(NODES, "", "n2", label).unwrap();
    assert_eq!(placed("picky"), "n2");
}

#[test]
fn nodes_and_services_get_their_addresses() {
    let server = support::start(Config::default());
    let store = &server.store;
    for (name, cidrs) in [
        ("n1", ["10.244.0.0/24", "fd00:10:244::/64"]),
        ("n2", ["10.244.1.0/24", "fd00:10:244:1::/64"]),
    ] {
        let made = store.create(NODES, node(name, "True")).unwrap();
        assert_eq!(made["spec"]["podCIDRs"], json!(cidrs));
        assert_eq!(made["spec"]["podCIDR"], json!(cidrs[0]));
    }
    let create = |name: &str, spec: Value| store.create(SERVICES, service(name, spec)).unwrap();
    let ports = json!([{"port": 80}]);
    let one = create("one", json!({"ports": ports}));
    assert_eq!(one["spec"]["clusterIPs"], json!(["10.96.0.2"]));
    let two = create(
        "two",
        json!({"ports": ports, "ipFamilyPolicy": "PreferDualStack"}),
    );
    assert_eq!(
        two["spec"]["clusterIPs"],
        json!(["10.96.0.3", "fd00:10:96::1"])
    );
    let six = create("six", json!({"ports": ports, "ipFamilies": ["IPv6"]}));
    assert_eq!(six["spec"]["clusterIP"], "fd00:10:96::2");
    let given = create("given", json!({"ports": ports, "clusterIP": "10.96.0.4"}));
    assert_eq!(given["spec"]["clusterIPs"], json!(["10.96.0.4"]));
    let next = create("next", json!({"ports": ports}));
    assert_eq!(next["spec"]["clusterIP"], "10.96.0.5");
    let headless = create(
        "headless",
        json!({"clusterIP": "None", "selector": {"a": "b"}}),
    );
    assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    let external = create(
        "external",
        json!({"type": "ExternalName", "externalName": "a.b"}),
    );
    assert_eq!(external["spec"].get("clusterIP"), None);

    // The type changes, the addresses stay; node ports come and go.
    let retype = |kind: &str| {
        let change = |service: &mut Value| service["spec"]["type"] = json!(kind);
        store.modify(SERVICES, "default", "one", change).unwrap()
    };
    let port = &retype("NodePort")["spec"]["ports"][0]["nodePort"];
    assert_eq!(*port, json!(30_000));
    let back = retype("ClusterIP");
    assert_eq!(back["spec"]["ports"][0].get("nodePort"), None);
    assert_eq!(back["spec"]["clusterIP"], "10.96.0.2");
    let spec = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30_000}]});
    create("np", spec);

    // A replacement that leaves the addresses out keeps them.
    let replaced = store
        .update(SERVICES, service("two", json!({"ports": ports})))
        .unwrap();
    assert_eq!(
        replaced["spec"]["clusterIPs"],
        json!(["10.96.0.3", "fd00:10:96::1"])
    );
    store.delete(SERVICES, "default", "one", None).unwrap();
    let spec = json!({"ports": ports, "clusterIP": "10.96.0.2"});
    assert_eq!(create("again", spec)["spec"]["clusterIP"], "10.96.0.2");
}

#[test]
fn a_running_pod_goes_when_its_kubelet_lets_go() {
    let server = support::start(Config {
        kubelets: true,
        ..Config::default()
    });
    let store = &server.store;
    store.create(PODS, pod("waiting", json!({}))).unwrap();
    store.delete(PODS, "default", "waiting", None).unwrap();
    assert!(
        store
            .get(PODS, "default", "waiting")
            .unwrap_err()
            .is_not_found()
    );

    store.create(NODES, node("n1", "True")).unwrap();
    store.create(PODS, pod("bound", json!({}))).unwrap();
    eventually("the Pod is bound", || {
        let pod = store.get(PODS, "default", "bound").unwrap();
        pod["spec"]["nodeName"].is_string().then_some(())
    });
    store.delete(PODS, "default", "bound", Some(5)).unwrap();
    let pod = store.get(PODS, "default", "bound").unwrap();
    assert!(pod.is_terminating());
    assert_eq!(pod["metadata"]["deletionGracePeriodSeconds"], 5);
    store.delete(PODS, "default", "bound", Some(0)).unwrap();
    assert!(
        store
            .get(PODS, "default", "bound")
            .unwrap_err()
            .is_not_found()
    );
}

#[test]
fn a_namespace_takes_its_contents_with_it() {
    let server = support::start(Config::default());
    let store = &server.store;
    let made = store
        .create(NAMESPACES, json!({"metadata": {"name": "team"}}))
        .unwrap();
    assert_eq!(
        made["metadata"]["labels"]["kubernetes.io/metadata.name"],
        "team"
    );
    eventually("the default ServiceAccount", || {
        store
            .get(SERVICE_ACCOUNTS, "team", "default")
            .ok()
            .map(drop)
    });
    let mut inside = pod("p", json!({}));
    inside["metadata"]["namespace"] = json!("team");
    inside["metadata"]["finalizers"] = json!(["example.com/hold"]);
    store.create(PODS, inside.clone()).unwrap();
    store.delete(NAMESPACES, "", "team", None).unwrap();
    eventually("the Pod is told", || {
        store
            .get(PODS, "team", "p")
            .unwrap()
            .is_terminating()
            .then_some(())
    });
    // Held by its finalizer, the Pod holds the namespace, which takes nothing new.
    inside["metadata"]["name"] = json!("late");
    assert_eq!(store.create(PODS, inside).unwrap_err().code, 403);
    assert_eq!(
        store.get(NAMESPACES, "", "team").unwrap()["status"]["phase"],
        "Terminating"
    );
    let release = |pod: &mut Value| pod["metadata"]["finalizers"] = json!([]);
    store.modify(PODS, "team", "p", release).unwrap();
    eventually("the namespace is gone", || {
        store.get(NAMESPACES, "", "team").err().map(drop)
    });
    assert_eq!(
        store
            .delete(NAMESPACES, "", "default", None)
            .unwrap_err()
            .code,
        403
    );
}

#[test]
fn the_server_itself_is_a_service() {
    let advertise = vec![
        "192.0.2.1:6443".parse().unwrap(),
        "[2001:db8::1]:6443".parse().unwrap(),
    ];
    let server = support::start(Config {
        advertise,
        ..Config::default()
    });
    let own = server.store.get(SERVICES, "default", "kubernetes").unwrap();
    assert_eq!(own["spec"]["clusterIP"], "10.96.0.1");
    let expected = [
        r#"IPv4 ["https":6443] 192.0.2.1/r"#,
        r#"IPv6 ["https":6443] 2001:db8::1/r"#,
    ];
    assert_eq!(slices(&server, "kubernetes"), expected);
}

#[test]
fn a_preference_becomes_hints_for_ready_endpoints() {
    let server = support::start(Config {
        kubelets: true,
        ..Config::default()
    });
    let store = &server.store;
    let mut n1 = node("n1", "True");
    n1["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": "east"});
    store.create(NODES, n1).unwrap();
    let spec = json!({"selector": {"app": "web"}, "ports": [{"port": 80}]});
    store.create(SERVICES, service("web", spec)).unwrap();
    for (name, ip, ready) in [("a", "10.244.0.2", true), ("b", "10.244.0.3", false)] {
        store
            .create(PODS, pod(name, json!({"app": "web"})))
            .unwrap();
        run(&server, name, &[ip], ready);
    }
    let zone = json!([{"name": "east"}]);
    for (preference, expected) in [
        (json!("PreferClose"), json!({"forZones": zone})),
        (json!("PreferSameZone"), json!({"forZones": zone})),
        (
            json!("PreferSameNode"),
            json!({"forZones": zone, "forNodes": [{"name": "n1"}]}),
        ),
        (Value::Null, Value::Null),
    ] {
        store
            .modify(SERVICES, "default", "web", |service| {
                service["spec"]["trafficDistribution"] = preference.clone();
            })
            .unwrap();
        eventually(&format!("hints of {preference}"), || {
            let slices = store.list(ENDPOINT_SLICES, "default");
            let endpoints = slices
                .iter()
                .flat_map(|s| s["endpoints"].as_array().unwrap());
            let hints: Vec<(String, Value)> = endpoints
                .map(|e| (e["addresses"][0].to_string(), e["hints"].clone()))
                .collect();
            let of = |ip: &str| {
                let found = hints.iter().find(|(address, _)| address.contains(ip));
                found.map(|(_, hints)| hints.clone())
            };
            let told = of("10.244.0.2") == Some(expected.clone());
            (told && of("10.244.0.3") == Some(Value::Null)).then_some(())
        });
    }
}
