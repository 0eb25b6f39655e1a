//! Random parts of a cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use hachi_policy::{
    Action, IpBlock, Namespaces, Operator, Peer, Peers, PortMatch, PortSpec, Ports, Protocol, Rule,
    Selector,
};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::{BLOCKS, KEYS, NAMESPACES, PORT_NAMES, PORTS, Pod, VALUES, addresses};
use crate::rng::Rng;

pub(super) fn labels(rng: &mut Rng) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for key in KEYS {
        if !rng.one_in(4) {
            labels.insert(key.to_owned(), (*rng.pick(&VALUES)).to_owned());
        }
    }
    labels
}

pub(super) fn protocol(rng: &mut Rng) -> Protocol {
    *rng.pick(&[Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp])
}

pub(super) fn pod(rng: &mut Rng) -> Pod {
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

pub(super) fn selector(rng: &mut Rng) -> Selector {
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

pub(super) fn peer(rng: &mut Rng, namespace: &Arc<str>) -> Peer {
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

pub(super) fn port(rng: &mut Rng) -> PortMatch {
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

pub(super) fn rules(rng: &mut Rng, namespace: &Arc<str>) -> Vec<Rule> {
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
pub(super) fn cluster_rules(rng: &mut Rng, egress: bool) -> Option<Vec<Rule>> {
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
                Ports::Listed(ports.into_iter().collect())
            },
        }
    };
    let rules: Vec<Rule> = (0..rng.below(5)).map(|_| rule(rng)).collect();
    (!rules.is_empty()).then_some(rules)
}

/// A Service whose address another one may claim too.
pub(super) fn service(rng: &mut Rng, n: usize) -> [Value; 2] {
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
