//! Attaching the XDP program to uplinks: a link, pinned as `xdp/<ifname>-<mode>`, like the others.
//!
//! XDP makes the way of some packets shorter and is needed by none: whoever calls this goes on without
//! it. An interface has one XDP program at most, so that where another's is there ours is not.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use aya::programs::Xdp;

use crate::{
    Datapath, KernelError,
    datapath::load_failure,
    pins::{self, Pins, release_link},
    sys,
};

/// The program of the object.
pub(crate) const PROGRAM: &str = "xdp_net";

/// How an XDP program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum XdpMode {
    /// In the driver, before a buffer is made.
    Native,
    /// Behind the driver, which any device has; of little use but for trying.
    Generic,
}

impl XdpMode {
    const ALL: [Self; 2] = [Self::Native, Self::Generic];

    const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    const fn flags(self) -> u32 {
        match self {
            Self::Native => sys::XDP_DRIVER,
            Self::Generic => sys::XDP_GENERIC,
        }
    }
}

impl fmt::Display for XdpMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Datapath {
    /// Attaches the XDP program to an uplink, or changes the program of an earlier agent's link of this
    /// mode; one of the other mode is detached first. Attaching twice is success.
    ///
    /// # Errors
    /// If the verifier rejects the program, or the kernel or the driver refuses: EOPNOTSUPP where a
    /// driver has no XDP, EBUSY where another's program is there.
    pub fn attach_xdp(
        &mut self,
        ifindex: u32,
        ifname: &str,
        mode: XdpMode,
    ) -> Result<(), KernelError> {
        self.load_xdp()?;
        let directory = self.pins.xdp();
        let failed = |action, source| KernelError::AttachXdp {
            ifname: ifname.to_owned(),
            mode,
            action,
            source,
        };
        fs::create_dir_all(&directory)
            .map_err(|source| KernelError::pin(&directory, "create", source))?;
        let program = self.xdp_program()?;
        for other in XdpMode::ALL.into_iter().filter(|other| *other != mode) {
            release_link(&directory.join(name(ifname, other)))?;
        }
        // Another version's link would keep the place.
        for other in self
            .pins
            .other_xdp()
            .map_err(|e| KernelError::pin(&directory, "list", e))?
        {
            for mode in XdpMode::ALL {
                release_link(&other.join(name(ifname, mode)))?;
            }
        }
        let pin = directory.join(name(ifname, mode));
        if let Some(link) =
            open(&pin, ifindex).map_err(|source| KernelError::pin(&pin, "open", source))?
        {
            return sys::link_update(link.as_fd(), program.as_fd())
                .map_err(|source| failed("change of the program", source));
        }
        release_link(&pin)?;
        let link = sys::attach(program.as_fd(), ifindex, sys::XDP, mode.flags())
            .map_err(|source| failed("attach", source))?;
        sys::pin(link.as_fd(), &pin).map_err(|source| KernelError::pin(&pin, "pin", source))
    }

    /// Whether this agent's XDP program is attached to an interface in this mode.
    #[must_use]
    pub fn has_xdp(&self, ifindex: u32, ifname: &str, mode: XdpMode) -> bool {
        let pin = self.pins.xdp().join(name(ifname, mode));
        let ours = self.xdp_program().ok().and_then(|program| {
            let id = sys::program_id(program.as_fd()).ok()?;
            let link = sys::get(&pin).ok()?;
            let (_, of_link, index) = sys::xdp_link(link.as_fd()).ok()??;
            Some(id == of_link && index == ifindex)
        });
        ours == Some(true)
    }

    /// Detaches the XDP program from an interface; one that has none, or is gone, is success.
    ///
    /// # Errors
    /// If a pin cannot be removed.
    pub fn detach_xdp(&self, ifname: &str) -> Result<(), KernelError> {
        let directory = self.pins.xdp();
        let mut result = Ok(());
        for mode in XdpMode::ALL {
            result = result.and(release_link(&directory.join(name(ifname, mode))));
        }
        result
    }

    /// The interfaces with an XDP link of ours.
    ///
    /// # Errors
    /// If the pins cannot be listed.
    pub fn attached_xdp(&self) -> Result<BTreeMap<String, XdpMode>, KernelError> {
        attached_in(&self.pins)
    }

    pub(crate) fn load_xdp(&mut self) -> Result<(), KernelError> {
        let program = xdp(self.ebpf.program_mut(PROGRAM))?;
        if program.fd().is_ok() {
            return Ok(());
        }
        program
            .load()
            .map_err(|source| load_failure(PROGRAM, source))
    }

    pub(crate) fn loaded_xdp(&self) -> Result<&Xdp, KernelError> {
        self.ebpf
            .program(PROGRAM)
            .ok_or_else(missing)?
            .try_into()
            .map_err(|source| load_failure(PROGRAM, source))
    }

    fn xdp_program(&self) -> Result<OwnedFd, KernelError> {
        let fd = self
            .loaded_xdp()?
            .fd()
            .map_err(|source| load_failure(PROGRAM, source))?;
        fd.as_fd()
            .try_clone_to_owned()
            .map_err(|source| load_failure(PROGRAM, source.into()))
    }
}

fn missing() -> KernelError {
    KernelError::Missing {
        what: "program",
        name: PROGRAM.to_owned(),
    }
}

fn xdp(program: Option<&mut aya::programs::Program>) -> Result<&mut Xdp, KernelError> {
    program
        .ok_or_else(missing)?
        .try_into()
        .map_err(|source| load_failure(PROGRAM, source))
}

fn name(ifname: &str, mode: XdpMode) -> String {
    format!("{}-{}", pins::escape(ifname), mode.name())
}

/// The interfaces with an XDP link under these pins.
pub(crate) fn attached_in(pins: &Pins) -> Result<BTreeMap<String, XdpMode>, KernelError> {
    let directory = pins.xdp();
    match fs::read_dir(&directory) {
        Ok(entries) => Ok(entries
            .flatten()
            .filter_map(|entry| parse(&entry.file_name().to_string_lossy()))
            .collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(source) => Err(KernelError::pin(&directory, "list", source)),
    }
}

fn parse(name: &str) -> Option<(String, XdpMode)> {
    let (ifname, mode) = name.rsplit_once('-')?;
    let mode = XdpMode::ALL.into_iter().find(|it| it.name() == mode)?;
    Some((pins::unescape(ifname), mode))
}

/// Opens a pinned link that is attached to the interface; none if there is none.
fn open(pin: &Path, ifindex: u32) -> io::Result<Option<OwnedFd>> {
    let link = match sys::get(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let attached = sys::xdp_link(link.as_fd())?.is_some_and(|(_, _, index)| index == ifindex);
    Ok(attached.then_some(link))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pins_are_read_back() {
        for ifname in ["eth0", "eth0.100", "a-b", "50%2e"] {
            for mode in XdpMode::ALL {
                let name = name(ifname, mode);
                assert!(!name.contains('.'), "{name}");
                assert_eq!(parse(&name), Some((ifname.to_owned(), mode)));
            }
        }
        assert_eq!(parse("eth0-sideways"), None);
    }
}
