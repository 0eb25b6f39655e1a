//! Whether a crate's documentation has examples to test: asking rustdoc takes it a second a crate,
//! and the diagrams that most modules open with are none.

use std::fs;
use std::path::Path;

/// Whether any source file below a directory has an example.
pub(crate) fn has_examples(directory: &Path) -> bool {
    let Ok(entries) = fs::read_dir(directory) else {
        return false;
    };
    entries.filter_map(Result::ok).any(|entry| {
        let path = entry.path();
        if path.is_dir() {
            return has_examples(&path);
        }
        let source = path.extension().is_some_and(|extension| extension == "rs");
        source && fs::read_to_string(&path).is_ok_and(|text| is_example_in(&text))
    })
}

/// Whether a fence in a documentation comment opens what rustdoc would compile.
fn is_example_in(text: &str) -> bool {
    let mut open = false;
    for line in text.lines().map(str::trim_start) {
        let Some(comment) = line
            .strip_prefix("///")
            .or_else(|| line.strip_prefix("//!"))
        else {
            continue;
        };
        let Some(tag) = comment.trim().strip_prefix("```") else {
            continue;
        };
        if !open && (tag.is_empty() || tag.contains("rust") || tag.contains("no_run")) {
            return true;
        }
        open = !open;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diagram_is_no_example() {
        assert!(!is_example_in("//! ```text\n//! a -> b\n//! ```\n"));
        assert!(is_example_in(
            "//! ```text\n//! ```\n/// ```\n/// f();\n/// ```\n"
        ));
        assert!(is_example_in("    /// ```rust,no_run\n"));
        assert!(!is_example_in("let x = \"```\";\n"));
    }
}
