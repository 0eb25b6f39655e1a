//! Network namespaces, held by an open descriptor and by nothing else.
//!
//! A namespace lives as long as the process that runs the cluster: a cluster that is killed in any
//! way takes its namespaces with it. For people and for `ip netns exec`, `/run/netns/<name>` is a
//! symbolic link to that descriptor under `/proc`, so no mount is made outside the nodes.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns, unshare};

use crate::run;

/// Where `ip netns` looks for names.
pub const NETNS_DIR: &str = "/run/netns";

/// A network namespace of the cluster; gone when this value (and its last process) is.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
    link: Option<PathBuf>,
}

impl Netns {
    /// Makes a namespace with its loopback up, and its link under [`NETNS_DIR`].
    pub fn create(name: &str) -> Result<Self> {
        let file = on_thread(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare a network namespace")?;
            run::ip_batch("link set lo up")?;
            File::open("/proc/thread-self/ns/net").context("open the new network namespace")
        })?;
        fs::create_dir_all(NETNS_DIR).with_context(|| format!("create {NETNS_DIR}"))?;
        let link = Path::new(NETNS_DIR).join(name);
        let netns = Self {
            name: name.to_owned(),
            file,
            link: Some(link.clone()),
        };
        std::os::unix::fs::symlink(netns.path(), &link)
            .with_context(|| format!("link {}", link.display()))?;
        Ok(netns)
    }

    /// The namespace of a process, which somebody else has made; it lives as long as this value.
    pub fn of_process(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/net");
        Ok(Self {
            file: File::open(&path).with_context(|| format!("open {path}"))?,
            name: format!("of process {pid}"),
            link: None,
        })
    }

    /// Its name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path that any process of this machine can open while the cluster runs.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        fd_path(&self.file)
    }

    /// The open namespace.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Runs `f` on a thread of its own inside the namespace. Sockets that it makes stay there.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        on_thread(|| {
            setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("enter the network namespace {}", self.name))?;
            Ok(f())
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            // Gone already is as good.
            let _ = fs::remove_file(link);
        }
    }
}

/// The path under `/proc` by which other processes reach an open file of this one.
#[must_use]
pub fn fd_path(file: &File) -> PathBuf {
    PathBuf::from(format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        file.as_raw_fd()
    ))
}

/// Opens a namespace by a path or by a name under [`NETNS_DIR`].
pub fn open(path: &Path) -> io::Result<File> {
    File::open(path)
}

/// Runs `f` on a new thread, because a namespace is a thread's: it must not stay behind on one
/// that does other work. A panic of `f` goes on here.
pub(crate) fn on_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(f)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
