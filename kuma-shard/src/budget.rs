//! Admission: how many bytes may wait for the disk.
//!
//! Mailboxes are unbounded, so that the bound stands in front of them: whoever wants to submit takes a permit for its bytes, and
//! the permit travels with the commit until it is settled. Beyond the bound the answer is "overloaded", at once.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

/// A bound on something countable.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
}

impl Budget {
    /// A budget of `limit` units, shared by whoever holds it.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Budget { used: AtomicUsize::new(0), limit })
    }

    /// Takes `amount` units, or nothing if that would pass the limit. A single request above the limit is admitted when nothing
    /// else is, so that no request is refused for ever.
    pub fn take(self: &Arc<Self>, amount: usize) -> Option<Permit> {
        self.used
            .fetch_update(Relaxed, Relaxed, |used| (used == 0 || used + amount <= self.limit).then_some(used + amount))
            .ok()?;
        Some(Permit { budget: self.clone(), amount })
    }

    /// Units taken now.
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// The bound.
    pub fn limit(&self) -> usize {
        self.limit
    }
}

/// Units taken from a [`Budget`], given back on drop.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<Budget>,
    amount: usize,
}

impl Permit {
    /// Takes `more` units, even beyond the limit: for a request whose size is only known once it was admitted.
    pub fn grow(&mut self, more: usize) {
        self.budget.used.fetch_add(more, Relaxed);
        self.amount += more;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.amount, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_budget_refuses_until_a_permit_is_dropped() {
        let budget = Budget::new(10);
        let first = budget.take(7).unwrap();
        assert!(budget.take(4).is_none());
        let second = budget.take(3).unwrap();
        assert_eq!(budget.used(), 10);
        drop((first, second));
        assert_eq!(budget.used(), 0);
        assert!(budget.take(11).is_some(), "a request above the limit is admitted when nothing else is");
    }
    #[test]
    fn a_permit_that_grew_gives_everything_back() {
        let budget = Budget::new(10);
        let mut permit = budget.take(1).unwrap();
        permit.grow(20);
        assert_eq!(budget.used(), 21);
        assert!(budget.take(1).is_none());
        drop(permit);
        assert_eq!(budget.used(), 0);
    }
}
