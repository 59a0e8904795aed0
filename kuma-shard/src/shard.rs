//! A shard: one SQLite file, one writer, a few readers.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use futures_util::TryStreamExt;
use parking_lot::Mutex;
use ractor::ActorCell;
use sqlx::{Row, SqliteConnection, SqlitePool, sqlite::SqliteRow};
use tokio::sync::{oneshot, watch};

use crate::{
    Budget, CommitError, CopyId, DiskId, EntityHash, EntityRow, FileOptions, LogRow, NotWritten, OpenError, Slot,
    StatsView, Submission,
    append_keys::AppendKeys,
    book::{Book, Progress},
    database::Database,
    log_book::LogBook,
    log_entry::LogEntry,
    log_row,
    open::FileSpec,
    row_hash::RowHash,
    schema::Role,
    slots::{self, SharedSlots, SlotImage},
    sqlite, statements,
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
    /// Whether a new store owns all slots. In a cluster that others founded it owns none.
    pub owns_slots: bool,
}

impl ShardOptions {
    pub(crate) fn spec(&self) -> FileSpec {
        FileSpec {
            path: self.directory.join(file_name(self.number)),
            role: Role::Shard(self.number),
            disk_id: self.disk_id,
            options: self.file.clone(),
        }
    }
}

/// Connections that read the log for subscriptions and projections.
const FEEDERS: u32 = 2;

/// The file of shard `number`.
pub(crate) fn file_name(number: u16) -> String {
    format!("shard-{number:03}.db")
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
    slots: SharedSlots,
    shards: u16,
    end: watch::Receiver<u64>,
    /// Connections for whoever reads the log in its order.
    feeders: SqlitePool,
    budget: Arc<Budget>,
    next_eid: Mutex<i64>,
}

impl Shard {
    /// Makes the file of a new shard, with a token for each of its slots.
    ///
    /// # Errors
    /// The file exists or cannot be written.
    pub async fn create(options: &ShardOptions) -> Result<(), OpenError> {
        let images: Vec<SlotImage> = slots::slots_of(options.number, options.shards)
            .map(|slot| SlotImage::new(slot, options.owns_slots))
            .collect();
        options.spec().create(async |connection| statements::insert_slots(connection, &images).await).await
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
        let (tail, slots, end) = (book.tail(), book.shared_slots(), book.end());
        if witnessed.is_some_and(|digest| digest != book.progress().digest) {
            return Err(spec.damaged("the digest of its rows is not the one in its watermark"));
        }
        let database = Database::open(&spec, commits, book, supervisor).await?;
        let inner = Inner {
            number: options.number,
            database,
            tail,
            slots,
            shards: options.shards,
            end,
            feeders: sqlite::reader_pool(&spec.path, &spec.options, FEEDERS),
            budget: Budget::new(options.queue_bytes_max),
            next_eid: Mutex::new(next_eid),
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
    #[cfg(test)]
    pub(crate) fn allocate_eid(&self) -> i64 {
        let mut next = self.inner.next_eid.lock();
        *next += 1;
        *next - 1
    }

    /// Hands the first commit of a new entity to the writer: `submission` makes it, given a number for the entity that was never given
    /// before. Rows of entities are written in the order of their numbers, so that none ever moves.
    pub fn submit_new(&self, submission: impl FnOnce(i64) -> Submission) {
        self.number_next(|eid| self.submit(submission(eid)));
    }

    /// Gives the next number out, before anybody else is given one.
    pub(crate) fn number_next(&self, hand_in: impl FnOnce(i64)) {
        self.number_many(1, hand_in);
    }

    /// Gives the first of so many numbers out, before anybody else is given one.
    pub(crate) fn number_many(&self, count: i64, hand_in: impl FnOnce(i64)) {
        let mut next = self.inner.next_eid.lock();
        let eid = *next;
        *next += count;
        hand_in(eid);
    }

    /// Writes the row of an entity that has no commits: the next life of one that was erased. It is given a number here.
    ///
    /// # Errors
    /// It was not written, or that is unknown; a conflict says that there is this life of the entity already.
    pub async fn create_entity(&self, row: EntityRow) -> Result<(), CommitError> {
        let (told, settled) = oneshot::channel();
        self.number_next(|eid| {
            // A caller that is gone does not want to know.
            self.hand_in(LogEntry::create(EntityRow { eid, ..row }, Box::new(move |result| drop(told.send(result)))));
        });
        settled.await.map_err(|_| NotWritten::Stopping)?
    }

    /// Copies the log into the database and cuts it to nothing, so that what was deleted before is in no file. Commits go on meanwhile,
    /// but for the rest that is copied between two of them.
    ///
    /// # Errors
    /// A reader was in the way for too long, or the disk refused. Deleted bytes may still be in the log; try again.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn truncate_log(&self) -> Result<(), CommitError> {
        self.inner.database.truncate_log().await
    }

    /// Hands `submission` to the writer. It is settled in the order of submission, once.
    pub fn submit(&self, submission: Submission) {
        self.hand_in(LogEntry::from(submission));
    }

    pub(crate) fn hand_in(&self, entry: LogEntry) {
        let message = WriterMessage::Submit(entry);
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

    /// Stops the writer: what was submitted is written first, then the file is closed.
    pub async fn stop(&self) {
        self.inner.feeders.close().await;
        self.inner.database.stop().await;
    }

    pub(crate) fn database(&self) -> &Database<LogBook> {
        &self.inner.database
    }

    /// The last position of the log that is durable: it changes with each commit, and ends with the writer.
    pub fn end(&self) -> watch::Receiver<u64> {
        self.inner.end.clone()
    }

    pub(crate) fn feeders(&self) -> &SqlitePool {
        &self.inner.feeders
    }

    pub(crate) fn shared_slots(&self) -> &SharedSlots {
        &self.inner.slots
    }

    /// The slot as of the last durable commit, if it is of this shard.
    pub(crate) fn slot_image(&self, slot: Slot) -> Option<SlotImage> {
        let images = self.inner.slots.read();
        images.get(slots::index(slot, self.inner.shards)).filter(|image| image.slot == slot).copied()
    }

    pub(crate) fn tail(&self) -> &SharedTail {
        &self.inner.tail
    }
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
            let mut keys = AppendKeys::default();
            if let Some(append_key) = &row.append_key {
                keys.note(eid, append_key, row.position);
            }
            tail.write().extend([TailRow { eid, version: row.version, position: row.position }], keys);
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
        copy: CopyId::LIVE,
        slot: Slot::new(0),
        kind: "".into(),
        id_hash: EntityHash(bytes("id_hash")?),
        life: 1,
        sealed_id: Vec::new(),
        key_id: bytes("key_id")?,
        created_at_us: 0,
        erased_at_us: None,
    };
    log_row::parse(row, &entity)
}

/// Whether the shard's file exists in `directory`.
pub(crate) fn exists(directory: &Path, number: u16) -> bool {
    directory.join(file_name(number)).exists()
}
