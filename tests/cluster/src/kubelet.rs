//! The kubelet's part for every node: a task for each Pod that is bound to one.
//!
//! ```text
//! watch of Pods ──> router ──Wish──> worker of one Pod ──> sandbox, plugins, server, status
//! ```

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, pin_mut};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node as KubeNode, Pod};
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams, PostParams},
    runtime::watcher::{self, Event},
};
use serde_json::json;
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
};

use crate::{names::ClusterId, netns::Netns, node::Node, pod, spawn::Place};

/// A Pod that runs.
#[derive(Clone, Debug)]
pub struct Running {
    /// Its node's name.
    pub node: String,
    /// Its addresses, the primary family first.
    pub addresses: Vec<std::net::IpAddr>,
    /// Its network namespace; the node's for a Pod of the host's network.
    pub netns: Arc<Netns>,
    /// Where to run programs in it.
    pub place: Place,
}

/// What the workers share.
pub(crate) struct Context {
    pub(crate) id: ClusterId,
    pub(crate) client: Client,
    pub(crate) nodes: Vec<Arc<Node>>,
    pub(crate) dir: std::path::PathBuf,
    closing: AtomicBool,
    running: Mutex<BTreeMap<(String, String), Running>>,
}

/// What the API wants of a Pod.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    /// Its latest state.
    pub(crate) pod: Arc<Pod>,
    /// Whether the object has gone from the API.
    pub(crate) gone: bool,
}

impl Context {
    pub(crate) fn new(
        id: ClusterId,
        client: Client,
        nodes: Vec<Arc<Node>>,
        dir: std::path::PathBuf,
    ) -> Self {
        Self {
            id,
            client,
            nodes,
            dir,
            closing: AtomicBool::new(false),
            running: Mutex::default(),
        }
    }

    pub(crate) fn running(&self) -> std::sync::MutexGuard<'_, BTreeMap<(String, String), Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the whole cluster is ending.
    pub(crate) fn closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.iter().find(|node| node.name == name)
    }
}

/// Creates the Node object as a kubelet does when it registers, and marks it ready. `blocks` are its
/// podCIDRs where nobody else assigns them.
pub(crate) async fn register(client: &Client, node: &Node, blocks: &[IpNet]) -> Result<()> {
    let api: Api<KubeNode> = Api::all(client.clone());
    let mut object = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {"kubernetes.io/hostname": node.name, "kubernetes.io/os": "linux"},
        },
    });
    if let Some(first) = blocks.first() {
        object["spec"] = json!({"podCIDR": first, "podCIDRs": blocks});
    }
    let object = serde_json::from_value(object).context("build a Node object")?;
    api.create(&PostParams::default(), &object)
        .await
        .with_context(|| format!("register {}", node.name))?;
    let mut addresses = vec![json!({"type": "Hostname", "address": node.name})];
    addresses.extend(
        node.addresses
            .iter()
            .map(|ip| json!({"type": "InternalIP", "address": ip})),
    );
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    let status = json!({"status": {
        "addresses": addresses,
        "capacity": {"cpu": "4", "memory": "8Gi", "pods": "250"},
        "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "250"},
        "conditions": [{
            "type": "Ready", "status": "True", "reason": "KubeletReady",
            "message": "the local cluster's kubelet runs",
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        }],
        "nodeInfo": {
            "kubeletVersion": concat!("v0.0.0-hachi-", env!("CARGO_PKG_VERSION")),
            "operatingSystem": "linux", "architecture": "", "bootID": "", "machineID": "",
            "containerRuntimeVersion": "hachi-cluster://", "kernelVersion": "", "osImage": "",
            "kubeProxyVersion": "", "systemUUID": "",
        },
    }});
    api.patch_status(&node.name, &PatchParams::default(), &Patch::Merge(&status))
        .await
        .with_context(|| format!("report the status of {}", node.name))?;
    Ok(())
}

/// Waits until the node has its podCIDRs, and returns them.
pub(crate) async fn pod_cidrs(client: &Client, name: &str) -> Result<Vec<String>> {
    let api: Api<KubeNode> = Api::all(client.clone());
    for _ in 0..500 {
        let node = api.get(name).await.with_context(|| format!("get {name}"))?;
        let spec = node.spec.unwrap_or_default();
        match spec.pod_cidrs {
            Some(cidrs) if !cidrs.is_empty() => return Ok(cidrs),
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
    anyhow::bail!("{name} was given no podCIDRs")
}

/// Follows the Pods until `stop` is closed; then ends every server.
pub(crate) async fn run(context: Arc<Context>, mut stop: oneshot::Receiver<()>) {
    let mut router = Router {
        context,
        workers: HashMap::new(),
        tasks: JoinSet::new(),
    };
    tokio::select! {
        () = router.follow() => {}
        _ = &mut stop => {}
    }
    router.context.closing.store(true, Ordering::Relaxed);
    router.workers.clear();
    while router.tasks.join_next().await.is_some() {}
}

struct Router {
    context: Arc<Context>,
    workers: HashMap<String, watch::Sender<Wish>>,
    tasks: JoinSet<()>,
}

impl Router {
    async fn follow(&mut self) {
        let api: Api<Pod> = Api::all(self.context.client.clone());
        let stream = watcher::watcher(api, watcher::Config::default());
        pin_mut!(stream);
        let mut listed = HashSet::new();
        while let Some(event) = stream.next().await {
            self.take(event, &mut listed).await;
            self.workers.retain(|_, worker| !worker.is_closed());
            while self.tasks.try_join_next().is_some() {}
        }
    }

    async fn take(
        &mut self,
        event: Result<Event<Pod>, watcher::Error>,
        listed: &mut HashSet<String>,
    ) {
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(pod)) => {
                listed.extend(pod.uid());
                self.route(pod, false);
            }
            Ok(Event::InitDone) => {
                for (uid, worker) in &self.workers {
                    if !listed.contains(uid) {
                        worker.send_modify(|wish| wish.gone = true);
                    }
                }
            }
            Ok(Event::Apply(pod)) => self.route(pod, false),
            Ok(Event::Delete(pod)) => self.route(pod, true),
            // The watcher begins anew by itself.
            Err(error) => {
                tracing::warn!(%error, "the watch of Pods broke");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }

    fn route(&mut self, pod: Pod, gone: bool) {
        let (Some(uid), Some(spec)) = (pod.uid(), &pod.spec) else {
            return;
        };
        let Some(name) = spec.node_name.clone() else {
            return;
        };
        let wish = Wish {
            pod: Arc::new(pod),
            gone,
        };
        if let Some(worker) = self.workers.get(&uid) {
            // A closed worker has ended; its Pod needs nothing more.
            let _ = worker.send(wish);
            return;
        }
        if gone || pod::finished(&wish.pod) {
            return;
        }
        let Some(node) = self.context.node(&name).cloned() else {
            tracing::warn!(
                pod = wish.pod.name_any(),
                node = name,
                "bound to a node not ours"
            );
            return;
        };
        let (sender, receiver) = watch::channel(wish);
        self.workers.insert(uid, sender);
        self.tasks
            .spawn(pod::Worker::new(Arc::clone(&self.context), node, receiver).run());
    }
}
