//! `runtimeConfig` (what the runtime grants of our `capabilities`) and `args`.

use std::net::IpAddr;

use hachi_api::{PortMapping, PortProtocol};
use hachi_net::{Mac, RangeSet};
use serde_json::{Map, Value, json};

use super::{AgentMode, ipam::range_sets};
use crate::{error::Error, fields::Fields};

/// What is asked for this one attachment.
#[derive(Debug, Default)]
pub(crate) struct Runtime {
    /// Addresses to use.
    pub(crate) ips: Vec<IpAddr>,
    /// The MAC address to use.
    pub(crate) mac: Option<Mac>,
    /// Ports of the node that are to lead to the Pod.
    pub(crate) ports: Vec<PortMapping>,
    /// Ranges beside those of the configuration.
    pub(super) ranges: Vec<RangeSet>,
    /// In place of the configuration's `dns`.
    pub(super) dns: Option<Value>,
}

impl Runtime {
    pub(super) fn parse(fields: &mut Fields, agent: AgentMode) -> Result<Self, Error> {
        let mut runtime = Self::default();
        if let Some(args) = fields.raw("args") {
            // Plugins ignore what they do not understand of it.
            if let Some(cni) = args.get("cni").cloned() {
                let mut cni = Fields::new("args.cni", cni)?;
                runtime.ips = addresses(&mut cni)?;
                runtime.mac = mac(&mut cni)?;
            }
        }
        let Some(granted) = fields.raw("runtimeConfig") else {
            return Ok(runtime);
        };
        let mut fields = Fields::new("runtimeConfig", spelled(granted))?;
        let ips = addresses(&mut fields)?;
        if !ips.is_empty() {
            runtime.ips = ips;
        }
        runtime.mac = mac(&mut fields)?.or(runtime.mac);
        runtime.ranges = range_sets(&mut fields, "ipRanges")?;
        runtime.dns = dns(&mut fields)?;
        runtime.ports = port_mappings(&mut fields, agent)?;
        bandwidth(&mut fields)?;
        fields.finish()?;
        Ok(runtime)
    }
}

/// The names of what runtimes grant, as the CNI conventions spell them.
const NAMES: [&str; 21] = [
    "bandwidth",
    "containerPort",
    "dns",
    "egressBurst",
    "egressRate",
    "gateway",
    "hostIP",
    "hostPort",
    "ingressBurst",
    "ingressRate",
    "ipRanges",
    "ips",
    "mac",
    "options",
    "portMappings",
    "protocol",
    "rangeEnd",
    "rangeStart",
    "searches",
    "servers",
    "subnet",
];

/// The same with names as the conventions spell them. containerd writes them as its own fields are named
/// (`HostPort`), and plugins that are written in Go read them whatever their case. A text that is empty is
/// as good as absent.
fn spelled(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let name = |key: String| {
                let known = NAMES.iter().find(|name| name.eq_ignore_ascii_case(&key));
                known.map_or(key, |name| (*name).to_owned())
            };
            let fields = map.into_iter().filter(|(_, it)| it != "");
            Value::Object(fields.map(|(key, it)| (name(key), spelled(it))).collect())
        }
        Value::Array(elements) => elements.into_iter().map(spelled).collect(),
        other => other,
    }
}

fn addresses(fields: &mut Fields) -> Result<Vec<IpAddr>, Error> {
    let mut found = Vec::new();
    for (path, value) in fields.list("ips")? {
        // With or without a prefix length, which is ours to choose.
        let text = value
            .as_str()
            .unwrap_or_default()
            .split('/')
            .next()
            .unwrap_or_default();
        let address: IpAddr = text
            .parse()
            .map_err(|_| Error::field(&path, format_args!("{value} is no address")))?;
        found.push(address);
    }
    Ok(found)
}

fn mac(fields: &mut Fields) -> Result<Option<Mac>, Error> {
    let Some(text) = fields.take::<String>("mac")? else {
        return Ok(None);
    };
    if text.is_empty() {
        return Ok(None);
    }
    let name = fields.name("mac");
    let mac: Mac = text.parse().map_err(|error| Error::field(&name, error))?;
    if mac.is_usable() {
        Ok(Some(mac))
    } else {
        Err(Error::field(
            &name,
            "not an address that an interface may have",
        ))
    }
}

/// The capability's names for what a result calls otherwise.
fn dns(fields: &mut Fields) -> Result<Option<Value>, Error> {
    let Some(mut fields) = fields.object("dns")? else {
        return Ok(None);
    };
    let mut dns = Map::new();
    for (key, name) in [
        ("servers", "nameservers"),
        ("searches", "search"),
        ("options", "options"),
    ] {
        if let Some(list) = fields.take::<Vec<String>>(key)? {
            dns.insert(name.to_owned(), json!(list));
        }
    }
    fields.finish()?;
    Ok(Some(Value::Object(dns)))
}

fn port_mappings(fields: &mut Fields, agent: AgentMode) -> Result<Vec<PortMapping>, Error> {
    let mut found: Vec<PortMapping> = Vec::new();
    for (index, mut fields) in fields.objects("portMappings")?.into_iter().enumerate() {
        let mapping = port_mapping(&mut fields)?;
        fields.finish()?;
        let Some(mapping) = mapping else {
            continue;
        };
        if found.iter().any(|other| other.overlaps(&mapping)) {
            let field = format!("runtimeConfig.portMappings[{index}]");
            return Err(Error::field(
                &field,
                format_args!("the host port {mapping} is asked for twice"),
            ));
        }
        found.push(mapping);
    }
    if agent == AgentMode::Optional && !found.is_empty() {
        let why = "without the agent nobody maps ports; chain the portmap plugin behind hachi-cni";
        return Err(Error::field("runtimeConfig.portMappings", why));
    }
    Ok(found)
}

/// One mapping; none if it asks for no port of the node.
fn port_mapping(fields: &mut Fields) -> Result<Option<PortMapping>, Error> {
    let host_port: u16 = fields.take("hostPort")?.unwrap_or(0);
    let container_port: u16 = fields.take("containerPort")?.unwrap_or(0);
    let protocol = match fields.take::<String>("protocol")? {
        None => PortProtocol::Tcp,
        Some(text) => match text.to_ascii_lowercase().as_str() {
            "" | "tcp" => PortProtocol::Tcp,
            "udp" => PortProtocol::Udp,
            "sctp" => PortProtocol::Sctp,
            _ => {
                let why = format!("{text:?} is none of tcp, udp and sctp");
                return Err(Error::field(&fields.name("protocol"), why));
            }
        },
    };
    let host_ip = match fields.take::<String>("hostIP")?.filter(|ip| !ip.is_empty()) {
        None => None,
        Some(text) => Some(text.parse::<IpAddr>().map_err(|_| {
            Error::field(
                &fields.name("hostIP"),
                format_args!("{text:?} is no address"),
            )
        })?),
    };
    if host_port == 0 {
        return Ok(None);
    }
    if container_port == 0 {
        return Err(Error::field(&fields.name("containerPort"), "missing"));
    }
    if host_ip.is_some_and(|ip| ip.is_loopback()) {
        let why = "the node's loopback address cannot be mapped; leave it out";
        return Err(Error::field(&fields.name("hostIP"), why));
    }
    Ok(Some(PortMapping {
        host_ip,
        host_port,
        container_port,
        protocol,
    }))
}

fn bandwidth(fields: &mut Fields) -> Result<(), Error> {
    let Some(mut fields) = fields.object("bandwidth")? else {
        return Ok(());
    };
    for key in ["ingressRate", "ingressBurst", "egressRate", "egressBurst"] {
        if fields.take::<u64>(key)?.is_some_and(|value| value != 0) {
            let why = "traffic is shaped by the bandwidth plugin; chain it behind hachi-cni and \
                       give the capability to it";
            return Err(Error::field(&fields.name(key), why));
        }
    }
    fields.finish()
}
