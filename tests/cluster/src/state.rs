//! `cluster.json`: what other programs and other runs may know of a cluster.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{options::Family, spawn::Place};

/// The file's name.
pub const FILE: &str = "cluster.json";

/// A running cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Its id, which is in every name.
    pub id: String,
    /// The process that owns it.
    pub pid: u32,
    /// When that process started, in the kernel's ticks: a process id alone may be another's by now.
    pub pid_started: u64,
    /// Address families.
    pub family: Family,
    /// For kubectl on this machine.
    pub kubeconfig: PathBuf,
    /// The API's address on this machine.
    pub server: String,
    /// Network namespace of the bridge.
    pub fabric: PathBuf,
    /// The nodes.
    pub nodes: Vec<NodeState>,
}

/// A node of a running cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeState {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The blocks of its Pods' addresses.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
    /// Its network namespace, also for `ip netns exec`.
    pub network_namespace: PathBuf,
    /// The agent's socket, as this machine sees it.
    pub agent_socket: PathBuf,
    /// The agent's log.
    pub agent_log: PathBuf,
    /// The agent's process when the cluster was started.
    pub agent_pid: Option<u32>,
    /// Where to run programs on the node.
    pub place: Place,
}

/// What a Pod's record says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodState {
    /// Where to run programs in the Pod.
    pub place: Place,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl State {
    /// Reads the state of the cluster in a directory, running or not; none if there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .with_context(|| format!("{} is not what a cluster writes", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    /// Reads the state of the running cluster in a directory.
    pub fn running(dir: &Path) -> Result<Self> {
        match Self::read(dir)? {
            Some(state) if state.alive() => Ok(state),
            _ => bail!(
                "no cluster runs in {}; start one: cargo xtask up",
                dir.display()
            ),
        }
    }

    /// Writes it, so that a reader sees all of it or nothing.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("write the cluster's state")?;
        let (path, new) = (dir.join(FILE), dir.join("cluster.json.new"));
        fs::write(&new, text + "\n")
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("write {}", path.display()))
    }

    /// Whether the process that owns it still runs.
    #[must_use]
    pub fn alive(&self) -> bool {
        started(self.pid) == Some(self.pid_started)
    }

    /// Where to run programs in `NAMESPACE/POD` or `node/NAME`.
    pub fn place(&self, dir: &Path, target: &str) -> Result<Place> {
        let (namespace, name) = target
            .split_once('/')
            .context("say where: NAMESPACE/POD or node/NAME")?;
        if namespace == "node" {
            let node = self.nodes.iter().find(|node| node.name == name);
            return node.map(|node| node.place.clone()).with_context(|| {
                let names: Vec<_> = self.nodes.iter().map(|node| node.name.as_str()).collect();
                format!("no node {name}; there are {}", names.join(", "))
            });
        }
        let path = crate::pod::file(dir, namespace, name, "json");
        let bytes = fs::read(&path)
            .with_context(|| format!("no Pod {target} runs here (see kubectl get pods -A)"))?;
        let pod: PodState = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not what a cluster writes", path.display()))?;
        Ok(pod.place)
    }
}

/// When a process started, in the kernel's ticks; none if there is no such process.
#[must_use]
pub fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets, and may contain anything.
    let rest = stat.rsplit_once(')')?.1;
    // `starttime` is field 22; the state, field 3, comes first here.
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let own = started(std::process::id()).unwrap();
        assert!(own > 0);
        assert!(own >= started(1).unwrap());
        assert_eq!(started(u32::MAX), None);
    }
}
