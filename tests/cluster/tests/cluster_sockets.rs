//! Socket load balancing of Pods and nodes, UDP flows that lose their backend, and what load
//! balancers are told.
//!
//! Processes that `ask` are in their node's cgroup; probes of the other suites are not, and have
//! their packets translated. A pulse is of the second kind.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Protocol::{Tcp, Udp},
    Target,
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
    workload::{
        ask::{Answer, Ask, Way},
        asker::Asker,
        pulse::{Pulse, opened_after},
        share::Share,
    },
};

const SERVICE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: $a}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 8080, targetPort: 80}
  - {name: dns, port: 53, targetPort: 81, protocol: UDP}
";

/// Enough for three backends to be chosen all, but once in ten thousand runs.
const TIMES: u32 = 30;

/// How soon flows have moved off a backend that goes.
const SETTLED: Duration = Duration::from_millis(1500);

fn web<'a>(name: &'a str, node: &'a str) -> Spec<'a> {
    Spec {
        name,
        node,
        labels: "app: web",
        ports: "{containerPort: 80}, {containerPort: 81, protocol: UDP}",
        ..Spec::default()
    }
}

fn client<'a>(name: &'a str, node: &'a str) -> Spec<'a> {
    Spec {
        namespace: "b",
        name,
        node,
        ..Spec::default()
    }
}

fn question(way: Way, ip: IpAddr) -> Ask {
    let port = if way == Way::Tcp { 8080 } else { 53 };
    Ask {
        way,
        address: SocketAddr::new(ip, port),
        count: TIMES,
        interval: 0,
        timeout: 500,
        mapped: false,
        fresh: false,
    }
}

fn ask(bed: &Bed, from: &str, ask: &Ask) -> Result<Vec<Answer>> {
    let answers = bed.cluster.ask(&bed.full(from), ask)?;
    ensure!(
        answers.len() == ask.count as usize,
        "{from}: {} answers",
        answers.len()
    );
    Ok(answers)
}

/// The names of those that answered; every answer must seem to come from the Service.
fn names(answers: &[Answer], service: SocketAddr) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for answer in answers {
        let name = answer
            .name
            .clone()
            .with_context(|| format!("no answer: {answer:?}"))?;
        ensure!(
            answer.peer == Some(service),
            "{name} is shown as {:?}, not as {service}",
            answer.peer
        );
        names.push(name);
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// As [`names`], asked for until nothing is left without an answer: a busy machine may be silent for
/// longer than a socket waits. Whatever else comes is final.
fn heard(bed: &Bed, from: &str, question: &Ask) -> Result<Vec<String>> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let (silent, said): (Vec<_>, Vec<_>) =
            ask(bed, from, question)?.into_iter().partition(|answer| {
                let error = answer.error.as_deref();
                matches!(error, Some("WouldBlock" | "TimedOut"))
            });
        let names = names(&said, question.address)?;
        // A socket keeps its backend; one in two is another's.
        ensure!(
            question.way == Way::Tcp || names.len() <= 1,
            "one socket is answered by {names:?}"
        );
        if silent.is_empty() {
            return Ok(names);
        }
        ensure!(
            Instant::now() < deadline,
            "{} of {} unanswered",
            silent.len(),
            question.count
        );
    }
}

/// Asks until exactly these Pods have answered.
fn answered_by(bed: &Bed, from: &str, question: &Ask, pods: &[&str]) -> Result<()> {
    let expected: Vec<_> = pods.iter().map(|name| bed.full(name)).collect();
    eventually(LIMIT, || {
        let answers = ask(bed, from, question)?;
        let names = names(&answers, question.address)
            .with_context(|| format!("{from}, {:?}", question.way))?;
        ensure!(
            names == expected,
            "{from}, {:?}: answered by {}",
            question.way,
            names.join(", ")
        );
        Ok(())
    })
}

fn sockets_of_pods_and_nodes_reach_services(bed: &Bed) -> Result<()> {
    bed.apply(SERVICE)?;
    bed.pods(&[
        web("web-1", "node1"),
        web("web-2", "node2"),
        client("near", "node1"),
    ])?;
    let ip = bed.service("a", "web")?;
    let everyone = ["a/web-1", "a/web-2"];
    for from in ["b/near", "node/node1", "node/node2"] {
        answered_by(bed, from, &question(Way::Tcp, ip), &everyone)?;
        for way in [Way::Connected, Way::Unconnected] {
            let chosen =
                heard(bed, from, &question(way, ip)).with_context(|| format!("{from}, {way:?}"))?;
            ensure!(chosen.len() == 1, "{from}, {way:?}: {chosen:?}");
        }
    }
    if ip.is_ipv4() {
        for way in [Way::Tcp, Way::Connected, Way::Unconnected] {
            let mapped = Ask {
                mapped: true,
                ..question(way, ip)
            };
            heard(bed, "b/near", &mapped).with_context(|| format!("mapped, {way:?}"))?;
        }
    }
    // A Pod that is its own backend.
    answered_by(bed, "a/web-1", &question(Way::Tcp, ip), &everyone)?;
    let status = bed.cluster.wait_agent("node1")?;
    ensure!(status.socket_lb == "all", "{}", status.socket_lb);
    ensure!(
        status
            .maps
            .iter()
            .any(|(name, used)| name.starts_with("SOCKETS") && used.entries > 0),
        "{:?}",
        status.maps
    );
    Ok(())
}

/// From one port, at once, to two Services over one backend and to the backend itself: each answer under
/// the address that was asked, whatever the sockets.
fn one_port_of_a_pod_reaches_two_services(bed: &Bed) -> Result<()> {
    bed.apply(SERVICE)?;
    bed.apply(&SERVICE.replace("name: web,", "name: again,"))?;
    bed.pods(&[
        web("web", "node1"),
        client("near", "node1"),
        client("far", "node2"),
    ])?;
    let services = [bed.service("a", "web")?, bed.service("a", "again")?];
    for from in ["b/near", "b/far"] {
        for (way, ports) in [
            (Way::Tcp, (8080, 80)),
            (Way::Connected, (53, 81)),
            (Way::Unconnected, (53, 81)),
        ] {
            for ip in services {
                answered_by(bed, from, &question(way, ip), &["a/web"])?;
            }
            let mut addresses: Vec<_> = services
                .iter()
                .map(|ip| SocketAddr::new(*ip, ports.0))
                .collect();
            addresses.push(SocketAddr::new(
                bed.cluster.pod_ip(&bed.full("a/web"))?,
                ports.1,
            ));
            // Whoever is asked first has the port as it is.
            for _ in 0..addresses.len() {
                addresses.rotate_left(1);
                let share = Share {
                    way,
                    addresses: addresses.clone(),
                    timeout: 2_000,
                };
                let answers = bed.cluster.share(&bed.full(from), &share)?;
                let peers: Vec<_> = answers.iter().filter_map(|answer| answer.peer).collect();
                ensure!(peers == addresses, "{from}, {way:?}: {answers:?}");
            }
        }
    }
    Ok(())
}

fn sockets_without_a_backend_are_refused(bed: &Bed) -> Result<()> {
    bed.apply(SERVICE)?;
    bed.pods(&[client("near", "node1")])?;
    let ip = bed.service("a", "web")?;
    for from in ["b/near", "node/node1"] {
        for way in [Way::Tcp, Way::Connected, Way::Unconnected] {
            // The ICMP answer to a datagram comes to a connected socket's next call.
            if way == Way::Unconnected && from == "b/near" {
                continue;
            }
            let once = Ask {
                count: 2,
                ..question(way, ip)
            };
            eventually(LIMIT, || {
                let answers = ask(bed, from, &once)?;
                ensure!(
                    answers[1].error.as_deref() == Some("ConnectionRefused"),
                    "{from}, {way:?}: {answers:?}"
                );
                Ok(())
            })?;
        }
    }
    bed.pods(&[web("web-1", "node2")])?;
    for from in ["b/near", "node/node1"] {
        answered_by(bed, from, &question(Way::Tcp, ip), &["a/web-1"])?;
    }
    Ok(())
}

fn policies_judge_the_backend_of_a_socket(bed: &Bed) -> Result<()> {
    bed.apply(SERVICE)?;
    bed.pods(&[
        web("web-1", "node1"),
        web("web-2", "node2"),
        client("near", "node1"),
    ])?;
    let ip = bed.service("a", "web")?;
    answered_by(
        bed,
        "b/near",
        &question(Way::Tcp, ip),
        &["a/web-1", "a/web-2"],
    )?;
    bed.apply(
        "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-http, namespace: $a}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{ports: [{protocol: TCP, port: 80}]}]
",
    )?;
    let datagrams = Ask {
        count: 2,
        timeout: 300,
        ..question(Way::Connected, ip)
    };
    eventually(LIMIT, || {
        for _ in 0..4 {
            let answers = ask(bed, "b/near", &datagrams)?;
            ensure!(answers.iter().all(|a| a.name.is_none()), "{answers:?}");
        }
        Ok(())
    })?;
    answered_by(
        bed,
        "b/near",
        &question(Way::Tcp, ip),
        &["a/web-1", "a/web-2"],
    )
}

/// One Pod serves, another one takes its place: flows to the first must go to the second at once,
/// from sockets of all kinds.
fn udp_flows_move_off_a_removed_backend(bed: &Bed) -> Result<()> {
    bed.apply(SERVICE)?;
    let spare = Spec {
        labels: "app: spare",
        ..web("web-2", "node1")
    };
    bed.pods(&[
        web("web-1", "node2"),
        spare,
        client("near", "node1"),
        client("far", "node2"),
    ])?;
    let ip = bed.service("a", "web")?;
    let service = Target::new(Udp, ip, 53);
    for from in ["b/near", "b/far"] {
        bed.reaches(from, service)?;
    }
    let pulses = ["b/near", "b/far"]
        .map(|from| Pulse::start(bed.cluster.netns(&bed.full(from))?.get(), service.address));
    let long = |way| Ask {
        interval: 10,
        timeout: 100,
        ..question(way, ip)
    };
    let asked = [
        ("b/near", Way::Connected),
        ("b/near", Way::Unconnected),
        ("node/node1", Way::Connected),
        ("node/node1", Way::Unconnected),
    ];
    let mut askers = Vec::new();
    for (from, way) in asked {
        askers.push(bed.cluster.keep_asking(&bed.full(from), &long(way))?);
    }
    for (asker, (from, way)) in askers.iter_mut().zip(asked) {
        let heard = asker.wait(LIMIT);
        heard.with_context(|| format!("{from}, {way:?}"))?;
    }
    thread::sleep(Duration::from_millis(300));
    // The second one is ready before the first one goes, and gets no flow before that.
    bed.kubectl("label pod web-2 -n $a app=web --overwrite")?;
    eventually(LIMIT, || {
        let names = "get endpointslices -n $a -o jsonpath={.items[*].endpoints[*].targetRef.name}";
        let names = bed.kubectl(names)?;
        ensure!(names.contains("web-2"), "{names}");
        Ok(())
    })?;
    // The API has taken it in when kubectl returns, which is slow to start.
    bed.kubectl("delete pod web-1 -n $a --wait=false")?;
    let event = Instant::now();
    bed.kubectl("wait pod web-1 -n $a --for=delete --timeout=60s")?;
    thread::sleep((3 * SETTLED).saturating_sub(event.elapsed()));
    let answers: Vec<_> = askers.into_iter().map(Asker::stop).collect();
    for (from, pulse) in ["b/near", "b/far"].into_iter().zip(pulses) {
        let beats = pulse?.stop()?;
        let after: Vec<_> = beats
            .iter()
            .copied()
            .filter(|beat| beat.sent > event + SETTLED)
            .collect();
        let answered = after.iter().filter(|beat| beat.answered).count();
        ensure!(
            answered * 10 >= after.len() * 9 && !after.is_empty(),
            "{from}: {answered} of {} beats answered; first after {:?}",
            after.len(),
            opened_after(&beats, event)
        );
    }
    for ((from, way), answers) in asked.into_iter().zip(answers) {
        let answers = answers.with_context(|| format!("{from}, {way:?}"))?;
        // Those at the ends may be lost as any other; `lost` has all of them.
        let mut answered = answers.iter().filter(|answer| answer.name.is_some());
        let first = answered.next().context("no answer at all")?;
        let last = answered.next_back().unwrap_or(first);
        ensure!(
            last.name == Some(bed.full("a/web-2")) && last.peer == Some(service.address),
            "{from}, {way:?}: at last {last:?}"
        );
        let lost = answers
            .iter()
            .filter(|answer| answer.name.is_none())
            .count();
        // Each one lost waits 0.1 s; the Pod's end takes its time too.
        ensure!(
            lost <= 12,
            "{from}, {way:?}: {lost} of {} lost",
            answers.len()
        );
        ensure!(
            first.name == Some(bed.full("a/web-1")),
            "{from}, {way:?}: at first {first:?}"
        );
    }
    let moved: u64 = ["node1", "node2"]
        .iter()
        .map(|node| Ok(bed.cluster.wait_agent(node)?.conntrack.moved))
        .sum::<Result<u64>>()?;
    ensure!(moved >= 2, "{moved} entries were moved");
    Ok(())
}

fn udp_flows_of_a_removed_port_end(bed: &Bed) -> Result<()> {
    bed.apply(SERVICE)?;
    bed.pods(&[web("web-1", "node1"), client("near", "node1")])?;
    let service = Target::new(Udp, bed.service("a", "web")?, 53);
    bed.reaches("b/near", service)?;
    let pulse = Pulse::start(
        bed.cluster.netns(&bed.full("b/near"))?.get(),
        service.address,
    )?;
    thread::sleep(Duration::from_millis(100));
    bed.apply(&SERVICE.replace(
        "  - {name: dns, port: 53, targetPort: 81, protocol: UDP}\n",
        "",
    ))?;
    let event = Instant::now();
    thread::sleep(Duration::from_millis(2500));
    let beats = pulse.stop()?;
    let answered = |from: Duration, to: Duration| {
        let within = |at: Instant| at > event + from && at < event + to;
        beats
            .iter()
            .filter(|beat| within(beat.sent) && beat.answered)
            .count()
    };
    ensure!(beats.iter().any(|beat| beat.answered), "it never ran");
    let late = answered(Duration::from_millis(1500), Duration::from_secs(9));
    ensure!(late == 0, "{late} answers through a port that is gone");
    bed.reaches("b/near", Target::new(Tcp, service.address.ip(), 8080))
}

const BALANCED: &str = "---
apiVersion: v1
kind: Service
metadata: {name: balanced, namespace: $a}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  healthCheckNodePort: PORT
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: 80}
";

/// The answer of a node to an outside client.
fn get(bed: &Bed, node: &str, port: u16, path: &str) -> Result<String> {
    let ip = bed.cluster.node_ip(node)?;
    let outside = bed.cluster.netns("outside")?;
    outside.get().enter(|| -> Result<String> {
        let address = SocketAddr::new(ip, port);
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))
            .with_context(|| format!("connect to {address}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?
}

fn load_balancers_are_told_where_backends_are(bed: &Bed) -> Result<()> {
    // Both families' tests run on nodes of their own.
    let port = 31_987;
    bed.apply(&BALANCED.replace("PORT", &port.to_string()))?;
    bed.pods(&[web("web-1", "node1"), web("web-2", "node1")])?;
    let says = |node: &str, parts: &[&str]| {
        eventually(LIMIT, || {
            let answer = get(bed, node, port, "/")?;
            ensure!(
                parts.iter().all(|part| answer.contains(part)),
                "{node}: {parts:?} is not in {answer}"
            );
            Ok(())
        })
    };
    let one = [
        "200 OK",
        "\"localEndpoints\":2",
        "-weight: 2",
        "\"name\":\"balanced\"",
    ];
    says("node1", &one)?;
    says("node2", &["503 ", "\"localEndpoints\":0"])?;
    bed.pods(&[web("web-3", "node2")])?;
    says("node2", &["200 OK", "\"localEndpoints\":1"])?;
    bed.kubectl("delete pod web-1 web-2 -n $a")?;
    says("node1", &["503 ", "\"localEndpoints\":0"])?;
    for path in ["/healthz", "/livez"] {
        let answer = get(bed, "node1", 10_256, path)?;
        ensure!(
            answer.contains("200 OK") && answer.contains("\"nodeEligible\":true"),
            "{path}: {answer}"
        );
    }
    bed.kubectl("delete service balanced -n $a")?;
    eventually(LIMIT, || match get(bed, "node1", port, "/") {
        Ok(answer) => bail!("the port is open still: {answer}"),
        Err(_) => Ok(()),
    })
}

both_families!(
    sockets_of_pods_and_nodes_reach_services,
    one_port_of_a_pod_reaches_two_services,
    sockets_without_a_backend_are_refused,
    policies_judge_the_backend_of_a_socket,
    udp_flows_move_off_a_removed_backend,
    udp_flows_of_a_removed_port_end,
    load_balancers_are_told_where_backends_are,
);
