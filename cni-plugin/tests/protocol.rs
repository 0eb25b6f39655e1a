//! The plugin from outside, as far as it goes without privileges: versions, operations,
//! environment. A configuration that is accepted shows by the next error: `CNI_NETNS` does not exist
//! (code 8).

mod support;

use serde_json::{Value, json};
use support::{Bench, Call, PASSED, patched};

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

#[test]
fn every_operation_in_every_version() {
    let mut bench = Bench::new();
    for (index, version) in VERSIONS.into_iter().enumerate() {
        let patch = json!({ "cniVersion": version });
        let rows = [
            ("ADD", PASSED, "no-netns"),
            ("DEL", 0, ""),
            (
                "CHECK",
                if index >= 2 { 7 } else { 1 },
                if index >= 2 { "prevResult" } else { "CHECK" },
            ),
            (
                "GC",
                if index >= 4 { 0 } else { 1 },
                if index >= 4 { "" } else { "GC" },
            ),
            (
                "STATUS",
                if index >= 4 { 0 } else { 1 },
                if index >= 4 { "" } else { "STATUS" },
            ),
            ("VERSION", 0, "supportedVersions"),
        ];
        for (command, code, text) in rows {
            let what = format!("{command} {version}");
            let answer = bench.expect(&what, &bench.call(command, &patch), code, text);
            if code != 0 {
                assert_eq!(answer.json()["cniVersion"], version, "{what}");
            } else if command != "VERSION" {
                assert_eq!(answer.stdout, "", "{what} is silent on success");
            }
        }
    }
    assert_eq!(bench.rows, 30);
}

#[test]
fn version_needs_nothing_but_the_command() {
    let mut bench = Bench::new();
    let rows: [&[u8]; 3] = [b"", b"{\"cniVersion\": \"9.9.9\"}", b"not json\0"];
    for stdin in rows {
        let call = Call::new("VERSION", &Value::Null)
            .without("CNI_PATH")
            .stdin(stdin);
        let answer = bench.expect("VERSION", &call, 0, "");
        let expected = json!({"cniVersion": "1.1.0", "supportedVersions": VERSIONS});
        assert_eq!(answer.json(), expected);
    }
}

#[test]
fn without_a_command_it_introduces_itself() {
    for call in [
        Call::new("", &Value::Null),
        Call::new("", &Value::Null)
            .without("CNI_COMMAND")
            .without("CNI_PATH"),
    ] {
        let answer = call.run();
        assert!(answer.success && answer.stdout.is_empty(), "{answer:?}");
        assert!(answer.stderr.contains("Hachi CNI plugin v"), "{answer:?}");
        assert!(
            answer.stderr.contains("0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"),
            "{answer:?}"
        );
    }
}

#[test]
fn environment() {
    let mut bench = Bench::new();
    let add = bench.call("ADD", &json!({}));
    let long_id = "x".repeat(201);
    let rows: Vec<(&str, Call, &str)> = vec![
        (
            "unknown command",
            bench.call("EXPLODE", &json!({})),
            "EXPLODE",
        ),
        ("lower case", bench.call("add", &json!({})), "add"),
        (
            "no container id",
            add.clone().without("CNI_CONTAINERID"),
            "CNI_CONTAINERID",
        ),
        (
            "empty container id",
            add.clone().env("CNI_CONTAINERID", ""),
            "CNI_CONTAINERID",
        ),
        ("no netns", add.clone().without("CNI_NETNS"), "CNI_NETNS"),
        (
            "no interface name",
            add.clone().without("CNI_IFNAME"),
            "CNI_IFNAME",
        ),
        ("no path", add.clone().without("CNI_PATH"), "CNI_PATH"),
        (
            "all of them are named",
            add.clone()
                .without("CNI_CONTAINERID")
                .without("CNI_NETNS")
                .without("CNI_IFNAME"),
            "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME",
        ),
        (
            "DEL without container",
            bench.call("DEL", &json!({})).without("CNI_CONTAINERID"),
            "CNI_CONTAINERID",
        ),
        (
            "DEL without interface",
            bench.call("DEL", &json!({})).without("CNI_IFNAME"),
            "CNI_IFNAME",
        ),
        (
            "CHECK without netns",
            bench.call("CHECK", &json!({})).without("CNI_NETNS"),
            "CNI_NETNS",
        ),
        (
            "GC without path",
            bench.call("GC", &json!({})).without("CNI_PATH"),
            "CNI_PATH",
        ),
        (
            "container id with a slash",
            add.clone().env("CNI_CONTAINERID", "a/b"),
            "CNI_CONTAINERID",
        ),
        (
            "container id with dots first",
            add.clone().env("CNI_CONTAINERID", ".."),
            "CNI_CONTAINERID",
        ),
        (
            "container id with a space",
            add.clone().env("CNI_CONTAINERID", "a b"),
            "CNI_CONTAINERID",
        ),
        (
            "container id of 201 bytes",
            add.clone().env("CNI_CONTAINERID", &long_id),
            "CNI_CONTAINERID",
        ),
        (
            "interface name of 16 bytes",
            add.clone().env("CNI_IFNAME", "0123456789abcdef"),
            "15 bytes",
        ),
        (
            "interface name .",
            add.clone().env("CNI_IFNAME", "."),
            "CNI_IFNAME",
        ),
        (
            "interface name ..",
            add.clone().env("CNI_IFNAME", ".."),
            "CNI_IFNAME",
        ),
        (
            "interface name with /",
            add.clone().env("CNI_IFNAME", "a/b"),
            "CNI_IFNAME",
        ),
        (
            "interface name with :",
            add.clone().env("CNI_IFNAME", "a:b"),
            "CNI_IFNAME",
        ),
        (
            "interface name with a tab",
            add.clone().env("CNI_IFNAME", "a\tb"),
            "CNI_IFNAME",
        ),
        (
            "arguments without =",
            add.clone().env("CNI_ARGS", "nonsense"),
            "nonsense",
        ),
        (
            "unknown argument",
            add.clone().env("CNI_ARGS", "COLOUR=red"),
            "COLOUR",
        ),
        (
            "IgnoreUnknown of nonsense",
            add.clone().env("CNI_ARGS", "IgnoreUnknown=x"),
            "IgnoreUnknown",
        ),
        (
            "IP that is none",
            add.clone().env("CNI_ARGS", "IP=10.9.0"),
            "IP=10.9.0",
        ),
        (
            "MAC that is none",
            add.clone().env("CNI_ARGS", "MAC=1:2"),
            "MAC=1:2",
        ),
        (
            "MAC of a group",
            add.clone().env("CNI_ARGS", "MAC=01:00:5e:00:00:01"),
            "MAC=",
        ),
    ];
    for (what, call, text) in rows {
        bench.expect(what, &call, 4, text);
    }
    for (what, args) in [
        (
            "Kubernetes",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_UID=c;X=y",
        ),
        ("empty arguments", ""),
        ("trailing semicolon", "IgnoreUnknown=true;"),
    ] {
        bench.expect(what, &add.clone().env("CNI_ARGS", args), PASSED, "no-netns");
    }
    bench.expect(
        "15 bytes",
        &add.env("CNI_IFNAME", "0123456789abcde"),
        PASSED,
        "no-netns",
    );
}

#[test]
fn versions_that_are_not_spoken() {
    let mut bench = Bench::new();
    for version in [
        "0.1.0", "0.2.0", "0.5.0", "1.2.0", "2.0.0", "1.1", "1.1.0 ", "", "x",
    ] {
        let call = bench.call("ADD", &json!({ "cniVersion": version }));
        bench.expect(
            version,
            &call,
            1,
            "supported: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0",
        );
    }
    bench.expect(
        "none",
        &bench.call("ADD", &json!({"cniVersion": null})),
        1,
        "0.1.0",
    );
}

#[test]
fn an_agent_that_is_required_and_absent() {
    let mut bench = Bench::new();
    let required = json!({"agent": null});
    bench.expect("STATUS", &bench.call("STATUS", &required), 50, "agent");
    bench.expect("DEL", &bench.call("DEL", &required), 0, "");
    bench.expect("GC", &bench.call("GC", &required), 0, "");
}

#[test]
fn a_data_directory_that_cannot_be_used() {
    let mut bench = Bench::new();
    let file = bench.dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let patch = json!({"ipam": {"dataDir": file.join("below")}});
    bench.expect("DEL", &bench.call("DEL", &patch), 5, "below");
    bench.expect("STATUS", &bench.call("STATUS", &patch), 50, "below");
    let gc = patched(&patch, &json!({"cni.dev/valid-attachments": []}));
    bench.expect("GC", &bench.call("GC", &gc), 5, "below");
}
