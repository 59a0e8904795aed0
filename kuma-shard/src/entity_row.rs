//! The row of an entity: who it is, without saying so.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sqlx::{Row, sqlite::SqliteRow};

use crate::{
    CopyId, EntityHash, Slot, TransferId,
    packed::{self, Hex},
};

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
        let bytes = |name| row.try_get(name).map(Hex);
        let columns = PackedEntity(
            row.try_get("eid")?,
            bytes("copy")?,
            row.try_get(slot)?,
            row.try_get("kind")?,
            bytes("id_hash")?,
            row.try_get("life")?,
            bytes("sealed_id")?,
            bytes("key_id")?,
            row.try_get("created_at")?,
            row.try_get("erased_at")?,
            row.try_get(checksum)?,
        );
        Ok(columns.unpack())
    }
}

/// The query of the entities in a table, or in a query, in the order of their numbers and in one value, of [`PackedEntity`].
macro_rules! packed_entities {
    ($from:literal) => {
        concat!(
            "SELECT json_group_array(json_array(
                 eid, hex(copy), slot, kind, hex(id_hash), life, hex(sealed_id), hex(key_id), created_at, erased_at, checksum
             ) ORDER BY eid) FROM (",
            $from,
            ")"
        )
    };
}
pub(crate) use packed_entities;

/// The columns of an entity.
#[derive(Deserialize)]
struct PackedEntity(i64, Hex, i64, String, Hex, u32, Hex, Hex, i64, Option<i64>, i64);

impl PackedEntity {
    /// `None` where the row does not match its checksum.
    fn unpack(self) -> Option<EntityRow> {
        let PackedEntity(
            eid,
            copy,
            slot,
            kind,
            id_hash,
            life,
            sealed_id,
            key_id,
            created_at_us,
            erased_at_us,
            checksum,
        ) = self;
        let entity = EntityRow {
            eid,
            copy: CopyId(copy.0.try_into().ok()?),
            slot: Slot::from_stored(slot),
            kind: kind.into(),
            id_hash: EntityHash(id_hash.0.try_into().ok()?),
            life,
            sealed_id: sealed_id.0,
            key_id: key_id.0.try_into().ok()?,
            created_at_us,
            erased_at_us,
        };
        (entity.checksum() == checksum).then_some(entity)
    }
}

/// The entities that a query of [`packed_entities`] has found, in a column of an answer; none of them is damaged.
pub(crate) fn unpack(answer: &SqliteRow, column: usize) -> sqlx::Result<Vec<EntityRow>> {
    let rows: Vec<PackedEntity> = packed::column(answer, column)?;
    let damaged = || packed::damaged("the row of an entity does not match its checksum");
    rows.into_iter().map(|row| row.unpack().ok_or_else(damaged)).collect()
}
