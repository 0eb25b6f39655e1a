//! Socket load balancing as the options want it.

use anyhow::Result;
use hachi_kernel::{Datapath, cgroup_root, cgroup2_at};
use tracing::warn;

use crate::options::{Options, SocketLb};

/// Attaches the socket programs, or detaches those of an earlier agent. Where `auto` finds no way,
/// packets are translated instead; returns what became of it.
pub(crate) fn balance(datapath: &mut Datapath, options: &Options) -> Result<String> {
    let root = match &options.cgroup_root {
        // Where there is none, attaching says so.
        Some(path) => cgroup2_at(path).or_else(|| Some(path.clone())),
        None => cgroup_root(),
    };
    let done = match (options.socket_lb, root) {
        (SocketLb::Off, _) => {
            for error in datapath.detach_sockets().err().into_iter().flatten() {
                warn!(%error, "socket programs are left behind");
            }
            return Ok("off".into());
        }
        (_, None) => Err(anyhow::anyhow!(
            "no cgroup of version 2 is mounted on /sys/fs/cgroup; name one with --cgroup-root"
        )),
        (_, Some(root)) => datapath.attach_sockets(&root).map_err(Into::into),
    };
    match (options.socket_lb, done) {
        (SocketLb::Auto, Ok(())) => Ok("all".into()),
        (_, Ok(())) => Ok("node".into()),
        // What was asked for by name must be there.
        (SocketLb::Auto, Err(error)) => {
            warn!(
                error = format!("{error:#}"),
                "no socket load balancing: packets are translated"
            );
            Ok(format!("off ({error})"))
        }
        (_, Err(error)) => Err(error.context("cannot balance sockets")),
    }
}
