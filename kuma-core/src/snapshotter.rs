//! The snapshotter: makes snapshots away from the entities that they are of.
//!
//! ```text
//! entity ──durable state──► snapshotter ──sealed, on a thread of its own──► shard's writer, with the next group
//! ```
//!
//! Invariants:
//! - One actor a store, one snapshot at a time: however many entities are due, appends keep the processors.
//! - What waits is bounded, here in number and at the writer in bytes. An entity that finds no room goes on without, and asks again
//!   later.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use ractor::{Actor, ActorProcessingErr, ActorRef};

use crate::{
    kind::Kind,
    live::{Durable, View},
    replay::Opener,
    shard_core::ShardCore,
    snapshot,
};

/// Snapshots that may wait. Each holds a state in memory.
const WAITING_MAX: usize = 64;

/// A snapshot to be made.
pub(crate) struct SnapshotJob {
    pub(crate) core: Arc<ShardCore>,
    pub(crate) kind: Arc<dyn Kind>,
    /// Learns how large the snapshot is.
    pub(crate) view: Arc<View>,
    pub(crate) opener: Opener,
    pub(crate) durable: Durable,
    /// The first version of the commit that it ends with.
    pub(crate) last_first: u64,
}

impl ractor::Message for SnapshotJob {} // local only

/// Where entities hand in their states.
#[derive(Clone)]
pub(crate) struct Snapshotter {
    actor: ActorRef<SnapshotJob>,
    waiting: Arc<AtomicUsize>,
}

impl Snapshotter {
    /// Starts it under `supervisor`.
    pub(crate) async fn start(supervisor: ractor::ActorCell) -> Result<Self, ractor::SpawnErr> {
        let waiting = Arc::new(AtomicUsize::new(0));
        let (actor, _) = Actor::spawn_linked(None, SnapshotActor, waiting.clone(), supervisor).await?;
        Ok(Snapshotter { actor, waiting })
    }

    /// Takes a job, if there is room.
    pub(crate) fn offer(&self, job: SnapshotJob) -> bool {
        if self.waiting.fetch_add(1, Relaxed) < WAITING_MAX && self.actor.cast(job).is_ok() {
            return true;
        }
        self.waiting.fetch_sub(1, Relaxed);
        false
    }

    pub(crate) fn stop(&self) {
        self.actor.stop(None);
    }
}

struct SnapshotActor;

impl Actor for SnapshotActor {
    type Msg = SnapshotJob;
    type State = Arc<AtomicUsize>;
    type Arguments = Arc<AtomicUsize>;

    async fn pre_start(
        &self,
        _me: ActorRef<SnapshotJob>,
        waiting: Arc<AtomicUsize>,
    ) -> Result<Arc<AtomicUsize>, ActorProcessingErr> {
        Ok(waiting)
    }

    async fn handle(
        &self,
        _me: ActorRef<SnapshotJob>,
        job: SnapshotJob,
        waiting: &mut Arc<AtomicUsize>,
    ) -> Result<(), ActorProcessingErr> {
        // A large state takes a while to encode and seal; the runtime's own threads have better things to do.
        let made = tokio::task::spawn_blocking(move || make(&job)).await;
        waiting.fetch_sub(1, Relaxed);
        if let Err(error) = made {
            tracing::error!(%error, "making a snapshot failed");
        }
        Ok(())
    }
}

fn make(job: &SnapshotJob) {
    let SnapshotJob { core, kind, view, opener, durable, last_first } = job;
    match snapshot::seal(&**kind, opener, durable, *last_first) {
        Ok(row) => {
            view.usage.set_snapshot_bytes(row.body.len());
            match core.shard.budget().take(row.body.len()) {
                // Should it not be written, the entity asks again in its time.
                Some(room) => core.shard.save_snapshot(row, Box::new(move |_| drop(room))),
                // The disk is behind: appends come first.
                None => core.metrics.snapshots_skipped.add(1),
            }
        }
        Err(why) => {
            core.metrics.snapshots_skipped.add(1);
            tracing::warn!(entity = %opener.row.id_hash, shard = core.shard.number(), why, "no snapshot could be made; the entity is replayed from its events");
        }
    }
}
