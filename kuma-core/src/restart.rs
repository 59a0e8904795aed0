//! When a failing entity is left alone: a rule without a clock.
//!
//! Invariant: an entity is tried again as long as it failed fewer than `failures_max` times within `window`; damage that no retry
//! can mend quarantines it at once.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// See [`Options::quarantine`](crate::Options::quarantine).
#[derive(Clone, Copy, Debug)]
pub(crate) struct RestartPolicy {
    pub(crate) failures_max: u32,
    pub(crate) window: Duration,
    pub(crate) quarantine: Duration,
}

/// What is remembered of an entity that failed.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    at: VecDeque<Instant>,
    until: Option<Instant>,
    why: String,
}

impl Failures {
    /// Notes a failure.
    pub(crate) fn record(&mut self, policy: &RestartPolicy, now: Instant, why: String, hopeless: bool) {
        self.at.push_back(now);
        while self.at.front().is_some_and(|at| now.duration_since(*at) > policy.window) {
            self.at.pop_front();
        }
        self.why = why;
        if hopeless || self.at.len() >= policy.failures_max as usize {
            self.until = Some(now + policy.quarantine);
        }
    }

    /// For how long it is still left alone, and why.
    pub(crate) fn quarantined(&self, now: Instant) -> Option<(Duration, &str)> {
        let left = self.until?.checked_duration_since(now).filter(|left| !left.is_zero())?;
        Some((left, &self.why))
    }

    /// Whether it can be forgotten.
    pub(crate) fn is_over(&self, policy: &RestartPolicy, now: Instant) -> bool {
        let recent = self.at.back().is_some_and(|at| now.duration_since(*at) <= policy.window);
        !recent && self.quarantined(now).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: RestartPolicy =
        RestartPolicy { failures_max: 3, window: Duration::from_secs(60), quarantine: Duration::from_secs(300) };

    #[test]
    fn failures_far_apart_do_not_quarantine() {
        let (start, mut failures) = (Instant::now(), Failures::default());
        for minute in 0..10 {
            let now = start + Duration::from_secs(61 * minute);
            failures.record(&POLICY, now, "panic".into(), false);
            assert!(failures.quarantined(now).is_none());
        }
    }

    #[test]
    fn the_third_failure_within_the_window_quarantines_for_a_while() {
        let (start, mut failures) = (Instant::now(), Failures::default());
        for second in [0, 20, 40] {
            failures.record(&POLICY, start + Duration::from_secs(second), "panic".into(), false);
        }
        let now = start + Duration::from_secs(100);
        assert_eq!(failures.quarantined(now), Some((Duration::from_secs(240), "panic")));
        assert!(!failures.is_over(&POLICY, now));
        let later = start + Duration::from_secs(341);
        assert!(failures.quarantined(later).is_none() && failures.is_over(&POLICY, later));
    }

    #[test]
    fn hopeless_damage_quarantines_at_once() {
        let (now, mut failures) = (Instant::now(), Failures::default());
        failures.record(&POLICY, now, "bad row".into(), true);
        assert!(failures.quarantined(now).is_some());
    }
}
