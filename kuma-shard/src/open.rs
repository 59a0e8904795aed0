//! Making and opening a database file.
//!
//! Invariants:
//! - A file is looked at through a read-only connection first, compared with its watermark and with its own sums: closing a
//!   connection that may write would copy what is left of a damaged log into the database and delete the evidence.
//! - Before anything is acknowledged, a TRUNCATE checkpoint has succeeded: after a failed sync and a restart the log may be in the
//!   page cache only.

use std::path::{Path, PathBuf};

use sqlx::{Connection, SqliteConnection};

use crate::{
    Digest, DiskId, FileOptions, OpenError,
    book::Progress,
    progress::{self, Stored},
    schema::{self, FORMAT, Misfit, Role},
    sqlite::{self, CheckpointMode, Trouble},
    watermark::{Found, Mark, WatermarkFile},
};

/// Which file, of which store.
#[derive(Clone, Debug)]
pub(crate) struct FileSpec {
    pub(crate) path: PathBuf,
    pub(crate) role: Role,
    pub(crate) disk_id: DiskId,
    pub(crate) options: FileOptions,
}

/// A file that is this store's and not behind its watermark, before anything in it may be changed.
pub(crate) struct Inspected {
    /// Only reads.
    pub(crate) connection: SqliteConnection,
    /// What the watermark says of the very state that was found, if it names that state.
    pub(crate) witnessed: Option<Digest>,
    pub(crate) stored: Stored,
}

impl Inspected {
    /// Done looking. It only read; there is nothing that a failed close could lose.
    pub(crate) async fn close(self) {
        let _ = self.connection.close().await;
    }
}

/// An open file that is what it should be.
pub(crate) struct Opened {
    pub(crate) connection: SqliteConnection,
    pub(crate) watermark: WatermarkFile,
}

impl FileSpec {
    fn sqlite_error(&self, source: sqlx::Error) -> OpenError {
        let path = self.path.clone();
        match sqlite::trouble(&source) {
            Trouble::DiskFull | Trouble::IndexFull => OpenError::DiskFull { path },
            Trouble::ReadOnly => OpenError::ReadOnly { path },
            Trouble::Corrupt => OpenError::Damaged { path, detail: sqlite::detail(&source) },
            Trouble::Constraint | Trouble::Io => OpenError::Sqlite { path, source },
        }
    }

    pub(crate) fn damaged(&self, detail: impl Into<String>) -> OpenError {
        OpenError::Damaged { path: self.path.clone(), detail: detail.into() }
    }

    fn misfit(&self, misfit: Misfit) -> OpenError {
        let path = self.path.clone();
        match misfit {
            Misfit::Newer(found) => OpenError::Newer { path, found, supported: FORMAT },
            Misfit::Foreign(detail) => OpenError::Foreign { path, detail },
            Misfit::Sqlite(error) => self.sqlite_error(error),
        }
    }

    /// Makes the file with its tables; `fill` adds the first rows in the same transaction.
    pub(crate) async fn create(
        &self,
        fill: impl AsyncFnOnce(&mut SqliteConnection) -> sqlx::Result<()>,
    ) -> Result<(), OpenError> {
        let mut connection =
            sqlite::connect_writer(&self.path, &self.options, true).await.map_err(|error| self.sqlite_error(error))?;
        let first = Progress { next_position: 1, mark_position: 0, indexed_position: 0, digest: Digest::default() };
        let made = async {
            sqlx::query("BEGIN IMMEDIATE").execute(&mut connection).await?;
            schema::create(&mut connection, self.role, self.disk_id).await?;
            progress::insert(&mut connection, &Stored { commits: 0, progress: first }).await?;
            fill(&mut connection).await?;
            sqlx::query("COMMIT").execute(&mut connection).await?;
            sqlite::checkpoint(&mut connection, CheckpointMode::Truncate).await
        }
        .await;
        let closed = connection.close().await;
        made.map_err(|error| self.sqlite_error(error))?;
        closed.map_err(|error| self.sqlite_error(error))?;
        let path = WatermarkFile::path_for(&self.path);
        let mark = Mark { commits: 0, disk_id: self.disk_id, digest: first.digest };
        WatermarkFile::open(&path).and_then(|mut file| file.write(&mark)).map_err(|source| io_error(path, source))
    }

    /// Begins to make a file that is filled in one go and thrown away if that fails. [`FileSpec::finish_build`] ends it.
    pub(crate) async fn begin_build(&self) -> Result<SqliteConnection, OpenError> {
        let mut connection = sqlite::connect_builder(&self.path).await.map_err(|error| self.sqlite_error(error))?;
        let begun = async {
            sqlx::query("BEGIN IMMEDIATE").execute(&mut connection).await?;
            schema::create(&mut connection, self.role, self.disk_id).await
        };
        begun.await.map_err(|error| self.sqlite_error(error))?;
        Ok(connection)
    }

    /// The file holds all that it is to hold, which is `stored`: durable when this returns, with its watermark.
    pub(crate) async fn finish_build(
        &self,
        mut connection: SqliteConnection,
        stored: &Stored,
    ) -> Result<(), OpenError> {
        let made = async {
            progress::insert(&mut connection, stored).await?;
            sqlx::query("COMMIT").execute(&mut connection).await?;
            connection.close().await
        };
        made.await.map_err(|error| self.sqlite_error(error))?;
        // No connection to it is open any more, whose locks this would drop.
        std::fs::File::open(&self.path)
            .and_then(|file| file.sync_all())
            .map_err(|source| io_error(self.path.clone(), source))?;
        let path = WatermarkFile::path_for(&self.path);
        let mark = Mark { commits: stored.commits, disk_id: self.disk_id, digest: stored.progress.digest };
        WatermarkFile::open(&path).and_then(|mut file| file.write(&mark)).map_err(|source| io_error(path, source))
    }

    /// Looks at the file without changing a byte of it: whether it holds all that was acknowledged, as far as its watermark tells.
    pub(crate) async fn inspect(&self) -> Result<Inspected, OpenError> {
        let missing = !self.path.try_exists().map_err(|source| io_error(self.path.clone(), source))?;
        if missing {
            return Err(OpenError::Missing { path: self.path.clone() });
        }
        let watermark_path = WatermarkFile::path_for(&self.path);
        let mark =
            match WatermarkFile::read(&watermark_path).map_err(|source| io_error(watermark_path.clone(), source))? {
                Found::Newest(mark) => mark,
                Found::Missing => return Err(OpenError::NoWatermark { path: watermark_path, state: "missing" }),
                Found::Damaged => return Err(OpenError::NoWatermark { path: watermark_path, state: "damaged" }),
            };
        let mut connection =
            sqlite::connect_inspector(&self.path, &self.options).await.map_err(|error| self.sqlite_error(error))?;
        match self.compare(&mut connection, &mark).await {
            Ok(stored) => {
                let witnessed = (mark.commits == stored.commits).then_some(mark.digest);
                Ok(Inspected { connection, witnessed, stored })
            }
            Err(error) => {
                let _ = connection.close().await;
                Err(error)
            }
        }
    }

    async fn compare(&self, connection: &mut SqliteConnection, mark: &Mark) -> Result<Stored, OpenError> {
        schema::check(connection, self.role, self.disk_id).await.map_err(|misfit| self.misfit(misfit))?;
        let stored = progress::read(connection).await.map_err(|error| self.sqlite_error(error))?;
        let stored = stored.ok_or_else(|| self.damaged("its progress row does not match its checksum"))?;
        if mark.disk_id != self.disk_id {
            let detail = format!("its watermark is of disk id {}", mark.disk_id);
            return Err(OpenError::Foreign { path: self.path.clone(), detail });
        }
        if stored.commits < mark.commits {
            let (found, expected) = (stored.commits, mark.commits);
            return Err(OpenError::BehindWatermark { path: self.path.clone(), found, expected });
        }
        Ok(stored)
    }

    /// Opens the file for writing, after it was inspected.
    pub(crate) async fn open(&self) -> Result<Opened, OpenError> {
        let mut connection =
            sqlite::connect_writer(&self.path, &self.options, false).await.map_err(|error| self.sqlite_error(error))?;
        let truncated = sqlite::checkpoint(&mut connection, CheckpointMode::Truncate).await;
        if truncated.map_err(|error| self.sqlite_error(error))?.busy {
            let source = std::io::Error::other("another connection is in the way of the first checkpoint");
            return Err(io_error(self.path.clone(), source));
        }
        let watermark_path = WatermarkFile::path_for(&self.path);
        let watermark = WatermarkFile::open(&watermark_path).map_err(|source| io_error(watermark_path, source))?;
        Ok(Opened { connection, watermark })
    }

    pub(crate) async fn connect_checkpointer(&self) -> Result<SqliteConnection, OpenError> {
        sqlite::connect_checkpointer(&self.path, &self.options).await.map_err(|error| self.sqlite_error(error))
    }

    pub(crate) fn read_failed(&self, error: sqlx::Error) -> OpenError {
        self.sqlite_error(error)
    }
}

fn io_error(path: PathBuf, source: std::io::Error) -> OpenError {
    match source.kind() {
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => OpenError::ReadOnly { path },
        std::io::ErrorKind::StorageFull => OpenError::DiskFull { path },
        _ => OpenError::Io { path, source },
    }
}

/// For errors about the data directory itself.
pub(crate) fn directory_error(path: &Path, source: std::io::Error) -> OpenError {
    io_error(path.to_owned(), source)
}
