//! Kernel settings: of our own interfaces, and forwarding.
//!
//! `/proc/sys/net` shows the namespace of the thread that opens a file.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{Changes, NetError};

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub fn of(address: std::net::IpAddr) -> Self {
        if address.is_ipv4() {
            Self::V4
        } else {
            Self::V6
        }
    }
}

const V4_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
const V6_FORWARD: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
const V6_CONF: &str = "/proc/sys/net/ipv6/conf";

/// Whether the kernel has IPv6 (it may be switched off at boot).
pub(crate) fn has_ipv6() -> bool {
    Path::new(V6_CONF).exists()
}

/// Whether this namespace forwards packets of a family.
#[must_use]
pub fn forwards(family: Family) -> bool {
    read(Path::new(forward_file(family))).is_ok_and(|value| value != "0")
}

fn forward_file(family: Family) -> &'static str {
    match family {
        Family::V4 => V4_FORWARD,
        Family::V6 => V6_FORWARD,
    }
}

/// Makes this namespace (the node) forward packets of a family; returns whether that was a change,
/// which is recorded.
///
/// The switch is global, as it is with the reference plugins: IPv6 forwards nothing without
/// `conf/all/forwarding`, and IPv4 needs it on the uplink as much as on our interfaces. A host that
/// forwards IPv6 ignores router advertisements where `accept_ra` is 1, and would lose its own
/// default route by our doing; such interfaces are raised to 2 ("even when forwarding") first.
pub fn enable_forwarding(family: Family, changes: &Changes) -> Result<bool, NetError> {
    if forwards(family) {
        return Ok(false);
    }
    if family == Family::V6 {
        keep_router_advertisements(changes)?;
    }
    changes.set(Path::new(forward_file(family)), "1")
}

fn keep_router_advertisements(changes: &Changes) -> Result<(), NetError> {
    let conf = PathBuf::from(V6_CONF);
    let entries = fs::read_dir(&conf).map_err(|source| NetError::Sysctl { path: conf, source })?;
    for entry in entries.flatten() {
        let file = entry.path().join("accept_ra");
        if entry.file_name() != "all" && read(&file).is_ok_and(|value| value == "1") {
            changes.set(&file, "2")?;
        }
    }
    Ok(())
}

/// Enables IPv6 on one interface, which runtimes often disable in a new namespace.
pub fn enable_ipv6(ifname: &str) -> Result<(), NetError> {
    let file = interface_file(ifname, "disable_ipv6");
    match read(&file) {
        Ok(value) if value == "0" => Ok(()),
        Ok(_) => write(&file, "0"),
        Err(source) => Err(NetError::Sysctl { path: file, source }),
    }
}

/// A host interface does not believe a Pod that poses as a router.
pub(crate) fn refuse_router_advertisements(ifname: &str) -> Result<(), NetError> {
    write(&interface_file(ifname, "accept_ra"), "0")
}

fn interface_file(ifname: &str, setting: &str) -> PathBuf {
    Path::new(V6_CONF).join(ifname).join(setting)
}

fn read(file: &Path) -> io::Result<String> {
    fs::read_to_string(file).map(|value| value.trim().to_owned())
}

fn write(file: &Path, value: &str) -> Result<(), NetError> {
    fs::write(file, value).map_err(|source| NetError::Sysctl {
        path: file.to_owned(),
        source,
    })
}
