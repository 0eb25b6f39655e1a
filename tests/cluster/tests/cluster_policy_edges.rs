//! Who counts as what to a policy: Pods that have ended, addresses that are used again, Pods on
//! their node's network, Pods that reach themselves, hosts outside; and what is denied because it
//! cannot be known.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Cluster, Family, Options, PHASE_ANNOTATION,
    Protocol::{self, Tcp, Udp},
    Target,
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
    workload::ask::{Ask, Way},
};

fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{name: {name}, namespace: ${namespace}}}\nspec: {spec}\n"
    )
}

const DENY: &str = "{podSelector: {}, policyTypes: [Ingress, Egress]}";

fn pod<'a>(namespace: &'a str, name: &'a str, node: &'a str, labels: &'a str) -> Spec<'a> {
    Spec {
        namespace,
        name,
        node,
        labels,
        ..Spec::default()
    }
}

/// An address as a block.
fn single(ip: IpAddr) -> String {
    format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })
}

/// A Pod of namespace `b` on node1 with an address of its choice.
fn with_address(bed: &Bed, name: &str, labels: &str, ip: IpAddr) -> Result<()> {
    bed.apply(&format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: $b\n  \
         labels: {{{labels}}}\n  annotations: {{hachi.dev/ip-addresses: '{ip}'}}\n\
         spec: {{nodeName: node1, containers: [{{name: main, image: server}}]}}\n"
    ))?;
    eventually(LIMIT, || {
        let found = bed.cluster.pod_ip(&bed.full(&format!("b/{name}")))?;
        ensure!(found == ip, "{found}, not {ip}");
        Ok(())
    })
}

/// An address that the store of node1 gives nobody of itself for long.
fn spare(bed: &Bed, number: u8) -> Result<IpAddr> {
    let family = bed.cluster.options().family;
    let block = family.node_cidrs(0);
    let base = block.first().context("no block")?.addr();
    Ok(match base {
        IpAddr::V4(base) => IpAddr::V4((u32::from(base) + u32::from(number)).into()),
        IpAddr::V6(base) => IpAddr::V6((u128::from(base) + u128::from(number)).into()),
    })
}

/// The object of a Pod that has ended stays, with its address and labels; the address is another's.
fn an_ended_pod_is_nobody(bed: &Bed) -> Result<()> {
    bed.pods(&[pod("a", "server", "node2", "")])?;
    bed.apply(&policy(
        "a",
        "friends",
        "{podSelector: {}, policyTypes: [Ingress],
          ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {friend: 'yes'}}}]}]}",
    ))?;
    let server = bed.target(Tcp, "a/server", 80)?;
    for (number, phase) in [(200, "Succeeded"), (201, "Failed")] {
        let ip = spare(bed, number)?;
        let (job, next) = (format!("job-{number}"), format!("next-{number}"));
        with_address(bed, &job, "friend: 'yes'", ip)?;
        bed.reaches(&format!("b/{job}"), server)
            .context("while it runs")?;
        bed.kubectl(&format!(
            "annotate pod {job} -n $b {PHASE_ANNOTATION}={phase}"
        ))?;
        eventually(LIMIT, || {
            let told = bed.kubectl(&format!(
                "get pod {job} -n $b -o jsonpath={{.status.phase}}"
            ))?;
            ensure!(told == phase, "{told}");
            Ok(())
        })?;
        // Its address, and none of its rights.
        with_address(bed, &next, "", ip)?;
        bed.loses(&format!("b/{next}"), server).context(phase)?;
        for _ in 0..3 {
            let outcome = bed.probe(&format!("b/{next}"), server)?;
            ensure!(!outcome.answered(), "{phase}: {outcome}");
        }
        let told = bed.kubectl(&format!(
            "get pod {job} -n $b -o jsonpath={{.status.podIP}}"
        ))?;
        ensure!(told.is_empty() || told == ip.to_string(), "{told}");
        bed.kubectl(&format!("label pod {next} -n $b friend=yes"))?;
        bed.reaches(&format!("b/{next}"), server)?;
        // Nor is it selected: what isolates the ended one does not isolate its successor.
        bed.apply(&policy(
            "b",
            "ended",
            &format!(
                "{{podSelector: {{matchLabels: {{ended: '{number}'}}}}, policyTypes: [Ingress]}}"
            ),
        ))?;
        bed.kubectl(&format!("label pod {job} -n $b ended={number}"))?;
        let to = bed.target(Tcp, &format!("b/{next}"), 80)?;
        for _ in 0..3 {
            bed.reaches("a/server", to)?;
        }
        bed.kubectl(&format!("delete pod {job} {next} -n $b"))?;
    }
    Ok(())
}

/// One who gets an address gets neither the connections of who had it, nor their answers.
fn a_reused_address_inherits_nothing(bed: &Bed) -> Result<()> {
    const PORT: u16 = 5_353;
    bed.pods(&[pod("a", "near", "node1", ""), pod("a", "far", "node2", "")])?;
    let friends = policy(
        "a",
        "friends",
        "{podSelector: {}, policyTypes: [Ingress],
          ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {friend: 'yes'}}}]}]}",
    );
    bed.apply(&friends)?;
    bed.apply(&policy(
        "b",
        "shy",
        "{podSelector: {matchLabels: {shy: 'yes'}}, policyTypes: [Ingress]}",
    ))?;
    let ip = spare(bed, 210)?;
    let socket = |pod: &str| -> Result<UdpSocket> {
        let any = if ip.is_ipv4() { "0.0.0.0" } else { "::" };
        let any: IpAddr = any.parse()?;
        let netns = bed.cluster.netns(&bed.full(pod))?;
        let socket = netns.get().enter(|| UdpSocket::bind((any, PORT)))??;
        socket.set_read_timeout(Some(Duration::from_millis(400)))?;
        Ok(socket)
    };
    let comes = |socket: &UdpSocket| socket.recv_from(&mut [0; 64]).is_ok();
    with_address(bed, "old", "friend: 'yes'", ip)?;
    let old = socket("b/old")?;
    let mut servers = Vec::new();
    for name in ["a/near", "a/far"] {
        bed.reaches("b/old", bed.target(Udp, name, 80)?)?;
        let server = socket(name)?;
        let address = SocketAddr::new(bed.cluster.pod_ip(&bed.full(name))?, PORT);
        old.send_to(b"hello", address)?;
        ensure!(comes(&server), "the first datagram to {name}");
        server.send_to(b"answer", (ip, PORT))?;
        ensure!(comes(&old), "the answer of {name}");
        servers.push((name, server, address));
    }
    drop(old);
    bed.kubectl("delete pod old -n $b")?;
    with_address(bed, "new", "shy: 'yes'", ip)?;
    eventually(LIMIT, || {
        match bed.probe("a/near", Target::new(Udp, ip, 80))? {
            outcome if outcome.answered() => bail!("the new Pod is not isolated yet"),
            _ => Ok(()),
        }
    })?;
    let new = socket("b/new")?;
    // It did not ask, whether it might have or not.
    for policies in [true, false] {
        if !policies {
            bed.kubectl("delete networkpolicy friends -n $a")?;
            bed.reaches("b/new", bed.target(Udp, "a/far", 80)?)?;
        }
        for (name, server, _) in &servers {
            server.send_to(b"late", (ip, PORT))?;
            ensure!(!comes(&new), "an answer of {name} to who was there before");
        }
    }
    bed.apply(&friends)?;
    for (name, server, address) in &servers {
        bed.loses("b/new", bed.target(Udp, name, 80)?)?;
        new.send_to(b"hello", address)?;
        ensure!(!comes(server), "as the one before, to {name}");
    }
    bed.kubectl("delete networkpolicy friends -n $a")?;
    for (name, server, address) in &servers {
        bed.reaches("b/new", bed.target(Udp, name, 80)?)?;
        new.send_to(b"hello", address)?;
        ensure!(comes(server), "its own, to {name}");
        server.send_to(b"answer", (ip, PORT))?;
        ensure!(comes(&new), "its own answer, of {name}");
    }
    Ok(())
}

/// A Pod on its node's network is the node: no selector finds it, no policy selects it.
fn a_pod_on_the_hosts_network_is_its_node(bed: &Bed) -> Result<()> {
    let port = if bed.cluster.options().family == Family::V4 {
        8_091
    } else {
        8_092
    };
    bed.apply(&format!(
        "---\napiVersion: v1\nkind: Pod\n\
         metadata: {{name: host, namespace: $a, labels: {{friend: 'yes'}}}}\n\
         spec: {{nodeName: node2, hostNetwork: true, containers: [{{name: main, image: server, \
         ports: [{{containerPort: {port}}}]}}]}}\n"
    ))?;
    bed.pods(&[
        pod("a", "server", "node1", "role: server"),
        pod("a", "same", "node2", "role: server"),
        pod("b", "client", "node1", ""),
    ])?;
    let host = bed.cluster.node_ip("node2")?;
    ensure!(bed.cluster.pod_ip(&bed.full("a/host"))? == host);
    let server = bed.target(Tcp, "a/server", 80)?;
    let same = bed.target(Tcp, "a/same", 80)?;
    bed.reaches("a/host", server)?;
    bed.apply(&policy(
        "a",
        "deny",
        "{podSelector: {}, policyTypes: [Ingress]}",
    ))?;
    bed.apply(&policy(
        "a",
        "friends",
        "{podSelector: {matchLabels: {role: server}}, policyTypes: [Ingress],
          ingress: [{from: [{podSelector: {matchLabels: {friend: 'yes'}}}]}]}",
    ))?;
    bed.loses("a/host", server)
        .context("its labels count for nothing")?;
    bed.reaches("a/host", same)
        .context("but its own node's Pods it reaches")?;
    bed.reaches("b/client", Target::new(Tcp, host, port))
        .context("no policy selects it")?;
    bed.apply(&policy(
        "a",
        "node",
        &format!(
            "{{podSelector: {{matchLabels: {{role: server}}}}, policyTypes: [Ingress],
               ingress: [{{from: [{{ipBlock: {{cidr: '{}'}}}}]}}]}}",
            single(host)
        ),
    ))?;
    bed.reaches("a/host", server).context("by its address")?;
    // To it, as a peer of egress.
    bed.apply(&policy(
        "b",
        "egress",
        "{podSelector: {}, policyTypes: [Egress],
          egress: [{to: [{namespaceSelector: {}, podSelector: {}}]}]}",
    ))?;
    bed.loses("b/client", Target::new(Tcp, host, port))
        .context("no selector finds it")?;
    bed.apply(&policy(
        "b",
        "egress",
        &format!(
            "{{podSelector: {{}}, policyTypes: [Egress], egress: [{{to: [{{ipBlock: {{cidr: '{}'}}}}]}}]}}",
            single(host)
        ),
    ))?;
    bed.reaches("b/client", Target::new(Tcp, host, port))
        .context("its block does")
}

/// A Pod is its own peer under every NetworkPolicy, by packets and by sockets.
fn an_isolated_pod_reaches_itself_through_its_service(bed: &Bed) -> Result<()> {
    bed.apply(
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: $a}\nspec:\n  \
         selector: {app: web}\n  ports:\n  - {name: t, port: 8080, targetPort: 80}\n  \
         - {name: u, port: 8080, targetPort: 80, protocol: UDP}\n",
    )?;
    bed.pods(&[
        pod("a", "web", "node1", "app: web"),
        pod("b", "client", "node1", ""),
    ])?;
    let service = |protocol: Protocol| -> Result<Target> {
        Ok(Target::new(protocol, bed.service("a", "web")?, 8080))
    };
    for protocol in [Tcp, Udp] {
        bed.reaches("b/client", service(protocol)?)?;
    }
    bed.apply(&policy("a", "deny", DENY))?;
    bed.loses("b/client", service(Tcp)?)?;
    let own = bed.full("a/web");
    for protocol in [Tcp, Udp] {
        for to in [service(protocol)?, bed.target(protocol, "a/web", 80)?] {
            bed.reaches("a/web", to)
                .with_context(|| format!("by packets to {to}"))?;
            let ways = if protocol == Tcp {
                vec![Way::Tcp]
            } else {
                vec![Way::Connected, Way::Unconnected]
            };
            for way in ways {
                let ask = Ask {
                    way,
                    address: to.address,
                    count: 3,
                    interval: 0,
                    // Every question has an answer, which a busy machine may be late with.
                    timeout: 5_000,
                    mapped: false,
                    fresh: false,
                };
                for answer in bed.cluster.ask(&own, &ask)? {
                    ensure!(
                        answer.name.as_deref() == Some(&own),
                        "{way:?} to {to}: {answer:?}"
                    );
                    ensure!(
                        answer.peer == Some(to.address),
                        "{way:?} to {to}: {answer:?}"
                    );
                }
            }
        }
    }
    // Nothing else is open to it, or it to anybody.
    bed.loses("a/web", bed.target(Tcp, "b/client", 80)?)
}

/// What comes from outside is judged by the address that it has at the Pod, on the Pod's own port: the
/// client's where its own node took it in, a node's where another one passed it on.
fn a_client_outside_is_judged_behind_the_service(bed: &Bed) -> Result<()> {
    let v4 = bed.cluster.options().family == Family::V4;
    let (cluster, local) = if v4 {
        (30_191, 30_192)
    } else {
        (30_193, 30_194)
    };
    for (name, policy, port) in [("cluster", "Cluster", cluster), ("local", "Local", local)] {
        bed.apply(&format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: $a}}\nspec:\n  \
             type: NodePort\n  externalTrafficPolicy: {policy}\n  selector: {{app: web}}\n  ports:\n  \
             - {{name: t, port: 8080, targetPort: 80, nodePort: {port}}}\n  \
             - {{name: u, port: 8080, targetPort: 80, nodePort: {port}, protocol: UDP}}\n"
        ))?;
    }
    bed.pods(&[
        pod("a", "web", "node1", "app: web"),
        pod("b", "far", "node2", ""),
    ])?;
    let family = bed.cluster.options().family;
    let client = family
        .fabric()
        .first()
        .copied()
        .context("no host outside")?;
    let (here, there) = (bed.cluster.node_ip("node1")?, bed.cluster.node_ip("node2")?);
    let near = [(here, cluster), (here, local)];
    let passed_on = [(there, cluster)];
    let check = |asked: &[(IpAddr, u16)], expected: bool| {
        for (node, port) in asked {
            for protocol in [Tcp, Udp] {
                let to = Target::new(protocol, *node, *port);
                if expected {
                    bed.reaches("outside", to)?;
                } else {
                    bed.loses("outside", to)?;
                }
            }
        }
        anyhow::Ok(())
    };
    let allow = |from: &str, port: u16| {
        let from = if from.is_empty() {
            String::new()
        } else {
            format!("from: [{from}], ")
        };
        bed.apply(&policy(
            "a",
            "web",
            &format!(
                "{{podSelector: {{}}, policyTypes: [Ingress], ingress: [{{{from}ports: [{{port: {port}}}, \
                 {{protocol: UDP, port: {port}}}]}}]}}"
            ),
        ))
    };
    let block = |ip: IpAddr| format!("{{ipBlock: {{cidr: '{}'}}}}", single(ip));
    let all = [&near[..], &passed_on].concat();
    check(&all, true).context("without a policy")?;
    allow(&block(client), 80)?;
    check(&near, true).context("the client's own address")?;
    check(&passed_on, false).context("which is not seen behind another node")?;
    allow(&block(there), 80)?;
    check(&near, false).context("the other node's address")?;
    check(&passed_on, true).context("which has passed it on")?;
    // The Service's port and the node's are not the Pod's.
    for port in [8_080, cluster, local] {
        allow("", port)?;
        check(&all, false).with_context(|| format!("port {port}"))?;
    }
    allow("", 80)?;
    check(&all, true).context("the Pod's port")?;
    // A Pod of another node, by a node port: itself.
    allow("{namespaceSelector: {matchLabels: {ns: b}}}", 80)?;
    for node in [here, there] {
        bed.reaches("b/far", Target::new(Tcp, node, cluster))
            .context("a Pod by a node port")?;
    }
    check(&all, false).context("nobody outside")?;
    bed.kubectl("delete service cluster local -n $a").map(drop)
}

/// While the API server does not get through to a node, a Pod that starts there is wired in bounded
/// time, denied everything, and free once it is known.
fn a_pod_that_is_not_known_is_denied(bed: &Bed) -> Result<()> {
    bed.pods(&[pod("a", "near", "node1", ""), pod("a", "far", "node2", "")])?;
    let node = single(bed.cluster.node_ip("node1")?);
    let route = |verb: &str| {
        let fabric = bed.cluster.fabric().path();
        let netns = format!("--net={}", fabric.display());
        let arguments = [&netns, "ip", "route", verb, "blackhole", &node];
        let status = std::process::Command::new("nsenter")
            .args(arguments)
            .status()?;
        ensure!(status.success(), "ip route {verb}: {status}");
        Ok(())
    };
    route("add")?;
    let late = pod("a", "late", "node1", "");
    let begun = Instant::now();
    let checked = bed.apply(&bed.manifest(&late)).and_then(|_| {
        eventually(LIMIT, || bed.cluster.pod(&bed.full("a/late")).map(drop))
            .context("a Pod is wired although the API says nothing")?;
        let took = begun.elapsed();
        // `--pod-wait` is 3 s if nobody says otherwise.
        ensure!(took > Duration::from_millis(2_900), "wired after {took:?}");
        let to = bed.target(Tcp, "a/late", 80)?;
        for _ in 0..2 {
            for from in ["a/near", "a/far"] {
                let outcome = bed.probe(from, to)?;
                ensure!(!outcome.answered(), "{from}: {outcome}");
                let outcome = bed.probe("a/late", bed.target(Tcp, from, 80)?)?;
                ensure!(!outcome.answered(), "to {from}: {outcome}");
            }
        }
        bed.reaches("node/node1", to).context("its own node")
    });
    route("del")?;
    checked?;
    let known = Duration::from_secs(60);
    eventually(known, || {
        let outcome = bed.probe("a/near", bed.target(Tcp, "a/late", 80)?)?;
        ensure!(outcome.answered(), "{outcome}");
        Ok(())
    })?;
    bed.reaches("a/late", bed.target(Tcp, "a/far", 80)?)
}

both_families!(
    an_ended_pod_is_nobody,
    a_reused_address_inherits_nothing,
    a_pod_on_the_hosts_network_is_its_node,
    an_isolated_pod_reaches_itself_through_its_service,
    a_client_outside_is_judged_behind_the_service,
    a_pod_that_is_not_known_is_denied,
);

/// Policies that need more than the maps hold deny their Pods everything, tell everybody, and leave
/// the others alone.
#[test]
fn policies_that_do_not_fit_deny() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    let dir = std::env::temp_dir().join(format!("hachi-full-{}", std::process::id()));
    let cluster = Cluster::start(Options {
        remove_dir: true,
        nodes: 1,
        agent_options: ["--policy-entries", "64"].map(str::to_owned).to_vec(),
        ..Options::new(dir, hachi_testutil::dist_dir(), Family::V4)
    })
    .unwrap_or_else(|error| panic!("no cluster: {error:#}"));
    if let Err(error) = full(&cluster) {
        panic!("{error:#}\n{}", cluster.agent_logs(30));
    }
}

fn full(cluster: &Cluster) -> Result<()> {
    let pod = |name: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default, \
             labels: {{app: {name}}}}}\nspec: {{containers: [{{name: main, image: server}}]}}\n"
        )
    };
    cluster.apply(&["big", "small", "client"].map(pod).concat())?;
    cluster.wait_ready("default")?;
    let check = |from: &str, to: &str, expected: bool| {
        eventually(LIMIT, || {
            let target = Target::new(Tcp, cluster.pod_ip(&format!("default/{to}"))?, 80);
            let from = format!("default/{from}");
            let outcome = cluster.probe(&from, target, Duration::from_millis(300))?;
            ensure!(outcome.answered() == expected, "{from} to {to}: {outcome}");
            Ok(())
        })
    };
    check("client", "big", true)?;
    let ports: Vec<_> = (0..60)
        .map(|n| format!("{{port: {}}}", 80 + n * 7))
        .collect();
    let policy = |name: &str, ports: &str| {
        format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
             metadata: {{name: {name}, namespace: default}}\nspec: {{podSelector: {{matchLabels: \
             {{app: {name}}}}}, policyTypes: [Ingress], ingress: [{{ports: [{ports}]}}]}}\n"
        )
    };
    cluster.apply(&(policy("big", &ports.join(", ")) + &policy("small", "{port: 80}")))?;
    check("client", "big", false).context("80 is allowed, and the rest does not fit")?;
    check("big", "client", false).context("the other direction")?;
    check("client", "small", true)?;
    check("small", "client", true)?;
    let status = cluster.wait_agent("node1")?;
    let told = status.problems.join("; ");
    ensure!(
        told.contains("POLICY") && told.contains("default/big"),
        "{told}"
    );
    eventually(LIMIT, || {
        let events = "-o=jsonpath={range .items[*]}{.involvedObject.name}: {.message}; {end}";
        let told = cluster.kubectl(&["get", "events", "-n", "default", events])?;
        ensure!(
            told.contains("big: ") && !told.contains("small: "),
            "{told}"
        );
        Ok(())
    })?;
    cluster.kubectl(&["delete", "networkpolicy", "big"])?;
    check("client", "big", true).context("without it")?;
    ensure!(
        cluster.wait_agent("node1")?.problems.is_empty(),
        "the problem stays"
    );
    Ok(())
}
