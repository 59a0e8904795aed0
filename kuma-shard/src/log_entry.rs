//! What is handed to the writer of a shard: commits, barriers, snapshots and erasures, each with whoever waits for it.

use std::sync::Arc;

use crate::{Activation, CommitError, EntityRow, NotWritten, SnapshotRow, erase::EraseStep, replace::Replacement};

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
            Work::Barrier(_) | Work::Snapshot(_) | Work::Erase(_) | Work::Create(_) => &[],
        }
    }

    pub(crate) fn snapshot_row(&self) -> Option<&SnapshotRow> {
        match &self.work {
            Work::Snapshot(snapshot) => Some(snapshot),
            Work::Commit(..) | Work::Barrier(_) | Work::Erase(_) | Work::Create(_) | Work::Replace(_) => None,
        }
    }

    pub(crate) fn erase_step(&self) -> Option<&EraseStep> {
        match &self.work {
            Work::Erase(step) => Some(step),
            Work::Commit(..) | Work::Barrier(_) | Work::Snapshot(_) | Work::Create(_) | Work::Replace(_) => None,
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
            Work::Barrier(_) | Work::Snapshot(_) | Work::Erase(_) => None,
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
