//! Counts the outcomes in the output of Rust's test programs.

/// Before the reason of a test that was skipped.
const SKIP: &str = "SKIP: ";
/// Before what a kernel lacks.
const ABSENT: &str = "ABSENT: ";

/// Outcomes of one or more test programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Tests that ran and passed.
    pub(crate) passed: usize,
    /// Tests that failed, were ignored, or died with their program.
    pub(crate) failed: usize,
    /// Tests that said `SKIP:`.
    pub(crate) skipped: usize,
    /// Tests that said `ABSENT:`, for want of a kernel feature that need not be there.
    pub(crate) absent: usize,
}

impl Counts {
    /// Adds another program's outcomes.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.absent += other.absent;
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )?;
        if self.absent > 0 {
            write!(f, ", {} absent", self.absent)?;
        }
        Ok(())
    }
}

/// The outcomes in one program's output. `success` is its exit status: a program that ends badly
/// without having said so (a crash, a time limit) counts as one failure.
pub(crate) fn count(output: &str, success: bool) -> Counts {
    let mut counts = Counts::default();
    let mut ignored = 0;
    for line in output.lines() {
        if let Some(result) = line.trim_start().strip_prefix("test result: ") {
            counts.passed += number_before(result, " passed");
            counts.failed += number_before(result, " failed");
            ignored += number_before(result, " ignored");
        }
        // Other output may stand before it on the same line: tests run side by side.
        counts.skipped += line.matches(SKIP).count();
        counts.absent += line.matches(ABSENT).count();
    }
    counts.failed += ignored;
    // The harness counts these as passed.
    counts.passed = counts.passed.saturating_sub(counts.skipped + counts.absent);
    if !success && counts.failed == 0 {
        counts.failed = 1;
    }
    counts
}

/// What tests said that did not run, a line each.
pub(crate) fn unrun(output: &str) -> impl Iterator<Item = &str> {
    output.lines().filter_map(|line| {
        let at = line.find(SKIP).or_else(|| line.find(ABSENT))?;
        Some(&line[at..])
    })
}

/// The names of failed tests, from libtest's closing list.
pub(crate) fn failures(output: &str) -> Vec<&str> {
    output
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
        .collect()
}

fn number_before(text: &str, label: &str) -> usize {
    text.split(';')
        .find_map(|part| part.strip_suffix(label))
        .and_then(|part| part.split_whitespace().last())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_added_up() {
        let output = "running 5 tests\ntest a ... ok\nSKIP: net::b: needs root\n\
            test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished\n\
            test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished\n";
        assert_eq!(
            count(output, true),
            Counts {
                passed: 4,
                failed: 0,
                skipped: 1,
                absent: 0
            }
        );
        assert_eq!(
            count(output, true).to_string(),
            "4 passed, 0 failed, 1 skipped"
        );
    }

    #[test]
    fn what_a_kernel_lacks_is_counted_apart() {
        let output = "test a ... ABSENT: netkit: Operation not supported\nok\n\
            test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let counts = count(output, true);
        assert_eq!(
            counts.to_string(),
            "1 passed, 0 failed, 0 skipped, 1 absent"
        );
        let lines: Vec<_> = unrun(output).collect();
        assert_eq!(lines, ["ABSENT: netkit: Operation not supported"]);
    }

    #[test]
    fn ignored_and_failed_tests_count_as_failed() {
        let output = "test a::b ... FAILED\ntest c ... ok\n\
            test result: FAILED. 1 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(
            count(output, false),
            Counts {
                passed: 1,
                failed: 3,
                skipped: 0,
                absent: 0
            }
        );
        assert_eq!(failures(output), ["a::b"]);
    }

    #[test]
    fn a_program_that_dies_is_a_failure() {
        assert_eq!(
            count("running 5 tests\n", false),
            Counts {
                passed: 0,
                failed: 1,
                skipped: 0,
                absent: 0
            }
        );
    }
}
