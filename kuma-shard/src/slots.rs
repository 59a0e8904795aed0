//! The slots of a shard: who owns each, and how far its log is.
//!
//! Invariants:
//! - The writer's memory is the truth between two marks; the file holds each slot as of the mark's position, and what follows the
//!   mark is folded in at open. Updating rows of this table in every group commit would double the cost of small appends.
//! - `next_seq` of an owned slot has no gaps: it is assigned inside the commit by the only writer.
//! - The absence of a row never means ownership.

use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use crate::{CopyId, Digest, Epoch, SLOTS, Slot, row_hash::RowHash};

/// Whether this node may write a slot's rows. (The states of a handoff join these with the cluster.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// Never owned here.
    None,
    /// Owned, with the epoch of the token.
    Owned,
}

impl Ownership {
    fn as_str(self) -> &'static str {
        match self {
            Ownership::None => "none",
            Ownership::Owned => "owned",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Ownership::None, Ownership::Owned].into_iter().find(|state| state.as_str() == text)
    }
}

/// One slot as its writer knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotImage {
    pub(crate) slot: Slot,
    pub(crate) ownership: Ownership,
    pub(crate) epoch: Epoch,
    pub(crate) floor: Epoch,
    pub(crate) copy: CopyId,
    pub(crate) next_seq: u64,
    pub(crate) len: u64,
    pub(crate) digest: Digest,
    /// Steps of erasures since the file was opened.
    pub(crate) erasures: u64,
}

/// How many rows a slot has, and their digest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SlotSum {
    pub(crate) len: u64,
    pub(crate) digest: Digest,
}

impl SlotSum {
    pub(crate) fn add(&mut self, row: &RowHash) {
        self.len += 1;
        self.digest.add(row);
    }
}

impl SlotImage {
    pub(crate) fn sum(&self) -> SlotSum {
        SlotSum { len: self.len, digest: self.digest }
    }

    /// A slot of a new, standalone store.
    pub(crate) fn genesis(slot: Slot) -> Self {
        SlotImage {
            slot,
            ownership: Ownership::Owned,
            epoch: Epoch::FIRST,
            floor: Epoch::FIRST,
            copy: CopyId::GENESIS,
            next_seq: 1,
            len: 0,
            digest: Digest::default(),
            erasures: 0,
        }
    }

    fn checksum(&self) -> i64 {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(b"kumaslot1")
            .update(&self.slot.number().to_le_bytes())
            .update(self.ownership.as_str().as_bytes())
            .update(&self.epoch.to_i64().to_le_bytes())
            .update(&self.floor.to_i64().to_le_bytes())
            .update(&self.copy.0)
            .update(&self.next_seq.to_le_bytes())
            .update(&self.len.to_le_bytes())
            .update(&self.digest.to_bytes());
        crate::first_eight(hasher.finalize().as_bytes())
    }

    fn from_row(row: &SqliteRow) -> sqlx::Result<Option<Self>> {
        let number = |name| row.try_get::<i64, _>(name);
        let state: String = row.try_get("state")?;
        let (Some(ownership), Ok(copy), Ok(digest)) = (
            Ownership::parse(&state),
            row.try_get::<Vec<u8>, _>("copy")?.try_into(),
            row.try_get::<Vec<u8>, _>("digest")?.try_into(),
        ) else {
            return Ok(None);
        };
        let image = SlotImage {
            slot: Slot::new(number("slot")?.cast_unsigned()),
            ownership,
            epoch: Epoch::from_i64(number("epoch")?),
            floor: Epoch::from_i64(number("floor")?),
            copy: CopyId(copy),
            next_seq: number("next_seq")?.cast_unsigned(),
            len: number("len")?.cast_unsigned(),
            digest: Digest::from_bytes(digest),
            erasures: 0,
        };
        Ok((image.checksum() == number("checksum")?).then_some(image))
    }
}

/// The slots that shard `number` of `shards` holds, in the order of [`index`].
pub(crate) fn slots_of(number: u16, shards: u16) -> impl Iterator<Item = Slot> {
    (number..SLOTS).step_by(usize::from(shards.max(1))).map(|slot| Slot::new(u64::from(slot)))
}

/// Where a slot stands in its shard's table.
pub(crate) fn index(slot: Slot, shards: u16) -> usize {
    usize::from(slot.number() / shards.max(1))
}

/// Writes slots as they are in memory.
pub(crate) async fn store(
    connection: &mut SqliteConnection,
    slots: impl Iterator<Item = &SlotImage>,
) -> sqlx::Result<()> {
    for image in slots {
        sqlx::query(
            "INSERT OR REPLACE INTO slot_token(slot, state, epoch, floor, copy, next_seq, len, digest, checksum)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(i64::from(image.slot.number()))
        .bind(image.ownership.as_str())
        .bind(image.epoch.to_i64())
        .bind(image.floor.to_i64())
        .bind(image.copy.0.to_vec())
        .bind(image.next_seq.cast_signed())
        .bind(image.len.cast_signed())
        .bind(image.digest.to_bytes().to_vec())
        .bind(image.checksum())
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// Reads all slots of a shard; `Err` in the inner result says which row is damaged or missing.
pub(crate) async fn load(
    connection: &mut SqliteConnection,
    number: u16,
    shards: u16,
) -> sqlx::Result<Result<Vec<SlotImage>, String>> {
    let rows = sqlx::query("SELECT * FROM slot_token ORDER BY slot").fetch_all(connection).await?;
    let mut images = Vec::with_capacity(rows.len());
    for (row, expected) in rows.iter().zip(slots_of(number, shards)) {
        match SlotImage::from_row(row)? {
            Some(image) if image.slot == expected => images.push(image),
            _ => return Ok(Err(format!("the token of slot {expected} is damaged"))),
        }
    }
    let (found, expected) = (rows.len(), slots_of(number, shards).count());
    if found != expected {
        return Ok(Err(format!("it holds {found} slot tokens, expected {expected}")));
    }
    Ok(Ok(images))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_in_exactly_one_shard_at_its_index() {
        for shards in [1, 3, 4, 16] {
            let mut seen = vec![0; usize::from(SLOTS)];
            for number in 0..shards {
                for (position, slot) in slots_of(number, shards).enumerate() {
                    assert_eq!((slot.shard(shards), index(slot, shards)), (number, position));
                    seen[usize::from(slot.number())] += 1;
                }
            }
            assert!(seen.iter().all(|count| *count == 1));
        }
    }
}
