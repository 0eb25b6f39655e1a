//! Enters namespaces and becomes another program (`hachi-pod enter`).
//!
//! Only for a process with a single thread.

use std::{
    fs::{self, File},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::PathBuf,
    process::Command,
};

use anyhow::{Context as _, Error, Result, bail};
use caps::{CapSet, Capability, CapsHashSet};
use nix::{
    sched::{CloneFlags, setns},
    sys::{prctl, signal::Signal},
    unistd::{Pid, alarm, getppid},
};

use crate::names::ID_VARIABLE;

/// What to enter and what to become.
#[derive(Debug, clap::Args)]
pub struct Enter {
    /// Network namespace to enter, as a path.
    #[arg(long)]
    pub netns: Option<PathBuf>,
    /// Mount namespace to enter, as a path.
    #[arg(long)]
    pub mntns: Option<PathBuf>,
    /// Cgroup to move to first, as a directory.
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// Be killed when the process of this id, which must be the parent, ends.
    #[arg(long, value_name = "PID")]
    pub die_with: Option<i32>,
    /// Be ended by SIGALRM after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub limit: Option<u32>,
    /// Leave the program no other capabilities than these, as in `NET_ADMIN,BPF`.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub capabilities: Option<Vec<String>>,
    /// Mark the program's environment as a cluster's, so that it ends with the cluster.
    #[arg(long, value_name = "ID")]
    pub mark: Option<String>,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    pub program: Vec<std::ffi::OsString>,
}

impl Enter {
    /// Does it; returns only if that failed.
    #[must_use]
    pub fn exec(self) -> Error {
        match self.prepare() {
            Ok(mut command) => {
                let error = command.exec();
                let name = command.get_program().to_string_lossy().into_owned();
                Error::new(error).context(format!("run {name}"))
            }
            Err(error) => error,
        }
    }

    fn prepare(self) -> Result<Command> {
        if let Some(cgroup) = &self.cgroup {
            // Best effort, as the cgroup itself: a machine may keep its tree to itself.
            if let Err(error) = fs::write(cgroup.join("cgroup.procs"), "0") {
                eprintln!("hachi-pod: not in the cgroup {}: {error}", cgroup.display());
            }
        }
        let here = std::env::current_dir();
        // Both are opened before either is entered: the paths are those of the caller.
        let open = |path: &PathBuf| {
            File::open(path).with_context(|| {
                format!(
                    "open the namespace {} (does the cluster still run?)",
                    path.display()
                )
            })
        };
        let netns = self.netns.as_ref().map(open).transpose()?;
        let mntns = self.mntns.as_ref().map(open).transpose()?;
        if let Some(netns) = netns {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)
                .context("enter the network namespace")?;
        }
        if let Some(mntns) = mntns {
            setns(mntns.as_fd(), CloneFlags::CLONE_NEWNS).context("enter the mount namespace")?;
            if let Ok(here) = here {
                // The node may not have that directory; it then starts at the root.
                let _ = std::env::set_current_dir(here);
            }
        }
        if let Some(seconds) = self.limit {
            alarm::set(seconds);
        }
        if let Some(parent) = self.die_with {
            prctl::set_pdeathsig(Signal::SIGKILL).context("ask to die with the parent")?;
            if getppid() != Pid::from_raw(parent) {
                bail!("the process {parent} that asked for this one is gone");
            }
        }
        if let Some(names) = &self.capabilities {
            leave_only(names)?;
        }
        let mut program = self.program.into_iter();
        let mut command = Command::new(program.next().context("no program given")?);
        command.args(program);
        if let Some(id) = self.mark {
            command.env(ID_VARIABLE, id);
        }
        command.env("PATH", path()?);
        Ok(command)
    }
}

/// Takes all other capabilities from what this process becomes: a program of root is given what is in
/// the bounding set (capabilities(7)).
fn leave_only(names: &[String]) -> Result<()> {
    let mut kept = CapsHashSet::new();
    for name in names {
        let capability = format!("CAP_{name}").parse::<Capability>();
        kept.insert(capability.with_context(|| format!("no capability: {name}"))?);
    }
    for capability in caps::runtime::thread_all_supported() {
        if !kept.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability)
                .with_context(|| format!("drop {capability}"))?;
        }
    }
    caps::clear(None, CapSet::Ambient).context("clear the ambient capabilities")?;
    caps::clear(None, CapSet::Inheritable).context("clear the inheritable capabilities")
}

/// The search path, with `hachi-pod` and its neighbours on it.
fn path() -> Result<std::ffi::OsString> {
    let own = std::env::current_exe().context("find the running program")?;
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&dirs)
        .chain(own.parent().map(std::path::Path::to_path_buf))
        .collect::<Vec<_>>();
    std::env::join_paths(dirs).context("build the search path")
}
