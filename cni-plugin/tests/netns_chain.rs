//! Debian's plugins chained after us, as flannel's configuration does it: `tuning`, `bandwidth`,
//! `portmap` and `firewall` (package containernetworking-plugins; the last two also want iptables).

mod support;

use std::{
    io::Read as _,
    net::{Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use support::{
    node::{Node, Pod, addresses, on_a_node, run},
    patched,
};

/// Where distributions put plugins.
const DIRECTORIES: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// The directory with all of these plugins.
fn plugins(names: &[&str]) -> Option<PathBuf> {
    let named = std::env::var_os("CNI_PLUGIN_DIR").map(PathBuf::from);
    let mut places = named.into_iter().chain(DIRECTORIES.map(PathBuf::from));
    places.find(|place| names.iter().all(|name| place.join(name).exists()))
}

fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(name).exists())
}

/// What is found, or a skip of the test, which is a failure in CI.
macro_rules! require {
    ($found:expr, $what:expr) => {
        match $found {
            Some(found) => found,
            None => hachi_testutil::skip!("needs {}", $what),
        }
    };
}

/// A plugin of others, called for a Pod.
fn call(directory: &Path, command: &str, pod: &Pod, conf: &Value) -> Value {
    let kind = conf["type"].as_str().unwrap();
    let mut child = Command::new(directory.join(kind))
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "c1")
        .env("CNI_NETNS", pod.path())
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    serde_json::to_writer(child.stdin.take().unwrap(), conf).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{kind} {command}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// The first plugin is ours, the others follow: ADD all, use, CHECK all, DEL all.
fn chain(
    node: &Node,
    directory: &Path,
    patch: &Value,
    others: &[Value],
    usage: impl FnOnce(&Pod, &Value),
) {
    // What Debian's version of the plugins speaks.
    let header = json!({"cniVersion": "1.0.0", "name": "net"});
    let conf = patched(&node.conf(&header), patch);
    let others: Vec<_> = others.iter().map(|other| patched(other, &header)).collect();
    let with = |conf: &Value, result: &Value| patched(conf, &json!({ "prevResult": result }));
    let before = node.traces();
    let pod = Pod::new();
    let mut result = pod.add("c1", &conf).run().ok();
    for other in &others {
        result = call(directory, "ADD", &pod, &with(other, &result));
    }
    assert!(!addresses(&result).is_empty(), "{result}");
    usage(&pod, &result);
    pod.check("c1", &conf, &result).run().ok();
    // portmap 1.1.1 looks for the rules of both families in the tables of each, and fails on its own.
    for other in others.iter().filter(|other| other["type"] != "portmap") {
        call(directory, "CHECK", &pod, &with(other, &result));
    }
    for other in others.iter().rev() {
        call(directory, "DEL", &pod, &with(other, &result));
    }
    pod.del("c1", &with(&conf, &result)).run().ok();
    node.wait_for("a node as before", || node.traces() == before);
}

#[test]
fn tuning() {
    hachi_testutil::require_root!();
    let directory = require!(plugins(&["tuning"]), "containernetworking-plugins");
    on_a_node(|node| {
        let conf = json!({
            "type": "tuning",
            "sysctl": {"net.ipv4.conf.eth0.arp_announce": "2"},
            "mtu": 1380,
            "mac": "02:00:00:00:00:77",
        });
        chain(&node, &directory, &json!({}), &[conf], |pod, result| {
            let setting = "/proc/sys/net/ipv4/conf/eth0/arp_announce";
            assert_eq!(
                pod.run(|| std::fs::read_to_string(setting).unwrap()).trim(),
                "2"
            );
            assert!(pod.ip(&["link", "show", "eth0"]).contains("mtu 1380"));
            assert_eq!(result["interfaces"][1]["mac"], "02:00:00:00:00:77");
        });
    });
}

#[test]
fn bandwidth() {
    hachi_testutil::require_root!();
    let directory = require!(plugins(&["bandwidth"]), "containernetworking-plugins");
    on_a_node(|node| {
        let megabit = 1_000_000;
        let conf = json!({
            "type": "bandwidth",
            "capabilities": {"bandwidth": true},
            "runtimeConfig": {"bandwidth": {
                "ingressRate": 80 * megabit, "ingressBurst": 80 * megabit,
                "egressRate": 80 * megabit, "egressBurst": 80 * megabit,
            }},
        });
        chain(&node, &directory, &json!({}), &[conf], |pod, result| {
            let host = result["interfaces"][0]["name"].as_str().unwrap();
            let shaped = Command::new("tc")
                .args(["qdisc", "show", "dev", host])
                .output()
                .unwrap();
            let shaped = String::from_utf8(shaped.stdout).unwrap();
            assert!(
                shaped.contains("tbf") && shaped.contains("rate 80Mbit"),
                "{shaped}"
            );
            let other = Pod::new();
            let conf = node.conf(&json!({"cniVersion": "1.0.0"}));
            other.add("c2", &conf).run().ok();
            for address in addresses(result) {
                assert!(other.reaches(pod, address), "{address}");
            }
            other.del("c2", &conf).run().ok();
        });
    });
}

#[test]
fn portmap_and_firewall() {
    hachi_testutil::require_root!();
    let directory = require!(
        plugins(&["portmap", "firewall"]),
        "containernetworking-plugins"
    );
    require!(has_program("iptables").then_some(()), "iptables");
    on_a_node(|node| {
        run("ip", &["addr", "add", "192.0.2.1/32", "dev", "lo"]);
        run("ip", &["addr", "add", "2001:db8::1/128", "dev", "lo"]);
        let portmap = json!({
            "type": "portmap",
            "snat": true,
            "runtimeConfig": {"portMappings": [
                {"hostPort": 18080, "containerPort": 8080, "protocol": "tcp"},
            ]},
        });
        let firewall = json!({"type": "firewall", "backend": "iptables"});
        for (subnet, any, frontend) in [
            ("10.9.0.0/29", "0.0.0.0:8080", "192.0.2.1:18080"),
            ("fd09::/125", "[::]:8080", "[2001:db8::1]:18080"),
        ] {
            let family = json!({"ipam": {"ranges": [[{"subnet": subnet}]]}});
            let others = [portmap.clone(), firewall.clone()];
            chain(&node, &directory, &family, &others, |pod, _| {
                let other = Pod::new();
                let conf = patched(&node.conf(&json!({"cniVersion": "1.0.0"})), &family);
                other.add("c2", &conf).run().ok();
                let server = pod.run(|| TcpListener::bind(any).unwrap());
                let at = frontend.parse().unwrap();
                let connect = || TcpStream::connect_timeout(&at, Duration::from_secs(3)).unwrap();
                let mut client = other.run(connect);
                let (served, _) = server.accept().unwrap();
                served.shutdown(Shutdown::Both).unwrap();
                assert_eq!(client.read(&mut [0; 8]).unwrap(), 0, "{frontend}");
                other.del("c2", &conf).run().ok();
            });
        }
    });
}
