//! `hachi`: asks the agent of this node and prints what it says; prepares a node for it.
#![forbid(unsafe_code)]

mod install;
mod policy;
mod print;
mod uninstall;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use hachi_api::{Client, Reply, Request, Table};

/// Looks into the Hachi agent of this node, and prepares the node for it.
#[derive(Parser)]
#[command(name = "hachi", version, about)]
struct Cli {
    /// Unix socket of the agent.
    #[arg(long, global = true, default_value = hachi_api::DEFAULT_SOCKET)]
    socket: PathBuf,

    /// Output format.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Text)]
    output: Format,

    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Install the plugin on this node and mount a BPF file system, before the agent starts.
    Install(install::Options),
    /// Take everything of Hachi off this node, after its agent has ended. Exits 3 if Pods still run.
    Uninstall(uninstall::Options),
    /// Do nothing until killed: the DaemonSet of manifests/uninstall.yaml has to run something where a
    /// node is clean.
    #[command(hide = true)]
    Stay,
    /// Whether the agent can serve Pods, and how full its maps are. Exits 1 if it cannot.
    Status,
    /// Print a table of what is in force on this node.
    Get {
        /// Which one.
        #[arg(value_enum)]
        what: What,
    },
    /// Why a flow is judged as it is, and what selects a Pod.
    #[command(subcommand)]
    Policy(policy::Command),
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Pods of this node.
    Endpoints,
    /// Service frontends and their backends.
    Services,
    /// Policy sets and what they allow.
    Policies,
    /// Addresses and blocks with their class.
    Peers,
    /// Packets and bytes by reason.
    Counters,
    /// Tracked flows.
    Conntrack,
}

impl From<What> for Table {
    fn from(what: What) -> Self {
        match what {
            What::Endpoints => Self::Endpoints,
            What::Services => Self::Services,
            What::Policies => Self::Policies,
            What::Peers => Self::Peers,
            What::Counters => Self::Counters,
            What::Conntrack => Self::Conntrack,
        }
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hachi: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let request = match &cli.command {
        Command::Install(options) => {
            install::run(options)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Uninstall(options) => return uninstall::run(options),
        Command::Stay => loop {
            std::thread::park();
        },
        Command::Status => Request::Status,
        Command::Policy(command) => command.request()?,
        Command::Get { what } => Request::Get {
            table: (*what).into(),
        },
    };
    let mut client = Client::connect(&cli.socket)
        .with_context(|| format!("no agent answers on {}", cli.socket.display()))?;
    let reply = client.call(&request)?;
    if cli.output == Format::Json {
        println!("{}", serde_json::to_string_pretty(&reply)?);
    }
    match reply {
        Reply::Status { status } => {
            if cli.output == Format::Text {
                print!("{}", print::status(&status));
            }
            Ok(if status.ready {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Reply::Table { columns, rows } => {
            if cli.output == Format::Text {
                print!("{}", print::table(&columns, &rows));
            }
            Ok(ExitCode::SUCCESS)
        }
        Reply::Trace { trace } => {
            if cli.output == Format::Text {
                print!("{}", policy::text(&trace));
            }
            Ok(policy::exit_code(&trace))
        }
        Reply::Error { error } => bail!("{error} ({})", error.details),
        Reply::Done | Reply::Pool { .. } | Reply::Pod { .. } => {
            bail!("the agent gave an answer to another question")
        }
    }
}
