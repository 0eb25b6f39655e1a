//! Links, and the node's own addresses.

use std::{collections::BTreeSet, net::IpAddr};

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
};

use crate::{Mac, NetError, Netlink, host::is_of_pair, netlink::Request};

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its Ethernet address, if it has one.
    pub mac: Option<Mac>,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Whether it is set up.
    pub up: bool,
    /// Whether it is a veth.
    pub veth: bool,
    /// The index of a veth's other side, in that side's namespace.
    pub peer: Option<u32>,
    /// The UDP port of a VXLAN device in external mode.
    pub vxlan: Option<u16>,
}

impl Link {
    pub(crate) fn parse(message: &LinkMessage) -> Self {
        let mut link = Self {
            name: String::new(),
            index: message.header.index,
            mac: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            veth: false,
            peer: None,
            vxlan: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(bytes) => link.mac = Mac::from_slice(bytes),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Link(index) => link.peer = Some(*index),
                LinkAttribute::LinkInfo(info) => {
                    link.veth = info.contains(&LinkInfo::Kind(InfoKind::Veth));
                    link.vxlan = info.iter().find_map(external_port);
                }
                _ => {}
            }
        }
        link
    }
}

/// The UDP port of a VXLAN device that has its tunnel keys from outside.
fn external_port(info: &LinkInfo) -> Option<u16> {
    let LinkInfo::Data(InfoData::Vxlan(data)) = info else {
        return None;
    };
    if !data.contains(&InfoVxlan::CollectMetadata(true)) {
        return None;
    }
    data.iter().find_map(|value| match value {
        InfoVxlan::Port(port) => Some(*port),
        _ => None,
    })
}

impl Netlink {
    /// The interface of this name, if there is one.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, NetError> {
        match self.one(get_link(name)) {
            Ok(answer) => Ok(find_link(&answer)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every interface of the namespace.
    pub fn links(&mut self) -> Result<Vec<Link>, NetError> {
        let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let objects = self.dump("list interfaces", &question)?;
        Ok(objects.iter().filter_map(as_link).collect())
    }

    /// Deletes the interface of this name; `false` if there is none. The kernel takes some 20 ms
    /// to let go of a veth.
    pub fn delete_link(&mut self, name: &str) -> Result<bool, NetError> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        let what = format!("delete the interface {name}");
        match self.one(Request::plain(what, RouteNetlinkMessage::DelLink(message))) {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The addresses of every interface of the namespace, with the interface's index.
    pub fn addresses(&mut self) -> Result<Vec<(u32, IpAddr)>, NetError> {
        let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let mut found = Vec::new();
        for object in self.dump("list addresses", &question)? {
            let RouteNetlinkMessage::NewAddress(message) = object else {
                continue;
            };
            // On point-to-point links `Address` is the other side's.
            let mut address = None;
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::Local(local) => address = Some(*local),
                    AddressAttribute::Address(own) => address = address.or(Some(*own)),
                    _ => {}
                }
            }
            found.extend(address.map(|address| (message.header.index, address)));
        }
        Ok(found)
    }
}

pub(crate) fn get_link(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message
        .attributes
        .push(LinkAttribute::IfName(name.to_owned()));
    Request::plain(
        format!("find the interface {name}"),
        RouteNetlinkMessage::GetLink(message),
    )
}

pub(crate) fn find_link(objects: &[RouteNetlinkMessage]) -> Option<Link> {
    objects.iter().find_map(as_link)
}

fn as_link(object: &RouteNetlinkMessage) -> Option<Link> {
    match object {
        RouteNetlinkMessage::NewLink(message) => Some(Link::parse(message)),
        _ => None,
    }
}

/// This node's own addresses, without those of the loopback block and of our own pair: what policies mean by "the
/// Pod's own node".
pub fn local_addresses() -> Result<BTreeSet<IpAddr>, NetError> {
    let addresses = Netlink::open()?.addresses()?;
    Ok(addresses
        .into_iter()
        .map(|(_, address)| address)
        .filter(|a| !a.is_loopback() && !is_of_pair(*a))
        .collect())
}
