//! Starts processes inside the cluster's namespaces, bound to the life of this process.
//!
//! `hachi-pod enter` enters the namespaces and becomes the program (a process can change its mount
//! namespace only while it has one thread, so the caller cannot). It asks the kernel to be killed
//! with its parent. The parent in that sense is the *thread* that started it, so all are started
//! by one that stays until the end.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{OnceLock, mpsc},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::{
    names::{ClusterId, ID_VARIABLE},
    run,
};

type Job = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts a process from the thread that stays until this process ends.
pub(crate) fn spawn(command: Command) -> io::Result<Child> {
    static JOBS: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (jobs, todo) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, reply) in todo {
                // Whoever asked may have given up; the child is then dropped, and dies with us.
                let _ = reply.send(command.spawn());
            }
        });
        jobs
    });
    let (reply, answer) = mpsc::channel();
    let gone = || io::Error::other("the thread that starts processes is gone");
    jobs.send((command, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

/// Where a program is to run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Place {
    /// Path of the network namespace.
    pub netns: PathBuf,
    /// Path of the mount namespace; absent for the machine's.
    pub mntns: Option<PathBuf>,
    /// Path of the cgroup.
    pub cgroup: Option<PathBuf>,
}

/// A program to start in a [`Place`].
#[derive(Debug)]
pub(crate) struct Launch {
    command: Command,
}

impl Launch {
    /// Prepares `program`; `options` are further ones of `hachi-pod enter`.
    pub(crate) fn new(
        place: &Place,
        id: &ClusterId,
        options: &[&str],
        program: impl AsRef<OsStr>,
    ) -> Result<Self> {
        let mut command = Command::new(run::own_binary("hachi-pod")?);
        command
            .arg("enter")
            .args(place.arguments())
            .args(options)
            .arg("--")
            .arg(program);
        command.env(ID_VARIABLE, id.as_str()).stdin(Stdio::null());
        Ok(Self { command })
    }

    /// The command, to add arguments and environment to.
    pub(crate) fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Sends what it prints to a log file, after what is there.
    pub(crate) fn log_to(&mut self, path: &Path) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| format!("open {}", path.display()))?;
        let both = log.try_clone().context("share the log file")?;
        self.command.stdout(log).stderr(both);
        Ok(())
    }

    /// Starts it, to be killed with this process.
    pub(crate) fn start(self) -> Result<Child> {
        spawn(self.command).context("start a process of the cluster")
    }

    /// Hands over the command, to be run to its end.
    pub(crate) fn into_command(self) -> Command {
        self.command
    }
}

impl Place {
    /// As arguments of `hachi-pod enter`.
    #[must_use]
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments = vec!["--netns".into(), self.netns.clone().into_os_string()];
        for (flag, path) in [("--mntns", &self.mntns), ("--cgroup", &self.cgroup)] {
            if let Some(path) = path {
                arguments.extend([OsString::from(flag), path.clone().into_os_string()]);
            }
        }
        arguments
    }
}
