//! The whole product on this kernel, small enough for a virtual machine without hardware behind it:
//! two nodes, three Pods, one Service, one policy, both families; SCTP and kinds of uplinks where the
//! kernel has them.
//!
//! `cargo xtask test vm` runs this suite on every supported kernel, so it asks the API itself: there is
//! no kubectl in a guest.

mod uplinks;

use std::{
    io::Write as _,
    net::IpAddr,
    sync::{Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Cluster, Family, Options, Outcome,
    Protocol::{self, Sctp, Tcp, Udp},
    Target, eventually,
    workload::stream::Stream,
};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        core::v1::{Namespace, Pod, Service},
        networking::v1::NetworkPolicy,
    },
};
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use nix::{
    sys::{
        socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket},
        time::TimeSpec,
    },
    time::{ClockId, clock_settime},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// How long a probe waits; the translator that runs a guest is slow.
const TIMEOUT: Duration = Duration::from_secs(1);
/// How long a change may take to show.
const LIMIT: Duration = Duration::from_secs(60);

/// The cluster of this program, and a client of its API.
struct Lab {
    cluster: Cluster,
    runtime: Runtime,
    client: Client,
}

/// Starts it at the first use; it ends with the program, by its reaper.
fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| Lab::start().unwrap_or_else(|error| panic!("no cluster: {error:#}")))
}

impl Lab {
    fn start() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("hachi-kernel-{}", std::process::id()));
        let cluster = Cluster::start(Options {
            remove_dir: true,
            ..Options::new(dir, hachi_testutil::dist_dir(), Family::Dual)
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let client = runtime.block_on(async {
            let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig())?;
            let options = KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?;
            anyhow::Ok(Client::try_from(config)?)
        })?;
        Ok(Self {
            cluster,
            runtime,
            client,
        })
    }

    fn namespace(&self, name: &str) -> Result<()> {
        let object: Namespace = serde_json::from_value(json!({"metadata": {"name": name}}))?;
        let api = Api::<Namespace>::all(self.client.clone());
        self.runtime
            .block_on(api.create(&PostParams::default(), &object))
            .map(drop)
            .with_context(|| format!("create the namespace {name}"))
    }

    fn create<K>(&self, namespace: &str, name: &str, spec: &Value, labels: &Value) -> Result<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + Serialize
            + DeserializeOwned,
    {
        let metadata = json!({"name": name, "namespace": namespace, "labels": labels});
        let object = serde_json::from_value(json!({"metadata": metadata, "spec": spec}))?;
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        self.runtime
            .block_on(api.create(&PostParams::default(), &object))
            .with_context(|| format!("create {namespace}/{name}"))
    }

    fn pod(&self, namespace: &str, name: &str, node: &str, ports: &Value) -> Result<()> {
        let containers = json!([{"name": "main", "image": "server", "ports": ports}]);
        let spec = json!({"nodeName": node, "containers": containers});
        self.create::<Pod>(namespace, name, &spec, &json!({"app": name}))
            .map(drop)
    }

    /// Waits until a Pod is ready; returns its addresses.
    fn ready(&self, namespace: &str, name: &str) -> Result<Vec<IpAddr>> {
        let api = Api::<Pod>::namespaced(self.client.clone(), namespace);
        eventually(LIMIT, || {
            let pod = self.runtime.block_on(api.get(name))?;
            let conditions = pod.status.unwrap_or_default().conditions;
            let mut conditions = conditions.iter().flatten();
            ensure!(
                conditions.any(|it| it.type_ == "Ready" && it.status == "True"),
                "{namespace}/{name} is not ready"
            );
            Ok(())
        })?;
        let addresses = self.cluster.pod(&format!("{namespace}/{name}"))?.addresses;
        ensure!(addresses.len() == 2, "one address a family: {addresses:?}");
        Ok(addresses)
    }

    /// Makes a Service in front of the Pod `web`; returns its addresses.
    fn service(&self, namespace: &str, ports: &Value) -> Result<Vec<IpAddr>> {
        let spec = json!({
            "selector": {"app": "web"}, "ipFamilyPolicy": "RequireDualStack", "ports": ports,
        });
        let made: Service = self.create(namespace, "web", &spec, &json!({}))?;
        let ips = made.spec.and_then(|spec| spec.cluster_ips);
        let ips = ips.unwrap_or_default();
        ensure!(ips.len() == 2, "one address a family: {ips:?}");
        ips.iter().map(|ip| Ok(ip.parse()?)).collect()
    }

    /// Isolates `web` but for these peers and ports.
    fn policy(&self, namespace: &str, name: &str, ingress: &Value) -> Result<()> {
        let spec = json!({
            "podSelector": {"matchLabels": {"app": "web"}},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        });
        self.create::<NetworkPolicy>(namespace, name, &spec, &json!({}))
            .map(drop)
    }

    fn remove_policy(&self, namespace: &str, name: &str) -> Result<()> {
        let api = Api::<NetworkPolicy>::namespaced(self.client.clone(), namespace);
        self.runtime
            .block_on(api.delete(name, &DeleteParams::default()))
            .map(drop)
            .with_context(|| format!("delete {namespace}/{name}"))
    }

    /// Waits until `web` answers at every address, or at none.
    fn reaches(&self, yes: bool, from: &str, to: &[Target]) -> Result<()> {
        for target in to {
            eventually(LIMIT, || {
                match (yes, self.cluster.probe(from, *target, TIMEOUT)?) {
                    (true, Outcome::Answered(name)) if name.ends_with("web") => Ok(()),
                    (false, Outcome::Silent) => Ok(()),
                    (_, outcome) => bail!("{from} -> {target}: {outcome}"),
                }
            })?;
            let how = if yes { "reaches" } else { "does not reach" };
            progress(&format!("{from} {how} {target}"))?;
        }
        Ok(())
    }

    fn stream(&self, from: &str, to: Target) -> Result<Stream> {
        eventually(LIMIT, || self.cluster.stream(from, to.address))
    }
}

/// Says what has been done, past the test harness: a guest that is silent for long is taken for dead.
fn progress(line: &str) -> Result<()> {
    let mut stderr = std::io::stderr();
    Ok(stderr.write_all(format!("{line}\n").as_bytes())?)
}

fn targets(protocol: Protocol, addresses: &[IpAddr], port: u16) -> Vec<Target> {
    let target = |ip: &IpAddr| Target::new(protocol, *ip, port);
    addresses.iter().map(target).collect()
}

/// Who may reach `web`: the Pod of this name, on these ports.
fn from(app: &str, ports: &Value) -> Value {
    json!([{"from": [{"podSelector": {"matchLabels": {"app": app}}}], "ports": ports}])
}

fn the_product_works(lab: &Lab) -> Result<()> {
    lab.namespace("k")?;
    let none = json!([]);
    lab.pod("k", "web", "node1", &none)?;
    lab.pod("k", "near", "node1", &none)?;
    lab.pod("k", "far", "node2", &none)?;
    let ips = lab.service(
        "k",
        &json!([
            {"name": "http", "port": 8080, "targetPort": 80},
            {"name": "dns", "port": 53, "targetPort": 80, "protocol": "UDP"},
        ]),
    )?;
    let web = lab.ready("k", "web")?;
    lab.ready("k", "near")?;
    lab.ready("k", "far")?;
    let direct = [targets(Tcp, &web, 80), targets(Udp, &web, 80)].concat();
    let through = [targets(Tcp, &ips, 8080), targets(Udp, &ips, 53)].concat();
    for client in ["k/near", "k/far"] {
        lab.reaches(true, client, &direct).context("no policy")?;
        lab.reaches(true, client, &through).context("the Service")?;
    }
    lab.reaches(true, "node/node1", &targets(Tcp, &web, 80))
        .context("the Pod's own node")?;

    let near = lab.stream("k/near", direct[0])?;
    let far = lab.stream("k/far", direct[0])?;
    lab.policy("k", "near-alone", &from("near", &json!([{"port": 80}])))?;
    let tcp = [targets(Tcp, &web, 80), targets(Tcp, &ips, 8080)].concat();
    lab.reaches(false, "k/far", &tcp).context("denied")?;
    lab.reaches(true, "k/near", &tcp).context("allowed")?;
    lab.reaches(false, "k/near", &targets(Udp, &web, 80))
        .context("another protocol")?;
    // The change binds connections that were open before it.
    let (before, stopped) = (near.echoed(), far.echoed());
    thread::sleep(Duration::from_secs(1));
    ensure!(far.echoed() == stopped, "a denied stream goes on");
    eventually(LIMIT, || {
        ensure!(near.echoed() > before, "an allowed stream stalls");
        Ok(())
    })?;

    for node in ["node1", "node2"] {
        lab.cluster.kill_agent(node)?;
    }
    lab.reaches(true, "k/near", &tcp).context("no agent")?;
    lab.reaches(false, "k/far", &tcp[..1]).context("no agent")?;
    // One after the other: two that load their programs at once leave a guest's streams no time.
    for node in ["node1", "node2"] {
        lab.cluster.start_agent(node)?;
        lab.cluster.wait_agent(node)?;
    }
    lab.remove_policy("k", "near-alone")?;
    lab.reaches(true, "k/far", &tcp)
        .context("after the restart")?;
    let report = near.stop()?;
    ensure!(report.error.is_none(), "a stream broke: {report:?}");
    drop(far);
    Ok(())
}

fn sctp_is_judged_and_balanced(lab: &Lab) -> Result<()> {
    const FIRST: u16 = 9000;
    const LAST: u16 = 9002;
    lab.namespace("s")?;
    let ports: Vec<Value> = (FIRST..=LAST)
        .map(|port| json!({"containerPort": port, "protocol": "SCTP"}))
        .collect();
    let ports = json!(ports);
    lab.pod("s", "web", "node1", &ports)?;
    lab.pod("s", "near", "node1", &ports)?;
    lab.pod("s", "far", "node2", &ports)?;
    let ips = lab.service("s", &json!([{"port": FIRST, "protocol": "SCTP"}]))?;
    let web = lab.ready("s", "web")?;
    lab.ready("s", "near")?;
    lab.ready("s", "far")?;
    let at = |port| targets(Sctp, &web, port);
    let service = targets(Sctp, &ips, FIRST);
    for client in ["s/near", "s/far"] {
        for port in FIRST..=LAST {
            lab.reaches(true, client, &at(port)).context("no policy")?;
        }
        lab.reaches(true, client, &service).context("the Service")?;
    }
    // No socket program serves SCTP: the node's packets are translated as well.
    for client in ["node/node1", "node/node2"] {
        lab.reaches(true, client, &service).context("the Service")?;
    }
    let range = json!([{"protocol": "SCTP", "port": FIRST, "endPort": LAST - 1}]);
    lab.policy("s", "range", &from("far", &range))?;
    lab.reaches(false, "s/near", &at(FIRST)).context("a peer")?;
    lab.reaches(false, "s/near", &service)
        .context("a peer through the Service")?;
    lab.reaches(false, "s/far", &at(LAST))
        .context("after the range")?;
    for port in FIRST..LAST {
        lab.reaches(true, "s/far", &at(port))
            .context("in the range")?;
    }
    lab.reaches(true, "s/far", &service)
        .context("in the range, through the Service")
}

/// The wall clock of a machine that is nobody else's; put right again at the end.
struct Clock {
    begun: Instant,
    then: SystemTime,
}

impl Clock {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            then: SystemTime::now(),
        }
    }

    /// Sets it to what it would be, and so many seconds more or less.
    fn step(&self, seconds: i64) -> Result<()> {
        let right = (self.then + self.begun.elapsed()).duration_since(UNIX_EPOCH)?;
        let right = i64::try_from(right.as_secs())?;
        let time = TimeSpec::new(right + seconds, 0);
        clock_settime(ClockId::CLOCK_REALTIME, time).context("set the clock")
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if let Err(error) = self.step(0) {
            eprintln!("the clock stays wrong: {error:#}");
        }
    }
}

/// Nobody's timers, timeouts or tokens go by a clock that people and NTP set.
fn a_clock_that_steps_changes_nothing(lab: &Lab) -> Result<()> {
    const DAY: i64 = 86_400;
    lab.namespace("c")?;
    let none = json!([]);
    lab.pod("c", "web", "node1", &none)?;
    lab.pod("c", "near", "node1", &none)?;
    lab.pod("c", "far", "node2", &none)?;
    let ips = lab.service("c", &json!([{"port": 8080, "targetPort": 80}]))?;
    let web = lab.ready("c", "web")?;
    lab.ready("c", "near")?;
    lab.ready("c", "far")?;
    let tcp = [targets(Tcp, &web, 80), targets(Tcp, &ips, 8080)].concat();
    lab.reaches(true, "c/near", &tcp)?;
    lab.reaches(true, "c/far", &tcp)?;
    let near = lab.stream("c/near", tcp[2])?;
    let clock = Clock::new();
    // Forth, back behind the start, into another age, and to before everything was made.
    for (round, step) in [DAY, -DAY, 20 * 365 * DAY, -20 * 365 * DAY]
        .into_iter()
        .enumerate()
    {
        let said = || format!("{step} s off");
        clock.step(step)?;
        let before = near.echoed();
        lab.policy("c", "near-alone", &from("near", &json!([{"port": 80}])))?;
        lab.reaches(false, "c/far", &tcp).with_context(said)?;
        lab.reaches(true, "c/near", &tcp).with_context(said)?;
        lab.remove_policy("c", "near-alone")?;
        lab.reaches(true, "c/far", &tcp).with_context(said)?;
        let late = format!("late-{round}");
        lab.pod("c", &late, "node2", &none)?;
        lab.ready("c", &late).with_context(said)?;
        lab.reaches(true, &format!("c/{late}"), &tcp)
            .with_context(said)?;
        if round % 2 == 1 {
            lab.cluster.kill_agent("node1")?;
            lab.cluster.start_agent("node1")?;
            lab.cluster.wait_agent("node1").with_context(said)?;
        }
        eventually(LIMIT, || {
            ensure!(near.echoed() > before, "the stream stalls, {}", said());
            Ok(())
        })?;
    }
    drop(clock);
    lab.reaches(true, "c/far", &tcp)
        .context("with the clock right again")?;
    let report = near.stop()?;
    ensure!(report.error.is_none(), "the stream broke: {report:?}");
    Ok(())
}

/// Why there are no SCTP sockets here, if there are none.
fn no_sctp() -> Option<nix::Error> {
    socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Sctp,
    )
    .err()
}

#[test]
fn pods_a_service_and_a_policy() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    run(the_product_works);
}

#[test]
fn sctp() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    if let Some(error) = no_sctp() {
        hachi_testutil::absent!("SCTP sockets: {error}");
    }
    run(sctp_is_judged_and_balanced);
}

#[test]
fn clock_steps() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    if !hachi_testutil::in_guest() {
        hachi_testutil::absent!("a machine whose clock may be set: guests do this");
    }
    run(a_clock_that_steps_changes_nothing);
}

#[test]
fn uplinks_of_every_kind() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    run(uplinks::come_and_go);
}

fn run(test: fn(&Lab) -> Result<()>) {
    // They share agents, and one of them ends those.
    static ONE: Mutex<()> = Mutex::new(());
    let _one_by_one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let lab = lab();
    if let Err(error) = test(lab) {
        eprintln!("{}", lab.cluster.agent_logs(30));
        panic!("{error:#}");
    }
}
