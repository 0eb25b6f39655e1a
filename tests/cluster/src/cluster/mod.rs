//! The cluster as a value: started, asked, and gone when dropped.
//!
//! ```text
//!  Cluster (this process)
//!   ├─ fabric and node namespaces, mounts, cgroups     node.rs, mntns.rs, netns.rs, cgroup.rs
//!   ├─ API double, on a thread of its own              api.rs
//!   ├─ kubelets, on a thread of their own              kubelet.rs, pod.rs, cni.rs
//!   ├─ agents, a process a node                        agent.rs
//!   └─ reaper, a process that outlives all of it       cleanup.rs
//! ```

mod ask;
mod machines;

pub use ask::NetnsRef;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use hachi_apiserver::Store;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};
use tokio::sync::oneshot;

use crate::{
    agent::Agent,
    api::Api,
    bed,
    cleanup::{self, Reaper},
    image, kubelet,
    machine::Machine,
    names::ClusterId,
    netns::{NETNS_DIR, Netns},
    node::{self, Node},
    options::{Kubelets, Network, Options},
    state::{self, NodeState, State},
};

/// How long an agent may take to be ready; a machine that also compiles is slow, and one that is
/// translated takes a minute to verify the programs when nothing else runs.
const AGENT_LIMIT: Duration = Duration::from_secs(180);

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    // Fields are dropped in this order, after `Drop` has ended the processes.
    options: Options,
    id: ClusterId,
    api: Option<Api>,
    kubelet: Option<Kubelet>,
    machines: Vec<Machine>,
    agents: Vec<Arc<Agent>>,
    nodes: Vec<Arc<Node>>,
    fabric: Netns,
    reaper: Option<Reaper>,
    _lock: Flock<fs::File>,
}

/// The thread that plays the kubelets.
struct Kubelet {
    context: Arc<kubelet::Context>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Cluster {
    /// Starts a cluster and waits until its nodes can run Pods.
    pub fn start(options: Options) -> Result<Self> {
        Self::start_with(options, &mut |_| ())
    }

    /// Starts a cluster, telling of its progress.
    pub fn start_with(mut options: Options, progress: &mut dyn FnMut(&str)) -> Result<Self> {
        if !hachi_testutil::is_root() {
            bail!("the cluster needs root, for network namespaces; nothing was changed");
        }
        options.check()?;
        fs::create_dir_all(&options.dir)
            .with_context(|| format!("create {}", options.dir.display()))?;
        // Programs of the nodes have other working directories.
        options.dir = options
            .dir
            .canonicalize()
            .context("resolve the cluster's directory")?;
        options.dist = options.dist.canonicalize().unwrap_or(options.dist);
        let lock = lock(&options.dir)?;
        cleanup::clean_dead()?;
        cleanup::clean_files(&options.dir);

        let id = ClusterId::random()?;
        let made_dir = !Path::new(NETNS_DIR).exists();
        let reaper = Reaper::start(&id, &options, made_dir)?;
        progress("making the bridge");
        // From here on the value's own `Drop` undoes everything.
        let mut cluster = Self {
            fabric: node::fabric(&id, &options)?,
            id,
            api: None,
            kubelet: None,
            machines: Vec::new(),
            agents: Vec::new(),
            nodes: Vec::new(),
            reaper: Some(reaper),
            options,
            _lock: lock,
        };
        cluster.build(progress)?;
        Ok(cluster)
    }

    fn build(&mut self, progress: &mut dyn FnMut(&str)) -> Result<()> {
        progress(&format!("making {} nodes", self.options.nodes));
        for index in 1..=self.options.nodes {
            let index = u8::try_from(index).context("too many nodes")?;
            let node = Node::create(&self.id, &self.options, &self.fabric, index)?;
            self.nodes.push(Arc::new(node));
        }
        progress("starting the API");
        let api = Api::start(&self.id, &self.options, &self.fabric)?;
        write_private(&self.kubeconfig(), &api.kubeconfig)?;
        for node in &self.nodes {
            write_private(&node.dir.join("run/kubeconfig"), &api.node_kubeconfig)?;
        }
        let (kubeconfig, server) = (api.kubeconfig.clone(), api.server);
        self.api = Some(api);

        if self.options.kubelets == Kubelets::Real {
            progress("starting containerd and the kubelets");
            self.prepare_agents();
            return self.start_machines(server);
        }
        progress("registering the nodes");
        self.prepare_agents();
        let (kubelet, cidrs) = self.start_kubelet(&kubeconfig)?;
        self.kubelet = Some(kubelet);
        if self.options.network == Network::Native {
            node::route_pods(&self.fabric, &self.nodes, &cidrs)
                .context("tell the router of Pods")?;
        }
        if self.options.agents {
            progress("starting the agents");
            self.agents.iter().try_for_each(|agent| agent.start())?;
            for agent in &self.agents {
                agent.wait_ready(AGENT_LIMIT)?;
            }
        }
        self.state(server, cidrs).write(&self.options.dir)
    }

    /// Starts the real kubelets and waits until all are known to the API.
    fn start_machines(&mut self, server: SocketAddr) -> Result<()> {
        let image = image::pod(&self.options.dir).context("pack the image of Pods")?;
        let api = self.api.as_ref().context("the API is started first")?;
        for (node, kubeconfig) in self.nodes.iter().zip(&api.kubelet_kubeconfigs) {
            let images = [image.clone()];
            self.machines
                .push(Machine::start(&self.id, node, kubeconfig, &images)?);
        }
        let mut cidrs = Vec::new();
        for node in &self.nodes {
            let path = "jsonpath={.spec.podCIDRs[*]}";
            let ask = || {
                let blocks = self.kubectl(&["get", "node", &node.name, "-o", path])?;
                let blocks: Vec<_> = blocks.split_whitespace().map(str::to_owned).collect();
                anyhow::ensure!(!blocks.is_empty(), "{} has no podCIDRs", node.name);
                Ok(blocks)
            };
            eventually(AGENT_LIMIT, || ask().map(drop))
                .with_context(|| format!("see {}/kubelet.log", node.dir.display()))?;
            cidrs.push(ask()?);
        }
        self.state(server, cidrs).write(&self.options.dir)
    }

    /// Gives the real containerd of every node the image of an archive.
    pub fn import_image(&self, archive: &Path) -> Result<()> {
        let mut machines = self.machines.iter();
        machines.try_for_each(|machine| machine.import(archive))
    }

    fn prepare_agents(&mut self) {
        let program = self.options.dist.join("hachi-agent");
        let mut options = self.options.agent_options.clone();
        if self.options.network == Network::Native {
            options.push("--routing=native".to_owned());
        }
        let agent = |node: &Arc<Node>| {
            Arc::new(Agent::new(
                self.id.clone(),
                Arc::clone(node),
                program.clone(),
                options.clone(),
            ))
        };
        self.agents = self.nodes.iter().map(agent).collect();
    }

    fn start_kubelet(&self, kubeconfig: &str) -> Result<(Kubelet, Vec<Vec<String>>)> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the kubelets' runtime")?;
        let api = self.api.as_ref().context("the API is started first")?;
        let (context, cidrs) = runtime.block_on(async {
            let client = client(kubeconfig).await?;
            api.start_controllers(&client);
            let mut cidrs = Vec::new();
            for (index, node) in self.nodes.iter().enumerate() {
                let blocks = if api.assigns_cidrs() {
                    Vec::new()
                } else {
                    self.options.family.node_cidrs(index)
                };
                kubelet::register(&client, node, &blocks).await?;
            }
            for node in &self.nodes {
                cidrs.push(kubelet::pod_cidrs(&client, &node.name).await?);
            }
            let dir = self.options.dir.clone();
            let context = kubelet::Context::new(self.id.clone(), client, self.nodes.clone(), dir);
            anyhow::Ok((Arc::new(context), cidrs))
        })?;
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::clone(&context);
        let agents = self.agents.clone();
        let revive = self.options.revive;
        let body = move || {
            runtime.block_on(async {
                let tending = tokio::spawn(tend(agents, revive));
                kubelet::run(shared, stopped).await;
                tending.abort();
            });
        };
        let thread = thread::Builder::new()
            .name("kubelet".into())
            .spawn(body)
            .context("start the kubelets' thread")?;
        Ok((
            Kubelet {
                context,
                stop: Some(stop),
                thread: Some(thread),
            },
            cidrs,
        ))
    }

    fn state(&self, server: SocketAddr, cidrs: Vec<Vec<String>>) -> State {
        let pid = std::process::id();
        let nodes = self.nodes.iter().zip(&self.agents).zip(cidrs);
        let nodes = nodes.map(|((node, agent), pod_cidrs)| NodeState {
            name: node.name.clone(),
            addresses: node.addresses.clone(),
            pod_cidrs,
            network_namespace: Path::new(NETNS_DIR).join(node.netns.name()),
            agent_socket: node.agent_socket(),
            agent_log: node.agent_log(),
            agent_pid: agent.pid(),
            place: node.place(),
        });
        State {
            id: self.id.as_str().to_owned(),
            pid,
            pid_started: state::started(pid).unwrap_or_default(),
            family: self.options.family,
            kubeconfig: self.kubeconfig(),
            server: format!("https://{server}"),
            fabric: Path::new(NETNS_DIR).join(self.fabric.name()),
            nodes: nodes.collect(),
        }
    }

    /// Its id, which is in every name.
    #[must_use]
    pub fn id(&self) -> &ClusterId {
        &self.id
    }

    /// What it was started with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// The namespace of the bridge, outside of every node.
    #[must_use]
    pub fn fabric(&self) -> &Netns {
        &self.fabric
    }

    /// The kubeconfig for this machine.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.options.dir.join("kubeconfig")
    }

    /// The double's objects, without a detour over the network; none with the real API.
    #[must_use]
    pub fn store(&self) -> Option<&Store> {
        self.api.as_ref()?.store()
    }

    /// Makes the API forget what has changed so far, so that every watch is told 410 Gone and begins
    /// anew. The double forgets; the real API is started anew, and away for some seconds. Returns how
    /// long agents may take to know what changes then.
    pub fn forget_history(&self) -> Result<Duration> {
        let api = self.api.as_ref().context("the cluster has ended")?;
        let is_real = api.store().is_none();
        if is_real {
            // Whatever a watch has seen last, the server that comes begins after it.
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
            let now = format!("test.hachi.dev/forgotten={now}");
            self.kubectl(&["annotate", "namespace", "default", "--overwrite", &now])?;
        }
        api.forget()?;
        // A server that was away is tried again every 15 s at least.
        Ok(if is_real { 4 * bed::LIMIT } else { bed::LIMIT })
    }

    /// Ends the cluster and waits until nothing of it is left.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        drop(self.kubelet.take());
        for agent in &self.agents {
            if let Err(error) = agent.stop(Signal::SIGKILL) {
                tracing::warn!(error = format!("{error:#}"), "an agent did not end");
            }
        }
        self.machines.clear();
        drop(self.api.take());
        self.reaper.take().map_or(Ok(()), Reaper::finish)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.agent_logs(30));
        }
        if let Err(error) = self.end() {
            tracing::error!(
                error = format!("{error:#}"),
                "the cluster left something behind"
            );
        }
    }
}

impl std::fmt::Debug for Kubelet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kubelet")
            .field("running", &*self.context.running())
            .finish_non_exhaustive()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the kubelets' thread panicked");
        }
    }
}

/// Calls `check` until it succeeds; fails with its last words.
pub fn eventually<T>(limit: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match check() {
            Ok(found) => return Ok(found),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

async fn tend(agents: Vec<Arc<Agent>>, revive: bool) {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        for agent in &agents {
            if let Err(error) = agent.tend(revive) {
                tracing::error!(
                    error = format!("{error:#}"),
                    "an agent cannot be looked after"
                );
            }
        }
    }
}

pub(crate) async fn client(kubeconfig: &str) -> Result<kube::Client> {
    use kube::config::{KubeConfigOptions, Kubeconfig};
    let kubeconfig = Kubeconfig::from_yaml(kubeconfig).context("read the kubeconfig")?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .context("use the kubeconfig")?;
    kube::Client::try_from(config).context("make a client")
}

fn lock(dir: &Path) -> Result<Flock<fs::File>> {
    let path = dir.join("lock");
    let file = fs::File::create(&path).with_context(|| format!("open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        anyhow::anyhow!(
            "a cluster runs in {} already ({error}); end it first: cargo xtask down",
            dir.display()
        )
    })
}

pub(crate) fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("write {}", path.display()))
}
