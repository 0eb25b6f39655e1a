//! Between the types of neighbouring crates: options to load options, attachments to endpoints.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use hachi_abi::{ConfigFlags, map};
use hachi_api::{
    ApiError, Attachment, AttachmentId, MapUse, MissingFeature, PodRef, PortMapping, PortProtocol,
};
use hachi_compile::{Image, Limits};
use hachi_index::Desired;
use hachi_kernel::{AttachMode, Capacities, Datapath, Features, Finding, LoadOptions, SocketLb};
use hachi_net::local_ports;
use hachi_policy::Protocol;
use ipnet::IpNet;

use crate::{
    node::Node,
    options::{self, Attach, DatapathLog, Options},
    timeouts::Timeouts,
};

/// `net.ipv4.ip_local_port_range` of a kernel that nobody has told otherwise.
const DEFAULT_PORTS: (u16, u16) = (32_768, 60_999);

/// What the datapath is loaded with.
pub(crate) fn load_options(options: &Options) -> LoadOptions {
    LoadOptions {
        pin_root: options.bpf_root.clone(),
        attach: match options.attach {
            Attach::Auto => AttachMode::Auto,
            Attach::Tcx => AttachMode::Tcx,
            Attach::Clsact => AttachMode::Clsact,
        },
        log_level: options.datapath_log.map(|level| match level {
            DatapathLog::Error => tracing::Level::ERROR,
            DatapathLog::Info => tracing::Level::INFO,
            DatapathLog::Debug => tracing::Level::DEBUG,
            DatapathLog::Trace => tracing::Level::TRACE,
        }),
        capacities: Capacities {
            policy: options.policy_entries,
            peers: options.peer_entries,
            cidrs: options.cidr_entries,
            ..Capacities::default()
        },
        sockets: match options.socket_lb {
            options::SocketLb::Auto | options::SocketLb::Off => SocketLb::All,
            options::SocketLb::Node => SocketLb::Node,
        },
    }
}

/// How long flows are tracked.
pub(crate) fn timeouts(options: &Options) -> Timeouts {
    Timeouts {
        tcp: options.conntrack_tcp,
        tcp_opening: options.conntrack_tcp_opening,
        tcp_closing: options.conntrack_tcp_closing,
        udp: options.conntrack_udp,
        sctp: options.conntrack_sctp,
        icmp: options.conntrack_icmp,
        other: options.conntrack_other,
    }
}

/// What an image may hold: half of what each map can, so that what replaces it fits beside it. Maps
/// that were pinned before keep their size, so the maps are asked, not the options.
pub(crate) fn limits(datapath: &Datapath) -> Limits {
    let half = |name| datapath.capacity(name).unwrap_or_default() as usize / 2;
    Limits {
        policy: half(map::POLICY),
        peers: half(map::PEERS[0]),
        cidrs: half(map::CIDRS[0]),
    }
}

/// [`ConfigFlags`] of the options.
pub(crate) fn flags(options: &Options) -> u32 {
    [
        (!options.no_redirect_peer, ConfigFlags::REDIRECT_PEER),
        (!options.no_redirect_neigh, ConfigFlags::REDIRECT_NEIGH),
        (!options.no_masquerade, ConfigFlags::MASQUERADE),
    ]
    .into_iter()
    .filter(|(on, _)| *on)
    .fold(0, |flags, (_, flag)| flags | flag)
}

/// How the node forwards and what it translates: what an image has besides the cluster's wishes.
pub(crate) fn network(options: &Options, node: &Node, desired: &Desired, image: &mut Image) {
    image.flags = flags(options);
    let uplinks = node.uplinks().values();
    image.uplinks = uplinks
        .map(|link| (link.index, uplink(link.v4, link.v6)))
        .collect();
    image.tunnel = node.tunnel(options);
    image.host = node.host();
    image.tunnels = node.plan().tunnels.clone();
    if image.tunnel.ifindex != 0 {
        let own = desired.own_node().map(|node| node.internal_ips.as_slice());
        let own = || own.unwrap_or_default().iter().copied();
        let v4 = own().find_map(|address| match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        });
        let v6 = own().find_map(|address| match address {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        });
        image.uplinks.insert(image.tunnel.ifindex, uplink(v4, v6));
    }
    let configured = options.non_masquerade_cidr.iter().map(IpNet::trunc);
    image.non_masquerade.extend(configured);
    image.ports = ports();
}

/// The ports that translated flows are given: those that the kernel gives the node's own.
pub(crate) fn ports() -> (u16, u16) {
    local_ports().unwrap_or_else(|error| {
        tracing::warn!(%error, "the kernel's default range of ports is used");
        DEFAULT_PORTS
    })
}

/// The node's addresses on a device.
fn uplink(v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>) -> hachi_abi::Uplink {
    hachi_abi::Uplink {
        v4: v4.map(|address| address.octets()).unwrap_or_default(),
        v6: v6.map(|address| address.octets()).unwrap_or_default(),
        flags: 0,
    }
}

/// The index's name of an attachment.
pub(crate) fn key(id: &AttachmentId) -> hachi_index::EndpointKey {
    hachi_index::EndpointKey {
        container_id: id.container_id.clone(),
        ifname: id.ifname.clone(),
    }
}

/// The index's view of an attachment; an unreadable MAC address is the caller's error.
pub(crate) fn endpoint(attachment: &Attachment) -> Result<hachi_index::Endpoint, ApiError> {
    Ok(hachi_index::Endpoint {
        key: key(&attachment.id),
        pod: attachment.pod.as_ref().map(pod_name),
        ifindex: attachment.host_ifindex,
        mac: mac(&attachment.mac)?,
        host_mac: mac(&attachment.host_mac)?,
        addresses: attachment.addresses.clone(),
        host_ports: attachment.port_mappings.iter().map(host_port).collect(),
    })
}

fn host_port(mapping: &PortMapping) -> hachi_index::HostPort {
    hachi_index::HostPort {
        address: mapping.host_ip,
        protocol: match mapping.protocol {
            PortProtocol::Tcp => Protocol::Tcp,
            PortProtocol::Udp => Protocol::Udp,
            PortProtocol::Sctp => Protocol::Sctp,
        },
        port: mapping.host_port,
        target: mapping.container_port,
    }
}

/// The index's name of a Pod.
pub(crate) fn pod_name(pod: &PodRef) -> hachi_index::PodName {
    hachi_index::PodName {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
    }
}

/// Who has a port of the node that a new attachment asks for. An earlier attachment of the same
/// Pod gives way: its sandbox was replaced.
pub(crate) fn port_conflict<'a>(
    attachments: &'a BTreeMap<AttachmentId, Attachment>,
    new: &'a Attachment,
) -> Option<ApiError> {
    for mapping in &new.port_mappings {
        let holder = attachments.values().find(|held| {
            held.id != new.id
                && (held.pod.is_none() || held.pod != new.pod)
                && held
                    .port_mappings
                    .iter()
                    .any(|other| other.overlaps(mapping))
        });
        if let Some(holder) = holder {
            let who = match &holder.pod {
                Some(pod) => format!("Pod {}/{}", pod.namespace, pod.name),
                None => format!("container {}", holder.id.container_id),
            };
            return Some(ApiError {
                code: 7,
                message: format!("the host port {mapping} is in use by {who}"),
                details: "give one of the two another hostPort, or delete the one that has it"
                    .into(),
            });
        }
    }
    None
}

/// `aa:bb:cc:dd:ee:ff` as bytes.
fn mac(text: &str) -> Result<[u8; 6], ApiError> {
    let bad = || ApiError {
        code: 7,
        message: format!("{text:?} is no MAC address"),
        details: "six bytes in hexadecimal with colons between".into(),
    };
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts
            .next()
            .filter(|part| part.len() == 2)
            .ok_or_else(bad)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
    }
    if parts.next().is_some() {
        return Err(bad());
    }
    Ok(bytes)
}

/// How full every map is; empty if the maps are not readable.
pub(crate) fn map_use(datapath: &Datapath) -> BTreeMap<String, MapUse> {
    match datapath.map_use() {
        Ok(maps) => maps
            .into_iter()
            .map(|(name, (entries, capacity))| (name, MapUse { entries, capacity }))
            .collect(),
        Err(error) => {
            tracing::warn!(%error, "the maps are not readable");
            BTreeMap::new()
        }
    }
}

/// What this kernel lacks and what follows, for the status.
pub(crate) fn missing(features: &Features) -> Vec<MissingFeature> {
    features
        .missing()
        .map(|(feature, finding, without)| MissingFeature {
            name: feature.name().into(),
            feature: feature.to_string(),
            why: match finding {
                Finding::Present => String::new(),
                Finding::Absent(why) => why.clone(),
                Finding::Unknown(why) => format!("not known: {why}"),
            },
            without: without.into(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_six_hex_bytes() {
        assert_eq!(mac("02:00:5e:10:00:ff"), Ok([2, 0, 0x5e, 0x10, 0, 0xff]));
        for bad in [
            "",
            "02:00:5e:10:00",
            "02:00:5e:10:00:ff:00",
            "2:0:5e:10:0:ff",
            "zz:00:00:00:00:00",
        ] {
            assert!(mac(bad).is_err(), "{bad:?} was taken");
        }
    }
}
