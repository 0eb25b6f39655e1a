//! Two nodes with kubelets, and what is asked of them.

use std::{
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{Cluster, Family, Kubelets, Netns, Node, Options, Outcome, Target, eventually};
use serde_json::Value;

use crate::privileges;

/// How long a real cluster may take for one step.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) const INSTALL: &str = include_str!("../../../../manifests/install.yaml");
pub(crate) const UNINSTALL: &str = include_str!("../../../../manifests/uninstall.yaml");

const SERVICE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: app}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: app}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 8080, targetPort: http}]}
";

/// A client, a server beside it and one on the other node, with a Service for both.
pub(crate) fn apps() -> String {
    let [near, far, client] = [
        ("near", "web", "node1"),
        ("far", "web", "node2"),
        ("client", "client", "node1"),
    ]
    .map(|(name, app, node)| pod(name, app, node));
    format!("{SERVICE}{near}{SERVING}{NEAR}{far}{SERVING}{FAR}{client}")
}

/// A Pod that waits, unless more is said of its container after it.
pub(crate) fn pod(name: &str, app: &str, node: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: app, labels: {{app: {app}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: hachi/pod:test
    imagePullPolicy: Never
"
    )
}

/// What `near` and `far` do. They ask for CPU time: without, the kubelet has them wait for whatever else the
/// machine does.
const SERVING: &str = "
    command: [/hachi-pod, serve, --name, $(NAME)]
    env: [{name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
    resources: {requests: {cpu: 500m}}
    readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1, failureThreshold: 2}
";

const NEAR: &str = "
    ports: [{name: http, containerPort: 80}]
";

const FAR: &str = "
    ports: [{name: http, containerPort: 80, hostPort: 8088}]
    startupProbe: {exec: {command: [/hachi-pod, probe, http, '127.0.0.1:80']}, periodSeconds: 1, timeoutSeconds: 5}
    livenessProbe: {tcpSocket: {port: http}, periodSeconds: 1, timeoutSeconds: 5}
";

pub(crate) const DENY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nobody, namespace: app}
spec: {podSelector: {}, policyTypes: [Ingress]}
";

pub(crate) const ALLOW: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client, namespace: app}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: http}]}]
";

/// The archive of the image, if it was built.
pub(crate) fn image() -> Option<PathBuf> {
    let built = hachi_testutil::dist_dir().join("../image/hachi.tar");
    let path = std::env::var_os("HACHI_IMAGE").map_or(built, PathBuf::from);
    path.canonicalize().ok().filter(|path| path.is_file())
}

pub(crate) struct World {
    cluster: Cluster,
}

impl World {
    /// Two nodes that have the image, and nothing else of Hachi.
    pub(crate) fn start(image: &Path) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("hachi-kubelet-{}", std::process::id()));
        let cluster = Cluster::start(Options {
            kubelets: Kubelets::Real,
            remove_dir: true,
            ..Options::new(dir, hachi_testutil::dist_dir(), Family::Dual)
        })?;
        cluster.import_image(image)?;
        Ok(Self { cluster })
    }

    /// `kubectl apply -f install.yaml`, with the API server's own address, as there is no kube-proxy.
    pub(crate) fn install(&self) -> Result<()> {
        let address = self.cluster.options().family.fabric()[0];
        let key = format!("api-server = \"https://{address}:6443\"");
        let manifest = INSTALL.replace("# api-server =\n", &format!("{key}\n"));
        ensure!(manifest != INSTALL, "install.yaml has no api-server");
        self.apply(&manifest)?;
        self.rolled_out("hachi")?;
        self.kubectl("wait node --all --for=condition=Ready --timeout=60s")
            .map(drop)
    }

    /// As docs/OPERATIONS.md says.
    pub(crate) fn uninstall(&self) -> Result<()> {
        self.delete(INSTALL)?;
        self.apply(UNINSTALL)?;
        self.rolled_out("hachi-uninstall")?;
        privileges::are_those_of_the_manifest(self, UNINSTALL)?;
        self.delete(UNINSTALL)
    }

    pub(crate) fn rolled_out(&self, name: &str) -> Result<()> {
        let rolled = self.kubectl(&format!(
            "-n kube-system rollout status daemonset/{name} --timeout=120s"
        ));
        rolled.with_context(|| {
            let ask = |arguments: &str| {
                self.kubectl(arguments)
                    .unwrap_or_else(|error| format!("{error:#}"))
            };
            format!(
                "{}{}{}",
                ask("get pods -A -o wide"),
                ask("get events -A"),
                ask(&format!(
                    "logs -n kube-system --all-containers --tail=30 -l app.kubernetes.io/name={name}"
                )),
            )
        })?;
        Ok(())
    }

    pub(crate) fn apply(&self, manifest: &str) -> Result<()> {
        self.cluster.apply(manifest).map(drop)
    }

    fn delete(&self, manifest: &str) -> Result<()> {
        let file = self.cluster.options().dir.join("delete.yaml");
        std::fs::write(&file, manifest)?;
        let file = file.display().to_string();
        self.cluster
            .kubectl(&["delete", "--timeout=60s", "-f", &file])
            .map(drop)
    }

    pub(crate) fn kubectl(&self, arguments: &str) -> Result<String> {
        self.cluster
            .kubectl(&arguments.split_whitespace().collect::<Vec<_>>())
    }

    pub(crate) fn pod_ip(&self, name: &str) -> Result<IpAddr> {
        let ip = self.kubectl(&format!(
            "get pod {name} -n app -o jsonpath={{.status.podIP}}"
        ))?;
        ip.parse()
            .with_context(|| format!("the address {ip:?} of {name}"))
    }

    pub(crate) fn service_ip(&self, namespace: &str, name: &str) -> Result<IpAddr> {
        self.cluster.service_ip(namespace, name)
    }

    pub(crate) fn node_ip(&self, name: &str) -> Result<IpAddr> {
        self.cluster.node_ip(name)
    }

    /// Runs a script on a node, outside of any container.
    pub(crate) fn on_node(&self, name: &str, script: &str) -> Result<String> {
        self.cluster
            .exec(&format!("node/{name}"), "sh", &["-c", script])
    }

    /// Asks once from inside a container; returns the name that answered.
    pub(crate) fn ask(&self, pod: &str, to: Target) -> Result<String> {
        let said = self.kubectl(&format!(
            "exec -n app {pod} -- /hachi-pod probe {} {}",
            to.protocol, to.address
        ))?;
        Ok(said.trim().to_owned())
    }

    /// Fails unless a TCP connection opens from inside a container; nothing is said on it.
    pub(crate) fn connects(&self, pod: &str, ip: IpAddr, port: u16) -> Result<()> {
        let to = std::net::SocketAddr::new(ip, port);
        let said = self.kubectl(&format!(
            "exec -n app {pod} -- /hachi-pod stream {to} --seconds 0"
        ));
        match said {
            Err(error) if format!("{error:#}").contains("connect to") => Err(error),
            // How the other side takes silence is its own matter.
            _ => Ok(()),
        }
    }

    /// Waits until a node or the outside is answered.
    pub(crate) fn reached_from(&self, from: &str, to: Target) -> Result<()> {
        eventually(LIMIT, || {
            match self.cluster.probe(from, to, Duration::from_secs(1))? {
                Outcome::Answered(_) => Ok(()),
                other => bail!("{from} to {to}: {other}"),
            }
        })
    }

    fn node(&self, name: &str) -> Result<&Node> {
        let mut nodes = self.cluster.nodes().iter();
        let node = nodes.find(|node| node.name == name);
        node.map(|node| &**node)
            .with_context(|| format!("no node {name}"))
    }

    /// The cluster itself.
    pub(crate) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The network namespace that the runtime made for a Pod.
    pub(crate) fn netns(&self, pod: &str) -> Result<Netns> {
        let path = "{.spec.nodeName} {.status.containerStatuses[0].containerID}";
        let said = self.kubectl_words(&[
            "get",
            "pod",
            pod,
            "-n",
            "app",
            "-o",
            &format!("jsonpath={path}"),
        ])?;
        let (node, id) = said.split_once(' ').context("it does not run")?;
        Netns::of_process(self.container_pid(node, id)?)
    }

    /// The process of a container.
    pub(crate) fn container_pid(&self, node: &str, id: &str) -> Result<u32> {
        self.cluster.container_pid(node, id)
    }

    /// What the runtime was told of a container.
    pub(crate) fn container_spec(&self, node: &str, id: &str) -> Result<Value> {
        self.cluster.container_spec(node, id)
    }

    /// Whether a process is in the node's own namespace of a kind.
    pub(crate) fn shares_namespace(&self, node: &str, pid: u32, kind: &str) -> Result<bool> {
        let node = self.node(node)?;
        let own = match kind {
            "net" => node.netns.path(),
            "mnt" => node.mntns.path(),
            // Nodes have those of the machine.
            _ => PathBuf::from(format!("/proc/self/ns/{kind}")),
        };
        let number = |path: PathBuf| std::fs::metadata(path).map(|found| found.ino());
        Ok(number(format!("/proc/{pid}/ns/{kind}").into())? == number(own)?)
    }

    /// As [`Self::kubectl`], of words that may have spaces.
    pub(crate) fn kubectl_words(&self, words: &[&str]) -> Result<String> {
        self.cluster.kubectl(words)
    }

    pub(crate) fn stop(self) -> Result<()> {
        self.cluster.stop()
    }
}
