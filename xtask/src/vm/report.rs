//! Reads what the guest wrote: which tests ran, how each ended, what the verifier counted.

use std::collections::BTreeMap;

use crate::test::{Counts, count};

use super::protocol::{BEGIN, DONE, END, UP};

/// What a program that loads says of each eBPF program: `VERIFIED name instructions`.
const VERIFIED: &str = "VERIFIED ";
/// What a test says of the kernel: `FEATURE name value`.
const FEATURE: &str = "FEATURE ";

/// A machine's tests.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Whether the guest's first process ran: what is ours has begun.
    pub(crate) up: bool,
    /// Tests in the order in which they ended.
    pub(crate) tests: Vec<Test>,
    /// The test that had begun and not ended.
    pub(crate) running: Option<Test>,
    /// Whether the guest said that it was through.
    pub(crate) done: bool,
    /// Instructions that the verifier walked through, by program.
    pub(crate) verified: BTreeMap<String, u32>,
    /// What the kernel can do.
    pub(crate) features: BTreeMap<String, String>,
    /// Output before the first test and between tests: init's own.
    pub(crate) remarks: Vec<String>,
}

/// One test program.
#[derive(Debug, Default)]
pub(crate) struct Test {
    /// Name.
    pub(crate) name: String,
    /// What it printed.
    pub(crate) output: String,
    /// Its exit code, or how else it ended.
    pub(crate) status: String,
    /// How long it took.
    pub(crate) milliseconds: u64,
}

impl Test {
    /// Outcomes.
    pub(crate) fn counts(&self) -> Counts {
        count(&self.output, self.status == "0")
    }
}

impl Report {
    /// Takes the next line; returns the test that it ends.
    pub(crate) fn line(&mut self, line: &str) -> Option<&Test> {
        if let Some(name) = line.strip_prefix(BEGIN) {
            self.running = Some(Test {
                name: name.to_owned(),
                ..Test::default()
            });
            return None;
        }
        if let Some(end) = line.strip_prefix(END)
            && let Some(mut test) = self.running.take()
        {
            let mut words = end.split_whitespace().skip(1);
            test.status = words.next().unwrap_or("unknown").to_owned();
            test.milliseconds = words.next().and_then(|text| text.parse().ok()).unwrap_or(0);
            self.tests.push(test);
            return self.tests.last();
        }
        match line {
            UP => self.up = true,
            DONE => self.done = true,
            _ => {}
        }
        if let Some((name, number)) = pair(line, VERIFIED)
            && let Ok(number) = number.parse()
        {
            self.verified.insert(name.to_owned(), number);
        }
        if let Some((name, value)) = pair(line, FEATURE) {
            self.features.insert(name.to_owned(), value.to_owned());
            return None;
        }
        match &mut self.running {
            Some(test) => {
                test.output.push_str(line);
                test.output.push('\n');
            }
            None if !line.is_empty() && ![UP, DONE].contains(&line) => {
                self.remarks.push(line.to_owned())
            }
            None => {}
        }
        None
    }

    /// Outcomes of all tests; what never ran or never ended counts as one failure.
    pub(crate) fn counts(&self) -> Counts {
        let mut all = Counts::default();
        self.tests.iter().for_each(|test| all.add(test.counts()));
        if !self.done {
            all.failed += 1;
        }
        all
    }
}

/// The two words after a marker; other output may stand before it on the same line.
fn pair<'a>(line: &'a str, marker: &str) -> Option<(&'a str, &'a str)> {
    let (_, rest) = line.split_once(marker)?;
    let mut words = rest.split_whitespace();
    Some((words.next()?, words.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: &str = "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out";

    fn report(lines: &[&str]) -> Report {
        let mut report = Report::default();
        for line in lines {
            report.line(line);
        }
        report
    }

    #[test]
    fn tests_that_end_are_counted() {
        let report = report(&[
            "@up",
            "vm-init: cannot load x",
            "FEATURE netkit no",
            "@begin packet",
            "test x ... VERIFIED from_pod 1234",
            OK,
            "@end packet 0 250",
            "@begin netns_a",
            "@end netns_a signal-11 3",
            "@done",
        ]);
        assert_eq!(
            report.counts(),
            Counts {
                passed: 2,
                failed: 1,
                skipped: 0,
                absent: 0
            }
        );
        assert!(report.up && report.done);
        assert_eq!(report.tests[0].milliseconds, 250);
        assert_eq!(report.verified.get("from_pod"), Some(&1234));
        assert_eq!(
            report.features.get("netkit").map(String::as_str),
            Some("no")
        );
        assert_eq!(report.remarks, ["vm-init: cannot load x"]);
    }

    #[test]
    fn a_guest_that_does_not_finish_is_a_failure() {
        let report = report(&["@up", "@begin packet", OK]);
        assert_eq!(report.counts().failed, 1);
        assert_eq!(
            report.running.map(|test| test.name).as_deref(),
            Some("packet")
        );
    }
}
