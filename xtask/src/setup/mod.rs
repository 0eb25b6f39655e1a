//! `cargo xtask setup`: what the other commands need, installed when it is missing.
//!
//! Everything is checked by trying it, so that a machine that has it all pays milliseconds and is
//! not touched. Debian and Ubuntu are served by apt; elsewhere, and without root, one line says what
//! to install.

mod apt;
mod linker;
mod toolchain;

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

pub(crate) use apt::Apt;
pub(crate) use linker::{bin_dirs, prepend};
pub(crate) use toolchain::{Toolchain, number_pair};

use crate::repo::Repo;
use crate::shell::Shell;
use crate::versions;

/// What a command is about to do, and so what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Build the eBPF object.
    Build,
    /// Run network namespaces and the local cluster too.
    Run,
    /// Run every test but those in virtual machines too.
    Test,
    /// Boot kernels in virtual machines too.
    Vm,
    /// Count instructions and run what is compared with too.
    Measure,
}

/// A program from a package.
struct Program {
    command: &'static [&'static str],
    packages: &'static [&'static str],
    purpose: Purpose,
}

const PROGRAMS: [Program; 13] = [
    Program {
        command: &["cc", "--version"],
        packages: &["gcc", "libc6-dev"],
        purpose: Purpose::Build,
    },
    Program {
        command: &["ip", "-V"],
        packages: &["iproute2"],
        purpose: Purpose::Run,
    },
    Program {
        command: &["kubectl", "version", "--client"],
        packages: &["kubernetes-client"],
        purpose: Purpose::Run,
    },
    Program {
        command: &["iptables", "-V"],
        packages: &["iptables"],
        purpose: Purpose::Test,
    },
    Program {
        // What is left after an uninstall is compared by it.
        command: &["bpftool", "version"],
        packages: &["bpftool"],
        purpose: Purpose::Test,
    },
    Program {
        // What interfaces do for the kernel is turned off and on by it.
        command: &["ethtool", "--version"],
        packages: &["ethtool"],
        purpose: Purpose::Test,
    },
    Program {
        // What is chained behind hachi-cni; they have no option that does nothing.
        command: &[
            "sh",
            "-c",
            "test -x /usr/lib/cni/portmap || test -x /opt/cni/bin/portmap",
        ],
        packages: &["containernetworking-plugins"],
        purpose: Purpose::Test,
    },
    Program {
        command: &[
            "sh",
            "-c",
            "podman --version && crun --version && containerd --version && ctr --version && runc --version",
        ],
        packages: &["podman", "crun", "containerd", "runc"],
        purpose: Purpose::Test,
    },
    Program {
        command: &["qemu-system-x86_64", "--version"],
        packages: &["qemu-system-x86"],
        purpose: Purpose::Vm,
    },
    Program {
        command: &["xz", "--version"],
        packages: &["xz-utils"],
        purpose: Purpose::Vm,
    },
    Program {
        command: &["valgrind", "--version"],
        packages: &["valgrind"],
        purpose: Purpose::Measure,
    },
    Program {
        command: &["nft", "--version"],
        packages: &["nftables"],
        purpose: Purpose::Measure,
    },
    Program {
        command: &["iptables-legacy", "-V"],
        packages: &["iptables"],
        purpose: Purpose::Measure,
    },
];

/// Installs what `purpose` needs and is missing; returns the compiler of the eBPF programs.
pub(crate) fn ensure(repo: &Repo, shell: &Shell, purpose: Purpose) -> Result<Toolchain> {
    let mut missing: Vec<&str> = Vec::new();
    for program in &PROGRAMS {
        let wanted = match program.purpose {
            Purpose::Build => true,
            Purpose::Run => purpose != Purpose::Build,
            Purpose::Test => !matches!(purpose, Purpose::Build | Purpose::Run),
            Purpose::Vm | Purpose::Measure => purpose == program.purpose,
        };
        if wanted && !works(program.command) {
            missing.extend(program.packages);
        }
    }
    let compiler = toolchain::find();
    if compiler.is_none() {
        missing.extend(versions::RUST_PACKAGES);
    }
    let linker = linker::is_ready(repo);
    if !linker && linker::llvm().is_none() {
        missing.extend(versions::LLVM_PACKAGES);
    }
    if !missing.is_empty() {
        Apt::detect()?.install(shell, &missing)?;
    }
    if !linker {
        linker::install(repo, shell)?;
    }
    match compiler.or_else(toolchain::find) {
        Some(compiler) => Ok(compiler),
        None => bail!("{}", toolchain::ADVICE),
    }
}

/// The setup command itself: everything but what the virtual machines need, unless asked.
pub(crate) fn run(repo: &Repo, shell: &Shell, vm: bool) -> Result<()> {
    let purpose = if vm { Purpose::Vm } else { Purpose::Test };
    let toolchain = ensure(repo, shell, purpose)?;
    shell.say(&format!(
        "setup: ready (eBPF compiler: {}, bpf-linker {} with LLVM {})",
        toolchain.name(),
        versions::BPF_LINKER,
        versions::LLVM_MAJOR
    ));
    Ok(())
}

/// Whether a command runs and succeeds.
fn works(command: &[&str]) -> bool {
    let [program, arguments @ ..] = command else {
        return false;
    };
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
