//! The row of a commit.

use sqlx::{Row, sqlite::SqliteRow};

use crate::{
    EntityRow, Epoch, Slot,
    row_hash::{RowFields, RowHash},
};

/// A row of the log, whole and unaltered: its checksum was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Microseconds since 1970.
    pub at_us: i64,
    /// The token under which it was written.
    pub epoch: Epoch,
    /// The keyed hash of the caller's idempotency key.
    pub append_key: Option<Vec<u8>>,
    /// The sealed events.
    pub body: Vec<u8>,
}

/// Reads a row of the log together with the hash that it should have.
pub(crate) fn parse(row: &SqliteRow, entity: &EntityRow) -> sqlx::Result<(LogRow, RowHash, i64)> {
    let number = |name| row.try_get::<i64, _>(name).map(i64::cast_unsigned);
    let log_row = LogRow {
        position: number("position")?,
        slot: Slot::new(number("slot")?),
        seq: number("seq")?,
        version: number("version")?,
        count: number("count")? as u32,
        at_us: row.try_get("at")?,
        epoch: Epoch::from_i64(row.try_get("epoch")?),
        append_key: row.try_get("append_key")?,
        body: row.try_get("body")?,
    };
    let hash = RowHash::of(&RowFields {
        slot: log_row.slot,
        seq: log_row.seq,
        id_hash: &entity.id_hash.0,
        key_id: &entity.key_id,
        version: log_row.version,
        count: log_row.count,
        at_us: log_row.at_us,
        epoch: log_row.epoch,
        append_key: log_row.append_key.as_deref(),
        body: &log_row.body,
    });
    Ok((log_row, hash, row.try_get("checksum")?))
}
