//! `NetworkPolicy` objects at the boundary.

use std::sync::Arc;

use crate::objects::{endpoint, index, object, pod};
use hachi_index::{Enforcement, Index};
use hachi_policy::{Action, Namespaces, Peer, Peers, Policy, PortSpec, Ports, Protocol, Rule};
use serde_json::{Value, json};

/// The policy as it applies to a Pod of its namespace, and what was complained of.
fn applied(spec: Value) -> (Option<Arc<Policy>>, Vec<String>) {
    let policy = json!({"kind": "NetworkPolicy", "metadata": {"namespace": "a", "name": "p"},
                        "spec": spec});
    let mut index: Index = index([object(pod("web", "1", "10.0.0.1")), object(policy)]);
    index.add_endpoint(endpoint(Some(("web", "1")), 7, "10.0.0.1"));
    let endpoint = index
        .desired()
        .endpoints
        .values()
        .next()
        .expect("one endpoint")
        .clone();
    let Enforcement::Pod { policies, .. } = endpoint.enforcement else {
        panic!("{endpoint:?}")
    };
    let problems = index.problems().iter().map(ToString::to_string).collect();
    (policies.into_iter().next(), problems)
}

fn policy(spec: Value) -> Policy {
    let (policy, problems) = applied(spec);
    assert_eq!(problems, Vec::<String>::new());
    Policy::clone(&policy.expect("it selects the Pod"))
}

fn one_rule(spec: Value) -> (Rule, Vec<String>) {
    let (policy, problems) = applied(spec);
    let mut rules = policy
        .expect("it selects the Pod")
        .ingress
        .clone()
        .expect("ingress rules");
    assert_eq!(rules.len(), 1);
    (rules.remove(0), problems)
}

#[test]
fn policy_types_default() {
    for (spec, ingress, egress) in [
        (json!({}), true, false),
        (json!({"egress": []}), true, false),
        (json!({"egress": [{}]}), true, true),
        (json!({"policyTypes": []}), true, false),
        (
            json!({"policyTypes": ["Egress"], "ingress": [{}]}),
            false,
            true,
        ),
        (
            json!({"policyTypes": ["Ingress"], "egress": [{}]}),
            true,
            false,
        ),
        (json!({"policyTypes": ["Egress", "Ingress"]}), true, true),
    ] {
        let mut full = spec.clone();
        full["podSelector"] = json!({});
        let policy = policy(full);
        assert_eq!(
            (policy.ingress.is_some(), policy.egress.is_some()),
            (ingress, egress),
            "{spec}"
        );
    }
}

#[test]
fn empty_and_absent_lists() {
    let none = policy(json!({"podSelector": {}, "ingress": []}));
    assert_eq!(none.ingress, Some(vec![]), "nothing is allowed");
    for rule in [json!({}), json!({"from": [], "ports": []})] {
        let all = policy(json!({"podSelector": {}, "ingress": [rule]}));
        assert_eq!(
            all.ingress,
            Some(vec![Rule {
                action: Action::Accept,
                peers: Peers::Any,
                ports: Ports::Any
            }])
        );
    }
}

#[test]
fn selectors_of_a_peer_are_one() {
    let spec = json!({"podSelector": {}, "ingress": [{"from": [
        {"podSelector": {"matchLabels": {"x": "1"}}},
        {"namespaceSelector": {}},
        {"namespaceSelector": {"matchLabels": {"n": "1"}}, "podSelector": {
            "matchExpressions": [{"key": "x", "operator": "Exists"}]}},
    ]}]});
    let (rule, problems) = one_rule(spec);
    assert_eq!(problems, Vec::<String>::new());
    let Peers::Listed(peers) = rule.peers else {
        panic!("any peer")
    };
    let described: Vec<String> = peers
        .iter()
        .map(|peer| match peer {
            Peer::Pods {
                namespaces: Namespaces::Named(name),
                pods,
            } => format!("{name}: {pods}"),
            Peer::Pods {
                namespaces: Namespaces::Selected(s),
                pods,
            } => format!("{{{s}}}: {pods}"),
            Peer::Block(block) => block.cidr().to_string(),
        })
        .collect();
    assert_eq!(described, ["a: x=1", "{<all>}: <all>", "{n=1}: x"]);
}

#[test]
fn ports_of_every_kind() {
    let (rule, problems) = one_rule(json!({"podSelector": {}, "ingress": [{"ports": [
        {"port": 80}, {"protocol": "UDP", "port": 53, "endPort": 60}, {"protocol": "SCTP"},
        {"port": "http"},
    ]}]}));
    assert_eq!(problems, Vec::<String>::new());
    let Ports::Listed(ports) = rule.ports else {
        panic!("any port")
    };
    let ports: Vec<_> = ports.into_iter().map(|p| (p.protocol, p.port)).collect();
    assert_eq!(
        ports,
        [
            (Protocol::Tcp, PortSpec::Range(80, 80)),
            (Protocol::Tcp, PortSpec::Named("http".into())),
            (Protocol::Udp, PortSpec::Range(53, 60)),
            (Protocol::Sctp, PortSpec::Any),
        ]
    );
}

#[test]
fn what_makes_no_sense_matches_nothing_and_is_told() {
    for peer in [
        json!({}),
        json!({"ipBlock": {"cidr": "10.0.0.0"}}),
        json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/8"]}}),
        json!({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}),
        json!({"podSelector": {"matchExpressions": [{"key": "x", "operator": "Gt"}]}}),
        json!({"namespaceSelector": {"matchExpressions": [{"key": "x", "operator": "In"}]}}),
    ] {
        let spec = json!({"podSelector": {}, "ingress": [{"from": [peer]}]});
        let (rule, problems) = one_rule(spec.clone());
        assert_eq!(rule.peers, Peers::Listed(Arc::default()), "{spec}");
        assert_eq!(problems.len(), 1, "{spec}");
        assert!(
            problems[0].starts_with("NetworkPolicy a/p: ingress[0].from[0]: "),
            "{problems:?}"
        );
    }
    for port in [
        json!({"port": 0}),
        json!({"port": 65536}),
        json!({"port": 80, "endPort": 79}),
        json!({"endPort": 79}),
        json!({"port": "http", "endPort": 79}),
        json!({"protocol": "ICMP"}),
    ] {
        let spec = json!({"podSelector": {}, "ingress": [{"ports": [port]}]});
        let (rule, problems) = one_rule(spec.clone());
        assert_eq!(rule.ports, Ports::Listed([].into()), "{spec}");
        assert_eq!(problems.len(), 1, "{spec}");
    }
}

#[test]
fn a_broken_peer_leaves_the_others_alone() {
    let (rule, problems) =
        one_rule(json!({"podSelector": {}, "ingress": [{"from": [{}, {"podSelector": {}}]}]}));
    let Peers::Listed(peers) = rule.peers else {
        panic!("any peer")
    };
    assert_eq!((peers.len(), problems.len()), (1, 1));
}

#[test]
fn a_broken_subject_isolates_the_namespace() {
    let (policy, problems) = applied(json!({
        "podSelector": {"matchExpressions": [{"key": "x", "operator": "Like", "values": ["y"]}]},
        "ingress": [{}],
    }));
    assert_eq!(policy.expect("it selects every Pod").ingress, Some(vec![]));
    assert_eq!(problems.len(), 1);
}

#[test]
fn an_unknown_type_isolates_both_directions() {
    let (policy, problems) = applied(json!({"podSelector": {}, "policyTypes": ["Forward"]}));
    let policy = policy.expect("it selects the Pod");
    assert_eq!(
        (&policy.ingress, &policy.egress),
        (&Some(vec![]), &Some(vec![]))
    );
    assert_eq!(problems.len(), 1);
}

#[test]
fn what_this_version_does_not_know_allows_nothing() {
    // The one way in which a peer is named is unknown: that is not "any peer".
    for rule in [
        json!({"from": [{"serviceAccountSelector": {}}]}),
        json!({"from": [{"podSelector": {}, "serviceAccountSelector": {}}]}),
        json!({"from": [{"podSelector": {"matchNames": ["x"]}}]}),
        json!({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "only": ["10.1.0.0/16"]}}]}),
        json!({"fromServices": [{"name": "x"}]}),
        json!({"from": {"podSelector": {}}}),
        json!("all"),
    ] {
        let (read, problems) = one_rule(json!({"podSelector": {}, "ingress": [rule]}));
        assert_eq!(read.peers, Peers::Listed(Arc::default()), "{rule}");
        assert_eq!(problems.len(), 1, "{rule}: {problems:?}");
    }
    for port in [
        json!({"port": 80, "appProtocol": "http"}),
        json!({"port": [80]}),
        json!({"port": 80.5}),
        json!({"port": 80, "endPort": "90"}),
    ] {
        let spec = json!({"podSelector": {}, "ingress": [{"ports": [port]}]});
        let (read, problems) = one_rule(spec);
        assert_eq!(read.ports, Ports::Listed([].into()), "{port}");
        assert_eq!(problems.len(), 1, "{port}: {problems:?}");
    }
    let spec = json!({"podSelector": {}, "ingress": [{}], "action": "Audit"});
    let (policy, problems) = applied(spec);
    let policy = policy.expect("it selects the Pod");
    assert_eq!(
        (&policy.ingress, &policy.egress),
        (&Some(vec![]), &Some(vec![]))
    );
    assert_eq!(problems.len(), 1);
    let (policy, problems) = applied(json!({"podSelector": {}, "ingress": {"from": []}}));
    assert_eq!(policy.expect("it selects the Pod").ingress, Some(vec![]));
    assert_eq!(problems.len(), 1);
}
