//! What can go wrong between the agent and the kernel, and what to do about it.

use std::{io, path::PathBuf};

use aya::{EbpfError, programs::ProgramError};

use crate::{attach::Hook, xdp::XdpMode};

/// An error of this crate. Its text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The crate was built before the eBPF object.
    #[error("built without the eBPF object: run `cargo xtask build`")]
    NoObject,
    /// The pins need a BPF file system.
    #[error("{path} is not on a BPF file system: run `mount -t bpf bpf /sys/fs/bpf`")]
    NoBpffs {
        /// Where the pins should go.
        path: PathBuf,
    },
    /// The kernel, or what this process may do with it, is not enough to guard a single Pod.
    #[error("this node cannot run Hachi, it has no {missing}; give it {remedy} (docs/KERNELS.md)")]
    Unsupported {
        /// All that is missing, each with the kernel's answer.
        missing: String,
        /// What to do.
        remedy: String,
    },
    /// The kernel refused for lack of a capability.
    #[error("no permission to {action}: the agent needs CAP_NET_ADMIN and CAP_SYS_ADMIN (or root)")]
    NotPermitted {
        /// What was tried.
        action: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A map is not what this version of the agent expects.
    #[error(
        "map {map} has {what} {found}, this agent needs {expected}: {}",
        if *pinned {
            "another version of Hachi pinned it; remove it with `hachi uninstall` first"
        } else {
            "the eBPF object is of another version; run `cargo xtask build`"
        }
    )]
    Layout {
        /// The map's name.
        map: String,
        /// What differs.
        what: &'static str,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
        /// Whether the map was found pinned, or else comes from the object.
        pinned: bool,
    },
    /// The object lacks a map or a program.
    #[error(
        "the eBPF object has no {what} {name}: it is of another version; run `cargo xtask build`"
    )]
    Missing {
        /// "map" or "program".
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The object could not be read, or its maps not made.
    #[error("the eBPF object could not be loaded: {0}")]
    Load(#[source] Box<EbpfError>),
    /// The verifier rejected a program.
    #[error(
        "the kernel's verifier rejected {program}; report this with the kernel's version:\n{log}"
    )]
    Verifier {
        /// The program's name.
        program: String,
        /// The end of the verifier's log.
        log: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A program could not be loaded for another reason.
    #[error("program {program} could not be loaded: {source}")]
    Program {
        /// The program's name.
        program: String,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// A map has no room for another entry.
    #[error(
        "map {map} is full ({capacity} entries): give it more room in the agent's configuration"
    )]
    Full {
        /// The map's name.
        map: String,
        /// Its capacity.
        capacity: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A map could not be read or written.
    #[error("map {map}: {action} failed: {source}")]
    Map {
        /// The map's name.
        map: String,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The interface went away, or never was.
    #[error("interface {ifname} (index {ifindex}) does not exist")]
    NoInterface {
        /// Its name.
        ifname: String,
        /// Its index.
        ifindex: u32,
    },
    /// A program could not be attached to an interface, or detached from it.
    #[error("{hook} on {ifname}: {action} failed: {source}")]
    Attach {
        /// The interface.
        ifname: String,
        /// The program.
        hook: Hook,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel or the driver refused the XDP program.
    #[error("{action} of xdp_net ({mode}) at {ifname} failed: {source}")]
    AttachXdp {
        /// The interface.
        ifname: String,
        /// How it was to be attached.
        mode: XdpMode,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is no cgroup to attach the socket programs to.
    #[error(
        "{path} is no cgroup of version 2: mount one there, name another with --cgroup-root, or \
         turn socket load balancing off with --socket-lb=off"
    )]
    NoCgroup {
        /// Where it should be.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A program could not be attached to a cgroup.
    #[error("{program} on the cgroup {path}: {action} failed: {source}")]
    AttachCgroup {
        /// The program.
        program: &'static str,
        /// The cgroup.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A program is not attached although it should be.
    #[error(
        "{hook} is not attached to {ifname}: the Pod's traffic is not guarded; recreate the Pod"
    )]
    NotAttached {
        /// The interface.
        ifname: String,
        /// The program.
        hook: Hook,
    },
    /// A pin could not be made, opened or removed.
    #[error("pin {path}: {action} failed: {source}")]
    Pin {
        /// The pin.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The programs' log records cannot be read.
    #[error("the programs' log records cannot be read: {0}")]
    Log(String),
    /// A program could not be run on a test packet.
    #[error("BPF_PROG_TEST_RUN of {hook} failed: {source}")]
    TestRun {
        /// The program.
        hook: Hook,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
}

impl KernelError {
    /// The error of a failed access to `map`; a full map is told apart, because it alone is cured
    /// by configuration.
    pub(crate) fn map(map: &str, action: &'static str, capacity: u32, source: io::Error) -> Self {
        let map = map.to_owned();
        match source.raw_os_error() {
            // Hashes answer E2BIG, LPM tries ENOSPC; ENOMEM is the memory cgroup's limit.
            Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM) => Self::Full {
                map,
                capacity,
                source,
            },
            Some(libc::EPERM) => Self::NotPermitted {
                action: format!("{action} {map}"),
                source,
            },
            _ => Self::Map {
                map,
                action,
                source,
            },
        }
    }

    /// The error of a failed access to a pin.
    pub(crate) fn pin(path: impl Into<PathBuf>, action: &'static str, source: io::Error) -> Self {
        let path = path.into();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted {
                action: format!("{action} {}", path.display()),
                source,
            },
            _ => Self::Pin {
                path,
                action,
                source,
            },
        }
    }
}
