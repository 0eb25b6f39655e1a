//! How many cases a property is tried on.

use proptest::test_runner::Config;

/// So many cases, each of a seed that a failure prints.
pub(crate) fn cases(cases: u32) -> Config {
    // A seed does not get simpler, and a file of old seeds means nothing once the generator changes.
    Config {
        cases,
        max_shrink_iters: 0,
        failure_persistence: None,
        ..Config::default()
    }
}
