//! The plugin with the real agent: many at once, deaths of either at random moments, ports of the
//! node, and addresses that a Pod asks for.

mod runtime;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Cluster, Family, Options,
    Protocol::{Tcp, Udp},
    Target,
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
};
use runtime::{Ended, Moments, Runtime};

/// A cluster of one node that no other test uses, for those that count what is on it.
fn alone(name: &str) -> Result<Cluster> {
    let dir = std::env::temp_dir().join(format!("hachi-cni-{name}-{}", std::process::id()));
    Cluster::start(Options {
        nodes: 1,
        remove_dir: true,
        ..Options::new(dir, hachi_testutil::dist_dir(), Family::Dual)
    })
}

#[test]
fn a_hundred_at_once() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let test = || -> Result<()> {
        let cluster = alone("hundred")?;
        let mut runtime = Runtime::new(&cluster, 100)?;
        let before = runtime.seen()?;
        let added = runtime.all_at_once("ADD")?;
        let mut addresses: Vec<_> = added
            .iter()
            .flat_map(hachi_cluster::cni::addresses)
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        ensure!(addresses.len() == 200, "{} addresses", addresses.len());
        runtime.agrees()?;
        runtime.all_at_once("DEL")?;
        runtime.agrees()?;
        ensure!(runtime.seen()? == before, "something is left");
        cluster.stop()
    };
    test().unwrap_or_else(|error| panic!("{error:#}"));
}

/// How often somebody is killed, one time in twelve the agent.
const KILLS: usize = 300;
const PODS: usize = 8;

#[test]
fn killed_at_any_moment() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let test = || -> Result<()> {
        let cluster = alone("kills")?;
        let mut runtime = Runtime::new(&cluster, PODS)?;
        let before = runtime.seen()?;
        let mut moments = Moments::new(11);
        let add_time = runtime.add(0)?;
        let del_time = runtime.del(0)?;
        let (mut kills, mut rounds) = (0, 0);
        while kills < KILLS {
            rounds += 1;
            ensure!(rounds < KILLS * 10, "too late: {kills} kills");
            let number = moments.below_usize(PODS);
            let died = match moments.below(12) {
                0 => {
                    let after = moments.within(add_time);
                    runtime.agent_killed(number, after)?;
                    true
                }
                1 => runtime.gc_killed(moments.within(del_time))?,
                _ if runtime.has(number) => {
                    runtime.killed(number, "DEL", moments.within(del_time))?
                }
                _ => runtime.killed(number, "ADD", moments.within(add_time * 5 / 4))?,
            };
            kills += usize::from(died);
            if rounds % 24 == 0 {
                runtime.gc()?;
                runtime.agrees()?;
            }
        }
        runtime.gc()?;
        runtime.agrees()?;
        for number in 0..PODS {
            if runtime.has(number) {
                runtime.check(number)?;
                runtime.del(number)?;
            }
        }
        runtime.gc()?;
        runtime.agrees()?;
        ensure!(runtime.seen()? == before, "something is left");
        cluster.stop()
    };
    test().unwrap_or_else(|error| panic!("{error:#}"));
}

/// An ADD that the agent refuses leaves as little as one that was killed.
#[test]
fn a_host_port_is_given_once() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let test = || -> Result<()> {
        let cluster = alone("ports")?;
        let mut runtime = Runtime::new(&cluster, 2)?;
        runtime.ports = serde_json::json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        ]);
        runtime.add(0)?;
        match runtime.call(1, "ADD", None)? {
            Ended::Failed(7, why) => {
                ensure!(why.contains("8080/TCP") && why.contains("in use"), "{why}");
            }
            other => anyhow::bail!("{other:?}"),
        }
        runtime.agrees()?;
        runtime.del(0)?;
        runtime.add(1)?;
        runtime.agrees()?;
        runtime.del(1)?;
        cluster.stop()
    };
    test().unwrap_or_else(|error| panic!("{error:#}"));
}

fn host_ports(bed: &Bed) -> Result<()> {
    bed.pods(&[
        Spec {
            name: "web",
            node: "node1",
            ports: "{containerPort: 80, hostPort: 8080}, \
                    {containerPort: 53, hostPort: 5353, protocol: UDP}",
            ..Spec::default()
        },
        Spec {
            name: "near",
            node: "node1",
            ..Spec::default()
        },
        Spec {
            name: "far",
            node: "node2",
            ..Spec::default()
        },
    ])?;
    let node = node_address(bed, "node1")?;
    let (web, dns) = (SocketAddr::new(node, 8080), SocketAddr::new(node, 5353));
    // From a Pod of the node, and from the Pod to itself by the node's port.
    for from in ["a/near", "a/web"] {
        bed.reaches(from, Target::new(Tcp, web.ip(), web.port()))?;
        bed.reaches(from, Target::new(Udp, dns.ip(), dns.port()))?;
    }
    // From a host outside the cluster, and from a Pod of another node.
    for from in ["outside", "a/far"] {
        bed.reaches(from, Target::new(Tcp, web.ip(), web.port()))?;
        bed.reaches(from, Target::new(Udp, dns.ip(), dns.port()))?;
    }
    for (from, port) in [("a/near", 8081), ("a/near", 5354)] {
        bed.loses(from, Target::new(Tcp, node, port))?;
    }
    // The port goes with the Pod.
    bed.kubectl("delete pod web -n $a --wait=true")?;
    for from in ["a/near", "a/far", "outside"] {
        bed.loses(from, Target::new(Tcp, web.ip(), web.port()))?;
    }
    Ok(())
}

fn requested_addresses(bed: &Bed) -> Result<()> {
    let cidrs = bed.kubectl("get node node1 -o jsonpath={.spec.podCIDR}")?;
    let (base, _) = cidrs.split_once('/').context("a podCIDR")?;
    let wanted = match base.parse()? {
        std::net::IpAddr::V4(base) => std::net::Ipv4Addr::from(u32::from(base) + 77).into(),
        std::net::IpAddr::V6(base) => {
            std::net::IpAddr::from(std::net::Ipv6Addr::from(u128::from(base) + 0x77))
        }
    };
    let pod = |name: &str, address: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: $a\n  \
             annotations: {{hachi.dev/ip-addresses: '{address}'}}\n\
             spec: {{nodeName: node1, containers: [{{name: main, image: server}}]}}\n"
        )
    };
    bed.apply(&pod("first", &wanted.to_string()))?;
    eventually(LIMIT, || {
        let found = bed.cluster.pod_ip(&bed.full("a/first"))?;
        ensure!(found == wanted, "{found} and not {wanted}");
        Ok(())
    })?;
    // Whoever asks for it too waits until it is free.
    bed.apply(&pod("second", &wanted.to_string()))?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(
        bed.cluster.pod_ip(&bed.full("a/second")).is_err(),
        "two Pods of one address"
    );
    bed.kubectl("delete pod first -n $a --wait=true")?;
    eventually(LIMIT, || {
        let found = bed.cluster.pod_ip(&bed.full("a/second"))?;
        ensure!(found == wanted, "{found} and not {wanted}");
        Ok(())
    })
}

both_families!(host_ports, requested_addresses);

fn node_address(bed: &Bed, name: &str) -> Result<std::net::IpAddr> {
    let nodes: BTreeMap<_, _> = bed
        .cluster
        .nodes()
        .iter()
        .map(|node| (node.name.as_str(), node))
        .collect();
    let node = nodes.get(name).context("no such node")?;
    node.addresses.first().copied().context("no address")
}
