//! ClusterIPs: every backend on both nodes, over TCP and UDP, and endpoints that come and go.

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Protocol::{Http, Tcp, Udp},
    READY_ANNOTATION, Target,
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
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

both_families!(
    every_backend_answers_on_every_node,
    endpoints_follow_the_pods,
    without_endpoints_nobody_answers,
    a_pod_reaches_itself_through_its_service,
    policies_judge_the_backend_behind_the_service,
    a_removed_service_answers_no_more,
    a_service_of_another_name_shares_the_pods,
);
