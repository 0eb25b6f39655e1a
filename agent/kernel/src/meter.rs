//! How full the maps are, and how many programs are attached.

use std::{collections::BTreeMap, fs, io, path::Path};

use hachi_abi::map;

use crate::{Datapath, Hook, KernelError, SocketHook, pins::Pins, table::Table, xdp};

/// Counts the entries of maps and the attached programs, beside the [`Datapath`] and on another thread.
#[derive(Debug)]
pub struct Meter {
    tables: Vec<(&'static str, Table)>,
    pins: Pins,
}

impl Datapath {
    /// The maps once more, for whoever counts.
    ///
    /// # Errors
    /// If there are no file descriptors left.
    pub fn meter(&self) -> Result<Meter, KernelError> {
        let filling = self.filling();
        let all = filling.map(|(name, table)| Ok((name, table.duplicate()?)));
        Ok(Meter {
            tables: all.collect::<Result<_, KernelError>>()?,
            pins: self.pins.clone(),
        })
    }

    /// Entries and capacity of every map that can fill up. Counts by reading the maps.
    ///
    /// # Errors
    /// If a map cannot be read.
    pub fn map_use(&self) -> Result<BTreeMap<String, (u32, u32)>, KernelError> {
        self.filling().map(count).collect()
    }

    fn filling(&self) -> impl Iterator<Item = (&'static str, &Table)> {
        let all = self.tables.iter().map(|(name, table)| (*name, table));
        all.filter(|(name, _)| *name != map::CONFIG && *name != map::ABI)
    }
}

impl Meter {
    /// As [`Datapath::map_use`].
    ///
    /// # Errors
    /// If a map cannot be read.
    pub fn map_use(&self) -> Result<BTreeMap<String, (u32, u32)>, KernelError> {
        let all = self.tables.iter().map(|(name, table)| (*name, table));
        all.map(count).collect()
    }

    /// By program of the object, at how many places it is attached; each has its pin. Programs that are
    /// attached nowhere are there with 0.
    ///
    /// # Errors
    /// If the pins cannot be listed.
    pub fn attached(&self) -> Result<BTreeMap<&'static str, usize>, KernelError> {
        let hooks = Hook::ALL.iter().map(|hook| hook.program());
        let sockets = SocketHook::ALL.iter().map(|hook| hook.program());
        let mut found: BTreeMap<_, _> = hooks
            .chain(sockets)
            .chain([xdp::PROGRAM])
            .map(|program| (program, 0))
            .collect();
        for hook in self.pins.attached()?.into_values().flatten() {
            *found.entry(hook.program()).or_default() += 1;
        }
        let xdp = xdp::attached_in(&self.pins)?.len();
        found.insert(xdp::PROGRAM, xdp);
        let sockets = self.pins.sockets();
        for hook in SocketHook::ALL {
            found.insert(
                hook.program(),
                usize::from(is_there(&sockets.join(hook.name()))?),
            );
        }
        Ok(found)
    }
}

fn is_there(pin: &Path) -> Result<bool, KernelError> {
    match fs::symlink_metadata(pin) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(KernelError::pin(pin, "look for", source)),
    }
}

fn count((name, table): (&str, &Table)) -> Result<(String, (u32, u32)), KernelError> {
    Ok((name.to_owned(), (table.len()?, table.capacity())))
}
