//! Which frontends lead where.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hachi_abi::ServiceFlags;
use hachi_compile::{Compiled, Frontend, Problem, ServiceImage, compile};
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
    let named = services
        .into_iter()
        .map(|(name, s)| (Name::new("a", name), Arc::new(s)));
    compile(&Desired {
        services: named.collect(),
        ..Desired::default()
    })
}

fn at<'a>(services: &'a BTreeMap<Frontend, ServiceImage>, address: &str) -> &'a ServiceImage {
    let addr = address.parse().unwrap();
    &services[&Frontend {
        addr,
        port: 80,
        proto: 6,
        scope: 0,
    }]
}

#[test]
fn every_family_has_its_own_backends() {
    let image = compiled(vec![("web", service(&["10.96.0.1", "fd96::1"], &[]))]).image;
    let v4 = at(&image.services, "10.96.0.1");
    assert_eq!(v4.backends, sockets(&["10.0.0.1:8080", "10.0.0.2:8080"]));
    assert_eq!(
        at(&image.services, "fd96::1").backends,
        sockets(&["[fd00::1]:8080"])
    );
}

#[test]
fn frontends_with_the_same_backends_share_their_slots() {
    let mut both = service(&["10.96.0.1"], &["198.51.100.1"]);
    both.affinity = Some(60);
    let image = compiled(vec![("web", both.clone())]).image;
    let inner = at(&image.services, "10.96.0.1");
    assert_eq!(inner, at(&image.services, "198.51.100.1"));
    assert_eq!(inner.affinity, 60);
    both.internal_local = true;
    let image = compiled(vec![("web", both)]).image;
    let (inner, outer) = (
        at(&image.services, "10.96.0.1"),
        at(&image.services, "198.51.100.1"),
    );
    assert_eq!(inner.backends, sockets(&["10.0.0.2:8080"]));
    assert_eq!(
        outer.backends.len(),
        2,
        "an external address leads everywhere from inside"
    );
    assert_ne!(inner.id, outer.id);
}

#[test]
fn nothing_here_but_elsewhere_is_silent_and_nothing_at_all_is_not() {
    let mut local = service(&["10.96.0.1", "fd96::1"], &[]);
    local.internal_local = true;
    local.ports[0].local_backends.clear();
    let image = compiled(vec![("web", local.clone())]).image;
    let v4 = at(&image.services, "10.96.0.1");
    assert_eq!(
        (v4.flags, v4.backends.len()),
        (ServiceFlags::DROP_WHEN_EMPTY, 0)
    );
    local.ports[0].backends.clear();
    let image = compiled(vec![("web", local)]).image;
    let v4 = at(&image.services, "10.96.0.1");
    assert_eq!((v4.flags, v4.backends.len()), (0, 0));
}

#[test]
fn an_address_has_one_owner() {
    let mut older = service(&["10.96.0.2"], &["198.51.100.1", "10.96.0.1"]);
    older.created = 1;
    older.ports[0].backends = sockets(&["10.0.0.9:1"]);
    let younger = service(&["10.96.0.1"], &["198.51.100.1"]);
    let compiled = compiled(vec![("a-younger", younger), ("b-older", older)]);
    let first = |address: &str| at(&compiled.image.services, address).backends[0].to_string();
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
    let losers: Vec<String> = compiled
        .problems
        .iter()
        .map(|Problem::FrontendTaken { service, .. }| service.to_string())
        .collect();
    assert_eq!(losers, ["a/b-older", "a/a-younger"]);
}
