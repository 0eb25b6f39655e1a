//! The node's VXLAN device (RFC 7348).
//!
//! One device carries the tunnels to all nodes: it is in external mode, so that programs say packet
//! by packet where to, and learns nothing: no forwarding entry, no neighbour. Inside there is but IP:
//! the device asks nobody for Ethernet addresses (`NOARP`), and has no address of its own.

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{
        AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoKind,
        InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    },
};

use crate::{
    Link, NetError, Netlink,
    netlink::{IfExists, Request},
    sysctl::has_ipv6,
};

/// The device's name; no Pod's interface has one like it.
pub const VXLAN_IFNAME: &str = "hachi_vxlan";

/// `rp_filter`, loosely: nodes' own addresses come through the tunnel to Pods, and by the network
/// otherwise.
const LOOSE: i32 = 2;

impl Netlink {
    /// Makes the device that listens on a UDP port, down, or takes over the one that is there. One
    /// with another port, or of another kind, gives way.
    ///
    /// # Errors
    /// If the kernel has no VXLAN, or the port is in use.
    pub fn ensure_vxlan(&mut self, port: u16, mtu: u32) -> Result<Link, NetError> {
        match self.link(VXLAN_IFNAME)? {
            Some(link) if link.vxlan == Some(port) => {
                if link.mtu != mtu {
                    self.set_mtu(link.index, VXLAN_IFNAME, mtu)?;
                }
                return Ok(Link { mtu, ..link });
            }
            Some(_) => drop(self.delete_link(VXLAN_IFNAME)?),
            None => {}
        }
        self.one(Request::create(
            format!("create the interface {VXLAN_IFNAME}"),
            RouteNetlinkMessage::NewLink(device(port, mtu)),
            IfExists::Fail,
        ))?;
        let made = self.link(VXLAN_IFNAME)?;
        let made = made.ok_or_else(|| NetError::Garbled("no link in the answer".into()))?;
        let mut message = LinkMessage::default();
        message.header.index = made.index;
        message.attributes = vec![LinkAttribute::AfSpecUnspec(settings())];
        self.one(Request::plain(
            format!("configure {VXLAN_IFNAME}"),
            RouteNetlinkMessage::SetLink(message),
        ))?;
        Ok(made)
    }

    /// Sets an interface up.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_up(&mut self, index: u32, name: &str) -> Result<(), NetError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = LinkFlags::Up;
        let request = RouteNetlinkMessage::SetLink(message);
        self.one(Request::plain(format!("bring up {name}"), request))
            .map(drop)
    }

    /// Sets an interface's MTU, bytes.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_mtu(&mut self, index: u32, name: &str, mtu: u32) -> Result<(), NetError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![LinkAttribute::Mtu(mtu)];
        let request = RouteNetlinkMessage::SetLink(message);
        self.one(Request::plain(
            format!("set the MTU of {name} to {mtu}"),
            request,
        ))
        .map(drop)
    }
}

fn device(port: u16, mtu: u32) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.change_mask = LinkFlags::Noarp;
    link.header.flags = LinkFlags::Noarp;
    link.attributes = vec![
        LinkAttribute::IfName(VXLAN_IFNAME.to_owned()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::CollectMetadata(true),
                InfoVxlan::Learning(false),
                InfoVxlan::Port(port),
            ])),
        ]),
    ];
    link
}

fn settings() -> Vec<AfSpecUnspec> {
    let mut conf = InetDevConf::default();
    conf.forwarding = 1;
    conf.rp_filter = LOOSE;
    let mut settings = vec![AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(conf)])];
    if has_ipv6() {
        settings.push(AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
            In6AddrGenMode::None,
        )]));
    }
    settings
}
