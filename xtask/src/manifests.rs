//! `cargo xtask manifests`: `manifests/install.yaml` from `manifests/base`, by `kubectl kustomize`,
//! so that an overlay and the one file that people apply can never differ.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build;
use crate::repo::Repo;
use crate::shell::Shell;

const BASE: &str = "manifests/base";
const OVERLAYS: &str = "manifests/overlays";
const INSTALL: &str = "manifests/install.yaml";

/// What people read first.
const HEAD: &str = "# Hachi, installed with `kubectl apply -f install.yaml`. Written by `cargo xtask manifests` from\n\
                    # manifests/base; change it there.\n";

/// Writes the file, or with `check` fails if it is not what it would write.
pub(crate) fn run(repo: &Repo, shell: &Shell, check: bool) -> Result<()> {
    let text = format!("{HEAD}{}", kustomize(repo, BASE)?);
    image_is_current(&text)?;
    let path = repo.root().join(INSTALL);
    if !check {
        return build::write(&path, text.as_bytes());
    }
    if fs::read_to_string(&path).unwrap_or_default() != text {
        bail!("{INSTALL} is not what {BASE} says: run `cargo xtask manifests`");
    }
    let mut overlays = 0;
    for entry in fs::read_dir(repo.root().join(OVERLAYS)).context("cannot list the overlays")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        kustomize(repo, &format!("{OVERLAYS}/{name}"))?;
        overlays += 1;
    }
    shell.say(&format!(
        "  {INSTALL} is current; {overlays} overlays can be built"
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
fn image_is_current(text: &str) -> Result<()> {
    let wanted = format!("{}:{}", crate::image::NAME, env!("CARGO_PKG_VERSION"));
    let mut seen = 0;
    for line in text.lines() {
        if let Some(image) = line.trim().strip_prefix("image: ") {
            seen += 1;
            if image != wanted {
                bail!("{BASE} names the image {image}, `cargo xtask image` makes {wanted}");
            }
        }
    }
    if seen == 0 {
        bail!("{BASE} names no image");
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
        assert!(image_is_current(&good).is_ok());
        assert!(image_is_current(&format!("{good}\n  image: hachi/hachi:0.0.1\n")).is_err());
        assert!(image_is_current("kind: DaemonSet\n").is_err());
    }
}
