//! A Pod's interface as bytes: frames in and out, with whatever is in them.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    ifaddrs::getifaddrs,
    sys::{
        socket::{
            AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv,
            sendto, setsockopt, socket, sockopt::ReceiveTimeout,
        },
        time::TimeValLike as _,
    },
};

/// An interface of one network namespace, below every protocol.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
    link: LinkAddr,
}

impl Wire {
    /// Opens an interface of the calling thread's network namespace.
    pub fn open(ifname: &str) -> io::Result<Self> {
        let link = link(ifname)?.ok_or(io::ErrorKind::NotFound)?;
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::EthAll,
        )?;
        bind(socket.as_raw_fd(), &link)?;
        Ok(Self { socket, link })
    }

    /// The interface's own Ethernet address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.link.addr().unwrap_or_default()
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let sent = sendto(
            self.socket.as_raw_fd(),
            frame,
            &self.link,
            MsgFlags::empty(),
        )?;
        if sent == frame.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// Whether a frame that is wanted comes within a time; also those that were sent here are seen.
    pub fn sees(&self, limit: Duration, wanted: impl Fn(&[u8]) -> bool) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX);
            if micros == 0 {
                return Ok(false);
            }
            let limit = nix::sys::time::TimeVal::microseconds(micros);
            setsockopt(&self.socket, ReceiveTimeout, &limit)?;
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) if wanted(&buffer[..length]) => return Ok(true),
                Ok(_) | Err(nix::Error::EAGAIN | nix::Error::EINTR | nix::Error::ENETDOWN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The link-layer address of an interface, with its index.
fn link(ifname: &str) -> io::Result<Option<LinkAddr>> {
    let mut all = getifaddrs()?;
    Ok(all.find_map(|entry| {
        let address = entry.address?;
        (entry.interface_name == ifname).then(|| address.as_link_addr().copied())?
    }))
}
