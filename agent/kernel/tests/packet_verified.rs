//! What a kernel made of the programs, in lines that `cargo xtask test vm` collects into the tables
//! of `docs/KERNELS.md`.

mod support;

use std::io::Write;

use aya::programs::loaded_programs;
use hachi_kernel::{AttachKind, Hook};
use support::{isolated, require_datapath};

/// The verifier's limit since 5.2.
const LIMIT: u32 = 1_000_000;

#[test]
fn the_verifier_is_far_from_its_limit() {
    require_datapath!();
    isolated(|world| {
        let _datapath = world.load();
        for hook in Hook::ALL {
            let name = hook.program();
            // Of several with the name (another agent's, say) the newest is this test's.
            let program = loaded_programs()
                .filter_map(Result::ok)
                .filter(|program| program.name() == name.as_bytes())
                .last()
                .expect("the program that was just loaded");
            // Kernels before 5.16 do not tell.
            if let Some(count) = program.verified_instruction_count() {
                report(&format!("VERIFIED {name} {count}"));
                assert!(count < LIMIT / 2, "{name}: {count} of {LIMIT} instructions");
            }
        }
    });
}

#[test]
fn the_programs_attach_somehow() {
    require_datapath!();
    isolated(|world| {
        let mut datapath = world.load();
        let ifindex = world.veth("probe");
        let kind = datapath.attach(ifindex, "probe").expect("attached");
        let name = match kind {
            AttachKind::Tcx => "tcx",
            AttachKind::Clsact => "clsact",
        };
        report(&format!("FEATURE attach {name}"));
        datapath.detach("probe").expect("detached");
    });
}

/// Straight to the descriptor: the test harness captures what macros print.
fn report(line: &str) {
    std::io::stderr()
        .write_all(format!("{line}\n").as_bytes())
        .expect("stderr");
}
