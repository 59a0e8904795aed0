//! What can be set for the entities of one kind, apart from the others.

use std::time::Duration;

use crate::{live::Clock, snapshot::SnapshotPolicy};

/// Settings of one kind, see [`Options::kind`](crate::Options::kind). What is not set is as for every kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindOptions {
    pub(crate) append_only: bool,
    pub(crate) snapshots: Option<(u64, u64)>,
    pub(crate) idle_timeout: Option<Duration>,
}

impl KindOptions {
    /// As for every kind.
    pub fn new() -> Self {
        KindOptions::default()
    }

    /// The events of such an entity are a log and nothing more: no state is folded from them, which saves the time and the memory for it.
    /// Reading gives `null` and the version. For kinds without a Rust type; one that has a type folds as its type says.
    pub fn append_only(mut self) -> Self {
        self.append_only = true;
        self
    }

    /// As [`Options::snapshot_every`](crate::Options::snapshot_every).
    pub fn snapshot_every(mut self, commits: u64, bytes: u64) -> Self {
        self.snapshots = Some((commits.max(1), bytes.max(1)));
        self
    }

    /// As [`Options::idle_timeout`](crate::Options::idle_timeout).
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = Some(timeout);
        self
    }
}

/// What the actors of one kind look at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tuning {
    /// None: as for every kind.
    pub(crate) snapshots: Option<SnapshotPolicy>,
    /// None: as for every kind.
    pub(crate) idle_ms: Option<u64>,
}

impl From<&KindOptions> for Tuning {
    fn from(options: &KindOptions) -> Self {
        Tuning {
            snapshots: options.snapshots.map(|(commits, bytes)| SnapshotPolicy { commits, bytes }),
            idle_ms: options.idle_timeout.map(Clock::ms),
        }
    }
}
