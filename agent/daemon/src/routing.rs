//! How each other node's Pods are reached: by a route where the two share a link, through a tunnel
//! where they do not.
//!
//! ```text
//! --routing   the other node is on-link      it is behind a router
//! auto        route                          tunnel
//! direct      route                          route (refused by the kernel, unless it is on-link after all)
//! vxlan       tunnel                         tunnel
//! native      nothing: the network routes Pods
//! ```
//! It is decided for a pair of nodes as a whole: what goes through the tunnel must come back through
//! it, because a Pod's address that comes by the network from there counts as forged.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use hachi_abi::{Tunnel, TunnelFlags};
use hachi_index::{Desired, Node};
use hachi_net::{NextHop, gateway_of};
use ipnet::IpNet;

use crate::options::Routing;

/// The least MTU of a link with IPv6, bytes (RFC 8200). Tunnel packets that are too long for the uplink
/// then go in fragments.
const LEAST_V6: u32 = 1_280;

/// What VXLAN adds to a packet, bytes: an Ethernet header, its own, UDP's, and IP's.
const OVERHEAD_V4: u32 = 14 + 8 + 8 + 20;
const OVERHEAD_V6: u32 = 14 + 8 + 8 + 40;

/// How other nodes are reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Blocks of nodes on a shared link, with the node's address.
    pub(crate) direct: BTreeMap<IpNet, IpAddr>,
    /// Blocks of Pods behind the tunnel.
    pub(crate) tunneled: BTreeSet<IpNet>,
    /// What the datapath has to know of whose addresses are where; empty without tunnels.
    pub(crate) tunnels: BTreeMap<IpNet, Tunnel>,
    /// Whether the node needs a VXLAN device.
    pub(crate) needs_device: bool,
    /// What the tunnels add to a packet at most, bytes.
    overhead: u32,
    /// Whether there are Pods with IPv6 addresses.
    v6: bool,
    /// What cannot be reached, and why.
    pub(crate) problems: Vec<String>,
}

impl Plan {
    /// Decides. `on_link`: the addresses of other nodes that no router is before.
    pub(crate) fn of(mode: Routing, desired: &Desired, on_link: &BTreeSet<IpAddr>) -> Self {
        let mut plan = Self {
            v6: desired.pod_cidrs().iter().any(|cidr| cidr.addr().is_ipv6()),
            ..Self::default()
        };
        if mode == Routing::Native {
            return plan;
        }
        let own = desired.own_node().map(ends).unwrap_or_default();
        let mut nodes = Vec::new();
        for (name, node) in desired.other_nodes() {
            let near = node.pod_cidrs.iter().all(|cidr| {
                address_of(node, cidr).is_some_and(|address| on_link.contains(&address))
            });
            let sends = match mode {
                Routing::Vxlan => true,
                Routing::Auto => !near,
                Routing::Direct | Routing::Native => false,
            };
            if !sends {
                plan.route(name, node);
            }
            nodes.push((name, node, sends));
        }
        plan.needs_device = mode == Routing::Vxlan || nodes.iter().any(|(.., sends)| *sends);
        if plan.needs_device {
            for (name, node, sends) in nodes {
                plan.tunnel(name, node, sends, &own);
            }
            let local = Tunnel {
                remote: [0; 16],
                flags: TunnelFlags::LOCAL,
            };
            let own = desired.pod_cidrs();
            plan.tunnels
                .extend(own.into_iter().map(|cidr| (cidr, local)));
        }
        plan
    }

    fn route(&mut self, name: &str, node: &Node) {
        for cidr in &node.pod_cidrs {
            match address_of(node, cidr) {
                Some(address) => drop(self.direct.insert(*cidr, address)),
                None => self.problems.push(format!(
                    "Node {name} has Pods in {cidr} but no InternalIP of that family: they cannot be \
                     reached without a tunnel (--routing=auto)"
                )),
            }
        }
    }

    fn tunnel(&mut self, name: &str, node: &Node, sends: bool, own: &[IpAddr]) {
        let usable = |end: &&IpAddr| own.iter().any(|own| own.is_ipv4() == end.is_ipv4());
        let ends = ends(node);
        let Some(remote) = ends.iter().find(usable) else {
            if sends && !node.pod_cidrs.is_empty() {
                self.problems.push(format!(
                    "Node {name} has no address of a family that this node has one of: no tunnel \
                     leads there"
                ));
            }
            return;
        };
        let mut tunnel = Tunnel::default();
        match remote {
            IpAddr::V4(address) => {
                tunnel.remote[..4].copy_from_slice(&address.octets());
            }
            IpAddr::V6(address) => {
                tunnel.remote = address.octets();
                tunnel.flags |= TunnelFlags::V6;
            }
        }
        if sends {
            tunnel.flags |= TunnelFlags::SEND;
            let overhead = if remote.is_ipv4() {
                OVERHEAD_V4
            } else {
                OVERHEAD_V6
            };
            self.overhead = self.overhead.max(overhead);
            self.tunneled.extend(&node.pod_cidrs);
        }
        let blocks = node.pod_cidrs.iter().copied();
        self.tunnels.extend(blocks.map(|cidr| (cidr, tunnel)));
        let itself = Tunnel {
            flags: tunnel.flags | TunnelFlags::NODE,
            ..tunnel
        };
        let addresses = node.internal_ips.iter().chain(&node.tunnel_address);
        self.tunnels
            .extend(addresses.map(|address| (IpNet::from(*address), itself)));
    }

    /// The routes to write. `device`: the VXLAN device; `own`: this node's addresses.
    pub(crate) fn routes(&self, device: Option<u32>, own: &[IpAddr]) -> BTreeMap<IpNet, NextHop> {
        let direct = self.direct.iter();
        let mut routes: BTreeMap<_, _> = direct
            .map(|(cidr, address)| (*cidr, NextHop::via(*address)))
            .collect();
        for cidr in &self.tunneled {
            let v4 = cidr.addr().is_ipv4();
            let hop = NextHop {
                // Nobody has the address, and nobody is asked for it: the device resolves nothing.
                gateway: gateway_of(cidr.addr()),
                device,
                source: own.iter().copied().find(|own| own.is_ipv4() == v4),
            };
            if device.is_some() {
                routes.insert(*cidr, hop);
            }
        }
        routes
    }

    /// What is wrong with an uplink of that MTU, if anything: the kernel cuts tunnel packets up over IPv4,
    /// but not over IPv6 (RFC 8200 has no router do it, and `ip6_fragment` takes the node for one).
    pub(crate) fn too_short(&self, uplink: u32) -> Option<String> {
        let needed = LEAST_V6 + OVERHEAD_V6;
        let short = self.v6 && self.overhead == OVERHEAD_V6 && uplink < needed;
        short.then(|| {
            format!(
                "the uplink's MTU of {uplink} is too small for IPv6 in tunnels over IPv6: packets of more \
                 than {} bytes are lost; raise it to {needed}, or give the nodes IPv4 addresses",
                uplink.saturating_sub(OVERHEAD_V6)
            )
        })
    }

    /// The MTU of Pods whose packets leave by an uplink of that MTU.
    pub(crate) fn mtu(&self, uplink: u32) -> u32 {
        let mtu = uplink.saturating_sub(self.overhead);
        if self.v6 && self.overhead > 0 {
            mtu.max(LEAST_V6.min(uplink))
        } else {
            mtu
        }
    }
}

/// The node's address of the family of one of its blocks.
fn address_of(node: &Node, cidr: &IpNet) -> Option<IpAddr> {
    let v4 = cidr.addr().is_ipv4();
    let mut addresses = node.internal_ips.iter().copied();
    addresses.find(|address| address.is_ipv4() == v4)
}

/// Where tunnels to a node may lead, the best first.
fn ends(node: &Node) -> Vec<IpAddr> {
    match node.tunnel_address {
        Some(address) => vec![address],
        None => node.internal_ips.clone(),
    }
}

#[cfg(test)]
mod tests;
