//! The programs of the node's own devices: uplinks, and the VXLAN device.

use hachi_net::{Uplink, VXLAN_IFNAME};
use tracing::{info, warn};

use super::Agent;

impl Agent {
    /// Attaches to the uplinks, after their maps are written, and detaches from what is none any
    /// more.
    pub(super) fn sync_uplinks(&mut self) {
        let attached = match self.datapath.attached_uplinks() {
            Ok(attached) => attached,
            Err(error) => {
                warn!(%error, "cannot tell which uplinks are attached to");
                return;
            }
        };
        for uplink in self.node.uplinks().values() {
            let Uplink { name, index, .. } = uplink;
            if self.datapath.check_uplink(*index, name).is_ok() {
                continue;
            }
            match self.datapath.attach_uplink(*index, name) {
                Ok(kind) => info!(name, %kind, v4 = ?uplink.v4, v6 = ?uplink.v6, "uplink"),
                Err(error) => {
                    warn!(%error, name, "an uplink is not attached to; it is tried again")
                }
            }
        }
        let gone = attached.iter().filter(|name| {
            let mut uplinks = self.node.uplinks().values();
            !uplinks.any(|uplink| uplink.name == **name)
        });
        for name in gone {
            match self.datapath.detach_uplink(name) {
                Ok(()) => info!(name, "no uplink any more"),
                Err(error) => warn!(%error, name, "cannot detach from what is no uplink any more"),
            }
        }
    }

    /// Attaches to the VXLAN device if one is needed, else detaches. Tells whether its programs are in
    /// place.
    pub(super) fn sync_overlay(&mut self) -> bool {
        let device = self.node.device().map(|link| link.index);
        if let Some(index) = device.filter(|_| self.node.plan().needs_device) {
            if self.datapath.check_overlay(index, VXLAN_IFNAME).is_ok() {
                return true;
            }
            return match self.datapath.attach_overlay(index, VXLAN_IFNAME) {
                Ok(kind) => {
                    info!(name = VXLAN_IFNAME, %kind, "tunnels");
                    true
                }
                Err(error) => {
                    warn!(%error, "no tunnels; it is tried again");
                    false
                }
            };
        }
        let attached = self.datapath.attached_overlays().unwrap_or_default();
        for name in attached {
            if let Err(error) = self.datapath.detach_overlay(&name) {
                warn!(%error, name, "cannot detach from a device that no tunnel needs");
            }
        }
        false
    }
}
