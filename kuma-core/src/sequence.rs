//! Appends that were sent in an order and must not survive each other's failure.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};

/// A sequence of appends to **one entity** that were sent without waiting for each other: once one of them fails, whatever the reason,
/// all later ones are refused with [`Unavailable::SequenceBroken`](crate::Unavailable::SequenceBroken), so that none is committed
/// without those before it.
///
/// Without it, an append that is refused (too large, overloaded, a failing disk) leaves a gap that the next one, sent already, does
/// not know of. Give a clone to each append ([`Append::in_sequence`](crate::Append::in_sequence)), and submit them in order. A broken
/// sequence stays broken: start again with a new one.
#[derive(Clone, Debug, Default)]
pub struct Sequence(Arc<AtomicBool>);

impl Sequence {
    /// A new one, unbroken.
    pub fn new() -> Self {
        Sequence::default()
    }

    /// Whether an append of it has failed.
    pub fn is_broken(&self) -> bool {
        self.0.load(SeqCst)
    }

    /// From now on every append of it is refused.
    pub(crate) fn break_off(&self) {
        self.0.store(true, SeqCst);
    }
}
