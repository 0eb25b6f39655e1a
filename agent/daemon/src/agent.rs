//! The agent's one task: owns the index, the datapath and the attachments, and brings the kernel
//! to what the index says after every batch of changes.
//!
//! ```text
//! Change / Ask ─> Index ─> Desired ─> compile ─> diff(kernel's image, new) ─> apply
//! ```
//! Nothing is written before every watch has delivered its first complete list: until then the
//! pinned maps of the agent before this one stay in force, and ADD is answered "try again later".

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use hachi_api::{Attachment, AttachmentId, PodRef};
use hachi_compile::{
    Claimant, Claimed, Compiled, Compiler, Draining, HealthChecks, Image, Op, Retired, diff,
};
use hachi_index::{Index, Kind};
use hachi_kernel::{AttachKind, Datapath, Features, KernelError};
use hachi_net::{Exclusive, Reaper, Store};
use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

mod hooks;
mod requests;

pub(crate) use requests::Ask;

use crate::{
    attachments::Closed,
    convert,
    events::{Events, Told},
    gc::Collector,
    health::{Health, State},
    metrics::Measured,
    news,
    node::Node,
    options::Options,
    ports,
    settle::Settling,
    tables,
    watch::{Change, KINDS, Seen},
    xdp::Early,
};

/// How long to wait before a failed write to the kernel is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often addresses and routes of the node are compared with what they should be, whether the kernel
/// tells of changes or not.
const NODE_PERIOD: Duration = Duration::from_secs(30);
/// How often the ports of the node's programs are listed at most.
const PORTS_PERIOD: Duration = Duration::from_secs(5);

pub(crate) struct Agent {
    events: Events,
    /// What Events were last told of.
    told: Vec<Told>,
    pub(crate) options: Options,
    pub(crate) store: Store,
    /// This agent is the only one.
    _locks: Vec<Exclusive>,
    /// Deletes the links that DEL has retired, so that DEL need not wait for it.
    _reaper: Reaper,
    pub(crate) datapath: Datapath,
    collector: Collector,
    health: Health,
    /// How sockets are balanced, for the status.
    pub(crate) socket_lb: String,
    /// The attached programs are another version's, until the maps of this one are complete.
    pub(crate) takes_over: bool,
    /// Something of another version may be there.
    pub(crate) superseded: bool,
    early: Early,
    pub(crate) index: Index,
    pub(crate) node: Node,
    /// Hears of changes of the node's own network.
    news: mpsc::Receiver<()>,
    /// What the kernel holds.
    image: Image,
    /// Endpoints that drained when it was written; none: flows may go to backends that were removed
    /// unseen.
    draining: Option<Draining>,
    compiler: Compiler,
    /// What the last compilation said beside the image: rules by id, and problems.
    compiled: Compiled,
    pub(crate) attachments: BTreeMap<AttachmentId, Attachment>,
    synced: BTreeSet<Kind>,
    watch_errors: BTreeMap<Kind, String>,
    kernel_error: Option<String>,
    /// Interfaces without programs, which are down.
    pub(crate) closed: Closed,
    /// How programs were attached; unknown before the first endpoint.
    pub(crate) attach_kind: Option<AttachKind>,
    pub(crate) settling: Settling,
    /// What this kernel can do.
    features: Features,
    waiting: Vec<requests::Waiting>,
    /// Pods that the API has not shown in time, and whose ADD has not come yet.
    overdue: BTreeSet<PodRef>,
    /// A Node object has changed, or it is time to look at the node's own network again.
    nodes_changed: bool,
    /// Ports of the node that programs have open too, each with the problem.
    shared_ports: Vec<(Claimant, String)>,
    /// When the ports of the node's programs were listed last.
    ports_listed: Option<Instant>,
    /// The index has changed since the kernel was last brought up to date.
    dirty: bool,
    /// What metrics tell of.
    measured: Measured,
}

impl Agent {
    /// Loads the datapath over whatever is pinned, and takes up the attachments on disk.
    pub(crate) fn start(options: Options, events: Events) -> Result<Self> {
        let features = Features::probe(&options.bpf_root);
        features.require()?;
        for (feature, why, without) in features.missing() {
            info!(%feature, ?why, without, "this kernel lacks something optional");
        }
        let store = Store::open(&options.data_dir)
            .with_context(|| format!("cannot open {}", options.data_dir.display()))?;
        let lock = |path, option| {
            Exclusive::directory(path)
                .map_err(|error| anyhow!("{error}, or give this one a {option} of its own"))
        };
        let mut locks = vec![lock(&options.data_dir, "--data-dir")?];
        let pinned = options.bpf_root.exists();
        let lock_pins = || lock(&options.bpf_root, "--bpf-root");
        if pinned {
            locks.push(lock_pins()?);
        }
        let mut datapath =
            Datapath::load(&convert::load_options(&options)).context("cannot load the datapath")?;
        if !pinned {
            locks.push(lock_pins()?);
        }
        if let Some(logs) = datapath.logs().context("cannot read the datapath's log")? {
            tokio::spawn(async move {
                if let Err(error) = logs.run().await {
                    warn!(%error, "the datapath's log records are lost from here on");
                }
            });
        }
        let collector = Collector::start(
            datapath.flows().context("cannot open the flows' tables")?,
            convert::timeouts(&options),
            options.gc_interval,
        )?;
        let health = Health::start(options.healthz_port);
        let image = datapath.snapshot().context("cannot read the pinned maps")?;
        let reaper = store
            .start_reaper()
            .context("cannot watch the node's interfaces")?;
        let node = Node::start(&options)?;
        let mut compiler = Compiler::default();
        compiler.adopt(&image);
        let early = Early::new(options.xdp);
        let mut agent = Self {
            index: Index::new(options.node_name.clone()),
            options,
            store,
            _locks: locks,
            _reaper: reaper,
            datapath,
            collector,
            health,
            socket_lb: String::new(),
            takes_over: false,
            superseded: true,
            early,
            events,
            told: Vec::new(),
            node,
            news: news::start(),
            image,
            draining: None,
            compiler,
            compiled: Compiled::default(),
            attachments: BTreeMap::new(),
            synced: BTreeSet::new(),
            watch_errors: BTreeMap::new(),
            kernel_error: None,
            closed: Closed::default(),
            attach_kind: None,
            settling: Settling::default(),
            features,
            waiting: Vec::new(),
            overdue: BTreeSet::new(),
            nodes_changed: true,
            shared_ports: Vec::new(),
            ports_listed: None,
            dirty: true,
            measured: Measured::default(),
        };
        agent.take_up_attachments()?;
        Ok(agent)
    }

    /// Works until both channels are closed.
    pub(crate) async fn run(
        mut self,
        mut changes: mpsc::Receiver<Seen>,
        mut asks: mpsc::Receiver<Ask>,
    ) -> Result<()> {
        let mut batch = Vec::new();
        let mut node_tick = tokio::time::interval(NODE_PERIOD);
        node_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut retry = None::<Instant>;
        loop {
            let wake = [
                retry,
                self.closed.retry(),
                self.settling.due(),
                self.waiting.iter().map(|w| w.deadline).min(),
            ]
            .into_iter()
            .flatten()
            .min();
            tokio::select! {
                received = changes.recv_many(&mut batch, 1024) => {
                    anyhow::ensure!(received > 0, "every watch has ended");
                    for Seen { at, change } in batch.drain(..) {
                        let timed = self.is_synced();
                        let kind = change.kind();
                        let object = matches!(change, Change::Apply(_) | Change::Delete(..));
                        let news = self.change(change);
                        if object {
                            self.measured.event(kind, at, timed && news);
                        }
                    }
                }
                ask = asks.recv() => match ask {
                    Some(ask) => self.ask(ask),
                    None => return Ok(()),
                },
                _ = node_tick.tick() => self.nodes_changed = true,
                Some(()) = self.news.recv() => self.nodes_changed = true,
                () = sleep_until(wake) => {}
            }
            self.retry_closed();
            self.settle();
            let look = mem::take(&mut self.nodes_changed);
            if look {
                self.sync_node();
                self.tell_health();
            }
            retry = match self.sync() {
                Ok(()) => None,
                Err(error) => {
                    error!(%error, "the kernel did not take the change; it is tried again");
                    self.measured.failed();
                    self.kernel_error = Some(error.to_string());
                    self.tell_health();
                    Some(Instant::now() + RETRY)
                }
            };
            if self.takes_over
                && self.is_synced()
                && retry.is_none()
                && let Err(error) = self.take_over()
            {
                let why = format!("{error:#}");
                error!(
                    why,
                    "cannot take over from another version; it is tried again"
                );
                retry = Some(Instant::now() + RETRY);
            }
            if look && self.is_synced() && retry.is_none() {
                self.find_shared_ports();
                self.tell();
                self.sync_uplinks();
                let guarded = self.sync_overlay();
                self.sync_host();
                if mem::take(&mut self.superseded) {
                    self.end_takeover();
                }
                self.node.finish(self.index.desired(), guarded);
                self.early.sync(&mut self.datapath, self.node.uplinks());
            }
            self.answer_waiting();
        }
    }

    /// Takes a change in; false if nothing has to be done about it.
    fn change(&mut self, change: Change) -> bool {
        let kind = change.kind();
        let news = match change {
            // Most tell of an object's status: a node's every few minutes, of hundreds of nodes.
            Change::Apply(object) => self.index.apply(object),
            Change::Delete(kind, namespace, name) => {
                self.index.delete(kind, &namespace, &name);
                true
            }
            Change::ListBegins(kind) => {
                self.index.begin_list(kind);
                false
            }
            Change::ListEnds(kind) => {
                self.index.end_list(kind);
                self.measured.listed(kind);
                if self.synced.insert(kind) && self.is_synced() {
                    self.nodes_changed = true;
                    info!("every watch has synced");
                }
                true
            }
            Change::Health(kind, Some(error)) => {
                self.watch_errors.insert(kind, error);
                false
            }
            Change::Health(kind, None) => {
                self.watch_errors.remove(&kind);
                false
            }
        };
        self.dirty |= news;
        self.nodes_changed |= news && kind == Kind::Node;
        news
    }

    fn is_synced(&self) -> bool {
        KINDS.iter().all(|kind| self.synced.contains(kind))
    }

    /// Brings the kernel's maps to what the index says.
    fn sync(&mut self) -> Result<(), KernelError> {
        if !self.is_synced() || !self.dirty {
            return Ok(());
        }
        let started = Instant::now();
        let limits = convert::limits(&self.datapath);
        let mut compiled = self.compiler.compile_within(self.index.desired(), &limits);
        convert::network(
            &self.options,
            &self.node,
            self.index.desired(),
            &mut compiled.image,
        );
        let mut ops = diff(&self.image, &compiled.image);
        if self.datapath.revision()? == 0 {
            // The datapath drops everything until it is told that its maps mean something.
            ops.push(Op::RaiseRevision);
        }
        if !ops.is_empty() {
            if let Err(error) = self.datapath.apply(&ops) {
                // Some of the writes are done: the next difference starts from what is there.
                self.draining = None;
                self.image = self.datapath.snapshot()?;
                self.compiler.adopt(&self.image);
                return Err(error);
            }
            debug!(writes = ops.len(), took = ?started.elapsed(), "the kernel is up to date");
        }
        self.measured.written(ops.len());
        self.retire(&compiled);
        self.image = mem::take(&mut compiled.image);
        self.compiled = compiled;
        self.kernel_error = None;
        self.dirty = false;
        self.tell();
        self.tell_health();
        Ok(())
    }

    /// Has flows moved that go to backends which the image, now in force, does not have any more, and
    /// those forgotten whose Pods it does not have.
    fn retire(&mut self, compiled: &Compiled) {
        let (image, drains) = (&compiled.image, &compiled.draining);
        let retired = match &self.draining {
            Some(drained) => {
                let touched = self.compiler.touched();
                Retired::between((&self.image, drained), (image, drains), touched)
            }
            None => Retired::all_but(image, drains.clone()),
        };
        // An address whose interface is another's by now was vacated in between.
        let is_vacated = |(ip, old): &(&IpAddr, &hachi_abi::Endpoint)| {
            let now = image.endpoints.get(*ip);
            now.is_none_or(|now| now.ifindex != old.ifindex)
        };
        let before = self.image.endpoints.iter();
        let vacated: BTreeSet<_> = before.filter(is_vacated).map(|(ip, _)| *ip).collect();
        if !retired.is_empty() || !vacated.is_empty() {
            let namespaces = self.attachments.values().map(|a| a.netns.clone());
            self.collector
                .retire(retired, vacated, namespaces.collect());
        }
        self.draining = Some(drains.clone());
    }

    /// Tells load balancers what holds.
    fn tell_health(&mut self) {
        let served = self.is_synced() && self.kernel_error.is_none();
        let checks = if self.options.no_health_check_node_ports {
            HealthChecks::default()
        } else {
            self.compiled.health_checks.clone()
        };
        let leaving = (self.index.desired().own_node()).is_some_and(|node| node.leaving);
        self.health.tell(State::of(checks, leaving, served));
    }

    /// Tells the API of what cannot be honoured, where that is news.
    fn tell(&mut self) {
        let of_index = self.index.problems().into_iter().map(Told::of);
        let of_policies = self.compiled.problems.iter().flat_map(Told::of_compiled);
        let of_ports = self.shared_ports.iter().map(|(who, problem)| {
            // Whoever has the port, its users are to know.
            Told::of_port(who, problem.clone())
        });
        let of_pods = self.closed.interfaces().filter_map(|(ifname, problem)| {
            let mut all = self.attachments.values();
            let pod = all.find(|it| it.host_ifname == ifname)?.pod.as_ref()?;
            Some(Told::of_interface(pod, problem))
        });
        let of_node = (self.node.problems().cloned())
            .chain(self.health.problems())
            .map(|problem| Told::of_node(&self.options.node_name, "NodeNetwork", problem));
        let tables = self.collector.status();
        let of_tables = [
            (tables.pressed, "conntrack"),
            (tables.translations_pressed, "the table of translations"),
        ];
        let of_tables = of_tables.into_iter().filter(|(pressed, _)| *pressed);
        let of_tables = of_tables.map(|(_, table)| {
            let problem = format!(
                "{table} is nearly full: flows that are short-lived go early, and new ones are refused once \
                 it is; `hachi status` and `hachi get conntrack` on the node show what fills it"
            );
            Told::of_node(&self.options.node_name, "TableNearlyFull", problem)
        });
        let now: Vec<Told> = (of_index.chain(of_policies).chain(of_ports))
            .chain(of_pods)
            .chain(of_node)
            .chain(of_tables)
            .collect();
        for told in now.iter().filter(|told| !self.told.contains(told)) {
            self.events.tell(told.clone());
        }
        self.told = now;
    }

    /// Finds the ports of Services and Pods that programs of the node have open too: what others send
    /// there does not reach those any more.
    fn find_shared_ports(&mut self) {
        // The list may be long, and links change with every Pod.
        if self
            .ports_listed
            .is_some_and(|at| at.elapsed() < PORTS_PERIOD)
        {
            return;
        }
        self.ports_listed = Some(Instant::now());
        let open = match ports::open() {
            Ok(open) => open,
            Err(error) => {
                warn!(%error, "cannot tell which ports programs of the node have open");
                return;
            }
        };
        let shared = open.into_iter().filter_map(|(proto, port)| {
            let who = self.compiler.holder(proto, port)?;
            // There the agent itself is the program.
            (who.what != Claimed::HealthCheck).then_some((who, proto, port))
        });
        let told = shared.map(|(who, proto, port)| {
            let protocol = tables::protocol(proto);
            let problem = format!(
                "a program of this node has port {port}/{protocol} open, which is that of {who}: the \
                 program gets nothing from outside; give one of them another"
            );
            (who, problem)
        });
        self.shared_ports = told.collect();
    }

    /// Routes to other nodes, this node's addresses, its uplinks and tunnels.
    fn sync_node(&mut self) {
        match Node::local_addresses() {
            Ok(addresses) if addresses == self.index.desired().local_addresses => {}
            Ok(addresses) => {
                self.index.set_local_addresses(addresses);
                self.dirty = true;
            }
            Err(error) => warn!(%error, "the last known addresses of the node stay in force"),
        }
        if !self.is_synced() {
            return;
        }
        let pods = self.attachments.values().map(|it| it.host_ifindex);
        let pods = pods.collect();
        // The one that Pods were given, also by an agent before this one.
        let mtu = self.image.tunnel.mtu;
        let before = (self.node.uplinks().clone(), self.node.plan().clone());
        self.node.look(&self.options, self.index.desired(), &pods);
        self.dirty |= before.0 != *self.node.uplinks()
            || before.1 != *self.node.plan()
            || self.image.tunnel != self.node.tunnel(&self.options)
            || self.image.host != self.node.host()
            || self.image.ports != convert::ports();
        if mtu != self.node.mtu() && mtu != 0 {
            self.node.follow_mtu(mtu, self.attachments.values());
        }
    }
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when.into()).await,
        None => std::future::pending().await,
    }
}
