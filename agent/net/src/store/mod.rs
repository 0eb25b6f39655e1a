//! The address store: which attachment has which addresses, in files that a person can read.
//!
//! ```text
//! /var/lib/cni/hachi/
//!   lock                          flock(2), held for the time of one change
//!   reaper                        flock(2), held by an agent that deletes retired links
//!   boot                          the boot that everything here belongs to
//!   claims/<container>:<ifname>   who took which addresses (JSON)
//!   addresses/10.244.1.5          the same file again (a hard link): the address is in use
//!   ranges/<first>-<last>         how far a range is used up, and what was freed (state.rs)
//!   attachments/<container>:<ifname>   the interface that was made (JSON), for the agent
//!   changes                       what was changed on the node itself (changes.rs)
//! ```
//! An address is in use if and only if its file exists. Steps are ordered so that a process that is
//! killed between any two of them leaves addresses that are free or that DEL and GC find. Files
//! appear complete, by rename or by link. Nothing outlives a reboot: whatever carries another boot id
//! is removed by the first process that opens the store. Every operation costs the same in a pool of
//! four addresses and in one of 2^64.

mod allocate;
mod error;
mod lock;
mod range;
mod state;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{ErrorKind, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use hachi_api::{Attachment, AttachmentId, PodRef};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub(crate) use self::lock::Lock;
pub use self::{
    error::StoreError,
    range::{Range, RangeError, RangeSet},
};
use self::{range::Bounds, state::State};

/// How long the lock is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const DIRECTORIES: [&str; 4] = ["claims", "addresses", "ranges", "attachments"];
/// Files under construction; never listed.
const FRESH: &str = ".new";

/// Who takes addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The network's name.
    pub network: String,
    /// The attachment.
    pub id: AttachmentId,
    /// Its Pod.
    pub pod: Option<PodRef>,
}

/// What an attachment has taken, as it is on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Claim {
    /// The network's name.
    pub network: String,
    /// The attachment.
    pub id: AttachmentId,
    /// Its Pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
    /// The boot in which the addresses were taken.
    pub boot_id: String,
    /// The addresses.
    pub addresses: Vec<IpAddr>,
}

/// The store of one node.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    boot: String,
    patience: Duration,
    #[cfg(test)]
    steps: tests::Steps,
}

/// The kernel's name for the time since it started.
pub fn boot_id() -> Result<String, StoreError> {
    let id = fs::read_to_string(BOOT_ID).map_err(StoreError::io("read", BOOT_ID))?;
    Ok(id.trim().to_owned())
}

impl Store {
    /// Opens the store in `dir`, which is made if need be. What an earlier boot left is removed.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_in_boot(dir, boot_id()?)
    }

    fn open_in_boot(dir: &Path, boot: String) -> Result<Self, StoreError> {
        let store = Self {
            dir: dir.to_owned(),
            boot,
            patience: PATIENCE,
            #[cfg(test)]
            steps: tests::Steps::default(),
        };
        let complete = DIRECTORIES.iter().all(|name| store.dir.join(name).is_dir());
        if !complete || store.boot_on_disk().as_deref() != Some(&store.boot) {
            store.begin_boot()?;
        }
        Ok(store)
    }

    /// Waits for the lock no longer than this.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    fn boot_on_disk(&self) -> Option<String> {
        fs::read_to_string(self.dir.join("boot"))
            .ok()
            .map(|id| id.trim().to_owned())
    }

    fn begin_boot(&self) -> Result<(), StoreError> {
        for name in DIRECTORIES {
            let path = self.dir.join(name);
            fs::create_dir_all(&path).map_err(StoreError::io("make", &path))?;
        }
        let _lock = self.lock()?;
        if self.boot_on_disk().as_ref() == Some(&self.boot) {
            return Ok(());
        }
        // A claim decides by itself: should only `boot` be lost, running Pods keep what they have.
        let ours = |path: &Path| matches!(read::<Claim>(path), Ok(Some(claim)) if claim.boot_id == self.boot);
        let mut kept = BTreeSet::new();
        for (name, path) in list(&self.dir.join("claims"))? {
            if ours(&path) {
                kept.insert(name);
            } else {
                remove(&path)?;
            }
        }
        for (_, path) in list(&self.dir.join("addresses"))? {
            if !ours(&path) {
                remove(&path)?;
            }
        }
        for (name, path) in list(&self.dir.join("attachments"))? {
            if !kept.contains(&name) {
                remove(&path)?;
            }
        }
        for (_, path) in list(&self.dir.join("ranges"))? {
            remove(&path)?;
        }
        write_durably(&self.dir, "boot", format!("{}\n", self.boot).as_bytes())
    }

    fn lock(&self) -> Result<Lock, StoreError> {
        Lock::take(&self.dir.join("lock"), self.patience)
    }

    pub(crate) fn reaper_file(&self) -> PathBuf {
        self.dir.join("reaper")
    }

    /// Says that a reaper runs, as long as the value lives.
    pub(crate) fn lock_reaper(&self, patience: Duration) -> Result<Lock, StoreError> {
        Lock::take(&self.reaper_file(), patience)
    }

    /// Where a test kills the process.
    #[cfg(not(test))]
    #[expect(
        clippy::unnecessary_wraps,
        clippy::unused_self,
        reason = "in tests it can fail"
    )]
    fn step(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// The records of all attachments, and what could not be read.
    pub fn attachments(&self) -> Result<(Vec<Attachment>, Vec<StoreError>), StoreError> {
        self.read_all("attachments")
    }

    /// The record of one attachment.
    pub fn attachment(&self, id: &AttachmentId) -> Result<Option<Attachment>, StoreError> {
        read(&self.dir.join("attachments").join(file_name(id)?))
    }

    /// Writes an attachment's record, durably.
    pub fn record(&self, attachment: &Attachment) -> Result<(), StoreError> {
        let dir = self.dir.join("attachments");
        self.step()?;
        write_durably(
            &dir,
            &file_name(&attachment.id)?,
            &to_json(attachment, &dir)?,
        )
    }

    /// Removes an attachment's record; `false` if there was none.
    pub fn forget(&self, id: &AttachmentId) -> Result<bool, StoreError> {
        self.step()?;
        remove(&self.dir.join("attachments").join(file_name(id)?))
    }

    /// What one attachment has taken.
    pub fn claim(&self, id: &AttachmentId) -> Result<Option<Claim>, StoreError> {
        read(&self.dir.join("claims").join(file_name(id)?))
    }

    /// What every attachment has taken, and what could not be read. An address whose claim somebody
    /// has deleted is found too.
    pub fn claims(&self) -> Result<(Vec<Claim>, Vec<StoreError>), StoreError> {
        let (mut claims, mut unreadable) = self.read_all::<Claim>("claims")?;
        let known: BTreeSet<_> = claims.iter().map(|claim| claim.id.clone()).collect();
        let mut orphans: Vec<Claim> = Vec::new();
        for (name, path) in list(&self.dir.join("addresses"))? {
            match read::<Claim>(&path) {
                Ok(Some(claim)) if known.contains(&claim.id) || orphans.contains(&claim) => {}
                Ok(Some(claim)) => orphans.push(claim),
                Ok(None) => {}
                // A damaged claim shows under each of its addresses; once is enough.
                Err(error) if name.parse::<IpAddr>().is_ok() => unreadable.push(error),
                Err(_) => {}
            }
        }
        claims.extend(orphans);
        Ok((claims, unreadable))
    }

    fn read_all<T: DeserializeOwned>(
        &self,
        directory: &str,
    ) -> Result<(Vec<T>, Vec<StoreError>), StoreError> {
        let mut found = Vec::new();
        let mut unreadable = Vec::new();
        for (_, path) in list(&self.dir.join(directory))? {
            match read(&path) {
                Ok(value) => found.extend(value),
                Err(error) => unreadable.push(error),
            }
        }
        Ok((found, unreadable))
    }

    fn address_file(&self, address: IpAddr) -> PathBuf {
        self.dir.join("addresses").join(address.to_string())
    }

    fn in_use(&self, address: IpAddr) -> Result<bool, StoreError> {
        let path = self.address_file(address);
        path.try_exists().map_err(StoreError::io("look for", path))
    }

    fn state(&self, bounds: Bounds) -> Result<State, StoreError> {
        State::open(&self.dir.join("ranges"), bounds)
    }
}

/// The name of an attachment's files. An interface name has no colon, so the last one divides.
fn file_name(id: &AttachmentId) -> Result<String, StoreError> {
    let name = format!("{}:{}", id.container_id, id.ifname);
    let bad = id.ifname.contains(':')
        || name.starts_with('.')
        || name.contains(['/', '\0'])
        || name.len() > 255 - FRESH.len();
    if bad {
        Err(StoreError::BadName(name))
    } else {
        Ok(name)
    }
}

pub(crate) fn to_json(value: &impl Serialize, path: &Path) -> Result<Vec<u8>, StoreError> {
    let mut text =
        serde_json::to_vec_pretty(value).map_err(|error| StoreError::garbled(path, error))?;
    text.push(b'\n');
    Ok(text)
}

/// Reads a file that may be absent.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|e| StoreError::garbled(path, e)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("read", path)(error)),
    }
}

/// Removes a file; `false` if there is none.
fn remove(path: &Path) -> Result<bool, StoreError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("remove", path)(error)),
    }
}

/// The files of a directory, sorted, without those under construction.
fn list(dir: &Path) -> Result<Vec<(String, PathBuf)>, StoreError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(StoreError::io("list", dir))? {
        let entry = entry.map_err(StoreError::io("list", dir))?;
        if let Ok(name) = entry.file_name().into_string()
            && !name.starts_with('.')
        {
            found.push((name, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Writes a file that is complete and on the disk once it has its name.
pub(crate) fn write_durably(dir: &Path, name: &str, text: &[u8]) -> Result<(), StoreError> {
    let fresh = dir.join(format!(".{name}{FRESH}"));
    let path = dir.join(name);
    let write = || {
        let mut file = File::create(&fresh)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&fresh);
        StoreError::io("write", path.clone())(error)
    })
}

#[cfg(test)]
mod tests;
