//! What the actors of one shard share.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use kuma_shard::{Activation, EntityHash, EntityRow, NodeStore, Shard, Slot, Submission, Tombstone};
use parking_lot::Mutex;
use ractor::ActorRef;
use tokio::sync::{oneshot, watch};

use crate::{
    ReplayError, Unavailable,
    gates::SlotGates,
    live::{Clock, Live},
    observe::CoreMetrics,
    options::WallClock,
    restart::{Failures, RestartPolicy},
    snapshot::SnapshotPolicy,
    snapshotter::Snapshotter,
    supervisor::SupervisorMessage,
    vault::Vault,
};

/// The settings that a shard's actors look at.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) idle_ms: u64,
    /// The shortest one of any kind.
    pub(crate) idle_ms_min: u64,
    /// This shard's part of the memory budget.
    pub(crate) memory_bytes_max: usize,
    pub(crate) entity_appends_max: usize,
    pub(crate) restart: RestartPolicy,
    /// None if no snapshots are made or used.
    pub(crate) snapshots: Option<SnapshotPolicy>,
    pub(crate) wall_clock: WallClock,
}

/// An entity in the directory.
#[derive(Clone)]
pub(crate) enum Entry {
    Live(Arc<Live>),
    /// On its way out: its last messages are being handled, or its last commits are in the writer's queue. A new activation waits.
    Leaving(Arc<Live>),
}

/// What the shards of a store have in common.
#[derive(Clone)]
pub(crate) struct StoreParts {
    pub(crate) vault: Arc<Vault>,
    pub(crate) settings: Settings,
    pub(crate) metrics: Arc<CoreMetrics>,
    pub(crate) snapshotter: Snapshotter,
    pub(crate) node: NodeStore,
    pub(crate) erasing: Erasing,
    pub(crate) gates: Arc<SlotGates>,
}

/// The lives whose erasure is not finished, by the names of their keys: a later life of the same entity is not one of them. Their events may
/// still be there, and are nobody's any more.
#[derive(Clone, Default)]
pub(crate) struct Erasing(Arc<Lives>);

#[derive(Default)]
struct Lives {
    ending: Mutex<HashMap<[u8; 16], (Fate, EntityHash)>>,
    /// How many there have been.
    ended: AtomicU64,
    /// Lives whose tombstones have this number, or a smaller one, are acted on: subscribers can be told.
    entombed: watch::Sender<i64>,
    /// Slots in which lives are on their way out, with how many: such a slot does not leave.
    working: watch::Sender<HashMap<Slot, usize>>,
    /// Lives that were not finished, and keep their slots here until they are.
    stuck: Mutex<HashMap<[u8; 16], Working>>,
    /// Erasures that this node goes on with should their slots come to it.
    owed: Mutex<HashMap<Slot, Vec<Tombstone>>>,
    /// Lives that became this disk's to end with their slots, since it was looked last what is not finished.
    taken_over: Mutex<Vec<[u8; 16]>>,
}

/// A life of this slot is on its way out, for as long as this is held.
pub(crate) struct Working {
    lives: std::sync::Weak<Lives>,
    slot: Slot,
}

impl Drop for Working {
    fn drop(&mut self) {
        let Some(lives) = self.lives.upgrade() else { return };
        lives.working.send_modify(|working| {
            if let Some(count) = working.get_mut(&self.slot) {
                *count -= 1;
                if *count == 0 {
                    working.remove(&self.slot);
                }
            }
        });
    }
}

/// What becomes of a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is erased, or will be.
    Erased,
    /// The next life takes its place in a moment, unless that fails.
    Replaced,
}

impl Erasing {
    pub(crate) fn add(&self, key_id: [u8; 16], entity: EntityHash, fate: Fate) {
        self.0.ending.lock().insert(key_id, (fate, entity));
        self.0.ended.fetch_add(1, Relaxed);
    }

    /// The life has a tombstone, which is durable.
    pub(crate) fn entomb(&self, tombstone: &Tombstone) {
        self.add(tombstone.key_id, tombstone.id_hash, Fate::Erased);
    }

    /// All tombstones up to this number are acted on, so that no event of those lives is handed out any more: subscribers can be told. Not
    /// before: they would be told of an erasure, and handed an event after it.
    pub(crate) fn tell(&self, number: i64) {
        self.0.entombed.send_modify(|told| *told = number.max(*told));
    }

    /// Up to which number tombstones can be told.
    pub(crate) fn entombed(&self) -> watch::Receiver<i64> {
        self.0.entombed.subscribe()
    }

    pub(crate) fn remove(&self, key_id: [u8; 16]) {
        self.0.ending.lock().remove(&key_id);
    }

    /// A life has ended whose rows are not here: whoever keeps its key gives it up.
    pub(crate) fn note_end(&self) {
        self.0.ended.fetch_add(1, Relaxed);
    }

    /// Work in a slot begins. To be called before the slot's gate is looked at: whoever closes it waits for what has begun.
    pub(crate) fn work_in(&self, slot: Slot) -> Working {
        self.0.working.send_modify(|working| *working.entry(slot).or_default() += 1);
        Working { lives: Arc::downgrade(&self.0), slot }
    }

    /// The work is not at its end, although nobody is at it: the slot stays until it is.
    pub(crate) fn hold(&self, key_id: [u8; 16], working: Working) {
        self.0.stuck.lock().insert(key_id, working);
    }

    /// Lives of which this says no are not held any more.
    pub(crate) fn hold_only(&self, is_held: impl Fn([u8; 16]) -> bool) {
        let ended: Vec<Working> =
            self.0.stuck.lock().extract_if(|key_id, _| !is_held(*key_id)).map(|(_, held)| held).collect();
        drop(ended);
    }

    /// What was held is at its end.
    pub(crate) fn let_go(&self, key_id: [u8; 16]) {
        let held = self.0.stuck.lock().remove(&key_id);
        drop(held);
    }

    /// Whether there is work in a slot.
    pub(crate) fn is_at_work(&self, slot: Slot) -> bool {
        self.0.working.borrow().contains_key(&slot)
    }

    /// Returns when there is no work in a slot.
    pub(crate) async fn at_rest(&self, slot: Slot) {
        let mut working = self.0.working.subscribe();
        // Its sender is `self`: it is there.
        let _ = working.wait_for(|working| !working.contains_key(&slot)).await;
    }

    /// Is gone on with should its slot come here.
    pub(crate) fn owe(&self, tombstone: Tombstone) {
        let mut owed = self.0.owed.lock();
        let of_slot = owed.entry(tombstone.slot).or_default();
        if !of_slot.iter().any(|known| known.key_id == tombstone.key_id) {
            of_slot.push(tombstone);
        }
    }

    /// A slot has come here: whether there is something to go on with. From now on those lives are nobody's.
    pub(crate) fn take_over(&self, slot: Slot) -> bool {
        let owed = self.0.owed.lock().remove(&slot).unwrap_or_default();
        owed.iter().for_each(|tombstone| self.entomb(tombstone));
        self.note_taken_over(owed.iter().map(|tombstone| tombstone.key_id));
        !owed.is_empty()
    }

    pub(crate) fn note_taken_over(&self, key_ids: impl IntoIterator<Item = [u8; 16]>) {
        self.0.taken_over.lock().extend(key_ids);
    }

    /// Those lives that came with their slots since this was called last.
    pub(crate) fn taken_over(&self) -> Vec<[u8; 16]> {
        std::mem::take(&mut *self.0.taken_over.lock())
    }

    pub(crate) fn fate(&self, key_id: [u8; 16]) -> Option<Fate> {
        self.0.ending.lock().get(&key_id).map(|(fate, _)| *fate)
    }

    /// Lives of an entity that are on their way out.
    pub(crate) fn lives_of(&self, entity: EntityHash) -> Vec<[u8; 16]> {
        let ending = self.0.ending.lock();
        ending.iter().filter(|(_, (_, of))| *of == entity).map(|(key_id, _)| *key_id).collect()
    }

    /// Lives of any entity that are on their way out.
    pub(crate) fn all(&self) -> Vec<[u8; 16]> {
        self.0.ending.lock().keys().copied().collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.ending.lock().len()
    }

    /// Changes with each life that ends: whoever keeps keys gives them up then.
    fn generation(&self) -> u64 {
        self.0.ended.load(Relaxed)
    }
}

/// One open shard with all that its entities need.
pub(crate) struct ShardCore {
    pub(crate) shard: Shard,
    pub(crate) vault: Arc<Vault>,
    pub(crate) clock: Clock,
    pub(crate) settings: Settings,
    pub(crate) metrics: Arc<CoreMetrics>,
    pub(crate) snapshotter: Snapshotter,
    erasing: Erasing,
    pub(crate) gates: Arc<SlotGates>,
    /// Which entities are in memory. Changed by the shard's entity supervisor alone: an entity has one actor because that actor
    /// has one maker.
    pub(crate) directory: Mutex<HashMap<EntityHash, Entry>>,
    failures: Mutex<HashMap<EntityHash, Failures>>,
    /// Replaced by the root when the supervisor had to be started again.
    pub(crate) supervisor: Mutex<Option<ActorRef<SupervisorMessage>>>,
}

impl ShardCore {
    pub(crate) fn new(shard: Shard, store: StoreParts) -> Self {
        let StoreParts { vault, settings, metrics, snapshotter, erasing, gates, .. } = store;
        ShardCore {
            shard,
            vault,
            clock: Clock::new(),
            settings,
            metrics,
            snapshotter,
            erasing,
            gates,
            directory: Mutex::default(),
            failures: Mutex::default(),
            supervisor: Mutex::default(),
        }
    }

    /// Whether the erasure of this life has begun and is not finished.
    pub(crate) fn is_erasing(&self, life: &EntityRow) -> bool {
        self.erasing.fate(life.key_id) == Some(Fate::Erased)
    }

    /// Changes with each life that ends, in any shard: whoever keeps keys gives them up then.
    pub(crate) fn generation(&self) -> u64 {
        self.erasing.generation()
    }

    pub(crate) fn erasing(&self) -> &Erasing {
        &self.erasing
    }

    /// Whether this life is on its way out, so that its rows are of no interest to anybody.
    pub(crate) fn is_ending(&self, life: &EntityRow) -> bool {
        self.erasing.fate(life.key_id).is_some()
    }

    /// Whether this life may be read and written.
    pub(crate) fn check_alive(&self, life: &EntityRow) -> Result<(), ReplayError> {
        match self.erasing.fate(life.key_id) {
            _ if life.erased_at_us.is_some() => Err(ReplayError::Erased),
            Some(Fate::Erased) => Err(ReplayError::Erased),
            Some(Fate::Replaced) => Err(ReplayError::Replaced),
            None => Ok(()),
        }
    }

    /// The live entity, if it is in memory and not leaving.
    pub(crate) fn live(&self, entity: EntityHash) -> Option<Arc<Live>> {
        match self.directory.lock().get(&entity)? {
            Entry::Live(live) => Some(live.clone()),
            Entry::Leaving(_) => None,
        }
    }

    /// Empties the directory, after all its actors went with their supervisor. Handles must not read from them any more.
    pub(crate) fn forget_all(&self) {
        for (_, entry) in self.directory.lock().drain() {
            if matches!(entry, Entry::Live(_)) {
                self.metrics.live_entities.decrement(1.0);
            }
            let (Entry::Live(live) | Entry::Leaving(live)) = entry;
            *live.view.published.lock() = None;
        }
    }

    pub(crate) fn record_failure(&self, entity: EntityHash, why: String, hopeless: bool) {
        tracing::warn!(%entity, shard = self.shard.number(), %why, "an entity failed");
        self.metrics.failures.increment(1);
        let mut failures = self.failures.lock();
        failures.entry(entity).or_default().record(&self.settings.restart, Instant::now(), why, hopeless);
    }

    /// Forgets how often an entity failed.
    pub(crate) fn forgive(&self, entity: EntityHash) {
        self.failures.lock().remove(&entity);
    }

    pub(crate) fn check_quarantine(&self, entity: EntityHash) -> Result<(), Unavailable> {
        let failures = self.failures.lock();
        match failures.get(&entity).and_then(|failures| failures.quarantined(Instant::now())) {
            None => Ok(()),
            Some((left, why)) => {
                // In whole milliseconds: it is read by people too.
                let retry_after = Duration::from_millis(left.as_millis() as u64 + 1);
                Err(Unavailable::Quarantined { entity, why: why.to_owned(), retry_after })
            }
        }
    }

    /// How many entities are quarantined now; those whose time is over are forgotten.
    pub(crate) fn quarantined(&self) -> usize {
        let (mut failures, now) = (self.failures.lock(), Instant::now());
        failures.retain(|_, failures| !failures.is_over(&self.settings.restart, now));
        failures.values().filter(|failures| failures.quarantined(now).is_some()).count()
    }

    /// Returns when all that was submitted under `activation` is settled.
    pub(crate) async fn settled(&self, activation: &Arc<Activation>) {
        let (done, settled) = oneshot::channel::<()>();
        let on_settled = Box::new(move |_| drop(done));
        self.shard.submit(Submission { activation: activation.clone(), commit: None, on_settled });
        // The sender is dropped when it is settled, or with the writer.
        let _ = settled.await;
    }
}
