//! The life of one Pod: sandbox, plugins, server, status, and all of it back.
//!
//! Two annotations stand for what a real Pod's containers would do:
//! `test.hachi.dev/ready: "false"` fails its readiness probe, `test.hachi.dev/phase: Succeeded` (or
//! `Failed`) ends its containers.

mod sandbox;
mod spec;
mod status;

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Child,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, Preconditions},
};
use tokio::{sync::watch, task::spawn_blocking, time::sleep};

pub(crate) use self::spec::finished;
use self::{
    sandbox::{Attached, Order},
    spec::{ended, host_ports, ports},
};
use crate::{
    cni::{CniError, TRY_AGAIN_LATER},
    kubelet::{Context, Running, Wish},
    netns::Netns,
    node::Node,
    spawn::{Launch, Place},
    state::PodState,
};

/// Set to `false`, the Pod is not ready.
pub const READY_ANNOTATION: &str = "test.hachi.dev/ready";

/// Set to `Succeeded` or `Failed`, the Pod's containers have ended.
pub const PHASE_ANNOTATION: &str = "test.hachi.dev/phase";

/// How long a server may take until it listens.
const LISTENS: Duration = Duration::from_secs(60);

/// How often a worker looks after its server.
const TEND: Duration = Duration::from_millis(500);

/// The task of one Pod.
pub(crate) struct Worker {
    context: Arc<Context>,
    node: Arc<Node>,
    wishes: watch::Receiver<Wish>,
    namespace: String,
    name: String,
    uid: String,
    started: String,
    restarts: u32,
}

/// What runs for a Pod.
struct Sandboxed {
    netns: Arc<Netns>,
    /// Absent for a Pod of the host's network.
    attachment: Option<Attached>,
    addresses: Vec<IpAddr>,
    server: Child,
}

impl Worker {
    pub(crate) fn new(
        context: Arc<Context>,
        node: Arc<Node>,
        wishes: watch::Receiver<Wish>,
    ) -> Self {
        let pod = Arc::clone(&wishes.borrow().pod);
        Self {
            context,
            node,
            wishes,
            namespace: pod.namespace().unwrap_or_default(),
            name: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            started: k8s_openapi::jiff::Timestamp::now().to_string(),
            restarts: 0,
        }
    }

    /// Runs the Pod until its object is gone.
    pub(crate) async fn run(mut self) {
        if let Err(error) = self.live().await {
            tracing::error!(pod = %self.label(), error = format!("{error:#}"), "the Pod is lost");
        }
        self.context.running().remove(&self.key());
        for path in [self.file("json"), self.file("ready")] {
            let _ = fs::remove_file(path);
        }
    }

    async fn live(&mut self) -> Result<()> {
        fs::create_dir_all(
            self.file("log")
                .parent()
                .context("a Pod's files have no directory")?,
        )
        .context("create the directory of Pods")?;
        if let Some(mut running) = self.start().await? {
            self.announce(&running)?;
            let mut shown = None;
            while !self.ending() {
                let ready = self.wish(|pod| pod.annotations().get(READY_ANNOTATION).cloned());
                let ready = ready.as_deref() != Some("false");
                if shown != Some(ready) {
                    match self
                        .report("Running", Some(ready), &running.addresses)
                        .await
                    {
                        Ok(()) => shown = Some(ready),
                        // The API may be away; the Pod runs on, and is reported later.
                        Err(error) => {
                            let error = format!("{error:#}");
                            tracing::warn!(pod = %self.label(), error, "not reported");
                        }
                    }
                }
                tokio::select! {
                    changed = self.wishes.changed() => {
                        // No sender, no kubelet: the cluster ends.
                        if changed.is_err() { break }
                    }
                    () = sleep(TEND) => {
                        if running.server.try_wait().context("look after a server")?.is_some() {
                            self.restarts += 1;
                            let place = self.node.place_in(&running.netns);
                            running.server = self.serve(&place, &running.addresses).await?;
                            shown = None;
                        }
                    }
                }
            }
            self.stop(running).await?;
        }
        self.finish().await
    }

    /// Whether the Pod is to end: deleted, gone, or its containers done.
    fn ending(&self) -> bool {
        let wish = self.wishes.borrow();
        self.context.closing()
            || wish.gone
            || wish.pod.metadata.deletion_timestamp.is_some()
            || ended(&wish.pod).is_some()
    }

    /// Makes the sandbox and starts the server; none if the Pod ended before that.
    async fn start(&self) -> Result<Option<Sandboxed>> {
        let host_network = self.wish(|pod| pod.spec.as_ref()?.host_network) == Some(true);
        if host_network {
            let netns = Arc::clone(&self.node.netns);
            let addresses = self.node.addresses.clone();
            let server = self.serve(&self.node.place_in(&netns), &addresses).await?;
            return Ok(Some(Sandboxed {
                netns,
                attachment: None,
                addresses,
                server,
            }));
        }
        let Some((attachment, addresses)) = self.attach().await? else {
            return Ok(None);
        };
        let netns = Arc::clone(&attachment.netns);
        let server = self.serve(&self.node.place_in(&netns), &[]).await?;
        Ok(Some(Sandboxed {
            netns,
            attachment: Some(attachment),
            addresses,
            server,
        }))
    }

    /// Makes the network namespace and has the plugins set it up, as often as it takes.
    async fn attach(&self) -> Result<Option<(Attached, Vec<IpAddr>)>> {
        let mut pause = Duration::from_millis(50);
        let mut attempt = 0_u32;
        while !self.ending() {
            let order = self.order(attempt);
            attempt += 1;
            let tried = spawn_blocking(move || order.carry_out())
                .await
                .context("a plugin's task")?;
            let error = match tried {
                Ok(attached) => return Ok(Some(attached)),
                Err(error) => error,
            };
            let code = error.downcast_ref::<CniError>().map(|error| error.code);
            let error = format!("{error:#}");
            tracing::warn!(pod = %self.label(), error, "the plugin failed; trying again");
            if let Err(error) = self.complain(&error).await {
                tracing::warn!(pod = %self.label(), error = format!("{error:#}"), "not told");
            }
            if code != Some(TRY_AGAIN_LATER) {
                pause = pause.max(Duration::from_millis(500));
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(2));
        }
        Ok(None)
    }

    fn order(&self, attempt: u32) -> Order {
        // As runtimes do: every attempt is another container.
        let container = format!("{}{attempt:04x}", self.uid.replace('-', ""));
        Order {
            id: self.context.id.clone(),
            node: Arc::clone(&self.node),
            uid: self.uid.clone(),
            args: vec![
                ("IgnoreUnknown", "1".to_owned()),
                ("K8S_POD_NAMESPACE", self.namespace.clone()),
                ("K8S_POD_NAME", self.name.clone()),
                ("K8S_POD_INFRA_CONTAINER_ID", container.clone()),
                ("K8S_POD_UID", self.uid.clone()),
            ],
            ports: self.wish(|pod| Some(host_ports(pod))).unwrap_or_default(),
            container,
        }
    }

    /// Starts the server and waits until it listens.
    async fn serve(&self, place: &Place, bind: &[IpAddr]) -> Result<Child> {
        let parent = std::process::id().to_string();
        let program = crate::run::own_binary("hachi-pod")?;
        let options = ["--die-with", parent.as_str()];
        let mut launch = Launch::new(place, &self.context.id, &options, program)?;
        let ready = self.file("ready");
        let _ = fs::remove_file(&ready);
        let command = launch.command();
        command
            .arg("serve")
            .args(["--name", &self.label(), "--node", &self.node.name]);
        command.arg("--ready-file").arg(&ready);
        for (port, sctp) in self.wish(|pod| Some(ports(pod))).unwrap_or_default() {
            command
                .arg(if sctp { "--sctp" } else { "--port" })
                .arg(port.to_string());
        }
        for ip in bind {
            command.arg("--bind").arg(ip.to_string());
        }
        let log = self.file("log");
        launch.log_to(&log)?;
        let mut server = launch.start()?;
        let deadline = Instant::now() + LISTENS;
        while Instant::now() < deadline {
            if ready.exists() {
                return Ok(server);
            }
            if let Some(status) = server.try_wait().context("look after a server")? {
                bail!(
                    "the Pod's server ended at once ({status}); see {}",
                    log.display()
                );
            }
            sleep(Duration::from_millis(2)).await;
        }
        let _ = server.kill();
        bail!(
            "the Pod's server does not listen after {LISTENS:?}; see {}",
            log.display()
        )
    }

    /// Makes the Pod known to the cluster's owner and to `exec`.
    fn announce(&self, running: &Sandboxed) -> Result<()> {
        let place = self.node.place_in(&running.netns);
        let record = PodState {
            place: place.clone(),
            addresses: running.addresses.clone(),
        };
        let record = serde_json::to_vec(&record).context("write a Pod's record")?;
        let path = self.file("json");
        fs::write(&path, record).with_context(|| format!("write {}", path.display()))?;
        let running = Running {
            node: self.node.name.clone(),
            addresses: running.addresses.clone(),
            netns: Arc::clone(&running.netns),
            place,
        };
        self.context.running().insert(self.key(), running);
        Ok(())
    }

    async fn stop(&self, mut running: Sandboxed) -> Result<()> {
        self.context.running().remove(&self.key());
        let closing = self.context.closing();
        spawn_blocking(move || {
            // It may have ended by itself.
            let _ = running.server.kill();
            let _ = running.server.wait();
            // With the whole cluster, the node's namespaces vanish and all of this with them.
            if let Some(attached) = running.attachment.as_ref().filter(|_| !closing) {
                attached.detach();
            }
        })
        .await
        .context("a Pod's end")
    }

    /// Tells the API that the Pod has ended.
    async fn finish(&mut self) -> Result<()> {
        if let Some(phase) = self.wish(ended)
            && !self.wishes.borrow().gone
        {
            self.report(&phase, None, &[]).await?;
            let deleted = |wish: &Wish| wish.gone || wish.pod.metadata.deletion_timestamp.is_some();
            if self.wishes.wait_for(deleted).await.is_err() {
                return Ok(());
            }
        }
        if self.context.closing() {
            return Ok(());
        }
        let (gone, deleted) = {
            let wish = self.wishes.borrow();
            (wish.gone, wish.pod.metadata.deletion_timestamp.is_some())
        };
        if gone || !deleted {
            return Ok(());
        }
        let options = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: Some(self.uid.clone()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match self.api().delete(&self.name, &options).await {
            Ok(_) => Ok(()),
            // Gone already, or another Pod has the name by now.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            Err(error) => Err(error).context("delete the Pod's object"),
        }
    }

    fn api(&self) -> Api<Pod> {
        Api::namespaced(self.context.client.clone(), &self.namespace)
    }

    fn wish<T>(&self, of: impl FnOnce(&Pod) -> Option<T>) -> Option<T> {
        of(&self.wishes.borrow().pod)
    }

    fn key(&self) -> (String, String) {
        (self.namespace.clone(), self.name.clone())
    }

    fn label(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn file(&self, extension: &str) -> PathBuf {
        file(&self.context.dir, &self.namespace, &self.name, extension)
    }
}

/// A file of a Pod below the cluster's directory.
pub(crate) fn file(dir: &Path, namespace: &str, name: &str, extension: &str) -> PathBuf {
    dir.join("pods")
        .join(namespace)
        .join(format!("{name}.{extension}"))
}
