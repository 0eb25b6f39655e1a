//! `cargo xtask test vm`: the packet suite and namespace tests on other kernels, in virtual machines.
//!
//! ```text
//! package --unpacked--> kernel, modules ─┐
//! static tests, vm-init, binaries ───────┴─> initramfs ─> QEMU ─> ttyS0: kernel's console
//!                                                              └> ttyS1: tests' output ─> counts, table
//! ```
//! Needs no root: nothing is installed, mounted or attached on the host.

mod config;
mod cpio;
mod image;
mod kernel;
mod limits;
mod module;
mod page;
mod protocol;
mod qemu;
mod report;

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub(crate) use image::Plant;
pub(crate) use qemu::Accelerator;

use crate::build;
use crate::elf;
use crate::repo::Repo;
use crate::setup::{self, Purpose};
use crate::shell::{Shell, seconds};
use crate::test::{Counts, show_failures, unrun};
use crate::versions::VM_KERNELS;

use config::Config;
use image::Scope;
use kernel::Kernel;
use limits::Measured;
use qemu::{End, Machine};
use report::Report;

/// The page with what runs have found.
const PAGE: &str = "docs/KERNELS.md";
/// The longest that one test program may take, in seconds; the translator is slow.
const TEST_LIMIT: u64 = 600;
/// The longest that a guest may be silent: longer than one test takes.
const SILENCE: Duration = Duration::from_secs(180);
/// The longest that a guest may run.
const LIMIT: Duration = Duration::from_secs(20 * 60);
/// With a planted hang: nobody wants to wait that long for what is known.
const PLANTED_SILENCE: Duration = Duration::from_secs(30);

/// Options of the command.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// vm: which kernel, a series (6.1) or a path; may be repeated
    #[arg(long = "kernel")]
    kernels: Vec<String>,
    /// vm: how to run the guest's instructions
    #[arg(long, value_enum)]
    accel: Option<Accelerator>,
    /// vm: only these test programs, by name (netns_attach or attach); `verified` alone is the quick
    /// mode: every eBPF program is shown to the verifier, and nothing else is done
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// vm: write what the verifier counted into docs/KERNELS.md
    #[arg(long)]
    update: bool,
    /// vm: put a fault into the guest, to see it reported
    #[arg(long, value_enum)]
    plant: Option<Plant>,
}

/// Boots every kernel; returns the outcomes by the name of the closing line.
pub(crate) fn run(repo: &Repo, shell: &Shell, options: &Options) -> Result<Vec<(String, Counts)>> {
    let _alone = alone(repo)?;
    let toolchain = setup::ensure(repo, shell, Purpose::Vm)?;
    build::object(repo, shell, &toolchain)?;
    let object = fs::read(repo.object()).context("cannot read the eBPF object")?;
    let programs = image::build(repo, shell, &options.only)?;
    if options.plant == Some(Plant::Verifier) {
        image::carries(&programs, &object)?;
    }
    let named = options.kernels.iter().map(String::as_str);
    let kernels: Vec<&str> = if options.kernels.is_empty() {
        VM_KERNELS.to_vec()
    } else {
        named.collect()
    };
    // Found one by one: packages are downloaded. Booted all at once: a guest is often idle, and a
    // silence is told from a slow machine by far.
    let kernels: Vec<Kernel> = kernels
        .into_iter()
        .map(|wanted| kernel::find(repo, shell, wanted))
        .collect::<Result<_>>()?;
    let reports: Vec<Result<Report>> = thread::scope(|scope| {
        let machines: Vec<_> = kernels
            .iter()
            .map(|kernel| scope.spawn(|| boot(repo, shell, options, kernel, &programs, &object)))
            .collect();
        machines
            .into_iter()
            .map(|machine| machine.join().unwrap_or_else(|_| bail!("the watcher died")))
            .collect()
    });
    let mut results = Vec::new();
    let stacks = elf::stacks(&object)?;
    let mut measured = Measured::default();
    for (kernel, report) in kernels.iter().zip(reports) {
        let name = format!("vm-{}", kernel.name);
        let report = report.with_context(|| name.clone())?;
        for (program, count) in &report.verified {
            let stack = stacks.get(program).copied().unwrap_or(0);
            shell.say(&format!(
                "  {name}: {program} took the verifier {count} instructions; {stack} bytes of stack"
            ));
        }
        let mut counts = report.counts();
        counts.failed += lacking(repo, shell, kernel)?;
        results.push((name, counts));
        // Only what was named by its series has a column.
        if !VM_KERNELS.contains(&kernel.name.as_str()) {
            continue;
        }
        let scope = programs.scope();
        if scope == Scope::Everything || !report.verified.is_empty() {
            measured.stacks(stacks.clone());
            measured.instructions(&kernel.name, report.verified);
        }
        // Some are reported by tests.
        if scope == Scope::Everything {
            measured.features(&kernel.name, report.features);
        }
    }
    if options.plant.is_none() {
        judge_limits(repo, shell, &measured, options.update, &mut results)?;
    }
    Ok(results)
}

/// How many of the options that docs/KERNELS.md asks for a supported kernel is without.
fn lacking(repo: &Repo, shell: &Shell, kernel: &Kernel) -> Result<usize> {
    let Some(config) = &kernel.config else {
        return Ok(0);
    };
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let page = read(&repo.root().join(PAGE))?;
    let lacks = Config::parse(&read(config)?).lacks(&page)?;
    for option in &lacks {
        let name = &kernel.name;
        shell.say(&format!("  vm-{name}: {option} is not set ({PAGE})"));
    }
    Ok(lacks.len())
}

/// Keeps other runs in this directory away until the file is closed: they would share its logs.
fn alone(repo: &Repo) -> Result<fs::File> {
    let path = repo.target("vm/lock");
    fs::create_dir_all(repo.target("vm"))?;
    let lock =
        fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => {
            bail!("another `cargo xtask test vm` is at work in this directory: wait for its end")
        }
        Err(fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Checks or updates the tables; each finding is a failure.
fn judge_limits(
    repo: &Repo,
    shell: &Shell,
    measured: &Measured,
    update: bool,
    results: &mut [(String, Counts)],
) -> Result<()> {
    let page = repo.root().join(PAGE);
    if update {
        measured.update(&page)?;
        shell.say("  docs/KERNELS.md is up to date");
        return Ok(());
    }
    let findings = measured.findings(&page)?;
    for finding in &findings {
        shell.say(&format!("  docs/KERNELS.md: {finding}"));
    }
    if !findings.is_empty() {
        shell.say("  if that is as it should be: cargo xtask test vm --update");
    }
    if let Some((_, counts)) = results.last_mut() {
        counts.failed += findings.len();
    }
    Ok(())
}

fn boot(
    repo: &Repo,
    shell: &Shell,
    options: &Options,
    kernel: &Kernel,
    programs: &image::Programs,
    object: &[u8],
) -> Result<Report> {
    let name = kernel.name.replace('/', "-");
    let modules = match &kernel.modules {
        Some(directory) if programs.scope() != Scope::Verifier => module::collect(directory)?,
        _ => Vec::new(),
    };
    let logs = repo.target("vm/log").join(&name);
    let initramfs = repo.target("vm").join(format!("{name}.cpio"));
    image::write(
        &initramfs,
        object,
        programs,
        &modules,
        options.plant,
        TEST_LIMIT,
    )?;
    let planted = options.plant == Some(Plant::Hang);
    let machine = Machine {
        image: &kernel.image,
        initramfs: &initramfs,
        logs: &logs,
        accelerator: options.accel.unwrap_or(Accelerator::Auto),
        silence: if planted { PLANTED_SILENCE } else { SILENCE },
        limit: LIMIT,
    };
    shell.say(&format!("  vm-{name}: boot ({} modules)", modules.len()));
    let mut report = Report::default();
    let end = machine.run(&mut |line| {
        if let Some(test) = report.line(line) {
            let took = seconds(Duration::from_millis(test.milliseconds));
            let how = if test.status == "0" {
                String::new()
            } else {
                format!(" ({})", test.status)
            };
            let step = format!("vm-{name}: {}", test.name);
            shell.say(&format!("  {step:<32} {took:>8}  {}{how}", test.counts()));
            unrun(&test.output).for_each(|line| shell.say(&format!("    {line}")));
        }
    })?;
    fs::remove_file(&initramfs).context("cannot remove the initramfs")?;
    explain(shell, &name, &machine, &report, end)?;
    Ok(report)
}

/// Says what went wrong, with the guest's own words.
fn explain(
    shell: &Shell,
    name: &str,
    machine: &Machine<'_>,
    report: &Report,
    end: End,
) -> Result<()> {
    // Several machines may end at once; each says its piece whole.
    static ONE: Mutex<()> = Mutex::new(());
    let _whole = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    for remark in &report.remarks {
        shell.say(&format!("  vm-{name}: {remark}"));
    }
    for test in report.tests.iter().filter(|test| test.counts().failed > 0) {
        shell.say(&format!("  vm-{name}: {} failed:", test.name));
        show_failures(shell, &test.output);
    }
    if report.done {
        return Ok(());
    }
    let during = match &report.running {
        Some(test) => format!("during {}", test.name),
        None if report.tests.is_empty() => "before the first test".to_owned(),
        None => "between tests".to_owned(),
    };
    let how = match end {
        End::PoweredOff => "the guest ended (a panic?)".to_owned(),
        End::Silent(time) => format!("the guest hung: silent for {}, stopped", seconds(time)),
        End::TimeLimit(time) => format!("the guest was not done after {}, stopped", seconds(time)),
    };
    shell.say(&format!(
        "  vm-{name}: FAILED: {how} {during}; its console ends:"
    ));
    shell.show_tail(&machine.console());
    if let Some(test) = &report.running {
        shell.say(&format!("  vm-{name}: the last output of {}:", test.name));
        shell.show_tail(&machine.tests());
    }
    if machine
        .console()
        .metadata()
        .is_ok_and(|meta| meta.len() == 0)
    {
        bail!(
            "the guest printed nothing at all: is {} a kernel?",
            machine.image.display()
        );
    }
    Ok(())
}
