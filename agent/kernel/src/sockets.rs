//! The cgroup programs of socket load balancing: attached to one cgroup, which every process below
//! it passes when it connects or sends.
//!
//! Links are pinned, so that sockets are served on while there is no agent, and a new agent changes
//! their program in one step.

use std::{
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader,
    programs::{CgroupSockAddr, ProgramError, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::{
    Datapath, KernelError,
    datapath::load_failure,
    pins::{release_link, release_links, remove_tree},
    sys,
};

/// Where systems mount cgroups.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Where version 2 is then, if version 1 is there too.
const BESIDE_VERSION_1: &str = "unified";

/// The cgroup2 mount of this machine, by file system type.
#[must_use]
pub fn cgroup_root() -> Option<PathBuf> {
    cgroup2_at(Path::new(CGROUP_ROOT))
}

/// The cgroup of version 2 at a path, or where systems mount it below when version 1 is there too.
#[must_use]
pub fn cgroup2_at(path: &Path) -> Option<PathBuf> {
    [path.to_owned(), path.join(BESIDE_VERSION_1)]
        .into_iter()
        .find(|path| is_cgroup2(path).is_ok())
}

fn is_cgroup2(path: &Path) -> io::Result<()> {
    if statfs(path)?.filesystem_type() == CGROUP2_SUPER_MAGIC {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "another file system",
        ))
    }
}

/// Whose sockets are given backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SocketLb {
    /// Every process of the cgroup, Pods' too.
    #[default]
    All,
    /// Processes in the node's own network namespace alone.
    Node,
}

/// What the programs are told when they are loaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Constants {
    netns: u64,
    pods: u8,
    retval: u8,
}

impl Constants {
    /// What holds for the calling thread's network namespace and this kernel.
    pub(crate) fn find(mode: SocketLb) -> Self {
        // With no number known no socket counts as the node's, and those without a backend are left
        // to time out instead of being refused.
        let netns = sys::netns_cookie().unwrap_or_else(|error| {
            tracing::info!(%error, "the kernel does not tell the namespace's number");
            0
        });
        let retval =
            is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)
                .unwrap_or_default();
        Self {
            netns,
            pods: u8::from(mode == SocketLb::All),
            retval: u8::from(retval),
        }
    }

    pub(crate) fn patch<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        loader
            .override_global("NODE_NETNS", &self.netns, true)
            .override_global("SERVE_PODS", &self.pods, true)
            .override_global("HAS_RETVAL", &self.retval, true);
    }
}

/// A system call of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SocketHook {
    /// `connect` over IPv4.
    Connect4,
    /// `connect` over IPv6.
    Connect6,
    /// `sendmsg` of an unconnected UDP socket over IPv4.
    Sendmsg4,
    /// `sendmsg` of an unconnected UDP socket over IPv6.
    Sendmsg6,
    /// `recvmsg` of a UDP socket over IPv4.
    Recvmsg4,
    /// `recvmsg` of a UDP socket over IPv6.
    Recvmsg6,
    /// `getpeername` over IPv4.
    Getpeername4,
    /// `getpeername` over IPv6.
    Getpeername6,
}

impl SocketHook {
    /// All, in the order in which they are attached: what translates back comes first, so that no
    /// socket is shown a backend.
    pub const ALL: [Self; 8] = [
        Self::Getpeername4,
        Self::Getpeername6,
        Self::Recvmsg4,
        Self::Recvmsg6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::Connect4,
        Self::Connect6,
    ];

    /// The program of the object.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::Connect4 => "sock_connect4",
            Self::Connect6 => "sock_connect6",
            Self::Sendmsg4 => "sock_sendmsg4",
            Self::Sendmsg6 => "sock_sendmsg6",
            Self::Recvmsg4 => "sock_recvmsg4",
            Self::Recvmsg6 => "sock_recvmsg6",
            Self::Getpeername4 => "sock_getpeername4",
            Self::Getpeername6 => "sock_getpeername6",
        }
    }

    /// The pin's name.
    pub(crate) fn name(self) -> &'static str {
        &self.program()["sock_".len()..]
    }

    /// `enum bpf_attach_type`.
    const fn attach_type(self) -> u32 {
        match self {
            Self::Connect4 => 10,
            Self::Connect6 => 11,
            Self::Sendmsg4 => 14,
            Self::Sendmsg6 => 15,
            Self::Recvmsg4 => 19,
            Self::Recvmsg6 => 20,
            Self::Getpeername4 => 29,
            Self::Getpeername6 => 30,
        }
    }
}

impl fmt::Display for SocketHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The cgroup to attach to.
struct Cgroup<'a> {
    path: &'a Path,
    file: File,
    number: u64,
}

impl<'a> Cgroup<'a> {
    fn open(path: &'a Path) -> Result<Self, KernelError> {
        let open = || {
            is_cgroup2(path)?;
            let file = File::open(path)?;
            let number = file.metadata()?.ino();
            Ok(Self { path, file, number })
        };
        open().map_err(|source| KernelError::NoCgroup {
            path: path.to_owned(),
            source,
        })
    }

    fn error(&self, hook: SocketHook, action: &'static str, source: io::Error) -> KernelError {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => KernelError::NotPermitted {
                action: format!("attach {} to {}", hook.program(), self.path.display()),
                source,
            },
            _ => KernelError::AttachCgroup {
                program: hook.program(),
                path: self.path.to_owned(),
                action,
                source,
            },
        }
    }
}

impl Datapath {
    /// Attaches the socket programs to a cgroup of version 2, or changes those of an earlier agent's
    /// links; attaching twice is success.
    ///
    /// # Errors
    /// If there is no such cgroup, the verifier rejects a program, or the kernel refuses. Nothing is
    /// attached then.
    pub fn attach_sockets(&mut self, cgroup: &Path) -> Result<(), KernelError> {
        let cgroup = Cgroup::open(cgroup)?;
        let pins = self.pins.sockets();
        fs::create_dir_all(&pins).map_err(|source| KernelError::pin(&pins, "create", source))?;
        for hook in SocketHook::ALL {
            let done = self
                .load_socket_program(hook)
                .and_then(|program| attach(hook, program, &cgroup, &pins.join(hook.name())));
            if let Err(error) = done {
                for left in self.detach_sockets().err().into_iter().flatten() {
                    tracing::warn!(error = %left, "left behind after a failed attachment");
                }
                return Err(error);
            }
        }
        tracing::info!(cgroup = %cgroup.path.display(), mode = ?self.options.sockets,
                       "socket load balancing is on");
        Ok(())
    }

    /// Detaches the socket programs; sockets keep the backends that they have.
    ///
    /// # Errors
    /// Everything that could not be removed; the rest is gone.
    pub fn detach_sockets(&self) -> Result<(), Vec<KernelError>> {
        let pins = self.pins.sockets();
        let mut errors = Vec::new();
        if pins.exists() {
            release_links(&pins, &mut errors);
            remove_tree(&pins, &mut errors);
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }

    /// Whether the socket programs are attached to a cgroup that exists.
    #[must_use]
    pub fn sockets_attached(&self) -> bool {
        let pins = self.pins.sockets();
        SocketHook::ALL.iter().all(|hook| {
            sys::get(&pins.join(hook.name()))
                .and_then(|link| sys::cgroup_link(link.as_fd()))
                .is_ok_and(|found| found.is_some_and(|(cgroup, _)| cgroup != 0))
        })
    }

    fn load_socket_program(&mut self, hook: SocketHook) -> Result<BorrowedFd<'_>, KernelError> {
        let name = hook.program();
        let failed = |source: ProgramError| load_failure(name, source);
        let program: &mut CgroupSockAddr = self
            .ebpf
            .program_mut(name)
            .ok_or_else(|| KernelError::Missing {
                what: "program",
                name: name.to_owned(),
            })?
            .try_into()
            .map_err(failed)?;
        match program.load() {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => return Err(failed(error)),
        }
        program.fd().map(|fd| fd.as_fd()).map_err(failed)
    }
}

fn attach(
    hook: SocketHook,
    program: BorrowedFd<'_>,
    cgroup: &Cgroup<'_>,
    pin: &Path,
) -> Result<(), KernelError> {
    match sys::get(pin) {
        Ok(link) => {
            let found = sys::cgroup_link(link.as_fd())
                .map_err(|source| cgroup.error(hook, "look at the pinned link", source))?;
            if found == Some((cgroup.number, hook.attach_type())) {
                return sys::link_update(link.as_fd(), program)
                    .map_err(|source| cgroup.error(hook, "change of the program", source));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(KernelError::pin(pin, "open", source)),
    }
    let link = sys::link_create_cgroup(program, cgroup.file.as_fd(), hook.attach_type())
        .map_err(|source| cgroup.error(hook, "attach", source))?;
    // A link to another cgroup goes after the new one is there.
    release_link(pin)?;
    sys::pin(link.as_fd(), pin).map_err(|source| KernelError::pin(pin, "pin", source))
}
