//! `hachi-agent`: wires the watches, the index, the compiler and the kernel together.
//!
//! ```text
//! watches (watch.rs) ──Change──┐
//!                              ├──> Agent (agent.rs), one task that owns all state ──> kernel
//! socket  (main.rs) ──Ask──────┘         └──> routes and sysctls (node.rs)
//! ```
#![forbid(unsafe_code)]

mod agent;
mod announce;
mod attachments;
mod backoff;
mod client;
mod config;
mod conflist;
mod convert;
mod events;
mod gc;
mod health;
mod http;
mod metrics;
mod news;
mod node;
mod options;
mod policy;
mod ports;
mod routing;
mod settle;
mod sockets;
mod tables;
mod timeouts;
mod watch;
mod xdp;

use std::{fs, io::IsTerminal as _, path::Path, time::Instant};

use anyhow::{Context as _, Result};
use clap::Parser as _;
use hachi_api::{ApiError, Reply};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch as value},
};
use tracing::info;
use tracing_subscriber::EnvFilter;

use crate::{
    agent::{Agent, Ask},
    events::Events,
    options::Options,
};

fn main() -> Result<()> {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|flag| flag == "--print-config")
    {
        print!("{}", config::documented());
        return Ok(());
    }
    let options = Options::parse_from(config::arguments(std::env::args_os().collect())?);
    if options.check_config {
        println!("the configuration is good");
        return Ok(());
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    hachi_kernel::share_one_heap();
    // Two threads: the one that compiles may not keep the socket waiting.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(run(options))
}

async fn run(options: Options) -> Result<()> {
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider is already installed"))?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    if let Some(parent) = options.socket.parent() {
        create_dir(parent)?;
    }
    let client =
        client::client(options.kubeconfig.as_deref(), options.api_server.as_deref()).await?;
    let (changes, changed) = mpsc::channel(4096);
    let (asks, asked) = mpsc::channel::<Ask>(256);

    let events = Events::start(client.clone(), options.node_name.clone());
    let agent = Agent::start(options.clone(), events)?;
    let meter = agent.datapath.meter().context("cannot open the maps")?;
    watch::start(&client, &changes, options.look_for_kinds);
    drop(changes);

    let (stop, stopped) = value::channel(false);
    let socket = {
        let asks = asks.clone();
        let path = options.socket.clone();
        let mut stopped = stopped.clone();
        tokio::spawn(async move {
            let shutdown = async move {
                let _ = stopped.wait_for(|stop| *stop).await;
            };
            hachi_api::serve(&path, move |request| ask(asks.clone(), request), shutdown).await
        })
    };
    if let Some(source) = options.conflist {
        tokio::spawn(conflist::keep(source, options.cni_conf_dir, asks.clone()));
    }
    tokio::spawn(announce::keep(
        client,
        options.node_name,
        options.remove_taint,
        asks.clone(),
    ));
    if let Some(address) = options.http {
        http::start(address, asks, meter).await?;
    } else {
        drop(asks);
    }
    let mut work = tokio::spawn(agent.run(changed, asked));

    info!(socket = %options.socket.display(), "serving");
    let outcome = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        ended = &mut work => ended.context("the agent's main task died").and_then(|r| r),
    };
    let _ = stop.send(true);
    socket
        .await
        .context("the socket's task died")?
        .context("the socket failed")?;
    info!("stopped; programs and maps stay and go on working");
    outcome
}

/// Passes a request to the agent's task and waits for its answer.
async fn ask(asks: mpsc::Sender<Ask>, request: hachi_api::Request) -> Reply {
    let (reply, answer) = oneshot::channel();
    let stopping = || Reply::Error {
        error: ApiError {
            code: 11,
            message: "the agent is stopping".into(),
            details: "try again once it has restarted".into(),
        },
    };
    let at = Instant::now();
    let request = Box::new(request);
    let ask = Ask::Request { request, reply, at };
    if asks.send(ask).await.is_err() {
        return stopping();
    }
    answer.await.unwrap_or_else(|_| stopping())
}

fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))
}
