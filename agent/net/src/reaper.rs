//! Deleting veths in the background.
//!
//! The kernel takes 20 ms and more to let go of a veth (it waits for every CPU's readers, twice),
//! and a DEL waits with it. Where an agent runs, DEL only *retires* the pair: sets it down, which
//! cuts the Pod off, and gives both sides names that are in nobody's way. The agent's [`Reaper`]
//! hears of the new name from the kernel and deletes the link in its own time.
//!
//! ```text
//! DEL ── set down, rename to hachix<index> ──> kernel ── RTM_NEWLINK ──> Reaper ── RTM_DELLINK
//! ```
//! That a reaper runs is known from the lock that it holds on a file of the store; without one DEL
//! deletes by itself. A link that was retired as its reaper died is found by the next.

use std::{
    fs::File,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
};
use tracing::{debug, warn};

use crate::{Link, NetError, Netlink, Store, StoreError, netlink::Request};

const PREFIX: &str = "hachix";
/// How often the end of the reaper is looked for, in milliseconds.
const PERIOD: u16 = 250;
/// The kernel's multicast group of changes to links (`RTNLGRP_LINK`).
const GROUP_LINK: u32 = 1;

/// Whether a link of this name waits to be deleted.
#[must_use]
pub fn is_retired_ifname(name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .is_some_and(|index| !index.is_empty() && index.bytes().all(|b| b.is_ascii_digit()))
}

impl Netlink {
    /// Sets a link down and gives it a name that is in nobody's way; a [`Reaper`] deletes it.
    pub fn retire_link(&mut self, link: &Link) -> Result<(), NetError> {
        let change = |attribute: Option<LinkAttribute>| {
            let mut message = LinkMessage::default();
            message.header.index = link.index;
            message.header.change_mask = LinkFlags::Up;
            message.attributes.extend(attribute);
            let what = format!("retire the interface {}", link.name);
            Request::plain(what, RouteNetlinkMessage::SetLink(message))
        };
        // Two steps: before Linux 6.2 no interface that is up can be renamed.
        let name = format!("{PREFIX}{}", link.index);
        self.all(vec![
            change(None),
            change(Some(LinkAttribute::IfName(name))),
        ])
    }
}

/// Deletes retired links as long as it lives.
#[derive(Debug)]
pub struct Reaper {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Store {
    /// Starts to delete what DEL retires, in the namespace of the calling thread.
    pub fn start_reaper(&self) -> Result<Reaper, NetError> {
        // Opened here, so that nothing is missed and the thread may be in any namespace.
        let mut events = Netlink::open()?;
        events.subscribe(GROUP_LINK)?;
        let netlink = Netlink::open()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (store, stopped) = (self.clone(), Arc::clone(&stop));
        let thread = thread::Builder::new()
            .name("reaper".into())
            .spawn(move || reap(&store, events, netlink, &stopped))
            .map_err(NetError::Socket)?;
        Ok(Reaper {
            stop,
            thread: Some(thread),
        })
    }

    /// Whether a [`Reaper`] runs on this node.
    #[must_use]
    pub fn reaper_runs(&self) -> bool {
        // Only one that is missing can be locked.
        let Ok(file) = File::open(self.reaper_file()) else {
            return false;
        };
        Flock::lock(file, FlockArg::LockSharedNonblock).is_err()
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn reap(store: &Store, mut events: Netlink, mut netlink: Netlink, stop: &AtomicBool) {
    let stopped = || stop.load(Ordering::Relaxed);
    // An agent that is being replaced holds the lock for a while yet.
    let patience = Duration::from_millis(PERIOD.into());
    let _lock = loop {
        match store.lock_reaper(patience) {
            Ok(lock) => break lock,
            Err(StoreError::Locked { .. }) if !stopped() => {}
            Err(StoreError::Locked { .. }) => return,
            Err(error) => {
                warn!(%error, "DEL has to delete interfaces by itself");
                return;
            }
        }
    };
    sweep(&mut netlink);
    while !stopped() {
        match wait(&events) {
            Ok(false) => {}
            Ok(true) => match events.changed_links() {
                Ok(names) if !names.iter().any(|name| is_retired_ifname(name)) => {}
                Ok(_) => sweep(&mut netlink),
                // Too much at once for the socket's buffer; what was missed is on the list.
                Err(error) => {
                    debug!(%error, "links changed faster than they were read");
                    sweep(&mut netlink);
                }
            },
            Err(errno) => {
                warn!(%errno, "cannot wait for changes; DEL has to delete interfaces by itself");
                return;
            }
        }
    }
}

/// Whether there is something to read, waiting a little.
fn wait(events: &Netlink) -> Result<bool, nix::errno::Errno> {
    let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::from(PERIOD)) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn sweep(netlink: &mut Netlink) {
    let links = match netlink.links() {
        Ok(links) => links,
        Err(error) => {
            warn!(%error, "cannot look for retired interfaces");
            return;
        }
    };
    for link in links
        .iter()
        .filter(|link| link.veth && is_retired_ifname(&link.name))
    {
        if let Err(error) = netlink.delete_link(&link.name) {
            warn!(%error, "cannot delete a retired interface");
        }
    }
}
