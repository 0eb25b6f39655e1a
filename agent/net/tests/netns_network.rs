//! Links, routes, addresses and namespaces of this crate in namespaces of the test's own.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    process::Command,
    thread,
};

use hachi_api::AttachmentId;
use hachi_net::{
    Changes, Family, HostLink, Mac, NetError, NetNs, Netlink, NextHop, PodRoute, RouteChanges,
    Wiring, connect, enable_forwarding, ensure_routes, forwards, host_ifname, local_addresses,
    macs, uplink, wire,
};
use ipnet::IpNet;
use nix::sched::{CloneFlags, unshare};

/// Runs a test in a network namespace of its own, which ends with it.
fn isolated(test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            test();
        });
        inside
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {args}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A namespace with nothing in it but this reference to it.
fn namespace() -> NetNs {
    let open = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        NetNs::current().unwrap()
    };
    thread::spawn(open).join().unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn id() -> AttachmentId {
    AttachmentId {
        container_id: "c1".into(),
        ifname: "eth0".into(),
    }
}

/// Wires a Pod up with the defaults of its id.
fn wire_pod(
    namespace: &NetNs,
    addresses: &[IpAddr],
    mtu: Option<u32>,
    routes: &[PodRoute],
) -> Result<hachi_net::Wired, NetError> {
    let mut host = Netlink::open()?;
    let mut pod = Netlink::open_in(namespace)?;
    let (pod_mac, host_mac) = macs(&id());
    let wiring = Wiring {
        host_ifname: &host_ifname(&id()),
        host_mac,
        pod_ifname: "eth0",
        pod_mac,
        mtu,
        addresses,
        routes,
    };
    let wired = wire(&mut host, &mut pod, namespace, &wiring)?;
    assert!(!host.link(wiring.host_ifname)?.unwrap().up);
    let link = HostLink {
        index: wired.host_ifindex,
        name: wiring.host_ifname,
        pod_mac,
        addresses,
    };
    connect(&mut host, &link)?;
    Ok(wired)
}

#[test]
fn namespaces() {
    hachi_testutil::require_root!();
    isolated(|| {
        let other = namespace();
        assert!(!other.is_current().unwrap());
        assert!(NetNs::current().unwrap().is_current().unwrap());
        assert!(
            other
                .run(|| NetNs::current().unwrap().is_current().unwrap())
                .unwrap()
        );
        let names = |netlink: &mut Netlink| {
            netlink
                .links()
                .unwrap()
                .into_iter()
                .map(|link| link.name)
                .collect::<Vec<_>>()
        };
        ip("link add va type veth peer name vb");
        assert_eq!(names(&mut Netlink::open_in(&other).unwrap()), ["lo"]);
        // The socket stays where it was opened, and so do we.
        assert_eq!(names(&mut Netlink::open().unwrap()).len(), 3);

        let file = tempfile::NamedTempFile::new().unwrap();
        let plain = NetNs::open(file.path()).unwrap();
        let error = plain.run(|| ()).unwrap_err();
        assert!(matches!(error, NetError::NetNs { .. }), "{error}");
        let other_kind = NetNs::open(Path::new("/proc/self/ns/mnt")).unwrap();
        assert!(Netlink::open_in(&other_kind).is_err());
        assert!(NetNs::open(Path::new("/no/such/file")).is_err());
        let panic = thread::spawn(move || other.run(|| panic!("inside")))
            .join()
            .unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"inside"));
    });
}

#[test]
fn links_by_name() {
    hachi_testutil::require_root!();
    isolated(|| {
        let mut netlink = Netlink::open().unwrap();
        assert_eq!(netlink.link("va").unwrap(), None);
        assert!(!netlink.delete_link("va").unwrap());
        ip("link add va mtu 1300 address 02:00:00:00:00:0a type veth peer name vb");
        ip("link set va up");
        let link = netlink.link("va").unwrap().unwrap();
        assert!(link.veth && link.up);
        assert_eq!((link.mtu, link.mac), (1300, Some(Mac([2, 0, 0, 0, 0, 10]))));
        let peer = netlink.link("vb").unwrap().unwrap();
        assert_eq!(link.peer, Some(peer.index));
        assert!(!peer.up);
        let loopback = netlink.link("lo").unwrap().unwrap();
        assert!(!loopback.veth);
        assert!(netlink.delete_link("vb").unwrap());
        assert_eq!(netlink.link("va").unwrap(), None);
    });
}

#[test]
fn wiring_that_fails_leaves_nothing() {
    hachi_testutil::require_root!();
    isolated(|| {
        let addresses = [addr("10.0.0.2"), addr("fd00::2")];
        let nothing = |namespace: &NetNs| {
            assert!(!ip("-o link").contains("hachi"));
            assert!(!namespace.run(|| ip("-o link")).unwrap().contains("eth0"));
            assert!(!ip("route show table all").contains("10.0.0.2"));
        };
        let pod = namespace();
        for (mtu, routes) in [
            (Some(10), vec![]),
            (Some(100), vec![]),
            (Some(70_000), vec![]),
        ] {
            let error = wire_pod(&pod, &addresses, mtu, &routes).unwrap_err();
            assert!(!matches!(error, NetError::Exists(_)), "{error}");
            nothing(&pod);
        }
        // The interface of somebody else is left alone.
        pod.run(|| drop(ip("link add eth0 type veth peer name other")))
            .unwrap();
        let error = wire_pod(&pod, &addresses, None, &[]).unwrap_err();
        assert!(matches!(error, NetError::Exists(name) if name == "eth0"));
        assert!(pod.run(|| ip("-o link")).unwrap().contains("eth0"));
        assert!(!ip("-o link").contains("hachi"));
    });
}

#[test]
fn a_name_that_is_left_over_is_taken_over() {
    hachi_testutil::require_root!();
    isolated(|| {
        let (first, second) = (namespace(), namespace());
        let addresses = [addr("10.0.0.2")];
        let before = wire_pod(&first, &addresses, None, &[]).unwrap();
        let after = wire_pod(&second, &addresses, None, &[]).unwrap();
        assert_ne!(before.host_ifindex, after.host_ifindex);
        assert!(!first.run(|| ip("-o link")).unwrap().contains("eth0"));
        let inside = second.run(|| Netlink::open().unwrap().link("eth0").unwrap().unwrap());
        let inside = inside.unwrap();
        assert_eq!((inside.index, inside.mtu), (after.pod_ifindex, after.mtu));
    });
}

#[test]
fn the_host_forwards_from_the_pod_whatever_is_the_default() {
    hachi_testutil::require_root!();
    isolated(|| {
        assert!(!forwards(Family::V4) && !forwards(Family::V6));
        ip("link add wan type veth peer name lan");
        let accept_ra = "/proc/sys/net/ipv6/conf/wan/accept_ra";
        assert_eq!(std::fs::read_to_string(accept_ra).unwrap().trim(), "1");
        let state = tempfile::tempdir().unwrap();
        let changes = Changes::of(state.path()).unwrap();
        assert!(enable_forwarding(Family::V4, &changes).unwrap());
        assert!(enable_forwarding(Family::V6, &changes).unwrap());
        assert!(!enable_forwarding(Family::V6, &changes).unwrap(), "already");
        assert!(forwards(Family::V4) && forwards(Family::V6));
        // The uplink still hears its router.
        assert_eq!(std::fs::read_to_string(accept_ra).unwrap().trim(), "2");
        std::fs::write("/proc/sys/net/ipv4/conf/default/forwarding", "0").unwrap();
        let pod = namespace();
        wire_pod(&pod, &[addr("10.0.0.2")], None, &[]).unwrap();
        let ours = format!("/proc/sys/net/ipv4/conf/{}/forwarding", host_ifname(&id()));
        assert_eq!(std::fs::read_to_string(ours).unwrap().trim(), "1");
        // All of it can be put back.
        assert!(changes.restore().unwrap().errors.is_empty());
        assert!(!forwards(Family::V4) && !forwards(Family::V6));
        assert_eq!(std::fs::read_to_string(accept_ra).unwrap().trim(), "1");
    });
}

#[test]
fn addresses_of_the_node() {
    hachi_testutil::require_root!();
    isolated(|| {
        ip("link add wan type veth peer name lan");
        ip("addr add 192.0.2.7/24 dev wan");
        ip("addr add 10.255.0.1 peer 10.255.0.2/32 dev wan");
        ip("addr add 2001:db8::7/64 dev wan nodad");
        ip("addr add 198.51.100.1/32 dev lo");
        let found = local_addresses().unwrap();
        let expected = ["192.0.2.7", "10.255.0.1", "2001:db8::7", "198.51.100.1"].map(addr);
        assert_eq!(found, BTreeSet::from(expected));
    });
}

fn uplink_with_neighbours() {
    ip("link add wan type veth peer name lan");
    ip("link set wan up");
    ip("link set lan up");
    ip("addr add 192.0.2.1/24 dev wan");
    ip("addr add 2001:db8::1/64 dev wan nodad");
}

fn ours() -> Vec<String> {
    let shown = ip("-4 route show proto 72") + &ip("-6 route show proto 72");
    let words = |line: &str| line.split(' ').take(3).collect::<Vec<_>>().join(" ");
    shown.lines().map(words).collect()
}

fn ensure(wanted: &[(&str, &str)]) -> RouteChanges {
    let wanted: BTreeMap<_, _> = wanted
        .iter()
        .map(|(dst, gateway)| (net(dst), NextHop::via(addr(gateway))))
        .collect();
    ensure_routes(&mut Netlink::open().unwrap(), &wanted).unwrap()
}

#[test]
fn routes_to_other_nodes() {
    hachi_testutil::require_root!();
    isolated(|| {
        uplink_with_neighbours();
        ip("route add 10.99.0.0/24 via 192.0.2.99");
        ip("route add 10.244.9.0/24 via 192.0.2.99 proto static");
        let pod = namespace();
        wire_pod(&pod, &[addr("10.0.0.2"), addr("fd00::2")], None, &[]).unwrap();
        let others = ip("route show proto static") + &ip("route show proto boot");
        let local = format!("10.0.0.2 dev {}", host_ifname(&id()));

        let changes = ensure(&[
            ("10.244.1.0/24", "192.0.2.2"),
            ("10.244.2.0/24", "192.0.2.3"),
            ("fd01:1::/64", "2001:db8::2"),
            ("10.244.9.0/24", "192.0.2.9"),
        ]);
        assert_eq!((changes.written, changes.deleted), (3, 0));
        assert_eq!(
            changes.errors.len(),
            1,
            "a route that somebody else has made stays"
        );
        assert!(
            changes.errors[0].to_string().contains("10.244.9.0/24"),
            "{:?}",
            changes.errors
        );
        let first = [
            "10.0.0.2 dev",
            "10.244.1.0/24 via 192.0.2.2",
            "10.244.2.0/24 via 192.0.2.3",
        ];
        assert!(
            first
                .iter()
                .all(|line| ours().iter().any(|l| l.starts_with(line))),
            "{:?}",
            ours()
        );
        assert!(
            ours().contains(&"fd01:1::/64 via 2001:db8::2".to_owned()),
            "{:?}",
            ours()
        );

        // Nothing to do.
        let same = [
            ("10.244.1.0/24", "192.0.2.2"),
            ("10.244.2.0/24", "192.0.2.3"),
            ("fd01:1::/64", "2001:db8::2"),
        ];
        let changes = ensure(&same);
        assert_eq!(
            (changes.written, changes.deleted, changes.errors.len()),
            (0, 0, 0)
        );

        // One moves, one goes, one comes, one cannot be.
        let changes = ensure(&[
            ("10.244.1.0/24", "192.0.2.4"),
            ("fd01:1::/64", "2001:db8::5"),
            ("10.244.3.0/24", "192.0.2.5"),
            ("10.244.4.0/24", "203.0.113.1"),
        ]);
        assert_eq!((changes.written, changes.deleted), (3, 1), "{changes:?}");
        assert_eq!(changes.errors.len(), 1, "{changes:?}");
        let now = ours();
        assert!(
            now.contains(&"10.244.1.0/24 via 192.0.2.4".to_owned()),
            "{now:?}"
        );
        assert!(
            now.contains(&"fd01:1::/64 via 2001:db8::5".to_owned()),
            "{now:?}"
        );
        assert!(
            !now.iter()
                .any(|line| line.contains("10.244.2.0") || line.contains("2001:db8::2"))
        );

        let changes = ensure(&[]);
        assert_eq!(changes.deleted, 3);
        let left = ip("route");
        assert!(
            left.contains(&local),
            "local Pods keep their routes: {left} {}",
            ip("-o link")
        );
        assert_eq!(
            ip("route show proto static") + &ip("route show proto boot"),
            others
        );
    });
}

#[test]
fn many_routes() {
    hachi_testutil::require_root!();
    isolated(|| {
        uplink_with_neighbours();
        let route = |n: u32| {
            (
                net(&format!("10.{}.{}.0/24", 100 + n / 256, n % 256)),
                NextHop::via(addr("192.0.2.2")),
            )
        };
        let wanted: BTreeMap<_, _> = (0..2000).map(route).collect();
        let mut netlink = Netlink::open().unwrap();
        let changes = ensure_routes(&mut netlink, &wanted).unwrap();
        assert_eq!((changes.written, changes.errors.len()), (2000, 0));
        let changes = ensure_routes(&mut netlink, &BTreeMap::new()).unwrap();
        assert_eq!((changes.deleted, changes.errors.len()), (2000, 0));
        assert!(ours().is_empty());
    });
}

#[test]
fn the_interface_that_leads_to_the_world() {
    hachi_testutil::require_root!();
    isolated(|| {
        let mut netlink = Netlink::open().unwrap();
        assert_eq!(uplink(&mut netlink).unwrap(), None);
        uplink_with_neighbours();
        ip("link set wan mtu 1450");
        ip("route add default via 192.0.2.254 metric 5");
        ip("-6 route add unreachable default metric 1");
        let found = uplink(&mut netlink).unwrap().unwrap();
        assert_eq!((found.name.as_str(), found.mtu), ("wan", 1450));
    });
}
