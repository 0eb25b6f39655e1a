//! One test a rule of the API's semantics, on policies built by hand.

use std::{collections::BTreeSet, sync::Arc};

use super::*;
use crate::{
    labels::{Labels, Selector},
    model::{
        Action, ContainerPort, IpBlock, Namespaces, Peer, PolicyId, PolicyKind, PortMatch,
        PortSpec, Protocol, Rank, Subject, Tier,
    },
};

fn pod(namespace: &str, labels: &[(&str, &str)]) -> PodIdentity {
    PodIdentity {
        namespace: namespace.into(),
        namespace_labels: Some(Arc::new([("name", namespace)].into_iter().collect())),
        labels: Arc::new(labels.iter().copied().collect::<Labels>()),
        ports: [ContainerPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 8080,
        }]
        .into(),
    }
}

fn labels(labels: &[(&str, &str)]) -> Selector {
    let mut selector = Selector::everything();
    for (key, value) in labels {
        selector.add_label(key, value).unwrap();
    }
    selector
}

fn policy(ingress: Option<Vec<Rule>>, egress: Option<Vec<Rule>>) -> Policy {
    Policy {
        id: PolicyId::network("a", "p"),
        rank: Rank::NETWORK,
        subject: Subject {
            namespaces: Namespaces::Named("a".into()),
            pods: Selector::everything(),
        },
        ingress,
        egress,
    }
}

fn rule(peers: &[Peer], ports: &[(Protocol, PortSpec)]) -> Rule {
    let ports: BTreeSet<_> = ports
        .iter()
        .map(|(protocol, port)| PortMatch {
            protocol: *protocol,
            port: port.clone(),
        })
        .collect();
    Rule {
        action: Action::Accept,
        peers: match peers {
            [] => Peers::Any,
            _ => Peers::Listed(Arc::new(peers.iter().cloned().collect())),
        },
        ports: if ports.is_empty() {
            Ports::Any
        } else {
            Ports::Listed(ports.into_iter().collect())
        },
    }
}

fn judge(policies: &[Policy], source: Option<&PodIdentity>, to: Option<&PodIdentity>) -> bool {
    judge_port(policies, source, to, 6, 8080)
}

/// From 10.0.0.1 to 10.0.0.2.
fn flow<'a>(
    source: Option<&'a PodIdentity>,
    destination: Option<&'a PodIdentity>,
    protocol: u8,
    port: u16,
) -> Flow<'a> {
    Flow {
        source: Party {
            address: "10.0.0.1".parse().unwrap(),
            pod: source,
        },
        destination: Party {
            address: "10.0.0.2".parse().unwrap(),
            pod: destination,
        },
        from_own_node: false,
        protocol,
        port,
    }
}

fn judge_port(
    policies: &[Policy],
    source: Option<&PodIdentity>,
    destination: Option<&PodIdentity>,
    protocol: u8,
    port: u16,
) -> bool {
    let flow = flow(source, destination, protocol, port);
    evaluate(policies, &flow).allowed()
}

#[test]
fn isolation_is_per_direction() {
    let (a, b) = (pod("a", &[]), pod("b", &[]));
    let deny_in = [policy(Some(vec![]), None)];
    assert!(!judge(&deny_in, Some(&b), Some(&a)));
    assert!(judge(&deny_in, Some(&a), Some(&b)));
    let deny_out = [policy(None, Some(vec![]))];
    assert!(judge(&deny_out, Some(&b), Some(&a)));
    assert!(!judge(&deny_out, Some(&a), Some(&b)));
}

#[test]
fn policies_add_up_and_both_sides_must_allow() {
    let (a, b) = (pod("a", &[]), pod("b", &[]));
    let deny = policy(Some(vec![]), None);
    let allow = policy(Some(vec![rule(&[], &[])]), None);
    assert!(judge(&[deny.clone(), allow.clone()], Some(&b), Some(&a)));
    let mut b_out = policy(None, Some(vec![]));
    b_out.subject.namespaces = Namespaces::Named("b".into());
    assert!(!judge(&[deny, allow, b_out], Some(&b), Some(&a)));
}

#[test]
fn a_peer_is_both_selectors_and_peers_are_alternatives() {
    let to = pod("a", &[]);
    let web_of = |namespaces| Peer::Pods {
        namespaces,
        pods: labels(&[("app", "web")]),
    };
    let own = web_of(Namespaces::Named("a".into()));
    let of_b = web_of(Namespaces::Selected(labels(&[("name", "b")])));
    let only_own = [policy(
        Some(vec![rule(std::slice::from_ref(&own), &[])]),
        None,
    )];
    let either = [policy(Some(vec![rule(&[own, of_b], &[])]), None)];
    for (source, own_alone, with_b) in [
        (pod("a", &[("app", "web")]), true, true),
        (pod("b", &[("app", "web")]), false, true),
        (pod("b", &[]), false, false),
        (pod("c", &[("app", "web")]), false, false),
    ] {
        assert_eq!(
            judge(&only_own, Some(&source), Some(&to)),
            own_alone,
            "{source:?}"
        );
        assert_eq!(
            judge(&either, Some(&source), Some(&to)),
            with_b,
            "{source:?}"
        );
    }
}

#[test]
fn an_empty_namespace_selector_means_pods_alone() {
    let to = pod("a", &[]);
    let every_pod = Peer::Pods {
        namespaces: Namespaces::Selected(Selector::everything()),
        pods: Selector::everything(),
    };
    let policies = [policy(Some(vec![rule(&[every_pod], &[])]), None)];
    assert!(judge(&policies, Some(&pod("z", &[])), Some(&to)));
    assert!(
        !judge(&policies, None, Some(&to)),
        "an address without a Pod is no Pod"
    );
    let mut stranger = pod("z", &[]);
    stranger.namespace_labels = None;
    assert!(
        !judge(&policies, Some(&stranger), Some(&to)),
        "its namespace is not known yet"
    );
}

#[test]
fn blocks_match_pods_like_any_address() {
    let to = pod("a", &[]);
    let block = |cidr: &str, except: &[&str]| {
        let except = except.iter().map(|e| e.parse().unwrap());
        Peer::Block(IpBlock::new(cidr.parse().unwrap(), except).unwrap())
    };
    let allow = |peer| [policy(Some(vec![rule(&[peer], &[])]), None)];
    let source = pod("b", &[]);
    assert!(judge(
        &allow(block("10.0.0.0/24", &[])),
        Some(&source),
        Some(&to)
    ));
    assert!(judge(&allow(block("10.0.0.0/24", &[])), None, Some(&to)));
    let with_hole = allow(block("10.0.0.0/24", &["10.0.0.0/31"]));
    assert!(!judge(&with_hole, Some(&source), Some(&to)));
}

#[test]
fn ports_are_the_destinations() {
    let (a, b) = (pod("a", &[]), pod("b", &[]));
    let ports = [
        (Protocol::Tcp, PortSpec::Range(80, 90)),
        (Protocol::Udp, PortSpec::Any),
        (Protocol::Tcp, PortSpec::Named("http".into())),
    ];
    let policies = [policy(None, Some(vec![rule(&[], &ports)]))];
    for (protocol, port, expected) in [
        (6, 79, false),
        (6, 80, true),
        (6, 90, true),
        (6, 91, false),
        (17, 1, true),
        (132, 80, false),
        (6, 8080, true),
        (1, 0, false),
    ] {
        let verdict = judge_port(&policies, Some(&a), Some(&b), protocol, port);
        assert_eq!(verdict, expected, "protocol {protocol} port {port}");
    }
    assert!(
        !judge(&policies, Some(&a), None),
        "a name without a Pod is no port"
    );
}

#[test]
fn no_ports_means_every_protocol() {
    let (a, b) = (pod("a", &[]), pod("b", &[]));
    let policies = [policy(Some(vec![rule(&[], &[])]), None)];
    assert!(judge_port(&policies, Some(&b), Some(&a), 1, 0));
    assert!(judge_port(&policies, Some(&b), Some(&a), 132, 7));
}

#[test]
fn exemptions() {
    let a = pod("a", &[]);
    let policies = [policy(Some(vec![]), Some(vec![]))];
    let address = "10.0.0.9".parse().unwrap();
    let me = Party {
        address,
        pod: Some(&a),
    };
    let node = Party {
        address: "192.0.2.1".parse().unwrap(),
        pod: None,
    };
    let to_self = Flow {
        source: me,
        destination: me,
        from_own_node: false,
        protocol: 6,
        port: 80,
    };
    assert!(
        evaluate(&policies, &to_self).allowed(),
        "a Pod reaches itself"
    );
    let probe = Flow {
        source: node,
        destination: me,
        from_own_node: true,
        protocol: 6,
        port: 80,
    };
    assert!(evaluate(&policies, &probe).allowed(), "its node reaches it");
    let other = Flow {
        from_own_node: false,
        ..probe
    };
    assert!(
        !evaluate(&policies, &other).allowed(),
        "another node does not"
    );
    let to_node = Flow {
        source: me,
        destination: node,
        ..other
    };
    assert_eq!(evaluate(&policies, &to_node).egress, Side::Denied(None));
}

#[test]
fn the_decision_names_every_rule_that_allows() {
    let (a, b) = (pod("a", &[]), pod("b", &[]));
    let nobody = Rule {
        action: Action::Accept,
        peers: Peers::Listed(Arc::default()),
        ports: Ports::Any,
    };
    let policies = [policy(
        Some(vec![nobody, rule(&[], &[]), rule(&[], &[])]),
        None,
    )];
    let flow = flow(Some(&b), Some(&a), 6, 1);
    let Side::Allowed(rules) = evaluate(&policies, &flow).ingress else {
        panic!("not allowed")
    };
    assert_eq!(rules.iter().map(|r| r.index).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(rules[0].to_string(), "networkpolicy a/p ingress[1]");
}

/// A policy of the cluster for every Pod of namespace `a`.
fn cluster(name: &str, tier: Tier, priority: u16, rules: Vec<(Action, Rule)>) -> Policy {
    let rules = rules
        .into_iter()
        .map(|(action, rule)| Rule { action, ..rule })
        .collect();
    Policy {
        id: PolicyId {
            kind: PolicyKind::ClusterNetworkPolicy,
            namespace: "".into(),
            name: name.into(),
        },
        rank: Rank { tier, priority },
        subject: Subject {
            namespaces: Namespaces::Selected(labels(&[("name", "a")])),
            pods: Selector::everything(),
        },
        ingress: Some(rules),
        egress: None,
    }
}

#[test]
fn tiers_are_asked_one_after_the_other() {
    use Action::{Accept, Deny, Pass};
    use Tier::{Admin, Baseline};
    let (a, b) = (pod("a", &[]), pod("b", &[]));
    let any = |action| vec![(action, rule(&[], &[]))];
    let open = policy(Some(vec![rule(&[], &[])]), None);
    let shut = policy(Some(vec![]), None);
    let admin = |action| cluster("x", Admin, 10, any(action));
    let baseline = |action| cluster("y", Baseline, 10, any(action));
    for (what, policies, expected) in [
        (
            "Admin before NetworkPolicy",
            vec![admin(Deny), open.clone()],
            false,
        ),
        (
            "Admin before NetworkPolicy",
            vec![admin(Accept), shut.clone()],
            true,
        ),
        (
            "Pass leaves it to NetworkPolicy",
            vec![admin(Pass), shut.clone()],
            false,
        ),
        (
            "Pass leaves it to Baseline",
            vec![admin(Pass), baseline(Deny)],
            false,
        ),
        (
            "NetworkPolicy before Baseline",
            vec![open, baseline(Deny)],
            true,
        ),
        (
            "no way around isolation",
            vec![shut, baseline(Accept)],
            false,
        ),
        (
            "Baseline decides where nobody does",
            vec![baseline(Deny)],
            false,
        ),
        ("nobody decides", vec![baseline(Pass)], true),
        ("the subject is another", vec![admin(Deny)], true),
    ] {
        let to = if what.starts_with("the subject") {
            &b
        } else {
            &a
        };
        assert_eq!(judge(&policies, Some(&b), Some(to)), expected, "{what}");
    }
}

#[test]
fn the_lowest_priority_and_the_first_rule_decide() {
    use Action::{Accept, Deny, Pass};
    let (a, b) = (pod("a", &[]), pod("b", &[]));
    let http = rule(&[], &[(Protocol::Tcp, PortSpec::Range(8080, 8080))]);
    let other = rule(&[], &[(Protocol::Udp, PortSpec::Any)]);
    let deny = cluster("a", Tier::Admin, 20, vec![(Deny, rule(&[], &[]))]);
    let accept = cluster(
        "b",
        Tier::Admin,
        10,
        vec![(Deny, other.clone()), (Accept, http)],
    );
    let policies = [deny.clone(), accept];
    assert!(judge(&policies, Some(&b), Some(&a)));
    assert!(!judge_port(&policies, Some(&b), Some(&a), 6, 80));
    assert!(!judge_port(&policies, Some(&b), Some(&a), 17, 8080));
    // Pass jumps over what is left of its tier, also over other policies.
    let pass = cluster("c", Tier::Admin, 5, vec![(Pass, rule(&[], &[]))]);
    assert!(judge(&[deny.clone(), pass], Some(&b), Some(&a)));
    // Of equal priority the name decides, so that every node says the same.
    let accepts = cluster("A", Tier::Admin, 20, vec![(Accept, rule(&[], &[]))]);
    assert!(judge(&[deny, accepts], Some(&b), Some(&a)));
}

#[test]
fn the_trace_names_what_decided_and_what_nearly_did() {
    let (a, b) = (pod("a", &[]), pod("b", &[]));
    let web = Peer::Pods {
        namespaces: Namespaces::Named("a".into()),
        pods: labels(&[("app", "web")]),
    };
    let admin = cluster(
        "x",
        Tier::Admin,
        1,
        vec![(Action::Pass, rule(&[], &[(Protocol::Tcp, PortSpec::Any)]))],
    );
    let policies = [
        policy(Some(vec![rule(&[web], &[]), rule(&[], &[])]), None),
        admin,
    ];
    let flow = flow(Some(&b), Some(&a), 6, 1);
    let traced = crate::trace(&policies, Direction::Ingress, &flow);
    assert_eq!(traced.side, evaluate(&policies, &flow).ingress);
    let said: Vec<_> = traced
        .rules
        .iter()
        .map(|r| {
            (
                r.rule.to_string(),
                r.action,
                r.matches(),
                r.nearly(),
                r.decided,
            )
        })
        .collect();
    let line = |name: &str, action, matches, nearly, decided| {
        (name.to_owned(), action, matches, nearly, decided)
    };
    assert_eq!(
        said,
        [
            line(
                "clusternetworkpolicy x ingress[0]",
                Action::Pass,
                true,
                false,
                false
            ),
            line(
                "networkpolicy a/p ingress[0]",
                Action::Accept,
                false,
                true,
                false
            ),
            line(
                "networkpolicy a/p ingress[1]",
                Action::Accept,
                true,
                false,
                true
            ),
        ]
    );
}
