//! DEL, CHECK and GC on a real node of namespaces: whatever they find of an attachment.

mod support;

use std::{collections::BTreeSet, time::Instant};

use hachi_net::host_ifname;
use serde_json::{Value, json};
use support::{
    Call, fails, id,
    node::{Pod, on_a_node, run},
    patched,
};

#[test]
fn del_whatever_is_left() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let before = node.traces();
        let host = host_ifname(&id("c1"));
        let file = node.dir().join("file");
        std::fs::write(&file, "").unwrap();
        type Damage<'a> = Box<dyn Fn(&Pod) + 'a>;
        let rows: Vec<(&str, Damage<'_>)> = vec![
            ("nothing is missing", Box::new(|_| ())),
            (
                "the host side is gone",
                Box::new(|_| drop(run("ip", &["link", "del", &host]))),
            ),
            (
                "the Pod's side is gone",
                Box::new(|pod| drop(pod.ip(&["link", "del", "eth0"]))),
            ),
            (
                "the host side has another name",
                Box::new(|_| {
                    // Two calls: before 6.2 the name of an interface that is up cannot change.
                    run("ip", &["link", "set", &host, "down"]);
                    run("ip", &["link", "set", &host, "name", "x0"]);
                }),
            ),
            (
                "the interface is down",
                Box::new(|pod| drop(pod.ip(&["link", "set", "eth0", "down"]))),
            ),
            (
                "the address is gone",
                Box::new(|pod| drop(pod.ip(&["addr", "flush", "dev", "eth0"]))),
            ),
            (
                "the routes are gone",
                Box::new(|_| drop(run("ip", &["route", "flush", "dev", &host]))),
            ),
            (
                "the record is gone",
                Box::new(|_| {
                    std::fs::remove_file(node.store().join("attachments/c1:eth0")).unwrap()
                }),
            ),
            (
                "the record is damaged",
                Box::new(|_| {
                    std::fs::write(node.store().join("attachments/c1:eth0"), "{").unwrap()
                }),
            ),
            (
                "the claim is damaged",
                Box::new(|_| std::fs::write(node.store().join("claims/c1:eth0"), "").unwrap()),
            ),
            (
                "an address file is gone",
                Box::new(|_| std::fs::remove_file(node.store().join("addresses/fd09::2")).unwrap()),
            ),
            (
                "the store is gone",
                Box::new(|_| std::fs::remove_dir_all(node.store()).unwrap()),
            ),
        ];
        for (what, damage) in rows {
            let pod = Pod::new();
            let conf = patched(
                &conf,
                &json!({"runtimeConfig": {"ips": ["10.9.0.2", "fd09::2"]}}),
            );
            pod.add("c1", &conf).run().ok();
            damage(&pod);
            let answer = pod.del("c1", &conf).run();
            assert_eq!(answer.code(), 0, "{what}: {answer:?}");
            assert_eq!(node.traces(), before, "{what}");
            assert!(!pod.ip(&["-o", "link"]).contains("eth0"), "{what}");
        }
        // The namespace: not named, gone, not one any more.
        for netns in ["", "/no/such/file", file.to_str().unwrap()] {
            let pod = Pod::new();
            pod.add("c1", &conf).run().ok();
            assert_eq!(
                pod.del("c1", &conf).env("CNI_NETNS", netns).run().code(),
                0,
                "{netns}"
            );
            assert_eq!(node.traces(), before, "{netns}");
        }
        let pod = Pod::new();
        pod.add("c1", &conf).run().ok();
        let path = pod.path().to_owned();
        drop(pod);
        Call::new("DEL", &conf).container("c1", &path).run().ok();
        node.wait_for("the end of the veth", || node.traces() == before);
        // A previous result is not needed, and no harm.
        let conf = patched(&conf, &json!({"prevResult": {"ips": []}}));
        Call::new("DEL", &conf).container("c1", "").run().ok();
    });
}

/// A runtime that gives up takes the namespace away while ADD is at work: early, and ADD says which
/// namespace is no good; late, and the interface goes with it. DEL is asked for in either case.
#[test]
fn a_namespace_that_vanishes_leaves_nothing() {
    const ROUNDS: u32 = 40;
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let before = node.traces();
        let pod = Pod::new();
        let begin = Instant::now();
        pod.add("c1", &conf).run().ok();
        let takes = begin.elapsed();
        pod.del("c1", &conf).run().ok();
        let mut codes = BTreeSet::new();
        for round in 0..ROUNDS {
            let pod = Pod::new();
            let path = pod.path().to_owned();
            let child = pod.add("c1", &conf).start();
            std::thread::sleep(takes * round / ROUNDS);
            drop(pod);
            let output = child.wait_with_output().unwrap();
            if !output.status.success() {
                let error: Value = serde_json::from_slice(&output.stdout).unwrap();
                codes.insert(error["code"].as_u64());
                assert!(node.used().is_empty(), "round {round}: an address is left");
            }
            Call::new("DEL", &conf).container("c1", &path).run().ok();
            node.wait_for("the end of what was made", || node.traces() == before);
            assert!(node.used().is_empty(), "round {round}");
        }
        let expected = BTreeSet::from([Some(8)]);
        assert!(codes.is_subset(&expected), "{codes:?}");
        assert!(!codes.is_empty(), "no namespace went early enough");
    });
}

/// A runtime unmounts a namespace before it removes the file; what calls with the path then finds a
/// file that is none.
#[test]
fn the_path_of_a_namespace_that_is_gone_leads_to_no_other() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let before = node.traces();
        let gone = Pod::new().path().to_owned();
        let next = Pod::new();
        assert_ne!(next.path(), gone);
        let add = Call::new("ADD", &conf).container("c1", &gone);
        fails(&add.run(), 8, "not a network namespace");
        next.add("c2", &conf).run().ok();
        Call::new("DEL", &conf).container("c1", &gone).run().ok();
        assert!(next.ip(&["-o", "link"]).contains("eth0"));
        next.del("c2", &conf).run().ok();
        assert_eq!(node.traces(), before);
    });
}

#[test]
fn del_touches_no_interface_of_others() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let pod = Pod::new();
        pod.ip(&[
            "link", "add", "eth0", "type", "veth", "peer", "name", "eth9",
        ]);
        pod.ip(&[
            "link", "add", "net1", "type", "veth", "peer", "name", "net2",
        ]);
        pod.del("c1", &conf).run().ok();
        pod.del("c1", &conf).env("CNI_IFNAME", "net1").run().ok();
        let links = pod.ip(&["-o", "link"]);
        assert!(links.contains("eth0") && links.contains("net1"), "{links}");
        let own = format!(
            "/proc/{}/task/{}/ns/net",
            std::process::id(),
            nix::unistd::gettid()
        );
        fails(&pod.del("c1", &conf).env("CNI_NETNS", &own).run(), 8, "own");
    });
}

#[test]
fn an_attachment_comes_back_after_a_crash() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let first = Pod::new();
        first.add("c1", &conf).run().ok();
        // The runtime starts the container anew in another namespace, having lost the first one.
        let second = Pod::new();
        let result = second.add("c1", &conf).run().ok();
        assert_eq!(node.host_links().len(), 1);
        assert_eq!(node.used().len(), 2);
        second.check("c1", &conf, &result).run().ok();
    });
}

#[test]
fn check_names_every_difference() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let host = host_ifname(&id("c1"));
        type Damage<'a> = Box<dyn Fn(&Pod) + 'a>;
        let store = node.store();
        let rows: Vec<(&str, Damage<'_>)> = vec![
            (
                "the Pod has no interface eth0",
                Box::new(|pod| drop(pod.ip(&["link", "del", "eth0"]))),
            ),
            (
                "the node has no interface",
                Box::new(|_| drop(run("ip", &["link", "del", &host]))),
            ),
            (
                "eth0 is down",
                Box::new(|pod| drop(pod.ip(&["link", "set", "eth0", "down"]))),
            ),
            (
                "is down",
                Box::new(|_| drop(run("ip", &["link", "set", &host, "down"]))),
            ),
            (
                "eth0 has no address 10.9.0.",
                Box::new(|pod| drop(pod.ip(&["-4", "addr", "flush", "dev", "eth0"]))),
            ),
            (
                "eth0 has no address fd09::",
                Box::new(|pod| drop(pod.ip(&["-6", "addr", "flush", "dev", "eth0"]))),
            ),
            (
                "no route to 0.0.0.0/0",
                Box::new(|pod| drop(pod.ip(&["route", "del", "default"]))),
            ),
            (
                "no route to ::/0",
                Box::new(|pod| drop(pod.ip(&["-6", "route", "del", "default"]))),
            ),
            (
                "another MAC address",
                Box::new(|pod| {
                    drop(pod.ip(&["link", "set", "eth0", "address", "02:00:00:00:00:01"]))
                }),
            ),
            (
                "the node has no route to 10.9.0.",
                Box::new(|_| drop(run("ip", &["route", "flush", "dev", &host]))),
            ),
            (
                "is not reserved",
                Box::new(|_| std::fs::remove_file(store.join("claims/c1:eth0")).unwrap()),
            ),
            (
                "no record",
                Box::new(|_| std::fs::remove_file(store.join("attachments/c1:eth0")).unwrap()),
            ),
        ];
        for (text, damage) in rows {
            let conf = node.conf(&json!({}));
            let pod = Pod::new();
            let result = pod.add("c1", &conf).run().ok();
            pod.check("c1", &conf, &result).run().ok();
            damage(&pod);
            fails(&pod.check("c1", &conf, &result).run(), 102, text);
            pod.del("c1", &conf).run().ok();
            std::fs::remove_dir_all(&store).unwrap();
        }
        // A route that a later plugin has put in the place of ours is no difference.
        let conf = node.conf(&json!({}));
        let pod = Pod::new();
        let result = pod.add("c1", &conf).run().ok();
        let changed = patched(
            &result,
            &json!({"routes": [{"dst": "0.0.0.0/0", "gw": "192.0.2.1"}]}),
        );
        pod.ip(&[
            "route",
            "replace",
            "default",
            "via",
            "192.0.2.1",
            "dev",
            "eth0",
            "onlink",
        ]);
        pod.check("c1", &conf, &changed).run().ok();
        pod.check("c1", &conf, &result).run().ok();
        fails(&pod.check("c2", &conf, &result).run(), 102, "not reserved");
        let nothing = json!({"interfaces": [], "ips": []});
        fails(&pod.check("c1", &conf, &nothing).run(), 7, "prevResult");
    });
}

#[test]
fn gc_frees_what_is_not_listed() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let other = node.conf(&json!({"name": "other"}));
        let pods: Vec<_> = (0..4).map(|_| Pod::new()).collect();
        for (number, pod) in pods.iter().enumerate().take(3) {
            pod.add(&format!("c{number}"), &conf).run().ok();
        }
        pods[3].add("c3", &other).run().ok();
        let everything = node.traces();
        // Veths of others, and what a killed ADD leaves: a link without a claim.
        run(
            "ip",
            &[
                "link",
                "add",
                "hachi-like",
                "type",
                "veth",
                "peer",
                "name",
                "vethx",
            ],
        );
        run(
            "ip",
            &[
                "link",
                "add",
                "hachi0123456789",
                "type",
                "veth",
                "peer",
                "name",
                "vethy",
            ],
        );

        let gc = |list: Value| Call::new("GC", &patched(&conf, &list)).run();
        gc(json!({})).ok();
        assert!(
            node.host_links().contains("hachi0123456789"),
            "no list: nothing is freed"
        );
        let all =
            json!([0, 1, 2].map(|n| json!({"containerID": format!("c{n}"), "ifname": "eth0"})));
        gc(json!({"cni.dev/valid-attachments": all})).ok();
        assert!(!node.host_links().contains("hachi0123456789"));
        assert!(node.host_links().contains("hachi-like"));
        run("ip", &["link", "del", "hachi-like"]);
        assert_eq!(node.traces(), everything);

        let one = json!([{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c7", "ifname": "eth0"}]);
        gc(json!({"cni.dev/attachments": one})).ok();
        let kept = ["10.9.0.3", "10.9.0.5", "fd09::3", "fd09::5"];
        assert_eq!(
            node.used().iter().collect::<Vec<_>>(),
            kept,
            "c1, and c3 of the other network"
        );
        assert_eq!(node.host_links().len(), 2);
        assert!(pods[1].reaches(&pods[3], "10.9.0.5".parse().unwrap()));

        gc(json!({"cni.dev/valid-attachments": []})).ok();
        assert_eq!(node.host_links().len(), 1);
        pods[3].del("c3", &other).run().ok();
        assert!(node.used().is_empty());
    });
}

#[test]
fn gc_goes_on_past_errors() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({"cni.dev/valid-attachments": []}));
        let pods = [Pod::new(), Pod::new()];
        for (number, pod) in pods.iter().enumerate() {
            pod.add(&format!("c{number}"), &node.conf(&json!({})))
                .run()
                .ok();
        }
        let damaged = node.store().join("addresses/10.9.0.6");
        std::fs::write(&damaged, "{").unwrap();
        fails(&Call::new("GC", &conf).run(), 104, "10.9.0.6");
        assert_eq!(
            node.used().iter().collect::<Vec<_>>(),
            ["10.9.0.6"],
            "all else is freed"
        );
        assert!(node.host_links().is_empty());
        std::fs::remove_file(damaged).unwrap();
        Call::new("GC", &conf).run().ok();
    });
}
