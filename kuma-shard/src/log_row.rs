//! The row of a commit.

use serde::{Deserialize, Serialize};
use sqlx::{Row, sqlite::SqliteRow};

use crate::{
    EntityRow, Epoch, Slot,
    packed::{self, Hex},
    row_hash::{RowFields, RowHash},
};

/// A row of the log, whole and unaltered: its checksum was verified. Of an erased commit it is a stub, see [`LogRow::is_stub`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRow {
    /// Place in the shard's log.
    pub position: u64,
    /// The slot.
    pub slot: Slot,
    /// Place in the slot's log.
    pub seq: u64,
    /// The version of the first event.
    pub version: u64,
    /// How many events.
    pub count: u32,
    /// Microseconds since 1970; 0 in a stub.
    pub at_us: i64,
    /// The token under which it was written.
    pub epoch: Epoch,
    /// The keyed hash of the caller's idempotency key.
    #[serde(with = "serde_bytes")]
    pub append_key: Option<Vec<u8>>,
    /// The sealed events; empty in a stub.
    #[serde(with = "serde_bytes")]
    pub body: Vec<u8>,
}

impl LogRow {
    /// Whether it stands for a commit that was erased. (A sealed body is never empty.)
    pub fn is_stub(&self) -> bool {
        self.body.is_empty()
    }

    /// What stays of it when it is erased.
    pub(crate) fn stub(&self) -> LogRow {
        LogRow { at_us: 0, append_key: None, body: Vec::new(), ..*self }
    }

    pub(crate) fn fields<'a>(&'a self, entity: &'a EntityRow) -> RowFields<'a> {
        RowFields {
            slot: self.slot,
            seq: self.seq,
            id_hash: &entity.id_hash.0,
            key_id: &entity.key_id,
            version: self.version,
            count: self.count,
            at_us: self.at_us,
            epoch: self.epoch,
            append_key: self.append_key.as_deref(),
            body: &self.body,
        }
    }
}

/// Reads a row of the log together with the hash that it should have.
pub(crate) fn parse(row: &SqliteRow, entity: &EntityRow) -> sqlx::Result<(LogRow, RowHash, i64)> {
    let number = |name| row.try_get::<i64, _>(name).map(i64::cast_unsigned);
    let log_row = LogRow {
        position: number("position")?,
        slot: Slot::from_stored(row.try_get("slot")?),
        seq: number("seq")?,
        version: number("version")?,
        count: number("count")? as u32,
        at_us: row.try_get("at")?,
        epoch: Epoch::from_i64(row.try_get("epoch")?),
        append_key: row.try_get("append_key")?,
        body: row.try_get("body")?,
    };
    let hash = RowHash::of(&log_row.fields(entity));
    Ok((log_row, hash, row.try_get("checksum")?))
}

/// The query of the rows in a table that is like the log, or in a query, in their order and in one value, of [`PackedRow`].
macro_rules! packed_rows {
    ($from:literal) => {
        concat!(
            "SELECT json_group_array(json_array(
                 position, slot, seq, eid, version, count, at, epoch, iif(append_key IS NULL, NULL, hex(append_key)), checksum, hex(body)
             ) ORDER BY position) FROM (",
            $from,
            ")"
        )
    };
}
pub(crate) use packed_rows;

/// The columns of a row of the log.
#[derive(Deserialize)]
struct PackedRow(i64, i64, i64, i64, i64, i64, i64, i64, Option<Hex>, i64, Hex);

/// A row of the log, with the number of its entity and the checksum that stands in it.
pub(crate) struct StoredRow {
    pub(crate) eid: i64,
    pub(crate) row: LogRow,
    pub(crate) checksum: i64,
}

/// The rows that a query of [`packed_rows`] has found, in a column of an answer. Their checksums are not compared yet.
pub(crate) fn unpack(answer: &SqliteRow, column: usize) -> sqlx::Result<Vec<StoredRow>> {
    let rows: Vec<PackedRow> = packed::column(answer, column)?;
    let stored = |row| {
        let PackedRow(position, slot, seq, eid, version, count, at_us, epoch, append_key, checksum, body) = row;
        let row = LogRow {
            position: position.cast_unsigned(),
            slot: Slot::from_stored(slot),
            seq: seq.cast_unsigned(),
            version: version.cast_unsigned(),
            count: count as u32,
            at_us,
            epoch: Epoch::from_i64(epoch),
            append_key: append_key.map(|key| key.0),
            body: body.0,
        };
        StoredRow { eid, row, checksum }
    };
    Ok(rows.into_iter().map(stored).collect())
}
