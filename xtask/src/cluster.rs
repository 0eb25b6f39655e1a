//! `up`, `down`, `exec`, `demo`: calls the cluster program with what was built.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build::{self, Mode};
use crate::preflight;
use crate::repo::Repo;
use crate::setup::{self, Purpose};
use crate::shell::Shell;

/// Installs and builds what is missing, then becomes the cluster program.
pub(crate) fn run(repo: &Repo, shell: &Shell, arguments: &[String]) -> Result<()> {
    prepare(repo, shell)?;
    become_cluster(repo, arguments)
}

/// Becomes the cluster program as it was last built: `down` and `exec` must not wait for a build,
/// nor change the binaries under a running cluster.
pub(crate) fn run_built(repo: &Repo, arguments: &[String]) -> Result<()> {
    if !program(repo).exists() {
        bail!("no cluster was ever started here: run cargo xtask up");
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root: the cluster's namespaces belong to root; nothing was changed");
    }
    become_cluster(repo, arguments)
}

/// Checks the machine, installs and builds.
pub(crate) fn prepare(repo: &Repo, shell: &Shell) -> Result<()> {
    preflight::check()?;
    let toolchain = setup::ensure(repo, shell, Purpose::Run)?;
    build::run(repo, shell, &toolchain, Mode::Debug)
}

/// The cluster program with its directories.
pub(crate) fn command(repo: &Repo) -> Command {
    let mut command = Command::new(program(repo));
    crate::cargo::clean(&mut command);
    command
        .arg("--dir")
        .arg(repo.cluster())
        .arg("--dist")
        .arg(repo.dist());
    command
}

fn program(repo: &Repo) -> std::path::PathBuf {
    repo.dist().join("hachi-cluster")
}

/// Replaces this process, so that Ctrl-C, the terminal and the exit code are the cluster's own.
fn become_cluster(repo: &Repo, arguments: &[String]) -> Result<()> {
    let mut command = command(repo);
    command.args(arguments);
    Err(command.exec()).with_context(|| format!("cannot run {}", program(repo).display()))
}
