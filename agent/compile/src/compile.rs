//! The whole of it: desired state in, image out.

use std::{collections::BTreeMap, net::IpAddr};

use hachi_abi::{Endpoint, PolicyEntry, PolicyKey};
use hachi_index::{Desired, DesiredEndpoint, EndpointKey, Name};
use hachi_policy::RuleRef;

use crate::{Frontend, Image, classes::Matcher, services, sets::Sets};

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
    Compiler::default().compile(desired)
}

/// A compiler that remembers, so that a small change costs little. Its result is always that of
/// [`compile`], whatever it has seen before, but for the slots that backends are in.
#[derive(Debug, Default)]
pub struct Compiler {
    policy: Option<PolicyState>,
    services: services::State,
}

/// What depends on the endpoints and the policies that select them.
#[derive(Debug)]
struct PolicyState {
    endpoints: BTreeMap<EndpointKey, DesiredEndpoint>,
    sets: Sets,
    matcher: Matcher,
    /// The classes that the entries are for.
    used: Vec<(u32, u32)>,
    entries: BTreeMap<PolicyKey, PolicyEntry>,
}

impl Compiler {
    /// Takes over from what the maps hold: backends that are in a slot there stay in it. Everything is
    /// compiled anew the next time.
    pub fn adopt(&mut self, image: &Image) {
        self.services = services::State::adopt(image.slots.clone());
    }

    /// Compiles a desired state.
    pub fn compile(&mut self, desired: &Desired) -> Compiled {
        let services = self.services.compile(desired);
        let state = match &mut self.policy {
            Some(state) if state.endpoints == desired.endpoints => state,
            state => {
                let sets = Sets::collect(desired);
                state.insert(PolicyState {
                    endpoints: desired.endpoints.clone(),
                    matcher: Matcher::new(&sets),
                    sets,
                    used: Vec::new(),
                    entries: BTreeMap::new(),
                })
            }
        };
        let classes = state.matcher.classes(desired);
        let used = classes.used();
        if state.used != used {
            state.used = used;
            state.entries.clear();
            for at in 0..state.sets.contents.len() {
                state.entries.append(&mut state.sets.entries(at, &classes));
            }
        }
        let image = Image {
            flags: 0,
            endpoints: endpoints(desired, &state.sets),
            peers: classes.peers,
            cidrs: classes.cidrs,
            policy: state.entries.clone(),
            services: services.frontends,
            slots: services.slots,
        };
        let rules = state
            .sets
            .rules
            .iter()
            .map(|(rule, id)| (*id, rule.clone()))
            .collect();
        Compiled {
            image,
            rules,
            problems: services.problems,
        }
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
