//! Every state on the way from one image to the next.

use hachi_compile::{Image, Op, diff};
use proptest::prelude::*;

use crate::{
    flow::Flow,
    maps::{Kernel, Sides},
    rng::Rng,
    world::World,
};

const SIDES: [Sides; 2] = [Sides::Egress, Sides::Ingress];

/// Applies the difference and looks at the flows after every write. Returns the writes.
pub(crate) fn walk(old: &Image, new: &Image, flows: &[Flow]) -> Result<Vec<Op>, TestCaseError> {
    let ops = diff(old, new);
    let (before, after) = (Kernel::from(old), Kernel::from(new));
    let mut kernel = before.clone();
    let verdicts = |kernel: &Kernel| -> Vec<bool> {
        let each = |flow| SIDES.map(|sides| kernel.judge(flow, sides).is_some());
        flows.iter().flat_map(each).collect()
    };
    let (first, last) = (verdicts(&before), verdicts(&after));
    let mut raised = false;
    for op in &ops {
        // A flow that was judged before the revision was raised must not get into a Pod that is new.
        if let Op::PutEndpoint(address, endpoint) = op
            && !raised
            && ops.contains(&Op::RaiseRevision)
        {
            let known = old.endpoints.get(address).map(|before| before.ifindex);
            prop_assert!(
                endpoint.ifindex == 0 || known == Some(endpoint.ifindex),
                "{address} leads to a new Pod before the revision is raised"
            );
        }
        kernel.apply(op);
        raised |= *op == Op::RaiseRevision;
        for (at, now) in verdicts(&kernel).into_iter().enumerate() {
            let context = || format!("{:?} {:?} after {op:?}", flows[at / 2], SIDES[at % 2]);
            prop_assert!(
                now == first[at] || now == last[at],
                "neither old nor new: {}",
                context()
            );
            prop_assert!(
                !raised || now == last[at],
                "changes after the revision: {}",
                context()
            );
        }
    }
    prop_assert_eq!(&kernel, &after);
    let ended = first.iter().zip(&last).any(|(first, last)| *first && !last);
    prop_assert!(
        raised || !ended,
        "a flow has to end, but nobody looks at it again"
    );
    Ok(ops)
}

proptest! {
    #![proptest_config(crate::cases::cases(150))]

    #[test]
    fn no_packet_meets_a_half_written_policy(seed: u64) {
        let rng = &mut Rng::new(seed);
        let mut world = World::new(rng);
        let mut image = Image::default();
        for round in 0..4 {
            let flows: Vec<Flow> = (0..40).map(|_| world.random_flow(rng)).collect();
            let next = world.compile(rng).image;
            let ops = walk(&image, &next, &flows)?;
            // The agent dies on its way; the next one starts from what it finds.
            image = if round == 2 && !ops.is_empty() {
                let mut kernel = Kernel::from(&image);
                ops[..rng.below(ops.len())].iter().for_each(|op| kernel.apply(op));
                kernel.snapshot()
            } else {
                next
            };
            for _ in 0..=rng.below(4) {
                world.change(rng);
            }
        }
    }

    #[test]
    fn a_restart_writes_nothing(seed: u64) {
        let rng = &mut Rng::new(seed);
        let world = World::new(rng);
        let pinned = Kernel::from(&world.compile(rng).image).snapshot();
        prop_assert_eq!(diff(&pinned, &world.compile(rng).image), []);
    }
}
