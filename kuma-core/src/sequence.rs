//! Appends that were sent in an order and must not survive each other's failure.
//!
//! Invariants:
//! - Whatever becomes of an append, refused, failed or lost, is noted under its place before anything behind it is decided.
//! - What stands in front of the failed one is not touched.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::SeqCst},
};

/// A sequence of appends to **one entity** that were sent without waiting for each other: once one of them fails, whatever the reason,
/// all later ones are refused with [`Unavailable::SequenceBroken`](crate::Unavailable::SequenceBroken), so that none is committed
/// without those before it.
///
/// Without it, an append that is refused (too large, overloaded, a failing disk) leaves a gap that the next one, sent already, does
/// not know of. Give a clone to each append ([`Append::in_sequence`](crate::Append::in_sequence)), and submit them in order. A broken
/// sequence stays broken: start again with a new one.
#[derive(Clone, Debug, Default)]
pub struct Sequence(Arc<Places>);

#[derive(Debug)]
struct Places {
    next: AtomicU64,
    /// The first place that failed; `u64::MAX` if none did.
    broken: AtomicU64,
}

impl Default for Places {
    fn default() -> Self {
        Places { next: AtomicU64::new(0), broken: AtomicU64::new(u64::MAX) }
    }
}

impl Sequence {
    /// A new one, unbroken.
    pub fn new() -> Self {
        Sequence::default()
    }

    /// Whether an append of it has failed.
    pub fn is_broken(&self) -> bool {
        self.0.broken.load(SeqCst) != u64::MAX
    }

    /// The place of the next append.
    pub(crate) fn link(&self) -> Link {
        Link { place: self.0.next.fetch_add(1, SeqCst), sequence: self.clone() }
    }
}

/// An append's place in its sequence. Dropped, it breaks it: only what was committed holds.
#[derive(Debug)]
pub(crate) struct Link {
    sequence: Sequence,
    place: u64,
}

impl Link {
    /// Whether one in front of it failed.
    pub(crate) fn is_broken(&self) -> bool {
        self.sequence.0.broken.load(SeqCst) < self.place
    }

    /// From now on everything behind it is refused.
    pub(crate) fn break_off(&self) {
        self.sequence.0.broken.fetch_min(self.place, SeqCst);
    }

    /// It was committed.
    pub(crate) fn hold(mut self) {
        // Nothing stands behind the last place.
        self.place = u64::MAX;
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.break_off();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_breaks_all_behind_it_and_nothing_in_front_of_it() {
        let sequence = Sequence::new();
        let [first, second, third] = [(); 3].map(|()| sequence.link());
        second.break_off();
        assert!(sequence.is_broken());
        assert_eq!([&first, &second, &third].map(Link::is_broken), [false, false, true]);
        assert!(sequence.link().is_broken());
        first.break_off();
        assert!(second.is_broken());
    }

    #[test]
    fn what_is_lost_breaks_its_sequence_and_what_holds_does_not() {
        let sequence = Sequence::new();
        sequence.link().hold();
        assert!(!sequence.is_broken());
        drop(sequence.link());
        assert!(sequence.is_broken());
    }
}
