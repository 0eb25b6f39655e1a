//! The compiler of the eBPF programs: a Rust that may use `-Z build-std`, with the source of `core`,
//! whose LLVM is not newer than bpf-linker's.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::versions::{LLVM_MAJOR, RUST_MIN};

/// What to do where no compiler was found or can be installed.
pub(crate) const ADVICE: &str = "no Rust that builds eBPF programs: install a nightly with its \
    source (rustup toolchain install nightly --profile minimal --component rust-src) or Debian's \
    rustc-web, cargo-web and rust-web-src";

/// A compiler and its cargo.
#[derive(Clone, Debug)]
pub(crate) struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    release: String,
    nightly: bool,
}

impl Toolchain {
    /// How people know it.
    pub(crate) fn name(&self) -> &str {
        &self.release
    }

    /// The compiler.
    pub(crate) fn rustc(&self) -> &Path {
        &self.rustc
    }

    /// A cargo command that compiles with this toolchain and no other.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        crate::cargo::clean(&mut command);
        command
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("RUSTFLAGS")
            .env("RUSTC", &self.rustc);
        for wrapper in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"] {
            command.env_remove(wrapper);
        }
        if !self.nightly {
            // The distribution's compiler is a stable one with the source beside it.
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        command
    }

    fn probe(bin: &Path) -> Option<Self> {
        let (cargo, rustc) = (bin.join("cargo"), bin.join("rustc"));
        if !cargo.exists() || !has_source(bin.parent()?) {
            return None;
        }
        let output = Command::new(&rustc)
            .arg("-vV")
            .env_remove("LD_LIBRARY_PATH")
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let (release, llvm) = versions(&text)?;
        let fits = number_pair(&release)? >= RUST_MIN && number_pair(&llvm)?.0 <= LLVM_MAJOR;
        let nightly = release.contains("nightly");
        fits.then_some(Self {
            cargo,
            rustc,
            release: format!("rustc {release}"),
            nightly,
        })
    }
}

/// The first toolchain that can do it: rustup's nightlies, its other toolchains, the system's.
pub(crate) fn find() -> Option<Toolchain> {
    let mut candidates = rustup_toolchains();
    candidates.push(PathBuf::from("/usr/bin"));
    candidates.iter().find_map(|bin| Toolchain::probe(bin))
}

fn rustup_toolchains() -> Vec<PathBuf> {
    let home = std::env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".rustup")));
    let Some(entries) = home.and_then(|home| std::fs::read_dir(home.join("toolchains")).ok())
    else {
        return Vec::new();
    };
    let mut names: Vec<(bool, OsString, PathBuf)> = entries
        .filter_map(Result::ok)
        .map(|entry| {
            let name = entry.file_name();
            let other = !name.to_string_lossy().starts_with("nightly");
            (other, name, entry.path().join("bin"))
        })
        .collect();
    names.sort();
    names.into_iter().map(|(_, _, bin)| bin).collect()
}

fn has_source(sysroot: &Path) -> bool {
    sysroot
        .join("lib/rustlib/src/rust/library/core/Cargo.toml")
        .exists()
}

/// The release and the LLVM version in the output of `rustc -vV`.
fn versions(text: &str) -> Option<(String, String)> {
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key))
            .map(str::to_owned)
    };
    Some((value("release: ")?, value("LLVM version: ")?))
}

/// `1.97.0-nightly` as (1, 97).
pub(crate) fn number_pair(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_a_compiler_is_read() {
        let text = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\n\
            release: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        assert_eq!(
            versions(text),
            Some(("1.97.0-nightly".into(), "22.1.4".into()))
        );
        assert_eq!(number_pair("1.97.0-nightly"), Some((1, 97)));
        assert_eq!(number_pair("22.1.4"), Some((22, 1)));
        assert_eq!(number_pair("nightly"), None);
    }

    #[test]
    fn a_directory_without_a_compiler_is_no_toolchain() {
        assert!(Toolchain::probe(&std::env::temp_dir().join("nothing-here/bin")).is_none());
    }
}
