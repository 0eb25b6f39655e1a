//! `hachi policy` as people run it on a node: what it says, its exit codes, and that it notices when
//! the kernel's maps are not what the policies say.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use hachi_abi::{Endpoint, Peer, PolicyEntry, PolicyKey};
use hachi_cluster::{
    Protocol::Tcp,
    Target,
    bed::{Bed, LIMIT, Spec},
    both_families, eventually,
};

const OBJECTS: &str = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: $a}
spec: {selector: {app: web}, ports: [{port: 8080, targetPort: web}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: by-name, namespace: $a}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress:
  - {from: [{namespaceSelector: {matchLabels: {ns: b}}}], ports: [{port: web}]}
  - {from: [{podSelector: {matchLabels: {app: other}}}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: out, namespace: $b}
spec:
  podSelector: {matchLabels: {app: shut}}
  policyTypes: [Egress]
  egress: [{to: [{ipBlock: {cidr: 192.0.2.0/24}}]}, {to: [{ipBlock: {cidr: '2001:db8::/32'}}]}]
";

fn start(bed: &Bed) -> Result<()> {
    bed.apply(OBJECTS)?;
    let pod = |namespace, name, labels, ports| Spec {
        namespace,
        name,
        labels,
        ports,
        node: "node1",
    };
    bed.pods(&[
        pod(
            "a",
            "web",
            "app: web",
            "{name: web, containerPort: 80}, {containerPort: 81}",
        ),
        pod("b", "client", "app: client", ""),
        pod("b", "shut", "app: shut", ""),
    ])?;
    bed.reaches("b/client", bed.target(Tcp, "a/web", 80)?)?;
    bed.loses("b/client", bed.target(Tcp, "a/web", 81)?)?;
    bed.loses("b/shut", bed.target(Tcp, "a/web", 80)?)?;
    // The agent may learn of the Service's backend later than of the Pod.
    bed.reaches("b/client", Target::new(Tcp, bed.service("a", "web")?, 8080))
}

/// Runs `hachi policy` on node1; returns its exit code and all that it says.
fn hachi(bed: &Bed, arguments: &[&str]) -> Result<(i32, String)> {
    let program = bed.cluster.options().dist.join("hachi");
    let program = program.to_string_lossy();
    let all = [
        &["--socket", "/run/hachi/agent.sock", "policy"][..],
        arguments,
    ]
    .concat();
    match bed.cluster.exec("node/node1", &program, &all) {
        Ok(text) => Ok((0, text)),
        Err(error) => {
            let text = format!("{error:#}");
            let (_, code) = text.split_once("exit status: ").context(text.clone())?;
            let digits: String = code.chars().take_while(char::is_ascii_digit).collect();
            Ok((digits.parse()?, text))
        }
    }
}

fn trace(bed: &Bed, from: &str, to: &str, port: &str) -> Result<(i32, String)> {
    let (from, to) = (bed.full(from), bed.full(to));
    hachi(
        bed,
        &["trace", "--from", &from, "--to", &to, "--port", port],
    )
}

/// Its exit code, and what it must say.
fn says(bed: &Bed, (from, to, port): (&str, &str, &str), code: i32, words: &[&str]) -> Result<()> {
    let (found, text) = trace(bed, from, to, port)?;
    ensure!(found == code, "{from} to {to}: exit code {found}\n{text}");
    for word in words {
        ensure!(
            text.contains(word),
            "{from} to {to}: not a word of {word:?} in\n{text}"
        );
    }
    ensure!((code == 3) == text.contains("DRIFT"), "{text}");
    Ok(())
}

fn a_trace_tells_why(bed: &Bed) -> Result<()> {
    start(bed)?;
    let rule = |index: u32| format!("{}/by-name ingress[{index}]", bed.namespace("a"));
    let (first, second) = (rule(0), rule(1));
    says(
        bed,
        ("b/client", "a/web", "80/tcp"),
        0,
        &[
            "ALLOWED",
            &format!("{first} (Accept) matches and decides"),
            &format!("{second} (Accept) matches the port, but not the peer"),
            "kernel: allowed by",
        ],
    )?;
    says(
        bed,
        ("b/client", "a/web", "81/tcp"),
        1,
        &[
            "DENIED",
            &format!("{first} (Accept) matches the peer, but not the port"),
            "isolated by a NetworkPolicy, and no rule of one accepts the flow",
            "kernel: denied",
        ],
    )?;
    says(bed, ("b/client", "a/web", "80/udp"), 1, &["DENIED"])?;
    says(
        bed,
        (
            "b/client",
            "a/web",
            if is_v4(bed)? { "icmp" } else { "icmpv6" },
        ),
        1,
        &["DENIED"],
    )?;
    // The Service's address: judged on the backend and its port.
    let service = bed.service("a", "web")?.to_string();
    let through = if is_v4(bed)? {
        format!("{service}:8080")
    } else {
        format!("[{service}]:8080")
    };
    let web = bed.target(Tcp, "a/web", 80)?.address.to_string();
    says(
        bed,
        ("b/client", &service, "8080/tcp"),
        0,
        &["ALLOWED", &format!("through Service {through}"), &web],
    )?;
    says(
        bed,
        ("b/shut", &service, "8080/tcp"),
        1,
        &["DENIED", "egress: DENIED", "ingress: ALLOWED"],
    )?;
    // Outside.
    let (inside, outside) = if is_v4(bed)? {
        ("192.0.2.7", "198.51.100.7")
    } else {
        ("2001:db8::7", "2001:db9::7")
    };
    says(
        bed,
        ("b/shut", inside, "443/tcp"),
        0,
        &["ALLOWED", "no Pod has this address"],
    )?;
    says(bed, ("b/shut", outside, "443/tcp"), 1, &["DENIED"])?;
    says(
        bed,
        (outside, "a/web", "80/tcp"),
        1,
        &["DENIED", "matches the port, but not the peer"],
    )?;
    // Those who are never judged.
    let node = bed.cluster.node_ip("node1")?.to_string();
    says(
        bed,
        (&node, "a/web", "81/tcp"),
        0,
        &["a Pod's own node always reaches it"],
    )?;
    says(
        bed,
        ("a/web", "a/web", "81/tcp"),
        0,
        &["a Pod always reaches itself"],
    )?;
    // Questions that make no sense.
    for (from, to, port, word) in [
        ("b/nobody", "a/web", "80/tcp", "no Pod"),
        ("b/client", "a/web", "0/tcp", "not a port"),
        ("b/client", "a/web", "80/tpc", "no protocol"),
        ("nonsense", "a/web", "80/tcp", "neither"),
    ] {
        let (code, text) = trace(bed, from, to, port)?;
        ensure!(
            code != 0 && code != 3 && text.contains(word),
            "{code}: {text}"
        );
    }
    Ok(())
}

fn is_v4(bed: &Bed) -> Result<bool> {
    Ok(bed.cluster.node_ip("node1")?.is_ipv4())
}

fn a_pods_policies_are_listed(bed: &Bed) -> Result<()> {
    start(bed)?;
    let (code, text) = hachi(bed, &["get", &bed.full("a/web")])?;
    ensure!(
        code == 0 && text.contains("by-name") && text.contains("ingress"),
        "{text}"
    );
    ensure!(
        text.contains("classes of peers") && text.contains("not isolated"),
        "{text}"
    );
    ensure!(!text.contains("/out"), "another Pod's policy: {text}");
    let (code, text) = hachi(bed, &["get", &bed.full("b/shut")])?;
    ensure!(
        code == 0 && text.contains("/out") && text.contains("egress"),
        "{text}"
    );
    let (code, text) = hachi(bed, &["get", "nobody/here"])?;
    ensure!(code != 0 && text.contains("no Pod nobody/here"), "{text}");
    Ok(())
}

/// A pinned map of node1, as bytes.
struct Pinned<const K: usize, const V: usize>(HashMap<MapData, [u8; K], [u8; V]>);

impl<const K: usize, const V: usize> Pinned<K, V> {
    fn open(bed: &Bed, name: &str) -> Result<Self> {
        let pid = bed.cluster.wait_agent("node1")?.pid;
        let root = PathBuf::from(format!("/proc/{pid}/root/sys/fs/bpf/hachi"));
        let mut found = None;
        for version in std::fs::read_dir(&root).with_context(|| format!("{}", root.display()))? {
            let path = version?.path().join(name);
            if path.exists() {
                found = Some(path);
            }
        }
        let path = found.with_context(|| format!("no pinned map {name}"))?;
        let data = MapData::from_pin(&path).with_context(|| format!("{}", path.display()))?;
        Ok(Self(HashMap::try_from(Map::HashMap(data))?))
    }

    fn entries(&self) -> Result<Vec<([u8; K], [u8; V])>> {
        let entries: Vec<_> = self.0.iter().collect::<Result<_, _>>()?;
        ensure!(!entries.is_empty(), "an empty map");
        Ok(entries)
    }

    /// Takes everything out, asks, and puts it back.
    fn without(&mut self, ask: impl Fn() -> Result<()>) -> Result<()> {
        let entries = self.entries()?;
        for (key, _) in &entries {
            self.0.remove(key)?;
        }
        let asked = ask();
        for (key, value) in &entries {
            self.0.insert(key, value, 0)?;
        }
        asked
    }

    /// Changes every value, asks, and changes it back.
    fn with(&mut self, change: impl Fn(&mut [u8; V]), ask: impl Fn() -> Result<()>) -> Result<()> {
        let entries = self.entries()?;
        for (key, value) in &entries {
            let mut value = *value;
            change(&mut value);
            self.0.insert(key, value, 0)?;
        }
        let asked = ask();
        for (key, value) in &entries {
            self.0.insert(key, value, 0)?;
        }
        asked
    }
}

/// Waits until nothing is left of the tests before, whose namespaces go while this one begins: the agent
/// would change the very maps that are changed here.
fn alone(bed: &Bed) -> Result<()> {
    let ours = ["a", "b"].map(|short| bed.namespace(short));
    eventually(LIMIT, || {
        let found =
            bed.kubectl("get pods,networkpolicies -A -o jsonpath={.items[*].metadata.namespace}")?;
        let mut others = found
            .split_whitespace()
            .filter(|name| !ours.iter().any(|own| own == name));
        ensure!(others.next().is_none(), "still there: {found}");
        Ok(())
    })
}

/// Maps that say something else than the policies, in whatever way: that is told, beside what the
/// policies say, and nothing else is told wrong.
fn maps_that_differ_are_called_drift(bed: &Bed) -> Result<()> {
    // Before anything is made here: a watch tells in order, so that an agent that obeys what is made
    // now has done with what went before.
    alone(bed)?;
    start(bed)?;
    eventually(LIMIT, || {
        let endpoints = bed.cluster.wait_agent("node1")?.endpoints;
        ensure!(endpoints == 3, "{endpoints} endpoints on node1");
        Ok(())
    })?;
    let allowed = ("b/client", "a/web", "80/tcp");
    let denied = ("b/client", "a/web", "81/tcp");
    let fine =
        || says(bed, allowed, 0, &["ALLOWED"]).and_then(|()| says(bed, denied, 1, &["DENIED"]));
    let drift = |words: &[&str]| says(bed, allowed, 3, words);
    fine()?;

    const KEY: usize = size_of::<PolicyKey>();
    const ENTRY: usize = size_of::<PolicyEntry>();
    let mut policy = Pinned::<KEY, ENTRY>::open(bed, "POLICY")?;
    policy
        .without(|| drift(&["ingress: ALLOWED", "kernel: denied"]))
        .context("no entries")?;
    fine()?;
    // The verdict is the first word, the rule the second.
    policy
        .with(
            |value| value[0] ^= 1,
            || drift(&["ingress: ALLOWED", "kernel: denied"]),
        )
        .context("verdicts")?;
    policy
        .with(|value| value[4] ^= 1, || drift(&["by an unknown rule"]))
        .context("rules")?;
    fine()?;

    let v4 = is_v4(bed)?;
    let lost =
        |name: &str, words: &[&str]| -> Result<()> {
            let name = format!("{name}_{}", if v4 { "V4" } else { "V6" });
            match (name.starts_with("PEERS"), v4) {
                (true, true) => {
                    Pinned::<4, { size_of::<Peer>() }>::open(bed, &name)?.without(|| drift(words))
                }
                (true, false) => {
                    Pinned::<16, { size_of::<Peer>() }>::open(bed, &name)?.without(|| drift(words))
                }
                (false, true) => Pinned::<4, { size_of::<Endpoint>() }>::open(bed, &name)?
                    .without(|| drift(words)),
                (false, false) => Pinned::<16, { size_of::<Endpoint>() }>::open(bed, &name)?
                    .without(|| drift(words)),
            }
            .context(name)
        };
    lost("PEERS", &["kernel: denied"])?;
    lost("ENDPOINTS", &["the Pod's entry is missing from the maps"])?;
    fine()?;
    // And what was changed back works.
    bed.reaches("b/client", bed.target(Tcp, "a/web", 80)?)?;
    match bed.probe("b/client", bed.target(Tcp, "a/web", 81)?)? {
        outcome if outcome.answered() => bail!("{outcome}"),
        _ => Ok(()),
    }
}

both_families!(
    a_trace_tells_why,
    a_pods_policies_are_listed,
    maps_that_differ_are_called_drift,
);
