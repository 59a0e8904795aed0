//! Snapshots on their way to the new owner of their slot, so that it need not replay everything.
//!
//! ```text
//!  giver: beside the rows of a chunk ──► receiver: in memory ──slot taken──► shard's writer, as any snapshot
//! ```
//!
//! Invariants:
//! - A snapshot is only a cache. What does not fit into a chunk, finds no room, or is lost with the process is made anew; nothing waits for it.
//! - It is sealed under its entity's key, and compared with the log when it is used: one that misfits is ignored there.
//! - What waits is bounded in bytes, however many slots come in.

use std::{collections::HashMap, sync::Arc};

use kuma_shard::{EntityRow, Slot, SnapshotRow, TransferId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::shard_core::ShardCore;

/// Of one chunk, the smallest first.
const CHUNK_BYTES: usize = 512 << 10;
/// Of all slots that come in.
const ARRIVED_BYTES: usize = 32 << 20;

/// A snapshot of an entity, sealed under its key.
#[derive(Clone, Serialize, Deserialize)]
pub struct SlotSnapshot {
    key_id: [u8; 16],
    version: u64,
    schema: u64,
    #[serde(with = "serde_bytes")]
    body: Vec<u8>,
}

impl std::fmt::Debug for SlotSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SlotSnapshot({} bytes)", self.body.len())
    }
}

/// The snapshots of those of these entities that have one.
pub(crate) async fn of(core: &ShardCore, entities: &[EntityRow]) -> Vec<SlotSnapshot> {
    let living = entities.iter().filter(|entity| entity.erased_at_us.is_none());
    let names: HashMap<i64, [u8; 16]> = living.map(|entity| (entity.eid, entity.key_id)).collect();
    if names.is_empty() || core.settings.snapshots.is_none() {
        return Vec::new();
    }
    let eids: Vec<i64> = names.keys().copied().collect();
    // The slot goes without them.
    let rows = core.shard.snapshots_of(&eids, CHUNK_BYTES).await.unwrap_or_default();
    let named = |SnapshotRow { eid, version, schema, body }: SnapshotRow| {
        Some(SlotSnapshot { key_id: *names.get(&eid)?, version, schema, body })
    };
    rows.into_iter().filter_map(named).collect()
}

/// Snapshots that came ahead of their slots.
#[derive(Default)]
pub(crate) struct Arrivals(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    by_transfer: HashMap<TransferId, Vec<SlotSnapshot>>,
    bytes: usize,
}

impl Arrivals {
    /// Keeps what came, as long as there is room.
    pub(crate) fn keep(&self, transfer: TransferId, snapshots: Vec<SlotSnapshot>) {
        let mut waiting = self.0.lock();
        for snapshot in snapshots {
            let bytes = waiting.bytes + snapshot.body.len();
            if bytes <= ARRIVED_BYTES {
                waiting.bytes = bytes;
                waiting.by_transfer.entry(transfer).or_default().push(snapshot);
            }
        }
    }

    /// Drops what came under a transfer that came to nothing.
    pub(crate) fn forget(&self, transfer: TransferId) {
        drop(self.take(transfer));
    }

    /// The slot is here: hands what came to the writer. Nobody waits for that.
    pub(crate) fn unpack(&self, core: Arc<ShardCore>, slot: Slot, transfer: TransferId) {
        let snapshots = self.take(transfer);
        if snapshots.is_empty() {
            return;
        }
        tokio::spawn(async move {
            let Ok(entities) = core.shard.slot_entities(slot).await else { return };
            let living = entities.iter().filter(|entity| entity.erased_at_us.is_none());
            let eids: HashMap<[u8; 16], i64> = living.map(|entity| (entity.key_id, entity.eid)).collect();
            for SlotSnapshot { key_id, version, schema, body } in snapshots {
                if let Some(eid) = eids.get(&key_id) {
                    // An error calls for nothing.
                    core.shard.save_snapshot(SnapshotRow { eid: *eid, version, schema, body }, Box::new(drop));
                }
            }
        });
    }

    fn take(&self, transfer: TransferId) -> Vec<SlotSnapshot> {
        let mut waiting = self.0.lock();
        let snapshots = waiting.by_transfer.remove(&transfer).unwrap_or_default();
        waiting.bytes -= snapshots.iter().map(|snapshot| snapshot.body.len()).sum::<usize>();
        snapshots
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kuma_shard::{Epoch, ReadBack, Staged, Txn};

    use super::*;
    use crate::{Kuma, NewEvent, Options, Seat, Version, slot_of};

    async fn start(path: &std::path::Path, seat: Seat, secret: Option<[u8; 32]>) -> Kuma {
        let options = Options::new(path).shards(1).snapshot_every(16, 1 << 20);
        Kuma::start(options.clustered(seat, secret)).await.unwrap()
    }

    async fn snapshot(kuma: &Kuma, slot: Slot) -> Option<SnapshotRow> {
        let core = kuma.inner.core_of_slot(slot).unwrap();
        let entity = core.shard.slot_entities(slot).await.unwrap().pop()?;
        core.shard.find_snapshot(entity.eid).await.unwrap()
    }

    async fn soon_snapshot(kuma: &Kuma, slot: Slot) -> SnapshotRow {
        let wait = async {
            loop {
                if let Some(snapshot) = snapshot(kuma, slot).await {
                    return snapshot;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap()
    }

    /// The steps of a handoff, with what was done to the pieces on their way.
    async fn hand_over(from: &Kuma, to: &Kuma, slot: Slot, change: impl Fn(&mut SlotSnapshot)) {
        let (giver, receiver, transfer) = (from.slots(), to.slots(), TransferId::generate().unwrap());
        let content = giver.seal(slot).await.unwrap();
        let mut copy = giver.copy(slot).await.unwrap();
        while let Some(mut chunk) = copy.next().await.unwrap() {
            chunk.snapshots.iter_mut().for_each(&change);
            receiver.receive(slot, transfer, chunk).await.unwrap();
        }
        assert_eq!(receiver.read_back(slot, transfer, ReadBack::default()).await.unwrap().content, content);
        let old = giver.record(slot).unwrap().owned().unwrap();
        let epoch = Epoch { counter: old.counter + 1, ..old };
        let staged = Staged { transfer, epoch, from: giver.disk_id(), content };
        receiver.change(slot, Txn::Stage(staged)).await.unwrap();
        let release = Txn::Release { from: old, epoch, to: receiver.disk_id(), transfer, sealed: Some(content) };
        giver.change(slot, release).await.unwrap();
        receiver.change(slot, Txn::Take { transfer, epoch }).await.unwrap();
        receiver.set_gate(slot, crate::Gate::Open);
    }

    #[tokio::test]
    async fn a_snapshot_travels_with_its_slot_and_one_that_misfits_is_ignored() {
        for is_damaged in [false, true] {
            let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let from = start(one.path(), Seat::Founder, None).await;
            let to = start(two.path(), Seat::Joiner, Some(from.slots().id_secret())).await;
            let slot = slot_of("thing", "one");
            for number in 0..40 {
                let event = NewEvent::json("Noted", &serde_json::json!({ "n": number })).unwrap();
                from.raw("thing", "one").append(event).await.unwrap();
            }
            soon_snapshot(&from, slot).await;
            hand_over(&from, &to, slot, |snapshot| {
                if is_damaged {
                    snapshot.body[0] ^= 1;
                }
            })
            .await;
            assert!(soon_snapshot(&to, slot).await.version >= 16);
            let (state, version) = to.raw("thing", "one").read().await.unwrap();
            assert_eq!((state, version), (serde_json::json!({ "n": 39 }), Version(40)));
            assert_eq!(to.stats().snapshots_ignored, u64::from(is_damaged));
            assert_eq!(to.inner.arrivals().0.lock().bytes, 0);
            from.shutdown().await;
            to.shutdown().await;
        }
    }

    #[test]
    fn what_waits_is_bounded_and_given_back() {
        let arrivals = Arrivals::default();
        let snapshot = || SlotSnapshot { key_id: [1; 16], version: 1, schema: 1, body: vec![0; ARRIVED_BYTES / 4] };
        let [one, two] = [TransferId([1; 16]), TransferId([2; 16])];
        arrivals.keep(one, vec![snapshot(), snapshot(), snapshot()]);
        arrivals.keep(two, vec![snapshot(), snapshot()]);
        assert_eq!(arrivals.take(two).len(), 1);
        arrivals.keep(two, vec![snapshot()]);
        arrivals.forget(one);
        assert_eq!(arrivals.0.lock().bytes, ARRIVED_BYTES / 4);
        assert_eq!((arrivals.take(two).len(), arrivals.0.lock().bytes), (1, 0));
    }
}
