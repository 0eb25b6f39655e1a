//! Services, as the documentation of Kubernetes has them: source x kind of address x traffic policy x
//! state of the endpoints, each with the backends that answer and the client's address that they see,
//! or a reject, or silence.
//!
//! What is expected is written by hand, from "Virtual IPs and Service Proxies" (Traffic policies,
//! Traffic to terminating endpoints, Session affinity), "Service" (externalIPs, ExternalName),
//! "EndpointSlices" (Conditions), "Topology Aware Routing", and the field descriptions of ServiceSpec,
//! in three columns: what the policy Cluster leads to, what Local leads to on node1. All questions go
//! out on node1. All Services of the table are there at once, with slices that are written by hand, so
//! that any state can be had of the same four Pods.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Family, Outcome,
    Protocol::{self, Http, Sctp, Tcp, Udp},
    Target,
    bed::{Bed, LIMIT, Spec},
    both_families,
    workload::probe::probe,
};

/// Endpoints in a state, and what the two policies make of them. `p1` and `p2` are on node1, `q1` and
/// `q2` on node2. An endpoint is ready, or `!` terminating and serving, `x` terminating and not serving,
/// `-` not ready; `@NODE` is a hint for a node.
struct State {
    endpoints: &'static str,
    cluster: &'static str,
    local: &'static str,
}

const REJECT: &str = "reject";
const DROP: &str = "drop";

const fn state(endpoints: &'static str, cluster: &'static str, local: &'static str) -> State {
    State {
        endpoints,
        cluster,
        local,
    }
}

const STATES: [State; 20] = [
    // Every ready endpoint; with Local those of the node.
    state("p1 p2 q1 q2", "p1 p2 q1 q2", "p1 p2"),
    state("p1 q1", "p1 q1", "p1"),
    state("p1 p2", "p1 p2", "p1 p2"),
    state("p1", "p1", "p1"),
    // Local with endpoints on other nodes alone: dropped.
    state("q1 q2", "q1 q2", DROP),
    state("q1", "q1", DROP),
    // No endpoint: rejected.
    state("", REJECT, REJECT),
    // What is not ready gets nothing.
    state("p1- q1-", REJECT, REJECT),
    state("p1- q1", "q1", DROP),
    state("p1- p2 q1-", "p2", "p2"),
    // Terminating endpoints that serve are used when no ready one is left, in each scope by itself.
    state("p1! q1!", "p1 q1", "p1"),
    state("p1! q1", "q1", "p1"),
    state("p1 q1!", "p1", "p1"),
    state("p1! p2 q1", "p2 q1", "p2"),
    state("q1! q2!", "q1 q2", DROP),
    // Those that do not serve are not.
    state("p1x q1x", REJECT, REJECT),
    state("p1x q1", "q1", DROP),
    // Hints count if every ready endpoint has them and one is for us; Local does not ask.
    state("p1@node1 q1@node2", "p1", "p1"),
    state("p1@node1 q1", "p1 q1", "p1"),
    state("q1@node2 q2@node2", "q1 q2", DROP),
];

/// The addresses that a Service is asked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    ClusterIp,
    NodePort,
    External,
    LoadBalancer,
}

const KINDS: [Kind; 4] = [
    Kind::ClusterIp,
    Kind::NodePort,
    Kind::External,
    Kind::LoadBalancer,
];

/// Who asks: another Pod of node1, and one that may be the backend itself.
const SOURCES: [&str; 2] = ["b/client", "a/p1"];

/// One question.
struct Row {
    source: &'static str,
    state: usize,
    local: bool,
    kind: Kind,
    protocol: Protocol,
    expected: &'static str,
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (number, state) in STATES.iter().enumerate() {
        for local in [false, true] {
            for (at, kind) in KINDS.into_iter().enumerate() {
                for (from, source) in SOURCES.into_iter().enumerate() {
                    // externalTrafficPolicy binds what comes from outside: from inside an outer address
                    // leads to every endpoint. internalTrafficPolicy binds the ClusterIP.
                    let expected = if local && kind == Kind::ClusterIp {
                        state.local
                    } else {
                        state.cluster
                    };
                    let protocol = match (number + at + from) % 3 {
                        0 => Http,
                        1 => Udp,
                        _ if [DROP, REJECT].contains(&expected) => Tcp,
                        _ => Sctp,
                    };
                    rows.push(Row {
                        source,
                        state: number,
                        local,
                        kind,
                        protocol,
                        expected,
                    });
                }
            }
        }
    }
    rows
}

fn name(state: usize, local: bool) -> String {
    format!("s{state}-{}", if local { "local" } else { "cluster" })
}

/// An address of the documentation's blocks (RFC 5737, RFC 3849) for a Service.
fn outer(family: Family, kind: Kind, state: usize, local: bool) -> IpAddr {
    let host = 1 + 2 * state + usize::from(local);
    let balanced = kind == Kind::LoadBalancer;
    let text = match (family, balanced) {
        (Family::V6, true) => format!("2001:db8:1::{host:x}"),
        (Family::V6, false) => format!("2001:db8:2::{host:x}"),
        (_, true) => format!("198.51.100.{host}"),
        (_, false) => format!("203.0.113.{host}"),
    };
    text.parse().expect("an address")
}

const PODS: [(&str, &str); 4] = [
    ("p1", "node1"),
    ("p2", "node1"),
    ("q1", "node2"),
    ("q2", "node2"),
];

fn family_of(bed: &Bed) -> Result<Family> {
    Ok(match bed.cluster.pod_ip(&bed.full("a/p1"))? {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    })
}

/// The Services of the table; their status has the load balancers' addresses.
fn services(bed: &Bed, family: Family) -> String {
    let mut manifest = String::new();
    for number in 0..STATES.len() {
        for local in [false, true] {
            let name = name(number, local);
            let policy = if local { "Local" } else { "Cluster" };
            let external = outer(family, Kind::External, number, local);
            let balanced = outer(family, Kind::LoadBalancer, number, local);
            let _ = write!(
                manifest,
                "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  type: LoadBalancer
  internalTrafficPolicy: {policy}
  externalTrafficPolicy: {policy}
  externalIPs: ['{external}']
  ports:
  - {{name: tcp, port: 8080, protocol: TCP}}
  - {{name: udp, port: 8080, protocol: UDP}}
  - {{name: sctp, port: 8080, protocol: SCTP}}
status: {{loadBalancer: {{ingress: [{{ip: '{balanced}', ipMode: VIP}}]}}}}
",
                namespace = bed.namespace("a")
            );
        }
    }
    manifest
}

fn slices(bed: &Bed, family: Family) -> Result<String> {
    let kind = if family == Family::V6 { "IPv6" } else { "IPv4" };
    let mut manifest = String::new();
    for (number, state) in STATES.iter().enumerate() {
        let mut endpoints = String::new();
        for endpoint in state.endpoints.split_whitespace() {
            let (pod, rest) = endpoint.split_at(2);
            let node = PODS
                .iter()
                .find(|(name, _)| *name == pod)
                .context("a Pod")?
                .1;
            let ip = bed.cluster.pod_ip(&bed.full(&format!("a/{pod}")))?;
            let (condition, hint) = rest.split_once('@').unwrap_or((rest, ""));
            let (ready, serving, terminating) = match condition {
                "" => (true, true, false),
                "!" => (false, true, true),
                "x" => (false, false, true),
                "-" => (false, false, false),
                other => bail!("no such condition: {other}"),
            };
            let _ = write!(
                endpoints,
                "\n- {{addresses: ['{ip}'], nodeName: {node}, conditions: {{ready: {ready}, \
                 serving: {serving}, terminating: {terminating}}}"
            );
            if !hint.is_empty() {
                let _ = write!(endpoints, ", hints: {{forNodes: [{{name: {hint}}}]}}");
            }
            endpoints.push('}');
        }
        if endpoints.is_empty() {
            endpoints.push_str(" []");
        }
        for local in [false, true] {
            let name = name(number, local);
            let _ = write!(
                manifest,
                "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-x, namespace: {namespace}, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: {kind}
ports:
- {{name: tcp, port: 80, protocol: TCP}}
- {{name: udp, port: 80, protocol: UDP}}
- {{name: sctp, port: 80, protocol: SCTP}}
endpoints:{endpoints}
",
                namespace = bed.namespace("a")
            );
        }
    }
    Ok(manifest)
}

/// What one question brought: who answered, and whom it took for the client.
fn ask(to: Target, timeout: Duration) -> (Outcome, Option<IpAddr>) {
    if to.protocol != Http {
        return (probe(to, timeout), None);
    }
    let asked = || -> std::io::Result<serde_json::Value> {
        let mut stream = TcpStream::connect_timeout(&to.address, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        write!(
            stream,
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        Ok(serde_json::from_str(body)?)
    };
    match asked() {
        Ok(body) => {
            let text = |key: &str| body[key].as_str().unwrap_or_default().to_owned();
            let client: Option<SocketAddr> = text("client").parse().ok();
            let client = client.map(|client| client.ip().to_canonical());
            (Outcome::Answered(text("pod")), client)
        }
        // The outcome of a plain probe says how it failed.
        Err(_) => (
            probe(
                Target {
                    protocol: Tcp,
                    ..to
                },
                timeout,
            ),
            None,
        ),
    }
}

/// A row's place on the network, and what is to be seen there.
struct Question<'a> {
    row: &'a Row,
    to: Target,
    own: IpAddr,
    expected: BTreeSet<String>,
}

/// Asks until everybody who should has answered, and as often again.
fn answered(bed: &Bed, question: &Question<'_>) -> Result<()> {
    const LEAST: usize = 12;
    const MOST: usize = 150;
    let mut seen = BTreeSet::new();
    for times in 0.. {
        ensure!(
            times < MOST,
            "only {seen:?} of {:?} answer",
            question.expected
        );
        let (outcome, client) = ask(question.to, Duration::from_secs(1));
        let who = match outcome {
            Outcome::Answered(who) => who,
            other => bail!("{other}"),
        };
        ensure!(question.expected.contains(&who), "answered by {who}");
        if let Some(client) = client {
            // The client's own address is kept; a Pod that reaches itself sees the Service's, so that
            // its answers leave it.
            let own = who == bed.full(question.row.source);
            let expected = if own {
                question.to.address.ip()
            } else {
                question.own
            };
            ensure!(client == expected, "{who} sees {client}, not {expected}");
        }
        seen.insert(who);
        if times >= LEAST && seen == question.expected {
            return Ok(());
        }
    }
    Ok(())
}

fn check(bed: &Bed, question: &Question<'_>) -> Result<()> {
    match question.row.expected {
        REJECT => match ask(question.to, Duration::from_secs(2)).0 {
            Outcome::Refused => Ok(()),
            other => bail!("not rejected: {other}"),
        },
        DROP => match ask(question.to, Duration::from_millis(300)).0 {
            Outcome::Silent => Ok(()),
            other => bail!("not dropped: {other}"),
        },
        _ => answered(bed, question),
    }
}

fn target(bed: &Bed, family: Family, row: &Row, listed: &serde_json::Value) -> Result<Target> {
    let name = name(row.state, row.local);
    let items = listed["items"].as_array().context("Services")?;
    let service = items.iter().find(|item| item["metadata"]["name"] == *name);
    let service = service.with_context(|| format!("no Service {name}"))?;
    let (address, port) = match row.kind {
        Kind::ClusterIp => {
            let ip = service["spec"]["clusterIP"].as_str().context("clusterIP")?;
            (ip.parse()?, 8080)
        }
        Kind::NodePort => {
            let kind = match row.protocol {
                Udp => "udp",
                Sctp => "sctp",
                Tcp | Http => "tcp",
            };
            let ports = service["spec"]["ports"].as_array().context("ports")?;
            let port = ports.iter().find(|port| port["name"] == kind);
            let number = port.and_then(|port| port["nodePort"].as_u64());
            let node = bed.kubectl(
                "get node node1 -o jsonpath={.status.addresses[?(@.type==\"InternalIP\")].address}",
            )?;
            let ip = node.split_whitespace().next().context("an InternalIP")?;
            (ip.parse()?, u16::try_from(number.context("nodePort")?)?)
        }
        kind => (outer(family, kind, row.state, row.local), 8080),
    };
    Ok(Target::new(row.protocol, address, port))
}

fn the_table(bed: &Bed) -> Result<()> {
    let mut pods: Vec<_> = PODS
        .iter()
        .map(|(name, node)| Spec {
            name,
            node,
            ports: "{containerPort: 80, protocol: SCTP}",
            ..Spec::default()
        })
        .collect();
    pods.push(Spec {
        namespace: "b",
        name: "client",
        node: "node1",
        ..Spec::default()
    });
    bed.pods(&pods)?;
    let family = family_of(bed)?;
    let services = services(bed, family);
    bed.apply(&services)?;
    bed.cluster.replace_status(&services)?;
    bed.apply(&slices(bed, family)?)?;
    let listed = bed.kubectl("get services -n $a -o json")?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;

    let rows = rows();
    ensure!(rows.len() >= 200, "{} rows", rows.len());
    let questions: Vec<Question<'_>> = rows
        .iter()
        .map(|row| {
            let names = row.expected.split_whitespace();
            Ok(Question {
                row,
                to: target(bed, family, row, &listed)?,
                own: bed.cluster.pod_ip(&bed.full(row.source))?,
                expected: names.map(|pod| bed.full(&format!("a/{pod}"))).collect(),
            })
        })
        .collect::<Result<_>>()?;

    // Until the agents have taken everything in a row may fail; in the end each must hold.
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let start = Instant::now();
    let work = || {
        while let Some(question) = questions.get(next.fetch_add(1, Ordering::Relaxed)) {
            let ask = || loop {
                match check(bed, question) {
                    Err(error) if start.elapsed() > LIMIT => return Err(error),
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                    Ok(()) => return Ok(()),
                }
            };
            let netns = bed.cluster.netns(&bed.full(question.row.source));
            let asked = netns.and_then(|netns| netns.get().enter(ask)).flatten();
            if let Err(error) = asked {
                let Row {
                    source,
                    state,
                    local,
                    kind,
                    expected,
                    ..
                } = question.row;
                let policy = if *local { "Local" } else { "Cluster" };
                let text = format!(
                    "{source} -> {kind:?} {} (policy {policy}, endpoints {:?}): {error:#}; expected \
                     {expected}",
                    question.to, STATES[*state].endpoints
                );
                wrong
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(text);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(work);
        }
    });
    let wrong = wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{} rows in {:.1?}", rows.len(), start.elapsed());
    ensure!(
        wrong.is_empty(),
        "{} of {} rows are wrong:\n{}",
        wrong.len(),
        rows.len(),
        wrong.join("\n")
    );
    Ok(())
}

both_families!(the_table);
