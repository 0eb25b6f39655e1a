//! Policies as the API has them.

use hachi_policy::{
    Namespaces, Peer, Peers, Policy, PolicyKind, PortMatch, PortSpec, Ports, Requirement, Rule,
    Selector, Subject,
};
use serde_json::{Value, json};

fn selector_json(selector: &Selector) -> Value {
    let expressions: Vec<Value> = selector
        .requirements()
        .map(|r| match r {
            Requirement::In(k, v) => {
                json!({"key": k, "operator": "In", "values": v.iter().collect::<Vec<_>>()})
            }
            Requirement::NotIn(k, v) => {
                json!({"key": k, "operator": "NotIn", "values": v.iter().collect::<Vec<_>>()})
            }
            Requirement::Exists(k) => json!({"key": k, "operator": "Exists"}),
            Requirement::DoesNotExist(k) => json!({"key": k, "operator": "DoesNotExist"}),
        })
        .collect();
    json!({"matchExpressions": expressions})
}

pub(super) fn policy_json(policy: &Policy) -> Value {
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
