//! Calls cargo from inside cargo: cleans the environment, reads its metadata and messages.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::repo::Repo;

/// A cargo command for the host's own crates, with the toolchain that runs this xtask.
pub(crate) fn cargo(repo: &Repo) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(repo.root());
    clean(&mut command);
    command
}

/// Removes what the outer cargo set: some build scripts watch those variables, and would run again
/// whenever a command is called by hand and through xtask in turn.
pub(crate) fn clean(command: &mut Command) {
    const EXACT: [&str; 8] = [
        "CARGO",
        "CARGO_CRATE_NAME",
        "CARGO_PRIMARY_PACKAGE",
        "CARGO_RUSTC_CURRENT_DIR",
        "CARGO_TARGET_TMPDIR",
        "LD_LIBRARY_PATH",
        "OUT_DIR",
        "RUST_RECURSION_COUNT",
    ];
    const PREFIXES: [&str; 3] = ["CARGO_BIN_", "CARGO_MANIFEST_", "CARGO_PKG_"];
    for (name, _) in std::env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        if EXACT.contains(&text) || PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
}

/// The part of `cargo metadata` that is used here.
#[derive(Debug, Deserialize)]
pub(crate) struct Metadata {
    /// Packages: those of the workspace, with `--no-deps`.
    pub(crate) packages: Vec<Package>,
    /// Package ids that commands without `-p` work on.
    pub(crate) workspace_default_members: Vec<String>,
}

/// One package.
#[derive(Debug, Deserialize)]
pub(crate) struct Package {
    /// Opaque id.
    pub(crate) id: String,
    /// Name.
    pub(crate) name: String,
    /// Version.
    pub(crate) version: String,
    /// Its Cargo.toml.
    pub(crate) manifest_path: PathBuf,
    /// Licence expression.
    pub(crate) license: Option<String>,
    /// Where it comes from; nothing for a path.
    pub(crate) source: Option<String>,
    /// Libraries, binaries, tests.
    #[serde(default)]
    pub(crate) targets: Vec<Target>,
}

/// One library, binary or test of a package.
#[derive(Debug, Deserialize)]
pub(crate) struct Target {
    /// `lib`, `bin`, `test`, ...
    pub(crate) kind: Vec<String>,
    /// Name.
    pub(crate) name: String,
}

impl Metadata {
    /// The workspace's own packages alone.
    pub(crate) fn workspace(repo: &Repo) -> Result<Self> {
        Self::read(repo, &["--no-deps"])
    }

    /// All packages that the lock file names for Linux on x86_64, where Hachi runs.
    pub(crate) fn with_dependencies(repo: &Repo) -> Result<Self> {
        Self::read(repo, &["--filter-platform", "x86_64-unknown-linux-gnu"])
    }

    fn read(repo: &Repo, arguments: &[&str]) -> Result<Self> {
        let output = cargo(repo)
            .args(["metadata", "--format-version", "1"])
            .args(arguments)
            .output()
            .context("cannot run cargo metadata")?;
        if !output.status.success() {
            bail!(
                "cargo metadata failed:\n{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        serde_json::from_slice(&output.stdout).context("cannot read the output of cargo metadata")
    }

    /// The default members, in the workspace's order.
    pub(crate) fn default_members(&self) -> Vec<&Package> {
        self.workspace_default_members
            .iter()
            .filter_map(|id| self.packages.iter().find(|package| &package.id == id))
            .collect()
    }
}

/// An executable that a build made.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Executable {
    /// The target's name.
    pub(crate) name: String,
    /// The package's directory.
    pub(crate) directory: PathBuf,
    /// The file.
    pub(crate) path: PathBuf,
    /// Built to run tests.
    pub(crate) test: bool,
    /// `bin`, `lib`, `test`.
    pub(crate) kind: String,
}

#[derive(Deserialize)]
struct Message {
    reason: String,
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// The executables in cargo's JSON messages.
pub(crate) fn executables(messages: &str) -> Result<Vec<Executable>> {
    let mut found = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Message =
            serde_json::from_str(line).with_context(|| format!("not a cargo message: {line}"))?;
        let (Some(path), Some(target)) = (message.executable, message.target) else {
            continue;
        };
        if message.reason != "compiler-artifact" {
            continue;
        }
        let directory = message.manifest_path.as_deref().and_then(Path::parent);
        found.push(Executable {
            name: target.name,
            directory: directory.map_or_else(|| PathBuf::from("."), Path::to_path_buf),
            path,
            test: message.profile.is_some_and(|profile| profile.test),
            kind: target.kind.first().cloned().unwrap_or_default(),
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_artifacts_with_an_executable_count() -> Result<()> {
        let messages = concat!(
            r#"{"reason":"build-script-executed","package_id":"x"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","manifest_path":"/r/a/Cargo.toml","target":{"kind":["lib"],"name":"a"},"profile":{"test":false},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","manifest_path":"/r/a/Cargo.toml","target":{"kind":["test"],"name":"netns_a"},"profile":{"test":true},"executable":"/t/netns_a-1"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let found = executables(messages)?;
        assert_eq!(
            found,
            [Executable {
                name: "netns_a".into(),
                directory: "/r/a".into(),
                path: "/t/netns_a-1".into(),
                test: true,
                kind: "test".into(),
            }]
        );
        Ok(())
    }
}
