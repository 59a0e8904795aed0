//! Erasures on the other disks of a cluster: what the eraser asks for, and what it is asked for by others.
//!
//! Invariants:
//! - A tombstone is durable on a disk before the key ends there, and the key has ended before the disk says so.
//! - Keys that come with a slot are looked at and kept under the same lock under which tombstones are written: none slips in between.

use std::{collections::BTreeSet, sync::Arc};

use futures_util::future::BoxFuture;
use kuma_shard::{EntityHash, Purged, ReceiptRow, Slot, Tombstone};
use serde::{Deserialize, Serialize};

use crate::{ClusterLogs, SlotError, erasure::EraserMessage, projector::PurgedLife, slots::Slots};

/// Tombstones that are carried out together.
const TOGETHER: usize = 256;

/// A life that is erased, as nodes tell each other.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErasedLife {
    /// The key that is destroyed. It names the life.
    pub key_id: [u8; 16],
    /// The entity.
    pub entity: EntityHash,
    /// Its slot.
    pub slot: Slot,
    /// The name of the erasure and its receipt.
    pub receipt_id: [u8; 16],
    /// When it was asked for. Microseconds since 1970.
    pub at_us: i64,
    /// Kind and id, for read models that hold the entity: as long as they are known, inside an encrypted link and nowhere else.
    #[serde(default)]
    pub name: Option<(String, String)>,
}

impl std::fmt::Debug for ErasedLife {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ErasedLife { entity, slot, at_us, .. } = self;
        write!(f, "ErasedLife {{ entity: {entity}, slot: {slot}, at_us: {at_us} }}")
    }
}

impl From<Tombstone> for ErasedLife {
    fn from(tombstone: Tombstone) -> Self {
        let Tombstone { key_id, id_hash, slot, receipt_id, at_us } = tombstone;
        ErasedLife { key_id, entity: id_hash, slot, receipt_id, at_us, name: None }
    }
}

impl From<&ErasedLife> for Tombstone {
    fn from(life: &ErasedLife) -> Self {
        let ErasedLife { key_id, entity, slot, receipt_id, at_us, .. } = *life;
        Tombstone { key_id, id_hash: entity, slot, receipt_id, at_us }
    }
}

/// The receipt of an erasure, as nodes tell each other.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToldReceipt {
    /// Its name.
    pub receipt_id: [u8; 16],
    /// The key that was destroyed.
    pub key_id: [u8; 16],
    /// The signed text.
    pub body: String,
}

impl std::fmt::Debug for ToldReceipt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ToldReceipt(..)")
    }
}

impl From<ToldReceipt> for ReceiptRow {
    fn from(told: ToldReceipt) -> Self {
        let ToldReceipt { receipt_id, key_id, body } = told;
        ReceiptRow { receipt_id, key_id, body }
    }
}

impl From<ReceiptRow> for ToldReceipt {
    fn from(row: ReceiptRow) -> Self {
        let ReceiptRow { receipt_id, key_id, body } = row;
        ToldReceipt { receipt_id, key_id, body }
    }
}

/// What has become of a life on the other disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// Its key is nowhere.
    Ended {
        /// Nodes that say so, by name.
        nodes: Vec<String>,
        /// Disks that did not, because they were attested to be destroyed.
        without: Vec<String>,
        /// The receipt, if one was made before, by another owner of the slot.
        receipt: Option<String>,
    },
    /// Somebody has not answered. In words.
    Waiting(String),
}

/// The other disks of the cluster.
pub trait OtherDisks: Send + Sync + 'static {
    /// Whether all of them can be asked now.
    fn are_up(&self) -> bool;

    /// Has all of them hold the tombstones and destroy the keys. One answer for each life. This disk has done its part, durably. Ends by itself,
    /// whoever does not answer.
    fn shred(&self, lives: Vec<ErasedLife>) -> BoxFuture<'_, Vec<Elsewhere>>;

    /// Receipts were made: whoever can be reached is to have them.
    fn tell(&self, receipts: Vec<ToldReceipt>);
}

impl Slots {
    /// From now on an erasure is complete when these have had their part in it.
    pub fn set_other_disks(&self, others: Arc<dyn OtherDisks>) {
        self.inner.set_other_disks(others);
    }

    /// From now on projections are fed with these.
    pub fn set_cluster_logs(&self, logs: Arc<dyn ClusterLogs>) {
        self.inner.set_cluster_logs(logs);
    }

    /// Has the eraser go on with what is not finished.
    pub fn resume_erasures(&self) {
        if let Some(eraser) = self.inner.eraser() {
            // One that is gone erases nothing any more.
            let _ = eraser.cast(EraserMessage::Resume);
        }
    }

    /// A slot has come to this disk, and its gate is about to be opened: what is erased in it is nobody's, and what is not finished is gone on with.
    pub fn take_over(&self, slot: Slot) {
        if self.inner.erasing().take_over(slot) {
            self.resume_erasures();
        }
    }

    /// Whether entities of the slot are on their way out on this disk: their rows change.
    pub fn is_erasing(&self, slot: Slot) -> bool {
        self.inner.erasing().is_at_work(slot)
    }

    /// This disk's part in erasures of other ones: it holds the tombstones and has no keys any more, in whatever copy, when this returns. Receipts
    /// that it has of them.
    ///
    /// # Errors
    /// Some of it is not done; do it again.
    pub async fn shred(&self, lives: &[ErasedLife]) -> Result<Vec<Option<String>>, SlotError> {
        let mut receipts = Vec::with_capacity(lives.len());
        for lives in lives.chunks(TOGETHER) {
            self.shred_some(lives).await?;
            for life in lives {
                receipts.push(self.inner.node().receipt(life.receipt_id).await.map_err(failed)?);
            }
        }
        if let Some(eraser) = self.inner.eraser() {
            // Whoever subscribes is told.
            let _ = eraser.cast(EraserMessage::Told);
        }
        Ok(receipts)
    }

    async fn shred_some(&self, lives: &[ErasedLife]) -> Result<(), SlotError> {
        let (inner, vault) = (&self.inner, self.inner.vault());
        let slots: BTreeSet<Slot> = lives.iter().map(|life| life.slot).collect();
        let _locked = inner.key_locks().all_of(slots).await;
        let tombstones: Vec<Tombstone> = lives.iter().map(Tombstone::from).collect();
        // One that comes to be the owner finds what is not finished; one that is the owner, too.
        let (own, others): (Vec<Tombstone>, Vec<Tombstone>) =
            tombstones.iter().partition(|tombstone| inner.owns(tombstone.slot));
        inner.node().learn(others).await.map_err(failed)?;
        if !own.is_empty() {
            inner.node().owe(own.clone()).await.map_err(failed)?;
            own.iter().for_each(|tombstone| inner.erasing().entomb(tombstone));
            self.resume_erasures();
        }
        let named: Vec<PurgedLife> = lives.iter().filter_map(purged).collect();
        if !named.is_empty() {
            let entities: Vec<Purged> = named.iter().map(|life| life.entity.clone()).collect();
            inner.durables().purge(inner, &entities).await.map_err(failed)?;
            let purged = inner.projections().purge(inner.data_dir(), inner.file_options(), named.into()).await;
            purged.map_err(failed)?;
        }
        let key_ids: Vec<[u8; 16]> = lives.iter().map(|life| life.key_id).collect();
        let alive = vault.keys.alive(&key_ids).await.map_err(failed)?;
        if !alive.is_empty() {
            vault.keys.destroy(alive).await.map_err(failed)?;
            inner.erasing().note_end();
        }
        // Also of a run before, which may have ended here.
        vault.keys.truncate_log().await.map_err(failed)
    }

    /// Tombstones behind the one with this number, and the number of the last; none when there are no more.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn ledger(&self, after: i64, lives_max: u32) -> Result<Option<(Vec<ErasedLife>, i64)>, SlotError> {
        let page = self.inner.node().tombstones(after, lives_max).await.map_err(failed)?;
        let last = page.last().map(|(number, _)| *number);
        Ok(last.map(|last| (page.into_iter().map(|(_, tombstone)| tombstone.into()).collect(), last)))
    }

    /// Keeps receipts that another node has made.
    ///
    /// # Errors
    /// None was kept, or that is unknown.
    pub async fn keep_receipts(&self, receipts: Vec<ToldReceipt>) -> Result<(), SlotError> {
        self.inner.node().finish(receipts.into_iter().map(ReceiptRow::from).collect()).await.map_err(failed)
    }
}

fn failed(error: impl std::fmt::Display) -> SlotError {
    SlotError::Node { detail: error.to_string() }
}

fn purged(life: &ErasedLife) -> Option<PurgedLife> {
    let (kind, id) = life.name.as_ref()?;
    let entity = Purged { key_id: life.key_id, kind: kind.as_str().into(), id: id.as_str().into(), hash: life.entity };
    Some(PurgedLife { key_id: life.key_id, entity })
}
