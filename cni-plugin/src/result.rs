//! What goes to stdout on success.

use std::net::IpAddr;

use hachi_api::Attachment;
use hachi_net::{PodRoute, gateway_of};
use ipnet::IpNet;
use serde_json::{Map, Value, json};

use crate::{conf::Conf, version::Version};

/// The answer to VERSION.
pub(crate) fn version() -> Value {
    json!({
        "cniVersion": Version::LATEST.as_str(),
        "supportedVersions": Version::ALL.map(Version::as_str),
    })
}

/// The answer to ADD: what earlier plugins said, and then what we made.
pub(crate) fn added(conf: &Conf, attachment: &Attachment, mtu: u32, routes: &[PodRoute]) -> Value {
    let mut result = conf
        .prev
        .as_ref()
        .map(|prev| prev.raw.clone())
        .unwrap_or_default();
    result.insert("cniVersion".into(), conf.version.as_str().into());
    let first = conf.prev.as_ref().map_or(0, |prev| prev.interfaces.len());
    append(
        &mut result,
        "interfaces",
        interfaces(conf.version, attachment, mtu),
    );
    let ips = attachment
        .addresses
        .iter()
        .map(|address| ip(conf.version, *address, first + 1));
    append(&mut result, "ips", ips.collect());
    append(
        &mut result,
        "routes",
        routes.iter().map(|r| route(conf.version, r)).collect(),
    );
    match &conf.dns {
        Some(dns) => drop(result.insert("dns".into(), dns.clone())),
        None => drop(result.entry("dns").or_insert_with(|| json!({}))),
    }
    Value::Object(result)
}

fn append(result: &mut Map<String, Value>, key: &str, more: Vec<Value>) {
    match result.get_mut(key) {
        Some(Value::Array(list)) => list.extend(more),
        _ => drop(result.insert(key.to_owned(), more.into())),
    }
}

/// The host side and the Pod's side: the bandwidth plugin needs both.
fn interfaces(version: Version, attachment: &Attachment, mtu: u32) -> Vec<Value> {
    let mut host = json!({ "name": attachment.host_ifname, "mac": attachment.host_mac });
    let mut pod = json!({
        "name": attachment.id.ifname,
        "mac": attachment.mac,
        "sandbox": attachment.netns,
    });
    if version >= Version::V1_1_0 {
        host["mtu"] = mtu.into();
        pod["mtu"] = mtu.into();
    }
    vec![host, pod]
}

fn ip(version: Version, address: IpAddr, interface: usize) -> Value {
    let mut ip = json!({
        "address": IpNet::from(address),
        "gateway": gateway_of(address),
        "interface": interface,
    });
    if version < Version::V1_0_0 {
        ip["version"] = if address.is_ipv4() { "4" } else { "6" }.into();
    }
    ip
}

fn route(version: Version, route: &PodRoute) -> Value {
    let PodRoute {
        dst,
        mtu,
        advmss,
        priority,
        table,
    } = route;
    let mut value = json!({ "dst": dst, "gw": gateway_of(dst.addr()) });
    if version >= Version::V1_1_0 {
        let more = [
            ("mtu", mtu),
            ("advmss", advmss),
            ("priority", priority),
            ("table", table),
        ];
        for (key, number) in more {
            if let Some(number) = number {
                value[key] = (*number).into();
            }
        }
    }
    value
}
