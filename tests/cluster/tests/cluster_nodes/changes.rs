//! What changes under a running cluster: MTUs, links, nodes, agents, policies.

use std::{
    fs,
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Family, Network, Outcome,
    Protocol::{Http, Tcp, Udp},
    Target, eventually,
    workload::stream::Report,
};

use crate::world::{NODES, World};

/// How long a change may take to be followed, on a machine that is busy with other tests.
pub(crate) const FOLLOWED: Duration = Duration::from_secs(10);

/// What VXLAN adds to a packet, over IPv4 and over IPv6.
pub(crate) const OVERHEAD: [u32; 2] = [50, 70];

/// Gives all uplinks another MTU, and waits until the Pods have followed.
pub(crate) fn mtu(world: &World, mtu: u32) -> Result<()> {
    let options = world.cluster().options();
    let bridges: &[&str] = match options.network {
        Network::Routed => &["br0", "br1"],
        Network::Link | Network::Native => &["br0"],
    };
    world.cluster().fabric().enter(|| -> Result<()> {
        for name in NODES.iter().chain(bridges) {
            ip(&format!("link set {name} mtu {mtu}"))?;
        }
        Ok(())
    })??;
    for node in world.cluster().nodes() {
        node.netns
            .enter(|| ip(&format!("link set eth0 mtu {mtu}")))??;
    }
    let tunnels = options.network == Network::Routed || !options.agent_options.is_empty();
    let expected = if tunnels {
        let v6 = options.family == Family::V6;
        (mtu - OVERHEAD[usize::from(v6)]).max(1_280)
    } else {
        mtu
    };
    eventually(FOLLOWED, || {
        for (i, node) in NODES.iter().enumerate() {
            let found = world.pod(i).enter(|| link_mtu("eth0"))??;
            ensure!(
                found == expected,
                "the Pod of {node} has {found}, not {expected}"
            );
        }
        Ok(())
    })
}

/// The MTU of an interface of the calling thread's namespace.
pub(crate) fn link_mtu(name: &str) -> Result<u32> {
    let shown = ip(&format!("-o link show dev {name}"))?;
    let mut words = shown.split_whitespace().skip_while(|word| *word != "mtu");
    let mtu = words.nth(1).context("no MTU")?;
    Ok(mtu.parse()?)
}

/// Runs `ip` in the calling thread's namespace.
pub(crate) fn ip(arguments: &str) -> Result<String> {
    run("ip", arguments)
}

/// Runs a program in the calling thread's namespace.
pub(crate) fn run(program: &str, arguments: &str) -> Result<String> {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .with_context(|| format!("run {program} (cargo xtask setup installs it)"))?;
    if !output.status.success() {
        bail!(
            "{program} {arguments}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn reach(world: &World, from: usize, to: usize) -> Result<()> {
    for v4 in [true, false] {
        let address = world.pod_address(to, v4)?;
        for protocol in [Tcp, Udp] {
            let target = Target::new(protocol, address, 80);
            let from = format!("a/pod{}", from + 1);
            match world.bed.probe(&from, target)? {
                Outcome::Answered(_) => {}
                other => bail!("{from} does not reach {target}: {other}"),
            }
        }
    }
    Ok(())
}

fn all_reach(world: &World) -> Result<()> {
    for from in 0..3 {
        for to in (0..3).filter(|to| *to != from) {
            reach(world, from, to)?;
        }
    }
    Ok(())
}

/// A policy holds on the link and through the tunnel, for Pods and for the nodes' own processes.
pub(crate) fn policy(world: &World) -> Result<()> {
    let bed = &world.bed;
    bed.apply(
        "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: from-three, namespace: $a}
spec:
  podSelector: {matchLabels: {on: node1}}
  ingress: [{from: [{podSelector: {matchLabels: {on: node3}}}]}]
",
    )?;
    for v4 in [true, false] {
        let target = Target::new(Tcp, world.pod_address(0, v4)?, 80);
        bed.loses("a/pod2", target)?;
        bed.loses("node/node3", target)?;
        bed.reaches("a/pod3", target)?;
        bed.reaches("node/node1", target)?;
    }
    bed.apply(
        "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: from-three, namespace: $a}
spec:
  podSelector: {matchLabels: {on: node3}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {on: node2}}}]}]
",
    )?;
    for v4 in [true, false] {
        bed.loses("a/pod3", Target::new(Tcp, world.pod_address(0, v4)?, 80))?;
        bed.reaches("a/pod3", Target::new(Tcp, world.pod_address(1, v4)?, 80))?;
    }
    bed.kubectl("delete networkpolicy -n $a from-three")?;
    bed.reaches("a/pod3", bed.target(Tcp, "a/pod1", 80)?)
}

fn lively(report: &Report) -> bool {
    report.echoed > 10
}

/// A node port of a node whose backend is behind the tunnel, and one whose client is.
pub(crate) fn node_port(world: &World) -> Result<()> {
    world.bed.apply(
        "---
apiVersion: v1
kind: Service
metadata: {name: far, namespace: $a}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {on: node3}
  ports: [{port: 80, nodePort: 30099}]
",
    )?;
    for v4 in [true, false] {
        for (node, name) in NODES.iter().enumerate() {
            let target = Target::new(Http, world.node_address(node, v4)?, 30_099);
            for from in ["outside", "a/pod1", "a/pod2", "a/pod3"] {
                world.bed.reaches(from, target).context(*name)?;
            }
        }
        // Long enough for what takes over established flows. None of them may break; a busy machine may
        // hold up one, but not every one.
        let to = SocketAddr::new(world.node_address(0, v4)?, 30_099);
        let mut reports = Vec::new();
        while reports.len() < 3 && !reports.iter().any(lively) {
            let stream = world.cluster().stream("outside", to)?;
            std::thread::sleep(Duration::from_millis(300));
            let report = stream.stop()?;
            ensure!(report.error.is_none(), "{report:?}");
            reports.push(report);
        }
        ensure!(reports.iter().any(lively), "{reports:?}");
    }
    world.bed.kubectl("delete service -n $a far").map(drop)
}

/// While a node's agent is down everything goes on; what has changed meanwhile is right soon after.
pub(crate) fn agent(world: &World) -> Result<()> {
    let seconds = std::env::var("HACHI_AGENT_DOWN_SECONDS").ok();
    let seconds = seconds.map_or(Ok(2), |text| text.parse())?;
    let to = SocketAddr::new(world.pod_address(0, true)?, 80);
    let stream = world.cluster().stream(&world.bed.full("a/pod3"), to)?;
    world.cluster().kill_agent("node3")?;
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        // Once more, since a busy machine may take longer than is waited for.
        all_reach(world)
            .or_else(|_| all_reach(world))
            .with_context(|| format!("{:?} before it is started", until - Instant::now()))?;
    }
    world.cluster().start_agent("node3")?;
    world.cluster().wait_agent("node3")?;
    all_reach(world).or_else(|_| all_reach(world))?;
    let report = stream.stop()?;
    ensure!(report.error.is_none(), "{report:?}");
    Ok(())
}

/// A link that was down is right again once it is up, and its routes are back.
pub(crate) fn uplink(world: &World) -> Result<()> {
    let node = &world.cluster().nodes()[2];
    let family = world.cluster().options().family;
    node.netns.enter(|| ip("link set eth0 down"))??;
    ensure!(reach(world, 0, 2).is_err(), "the link is down");
    node.netns.enter(|| -> Result<()> {
        ip("link set eth0 up")?;
        for address in &node.addresses {
            // An interface that goes down loses its IPv6 addresses.
            let length = if address.is_ipv4() { 24 } else { 64 };
            ip(&format!(
                "address replace {address}/{length} dev eth0 nodad"
            ))?;
        }
        for gateway in hachi_cluster::options::far_fabric(family) {
            ip(&format!("route replace default via {gateway} dev eth0"))?;
        }
        Ok(())
    })??;
    eventually(FOLLOWED, || all_reach(world))?;
    // What leaves the cluster is translated again.
    let outside = world.cluster().options().family.fabric()[0];
    let socket = world
        .cluster()
        .fabric()
        .enter(|| std::net::UdpSocket::bind((outside, 0)))??;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let target = socket.local_addr()?;
    let sender = world
        .pod(2)
        .enter(|| std::net::UdpSocket::bind("0.0.0.0:0"))??;
    sender.send_to(b"hello", target)?;
    let (_, peer) = socket.recv_from(&mut [0; 16])?;
    ensure!(
        peer.ip() == world.node_address(2, true)?,
        "it came from {peer}"
    );
    Ok(())
}

fn routes(world: &World, node: usize) -> Result<String> {
    let netns = &world.cluster().nodes()[node].netns;
    netns.enter(|| Ok(ip("-4 route")? + &ip("-6 route")?))?
}

/// A node that comes back with other blocks: everybody has the new way within a second, and none the
/// old one.
pub(crate) fn block(world: &World) -> Result<()> {
    let cluster = world.cluster();
    let shown = cluster.kubectl(&["get", "node", "node3", "-o", "json"])?;
    let mut node: serde_json::Value = serde_json::from_str(&shown)?;
    let old: Vec<String> = serde_json::from_value(node["spec"]["podCIDRs"].clone())?;
    let new = ["10.244.77.0/24", "fd00:10:244:77::/64"];
    cluster.kubectl(&["delete", "node", "node3"])?;
    eventually(FOLLOWED, || {
        for (i, name) in NODES.iter().enumerate().take(2) {
            let routes = routes(world, i)?;
            let stale = old.iter().any(|cidr| routes.contains(&short(cidr)));
            ensure!(!stale, "{name} has {routes}");
        }
        Ok(())
    })?;
    node["spec"]["podCIDRs"] = new.into();
    node["spec"]["podCIDR"] = new[0].into();
    for field in [
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "managedFields",
    ] {
        node["metadata"]
            .as_object_mut()
            .context("metadata")?
            .remove(field);
    }
    let created = Instant::now();
    cluster.apply(&node.to_string())?;
    cluster.replace_status(&node.to_string())?;
    eventually(FOLLOWED, || {
        for (i, name) in NODES.iter().enumerate().take(2) {
            let routes = routes(world, i)?;
            for cidr in new {
                ensure!(routes.contains(&short(cidr)), "{name} has {routes}");
            }
        }
        Ok(())
    })?;
    tracing::info!(took = ?created.elapsed(), "a node came back");
    // The Pods that are still there have addresses of the old blocks, which are nobody's now.
    ensure!(
        reach(world, 0, 2).is_err(),
        "a block that no node has still leads somewhere"
    );
    Ok(())
}

/// As `ip route` shows it.
fn short(cidr: &str) -> String {
    format!("{cidr} ")
}

/// Without a far node there are no tunnels, and no device for them.
pub(crate) fn leave(world: &World) -> Result<()> {
    world.cluster().kubectl(&["delete", "node", "node3"])?;
    eventually(FOLLOWED, || {
        for (i, name) in NODES.iter().enumerate().take(2) {
            let netns = &world.cluster().nodes()[i].netns;
            let links = netns.enter(|| fs::read_dir("/proc/sys/net/ipv4/conf"))??;
            let names = links.flatten().map(|entry| entry.file_name());
            let found: Vec<_> = names.filter(|name| name == "hachi_vxlan").collect();
            ensure!(found.is_empty(), "{name} has a device still");
            ensure!(!routes(world, i)?.contains("hachi_vxlan"));
        }
        Ok(())
    })?;
    // Once more, since a busy machine may take longer than is waited for.
    let both = || reach(world, 0, 1).and_then(|()| reach(world, 1, 0));
    both().or_else(|_| both())
}
