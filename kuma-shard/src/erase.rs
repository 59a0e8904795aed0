//! Erasing what a shard holds of an entity: its commits become stubs, and its id, its snapshot and its append keys go.
//!
//! Invariants:
//! - From the first step on the entity is erased: the writer refuses its commits and its snapshots, whoever still has them.
//! - A stub keeps what the logs of slot and shard need (place, version, number of events, epoch). Its hash takes the place of the row's
//!   hash in the digests, in the same transaction.
//! - A step is bounded in rows and bytes, so that the commits of others wait no longer than for a large group of their own. The
//!   work left is what is not a stub yet: after a crash it is simply begun again.
//! - Nothing moves: rows shrink where they stand, and SQLite zeroes what they leave behind (see `schema.rs`).

use std::sync::Arc;

use fail::fail_point;
use parking_lot::Mutex;
use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};
use tokio::sync::oneshot;

use crate::{
    CommitError, EntityRow, LogRow, NotWritten, PAGE_BYTES, ReadError, Shard, log_entry::LogEntry, log_row, reads,
    row_hash::RowHash, snapshots,
};

/// Commits that one step turns into stubs; fewer if they are large ([`PAGE_BYTES`]).
const STEP_ROWS: u32 = 64;
/// Erasures that share a transaction.
pub(crate) const STEPS_IN_GROUP: usize = 64;

/// What was erased.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErasedRows {
    /// Commits that became stubs.
    pub commits: u64,
    /// Their events.
    pub events: u64,
    /// Sealed bytes that went, of commits, snapshot and id.
    pub bytes: u64,
    /// Append keys that were forgotten.
    pub append_keys: u64,
    /// Snapshots that were deleted: 0 or 1.
    pub snapshots: u64,
    /// Commits that were damaged before. What the digest of their slot should have been without them is not known, so that
    /// verification goes on to report the slot.
    pub damaged: u64,
}

impl ErasedRows {
    fn add(&mut self, more: &ErasedRows) {
        self.commits += more.commits;
        self.events += more.events;
        self.bytes += more.bytes;
        self.append_keys += more.append_keys;
        self.snapshots += more.snapshots;
        self.damaged += more.damaged;
    }
}

/// One step, as it is handed to the writer.
#[derive(Clone)]
pub(crate) struct EraseStep {
    /// The entity, as its row is to be.
    pub(crate) entity: Arc<EntityRow>,
    /// Commits up to this version are stubs.
    pub(crate) after: u64,
    pub(crate) done: Arc<Mutex<StepDone>>,
}

/// What a step did, valid once it is settled.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepDone {
    pub(crate) rows: ErasedRows,
    /// Where the next one begins; none if all is done.
    pub(crate) next: Option<u64>,
}

/// A row that becomes a stub.
pub(crate) struct Stubbed {
    pub(crate) row: LogRow,
    pub(crate) before: RowHash,
    pub(crate) after: RowHash,
}

/// Where a stub is to stand, and its checksum.
#[derive(Clone, Copy)]
pub(crate) struct Stub {
    pub(crate) position: u64,
    pub(crate) checksum: i64,
}

impl Stubbed {
    pub(crate) fn stub(&self) -> Stub {
        Stub { position: self.row.position, checksum: self.after.checksum() }
    }
}

impl Shard {
    /// Erases what this shard holds of `entity`, one of its rows: what is submitted for it from now on is refused. What it holds of others is
    /// not touched.
    ///
    /// To be called when nothing of the entity is on its way; it can be called again after a failure or a crash and does what is left.
    /// The bytes are gone from the file itself after [`Shard::truncate_log`].
    ///
    /// # Errors
    /// A step was not written, or that is unknown; call it again.
    /// # Cancel safety
    /// Cancel safe: what is left is done by the next call.
    pub async fn erase(&self, entity: &EntityRow, at_us: i64) -> Result<ErasedRows, CommitError> {
        let erased = Arc::new(entity.erased(at_us));
        let mut rows = ErasedRows { bytes: entity.sealed_id.len() as u64, ..ErasedRows::default() };
        let mut after = Some(0);
        while let Some(from) = after {
            let step = EraseStep { entity: erased.clone(), after: from, done: Arc::default() };
            let done = step.done.clone();
            let (told, settled) = oneshot::channel();
            // A caller that is gone does not want to know.
            self.hand_in(LogEntry::erase(step, Box::new(move |result| drop(told.send(result)))));
            settled.await.map_err(|_| NotWritten::Stopping)??;
            let done = *done.lock();
            rows.add(&done.rows);
            after = done.next;
            fail_point!("erase.step");
        }
        Ok(rows)
    }

    /// The first pages of the tables that sealed bytes are in, for [`crate::Residue`].
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn sealed_roots(&self) -> Result<Vec<u32>, ReadError> {
        self.database().roots(&["log", "entity", "snapshot"]).await
    }

    /// How many stubs an erased entity has, and how many events they stand for.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn stubs(&self, entity: &EntityRow) -> Result<(u64, u64), ReadError> {
        self.check_readable()?;
        let row = sqlx::query(
            "SELECT count(*), coalesce(sum(log.count), 0) FROM log_index
             CROSS JOIN log ON log.position = log_index.position WHERE log_index.eid = ? AND log.body = x''",
        )
        .bind(entity.eid)
        .fetch_one(&self.database().readers)
        .await;
        let number = |row: &SqliteRow, index| row.try_get::<i64, _>(index).map(i64::cast_unsigned);
        let counted = row.and_then(|row| Ok((number(&row, 0)?, number(&row, 1)?)));
        counted.map_err(|error| self.read_error(error))
    }

    /// Every life of the entity with this hash, newest first.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn lives(&self, copy: crate::CopyId, id_hash: crate::EntityHash) -> Result<Vec<EntityRow>, ReadError> {
        self.check_readable()?;
        let rows = sqlx::query("SELECT * FROM entity WHERE copy = ? AND id_hash = ? ORDER BY life DESC")
            .bind(copy.0.to_vec())
            .bind(id_hash.0.to_vec())
            .fetch_all(&self.database().readers)
            .await
            .map_err(|error| self.read_error(error))?;
        let entity = |row| EntityRow::from_row(row).map_err(|error| self.read_error(error));
        let sound = |entity: Option<_>| {
            entity.ok_or_else(|| self.bad_row(0, "the row of an entity does not match its checksum"))
        };
        rows.iter().map(|row| entity(row).and_then(sound)).collect()
    }
}

/// Takes id and snapshot of an entity away, in the open transaction.
pub(crate) async fn begin(connection: &mut SqliteConnection, entity: &EntityRow) -> sqlx::Result<ErasedRows> {
    sqlx::query("UPDATE entity SET sealed_id = x'', erased_at = ?, checksum = ? WHERE eid = ?")
        .bind(entity.erased_at_us)
        .bind(entity.checksum())
        .bind(entity.eid)
        .execute(&mut *connection)
        .await?;
    let row = sqlx::query("SELECT length(body) FROM snapshot WHERE eid = ?").bind(entity.eid);
    let snapshot: Option<i64> = row.fetch_optional(&mut *connection).await?.map(|row| row.try_get(0)).transpose()?;
    let snapshots = match snapshot {
        Some(_) => u64::from(snapshots::clear(connection, entity.eid).await?),
        None => 0,
    };
    Ok(ErasedRows { snapshots, bytes: snapshot.unwrap_or(0).unsigned_abs(), ..ErasedRows::default() })
}

/// The commits of an entity behind the version `after` that are no stubs yet, as the open transaction sees them, and where the next
/// ones begin.
pub(crate) async fn rows(
    connection: &mut SqliteConnection,
    entity: &EntityRow,
    after: u64,
) -> sqlx::Result<(Vec<Stubbed>, u64, Option<u64>)> {
    let query = sqlx::query(reads::AFTER).bind(entity.eid).bind(after.cast_signed()).bind(STEP_ROWS);
    let found = query.fetch_all(connection).await?;
    let (mut stubbed, mut damaged, mut last, mut bytes) = (Vec::new(), 0, None, 0);
    for row in &found {
        let (row, before, checksum) = log_row::parse(row, entity)?;
        last = Some(row.version);
        bytes += row.body.len();
        if row.is_stub() {
            continue;
        }
        damaged += u64::from(before.checksum() != checksum);
        let after = RowHash::of(&row.stub().fields(entity));
        stubbed.push(Stubbed { row, before, after });
    }
    let is_full = found.len() == STEP_ROWS as usize || bytes >= PAGE_BYTES;
    Ok((stubbed, damaged, last.filter(|_| is_full)))
}

/// Turns rows into stubs, and forgets their append keys.
pub(crate) async fn stub(connection: &mut SqliteConnection, entity: &EntityRow, rows: &[Stubbed]) -> sqlx::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    empty(connection, rows.iter().map(Stubbed::stub)).await?;
    let keys: Vec<String> = rows
        .iter()
        .filter_map(|row| row.row.append_key.as_deref())
        .map(|key| format!("\"{}\"", hex::encode(key)))
        .collect();
    if !keys.is_empty() {
        sqlx::query("DELETE FROM key_index WHERE eid = ? AND append_key IN (SELECT unhex(value) FROM json_each(?))")
            .bind(entity.eid)
            .bind(format!("[{}]", keys.join(",")))
            .execute(connection)
            .await?;
    }
    Ok(())
}

/// Turns rows into stubs where they stand.
pub(crate) async fn empty(connection: &mut SqliteConnection, rows: impl Iterator<Item = Stub>) -> sqlx::Result<()> {
    let stubs: Vec<String> = rows.map(|stub| format!("[{},{}]", stub.position, stub.checksum)).collect();
    sqlx::query(
        "UPDATE log SET at = 0, append_key = NULL, body = x'', checksum = stub.value ->> 1
         FROM json_each(?) AS stub WHERE log.position = stub.value ->> 0",
    )
    .bind(format!("[{}]", stubs.join(",")))
    .execute(connection)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, sync::Arc};

    use super::*;
    use crate::{
        Activation, Commit, CopyId, Digest, Slot, SnapshotRow,
        test_shard::{TestShard, commit},
        verify::CommitCheck,
    };

    struct Trusting;

    impl CommitCheck for Trusting {
        async fn check(&mut self, _: &EntityRow, _: &LogRow) -> Result<(), String> {
            Ok(())
        }
    }

    /// A commit that is told from all others by its bytes, some of them larger than a page.
    fn marked(entity: &Arc<EntityRow>, version: u64) -> Commit {
        let mark = format!("<{} {version}>", entity.key_id[0]);
        let body = mark.repeat(if version.is_multiple_of(5) { 1200 } else { 7 }).into_bytes();
        Commit { body, ..commit(entity, version) }
    }

    fn snapshot(entity: &EntityRow, version: u64) -> SnapshotRow {
        let body = format!("<{} s{version}>", entity.key_id[0]).repeat(20 + 30 * version as usize).into_bytes();
        SnapshotRow { eid: entity.eid, version, schema: 1, body }
    }

    /// Where in the files of a shard bytes are found that are the entity's.
    fn found(shard: &TestShard, entity: &EntityRow) -> Vec<String> {
        let needle = format!("<{} ", entity.key_id[0]).into_bytes();
        let files = std::fs::read_dir(&shard.options.directory).unwrap().map(|file| file.unwrap().path());
        let hits = |path: &PathBuf| std::fs::read(path).unwrap().windows(needle.len()).any(|bytes| bytes == needle);
        files.filter(hits).map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    async fn slot(shard: &TestShard, number: u64) -> (u64, Digest) {
        let audit = shard.database().audit().await.unwrap();
        let sum = audit.slots[&Slot::new(number)];
        (sum.len, sum.digest)
    }

    /// Two entities whose commits and snapshots are mixed in every page, in the index and in the tail.
    async fn two(shard: &mut TestShard) -> [Arc<EntityRow>; 2] {
        let entities = [shard.entity(1, 0), shard.entity(2, 2)];
        for from in [1, 31] {
            let activations = [0, 1].map(|_| Arc::new(Activation::at(from - 1)));
            for version in from..from + 30 {
                for (entity, activation) in entities.iter().zip(&activations) {
                    shard.submit(activation, marked(entity, version)).await.unwrap().unwrap();
                    if version % 4 == 0 {
                        shard.save(snapshot(entity, version)).await.unwrap().unwrap();
                    }
                }
            }
            if from == 1 {
                shard.reopen().await;
            }
        }
        entities
    }

    #[tokio::test]
    async fn an_erased_entity_leaves_stubs_and_its_neighbour_is_untouched() {
        let mut shard = TestShard::new().await;
        let [erased, neighbour] = two(&mut shard).await;
        let (before, kept) = (slot(&shard, 0).await, slot(&shard, 2).await);
        let neighbours = shard.read_log(&neighbour, 0, 999).await.unwrap();
        assert!(!found(&shard, &erased).is_empty());

        let rows = shard.erase(&erased, 77).await.unwrap();
        assert_eq!((rows.commits, rows.events, rows.append_keys, rows.snapshots, rows.damaged), (60, 60, 60, 1, 0));
        shard.truncate_log().await.unwrap();
        for _ in 0..2 {
            assert_eq!(found(&shard, &erased), Vec::<String>::new());
            let stubs = shard.read_log(&erased, 0, 999).await.unwrap();
            assert!(
                stubs.len() == 60
                    && stubs.iter().all(|row| row.is_stub() && row.at_us == 0 && row.append_key.is_none())
            );
            assert_eq!(shard.find_snapshot(erased.eid).await.unwrap(), None);
            assert!(shard.append_keys(&erased, 9).await.unwrap().is_empty());
            let row = shard.find_entity(CopyId::LIVE, erased.id_hash).await.unwrap().unwrap();
            assert_eq!((row.erased_at_us, row.sealed_id.len()), (Some(77), 0));

            assert_eq!(shard.read_log(&neighbour, 0, 999).await.unwrap(), neighbours);
            assert_eq!(shard.find_snapshot(neighbour.eid).await.unwrap(), Some(snapshot(&neighbour, 60)));
            assert_eq!(slot(&shard, 2).await, kept);
            assert_ne!(slot(&shard, 0).await, before);
            assert_eq!(slot(&shard, 0).await.0, before.0, "stubs count");
            let report = shard.verify(&mut Trusting).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
            assert_eq!((report.erased, report.commits, report.stubs), (1, 60, 60));
            shard.reopen().await;
        }
        // Again: nothing is left to be done.
        let row = shard.find_entity(CopyId::LIVE, erased.id_hash).await.unwrap().unwrap();
        assert_eq!(shard.erase(&row, 99).await.unwrap(), ErasedRows::default());
        shard.stop().await;
    }

    /// What was copied when pages were rebalanced would be found here.
    #[tokio::test]
    async fn the_neighbour_that_is_erased_later_leaves_nothing_either() {
        let mut shard = TestShard::new().await;
        for entity in two(&mut shard).await {
            shard.erase(&entity, 77).await.unwrap();
            shard.truncate_log().await.unwrap();
            assert_eq!(found(&shard, &entity), Vec::<String>::new());
        }
        shard.stop().await;
    }

    #[tokio::test]
    async fn nothing_is_written_any_more_for_an_erased_entity() {
        let mut shard = TestShard::new().await;
        let (entity, neighbour) = (shard.entity(1, 0), shard.entity(2, 0));
        shard.append(&entity, 1..=3).await;
        shard.append(&neighbour, 1..=1).await;
        let before = shard.stats().groups;
        // In one group with its erasure, before or after it.
        let (early, erase, late, saved, beside) = {
            let activation = Arc::new(Activation::at(3));
            let early = shard.submit(&activation, commit(&entity, 4));
            let erase = tokio::spawn({
                let (shard, entity) = (Shard::clone(&shard), entity.clone());
                async move { shard.erase(&entity, 77).await }
            });
            tokio::task::yield_now().await;
            let late = shard.submit(&Arc::new(Activation::at(3)), commit(&entity, 4));
            let saved = shard.save(SnapshotRow { eid: entity.eid, version: 3, schema: 1, body: b"late".to_vec() });
            let beside = shard.submit(&Arc::new(Activation::at(1)), commit(&neighbour, 2));
            (early, erase, late, saved, beside)
        };
        let early = early.await.unwrap();
        assert_eq!(erase.await.unwrap().unwrap().commits, if early.is_ok() { 4 } else { 3 });
        assert!(matches!(late.await.unwrap(), Err(CommitError::NotWritten(NotWritten::Erased))));
        saved.await.unwrap().unwrap();
        beside.await.unwrap().unwrap();
        assert!(shard.stats().groups > before);
        for _ in 0..2 {
            let late = shard.submit(&Arc::new(Activation::at(3)), commit(&entity, 4)).await.unwrap();
            assert!(matches!(late, Err(CommitError::NotWritten(NotWritten::Erased))), "{late:?}");
            shard
                .save(SnapshotRow { eid: entity.eid, version: 3, schema: 1, body: b"late".to_vec() })
                .await
                .unwrap()
                .unwrap();
            assert_eq!(shard.find_snapshot(entity.eid).await.unwrap(), None);
            shard.reopen().await;
        }
        shard.stop().await;
    }

    #[tokio::test]
    async fn a_long_history_is_erased_step_by_step() {
        let mut shard = TestShard::new().await;
        let entity = shard.entity(1, 0);
        shard.append(&entity, 1..=1000).await;
        let groups = shard.stats().groups;
        assert_eq!(shard.erase(&entity, 77).await.unwrap().commits, 1000);
        assert_eq!(shard.stats().groups - groups, 1000_u64.div_ceil(u64::from(STEP_ROWS)));
        shard.crash().await;
        let report = shard.verify(&mut Trusting).await.unwrap();
        assert!(report.is_clean() && report.stubs == 1000, "{report:?}");
        shard.stop().await;
    }

    #[tokio::test]
    async fn a_second_life_is_found_and_the_first_one_stays_erased() {
        let mut shard = TestShard::new().await;
        let first = shard.entity(1, 0);
        shard.append(&first, 1..=3).await;
        shard.erase(&first, 77).await.unwrap();
        let second = Arc::new(EntityRow { life: 2, key_id: [9; 16], ..(*shard.entity(1, 0)).clone() });
        shard.append(&second, 1..=2).await;
        for _ in 0..2 {
            let found = shard.find_entity(CopyId::LIVE, first.id_hash).await.unwrap().unwrap();
            assert_eq!((found.eid, found.life, found.erased_at_us), (second.eid, 2, None));
            let lives = shard.lives(CopyId::LIVE, first.id_hash).await.unwrap();
            assert_eq!(lives.iter().map(|row| row.life).collect::<Vec<_>>(), [2, 1]);
            let report = shard.verify(&mut Trusting).await.unwrap();
            assert!(report.is_clean() && (report.entities, report.erased) == (2, 1), "{report:?}");
            shard.reopen().await;
        }
        shard.stop().await;
    }

    /// A row that was damaged before is erased as well. What its slot's digest should have been cannot be known any more.
    #[tokio::test]
    async fn a_damaged_commit_is_erased_and_counted() {
        let mut shard = TestShard::new().await;
        let entity = shard.entity(1, 0);
        shard.append(&entity, 1..=3).await;
        shard.tamper("UPDATE log SET body = x'00' WHERE position = 2").await;
        let rows = shard.erase(&entity, 77).await.unwrap();
        assert_eq!((rows.commits, rows.damaged), (3, 1));
        let report = shard.verify(&mut Trusting).await.unwrap();
        assert_eq!((report.bad_slots, report.bad_entities.len()), (vec![Slot::new(0)], 0));
        shard.reopen().await;
        shard.stop().await;
    }

    /// The control: without zeroing, the same look finds what was deleted.
    #[tokio::test]
    async fn without_secure_delete_the_bytes_are_still_there() {
        let mut shard = TestShard::new().await;
        shard.options.file.keep_deleted_bytes = true;
        shard.reopen().await;
        let [entity, _] = two(&mut shard).await;
        shard.erase(&entity, 77).await.unwrap();
        shard.truncate_log().await.unwrap();
        assert_ne!(found(&shard, &entity), Vec::<String>::new());
        shard.stop().await;
    }
}
