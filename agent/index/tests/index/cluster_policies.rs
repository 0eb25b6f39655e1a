//! Policies of the cluster at the boundary.

use std::sync::Arc;

use crate::objects::{endpoint, index, namespace, object, pod};
use hachi_index::{Enforcement, Index, Kind};
use hachi_policy::{Action, Peer, Peers, Policy, PortSpec, Ports, Protocol, Rank, Rule, Tier};
use serde_json::{Value, json};

fn known(objects: impl IntoIterator<Item = Value>) -> Index {
    let mut index = index([
        namespace("a", json!({"team": "x"})),
        object(pod("web", "1", "10.0.0.1")),
    ]);
    index.add_endpoint(endpoint(Some(("web", "1")), 7, "10.0.0.1"));
    for o in objects {
        index.apply(object(o));
    }
    index
}

fn selecting(index: &mut Index) -> Vec<Arc<Policy>> {
    let endpoint = index.desired().endpoints.values().next();
    match &endpoint.expect("one endpoint").enforcement {
        Enforcement::Pod { policies, .. } => policies.clone(),
        other => panic!("{other:?}"),
    }
}

fn cnp(spec: Value) -> Value {
    json!({"kind": "ClusterNetworkPolicy", "metadata": {"name": "p"}, "spec": spec})
}

/// A policy for all Pods with one rule for ingress.
fn one_rule(rule: &Value) -> (Rule, Vec<String>) {
    let mut index = known([cnp(json!({"tier": "Admin", "priority": 1,
        "subject": {"namespaces": {}}, "ingress": [rule]}))]);
    let policies = selecting(&mut index);
    let rules = policies[0].ingress.as_ref().expect("ingress rules");
    assert_eq!(rules.len(), 1);
    let problems = index.problems().iter().map(ToString::to_string).collect();
    (rules[0].clone(), problems)
}

#[test]
fn they_are_asked_by_tier_and_priority() {
    let of = |name: &str, tier: &str, priority: i32| {
        let spec = json!({"tier": tier, "priority": priority, "subject": {"pods": {
            "namespaceSelector": {"matchLabels": {"team": "x"}}, "podSelector": {}}},
            "egress": [{"action": "Deny", "to": [{"networks": ["10.0.0.0/8"]}]}]});
        json!({"kind": "ClusterNetworkPolicy", "metadata": {"name": name}, "spec": spec})
    };
    let mut index = known([
        of("late", "Baseline", 0),
        of("second", "Admin", 20),
        of("first", "Admin", 10),
        json!({"kind": "NetworkPolicy", "metadata": {"namespace": "a", "name": "own"},
               "spec": {"podSelector": {}}}),
        json!({"kind": "BaselineAdminNetworkPolicy", "metadata": {"name": "default"},
               "spec": {"subject": {"namespaces": {}}, "ingress": [
                   {"action": "Deny", "from": [{"namespaces": {}}]}]}}),
        json!({"kind": "AdminNetworkPolicy", "metadata": {"name": "old"},
               "spec": {"priority": 15, "subject": {"namespaces": {}}, "ingress": [
                   {"action": "Allow", "from": [{"namespaces": {}}],
                    "ports": [{"portNumber": {"protocol": "UDP", "port": 53}},
                              {"portRange": {"start": 80, "end": 90}}, {"namedPort": "http"}]}]}}),
    ]);
    assert_eq!(index.problems(), []);
    let policies = selecting(&mut index);
    let names: Vec<&str> = policies.iter().map(|p| &*p.id.name).collect();
    assert_eq!(names, ["first", "old", "second", "own", "late", "default"]);
    assert_eq!(
        policies[4].rank,
        Rank {
            tier: Tier::Baseline,
            priority: 0
        }
    );
    let old = &policies[1].ingress.as_ref().expect("rules")[0];
    assert_eq!(old.action, Action::Accept);
    let Ports::Listed(ports) = &old.ports else {
        panic!("any port")
    };
    assert_eq!(ports.len(), 2 + 3, "a name is one of every protocol");

    // Changes one by one lead where a fresh index leads.
    index.delete(Kind::ClusterNetworkPolicy, "", "second");
    index.delete(Kind::NetworkPolicy, "a", "own");
    let names: Vec<_> = selecting(&mut index)
        .iter()
        .map(|p| p.id.to_string())
        .collect();
    assert_eq!(
        names,
        [
            "clusternetworkpolicy first",
            "adminnetworkpolicy old",
            "clusternetworkpolicy late",
            "baselineadminnetworkpolicy default"
        ]
    );
    index.begin_list(Kind::ClusterNetworkPolicy);
    index.end_list(Kind::ClusterNetworkPolicy);
    assert_eq!(
        selecting(&mut index).len(),
        2,
        "the older kinds are not on that list"
    );
}

#[test]
fn protocols_of_every_kind() {
    let (rule, problems) = one_rule(&json!({"name": "r", "action": "Pass",
        "from": [{"pods": {"podSelector": {"matchLabels": {"app": "db"}}}}, {"namespaces": {}}],
        "protocols": [{"tcp": {"destinationPort": {"number": 80}}},
                      {"udp": {"destinationPort": {"range": {"start": 53, "end": 60}}}},
                      {"sctp": {"destinationPort": {"number": 9}}}]}));
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!(rule.action, Action::Pass);
    let Peers::Listed(peers) = &rule.peers else {
        panic!("any peer")
    };
    assert!(peers.iter().all(|p| matches!(p, Peer::Pods { .. })) && peers.len() == 2);
    let Ports::Listed(ports) = rule.ports else {
        panic!("any port")
    };
    let ports: Vec<_> = ports.into_iter().map(|p| (p.protocol, p.port)).collect();
    assert_eq!(
        ports,
        [
            (Protocol::Tcp, PortSpec::Range(80, 80)),
            (Protocol::Udp, PortSpec::Range(53, 60)),
            (Protocol::Sctp, PortSpec::Range(9, 9)),
        ]
    );
}

#[test]
fn what_is_not_understood_fails_closed() {
    let good = json!([{"namespaces": {}}]);
    for rule in [
        json!({"from": [{}]}),
        json!({"from": []}),
        json!({}),
        json!({"from": [{"namespaces": {}}, {"spiffeIDs": ["x"]}]}),
        json!({"from": [{"namespaces": {}, "pods": {"podSelector": {}}}]}),
        json!({"from": [{"networks": ["10.0.0.0/8"]}]}),
        json!({"from": [{"namespaces": {"matchExpressions": [{"key": "x", "operator": "Gt"}]}}]}),
        json!({"from": good, "protocols": []}),
        json!({"from": good, "protocols": [{"icmp": {}}]}),
        json!({"from": good, "protocols": [{"tcp": {}}]}),
        json!({"from": good, "protocols": [{"tcp": {"destinationPort": {"number": 0}}}]}),
        json!({"from": good, "protocols": [{"tcp": {"sourcePort": {"number": 1}}}]}),
        json!({"from": good, "protocols": [{"udp": {"destinationPort": {"range": {"start": 9, "end": 8}}}}]}),
        json!({"from": good, "unless": good}),
    ] {
        for (action, expected) in [
            ("Accept", (Action::Accept, Peers::Listed(Arc::default()))),
            ("Deny", (Action::Deny, Peers::Any)),
            ("Pass", (Action::Deny, Peers::Any)),
        ] {
            let mut rule = rule.clone();
            rule["action"] = json!(action);
            let (read, problems) = one_rule(&rule);
            assert_eq!((read.action, read.peers), expected, "{rule}");
            assert_eq!(read.ports, Ports::Any, "{rule}");
            assert_eq!(problems.len(), 1, "{rule}: {problems:?}");
        }
    }
    let (read, problems) = one_rule(&json!({"action": "Allow", "from": good}));
    assert_eq!((read.action, read.peers), (Action::Deny, Peers::Any));
    assert_eq!(problems.len(), 1);
}

#[test]
fn a_policy_that_is_not_understood_keeps_its_denials_alone() {
    let rules = json!([{"action": "Accept", "from": [{"namespaces": {}}]},
                       {"action": "Deny", "from": [{"pods": {"podSelector": {}}}]}]);
    for spec in [
        json!({"tier": "Sandbox", "priority": 1, "subject": {"namespaces": {}}}),
        json!({"tier": "Admin", "priority": 1001, "subject": {"namespaces": {}}}),
        json!({"tier": "Admin", "subject": {"namespaces": {}}}),
        json!({"tier": "Admin", "priority": 1, "subject": {"nodes": {}}}),
        json!({"tier": "Admin", "priority": 1}),
        json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "audit": true}),
    ] {
        let mut full = spec.clone();
        full["ingress"] = rules.clone();
        let mut index = known([cnp(full)]);
        let policies = selecting(&mut index);
        let said: Vec<_> = policies[0]
            .ingress
            .iter()
            .flatten()
            .map(|rule| (rule.action, rule.peers.clone()))
            .collect();
        assert_eq!(
            said,
            [
                (Action::Accept, Peers::Listed(Arc::default())),
                (Action::Deny, Peers::Any)
            ],
            "{spec}"
        );
        assert_eq!(index.problems().len(), 1, "{spec}");
    }
}

#[test]
fn a_pod_of_an_unknown_namespace_is_denied_while_there_are_such_policies() {
    let mut index = known([]);
    index.delete(Kind::Namespace, "", "a");
    let enforced = |index: &mut Index| {
        let endpoint = index.desired().endpoints.values().next().cloned();
        endpoint.expect("one endpoint").enforcement
    };
    assert!(matches!(enforced(&mut index), Enforcement::Pod { .. }));
    index.apply(object(cnp(json!({"tier": "Admin", "priority": 1,
        "subject": {"namespaces": {"matchLabels": {"team": "y"}}}}))));
    assert_eq!(enforced(&mut index), Enforcement::Quarantined);
    index.apply(namespace("a", json!({})));
    assert!(matches!(enforced(&mut index), Enforcement::Pod { .. }));
}
