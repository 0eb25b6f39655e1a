//! A Pod's interface as bytes: frames in and out, with whatever is in them.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    ifaddrs::getifaddrs,
    sys::{
        socket::{
            AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv,
            recvfrom, sendto, setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout},
        },
        time::TimeValLike as _,
    },
};

use crate::netns::Netns;

/// What a packet socket is told of a frame that its own side sends (`PACKET_OUTGOING`).
const OUTGOING: u8 = 4;

/// How often a sniffer looks whether it is to stop.
const GLANCE: Duration = Duration::from_millis(20);

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
            if left.as_micros() == 0 {
                return Ok(false);
            }
            self.wait_at_most(left)?;
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) if wanted(&buffer[..length]) => return Ok(true),
                Ok(_) | Err(nix::Error::EAGAIN | nix::Error::EINTR | nix::Error::ENETDOWN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn wait_at_most(&self, limit: Duration) -> io::Result<()> {
        let micros = i64::try_from(limit.as_micros()).unwrap_or(i64::MAX).max(1);
        let limit = nix::sys::time::TimeVal::microseconds(micros);
        Ok(setsockopt(&self.socket, ReceiveTimeout, &limit)?)
    }

    /// The next frame that has come to the interface, if one comes within [`GLANCE`].
    fn incoming(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), buffer) {
            Ok((_, Some(from))) if from.pkttype() == OUTGOING => Ok(None),
            Ok((length, _)) => Ok(Some(length)),
            Err(nix::Error::EAGAIN | nix::Error::EINTR | nix::Error::ENETDOWN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Everything that comes to an interface, whatever its namespace's stack makes of it, noted by a
/// thread of its own.
#[derive(Debug)]
pub struct Sniffer {
    stop: Arc<AtomicBool>,
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    thread: JoinHandle<io::Result<()>>,
}

impl Sniffer {
    /// Begins to listen; of what comes, only what is wanted is kept.
    pub fn start(
        netns: &Netns,
        ifname: &str,
        wanted: impl Fn(&[u8]) -> bool + Send + 'static,
    ) -> Result<Self> {
        let wire = netns
            .enter(|| Wire::open(ifname))?
            .with_context(|| format!("listen on {ifname} of {}", netns.name()))?;
        setsockopt(&wire.socket, RcvBufForce, &(16 << 20)).context("enlarge a buffer")?;
        wire.wait_at_most(GLANCE)?;
        let stop = Arc::new(AtomicBool::new(false));
        let frames = Arc::new(Mutex::new(Vec::new()));
        let (stopped, kept) = (Arc::clone(&stop), Arc::clone(&frames));
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while !stopped.load(Ordering::Relaxed) {
                if let Some(length) = wire.incoming(&mut buffer)?
                    && wanted(&buffer[..length])
                {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.push(buffer[..length].to_vec());
                }
            }
            Ok(())
        });
        Ok(Self {
            stop,
            frames,
            thread,
        })
    }

    /// What has come so far.
    #[must_use]
    pub fn frames(&self) -> Vec<Vec<u8>> {
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        frames.clone()
    }

    /// Ends it, and returns all that came.
    pub fn stop(self) -> Result<Vec<Vec<u8>>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow::anyhow!("a sniffer's thread panicked"))?
            .context("listen")?;
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *frames))
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
