//! Who reaches whom: many probes at once, and a table of how they went.

use std::{fmt::Write as _, thread, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    cluster::Cluster,
    workload::probe::{Outcome, Target, probe},
};

/// A question that a matrix asks from each of its rows.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its heading.
    pub label: String,
    /// Whom to ask.
    pub target: Target,
    /// Rows, by name, that do not ask.
    pub skip: Vec<String>,
}

/// The outcomes of a matrix.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// From where: `NAMESPACE/POD`, `node/NAME` or `outside`.
    pub rows: Vec<String>,
    /// The headings.
    pub columns: Vec<String>,
    /// One for each row and column; none where it was not asked.
    pub cells: Vec<Vec<Option<Outcome>>>,
}

impl Matrix {
    /// Asks every question from every row, all at the same time.
    pub fn measure(
        cluster: &Cluster,
        rows: &[String],
        columns: &[Column],
        timeout: Duration,
    ) -> Result<Self> {
        let places = rows
            .iter()
            .map(|row| cluster.netns(row))
            .collect::<Result<Vec<_>>>()?;
        let cells = thread::scope(|scope| {
            let mut running = Vec::new();
            for (row, place) in rows.iter().zip(&places) {
                let asked = columns.iter().map(|column| {
                    let ask = !column.skip.contains(row);
                    let target = column.target;
                    ask.then(|| scope.spawn(move || place.get().enter(|| probe(target, timeout))))
                });
                running.push(asked.collect::<Vec<_>>());
            }
            let finish = |cell: Option<thread::ScopedJoinHandle<'_, Result<Outcome>>>| {
                let Some(cell) = cell else { return Ok(None) };
                cell.join().ok().context("a probe panicked")?.map(Some)
            };
            running
                .into_iter()
                .map(|row| row.into_iter().map(finish).collect::<Result<Vec<_>>>())
                .collect::<Result<Vec<_>>>()
        })?;
        let columns = columns.iter().map(|column| column.label.clone()).collect();
        Ok(Self {
            rows: rows.to_vec(),
            columns,
            cells,
        })
    }

    /// Compares with who should reach whom; describes every difference.
    #[must_use]
    pub fn differences(&self, expected: impl Fn(&str, &str) -> bool) -> Vec<String> {
        let mut differences = Vec::new();
        for (row, cells) in self.rows.iter().zip(&self.cells) {
            for (column, cell) in self.columns.iter().zip(cells) {
                let Some(outcome) = cell else { continue };
                let wanted = expected(row, column);
                if outcome.answered() != wanted {
                    let wanted = if wanted {
                        "should reach"
                    } else {
                        "should not reach"
                    };
                    differences.push(format!("{row} {wanted} {column}: {outcome}"));
                }
            }
        }
        differences
    }

    /// The table, with colours if asked for.
    #[must_use]
    pub fn render(&self, colours: bool) -> String {
        let first = self
            .rows
            .iter()
            .map(|row| row.chars().count())
            .max()
            .unwrap_or(0);
        let mut text = format!("  {:first$}", "");
        for column in &self.columns {
            let _ = write!(text, "  {column}");
        }
        text.push('\n');
        for (row, cells) in self.rows.iter().zip(&self.cells) {
            let _ = write!(text, "  {row:first$}");
            for (column, cell) in self.columns.iter().zip(cells) {
                let (symbol, colour) = match cell {
                    Some(outcome) if outcome.answered() => ("✔", "32"),
                    Some(_) => ("✘", "31"),
                    None => ("·", "2"),
                };
                let width = column.chars().count();
                let left = (width - 1) / 2;
                let (before, after) = (" ".repeat(left), " ".repeat(width - 1 - left));
                let _ = if colours {
                    write!(text, "  {before}\x1b[{colour}m{symbol}\x1b[0m{after}")
                } else {
                    write!(text, "  {before}{symbol}{after}")
                };
            }
            while text.ends_with(' ') {
                text.pop();
            }
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> Matrix {
        Matrix {
            rows: vec!["a".into(), "node/n".into()],
            columns: vec!["web-1".into(), "web".into()],
            cells: vec![
                vec![Some(Outcome::Answered("x".into())), None],
                vec![Some(Outcome::Silent), Some(Outcome::Refused)],
            ],
        }
    }

    #[test]
    fn the_table_lines_up() {
        assert_eq!(
            matrix().render(false),
            "          web-1  web\n  a         ✔     ·\n  node/n    ✘     ✘\n"
        );
    }

    #[test]
    fn differences_name_both_ends() {
        let differences = matrix().differences(|row, _| row == "node/n");
        assert_eq!(
            differences,
            [
                "a should not reach web-1: answered by x",
                "node/n should reach web-1: no answer",
                "node/n should reach web: refused",
            ]
        );
    }
}
