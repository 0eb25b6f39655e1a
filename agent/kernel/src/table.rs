//! A map as a table of bytes: batches where the kernel has them, entry by entry where not.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{KernelError, sys};

/// Entries in one call: large enough that the call's own cost vanishes, small enough that the
/// kernel's copy of it is no burden.
const BATCH: usize = 4096;

/// An open map.
#[derive(Debug)]
pub(crate) struct Table {
    name: &'static str,
    fd: OwnedFd,
    key: usize,
    value: usize,
    capacity: u32,
    /// Cleared when the kernel turns out not to have batches for this map's type.
    batches: AtomicBool,
}

impl Table {
    /// A map whose sizes were checked.
    pub(crate) fn new(
        name: &'static str,
        fd: OwnedFd,
        key: u32,
        value: u32,
        capacity: u32,
    ) -> Self {
        Self {
            name,
            fd,
            key: key as usize,
            value: value as usize,
            capacity,
            batches: AtomicBool::new(true),
        }
    }

    /// The same map, for another thread.
    pub(crate) fn duplicate(&self) -> Result<Self, KernelError> {
        let fd = self
            .fd
            .try_clone()
            .map_err(|source| self.error("open", source))?;
        Ok(Self {
            fd,
            batches: AtomicBool::new(self.batches()),
            ..*self
        })
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn error(&self, action: &'static str, source: io::Error) -> KernelError {
        KernelError::map(self.name, action, self.capacity, source)
    }

    fn batches(&self) -> bool {
        self.batches.load(Ordering::Relaxed)
    }

    fn no_batches(&self) {
        self.batches.store(false, Ordering::Relaxed);
        tracing::debug!(map = self.name, "no batches for this map: entry by entry");
    }

    /// Writes the entries whose keys and values stand one after the other.
    pub(crate) fn put(&self, keys: &[u8], values: &[u8]) -> Result<(), KernelError> {
        assert_eq!(keys.len() % self.key, 0, "{}: whole keys", self.name);
        assert_eq!(values.len() % self.value, 0, "{}: whole values", self.name);
        assert_eq!(
            keys.len() / self.key,
            values.len() / self.value,
            "{}: pairs",
            self.name
        );
        let chunks = keys
            .chunks(BATCH * self.key)
            .zip(values.chunks(BATCH * self.value));
        for (keys, values) in chunks {
            self.put_chunk(keys, values)
                .map_err(|source| self.error("write", source))?;
        }
        Ok(())
    }

    fn put_chunk(&self, mut keys: &[u8], mut values: &[u8]) -> io::Result<()> {
        // One entry costs the same either way, and is the common case while the agent runs.
        if keys.len() > self.key && self.batches() {
            let (done, result) = sys::update_batch(self.fd(), keys, values, self.count(keys));
            match result {
                Ok(()) => return Ok(()),
                Err(error) if sys::unsupported(&error) => self.no_batches(),
                Err(error) => return Err(error),
            }
            keys = &keys[done as usize * self.key..];
            values = &values[done as usize * self.value..];
        }
        for (key, value) in keys.chunks(self.key).zip(values.chunks(self.value)) {
            sys::update(self.fd(), key, value)?;
        }
        Ok(())
    }

    /// Removes the entries whose keys stand one after the other; those that are not there are
    /// passed over.
    pub(crate) fn delete(&self, keys: &[u8]) -> Result<(), KernelError> {
        assert_eq!(keys.len() % self.key, 0, "{}: whole keys", self.name);
        for keys in keys.chunks(BATCH * self.key) {
            self.delete_chunk(keys)
                .map_err(|source| self.error("delete", source))?;
        }
        Ok(())
    }

    fn delete_chunk(&self, mut keys: &[u8]) -> io::Result<()> {
        while keys.len() > self.key && self.batches() {
            let (done, result) = sys::delete_batch(self.fd(), keys, self.count(keys));
            // It stops at the first key that is not there: go on behind that.
            let skip = match result {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => 1,
                Err(error) if sys::unsupported(&error) => {
                    self.no_batches();
                    0
                }
                Err(error) => return Err(error),
            };
            keys = &keys[(done as usize + skip) * self.key..];
        }
        for key in keys.chunks(self.key) {
            match sys::delete(self.fd(), key) {
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads one entry.
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KernelError> {
        assert_eq!(key.len(), self.key, "{}: a whole key", self.name);
        let mut value = vec![0; self.value];
        sys::lookup(self.fd(), key, &mut value)
            .map(|found| found.then_some(value))
            .map_err(|source| self.error("read", source))
    }

    /// Shows every entry to `visit`. Entries that come or go meanwhile may be missed, no entry
    /// that stays is.
    pub(crate) fn each(&self, mut visit: impl FnMut(&[u8], &[u8])) -> Result<(), KernelError> {
        if self.batches() {
            match self.each_batch(&mut visit) {
                Err(Walk::Unsupported) => self.no_batches(),
                Err(Walk::Failed(source)) => return Err(self.error("read", source)),
                Ok(()) => return Ok(()),
            }
        }
        self.each_single(&mut visit)
            .map_err(|source| self.error("read", source))
    }

    /// The number of entries, counted.
    pub(crate) fn len(&self) -> Result<u32, KernelError> {
        let mut count = 0;
        self.each(|_, _| count += 1)?;
        Ok(count)
    }

    fn each_batch(&self, visit: &mut impl FnMut(&[u8], &[u8])) -> Result<(), Walk> {
        let mut place = Place::default();
        while !self.next_batch(&mut place, visit)? {}
        Ok(())
    }

    /// Shows the entries of the next part of a walk to `visit`, some thousand at most; true at the
    /// end. Where the kernel has no batches it is all of them.
    pub(crate) fn next_part(
        &self,
        place: &mut Place,
        mut visit: impl FnMut(&[u8], &[u8]),
    ) -> Result<bool, KernelError> {
        if self.batches() {
            match self.next_batch(place, &mut visit) {
                Err(Walk::Unsupported) => self.no_batches(),
                Err(Walk::Failed(source)) => return Err(self.error("read", source)),
                Ok(last) => return Ok(last),
            }
        }
        self.each_single(&mut visit)
            .map(|()| true)
            .map_err(|source| self.error("read", source))
    }

    fn next_batch(
        &self,
        place: &mut Place,
        visit: &mut impl FnMut(&[u8], &[u8]),
    ) -> Result<bool, Walk> {
        if place.room == 0 {
            place.room = BATCH.min(self.capacity as usize).max(64);
            // Hashes store a bucket's number there, the generic walk a key.
            place.cursor = vec![0; self.key.max(size_of::<u32>())];
        }
        loop {
            let Place {
                cursor,
                keys,
                values,
                room,
                begun,
            } = place;
            keys.resize(*room * self.key, 0);
            values.resize(*room * self.value, 0);
            let count = u32::try_from(*room).map_err(|e| Walk::Failed(io::Error::other(e)))?;
            match sys::lookup_batch(self.fd(), cursor, !*begun, keys, values, count) {
                Ok((count, last)) => {
                    let pairs = keys.chunks(self.key).zip(values.chunks(self.value));
                    pairs
                        .take(count as usize)
                        .for_each(|(key, value)| visit(key, value));
                    *begun = true;
                    return Ok(last);
                }
                // A hash's bucket with more entries than there is room for.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => *room *= 2,
                Err(error) if !*begun && sys::unsupported(&error) => {
                    return Err(Walk::Unsupported);
                }
                Err(error) => return Err(Walk::Failed(error)),
            }
        }
    }

    fn each_single(&self, visit: &mut impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let mut key = vec![0; self.key];
        let mut next = vec![0; self.key];
        let mut value = vec![0; self.value];
        let mut more = sys::next_key(self.fd(), None, &mut key)?;
        while more {
            if sys::lookup(self.fd(), &key, &mut value)? {
                visit(&key, &value);
            }
            more = sys::next_key(self.fd(), Some(&key), &mut next)?;
            std::mem::swap(&mut key, &mut next);
        }
        Ok(())
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "a chunk has at most BATCH keys"
    )]
    fn count(&self, keys: &[u8]) -> u32 {
        (keys.len() / self.key) as u32
    }
}

enum Walk {
    Unsupported,
    Failed(io::Error),
}

/// Where a walk over a table is; the default is its beginning.
#[derive(Debug, Default)]
pub(crate) struct Place {
    cursor: Vec<u8>,
    keys: Vec<u8>,
    values: Vec<u8>,
    room: usize,
    begun: bool,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use aya::maps::{HashMap, IterableMap, LpmTrie, MapData};

    use super::*;

    const CAPACITY: u32 = 20_000;
    /// `BPF_F_NO_PREALLOC`, which LPM tries must have.
    const NO_PREALLOC: u32 = 1;

    /// The same map with batches, and as on a kernel that has none.
    fn with_and_without_batches(test: impl Fn(&Table)) {
        let hash = HashMap::<MapData, [u8; 8], u64>::create(CAPACITY, 0).expect("a hash");
        let trie = LpmTrie::<MapData, [u8; 4], u64>::create(CAPACITY, NO_PREALLOC).expect("a trie");
        for fd in [fd(&hash), fd(&trie)] {
            let mut table = Table::new("TEST", fd, 8, 8, CAPACITY);
            for batches in [true, false] {
                table.batches = AtomicBool::new(batches);
                test(&table);
                assert_eq!(table.len().expect("read"), 0);
            }
        }
    }

    fn fd<K: aya::Pod>(map: &impl IterableMap<K, u64>) -> OwnedFd {
        map.map()
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .expect("another descriptor")
    }

    /// A key that is valid for both: the prefix length 32, then the address.
    fn keys(numbers: impl Iterator<Item = u32>) -> Vec<u8> {
        numbers
            .flat_map(|number| [32_u32.to_ne_bytes(), number.to_be_bytes()].concat())
            .collect()
    }

    #[test]
    fn entry_by_entry_does_what_batches_do() {
        hachi_testutil::require_root!();
        with_and_without_batches(|table| {
            let values = (0..10_000_u64)
                .flat_map(u64::to_ne_bytes)
                .collect::<Vec<_>>();
            table.put(&keys(0..10_000), &values).expect("written");
            assert_eq!(table.len().expect("read"), 10_000);

            // Every second key of these is not there.
            table
                .delete(&keys((0..20_000).step_by(2).rev()))
                .expect("deleted");
            let mut found = BTreeMap::new();
            table
                .each(|key, value| {
                    found.insert(key.to_vec(), value.to_vec());
                })
                .expect("read");
            let odd = (0..10_000).filter(|number| number % 2 == 1);
            let expected = odd
                .map(|number| {
                    (
                        keys(std::iter::once(number)),
                        u64::from(number).to_ne_bytes().to_vec(),
                    )
                })
                .collect::<BTreeMap<_, _>>();
            assert_eq!(found, expected);
            assert_eq!(table.get(&keys(std::iter::once(2))).expect("read"), None);
            let seven = table.get(&keys(std::iter::once(7))).expect("read");
            assert_eq!(seven, Some(7_u64.to_ne_bytes().to_vec()));

            let error = table
                .put(&keys(10_000..40_000), &[0; 8 * 30_000])
                .expect_err("no room");
            assert!(
                matches!(
                    error,
                    KernelError::Full {
                        capacity: CAPACITY,
                        ..
                    }
                ),
                "{error}"
            );
            table.delete(&keys(0..40_000)).expect("deleted");
        });
    }
}
