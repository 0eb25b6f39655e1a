//! What a release agent takes on a node of a large cluster: memory, and the time from its start until
//! it can serve Pods, which is mostly the API server's. A real agent, the local cluster's API, and
//! Pods of this node beside those that only the API knows.
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
    let entries = |map: &str| status.maps.get(map).map(|it| it.entries);
    println!(
        "{}",
        json!({
            "what": "agent",
            "readyMs": ready.as_secs_f64() * 1e3,
            "residentKiB": memory(&cluster, "VmRSS:")?,
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
