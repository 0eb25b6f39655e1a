//! `EndpointSlice`s.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hachi_policy::Protocol;
use k8s_openapi::api::discovery::v1::{self as discovery, EndpointSlice};

use super::{
    Complaints, address, port,
    service::{HEADLESS, PROXY_NAME, PortRecord},
};

/// On a slice: the Service that it belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// What the index keeps of an `EndpointSlice`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SliceRecord {
    /// Name of the Service, in the slice's namespace.
    pub(crate) service: Arc<str>,
    /// Name, protocol and number of the ports of every endpoint.
    pub(crate) ports: Vec<PortRecord>,
    pub(crate) endpoints: Vec<SliceEndpoint>,
}

/// An endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SliceEndpoint {
    pub(crate) address: IpAddr,
    /// Takes new connections; a Pod's `publishNotReadyAddresses` is already in it.
    pub(crate) ready: bool,
    /// On its way out, but still able to serve.
    pub(crate) serving_terminating: bool,
    /// On this node.
    pub(crate) local: bool,
    /// Whom it is meant for.
    pub(crate) hints: Hints,
}

/// For whom an endpoint is meant (`hints`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hints {
    /// Names of zones (`forZones`).
    pub(crate) zones: Box<[Arc<str>]>,
    /// Nodes (`forNodes`): whether this one is among them, if there are any.
    pub(crate) node: Option<bool>,
}

impl SliceEndpoint {
    pub(crate) const fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, port)
    }
}

/// `None` for a slice of no Service, or of one with names instead of addresses.
pub(crate) fn slice(
    object: &EndpointSlice,
    node_name: &str,
    complaints: &mut Complaints,
) -> Option<SliceRecord> {
    let labels = object.metadata.labels.as_ref()?;
    let service = labels.get(SERVICE_NAME).filter(|name| !name.is_empty())?;
    let v6 = match object.address_type.as_str() {
        "IPv4" => false,
        "IPv6" => true,
        _ => return None,
    };
    if labels.contains_key(PROXY_NAME) || labels.contains_key(HEADLESS) {
        return None;
    }
    let mut ports = Vec::new();
    for declared in object.ports.iter().flatten() {
        // No number means "all ports", which a Service cannot be served from.
        let Some(number) = declared.port else {
            continue;
        };
        match (Protocol::parse(declared.protocol.as_deref()), port(number)) {
            (Some(protocol), Some(port)) => {
                let name = declared.name.as_deref().unwrap_or_default().into();
                ports.push(PortRecord {
                    name,
                    protocol,
                    port,
                    node_port: None,
                });
            }
            _ => complaints.push(format!(
                "port {number} has a protocol or number that does not exist: its endpoints get no \
                 traffic; correct it"
            )),
        }
    }
    let mut endpoints = Vec::new();
    for endpoint in &object.endpoints {
        // The addresses of one endpoint are interchangeable; one is enough.
        let Some(text) = endpoint.addresses.first() else {
            continue;
        };
        let Some(address) = address(text, "endpoint address", complaints) else {
            continue;
        };
        if address.is_ipv6() != v6 {
            complaints.push(format!(
                "endpoint address {address} is not {}: ignored; correct addressType",
                object.address_type
            ));
            continue;
        }
        let conditions = endpoint.conditions.as_ref();
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        let serving = conditions.and_then(|c| c.serving).unwrap_or(ready);
        let terminating = conditions.and_then(|c| c.terminating).unwrap_or_default();
        endpoints.push(SliceEndpoint {
            address,
            ready,
            serving_terminating: serving && terminating,
            local: endpoint.node_name.as_deref() == Some(node_name),
            hints: hints(endpoint, node_name),
        });
    }
    Some(SliceRecord {
        service: service.as_str().into(),
        ports,
        endpoints,
    })
}

fn hints(endpoint: &discovery::Endpoint, node_name: &str) -> Hints {
    let Some(hints) = &endpoint.hints else {
        return Hints::default();
    };
    let zones = hints.for_zones.iter().flatten();
    let nodes = hints.for_nodes.as_deref().unwrap_or_default();
    Hints {
        zones: zones.map(|zone| zone.name.as_str().into()).collect(),
        node: (!nodes.is_empty()).then(|| nodes.iter().any(|node| node.name == node_name)),
    }
}
