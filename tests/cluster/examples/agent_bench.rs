//! What a release agent takes on a node of a large cluster: memory, and the time from its start until
//! it can serve Pods, which is mostly the API server's; and the CPU time that it takes while nothing happens
//! but that nodes and Pods tell how they are. A real agent, the local cluster's API, and Pods of this node
//! beside those that only the API knows.
//!
//! Prints one JSON object. Usage, as root: `agent_bench DIST [PODS [POLICIES [SERVICES]]]`

#[path = "../../../agent/compile/examples/cluster/mod.rs"]
#[expect(dead_code, reason = "shared with the compiler's measurements")]
mod cluster;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use cluster::Size;
use hachi_apiserver::{Resource, Store, resource};
use hachi_cluster::{Cluster, Family, Options};
use serde_json::{Value, json};

/// Pods of the node itself.
const LOCAL: usize = 20;
const NODE: &str = "node1";
/// Other nodes, and how often each tells that it is alive.
const NODES: usize = 1_000;
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How often the status of some Pod changes, a second: each of 10 000 every 50 s.
const STATUSES: usize = 200;
/// How long the agent is watched with all that.
const STORM: Duration = Duration::from_secs(20);

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let dist = args
        .next()
        .context("the directory of the binaries is missing")?;
    let mut number = |or: usize| match args.next() {
        Some(text) => text.parse().context("not a number"),
        None => Ok(or),
    };
    let size = Size {
        pods: number(10_000)?,
        policies: number(1_000)?,
        services: number(5_000)?,
    };
    let dir = std::env::temp_dir().join(format!("hachi-agent-bench-{}", std::process::id()));
    let options = Options {
        nodes: 1,
        remove_dir: true,
        ..Options::new(dir, dist, Family::V4)
    };
    let cluster = Cluster::start(options)?;
    let store = cluster.store().context("the API is not the built-in one")?;
    fill(store, size)?;
    for n in 0..LOCAL {
        let namespace = format!("ns{}", n % size.namespaces());
        let pod = format!("pod/here{n}");
        let ready = ["--for=condition=Ready", "--timeout=60s"];
        cluster.kubectl(&["wait", &pod, "-n", &namespace, ready[0], ready[1]])?;
    }
    let filled = memory(&cluster, "VmRSS:")?;
    cluster.kill_agent(NODE)?;
    let start = Instant::now();
    cluster.start_agent(NODE)?;
    let status = cluster.wait_agent(NODE)?;
    let ready = start.elapsed();
    // What is only needed at the start has been let go of.
    thread::sleep(Duration::from_secs(2));
    let resident = memory(&cluster, "VmRSS:")?;
    let storm = storm(&cluster, store)?;
    let entries = |map: &str| status.maps.get(map).map(|it| it.entries);
    println!(
        "{}",
        json!({
            "what": "agent",
            "readyMs": ready.as_secs_f64() * 1e3,
            "residentKiB": resident,
            "stormPercent": storm,
            "afterStormKiB": memory(&cluster, "VmRSS:")?,
            "anonymousKiB": memory(&cluster, "RssAnon:")?,
            "peakKiB": memory(&cluster, "VmHWM:")?,
            "afterFillingKiB": filled,
            "peers": entries("PEERS_V4"),
            "policyEntries": entries("POLICY"),
            "services": entries("SERVICES_V4"),
        })
    );
    cluster.stop()
}

/// A line of the agent's `/proc/PID/status`, in kilobytes.
fn memory(cluster: &Cluster, line: &str) -> Result<u64> {
    let pid = cluster.agent_pid(NODE)?.context("no agent runs")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = status.lines().find_map(|it| it.strip_prefix(line));
    let value = value.and_then(|it| it.split_whitespace().next());
    value.context("no such line")?.parse().context("no number")
}

/// The share of a CPU that the agent takes while only heartbeats and statuses come, in percent.
fn storm(cluster: &Cluster, store: &Store) -> Result<f64> {
    let pods = store.list(resource::PODS, "");
    let nodes = NODES as f64 / HEARTBEAT.as_secs_f64();
    let each = Duration::from_secs_f64(1.0 / (nodes + STATUSES as f64));
    let of_nodes = nodes / (nodes + STATUSES as f64);
    let tell = |kind, namespace: &str, name: &str, condition: &str, at: usize| -> Result<()> {
        let now = json!(format!(
            "2030-01-01T{:02}:{:02}:{:02}Z",
            at / 3600 % 24,
            at / 60 % 60,
            at % 60
        ));
        let told = store.modify_status(kind, namespace, name, |object| {
            object["status"]["conditions"] = json!([
                {"type": condition, "status": "True", "lastHeartbeatTime": now, "lastProbeTime": now}
            ]);
        });
        told.map(drop)
            .map_err(|error| anyhow::anyhow!("{name}: {error:?}"))
    };
    let (begun, before) = (Instant::now(), cpu(cluster)?);
    let (mut count, mut node, mut pod) = (0_u32, 0, 0);
    while begun.elapsed() < STORM {
        if f64::from(count) * of_nodes >= node as f64 {
            tell(
                resource::NODES,
                "",
                &format!("far{}", node % NODES),
                "Ready",
                node,
            )?;
            node += 1;
        } else {
            // Not one after the other: neighbours would be of one namespace.
            let one = &pods[pod * 7919 % pods.len()];
            tell(resource::PODS, one.namespace(), one.name(), "Ready", pod)?;
            pod += 1;
        }
        count += 1;
        thread::sleep((each * count).saturating_sub(begun.elapsed()));
    }
    Ok((cpu(cluster)? - before) / begun.elapsed().as_secs_f64() * 100.0)
}

/// The CPU time of the agent so far, in seconds (`proc_pid_stat(5)`).
fn cpu(cluster: &Cluster) -> Result<f64> {
    let pid = cluster.agent_pid(NODE)?.context("no agent runs")?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').context("no name")?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks = || -> Result<f64> { Ok(fields.next().context("too short")?.parse()?) };
    Ok((ticks()? + ticks()?) / 100.0)
}

/// Puts everything into the API.
fn fill(store: &Store, size: Size) -> Result<()> {
    for mut object in size.objects() {
        let kind = match object["kind"].as_str() {
            Some("Pod") => {
                // Bound to a node that nobody runs.
                let status = object["status"].take();
                object["spec"]["nodeName"] = json!("elsewhere");
                image(&mut object)?;
                object["metadata"]
                    .as_object_mut()
                    .context("metadata")?
                    .remove("uid");
                let mut whole = object.clone();
                create(store, resource::PODS, object)?;
                whole["status"] = status;
                store.update_status(resource::PODS, whole)?;
                continue;
            }
            Some("Service") => {
                let spec = object["spec"].as_object_mut();
                spec.context("a spec")?.remove("clusterIP");
                resource::SERVICES
            }
            Some("Namespace") => resource::NAMESPACES,
            Some("EndpointSlice") => resource::ENDPOINT_SLICES,
            _ => resource::NETWORK_POLICIES,
        };
        create(store, kind, object)?;
    }
    for n in 0..NODES {
        let (high, low) = (n / 250, n % 250);
        let node = json!({
            "kind": "Node", "metadata": {"name": format!("far{n}")},
            "spec": {"podCIDRs": [format!("10.{}.{low}.0/24", 100 + high)]},
        });
        create(store, resource::NODES, node)?;
        let addresses = json!([{"type": "InternalIP", "address": format!("172.31.{high}.{low}")}]);
        let set = store.modify_status(resource::NODES, "", &format!("far{n}"), |node| {
            node["status"]["addresses"] = addresses;
        });
        set.map_err(|error| anyhow::anyhow!("{error:?}"))?;
    }
    for n in 0..LOCAL {
        let mut pod = cluster::pod(n * cluster::NAMESPACE_SIZE % size.pods, n);
        pod["metadata"]["name"] = json!(format!("here{n}"));
        pod["spec"]["nodeName"] = json!(NODE);
        pod.as_object_mut().context("a Pod")?.remove("status");
        let metadata = pod["metadata"].as_object_mut();
        metadata.context("metadata")?.remove("uid");
        image(&mut pod)?;
        create(store, resource::PODS, pod)?;
    }
    Ok(())
}

fn image(pod: &mut Value) -> Result<()> {
    let containers = pod["spec"]["containers"].as_array_mut();
    let first = containers.and_then(|all| all.first_mut());
    first.context("a container")?["image"] = json!("busybox");
    Ok(())
}

fn create(store: &Store, kind: &'static Resource, mut object: Value) -> Result<()> {
    object["apiVersion"] = json!(match object["kind"].as_str() {
        Some("EndpointSlice") => "discovery.k8s.io/v1",
        Some("NetworkPolicy") => "networking.k8s.io/v1",
        _ => "v1",
    });
    let said = object.to_string();
    store
        .create(kind, object)
        .map_err(|error| anyhow::anyhow!("{error:?}: {said}"))?;
    Ok(())
}
