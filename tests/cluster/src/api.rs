//! The API that the cluster runs on: the built-in double, or the real etcd and kube-apiserver.
//!
//! Either listens twice: on the machine's loopback for kubectl, and on the bridge for the nodes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context as _, Result, anyhow};
use hachi_apiserver::{Config, Handle, Server, Store};

use crate::{netns::Netns, options::Family};

/// The port on the bridge.
const PORT: u16 = 6443;

/// A running API.
#[derive(Debug)]
pub(crate) struct Api {
    /// Where the machine reaches it.
    pub(crate) server: SocketAddr,
    /// The kubeconfig for the machine.
    pub(crate) kubeconfig: String,
    /// The kubeconfig for the nodes.
    pub(crate) node_kubeconfig: String,
    handle: Handle,
}

impl Api {
    /// Starts it.
    pub(crate) fn start(family: Family, fabric: &Netns) -> Result<Self> {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let mut listeners =
            vec![TcpListener::bind((loopback, 0)).context("listen on the loopback")?];
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
        let config = Config {
            listeners,
            advertise: inside,
            cluster_cidrs: family.cluster_cidrs(),
            service_cidrs: family.service_cidrs(),
            kubelets: true,
            ..Config::default()
        };
        let handle = Server::start(config).map_err(|error| anyhow!(error))?;
        Ok(Self {
            server,
            kubeconfig: handle.kubeconfig(server),
            node_kubeconfig: handle.kubeconfig(first),
            handle,
        })
    }

    /// The objects, without a detour over the network.
    pub(crate) fn store(&self) -> &Store {
        &self.handle.store
    }
}
