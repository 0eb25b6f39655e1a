//! How long a node's change takes until it is in force on the others: measured by a packet every
//! millisecond, from the moment at which the API has the change.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use hachi_apiserver::{Store, resource::NODES};
use hachi_cluster::{
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

/// Other blocks than nodes have.
const OTHER: [&str; 2] = ["10.244.88.0/24", "fd00:10:244:88::/64"];

/// What happened, and how long it took each time.
struct Times(Vec<(&'static str, Duration)>);

impl Times {
    fn note(&mut self, what: &'static str, took: Option<Duration>) -> Result<()> {
        let took = took.with_context(|| format!("{what}: it is not followed at all"))?;
        self.0.push((what, took));
        Ok(())
    }

    fn check(&self) -> Result<()> {
        for (what, _) in &self.0 {
            let all = || self.0.iter().filter(|(other, _)| other == what);
            let all: Vec<Duration> = all().map(|(_, took)| *took).collect();
            let best = all.iter().min().context("no time")?;
            ensure!(*best <= LIMIT, "{what}: {all:?}");
        }
        Ok(())
    }
}

/// Waits until the pulse is answered, or is not.
fn settle(pulse: &Pulse, answered: bool) -> Result<()> {
    // Silence may be a busy machine's.
    let listen = Duration::from_millis(if answered { 50 } else { 200 });
    eventually(WAIT, || {
        let before = pulse.answered();
        thread::sleep(listen);
        ensure!(
            (pulse.answered() > before) == answered,
            "it stays as it was"
        );
        Ok(())
    })
}

/// A copy of an object that can be created again.
fn fresh(store: &Store, node: &str) -> Result<Value> {
    let object = store.get(NODES, "", node)?;
    let mut object: Value = serde_json::from_slice(&object.json())?;
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

fn join(store: &Store, node: &Value) -> Result<()> {
    store.create(NODES, node.clone())?;
    store.update_status(NODES, node.clone())?;
    Ok(())
}

/// A node leaves, joins with other blocks, and joins with its own again.
fn node(world: &World, store: &Store, index: usize, times: &mut Times) -> Result<()> {
    let name = crate::world::NODES[index];
    let own = fresh(store, name)?;
    let mut other = own.clone();
    other["spec"]["podCIDRs"] = OTHER.into();
    other["spec"]["podCIDR"] = OTHER[0].into();
    let to = SocketAddr::new(world.pod_address(index, true)?, 80);
    let pulse = Pulse::start(world.pod(0), to)?;
    settle(&pulse, true).context("before")?;
    let left = Instant::now();
    store.delete(NODES, "", name, None)?;
    settle(&pulse, false).context("the node has left")?;
    let joined = Instant::now();
    join(store, &own)?;
    settle(&pulse, true).context("the node has joined")?;
    let beats = pulse.stop()?;
    let (before, after): (Vec<_>, Vec<_>) = beats.into_iter().partition(|beat| beat.sent < joined);
    times.note("a node leaves", closed_after(&before, left))?;
    times.note("a node joins", opened_after(&after, joined))?;

    // Its blocks become others, with no moment in which it is away.
    let pulse = Pulse::start(world.pod(0), to)?;
    settle(&pulse, true)?;
    let changed = Instant::now();
    store.delete(NODES, "", name, None)?;
    join(store, &other)?;
    settle(&pulse, false).context("other blocks")?;
    let back = Instant::now();
    store.delete(NODES, "", name, None)?;
    join(store, &own)?;
    settle(&pulse, true).context("its own blocks")?;
    let beats = pulse.stop()?;
    let (before, after): (Vec<_>, Vec<_>) = beats.into_iter().partition(|beat| beat.sent < back);
    times.note("blocks go", closed_after(&before, changed))?;
    times.note("blocks come", opened_after(&after, back))
}

/// A node on the link has another address: routes to its Pods lead there.
fn address(world: &World, store: &Store, times: &mut Times) -> Result<()> {
    const MOVED: &str = "172.30.0.77";
    let node2 = &world.cluster().nodes()[1];
    let add = || ip(&format!("address replace {MOVED}/24 dev eth0"));
    node2.netns.enter(add)??;
    let old = world.node_address(1, true)?.to_string();
    for (from, to) in [(old.as_str(), MOVED), (MOVED, old.as_str())] {
        let changed = Instant::now();
        store.modify_status(NODES, "", "node2", |node| {
            for address in node["status"]["addresses"]
                .as_array_mut()
                .into_iter()
                .flatten()
            {
                if address["address"] == from {
                    address["address"] = to.into();
                }
            }
        })?;
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
        times.note("an address changes", Some(changed.elapsed()))?;
    }
    node2
        .netns
        .enter(|| ip(&format!("address del {MOVED}/24 dev eth0")))??;
    Ok(())
}

/// Nodes that leave, join and change are followed within a second, on the link and behind the tunnel.
pub(crate) fn within_a_second(world: &World) -> Result<()> {
    let Some(store) = world.cluster().store() else {
        // The real API takes its own time.
        return Ok(());
    };
    let mut times = Times(Vec::new());
    for _ in 0..ROUNDS {
        for index in [1, 2] {
            node(world, store, index, &mut times).context(crate::world::NODES[index])?;
        }
        address(world, store, &mut times).context("an address")?;
    }
    println!("followed: {:?}", times.0);
    times.check()
}
