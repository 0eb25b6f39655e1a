//! What this kernel can do, and what is said where it cannot be done.

use std::{thread, time::Instant};

use hachi_kernel::{Feature, Features, Finding, KernelError};

use crate::{report, support::isolated};

/// Nobody.
const UID: libc::uid_t = 65_534;

#[test]
fn this_kernel_has_all_that_is_needed() {
    hachi_testutil::require_root!();
    isolated(|world| {
        let started = Instant::now();
        let features = Features::probe(&world.pin_root);
        let took = started.elapsed();
        for (feature, finding) in features.iter() {
            let value = match finding {
                Finding::Present => "yes",
                Finding::Absent(_) => "no",
                Finding::Unknown(_) => "unknown",
            };
            report(&format!("FEATURE {} {value}", feature.name()));
            if *finding != Finding::Present {
                report(&format!("{feature}: {finding:?}"));
            }
        }
        report(&format!("probed in {took:?}"));
        features.require().expect("this kernel will do");
        let root = world.pin_root.parent().expect("a parent");
        for entry in std::fs::read_dir(root).expect("a BPF file system") {
            let name = entry.expect("an entry").file_name();
            assert!(
                !name.to_string_lossy().contains("probe"),
                "{name:?} was left"
            );
        }
    });
}

#[test]
fn without_capabilities_the_refusal_names_them() {
    hachi_testutil::require_root!();
    isolated(|world| {
        let error = thread::scope(|scope| {
            scope
                .spawn(|| {
                    // SAFETY: the call takes no pointer. It is the system call itself, so it changes
                    // this thread alone, which ends with the scope.
                    let result = unsafe { libc::syscall(libc::SYS_setresuid, UID, UID, UID) };
                    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
                    Features::probe(&world.pin_root).require()
                })
                .join()
                .expect("no panic")
        })
        .expect_err("nobody may not load programs");
        assert!(matches!(error, KernelError::Unsupported { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("lacks CAP_NET_ADMIN, CAP_SYS_ADMIN"),
            "{text}"
        );
        assert!(!text.contains('\n'), "{text}");
    });
}

#[test]
fn without_a_bpf_file_system_the_refusal_says_how_to_get_one() {
    hachi_testutil::require_root!();
    let directory = tempfile::tempdir().expect("a directory");
    let features = Features::probe(&directory.path().join("hachi"));
    assert!(!features.has(Feature::BpfFs));
    let text = features.require().expect_err("refused").to_string();
    assert!(text.contains("mount -t bpf"), "{text}");
    assert!(!text.contains('\n'), "{text}");
}
