//! Random histories of translated flows, against a plain list of them.
//!
//! The model knows who sent what to whom, and under which tuple it was seen outside. It knows nothing
//! of entries, halves or where ports are looked for. The range of ports is tiny, so that flows meet.

use hachi_abi::Reason;
use hachi_datapath::{Outcome, V4, V6};
use proptest::prelude::*;

use crate::{
    lab::{CLIENT, Lab, NODE, Net, OTHER, SERVER, UDP, WORLD},
    wire,
};

const SENDERS: [u8; 4] = [CLIENT, SERVER, OTHER, NODE];
const WORLDS: [u8; 2] = [WORLD, 71];
/// Two of the range, one that is not.
const PORTS: [u16; 3] = [40_000, 40_003, 1_000];
const RANGE: (u16, u16) = (40_000, 40_004);
/// A flow is surely over when nothing was seen of it for longer.
const OVER: u32 = 195;
const PAUSE: u32 = 200;

#[derive(Clone, Debug)]
enum Step {
    /// Somebody sends to somebody outside.
    Send { from: usize, port: usize, to: usize },
    /// Somebody outside answers a flow, as it was seen there.
    Answer { flow: usize },
    /// Half of a flow's memory is lost to newer flows.
    Evict { at: usize },
    /// A second passes, or enough for every flow to be over.
    Wait { long: bool },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..4_usize, 0..3_usize, 0..2_usize)
            .prop_map(|(from, port, to)| Step::Send { from, port, to }),
        6 => any::<usize>().prop_map(|flow| Step::Answer { flow }),
        1 => any::<usize>().prop_map(|at| Step::Evict { at }),
        2 => prop::bool::weighted(0.15).prop_map(|long| Step::Wait { long }),
    ]
}

/// A flow: who sends to whom, and the port that it is seen with outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    from: (u8, u16),
    to: u8,
    seen: u16,
    last: u32,
    /// It may have been forgotten, in whole or in part.
    evicted: bool,
}

struct Model<const N: usize, F> {
    lab: Lab<N, F>,
    flows: Vec<Flow>,
    time: u32,
    /// Something was evicted.
    evicted: bool,
}

impl<const N: usize, F: Net<N>> Model<N, F> {
    fn new() -> Self {
        let mut lab = Lab::new();
        lab.tables.ports = RANGE;
        Self {
            lab,
            flows: Vec::new(),
            time: 0,
            evicted: false,
        }
    }

    fn is_over(&self, flow: &Flow) -> bool {
        self.time - flow.last > OVER
    }

    fn send(&mut self, from: (u8, u16), to: u8) {
        let body = wire::udp((from.1, 53), b"question");
        let frame = if from.0 == NODE {
            self.lab.own(to, UDP, &body)
        } else {
            let frame = self.lab.from(from.0, to, UDP, &body);
            self.lab.passed(&frame);
            self.lab.wire(from.0, to, UDP, &body)
        };
        let known = self
            .flows
            .iter()
            .position(|flow| (flow.from, flow.to) == (from, to));
        let (outcome, after) = self.lab.leave(&frame);
        match outcome {
            Outcome::Pass(Reason::Translated | Reason::PassedToNetwork) => {}
            Outcome::Drop(Reason::NatExhausted) => {
                let known = known.map(|at| self.flows[at]);
                assert!(
                    known.is_none_or(|flow| self.is_over(&flow) || flow.evicted),
                    "{known:?} lost its port"
                );
                // What is left of a flow that was forgotten in part keeps its port for a while.
                for port in (RANGE.0..=RANGE.1).filter(|_| !self.evicted) {
                    let taken = |flow: &&Flow| flow.to == to && flow.seen == port;
                    let holder = self.flows.iter().find(taken);
                    assert!(
                        holder.is_some_and(|flow| !self.is_over(flow)),
                        "port {port} to {to} was free: {:?}",
                        self.flows
                    );
                }
                return;
            }
            other => panic!("{from:?} to {to}: {other:?}"),
        }
        let view = after.check();
        assert_eq!((view.src[N - 1], view.dst[N - 1]), (NODE, to));
        let (seen, _) = view.ports();
        if let Some(at) = known {
            let flow = self.flows[at];
            if !self.is_over(&flow) && !flow.evicted {
                assert_eq!(seen, flow.seen, "{flow:?} has moved");
            }
            self.flows.remove(at);
        }
        if let Some(at) = self
            .flows
            .iter()
            .position(|flow| (flow.to, flow.seen) == (to, seen))
        {
            let other = self.flows.remove(at);
            assert!(
                self.is_over(&other) || other.evicted,
                "{from:?} shares {seen} with {other:?}"
            );
        }
        // The node's ports outside of the range are never given to anyone.
        assert!(
            (RANGE.0..=RANGE.1).contains(&seen) || (from.0 == NODE && seen == from.1),
            "{seen}"
        );
        self.flows.push(Flow {
            from,
            to,
            seen,
            last: self.time,
            evicted: false,
        });
    }

    fn answer(&mut self, at: usize) {
        let flow = self.flows[at];
        let body = wire::udp((53, flow.seen), b"answer");
        let (outcome, after) = self.lab.arrive(&self.lab.wire(flow.to, NODE, UDP, &body));
        if self.is_over(&flow) || flow.evicted {
            return;
        }
        let view = after.check();
        assert_eq!((view.dst[N - 1], view.ports().1), flow.from, "{flow:?}");
        let expected = if flow.from.0 == NODE {
            Outcome::Pass(Reason::PassedToStack)
        } else {
            let ifindex = u32::from(flow.from.0) + 10;
            Outcome::RedirectPeer { ifindex }
        };
        assert_eq!(outcome, expected, "{flow:?}");
        self.flows[at].last = self.time;
    }

    fn evict(&mut self, at: usize) {
        let mut nat = self.lab.tables.nat.borrow_mut();
        let mut keys: Vec<_> = nat.keys().copied().collect();
        keys.sort_unstable();
        if keys.is_empty() {
            return;
        }
        let key = keys[at % keys.len()];
        let Some(entry) = nat.remove(&key) else {
            return;
        };
        self.evicted = true;
        let reply = entry.flags & hachi_abi::NatFlags::REPLY != 0;
        let (sender, port, other) = if reply {
            (entry.addr, entry.port, key.src)
        } else {
            (key.src, key.sport, key.dst)
        };
        let from = (sender[N - 1], u16::from_be_bytes(port));
        for flow in &mut self.flows {
            flow.evicted |= flow.from == from && flow.to == other[N - 1];
        }
    }

    fn wait(&mut self, seconds: u32) {
        self.time += seconds;
        self.lab.wait(seconds);
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Send { from, port, to } => self.send((SENDERS[from], PORTS[port]), WORLDS[to]),
            Step::Answer { flow } if !self.flows.is_empty() => {
                self.answer(flow % self.flows.len());
            }
            Step::Answer { .. } => {}
            Step::Evict { at } => {
                self.evict(at);
                // A flow notices once a second that its claim is gone.
                self.wait(1);
            }
            Step::Wait { long } => self.wait(if long { PAUSE } else { 1 }),
        }
    }
}

fn run<const N: usize, F: Net<N>>(steps: &[Step]) {
    let mut model = Model::<N, F>::new();
    for step in steps {
        model.step(step);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn no_two_flows_share_a_tuple(steps in prop::collection::vec(step(), 1..80)) {
        run::<4, V4>(&steps);
        run::<16, V6>(&steps);
    }
}
