//! What a cluster does with the slots of a store: it learns who owns them, copies them out and in, and changes their tokens. For `kuma-cluster`; a
//! service has no use for it.
//!
//! ```text
//!  giver                                              receiver
//!  copy ──next──► rows, and the keys of their entities ──► receive: keys first, then rows ──► read_back
//!  seal: gate, actors, writer ──► content                  change(Stage)
//!  change(Release)                                         change(Take), gate open
//!  change(ConfirmTaken), keys forgotten, stubs
//! ```
//!
//! Invariants:
//! - A key is durable before a row that is sealed with it, and never put in again when a tombstone names it.
//! - A key is taken away only if this disk has no right to the slot and no other copy of it.
//! - When [`Slots::seal`] returns, nothing of the slot is on its way: what is on the disk is all that was ever acknowledged.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use kuma_crypto::{DataKey, IdSecret, KeyId, Secret32};
use kuma_shard::{
    CommitError, Content, DiskId, EntityHash, EntityRow, Epoch, NodeStore, NotWritten, ReadBack, ReadError, Slot,
    SlotRecord, SlotRows, Token, Tombstone, TransferId, Txn,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, MutexGuard, oneshot};

use crate::{
    Kuma, ToldReceipt, VaultError,
    elsewhere::ErasedLife,
    gates::Gate,
    shard_core::ShardCore,
    slot_snapshots::{self, SlotSnapshot},
    store::Inner,
    supervisor::SupervisorMessage,
};

/// Keys of slots are put in and taken away one at a time, by these.
const LOCKS: usize = 64;

/// Why something with a slot could not be done. Nothing was lost; it can be tried again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// Its shard is out of use.
    #[error("slot {slot} is in a shard that is out of use")]
    OutOfUse {
        /// The slot.
        slot: Slot,
    },
    /// Nothing was written, or that is unknown.
    #[error("slot {slot}: {cause}")]
    Commit {
        /// The slot.
        slot: Slot,
        /// Why.
        #[source]
        cause: CommitError,
    },
    /// The file cannot be read.
    #[error("slot {slot} cannot be read")]
    Read {
        /// The slot.
        slot: Slot,
        /// Why.
        #[source]
        cause: ReadError,
    },
    /// A key cannot be read or written.
    #[error("a key of slot {slot}: {cause}")]
    Keys {
        /// The slot.
        slot: Slot,
        /// Why.
        #[source]
        cause: VaultError,
    },
    /// What the node knows cannot be read or written.
    #[error("node.db: {detail}")]
    Node {
        /// Why.
        detail: String,
    },
}

impl SlotError {
    /// Whether the token was not what a change of it needs, so that surely nothing was written.
    pub fn is_changed(&self) -> bool {
        let changed = |cause: &CommitError| matches!(cause, CommitError::NotWritten(NotWritten::TokenChanged { .. }));
        matches!(self, SlotError::Commit { cause, .. } if changed(cause))
    }

    /// Whether it may have happened all the same.
    pub fn is_unknown(&self) -> bool {
        matches!(self, SlotError::Commit { cause: CommitError::Unknown { .. }, .. })
    }
}

/// An entity's key on its way to another node, inside an encrypted link and nowhere else. Prints nothing of it.
#[derive(Clone, Serialize, Deserialize)]
pub struct SlotKey {
    key_id: [u8; 16],
    entity: EntityHash,
    created_at_us: i64,
    key: [u8; 32],
}

impl std::fmt::Debug for SlotKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SlotKey([redacted])")
    }
}

impl Drop for SlotKey {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.key);
    }
}

/// A piece of a slot on its way: rows, and the keys of entities that come up in it for the first time.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SlotChunk {
    /// Entities and rows.
    pub rows: SlotRows,
    /// The keys of those entities.
    pub keys: Vec<SlotKey>,
    /// Those of them that are erased, with their receipts if they have any.
    #[serde(default)]
    pub erased: Vec<(ErasedLife, Option<String>)>,
    /// Snapshots of those that have one. The receiver may have no use for them.
    #[serde(default)]
    pub snapshots: Vec<SlotSnapshot>,
}

impl SlotChunk {
    /// The place of its first row in the slot's log; none if it has no rows.
    pub fn first_seq(&self) -> Option<u64> {
        self.rows.rows.first().map(|(_, row)| row.seq)
    }

    /// About how many bytes it has.
    pub fn bytes(&self) -> usize {
        self.rows.rows.iter().map(|(_, row)| row.body.len() + 160).sum::<usize>() + self.rows.entities.len() * 256
    }
}

/// What a cluster does with the slots of a store.
#[derive(Clone)]
pub struct Slots {
    pub(crate) inner: Arc<Inner>,
}

/// What serialises the keys of slots.
pub(crate) struct KeyLocks(Box<[Mutex<()>]>);

impl KeyLocks {
    pub(crate) fn new() -> Self {
        KeyLocks((0..LOCKS).map(|_| Mutex::new(())).collect())
    }

    fn of(&self, slot: Slot) -> &Mutex<()> {
        &self.0[usize::from(slot.number()) % LOCKS]
    }

    /// Of several slots, always in the same order.
    pub(crate) async fn all_of(&self, slots: impl IntoIterator<Item = Slot>) -> Vec<MutexGuard<'_, ()>> {
        let places: BTreeSet<usize> = slots.into_iter().map(|slot| usize::from(slot.number()) % LOCKS).collect();
        let mut held = Vec::with_capacity(places.len());
        for place in places {
            held.push(self.0[place].lock().await);
        }
        held
    }
}

impl Kuma {
    /// What a cluster does with the store's slots.
    #[doc(hidden)]
    pub fn slots(&self) -> Slots {
        Slots { inner: self.inner.clone() }
    }
}

impl Slots {
    /// This copy of the data.
    pub fn disk_id(&self) -> DiskId {
        self.inner.disk_id()
    }

    /// The record of a slot, as of the last durable commit; none if its shard is out of use.
    pub fn record(&self, slot: Slot) -> Option<SlotRecord> {
        self.inner.core_of_slot(slot)?.shard.slot(slot)
    }

    /// The records of all slots in shards that are in use, but for the store's own one.
    pub fn records(&self) -> Vec<(Slot, SlotRecord)> {
        let cores = (0..self.inner.shards()).filter_map(|shard| self.inner.core_of_shard(shard));
        let records = cores.flat_map(|core| core.shard.slots());
        records.filter(|(slot, _)| *slot != Slot::OWN).collect()
    }

    /// The slots that this disk owns, but for the store's own one, with their epochs.
    pub fn owned(&self) -> Vec<(Slot, Epoch)> {
        let cores = (0..self.inner.shards()).filter_map(|shard| self.inner.core_of_shard(shard));
        let owned = cores.flat_map(|core| core.shard.owned_slots());
        owned.filter(|(slot, _)| *slot != Slot::OWN).collect()
    }

    /// Whether requests for entities of the slot are let in.
    pub fn gate(&self, slot: Slot) -> Gate {
        self.inner.gates().get(slot)
    }

    /// Lets requests in or not.
    pub fn set_gate(&self, slot: Slot, gate: Gate) {
        self.inner.gates().set(slot, gate);
    }

    /// Returns when it is decided whether a slot that is sealed stays.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn decided(&self, slot: Slot) -> Gate {
        self.inner.gates().decided(slot).await
    }

    /// Makes slots be found fast. To be called once after the store was opened.
    ///
    /// # Errors
    /// An index could not be made.
    pub async fn index(&self) -> Result<(), SlotError> {
        for core in (0..self.inner.shards()).filter_map(|shard| self.inner.core_of_shard(shard)) {
            let failed = |cause| SlotError::Commit { slot: Slot::OWN, cause };
            core.shard.index_slots().await.map_err(failed)?;
        }
        Ok(())
    }

    /// What the node knows of its cluster; none if it is in no cluster.
    ///
    /// # Errors
    /// `node.db` cannot be read.
    pub async fn cluster(&self) -> Result<Option<Vec<u8>>, SlotError> {
        self.inner.node().cluster().await.map_err(|error| SlotError::Node { detail: error.to_string() })
    }

    /// Keeps what the node knows of its cluster; durable when this returns.
    ///
    /// # Errors
    /// It was not written, or that is unknown.
    pub async fn keep_cluster(&self, body: Vec<u8>) -> Result<(), SlotError> {
        self.inner.node().keep_cluster(body).await.map_err(|error| SlotError::Node { detail: error.to_string() })
    }

    /// The secret that keys the hashes of ids, the same on all nodes of a cluster. For a node that joins, inside an encrypted link.
    pub fn id_secret(&self) -> [u8; 32] {
        let secret: &Secret32 = self.inner.ids().as_ref();
        *secret.expose()
    }

    /// Changes the token of a slot, if it allows that. Durable when this returns.
    ///
    /// # Errors
    /// [`SlotError::is_changed`]: it does not. [`SlotError::is_unknown`]: look at the record.
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub async fn change(&self, slot: Slot, txn: Txn) -> Result<(), SlotError> {
        let core = self.core(slot)?;
        let changed = core.shard.change_slot(slot, txn, self.inner.now_us()).await;
        changed.map_err(|cause| SlotError::Commit { slot, cause })?;
        if let Txn::Take { transfer, .. } = txn {
            self.inner.arrivals().unpack(core, slot, transfer);
        }
        Ok(())
    }

    /// Stops what the slot is at: nothing more is let in, actors finish what they were asked and go, and what they submitted is settled. What the
    /// slot holds then.
    ///
    /// # Errors
    /// Its shard is out of use.
    /// # Cancel safety
    /// Cancel safe; the gate stays sealed.
    pub async fn seal(&self, slot: Slot) -> Result<Content, SlotError> {
        let core = self.core(slot)?;
        self.set_gate(slot, Gate::Sealed);
        fail::fail_point!("handoff.seal.parked");
        let (done, gone) = oneshot::channel();
        let supervisor = core.supervisor.lock().clone();
        let leave = SupervisorMessage::LeaveSlot { slot, done };
        if supervisor.is_some_and(|supervisor| supervisor.cast(leave).is_ok()) {
            // Dropped only with the supervisor, and then the entities are gone too.
            let _ = gone.await;
        }
        fail::fail_point!("handoff.seal.actors_stopped");
        self.inner.erasing().at_rest(slot).await;
        core.settled(&Arc::new(kuma_shard::Activation::at(0))).await;
        fail::fail_point!("handoff.seal.drained");
        let record = core.shard.slot(slot).ok_or(SlotError::OutOfUse { slot })?;
        Ok(record.content)
    }

    /// Begins to copy a slot out.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn copy(&self, slot: Slot) -> Result<SlotCopy, SlotError> {
        let core = self.core(slot)?;
        let failed = |cause| SlotError::Read { slot, cause };
        let rewrites = core.shard.rewrites_in(slot);
        let after = *core.shard.end().borrow();
        let entities = core.shard.slot_entities(slot).await.map_err(failed)?;
        let mut positions = core.shard.positions_of(&entities).await.map_err(failed)?;
        // What comes later is read from the log.
        positions.retain(|position| *position <= after);
        let node = self.inner.node().clone();
        Ok(SlotCopy { core, node, slot, positions, done: 0, after, rewrites, sent: HashSet::new() })
    }

    /// Keeps a piece of a slot that came in: its keys, then its rows. Durable when this returns.
    ///
    /// # Errors
    /// Nothing but keys was kept, or that is unknown; it can be sent again.
    pub async fn receive(&self, slot: Slot, transfer: TransferId, chunk: SlotChunk) -> Result<(), SlotError> {
        let core = self.core(slot)?;
        let _locked = self.inner.key_locks().of(slot).lock().await;
        let entombed = self.entomb_with(&chunk).await.map_err(|detail| SlotError::Node { detail })?;
        let let_in = chunk.keys.iter().filter(|key| !entombed.contains(&key.key_id));
        let keys: Vec<_> = let_in
            .map(|key| {
                let secret = DataKey::from(Secret32::from_bytes(&key.key));
                (key.entity, KeyId(key.key_id), secret, key.created_at_us)
            })
            .collect();
        let vault = self.inner.vault();
        vault.install(&keys).await.map_err(|cause| SlotError::Keys { slot, cause })?;
        self.inner.arrivals().keep(transfer, chunk.snapshots);
        let kept = core.shard.receive(slot, transfer, chunk.rows).await;
        kept.map_err(|cause| SlotError::Commit { slot, cause })
    }

    /// Keeps the tombstones that come with a piece. Keys in it that must not be kept, because there is a tombstone here.
    async fn entomb_with(&self, chunk: &SlotChunk) -> Result<HashSet<[u8; 16]>, String> {
        let (node, erasing) = (self.inner.node(), self.inner.erasing());
        let words = |error: &dyn std::fmt::Display| error.to_string();
        let (finished, open): (Vec<_>, Vec<_>) = chunk.erased.iter().partition(|(_, receipt)| receipt.is_some());
        let mut owed: Vec<Tombstone> = open.into_iter().map(|(life, _)| life.into()).collect();
        if !finished.is_empty() {
            let tombstones = finished.iter().map(|(life, _)| life.into()).collect();
            node.learn(tombstones).await.map_err(|error| words(&error))?;
            let told = finished.iter().filter_map(|(life, receipt)| {
                let ErasedLife { receipt_id, key_id, .. } = *life;
                Some(ToldReceipt { receipt_id, key_id, body: receipt.clone()? })
            });
            node.finish(told.map(Into::into).collect()).await.map_err(|error| words(&error))?;
        }
        let key_ids: Vec<[u8; 16]> = chunk.keys.iter().map(|key| key.key_id).collect();
        let here = node.tombstones_by_key(&key_ids).await.map_err(|error| words(&error))?;
        let entombed = here.iter().map(|tombstone| tombstone.key_id).collect();
        // Their rows are there, and their erasure is to be gone on with.
        owed.extend(here);
        if !owed.is_empty() {
            node.owe(owed.clone()).await.map_err(|error| words(&error))?;
            owed.into_iter().for_each(|tombstone| erasing.owe(tombstone));
        }
        Ok(entombed)
    }

    /// Reads back what came in under `transfer`, on top of what was read back before.
    ///
    /// # Errors
    /// It cannot be read, or is not what was sent.
    pub async fn read_back(&self, slot: Slot, transfer: TransferId, before: ReadBack) -> Result<ReadBack, SlotError> {
        let read = self.core(slot)?.shard.read_back(transfer, before).await;
        read.map_err(|cause| SlotError::Read { slot, cause })
    }

    /// Drops what came in under `transfer`, with its keys if nothing else here needs them.
    ///
    /// # Errors
    /// Some of it is still there; do it again. It is refused while it is staged.
    pub async fn drop_transfer(&self, slot: Slot, transfer: TransferId) -> Result<(), SlotError> {
        let core = self.core(slot)?;
        self.inner.arrivals().forget(transfer);
        let _locked = self.inner.key_locks().of(slot).lock().await;
        let keys = core.shard.incoming_keys(transfer).await.map_err(|cause| SlotError::Read { slot, cause })?;
        core.shard.drop_transfer(slot, transfer).await.map_err(|cause| SlotError::Commit { slot, cause })?;
        self.forget(&core, slot, keys).await
    }

    /// Transfers that were not finished when the store was closed, but for what is staged.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn leftovers(&self) -> Result<Vec<(Slot, TransferId)>, SlotError> {
        let mut found = Vec::new();
        for core in (0..self.inner.shards()).filter_map(|shard| self.inner.core_of_shard(shard)) {
            let failed = |cause| SlotError::Read { slot: Slot::OWN, cause };
            let transfers = core.shard.transfers().await.map_err(failed)?;
            let staged = |slot| core.shard.slot(slot).and_then(|record| record.staged).map(|staged| staged.transfer);
            found.extend(transfers.into_iter().filter(|(slot, transfer)| staged(*slot) != Some(*transfer)));
        }
        Ok(found)
    }

    /// Takes away what is left of slots that were given away: their keys, then their rows, which become stubs. Goes on where it was interrupted.
    ///
    /// # Errors
    /// Some of it is still there; do it again.
    pub async fn collect_departed(&self) -> Result<(), SlotError> {
        for core in (0..self.inner.shards()).filter_map(|shard| self.inner.core_of_shard(shard)) {
            let failed = |cause| SlotError::Read { slot: Slot::OWN, cause };
            for (slot, transfer) in core.shard.departed().await.map_err(failed)? {
                self.collect(&core, slot, transfer).await?;
            }
        }
        Ok(())
    }

    async fn collect(&self, core: &ShardCore, slot: Slot, transfer: TransferId) -> Result<(), SlotError> {
        let entities = core.shard.departed_entities(slot, transfer).await;
        let entities = entities.map_err(|cause| SlotError::Read { slot, cause })?;
        {
            let _locked = self.inner.key_locks().of(slot).lock().await;
            self.forget(core, slot, entities.iter().map(|entity| entity.key_id).collect()).await?;
        }
        let collected = core.shard.collect_departed(slot, transfer).await;
        collected.map_err(|cause| SlotError::Commit { slot, cause })
    }

    /// Takes keys of a slot away, unless this disk has a right to it or another copy of it.
    async fn forget(&self, core: &ShardCore, slot: Slot, keys: Vec<[u8; 16]>) -> Result<(), SlotError> {
        let Some(record) = core.shard.slot(slot) else { return Ok(()) };
        let has_live_copy = match record.token {
            Token::Owned(_) | Token::Released { is_taken: false, .. } => true,
            Token::None | Token::Released { is_taken: true, .. } => false,
        };
        if has_live_copy || record.staged.is_some() || keys.is_empty() {
            return Ok(());
        }
        let transfers = core.shard.transfers().await.map_err(|cause| SlotError::Read { slot, cause })?;
        if transfers.iter().any(|(other, _)| *other == slot) {
            return Ok(());
        }
        let forgotten = self.inner.vault().keys.forget(keys).await;
        forgotten.map_err(|cause| SlotError::Keys { slot, cause: cause.into() })
    }

    fn core(&self, slot: Slot) -> Result<Arc<ShardCore>, SlotError> {
        self.inner.core_of_slot(slot).ok_or(SlotError::OutOfUse { slot })
    }
}

/// A slot that is copied out: what there was when it began, and what was committed since.
pub struct SlotCopy {
    core: Arc<ShardCore>,
    node: NodeStore,
    slot: Slot,
    /// Of the rows that there were.
    positions: Vec<u64>,
    done: usize,
    /// What is behind this position of the shard's log is read from there.
    after: u64,
    rewrites: u64,
    /// Numbers of entities that were sent with their keys.
    sent: HashSet<i64>,
}

impl SlotCopy {
    /// The next piece; none if there is no more as of now.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn next(&mut self) -> Result<Option<SlotChunk>, SlotError> {
        let slot = self.slot;
        let failed = |cause| SlotError::Read { slot, cause };
        if self.done < self.positions.len() {
            let left = &self.positions[self.done..];
            let rows = self.core.shard.rows_at(left).await.map_err(failed)?;
            if let Some((_, last)) = rows.rows.last() {
                self.done += left.partition_point(|position| *position <= last.position);
                return self.chunk(rows).await.map(Some);
            }
        }
        let rows = self.core.shard.rows_behind(slot, self.after).await.map_err(failed)?;
        let Some((_, last)) = rows.rows.last() else { return Ok(None) };
        self.after = last.position;
        self.chunk(rows).await.map(Some)
    }

    /// Entities that have no rows, once everything else was sent: the new lives of erased ones.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn rest(&mut self) -> Result<Option<SlotChunk>, SlotError> {
        let slot = self.slot;
        let mut entities =
            self.core.shard.slot_entities(slot).await.map_err(|cause| SlotError::Read { slot, cause })?;
        entities.retain(|entity| !self.sent.contains(&entity.eid));
        match entities.is_empty() {
            true => Ok(None),
            false => self.chunk(SlotRows { entities, rows: Vec::new() }).await.map(Some),
        }
    }

    /// Whether something that was sent is not so any more: an entity was erased. The copy is of no use then.
    pub fn is_stale(&self) -> bool {
        self.core.shard.rewrites_in(self.slot) != self.rewrites
    }

    /// Rows that are left as far as is known.
    pub fn rows_left(&self) -> u64 {
        (self.positions.len() - self.done) as u64
    }

    /// Leaves out what was sent before, and adds keys.
    async fn chunk(&mut self, mut rows: SlotRows) -> Result<SlotChunk, SlotError> {
        let slot = self.slot;
        rows.entities.retain(|entity| self.sent.insert(entity.eid));
        let living: Vec<&EntityRow> = rows.entities.iter().filter(|entity| entity.erased_at_us.is_none()).collect();
        let wanted: Vec<(EntityHash, KeyId)> =
            living.iter().map(|entity| (entity.id_hash, KeyId(entity.key_id))).collect();
        let found = self.core.vault.keys(&wanted).await.map_err(|cause| SlotError::Keys { slot, cause })?;
        let mut keys = Vec::with_capacity(found.len());
        for (entity, key) in living.into_iter().zip(found) {
            match key {
                Ok(key) => {
                    let secret: &Secret32 = key.as_ref();
                    keys.push(SlotKey {
                        key_id: entity.key_id,
                        entity: entity.id_hash,
                        created_at_us: entity.created_at_us,
                        key: *secret.expose(),
                    });
                }
                // It is being erased: its rows are of use to nobody.
                Err(VaultError::KeyDestroyed) => {}
                Err(cause) => return Err(SlotError::Keys { slot, cause }),
            }
        }
        let gone = rows.entities.iter().filter(|entity| entity.erased_at_us.is_some());
        let erased = erased(&self.node, gone.map(|entity| entity.key_id).collect()).await;
        let erased = erased.map_err(|detail| SlotError::Node { detail })?;
        let snapshots = slot_snapshots::of(&self.core, &rows.entities).await;
        Ok(SlotChunk { rows, keys, erased, snapshots })
    }
}

/// What is known of lives that are erased.
async fn erased(node: &NodeStore, key_ids: Vec<[u8; 16]>) -> Result<Vec<(ErasedLife, Option<String>)>, String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let mut erased = Vec::with_capacity(key_ids.len());
    for tombstone in node.tombstones_by_key(&key_ids).await.map_err(|error| words(&error))? {
        let receipt = node.receipt(tombstone.receipt_id).await.map_err(|error| words(&error))?;
        erased.push((tombstone.into(), receipt));
    }
    Ok(erased)
}

/// The secret of a cluster's id hashes, as it came from another node.
pub(crate) fn id_secret(bytes: [u8; 32]) -> IdSecret {
    IdSecret::from(Secret32::from_bytes(&bytes))
}
