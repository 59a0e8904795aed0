//! The file of a read model: tables of a projection, and how far it has read, committed together.
//!
//! Invariants:
//! - What an event did to the model and that it was applied are one transaction.
//! - It can be made again from the log at any time, so that it is not synced with each transaction: after a power loss it is as it was some
//!   transactions ago, whole, and goes on from there.
//! - What was purged is in no byte of the file or its log when [`ModelFile::purge`] returns. Tables of projections have rows that move, so
//!   that deleting is not enough (docs/adr/0016-rows-that-do-not-move.md): the file is written anew, without its unused space.
//! - Statements of the projection run with the rights that it has, see [`Rights`].

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rusqlite::{
    Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, fallible_iterator::FallibleIterator,
    limits::Limit, types::Value,
};

use crate::{EntityHash, Epoch, FileOptions, Guard, Rights, Slot, sqlite::PAGE_BYTES};

/// The newest format of Kuma's own tables in the file known here.
const MODEL_FORMAT: u32 = 1;
const CACHE_KIB: u32 = 16_000;
const JOURNAL_BYTES_MAX: u64 = 64 << 20;
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// A larger file is written anew by way of a temporary file, not in memory.
const REWRITE_IN_MEMORY_BYTES: u64 = 256 << 20;
/// Prepared statements that are kept.
const STATEMENTS_KEPT: usize = 256;

const SET_META: &str =
    "INSERT INTO kuma_meta(name, value) VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET value = excluded.value";

const TABLES: &str = "
CREATE TABLE kuma_meta(name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE kuma_position(shard INTEGER PRIMARY KEY, position INTEGER NOT NULL, events INTEGER NOT NULL) STRICT;
CREATE TABLE kuma_checkpoint(slot INTEGER PRIMARY KEY, seq INTEGER NOT NULL, epoch INTEGER NOT NULL) STRICT;
CREATE TABLE kuma_migration(number INTEGER PRIMARY KEY, hash TEXT NOT NULL) STRICT;
CREATE TABLE kuma_skipped(
    number INTEGER PRIMARY KEY, at INTEGER NOT NULL, shard INTEGER NOT NULL, position INTEGER NOT NULL, entity TEXT, version INTEGER, why TEXT NOT NULL
) STRICT;
CREATE TABLE kuma_purged(key_id BLOB PRIMARY KEY) STRICT, WITHOUT ROWID;
";

/// Why the file of a read model cannot be used. Nothing that is not in the log is lost with it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A newer Kuma made it.
    #[error("{path} has format {found}, this version of Kuma reads up to {MODEL_FORMAT}; use the newer version")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It is not one.
    #[error("{path} is not the file of a read model ({detail}); delete it, it is built again")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A migration that was executed is not what it was.
    #[error("{path}: migration {number} was changed after it was executed; raise the projection's version instead")]
    MigrationChanged {
        /// The file.
        path: PathBuf,
        /// Which one, counted from 1.
        number: u32,
    },
    /// A migration fails.
    #[error("{path}: migration {number} fails: {cause}")]
    Migration {
        /// The file.
        path: PathBuf,
        /// Which one, counted from 1.
        number: u32,
        /// Why.
        #[source]
        cause: rusqlite::Error,
    },
    /// What an erased entity left cannot be deleted.
    #[error("{path}: what the model holds of an erased entity cannot be deleted: {cause}")]
    Purge {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: rusqlite::Error,
    },
    /// A statement of the projection ended the transaction, and the projection took no notice. Nothing was changed.
    #[error(
        "{path}: a statement of the projection rolled the transaction back (OR ROLLBACK?), and its error was ignored"
    )]
    Ended {
        /// The file.
        path: PathBuf,
    },
    /// A reader held the log open.
    #[error("{path}: a query holds an old state of the log open, so that deleted bytes stay in it; it is tried again")]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// SQLite says no.
    #[error("{path}: {source}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What it says.
        source: rusqlite::Error,
    },
}

/// A life of an entity that is erased, in clear: its rows are found by the id.
#[derive(Clone, PartialEq, Eq)]
pub struct Purged {
    /// The name of its key: the next life has the same id, and another key.
    pub key_id: [u8; 16],
    /// The kind.
    pub kind: Arc<str>,
    /// The id.
    pub id: Arc<str>,
    /// The keyed hash.
    pub hash: EntityHash,
}

/// How far a transaction takes a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelProgress {
    /// Of each shard, up to which position everything was applied, and how many events that were.
    pub positions: BTreeMap<u16, (u64, u64)>,
    /// Of each slot, the last commit.
    pub places: HashMap<Slot, (u64, Epoch)>,
    /// Events that were passed over.
    pub skipped: Vec<Skipped>,
    /// What the file says of itself from then on.
    pub meta: Vec<(&'static str, String)>,
}

/// An event that was passed over by command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// When. Microseconds since 1970.
    pub at_us: i64,
    /// The shard.
    pub shard: u16,
    /// The place of its commit in the shard's log.
    pub position: u64,
    /// Whose it is, in hex, if that is known.
    pub entity: Option<String>,
    /// The version, if that is known.
    pub version: Option<u64>,
    /// Why it could not be applied.
    pub why: String,
}

/// The open file of a read model: its only writer.
pub struct ModelFile {
    path: PathBuf,
    connection: Connection,
    guard: Guard,
}

/// What every connection to such a file has in common.
pub(crate) fn connect(path: &Path, options: &FileOptions, flags: OpenFlags) -> rusqlite::Result<Connection> {
    let flags = flags | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_PRIVATE_CACHE;
    let connection = match &options.vfs {
        Some(vfs) => Connection::open_with_flags_and_vfs(path, flags, vfs.as_str())?,
        None => Connection::open_with_flags(path, flags)?,
    };
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
    // Only to be written anew does a database attach another one.
    connection.set_limit(Limit::SQLITE_LIMIT_ATTACHED, 1)?;
    connection.execute_batch(
        "PRAGMA temp_store = MEMORY; PRAGMA mmap_size = 0; PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA foreign_keys = OFF;",
    )?;
    Ok(connection)
}

impl ModelFile {
    /// Makes the file, with `meta`.
    ///
    /// # Errors
    /// It cannot be made, or exists.
    pub fn create(path: &Path, options: &FileOptions, meta: &[(&str, String)]) -> Result<Self, ModelError> {
        let create = || -> rusqlite::Result<ModelFile> {
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
            let mut file = ModelFile::connect(path, options, flags)?;
            let transaction = file.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute_batch(TABLES)?;
            for (name, value) in meta {
                transaction.execute("INSERT INTO kuma_meta(name, value) VALUES (?, ?)", (name, value))?;
            }
            transaction.pragma_update(None, "user_version", MODEL_FORMAT)?;
            transaction.commit()?;
            Ok(file)
        };
        create().map_err(|source| ModelError::Sqlite { path: path.to_owned(), source })
    }

    /// Opens the file.
    ///
    /// # Errors
    /// It is not the file of a model, or cannot be read.
    pub fn open(path: &Path, options: &FileOptions) -> Result<Self, ModelError> {
        let failed = |source| ModelError::Sqlite { path: path.to_owned(), source };
        let file = ModelFile::connect(path, options, OpenFlags::SQLITE_OPEN_READ_WRITE);
        let file = file.map_err(|error| foreign_or(path, error))?;
        let found = file.connection.query_row("PRAGMA user_version", [], |row| row.get::<_, u32>(0));
        match found.map_err(|error| foreign_or(path, error))? {
            MODEL_FORMAT => {}
            0 => return Err(ModelError::Foreign { path: path.to_owned(), detail: "it is empty".to_owned() }),
            found => return Err(ModelError::Newer { path: path.to_owned(), found }),
        }
        // What a crash left of a log is in the file from here on.
        file.connection.query_row("SELECT count(*) FROM kuma_meta", [], |_| Ok(())).map_err(failed)?;
        Ok(file)
    }

    fn connect(path: &Path, options: &FileOptions, flags: OpenFlags) -> rusqlite::Result<Self> {
        let connection = connect(path, options, flags)?;
        let secure_delete = if options.keep_deleted_bytes { "OFF" } else { "ON" };
        connection.execute_batch(&format!(
            "PRAGMA page_size = {PAGE_BYTES}; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA secure_delete = {secure_delete};
             PRAGMA cache_size = -{CACHE_KIB}; PRAGMA journal_size_limit = {JOURNAL_BYTES_MAX};"
        ))?;
        let guard = Guard::over(&connection)?;
        Ok(ModelFile { path: path.to_owned(), connection, guard })
    }

    /// From now on each transaction is synced before it is acknowledged.
    ///
    /// # Errors
    /// SQLite says no.
    pub fn sync_each_commit(&self) -> Result<(), ModelError> {
        self.connection.execute_batch("PRAGMA synchronous = FULL").map_err(|error| self.failed(error))
    }

    /// The rows of a table whose column has this value, each as names and values.
    ///
    /// # Errors
    /// The file cannot be read, or there is no such column.
    pub fn rows_where(&self, table: &str, column: &str, value: &str) -> Result<Vec<Vec<(String, Value)>>, ModelError> {
        let select = format!("SELECT * FROM {} WHERE {} = ?", quoted(table), quoted(column));
        self.read(|connection| {
            let mut statement = connection.prepare(&select)?;
            let columns: Vec<String> = statement.column_names().into_iter().map(str::to_owned).collect();
            let rows = statement.query_map([value], |row| {
                columns.iter().enumerate().map(|(index, name)| Ok((name.clone(), row.get(index)?))).collect()
            })?;
            rows.collect()
        })
    }

    /// Reads something in the tables of the model.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, ModelError> {
        read(&self.connection).map_err(|error| self.failed(error))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn failed(&self, source: rusqlite::Error) -> ModelError {
        ModelError::Sqlite { path: self.path.clone(), source }
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn meta(&self, name: &str) -> Result<Option<String>, ModelError> {
        let value = self.connection.query_row("SELECT value FROM kuma_meta WHERE name = ?", [name], |row| row.get(0));
        value.optional().map_err(|error| self.failed(error))
    }

    /// Has it say something of itself.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_meta(&self, name: &str, value: &str) -> Result<(), ModelError> {
        self.connection.execute(SET_META, (name, value)).map(drop).map_err(|error| self.failed(error))
    }

    /// Executes those scripts that were not executed yet, each in a transaction.
    ///
    /// # Errors
    /// A script fails, or is not what it was. Those before it stay executed.
    pub fn migrate(&mut self, scripts: &[String]) -> Result<(), ModelError> {
        let ModelFile { path, connection, guard } = self;
        let failed = |source| ModelError::Sqlite { path: path.clone(), source };
        for (script, number) in scripts.iter().zip(1..) {
            let hash = blake3::hash(script.as_bytes()).to_hex().to_string();
            let known = connection
                .query_row("SELECT hash FROM kuma_migration WHERE number = ?", [number], |row| row.get::<_, String>(0))
                .optional()
                .map_err(failed)?;
            match known {
                Some(known) if known == hash => continue,
                Some(_) => return Err(ModelError::MigrationChanged { path: path.clone(), number }),
                None => {}
            }
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
            guard.set(Rights::Migrate);
            let migrated = transaction.execute_batch(script);
            guard.set(Rights::Engine);
            migrated.map_err(|cause| ModelError::Migration { path: path.clone(), number, cause })?;
            transaction
                .execute("INSERT INTO kuma_migration(number, hash) VALUES (?, ?)", (number, hash))
                .map_err(failed)?;
            transaction.commit().map_err(failed)?;
        }
        Ok(())
    }

    /// Applies something and notes how far that takes the model, in one transaction. If `work` fails nothing is changed.
    ///
    /// # Errors
    /// The outer error is that of the file; nothing was changed either.
    pub fn apply<E>(
        &mut self,
        progress: &ModelProgress,
        work: impl FnOnce(&Transaction<'_>) -> Result<(), E>,
    ) -> Result<Result<(), E>, ModelError> {
        let ModelFile { path, connection, guard } = self;
        let failed = |source| ModelError::Sqlite { path: path.clone(), source };
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        guard.set(Rights::Apply);
        let worked = work(&transaction);
        guard.set(Rights::Engine);
        if let Err(error) = worked {
            // Whatever came of it: without a commit nothing of it stays.
            let _ = transaction.rollback();
            return Ok(Err(error));
        }
        if transaction.is_autocommit() {
            return Err(ModelError::Ended { path: path.clone() });
        }
        note(&transaction, progress).and_then(|()| transaction.commit()).map_err(failed)?;
        Ok(Ok(()))
    }

    /// Whether these statements can purge an entity.
    ///
    /// # Errors
    /// They cannot; or the file cannot be read.
    pub fn check_purge(&self, sql: &str) -> Result<(), ModelError> {
        let check = || -> rusqlite::Result<()> {
            let mut batch = rusqlite::Batch::new(&self.connection, sql);
            while let Some(statement) = batch.next()? {
                let names = (1..=statement.parameter_count()).map(|index| statement.parameter_name(index));
                for name in names.map(|name| name.unwrap_or("?")) {
                    if !matches!(name, ":entity" | ":kind" | ":hash") {
                        return Err(rusqlite::Error::InvalidParameterName(name.to_owned()));
                    }
                }
            }
            Ok(())
        };
        self.guard.set(Rights::Apply);
        let checked = check();
        self.guard.set(Rights::Engine);
        checked.map_err(|cause| ModelError::Purge { path: self.path.clone(), cause })
    }

    /// Of each shard, up to which position everything was applied, and how many events that were.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn positions(&self) -> Result<BTreeMap<u16, (u64, u64)>, ModelError> {
        positions(&self.connection).map_err(|error| self.failed(error))
    }

    /// By the number of each slot, the seq of the last commit that was applied, or was not wanted.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn seqs(&self) -> Result<BTreeMap<u16, u64>, ModelError> {
        self.read(|connection| {
            let mut statement = connection.prepare("SELECT slot, seq FROM kuma_checkpoint")?;
            let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?.cast_unsigned())))?;
            rows.collect()
        })
    }

    /// Events that were passed over, oldest first.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn skipped(&self) -> Result<Vec<Skipped>, ModelError> {
        let read = || -> rusqlite::Result<Vec<Skipped>> {
            let sql = "SELECT at, shard, position, entity, version, why FROM kuma_skipped ORDER BY number";
            let mut statement = self.connection.prepare(sql)?;
            let rows = statement.query_map([], |row| {
                Ok(Skipped {
                    at_us: row.get(0)?,
                    shard: row.get(1)?,
                    position: row.get::<_, i64>(2)?.cast_unsigned(),
                    entity: row.get(3)?,
                    version: row.get::<_, Option<i64>>(4)?.map(i64::cast_unsigned),
                    why: row.get(5)?,
                })
            })?;
            rows.collect()
        };
        read().map_err(|error| self.failed(error))
    }

    /// Deletes what the model holds of these lives, by the statements of `sql`, and writes the file anew so that nothing of it is left in
    /// any byte. Durable when it returns. Returns how many rows were deleted or changed.
    ///
    /// The statements are executed once for each life, however often this is called: an erasure that is begun again may find rows with the same
    /// id, which are the next life's.
    ///
    /// # Errors
    /// It may be deleted and still be in unused space, or not be deleted; call it again.
    pub fn purge(&mut self, sql: &str, entities: &[Purged]) -> Result<u64, ModelError> {
        let ModelFile { path, connection, guard } = self;
        let failed = |source| ModelError::Sqlite { path: path.clone(), source };
        let purge_failed = |cause| ModelError::Purge { path: path.clone(), cause };
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        let mut left = Vec::with_capacity(entities.len());
        for entity in entities {
            let note = "INSERT INTO kuma_purged(key_id) VALUES (?) ON CONFLICT DO NOTHING";
            if transaction.execute(note, [entity.key_id]).map_err(failed)? == 0 {
                continue;
            }
            transaction.execute("DELETE FROM kuma_skipped WHERE entity = ?", [entity.hash.to_hex()]).map_err(failed)?;
            left.push(entity);
        }
        let before = transaction.total_changes();
        guard.set(Rights::Apply);
        let purged = purge_all(&transaction, sql, &left);
        guard.set(Rights::Engine);
        purged.map_err(purge_failed)?;
        let changes = transaction.total_changes() - before;
        transaction.commit().map_err(failed)?;
        self.rewrite()?;
        Ok(changes)
    }

    /// Writes the file anew, without its unused space, and cuts the log.
    fn rewrite(&self) -> Result<(), ModelError> {
        let busy = || ModelError::Busy { path: self.path.clone() };
        let rewrite = || -> rusqlite::Result<bool> {
            let pages: u32 = self.connection.query_row("PRAGMA page_count", [], |row| row.get(0))?;
            if u64::from(pages) * PAGE_BYTES > REWRITE_IN_MEMORY_BYTES {
                self.connection.execute_batch("PRAGMA temp_store = FILE")?;
            }
            // Statements that are kept would be in its way.
            self.connection.flush_prepared_statement_cache();
            let rewritten = self.connection.execute_batch("VACUUM");
            self.connection.execute_batch("PRAGMA temp_store = MEMORY")?;
            rewritten?;
            // As durable as a receipt: the log is synced before it is copied, and the file after.
            self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, bool>(0))
        };
        match rewrite() {
            Ok(false) => Ok(()),
            Ok(true) => Err(busy()),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Syncs everything that was applied until now.
    ///
    /// # Errors
    /// SQLite says no.
    pub fn sync(&self) -> Result<(), ModelError> {
        // Whether a reader keeps it from copying all of the log: it is synced before anything is copied.
        let synced = self.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        synced.map_err(|error| self.failed(error))
    }

    /// Closes the file.
    ///
    /// # Errors
    /// SQLite could not copy the log; it is there when the file is opened again.
    pub fn close(self) -> Result<(), ModelError> {
        let ModelFile { path, connection, .. } = self;
        connection.flush_prepared_statement_cache();
        connection.close().map_err(|(_, source)| ModelError::Sqlite { path, source })
    }
}

/// A name as SQL has it.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn foreign_or(path: &Path, error: rusqlite::Error) -> ModelError {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    match error.sqlite_error_code() {
        Some(NotADatabase | DatabaseCorrupt) => {
            ModelError::Foreign { path: path.to_owned(), detail: error.to_string() }
        }
        _ => ModelError::Sqlite { path: path.to_owned(), source: error },
    }
}

fn purge_all(transaction: &Transaction<'_>, sql: &str, entities: &[&Purged]) -> rusqlite::Result<()> {
    let mut batch = rusqlite::Batch::new(transaction, sql);
    while let Some(mut statement) = batch.next()? {
        for entity in entities {
            for index in 1..=statement.parameter_count() {
                let hash = entity.hash.to_hex();
                match statement.parameter_name(index) {
                    Some(":entity") => statement.raw_bind_parameter(index, &*entity.id)?,
                    Some(":kind") => statement.raw_bind_parameter(index, &*entity.kind)?,
                    Some(":hash") => statement.raw_bind_parameter(index, hash)?,
                    other => return Err(rusqlite::Error::InvalidParameterName(other.unwrap_or("?").to_owned())),
                }
            }
            let mut rows = statement.raw_query();
            while rows.next()?.is_some() {}
        }
    }
    Ok(())
}

/// Notes how far a transaction takes the model.
fn note(transaction: &Transaction<'_>, progress: &ModelProgress) -> rusqlite::Result<()> {
    // Not among the statements that are kept: those are the projection's.
    let mut position = transaction.prepare(
        "INSERT INTO kuma_position(shard, position, events) VALUES (?, ?, ?)
         ON CONFLICT(shard) DO UPDATE SET position = excluded.position, events = events + excluded.events",
    )?;
    for (shard, (at, events)) in &progress.positions {
        position.execute((shard, at.cast_signed(), events.cast_signed()))?;
    }
    let mut checkpoint = transaction.prepare(
        "INSERT INTO kuma_checkpoint(slot, seq, epoch) VALUES (?, ?, ?)
         ON CONFLICT(slot) DO UPDATE SET seq = excluded.seq, epoch = excluded.epoch",
    )?;
    for (slot, (seq, epoch)) in &progress.places {
        checkpoint.execute((slot.number(), seq.cast_signed(), epoch.to_i64()))?;
    }
    for (name, value) in &progress.meta {
        transaction.execute(SET_META, (name, value))?;
    }
    for Skipped { at_us, shard, position, entity, version, why } in &progress.skipped {
        transaction.execute(
            "INSERT INTO kuma_skipped(at, shard, position, entity, version, why) VALUES (?, ?, ?, ?, ?, ?)",
            (at_us, shard, position.cast_signed(), entity, version.map(u64::cast_signed), why),
        )?;
    }
    Ok(())
}

pub(crate) fn positions(connection: &Connection) -> rusqlite::Result<BTreeMap<u16, (u64, u64)>> {
    let mut statement = connection.prepare("SELECT shard, position, events FROM kuma_position")?;
    let rows = statement.query_map([], |row| {
        Ok((row.get(0)?, (row.get::<_, i64>(1)?.cast_unsigned(), row.get::<_, i64>(2)?.cast_unsigned())))
    })?;
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(directory: &Path) -> ModelFile {
        let options = FileOptions::default();
        let mut file = ModelFile::create(&directory.join("m.db"), &options, &[("name", "m".to_owned())]).unwrap();
        file.migrate(&["CREATE TABLE person(id TEXT PRIMARY KEY, name TEXT) STRICT".to_owned()]).unwrap();
        file
    }

    fn at(position: u64) -> ModelProgress {
        ModelProgress {
            positions: [(0, (position, 1))].into(),
            places: [(Slot::new(7), (position, Epoch::FIRST))].into(),
            ..ModelProgress::default()
        }
    }

    fn count(file: &ModelFile) -> i64 {
        file.connection.query_row("SELECT count(*) FROM person", [], |row| row.get(0)).unwrap()
    }

    #[test]
    fn what_is_applied_and_that_it_is_are_committed_together_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = model(directory.path());
        let insert = |name: &'static str| {
            move |model: &Transaction<'_>| model.execute("INSERT INTO person VALUES (?1, ?1)", [name]).map(drop)
        };
        file.apply(&at(5), insert("ann")).unwrap().unwrap();
        assert_eq!((count(&file), file.positions().unwrap()), (1, [(0, (5, 1))].into()));
        let refused = file.apply(&at(6), |model| {
            insert("bob")(model)?;
            insert("ann")(model)
        });
        assert!(refused.unwrap().is_err());
        assert_eq!((count(&file), file.positions().unwrap()), (1, [(0, (5, 1))].into()));
        // However hard it tries to commit on its own.
        let refused = file.apply(&at(6), |model| {
            insert("bob")(model)?;
            model.execute_batch("COMMIT")
        });
        assert!(refused.unwrap().is_err());
        // Or to end the transaction without asking, and to go on as if nothing were.
        let refused = file.apply(&at(6), |model| {
            insert("bob")(model)?;
            assert!(model.execute("INSERT OR ROLLBACK INTO person VALUES ('ann', 'ann')", []).is_err());
            assert!(insert("cid")(model).is_err());
            Ok::<_, rusqlite::Error>(())
        });
        assert!(matches!(refused, Err(ModelError::Ended { .. })));
        file.close().unwrap();
        let file = ModelFile::open(&directory.path().join("m.db"), &FileOptions::default()).unwrap();
        assert_eq!((count(&file), file.positions().unwrap()), (1, [(0, (5, 1))].into()));
        assert_eq!(file.meta("name").unwrap().as_deref(), Some("m"));
    }

    #[test]
    fn a_migration_is_executed_once_and_never_changed() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = model(directory.path());
        let first = "CREATE TABLE person(id TEXT PRIMARY KEY, name TEXT) STRICT".to_owned();
        let second = "CREATE INDEX by_name ON person(name)".to_owned();
        file.migrate(&[first.clone(), second.clone()]).unwrap();
        file.migrate(&[first, second]).unwrap();
        let changed = file.migrate(&["CREATE TABLE person(id TEXT) STRICT".to_owned()]);
        assert!(matches!(changed, Err(ModelError::MigrationChanged { number: 1, .. })));
    }

    /// With an index, in rows that moved about and were updated, and in the log.
    #[test]
    fn what_is_purged_is_in_no_byte_of_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = model(directory.path());
        file.migrate(&[
            "CREATE TABLE person(id TEXT PRIMARY KEY, name TEXT) STRICT".to_owned(),
            "CREATE INDEX by_name ON person(name)".to_owned(),
        ])
        .unwrap();
        for round in 0..20_u64 {
            file.apply(&at(round), |model| {
                (0..200).try_for_each(|person| {
                    let id = format!("{:04}-needle-{person:03}", (person * 7919 + round * 104_729) % 10_000);
                    let insert =
                        "INSERT INTO person VALUES (?1, 'name of ' || ?1) ON CONFLICT DO UPDATE SET name = name || '!'";
                    model.execute(insert, [id]).map(drop)
                })
            })
            .unwrap()
            .unwrap();
        }
        let find = |needle: &[u8]| {
            ["m.db", "m.db-wal"].iter().any(|name| {
                let bytes = std::fs::read(directory.path().join(name)).unwrap_or_default();
                bytes.windows(needle.len()).any(|window| window == needle)
            })
        };
        assert!(find(b"-needle-017"));
        let entity = |id: &str| Purged {
            key_id: *blake3::hash(id.as_bytes()).as_bytes().first_chunk().unwrap(),
            kind: "person".into(),
            id: id.into(),
            hash: EntityHash([1; 16]),
        };
        let gone: Vec<Purged> = {
            let mut statement = file.connection.prepare("SELECT id FROM person WHERE id LIKE '%-017'").unwrap();
            statement.query_map([], |row| row.get::<_, String>(0)).unwrap().map(|id| entity(&id.unwrap())).collect()
        };
        let before = count(&file);
        let rows = file.purge("DELETE FROM person WHERE id = :entity", &gone).unwrap();
        assert_eq!((rows, count(&file)), (gone.len() as u64, before - gone.len() as i64));
        assert!(!find(b"-needle-017") && find(b"-needle-018"));
        // Their next lives are not theirs.
        let id = gone[0].id.clone();
        file.apply(&at(20), |model| model.execute("INSERT INTO person VALUES (?1, 'again')", [&*id]).map(drop))
            .unwrap()
            .unwrap();
        file.purge("DELETE FROM person WHERE id = :entity", &gone).unwrap();
        assert_eq!(count(&file), before - gone.len() as i64 + 1);
    }

    #[test]
    fn a_file_that_is_no_model_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("odd.db");
        std::fs::write(&path, b"not a database at all, but long enough to be looked at as one").unwrap();
        assert!(matches!(ModelFile::open(&path, &FileOptions::default()), Err(ModelError::Foreign { .. })));
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(ModelFile::open(&path, &FileOptions::default()), Err(ModelError::Foreign { .. })));
    }
}
