//! The manifests with a real kubelet and containerd on two nodes: what the API double and the played
//! kubelets cannot tell. Needs etcd, kube-apiserver, kube-controller-manager, kube-scheduler and kubelet
//! in `KUBEBUILDER_ASSETS`, containerd and runc, and the image (`cargo xtask image`, or `HACHI_IMAGE`).

mod load;
mod operators;
mod privileges;
mod world;

use std::time::Duration;

use anyhow::{Result, ensure};
use hachi_cluster::{Protocol, Target, eventually};
use world::{LIMIT, World};

/// Everything that an operator does, one after the other: each step needs the one before, and the
/// nodes take a while to make.
#[test]
fn from_install_to_uninstall() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-agent");
    if let Err(lacking) = hachi_cluster::machine::available() {
        hachi_testutil::absent!("a real kubelet: {lacking:#}");
    }
    let Some(image) = world::image() else {
        hachi_testutil::skip!("needs target/image/hachi.tar; run cargo xtask image");
    };
    let test = || -> Result<()> {
        let world = World::start(&image)?;
        world.install()?;
        privileges::are_those_of_the_manifest(&world, world::INSTALL)?;
        pods_become_ready(&world)?;
        services_are_reached(&world)?;
        policies_are_obeyed(&world)?;
        pods_are_changed_from_the_agents_container(&world)?;
        load::does_not_notice(&world)?;
        operators::deployments_grow_and_shrink(&world)?;
        operators::pods_are_looked_into(&world)?;
        operators::static_pods_are_served(&world)?;
        operators::a_node_is_turned_off_and_on(&world)?;
        uninstalls(&world)?;
        world.stop()
    };
    test().unwrap_or_else(|error| panic!("{error:#}"));
}

fn pods_become_ready(world: &World) -> Result<()> {
    world.apply(&world::apps())?;
    world.kubectl("wait pod --all -n app --for=condition=Ready --timeout=120s")?;
    for to in ["near", "far"] {
        let target = Target::new(Protocol::Tcp, world.pod_ip(to)?, 80);
        ensure!(world.ask("client", target)? == to, "client to {to}");
        let target = Target::new(Protocol::Udp, world.pod_ip(to)?, 80);
        ensure!(world.ask("client", target)? == to, "client to {to} by UDP");
    }
    Ok(())
}

/// ClusterIP, node port, a Pod's port of the node, and the API's own Service, which no controller makes slices for.
fn services_are_reached(world: &World) -> Result<()> {
    let ip = world.service_ip("app", "web")?;
    let mut seen = Vec::new();
    eventually(LIMIT, || {
        seen.push(world.ask("client", Target::new(Protocol::Tcp, ip, 8080))?);
        ensure!(
            ["near", "far"]
                .iter()
                .all(|name| seen.iter().any(|other| other == name)),
            "only {seen:?} answered"
        );
        Ok(())
    })?;
    let port = world.kubectl("get service web -n app -o jsonpath={.spec.ports[0].nodePort}")?;
    let target = Target::new(Protocol::Tcp, world.node_ip("node1")?, port.parse()?);
    world.reached_from("outside", target)?;
    world.reached_from("node/node2", target)?;
    let of_the_pod = Target::new(Protocol::Tcp, world.node_ip("node2")?, 8088);
    world.reached_from("outside", of_the_pod)?;
    let api = world.service_ip("default", "kubernetes")?;
    world.connects("client", api, 443)
}

/// Nobody but the kubelet, whose probes keep Pods ready, and then who is allowed.
fn policies_are_obeyed(world: &World) -> Result<()> {
    world.apply(world::DENY)?;
    let target = Target::new(Protocol::Tcp, world.pod_ip("far")?, 80);
    eventually(LIMIT, || {
        ensure!(
            world.ask("client", target).is_err(),
            "client still reaches far"
        );
        Ok(())
    })?;
    // Longer than the kubelet takes to call a Pod unready.
    std::thread::sleep(Duration::from_secs(4));
    world.kubectl("wait pod --all -n app --for=condition=Ready --timeout=1s")?;
    world.apply(world::ALLOW)?;
    eventually(LIMIT, || world.ask("client", target).map(drop))?;
    world.kubectl("delete networkpolicy --all -n app").map(drop)
}

/// The agent opens a Pod's namespace by the path that containerd gave the plugin.
fn pods_are_changed_from_the_agents_container(world: &World) -> Result<()> {
    for mtu in ["1400", "1500"] {
        world.on_node("node1", &format!("ip link set eth0 mtu {mtu}"))?;
        eventually(LIMIT, || {
            let script = "for pod in $(ls /run/netns); do ip -n $pod -o link show eth0; done";
            let links = world.on_node("node1", script)?;
            let changed = |link: &str| link.contains(&format!("mtu {mtu} "));
            ensure!(
                links.lines().count() == 2 && links.lines().all(changed),
                "{links}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

fn uninstalls(world: &World) -> Result<()> {
    world.kubectl("delete namespace app --timeout=120s")?;
    world.uninstall()?;
    for node in ["node1", "node2"] {
        let script = "ls /etc/cni/net.d /opt/cni/bin /var/lib/cni/hachi /run/hachi /sys/fs/bpf \
                      2>/dev/null | grep -v ':$' | grep .; ip -o link | grep hachi; true";
        let left = world.on_node(node, script)?;
        ensure!(left.trim().is_empty(), "left on {node}: {left}");
    }
    Ok(())
}
