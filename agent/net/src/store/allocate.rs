//! Taking and freeing addresses.
//!
//! Which address is next, in this order:
//! 1. one that was requested;
//! 2. the lowest that was never given out;
//! 3. the one that was freed longest ago;
//! 4. any that is free after all (its entry in the queue was lost with a killed process).
//!
//! A choice is made first, without a trace; then it is committed: claim, address files, range state.
//! Freeing goes the other way: queue, address files, claim.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::Write as _,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use hachi_api::AttachmentId;

use super::{
    Claim, FRESH, Owner, Range, RangeSet, Store, StoreError, file_name, list,
    range::Bounds,
    read, remove,
    state::{Freed, State},
    to_json,
};

/// An address, and the states as they will be once it is taken.
struct Choice {
    address: IpAddr,
    states: Vec<State>,
}

impl Store {
    /// Takes one address of each set, or the requested ones. What the same attachment had taken
    /// before (an ADD that was killed) is given back first.
    pub fn allocate(
        &self,
        owner: &Owner,
        sets: &[RangeSet],
        requested: &[IpAddr],
    ) -> Result<Vec<IpAddr>, StoreError> {
        let name = file_name(&owner.id)?;
        let claims = self.dir.join("claims");
        let path = claims.join(&name);
        let (claim, file) = {
            let _lock = self.lock()?;
            match read::<Claim>(&path) {
                Ok(None) => {}
                Ok(Some(earlier)) => drop(self.free(&earlier)?),
                Err(StoreError::Garbled { .. }) => drop(self.free_damaged(&path)?),
                Err(error) => return Err(error),
            }
            let mut choices = self.choose(sets, requested)?;
            let claim = Claim {
                network: owner.network.clone(),
                id: owner.id.clone(),
                pod: owner.pod.clone(),
                boot_id: self.boot.clone(),
                addresses: choices.iter().map(|choice| choice.address).collect(),
            };
            match self.commit(&claim, &mut choices) {
                Ok(file) => (claim, file),
                Err(error) => {
                    // What stays behind for want of a working disk is found by DEL.
                    let _ = self.free(&claim);
                    return Err(error);
                }
            }
        };
        // Outside the lock, so that parallel ADDs wait for the disk together.
        let sync = || {
            file.sync_all()?;
            File::open(&claims)?.sync_all()?;
            File::open(self.dir.join("addresses"))?.sync_all()
        };
        if let Err(error) = sync() {
            let _ = self.release(&owner.id);
            return Err(StoreError::io("write", path)(error));
        }
        Ok(claim.addresses)
    }

    /// Frees what the attachment has taken; that may be nothing.
    pub fn release(&self, id: &AttachmentId) -> Result<Vec<IpAddr>, StoreError> {
        let path = self.dir.join("claims").join(file_name(id)?);
        // Asked without the lock first: a DEL that finds nothing changes nothing.
        if !path
            .try_exists()
            .map_err(StoreError::io("look for", &path))?
        {
            return Ok(Vec::new());
        }
        let _lock = self.lock()?;
        match read::<Claim>(&path) {
            Ok(Some(claim)) => self.free(&claim),
            Ok(None) => Ok(Vec::new()),
            Err(StoreError::Garbled { .. }) => self.free_damaged(&path),
            Err(error) => Err(error),
        }
    }

    /// Frees the addresses of a claim that cannot be read: they are links to the same file.
    fn free_damaged(&self, claim: &Path) -> Result<Vec<IpAddr>, StoreError> {
        let inode = fs::metadata(claim)
            .map_err(StoreError::io("read", claim))?
            .ino();
        let mut freed = Vec::new();
        for (name, path) in list(&self.dir.join("addresses"))? {
            if fs::metadata(&path).is_ok_and(|found| found.ino() == inode) {
                remove(&path)?;
                freed.extend(name.parse::<IpAddr>().ok());
            }
        }
        remove(claim)?;
        Ok(freed)
    }

    /// Frees what [`Store::claims`] has found.
    pub fn release_claim(&self, claim: &Claim) -> Result<Vec<IpAddr>, StoreError> {
        let _lock = self.lock()?;
        self.free(claim)
    }

    /// Whether [`Store::allocate`] would find an address in each set.
    pub fn has_room(&self, sets: &[RangeSet]) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        self.choose(sets, &[]).map(drop)
    }

    fn choose(&self, sets: &[RangeSet], requested: &[IpAddr]) -> Result<Vec<Choice>, StoreError> {
        let mut requested = requested.to_vec();
        let mut choices = Vec::new();
        for set in sets {
            let wanted = requested
                .iter()
                .position(|address| set.range_of(*address).is_some());
            choices.push(match wanted {
                Some(place) => self.choose_requested(requested.remove(place))?,
                None => self.choose_any(set)?,
            });
        }
        match requested.first() {
            Some(address) => Err(StoreError::NotInRange(*address)),
            None => Ok(choices),
        }
    }

    fn choose_requested(&self, address: IpAddr) -> Result<Choice, StoreError> {
        // The range's state need not know: an address in use is passed over.
        match read::<Claim>(&self.address_file(address)) {
            Ok(None) => Ok(Choice {
                address,
                states: Vec::new(),
            }),
            Ok(Some(claim)) => Err(StoreError::Taken {
                address,
                owner: format!("{}:{}", claim.id.container_id, claim.id.ifname),
            }),
            Err(StoreError::Garbled { path, .. }) => Err(StoreError::Taken {
                address,
                owner: path.display().to_string(),
            }),
            Err(error) => Err(error),
        }
    }

    fn choose_any(&self, set: &RangeSet) -> Result<Choice, StoreError> {
        let mut states = Vec::new();
        for range in &set.ranges {
            let mut state = self.state(range.bounds())?;
            if let Some(address) = self.never_used(set, range, &mut state)? {
                states.push(state);
                return Ok(Choice { address, states });
            }
            states.push(state);
        }
        for state in &mut states {
            if let Some(address) = self.longest_free(set, state)? {
                return Ok(Choice { address, states });
            }
        }
        let used = self.used()?;
        for (range, state) in set.ranges.iter().zip(&mut states) {
            let bounds = range.bounds();
            let free = |address| !used.contains(&address) && !range.reserves(address);
            if let Some(address) = walk(Some(range.start()), bounds, set, |a| Ok(free(a)))? {
                state.restart(bounds.after(address));
                return Ok(Choice { address, states });
            }
        }
        Err(StoreError::Exhausted(set.describe()))
    }

    fn never_used(
        &self,
        set: &RangeSet,
        range: &Range,
        state: &mut State,
    ) -> Result<Option<IpAddr>, StoreError> {
        let bounds = range.bounds();
        let found = walk(state.next(), bounds, set, |address| {
            Ok(!range.reserves(address) && !self.in_use(address)?)
        })?;
        state.set_next(found.and_then(|address| bounds.after(address)));
        Ok(found)
    }

    fn longest_free(
        &self,
        set: &RangeSet,
        state: &mut State,
    ) -> Result<Option<IpAddr>, StoreError> {
        let mut place = 0;
        while let Some(freed) = state.freed(place)? {
            place += 1;
            if let Freed::Address(address) = freed
                && set.range_of(address).is_some()
                && !self.in_use(address)?
            {
                state.take(place);
                return Ok(Some(address));
            }
        }
        state.take(place);
        Ok(None)
    }

    fn used(&self) -> Result<HashSet<IpAddr>, StoreError> {
        let files = list(&self.dir.join("addresses"))?;
        Ok(files
            .iter()
            .filter_map(|(name, _)| name.parse().ok())
            .collect())
    }

    fn commit(&self, claim: &Claim, choices: &mut [Choice]) -> Result<File, StoreError> {
        let claims = self.dir.join("claims");
        let fresh = claims.join(FRESH);
        let path = claims.join(file_name(&claim.id)?);
        self.step()?;
        let text = to_json(claim, &path)?;
        let mut file = File::create(&fresh).map_err(StoreError::io("make", &fresh))?;
        let named = file
            .write_all(&text)
            .and_then(|()| fs::rename(&fresh, &path));
        if let Err(error) = named {
            let _ = fs::remove_file(&fresh);
            return Err(StoreError::io("write", path)(error));
        }
        for address in &claim.addresses {
            let link = self.address_file(*address);
            self.step()?;
            fs::hard_link(&path, &link).map_err(StoreError::io("make", link))?;
        }
        for state in choices.iter_mut().flat_map(|choice| &mut choice.states) {
            self.step()?;
            state.save()?;
        }
        Ok(file)
    }

    fn free(&self, claim: &Claim) -> Result<Vec<IpAddr>, StoreError> {
        let mut freed = Vec::new();
        for address in &claim.addresses {
            let path = self.address_file(*address);
            // A claim that was never completed may name an address that somebody else has by now.
            match read::<Claim>(&path) {
                Ok(Some(found)) if found.id == claim.id => {}
                Ok(_) | Err(StoreError::Garbled { .. }) => continue,
                Err(error) => return Err(error),
            }
            self.enqueue(*address)?;
            self.step()?;
            remove(&path)?;
            freed.push(*address);
        }
        self.step()?;
        remove(&self.dir.join("claims").join(file_name(&claim.id)?))?;
        Ok(freed)
    }

    fn enqueue(&self, address: IpAddr) -> Result<(), StoreError> {
        // Every range that has the address, also one that the configuration has moved on from.
        for (name, _) in list(&self.dir.join("ranges"))? {
            let Some(bounds) = Bounds::from_file_name(&name).filter(|b| b.contains(address)) else {
                continue;
            };
            let mut state = self.state(bounds)?;
            // What lies ahead will be come upon anyway.
            if state.passed(address) {
                self.step()?;
                state.push(address)?;
            }
        }
        Ok(())
    }
}

/// The first address from `from` on that is not excluded and that `suits`. Excluded blocks are
/// stepped over whole.
fn walk(
    from: Option<IpAddr>,
    bounds: Bounds,
    set: &RangeSet,
    mut suits: impl FnMut(IpAddr) -> Result<bool, StoreError>,
) -> Result<Option<IpAddr>, StoreError> {
    let mut candidate = from;
    while let Some(address) = candidate {
        candidate = match set.excluded(address) {
            Some(block) => bounds.after(block.broadcast()),
            None if suits(address)? => return Ok(Some(address)),
            None => bounds.after(address),
        };
    }
    Ok(None)
}
