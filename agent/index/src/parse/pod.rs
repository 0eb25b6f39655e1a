//! Pods.

use std::{net::IpAddr, sync::Arc};

use hachi_policy::{ContainerPort, Labels, Protocol};
use k8s_openapi::api::core::v1 as core;

use super::{Complaints, address, created, labels, port};

/// What the index keeps of a Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodRecord {
    pub(crate) uid: Option<Box<str>>,
    pub(crate) created: i64,
    /// It is being deleted. It counts in full until it is gone.
    pub(crate) terminating: bool,
    /// It ran to its end (`Succeeded`, `Failed`): it has no address and no policies any more.
    pub(crate) finished: bool,
    /// It uses its node's network: to policies it is the node, not a Pod.
    pub(crate) host_network: bool,
    pub(crate) labels: Arc<Labels>,
    pub(crate) ports: Arc<[ContainerPort]>,
    pub(crate) addresses: Vec<IpAddr>,
    /// [`ADDRESSES_ANNOTATION`] as it is.
    pub(crate) wanted: Option<Box<str>>,
}

/// The annotation in which a Pod asks for addresses: one of each family at most, with commas
/// between.
pub const ADDRESSES_ANNOTATION: &str = "hachi.dev/ip-addresses";

/// On the API's mirror of a static Pod: the UID that the kubelet gives the runtime.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

impl PodRecord {
    /// Whether policies see a Pod in it.
    pub(crate) const fn is_peer(&self) -> bool {
        !self.finished && !self.host_network
    }
}

pub(crate) fn pod(object: &core::Pod, complaints: &mut Complaints) -> PodRecord {
    let metadata = &object.metadata;
    let spec = object.spec.as_ref();
    let status = object.status.as_ref();
    let phase = status.and_then(|s| s.phase.as_deref());
    let mut addresses: Vec<IpAddr> = status
        .and_then(|s| s.pod_ips.as_ref())
        .into_iter()
        .flatten()
        .filter_map(|ip| address(&ip.ip, "podIP", complaints))
        .collect();
    if addresses.is_empty()
        && let Some(ip) = status
            .and_then(|s| s.pod_ip.as_deref())
            .filter(|ip| !ip.is_empty())
    {
        addresses.extend(address(ip, "podIP", complaints));
    }
    addresses.sort_unstable();
    addresses.dedup();
    let annotation = |name| {
        let annotations = metadata.annotations.as_ref();
        annotations
            .and_then(|all| all.get(name))
            .map(String::as_str)
    };
    PodRecord {
        uid: annotation(MIRROR_ANNOTATION)
            .or(metadata.uid.as_deref())
            .map(Into::into),
        created: created(metadata),
        terminating: metadata.deletion_timestamp.is_some(),
        finished: matches!(phase, Some("Succeeded" | "Failed")),
        host_network: spec.and_then(|s| s.host_network).unwrap_or_default(),
        labels: Arc::new(labels(metadata)),
        ports: spec
            .map(|spec| named_ports(spec, complaints))
            .unwrap_or_default(),
        addresses,
        wanted: annotation(ADDRESSES_ANNOTATION)
            .filter(|text| !text.trim().is_empty())
            .map(Into::into),
    }
}

/// The addresses that a Pod asks for; an error says what is wrong with the text.
pub(crate) fn wanted_addresses(text: &str) -> Result<Vec<IpAddr>, String> {
    let mut found: Vec<IpAddr> = Vec::new();
    for part in text.split(',').map(str::trim) {
        let address: IpAddr = part
            .parse()
            .map_err(|_| format!("{part:?} is no IP address"))?;
        if found
            .iter()
            .any(|known| known.is_ipv4() == address.is_ipv4())
        {
            return Err(format!("{text:?} has two addresses of one family"));
        }
        found.push(address);
    }
    Ok(found)
}

/// The named ports of the containers that run as long as the Pod does: init containers have none,
/// save those that restart (sidecars).
fn named_ports(spec: &core::PodSpec, complaints: &mut Complaints) -> Arc<[ContainerPort]> {
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let mut ports = Vec::new();
    for declared in spec
        .containers
        .iter()
        .chain(sidecars)
        .flat_map(|c| c.ports.iter().flatten())
    {
        let Some(name) = declared.name.as_deref().filter(|n| !n.is_empty()) else {
            continue;
        };
        match (
            Protocol::parse(declared.protocol.as_deref()),
            port(declared.container_port),
        ) {
            (Some(protocol), Some(port)) => {
                ports.push(ContainerPort {
                    name: name.into(),
                    protocol,
                    port,
                });
            }
            _ => complaints.push(format!(
                "container port {name:?} has a protocol or number that does not exist: rules that \
                 name it do not match this Pod; correct it"
            )),
        }
    }
    ports.sort_unstable();
    ports.dedup();
    ports.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_annotation_asks_for_an_address_of_each_family() {
        let addresses = |text| wanted_addresses(text).map(|found| format!("{found:?}"));
        assert_eq!(addresses("10.0.0.5"), Ok("[10.0.0.5]".into()));
        assert_eq!(
            addresses(" fd00::5, 10.0.0.5 "),
            Ok("[fd00::5, 10.0.0.5]".into())
        );
        for bad in ["10.0.0", "10.0.0.5,", "10.0.0.5,10.0.0.6", "10.0.0.5/24"] {
            assert!(addresses(bad).is_err(), "{bad} was taken");
        }
    }
}
