//! The network around the nodes: Services from a host outside, and Pods that talk to it. That host has
//! no route to any Pod.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Protocol::{Tcp, Udp},
    Target,
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
    workload::{
        ping::ping_as,
        probe::{Outcome, unspecified},
    },
};

/// How long one exchange may take.
const WAIT: Duration = Duration::from_secs(5);

fn service(name: &str, policy: &str, ports: (u16, u16)) -> String {
    let (tcp, udp) = ports;
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: $a}}
spec:
  type: NodePort
  externalTrafficPolicy: {policy}
  selector: {{app: web}}
  ports:
  - {{name: http, port: 8080, targetPort: http, nodePort: {tcp}}}
  - {{name: dns, port: 53, targetPort: 81, protocol: UDP, nodePort: {udp}}}
"
    )
}

/// One backend on node1, and a client Pod on each node.
fn start(bed: &Bed) -> Result<()> {
    let ports = "{name: http, containerPort: 80}, {name: dns, containerPort: 81, protocol: UDP}";
    let web = Spec {
        name: "web",
        node: "node1",
        labels: "app: web",
        ports,
        ..Spec::default()
    };
    let client = |name, node| Spec {
        name,
        node,
        ..Spec::default()
    };
    bed.pods(&[web, client("near", "node1"), client("far", "node2")])
}

fn node_ip(bed: &Bed, node: &str) -> Result<IpAddr> {
    let path = "-o=jsonpath={.status.addresses[?(@.type==\"InternalIP\")].address}";
    let ips = bed.kubectl(&format!("get node {node} {path}"))?;
    let first = ips.split_whitespace().next().context("no InternalIP")?;
    first
        .parse()
        .with_context(|| format!("the address {first:?}"))
}

fn outside(bed: &Bed) -> Result<IpAddr> {
    let node = node_ip(bed, "node1")?;
    let family = bed.cluster.options().family;
    let found = family
        .fabric()
        .into_iter()
        .find(|ip| ip.is_ipv4() == node.is_ipv4());
    found.context("the bridge has no address")
}

/// A node port is answered by every node, wherever the backend is; so that it can be, by the node's
/// address. With a policy of Local only by the node that has a backend.
fn node_ports_are_served_to_a_host_outside(bed: &Bed) -> Result<()> {
    start(bed)?;
    bed.apply(&service("web", "Cluster", (30_080, 30_053)))?;
    for node in ["node1", "node2"] {
        let ip = node_ip(bed, node)?;
        for target in [Target::new(Tcp, ip, 30_080), Target::new(Udp, ip, 30_053)] {
            bed.reaches("outside", target).context(node)?;
        }
    }
    bed.apply(&service("local", "Local", (30_081, 30_054)))?;
    let (here, elsewhere) = (node_ip(bed, "node1")?, node_ip(bed, "node2")?);
    for (protocol, port) in [(Tcp, 30_081), (Udp, 30_054)] {
        bed.reaches("outside", Target::new(protocol, here, port))?;
        eventually(LIMIT, || {
            let outcome = bed.probe("outside", Target::new(protocol, elsewhere, port))?;
            ensure!(matches!(outcome, Outcome::Silent), "{outcome:?}");
            Ok(())
        })?;
    }
    bed.kubectl("delete service -n $a web local").map(drop)
}

/// What Pods send to a host outside comes from their node's address, and the answers find them.
fn pods_reach_a_host_outside_as_their_node(bed: &Bed) -> Result<()> {
    start(bed)?;
    let there = outside(bed)?;
    let fabric = bed.cluster.fabric();
    let listener = fabric.enter(|| TcpListener::bind((there, 0)))??;
    let socket = fabric.enter(|| UdpSocket::bind((there, 0)))??;
    socket.set_read_timeout(Some(WAIT))?;
    for (pod, node) in [("a/near", "node1"), ("a/far", "node2")] {
        let node = node_ip(bed, node)?;
        let netns = bed.cluster.netns(&bed.full(pod))?;

        let address = listener.local_addr()?;
        let mut sent = netns
            .get()
            .enter(|| TcpStream::connect_timeout(&address, WAIT))??;
        let (mut got, peer) = listener.accept()?;
        ensure!(
            peer.ip() == node,
            "{pod} came from {peer}, its node is {node}"
        );
        got.write_all(b"welcome")?;
        sent.set_read_timeout(Some(WAIT))?;
        let mut answer = [0; 7];
        sent.read_exact(&mut answer)?;
        ensure!(&answer == b"welcome");

        let any: IpAddr = if there.is_ipv4() {
            [0, 0, 0, 0].into()
        } else {
            [0_u16; 8].into()
        };
        let asking = netns
            .get()
            .enter(|| UdpSocket::bind(SocketAddr::new(any, 0)))??;
        asking.set_read_timeout(Some(WAIT))?;
        asking.send_to(b"question", socket.local_addr()?)?;
        let mut buffer = [0; 16];
        let (length, peer) = socket.recv_from(&mut buffer)?;
        ensure!(
            peer.ip() == node && &buffer[..length] == b"question",
            "{peer}"
        );
        socket.send_to(b"answer", peer)?;
        let (length, by) = asking.recv_from(&mut buffer)?;
        ensure!(
            by == socket.local_addr()? && &buffer[..length] == b"answer",
            "{by}"
        );
    }
    Ok(())
}

/// Asks from one socket, several times in turn; every answer must come from where it was asked.
fn ask_in_turn(socket: &UdpSocket, targets: &[SocketAddr]) -> Result<()> {
    socket.set_read_timeout(Some(WAIT))?;
    let mut buffer = [0; 512];
    for round in 0..3 {
        for target in targets {
            let question = format!("{target} {round}");
            socket.send_to(question.as_bytes(), target)?;
            let (length, by) = socket
                .recv_from(&mut buffer)
                .with_context(|| format!("no answer to {question}"))?;
            let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
            ensure!(
                by == *target && answer.ends_with(&question),
                "{by} says {answer:?} to {question:?}"
            );
        }
    }
    Ok(())
}

/// From one port to two Services over one backend and to the backend itself: each answers under its own
/// address, to Pods on either node and to a host outside.
fn one_port_reaches_two_services_over_one_backend(bed: &Bed) -> Result<()> {
    start(bed)?;
    bed.apply(&service("web", "Cluster", (30_082, 30_055)))?;
    bed.apply(&service("again", "Cluster", (30_083, 30_056)))?;
    let node = node_ip(bed, "node1")?;
    let any: IpAddr = if node.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0_u16; 8].into()
    };
    for (pod, protocol) in [("a/near", Udp), ("a/far", Udp)] {
        let mut targets = Vec::new();
        for name in ["web", "again"] {
            let ip = bed.service("a", name)?;
            bed.reaches(pod, Target::new(protocol, ip, 53))?;
            targets.push(SocketAddr::new(ip, 53));
        }
        targets.push(bed.target(protocol, "a/web", 81)?.address);
        let netns = bed.cluster.netns(&bed.full(pod))?;
        let socket = netns
            .get()
            .enter(|| UdpSocket::bind(SocketAddr::new(any, 0)))??;
        ask_in_turn(&socket, &targets).context(pod)?;
    }
    for node in ["node1", "node2"] {
        let ip = node_ip(bed, node)?;
        let targets = [30_055, 30_056].map(|port| SocketAddr::new(ip, port));
        for target in targets {
            bed.reaches("outside", Target::new(Udp, ip, target.port()))?;
        }
        let socket = bed
            .cluster
            .fabric()
            .enter(|| UdpSocket::bind(SocketAddr::new(any, 0)))??;
        ask_in_turn(&socket, &targets).context(node)?;
    }
    bed.kubectl("delete service -n $a web again").map(drop)
}

/// Pods of one node and of another, and the nodes themselves, ping one host with one identifier at the same
/// time: each gets its own answers, under the identifier that it sent.
fn pings_with_one_identifier_are_told_apart(bed: &Bed) -> Result<()> {
    start(bed)?;
    let there = outside(bed)?;
    let places = ["a/web", "a/near", "a/far", "node/node1", "node/node2"];
    for _ in 0..3 {
        thread::scope(|scope| -> Result<()> {
            let pings = places.map(|place| {
                scope.spawn(move || -> Result<()> {
                    let netns = bed.cluster.netns(&bed.full(place))?;
                    let answered = netns.get().enter(|| ping_as(there, 0x4242, WAIT))??;
                    ensure!(answered, "{place} has no answer from {there}");
                    Ok(())
                })
            });
            for ping in pings {
                ping.join()
                    .map_err(|_| anyhow::anyhow!("a ping panicked"))??;
            }
            Ok(())
        })?;
    }
    // And back: a node answers for itself, whatever its Pods have under way.
    for node in ["node1", "node2"] {
        let ip = node_ip(bed, node)?;
        let answered = bed.cluster.fabric().enter(|| ping_as(ip, 0x4242, WAIT))??;
        ensure!(answered, "{node} does not answer");
    }
    Ok(())
}

/// A backend without a server refuses, and so does a host outside: whoever asked learns of it, from where it
/// asked, by a reset or by "port unreachable".
fn refusals_come_from_whoever_was_asked(bed: &Bed) -> Result<()> {
    start(bed)?;
    let closed = service("closed", "Cluster", (30_084, 30_057))
        .replace("targetPort: http", "targetPort: 9")
        .replace("targetPort: 81", "targetPort: 9");
    bed.apply(&closed)?;
    let ip = bed.service("a", "closed")?;
    let refused = |from: &str, target: Target| {
        // The kernel gives a socket only what quotes the packet that the socket has sent.
        eventually(LIMIT, || {
            let outcome = bed.probe(from, target)?;
            ensure!(
                matches!(outcome, Outcome::Refused),
                "{from} -> {target}: {outcome}"
            );
            Ok(())
        })
    };
    for from in ["a/near", "a/far"] {
        refused(from, Target::new(Tcp, ip, 8080))?;
        refused(from, Target::new(Udp, ip, 53))?;
        for protocol in [Tcp, Udp] {
            refused(from, Target::new(protocol, outside(bed)?, 9))?;
        }
    }
    for node in ["node1", "node2"] {
        let ip = node_ip(bed, node)?;
        refused("outside", Target::new(Tcp, ip, 30_084))?;
        refused("outside", Target::new(Udp, ip, 30_057))?;
    }
    bed.kubectl("delete service -n $a closed").map(drop)
}

/// The ports that a namespace gives to connections, and its agent to what it translates.
const PORTS: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// With one port for all that node2 translates, whoever comes second is told at once: Pods on their way out,
/// and a client outside whose backend is on the other node. Who had the port keeps it.
fn flows_without_a_port_are_refused_at_once(bed: &Bed) -> Result<()> {
    start(bed)?;
    bed.apply(&service("web", "Cluster", (30_085, 30_058)))?;
    let node = node_ip(bed, "node2")?;
    bed.reaches("outside", Target::new(Tcp, node, 30_085))?;
    let netns = bed.cluster.netns("node/node2")?;
    let before = netns.get().enter(|| fs::read_to_string(PORTS))??;
    // Any change has the agent look again.
    let set = |range: &str, port| -> Result<()> {
        netns.get().enter(|| fs::write(PORTS, range))??;
        bed.apply(&service("again", "Cluster", (port, port + 1)))
            .map(drop)
    };
    set("50000 50000", 30_086)?;
    let told = first_come_first_served(bed, node);
    set(&before, 30_088)?;
    told?;
    bed.kubectl("delete service -n $a web again").map(drop)
}

fn first_come_first_served(bed: &Bed, node: IpAddr) -> Result<()> {
    let there = outside(bed)?;
    let fabric = bed.cluster.fabric();
    let listener = fabric.enter(|| TcpListener::bind((there, 0)))??;
    let socket = fabric.enter(|| UdpSocket::bind((there, 0)))??;
    let pod = bed.cluster.netns(&bed.full("a/far"))?;
    let (tcp, udp) = (listener.local_addr()?, socket.local_addr()?);
    for (from, to) in [(pod.get(), tcp), (fabric, SocketAddr::new(node, 30_085))] {
        let mut held = Vec::new();
        eventually(LIMIT, || {
            match from.enter(|| TcpStream::connect_timeout(&to, WAIT))? {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
                Err(error) => Err(error).with_context(|| format!("to {to}")),
                Ok(stream) => {
                    held.push(stream);
                    bail!("{} connections to {to}", held.len())
                }
            }
        })?;
        let last = held.last_mut().context("nobody came first")?;
        last.write_all(b"still here\n").context("who came first")?;
    }
    for (from, to) in [(pod.get(), udp), (fabric, SocketAddr::new(node, 30_058))] {
        let mut held = Vec::new();
        eventually(LIMIT, || {
            let socket = from.enter(|| UdpSocket::bind(unspecified(to)))??;
            socket.connect(to)?;
            socket.send(b"question")?;
            socket.set_read_timeout(Some(Duration::from_millis(200)))?;
            let refused = |error: std::io::Error| error.kind() == ErrorKind::ConnectionRefused;
            if socket.recv(&mut [0; 64]).is_err_and(refused) {
                return Ok(());
            }
            held.push(socket);
            bail!("{} sockets have a port to {to}", held.len())
        })?;
        ensure!(!held.is_empty(), "nobody came first");
    }
    Ok(())
}

both_families! {
    flows_without_a_port_are_refused_at_once,
    pings_with_one_identifier_are_told_apart,
    refusals_come_from_whoever_was_asked,
    one_port_reaches_two_services_over_one_backend,
    node_ports_are_served_to_a_host_outside,
    pods_reach_a_host_outside_as_their_node,
}
