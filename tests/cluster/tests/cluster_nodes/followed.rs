//! How long a node's change takes until it is in force on the others: measured by a packet every
//! millisecond, from the moment at which the API has the change.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    client::{Client, User},
    eventually,
    workload::pulse::{Pulse, closed_after, opened_after},
};
use serde_json::Value;

use crate::{changes::ip, world::World};

/// How long it may take.
const LIMIT: Duration = Duration::from_secs(1);

/// How long is waited for it.
const WAIT: Duration = Duration::from_secs(10);

/// The machine may be busy with something else at one time: the best counts.
const ROUNDS: usize = 3;

/// How long it takes at least to tell silence, and how many packets.
const QUIET: Duration = Duration::from_millis(200);
const IN_VAIN: u64 = 100;

/// Other blocks than nodes have.
const OTHER: [&str; 2] = ["10.244.88.0/24", "fd00:10:244:88::/64"];

/// What happened, and how long it took each time; none if no packet shows it.
struct Times(Vec<(&'static str, Option<Duration>)>);

impl Times {
    fn note(&mut self, what: &'static str, took: Option<Duration>) {
        self.0.push((what, took));
    }

    fn check(&self) -> Result<()> {
        for (what, _) in &self.0 {
            let all = || self.0.iter().filter(|(other, _)| other == what);
            let all: Vec<_> = all().map(|(_, took)| *took).collect();
            // None is longer than any limit.
            let best = all.iter().flatten().min();
            let best = best.with_context(|| format!("{what}: it is not followed at all"))?;
            ensure!(*best <= LIMIT, "{what}: {all:?}");
        }
        Ok(())
    }
}

/// Waits until the pulse is answered.
fn is_answered(pulse: &Pulse) -> Result<()> {
    let before = pulse.answered();
    eventually(WAIT, || {
        ensure!(pulse.answered() > before, "it is not answered");
        Ok(())
    })
}

/// Waits until the pulse is not answered any more. A busy machine may send nothing for long, and that is
/// no silence: so many have to be sent in vain.
fn is_silent(pulse: &Pulse) -> Result<()> {
    let now = || (pulse.answered(), pulse.sent(), Instant::now());
    let mut last = now();
    eventually(WAIT, || {
        let (answered, sent, at) = now();
        if answered > last.0 {
            last = (answered, sent, at);
        }
        let (in_vain, quiet) = (sent - last.1, at - last.2);
        ensure!(
            in_vain >= IN_VAIN && quiet >= QUIET,
            "the last {in_vain} in {quiet:?} are not answered"
        );
        Ok(())
    })
}

/// The Nodes of the API.
struct Nodes(Client);

impl Nodes {
    fn ask(&self, verb: &str, node: &str, body: Option<&Value>) -> Result<Value> {
        let what = format!("{verb} /api/v1/nodes{node}");
        let answer = match body {
            Some(body) => self.0.json(&what, body)?,
            None => self.0.ask(&what)?,
        };
        ensure!(answer.code < 300, "{what}: {}", answer.text);
        Ok(answer.json())
    }

    fn get(&self, node: &str) -> Result<Value> {
        self.ask("GET", &format!("/{node}"), None)
    }

    fn delete(&self, node: &str) -> Result<()> {
        self.ask("DELETE", &format!("/{node}"), None).map(drop)
    }

    fn join(&self, node: &Value) -> Result<()> {
        let made = self.ask("POST", "", Some(node))?;
        let name = node["metadata"]["name"].as_str().context("a name")?;
        let mut node = node.clone();
        node["metadata"]["uid"] = made["metadata"]["uid"].clone();
        self.ask("PUT", &format!("/{name}/status"), Some(&node))
            .map(drop)
    }
}

/// A copy of an object that can be created again.
fn fresh(nodes: &Nodes, node: &str) -> Result<Value> {
    let mut object = nodes.get(node)?;
    let metadata = object["metadata"].as_object_mut().context("metadata")?;
    for field in [
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "managedFields",
    ] {
        metadata.remove(field);
    }
    Ok(object)
}

/// A node leaves, joins with other blocks, and joins with its own again.
fn node(world: &World, nodes: &Nodes, index: usize, times: &mut Times) -> Result<()> {
    let name = crate::world::NODES[index];
    let own = fresh(nodes, name)?;
    let mut other = own.clone();
    other["spec"]["podCIDRs"] = OTHER.into();
    other["spec"]["podCIDR"] = OTHER[0].into();
    let to = SocketAddr::new(world.pod_address(index, true)?, 80);
    let pulse = Pulse::start(world.pod(0), to)?;
    is_answered(&pulse).context("before")?;
    let left = Instant::now();
    nodes.delete(name)?;
    is_silent(&pulse).context("the node has left")?;
    let joined = Instant::now();
    nodes.join(&own)?;
    is_answered(&pulse).context("the node has joined")?;
    let beats = pulse.stop()?;
    let (before, after): (Vec<_>, Vec<_>) = beats.into_iter().partition(|beat| beat.sent < joined);
    times.note("a node leaves", closed_after(&before, left));
    times.note("a node joins", opened_after(&after, joined));

    // Its blocks become others, with no moment in which it is away.
    let pulse = Pulse::start(world.pod(0), to)?;
    is_answered(&pulse)?;
    let changed = Instant::now();
    nodes.delete(name)?;
    nodes.join(&other)?;
    is_silent(&pulse).context("other blocks")?;
    let back = Instant::now();
    nodes.delete(name)?;
    nodes.join(&own)?;
    is_answered(&pulse).context("its own blocks")?;
    let beats = pulse.stop()?;
    let (before, after): (Vec<_>, Vec<_>) = beats.into_iter().partition(|beat| beat.sent < back);
    times.note("blocks go", closed_after(&before, changed));
    times.note("blocks come", opened_after(&after, back));
    Ok(())
}

/// A node on the link has another address: routes to its Pods lead there.
fn address(world: &World, nodes: &Nodes, times: &mut Times) -> Result<()> {
    const MOVED: &str = "172.30.0.77";
    let node2 = &world.cluster().nodes()[1];
    let add = || ip(&format!("address replace {MOVED}/24 dev eth0"));
    node2.netns.enter(add)??;
    let old = world.node_address(1, true)?.to_string();
    for (from, to) in [(old.as_str(), MOVED), (MOVED, old.as_str())] {
        let changed = Instant::now();
        let mut node = nodes.get("node2")?;
        // Whatever version it has by then: its kubelet writes too.
        node["metadata"]["resourceVersion"] = Value::Null;
        for address in node["status"]["addresses"]
            .as_array_mut()
            .into_iter()
            .flatten()
        {
            if address["address"] == from {
                address["address"] = to.into();
            }
        }
        nodes.ask("PUT", "/node2/status", Some(&node))?;
        let routes = || ip("-4 route show proto 72");
        eventually(WAIT, || {
            let routes = world.cluster().nodes()[0].netns.enter(routes)??;
            let line = routes.lines().find(|line| line.contains("10.244.1.0/24"));
            ensure!(
                line.is_some_and(|line| line.contains(&format!("via {to} "))),
                "{line:?}"
            );
            Ok(())
        })?;
        times.note("an address changes", Some(changed.elapsed()));
    }
    node2
        .netns
        .enter(|| ip(&format!("address del {MOVED}/24 dev eth0")))??;
    Ok(())
}

/// Nodes that leave, join and change are followed within a second, on the link and behind the tunnel.
pub(crate) fn within_a_second(world: &World) -> Result<()> {
    let nodes = Nodes(Client::new(world.cluster(), User::Admin)?);
    let mut times = Times(Vec::new());
    for _ in 0..ROUNDS {
        for index in [1, 2] {
            node(world, &nodes, index, &mut times).context(crate::world::NODES[index])?;
        }
        address(world, &nodes, &mut times).context("an address")?;
    }
    println!("followed: {:?}", times.0);
    times.check()
}
