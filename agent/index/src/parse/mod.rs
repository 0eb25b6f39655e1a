//! The boundary: API objects become compact records of own types here, and nowhere else.

mod cluster_policy;
mod fields;
mod node;
mod pod;
mod policy;
mod selector;
mod service;
mod slice;

use std::net::IpAddr;

use hachi_policy::Labels;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub(crate) use cluster_policy::cluster_policy;
pub(crate) use node::node;
pub use pod::ADDRESSES_ANNOTATION;
pub(crate) use pod::{PodRecord, pod, wanted_addresses};
pub(crate) use policy::policy;
pub(crate) use service::{PortRecord, ServiceRecord, service};
pub(crate) use slice::{Hints, SliceEndpoint, SliceRecord, slice};

/// Collects what was wrong with one object.
pub(crate) type Complaints = Vec<String>;

pub(crate) fn labels(metadata: &ObjectMeta) -> Labels {
    metadata.labels.iter().flatten().collect()
}

/// Seconds since the epoch; 0 if the API did not say.
pub(crate) fn created(metadata: &ObjectMeta) -> i64 {
    metadata
        .creation_timestamp
        .as_ref()
        .map_or(0, |time| time.0.as_second())
}

/// Reads an address, or complains.
pub(crate) fn address(text: &str, what: &str, complaints: &mut Complaints) -> Option<IpAddr> {
    match text.parse() {
        Ok(address) => Some(address),
        Err(_) => {
            complaints.push(format!(
                "{what} {text:?} is not an IP address: ignored; correct it"
            ));
            None
        }
    }
}

/// Reads a port number from 1 to 65535.
pub(crate) fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|p| *p != 0)
}
