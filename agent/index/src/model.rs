//! The desired state of one node, as plain data.

mod service;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use hachi_policy::{PodIdentity, Policy, Protocol};
use ipnet::IpNet;

pub use service::{HealthCheck, Service, ServicePort};

use crate::shards::Shards;

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl Name {
    /// Both parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Everything that the maps and routes of this node are made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The name of this node.
    pub node_name: String,
    /// Every node, this one too, by name.
    pub nodes: BTreeMap<Arc<str>, Arc<Node>>,
    /// Addresses of this node's own interfaces that no Pod has.
    pub local_addresses: BTreeSet<IpAddr>,
    /// The Pods of this node.
    pub endpoints: BTreeMap<EndpointKey, DesiredEndpoint>,
    /// The Pods of all nodes by address, as policies see them.
    pub peers: BTreeMap<IpAddr, Arc<PodIdentity>>,
    /// Services that this node serves; and `hostPort`s of its Pods, under `pod/` and the Pod's name,
    /// which no Service can have.
    pub services: Shards<Name, Arc<Service>>,
}

impl Desired {
    /// This node, once the API has told of it.
    #[must_use]
    pub fn own_node(&self) -> Option<&Node> {
        self.nodes.get(self.node_name.as_str()).map(|node| &**node)
    }

    /// This node's blocks of Pod addresses; empty until the API has told of them.
    #[must_use]
    pub fn pod_cidrs(&self) -> Vec<IpNet> {
        self.own_node()
            .map(|node| node.pod_cidrs.clone())
            .unwrap_or_default()
    }

    /// The other nodes, whose Pods need routes.
    pub fn other_nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes
            .iter()
            .map(|(name, node)| (&**name, &**node))
            .filter(|(name, _)| *name != self.node_name)
    }
}

/// A node of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its `InternalIP` addresses, in the order of its status.
    pub internal_ips: Vec<IpAddr>,
    /// Its blocks of Pod addresses.
    pub pod_cidrs: Vec<IpNet>,
    /// Where its end of tunnels is (annotation `hachi.dev/tunnel-address`); one of its `InternalIP`s if
    /// absent.
    pub tunnel_address: Option<IpAddr>,
    /// Its zone (`topology.kubernetes.io/zone`).
    pub zone: Option<Arc<str>>,
    /// Whether it is about to go: deleted, or marked so by the cluster autoscaler.
    pub leaving: bool,
}

/// Names an interface of a Pod, as the CNI does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointKey {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

/// The Pod that an interface was made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID; without one the name decides.
    pub uid: Option<String>,
}

/// An interface of a Pod of this node, as the CNI plugin made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its name.
    pub key: EndpointKey,
    /// Its Pod; `None` if the caller of the plugin was no Kubernetes runtime.
    pub pod: Option<PodName>,
    /// Index of the veth's host side.
    pub ifindex: u32,
    /// MAC address of the Pod's interface.
    pub mac: [u8; 6],
    /// MAC address of the veth's host side.
    pub host_mac: [u8; 6],
    /// The Pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// Ports of this node that lead to it.
    pub host_ports: Vec<HostPort>,
}

/// A port of this node that leads to a port of a Pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// The node's address; every one of the node if absent or unspecified.
    pub address: Option<IpAddr>,
    /// Protocol.
    pub protocol: Protocol,
    /// The node's port.
    pub port: u16,
    /// The Pod's port.
    pub target: u16,
}

/// An endpoint and what applies to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredEndpoint {
    /// The interface.
    pub endpoint: Endpoint,
    /// The addresses that it is known by: its own, without those that a newer interface of this node
    /// has taken over.
    pub addresses: Vec<IpAddr>,
    /// Which policies apply.
    pub enforcement: Enforcement,
}

/// What applies to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enforcement {
    /// Its Pod is not known (yet, or any more), or not enough of it to tell which policies select it:
    /// nothing may pass.
    Quarantined,
    /// It belongs to no Pod, so that no policy can select it.
    Unmanaged,
    /// These policies select its Pod, in the order in which they are asked.
    Pod {
        /// The Pod.
        identity: Arc<PodIdentity>,
        /// The policies.
        policies: Vec<Arc<Policy>>,
    },
}
