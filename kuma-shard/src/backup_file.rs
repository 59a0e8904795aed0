//! A file of a backup: the copy of one shard.
//!
//! Invariants:
//! - Its role is not that of a file which is in use, so that neither can be mistaken for the other.
//! - It is *whole* when it holds the shard's log up to the end of one of its transactions, the entities of then, and slots and digest that add
//!   up. Whole, it goes to the next such state in one transaction: whatever is interrupted, it is one or the other. Only while it is copied
//!   for the first time is it not whole, and then it says so (its mark is 0) and nothing is restored from it.
//! - Rows with sealed bytes are added at the end, or shrunk where they stand (see `schema.rs`). Where an entity is erased, its rows here are
//!   stubs or become stubs.
//! - Closed, it is a single file: its journal is that of rollbacks.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use sqlx::{Connection, Row, SqliteConnection};

use crate::{
    Digest, DiskId, EntityHash, ReadError,
    book::Progress,
    progress::{self, Stored},
    schema::{self, FORMAT, Misfit, Role},
    slots::{self, SlotImage},
    sqlite::{self, Trouble},
    statements,
};

/// Why a file could not be copied into a backup, or read from one. The store that it is of is not affected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The store could not be read.
    #[error("the store cannot be read")]
    Source(#[from] ReadError),
    /// A row of the store is not what was committed. It is not copied: a backup holds what can be read.
    #[error("{file} of the store: the row at position {position} {detail}")]
    DamagedSource {
        /// The name of the store's file.
        file: String,
        /// The row's place.
        position: u64,
        /// Whose it is, if that can be told.
        entity: Option<EntityHash>,
        /// What is wrong with it.
        detail: String,
    },
    /// Entities were given their next lives faster than they could be followed.
    #[error("{file} of the store: entities are restored to earlier versions faster than they can be copied")]
    Unsettled {
        /// The name of the store's file.
        file: String,
    },
    /// The backup holds what the store does not: it is of another history.
    #[error("{path} holds another history than the store ({detail})")]
    OtherHistory {
        /// The file of the backup.
        path: PathBuf,
        /// What differs.
        detail: String,
    },
    /// A file of the backup is not there.
    #[error("{path} is missing")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file of the backup does not hold what was copied to it.
    #[error("{path} is damaged ({detail})")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// A file of the backup belongs elsewhere.
    #[error("{path} is not what it should be ({detail})")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What differs.
        detail: String,
    },
    /// A newer Kuma wrote it.
    #[error("{path} has format {found}, this version of Kuma reads up to {supported}")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format known here.
        supported: u32,
    },
    /// There is no space for the copy.
    #[error("no space left on the disk of {path}")]
    DiskFull {
        /// The file.
        path: PathBuf,
    },
    /// The copy may not be written.
    #[error("{path} is read-only")]
    ReadOnly {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{path} cannot be read or written")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// SQLite refused.
    #[error("{path} cannot be read or written")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: sqlx::Error,
    },
}

impl CopyError {
    /// An error of the file at `path`.
    pub(crate) fn of(path: &Path, source: sqlx::Error) -> Self {
        let path = path.to_owned();
        match sqlite::trouble(&source) {
            Trouble::DiskFull | Trouble::IndexFull => CopyError::DiskFull { path },
            Trouble::ReadOnly => CopyError::ReadOnly { path },
            Trouble::Corrupt | Trouble::Constraint => CopyError::Damaged { path, detail: sqlite::detail(&source) },
            Trouble::Io => CopyError::Sqlite { path, source },
        }
    }

    pub(crate) fn misfit(path: &Path, misfit: Misfit) -> Self {
        let path = path.to_owned();
        match misfit {
            Misfit::Newer(found) => CopyError::Newer { path, found, supported: FORMAT },
            Misfit::Foreign(detail) => CopyError::Foreign { path, detail },
            Misfit::Sqlite(error) => CopyError::of(&path, error),
        }
    }

    pub(crate) fn damaged(path: &Path, detail: impl Into<String>) -> Self {
        CopyError::Damaged { path: path.to_owned(), detail: detail.into() }
    }

    /// Whether a file of the backup itself is not as it was written, so that another backup has to be taken.
    pub fn is_damage(&self) -> bool {
        matches!(self, CopyError::Missing { .. } | CopyError::Damaged { .. } | CopyError::Foreign { .. })
    }
}

/// An open copy of a shard.
pub(crate) struct BackupFile {
    pub(crate) path: PathBuf,
    pub(crate) shards: u16,
    pub(crate) connection: SqliteConnection,
    pub(crate) stored: Stored,
    /// Each slot of the shard, as of the file's rows and those that are being added.
    pub(crate) images: Vec<SlotImage>,
    /// The number of the last entity.
    pub(crate) last_eid: i64,
    /// Slots that are not written as they are in `images`.
    pub(crate) dirty: BTreeSet<usize>,
    /// Whether it is whole, as of its last transaction.
    pub(crate) is_whole: bool,
    /// Whether a transaction is open.
    begun: bool,
}

impl BackupFile {
    /// Opens the copy of a shard in `directory`; it must be there, and whole.
    pub(crate) async fn open(directory: &Path, number: u16, shards: u16, disk_id: DiskId) -> Result<Self, CopyError> {
        let path = directory.join(crate::shard::file_name(number));
        if !path.try_exists().map_err(|source| CopyError::Io { path: path.clone(), source })? {
            return Err(CopyError::Missing { path });
        }
        let connection = sqlite::connect_backup(&path, false).await.map_err(|error| CopyError::of(&path, error))?;
        let file = BackupFile::load(path, number, shards, disk_id, connection).await?;
        if !file.is_whole {
            let error = file.damaged("it was being copied for the first time, and that did not come to its end");
            // It only read.
            let _ = file.connection.close().await;
            return Err(error);
        }
        Ok(file)
    }

    /// Opens the copy of a shard in `directory`, or begins one.
    pub(crate) async fn open_or_create(
        directory: &Path,
        number: u16,
        shards: u16,
        disk_id: DiskId,
    ) -> Result<Self, CopyError> {
        let path = directory.join(crate::shard::file_name(number));
        let fail = |error| CopyError::of(&path, error);
        let mut connection = sqlite::connect_backup(&path, true).await.map_err(fail)?;
        let tables = sqlx::query("SELECT count(*) FROM sqlite_schema").fetch_one(&mut connection).await;
        let tables: i64 = tables.and_then(|row| row.try_get(0)).map_err(fail)?;
        if tables == 0 {
            create(&mut connection, number, shards, disk_id).await.map_err(fail)?;
        }
        BackupFile::load(path, number, shards, disk_id, connection).await
    }

    async fn load(
        path: PathBuf,
        number: u16,
        shards: u16,
        disk_id: DiskId,
        mut connection: SqliteConnection,
    ) -> Result<Self, CopyError> {
        let loaded = read(&path, number, shards, disk_id, &mut connection).await;
        match loaded {
            Ok((stored, images, last_eid)) => Ok(BackupFile {
                is_whole: stored.progress.mark_position + 1 == stored.progress.next_position,
                path,
                shards,
                connection,
                stored,
                images,
                last_eid,
                dirty: BTreeSet::new(),
                begun: false,
            }),
            Err(error) => {
                // It only read.
                let _ = connection.close().await;
                Err(error)
            }
        }
    }

    /// The position of the next row.
    pub(crate) fn next_position(&self) -> u64 {
        self.stored.progress.next_position
    }

    /// Opens a transaction unless one is open.
    pub(crate) async fn begin(&mut self) -> Result<(), CopyError> {
        if !self.begun {
            let begun = sqlx::query("BEGIN IMMEDIATE").execute(&mut self.connection).await;
            begun.map_err(|error| CopyError::of(&self.path, error))?;
            self.begun = true;
        }
        Ok(())
    }

    /// Whether there is anything to commit.
    pub(crate) fn has_changed(&self) -> bool {
        self.begun || !self.dirty.is_empty()
    }

    /// Commits what was added, as of the commit `commits` of the shard; it is whole then or not.
    pub(crate) async fn commit(&mut self, commits: u64, is_whole: bool) -> Result<(), CopyError> {
        let mut digest = Digest::default();
        self.images.iter().for_each(|image| digest.add_digest(&image.digest));
        let next_position = self.stored.progress.next_position;
        let mark_position = if is_whole { next_position - 1 } else { 0 };
        let progress = Progress { next_position, mark_position, indexed_position: mark_position, digest };
        let stored = Stored { commits, progress };
        self.begin().await?;
        let dirty = std::mem::take(&mut self.dirty);
        let written = async {
            let images: Vec<SlotImage> = dirty.iter().filter_map(|index| self.images.get(*index)).copied().collect();
            statements::insert_slots(&mut self.connection, &images).await?;
            statements::commit(&mut self.connection, &stored).await
        };
        written.await.map_err(|error| CopyError::of(&self.path, error))?;
        (self.begun, self.is_whole, self.stored) = (false, is_whole, stored);
        Ok(())
    }

    pub(crate) async fn close(self) -> Result<(), CopyError> {
        self.connection.close().await.map_err(|error| CopyError::of(&self.path, error))
    }

    pub(crate) fn damaged(&self, detail: impl Into<String>) -> CopyError {
        CopyError::damaged(&self.path, detail)
    }
}

async fn create(connection: &mut SqliteConnection, number: u16, shards: u16, disk_id: DiskId) -> sqlx::Result<()> {
    let first = Progress { next_position: 1, mark_position: 0, indexed_position: 0, digest: Digest::default() };
    let images: Vec<SlotImage> = slots::slots_of(number, shards).map(|slot| SlotImage::new(slot, true)).collect();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await?;
    schema::create(connection, Role::ShardBackup(number), disk_id).await?;
    progress::insert(connection, &Stored { commits: 0, progress: first }).await?;
    statements::insert_slots(connection, &images).await?;
    sqlx::query("COMMIT").execute(connection).await.map(|_| ())
}

async fn read(
    path: &Path,
    number: u16,
    shards: u16,
    disk_id: DiskId,
    connection: &mut SqliteConnection,
) -> Result<(Stored, Vec<SlotImage>, i64), CopyError> {
    let checked = schema::check(connection, Role::ShardBackup(number), disk_id).await;
    checked.map_err(|misfit| CopyError::misfit(path, misfit))?;
    let stored = progress::read(connection).await.map_err(|error| CopyError::of(path, error))?;
    let stored = stored.ok_or_else(|| CopyError::damaged(path, "its progress row does not match its checksum"))?;
    let images = slots::load(connection, number, shards).await.map_err(|error| CopyError::of(path, error))?;
    let images = images.map_err(|detail| CopyError::damaged(path, detail))?;
    let mut digest = Digest::default();
    images.iter().for_each(|image| digest.add_digest(&image.digest));
    if digest != stored.progress.digest || stored.progress.next_position == 0 {
        return Err(CopyError::damaged(path, "the digests of its slots do not add up"));
    }
    let row = sqlx::query("SELECT coalesce(max(eid), 0) FROM entity").fetch_one(connection).await;
    let last_eid = row.and_then(|row| row.try_get(0)).map_err(|error| CopyError::of(path, error))?;
    Ok((stored, images, last_eid))
}
