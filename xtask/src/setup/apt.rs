//! Debian's and Ubuntu's packages.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use nix::unistd::geteuid;

use crate::shell::Shell;

/// A way to install packages, or what to tell the user instead.
pub(crate) struct Apt {
    present: bool,
}

impl Apt {
    /// Looks for apt on this machine.
    pub(crate) fn detect() -> Result<Self> {
        Ok(Self {
            present: Path::new("/usr/bin/apt-get").exists(),
        })
    }

    /// Installs packages as root; otherwise fails with the one line to run, having changed
    /// nothing.
    pub(crate) fn install(&self, shell: &Shell, packages: &[&str]) -> Result<()> {
        let list = packages.join(" ");
        if !self.present {
            bail!("missing; install what your distribution calls these Debian packages: {list}");
        }
        if !geteuid().is_root() {
            bail!("missing; run as root: apt-get install --no-install-recommends {list}");
        }
        // The package lists may be absent or old, but asking for them again takes seconds: only
        // when the packages are not found as things stand.
        if !self.candidates_exist(packages) {
            shell.step("apt-get update", Self::get().arg("update"))?;
        }
        let install = |shell: &Shell| {
            shell.step("apt-get install", Self::get().arg("install").args(packages))
        };
        if install(shell).is_err() {
            // A list that is too old names files that the mirror has replaced.
            shell.step("apt-get update", Self::get().arg("update"))?;
            install(shell)?;
        }
        Ok(())
    }

    /// `apt-get`, which waits for its lock and tries again what the network has lost.
    pub(crate) fn get() -> Command {
        let mut command = Command::new("apt-get");
        command
            .args(["--yes", "--quiet", "--no-install-recommends"])
            .args(["-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"])
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    fn candidates_exist(&self, packages: &[&str]) -> bool {
        packages.iter().all(|package| {
            Command::new("apt-cache")
                .args(["show", "--no-all-versions", package])
                .output()
                .is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
        })
    }
}
