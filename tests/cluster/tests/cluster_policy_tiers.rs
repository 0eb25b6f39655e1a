//! Policies of the cluster with real traffic: before and after those of the namespaces, with their
//! definition installed while the agents run, and explained by `hachi policy`.

use anyhow::{Context as _, Result, ensure};
use hachi_api::{PolicyTrace, Reply, Request};
use hachi_cluster::{
    Protocol::{self, Tcp, Udp},
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
};

const PODS: [&str; 4] = ["a/u", "a/v", "b/u", "b/v"];
const PORTS: [(Protocol, u16); 3] = [(Tcp, 80), (Tcp, 81), (Udp, 80)];
const DEFINITION: &str = include_str!("../../../manifests/crds/clusternetworkpolicies.yaml");

fn grid(bed: &Bed) -> Result<()> {
    let mut specs = Vec::new();
    for namespace in ["a", "b"] {
        for (name, labels, node) in [("u", "pod: u", "node1"), ("v", "pod: v", "node2")] {
            specs.push(Spec {
                namespace,
                name,
                labels,
                node,
                ports: "{containerPort: 80, name: web}, {containerPort: 81}",
            });
        }
    }
    bed.pods(&specs)
}

fn in_a(pod: &str) -> bool {
    pod.starts_with("a/")
}

/// A policy of the cluster for all Pods of the namespace `a`. Its name is the test's.
fn cluster(bed: &Bed, name: &str, tier: &str, priority: u16, rules: &str) -> Result<()> {
    bed.apply(&format!(
        "---\napiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\n\
         metadata: {{name: $a-{name}}}\nspec: {{tier: {tier}, priority: {priority}, \
         subject: {{namespaces: {{matchLabels: {{kubernetes.io/metadata.name: $a}}}}}}, {rules}}}\n"
    ))
    .map(drop)
}

/// Pods of namespace `b`, as a peer.
const FROM_B: &str = "namespaces: {matchLabels: {kubernetes.io/metadata.name: $b}}";

fn remove(bed: &Bed, names: &[&str]) -> Result<()> {
    for name in names {
        bed.kubectl(&format!("delete clusternetworkpolicy $a-{name}"))?;
    }
    Ok(())
}

/// What the agent of `node1` says.
fn traced(bed: &Bed, from: &str, to: &str, port: u16) -> Result<PolicyTrace> {
    let node = bed.cluster.nodes().iter().find(|n| n.name == "node1");
    let socket = node.context("node1")?.agent_socket();
    let request = Request::TracePolicy {
        from: bed.full(from),
        to: bed.full(to),
        protocol: 6,
        port,
    };
    match hachi_cluster::ask(&socket, &request)? {
        Reply::Trace { trace } => Ok(*trace),
        other => anyhow::bail!("{other:?}"),
    }
}

fn tiers_come_one_after_the_other(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.matrix(&PODS, &PORTS, |_, _, _| true)
        .context("without policies, and maybe without the kind")?;
    bed.apply(DEFINITION)?;
    // Baseline: where no NetworkPolicy has a say.
    let deny = format!("ingress: [{{action: Deny, from: [{{{FROM_B}}}]}}]");
    cluster(bed, "base", "Baseline", 10, &deny)?;
    bed.matrix(&PODS, &PORTS, |from, to, _| !in_a(to) || in_a(from))
        .context("a baseline that denies")?;
    bed.apply(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {name: open, namespace: $a}\nspec: {podSelector: {matchLabels: {pod: u}}, \
         ingress: [{ports: [{port: 80}]}]}\n",
    )?;
    let opened = |from: &str, to: &str, port| match to {
        "a/u" => port == (Tcp, 80),
        to => !in_a(to) || in_a(from),
    };
    bed.matrix(&PODS, &PORTS, opened)
        .context("a NetworkPolicy before the baseline")?;
    // Admin: before it, and in the order of rules and priorities.
    let admin = format!(
        "ingress: [{{action: Accept, from: [{{{FROM_B}}}], protocols: [{{udp: {{destinationPort: \
         {{number: 80}}}}}}]}}, {{action: Deny, from: [{{{FROM_B}}}], protocols: \
         [{{destinationNamedPort: web}}]}}]"
    );
    cluster(bed, "admin", "Admin", 20, &admin)?;
    let ruled = |from: &str, to: &str, port| match port {
        (Udp, 80) if in_a(to) && !in_a(from) => true,
        (Tcp, 80) if in_a(to) && !in_a(from) => false,
        port => opened(from, to, port),
    };
    bed.matrix(&PODS, &PORTS, ruled)
        .context("an Admin policy")?;
    let pass = format!("ingress: [{{action: Pass, from: [{{{FROM_B}}}]}}]");
    cluster(bed, "pass", "Admin", 10, &pass)?;
    bed.matrix(&PODS, &PORTS, opened)
        .context("one of a lower priority that passes")?;
    remove(bed, &["pass"])?;
    bed.matrix(&PODS, &PORTS, ruled).context("and without it")?;

    // The agent explains what was measured, and finds the maps as they should be.
    for (from, to, port, allowed, rule) in [
        (
            "b/u",
            "a/u",
            80,
            false,
            "admin ingress[1] (Deny) matches and decides",
        ),
        (
            "a/v",
            "a/u",
            80,
            true,
            "/open ingress[0] (Accept) matches and decides",
        ),
        (
            "a/v",
            "a/u",
            81,
            false,
            "/open ingress[0] (Accept) matches the peer, but not the port",
        ),
    ] {
        let trace = traced(bed, from, to, port)?;
        let flow = trace.flows.first().context("a flow")?;
        ensure!(flow.allowed == allowed && !flow.drift, "{trace:#?}");
        let reasons = flow.sides.iter().flat_map(|side| &side.reasons);
        ensure!(reasons.clone().any(|r| r.contains(rule)), "{trace:#?}");
    }
    remove(bed, &["admin", "base"])?;
    bed.matrix(&PODS, &PORTS, |_, to, port| {
        to != "a/u" || port == (Tcp, 80)
    })
    .context("the NetworkPolicy alone")
}

fn egress_to_networks_is_judged_for_pods_too(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.apply(DEFINITION)?;
    let everything = "to: [{networks: [0.0.0.0/0, '::/0']}]";
    let to_b = format!("to: [{{{FROM_B}}}]");
    let rules = format!(
        "egress: [{{action: Pass, {to_b}, protocols: [{{tcp: {{destinationPort: {{range: {{start: \
         80, end: 81}}}}}}}}]}}, {{action: Deny, {everything}}}]"
    );
    cluster(bed, "out", "Admin", 0, &rules)?;
    bed.matrix(&PODS, &PORTS, |from, to, port| {
        !in_a(from) || (!in_a(to) && port.0 == Tcp)
    })?;
    remove(bed, &["out"])?;
    bed.matrix(&PODS, &PORTS, |_, _, _| true)
}

/// The definition as a later version may have it: peers can be told by the moon.
fn later_definition() -> Result<String> {
    let known = "                        description: Exactly one way to name the other side.
                        minProperties: 1
                        maxProperties: 1
                        properties:
";
    ensure!(DEFINITION.contains(known), "the definition has changed");
    let later = format!("{known}                          moonPhase: {{type: string}}\n");
    Ok(DEFINITION.replace(known, &later))
}

fn a_peer_that_no_version_knows_denies(bed: &Bed) -> Result<()> {
    grid(bed)?;
    bed.apply(DEFINITION)?;
    let rules = "ingress: [{action: Pass, from: [{moonPhase: full}]}]";
    // The real API takes up a definition, new or changed, a little later.
    eventually(LIMIT, || {
        let Err(refused) = cluster(bed, "odd", "Admin", 0, rules) else {
            anyhow::bail!("a field that the definition lacks was taken");
        };
        ensure!(format!("{refused:#}").contains("moonPhase"), "{refused:#}");
        Ok(())
    })?;
    bed.apply(&later_definition()?)?;
    eventually(LIMIT, || cluster(bed, "odd", "Admin", 0, rules))?;
    bed.matrix(&PODS, &PORTS, |_, to, _| !in_a(to))?;
    // A watch that is older than the definition still shows objects without the new field, and ends
    // soon; whatever changes afterwards is seen whole.
    let mut times = 0;
    eventually(LIMIT, || {
        times += 1;
        bed.kubectl(&format!(
            "annotate clusternetworkpolicy $a-odd --overwrite test.hachi.dev/times={times}"
        ))?;
        let status = bed.cluster.wait_agent("node1")?;
        ensure!(
            status.problems.iter().any(|p| p.contains("moonPhase")),
            "{:?}",
            status.problems
        );
        Ok(())
    })?;
    eventually(LIMIT, || {
        let told = bed.kubectl("get events -n default -o jsonpath={.items[*].message}")?;
        ensure!(told.contains("moonPhase"), "{told}");
        Ok(())
    })?;
    remove(bed, &["odd"])?;
    bed.apply(DEFINITION).map(drop)
}

both_families!(
    tiers_come_one_after_the_other,
    egress_to_networks_is_judged_for_pods_too,
    a_peer_that_no_version_knows_denies,
);
