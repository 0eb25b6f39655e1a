//! The configuration on stdin from outside, without privileges: what is refused, with which code
//! and naming what, and what is accepted.

mod support;

use serde_json::{Value, json};
use support::{Bench, PASSED};

#[test]
fn unreadable_input() {
    let mut bench = Bench::new();
    let whole = bench.conf(&json!({})).to_string();
    let big = format!("{}{}", " ".repeat(1 << 20), whole);
    let nested = "[".repeat(100_000);
    let rows: [(&str, Vec<u8>); 11] = [
        ("nothing", vec![]),
        ("truncated", whole.as_bytes()[..whole.len() / 2].to_vec()),
        ("not JSON", b"hello".to_vec()),
        ("not UTF-8", b"{\"name\": \"\xff\"}".to_vec()),
        ("NUL bytes", b"\0\0\0\0".to_vec()),
        ("a list", b"[]".to_vec()),
        ("a string", b"\"x\"".to_vec()),
        ("two objects", format!("{whole}{whole}").into_bytes()),
        ("more than 1 MiB", big.into_bytes()),
        ("nested too deep", nested.into_bytes()),
        (
            "a version that is no text",
            b"{\"cniVersion\": 1.0}".to_vec(),
        ),
    ];
    for command in ["ADD", "DEL"] {
        for (what, stdin) in &rows {
            let call = bench.call(command, &json!({})).stdin(stdin.clone());
            bench.expect(what, &call, 6, "");
        }
    }
    // Just at the limit.
    let padding = " ".repeat((1 << 20) - whole.len());
    let call = bench
        .call("ADD", &json!({}))
        .stdin(format!("{padding}{whole}"));
    bench.expect("1 MiB", &call, PASSED, "no-netns");
}

#[test]
fn fields_that_are_refused() {
    let mut bench = Bench::new();
    let ranges = |ranges: Value| json!({"ipam": {"ranges": ranges}});
    let mapping =
        |mappings: Value| json!({"agent": "required", "runtimeConfig": {"portMappings": mappings}});
    let rows = [
        (
            "unknown field",
            json!({"colour": "red"}),
            "colour: unknown field",
        ),
        (
            "unknown field of ipam",
            json!({"ipam": {"colour": 1}}),
            "ipam.colour: unknown field",
        ),
        (
            "unknown field of a range",
            ranges(json!([[{"subnet": "10.0.0.0/24", "x": 1}]])),
            "ipam.ranges[0][0].x",
        ),
        (
            "unknown runtimeConfig",
            json!({"runtimeConfig": {"x": 1}}),
            "runtimeConfig.x",
        ),
        (
            "unknown field of delegate",
            json!({"delegate": {"bridge": "cni0"}}),
            "delegate.bridge",
        ),
        (
            "unknown field of dns",
            json!({"dns": {"server": "x"}}),
            "dns.server",
        ),
        (
            "unknown field of a route",
            json!({"ipam": {"routes": [{"dst": "::/0", "via": "x"}]}}),
            "ipam.routes[0].via",
        ),
        ("no name", json!({"name": null}), "name: missing"),
        ("a name with a slash", json!({"name": "a/b"}), "name"),
        ("a name with a NUL", json!({"name": "a\u{0}b"}), "name"),
        ("an empty name", json!({"name": ""}), "name"),
        ("a name that is a number", json!({"name": 7}), "name"),
        ("no type", json!({"type": null}), "type: missing"),
        ("mtu as text", json!({"mtu": "1500"}), "mtu"),
        ("mtu too small", json!({"mtu": 67}), "mtu"),
        ("mtu too large", json!({"mtu": 65_536}), "mtu"),
        ("mtu too small for IPv6", json!({"mtu": 1279}), "IPv6"),
        ("negative mtu", json!({"mtu": -1}), "mtu"),
        ("agent of nonsense", json!({"agent": "maybe"}), "agent"),
        ("agent as a boolean", json!({"agent": true}), "agent"),
        (
            "a relative socket",
            json!({"agentSocket": "run/agent.sock"}),
            "agentSocket",
        ),
        (
            "hairpinMode false",
            json!({"hairpinMode": false}),
            "hairpinMode",
        ),
        (
            "isDefaultGateway false",
            json!({"isDefaultGateway": false}),
            "isDefaultGateway",
        ),
        (
            "isDefaultGateway false, delegated",
            json!({"delegate": {"isDefaultGateway": false}}),
            "delegate.isDefaultGateway",
        ),
        (
            "forceAddress as text",
            json!({"forceAddress": "yes"}),
            "forceAddress",
        ),
        (
            "ipMasq where the agent does it",
            json!({"ipMasq": true, "agent": "required"}),
            "ipMasq",
        ),
        (
            "ipMasq, delegated, where the agent does it",
            json!({"delegate": {"ipMasq": true}, "agent": null}),
            "delegate.ipMasq",
        ),
        (
            "ipMasq that contradicts itself",
            json!({"ipMasq": false, "delegate": {"ipMasq": true}}),
            "delegate.ipMasq",
        ),
        ("ipMasq as text", json!({"ipMasq": "true"}), "ipMasq"),
        ("ipam as text", json!({"ipam": "host-local"}), "ipam"),
        (
            "another ipam",
            json!({"ipam": {"type": "dhcp"}}),
            "ipam.type",
        ),
        (
            "a relative dataDir",
            json!({"ipam": {"dataDir": "x"}}),
            "ipam.dataDir",
        ),
        (
            "a dataDir with a NUL",
            json!({"ipam": {"dataDir": "/x\u{0}"}}),
            "ipam.dataDir",
        ),
        (
            "alone without ranges",
            json!({"ipam": {"ranges": null}}),
            "ipam.ranges",
        ),
        ("alone without ipam", json!({"ipam": null}), "ipam.ranges"),
        ("alone with empty ranges", ranges(json!([])), "ipam.ranges"),
        ("an empty set", ranges(json!([[]])), "ipam.ranges"),
        (
            "a set that is an object",
            ranges(json!([{"subnet": "10.0.0.0/24"}])),
            "ipam.ranges[0]",
        ),
        (
            "no subnet",
            ranges(json!([[{"rangeStart": "10.0.0.1"}]])),
            "subnet",
        ),
        (
            "a subnet that is an address",
            ranges(json!([[{"subnet": "10.0.0.1"}]])),
            "subnet",
        ),
        (
            "host bits",
            ranges(json!([[{"subnet": "10.0.0.1/24"}]])),
            "10.0.0.0/24",
        ),
        (
            "a start outside",
            ranges(json!([[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.1.1"}]])),
            "rangeStart",
        ),
        (
            "an end outside",
            ranges(json!([[{"subnet": "10.0.0.0/24", "rangeEnd": "10.0.1.1"}]])),
            "rangeEnd",
        ),
        (
            "a gateway outside",
            ranges(json!([[{"subnet": "10.0.0.0/24", "gateway": "10.0.1.1"}]])),
            "gateway",
        ),
        (
            "the wrong way round",
            ranges(
                json!([[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9", "rangeEnd": "10.0.0.8"}]]),
            ),
            "rangeEnd",
        ),
        (
            "nothing to give out",
            ranges(
                json!([[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.1", "rangeEnd": "10.0.0.1"}]]),
            ),
            "10.0.0.0/24",
        ),
        (
            "both families in a set",
            ranges(json!([[{"subnet": "10.0.0.0/24"}, {"subnet": "fd00::/64"}]])),
            "both families",
        ),
        (
            "one family twice",
            ranges(json!([[{"subnet": "10.0.0.0/24"}], [{"subnet": "10.1.0.0/24"}]])),
            "one family",
        ),
        (
            "overlapping ranges",
            ranges(json!([[{"subnet": "10.0.0.0/24"}, {"subnet": "10.0.0.128/25"}]])),
            "overlap",
        ),
        (
            "an exclusion that is none",
            json!({"ipam": {"exclude": ["x"]}}),
            "ipam.exclude[0]",
        ),
        (
            "a route without destination",
            json!({"ipam": {"routes": [{"gw": "169.254.1.1"}]}}),
            "ipam.routes[0].dst",
        ),
        (
            "a route by another gateway",
            json!({"ipam": {"routes": [{"dst": "0.0.0.0/0", "gw": "10.9.0.1"}]}}),
            "ipam.routes[0].gw",
        ),
        (
            "a requested address that is none",
            json!({"runtimeConfig": {"ips": ["x"]}}),
            "runtimeConfig.ips[0]",
        ),
        (
            "a MAC that is none",
            json!({"runtimeConfig": {"mac": "x"}}),
            "runtimeConfig.mac",
        ),
        (
            "bandwidth without its plugin",
            json!({"runtimeConfig": {"bandwidth": {"ingressRate": 1000}}}),
            "bandwidth plugin",
        ),
        (
            "portMappings alone",
            json!({"runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 80}]}}),
            "portmap",
        ),
        (
            "a host port twice",
            mapping(
                json!([{"hostPort": 80, "containerPort": 1}, {"hostPort": 80, "containerPort": 2}]),
            ),
            "asked for twice",
        ),
        (
            "a host port beyond the last",
            mapping(json!([{"hostPort": 65_536, "containerPort": 80}])),
            "hostPort",
        ),
        (
            "a host port to nowhere",
            mapping(json!([{"hostPort": 80}])),
            "containerPort: missing",
        ),
        (
            "a host port of an unknown protocol",
            mapping(json!([{"hostPort": 80, "containerPort": 80, "protocol": "icmp"}])),
            "protocol",
        ),
        (
            "a host port of no address",
            mapping(json!([{"hostPort": 80, "containerPort": 80, "hostIP": "node"}])),
            "hostIP",
        ),
        (
            "a host port of the loopback",
            mapping(json!([{"hostPort": 80, "containerPort": 80, "hostIP": "127.0.0.1"}])),
            "loopback",
        ),
        (
            "a host port with more than that",
            mapping(json!([{"hostPort": 80, "containerPort": 80, "name": "http"}])),
            "name: unknown field",
        ),
        ("dns as a list", json!({"dns": []}), "dns"),
        (
            "capabilities as a list",
            json!({"capabilities": []}),
            "capabilities",
        ),
        (
            "a list that is none for GC",
            json!({"cni.dev/valid-attachments": {}}),
            "cni.dev/valid-attachments",
        ),
        (
            "prevResult as text",
            json!({"prevResult": "x"}),
            "prevResult",
        ),
        (
            "prevResult with a bad address",
            json!({"prevResult": {"ips": [{"address": "x"}]}}),
            "prevResult.ips",
        ),
        (
            "prevResult with a bad index",
            json!({"prevResult": {"ips": [{"address": "10.9.0.2/32", "interface": 1}]}}),
            "prevResult.ips[0].interface",
        ),
    ];
    for (what, patch, text) in rows {
        bench.expect(what, &bench.call("ADD", &patch), 7, text);
    }
    let version = json!({"prevResult": {"cniVersion": "0.2.0", "ip4": {}}});
    bench.expect(
        "prevResult of another version",
        &bench.call("ADD", &version),
        1,
        "0.2.0",
    );
}

#[test]
fn fields_that_are_accepted() {
    let mut bench = Bench::new();
    let rows = [
        (
            "flannel's options",
            json!({"delegate": {"hairpinMode": true, "isDefaultGateway": true, "forceAddress": true}}),
        ),
        (
            "the same without delegate",
            json!({"hairpinMode": true, "isDefaultGateway": true, "forceAddress": false}),
        ),
        ("ipMasq false", json!({"ipMasq": false})),
        ("ipMasq", json!({"ipMasq": true})),
        ("ipMasq, delegated", json!({"delegate": {"ipMasq": true}})),
        (
            "ipMasq false where the agent does it",
            json!({"ipMasq": false, "agent": "required", "runtimeConfig": {"portMappings": []}}),
        ),
        ("mtu 0", json!({"mtu": 0})),
        ("mtu", json!({"mtu": 1400})),
        (
            "host-local by name",
            json!({"ipam": {"type": "host-local"}}),
        ),
        (
            "the short form of a range",
            json!({"ipam": {"ranges": null, "subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9"}}),
        ),
        (
            "several ranges",
            json!({"ipam": {"ranges": [[{"subnet": "10.0.0.0/24"}, {"subnet": "10.1.0.0/24"}]]}}),
        ),
        (
            "routes",
            json!({"ipam": {"routes": [{"dst": "10.0.0.0/8"}, {"dst": "::/0", "gw": "fe80::1", "mtu": 1400, "priority": 5}]}}),
        ),
        (
            "exclusions",
            json!({"ipam": {"exclude": ["10.9.0.2", "10.9.0.4/30"]}}),
        ),
        (
            "args",
            json!({"args": {"labels": [1], "cni": {"ips": ["10.9.0.3/29"]}}}),
        ),
        (
            "capabilities",
            json!({"capabilities": {"ips": true, "mac": true}, "runtimeConfig": {"ips": [], "mac": ""}}),
        ),
        (
            "bandwidth of nothing",
            json!({"runtimeConfig": {"bandwidth": {"ingressRate": 0}}}),
        ),
        (
            "what containerd grants, as it spells it",
            json!({"ipam": {"ranges": null}, "runtimeConfig": {
                "bandwidth": {"IngressRate": 0, "IngressBurst": 0, "EgressRate": 0, "EgressBurst": 0},
                "dns": {"Servers": ["10.0.0.10"], "Searches": ["x"], "Options": []},
                "ipRanges": [[{"Subnet": "fd00:8::/64", "RangeStart": "", "RangeEnd": "", "Gateway": ""}]],
            }}),
        ),
        (
            "empty portMappings",
            json!({"runtimeConfig": {"portMappings": []}}),
        ),
        (
            "dns",
            json!({"dns": {"nameservers": ["10.0.0.10"], "domain": "x", "search": ["y"], "options": ["ndots:5"]}}),
        ),
        (
            "null is absent",
            json!({"mtu": Value::Null, "dns": Value::Null}),
        ),
        (
            "prevResult of an earlier version",
            json!({"prevResult": {"cniVersion": "0.3.1", "ips": [{"version": "4", "address": "10.0.0.1/24"}]}}),
        ),
    ];
    for (what, patch) in rows {
        bench.expect(what, &bench.call("ADD", &patch), PASSED, "no-netns");
    }
}

#[test]
fn damaged_configurations_never_break_it() {
    let bench = Bench::new();
    let whole = bench.conf(&json!({
        "mtu": 1400,
        "dns": {"search": ["x"]},
        "runtimeConfig": {"ips": ["10.9.0.3"], "mac": "02:00:00:00:00:01"},
        "prevResult": {"interfaces": [{"name": "a"}], "ips": [{"address": "10.0.0.1/24", "interface": 0}]},
    }));
    let whole = whole.to_string().into_bytes();
    // A linear congruential generator with a fixed start: the same damage every time.
    let mut random: usize = 1;
    let mut below = |limit: usize| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % limit
    };
    let mut codes = std::collections::BTreeSet::new();
    for round in 0..300 {
        let mut text = whole.clone();
        for _ in 0..=below(3) {
            let place = below(text.len());
            match below(3) {
                0 => text[place] = b"{}[]\",:0a\0\xff"[below(11)],
                1 => drop(text.remove(place)),
                _ => text.truncate(place.max(1)),
            }
        }
        let answer = bench.call("ADD", &json!({})).stdin(text.clone()).run();
        let shown = String::from_utf8_lossy(&text);
        let code = answer.code();
        assert!(
            [1, 6, 7, PASSED, 11].contains(&code),
            "round {round}: {shown}: {answer:?}"
        );
        codes.insert(code);
    }
    assert!(codes.contains(&6) && codes.contains(&7), "{codes:?}");
}
