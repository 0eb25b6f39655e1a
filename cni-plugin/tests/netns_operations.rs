//! Every operation on a real node of namespaces, with no agent: what it makes, what it finds, what
//! it leaves.

mod support;

use std::net::IpAddr;

use hachi_net::{host_ifname, macs};
use serde_json::{Value, json};
use support::{
    Answer, Call, fails, id,
    node::{Node, Pod, addresses, at_once, histogram, on_a_node, run},
    patched,
};

/// containerd 1.x asks for this before anything else, with version 0.3.1 of the specification.
#[test]
fn as_loopback_it_brings_up_lo_and_nothing_else() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = json!({"cniVersion": "0.3.1", "name": "cni-loopback", "type": "loopback"});
        let before = node.traces();
        let pod = Pod::new();
        pod.ip(&["link", "set", "lo", "down"]);
        let call = |command: &str| {
            let call = Call::new(command, &conf).container("c1", pod.path());
            call.env("CNI_IFNAME", "lo").run()
        };
        let result = call("ADD").ok();
        assert_eq!(
            result,
            json!({
                "cniVersion": "0.3.1",
                "interfaces": [
                    {"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": pod.path()},
                ],
                "ips": [
                    {"address": "127.0.0.1/8", "interface": 0, "version": "4"},
                    {"address": "::1/128", "interface": 0, "version": "6"},
                ],
                "dns": {},
            })
        );
        assert!(pod.ip(&["link", "show", "lo"]).contains("UP"));

        let conf = patched(&conf, &json!({"cniVersion": "1.0.0", "prevResult": result}));
        let check = || {
            let call = Call::new("CHECK", &conf).container("c1", pod.path());
            call.env("CNI_IFNAME", "lo").run()
        };
        check().ok();
        pod.ip(&["link", "set", "lo", "down"]);
        fails(&check(), 102, "lo is down");
        call("DEL").ok();
        assert_eq!(node.traces(), before);
    });
}

#[test]
fn add_makes_what_it_says_and_del_removes_it() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({"mtu": 1400}));
        let before = node.traces();
        let pod = Pod::new();
        let pod_before = pod.ip(&["-o", "link"]);
        let result = pod.add("c1", &conf).run().ok();

        let host = host_ifname(&id("c1"));
        let (pod_mac, host_mac) = macs(&id("c1"));
        let expected = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": host, "mac": host_mac.to_string(), "mtu": 1400},
                {"name": "eth0", "mac": pod_mac.to_string(), "mtu": 1400, "sandbox": pod.path()},
            ],
            "ips": [
                {"address": "10.9.0.2/32", "gateway": "169.254.1.1", "interface": 1},
                {"address": "fd09::2/128", "gateway": "fe80::1", "interface": 1},
            ],
            "routes": [
                {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
                {"dst": "::/0", "gw": "fe80::1"},
            ],
            "dns": {},
        });
        assert_eq!(result, expected);

        let inside = pod.ip(&["-o", "addr", "show", "eth0"]);
        assert!(inside.contains("inet 10.9.0.2/32 scope global"), "{inside}");
        assert!(
            inside.contains("inet6 fd09::2/128 scope global nodad"),
            "{inside}"
        );
        assert!(
            !inside.contains("fd09::2/128 scope global tentative"),
            "{inside}"
        );
        assert!(pod.ip(&["link", "show", "eth0"]).contains("mtu 1400"));
        assert!(
            pod.ip(&["route"])
                .contains("default via 169.254.1.1 dev eth0 onlink")
        );
        assert!(
            pod.ip(&["-6", "route"])
                .contains("default via fe80::1 dev eth0")
        );
        let neighbours = pod.ip(&["neigh"]);
        for gateway in ["169.254.1.1", "fe80::1"] {
            let line = format!("{gateway} dev eth0 lladdr {host_mac} PERMANENT");
            assert!(neighbours.contains(&line), "{neighbours}");
        }

        let traces = node.traces();
        for line in [
            format!("10.9.0.2 dev {host} proto 72 scope link"),
            format!("fd09::2 dev {host} proto 72"),
            format!("10.9.0.2 dev {host} lladdr {pod_mac} PERMANENT"),
            format!("fd09::2 dev {host} lladdr {pod_mac} PERMANENT"),
            "store/addresses/10.9.0.2".into(),
            "store/addresses/fd09::2".into(),
            "store/attachments/c1:eth0".into(),
        ] {
            assert!(traces.contains(&line), "{line} is not in\n{traces}");
        }
        let accept_ra = format!("/proc/sys/net/ipv6/conf/{host}/accept_ra");
        assert_eq!(std::fs::read_to_string(accept_ra).unwrap().trim(), "0");

        pod.check("c1", &conf, &result).run().ok();
        for _ in 0..2 {
            let answer = pod.del("c1", &conf).run();
            assert!(answer.success && answer.stdout.is_empty(), "{answer:?}");
            assert_eq!(node.traces(), before);
            assert_eq!(pod.ip(&["-o", "link"]), pod_before);
        }
    });
}

#[test]
fn pods_reach_each_other_and_the_node() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        run("ip", &["addr", "add", "192.0.2.1/32", "dev", "lo"]);
        run("ip", &["addr", "add", "2001:db8::1/128", "dev", "lo"]);
        let pods = [Pod::new(), Pod::new()];
        let found: Vec<Vec<IpAddr>> = (0..2)
            .map(|n| addresses(&pods[n].add(&format!("c{n}"), &conf).run().ok()))
            .collect();
        // At once, without waiting for duplicate address detection or a link that settles.
        for (to_first, to_second) in found[0].iter().zip(&found[1]) {
            assert!(pods[0].reaches(&pods[1], *to_second), "{to_second}");
            assert!(pods[1].reaches(&pods[0], *to_first), "{to_first}");
            assert!(pods[0].reaches(&pods[0], *to_first), "itself");
        }
        for address in ["192.0.2.1:0", "[2001:db8::1]:0"] {
            let server = std::net::TcpListener::bind(address).unwrap();
            let at = server.local_addr().unwrap();
            pods[0].run(|| std::net::TcpStream::connect(at).unwrap());
        }
        // And from the node.
        for address in &found[0] {
            let server = pods[0].run(|| std::net::TcpListener::bind((*address, 0)).unwrap());
            std::net::TcpStream::connect(server.local_addr().unwrap()).unwrap();
        }
    });
}

#[test]
fn results_of_every_version() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            let conf = node.conf(&json!({
                "cniVersion": version,
                "dns": {"nameservers": ["10.0.0.10"]},
                "ipam": {"routes": [{"dst": "10.0.0.0/8", "mtu": 1400, "priority": 7}]},
            }));
            let pod = Pod::new();
            let result = pod.add("c1", &conf).run().ok();
            assert_eq!(result["cniVersion"], version);
            assert_eq!(result["dns"], json!({"nameservers": ["10.0.0.10"]}));
            let family = |n: usize| result["ips"][n].get("version").cloned();
            let old = version < "1.0.0";
            assert_eq!(family(0), old.then(|| json!("4")), "{version}");
            assert_eq!(family(1), old.then(|| json!("6")), "{version}");
            let new = version == "1.1.0";
            assert_eq!(
                result["interfaces"][0].get("mtu").is_some(),
                new,
                "{version}"
            );
            assert_eq!(
                result["routes"][0].get("priority").is_some(),
                new,
                "{version}"
            );
            let routes = pod.ip(&["route"]);
            assert!(routes.contains("10.0.0.0/8 via 169.254.1.1"), "{routes}");
            assert!(routes.contains("metric 7"), "{routes}");
            assert!(routes.contains("mtu 1400"), "{routes}");
            assert!(!routes.contains("default"), "{routes}");
            if version >= "0.4.0" {
                let answer = pod.check("c1", &conf, &result).run();
                assert!(answer.success && answer.stdout.is_empty(), "{answer:?}");
            }
            pod.del("c1", &conf).run().ok();
        }
        assert!(node.used().is_empty());
    });
}

#[test]
fn a_previous_result_is_passed_on() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({"prevResult": {
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "net9", "sandbox": "/x"}],
            "ips": [{"address": "192.0.2.9/24", "interface": 0}],
            "dns": {"domain": "earlier"},
            "others": 1,
        }}));
        let pod = Pod::new();
        let result = pod.add("c1", &conf).run().ok();
        assert_eq!(result["interfaces"][0]["name"], "net9");
        assert_eq!(result["interfaces"][2]["name"], "eth0");
        assert_eq!(result["ips"][0]["address"], "192.0.2.9/24");
        assert_eq!(result["ips"][1]["interface"], 2);
        assert_eq!(result["dns"]["domain"], "earlier");
        assert_eq!(result["others"], 1);
        pod.check("c1", &node.conf(&json!({})), &result).run().ok();
    });
}

/// An ADD that fails: its code, a word of its message, and that nothing is left of it.
fn add_fails(node: &Node, what: &str, call: &Call, code: u64, text: &str) {
    let before = node.traces();
    let answer = call.run();
    assert_eq!(answer.code(), code, "{what}: {answer:?}");
    assert!(
        answer.stdout.contains(text),
        "{what}: {text:?} is not in {answer:?}"
    );
    assert_eq!(node.traces(), before, "{what}");
}

#[test]
fn add_that_fails_leaves_nothing() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let pod = Pod::new();
        let file = node.dir().join("file");
        std::fs::write(&file, "").unwrap();
        let own = format!(
            "/proc/{}/task/{}/ns/net",
            std::process::id(),
            nix::unistd::gettid()
        );
        let first = Pod::new();
        first.add("c0", &conf).run().ok();

        let with = |patch: Value| pod.add("c1", &patched(&conf, &patch));
        let required = json!({"agent": "required"});
        let rows: Vec<(&str, Call, u64, &str)> = vec![
            (
                "a plain file",
                pod.add("c1", &conf)
                    .env("CNI_NETNS", file.to_str().unwrap()),
                8,
                "not a network namespace",
            ),
            (
                "no such file",
                pod.add("c1", &conf).env("CNI_NETNS", "/no/such/file"),
                8,
                "/no/such/file",
            ),
            (
                "a directory",
                pod.add("c1", &conf).env("CNI_NETNS", "/"),
                8,
                "namespace",
            ),
            (
                "another kind of namespace",
                pod.add("c1", &conf).env("CNI_NETNS", "/proc/self/ns/pid"),
                8,
                "not a network namespace",
            ),
            (
                "the plugin's own namespace",
                pod.add("c1", &conf).env("CNI_NETNS", &own),
                8,
                "own",
            ),
            (
                "an interface that exists",
                first.add("c1", &conf),
                100,
                "eth0",
            ),
            ("the same again", first.add("c0", &conf), 100, "eth0"),
            (
                "loopback's name",
                pod.add("c1", &conf).env("CNI_IFNAME", "lo"),
                100,
                "lo",
            ),
            (
                "an address in use",
                with(json!({"runtimeConfig": {"ips": ["10.9.0.2"]}})),
                101,
                "c0:eth0",
            ),
            (
                "an address outside",
                with(json!({"runtimeConfig": {"ips": ["10.9.9.9"]}})),
                101,
                "10.9.9.9",
            ),
            (
                "the gateway's address",
                with(json!({"args": {"cni": {"ips": ["10.9.0.1"]}}})),
                101,
                "10.9.0.1",
            ),
            (
                "an excluded address",
                with(
                    json!({"ipam": {"exclude": ["10.9.0.4/31"]}, "runtimeConfig": {"ips": ["10.9.0.5"]}}),
                ),
                101,
                "10.9.0.5",
            ),
            (
                "IP in CNI_ARGS",
                pod.add("c1", &conf).env("CNI_ARGS", "IP=10.9.0.2"),
                101,
                "10.9.0.2",
            ),
            ("the agent is absent", with(required.clone()), 11, "agent"),
            (
                "an interface name that the kernel refuses",
                pod.add("c1", &conf).env("CNI_IFNAME", "a%d%d"),
                103,
                "a%d%d",
            ),
        ];
        for (what, call, code, text) in rows {
            add_fails(&node, what, &call, code, text);
        }
        assert_eq!(pod.ip(&["-o", "link"]).lines().count(), 1, "only lo");
        assert!(
            first.ip(&["-o", "addr"]).contains("10.9.0.2"),
            "the first Pod is untouched"
        );
        first.add("c9", &conf).env("CNI_IFNAME", "net1").run().ok();
    });
}

#[test]
fn a_pool_that_is_used_up() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let pods: Vec<_> = (0..5).map(|_| Pod::new()).collect();
        for (number, pod) in pods.iter().enumerate() {
            pod.add(&format!("c{number}"), &conf).run().ok();
        }
        fails(&Call::new("STATUS", &conf).run(), 50, "no free address");
        let late = Pod::new();
        add_fails(
            &node,
            "exhausted",
            &late.add("c9", &conf),
            11,
            "no free address in 10.9.0.0-10.9.0.7",
        );
        pods[3].del("c3", &conf).run().ok();
        Call::new("STATUS", &conf).run().ok();
        let result = late.add("c9", &conf).run().ok();
        assert_eq!(
            result["ips"][0]["address"], "10.9.0.5/32",
            "the one that was freed"
        );
    });
}

#[test]
fn requested_addresses_and_macs() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({"runtimeConfig": {
            "ips": ["fd09::5/64", "10.9.0.4"], "mac": "02:11:22:33:44:55",
        }}));
        let pod = Pod::new();
        let result = pod.add("c1", &conf).run().ok();
        assert_eq!(result["ips"][0]["address"], "10.9.0.4/32");
        assert_eq!(result["ips"][1]["address"], "fd09::5/128");
        assert_eq!(result["interfaces"][1]["mac"], "02:11:22:33:44:55");
        assert!(
            pod.ip(&["link", "show", "eth0"])
                .contains("02:11:22:33:44:55")
        );
        let other = Pod::new();
        let call = other.add("c2", &node.conf(&json!({})));
        let result = call
            .env("CNI_ARGS", "IP=10.9.0.6;MAC=02:00:00:00:00:09")
            .run()
            .ok();
        assert_eq!(result["ips"][0]["address"], "10.9.0.6/32");
        assert_eq!(result["interfaces"][1]["mac"], "02:00:00:00:00:09");
        assert!(pod.reaches(&other, addresses(&result)[0]));
    });
}

#[test]
fn one_family_alone() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        for (subnet, address, route) in [
            ("10.9.0.0/24", "10.9.0.2/32", "0.0.0.0/0"),
            ("fd09::/64", "fd09::2/128", "::/0"),
        ] {
            let conf = node.conf(&json!({"ipam": {"ranges": [[{"subnet": subnet}]]}}));
            let before = node.traces();
            let pods = [Pod::new(), Pod::new()];
            let result = pods[0].add("c1", &conf).run().ok();
            assert_eq!(result["ips"].as_array().unwrap().len(), 1);
            assert_eq!(result["ips"][0]["address"], address);
            assert_eq!(result["routes"][0]["dst"], route);
            let second = pods[1].add("c2", &conf).run().ok();
            assert!(pods[0].reaches(&pods[1], addresses(&second)[0]), "{subnet}");
            for (number, pod) in pods.iter().enumerate() {
                pod.del(&format!("c{}", number + 1), &conf).run().ok();
            }
            assert_eq!(node.traces(), before);
        }
    });
}

#[test]
fn ipv6_where_the_namespace_has_it_disabled() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let pod = Pod::new();
        let setting = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
        pod.run(|| std::fs::write(setting, "1").unwrap());
        std::fs::write(setting, "1").unwrap();
        let result = pod.add("c1", &conf).run().ok();
        pod.check("c1", &conf, &result).run().ok();
        let other = Pod::new();
        other.add("c2", &conf).run().ok();
        assert!(other.reaches(&pod, addresses(&result)[1]));
    });
}

#[test]
fn a_hundred_at_once() {
    hachi_testutil::require_root!();
    on_a_node(|node| a_hundred(&node));
}

#[test]
fn a_hundred_at_once_where_an_agent_reaps() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let _reaper = hachi_net::Store::open(&node.store())
            .unwrap()
            .start_reaper()
            .unwrap();
        a_hundred(&node);
    });
}

fn a_hundred(node: &Node) {
    let ranges = json!([[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd09::/64"}]]);
    let conf = node.conf(&json!({"ipam": {"ranges": ranges}}));
    let before = node.traces();
    let pods: Vec<_> = (0..100).map(|_| Pod::new()).collect();
    let name = |number: usize| format!("c{number}");
    let adds: Vec<_> = pods
        .iter()
        .enumerate()
        .map(|(n, pod)| pod.add(&name(n), &conf))
        .collect();
    let results: Vec<_> = at_once(&adds).into_iter().map(Answer::ok).collect();
    let given = histogram(results.iter().flat_map(addresses));
    assert_eq!(given.len(), 200, "two addresses each, no duplicate");
    assert!(given.values().all(|count| *count == 1));
    assert_eq!(node.used().len(), 200);
    assert!(pods[0].reaches(&pods[99], addresses(&results[99])[0]));
    assert!(pods[99].reaches(&pods[0], addresses(&results[0])[1]));
    let dels: Vec<_> = pods
        .iter()
        .enumerate()
        .map(|(n, pod)| pod.del(&name(n), &conf))
        .collect();
    for answer in at_once(&dels) {
        answer.ok();
    }
    assert!(node.used().is_empty());
    node.wait_for("a node as before", || node.traces() == before);
}

#[test]
fn a_lock_that_is_never_released() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = node.conf(&json!({}));
        let pod = Pod::new();
        pod.add("c1", &conf).run().ok();
        let file = std::fs::File::options()
            .write(true)
            .open(node.store().join("lock"))
            .unwrap();
        let held = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .unwrap();
        let other = Pod::new();
        add_fails(&node, "locked", &other.add("c2", &conf), 11, "lock");
        drop(held);
        other.add("c2", &conf).run().ok();
    });
}

#[test]
fn a_store_that_is_read_only_or_full() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        run("mount", &["--make-rprivate", "/"]);
        let dir = node.store();
        std::fs::create_dir(&dir).unwrap();
        run(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                "size=64k",
                "none",
                dir.to_str().unwrap(),
            ],
        );
        let conf = node.conf(&json!({}));
        let pods = [Pod::new(), Pod::new()];
        pods[0].add("c0", &conf).run().ok();

        let filler = dir.join("filler");
        let mut size = 0;
        while std::fs::write(&filler, vec![0; size + 4096]).is_ok() {
            size += 4096;
            assert!(size < 1 << 20, "the disk does not fill");
        }
        add_fails(&node, "full", &pods[1].add("c1", &conf), 5, "No space left");
        std::fs::remove_file(&filler).unwrap();

        run("mount", &["-o", "remount,ro", dir.to_str().unwrap()]);
        add_fails(
            &node,
            "read-only",
            &pods[1].add("c1", &conf),
            5,
            "Read-only",
        );
        fails(&pods[0].del("c0", &conf).run(), 5, "Read-only");
        run("mount", &["-o", "remount,rw", dir.to_str().unwrap()]);
        pods[0].del("c0", &conf).run().ok();
        let result = pods[1].add("c1", &conf).run().ok();
        assert_eq!(result["ips"][0]["address"], "10.9.0.3/32");
        pods[1].del("c1", &conf).run().ok();
        run("umount", &[dir.to_str().unwrap()]);
    });
}
