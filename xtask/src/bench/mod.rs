//! `cargo xtask bench`: measures Hachi beside what others do, in one run on one machine.
//!
//! ```text
//! build --release ─> Bed (a cluster of its own) ─> one module a subject ─> Report
//! ```
//! Absolute times say more of the machine than of the code, so every number stands beside those of
//! the alternatives from the same run, and what is judged is the ratio: taken within each
//! repetition, then its median. What is compared runs in random order in every repetition. The
//! seed, the number of repetitions and what was configured are printed with the results.

mod bed;
mod cni;
mod nodes;
mod policy;
mod report;
mod rng;
mod services;
mod stats;

use anyhow::Result;
use clap::{Args, Subcommand};

pub(crate) use bed::Bed;
pub(crate) use report::{Report, Target};
pub(crate) use rng::Rng;
pub(crate) use stats::{Samples, paired_ratio};

use crate::build::{self, Mode};
use crate::preflight;
use crate::repo::Repo;
use crate::setup::{self, Purpose};
use crate::shell::Shell;

/// What can be measured.
#[derive(Subcommand)]
pub(crate) enum Subject {
    /// ADD and DEL, alone and many at once, beside ptp and bridge with host-local
    Cni(cni::Options),
    /// Pods of two nodes, by routes and by VXLAN, beside the same namespaces without Hachi
    Nodes(nodes::Options),
    /// From a change of a policy to the first packet judged anew; maps, instructions, ns per packet
    Policy(policy::Options),
    /// Connections through Services beside iptables and nftables; loading, changing, looking up
    Services(services::Options),
}

/// What every subject understands.
#[derive(Args, Clone, Debug)]
pub(crate) struct Common {
    /// Of the random order; the same seed repeats it
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// How often everything is measured
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repetitions: u32,
    /// Fail if a target is missed
    #[arg(long)]
    pub(crate) check: bool,
    /// Measure the binaries in target/dist as they are
    #[arg(long)]
    pub(crate) no_build: bool,
}

/// Prepares the machine, measures, prints a table and writes `target/bench/SUBJECT.json`.
pub(crate) fn run(repo: &Repo, shell: &Shell, subject: &Subject) -> Result<()> {
    let common = match subject {
        Subject::Cni(options) => &options.common,
        Subject::Nodes(options) => &options.common,
        Subject::Policy(options) => &options.common,
        Subject::Services(options) => &options.common,
    };
    prepare(repo, shell, subject, common)?;
    let reports = match subject {
        Subject::Cni(options) => vec![cni::run(repo, shell, options)?],
        Subject::Nodes(options) => vec![nodes::run(repo, shell, options)?],
        Subject::Policy(options) => policy::run(repo, shell, options)?,
        Subject::Services(options) => services::run(repo, shell, options)?,
    };
    // All are shown before a missed target fails.
    let finished: Vec<_> = (reports.iter())
        .map(|report| report.finish(repo, common))
        .collect();
    finished.into_iter().collect()
}

/// Optimised, static binaries, as they are shipped; where nothing but the compiler and the programs
/// is measured, the eBPF object.
fn prepare(repo: &Repo, shell: &Shell, subject: &Subject, common: &Common) -> Result<()> {
    preflight::check()?;
    if common.no_build {
        return Ok(());
    }
    match subject {
        Subject::Policy(options) if options.agent => {
            let toolchain = setup::ensure(repo, shell, Purpose::Measure)?;
            build::run(repo, shell, &toolchain, Mode::Release)
        }
        Subject::Cni(_) | Subject::Nodes(_) => {
            let toolchain = setup::ensure(repo, shell, Purpose::Test)?;
            build::run(repo, shell, &toolchain, Mode::Release)
        }
        Subject::Policy(_) | Subject::Services(_) => {
            let toolchain = setup::ensure(repo, shell, Purpose::Measure)?;
            build::object(repo, shell, &toolchain)
        }
    }
}
