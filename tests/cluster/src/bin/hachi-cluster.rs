//! `hachi-cluster`: keeps a local cluster running in the background.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};
use hachi_cluster::{
    cleanup::Reap,
    command::{self, Up},
};
use tracing_subscriber::EnvFilter;

/// A local Kubernetes cluster of network namespaces, networked by Hachi.
#[derive(Debug, Parser)]
#[command(name = "hachi-cluster", version)]
struct Cli {
    /// Where everything of the cluster is kept.
    #[arg(long, global = true, default_value = "target/cluster")]
    dir: PathBuf,
    /// The directory of the finished binaries.
    #[arg(long, global = true, default_value = "target/dist")]
    dist: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a cluster in the background, and return when it is ready.
    Up(Up),
    /// End it, and remove whatever an earlier one left behind.
    Down,
    /// Run a program in NAMESPACE/POD or node/NAME.
    Exec {
        /// NAMESPACE/POD or node/NAME.
        target: String,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        program: Vec<std::ffi::OsString>,
    },
    /// Show what runs.
    Status,
    /// Show in a few seconds how policies take effect, on a cluster of its own.
    Demo,
    /// Own a cluster until told to end (what `up` starts).
    #[command(hide = true)]
    Supervise(Up),
    /// Clean up when standard input ends (what a cluster starts).
    #[command(hide = true)]
    Reap(Reap),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let default = if matches!(cli.command, Command::Demo) {
        "error,kube_client=off"
    } else {
        // The real API's own certificate is bypassed, which the client would tell again and again.
        "info,kube_client=off"
    };
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("HACHI_CLUSTER_LOG").unwrap_or_else(|_| default.into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hachi-cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let Cli { dir, dist, command } = cli;
    match command {
        Command::Up(up) if up.foreground => command::supervise(&dir, &dist, &up, true),
        Command::Up(up) => command::up(&dir, &dist, &up),
        Command::Supervise(up) => command::supervise(&dir, &dist, &up, false),
        Command::Down => command::down(&dir),
        Command::Exec { target, program } => Err(command::exec(&dir, &target, program)),
        Command::Status => command::status(&dir),
        Command::Demo => hachi_cluster::demo::run(&dir, &dist),
        Command::Reap(reap) => reap.run(&dir).map(|()| ExitCode::SUCCESS),
    }
}
