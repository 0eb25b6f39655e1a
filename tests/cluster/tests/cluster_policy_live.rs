//! Policies and what is under way: live connections that a policy or a label ends and resumes,
//! ping, and the link's own traffic.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Protocol::{Tcp, Udp},
    bed::{Bed, LIMIT, Spec, TIMEOUT},
    both_families, eventually,
    workload::{ping::ping, pulse::Pulse, stream::Stream},
};

/// So long nothing may come through what is closed.
const SILENCE: Duration = Duration::from_millis(300);

/// A client and a server on one node and one server on the other.
fn start(bed: &Bed) -> Result<()> {
    let pod = |namespace, name, node| Spec {
        namespace,
        name,
        node,
        ..Spec::default()
    };
    bed.pods(&[
        pod("a", "near", "node1"),
        pod("a", "far", "node2"),
        pod("b", "client", "node1"),
    ])?;
    for to in ["a/near", "a/far"] {
        bed.reaches("b/client", bed.target(Tcp, to, 80)?)?;
        bed.reaches("b/client", bed.target(Udp, to, 80)?)?;
    }
    Ok(())
}

fn policy(namespace: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{name: guard, namespace: ${namespace}}}\nspec: {spec}\n"
    )
}

/// Connections of the client to both servers.
struct Live {
    streams: Vec<Stream>,
    pulses: Vec<Pulse>,
}

impl Live {
    fn open(bed: &Bed) -> Result<Self> {
        let client = bed.full("b/client");
        let netns = bed.cluster.netns(&client)?;
        let (mut streams, mut pulses) = (Vec::new(), Vec::new());
        for to in ["a/near", "a/far"] {
            streams.push(
                bed.cluster
                    .stream(&client, bed.target(Tcp, to, 80)?.address)?,
            );
            pulses.push(Pulse::start(netns.get(), bed.target(Udp, to, 80)?.address)?);
        }
        Ok(Self { streams, pulses })
    }

    fn counts(&self) -> Vec<u64> {
        let streams = self.streams.iter().map(Stream::echoed);
        streams
            .chain(self.pulses.iter().map(Pulse::answered))
            .collect()
    }

    /// Waits until every one of them goes on.
    fn go_on(&self) -> Result<()> {
        let before = self.counts();
        eventually(LIMIT, || {
            let now = self.counts();
            let all = before.iter().zip(&now).all(|(before, now)| now > before);
            ensure!(all, "from {before:?} to {now:?}");
            Ok(())
        })
    }

    /// Waits until nothing comes of any of them.
    fn stand_still(&self) -> Result<()> {
        eventually(LIMIT, || {
            let before = self.counts();
            thread::sleep(SILENCE);
            let now = self.counts();
            ensure!(before == now, "from {before:?} to {now:?}");
            Ok(())
        })
    }

    fn end(self) -> Result<()> {
        for stream in self.streams {
            let report = stream.stop()?;
            ensure!(report.error.is_none(), "{report:?}");
        }
        self.pulses
            .into_iter()
            .try_for_each(|pulse| pulse.stop().map(drop))
    }
}

/// No new connection helps: the very ones that were open stop, and the same go on.
fn live_connections_obey_policies_that_come_and_go(bed: &Bed) -> Result<()> {
    start(bed)?;
    let live = Live::open(bed)?;
    live.go_on().context("without a policy")?;
    for (namespace, direction) in [("a", "Ingress"), ("b", "Egress")] {
        let spec = format!("{{podSelector: {{}}, policyTypes: [{direction}]}}");
        bed.apply(&policy(namespace, &spec))?;
        live.stand_still().context(direction)?;
        bed.kubectl(&format!("delete networkpolicy guard -n ${namespace}"))?;
        live.go_on()
            .with_context(|| format!("without {direction}"))?;
    }
    live.end()
}

fn live_connections_obey_labels(bed: &Bed) -> Result<()> {
    start(bed)?;
    bed.kubectl("label pod client -n $b friend=yes")?;
    bed.apply(&policy(
        "a",
        "{podSelector: {}, policyTypes: [Ingress],
          ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {friend: 'yes'}}},
                            {namespaceSelector: {matchLabels: {friends: 'yes'}}}]}]}",
    ))?;
    let stranger = bed.target(Tcp, "a/far", 80)?;
    bed.loses("a/near", stranger)
        .context("one without labels")?;
    let live = Live::open(bed)?;
    live.go_on().context("the Pod's label")?;
    bed.kubectl("label pod client -n $b friend-")?;
    live.stand_still().context("no label")?;
    bed.kubectl("label namespace $b friends=yes")?;
    live.go_on().context("the namespace's label")?;
    bed.kubectl("label namespace $b friends-")?;
    live.stand_still().context("no label again")?;
    // The label of those who are selected.
    bed.apply(&policy(
        "a",
        "{podSelector: {matchLabels: {closed: 'yes'}}, policyTypes: [Ingress]}",
    ))?;
    live.go_on().context("nobody is selected")?;
    bed.kubectl("label pod near far -n $a closed=yes")?;
    live.stand_still().context("both are selected")?;
    bed.kubectl("label pod near far -n $a closed-")?;
    live.go_on().context("nobody is selected again")?;
    live.end()
}

fn pings(bed: &Bed, from: &str, to: &str, expected: bool) -> Result<()> {
    let ip = match to {
        "outside" => outside(bed)?,
        pod => bed.cluster.pod_ip(&bed.full(pod))?,
    };
    let netns = bed.cluster.netns(&bed.full(from))?;
    eventually(LIMIT, || {
        let limit = if expected { TIMEOUT } else { SILENCE };
        let answered = netns.get().enter(|| ping(ip, limit))??;
        ensure!(answered == expected, "{from} to {to}: {answered}");
        Ok(())
    })
}

fn outside(bed: &Bed) -> Result<std::net::IpAddr> {
    let mut found = bed.cluster.options().family.fabric().into_iter();
    found.next().context("the bridge has no address")
}

/// An echo request is a flow like another: no port, so that only rules without ports speak of it.
fn ping_is_judged(bed: &Bed) -> Result<()> {
    start(bed)?;
    let all = [
        ("b/client", "a/near"),
        ("b/client", "a/far"),
        ("a/far", "a/near"),
        ("node/node2", "a/near"),
    ];
    let check = |expected: bool| {
        all.iter()
            .try_for_each(|(from, to)| pings(bed, from, to, expected))
    };
    check(true).context("without policies")?;
    pings(bed, "a/near", "outside", true)?;
    bed.apply(&policy("a", "{podSelector: {}, policyTypes: [Ingress]}"))?;
    check(false).context("isolated")?;
    pings(bed, "node/node1", "a/near", true).context("its own node")?;
    for to in ["b/client", "outside"] {
        pings(bed, "a/near", to, true).context("isolated Pods get the answers to their own")?;
        pings(bed, "a/far", to, true).context("isolated Pods get the answers to their own")?;
    }
    bed.apply(&policy(
        "a",
        "{podSelector: {}, policyTypes: [Ingress], ingress: [{ports: [{port: 80}, {protocol: UDP, port: 80}]}]}",
    ))?;
    bed.reaches("b/client", bed.target(Tcp, "a/near", 80)?)?;
    check(false).context("ports are no pings")?;
    bed.apply(&policy(
        "a",
        "{podSelector: {}, policyTypes: [Ingress], ingress: [{}]}",
    ))?;
    check(true).context("everything is allowed")?;
    bed.apply(&policy("a", "{podSelector: {}, policyTypes: [Egress]}"))?;
    pings(bed, "a/near", "b/client", false)?;
    pings(bed, "a/far", "outside", false)?;
    pings(bed, "b/client", "a/near", true).context("answers are no egress")
}

/// Whoever forgets a neighbour finds it again, whatever the policies: ARP and discovery are the
/// link's.
fn neighbours_are_found_under_any_policy(bed: &Bed) -> Result<()> {
    start(bed)?;
    bed.apply(&policy(
        "a",
        "{podSelector: {}, policyTypes: [Ingress, Egress]}",
    ))?;
    for (pod, node) in [("a/near", "node/node1"), ("a/far", "node/node2")] {
        bed.loses("b/client", bed.target(Tcp, pod, 80)?)?;
        let ip = bed.cluster.pod_ip(&bed.full(pod))?.to_string();
        let run = |arguments: &[&str]| bed.cluster.exec(node, "ip", arguments);
        let known = run(&["neigh", "show", &ip])?;
        let words: Vec<_> = known.split_whitespace().collect();
        let link = words.iter().skip_while(|word| **word != "dev").nth(1);
        let link = link.with_context(|| format!("no neighbour {ip}: {known}"))?;
        ensure!(known.contains("PERMANENT"), "{known}");
        if ip.contains(':') {
            // To ask, the node needs an address of the link, which it has no other use for.
            run(&["address", "add", "fe80::99/64", "dev", link, "nodad"])?;
        }
        run(&["neigh", "del", &ip, "dev", link])?;
        bed.reaches(node, bed.target(Tcp, pod, 80)?)?;
        let found = run(&["neigh", "show", &ip])?;
        ensure!(
            found.contains("lladdr") && !found.contains("PERMANENT"),
            "{found}"
        );
    }
    Ok(())
}

both_families!(
    live_connections_obey_policies_that_come_and_go,
    live_connections_obey_labels,
    ping_is_judged,
    neighbours_are_found_under_any_policy,
);
