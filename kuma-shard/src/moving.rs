//! A slot that moves: its rows come in, wait, and become the slot; or they leave.
//!
//! ```text
//!   rows ──► incoming ──read back──► staged ──Take──► entity, log (new places in the shard's log)
//!
//!   entity, log ──ConfirmTaken──► departed: no id, no snapshot, no key ──step by step──► stubs
//! ```
//!
//! Invariants:
//! - What comes in is in tables of its own, in no log and no digest, until the transaction that takes the slot moves all of it. Whoever reads
//!   the shard's log meets it at new places, in the order of the slot.
//! - Rows come in the order of the slot's log, without gaps; what was sent twice is there once. Nothing is added to what is staged.
//! - A change of the token is written only if the token allows it as of all that the writer wrote before, in the same transaction with the marks.
//! - Requests wait for the transaction that takes a slot: what came in is copied there, and dropped from its own tables by others afterwards. In no
//!   transfer that is staged, it is of no use to anybody.
//! - What was given away stays as stubs, under the name of the transfer, outside of the digests. Its entities take no commit any more.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sqlx::{
    Row, SqliteConnection, SqliteExecutor,
    sqlite::{SqlitePool, SqliteRow},
};
use tokio::sync::oneshot;

use crate::{
    CommitError, Content, CopyId, Digest, EntityRow, Epoch, LogRow, NotWritten, ReadError, Shard, Slot, SlotRecord,
    Token, TransferId, Txn,
    entity_row::{self, packed_entities},
    erase::{self, Stub},
    log_entry::LogEntry,
    log_row::{self, StoredRow, packed_rows},
    packed::{self, Hex},
    row_hash::{RowFields, RowHash},
    slots::{SlotImage, SlotSum},
    snapshots,
    statements::{self, Bound, IncomingEntity, IncomingRow},
};

/// Rows that are read or moved at a time.
const PAGE_ROWS: u32 = 256;
/// Rows that are dropped in one transaction.
const DROPPED_ROWS: u32 = 256;
/// What a row has beside its body.
const ROW_BYTES: usize = 160;
/// Of one page that goes out, and of one that is read back; the row that exceeds it is the last.
const OUTGOING_BYTES: i64 = 56 << 10;
const INCOMING_BYTES: i64 = 1 << 20;
/// Entities that are read at a time.
const ENTITIES_PAGE: usize = 1024;

/// The first of these rows, up to the one that makes them so large as is bound last, and their entities. To look at a length SQLite does not
/// read the body.
macro_rules! page_of {
    ($places:literal, $rows:literal, $entities:literal) => {
        concat!(
            "WITH page AS MATERIALIZED (SELECT place, entity FROM (
                 SELECT place, entity, sum(bytes + 64) OVER (ORDER BY place) - bytes - 64 AS before FROM (",
            $places,
            ")) WHERE before < ?)
             SELECT (",
            packed_rows!($rows),
            "), (",
            packed_entities!($entities),
            ")"
        )
    };
}

/// Rows of the log that go out.
macro_rules! outgoing_of {
    ($places:literal) => {
        page_of!(
            $places,
            "SELECT log.* FROM page CROSS JOIN log ON log.position = page.place",
            "SELECT * FROM entity WHERE eid IN (SELECT entity FROM page)"
        )
    };
}

/// Inserts what came in of a slot. Entities are numbered in the order of the numbers that they have at the giver.
macro_rules! take_into {
    ($insert:literal, $columns:literal, $where:literal) => {
        concat!(
            $insert,
            " SELECT ",
            $columns,
            " FROM incoming_log CROSS JOIN (
                 SELECT entity, ?3 - 1 + row_number() OVER (ORDER BY entity) AS eid FROM incoming_entity WHERE transfer = ?1
             ) USING (entity) WHERE transfer = ?1 ",
            $where,
            " ORDER BY seq"
        )
    };
}
const TAKE_ROWS: &str = take_into!(
    "INSERT INTO log(position, slot, seq, eid, version, count, at, epoch, append_key, checksum, body)",
    "?2 + seq - 1, slot, seq, eid, version, count, at, epoch, append_key, checksum, body",
    ""
);
const TAKE_INDEX: &str = take_into!("INSERT INTO log_index(eid, version, position)", "eid, version, ?2 + seq - 1", "");
/// The first commit with a key keeps it, as in [`statements::insert_keys`].
const TAKE_KEYS: &str = take_into!(
    "INSERT OR IGNORE INTO key_index(eid, append_key, position)",
    "eid, append_key, ?2 + seq - 1",
    "AND append_key IS NOT NULL"
);

/// Takes the append keys of rows, which still have them, out of their index.
const FORGET_KEYS: &str = "DELETE FROM key_index WHERE (eid, append_key) IN (
    SELECT eid, append_key FROM log WHERE position IN (SELECT value FROM json_each(?)))";

/// Rows of a slot on their way from one disk to another. Entities have the numbers that they have at the giver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRows {
    /// Entities of the slot, each before or with its first row.
    pub entities: Vec<EntityRow>,
    /// Rows of the slot's log in its order, each with the number of its entity.
    pub rows: Vec<(i64, LogRow)>,
}

/// A change of a slot's token, on its way to the writer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotChange {
    pub(crate) slot: Slot,
    pub(crate) txn: Txn,
    /// Of a take: the number of the first entity that comes in.
    pub(crate) first_eid: i64,
    pub(crate) at_us: i64,
}

/// Rows that come in, on their way to the writer.
#[derive(Clone, Debug)]
pub(crate) struct Incoming {
    pub(crate) slot: Slot,
    pub(crate) transfer: TransferId,
    pub(crate) rows: SlotRows,
}

impl Incoming {
    pub(crate) fn bytes(&self) -> usize {
        let entities = self.rows.entities.iter().map(|entity| entity.sealed_id.len() + ROW_BYTES);
        let rows = self.rows.rows.iter().map(|(_, row)| row.body.len() + ROW_BYTES);
        entities.chain(rows).sum()
    }
}

/// What of a transfer is on this disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadBack {
    /// The last place in the slot's log; 0 if there is none.
    pub last_seq: u64,
    /// How many rows, and their digest.
    pub content: Content,
}

impl Shard {
    /// The record of a slot as of the last durable commit; none if the slot is of another shard.
    pub fn slot(&self, slot: Slot) -> Option<SlotRecord> {
        self.slot_image(slot).map(|image| image.record())
    }

    /// How often rows of the slot became others since the file was opened: by steps of erasures, and when what left became stubs.
    pub fn rewrites_in(&self, slot: Slot) -> u64 {
        self.slot_image(slot).map_or(0, |image| image.rewrites)
    }

    /// The records of all slots of this shard, the store's own too.
    pub fn slots(&self) -> Vec<(Slot, SlotRecord)> {
        self.shared_slots().read().iter().map(|image| (image.slot, image.record())).collect()
    }

    /// The slots that this disk owns, with their epochs.
    pub fn owned_slots(&self) -> Vec<(Slot, Epoch)> {
        let owned = |image: &SlotImage| match image.token {
            Token::Owned(epoch) => Some((image.slot, epoch)),
            Token::None | Token::Released { .. } => None,
        };
        self.shared_slots().read().iter().filter_map(owned).collect()
    }

    /// Changes a slot's token, if the token allows it when the writer comes to it. Durable when this returns.
    ///
    /// # Errors
    /// [`NotWritten::TokenChanged`]: it does not allow it. [`CommitError::Unknown`]: look at the record when the file is open again.
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub async fn change_slot(&self, slot: Slot, txn: Txn, at_us: i64) -> Result<(), CommitError> {
        let (told, settled) = oneshot::channel();
        let hand_in = |first_eid| {
            let change = SlotChange { slot, txn, first_eid, at_us };
            // A caller that is gone does not want to know.
            self.hand_in(LogEntry::change_slot(change, Box::new(move |result| drop(told.send(result)))));
        };
        match txn {
            Txn::Take { transfer, .. } => {
                let unreadable = |error: ReadError| NotWritten::Io {
                    file: self.file().to_owned(),
                    detail: crate::verify::words(&error),
                };
                let entities = self.count_incoming(transfer).await.map_err(unreadable)?;
                self.number_many(entities, hand_in);
            }
            _ => hand_in(0),
        }
        settled.await.map_err(|_| NotWritten::Stopping)?
    }

    /// Keeps rows that came in under `transfer`. They must go on where those before end; what is there already is passed over. Durable when
    /// this returns.
    ///
    /// # Errors
    /// [`NotWritten::RowsMissing`] says where they have to go on. [`NotWritten::TokenChanged`]: the slot is owned here, or the transfer is
    /// staged and does not change any more.
    /// # Cancel safety
    /// Cancel safe: they are kept or not, and can be sent again.
    pub async fn receive(&self, slot: Slot, transfer: TransferId, rows: SlotRows) -> Result<(), CommitError> {
        let (told, settled) = oneshot::channel();
        let incoming = Incoming { slot, transfer, rows };
        self.hand_in(LogEntry::incoming(incoming, Box::new(move |result| drop(told.send(result)))));
        settled.await.map_err(|_| NotWritten::Stopping)?
    }

    /// Reads what came in under `transfer` behind `before`, which was read back earlier, and adds it. Each row is checked.
    ///
    /// # Errors
    /// The file cannot be read, or a row is not what was sent.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn read_back(&self, transfer: TransferId, before: ReadBack) -> Result<ReadBack, ReadError> {
        self.check_readable()?;
        let mut sum = SlotSum { len: before.content.len, digest: Digest::from_bytes(before.content.digest) };
        let mut last_seq = before.last_seq;
        loop {
            let query = sqlx::query(page_of!(
                "SELECT seq AS place, entity, length(body) AS bytes FROM incoming_log WHERE transfer = ?1 AND seq > ?2 ORDER BY seq LIMIT 0 + ?3",
                "SELECT incoming_log.*, seq AS position, incoming_log.entity AS eid
                 FROM page CROSS JOIN incoming_log ON transfer = ?1 AND seq = page.place",
                "SELECT *, entity AS eid, zeroblob(16) AS copy FROM incoming_entity
                 WHERE transfer = ?1 AND entity IN (SELECT entity FROM page)"
            ));
            let query = query.bind(transfer.0.to_vec()).bind(last_seq.cast_signed()).bind(PAGE_ROWS);
            let (page, entities) =
                self.rows_with_entities(&self.database().readers, query.bind(INCOMING_BYTES)).await?;
            let bytes: usize = page.iter().map(|stored| stored.row.body.len() + ROW_BYTES).sum();
            let is_last = page.len() < PAGE_ROWS as usize && bytes < INCOMING_BYTES as usize;
            for StoredRow { eid, row, checksum } in &page {
                let bad = |why| self.bad_row(row.seq, format!("of transfer {transfer}, {why}"));
                let entity = entities.get(eid).ok_or_else(|| bad("its entity did not come in"))?;
                let hash = RowHash::of(&row.fields(entity));
                if hash.checksum() != *checksum || row.seq != last_seq + 1 {
                    return Err(bad("it is not the one that was sent"));
                }
                sum.add(&hash);
                last_seq = row.seq;
            }
            if is_last {
                return Ok(ReadBack { last_seq, content: sum.into() });
            }
        }
    }

    /// The names of the keys of all entities that came in under `transfer`, erased ones too.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn incoming_keys(&self, transfer: TransferId) -> Result<Vec<[u8; 16]>, ReadError> {
        let query = sqlx::query("SELECT key_id FROM incoming_entity WHERE transfer = ?").bind(transfer.0.to_vec());
        let rows = query.fetch_all(&self.database().readers).await.map_err(|error| self.read_error(error))?;
        let name = |row: &SqliteRow| row.try_get::<Vec<u8>, _>(0).map_err(|error| self.read_error(error));
        let names: Vec<Vec<u8>> = rows.iter().map(name).collect::<Result<_, _>>()?;
        Ok(names.into_iter().filter_map(|name| name.try_into().ok()).collect())
    }

    /// All transfers of which something is kept, with their slots. Those that are not staged are of no use after a start.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn transfers(&self) -> Result<Vec<(Slot, TransferId)>, ReadError> {
        self.named("SELECT DISTINCT slot, transfer FROM incoming_entity UNION SELECT DISTINCT slot, transfer FROM incoming_log").await
    }

    /// Drops what came in under `transfer`, unless it is staged.
    ///
    /// # Errors
    /// Some of it was not dropped; do it again.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn drop_transfer(&self, slot: Slot, transfer: TransferId) -> Result<(), CommitError> {
        self.step_by_step(|done, on_settled| LogEntry::drop_transfer(slot, transfer, done, on_settled)).await
    }

    /// Hands steps in, one after the other, until one says that it was the last.
    async fn step_by_step(
        &self,
        step: impl Fn(Arc<Mutex<bool>>, crate::log_entry::OnSettled) -> LogEntry,
    ) -> Result<(), CommitError> {
        loop {
            let (told, settled) = oneshot::channel();
            let done = Arc::new(Mutex::new(false));
            self.hand_in(step(done.clone(), Box::new(move |result| drop(told.send(result)))));
            settled.await.map_err(|_| NotWritten::Stopping)??;
            if *done.lock() {
                return Ok(());
            }
        }
    }

    /// Transfers by which slots left, whose rows are not all stubs yet.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn departed(&self) -> Result<Vec<(Slot, TransferId)>, ReadError> {
        self.named("SELECT slot, transfer FROM departed").await
    }

    /// The entities that left with `transfer`.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn departed_entities(&self, slot: Slot, transfer: TransferId) -> Result<Vec<EntityRow>, ReadError> {
        self.entities_with(slot, transfer.into()).await
    }

    /// Turns what left with `transfer` into stubs, so that nothing of it is left to be read. Its keys are destroyed before.
    ///
    /// # Errors
    /// Some of it is not; do it again.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn collect_departed(&self, slot: Slot, transfer: TransferId) -> Result<(), CommitError> {
        self.step_by_step(|done, on_settled| {
            fail::fail_point!("handoff.rows.gc_batch");
            LogEntry::stub_departed(slot, transfer, done, on_settled)
        })
        .await
    }

    /// The entities of a slot as they are now.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn slot_entities(&self, slot: Slot) -> Result<Vec<EntityRow>, ReadError> {
        self.entities_with(slot, CopyId::LIVE).await
    }

    /// The positions of all rows of these entities, in the order of the log.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn positions_of(&self, entities: &[EntityRow]) -> Result<Vec<u64>, ReadError> {
        self.check_readable()?;
        // The tail first: what moves from it to the index meanwhile is found there.
        let mut positions: Vec<u64> = {
            let tail = self.tail().read();
            entities.iter().flat_map(|entity| tail.after(entity.eid, 0)).map(|row| row.position).collect()
        };
        for eids in entities.chunks(1024) {
            let eids = packed::numbers(eids.iter().map(|entity| entity.eid));
            let query = sqlx::query("SELECT position FROM log_index WHERE eid IN (SELECT value FROM json_each(?))");
            let rows = query.bind(eids).fetch_all(&self.database().readers).await;
            for row in rows.map_err(|error| self.read_error(error))? {
                let position: i64 = row.try_get(0).map_err(|error| self.read_error(error))?;
                positions.push(position.cast_unsigned());
            }
        }
        positions.sort_unstable();
        positions.dedup();
        Ok(positions)
    }

    /// The position of an entity's commit with this seq.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn position_of(&self, entity: &EntityRow, slot: Slot, seq: u64) -> Result<Option<u64>, ReadError> {
        let positions = self.positions_of(std::slice::from_ref(entity)).await?;
        let query = sqlx::query(
            "SELECT position FROM log WHERE position IN (SELECT value FROM json_each(?)) AND slot = ? AND seq = ?",
        );
        let query = query.bind(packed::numbers(positions)).bind(i64::from(slot.number())).bind(seq.cast_signed());
        let found = query.fetch_optional(self.feeders()).await;
        let position = |row: SqliteRow| row.try_get::<i64, _>(0).map(i64::cast_unsigned);
        found.and_then(|row| row.map(position).transpose()).map_err(|error| self.read_error(error))
    }

    /// By slot, the seq of its last commit at or before a position of the log. Looks at the whole log up to there.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn seqs_at(&self, position: u64) -> Result<Vec<(Slot, u64)>, ReadError> {
        let query = sqlx::query(
            "SELECT json_group_array(json_array(slot, seq))
             FROM (SELECT slot, max(seq) AS seq FROM log NOT INDEXED WHERE position <= ? GROUP BY slot)",
        );
        let seqs: Vec<(i64, u64)> = packed::rows(self.feeders(), query.bind(position.cast_signed()))
            .await
            .map_err(|error| self.read_error(error))?;
        Ok(seqs.into_iter().map(|(slot, seq)| (Slot::from_stored(slot), seq)).collect())
    }

    /// The place in its slot's log of the commit at a position.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn place_at(&self, position: u64) -> Result<Option<(Slot, u64)>, ReadError> {
        let query = sqlx::query("SELECT slot, seq FROM log WHERE position = ?").bind(position.cast_signed());
        let found = query.fetch_optional(self.feeders()).await.map_err(|error| self.read_error(error))?;
        let place = |row: SqliteRow| -> sqlx::Result<(Slot, u64)> {
            Ok((Slot::from_stored(row.try_get(0)?), row.try_get::<i64, _>(1)?.cast_unsigned()))
        };
        found.map(place).transpose().map_err(|error| self.read_error(error))
    }

    /// The rows at the first of these positions, in their order, until they make some 56 KiB: at least one.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn rows_at(&self, positions: &[u64]) -> Result<SlotRows, ReadError> {
        self.check_readable()?;
        let first = &positions[..positions.len().min(PAGE_ROWS as usize)];
        let query = sqlx::query(outgoing_of!(
            "SELECT position AS place, eid AS entity, length(body) AS bytes
             FROM json_each(?) AS wanted CROSS JOIN log ON log.position = wanted.value"
        ));
        let (found, entities) =
            self.rows_with_entities(self.feeders(), query.bind(packed::numbers(first)).bind(OUTGOING_BYTES)).await?;
        let there: Vec<u64> = found.iter().map(|stored| stored.row.position).collect();
        let is_whole = !there.is_empty() && first.starts_with(&there);
        match first.iter().find(|position| !there.contains(position)) {
            Some(missing) if !is_whole => Err(self.bad_row(*missing, "it was committed and is not there")),
            _ => self.outgoing(found, entities),
        }
    }

    /// The rows of a slot behind a position of the shard's log, until they make some 56 KiB; at least one, if there is one.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn rows_behind(&self, slot: Slot, after: u64) -> Result<SlotRows, ReadError> {
        self.check_readable()?;
        // Only what is known to be durable.
        let end = *self.end().borrow();
        let query = sqlx::query(outgoing_of!(
            "SELECT position AS place, eid AS entity, length(body) AS bytes FROM log NOT INDEXED
             WHERE position > ? AND position <= ? AND slot = ? ORDER BY position LIMIT 0 + ?"
        ));
        let query = query.bind(after.cast_signed()).bind(end.cast_signed()).bind(i64::from(slot.number()));
        let (found, entities) =
            self.rows_with_entities(self.feeders(), query.bind(PAGE_ROWS).bind(OUTGOING_BYTES)).await?;
        self.outgoing(found, entities)
    }

    async fn rows_with_entities(&self, readers: &SqlitePool, query: Bound) -> Result<Page, ReadError> {
        let answer = query.fetch_one(readers).await;
        let unpack = |answer: SqliteRow| Ok((log_row::unpack(&answer, 0)?, entity_row::unpack(&answer, 1)?));
        let (rows, entities) = answer.and_then(unpack).map_err(|error| self.read_error(error))?;
        Ok((rows, entities.into_iter().map(|entity| (entity.eid, entity)).collect()))
    }

    /// Those rows that were not given away. All are compared with their checksums.
    fn outgoing(&self, found: Vec<StoredRow>, mut entities: HashMap<i64, EntityRow>) -> Result<SlotRows, ReadError> {
        let mut rows = SlotRows::default();
        for StoredRow { eid, row, checksum } in found {
            let entity = entities.get(&eid).ok_or_else(|| self.bad_row(row.position, "its entity is not there"))?;
            if entity.is_departed() {
                continue;
            }
            if RowHash::of(&row.fields(entity)).checksum() != checksum {
                return Err(self.bad_row(row.position, "it does not match its checksum"));
            }
            rows.rows.push((eid, row));
        }
        entities.retain(|_, entity| !entity.is_departed());
        rows.entities = entities.into_values().collect();
        Ok(rows)
    }

    /// Makes an index of entities by their slots, unless there is one: a slot that moves is found by it. Of no use to a store that is alone.
    ///
    /// # Errors
    /// It was not made, or that is unknown; do it again.
    pub async fn index_slots(&self) -> Result<(), CommitError> {
        let (told, settled) = oneshot::channel();
        self.hand_in(LogEntry::index_slots(Box::new(move |result| drop(told.send(result)))));
        settled.await.map_err(|_| NotWritten::Stopping)?
    }

    async fn entities_with(&self, slot: Slot, copy: CopyId) -> Result<Vec<EntityRow>, ReadError> {
        self.check_readable()?;
        let mut entities: Vec<EntityRow> = Vec::new();
        loop {
            let after = entities.last().map_or(i64::MIN, |last| last.eid);
            let page = entities_of(&self.database().readers, slot, copy, after).await;
            let page = page.map_err(|error| self.read_error(error))?;
            let is_last = page.len() < ENTITIES_PAGE;
            entities.extend(page);
            if is_last {
                return Ok(entities);
            }
        }
    }

    async fn count_incoming(&self, transfer: TransferId) -> Result<i64, ReadError> {
        let query = sqlx::query("SELECT count(*) FROM incoming_entity WHERE transfer = ?").bind(transfer.0.to_vec());
        let row = query.fetch_one(&self.database().readers).await;
        row.and_then(|row| row.try_get(0)).map_err(|error| self.read_error(error))
    }

    async fn named(&self, statement: &'static str) -> Result<Vec<(Slot, TransferId)>, ReadError> {
        self.check_readable()?;
        let rows = sqlx::query(statement).fetch_all(&self.database().readers).await;
        let named = |row: &SqliteRow| -> sqlx::Result<Option<(Slot, TransferId)>> {
            let transfer: Vec<u8> = row.try_get(1)?;
            let slot = Slot::from_stored(row.try_get(0)?);
            Ok(transfer.try_into().ok().map(|transfer| (slot, TransferId(transfer))))
        };
        let found: sqlx::Result<Vec<_>> = rows.and_then(|rows| rows.iter().map(named).collect());
        Ok(found.map_err(|error| self.read_error(error))?.into_iter().flatten().collect())
    }
}

/// Writes rows that came in, into the open transaction; says why not, if they do not go on where those before end.
pub(crate) async fn receive(
    connection: &mut SqliteConnection,
    Incoming { slot, transfer, rows }: &Incoming,
) -> sqlx::Result<Result<(), NotWritten>> {
    let last = sqlx::query("SELECT coalesce(max(seq), 0) FROM incoming_log WHERE transfer = ?");
    let last: i64 = last.bind(transfer.0.to_vec()).fetch_one(&mut *connection).await?.try_get(0)?;
    let mut next_seq = last.cast_unsigned() + 1;
    let new: Vec<&(i64, LogRow)> = rows.rows.iter().filter(|(_, row)| row.seq >= next_seq).collect();
    if new.iter().zip(next_seq..).any(|((_, row), expected)| row.seq != expected || row.slot != *slot) {
        return Ok(Err(NotWritten::RowsMissing { slot: *slot, next_seq }));
    }
    let entities: Vec<IncomingEntity> =
        rows.entities.iter().map(|entity| IncomingEntity { transfer: *transfer, slot: *slot, entity }).collect();
    statements::insert_incoming_entities(connection, &entities).await?;
    let mut known: HashMap<i64, EntityRow> = rows.entities.iter().map(|entity| (entity.eid, entity.clone())).collect();
    let missing: HashSet<i64> = new.iter().map(|(eid, _)| *eid).filter(|eid| !known.contains_key(eid)).collect();
    for entity in incoming_among(connection, *transfer, missing).await? {
        known.insert(entity.eid, entity);
    }
    let mut incoming = Vec::with_capacity(new.len());
    for (eid, row) in new {
        let Some(entity) = known.get(eid) else {
            next_seq += incoming.len() as u64;
            return Ok(Err(NotWritten::RowsMissing { slot: *slot, next_seq }));
        };
        let checksum = RowHash::of(&row.fields(entity)).checksum();
        incoming.push(IncomingRow { transfer: *transfer, eid: *eid, row, checksum });
    }
    statements::insert_incoming_rows(connection, &incoming).await?;
    Ok(Ok(()))
}

/// Copies what came in under `transfer` to the tables of the shard and their indexes, in the open transaction: its entities get numbers from
/// `first_eid` on, its rows places from `first_position` on. Returns how many rows there were.
pub(crate) async fn take(
    connection: &mut SqliteConnection,
    transfer: TransferId,
    first_eid: i64,
    first_position: u64,
) -> sqlx::Result<u64> {
    let (mut next_eid, mut after) = (first_eid, i64::MIN);
    loop {
        let mut page = incoming_entities(connection, transfer, after).await?;
        let is_last = page.len() < ENTITIES_PAGE;
        for entity in &mut page {
            (after, entity.eid) = (entity.eid, next_eid);
            next_eid += 1;
        }
        statements::insert_entities(connection, &page.iter().collect::<Vec<_>>()).await?;
        if is_last {
            break;
        }
    }
    // Bodies stay inside SQLite: they were read back when they came, and are checked whenever they are read.
    let mut rows = 0;
    for insert in [TAKE_ROWS, TAKE_INDEX, TAKE_KEYS] {
        let insert = sqlx::query(insert).bind(transfer.0.to_vec()).bind(first_position.cast_signed()).bind(first_eid);
        let inserted = insert.execute(&mut *connection).await?.rows_affected();
        rows = rows.max(inserted);
    }
    Ok(rows)
}

/// Drops some of what came in, in the open transaction; says whether that was all. Emptied where it stands first, so that no page keeps a copy.
pub(crate) async fn drop_some(connection: &mut SqliteConnection, transfer: TransferId) -> sqlx::Result<bool> {
    let name = || transfer.0.to_vec();
    let some = "SELECT number FROM incoming_log WHERE transfer = ? ORDER BY seq LIMIT 0 + ?";
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "UPDATE incoming_log SET append_key = NULL, body = x'' WHERE number IN ({some})"
    )))
    .bind(name())
    .bind(DROPPED_ROWS)
    .execute(&mut *connection)
    .await?;
    let dropped = sqlx::query(sqlx::AssertSqlSafe(format!("DELETE FROM incoming_log WHERE number IN ({some})")));
    let dropped = dropped.bind(name()).bind(DROPPED_ROWS).execute(&mut *connection).await?.rows_affected();
    if dropped >= u64::from(DROPPED_ROWS) {
        return Ok(false);
    }
    sqlx::query("UPDATE incoming_entity SET sealed_id = x'' WHERE transfer = ?")
        .bind(name())
        .execute(&mut *connection)
        .await?;
    sqlx::query("DELETE FROM incoming_entity WHERE transfer = ?").bind(name()).execute(connection).await?;
    Ok(true)
}

/// Gives the live entities of a slot away, in the open transaction, and returns their numbers.
pub(crate) async fn depart(
    connection: &mut SqliteConnection,
    slot: Slot,
    transfer: TransferId,
    at_us: i64,
) -> sqlx::Result<Vec<i64>> {
    let mut numbers = Vec::new();
    loop {
        let left = entities_of(&mut *connection, slot, CopyId::LIVE, i64::MIN).await?;
        let is_last = left.len() < ENTITIES_PAGE;
        numbers.extend(left.iter().map(|entity| entity.eid));
        let left = left.into_iter().map(|entity| entity.departed(transfer, at_us));
        let checksums: Vec<String> = left.map(|entity| format!("[{},{}]", entity.eid, entity.checksum())).collect();
        sqlx::query(
            "UPDATE entity SET copy = ?, sealed_id = x'', erased_at = coalesce(erased_at, ?), checksum = departed.value ->> 1
             FROM json_each(?) AS departed WHERE entity.eid = departed.value ->> 0",
        )
        .bind(CopyId::from(transfer).0.to_vec())
        .bind(at_us)
        .bind(packed::numbers(checksums))
        .execute(&mut *connection)
        .await?;
        if is_last {
            break;
        }
    }
    if numbers.is_empty() {
        // There is nothing to collect.
        return Ok(numbers);
    }
    snapshots::clear_all(connection, &numbers).await?;
    sqlx::query("INSERT OR IGNORE INTO departed(transfer, slot) VALUES (?, ?)")
        .bind(transfer.0.to_vec())
        .bind(i64::from(slot.number()))
        .execute(connection)
        .await?;
    Ok(numbers)
}

/// Turns some of what left with `transfer` into stubs, where they stand, in the open transaction; says whether those were all. It is in no digest
/// any more, and all of it is in the index: the slot left with the marks.
pub(crate) async fn stub_some(
    connection: &mut SqliteConnection,
    slot: Slot,
    transfer: TransferId,
) -> sqlx::Result<bool> {
    let copy = CopyId::from(transfer).0.to_vec();
    let rows = sqlx::query(
        "SELECT json_group_array(json_array(position, seq, version, count, epoch, hex(id_hash), hex(key_id))) FROM (
             SELECT log.position, log.seq, log.version, log.count, log.epoch, id_hash, key_id
             FROM entity CROSS JOIN log_index USING (eid) CROSS JOIN log ON log.position = log_index.position
             WHERE entity.slot = ? AND entity.copy = ? AND length(log.body) > 0 LIMIT 0 + ?)",
    );
    let rows = rows.bind(i64::from(slot.number())).bind(copy).bind(PAGE_ROWS);
    let rows: Vec<(i64, i64, i64, u32, i64, Hex, Hex)> = packed::rows(&mut *connection, rows).await?;
    let is_last = rows.len() < PAGE_ROWS as usize;
    let mut stubs = Vec::with_capacity(rows.len());
    for (position, seq, version, count, epoch, id_hash, key_id) in rows {
        let damaged = |_| packed::damaged("the row of an entity that left is damaged");
        let hash = RowHash::of(&RowFields {
            slot,
            seq: seq.cast_unsigned(),
            id_hash: &id_hash.0.try_into().map_err(damaged)?,
            key_id: &key_id.0.try_into().map_err(damaged)?,
            version: version.cast_unsigned(),
            count,
            at_us: 0,
            epoch: Epoch::from_i64(epoch),
            append_key: None,
            body: &[],
        });
        stubs.push(Stub { position: position.cast_unsigned(), checksum: hash.checksum() });
    }
    let positions = stubs.iter().map(|stub| stub.position);
    sqlx::query(FORGET_KEYS).bind(packed::numbers(positions)).execute(&mut *connection).await?;
    erase::empty(connection, stubs.into_iter()).await?;
    if !is_last {
        return Ok(false);
    }
    let done = sqlx::query("DELETE FROM departed WHERE transfer = ?").bind(transfer.0.to_vec());
    done.execute(connection).await.map(|_| true)
}

/// Rows, and their entities by their numbers.
type Page = (Vec<StoredRow>, HashMap<i64, EntityRow>);

/// Those of these entities that came in.
async fn incoming_among(
    connection: &mut SqliteConnection,
    transfer: TransferId,
    eids: HashSet<i64>,
) -> sqlx::Result<Vec<EntityRow>> {
    if eids.is_empty() {
        return Ok(Vec::new());
    }
    let query = sqlx::query(packed_entities!(
        "SELECT *, entity AS eid, zeroblob(16) AS copy FROM incoming_entity
         WHERE transfer = ? AND entity IN (SELECT value FROM json_each(?))"
    ));
    entity_row::unpack(&query.bind(transfer.0.to_vec()).bind(packed::numbers(eids)).fetch_one(connection).await?, 0)
}

/// Some entities that came in, in the order of the numbers that they have at the giver, from the one behind `after` on.
async fn incoming_entities(
    connection: &mut SqliteConnection,
    transfer: TransferId,
    after: i64,
) -> sqlx::Result<Vec<EntityRow>> {
    let query = sqlx::query(packed_entities!(
        "SELECT *, entity AS eid, zeroblob(16) AS copy FROM incoming_entity
         WHERE transfer = ? AND entity > ? ORDER BY entity LIMIT 0 + ?"
    ));
    entity_row::unpack(
        &query.bind(transfer.0.to_vec()).bind(after).bind(ENTITIES_PAGE as i64).fetch_one(connection).await?,
        0,
    )
}

/// Some entities of a slot, in the order of their numbers, from the one behind `after` on.
async fn entities_of(
    executor: impl SqliteExecutor<'_>,
    slot: Slot,
    copy: CopyId,
    after: i64,
) -> sqlx::Result<Vec<EntityRow>> {
    let query = sqlx::query(packed_entities!(
        "SELECT * FROM entity WHERE slot = ? AND copy = ? AND eid > ? ORDER BY eid LIMIT 0 + ?"
    ));
    let query = query.bind(i64::from(slot.number())).bind(copy.0.to_vec()).bind(after).bind(ENTITIES_PAGE as i64);
    entity_row::unpack(&query.fetch_one(executor).await?, 0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        Activation, Commit, DiskId, LogReader, SnapshotRow, Staged,
        test_shard::{TestShard, commit},
        verify::CommitCheck,
    };

    const SLOT: u64 = 6;
    const GIVER: DiskId = DiskId([1; 16]);
    const RECEIVER: DiskId = DiskId([2; 16]);

    struct Trusting;

    impl CommitCheck for Trusting {
        async fn check(&mut self, _: &EntityRow, _: &LogRow) -> Result<(), String> {
            Ok(())
        }
    }

    fn slot() -> Slot {
        Slot::new(SLOT)
    }

    fn next(epoch: Epoch) -> Epoch {
        Epoch { counter: epoch.counter + 1, ..epoch }
    }

    async fn assert_clean(shard: &TestShard) {
        let report = shard.verify(&mut Trusting).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
    }

    /// Two entities in the slot, one of them erased, among others; in the index and in the tail.
    async fn giver() -> TestShard {
        let mut shard = TestShard::new().await;
        let [one, erased, other] = [(1, SLOT), (2, SLOT), (3, 8)].map(|(name, slot)| shard.entity(name, slot));
        shard.append(&one, 1..=300).await;
        shard.append(&erased, 1..=5).await;
        shard.append(&other, 1..=5).await;
        shard.reopen().await;
        shard.append(&one, 301..=310).await;
        shard.append(&other, 6..=9).await;
        shard.erase(&erased, 9).await.unwrap();
        shard.append(&one, 311..=320).await;
        shard
    }

    /// Copies what the giver has, as a giver does: by its index first, and what came meanwhile from the log then.
    async fn copy(giver: &TestShard, receiver: &TestShard, transfer: TransferId) -> ReadBack {
        let entities = giver.slot_entities(slot()).await.unwrap();
        let positions = giver.positions_of(&entities).await.unwrap();
        let (mut done, mut read) = (0, ReadBack::default());
        while done < positions.len() {
            let rows = giver.rows_at(&positions[done..]).await.unwrap();
            done += rows.rows.len();
            receiver.receive(slot(), transfer, rows).await.unwrap();
            read = receiver.read_back(transfer, read).await.unwrap();
        }
        let mut after = positions.last().copied().unwrap_or(0);
        loop {
            let rows = giver.rows_behind(slot(), after).await.unwrap();
            let Some((_, last)) = rows.rows.last() else { break };
            after = last.position;
            receiver.receive(slot(), transfer, rows).await.unwrap();
        }
        read = receiver.read_back(transfer, read).await.unwrap();
        assert_eq!(read, receiver.read_back(transfer, ReadBack::default()).await.unwrap());
        read
    }

    /// The whole way, by the book. Returns the epoch of the receiver.
    async fn hand_over(giver: &TestShard, receiver: &TestShard, name: u8) -> Epoch {
        let transfer = TransferId([name; 16]);
        let read = copy(giver, receiver, transfer).await;
        let from = giver.slot(slot()).unwrap().owned().unwrap();
        let (epoch, sealed) = (next(from), giver.slot(slot()).unwrap().content);
        assert_eq!(read.content, sealed);
        let staged = Staged { transfer, epoch, from: GIVER, content: sealed };
        receiver.change_slot(slot(), Txn::Stage(staged), 9).await.unwrap();
        let release = Txn::Release { from, epoch, to: RECEIVER, transfer, sealed: Some(sealed) };
        giver.change_slot(slot(), release, 9).await.unwrap();
        receiver.change_slot(slot(), Txn::Take { transfer, epoch }, 9).await.unwrap();
        receiver.drop_transfer(slot(), transfer).await.unwrap();
        giver.change_slot(slot(), Txn::ConfirmTaken { transfer }, 9).await.unwrap();
        epoch
    }

    fn is_refused(result: Result<(), CommitError>) -> bool {
        matches!(result, Err(CommitError::NotWritten(NotWritten::TokenChanged { .. } | NotWritten::NotOwner { .. })))
    }

    async fn versions(shard: &TestShard, name: u8) -> Vec<u64> {
        let entity = shard.find_entity(CopyId::LIVE, crate::EntityHash([name; 16])).await.unwrap().unwrap();
        let rows = shard.read_log(&entity, 0, 1000).await.unwrap();
        rows.iter().map(|row| row.version).collect()
    }

    /// And back again, with what was written there, to where stubs of it still are.
    #[tokio::test]
    async fn a_slot_moves_with_all_it_has_and_comes_back() {
        let (mut giver, mut receiver) = (giver().await, TestShard::without_slots().await);
        giver.index_slots().await.unwrap();
        let before = giver.slot(slot()).unwrap().content;
        let epoch = hand_over(&giver, &receiver, 7).await;
        for reopened in [false, true] {
            if reopened {
                giver.crash().await;
                receiver.crash().await;
            }
            let record = receiver.slot(slot()).unwrap();
            assert_eq!((record.token, record.content, record.staged), (Token::Owned(epoch), before, None));
            let record = giver.slot(slot()).unwrap();
            assert_eq!((record.content, record.floor), (Content::default(), epoch));
            assert!(matches!(record.token, Token::Released { is_taken: true, .. }));
            assert_eq!(versions(&receiver, 1).await, (1..=320).collect::<Vec<_>>());
            assert!(giver.slot_entities(slot()).await.unwrap().is_empty());
            assert_clean(&giver).await;
            assert_clean(&receiver).await;
        }
        assert!(receiver.transfers().await.unwrap().is_empty());
        // Keys of requests came along.
        let entity =
            receiver.find_entity(CopyId::LIVE, crate::EntityHash([1; 16])).await.unwrap().map(Arc::new).unwrap();
        let found = receiver.find_append(&entity, &7u64.to_le_bytes()).await.unwrap();
        assert_eq!(found.map(|row| row.version), Some(7));

        // What is left at the giver becomes stubs, after a crash in between as well.
        let left = giver.departed().await.unwrap();
        assert_eq!(left, [(slot(), TransferId([7; 16]))]);
        for _ in 0..2 {
            giver.collect_departed(slot(), left[0].1).await.unwrap();
            assert_clean(&giver).await;
        }
        assert!(giver.departed().await.unwrap().is_empty());

        receiver.append(&entity, 321..=330).await;
        hand_over(&receiver, &giver, 8).await;
        assert_eq!(versions(&giver, 1).await, (1..=330).collect::<Vec<_>>());
        let entity = giver.find_entity(CopyId::LIVE, crate::EntityHash([1; 16])).await.unwrap().map(Arc::new).unwrap();
        giver.append(&entity, 331..=332).await;
        for shard in [&mut giver, &mut receiver] {
            assert_clean(shard).await;
            shard.reopen().await;
            assert_clean(shard).await;
        }
        giver.stop().await;
        receiver.stop().await;
    }

    /// Does something else once, while a shard is looked at.
    struct Meanwhile<F>(Option<F>);

    impl<F: Future<Output = ()> + Send> CommitCheck for Meanwhile<F> {
        async fn check(&mut self, _: &EntityRow, _: &LogRow) -> Result<(), String> {
            if let Some(act) = self.0.take() {
                act.await;
            }
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_slot_that_leaves_is_sound_at_every_step_and_beside_a_look_at_it() {
        let (giver, receiver) = (giver().await, TestShard::without_slots().await);
        let transfer = TransferId([7; 16]);
        let report = giver.verify(&mut Meanwhile(Some(async { _ = hand_over(&giver, &receiver, 7).await }))).await;
        let report = report.unwrap();
        assert!(report.is_clean() && report.changed_slots == [slot()], "{report:?}");

        // One step of two.
        let (told, settled) = oneshot::channel();
        let told = Box::new(move |result| drop(told.send(result)));
        giver.hand_in(LogEntry::stub_departed(slot(), transfer, Arc::default(), told));
        settled.await.unwrap().unwrap();
        let report = giver.verify(&mut Trusting).await.unwrap();
        assert!(report.is_clean() && report.stubs == u64::from(PAGE_ROWS) + 5, "{report:?}");

        let collect = async { giver.collect_departed(slot(), transfer).await.unwrap() };
        let report = giver.verify(&mut Meanwhile(Some(collect))).await.unwrap();
        assert!(report.is_clean() && report.changed_slots == [slot()], "{report:?}");
        giver.stop().await;
        receiver.stop().await;
    }

    /// Whoever follows the log of the new owner meets all of the slot, in its order, at the end of what was there.
    #[tokio::test]
    async fn a_slot_that_came_in_is_at_the_end_of_the_log() {
        let (giver, receiver) = (giver().await, TestShard::without_slots().await);
        hand_over(&giver, &receiver, 7).await;
        let page = LogReader::new((*receiver).clone()).page(0, *receiver.end().borrow(), |_| true).await.unwrap();
        let seqs: Vec<u64> = page.rows.iter().map(|read| read.row.seq).collect();
        assert_eq!((seqs, page.bad), ((1..=325).collect(), None));
        giver.stop().await;
        receiver.stop().await;
    }

    #[tokio::test]
    async fn an_actor_of_before_the_move_writes_nothing() {
        let (giver, receiver) = (giver().await, TestShard::without_slots().await);
        let entity = giver.slot_entities(slot()).await.unwrap().remove(0);
        let entity = Arc::new(entity);
        let activation = Arc::new(Activation::at(320));
        hand_over(&giver, &receiver, 7).await;
        assert!(is_refused(giver.submit(&activation, commit(&entity, 321)).await.unwrap()));
        // Nor after the slot has come back.
        hand_over(&receiver, &giver, 8).await;
        let late = giver.submit(&Arc::new(Activation::at(320)), commit(&entity, 321)).await.unwrap();
        assert_eq!(late, Err(NotWritten::Erased.into()));
        let snapshot = SnapshotRow { eid: entity.eid, version: 320, schema: 1, body: vec![1] };
        giver.save(snapshot).await.unwrap().unwrap();
        assert_eq!(giver.find_snapshot(entity.eid).await.unwrap(), None);
        assert_clean(&giver).await;
        giver.stop().await;
        receiver.stop().await;
    }

    /// In one group with the append: whichever comes first decides.
    #[tokio::test]
    async fn a_slot_is_not_released_if_something_was_appended_after_the_seal() {
        let (giver, receiver) = (giver().await, TestShard::without_slots().await);
        let transfer = TransferId([7; 16]);
        copy(&giver, &receiver, transfer).await;
        let record = giver.slot(slot()).unwrap();
        let from = record.owned().unwrap();
        let release = Txn::Release { from, epoch: next(from), to: RECEIVER, transfer, sealed: Some(record.content) };
        let entity = Arc::new(giver.slot_entities(slot()).await.unwrap().remove(0));
        let late = giver.submit(&Arc::new(Activation::at(320)), commit(&entity, 321));
        assert!(is_refused(giver.change_slot(slot(), release, 9).await));
        late.await.unwrap().unwrap();
        assert_eq!(giver.slot(slot()).unwrap().owned(), Some(from));

        let sealed = Some(giver.slot(slot()).unwrap().content);
        let release = Txn::Release { from, epoch: next(from), to: RECEIVER, transfer, sealed };
        let (released, late) = tokio::join!(giver.change_slot(slot(), release, 9), async {
            giver.submit(&Arc::new(Activation::at(321)), commit(&entity, 322)).await.unwrap()
        });
        released.unwrap();
        assert_eq!(late, Err(NotWritten::NotOwner { slot: slot() }.into()));
        // And once only.
        assert!(is_refused(giver.change_slot(slot(), release, 9).await));
        giver.stop().await;
        receiver.stop().await;
    }

    #[tokio::test]
    async fn rows_come_in_their_order_and_once() {
        let (giver, receiver) = (giver().await, TestShard::without_slots().await);
        let transfer = TransferId([7; 16]);
        let rows = |from: u64| {
            let giver = &giver;
            async move { giver.rows_behind(slot(), from).await.unwrap() }
        };
        let all = rows(0).await;
        let part = |from: usize, to: usize| SlotRows { rows: all.rows[from..to].to_vec(), ..all.clone() };
        let gap = receiver.receive(slot(), transfer, part(10, 20)).await;
        assert_eq!(gap, Err(NotWritten::RowsMissing { slot: slot(), next_seq: 1 }.into()));
        receiver.receive(slot(), transfer, part(0, 10)).await.unwrap();
        // Again, and overlapping.
        receiver.receive(slot(), transfer, part(0, 10)).await.unwrap();
        receiver.receive(slot(), transfer, part(5, 15)).await.unwrap();
        let unknown = SlotRows { entities: Vec::new(), rows: vec![(999, all.rows[15].1.clone())] };
        let refused = receiver.receive(slot(), transfer, unknown).await;
        assert_eq!(refused, Err(NotWritten::RowsMissing { slot: slot(), next_seq: 16 }.into()));
        let read = receiver.read_back(transfer, ReadBack::default()).await.unwrap();
        assert_eq!((read.last_seq, read.content.len), (15, 15));
        // The owner takes none.
        assert!(is_refused(giver.receive(slot(), transfer, part(0, 1)).await));
        giver.stop().await;
        receiver.stop().await;
    }

    #[tokio::test]
    async fn what_is_staged_neither_changes_nor_goes_before_it_is_dropped() {
        let (giver, mut receiver) = (giver().await, TestShard::without_slots().await);
        let transfer = TransferId([7; 16]);
        let read = copy(&giver, &receiver, transfer).await;
        let epoch = next(giver.slot(slot()).unwrap().owned().unwrap());
        let staged = Staged { transfer, epoch, from: GIVER, content: read.content };
        receiver.change_slot(slot(), Txn::Stage(staged), 9).await.unwrap();
        receiver.crash().await;
        assert_eq!(receiver.slot(slot()).unwrap().staged, Some(staged));
        let rows = giver.rows_behind(slot(), 0).await.unwrap();
        assert!(is_refused(receiver.receive(slot(), transfer, rows.clone()).await));
        assert!(is_refused(receiver.drop_transfer(slot(), transfer).await));
        assert_eq!(receiver.read_back(transfer, ReadBack::default()).await.unwrap(), read);

        // Another attempt beside it.
        let other = TransferId([8; 16]);
        receiver.receive(slot(), other, rows).await.unwrap();
        assert_eq!(receiver.transfers().await.unwrap().len(), 2);
        receiver.change_slot(slot(), Txn::DropStaged { transfer }, 9).await.unwrap();
        for transfer in [transfer, other] {
            receiver.drop_transfer(slot(), transfer).await.unwrap();
            assert!(is_refused(receiver.change_slot(slot(), Txn::Take { transfer, epoch }, 9).await));
        }
        assert!(receiver.transfers().await.unwrap().is_empty());
        assert_clean(&receiver).await;
        giver.stop().await;
        receiver.stop().await;
    }

    /// A body that was altered on the receiver's disk is never taken for the slot.
    #[tokio::test]
    async fn what_came_in_is_read_back_from_the_disk() {
        let (giver, mut receiver) = (giver().await, TestShard::without_slots().await);
        let transfer = TransferId([7; 16]);
        copy(&giver, &receiver, transfer).await;
        receiver.tamper("UPDATE incoming_log SET body = x'00' WHERE seq = 5").await;
        let read = receiver.read_back(transfer, ReadBack::default()).await;
        assert!(read.is_err_and(|error| error.is_damage()));
        giver.stop().await;
        receiver.stop().await;
    }

    #[tokio::test]
    async fn the_own_slot_never_moves_and_is_always_there() {
        let shard = TestShard::without_slots().await;
        let entity = shard.entity(9, 0);
        let entity = Arc::new(EntityRow { slot: Slot::OWN, ..(*entity).clone() });
        shard.append(&entity, 1..=3).await;
        let record = shard.slot(Slot::OWN).unwrap();
        let (from, transfer) = (record.owned().unwrap(), TransferId([1; 16]));
        let release = Txn::Release { from, epoch: next(from), to: RECEIVER, transfer, sealed: None };
        assert!(is_refused(shard.change_slot(Slot::OWN, release, 9).await));
        let stranger = shard.entity(8, 0);
        let refused = shard.submit(&Arc::new(Activation::at(0)), commit(&stranger, 1)).await.unwrap();
        assert_eq!(refused, Err(NotWritten::NotOwner { slot: Slot::new(0) }.into()));
        assert_clean(&shard).await;
        shard.stop().await;
    }

    /// Large commits go out and come in page by page.
    #[tokio::test]
    async fn a_slot_of_large_commits_moves() {
        let (giver, receiver) = (TestShard::new().await, TestShard::without_slots().await);
        let entity = giver.entity(1, SLOT);
        let activation = Arc::new(Activation::at(0));
        for version in 1..=5 {
            let body = vec![version as u8; 1_500_000];
            giver.submit(&activation, Commit { body, ..commit(&entity, version) }).await.unwrap().unwrap();
        }
        hand_over(&giver, &receiver, 7).await;
        assert_eq!(versions(&receiver, 1).await, [1, 2, 3]);
        assert_clean(&receiver).await;
        giver.stop().await;
        receiver.stop().await;
    }
}
