//! What is done with nodes that have a kubelet and containerd, and with the containers on them.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Cluster;
use crate::machine::Machine;

impl Cluster {
    fn machine(&self, node: &str) -> Result<&Machine> {
        let found = self.machines.iter().find(|machine| machine.name() == node);
        found.with_context(|| format!("no node {node} with a kubelet"))
    }

    /// Ends a node's kubelet with SIGKILL and starts it again.
    pub fn restart_kubelet(&self, node: &str) -> Result<()> {
        self.machine(node)?.restart_kubelet()
    }

    /// Ends a node's containerd with SIGKILL and starts it again; the containers go on.
    pub fn restart_containerd(&self, node: &str) -> Result<()> {
        self.machine(node)?.restart_containerd()
    }

    /// Ends all of a node's processes, and drops what it has in memory alone: `/run`, mounts,
    /// interfaces, what is pinned.
    pub fn power_off(&self, node: &str) -> Result<()> {
        self.machine(node)?.power_off()
    }

    /// Starts a node again after [`Self::power_off`].
    pub fn power_on(&self, node: &str) -> Result<()> {
        self.machine(node)?.power_on()
    }

    /// Gives an image of a node another name besides.
    pub fn tag_image(&self, node: &str, name: &str, other: &str) -> Result<()> {
        let tag = ["images", "tag", "--force", name, other];
        self.machine(node)?.ctr(&tag).map(drop)
    }

    /// The process of a container, by the id that the kubelet reports (`containerd://...`).
    pub fn container_pid(&self, node: &str, id: &str) -> Result<u32> {
        let id = id.trim_start_matches("containerd://");
        let tasks = self.machine(node)?.ctr(&["tasks", "ls"])?;
        let mut rows = tasks.lines().map(|line| line.split_whitespace());
        let found = rows.find_map(|mut row| (row.next() == Some(id)).then(|| row.next()));
        let pid = found
            .flatten()
            .with_context(|| format!("{id} does not run on {node}"))?;
        pid.parse()
            .with_context(|| format!("the process {pid:?} of {id}"))
    }

    /// What the runtime was told of a container, which may have ended: the configuration of the OCI
    /// runtime specification.
    pub fn container_spec(&self, node: &str, id: &str) -> Result<Value> {
        let id = id.trim_start_matches("containerd://");
        let info = self.machine(node)?.ctr(&["containers", "info", id])?;
        let mut info: Value = serde_json::from_str(&info).context("read what ctr says")?;
        let spec = info["Spec"].take();
        ensure!(spec.is_object(), "{id} has no specification");
        Ok(spec)
    }
}
