//! A cluster to measure on: of its own, beside whatever else runs, and gone at the end.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use serde::Deserialize;

use crate::repo::Repo;
use crate::shell::Shell;

/// A running cluster of release binaries.
pub(crate) struct Bed {
    program: PathBuf,
    dist: PathBuf,
    dir: PathBuf,
    state: State,
}

/// The part of `cluster.json` that is used here.
#[derive(Deserialize)]
struct State {
    kubeconfig: PathBuf,
    nodes: Vec<Node>,
}

/// A node.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Node {
    /// Its name.
    pub(crate) name: String,
    place: Place,
}

#[derive(Clone, Debug, Deserialize)]
struct Place {
    netns: PathBuf,
    mntns: Option<PathBuf>,
}

impl Bed {
    /// Starts a cluster; `more` are further options of `hachi-cluster up`.
    pub(crate) fn start(repo: &Repo, shell: &Shell, more: &[&str]) -> Result<Self> {
        let dist = repo.dist();
        let dir = repo.target("bench/cluster");
        let program = dist.join("hachi-cluster");
        if !program.exists() {
            bail!("{} is missing: run without --no-build", program.display());
        }
        let mut bed = Self {
            program,
            dist,
            dir,
            state: State {
                kubeconfig: PathBuf::new(),
                nodes: Vec::new(),
            },
        };
        // One that was killed may have left its cluster.
        bed.command("down")
            .output()
            .context("cannot run hachi-cluster")?;
        let mut up = bed.command("up");
        up.args(more);
        shell.step("cluster", &mut up)?;
        let state = bed.dir.join("cluster.json");
        let text =
            std::fs::read(&state).with_context(|| format!("cannot read {}", state.display()))?;
        bed.state = serde_json::from_slice(&text).context("the cluster's state is unreadable")?;
        Ok(bed)
    }

    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(&self.program);
        crate::cargo::clean(&mut command);
        command.arg("--dir").arg(&self.dir);
        command.arg("--dist").arg(&self.dist).arg(what);
        command
    }

    /// The nodes.
    pub(crate) fn nodes(&self) -> &[Node] {
        &self.state.nodes
    }

    /// Runs kubectl with a manifest (which may be empty) on its standard input.
    pub(crate) fn kubectl(&self, arguments: &[&str], manifest: &str) -> Result<String> {
        let mut child = Command::new("kubectl")
            .args(arguments)
            .env("KUBECONFIG", &self.state.kubeconfig)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run kubectl")?;
        let mut stdin = child.stdin.take().context("a pipe was asked for")?;
        let manifest = manifest.to_owned();
        let writer = std::thread::spawn(move || stdin.write_all(manifest.as_bytes()));
        let output = child.wait_with_output()?;
        // A kubectl that did not read all of it is judged by how it ended.
        let _ = writer.join();
        if !output.status.success() {
            bail!(
                "kubectl {}: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        match self.command("down").output() {
            Ok(output) if output.status.success() => {}
            _ => eprintln!("the cluster in {} was not ended", self.dir.display()),
        }
    }
}

impl Node {
    /// Moves the calling thread, for good, into the node's network and mounts; what it starts runs
    /// there too.
    pub(crate) fn enter(&self) -> Result<()> {
        // Both are opened before either is entered: the paths are this process's.
        let netns = open(&self.place.netns)?;
        let mntns = self.place.mntns.as_deref().map(open).transpose()?;
        setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter the network of {}", self.name))?;
        if let Some(mntns) = mntns {
            unshare(CloneFlags::CLONE_FS).context("cannot unshare the working directory")?;
            setns(mntns.as_fd(), CloneFlags::CLONE_NEWNS)
                .with_context(|| format!("cannot enter the mounts of {}", self.name))?;
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// A network namespace with nothing but its loopback, gone with this value.
pub(crate) struct Netns {
    file: File,
}

impl Netns {
    /// Makes one.
    pub(crate) fn new() -> Result<Self> {
        let made = std::thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            open(Path::new("/proc/thread-self/ns/net"))
        });
        let file = made
            .join()
            .map_err(|_| anyhow::anyhow!("making a network namespace panicked"))??;
        Ok(Self { file })
    }

    /// A path that other processes can open as long as this value lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }
}
