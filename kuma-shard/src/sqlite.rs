//! How Kuma opens SQLite files, and how it reads SQLite's errors.
//!
//! Invariants:
//! - Every connection to a file is opened here, with the pragmas of its role.
//! - A transaction is driven by plain statements: after ENOSPC or an I/O error sqlx's own transaction depth is stuck for ever.

use std::{path::Path, sync::Arc, time::Duration};

use sqlx::{
    ConnectOptions, Connection, Row,
    sqlite::{
        SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
    },
};

/// What an acknowledgement means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// `synchronous = FULL`: an acknowledged commit survives power loss. The default.
    #[default]
    Full,
    /// `synchronous = NORMAL`: an acknowledged commit survives the death of the process, **not** power loss. After such a loss the
    /// file is behind its watermark and does not open until it is restored. For data that can be lost, and as the control of the
    /// power-loss tests.
    Normal,
}

impl Durability {
    /// The mode as it is printed at start and beside each benchmark figure.
    pub fn as_str(self) -> &'static str {
        match self {
            Durability::Full => "full",
            Durability::Normal => "normal (acknowledged events may be lost with the power)",
        }
    }
}

/// How files are opened; the same for all files of a store.
#[derive(Clone, Debug, Default)]
pub struct FileOptions {
    /// What an acknowledgement means.
    pub durability: Durability,
    /// The SQLite VFS to use instead of the default one. For fault injection.
    pub vfs: Option<String>,
    /// Leaves what is deleted in the files. For the control of a test that looks for it there.
    pub keep_deleted_bytes: bool,
}

pub(crate) const PAGE_BYTES: u64 = 4096;
const WRITER_CACHE_KIB: u32 = 16_000;
const READER_CACHE_KIB: u32 = 2_000;
const JOURNAL_BYTES_MAX: u64 = 64 << 20;
/// How long a statement waits for a lock. Only a TRUNCATE checkpoint ever meets one: there is one writer.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

fn options(path: &Path, file: &FileOptions) -> SqliteConnectOptions {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(false)
        .pragma("temp_store", "MEMORY")
        .pragma("mmap_size", "0")
        .pragma("trusted_schema", "OFF")
        .pragma("cell_size_check", "ON")
        .disable_statement_logging();
    match &file.vfs {
        Some(vfs) => options.vfs(vfs.clone()),
        None => options,
    }
}

/// The one connection that writes.
pub(crate) async fn connect_writer(path: &Path, file: &FileOptions, create: bool) -> sqlx::Result<SqliteConnection> {
    let synchronous = match file.durability {
        Durability::Full => SqliteSynchronous::Full,
        Durability::Normal => SqliteSynchronous::Normal,
    };
    let options = options(path, file)
        .create_if_missing(create)
        .page_size(PAGE_BYTES as u32)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(synchronous)
        // The checkpointer does it, off the path of acknowledgements: an inline checkpoint is 75-100 ms of p99.
        .pragma("wal_autocheckpoint", "0")
        .pragma("journal_size_limit", JOURNAL_BYTES_MAX.to_string())
        // From the first day: page balancing would leave stale copies of cells behind that no later erasure reaches.
        .pragma("secure_delete", if file.keep_deleted_bytes { "OFF" } else { "ON" })
        .pragma("cache_size", format!("-{WRITER_CACHE_KIB}"));
    // On macOS a plain fsync does not flush the drive's cache.
    let options = if cfg!(target_os = "macos") {
        options.pragma("fullfsync", "1").pragma("checkpoint_fullfsync", "1")
    } else {
        options
    };
    options.connect().await
}

/// The connection that copies the write-ahead log into the database.
pub(crate) async fn connect_checkpointer(path: &Path, file: &FileOptions) -> sqlx::Result<SqliteConnection> {
    connect_writer(path, file, false).await
}

/// A connection that reads a file before it is trusted. Closing it leaves the log as it is.
pub(crate) async fn connect_inspector(path: &Path, file: &FileOptions) -> sqlx::Result<SqliteConnection> {
    options(path, file).read_only(true).connect().await
}

/// The connection that writes a file of a backup, or reads it. A rollback journal instead of a log: what is finished is one file, which can
/// be read where nothing may be written. `EXTRA`, because in this mode `FULL` may take the last transaction back after a power loss.
/// <https://sqlite.org/pragma.html#pragma_synchronous>
pub(crate) async fn connect_backup(path: &Path, create: bool) -> sqlx::Result<SqliteConnection> {
    options(path, &FileOptions::default())
        .create_if_missing(create)
        .page_size(PAGE_BYTES as u32)
        .journal_mode(SqliteJournalMode::Delete)
        .synchronous(SqliteSynchronous::Extra)
        .pragma("secure_delete", "ON")
        .pragma("cache_size", format!("-{WRITER_CACHE_KIB}"))
        .connect()
        .await
}

/// The connection that makes a new file which is thrown away if that fails: nothing is synced and nothing can be taken back.
pub(crate) async fn connect_builder(path: &Path) -> sqlx::Result<SqliteConnection> {
    options(path, &FileOptions::default())
        .create_if_missing(true)
        .page_size(PAGE_BYTES as u32)
        .journal_mode(SqliteJournalMode::Off)
        .synchronous(SqliteSynchronous::Off)
        .pragma("cache_size", format!("-{}", 4 * WRITER_CACHE_KIB))
        .connect()
        .await
}

/// A few connections that only read. They open on demand.
pub(crate) fn reader_pool(path: &Path, file: &FileOptions, connections: u32) -> SqlitePool {
    let options =
        options(path, file).read_only(true).row_buffer_size(1024).pragma("cache_size", format!("-{READER_CACHE_KIB}"));
    SqlitePoolOptions::new()
        .max_connections(connections)
        .test_before_acquire(false)
        .idle_timeout(None)
        .max_lifetime(None)
        .acquire_timeout(Duration::from_secs(30))
        .connect_lazy_with(options)
}

/// What a checkpoint did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checkpointed {
    /// Another connection was in the way.
    pub(crate) busy: bool,
    /// Pages in the log.
    pub(crate) log_pages: u64,
    /// Pages of them that are in the database too.
    pub(crate) copied_pages: u64,
}

/// The modes of a checkpoint that are used here. <https://sqlite.org/pragma.html#pragma_wal_checkpoint>
#[derive(Clone, Copy, Debug)]
pub(crate) enum CheckpointMode {
    /// Only report.
    Noop,
    /// Copy what can be copied without waiting for anyone.
    Passive,
    /// Copy everything and cut the log to nothing.
    Truncate,
}

pub(crate) async fn checkpoint(connection: &mut SqliteConnection, mode: CheckpointMode) -> sqlx::Result<Checkpointed> {
    let sql = match mode {
        CheckpointMode::Noop => "PRAGMA wal_checkpoint(NOOP)",
        CheckpointMode::Passive => "PRAGMA wal_checkpoint(PASSIVE)",
        CheckpointMode::Truncate => "PRAGMA wal_checkpoint(TRUNCATE)",
    };
    let row = sqlx::query(sql).fetch_one(connection).await?;
    // -1 where there is no log yet.
    let pages = |index| row.try_get::<i64, _>(index).map(|pages| pages.max(0).unsigned_abs());
    Ok(Checkpointed { busy: row.try_get::<i64, _>(0)? != 0, log_pages: pages(1)?, copied_pages: pages(2)? })
}

/// A TRUNCATE checkpoint that does not wait for readers.
pub(crate) async fn truncate_at_once(connection: &mut SqliteConnection) -> sqlx::Result<Checkpointed> {
    sqlx::query("PRAGMA busy_timeout = 10").execute(&mut *connection).await?;
    let done = checkpoint(connection, CheckpointMode::Truncate).await;
    // Whatever became of it.
    let restore = format!("PRAGMA busy_timeout = {}", BUSY_TIMEOUT.as_millis());
    sqlx::query(sqlx::AssertSqlSafe(restore)).execute(connection).await?;
    done
}

/// What kind of trouble an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    DiskFull,
    /// No space for the index of the log (the `-shm` file). Unlike [`Trouble::DiskFull`] it can strike a commit whose pages are
    /// written and synced already.
    IndexFull,
    ReadOnly,
    Corrupt,
    Constraint,
    /// Everything else: the disk, a lock, a lost connection.
    Io,
}

/// Reads an error by SQLite's primary result code. <https://sqlite.org/rescode.html>
pub(crate) fn trouble(error: &sqlx::Error) -> Trouble {
    let code = match error {
        sqlx::Error::Database(error) => error.code().and_then(|code| code.parse::<i32>().ok()),
        // A value that does not have its column's type is damage: every table is STRICT.
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::RowNotFound => Some(11),
        _ => None,
    };
    match code.map(|code| code & 0xff) {
        // SQLITE_IOERR_SHMSIZE
        Some(_) if code == Some(4874) => Trouble::IndexFull,
        Some(13) => Trouble::DiskFull,
        Some(8) => Trouble::ReadOnly,
        // 1 is a generic error: with fixed statements it means that the schema is not the expected one.
        Some(11 | 26 | 1) => Trouble::Corrupt,
        Some(19) => Trouble::Constraint,
        _ => Trouble::Io,
    }
}

/// SQLite's words, without the wrapping.
pub(crate) fn detail(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// The name by which messages call a database.
pub(crate) fn file_name(path: &Path) -> Arc<str> {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default().into()
}

/// Those settings that Kuma wants of the SQLite it is linked with, that SQLite can tell of, and that this build does not have.
///
/// The bundled default shares one page cache under one mutex between all shards and uses fsync where fdatasync is enough:
/// 30-45 % of the speed of row-heavy work on two cores.
///
/// # Errors
/// SQLite could not be asked.
pub async fn missing_build_settings() -> sqlx::Result<Vec<&'static str>> {
    let mut connection = SqliteConnectOptions::new().in_memory(true).connect().await?;
    let rows = sqlx::query("PRAGMA compile_options").fetch_all(&mut connection).await?;
    connection.close().await?;
    let has = |name: &str| rows.iter().any(|row| row.try_get::<String, _>(0).is_ok_and(|option| option == name));
    let mut missing = Vec::new();
    if has("ENABLE_MEMORY_MANAGEMENT") {
        missing.push("-USQLITE_ENABLE_MEMORY_MANAGEMENT");
    }
    if !has("DEFAULT_MEMSTATUS=0") {
        missing.push("-DSQLITE_DEFAULT_MEMSTATUS=0");
    }
    Ok(missing)
}
