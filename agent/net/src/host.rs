//! The node's own way to Services: a veth pair whose both sides are in the node's namespace.
//!
//! Programs hand the node's packets to Services to the near side; the far side's programs translate them.
//! What comes back leaves the near side for the node's stack, from addresses of Services, which may be
//! the node's own: `accept_local`. Each side has an address, because a reverse path is only ever found
//! loosely where there is one (`rp_filter` of `all` counts for our devices as well).

use std::net::{IpAddr, Ipv4Addr};

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{
        AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoKind,
        InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    },
};

use crate::{
    Link, NetError, Netlink,
    netlink::{IfExists, Request},
    sysctl,
};

/// The near side's name; no Pod's interface has one like it.
pub const HOST_IFNAME: &str = "hachi_host";
/// The far side's name, likewise.
pub const SERVICES_IFNAME: &str = "hachi_services";

/// The addresses of the two, which mean nothing to anybody (RFC 3927).
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(169, 254, 1, 2), Ipv4Addr::new(169, 254, 1, 3)];

/// As long as a packet can be, bytes.
const MTU: u32 = 65_535;
/// `rp_filter`, loosely.
const LOOSE: i32 = 2;

/// The pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPair {
    /// What the node's stack receives from.
    pub near: Link,
    /// What has the programs.
    pub far: Link,
}

/// Whether an address is one that the pair has.
pub(crate) fn is_of_pair(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(address) if ADDRESSES.contains(&address))
}

impl Netlink {
    /// The pair, if it is there and up.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn host_pair(&mut self) -> Result<Option<HostPair>, NetError> {
        let (near, far) = (self.link(HOST_IFNAME)?, self.link(SERVICES_IFNAME)?);
        let (Some(near), Some(far)) = (near, far) else {
            return Ok(None);
        };
        let whole = near.veth && near.peer == Some(far.index) && near.up && far.up;
        Ok(whole.then_some(HostPair { near, far }))
    }

    /// Makes the pair, or takes over the one that is there. What else has one of the names gives way.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn ensure_host_pair(&mut self) -> Result<HostPair, NetError> {
        if let Some(pair) = self.host_pair()? {
            return Ok(pair);
        }
        for name in [HOST_IFNAME, SERVICES_IFNAME] {
            self.delete_link(name)?;
        }
        self.one(Request::create(
            format!("create the interface {HOST_IFNAME}"),
            RouteNetlinkMessage::NewLink(pair()),
            IfExists::Fail,
        ))?;
        let made = self.configure_pair();
        if made.is_err() {
            // The first error says more than a second one could.
            let _ = self.delete_link(HOST_IFNAME);
        }
        made
    }

    fn configure_pair(&mut self) -> Result<HostPair, NetError> {
        let ipv6 = sysctl::has_ipv6();
        for (name, address) in [HOST_IFNAME, SERVICES_IFNAME].into_iter().zip(ADDRESSES) {
            let link = self.link(name)?.ok_or_else(missing)?;
            if ipv6 {
                sysctl::enable_ipv6(name)?;
                sysctl::refuse_router_advertisements(name)?;
            }
            self.one(Request::create(
                format!("give {name} the address {address}"),
                RouteNetlinkMessage::NewAddress(own_address(link.index, address)),
                IfExists::Replace,
            ))?;
            let mut message = LinkMessage::default();
            message.header.index = link.index;
            message.header.change_mask = LinkFlags::Up;
            message.header.flags = LinkFlags::Up;
            message.attributes = vec![LinkAttribute::AfSpecUnspec(settings(ipv6))];
            self.one(Request::plain(
                format!("configure {name}"),
                RouteNetlinkMessage::SetLink(message),
            ))?;
        }
        self.host_pair()?.ok_or_else(missing)
    }
}

fn missing() -> NetError {
    NetError::Garbled("the pair that was made is not there".into())
}

fn pair() -> LinkMessage {
    let attributes = |name: &str| {
        vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(MTU),
        ]
    };
    let mut peer = LinkMessage::default();
    peer.attributes = attributes(SERVICES_IFNAME);
    let mut link = LinkMessage::default();
    link.attributes = attributes(HOST_IFNAME);
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    link
}

fn own_address(index: u32, address: Ipv4Addr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 32;
    message.header.scope = AddressScope::Link;
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address.into()),
        AddressAttribute::Address(address.into()),
    ];
    message
}

fn settings(ipv6: bool) -> Vec<AfSpecUnspec> {
    let mut conf = InetDevConf::default();
    conf.forwarding = 1;
    conf.rp_filter = LOOSE;
    conf.accept_local = 1;
    let mut settings = vec![AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(conf)])];
    if ipv6 {
        settings.push(AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
            In6AddrGenMode::None,
        )]));
    }
    settings
}
