//! Routes of the node: to the Pods of other nodes, and to the world.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
        RouteScope, RouteType,
    },
};

use crate::{
    Link, NetError, Netlink,
    netlink::{IfExists, Request},
    wire::{address_of, unicast},
};

/// What our routes carry as their `proto`: only routes with it are ever changed or deleted.
pub const ROUTE_PROTOCOL: u8 = b'H';

/// Requests in one message: their acknowledgements must fit the socket's receive buffer.
const BATCH: usize = 64;

/// What [`ensure_routes`] did.
#[derive(Debug, Default)]
pub struct RouteChanges {
    /// Routes added or changed.
    pub written: usize,
    /// Stale routes deleted.
    pub deleted: usize,
    /// What could not be done; everything else was.
    pub errors: Vec<NetError>,
}

/// Where a route through another node leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// The next hop.
    pub gateway: IpAddr,
    /// The device that it is taken to be on, whatever the other routes say; else they decide.
    pub device: Option<u32>,
    /// The node's address that its own packets come from; the kernel's choice if absent.
    pub source: Option<IpAddr>,
}

impl NextHop {
    /// A next hop that the other routes know.
    #[must_use]
    pub const fn via(gateway: IpAddr) -> Self {
        Self {
            gateway,
            device: None,
            source: None,
        }
    }

    fn is(&self, route: &Self) -> bool {
        self.gateway == route.gateway
            && self.source == route.source
            && (self.device.is_none() || self.device == route.device)
    }
}

/// Brings our routes through other nodes to `wanted`: destination to next hop. Routes that are not
/// tagged as ours, and ours to local Pods (they have no next hop), are left alone.
pub fn ensure_routes(
    netlink: &mut Netlink,
    wanted: &BTreeMap<IpNet, NextHop>,
) -> Result<RouteChanges, NetError> {
    let mut requests = Vec::new();
    let existing = gateway_routes(netlink)?;
    for (dst, hop) in wanted {
        let dst = dst.trunc();
        if existing.get(&dst).is_some_and(|there| hop.is(there)) {
            continue;
        }
        // A route to the same destination that is not ours is somebody's decision.
        let if_exists = if existing.contains_key(&dst) {
            IfExists::Replace
        } else {
            IfExists::Fail
        };
        requests.push(Request::create(
            format!("add the route to {dst} via {}", hop.gateway),
            RouteNetlinkMessage::NewRoute(via(dst, hop)),
            if_exists,
        ));
    }
    let mut changes = RouteChanges::default();
    changes.written = run(netlink, requests, &mut changes.errors)?;
    let kept = |dst: &IpNet| wanted.keys().any(|wanted| wanted.trunc() == *dst);
    let stale = existing
        .iter()
        .filter(|(dst, _)| !kept(dst))
        .map(|(dst, hop)| {
            let what = format!("delete the route to {dst} via {}", hop.gateway);
            // By its gateway alone, whatever else it has.
            let hop = NextHop::via(hop.gateway);
            Request::plain(what, RouteNetlinkMessage::DelRoute(via(*dst, &hop)))
        });
    changes.deleted = run(netlink, stale.collect(), &mut changes.errors)?;
    Ok(changes)
}

fn run(
    netlink: &mut Netlink,
    requests: Vec<Request>,
    errors: &mut Vec<NetError>,
) -> Result<usize, NetError> {
    let mut requests = requests.into_iter();
    let mut done = 0;
    loop {
        let batch: Vec<_> = requests.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            return Ok(done);
        }
        for answer in netlink.batch(batch)? {
            match answer {
                Ok(_) => done += 1,
                Err(error) => errors.push(error),
            }
        }
    }
}

fn via(dst: IpNet, hop: &NextHop) -> RouteMessage {
    let mut message = unicast(dst);
    message
        .attributes
        .push(RouteAttribute::Gateway(address_of(hop.gateway)));
    if let Some(index) = hop.device {
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Oif(index));
    }
    if let Some(source) = hop.source {
        message
            .attributes
            .push(RouteAttribute::PrefSource(address_of(source)));
    }
    message
}

/// Our routes that have a next hop.
fn gateway_routes(netlink: &mut Netlink) -> Result<BTreeMap<IpNet, NextHop>, NetError> {
    let routes = list(netlink, RouteProtocol::Other(ROUTE_PROTOCOL))?;
    // Not every kernel filters by itself.
    let ours = routes
        .into_iter()
        .filter(|route| route.protocol == ROUTE_PROTOCOL);
    Ok(ours
        .filter_map(|route| {
            let hop = NextHop {
                gateway: route.gateway?,
                device: route.oif,
                source: route.source,
            };
            Some((route.dst, hop))
        })
        .collect())
}

/// The interface of the default route, of either family: where the world is.
pub fn uplink(netlink: &mut Netlink) -> Result<Option<Link>, NetError> {
    let routes = netlink.routes()?;
    let default = routes
        .iter()
        .filter(|route| route.dst.prefix_len() == 0 && route.unicast);
    let Some(index) = default
        .min_by_key(|route| route.priority)
        .and_then(|route| route.oif)
    else {
        return Ok(None);
    };
    Ok(netlink
        .links()?
        .into_iter()
        .find(|link| link.index == index))
}

impl Netlink {
    /// The main table's routes of both families.
    pub fn routes(&mut self) -> Result<Vec<Route>, NetError> {
        list(self, RouteProtocol::Unspec)
    }
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to.
    pub dst: IpNet,
    /// The next hop, if there is one.
    pub gateway: Option<IpAddr>,
    /// The interface, unless there are several next hops.
    pub oif: Option<u32>,
    /// The node's address that its own packets come from, if the route says so.
    pub source: Option<IpAddr>,
    /// The metric; lower wins.
    pub priority: u32,
    /// Who made it, as the kernel counts (`proto`).
    pub protocol: u8,
    /// Whether packets are sent on, and not dropped or taken in.
    pub unicast: bool,
}

impl Route {
    fn parse(message: &RouteMessage) -> Option<Self> {
        let mut dst = None;
        let any: IpAddr = match message.header.address_family {
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => Ipv4Addr::UNSPECIFIED.into(),
        };
        let mut route = Self {
            dst: any.into(),
            gateway: None,
            oif: None,
            source: None,
            priority: 0,
            protocol: message.header.protocol.into(),
            unicast: message.header.kind == RouteType::Unicast,
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => dst = ip(address),
                RouteAttribute::Gateway(address) => route.gateway = ip(address),
                RouteAttribute::Oif(index) => route.oif = Some(*index),
                RouteAttribute::PrefSource(address) => route.source = ip(address),
                RouteAttribute::Priority(priority) => route.priority = *priority,
                _ => {}
            }
        }
        let length = message.header.destination_prefix_length;
        route.dst = IpNet::new(dst.unwrap_or(any), length).ok()?;
        Some(route)
    }
}

/// The main table's routes of both families; of one protocol, where the kernel can filter.
fn list(netlink: &mut Netlink, protocol: RouteProtocol) -> Result<Vec<Route>, NetError> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut question = RouteMessage::default();
        question.header.address_family = family;
        question.header.table = RouteHeader::RT_TABLE_MAIN;
        question.header.protocol = protocol;
        question.header.scope = RouteScope::Universe;
        let objects = netlink.dump("list routes", &RouteNetlinkMessage::GetRoute(question))?;
        found.extend(objects.into_iter().filter_map(|object| match object {
            RouteNetlinkMessage::NewRoute(message)
                if message.header.table == RouteHeader::RT_TABLE_MAIN =>
            {
                Route::parse(&message)
            }
            _ => None,
        }));
    }
    Ok(found)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}
