//! Whatever happens to the agents, the load on a cluster of three nodes does not notice: streams,
//! datagrams and new connections, through a Service and without, under a policy, of both families.
//!
//! `HACHI_SOAK=1` makes it as long as it takes to believe it: 100 kills, ten minutes without an API
//! server, 1 000 Pods that come and go, 100 times a watch cache that has expired.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Cluster, Family, Options,
    bed::LIMIT,
    eventually,
    workload::{arrivals::Arrivals, pulse::Pulse, stream::Stream},
};

const NODES: [&str; 3] = ["node1", "node2", "node3"];
const RATE: u32 = 100;

const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
    - {name: tcp, port: 8080, targetPort: 80}
    - {name: udp, port: 8080, targetPort: 80, protocol: UDP}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: default}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
";

fn is_long() -> bool {
    std::env::var_os("HACHI_SOAK").is_some()
}

fn cluster(dir: &std::path::Path) -> Result<Cluster> {
    let cluster = Cluster::start(Options {
        nodes: 3,
        remove_dir: true,
        ..Options::new(dir, hachi_testutil::dist_dir(), Family::Dual)
    })?;
    cluster.apply(OBJECTS)?;
    let mut pods = String::new();
    for (index, node) in NODES.iter().enumerate() {
        pods += &pod(&format!("web-{index}"), "web", node);
    }
    pods += &pod("client", "client", "node1");
    cluster.apply(&pods)?;
    cluster.wait_ready("default")?;
    Ok(cluster)
}

fn pod(name: &str, app: &str, node: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default, labels: {{app: {app}}}}}\n\
         spec: {{nodeName: {node}, containers: [{{name: main, image: server}}]}}\n"
    )
}

/// What runs while agents come and go.
struct Load {
    streams: Vec<Stream>,
    pulses: Vec<(String, Pulse)>,
    arrivals: Vec<Arrivals>,
}

impl Load {
    fn start(cluster: &Cluster) -> Result<Self> {
        let client = cluster.pod("default/client")?;
        let service: Vec<std::net::IpAddr> = cluster
            .kubectl(&["get", "service", "web", "-o=jsonpath={.spec.clusterIPs[*]}"])?
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        ensure!(service.len() == 2, "one family is missing: {service:?}");
        let mut load = Self {
            streams: Vec::new(),
            pulses: Vec::new(),
            arrivals: Vec::new(),
        };
        for ip in service {
            let to = SocketAddr::new(ip, 8080);
            eventually(LIMIT, || cluster.stream("default/client", to).map(drop))?;
            for _ in 0..4 {
                load.streams.push(cluster.stream("default/client", to)?);
            }
            let name = format!("the Service at {to}");
            load.pulses.push((name, Pulse::start(&client.netns, to)?));
            load.arrivals
                .push(Arrivals::start(client.netns.clone(), to, RATE));
        }
        for index in 0..NODES.len() {
            let name = format!("default/web-{index}");
            for ip in cluster.pod(&name)?.addresses {
                let pulse = Pulse::start(&client.netns, SocketAddr::new(ip, 80))?;
                load.pulses.push((format!("{name} at {ip}"), pulse));
            }
        }
        Ok(load)
    }

    /// Nothing was lost, refused or reset.
    fn finish(self) -> Result<String> {
        // What was under way.
        thread::sleep(Duration::from_millis(300));
        let mut said = String::new();
        for stream in self.streams {
            let report = stream.stop()?;
            ensure!(report.error.is_none(), "a stream broke: {report:?}");
        }
        for arrivals in self.arrivals {
            let report = arrivals.stop()?;
            ensure!(
                report.failed.is_empty() && report.syns_again == 0 && report.answered > 100,
                "new connections: {report:?}"
            );
            said += &format!("{} connections, ", report.answered);
        }
        for (to, pulse) in self.pulses {
            let beats = pulse.stop()?;
            let lost = beats.iter().filter(|beat| !beat.answered).count();
            ensure!(
                lost == 0,
                "{lost} of {} datagrams to {to} were lost",
                beats.len()
            );
            said += &format!("{} datagrams, ", beats.len());
        }
        Ok(said + "nothing lost")
    }
}

/// Ends a node's agent and starts it again. Meanwhile `change` may do something to the node.
fn restart(cluster: &Cluster, node: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
    cluster.kill_agent(node)?;
    change()?;
    cluster.start_agent(node)?;
    cluster.wait_agent(node).map(drop)
}

/// As if what is pinned were of an agent with another ABI version.
fn rename_generation(cluster: &Cluster, node: &str, to: u32) -> Result<()> {
    let root = "/sys/fs/bpf/hachi";
    let here = cluster.exec(&format!("node/{node}"), "ls", &[root])?;
    let from = format!("{root}/{}", here.trim());
    let to = format!("{root}/v{to}");
    cluster
        .exec(&format!("node/{node}"), "mv", &[&from, &to])
        .map(drop)
}

fn generations(cluster: &Cluster, node: &str) -> Result<String> {
    let listed = cluster.exec(&format!("node/{node}"), "ls", &["/sys/fs/bpf/hachi"])?;
    Ok(listed.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn run(test: impl FnOnce(&Cluster) -> Result<()>) {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let dir = tempfile::tempdir().expect("a directory");
    let outcome = cluster(&dir.path().join("cluster")).and_then(|cluster| {
        let outcome = test(&cluster);
        if outcome.is_err() {
            eprintln!("{}", cluster.agent_logs(25));
        }
        outcome
    });
    if let Err(error) = outcome {
        panic!("{error:?}");
    }
}

#[test]
fn kills_and_rolling_restarts_are_not_noticed() {
    run(|cluster| {
        let load = Load::start(cluster)?;
        let rounds = if is_long() { 34 } else { 2 };
        for round in 0..rounds {
            for node in NODES {
                restart(cluster, node, || Ok(())).with_context(|| format!("round {round}"))?;
            }
        }
        println!("{} kills: {}", rounds * NODES.len(), load.finish()?);
        Ok(())
    });
}

#[test]
fn an_upgrade_to_another_abi_and_its_rollback_are_not_noticed() {
    run(|cluster| {
        let current = generations(cluster, "node1")?;
        let number: u32 = current.trim_start_matches('v').parse()?;
        let load = Load::start(cluster)?;
        // From an older one, then from a newer one, as a rollback does.
        for other in [number - 1, number + 1] {
            for node in NODES {
                restart(cluster, node, || rename_generation(cluster, node, other))?;
                eventually(LIMIT, || {
                    let there = generations(cluster, node)?;
                    ensure!(there == current, "{node} has {there}");
                    Ok(())
                })?;
            }
        }
        println!("upgrade and rollback: {}", load.finish()?);
        // The new generation is in force: a change of policy takes effect.
        cluster.kubectl(&["label", "pod", "client", "app=stranger", "--overwrite"])?;
        let web = cluster.pod("default/web-1")?.addresses[0];
        eventually(LIMIT, || {
            let to = SocketAddr::new(web, 80);
            ensure!(
                cluster.stream("default/client", to).is_err(),
                "still allowed"
            );
            Ok(())
        })
    });
}

#[test]
fn a_missing_api_server_is_not_noticed_and_caught_up_with() {
    run(|cluster| {
        let away = if is_long() { 600 } else { 4 };
        let load = Load::start(cluster)?;
        // The nodes' way to the server; the Pods' traffic does not take it.
        let servers = Family::Dual.fabric();
        let block = |action: &str| -> Result<()> {
            for node in NODES {
                for server in &servers {
                    let length = if server.is_ipv4() { 32 } else { 128 };
                    let to = format!("{server}/{length}");
                    let arguments = ["route", action, "blackhole", &to];
                    cluster.exec(&format!("node/{node}"), "ip", &arguments)?;
                }
            }
            Ok(())
        };
        block("add")?;
        let until = Instant::now() + Duration::from_secs(away);
        cluster
            .apply(&pod("late", "late", "node2").replace("nodeName: node2", "nodeName: nowhere"))?;
        cluster.kubectl(&["label", "pod", "late", "app=web", "--overwrite"])?;
        // One agent has to start without it, too.
        cluster.kill_agent("node3")?;
        cluster.start_agent("node3")?;
        thread::sleep(until.saturating_duration_since(Instant::now()));
        block("del")?;
        for node in NODES {
            cluster.wait_agent(node)?;
        }
        println!("{away} s without an API server: {}", load.finish()?);
        // Everybody hears of what is new.
        cluster.kubectl(&["label", "pod", "client", "app=stranger", "--overwrite"])?;
        for index in 0..NODES.len() {
            let web = cluster.pod(&format!("default/web-{index}"))?.addresses[0];
            eventually(Duration::from_secs(90), || {
                let to = SocketAddr::new(web, 80);
                ensure!(
                    cluster.stream("default/client", to).is_err(),
                    "web-{index} has not heard"
                );
                Ok(())
            })?;
        }
        Ok(())
    });
}

#[test]
fn watches_that_expire_are_not_noticed() {
    run(|cluster| {
        let Some(store) = cluster.store() else {
            // The real API expires watches when it likes.
            return Ok(());
        };
        let rounds = if is_long() { 100 } else { 2 };
        let load = Load::start(cluster)?;
        let web = SocketAddr::new(cluster.pod("default/web-1")?.addresses[0], 80);
        for round in 0..rounds {
            // All lists begin anew, with a change between the old one and the new.
            let app = if round % 2 == 0 { "stranger" } else { "client" };
            cluster.apply(&pod("other", app, "node3"))?;
            store.expire();
            cluster.wait_ready("default")?;
            eventually(LIMIT, || {
                let reaches = cluster.stream("default/other", web).is_ok();
                ensure!(reaches == (app == "client"), "{app} reaches it: {reaches}");
                Ok(())
            })?;
            cluster.kubectl(&["delete", "pod", "other", "--wait=true"])?;
        }
        println!("{rounds} expiries: {}", load.finish()?);
        Ok(())
    });
}

#[test]
fn pods_that_come_and_go_are_not_noticed() {
    run(|cluster| {
        let rounds = if is_long() { 50 } else { 2 };
        let load = Load::start(cluster)?;
        for round in 0..rounds {
            let mut pods = String::new();
            for index in 0..20 {
                let node = NODES[index % NODES.len()];
                pods += &pod(&format!("churn-{round}-{index}"), "churn", node);
            }
            cluster.apply(&pods)?;
            cluster.wait_ready("default")?;
            cluster.kubectl(&["delete", "pod", "-l", "app=churn", "--wait=true"])?;
        }
        println!("{} Pods: {}", rounds * 20, load.finish()?);
        Ok(())
    });
}
