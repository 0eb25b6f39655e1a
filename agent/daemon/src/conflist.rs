//! Installs the CNI configuration on the node, last of all: a runtime that finds it starts Pods.
//!
//! ```text
//! agent ready ─> write .NAME.tmp, fsync, rename ─> NAME ; foreign files sorted before it ─> *.hachi-aside
//! ```
//! Runtimes take the first file of the directory by name (libcni's `ConfFiles`), so a file of
//! another plugin that sorts before ours would win: it is renamed, not deleted.

use std::{
    ffi::OsStr,
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::{agent::Ask, http};

/// What a file that was in the way is renamed to end with; no runtime reads such a name.
const ASIDE: &str = "hachi-aside";
/// How often to look whether the agent is ready, before the file is there.
const SOON: Duration = Duration::from_millis(200);
/// How often to look whether the file is still there, and first.
const LATER: Duration = Duration::from_secs(10);

/// Keeps `source` installed in `directory` from the moment on at which the agent is ready.
pub(crate) async fn keep(source: PathBuf, directory: PathBuf, asks: mpsc::Sender<Ask>) {
    let mut installed = false;
    let mut last_error = String::new();
    loop {
        let ready = installed || matches!(http::ready(&asks).await, Some(Ok(())));
        if ready {
            match install(&source, &directory) {
                Ok(changes) => {
                    installed = true;
                    last_error.clear();
                    for change in changes {
                        warn!("{change}");
                    }
                }
                Err(error) => {
                    let text = format!("{error:#}");
                    if text != last_error {
                        warn!(
                            error = text,
                            "the CNI configuration is not installed: the runtime starts no Pod"
                        );
                        last_error = text;
                    }
                }
            }
        }
        tokio::time::sleep(if installed { LATER } else { SOON }).await;
        if asks.is_closed() {
            return;
        }
    }
}

/// Brings the directory to where a runtime takes `source`. Returns what was moved out of the way.
fn install(source: &Path, directory: &Path) -> Result<Vec<String>> {
    let name = source
        .file_name()
        .filter(|name| Path::new(name).extension() == Some(OsStr::new("conflist")))
        .with_context(|| format!("{} is not named *.conflist", source.display()))?;
    let content = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
    check(&content).with_context(|| format!("{} is no use", source.display()))?;
    let target = directory.join(name);
    if fs::read(&target).ok().as_deref() != Some(&content) {
        write(&target, &content).with_context(|| format!("cannot write {}", target.display()))?;
        info!(path = %target.display(), "CNI configuration installed");
    }
    let mut moved = Vec::new();
    let listed = || format!("cannot read {}", directory.display());
    for entry in fs::read_dir(directory).with_context(listed)? {
        let path = entry.with_context(listed)?.path();
        if !is_before(&path, name) {
            continue;
        }
        let mut aside = path.clone().into_os_string();
        aside.push(".");
        aside.push(ASIDE);
        fs::rename(&path, &aside).with_context(|| {
            format!(
                "{} comes before {} and cannot be renamed",
                path.display(),
                target.display()
            )
        })?;
        moved.push(format!(
            "{} came before {} and would have been used in its place; it is now {}",
            path.display(),
            target.display(),
            Path::new(&aside).display()
        ));
    }
    Ok(moved)
}

/// Whether a runtime would read this file, and before ours.
fn is_before(path: &Path, ours: &OsStr) -> bool {
    let read = ["conf", "conflist", "json"].map(OsStr::new);
    path.extension().is_some_and(|end| read.contains(&end))
        && path.file_name().is_some_and(|name| name < ours)
}

/// What makes a list usable at all; the plugin itself judges the rest at its first call.
fn check(content: &[u8]) -> Result<()> {
    let value: Value = serde_json::from_slice(content).context("it is no JSON")?;
    if value["name"].as_str().is_none_or(str::is_empty) {
        bail!("it has no name");
    }
    match value["plugins"][0]["type"].as_str() {
        Some("hachi-cni") => Ok(()),
        Some(other) => bail!("its first plugin is {other:?}, it must be \"hachi-cni\""),
        None => bail!("it has no plugins"),
    }
}

/// A runtime watches the directory: it must never see half a file.
fn write(target: &Path, content: &[u8]) -> io::Result<()> {
    let mut temporary = target.as_os_str().to_owned();
    temporary.push(".tmp");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, target)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"cniVersion":"1.0.0","name":"hachi","plugins":[{"type":"hachi-cni"}]}"#;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_would_win_is_put_aside_and_the_rest_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (etc, net) = (dir.path().join("etc"), dir.path().join("net.d"));
        fs::create_dir_all(&etc).unwrap();
        fs::create_dir_all(&net).unwrap();
        let source = etc.join("10-hachi.conflist");
        fs::write(&source, GOOD).unwrap();
        for name in [
            "05-old.conflist",
            "09-x.conf",
            "00-readme.txt",
            "10-kindnet.conflist",
            "87-podman.conflist",
        ] {
            fs::write(net.join(name), "{}").unwrap();
        }
        let moved = install(&source, &net).unwrap();
        assert_eq!(moved.len(), 2, "{moved:?}");
        let expected = [
            "00-readme.txt",
            "05-old.conflist.hachi-aside",
            "09-x.conf.hachi-aside",
            "10-hachi.conflist",
            "10-kindnet.conflist",
            "87-podman.conflist",
        ];
        assert_eq!(names(&net), expected);
        assert_eq!(
            fs::read_to_string(net.join("10-hachi.conflist")).unwrap(),
            GOOD
        );
        // Nothing to do: nothing is done.
        assert_eq!(install(&source, &net).unwrap(), [""; 0]);
        // A changed source, and a file that somebody removed, are written again.
        fs::write(&source, GOOD.replace("\"hachi\"", "\"other\"")).unwrap();
        install(&source, &net).unwrap();
        assert!(
            fs::read_to_string(net.join("10-hachi.conflist"))
                .unwrap()
                .contains("other")
        );
        fs::remove_file(net.join("10-hachi.conflist")).unwrap();
        install(&source, &net).unwrap();
        assert_eq!(names(&net), expected);
    }

    #[test]
    fn a_configuration_that_is_no_use_is_not_installed() {
        let dir = tempfile::tempdir().unwrap();
        let net = dir.path().join("net.d");
        fs::create_dir_all(&net).unwrap();
        for (name, text, said) in [
            ("10-hachi.conf", GOOD, "not named *.conflist"),
            ("10-hachi.conflist", "{", "no JSON"),
            (
                "10-hachi.conflist",
                r#"{"plugins":[{"type":"hachi-cni"}]}"#,
                "no name",
            ),
            (
                "10-hachi.conflist",
                r#"{"name":"a","plugins":[]}"#,
                "no plugins",
            ),
            (
                "10-hachi.conflist",
                r#"{"name":"a","plugins":[{"type":"ptp"}]}"#,
                "\"ptp\"",
            ),
        ] {
            let source = dir.path().join(name);
            fs::write(&source, text).unwrap();
            let error = format!("{:#}", install(&source, &net).unwrap_err());
            assert!(error.contains(said), "{text}: {error}");
        }
        assert_eq!(names(&net), [""; 0]);
        let error = install(&dir.path().join("11-x.conflist"), &net).unwrap_err();
        assert!(format!("{error:#}").contains("cannot read"), "{error:#}");
    }
}
