//! One node's uplink takes less than the others': what its Pods get follows, and what is too long for
//! it on the way is cut up or told to the sender.
//!
//! On one link that is half a promise. No hop there could tell anybody, so only TCP holds, whose ends
//! say how much they take.

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::eventually;

use crate::{
    changes::{FOLLOWED, OVERHEAD, ip, link_mtu},
    traffic::Path,
    world::{NODES, World},
};

/// Bytes of a stream.
const STREAM: u64 = 2 << 20;

/// What the others' uplinks take, and the one's.
const WIDE: u32 = 1_500;
const SHORT: u32 = 1_400;

/// Gives one node's uplink an MTU, with its port of the fabric and the router's where that is another,
/// and waits until its Pod has followed, and no other.
fn set(world: &World, index: usize, mtu: u32) -> Result<()> {
    let name = NODES[index];
    world.cluster().fabric().enter(|| -> Result<()> {
        ip(&format!("link set {name} mtu {mtu}"))?;
        if index == 2 {
            ip(&format!("link set br1 mtu {mtu}"))?;
        } else {
            // A bridge takes what the least of its ports does, unless told.
            ip(&format!("link set br0 mtu {WIDE}"))?;
        }
        Ok(())
    })??;
    let netns = &world.cluster().nodes()[index].netns;
    netns.enter(|| ip(&format!("link set eth0 mtu {mtu}")))??;
    eventually(FOLLOWED, || {
        for (i, node) in NODES.iter().enumerate() {
            let expected = if i == index { mtu } else { WIDE } - OVERHEAD[0];
            let found = world.pod(i).enter(|| link_mtu("eth0"))??;
            ensure!(
                found == expected,
                "the Pod of {node} has {found}, not {expected}"
            );
        }
        Ok(())
    })
}

/// Streams both ways between the Pods of two nodes on one link, and by a Service.
fn streams(world: &World, v4: bool) -> Result<()> {
    for (i, j) in [(0, 1), (1, 0)] {
        let direct = Path {
            from: world.pod(i),
            to: world.pod(j),
            server: world.pod_address(j, v4)?,
            asked: None,
            seen: Some(world.pod_address(i, v4)?),
        };
        direct.stream(STREAM)?;
        let service = (world.service_address(j, v4)?, 80).into();
        let service = Path {
            asked: Some(service),
            ..direct
        };
        service.stream(STREAM).context("by a Service")?;
    }
    Ok(())
}

/// The node behind the router, and one of two on a link.
pub(crate) fn uplinks(world: &World) -> Result<()> {
    set(world, 2, SHORT)?;
    for v4 in [true, false] {
        let about = || format!("behind a router, IPv{}", if v4 { 4 } else { 6 });
        world.matrix_of(v4, STREAM).with_context(about)?;
        world.node_ports(v4, STREAM).with_context(about)?;
    }
    set(world, 2, WIDE)?;
    set(world, 1, SHORT)?;
    for v4 in [true, false] {
        let about = || format!("on the link, IPv{}", if v4 { 4 } else { 6 });
        streams(world, v4).with_context(about)?;
    }
    set(world, 1, WIDE)
}
