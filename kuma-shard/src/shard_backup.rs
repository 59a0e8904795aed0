//! Copying a shard into a backup, beside its writer.
//!
//! ```text
//!   ask the writer how far it is ──► rows behind the copy's end, page by page ──► stubs for what was erased since
//!              ▲                                                                              │
//!              └──────────── an erased entity has a next life, that may be behind the end ────┤
//!                                                                                             ▼
//!                                                 compare each slot with what the writer said ──► commit
//! ```
//! Invariants:
//! - The copy is as of the moment at which the writer was asked last: every commit that was acknowledged before is in it.
//! - An entity whose life was replaced by the next one is not erased in the copy without that next life being in it.
//! - No state of the shard is held open for longer than one page of rows, so that its log is cut as if there were no backup.
//! - Every row is checked before it is copied. One that is damaged ends the backup and leaves the copy as it was.
//! - A copy that is whole is brought up to date in one transaction; its first making is one for each 16 MiB.
//! - A copy that was begun is continued behind its last row. Rows in front of it are only ever turned into stubs.
//! - Entities are copied in the order of their numbers, in which the store wrote them, and in front of their rows. Some have no rows yet.

use std::{
    collections::{BTreeSet, HashSet},
    path::Path,
};

use sqlx::{Row, sqlite::SqliteRow};

use crate::{
    BadRow, CopyError, DiskId, EntityRow, LogRow, Shard, Slot,
    backup_file::BackupFile,
    book::Audit,
    erase::{self, Stubbed},
    log_row::{self, StoredRow},
    packed,
    row_hash::{Digest, RowHash},
    scrub::{Page, SoundRow},
    slots::{self, SlotImage},
    statements,
};

const PAGE_ROWS: u32 = 2048;
/// While a copy is made for the first time, a transaction of it ends when it has so many bytes.
const TRANSACTION_BYTES: u64 = 16 << 20;
/// What a row counts for beside its body.
const ROW_BYTES: u64 = 256;
/// Rows that become stubs in one statement have together no more bytes than this.
const STUB_BYTES: i64 = 4 << 20;
/// Erasures that went on meanwhile are followed so often.
const ROUNDS_MAX: usize = 3;
/// Next lives that began meanwhile are followed so often.
const LIVES_ROUNDS_MAX: usize = 16;

/// How far the copy of a shard has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyProgress {
    /// Commits copied.
    pub commits: u64,
    /// Commits that are to be copied.
    pub commits_total: u64,
    /// Sealed bytes copied.
    pub bytes: u64,
}

/// What a copy of a shard holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardContents {
    /// The shard.
    pub shard: u16,
    /// The commit counter of the shard that the copy is as of.
    pub commits: u64,
    /// The position of its last row.
    pub position: u64,
    /// The number of its last entity.
    pub last_eid: i64,
    /// The sum of its rows.
    pub digest: Digest,
    /// Each slot that has rows: how many, and their sum.
    pub slots: Vec<(Slot, u64, Digest)>,
}

/// What was done to bring a copy of a shard up to date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardCopied {
    /// What it holds now.
    pub contents: ShardContents,
    /// Commits that were new.
    pub commits: u64,
    /// Their sealed bytes.
    pub bytes: u64,
    /// Commits that it had and that became stubs, because their entities were erased.
    pub stubs: u64,
    /// Slots whose rows in the store are not those that were committed, although each row is sound. The copy holds these rows.
    pub bad_slots: Vec<Slot>,
    /// Slots that were not compared, because something in them was erased, or left, meanwhile.
    pub changed_slots: Vec<Slot>,
}

impl Shard {
    /// Brings the copy of this shard in `directory` up to date; makes it if there is none. Appends go on meanwhile: what is acknowledged
    /// when this begins is in the copy. What was erased since the copy was made becomes stubs in it too.
    ///
    /// # Errors
    /// See [`CopyError`]. The store is not affected, and the copy holds what it held before or more; call it again.
    /// # Cancel safety
    /// Cancel safe: the copy holds what it held before or more.
    pub async fn back_up(
        &self,
        directory: &Path,
        disk_id: DiskId,
        shards: u16,
        progress: impl FnMut(CopyProgress) + Send,
    ) -> Result<ShardCopied, CopyError> {
        let file = BackupFile::open_or_create(directory, self.number(), shards, disk_id).await?;
        let is_first = file.next_position() == 1 || !file.is_whole;
        let mut copying = Copying {
            shard: self,
            file,
            is_first,
            has_next_life: false,
            transaction_bytes: 0,
            done: CopyProgress::default(),
            stubs: 0,
            unfinished: BTreeSet::new(),
            marked: HashSet::new(),
            progress,
        };
        let copied = copying.run().await;
        let closed = copying.file.close().await;
        let copied = copied?;
        closed.map(|()| copied)
    }

    /// The number of the newest entity.
    async fn last_eid(&self) -> Result<i64, CopyError> {
        let row = sqlx::query("SELECT coalesce(max(eid), 0) FROM entity").fetch_one(&self.database().readers).await;
        Ok(row.and_then(|row| row.try_get(0)).map_err(|error| self.read_error(error))?)
    }

    /// The numbers of erased entities above `after`, in order.
    async fn erased_eids(&self, after: i64, rows_max: u32) -> Result<Vec<i64>, CopyError> {
        let rows =
            sqlx::query("SELECT eid FROM entity WHERE erased_at IS NOT NULL AND eid > ? ORDER BY eid LIMIT 0 + ?")
                .bind(after)
                .bind(rows_max)
                .fetch_all(&self.database().readers)
                .await
                .map_err(|error| self.read_error(error))?;
        rows.iter().map(|row| row.try_get(0).map_err(|error| self.read_error(error).into())).collect()
    }
}

/// Where an erased entity's commits stand in the shard: (version, position, is it a stub).
type Standing = (i64, i64, bool);

struct Copying<'a, P> {
    shard: &'a Shard,
    file: BackupFile,
    /// Whether the copy was never whole.
    is_first: bool,
    /// Whether an entity was found to be erased whose next life may be behind the copy's end.
    has_next_life: bool,
    /// In the open transaction.
    transaction_bytes: u64,
    done: CopyProgress,
    stubs: u64,
    /// Slots in which an entity is erased and still has rows that are no stubs.
    unfinished: BTreeSet<Slot>,
    /// Erased entities whose rows in the copy say so.
    marked: HashSet<i64>,
    progress: P,
}

impl<P: FnMut(CopyProgress) + Send> Copying<'_, P> {
    async fn run(&mut self) -> Result<ShardCopied, CopyError> {
        let mut asked = self.shard.database().audit().await?;
        self.same_history(&asked).await?;
        let mut rounds = 0;
        let now = loop {
            self.has_next_life = false;
            self.copy_rows(&asked).await?;
            // Those that have no rows.
            self.copy_entities(self.shard.last_eid().await?).await?;
            let now = self.follow_erasures(&asked).await?;
            if !self.has_next_life || now.stored.progress.next_position == self.file.next_position() {
                break now;
            }
            rounds += 1;
            if rounds == LIVES_ROUNDS_MAX {
                return Err(CopyError::Unsettled { file: self.shard.file().to_owned() });
            }
            asked = now;
        };
        self.take_tokens().await?;
        let commits = asked.stored.commits;
        if self.file.has_changed() || !self.file.is_whole || self.file.stored.commits != commits {
            self.file.commit(commits, true).await?;
        }
        let (bad_slots, changed_slots) = self.compare(&asked, &now);
        Ok(ShardCopied {
            contents: contents(self.shard.number(), &self.file),
            commits: self.done.commits,
            bytes: self.done.bytes,
            stubs: self.stubs,
            bad_slots,
            changed_slots,
        })
    }

    fn source_error(&self, position: u64, entity: Option<&EntityRow>, detail: impl Into<String>) -> CopyError {
        let file = self.shard.file().to_owned();
        CopyError::DamagedSource { file, position, entity: entity.map(|entity| entity.id_hash), detail: detail.into() }
    }

    fn bad_source(&self, BadRow { position, entity, detail }: BadRow) -> CopyError {
        CopyError::DamagedSource { file: self.shard.file().to_owned(), position, entity, detail }
    }

    fn file_error(&self, error: sqlx::Error) -> CopyError {
        CopyError::of(&self.file.path, error)
    }

    fn read_error(&self, error: sqlx::Error) -> CopyError {
        self.shard.read_error(error).into()
    }

    /// Whether the copy's last row is the one that the store has in that place: its files may have been put back to an older state, and
    /// written to since.
    async fn same_history(&mut self, asked: &Audit) -> Result<(), CopyError> {
        let other = |detail: String| CopyError::OtherHistory { path: self.file.path.clone(), detail };
        let (copied, there) = (self.file.next_position(), asked.stored.progress.next_position);
        if copied > there {
            return Err(other(format!("its last position is {}, that of the store {}", copied - 1, there - 1)));
        }
        if copied == 1 {
            return Ok(());
        }
        let (position, end) = (copied - 1, copied);
        let ours = Page::read(&mut self.file.connection, position - 1, end, 1).await;
        let ours = ours.map_err(|error| CopyError::of(&self.file.path, error))?.rows.pop();
        let theirs = self.shard.page(position - 1, end, 1).await?.rows.pop();
        let lost = || self.source_error(position, None, "was committed and is not there");
        let theirs = theirs.ok_or_else(lost)?.map_err(|bad| self.bad_source(bad))?;
        let lost = || self.file.damaged(format!("the row at position {position} is missing"));
        let bad = |bad: BadRow| self.file.damaged(format!("the row at position {position} {}", bad.detail));
        let ours = ours.ok_or_else(lost)?.map_err(bad)?;
        let place = |row: &LogRow| (row.slot, row.seq, row.version, row.count);
        let is_stub = ours.row.is_stub() || theirs.row.is_stub();
        let is_same = place(&ours.row) == place(&theirs.row) && (is_stub || ours.hash == theirs.hash);
        if is_same { Ok(()) } else { Err(other(format!("the rows at position {position} differ"))) }
    }

    async fn copy_rows(&mut self, asked: &Audit) -> Result<(), CopyError> {
        let end = asked.stored.progress.next_position;
        self.done.commits_total = self.done.commits + (end - self.file.next_position());
        while self.file.next_position() < end {
            let page = self.shard.page(self.file.next_position() - 1, end, PAGE_ROWS).await?;
            if page.rows.is_empty() {
                return Err(self.source_error(self.file.next_position(), None, "was committed and is not there"));
            }
            self.copy_page(page.rows).await?;
            self.transaction_bytes += page.extent.bytes;
            self.end_transaction(asked.stored.commits).await?;
            self.done.bytes += page.extent.bytes;
            (self.progress)(self.done);
        }
        Ok(())
    }

    /// Ends a transaction that has become large, of a copy that is not whole anyway.
    async fn end_transaction(&mut self, commits: u64) -> Result<(), CopyError> {
        if self.is_first && self.transaction_bytes >= TRANSACTION_BYTES {
            self.transaction_bytes = 0;
            self.file.commit(commits, false).await?;
        }
        Ok(())
    }

    async fn copy_page(&mut self, page: Vec<Result<SoundRow, BadRow>>) -> Result<(), CopyError> {
        let mut rows = Vec::with_capacity(page.len());
        let mut erased = Vec::new();
        let mut last_eid = 0;
        for row in page {
            let next = self.file.stored.progress.next_position;
            let SoundRow { entity, row, hash } = row.map_err(|bad| self.bad_source(bad))?;
            if row.position != next {
                return Err(self.source_error(next, None, "was committed and is not there"));
            }
            if entity.is_departed() {
                let detail = "is of a slot that was given away; nodes of a cluster cannot be backed up this way";
                return Err(self.source_error(next, Some(&entity), detail));
            }
            let (row, hash) = match entity.erased_at_us.is_some() && !row.is_stub() {
                false => (row, hash),
                true => {
                    self.unfinished.insert(entity.slot);
                    let stub = row.stub();
                    let hash = RowHash::of(&stub.fields(&entity));
                    (stub, hash)
                }
            };
            let index = slots::index(row.slot, self.file.shards);
            let image = self.file.images.get_mut(index);
            let Some(image) = image.filter(|image| image.slot == row.slot && image.next_seq == row.seq) else {
                return Err(self.source_error(next, Some(&entity), "is out of place in its slot"));
            };
            image.next_seq += 1;
            image.len += 1;
            image.digest.add(&hash);
            self.file.dirty.insert(index);
            self.file.stored.progress.next_position += 1;
            self.transaction_bytes += ROW_BYTES;
            self.done.commits += 1;
            last_eid = last_eid.max(entity.eid);
            rows.push(StoredRow { eid: entity.eid, row, checksum: hash.checksum() });
            if entity.erased_at_us.is_some() && !self.marked.contains(&entity.eid) {
                erased.push(entity);
            }
        }
        self.file.begin().await?;
        self.copy_entities(last_eid).await?;
        for entity in &erased {
            self.mark_erased(entity).await?;
        }
        let written = statements::insert_copied(&mut self.file.connection, &rows).await;
        written.map_err(|error| self.file_error(error))
    }

    /// Copies entities at least up to the number `until`, or all.
    async fn copy_entities(&mut self, until: i64) -> Result<(), CopyError> {
        while self.file.last_eid < until {
            let page = self.shard.entities(self.file.last_eid, PAGE_ROWS).await?;
            let mut new = Vec::with_capacity(page.len());
            for entity in page {
                let damaged =
                    |eid| self.source_error(0, None, format!("of entity number {eid} does not match its checksum"));
                new.push(entity.map_err(damaged)?);
            }
            let Some(last) = new.last() else { return Ok(()) };
            self.file.last_eid = last.eid;
            for entity in new.iter().filter(|entity| entity.erased_at_us.is_some()) {
                self.marked.insert(entity.eid);
                self.look_for_next_life(entity).await?;
            }
            let new: Vec<&EntityRow> = new.iter().collect();
            self.file.begin().await?;
            self.transaction_bytes += new.len() as u64 * ROW_BYTES;
            let written = statements::insert_entities(&mut self.file.connection, &new).await;
            written.map_err(|error| self.file_error(error))?;
        }
        Ok(())
    }

    async fn look_for_next_life(&mut self, entity: &EntityRow) -> Result<(), CopyError> {
        if self.has_next_life {
            return Ok(());
        }
        let next = sqlx::query("SELECT 1 FROM entity WHERE copy = ? AND id_hash = ? AND life > ?")
            .bind(entity.copy.0.to_vec())
            .bind(entity.id_hash.0.to_vec())
            .bind(entity.life)
            .fetch_optional(&self.shard.database().readers)
            .await;
        self.has_next_life = next.map_err(|error| self.read_error(error))?.is_some();
        Ok(())
    }

    /// What the copy says of an entity is what the store says now.
    async fn mark_erased(&mut self, entity: &EntityRow) -> Result<(), CopyError> {
        if !self.marked.insert(entity.eid) {
            return Ok(());
        }
        self.look_for_next_life(entity).await?;
        let erased = entity.erased(entity.erased_at_us.unwrap_or_default());
        let update = sqlx::query("UPDATE entity SET sealed_id = x'', erased_at = ?, checksum = ? WHERE eid = ?")
            .bind(erased.erased_at_us)
            .bind(erased.checksum())
            .bind(erased.eid);
        let updated = update.execute(&mut self.file.connection).await;
        updated.map(|_| ()).map_err(|error| self.file_error(error))
    }

    /// Turns into stubs what was erased, until nothing was erased meanwhile. Returns what the writer says then.
    async fn follow_erasures(&mut self, asked: &Audit) -> Result<Audit, CopyError> {
        let mut before = self.shard.database().audit().await?;
        for _ in 0..ROUNDS_MAX {
            self.erase_what_is_erased(asked.stored.commits).await?;
            let now = self.shard.database().audit().await?;
            if now.rewrites == before.rewrites {
                return Ok(now);
            }
            before = now;
        }
        Ok(before)
    }

    async fn erase_what_is_erased(&mut self, commits: u64) -> Result<(), CopyError> {
        let done = sqlx::query("SELECT eid FROM erased").fetch_all(&mut self.file.connection).await;
        let done = done.and_then(|rows| rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<HashSet<i64>>>());
        let done = done.map_err(|error| self.file_error(error))?;
        let mut after = 0;
        loop {
            let page = self.shard.erased_eids(after, PAGE_ROWS).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = *last;
            for eid in page.into_iter().filter(|eid| !done.contains(eid)) {
                self.erase_one(eid, commits).await?;
            }
        }
    }

    async fn erase_one(&mut self, eid: i64, commits: u64) -> Result<(), CopyError> {
        let known = sqlx::query("SELECT 1 FROM entity WHERE eid = ?").bind(eid);
        let known = known.fetch_optional(&mut self.file.connection).await.map_err(|error| self.file_error(error))?;
        if known.is_none() {
            // Its first commit is behind the copy's end. The next backup meets it.
            return Ok(());
        }
        let row = sqlx::query("SELECT * FROM entity WHERE eid = ?").bind(eid);
        let row = row.fetch_one(&self.shard.database().readers).await.map_err(|error| self.read_error(error))?;
        let entity = EntityRow::from_row(&row).map_err(|error| self.read_error(error))?;
        let entity = entity
            .ok_or_else(|| self.source_error(0, None, format!("of entity number {eid} does not match its checksum")))?;
        self.file.begin().await?;
        self.mark_erased(&entity).await?;
        self.transaction_bytes += ROW_BYTES;
        // A life that was replaced has an end before its erasure begins, and may not be in the index by then. The tail is looked at first.
        let in_tail = !self.shard.tail().read().after(eid, 0).is_empty();
        let (mut is_finished, mut after) = (!in_tail, 0);
        loop {
            let page = self.standing(eid, after).await?;
            let Some((last, ..)) = page.last() else { break };
            is_finished |= after == 0;
            after = *last;
            is_finished &= page.iter().all(|(.., is_stub)| *is_stub);
            self.stub_those(&entity, page.iter().map(|(_, position, _)| *position), commits).await?;
        }
        if is_finished {
            let insert = sqlx::query("INSERT OR IGNORE INTO erased(eid) VALUES (?)").bind(eid);
            self.file.begin().await?;
            insert.execute(&mut self.file.connection).await.map_err(|error| self.file_error(error))?;
        } else {
            self.unfinished.insert(entity.slot);
        }
        Ok(())
    }

    /// An erasure brings the index up to date before it makes the first stub: if there is one, all commits of the entity are here.
    async fn standing(&self, eid: i64, after: i64) -> Result<Vec<Standing>, CopyError> {
        let rows = sqlx::query(
            "SELECT log_index.version, log.position, length(log.body) = 0
             FROM log_index CROSS JOIN log ON log.position = log_index.position
             WHERE log_index.eid = ? AND log_index.version > ? ORDER BY log_index.version LIMIT 0 + ?",
        )
        .bind(eid)
        .bind(after)
        .bind(PAGE_ROWS)
        .fetch_all(&self.shard.database().readers)
        .await;
        let read = |row: &SqliteRow| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
        let rows = rows.and_then(|rows| rows.iter().map(read).collect());
        rows.map_err(|error| self.read_error(error))
    }

    /// Turns those rows of the copy at these positions into stubs that are none yet.
    async fn stub_those(
        &mut self,
        entity: &EntityRow,
        positions: impl Iterator<Item = i64>,
        commits: u64,
    ) -> Result<(), CopyError> {
        let sizes = sqlx::query(
            "SELECT position, length(body) FROM log
             WHERE position IN (SELECT value FROM json_each(?)) AND length(body) > 0 ORDER BY position",
        )
        .bind(packed::numbers(positions));
        let sizes = sizes.fetch_all(&mut self.file.connection).await;
        let read = |row: &SqliteRow| -> sqlx::Result<(i64, i64)> { Ok((row.try_get(0)?, row.try_get(1)?)) };
        let sizes = sizes.and_then(|rows| rows.iter().map(read).collect::<sqlx::Result<Vec<_>>>());
        let sizes = sizes.map_err(|error| self.file_error(error))?;
        let (mut batch, mut bytes) = (Vec::new(), 0);
        for (position, size) in sizes {
            if bytes + size > STUB_BYTES && !batch.is_empty() {
                self.stub_batch(entity, &std::mem::take(&mut batch), commits).await?;
                bytes = 0;
            }
            batch.push(position);
            bytes += size;
        }
        self.stub_batch(entity, &batch, commits).await
    }

    async fn stub_batch(&mut self, entity: &EntityRow, positions: &[i64], commits: u64) -> Result<(), CopyError> {
        if positions.is_empty() {
            return Ok(());
        }
        self.file.begin().await?;
        let query =
            sqlx::query("SELECT * FROM log WHERE position IN (SELECT value FROM json_each(?)) ORDER BY position")
                .bind(packed::numbers(positions));
        let found = query.fetch_all(&mut self.file.connection).await.map_err(|error| self.file_error(error))?;
        let index = slots::index(entity.slot, self.file.shards);
        let mut stubbed = Vec::with_capacity(found.len());
        for row in &found {
            let (row, before, checksum) = log_row::parse(row, entity).map_err(|error| self.file_error(error))?;
            if before.checksum() != checksum {
                let position = row.position;
                return Err(self.file.damaged(format!("the row at position {position} does not match its checksum")));
            }
            let after = RowHash::of(&row.stub().fields(entity));
            if let Some(image) = self.file.images.get_mut(index) {
                image.digest.subtract(&before);
                image.digest.add(&after);
            }
            // The page is written as a whole, whatever was in it.
            self.transaction_bytes += row.body.len() as u64 + 4096;
            stubbed.push(Stubbed { row, before, after });
        }
        self.file.dirty.insert(index);
        erase::empty(&mut self.file.connection, stubbed.iter().map(Stubbed::stub))
            .await
            .map_err(|error| self.file_error(error))?;
        self.stubs += stubbed.len() as u64;
        self.end_transaction(commits).await
    }

    /// Who owns each slot, as the store has it.
    async fn take_tokens(&mut self) -> Result<(), CopyError> {
        let mut reader = self.shard.database().readers.acquire().await.map_err(|error| self.read_error(error))?;
        let loaded = slots::load(&mut reader, self.shard.number(), self.file.shards).await;
        drop(reader);
        let loaded = loaded.map_err(|error| self.read_error(error))?;
        let loaded = loaded.map_err(|detail| self.source_error(0, None, format!("of slots: {detail}")))?;
        for (index, (ours, theirs)) in self.file.images.iter_mut().zip(loaded).enumerate() {
            let (next_seq, len, digest) = (ours.next_seq, ours.len, ours.digest);
            let image = SlotImage { next_seq, len, digest, rewrites: ours.rewrites, ..theirs };
            if *ours != image {
                *ours = image;
                self.file.dirty.insert(index);
            }
        }
        Ok(())
    }

    /// The slots that differ from what the writer said when it was asked, and those that cannot be compared.
    fn compare(&self, asked: &Audit, now: &Audit) -> (Vec<Slot>, Vec<Slot>) {
        let (mut bad, mut changed) = (Vec::new(), Vec::new());
        for image in &self.file.images {
            let slot = image.slot;
            if self.unfinished.contains(&slot) || asked.rewrites.get(&slot) != now.rewrites.get(&slot) {
                changed.push(slot);
            } else if asked.slots.get(&slot).copied().unwrap_or_default() != image.sum() {
                bad.push(slot);
            }
        }
        (bad, changed)
    }
}

/// What a file says that it holds.
pub(crate) fn contents(shard: u16, file: &BackupFile) -> ShardContents {
    let some = file.images.iter().filter(|image| image.len > 0);
    ShardContents {
        shard,
        commits: file.stored.commits,
        position: file.next_position() - 1,
        last_eid: file.last_eid,
        digest: file.stored.progress.digest,
        slots: some.map(|image| (image.slot, image.len, image.digest)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, sync::Arc};

    use sqlx::Connection;

    use super::*;
    use crate::{
        Activation, Commit, CopyId, Destroyed, ShardBackup, ShardRead, sqlite,
        test_shard::{SHARDS, TestShard, commit},
    };

    struct Fixture {
        shard: TestShard,
        entities: Vec<Arc<EntityRow>>,
        directory: tempfile::TempDir,
    }

    impl Fixture {
        async fn new() -> Fixture {
            let shard = TestShard::new().await;
            let entities = [(1, 0), (2, 0), (3, 18)].map(|(name, slot)| shard.entity(name, slot)).to_vec();
            let fixture = Fixture { shard, entities, directory: tempfile::tempdir().unwrap() };
            fixture.append(1, 20).await;
            fixture
        }

        async fn append(&self, from: u64, to: u64) {
            for version in from..=to {
                for entity in &self.entities {
                    let body = format!("<{} {version}>", entity.key_id[0]).repeat(40).into_bytes();
                    let one = Commit { body, ..commit(entity, version) };
                    let activation = Arc::new(Activation::at(version - 1));
                    self.shard.submit(&activation, one).await.unwrap().unwrap();
                }
            }
        }

        async fn back_up_changing(&self) -> Result<ShardCopied, CopyError> {
            self.shard.back_up(self.directory.path(), self.shard.options.disk_id, SHARDS, |_| ()).await
        }

        async fn back_up(&self) -> Result<ShardCopied, CopyError> {
            let copied = self.back_up_changing().await;
            if let Ok(copied) = &copied {
                assert_eq!((&copied.bad_slots, &copied.changed_slots), (&vec![], &vec![]));
            }
            copied
        }

        async fn read(&self) -> Result<ShardRead, CopyError> {
            let mut backup = ShardBackup::open(self.directory.path(), 0, SHARDS, self.shard.options.disk_id).await?;
            let read = backup.verify(|_| (), |_| ()).await;
            backup.close().await;
            read
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join(self.shard.file())
        }

        /// Where an entity's bytes are in the copy.
        fn holds(&self, entity: &EntityRow) -> bool {
            let needle = format!("<{} ", entity.key_id[0]).into_bytes();
            std::fs::read(self.path()).unwrap().windows(needle.len()).any(|bytes| bytes == needle)
        }

        /// Makes a shard of the copy in place of the one that there is.
        async fn restore(&mut self, destroyed: &Destroyed) -> ShardRead {
            self.shard.stop().await;
            for file in std::fs::read_dir(&self.shard.options.directory).unwrap() {
                std::fs::remove_file(file.unwrap().path()).unwrap();
            }
            let disk_id = self.shard.options.disk_id;
            self.shard.options.disk_id = DiskId([9; 16]);
            let mut backup = ShardBackup::open(self.directory.path(), 0, SHARDS, disk_id).await.unwrap();
            let read = backup.restore(&self.shard.options, destroyed, |_| (), |_| ()).await.unwrap();
            backup.close().await;
            self.shard.start().await;
            read
        }

        async fn rows(&self) -> Vec<Vec<LogRow>> {
            let mut all = Vec::new();
            for entity in &self.entities {
                all.push(self.shard.read_log(entity, 0, 999).await.unwrap());
            }
            all
        }

        async fn assert_clean(&self) {
            struct Trusting;
            impl crate::CommitCheck for Trusting {
                async fn check(&mut self, _: &EntityRow, _: &LogRow) -> Result<(), String> {
                    Ok(())
                }
            }
            let report = self.shard.verify(&mut Trusting).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
        }
    }

    #[tokio::test]
    async fn a_copy_is_continued_behind_its_last_row_and_restores_to_the_same_rows_and_digests() {
        let mut fixture = Fixture::new().await;
        let first = fixture.back_up().await.unwrap();
        assert_eq!((first.commits, first.contents.position), (60, 60));
        fixture.append(21, 25).await;
        let second = fixture.back_up().await.unwrap();
        assert_eq!((second.commits, second.contents.position, second.stubs), (15, 75, 0));
        let bytes = std::fs::read(fixture.path()).unwrap();
        let third = fixture.back_up().await.unwrap();
        assert_eq!((third.commits, &third.contents), (0, &second.contents));
        assert_eq!(std::fs::read(fixture.path()).unwrap(), bytes, "nothing is new");
        let read = fixture.read().await.unwrap();
        assert_eq!((read.entities, read.commits, read.events, read.stubs), (3, 75, 75, 0));

        let (rows, slots) = (fixture.rows().await, fixture.shard.database().audit().await.unwrap().slots);
        assert_eq!(fixture.restore(&Destroyed::new()).await, read);
        assert_eq!(fixture.rows().await, rows);
        let audit = fixture.shard.database().audit().await.unwrap();
        assert_eq!((audit.slots, audit.stored.progress.digest), (slots, second.contents.digest));
        fixture.assert_clean().await;
        fixture.append(26, 26).await;
        let key = commit(&fixture.entities[0], 7).append_key.unwrap();
        let found = fixture.shard.find_append(&fixture.entities[0], &key).await.unwrap();
        assert_eq!(found.map(|row| row.version), Some(7));
        fixture.assert_clean().await;
        fixture.shard.stop().await;
    }

    #[tokio::test]
    async fn what_was_erased_since_becomes_stubs_in_the_copy() {
        let mut fixture = Fixture::new().await;
        fixture.back_up().await.unwrap();
        fixture.append(21, 22).await;
        let erased = fixture.entities[0].clone();
        assert!(fixture.holds(&erased));
        fixture.shard.erase(&erased, 77).await.unwrap();
        fixture.entities.remove(0);
        fixture.append(23, 23).await;
        let copied = fixture.back_up().await.unwrap();
        assert_eq!((copied.commits, copied.stubs), (8, 20));
        assert!(!fixture.holds(&erased) && fixture.holds(&fixture.entities[0]));
        assert_eq!(fixture.back_up().await.unwrap().stubs, 0);
        let read = fixture.read().await.unwrap();
        assert_eq!((read.entities, read.erased, read.commits, read.stubs), (3, 1, 46, 22));
        let slots = fixture.shard.database().audit().await.unwrap().slots;
        fixture.restore(&Destroyed::new()).await;
        assert_eq!(fixture.shard.database().audit().await.unwrap().slots, slots);
        let row = fixture.shard.find_entity(CopyId::LIVE, erased.id_hash).await.unwrap().unwrap();
        assert_eq!((row.erased_at_us, row.sealed_id.len()), (Some(77), 0));
        fixture.assert_clean().await;
        fixture.shard.stop().await;
    }

    /// The copy is older than the erasure. What is left out never reaches the new files.
    #[tokio::test]
    async fn what_was_sealed_with_a_destroyed_key_is_left_out() {
        let mut fixture = Fixture::new().await;
        fixture.back_up().await.unwrap();
        let erased = fixture.entities.remove(0);
        let read = fixture.restore(&Destroyed::from([(erased.key_id, 55)])).await;
        assert_eq!((read.erased, read.erased_again, read.commits, read.stubs_again), (1, 1, 40, 20));
        fixture.assert_clean().await;
        let stubs = fixture.shard.read_log(&erased, 0, 999).await.unwrap();
        assert!(stubs.len() == 20 && stubs.iter().all(LogRow::is_stub));
        fixture.shard.stop().await;
        let file = std::fs::read(fixture.shard.options.directory.join(fixture.shard.file())).unwrap();
        assert!(!file.windows(3).any(|bytes| bytes == b"<1 ") && file.windows(3).any(|bytes| bytes == b"<2 "));
    }

    /// In the copy: of each entity the number of lives that are not erased, and the fewest events of one.
    async fn lives(fixture: &Fixture) -> Vec<(i64, i64)> {
        let mut connection = sqlite::connect_backup(&fixture.path(), false).await.unwrap();
        let rows = sqlx::query(
            "SELECT sum(erased_at IS NULL), min(CASE WHEN erased_at IS NULL THEN events ELSE 1000 END) FROM (
                 SELECT id_hash, erased_at, (SELECT count(*) FROM log WHERE log.eid = entity.eid) AS events FROM entity
             ) GROUP BY id_hash",
        );
        let rows = rows.fetch_all(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    /// The former life is erased in the store before the copy comes to the rows of the next one, which are at the end of the log.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_entity_whose_life_is_replaced_meanwhile_has_one_whole_life_in_the_copy() {
        const ENTITIES: u8 = 40;
        let shard = TestShard::new().await;
        let entities: Vec<Arc<EntityRow>> = (0..ENTITIES).map(|name| shard.entity(name, u64::from(name) * 2)).collect();
        for entity in &entities {
            shard.append(entity, 1..=50).await;
        }
        let fixture = Fixture { shard, entities: Vec::new(), directory: tempfile::tempdir().unwrap() };
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let replacing = tokio::spawn({
            let (shard, stop) = (Shard::clone(&fixture.shard), stop.clone());
            async move {
                let mut newest = entities;
                for life in 2.. {
                    for (name, former) in newest.iter_mut().enumerate() {
                        if stop.load(std::sync::atomic::Ordering::Relaxed) {
                            return life;
                        }
                        let key_id = std::array::from_fn(|index| [name as u8, life as u8, 7][index % 3]);
                        let next = EntityRow { life, key_id, ..(**former).clone() };
                        let commits = |row: &Arc<EntityRow>| (1..=50).map(|version| commit(row, version)).collect();
                        shard.replace(former, 50, next, commits, 7).await.unwrap();
                        shard.erase(&former.erased(7), 7).await.unwrap();
                        *former = Arc::new(shard.find_entity(CopyId::LIVE, former.id_hash).await.unwrap().unwrap());
                    }
                }
                0
            }
        });
        for _ in 0..6 {
            match fixture.back_up_changing().await {
                Ok(copied) => assert!(copied.bad_slots.is_empty(), "{copied:?}"),
                Err(CopyError::Unsettled { .. }) => continue,
                Err(error) => panic!("{error:?}"),
            }
            let lives = lives(&fixture).await;
            assert!(lives.len() == usize::from(ENTITIES) && lives.iter().all(|lives| *lives == (1, 50)), "{lives:?}");
            fixture.read().await.unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(replacing.await.unwrap() > 2, "hardly anything was replaced");
        let copied = fixture.back_up().await.unwrap();
        let slots = fixture.shard.database().audit().await.unwrap().slots;
        let held = slots.iter().filter(|(_, sum)| sum.len > 0).map(|(slot, sum)| (*slot, sum.len, sum.digest));
        assert_eq!(copied.contents.slots, held.collect::<Vec<_>>());
        fixture.shard.stop().await;
    }

    #[tokio::test]
    async fn a_copy_of_another_history_is_refused() {
        let fixture = Fixture::new().await;
        let older = Fixture::new().await;
        fixture.back_up().await.unwrap();
        std::fs::copy(fixture.path(), older.path()).unwrap();
        // The rows are the same, but for those that follow.
        older.back_up().await.unwrap();
        fixture.append(21, 21).await;
        fixture.back_up().await.unwrap();
        std::fs::copy(fixture.path(), older.path()).unwrap();
        let refused = older.back_up().await.unwrap_err();
        assert!(matches!(refused, CopyError::OtherHistory { .. }), "{refused}");
        for entity in older.entities.iter().rev() {
            older.shard.append(entity, 21..=22).await;
        }
        let refused = older.back_up().await.unwrap_err();
        assert!(matches!(refused, CopyError::OtherHistory { .. }), "{refused}");
        fixture.shard.stop().await;
        older.shard.stop().await;
    }

    #[tokio::test]
    async fn a_damaged_row_of_the_store_is_named_and_not_copied() {
        let mut fixture = Fixture::new().await;
        fixture.back_up().await.unwrap();
        fixture.append(21, 21).await;
        fixture.shard.tamper("UPDATE log SET body = x'00' WHERE position = 62").await;
        let refused = fixture.back_up().await.unwrap_err();
        assert!(matches!(refused, CopyError::DamagedSource { position: 62, entity: Some(_), .. }), "{refused}");
        assert_eq!(fixture.read().await.unwrap().commits, 60);
        fixture.shard.stop().await;
    }

    #[tokio::test]
    async fn a_damaged_or_foreign_copy_is_refused() {
        let fixture = Fixture::new().await;
        fixture.back_up().await.unwrap();
        let open =
            async |number, disk_id| ShardBackup::open(fixture.directory.path(), number, SHARDS, disk_id).await.err();
        let disk_id = fixture.shard.options.disk_id;
        assert!(matches!(open(0, DiskId([1; 16])).await, Some(CopyError::Foreign { .. })));
        assert!(matches!(open(1, disk_id).await, Some(CopyError::Missing { .. })));
        std::fs::copy(fixture.path(), fixture.directory.path().join("shard-001.db")).unwrap();
        assert!(matches!(open(1, disk_id).await, Some(CopyError::Foreign { .. })));
        // A live file is no backup.
        fixture.shard.stop().await;
        let live = fixture.shard.options.directory.join(fixture.shard.file());
        std::fs::copy(live, fixture.path()).unwrap();
        assert!(matches!(open(0, disk_id).await, Some(CopyError::Foreign { .. })));
        std::fs::write(fixture.path(), b"").unwrap();
        assert!(open(0, disk_id).await.is_some());
    }
}
