//! `NetworkPolicy` v1.
//!
//! The object is read as it came, not through types that forget what they do not know. The API
//! server refuses what makes no sense, so what arrives here in spite of it comes from a newer API or
//! a damaged store. It fails closed:
//! - a peer or port that is not understood in full matches nothing;
//! - neither does a rule with a field beside peers and ports;
//! - a `podSelector` that is not understood selects every Pod of the namespace, and the policy then
//!   allows nothing;
//! - an unknown policy type or field of the policy isolates both directions; a field makes the policy
//!   allow nothing besides.

use std::sync::Arc;

use hachi_policy::{
    Action, IpBlock, Namespaces, Peer, Peers, Policy, PolicyId, PortMatch, PortSpec, Ports,
    Protocol, Rank, Rule, Selector, SmallSet, Subject,
};
use serde_json::Value;

use super::{
    Complaints,
    fields::Fields,
    selector::{cidr, number, selector},
};

pub(crate) fn policy(object: &Value, complaints: &mut Complaints) -> Policy {
    let name = |key: &str| object["metadata"][key].as_str().unwrap_or_default();
    let id = PolicyId::network(name("namespace"), name("name"));
    let spec = &object["spec"];
    let mut parser = Parser {
        namespace: id.namespace.clone(),
        complaints,
    };
    let pods = selector(&spec["podSelector"]);
    let mut understood = pods.is_ok();
    let pods = pods.unwrap_or_else(|error| {
        parser.complain(format!(
            "podSelector: {error}: every Pod of the namespace is isolated and the policy allows \
             nothing"
        ));
        Selector::everything()
    });
    let known = ["podSelector", "policyTypes", "ingress", "egress"];
    let mut concerned = parser.directions(spec);
    if let Err(error) = Fields::of(spec, &known) {
        parser.complain(format!(
            "spec: {error}: what the policy selects is isolated in both directions and the policy \
             allows nothing"
        ));
        concerned = [true; 2];
        understood = false;
    }
    let [ingress, egress] = [("ingress", "from"), ("egress", "to")];
    let mut rules = |concerned: bool, (list, peers): (&str, &str)| {
        concerned.then(|| {
            if understood {
                parser.rules(&spec[list], list, peers)
            } else {
                Vec::new()
            }
        })
    };
    Policy {
        ingress: rules(concerned[0], ingress),
        egress: rules(concerned[1], egress),
        subject: Subject {
            namespaces: Namespaces::Named(id.namespace.clone()),
            pods,
        },
        rank: Rank::NETWORK,
        id,
    }
}

struct Parser<'a> {
    namespace: Arc<str>,
    complaints: &'a mut Complaints,
}

impl Parser<'_> {
    fn complain(&mut self, complaint: String) {
        self.complaints.push(complaint);
    }

    /// Which directions the policy isolates: ingress, egress. Without `policyTypes`: ingress always,
    /// egress if it has a rule for it.
    fn directions(&mut self, spec: &Value) -> [bool; 2] {
        let types = match &spec["policyTypes"] {
            Value::Null => &[][..],
            Value::Array(types) => types,
            _ => {
                self.complain("policyTypes is not a list: both directions are isolated".to_owned());
                return [true; 2];
            }
        };
        if types.is_empty() {
            let none = Value::Array(Vec::new());
            let egress = &spec["egress"];
            return [true, !egress.is_null() && *egress != none];
        }
        let mut concerned = [false; 2];
        for name in types {
            match name.as_str() {
                Some("Ingress") => concerned[0] = true,
                Some("Egress") => concerned[1] = true,
                _ => {
                    self.complain(format!(
                        "policyTypes: {name} is not known: both directions are isolated; use \
                         Ingress or Egress"
                    ));
                    concerned = [true; 2];
                }
            }
        }
        concerned
    }

    fn rules(&mut self, list: &Value, at: &str, peers_key: &str) -> Vec<Rule> {
        let list = match list {
            Value::Null => return Vec::new(),
            Value::Array(list) => list,
            _ => {
                self.complain(format!("{at} is not a list: it allows nothing"));
                return Vec::new();
            }
        };
        let mut rules = Vec::new();
        for (i, rule) in list.iter().enumerate() {
            let at = format!("{at}[{i}]");
            rules.push(self.rule(rule, &at, peers_key).unwrap_or_else(|error| {
                self.complain(format!("{at}: {error}: the rule matches nothing"));
                Rule {
                    action: Action::Accept,
                    peers: Peers::Listed(Arc::default()),
                    ports: Ports::Any,
                }
            }));
        }
        rules
    }

    fn rule(&mut self, rule: &Value, at: &str, peers_key: &str) -> Result<Rule, String> {
        let fields = Fields::of(rule, &[peers_key, "ports"])?;
        let peers = fields.list(peers_key)?.unwrap_or_default();
        let ports = fields.list("ports")?.unwrap_or_default();
        Ok(Rule {
            action: Action::Accept,
            peers: if peers.is_empty() {
                Peers::Any
            } else {
                let namespace = self.namespace.clone();
                let at = format!("{at}.{peers_key}");
                let peers = self.understood(peers, &at, |value| peer(value, &namespace));
                Peers::Listed(Arc::new(peers))
            },
            ports: if ports.is_empty() {
                Ports::Any
            } else {
                Ports::Listed(self.understood(ports, &format!("{at}.ports"), port_match))
            },
        })
    }

    /// What can be understood of a list.
    fn understood<T: Ord>(
        &mut self,
        list: &[Value],
        at: &str,
        read: impl Fn(&Value) -> Result<T, String>,
    ) -> SmallSet<T> {
        let mut all = Vec::new();
        for (i, value) in list.iter().enumerate() {
            match read(value) {
                Ok(value) => all.push(value),
                Err(error) => self.complain(format!("{at}[{i}]: {error}: it matches nothing")),
            }
        }
        all.into_iter().collect()
    }
}

fn peer(value: &Value, namespace: &Arc<str>) -> Result<Peer, String> {
    let fields = Fields::of(value, &["ipBlock", "namespaceSelector", "podSelector"])?;
    let [block, namespaces, pods] =
        ["ipBlock", "namespaceSelector", "podSelector"].map(|key| fields.get(key));
    match (block, namespaces, pods) {
        (None, None, None) => Err(
            "no known way to name a peer: use podSelector, namespaceSelector or ipBlock".to_owned(),
        ),
        (Some(block), None, None) => self::block(block).map(Peer::Block),
        (Some(_), ..) => Err("ipBlock cannot be combined with selectors: split the peer".into()),
        (None, namespaces, pods) => {
            let namespaces = match namespaces {
                None => Namespaces::Named(namespace.clone()),
                Some(value) => Namespaces::Selected(
                    selector(value).map_err(|e| format!("namespaceSelector: {e}"))?,
                ),
            };
            let pods = pods.map_or(Ok(Selector::everything()), selector);
            let pods = pods.map_err(|e| format!("podSelector: {e}"))?;
            Ok(Peer::Pods { namespaces, pods })
        }
    }
}

fn block(value: &Value) -> Result<IpBlock, String> {
    let fields = Fields::of(value, &["cidr", "except"])?;
    let block = fields.get("cidr").ok_or("ipBlock has no cidr: give one")?;
    let except = fields.list("except")?.unwrap_or_default();
    let except: Result<Vec<_>, _> = except.iter().map(cidr).collect();
    IpBlock::new(cidr(block)?, except?).map_err(|e| e.to_string())
}

fn port_match(value: &Value) -> Result<PortMatch, String> {
    let fields = Fields::of(value, &["protocol", "port", "endPort"])?;
    let name = fields.text("protocol")?;
    let protocol = Protocol::parse(name).ok_or_else(|| {
        let name = name.unwrap_or_default();
        format!("protocol {name:?} is not known: use TCP, UDP or SCTP")
    })?;
    let last = fields.number("endPort")?;
    let port = match (fields.get("port"), last) {
        (None, None) => PortSpec::Any,
        (Some(Value::String(name)), None) => PortSpec::Named(name.as_str().into()),
        (Some(Value::Number(_)), last) => {
            let first = number(fields.number("port")?.unwrap_or_default())?;
            let last = last.map_or(Ok(first), number)?;
            if last < first {
                return Err(format!("endPort {last} is below port {first}: swap them"));
            }
            PortSpec::Range(first, last)
        }
        (None | Some(Value::String(_)), Some(_)) => {
            return Err("endPort needs a port that is a number: give one".to_owned());
        }
        (Some(_), _) => return Err("port is neither a number nor a name".to_owned()),
    };
    Ok(PortMatch { protocol, port })
}
