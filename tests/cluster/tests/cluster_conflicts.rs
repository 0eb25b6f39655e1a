//! Ports of the node that two ask for: one has it, the other is told, in an Event and in the status.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::{Result, ensure};
use hachi_cluster::{
    Outcome,
    Protocol::{self, Http, Sctp, Udp},
    Target,
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
};

/// A load balancer that has a Service take a port for its questions. The API would not give one port
/// twice; it is told so by who writes the manifest.
fn checked(name: &str, port: u16) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: $a}}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  healthCheckNodePort: {port}
  selector: {{app: web}}
  ports: [{{name: http, port: 80}}]
"
    )
}

fn on_node(name: &str, protocol: &str, port: u16, target: u16) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: $a}}
spec:
  type: NodePort
  selector: {{app: web}}
  ports: [{{name: x, port: 80, targetPort: {target}, protocol: {protocol}, nodePort: {port}}}]
"
    )
}

/// The status names the loser and the holder, and so does an Event that `kubectl describe` shows.
fn is_told(bed: &Bed, kind: &str, loser: &str, parts: &[&str]) -> Result<()> {
    let has = |text: &str| parts.iter().all(|part| text.contains(part));
    eventually(LIMIT, || {
        let problems = bed.cluster.wait_agent("node1")?.problems;
        ensure!(problems.iter().any(|p| has(p)), "{parts:?}: {problems:?}");
        Ok(())
    })?;
    eventually(LIMIT, || {
        let told = bed.kubectl(&format!("describe {kind} {loser} -n $a"))?;
        let is_event = |line: &str| line.contains("PortTaken") && line.contains("hachi-agent");
        ensure!(
            told.lines().any(|line| is_event(line) && has(line)),
            "{told}"
        );
        Ok(())
    })
}

fn is_told_no_more(bed: &Bed, part: &str) -> Result<()> {
    eventually(LIMIT, || {
        let problems = bed.cluster.wait_agent("node1")?.problems;
        ensure!(!problems.iter().any(|p| p.contains(part)), "{problems:?}");
        Ok(())
    })
}

fn answered_by(bed: &Bed, from: &str, protocol: Protocol, port: u16, pod: &str) -> Result<()> {
    let to = Target::new(protocol, bed.cluster.node_ip("node1")?, port);
    let expected = bed.full(pod);
    eventually(LIMIT, || {
        let outcome = bed.probe(from, to)?;
        ensure!(
            outcome == Outcome::Answered(expected.clone()),
            "{from} -> {to}: {outcome}, not {expected}"
        );
        Ok(())
    })
}

/// The Service keeps its port, whichever came first; the Pod gets it when the Service has gone.
fn host_ports_give_way_to_services(bed: &Bed) -> Result<()> {
    let pod = |name, labels, ports| Spec {
        name,
        node: "node1",
        labels,
        ports,
        ..Spec::default()
    };
    let ports = "{containerPort: 80, hostPort: 30701}, \
                 {containerPort: 80, hostPort: 30702, protocol: UDP}, \
                 {containerPort: 81, hostPort: 30703, protocol: SCTP}";
    let web = "{containerPort: 80}, {containerPort: 81, protocol: SCTP}";
    bed.pods(&[pod("web", "app: web", web), pod("thief", "", ports)])?;
    let all = [
        ("TCP", Http, 30_701, 80),
        ("UDP", Udp, 30_702, 80),
        ("SCTP", Sctp, 30_703, 81),
    ];
    for (.., protocol, port, _) in all {
        answered_by(bed, "outside", protocol, port, "a/thief")?;
    }
    for (name, _, port, target) in all {
        bed.apply(&on_node(&name.to_lowercase(), name, port, target))?;
    }
    for (name, protocol, port, _) in all {
        answered_by(bed, "outside", protocol, port, "a/web")?;
        let holder = bed.full(&format!("a/{}", name.to_lowercase()));
        let port = format!("{port}/{name}");
        is_told(bed, "pod", "thief", &[&port, &holder, &bed.full("a/thief")])?;
    }
    bed.kubectl("delete service tcp udp sctp -n $a")?;
    for (.., protocol, port, _) in all {
        answered_by(bed, "outside", protocol, port, "a/thief")?;
    }
    is_told_no_more(bed, "thief")
}

/// What a load balancer asks is answered, and not translated for somebody else.
fn health_checks_keep_their_port(bed: &Bed) -> Result<()> {
    let pod = |name, labels, ports| Spec {
        name,
        node: "node1",
        labels,
        ports,
        ..Spec::default()
    };
    bed.pods(&[
        pod("web", "app: web", ""),
        pod("thief", "", "{containerPort: 80, hostPort: 30704}"),
    ])?;
    bed.apply(&checked("checked", 30_704))?;
    let node = SocketAddr::new(bed.cluster.node_ip("node1")?, 30_704);
    eventually(LIMIT, || {
        let answer = bed.cluster.fabric().enter(|| get(node))??;
        ensure!(answer.contains("\"localEndpoints\":1"), "{answer}");
        Ok(())
    })?;
    let holder = format!("healthCheckNodePort of Service {}", bed.full("a/checked"));
    is_told(bed, "pod", "thief", &["30704/TCP", &holder])?;
    bed.kubectl("delete service checked -n $a")?;
    answered_by(bed, "outside", Http, 30_704, "a/thief")
}

fn get(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Has the agent look at its node, which it does by itself twice a minute, and when an address changes.
fn look_until(bed: &Bed, holds: impl Fn(&[String]) -> bool) -> Result<()> {
    const ADDRESS: &str = "192.0.2.99/32";
    eventually(LIMIT, || {
        for change in ["add", "del"] {
            let arguments = ["address", change, ADDRESS, "dev", "lo"];
            bed.cluster.exec("node/node1", "ip", &arguments)?;
        }
        std::thread::sleep(Duration::from_millis(200));
        let problems = bed.cluster.wait_agent("node1")?.problems;
        ensure!(holds(&problems), "{problems:?}");
        Ok(())
    })
}

/// A program of the node is not robbed in silence: the Service's users are told.
fn programs_of_the_node_are_not_robbed_in_silence(bed: &Bed) -> Result<()> {
    bed.pods(&[Spec {
        name: "web",
        node: "node1",
        labels: "app: web",
        ..Spec::default()
    }])?;
    let node = bed.cluster.netns("node/node1")?;
    let ip = bed.cluster.node_ip("node1")?;
    let tcp = node.get().enter(|| TcpListener::bind((ip, 30_705)))??;
    let udp = node.get().enter(|| UdpSocket::bind((ip, 30_706)))??;
    for (name, protocol, port) in [("tcp", "TCP", 30_705), ("udp", "UDP", 30_706)] {
        bed.apply(&on_node(name, protocol, port, 80))?;
        let port = format!("{port}/{protocol}");
        look_until(bed, |problems| problems.iter().any(|p| p.contains(&port)))?;
        is_told(bed, "service", name, &["a program of this node", &port])?;
    }
    drop((tcp, udp));
    look_until(bed, |problems| !problems.iter().any(|p| p.contains("3070")))
}

/// Two Services of one external address.
fn services_do_not_share_an_address(bed: &Bed) -> Result<()> {
    let ip = if bed.cluster.node_ip("node1")?.is_ipv4() {
        "203.0.113.99"
    } else {
        "2001:db8:2::99"
    };
    for name in ["first", "second"] {
        bed.apply(&format!(
            "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: $a}}
spec:
  selector: {{app: web}}
  externalIPs: ['{ip}']
  ports: [{{name: x, port: 80, protocol: UDP}}]
"
        ))?;
    }
    let holder = bed.full("a/first");
    is_told(bed, "service", "second", &["80/UDP", ip, &holder])?;
    bed.kubectl("delete service first -n $a")?;
    is_told_no_more(bed, ip)
}

both_families!(
    host_ports_give_way_to_services,
    health_checks_keep_their_port,
    programs_of_the_node_are_not_robbed_in_silence,
    services_do_not_share_an_address,
);
