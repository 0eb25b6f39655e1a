//! What operators do with a cluster besides installing: scale, look into Pods, run Pods of the kubelet's
//! own, and turn a node off and on again.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    net::IpAddr,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{Outcome, Protocol, Target, eventually, workload::probe::probe};
use serde_json::Value;

use super::world::{self, LIMIT, World};

const CROWD: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: crowd, namespace: app}
spec:
  replicas: 1
  selector: {matchLabels: {app: crowd}}
  template:
    metadata: {labels: {app: crowd}}
    spec:
      terminationGracePeriodSeconds: 1
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: crowd}}}
      containers:
      - {name: main, image: hachi/pod:test, imagePullPolicy: Never, command: [/hachi-pod, serve, --name, crowd]}
";

/// A Pod of a file on the node; the API has its mirror alone, whose identity is another.
const STATIC: &str = "
apiVersion: v1
kind: Pod
metadata: {name: KIND, namespace: app}
spec:
  hostNetwork: SHARED
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: hachi/pod:test
    imagePullPolicy: Never
    command: [/hachi-pod, serve, --name, KIND, --port, '8099']
    readinessProbe: {tcpSocket: {port: 8099}, periodSeconds: 1, timeoutSeconds: 5}
";

/// To 20 replicas and back: each is reached, and each gives its addresses back.
pub(crate) fn deployments_grow_and_shrink(world: &World) -> Result<()> {
    world.apply(CROWD)?;
    for replicas in [20, 1] {
        world.kubectl(&format!(
            "scale deployment crowd -n app --replicas={replicas}"
        ))?;
        world.kubectl("rollout status deployment/crowd -n app --timeout=180s")?;
        if replicas > 1 {
            let nodes = world
                .kubectl("get pods -n app -l app=crowd -o jsonpath={.items[*].spec.nodeName}")?;
            for node in ["node1", "node2"] {
                let count = nodes.split_whitespace().filter(|it| *it == node).count();
                ensure!(count == 10, "{count} Pods on {node}");
            }
            let addresses = world.kubectl(
                "get pods -n app -l app=crowd -o jsonpath={.items[*].status.podIPs[*].ip}",
            )?;
            for ip in addresses.split_whitespace() {
                reaches(world, Target::new(Protocol::Tcp, ip.parse()?, 80), "crowd")?;
            }
        }
    }
    nothing_leaks(world)?;
    world.kubectl("delete deployment crowd -n app").map(drop)
}

/// From the client's namespace, with no program started for it.
fn reaches(world: &World, target: Target, name: &str) -> Result<()> {
    let client = world.netns("client")?;
    eventually(LIMIT, || {
        match client.enter(|| probe(target, LIMIT / 60))? {
            Outcome::Answered(found) if found == name => Ok(()),
            other => bail!("the client to {target}: {other}"),
        }
    })
}

/// The addresses in use on each node are those of its Pods, and every Pod's interface is there, and no
/// other.
fn nothing_leaks(world: &World) -> Result<()> {
    eventually(LIMIT, || {
        let pods: Value = serde_json::from_str(&world.kubectl("get pods -A -o json")?)?;
        for node in ["node1", "node2"] {
            let mut wanted = BTreeSet::new();
            let mut interfaces = 0;
            for pod in pods["items"].as_array().context("no list")? {
                if pod["spec"]["nodeName"] == node && pod["spec"]["hostNetwork"] != true {
                    let ips = pod["status"]["podIPs"].as_array().into_iter().flatten();
                    let ips = ips.filter_map(|ip| ip["ip"].as_str()?.parse::<IpAddr>().ok());
                    wanted.extend(ips);
                    interfaces += 1;
                }
            }
            let said = world.on_node(node, "ls /var/lib/cni/hachi/addresses")?;
            let found: BTreeSet<IpAddr> = said
                .split_whitespace()
                .filter_map(|it| it.parse().ok())
                .collect();
            ensure!(
                found == wanted,
                "{node} has {found:?} in use, for {wanted:?}"
            );
            let links = world.on_node(node, "ip -o link | grep -c ': hachi[0-9a-f]*@'; true")?;
            ensure!(
                links.trim() == interfaces.to_string(),
                "{node} has {links} interfaces of {interfaces} Pods"
            );
        }
        Ok(())
    })
}

/// `kubectl logs` and `port-forward`; `exec` is what all of these tests ask with.
pub(crate) fn pods_are_looked_into(world: &World) -> Result<()> {
    world.kubectl("logs far -n app")?;
    let mut forward = Forward(
        Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(world.cluster().kubeconfig())
            .args([
                "port-forward",
                "-n",
                "app",
                "pod/far",
                ":80",
                "--address",
                "127.0.0.1",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .context("run kubectl")?,
    );
    let mut said = String::new();
    let stdout = forward.0.stdout.take().context("its output")?;
    // It says more with every connection, so this stays open until the end.
    let mut stdout = BufReader::new(stdout);
    stdout.read_line(&mut said)?;
    // Forwarding from 127.0.0.1:40000 -> 80
    let address = said.split_whitespace().nth(2).context(said.clone())?;
    let target = Target {
        protocol: Protocol::Tcp,
        address: address.parse().with_context(|| said.clone())?,
    };
    let answer = probe(target, LIMIT / 6);
    ensure!(answer.name() == Some("far"), "port-forward: {answer}");
    Ok(())
}

struct Forward(Child);

impl Drop for Forward {
    fn drop(&mut self) {
        // One that has ended by itself is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Pods that the kubelet reads from files, of the node's network and of their own.
pub(crate) fn static_pods_are_served(world: &World) -> Result<()> {
    for (kind, shared) in [("of-host", "true"), ("of-pods", "false")] {
        let pod = STATIC.replace("KIND", kind).replace("SHARED", shared);
        let file = format!("/var/lib/kubelet/manifests/{kind}.yaml");
        world.on_node("node2", &format!("cat > {file} << 'END'\n{pod}\nEND"))?;
    }
    for kind in ["of-host", "of-pods"] {
        let name = format!("{kind}-node2");
        eventually(LIMIT, || {
            world.kubectl(&format!("get pod {name} -n app")).map(drop)
        })?;
        world.kubectl(&format!(
            "wait pod {name} -n app --for=condition=Ready --timeout=60s"
        ))?;
        reaches(
            world,
            Target::new(Protocol::Tcp, world.pod_ip(&name)?, 8099),
            kind,
        )?;
    }
    world.on_node("node2", "rm /var/lib/kubelet/manifests/*.yaml")?;
    for kind in ["of-host", "of-pods"] {
        world.kubectl(&format!(
            "wait pod {kind}-node2 -n app --for=delete --timeout=60s"
        ))?;
    }
    nothing_leaks(world)
}

/// A node loses its power and comes back: its Pods do too, with other addresses, and one that was
/// deleted meanwhile has left nothing.
pub(crate) fn a_node_is_turned_off_and_on(world: &World) -> Result<()> {
    world.apply(&world::pod("doomed", "doomed", "node2"))?;
    world.kubectl("wait pod doomed -n app --for=condition=Ready --timeout=60s")?;
    world.cluster().power_off("node2")?;
    // The machine under the nodes has not booted: what is on this node's disk is made to be of another boot.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let earlier = "00000000-0000-4000-8000-000000000000";
    world.on_node(
        "node2",
        &format!(
            "grep -rl {0} /var/lib/cni/hachi | xargs sed -i s/{0}/{earlier}/",
            boot.trim()
        ),
    )?;
    world.kubectl("delete pod doomed -n app --force --grace-period=0")?;
    world.cluster().power_on("node2")?;
    eventually(LIMIT * 2, || {
        let restarts = world.kubectl(
            "get pod far -n app -o jsonpath={.status.containerStatuses[0].restartCount}",
        )?;
        ensure!(restarts != "0", "far was not started again");
        let target = Target::new(Protocol::Tcp, world.pod_ip("far")?, 80);
        let client = world.netns("client")?;
        let answer = client.enter(|| probe(target, LIMIT / 60))?;
        ensure!(
            answer.name() == Some("far"),
            "the client to {target}: {answer}"
        );
        Ok(())
    })?;
    world.rolled_out("hachi")?;
    nothing_leaks(world)
}
