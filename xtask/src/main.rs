//! `cargo xtask`: setup, build, the local cluster, tests, measurements and CI.
//!
//! ```text
//! ci ─> test ─> build ─> setup
//!       up, demo ─┤
//!          bench ─┘
//! ```
//! Each command calls the earlier ones that it needs, so that nobody has to know the order.
#![forbid(unsafe_code)]

mod bench;
mod build;
mod cargo;
mod ci;
mod cluster;
mod deny;
mod elf;
mod image;
mod manifests;
mod preflight;
mod remap;
mod repo;
mod setup;
mod shell;
mod test;
mod versions;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};

use repo::Repo;
use setup::Purpose;
use shell::Shell;
use test::Level;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Setup, build, the local cluster, tests and CI of Hachi"
)]
struct Options {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing (also done by the commands below)
    Setup {
        /// What `test vm` needs too
        #[arg(long)]
        vm: bool,
    },
    /// Build the eBPF object and all binaries into target/dist
    Build {
        /// Optimised and static
        #[arg(long)]
        release: bool,
    },
    /// Pack the release binaries into a container image, as an OCI archive under target/image
    Image,
    /// Write manifests/install.yaml from manifests/base
    Manifests {
        /// Only say whether it is current
        #[arg(long)]
        check: bool,
    },
    /// Start the local cluster
    Up {
        /// How many nodes
        #[arg(long, default_value_t = 2)]
        nodes: u8,
        /// The Pods' address families
        #[arg(long, default_value = "dual")]
        family: Family,
        /// Further options of the cluster program, after --
        #[arg(last = true)]
        more: Vec<String>,
    },
    /// Stop the local cluster and remove everything it made
    Down,
    /// Run a command in a Pod or on a node of the local cluster
    Exec {
        /// NAMESPACE/POD or node/NAME
        target: String,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Show a cluster that obeys a NetworkPolicy, start to end
    Demo,
    /// Run tests
    Test {
        /// What to test; everything but `vm` if none is named
        levels: Vec<Level>,
        #[command(flatten)]
        filter: test::Filter,
        #[command(flatten)]
        vm: vm::Options,
    },
    /// Measure Hachi beside what others do
    Bench {
        #[command(subcommand)]
        subject: bench::Subject,
    },
    /// Everything that a change has to pass
    Ci,
}

#[derive(Clone, Copy, ValueEnum)]
enum Family {
    V4,
    V6,
    Dual,
}

impl Family {
    fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Dual => "dual",
        }
    }
}

fn main() -> ExitCode {
    match dispatch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch() -> Result<()> {
    let options = Options::parse();
    let repo = Repo::find();
    let shell = Shell::new(&repo)?;
    match options.task {
        Task::Setup { vm } => setup::run(&repo, &shell, vm),
        Task::Build { release } => {
            let toolchain = setup::ensure(&repo, &shell, Purpose::Build)?;
            let mode = if release {
                build::Mode::Release
            } else {
                build::Mode::Debug
            };
            build::run(&repo, &shell, &toolchain, mode)
        }
        Task::Manifests { check } => manifests::run(&repo, &shell, check),
        Task::Image => image::run(&repo, &shell).map(|_| ()),
        Task::Up {
            nodes,
            family,
            more,
        } => {
            let mut arguments = [
                "up",
                "--nodes",
                &nodes.to_string(),
                "--family",
                family.name(),
            ]
            .map(str::to_owned)
            .to_vec();
            arguments.extend(more);
            cluster::run(&repo, &shell, &arguments)
        }
        Task::Down => cluster::run_built(&repo, &["down".to_owned()]),
        Task::Exec { target, command } => {
            let mut arguments = vec!["exec".to_owned(), target, "--".to_owned()];
            arguments.extend(command);
            cluster::run_built(&repo, &arguments)
        }
        Task::Demo => cluster::run(&repo, &shell, &["demo".to_owned()]),
        Task::Test { levels, filter, vm } => test::run(&repo, &shell, &levels, &filter, &vm),
        Task::Bench { subject } => bench::run(&repo, &shell, &subject),
        Task::Ci => ci::run(&repo, &shell),
    }
}
