//! After `hachi uninstall` a node is as it was before: compared by what the kernel and the file
//! system say, not by what Hachi thinks it made.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Cluster, Family, Node, Options, Protocol::Tcp, Target, bed::LIMIT, eventually,
    options::CONFLIST,
};

const PODS: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {selector: {app: web}, ports: [{port: 8080, targetPort: 80}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nobody, namespace: default}
spec: {podSelector: {matchLabels: {app: guarded}}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: default, labels: {app: web}}
spec: {nodeName: node1, containers: [{name: main, image: server}]}
---
apiVersion: v1
kind: Pod
metadata: {name: near, namespace: default}
spec: {nodeName: node1, containers: [{name: main, image: server}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: default, labels: {app: guarded}}
spec: {nodeName: node2, containers: [{name: main, image: server}]}
";

/// What is compared. Every line must be the same before and after. `ip` prints the state of
/// neighbours, which comes and goes by itself: only those that somebody made permanent count.
const LOOK: &str = r"
echo '== links'; ip -d -o link | sed -E 's/ (qlen|gso|gro|tso)[a-z_0-9]* [0-9]+//g'
echo '== routes'; ip -4 route show table all; ip -6 route show table all | sed -E 's/ expires [0-9]+sec//'
echo '== rules'; ip -4 rule; ip -6 rule
echo '== neighbours'; ip neigh show nud permanent
echo '== qdiscs'; tc qdisc show; for i in $(ls /sys/class/net); do tc filter show dev $i ingress; tc filter show dev $i egress; done
echo '== bpf'; bpftool net show | grep -v '^$'; find /sys/fs/bpf | sort
echo '== files'; ls -lAR --time-style=+ /etc/cni /opt/cni /var/lib/cni /run/hachi /run/netns | grep -v '^total'
echo '== settings'; cd /proc/sys/net; find . -type f -readable | grep -vE 'stat_refresh|nf_conntrack_(count|max)|nr_busy|/route/flush|netfilter' | sort | while read f; do echo $f $(cat $f 2>/dev/null); done
";

fn look(cluster: &Cluster, node: &str) -> Result<BTreeSet<String>> {
    let text = cluster.exec(&format!("node/{node}"), "sh", &["-c", LOOK])?;
    let mut section = "";
    let mut lines = BTreeSet::new();
    for line in text.lines() {
        match line.strip_prefix("== ") {
            Some(name) => section = name,
            None => drop(lines.insert(format!("{section}: {}", line.trim()))),
        }
    }
    ensure!(lines.len() > 100, "nothing to compare: {text}");
    Ok(lines)
}

fn same(before: &BTreeSet<String>, after: &BTreeSet<String>) -> Result<()> {
    let lines = |set: &BTreeSet<String>, other| {
        let lines: Vec<_> = set.difference(other).cloned().collect();
        lines.join("\n  ")
    };
    ensure!(
        before == after,
        "gone:\n  {}\nnew:\n  {}",
        lines(before, after),
        lines(after, before)
    );
    Ok(())
}

/// A cluster whose nodes have nothing of Hachi yet, and forward nothing.
fn bare_cluster(dir: &Path) -> Result<Cluster> {
    let options = Options {
        agents: false,
        remove_dir: true,
        ..Options::new(dir, hachi_testutil::dist_dir(), Family::Dual)
    };
    let cluster = Cluster::start(options)?;
    for node in cluster.nodes() {
        for file in ["bin/hachi-cni", "net.d/10-hachi.conflist"] {
            fs::remove_file(node.dir.join(file))?;
        }
        // What a node has that was never meant for Kubernetes.
        fs::write(node.dir.join("net.d/05-old.conflist"), "{}")?;
        if node.name == "node1" {
            // The installation mounts one, and the uninstall takes it away again.
            cluster.exec(&place(node), "umount", &["/sys/fs/bpf"])?;
        }
        let off = "echo 0 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv6/conf/all/forwarding";
        cluster.exec(&place(node), "sh", &["-c", off])?;
    }
    Ok(cluster)
}

fn place(node: &Node) -> String {
    format!("node/{}", node.name)
}

fn hachi(cluster: &Cluster, node: &str, arguments: &[&str]) -> Result<String> {
    let program = hachi_testutil::dist_dir().join("hachi");
    cluster.exec(
        &format!("node/{node}"),
        &program.to_string_lossy(),
        arguments,
    )
}

/// As the DaemonSet does it: the init container, then the agent, which writes the configuration
/// when it is ready.
fn install(cluster: &Cluster, routing: &str) -> Result<()> {
    let plugin = hachi_testutil::dist_dir().join("hachi-cni");
    for node in cluster.nodes() {
        let plugin = format!("--plugin={}", plugin.display());
        let said = hachi(
            cluster,
            &node.name,
            &["install", &plugin, "--cni-bin-dir=/opt/cni/bin"],
        )?;
        ensure!(said.contains("forwarding of V4 turned on"), "{said}");
        fs::write(node.dir.join("run/10-hachi.conflist"), CONFLIST)?;
        cluster.start_agent_with(
            &node.name,
            &[
                "--conflist=/run/hachi/10-hachi.conflist",
                "--cni-conf-dir=/etc/cni/net.d",
                &format!("--routing={routing}"),
                "--xdp=generic",
            ],
        )?;
    }
    for node in cluster.nodes() {
        cluster.wait_agent(&node.name)?;
        eventually(LIMIT, || {
            let mode = fs::metadata(node.dir.join("net.d/10-hachi.conflist"))?.permissions();
            ensure!(mode.mode() & 0o444 == 0o444, "{mode:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// The ids of all programs, maps and links that a process has open, by kind.
fn open_by(pid: u32) -> Result<BTreeMap<&'static str, BTreeSet<u64>>> {
    let mut found = BTreeMap::<_, BTreeSet<u64>>::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        for (field, kind) in [
            ("prog_id:", "prog"),
            ("map_id:", "map"),
            ("link_id:", "link"),
        ] {
            for line in text.lines() {
                if let Some(id) = line.strip_prefix(field) {
                    found.entry(kind).or_default().insert(id.trim().parse()?);
                }
            }
        }
    }
    Ok(found)
}

/// Everything of that kind in the kernel.
fn in_kernel(kind: &str) -> Result<BTreeSet<u64>> {
    let output = Command::new("bpftool")
        .args(["-j", kind, "show"])
        .output()?;
    let list: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{}", String::from_utf8_lossy(&output.stdout)))?;
    Ok(list.iter().filter_map(|item| item["id"].as_u64()).collect())
}

fn run(test: impl FnOnce(&Path) -> Result<()>) {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent", "hachi");
    if Command::new("bpftool").arg("version").output().is_err() {
        hachi_testutil::skip!("needs bpftool: run cargo xtask setup");
    }
    let dir = tempfile::tempdir().expect("a directory");
    if let Err(error) = test(&dir.path().join("cluster")) {
        panic!("{error:?}");
    }
}

#[test]
fn an_uninstalled_node_is_as_it_was_before() {
    run(|dir| {
        let cluster = bare_cluster(dir)?;
        let before = [look(&cluster, "node1")?, look(&cluster, "node2")?];
        install(&cluster, "vxlan")?;
        cluster.apply(PODS)?;
        cluster.wait_ready("default")?;
        let mut ours = BTreeMap::<_, BTreeSet<_>>::new();
        for node in cluster.nodes() {
            let pid = cluster.agent_pid(&node.name)?.context("the agent runs")?;
            for (kind, ids) in open_by(pid)? {
                ours.entry(kind).or_default().extend(ids);
            }
        }
        ensure!(
            ours["prog"].len() >= 8 && ours["map"].len() >= 20,
            "{ours:?}"
        );

        // Not while the agent runs, and nothing is changed by the attempt.
        let Err(error) = hachi(&cluster, "node1", &["uninstall"]) else {
            bail!("taken from under a running agent");
        };
        ensure!(
            format!("{error:#}").contains("has to end first"),
            "{error:#}"
        );

        // Deleted as a cluster's owner does it: first what runs, then the agents.
        cluster.kubectl(&["delete", "pod", "--all", "-n", "default", "--wait=true"])?;
        for (node, before) in cluster.nodes().iter().zip(&before) {
            cluster.kill_agent(&node.name)?;
            fs::remove_file(node.dir.join("run/10-hachi.conflist"))?;
            let said = hachi(&cluster, &node.name, &["uninstall", "--wait"])?;
            ensure!(said.contains("nothing of Hachi is left"), "{said}");
            ensure!(said.contains("05-old.conflist is back"), "{said}");
            let kubeconfig = node.dir.join("run/kubeconfig");
            ensure!(!kubeconfig.exists(), "/run/hachi was not emptied");
            // The test's own file, which was there before.
            fs::write(&kubeconfig, "")?;
            let after = look(&cluster, &node.name)?;
            same(&without_sizes(before), &without_sizes(&after))
                .with_context(|| format!("{}, after: {said}", node.name))?;
        }
        eventually(LIMIT, || {
            for (kind, ids) in &ours {
                let left: Vec<_> = in_kernel(kind)?.intersection(ids).copied().collect();
                ensure!(left.is_empty(), "{kind}s are still in the kernel: {left:?}");
            }
            Ok(())
        })?;
        // Again: nothing to do is success.
        hachi(&cluster, "node1", &["uninstall"])?;
        Ok(())
    });
}

/// The test's kubeconfig lies where the uninstall clears up; it is another file afterwards.
fn without_sizes(lines: &BTreeSet<String>) -> BTreeSet<String> {
    let others = lines.iter().filter(|line| !line.ends_with(" kubeconfig"));
    others.cloned().collect()
}

#[test]
fn pods_that_run_on_keep_plain_connectivity_until_they_are_cut_off() {
    run(|dir| {
        let cluster = bare_cluster(dir)?;
        let before = look(&cluster, "node1")?;
        install(&cluster, "auto")?;
        cluster.apply(PODS)?;
        cluster.wait_ready("default")?;
        let service = Target::new(Tcp, cluster.service_ip("default", "web")?, 8080);
        let to = |pod: &str| anyhow::Ok(Target::new(Tcp, cluster.pod_ip(pod)?, 80));
        let reaches = |from: &str, to: Target| {
            let outcome = cluster.probe(from, to, Duration::from_millis(500))?;
            anyhow::Ok(outcome.answered())
        };
        // Where an answer is due: a node may learn of a Service's backend later than of its Pod, and a
        // busy machine answers late.
        let comes_to_reach = |from: &str, to: Target| {
            eventually(LIMIT, || {
                ensure!(reaches(from, to)?, "{from} does not reach {to}");
                Ok(())
            })
        };
        let (web, far) = (to("default/web")?, to("default/far")?);
        comes_to_reach("default/near", service)?;
        comes_to_reach("default/near", web)?;
        ensure!(!reaches("default/near", far)?, "policy holds");

        for node in cluster.nodes() {
            cluster.kill_agent(&node.name)?;
            // node2 has no other network: its runtime would delete no Pod without this one.
            let other = node.dir.join("net.d/05-old.conflist.hachi-aside");
            let ours = node.dir.join("net.d/10-hachi.conflist");
            if node.name == "node2" {
                fs::remove_file(&other).context("the other network was put aside")?;
            }
            let Err(error) = hachi(&cluster, &node.name, &["uninstall"]) else {
                bail!("Pods run, but all is said to be gone");
            };
            let said = format!("{error:#}");
            ensure!(said.contains("still run") || said.contains('3'), "{said}");
            ensure!(ours.exists() == (node.name == "node2"), "{}", node.name);
        }
        // Plain connectivity, near and far; nothing else.
        comes_to_reach("default/near", web).context("on one node")?;
        comes_to_reach("default/far", web).context("from another node")?;
        comes_to_reach("default/near", far).context("no policy any more")?;
        ensure!(!reaches("default/near", service)?, "no Service any more");
        let plugin = cluster.nodes()[0].dir.join("bin/hachi-cni");
        ensure!(plugin.exists(), "the runtime needs it to delete the Pods");

        hachi(&cluster, "node1", &["uninstall", "--force"])?;
        ensure!(!plugin.exists());
        ensure!(!reaches("default/far", web)?, "cut off");
        let node = &cluster.nodes()[0];
        fs::write(node.dir.join("run/kubeconfig"), "")?;
        let after = look(&cluster, "node1")?;
        // The Pods' namespaces are the runtime's.
        let own = |lines: &BTreeSet<String>| -> BTreeSet<String> {
            let lines = without_sizes(lines);
            lines
                .into_iter()
                .filter(|line| !line.contains("hachi-"))
                .collect()
        };
        same(&own(&before), &own(&after))
    });
}
