//! What can go wrong with links, routes and namespaces.

use std::{io, path::PathBuf};

use crate::StoreError;

/// An error of the kernel or of a namespace.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The kernel refused a netlink request.
    #[error("cannot {what}: {source}{}", note(.hint))]
    Request {
        /// What was asked.
        what: String,
        /// The kernel's error.
        source: io::Error,
        /// The kernel's own explanation; often empty.
        hint: String,
    },
    /// The netlink socket failed.
    #[error("netlink: {0}")]
    Socket(#[source] io::Error),
    /// The kernel's answer is not understood.
    #[error("netlink: {0}")]
    Garbled(String),
    /// A path that should be a network namespace is none, or cannot be opened.
    #[error("{} is not a usable network namespace: {source}", path.display())]
    NetNs {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A kernel setting cannot be read or written.
    #[error("cannot set {}: {source}", path.display())]
    Sysctl {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another agent works with a directory.
    #[error("another agent works with {}: {holder}; end it first", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Its process, as far as it can be seen.
        holder: String,
    },
    /// A directory cannot be locked.
    #[error("cannot lock {}: {source}", path.display())]
    Lock {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is changed cannot be recorded.
    #[error("cannot record what is changed on the node: {0}")]
    Record(#[from] StoreError),
    /// The interface exists in the Pod's namespace already.
    #[error("the interface {0} exists in the namespace already")]
    Exists(String),
}

fn note(hint: &str) -> String {
    if hint.is_empty() {
        String::new()
    } else {
        format!(" ({hint})")
    }
}

impl NetError {
    /// The kernel's error number, if it was the kernel that refused.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Request { source, .. }
            | Self::Socket(source)
            | Self::NetNs { source, .. }
            | Self::Lock { source, .. }
            | Self::Sysctl { source, .. } => source.raw_os_error(),
            Self::Garbled(_) | Self::InUse { .. } | Self::Record(_) | Self::Exists(_) => None,
        }
    }

    /// Whether the thing asked about does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        const ABSENT: [i32; 3] = [nix::libc::ENODEV, nix::libc::ENOENT, nix::libc::ESRCH];
        self.errno().is_some_and(|number| ABSENT.contains(&number))
    }

    pub(crate) fn is(&self, number: nix::errno::Errno) -> bool {
        self.errno() == Some(number as i32)
    }
}
