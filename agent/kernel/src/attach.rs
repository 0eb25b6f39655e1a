//! Attaching the programs to interfaces: by clsact at first, later by tcx where the kernel has it (6.6).
//!
//! tcx runs a program some 50 ns sooner and its links are the agent's alone, but every change of a
//! tcx hook waits for an RCU grace period, 10 to 40 ms for each of the two, with the lock held that
//! every change of an interface needs (kernel 6.18, `tcx_entry_sync`). A clsact filter takes less
//! than one. So [`Datapath::attach`] of a new interface makes filters, and [`Datapath::settle`]
//! changes them to links when nobody waits.
//!
//! An attachment is a file under `links/`. With tcx it is the pinned link, which is the attachment
//! itself; with clsact it is the pinned program, and only says that there is a filter of ours.
//!
//! ```text
//! attach ── a pinned tcx link, and really on this interface? ── yes ─> change its program
//!              │ no
//!              └─> clsact filter ─> pin ── settle ─> new tcx link ─> pin ─> filter removed
//! ```
//! The old attachment goes only after the new one is there, so no packet passes unseen.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use hachi_abi::ConfigFlags;

use crate::{
    Datapath, KernelError, clsact,
    datapath::load_programs,
    pins::{Pins, release_link},
    sys,
};

/// How long an interface that is about to be deleted is waited for.
const LET_GO: Duration = Duration::from_secs(3);

/// How programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// clsact at first and tcx once settled; clsact for good where the kernel has no tcx.
    #[default]
    Auto,
    /// tcx only.
    Tcx,
    /// clsact only.
    Clsact,
}

/// How a program was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachKind {
    /// By a tcx link.
    Tcx,
    /// By a filter of the clsact qdisc.
    Clsact,
}

/// A place that a program is attached to: at a Pod's interface, seen from the host's side of the
/// veth pair, at an uplink, or at a device of Hachi's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// tc ingress: what the Pod sends.
    FromPod,
    /// tc egress: what the host's stack sends to the Pod.
    ToPod,
    /// tc ingress of an uplink: what the node receives.
    FromNet,
    /// tc egress of an uplink: what leaves the node.
    ToNet,
    /// tc ingress of the VXLAN device: what other nodes send through the tunnel.
    FromOverlay,
    /// tc egress of the VXLAN device: what goes into the tunnel.
    ToOverlay,
    /// tc ingress of the far side of the node's pair: what the node sends to Services.
    FromHost,
    /// tc egress of that side: what comes back.
    ToHost,
    /// tc egress of the loopback device: what the node sends to itself.
    ToSelf,
}

/// What a device is to the datapath, which says what is attached to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The host's side of a Pod's veth pair.
    Pod,
    /// A device that leads out of the node.
    Uplink,
    /// The VXLAN device.
    Overlay,
    /// The far side of the node's own pair.
    Host,
    /// The loopback device.
    Loopback,
}

impl Role {
    /// All.
    pub const ALL: [Self; 5] = [
        Self::Pod,
        Self::Uplink,
        Self::Overlay,
        Self::Host,
        Self::Loopback,
    ];

    /// The hooks of such a device.
    #[must_use]
    pub const fn hooks(self) -> &'static [Hook] {
        match self {
            Self::Pod => &[Hook::FromPod, Hook::ToPod],
            Self::Uplink => &[Hook::FromNet, Hook::ToNet],
            Self::Overlay => &[Hook::FromOverlay, Hook::ToOverlay],
            Self::Host => &[Hook::FromHost, Hook::ToHost],
            Self::Loopback => &[Hook::ToSelf],
        }
    }
}

impl Hook {
    /// All.
    pub const ALL: [Self; 9] = [
        Self::FromPod,
        Self::ToPod,
        Self::FromNet,
        Self::ToNet,
        Self::FromOverlay,
        Self::ToOverlay,
        Self::FromHost,
        Self::ToHost,
        Self::ToSelf,
    ];

    /// The program of the object.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::FromPod => "from_pod",
            Self::ToPod => "to_pod",
            Self::FromNet => "from_net",
            Self::ToNet => "to_net",
            Self::FromOverlay => "from_overlay",
            Self::ToOverlay => "to_overlay",
            Self::FromHost => "from_host",
            Self::ToHost => "to_host",
            Self::ToSelf => "to_self",
        }
    }

    pub(crate) const fn suffix(self) -> &'static str {
        match self {
            Self::FromPod => "ingress",
            Self::ToPod => "egress",
            Self::FromNet => "uplink_ingress",
            Self::ToNet => "uplink_egress",
            Self::FromOverlay => "overlay_ingress",
            Self::ToOverlay => "overlay_egress",
            Self::FromHost => "host_ingress",
            Self::ToHost => "host_egress",
            Self::ToSelf => "loopback_egress",
        }
    }

    /// Whether it sees what a device receives, rather than what it sends.
    const fn is_ingress(self) -> bool {
        match self {
            Self::FromPod | Self::FromNet | Self::FromOverlay | Self::FromHost => true,
            Self::ToPod | Self::ToNet | Self::ToOverlay | Self::ToHost | Self::ToSelf => false,
        }
    }

    const fn tcx(self) -> u32 {
        if self.is_ingress() {
            sys::TCX_INGRESS
        } else {
            sys::TCX_EGRESS
        }
    }

    const fn clsact(self) -> clsact::Parent {
        if self.is_ingress() {
            clsact::Parent::Ingress
        } else {
            clsact::Parent::Egress
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.program())
    }
}

impl fmt::Display for AttachKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        })
    }
}

/// One hook of one interface.
struct Place<'a> {
    ifindex: u32,
    ifname: &'a str,
    hook: Hook,
}

impl Place<'_> {
    fn error(&self, action: &'static str, source: io::Error) -> KernelError {
        match source.raw_os_error() {
            Some(libc::ENODEV) => KernelError::NoInterface {
                ifname: self.ifname.to_owned(),
                ifindex: self.ifindex,
            },
            Some(libc::EPERM) => KernelError::NotPermitted {
                action: format!("attach {} to {}", self.hook, self.ifname),
                source,
            },
            _ => KernelError::Attach {
                ifname: self.ifname.to_owned(),
                hook: self.hook,
                action,
                source,
            },
        }
    }

    fn has_link(&self, id: u32) -> bool {
        // By the kernel's list, not by the link's own index: the pin may stem from another
        // network namespace with the same numbers.
        sys::query(self.ifindex, self.hook.tcx())
            .is_ok_and(|list| list.iter().any(|(_, link)| *link == id))
    }
}

/// What a pin under `links/` is.
enum Pinned {
    /// A tcx link and its id.
    Link(OwnedFd, u32),
    /// A program: the marker of a clsact filter.
    Marker,
}

fn open(pin: &Path) -> io::Result<Option<Pinned>> {
    let fd = match sys::get(pin) {
        Ok(fd) => fd,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let id = sys::tcx_link_id(fd.as_fd())?;
    Ok(Some(id.map_or(Pinned::Marker, |id| Pinned::Link(fd, id))))
}

impl Datapath {
    /// Attaches the programs of its role to a device, or changes the programs of an earlier agent's
    /// attachment; attaching twice is success. Programs that not every node needs are loaded first.
    ///
    /// # Errors
    /// If the device does not exist, or the kernel refuses a program or its place. What this call
    /// attached is then detached again.
    pub fn attach(
        &mut self,
        role: Role,
        ifindex: u32,
        ifname: &str,
    ) -> Result<AttachKind, KernelError> {
        let hooks = role.hooks();
        self.load_role(role)?;
        let mut made = Vec::new();
        let mut kind = AttachKind::Tcx;
        for &hook in hooks {
            match self.attach_hook(&Place {
                ifindex,
                ifname,
                hook,
            }) {
                Ok((used, new)) => {
                    kind = used;
                    made.extend(new.then_some(hook));
                }
                Err(error) => {
                    for hook in made {
                        if let Err(error) = release(&self.pins.link(ifname, hook), ifname, hook) {
                            tracing::warn!(%error, "left behind after a failed attachment");
                        }
                    }
                    return Err(error);
                }
            }
        }
        tracing::debug!(ifname, ifindex, %kind, "programs attached");
        Ok(kind)
    }

    /// Loads the programs of a role, if they are not loaded yet: those that a node may have no use for
    /// are loaded when their device is attached to.
    ///
    /// # Errors
    /// If the verifier rejects one.
    pub fn load_role(&mut self, role: Role) -> Result<(), KernelError> {
        load_programs(&mut self.ebpf, role.hooks())
    }

    /// Attaches one program; also tells whether the attachment is new.
    fn attach_hook(&mut self, place: &Place<'_>) -> Result<(AttachKind, bool), KernelError> {
        let pin = self.pins.link(place.ifname, place.hook);
        adopt(&self.pins, place, &pin)?;
        let program = self.program_fd(place.hook)?;
        let old = open(&pin).map_err(|source| KernelError::pin(&pin, "open", source))?;
        let Some(old) = old else {
            return self.attach_beside(place, program.as_fd(), None, &pin);
        };
        self.once(|this| this.attach_beside(place, program.as_fd(), Some(&old), &pin))
    }

    /// Does what may leave a link and a filter at the same hook for a moment, so that no packet is
    /// judged and rewritten by both.
    fn once<T>(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<T, KernelError>,
    ) -> Result<T, KernelError> {
        let mut config = self.config()?;
        config.flags |= ConfigFlags::ONCE;
        self.set_config(&config)?;
        let result = change(self);
        config.flags &= !ConfigFlags::ONCE;
        self.set_config(&config)?;
        result
    }

    /// Attaches one program where `old` is.
    fn attach_beside(
        &mut self,
        place: &Place<'_>,
        program: BorrowedFd<'_>,
        old: Option<&Pinned>,
        pin: &Path,
    ) -> Result<(AttachKind, bool), KernelError> {
        let by_tcx = match self.options.attach {
            AttachMode::Tcx => true,
            AttachMode::Clsact => false,
            // A link that is there has paid its price.
            AttachMode::Auto => {
                matches!(old, Some(Pinned::Link(_, id)) if place.has_link(*id))
            }
        };
        if by_tcx {
            let new = attach_tcx(place, program, old, pin)?;
            remove_marked(place, old)?;
            return Ok((AttachKind::Tcx, new));
        }
        match attach_clsact(place, program, old, pin) {
            Ok(new) => Ok((AttachKind::Clsact, new)),
            Err(error) if self.options.attach == AttachMode::Auto && lacks_clsact(&error) => {
                tracing::debug!(%error, ifname = place.ifname, "no clsact on this kernel: tcx at once");
                // The qdisc may be there and its filters not.
                let _ = clsact::remove_qdisc_if_unused(place.ifindex);
                // What clsact said comes first where there is no tcx either.
                let new = attach_tcx(place, program, old, pin).map_err(|_| error)?;
                Ok((AttachKind::Tcx, new))
            }
            Err(error) => Err(error),
        }
    }

    /// Changes the filters of an interface to tcx links, where the mode is [`AttachMode::Auto`] and
    /// the kernel has tcx; takes tens of milliseconds. Tells whether the interface is attached to by
    /// tcx now.
    ///
    /// # Errors
    /// If the interface does not exist, or the kernel refuses. The filters are then still there.
    pub fn settle(&mut self, ifindex: u32, ifname: &str) -> Result<bool, KernelError> {
        if self.options.attach != AttachMode::Auto || self.no_tcx {
            return Ok(false);
        }
        for &hook in Role::Pod.hooks() {
            let place = Place {
                ifindex,
                ifname,
                hook,
            };
            let pin = self.pins.link(ifname, hook);
            let old = open(&pin).map_err(|source| KernelError::pin(&pin, "open", source))?;
            if !matches!(old, Some(Pinned::Marker)) {
                continue;
            }
            let program = self.program_fd(hook)?;
            match self.once(|_| {
                attach_tcx(&place, program.as_fd(), old.as_ref(), &pin)?;
                remove_marked(&place, old.as_ref())
            }) {
                Ok(()) => {}
                // Before 6.6 the attach type is unknown: EINVAL.
                Err(KernelError::Attach { source, .. }) if sys::unsupported(&source) => {
                    tracing::info!(error = %source, "no tcx on this kernel: filters stay");
                    self.no_tcx = true;
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        tracing::debug!(ifname, ifindex, "attachment settled");
        Ok(true)
    }

    /// Detaches the programs of its role from a device. One that is gone is success.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn detach(&mut self, role: Role, ifname: &str) -> Result<(), KernelError> {
        let mut result = Ok(());
        for &hook in role.hooks() {
            // Both are tried whatever the first says.
            result = result.and(release(&self.pins.link(ifname, hook), ifname, hook));
        }
        result
    }

    /// Detaches both programs from an interface that is about to be deleted: what costs time is
    /// left to another thread, which does it when the interface is gone and it costs nothing any
    /// more, or after some seconds in any case.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn let_go(&mut self, ifindex: u32, ifname: &str) -> Result<(), KernelError> {
        let mut links = Vec::new();
        let mut result = Ok(());
        for &hook in Role::Pod.hooks() {
            let pin = self.pins.link(ifname, hook);
            match open(&pin) {
                Ok(Some(Pinned::Link(link, _))) => {
                    let removed = fs::remove_file(&pin);
                    let removed = removed.map_err(|e| KernelError::pin(&pin, "remove", e));
                    result = result.and(removed);
                    links.push(link);
                }
                Ok(_) => result = result.and(release(&pin, ifname, hook)),
                Err(error) => result = result.and(Err(KernelError::pin(&pin, "open", error))),
            }
        }
        if !links.is_empty() {
            let wait = move || {
                let until = Instant::now() + LET_GO;
                // By its index: whoever deletes it may have renamed it first.
                while nix::net::if_::if_indextoname(ifindex).is_ok() && Instant::now() < until {
                    std::thread::sleep(LET_GO / 30);
                }
                drop(links);
            };
            // Without a thread they are closed here, and the caller waits.
            if let Err(error) = std::thread::Builder::new()
                .name("let-go".into())
                .spawn(wait)
            {
                tracing::warn!(%error, "no thread to detach in");
            }
        }
        result
    }

    /// The devices that have attachments of ours, as of a role.
    ///
    /// # Errors
    /// If the pins cannot be listed.
    pub fn attached(&self, role: Role) -> Result<BTreeSet<String>, KernelError> {
        let attached = self.pins.attached()?.into_iter();
        let ours = attached.filter(|(_, found)| found.iter().any(|it| role.hooks().contains(it)));
        Ok(ours.map(|(ifname, _)| ifname).collect())
    }

    /// Removes the maps and attachments that agents of other ABI versions have left. Their
    /// attachments at interfaces that this agent attached to are its own by then; call this once
    /// all Pods' interfaces are attached to.
    ///
    /// # Errors
    /// Everything that could not be removed; the rest is gone.
    pub fn remove_other_versions(&self) -> Result<(), Vec<KernelError>> {
        let removed = self.pins.remove_others()?;
        if removed > 0 {
            tracing::info!(removed, "pins of other versions removed");
        }
        Ok(())
    }

    /// Whether this agent's programs of its role are really attached to a device.
    ///
    /// # Errors
    /// [`KernelError::NotAttached`] if not.
    pub fn check(&self, role: Role, ifindex: u32, ifname: &str) -> Result<(), KernelError> {
        for &hook in role.hooks() {
            let place = Place {
                ifindex,
                ifname,
                hook,
            };
            let missing = || KernelError::NotAttached {
                ifname: ifname.to_owned(),
                hook,
            };
            // Not loaded yet: whatever is attached is an earlier agent's.
            let id = self.program_id(hook).map_err(|_| missing())?;
            let by_tcx = match sys::query(ifindex, hook.tcx()) {
                Ok(list) => list.iter().any(|(program, _)| *program == id),
                Err(error) if sys::unsupported(&error) => false,
                Err(source) => return Err(place.error("query", source)),
            };
            let attached = by_tcx
                || clsact::filters(ifindex, hook.clsact())
                    .map_err(|source| place.error("query", source))?
                    .iter()
                    .any(|filter| filter.program == Some(id));
            if !attached {
                return Err(missing());
            }
        }
        Ok(())
    }
}

/// Moves the attachment that an agent of another ABI version left to our own directory, where it
/// is treated as our own.
fn adopt(pins: &Pins, place: &Place<'_>, pin: &Path) -> Result<(), KernelError> {
    let others = pins
        .other_links(place.ifname, place.hook)
        .map_err(|source| KernelError::pin(pin, "list", source))?;
    for other in others {
        if pin.exists() {
            // Two generations' links run one after the other: the older one is let go.
            release(&other, place.ifname, place.hook)?;
        } else {
            fs::rename(&other, pin)
                .map_err(|source| KernelError::pin(&other, "take over", source))?;
        }
    }
    Ok(())
}

fn attach_tcx(
    place: &Place<'_>,
    program: BorrowedFd<'_>,
    old: Option<&Pinned>,
    pin: &Path,
) -> Result<bool, KernelError> {
    if let Some(Pinned::Link(link, id)) = old
        && place.has_link(*id)
    {
        return sys::link_update(link.as_fd(), program)
            .map(|()| false)
            .map_err(|source| place.error("change of the program", source));
    }
    let link = sys::link_create(program, place.ifindex, place.hook.tcx())
        .map_err(|source| place.error("attach by tcx", source))?;
    replace_pin(link.as_fd(), pin)?;
    Ok(true)
}

/// Whether an attachment failed because the kernel was built without clsact or its filters, both of
/// which are unknown by name then.
fn lacks_clsact(error: &KernelError) -> bool {
    matches!(error, KernelError::Attach { source, .. }
        if source.kind() == io::ErrorKind::NotFound || sys::unsupported(source))
}

fn attach_clsact(
    place: &Place<'_>,
    program: BorrowedFd<'_>,
    old: Option<&Pinned>,
    pin: &Path,
) -> Result<bool, KernelError> {
    clsact::add_qdisc(place.ifindex).map_err(|source| place.error("clsact qdisc", source))?;
    clsact::put_filter(
        place.ifindex,
        place.hook.clsact(),
        program,
        place.hook.program(),
    )
    .map_err(|source| place.error("attach by clsact", source))?;
    // A tcx link that was pinned here goes after the filter is in place, and at once: without its pin
    // it would, but later.
    replace_pin(program, pin)?;
    if let Some(Pinned::Link(link, _)) = old
        && let Err(error) = sys::link_detach(link.as_fd())
    {
        tracing::debug!(%error, ifname = place.ifname, "the old link is let go instead");
    }
    Ok(!matches!(old, Some(Pinned::Marker)))
}

/// Removes the filter that a marker stood for, once something else is in its place.
fn remove_marked(place: &Place<'_>, old: Option<&Pinned>) -> Result<(), KernelError> {
    if matches!(old, Some(Pinned::Marker)) {
        remove_filter(place.ifindex, place.hook)
            .map_err(|source| place.error("removal of the old filter", source))?;
    }
    Ok(())
}

fn replace_pin(fd: BorrowedFd<'_>, pin: &Path) -> Result<(), KernelError> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(KernelError::pin(pin, "remove", error));
        }
        _ => {}
    }
    sys::pin(fd, pin).map_err(|source| KernelError::pin(pin, "pin", source))
}

/// Undoes the attachment that a pin stands for.
pub(crate) fn release(pin: &Path, ifname: &str, hook: Hook) -> Result<(), KernelError> {
    let pinned = open(pin).map_err(|source| KernelError::pin(pin, "open", source))?;
    match pinned {
        None => Ok(()),
        Some(Pinned::Link(..)) => release_link(pin),
        Some(Pinned::Marker) => {
            if let Ok(ifindex) = nix::net::if_::if_nametoindex(ifname) {
                let place = Place {
                    ifindex,
                    ifname,
                    hook,
                };
                remove_filter(ifindex, hook).map_err(|source| place.error("detach", source))?;
            }
            fs::remove_file(pin).map_err(|source| KernelError::pin(pin, "remove", source))
        }
    }
}

fn remove_filter(ifindex: u32, hook: Hook) -> io::Result<()> {
    clsact::remove_filter(ifindex, hook.clsact())?;
    clsact::remove_qdisc_if_unused(ifindex)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_unknown_by_name_is_lacking() {
        let error = |errno| KernelError::Attach {
            ifname: "eth0".into(),
            hook: Hook::FromPod,
            action: "clsact qdisc",
            source: io::Error::from_raw_os_error(errno),
        };
        for errno in [libc::ENOENT, libc::EOPNOTSUPP] {
            assert!(lacks_clsact(&error(errno)), "{errno}");
        }
        for errno in [libc::EPERM, libc::EBUSY, libc::ENOMEM, libc::ENODEV] {
            assert!(!lacks_clsact(&error(errno)), "{errno}");
        }
    }
}
