//! One agent a node: two that write the same maps or keep the same store would undo each other's
//! work without either noticing.
//!
//! The lock is the kernel's (`flock(2)`) on the directories themselves, so it ends with the process
//! however that ends, and leaves nothing behind that could be stale.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read as _},
    os::{linux::fs::MetadataExt as _, unix::fs::MetadataExt as _},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use tracing::info;

use crate::NetError;

/// How long an agent that is being replaced may take to end.
const PATIENCE: Duration = Duration::from_secs(2);
const PERIOD: Duration = Duration::from_millis(50);

/// How often the list of locks is looked through for the holder.
const LOOKS: usize = 5;
/// What is read of it at once, in bytes; the kernel gives a page of it at most.
const AT_ONCE: usize = 16 << 10;

/// Held as long as the value lives.
#[derive(Debug)]
pub struct Exclusive(#[expect(dead_code, reason = "closing it unlocks it")] File);

impl Exclusive {
    /// Locks a directory that exists.
    ///
    /// # Errors
    /// [`NetError::InUse`] if another agent holds it for longer than one that is being replaced may.
    pub fn directory(path: &Path) -> Result<Self, NetError> {
        Self::within(path, PATIENCE)
    }

    fn within(path: &Path, patience: Duration) -> Result<Self, NetError> {
        let io = |source| NetError::Lock {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        let deadline = Instant::now() + patience;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::Error(error)) => return Err(io(error)),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    if !told {
                        info!(path = %path.display(), "waiting for the agent before this one to end");
                    }
                    told = true;
                    thread::sleep(PERIOD);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(NetError::InUse {
                        path: path.to_owned(),
                        holder: holder(&file),
                    });
                }
            }
        }
    }
}

/// Who has locked a file, by `/proc/locks`, whose lines are
/// `1: FLOCK  ADVISORY  WRITE 1234 00:2f:5678 0 EOF` (proc_locks(5)).
fn holder(file: &File) -> String {
    let unknown = "a process that cannot be seen from here".to_owned();
    let Ok(meta) = file.metadata() else {
        return unknown;
    };
    let (device, inode) = (meta.st_dev(), meta.ino());
    let (major, minor) = (
        (device >> 8) & 0xfff,
        (device & 0xff) | ((device >> 12) & !0xff),
    );
    let place = format!("{major:02x}:{minor:02x}:{inode}");
    let of_it = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        (fields.get(1) == Some(&"FLOCK") && fields.get(5) == Some(&place.as_str()))
            .then(|| fields.get(4).and_then(|pid| pid.parse::<u32>().ok()))
            .flatten()
    };
    let pid = (0..LOOKS).find_map(|_| locks().ok()?.lines().find_map(of_it));
    let Some(pid) = pid else { return unknown };
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    format!("process {pid} ({})", command.trim())
}

/// All locks of the machine. The kernel numbers them anew for each read, so that a lock that goes between
/// two hides another one: a page is read at once, and longer lists are worth a second look.
fn locks() -> io::Result<String> {
    let mut text = String::with_capacity(AT_ONCE);
    File::open("/proc/locks")?.read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use super::*;

    #[test]
    fn a_second_agent_is_refused_and_told_who_the_first_is() {
        let dir = std::env::temp_dir().join(format!("hachi-lock-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        let first = Exclusive::directory(&dir).expect("nobody has it");
        let error = Exclusive::within(&dir, Duration::from_millis(120))
            .expect_err("it is taken")
            .to_string();
        assert!(error.contains("another agent"), "{error}");
        let own = format!("process {} (", std::process::id());
        assert!(error.contains(&own), "{error} does not name {own}");

        // One that is on its way out is waited for.
        thread::scope(|scope| {
            let second = scope.spawn(|| Exclusive::directory(&dir));
            thread::sleep(Duration::from_millis(100));
            drop(first);
            second.join().expect("no panic").expect("it is free now");
        });
        fs::remove_dir(&dir).expect("nothing was left in it");
    }

    #[test]
    fn the_holder_is_found_among_locks_that_come_and_go() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = Exclusive::directory(dir.path()).expect("nobody has it");
        let asked = File::open(dir.path()).expect("a directory");
        let own = format!("process {} (", std::process::id());
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            for name in ["a", "b", "c", "d"] {
                let other = File::create(dir.path().join(name)).expect("a file");
                let done = &done;
                scope.spawn(move || {
                    while !done.load(Relaxed) {
                        other.lock().expect("locked");
                        other.unlock().expect("unlocked");
                    }
                });
            }
            let missed = (0..1_000)
                .filter(|_| !holder(&asked).starts_with(&own))
                .count();
            done.store(true, Relaxed);
            assert_eq!(missed, 0, "of 1000");
        });
        drop(first);
    }
}
