//! Where requests go: who owns each slot, as far as this node has heard.
//!
//! Invariant: of two owners the one with the higher epoch counts. It is a hint, never authority: whoever is asked looks at the token.

use kuma_core::{DiskId, Epoch, SLOTS, Slot};
use parking_lot::RwLock;

/// The owners that this node has heard of.
pub struct Routes(RwLock<Vec<Option<(Epoch, DiskId)>>>);

impl Default for Routes {
    fn default() -> Self {
        Routes(RwLock::new(vec![None; usize::from(SLOTS)]))
    }
}

impl Routes {
    /// Takes in that a disk owns a slot; whether that was news.
    pub fn note(&self, slot: Slot, epoch: Epoch, disk: DiskId) -> bool {
        let mut routes = self.0.write();
        let Some(route) = routes.get_mut(usize::from(slot.number())) else { return false };
        let is_news = route.is_none_or(|(known, _)| epoch > known);
        if is_news {
            *route = Some((epoch, disk));
        }
        is_news
    }

    /// Who owns a slot.
    pub fn get(&self, slot: Slot) -> Option<(Epoch, DiskId)> {
        self.0.read().get(usize::from(slot.number())).copied().flatten()
    }

    /// All of them, by slot.
    pub fn all(&self) -> Vec<Option<(Epoch, DiskId)>> {
        self.0.read().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_epoch_counts_in_whatever_order_it_is_heard() {
        let (routes, slot) = (Routes::default(), Slot::new(7));
        let epoch = |counter| Epoch { term: 1, counter };
        assert!(routes.note(slot, epoch(2), DiskId([2; 16])));
        assert!(!routes.note(slot, epoch(1), DiskId([1; 16])) && !routes.note(slot, epoch(2), DiskId([3; 16])));
        assert_eq!(routes.get(slot), Some((epoch(2), DiskId([2; 16]))));
        assert!(!routes.note(Slot::OWN, epoch(9), DiskId([2; 16])));
    }
}
