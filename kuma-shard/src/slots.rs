//! The slots of a shard: who owns each, and how far its log is.
//!
//! Invariants:
//! - The writer's memory is the truth between two marks; the file holds each slot as of the mark's position, and what follows the
//!   mark is folded in at open. Updating rows of this table in every group commit would double the cost of small appends.
//! - A change of who owns a slot is written with the marks, in the transaction that makes it.
//! - `next_seq` of an owned slot has no gaps: it is assigned inside the commit by the only writer.
//! - The absence of a row never means ownership.

use std::sync::Arc;

use parking_lot::RwLock;
use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use crate::{
    Content, Digest, DiskId, Epoch, SLOTS, Slot, SlotRecord, Staged, Token, TransferId, Txn, row_hash::RowHash,
    statements::Bound,
};

/// One slot as its writer knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotImage {
    pub(crate) slot: Slot,
    pub(crate) token: Token,
    pub(crate) floor: Epoch,
    pub(crate) last_owned: Epoch,
    pub(crate) staged: Option<Staged>,
    pub(crate) next_seq: u64,
    pub(crate) len: u64,
    pub(crate) digest: Digest,
    /// How often rows that are there became others since the file was opened: by an erasure, or because they left.
    pub(crate) rewrites: u64,
}

/// The slots of a shard. Changed by its writer alone, when a group is durable.
pub(crate) type SharedSlots = Arc<RwLock<Vec<SlotImage>>>;

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

impl From<SlotSum> for Content {
    fn from(sum: SlotSum) -> Self {
        Content { len: sum.len, digest: sum.digest.to_bytes() }
    }
}

impl SlotImage {
    pub(crate) fn sum(&self) -> SlotSum {
        SlotSum { len: self.len, digest: self.digest }
    }

    /// A slot of a new store: its own, or of a cluster that others founded.
    pub(crate) fn new(slot: Slot, is_owned: bool) -> Self {
        let record = match is_owned || slot == Slot::OWN {
            true => SlotRecord::founded(Content::default()),
            false => SlotRecord::NONE,
        };
        let empty = SlotSum::default();
        SlotImage {
            slot,
            token: record.token,
            floor: record.floor,
            last_owned: record.last_owned,
            staged: record.staged,
            next_seq: 1,
            len: empty.len,
            digest: empty.digest,
            rewrites: 0,
        }
    }

    /// The epoch of its owner, if that is this disk.
    pub(crate) fn owned(&self) -> Option<Epoch> {
        self.record().owned()
    }

    /// What the rules of the handoff know of it.
    pub(crate) fn record(&self) -> SlotRecord {
        SlotRecord {
            token: self.token,
            floor: self.floor,
            last_owned: self.last_owned,
            content: self.sum().into(),
            staged: self.staged,
        }
    }

    /// As it is after a change. Rows that leave and rows that come are the caller's.
    pub(crate) fn after(&self, txn: &Txn) -> Self {
        let mut record = self.record();
        record.apply(txn);
        let SlotRecord { token, floor, last_owned, content, staged } = record;
        let next_seq = match txn {
            // Each row stands for one place, erased ones too.
            Txn::Take { .. } | Txn::ConfirmTaken { .. } => content.len + 1,
            _ => self.next_seq,
        };
        let (len, digest) = (content.len, Digest::from_bytes(content.digest));
        SlotImage { token, floor, last_owned, staged, next_seq, len, digest, ..*self }
    }

    fn state(&self) -> &'static str {
        match self.token {
            Token::None => "none",
            Token::Owned(_) => "owned",
            Token::Released { is_taken: false, .. } => "released",
            Token::Released { is_taken: true, .. } => "taken",
        }
    }

    /// Epoch, peer and transfer of the token.
    fn parts(&self) -> (Epoch, Option<DiskId>, Option<TransferId>) {
        match self.token {
            Token::None => (Epoch::NEVER, None, None),
            Token::Owned(epoch) => (epoch, None, None),
            Token::Released { epoch, to, transfer, .. } => (epoch, Some(to), Some(transfer)),
        }
    }

    fn checksum(&self) -> i64 {
        let (epoch, peer, transfer) = self.parts();
        let staged = self.staged.map(|staged| {
            let mut bytes = Vec::with_capacity(88);
            bytes.extend_from_slice(&staged.transfer.0);
            bytes.extend_from_slice(&staged.epoch.to_i64().to_le_bytes());
            bytes.extend_from_slice(&staged.from.0);
            bytes.extend_from_slice(&staged.content.len.to_le_bytes());
            bytes.extend_from_slice(&staged.content.digest);
            bytes
        });
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(b"kumaslot2")
            .update(&self.slot.number().to_le_bytes())
            .update(self.state().as_bytes())
            .update(&epoch.to_i64().to_le_bytes())
            .update(&peer.map_or([0; 16], |disk| disk.0))
            .update(&transfer.map_or([0; 16], |transfer| transfer.0))
            .update(&self.floor.to_i64().to_le_bytes())
            .update(&self.last_owned.to_i64().to_le_bytes())
            .update(&self.next_seq.to_le_bytes())
            .update(&self.len.to_le_bytes())
            .update(&self.digest.to_bytes())
            .update(staged.as_deref().unwrap_or_default());
        crate::first_eight(hasher.finalize().as_bytes())
    }

    /// In the order of the table's columns.
    pub(crate) fn bind(&self, query: Bound) -> Bound {
        let (epoch, peer, transfer) = self.parts();
        let staged = self.staged;
        query
            .bind(i64::from(self.slot.number()))
            .bind(self.state())
            .bind(epoch.to_i64())
            .bind(self.floor.to_i64())
            .bind(self.last_owned.to_i64())
            .bind(peer.map(|disk| disk.0.to_vec()))
            .bind(transfer.map(|transfer| transfer.0.to_vec()))
            .bind(self.next_seq.cast_signed())
            .bind(self.len.cast_signed())
            .bind(self.digest.to_bytes().to_vec())
            .bind(staged.map(|staged| staged.transfer.0.to_vec()))
            .bind(staged.map(|staged| staged.epoch.to_i64()))
            .bind(staged.map(|staged| staged.from.0.to_vec()))
            .bind(staged.map(|staged| staged.content.len.cast_signed()))
            .bind(staged.map(|staged| staged.content.digest.to_vec()))
            .bind(self.checksum())
    }

    fn from_row(row: &SqliteRow) -> sqlx::Result<Option<Self>> {
        let number = |name| row.try_get::<i64, _>(name);
        let epoch = |name| number(name).map(Epoch::from_i64);
        let bytes = |name| row.try_get::<Option<Vec<u8>>, _>(name);
        let name = |name| bytes(name).map(|bytes| bytes.and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()));
        let sum = |name| bytes(name).map(|bytes| bytes.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok()));
        let state: String = row.try_get("state")?;
        let (epoch_of_token, peer, transfer) = (epoch("epoch")?, name("peer")?, name("transfer")?);
        let token = match (state.as_str(), peer, transfer) {
            ("none", None, None) => Token::None,
            ("owned", None, None) => Token::Owned(epoch_of_token),
            ("released" | "taken", Some(to), Some(transfer)) => Token::Released {
                epoch: epoch_of_token,
                to: DiskId(to),
                transfer: TransferId(transfer),
                is_taken: state == "taken",
            },
            _ => return Ok(None),
        };
        let staged = match (name("staged_transfer")?, name("staged_from")?, sum("staged_digest")?) {
            (Some(transfer), Some(from), Some(digest)) => Some(Staged {
                transfer: TransferId(transfer),
                epoch: epoch("staged_epoch")?,
                from: DiskId(from),
                content: Content { len: number("staged_len")?.cast_unsigned(), digest },
            }),
            (None, None, None) => None,
            _ => return Ok(None),
        };
        let Some(digest) = sum("digest")? else { return Ok(None) };
        let image = SlotImage {
            slot: Slot::from_stored(number("slot")?),
            token,
            floor: epoch("floor")?,
            last_owned: epoch("last_owned")?,
            staged,
            next_seq: number("next_seq")?.cast_unsigned(),
            len: number("len")?.cast_unsigned(),
            digest: Digest::from_bytes(digest),
            rewrites: 0,
        };
        Ok((image.checksum() == number("checksum")?).then_some(image))
    }
}

/// The slots that shard `number` of `shards` holds, in the order of [`index`]. The store's own is the last one of its shard.
pub(crate) fn slots_of(number: u16, shards: u16) -> impl Iterator<Item = Slot> {
    (number..=SLOTS).step_by(usize::from(shards.max(1))).map(|slot| Slot::from_stored(slot.into()))
}

/// Where a slot stands in its shard's table.
pub(crate) fn index(slot: Slot, shards: u16) -> usize {
    usize::from(slot.number() / shards.max(1))
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
            let mut seen = vec![0; usize::from(SLOTS) + 1];
            for number in 0..shards {
                for (position, slot) in slots_of(number, shards).enumerate() {
                    assert_eq!((slot.shard(shards), index(slot, shards)), (number, position));
                    seen[usize::from(slot.number())] += 1;
                }
            }
            assert!(seen.iter().all(|count| *count == 1));
        }
    }

    #[test]
    fn the_own_slot_is_nobodys_hash() {
        assert_eq!((Slot::new(4096), Slot::from_stored(4096)), (Slot::new(0), Slot::OWN));
        assert_eq!(SlotImage::new(Slot::OWN, false).owned(), Some(Epoch::FIRST));
        assert_eq!(SlotImage::new(Slot::new(7), false).owned(), None);
    }
}
