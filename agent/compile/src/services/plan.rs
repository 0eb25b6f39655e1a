//! What one Service wants: frontends, and the sets of backends behind them. Pure, and cheap enough to be
//! done again when what was planned is to be taken back.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use hachi_abi::{Scope, ServiceFlags, proto};
use hachi_index::{Name, Service, ServicePort};
use ipnet::IpNet;

use crate::Frontend;

/// Names a set of backends.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) service: Name,
    pub(super) proto: u8,
    pub(super) port: u16,
    /// Of a `hostPort`.
    pub(super) host_ip: Option<IpAddr>,
    /// Of this node alone.
    pub(super) local: bool,
    pub(super) v6: bool,
}

/// A set of backends, and what else goes under its id.
#[derive(Debug)]
pub(super) struct Set {
    /// Sorted, each once.
    pub(super) backends: Vec<SocketAddr>,
    /// In seconds; 0 for none.
    pub(super) affinity: u32,
    /// Who may use those frontends that ask.
    pub(super) ranges: Vec<IpNet>,
}

/// Who comes first of those that claim a frontend: a Service's own address before any other, then the
/// older Service, by seconds.
pub(super) type Rank = (bool, i64);

/// What a frontend is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// It leads to these backends.
    Backends(Key),
    /// Whatever is sent there is rejected.
    Reject,
    /// The agent itself answers load balancers there: the datapath leaves it alone.
    HealthCheck,
}

/// A frontend as its Service wants it.
#[derive(Debug)]
pub(super) struct Wish {
    pub(super) rank: Rank,
    pub(super) purpose: Use,
    pub(super) flags: u32,
    /// It chooses among the backends as every other node does.
    pub(super) consistent: bool,
}

/// Everything that one Service wants.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) sets: BTreeMap<Key, Set>,
    pub(super) frontends: BTreeMap<Frontend, Wish>,
}

impl Wish {
    /// The backends behind it.
    pub(super) fn key(&self) -> Option<&Key> {
        match &self.purpose {
            Use::Backends(key) => Some(key),
            Use::Reject | Use::HealthCheck => None,
        }
    }
}

impl Plan {
    /// `node`: the node's own addresses.
    pub(super) fn new(name: &Name, service: &Service, node: &[IpAddr]) -> Self {
        let mut planner = Planner {
            name,
            service,
            plan: Self::default(),
        };
        for port in &service.ports {
            // An address may be listed twice. The first that is named here counts: a load balancer's
            // before an external one, for its source ranges.
            for address in &service.cluster_ips {
                planner.own(*address, port);
            }
            for address in &service.load_balancer_ips {
                let ranges = service.source_ranges.as_deref();
                planner.outer(*address, port.port, port, ranges);
            }
            for address in &service.external_ips {
                planner.outer(*address, port.port, port, None);
            }
            if let Some(number) = port.node_port {
                let bound = |address: &&IpAddr| port.host_ip.is_none_or(|ip| ip == **address);
                for address in node.iter().filter(bound) {
                    planner.outer(*address, number, port, None);
                }
            }
        }
        for address in &service.cluster_ips {
            planner.undefined(*address);
        }
        if let Some(check) = service.health_check {
            for address in node {
                planner.health_check(*address, check.port);
            }
        }
        planner.plan
    }
}

struct Planner<'a> {
    name: &'a Name,
    service: &'a Service,
    plan: Plan,
}

impl Planner<'_> {
    /// One of the Service's own addresses.
    fn own(&mut self, addr: IpAddr, port: &ServicePort) {
        let frontend = Frontend {
            addr,
            port: port.port,
            proto: port.protocol.number(),
            scope: Scope::INTERNAL,
        };
        let local = self.service.internal_local;
        self.wish(frontend, true, port, local, None);
    }

    /// An address that is used from outside too. From inside it leads to every backend, whatever
    /// `externalTrafficPolicy` says.
    fn outer(&mut self, addr: IpAddr, number: u16, port: &ServicePort, ranges: Option<&[IpNet]>) {
        let local = self.service.external_local;
        for (scope, local) in [(Scope::INTERNAL, false), (Scope::EXTERNAL, local)] {
            let frontend = Frontend {
                addr,
                port: number,
                proto: port.protocol.number(),
                scope,
            };
            self.wish(frontend, false, port, local, ranges);
        }
    }

    /// What an address of the Service has no port for.
    fn undefined(&mut self, addr: IpAddr) {
        let frontend = Frontend {
            addr,
            port: 0,
            proto: 0,
            scope: Scope::INTERNAL,
        };
        let wish = Wish {
            rank: (false, self.service.created),
            purpose: Use::Reject,
            flags: 0,
            consistent: false,
        };
        self.plan.frontends.insert(frontend, wish);
    }

    /// The node's port at which load balancers ask; nobody else may have it.
    fn health_check(&mut self, addr: IpAddr, port: u16) {
        for scope in [Scope::INTERNAL, Scope::EXTERNAL] {
            let frontend = Frontend {
                addr,
                port,
                proto: proto::TCP,
                scope,
            };
            let rank = (true, self.service.created);
            self.plan.frontends.entry(frontend).or_insert(Wish {
                rank,
                purpose: Use::HealthCheck,
                flags: 0,
                consistent: false,
            });
        }
    }

    fn wish(
        &mut self,
        frontend: Frontend,
        own: bool,
        port: &ServicePort,
        local: bool,
        ranges: Option<&[IpNet]>,
    ) {
        if self.plan.frontends.contains_key(&frontend) {
            return;
        }
        let v6 = frontend.addr.is_ipv6();
        let key = Key {
            service: self.name.clone(),
            proto: frontend.proto,
            port: port.port,
            host_ip: port.host_ip,
            local,
            v6,
        };
        let of_family = |backends: &[SocketAddr]| -> Vec<SocketAddr> {
            let all = backends.iter().copied();
            all.filter(|backend| backend.is_ipv6() == v6).collect()
        };
        let set = self.plan.sets.entry(key.clone()).or_insert_with(|| Set {
            backends: of_family(if local {
                &port.local_backends
            } else {
                &port.backends
            }),
            affinity: self.service.affinity.unwrap_or_default(),
            ranges: Vec::new(),
        });
        let mut flags = 0;
        if local && set.backends.is_empty() && port.backends.iter().any(|b| b.is_ipv6() == v6) {
            flags |= ServiceFlags::DROP_WHEN_EMPTY;
        }
        if let Some(ranges) = ranges {
            flags |= ServiceFlags::SOURCE_RANGES;
            let of_family = ranges.iter().filter(|range| range.addr().is_ipv6() == v6);
            set.ranges = of_family.copied().collect();
        }
        // Of a node's own backends no other node knows.
        let consistent = frontend.scope == Scope::EXTERNAL && !local;
        let wish = Wish {
            rank: (!own, self.service.created),
            purpose: Use::Backends(key),
            flags,
            consistent,
        };
        self.plan.frontends.insert(frontend, wish);
    }
}
