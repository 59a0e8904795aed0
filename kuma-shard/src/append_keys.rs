//! Append keys of commits that are in the log and not yet in `key_index`: the part of the tail that is looked up by key.
//!
//! Invariant: a key of an entity stands for one commit. Should it be noted twice all the same, the first one stays, as in the table.

use std::collections::BTreeMap;

/// Positions of keyed commits, in the order of the table.
#[derive(Clone, Debug, Default)]
pub(crate) struct AppendKeys(BTreeMap<(i64, Box<[u8]>), u64>);

/// Where the commit with an append key stands: a row of `key_index`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct KeyedRow {
    pub(crate) eid: i64,
    pub(crate) append_key: Box<[u8]>,
    pub(crate) position: u64,
}

impl AppendKeys {
    pub(crate) fn note(&mut self, eid: i64, append_key: &[u8], position: u64) {
        self.0.entry((eid, append_key.into())).or_insert(position);
    }

    pub(crate) fn extend(&mut self, more: AppendKeys) {
        for (key, position) in more.0 {
            self.0.entry(key).or_insert(position);
        }
    }

    /// The position of the commit that was appended under this key.
    pub(crate) fn find(&self, eid: i64, append_key: &[u8]) -> Option<u64> {
        self.0.get(&(eid, append_key.into())).copied()
    }

    /// The keys of an entity.
    pub(crate) fn of(&self, eid: i64) -> impl Iterator<Item = &[u8]> {
        // No key comes before the empty one.
        let keys = self.0.range((eid, Box::default())..).take_while(move |((other, _), _)| *other == eid);
        keys.map(|((_, append_key), _)| &**append_key)
    }

    /// All rows with `more`, in the order of the table.
    pub(crate) fn sorted_with(&self, more: &AppendKeys) -> Vec<KeyedRow> {
        let row = |((eid, append_key), position): (&(i64, Box<[u8]>), &u64)| KeyedRow {
            eid: *eid,
            append_key: append_key.clone(),
            position: *position,
        };
        let mut rows: Vec<KeyedRow> = self.0.iter().chain(&more.0).map(row).collect();
        // Two runs that are sorted already, of which the second is short.
        rows.sort();
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(eid: i64, append_key: &[u8], position: u64) -> KeyedRow {
        KeyedRow { eid, append_key: append_key.into(), position }
    }

    #[test]
    fn keys_are_found_by_entity_and_written_in_the_order_of_the_table() {
        let mut keys = AppendKeys::default();
        for (eid, append_key, position) in [(7, b"b", 10), (3, b"b", 11), (7, b"a", 12), (8, b"a", 13)] {
            keys.note(eid, append_key, position);
        }
        assert_eq!(keys.find(7, b"b"), Some(10));
        assert_eq!((keys.find(7, b"c"), keys.find(7, b""), keys.find(3, b"a")), (None, None, None));
        assert_eq!(keys.of(7).collect::<Vec<_>>(), [b"a", b"b"]);
        assert_eq!(keys.of(4).count(), 0);
        let mut more = AppendKeys::default();
        more.note(7, b"", 14);
        let sorted = keys.sorted_with(&more);
        assert_eq!(sorted, [row(3, b"b", 11), row(7, b"", 14), row(7, b"a", 12), row(7, b"b", 10), row(8, b"a", 13)]);
        // The first one stays, whichever way the second one comes.
        more.note(7, b"a", 15);
        more.note(7, b"", 16);
        keys.extend(more);
        assert_eq!((keys.find(7, b"a"), keys.find(7, b"")), (Some(12), Some(14)));
    }
}
