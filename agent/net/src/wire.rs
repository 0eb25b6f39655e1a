//! A Pod's interface: a veth pair made in one request, with its final names, in both namespaces.
//!
//! ```text
//! Pod:  eth0  10.244.1.5/32, fd00::5/128          host:  hachi0123456789
//!       default via 169.254.1.1 onlink                    10.244.1.5/32 scope link
//!       default via fe80::1 onlink                        fd00::5/128
//!       neighbours 169.254.1.1, fe80::1                   neighbours 10.244.1.5, fd00::5
//!         permanent: the host side's MAC                    permanent: the Pod's MAC
//! ```
//! No address is ever resolved by ARP or neighbour discovery, nobody owns the gateway addresses,
//! and duplicate address detection has nothing to detect.
//!
//! [`wire`] leaves the host side down: whatever is done inside the Pod, the kernel drops packets of
//! either direction at a veth whose other side is down. [`connect`] opens it, once programs that
//! judge its packets are attached.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd as _,
};

use ipnet::IpNet;
use nix::errno::Errno;
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{
        AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoKind,
        InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol,
        RouteScope, RouteType,
    },
};

use crate::{
    Link, Mac, NetError, NetNs, Netlink, ROUTE_PROTOCOL,
    link::{find_link, get_link},
    netlink::{IfExists, Request},
    sysctl,
};

/// The gateway of every Pod's IPv4 routes; no interface has it.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The gateway of every Pod's IPv6 routes; no interface has it.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The gateway of a Pod's routes to addresses of the same family.
#[must_use]
pub fn gateway_of(address: IpAddr) -> IpAddr {
    if address.is_ipv4() {
        GATEWAY_V4.into()
    } else {
        GATEWAY_V6.into()
    }
}

/// A route in the Pod, through the gateway of its family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRoute {
    /// Where to.
    pub dst: IpNet,
    /// MTU of the path, bytes.
    pub mtu: Option<u32>,
    /// Maximum segment size to advertise, bytes.
    pub advmss: Option<u32>,
    /// Metric; lower wins.
    pub priority: Option<u32>,
    /// Routing table; the main one if absent.
    pub table: Option<u32>,
}

impl PodRoute {
    /// A route with nothing special about it.
    #[must_use]
    pub fn to(dst: IpNet) -> Self {
        Self {
            dst,
            mtu: None,
            advmss: None,
            priority: None,
            table: None,
        }
    }
}

/// What to make.
#[derive(Clone, Debug)]
pub struct Wiring<'a> {
    /// Name of the host side.
    pub host_ifname: &'a str,
    /// MAC address of the host side.
    pub host_mac: Mac,
    /// Name of the Pod's interface.
    pub pod_ifname: &'a str,
    /// MAC address of the Pod's interface.
    pub pod_mac: Mac,
    /// MTU of both sides; the kernel's choice if absent.
    pub mtu: Option<u32>,
    /// The Pod's addresses.
    pub addresses: &'a [IpAddr],
    /// Routes in the Pod.
    pub routes: &'a [PodRoute],
}

/// What was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wired {
    /// Index of the host side.
    pub host_ifindex: u32,
    /// Index of the Pod's interface, in the Pod's namespace.
    pub pod_ifindex: u32,
    /// MTU of both sides, bytes.
    pub mtu: u32,
}

/// Makes the interface, its host side down. `host` and `pod` are sockets in the namespaces of that
/// name. After an error nothing of it is left.
pub fn wire(
    host: &mut Netlink,
    pod: &mut Netlink,
    namespace: &NetNs,
    wiring: &Wiring<'_>,
) -> Result<Wired, NetError> {
    let link = create(host, pod, namespace, wiring)?;
    let pod_ifindex = link.peer.unwrap_or_default();
    let configure = |host: &mut Netlink, pod: &mut Netlink| {
        configure_host(host, link.index, wiring)?;
        configure_pod(pod, namespace, pod_ifindex, wiring)
    };
    match configure(host, pod) {
        Ok(()) => Ok(Wired {
            host_ifindex: link.index,
            pod_ifindex,
            mtu: link.mtu,
        }),
        Err(error) => {
            // The first error says more than a second one could.
            let _ = host.delete_link(wiring.host_ifname);
            Err(error)
        }
    }
}

/// A host side, and the Pod behind it.
#[derive(Clone, Copy, Debug)]
pub struct HostLink<'a> {
    /// Index of the host side.
    pub index: u32,
    /// Name of the host side.
    pub name: &'a str,
    /// MAC address of the Pod's interface.
    pub pod_mac: Mac,
    /// The Pod's addresses.
    pub addresses: &'a [IpAddr],
}

/// Brings the host side of what [`wire`] made up, and leads the Pod's addresses to it.
pub fn connect(host: &mut Netlink, link: &HostLink<'_>) -> Result<(), NetError> {
    let mut requests = vec![set_link(link.index, true, Vec::new(), link.name)];
    // The kernel takes no route over an interface that is down, and keeps no neighbour of one.
    for address in link.addresses {
        requests.push(neighbour(link.index, *address, link.pod_mac));
        requests.push(host_route(link.index, *address));
    }
    host.all(requests)
}

impl Netlink {
    /// Sets an interface down: nothing passes it in either direction, and its routes and neighbours
    /// are gone.
    pub fn set_down(&mut self, index: u32, name: &str) -> Result<(), NetError> {
        self.all(vec![set_link(index, false, Vec::new(), name)])
    }
}

fn create(
    host: &mut Netlink,
    pod: &mut Netlink,
    namespace: &NetNs,
    wiring: &Wiring<'_>,
) -> Result<Link, NetError> {
    let attempt = |host: &mut Netlink| {
        let mut answers = host.batch(vec![
            Request::create(
                format!("create the interface {}", wiring.pod_ifname),
                RouteNetlinkMessage::NewLink(veth(namespace, wiring)),
                IfExists::Fail,
            ),
            get_link(wiring.host_ifname),
        ])?;
        let found = answers.pop().unwrap_or_else(|| Ok(Vec::new()));
        answers
            .into_iter()
            .try_for_each(|answer| answer.map(drop))?;
        find_link(&found?).ok_or_else(|| NetError::Garbled("no link in the answer".into()))
    };
    match attempt(host) {
        Err(error) if error.is(Errno::EEXIST) => {}
        outcome => return outcome,
    }
    if pod.link(wiring.pod_ifname)?.is_some() {
        return Err(NetError::Exists(wiring.pod_ifname.to_owned()));
    }
    // The host side's name belongs to this attachment alone: what has it is left over from an
    // attempt that was killed, or is still on its way out.
    host.delete_link(wiring.host_ifname)?;
    attempt(host)
}

fn veth(namespace: &NetNs, wiring: &Wiring<'_>) -> LinkMessage {
    // Neither side can be created up: while one is made it has no other (veth_open: ENOTCONN).
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(wiring.pod_ifname.to_owned()),
        LinkAttribute::Address(wiring.pod_mac.0.to_vec()),
        LinkAttribute::NetNsFd(namespace.file().as_raw_fd()),
    ];
    peer.attributes.extend(wiring.mtu.map(LinkAttribute::Mtu));

    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(wiring.host_ifname.to_owned()),
        LinkAttribute::Address(wiring.host_mac.0.to_vec()),
    ];
    link.attributes.extend(wiring.mtu.map(LinkAttribute::Mtu));
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    link
}

fn configure_host(host: &mut Netlink, index: u32, wiring: &Wiring<'_>) -> Result<(), NetError> {
    let ipv6 = sysctl::has_ipv6();
    if ipv6 {
        if wiring.addresses.iter().any(IpAddr::is_ipv6) {
            sysctl::enable_ipv6(wiring.host_ifname)?;
        }
        sysctl::refuse_router_advertisements(wiring.host_ifname)?;
    }
    host.all(vec![set_link(
        index,
        false,
        host_settings(ipv6),
        wiring.host_ifname,
    )])
}

fn configure_pod(
    pod: &mut Netlink,
    namespace: &NetNs,
    index: u32,
    wiring: &Wiring<'_>,
) -> Result<(), NetError> {
    let requests = || {
        let mut requests = vec![set_link(index, true, Vec::new(), wiring.pod_ifname)];
        for address in wiring.addresses {
            requests.push(pod_address(index, *address));
            requests.push(neighbour(index, gateway_of(*address), wiring.host_mac));
        }
        requests.extend(wiring.routes.iter().map(|route| pod_route(index, route)));
        requests
    };
    match pod.all(requests()) {
        Err(error) if error.is(Errno::EACCES) || error.is(Errno::EPERM) => {
            // IPv6 is disabled in the namespace, as some runtimes have it.
            namespace.run(|| sysctl::enable_ipv6(wiring.pod_ifname))??;
            pod.all(requests())
        }
        outcome => outcome,
    }
}

fn set_link(index: u32, up: bool, settings: Vec<AfSpecUnspec>, name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask = LinkFlags::Up;
    if up {
        message.header.flags = LinkFlags::Up;
    }
    if !settings.is_empty() {
        message
            .attributes
            .push(LinkAttribute::AfSpecUnspec(settings));
    }
    let what = if up { "bring up" } else { "set down" };
    Request::plain(
        format!("{what} {name}"),
        RouteNetlinkMessage::SetLink(message),
    )
}

fn host_settings(ipv6: bool) -> Vec<AfSpecUnspec> {
    // What the interface's `forwarding` inherits may have been set to 0.
    let mut forwarding = InetDevConf::default();
    forwarding.forwarding = 1;
    let mut settings = vec![AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(
        forwarding,
    )])];
    if ipv6 {
        // No link-local address: the host has nothing to say on this link by itself.
        settings.push(AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
            In6AddrGenMode::None,
        )]));
    }
    settings
}

fn neighbour(index: u32, address: IpAddr, mac: Mac) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(match address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        }),
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
    ];
    Request::create(
        format!("add the neighbour {address}"),
        RouteNetlinkMessage::NewNeighbour(message),
        IfExists::Replace,
    )
}

fn pod_address(index: u32, address: IpAddr) -> Request {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = if address.is_ipv4() { 32 } else { 128 };
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
    ];
    if address.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    Request::create(
        format!("add the address {address}"),
        RouteNetlinkMessage::NewAddress(message),
        IfExists::Replace,
    )
}

fn host_route(index: u32, address: IpAddr) -> Request {
    let mut message = unicast(IpNet::from(address));
    if address.is_ipv4() {
        message.header.scope = RouteScope::Link;
    }
    message.attributes.push(RouteAttribute::Oif(index));
    // The address is ours to give: a route left by an earlier owner gives way.
    Request::create(
        format!("add the route to {address}"),
        RouteNetlinkMessage::NewRoute(message),
        IfExists::Replace,
    )
}

fn pod_route(index: u32, route: &PodRoute) -> Request {
    let PodRoute {
        dst,
        mtu,
        advmss,
        priority,
        table,
    } = route;
    let mut message = unicast(*dst);
    message.header.protocol = RouteProtocol::Boot;
    message.header.flags = RouteFlags::Onlink;
    message
        .attributes
        .push(RouteAttribute::Gateway(address_of(gateway_of(dst.addr()))));
    message.attributes.push(RouteAttribute::Oif(index));
    message
        .attributes
        .extend(priority.map(RouteAttribute::Priority));
    if let Some(table) = *table {
        message.header.table = u8::try_from(table).unwrap_or(0);
        message.attributes.push(RouteAttribute::Table(table));
    }
    let metrics: Vec<_> = mtu
        .map(RouteMetric::Mtu)
        .into_iter()
        .chain(advmss.map(RouteMetric::Advmss))
        .collect();
    if !metrics.is_empty() {
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    Request::create(
        format!("add the route to {dst}"),
        RouteNetlinkMessage::NewRoute(message),
        IfExists::Replace,
    )
}

/// A unicast route of ours in the main table.
pub(crate) fn unicast(dst: IpNet) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(dst.addr());
    message.header.destination_prefix_length = dst.prefix_len();
    message.header.table = rtnetlink::packet_route::route::RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    if dst.prefix_len() > 0 {
        message
            .attributes
            .push(RouteAttribute::Destination(address_of(dst.addr())));
    }
    message
}

pub(crate) fn address_of(address: IpAddr) -> RouteAddress {
    address.into()
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}
