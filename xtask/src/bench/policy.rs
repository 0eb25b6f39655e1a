//! `bench policy`: how soon a change of a policy or a label is enforced, what policies take in the
//! kernel's maps, what the way there costs in instructions, and what a packet pays for rules.
//!
//! ```text
//! policy_bench (agent/kernel) ── events ─> ms from the API's JSON to the first packet judged anew
//!                             ├─ start ──> ms from the lists to the maps, memory
//!                             └─ packets > ns a packet
//! compile_bench (agent/compile) under callgrind ─> instructions an event
//! agent_bench (tests/cluster), with --agent ─> MiB of a release agent
//! ```
//! The events go through the agent's own calls in one process, with a real packet through the real
//! programs at the end; the API server's and the kernel's network have no part in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use super::{Common, Report, Samples, Target};
use crate::build;
use crate::cargo::{self, executables};
use crate::repo::Repo;
use crate::shell::Shell;

/// How to measure policies.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Pods in the index
    #[arg(long, default_value_t = 10_000)]
    pods: u32,
    /// Events of each kind in each repetition
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..))]
    events: u32,
    /// Leave the instructions out, which take minutes
    #[arg(long)]
    no_instructions: bool,
    /// Measure the memory of a release agent too, on a node of a large cluster
    #[arg(long)]
    pub(crate) agent: bool,
}

/// How many policies there are.
const POLICIES: [u32; 3] = [10, 1_000, 10_000];
/// Events of which instructions are counted, and the events that such a count is made of.
const COUNTED: [(&str, &str); 2] = [
    ("policy", "a policy changes"),
    ("label", "a label of a Pod here changes"),
];
const COUNTS: u32 = 10;
/// What is promised of an event, and of the start: milliseconds.
const EVENT: f64 = 50.0;
const START: f64 = 1_000.0;
/// What is promised of the agent's memory, in MiB, and of what cluster: Pods, policies, Services.
const MEMORY: f64 = 60.0;
/// What the agent may take while 1 000 nodes and 10 000 Pods only tell how they are, in percent of a CPU.
const STORM: f64 = 3.0;
const CLUSTER: [u32; 3] = [10_000, 1_000, 5_000];
/// What a packet of an established and of a new flow may cost: nanoseconds.
const PACKETS: [(&str, f64); 2] = [("established", 150.0), ("new", 1_000.0)];

struct Programs {
    kernel: PathBuf,
    compile: PathBuf,
}

/// Measures.
pub(crate) fn run(repo: &Repo, shell: &Shell, options: &Options) -> Result<Vec<Report>> {
    let programs = Programs::build(repo, shell)?;
    let mut latency = Report::new("policy", &POLICIES.map(|n| format!("{n} policies")));
    latency.setting("Pods", options.pods);
    latency.setting("events", options.events);
    events(shell, &programs, options, &mut latency)?;
    start(shell, &programs, options, &mut latency)?;
    if !options.no_instructions {
        instructions(shell, &programs, options, &mut latency)?;
    }
    let mut reports = vec![latency, packets(shell, &programs, options)?];
    if options.agent {
        reports.push(agent(repo, shell)?);
    }
    Ok(reports)
}

/// A release agent with the API and the Pods that it needs.
fn agent(repo: &Repo, shell: &Shell) -> Result<Report> {
    let mut command = cargo::cargo(repo);
    command.args([
        "build",
        "--release",
        "--message-format=json-render-diagnostics",
    ]);
    command.args(["-p", "hachi-cluster", "--example", "agent_bench"]);
    build::release_target(repo, &mut command)?;
    let built = executables(&shell.output("measuring the agent", &mut command)?)?;
    let program = &built.first().context("cargo has not built it")?.path;
    let mut command = Command::new(program);
    command
        .arg(repo.dist())
        .args(CLUSTER.map(|n| n.to_string()));
    command.env("HACHI_DIST", repo.dist());
    let text = shell.output("an agent in a large cluster", &mut command)?;
    let line: Value = serde_json::from_str(text.trim()).context("unreadable output")?;
    let columns = ["start to ready, ms", "MiB", "peak MiB", "CPU % in a storm"];
    let mut report = Report::new("policy-agent", &columns);
    for (what, count) in ["Pods", "policies", "Services"].iter().zip(CLUSTER) {
        report.setting(what, count);
    }
    let memory = value(&line, "residentKiB") / 1024.0;
    let peak = value(&line, "peakKiB") / 1024.0;
    let storm = value(&line, "stormPercent");
    let row = vec![value(&line, "readyMs"), memory, peak, storm];
    report.row("agent", row.clone(), memory, Target::AtMost(MEMORY));
    report.row("heartbeats", row, storm, Target::AtMost(STORM));
    Ok(report)
}

impl Programs {
    fn build(repo: &Repo, shell: &Shell) -> Result<Self> {
        let mut command = cargo::cargo(repo);
        command.args([
            "build",
            "--release",
            "--message-format=json-render-diagnostics",
        ]);
        command.args(["-p", "hachi-kernel", "--example", "policy_bench"]);
        command.args(["-p", "hachi-compile", "--example", "compile_bench"]);
        build::release_target(repo, &mut command)?;
        let built = executables(&shell.output("measuring programs", &mut command)?)?;
        let find = |name: &str| {
            let found = built.iter().find(|it| it.name == name);
            let found = found.with_context(|| format!("cargo has not built {name}"))?;
            anyhow::Ok(found.path.clone())
        };
        Ok(Self {
            kernel: find("policy_bench")?,
            compile: find("compile_bench")?,
        })
    }
}

/// Runs a measuring program, which prints one JSON object a line.
fn lines(shell: &Shell, name: &str, program: &Path, args: &[String]) -> Result<Vec<Value>> {
    let text = shell.output(name, Command::new(program).args(args))?;
    let parse = |line: &str| serde_json::from_str(line).context("unreadable output");
    text.lines().map(parse).collect()
}

fn value(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or(f64::NAN)
}

/// Numbers of every count of policies, by what they are of.
type Table = BTreeMap<String, [Samples; POLICIES.len()]>;

fn events(
    shell: &Shell,
    programs: &Programs,
    options: &Options,
    report: &mut Report,
) -> Result<()> {
    let mut times: [Table; 2] = Default::default();
    let mut writes = Table::new();
    let mut maps: [Table; 2] = Default::default();
    for _ in 0..options.common.repetitions {
        for (at, policies) in POLICIES.iter().enumerate() {
            let args = [
                "events".into(),
                options.pods.to_string(),
                policies.to_string(),
            ];
            let args = [&args[..], &[options.events.to_string()]].concat();
            let name = format!("{policies} policies");
            for line in lines(shell, &name, &programs.kernel, &args)? {
                let what = line["what"].as_str().unwrap_or_default().to_owned();
                let add = |table: &mut Table, name: &str| {
                    let samples = table.entry(what.clone()).or_default();
                    samples[at].add(vec![value(&line, name)]);
                };
                if line.get("p50").is_some() {
                    add(&mut times[0], "p50");
                    add(&mut times[1], "p99");
                    add(&mut writes, "writes");
                } else {
                    add(&mut maps[0], "entries");
                    add(&mut maps[1], "bytes");
                }
            }
        }
    }
    let medians = |samples: &[Samples; 3]| samples.each_ref().map(|s| s.percentile(50.0)).to_vec();
    for (what, p99) in &times[1] {
        let row = medians(&times[0][what]);
        report.row(format!("{what}: p50, ms"), row, f64::NAN, Target::None);
        let row = medians(p99);
        let worst = row.last().copied().unwrap_or(f64::NAN);
        report.row(
            format!("{what}: p99, ms"),
            row,
            worst,
            Target::AtMost(EVENT),
        );
        let row = medians(&writes[what]);
        report.row(format!("{what}: writes"), row, f64::NAN, Target::None);
    }
    for (what, entries) in &maps[0] {
        let row = medians(entries);
        report.row(format!("{what}: entries"), row, f64::NAN, Target::None);
        let row = medians(&maps[1][what]).iter().map(|b| b / 1024.0).collect();
        report.row(format!("{what}: KiB"), row, f64::NAN, Target::None);
    }
    Ok(())
}

/// 10 000 Services and as many policies as there are columns.
fn start(shell: &Shell, programs: &Programs, options: &Options, report: &mut Report) -> Result<()> {
    const SERVICES: u32 = 10_000;
    let mut whole: [Samples; 3] = Default::default();
    let mut memory: [Samples; 3] = Default::default();
    for _ in 0..options.common.repetitions {
        for (at, policies) in POLICIES.iter().enumerate() {
            let args = [options.pods, *policies, SERVICES].map(|n| n.to_string());
            let args = [&["start".to_owned()][..], &args].concat();
            let name = format!("start with {policies} policies");
            for line in lines(shell, &name, &programs.kernel, &args)? {
                whole[at].add(vec![value(&line, "index") + value(&line, "kernel")]);
                memory[at].add(vec![value(&line, "kB") / 1024.0]);
            }
        }
    }
    let medians = |samples: &[Samples; 3]| samples.each_ref().map(|s| s.percentile(50.0)).to_vec();
    let row = medians(&whole);
    let judged = row[1];
    report.row(
        format!("start with {SERVICES} Services, from lists to maps: ms"),
        row,
        judged,
        Target::AtMost(START),
    );
    let row = medians(&memory);
    report.row(
        "index, compiler and image: MiB",
        row,
        f64::NAN,
        Target::None,
    );
    Ok(())
}

/// Instructions an event: what a run with some events takes more than one without.
fn instructions(
    shell: &Shell,
    programs: &Programs,
    options: &Options,
    report: &mut Report,
) -> Result<()> {
    let count = |kind: &str, policies: u32, events: u32| -> Result<f64> {
        let mut command = Command::new("valgrind");
        command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
        command.arg("--log-fd=1").arg(&programs.compile);
        command.args([options.pods, policies, 0].map(|n| n.to_string()));
        command.env("HACHI_COUNT", kind);
        command.env("HACHI_EVENTS", events.to_string());
        let name = format!("{events} times {kind} under callgrind");
        let log = shell.output(&name, &mut command);
        collected(
            &log.context("valgrind is needed: run without --no-build, or with --no-instructions")?,
        )
    };
    let mut rows = COUNTED.map(|_| Vec::new());
    for policies in POLICIES {
        let none = count("nothing", policies, 0)?;
        for ((kind, _), row) in COUNTED.iter().zip(&mut rows) {
            let some = count(kind, policies, COUNTS)?;
            row.push((some - none) / f64::from(COUNTS) / 1e6);
        }
    }
    for ((_, what), row) in COUNTED.iter().zip(rows) {
        let what = format!("{what}: million instructions");
        report.row(what, row, f64::NAN, Target::None);
    }
    Ok(())
}

/// The instructions that callgrind says it has counted: `==1== Collected : 1234`.
fn collected(log: &str) -> Result<f64> {
    let line = log.lines().find(|line| line.contains("Collected :"));
    let count = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    match count {
        Some(count) => Ok(count),
        None => bail!("callgrind has not said how many instructions it counted"),
    }
}

fn packets(shell: &Shell, programs: &Programs, options: &Options) -> Result<Report> {
    let mut rules: Vec<String> = Vec::new();
    let mut values: BTreeMap<(usize, usize), Samples> = BTreeMap::new();
    for _ in 0..options.common.repetitions {
        let lines = lines(shell, "packets", &programs.kernel, &["packets".into()])?;
        rules = (lines.iter())
            .map(|line| format!("{} rules", value(line, "rules")))
            .collect();
        for (column, line) in lines.iter().enumerate() {
            for (row, (name, _)) in PACKETS.iter().enumerate() {
                let samples = values.entry((row, column)).or_default();
                // New flows are one call each, whose own cost is that of a packet let go at once.
                let floor = if *name == "new" {
                    value(line, "floor")
                } else {
                    0.0
                };
                samples.add(vec![value(line, name) - floor]);
            }
        }
    }
    let columns: Vec<String> = rules
        .into_iter()
        .chain(["last over first".to_owned()])
        .collect();
    let mut report = Report::new("policy-packets", &columns);
    for (row, (name, most)) in PACKETS.iter().enumerate() {
        let of = |column: usize| values.get(&(row, column)).map(|s| s.percentile(50.0));
        let mut numbers: Vec<f64> = (0..columns.len() - 1).filter_map(of).collect();
        let last = numbers.last().copied().unwrap_or(f64::NAN);
        numbers.push(last / numbers.first().copied().unwrap_or(f64::NAN));
        let what = format!("{name}: ns a packet");
        report.row(what, numbers, last, Target::AtMost(*most));
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callgrind_is_read() -> Result<()> {
        let log = "==7== Events    : Ir\n==7== Collected : 123456\n==7== \n";
        assert_eq!(collected(log)?, 123_456.0);
        assert!(collected("==7== killed\n").is_err());
        Ok(())
    }
}
