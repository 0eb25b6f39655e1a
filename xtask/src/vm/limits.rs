//! What each program costs the verifier and what each kernel can do, against the committed tables
//! of `docs/KERNELS.md`.
//!
//! ```text
//! | program  | stack, bytes | instructions on 6.1 | ...        | feature | 6.1    | 6.12 |
//! | from_pod |          352 |               12345 | ...        | attach  | clsact | tcx  |
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::page::{self, Table};

const PROGRAMS: &str = "program";
const FEATURES: &str = "feature";
const STACK: &str = "stack, bytes";
const INSTRUCTIONS: &str = "instructions on ";
/// How much a number may grow before the table has to be updated, in percent.
const SLACK: u64 = 10;

/// What a run measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    programs: Table,
    features: Table,
}

impl Measured {
    /// The stack that each program takes, which is the same everywhere.
    pub(crate) fn stacks(&mut self, stacks: BTreeMap<String, u32>) {
        self.programs.insert(STACK.to_owned(), texts(stacks));
    }

    /// What one kernel's verifier counted.
    pub(crate) fn instructions(&mut self, name: &str, verified: BTreeMap<String, u32>) {
        self.programs
            .insert(format!("{INSTRUCTIONS}{name}"), texts(verified));
    }

    /// What one kernel can do.
    pub(crate) fn features(&mut self, name: &str, features: BTreeMap<String, String>) {
        self.features.insert(name.to_owned(), features);
    }

    /// Writes the columns over those of the page; others stay.
    pub(crate) fn update(&self, path: &Path) -> Result<()> {
        let text = page::with_columns(&load(path)?, PROGRAMS, &self.programs)?;
        let text = page::with_columns(&text, FEATURES, &self.features)?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// What grew beyond the slack, changed, is missing from the page, or has gone.
    pub(crate) fn findings(&self, path: &Path) -> Result<Vec<String>> {
        let text = load(path)?;
        let mut found = compare(&page::read(&text, PROGRAMS)?, &self.programs);
        found.extend(compare(&page::read(&text, FEATURES)?, &self.features));
        Ok(found)
    }
}

fn load(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn texts(numbers: BTreeMap<String, u32>) -> BTreeMap<String, String> {
    numbers
        .into_iter()
        .map(|(name, number)| (name, number.to_string()))
        .collect()
}

fn compare(committed: &Table, run: &Table) -> Vec<String> {
    let mut findings = Vec::new();
    for (column, now) in run {
        let Some(then) = committed.get(column) else {
            findings.push(format!("there is no column {column:?}"));
            continue;
        };
        for (row, now) in now {
            match then.get(row) {
                None => findings.push(format!("{row} is new ({column}: {now})")),
                Some(then) if !within(then, now) => {
                    findings.push(format!("{row}, {column}: {then} -> {now}"));
                }
                Some(_) => {}
            }
        }
        for row in then.keys().filter(|row| !now.contains_key(*row)) {
            findings.push(format!("{row} has no {column} any more"));
        }
    }
    findings
}

/// Whether a number grew by no more than the slack, or a text is the same.
fn within(then: &str, now: &str) -> bool {
    match (then.parse::<u64>(), now.parse::<u64>()) {
        (Ok(then), Ok(now)) => now * 100 <= then * (100 + SLACK),
        _ => then == now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(pairs: &[(&str, u32)]) -> BTreeMap<String, u32> {
        pairs
            .iter()
            .map(|(name, number)| ((*name).to_owned(), *number))
            .collect()
    }

    fn measured(to_pod: u32, attach: &str) -> Measured {
        let mut measured = Measured::default();
        measured.stacks(numbers(&[("from_pod", 320), ("to_pod", 64)]));
        let features = [("attach".to_owned(), attach.to_owned())].into();
        measured.instructions("6.1", numbers(&[("from_pod", 1000), ("to_pod", to_pod)]));
        measured.features("6.1", features);
        measured
    }

    #[test]
    fn growth_beyond_the_slack_and_other_features_are_found() -> Result<()> {
        let path = std::env::temp_dir().join(format!("hachi-limits-{}.md", std::process::id()));
        let marks = |name| format!("<!-- {name}: begin -->\n<!-- {name}: end -->\n");
        fs::write(&path, marks(PROGRAMS) + &marks(FEATURES))?;
        assert_eq!(
            measured(500, "tcx").findings(&path)?.len(),
            3,
            "three columns are missing"
        );
        measured(500, "tcx").update(&path)?;
        assert_eq!(measured(550, "tcx").findings(&path)?, Vec::<String>::new());
        assert_eq!(measured(100, "tcx").findings(&path)?, Vec::<String>::new());
        assert_eq!(
            measured(551, "clsact").findings(&path)?,
            [
                "to_pod, instructions on 6.1: 500 -> 551",
                "attach, 6.1: tcx -> clsact"
            ]
        );
        fs::remove_file(&path)?;
        Ok(())
    }

    #[test]
    fn new_and_lost_programs_are_found() {
        let then = measured(500, "tcx").programs;
        let mut now = then.clone();
        let column = now.get_mut("instructions on 6.1").unwrap();
        column.remove("to_pod");
        column.insert("xdp_net".to_owned(), "7".to_owned());
        assert_eq!(
            compare(&then, &now),
            [
                "xdp_net is new (instructions on 6.1: 7)",
                "to_pod has no instructions on 6.1 any more",
            ]
        );
    }
}
