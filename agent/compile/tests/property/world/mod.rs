//! A small random cluster: what is true of it, as domain types for the oracle (here) and as API objects
//! for the index (`objects`, `policies`). Other crates' tests have it too, by its path.

mod objects;
mod policies;
mod random;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use hachi_policy::{
    ContainerPort, Labels, Namespaces, Party, PodIdentity, Policy, PolicyId, PolicyKind, Protocol,
    Rank, Selector, Side, Subject, Tier, evaluate,
};
use serde_json::Value;

use self::random::{cluster_rules, labels, pod, rules, selector, service};
use crate::{flow::Flow, rng::Rng};

const NAMESPACES: [&str; 3] = ["a", "b", "c"];
const KEYS: [&str; 2] = ["app", "tier"];
const VALUES: [&str; 3] = ["x", "y", "z"];
const PORT_NAMES: [&str; 2] = ["http", "dns"];
const PORTS: [u16; 6] = [1, 53, 80, 81, 8080, 65535];
const BLOCKS: [&str; 10] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.0/28",
    "10.0.0.0/29",
    "10.0.0.4/30",
    "10.0.0.6/32",
    "192.0.2.0/24",
    "::/0",
    "fd00::/16",
    "fd00::/125",
];
/// Addresses that no Pod ever has: the world, this node, another node.
const OTHERS: [&str; 6] = [
    "198.51.100.1",
    "192.0.2.1",
    "192.0.2.2",
    "2001:db8::1",
    "fd00:ffff::1",
    "fd00:ffff::2",
];
const LOCAL: [&str; 2] = ["192.0.2.1", "fd00:ffff::1"];

#[derive(Clone, Debug)]
pub(crate) struct Pod {
    namespace: usize,
    labels: BTreeMap<String, String>,
    ports: BTreeSet<(usize, Protocol, u16)>,
    pub(crate) local: bool,
    host_network: bool,
    finished: bool,
    /// The API has told of it.
    known: bool,
    generation: u32,
}

impl Pod {
    fn is_peer(&self) -> bool {
        self.known && !self.host_network && !self.finished
    }

    /// Whether it has an interface on this node.
    pub(crate) fn has_endpoint(&self) -> bool {
        self.local && !self.host_network
    }
}

#[derive(Clone, Debug)]
pub(crate) struct World {
    /// `None`: the namespace is not known.
    namespaces: Vec<Option<BTreeMap<String, String>>>,
    /// By the last part of its addresses, 1 to 15.
    pub(crate) pods: BTreeMap<u8, Pod>,
    pub(crate) policies: BTreeMap<PolicyId, Policy>,
    /// By number: the Service and its slice.
    services: BTreeMap<usize, [Value; 2]>,
}

pub(crate) fn addresses(host: u8) -> [IpAddr; 2] {
    [
        format!("10.0.0.{host}").parse().unwrap(),
        format!("fd00::{host:x}").parse().unwrap(),
    ]
}

impl World {
    /// Whether the API has told of a policy of the cluster.
    pub(crate) fn has_cluster_policies(&self) -> bool {
        self.policies
            .keys()
            .any(|id| id.kind != PolicyKind::NetworkPolicy)
    }

    fn put_cluster_policy(&mut self, rng: &mut Rng) {
        let id = PolicyId {
            kind: PolicyKind::ClusterNetworkPolicy,
            namespace: "".into(),
            name: format!("c{}", rng.below(4)).into(),
        };
        let policy = Policy {
            id: id.clone(),
            rank: Rank {
                tier: *rng.pick(&[Tier::Admin, Tier::Admin, Tier::Baseline]),
                priority: rng.below(3) as u16,
            },
            subject: Subject {
                namespaces: Namespaces::Selected(selector(rng)),
                pods: if rng.one_in(2) {
                    Selector::everything()
                } else {
                    selector(rng)
                },
            },
            ingress: cluster_rules(rng, false),
            egress: cluster_rules(rng, true),
        };
        self.policies.insert(id, policy);
    }

    pub(crate) fn new(rng: &mut Rng) -> Self {
        let mut world = Self {
            namespaces: NAMESPACES.iter().map(|_| Some(labels(rng))).collect(),
            pods: BTreeMap::new(),
            policies: BTreeMap::new(),
            services: (0..4).map(|n| (n, service(rng, n))).collect(),
        };
        for _ in 0..4 + rng.below(8) {
            world.pods.insert(1 + rng.below(15) as u8, pod(rng));
        }
        for _ in 0..rng.below(7) {
            world.put_policy(rng);
        }
        for _ in 0..rng.below(4) * rng.below(2) {
            world.put_cluster_policy(rng);
        }
        world
    }

    fn put_policy(&mut self, rng: &mut Rng) {
        let namespace: Arc<str> = (*rng.pick(&NAMESPACES)).into();
        let name: Arc<str> = format!("p{}", rng.below(5)).into();
        let id = PolicyId::network(&namespace, &name);
        let kind = rng.below(3);
        let policy = Policy {
            id: id.clone(),
            rank: Rank::NETWORK,
            subject: Subject {
                namespaces: Namespaces::Named(namespace.clone()),
                pods: selector(rng),
            },
            ingress: (kind != 1).then(|| rules(rng, &namespace)),
            egress: (kind != 0).then(|| rules(rng, &namespace)),
        };
        self.policies.insert(id, policy);
    }

    /// Something happens.
    pub(crate) fn change(&mut self, rng: &mut Rng) {
        let host = 1 + rng.below(15) as u8;
        let existing = self
            .pods
            .keys()
            .copied()
            .nth(rng.below(self.pods.len().max(1)));
        match rng.below(12) {
            10 => self.put_cluster_policy(rng),
            0 => drop(self.pods.insert(host, pod(rng))),
            1 if self.pods.len() > 1 => drop(existing.and_then(|host| self.pods.remove(&host))),
            2 | 3 => {
                if let Some(pod) = existing.and_then(|host| self.pods.get_mut(&host)) {
                    pod.labels = labels(rng);
                }
            }
            4 => {
                let at = rng.below(NAMESPACES.len());
                self.namespaces[at] = (!rng.one_in(5)).then(|| labels(rng));
            }
            5 => {
                let id = self
                    .policies
                    .keys()
                    .nth(rng.below(self.policies.len().max(1)))
                    .cloned();
                id.map(|id| self.policies.remove(&id));
            }
            6 => {
                let n = rng.below(6);
                let slices = self.services.get(&n).map(|[_, slice]| slice.clone());
                let mut new = service(rng, n);
                if let Some(slice) = slices.filter(|_| rng.one_in(2)) {
                    new[1] = slice;
                }
                self.services.insert(n, new);
            }
            7 => drop(self.services.remove(&rng.below(6))),
            8 => {
                let n = rng.below(6);
                let [_, slice] = service(rng, n);
                self.services.entry(n).and_modify(|s| s[1] = slice);
            }
            _ => self.put_policy(rng),
        }
    }

    fn identity(&self, pod: &Pod) -> PodIdentity {
        let labels = |l: &BTreeMap<String, String>| Arc::new(l.iter().collect::<Labels>());
        let ports = pod
            .ports
            .iter()
            .map(|(name, protocol, port)| ContainerPort {
                name: PORT_NAMES[*name].into(),
                protocol: *protocol,
                port: *port,
            });
        PodIdentity {
            namespace: NAMESPACES[pod.namespace].into(),
            namespace_labels: self.namespaces[pod.namespace].as_ref().map(labels),
            labels: labels(&pod.labels),
            ports: ports.collect::<BTreeSet<_>>().into_iter().collect(),
        }
    }

    /// The Pods as policies see them.
    pub(crate) fn identities(&self) -> BTreeMap<u8, PodIdentity> {
        let peers = self.pods.iter().filter(|(_, pod)| pod.is_peer());
        peers
            .map(|(host, pod)| (*host, self.identity(pod)))
            .collect()
    }

    /// Every address worth a try.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        let pods = (1..=15).flat_map(addresses);
        pods.chain(OTHERS.iter().map(|a| a.parse().unwrap()))
            .collect()
    }

    pub(crate) fn random_flow(&self, rng: &mut Rng) -> Flow {
        let all = self.addresses();
        loop {
            let (source, destination) = (*rng.pick(&all), *rng.pick(&all));
            let near = |a: IpAddr| host_of(a).is_some_and(|h| self.pods.contains_key(&h));
            if source.is_ipv6() != destination.is_ipv6() || !(near(source) || near(destination)) {
                continue;
            }
            let port = *rng.pick(&PORTS);
            let (protocol, port) = *rng.pick(&[
                (6, port),
                (6, port),
                (17, port),
                (132, port),
                (1, 0),
                (6, 82),
            ]);
            return Flow {
                source,
                destination,
                protocol,
                port,
            };
        }
    }

    pub(crate) fn is_local_node(address: IpAddr) -> bool {
        LOCAL.iter().any(|a| a.parse() == Ok(address))
    }

    pub(crate) fn party<'a>(
        address: IpAddr,
        identities: &'a BTreeMap<u8, PodIdentity>,
    ) -> Party<'a> {
        Party {
            address,
            pod: host_of(address).and_then(|host| identities.get(&host)),
        }
    }

    /// What the oracle says of a flow's two ends, as far as this node is to judge them.
    pub(crate) fn expected(&self, flow: &Flow) -> (Side, Side) {
        let identities = self.identities();
        let decision = evaluate(
            self.policies.values(),
            &hachi_policy::Flow {
                source: Self::party(flow.source, &identities),
                destination: Self::party(flow.destination, &identities),
                from_own_node: Self::is_local_node(flow.source),
                protocol: flow.protocol,
                port: flow.port,
            },
        );
        // The other node judges for the Pods that it has.
        let own = |address, side: Side| match self.endpoint(&identities, address) {
            None => Side::NotIsolated,
            Some(true) => side,
            Some(false) if flow.source == flow.destination => Side::NotIsolated,
            Some(false) => Side::Denied(None),
        };
        let ingress = if Self::is_local_node(flow.source) {
            Side::NotIsolated
        } else {
            own(flow.destination, decision.ingress)
        };
        (own(flow.source, decision.egress), ingress)
    }

    /// Whether this node has an interface with the address, and if so whether the Pod behind it is
    /// known.
    fn endpoint(&self, identities: &BTreeMap<u8, PodIdentity>, address: IpAddr) -> Option<bool> {
        let mut local = self.pods.iter().filter(|(_, pod)| pod.has_endpoint());
        let (host, _) = local.find(|(host, _)| addresses(**host).contains(&address))?;
        // Where there are policies of the cluster, a Pod of an unknown namespace is as good as unknown.
        let known =
            |pod: &PodIdentity| pod.namespace_labels.is_some() || !self.has_cluster_policies();
        Some(identities.get(host).is_some_and(known))
    }
}

fn host_of(address: IpAddr) -> Option<u8> {
    (1..=15).find(|host| addresses(*host).contains(&address))
}
