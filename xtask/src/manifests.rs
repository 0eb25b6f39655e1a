//! `cargo xtask manifests`: `manifests/install.yaml` from `manifests/base`, and `uninstall.yaml` from
//! `manifests/uninstall`, by `kubectl kustomize`, so that an overlay and the files that people apply
//! can never differ.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build;
use crate::repo::Repo;
use crate::shell::Shell;

const OVERLAYS: &str = "manifests/overlays";

/// A file that people apply.
struct Target {
    source: &'static str,
    file: &'static str,
    /// What people read first.
    head: &'static str,
}

const TARGETS: [Target; 2] = [
    Target {
        source: "manifests/base",
        file: "manifests/install.yaml",
        head: "# Hachi, installed with `kubectl apply -f install.yaml`. Written by `cargo xtask manifests` from\n\
               # manifests/base; change it there.\n",
    },
    Target {
        source: "manifests/uninstall",
        file: "manifests/uninstall.yaml",
        head: "# Takes Hachi off the nodes, after `kubectl delete -f install.yaml`; see docs/OPERATIONS.md. Written\n\
               # by `cargo xtask manifests` from manifests/uninstall; change it there.\n",
    },
];

/// Writes the files, or with `check` fails if they are not what it would write.
pub(crate) fn run(repo: &Repo, shell: &Shell, check: bool) -> Result<()> {
    for target in &TARGETS {
        let text = format!("{}{}", target.head, kustomize(repo, target.source)?);
        image_is_current(target.source, &text)?;
        let path = repo.root().join(target.file);
        if !check {
            build::write(&path, text.as_bytes())?;
        } else if fs::read_to_string(&path).unwrap_or_default() != text {
            bail!(
                "{} is not what {} says: run `cargo xtask manifests`",
                target.file,
                target.source
            );
        }
    }
    if !check {
        return Ok(());
    }
    let mut overlays = 0;
    for entry in fs::read_dir(repo.root().join(OVERLAYS)).context("cannot list the overlays")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        kustomize(repo, &format!("{OVERLAYS}/{name}"))?;
        overlays += 1;
    }
    shell.say(&format!(
        "  {} files are current; {overlays} overlays can be built",
        TARGETS.len()
    ));
    Ok(())
}

fn kustomize(repo: &Repo, directory: &str) -> Result<String> {
    let output = Command::new("kubectl")
        .current_dir(repo.root())
        .args(["kustomize", directory])
        .output()
        .context("cannot run kubectl (`cargo xtask setup` installs it)")?;
    if !output.status.success() {
        bail!(
            "kubectl kustomize {directory}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout).context("kubectl printed no text")
}

/// The manifests name the image that `cargo xtask image` makes.
fn image_is_current(source: &str, text: &str) -> Result<()> {
    let wanted = format!("{}:{}", crate::image::NAME, env!("CARGO_PKG_VERSION"));
    let mut seen = 0;
    for line in text.lines() {
        if let Some(image) = line.trim().strip_prefix("image: ") {
            seen += 1;
            if image != wanted {
                bail!("{source} names the image {image}, `cargo xtask image` makes {wanted}");
            }
        }
    }
    if seen == 0 {
        bail!("{source} names no image");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_image_is_noticed() {
        let good = format!(
            "image: {}:{}",
            crate::image::NAME,
            env!("CARGO_PKG_VERSION")
        );
        assert!(image_is_current("x", &good).is_ok());
        assert!(image_is_current("x", &format!("{good}\n  image: hachi/hachi:0.0.1\n")).is_err());
        assert!(image_is_current("x", "kind: DaemonSet\n").is_err());
    }
}
