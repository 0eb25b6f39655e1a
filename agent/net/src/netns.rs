//! Network namespaces by path.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};

use crate::NetError;

/// The calling thread's own namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// An open network namespace, which lives at least as long as this value.
#[derive(Debug)]
pub struct NetNs {
    path: PathBuf,
    file: File,
}

impl NetNs {
    /// Opens the namespace at `path`. That it is one is proved by the first [`NetNs::run`].
    pub fn open(path: &Path) -> Result<Self, NetError> {
        match File::open(path) {
            Ok(file) => Ok(Self {
                path: path.to_owned(),
                file,
            }),
            Err(source) => Err(NetError::NetNs {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, NetError> {
        Self::open(Path::new(OWN))
    }

    /// The path that it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether the calling thread is in this namespace.
    pub fn is_current(&self) -> Result<bool, NetError> {
        let identity = |found: fs::Metadata| (found.dev(), found.ino());
        let same = || Ok(identity(self.file.metadata()?) == identity(fs::metadata(OWN)?));
        same().map_err(|source| self.failed(source))
    }

    /// Runs `work` inside the namespace, in a thread of its own that ends afterwards: no other code
    /// can ever find itself in the wrong namespace, whatever `work` does.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        let enter = || setns(&self.file, CloneFlags::CLONE_NEWNET);
        let entered = thread::scope(|scope| {
            let thread = thread::Builder::new().name("netns".into());
            let thread = thread.spawn_scoped(scope, || enter().map(|()| work()));
            let thread = thread.map_err(|source| self.failed(source))?;
            Ok::<_, NetError>(
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            )
        })?;
        entered.map_err(|errno| {
            self.failed(match errno {
                // What setns(2) says of a file that is no network namespace.
                Errno::EINVAL => {
                    io::Error::new(io::ErrorKind::InvalidInput, "not a network namespace")
                }
                errno => errno.into(),
            })
        })
    }

    fn failed(&self, source: io::Error) -> NetError {
        NetError::NetNs {
            path: self.path.clone(),
            source,
        }
    }
}
