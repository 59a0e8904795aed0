//! The tail: commits that are in the log and not yet in its indexes.
//!
//! An index on `(eid, version)` is the main cost of small appends: each row dirties a leaf page of its own, which is written to the
//! write-ahead log and to the database again. One on append keys costs even more: they are hashes, and each goes to a random leaf of
//! its entity. So new rows are only noted here, and written to `log_index` and `key_index` many at a time, sorted.
//!
//! Invariants:
//! - The rows of the log are those in `log_index` (up to `progress.indexed_position`) and those in the tail (behind it), exactly.
//!   The same holds for its rows with an append key, `key_index`, and the keys that the tail has.
//! - The tail changes only after the transaction that changes the indexes has committed; it is rebuilt from the log at open.
//! - A reader looks at the tail first and at an index then: what moved meanwhile it finds twice, never not at all.

use std::{collections::HashMap, sync::Arc};

use parking_lot::RwLock;

use crate::append_keys::AppendKeys;

/// The tail is written to the indexes when it has this many rows. More save more pages when many entities are written to; writing them
/// is some 10 ms in which nothing else is committed, with append keys among millions of them up to some 125 ms on a busy machine.
pub(crate) const TAIL_ROWS_MAX: usize = 8192;

/// Where a commit stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TailRow {
    pub(crate) eid: i64,
    pub(crate) version: u64,
    pub(crate) position: u64,
}

/// Rows by entity, each entity's in the order of versions, and those with an append key by it.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    by_entity: HashMap<i64, Vec<TailRow>>,
    rows: usize,
    keys: AppendKeys,
}

/// Read by readers, changed by the writer.
pub(crate) type SharedTail = Arc<RwLock<Tail>>;

impl Tail {
    /// Adds rows, and the keys of those that have one.
    pub(crate) fn extend(&mut self, rows: impl IntoIterator<Item = TailRow>, keys: AppendKeys) {
        for row in rows {
            self.by_entity.entry(row.eid).or_default().push(row);
            self.rows += 1;
        }
        self.keys.extend(keys);
    }

    pub(crate) fn clear(&mut self) {
        *self = Tail::default();
    }

    pub(crate) fn len(&self) -> usize {
        self.rows
    }

    pub(crate) fn keys(&self) -> &AppendKeys {
        &self.keys
    }

    /// Rows of an entity whose version is above `after`, oldest first.
    pub(crate) fn after(&self, eid: i64, after: u64) -> Vec<TailRow> {
        let rows = self.by_entity.get(&eid).map(Vec::as_slice).unwrap_or_default();
        rows[rows.partition_point(|row| row.version <= after)..].to_vec()
    }

    /// Rows of an entity whose version is below `before`: the newest `rows_max` of them, oldest first.
    pub(crate) fn before(&self, eid: i64, before: u64, rows_max: usize) -> Vec<TailRow> {
        let rows = self.by_entity.get(&eid).map(Vec::as_slice).unwrap_or_default();
        let end = rows.partition_point(|row| row.version < before);
        rows[end.saturating_sub(rows_max)..end].to_vec()
    }

    /// The newest row of an entity at or below `version`.
    pub(crate) fn at_or_below(&self, eid: i64, version: u64) -> Option<TailRow> {
        let rows = self.by_entity.get(&eid)?;
        rows[..rows.partition_point(|row| row.version <= version)].last().copied()
    }

    /// All rows with `more`, in the order of `log_index`.
    pub(crate) fn sorted_with(&self, more: &[TailRow]) -> Vec<TailRow> {
        let mut rows: Vec<TailRow> = self.by_entity.values().flatten().chain(more).copied().collect();
        rows.sort_unstable_by_key(|row| (row.eid, row.version));
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(eid: i64, version: u64, position: u64) -> TailRow {
        TailRow { eid, version, position }
    }

    #[test]
    fn the_tail_is_read_by_entity_and_written_in_index_order() {
        let mut tail = Tail::default();
        let mut keys = AppendKeys::default();
        keys.note(7, b"key", 12);
        tail.extend([row(7, 1, 10), row(3, 5, 11), row(7, 4, 12), row(7, 6, 13)], keys);
        assert_eq!(tail.after(7, 1), [row(7, 4, 12), row(7, 6, 13)]);
        assert_eq!(tail.after(7, 3), [row(7, 4, 12), row(7, 6, 13)]);
        assert_eq!(tail.after(9, 0), []);
        assert_eq!(tail.before(7, 6, 9), [row(7, 1, 10), row(7, 4, 12)]);
        assert_eq!(tail.before(7, 7, 2), [row(7, 4, 12), row(7, 6, 13)]);
        assert_eq!(tail.before(7, 1, 9), []);
        assert_eq!(tail.at_or_below(7, 5), Some(row(7, 4, 12)));
        assert_eq!(tail.at_or_below(7, 0), None);
        let sorted = tail.sorted_with(&[row(3, 9, 14)]);
        assert_eq!(sorted, [row(3, 5, 11), row(3, 9, 14), row(7, 1, 10), row(7, 4, 12), row(7, 6, 13)]);
        assert_eq!(tail.keys().find(7, b"key"), Some(12));
        tail.clear();
        assert_eq!((tail.len(), tail.after(7, 0), tail.keys().find(7, b"key")), (0, vec![], None));
    }
}
