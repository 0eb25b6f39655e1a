//! Who is reached how.

use std::sync::Arc;

use super::*;

fn node(ips: &[&str], cidrs: &[&str]) -> Node {
    Node {
        internal_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        ..Node::default()
    }
}

fn cluster(nodes: Vec<(&str, Node)>) -> Desired {
    Desired {
        node_name: "a".into(),
        nodes: nodes
            .into_iter()
            .map(|(name, node)| (name.into(), Arc::new(node)))
            .collect(),
        ..Desired::default()
    }
}

fn three() -> Desired {
    cluster(vec![
        (
            "a",
            node(
                &["192.0.2.1", "2001:db8::1"],
                &["10.0.1.0/24", "fd00:1::/64"],
            ),
        ),
        (
            "b",
            node(
                &["2001:db8::2", "192.0.2.2"],
                &["10.0.2.0/24", "fd00:2::/64"],
            ),
        ),
        (
            "c",
            node(
                &["198.51.100.3", "2001:db8:1::3"],
                &["10.0.3.0/24", "fd00:3::/64"],
            ),
        ),
    ])
}

fn near(addresses: &[&str]) -> BTreeSet<IpAddr> {
    addresses.iter().map(|a| a.parse().unwrap()).collect()
}

fn routes(plan: &Plan) -> Vec<String> {
    let own = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
    let routes = plan.routes(Some(7), &own);
    routes
        .iter()
        .map(|(to, hop)| match (hop.device, hop.source) {
            (Some(device), Some(source)) => format!("{to} dev {device} src {source}"),
            _ => format!("{to} via {}", hop.gateway),
        })
        .collect()
}

#[test]
fn every_block_of_a_node_on_the_link_gets_its_address_of_the_same_family() {
    let plan = Plan::of(Routing::Direct, &three(), &BTreeSet::new());
    assert_eq!(
        routes(&plan),
        [
            "10.0.2.0/24 via 192.0.2.2",
            "10.0.3.0/24 via 198.51.100.3",
            "fd00:2::/64 via 2001:db8::2",
            "fd00:3::/64 via 2001:db8:1::3",
        ]
    );
    assert!(!plan.needs_device && plan.tunnels.is_empty());
    assert_eq!(plan.mtu(1500), 1500);
    let odd = cluster(vec![("c", node(&["192.0.2.3"], &["fd00:3::/64"]))]);
    let plan = Plan::of(Routing::Direct, &odd, &BTreeSet::new());
    assert!(plan.problems[0].contains("Node c"), "{:?}", plan.problems);
}

#[test]
fn auto_takes_the_tunnel_where_a_router_is_between() {
    let plan = Plan::of(
        Routing::Auto,
        &three(),
        &near(&["192.0.2.2", "2001:db8::2"]),
    );
    assert_eq!(
        routes(&plan),
        [
            "10.0.2.0/24 via 192.0.2.2",
            "10.0.3.0/24 dev 7 src 192.0.2.1",
            "fd00:2::/64 via 2001:db8::2",
            "fd00:3::/64 dev 7 src 2001:db8::1",
        ]
    );
    let flags = |net: &str| plan.tunnels.get(&net.parse().unwrap()).map(|it| it.flags);
    assert_eq!(flags("fd00:3::/64"), Some(TunnelFlags::SEND));
    assert_eq!(
        flags("198.51.100.3/32"),
        Some(TunnelFlags::SEND | TunnelFlags::NODE)
    );
    // Taken from there, but not sent there.
    assert_eq!(flags("10.0.2.0/24"), Some(TunnelFlags::V6));
    assert_eq!(flags("10.0.1.0/24"), Some(TunnelFlags::LOCAL));
    assert_eq!(flags("192.0.2.1/32"), None);
    assert_eq!(plan.mtu(1500), 1450);
    assert_eq!(plan.mtu(9000), 8950);
    assert_eq!(plan.mtu(1280), 1280, "IPv6 needs as much");
    assert_eq!(
        plan.too_short(1280),
        None,
        "tunnel packets over IPv4 go in fragments"
    );
    let alone = cluster(vec![
        ("a", node(&["2001:db8::1"], &["fd00:1::/64"])),
        ("c", node(&["2001:db8:1::3"], &["fd00:3::/64"])),
    ]);
    let plan = Plan::of(Routing::Auto, &alone, &BTreeSet::new());
    assert_eq!((plan.mtu(1350), plan.too_short(1350)), (1280, None));
    let problem = plan.too_short(1349).expect("a problem");
    assert!(problem.contains("raise it to 1350"), "{problem}");
}

#[test]
fn auto_needs_no_device_on_one_link() {
    let all = near(&["192.0.2.2", "2001:db8::2", "198.51.100.3", "2001:db8:1::3"]);
    let plan = Plan::of(Routing::Auto, &three(), &all);
    assert!(!plan.needs_device && plan.tunneled.is_empty());
    assert_eq!(plan.direct.len(), 4);
    // A block that only a tunnel leads to takes the others of its node along.
    let mut mixed = three();
    mixed.nodes.insert(
        "c".into(),
        Arc::new(node(&["198.51.100.3"], &["10.0.3.0/24", "fd00:3::/64"])),
    );
    let plan = Plan::of(Routing::Auto, &mixed, &all);
    assert_eq!(plan.tunneled.len(), 2);
    assert!(plan.problems.is_empty(), "{:?}", plan.problems);
}

#[test]
fn native_writes_nothing() {
    assert_eq!(
        Plan::of(Routing::Native, &three(), &BTreeSet::new()),
        Plan {
            v6: true,
            ..Plan::default()
        }
    );
}

#[test]
fn tunnels_lead_to_an_address_of_a_family_that_both_have() {
    let mut desired = three();
    desired.nodes.insert(
        "a".into(),
        Arc::new(node(&["2001:db8::1"], &["10.0.1.0/24"])),
    );
    let plan = Plan::of(Routing::Vxlan, &desired, &BTreeSet::new());
    let far = plan.tunnels[&"10.0.3.0/24".parse().unwrap()];
    assert_eq!(far.remote[..4], [0x20, 0x01, 0x0d, 0xb8]);
    assert_eq!(plan.mtu(1500), 1430);
    assert_eq!(
        plan.too_short(1280),
        None,
        "its Pods have no IPv6 addresses"
    );
    // The annotation says where, whatever else the node has.
    let annotated = Node {
        tunnel_address: Some("203.0.113.9".parse().unwrap()),
        ..node(&["198.51.100.3"], &["10.0.3.0/24"])
    };
    let plan = Plan::of(
        Routing::Vxlan,
        &cluster(vec![("a", node(&["192.0.2.1"], &[])), ("c", annotated)]),
        &BTreeSet::new(),
    );
    assert_eq!(
        plan.tunnels[&"10.0.3.0/24".parse().unwrap()].remote[..4],
        [203, 0, 113, 9]
    );
    assert!(
        plan.tunnels
            .contains_key(&"203.0.113.9/32".parse().unwrap())
    );
    let lost = cluster(vec![
        ("a", node(&["192.0.2.1"], &[])),
        ("c", node(&["2001:db8::3"], &["fd00:3::/64"])),
    ]);
    let plan = Plan::of(Routing::Vxlan, &lost, &BTreeSet::new());
    assert!(plan.problems[0].contains("Node c"), "{:?}", plan.problems);
}
