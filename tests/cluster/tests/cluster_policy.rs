//! NetworkPolicies with real traffic: two namespaces with Pods on both nodes, and who reaches whom
//! after each change. What is expected is written from the API's documentation.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Protocol::{self, Tcp, Udp},
    Target,
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
    workload::pulse::{self, Pulse},
};

const PODS: [&str; 6] = ["a/u", "a/v", "a/w", "b/u", "b/v", "b/w"];
const PORTS: [(Protocol, u16); 3] = [(Tcp, 80), (Tcp, 81), (Udp, 80)];

/// Three Pods in each namespace, labelled `pod: NAME`; `u` and `w` on one node, `v` on the other.
fn grid(bed: &Bed) -> Result<()> {
    let mut specs = Vec::new();
    for namespace in ["a", "b"] {
        for (name, labels, node) in [
            ("u", "pod: u", "node1"),
            ("v", "pod: v", "node2"),
            ("w", "pod: w", "node1"),
        ] {
            let ports = "{containerPort: 80}, {containerPort: 81}";
            specs.push(Spec {
                namespace,
                name,
                labels,
                node,
                ports,
            });
        }
    }
    bed.pods(&specs)
}

/// A policy in the namespace `a`.
fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{name: {name}, namespace: $a}}\nspec: {spec}\n"
    )
}

const DENY_INGRESS: &str = "{podSelector: {}, policyTypes: [Ingress]}";

fn in_a(pod: &str) -> bool {
    pod.starts_with("a/")
}

fn deny_all_isolates_a_namespace_and_its_deletion_frees_it(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.matrix(&PODS, &PORTS, |_, _, _| true)
        .context("without policies")?;
    bed.apply(&policy("deny", DENY_INGRESS))?;
    bed.matrix(&PODS, &PORTS, |_, to, _| !in_a(to))
        .context("with deny-all")?;
    bed.kubectl("delete networkpolicy deny -n $a")?;
    bed.matrix(&PODS, &PORTS, |_, _, _| true)
        .context("without it again")
}

fn a_pod_selector_names_pods_of_its_own_namespace(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.apply(&policy(
        "allow",
        "{podSelector: {matchLabels: {pod: u}}, policyTypes: [Ingress],
          ingress: [{from: [{podSelector: {matchLabels: {pod: v}}}]}]}",
    ))?;
    bed.matrix(&PODS, &PORTS, |from, to, _| to != "a/u" || from == "a/v")
}

fn a_namespace_selector_names_all_pods_of_its_namespaces(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.apply(&policy(
        "allow",
        "{podSelector: {}, policyTypes: [Ingress],
          ingress: [{from: [{namespaceSelector: {matchLabels: {ns: b}}}]}]}",
    ))?;
    bed.matrix(&PODS, &PORTS, |from, to, _| !in_a(to) || !in_a(from))
}

fn both_selectors_in_one_peer_are_an_and(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.apply(&policy(
        "allow",
        "{podSelector: {matchLabels: {pod: u}}, policyTypes: [Ingress],
          ingress: [{from: [{namespaceSelector: {matchLabels: {ns: b}},
                             podSelector: {matchLabels: {pod: v}}}]}]}",
    ))?;
    bed.matrix(&PODS, &PORTS, |from, to, _| to != "a/u" || from == "b/v")?;
    // The same two as peers of their own are an OR.
    bed.apply(&policy(
        "allow",
        "{podSelector: {matchLabels: {pod: u}}, policyTypes: [Ingress],
          ingress: [{from: [{namespaceSelector: {matchLabels: {ns: b}}},
                            {podSelector: {matchLabels: {pod: v}}}]}]}",
    ))?;
    bed.matrix(&PODS, &PORTS, |from, to, _| {
        to != "a/u" || !in_a(from) || from == "a/v"
    })
}

fn ports_and_protocols_are_told_apart(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.apply(&policy(
        "allow",
        "{podSelector: {}, policyTypes: [Ingress],
          ingress: [{ports: [{port: 80}]}]}",
    ))?;
    bed.matrix(&PODS, &PORTS, |_, to, port| !in_a(to) || port == (Tcp, 80))?;
    bed.apply(&policy(
        "allow",
        "{podSelector: {}, policyTypes: [Ingress],
          ingress: [{ports: [{protocol: UDP, port: 80}, {protocol: TCP, port: 81}]}]}",
    ))?;
    bed.matrix(&PODS, &PORTS, |_, to, port| !in_a(to) || port != (Tcp, 80))
}

fn egress_binds_the_sender_and_lets_replies_pass(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.apply(&policy(
        "deny",
        "{podSelector: {matchLabels: {pod: u}}, policyTypes: [Egress]}",
    ))?;
    // Others still reach it: its replies are not its own flows.
    bed.matrix(&PODS, &PORTS, |from, _, _| from != "a/u")
        .context("egress denied")?;
    bed.apply(&policy(
        "allow",
        "{podSelector: {matchLabels: {pod: u}}, policyTypes: [Egress],
          egress: [{to: [{namespaceSelector: {matchLabels: {ns: b}},
                          podSelector: {matchLabels: {pod: v}}}],
                    ports: [{protocol: UDP, port: 80}]}]}",
    ))?;
    bed.matrix(&PODS, &PORTS, |from, to, port| {
        from != "a/u" || (to, port) == ("b/v", (Udp, 80))
    })
    .context("one exception")
}

fn both_ends_must_allow(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.apply(&policy(
        "egress",
        "{podSelector: {matchLabels: {pod: u}}, policyTypes: [Egress],
          egress: [{to: [{podSelector: {matchLabels: {pod: v}}}]}]}",
    ))?;
    bed.apply(&policy(
        "ingress",
        "{podSelector: {matchLabels: {pod: v}}, policyTypes: [Ingress]}",
    ))?;
    bed.matrix(&PODS, &PORTS, |from, to, _| from != "a/u" && to != "a/v")?;
    bed.apply(&policy(
        "ingress",
        "{podSelector: {matchLabels: {pod: v}}, policyTypes: [Ingress],
          ingress: [{from: [{podSelector: {matchLabels: {pod: u}}}]}]}",
    ))?;
    bed.matrix(&PODS, &PORTS, |from, to, _| {
        (from == "a/u") == (to == "a/v")
    })
}

fn labels_of_pods_and_namespaces_take_effect(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.apply(&policy(
        "allow",
        "{podSelector: {matchLabels: {pod: u}}, policyTypes: [Ingress],
          ingress: [{from: [{podSelector: {matchLabels: {friend: 'yes'}}},
                            {namespaceSelector: {matchLabels: {friends: 'yes'}}}]}]}",
    ))?;
    let pods = ["a/u", "a/v", "b/v"];
    bed.matrix(&pods, &PORTS, |_, to, _| to != "a/u")
        .context("before any label")?;
    bed.kubectl("label pod v -n $a friend=yes")?;
    bed.matrix(&pods, &PORTS, |from, to, _| to != "a/u" || from == "a/v")
        .context("after the Pod's label")?;
    bed.kubectl("label namespace $b friends=yes")?;
    bed.matrix(&pods, &PORTS, |_, _, _| true)
        .context("after the namespace's label")?;
    bed.kubectl("label pod v -n $a friend-")?;
    bed.kubectl("label namespace $b friends-")?;
    bed.matrix(&pods, &PORTS, |_, to, _| to != "a/u")
        .context("without the labels")
}

fn the_example_of_the_documentation_works_unchanged(bed: &Bed) -> Result<()> {
    const POLICY: &str = include_str!("../fixtures/upstream-network-policy.yaml");
    let cluster = bed.cluster;
    let pod = |name: &str, role: &str, node: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\n\
             metadata: {{name: {name}, namespace: default, labels: {{role: {role}}}}}\n\
             spec: {{nodeName: {node}, containers: [{{name: main, image: server, ports: \
             [{{containerPort: 6379}}, {{containerPort: 5978}}]}}]}}\n"
        )
    };
    let pods = [
        pod("db", "db", "node1"),
        pod("frontend", "frontend", "node2"),
        pod("other", "other", "node1"),
    ];
    cluster.apply(&pods.concat())?;
    cluster.wait_ready("default")?;
    bed.pods(&[
        Spec::default(),
        Spec {
            namespace: "b",
            ..Spec::default()
        },
    ])?;
    bed.kubectl("label namespace $a project=myproject")?;

    let ask = |from: &str, to: &str, port: u16| -> Result<bool> {
        let to = Target::new(Tcp, cluster.pod_ip(to)?, port);
        Ok(bed.probe(from, to)?.answered())
    };
    let check = |expected: &[(&str, &str, u16, bool)]| {
        eventually(LIMIT, || {
            for (from, to, port, wanted) in expected {
                let answered = ask(from, to, *port)?;
                ensure!(answered == *wanted, "{from} -> {to}:{port} is {answered}");
            }
            Ok(())
        })
    };
    let all = [
        ("default/frontend", "default/db", 6379),
        ("default/other", "default/db", 6379),
        ("a/pod", "default/db", 6379),
        ("b/pod", "default/db", 6379),
        ("default/frontend", "default/db", 5978),
        ("default/db", "default/frontend", 5978),
        ("default/frontend", "default/other", 6379),
    ];
    let free: Vec<_> = all
        .iter()
        .map(|(from, to, port)| (*from, *to, *port, true))
        .collect();
    let policed = [true, false, true, false, false, false, true];
    let bound: Vec<_> = free
        .iter()
        .zip(policed)
        .map(|((from, to, port, _), ok)| (*from, *to, *port, ok))
        .collect();
    let result = check(&free).context("without the policy").and_then(|()| {
        cluster.apply(POLICY)?;
        check(&bound).context("with the policy")
    });
    // The namespace is everybody's.
    cluster.kubectl(&[
        "delete",
        "networkpolicy",
        "test-network-policy",
        "--ignore-not-found",
    ])?;
    cluster.kubectl(&["delete", "pod", "db", "frontend", "other", "--wait=false"])?;
    result
}

fn a_policy_binds_flows_that_live(bed: &Bed) -> Result<()> {
    grid(bed)?;
    let client = bed.cluster.pod(&bed.full("b/u"))?;
    for (name, target) in [("near", "a/w"), ("far", "a/v")] {
        let address = bed.target(Udp, target, 80)?.address;
        bed.reaches("b/u", bed.target(Udp, target, 80)?)?;
        let flow = Pulse::start(&client.netns, address)?;
        std::thread::sleep(Duration::from_millis(100));
        let event = Instant::now();
        bed.apply(&policy("deny", DENY_INGRESS))?;
        bed.loses("b/u", bed.target(Udp, target, 80)?)?;
        std::thread::sleep(Duration::from_millis(300));
        let beats = flow.stop()?;
        ensure!(
            beats.iter().any(|beat| beat.answered),
            "{name}: the flow never worked"
        );
        let Some(closed) = pulse::closed_after(&beats, event) else {
            bail!("{name}: the flow goes on under a policy that denies it");
        };
        ensure!(
            closed < Duration::from_secs(5),
            "{name}: the flow went on for {closed:?}"
        );
        bed.kubectl("delete networkpolicy deny -n $a")?;
        bed.reaches("b/u", bed.target(Udp, target, 80)?)?;
    }
    Ok(())
}

fn ip_blocks_match_pods_by_their_address(bed: &Bed) -> Result<()> {
    grid(bed)?;
    let ip = |pod: &str| bed.cluster.pod_ip(&bed.full(pod));
    let one = |pod: &str| -> Result<String> {
        let ip = ip(pod)?;
        Ok(format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }))
    };
    let any = if ip("a/u")?.is_ipv4() {
        "0.0.0.0/0"
    } else {
        "::/0"
    };
    bed.apply(&policy(
        "allow",
        &format!(
            "{{podSelector: {{matchLabels: {{pod: u}}}}, policyTypes: [Ingress],
               ingress: [{{from: [{{ipBlock: {{cidr: '{}'}}}}]}}]}}",
            one("b/v")?
        ),
    ))?;
    bed.matrix(&PODS, &PORTS, |from, to, _| to != "a/u" || from == "b/v")
        .context("one address")?;
    bed.apply(&policy(
        "allow",
        &format!(
            "{{podSelector: {{matchLabels: {{pod: u}}}}, policyTypes: [Ingress],
               ingress: [{{from: [{{ipBlock: {{cidr: '{any}', except: ['{}', '{}']}}}}]}}]}}",
            one("b/v")?,
            one("a/w")?
        ),
    ))?;
    bed.matrix(&PODS, &PORTS, |from, to, _| {
        to != "a/u" || !["b/v", "a/w"].contains(&from)
    })
    .context("all but two addresses")
}

fn port_ranges_and_names_resolve_on_the_receiver(bed: &Bed) -> Result<()> {
    bed.pods(&[
        Spec {
            namespace: "b",
            name: "client",
            ..Spec::default()
        },
        Spec {
            name: "low",
            ports: "{name: web, containerPort: 80}",
            ..Spec::default()
        },
        Spec {
            name: "high",
            ports: "{name: web, containerPort: 8443}",
            ..Spec::default()
        },
    ])?;
    let low = bed.target(Tcp, "a/low", 80)?;
    let high = bed.target(Tcp, "a/high", 8443)?;
    bed.reaches("b/client", low)?;
    bed.reaches("b/client", high)?;
    bed.apply(&policy(
        "range",
        "{podSelector: {}, policyTypes: [Ingress],
          ingress: [{ports: [{protocol: TCP, port: 8000, endPort: 9000}]}]}",
    ))?;
    bed.loses("b/client", low)
        .context("a port outside of the range")?;
    bed.reaches("b/client", high)
        .context("a port of the range")?;
    bed.kubectl("delete networkpolicy range -n $a")?;
    // Of the sender: the name is what the receiver calls its port.
    bed.apply(
        "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: named, namespace: $b}
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress: [{to: [{namespaceSelector: {}}], ports: [{protocol: TCP, port: web}]}]
",
    )?;
    bed.loses(
        "b/client",
        Target {
            protocol: Udp,
            ..low
        },
    )
    .context("UDP of that number")?;
    bed.reaches("b/client", low)
        .context("the name is port 80 there")?;
    bed.reaches("b/client", high)
        .context("the name is port 8443 there")
}

fn the_own_node_and_the_pod_itself_always_reach_a_pod(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.apply(&policy(
        "deny",
        "{podSelector: {}, policyTypes: [Ingress, Egress]}",
    ))?;
    let to = bed.target(Tcp, "a/u", 80)?;
    bed.loses("b/u", to)?;
    bed.reaches("node/node1", to)?;
    bed.reaches("a/u", to)?;
    // Another node is a stranger like any other.
    bed.loses("node/node2", to)
}

fn a_pod_is_isolated_from_its_first_packet(bed: &Bed) -> Result<()> {
    bed.apply(&policy("deny", DENY_INGRESS))?;
    bed.pods(&[Spec {
        namespace: "b",
        name: "client",
        ..Spec::default()
    }])?;
    for (name, node) in [("first", "node1"), ("second", "node2")] {
        bed.pods(&[Spec {
            name,
            node,
            ..Spec::default()
        }])?;
        // The server answers before the Pod is ready: a window would show here.
        let to = bed.target(Tcp, &format!("a/{name}"), 80)?;
        for _ in 0..5 {
            let outcome = bed.probe("b/client", to)?;
            ensure!(!outcome.answered(), "{name} on {node}: {outcome}");
        }
    }
    Ok(())
}

both_families!(
    deny_all_isolates_a_namespace_and_its_deletion_frees_it,
    a_pod_selector_names_pods_of_its_own_namespace,
    a_namespace_selector_names_all_pods_of_its_namespaces,
    both_selectors_in_one_peer_are_an_and,
    ports_and_protocols_are_told_apart,
    egress_binds_the_sender_and_lets_replies_pass,
    both_ends_must_allow,
    labels_of_pods_and_namespaces_take_effect,
    the_example_of_the_documentation_works_unchanged,
    a_policy_binds_flows_that_live,
    ip_blocks_match_pods_by_their_address,
    port_ranges_and_names_resolve_on_the_receiver,
    the_own_node_and_the_pod_itself_always_reach_a_pod,
    a_pod_is_isolated_from_its_first_packet,
);
