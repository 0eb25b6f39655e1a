//! The plugin and an agent: what is asked when, and what happens if the answer is no, late, or none.

mod support;

use std::{os::unix::net::UnixListener, thread, time::Duration};

use hachi_api::{ApiError, Reply, Request, Status};
use serde_json::{Value, json};
use support::{
    Call, id,
    node::{FakeAgent, Node, Pod, on_a_node},
    patched,
};

/// The agent's pool, and no ADD without it.
fn required(node: &Node) -> Value {
    let conf = node.conf(&json!({"agent": null, "ipam": {"ranges": null}}));
    patched(&conf, &json!({"agentSocket": node.socket()}))
}

#[test]
fn the_whole_life_of_an_attachment() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let agent = FakeAgent::content(&node);
        let conf = required(&node);
        let before = node.traces();
        let pod = Pod::new();
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;K8S_POD_UID=u1";
        let result = pod.add("c1", &conf).env("CNI_ARGS", args).run().ok();
        assert_eq!(result["ips"][0]["address"], "10.8.0.2/32");
        assert_eq!(result["ips"][1]["address"], "fd08::2/128");
        assert!(
            pod.ip(&["link", "show", "eth0"]).contains("mtu 1420"),
            "the agent's MTU"
        );
        let forwarding = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
        assert_eq!(forwarding.trim(), "0", "left to the agent");

        let asked = agent.asked();
        let [
            Request::Pool,
            Request::Pod { pod: asked_for },
            Request::AddEndpoint { attachment },
        ] = asked.as_slice()
        else {
            panic!("{asked:?}");
        };
        let record = std::fs::read(node.store().join("attachments/c1:eth0")).unwrap();
        assert_eq!(*attachment, serde_json::from_slice(&record).unwrap());
        let described = pod_of(attachment);
        assert_eq!(described, ("ns".into(), "web-0".into(), Some("u1".into())));
        assert_eq!(Some(asked_for), attachment.pod.as_ref());
        assert_eq!(attachment.addresses.len(), 2);
        let host = hachi_net::Netlink::open()
            .unwrap()
            .link(&attachment.host_ifname)
            .unwrap();
        let host = host.unwrap();
        assert_eq!(host.index, attachment.host_ifindex);
        assert_eq!(host.mac.unwrap().to_string(), attachment.host_mac);

        pod.check("c1", &conf, &result).run().ok();
        assert_eq!(
            agent.asked(),
            [Request::CheckEndpoint {
                attachment: id("c1")
            }]
        );
        let status = patched(&conf, &json!({}));
        Call::new("STATUS", &status).run().ok();
        assert_eq!(agent.asked(), [Request::Status, Request::Pool]);
        let list = json!([{"containerID": "c1", "ifname": "eth0"}]);
        Call::new(
            "GC",
            &patched(&conf, &json!({"cni.dev/valid-attachments": list})),
        )
        .run()
        .ok();
        assert_eq!(
            agent.asked(),
            [Request::Gc {
                valid: vec![id("c1")]
            }]
        );
        pod.del("c1", &conf).run().ok();
        assert_eq!(
            agent.asked(),
            [Request::DeleteEndpoint {
                attachment: id("c1")
            }]
        );
        assert_eq!(node.traces(), before);
    });
}

fn pod_of(attachment: &hachi_api::Attachment) -> (String, String, Option<String>) {
    let pod = attachment.pod.clone().unwrap();
    (pod.namespace, pod.name, pod.uid)
}

#[test]
fn gc_keeps_the_attachments_of_other_networks() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let agent = FakeAgent::content(&node);
        let conf = required(&node);
        let other = patched(&conf, &json!({"name": "other"}));
        let pods = [Pod::new(), Pod::new()];
        pods[0].add("c0", &conf).run().ok();
        pods[1].add("c1", &other).run().ok();
        agent.asked();
        Call::new(
            "GC",
            &patched(&conf, &json!({"cni.dev/valid-attachments": []})),
        )
        .run()
        .ok();
        assert_eq!(
            agent.asked(),
            [Request::Gc {
                valid: vec![id("c1")]
            }]
        );
    });
}

/// Whatever guards the Pod is put in place before anything can pass, and taken away after.
#[test]
fn the_interface_is_up_only_while_the_agent_guards_it() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let (say, seen) = std::sync::mpsc::channel();
        let _agent = FakeAgent::start(&node, move |request| {
            let up = || {
                let links = hachi_net::Netlink::open().unwrap().links().unwrap();
                links.iter().any(|link| link.veth && link.up)
            };
            match request {
                Request::AddEndpoint { .. } => say.send(("add", up())).unwrap(),
                Request::DeleteEndpoint { .. } => say.send(("delete", up())).unwrap(),
                Request::Pool => {
                    return Reply::Pool {
                        cidrs: vec!["10.8.0.0/29".parse().unwrap()],
                        mtu: 0,
                    };
                }
                _ => {}
            }
            Reply::Done
        });
        let conf = required(&node);
        let pod = Pod::new();
        pod.add("c1", &conf).run().ok();
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), [("add", false)]);
        let links = hachi_net::Netlink::open().unwrap().links().unwrap();
        assert!(links.iter().any(|link| link.veth && link.up), "{links:?}");
        pod.del("c1", &conf).run().ok();
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), [("delete", false)]);
    });
}

/// ADD fails with this code and word, and nothing is left.
fn add_fails(node: &Node, conf: &Value, code: u64, text: &str) {
    let before = node.traces();
    let pod = Pod::new();
    let answer = pod.add("c1", conf).run();
    assert_eq!(answer.code(), code, "{answer:?}");
    assert!(
        answer.stdout.contains(text),
        "{text:?} is not in {answer:?}"
    );
    assert_eq!(node.traces(), before);
    assert!(!pod.ip(&["-o", "link"]).contains("eth0"));
}

#[test]
fn an_agent_that_refuses() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        for (code, mode) in [
            (11, "required"),
            (11, "optional"),
            (999, "required"),
            (3, "optional"),
        ] {
            let agent = FakeAgent::refusing(&node, code, "not today");
            let conf = patched(&conf, &json!({ "agent": mode }));
            add_fails(&node, &conf, code.into(), "not today");
            let asked = agent.asked();
            assert!(matches!(asked[0], Request::AddEndpoint { .. }), "{asked:?}");
            assert_eq!(
                asked[1],
                Request::DeleteEndpoint {
                    attachment: id("c1")
                }
            );
        }
    });
}

#[test]
fn an_agent_that_dies_in_the_middle() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({"agent": "required"}));
        let listener = UnixListener::bind(node.socket()).unwrap();
        let server = thread::spawn(move || {
            // Hangs up on the ADD, and is gone for the undoing.
            drop(listener.accept().unwrap());
        });
        add_fails(&node, &conf, 11, "hung up");
        server.join().unwrap();
    });
}

#[test]
fn no_agent() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = required(&node);
        add_fails(&node, &conf, 11, "agent.sock");
        // A socket that nobody listens on any more.
        drop(UnixListener::bind(node.socket()).unwrap());
        add_fails(&node, &conf, 11, "agent.sock");
        add_fails(
            &node,
            &node.conf(&json!({"agent": "required"})),
            11,
            "hachi-agent",
        );
        // DEL and GC need none; an ADD may not either.
        let pod = Pod::new();
        let alone = node.conf(&json!({}));
        let result = pod.add("c1", &alone).run().ok();
        let answer = pod
            .check("c1", &node.conf(&json!({"agent": "required"})), &result)
            .run();
        assert_eq!(answer.code(), 11, "{answer:?}");
        pod.del("c1", &conf).run().ok();
        assert!(node.used().is_empty());
        Call::new(
            "GC",
            &patched(&conf, &json!({"cni.dev/valid-attachments": []})),
        )
        .run()
        .ok();
    });
}

#[test]
fn del_goes_on_without_the_agents_consent() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let before = node.traces();
        let _agent = FakeAgent::start(&node, |request| match request {
            Request::AddEndpoint { .. } => Reply::Done,
            _ => Reply::Error {
                error: ApiError {
                    code: 11,
                    message: "busy".into(),
                    details: String::new(),
                },
            },
        });
        let conf = node.conf(&json!({"agent": "required"}));
        let pod = Pod::new();
        let result = pod.add("c1", &conf).run().ok();
        let answer = pod.check("c1", &conf, &result).run();
        assert_eq!(answer.code(), 11, "{answer:?}");
        let answer = pod.del("c1", &conf).run();
        assert!(
            answer.success && answer.stderr.contains("busy"),
            "{answer:?}"
        );
        assert_eq!(node.traces(), before);
        let gc = patched(&conf, &json!({"cni.dev/valid-attachments": []}));
        let answer = Call::new("GC", &gc).run();
        assert_eq!(answer.code(), 104, "{answer:?}");
        assert!(answer.stdout.contains("busy"), "{answer:?}");
    });
}

#[test]
fn an_agent_that_is_not_ready() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let _agent = FakeAgent::start(&node, |request| match request {
            Request::Status => {
                let problems = vec!["waits for the API server".into()];
                Reply::Status {
                    status: Box::new(Status {
                        problems,
                        ..Status::default()
                    }),
                }
            }
            _ => Reply::Error {
                error: ApiError {
                    code: 11,
                    message: "no podCIDR".into(),
                    details: "yet".into(),
                },
            },
        });
        let answer = Call::new("STATUS", &required(&node)).run();
        assert_eq!(answer.code(), 50, "{answer:?}");
        assert!(
            answer.stdout.contains("waits for the API server"),
            "{answer:?}"
        );
        add_fails(&node, &required(&node), 11, "no podCIDR");
    });
}

#[test]
fn pools_that_are_no_use() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        for (cidrs, mtu, code, text) in [
            (vec![], 1500, 11, "no pool"),
            (vec!["10.8.0.1/32", "fd08::/64"], 1000, 103, ""),
            (vec!["10.8.0.0/30"], 10, 103, "create the interface"),
        ] {
            let pool = move || Reply::Pool {
                cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
                mtu,
            };
            let _agent = FakeAgent::start(&node, move |request| match request {
                Request::Pool => pool(),
                _ => Reply::Done,
            });
            add_fails(&node, &required(&node), code, text);
        }
    });
}

#[test]
fn several_blocks_of_one_family() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let _agent = FakeAgent::start(&node, |request| match request {
            Request::Pool => {
                let cidrs = ["10.8.0.0/30", "fd08::/64", "10.8.1.0/30"];
                Reply::Pool {
                    cidrs: cidrs.map(|cidr| cidr.parse().unwrap()).to_vec(),
                    mtu: 0,
                }
            }
            _ => Reply::Done,
        });
        let conf = patched(&required(&node), &json!({"ipam": {"exclude": ["fd08::2"]}}));
        let pods = [Pod::new(), Pod::new(), Pod::new()];
        let first = pods[0].add("c0", &conf).run().ok();
        assert_eq!(first["ips"][0]["address"], "10.8.0.2/32");
        assert_eq!(first["ips"][1]["address"], "fd08::3/128");
        let second = pods[1].add("c1", &conf).run().ok();
        assert_eq!(second["ips"][0]["address"], "10.8.1.2/32");
        let answer = pods[2].add("c2", &conf).run();
        assert_eq!(answer.code(), 11, "{answer:?}");
    });
}

#[test]
fn an_answer_that_takes_its_time() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let _agent = FakeAgent::start(&node, |request| {
            if matches!(request, Request::AddEndpoint { .. }) {
                thread::sleep(Duration::from_millis(1500));
            }
            Reply::Done
        });
        let pod = Pod::new();
        pod.add("c1", &node.conf(&json!({"agent": "required"})))
            .run()
            .ok();
    });
}

#[test]
fn a_runtime_that_does_not_listen() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let agent = FakeAgent::content(&node);
        let conf = required(&node);
        let before = node.traces();
        let pod = Pod::new();
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut child = pod.add("c1", &conf).start_with(writer.into());
        assert!(!child.wait().unwrap().success());
        assert_eq!(
            node.traces(),
            before,
            "an attachment that nobody knows of is undone"
        );
        assert_eq!(
            agent.asked().last(),
            Some(&Request::DeleteEndpoint {
                attachment: id("c1")
            })
        );
    });
}

#[test]
fn del_leaves_the_slow_part_to_the_agent() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let before = node.traces();
        let store = hachi_net::Store::open(&node.store()).unwrap();
        assert!(!store.reaper_runs());
        let reaper = store.start_reaper().unwrap();
        node.wait_for("the reaper", || store.reaper_runs());
        let pod = Pod::new();
        for _ in 0..5 {
            // The names are free again at once, and so are the addresses.
            pod.add("c1", &conf).run().ok();
            pod.del("c1", &conf).run().ok();
            assert!(node.used().is_empty());
            assert!(!node.traces().contains("10.9.0."), "the routes are gone");
        }
        node.wait_for("the end of the links", || node.traces() == before);
        node.wait_for("the end of the Pod's links", || {
            !pod.ip(&["-o", "link"]).contains("hachi")
        });
        drop(reaper);
        assert!(!store.reaper_runs());
        pod.add("c1", &conf).run().ok();
        pod.del("c1", &conf).run().ok();
        assert_eq!(
            node.traces(),
            before,
            "without a reaper nothing is left to others"
        );
    });
}

#[test]
fn a_reaper_finds_what_another_has_left() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let before = node.traces();
        let pods = [Pod::new(), Pod::new()];
        for pod in &pods {
            pod.add("c1", &conf).run().ok();
            // A reaper that has just died.
            let file = std::fs::File::create(node.store().join("reaper")).unwrap();
            let lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive);
            let lock = lock.map_err(|(_, errno)| errno).unwrap();
            pod.del("c1", &conf).run().ok();
            assert_eq!(node.host_links().len(), 1);
            assert!(hachi_net::is_retired_ifname(
                node.host_links().first().unwrap()
            ));
            drop(lock);
            if std::ptr::eq(pod, &pods[0]) {
                let store = hachi_net::Store::open(&node.store()).unwrap();
                let _reaper = store.start_reaper().unwrap();
                node.wait_for("the new reaper", || node.traces() == before);
            } else {
                let gc = patched(&conf, &json!({"cni.dev/valid-attachments": []}));
                Call::new("GC", &gc).run().ok();
                assert_eq!(node.traces(), before, "GC finds it too");
            }
        }
    });
}
