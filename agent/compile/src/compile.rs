//! The whole of it: desired state in, image out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use hachi_abi::{Endpoint, Peer, map};
use hachi_index::{Desired, DesiredEndpoint, EndpointKey, Name};
use hachi_policy::{PolicyId, RuleRef};
use ipnet::IpNet;

use crate::{
    Claimant, Draining, Frontend, HealthChecks, Image,
    classes::Matcher,
    entries::Entries,
    network,
    problem::Problem,
    services,
    sets::{SetOf, Sets},
};

/// The result of a compilation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// What the maps have to hold.
    pub image: Image,
    /// The rule behind every rule id in the image.
    pub rules: Arc<BTreeMap<u32, RuleRef>>,
    /// What could not be honoured.
    pub problems: Vec<Problem>,
    /// Endpoints of UDP and SCTP that still serve while they terminate.
    pub draining: Draining,
    /// The ports at which load balancers ask, of those Services that have them.
    pub health_checks: HealthChecks,
}

/// How many entries an image may have, so that it fits the maps with its predecessor beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries of all policy sets.
    pub policy: usize,
    /// Single addresses with a class, of each family.
    pub peers: usize,
    /// Address blocks, of each family.
    pub cidrs: usize,
}

impl Limits {
    /// No limits.
    pub const NONE: Self = Self {
        policy: usize::MAX,
        peers: usize::MAX,
        cidrs: usize::MAX,
    };
}

/// Compiles a desired state without limits. The same state gives the same image in every run.
///
/// [`Image::flags`], [`Image::ports`], [`Image::uplinks`] and the tunnels stay empty: they say how
/// the node forwards, which is not the cluster's to desire.
#[must_use]
pub fn compile(desired: &Desired) -> Compiled {
    Compiler::default().compile(desired)
}

/// A compiler that remembers, so that a small change costs little. Its result is always that of
/// [`compile`], whatever it has seen before, but for the slots that backends are in.
#[derive(Debug, Default)]
pub struct Compiler {
    endpoints: BTreeMap<EndpointKey, DesiredEndpoint>,
    sets: Sets,
    /// Contents that did not fit, by hash.
    refused: BTreeSet<u64>,
    problems: Vec<Problem>,
    matcher: Matcher,
    entries: Entries,
    services: services::State,
}

impl Compiler {
    /// Takes over from what the maps hold: backends that are in a slot there stay in it. Everything is
    /// compiled anew the next time.
    pub fn adopt(&mut self, image: &Image) {
        self.services = services::State::adopt(image.slots.clone());
    }

    /// Compiles a desired state without limits.
    pub fn compile(&mut self, desired: &Desired) -> Compiled {
        self.compile_within(desired, &Limits::NONE)
    }

    /// Compiles a desired state.
    ///
    /// A policy set that does not fit within the limits is left out: its endpoints are quarantined,
    /// the largest set first, until the rest fits. [`Problem::TooLarge`] tells which.
    pub fn compile_within(&mut self, desired: &Desired, limits: &Limits) -> Compiled {
        let services = self.services.compile(desired);
        if self.endpoints != desired.endpoints {
            self.endpoints = desired.endpoints.clone();
            self.refused.clear();
            self.problems.clear();
            self.collect(desired);
        }
        let (peers, cidrs) = loop {
            self.matcher.place(desired);
            self.entries.update(&self.sets, &self.matcher);
            let (peers, cidrs) = (self.matcher.peers(desired), self.matcher.cidrs());
            let Some((map, needed, limit)) =
                limits.exceeded(self.entries.all.len(), &peers, &cidrs)
            else {
                break (peers, cidrs);
            };
            let Some(at) = self.entries.largest(&self.sets) else {
                break (peers, cidrs);
            };
            self.refuse(desired, at, map, needed, limit);
        };
        let mut problems = services.problems;
        problems.extend(self.problems.iter().cloned());
        Compiled {
            image: Image {
                flags: 0,
                ports: (0, 0),
                uplinks: BTreeMap::new(),
                non_masquerade: network::non_masquerade(desired),
                tunnel: hachi_abi::TunnelDevice::default(),
                host: hachi_abi::HostDevice::default(),
                tunnels: BTreeMap::new(),
                endpoints: endpoints(desired, &self.sets),
                peers,
                cidrs,
                policy: self.entries.all.clone(),
                services: services.frontends,
                slots: services.slots,
            },
            rules: Arc::clone(&self.sets.names),
            problems,
            draining: services.draining,
            health_checks: services.health_checks,
        }
    }

    /// Who is served at a port of the node's own addresses, if anybody is.
    #[must_use]
    pub fn holder(&self, proto: u8, port: u16) -> Option<Claimant> {
        self.services.holder(proto, port)
    }

    /// The frontends of UDP and SCTP whose backends the last compilation may have changed.
    pub fn touched(&self) -> impl Iterator<Item = &Frontend> {
        self.services.touched()
    }

    fn collect(&mut self, desired: &Desired) {
        if self.sets.collect(desired, &self.refused) {
            self.matcher.set(&self.sets);
        }
    }

    fn refuse(
        &mut self,
        desired: &Desired,
        at: usize,
        map: &'static str,
        needed: usize,
        limit: usize,
    ) {
        let content = Arc::clone(&self.sets.contents[at]);
        let of = |key: &&EndpointKey| self.sets.of[*key].contains(&SetOf::At(at));
        let pods = self.sets.of.keys().filter(of).filter_map(|key| {
            let pod = desired.endpoints.get(key)?.endpoint.pod.as_ref()?;
            Some(Name::new(&pod.namespace, &pod.name))
        });
        let policies: BTreeSet<PolicyId> = (content.rules.iter())
            .map(|rule| rule.rule.policy.clone())
            .collect();
        self.problems.push(Problem::TooLarge {
            policies: policies.into_iter().collect(),
            pods: pods.collect(),
            map,
            needed,
            limit,
        });
        self.refused.insert(content.hash);
        self.collect(desired);
    }
}

impl Limits {
    /// Which map is too small, for how many entries.
    fn exceeded(
        &self,
        policy: usize,
        peers: &BTreeMap<IpAddr, Peer>,
        cidrs: &BTreeMap<IpNet, Peer>,
    ) -> Option<(&'static str, usize, usize)> {
        let of_family = |v6| {
            let peers = peers.keys().filter(|a| a.is_ipv6() == v6).count();
            let cidrs = cidrs.keys().filter(|n| n.addr().is_ipv6() == v6).count();
            let at = usize::from(v6);
            [
                (map::PEERS[at], peers, self.peers),
                (map::CIDRS[at], cidrs, self.cidrs),
            ]
        };
        let all = [(map::POLICY, policy, self.policy)].into_iter();
        all.chain(of_family(false))
            .chain(of_family(true))
            .find(|(_, needed, limit)| needed > limit)
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
