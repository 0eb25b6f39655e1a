//! Which frontends lead where.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hachi_abi::{Scope, ServiceFlags};
use hachi_compile::{Compiled, Compiler, Frontend, HealthChecks, Image, Problem, SlotsId, compile};
use hachi_index::{Desired, Name, Service, ServicePort};
use hachi_policy::Protocol;

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

fn sockets(texts: &[&str]) -> Vec<SocketAddr> {
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

fn service(cluster_ips: &[&str], external_ips: &[&str]) -> Service {
    Service {
        created: 10,
        cluster_ips: ips(cluster_ips),
        external_ips: ips(external_ips),
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
            host_ip: None,
            backends: sockets(&["10.0.0.1:8080", "10.0.0.2:8080", "[fd00::1]:8080"]),
            local_backends: sockets(&["10.0.0.2:8080"]),
            draining: Vec::new(),
        }],
        ..Service::default()
    }
}

fn compiled(services: Vec<(&str, Service)>) -> Compiled {
    compile(&desired(services))
}

fn desired(services: Vec<(&str, Service)>) -> Desired {
    let named = services
        .into_iter()
        .map(|(name, s)| (Name::new("a", name), Arc::new(s)));
    Desired {
        services: named.collect(),
        local_addresses: ["192.0.2.1", "fd00:2::1", "169.254.1.1", "fe80::1"]
            .map(|a| a.parse().unwrap())
            .into(),
        ..Desired::default()
    }
}

fn frontend(address: &str, port: u16, scope: u8) -> Frontend {
    let addr = address.parse().unwrap();
    let proto = if port == 0 { 0 } else { 6 };
    Frontend {
        addr,
        port,
        proto,
        scope,
    }
}

/// The Service at port 80 for packets of Pods, with its backends.
fn at(image: &Image, address: &str) -> (hachi_abi::Service, Vec<SocketAddr>) {
    led(image, &frontend(address, 80, Scope::INTERNAL))
}

fn led(image: &Image, frontend: &Frontend) -> (hachi_abi::Service, Vec<SocketAddr>) {
    (image.services[frontend], image.backends(frontend).to_vec())
}

#[test]
fn every_family_has_its_own_backends() {
    let image = compiled(vec![("web", service(&["10.96.0.1", "fd96::1"], &[]))]).image;
    let v4 = at(&image, "10.96.0.1").1;
    assert_eq!(v4, sockets(&["10.0.0.1:8080", "10.0.0.2:8080"]));
    assert_eq!(at(&image, "fd96::1").1, sockets(&["[fd00::1]:8080"]));
}

#[test]
fn frontends_with_the_same_backends_share_their_slots() {
    let mut both = service(&["10.96.0.1"], &["198.51.100.1"]);
    both.affinity = Some(60);
    let image = compiled(vec![("web", both.clone())]).image;
    let inner = at(&image, "10.96.0.1");
    assert_eq!(inner, at(&image, "198.51.100.1"));
    assert_eq!(inner.0.affinity, 60);
    both.internal_local = true;
    let image = compiled(vec![("web", both)]).image;
    let (inner, outer) = (at(&image, "10.96.0.1"), at(&image, "198.51.100.1"));
    assert_eq!(inner.1, sockets(&["10.0.0.2:8080"]));
    assert_eq!(
        outer.1.len(),
        2,
        "an external address leads everywhere from inside"
    );
    assert_ne!(inner.0.id, outer.0.id);
}

#[test]
fn nothing_here_but_elsewhere_is_silent_and_nothing_at_all_is_not() {
    let mut local = service(&["10.96.0.1", "fd96::1"], &[]);
    local.internal_local = true;
    local.ports[0].local_backends.clear();
    let image = compiled(vec![("web", local.clone())]).image;
    let v4 = at(&image, "10.96.0.1").0;
    assert_eq!((v4.flags, v4.count), (ServiceFlags::DROP_WHEN_EMPTY, 0));
    local.ports[0].backends.clear();
    let image = compiled(vec![("web", local)]).image;
    let v4 = at(&image, "10.96.0.1").0;
    assert_eq!((v4.flags, v4.count), (0, 0));
}

#[test]
fn an_address_has_one_owner() {
    let mut older = service(&["10.96.0.2"], &["198.51.100.1", "10.96.0.1"]);
    older.created = 1;
    older.ports[0].backends = sockets(&["10.0.0.9:1"]);
    let younger = service(&["10.96.0.1"], &["198.51.100.1"]);
    let compiled = compiled(vec![("a-younger", younger), ("b-older", older)]);
    let first = |address: &str| at(&compiled.image, address).1[0].to_string();
    assert_eq!(
        first("198.51.100.1"),
        "10.0.0.9:1",
        "the older Service has it"
    );
    assert_eq!(
        first("10.96.0.1"),
        "10.0.0.1:8080",
        "a Service's own address is its own"
    );
    let losers: BTreeSet<String> = compiled
        .problems
        .iter()
        .filter_map(|problem| match problem {
            Problem::PortTaken { loser, .. } => Some(loser.name.to_string()),
            Problem::TooLarge { .. } => None,
        })
        .collect();
    let expected = ["a/a-younger", "a/b-older"].map(str::to_owned);
    assert_eq!(losers, BTreeSet::from(expected));
}

#[test]
fn a_problem_is_told_once_and_forgotten_when_it_is_over() {
    let one = service(&["10.96.0.1"], &["198.51.100.1"]);
    let two = service(&["10.96.0.2"], &["198.51.100.1"]);
    let both = compiled(vec![("one", one), ("two", two.clone())]);
    let told: Vec<String> = both.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "Service a/two does not get port 80/TCP on 198.51.100.1, which is that of Service a/one: \
             give one of them another"
        ]
    );
    assert!(compiled(vec![("two", two)]).problems.is_empty());
}

/// From outside come the node ports, external and load balancer addresses, but no ClusterIP.
#[test]
fn scopes() {
    let mut all = service(&["10.96.0.1"], &["198.51.100.1"]);
    all.load_balancer_ips = ips(&["198.51.100.2"]);
    all.external_local = true;
    all.ports[0].node_port = Some(30_080);
    let image = compiled(vec![("web", all)]).image;
    let everywhere = sockets(&["10.0.0.1:8080", "10.0.0.2:8080"]);
    let here = sockets(&["10.0.0.2:8080"]);
    for (address, port) in [
        ("198.51.100.1", 80),
        ("198.51.100.2", 80),
        ("192.0.2.1", 30_080),
    ] {
        let inside = led(&image, &frontend(address, port, Scope::INTERNAL));
        let outside = led(&image, &frontend(address, port, Scope::EXTERNAL));
        assert_eq!((inside.1, outside.1), (everywhere.clone(), here.clone()));
    }
    assert_eq!(at(&image, "10.96.0.1").1, everywhere);
    let expected = 2 + 3 * 2 + 2;
    assert_eq!(image.services.len(), expected, "{:?}", image.services);
    for absent in [
        frontend("10.96.0.1", 80, Scope::EXTERNAL),
        frontend("10.96.0.1", 30_080, Scope::INTERNAL),
        frontend("198.51.100.1", 30_080, Scope::EXTERNAL),
        frontend("192.0.2.1", 80, Scope::EXTERNAL),
        frontend("169.254.1.1", 30_080, Scope::INTERNAL),
        frontend("198.51.100.1", 0, Scope::INTERNAL),
    ] {
        assert!(!image.services.contains_key(&absent), "{absent:?}");
    }
    let v6 = led(&image, &frontend("fd00:2::1", 30_080, Scope::INTERNAL)).1;
    assert_eq!(v6, sockets(&["[fd00::1]:8080"]));
}

/// What an address of a Service has no port for is rejected.
#[test]
fn undefined_ports() {
    let image = compiled(vec![("web", service(&["10.96.0.1"], &[]))]).image;
    let service = image.services[&frontend("10.96.0.1", 0, Scope::INTERNAL)];
    assert_eq!(service, hachi_abi::Service::default());
}

/// Only the addresses of load balancers have source ranges, and only those of their family count.
#[test]
fn source_ranges() {
    let mut balanced = service(&["10.96.0.1"], &["198.51.100.1"]);
    balanced.load_balancer_ips = ips(&["198.51.100.1", "198.51.100.2", "2001:db8::1"]);
    let ranges = ["192.0.2.0/24", "192.0.2.64/26"];
    balanced.source_ranges = Some(ranges.iter().map(|r| r.parse().unwrap()).collect());
    let image = compiled(vec![("web", balanced)]).image;
    for (address, asked) in [
        ("10.96.0.1", false),
        ("198.51.100.1", true),
        ("198.51.100.2", true),
    ] {
        let (value, _) = at(&image, address);
        let flag = value.flags & ServiceFlags::SOURCE_RANGES != 0;
        assert_eq!(flag, asked, "{address}");
        let id = SlotsId {
            v6: false,
            id: value.id,
        };
        assert_eq!(image.slots[&id].ranges.len(), 2);
    }
    let (value, _) = at(&image, "2001:db8::1");
    assert_eq!(value.flags, ServiceFlags::SOURCE_RANGES);
    let id = SlotsId {
        v6: true,
        id: value.id,
    };
    assert!(image.slots[&id].ranges.is_empty(), "nobody");
}

/// Every node chooses alike where a packet may arrive at any; not among its own backends.
#[test]
fn tables() {
    let mut all = service(&["10.96.0.1"], &["198.51.100.1", "2001:db8::1"]);
    let table = |image: &Image, address, scope| led(image, &frontend(address, 80, scope)).0.table;
    let image = compiled(vec![("web", all.clone())]).image;
    assert_eq!(table(&image, "198.51.100.1", Scope::EXTERNAL), 1_021);
    assert_eq!(table(&image, "198.51.100.1", Scope::INTERNAL), 0);
    assert_eq!(table(&image, "10.96.0.1", Scope::INTERNAL), 0);
    assert_eq!(
        table(&image, "2001:db8::1", Scope::EXTERNAL),
        0,
        "only one backend"
    );
    all.external_local = true;
    all.ports[0].local_backends = all.ports[0].backends.clone();
    let image = compiled(vec![("web", all)]).image;
    assert_eq!(table(&image, "198.51.100.1", Scope::EXTERNAL), 0);
}

/// A hostPort with an address is on that one alone.
#[test]
fn host_ports() {
    let mut pod = service(&[], &[]);
    pod.ports[0].node_port = Some(80);
    pod.ports[0].host_ip = Some("192.0.2.1".parse().unwrap());
    pod.ports.push(ServicePort {
        port: 81,
        node_port: Some(81),
        host_ip: None,
        ..pod.ports[0].clone()
    });
    let image = compiled(vec![("pod/web", pod)]).image;
    let found: BTreeSet<_> = image.services.keys().map(|f| (f.addr, f.port)).collect();
    let all = [("192.0.2.1", 80), ("192.0.2.1", 81), ("fd00:2::1", 81)];
    let expected = all.map(|(address, port)| (address.parse().unwrap(), port));
    assert_eq!(found, BTreeSet::from(expected));
}

/// Whoever loses a port of the node is named with what for, once for all addresses; who wins does not
/// depend on who came first to this node.
#[test]
fn ports_of_the_node_have_one_owner() {
    let on_node = |created, port, protocol| {
        let mut service = service(&[], &[]);
        service.created = created;
        service.ports[0].node_port = Some(port);
        service.ports[0].protocol = protocol;
        service
    };
    let checked = |created, port| {
        let mut service = service(&[], &[]);
        service.created = created;
        service.health_check = Some(hachi_index::HealthCheck {
            port,
            local_endpoints: 1,
        });
        service
    };
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        let all = [
            ("older", on_node(1, 30_001, protocol)),
            ("younger", on_node(2, 30_001, protocol)),
            ("pod/web", on_node(i64::MAX, 30_001, protocol)),
        ];
        for turn in 0..all.len() {
            let mut order = all.to_vec();
            order.rotate_left(turn);
            let compiled = compiled(order);
            let told: Vec<String> = compiled.problems.iter().map(ToString::to_string).collect();
            let lost = |who: &str| {
                format!(
                    "{who} does not get port 30001/{protocol} on 192.0.2.1, fd00:2::1, which is that \
                     of Service a/older: give one of them another"
                )
            };
            assert_eq!(
                told,
                [lost("the hostPort of Pod a/web"), lost("Service a/younger")]
            );
        }
    }
    // Another protocol is another port.
    let both = vec![
        ("tcp", on_node(1, 30_001, Protocol::Tcp)),
        ("udp", on_node(2, 30_001, Protocol::Udp)),
    ];
    assert!(compiled(both).problems.is_empty());

    // Nothing is translated at a port where the agent answers; and it does not answer at a port that
    // is somebody else's.
    let check = |service| Name::new("a", service);
    let mut compiler = Compiler::default();
    let mut desired = desired(vec![
        ("checked", checked(1, 30_002)),
        ("younger", on_node(2, 30_002, Protocol::Tcp)),
        ("older", on_node(1, 30_003, Protocol::Tcp)),
        ("not-checked", checked(2, 30_003)),
        ("twice", checked(3, 30_002)),
    ]);
    let compiled = compiler.compile(&desired);
    let expected = HealthChecks::from([(30_002, (check("checked"), 1))]);
    assert_eq!(compiled.health_checks, expected);
    assert_eq!(compiled.problems.len(), 3, "{:?}", compiled.problems);
    let at = |port| frontend("192.0.2.1", port, Scope::EXTERNAL);
    assert!(!compiled.image.services.contains_key(&at(30_002)));
    assert!(compiled.image.services.contains_key(&at(30_003)));

    // When the holder goes, the next one has it.
    desired.services.remove(&check("checked"));
    desired.services.remove(&check("older"));
    let compiled = compiler.compile(&desired);
    let expected = HealthChecks::from([(30_003, (check("not-checked"), 1))]);
    assert_eq!(compiled.health_checks, expected);
    assert!(compiled.image.services.contains_key(&at(30_002)));
    assert!(!compiled.image.services.contains_key(&at(30_003)));
}
