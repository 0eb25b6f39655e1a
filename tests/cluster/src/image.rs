//! The image of real containers: `hachi-pod` alone, with the libraries that it is linked with.
//!
//! It is an archive as `docker save` writes it, which `ctr images import` takes: a layer, its
//! configuration, and a list of both.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::run;

/// The image's name. Its program waits unless told otherwise, so that it does for sandboxes too.
pub const POD_IMAGE: &str = "docker.io/hachi/pod:test";

/// Packs the image below `dir`; returns where the archive is.
pub(crate) fn pod(dir: &Path) -> Result<PathBuf> {
    let stage = dir.join("image");
    // Of an earlier run.
    let _ = fs::remove_dir_all(&stage);
    let root = stage.join("root");
    fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
    let program = run::own_binary("hachi-pod")?;
    install(&program, &root.join("hachi-pod"))?;
    for library in libraries(&program)? {
        let target = root.join(library.strip_prefix("/").unwrap_or(&library));
        install(&library, &target)?;
    }
    tar(&root, &["."], &stage.join("layer.tar"))?;
    let digest = tool(Command::new("sha256sum").arg(stage.join("layer.tar")))?;
    let digest = digest.split_whitespace().next().unwrap_or_default();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/hachi-pod"], "Cmd": ["pause"], "Env": ["PATH=/"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    let list = json!([{
        "Config": "config.json", "RepoTags": [POD_IMAGE], "Layers": ["layer.tar"],
    }]);
    for (name, content) in [("config.json", config), ("manifest.json", list)] {
        fs::write(stage.join(name), content.to_string())
            .with_context(|| format!("write {name}"))?;
    }
    let archive = dir.join("pod-image.tar");
    let parts = ["manifest.json", "config.json", "layer.tar"];
    tar(&stage, &parts, &archive)?;
    fs::remove_dir_all(&stage).context("remove what the image was made from")?;
    Ok(archive)
}

/// The files that the dynamic linker loads for a program; none for a static one.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = run::with_input(Command::new("ldd").arg(program), b"").context("run ldd")?;
    // It fails for static programs.
    Ok(listed(&String::from_utf8_lossy(&output.stdout)))
}

/// The paths in what `ldd` prints.
fn listed(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let mut words = line.split_whitespace().filter(|word| word.starts_with('/'));
        words.next().map(PathBuf::from)
    };
    text.lines().filter_map(path).collect()
}

fn install(source: &Path, target: &Path) -> Result<()> {
    let parent = target.parent().context("a file has a directory")?;
    fs::create_dir_all(parent)
        .and_then(|()| fs::copy(source, target))
        .with_context(|| format!("copy {} to {}", source.display(), target.display()))
        .map(drop)
}

fn tar(dir: &Path, names: &[&str], archive: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.arg("-C").arg(dir).arg("-cf").arg(archive);
    tool(command.args(["--owner=0", "--group=0"]).args(names)).map(drop)
}

fn tool(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = run::with_input(command, b"")?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_what_ldd_says() {
        let text = "\tlinux-vdso.so.1 (0x00007fff)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f00)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f01)\n";
        let paths = [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(listed(text), paths.map(PathBuf::from));
        assert!(listed("\tstatically linked\n").is_empty());
    }
}
