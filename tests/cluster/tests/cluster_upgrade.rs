//! Whatever happens to the agents, the load on a cluster of three nodes does not notice: streams,
//! datagrams and new connections, through a Service and without, under a policy, of both families.
//!
//! `HACHI_SOAK=1` makes it as long as it takes to believe it: 100 kills, ten minutes without an API
//! server, 1 000 Pods that come and go, 100 times a watch cache that has expired.
//!
//! `HACHI_UPGRADE_FROM=DIR` names what another release was built into (its `target/dist`): the agents of
//! that release are replaced by these, and these by those.

use std::{
    net::SocketAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{Cluster, Family, Options, bed::LIMIT, eventually, workload::load::Load};

const NODES: [&str; 3] = ["node1", "node2", "node3"];

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

fn cluster(dir: &Path, dist: PathBuf) -> Result<Cluster> {
    let cluster = Cluster::start(Options {
        nodes: 3,
        remove_dir: true,
        ..Options::new(dir, dist, Family::Dual)
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
fn load(cluster: &Cluster) -> Result<Load> {
    let service =
        cluster.kubectl(&["get", "service", "web", "-o=jsonpath={.spec.clusterIPs[*]}"])?;
    let service: Vec<SocketAddr> = service
        .split_whitespace()
        .map(|ip| Ok(SocketAddr::new(ip.parse()?, 8080)))
        .collect::<Result<_>>()?;
    ensure!(service.len() == 2, "one family is missing: {service:?}");
    let mut pods = Vec::new();
    for index in 0..NODES.len() {
        let web = cluster.pod(&format!("default/web-{index}"))?;
        pods.extend(web.addresses.iter().map(|ip| SocketAddr::new(*ip, 80)));
    }
    Load::start(&cluster.pod("default/client")?.netns, &service, &pods)
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
    let outcome = with_cluster(dir.path(), hachi_testutil::dist_dir(), test);
    if let Err(error) = outcome {
        panic!("{error:?}");
    }
}

fn with_cluster(
    dir: &Path,
    dist: PathBuf,
    test: impl FnOnce(&Cluster) -> Result<()>,
) -> Result<()> {
    cluster(&dir.join("cluster"), dist).and_then(|cluster| {
        let outcome = test(&cluster);
        if outcome.is_err() {
            eprintln!("{}", cluster.agent_logs(25));
        }
        outcome
    })
}

#[test]
fn kills_and_rolling_restarts_are_not_noticed() {
    run(|cluster| {
        let load = load(cluster)?;
        let rounds = if is_long() { 34 } else { 2 };
        for round in 0..rounds {
            for node in NODES {
                restart(cluster, node, || Ok(())).with_context(|| format!("round {round}"))?;
            }
        }
        println!("{} kills: {}", rounds * NODES.len(), load.finish(&[])?);
        Ok(())
    });
}

#[test]
fn an_upgrade_to_another_abi_and_its_rollback_are_not_noticed() {
    run(|cluster| {
        let current = generations(cluster, "node1")?;
        let number: u32 = current.trim_start_matches('v').parse()?;
        let load = load(cluster)?;
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
        println!("upgrade and rollback: {}", load.finish(&[])?);
        changes_take_effect(cluster, "stranger")
    });
}

/// The agents that run now are in force: `client` with another label is not allowed any more, or is again.
fn changes_take_effect(cluster: &Cluster, app: &str) -> Result<()> {
    let label = format!("app={app}");
    cluster.kubectl(&["label", "pod", "client", &label, "--overwrite"])?;
    for node in 0..NODES.len() {
        let web = cluster.pod(&format!("default/web-{node}"))?.addresses[0];
        eventually(LIMIT, || {
            let reaches = cluster
                .stream("default/client", SocketAddr::new(web, 80))
                .is_ok();
            ensure!(
                reaches == (app == "client"),
                "{app} reaches {web}: {reaches}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// From another release to this one and back, with whatever the two have that differs.
#[test]
fn an_upgrade_from_another_release_and_its_rollback_are_not_noticed() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let Some(from) = std::env::var_os("HACHI_UPGRADE_FROM").map(PathBuf::from) else {
        hachi_testutil::absent!("another release: HACHI_UPGRADE_FROM names no directory");
    };
    let dir = tempfile::tempdir().expect("a directory");
    let test = || -> Result<()> {
        let (old, new) = (from.canonicalize()?, hachi_testutil::dist_dir());
        // What a node's agent is started from; which release that is changes under it.
        let dist = dir.path().join("dist");
        std::fs::create_dir(&dist)?;
        let agent = dist.join("hachi-agent");
        for entry in std::fs::read_dir(&new)? {
            let path = entry?.path().canonicalize()?;
            let name = path.file_name().context("a file has a name")?;
            if dist.join(name) != agent {
                symlink(&path, dist.join(name))?;
            }
        }
        let release = |dist: &Path| -> Result<()> {
            let _ = std::fs::remove_file(&agent);
            Ok(symlink(dist.join("hachi-agent"), &agent)?)
        };
        release(&old)?;
        with_cluster(dir.path(), dist.clone(), |cluster| {
            for to in [&new, &old, &new] {
                let before = generations(cluster, "node1")?;
                let load = load(cluster)?;
                release(to)?;
                for node in NODES {
                    restart(cluster, node, || Ok(()))?;
                }
                let after = generations(cluster, "node1")?;
                println!("{before} to {after}: {}", load.finish(&[])?);
                changes_take_effect(cluster, "stranger")?;
                changes_take_effect(cluster, "client")?;
            }
            Ok(())
        })
    };
    test().unwrap_or_else(|error| panic!("{error:?}"));
}

#[test]
fn a_missing_api_server_is_not_noticed_and_caught_up_with() {
    run(|cluster| {
        let away = if is_long() { 600 } else { 4 };
        let load = load(cluster)?;
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
        println!("{away} s without an API server: {}", load.finish(&[])?);
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
        let rounds = if is_long() { 100 } else { 2 };
        let load = load(cluster)?;
        let web = SocketAddr::new(cluster.pod("default/web-1")?.addresses[0], 80);
        for round in 0..rounds {
            // All lists begin anew, with a change between the old one and the new.
            let app = if round % 2 == 0 { "stranger" } else { "client" };
            cluster.apply(&pod("other", app, "node3"))?;
            let limit = cluster.forget_history()?;
            cluster.wait_ready("default")?;
            eventually(limit, || {
                let reaches = cluster.stream("default/other", web).is_ok();
                ensure!(reaches == (app == "client"), "{app} reaches it: {reaches}");
                Ok(())
            })?;
            cluster.kubectl(&["delete", "pod", "other", "--wait=true"])?;
        }
        println!("{rounds} expiries: {}", load.finish(&[])?);
        Ok(())
    });
}

#[test]
fn pods_that_come_and_go_are_not_noticed() {
    run(|cluster| {
        let rounds = if is_long() { 50 } else { 2 };
        let load = load(cluster)?;
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
        println!("{} Pods: {}", rounds * 20, load.finish(&[])?);
        Ok(())
    });
}
