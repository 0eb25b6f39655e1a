//! `bench services`: connections through Services beside those without, and beside rules of iptables and
//! nftables as kube-proxy writes them; what Services take to load, to change and to look up.
//!
//! ```text
//! service_bench (agent/kernel) ── traffic ─> microseconds a transaction, of every lane
//!                              ├─ load ────> ms from the lists to the maps, memory
//!                              ├─ events ──> ms from the API's JSON to the last write
//!                              └─ lookups ─> ns for the first packet of a connection
//! ```
//! Client and server are pinned to one core, so that a rate is a cost; all lanes run in every
//! repetition, in random order, and what is judged is the median of the ratios within repetitions.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use super::{Common, Report, Samples, Target, paired_ratio};
use crate::build;
use crate::cargo::{self, executables};
use crate::repo::Repo;
use crate::shell::Shell;

/// How to measure Services.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// A look at whether it works: two repetitions and fewer Services
    #[arg(long)]
    quick: bool,
}

/// How many Services there are.
const SERVICES: [usize; 3] = [10, 1_000, 10_000];
const FEW_SERVICES: [usize; 2] = [10, 1_000];
/// How many are loaded, and among which a connection is looked up.
const MANY: usize = 100_000;
const FEWER: usize = 10_000;
/// Events of each kind.
const EVENTS: usize = 300;

/// What is promised: of a bare veth pair, of the same with ten Services, of iptables, and milliseconds.
const OF_VETH: [(&str, f64); 2] = [("TCP_RR", 1.08), ("TCP_CRR", 1.10)];
const GROWTH: f64 = 1.10;
const OF_IPTABLES: f64 = 1.0;
const EVENT: f64 = 10.0;

/// Measures.
pub(crate) fn run(repo: &Repo, shell: &Shell, options: &Options) -> Result<Vec<Report>> {
    let program = build(repo, shell)?;
    let services: &[usize] = if options.quick {
        &FEW_SERVICES
    } else {
        &SERVICES
    };
    let repetitions = if options.quick {
        options.common.repetitions.min(2)
    } else {
        options.common.repetitions
    };
    let run = |name: &str, arguments: &[String]| -> Result<Vec<Value>> {
        // Others of a busy machine wait.
        let mut command = Command::new("nice");
        command.args(["-n", "-20"]).arg(&program).args(arguments);
        let text = shell.output(name, &mut command)?;
        let parse = |line: &str| serde_json::from_str(line).context("unreadable output");
        text.lines().map(parse).collect()
    };
    let mut arguments = vec!["traffic".to_owned(), repetitions.to_string()];
    arguments.push(options.common.seed.to_string());
    arguments.extend(services.iter().map(ToString::to_string));
    let runs = run("traffic", &arguments)?;
    let mut traffic = traffic(&runs, services);
    traffic.setting("runs of", "0.4 s");
    if options.quick {
        traffic.setting("quick: repetitions", repetitions);
    }

    let many = if options.quick { FEWER } else { MANY };
    let mut scale = Report::new("services-scale", &["value"]);
    scale.setting("Services", many);
    scale.setting("endpoints each", 3);
    let of = |name: &str, count: usize, more: &[usize]| {
        let mut arguments = vec![name.to_owned(), count.to_string()];
        arguments.extend(more.iter().map(ToString::to_string));
        run(name, &arguments)
    };
    for line in of("load", many, &[])? {
        for (name, what, divisor) in [
            ("index", "taken in from the lists: ms", 1.0),
            ("kernel", "compiled and written: ms", 1.0),
            ("writes", "writes", 1.0),
            ("kB", "index, compiler and image: MiB", 1024.0),
            ("maps kB", "all maps: MiB", 1024.0),
        ] {
            let value = vec![value(&line, name) / divisor];
            scale.row(what, value, f64::NAN, Target::None);
        }
    }
    for line in of("lookups", many, &[])? {
        for (name, what) in [
            ("ten", "a new connection among 10 Services: ns"),
            ("many", "the same among all: ns"),
        ] {
            scale.row(what, vec![value(&line, name)], f64::NAN, Target::None);
        }
        let ratio = value(&line, "ratio");
        let what = "all over 10";
        scale.row(what, vec![ratio], ratio, Target::AtMost(GROWTH));
    }
    for line in of("events", FEWER, &[EVENTS])? {
        let what = line["what"].as_str().unwrap_or_default();
        for (percent, target) in [("p50", Target::None), ("p99", Target::AtMost(EVENT))] {
            let time = value(&line, percent);
            let what = format!("{what}, {FEWER} Services, {percent}: ms");
            scale.row(what, vec![time], time, target);
        }
    }
    Ok(vec![traffic, scale])
}

fn build(repo: &Repo, shell: &Shell) -> Result<PathBuf> {
    let mut command = cargo::cargo(repo);
    command.args([
        "build",
        "--release",
        "--message-format=json-render-diagnostics",
    ]);
    command.args(["-p", "hachi-kernel", "--example", "service_bench"]);
    build::release_target(repo, &mut command)?;
    let built = executables(&shell.output("measuring program", &mut command)?)?;
    let found = built.into_iter().find(|it| it.name == "service_bench");
    Ok(found.context("cargo has not built service_bench")?.path)
}

fn value(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or(f64::NAN)
}

/// The table of all lanes: microseconds, and over a bare veth pair.
fn traffic(runs: &[Value], services: &[usize]) -> Report {
    let columns: Vec<String> = services.iter().map(|n| format!("{n} Services")).collect();
    let mut report = Report::new("services", &columns);
    let mut samples: BTreeMap<(String, String), Samples> = BTreeMap::new();
    for run in runs {
        let text = |name: &str| run[name].as_str().unwrap_or_default().to_owned();
        samples
            .entry((text("what"), text("lane")))
            .or_default()
            .add(vec![value(run, "us")]);
    }
    let none = Samples::default();
    for (kind, promised) in OF_VETH {
        let of = |lane: &str| {
            let lane = samples.get(&(kind.to_owned(), lane.to_owned()));
            lane.unwrap_or(&none)
        };
        let veth = of("bare veth");
        for lane in ["bare veth", "routed", "hachi, Pod"] {
            let row = vec![of(lane).percentile(50.0); services.len()];
            let what = format!("{kind}, {lane}: us");
            report.row(what, row, f64::NAN, Target::None);
        }
        let each = |who: &str, make: &dyn Fn(&Samples) -> f64| -> Vec<f64> {
            let lanes = services.iter().map(|n| format!("{who}, {n}"));
            lanes.map(|lane| make(of(&lane))).collect()
        };
        for who in ["hachi", "iptables", "nftables"] {
            let row = each(who, &|lane| lane.percentile(50.0));
            let what = format!("{kind}, {who}, ClusterIP: us");
            report.row(what, row, f64::NAN, Target::None);
        }
        let last = |row: &[f64]| row.last().copied().unwrap_or(f64::NAN);
        for lane in ["routed", "hachi, Pod"] {
            let row = vec![paired_ratio(of(lane), veth, 50.0); services.len()];
            let what = format!("{kind}, {lane} over bare veth");
            report.row(what, row, f64::NAN, Target::None);
        }
        for (who, target) in [
            ("hachi", Target::AtMost(promised)),
            ("iptables", Target::None),
            ("nftables", Target::None),
        ] {
            let row = each(who, &|lane| paired_ratio(lane, veth, 50.0));
            let judged = last(&row);
            let what = format!("{kind}, {who}, ClusterIP over bare veth");
            report.row(what, row, judged, target);
        }
        let first = format!("hachi, {}", services[0]);
        let row = each("hachi", &|lane| paired_ratio(lane, of(&first), 50.0));
        let judged = last(&row);
        let what = format!("{kind}, hachi over hachi with {}", services[0]);
        report.row(what, row, judged, Target::AtMost(GROWTH));
        for (who, target) in [
            ("iptables", Target::AtMost(OF_IPTABLES)),
            ("nftables", Target::None),
        ] {
            let row = services
                .iter()
                .map(|n| {
                    let (ours, theirs) = (format!("hachi, {n}"), format!("{who}, {n}"));
                    paired_ratio(of(&ours), of(&theirs), 50.0)
                })
                .collect::<Vec<_>>();
            let judged = last(&row);
            let what = format!("{kind}, hachi over {who}");
            report.row(what, row, judged, target);
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ratios_are_of_lanes_in_one_repetition() {
        let run = |lane: &str, us: f64| json!({"what": "TCP_RR", "lane": lane, "us": us});
        let mut runs = Vec::new();
        for scale in [1.0, 8.0, 1.0] {
            runs.extend([
                run("bare veth", 10.0 * scale),
                run("hachi, 10", 10.5 * scale),
                run("iptables, 10", 14.0 * scale),
            ]);
        }
        let common = Common {
            seed: 1,
            repetitions: 3,
            check: false,
            no_build: false,
        };
        let text = traffic(&runs, &[10]).text(&common);
        let line = |what: &str| -> String {
            let line = text.lines().find(|line| line.contains(what)).unwrap();
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert!(line("TCP_RR, hachi, ClusterIP over bare veth").contains("1.05 <= 1.08: met"));
        assert!(line("TCP_RR, iptables, ClusterIP over bare veth").contains("1.40"));
        assert!(line("TCP_RR, hachi over iptables").contains("0.75"));
        assert!(line("TCP_CRR, hachi over iptables").contains("MISSED"));
    }
}
