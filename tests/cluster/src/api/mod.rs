//! The API that the cluster runs on: the real etcd and kube-apiserver where the machine has them,
//! otherwise the built-in double. Either is reached twice: by kubectl on the machine's loopback, and
//! by the nodes on the bridge.
//!
//! The real ones are looked for in `KUBEBUILDER_ASSETS`, or in `/usr/local/kubebuilder/bin`.

mod controllers;
mod double;
mod processes;
mod rbac;
mod real;

pub(crate) use real::{KUBELET, full_assets};

use std::net::SocketAddr;

use anyhow::Result;
use hachi_apiserver::Store;

use crate::{
    names::ClusterId,
    netns::Netns,
    options::{Kubelets, Options, Server},
};

/// Whether the machine has the real ones.
pub(crate) fn has_real() -> bool {
    real::assets().is_some()
}

/// The port on the bridge.
const PORT: u16 = 6443;

/// A running API.
#[derive(Debug)]
pub(crate) struct Api {
    /// Where the machine reaches it.
    pub(crate) server: SocketAddr,
    /// The kubeconfig for the machine.
    pub(crate) kubeconfig: String,
    /// The kubeconfig for the agents of the nodes.
    pub(crate) node_kubeconfig: String,
    /// The kubeconfigs of real kubelets, by node.
    pub(crate) kubelet_kubeconfigs: Vec<String>,
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Double(double::Double),
    Real(real::Real),
}

impl Api {
    /// Starts it.
    pub(crate) fn start(id: &ClusterId, options: &Options, fabric: &Netns) -> Result<Self> {
        if options.kubelets == Kubelets::Real {
            return real::start(&full_assets()?, id, options, fabric);
        }
        match real::assets() {
            Some(assets) if options.server == Server::Machine => {
                real::start(&assets, id, options, fabric)
            }
            _ => double::start(options.family, fabric),
        }
    }

    /// The double's objects, without a detour over the network; none with the real API.
    pub(crate) fn store(&self) -> Option<&Store> {
        match &self.backend {
            Backend::Double(double) => Some(double.store()),
            Backend::Real(_) => None,
        }
    }

    /// Makes the API forget what has changed so far: no watch can go on from what its client knows,
    /// all of them are told 410 Gone. The double does just that; the real one starts anew, and is
    /// away for some seconds.
    pub(crate) fn forget(&self) -> Result<()> {
        match &self.backend {
            Backend::Double(double) => double.store().expire(),
            Backend::Real(real) => real.restart()?,
        }
        Ok(())
    }

    /// Starts what the real API leaves to the controller manager and the scheduler; the double
    /// does that itself. To be called on the runtime that is to run it.
    pub(crate) fn start_controllers(&self, client: &kube::Client) {
        match &self.backend {
            Backend::Double(_) => {}
            Backend::Real(_) => controllers::spawn(client),
        }
    }

    /// Whether the API gives nodes their podCIDRs.
    pub(crate) fn assigns_cidrs(&self) -> bool {
        matches!(self.backend, Backend::Double(_))
    }
}
