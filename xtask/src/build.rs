//! `cargo xtask build`: the eBPF object, then all binaries, into `target/dist`.
//!
//! ```text
//! ebpf/programs --(own target directory)--> target/bpf/hachi-ebpf.o --(agent/kernel embeds)--> binaries
//! ```
//! Finished files are replaced by renaming, and only when they changed: a running cluster keeps its
//! binaries, and an unchanged object makes nothing compile again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Metadata, executables};
use crate::elf;
use crate::remap::Remap;
use crate::repo::Repo;
use crate::setup::{self, Toolchain};
use crate::shell::Shell;

/// The eBPF target; Hachi runs on little-endian machines.
const EBPF_TARGET: &str = "bpfel-unknown-none";
/// What `target/dist` holds.
pub(crate) const BINARIES: [&str; 5] = [
    "hachi-cni",
    "hachi-agent",
    "hachi",
    "hachi-cluster",
    "hachi-pod",
];

/// The binary that is started anew for every Pod.
const PLUGIN: &str = "hachi-cni";
/// The most that it may have, in bytes: it is read from disk when a node is at its busiest.
const PLUGIN_LIMIT: u64 = 4 << 20;

/// How the host's binaries are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Fast to build.
    Debug,
    /// Optimised and static.
    Release,
}

/// Builds everything.
pub(crate) fn run(repo: &Repo, shell: &Shell, toolchain: &Toolchain, mode: Mode) -> Result<()> {
    these(repo, shell, toolchain, mode, &BINARIES)
}

/// Builds the eBPF object and these binaries alone.
pub(crate) fn these(
    repo: &Repo,
    shell: &Shell,
    toolchain: &Toolchain,
    mode: Mode,
    names: &[&str],
) -> Result<()> {
    object(repo, shell, toolchain)?;
    binaries(repo, shell, mode, names)
}

/// Builds the eBPF object.
pub(crate) fn object(repo: &Repo, shell: &Shell, toolchain: &Toolchain) -> Result<()> {
    let mut flags = ["-Cdebuginfo=2", "-Clinker=bpf-linker", "-Clink-arg=--btf"]
        .map(str::to_owned)
        .to_vec();
    // The debug information that the verifier quotes names source files.
    flags.extend(Remap::new(repo, toolchain.rustc())?.flags());
    let mut command = toolchain.cargo();
    command
        .current_dir(repo.root())
        .args([
            "build",
            "-p",
            "hachi-programs",
            "--profile",
            "ebpf",
            "-Z",
            "build-std=core",
        ])
        .args([
            "--target",
            EBPF_TARGET,
            "--message-format=json-render-diagnostics",
        ])
        // Its own directory: neither cargo waits for the other's lock, and the flags below do not
        // reach the host's crates.
        .env("CARGO_TARGET_DIR", repo.target("ebpf-build"))
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("PATH", setup::prepend(&setup::bin_dirs(repo))?);
    let messages = shell.output("eBPF object", &mut command)?;
    let built = executables(&messages)?;
    let [object] = built.as_slice() else {
        bail!(
            "hachi-programs must have exactly one binary, it has {}",
            built.len()
        );
    };
    let bytes =
        fs::read(&object.path).with_context(|| format!("cannot read {}", object.path.display()))?;
    check_stack(&elf::stacks(&bytes)?)?;
    let destination = repo.object();
    if fs::read(&destination).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    write(&destination, &bytes)
}

/// Fails on what some supported kernel's verifier would refuse, whatever the one that builds says:
/// 6.1 rounds every function's frame up to 32 bytes, later kernels to 16.
fn check_stack(stacks: &BTreeMap<String, u32>) -> Result<()> {
    const LIMIT: u32 = 512;
    for (program, stack) in stacks {
        if *stack > LIMIT {
            bail!(
                "{program} and what it calls take {stack} bytes of stack, {LIMIT} is the most that \
                 every supported kernel takes"
            );
        }
    }
    Ok(())
}

/// Builds the binaries for the host.
fn binaries(repo: &Repo, shell: &Shell, mode: Mode, names: &[&str]) -> Result<()> {
    let metadata = Metadata::workspace(repo)?;
    let mut command = cargo::cargo(repo);
    command.args(["build", "--message-format=json-render-diagnostics"]);
    for &binary in names {
        let exists = metadata.default_members().iter().any(|package| {
            package
                .targets
                .iter()
                .any(|t| t.name == binary && t.kind == ["bin"])
        });
        if !exists {
            bail!("no package has a binary {binary}");
        }
        command.args(["--bin", binary]);
    }
    let name = match mode {
        Mode::Debug => "binaries",
        Mode::Release => {
            command.arg("--release");
            release_target(repo, &mut command)?;
            "binaries (release, static)"
        }
    };
    let messages = shell.output(name, &mut command)?;
    for built in executables(&messages)? {
        if mode == Mode::Release && built.name == PLUGIN {
            let size = fs::metadata(&built.path).map_or(0, |meta| meta.len());
            if size > PLUGIN_LIMIT {
                bail!("{PLUGIN} has {size} bytes, {PLUGIN_LIMIT} is the most that it may have");
            }
        }
        copy_changed(&built.path, &repo.dist().join(&built.name))?;
    }
    Ok(())
}

/// As [`static_target`], for what is measured or given to others: without this machine's paths.
pub(crate) fn release_target(repo: &Repo, command: &mut std::process::Command) -> Result<()> {
    let mut flags = static_flags(command)?;
    flags.extend(Remap::new(repo, Path::new("rustc"))?.flags());
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    Ok(())
}

/// Makes cargo link statically: with musl where the toolchain and a C compiler for it exist, with
/// glibc otherwise.
pub(crate) fn static_target(command: &mut std::process::Command) -> Result<()> {
    let flags = static_flags(command)?;
    if !flags.is_empty() {
        command.env("RUSTFLAGS", flags.join(" "));
    }
    Ok(())
}

/// Names the target, and returns the flags that rustc needs for it.
fn static_flags(command: &mut std::process::Command) -> Result<Vec<String>> {
    const MUSL: &str = "x86_64-unknown-linux-musl";
    let sysroot = std::process::Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .context("cannot run rustc")?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&sysroot.stdout).trim());
    let has_std = sysroot.join("lib/rustlib").join(MUSL).join("lib").exists();
    let has_cc = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|directory| directory.join("musl-gcc").exists())
    });
    if has_std && has_cc {
        command.args(["--target", MUSL]);
        Ok(Vec::new())
    } else {
        // With --target the flags stay away from build scripts and procedural macros.
        command.args(["--target", "x86_64-unknown-linux-gnu"]);
        Ok(vec!["-Ctarget-feature=+crt-static".to_owned()])
    }
}

/// Copies a file unless the copy is already there (same size and time).
fn copy_changed(source: &Path, destination: &Path) -> Result<()> {
    let meta = fs::metadata(source).with_context(|| format!("cannot read {}", source.display()))?;
    let same = fs::metadata(destination)
        .is_ok_and(|old| old.len() == meta.len() && old.modified().ok() == meta.modified().ok());
    if same {
        return Ok(());
    }
    replace(destination, |temporary| {
        fs::copy(source, temporary)?;
        // Written to through the new file: a program that runs is never opened for writing.
        fs::File::options()
            .write(true)
            .open(temporary)?
            .set_modified(meta.modified()?)?;
        Ok(())
    })
}

/// Writes a file under a temporary name, then renames it.
pub(crate) fn write(destination: &Path, content: &[u8]) -> Result<()> {
    replace(destination, |temporary| Ok(fs::write(temporary, content)?))
}

/// Makes a file under a temporary name, then renames it.
fn replace(destination: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let directory = destination.parent().context("a file has a directory")?;
    let name = destination
        .file_name()
        .context("a file has a name")?
        .to_string_lossy();
    fs::create_dir_all(directory)?;
    let temporary = directory.join(format!(".{name}.{}", std::process::id()));
    write(&temporary)
        .and_then(|()| Ok(fs::rename(&temporary, destination)?))
        .with_context(|| format!("cannot write {}", destination.display()))
        .inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_deep_a_stack_is_refused() {
        let stacks = |depth| [("from_pod".to_owned(), depth)].into();
        assert!(check_stack(&stacks(512)).is_ok());
        let error = check_stack(&stacks(544)).unwrap_err().to_string();
        assert!(
            error.contains("from_pod") && error.contains("544"),
            "{error}"
        );
    }

    #[test]
    fn an_unchanged_file_is_not_copied_again() -> Result<()> {
        let directory = std::env::temp_dir().join(format!("hachi-copy-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        let (source, copy) = (directory.join("a"), directory.join("b/c"));
        fs::write(&source, "one")?;
        copy_changed(&source, &copy)?;
        assert_eq!(fs::read_to_string(&copy)?, "one");
        // Same size and time: what is there stays, whatever it holds.
        let time = fs::metadata(&source)?.modified()?;
        fs::write(&copy, "two")?;
        fs::File::options()
            .write(true)
            .open(&copy)?
            .set_modified(time)?;
        copy_changed(&source, &copy)?;
        assert_eq!(fs::read_to_string(&copy)?, "two");
        fs::write(&source, "three")?;
        copy_changed(&source, &copy)?;
        assert_eq!(fs::read_to_string(&copy)?, "three");
        assert_eq!(
            fs::read_dir(directory.join("b"))?.count(),
            1,
            "no temporary file stays"
        );
        fs::remove_dir_all(&directory)?;
        Ok(())
    }
}
