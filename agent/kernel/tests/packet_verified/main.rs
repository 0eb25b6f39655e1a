//! What a kernel made of the programs, in lines that `cargo xtask test vm` collects into the tables
//! of `docs/KERNELS.md`.

mod features;
mod machine;
#[path = "../support/mod.rs"]
mod support;

use std::io::Write;

use hachi_kernel::{AttachKind, Hook, Role, Verified, verify};
use support::{isolated, require_datapath};

/// The verifier's limit since 5.2.
const LIMIT: u32 = 1_000_000;

#[test]
fn the_verifier_is_far_from_its_limit() {
    require_datapath!();
    let programs = verify().unwrap_or_else(|error| panic!("{error}"));
    for hook in Hook::ALL {
        let found = programs.iter().any(|it| it.program == hook.program());
        assert!(found, "the object has no {hook}");
    }
    for Verified {
        program,
        instructions,
    } in programs
    {
        // Kernels before 5.16 do not tell.
        let Some(count) = instructions else { continue };
        report(&format!("VERIFIED {program} {count}"));
        assert!(
            count < LIMIT / 2,
            "{program}: {count} of {LIMIT} instructions"
        );
    }
}

#[test]
fn the_programs_attach_somehow() {
    require_datapath!();
    isolated(|world| {
        let mut datapath = world.load();
        let ifindex = world.veth("probe");
        let kind = datapath
            .attach(Role::Pod, ifindex, "probe")
            .expect("attached");
        // Filters are quicker to put, so they are there first even where they do not stay.
        let settled = datapath.settle(ifindex, "probe").expect("settled");
        let name = match kind {
            AttachKind::Tcx => "tcx",
            AttachKind::Clsact if settled => "tcx",
            AttachKind::Clsact => "clsact",
        };
        report(&format!("FEATURE attach {name}"));
        datapath.detach(Role::Pod, "probe").expect("detached");
    });
}

/// Straight to the descriptor: the test harness captures what macros print.
fn report(line: &str) {
    std::io::stderr()
        .write_all(format!("{line}\n").as_bytes())
        .expect("stderr");
}
