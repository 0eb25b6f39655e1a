//! Locks of the store.

use std::{
    fs::{File, OpenOptions},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use super::StoreError;

/// Held as long as the value lives; the kernel lets go of it if the process dies.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Takes the lock, waiting at most `patience`.
    pub(crate) fn take(path: &Path, patience: Duration) -> Result<Self, StoreError> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(StoreError::io("open", path))?;
        let deadline = Instant::now() + patience;
        // It is held for well under a millisecond, so asking again soon is better than a signal.
        let mut pause = Duration::from_micros(100);
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => return Ok(Self { _file: file }),
                Err((again, Errno::EWOULDBLOCK | Errno::EINTR)) => file = again,
                Err((_, errno)) => return Err(StoreError::io("lock", path)(errno.into())),
            }
            if Instant::now() >= deadline {
                return Err(StoreError::Locked {
                    path: path.to_owned(),
                    waited: patience,
                });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(3));
        }
    }
}
