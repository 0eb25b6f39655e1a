//! ClusterIPs: every backend on both nodes, over TCP and UDP, and endpoints that come and go.

use std::{
    net::{SocketAddr, UdpSocket},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Netns,
    Protocol::{Http, Tcp, Udp},
    READY_ANNOTATION, Target,
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
    workload::probe::unspecified,
};

const SERVICE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: $a}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 8080, targetPort: http}
  - {name: dns, port: 53, targetPort: 81, protocol: UDP}
";

/// Enough for three backends to be chosen all, but once in ten thousand runs.
const TIMES: usize = 30;

fn web<'a>(name: &'a str, node: &'a str) -> Spec<'a> {
    let ports = "{name: http, containerPort: 80}, {name: dns, containerPort: 81, protocol: UDP}";
    Spec {
        name,
        node,
        labels: "app: web",
        ports,
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

fn start(bed: &Bed) -> Result<[Target; 2]> {
    bed.apply(SERVICE)?;
    bed.pods(&[
        web("web-1", "node1"),
        web("web-2", "node2"),
        web("web-3", "node2"),
        client("near", "node1"),
        client("far", "node2"),
    ])?;
    let ip = bed.service("a", "web")?;
    Ok([Target::new(Tcp, ip, 8080), Target::new(Udp, ip, 53)])
}

/// Waits until exactly these Pods answer, and nothing else happens.
fn answered_by(bed: &Bed, from: &str, to: Target, names: &[&str]) -> Result<()> {
    let expected: Vec<_> = names.iter().map(|name| bed.full(name)).collect();
    eventually(LIMIT, || {
        let answered = bed.backends(from, to, TIMES)?;
        ensure!(
            answered == expected,
            "{from} -> {to}: answered by {}",
            answered.join(", ")
        );
        Ok(())
    })
}

fn every_backend_answers_on_every_node(bed: &Bed) -> Result<()> {
    let targets = start(bed)?;
    for from in ["b/near", "b/far"] {
        for to in targets {
            answered_by(bed, from, to, &["a/web-1", "a/web-2", "a/web-3"])?;
        }
        bed.reaches(
            from,
            Target {
                protocol: Http,
                ..targets[0]
            },
        )?;
    }
    Ok(())
}

fn endpoints_follow_the_pods(bed: &Bed) -> Result<()> {
    let targets = start(bed)?;
    for to in targets {
        answered_by(bed, "b/near", to, &["a/web-1", "a/web-2", "a/web-3"]).context("at first")?;
    }
    bed.kubectl("delete pod web-2 -n $a")?;
    for to in targets {
        answered_by(bed, "b/near", to, &["a/web-1", "a/web-3"]).context("after a deletion")?;
    }
    bed.pods(&[web("web-4", "node1")])?;
    for to in targets {
        answered_by(bed, "b/near", to, &["a/web-1", "a/web-3", "a/web-4"])
            .context("after a new one")?;
    }
    bed.kubectl(&format!(
        "annotate pod web-1 -n $a {READY_ANNOTATION}=false"
    ))?;
    bed.kubectl("label pod web-3 -n $a app=other --overwrite")?;
    for to in targets {
        answered_by(bed, "b/near", to, &["a/web-4"])
            .context("after one is not ready and one is not selected")?;
    }
    Ok(())
}

fn without_endpoints_nobody_answers(bed: &Bed) -> Result<()> {
    let [to, _] = start(bed)?;
    bed.reaches("b/near", to)?;
    bed.kubectl("delete pod -l app=web -n $a")?;
    bed.loses("b/near", to)?;
    bed.pods(&[web("web-5", "node2")])?;
    bed.reaches("b/near", to)
}

fn a_pod_reaches_itself_through_its_service(bed: &Bed) -> Result<()> {
    bed.apply(SERVICE)?;
    bed.pods(&[web("web-1", "node1")])?;
    let ip = bed.service("a", "web")?;
    for to in [Target::new(Tcp, ip, 8080), Target::new(Udp, ip, 53)] {
        answered_by(bed, "a/web-1", to, &["a/web-1"])?;
    }
    Ok(())
}

fn policies_judge_the_backend_behind_the_service(bed: &Bed) -> Result<()> {
    let [tcp, udp] = start(bed)?;
    bed.apply(
        "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-http, namespace: $a}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{ports: [{protocol: TCP, port: http}]}]
",
    )?;
    // The port that counts is the Pod's, 80, not the Service's.
    for from in ["b/near", "b/far"] {
        bed.loses(from, udp)?;
        answered_by(bed, from, tcp, &["a/web-1", "a/web-2", "a/web-3"])?;
    }
    bed.apply(
        "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: egress, namespace: $b}
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress: [{ports: [{protocol: TCP, port: 8080}]}]
",
    )?;
    bed.loses("b/near", tcp)
        .context("egress allows the Service's port, which is not the Pod's")
}

fn a_removed_service_answers_no_more(bed: &Bed) -> Result<()> {
    let targets = start(bed)?;
    for to in targets {
        bed.reaches("b/far", to)?;
    }
    bed.kubectl("delete service web -n $a")?;
    for to in targets {
        bed.loses("b/far", to)?;
    }
    Ok(())
}

fn a_service_of_another_name_shares_the_pods(bed: &Bed) -> Result<()> {
    let [first, _] = start(bed)?;
    bed.apply(
        &SERVICE
            .replace("name: web,", "name: other,")
            .replace("8080", "9090"),
    )?;
    let second = Target::new(Tcp, bed.service("a", "other")?, 9090);
    for to in [first, second] {
        answered_by(bed, "b/near", to, &["a/web-1", "a/web-2", "a/web-3"])?;
    }
    let wrong = Target::new(Tcp, second.address.ip(), 8080);
    match bed.probe("b/near", wrong)?.name() {
        Some(name) => bail!("{name} answers on a port that the Service does not have"),
        None => Ok(()),
    }
}

/// Two Services over the same Pods; the second keeps its clients. Port 54 leads to the test's own
/// sockets, which nobody has to answer from.
const SPREAD: &str = "---
apiVersion: v1
kind: Service
metadata: {name: even, namespace: $a}
spec:
  selector: {app: web}
  ports:
  - {name: dns, port: 53, targetPort: 81, protocol: UDP}
  - {name: count, port: 54, targetPort: 82, protocol: UDP}
---
apiVersion: v1
kind: Service
metadata: {name: sticky, namespace: $a}
spec:
  selector: {app: web}
  sessionAffinity: ClientIP
  ports:
  - {name: dns, port: 53, targetPort: 81, protocol: UDP}
  - {name: count, port: 54, targetPort: 82, protocol: UDP}
";

/// Datagrams that wait at all backends, before the next are sent.
const BATCH: u16 = 100;

/// Sends one datagram from each of so many ports; returns how many every backend got.
fn spread(from: &Netns, to: SocketAddr, flows: u16, backends: &[UdpSocket]) -> Result<Vec<u32>> {
    let mut got = vec![0; backends.len()];
    let mut count = |wanted: u32| -> Result<()> {
        let until = Instant::now() + LIMIT;
        let mut buffer = [0; 16];
        while got.iter().sum::<u32>() < wanted {
            for (socket, got) in backends.iter().zip(&mut got) {
                while socket.recv_from(&mut buffer).is_ok() {
                    *got += 1;
                }
            }
            ensure!(Instant::now() < until, "{got:?} of {wanted} datagrams");
        }
        Ok(())
    };
    // Out of the range that flows whose own port is taken get theirs from.
    let ports: Vec<u16> = (1_024..1_024 + flows).collect();
    let mut sent = 0;
    for ports in ports.chunks(BATCH.into()) {
        from.enter(|| {
            ports.iter().try_for_each(|port| -> Result<()> {
                let any = unspecified(to).ip();
                UdpSocket::bind((any, *port))?.send_to(b"one", to)?;
                Ok(())
            })
        })??;
        sent += u32::try_from(ports.len())?;
        count(sent)?;
    }
    Ok(got)
}

/// A hundred thousand flows of four clients to ten backends: each gets its tenth, within 5%. With session
/// affinity all flows of a client go to one.
fn a_hundred_thousand_flows_are_even(bed: &Bed) -> Result<()> {
    const FLOWS: u16 = 25_000;
    bed.apply(SPREAD)?;
    let names: Vec<_> = (0..10).map(|n| format!("web-{n}")).collect();
    let node = |n: usize| ["node1", "node2"][n % 2];
    let mut pods: Vec<_> = (0..10).map(|n| web(&names[n], node(n))).collect();
    let clients = ["b/near", "b/near-too", "b/far", "b/far-too"];
    for (n, name) in clients.into_iter().enumerate() {
        pods.push(client(&name[2..], node(n / 2)));
    }
    bed.pods(&pods)?;
    let mut everyone: Vec<_> = names
        .iter()
        .map(|name| bed.full(&format!("a/{name}")))
        .collect();
    everyone.sort_unstable();
    let mut backends = Vec::new();
    for name in &everyone {
        let at = SocketAddr::new(bed.cluster.pod_ip(name)?, 82);
        let socket = bed
            .cluster
            .netns(name)?
            .get()
            .enter(|| UdpSocket::bind(at))??;
        socket.set_nonblocking(true)?;
        backends.push(socket);
    }
    let even = bed.service("a", "even")?;
    let sticky = bed.service("a", "sticky")?;
    let mut all = vec![0; backends.len()];
    for from in clients {
        eventually(LIMIT, || {
            let answered = bed.backends(from, Target::new(Udp, even, 53), 150)?;
            ensure!(answered == everyone, "{from}: {answered:?}");
            Ok(())
        })?;
        let netns = bed.cluster.netns(&bed.full(from))?;
        let got = spread(netns.get(), SocketAddr::new(even, 54), FLOWS, &backends)?;
        for (all, got) in all.iter_mut().zip(got) {
            *all += got;
        }
        bed.reaches(from, Target::new(Udp, sticky, 53))?;
        let got = spread(netns.get(), SocketAddr::new(sticky, 54), 1_000, &backends)?;
        let chosen = got.iter().filter(|got| **got > 0).count();
        ensure!(
            chosen == 1,
            "{from}: one client at {chosen} backends: {got:?}"
        );
    }
    println!("each backend has {all:?}");
    let (least, most) = (9_500, 10_500);
    ensure!(
        all.iter().all(|got| (least..=most).contains(got)),
        "not within 5%: {all:?}"
    );
    Ok(())
}

both_families!(
    a_hundred_thousand_flows_are_even,
    every_backend_answers_on_every_node,
    endpoints_follow_the_pods,
    without_endpoints_nobody_answers,
    a_pod_reaches_itself_through_its_service,
    policies_judge_the_backend_behind_the_service,
    a_removed_service_answers_no_more,
    a_service_of_another_name_shares_the_pods,
);
