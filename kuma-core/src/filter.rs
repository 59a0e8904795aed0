//! Which events a subscription or a projection is about.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::audit;

/// Kinds, and of each kind all events or those with certain names. Names are the current ones, after upcasters.
///
/// ```
/// use kuma_core::Filter;
/// let everything = Filter::all(); // but for the audit log, which has to be named
/// let some = Filter::kind("account").and_event("order", "Placed").and_event("order", "Paid");
/// assert!(some.matches("order", "Paid") && !some.matches("order", "Shipped"));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Filter {
    /// Of each kind the names; none for all of them. No kind at all stands for every kind.
    kinds: BTreeMap<String, Option<BTreeSet<String>>>,
}

impl Filter {
    /// Every event of every kind, except those of the store's own audit log.
    pub fn all() -> Self {
        Filter::default()
    }

    /// Every event of one kind.
    pub fn kind(kind: impl Into<String>) -> Self {
        Filter::all().and_kind(kind)
    }

    /// The events of one kind with one name.
    pub fn event(kind: impl Into<String>, name: impl Into<String>) -> Self {
        Filter::all().and_event(kind, name)
    }

    /// Also every event of this kind.
    pub fn and_kind(mut self, kind: impl Into<String>) -> Self {
        self.kinds.insert(kind.into(), None);
        self
    }

    /// Also the events of this kind with this name.
    pub fn and_event(mut self, kind: impl Into<String>, name: impl Into<String>) -> Self {
        if let Some(names) = self.kinds.entry(kind.into()).or_insert_with(|| Some(BTreeSet::new())) {
            names.insert(name.into());
        }
        self
    }

    /// Whether an event of this kind may be one.
    pub fn matches_kind(&self, kind: &str) -> bool {
        match self.kinds.is_empty() {
            true => !audit::is_reserved(kind),
            false => self.kinds.contains_key(kind),
        }
    }

    /// Whether an event of this kind with this name is one.
    pub fn matches(&self, kind: &str, name: &str) -> bool {
        match self.kinds.get(kind) {
            Some(Some(names)) => names.contains(name),
            Some(None) => true,
            None => self.matches_kind(kind),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_does_not_include_the_audit_log_unless_it_is_named() {
        assert!(Filter::all().matches("account", "Deposited"));
        assert!(!Filter::all().matches("kuma.audit", "ErasureCompleted"));
        assert!(Filter::kind("kuma.audit").matches("kuma.audit", "ErasureCompleted"));
        assert!(!Filter::kind("kuma.audit").matches_kind("account"));
    }

    #[test]
    fn a_whole_kind_is_not_narrowed_by_naming_one_of_its_events() {
        let filter = Filter::kind("order").and_event("order", "Paid");
        assert!(filter.matches("order", "Shipped"));
        let filter = Filter::event("order", "Paid").and_kind("order");
        assert!(filter.matches("order", "Shipped"));
        let filter = Filter::event("order", "Paid").and_event("order", "Shipped");
        assert!(filter.matches("order", "Shipped") && !filter.matches("order", "Placed"));
    }
}
