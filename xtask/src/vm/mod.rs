//! `cargo xtask test vm`: the packet suite and namespace tests on other kernels, in virtual machines.
//!
//! ```text
//! package --unpacked--> kernel, modules ─┐
//! static tests, vm-init, binaries ───────┴─> initramfs ─> QEMU ─> ttyS0: kernel's console
//!                                                              └> ttyS1: tests' output ─> counts, table
//! ```
//! Needs no root: nothing is installed, mounted or attached on the host.

mod boot;
mod config;
mod cpio;
mod faults;
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
use std::thread;

use anyhow::{Context, Result, bail};

pub(crate) use image::Plant;
pub(crate) use qemu::Accelerator;

use crate::build;
use crate::elf;
use crate::repo::Repo;
use crate::setup::{self, Purpose};
use crate::shell::Shell;
use crate::test::Counts;
use crate::versions::VM_KERNELS;

use boot::Orders;
use config::Config;
use image::Scope;
use kernel::Kernel;
use limits::Measured;
use report::Report;

/// The page with what runs have found.
const PAGE: &str = "docs/KERNELS.md";
/// Options of the command.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub(crate) struct Options {
    /// vm: which kernel, a series (6.1) or a path; may be repeated
    #[arg(long = "kernel")]
    kernels: Vec<String>,
    /// vm: how to run the guest's instructions
    #[arg(long, value_enum)]
    accel: Option<Accelerator>,
    /// vm: write what the verifier counted into docs/KERNELS.md
    #[arg(long)]
    update: bool,
    /// vm: put a fault into the guest, to see it reported
    #[arg(long, value_enum)]
    plant: Option<Plant>,
    /// vm: put every fault into a guest of its own, and fail unless each is reported in time
    #[arg(long, conflicts_with_all = ["kernels", "only", "plant", "update"])]
    faults: bool,
}

impl Options {
    /// Whether any was given.
    pub(crate) fn given(&self) -> bool {
        *self != Self::default()
    }

    fn accelerator(&self) -> Accelerator {
        self.accel.unwrap_or(Accelerator::Auto)
    }
}

/// Puts every fault into a guest of its own; fails unless each is reported for what it is.
pub(crate) fn faults(repo: &Repo, shell: &Shell) -> Result<()> {
    let _alone = alone(repo)?;
    let toolchain = setup::ensure(repo, shell, Purpose::Vm)?;
    build::object(repo, shell, &toolchain)?;
    faults::run(repo, shell)
}

/// Boots every kernel, for the tests that are named, or all; returns the outcomes by the name of the
/// closing line.
pub(crate) fn run(
    repo: &Repo,
    shell: &Shell,
    only: &[String],
    options: &Options,
) -> Result<Vec<(String, Counts)>> {
    if options.faults {
        faults(repo, shell)?;
        return Ok(Vec::new());
    }
    let _alone = alone(repo)?;
    let toolchain = setup::ensure(repo, shell, Purpose::Vm)?;
    build::object(repo, shell, &toolchain)?;
    let object = fs::read(repo.object()).context("cannot read the eBPF object")?;
    let programs = image::build(repo, shell, only)?;
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
            .map(|kernel| {
                let orders = Orders {
                    kernel,
                    programs: &programs,
                    object: &object,
                    plant: options.plant,
                    accelerator: options.accelerator(),
                };
                scope.spawn(move || orders.tell(repo, shell))
            })
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
