//! The commands of `hachi-cluster`, apart from the demo.
//!
//! ```text
//!  up ──starts──> supervise (own session, owns the cluster)
//!   ^                │ progress, one line each; then READY
//!   └────pipe────────┘
//!  down ──SIGTERM──> supervise
//! ```

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Error, Result, bail};
use nix::{
    sys::signal::{SigSet, Signal, kill},
    unistd::{Pid, setsid},
};

use crate::{
    ClusterId, cleanup,
    cluster::Cluster,
    enter::Enter,
    options::{Family, Network, Options},
    state::State,
};

/// What the supervisor prints when the cluster is ready.
const READY: &str = "READY";

/// How long an orderly end may take before it is enforced.
const END_LIMIT: Duration = Duration::from_secs(30);

/// How to start a cluster.
#[derive(Debug, clap::Args)]
pub struct Up {
    /// How many nodes.
    #[arg(long, default_value_t = 2)]
    pub nodes: usize,
    /// Address families.
    #[arg(long, value_enum, default_value_t = Family::Dual)]
    pub family: Family,
    /// Stay in the foreground, and end the cluster with Ctrl-C.
    #[arg(long)]
    pub foreground: bool,
    /// Another CNI configuration list than Hachi's, to compare with.
    #[arg(long, value_name = "FILE")]
    pub conflist: Option<PathBuf>,
    /// The network that joins the nodes.
    #[arg(long, value_enum, default_value_t)]
    pub network: Network,
    /// A further plugin to install on the nodes; may be repeated.
    #[arg(long = "plugin", value_name = "FILE")]
    pub plugins: Vec<PathBuf>,
    /// Run no agents.
    #[arg(long)]
    pub without_agents: bool,
}

impl Up {
    fn options(&self, dir: &Path, dist: &Path) -> Result<Options> {
        let mut options = Options::new(dir, dist, self.family);
        options.nodes = self.nodes;
        options.network = self.network;
        options.plugins.clone_from(&self.plugins);
        options.agents = !self.without_agents;
        options.revive = true;
        if let Some(path) = &self.conflist {
            options.conflist =
                fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        }
        options.check()?;
        Ok(options)
    }

    /// As arguments of `supervise`.
    fn arguments(&self) -> Result<Vec<OsString>> {
        let family = clap::ValueEnum::to_possible_value(&self.family).context("no such family")?;
        let mut arguments: Vec<OsString> = vec!["--nodes".into(), self.nodes.to_string().into()];
        arguments.extend(["--family".into(), family.get_name().into()]);
        let network =
            clap::ValueEnum::to_possible_value(&self.network).context("no such network")?;
        arguments.extend(["--network".into(), network.get_name().into()]);
        if let Some(path) = &self.conflist {
            arguments.extend(["--conflist".into(), path.clone().into_os_string()]);
        }
        for path in &self.plugins {
            arguments.extend(["--plugin".into(), path.clone().into_os_string()]);
        }
        if self.without_agents {
            arguments.push("--without-agents".into());
        }
        Ok(arguments)
    }
}

/// Starts a supervisor and waits until its cluster is ready.
pub fn up(dir: &Path, dist: &Path, up: &Up) -> Result<ExitCode> {
    if let Ok(state) = State::running(dir) {
        bail!(
            "a cluster of {} nodes runs already; end it first (cargo xtask down), or use it:\n  \
             export KUBECONFIG={}",
            state.nodes.len(),
            state.kubeconfig.display()
        );
    }
    up.options(dir, dist)?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let log_path = dir.join("supervisor.log");
    let log = File::create(&log_path).with_context(|| format!("open {}", log_path.display()))?;
    // Ctrl-C comes to a thread of ours instead of ending us, to end the supervisor too.
    let interrupts = block_interrupts()?;
    let mut supervisor = Command::new(std::env::current_exe().context("find this program")?)
        .arg("supervise")
        .args(up.arguments()?)
        .arg("--dir")
        .arg(dir)
        .arg("--dist")
        .arg(dist)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("start the supervisor")?;
    let pid = Pid::from_raw(i32::try_from(supervisor.id()).context("a process id out of range")?);
    thread::spawn(move || {
        if interrupts.wait().is_ok() {
            // It cleans up and ends; the main thread notices.
            let _ = kill(pid, Signal::SIGTERM);
        }
    });
    let progress = supervisor
        .stdout
        .take()
        .context("the supervisor has no output")?;
    for line in BufReader::new(progress).lines() {
        let line = line.context("read the supervisor's progress")?;
        if line == READY {
            let state = State::running(dir)?;
            print!("{}", describe(&state));
            return Ok(ExitCode::SUCCESS);
        }
        // Whoever reads may be gone; the cluster is wanted all the same.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    let status = supervisor.wait().context("wait for the supervisor")?;
    let text = fs::read_to_string(&log_path).unwrap_or_default();
    let last: Vec<_> = text.lines().rev().take(15).collect();
    for line in last.into_iter().rev() {
        eprintln!("{line}");
    }
    bail!(
        "the cluster did not start ({status}); all of it is gone again; see {}",
        log_path.display()
    )
}

/// Owns a cluster until SIGTERM or Ctrl-C.
pub fn supervise(dir: &Path, dist: &Path, up: &Up, foreground: bool) -> Result<ExitCode> {
    if !foreground {
        setsid().context("leave the session")?;
    }
    let interrupts = block_interrupts()?;
    // On a thread of its own: a signal while the cluster starts is answered at once, by ending
    // the process; the reaper and the kernel do the rest.
    let (done, started) = std::sync::mpsc::channel();
    let options = up.options(dir, dist)?;
    thread::spawn(move || {
        let clock = Instant::now();
        let cluster = Cluster::start_with(options, &mut |step| {
            // Whoever listened may be gone.
            let _ = writeln!(
                std::io::stdout(),
                "{:>5.1} s  {step}",
                clock.elapsed().as_secs_f32()
            );
        });
        // The receiver is there as long as the process is.
        let _ = done.send(cluster);
    });
    let cluster = loop {
        match started.recv_timeout(Duration::from_millis(20)) {
            Ok(cluster) => break cluster?,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                if pending(interrupts) {
                    tracing::info!("told to end before the cluster was ready");
                    return Ok(ExitCode::from(130));
                }
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => bail!("the start panicked"),
        }
    };
    if foreground {
        print!("{}", describe(&State::running(dir)?));
        println!("Ctrl-C ends it.");
    } else {
        let _ = writeln!(std::io::stdout(), "{READY}");
    }
    let signal = interrupts.wait().context("wait for a signal")?;
    tracing::info!(%signal, "ending");
    cluster.stop()?;
    Ok(ExitCode::SUCCESS)
}

fn block_interrupts() -> Result<SigSet> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGHUP);
    // Before any thread is made, so that all of them inherit it.
    signals.thread_block().context("block signals")?;
    Ok(signals)
}

fn pending(signals: SigSet) -> bool {
    use nix::sys::signalfd::{SfdFlags, SignalFd};
    let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
    fd.is_ok_and(|fd| matches!(fd.read_signal(), Ok(Some(_))))
}

/// Ends the cluster of a directory, however it is, and removes what earlier ones left.
pub fn down(dir: &Path) -> Result<ExitCode> {
    if !hachi_testutil::is_root() {
        bail!("needs root: the cluster's namespaces belong to root; nothing was changed");
    }
    let state = State::read(dir).unwrap_or_else(|error| {
        eprintln!("hachi-cluster: {error:#}; going on without it");
        None
    });
    if let Some(state) = state {
        end(&state)?;
        if let Some(id) = ClusterId::parse(&state.id) {
            cleanup::clean(&id)?;
        }
        println!("the cluster is gone");
    } else {
        println!("no cluster runs in {}", dir.display());
    }
    cleanup::clean_dead()?;
    if dir.is_dir() {
        cleanup::clean_files(dir);
    }
    Ok(ExitCode::SUCCESS)
}

fn end(state: &State) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(state.pid).context("a process id out of range")?);
    for (signal, limit) in [(Signal::SIGTERM, END_LIMIT), (Signal::SIGKILL, END_LIMIT)] {
        if !state.alive() {
            return Ok(());
        }
        // Gone meanwhile is as good.
        let _ = kill(pid, signal);
        let deadline = Instant::now() + limit;
        while state.alive() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
    }
    if state.alive() {
        bail!("the supervisor {} does not end", state.pid);
    }
    Ok(())
}

/// Becomes a program in a Pod or on a node; returns only if that failed.
#[must_use]
pub fn exec(dir: &Path, target: &str, program: Vec<OsString>) -> Error {
    let prepared = || -> Result<Enter> {
        let dir = dir
            .canonicalize()
            .with_context(|| format!("no cluster in {}", dir.display()))?;
        let state = State::running(&dir)?;
        let place = state.place(&dir, target)?;
        Ok(Enter {
            netns: Some(place.netns),
            mntns: place.mntns,
            cgroup: place.cgroup,
            die_with: None,
            limit: None,
            capabilities: None,
            mark: Some(state.id),
            program,
        })
    };
    match prepared() {
        Ok(enter) => enter.exec(),
        Err(error) => error,
    }
}

/// Shows the cluster of a directory.
pub fn status(dir: &Path) -> Result<ExitCode> {
    let dir = dir
        .canonicalize()
        .with_context(|| format!("no cluster in {}", dir.display()))?;
    let state = State::running(&dir)?;
    print!("{}", describe(&state));
    for node in &state.nodes {
        match crate::agent::status(&node.agent_socket) {
            Ok(status) if status.ready => {
                println!("{}: agent ready, {} endpoints", node.name, status.endpoints);
            }
            Ok(status) => println!(
                "{}: agent not ready: {}",
                node.name,
                status.problems.join("; ")
            ),
            Err(error) => println!("{}: {error:#}", node.name),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(state: &State) -> String {
    let mut text = format!("cluster {} is up:\n", state.id);
    for node in &state.nodes {
        let addresses: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
        text += &format!(
            "  {:<8} {}   Pods {}   netns {}\n",
            node.name,
            addresses.join(" "),
            node.pod_cidrs.join(" "),
            node.network_namespace.display()
        );
    }
    text += &format!("  export KUBECONFIG={}\n", state.kubeconfig.display());
    text
}
