//! `ClusterNetworkPolicy` v1alpha2, and the two kinds that it grew from, `AdminNetworkPolicy` and
//! `BaselineAdminNetworkPolicy` v1alpha1, all of `policy.networking.k8s.io`.
//!
//! Read as they came, like [`super::policy`]. What is not understood fails closed as the API asks for
//! (`ClusterNetworkPolicyIngressPeer`): a rule that accepts then matches nothing, a rule that denies or
//! passes denies everything. Where the policy itself is not understood (its subject, its tier, a field
//! beside them) that goes for all of its rules, and for every Pod if its subject cannot be read.

use std::sync::Arc;

use hachi_policy::{
    Action, IpBlock, Namespaces, Peer, Peers, Policy, PolicyId, PolicyKind, PortMatch, PortSpec,
    Ports, Protocol, Rank, Rule, Selector, Subject, Tier,
};
use serde_json::Value;

use super::{
    Complaints,
    fields::Fields,
    selector::{cidr, number, selector},
};

const PROTOCOLS: [(&str, Protocol); 3] = [
    ("tcp", Protocol::Tcp),
    ("udp", Protocol::Udp),
    ("sctp", Protocol::Sctp),
];

/// The Baseline tier's one policy of the older API comes after those of the newer.
const AFTER_ALL: u16 = 1001;

pub(crate) fn cluster_policy(
    kind: PolicyKind,
    object: &Value,
    complaints: &mut Complaints,
) -> Policy {
    let spec = &object["spec"];
    let mut understood = true;
    let mut distrust = |error: String, complaints: &mut Complaints| {
        complaints.push(format!(
            "{error}: rules that accept match nothing, others deny everything"
        ));
        understood = false;
    };
    let rank = rank(kind, spec).unwrap_or_else(|error| {
        distrust(format!("spec: {error}"), complaints);
        Rank {
            tier: Tier::Admin,
            priority: 0,
        }
    });
    let subject = subject(&spec["subject"]).unwrap_or_else(|error| {
        distrust(
            format!("subject: {error}: every Pod is selected"),
            complaints,
        );
        Subject {
            namespaces: Namespaces::Selected(Selector::everything()),
            pods: Selector::everything(),
        }
    });
    let mut parser = Parser {
        kind,
        understood,
        complaints,
    };
    Policy {
        id: PolicyId {
            kind,
            namespace: "".into(),
            name: object["metadata"]["name"]
                .as_str()
                .unwrap_or_default()
                .into(),
        },
        rank,
        subject,
        ingress: parser.rules(&spec["ingress"], "ingress", "from"),
        egress: parser.rules(&spec["egress"], "egress", "to"),
    }
}

fn rank(kind: PolicyKind, spec: &Value) -> Result<Rank, String> {
    let known: &[&str] = match kind {
        PolicyKind::ClusterNetworkPolicy | PolicyKind::NetworkPolicy => {
            &["tier", "priority", "subject", "ingress", "egress"]
        }
        PolicyKind::AdminNetworkPolicy => &["priority", "subject", "ingress", "egress"],
        PolicyKind::BaselineAdminNetworkPolicy => &["subject", "ingress", "egress"],
    };
    let fields = Fields::of(spec, known)?;
    let tier = match kind {
        PolicyKind::AdminNetworkPolicy => Tier::Admin,
        PolicyKind::BaselineAdminNetworkPolicy => {
            return Ok(Rank {
                tier: Tier::Baseline,
                priority: AFTER_ALL,
            });
        }
        PolicyKind::ClusterNetworkPolicy | PolicyKind::NetworkPolicy => {
            match fields.text("tier")?.unwrap_or_default() {
                "Admin" => Tier::Admin,
                "Baseline" => Tier::Baseline,
                other => {
                    return Err(format!(
                        "tier {other:?} is not known: use Admin or Baseline"
                    ));
                }
            }
        }
    };
    let priority = fields.number("priority")?.ok_or("priority is missing")?;
    match u16::try_from(priority) {
        Ok(priority @ 0..=1000) => Ok(Rank { tier, priority }),
        _ => Err(format!("priority {priority} is not between 0 and 1000")),
    }
}

fn subject(value: &Value) -> Result<Subject, String> {
    let fields = Fields::of(value, &["namespaces", "pods"])?;
    let (namespaces, pods) = pods_of(fields)?;
    Ok(Subject { namespaces, pods })
}

/// Exactly one of `namespaces` and `pods`.
fn pods_of(fields: Fields<'_>) -> Result<(Namespaces, Selector), String> {
    match (fields.get("namespaces"), fields.get("pods")) {
        (Some(namespaces), None) => {
            let namespaces = selector(namespaces).map_err(|e| format!("namespaces: {e}"))?;
            Ok((Namespaces::Selected(namespaces), Selector::everything()))
        }
        (None, Some(pods)) => {
            let fields = Fields::of(pods, &["namespaceSelector", "podSelector"])?;
            let namespaces = fields
                .get("namespaceSelector")
                .map_or(Ok(Selector::everything()), selector)
                .map_err(|e| format!("namespaceSelector: {e}"))?;
            let pods = fields.get("podSelector").ok_or("pods has no podSelector")?;
            let pods = selector(pods).map_err(|e| format!("podSelector: {e}"))?;
            Ok((Namespaces::Selected(namespaces), pods))
        }
        _ => Err("exactly one of namespaces and pods is needed".to_owned()),
    }
}

struct Parser<'a> {
    kind: PolicyKind,
    /// Whether the policy's own fields were.
    understood: bool,
    complaints: &'a mut Complaints,
}

impl Parser<'_> {
    /// The rules of a direction; `None` if there are none, and the policy so has no say in it.
    fn rules(&mut self, list: &Value, at: &str, peers_key: &str) -> Option<Vec<Rule>> {
        let list = match list {
            Value::Null => return None,
            Value::Array(list) => list,
            _ => {
                self.complaints
                    .push(format!("{at} is not a list: everything is denied"));
                return Some(vec![closed(Action::Deny)]);
            }
        };
        let mut rules = Vec::new();
        for (i, rule) in list.iter().enumerate() {
            let action = self.action(rule);
            let read = action
                .clone()
                .and_then(|action| self.rule(rule, action, peers_key));
            rules.push(match read {
                Ok(rule) if self.understood => rule,
                Ok(rule) => closed(rule.action),
                Err(error) => {
                    let action = action.unwrap_or(Action::Deny);
                    let instead = match action {
                        Action::Accept => "the rule matches nothing",
                        Action::Deny | Action::Pass => "the rule denies everything",
                    };
                    self.complaints
                        .push(format!("{at}[{i}]: {error}: {instead}"));
                    closed(action)
                }
            });
        }
        (!rules.is_empty()).then_some(rules)
    }

    fn action(&self, rule: &Value) -> Result<Action, String> {
        let accept = match self.kind {
            PolicyKind::ClusterNetworkPolicy | PolicyKind::NetworkPolicy => "Accept",
            PolicyKind::AdminNetworkPolicy | PolicyKind::BaselineAdminNetworkPolicy => "Allow",
        };
        match rule["action"].as_str() {
            Some(name) if name == accept => Ok(Action::Accept),
            Some("Deny") => Ok(Action::Deny),
            Some("Pass") if self.kind != PolicyKind::BaselineAdminNetworkPolicy => Ok(Action::Pass),
            _ => Err(format!(
                "action {} is not known: use {accept}, Deny or Pass",
                rule["action"]
            )),
        }
    }

    fn rule(&self, rule: &Value, action: Action, peers_key: &str) -> Result<Rule, String> {
        let ports_key = match self.kind {
            PolicyKind::ClusterNetworkPolicy | PolicyKind::NetworkPolicy => "protocols",
            PolicyKind::AdminNetworkPolicy | PolicyKind::BaselineAdminNetworkPolicy => "ports",
        };
        let fields = Fields::of(rule, &["name", "action", peers_key, ports_key])?;
        let mut peers = Vec::new();
        for (i, value) in some(fields, peers_key)?.iter().enumerate() {
            let read = peer(value, peers_key == "to");
            peers.extend(read.map_err(|e| format!("{peers_key}[{i}]: {e}"))?);
        }
        let ports = if fields.get(ports_key).is_none() {
            Ports::Any
        } else {
            let mut ports = Vec::new();
            for (i, value) in some(fields, ports_key)?.iter().enumerate() {
                let read = if ports_key == "protocols" {
                    protocol(value)
                } else {
                    admin_port(value)
                };
                ports.extend(read.map_err(|e| format!("{ports_key}[{i}]: {e}"))?);
            }
            Ports::Listed(ports.into_iter().collect())
        };
        Ok(Rule {
            action,
            peers: Peers::Listed(Arc::new(peers.into_iter().collect())),
            ports,
        })
    }
}

/// A list that has to have something in it.
fn some<'a>(fields: Fields<'a>, key: &str) -> Result<&'a [Value], String> {
    let list = fields.list(key)?.unwrap_or_default();
    if list.is_empty() {
        return Err(format!("{key} has to name at least one"));
    }
    Ok(list)
}

/// What a rule becomes that cannot be understood.
fn closed(action: Action) -> Rule {
    match action {
        Action::Accept => Rule {
            action,
            peers: Peers::Listed(Arc::default()),
            ports: Ports::Any,
        },
        Action::Deny | Action::Pass => Rule {
            action: Action::Deny,
            peers: Peers::Any,
            ports: Ports::Any,
        },
    }
}

fn peer(value: &Value, egress: bool) -> Result<Vec<Peer>, String> {
    let known: &[&str] = if egress {
        &["namespaces", "pods", "networks", "nodes", "domainNames"]
    } else {
        &["namespaces", "pods"]
    };
    let fields = Fields::of(value, known)?;
    if fields.count() != 1 {
        return Err("a peer is named in exactly one way".to_owned());
    }
    for unsupported in ["nodes", "domainNames"] {
        if fields.get(unsupported).is_some() {
            return Err(format!("{unsupported} is not supported"));
        }
    }
    if fields.get("networks").is_some() {
        let networks = some(fields, "networks")?.iter();
        return networks
            .map(|network| {
                let block = IpBlock::new(cidr(network)?, []).map_err(|e| e.to_string())?;
                Ok(Peer::Block(block))
            })
            .collect();
    }
    let (namespaces, pods) = pods_of(fields)?;
    Ok(vec![Peer::Pods { namespaces, pods }])
}

fn exactly_one(fields: Fields<'_>) -> Result<(), String> {
    if fields.count() == 1 {
        Ok(())
    } else {
        Err("exactly one field is needed".to_owned())
    }
}

/// A `ClusterNetworkPolicyProtocol`.
fn protocol(value: &Value) -> Result<Vec<PortMatch>, String> {
    let fields = Fields::of(value, &["tcp", "udp", "sctp", "destinationNamedPort"])?;
    exactly_one(fields)?;
    if let Some(name) = fields.text("destinationNamedPort")? {
        return Ok(named(name));
    }
    for (key, protocol) in PROTOCOLS {
        let Some(value) = fields.get(key) else {
            continue;
        };
        let of = Fields::of(value, &["destinationPort"])?;
        let port = of
            .get("destinationPort")
            .ok_or_else(|| format!("{key} has no destinationPort"))?;
        let port = Fields::of(port, &["number", "range"])?;
        exactly_one(port)?;
        let port = match port.get("range") {
            Some(range) => {
                let range = Fields::of(range, &["start", "end"])?;
                self::range(range)?
            }
            None => {
                let number = number(port.number("number")?.unwrap_or_default())?;
                PortSpec::Range(number, number)
            }
        };
        return Ok(vec![PortMatch { protocol, port }]);
    }
    Err("no protocol is named".to_owned())
}

/// An `AdminNetworkPolicyPort`.
fn admin_port(value: &Value) -> Result<Vec<PortMatch>, String> {
    let fields = Fields::of(value, &["portNumber", "portRange", "namedPort"])?;
    exactly_one(fields)?;
    if let Some(name) = fields.text("namedPort")? {
        return Ok(named(name));
    }
    let protocol = |of: Fields<'_>| {
        let name = of.text("protocol")?;
        Protocol::parse(name)
            .ok_or_else(|| format!("protocol {:?} is not known", name.unwrap_or_default()))
    };
    if let Some(value) = fields.get("portNumber") {
        let of = Fields::of(value, &["protocol", "port"])?;
        let number = number(of.number("port")?.unwrap_or_default())?;
        return Ok(vec![PortMatch {
            protocol: protocol(of)?,
            port: PortSpec::Range(number, number),
        }]);
    }
    let value = fields.get("portRange").unwrap_or(&Value::Null);
    let of = Fields::of(value, &["protocol", "start", "end"])?;
    Ok(vec![PortMatch {
        protocol: protocol(of)?,
        port: range(of)?,
    }])
}

fn range(of: Fields<'_>) -> Result<PortSpec, String> {
    let bound = |key: &str| number(of.number(key)?.unwrap_or_default());
    let (start, end) = (bound("start")?, bound("end")?);
    if end < start {
        return Err(format!("the range ends at {end}, below its start {start}"));
    }
    Ok(PortSpec::Range(start, end))
}

/// A name stands for the ports of every protocol that a Pod calls so.
fn named(name: &str) -> Vec<PortMatch> {
    let all = PROTOCOLS.iter().map(|(_, protocol)| PortMatch {
        protocol: *protocol,
        port: PortSpec::Named(name.into()),
    });
    all.collect()
}
