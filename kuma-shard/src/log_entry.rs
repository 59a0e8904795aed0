//! What is handed to the writer of a shard: commits, barriers, snapshots and erasures, each with whoever waits for it.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::{
    Activation, CommitError, EntityRow, NotWritten, Slot, SnapshotRow, TransferId,
    erase::EraseStep,
    moving::{Incoming, SlotChange},
    replace::Replacement,
};

/// The events of one append, sealed.
#[derive(Debug)]
pub struct Commit {
    /// The entity: number, slot, hash and key must be those of its row.
    pub entity: Arc<EntityRow>,
    /// Whether the entity's row has to be written first: this is its first commit.
    pub create: bool,
    /// The version of the first event.
    pub first_version: u64,
    /// How many events.
    pub count: u32,
    /// Microseconds since 1970; never less than the entity's commit before.
    pub at_us: i64,
    /// The keyed hash of the caller's idempotency key.
    pub append_key: Option<Vec<u8>>,
    /// The sealed events.
    pub body: Vec<u8>,
}

impl Commit {
    pub(crate) fn last_version(&self) -> u64 {
        self.first_version + u64::from(self.count) - 1
    }
}

/// Whoever waits for a submission is told through this, exactly once.
pub type OnSettled = Box<dyn FnOnce(Result<(), CommitError>) + Send>;

/// Something handed to a shard's writer.
pub struct Submission {
    /// What it was decided in.
    pub activation: Arc<Activation>,
    /// The commit, or none for a barrier: a barrier is settled when all that was submitted before it is, and with an error if that
    /// voided its activation.
    pub commit: Option<Commit>,
    /// Told when it is settled.
    pub on_settled: OnSettled,
}

/// What an entry asks for.
pub(crate) enum Work {
    Commit(Arc<Activation>, Commit),
    /// Told when all before it is settled.
    Barrier(Arc<Activation>),
    Snapshot(SnapshotRow),
    Erase(EraseStep),
    /// A new life of an erased entity.
    Create(EntityRow),
    /// A new life in the place of the one before.
    Replace(Replacement),
    /// Of who owns a slot.
    ChangeSlot(SlotChange),
    Moving(Moving),
}

/// Work of a slot that moves, beside its token. None of it may fail the commits of others.
pub(crate) enum Moving {
    /// Rows that come in.
    Incoming(Incoming),
    /// Some of a transfer is dropped; told whether that was all.
    Drop { slot: Slot, transfer: TransferId, done: Arc<Mutex<bool>> },
    /// Some rows that left with a transfer become stubs; told whether those were all.
    Stub { slot: Slot, transfer: TransferId, done: Arc<Mutex<bool>> },
    /// Entities are to be found by their slots.
    IndexSlots,
}

/// Something on its way, with the reason why it alone was refused.
pub(crate) struct LogEntry {
    pub(crate) work: Work,
    pub(crate) on_settled: OnSettled,
    pub(crate) refusal: Option<NotWritten>,
}

impl LogEntry {
    /// A snapshot to be saved.
    pub(crate) fn snapshot(snapshot: SnapshotRow, on_settled: OnSettled) -> Self {
        LogEntry { work: Work::Snapshot(snapshot), on_settled, refusal: None }
    }

    /// A life in the place of the one before.
    pub(crate) fn replace(replacement: Replacement, on_settled: OnSettled) -> Self {
        LogEntry { work: Work::Replace(replacement), on_settled, refusal: None }
    }

    /// An entity without commits.
    pub(crate) fn create(row: EntityRow, on_settled: OnSettled) -> Self {
        LogEntry { work: Work::Create(row), on_settled, refusal: None }
    }

    /// A step of an erasure.
    pub(crate) fn erase(step: EraseStep, on_settled: OnSettled) -> Self {
        LogEntry { work: Work::Erase(step), on_settled, refusal: None }
    }

    /// A change of a slot's token.
    pub(crate) fn change_slot(change: SlotChange, on_settled: OnSettled) -> Self {
        LogEntry { work: Work::ChangeSlot(change), on_settled, refusal: None }
    }

    /// Rows that come in.
    pub(crate) fn incoming(incoming: Incoming, on_settled: OnSettled) -> Self {
        LogEntry { work: Work::Moving(Moving::Incoming(incoming)), on_settled, refusal: None }
    }

    /// Drops some of what came in.
    pub(crate) fn drop_transfer(
        slot: Slot,
        transfer: TransferId,
        done: Arc<Mutex<bool>>,
        on_settled: OnSettled,
    ) -> Self {
        LogEntry { work: Work::Moving(Moving::Drop { slot, transfer, done }), on_settled, refusal: None }
    }

    /// Turns some of what left into stubs.
    pub(crate) fn stub_departed(
        slot: Slot,
        transfer: TransferId,
        done: Arc<Mutex<bool>>,
        on_settled: OnSettled,
    ) -> Self {
        LogEntry { work: Work::Moving(Moving::Stub { slot, transfer, done }), on_settled, refusal: None }
    }

    /// Makes the index of slots.
    pub(crate) fn index_slots(on_settled: OnSettled) -> Self {
        LogEntry { work: Work::Moving(Moving::IndexSlots), on_settled, refusal: None }
    }

    /// Settles an entry that never reached its writer.
    pub(crate) fn refuse(self, error: CommitError) {
        if let Work::Commit(activation, _) | Work::Barrier(activation) = &self.work {
            activation.void();
        }
        (self.on_settled)(Err(error));
    }

    /// The commits that are to be written, in order.
    pub(crate) fn commits(&self) -> &[Commit] {
        match &self.work {
            Work::Commit(_, commit) => std::slice::from_ref(commit),
            Work::Replace(replacement) => &replacement.commits,
            _ => &[],
        }
    }

    pub(crate) fn snapshot_row(&self) -> Option<&SnapshotRow> {
        match &self.work {
            Work::Snapshot(snapshot) => Some(snapshot),
            _ => None,
        }
    }

    pub(crate) fn erase_step(&self) -> Option<&EraseStep> {
        match &self.work {
            Work::Erase(step) => Some(step),
            _ => None,
        }
    }

    pub(crate) fn replacement(&self) -> Option<&Replacement> {
        match &self.work {
            Work::Replace(replacement) => Some(replacement),
            _ => None,
        }
    }

    /// The row of an entity that is not stored yet.
    pub(crate) fn new_entity(&self) -> Option<&EntityRow> {
        match &self.work {
            Work::Commit(_, commit) => commit.create.then_some(&*commit.entity),
            Work::Create(row) => Some(row),
            Work::Replace(replacement) => replacement.row(),
            _ => None,
        }
    }
}

impl From<Submission> for LogEntry {
    fn from(Submission { activation, commit, on_settled }: Submission) -> Self {
        let work = match commit {
            Some(commit) => Work::Commit(activation, commit),
            None => Work::Barrier(activation),
        };
        LogEntry { work, on_settled, refusal: None }
    }
}
