//! `keys.db`: the wrapped key of each entity, apart from every shard file and its backup.
//!
//! Invariants:
//! - A key is durable before the first commit that is sealed with it, and an existing row is never replaced by another key. (A key
//!   whose commit never came is left over; it opens nothing.)
//! - Only wrapped keys are here. This crate cannot unwrap them.
//! - No row is deleted and no row moves: a key is destroyed by emptying its row, which stays and keeps the name of the key from coming back. A key
//!   that leaves with its slot leaves a row without a name, so that it can come back with the slot.
//!   A wrapping of another length goes to a new row, and the old one is emptied (see `schema.rs`).

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use ractor::ActorCell;
use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use crate::{
    CommitError, Digest, DiskId, EntityHash, FileOptions, OpenError, ReadError, StatsView,
    database::Database,
    open::FileSpec,
    packed::{self, Hex},
    row_hash::RowHash,
    schema::Role,
    statements::{self, Bound},
    table_book::{self, TableBook},
};

pub(crate) const FILE_NAME: &str = "keys.db";

/// The wrapped key of one entity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    /// The name of the key.
    pub key_id: [u8; 16],
    /// Whose it is.
    pub id_hash: EntityHash,
    /// The key, wrapped under a master key; empty once it is destroyed.
    pub wrapped: Vec<u8>,
    /// Microseconds since 1970.
    pub created_at_us: i64,
}

impl KeyRow {
    /// Whether the key was destroyed.
    pub fn is_destroyed(&self) -> bool {
        self.wrapped.is_empty()
    }

    /// The wrapping is left out: it changes with the master key, and is authenticated by itself. But not that there is one.
    pub(crate) fn hash(&self) -> RowHash {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(if self.is_destroyed() { b"kumakey0" } else { b"kumakey1" })
            .update(&self.key_id)
            .update(&self.id_hash.0)
            .update(&self.created_at_us.to_le_bytes());
        RowHash::from(hasher.finalize())
    }

    /// In the order of the table's columns.
    pub(crate) fn bind(&self, query: Bound) -> Bound {
        query
            .bind(self.key_id.to_vec())
            .bind(self.id_hash.0.to_vec())
            .bind(self.wrapped.clone())
            .bind(self.created_at_us)
    }

    pub(crate) fn from_row(row: &SqliteRow) -> sqlx::Result<Option<Self>> {
        let (Ok(key_id), Ok(id_hash)) =
            (row.try_get::<Vec<u8>, _>("key_id")?.try_into(), row.try_get::<Vec<u8>, _>("id_hash")?.try_into())
        else {
            return Ok(None);
        };
        Ok(Some(KeyRow {
            key_id,
            id_hash: EntityHash(id_hash),
            wrapped: row.try_get("wrapped")?,
            created_at_us: row.try_get("created_at")?,
        }))
    }
}

/// One change of the keys.
pub(crate) enum Change {
    Add(KeyRow),
    Rewrap {
        key_id: [u8; 16],
        wrapped: Vec<u8>,
    },
    Destroy {
        key_ids: Vec<[u8; 16]>,
    },
    /// Keys that came with a slot, unless there is a row of their names.
    Install(Vec<KeyRow>),
    /// Keys that left with a slot: their names may come back.
    Forget {
        key_ids: Vec<[u8; 16]>,
    },
    PutSecret {
        name: &'static str,
        wrapped: Vec<u8>,
    },
}

impl table_book::Change for Change {
    fn bytes(&self) -> usize {
        match self {
            Change::Add(row) => row.wrapped.len() + 64,
            Change::Rewrap { wrapped, .. } | Change::PutSecret { wrapped, .. } => wrapped.len() + 64,
            Change::Destroy { key_ids } | Change::Forget { key_ids } => key_ids.len() * 64,
            Change::Install(rows) => rows.iter().map(|row| row.wrapped.len() + 64).sum(),
        }
    }

    async fn write(&self, connection: &mut SqliteConnection, digest: &mut Digest) -> sqlx::Result<()> {
        match self {
            Change::Add(row) => {
                statements::insert_key_rows(connection, &[row]).await?;
                digest.add(&row.hash());
            }
            Change::Rewrap { key_id, wrapped } => rewrap(connection, *key_id, wrapped).await?,
            Change::Destroy { key_ids } => {
                for key_id in key_ids {
                    destroy(connection, *key_id, digest).await?;
                }
            }
            Change::Install(rows) => {
                let names: Vec<[u8; 16]> = rows.iter().map(|row| row.key_id).collect();
                let known: HashSet<[u8; 16]> =
                    find_all(&mut *connection, &names).await?.iter().map(|row| row.key_id).collect();
                let mut new: Vec<&KeyRow> = rows.iter().filter(|row| !known.contains(&row.key_id)).collect();
                let mut named = HashSet::new();
                new.retain(|row| named.insert(row.key_id));
                statements::insert_key_rows(connection, &new).await?;
                new.into_iter().for_each(|row| digest.add(&row.hash()));
            }
            Change::Forget { key_ids } => {
                let mut rows = find_all(&mut *connection, key_ids).await?;
                rows.retain(|row| !row.is_destroyed());
                let names: Vec<[u8; 16]> = rows.iter().map(|row| row.key_id).collect();
                nameless(&names).execute(connection).await?;
                rows.iter().for_each(|row| digest.subtract(&row.hash()));
            }
            Change::PutSecret { name, wrapped } => {
                sqlx::query("INSERT INTO secret(name, wrapped) VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET wrapped = excluded.wrapped")
                    .bind(*name)
                    .bind(wrapped.clone())
                    .execute(connection)
                    .await?;
            }
        }
        Ok(())
    }
}

pub(crate) const FIND: &str = "SELECT key_id, id_hash, wrapped, created_at FROM data_key WHERE key_id = ?";

/// Replaces a wrapping; a key that was destroyed meanwhile stays destroyed.
async fn rewrap(connection: &mut SqliteConnection, key_id: [u8; 16], wrapped: &[u8]) -> sqlx::Result<()> {
    // Of the same length it is written over in place.
    let same = sqlx::query("UPDATE data_key SET wrapped = ?1 WHERE key_id = ?2 AND length(wrapped) = length(?1)");
    let done = same.bind(wrapped.to_vec()).bind(key_id.to_vec()).execute(&mut *connection).await?;
    if done.rows_affected() > 0 {
        return Ok(());
    }
    let row = sqlx::query(FIND).bind(key_id.to_vec()).fetch_optional(&mut *connection).await?;
    let Some(row) = row.as_ref().map(KeyRow::from_row).transpose()?.flatten().filter(|row| !row.is_destroyed()) else {
        return Ok(());
    };
    nameless(&[key_id]).execute(&mut *connection).await?;
    statements::insert_key_rows(connection, &[&KeyRow { wrapped: wrapped.to_vec(), ..row }]).await
}

/// Empties the row of a key, if there is one.
async fn destroy(connection: &mut SqliteConnection, key_id: [u8; 16], digest: &mut Digest) -> sqlx::Result<()> {
    let row = sqlx::query(FIND).bind(key_id.to_vec()).fetch_optional(&mut *connection).await?;
    let Some(row) = row.as_ref().map(KeyRow::from_row).transpose()?.flatten().filter(|row| !row.is_destroyed()) else {
        return Ok(());
    };
    sqlx::query("UPDATE data_key SET wrapped = x'' WHERE key_id = ?").bind(key_id.to_vec()).execute(connection).await?;
    digest.subtract(&row.hash());
    digest.add(&KeyRow { wrapped: Vec::new(), ..row }.hash());
    Ok(())
}

/// Those of these keys that are there.
async fn find_all(executor: impl sqlx::SqliteExecutor<'_>, key_ids: &[[u8; 16]]) -> sqlx::Result<Vec<KeyRow>> {
    let query = sqlx::query(
        "SELECT json_group_array(json_array(hex(key_id), hex(id_hash), hex(wrapped), created_at))
         FROM data_key WHERE key_id IN (SELECT unhex(value) FROM json_each(?))",
    );
    let rows: Vec<(Hex, Hex, Hex, i64)> = packed::rows(executor, query.bind(packed::names(key_ids))).await?;
    let row = |(key_id, id_hash, wrapped, created_at_us): (Hex, Hex, Hex, i64)| {
        let (Ok(key_id), Ok(id_hash)) = (key_id.0.try_into(), id_hash.0.try_into()) else { return None };
        Some(KeyRow { key_id, id_hash: EntityHash(id_hash), wrapped: wrapped.0, created_at_us })
    };
    Ok(rows.into_iter().filter_map(row).collect())
}

/// Empties these rows, and their names too.
fn nameless(key_ids: &[[u8; 16]]) -> Bound {
    sqlx::query(
        "UPDATE data_key SET key_id = NULL, id_hash = x'', wrapped = x'', created_at = 0
         WHERE key_id IN (SELECT unhex(value) FROM json_each(?))",
    )
    .bind(packed::names(key_ids))
}

/// What a look over all keys found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeysReport {
    /// Keys.
    pub keys: u64,
    /// Keys that were destroyed.
    pub destroyed: u64,
    /// What is wrong, in words.
    pub damage: Vec<String>,
}

/// The open `keys.db`. Cheap to clone.
#[derive(Clone)]
pub struct KeyStore {
    database: Arc<Database<TableBook<Change>>>,
}

pub(crate) fn spec(directory: PathBuf, disk_id: DiskId, options: &FileOptions) -> FileSpec {
    FileSpec { path: directory.join(FILE_NAME), role: Role::Keys, disk_id, options: options.clone() }
}

impl KeyStore {
    /// Makes the file of a new store.
    ///
    /// # Errors
    /// The file exists or cannot be written.
    pub async fn create(directory: PathBuf, disk_id: DiskId, options: &FileOptions) -> Result<(), OpenError> {
        spec(directory, disk_id, options).create(async |_| Ok(())).await
    }

    /// Opens the file and starts its writer under `supervisor`.
    ///
    /// # Errors
    /// Whatever makes the file unfit to be used; it is left as it was.
    pub async fn open(
        directory: PathBuf,
        disk_id: DiskId,
        options: &FileOptions,
        supervisor: ActorCell,
    ) -> Result<Self, OpenError> {
        let spec = spec(directory, disk_id, options);
        let inspected = spec.inspect().await?;
        let (stored, witnessed) = (inspected.stored, inspected.witnessed);
        inspected.close().await;
        if witnessed.is_some_and(|digest| digest != stored.progress.digest) {
            return Err(spec.damaged("the digest of its keys is not the one in its watermark"));
        }
        let book = TableBook::new(stored.progress.digest);
        let database = Database::open(&spec, stored.commits, book, supervisor).await?;
        Ok(KeyStore { database: Arc::new(database) })
    }

    /// Adds the key of a new entity; it is durable when this returns. Keys that are added at the same time share one sync.
    ///
    /// # Errors
    /// It was not written, or that is unknown. Use a new key for the next attempt.
    pub async fn add(&self, row: KeyRow) -> Result<(), CommitError> {
        self.database.change(Change::Add(row)).await
    }

    /// Replaces the wrapping of a key that is the same inside.
    ///
    /// # Errors
    /// It was not written, or that is unknown; either wrapping opens.
    pub async fn rewrap(&self, key_id: [u8; 16], wrapped: Vec<u8>) -> Result<(), CommitError> {
        self.database.change(Change::Rewrap { key_id, wrapped }).await
    }

    /// Destroys these keys: nothing that was sealed with them can be read from then on. Those that there are none of are no error.
    /// Their bytes are gone from the file itself after [`KeyStore::truncate_log`].
    ///
    /// # Errors
    /// None was destroyed, or that is unknown; do it again.
    pub async fn destroy(&self, key_ids: Vec<[u8; 16]>) -> Result<(), CommitError> {
        self.database.change(Change::Destroy { key_ids }).await
    }

    /// Adds keys that came with a slot; durable when this returns. A name that there is a row of stays as it is, destroyed or not.
    ///
    /// # Errors
    /// None was written, or that is unknown; do it again.
    pub async fn install(&self, rows: Vec<KeyRow>) -> Result<(), CommitError> {
        self.database.change(Change::Install(rows)).await
    }

    /// Takes away keys that left with a slot. Unlike those that were destroyed they may come back. Those that there are none of are no error.
    ///
    /// # Errors
    /// None was taken away, or that is unknown; do it again.
    pub async fn forget(&self, key_ids: Vec<[u8; 16]>) -> Result<(), CommitError> {
        self.database.change(Change::Forget { key_ids }).await
    }

    /// Copies the log into the database and cuts it to nothing. See [`crate::Shard::truncate_log`].
    ///
    /// # Errors
    /// A reader was in the way for too long, or the disk refused; try again.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn truncate_log(&self) -> Result<(), CommitError> {
        self.database.truncate_log().await
    }

    /// Stores a wrapped secret of the store itself under `name`.
    ///
    /// # Errors
    /// It was not written, or that is unknown.
    pub async fn put_secret(&self, name: &'static str, wrapped: Vec<u8>) -> Result<(), CommitError> {
        self.database.change(Change::PutSecret { name, wrapped }).await
    }

    /// The key with this name; it may be destroyed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn get(&self, key_id: [u8; 16]) -> Result<Option<KeyRow>, ReadError> {
        let row = sqlx::query(FIND)
            .bind(key_id.to_vec())
            .fetch_optional(&self.database.readers)
            .await
            .map_err(|error| self.read_error(error))?;
        let Some(row) = row else { return Ok(None) };
        KeyRow::from_row(&row).map_err(|error| self.read_error(error))
    }

    /// Those of these keys that are there; they may be destroyed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn get_many(&self, key_ids: &[[u8; 16]]) -> Result<Vec<KeyRow>, ReadError> {
        find_all(&self.database.readers, key_ids).await.map_err(|error| self.read_error(error))
    }

    /// Those of these keys that are there and not destroyed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn alive(&self, key_ids: &[[u8; 16]]) -> Result<Vec<[u8; 16]>, ReadError> {
        let rows = sqlx::query(
            "SELECT key_id FROM json_each(?) AS named CROSS JOIN data_key ON data_key.key_id = unhex(named.value)
             WHERE wrapped <> x''",
        )
        .bind(packed::names(key_ids))
        .fetch_all(&self.database.readers)
        .await
        .map_err(|error| self.read_error(error))?;
        let key_id = |row: &SqliteRow| row.try_get::<Vec<u8>, _>(0).map_err(|error| self.read_error(error));
        let found: Vec<Vec<u8>> = rows.iter().map(key_id).collect::<Result<_, _>>()?;
        Ok(found.into_iter().filter_map(|key_id| key_id.try_into().ok()).collect())
    }

    /// The first pages of the tables that keys are in, for [`crate::Residue`].
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn key_roots(&self) -> Result<Vec<u32>, ReadError> {
        self.database.roots(&["data_key"]).await
    }

    /// A wrapped secret of the store.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn secret(&self, name: &'static str) -> Result<Option<Vec<u8>>, ReadError> {
        let row = sqlx::query("SELECT wrapped FROM secret WHERE name = ?")
            .bind(name)
            .fetch_optional(&self.database.readers)
            .await
            .map_err(|error| self.read_error(error))?;
        row.map(|row| row.try_get(0)).transpose().map_err(|error| self.read_error(error))
    }

    /// All wrapped secrets of the store, by name.
    pub(crate) async fn secrets(&self) -> Result<Vec<(String, Vec<u8>)>, ReadError> {
        let rows =
            sqlx::query("SELECT name, wrapped FROM secret ORDER BY name").fetch_all(&self.database.readers).await;
        let read = |row: &SqliteRow| Ok((row.try_get(0)?, row.try_get(1)?));
        rows.and_then(|rows| rows.iter().map(read).collect()).map_err(|error| self.read_error(error))
    }

    /// Keys, destroyed ones too, in the order in which they were added, above `after`, with the number of each.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn page(&self, after: i64, rows_max: u32) -> Result<BTreeMap<i64, KeyRow>, ReadError> {
        let rows = sqlx::query("SELECT number, key_id, id_hash, wrapped, created_at FROM data_key WHERE number > ? AND key_id IS NOT NULL ORDER BY number LIMIT 0 + ?")
            .bind(after)
            .bind(rows_max)
            .fetch_all(&self.database.readers)
            .await
            .map_err(|error| self.read_error(error))?;
        let mut page = BTreeMap::new();
        for row in &rows {
            let number = row.try_get("number").map_err(|error| self.read_error(error))?;
            let key = KeyRow::from_row(row).map_err(|error| self.read_error(error))?;
            let damaged = || ReadError::BadRow {
                file: self.database.file.to_string(),
                position: 0,
                detail: format!("key number {number} is damaged"),
            };
            page.insert(number, key.ok_or_else(damaged)?);
        }
        Ok(page)
    }

    /// Reads every key and compares their sum with what was committed (unless keys were added meanwhile). `each` is called with every
    /// row.
    ///
    /// # Errors
    /// The file cannot be read at all. Damage stands in the report.
    pub async fn verify(&self, mut each: impl FnMut(&KeyRow)) -> Result<KeysReport, ReadError> {
        let mut report = KeysReport::default();
        let expected = self.database.audit().await?;
        let integrity = crate::verify::integrity(&self.database.readers).await;
        report.damage.extend(integrity.map_err(|error| self.read_error(error))?);
        let (mut digest, mut after) = (Digest::default(), 0);
        loop {
            let page = match self.page(after, 512).await {
                Ok(page) => page,
                Err(error) if error.is_damage() => {
                    report.damage.push(crate::verify::words(&error));
                    return Ok(report);
                }
                Err(error) => return Err(error),
            };
            let Some((last, _)) = page.last_key_value() else { break };
            after = *last;
            for row in page.values() {
                digest.add(&row.hash());
                match row.is_destroyed() {
                    true => report.destroyed += 1,
                    false => report.keys += 1,
                }
                each(row);
            }
        }
        // Keys that were added meanwhile are in the sum that was read and not in the one that was expected.
        let now = self.database.audit().await?;
        if now == expected && expected.stored.progress.digest != digest {
            report.damage.push("the digest of the keys is not the one that was committed".to_owned());
        }
        Ok(report)
    }

    /// Numbers about the writer.
    pub fn stats(&self) -> StatsView {
        self.database.stats()
    }

    /// Stops the writer: what was submitted is written first, then the file is closed.
    pub async fn stop(&self) {
        self.database.stop().await;
    }

    fn read_error(&self, source: sqlx::Error) -> ReadError {
        self.database.read_error(source)
    }
}
