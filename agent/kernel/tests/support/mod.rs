//! A test in a world of its own: network namespace, mount namespace, BPF file system.
//!
//! The test runs in a thread that enters the namespaces alone, so tests run in parallel and
//! nothing is left behind, panic or not: the namespaces end with the thread.

use std::{
    panic,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use hachi_kernel::{Capacities, Datapath, LoadOptions};
use nix::{
    mount::{MsFlags, mount},
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
};

/// Skips the calling test unless it can load programs.
macro_rules! require_datapath {
    () => {
        hachi_testutil::require_root!();
        if !hachi_kernel::built_with_object() {
            hachi_testutil::skip!("built without the eBPF object: run `cargo xtask build` first");
        }
    };
}
pub(crate) use require_datapath;

/// What a test finds in its own namespaces.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) pin_root: PathBuf,
    pub(crate) capacities: Capacities,
}

/// Runs `test` in namespaces of its own.
pub(crate) fn isolated(test: impl FnOnce(&World) + Send) {
    // Made and removed outside of the thread: its mount has gone with the thread's namespace.
    let directory = tempfile::tempdir().expect("a directory for the BPF file system");
    let bpffs = directory.path();
    let result = thread::scope(|scope| {
        scope
            .spawn(move || {
                test(&World::at(bpffs));
            })
            .join()
    });
    if let Err(panic) = result {
        panic::resume_unwind(panic);
    }
}

fn enter(bpffs: &Path) {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("unshare");
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).expect("private mounts");
    mount(Some("bpf"), bpffs, Some("bpf"), MsFlags::empty(), NONE).expect("mount bpf");
}

impl World {
    /// Puts the calling thread into namespaces of its own, with a BPF file system at that directory.
    pub(crate) fn at(bpffs: &Path) -> Self {
        enter(bpffs);
        Self {
            pin_root: bpffs.join("hachi"),
            // The tables that are allocated at once are small: tests run side by side.
            capacities: Capacities {
                conntrack: 4096,
                fragments: 512,
                nat: 2048,
                sockets: 1024,
                ..Capacities::default()
            },
        }
    }

    /// The defaults but for small tables, with pins in this world.
    pub(crate) fn options(&self) -> LoadOptions {
        LoadOptions {
            pin_root: self.pin_root.clone(),
            capacities: self.capacities.clone(),
            ..LoadOptions::default()
        }
    }

    /// Loads the datapath as an agent that starts does.
    pub(crate) fn load(&self) -> Datapath {
        Datapath::load(&self.options()).expect("the datapath loads")
    }

    /// Makes a veth pair whose other end is called `<name>p`; returns the index of this end.
    pub(crate) fn veth(&self, name: &str) -> u32 {
        let peer = format!("{name}p");
        ip(&["link", "add", name, "type", "veth", "peer", "name", &peer]);
        if_nametoindex(name).expect("the interface just made")
    }
}

/// Runs `ip` in the calling thread's network namespace.
pub(crate) fn ip(arguments: &[&str]) {
    let status = Command::new("ip")
        .args(arguments)
        .status()
        .expect("iproute2 is installed");
    assert!(status.success(), "ip {arguments:?}");
}
