//! Histograms of durations, as Prometheus counts them.

use std::{fmt::Write as _, time::Duration};

/// Upper bounds of the buckets in seconds: from what one write takes to what nobody waits for.
const BOUNDS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// How often something took how long.
#[derive(Clone, Debug, Default)]
pub(crate) struct Histogram {
    /// By the first bound that it was within.
    buckets: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

impl Histogram {
    /// Counts one.
    pub(crate) fn observe(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        if let Some(bucket) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            self.buckets[bucket] += 1;
        }
        self.count += 1;
        self.sum += seconds;
    }

    /// Writes the samples of a family; `labels` without braces, and with a comma behind each.
    pub(crate) fn write(&self, name: &str, labels: &str, out: &mut String) {
        let mut within = 0;
        for (bound, count) in BOUNDS.iter().zip(self.buckets) {
            within += count;
            let _ = writeln!(out, "{name}_bucket{{{labels}le=\"{bound}\"}} {within}");
        }
        let all = labels.trim_end_matches(',');
        let braced = if all.is_empty() {
            String::new()
        } else {
            format!("{{{all}}}")
        };
        let Self { count, sum, .. } = self;
        let _ = writeln!(
            out,
            "{name}_bucket{{{labels}le=\"+Inf\"}} {count}\n{name}_sum{braced} {sum}\n{name}_count{braced} {count}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up() {
        let mut histogram = Histogram::default();
        for milliseconds in [0, 1, 30, 60_000] {
            histogram.observe(Duration::from_millis(milliseconds));
        }
        let mut text = String::new();
        histogram.write("x", "kind=\"a\",", &mut text);
        for line in [
            "x_bucket{kind=\"a\",le=\"0.0005\"} 1",
            "x_bucket{kind=\"a\",le=\"0.001\"} 2",
            "x_bucket{kind=\"a\",le=\"0.025\"} 2",
            "x_bucket{kind=\"a\",le=\"0.05\"} 3",
            "x_bucket{kind=\"a\",le=\"10\"} 3",
            "x_bucket{kind=\"a\",le=\"+Inf\"} 4",
            "x_sum{kind=\"a\"} 60.031",
            "x_count{kind=\"a\"} 4",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        let mut text = String::new();
        histogram.write("x", "", &mut text);
        assert!(text.ends_with("x_sum 60.031\nx_count 4\n"), "{text}");
    }
}
