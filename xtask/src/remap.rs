//! Paths of the machine that builds, kept out of what is built: panics and debug information name source
//! files, and the same sources in another directory are to give the same bytes.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::repo::Repo;

/// Where a compiler keeps the standard library's source, below its sysroot.
const LIBRARY: &str = "lib/rustlib/src/rust";

/// Directories, and what they are called instead.
#[derive(Clone, Debug)]
pub(crate) struct Remap(Vec<(PathBuf, &'static str)>);

impl Remap {
    /// For a build of the checkout with a compiler.
    ///
    /// # Errors
    /// If the compiler cannot be run.
    pub(crate) fn new(repo: &Repo, rustc: &Path) -> Result<Self> {
        let output = Command::new(rustc)
            .args(["--print", "sysroot"])
            .output()
            .with_context(|| format!("cannot run {}", rustc.display()))?;
        let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        let library = sysroot.join(LIBRARY);
        let mut all = vec![(repo.root().to_owned(), "/hachi")];
        all.extend(cargo_home().map(|home| (home, "/cargo")));
        // A distribution's is a link to somewhere else.
        all.extend(library.canonicalize().ok().map(|real| (real, "/rust")));
        all.push((library, "/rust"));
        Ok(Self(all))
    }

    /// What rustc has to be told.
    pub(crate) fn flags(&self) -> Vec<String> {
        let flag = |(from, to): &(PathBuf, &str)| {
            format!("--remap-path-prefix={}={to}", from.to_string_lossy())
        };
        self.0.iter().map(flag).collect()
    }

    /// Fails if a file still has one of the directories' names in it.
    pub(crate) fn check(&self, name: &str, content: &[u8]) -> Result<()> {
        for (directory, _) in &self.0 {
            let text = format!("{}/", directory.to_string_lossy());
            let mut places = content.windows(text.len());
            if places.any(|place| place == text.as_bytes()) {
                bail!("{name} has {text} in it, which is another directory elsewhere");
            }
        }
        Ok(())
    }
}

fn cargo_home() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"));
    std::env::var_os("CARGO_HOME").map_or_else(home, |path| Some(path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_renamed_and_found_where_it_is_left() {
        let remap = Remap(vec![("/home/somebody/hachi".into(), "/hachi")]);
        assert_eq!(
            remap.flags(),
            ["--remap-path-prefix=/home/somebody/hachi=/hachi"]
        );
        assert!(remap.check("x", b"\0/hachi/src/main.rs\0").is_ok());
        let left = remap.check("x", b"\0/home/somebody/hachi/src/main.rs\0");
        let said = left.expect_err("a path is left").to_string();
        assert!(said.contains("/home/somebody/hachi/"), "{said}");
    }
}
