//! Replies as text.

use std::fmt::Write as _;

use hachi_api::Status;

/// Columns aligned, a heading in capitals, two spaces between.
pub(crate) fn table(columns: &[String], rows: &[Vec<String>]) -> String {
    let heading: Vec<String> = columns.iter().map(|c| c.to_uppercase()).collect();
    let mut widths: Vec<usize> = heading.iter().map(|c| c.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in std::iter::once(&heading).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// The agent's health, then its maps.
pub(crate) fn status(status: &Status) -> String {
    let mut out = String::new();
    let word = if status.ready { "ready" } else { "NOT READY" };
    let _ = writeln!(
        out,
        "Agent {} on {}: {word} (pid {}, ABI {}, {})",
        status.version, status.node, status.pid, status.abi, status.attach_mode
    );
    let _ = writeln!(
        out,
        "Endpoints: {}, policy revision: {}",
        status.endpoints, status.revision
    );
    let conntrack = &status.conntrack;
    let _ = writeln!(
        out,
        "Conntrack: {} of {} entries{}; expired {}, moved off removed backends {}, sockets closed {}",
        conntrack.entries,
        conntrack.capacity,
        if conntrack.pressed {
            " (NEARLY FULL)"
        } else {
            ""
        },
        conntrack.expired,
        conntrack.moved,
        conntrack.sockets_closed
    );
    let _ = writeln!(
        out,
        "Translations: {} of {} entries{}; expired {}",
        conntrack.translations,
        conntrack.translation_capacity,
        if conntrack.translations_pressed {
            " (NEARLY FULL)"
        } else {
            ""
        },
        conntrack.translations_expired
    );
    let _ = writeln!(out, "Socket load balancing: {}", status.socket_lb);
    for (uplink, state) in &status.xdp {
        let _ = writeln!(out, "XDP on {uplink}: {state}");
    }
    for problem in &status.problems {
        let _ = writeln!(out, "Problem: {problem}");
    }
    for missing in &status.missing {
        let _ = writeln!(
            out,
            "Without {} ({}): {}",
            missing.feature, missing.why, missing.without
        );
    }
    let rows: Vec<Vec<String>> = status
        .maps
        .iter()
        .map(|(name, used)| {
            let percent = u64::from(used.entries) * 100 / u64::from(used.capacity.max(1));
            vec![
                name.clone(),
                used.entries.to_string(),
                used.capacity.to_string(),
                format!("{percent}%"),
            ]
        })
        .collect();
    let columns = ["map", "entries", "capacity", "used"].map(String::from);
    out.push_str(&table(&columns, &rows));
    out
}

#[cfg(test)]
mod tests {
    use hachi_api::MissingFeature;

    use super::*;

    #[test]
    fn cells_line_up_under_their_heading() {
        let columns = ["a", "long"].map(String::from);
        let rows = vec![
            vec!["wide cell".into(), "x".into()],
            vec!["y".into(), "z".into()],
        ];
        assert_eq!(
            table(&columns, &rows),
            "A          LONG\nwide cell  x\ny          z\n"
        );
    }

    #[test]
    fn a_status_that_is_not_ready_says_so_and_why() {
        let text = status(&Status {
            problems: vec!["no podCIDR".into()],
            missing: vec![MissingFeature {
                feature: "tcx hooks".into(),
                why: "Invalid argument".into(),
                without: "clsact filters take its place".into(),
                ..MissingFeature::default()
            }],
            ..Status::default()
        });
        assert!(
            text.contains("NOT READY") && text.contains("Problem: no podCIDR"),
            "{text}"
        );
        assert!(
            text.contains("Without tcx hooks (Invalid argument): clsact filters"),
            "{text}"
        );
    }
}
