//! XDP on the uplinks: where it is wanted and works it makes the way of some packets shorter, elsewhere
//! the tc programs do everything; nothing else tells the two apart.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use hachi_kernel::{Datapath, XdpMode};
use hachi_net::Uplink;
use tracing::{info, warn};

use crate::options::Xdp;

/// Keeps XDP as it is wanted.
#[derive(Debug)]
pub(crate) struct Early {
    wanted: Xdp,
    /// By uplink: how it is, for the status.
    states: BTreeMap<String, String>,
    /// Devices that refused, by index and name: they are not asked again.
    refused: BTreeMap<(u32, String), String>,
}

impl Early {
    pub(crate) fn new(wanted: Xdp) -> Self {
        Self {
            wanted,
            states: BTreeMap::new(),
            refused: BTreeMap::new(),
        }
    }

    /// By uplink: `native`, `generic`, or `off` and why.
    pub(crate) fn states(&self) -> BTreeMap<String, String> {
        self.states.clone()
    }

    /// Attaches to the uplinks, and detaches from what is none any more.
    pub(crate) fn sync(&mut self, datapath: &mut Datapath, uplinks: &BTreeMap<u32, Uplink>) {
        let mut states = BTreeMap::new();
        for Uplink { name, index, .. } in uplinks.values() {
            let state = match mode(self.wanted, name) {
                Ok(mode) => match self.attach(datapath, *index, name, mode) {
                    Ok(()) => mode.to_string(),
                    Err(why) => format!("off: {why}"),
                },
                Err(why) => format!("off: {why}"),
            };
            states.insert(name.clone(), state);
        }
        let kept: BTreeSet<&str> = states
            .iter()
            .filter(|(_, state)| !state.starts_with("off"))
            .map(|(name, _)| name.as_str())
            .collect();
        match datapath.attached_xdp() {
            Ok(attached) => {
                for name in attached.keys().filter(|name| !kept.contains(name.as_str())) {
                    match datapath.detach_xdp(name) {
                        Ok(()) => info!(name, "XDP detached"),
                        Err(error) => warn!(%error, name, "XDP stays attached"),
                    }
                }
            }
            Err(error) => warn!(%error, "cannot tell where XDP is attached"),
        }
        self.refused
            .retain(|(index, _), _| uplinks.contains_key(index));
        self.states = states;
    }

    fn attach(
        &mut self,
        datapath: &mut Datapath,
        index: u32,
        name: &str,
        mode: XdpMode,
    ) -> Result<(), String> {
        if datapath.has_xdp(index, name, mode) {
            return Ok(());
        }
        let key = (index, name.to_owned());
        if let Some(why) = self.refused.get(&key) {
            return Err(why.clone());
        }
        match datapath.attach_xdp(index, name, mode) {
            Ok(()) => {
                info!(name, %mode, "XDP attached");
                Ok(())
            }
            Err(error) => {
                warn!(%error, name, "no XDP here: the tc programs do its work too");
                self.refused.insert(key, error.to_string());
                Err(error.to_string())
            }
        }
    }
}

/// How XDP is to be attached to a device, or why not.
fn mode(wanted: Xdp, name: &str) -> Result<XdpMode, &'static str> {
    match wanted {
        Xdp::Off => Err("--xdp=off"),
        Xdp::Native => Ok(XdpMode::Native),
        Xdp::Generic => Ok(XdpMode::Generic),
        // Only what has hardware (or a hypervisor) behind it has that device. What a veth sends out
        // again is lost where the other end does not expect it.
        Xdp::Auto
            if Path::new("/sys/class/net")
                .join(name)
                .join("device")
                .exists() =>
        {
            Ok(XdpMode::Native)
        }
        Xdp::Auto => Err("a virtual device"),
    }
}
