//! Pods on three nodes, on the networks that clusters have: one link, two links with a router between,
//! and a network that routes Pods.

#![cfg(test)]

mod traffic;
mod world;

use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use hachi_cluster::Network;
use world::World;

/// One cluster at a time: their traffic would disturb each other's.
static ONE: Mutex<()> = Mutex::new(());

fn matrix(name: &str, network: Network, agent: &[&str]) {
    let _one_by_one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let test = || -> Result<()> {
        let world = World::start(name, network, agent)?;
        for v4 in [true, false] {
            world.matrix(v4)?;
        }
        Ok(())
    };
    if let Err(error) = test() {
        panic!("{error:#}");
    }
}

macro_rules! networks {
    ($($name:ident: $network:expr, $agent:expr;)*) => {$(
        #[test]
        fn $name() {
            hachi_testutil::require_root!();
            hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
            matrix(&stringify!($name).replace('_', "-"), $network, &$agent);
        }
    )*};
}

networks! {
    one_link: Network::Link, [];
    two_links: Network::Routed, [];
    tunnels_alone: Network::Link, ["--routing=vxlan"];
    routed_pods: Network::Native, [];
}
