//! Where Pods go under their own addresses: to whatever knows them.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
};

use hachi_index::Desired;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Never masqueraded, whatever the cluster: link-local addresses and groups (RFC 3927, RFC 5771,
/// RFC 4291).
const ALWAYS: [IpNet; 4] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4)),
    IpNet::V6(Ipv6Net::new_assert(
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0),
        10,
    )),
    IpNet::V6(Ipv6Net::new_assert(
        Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0),
        8,
    )),
];

/// The blocks of every node's Pods, the nodes' own addresses, and the addresses of a link.
pub(crate) fn non_masquerade(desired: &Desired) -> BTreeSet<IpNet> {
    let nodes = desired.nodes.values();
    let pods = nodes
        .clone()
        .flat_map(|node| node.pod_cidrs.iter().copied());
    let addresses = nodes.flat_map(|node| node.internal_ips.iter().copied());
    let own = desired.local_addresses.iter().copied();
    ALWAYS
        .into_iter()
        .chain(pods)
        .chain(addresses.chain(own).map(IpNet::from))
        .map(|net| net.trunc())
        .collect()
}
