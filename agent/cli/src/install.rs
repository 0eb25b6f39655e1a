//! `hachi install`: what a node needs before the agent starts. Runs in the DaemonSet's init
//! container; doing it again changes nothing.
//!
//! containerd 1.x calls a plugin `loopback` for every Pod, and fails without one: where the directory has
//! none, it gets a link of that name to ours, which does that too.
//!
//! The plugin's binary is replaced by renaming, so the runtime may call it at any moment. The CNI
//! configuration is not written here: the agent does that once it can serve Pods.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use hachi_net::{Changes, Family, enable_forwarding};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// The plugin's name in the runtime's directory.
pub(crate) const PLUGIN: &str = "hachi-cni";

/// The name under which runtimes look for the plugin that brings up `lo`.
const LOOPBACK: &str = "loopback";

/// Options of the command.
#[derive(Args)]
pub(crate) struct Options {
    /// The plugin's binary to install.
    #[arg(long, default_value = "/opt/cni/bin/hachi-cni")]
    plugin: PathBuf,

    /// The runtime's plugin directory, as it is seen from here.
    #[arg(long)]
    cni_bin_dir: PathBuf,

    /// Where a BPF file system has to be mounted.
    #[arg(long, default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,

    /// Directory that hachi-cni keeps addresses and attachments in. What is changed on the node is
    /// recorded there, for the uninstall.
    #[arg(long, default_value = "/var/lib/cni/hachi")]
    data_dir: PathBuf,
}

/// Does it, and says what was done.
pub(crate) fn run(options: &Options) -> Result<()> {
    let target = options.cni_bin_dir.join(PLUGIN);
    let done = |changed: bool| if changed { "installed" } else { "was there" };
    let copied = copy(&options.plugin, &target)
        .with_context(|| format!("cannot install {}", target.display()))?;
    println!("{} {}", target.display(), done(copied));
    let linked = link_loopback(&options.cni_bin_dir)
        .with_context(|| format!("cannot link {LOOPBACK} to {}", target.display()))?;
    println!(
        "{} {}",
        options.cni_bin_dir.join(LOOPBACK).display(),
        done(linked)
    );
    let changes = Changes::of(&options.data_dir)?;
    let mounted = mount_bpffs(&options.bpffs)?;
    if mounted {
        changes.mounted(&options.bpffs)?;
    }
    println!("{} {}", options.bpffs.display(), done(mounted));
    for family in [Family::V4, Family::V6] {
        // A node without IPv6 has nothing to forward there.
        if family == Family::V6 && !Path::new("/proc/sys/net/ipv6").exists() {
            continue;
        }
        if enable_forwarding(family, &changes)
            .with_context(|| format!("cannot turn on forwarding of {family:?}"))?
        {
            println!("forwarding of {family:?} turned on");
        }
    }
    Ok(())
}

/// Puts a copy in place, atomically; `false` if the same content is there already.
fn copy(source: &Path, target: &Path) -> Result<bool> {
    let content = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
    if content.is_empty() {
        bail!("{} is empty", source.display());
    }
    let runs = |there: fs::Metadata| there.permissions().mode() & 0o111 == 0o111;
    if fs::metadata(target).is_ok_and(runs) && fs::read(target).is_ok_and(|it| it == content) {
        return Ok(false);
    }
    let directory = target.parent().context("it has no directory")?;
    fs::create_dir_all(directory)?;
    let temporary = directory.join(format!(".{PLUGIN}.{}", std::process::id()));
    let written = write(&temporary, &content).and_then(|()| fs::rename(&temporary, target));
    if let Err(error) = written {
        // Nothing half-written stays behind.
        let _ = fs::remove_file(&temporary);
        return Err(error.into());
    }
    Ok(true)
}

/// Makes the link unless something of that name is there; `false` if so.
fn link_loopback(directory: &Path) -> io::Result<bool> {
    match symlink(PLUGIN, directory.join(LOOPBACK)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the link, if it is ours.
pub(crate) fn unlink_loopback(directory: &Path) -> io::Result<()> {
    let link = directory.join(LOOPBACK);
    if fs::read_link(&link).is_ok_and(|target| target == Path::new(PLUGIN)) {
        fs::remove_file(link)?;
    }
    Ok(())
}

fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o755)
        .open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Mounts a BPF file system unless one is there; `false` if so.
fn mount_bpffs(path: &Path) -> Result<bool> {
    fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
    let found = statfs(path).with_context(|| format!("cannot look at {}", path.display()))?;
    if found.filesystem_type() == BPF_FS_MAGIC {
        return Ok(false);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700")).with_context(|| {
        format!(
            "cannot mount a BPF file system on {}: the container must be privileged, with \
             mountPropagation Bidirectional on that volume",
            path.display()
        )
    })?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn loopback_is_linked_where_there_is_none_and_only_ours_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join(LOOPBACK);
        assert!(link_loopback(dir.path()).unwrap());
        assert!(!link_loopback(dir.path()).unwrap());
        assert_eq!(fs::read_link(&link).unwrap(), Path::new(PLUGIN));
        unlink_loopback(dir.path()).unwrap();
        assert!(!link.is_symlink());

        fs::write(&link, "another's").unwrap();
        assert!(!link_loopback(dir.path()).unwrap());
        unlink_loopback(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(&link).unwrap(), "another's");
    }

    #[test]
    fn a_copy_is_whole_executable_and_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("new"), dir.path().join("bin/hachi-cni"));
        fs::write(&source, "one").unwrap();
        assert!(copy(&source, &target).unwrap());
        assert!(!copy(&source, &target).unwrap());
        assert_eq!(
            fs::metadata(&target).unwrap().permissions().mode() & 0o777,
            0o755
        );
        // Somebody who runs the old one keeps it.
        let mut old = fs::File::open(&target).unwrap();
        fs::write(&source, "two").unwrap();
        assert!(copy(&source, &target).unwrap());
        assert_eq!(fs::read_to_string(&target).unwrap(), "two");
        assert_eq!(io::read_to_string(&mut old).unwrap(), "one");
        assert_eq!(fs::read_dir(dir.path().join("bin")).unwrap().count(), 1);
    }

    #[test]
    fn a_copy_that_cannot_be_run_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("new"), dir.path().join("hachi-cni"));
        fs::write(&source, "one").unwrap();
        fs::write(&target, "one").unwrap();
        assert!(copy(&source, &target).unwrap());
        assert!(!copy(&source, &target).unwrap());
    }

    /// Whoever calls it at any moment calls the one or the other.
    #[test]
    fn it_is_replaced_while_it_is_being_called() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("hachi-cni");
        let sources = ["a", "b"].map(|end| {
            let source = dir.path().join(end);
            // What follows the last section of a program means nothing.
            let program = fs::read("/bin/true").unwrap();
            fs::write(&source, [&program[..], end.as_bytes()].concat()).unwrap();
            source
        });
        copy(&sources[0], &target).unwrap();
        // At least so often, and until it has been replaced a few times.
        let script = "i=0; while [ $i -lt 300 ] || ! [ -e \"$1\" ]; do \
            \"$0\" || exit 1; i=$((i + 1)); done";
        let enough = dir.path().join("enough");
        let mut caller = Command::new("/bin/sh")
            .args(["-c", script])
            .args([&target, &enough])
            .spawn()
            .unwrap();
        let mut copies = 0;
        let status = loop {
            copies += 1;
            assert!(copy(&sources[copies % 2], &target).unwrap());
            if copies > 2 {
                fs::write(&enough, "").unwrap();
            }
            if let Some(status) = caller.try_wait().unwrap() {
                break status;
            }
        };
        assert!(status.success(), "{status} after {copies} copies");
        assert!(copies > 2, "{copies}");
    }

    #[test]
    fn nothing_is_installed_from_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("hachi-cni");
        fs::write(dir.path().join("empty"), "").unwrap();
        for source in ["empty", "absent"] {
            assert!(copy(&dir.path().join(source), &target).is_err(), "{source}");
        }
        assert!(!target.exists());
    }
}
