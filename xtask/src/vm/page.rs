//! Tables in a Markdown page, each between two markers, read and written by the run that fills them:
//! what people read is what is checked.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};

/// Column -> row -> cell.
pub(crate) type Table = BTreeMap<String, BTreeMap<String, String>>;

/// What stands where a row has no cell in a column.
const NOTHING: &str = "-";

/// The table called `name`.
pub(crate) fn read(text: &str, name: &str) -> Result<Table> {
    parse(split(text, name)?.1)
}

/// The page with columns of the table called `name` replaced or added; others stay, without the
/// rows that no column has any more.
pub(crate) fn with_columns(text: &str, name: &str, new: &Table) -> Result<String> {
    let (before, old, after) = split(text, name)?;
    let mut table = parse(old)?;
    table.extend(new.clone());
    // Markdown wants the table apart from the markers.
    Ok(format!("{before}\n\n{}\n{after}", print(name, &table)))
}

/// The page up to the end of the first marker, between the two, and from the second on.
fn split<'a>(text: &'a str, name: &str) -> Result<(&'a str, &'a str, &'a str)> {
    let (begin, end) = (
        format!("<!-- {name}: begin -->"),
        format!("<!-- {name}: end -->"),
    );
    let start = text.find(&begin).with_context(|| format!("no {begin}"))? + begin.len();
    let stop = text.find(&end).with_context(|| format!("no {end}"))?;
    if stop < start {
        bail!("{end} before {begin}");
    }
    Ok((&text[..start], &text[start..stop], &text[stop..]))
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
        if row.len() != columns.len() {
            bail!("a row of the table has {} cells: {row:?}", row.len());
        }
        for (column, cell) in columns
            .iter()
            .zip(&row)
            .skip(1)
            .filter(|(_, c)| **c != NOTHING)
        {
            let rows = table.entry((*column).to_owned()).or_default();
            rows.insert(row[0].to_owned(), (*cell).to_owned());
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

fn print(name: &str, table: &Table) -> String {
    // Kernels in the order of their versions, what is no kernel before them.
    let mut columns: Vec<&String> = table.keys().collect();
    columns.sort_by_key(|column| {
        column
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|part| part.parse().ok())
            .collect::<Vec<u32>>()
    });
    let rows: BTreeSet<&String> = table.values().flat_map(BTreeMap::keys).collect();
    let mut text = format!("| {name} |");
    columns
        .iter()
        .for_each(|column| text.push_str(&format!(" {column} |")));
    text.push_str("\n|---|");
    columns.iter().for_each(|_| text.push_str("--:|"));
    text.push('\n');
    for row in rows {
        text.push_str(&format!("| {row} |"));
        for column in &columns {
            let cell = table[*column].get(row).map_or(NOTHING, String::as_str);
            text.push_str(&format!(" {cell} |"));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(cells: &[(&str, &str)]) -> BTreeMap<String, String> {
        cells
            .iter()
            .map(|(row, cell)| ((*row).to_owned(), (*cell).to_owned()))
            .collect()
    }

    fn table() -> Table {
        [
            ("on 6.12".to_owned(), column(&[("a", "1"), ("b", "2")])),
            ("on 6.1".to_owned(), column(&[("a", "3")])),
            ("stack".to_owned(), column(&[("b", "4")])),
        ]
        .into()
    }

    #[test]
    fn a_table_survives_being_written_and_read() -> Result<()> {
        let text = print("thing", &table());
        let expected = "| thing | stack | on 6.1 | on 6.12 |\n|---|--:|--:|--:|\n\
            | a | - | 3 | 1 |\n| b | 4 | - | 2 |\n";
        assert_eq!(text, expected);
        assert_eq!(parse(&text)?, table());
        assert_eq!(parse("\n")?, Table::new());
        assert!(parse("| thing | a |\n|---|--:|\n| x | 1 | 2 |\n").is_err());
        Ok(())
    }

    #[test]
    fn an_update_changes_its_columns_alone() -> Result<()> {
        let page = "before\n<!-- thing: begin -->\n<!-- thing: end -->\nafter\n";
        let page = with_columns(page, "thing", &table())?;
        let newer: Table = [("on 6.1".to_owned(), column(&[("c", "9")]))].into();
        let page = with_columns(&page, "thing", &newer)?;
        assert!(
            page.starts_with("before\n") && page.ends_with("after\n"),
            "{page}"
        );
        assert_eq!(page.matches("<!-- thing: begin -->").count(), 1);
        let read = read(&page, "thing")?;
        assert_eq!(read["on 6.1"], column(&[("c", "9")]));
        assert_eq!(read["on 6.12"], table()["on 6.12"]);
        assert!(super::read(&page, "other").is_err());
        Ok(())
    }
}
