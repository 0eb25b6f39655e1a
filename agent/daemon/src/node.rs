//! The node around the Pods: its addresses, the routes to other nodes' Pods, forwarding, the MTU.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::{Context as _, Result};
use hachi_api::Attachment;
use hachi_index::Desired;
use hachi_net::{
    Changes, Family, HostLink, Netlink, Uplink, connect, enable_forwarding, ensure_routes, uplink,
};
use ipnet::IpNet;
use tracing::{info, warn};

use crate::options::Options;

/// What a link has that tells nothing of itself (RFC 894).
const ETHERNET_MTU: u32 = 1500;

/// The node's own network, as far as the agent sets it up.
pub(crate) struct Node {
    netlink: Netlink,
    changes: Changes,
    mtu: u32,
    problems: Vec<String>,
}

impl Node {
    /// Finds the uplink's MTU.
    pub(crate) fn start(options: &Options) -> Result<Self> {
        let mut netlink = Netlink::open().context("cannot open a netlink socket")?;
        let mtu = match options.mtu {
            Some(mtu) => mtu,
            None => uplink(&mut netlink)
                .context("cannot find the uplink (say --mtu)")?
                .map_or(ETHERNET_MTU, |link| link.mtu),
        };
        info!(mtu, "the MTU of Pods");
        Ok(Self {
            netlink,
            changes: Changes::of(&options.data_dir)?,
            mtu,
            problems: Vec::new(),
        })
    }

    pub(crate) fn mtu(&self) -> u32 {
        self.mtu
    }

    /// What could not be set up.
    pub(crate) fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Addresses of the node's own interfaces, loopback's apart.
    pub(crate) fn local_addresses() -> Result<BTreeSet<IpAddr>> {
        hachi_net::local_addresses().context("cannot list the node's addresses")
    }

    /// Interfaces: index by name.
    pub(crate) fn interfaces(&mut self) -> Result<BTreeMap<String, u32>> {
        let links = self.netlink.links().context("cannot list interfaces")?;
        Ok(links
            .into_iter()
            .map(|link| (link.name, link.index))
            .collect())
    }

    /// Sets an interface down: nothing passes it in either direction.
    pub(crate) fn set_down(&mut self, ifindex: u32, ifname: &str) -> Result<()> {
        Ok(self.netlink.set_down(ifindex, ifname)?)
    }

    /// Brings a Pod's interface up, with the routes and neighbours that it lost when it went down.
    pub(crate) fn connect(&mut self, attachment: &Attachment) -> Result<()> {
        let pod_mac = attachment.mac.parse().context("its record's MAC address")?;
        let link = HostLink {
            index: attachment.host_ifindex,
            name: &attachment.host_ifname,
            pod_mac,
            addresses: &attachment.addresses,
        };
        Ok(connect(&mut self.netlink, &link)?)
    }

    /// The devices that lead out of the node, by index. `pods`: those that lead to its Pods.
    pub(crate) fn uplinks(
        &mut self,
        options: &Options,
        desired: &Desired,
        pods: &BTreeSet<u32>,
    ) -> Result<BTreeMap<u32, Uplink>> {
        let nodes = desired
            .other_nodes()
            .flat_map(|(_, node)| node.internal_ips.iter().copied())
            .collect();
        self.netlink
            .uplinks(&options.uplink, &nodes, pods)
            .context("cannot find the uplinks")
    }

    /// Brings routes and forwarding to what the Node objects say. Problems are kept for the status
    /// and tried again at the next call.
    pub(crate) fn sync(&mut self, desired: &Desired) {
        self.problems.clear();
        let families: BTreeSet<bool> = desired
            .pod_cidrs()
            .iter()
            .map(|cidr| cidr.addr().is_ipv4())
            .collect();
        for v4 in families {
            let family = if v4 { Family::V4 } else { Family::V6 };
            match enable_forwarding(family, &self.changes) {
                Ok(false) => {}
                Ok(true) => info!(v4, "the node forwards packets now"),
                Err(error) => self.problem(format!("cannot enable forwarding: {error}")),
            }
        }
        let (wanted, unreachable) = routes(desired);
        for problem in unreachable {
            self.problem(problem);
        }
        match ensure_routes(&mut self.netlink, &wanted) {
            Ok(changes) => {
                if changes.written + changes.deleted > 0 {
                    info!(
                        written = changes.written,
                        deleted = changes.deleted,
                        "routes changed"
                    );
                }
                for error in changes.errors {
                    self.problem(error.to_string());
                }
            }
            Err(error) => self.problem(format!("cannot write routes: {error}")),
        }
    }

    fn problem(&mut self, problem: String) {
        warn!(problem, "the node's network is not complete");
        self.problems.push(problem);
    }
}

/// The block of every other node with the node's address of the same family; and what has none.
fn routes(desired: &Desired) -> (BTreeMap<IpNet, IpAddr>, Vec<String>) {
    let mut wanted = BTreeMap::new();
    let mut unreachable = Vec::new();
    for (name, node) in desired.other_nodes() {
        for cidr in &node.pod_cidrs {
            let v4 = cidr.addr().is_ipv4();
            match node
                .internal_ips
                .iter()
                .find(|address| address.is_ipv4() == v4)
            {
                Some(address) => {
                    wanted.insert(*cidr, *address);
                }
                None => unreachable.push(format!(
                    "Node {name} has Pods in {cidr} but no InternalIP of that family"
                )),
            }
        }
    }
    (wanted, unreachable)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn every_block_of_another_node_gets_its_address_of_the_same_family() {
        let node = |ips: &[&str], cidrs: &[&str]| {
            Arc::new(hachi_index::Node {
                internal_ips: ips
                    .iter()
                    .map(|ip| ip.parse().expect("an address"))
                    .collect(),
                pod_cidrs: cidrs
                    .iter()
                    .map(|cidr| cidr.parse().expect("a block"))
                    .collect(),
                ..hachi_index::Node::default()
            })
        };
        let desired = Desired {
            node_name: "a".into(),
            nodes: BTreeMap::from([
                ("a".into(), node(&["192.0.2.1"], &["10.0.1.0/24"])),
                (
                    "b".into(),
                    node(
                        &["2001:db8::2", "192.0.2.2"],
                        &["10.0.2.0/24", "fd00:2::/64"],
                    ),
                ),
                ("c".into(), node(&["192.0.2.3"], &["fd00:3::/64"])),
            ]),
            ..Desired::default()
        };
        let (wanted, unreachable) = routes(&desired);
        let text: Vec<_> = wanted
            .iter()
            .map(|(to, via)| format!("{to} via {via}"))
            .collect();
        assert_eq!(
            text,
            ["10.0.2.0/24 via 192.0.2.2", "fd00:2::/64 via 2001:db8::2"]
        );
        assert_eq!(unreachable.len(), 1, "{unreachable:?}");
        assert!(unreachable[0].contains("Node c"), "{unreachable:?}");
    }
}
