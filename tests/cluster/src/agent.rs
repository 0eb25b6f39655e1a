//! The agents: one process a node, with the capabilities that the manifests give, kept running if
//! asked for.

use std::{
    os::{
        fd::AsRawFd as _,
        unix::{fs::OpenOptionsExt as _, process::ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::Child,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use hachi_api::{Client, Reply, Request, Status};
use nix::{
    fcntl::OFlag,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{names::ClusterId, node::Node, spawn::Launch};

mod manifest;

pub use manifest::capabilities;

/// The agent of one node.
#[derive(Debug)]
pub(crate) struct Agent {
    id: ClusterId,
    node: Arc<Node>,
    program: PathBuf,
    process: Mutex<Process>,
}

#[derive(Debug, Default)]
struct Process {
    child: Option<Child>,
    /// Whether it is meant to run.
    wanted: bool,
    /// Options besides those that every agent has.
    options: Vec<String>,
    /// A capability of the manifest that it does without.
    without: Option<String>,
}

impl Agent {
    pub(crate) fn new(
        id: ClusterId,
        node: Arc<Node>,
        program: PathBuf,
        options: Vec<String>,
    ) -> Self {
        let process = Process {
            options,
            ..Process::default()
        };
        Self {
            id,
            node,
            program,
            process: Mutex::new(process),
        }
    }

    fn process(&self) -> std::sync::MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts it; one that runs already is left alone.
    pub(crate) fn start(&self) -> Result<()> {
        let mut process = self.process();
        process.wanted = true;
        if process.child.is_some() {
            return Ok(());
        }
        process.child = Some(self.launch(&process)?);
        Ok(())
    }

    /// As [`Self::start`], with these options, then and whenever it is started again.
    pub(crate) fn start_with(&self, options: &[&str]) -> Result<()> {
        self.process().options = options.iter().map(|&option| option.to_owned()).collect();
        self.start()
    }

    /// As [`Self::start`], without one of the capabilities that the manifest gives.
    pub(crate) fn start_without(&self, capability: Option<&str>) -> Result<()> {
        self.process().without = capability.map(ToOwned::to_owned);
        self.start()
    }

    fn launch(&self, process: &Process) -> Result<Child> {
        let parent = std::process::id().to_string();
        let mut capabilities = capabilities()?;
        capabilities.retain(|name| Some(name) != process.without.as_ref());
        let capabilities = capabilities.join(",");
        let options = ["--die-with", &parent, "--capabilities", &capabilities];
        let mut launch = Launch::new(&self.node.place(), &self.id, &options, &self.program)?;
        launch
            .command()
            .args(["--node-name", &self.node.name])
            .args(["--kubeconfig", "/run/hachi/kubeconfig"])
            .args(["--look-for-kinds", "500ms"])
            .args(&process.options);
        // All nodes share the machine's tree: each serves the sockets of its own processes.
        match &self.node.cgroup {
            Some(cgroup) => launch.command().arg("--cgroup-root").arg(cgroup),
            None => launch.command().args(["--socket-lb", "off"]),
        };
        launch.log_to(&self.node.agent_log())?;
        launch
            .start()
            .with_context(|| format!("start the agent of {}", self.node.name))
    }

    /// Sends it a signal and waits for its end.
    pub(crate) fn stop(&self, signal: Signal) -> Result<()> {
        let mut process = self.process();
        process.wanted = false;
        let Some(mut child) = process.child.take() else {
            return Ok(());
        };
        let pid = Pid::from_raw(i32::try_from(child.id()).context("a process id out of range")?);
        kill(pid, signal).with_context(|| format!("signal the agent of {}", self.node.name))?;
        child.wait().context("wait for the agent")?;
        Ok(())
    }

    /// Its process id, while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process().child.as_ref().map(Child::id)
    }

    /// Notices its end, and starts it again if it is meant to run and `revive` says so.
    pub(crate) fn tend(&self, revive: bool) -> Result<()> {
        let mut process = self.process();
        let Some(child) = &mut process.child else {
            return Ok(());
        };
        let Some(status) = child.try_wait().context("look after the agent")? else {
            return Ok(());
        };
        process.child = None;
        tracing::warn!(
            node = self.node.name,
            code = status.code(),
            signal = status.signal(),
            log = %self.node.agent_log().display(),
            "the agent ended"
        );
        if revive && process.wanted {
            process.child = Some(self.launch(&process)?);
        }
        Ok(())
    }

    /// Waits until it can serve an ADD.
    pub(crate) fn wait_ready(&self, limit: Duration) -> Result<Status> {
        let deadline = Instant::now() + limit;
        let mut last = "it has not answered yet".to_owned();
        while Instant::now() < deadline {
            match status(&self.node.agent_socket()) {
                Ok(status) if status.ready => return Ok(status),
                Ok(status) => last = status.problems.join("; "),
                Err(error) => last = format!("{error:#}"),
            }
            if self.pid().is_none() {
                last = "it does not run".into();
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!(
            "the agent of {} is not ready: {last}; see {}",
            self.node.name,
            self.node.agent_log().display()
        )
    }
}

/// Asks an agent for its status.
pub fn status(socket: &Path) -> Result<Status> {
    match ask(socket, &Request::Status)? {
        Reply::Status { status } => Ok(*status),
        other => bail!("the agent answered {other:?}"),
    }
}

/// Sends one request to an agent, over its socket as this machine sees it.
pub fn ask(socket: &Path, request: &Request) -> Result<Reply> {
    // A socket's address has room for 107 bytes; the path may be longer.
    let (dir, name) = socket
        .parent()
        .zip(socket.file_name())
        .context("not a socket's path")?;
    let dir = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_PATH.bits())
        .open(dir)
        .with_context(|| format!("open {}", dir.display()))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    let mut client = Client::connect(&short)
        .with_context(|| format!("reach the agent at {}", socket.display()))?;
    client.call(request).context("ask the agent")
}
