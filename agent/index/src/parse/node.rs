//! Nodes.

use k8s_openapi::api::core::v1 as core;

use super::{Complaints, address};
use crate::model::Node;

/// The zone that a node is in.
const ZONE: &str = "topology.kubernetes.io/zone";

/// A node's address that tunnels to it lead to.
const TUNNEL_ADDRESS: &str = "hachi.dev/tunnel-address";

/// The taint of a node that the cluster autoscaler is about to remove.
const SCALED_DOWN: &str = "ToBeDeletedByClusterAutoscaler";

pub(crate) fn node(object: &core::Node, complaints: &mut Complaints) -> Node {
    let spec = object.spec.as_ref();
    let mut blocks: Vec<&str> = spec
        .and_then(|s| s.pod_cidrs.as_ref())
        .into_iter()
        .flatten()
        .map(|c| c.as_str())
        .collect();
    if blocks.is_empty() {
        blocks.extend(
            spec.and_then(|s| s.pod_cidr.as_deref())
                .filter(|c| !c.is_empty()),
        );
    }
    let mut pod_cidrs = Vec::new();
    for block in blocks {
        match block.parse::<ipnet::IpNet>() {
            Ok(cidr) => pod_cidrs.push(cidr.trunc()),
            Err(_) => complaints.push(format!(
                "podCIDR {block:?} is not an address block: its Pods get no route; correct it"
            )),
        }
    }
    let addresses = object.status.as_ref().and_then(|s| s.addresses.as_ref());
    let internal_ips = addresses
        .into_iter()
        .flatten()
        .filter(|a| a.type_ == "InternalIP")
        .filter_map(|a| address(&a.address, "InternalIP", complaints))
        .collect();
    let annotations = object.metadata.annotations.as_ref();
    let tunnel_address = annotations
        .and_then(|annotations| annotations.get(TUNNEL_ADDRESS))
        .and_then(|text| address(text, TUNNEL_ADDRESS, complaints));
    let labels = object.metadata.labels.as_ref();
    let zone = labels
        .and_then(|labels| labels.get(ZONE))
        .filter(|zone| !zone.is_empty());
    let taints = spec.and_then(|s| s.taints.as_ref());
    let is_marked = taints.into_iter().flatten().any(|t| t.key == SCALED_DOWN);
    Node {
        internal_ips,
        pod_cidrs,
        tunnel_address,
        zone: zone.map(|zone| zone.as_str().into()),
        leaving: object.metadata.deletion_timestamp.is_some() || is_marked,
    }
}
