//! What an operator is promised of a node: metrics and health that tell the truth, an agent that starts
//! without an API server and harms nothing, a server that has gone without a word and is noticed.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Cluster, Family, Options, Outcome,
    Protocol::{Tcp, Udp},
    Target,
    bed::{LIMIT, TIMEOUT},
    eventually,
    workload::stream::Stream,
};
use serde_json::Value;

const HTTP: u16 = 9964;

const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {selector: {app: web}, ports: [{port: 8080, targetPort: 80}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: default}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
";

fn pod(name: &str, app: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default, labels: {{app: {app}}}}}\n\
         spec: {{nodeName: node1, containers: [{{name: main, image: server}}]}}\n"
    )
}

/// A node with `web`, which `client` may reach and `stranger` may not.
fn run(name: &str, test: fn(&Cluster) -> Result<()>) {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent", "hachi");
    let dir = std::env::temp_dir().join(format!("hachi-operations-{name}-{}", std::process::id()));
    let started = Cluster::start(Options {
        nodes: 1,
        remove_dir: true,
        agent_options: ["--http=127.0.0.1:9964", "--gc-interval=300ms"]
            .map(str::to_owned)
            .into(),
        ..Options::new(dir, hachi_testutil::dist_dir(), Family::V4)
    });
    let outcome = started.and_then(|cluster| {
        cluster.apply(OBJECTS)?;
        let pods = [("web", "web"), ("client", "client"), ("stranger", "x")];
        cluster.apply(&pods.map(|(name, app)| pod(name, app)).concat())?;
        cluster.wait_ready("default")?;
        let outcome = test(&cluster);
        if outcome.is_err() {
            eprintln!("{}", cluster.agent_logs(40));
        }
        outcome
    });
    if let Err(error) = outcome {
        panic!("{error:?}");
    }
}

/// Asks the node's agent; the code and the body.
fn get(cluster: &Cluster, port: u16, path: &str) -> Result<(u16, String)> {
    let node = cluster.netns("node/node1")?;
    let answer = node.get().enter(|| -> Result<String> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))
            .with_context(|| format!("connect to {address}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    let code = head.split_whitespace().nth(1).context("no code")?;
    Ok((code.parse()?, body.to_owned()))
}

/// Values by name and labels, as they are written.
fn metrics(cluster: &Cluster) -> Result<BTreeMap<String, f64>> {
    let (code, text) = get(cluster, HTTP, "/metrics")?;
    ensure!(code == 200, "{code}: {text}");
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').context("a sample")?;
            Ok((name.to_owned(), value.parse()?))
        })
        .collect()
}

fn value(metrics: &BTreeMap<String, f64>, name: &str) -> Result<f64> {
    let found = metrics.get(name).copied();
    found.with_context(|| format!("no {name} in {:?}", metrics.keys()))
}

/// Waits until a metric is what `is` says.
fn becomes(cluster: &Cluster, name: &str, is: impl Fn(f64) -> bool) -> Result<()> {
    eventually(LIMIT, || {
        let now = value(&metrics(cluster)?, name)?;
        ensure!(is(now), "{name} is {now}");
        Ok(())
    })
}

fn web(cluster: &Cluster) -> Result<Target> {
    Ok(Target::new(Tcp, cluster.pod_ip("default/web")?, 80))
}

/// Waits until a Pod is answered.
fn reaches(cluster: &Cluster, from: &str, to: Target) -> Result<()> {
    eventually(LIMIT, || {
        let outcome = cluster.probe(from, to, TIMEOUT)?;
        ensure!(outcome.answered(), "{from} to {to}: {outcome}");
        Ok(())
    })
}

/// A stream of `client` through the Service, which is refused until the node knows a backend.
fn stream_through(cluster: &Cluster, service: Target) -> Result<Stream> {
    eventually(LIMIT, || cluster.stream("default/client", service.address))
}

fn judged(cluster: &Cluster) -> Result<()> {
    let web = web(cluster)?;
    reaches(cluster, "default/client", web)?;
    let denied = cluster.probe("default/stranger", web, TIMEOUT)?;
    ensure!(matches!(denied, Outcome::Silent), "stranger: {denied}");
    Ok(())
}

fn metrics_tell_what_a_node_does(cluster: &Cluster) -> Result<()> {
    judged(cluster)?;
    let dns = Target::new(Udp, cluster.pod_ip("default/web")?, 80);
    reaches(cluster, "default/client", dns)?;
    let service = Target::new(Tcp, cluster.service_ip("default", "web")?, 8080);
    let stream = stream_through(cluster, service)?;
    // After a pass that has begun since.
    for protocol in ["tcp", "udp"] {
        let name = format!("hachi_flows{{protocol=\"{protocol}\"}}");
        becomes(cluster, &name, |now| now >= 1.0)?;
    }
    let now = metrics(cluster)?;
    for (name, least) in [
        ("hachi_ready", 1.0),
        ("hachi_endpoints", 3.0),
        ("hachi_policy_revision", 1.0),
        ("hachi_kernel_writes_total", 10.0),
        ("hachi_conntrack_entries", 4.0),
        ("hachi_drops_total{reason=\"policy_ingress\"}", 1.0),
        (
            "hachi_packets_total{reason=\"delivered_local\",verdict=\"forwarded\"}",
            3.0,
        ),
        (
            "hachi_cni_operations_total{operation=\"add\",outcome=\"ok\"}",
            3.0,
        ),
        ("hachi_cni_operation_seconds_count{operation=\"add\"}", 3.0),
        ("hachi_policy_programming_seconds_count", 1.0),
        ("hachi_service_programming_seconds_count", 1.0),
        ("hachi_map_entries{map=\"ENDPOINTS_V4\"}", 3.0),
        ("hachi_map_entries{map=\"SERVICES_V4\"}", 1.0),
        ("hachi_map_capacity{map=\"CT_V4\"}", 1024.0),
        ("hachi_map_capacity{map=\"NAT_V4\"}", 1024.0),
        ("process_resident_memory_bytes", 1e6),
    ] {
        let value = value(&now, name)?;
        ensure!(value >= least, "{name} is {value}, not {least}");
    }
    let kinds = ["Namespace", "Node", "Pod", "Service", "EndpointSlice"];
    for kind in kinds.into_iter().chain(["NetworkPolicy"]) {
        for (name, wanted) in [("synced", 1.0), ("failing", 0.0), ("lists_total", 1.0)] {
            let name = format!("hachi_watch_{name}{{kind=\"{kind}\"}}");
            ensure!(value(&now, &name)? == wanted, "{name}: {now:?}");
        }
    }

    let on_pods = |now: &BTreeMap<_, _>| -> Result<[f64; 2]> {
        let of = |hook| value(now, &format!("hachi_programs_attached{{hook=\"{hook}\"}}"));
        Ok([of("from_pod")?, of("to_pod")?])
    };
    // A pin that is replaced is gone for a moment, and not counted then.
    eventually(LIMIT, || {
        let now = metrics(cluster)?;
        ensure!(on_pods(&now)? == [3.0, 3.0], "{now:?}");
        for hook in ["from_net", "to_net"] {
            let name = format!("hachi_programs_attached{{hook=\"{hook}\"}}");
            ensure!(value(&now, &name)? >= 1.0, "{name}: {now:?}");
        }
        Ok(())
    })?;
    let sockets = cluster.wait_agent("node1")?.socket_lb.starts_with("off");
    let name = "hachi_programs_attached{hook=\"sock_connect4\"}";
    ensure!(value(&now, name)? == f64::from(u8::from(!sockets)));
    ensure!(value(&now, "hachi_programs_attached{hook=\"xdp_net\"}")? == 0.0);

    cluster.kubectl(&["delete", "pod", "stranger", "--wait=true"])?;
    becomes(cluster, "hachi_endpoints", |now| now == 2.0)?;
    eventually(LIMIT, || {
        let now = metrics(cluster)?;
        ensure!(on_pods(&now)? == [2.0, 2.0], "{now:?}");
        Ok(())
    })?;
    // A watch whose place the server has forgotten begins anew, and that shows.
    let limit = cluster.forget_history()?;
    eventually(limit, || {
        let now = metrics(cluster)?;
        let [lists, failing] = ["lists_total", "failing"].map(|name| {
            let name = format!("hachi_watch_{name}{{kind=\"Pod\"}}");
            value(&now, &name)
        });
        let (lists, failing) = (lists?, failing?);
        ensure!(lists >= 2.0 && failing == 0.0, "{lists} lists, {failing}");
        Ok(())
    })?;
    let report = stream.stop()?;
    ensure!(report.error.is_none(), "the stream broke: {report:?}");
    Ok(())
}

/// Takes the node's way to the API server, or gives it back. What is open already is silent then.
fn away(cluster: &Cluster, away: bool) -> Result<()> {
    let action = if away { "add" } else { "del" };
    for server in Family::V4.fabric() {
        let to = format!("{server}/32");
        cluster.exec("node/node1", "ip", &["route", action, "blackhole", &to])?;
    }
    Ok(())
}

fn goes_on(stream: &Stream) -> Result<()> {
    let before = stream.echoed();
    eventually(LIMIT, || {
        ensure!(stream.echoed() > before + 5, "the stream stalls");
        Ok(())
    })
}

/// Runs the plugin on the node, without a runtime.
fn plugin(cluster: &Cluster, operation: &str) -> Result<Value> {
    let conf = r#"{"cniVersion":"1.1.0","name":"hachi","type":"hachi-cni"}"#;
    let script = format!(
        "echo '{conf}' | CNI_COMMAND={operation} CNI_PATH=/opt/cni/bin /opt/cni/bin/hachi-cni || true"
    );
    let said = cluster.exec("node/node1", "sh", &["-ec", &script])?;
    serde_json::from_str(&said).with_context(|| format!("{operation}: {said:?}"))
}

fn an_agent_that_starts_without_an_api_keeps_what_there_is(cluster: &Cluster) -> Result<()> {
    judged(cluster)?;
    let service = Target::new(Tcp, cluster.service_ip("default", "web")?, 8080);
    let stream = stream_through(cluster, service)?;
    goes_on(&stream)?;
    away(cluster, true)?;
    cluster.kill_agent("node1")?;
    cluster.start_agent("node1")?;

    // It lives, so that nobody ends it, and is not ready, and says why.
    eventually(LIMIT, || {
        let (code, said) = get(cluster, HTTP, "/readyz")?;
        let why = said.contains("waits for the API server's list of");
        ensure!(code == 503 && why, "/readyz: {code} {said}");
        Ok(())
    })?;
    for path in ["/livez", "/healthz"] {
        ensure!(get(cluster, HTTP, path)?.0 == 200, "{path}");
    }
    // Load balancers are told what is known: nothing yet, as kube-proxy tells them.
    let (code, said) = get(cluster, 10_256, "/healthz")?;
    ensure!(code == 503, "healthz for load balancers: {code} {said}");
    let status = plugin(cluster, "STATUS")?;
    ensure!(status["code"] == 50, "{status}");

    // Services, policies and connections are those of the maps.
    goes_on(&stream)?;
    judged(cluster)?;
    reaches(cluster, "default/client", service).context("through the Service")?;

    // A Pod that goes is let go, and its address is free.
    let old = cluster.pod_ip("default/stranger")?;
    cluster.kubectl(&["delete", "pod", "stranger", "--wait=true"])?;
    let used = cluster.exec("node/node1", "ls", &["/var/lib/cni/hachi/addresses"])?;
    ensure!(!used.contains(&old.to_string()), "{old} is in use: {used}");
    // One that comes waits: nobody knows its policies.
    cluster.apply(&pod("late", "client"))?;
    thread::sleep(Duration::from_secs(1));
    ensure!(
        cluster.pod("default/late").is_err(),
        "a Pod runs that nobody knows"
    );
    goes_on(&stream)?;

    away(cluster, false)?;
    cluster.wait_agent("node1")?;
    cluster.wait_ready("default")?;
    reaches(cluster, "default/late", web(cluster)?).context("the Pod that waited")?;
    let report = stream.stop()?;
    ensure!(report.error.is_none(), "the stream broke: {report:?}");
    Ok(())
}

/// `HACHI_SOAK=1` waits for it; otherwise the kernel's own word for its timers counts.
fn a_server_that_is_gone_without_a_word_is_noticed(cluster: &Cluster) -> Result<()> {
    let pid = cluster.agent_pid("node1")?.context("no agent")?;
    let sockets = cluster.exec("node/node1", "ss", &["-tnopH", "state", "established"])?;
    let ours = format!("pid={pid},");
    let to_server: Vec<_> = (sockets.lines())
        .filter(|line| line.contains(&ours) && line.contains("172.30.0.1:"))
        .collect();
    ensure!(to_server.len() >= 6, "watches in {sockets}");
    for line in &to_server {
        // Nothing under way: the only timer is the one that asks whether the other side is there.
        let left = line.split("timer:(keepalive,").nth(1);
        let left = left.and_then(|rest| rest.split("sec").next());
        if let Some(seconds) = left.and_then(|text| text.parse::<f64>().ok()) {
            ensure!(seconds <= 10.0, "{line}");
        } else {
            // Less than a second, or an answer is under way.
            ensure!(line.contains("timer:("), "{line}");
        }
    }
    if std::env::var_os("HACHI_SOAK").is_none() {
        return Ok(());
    }
    let node = cluster.node_ip("node1")?;
    let lose = |action| -> Result<()> {
        let to = format!("{node}/32");
        let fabric = cluster.fabric();
        let arguments = ["netns", "exec", fabric.name(), "ip", "route", action];
        let status = std::process::Command::new("ip")
            .args(arguments)
            .args(["blackhole", &to])
            .status()?;
        if !status.success() {
            bail!("ip route {action}: {status}");
        }
        Ok(())
    };
    lose("add")?;
    let begun = Instant::now();
    let failing = "hachi_watch_failing{kind=\"NetworkPolicy\"}";
    let noticed = eventually(Duration::from_secs(60), || {
        let now = value(&metrics(cluster)?, failing)?;
        ensure!(now == 1.0, "nobody has noticed");
        Ok(())
    });
    let took = begun.elapsed();
    lose("del")?;
    noticed?;
    println!("a silent API server is noticed after {took:?}");
    ensure!(took < Duration::from_secs(40), "{took:?}");
    cluster.kubectl(&["delete", "networkpolicy", "web"])?;
    eventually(Duration::from_secs(30), || {
        let now = cluster.probe("default/stranger", web(cluster)?, TIMEOUT)?;
        ensure!(now.answered(), "{now}");
        Ok(())
    })
}

#[test]
fn what_metrics_tell() {
    run("metrics", metrics_tell_what_a_node_does);
}

#[test]
fn no_api_at_the_start() {
    run(
        "start",
        an_agent_that_starts_without_an_api_keeps_what_there_is,
    );
}

#[test]
fn a_silent_api() {
    run("silent", a_server_that_is_gone_without_a_word_is_noticed);
}
