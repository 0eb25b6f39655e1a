//! `NetworkPolicy` v1.
//!
//! The API server refuses what makes no sense, so what arrives here in spite of it comes from a newer
//! API or a damaged store. It fails closed: a peer or port that cannot be understood matches
//! nothing, a `podSelector` that cannot be understood selects every Pod of the namespace and the
//! policy then allows nothing, an unknown policy type isolates both directions.

use std::{collections::BTreeSet, sync::Arc};

use hachi_policy::{
    InvalidSelector, IpBlock, Namespaces, Operator, Peer, Peers, Policy, PolicyId, PortMatch,
    PortSpec, Ports, Protocol, Rule, Selector, Subject,
};
use k8s_openapi::{
    api::networking::v1::{
        IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
    },
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};

use super::{Complaints, port};

pub(crate) fn policy(object: &NetworkPolicy, complaints: &mut Complaints) -> Policy {
    let namespace: Arc<str> = object
        .metadata
        .namespace
        .as_deref()
        .unwrap_or_default()
        .into();
    let name = object.metadata.name.as_deref().unwrap_or_default().into();
    let empty = NetworkPolicySpec::default();
    let spec = object.spec.as_ref().unwrap_or(&empty);

    let (concerns_ingress, concerns_egress) = directions(spec, complaints);
    let mut parser = Parser {
        namespace: &namespace,
        complaints,
    };
    let subject = spec
        .pod_selector
        .as_ref()
        .map_or(Ok(Selector::everything()), selector);
    let understood = subject.is_ok();
    let pods = subject.unwrap_or_else(|error| {
        parser.complaints.push(format!(
            "podSelector: {error}: every Pod of the namespace is isolated and the policy allows \
             nothing"
        ));
        Selector::everything()
    });

    let ingress = concerns_ingress.then(|| {
        let rules = spec
            .ingress
            .iter()
            .flatten()
            .filter(|_| understood)
            .enumerate();
        rules
            .map(|(i, rule)| Rule {
                peers: parser.peers(rule.from.as_deref(), &format!("ingress[{i}].from")),
                ports: parser.ports(rule.ports.as_deref(), &format!("ingress[{i}].ports")),
            })
            .collect()
    });
    let egress = concerns_egress.then(|| {
        let rules = spec
            .egress
            .iter()
            .flatten()
            .filter(|_| understood)
            .enumerate();
        rules
            .map(|(i, rule)| Rule {
                peers: parser.peers(rule.to.as_deref(), &format!("egress[{i}].to")),
                ports: parser.ports(rule.ports.as_deref(), &format!("egress[{i}].ports")),
            })
            .collect()
    });
    Policy {
        id: PolicyId {
            namespace: namespace.clone(),
            name,
        },
        subject: Subject { namespace, pods },
        ingress,
        egress,
    }
}

/// Which directions the policy isolates. Without `policyTypes`: ingress always, egress if it has a
/// rule for it.
fn directions(spec: &NetworkPolicySpec, complaints: &mut Complaints) -> (bool, bool) {
    let types = spec.policy_types.as_deref().unwrap_or_default();
    if types.is_empty() {
        return (
            true,
            spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()),
        );
    }
    let mut concerned = (false, false);
    for name in types {
        match name.as_str() {
            "Ingress" => concerned.0 = true,
            "Egress" => concerned.1 = true,
            other => {
                complaints.push(format!(
                    "policyTypes: {other:?} is not known: both directions are isolated; use Ingress \
                     or Egress"
                ));
                concerned = (true, true);
            }
        }
    }
    concerned
}

struct Parser<'a> {
    namespace: &'a Arc<str>,
    complaints: &'a mut Complaints,
}

impl Parser<'_> {
    fn peers(&mut self, list: Option<&[NetworkPolicyPeer]>, at: &str) -> Peers {
        let list = list.unwrap_or_default();
        if list.is_empty() {
            return Peers::Any;
        }
        let mut peers = BTreeSet::new();
        for (i, peer) in list.iter().enumerate() {
            match self.peer(peer) {
                Ok(peer) => {
                    peers.insert(peer);
                }
                Err(error) => {
                    self.complaints
                        .push(format!("{at}[{i}]: {error}: it matches nothing"));
                }
            }
        }
        Peers::Listed(Arc::new(peers))
    }

    fn peer(&self, peer: &NetworkPolicyPeer) -> Result<Peer, String> {
        let NetworkPolicyPeer {
            ip_block,
            namespace_selector,
            pod_selector,
        } = peer;
        match (ip_block, namespace_selector, pod_selector) {
            (None, None, None) => Err(
                "no known way to name a peer: use podSelector, namespaceSelector or ipBlock"
                    .to_owned(),
            ),
            (Some(block), None, None) => self::block(block).map(Peer::Block),
            (Some(_), ..) => {
                Err("ipBlock cannot be combined with selectors: split the peer".into())
            }
            (None, namespaces, pods) => {
                let namespaces = match namespaces {
                    None => Namespaces::Named(self.namespace.clone()),
                    Some(s) => Namespaces::Selected(
                        selector(s).map_err(|e| format!("namespaceSelector: {e}"))?,
                    ),
                };
                let pods = pods.as_ref().map_or(Ok(Selector::everything()), selector);
                let pods = pods.map_err(|e| format!("podSelector: {e}"))?;
                Ok(Peer::Pods { namespaces, pods })
            }
        }
    }

    fn ports(&mut self, list: Option<&[NetworkPolicyPort]>, at: &str) -> Ports {
        let list = list.unwrap_or_default();
        if list.is_empty() {
            return Ports::Any;
        }
        let mut ports = BTreeSet::new();
        for (i, entry) in list.iter().enumerate() {
            match port_match(entry) {
                Ok(port) => {
                    ports.insert(port);
                }
                Err(error) => {
                    self.complaints
                        .push(format!("{at}[{i}]: {error}: it matches nothing"));
                }
            }
        }
        Ports::Listed(ports)
    }
}

fn block(block: &IPBlock) -> Result<IpBlock, String> {
    let parse = |text: &str| {
        text.parse()
            .map_err(|_| format!("{text:?} is not an address block: write address/prefix"))
    };
    let except: Result<Vec<_>, _> = block.except.iter().flatten().map(|e| parse(e)).collect();
    IpBlock::new(parse(&block.cidr)?, except?).map_err(|e| e.to_string())
}

fn port_match(entry: &NetworkPolicyPort) -> Result<PortMatch, String> {
    let protocol = Protocol::parse(entry.protocol.as_deref()).ok_or_else(|| {
        let name = entry.protocol.as_deref().unwrap_or_default();
        format!("protocol {name:?} is not known: use TCP, UDP or SCTP")
    })?;
    let number = |n: i32| port(n).ok_or_else(|| format!("port {n} is not between 1 and 65535"));
    let spec = match (&entry.port, entry.end_port) {
        (None, None) => PortSpec::Any,
        (Some(IntOrString::Int(first)), None) => {
            let first = number(*first)?;
            PortSpec::Range(first, first)
        }
        (Some(IntOrString::Int(first)), Some(last)) => {
            let (first, last) = (number(*first)?, number(last)?);
            if last < first {
                return Err(format!("endPort {last} is below port {first}: swap them"));
            }
            PortSpec::Range(first, last)
        }
        (Some(IntOrString::String(name)), None) => PortSpec::Named(name.as_str().into()),
        (None | Some(IntOrString::String(_)), Some(_)) => {
            return Err("endPort needs a port that is a number: give one".to_owned());
        }
    };
    Ok(PortMatch {
        protocol,
        port: spec,
    })
}

fn selector(object: &LabelSelector) -> Result<Selector, InvalidSelector> {
    let mut selector = Selector::everything();
    for (key, value) in object.match_labels.iter().flatten() {
        selector.add_label(key, value)?;
    }
    for term in object.match_expressions.iter().flatten() {
        let values = term.values.iter().flatten().cloned();
        selector.add(&term.key, Operator::parse(&term.operator)?, values)?;
    }
    Ok(selector)
}
