//! The server by itself, to be driven by hand: `hachi-apiserver --kubeconfig PATH`.
#![forbid(unsafe_code)]

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use clap::Parser;
use hachi_apiserver::{Config, Server};
use ipnet::IpNet;
use tokio::signal::unix::{SignalKind, signal};

/// A stand-in for kube-apiserver with the controllers of a small cluster, all in memory.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where to write the kubeconfig.
    #[arg(long)]
    kubeconfig: PathBuf,
    /// Further names or addresses of the certificate.
    #[arg(long)]
    name: Vec<String>,
    /// Ranges of podCIDRs, one a family.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "10.244.0.0/16,fd00:10:244::/48"
    )]
    cluster_cidr: Vec<IpNet>,
    /// Ranges of ClusterIPs, one a family.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "10.96.0.0/16,fd00:10:96::/112"
    )]
    service_cidr: Vec<IpNet>,
    /// Deleted Pods wait for a kubelet to let go of them.
    #[arg(long)]
    kubelets: bool,
}

fn main() -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let options = Options::parse();
    let listener = TcpListener::bind(options.listen)
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    let handle = Server::start(Config {
        listeners: vec![listener],
        names: options.name,
        cluster_cidrs: options.cluster_cidr,
        service_cidrs: options.service_cidr,
        kubelets: options.kubelets,
        ..Config::default()
    })?;
    let address = handle.addresses[0];
    handle
        .write_kubeconfig(address, &options.kubeconfig)
        .with_context(|| format!("cannot write {}", options.kubeconfig.display()))?;
    println!(
        "https://{address}, kubeconfig in {}",
        options.kubeconfig.display()
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (mut interrupt, mut terminate) = (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        );
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        anyhow::Ok(())
    })?;
    handle.shutdown();
    Ok(())
}
