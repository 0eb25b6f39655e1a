//! A node's containerd and kubelet, for clusters whose Pods are real containers.
//!
//! ```text
//!  kubelet (from the assets) ── CRI ──> containerd ──> runc, hachi-cni (as the DaemonSet installs it)
//! ```
//! Both run in the node's namespaces, with all their directories below the node's own. The cgroups of
//! containers are below the cluster's in every hierarchy, so they end with the cluster.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::{
    api, cgroup, cluster, image::POD_IMAGE, names::ClusterId, node::Node, run, spawn::Launch,
};

/// What a node needs of the machine besides the assets.
const PROGRAMS: [&str; 4] = ["containerd", "containerd-shim-runc-v2", "ctr", "runc"];

/// containerd's socket, as the node sees it.
const SOCKET: &str = "/run/containerd/containerd.sock";

/// How long containerd may take to answer.
const LIMIT: Duration = Duration::from_secs(60);

/// What this machine lacks to run Pods with a kubelet and containerd; `Ok` if nothing.
pub fn available() -> Result<()> {
    api::full_assets()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |name: &str| std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    if let Some(missing) = PROGRAMS.iter().find(|name| !found(name)) {
        bail!("no {missing}: install containerd and runc");
    }
    match cgroup::root() {
        None => bail!("no cgroup of version 2"),
        Some(root) if cgroup::version_1().is_empty() => bail!(
            "the controllers are in {}, where a node's processes are in the way of its containers'",
            root.display()
        ),
        Some(_) => Ok(()),
    }
}

/// The two processes of a node.
#[derive(Debug)]
pub(crate) struct Machine {
    processes: Vec<Child>,
}

impl Machine {
    /// Starts containerd, gives it the images, and starts the kubelet.
    pub(crate) fn start(
        id: &ClusterId,
        node: &Node,
        kubeconfig: &str,
        images: &[PathBuf],
    ) -> Result<Self> {
        let mut machine = Self {
            processes: Vec::new(),
        };
        let config = node.dir.join("containerd.toml");
        fs::write(&config, containerd()).with_context(|| format!("write {}", config.display()))?;
        let arguments = ["--config".to_owned(), config.display().to_string()];
        machine.launch(id, node, Path::new("containerd"), &arguments)?;
        machine.wait(id, node)?;
        for image in images {
            import(id, node, image)?;
        }
        let containers = containers(id, node);
        for root in cgroup::version_1() {
            let path = root.join(&containers);
            fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let config = node.dir.join("kubelet.json");
        fs::write(&config, kubelet(id, node).to_string())
            .with_context(|| format!("write {}", config.display()))?;
        let file = node.dir.join("kubelet.kubeconfig");
        cluster::write_private(&file, kubeconfig)?;
        let addresses: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
        let arguments = [
            format!("--config={}", config.display()),
            format!("--kubeconfig={}", file.display()),
            format!("--hostname-override={}", node.name),
            format!("--node-ip={}", addresses.join(",")),
            "--root-dir=/var/lib/kubelet".to_owned(),
        ];
        let program = api::full_assets()?.join(api::KUBELET);
        machine.launch(id, node, &program, &arguments)?;
        Ok(machine)
    }

    fn launch(
        &mut self,
        id: &ClusterId,
        node: &Node,
        program: &Path,
        arguments: &[String],
    ) -> Result<()> {
        let parent = std::process::id().to_string();
        let mut launch = Launch::new(&node.place(), id, &["--die-with", &parent], program)?;
        launch.command().args(arguments);
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        launch.log_to(&node.dir.join(format!("{name}.log")))?;
        let child = launch.start();
        self.processes
            .push(child.with_context(|| format!("start {name} of {}", node.name))?);
        Ok(())
    }

    fn wait(&mut self, id: &ClusterId, node: &Node) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let Err(error) = ctr(id, node, &["version"]) else {
                return Ok(());
            };
            for process in &mut self.processes {
                if let Some(status) = process.try_wait().context("look after containerd")? {
                    bail!("containerd ended ({status}); see {}", node.dir.display());
                }
            }
            if Instant::now() > deadline {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            // One that has ended by itself is as good.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Gives a node's containerd the image of an archive.
pub(crate) fn import(id: &ClusterId, node: &Node, archive: &Path) -> Result<()> {
    let file = archive.display().to_string();
    ctr(
        id,
        node,
        &["--namespace", "k8s.io", "images", "import", &file],
    )
    .with_context(|| format!("import {file} on {}", node.name))
}

fn ctr(id: &ClusterId, node: &Node, arguments: &[&str]) -> Result<()> {
    let mut launch = Launch::new(&node.place(), id, &["--limit", "120"], "ctr")?;
    launch.command().args(["--address", SOCKET]).args(arguments);
    let output = run::with_input(&mut launch.into_command(), b"")?;
    if !output.status.success() {
        bail!("ctr: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// containerd's configuration (version 2, of containerd 1.6): its own places, and an image that is
/// there for sandboxes.
fn containerd() -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "{SOCKET}"

[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{POD_IMAGE}"
  # A machine may keep root from lowering it.
  restrict_oom_score_adj = true
"#
    )
}

/// The cgroup of a node's containers, in every hierarchy.
fn containers(id: &ClusterId, node: &Node) -> String {
    format!("{}/{}", id.stem(), node.name)
}

/// The kubelet's configuration (`kubelet.config.k8s.io/v1beta1`): a small machine that evicts nobody
/// and trusts whoever reaches the node's port, as only this cluster does.
fn kubelet(id: &ClusterId, node: &Node) -> serde_json::Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", containers(id, node)),
        "cgroupsPerQOS": true,
        "enforceNodeAllocatable": [],
        "evictionHard": {
            "memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
            "imagefs.available": "0%", "imagefs.inodesFree": "0%",
        },
        "imageGCHighThresholdPercent": 100,
        "failSwapOn": false,
        "localStorageCapacityIsolation": false,
        "makeIPTablesUtilChains": false,
        "oomScoreAdj": 0,
        "resolvConf": "",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
    })
}
