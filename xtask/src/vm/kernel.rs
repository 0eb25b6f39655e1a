//! The kernels to boot: the distribution's packages, unpacked without being installed, or a path.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::repo::Repo;
use crate::setup::Apt;
use crate::shell::Shell;

/// A kernel and its modules.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What the user calls it, `6.1`.
    pub(crate) name: String,
    /// The compressed image.
    pub(crate) image: PathBuf,
    /// The directory of its modules, where it has any.
    pub(crate) modules: Option<PathBuf>,
    /// Its configuration, where it came with one.
    pub(crate) config: Option<PathBuf>,
}

/// Finds `6.1`, or the kernel at a path: an image, a package, or a directory with `boot` and `lib` as
/// a package has them.
pub(crate) fn find(repo: &Repo, shell: &Shell, wanted: &str) -> Result<Kernel> {
    let path = Path::new(wanted);
    if path.is_dir() {
        return unpacked(wanted, path);
    }
    if path.extension().is_some_and(|extension| extension == "deb") {
        let directory = repo.target("vm/kernels/given");
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        unpack(shell, path, &directory)?;
        return unpacked(wanted, &directory);
    }
    if path.is_file() {
        return Ok(Kernel {
            name: wanted.to_owned(),
            image: path.to_owned(),
            modules: None,
            config: None,
        });
    }
    let is_series = |text: &str| text.split('.').all(|part| part.parse::<u32>().is_ok());
    if !is_series(wanted) {
        bail!("{wanted} is neither a kernel series (6.1) nor a path");
    }
    packaged(repo, shell, wanted)
}

fn packaged(repo: &Repo, shell: &Shell, series: &str) -> Result<Kernel> {
    let kernels = repo.target("vm/kernels");
    fs::create_dir_all(&kernels)?;
    if let Some(package) = newest(series, names_in(&kernels)?) {
        return unpacked(series, &kernels.join(package));
    }
    let downloads = repo.target("vm/download");
    let download = |package: Option<String>| -> Result<String> {
        let package = package.with_context(|| missing(series))?;
        if downloads.exists() {
            fs::remove_dir_all(&downloads)?;
        }
        fs::create_dir_all(&downloads)?;
        let mut download = Apt::get();
        download
            .args(["download", &package])
            .current_dir(&downloads);
        shell.step(&format!("kernel {series}: download"), &mut download)?;
        Ok(package)
    };
    // Lists that are absent name nothing; those that are old, what the mirror has replaced.
    let package = match download(candidate(series)?) {
        Err(_) if nix::unistd::geteuid().is_root() => {
            shell.step("apt-get update", Apt::get().arg("update"))?;
            download(candidate(series)?)?
        }
        downloaded => downloaded?,
    };
    let file = names_in(&downloads)?
        .pop()
        .context("apt-get downloaded nothing")?;
    let directory = kernels.join(&package);
    unpack(shell, &downloads.join(file), &directory)?;
    fs::remove_dir_all(&downloads)?;
    unpacked(series, &directory)
}

fn missing(series: &str) -> String {
    format!(
        "this machine's package sources offer no linux-image-{series}*-cloud-amd64: give a kernel \
         with --kernel PATH (an image, a .deb, or a directory with boot/ and lib/)"
    )
}

/// The newest package of a series that apt knows.
fn candidate(series: &str) -> Result<Option<String>> {
    let pattern = format!(
        "^linux-image-{}[.].*-cloud-amd64$",
        series.replace('.', "[.]")
    );
    let output = Command::new("apt-cache")
        .args(["search", "--names-only", &pattern])
        .output()
        .context("cannot run apt-cache: give a kernel with --kernel PATH")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let names = text
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    Ok(newest(series, names.map(str::to_owned).collect()))
}

/// The package with the highest version among those of a series.
fn newest(series: &str, names: Vec<String>) -> Option<String> {
    let prefix = format!("linux-image-{series}.");
    let numbers = |name: &str| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit())
            .filter_map(|part| part.parse().ok())
            .collect()
    };
    names
        .into_iter()
        .filter(|name| name.starts_with(&prefix) && name.ends_with("-cloud-amd64"))
        .max_by_key(|name| numbers(name))
}

fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Unpacks beside the destination first, so that an interrupted run leaves no half of it.
fn unpack(shell: &Shell, package: &Path, directory: &Path) -> Result<()> {
    let part = directory.with_extension("part");
    if part.exists() {
        fs::remove_dir_all(&part)?;
    }
    fs::create_dir_all(&part)?;
    shell.step(
        "kernel: unpack",
        Command::new("dpkg-deb").arg("-x").arg(package).arg(&part),
    )?;
    fs::rename(&part, directory).context("cannot move the unpacked kernel")
}

fn unpacked(name: &str, directory: &Path) -> Result<Kernel> {
    let boot = directory.join("boot");
    let files = names_in(&boot)?;
    let named = |prefix| files.iter().find(|file| file.starts_with(prefix));
    let image = named("vmlinuz").with_context(|| format!("{} has no vmlinuz", boot.display()))?;
    let mut modules = None;
    for below in ["lib/modules", "usr/lib/modules"] {
        let directory = directory.join(below);
        if let Some(version) = names_in(&directory).ok().and_then(|mut names| names.pop()) {
            modules = Some(directory.join(version));
        }
    }
    Ok(Kernel {
        name: name.to_owned(),
        image: boot.join(image),
        modules,
        config: named("config-").map(|file| boot.join(file)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_package_of_a_series_is_chosen() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-57-cloud-amd64-unsigned",
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.118+deb12-rt-amd64",
        ];
        let names: Vec<String> = names.map(str::to_owned).into();
        let chosen = |series| newest(series, names.clone());
        assert_eq!(
            chosen("6.1").as_deref(),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(
            chosen("6.12").as_deref(),
            Some("linux-image-6.12.117+deb12-cloud-amd64")
        );
        assert_eq!(chosen("6.6"), None);
    }
}
