//! `hachi policy`: what selects a Pod, and why a flow is judged as it is: the oracle's verdict from
//! the policies that the API told of, beside that of the kernel's maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hachi_abi::{RULE_NONE, SET_ALLOW_ALL};
use hachi_api::{ApiError, FlowTrace, PolicyTrace, Reply, SideTrace};
use hachi_compile::{Compiled, Frontend, Image, SET_QUARANTINE};
use hachi_index::Index;
use hachi_kernel::Datapath;
use hachi_policy::{Direction, Flow, Party, PodIdentity, Side, trace};

/// What the answers are made from.
pub(crate) struct View<'a> {
    pub(crate) index: &'a mut Index,
    pub(crate) datapath: &'a Datapath,
    pub(crate) image: &'a Image,
    pub(crate) compiled: &'a Compiled,
}

/// One end of a trace.
struct End {
    name: String,
    addresses: Vec<IpAddr>,
}

fn bad(message: String) -> Reply {
    Reply::Error {
        error: ApiError {
            code: 7,
            message,
            details: "name a Pod as NAMESPACE/NAME or give an address".into(),
        },
    }
}

impl View<'_> {
    fn end(&self, text: &str) -> Result<End, String> {
        if let Ok(address) = text.parse() {
            return Ok(End {
                name: text.to_owned(),
                addresses: vec![address],
            });
        }
        let (namespace, name) = text
            .split_once('/')
            .ok_or_else(|| format!("{text:?} is neither NAMESPACE/NAME nor an address"))?;
        let (addresses, _) = self.index.pod(namespace, name).ok_or_else(|| {
            format!("no Pod {text} is known, or it is on its node's network: give the address")
        })?;
        if addresses.is_empty() {
            return Err(format!("Pod {text} has no address yet"));
        }
        Ok(End {
            name: text.to_owned(),
            addresses,
        })
    }

    /// Traces a flow in every family that both ends have.
    pub(crate) fn trace(&mut self, from: &str, to: &str, protocol: u8, port: u16) -> Reply {
        let (from, to) = match (self.end(from), self.end(to)) {
            (Ok(from), Ok(to)) => (from, to),
            (Err(error), _) | (_, Err(error)) => return bad(error),
        };
        self.index.desired();
        let mut flows = Vec::new();
        for source in &from.addresses {
            for destination in &to.addresses {
                if source.is_ipv6() != destination.is_ipv6() {
                    continue;
                }
                let frontend = Frontend {
                    addr: *destination,
                    port,
                    proto: protocol,
                    scope: 0,
                };
                let behind = if self.image.services.get(&frontend).is_some() {
                    self.image.backends(&frontend).to_vec()
                } else {
                    vec![SocketAddr::new(*destination, port)]
                };
                let through = (!behind.contains(&SocketAddr::new(*destination, port)))
                    .then(|| SocketAddr::new(*destination, port));
                if behind.is_empty() {
                    flows.push(FlowTrace {
                        source: *source,
                        destination: SocketAddr::new(*destination, port),
                        service: through,
                        allowed: false,
                        drift: false,
                        sides: Vec::new(),
                    });
                }
                for destination in behind {
                    match self.flow(*source, destination, through, protocol) {
                        Ok(flow) => flows.push(flow),
                        Err(error) => {
                            return Reply::Error {
                                error: ApiError {
                                    code: 5,
                                    message: format!("the maps are not readable: {error}"),
                                    details: String::new(),
                                },
                            };
                        }
                    }
                }
            }
        }
        if flows.is_empty() {
            return bad(format!(
                "{} and {} have no family in common",
                from.name, to.name
            ));
        }
        Reply::Trace {
            trace: Box::new(PolicyTrace {
                from: from.name,
                to: to.name,
                flows,
            }),
        }
    }

    fn flow(
        &mut self,
        source: IpAddr,
        destination: SocketAddr,
        service: Option<SocketAddr>,
        protocol: u8,
    ) -> Result<FlowTrace, hachi_kernel::KernelError> {
        let desired = self.index.desired();
        let from_own_node = desired.local_addresses.contains(&source);
        let pods: BTreeMap<IpAddr, Arc<PodIdentity>> = [source, destination.ip()]
            .into_iter()
            .filter_map(|address| Some((address, desired.peers.get(&address)?.clone())))
            .collect();
        let party = |address| Party {
            address,
            pod: pods.get(&address).map(|pod| &**pod),
        };
        let flow = Flow {
            source: party(source),
            destination: party(destination.ip()),
            from_own_node,
            protocol,
            port: destination.port(),
        };
        let mut sides = Vec::new();
        for direction in [Direction::Egress, Direction::Ingress] {
            sides.push(self.side(direction, &flow)?);
        }
        Ok(FlowTrace {
            source,
            destination,
            service,
            allowed: sides.iter().all(|side| side.allowed),
            drift: sides.iter().any(|side| side.drift),
            sides,
        })
    }

    fn side(
        &self,
        direction: Direction,
        flow: &Flow<'_>,
    ) -> Result<SideTrace, hachi_kernel::KernelError> {
        let (own, word) = match direction {
            Direction::Egress => (flow.source, "egress"),
            Direction::Ingress => (flow.destination, "ingress"),
        };
        let traced = trace(self.index.policies(), direction, flow);
        let mut reasons: Vec<String> = Vec::new();
        let exempt = if flow.source.address == flow.destination.address {
            Some("a Pod always reaches itself")
        } else if direction == Direction::Ingress && flow.from_own_node {
            Some("a Pod's own node always reaches it")
        } else if own.pod.is_none() {
            Some("no Pod has this address, so that no policy selects it")
        } else if traced.policies.is_empty() {
            Some("no policy selects the Pod in this direction")
        } else {
            None
        };
        let side = if let Some(why) = exempt {
            reasons.push(why.to_owned());
            Side::NotIsolated
        } else {
            for (rank, policy) in &traced.policies {
                reasons.push(format!(
                    "{policy} selects the Pod (tier {}, priority {})",
                    rank.tier, rank.priority
                ));
            }
            for rule in traced.rules.iter().filter(|r| r.matches() || r.nearly()) {
                let told = match (rule.decided, rule.matches(), rule.peer) {
                    (true, ..) => "matches and decides",
                    (false, true, _) => "matches, but another rule comes first",
                    (false, false, true) => "matches the peer, but not the port",
                    (false, false, false) => "matches the port, but not the peer",
                };
                reasons.push(format!("{} ({}) {told}", rule.rule, rule.action));
            }
            match &traced.side {
                Side::Denied(None) => reasons.push(
                    "isolated by a NetworkPolicy, and no rule of one accepts the flow".to_owned(),
                ),
                Side::NotIsolated => reasons.push("no rule decides: it passes".to_owned()),
                Side::Allowed(_) | Side::Denied(Some(_)) => {}
            }
            traced.side
        };
        let live = self.datapath.judge(
            direction,
            flow.source.address,
            flow.destination.address,
            flow.protocol,
            flow.port,
        )?;
        let mut allowed = side.allows();
        let here = self.image.endpoints.get(&own.address);
        if here.is_some_and(|e| e.ingress_set == SET_QUARANTINE) && exempt.is_none() {
            reasons.push(
                "the Pod is denied everything: it is not known well enough, or its policies do not \
                 fit (see hachi status)"
                    .to_owned(),
            );
            allowed = false;
        }
        let (live, drift) = match live {
            None if here.is_some() => ("the Pod's entry is missing from the maps".to_owned(), true),
            None => ("not judged on this node".to_owned(), false),
            Some(live) => {
                let rule = self.compiled.rules.get(&live.rule);
                let expected = match &side {
                    Side::Allowed(rules) => rule.is_some_and(|rule| rules.contains(rule)),
                    Side::Denied(Some(denying)) => rule == Some(denying),
                    Side::NotIsolated | Side::Denied(None) => live.rule == RULE_NONE,
                };
                let drift = live.allowed != allowed || (side.allows() == allowed && !expected);
                let verdict = if live.allowed { "allowed" } else { "denied" };
                let by = match rule {
                    Some(rule) => format!(" by {rule}"),
                    None if live.rule == RULE_NONE => String::new(),
                    None => format!(" by an unknown rule {:08x}", live.rule),
                };
                let set = match live.set {
                    SET_ALLOW_ALL => "not isolated".to_owned(),
                    set => format!("set {set:08x}"),
                };
                let text = format!("{verdict}{by} ({set}, peer class {:08x})", live.class);
                (text, drift)
            }
        };
        Ok(SideTrace {
            direction: word.to_owned(),
            allowed,
            reasons,
            live,
            drift,
        })
    }

    /// What selects a Pod, and how large its sets are.
    pub(crate) fn of_pod(&mut self, namespace: &str, name: &str) -> Reply {
        let Some((addresses, identity)) = self.index.pod(namespace, name) else {
            return bad(format!(
                "no Pod {namespace}/{name} is known, or it is on its node's network"
            ));
        };
        let here = addresses.iter().find_map(|a| self.image.endpoints.get(a));
        let mut rows = Vec::new();
        for (direction, word) in [
            (Direction::Ingress, "ingress"),
            (Direction::Egress, "egress"),
        ] {
            let mut selecting: Vec<_> = self
                .index
                .policies()
                .filter(|p| p.rules(direction).is_some() && p.subject.selects(&identity))
                .collect();
            selecting.sort_by_key(|policy| (policy.rank, &policy.id));
            for policy in selecting {
                rows.push(vec![
                    word.to_owned(),
                    policy.id.to_string(),
                    policy.rank.tier.to_string(),
                    policy.rank.priority.to_string(),
                    policy.rules(direction).map_or(0, <[_]>::len).to_string(),
                ]);
            }
            let set = here.map(|e| match direction {
                Direction::Ingress => e.ingress_set,
                Direction::Egress => e.egress_set,
            });
            let (set, entries) = match set {
                None => ("enforced on another node".to_owned(), String::new()),
                Some(SET_ALLOW_ALL) => ("not isolated".to_owned(), "0".to_owned()),
                Some(SET_QUARANTINE) => ("everything is denied".to_owned(), "0".to_owned()),
                Some(id) => {
                    let keys: Vec<_> = self.image.policy.of_set(id).map(|(key, _)| key).collect();
                    let classes: BTreeSet<u32> = keys.iter().map(|key| key.class).collect();
                    let bytes =
                        keys.len() * size_of::<(hachi_abi::PolicyKey, hachi_abi::PolicyEntry)>();
                    (
                        format!(
                            "set {id:08x}: {} classes of peers, {bytes} bytes",
                            classes.len()
                        ),
                        keys.len().to_string(),
                    )
                }
            };
            rows.push(vec![
                word.to_owned(),
                set,
                "=".into(),
                String::new(),
                entries,
            ]);
        }
        Reply::Table {
            columns: [
                "direction",
                "policy",
                "tier",
                "priority",
                "rules or entries",
            ]
            .map(str::to_owned)
            .to_vec(),
            rows,
        }
    }
}
