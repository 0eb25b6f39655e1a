//! A network namespace for trying interfaces; it goes with the thread that entered it, and all that
//! was made in it.

use std::{
    io, mem,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
};

use super::attempt::{self, AT_XDP, SCHED_CLS, XDP};
use crate::{
    clsact,
    netlink::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, Request},
    sys,
};

const RTM_NEWLINK: u16 = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VXLAN_COLLECT_METADATA: u16 = 25;

/// The loopback interface, which every namespace has.
const LOOPBACK: u32 = 1;

/// The calling thread's own namespace.
pub(super) struct Sandbox {
    /// Links to interfaces of it.
    links: Vec<OwnedFd>,
}

impl Drop for Sandbox {
    /// To detach takes the kernel tens of milliseconds, for which nobody has to wait.
    fn drop(&mut self) {
        let links = mem::take(&mut self.links);
        std::thread::spawn(move || drop(links));
    }
}

impl Sandbox {
    /// Puts the calling thread into a new namespace, for the rest of its life.
    pub(super) fn enter() -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(Self { links: Vec::new() })
    }

    /// Makes an interface with its kind's defaults; returns its index.
    pub(super) fn make(&mut self, kind: &str, name: &str) -> io::Result<u32> {
        self.make_with(kind, name, |_| {})
    }

    fn make_with(
        &mut self,
        kind: &str,
        name: &str,
        data: impl FnOnce(&mut Request),
    ) -> io::Result<u32> {
        // `struct ifinfomsg`: any family, type and index, down.
        let mut request = Request::new(RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &[0; 4]);
        request.attribute(IFLA_IFNAME, format!("{name}\0").as_bytes());
        request.nested(IFLA_LINKINFO, |info| {
            info.attribute(IFLA_INFO_KIND, kind.as_bytes());
            info.nested(IFLA_INFO_DATA, data);
        });
        request.send()?;
        Ok(if_nametoindex(name)?)
    }

    /// Attaches to loopback, before all others, as to a Pod's interface.
    pub(super) fn tcx(&mut self) -> io::Result<()> {
        let program = sys::prog_load(SCHED_CLS, 0, &attempt::constant(0))?;
        for hook in [sys::TCX_INGRESS, sys::TCX_EGRESS] {
            let link = sys::link_create(program.as_fd(), LOOPBACK, hook)?;
            self.links.push(link);
        }
        Ok(())
    }

    /// Adds the qdisc and a filter to loopback.
    pub(super) fn clsact(&mut self) -> io::Result<()> {
        let program = sys::prog_load(SCHED_CLS, 0, &attempt::constant(0))?;
        clsact::add_qdisc(LOOPBACK)?;
        for parent in [clsact::Parent::Ingress, clsact::Parent::Egress] {
            clsact::put_filter(LOOPBACK, parent, program.as_fd(), "probe")?;
        }
        Ok(())
    }

    /// Attaches an XDP program to a veth pair in one mode.
    pub(super) fn xdp(&mut self, mode: u32) -> io::Result<()> {
        const PASS: i32 = 2;
        let ifindex = self.make("veth", &format!("hachi-xdp{mode}"))?;
        let program = sys::prog_load(XDP, AT_XDP, &attempt::constant(PASS))?;
        let link = sys::attach(program.as_fd(), ifindex, AT_XDP, mode)?;
        self.links.push(link);
        Ok(())
    }

    /// Makes a VXLAN device that takes every packet's tunnel from a program.
    pub(super) fn vxlan(&mut self) -> io::Result<()> {
        self.make_with("vxlan", "hachi-vxlan", |data| {
            data.attribute(IFLA_VXLAN_COLLECT_METADATA, &[1]);
        })
        .map(drop)
    }
}
