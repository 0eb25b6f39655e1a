//! The committed table of what each program costs the verifier, and the check against it.
//!
//! It is part of `docs/KERNELS.md`, between two markers, so that what people read is what is checked:
//! ```text
//! | program | stack, bytes | instructions on 6.1 | instructions on 6.12 |
//! |---|--:|--:|--:|
//! | from_pod | 352 | 12345 | 12001 |
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

const BEGIN: &str = "<!-- verified: begin (cargo xtask test vm --update) -->";
const END: &str = "<!-- verified: end -->";
const STACK: &str = "stack, bytes";
const INSTRUCTIONS: &str = "instructions on ";
/// How much a number may grow before the table has to be updated, in percent.
const SLACK: u32 = 10;

/// Column -> program -> number.
pub(crate) type Table = BTreeMap<String, BTreeMap<String, u32>>;

/// The table of one run: the stack, and the instructions on each kernel.
pub(crate) fn table(
    stacks: BTreeMap<String, u32>,
    verified: impl IntoIterator<Item = (String, BTreeMap<String, u32>)>,
) -> Table {
    let kernels = verified
        .into_iter()
        .map(|(name, counts)| (format!("{INSTRUCTIONS}{name}"), counts));
    kernels.chain([(STACK.to_owned(), stacks)]).collect()
}

/// Reads the committed table.
pub(crate) fn read(page: &Path) -> Result<Table> {
    let text =
        fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
    parse(split(&text)?.1)
}

/// Writes a run's columns over those of the committed table; others stay.
pub(crate) fn update(page: &Path, run: &Table) -> Result<()> {
    let text =
        fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
    let (before, old, after) = split(&text)?;
    let mut table = parse(old)?;
    table.extend(run.clone());
    // Markdown wants the table apart from the markers.
    let new = format!("{before}{BEGIN}\n\n{}\n{END}{after}", print(&table));
    fs::write(page, new).with_context(|| format!("cannot write {}", page.display()))
}

/// What grew beyond the slack, is missing from the table, or has gone.
pub(crate) fn compare(committed: &Table, run: &Table) -> Vec<String> {
    let mut findings = Vec::new();
    for (column, now) in run {
        let Some(then) = committed.get(column) else {
            findings.push(format!("the table has no column {column:?}"));
            continue;
        };
        for (program, now) in now {
            match then.get(program) {
                None => findings.push(format!("{program} is not in the table ({column}: {now})")),
                Some(then) if u64::from(*now) * 100 > u64::from(*then) * u64::from(100 + SLACK) => {
                    findings.push(format!(
                        "{program}, {column}: {then} -> {now}, over {SLACK}%"
                    ));
                }
                Some(_) => {}
            }
        }
        for program in then.keys().filter(|program| !now.contains_key(*program)) {
            findings.push(format!("{program} has no {column} any more"));
        }
    }
    findings
}

/// The page before, between and after the markers.
fn split(text: &str) -> Result<(&str, &str, &str)> {
    let (before, rest) = text
        .split_once(BEGIN)
        .with_context(|| format!("no {BEGIN}"))?;
    let (table, after) = rest.split_once(END).with_context(|| format!("no {END}"))?;
    Ok((before, table, after))
}

fn parse(text: &str) -> Result<Table> {
    let mut rows = text.lines().filter(|line| line.starts_with('|')).map(cells);
    let Some(columns) = rows.next() else {
        return Ok(Table::new());
    };
    let mut table: Table = columns
        .iter()
        .skip(1)
        .map(|column| ((*column).to_owned(), BTreeMap::new()))
        .collect();
    for row in rows.skip(1) {
        let [program, numbers @ ..] = row.as_slice() else {
            continue;
        };
        if numbers.len() + 1 != columns.len() {
            bail!("a row of the table has {} cells: {row:?}", row.len());
        }
        for (column, number) in columns
            .iter()
            .skip(1)
            .zip(numbers)
            .filter(|(_, n)| **n != "-")
        {
            let number = number
                .parse()
                .with_context(|| format!("{number:?} is no number"))?;
            table
                .entry((*column).to_owned())
                .or_default()
                .insert((*program).to_owned(), number);
        }
    }
    Ok(table)
}

fn cells(line: &str) -> Vec<&str> {
    line.trim()
        .trim_matches('|')
        .split('|')
        .map(str::trim)
        .collect()
}

fn print(table: &Table) -> String {
    // Kernels in the order of their versions, after the stack.
    let mut columns: Vec<&String> = table.keys().collect();
    columns.sort_by_key(|column| {
        let version = column.strip_prefix(INSTRUCTIONS).unwrap_or_default();
        version
            .split('.')
            .filter_map(|part| part.parse().ok())
            .collect::<Vec<u32>>()
    });
    let programs: BTreeSet<&String> = table.values().flat_map(BTreeMap::keys).collect();
    let mut text = String::from("| program |");
    columns
        .iter()
        .for_each(|column| text.push_str(&format!(" {column} |")));
    text.push_str("\n|---|");
    columns.iter().for_each(|_| text.push_str("--:|"));
    text.push('\n');
    for program in programs {
        text.push_str(&format!("| {program} |"));
        for column in &columns {
            let number = table[*column].get(program);
            let cell = number.map_or_else(|| "-".to_owned(), ToString::to_string);
            text.push_str(&format!(" {cell} |"));
        }
        text.push('\n');
    }
    text
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

    fn run() -> Table {
        let stacks = numbers(&[("from_pod", 320), ("to_pod", 64)]);
        let kernels = [
            (
                "6.12".to_owned(),
                numbers(&[("from_pod", 1000), ("to_pod", 500)]),
            ),
            (
                "6.1".to_owned(),
                numbers(&[("from_pod", 1100), ("to_pod", 510)]),
            ),
        ];
        table(stacks, kernels)
    }

    #[test]
    fn the_table_survives_being_written_and_read() -> Result<()> {
        let text = print(&run());
        assert_eq!(
            text.lines().next(),
            Some("| program | stack, bytes | instructions on 6.1 | instructions on 6.12 |")
        );
        assert_eq!(parse(&text)?, run());
        assert_eq!(parse("\n")?, Table::new());
        assert!(parse("| program | a |\n|---|--:|\n| x | 1 | 2 |\n").is_err());
        Ok(())
    }

    #[test]
    fn growth_beyond_the_slack_is_found() {
        let committed = run();
        assert_eq!(compare(&committed, &committed), Vec::<String>::new());
        let grown = |number| {
            table(
                numbers(&[]),
                [("6.1".to_owned(), numbers(&[("to_pod", number)]))],
            )
        };
        let only = |run: &Table| {
            compare(&committed, run)
                .into_iter()
                .filter(|f| f.contains("to_pod, "))
                .count()
        };
        assert_eq!(only(&grown(561)), 0);
        assert_eq!(only(&grown(562)), 1);
        assert_eq!(only(&grown(100)), 0);
    }

    #[test]
    fn new_and_lost_programs_are_found() {
        let mut now = run();
        let column = now.get_mut("instructions on 6.1").unwrap();
        column.remove("to_pod");
        column.insert("xdp_net".to_owned(), 7);
        assert_eq!(
            compare(&run(), &now),
            [
                "xdp_net is not in the table (instructions on 6.1: 7)",
                "to_pod has no instructions on 6.1 any more",
            ]
        );
    }

    #[test]
    fn an_update_changes_its_columns_alone() -> Result<()> {
        let page = std::env::temp_dir().join(format!("hachi-table-{}.md", std::process::id()));
        fs::write(&page, format!("before\n{BEGIN}\n{END}\nafter\n"))?;
        update(&page, &run())?;
        let newer = table(
            numbers(&[("from_pod", 8)]),
            [("6.1".to_owned(), numbers(&[("from_pod", 9)]))],
        );
        update(&page, &newer)?;
        let text = fs::read_to_string(&page)?;
        assert!(
            text.starts_with("before\n") && text.ends_with("after\n"),
            "{text}"
        );
        assert_eq!(text.matches(BEGIN).count(), 1);
        let table = read(&page)?;
        fs::remove_file(&page)?;
        assert_eq!(table["instructions on 6.1"], numbers(&[("from_pod", 9)]));
        assert_eq!(table["instructions on 6.12"], run()["instructions on 6.12"]);
        Ok(())
    }
}
