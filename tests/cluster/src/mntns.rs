//! A node's mount namespace: its own `/run`, `/sys`, bpffs and CNI directories, over the
//! machine's file system, which never changes.
//!
//! ```text
//! /run          tmpfs          /run/hachi, /run/netns   <- DIR/nodes/NAME/{run,netns}
//! /sys          sysfs of the node's network namespace, the machine's cgroups, a new bpffs
//! /etc/cni/net.d, /opt/cni/bin, /var/lib/cni            <- DIR/nodes/NAME/{net.d,bin,cni}
//! ```
//! A node with a real kubelet has besides: directories for it and for containerd, no bpffs (the DaemonSet
//! mounts one), its own cgroup in place of the machine's cgroup2 tree, and mounts that are shared among
//! its containers, as systemd makes them.
//!
//! Mount points that the machine lacks are not made on it: the nearest directory that exists is
//! covered with a tmpfs that shows the same entries, and the mount point is made there.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::{OpenOptionsExt as _, symlink},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    fcntl::OFlag,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use crate::{
    cgroup,
    netns::{Netns, fd_path, on_thread},
    options::Kubelets,
};

/// A node's directory on the machine, and where the node sees it.
const DIRECTORIES: [(&str, &str); 5] = [
    ("run", "/run/hachi"),
    ("netns", "/run/netns"),
    ("net.d", "/etc/cni/net.d"),
    ("bin", "/opt/cni/bin"),
    ("cni", "/var/lib/cni"),
];

/// Further ones of a node with a real kubelet.
const KUBELET_DIRECTORIES: [(&str, &str); 4] = [
    ("kubelet", "/var/lib/kubelet"),
    ("containerd", "/var/lib/containerd"),
    ("logs", "/var/log/pods"),
    ("links", "/var/log/containers"),
];

/// Settings of the whole machine that a kubelet changes, with the values that it wants: it finds them
/// in files of its own, and the machine keeps what it has.
const KUBELET_SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

const NONE: Option<&str> = None;

/// A mount namespace, held by an open descriptor.
#[derive(Debug)]
pub struct Mntns {
    file: File,
}

impl Mntns {
    /// Makes the mount namespace of the node whose directories are below `dir`.
    pub(crate) fn create(
        netns: &Netns,
        dir: &Path,
        kubelets: Kubelets,
        cgroup: Option<&Path>,
    ) -> Result<Self> {
        let file = netns.enter(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNS).context("unshare a mount namespace")?;
            match kubelets {
                Kubelets::Played => {
                    populate(dir, &DIRECTORIES)?;
                    bpffs()?;
                }
                Kubelets::Real => {
                    populate(dir, &[&DIRECTORIES[..], &KUBELET_DIRECTORIES].concat())?;
                    settings()?;
                    own_cgroup(cgroup)?;
                    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SHARED, NONE)
                        .context("share the node's mounts with its containers")?;
                }
            }
            File::open("/proc/thread-self/ns/mnt").context("open the new mount namespace")
        })??;
        Ok(Self { file })
    }

    /// A path that any process of this machine can open while the cluster runs.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        fd_path(&self.file)
    }

    /// Runs `f` on a thread of its own inside the mount namespace.
    pub(crate) fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_FS).context("unshare the working directory")?;
            setns(self.file.as_fd(), CloneFlags::CLONE_NEWNS).context("enter a node's mounts")?;
            Ok(f())
        })
    }

    /// Mounts a network namespace at its name, as a runtime does before it calls a plugin.
    pub(crate) fn bind_netns(&self, netns: &Netns) -> Result<PathBuf> {
        let target = Path::new(crate::netns::NETNS_DIR).join(netns.name());
        self.enter(|| -> Result<()> {
            File::create(&target).with_context(|| format!("create {}", target.display()))?;
            bind(&netns.path(), &target)
        })??;
        Ok(target)
    }

    /// Undoes [`Self::bind_netns`]; what is gone already is no error.
    pub(crate) fn unbind_netns(&self, netns: &Netns) -> Result<()> {
        let target = Path::new(crate::netns::NETNS_DIR).join(netns.name());
        self.enter(|| {
            let _ = umount2(&target, MntFlags::MNT_DETACH);
            let _ = fs::remove_file(&target);
        })
    }

    /// Drops what a machine forgets without power: what is in `/run`, and every mount that was made
    /// since, with the BPF file system and what is pinned there.
    pub(crate) fn forget(&self) -> Result<()> {
        self.enter(|| -> Result<()> {
            let mounts = fs::read_to_string("/proc/thread-self/mountinfo")
                .context("read the node's mounts")?;
            let later = |path: &&str| {
                let made = ["/run/", "/sys/fs/bpf", "/var/lib/kubelet/"];
                let own = DIRECTORIES.iter().chain(&KUBELET_DIRECTORIES);
                made.iter().any(|prefix| path.starts_with(prefix))
                    && !own.clone().any(|(_, target)| target == path)
                    && !path.starts_with("/run/settings/")
            };
            let paths = mounts.lines().filter_map(|line| line.split(' ').nth(4));
            for path in paths.filter(later).collect::<Vec<_>>().into_iter().rev() {
                // One above it may have gone with it.
                let _ = umount2(path, MntFlags::MNT_DETACH);
            }
            for (directory, keeps) in [
                ("/run", &["hachi", "netns", "lock", "settings"][..]),
                ("/run/hachi", &["kubeconfig"]),
                ("/run/netns", &[]),
            ] {
                let entries = fs::read_dir(directory).context("list the node's /run")?;
                for entry in entries.flatten() {
                    if keeps.iter().any(|kept| entry.file_name() == *kept) {
                        continue;
                    }
                    let path = entry.path();
                    let removed = if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                        fs::remove_dir_all(&path)
                    } else {
                        fs::remove_file(&path)
                    };
                    removed.with_context(|| format!("remove {}", path.display()))?;
                }
            }
            Ok(())
        })?
    }
}

fn populate(dir: &Path, directories: &[(&str, &str)]) -> Result<()> {
    for (name, _) in directories {
        let path = dir.join(name);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    }
    // Nothing of the node may reach the machine, whatever its mounts' propagation.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .context("make the node's mounts private")?;
    // Opened now: the paths may be covered by what is mounted below.
    let sources = directories
        .iter()
        .map(|(name, target)| Ok((open_path(&dir.join(name))?, *target)))
        .collect::<Result<Vec<_>>>()?;
    let cgroups = open_path(Path::new("/sys/fs/cgroup"));

    tmpfs(Path::new("/run"))?;
    for name in ["hachi", "netns", "lock"] {
        fs::create_dir(Path::new("/run").join(name)).context("create the node's /run")?;
    }
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), NONE)
        .context("mount the node's sysfs")?;
    if let Ok(cgroups) = cgroups {
        bind(&proc_path(&cgroups), Path::new("/sys/fs/cgroup"))?;
    }
    for (source, target) in sources {
        let target = Path::new(target);
        provide(target)?;
        bind(&proc_path(&source), target)?;
    }
    Ok(())
}

fn bpffs() -> Result<()> {
    mount(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        Some("mode=0700"),
    )
    .context("mount the node's bpffs (the kernel needs CONFIG_BPF_SYSCALL)")
}

/// Covers [`KUBELET_SETTINGS`] with files.
fn settings() -> Result<()> {
    let files = Path::new("/run/settings");
    for (name, value) in KUBELET_SETTINGS {
        let target = Path::new("/proc/sys").join(name);
        let file = files.join(name.replace('/', "."));
        fs::create_dir_all(files).context("create a directory for settings")?;
        fs::write(&file, format!("{value}\n"))
            .with_context(|| format!("write {}", file.display()))?;
        bind(&file, &target)?;
    }
    Ok(())
}

/// Shows the node's cgroup where the machine's cgroup2 tree is, so that programs on "all" processes
/// are on the node's.
fn own_cgroup(cgroup: Option<&Path>) -> Result<()> {
    match (cgroup::root(), cgroup) {
        (Some(root), Some(own)) => bind(own, &root),
        _ => bail!("a node with a kubelet needs a cgroup of version 2 of its own"),
    }
}

/// Makes sure that a directory exists in this mount namespace, without making it on the machine.
fn provide(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let Some(base) = path.ancestors().find(|path| path.is_dir()) else {
        bail!("no directory above {}", path.display());
    };
    if base == Path::new("/") {
        bail!(
            "{} is missing; create its top directory once by hand",
            path.display()
        );
    }
    mirror(base)?;
    fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))
}

/// Covers a directory with a tmpfs that shows the same entries.
fn mirror(dir: &Path) -> Result<()> {
    let below = open_path(dir)?;
    let entries = fs::read_dir(dir)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("list {}", dir.display()))?;
    let kinds = entries
        .iter()
        .map(|entry| {
            Ok((
                entry.file_name(),
                entry.file_type()?,
                entry.path().read_link().ok(),
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    tmpfs(dir)?;
    for (name, kind, link) in kinds {
        let target = dir.join(&name);
        if let Some(link) = link {
            symlink(link, &target).with_context(|| format!("link {}", target.display()))?;
            continue;
        }
        if kind.is_dir() {
            fs::create_dir(&target).with_context(|| format!("create {}", target.display()))?;
        } else {
            File::create(&target).with_context(|| format!("create {}", target.display()))?;
        }
        bind(&proc_path(&below).join(&name), &target)?;
    }
    Ok(())
}

fn tmpfs(target: &Path) -> Result<()> {
    mount(
        Some("tmpfs"),
        target,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755"),
    )
    .with_context(|| format!("mount a tmpfs on the node's {}", target.display()))
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    mount(
        Some(source),
        target,
        NONE,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        NONE,
    )
    .with_context(|| format!("bind {} to {}", source.display(), target.display()))
}

fn open_path(path: &Path) -> Result<File> {
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_PATH.bits())
        .open(path)
        .with_context(|| format!("open {}", path.display()))
}

fn proc_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
