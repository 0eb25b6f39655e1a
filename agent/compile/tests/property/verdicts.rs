//! Compiled maps against the oracle.

use hachi_abi::RULE_NONE;
use hachi_compile::{Compiled, Compiler};
use hachi_index::Index;
use hachi_policy::Side;
use proptest::prelude::*;

use crate::{
    flow::Flow,
    maps::{Kernel, Sides},
    rng::Rng,
    world::World,
};

fn check(world: &World, compiled: &Compiled, kernel: &Kernel, flow: &Flow) -> Result<(), String> {
    let (egress, ingress) = world.expected(flow);
    let allowed = egress.allows() && ingress.allows();
    match kernel.judge(flow, Sides::Both) {
        None if !allowed => {
            // The rule that denied is told too.
            for (sides, side) in [(Sides::Egress, &egress), (Sides::Ingress, &ingress)] {
                if let Side::Denied(expected) = side {
                    let told = kernel.denied_by(flow, sides).unwrap_or(RULE_NONE);
                    if compiled.rules.get(&told) != expected.as_ref() {
                        return Err(format!("{flow:?}: denied by {told:x}, not {expected:?}"));
                    }
                }
            }
            Ok(())
        }
        Some(rules) if allowed => {
            let named = |side: &Side, rule: u32| match side {
                Side::NotIsolated => rule == RULE_NONE,
                Side::Allowed(all) => compiled.rules.get(&rule).is_some_and(|r| all.contains(r)),
                Side::Denied(_) => false,
            };
            if named(&egress, rules.egress) && named(&ingress, rules.ingress) {
                Ok(())
            } else {
                Err(format!(
                    "{flow:?}: {rules:?} against {egress:?}, {ingress:?}"
                ))
            }
        }
        verdict => Err(format!(
            "{flow:?}: {verdict:?} against {egress:?}, {ingress:?}"
        )),
    }
}

proptest! {
    #![proptest_config(crate::cases::cases(500))]

    #[test]
    fn compiled_maps_say_what_the_oracle_says(seed: u64) {
        let rng = &mut Rng::new(seed);
        let world = World::new(rng);
        let compiled = world.compile(rng);
        let kernel = Kernel::from(&compiled.image);
        for _ in 0..150 {
            let flow = world.random_flow(rng);
            let checked = check(&world, &compiled, &kernel, &flow);
            prop_assert!(checked.is_ok(), "{}\n{world:#?}", checked.unwrap_err());
        }
    }

}

proptest! {
    #![proptest_config(crate::cases::cases(200))]

    #[test]
    fn the_order_of_events_does_not_count(seed: u64) {
        let rng = &mut Rng::new(seed);
        let world = World::new(rng);
        prop_assert_eq!(world.compile(rng), world.compile(rng));
    }
}

proptest! {
    #![proptest_config(crate::cases::cases(60))]

    #[test]
    fn the_past_does_not_count(seed: u64) {
        let rng = &mut Rng::new(seed);
        let mut world = World::new(rng);
        let mut before = world.clone();
        let mut index = Index::new("n1");
        let mut compiler = Compiler::default();
        for _ in 0..8 {
            world.update(&mut index, &before, rng);
            let (mut now, mut fresh) = (compiler.compile(index.desired()), world.compile(rng));
            let meant = [&now, &fresh].map(|compiled| crate::services::meaning(&compiled.image));
            prop_assert!(meant[0] == meant[1], "Services differ");
            for compiled in [&mut now, &mut fresh] {
                compiled.image.services = Default::default();
                compiled.image.slots = Default::default();
            }
            prop_assert_eq!(now, fresh);
            before = world.clone();
            for _ in 0..rng.below(4) {
                world.change(rng);
            }
        }
    }
}
