//! Services, as the documentation of Kubernetes has them: source x kind of address x traffic policies x
//! state of the endpoints, each with the backends that answer and the client's address that they see,
//! or a reject, or silence. `rules.rs` has the rules, and where they are written.
//!
//! Packets arrive at node1: sent by Pods, by a process of the node, by a Pod of the other node to an
//! address of node1, or by a host outside that takes node1 for its router. All Services of a table are
//! there at once, with slices that are written by hand, so that any state can be had of the same four
//! Pods.

mod ask;
mod objects;
mod rules;
mod special;

use std::{fmt::Write as _, net::IpAddr};

use anyhow::{Result, ensure};
use hachi_cluster::{
    Family,
    Protocol::{self, Http, Sctp, Udp},
    Target,
    bed::Bed,
    both_families,
};

use crate::{
    ask::{End, Question, Source, all_hold},
    objects::{Block, Listed, PORTS, outer},
    rules::{Expected, STATES, cluster, endpoints, local},
    special::the_rest,
};

/// The addresses that a Service is asked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    ClusterIp,
    NodePort,
    External,
    LoadBalancer,
}

const KINDS: [Kind; 4] = [
    Kind::ClusterIp,
    Kind::NodePort,
    Kind::External,
    Kind::LoadBalancer,
];

const SOURCES: [Source; 6] = [
    Source::Pod("b/client"),
    // It may be the backend itself.
    Source::Pod("a/p1"),
    Source::Sockets("b/client"),
    Source::Node("node1"),
    Source::Pod("b/far"),
    Source::Outside,
];

/// Whose Service: `internalTrafficPolicy` and `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Policies {
    internal_local: bool,
    external_local: bool,
}

/// Both alike in every state; one each in some.
fn policies(state: usize) -> Vec<Policies> {
    let mut all = vec![(false, false), (true, true)];
    if [1, 5, 10].contains(&state) {
        all.extend([(true, false), (false, true)]);
    }
    let each = |(internal_local, external_local)| Policies {
        internal_local,
        external_local,
    };
    all.into_iter().map(each).collect()
}

fn services() -> Vec<(usize, Policies)> {
    (0..STATES.len())
        .flat_map(|state| policies(state).into_iter().map(move |it| (state, it)))
        .collect()
}

fn word(local: bool) -> &'static str {
    if local { "Local" } else { "Cluster" }
}

fn name((state, policies): (usize, Policies)) -> String {
    let (internal, external) = (word(policies.internal_local), word(policies.external_local));
    format!("s{state}-{internal}-{external}").to_lowercase()
}

/// Who is asked, seen from a source; none where the packet would not come to node1.
fn expected(source: Source, kind: Kind, state: usize, policies: Policies) -> Option<Expected> {
    let state = endpoints(STATES[state].0);
    let by_policy = |bound: bool, node| {
        if bound {
            local(&state, node)
        } else {
            cluster(&state, node)
        }
    };
    Some(match (source, kind) {
        // A ClusterIP is the cluster's own affair, and internalTrafficPolicy binds it, on the node
        // of the client.
        (Source::Outside, Kind::ClusterIp) => return None,
        (Source::Pod("b/far"), Kind::ClusterIp) => by_policy(policies.internal_local, "node2"),
        (_, Kind::ClusterIp) => by_policy(policies.internal_local, "node1"),
        // externalTrafficPolicy binds what comes from outside. A client in the cluster "may need to
        // take traffic policy into account when picking a node" for its node port.
        (Source::Outside, _) | (Source::Pod("b/far"), Kind::NodePort) => {
            by_policy(policies.external_local, "node1")
        }
        // From inside an outer address leads to every endpoint, also with Local.
        (Source::Pod("b/far"), _) => cluster(&state, "node2"),
        (_, _) => cluster(&state, "node1"),
    })
}

/// Whom a backend may take for its client: the client's own address is kept wherever it can be.
fn client(bed: &Bed, source: Source, backend: &str, to: Target) -> Result<Vec<IpAddr>> {
    let node = |name| bed.cluster.node_ip(name);
    let elsewhere = || Ok::<_, anyhow::Error>(bed.cluster.pod(backend)?.node != "node1");
    let at_node = to.address.ip() == node("node1")?;
    Ok(vec![match source {
        // A Pod that reaches itself sees the Service's, so that its answers leave it.
        Source::Pod(pod) if bed.full(pod) == backend && pod != "b/far" => to.address.ip(),
        // What node1 sends on to another node must come back to node1.
        Source::Pod("b/far") if at_node && elsewhere()? => node("node1")?,
        Source::Outside if elsewhere()? => node("node1")?,
        Source::Pod(pod) | Source::Sockets(pod) => bed.cluster.pod_ip(&bed.full(pod))?,
        Source::Node(name) | Source::Host(name) => node(name)?,
        Source::Outside => objects::outside(bed)?,
    }])
}

/// The Services of the table; their status has the load balancers' addresses.
fn manifest(family: Family) -> Result<String> {
    let mut manifest = String::new();
    for (number, service) in services().into_iter().enumerate() {
        let external = outer(family, Block::External, 1 + number)?;
        let balanced = outer(family, Block::Balanced, 1 + number)?;
        let _ = write!(
            manifest,
            "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: $a}}
spec:
  type: LoadBalancer
  internalTrafficPolicy: {internal}
  externalTrafficPolicy: {external_policy}
  externalIPs: ['{external}']
{PORTS}status: {{loadBalancer: {{ingress: [{{ip: '{balanced}', ipMode: VIP}}]}}}}
",
            name = name(service),
            internal = word(service.1.internal_local),
            external_policy = word(service.1.external_local),
        );
    }
    Ok(manifest)
}

/// Protocols in turn, so that each meets every kind, state and source.
fn protocol(turn: usize, source: Source, expected: &Expected) -> Protocol {
    match turn % 3 {
        0 => Http,
        1 => Udp,
        // Sockets are not balanced for SCTP, and raw packets do not tell a reject from silence.
        _ if matches!(source, Source::Node(_) | Source::Sockets(_)) => Http,
        _ if matches!(expected, Expected::Backends(_)) => Sctp,
        _ => Http,
    }
}

fn questions(bed: &Bed, listed: &Listed, sources: &[Source]) -> Result<Vec<Question>> {
    let family = objects::family(bed);
    let node = bed.cluster.node_ip("node1")?;
    let mut questions = Vec::new();
    for (number, service) in services().into_iter().enumerate() {
        let (state, policies) = service;
        let name = name(service);
        for (at, kind) in KINDS.into_iter().enumerate() {
            for (from, source) in sources.iter().copied().enumerate() {
                let Some(expected) = expected(source, kind, state, policies) else {
                    continue;
                };
                let protocol = protocol(number + at + from, source, &expected);
                let port = match protocol {
                    Udp => "udp",
                    Sctp => "sctp",
                    _ => "tcp",
                };
                let (ip, port) = match kind {
                    Kind::ClusterIp => (listed.cluster_ip(&name)?, 8080),
                    Kind::NodePort => (node, listed.node_port(&name, port)?),
                    Kind::External => (outer(family, Block::External, 1 + number)?, 8080),
                    Kind::LoadBalancer => (outer(family, Block::Balanced, 1 + number)?, 8080),
                };
                let end = match expected {
                    Expected::Backends(pods) => {
                        let full = |pod| bed.full(&format!("a/{pod}"));
                        End::All(pods.into_iter().map(full).collect(), client)
                    }
                    Expected::Reject => End::Reject,
                    Expected::Drop => End::Drop,
                };
                questions.push(Question {
                    what: format!("{kind:?} {name}, endpoints {:?}", STATES[state].0),
                    source,
                    to: Target::new(protocol, ip, port),
                    end,
                });
            }
        }
    }
    Ok(questions)
}

fn the_table(bed: &Bed) -> Result<()> {
    // One test of this cluster does without, and must not leave it so.
    let status = bed.cluster.wait_agent("node1")?;
    ensure!(status.socket_lb == "all", "{}", status.socket_lb);
    let questions = asked_by(bed, &SOURCES)?;
    ensure!(questions.len() >= 200, "{} rows", questions.len());
    all_hold(bed, &questions)
}

/// A process of the node reaches the same where no socket program serves it.
fn the_node_by_packets(bed: &Bed) -> Result<()> {
    let agent = |options: &[&str]| {
        bed.cluster.kill_agent("node1")?;
        bed.cluster.start_agent_with("node1", options)?;
        bed.cluster.wait_agent("node1")
    };
    let result = agent(&["--socket-lb", "off"]).and_then(|_| {
        let questions = asked_by(bed, &[Source::Host("node1")])?;
        all_hold(bed, &questions)
    });
    // The other tests are about sockets too.
    let restored = agent(&[]);
    result?;
    restored.map(drop)
}

/// Makes the Services of the table, and the questions of these sources to them.
fn asked_by(bed: &Bed, sources: &[Source]) -> Result<Vec<Question>> {
    objects::pods(bed)?;
    objects::route_outside(bed)?;
    let services_ = manifest(objects::family(bed))?.replace("$a", &bed.namespace("a"));
    bed.apply(&services_)?;
    bed.cluster.replace_status(&services_)?;
    let slices: Vec<String> = services()
        .into_iter()
        .map(|service| objects::slice(bed, &name(service), &endpoints(STATES[service.0].0)))
        .collect::<Result<_>>()?;
    bed.apply(&slices.concat())?;
    questions(bed, &Listed::get(bed)?, sources)
}

both_families!(the_table, the_rest, the_node_by_packets);
