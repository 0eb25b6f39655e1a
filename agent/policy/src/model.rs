//! Domain types of policies. Whatever is in them is valid: what an object says that makes no sense
//! was left out (a peer or port that matches nothing) or widened (a subject) at the boundary.

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::{
    SmallSet,
    labels::{Labels, Selector},
};

/// Transport protocols that a policy or a Service can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP, the default.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Reads the API's spelling; absent is TCP.
    #[must_use]
    pub fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }

    /// The IANA protocol number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A port that a Pod's container names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerPort {
    /// Name.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Number.
    pub port: u16,
}

/// Everything by which a policy can tell one Pod from another, its addresses apart. Pods that are
/// the same to every possible selector share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodIdentity {
    /// Namespace.
    pub namespace: Arc<str>,
    /// The namespace's labels; `None` while the namespace is not known, and then no namespace
    /// selector matches.
    pub namespace_labels: Option<Arc<Labels>>,
    /// The Pod's labels.
    pub labels: Arc<Labels>,
    /// The Pod's named ports, sorted. Two containers may give one name to different ports.
    pub ports: Arc<[ContainerPort]>,
}

impl PodIdentity {
    /// The ports that the Pod gives this name.
    pub fn resolve(&self, name: &str, protocol: Protocol) -> impl Iterator<Item = u16> {
        self.ports
            .iter()
            .filter(move |p| &*p.name == name && p.protocol == protocol)
            .map(|p| p.port)
    }
}

/// Which API a policy comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyKind {
    /// `networking.k8s.io/v1`.
    NetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha2`.
    ClusterNetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha1`, the predecessor of the tier `Admin`.
    AdminNetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha1`, the predecessor of the tier `Baseline`.
    BaselineAdminNetworkPolicy,
}

impl PolicyKind {
    /// The name as kubectl takes it.
    #[must_use]
    pub const fn resource(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "networkpolicy",
            Self::ClusterNetworkPolicy => "clusternetworkpolicy",
            Self::AdminNetworkPolicy => "adminnetworkpolicy",
            Self::BaselineAdminNetworkPolicy => "baselineadminnetworkpolicy",
        }
    }
}

/// Names a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyId {
    /// The API that it comes from.
    pub kind: PolicyKind,
    /// Namespace; empty for kinds of the whole cluster.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl PolicyId {
    /// The id of a `NetworkPolicy`.
    #[must_use]
    pub fn network(namespace: &str, name: &str) -> Self {
        Self {
            kind: PolicyKind::NetworkPolicy,
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind.resource();
        if self.namespace.is_empty() {
            write!(f, "{kind} {}", self.name)
        } else {
            write!(f, "{kind} {}/{}", self.namespace, self.name)
        }
    }
}

/// The groups of policies that are asked one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Rules of the cluster that nothing below can override.
    Admin,
    /// `NetworkPolicy` v1.
    Network,
    /// Rules of the cluster for Pods that no `NetworkPolicy` isolates.
    Baseline,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Admin => "Admin",
            Self::Network => "NetworkPolicy",
            Self::Baseline => "Baseline",
        })
    }
}

/// When a policy is asked: its tier, then its priority, the lowest first. Of equals the id decides,
/// which the API leaves to the implementation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rank {
    /// Tier.
    pub tier: Tier,
    /// 0 to 1000 in `Admin` and `Baseline`; always 0 for `NetworkPolicy`.
    pub priority: u16,
}

impl Rank {
    /// That of every `NetworkPolicy`.
    pub const NETWORK: Self = Self {
        tier: Tier::Network,
        priority: 0,
    };
}

/// Which way traffic goes, seen from the Pod that a policy selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// To the Pod.
    Ingress,
    /// From the Pod.
    Egress,
}

/// Names a rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleRef {
    /// The policy.
    pub policy: PolicyId,
    /// Which of its lists.
    pub direction: Direction,
    /// Position in the list as the object has it, from 0.
    pub index: u32,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        write!(f, "{} {direction}[{}]", self.policy, self.index)
    }
}

/// A policy: to whom it applies, and its rules. A `NetworkPolicy` isolates them besides: what none of
/// its rules accepts is denied. The policies of the other tiers only decide what their rules match.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Policy {
    /// Kind, namespace and name.
    pub id: PolicyId,
    /// When it is asked.
    pub rank: Rank,
    /// The Pods it applies to.
    pub subject: Subject,
    /// Rules for traffic to them; `None` if the policy does not concern this direction.
    pub ingress: Option<Vec<Rule>>,
    /// Rules for traffic from them; `None` if the policy does not concern this direction.
    pub egress: Option<Vec<Rule>>,
}

impl Policy {
    /// The rules of one direction.
    #[must_use]
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }

    /// Names a rule of this policy.
    #[must_use]
    pub fn rule_ref(&self, direction: Direction, index: usize) -> RuleRef {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        RuleRef {
            policy: self.id.clone(),
            direction,
            index,
        }
    }
}

/// The Pods that a policy applies to; never Pods on the host's network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subject {
    /// Their namespaces.
    pub namespaces: Namespaces,
    /// Their labels.
    pub pods: Selector,
}

impl Subject {
    /// Whether the policy applies to the Pod.
    #[must_use]
    pub fn selects(&self, pod: &PodIdentity) -> bool {
        self.namespaces.matches(pod) && self.pods.matches(&pod.labels)
    }
}

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Lets it pass, whatever comes after.
    Accept,
    /// Drops it, whatever comes after.
    Deny,
    /// Leaves it to the next tier.
    Pass,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accept => "Accept",
            Self::Deny => "Deny",
            Self::Pass => "Pass",
        })
    }
}

/// What a policy says of these peers on these ports. The rules of a `NetworkPolicy` all accept.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rule {
    /// What is done with what matches.
    pub action: Action,
    /// The other side: the source of ingress, the destination of egress.
    pub peers: Peers,
    /// The destination's ports.
    pub ports: Ports,
}

/// The other side of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peers {
    /// Whoever it is.
    Any,
    /// One of these; with none in the list, nobody.
    Listed(Arc<SmallSet<Peer>>),
}

/// A way to name addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// Pods by labels; never Pods on the host's network.
    Pods {
        /// Their namespaces.
        namespaces: Namespaces,
        /// Their labels.
        pods: Selector,
    },
    /// Any address, a Pod's too, by number.
    Block(IpBlock),
}

impl Peer {
    /// Whether the address, which belongs to the Pod if one is given, is meant.
    #[must_use]
    pub fn matches(&self, address: IpAddr, pod: Option<&PodIdentity>) -> bool {
        match self {
            Self::Pods { .. } => pod.is_some_and(|pod| self.matches_pod(pod)),
            Self::Block(block) => block.contains(address),
        }
    }

    /// Whether the Pod is meant by its labels.
    #[must_use]
    pub fn matches_pod(&self, pod: &PodIdentity) -> bool {
        match self {
            Self::Pods { namespaces, pods } => namespaces.matches(pod) && pods.matches(&pod.labels),
            Self::Block(_) => false,
        }
    }
}

/// Which namespaces a peer's Pods are in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Namespaces {
    /// This one.
    Named(Arc<str>),
    /// Those with such labels.
    Selected(Selector),
}

impl Namespaces {
    fn matches(&self, pod: &PodIdentity) -> bool {
        match self {
            Self::Named(name) => *name == pod.namespace,
            Self::Selected(selector) => pod
                .namespace_labels
                .as_ref()
                .is_some_and(|labels| selector.matches(labels)),
        }
    }
}

/// A block of addresses with holes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IpBlock {
    cidr: IpNet,
    except: SmallSet<IpNet>,
}

/// Why an address block means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBlock {
    /// An exception that is not a part of the block.
    #[error("exception {0} is not inside {1}: make it a smaller block of the same family")]
    Outside(IpNet, IpNet),
    /// An IPv4 address in IPv6 clothes, which no packet carries.
    #[error("{0} is an IPv4-mapped block: write it as IPv4")]
    Mapped(IpNet),
}

impl IpBlock {
    /// A block without the exceptions. Bits beyond the prefix are ignored, as the API server does.
    ///
    /// # Errors
    /// When an exception is not a proper part of the block, or the block is IPv4-mapped.
    pub fn new(cidr: IpNet, except: impl IntoIterator<Item = IpNet>) -> Result<Self, InvalidBlock> {
        let cidr = cidr.trunc();
        if let IpNet::V6(v6) = cidr
            && v6.prefix_len() >= 96
            && v6.network().to_ipv4_mapped().is_some()
        {
            return Err(InvalidBlock::Mapped(cidr));
        }
        let mut holes = Vec::new();
        for hole in except {
            let hole = hole.trunc();
            if !cidr.contains(&hole) || cidr == hole {
                return Err(InvalidBlock::Outside(hole, cidr));
            }
            holes.push(hole);
        }
        Ok(Self {
            cidr,
            except: holes.into_iter().collect(),
        })
    }

    /// The block.
    #[must_use]
    pub const fn cidr(&self) -> IpNet {
        self.cidr
    }

    /// The holes in it, sorted.
    pub fn except(&self) -> impl Iterator<Item = IpNet> {
        self.except.iter().copied()
    }

    /// Whether the address is in the block and in none of its holes.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.cidr.contains(&address) && !self.except.iter().any(|hole| hole.contains(&address))
    }
}

/// The destination ports of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ports {
    /// Every port of every protocol, and protocols without ports.
    Any,
    /// One of these; with none in the list, nothing.
    Listed(SmallSet<PortMatch>),
}

/// A protocol and which of its ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortMatch {
    /// Protocol.
    pub protocol: Protocol,
    /// Ports.
    pub port: PortSpec,
}

/// Ports of one protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortSpec {
    /// All of them.
    Any,
    /// From the first to the second, both included.
    Range(u16, u16),
    /// Those to which the destination Pod gives this name.
    Named(Arc<str>),
}

impl PortMatch {
    /// Whether the destination port is meant.
    #[must_use]
    pub fn matches(&self, protocol: u8, port: u16, destination: Option<&PodIdentity>) -> bool {
        protocol == self.protocol.number()
            && match &self.port {
                PortSpec::Any => true,
                PortSpec::Range(first, last) => (*first..=*last).contains(&port),
                PortSpec::Named(name) => destination
                    .is_some_and(|pod| pod.resolve(name, self.protocol).any(|p| p == port)),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(cidr: &str, except: &[&str]) -> Result<IpBlock, InvalidBlock> {
        IpBlock::new(
            cidr.parse().unwrap(),
            except.iter().map(|e| e.parse().unwrap()),
        )
    }

    #[test]
    fn exceptions_are_holes() {
        let b = block("10.0.0.0/8", &["10.1.0.0/16", "10.1.2.0/24"]).unwrap();
        for (address, inside) in [
            ("10.0.0.1", true),
            ("10.1.2.3", false),
            ("10.1.9.9", false),
            ("11.0.0.1", false),
        ] {
            assert_eq!(b.contains(address.parse().unwrap()), inside, "{address}");
        }
        assert!(!b.contains("::1".parse().unwrap()));
    }

    #[test]
    fn host_bits_are_ignored() {
        assert_eq!(block("10.1.2.3/8", &[]), block("10.0.0.0/8", &[]));
    }

    #[test]
    fn exceptions_must_be_proper_parts() {
        for (cidr, hole) in [
            ("10.0.0.0/8", "11.0.0.0/16"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.0/16", "10.0.0.0/8"),
            ("10.0.0.0/8", "fd00::/64"),
        ] {
            assert!(
                matches!(block(cidr, &[hole]), Err(InvalidBlock::Outside(..))),
                "{hole}"
            );
        }
        assert!(matches!(
            block("::ffff:10.0.0.0/104", &[]),
            Err(InvalidBlock::Mapped(_))
        ));
    }

    #[test]
    fn a_name_may_stand_for_several_ports() {
        let port = |name: &str, protocol, port| ContainerPort {
            name: name.into(),
            protocol,
            port,
        };
        let pod = PodIdentity {
            namespace: "a".into(),
            namespace_labels: None,
            labels: Arc::default(),
            ports: [
                port("web", Protocol::Tcp, 80),
                port("web", Protocol::Tcp, 81),
                port("web", Protocol::Udp, 82),
            ]
            .into(),
        };
        let named = PortMatch {
            protocol: Protocol::Tcp,
            port: PortSpec::Named("web".into()),
        };
        assert!(named.matches(6, 80, Some(&pod)) && named.matches(6, 81, Some(&pod)));
        assert!(!named.matches(6, 82, Some(&pod)), "the name is UDP's there");
        assert!(
            !named.matches(6, 80, None),
            "an address without a Pod names nothing"
        );
    }
}
