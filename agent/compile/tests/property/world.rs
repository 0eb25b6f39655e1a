//! A small random cluster: what is true of it, as domain types for the oracle and as API objects for
//! the index.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use hachi_compile::{Compiled, compile};
use hachi_index::{Endpoint, EndpointKey, Index, Kind, Object, PodName};
use hachi_policy::{
    Action, ContainerPort, IpBlock, Labels, Namespaces, Operator, Party, Peer, Peers, PodIdentity,
    Policy, PolicyId, PolicyKind, PortMatch, PortSpec, Ports, Protocol, Rank, Requirement, Rule,
    Selector, Side, Subject, Tier, evaluate,
};
use ipnet::IpNet;
use serde_json::{Value, json};

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

fn labels(rng: &mut Rng) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for key in KEYS {
        if !rng.one_in(4) {
            labels.insert(key.to_owned(), (*rng.pick(&VALUES)).to_owned());
        }
    }
    labels
}

fn protocol(rng: &mut Rng) -> Protocol {
    *rng.pick(&[Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp])
}

fn pod(rng: &mut Rng) -> Pod {
    Pod {
        namespace: rng.below(NAMESPACES.len()),
        labels: labels(rng),
        ports: (0..rng.below(4))
            .map(|_| {
                (
                    rng.below(PORT_NAMES.len()),
                    protocol(rng),
                    *rng.pick(&PORTS),
                )
            })
            .collect(),
        local: !rng.one_in(3),
        host_network: rng.one_in(10),
        finished: rng.one_in(10),
        known: !rng.one_in(12),
        generation: rng.below(1 << 30) as u32,
    }
}

fn selector(rng: &mut Rng) -> Selector {
    let mut selector = Selector::everything();
    for _ in 0..rng.below(3) {
        let key = *rng.pick(&KEYS);
        let operator = *rng.pick(&[
            Operator::In,
            Operator::In,
            Operator::NotIn,
            Operator::Exists,
            Operator::DoesNotExist,
        ]);
        let values: Vec<String> = match operator {
            Operator::In | Operator::NotIn => (0..=rng.below(2))
                .map(|_| (*rng.pick(&VALUES)).to_owned())
                .collect(),
            Operator::Exists | Operator::DoesNotExist => Vec::new(),
        };
        selector.add(key, operator, values).unwrap();
    }
    selector
}

fn peer(rng: &mut Rng, namespace: &Arc<str>) -> Peer {
    match rng.below(3) {
        0 => Peer::Pods {
            namespaces: Namespaces::Named(namespace.clone()),
            pods: selector(rng),
        },
        1 => Peer::Pods {
            namespaces: Namespaces::Selected(selector(rng)),
            pods: selector(rng),
        },
        _ => {
            let cidr: IpNet = rng.pick(&BLOCKS).parse().unwrap();
            let inside = BLOCKS.iter().map(|b| b.parse::<IpNet>().unwrap());
            let mut holes: Vec<IpNet> = inside
                .filter(|net| cidr.contains(net) && *net != cidr)
                .collect();
            holes.retain(|_| rng.one_in(3));
            Peer::Block(IpBlock::new(cidr, holes).unwrap())
        }
    }
}

fn port(rng: &mut Rng) -> PortMatch {
    let port = match rng.below(6) {
        0 => PortSpec::Any,
        1 | 2 => PortSpec::Named((*rng.pick(&PORT_NAMES)).into()),
        3 => {
            let (a, b) = (*rng.pick(&PORTS), *rng.pick(&PORTS));
            PortSpec::Range(a.min(b), a.max(b))
        }
        _ => {
            let port = *rng.pick(&PORTS);
            PortSpec::Range(port, port)
        }
    };
    PortMatch {
        protocol: protocol(rng),
        port,
    }
}

fn rules(rng: &mut Rng, namespace: &Arc<str>) -> Vec<Rule> {
    let rule = |rng: &mut Rng| Rule {
        action: Action::Accept,
        peers: if rng.one_in(4) {
            Peers::Any
        } else {
            let all = (0..=rng.below(3)).map(|_| peer(rng, namespace)).collect();
            Peers::Listed(Arc::new(all))
        },
        ports: if rng.one_in(3) {
            Ports::Any
        } else {
            Ports::Listed((0..=rng.below(3)).map(|_| port(rng)).collect())
        },
    };
    (0..rng.below(4)).map(|_| rule(rng)).collect()
}

/// Rules of a policy of the cluster: as the API has them, in order, with what they do.
fn cluster_rules(rng: &mut Rng, egress: bool) -> Option<Vec<Rule>> {
    let rule = |rng: &mut Rng| {
        let peers = (0..=rng.below(2)).map(|_| match rng.below(3) {
            0 if egress => {
                Peer::Block(IpBlock::new(rng.pick(&BLOCKS).parse().unwrap(), []).unwrap())
            }
            1 => Peer::Pods {
                namespaces: Namespaces::Selected(selector(rng)),
                pods: Selector::everything(),
            },
            _ => Peer::Pods {
                namespaces: Namespaces::Selected(selector(rng)),
                pods: selector(rng),
            },
        });
        let peers = peers.collect();
        let mut ports = BTreeSet::new();
        for _ in 0..=rng.below(2) {
            let PortMatch { protocol, port } = port(rng);
            match port {
                // A name is that of a port of any protocol; a protocol alone cannot be asked for.
                PortSpec::Named(name) => ports.extend(
                    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(|protocol| PortMatch {
                        protocol,
                        port: PortSpec::Named(name.clone()),
                    }),
                ),
                PortSpec::Any => {}
                port => drop(ports.insert(PortMatch { protocol, port })),
            }
        }
        Rule {
            action: *rng.pick(&[Action::Accept, Action::Deny, Action::Deny, Action::Pass]),
            peers: Peers::Listed(Arc::new(peers)),
            ports: if ports.is_empty() || rng.one_in(3) {
                Ports::Any
            } else {
                Ports::Listed(ports)
            },
        }
    };
    let rules: Vec<Rule> = (0..rng.below(5)).map(|_| rule(rng)).collect();
    (!rules.is_empty()).then_some(rules)
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

    /// The objects of the API, in random order, through the index and the compiler.
    pub(crate) fn compile(&self, rng: &mut Rng) -> Compiled {
        compile(self.index(rng).desired())
    }

    fn index(&self, rng: &mut Rng) -> Index {
        let mut index = Index::new("n1");
        let mut objects = self.objects();
        rng.shuffle(&mut objects);
        let endpoints_at = rng.below(objects.len() + 1);
        let feed_endpoints = |index: &mut Index| {
            for (host, pod) in self.pods.iter().filter(|(_, pod)| pod.has_endpoint()) {
                index.add_endpoint(endpoint(*host, pod));
            }
            index.set_local_addresses(LOCAL.iter().map(|a| a.parse().unwrap()).collect());
        };
        for (at, object) in objects.into_iter().enumerate() {
            if at == endpoints_at {
                feed_endpoints(&mut index);
            }
            if rng.one_in(4) {
                // Looking in between must not change what comes out in the end.
                index.desired();
            }
            index.apply(object);
        }
        feed_endpoints(&mut index);
        assert_eq!(index.problems(), []);
        index
    }

    /// Brings an index that knew another world up to date, as after relists.
    pub(crate) fn update(&self, index: &mut Index, before: &Self, rng: &mut Rng) {
        let mut kinds = [
            Kind::Namespace,
            Kind::Pod,
            Kind::NetworkPolicy,
            Kind::ClusterNetworkPolicy,
            Kind::Service,
            Kind::EndpointSlice,
        ];
        rng.shuffle(&mut kinds);
        for kind in kinds {
            let of_kind = self
                .objects()
                .into_iter()
                .filter(|object| object.kind() == kind);
            index.reset(kind, of_kind.collect());
        }
        let endpoints = |world: &Self| -> Vec<Endpoint> {
            let with = world.pods.iter().filter(|(_, pod)| pod.has_endpoint());
            with.map(|(host, pod)| endpoint(*host, pod)).collect()
        };
        for gone in endpoints(before) {
            index.remove_endpoint(&gone.key);
        }
        for endpoint in endpoints(self) {
            index.add_endpoint(endpoint);
        }
        index.set_local_addresses(LOCAL.iter().map(|a| a.parse().unwrap()).collect());
    }

    pub(crate) fn objects(&self) -> Vec<Object> {
        let namespaces = NAMESPACES
            .iter()
            .zip(&self.namespaces)
            .filter_map(|(name, labels)| {
                let labels = labels.as_ref()?;
                Some(json!({"kind": "Namespace", "metadata": {"name": name, "labels": labels}}))
            });
        let pods = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.known)
            .map(|(host, pod)| pod_json(*host, pod));
        let policies = self.policies.values().map(policy_json);
        let services = self.services.values().flatten().cloned();
        let values: Vec<Value> = namespaces
            .chain(pods)
            .chain(policies)
            .chain(services)
            .collect();
        values.into_iter().map(object).collect()
    }
}

/// A Service whose address another one may claim too.
fn service(rng: &mut Rng, n: usize) -> [Value; 2] {
    let ports = [("http", "TCP", 80), ("dns", "UDP", 53), ("sctp", "SCTP", 9)];
    let ports: Vec<_> = ports.iter().filter(|_| !rng.one_in(3)).collect();
    let names = |target: bool| -> Vec<Value> {
        let port = |(name, protocol, port): &&(&str, &str, u16)| json!({"name": name, "protocol": protocol, "port": port + u16::from(target)});
        ports.iter().map(port).collect()
    };
    let endpoints: Vec<Value> = (0..rng.below(5))
        .map(|_| {
            let ready = rng.one_in(2);
            json!({"addresses": [addresses(1 + rng.below(15) as u8)[0]],
                   "nodeName": rng.pick(&["n1", "n2"]),
                   "conditions": {"ready": ready, "serving": true, "terminating": !ready}})
        })
        .collect();
    let metadata = json!({"namespace": "a", "name": format!("svc{n}"),
        "labels": {"kubernetes.io/service-name": format!("svc{n}")},
        "creationTimestamp": rng.pick(&["2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"])});
    let any_ip = |rng: &mut Rng| format!("10.96.0.{}", rng.below(8));
    let spec = json!({"clusterIP": any_ip(rng), "externalIPs": [any_ip(rng)], "ports": names(false),
        "internalTrafficPolicy": rng.pick(&["Cluster", "Local"]),
        "sessionAffinity": rng.pick(&["None", "ClientIP"])});
    [
        json!({"kind": "Service", "metadata": metadata, "spec": spec}),
        json!({"kind": "EndpointSlice", "addressType": "IPv4", "metadata": metadata,
               "ports": names(true), "endpoints": endpoints}),
    ]
}

fn host_of(address: IpAddr) -> Option<u8> {
    (1..=15).find(|host| addresses(*host).contains(&address))
}

fn object(value: Value) -> Object {
    let text = value.to_string();
    let object = match value["kind"].as_str() {
        Some("Namespace") => serde_json::from_value(value).map(|o| Object::Namespace(Box::new(o))),
        Some("Pod") => serde_json::from_value(value).map(|o| Object::Pod(Box::new(o))),
        Some("Service") => serde_json::from_value(value).map(|o| Object::Service(Box::new(o))),
        Some("EndpointSlice") => {
            serde_json::from_value(value).map(|o| Object::EndpointSlice(Box::new(o)))
        }
        Some("ClusterNetworkPolicy") => Ok(Object::ClusterNetworkPolicy(Box::new(value))),
        _ => Ok(Object::NetworkPolicy(Box::new(value))),
    };
    object.unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn uid(pod: &Pod) -> String {
    format!("uid-{}", pod.generation)
}

fn endpoint(host: u8, pod: &Pod) -> Endpoint {
    Endpoint {
        key: EndpointKey {
            container_id: format!("c{host}"),
            ifname: "eth0".into(),
        },
        pod: Some(PodName {
            namespace: NAMESPACES[pod.namespace].to_owned(),
            name: format!("pod{host}"),
            uid: Some(uid(pod)),
        }),
        ifindex: pod.generation,
        mac: [2, 0, 0, 0, 0, host],
        host_mac: [2, 0, 0, 0, 1, host],
        addresses: addresses(host).to_vec(),
        host_ports: Vec::new(),
    }
}

fn pod_json(host: u8, pod: &Pod) -> Value {
    let ports: Vec<Value> = pod
        .ports
        .iter()
        .map(|(name, protocol, port)| {
            json!({"name": PORT_NAMES[*name], "protocol": protocol.to_string(), "containerPort": port})
        })
        .collect();
    let phase = if pod.finished { "Failed" } else { "Running" };
    let ips: Vec<Value> = addresses(host).iter().map(|ip| json!({"ip": ip})).collect();
    json!({"kind": "Pod",
        "metadata": {"namespace": NAMESPACES[pod.namespace], "name": format!("pod{host}"),
                     "uid": uid(pod), "labels": pod.labels},
        "spec": {"nodeName": if pod.local { "n1" } else { "n2" }, "hostNetwork": pod.host_network,
                 "containers": [{"name": "c", "ports": ports}]},
        "status": {"phase": phase, "podIPs": ips}})
}

fn selector_json(selector: &Selector) -> Value {
    let expressions: Vec<Value> = selector
        .requirements()
        .map(|r| match r {
            Requirement::In(k, v) => json!({"key": k, "operator": "In", "values": v}),
            Requirement::NotIn(k, v) => json!({"key": k, "operator": "NotIn", "values": v}),
            Requirement::Exists(k) => json!({"key": k, "operator": "Exists"}),
            Requirement::DoesNotExist(k) => json!({"key": k, "operator": "DoesNotExist"}),
        })
        .collect();
    json!({"matchExpressions": expressions})
}

fn policy_json(policy: &Policy) -> Value {
    if policy.id.kind == PolicyKind::ClusterNetworkPolicy {
        return cluster_policy_json(policy);
    }
    let peers = |peers: &Peers| {
        match peers {
        Peers::Any => json!([]),
        Peers::Listed(peers) => peers
            .iter()
            .map(|peer| match peer {
                Peer::Pods { namespaces: Namespaces::Named(_), pods } => {
                    json!({"podSelector": selector_json(pods)})
                }
                Peer::Pods { namespaces: Namespaces::Selected(s), pods } => {
                    json!({"namespaceSelector": selector_json(s), "podSelector": selector_json(pods)})
                }
                Peer::Block(block) => json!({"ipBlock": {
                    "cidr": block.cidr(), "except": block.except().collect::<Vec<_>>()}}),
            })
            .collect(),
    }
    };
    let ports = |ports: &Ports| match ports {
        Ports::Any => json!([]),
        Ports::Listed(ports) => ports
            .iter()
            .map(|p| {
                let protocol = p.protocol.to_string();
                match &p.port {
                    PortSpec::Any => json!({"protocol": protocol}),
                    PortSpec::Range(a, b) if a == b => json!({"protocol": protocol, "port": a}),
                    PortSpec::Range(a, b) => json!({"protocol": protocol, "port": a, "endPort": b}),
                    PortSpec::Named(name) => json!({"protocol": protocol, "port": &**name}),
                }
            })
            .collect(),
    };
    let rules = |rules: &Option<Vec<Rule>>, peers_key: &str| -> Value {
        let rules = rules.iter().flatten();
        rules
            .map(|r| json!({peers_key: peers(&r.peers), "ports": ports(&r.ports)}))
            .collect()
    };
    let mut types = Vec::new();
    types.extend(policy.ingress.as_ref().map(|_| "Ingress"));
    types.extend(policy.egress.as_ref().map(|_| "Egress"));
    json!({"kind": "NetworkPolicy",
        "metadata": {"namespace": &*policy.id.namespace, "name": &*policy.id.name},
        "spec": {"podSelector": selector_json(&policy.subject.pods), "policyTypes": types,
                 "ingress": rules(&policy.ingress, "from"), "egress": rules(&policy.egress, "to")}})
}

fn cluster_policy_json(policy: &Policy) -> Value {
    let of = |namespaces: &Namespaces, pods: &Selector| match namespaces {
        Namespaces::Selected(namespaces) if *pods == Selector::everything() => {
            json!({"namespaces": selector_json(namespaces)})
        }
        Namespaces::Selected(namespaces) => json!({"pods": {
            "namespaceSelector": selector_json(namespaces), "podSelector": selector_json(pods)}}),
        Namespaces::Named(name) => panic!("not a way to name namespaces: {name}"),
    };
    let peers = |peers: &Peers| match peers {
        Peers::Any => panic!("not a way to name peers"),
        Peers::Listed(peers) => peers
            .iter()
            .map(|peer| match peer {
                Peer::Pods { namespaces, pods } => of(namespaces, pods),
                Peer::Block(block) => json!({"networks": [block.cidr()]}),
            })
            .collect::<Vec<_>>(),
    };
    let port = |p: &PortMatch| {
        let protocol = p.protocol.to_string().to_lowercase();
        match &p.port {
            PortSpec::Range(a, b) if a == b => {
                json!({protocol: {"destinationPort": {"number": a}}})
            }
            PortSpec::Range(a, b) => {
                json!({protocol: {"destinationPort": {"range": {"start": a, "end": b}}}})
            }
            PortSpec::Named(name) => json!({"destinationNamedPort": &**name}),
            PortSpec::Any => panic!("not a way to name ports"),
        }
    };
    let rules = |rules: &Option<Vec<Rule>>, peers_key: &str| -> Value {
        let rules = rules.iter().flatten();
        rules
            .map(|r| {
                let mut rule = json!({"action": r.action.to_string(), peers_key: peers(&r.peers)});
                if let Ports::Listed(ports) = &r.ports {
                    rule["protocols"] = ports.iter().map(port).collect();
                }
                rule
            })
            .collect()
    };
    let Subject { namespaces, pods } = &policy.subject;
    json!({"kind": "ClusterNetworkPolicy", "metadata": {"name": &*policy.id.name},
        "spec": {"tier": policy.rank.tier.to_string(), "priority": policy.rank.priority,
                 "subject": of(namespaces, pods),
                 "ingress": rules(&policy.ingress, "from"), "egress": rules(&policy.egress, "to")}})
}
