//! What a writer writes: the part of a database's work that differs from file to file.

use std::collections::BTreeMap;

use sqlx::SqliteConnection;

use crate::{CommitError, Digest, Slot, progress::Stored, slots::SlotSum};

/// How much an entry adds to its group.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Size {
    pub(crate) bytes: usize,
    pub(crate) events: usize,
}

/// What each transaction writes into the `progress` row beside its commit counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// The place of the next log row. Positions are never used twice: readers have passed them.
    pub(crate) next_position: u64,
    /// Slot lengths and digests in the file are those of the rows up to here.
    pub(crate) mark_position: u64,
    /// Log rows up to here are in the log's index.
    pub(crate) indexed_position: u64,
    /// Of all rows.
    pub(crate) digest: Digest,
}

/// What a file holds as of its last commit, as its writer knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Audit {
    pub(crate) stored: Stored,
    pub(crate) slots: BTreeMap<Slot, SlotSum>,
    /// Of each slot with some, how often its rows became others since the file was opened: with each step of an erasure, and as they left.
    pub(crate) rewrites: BTreeMap<Slot, u64>,
}

/// One database's tables as its only writer keeps them: an image in memory, changed group by group.
///
/// Invariant: the image is that of the last commit plus at most one staged group; [`Book::keep`] and [`Book::drop_staged`] end the
/// staging, nothing else does.
pub(crate) trait Book: Send + Sync + 'static {
    /// One thing to write, with whoever waits for it.
    type Entry: Send + 'static;

    /// What `entry` adds to its group.
    fn size(entry: &Self::Entry) -> Size;

    /// Whether writing `group` needs a transaction.
    fn has_work(&self, group: &[Self::Entry]) -> bool;

    /// Writes `group` as one transaction that sets the commit counter to `commits`, and stages what it changes. Entries that
    /// cannot be written are refused one by one, and do not fail their neighbours. Sets `committing` before anything is sent
    /// that contains COMMIT.
    fn transact(
        &mut self,
        connection: &mut SqliteConnection,
        group: &mut [Self::Entry],
        commits: u64,
        committing: &mut bool,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// From now on each transaction that finds this set also persists the marks.
    fn request_marks(&mut self);

    /// The progress as of the staged group.
    fn progress(&self) -> Progress;

    /// What each slot holds as of the last commit. Only the book of a shard has slots.
    fn slots(&self) -> BTreeMap<Slot, SlotSum> {
        BTreeMap::new()
    }

    /// Of each slot with some, how often its rows became others.
    fn rewrites(&self) -> BTreeMap<Slot, u64> {
        BTreeMap::new()
    }

    /// The staged group is durable.
    fn keep(&mut self);

    /// The staged group never happened.
    fn drop_staged(&mut self);

    /// Tells whoever waits for `entry`.
    fn settle(&mut self, entry: Self::Entry, outcome: Result<(), CommitError>);
}
