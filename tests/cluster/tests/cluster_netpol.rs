//! The behaviours that Kubernetes' own NetworkPolicy suite (test/e2e/network/netpol) asks of every
//! implementation, with real traffic: nine Pods in three namespaces on two nodes, and who reaches
//! whom after each step, compared with a truth table. Pods' names: `x/a` is Pod `a` of namespace `x`.
//!
//! | | behaviour | | behaviour |
//! |---|---|---|---|
//! | 1 | default-deny ingress | 25 | no egress from some Pods |
//! | 2 | default-deny in both directions | 26 | no egress from a namespace |
//! | 3 | ingress from Pods of the own namespace by label | 27 | ingress and egress in one policy |
//! | 4 | ingress allowed for one Pod of a denied namespace | 28 | egress denied although the server allows it |
//! | 5 | ingress from all namespaces | 29 | egress to one Pod of another namespace |
//! | 6 | ingress from another namespace only | 30 | any port of one protocol |
//! | 7 | a podSelector with matchExpressions | 31 | an allow-all beside a narrower ingress policy |
//! | 8 | a namespaceSelector with matchExpressions | 32 | an allow-all beside a narrower egress policy |
//! | 9 | a podSelector or a namespaceSelector | 33 | a policy that is deleted |
//! | 10 | a podSelector and a namespaceSelector | 34 | egress to a block |
//! | 11 | several selectors of both kinds in one peer | 35 | egress to a block with an exception |
//! | 12 | any of several podSelectors | 36 | an exception of one policy that another one allows |
//! | 13 | one Pod of another namespace | 37 | ingress and egress controlled independently |
//! | 14 | ports | 38 | SCTP is not taken for TCP |
//! | 15 | stacked policies over the same Pods | 39 | a policy that allows SCTP isolates |
//! | 16 | allow-all | 40 | UDP is not taken for TCP |
//! | 17 | ingress on a named port | 41 | matchLabels on the name of a namespace |
//! | 18 | ingress from a namespace on a named port | 42 | matchExpressions on the name of a namespace |
//! | 19 | egress on a named port | 43 | UDP: default-deny ingress |
//! | 20 | a policy that is updated | 44 | UDP: ports |
//! | 21 | ingress from a namespace once it has a label | 45 | UDP: one Pod of another namespace |
//! | 22 | ingress from a Pod once it has a label | 46 | SCTP: default-deny ingress |
//! | 23 | no ingress from other namespaces | 47 | SCTP: ports |
//! | 24 | no ingress to a Pod once it has a label | 48 | SCTP: one Pod of another namespace |

use anyhow::{Context as _, Result, ensure};
use hachi_cluster::{
    Family,
    Protocol::{self, Sctp, Tcp, Udp},
    bed::{self, Bed, Spec},
};

type Port = (Protocol, u16);

/// Who reaches whom, on which port.
type Truth = fn(&str, &str, Port) -> bool;

/// What is done, and what is true then.
enum Step {
    /// Namespace, name and spec of a policy that is made or replaced. `@pods` is the block of all
    /// Pods, `@NAMESPACE/POD` that of one.
    Policy(&'static str, &'static str, &'static str),
    /// Arguments of kubectl.
    Kubectl(&'static str),
    /// Everybody asks everybody.
    Expect(Truth),
    /// Arguments of kubectl that take back what outlives the policies.
    Undo(&'static str),
}
use Step::{Expect, Kubectl, Policy, Undo};

struct Behaviour {
    name: &'static str,
    ports: &'static [Port],
    steps: &'static [Step],
}

const PODS: [&str; 9] = [
    "x/a", "x/b", "x/c", "y/a", "y/b", "y/c", "z/a", "z/b", "z/c",
];

fn ns(pod: &str) -> &str {
    pod.split('/').next().unwrap_or(pod)
}

fn pod(pod: &str) -> &str {
    pod.split('/').nth(1).unwrap_or(pod)
}

#[rustfmt::skip]
const BEHAVIOURS: [Behaviour; 48] = [
    Behaviour {
        name: "default-deny ingress",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "deny",
                "{podSelector: {}, policyTypes: [Ingress]}"),
            Expect(|_, to, _| ns(to) != "x"),
        ],
    },
    Behaviour {
        name: "default-deny in both directions",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "deny",
                "{podSelector: {}, policyTypes: [Ingress, Egress]}"),
            Expect(|from, to, _| ns(from) != "x" && ns(to) != "x"),
        ],
    },
    Behaviour {
        name: "ingress from Pods of the own namespace by label",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}"),
            Expect(|from, to, _| to != "x/a" || from == "x/b"),
        ],
    },
    Behaviour {
        name: "ingress allowed for one Pod of a denied namespace",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "deny",
                "{podSelector: {}, policyTypes: [Ingress]}"),
            Expect(|_, to, _| ns(to) != "x"),
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {}, namespaceSelector: {}}]}]}"),
            Expect(|_, to, _| ns(to) != "x" || to == "x/a"),
        ],
    },
    Behaviour {
        name: "ingress from all namespaces",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {}}]}]}"),
            Expect(|_, _, _| true),
        ],
    },
    Behaviour {
        name: "ingress from another namespace only",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}}]}]}"),
            Expect(|from, to, _| to != "x/a" || ns(from) == "y"),
        ],
    },
    Behaviour {
        name: "a podSelector with matchExpressions",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchExpressions: [{key: pod, operator: In, values: [b]}]}}]}]}"),
            Expect(|from, to, _| to != "x/a" || from == "x/b"),
        ],
    },
    Behaviour {
        name: "a namespaceSelector with matchExpressions",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: In, values: ['y']}]}}]}]}"),
            Expect(|from, to, _| to != "x/a" || ns(from) == "y"),
        ],
    },
    Behaviour {
        name: "a podSelector or a namespaceSelector",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}}, {podSelector: {matchLabels: {pod: b}}}]}]}"),
            Expect(|from, to, _| to != "x/a" || ns(from) != "x" || from == "x/b"),
        ],
    },
    Behaviour {
        name: "a podSelector and a namespaceSelector",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}, podSelector: {matchLabels: {pod: b}}}]}]}"),
            Expect(|from, to, _| to != "x/a" || ns(from) != "x" && pod(from) == "b"),
        ],
    },
    Behaviour {
        name: "several selectors of both kinds in one peer",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}, podSelector: {matchExpressions: [{key: pod, operator: In, values: [b, c]}]}}]}]}"),
            Expect(|from, to, _| to != "x/a" || ns(from) != "x" && pod(from) != "a"),
        ],
    },
    Behaviour {
        name: "any of several podSelectors",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}, {podSelector: {matchLabels: {pod: c}}}]}]}"),
            Expect(|from, to, _| to != "x/a" || ["x/b", "x/c"].contains(&from)),
        ],
    },
    Behaviour {
        name: "one Pod of another namespace",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}, podSelector: {matchLabels: {pod: a}}}]}]}"),
            Expect(|from, to, _| to != "x/a" || from == "y/a"),
        ],
    },
    Behaviour {
        name: "ports",
        ports: &[(Tcp, 80), (Tcp, 81)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}}], ports: [{port: 81}]}]}"),
            Expect(|from, to, port| to != "x/a" || ns(from) == "y" && port.1 == 81),
        ],
    },
    Behaviour {
        name: "stacked policies over the same Pods",
        ports: &[(Tcp, 80), (Tcp, 81)],
        steps: &[
            Policy("x", "first",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}}], ports: [{port: 81}]}]}"),
            Expect(|from, to, port| to != "x/a" || ns(from) == "y" && port.1 == 81),
            Policy("x", "second",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}}], ports: [{port: 80}]}]}"),
            Expect(|from, to, _| to != "x/a" || ns(from) == "y"),
        ],
    },
    Behaviour {
        name: "allow-all",
        ports: &[(Tcp, 80), (Tcp, 81)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {}, policyTypes: [Ingress], ingress: [{}]}"),
            Expect(|_, _, _| true),
        ],
    },
    Behaviour {
        name: "ingress on a named port",
        ports: &[(Tcp, 80), (Tcp, 81)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{ports: [{port: serve-81-tcp}]}]}"),
            Expect(|_, to, port| to != "x/a" || port.1 == 81),
        ],
    },
    Behaviour {
        name: "ingress from a namespace on a named port",
        ports: &[(Tcp, 80), (Tcp, 81)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}}], ports: [{port: serve-80-tcp}]}]}"),
            Expect(|from, to, port| to != "x/a" || ns(from) == "y" && port.1 == 80),
        ],
    },
    Behaviour {
        name: "egress on a named port",
        ports: &[(Tcp, 80), (Tcp, 81)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{ports: [{port: serve-80-tcp}]}]}"),
            Expect(|from, _, port| from != "x/a" || port.1 == 80),
        ],
    },
    Behaviour {
        name: "a policy that is updated",
        ports: &[(Tcp, 81)],
        steps: &[
            Policy("x", "policy",
                "{podSelector: {}, policyTypes: [Ingress], ingress: [{}]}"),
            Expect(|_, _, _| true),
            Policy("x", "policy",
                "{podSelector: {}, policyTypes: [Ingress], ingress: []}"),
            Expect(|_, to, _| ns(to) != "x"),
        ],
    },
    Behaviour {
        name: "ingress from a namespace once it has a label",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns2: updated}}}]}]}"),
            Expect(|_, to, _| to != "x/a"),
            Kubectl("label namespace $y ns2=updated"),
            Expect(|from, to, _| to != "x/a" || ns(from) == "y"),
            Undo("label namespace $y ns2-"),
        ],
    },
    Behaviour {
        name: "ingress from a Pod once it has a label",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {pod: b, pod2: updated}}}]}]}"),
            Expect(|_, to, _| to != "x/a"),
            Kubectl("label pod b -n $x pod2=updated"),
            Expect(|from, to, _| to != "x/a" || from == "x/b"),
            Undo("label pod b -n $x pod2-"),
        ],
    },
    Behaviour {
        name: "no ingress from other namespaces",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "own",
                "{podSelector: {}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {}}]}]}"),
            Expect(|from, to, _| ns(to) != "x" || ns(from) == "x"),
        ],
    },
    Behaviour {
        name: "no ingress to a Pod once it has a label",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "deny",
                "{podSelector: {matchLabels: {target: isolated}}, policyTypes: [Ingress]}"),
            Expect(|_, _, _| true),
            Kubectl("label pod a -n $x target=isolated"),
            Expect(|_, to, _| to != "x/a"),
            Undo("label pod a -n $x target-"),
        ],
    },
    Behaviour {
        name: "no egress from some Pods",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "deny",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress]}"),
            Expect(|from, _, _| from != "x/a"),
        ],
    },
    Behaviour {
        name: "no egress from a namespace",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "deny",
                "{podSelector: {}, policyTypes: [Egress]}"),
            Expect(|from, _, _| ns(from) != "x"),
        ],
    },
    Behaviour {
        name: "ingress and egress in one policy",
        ports: &[(Tcp, 80), (Tcp, 81)],
        steps: &[
            Policy("x", "both",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}], egress: [{ports: [{port: 80}]}]}"),
            Expect(|from, to, port| (to != "x/a" || from == "x/b") && (from != "x/a" || port.1 == 80)),
        ],
    },
    Behaviour {
        name: "egress denied although the server allows it",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "egress",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {ns: 'y'}}, podSelector: {matchLabels: {pod: a}}}]}]}"),
            Policy("y", "in-a",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: x}}, podSelector: {matchLabels: {pod: a}}}]}]}"),
            Policy("y", "in-b",
                "{podSelector: {matchLabels: {pod: b}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: x}}, podSelector: {matchLabels: {pod: a}}}]}]}"),
            Expect(|from, to, _| { (from != "x/a" || to == "y/a") && (!["y/a", "y/b"].contains(&to) || from == "x/a") }),
        ],
    },
    Behaviour {
        name: "egress to one Pod of another namespace",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {ns: 'y'}}, podSelector: {matchLabels: {pod: a}}}]}]}"),
            Expect(|from, to, _| from != "x/a" || to == "y/a"),
        ],
    },
    Behaviour {
        name: "any port of one protocol",
        ports: &[(Tcp, 80), (Udp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{ports: [{protocol: TCP}]}]}"),
            Expect(|_, to, port| to != "x/a" || port.0 == Tcp),
        ],
    },
    Behaviour {
        name: "an allow-all beside a narrower ingress policy",
        ports: &[(Tcp, 81)],
        steps: &[
            Policy("x", "narrow",
                "{podSelector: {}, policyTypes: [Ingress], ingress: [{ports: [{port: 80}]}]}"),
            Expect(|_, to, _| ns(to) != "x"),
            Policy("x", "all",
                "{podSelector: {}, policyTypes: [Ingress], ingress: [{}]}"),
            Expect(|_, _, _| true),
        ],
    },
    Behaviour {
        name: "an allow-all beside a narrower egress policy",
        ports: &[(Tcp, 81)],
        steps: &[
            Policy("x", "narrow",
                "{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: 80}]}]}"),
            Expect(|from, _, _| ns(from) != "x"),
            Policy("x", "all",
                "{podSelector: {}, policyTypes: [Egress], egress: [{}]}"),
            Expect(|_, _, _| true),
        ],
    },
    Behaviour {
        name: "a policy that is deleted",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "deny",
                "{podSelector: {}, policyTypes: [Ingress, Egress]}"),
            Expect(|from, to, _| ns(from) != "x" && ns(to) != "x"),
            Kubectl("delete networkpolicy deny -n $x"),
            Expect(|_, _, _| true),
        ],
    },
    Behaviour {
        name: "egress to a block",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: '@y/b'}}]}]}"),
            Expect(|from, to, _| from != "x/a" || to == "y/b"),
        ],
    },
    Behaviour {
        name: "egress to a block with an exception",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: '@pods', except: ['@x/b']}}]}]}"),
            Expect(|from, to, _| from != "x/a" || to != "x/b"),
        ],
    },
    Behaviour {
        name: "an exception of one policy that another one allows",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: '@pods', except: ['@x/b']}}]}]}"),
            Expect(|from, to, _| from != "x/a" || to != "x/b"),
            Policy("x", "more",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: '@x/b'}}]}]}"),
            Expect(|_, _, _| true),
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: '@x/b'}}]}]}"),
            Expect(|from, to, _| from != "x/a" || to == "x/b"),
        ],
    },
    Behaviour {
        name: "ingress and egress controlled independently",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "egress",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{}]}"),
            Expect(|_, _, _| true),
            Policy("x", "ingress",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress]}"),
            Expect(|_, to, _| to != "x/a"),
        ],
    },
    Behaviour {
        name: "SCTP is not taken for TCP",
        ports: &[(Tcp, 81), (Sctp, 81)],
        steps: &[
            Policy("x", "deny",
                "{podSelector: {}, policyTypes: [Ingress]}"),
            Expect(|_, to, _| ns(to) != "x"),
            Policy("x", "sctp",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{ports: [{protocol: SCTP, port: 81}]}]}"),
            Expect(|_, to, port| ns(to) != "x" || to == "x/a" && port.0 == Sctp),
        ],
    },
    Behaviour {
        name: "a policy that allows SCTP isolates",
        ports: &[(Tcp, 81), (Sctp, 80)],
        steps: &[
            Policy("x", "sctp",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{ports: [{protocol: SCTP, port: 80}]}]}"),
            Expect(|_, to, port| to != "x/a" || port.0 == Sctp),
        ],
    },
    Behaviour {
        name: "UDP is not taken for TCP",
        ports: &[(Tcp, 81), (Udp, 81)],
        steps: &[
            Policy("x", "udp",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{ports: [{protocol: UDP, port: 81}]}]}"),
            Expect(|_, to, port| to != "x/a" || port.0 == Udp),
        ],
    },
    Behaviour {
        name: "matchLabels on the name of a namespace",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: $y}}}]}]}"),
            Expect(|from, to, _| to != "x/a" || ns(from) == "y"),
        ],
    },
    Behaviour {
        name: "matchExpressions on the name of a namespace",
        ports: &[(Tcp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [$y]}]}}]}]}"),
            Expect(|from, to, _| from != "x/a" || ns(to) != "y"),
        ],
    },
    Behaviour {
        name: "UDP: default-deny ingress",
        ports: &[(Udp, 80)],
        steps: &[
            Policy("x", "deny",
                "{podSelector: {}, policyTypes: [Ingress]}"),
            Expect(|_, to, _| ns(to) != "x"),
        ],
    },
    Behaviour {
        name: "UDP: ports",
        ports: &[(Udp, 80), (Udp, 81)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}}], ports: [{protocol: UDP, port: 81}]}]}"),
            Expect(|from, to, port| to != "x/a" || ns(from) == "y" && port.1 == 81),
        ],
    },
    Behaviour {
        name: "UDP: one Pod of another namespace",
        ports: &[(Udp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}, podSelector: {matchLabels: {pod: a}}}]}]}"),
            Expect(|from, to, _| to != "x/a" || from == "y/a"),
        ],
    },
    Behaviour {
        name: "SCTP: default-deny ingress",
        ports: &[(Sctp, 80)],
        steps: &[
            Policy("x", "deny",
                "{podSelector: {}, policyTypes: [Ingress]}"),
            Expect(|_, to, _| ns(to) != "x"),
        ],
    },
    Behaviour {
        name: "SCTP: ports",
        ports: &[(Sctp, 80), (Sctp, 81)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}}], ports: [{protocol: SCTP, port: 81}]}]}"),
            Expect(|from, to, port| to != "x/a" || ns(from) == "y" && port.1 == 81),
        ],
    },
    Behaviour {
        name: "SCTP: one Pod of another namespace",
        ports: &[(Sctp, 80)],
        steps: &[
            Policy("x", "allow",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}, podSelector: {matchLabels: {pod: a}}}]}]}"),
            Expect(|from, to, _| to != "x/a" || from == "y/a"),
        ],
    },
];

fn grid(bed: &Bed) -> Result<()> {
    let ports = "{name: serve-80-tcp, containerPort: 80}, {name: serve-81-tcp, containerPort: 81},
        {name: serve-80-sctp, containerPort: 80, protocol: SCTP},
        {name: serve-81-sctp, containerPort: 81, protocol: SCTP}";
    let mut specs = Vec::new();
    for namespace in ["x", "y", "z"] {
        for (name, labels, node) in [
            ("a", "pod: a", "node1"),
            ("b", "pod: b", "node2"),
            ("c", "pod: c", "node1"),
        ] {
            specs.push(Spec {
                namespace,
                name,
                labels,
                node,
                ports,
            });
        }
    }
    bed.pods(&specs)
}

/// A policy's spec with real blocks in it.
fn with_blocks(bed: &Bed, spec: &str) -> Result<String> {
    let mut spec = spec.to_owned();
    for pod in PODS {
        let ip = bed.cluster.pod_ip(&bed.full(pod))?;
        let (one, all) = if ip.is_ipv4() {
            (format!("{ip}/32"), "10.244.0.0/16")
        } else {
            (format!("{ip}/128"), "fd00:10:244::/48")
        };
        spec = spec.replace("@pods", all).replace(&format!("@{pod}"), &one);
    }
    Ok(spec)
}

fn check(bed: &Bed, behaviour: &Behaviour) -> Result<()> {
    let mut step = 0;
    for what in behaviour.steps {
        match what {
            Policy(namespace, name, spec) => {
                let spec = with_blocks(bed, spec)?;
                bed.apply(&format!(
                    "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                     metadata: {{name: {name}, namespace: ${namespace}}}\nspec: {spec}\n"
                ))?;
            }
            Kubectl(arguments) => drop(bed.kubectl(arguments)?),
            Expect(truth) => {
                step += 1;
                bed.matrix(&PODS, behaviour.ports, truth)
                    .with_context(|| format!("step {step}"))?;
            }
            Undo(_) => {}
        }
    }
    Ok(())
}

fn every_behaviour(bed: &Bed) -> Result<()> {
    grid(bed)?;
    let ports = [
        (Tcp, 80),
        (Tcp, 81),
        (Udp, 80),
        (Udp, 81),
        (Sctp, 80),
        (Sctp, 81),
    ];
    bed.matrix(&PODS, &ports, |_, _, _| true)
        .context("without policies")?;
    let mut failed = Vec::new();
    for behaviour in &BEHAVIOURS {
        if let Err(error) = check(bed, behaviour) {
            failed.push(format!("{}: {error:#}", behaviour.name));
        }
        for step in behaviour.steps {
            if let Undo(arguments) = step {
                bed.kubectl(arguments)?;
            }
        }
        bed.kubectl("delete networkpolicy --all --all-namespaces")?;
    }
    ensure!(
        failed.is_empty(),
        "{} of {} behaviours:\n{}",
        failed.len(),
        BEHAVIOURS.len(),
        failed.join("\n")
    );
    bed.matrix(&PODS, &ports, |_, _, _| true)
        .context("without policies again")
}

#[test]
fn the_upstream_behaviours_v4() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    bed::run_in("netpol", Family::V4, &["x", "y", "z"], every_behaviour);
}

#[test]
fn the_upstream_behaviours_v6() {
    hachi_testutil::require_root!();
    hachi_testutil::require_binaries!("hachi-cni", "hachi-agent");
    bed::run_in("netpol", Family::V6, &["x", "y", "z"], every_behaviour);
}
