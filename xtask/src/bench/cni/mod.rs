//! `bench cni`: ADD and DEL alone and many at once, agent included, beside Debian's `ptp` and
//! `bridge` with `host-local`.
//!
//! All three run on the same node, with the same namespaces, one address of each family, stores on
//! the same file system. Hachi's Pods are known to the API, selected by policies, and among as many
//! other Pods as `--pods` says. What is timed is from the start of the plugin's process to its end.

mod plugin;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use self::plugin::{Attachment, Plugin};
use super::bed::{Netns, Node};
use super::{Bed, Common, Report, Rng, Samples, Target, paired_ratio};
use crate::repo::Repo;
use crate::shell::Shell;

/// How to measure the plugin.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Attachments one after the other in each repetition
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=200))]
    alone: u16,
    /// Attachments at once in each repetition
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=200))]
    at_once: u16,
    /// Further Pods that the agent knows
    #[arg(long, default_value_t = 500)]
    pods: u16,
    /// NetworkPolicies that select the Pods
    #[arg(long, default_value_t = 20)]
    policies: u16,
    /// Both families in place of IPv4 alone (`bridge` then waits for duplicate address detection)
    #[arg(long)]
    dual: bool,
}

/// The namespace of the Pods.
const NAMESPACE: &str = "bench";
/// How long the kernel and the agent may take to let go of what was deleted.
const SETTLE: Duration = Duration::from_secs(20);

/// What is measured of one plugin.
#[derive(Default)]
struct Measured {
    add: Samples,
    del: Samples,
    adds: Samples,
    adds_wall: Samples,
    dels: Samples,
    dels_wall: Samples,
    /// From the start of many DELs until no interface of theirs is left.
    gone_wall: Samples,
}

/// Measures.
pub(crate) fn run(repo: &Repo, shell: &Shell, options: &Options) -> Result<Report> {
    let family = if options.dual { "dual" } else { "v4" };
    let bed = Bed::start(repo, shell, &["--nodes", "1", "--family", family])?;
    let node = bed.nodes().first().context("the cluster has no node")?;
    let pods = usize::from(options.alone.max(options.at_once));
    bed.kubectl(&["create", "-f", "-"], &objects(options, pods))?;
    let conflist = repo.root().join("manifests/base/10-hachi.conflist");
    let plugins = [
        Plugin::hachi(&conflist)?,
        Plugin::reference("ptp", options.dual)?,
        Plugin::reference("bridge", options.dual)?,
    ];
    let namespaces = (0..pods)
        .map(|_| Netns::new())
        .collect::<Result<Vec<_>>>()?;
    let mut measured = plugins.each_ref().map(|_| Measured::default());
    let mut rng = Rng::new(options.common.seed);
    // Once unmeasured: files and caches are warm, the bridge exists, and nobody fails.
    for round in 0..=options.common.repetitions {
        let mut order: Vec<usize> = (0..plugins.len()).collect();
        rng.shuffle(&mut order);
        for index in order {
            let mut attachments = Vec::new();
            for (number, netns) in namespaces.iter().enumerate() {
                attachments.push(Attachment::new(
                    format!("{round:04}{number:04}{:08x}", rng.below(1 << 30)),
                    netns.path(),
                    format!("pod-{number}"),
                ));
            }
            let mut unmeasured = Measured::default();
            let into = match round {
                0 => &mut unmeasured,
                _ => &mut measured[index],
            };
            once(node, &plugins[index], &attachments, options, into)
                .with_context(|| format!("{}, repetition {round}", plugins[index].name))?;
        }
    }
    Ok(report(options, &measured))
}

/// One plugin in one repetition.
fn once(
    node: &Node,
    plugin: &Plugin,
    attachments: &[Attachment],
    options: &Options,
    into: &mut Measured,
) -> Result<()> {
    let alone = &attachments[..usize::from(options.alone)];
    let (adds, dels) = on_node(node, || -> Result<_> {
        let (mut adds, mut dels) = (Vec::new(), Vec::new());
        for attachment in alone {
            adds.push(plugin.timed("ADD", attachment)?);
            dels.push(plugin.timed("DEL", attachment)?);
            // The next one is to be alone too, not to wait for what this one left to others.
            settle()?;
        }
        Ok((adds, dels))
    })??;
    into.add.add_durations(&adds);
    into.del.add_durations(&dels);

    let many = &attachments[..usize::from(options.at_once)];
    let (wall, adds) = at_once(node, plugin, "ADD", many)?;
    into.adds.add_durations(&adds);
    into.adds_wall.add_durations(&[wall]);
    let started = Instant::now();
    let (wall, dels) = at_once(node, plugin, "DEL", many)?;
    into.dels.add_durations(&dels);
    into.dels_wall.add_durations(&[wall]);
    on_node(node, settle)??;
    into.gone_wall.add_durations(&[started.elapsed()]);
    Ok(())
}

/// Starts one process an attachment, all at the same moment; returns the time until the last has
/// ended and that of each.
fn at_once(
    node: &Node,
    plugin: &Plugin,
    operation: &str,
    attachments: &[Attachment],
) -> Result<(Duration, Vec<Duration>)> {
    let barrier = Barrier::new(attachments.len() + 1);
    std::thread::scope(|scope| {
        let calls: Vec<_> = attachments
            .iter()
            .map(|attachment| {
                let barrier = &barrier;
                scope.spawn(move || {
                    let entered = node.enter();
                    barrier.wait();
                    entered?;
                    plugin.timed(operation, attachment)
                })
            })
            .collect();
        barrier.wait();
        let started = Instant::now();
        let mut times = Vec::new();
        for call in calls {
            let time = call
                .join()
                .map_err(|_| anyhow::anyhow!("a caller panicked"))??;
            times.push(time);
        }
        Ok((started.elapsed(), times))
    })
}

/// Runs something on a thread inside the node.
fn on_node<T: Send>(node: &Node, work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            node.enter()?;
            Ok(work())
        });
        inside
            .join()
            .map_err(|_| anyhow::anyhow!("a thread on the node panicked"))?
    })
}

/// Waits until the calling thread's namespace has no interface of a Pod: only those that a node of
/// the cluster has by itself, and the bridge.
fn settle() -> Result<()> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let links = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let own = ["lo", "eth0", plugin::BRIDGE];
        let left: Vec<_> = links
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim()))
            .filter(|name| name.starts_with("hachi") || name.starts_with("veth"))
            .filter(|name| !own.contains(name))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("these interfaces stay: {}", left.join(", "));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The Pods that are attached, bound to a Node that nobody runs, so that no kubelet but this one
/// starts them; further ones; and policies that select them.
fn objects(options: &Options, pods: usize) -> String {
    let mut text = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n");
    let names = (0..pods)
        .map(|number| format!("pod-{number}"))
        .chain((0..options.pods).map(|number| format!("other-{number}")));
    for (number, name) in names.enumerate() {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {NAMESPACE}, \
             labels: {{app: bench, tier: \"{}\"}}}}\n\
             spec: {{nodeName: elsewhere, containers: [{{name: main, image: none}}]}}\n",
            number % 10
        );
    }
    for number in 0..options.policies {
        let _ = write!(
            text,
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
             metadata: {{name: policy-{number}, namespace: {NAMESPACE}}}\n\
             spec:\n  podSelector: {{matchLabels: {{app: bench}}}}\n  ingress:\n  \
             - from: [{{podSelector: {{matchLabels: {{tier: \"{}\"}}}}}}]\n    \
             ports: [{{port: {}}}]\n",
            number % 10,
            8000 + number
        );
    }
    text
}

fn report(options: &Options, measured: &[Measured; 3]) -> Report {
    let columns = [
        "hachi-cni + agent",
        "ptp + host-local",
        "bridge + host-local",
        "/ptp",
        "/bridge",
    ];
    let mut report = Report::new("cni", &columns);
    report.setting("alone", options.alone);
    report.setting("at once", options.at_once);
    report.setting("further Pods", options.pods);
    report.setting("policies", options.policies);
    report.setting("family", if options.dual { "dual" } else { "IPv4" });
    report.setting("times in", "ms");
    use Promise::{Milliseconds, Nothing, OfBridge};
    let many = options.at_once;
    let mut row = |what: String, of: fn(&Measured) -> &Samples, percent, promise: Promise| {
        let [ours, ptp, bridge] = measured.each_ref().map(of);
        let mut values: Vec<f64> = [ours, ptp, bridge]
            .iter()
            .map(|samples| samples.percentile(percent))
            .collect();
        let to_bridge = paired_ratio(ours, bridge, percent);
        values.push(paired_ratio(ours, ptp, percent));
        values.push(to_bridge);
        let (judged, target) = match promise {
            Nothing => (f64::NAN, Target::None),
            OfBridge(most) => (to_bridge, Target::AtMost(most)),
            Milliseconds(most) => (ours.percentile(percent), Target::AtMost(most)),
        };
        report.row(what, values, judged, target);
    };
    row("ADD alone, p50".into(), |m| &m.add, 50.0, OfBridge(0.5));
    row("ADD alone, p99".into(), |m| &m.add, 99.0, Nothing);
    row("DEL alone, p50".into(), |m| &m.del, 50.0, Milliseconds(5.0));
    row("DEL alone, p99".into(), |m| &m.del, 99.0, Nothing);
    row(
        format!("{many} ADDs at once, until all are done"),
        |m| &m.adds_wall,
        50.0,
        OfBridge(0.4),
    );
    row(
        format!("{many} ADDs at once, p50 of one"),
        |m| &m.adds,
        50.0,
        Nothing,
    );
    row(
        format!("{many} ADDs at once, p99 of one"),
        |m| &m.adds,
        99.0,
        Nothing,
    );
    row(
        format!("{many} DELs at once, until all are done"),
        |m| &m.dels_wall,
        50.0,
        Nothing,
    );
    row(
        format!("{many} DELs at once, p50 of one"),
        |m| &m.dels,
        50.0,
        Nothing,
    );
    row(
        format!("{many} DELs at once, p99 of one"),
        |m| &m.dels,
        99.0,
        Nothing,
    );
    row(
        format!("{many} DELs at once, until every interface is gone"),
        |m| &m.gone_wall,
        50.0,
        Nothing,
    );
    report
}

/// What DESIGN promises of a row.
#[derive(Clone, Copy)]
enum Promise {
    Nothing,
    /// At most this part of what `bridge` takes.
    OfBridge(f64),
    /// At most this long.
    Milliseconds(f64),
}

/// Where Debian and everybody else put the reference plugins.
fn find_plugin(name: &str) -> Result<std::path::PathBuf> {
    ["/usr/lib/cni", "/opt/cni/bin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("no plugin {name}: install containernetworking-plugins (cargo xtask setup)")
        })
}
