//! The network of one Pod: its namespace, and the plugins that set it up and take it down.

use std::{net::IpAddr, sync::Arc};

use anyhow::{Result, bail};
use serde_json::Value;

use crate::{
    cni::{self, Conflist, Host, Sandbox},
    names::ClusterId,
    netns::Netns,
    node::Node,
};

/// A namespace to be made and set up.
pub(super) struct Order {
    pub(super) id: ClusterId,
    pub(super) node: Arc<Node>,
    pub(super) uid: String,
    pub(super) container: String,
    pub(super) args: Vec<(&'static str, String)>,
    pub(super) ports: Vec<Value>,
}

/// A namespace that plugins have been called for.
pub(super) struct Attached {
    pub(super) netns: Arc<Netns>,
    node: Arc<Node>,
    host: Host,
    list: Conflist,
    sandbox: Sandbox,
    result: Option<Value>,
}

impl Order {
    /// Makes the namespace and runs ADD; on failure runs DEL, as runtimes do. Blocks.
    pub(super) fn carry_out(self) -> Result<(Attached, Vec<IpAddr>)> {
        let list = Conflist::first_in(&self.node.dir.join("net.d"))?;
        let host = Host {
            place: self.node.place(),
            id: self.id.clone(),
        };
        let netns = Arc::new(Netns::create(&self.id.pod(&self.uid))?);
        let path = self
            .node
            .mntns
            .bind_netns(&netns)?
            .to_string_lossy()
            .into_owned();
        let sandbox = Sandbox {
            container: self.container,
            netns: path,
            args: self.args,
            ports: self.ports,
        };
        let mut attached = Attached {
            netns,
            node: self.node,
            host,
            list,
            sandbox,
            result: None,
        };
        match attached.add() {
            Ok(addresses) => Ok((attached, addresses)),
            Err(error) => {
                attached.detach();
                Err(error)
            }
        }
    }
}

impl Attached {
    fn add(&mut self) -> Result<Vec<IpAddr>> {
        let result = self.list.add(&self.host, &self.sandbox)?;
        let addresses = cni::addresses(&result);
        self.result = Some(result);
        if addresses.is_empty() {
            bail!("the plugin's result has no address");
        }
        Ok(addresses)
    }

    /// Runs DEL and gives the namespace up; errors are logged, as nobody could do more about them.
    /// Blocks.
    pub(super) fn detach(&self) {
        let deleted = self
            .list
            .del(&self.host, &self.sandbox, self.result.as_ref());
        let unbound = self.node.mntns.unbind_netns(&self.netns);
        if let Err(error) = deleted.and(unbound) {
            let container = &self.sandbox.container;
            tracing::error!(container, error = format!("{error:#}"), "DEL failed");
        }
    }
}
