//! Cgroups: one for each cluster, with one for each node below. They are what a cluster's processes
//! are found and ended by. A machine without a writable cgroup2 tree does without.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::{cleanup::END_LIMIT, names::ClusterId};

/// The machine's cgroup2 tree, also where version 1 is mounted beside it.
#[must_use]
pub fn root() -> Option<PathBuf> {
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.join("cgroup.controllers").is_file())
}

/// The roots of the hierarchies of version 1 that have controllers; containers of a real runtime have
/// cgroups in each.
#[must_use]
pub fn version_1() -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/fs/cgroup").into_iter().flatten();
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| !path.is_symlink() && path.join("release_agent").is_file())
        .collect()
}

/// Makes the cgroup of a node; none where the machine does not let us.
#[must_use]
pub fn create(id: &ClusterId, node: &str) -> Option<PathBuf> {
    let path = root()?.join(id.stem()).join(node);
    match fs::create_dir_all(&path) {
        Ok(()) => Some(path),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "no cgroup for the node");
            None
        }
    }
}

/// The ids of clusters that have a cgroup.
#[must_use]
pub fn ids() -> Vec<ClusterId> {
    let Some(entries) = root().and_then(|root| fs::read_dir(root).ok()) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| ClusterId::of_name(entry.file_name().to_str()?))
        .collect()
}

/// Ends every process in a cgroup and below, and waits until all are gone.
pub fn kill(path: &Path) -> std::io::Result<()> {
    // Kernels from 5.14 on.
    fs::write(path.join("cgroup.kill"), "1")?;
    for _ in 0..1000 {
        let events = fs::read_to_string(path.join("cgroup.events"))?;
        if events.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Err(std::io::Error::other("processes do not end"))
}

/// Ends every process in a cluster's cgroups and removes them.
pub fn destroy(id: &ClusterId) -> std::io::Result<()> {
    let Some(path) = root().map(|root| root.join(id.stem())) else {
        return Ok(());
    };
    let containers = version_1();
    let containers = containers.iter().map(|root| root.join(id.stem()));
    if !path.is_dir() {
        return Ok(());
    }
    // Kernels from 5.14 on; on older ones the caller has already ended them one by one.
    let _ = fs::write(path.join("cgroup.kill"), "1");
    let mut result = Ok(());
    for path in containers.chain([path.clone()]) {
        result = result.and(remove(&path));
    }
    result
}

fn remove(path: &Path) -> std::io::Result<()> {
    // A cgroup stays busy until its last process has been reaped.
    let deadline = Instant::now() + END_LIMIT;
    loop {
        let result = remove_tree(path);
        if result.is_ok() || Instant::now() >= deadline {
            return result;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn remove_tree(path: &Path) -> std::io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
