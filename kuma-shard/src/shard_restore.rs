//! Reading a shard out of a backup: to check it, or to make a shard of it.
//!
//! Invariants:
//! - Every row is checked on the way: against its checksum, its place in its slot and its entity, and all of them against the digests of
//!   their slots. A file that is damaged anywhere where it matters gives no shard.
//! - What was erased, as far as the backup or the caller knows, is written as stubs: its sealed bytes never reach the new shard.
//! - A shard that is being made is in no use until its last row, its progress and its watermark are on the disk.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use sqlx::{Connection, SqliteConnection};

use crate::{
    CopyError, DiskId, EntityRow, OpenError, ShardContents, ShardOptions,
    append_keys::AppendKeys,
    backup_file::BackupFile,
    book::Progress,
    log_row::StoredRow,
    progress::Stored,
    row_hash::{Digest, RowHash},
    scrub::{Page, SoundRow},
    shard_backup,
    slots::{self, SlotImage},
    statements,
    tail::TailRow,
};

const PAGE_ROWS: u32 = 2048;
/// Rows that are added to the indexes at once, sorted.
const INDEX_ROWS: usize = 65_536;

/// Why a shard could not be made from a backup.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreFileError {
    /// The backup.
    #[error(transparent)]
    Backup(#[from] CopyError),
    /// The new file.
    #[error(transparent)]
    Target(#[from] OpenError),
}

/// What was read from the backup of a shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardRead {
    /// Entities.
    pub entities: u64,
    /// Entities of them that are erased.
    pub erased: u64,
    /// Commits.
    pub commits: u64,
    /// Their events.
    pub events: u64,
    /// Their sealed bytes.
    pub bytes: u64,
    /// Stubs of erased commits.
    pub stubs: u64,
    /// Entities that the backup has as they were, and that were erased on the way.
    pub erased_again: u64,
    /// Commits of theirs that became stubs.
    pub stubs_again: u64,
}

/// Keys that are destroyed, with the time of their erasure: what was sealed with them is written as stubs.
pub type Destroyed = HashMap<[u8; 16], i64>;

/// The copy of a shard in a backup, open to be read.
pub struct ShardBackup {
    shard: u16,
    file: BackupFile,
}

impl ShardBackup {
    /// Opens the copy of shard `shard` of a store with `shards` of them, and checks that it is of the store `disk_id` and says what it
    /// holds. Its rows are not looked at.
    ///
    /// # Errors
    /// See [`CopyError`].
    pub async fn open(directory: &Path, shard: u16, shards: u16, disk_id: DiskId) -> Result<Self, CopyError> {
        Ok(ShardBackup { shard, file: BackupFile::open(directory, shard, shards, disk_id).await? })
    }

    /// What it says that it holds.
    pub fn contents(&self) -> ShardContents {
        shard_backup::contents(self.shard, &self.file)
    }

    /// Reads every row and checks it. `each` is called with every entity, and `progress` with the number of
    /// commits so far.
    ///
    /// # Errors
    /// See [`CopyError`]: the first thing that is wrong.
    pub async fn verify(
        &mut self,
        mut each: impl FnMut(&EntityRow) + Send,
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<ShardRead, CopyError> {
        let mut walk = Walk::new(&self.file);
        let none = Destroyed::new();
        while let Some(new) = walk.entities(&mut self.file, &none).await? {
            new.iter().for_each(&mut each);
        }
        while walk.page(&mut self.file).await?.is_some() {
            progress(walk.read.commits + walk.read.stubs);
        }
        walk.finish(&self.file)?;
        Ok(walk.read)
    }

    /// Makes the shard that `to` describes of it, whose file must not be there yet, with the identity of `to`. What was sealed with a key
    /// in `destroyed` is left out. `each` and `progress` are called as by [`ShardBackup::verify`].
    ///
    /// # Errors
    /// See [`RestoreFileError`]. The new file is of no use then.
    pub async fn restore(
        &mut self,
        to: &ShardOptions,
        destroyed: &Destroyed,
        mut each: impl FnMut(&EntityRow) + Send,
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<ShardRead, RestoreFileError> {
        let spec = to.spec();
        let mut connection = spec.begin_build().await?;
        let mut walk = Walk::new(&self.file);
        let mut index = Index::default();
        while let Some(new) = walk.entities(&mut self.file, destroyed).await? {
            let rows: Vec<&EntityRow> = new.iter().collect();
            let written = statements::insert_entities(&mut connection, &rows).await;
            written.map_err(|error| spec.read_failed(error))?;
            new.iter().for_each(&mut each);
        }
        while let Some(rows) = walk.page(&mut self.file).await? {
            let written = statements::insert_copied(&mut connection, &rows).await;
            written.map_err(|error| spec.read_failed(error))?;
            index.note(&rows);
            if index.rows.len() >= INDEX_ROWS {
                index.write(&mut connection).await.map_err(|error| spec.read_failed(error))?;
            }
            progress(walk.read.commits + walk.read.stubs);
        }
        let images = walk.finish(&self.file)?;
        let written = async {
            index.write(&mut connection).await?;
            statements::insert_slots(&mut connection, &images).await
        };
        written.await.map_err(|error| spec.read_failed(error))?;
        let mut digest = Digest::default();
        images.iter().for_each(|image| digest.add_digest(&image.digest));
        let Stored { commits, progress: Progress { next_position, .. } } = self.file.stored;
        let last = next_position - 1;
        let progress = Progress { next_position, mark_position: last, indexed_position: last, digest };
        spec.finish_build(connection, &Stored { commits, progress }).await?;
        Ok(walk.read)
    }

    /// Closes the file.
    pub async fn close(self) {
        // It only read.
        let _ = self.file.connection.close().await;
    }
}

/// Rows that are to be added to the indexes.
#[derive(Default)]
struct Index {
    rows: Vec<TailRow>,
    keys: AppendKeys,
}

impl Index {
    fn note(&mut self, rows: &[StoredRow]) {
        for StoredRow { eid, row, .. } in rows {
            self.rows.push(TailRow { eid: *eid, version: row.version, position: row.position });
            if let Some(append_key) = &row.append_key {
                self.keys.note(*eid, append_key, row.position);
            }
        }
    }

    async fn write(&mut self, connection: &mut SqliteConnection) -> sqlx::Result<()> {
        self.rows.sort_unstable_by_key(|row| (row.eid, row.version));
        statements::insert_index(connection, &self.rows).await?;
        let keys = std::mem::take(&mut self.keys);
        statements::insert_keys(connection, &keys.sorted_with(&AppendKeys::default())).await?;
        self.rows.clear();
        Ok(())
    }
}

/// An entity on the way.
struct Seen {
    next_version: u64,
    /// As far as the backup or the caller knows.
    is_erased: bool,
}

/// A way through all rows of a copy.
struct Walk {
    /// The slots as the rows that were passed make them.
    found: Vec<SlotImage>,
    /// The same with the rows as they are written.
    written: Vec<SlotImage>,
    next_position: u64,
    last_eid: i64,
    seen: HashMap<i64, Seen>,
    read: ShardRead,
}

impl Walk {
    fn new(file: &BackupFile) -> Self {
        let empty = |image: &SlotImage| SlotImage { next_seq: 1, len: 0, digest: Digest::default(), ..*image };
        let found: Vec<SlotImage> = file.images.iter().map(empty).collect();
        Walk {
            written: found.clone(),
            found,
            next_position: 1,
            last_eid: 0,
            seen: HashMap::new(),
            read: ShardRead::default(),
        }
    }

    /// The next entities, as they are written.
    async fn entities(
        &mut self,
        file: &mut BackupFile,
        destroyed: &Destroyed,
    ) -> Result<Option<Vec<EntityRow>>, CopyError> {
        let query = sqlx::query("SELECT * FROM entity WHERE eid > ? ORDER BY eid LIMIT 0 + ?").bind(self.last_eid);
        let rows = query.bind(PAGE_ROWS).fetch_all(&mut file.connection).await;
        let mut page = Vec::new();
        for row in rows.map_err(|error| CopyError::of(&file.path, error))? {
            let entity = EntityRow::from_row(&row).map_err(|error| CopyError::of(&file.path, error))?;
            let after = self.last_eid;
            let damaged = || file.damaged(format!("the row of the entity that follows number {after} is damaged"));
            let entity = entity.ok_or_else(damaged)?;
            self.last_eid = entity.eid;
            let erased_at_us = entity.erased_at_us.or_else(|| destroyed.get(&entity.key_id).copied());
            self.read.entities += 1;
            self.read.erased += u64::from(erased_at_us.is_some());
            self.read.erased_again += u64::from(erased_at_us.is_some() && entity.erased_at_us.is_none());
            self.seen.insert(entity.eid, Seen { next_version: 1, is_erased: erased_at_us.is_some() });
            page.push(match erased_at_us {
                Some(at_us) => entity.erased(at_us),
                None => entity,
            });
        }
        Ok((!page.is_empty()).then_some(page))
    }

    /// The next rows, as they are written.
    async fn page(&mut self, file: &mut BackupFile) -> Result<Option<Vec<StoredRow>>, CopyError> {
        let end = file.next_position();
        if self.next_position >= end {
            return Ok(None);
        }
        let page = Page::read(&mut file.connection, self.next_position - 1, end, PAGE_ROWS).await;
        let page = page.map_err(|error| CopyError::of(&file.path, error))?;
        if page.rows.is_empty() {
            return Err(file.damaged(format!("the row at position {} is missing", self.next_position)));
        }
        let mut rows = Vec::with_capacity(page.rows.len());
        for row in page.rows {
            let sound =
                row.map_err(|bad| file.damaged(format!("the row at position {} {}", bad.position, bad.detail)))?;
            rows.push(self.take(file, sound)?);
        }
        Ok(Some(rows))
    }

    fn take(&mut self, file: &BackupFile, sound: SoundRow) -> Result<StoredRow, CopyError> {
        let SoundRow { entity, row, hash } = sound;
        let position = row.position;
        let bad = |detail: &str| file.damaged(format!("the row at position {position} {detail}"));
        let index = slots::index(row.slot, file.shards);
        let is_next = |image: &&mut SlotImage| image.slot == row.slot && image.next_seq == row.seq;
        let Some(found) = self.found.get_mut(index).filter(is_next) else { return Err(bad("is out of place")) };
        if position != self.next_position || row.slot != entity.slot || row.count == 0 {
            return Err(bad("is out of place"));
        }
        let seen = self.seen.get_mut(&entity.eid).filter(|seen| seen.next_version == row.version);
        let Some(seen) = seen else { return Err(bad("is out of place in its entity")) };
        seen.next_version += u64::from(row.count);
        self.next_position += 1;
        add(found, &hash);
        let (row, hash) = match (row.is_stub(), seen.is_erased) {
            (true, false) => return Err(bad("is empty, and its entity was not erased")),
            (true, true) => {
                self.read.stubs += 1;
                (row, hash)
            }
            (false, true) => {
                self.read.stubs += 1;
                self.read.stubs_again += 1;
                let stub = row.stub();
                let hash = RowHash::of(&stub.fields(&entity));
                (stub, hash)
            }
            (false, false) => {
                self.read.commits += 1;
                self.read.events += u64::from(row.count);
                self.read.bytes += row.body.len() as u64;
                (row, hash)
            }
        };
        if let Some(written) = self.written.get_mut(index) {
            add(written, &hash);
        }
        Ok(StoredRow { eid: entity.eid, row, checksum: hash.checksum() })
    }

    /// Compares what was found with what the file says. Returns the slots as they are written.
    fn finish(&self, file: &BackupFile) -> Result<Vec<SlotImage>, CopyError> {
        let differs = |(found, said): (&SlotImage, &SlotImage)| (found != said).then_some(said.slot);
        let bad: BTreeSet<_> = self.found.iter().zip(&file.images).filter_map(differs).collect();
        match bad.first() {
            Some(slot) => {
                let (count, slots) = (bad.len(), if bad.len() == 1 { "slot" } else { "slots" });
                Err(file.damaged(format!("{count} {slots} do not have the rows that were copied; the first is {slot}")))
            }
            None => Ok(self.written.clone()),
        }
    }
}

fn add(image: &mut SlotImage, hash: &RowHash) {
    image.next_seq += 1;
    image.len += 1;
    image.digest.add(hash);
}
