//! Results as a table, and as JSON for whoever compares runs.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::Common;
use crate::repo::Repo;

/// The most that a number may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Target {
    /// Nothing was promised.
    None,
    /// At most this.
    AtMost(f64),
}

/// What one subject found.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    subject: &'static str,
    setting: Vec<(String, String)>,
    columns: Vec<String>,
    rows: Vec<Row>,
}

#[derive(Clone, Debug)]
struct Row {
    what: String,
    values: Vec<f64>,
    judged: f64,
    target: Target,
}

impl Row {
    fn missed(&self) -> bool {
        match self.target {
            Target::None => false,
            // A number that was never measured misses too.
            Target::AtMost(most) => self.judged.is_nan() || self.judged > most,
        }
    }
}

impl Report {
    /// An empty report; `columns` names the values of each row.
    pub(crate) fn new(subject: &'static str, columns: &[impl ToString]) -> Self {
        Self {
            subject,
            setting: Vec::new(),
            columns: columns.iter().map(ToString::to_string).collect(),
            rows: Vec::new(),
        }
    }

    /// Says what was configured.
    pub(crate) fn setting(&mut self, name: &str, value: impl ToString) {
        self.setting.push((name.to_owned(), value.to_string()));
    }

    /// Adds a row of as many values as there are columns; `judged` is compared with the target.
    pub(crate) fn row(
        &mut self,
        what: impl Into<String>,
        values: Vec<f64>,
        judged: f64,
        target: Target,
    ) {
        self.rows.push(Row {
            what: what.into(),
            values,
            judged,
            target,
        });
    }

    /// The table as text.
    pub(crate) fn text(&self, common: &Common) -> String {
        let mut text = format!(
            "{}: seed {}, {} repetitions",
            self.subject, common.seed, common.repetitions
        );
        for (name, value) in &self.setting {
            let _ = write!(text, ", {name} {value}");
        }
        text.push('\n');
        let mut cells = vec![vec![String::new()]];
        cells[0].extend(self.columns.iter().cloned());
        cells[0].push("target".into());
        for row in &self.rows {
            let mut line = vec![row.what.clone()];
            line.extend(row.values.iter().copied().map(number));
            line.push(match row.target {
                Target::None => String::new(),
                Target::AtMost(most) => {
                    let end = if row.missed() { "MISSED" } else { "met" };
                    format!("<= {most}: {end}")
                }
            });
            cells.push(line);
        }
        text + &aligned(&cells)
    }

    fn json(&self, common: &Common) -> Value {
        let rows = self.rows.iter().map(|row| {
            let values: serde_json::Map<_, _> = self
                .columns
                .iter()
                .cloned()
                .zip(row.values.iter().map(|value| json!(value)))
                .collect();
            let target = match row.target {
                Target::None => Value::Null,
                Target::AtMost(most) => json!({"atMost": most, "missed": row.missed()}),
            };
            json!({"what": row.what, "values": values, "judged": row.judged, "target": target})
        });
        let setting: serde_json::Map<_, _> = self
            .setting
            .iter()
            .map(|(name, value)| (name.clone(), json!(value)))
            .collect();
        json!({
            "subject": self.subject,
            "seed": common.seed,
            "repetitions": common.repetitions,
            "setting": setting,
            "rows": rows.collect::<Vec<_>>(),
        })
    }

    /// Prints the table and writes the JSON; fails over a missed target if that was asked for.
    pub(crate) fn finish(&self, repo: &Repo, common: &Common) -> Result<()> {
        println!("{}", self.text(common).trim_end());
        let path = repo.target("bench").join(format!("{}.json", self.subject));
        let json = serde_json::to_string_pretty(&self.json(common))?;
        fs::create_dir_all(repo.target("bench"))
            .and_then(|()| fs::write(&path, json + "\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
        let missed: Vec<_> = self
            .rows
            .iter()
            .filter(|row| row.missed())
            .map(|row| row.what.as_str())
            .collect();
        if common.check && !missed.is_empty() {
            bail!("targets missed: {}", missed.join("; "));
        }
        Ok(())
    }
}

/// Three significant digits, which is more than such a measurement is good for.
fn number(value: f64) -> String {
    if !value.is_finite() {
        return "-".into();
    }
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Columns of equal width, the first flush left.
fn aligned(cells: &[Vec<String>]) -> String {
    let columns = cells.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let lengths = cells
            .iter()
            .map(|line| line.get(column).map_or(0, |cell| cell.chars().count()));
        lengths.max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in cells {
        let mut row = String::new();
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            let _ = match column {
                0 => write!(row, "  {cell:<width$}"),
                _ => write!(row, "  {cell:>width$}"),
            };
        }
        text += row.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn common() -> Common {
        Common {
            seed: 7,
            repetitions: 3,
            check: false,
            no_build: false,
        }
    }

    #[test]
    fn a_table_says_what_was_met_and_missed() {
        let mut report = Report::new("cni", &["ours", "ratio"]);
        report.setting("pods", 5);
        report.row("ADD", vec![4.256, 0.25], 0.25, Target::AtMost(0.5));
        report.row("DEL", vec![123.4, 2.0], 2.0, Target::AtMost(0.5));
        report.row("CHECK", vec![f64::NAN, 1.0], 1.0, Target::None);
        let text = report.text(&common());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "cni: seed 7, 3 repetitions, pods 5");
        assert!(lines[2].ends_with("4.26   0.25     <= 0.5: met"), "{text}");
        assert!(lines[3].ends_with("123   2.00  <= 0.5: MISSED"), "{text}");
        assert!(lines[4].ends_with("-   1.00"), "{text}");
        assert_eq!(report.json(&common())["rows"][1]["target"]["missed"], true);
    }

    #[test]
    fn what_was_never_measured_misses_its_target() {
        let mut report = Report::new("cni", &["ours"]);
        report.row("ADD", vec![f64::NAN], f64::NAN, Target::AtMost(0.5));
        assert!(report.rows[0].missed());
    }
}
