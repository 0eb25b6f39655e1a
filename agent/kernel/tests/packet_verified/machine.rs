//! Whether the machine of the other tests can be relied on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, thread};

/// Instructions of the scheduler that the kernel replaces while they are in use (a static key; see
/// Documentation/staging/static-keys.rst), as it does for hooks that get their first program.
const SWITCH: &str = "/proc/sys/kernel/sched_schedstats";

/// A translator with a thread for each of the guest's processors lets a kernel die of this within seconds.
#[test]
fn a_guest_survives_that_its_kernel_patches_itself() {
    if !hachi_testutil::in_guest() {
        hachi_testutil::absent!("a kernel of the test's own: guests do this");
    }
    let Ok(before) = fs::read(SWITCH) else {
        hachi_testutil::absent!("{SWITCH}");
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    thread::yield_now();
                }
            });
        }
        let written: Result<(), _> = ["1", "0"]
            .iter()
            .cycle()
            .take(300)
            .try_for_each(|value| fs::write(SWITCH, value));
        over.store(true, Ordering::Relaxed);
        written.expect("switched");
    });
    fs::write(SWITCH, before).expect("as before");
}
