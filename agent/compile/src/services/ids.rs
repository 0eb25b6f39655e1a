//! Ids of sets of backends, from their names: the same on every node and in every run.
//!
//! What two names whose hashes meet are called depends on what else there is, but not on the order in
//! which it came: in the order of hash and name, each has the first id from its hash on that is free.

use std::collections::{BTreeMap, HashMap};

use super::plan::Key;
use crate::hash;

/// All ids. A key that comes or goes moves those alone whose ids are next to each other.
#[derive(Debug, Default)]
pub(super) struct Ids {
    by_id: BTreeMap<u32, (u32, Key)>,
    by_key: HashMap<Key, u32>,
}

/// The id that a key has if nobody has it before. Ids near the top are left for those that move on;
/// 0 is nobody's.
fn natural(key: &Key) -> u32 {
    1 + ((hash::stable(key) >> 32) % 0xfff0_0000) as u32
}

impl Ids {
    /// The id of a key that was inserted; 0 if it was not.
    pub(super) fn get(&self, key: &Key) -> u32 {
        self.by_key.get(key).copied().unwrap_or_default()
    }

    /// Takes a key in; returns the others whose ids have changed, with what they were.
    pub(super) fn insert(&mut self, key: &Key) -> Vec<(Key, u32)> {
        self.insert_at(natural(key), key)
    }

    fn insert_at(&mut self, natural: u32, key: &Key) -> Vec<(Key, u32)> {
        if self.by_key.contains_key(key) {
            return Vec::new();
        }
        let mut run = self.take_run(natural);
        run.push((natural, key.clone(), 0));
        let mut moved = self.settle(run);
        moved.retain(|(other, _)| other != key);
        moved
    }

    /// Forgets a key; returns the others whose ids have changed, with what they were.
    pub(super) fn remove(&mut self, key: &Key) -> Vec<(Key, u32)> {
        let Some(id) = self.by_key.get(key).copied() else {
            return Vec::new();
        };
        let mut run = self.take_run(id);
        run.retain(|(_, other, _)| other != key);
        self.by_key.remove(key);
        self.settle(run)
    }

    /// Takes the neighbours of an id out: all ids without a gap around it.
    fn take_run(&mut self, id: u32) -> Vec<(u32, Key, u32)> {
        let mut run = Vec::new();
        let mut take = |ids: &mut BTreeMap<u32, (u32, Key)>, at: u32| {
            let found = ids.remove(&at);
            let found = found.map(|(natural, key)| run.push((natural, key, at)));
            found.is_some()
        };
        if take(&mut self.by_id, id) {
            let mut at = id;
            while at < u32::MAX && take(&mut self.by_id, at + 1) {
                at += 1;
            }
            let mut at = id;
            while at > 1 && take(&mut self.by_id, at - 1) {
                at -= 1;
            }
        }
        run
    }

    fn settle(&mut self, mut run: Vec<(u32, Key, u32)>) -> Vec<(Key, u32)> {
        run.sort();
        let mut moved = Vec::new();
        let mut free = 0;
        for (natural, key, old) in run {
            let id = natural.max(free);
            free = id + 1;
            if id != old {
                moved.push((key.clone(), old));
                self.by_key.insert(key.clone(), id);
            }
            self.by_id.insert(id, (natural, key));
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use hachi_index::Name;

    use super::*;

    fn key(n: u16) -> Key {
        Key {
            service: Name::new("a", "b"),
            proto: 6,
            port: n,
            host_ip: None,
            local: false,
            v6: false,
        }
    }

    fn ids(ids: &Ids) -> Vec<(u32, u16)> {
        ids.by_id
            .iter()
            .map(|(id, (_, key))| (*id, key.port))
            .collect()
    }

    #[test]
    fn any_order_and_any_detour_gives_the_same_ids() {
        // Hashes that meet, and runs that join: 5 5 5 6 9 8 8.
        let wanted = [(5, 3), (5, 1), (5, 2), (6, 4), (9, 5), (8, 6), (8, 7)];
        let expected = [(5, 1), (6, 2), (7, 3), (8, 4), (9, 6), (10, 7), (11, 5)];
        for rotation in 0..wanted.len() {
            let mut all = Ids::default();
            for extra in [5, 7, 8] {
                all.insert_at(extra, &key(100 + extra as u16));
            }
            for (natural, n) in wanted.iter().cycle().skip(rotation).take(wanted.len()) {
                all.insert_at(*natural, &key(*n));
            }
            for extra in [7, 5, 8] {
                let before = all.by_key.clone();
                let moved = all.remove(&key(100 + extra));
                for (key, old) in moved {
                    assert_eq!(before[&key], old);
                    assert_ne!(all.get(&key), old);
                }
            }
            assert_eq!(ids(&all), expected, "from {rotation}");
            for (id, (_, key)) in &all.by_id {
                assert_eq!(all.get(key), *id);
            }
        }
    }

    #[test]
    fn a_key_twice_is_a_key_once() {
        let mut all = Ids::default();
        assert_eq!(all.insert(&key(1)), []);
        let id = all.get(&key(1));
        assert_eq!((all.insert(&key(1)), all.get(&key(1))), (vec![], id));
        assert_eq!(all.remove(&key(2)), []);
        assert_eq!((all.remove(&key(1)), all.get(&key(1))), (vec![], 0));
    }
}
