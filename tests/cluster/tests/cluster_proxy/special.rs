//! What is not a matter of endpoints and policies: who may use a load balancer, whose clients stay with
//! their backend, what no proxy serves, ports of Pods on the node.
//!
//! From "Service" (Session stickiness, External IPs, ExternalName, Headless Services), KEP-1860
//! (`ipMode`), "Labels, Annotations and Taints" (`service-proxy-name`, `headless`), the field
//! descriptions of ServiceSpec and ContainerPort.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Family, Protocol,
    Protocol::{Http, Tcp, Udp},
    READY_ANNOTATION, Target,
    bed::Bed,
};

use crate::{
    ask::{End, Question, Source, all_hold},
    client,
    objects::{self, Block, Listed, PORTS, outer},
    rules::endpoints,
};

/// The Services, each over `p1` and `q1`; `$B` and `$E` are its outer addresses.
const SERVICES: [(&str, &str); 8] = [
    (
        "ranges",
        "  type: LoadBalancer\n  externalIPs: ['$E']\n  loadBalancerSourceRanges: [$OUTSIDE, $P1]\n",
    ),
    (
        "other-ranges",
        "  type: LoadBalancer\n  externalIPs: ['$E']\n  loadBalancerSourceRanges: [$NOBODY]\n",
    ),
    (
        "other-family",
        "  type: LoadBalancer\n  loadBalancerSourceRanges: [$OTHER]\n",
    ),
    ("by-proxy", "  type: LoadBalancer\n"),
    (
        "sticky",
        "  type: LoadBalancer\n  externalIPs: ['$E']\n  sessionAffinity: ClientIP\n",
    ),
    (
        "sticky-local",
        "  type: LoadBalancer\n  externalTrafficPolicy: Local\n  sessionAffinity: ClientIP\n",
    ),
    ("not-ours", "  type: NodePort\n"),
    ("headless-label", "  type: NodePort\n"),
];

fn host(number: usize) -> usize {
    200 + number
}

fn manifest(bed: &Bed) -> Result<String> {
    let family = objects::family(bed);
    let single = |ip: IpAddr| format!("'{ip}/{}'", if ip.is_ipv4() { 32 } else { 128 });
    let (nobody, other) = if family == Family::V6 {
        ("'2001:db8:ffff::/48'", "0.0.0.0/0")
    } else {
        ("192.0.2.128/25", "'::/0'")
    };
    let mut manifest = String::new();
    for (number, (name, spec)) in SERVICES.iter().enumerate() {
        let external = outer(family, Block::External, host(number))?;
        let labels = match *name {
            "not-ours" => "service.kubernetes.io/service-proxy-name: another",
            "headless-label" => "service.kubernetes.io/headless: ''",
            _ => "",
        };
        let spec = spec
            .replace("$E", &external.to_string())
            .replace("$OUTSIDE", &single(objects::outside(bed)?))
            .replace("$P1", &single(bed.cluster.pod_ip(&bed.full("a/p1"))?))
            .replace("$NOBODY", nobody)
            .replace("$OTHER", other);
        let status = if spec.contains("LoadBalancer") {
            let (block, mode) = match *name {
                "by-proxy" => (Block::Elsewhere, "Proxy"),
                _ => (Block::Balanced, "VIP"),
            };
            let balanced = outer(family, block, host(number))?;
            format!("status: {{loadBalancer: {{ingress: [{{ip: '{balanced}', ipMode: {mode}}}]}}}}")
        } else {
            String::new()
        };
        let _ = write!(
            manifest,
            "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: $a, labels: {{{labels}}}}}
spec:
{spec}{PORTS}{status}
"
        );
    }
    Ok(manifest)
}

/// Services with selectors, and what has no address.
const SELECTED: &str = "---
apiVersion: v1
kind: Service
metadata: {name: early, namespace: $b}
spec:
  publishNotReadyAddresses: true
  selector: {app: early}
  ports: [{name: tcp, port: 8080, targetPort: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: late, namespace: $b}
spec:
  selector: {app: early}
  ports: [{name: tcp, port: 8080, targetPort: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: $b}
spec:
  clusterIP: None
  selector: {app: early}
  ports: [{name: tcp, port: 8080, targetPort: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: alias, namespace: $b}
spec: {type: ExternalName, externalName: example.com}
---
apiVersion: v1
kind: Pod
metadata:
  name: early
  namespace: $b
  labels: {app: early}
  annotations: {READY: 'false'}
spec: {nodeName: node2, containers: [{name: main, image: server}]}
---
apiVersion: v1
kind: Pod
metadata: {name: ports, namespace: $b}
spec:
  nodeName: node1
  containers:
  - name: main
    image: server
    ports:
    - {containerPort: 80, hostPort: 18080}
    - {containerPort: 80, hostPort: 18053, protocol: UDP}
    - {containerPort: 80, hostPort: 18081, hostIP: '$NODE'}
    - {containerPort: 80, hostPort: 18082, hostIP: '$ELSEWHERE'}
";

/// A load balancer that answers on its own address: a host of the network.
fn balancer(bed: &Bed, address: IpAddr) -> Result<()> {
    let length = if address.is_ipv4() { 32 } else { 128 };
    let net = format!("{address}/{length}");
    // Nobody can listen on an IPv6 address that is looked for on the link yet, as on lo it is too.
    let add = ["address", "replace", &net, "dev", "lo", "nodad"];
    objects::outside_ip(bed, &add)?;
    let at = SocketAddr::new(address, 8080);
    let listener = bed.cluster.fabric().enter(|| TcpListener::bind(at))??;
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
            let _ = stream.read(&mut [0; 64]);
            let _ = stream.write_all(b"balancer\n");
        }
    });
    Ok(())
}

struct Rows<'a> {
    bed: &'a Bed,
    listed: Listed,
    rows: Vec<Question>,
}

impl Rows<'_> {
    fn number(name: &str) -> Result<usize> {
        let found = SERVICES.iter().position(|(other, _)| *other == name);
        found.with_context(|| format!("no Service {name}"))
    }

    fn outer(&self, name: &str, block: Block) -> Result<IpAddr> {
        outer(objects::family(self.bed), block, host(Self::number(name)?))
    }

    fn pods(&self, pods: &[&str]) -> BTreeSet<String> {
        pods.iter().map(|pod| self.bed.full(pod)).collect()
    }

    fn both(&self) -> End {
        End::All(self.pods(&["a/p1", "a/q1"]), client)
    }

    /// One row for each source and protocol.
    fn ask(
        &mut self,
        what: &str,
        sources: &[Source],
        protocols: &[Protocol],
        (ip, port): (IpAddr, u16),
        end: &End,
    ) {
        for source in sources {
            for protocol in protocols {
                self.rows.push(Question {
                    what: what.to_owned(),
                    source: *source,
                    to: Target::new(*protocol, ip, port),
                    end: end.clone(),
                });
            }
        }
    }

    fn cluster_ip(&self, name: &str) -> Result<(IpAddr, u16)> {
        Ok((self.listed.cluster_ip(name)?, 8080))
    }

    fn node_port(&self, name: &str, port: &str) -> Result<(IpAddr, u16)> {
        let node = self.bed.cluster.node_ip("node1")?;
        Ok((node, self.listed.node_port(name, port)?))
    }
}

const CLIENT: Source = Source::Pod("b/client");
const SOCKETS: Source = Source::Sockets("b/client");
const BACKEND: Source = Source::Pod("a/p1");
const NODE: Source = Source::Node("node1");
const FAR: Source = Source::Pod("b/far");
const OUTSIDE: Source = Source::Outside;
const EVERYBODY: [Source; 5] = [CLIENT, SOCKETS, BACKEND, NODE, OUTSIDE];
const INSIDE: [Source; 4] = [CLIENT, SOCKETS, BACKEND, NODE];

/// Who may use a load balancer's address. Other addresses of the Service are nobody's secret.
fn source_ranges(rows: &mut Rows<'_>) -> Result<()> {
    let both = rows.both();
    for name in ["ranges", "other-ranges", "other-family"] {
        let at = (rows.outer(name, Block::Balanced)?, 8080);
        // The node may: what load balancers ask comes from itself where it is one.
        rows.ask(name, &[NODE], &[Http, Udp], at, &both);
        let listed = if name == "ranges" { &both } else { &End::Drop };
        rows.ask(name, &[OUTSIDE, BACKEND], &[Http, Udp], at, listed);
        rows.ask(name, &[CLIENT, SOCKETS, FAR], &[Http, Udp], at, &End::Drop);
        let own = rows.cluster_ip(name)?;
        rows.ask(name, &INSIDE, &[Http, Udp], own, &both);
        let port = rows.node_port(name, "tcp")?;
        rows.ask(name, &EVERYBODY, &[Http], port, &both);
    }
    for name in ["ranges", "other-ranges"] {
        let at = (rows.outer(name, Block::External)?, 8080);
        rows.ask(name, &EVERYBODY, &[Http, Udp], at, &both);
    }
    Ok(())
}

/// What another proxy, or none, serves.
fn not_served(rows: &mut Rows<'_>) -> Result<()> {
    let at = rows.outer("by-proxy", Block::Elsewhere)?;
    let balancer = End::Network("balancer");
    rows.ask("ipMode Proxy", &INSIDE, &[Tcp], (at, 8080), &balancer);
    let both = rows.both();
    let own = rows.cluster_ip("by-proxy")?;
    rows.ask("ipMode Proxy", &INSIDE, &[Http], own, &both);
    let port = rows.node_port("by-proxy", "udp")?;
    rows.ask("ipMode Proxy", &EVERYBODY, &[Udp], port, &both);

    for name in ["not-ours", "headless-label"] {
        // Nobody has the address, so nobody answers, not even with a reject.
        let own = rows.cluster_ip(name)?;
        rows.ask(name, &INSIDE, &[Tcp, Udp], own, &End::Drop);
        // On the node's own address nobody listens, which the node says.
        let port = rows.node_port(name, "tcp")?;
        rows.ask(name, &[CLIENT, NODE, OUTSIDE], &[Tcp], port, &End::Reject);
    }
    Ok(())
}

/// A client keeps its backend, whatever port it comes from.
fn affinity(rows: &mut Rows<'_>) -> Result<()> {
    let one = End::One(rows.pods(&["a/p1", "a/q1"]));
    let here = End::One(rows.pods(&["a/p1"]));
    let own = rows.cluster_ip("sticky")?;
    rows.ask("sticky", &INSIDE, &[Http, Udp], own, &one);
    let outer = [
        (rows.outer("sticky", Block::Balanced)?, 8080),
        (rows.outer("sticky", Block::External)?, 8080),
        rows.node_port("sticky", "tcp")?,
    ];
    for at in outer {
        rows.ask("sticky", &EVERYBODY, &[Http], at, &one);
    }
    let udp = rows.node_port("sticky", "udp")?;
    rows.ask("sticky", &EVERYBODY, &[Udp], udp, &one);
    let local = (rows.outer("sticky-local", Block::Balanced)?, 8080);
    rows.ask("sticky-local", &[OUTSIDE], &[Http, Udp], local, &here);
    rows.ask("sticky-local", &INSIDE, &[Http, Udp], local, &one);
    Ok(())
}

/// A ClusterIP has the ports that it has.
fn undefined_ports(rows: &mut Rows<'_>) -> Result<()> {
    let (ip, _) = rows.cluster_ip("sticky")?;
    rows.ask(
        "no such port",
        &INSIDE,
        &[Tcp, Udp],
        (ip, 9999),
        &End::Reject,
    );
    rows.ask("no such port", &[FAR], &[Tcp, Udp], (ip, 80), &End::Reject);
    Ok(())
}

/// `publishNotReadyAddresses`, and ports of a Pod on its node.
fn selected(rows: &mut Rows<'_>) -> Result<()> {
    let ip = |name| rows.bed.service("b", name);
    let (early, late) = ((ip("early")?, 8080), (ip("late")?, 8080));
    let end = End::All(rows.pods(&["b/early"]), client);
    rows.ask("early", &INSIDE, &[Http], early, &end);
    rows.ask("late", &INSIDE, &[Http], late, &End::Reject);

    let end = End::All(rows.pods(&["b/ports"]), client);
    let node = rows.bed.cluster.node_ip("node1")?;
    let sources = [CLIENT, SOCKETS, NODE, FAR, OUTSIDE, Source::Pod("b/ports")];
    rows.ask("hostPort", &sources, &[Http], (node, 18080), &end);
    rows.ask("hostPort", &sources, &[Udp], (node, 18053), &end);
    rows.ask("hostIP", &sources, &[Http], (node, 18081), &end);
    // Bound to an address that the node does not have, and on another node.
    rows.ask(
        "other hostIP",
        &sources,
        &[Tcp],
        (node, 18082),
        &End::Reject,
    );
    let other = rows.bed.cluster.node_ip("node2")?;
    rows.ask("other node", &sources, &[Tcp], (other, 18080), &End::Reject);
    Ok(())
}

/// Names that have no address are nothing to the datapath: the Pod is a backend of one frontend.
fn nothing_for_names_alone(bed: &Bed) -> Result<()> {
    let ip = bed.cluster.pod_ip(&bed.full("b/early"))?.to_string();
    let nodes = bed.cluster.nodes();
    for node in nodes {
        let mut client = hachi_api::Client::connect(&node.agent_socket())?;
        let table = hachi_api::Table::Services;
        let reply = client.call(&hachi_api::Request::Get { table })?;
        let hachi_api::Reply::Table { rows, .. } = reply else {
            bail!("{reply:?}");
        };
        let led: Vec<_> = rows
            .iter()
            .filter(|row| row.iter().any(|cell| cell.contains(&ip)))
            .collect();
        ensure!(led.len() == 1, "{}: {led:?}", node.name);
    }
    Ok(())
}

pub(crate) fn the_rest(bed: &Bed) -> Result<()> {
    objects::pods(bed)?;
    objects::route_outside(bed)?;
    let family = objects::family(bed);
    let balancers = outer(family, Block::Elsewhere, host(Rows::number("by-proxy")?))?;
    balancer(bed, balancers)?;

    let services = manifest(bed)?.replace("$a", &bed.namespace("a"));
    bed.apply(&services)?;
    let balanced: Vec<&str> = services
        .split("---\n")
        .filter(|document| document.contains("status:"))
        .collect();
    bed.cluster
        .replace_status(&format!("---\n{}", balanced.join("---\n")))?;
    let slices: Vec<String> = SERVICES
        .iter()
        .map(|(name, _)| objects::slice(bed, name, &endpoints("p1 q1")))
        .collect::<Result<_>>()?;
    bed.apply(&slices.concat())?;
    let node = bed.cluster.node_ip("node1")?.to_string();
    let selected_ = SELECTED
        .replace("READY", READY_ANNOTATION)
        .replace("$NODE", &node)
        .replace("$ELSEWHERE", &bed.cluster.node_ip("node2")?.to_string());
    bed.apply(&selected_)?;
    bed.kubectl("wait pod ports -n $b --for=condition=Ready --timeout=60s")?;
    hachi_cluster::eventually(hachi_cluster::bed::LIMIT, || {
        bed.cluster.pod_ip(&bed.full("b/early")).map(drop)
    })?;

    let mut rows = Rows {
        bed,
        listed: Listed::get(bed)?,
        rows: Vec::new(),
    };
    source_ranges(&mut rows)?;
    not_served(&mut rows)?;
    affinity(&mut rows)?;
    undefined_ports(&mut rows)?;
    selected(&mut rows)?;
    all_hold(bed, &rows.rows)?;
    nothing_for_names_alone(bed)
}
