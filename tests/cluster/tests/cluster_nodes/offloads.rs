//! What interfaces do for the kernel, off and on: checksums, and cutting up and joining segments. A
//! checksum that the kernel has yet to complete is changed in another way than a whole one.

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::Netns;

use crate::{
    changes::{ip, run},
    world::{NODES, World},
};

/// Bytes of a stream.
const STREAM: u64 = 2 << 20;

/// The names that `ethtool -k` has, and `ethtool -K` takes, for what is turned off and on.
const FEATURES: [(&str, &str); 6] = [
    ("rx-checksumming", "rx"),
    ("tx-checksumming", "tx"),
    ("scatter-gather", "sg"),
    ("tcp-segmentation-offload", "tso"),
    ("generic-segmentation-offload", "gso"),
    ("generic-receive-offload", "gro"),
];

/// Whether the uplinks do everything, and whether the Pods' interfaces do; else they do nothing.
const SETTINGS: [(bool, bool); 4] = [(true, false), (false, true), (false, false), (true, true)];

/// Turns everything off or on at an interface of the calling thread's namespace.
fn set(interface: &str, on: bool) -> Result<()> {
    let state = if on { "on" } else { "off" };
    let features = FEATURES.map(|(_, short)| format!("{short} {state}"));
    run("ethtool", &format!("-K {interface} {}", features.join(" ")))?;
    let shown = run("ethtool", &format!("-k {interface}"))?;
    for (name, _) in FEATURES {
        let found = shown.lines().find_map(|line| line.strip_prefix(name));
        let found = found.and_then(|rest| rest.strip_prefix(": "));
        ensure!(
            found.is_some_and(|found| found.starts_with(state)),
            "{name} of {interface} is not {state}: {shown}"
        );
    }
    Ok(())
}

/// The ends of veth pairs of a namespace, but for one.
fn veths(netns: &Netns, but: &str) -> Result<Vec<String>> {
    let shown = netns.enter(|| ip("-o link show type veth"))??;
    let names = shown.lines().filter_map(|line| {
        let name = line.split_whitespace().nth(1)?;
        name.split(['@', ':']).next()
    });
    Ok(names
        .filter(|name| *name != but)
        .map(str::to_owned)
        .collect())
}

fn apply(world: &World, uplinks: bool, pods: bool) -> Result<()> {
    let cluster = world.cluster();
    cluster
        .fabric()
        .enter(|| NODES.iter().try_for_each(|name| set(name, uplinks)))??;
    for (i, node) in cluster.nodes().iter().enumerate() {
        let inside = veths(&node.netns, "eth0")?;
        ensure!(!inside.is_empty(), "{} has no Pod", node.name);
        node.netns.enter(|| -> Result<()> {
            set("eth0", uplinks)?;
            set("hachi_vxlan", uplinks)?;
            inside.iter().try_for_each(|name| set(name, pods))
        })??;
        world.pod(i).enter(|| set("eth0", pods))??;
    }
    Ok(())
}

/// Everything arrives as it was sent, whoever completes checksums and cuts up segments.
pub(crate) fn off_and_on(world: &World) -> Result<()> {
    for (uplinks, pods) in SETTINGS {
        let state = |on: bool| if on { "everything" } else { "nothing" };
        let about = || {
            format!(
                "uplinks do {}, Pods' interfaces {}",
                state(uplinks),
                state(pods)
            )
        };
        apply(world, uplinks, pods).with_context(about)?;
        for v4 in [true, false] {
            world.matrix_of(v4, STREAM).with_context(about)?;
            world.node_ports(v4, STREAM).with_context(about)?;
        }
    }
    Ok(())
}
