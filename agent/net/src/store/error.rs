//! What can go wrong with the store.

use std::{io, net::IpAddr, path::PathBuf, time::Duration};

/// An error of the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file or directory cannot be used.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another process holds the lock for too long.
    #[error("{} is locked by another process for more than {} s", path.display(), waited.as_secs_f32())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A file does not say what it should.
    #[error("{} is not readable: {why}", path.display())]
    Garbled {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Every address of a set of ranges is in use.
    #[error("no free address in {0}")]
    Exhausted(String),
    /// A requested address is in use.
    #[error("the requested address {address} is in use by {owner}")]
    Taken {
        /// The address.
        address: IpAddr,
        /// Who has it.
        owner: String,
    },
    /// A requested address is not one that may be given out.
    #[error("the requested address {0} is in no range, or reserved or excluded there")]
    NotInRange(IpAddr),
    /// A container id or interface name that cannot be a file name.
    #[error("{0:?} cannot be the name of a file")]
    BadName(String),
}

impl StoreError {
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }

    pub(super) fn garbled(path: impl Into<PathBuf>, why: impl ToString) -> Self {
        Self::Garbled {
            path: path.into(),
            why: why.to_string(),
        }
    }
}
