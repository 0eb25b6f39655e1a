//! The agent's death and return: what runs goes on, what is new works afterwards.

use std::{net::SocketAddr, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Family,
    Protocol::{Tcp, Udp},
    Target,
    bed::{self, Bed, LIMIT, Spec},
    both_families, eventually,
    workload::{pulse::Pulse, stream::Stream},
};

const SERVICE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: $a}
spec: {selector: {app: web}, ports: [{port: 8080, targetPort: 80}]}
";

/// A stall longer than this is not a busy machine's any more.
const STALL_MS: u128 = 3000;

fn start(bed: &Bed) -> Result<SocketAddr> {
    bed.apply(SERVICE)?;
    bed.pods(&[
        Spec {
            name: "web-1",
            node: "node1",
            labels: "app: web",
            ..Spec::default()
        },
        Spec {
            name: "web-2",
            node: "node2",
            labels: "app: web",
            ..Spec::default()
        },
        Spec {
            name: "client",
            node: "node1",
            labels: "app: client",
            ..Spec::default()
        },
    ])?;
    let to = Target::new(Tcp, bed.service("a", "web")?, 8080);
    bed.reaches("a/client", to)?;
    Ok(to.address)
}

/// So many streams that both backends have one, but once in half a million runs: a flow to the same
/// node and one to the other.
const STREAMS: usize = 20;

fn streams(bed: &Bed, to: SocketAddr) -> Result<Vec<Stream>> {
    let both = ["a/web-1", "a/web-2"].map(|web| bed.full(web));
    let target = Target {
        protocol: Tcp,
        address: to,
    };
    eventually(LIMIT, || {
        let names = bed.backends("a/client", target, STREAMS)?;
        ensure!(names == both, "the backends are {names:?}");
        Ok(())
    })?;
    (0..STREAMS)
        .map(|_| bed.cluster.stream(&bed.full("a/client"), to))
        .collect()
}

fn go_on(streams: &[Stream]) -> Result<()> {
    let before: Vec<_> = streams.iter().map(Stream::echoed).collect();
    eventually(LIMIT, || {
        for (stream, before) in streams.iter().zip(&before) {
            ensure!(!stream.ended(), "a stream ended");
            ensure!(stream.echoed() > before + 5, "a stream stalls");
        }
        Ok(())
    })
}

fn finish(streams: Vec<Stream>) -> Result<Vec<String>> {
    let mut servers = Vec::new();
    for stream in streams {
        let report = stream.stop()?;
        ensure!(report.error.is_none(), "a stream broke: {report:?}");
        ensure!(
            report.longest_stall_ms < STALL_MS,
            "a stream stalled: {report:?}"
        );
        servers.push(report.server);
    }
    servers.sort_unstable();
    servers.dedup();
    Ok(servers)
}

fn a_killed_agent_breaks_no_stream(bed: &Bed) -> Result<()> {
    let to = start(bed)?;
    let streams = streams(bed, to)?;
    go_on(&streams).context("before")?;
    for node in ["node1", "node2"] {
        bed.cluster.kill_agent(node)?;
    }
    go_on(&streams).context("without agents")?;
    // New connections too: programs and maps are pinned.
    bed.reaches(
        "a/client",
        Target {
            protocol: Tcp,
            address: to,
        },
    )?;
    for node in ["node1", "node2"] {
        bed.cluster.start_agent(node)?;
        bed.cluster.wait_agent(node)?;
    }
    go_on(&streams).context("after the restart")?;
    thread::sleep(Duration::from_millis(500));
    let servers = finish(streams)?;
    ensure!(
        servers.len() == 2,
        "the streams were to go to both nodes, not {servers:?}"
    );
    Ok(())
}

fn after_a_restart_new_pods_and_policies_work(bed: &Bed) -> Result<()> {
    let to = Target {
        protocol: Tcp,
        address: start(bed)?,
    };
    for node in ["node1", "node2"] {
        bed.cluster.kill_agent(node)?;
    }
    // A Pod that is made now waits: with no agent nothing would guard it.
    let late = Spec {
        name: "late",
        node: "node2",
        labels: "app: web",
        ..Spec::default()
    };
    bed.apply(&bed.manifest(&late))?;
    bed.apply(
        "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: $a}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
",
    )?;
    thread::sleep(Duration::from_millis(500));
    ensure!(
        bed.cluster.pod(&bed.full("a/late")).is_err(),
        "a Pod runs that no agent guards"
    );
    for node in ["node1", "node2"] {
        bed.cluster.start_agent(node)?;
        bed.cluster.wait_agent(node)?;
    }
    bed.cluster
        .wait_ready(&bed.namespace("a"))
        .context("the late Pod")?;
    bed.pods(&[Spec {
        namespace: "b",
        name: "stranger",
        node: "node1",
        ..Spec::default()
    }])?;
    bed.loses("b/stranger", to)
        .context("the policy that was made meanwhile")?;
    eventually(LIMIT, || {
        let names = bed.backends("a/client", to, 30)?;
        let late = bed.full("a/late");
        ensure!(
            names.contains(&late),
            "{late} is no backend: {}",
            names.join(", ")
        );
        Ok(())
    })
}

fn a_restart_loses_no_datagram(bed: &Bed) -> Result<()> {
    start(bed)?;
    let client = bed.cluster.pod(&bed.full("a/client"))?;
    for web in ["a/web-1", "a/web-2"] {
        bed.reaches("a/client", bed.target(Udp, web, 80)?)?;
        let flow = Pulse::start(&client.netns, bed.target(Udp, web, 80)?.address)?;
        for node in ["node1", "node2"] {
            bed.cluster.kill_agent(node)?;
            bed.cluster.start_agent(node)?;
            bed.cluster.wait_agent(node)?;
        }
        thread::sleep(Duration::from_millis(300));
        let beats = flow.settle()?;
        let lost = beats.iter().filter(|beat| !beat.answered).count();
        ensure!(
            lost == 0,
            "{lost} of {} datagrams to {web} were lost",
            beats.len()
        );
    }
    Ok(())
}

fn a_watch_that_has_expired_starts_over(bed: &Bed) -> Result<()> {
    let to = Target {
        protocol: Tcp,
        address: start(bed)?,
    };
    let becomes = |answered: bool, limit: Duration| {
        eventually(limit, || {
            let outcome = bed.probe("a/client", to)?;
            ensure!(outcome.answered() == answered, "{outcome}");
            Ok(())
        })
    };
    for round in 0..3 {
        let limit = bed.cluster.forget_history()?;
        bed.apply(
            "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: $a}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress]}
",
        )?;
        becomes(false, limit).with_context(|| format!("round {round}"))?;
        let limit = bed.cluster.forget_history()?;
        bed.kubectl("delete networkpolicy deny -n $a")?;
        becomes(true, limit).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

/// The name of the host side of a Pod's interface.
fn host_side(bed: &Bed, pod: &str, node: &str) -> Result<String> {
    let links = |place: &str| bed.cluster.exec(place, "ip", &["-o", "link"]);
    let inside = links(&bed.full(pod))?;
    let index = inside
        .split_once("eth0@if")
        .and_then(|(_, rest)| rest.split_once(':'))
        .context("no eth0 of a veth")?
        .0;
    let outside = links(&format!("node/{node}"))?;
    let line = outside
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{index}: ")))
        .context("no other side")?;
    Ok(line.split('@').next().unwrap_or(line).to_owned())
}

fn an_interface_without_programs_is_closed(bed: &Bed) -> Result<()> {
    let spec = |name, node| Spec {
        name,
        node,
        ..Spec::default()
    };
    bed.pods(&[
        spec("good", "node1"),
        spec("bad", "node1"),
        spec("client", "node2"),
    ])?;
    let good = bed.target(Tcp, "a/good", 80)?;
    let bad = bed.target(Tcp, "a/bad", 80)?;
    bed.reaches("a/client", bad)?;
    let ifname = host_side(bed, "a/bad", "node1")?;
    let on_node = |script: &str| bed.cluster.exec("node/node1", "sh", &["-ec", script]);

    // A directory where the link should be pinned is in the way; the old link is gone with its pin.
    bed.cluster.kill_agent("node1")?;
    let pins = format!("/sys/fs/bpf/hachi/v*/links/{ifname}-ingress");
    on_node(&format!("pin=$(ls -d {pins}); rm $pin; mkdir $pin"))?;
    bed.cluster.start_agent("node1")?;
    let status = bed.cluster.wait_agent("node1")?;
    let told = status.problems.join("; ");
    ensure!(told.contains(&ifname), "the status does not tell: {told:?}");
    eventually(LIMIT, || {
        let said = "-o=jsonpath={range .items[*]}{.involvedObject.name}/{.reason} {end}";
        let namespace = bed.namespace("a");
        let events = bed
            .cluster
            .kubectl(&["get", "events", "-n", &namespace, said])?;
        ensure!(events.contains("bad/InterfaceClosed"), "Events: {events:?}");
        Ok(())
    })?;
    bed.reaches("a/client", good).context("the other Pod")?;
    for from in ["a/client", "a/good", "node/node1"] {
        let outcome = bed.probe(from, bad)?;
        ensure!(!outcome.answered(), "{from} reaches a Pod without programs");
    }
    bed.pods(&[spec("new", "node1")]).context("a new Pod")?;

    on_node(&format!("rmdir {pins}"))?;
    bed.reaches("a/client", bad).context("after the retry")?;
    bed.reaches("a/bad", good).context("after the retry")?;
    let told = bed.cluster.wait_agent("node1")?.problems.join("; ");
    ensure!(!told.contains(&ifname), "the status still says {told:?}");
    Ok(())
}

fn a_second_agent_on_a_node_is_refused(bed: &Bed) -> Result<()> {
    let agent = bed.cluster.options().dist.join("hachi-agent");
    let mut arguments = vec!["--node-name", "node1"];
    arguments.extend(["--kubeconfig", "/run/hachi/kubeconfig"]);
    arguments.extend(["--socket", "/run/hachi/second.sock"]);
    let refused = |arguments: &[&str], option: &str| {
        let run = bed
            .cluster
            .exec("node/node1", &agent.to_string_lossy(), arguments);
        let Err(error) = run else {
            anyhow::bail!("a second agent ran to its end")
        };
        let error = format!("{error:#}");
        ensure!(
            error.contains("another agent works with") && error.contains(option),
            "{error}"
        );
        Ok(())
    };
    refused(&arguments, "--data-dir")?;
    arguments.extend(["--data-dir", "/run/hachi/second"]);
    refused(&arguments, "--bpf-root")?;
    bed.cluster.wait_agent("node1").context("the first one")?;
    Ok(())
}

both_families!(
    an_interface_without_programs_is_closed,
    a_killed_agent_breaks_no_stream,
    after_a_restart_new_pods_and_policies_work,
    a_restart_loses_no_datagram,
    a_watch_that_has_expired_starts_over,
);

#[test]
fn only_one_agent_runs_on_a_node() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    bed::run("second", Family::V4, a_second_agent_on_a_node_is_refused);
}

#[test]
fn the_node_is_told_that_it_has_a_network() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    bed::run("network", Family::V4, the_condition_is_cleared);
}

fn the_condition_is_cleared(bed: &Bed) -> Result<()> {
    let cluster = bed.cluster;
    let path = "-o=jsonpath={.status.conditions[?(@.type=='NetworkUnavailable')].status}";
    let condition = || -> Result<String> { cluster.kubectl(&["get", "node", "node1", path]) };
    eventually(LIMIT, || {
        ensure!(condition()? == "False", "{:?}", condition());
        Ok(())
    })?;
    // As a cloud's controller does with a node that is new to it.
    let unavailable =
        r#"{"status":{"conditions":[{"type":"NetworkUnavailable","status":"True"}]}}"#;
    let arguments = [
        "patch",
        "node",
        "node1",
        "--subresource=status",
        "-p",
        unavailable,
        path,
    ];
    // Of the answer: the agent looks at its Node from time to time, and may be quick.
    ensure!(cluster.kubectl(&arguments)? == "True");
    cluster.kill_agent("node1")?;
    cluster.start_agent("node1")?;
    eventually(LIMIT, || {
        ensure!(condition()? == "False", "{:?}", condition());
        Ok(())
    })?;
    cluster.wait_agent("node1").map(drop)
}
