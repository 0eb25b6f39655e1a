//! `hachi-pod`: what runs inside the local cluster's nodes and Pods.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, net::TcpStream, process::ExitCode, thread, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use hachi_cluster::{
    enter::Enter,
    workload::{
        ask::Ask,
        hold::Hold,
        probe::{Outcome, Protocol, Target, probe},
        serve::Serve,
        share::Share,
        stream::Stream,
    },
};

/// The server and the probes of the local cluster's Pods.
#[derive(Debug, Parser)]
#[command(name = "hachi-pod", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer on TCP, UDP and HTTP with a name.
    Serve(Serve),
    /// Ask a server for its name; exits with 1 if none answers.
    Probe {
        /// How to ask.
        protocol: Protocol,
        /// Whom to ask, as ADDRESS:PORT.
        address: SocketAddr,
        /// Milliseconds to wait for the answer.
        #[arg(long, default_value_t = 1000)]
        timeout: u64,
        /// How often to ask; every time must be answered.
        #[arg(long, default_value_t = 1)]
        count: u32,
    },
    /// Ask a server from one socket, and tell what the socket is shown of its peer.
    Ask(Ask),
    /// Ask several servers from one port at once.
    Share(Share),
    /// Take many connections in, answer each, and hold them.
    Hold(Hold),
    /// Run a TCP stream and report stalls as JSON; exits with 1 if it broke.
    Stream {
        /// Whom to connect to, as ADDRESS:PORT.
        address: SocketAddr,
        /// Seconds to run.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
    },
    /// Do nothing until killed, to hold a Pod's namespaces.
    Pause,
    /// Enter namespaces and become another program.
    #[command(hide = true)]
    Enter(Enter),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hachi-pod: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Serve(serve) => serve.run().map(|()| ExitCode::SUCCESS),
        Command::Ask(ask) => ask.run().map(|()| ExitCode::SUCCESS),
        Command::Hold(hold) => hold.run().map(|()| ExitCode::SUCCESS),
        Command::Share(share) => share.run().map(|()| ExitCode::SUCCESS),
        Command::Probe {
            protocol,
            address,
            timeout,
            count,
        } => {
            let mut code = ExitCode::SUCCESS;
            for _ in 0..count {
                let target = Target { protocol, address };
                match probe(target, Duration::from_millis(timeout)) {
                    Outcome::Answered(name) => println!("{name}"),
                    other => {
                        eprintln!("{target}: {other}");
                        code = ExitCode::FAILURE;
                    }
                }
            }
            Ok(code)
        }
        Command::Stream { address, seconds } => {
            let socket = TcpStream::connect_timeout(&address, Duration::from_secs(5))
                .with_context(|| format!("connect to {address}"))?;
            let stream = Stream::over(socket);
            for _ in 0..seconds * 10 {
                if stream.ended() {
                    break;
                }
                thread::sleep(Duration::from_millis(100));
            }
            let report = stream.stop()?;
            println!(
                "{}",
                serde_json::to_string(&report).context("print the report")?
            );
            Ok(if report.error.is_none() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Pause => loop {
            thread::park();
        },
        Command::Enter(enter) => Err(enter.exec()),
    }
}
