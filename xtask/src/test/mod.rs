//! `cargo xtask test`: builds what a level needs, runs its test programs one by one, and closes with
//! one line a level.

mod doc;
mod libtest;
mod plan;

use std::time::Duration;

use anyhow::{Result, bail};

pub(crate) use libtest::{Counts, count, unrun};
pub(crate) use plan::{Filter, Level, level_of, targets, wanted};

use crate::build::{self, Mode};
use crate::cargo::{self, Executable, Metadata, executables};
use crate::repo::Repo;
use crate::setup::{self, Purpose};
use crate::shell::{Done, Shell};
use crate::vm;

/// Lines of a failed test program's output that are shown.
const TAIL: usize = 60;

/// The order in which levels run.
pub(crate) const LEVELS: [Level; 4] = [Level::Unit, Level::Packet, Level::Netns, Level::Cluster];

/// Runs levels; fails if any test did.
pub(crate) fn run(
    repo: &Repo,
    shell: &Shell,
    levels: &[Level],
    filter: &Filter,
    machines: &vm::Options,
) -> Result<()> {
    let on_machines = levels.contains(&Level::Vm);
    if machines.given() && !on_machines {
        bail!(
            "--kernel, --accel, --update, --plant and --faults are options of `cargo xtask test vm`"
        );
    }
    if on_machines && !filter.packages.is_empty() {
        bail!("`cargo xtask test vm` knows no packages: name tests by --only");
    }
    let all = levels.is_empty() || levels.contains(&Level::All);
    let asked = LEVELS
        .into_iter()
        .filter(|level| all || levels.contains(level));
    let asked = plan::with_tests(&Metadata::workspace(repo)?, asked, filter, on_machines)?;
    let mut results = Vec::new();
    for level in asked {
        let counts = run_level(repo, shell, level, filter).unwrap_or_else(|error| {
            // The other levels can still say what they have to say.
            shell.say(&format!("{}: {error:#}", level.name()));
            Counts {
                failed: 1,
                ..Counts::default()
            }
        });
        results.push((level.name().to_owned(), counts));
    }
    if on_machines {
        results.extend(vm::run(repo, shell, &filter.only, machines)?);
    }
    for (name, counts) in &results {
        println!("{name}: {counts}");
    }
    judge_all(&results)
}

/// Fails if any test did.
pub(crate) fn judge_all(results: &[(String, Counts)]) -> Result<()> {
    let failed: Vec<&str> = results
        .iter()
        .filter(|(_, counts)| counts.failed > 0)
        .map(|(name, _)| name.as_str())
        .collect();
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("tests failed: {}", failed.join(", "))
    }
}

/// Runs one level.
pub(crate) fn run_level(
    repo: &Repo,
    shell: &Shell,
    level: Level,
    filter: &Filter,
) -> Result<Counts> {
    prepare(repo, shell, level)?;
    let metadata = Metadata::workspace(repo)?;
    let Some(selection) = plan::selection(&metadata, level, filter) else {
        bail!("there is no {} test", level.name());
    };
    let mut build = cargo::cargo(repo);
    build
        .args([
            "test",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ])
        .args(selection);
    let messages = shell.output(&format!("{} tests: build", level.name()), &mut build)?;
    let mut counts = Counts::default();
    for program in executables(&messages)?.iter().filter(|built| built.test) {
        counts.add(run_program(repo, shell, level, program)?);
    }
    if level == Level::Unit && filter.only.is_empty() {
        counts.add(doc_tests(repo, shell, &metadata, &filter.packages)?);
    }
    Ok(counts)
}

/// Builds what the tests of a level look for at run time.
fn prepare(repo: &Repo, shell: &Shell, level: Level) -> Result<()> {
    match level {
        Level::Unit => Ok(()),
        Level::Packet => {
            let toolchain = setup::ensure(repo, shell, Purpose::Build)?;
            build::object(repo, shell, &toolchain)
        }
        Level::Netns | Level::Cluster => {
            let toolchain = setup::ensure(repo, shell, Purpose::Test)?;
            build::run(repo, shell, &toolchain, Mode::Debug)
        }
        Level::Vm | Level::All => bail!("{} is no level of its own", level.name()),
    }
}

fn run_program(repo: &Repo, shell: &Shell, level: Level, program: &Executable) -> Result<Counts> {
    let mut command = std::process::Command::new(&program.path);
    cargo::clean(&mut command);
    command
        .current_dir(&program.directory)
        .env("CARGO_MANIFEST_DIR", &program.directory)
        .env("HACHI_DIST", repo.dist());
    let limit = if level == Level::Cluster {
        // Each of them has a cluster of its own: they share the machine one after the other.
        command.arg("--test-threads=1");
        Duration::from_secs(20 * 60)
    } else {
        Duration::from_secs(10 * 60)
    };
    let kind = if program.kind == "test" {
        ""
    } else {
        " (inside)"
    };
    judge(
        shell,
        &format!("{}: {}{kind}", level.name(), program.name),
        &mut command,
        limit,
    )
}

fn doc_tests(
    repo: &Repo,
    shell: &Shell,
    metadata: &Metadata,
    packages: &[String],
) -> Result<Counts> {
    let libraries: Vec<&str> = metadata
        .default_members()
        .into_iter()
        .filter(|package| packages.is_empty() || packages.contains(&package.name))
        .filter(|package| package.targets.iter().any(|target| target.kind == ["lib"]))
        .filter(|package| doc::has_examples(&package.manifest_path.with_file_name("src")))
        .map(|package| package.name.as_str())
        .collect();
    if libraries.is_empty() {
        return Ok(Counts::default());
    }
    let mut command = cargo::cargo(repo);
    command.args(["test", "--doc", "--quiet"]);
    command.args(libraries.iter().flat_map(|package| ["-p", package]));
    judge(
        shell,
        "unit: documentation",
        &mut command,
        Duration::from_secs(10 * 60),
    )
}

/// Runs a test program, counts, and shows what failed.
fn judge(
    shell: &Shell,
    name: &str,
    command: &mut std::process::Command,
    limit: Duration,
) -> Result<Counts> {
    let outcome = |done: &Done| {
        done.text()
            .map(|text| count(&text, done.status.success()))
            .unwrap_or_default()
    };
    let done = shell.attempt(name, command, limit, &|done| outcome(done).to_string())?;
    let counts = outcome(&done);
    if counts.failed > 0 {
        show_failures(shell, &done.text()?);
        shell.say(&format!("  the whole log is {}", done.log.display()));
    } else {
        for line in unrun(&done.text()?) {
            shell.say(&format!("    {line}"));
        }
    }
    Ok(counts)
}

/// Shows which tests failed, and the end of the output.
pub(crate) fn show_failures(shell: &Shell, output: &str) {
    for test in libtest::failures(output) {
        shell.say(&format!("  FAILED: {test}"));
    }
    let lines: Vec<&str> = output.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..]
        .iter()
        .for_each(|line| shell.say(line));
}
