//! bpf-linker, built here against the LLVM that the versions table names.
//!
//! Its default is another LLVM than the compiler's, and a linker with an older LLVM than the compiler
//! cannot read the bitcode: so it is pinned and built, never taken as found unless its version is
//! the pinned one.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cargo;
use crate::repo::Repo;
use crate::shell::Shell;
use crate::versions::{BPF_LINKER, LLVM_MAJOR};

/// What has to be in front of `PATH` for cargo to find the linker.
pub(crate) fn bin_dirs(repo: &Repo) -> Vec<PathBuf> {
    vec![repo.tools().join("bin")]
}

/// Whether the pinned linker is there and runs (its shared LLVM may have gone).
pub(crate) fn is_ready(repo: &Repo) -> bool {
    Command::new(repo.tools().join("bin/bpf-linker"))
        .arg("--version")
        .output()
        .is_ok_and(|output| {
            output.status.success()
                && String::from_utf8_lossy(&output.stdout)
                    .split_whitespace()
                    .any(|w| w == BPF_LINKER)
        })
}

/// Where LLVM's development files of the right version are: the directories of `llvm-config` and
/// of the shared library.
pub(crate) fn llvm() -> Option<(PathBuf, PathBuf)> {
    let places = [
        format!("/usr/lib/llvm-{LLVM_MAJOR}/bin"),
        "/usr/bin".into(),
        "/usr/local/bin".into(),
    ];
    places.iter().map(PathBuf::from).find_map(|bin| {
        let output = |argument: &str| {
            let output = Command::new(bin.join("llvm-config"))
                .arg(argument)
                .output()
                .ok()?;
            output
                .status
                .success()
                .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let major = output("--version")?
            .split('.')
            .next()?
            .parse::<u32>()
            .ok()?;
        let lib = PathBuf::from(output("--libdir")?);
        (major == LLVM_MAJOR && lib.join("libLLVM.so").exists()).then_some((bin, lib))
    })
}

/// Builds and installs the linker under `target/tools`.
pub(crate) fn install(repo: &Repo, shell: &Shell) -> Result<()> {
    let (bin, lib) = llvm().with_context(|| {
        format!(
            "LLVM {LLVM_MAJOR} with its development files is missing (llvm-config in \
             /usr/lib/llvm-{LLVM_MAJOR}/bin): install it, bpf-linker is built with it"
        )
    })?;
    let build = repo.tools().join("build");
    let mut command = Command::new("cargo");
    cargo::clean(&mut command);
    command
        .args(["install", "bpf-linker", "--locked", "--force"])
        .args(["--version", &format!("={BPF_LINKER}")])
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{LLVM_MAJOR}"),
        ])
        .arg("--root")
        .arg(repo.tools())
        .env("CARGO_TARGET_DIR", &build)
        .env("RUSTFLAGS", rustflags(&lib))
        .env("PATH", prepend(&[bin])?);
    shell.step("bpf-linker", &mut command)?;
    // Only the binary is of use from now on.
    std::fs::remove_dir_all(&build).context("cannot remove bpf-linker's build directory")
}

fn rustflags(lib: &Path) -> String {
    let lib = lib.display();
    format!("-L native={lib} -C link-arg=-Wl,-rpath,{lib}")
}

/// `PATH` with directories in front.
pub(crate) fn prepend(directories: &[PathBuf]) -> Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = directories
        .iter()
        .cloned()
        .chain(std::env::split_paths(&path));
    std::env::join_paths(all).context("a directory's name has a colon, PATH cannot hold it")
}
