//! How full the maps are.

use std::collections::BTreeMap;

use hachi_abi::map;

use crate::{Datapath, KernelError, table::Table};

/// Counts the entries of maps, beside the [`Datapath`] and on another thread.
#[derive(Debug)]
pub struct Meter(Vec<(&'static str, Table)>);

impl Datapath {
    /// The maps once more, for whoever counts.
    ///
    /// # Errors
    /// If there are no file descriptors left.
    pub fn meter(&self) -> Result<Meter, KernelError> {
        let filling = self.filling();
        let all = filling.map(|(name, table)| Ok((name, table.duplicate()?)));
        all.collect::<Result<_, KernelError>>().map(Meter)
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
        let all = self.0.iter().map(|(name, table)| (*name, table));
        all.map(count).collect()
    }
}

fn count((name, table): (&str, &Table)) -> Result<(String, (u32, u32)), KernelError> {
    Ok((name.to_owned(), (table.len()?, table.capacity())))
}
