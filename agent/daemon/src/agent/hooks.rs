//! The programs of the node's own devices: uplinks, the VXLAN device, the way to Services.

use hachi_kernel::Role;
use hachi_net::{SERVICES_IFNAME, Uplink, VXLAN_IFNAME};
use tracing::{info, warn};

use super::Agent;

/// Every network namespace has it, under this number.
const LOOPBACK: &str = "lo";
const LOOPBACK_IFINDEX: u32 = 1;

impl Agent {
    /// Attaches to the uplinks, after their maps are written, and detaches from what is none any
    /// more.
    pub(super) fn sync_uplinks(&mut self) {
        let attached = match self.datapath.attached(Role::Uplink) {
            Ok(attached) => attached,
            Err(error) => {
                warn!(%error, "cannot tell which uplinks are attached to");
                return;
            }
        };
        for uplink in self.node.uplinks().values() {
            let Uplink { name, index, .. } = uplink;
            if self.datapath.check(Role::Uplink, *index, name).is_ok() {
                continue;
            }
            match self.datapath.attach(Role::Uplink, *index, name) {
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
            match self.datapath.detach(Role::Uplink, name) {
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
            if self
                .datapath
                .check(Role::Overlay, index, VXLAN_IFNAME)
                .is_ok()
            {
                return true;
            }
            return match self.datapath.attach(Role::Overlay, index, VXLAN_IFNAME) {
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
        let attached = self.datapath.attached(Role::Overlay).unwrap_or_default();
        for name in attached {
            if let Err(error) = self.datapath.detach(Role::Overlay, &name) {
                warn!(%error, name, "cannot detach from a device that no tunnel needs");
            }
        }
        false
    }

    /// Attaches to the node's own way to Services, and to the loopback device, where it begins and ends if
    /// an address of the node's own is asked or answers.
    pub(super) fn sync_host(&mut self) {
        if let Some(pair) = self.node.pair() {
            let guarded = self.keep_attached(Role::Host, pair.far.index, SERVICES_IFNAME);
            // Nothing is handed over to where nobody takes it.
            self.dirty |= self.node.pair_is_guarded(guarded);
        }
        self.keep_attached(Role::Loopback, LOOPBACK_IFINDEX, LOOPBACK);
    }

    /// Attaches the programs of a role if they are not; tells whether they are now.
    fn keep_attached(&mut self, role: Role, ifindex: u32, name: &str) -> bool {
        if self.datapath.check(role, ifindex, name).is_ok() {
            return true;
        }
        match self.datapath.attach(role, ifindex, name) {
            Ok(kind) => {
                info!(name, %kind, "the node's own packets to Services");
                true
            }
            Err(error) => {
                warn!(
                    %error,
                    name, "the node's own packets reach no Service but by sockets; it is tried again"
                );
                false
            }
        }
    }
}
