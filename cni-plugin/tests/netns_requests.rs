//! What is asked for one Pod alone: addresses, by whom and with what precedence, and ports of the
//! node.

mod support;

use hachi_api::{ApiError, PortMapping, PortProtocol, Reply, Request};
use serde_json::{Value, json};
use support::{
    node::{FakeAgent, Node, Pod, addresses, on_a_node},
    patched,
};

const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;K8S_POD_UID=u1";

/// The agent's pool, and no ADD without it.
fn required(node: &Node) -> Value {
    let conf = node.conf(&json!({"agent": null, "ipam": {"ranges": null}}));
    patched(&conf, &json!({"agentSocket": node.socket()}))
}

/// An agent whose Pods ask for these addresses.
fn asking(node: &Node, wanted: &[&str]) -> FakeAgent {
    let wanted: Vec<_> = wanted.iter().map(|text| text.parse().unwrap()).collect();
    FakeAgent::start(node, move |request| match request {
        Request::Pool => Reply::Pool {
            cidrs: vec!["10.8.0.0/24".parse().unwrap(), "fd08::/64".parse().unwrap()],
            mtu: 1420,
        },
        Request::Pod { .. } => Reply::Pod {
            addresses: wanted.clone(),
        },
        _ => Reply::Done,
    })
}

fn given(result: &Value) -> String {
    let addresses = addresses(result);
    let texts: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    texts.join(" ")
}

#[test]
fn a_pod_gets_the_addresses_of_its_annotation() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = required(&node);
        let agent = asking(&node, &["fd08::77", "10.8.0.77"]);
        let pod = Pod::new();
        let result = pod.add("c1", &conf).env("CNI_ARGS", ARGS).run().ok();
        assert_eq!(given(&result), "10.8.0.77 fd08::77");
        // Who is no Pod has no annotation.
        let other = Pod::new();
        let result = other.add("c2", &conf).run().ok();
        assert_eq!(given(&result), "10.8.0.2 fd08::2");

        // Taken, and then free again.
        let late = Pod::new();
        let again = late.add("c3", &conf).env("CNI_ARGS", ARGS);
        let answer = again.run();
        assert_eq!(answer.code(), 101, "{answer:?}");
        for word in ["10.8.0.77", "in use", "c1"] {
            assert!(answer.stdout.contains(word), "{answer:?}");
        }
        pod.del("c1", &conf).run().ok();
        assert_eq!(given(&again.run().ok()), "10.8.0.77 fd08::77");
        drop(agent);

        let _outside = asking(&node, &["192.0.2.9"]);
        let nowhere = Pod::new();
        let before = node.traces();
        let answer = nowhere.add("c4", &conf).env("CNI_ARGS", ARGS).run();
        assert_eq!(answer.code(), 101, "{answer:?}");
        assert!(answer.stdout.contains("192.0.2.9"), "{answer:?}");
        assert_eq!(node.traces(), before);
    });
}

#[test]
fn the_runtime_has_the_first_word() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = required(&node);
        let agent = asking(&node, &["10.8.0.77"]);
        let by_capability = patched(&conf, &json!({"runtimeConfig": {"ips": ["10.8.0.50/24"]}}));
        let pod = Pod::new();
        let result = pod.add("c1", &by_capability).env("CNI_ARGS", ARGS).run();
        assert_eq!(given(&result.ok()), "10.8.0.50 fd08::2");
        let args = format!("{ARGS};IP=10.8.0.51");
        let pod = Pod::new();
        let result = pod.add("c2", &conf).env("CNI_ARGS", &args).run().ok();
        assert_eq!(given(&result), "10.8.0.51 fd08::3");
        let asked = agent.asked();
        assert!(
            !asked.iter().any(|r| matches!(r, Request::Pod { .. })),
            "nobody needs to know: {asked:?}"
        );
    });
}

#[test]
fn a_pod_that_the_agent_has_not_seen_is_tried_again_later() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let _agent = FakeAgent::start(&node, |request| match request {
            Request::Pool => Reply::Pool {
                cidrs: vec!["10.8.0.0/24".parse().unwrap()],
                mtu: 0,
            },
            Request::Pod { .. } => Reply::Error {
                error: ApiError {
                    code: 11,
                    message: "the API has not shown Pod ns/web-0 to the agent yet".into(),
                    details: String::new(),
                },
            },
            _ => Reply::Done,
        });
        let before = node.traces();
        let pod = Pod::new();
        let answer = pod.add("c1", &required(&node)).env("CNI_ARGS", ARGS).run();
        assert_eq!(answer.code(), 11, "{answer:?}");
        assert!(answer.stdout.contains("web-0"), "{answer:?}");
        assert_eq!(node.traces(), before);
    });
}

#[test]
fn port_mappings_go_to_the_agent_and_into_the_record() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let agent = FakeAgent::content(&node);
        let mappings = json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": ""},
            {"hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "192.0.2.1"},
            {"hostPort": 0, "containerPort": 81, "protocol": "tcp"},
            // As containerd spells them.
            {"HostPort": 8081, "ContainerPort": 82, "Protocol": "tcp", "HostIP": ""},
        ]);
        let conf = patched(
            &required(&node),
            &json!({"runtimeConfig": {"portMappings": mappings}}),
        );
        let pod = Pod::new();
        pod.add("c1", &conf).run().ok();
        let mapping = |host_ip: Option<&str>, host_port, container_port, protocol| PortMapping {
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host_port,
            container_port,
            protocol,
        };
        let expected = [
            mapping(None, 8080, 80, PortProtocol::Tcp),
            mapping(Some("192.0.2.1"), 53, 5353, PortProtocol::Udp),
            mapping(None, 8081, 82, PortProtocol::Tcp),
        ];
        let asked = agent.asked();
        let Some(Request::AddEndpoint { attachment }) = asked.last() else {
            panic!("{asked:?}");
        };
        assert_eq!(attachment.port_mappings, expected);
        let record = std::fs::read_to_string(node.store().join("attachments/c1:eth0")).unwrap();
        assert!(record.contains("\"hostIP\": \"192.0.2.1\""), "{record}");
        // What comes with DEL is read, and needs nothing.
        pod.del("c1", &conf).run().ok();
    });
}

#[test]
fn a_port_that_is_taken_fails_the_add() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let _agent = FakeAgent::refusing(&node, 7, "the host port 80/TCP is in use by Pod a/b");
        let ranges = json!({"agent": "required", "agentSocket": node.socket(),
            "runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 80}]}});
        let before = node.traces();
        let answer = Pod::new().add("c1", &node.conf(&ranges)).run();
        assert_eq!(answer.code(), 7, "{answer:?}");
        assert!(answer.stdout.contains("Pod a/b"), "{answer:?}");
        assert_eq!(node.traces(), before);
    });
}
