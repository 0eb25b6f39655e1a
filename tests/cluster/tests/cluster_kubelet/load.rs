//! What an operator does to agents, kubelets and runtimes, while Pods are under load that does not notice.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{Netns, eventually, workload::load::Load};
use serde_json::Value;

use super::world::{self, LIMIT, World};

const NODES: [&str; 2] = ["node1", "node2"];
const IMAGE: &str = "docker.io/hachi/hachi:0.1.0";
const OTHER: &str = "docker.io/hachi/hachi:other";

/// Its backends stay whatever a kubelet that has just started thinks of its Pods' readiness.
const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: load, namespace: app}
spec:
  publishNotReadyAddresses: true
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
  - {name: tcp, port: 8080, targetPort: 80}
  - {name: udp, port: 8080, targetPort: 80, protocol: UDP}
";

/// A container that asks by itself: its sockets are in a cgroup of the kubelet's, as every Pod's, and so
/// are given a backend when they connect.
const ASKING: &str = "
    resources: {requests: {cpu: 200m}}
    command: [/hachi-pod, ask, tcp, '$(LOAD_SERVICE_HOST):8080', --count, '100000', --interval, '20', --timeout, '5000']
";

/// One Pod's load on a Pod beside it, on one on the other node and on their Service, and what a container
/// asks by itself.
struct Everybody {
    /// The namespaces of all who take part.
    places: Vec<Arc<Netns>>,
    load: Load,
}

impl Everybody {
    fn start(world: &World) -> Result<Self> {
        world.apply(SERVICE)?;
        let addresses = |what: &str, path: &str, port: u16| -> Result<Vec<SocketAddr>> {
            let said = world.kubectl(&format!("get {what} -n app -o jsonpath={{{path}}}"))?;
            let all = said.split_whitespace().map(|ip| {
                let ip = ip.parse().with_context(|| said.clone())?;
                Ok(SocketAddr::new(ip, port))
            });
            all.collect()
        };
        let service = addresses("service load", ".spec.clusterIPs[*]", 8080)?;
        ensure!(service.len() == 2, "one family is missing: {service:?}");
        let mut pods = addresses("pod near", ".status.podIPs[*].ip", 80)?;
        pods.extend(addresses("pod far", ".status.podIPs[*].ip", 80)?);
        let places = ["client", "near", "far"].map(|pod| world.netns(pod).map(Arc::new));
        let places: Vec<_> = places.into_iter().collect::<Result<_>>()?;
        let load = Load::start(&places[0], &service, &pods)?;
        world.apply(&format!(
            "{}{ASKING}",
            world::pod("asker", "client", "node1")
        ))?;
        world.kubectl("wait pod asker -n app --for=condition=Ready --timeout=60s")?;
        Ok(Self { places, load })
    }

    /// Nothing was lost, refused or reset.
    fn finish(self, world: &World) -> Result<String> {
        let answers = world.kubectl("logs asker -n app")?;
        world.kubectl("delete pod asker -n app")?;
        let mut asked = 0;
        for line in answers.lines() {
            let answer: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            ensure!(answer["error"].is_null(), "the container's own: {line}");
            asked += 1;
        }
        ensure!(asked > 100, "{asked} answers in the container");
        let said = self.load.finish(&self.places)?;
        Ok(format!("{said}, {asked} of a container"))
    }
}

/// All of it, one after the other, under one load.
pub(crate) fn does_not_notice(world: &World) -> Result<()> {
    for node in NODES {
        world.cluster().tag_image(node, IMAGE, OTHER)?;
    }
    let load = Everybody::start(world)?;
    let begun = Instant::now();
    let step = |name: &str, done: Result<()>| {
        println!("{:5.1} s  {name}", begun.elapsed().as_secs_f32());
        done.context(name.to_owned())
    };
    step("rollout restart", restarted(world))?;
    step("upgrade", upgraded(world))?;
    step("rollout undo", undone(world))?;
    step("SIGKILL", killed(world))?;
    step("no agent", missing(world))?;
    step("kubelets", kubelets_restarted(world))?;
    step("containerds", runtimes_restarted(world))?;
    println!("{}", load.finish(world)?);
    let restarts = world.kubectl(
        "get pod -n app -o jsonpath={.items[*].status.containerStatuses[*].restartCount}",
    )?;
    ensure!(
        restarts.split_whitespace().all(|count| count == "0"),
        "Pods were started again: {restarts}"
    );
    Ok(())
}

fn restarted(world: &World) -> Result<()> {
    world.kubectl("-n kube-system rollout restart daemonset/hachi")?;
    world.rolled_out("hachi")
}

/// To an image of another name.
fn upgraded(world: &World) -> Result<()> {
    let image = OTHER.trim_start_matches("docker.io/");
    world.kubectl(&format!(
        "-n kube-system set image daemonset/hachi install={image} agent={image}"
    ))?;
    world.rolled_out("hachi")?;
    runs(world, image)
}

fn undone(world: &World) -> Result<()> {
    world.kubectl("-n kube-system rollout undo daemonset/hachi")?;
    world.rolled_out("hachi")?;
    runs(world, IMAGE.trim_start_matches("docker.io/"))
}

fn runs(world: &World, image: &str) -> Result<()> {
    let images = world.kubectl(
        "get pods -n kube-system -l app.kubernetes.io/name=hachi -o jsonpath={.items[*].spec.containers[*].image}",
    )?;
    let all: Vec<_> = images.split_whitespace().collect();
    ensure!(all == [image, image], "{all:?}");
    Ok(())
}

/// The agent's process of every node ends as a crash does.
fn killed(world: &World) -> Result<()> {
    for node in NODES {
        let before = agent(world, node)?;
        let pid = world.container_pid(node, &before)?;
        world.on_node(node, &format!("kill -KILL {pid}"))?;
        eventually(LIMIT, || {
            let now = agent(world, node)?;
            ensure!(now != before, "the kubelet has not started it again");
            Ok(())
        })?;
    }
    world.rolled_out("hachi")?;
    world.kubectl("wait pod -n kube-system -l app.kubernetes.io/name=hachi --for=condition=Ready --timeout=60s")
        .map(drop)
}

/// The container of a node's agent that runs or has been the last to.
fn agent(world: &World, node: &str) -> Result<String> {
    let said = world.kubectl(&format!(
        "get pods -n kube-system -l app.kubernetes.io/name=hachi \
         --field-selector spec.nodeName={node} \
         -o jsonpath={{.items[*].status.containerStatuses[*].containerID}}"
    ))?;
    let ids: Vec<_> = said.split_whitespace().collect();
    ensure!(ids.len() == 1, "{node} has these agents: {ids:?}");
    Ok(ids[0].to_owned())
}

/// As while a node is drained of what may be drained: the agents are deleted. A Pod that is created then
/// waits, and says what for.
fn missing(world: &World) -> Result<()> {
    let place = |selector: &str| {
        let patch =
            format!("{{\"spec\":{{\"template\":{{\"spec\":{{\"nodeSelector\":{selector}}}}}}}}}");
        world.kubectl_words(&[
            "-n",
            "kube-system",
            "patch",
            "daemonset",
            "hachi",
            "-p",
            &patch,
        ])
    };
    place("{\"nobody\":\"has\"}")?;
    world.kubectl(
        "wait pod -n kube-system -l app.kubernetes.io/name=hachi --for=delete --timeout=60s",
    )?;
    world.apply(&world::pod("late", "late", "node2"))?;
    eventually(LIMIT, || {
        let events = world.kubectl("get events -n app --field-selector involvedObject.name=late,reason=FailedCreatePodSandBox -o jsonpath={.items[*].message}")?;
        ensure!(events.contains("hachi-cni"), "{events}");
        Ok(())
    })?;
    place("{\"nobody\":null}")?;
    world.rolled_out("hachi")?;
    world.kubectl("wait pod late -n app --for=condition=Ready --timeout=60s")?;
    world.kubectl("delete pod late -n app").map(drop)
}

fn kubelets_restarted(world: &World) -> Result<()> {
    for node in NODES {
        world.cluster().restart_kubelet(node)?;
    }
    works(world)
}

/// The containers are their shims', which stay.
fn runtimes_restarted(world: &World) -> Result<()> {
    for node in NODES {
        world.cluster().restart_containerd(node)?;
    }
    works(world)
}

/// A Pod can be made and deleted again.
fn works(world: &World) -> Result<()> {
    for node in NODES {
        world.apply(&world::pod(&format!("after-{node}"), "late", node))?;
        world.kubectl(&format!(
            "wait pod after-{node} -n app --for=condition=Ready --timeout=60s"
        ))?;
        world.kubectl(&format!("delete pod after-{node} -n app"))?;
    }
    Ok(())
}
