//! What another generation of the datapath (another [`ABI_VERSION`]) has left running, and how this one
//! takes over from it without a packet noticing.
//!
//! ```text
//! load ── flow tables of the other generation are pinned here too: both use the same maps
//!   │     everything else is new and empty; the other generation's programs go on working
//!   v
//! apply ── the agent has written what the API says
//!   v
//! attach ── each link changes its program, by itself and atomically
//!   v
//! remove_other_versions
//! ```
//! A flow table is shared if its layout and its meaning are the same in both generations: that is what
//! [`STATE_VERSION`] says, which every generation leaves in its `ABI` map. If it is not, flows start
//! anew: connections through Services break, others are judged again.

use std::{fs, os::fd::AsFd as _, path::Path};

use aya::maps::MapInfo;
use hachi_abi::{ABI_VERSION, STATE_VERSION, map};

use crate::{
    Datapath, KernelError,
    bytes::{bytes_of, read},
    layout::Layout,
    pins::{LINKS, Pins, SOCKETS},
    sys,
    table::Table,
};

/// Keys of the entries of [`map::ABI`].
const ABI_TAG: u32 = 0;
const STATE_TAG: u32 = 1;

/// What flows are remembered in. All of it or nothing: the tables refer to each other.
const STATE: [&[&str]; 5] = [
    &map::CONNTRACK,
    &map::NAT,
    &map::FRAGMENTS,
    &map::AFFINITY,
    &map::SOCKETS,
];

/// Pins the flow tables of the latest other generation here, unless this one has its own already.
/// Returns the policy revision to begin with: one under which no flow has been judged yet.
pub(crate) fn share<'a>(
    pins: &Pins,
    layouts: impl Iterator<Item = &'a Layout> + Clone,
) -> Result<u32, KernelError> {
    const FIRST: u32 = 1;
    let others = pins
        .others()
        .map_err(|source| KernelError::pin(pins.maps(), "list", source))?;
    // The highest number that can be shared with: what is below was left by an upgrade that failed.
    let Some(other) = others.iter().rev().find(|other| speaks_our_state(other)) else {
        return Ok(FIRST);
    };
    let state = || {
        let layouts = layouts.clone();
        layouts.filter(|layout| STATE.iter().any(|names| names.contains(&layout.name)))
    };
    if state().any(|layout| pins.map(layout.name).exists()) {
        return Ok(revision(other).map_or(FIRST, following));
    }
    for layout in state() {
        let pin = other.join(layout.name);
        let failed = |action, source| KernelError::pin(&pin, action, source);
        let map = sys::get(&pin).map_err(|source| failed("open", source))?;
        sys::pin(map.as_fd(), &pins.map(layout.name)).map_err(|source| failed("share", source))?;
    }
    tracing::info!(from = %other.display(), to = ABI_VERSION, "flow tables are shared until the programs change");
    Ok(revision(other).map_or(FIRST, following))
}

/// The revision after another; 0 means that nothing is configured.
pub(crate) fn following(revision: u32) -> u32 {
    revision.checked_add(1).unwrap_or(1)
}

fn speaks_our_state(other: &Path) -> bool {
    entry(&other.join(map::ABI), map::ABI, STATE_TAG).is_some_and(|value| value == STATE_VERSION)
}

/// The revision is the first word of every generation's configuration.
fn revision(other: &Path) -> Option<u32> {
    entry(&other.join(map::CONFIG), map::CONFIG, 0)
}

/// The first word of a value of another generation's map, under a key of one word.
fn entry(pin: &Path, name: &'static str, key: u32) -> Option<u32> {
    let info = MapInfo::from_pin(pin).ok()?;
    let fd = sys::get(pin).ok()?;
    let value_size = info.value_size();
    if info.key_size() != 4 || value_size < 4 {
        return None;
    }
    let table = Table::new(name, fd, 4, value_size, info.max_entries());
    let value = table.get(bytes_of(&key)).ok()??;
    Some(read(value.get(..4)?))
}

impl Datapath {
    /// Says in the pins what they are, for people and for other generations.
    pub(crate) fn mark_version(&self) -> Result<(), KernelError> {
        let table = self.table(map::ABI)?;
        table.put(bytes_of(&ABI_TAG), bytes_of(&ABI_VERSION))?;
        table.put(bytes_of(&STATE_TAG), bytes_of(&STATE_VERSION))
    }

    /// Whether the programs that are attached are still another generation's, and this one has not
    /// been told yet what to do: its programs, attached now, would drop everything.
    ///
    /// # Errors
    /// If the pins or the configuration cannot be read.
    pub fn waits_to_take_over(&self) -> Result<bool, KernelError> {
        let others = self
            .pins
            .others()
            .map_err(|source| KernelError::pin(self.pins.maps(), "list", source))?;
        let attached = |version: &std::path::PathBuf| {
            [LINKS, SOCKETS].iter().any(|kind| {
                fs::read_dir(version.join(kind)).is_ok_and(|mut pins| pins.next().is_some())
            })
        };
        Ok(self.revision()? == 0 && others.iter().any(attached))
    }
}
