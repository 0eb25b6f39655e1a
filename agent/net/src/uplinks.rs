//! The devices by which the node talks to other nodes and the world.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::{HOST_IFNAME, NetError, Netlink, ROUTE_PROTOCOL, Route, SERVICES_IFNAME, VXLAN_IFNAME};

/// Devices that are never uplinks, whatever a pattern says.
const OWN: [&str; 4] = ["lo", VXLAN_IFNAME, HOST_IFNAME, SERVICES_IFNAME];

/// A device that leads out of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Whether nothing leaves by it just now: it is down, or no route leads out.
    pub idle: bool,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// The node's address on it, as its packets' source.
    pub v4: Option<Ipv4Addr>,
    /// The node's address on it, as its packets' source; of global scope.
    pub v6: Option<Ipv6Addr>,
}

impl Netlink {
    /// The uplinks, by index: the devices whose names a pattern matches (`*` stands for any
    /// characters), or, with no pattern, those of default routes and of routes to `nodes`. Only
    /// Ethernet devices that are up, and no veth pair's end that a Pod is behind (`pods`).
    ///
    /// Those of `before` that are still there stay, idle and with the addresses that they had: what
    /// leaves first when they are in use again meets programs.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn uplinks(
        &mut self,
        patterns: &[String],
        nodes: &BTreeSet<IpAddr>,
        pods: &BTreeSet<u32>,
        before: &BTreeMap<u32, Uplink>,
    ) -> Result<BTreeMap<u32, Uplink>, NetError> {
        let routes = network_routes(self)?;
        let addresses = self.addresses()?;
        let mut found = BTreeMap::new();
        for link in self.links()? {
            let apart = OWN.contains(&link.name.as_str());
            if link.mac.is_none() || apart || pods.contains(&link.index) {
                continue;
            }
            let leads = link.up
                && if patterns.is_empty() {
                    leads_out(link.index, &routes, nodes)
                } else {
                    patterns.iter().any(|pattern| matches(pattern, &link.name))
                };
            let known = before
                .get(&link.index)
                .filter(|known| known.name == link.name);
            if !leads && known.is_none() {
                continue;
            }
            let own = || {
                let here = addresses.iter().filter(|(index, _)| *index == link.index);
                here.map(|(_, address)| *address)
            };
            let v4 = own().find_map(|address| match address {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_) => None,
            });
            let v6 = own().find_map(|address| match address {
                IpAddr::V6(address) if !address.is_unicast_link_local() => Some(address),
                IpAddr::V6(_) | IpAddr::V4(_) => None,
            });
            let idle = known.filter(|_| !leads);
            let uplink = Uplink {
                v4: v4.or_else(|| idle?.v4),
                v6: v6.or_else(|| idle?.v6),
                name: link.name,
                index: link.index,
                idle: !leads,
                mtu: link.mtu,
            };
            found.insert(uplink.index, uplink);
        }
        Ok(found)
    }
}

impl Netlink {
    /// Which of these addresses are on a link of this node, with no router between.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn on_link(&mut self, nodes: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, NetError> {
        let routes = network_routes(self)?;
        let near = |node: &&IpAddr| best(&routes, node).is_some_and(|r| r.gateway.is_none());
        Ok(nodes.iter().filter(near).copied().collect())
    }
}

/// The routes that are not ours, which lead to Pods: what is left is few, whatever the cluster.
fn network_routes(netlink: &mut Netlink) -> Result<Vec<Route>, NetError> {
    let mut routes = netlink.routes()?;
    routes.retain(|route| route.unicast && route.protocol != ROUTE_PROTOCOL);
    Ok(routes)
}

/// The route that an address is reached by.
fn best<'a>(routes: &'a [Route], to: &IpAddr) -> Option<&'a Route> {
    routes
        .iter()
        .filter(|route| route.unicast && route.dst.contains(to))
        .max_by_key(|route| (route.dst.prefix_len(), std::cmp::Reverse(route.priority)))
}

/// Whether a default route, or the route to another node, goes out by the device.
fn leads_out(index: u32, routes: &[Route], nodes: &BTreeSet<IpAddr>) -> bool {
    let unicast = || routes.iter().filter(|route| route.unicast);
    let by_default = unicast().any(|route| route.dst.prefix_len() == 0 && route.oif == Some(index));
    by_default
        || nodes
            .iter()
            .any(|node| best(routes, node).is_some_and(|route| route.oif == Some(index)))
}

/// Whether a name is what a pattern says; `*` stands for any characters, also none.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            (0..=name.len())
                .filter(|at| name.is_char_boundary(*at))
                .any(|at| matches(rest, &name[at..]))
        }),
    }
}

/// The ports that the kernel gives to connections of this node (`net.ipv4.ip_local_port_range`,
/// which is of both families).
///
/// # Errors
/// If the sysctl cannot be read or makes no sense.
pub fn local_ports() -> io::Result<(u16, u16)> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    parse_ports(&text).ok_or_else(|| {
        let what = format!("{:?} is no range of ports", text.trim());
        io::Error::new(io::ErrorKind::InvalidData, what)
    })
}

fn parse_ports(text: &str) -> Option<(u16, u16)> {
    let mut numbers = text.split_whitespace().map(str::parse);
    let (low, high) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    (0 < low && low <= high && numbers.next().is_none()).then_some((low, high))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth*", "eth0.100", true),
            ("e*0", "eth0", true),
            ("e*0", "eth01", false),
            ("*", "bond0", true),
            ("bond*.*", "bond0.7", true),
            ("bond*.*", "bond0", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn a_range_of_ports_is_two_numbers_in_order() {
        assert_eq!(parse_ports("32768\t60999\n"), Some((32_768, 60_999)));
        for bad in ["", "1", "0 5", "5 4", "1 2 3", "1 70000"] {
            assert_eq!(parse_ports(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_best_route_to_a_node_decides() {
        let route = |dst: &str, oif, priority| Route {
            dst: dst.parse().expect("a block"),
            gateway: None,
            oif: Some(oif),
            source: None,
            priority,
            protocol: 0,
            unicast: true,
        };
        let routes = [
            route("0.0.0.0/0", 1, 100),
            route("10.0.0.0/8", 2, 0),
            route("10.1.0.0/16", 3, 10),
            route("10.1.0.0/16", 4, 0),
        ];
        let nodes = BTreeSet::from(["10.1.2.3".parse().expect("an address")]);
        let found: Vec<_> = (1..5).filter(|i| leads_out(*i, &routes, &nodes)).collect();
        assert_eq!(found, [1, 4]);
    }
}
