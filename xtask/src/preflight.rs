//! Whether this machine can run the local cluster, asked before anything is installed, built or
//! changed.

use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;

use crate::setup::number_pair;
use crate::versions::KERNEL_MIN;

/// Fails with one line if the cluster cannot run here.
pub(crate) fn check() -> Result<()> {
    if !geteuid().is_root() {
        bail!("needs root: network namespaces and eBPF programs are made; nothing was changed");
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .context("cannot read the kernel's version: is this Linux with /proc mounted?")?;
    kernel_fits(release.trim())?;
    let filesystems = std::fs::read_to_string("/proc/filesystems")?;
    for (name, option) in [("bpf", "CONFIG_BPF_SYSCALL"), ("cgroup2", "CONFIG_CGROUPS")] {
        if !filesystems
            .lines()
            .any(|line| line.split_whitespace().last() == Some(name))
        {
            bail!("this kernel has no {name} file system ({option}); nothing was changed");
        }
    }
    if !Path::new("/proc/sys/net/ipv4/ip_forward").exists() {
        bail!("this kernel has no IPv4, or /proc/sys is hidden; nothing was changed");
    }
    // In a thread of its own, which takes the namespaces with it when it ends.
    std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS))
        .join()
        .map_err(|_| anyhow::anyhow!("the namespace probe panicked"))?
        .context(
            "namespaces cannot be made here (a container without privileges?); nothing was changed",
        )
}

fn kernel_fits(release: &str) -> Result<()> {
    let found = number_pair(release)
        .with_context(|| format!("the kernel calls itself {release:?}, which is no version"))?;
    if found < KERNEL_MIN {
        let (major, minor) = KERNEL_MIN;
        bail!("the kernel is {release}, {major}.{minor} or later is needed; nothing was changed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_the_least_one_are_refused() {
        assert!(kernel_fits("5.15.0-101-generic").is_ok());
        assert!(kernel_fits("6.1.0-47-cloud-amd64").is_ok());
        let error = kernel_fits("5.10.0-28-amd64").unwrap_err().to_string();
        assert!(
            error.contains("5.10.0-28-amd64") && error.contains("5.15"),
            "{error}"
        );
        assert!(!error.contains('\n'));
        assert!(kernel_fits("unknown").is_err());
    }
}
