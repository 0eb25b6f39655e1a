//! Where things are: the checkout's root and what the commands keep under `target/`.

use std::path::{Path, PathBuf};

/// The checkout that this xtask belongs to.
#[derive(Clone, Debug)]
pub(crate) struct Repo {
    root: PathBuf,
}

impl Repo {
    /// The parent of xtask's own directory: what cargo says now, or said when it was built.
    pub(crate) fn find() -> Self {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        Self {
            root: manifest
                .parent()
                .map_or_else(|| PathBuf::from("."), Path::to_path_buf),
        }
    }

    /// The checkout's root.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A path below `target/` of the checkout, whatever `CARGO_TARGET_DIR` says: other programs
    /// (agent/kernel's build script, the cluster) look for results here.
    pub(crate) fn target(&self, below: &str) -> PathBuf {
        self.root.join("target").join(below)
    }

    /// Finished binaries.
    pub(crate) fn dist(&self) -> PathBuf {
        self.target("dist")
    }

    /// State of the local cluster.
    pub(crate) fn cluster(&self) -> PathBuf {
        self.target("cluster")
    }

    /// The eBPF object that agent/kernel's build script embeds.
    pub(crate) fn object(&self) -> PathBuf {
        self.target("bpf/hachi-ebpf.o")
    }

    /// The tools that setup builds.
    pub(crate) fn tools(&self) -> PathBuf {
        self.target("tools")
    }
}
