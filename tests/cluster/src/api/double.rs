//! The built-in double, on a thread of this process.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context as _, Result, anyhow};
use hachi_apiserver::{Config, Handle, Server, Store};

use super::{Api, Backend, PORT, rbac};
use crate::{netns::Netns, options::Family};

/// A running double.
#[derive(Debug)]
pub(super) struct Double {
    handle: Handle,
}

impl Double {
    pub(super) fn store(&self) -> &Store {
        &self.handle.store
    }
}

pub(super) fn start(family: Family, fabric: &Netns) -> Result<Api> {
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut listeners = vec![TcpListener::bind((loopback, 0)).context("listen on the loopback")?];
    let server = listeners[0]
        .local_addr()
        .context("ask for the listener's port")?;
    let inside: Vec<_> = family
        .fabric()
        .into_iter()
        .map(|ip| SocketAddr::new(ip, PORT))
        .collect();
    let bound = fabric.enter(|| {
        inside
            .iter()
            .map(TcpListener::bind)
            .collect::<std::io::Result<Vec<_>>>()
    })?;
    listeners.extend(bound.context("listen on the bridge")?);
    let first = *inside.first().context("no address family")?;
    let agent = rbac::agent()?;
    let config = Config {
        grants: vec![agent.clone()],
        listeners,
        advertise: inside,
        cluster_cidrs: family.cluster_cidrs(),
        service_cidrs: family.service_cidrs(),
        kubelets: true,
        ..Config::default()
    };
    let handle = Server::start(config).map_err(|error| anyhow!(error))?;
    Ok(Api {
        server,
        kubeconfig: handle.kubeconfig(server),
        node_kubeconfig: handle.kubeconfig_for(first, &agent),
        kubelet_kubeconfigs: Vec::new(),
        backend: Backend::Double(Double { handle }),
    })
}
