//! Embeds the eBPF object, if it has been built; otherwise an empty stub, so that check, clippy and
//! unit tests never need the eBPF toolchain.

use std::{
    env, fs,
    io::{Error, Result},
    path::PathBuf,
};

fn main() -> Result<()> {
    println!("cargo::rerun-if-env-changed=HACHI_EBPF_OBJECT");
    let object = match env::var_os("HACHI_EBPF_OBJECT") {
        Some(path) => PathBuf::from(path),
        // The workspace's own target directory even if CARGO_TARGET_DIR is elsewhere: `cargo xtask
        // build` puts the object there, whoever needs it.
        None => variable("CARGO_MANIFEST_DIR")?.join("../../target/bpf/hachi-ebpf.o"),
    };
    println!("cargo::rerun-if-changed={}", object.display());
    let copy = variable("OUT_DIR")?.join("hachi-ebpf.o");
    if object.is_file() {
        fs::copy(&object, &copy)?;
    } else {
        fs::write(&copy, [])?;
    }
    Ok(())
}

fn variable(name: &str) -> Result<PathBuf> {
    env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| Error::other(format!("{name} is not set")))
}
