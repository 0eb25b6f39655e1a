//! What a test or the demo does with a running cluster: kubectl, probes, programs, agents.

use std::{
    ffi::OsStr,
    fs,
    net::{IpAddr, SocketAddr},
    process::{Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use super::{AGENT_LIMIT, Cluster};
use crate::{
    agent::Agent,
    kubelet::Running,
    netns::Netns,
    node::Node,
    run,
    spawn::Launch,
    workload::{
        ask::{Answer, Ask},
        asker::Asker,
        probe::{Outcome, Target, probe},
        share::Share,
        stream::Stream,
    },
};

impl Cluster {
    /// Runs kubectl; fails as it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_with(arguments, "")
    }

    /// `kubectl apply` of a manifest's text.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        self.kubectl_with(&["apply", "-f", "-"], manifest)
    }

    /// Writes the status of each object of a manifest's text, as controllers do.
    pub fn replace_status(&self, manifest: &str) -> Result<String> {
        self.kubectl_with(&["replace", "--subresource=status", "-f", "-"], manifest)
    }

    fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = Command::new("kubectl");
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .arg("--cache-dir")
            .arg(self.options.dir.join("kubectl-cache"))
            .args(arguments);
        let output = run::with_input(&mut command, input.as_bytes())
            .context("run kubectl (cargo xtask setup installs it)")?;
        text(&output).with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    /// Waits until every Pod of a namespace is ready.
    pub fn wait_ready(&self, namespace: &str) -> Result<()> {
        self.kubectl(&[
            "wait",
            "pod",
            "--all",
            "-n",
            namespace,
            "--for=condition=Ready",
            "--timeout=60s",
        ])
        .map(drop)
    }

    /// A Pod that runs, by `NAMESPACE/NAME`.
    pub fn pod(&self, label: &str) -> Result<Running> {
        let (namespace, name) = label.split_once('/').context("say NAMESPACE/NAME")?;
        let kubelet = self
            .kubelet
            .as_ref()
            .context("the cluster has no kubelet")?;
        let key = (namespace.to_owned(), name.to_owned());
        kubelet
            .context
            .running()
            .get(&key)
            .cloned()
            .with_context(|| format!("no Pod {label} runs"))
    }

    /// A Pod's address, of the first family that the cluster has.
    pub fn pod_ip(&self, label: &str) -> Result<IpAddr> {
        let pod = self.pod(label)?;
        pod.addresses
            .first()
            .copied()
            .with_context(|| format!("{label} has no address"))
    }

    /// A Service's first ClusterIP.
    pub fn service_ip(&self, namespace: &str, name: &str) -> Result<IpAddr> {
        let ip = self.kubectl(&[
            "get",
            "service",
            name,
            "-n",
            namespace,
            "-o",
            "jsonpath={.spec.clusterIP}",
        ])?;
        ip.parse()
            .with_context(|| format!("the ClusterIP {ip:?} of {namespace}/{name}"))
    }

    /// A node's first address.
    pub fn node_ip(&self, name: &str) -> Result<IpAddr> {
        let addresses = &self.node(name)?.addresses;
        addresses
            .first()
            .copied()
            .with_context(|| format!("{name} has no address"))
    }

    /// Where `NAMESPACE/POD`, `node/NAME` or `outside` is on the network.
    pub fn netns(&self, place: &str) -> Result<NetnsRef<'_>> {
        if place == "outside" {
            return Ok(NetnsRef::Borrowed(&self.fabric));
        }
        match place.strip_prefix("node/") {
            Some(name) => self
                .node(name)
                .map(|node| NetnsRef::Shared(Arc::clone(&node.netns))),
            None => Ok(NetnsRef::Shared(self.pod(place)?.netns)),
        }
    }

    fn node(&self, name: &str) -> Result<&Arc<Node>> {
        let node = self.nodes.iter().find(|node| node.name == name);
        node.with_context(|| format!("no node {name}"))
    }

    fn agent(&self, node: &str) -> Result<&Arc<Agent>> {
        let index = self.nodes.iter().position(|other| other.name == node);
        index
            .and_then(|index| self.agents.get(index))
            .with_context(|| format!("no node {node}"))
    }

    /// Asks once, from `NAMESPACE/POD`, `node/NAME` or `outside`.
    pub fn probe(&self, from: &str, to: Target, timeout: Duration) -> Result<Outcome> {
        self.netns(from)?.get().enter(|| probe(to, timeout))
    }

    /// Opens a TCP stream from a Pod.
    pub fn stream(&self, from: &str, to: SocketAddr) -> Result<Stream> {
        Stream::start(self.netns(from)?.get(), to)
    }

    /// Runs a program in `NAMESPACE/POD` or `node/NAME` to its end; fails as it fails.
    pub fn exec(&self, target: &str, program: &str, arguments: &[&str]) -> Result<String> {
        let mut launch = self.launch(target, &[], program)?;
        launch.command().args(arguments);
        let output = run::with_input(&mut launch.into_command(), b"")?;
        text(&output).with_context(|| format!("in {target}: {program} {}", arguments.join(" ")))
    }

    fn launch(&self, target: &str, options: &[&str], program: impl AsRef<OsStr>) -> Result<Launch> {
        let place = match target.strip_prefix("node/") {
            Some(name) => self.node(name)?.place(),
            None => self.pod(target)?.place,
        };
        Launch::new(&place, &self.id, options, program)
    }

    /// Asks from a process of its own in `NAMESPACE/POD` or `node/NAME`, which is in the node's cgroup
    /// as every process there, so that socket load balancing takes part.
    pub fn ask(&self, from: &str, ask: &Ask) -> Result<Vec<Answer>> {
        self.answers(from, &ask.arguments())
    }

    /// As [`Self::ask`], until it is stopped, however often it is to ask.
    pub fn keep_asking(&self, from: &str, ask: &Ask) -> Result<Asker> {
        let ask = Ask {
            count: u32::MAX,
            ..ask.clone()
        };
        let parent = std::process::id().to_string();
        let program = run::own_binary("hachi-pod")?;
        let mut launch = self.launch(from, &["--die-with", &parent], program)?;
        launch
            .command()
            .args(ask.arguments())
            .stdout(Stdio::piped());
        Asker::of(launch.start()?)
    }

    /// As [`Self::ask`], several servers from one port.
    pub fn share(&self, from: &str, share: &Share) -> Result<Vec<Answer>> {
        self.answers(from, &share.arguments())
    }

    fn answers(&self, from: &str, arguments: &[String]) -> Result<Vec<Answer>> {
        let program = run::own_binary("hachi-pod")?;
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let lines = self.exec(from, &program.to_string_lossy(), &arguments)?;
        lines.lines().map(Answer::parse).collect()
    }

    /// Ends a node's agent with SIGKILL; it stays down until [`Self::start_agent`].
    pub fn kill_agent(&self, node: &str) -> Result<()> {
        self.agent(node)?.stop(Signal::SIGKILL)
    }

    /// Starts a node's agent without waiting for it.
    pub fn start_agent(&self, node: &str) -> Result<()> {
        self.agent(node)?.start()
    }

    /// As [`Self::start_agent`], with options besides those that every agent has; they stay with it.
    pub fn start_agent_with(&self, node: &str, options: &[&str]) -> Result<()> {
        self.agent(node)?.start_with(options)
    }

    /// Starts a node's agent without one of the capabilities that the manifest gives; it stays so until
    /// this says otherwise.
    pub fn start_agent_without(&self, node: &str, capability: Option<&str>) -> Result<()> {
        self.agent(node)?.start_without(capability)
    }

    /// The process of a node's agent, while it runs.
    pub fn agent_pid(&self, node: &str) -> Result<Option<u32>> {
        Ok(self.agent(node)?.pid())
    }

    /// Waits until a node's agent can serve an ADD; returns its status.
    pub fn wait_agent(&self, node: &str) -> Result<hachi_api::Status> {
        self.agent(node)?.wait_ready(AGENT_LIMIT)
    }

    /// The end of each agent's log, for a test that fails.
    #[must_use]
    pub fn agent_logs(&self, lines: usize) -> String {
        let tail = |node: &Arc<Node>| {
            let log = fs::read_to_string(node.agent_log()).unwrap_or_default();
            let all: Vec<_> = log.lines().collect();
            let last = all[all.len().saturating_sub(lines)..].join("\n");
            format!("--- agent of {}:\n{last}\n", node.name)
        };
        self.nodes.iter().map(tail).collect()
    }
}

/// A network namespace of the cluster, whoever holds it.
#[derive(Debug)]
pub enum NetnsRef<'a> {
    /// The cluster's own.
    Borrowed(&'a Netns),
    /// A node's or a Pod's.
    Shared(Arc<Netns>),
}

impl NetnsRef<'_> {
    /// The namespace.
    #[must_use]
    pub fn get(&self) -> &Netns {
        match self {
            Self::Borrowed(netns) => netns,
            Self::Shared(netns) => netns,
        }
    }
}

fn text(output: &Output) -> Result<String> {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!(
            "{}\n{stdout}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(stdout)
}
