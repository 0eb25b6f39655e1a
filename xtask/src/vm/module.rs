//! Kernel modules: those that the tests need and what they depend on, in loading order.
//!
//! There is no `modules.dep` in an unpacked package (its installation makes it); every module names
//! what it depends on itself, in its `.modinfo` section.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What tests use that a kernel may have as modules. One that a kernel has built in, or not at
/// all, is no module there: tests probe for what they need.
const WANTED: [&str; 18] = [
    "veth",
    "vxlan",
    "dummy",
    "bridge",
    "tun",
    "sch_ingress",
    "cls_bpf",
    "act_bpf",
    "netkit",
    "crc32c_generic",
    "sctp",
    "8021q",
    "bonding",
    "macvlan",
    "nf_tables",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
];

/// A module, ready to load.
#[derive(Debug)]
pub(crate) struct Module {
    /// Name with underscores.
    pub(crate) name: String,
    /// The decompressed file.
    pub(crate) bytes: Vec<u8>,
}

/// The wanted modules and their dependencies; each comes after what it depends on.
pub(crate) fn collect(directory: &Path) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    index(directory, &mut files)?;
    let mut ordered = Vec::new();
    for name in WANTED {
        if files.contains_key(name) {
            add(name, &files, &mut ordered)?;
        }
    }
    Ok(ordered)
}

fn add(name: &str, files: &BTreeMap<String, PathBuf>, ordered: &mut Vec<Module>) -> Result<()> {
    if ordered.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let Some(path) = files.get(name) else {
        bail!("there is no module {name}")
    };
    let bytes = read(path)?;
    for dependency in dependencies(&bytes) {
        add(&dependency, files, ordered)?;
    }
    ordered.push(Module {
        name: name.to_owned(),
        bytes,
    });
    Ok(())
}

fn index(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            index(&path, files)?;
        } else if let Some((stem, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(stem.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    let output = Command::new(tool)
        .arg("-dc")
        .arg(path)
        .output()
        .with_context(|| format!("cannot run {tool}"))?;
    if !output.status.success() {
        bail!("{tool} cannot decompress {}", path.display());
    }
    Ok(output.stdout)
}

/// What a module's `.modinfo` says it depends on: strings that end in zeros.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"depends=";
    let entry = module
        .split(|byte| *byte == 0)
        .find_map(|text| text.strip_prefix(KEY));
    let names = entry.map(String::from_utf8_lossy).unwrap_or_default();
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_after_what_it_depends_on() -> Result<()> {
        let directory = std::env::temp_dir().join(format!("hachi-modules-{}", std::process::id()));
        let net = directory.join("kernel/net");
        fs::create_dir_all(&net)?;
        fs::write(
            net.join("vxlan.ko"),
            b"\x7fELF\0license=GPL\0depends=udp_tunnel,ip6-udp\0x\0",
        )?;
        fs::write(net.join("udp_tunnel.ko"), b"\0depends=ip6-udp\0")?;
        fs::write(net.join("ip6-udp.ko"), b"\0depends=\0")?;
        fs::write(net.join("unrelated.ko"), b"\0depends=nothing\0")?;
        let names: Vec<String> = collect(&directory)?.into_iter().map(|m| m.name).collect();
        fs::remove_dir_all(&directory)?;
        assert_eq!(names, ["ip6_udp", "udp_tunnel", "vxlan"]);
        Ok(())
    }
}
