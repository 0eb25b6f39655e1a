//! What the tests of every crate share.
//!
//! A test that needs a privilege or a kernel feature calls [`require_root!`] (or [`skip!`]) first:
//! on a laptop it prints one `SKIP:` line, which `cargo xtask test` counts, and returns; with `CI`
//! set it panics, because there nothing may be skipped in silence.
#![forbid(unsafe_code)]

use std::path::PathBuf;

/// Whether a missing privilege is a failure rather than a skip.
#[must_use]
pub fn strict() -> bool {
    std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false")
}

/// Whether this is a virtual machine of `cargo xtask test vm`: one that is translated does everything 12
/// to 25 times as slowly.
#[must_use]
pub fn in_guest() -> bool {
    std::env::var_os("HACHI_VM").is_some()
}

/// Whether the process has root's privileges.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The directory of the finished binaries: `HACHI_DIST`, else `target/dist` of the workspace.
#[must_use]
pub fn dist_dir() -> PathBuf {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    std::env::var_os("HACHI_DIST").map_or_else(
        || PathBuf::from(workspace).join("target/dist"),
        PathBuf::from,
    )
}

/// Those of the named binaries that [`dist_dir`] lacks.
#[must_use]
pub fn missing_binaries<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let dist = dist_dir();
    names
        .iter()
        .filter(|name| !dist.join(name).is_file())
        .copied()
        .collect()
}

/// Skips the calling test with a counted line, or fails it in CI.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        let why = format!($($why)*);
        if $crate::strict() {
            panic!("CI may not skip: {why}");
        }
        // Straight to the descriptor: the test harness captures print!, and the line is counted.
        let line = format!("SKIP: {}: {why}\n", module_path!());
        let _ = std::io::Write::write_all(&mut std::io::stderr().lock(), line.as_bytes());
        return;
    }};
}

/// Ends the calling test with a counted line: the kernel lacks what the test is about, and may. Which
/// kernels have it is checked by the table in docs/KERNELS.md, so this is no skip.
#[macro_export]
macro_rules! absent {
    ($($what:tt)*) => {{
        let line = format!("ABSENT: {}: {}\n", module_path!(), format!($($what)*));
        let _ = std::io::Write::write_all(&mut std::io::stderr().lock(), line.as_bytes());
        return;
    }};
}

/// Skips the calling test unless it runs as root.
#[macro_export]
macro_rules! require_root {
    () => {
        if !$crate::is_root() {
            $crate::skip!("needs root");
        }
    };
}

/// Skips the calling test unless the finished binaries of these names are there.
#[macro_export]
macro_rules! require_binaries {
    ($($name:literal),+ $(,)?) => {
        let missing = $crate::missing_binaries(&[$($name),+]);
        if !missing.is_empty() {
            let dist = $crate::dist_dir();
            $crate::skip!(
                "needs {} in {}; run cargo xtask build",
                missing.join(", "),
                dist.display()
            );
        }
    };
}
