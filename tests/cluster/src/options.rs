//! What a cluster is made of, and the addresses of its parts.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use anyhow::{Result, bail};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The largest number of nodes; their addresses end in 11 to 210.
const MAX_NODES: usize = 200;

/// The conflist that Hachi ships.
pub const CONFLIST: &str = include_str!("../../../manifests/base/10-hachi.conflist");

/// Address families of nodes, Pods and Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both, IPv4 first.
    Dual,
}

impl Family {
    /// Whether addresses of the family of `ip` are in use.
    #[must_use]
    pub fn has(self, ip: IpAddr) -> bool {
        match self {
            Self::V4 => ip.is_ipv4(),
            Self::V6 => ip.is_ipv6(),
            Self::Dual => true,
        }
    }

    fn choose(self, v4: IpAddr, v6: IpAddr) -> Vec<IpAddr> {
        [v4, v6].into_iter().filter(|ip| self.has(*ip)).collect()
    }

    /// The addresses of the bridge, which is also the nodes' gateway.
    #[must_use]
    pub fn fabric(self) -> Vec<IpAddr> {
        self.choose(
            Ipv4Addr::new(172, 30, 0, 1).into(),
            Ipv6Addr::new(0xfd68, 0x6163, 0x6869, 0, 0, 0, 0, 1).into(),
        )
    }

    /// The addresses of the node with that index, counted from 1.
    #[must_use]
    pub fn node(self, index: u8) -> Vec<IpAddr> {
        let last = 10 + index;
        self.choose(
            Ipv4Addr::new(172, 30, 0, last).into(),
            Ipv6Addr::new(0xfd68, 0x6163, 0x6869, 0, 0, 0, 0, last.into()).into(),
        )
    }

    /// The ranges that nodes' podCIDRs are cut from.
    #[must_use]
    pub fn cluster_cidrs(self) -> Vec<IpNet> {
        self.filter(["10.244.0.0/16", "fd00:10:244::/48"])
    }

    /// The blocks of the Pods of the node with that index, counted from 0.
    #[must_use]
    pub fn node_cidrs(self, index: usize) -> Vec<IpNet> {
        let cut = |net: &IpNet| {
            let length = if net.addr().is_ipv4() { 24 } else { 64 };
            net.subnets(length).ok()?.nth(index)
        };
        self.cluster_cidrs().iter().filter_map(cut).collect()
    }

    /// The ranges of ClusterIPs.
    #[must_use]
    pub fn service_cidrs(self) -> Vec<IpNet> {
        self.filter(["10.96.0.0/16", "fd00:10:96::/112"])
    }

    fn filter(self, nets: [&str; 2]) -> Vec<IpNet> {
        nets.iter()
            .filter_map(|net| net.parse::<IpNet>().ok())
            .filter(|net| self.has(net.addr()))
            .collect()
    }
}

/// The network that joins the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Network {
    /// One link; what is on it knows no Pod.
    #[default]
    Link,
    /// Two links with a router between: the last node is alone on the second. The router knows no Pod.
    Routed,
    /// One link, and a router that knows the way to Pods. Nodes are told to leave it to that.
    Native,
}

/// The addresses of the router on the second link.
#[must_use]
pub fn far_fabric(family: Family) -> Vec<IpAddr> {
    family.fabric().into_iter().map(far).collect()
}

/// An address of the first link as one of the second.
fn far(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, _, d] = ip.octets();
            Ipv4Addr::new(a, b, 1, d).into()
        }
        IpAddr::V6(ip) => {
            let mut words = ip.segments();
            words[3] = 1;
            Ipv6Addr::from(words).into()
        }
    }
}

/// The length of the prefix that nodes' addresses share.
#[must_use]
pub fn prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 24 } else { 64 }
}

/// Who runs the Pods of the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kubelets {
    /// This process, which plays the kubelet and the runtime of every node.
    #[default]
    Played,
    /// A kubelet and a containerd on every node, with the real API and its controllers. Nothing of
    /// Hachi is installed: that is the DaemonSet's work.
    Real,
}

/// The API server of the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Server {
    /// The real etcd and kube-apiserver where the machine has them, otherwise the double.
    #[default]
    Machine,
    /// The double, whatever the machine has.
    Double,
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where everything of the cluster is kept.
    pub dir: PathBuf,
    /// The directory of the finished binaries: every file in it named `hachi-cni` or listed in
    /// `plugins` is installed on the nodes; `hachi-agent` runs there.
    pub dist: PathBuf,
    /// How many nodes.
    pub nodes: usize,
    /// Address families.
    pub family: Family,
    /// The CNI configuration list of the nodes.
    pub conflist: String,
    /// Plugins to install besides those that the conflist names.
    pub plugins: Vec<PathBuf>,
    /// The network that joins the nodes.
    pub network: Network,
    /// MTU of the nodes' uplinks, bytes.
    pub uplink_mtu: u32,
    /// Options of every agent, besides those that it needs.
    pub agent_options: Vec<String>,
    /// Who runs the Pods.
    pub kubelets: Kubelets,
    /// The API server.
    pub server: Server,
    /// Whether agents run; without them the plugin has to do alone.
    pub agents: bool,
    /// Whether an agent that ends is started again, as a DaemonSet does.
    pub revive: bool,
    /// Whether the whole directory goes with the cluster; otherwise logs stay.
    pub remove_dir: bool,
}

impl Options {
    /// Two nodes with agents, of one family.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, dist: impl Into<PathBuf>, family: Family) -> Self {
        Self {
            dir: dir.into(),
            dist: dist.into(),
            nodes: 2,
            family,
            conflist: CONFLIST.to_owned(),
            plugins: Vec::new(),
            network: Network::Link,
            uplink_mtu: 1500,
            agent_options: Vec::new(),
            kubelets: Kubelets::Played,
            server: Server::Machine,
            agents: true,
            revive: false,
            remove_dir: false,
        }
    }

    /// Whether the machine has the real etcd and kube-apiserver.
    #[must_use]
    pub fn has_real_server() -> bool {
        crate::api::has_real()
    }

    /// Whether the node with that index, counted from 1, is behind the router.
    #[must_use]
    pub fn is_far(&self, index: u8) -> bool {
        self.network == Network::Routed && usize::from(index) == self.nodes
    }

    /// The addresses of the node with that index, counted from 1.
    #[must_use]
    pub fn node(&self, index: u8) -> Vec<IpAddr> {
        let near = self.family.node(index);
        if self.is_far(index) {
            near.into_iter().map(far).collect()
        } else {
            near
        }
    }

    /// Refuses what cannot be started.
    pub fn check(&self) -> Result<()> {
        if self.nodes == 0 || self.nodes > MAX_NODES {
            bail!("a cluster has 1 to {MAX_NODES} nodes, not {}", self.nodes);
        }
        if self.agents && !self.dist.join("hachi-agent").is_file() {
            bail!(
                "no hachi-agent in {}; build it first: cargo xtask build",
                self.dist.display()
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_choose_addresses() {
        assert_eq!(
            Family::V4.node(1),
            ["172.30.0.11".parse::<IpAddr>().unwrap()]
        );
        assert_eq!(
            Family::V6.node(2),
            ["fd68:6163:6869::c".parse::<IpAddr>().unwrap()]
        );
        assert_eq!(Family::Dual.node(1).len(), 2);
        let blocks: Vec<_> = Family::Dual
            .node_cidrs(1)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(blocks, ["10.244.1.0/24", "fd00:10:244:1::/64"]);
        assert_eq!(
            Family::V6.service_cidrs(),
            ["fd00:10:96::/112".parse::<IpNet>().unwrap()]
        );
    }

    #[test]
    fn the_shipped_conflist_names_our_plugin() {
        let list: serde_json::Value = serde_json::from_str(CONFLIST).unwrap();
        assert_eq!(list["plugins"][0]["type"], "hachi-cni");
    }
}
