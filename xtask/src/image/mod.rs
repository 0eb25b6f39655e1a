//! `cargo xtask image`: the container image, made without a container engine.
//!
//! ```text
//! target/dist (release, static) ─> layer (tar) ─> OCI image layout, as one archive
//! ```
//! The same sources and compilers give the same bytes in any directory: names are sorted, times and owners
//! are zero, and no path of the machine is left in a binary (`remap.rs`).
//! `ctr images import` and `kind load image-archive` take the archive (OCI Image Format
//! Specification 1.1, image-layout.md), and so does `docker load` from version 25 on.

mod layer;
mod layout;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::build::{self, Mode};
use crate::remap::Remap;
use crate::repo::Repo;
use crate::setup::{self, Purpose};
use crate::shell::Shell;

/// The name that the manifests use.
pub(crate) const NAME: &str = "hachi/hachi";

/// The largest image that a release may have, in bytes.
const LIMIT: usize = 20 << 20;

/// What is in the image: the binary's name, and its path there.
const FILES: [(&str, &str); 3] = [
    ("hachi", "usr/bin/hachi"),
    ("hachi-agent", "usr/bin/hachi-agent"),
    ("hachi-cni", "opt/cni/bin/hachi-cni"),
];

/// Builds the release binaries and packs them; returns where the archive is.
pub(crate) fn run(repo: &Repo, shell: &Shell) -> Result<PathBuf> {
    let toolchain = setup::ensure(repo, shell, Purpose::Build)?;
    let names = FILES.map(|(binary, _)| binary);
    build::these(repo, shell, &toolchain, Mode::Release, &names)?;
    let remap = Remap::new(repo, Path::new("rustc"))?;
    let mut files = Vec::new();
    for (binary, path) in FILES {
        let from = repo.dist().join(binary);
        let content = fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
        remap.check(binary, &content)?;
        files.push((path.to_owned(), content));
    }
    let layer = layer::pack(&files)?;
    let reference = format!("{NAME}:{}", env!("CARGO_PKG_VERSION"));
    let archive = layout::archive(&layer, &reference)?;
    if archive.len() > LIMIT {
        bail!(
            "the image has {} bytes, {LIMIT} is the most that it may have",
            archive.len()
        );
    }
    let destination = repo.target("image/hachi.tar");
    build::write(&destination, &archive)?;
    shell.say(&format!(
        "image: {reference}, {:.1} MiB, {}",
        archive.len() as f64 / f64::from(1 << 20),
        destination.display()
    ));
    Ok(destination)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Who has a container engine gets the same image.
    #[test]
    fn the_dockerfile_makes_the_same() {
        let text = include_str!("../../../manifests/Dockerfile");
        let mut copied = BTreeSet::new();
        for line in text.lines() {
            let Some(copy) = line.strip_prefix("COPY --chmod=755 ") else {
                continue;
            };
            let mut words: Vec<&str> = copy.split_whitespace().collect();
            let directory = words.pop().and_then(|it| it.strip_prefix('/')).unwrap();
            for source in words {
                let name = source.strip_prefix("target/dist/").unwrap();
                copied.insert((name.to_owned(), format!("{directory}{name}")));
            }
        }
        let packed = FILES.map(|(binary, path)| (binary.to_owned(), path.to_owned()));
        assert_eq!(copied, BTreeSet::from(packed));
        let ignore = include_str!("../../../.dockerignore");
        let sent: BTreeSet<_> = ignore
            .lines()
            .filter_map(|line| line.strip_prefix("!target/dist/"))
            .collect();
        assert_eq!(sent, BTreeSet::from(FILES.map(|(binary, _)| binary)));
        for line in [
            "FROM scratch",
            "ENV PATH=/usr/bin",
            "ENTRYPOINT [\"/usr/bin/hachi-agent\"]",
        ] {
            assert!(text.lines().any(|it| it == line), "{line}");
        }
    }
}
