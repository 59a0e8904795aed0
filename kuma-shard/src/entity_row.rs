//! The row of an entity: who it is, without saying so.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sqlx::{Row, sqlite::SqliteRow};

use crate::{CopyId, EntityHash, Slot, TransferId};

/// An entity as its shard knows it: by hash; its id only sealed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntityRow {
    /// The number of the entity in its shard file.
    pub eid: i64,
    /// Whether it is its slot's, or was given away with it.
    pub copy: CopyId,
    /// The slot.
    pub slot: Slot,
    /// The kind, in clear. Shared: a store has few kinds and many entities.
    pub kind: Arc<str>,
    /// The keyed hash of kind and id.
    pub id_hash: EntityHash,
    /// Which life of this entity: 1, and one more each time that it was made anew after an erasure.
    pub life: u32,
    /// The id, sealed with the entity's key. Empty once it is erased. Only needed to create the entity and to verify it; see [`EntityRow::without_id`].
    #[serde(with = "serde_bytes")]
    pub sealed_id: Vec<u8>,
    /// The name of the entity's key.
    pub key_id: [u8; 16],
    /// Microseconds since 1970.
    pub created_at_us: i64,
    /// When it was erased, if it was. Microseconds since 1970.
    pub erased_at_us: Option<i64>,
}

impl EntityRow {
    /// The row as it is kept in memory while the entity lives: nobody looks at its sealed id, and there are many.
    pub fn without_id(&self) -> Self {
        EntityRow { sealed_id: Vec::new(), ..self.clone() }
    }

    /// The row that stays of an entity that is erased.
    pub fn erased(&self, at_us: i64) -> Self {
        EntityRow { sealed_id: Vec::new(), erased_at_us: Some(self.erased_at_us.unwrap_or(at_us)), ..self.clone() }
    }

    /// Whether its slot was given away, and with it all that it has. What is left here are stubs, and no key.
    pub fn is_departed(&self) -> bool {
        self.copy != CopyId::LIVE
    }

    /// The row that stays of an entity whose slot was given away by `transfer`.
    pub(crate) fn departed(&self, transfer: TransferId, at_us: i64) -> Self {
        EntityRow { copy: transfer.into(), ..self.erased(at_us) }
    }

    pub(crate) fn checksum(&self) -> i64 {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(b"kumaentity2")
            .update(&self.eid.to_le_bytes())
            .update(&self.copy.0)
            .update(&self.slot.number().to_le_bytes())
            .update(&(self.kind.len() as u64).to_le_bytes())
            .update(self.kind.as_bytes())
            .update(&self.id_hash.0)
            .update(&self.life.to_le_bytes())
            .update(&(self.sealed_id.len() as u64).to_le_bytes())
            .update(&self.sealed_id)
            .update(&self.key_id)
            .update(&self.created_at_us.to_le_bytes())
            .update(&[u8::from(self.erased_at_us.is_some())])
            .update(&self.erased_at_us.unwrap_or_default().to_le_bytes());
        crate::first_eight(hasher.finalize().as_bytes())
    }

    /// `None` where the row does not match its checksum.
    pub(crate) fn from_row(row: &SqliteRow) -> sqlx::Result<Option<Self>> {
        Self::read(row, "slot", "checksum")
    }

    /// From a row of the log with that of its entity beside it. The log has a slot and a checksum of its own.
    pub(crate) fn from_joined(row: &SqliteRow) -> sqlx::Result<Option<Self>> {
        Self::read(row, "entity_slot", "entity_checksum")
    }

    fn read(row: &SqliteRow, slot: &str, checksum: &str) -> sqlx::Result<Option<Self>> {
        let (Ok(copy), Ok(id_hash), Ok(key_id)) = (
            row.try_get::<Vec<u8>, _>("copy")?.try_into(),
            row.try_get::<Vec<u8>, _>("id_hash")?.try_into(),
            row.try_get::<Vec<u8>, _>("key_id")?.try_into(),
        ) else {
            return Ok(None);
        };
        let entity = EntityRow {
            eid: row.try_get("eid")?,
            copy: CopyId(copy),
            slot: Slot::from_stored(row.try_get(slot)?),
            kind: row.try_get::<String, _>("kind")?.into(),
            id_hash: EntityHash(id_hash),
            life: row.try_get("life")?,
            sealed_id: row.try_get("sealed_id")?,
            key_id,
            created_at_us: row.try_get("created_at")?,
            erased_at_us: row.try_get("erased_at")?,
        };
        Ok((entity.checksum() == row.try_get::<i64, _>(checksum)?).then_some(entity))
    }
}
