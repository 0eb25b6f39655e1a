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
    sync::{Arc, Mutex, PoisonError},
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

/// Where the kubelet looks for Pods that are nobody's but its own, below its directory.
const STATIC_PODS: &str = "manifests";

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
    id: ClusterId,
    node: Arc<Node>,
    processes: Mutex<Processes>,
}

#[derive(Debug, Default)]
struct Processes {
    containerd: Option<Child>,
    kubelet: Option<Child>,
}

impl Machine {
    /// Starts containerd, gives it the images, and starts the kubelet.
    pub(crate) fn start(
        id: &ClusterId,
        node: &Arc<Node>,
        kubeconfig: &str,
        images: &[PathBuf],
    ) -> Result<Self> {
        let machine = Self {
            id: id.clone(),
            node: Arc::clone(node),
            processes: Mutex::default(),
        };
        let config = machine.containerd_config();
        fs::write(&config, containerd()).with_context(|| format!("write {}", config.display()))?;
        machine.start_containerd()?;
        for image in images {
            machine.import(image)?;
        }
        let containers = containers(id, node);
        for root in cgroup::version_1() {
            let path = root.join(&containers);
            fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let pods = node.dir.join("kubelet").join(STATIC_PODS);
        fs::create_dir_all(&pods).with_context(|| format!("create {}", pods.display()))?;
        let config = machine.kubelet_config();
        fs::write(&config, kubelet(id, node).to_string())
            .with_context(|| format!("write {}", config.display()))?;
        cluster::write_private(&machine.kubeconfig(), kubeconfig)?;
        machine.start_kubelet()?;
        Ok(machine)
    }

    /// The name of its node.
    pub(crate) fn name(&self) -> &str {
        &self.node.name
    }

    /// Ends the kubelet as a crash does, and starts it again.
    pub(crate) fn restart_kubelet(&self) -> Result<()> {
        end(&mut self.processes().kubelet);
        self.start_kubelet()
    }

    /// The same of containerd; its shims keep the containers.
    pub(crate) fn restart_containerd(&self) -> Result<()> {
        end(&mut self.processes().containerd);
        self.start_containerd()
    }

    /// What the end of a machine's power takes: every process, and what is in memory alone. What is on
    /// its disk stays, and so does its uplink.
    pub(crate) fn power_off(&self) -> Result<()> {
        {
            let mut processes = self.processes();
            end(&mut processes.kubelet);
            end(&mut processes.containerd);
        }
        let cgroup = self.node.cgroup.as_deref();
        cgroup::kill(cgroup.context("the node has no cgroup")?)?;
        self.node.mntns.forget()?;
        let links = "for link in $(ls /sys/class/net); do case $link in lo|eth0) ;; \
                     *) ip link delete $link 2>/dev/null ;; esac; done; \
                     ip route flush proto 72; ip -6 route flush proto 72; true";
        let mut launch = Launch::new(&self.node.place(), &self.id, &["--limit", "60"], "sh")?;
        launch.command().args(["-c", links]);
        run::with_input(&mut launch.into_command(), b"").map(drop)
    }

    /// After [`Self::power_off`].
    pub(crate) fn power_on(&self) -> Result<()> {
        self.start_containerd()?;
        self.start_kubelet()
    }

    /// Gives containerd the image of an archive.
    pub(crate) fn import(&self, archive: &Path) -> Result<()> {
        let file = archive.display().to_string();
        self.ctr(&["images", "import", &file])
            .with_context(|| format!("import {file} on {}", self.node.name))
            .map(drop)
    }

    /// Asks containerd about what is the kubelet's.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut launch = Launch::new(&self.node.place(), &self.id, &["--limit", "120"], "ctr")?;
        let own = ["--address", SOCKET, "--namespace", "k8s.io"];
        launch.command().args(own).args(arguments);
        let output = run::with_input(&mut launch.into_command(), b"")?;
        if !output.status.success() {
            bail!("ctr: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn processes(&self) -> std::sync::MutexGuard<'_, Processes> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn containerd_config(&self) -> PathBuf {
        self.node.dir.join("containerd.toml")
    }

    fn kubelet_config(&self) -> PathBuf {
        self.node.dir.join("kubelet.json")
    }

    fn kubeconfig(&self) -> PathBuf {
        self.node.dir.join("kubelet.kubeconfig")
    }

    fn start_containerd(&self) -> Result<()> {
        let config = self.containerd_config().display().to_string();
        let started = self.launch(Path::new("containerd"), &["--config".to_owned(), config])?;
        self.processes().containerd = Some(started);
        self.wait()
    }

    fn start_kubelet(&self) -> Result<()> {
        let addresses: Vec<_> = self
            .node
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect();
        let arguments = [
            format!("--config={}", self.kubelet_config().display()),
            format!("--kubeconfig={}", self.kubeconfig().display()),
            format!("--hostname-override={}", self.node.name),
            format!("--node-ip={}", addresses.join(",")),
            "--root-dir=/var/lib/kubelet".to_owned(),
        ];
        let program = api::full_assets()?.join(api::KUBELET);
        let started = self.launch(&program, &arguments)?;
        self.processes().kubelet = Some(started);
        Ok(())
    }

    fn launch(&self, program: &Path, arguments: &[String]) -> Result<Child> {
        let parent = std::process::id().to_string();
        let options = ["--die-with", &parent];
        let mut launch = Launch::new(&self.node.place(), &self.id, &options, program)?;
        launch.command().args(arguments);
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        launch.log_to(&self.node.dir.join(format!("{name}.log")))?;
        launch
            .start()
            .with_context(|| format!("start {name} of {}", self.node.name))
    }

    /// Waits until containerd answers.
    fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let Err(error) = self.ctr(&["version"]) else {
                return Ok(());
            };
            if let Some(process) = &mut self.processes().containerd
                && let Some(status) = process.try_wait().context("look after containerd")?
            {
                let dir = self.node.dir.display();
                bail!("containerd ended ({status}); see {dir}");
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
        let mut processes = self.processes();
        end(&mut processes.kubelet);
        end(&mut processes.containerd);
    }
}

fn end(process: &mut Option<Child>) {
    if let Some(mut process) = process.take() {
        // One that has ended by itself is as good.
        let _ = process.kill();
        let _ = process.wait();
    }
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
        "fileCheckFrequency": "1s",
        "staticPodPath": format!("/var/lib/kubelet/{STATIC_PODS}"),
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
    })
}
