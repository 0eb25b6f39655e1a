//! `runtimeConfig` (what the runtime grants of our `capabilities`) and `args`.

use std::net::IpAddr;

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
        let Some(mut fields) = fields.object("runtimeConfig")? else {
            return Ok(runtime);
        };
        let ips = addresses(&mut fields)?;
        if !ips.is_empty() {
            runtime.ips = ips;
        }
        runtime.mac = mac(&mut fields)?.or(runtime.mac);
        runtime.ranges = range_sets(&mut fields, "ipRanges")?;
        runtime.dns = dns(&mut fields)?;
        port_mappings(&mut fields, agent)?;
        bandwidth(&mut fields)?;
        fields.finish()?;
        Ok(runtime)
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

fn port_mappings(fields: &mut Fields, agent: AgentMode) -> Result<(), Error> {
    let mappings = fields.objects("portMappings")?;
    if agent == AgentMode::Optional && !mappings.is_empty() {
        let why = "without the agent nobody maps ports; chain the portmap plugin behind hachi-cni";
        return Err(Error::field("runtimeConfig.portMappings", why));
    }
    // The agent reads host ports from the Pod itself; the list is only checked.
    for mut mapping in mappings {
        for port in ["hostPort", "containerPort"] {
            let _port: Option<u16> = mapping.take(port)?;
        }
        for text in ["protocol", "hostIP"] {
            let _text: Option<String> = mapping.take(text)?;
        }
        mapping.finish()?;
    }
    Ok(())
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
