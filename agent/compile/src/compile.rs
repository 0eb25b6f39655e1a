//! The whole of it: desired state in, image out.

use std::{collections::BTreeMap, net::IpAddr};

use hachi_abi::Endpoint;
use hachi_index::{Desired, Name};
use hachi_policy::RuleRef;

use crate::{Frontend, Image, classes::Classes, selectors::Selectors, services, sets::Sets};

/// The result of a compilation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// What the maps have to hold.
    pub image: Image,
    /// The rule behind every rule id in the image.
    pub rules: BTreeMap<u32, RuleRef>,
    /// What could not be honoured.
    pub problems: Vec<Problem>,
}

/// What could not be honoured.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Problem {
    /// Two Services claim one address and port.
    #[error(
        "Service {service}: {}:{} (protocol {}) is Service {holder}'s already: not served; change one",
        frontend.addr, frontend.port, frontend.proto
    )]
    FrontendTaken {
        /// The address and port.
        frontend: Frontend,
        /// Who does not get it.
        service: Name,
        /// Who has it.
        holder: Name,
    },
}

/// Compiles a desired state. The same state gives the same image in every run.
///
/// [`Image::flags`] stays 0: it says how the node forwards, which is not the cluster's to desire.
#[must_use]
pub fn compile(desired: &Desired) -> Compiled {
    let mut problems = Vec::new();
    let sets = Sets::collect(desired);
    let selectors = Selectors::collect(&sets.contents);
    let classes = Classes::new(desired, &selectors);
    let mut policy = BTreeMap::new();
    for at in 0..sets.contents.len() {
        policy.append(&mut sets.entries(at, &classes));
    }
    let image = Image {
        flags: 0,
        endpoints: endpoints(desired, &sets),
        policy,
        services: services::compile(desired, &mut problems),
        peers: classes.peers,
        cidrs: classes.cidrs,
    };
    let rules = sets
        .rules
        .into_iter()
        .map(|(rule, id)| (id, rule))
        .collect();
    Compiled {
        image,
        rules,
        problems,
    }
}

fn endpoints(desired: &Desired, sets: &Sets) -> BTreeMap<IpAddr, Endpoint> {
    let mut endpoints = BTreeMap::new();
    for (key, desired) in &desired.endpoints {
        let Some([ingress, egress]) = sets.of.get(key).copied() else {
            continue;
        };
        let (ingress_set, ingress_shapes) = sets.resolve(ingress);
        let (egress_set, egress_shapes) = sets.resolve(egress);
        let endpoint = Endpoint {
            ifindex: desired.endpoint.ifindex,
            ingress_set,
            egress_set,
            ingress_shapes,
            egress_shapes,
            mac: desired.endpoint.mac,
            host_mac: desired.endpoint.host_mac,
        };
        endpoints.extend(desired.addresses.iter().map(|address| (*address, endpoint)));
    }
    endpoints
}
