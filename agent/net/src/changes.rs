//! What Hachi has changed on the node itself: kernel settings and mounts, with what was there
//! before, so that an uninstall can put it back.
//!
//! The record is the file `changes` beside the address store (JSON). A boot undoes all changes, so
//! the record of an earlier boot counts for nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    NetError, StoreError,
    store::{self, Lock},
};

/// The record's name in its directory.
const FILE: &str = "changes";
/// How long another process may take to write it.
const PATIENCE: Duration = Duration::from_secs(5);

/// The record of one node.
#[derive(Clone, Debug)]
pub struct Changes {
    dir: PathBuf,
    boot: String,
}

/// What is on disk.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    boot_id: String,
    /// By file under `/proc/sys`.
    settings: BTreeMap<PathBuf, Setting>,
    /// Where file systems were mounted.
    mounts: BTreeSet<PathBuf>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Setting {
    /// Before the first change.
    before: String,
    /// What Hachi wrote.
    ours: String,
}

/// What [`Changes::restore`] has done.
#[derive(Debug, Default)]
pub struct Restored {
    /// Settings that have their old value again, with that value.
    pub settings: Vec<(PathBuf, String)>,
    /// Settings that somebody else has changed since: they are left alone.
    pub foreign: Vec<PathBuf>,
    /// What could not be put back; it stays in the record.
    pub errors: Vec<NetError>,
}

impl Changes {
    /// The record in `dir`, the directory of the address store, which is made when it is needed.
    pub fn of(dir: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            dir: dir.to_owned(),
            boot: store::boot_id()?,
        })
    }

    /// Gives a kernel setting a value, and records what it was; tells whether that was a change.
    pub fn set(&self, file: &Path, value: &str) -> Result<bool, NetError> {
        let before = read(file).map_err(|source| sysctl(file, source))?;
        if before == value {
            return Ok(false);
        }
        // Recorded first: a change that is not on record could not be put back.
        self.update(|record| {
            let setting = record.settings.entry(file.to_owned());
            setting
                .and_modify(|setting| value.clone_into(&mut setting.ours))
                .or_insert_with(|| Setting {
                    before,
                    ours: value.to_owned(),
                });
        })?;
        fs::write(file, value).map_err(|source| sysctl(file, source))?;
        Ok(true)
    }

    /// Records that a file system was mounted.
    pub fn mounted(&self, path: &Path) -> Result<(), NetError> {
        self.update(|record| {
            record.mounts.insert(path.to_owned());
        })
    }

    /// The mounts on record.
    pub fn mounts(&self) -> Result<BTreeSet<PathBuf>, NetError> {
        Ok(self.load()?.mounts)
    }

    /// Gives all settings on record the values that they had, unless somebody has changed them
    /// since. A setting that is gone, with its device, is success.
    pub fn restore(&self) -> Result<Restored, NetError> {
        let mut done = Restored::default();
        for (file, setting) in self.load()?.settings {
            match read(&file) {
                Ok(now) if now == setting.before => {}
                Ok(now) if now != setting.ours => done.foreign.push(file.clone()),
                Ok(_) => match fs::write(&file, &setting.before) {
                    Ok(()) => done.settings.push((file.clone(), setting.before)),
                    Err(source) => {
                        done.errors.push(sysctl(&file, source));
                        continue;
                    }
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    done.errors.push(sysctl(&file, source));
                    continue;
                }
            }
            self.update(|record| {
                record.settings.remove(&file);
            })?;
        }
        Ok(done)
    }

    fn file(&self) -> PathBuf {
        self.dir.join(FILE)
    }

    /// A record that cannot be read counts as none: Pods matter more than what was before them.
    fn load(&self) -> Result<Record, StoreError> {
        match store::read::<Record>(&self.file()) {
            Ok(Some(record)) if record.boot_id == self.boot => Ok(record),
            Ok(_) => Ok(Record::default()),
            Err(error @ StoreError::Garbled { .. }) => {
                tracing::warn!(%error, "what was changed on the node before is forgotten");
                Ok(Record::default())
            }
            Err(error) => Err(error),
        }
    }

    fn update(&self, change: impl FnOnce(&mut Record)) -> Result<(), NetError> {
        fs::create_dir_all(&self.dir).map_err(StoreError::io("make", &self.dir))?;
        let _lock = Lock::take(&self.dir.join("lock"), PATIENCE)?;
        let mut record = self.load()?;
        change(&mut record);
        record.boot_id.clone_from(&self.boot);
        let text = store::to_json(&record, &self.file())?;
        Ok(store::write_durably(&self.dir, FILE, &text)?)
    }
}

fn sysctl(file: &Path, source: io::Error) -> NetError {
    NetError::Sysctl {
        path: file.to_owned(),
        source,
    }
}

fn read(file: &Path) -> io::Result<String> {
    fs::read_to_string(file).map(|value| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        dir: tempfile::TempDir,
        changes: Changes,
    }

    fn node() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let changes = Changes::of(&dir.path().join("state")).unwrap();
        Node { dir, changes }
    }

    impl Node {
        fn setting(&self, name: &str, value: &str) -> PathBuf {
            let file = self.dir.path().join(name);
            fs::write(&file, value).unwrap();
            file
        }
    }

    #[test]
    fn what_was_before_the_first_change_comes_back() {
        let node = node();
        let forward = node.setting("forward", "0\n");
        assert!(node.changes.set(&forward, "1").unwrap());
        assert!(!node.changes.set(&forward, "1").unwrap(), "already");
        assert!(node.changes.set(&forward, "2").unwrap());
        // Another process knows it too.
        let other = Changes::of(&node.dir.path().join("state")).unwrap();
        let done = other.restore().unwrap();
        assert_eq!(done.settings, [(forward.clone(), "0".to_owned())]);
        assert_eq!(read(&forward).unwrap(), "0");
        assert!(other.restore().unwrap().settings.is_empty(), "once");
    }

    #[test]
    fn what_others_have_changed_since_is_theirs() {
        let node = node();
        let (theirs, gone) = (node.setting("theirs", "0"), node.setting("gone", "0"));
        let was_on = node.setting("was-on", "1");
        assert!(!node.changes.set(&was_on, "1").unwrap());
        for file in [&theirs, &gone] {
            node.changes.set(file, "1").unwrap();
        }
        fs::write(&theirs, "7").unwrap();
        fs::remove_file(&gone).unwrap();
        let done = node.changes.restore().unwrap();
        assert_eq!(done.foreign, std::slice::from_ref(&theirs));
        assert!(done.errors.is_empty() && done.settings.is_empty());
        assert_eq!(read(&theirs).unwrap(), "7");
        assert_eq!(read(&was_on).unwrap(), "1");
    }

    #[test]
    fn records_of_an_earlier_boot_and_damaged_ones_count_for_nothing() {
        let node = node();
        let forward = node.setting("forward", "0");
        node.changes.set(&forward, "1").unwrap();
        let mut later = node.changes.clone();
        later.boot = "another".into();
        assert!(later.restore().unwrap().settings.is_empty());
        assert_eq!(read(&forward).unwrap(), "1");
        fs::write(node.changes.file(), "{").unwrap();
        assert!(node.changes.restore().unwrap().settings.is_empty());
        node.changes.mounted(Path::new("/somewhere")).unwrap();
        assert_eq!(node.changes.mounts().unwrap().len(), 1);
    }

    #[test]
    fn a_setting_that_does_not_exist_is_an_error_and_not_on_record() {
        let node = node();
        let absent = node.dir.path().join("absent");
        assert!(node.changes.set(&absent, "1").is_err());
        assert!(!node.changes.file().exists());
    }
}
