//! A shard: one SQLite file, one writer, a few readers.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
};

use futures_util::TryStreamExt;
use ractor::ActorCell;
use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use crate::{
    Budget, CommitError, CopyId, DiskId, EntityHash, EntityRow, Epoch, FileOptions, NotWritten, OpenError, ReadError,
    Slot, StatsView, Submission,
    book::{Book, Progress},
    database::Database,
    log_book::{LogBook, LogEntry},
    open::FileSpec,
    row_hash::{RowFields, RowHash},
    schema::Role,
    slots::{self, SlotImage},
    sqlite,
    tail::{SharedTail, TailRow},
    writer::WriterMessage,
};

/// What it takes to open a shard.
#[derive(Clone, Debug)]
pub struct ShardOptions {
    /// The number of the shard.
    pub number: u16,
    /// How many shards the store has; fixed at creation.
    pub shards: u16,
    /// The store's data directory.
    pub directory: std::path::PathBuf,
    /// The data directory's identity.
    pub disk_id: DiskId,
    /// How files are opened.
    pub file: FileOptions,
    /// How many bytes may wait for the disk.
    pub queue_bytes_max: usize,
}

impl ShardOptions {
    fn spec(&self) -> FileSpec {
        FileSpec {
            path: self.directory.join(file_name(self.number)),
            role: Role::Shard(self.number),
            disk_id: self.disk_id,
            options: self.file.clone(),
        }
    }
}

/// The file of shard `number`.
pub(crate) fn file_name(number: u16) -> String {
    format!("shard-{number:03}.db")
}

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

/// An open shard. Cheap to clone.
#[derive(Clone)]
pub struct Shard {
    inner: Arc<Inner>,
}

struct Inner {
    number: u16,
    database: Database<LogBook>,
    tail: SharedTail,
    budget: Arc<Budget>,
    next_eid: AtomicI64,
}

impl Shard {
    /// Makes the file of a new shard, with a token for each of its slots.
    ///
    /// # Errors
    /// The file exists or cannot be written.
    pub async fn create(options: &ShardOptions) -> Result<(), OpenError> {
        let images: Vec<SlotImage> = slots::slots_of(options.number, options.shards).map(SlotImage::genesis).collect();
        options.spec().create(async |connection| slots::store(connection, images.iter()).await).await
    }

    /// Opens the shard and starts its writer under `supervisor`.
    ///
    /// # Errors
    /// Whatever makes the file unfit to be served; it is left as it was.
    pub async fn open(options: &ShardOptions, supervisor: ActorCell) -> Result<Self, OpenError> {
        let spec = options.spec();
        let file = sqlite::file_name(&spec.path);
        let mut inspected = spec.inspect().await?;
        let (commits, progress) = (inspected.stored.commits, inspected.stored.progress);
        let loaded = load(&spec, options, &mut inspected.connection, &progress, &file).await;
        let witnessed = inspected.witnessed;
        inspected.close().await;
        let (book, next_eid) = loaded?;
        let tail = book.tail();
        if witnessed.is_some_and(|digest| digest != book.progress().digest) {
            return Err(spec.damaged("the digest of its rows is not the one in its watermark"));
        }
        let database = Database::open(&spec, commits, book, supervisor).await?;
        let inner = Inner {
            number: options.number,
            database,
            tail,
            budget: Budget::new(options.queue_bytes_max),
            next_eid: AtomicI64::new(next_eid),
        };
        Ok(Shard { inner: Arc::new(inner) })
    }

    /// The number of the shard.
    pub fn number(&self) -> u16 {
        self.inner.number
    }

    /// The name of the file, for messages.
    pub fn file(&self) -> &str {
        &self.inner.database.file
    }

    /// Bounds the bytes that wait for the disk. Take a permit before submitting, and drop it when settled.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.inner.budget
    }

    /// A number for a new entity, never given before. One that is not used is no loss.
    pub fn allocate_eid(&self) -> i64 {
        self.inner.next_eid.fetch_add(1, Relaxed)
    }

    /// Hands `submission` to the writer. It is settled in the order of submission, once.
    pub fn submit(&self, submission: Submission) {
        let message = WriterMessage::Submit(LogEntry::from(submission));
        if let Err(ractor::MessagingErr::SendErr(WriterMessage::Submit(entry))) =
            self.inner.database.writer.cast(message)
        {
            entry.refuse(CommitError::NotWritten(NotWritten::Stopping));
        }
    }

    /// Numbers about the writer.
    pub fn stats(&self) -> StatsView {
        self.inner.database.stats()
    }

    /// The entity with this hash, if it was ever written.
    ///
    /// # Errors
    /// The file cannot be read, or the row is damaged.
    pub async fn find_entity(&self, copy: CopyId, id_hash: EntityHash) -> Result<Option<EntityRow>, ReadError> {
        self.check_readable()?;
        let row = sqlx::query("SELECT * FROM entity WHERE copy = ? AND id_hash = ?")
            .bind(copy.0.to_vec())
            .bind(id_hash.0.to_vec())
            .fetch_optional(&self.inner.database.readers)
            .await
            .map_err(|error| self.read_error(error))?;
        let Some(row) = row else { return Ok(None) };
        let entity = EntityRow::from_row(&row).map_err(|error| self.read_error(error))?;
        entity.map(Some).ok_or_else(|| self.bad_row(0, "the row of an entity does not match its checksum"))
    }

    /// Commits of `entity` whose first version is above `after`, oldest first, at most `rows_max` of them.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn read_log(&self, entity: &EntityRow, after: u64, rows_max: u32) -> Result<Vec<LogRow>, ReadError> {
        self.check_readable()?;
        // The tail first: what moves from it to the index meanwhile is found there.
        let tail = self.inner.tail.read().after(entity.eid, after);
        let rows = sqlx::query(
            "SELECT log.* FROM log_index CROSS JOIN log ON log.position = log_index.position
             WHERE log_index.eid = ? AND log_index.version > ? ORDER BY log_index.version LIMIT ?",
        )
        .bind(entity.eid)
        .bind(after.cast_signed())
        .bind(rows_max)
        .fetch_all(&self.inner.database.readers)
        .await
        .map_err(|error| self.read_error(error))?;
        let mut rows = rows.iter().map(|row| self.log_row(row, entity)).collect::<Result<Vec<LogRow>, _>>()?;
        let last = rows.last().map_or(after, |row| row.version);
        let room = (rows_max as usize).saturating_sub(rows.len());
        let behind: Vec<u64> =
            tail.iter().filter(|row| row.version > last).take(room).map(|row| row.position).collect();
        if let Some(first) = behind.first() {
            let found = self.read_positions(entity, &behind).await?;
            if found.len() != behind.len() {
                return Err(self.bad_row(*first, "it or a later one that was committed is not there"));
            }
            rows.extend(found);
        }
        Ok(rows)
    }

    /// The rows at `positions`, which are those of `entity`, in the order of versions.
    async fn read_positions(&self, entity: &EntityRow, positions: &[u64]) -> Result<Vec<LogRow>, ReadError> {
        let list: Vec<String> = positions.iter().map(u64::to_string).collect();
        let rows = sqlx::query(
            "SELECT log.* FROM json_each(?) AS wanted CROSS JOIN log ON log.position = wanted.value ORDER BY log.version",
        )
        .bind(format!("[{}]", list.join(",")))
        .fetch_all(&self.inner.database.readers)
        .await
        .map_err(|error| self.read_error(error))?;
        rows.iter().map(|row| self.log_row(row, entity)).collect()
    }

    /// The first version of the newest commit that begins at or below `version`; 0 if there is none.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn commit_before(&self, entity: &EntityRow, version: u64) -> Result<u64, ReadError> {
        self.check_readable()?;
        if let Some(row) = self.inner.tail.read().at_or_below(entity.eid, version) {
            return Ok(row.version);
        }
        let row = sqlx::query("SELECT coalesce(max(version), 0) FROM log_index WHERE eid = ? AND version <= ?")
            .bind(entity.eid)
            .bind(i64::try_from(version).unwrap_or(i64::MAX))
            .fetch_one(&self.inner.database.readers)
            .await;
        row.and_then(|row| row.try_get::<i64, _>(0)).map(i64::cast_unsigned).map_err(|error| self.read_error(error))
    }

    /// Entities in the order of their numbers, above `after`, at most `rows_max` of them. A damaged row stands as its number alone.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn entities(&self, after: i64, rows_max: u32) -> Result<Vec<Result<EntityRow, i64>>, ReadError> {
        self.check_readable()?;
        let rows = sqlx::query("SELECT * FROM entity WHERE eid > ? ORDER BY eid LIMIT ?")
            .bind(after)
            .bind(rows_max)
            .fetch_all(&self.inner.database.readers)
            .await
            .map_err(|error| self.read_error(error))?;
        let read = |row: &SqliteRow| -> sqlx::Result<Result<EntityRow, i64>> {
            let eid = row.try_get("eid")?;
            Ok(EntityRow::from_row(row)?.ok_or(eid))
        };
        rows.iter().map(|row| read(row).map_err(|error| self.read_error(error))).collect()
    }

    /// Stops the writer: what was submitted is written first, then the file is closed.
    pub async fn stop(&self) {
        self.inner.database.stop().await;
    }

    pub(crate) fn database(&self) -> &Database<LogBook> {
        &self.inner.database
    }

    fn check_readable(&self) -> Result<(), ReadError> {
        if self.inner.database.stats.suspect.load(Relaxed) {
            return Err(ReadError::Closed { file: self.inner.database.file.to_string() });
        }
        Ok(())
    }

    pub(crate) fn read_error(&self, source: sqlx::Error) -> ReadError {
        self.inner.database.read_error(source)
    }

    pub(crate) fn bad_row(&self, position: u64, detail: impl Into<String>) -> ReadError {
        ReadError::BadRow { file: self.inner.database.file.to_string(), position, detail: detail.into() }
    }

    fn log_row(&self, row: &SqliteRow, entity: &EntityRow) -> Result<LogRow, ReadError> {
        let (row, hash, checksum) = parse(row, entity).map_err(|error| self.read_error(error))?;
        if hash.checksum() != checksum {
            return Err(self.bad_row(row.position, "it does not match its checksum"));
        }
        Ok(row)
    }
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

/// Reads the slots as of the mark and folds in the rows behind it.
async fn load(
    spec: &FileSpec,
    options: &ShardOptions,
    connection: &mut SqliteConnection,
    progress: &Progress,
    file: &Arc<str>,
) -> Result<(LogBook, i64), OpenError> {
    let loaded =
        slots::load(connection, options.number, options.shards).await.map_err(|error| spec.read_failed(error))?;
    let mut images = loaded.map_err(|detail| spec.damaged(detail))?;
    let tail = SharedTail::default();
    let dirty = fold_tail(spec, connection, progress, &mut images, options.shards, &tail).await?;
    let mut digest = crate::Digest::default();
    images.iter().for_each(|image| digest.add_digest(&image.digest));
    if digest != progress.digest {
        return Err(spec.damaged("the digest of its rows is not the one that was committed"));
    }
    let row = sqlx::query("SELECT coalesce(max(eid), 0) FROM entity").fetch_one(connection).await;
    let newest: i64 = row.and_then(|row| row.try_get(0)).map_err(|error| spec.read_failed(error))?;
    Ok((LogBook::new(file.clone(), options.shards, images, dirty, *progress, tail), newest + 1))
}

async fn fold_tail(
    spec: &FileSpec,
    connection: &mut SqliteConnection,
    progress: &Progress,
    images: &mut [SlotImage],
    shards: u16,
    tail: &SharedTail,
) -> Result<BTreeSet<usize>, OpenError> {
    let mut dirty = BTreeSet::new();
    let mut next = progress.mark_position + 1;
    let mut rows = sqlx::query(
        "SELECT log.position, log.slot, log.seq, log.eid, log.version, log.count, log.at, log.epoch, log.append_key, log.body, log.checksum,
                entity.id_hash, entity.key_id
         FROM log LEFT JOIN entity USING (eid) WHERE position > ? ORDER BY position",
    )
    .bind(progress.mark_position.cast_signed())
    .fetch(connection);
    while let Some(row) = rows.try_next().await.map_err(|error| spec.read_failed(error))? {
        let eid: i64 = row.try_get("eid").map_err(|error| spec.read_failed(error))?;
        let (row, hash, checksum) = parse_tail(&row).map_err(|error| spec.read_failed(error))?;
        let index = slots::index(row.slot, shards);
        let image = images.get_mut(index).filter(|image| image.slot == row.slot && image.next_seq == row.seq);
        let (Some(image), true, true) = (image, hash.checksum() == checksum, row.position == next) else {
            return Err(spec.damaged(format!("the row at position {next} is damaged or missing")));
        };
        image.next_seq += 1;
        image.len += 1;
        image.digest.add(&hash);
        dirty.insert(index);
        if row.position > progress.indexed_position {
            tail.write().extend([TailRow { eid, version: row.version, position: row.position }]);
        }
        next += 1;
    }
    if next != progress.next_position {
        return Err(spec.damaged(format!("its log ends before position {next}, expected {}", progress.next_position)));
    }
    Ok(dirty)
}

fn parse_tail(row: &SqliteRow) -> sqlx::Result<(LogRow, RowHash, i64)> {
    // Only hash and key matter for a row's hash; the rest of the entity is looked at when it is used.
    let bytes = |name| -> sqlx::Result<[u8; 16]> {
        let found: Vec<u8> = row.try_get(name)?;
        found.try_into().map_err(|_| sqlx::Error::Decode("16 bytes expected".into()))
    };
    let entity = EntityRow {
        eid: 0,
        copy: CopyId::GENESIS,
        slot: Slot::new(0),
        kind: "".into(),
        id_hash: EntityHash(bytes("id_hash")?),
        sealed_id: Vec::new(),
        key_id: bytes("key_id")?,
        created_at_us: 0,
        erased_at_us: None,
    };
    parse(row, &entity)
}

/// Whether the shard's file exists in `directory`.
pub(crate) fn exists(directory: &Path, number: u16) -> bool {
    directory.join(file_name(number)).exists()
}
