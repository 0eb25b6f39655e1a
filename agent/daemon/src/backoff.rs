//! How long a failed watch waits before it is tried again.
//!
//! kube's own default begins at 0.8 s. But the usual failure is a single one, "too old" (410 Gone)
//! or a connection that was cut, and policies are late for as long as a watch waits.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant},
};

use kube::runtime::utils::Backoff;

const FIRST: Duration = Duration::from_millis(50);
const MOST: Duration = Duration::from_secs(15);
/// A watch that has worked for as long is new to trouble. Shorter successes do not count: a list
/// that succeeds before every watch that fails would keep the API server busy.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30);

/// Doubles from [`FIRST`] to [`MOST`], and waits between half of that and all of it, so that the
/// agents of many nodes do not come at once.
pub(crate) struct WatchBackoff {
    next: Duration,
    last: Option<Instant>,
}

impl WatchBackoff {
    pub(crate) const fn new() -> Self {
        Self {
            next: FIRST,
            last: None,
        }
    }
}

impl Iterator for WatchBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = Instant::now();
        if self
            .last
            .is_some_and(|last| now.duration_since(last) > FORGOTTEN_AFTER + self.next)
        {
            self.next = FIRST;
        }
        self.last = Some(now);
        let half = self.next / 2;
        self.next = (self.next * 2).min(MOST);
        let random = RandomState::new().hash_one(0);
        Some(half + half.mul_f64((random % 1024) as f64 / 1024.0))
    }
}

impl Backoff for WatchBackoff {
    /// Called after every event; time alone forgets.
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_short_grows_and_is_bounded() {
        let mut backoff = WatchBackoff::new();
        let mut expected = FIRST;
        for _ in 0..20 {
            let wait = backoff.next().expect("it never gives up");
            assert!(wait >= expected / 2 && wait <= expected, "{wait:?}");
            backoff.reset();
            expected = (expected * 2).min(MOST);
        }
        assert_eq!(expected, MOST);
    }

    #[test]
    fn a_long_success_makes_it_short_again() {
        let mut backoff = WatchBackoff::new();
        for _ in 0..5 {
            backoff.next();
        }
        let long_ago = Instant::now().checked_sub(FORGOTTEN_AFTER * 3);
        backoff.last = Some(long_ago.expect("the machine has run for two minutes"));
        assert!(backoff.next().expect("it never gives up") <= FIRST);
    }
}
