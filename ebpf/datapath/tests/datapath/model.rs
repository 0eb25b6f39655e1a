//! Random histories of flows, against a plain list of flows.
//!
//! The model knows what the words mean (who talks to whom, which address stands for whom), and
//! nothing of entries, halves or keys. Flows are of UDP, so that only policy and tuples matter.

use std::collections::{BTreeMap, BTreeSet};

use hachi_abi::{Reason, Verdict};
use hachi_datapath::{Outcome, V4, V6};
use proptest::prelude::*;

use crate::{
    lab::{
        CLIENT, Lab, Net, OTHER, PORT, REMOTE, SERVER, SERVICE, SERVICE_PORT, SERVICE_TWO, UDP,
        class,
    },
    wire::{self, View},
};

const PODS: [u8; 3] = [CLIENT, SERVER, OTHER];
const PEERS: [u8; 4] = [CLIENT, SERVER, OTHER, REMOTE];
const TARGETS: [u8; 6] = [CLIENT, SERVER, OTHER, REMOTE, SERVICE, SERVICE_TWO];
/// Source ports; one of them is also where Pods are reached.
const PORTS: [u16; 3] = [40_000, 40_001, PORT];
/// The ports that flows are given whose own is in use; one of them is somebody's own.
const RANGE: (u16, u16) = (40_001, 40_003);

#[derive(Clone, Debug)]
enum Step {
    /// A peer sends to a target.
    Send { from: usize, to: usize, port: usize },
    /// A flow's opener sends again.
    Again { flow: usize },
    /// A flow's other end answers.
    Answer { flow: usize },
    /// A Pod's policy becomes: none, or these peers.
    Policy {
        pod: usize,
        egress: bool,
        peers: Option<u8>,
    },
    /// A Service's backends become these.
    Backends { second: bool, peers: u8 },
    /// A second passes.
    Wait,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..4_usize, 0..6_usize, 0..3_usize)
            .prop_map(|(from, to, port)| Step::Send { from, to, port }),
        3 => any::<usize>().prop_map(|flow| Step::Again { flow }),
        6 => any::<usize>().prop_map(|flow| Step::Answer { flow }),
        2 => (0..3_usize, any::<bool>(), prop::option::of(0..16_u8))
            .prop_map(|(pod, egress, peers)| Step::Policy { pod, egress, peers }),
        1 => (any::<bool>(), 0..16_u8)
            .prop_map(|(second, peers)| Step::Backends { second, peers }),
        2 => Just(Step::Wait),
    ]
}

fn members(bits: u8) -> Vec<u8> {
    PEERS
        .iter()
        .enumerate()
        .filter(|(i, _)| bits >> i & 1 != 0)
        .map(|(_, peer)| *peer)
        .collect()
}

/// A packet's ends, as anyone on the way sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ends {
    from: (u8, u16),
    to: (u8, u16),
}

impl Ends {
    fn back(self) -> Self {
        Self {
            from: self.to,
            to: self.from,
        }
    }
}

/// A flow: what its opener sends, and what the other end gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    sent: Ends,
    got: Ends,
}

struct Model<const N: usize, F> {
    lab: Lab<N, F>,
    flows: Vec<Flow>,
    policy: BTreeMap<(u8, bool), BTreeSet<u8>>,
    backends: BTreeMap<u8, Vec<u8>>,
}

impl<const N: usize, F: Net<N>> Model<N, F> {
    fn new() -> Self {
        let mut lab = Lab::new();
        lab.tables.ports = RANGE;
        Self {
            lab,
            flows: Vec::new(),
            policy: BTreeMap::new(),
            backends: BTreeMap::new(),
        }
    }

    /// Whether policy lets one peer talk to another.
    fn allowed(&self, from: u8, to: u8) -> bool {
        let side = |pod, egress, peer: u8| {
            self.policy
                .get(&(pod, egress))
                .is_none_or(|peers| peers.contains(&peer))
        };
        from == to || (side(from, true, to) && side(to, false, from))
    }

    /// Whether a flow's opener may still talk to its other end. In a hairpin the two are one.
    fn may(&self, flow: &Flow) -> bool {
        self.allowed(flow.sent.from.0, flow.got.to.0)
    }

    /// Has a packet sent; returns what its receiver gets.
    fn transfer(&mut self, ends: Ends) -> Result<Ends, Reason> {
        let body = wire::udp((ends.from.1, ends.to.1), b"payload");
        let (outcome, after) = if PODS.contains(&ends.from.0) {
            let frame = self.lab.from(ends.from.0, ends.to.0, UDP, &body);
            self.lab.send(&frame)
        } else {
            let frame = self.lab.to(ends.from.0, ends.to.0, UDP, &body);
            self.lab.receive(&frame)
        };
        match outcome {
            Outcome::Drop(reason) => return Err(reason),
            Outcome::Out { .. } => panic!("there are no tunnels, and no Services of the node's"),
            Outcome::Answer => return Err(Reason::Rejected),
            Outcome::Pass(_) | Outcome::Forward | Outcome::RedirectPeer { .. } => {}
        }
        let view: View = after.check();
        let (source, destination) = view.ports();
        let got = Ends {
            from: (view.src[N - 1], source),
            to: (view.dst[N - 1], destination),
        };
        if let Outcome::RedirectPeer { ifindex } = outcome {
            assert_eq!(
                ifindex,
                u32::from(got.to.0) + 10,
                "to another Pod than the packet says"
            );
        }
        Ok(got)
    }

    /// Sends what `ends` says, and checks what comes of it.
    fn send(&mut self, ends: Ends) {
        let opener = self.flows.iter().find(|flow| flow.sent == ends).copied();
        let answer = self
            .flows
            .iter()
            .find(|flow| flow.got.back() == ends)
            .copied();
        let result = self.transfer(ends);
        match (opener, answer) {
            (Some(flow), _) => {
                assert_eq!(result.ok(), self.may(&flow).then_some(flow.got), "{flow:?}");
            }
            (None, Some(flow)) => {
                let expected = self.may(&flow).then_some(flow.sent.back());
                assert_eq!(result.ok(), expected, "the answer of {flow:?}");
            }
            (None, None) => self.opened(ends, result),
        }
    }

    /// Checks what came of a packet that belongs to no flow.
    fn opened(&mut self, sent: Ends, result: Result<Ends, Reason>) {
        let candidates = match self.backends.get(&sent.to.0) {
            Some(backends) => backends.clone(),
            None => vec![sent.to.0],
        };
        let translated = self.backends.contains_key(&sent.to.0);
        let port = if translated { PORT } else { sent.to.1 };
        // What a candidate would answer is what another flow's packets look like.
        let taken = |to: u8, source: u16| {
            // A Pod that is its own backend sees the Service in its own place.
            let client = if translated && to == sent.from.0 {
                sent.to.0
            } else {
                sent.from.0
            };
            let there = Ends {
                from: (client, source),
                to: (to, port),
            };
            let meets =
                |flow: &Flow| flow.got == there || flow.sent == there.back() || flow.sent == there;
            self.flows.iter().any(|flow| {
                if source == sent.from.1 {
                    flow.got == there || flow.sent == there.back()
                } else {
                    meets(flow)
                }
            })
        };
        match result {
            Ok(got) => {
                assert!(candidates.contains(&got.to.0), "{sent:?} became {got:?}");
                assert!(
                    self.allowed(sent.from.0, got.to.0),
                    "{sent:?} to {got:?} is forbidden"
                );
                let clash = |flow: &&Flow| flow.got.back() == got.back() || flow.sent == got.back();
                assert_eq!(
                    self.flows.iter().find(clash),
                    None,
                    "{sent:?} shares answers"
                );
                let client = if translated && got.to.0 == sent.from.0 {
                    sent.to.0
                } else {
                    sent.from.0
                };
                assert_eq!((got.from.0, got.to.1), (client, port), "{sent:?}");
                let own = got.from.1 == sent.from.1;
                assert_eq!(
                    own,
                    !taken(got.to.0, sent.from.1),
                    "{sent:?} became {got:?}"
                );
                assert!(own || (RANGE.0..=RANGE.1).contains(&got.from.1), "{got:?}");
                self.flows.push(Flow { sent, got });
            }
            Err(Reason::Rejected) => assert!(translated && candidates.is_empty()),
            Err(Reason::TupleInUse) => {
                let mut ports = (RANGE.0..=RANGE.1).chain([sent.from.1]);
                assert!(
                    candidates
                        .iter()
                        .any(|to| ports.all(|port| taken(*to, port))),
                    "{sent:?}: {candidates:?}"
                );
            }
            Err(Reason::PolicyEgress | Reason::PolicyIngress) => {
                let forbidden = |to: &u8| !self.allowed(sent.from.0, *to);
                assert!(candidates.iter().any(forbidden), "{sent:?} is allowed");
            }
            Err(reason) => panic!("{sent:?}: {reason:?}"),
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Send { from, to, port } => {
                let (from, to) = (PEERS[from], TARGETS[to]);
                let service = to == SERVICE || to == SERVICE_TWO;
                // From elsewhere only Pods are reached; the stack does not talk to a Service here.
                // A Service that was never set up is an address like any other.
                if from == REMOTE && (service || to == REMOTE)
                    || service && !self.backends.contains_key(&to)
                    || from == to
                {
                    return;
                }
                let to = (to, if service { SERVICE_PORT } else { PORT });
                self.send(Ends {
                    from: (from, PORTS[port]),
                    to,
                });
            }
            Step::Again { flow } if !self.flows.is_empty() => {
                let flow = self.flows[flow % self.flows.len()];
                self.send(flow.sent);
            }
            Step::Answer { flow } if !self.flows.is_empty() => {
                let flow = self.flows[flow % self.flows.len()];
                self.send(flow.got.back());
            }
            Step::Again { .. } | Step::Answer { .. } => {}
            Step::Policy { pod, egress, peers } => self.set_policy(PODS[pod], egress, peers),
            Step::Backends { second, peers } => {
                let service = if second { SERVICE_TWO } else { SERVICE };
                self.backends.insert(service, members(peers));
                self.lab.serve(service, UDP, &members(peers));
            }
            Step::Wait => self.lab.wait(1),
        }
    }

    fn set_policy(&mut self, pod: u8, egress: bool, peers: Option<u8>) {
        match peers {
            Some(bits) => self
                .policy
                .insert((pod, egress), members(bits).into_iter().collect()),
            None => self.policy.remove(&(pod, egress)),
        };
        let set = |pod: u8, egress: bool| u32::from(pod) * 2 + u32::from(egress);
        self.lab.tables.policy.clear();
        for ((pod, egress), peers) in &self.policy {
            for peer in peers {
                self.lab
                    .entry(set(*pod, *egress), class(*peer), UDP, 0, 0, Verdict::Allow);
            }
        }
        let of = |egress| {
            self.policy
                .get(&(pod, egress))
                .map_or(0, |_| set(pod, egress))
        };
        let (ingress, egress) = (of(false), of(true));
        self.lab.isolate(pod, ingress, egress);
    }
}

fn run<const N: usize, F: Net<N>>(steps: &[Step]) {
    let mut model = Model::<N, F>::new();
    for step in steps {
        model.step(step);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn histories_agree_with_the_model(steps in prop::collection::vec(step(), 1..60)) {
        run::<4, V4>(&steps);
        run::<16, V6>(&steps);
    }
}
