//! XDP on a node's uplink: what a host outside asks a node port is answered alike with and without it,
//! and established packets to a backend elsewhere do go the short way.
//!
//! The sockets of this cluster leave checksums to hardware that is not there, and so go the long way;
//! the frames that are to go the short one are made here, with their checksums.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Protocol::{Tcp, Udp},
    Target,
    bed::{Bed, Spec},
    both_families,
    workload::wire::Wire,
};

const WAIT: Duration = Duration::from_secs(5);
/// Of the client outside.
const PORT: u16 = 45_000;
const NODE_PORT: (u16, u16) = (30_180, 30_153);
/// Datagrams in one round, sent in far less than a second.
const ROUND: usize = 20;

fn start(bed: &Bed) -> Result<()> {
    let web = Spec {
        name: "web",
        node: "node1",
        labels: "app: web",
        ports: "{name: http, containerPort: 80}, {name: dns, containerPort: 81, protocol: UDP}",
        ..Spec::default()
    };
    bed.pods(&[web])?;
    let (tcp, udp) = NODE_PORT;
    bed.apply(&format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: $a}}
spec:
  type: NodePort
  selector: {{app: web}}
  ports:
  - {{name: http, port: 8080, targetPort: http, nodePort: {tcp}}}
  - {{name: dns, port: 53, targetPort: dns, protocol: UDP, nodePort: {udp}}}
"
    ))
    .map(drop)
}

/// Starts node2's agent anew with XDP as it is said; returns what its status says of it.
fn agent(bed: &Bed, xdp: &str) -> Result<Vec<String>> {
    bed.cluster.kill_agent("node2")?;
    bed.cluster.start_agent_with("node2", &["--xdp", xdp])?;
    bed.cluster.wait_agent("node2")?;
    let deadline = std::time::Instant::now() + WAIT;
    loop {
        let status = bed.cluster.wait_agent("node2")?;
        let states: Vec<_> = status.xdp.into_values().collect();
        if !states.is_empty() || std::time::Instant::now() > deadline {
            return Ok(states);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The sum of RFC 1071 over bytes of an even or odd number.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut total = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            total += u32::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap_or(u16::MAX)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// A frame with a datagram whose checksums are complete.
fn frame(
    macs: ([u8; 6], [u8; 6]),
    from: SocketAddr,
    to: SocketAddr,
    data: &[u8],
) -> Result<Vec<u8>> {
    let (source, destination) = (octets(from.ip()), octets(to.ip()));
    let length = u16::try_from(8 + data.len())?.to_be_bytes();
    let mut udp = [
        from.port().to_be_bytes(),
        to.port().to_be_bytes(),
        length,
        [0; 2],
    ]
    .concat();
    udp.extend_from_slice(data);
    let check = !sum(&[&source, &destination, &[0, 17], &length, &udp]);
    udp[6..8].copy_from_slice(&check.to_be_bytes());
    let (kind, mut ip) = if from.is_ipv4() {
        let mut ip = vec![0x45, 0];
        ip.extend_from_slice(&u16::try_from(20 + udp.len())?.to_be_bytes());
        ip.extend_from_slice(&[0, 0, 0x40, 0, 64, 17, 0, 0]);
        (0x0800_u16, ip)
    } else {
        let mut ip = vec![0x60, 0, 0, 0];
        ip.extend_from_slice(&length);
        ip.extend_from_slice(&[17, 64]);
        (0x86dd, ip)
    };
    ip.extend_from_slice(&source);
    ip.extend_from_slice(&destination);
    if from.is_ipv4() {
        let check = !sum(&[&ip]);
        ip[10..12].copy_from_slice(&check.to_be_bytes());
    }
    Ok([&macs.0[..], &macs.1, &kind.to_be_bytes(), &ip, &udp].concat())
}

/// How many packets node2 has forwarded without translating them in a tc program: those of XDP.
fn by_xdp(bed: &Bed) -> Result<i64> {
    let table = bed
        .cluster
        .exec("node/node2", "hachi", &["get", "counters"])?;
    let count = |reason: &str| {
        let line = table
            .lines()
            .find(|line| line.split_whitespace().next() == Some(reason));
        let packets = line.and_then(|line| line.split_whitespace().nth(2)?.parse().ok());
        packets.unwrap_or(0_i64)
    };
    Ok(count("forwarded") - count("translated"))
}

/// Asks the node port a few times by frames, and expects every answer; returns how many of the
/// questions XDP has sent on.
fn ask(bed: &Bed) -> Result<i64> {
    let node = bed.cluster.node_ip("node2")?;
    let family = bed.cluster.options().family;
    let mut fabric = family.fabric().into_iter();
    let own = fabric
        .find(|ip| ip.is_ipv4() == node.is_ipv4())
        .context("the bridge has no address")?;
    let (from, to) = (
        SocketAddr::new(own, PORT),
        SocketAddr::new(node, NODE_PORT.1),
    );
    let mac = bed
        .cluster
        .netns("node/node2")?
        .get()
        .enter(|| Wire::open("eth0").map(|wire| wire.mac()))??;
    let outside = bed.cluster.fabric();
    let socket = outside.enter(|| UdpSocket::bind(from))??;
    socket.set_read_timeout(Some(WAIT))?;
    let wire = outside.enter(|| Wire::open("br0"))??;
    let before = by_xdp(bed)?;
    let mut buffer = [0; 64];
    for round in 0..ROUND {
        let text = format!("question {round}");
        wire.send(&frame((mac, wire.mac()), from, to, text.as_bytes())?)?;
        let (length, by) = socket
            .recv_from(&mut buffer)
            .with_context(|| format!("no answer to {text}"))?;
        ensure!(by == to, "{by} answered for {to}");
        let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
        ensure!(answer.ends_with(&text), "{answer:?} to {text:?}");
    }
    Ok(by_xdp(bed)? - before)
}

/// With the same answers by either way, and a change from one to the other.
fn a_node_port_is_answered_alike(bed: &Bed) -> Result<()> {
    start(bed)?;
    let node = bed.cluster.node_ip("node2")?;
    let result = (|| {
        for xdp in ["off", "generic", "auto"] {
            let states = agent(bed, xdp)?;
            ensure!(
                states
                    .iter()
                    .all(|state| (state == "generic") == (xdp == "generic")),
                "--xdp={xdp}: {states:?}"
            );
            let (tcp, udp) = NODE_PORT;
            for target in [Target::new(Tcp, node, tcp), Target::new(Udp, node, udp)] {
                bed.reaches("outside", target)
                    .with_context(|| xdp.to_owned())?;
            }
            let sent = ask(bed).with_context(|| format!("--xdp={xdp}"))?;
            ensure!(
                (sent > 0) == (xdp == "generic"),
                "--xdp={xdp}: {sent} of {ROUND} questions went the short way"
            );
        }
        Ok(())
    })();
    // As other suites expect it.
    bed.cluster.kill_agent("node2")?;
    bed.cluster.start_agent_with("node2", &[])?;
    bed.cluster.wait_agent("node2")?;
    result
}

both_families! {
    a_node_port_is_answered_alike,
}
