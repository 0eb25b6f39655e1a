//! `cargo xtask ci`: everything that a change has to pass, with a table at the end.
//!
//! A failed step does not keep the later ones from running where they can: one run shows all that
//! is wrong.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::build::{self, Mode};
use crate::cargo;
use crate::cluster;
use crate::deny;
use crate::manifests;
use crate::preflight;
use crate::repo::Repo;
use crate::setup::{self, Purpose};
use crate::shell::{Shell, seconds};
use crate::test::{self, Filter};
use crate::vm;

/// Steps and how they ended.
struct Run<'a> {
    shell: &'a Shell,
    rows: Vec<(String, Duration, bool)>,
}

impl Run<'_> {
    fn step(&mut self, name: &str, task: impl FnOnce() -> Result<()>) -> bool {
        self.shell.say(&format!("== {name}"));
        let started = Instant::now();
        let result = task();
        if let Err(error) = &result {
            self.shell.say(&format!("{name}: {error:#}"));
        }
        self.rows
            .push((name.to_owned(), started.elapsed(), result.is_ok()));
        result.is_ok()
    }
}

/// Runs everything.
pub(crate) fn run(repo: &Repo, shell: &Shell) -> Result<()> {
    preflight::check()?;
    let started = Instant::now();
    let mut run = Run {
        shell,
        rows: Vec::new(),
    };
    let mut lines = Vec::new();
    let cargo = |arguments: &[&str]| {
        let mut command = cargo::cargo(repo);
        command.args(arguments);
        command
    };
    run.step("lock file", || {
        shell.step("lock file", &mut cargo(&["fetch", "--locked"]))
    });
    run.step("format", || {
        shell.step("fmt", &mut cargo(&["fmt", "--all", "--check"]))
    });
    run.step("layout", || {
        shell.step(
            "layout",
            &mut cargo(&["test", "-p", "hachi-abi", "--test", "layout"]),
        )
    });
    run.step("licences", || deny::check(repo, shell));
    let built = run.step("setup", || setup::run(repo, shell, false))
        && run.step("build", || {
            let toolchain = setup::ensure(repo, shell, Purpose::Run)?;
            build::run(repo, shell, &toolchain, Mode::Debug)
        });
    run.step("manifests", || manifests::run(repo, shell, true));
    run.step("clippy", || {
        let arguments = ["clippy", "--all-targets", "--", "-D", "warnings"];
        shell.step("clippy", &mut cargo(&arguments))
    });
    for level in test::LEVELS {
        if !built && level != test::Level::Unit {
            continue;
        }
        run.step(&format!("test {}", level.name()), || {
            let counts = test::run_level(repo, shell, level, &Filter::default())?;
            lines.push((level.name().to_owned(), counts));
            if counts.failed == 0 {
                Ok(())
            } else {
                bail!("{counts}")
            }
        });
    }
    if built {
        run.step("test vm", || {
            let results = vm::run(repo, shell, &[], &vm::Options::default())?;
            let judged = test::judge_all(&results);
            lines.extend(results);
            judged
        });
        run.step("test vm faults", || vm::faults(repo, shell));
        run.step("demo", || {
            let status = cluster::command(repo).arg("demo").status()?;
            if status.success() {
                Ok(())
            } else {
                bail!("the demo ended with {status}")
            }
        });
    }
    println!();
    for (name, took, good) in &run.rows {
        println!(
            "{name:<16} {:>12}  {}",
            seconds(*took),
            if *good { "ok" } else { "FAILED" }
        );
    }
    println!("{:<16} {:>12}", "total", seconds(started.elapsed()));
    for (name, counts) in lines {
        println!("{name}: {counts}");
    }
    let failed = run.rows.iter().filter(|(_, _, good)| !good).count();
    if failed == 0 {
        Ok(())
    } else {
        bail!("{failed} of {} steps failed", run.rows.len())
    }
}
