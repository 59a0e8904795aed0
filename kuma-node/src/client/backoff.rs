//! How long to wait before something is tried again. A rule: no clock, and no chance but what it is given.

use std::time::Duration;

/// Waits that double from one to the next, up to a limit, with jitter: those who were cut off together do not come back together.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Backoff { first, longest, failures: 0 }
    }

    /// It worked.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// How often it has failed since it last worked.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// How long to wait after one more failure. `at_least` is what the other side asked for; `chance` is any number.
    pub(crate) fn wait(&mut self, at_least: Option<Duration>, chance: u32) -> Duration {
        let whole = self.first.saturating_mul(1 << self.failures.min(16)).min(self.longest);
        self.failures = self.failures.saturating_add(1);
        // A half of it is certain: none comes back at once.
        let half = whole / 2;
        let jitter = half.mul_f64(f64::from(chance) / f64::from(u32::MAX));
        // Who waits for the same moment gets the jitter on top.
        at_least.map_or(half + jitter, |at_least| at_least.min(self.longest).max(half) + jitter)
    }
}

/// A number that nobody can foresee; if there is none, waits have no jitter.
pub(crate) fn chance() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn waits_double_up_to_the_limit_and_begin_again() {
        let mut backoff = Backoff::new(MS(100), MS(1000));
        let waits: Vec<Duration> = (0..6).map(|_| backoff.wait(None, u32::MAX)).collect();
        assert_eq!(waits, [MS(100), MS(200), MS(400), MS(800), MS(1000), MS(1000)]);
        assert_eq!(backoff.failures(), 6);
        backoff.reset();
        assert_eq!(backoff.wait(None, 0), MS(50));
    }

    #[test]
    fn what_the_server_asks_for_is_kept_within_reason() {
        let mut backoff = Backoff::new(MS(100), MS(1000));
        assert_eq!(backoff.wait(Some(MS(700)), 0), MS(700));
        assert_eq!(backoff.wait(Some(MS(3_600_000)), 0), MS(1000));
    }
}
