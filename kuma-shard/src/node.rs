//! `node.db`: what a node knows for ever. Who was erased (by hash and key, no more), which erasures are not finished, their receipts, and
//! when backups were made.
//!
//! Invariants:
//! - A tombstone is durable before anything of its entity is destroyed: from then on there is no way back, only forward.
//! - Tombstones and receipts are only added; a receipt is renewed when a subscriber confirms what it says is pending. A tombstone names the key, not only the entity: a later life has a new key.
//! - An erasure is unfinished from its tombstone on until its receipt, in the same transactions.
//! - There is no personal data in it.

use std::{path::PathBuf, sync::Arc};

use ractor::ActorCell;
use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use crate::{
    CommitError, Digest, DiskId, EntityHash, FileOptions, OpenError, ReadError, Slot, StatsView,
    book::Progress,
    database::Database,
    open::FileSpec,
    packed,
    progress::Stored,
    row_hash::RowHash,
    schema::Role,
    statements::Bound,
    table_book::{self, TableBook},
};

pub(crate) const FILE_NAME: &str = "node.db";
const COLUMNS: &str = "number, key_id, id_hash, slot, receipt_id, at";

/// That an entity was erased, in one of its lives: the intent, durable before anything is destroyed, and the entry of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tombstone {
    /// The key that is destroyed. It names the life.
    pub key_id: [u8; 16],
    /// The entity.
    pub id_hash: EntityHash,
    /// Its slot.
    pub slot: Slot,
    /// The name of the erasure and its receipt.
    pub receipt_id: [u8; 16],
    /// When it was asked for. Microseconds since 1970.
    pub at_us: i64,
}

impl Tombstone {
    fn hash(&self) -> RowHash {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(b"kumatomb1")
            .update(&self.key_id)
            .update(&self.id_hash.0)
            .update(&self.slot.number().to_le_bytes())
            .update(&self.receipt_id)
            .update(&self.at_us.to_le_bytes());
        RowHash::from(hasher.finalize())
    }

    /// None where it cannot be one.
    fn from_row(row: &SqliteRow) -> sqlx::Result<Option<Self>> {
        let bytes = |name| -> sqlx::Result<Option<[u8; 16]>> { Ok(row.try_get::<Vec<u8>, _>(name)?.try_into().ok()) };
        let (Some(key_id), Some(id_hash), Some(receipt_id)) =
            (bytes("key_id")?, bytes("id_hash")?, bytes("receipt_id")?)
        else {
            return Ok(None);
        };
        let slot = Slot::new(row.try_get::<i64, _>("slot")?.cast_unsigned());
        let id_hash = EntityHash(id_hash);
        Ok(Some(Tombstone { key_id, id_hash, slot, receipt_id, at_us: row.try_get("at")? }))
    }
}

/// The receipt of an erasure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptRow {
    /// Its name.
    pub receipt_id: [u8; 16],
    /// The key that was destroyed.
    pub key_id: [u8; 16],
    /// The signed text.
    pub body: String,
}

fn receipt_hash(receipt_id: &[u8], body: &str) -> RowHash {
    let mut hasher = blake3::Hasher::new();
    RowHash::from(hasher.update(b"kumareceipt1").update(receipt_id).update(body.as_bytes()).finalize())
}

fn backup_hash(what: &str, at_us: i64) -> RowHash {
    let mut hasher = blake3::Hasher::new();
    RowHash::from(hasher.update(b"kumabackup1").update(&at_us.to_le_bytes()).update(what.as_bytes()).finalize())
}

fn cluster_hash(body: &[u8]) -> RowHash {
    let mut hasher = blake3::Hasher::new();
    RowHash::from(hasher.update(b"kumacluster1").update(body).finalize())
}

/// One change of what the node knows.
pub(crate) enum Change {
    /// Tombstones, and that their erasures are to be done.
    Entomb(Vec<Tombstone>),
    /// Tombstones of erasures that other nodes carry out.
    Learn(Vec<Tombstone>),
    /// Tombstones of erasures that this node is to carry out should their slots come to it, unless it has their receipts.
    Owe(Vec<Tombstone>),
    /// A life is about to be replaced by the one with the second key.
    Intend(Tombstone, [u8; 16]),
    /// It was not.
    GiveUp([u8; 16]),
    Finish(Vec<ReceiptRow>),
    /// Receipts of erasures that another life of this store had finished.
    Keep(Vec<ReceiptRow>),
    /// Receipts that say more than those that there are.
    Renew(Vec<ReceiptRow>),
    Backup {
        what: &'static str,
        at_us: i64,
    },
    /// What it knows of the cluster, in the place of what it knew before.
    Cluster(Vec<u8>),
}

impl table_book::Change for Change {
    fn bytes(&self) -> usize {
        match self {
            Change::Entomb(tombstones) | Change::Learn(tombstones) | Change::Owe(tombstones) => tombstones.len() * 128,
            Change::Finish(receipts) | Change::Keep(receipts) | Change::Renew(receipts) => {
                receipts.iter().map(|receipt| receipt.body.len() + 64).sum()
            }
            Change::Backup { .. } | Change::Intend(..) | Change::GiveUp(_) => 64,
            Change::Cluster(body) => body.len() + 64,
        }
    }

    async fn write(&self, connection: &mut SqliteConnection, digest: &mut Digest) -> sqlx::Result<()> {
        match self {
            Change::Entomb(tombstones) => {
                for tombstone in tombstones {
                    if learn(tombstone, connection, digest).await? {
                        unfinished("INSERT INTO unfinished(key_id) VALUES (?)", &tombstone.key_id, connection).await?;
                    }
                    unfinished("DELETE FROM replacing WHERE key_id = ?", &tombstone.key_id, connection).await?;
                }
            }
            Change::Learn(tombstones) => {
                for tombstone in tombstones {
                    learn(tombstone, connection, digest).await?;
                }
            }
            Change::Owe(tombstones) => {
                for tombstone in tombstones {
                    learn(tombstone, connection, digest).await?;
                    sqlx::query(
                        "INSERT OR IGNORE INTO unfinished(key_id) SELECT ?1 WHERE NOT EXISTS (SELECT 1 FROM receipt WHERE receipt_id = ?2)",
                    )
                    .bind(tombstone.key_id.to_vec())
                    .bind(tombstone.receipt_id.to_vec())
                    .execute(&mut *connection)
                    .await?;
                }
            }
            Change::Intend(tombstone, next_key_id) => {
                sqlx::query(
                    "INSERT OR REPLACE INTO replacing(key_id, id_hash, slot, receipt_id, at, next_key_id) VALUES (?, ?, ?, ?, ?, ?)",
                )
                .bind(tombstone.key_id.to_vec())
                .bind(tombstone.id_hash.0.to_vec())
                .bind(i64::from(tombstone.slot.number()))
                .bind(tombstone.receipt_id.to_vec())
                .bind(tombstone.at_us)
                .bind(next_key_id.to_vec())
                .execute(connection)
                .await?;
            }
            Change::GiveUp(key_id) => {
                unfinished("DELETE FROM replacing WHERE key_id = ?", key_id, connection).await?;
            }
            Change::Finish(receipts) | Change::Keep(receipts) => {
                let finishes = matches!(self, Change::Finish(_));
                for ReceiptRow { receipt_id, key_id, body } in receipts {
                    let insert = sqlx::query("INSERT OR IGNORE INTO receipt(receipt_id, body) VALUES (?, ?)");
                    let done = insert.bind(receipt_id.to_vec()).bind(body.clone()).execute(&mut *connection).await?;
                    if done.rows_affected() > 0 {
                        digest.add(&receipt_hash(receipt_id, body));
                    }
                    if finishes {
                        unfinished("DELETE FROM unfinished WHERE key_id = ?", key_id, connection).await?;
                    }
                }
            }
            Change::Renew(receipts) => {
                for ReceiptRow { receipt_id, body, .. } in receipts {
                    let find = sqlx::query("SELECT body FROM receipt WHERE receipt_id = ?").bind(receipt_id.to_vec());
                    let Some(row) = find.fetch_optional(&mut *connection).await? else { continue };
                    digest.subtract(&receipt_hash(receipt_id, row.try_get(0)?));
                    digest.add(&receipt_hash(receipt_id, body));
                    let renew = sqlx::query("UPDATE receipt SET body = ? WHERE receipt_id = ?");
                    renew.bind(body.clone()).bind(receipt_id.to_vec()).execute(&mut *connection).await?;
                }
            }
            Change::Backup { what, at_us } => {
                let insert = sqlx::query("INSERT INTO backup(what, at) VALUES (?, ?)").bind(*what).bind(*at_us);
                insert.execute(connection).await?;
                digest.add(&backup_hash(what, *at_us));
            }
            Change::Cluster(body) => {
                let before =
                    sqlx::query("SELECT body FROM cluster WHERE one = 1").fetch_optional(&mut *connection).await?;
                if let Some(row) = before {
                    digest.subtract(&cluster_hash(row.try_get(0)?));
                }
                let keep = sqlx::query("INSERT OR REPLACE INTO cluster(one, body) VALUES (1, ?)").bind(body.clone());
                keep.execute(connection).await?;
                digest.add(&cluster_hash(body));
            }
        }
        Ok(())
    }
}

/// Keeps a tombstone; whether it was news.
async fn learn(tombstone: &Tombstone, connection: &mut SqliteConnection, digest: &mut Digest) -> sqlx::Result<bool> {
    let is_new = insert(tombstone).execute(&mut *connection).await?.rows_affected() > 0;
    if is_new {
        digest.add(&tombstone.hash());
    }
    Ok(is_new)
}

fn insert(tombstone: &Tombstone) -> Bound {
    sqlx::query("INSERT OR IGNORE INTO tombstone(key_id, id_hash, slot, receipt_id, at) VALUES (?, ?, ?, ?, ?)")
        .bind(tombstone.key_id.to_vec())
        .bind(tombstone.id_hash.0.to_vec())
        .bind(i64::from(tombstone.slot.number()))
        .bind(tombstone.receipt_id.to_vec())
        .bind(tombstone.at_us)
}

async fn unfinished(statement: &'static str, key_id: &[u8; 16], connection: &mut SqliteConnection) -> sqlx::Result<()> {
    sqlx::query(statement).bind(key_id.to_vec()).execute(connection).await.map(|_| ())
}

/// The open `node.db`. Cheap to clone.
#[derive(Clone)]
pub struct NodeStore {
    database: Arc<Database<TableBook<Change>>>,
}

fn spec(directory: PathBuf, disk_id: DiskId, options: &FileOptions) -> FileSpec {
    FileSpec { path: directory.join(FILE_NAME), role: Role::Node, disk_id, options: options.clone() }
}

impl NodeStore {
    /// Makes the file of a new store.
    ///
    /// # Errors
    /// The file exists or cannot be written.
    pub async fn create(directory: PathBuf, disk_id: DiskId, options: &FileOptions) -> Result<(), OpenError> {
        spec(directory, disk_id, options).create(async |_| Ok(())).await
    }

    /// Makes the file of a store that is restored: who was erased before, which is to be carried out again, and receipts of it.
    ///
    /// # Errors
    /// The file exists or cannot be written. It is of no use then.
    pub async fn restore(
        directory: PathBuf,
        disk_id: DiskId,
        options: &FileOptions,
        tombstones: Vec<Tombstone>,
        receipts: Vec<ReceiptRow>,
    ) -> Result<(), OpenError> {
        let spec = spec(directory, disk_id, options);
        let mut connection = spec.begin_build().await?;
        let mut digest = Digest::default();
        for change in [Change::Entomb(tombstones), Change::Keep(receipts)] {
            let written = table_book::Change::write(&change, &mut connection, &mut digest).await;
            written.map_err(|error| spec.read_failed(error))?;
        }
        let progress = Progress { next_position: 1, mark_position: 0, indexed_position: 0, digest };
        spec.finish_build(connection, &Stored { commits: 1, progress }).await
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
        let mut inspected = spec.inspect().await?;
        let (stored, witnessed) = (inspected.stored, inspected.witnessed);
        let found = sum(&mut inspected.connection).await;
        inspected.close().await;
        let found = found.map_err(|error| spec.read_failed(error))?;
        if found != stored.progress.digest || witnessed.is_some_and(|digest| digest != found) {
            return Err(spec.damaged("the digest of its rows is not the one that was committed"));
        }
        let book = TableBook::new(stored.progress.digest);
        let database = Database::open(&spec, stored.commits, book, supervisor).await?;
        Ok(NodeStore { database: Arc::new(database) })
    }

    /// Adds tombstones of erasures that are to be done; durable when this returns. Those of keys that have one already change nothing.
    ///
    /// # Errors
    /// None was written, or that is unknown; send them again.
    pub async fn entomb(&self, tombstones: Vec<Tombstone>) -> Result<(), CommitError> {
        self.database.change(Change::Entomb(tombstones)).await
    }

    /// Adds tombstones of erasures that other nodes carry out; durable when this returns. One that is there already changes nothing.
    ///
    /// # Errors
    /// None was written, or that is unknown; send them again.
    pub async fn learn(&self, tombstones: Vec<Tombstone>) -> Result<(), CommitError> {
        self.database.change(Change::Learn(tombstones)).await
    }

    /// Adds tombstones whose erasures this node carries out when their slots come to it, unless it has their receipts; durable when this returns.
    ///
    /// # Errors
    /// None was written, or that is unknown; send them again.
    pub async fn owe(&self, tombstones: Vec<Tombstone>) -> Result<(), CommitError> {
        self.database.change(Change::Owe(tombstones)).await
    }

    /// Adds receipts and ends their erasures; durable when this returns. A receipt of a name that there is one of changes nothing.
    ///
    /// # Errors
    /// None was written, or that is unknown; send them again.
    pub async fn finish(&self, receipts: Vec<ReceiptRow>) -> Result<(), CommitError> {
        self.database.change(Change::Finish(receipts)).await
    }

    /// Adds receipts without ending an erasure.
    ///
    /// # Errors
    /// None was written, or that is unknown; send them again.
    pub async fn keep(&self, receipts: Vec<ReceiptRow>) -> Result<(), CommitError> {
        self.database.change(Change::Keep(receipts)).await
    }

    /// Puts receipts in the place of those of the same names; durable when this returns. One that there is none of is not added.
    ///
    /// # Errors
    /// None was written, or that is unknown; send them again.
    pub async fn renew(&self, receipts: Vec<ReceiptRow>) -> Result<(), CommitError> {
        self.database.change(Change::Renew(receipts)).await
    }

    /// Notes that the life with the key of `tombstone` is about to be replaced by the one with the key `next_key_id`: should that come to pass,
    /// it is to be erased. Ended by the tombstone, or by [`NodeStore::give_up`].
    ///
    /// # Errors
    /// It was not written, or that is unknown.
    pub async fn intend(&self, tombstone: Tombstone, next_key_id: [u8; 16]) -> Result<(), CommitError> {
        self.database.change(Change::Intend(tombstone, next_key_id)).await
    }

    /// Takes back that the life with this key is about to be replaced.
    ///
    /// # Errors
    /// It was not written, or that is unknown.
    pub async fn give_up(&self, key_id: [u8; 16]) -> Result<(), CommitError> {
        self.database.change(Change::GiveUp(key_id)).await
    }

    /// Lives that are about to be replaced, as the tombstones that they get then, each with the key of the next life.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn intended(&self) -> Result<Vec<(Tombstone, [u8; 16])>, ReadError> {
        let query = sqlx::query("SELECT *, 0 AS number FROM replacing");
        let rows = query.fetch_all(&self.database.readers).await.map_err(|error| self.read_error(error))?;
        let read = |row: &SqliteRow| -> sqlx::Result<Option<(Tombstone, [u8; 16])>> {
            let next = row.try_get::<Vec<u8>, _>("next_key_id")?.try_into().ok();
            Ok(Tombstone::from_row(row)?.zip(next))
        };
        let damaged = || ReadError::BadRow {
            file: self.database.file.to_string(),
            position: 0,
            detail: "a row of the lives to be replaced is damaged".to_owned(),
        };
        let intended = |row| read(row).map_err(|error| self.read_error(error)).and_then(|row| row.ok_or_else(damaged));
        rows.iter().map(intended).collect()
    }

    /// Notes that a backup of `what` was made, with all that there was at this time.
    ///
    /// # Errors
    /// It was not written, or that is unknown.
    pub async fn note_backup(&self, what: &'static str, at_us: i64) -> Result<(), CommitError> {
        self.database.change(Change::Backup { what, at_us }).await
    }

    /// Erasures that are not finished, in the order in which they were asked for.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn unfinished(&self) -> Result<Vec<Tombstone>, ReadError> {
        let all = format!("SELECT {COLUMNS} FROM unfinished JOIN tombstone USING (key_id) ORDER BY number");
        Ok(self.tombstones_by(sqlx::query(sqlx::AssertSqlSafe(all))).await?.into_iter().map(|(_, row)| row).collect())
    }

    /// Tombstones in the order in which they were made, above `after`, with the number of each.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn tombstones(&self, after: i64, rows_max: u32) -> Result<Vec<(i64, Tombstone)>, ReadError> {
        let page = format!("SELECT {COLUMNS} FROM tombstone WHERE number > ? ORDER BY number LIMIT 0 + ?");
        self.tombstones_by(sqlx::query(sqlx::AssertSqlSafe(page)).bind(after).bind(rows_max)).await
    }

    /// The number of the tombstone that names this key.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn tombstone_number(&self, key_id: [u8; 16]) -> Result<Option<i64>, ReadError> {
        let query = sqlx::query("SELECT number FROM tombstone WHERE key_id = ?").bind(key_id.to_vec());
        let row = query.fetch_optional(&self.database.readers).await.map_err(|error| self.read_error(error))?;
        row.map(|row| row.try_get(0)).transpose().map_err(|error| self.read_error(error))
    }

    /// The number of the newest tombstone; 0 if there is none.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn newest_tombstone(&self) -> Result<i64, ReadError> {
        let row = sqlx::query("SELECT coalesce(max(number), 0) FROM tombstone").fetch_one(&self.database.readers).await;
        row.and_then(|row| row.try_get(0)).map_err(|error| self.read_error(error))
    }

    /// The tombstones that name these keys.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn tombstones_by_key(&self, key_ids: &[[u8; 16]]) -> Result<Vec<Tombstone>, ReadError> {
        if key_ids.is_empty() {
            return Ok(Vec::new());
        }
        let by_key = format!("SELECT {COLUMNS} FROM tombstone WHERE key_id IN (SELECT unhex(value) FROM json_each(?))");
        let query = sqlx::query(sqlx::AssertSqlSafe(by_key)).bind(packed::names(key_ids));
        Ok(self.tombstones_by(query).await?.into_iter().map(|(_, tombstone)| tombstone).collect())
    }

    /// The tombstones of an entity, oldest life first.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn tombstones_of(&self, id_hash: EntityHash) -> Result<Vec<Tombstone>, ReadError> {
        let of = format!("SELECT {COLUMNS} FROM tombstone WHERE id_hash = ? ORDER BY number");
        let found = self.tombstones_by(sqlx::query(sqlx::AssertSqlSafe(of)).bind(id_hash.0.to_vec())).await?;
        Ok(found.into_iter().map(|(_, row)| row).collect())
    }

    async fn tombstones_by(&self, query: Bound) -> Result<Vec<(i64, Tombstone)>, ReadError> {
        let rows = query.fetch_all(&self.database.readers).await.map_err(|error| self.read_error(error))?;
        let read = |row: &SqliteRow| -> sqlx::Result<(i64, Option<Tombstone>)> {
            Ok((row.try_get("number")?, Tombstone::from_row(row)?))
        };
        let tombstone = |row| {
            let (number, row) = read(row).map_err(|error| self.read_error(error))?;
            let damaged = || ReadError::BadRow {
                file: self.database.file.to_string(),
                position: 0,
                detail: format!("tombstone number {number} is damaged"),
            };
            row.map(|row| (number, row)).ok_or_else(damaged)
        };
        rows.iter().map(tombstone).collect()
    }

    /// The receipt with this name.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn receipt(&self, receipt_id: [u8; 16]) -> Result<Option<String>, ReadError> {
        let query = sqlx::query("SELECT body FROM receipt WHERE receipt_id = ?").bind(receipt_id.to_vec());
        let row = query.fetch_optional(&self.database.readers).await.map_err(|error| self.read_error(error))?;
        row.map(|row| row.try_get(0)).transpose().map_err(|error| self.read_error(error))
    }

    /// When the newest backup of `what` was made, if there is one. Microseconds since 1970.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn last_backup(&self, what: &'static str) -> Result<Option<i64>, ReadError> {
        let query = sqlx::query("SELECT max(at) FROM backup WHERE what = ?").bind(what);
        let row = query.fetch_one(&self.database.readers).await.map_err(|error| self.read_error(error))?;
        row.try_get(0).map_err(|error| self.read_error(error))
    }

    /// Keeps what the node knows of its cluster, in the place of what it knew before; durable when this returns. What it says is the caller's.
    ///
    /// # Errors
    /// It was not written, or that is unknown; keep it again.
    pub async fn keep_cluster(&self, body: Vec<u8>) -> Result<(), CommitError> {
        self.database.change(Change::Cluster(body)).await
    }

    /// What the node knows of its cluster; none if it is in no cluster.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn cluster(&self) -> Result<Option<Vec<u8>>, ReadError> {
        let query = sqlx::query("SELECT body FROM cluster WHERE one = 1");
        let row = query.fetch_optional(&self.database.readers).await.map_err(|error| self.read_error(error))?;
        row.map(|row| row.try_get(0)).transpose().map_err(|error| self.read_error(error))
    }

    /// Reads every row and compares their sum with what was committed. Returns what is wrong, in words.
    ///
    /// # Errors
    /// The file cannot be read at all.
    pub async fn verify(&self) -> Result<Vec<String>, ReadError> {
        let expected = self.database.audit().await?;
        let mut damage =
            crate::verify::integrity(&self.database.readers).await.map_err(|error| self.read_error(error))?;
        let mut reader = self.database.readers.acquire().await.map_err(|error| self.read_error(error))?;
        let found = sum(&mut reader).await.map_err(|error| self.read_error(error))?;
        if self.database.audit().await? == expected && found != expected.stored.progress.digest {
            damage.push("the digest of its rows is not the one that was committed".to_owned());
        }
        Ok(damage)
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

/// The sum of all rows. There are few, and small.
async fn sum(connection: &mut SqliteConnection) -> sqlx::Result<Digest> {
    use futures_util::TryStreamExt;
    let mut digest = Digest::default();
    let mut rows =
        sqlx::query("SELECT number, key_id, id_hash, slot, receipt_id, at FROM tombstone").fetch(&mut *connection);
    while let Some(row) = rows.try_next().await? {
        let damaged = || sqlx::Error::Decode("a tombstone is damaged".into());
        digest.add(&Tombstone::from_row(&row)?.ok_or_else(damaged)?.hash());
    }
    drop(rows);
    let mut rows = sqlx::query("SELECT receipt_id, body FROM receipt").fetch(&mut *connection);
    while let Some(row) = rows.try_next().await? {
        digest.add(&receipt_hash(row.try_get(0)?, row.try_get(1)?));
    }
    drop(rows);
    let mut rows = sqlx::query("SELECT what, at FROM backup").fetch(&mut *connection);
    while let Some(row) = rows.try_next().await? {
        digest.add(&backup_hash(row.try_get(0)?, row.try_get(1)?));
    }
    drop(rows);
    if let Some(row) = sqlx::query("SELECT body FROM cluster").fetch_optional(connection).await? {
        digest.add(&cluster_hash(row.try_get(0)?));
    }
    Ok(digest)
}
