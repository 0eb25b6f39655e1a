//! Who does not get an address or a port, because somebody else has it.
//!
//! Precedence, first match decides:
//! 1. a Service's own address comes before any other use;
//! 2. a Service's port on the node (`nodePort`, `healthCheckNodePort`) before a Pod's `hostPort`;
//! 3. the older Service, by seconds;
//! 4. the name.
//!
//! So every node decides alike, and in the same way after a restart.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use hachi_abi::{Scope, proto};
use hachi_index::{Name, pod_of_host_ports};

use super::{
    HealthChecks, State,
    plan::{Plan, Use},
};
use crate::{Frontend, problem::Problem};

/// Who asks for a port, and what for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claimant {
    /// A Service, or a Pod.
    pub name: Name,
    /// What for.
    pub what: Claimed,
}

/// What a port is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claimed {
    /// A Service's address and port, or its port on the node.
    Service,
    /// A Service's `healthCheckNodePort`.
    HealthCheck,
    /// A Pod's `hostPort`.
    HostPort,
}

impl Claimant {
    fn new(name: &Name, purpose: Option<&Use>) -> Self {
        if let Some(pod) = pod_of_host_ports(name) {
            return Self {
                name: pod,
                what: Claimed::HostPort,
            };
        }
        let what = match purpose {
            Some(Use::HealthCheck) => Claimed::HealthCheck,
            Some(Use::Backends(_) | Use::Reject) | None => Claimed::Service,
        };
        Self {
            name: name.clone(),
            what,
        }
    }
}

impl fmt::Display for Claimant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            Claimed::Service => write!(f, "Service {}", self.name),
            Claimed::HealthCheck => write!(f, "the healthCheckNodePort of Service {}", self.name),
            Claimed::HostPort => write!(f, "the hostPort of Pod {}", self.name),
        }
    }
}

impl State {
    /// One for each port and both who want it, with all addresses.
    pub(super) fn problems(&self) -> Vec<Problem> {
        type Conflict = (u16, u8, Claimant, Claimant);
        let mut all: BTreeMap<Conflict, Vec<IpAddr>> = BTreeMap::new();
        // One scope tells for both, and a port for what stands for all the others.
        let contested = self
            .contested
            .iter()
            .filter(|frontend| frontend.port != 0 && frontend.scope == Scope::INTERNAL);
        for frontend in contested {
            let Some(claims) = self.claims.get(frontend) else {
                continue;
            };
            let mut claimants = claims.iter().map(|(_, name)| self.claimant(frontend, name));
            let Some(holder) = claimants.next() else {
                continue;
            };
            for loser in claimants {
                let key = (frontend.port, frontend.proto, loser, holder.clone());
                all.entry(key).or_default().push(frontend.addr);
            }
        }
        all.into_iter()
            .map(|((port, proto, loser, holder), mut addresses)| {
                addresses.sort_unstable();
                Problem::PortTaken {
                    addresses,
                    port,
                    proto,
                    loser,
                    holder,
                }
            })
            .collect()
    }

    /// Who is served at a port of the node, if anybody is.
    pub(crate) fn holder(&self, proto: u8, port: u16) -> Option<Claimant> {
        self.addresses.iter().find_map(|addr| {
            let frontend = Frontend {
                addr: *addr,
                port,
                proto,
                scope: Scope::INTERNAL,
            };
            let (_, name) = self.claims.get(&frontend)?.first()?;
            Some(self.claimant(&frontend, name))
        })
    }

    fn claimant(&self, frontend: &Frontend, name: &Name) -> Claimant {
        let service = self.seen.get(name);
        let plan = service.map(|service| Plan::new(name, service, &self.addresses));
        let wish = plan.as_ref().and_then(|plan| plan.frontends.get(frontend));
        Claimant::new(name, wish.map(|wish| &wish.purpose))
    }

    /// The health checks that are to be answered.
    pub(super) fn health_checks(&self) -> HealthChecks {
        let checked = self.checked.iter();
        checked
            .filter_map(|name| {
                let check = self.seen.get(name)?.health_check?;
                // On the node's first address as on the others.
                let holder = self.addresses.iter().find_map(|addr| {
                    let frontend = Frontend {
                        addr: *addr,
                        port: check.port,
                        proto: proto::TCP,
                        scope: Scope::INTERNAL,
                    };
                    self.claims.get(&frontend)?.first()
                });
                let is_held = holder.is_none_or(|(_, holder)| holder == name);
                is_held.then(|| (check.port, (name.clone(), check.local_endpoints)))
            })
            .collect()
    }
}
