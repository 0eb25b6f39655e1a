//! Changes of the node's own network, as the kernel tells them.
//!
//! What the agent makes itself (Pods' interfaces and the routes to them) is no news: a node where Pods
//! come and go would hear of nothing else.

use std::{
    os::fd::{AsFd as _, BorrowedFd},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
    route::RouteProtocol,
};

use crate::{NetError, Netlink, ROUTE_PROTOCOL, is_host_ifname, is_retired_ifname};

/// `RTNLGRP_LINK`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`.
const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];

/// Hears of links, addresses and routes.
#[derive(Debug)]
pub struct Monitor {
    events: Netlink,
}

impl Monitor {
    /// Listens in the namespace of the calling thread, from now on.
    ///
    /// # Errors
    /// If the socket cannot be opened.
    pub fn start() -> Result<Self, NetError> {
        let mut events = Netlink::open()?;
        for group in GROUPS {
            events.subscribe(group)?;
        }
        Ok(Self { events })
    }

    /// Waits for news, at most so long; whether there was any.
    ///
    /// # Errors
    /// If the socket fails. More at once than it has room for is news, not an error.
    pub fn wait(&mut self, limit: Duration) -> Result<bool, NetError> {
        let millis = u16::try_from(limit.as_millis()).unwrap_or(u16::MAX);
        if !ready(self.events.as_fd(), millis)? {
            return Ok(false);
        }
        let mut news = false;
        loop {
            match self.events.changes() {
                Ok(messages) => news |= messages.iter().any(is_news),
                Err(error) if error.errno() == Some(nix::libc::ENOBUFS) => news = true,
                Err(NetError::Garbled(_)) => news = true,
                Err(error) => return Err(error),
            }
            if !ready(self.events.as_fd(), 0)? {
                return Ok(news);
            }
        }
    }
}

fn ready(fd: BorrowedFd<'_>, millis: u16) -> Result<bool, NetError> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::from(millis)) {
        Ok(count) => Ok(count > 0),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(errno) => Err(NetError::Socket(errno.into())),
    }
}

fn is_news(message: &RouteNetlinkMessage) -> bool {
    let ours = RouteProtocol::Other(ROUTE_PROTOCOL);
    match message {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => !is_pods(link),
        RouteNetlinkMessage::NewRoute(route) => route.header.protocol != ours,
        // One of ours that goes without its Pod is missed.
        RouteNetlinkMessage::DelRoute(route) => {
            route.header.protocol != ours || !is_host(&route.header)
        }
        RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => true,
        _ => false,
    }
}

fn is_host(route: &rtnetlink::packet_route::route::RouteHeader) -> bool {
    matches!(route.destination_prefix_length, 32 | 128)
}

fn is_pods(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::IfName(name)
            if is_host_ifname(name) || is_retired_ifname(name))
    })
}
