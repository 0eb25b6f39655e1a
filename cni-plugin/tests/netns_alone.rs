//! The plugin with no agent: masquerade by its own table, and the MTU of the node's uplink.

mod support;

use std::{
    net::{IpAddr, TcpListener, TcpStream},
    time::Duration,
};

use hachi_net::Masquerade;
use serde_json::{Value, json};
use support::{
    Call,
    node::{Node, Pod, addresses, at_once, on_a_node, run},
    patched,
};

/// Somebody outside, who knows no way back to a Pod: a namespace joined to the node by `uplink`.
fn outside(mtu: u32) -> Pod {
    let outside = Pod::new();
    let mtu = mtu.to_string();
    let fd = outside.path().to_owned();
    let peer = ["peer", "name", "eth0", "netns", fd.as_str(), "mtu", &mtu];
    let link = ["link", "add", "uplink", "mtu", &mtu, "type", "veth"];
    run("ip", &[&link[..], &peer[..]].concat());
    run("ip", &["link", "set", "uplink", "up"]);
    run("ip", &["address", "add", "192.0.2.1/24", "dev", "uplink"]);
    let v6 = ["address", "add", "2001:db8::1/64", "dev", "uplink", "nodad"];
    run("ip", &v6);
    run("ip", &["route", "add", "default", "via", "192.0.2.2"]);
    outside.ip(&["link", "set", "eth0", "up"]);
    outside.ip(&["address", "add", "192.0.2.2/24", "dev", "eth0"]);
    outside.ip(&["address", "add", "2001:db8::2/64", "dev", "eth0", "nodad"]);
    outside
}

/// The client's address as a server at `address` sees it.
fn seen(client: &Pod, server: &Pod, address: &str) -> IpAddr {
    // A handshake that loses a segment takes a second more.
    let seen = connects(client, server, address, Duration::from_secs(10));
    seen.unwrap_or_else(|| panic!("{address} cannot be reached"))
}

/// The client's address as a server at `address` sees it, if the two get to each other in that time.
fn connects(client: &Pod, server: &Pod, address: &str, within: Duration) -> Option<IpAddr> {
    let address: IpAddr = address.parse().unwrap();
    let listener = server.run(|| TcpListener::bind((address, 0)).unwrap());
    let at = listener.local_addr().unwrap();
    let stream = client.run(|| TcpStream::connect_timeout(&at, within));
    stream.is_ok().then(|| listener.accept().unwrap().1.ip())
}

fn masquerading(node: &Node) -> Value {
    node.conf(&json!({"ipMasq": true}))
}

fn gc(conf: &Value, valid: &[&str]) {
    let valid: Vec<_> = valid
        .iter()
        .map(|id| json!({"containerID": id, "ifname": "eth0"}))
        .collect();
    let conf = patched(conf, &json!({"cni.dev/valid-attachments": valid}));
    Call::new("GC", &conf).run().ok();
}

fn pods(conf: &Value) -> usize {
    let name = conf["name"].as_str().unwrap();
    Masquerade::of(name).pods().unwrap().len()
}

#[test]
fn what_leaves_the_network_is_masqueraded() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let outside = outside(1500);
        let plain = [Pod::new(), Pod::new()];
        let conf = masquerading(&node);
        plain[0]
            .add("plain", &node.conf(&json!({"name": "plain"})))
            .run()
            .ok();
        let plainly = || connects(&plain[0], &outside, "192.0.2.2", Duration::from_millis(900));
        assert_eq!(plainly(), None, "no way back");

        let client = Pod::new();
        let own = addresses(&client.add("c1", &conf).run().ok());
        let server = Pod::new();
        let there = addresses(&server.add("c2", &conf).run().ok());
        for (address, node) in [("192.0.2.2", "192.0.2.1"), ("2001:db8::2", "2001:db8::1")] {
            let expected: IpAddr = node.parse().unwrap();
            assert_eq!(seen(&client, &outside, address), expected);
        }
        for (own, there) in own.iter().zip(&there) {
            // Within the network everybody is seen as who they are.
            assert_eq!(seen(&client, &server, &there.to_string()), *own);
        }
        assert_eq!(plainly(), None, "still none");
    });
}

#[test]
fn the_table_goes_with_the_last_pod() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = masquerading(&node);
        let (one, two) = (Pod::new(), Pod::new());
        let result = one.add("c1", &conf).run().ok();
        two.add("c2", &conf).run().ok();
        assert_eq!(pods(&conf), 4);
        one.check("c1", &conf, &result).run().ok();
        Masquerade::of(conf["name"].as_str().unwrap())
            .remove(&addresses(&result)[..1])
            .unwrap();
        let answer = one.check("c1", &conf, &result).run();
        assert_eq!(answer.code(), 102, "{answer:?}");
        assert!(answer.stdout.contains("is not masqueraded"), "{answer:?}");

        one.del("c1", &conf).run().ok();
        assert_eq!(pods(&conf), 2);
        one.del("c1", &conf).run().ok();
        two.del("c2", &conf).run().ok();
        assert_eq!(pods(&conf), 0);
        if has_nft() {
            assert_eq!(run("nft", &["list", "tables"]), "");
        }
    });
}

#[test]
fn gc_ends_the_masquerade_of_who_is_not_listed() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let conf = masquerading(&node);
        let sandboxes = [Pod::new(), Pod::new()];
        sandboxes[0].add("c1", &conf).run().ok();
        sandboxes[1].add("c2", &conf).run().ok();
        // Of nobody: its ADD was killed, and its claim is lost.
        let network = Masquerade::of(conf["name"].as_str().unwrap());
        network.add(&[], &["10.99.0.1".parse().unwrap()]).unwrap();
        gc(&conf, &["c1", "c2"]);
        assert_eq!(pods(&conf), 4);
        gc(&conf, &["c2"]);
        assert_eq!(pods(&conf), 2);
        gc(&conf, &[]);
        assert_eq!(pods(&conf), 0);
    });
}

/// The removal of an empty table never takes a newcomer's place along.
#[test]
fn comings_and_goings_at_once() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let ranges = json!([[{"subnet": "10.9.0.0/26"}], [{"subnet": "fd09::/120"}]]);
        let conf = node.conf(&json!({"ipMasq": true, "ipam": {"ranges": ranges}}));
        // A guest that is translated does with fewer, all of which wait for one lock.
        let many = if hachi_testutil::in_guest() { 3 } else { 6 };
        let sandboxes: Vec<_> = (0..2 * many).map(|_| Pod::new()).collect();
        let name = |number: usize| format!("c{number}");
        for round in 0..6 {
            let (half, rest) = sandboxes.split_at(many);
            let (coming, going, first) = match round % 2 {
                0 => (half, rest, 0),
                _ => (rest, half, many),
            };
            let mut calls: Vec<_> = coming
                .iter()
                .enumerate()
                .map(|(number, pod)| pod.add(&name(first + number), &conf))
                .collect();
            calls.extend(
                going
                    .iter()
                    .enumerate()
                    .map(|(number, pod)| pod.del(&name(many - first + number), &conf)),
            );
            for answer in at_once(&calls) {
                assert_eq!(answer.code(), 0, "{answer:?}");
            }
            assert_eq!(pods(&conf), 2 * many, "two addresses of each Pod");
        }
    });
}

#[test]
fn the_mtu_is_the_uplinks() {
    hachi_testutil::require_root!();
    on_a_node(|node| {
        let _outside = outside(1380);
        let mtu = |id: &str, patch: &Value| {
            let pod = Pod::new();
            pod.add(id, &node.conf(patch)).run().ok();
            let link = pod.ip(&["-o", "link", "show", "eth0"]);
            let mut words = link.split_whitespace().skip_while(|word| *word != "mtu");
            words.nth(1).unwrap().parse::<u32>().unwrap()
        };
        assert_eq!(mtu("c1", &json!({})), 1380);
        assert_eq!(mtu("c2", &json!({"mtu": 1400})), 1400, "as configured");
        // Too small for IPv6, which these Pods have.
        run("ip", &["link", "set", "uplink", "mtu", "1000"]);
        assert_eq!(mtu("c3", &json!({})), 1500);
        run("ip", &["route", "delete", "default"]);
        assert_eq!(mtu("c4", &json!({})), 1500, "the kernel's choice");
    });
}

fn has_nft() -> bool {
    std::process::Command::new("nft")
        .arg("--version")
        .output()
        .is_ok()
}
