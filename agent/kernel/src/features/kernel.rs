//! Tries features on the kernel that runs this.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::{Feature, Features, Finding, Try, attempt, sandbox::Sandbox};
use crate::{
    Capacities,
    layout::layouts,
    pins::{ancestor, is_bpffs},
    sys,
};

/// Tries everything, in a thread that can be given a network namespace of its own.
pub(super) fn probe(pin_root: &Path) -> Features {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            Features::found_by(&mut Kernel {
                pin_root,
                sandbox: Sandbox::enter(),
            })
        });
        thread.join().unwrap_or_else(|_| {
            struct Nothing;
            impl Try for Nothing {
                fn attempt(&mut self, _: Feature) -> Finding {
                    Finding::Unknown("the probe died".into())
                }
            }
            Features::found_by(&mut Nothing)
        })
    })
}

struct Kernel<'a> {
    pin_root: &'a Path,
    sandbox: io::Result<Sandbox>,
}

impl Try for Kernel<'_> {
    fn attempt(&mut self, feature: Feature) -> Finding {
        match feature {
            Feature::Bpf => match attempt::hash() {
                // Who may not use it can tell that it is there.
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => Finding::Present,
                result => finding(result),
            },
            Feature::Permission => match permission() {
                Ok(()) => Finding::Present,
                Err(error) if is_refusal(&error) => Finding::Absent(lacking()),
                // That is another feature's business.
                Err(_) => Finding::Present,
            },
            Feature::BpfFs => self.bpffs(),
            Feature::Maps => maps(),
            Feature::Classifier => finding(sys::prog_load(
                attempt::SCHED_CLS,
                0,
                &attempt::redirect_peer(),
            )),
            Feature::Namespaces => match &self.sandbox {
                Ok(_) => Finding::Present,
                Err(error) => finding::<()>(Err(repeat(error))),
            },
            Feature::Veth => self.within(|sandbox| sandbox.make("veth", "hachi-veth").map(drop)),
            Feature::Tcx => self.within(Sandbox::tcx),
            Feature::Clsact => self.within(Sandbox::clsact),
            Feature::Ipv6 => finding(open_socket(AddressFamily::Inet6, SockType::Datagram, None)),
            Feature::Batch => finding(attempt::hash().and_then(|map| attempt::batch(map.as_fd()))),
            Feature::InstructionCount => instruction_count(),
            Feature::Btf => finding(File::open("/sys/kernel/btf/vmlinux")),
            Feature::Cgroup2 => finding(cgroup2()),
            Feature::SockAddr => finding(sock_addr()),
            Feature::SetRetval => set_retval(),
            Feature::XdpNative => self.within(|sandbox| sandbox.xdp(attempt::XDP_NATIVE)),
            Feature::XdpGeneric => self.within(|sandbox| sandbox.xdp(attempt::XDP_GENERIC)),
            Feature::Vxlan => self.within(Sandbox::vxlan),
            Feature::Netkit => {
                self.within(|sandbox| sandbox.make("netkit", "hachi-netkit").map(drop))
            }
            // As for the first Pod that opens one, the kernel loads the module unless it is barred.
            Feature::Sctp => finding(open_socket(
                AddressFamily::Inet,
                SockType::Stream,
                Some(SockProtocol::Sctp),
            )),
        }
    }
}

impl Kernel<'_> {
    fn within(&mut self, try_it: impl FnOnce(&mut Sandbox) -> io::Result<()>) -> Finding {
        match &mut self.sandbox {
            Ok(sandbox) => finding(try_it(sandbox)),
            Err(error) => {
                Finding::Unknown(format!("it needs a network namespace of its own: {error}"))
            }
        }
    }

    fn bpffs(&self) -> Finding {
        let existing = ancestor(self.pin_root);
        match is_bpffs(existing) {
            Ok(true) => {}
            Ok(false) => {
                return Finding::Absent(format!("{} is on none", self.pin_root.display()));
            }
            Err(error) => return finding::<()>(Err(error)),
        }
        let Ok(map) = attempt::hash() else {
            return Finding::Unknown("there is nothing to pin".into());
        };
        let pin = existing.join(name());
        // One of that name was left by a process that was killed here.
        let _ = fs::remove_file(&pin);
        match sys::pin(map.as_fd(), &pin).and_then(|()| fs::remove_file(&pin)) {
            Ok(()) => Finding::Present,
            Err(error) => Finding::Absent(format!("{}: {error}", existing.display())),
        }
    }
}

/// A name for something that lasts a moment, used once in this process.
fn name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("hachi-probe-{}-{number}", std::process::id())
}

/// What the kernel's answer means.
fn finding<T>(result: io::Result<T>) -> Finding {
    match result {
        Ok(_) => Finding::Present,
        Err(error) if is_refusal(&error) => Finding::Unknown(error.to_string()),
        Err(error) => Finding::Absent(error.to_string()),
    }
}

/// Whether it was this process that was refused, not the feature.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPERM | libc::EACCES | libc::EROFS)
    )
}

fn repeat(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(
        || io::Error::other(error.to_string()),
        io::Error::from_raw_os_error,
    )
}

/// Whether this process may do what the agent does. The kernel takes the administrator's capability for
/// all of bpf(2) and does not ask for the network's before something is to be attached, so these are
/// looked at first.
fn permission() -> io::Result<()> {
    const LPM_TRIE: u32 = 11;
    if !lacks().is_empty() {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    sys::map_create(LPM_TRIE, 8, 4, 1, 1)?;
    sys::prog_load(attempt::SCHED_CLS, 0, &attempt::constant(0)).map(drop)
}

/// The capabilities that this process lacks, as far as it can tell.
fn lacks() -> Vec<&'static str> {
    // linux/capability.h
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .unwrap_or(u64::MAX);
    let mut lacks = Vec::new();
    for (name, number) in [("CAP_NET_ADMIN", NET_ADMIN), ("CAP_SYS_ADMIN", SYS_ADMIN)] {
        if effective & (1 << number) == 0 {
            lacks.push(name);
        }
    }
    lacks
}

/// Why a refusal may have been.
fn lacking() -> String {
    let lacks = lacks();
    if lacks.is_empty() {
        "refused although all capabilities are there: is this a user namespace, or is the kernel \
         locked down?"
            .into()
    } else {
        format!("it lacks {}", lacks.join(", "))
    }
}

fn maps() -> Finding {
    let mut absent = Vec::new();
    for layout in layouts(&Capacities::default()).values() {
        match finding(attempt::map(layout)) {
            Finding::Present => {}
            Finding::Absent(why) => {
                let text = format!("{:?}: {why}", layout.kind);
                if !absent.contains(&text) {
                    absent.push(text);
                }
            }
            unknown @ Finding::Unknown(_) => return unknown,
        }
    }
    if absent.is_empty() {
        Finding::Present
    } else {
        Finding::Absent(absent.join(", "))
    }
}

fn instruction_count() -> Finding {
    let loaded = sys::prog_load(attempt::SCHED_CLS, 0, &attempt::constant(0));
    match loaded.and_then(|program| sys::verified_instructions(program.as_fd())) {
        Ok(0) => Finding::Absent("the kernel does not tell".into()),
        result => finding(result),
    }
}

fn set_retval() -> Finding {
    match is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval) {
        Ok(true) => Finding::Present,
        Ok(false) => Finding::Absent("the helper is not known".into()),
        Err(error) => Finding::Unknown(error.to_string()),
    }
}

fn open_socket(
    family: AddressFamily,
    kind: SockType,
    protocol: Option<SockProtocol>,
) -> io::Result<OwnedFd> {
    Ok(socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol)?)
}

/// Where a cgroup2 hierarchy is mounted.
fn cgroup2() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    mounts
        .lines()
        .find_map(mount_point)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "none is mounted"))
}

/// The mount point in a line of mountinfo (proc(5)), if it is a cgroup2 hierarchy.
fn mount_point(line: &str) -> Option<PathBuf> {
    let (mount, file_system) = line.split_once(" - ")?;
    if file_system.split(' ').next() != Some("cgroup2") {
        return None;
    }
    // Blanks and the like are written as three octal digits.
    let mut rest = mount.split(' ').nth(4)?.as_bytes();
    let mut path = Vec::new();
    while let Some((first, tail)) = rest.split_first() {
        let octal = (*first == b'\\')
            .then(|| std::str::from_utf8(tail.get(..3)?).ok())
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        path.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    Some(PathBuf::from(OsStr::from_bytes(&path)))
}

/// Attaches to every hook of a cgroup of its own, which has no process. Where none can be made (an
/// agent in a container sees the tree read-only), it only loads the programs.
fn sock_addr() -> io::Result<()> {
    let cgroup = cgroup2()?.join(name());
    // As for the pin.
    let _ = fs::remove_dir(&cgroup);
    let hooks = |one: &dyn Fn(u32) -> io::Result<()>| {
        attempt::SOCKET_HOOKS.iter().try_for_each(|(name, kind)| {
            one(*kind).map_err(|error| {
                if is_refusal(&error) {
                    error
                } else {
                    io::Error::other(format!("{name}: {error}"))
                }
            })
        })
    };
    match fs::create_dir(&cgroup) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EACCES | libc::EPERM | libc::EROFS)
            ) =>
        {
            return hooks(&|kind| attempt::socket_program(kind).map(drop));
        }
        made => made?,
    }
    let result = File::open(&cgroup)
        .and_then(|directory| hooks(&|kind| attempt::socket_hook(&directory, kind)));
    result.and(fs::remove_dir(&cgroup))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hierarchy_is_found_by_its_type() {
        let point = |line| mount_point(line).map(|path| path.display().to_string());
        assert_eq!(
            point("29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw").as_deref(),
            Some("/sys/fs/cgroup")
        );
        assert_eq!(
            point(r"29 23 0:26 / /mnt/a\040b rw shared:4 - cgroup2 none rw").as_deref(),
            Some("/mnt/a b")
        );
        assert_eq!(point("29 23 0:26 / /sys rw - sysfs cgroup2 rw"), None);
        assert_eq!(point("nonsense"), None);
    }

    #[test]
    fn a_refusal_is_no_absence() {
        let finding = |errno| finding::<()>(Err(io::Error::from_raw_os_error(errno)));
        assert!(matches!(finding(libc::EPERM), Finding::Unknown(_)));
        assert!(matches!(finding(libc::EROFS), Finding::Unknown(_)));
        assert!(matches!(finding(libc::EINVAL), Finding::Absent(_)));
    }
}
