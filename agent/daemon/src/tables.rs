//! The tables that `hachi get` prints, as rows of text.

use std::{collections::BTreeMap, net::SocketAddr};

use hachi_abi::{
    CLASS_WORLD, PeerFlags, RULE_NONE, SET_ALLOW_ALL, Scope, ServiceFlags, Verdict, proto,
};
use hachi_api::{ApiError, Attachment, AttachmentId, Reply, Table};
use hachi_compile::{Compiled, Image, SlotsId};
use hachi_kernel::Datapath;

/// Builds a table from what the kernel was last told, or holds.
pub(crate) fn table(
    table: Table,
    datapath: &Datapath,
    image: &Image,
    compiled: &Compiled,
    attachments: &BTreeMap<AttachmentId, Attachment>,
) -> Reply {
    let (columns, rows): (&[&str], Vec<Vec<String>>) = match table {
        Table::Endpoints => (
            &[
                "pod",
                "container",
                "interface",
                "addresses",
                "ingress set",
                "egress set",
            ],
            endpoints(image, attachments),
        ),
        Table::Services => (
            &["frontend", "protocol", "from", "options", "backends"],
            services(image),
        ),
        Table::Policies => (
            &["set", "peer class", "protocol", "ports", "verdict", "rule"],
            policies(image, compiled),
        ),
        Table::Peers => (&["address", "class", "flags"], peers(image)),
        Table::Counters => match datapath.counters() {
            Ok(counters) => (
                &["reason", "verdict", "packets", "bytes"],
                counters
                    .iter()
                    .map(|(reason, counter)| {
                        let verdict = if reason.is_drop() {
                            "dropped"
                        } else {
                            "forwarded"
                        };
                        vec![
                            reason.name().to_owned(),
                            verdict.to_owned(),
                            counter.packets.to_string(),
                            counter.bytes.to_string(),
                        ]
                    })
                    .collect(),
            ),
            Err(error) => return unreadable(&error),
        },
        Table::Conntrack => match conntrack(datapath, compiled) {
            Ok(rows) => (
                &[
                    "protocol",
                    "source",
                    "destination",
                    "rewrite",
                    "flags",
                    "idle",
                    "egress rule",
                    "ingress rule",
                ],
                rows,
            ),
            Err(error) => return unreadable(&error),
        },
    };
    Reply::Table {
        columns: columns.iter().map(ToString::to_string).collect(),
        rows,
    }
}

fn unreadable(error: &hachi_kernel::KernelError) -> Reply {
    Reply::Error {
        error: ApiError {
            code: 5,
            message: format!("the map is not readable: {error}"),
            details: String::new(),
        },
    }
}

fn endpoints(image: &Image, attachments: &BTreeMap<AttachmentId, Attachment>) -> Vec<Vec<String>> {
    attachments
        .values()
        .map(|attachment| {
            let endpoint = attachment
                .addresses
                .iter()
                .find_map(|a| image.endpoints.get(a));
            let set = |id: Option<u32>| match id {
                None => "missing".to_owned(),
                Some(SET_ALLOW_ALL) => "not isolated".to_owned(),
                Some(id) => format!("{id:08x}"),
            };
            let pod = attachment.pod.as_ref();
            let addresses: Vec<_> = attachment
                .addresses
                .iter()
                .map(ToString::to_string)
                .collect();
            vec![
                pod.map_or_else(
                    || "-".into(),
                    |pod| format!("{}/{}", pod.namespace, pod.name),
                ),
                attachment.id.container_id.clone(),
                attachment.host_ifname.clone(),
                addresses.join(","),
                set(endpoint.map(|e| e.ingress_set)),
                set(endpoint.map(|e| e.egress_set)),
            ]
        })
        .collect()
}

fn services(image: &Image) -> Vec<Vec<String>> {
    image
        .services
        .sorted()
        .into_iter()
        // What stands for the ports that a Service does not have.
        .filter(|(frontend, _)| frontend.port != 0)
        .map(|(frontend, service)| {
            let backends = image.backends_of(frontend, service);
            let backends: Vec<_> = backends.iter().map(ToString::to_string).collect();
            let mut options = Vec::new();
            if service.affinity != 0 {
                options.push(format!("affinity {}s", service.affinity));
            }
            if service.flags & ServiceFlags::SOURCE_RANGES != 0 {
                let slots = image.slots.get(&SlotsId::of(frontend, service));
                let ranges = slots.into_iter().flat_map(|slots| &slots.ranges);
                let ranges: Vec<_> = ranges.map(ToString::to_string).collect();
                options.push(format!("from {}", ranges.join(" or ")));
            }
            if service.table != 0 {
                options.push("consistent".into());
            }
            if service.flags & ServiceFlags::DROP_WHEN_EMPTY != 0 {
                options.push("dropped here".into());
            }
            vec![
                SocketAddr::new(frontend.addr, frontend.port).to_string(),
                protocol(frontend.proto),
                if frontend.scope == Scope::EXTERNAL {
                    "outside".into()
                } else {
                    "inside".into()
                },
                options.join(", "),
                if backends.is_empty() {
                    "none".into()
                } else {
                    backends.join(",")
                },
            ]
        })
        .collect()
}

fn policies(image: &Image, compiled: &Compiled) -> Vec<Vec<String>> {
    image
        .policy
        .iter()
        .map(|(key, entry)| {
            let first = u16::from_be_bytes(key.port);
            let last = first | u16::MAX.checked_shr(u32::from(key.plen)).unwrap_or(0);
            let ports = match key.plen {
                0 => "any".to_owned(),
                16 => first.to_string(),
                _ => format!("{first}-{last}"),
            };
            let verdict = match entry.verdict() {
                Verdict::Allow => "allow",
                Verdict::Deny => "deny",
            };
            vec![
                format!("{:08x}", key.set),
                class(key.class),
                if key.proto == 0 {
                    "any".into()
                } else {
                    protocol(key.proto)
                },
                ports,
                verdict.to_owned(),
                rule(compiled, entry.rule),
            ]
        })
        .collect()
}

fn peers(image: &Image) -> Vec<Vec<String>> {
    let row = |address: String, peer: &hachi_abi::Peer| {
        let flags = if peer.flags & PeerFlags::LOCAL_NODE == 0 {
            ""
        } else {
            "local-node"
        };
        vec![address, class(peer.class), flags.to_owned()]
    };
    image
        .peers
        .iter()
        .map(|(address, peer)| row(address.to_string(), peer))
        .chain(
            image
                .cidrs
                .iter()
                .map(|(block, peer)| row(block.to_string(), peer)),
        )
        .collect()
}

fn conntrack(
    datapath: &Datapath,
    compiled: &Compiled,
) -> Result<Vec<Vec<String>>, hachi_kernel::KernelError> {
    let rows = datapath.conntrack()?.into_iter().map(|flow| {
        let mut flags = vec![];
        if flow.reply {
            flags.push("reply");
        }
        if flow.closing {
            flags.push("closing");
        }
        vec![
            protocol(flow.proto),
            flow.source.to_string(),
            flow.destination.to_string(),
            flow.rewrite.map(|to| to.to_string()).unwrap_or_default(),
            flags.join(","),
            format!("{}s", flow.idle.as_secs()),
            rule(compiled, flow.egress_rule),
            rule(compiled, flow.ingress_rule),
        ]
    });
    Ok(rows.collect())
}

fn class(id: u32) -> String {
    if id == CLASS_WORLD {
        "world".into()
    } else {
        format!("{id:08x}")
    }
}

fn rule(compiled: &Compiled, id: u32) -> String {
    match compiled.rules.get(&id) {
        Some(rule) => rule.to_string(),
        None if id == RULE_NONE => "-".into(),
        None => format!("{id:08x} (no longer in force)"),
    }
}

pub(crate) fn protocol(number: u8) -> String {
    match number {
        proto::ICMP => "ICMP".into(),
        proto::TCP => "TCP".into(),
        proto::UDP => "UDP".into(),
        proto::ICMPV6 => "ICMPv6".into(),
        proto::SCTP => "SCTP".into(),
        other => other.to_string(),
    }
}
