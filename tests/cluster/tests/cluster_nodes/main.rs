//! Pods on three nodes, on the networks that clusters have: one link, two links with a router between,
//! and a network that routes Pods.

#![cfg(test)]

mod changes;
mod crowd;
mod followed;
mod forged;
mod offloads;
mod paths;
mod traffic;
mod uneven;
mod world;

use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};
use hachi_cluster::{Family, Network};
use world::World;

/// One cluster at a time: their traffic would disturb each other's.
static ONE: Mutex<()> = Mutex::new(());

fn matrix(name: &str, network: Network, family: Family, agent: &[&str]) {
    let _one_by_one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let test = || -> Result<()> {
        let world = World::start(name, network, family, agent)?;
        world.matrices().context("with an MTU of 1500")?;
        // An uplink as short as IPv6 permits, and a jumbo one; the Pods that are there follow.
        let least = if family == Family::V6 && network == Network::Routed {
            // What IPv6 takes in a tunnel over IPv6, which the kernel does not fragment.
            1_350
        } else {
            1_280
        };
        for mtu in [least, 9_000] {
            changes::mtu(&world, mtu).with_context(|| format!("with an MTU of {mtu}"))?;
            world
                .matrices()
                .with_context(|| format!("with an MTU of {mtu}"))?;
        }
        Ok(())
    };
    checked(test);
}

/// Runs a test's body.
fn checked(test: impl FnOnce() -> Result<()>) {
    if let Err(error) = test() {
        panic!("{error:#}");
    }
}

/// What changes around a cluster with tunnels, and who is not let in.
#[test]
fn everything_is_followed_and_nobody_gets_in() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let _one_by_one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    checked(|| {
        let world = World::start("changes", Network::Routed, Family::Dual, &[])?;
        forged::by_tunnel(&world).context("forged tunnel packets")?;
        forged::by_uplink(&world).context("forged addresses")?;
        forged::by_pod(&world).context("tunnel packets of a Pod")?;
        changes::policy(&world).context("policies")?;
        changes::node_port(&world).context("node ports")?;
        changes::agent(&world).context("an agent is killed")?;
        changes::uplink(&world).context("an uplink goes down and up")?;
        changes::block(&world).context("another podCIDR")?;
        changes::leave(&world).context("a node leaves")
    });
}

/// Many connections leave by one address.
#[test]
fn ten_thousand_connections_leave_at_once() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let _one_by_one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    checked(|| {
        let world = World::start("crowd", Network::Link, Family::V4, &[])?;
        crowd::come_and_go(&world)
    });
}

/// A cluster whose Pods meet narrow hops.
fn narrow(name: &str, network: Network, family: Family) {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let _one_by_one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    checked(|| paths::narrow_hops(&World::start(name, network, family, &[])?));
}

#[test]
fn paths_are_discovered_behind_a_router() {
    narrow("narrow", Network::Native, Family::Dual);
}

#[test]
fn paths_are_discovered_with_tunnels() {
    narrow("narrow-tunnels", Network::Routed, Family::Dual);
}

/// Interfaces do more or less for the kernel, and one takes less; and the nodes' changes are followed in
/// time.
#[test]
fn offloads_and_times() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let _one_by_one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    checked(|| {
        let world = World::start("offloads", Network::Routed, Family::Dual, &[])?;
        followed::within_a_second(&world).context("changes of nodes")?;
        world.open_node_ports()?;
        uneven::uplinks(&world).context("a node with a shorter uplink")?;
        offloads::off_and_on(&world)?;
        world.long_streams().context("a GiB")
    });
}

macro_rules! networks {
    ($($name:ident: $network:expr, $family:expr, $agent:expr;)*) => {$(
        #[test]
        fn $name() {
            hachi_testutil::require_root!();
            hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
            matrix(&stringify!($name).replace('_', "-"), $network, $family, &$agent);
        }
    )*};
}

networks! {
    one_link: Network::Link, Family::Dual, [];
    two_links: Network::Routed, Family::Dual, [];
    tunnels_alone: Network::Link, Family::Dual, ["--routing=vxlan"];
    tunnels_over_ipv6: Network::Routed, Family::V6, [];
    routed_pods: Network::Native, Family::Dual, [];
}
