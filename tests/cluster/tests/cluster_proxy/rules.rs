//! What Kubernetes says that a Service does: rules over endpoints, and the states that they are asked
//! about. Written from the documentation, and checked against columns that were filled in by hand:
//! - "Virtual IPs and Service Proxies": Traffic policies, Traffic to terminating endpoints;
//! - "EndpointSlices": Conditions; "Topology Aware Routing";
//! - the field descriptions of ServiceSpec.

use std::collections::BTreeSet;

/// What is to come of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Each of these Pods answers, and no other.
    Backends(BTreeSet<&'static str>),
    /// A reset or an ICMP error.
    Reject,
    /// Silence.
    Drop,
}

/// An endpoint, as in `p1`, `q1!` or `p1@node1`: `p1` and `p2` are on node1, `q1` and `q2` on node2. It
/// is ready, or `!` terminating and serving, `x` terminating and not serving, `-` not ready; `@NODE` is
/// a hint for a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Endpoint {
    pub(crate) pod: &'static str,
    pub(crate) node: &'static str,
    pub(crate) ready: bool,
    pub(crate) serving: bool,
    pub(crate) terminating: bool,
    pub(crate) hint: Option<&'static str>,
}

pub(crate) fn endpoints(text: &'static str) -> Vec<Endpoint> {
    text.split_whitespace().map(endpoint).collect()
}

fn endpoint(text: &'static str) -> Endpoint {
    let (pod, rest) = text.split_at(2);
    let (condition, hint) = match rest.split_once('@') {
        Some((condition, hint)) => (condition, Some(hint)),
        None => (rest, None),
    };
    let (ready, serving, terminating) = match condition {
        "" => (true, true, false),
        "!" => (false, true, true),
        "x" => (false, false, true),
        "-" => (false, false, false),
        other => panic!("no such condition: {other}"),
    };
    let node = if pod.starts_with('p') {
        "node1"
    } else {
        "node2"
    };
    Endpoint {
        pod,
        node,
        ready,
        serving,
        terminating,
        hint,
    }
}

/// Those that get traffic: the ready ones; if there is none, those that still serve while they
/// terminate.
fn usable(endpoints: &[Endpoint]) -> Vec<Endpoint> {
    let those = |is: fn(&Endpoint) -> bool| -> Vec<Endpoint> {
        endpoints.iter().copied().filter(is).collect()
    };
    let ready = those(|e| e.ready);
    if ready.is_empty() {
        those(|e| e.serving && e.terminating)
    } else {
        ready
    }
}

/// The policy Cluster: every usable endpoint. Hints count if every ready endpoint has them and one is
/// for the node that asks.
pub(crate) fn cluster(endpoints: &[Endpoint], node: &str) -> Expected {
    let usable = usable(endpoints);
    let hinted = usable.iter().all(|e| e.ready && e.hint.is_some());
    let preferred: BTreeSet<_> = usable
        .iter()
        .filter(|e| hinted && e.hint == Some(node))
        .map(|e| e.pod)
        .collect();
    if !preferred.is_empty() {
        return Expected::Backends(preferred);
    }
    let all: BTreeSet<_> = usable.iter().map(|e| e.pod).collect();
    if all.is_empty() {
        Expected::Reject
    } else {
        Expected::Backends(all)
    }
}

/// The policy Local: the usable ones of the node, decided among those alone. Without any: dropped where
/// others have some, rejected where nobody has.
pub(crate) fn local(endpoints: &[Endpoint], node: &str) -> Expected {
    let here: Vec<_> = endpoints
        .iter()
        .copied()
        .filter(|e| e.node == node)
        .collect();
    let here: BTreeSet<_> = usable(&here).iter().map(|e| e.pod).collect();
    if !here.is_empty() {
        Expected::Backends(here)
    } else if usable(endpoints).is_empty() {
        Expected::Reject
    } else {
        Expected::Drop
    }
}

/// Endpoints, and by hand what both policies make of them on node1.
pub(crate) const STATES: [(&str, &str, &str); 20] = [
    // Every ready endpoint; with Local those of the node.
    ("p1 p2 q1 q2", "p1 p2 q1 q2", "p1 p2"),
    ("p1 q1", "p1 q1", "p1"),
    ("p1 p2", "p1 p2", "p1 p2"),
    ("p1", "p1", "p1"),
    // Local with endpoints on other nodes alone: dropped.
    ("q1 q2", "q1 q2", "drop"),
    ("q1", "q1", "drop"),
    // No endpoint: rejected.
    ("", "reject", "reject"),
    // What is not ready gets nothing.
    ("p1- q1-", "reject", "reject"),
    ("p1- q1", "q1", "drop"),
    ("p1- p2 q1-", "p2", "p2"),
    // Terminating endpoints that serve are used when no ready one is left, in each scope by itself.
    ("p1! q1!", "p1 q1", "p1"),
    ("p1! q1", "q1", "p1"),
    ("p1 q1!", "p1", "p1"),
    ("p1! p2 q1", "p2 q1", "p2"),
    ("q1! q2!", "q1 q2", "drop"),
    // Those that do not serve are not.
    ("p1x q1x", "reject", "reject"),
    ("p1x q1", "q1", "drop"),
    // Hints count if every ready endpoint has them and one is for us; Local does not ask.
    ("p1@node1 q1@node2", "p1", "p1"),
    ("p1@node1 q1", "p1 q1", "p1"),
    ("q1@node2 q2@node2", "q1 q2", "drop"),
];

#[test]
fn the_rules_are_what_was_written_by_hand() {
    let read = |text: &'static str| match text {
        "reject" => Expected::Reject,
        "drop" => Expected::Drop,
        pods => Expected::Backends(pods.split_whitespace().collect()),
    };
    for (text, in_cluster, on_node) in STATES {
        let state = endpoints(text);
        assert_eq!(cluster(&state, "node1"), read(in_cluster), "{text:?}");
        assert_eq!(local(&state, "node1"), read(on_node), "{text:?}");
    }
}
