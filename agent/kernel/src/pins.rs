//! Where things are pinned, and how all of it is removed.
//!
//! ```text
//! /sys/fs/bpf/hachi/
//!   v1/                    one directory for each ABI version
//!     CONFIG, POLICY, ...  maps
//!     links/
//!       <ifname>-ingress   from_pod: a tcx link, or with clsact the program as a marker
//!       <ifname>-egress    to_pod
//!       <ifname>-uplink_ingress, -uplink_egress   from_net, to_net
//!       <ifname>-overlay_ingress, -overlay_egress from_overlay, to_overlay
//!     xdp/
//!       <ifname>-native, <ifname>-generic         xdp_net: a link
//!     sockets/
//!       connect4, ...      links of the cgroup programs
//! ```

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::{KernelError, attach, attach::Hook, sys};

/// Where Hachi pins unless it is told otherwise.
pub const DEFAULT_PIN_ROOT: &str = "/sys/fs/bpf/hachi";

/// The directories of links in that of an ABI version.
pub(crate) const LINKS: &str = "links";
pub(crate) const XDP: &str = "xdp";
pub(crate) const SOCKETS: &str = "sockets";

/// The directories of one ABI version.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    root: PathBuf,
    version: PathBuf,
    links: PathBuf,
}

impl Pins {
    /// The directories under `root`, which need not exist yet.
    pub(crate) fn new(root: &Path, abi_version: u32) -> Self {
        let version = root.join(format!("v{abi_version}"));
        Self {
            root: root.to_owned(),
            links: version.join(LINKS),
            version,
        }
    }

    /// Makes the directories; an error if they would not be on a BPF file system.
    pub(crate) fn make(&self) -> Result<(), KernelError> {
        let existing = ancestor(&self.links);
        let is_bpffs =
            is_bpffs(existing).map_err(|source| KernelError::pin(existing, "statfs", source))?;
        if !is_bpffs {
            return Err(KernelError::NoBpffs {
                path: self.root.clone(),
            });
        }
        fs::create_dir_all(&self.links)
            .map_err(|source| KernelError::pin(&self.links, "create", source))
    }

    /// Where a map is pinned.
    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.version.join(name)
    }

    /// The directory of maps.
    pub(crate) fn maps(&self) -> &Path {
        &self.version
    }

    /// Where the attachment of a hook is pinned.
    pub(crate) fn link(&self, ifname: &str, hook: Hook) -> PathBuf {
        self.links.join(link_name(ifname, hook))
    }

    /// The directory of the XDP program's links; made when it is needed.
    pub(crate) fn xdp(&self) -> PathBuf {
        self.version.join(XDP)
    }

    /// The same directories of other ABI versions.
    pub(crate) fn other_xdp(&self) -> io::Result<Vec<PathBuf>> {
        let others = self.others()?.into_iter();
        Ok(others.map(|version| version.join(XDP)).collect())
    }

    /// The directory of the cgroup programs' links; made when it is needed.
    pub(crate) fn sockets(&self) -> PathBuf {
        self.version.join(SOCKETS)
    }

    /// The pins of a hook that agents of other ABI versions left.
    pub(crate) fn other_links(&self, ifname: &str, hook: Hook) -> io::Result<Vec<PathBuf>> {
        let name = link_name(ifname, hook);
        let others = self.others()?.into_iter();
        let pins = others.map(|version| version.join(LINKS).join(&name));
        Ok(pins.filter(|pin| pin.exists()).collect())
    }

    /// The directories of other ABI versions, the lowest number first.
    pub(crate) fn others(&self) -> io::Result<Vec<PathBuf>> {
        let mut versions = versions(&self.root)?;
        versions.retain(|version| *version != self.version);
        Ok(versions)
    }

    /// Removes what other ABI versions have pinned and attached; returns how many there were.
    pub(crate) fn remove_others(&self) -> Result<usize, Vec<KernelError>> {
        let others = self
            .others()
            .map_err(|source| vec![KernelError::pin(&self.root, "list", source)])?;
        let mut errors = Vec::new();
        for version in &others {
            remove_version(version, &mut errors);
        }
        if errors.is_empty() {
            Ok(others.len())
        } else {
            Err(errors)
        }
    }

    /// The interfaces with pinned attachments, and their hooks.
    pub(crate) fn attached(&self) -> Result<BTreeMap<String, Vec<Hook>>, KernelError> {
        attached_in(&self.links).map_err(|source| KernelError::pin(&self.links, "list", source))
    }
}

/// The nearest directory at or above a path that exists.
pub(crate) fn ancestor(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(path)
}

/// Whether a path is on a BPF file system.
pub(crate) fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == BPF_FS_MAGIC)
}

fn attached_in(links: &Path) -> io::Result<BTreeMap<String, Vec<Hook>>> {
    let mut found = BTreeMap::<String, Vec<Hook>>::new();
    for entry in fs::read_dir(links)? {
        if let Some((ifname, hook)) = parse_link_name(&entry?.file_name().to_string_lossy()) {
            found.entry(ifname).or_default().push(hook);
        }
    }
    Ok(found)
}

/// The directories of every ABI version under `root`.
fn versions(root: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let number = name.as_deref().and_then(|name| name.strip_prefix('v'));
        if let Some(number) = number.and_then(|number| number.parse::<u32>().ok())
            && path.is_dir()
        {
            found.push((number, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// bpffs reserves names with a dot, which interface names may have.
fn link_name(ifname: &str, hook: Hook) -> String {
    format!("{}-{}", escape(ifname), hook.suffix())
}

pub(crate) fn escape(ifname: &str) -> String {
    ifname.replace('%', "%25").replace('.', "%2e")
}

pub(crate) fn unescape(name: &str) -> String {
    name.replace("%2e", ".").replace("%25", "%")
}

fn parse_link_name(name: &str) -> Option<(String, Hook)> {
    let (ifname, suffix) = name.rsplit_once('-')?;
    let hook = Hook::ALL.into_iter().find(|hook| hook.suffix() == suffix)?;
    Some((unescape(ifname), hook))
}

/// Removes everything that any version of the agent has pinned or attached under `pin_root`.
///
/// What is not there is no error.
///
/// # Errors
/// Everything that could not be removed; the rest is gone.
pub fn remove_all(pin_root: &Path) -> Result<(), Vec<KernelError>> {
    let mut errors = Vec::new();
    let versions = versions(pin_root).unwrap_or_else(|source| {
        errors.push(KernelError::pin(pin_root, "list", source));
        Vec::new()
    });
    for version in versions {
        remove_version(&version, &mut errors);
    }
    // The root may be a mount point, or hold what is not ours.
    if fs::read_dir(pin_root).is_ok_and(|mut entries| entries.next().is_none()) {
        match fs::remove_dir(pin_root) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            result => note(pin_root, result, &mut errors),
        }
    }
    if errors.is_empty() {
        Ok(())
    } else {
        Err(errors)
    }
}

/// Removes what one ABI version has pinned and attached.
fn remove_version(version: &Path, errors: &mut Vec<KernelError>) {
    let links = version.join(LINKS);
    match attached_in(&links) {
        Ok(attached) => {
            for (ifname, hooks) in attached {
                for hook in hooks {
                    let pin = links.join(link_name(&ifname, hook));
                    errors.extend(attach::release(&pin, &ifname, hook).err());
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => errors.push(KernelError::pin(&links, "list", source)),
    }
    for links in [XDP, SOCKETS] {
        release_links(&version.join(links), errors);
    }
    remove_tree(version, errors);
}

/// Detaches all links of a directory and removes their pins.
pub(crate) fn release_links(directory: &Path, errors: &mut Vec<KernelError>) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries {
        errors.extend(release_link(&entry.path()).err());
    }
}

/// Detaches a pinned link at once and removes its pin, if it is there. Without its pin alone it would
/// go too, but when a worker of the kernel gets to it.
pub(crate) fn release_link(pin: &Path) -> Result<(), KernelError> {
    if let Ok(link) = sys::get(pin)
        && let Err(error) = sys::link_detach(link.as_fd())
    {
        // It goes with its last reference then, or has gone with what it was attached to.
        tracing::debug!(%error, pin = %pin.display(), "the link is let go instead");
    }
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::pin(pin, "remove", error))
        }
        _ => Ok(()),
    }
}

/// Removes a directory with all that is in it.
pub(crate) fn remove_tree(path: &Path, errors: &mut Vec<KernelError>) {
    match fs::read_dir(path) {
        Ok(entries) => {
            for entry in entries.flatten() {
                let path = entry.path();
                if path.is_dir() {
                    remove_tree(&path, errors);
                } else {
                    note(&path, fs::remove_file(&path), errors);
                }
            }
            note(path, fs::remove_dir(path), errors);
        }
        Err(source) => note(path, Err(source), errors),
    }
}

fn note(path: &Path, result: io::Result<()>, errors: &mut Vec<KernelError>) {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            errors.push(KernelError::pin(path, "remove", error));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_links_survive_dots_and_dashes() {
        for ifname in ["hachi1a2b", "eth0.100", "a-b", "50%2e", "-"] {
            for hook in Hook::ALL {
                let name = link_name(ifname, hook);
                assert!(!name.contains('.'), "{name}");
                assert_eq!(parse_link_name(&name), Some((ifname.to_owned(), hook)));
            }
        }
    }

    #[test]
    fn other_files_are_no_links() {
        for name in ["", "eth0", "eth0-", "eth0-sideways"] {
            assert_eq!(parse_link_name(name), None);
        }
    }

    #[test]
    fn nothing_to_remove_is_success() {
        let directory = tempfile::tempdir().expect("a directory");
        assert!(remove_all(&directory.path().join("absent")).is_ok());
    }

    #[test]
    fn what_is_not_ours_stays() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(directory.path().join("v1/links")).expect("a version");
        fs::create_dir_all(directory.path().join("vendor")).expect("another's");
        remove_all(directory.path()).expect("removed");
        assert!(!directory.path().join("v1").exists());
        assert!(directory.path().join("vendor").exists());
    }

    #[test]
    fn a_directory_that_is_no_bpffs_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let error = Pins::new(&directory.path().join("hachi"), 1)
            .make()
            .expect_err("no bpffs");
        assert!(matches!(error, KernelError::NoBpffs { .. }), "{error}");
        assert!(error.to_string().contains("mount -t bpf"), "{error}");
    }
}
