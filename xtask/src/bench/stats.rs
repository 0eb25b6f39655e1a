//! Percentiles, and ratios between things that were measured in the same repetitions.

use std::time::Duration;

/// What was measured of one thing, by repetition. The unit is the caller's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples {
    repetitions: Vec<Vec<f64>>,
}

impl Samples {
    /// Adds the values of one repetition.
    pub(crate) fn add(&mut self, values: Vec<f64>) {
        self.repetitions.push(values);
    }

    /// Adds the durations of one repetition, as milliseconds.
    pub(crate) fn add_durations(&mut self, values: &[Duration]) {
        self.add(values.iter().map(|d| d.as_secs_f64() * 1e3).collect());
    }

    /// The percentile of all values of all repetitions; NaN if there are none.
    pub(crate) fn percentile(&self, percent: f64) -> f64 {
        percentile(self.repetitions.concat(), percent)
    }

    /// The percentile within each repetition.
    fn by_repetition(&self, percent: f64) -> impl Iterator<Item = f64> + '_ {
        self.repetitions
            .iter()
            .map(move |values| percentile(values.clone(), percent))
    }
}

/// The median, over the repetitions, of the ratio of two things' percentiles: what slows the whole
/// machine down for a while cancels out.
pub(crate) fn paired_ratio(ours: &Samples, theirs: &Samples, percent: f64) -> f64 {
    let ratios = ours
        .by_repetition(percent)
        .zip(theirs.by_repetition(percent))
        .map(|(ours, theirs)| ours / theirs);
    percentile(ratios.collect(), 50.0)
}

/// The value that `percent` of all are not above (nearest rank); for 50, of an even number of
/// values, the mean of the middle two.
fn percentile(mut values: Vec<f64>, percent: f64) -> f64 {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    let count = values.len();
    if count == 0 {
        return f64::NAN;
    }
    if percent == 50.0 && count.is_multiple_of(2) {
        return f64::midpoint(values[count / 2 - 1], values[count / 2]);
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank among a few thousand values"
    )]
    let rank = (percent / 100.0 * count as f64).ceil() as usize;
    values[rank.clamp(1, count) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(values.clone(), 99.0), 99.0);
        assert_eq!(percentile(values, 50.0), 50.5);
        assert_eq!(percentile(vec![3.0, 1.0, 2.0], 50.0), 2.0);
        assert_eq!(percentile(vec![5.0], 99.0), 5.0);
        assert!(percentile(vec![], 50.0).is_nan());
    }

    #[test]
    fn a_slow_repetition_does_not_bend_the_ratio() {
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for scale in [1.0, 1.0, 10.0] {
            ours.add(vec![scale, 2.0 * scale, 3.0 * scale]);
            theirs.add(vec![4.0 * scale]);
        }
        assert_eq!(paired_ratio(&ours, &theirs, 50.0), 0.5);
    }

    #[test]
    fn durations_are_milliseconds() {
        let mut samples = Samples::default();
        samples.add_durations(&[Duration::from_micros(1500)]);
        assert_eq!(samples.percentile(50.0), 1.5);
    }
}
