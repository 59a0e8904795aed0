//! A small workload and an oracle: which transactions were acknowledged, and which are in the file.
//!
//! Transaction `n` inserts a number of rows that follows from `n`, so that half a transaction is seen.
#![allow(dead_code, unreachable_pub)] // a module of several tests, none of which uses all of it

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row};

/// What a workload was told before it saw its first error.
#[derive(Debug, Default, Clone)]
pub struct Oracle {
    /// The table was created.
    pub created: bool,
    /// So many transactions were acknowledged: 0, 1, 2, ...
    pub acked: i64,
}

/// What is in the file afterwards.
#[derive(Debug)]
pub struct Found {
    /// Acknowledged transactions that are not there.
    pub lost: Vec<i64>,
    /// Transactions that are there.
    pub present: i64,
}

pub fn options(path: &Path, synchronous: SqliteSynchronous) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(synchronous)
        .pragma("wal_autocheckpoint", "0")
}

pub async fn create(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    connection.execute("CREATE TABLE part (tx INTEGER, part INTEGER, body BLOB, PRIMARY KEY (tx, part))").await?;
    Ok(())
}

/// The number of rows of a transaction.
pub fn parts_of(tx: i64) -> i64 {
    1 + tx * 7 % 5
}

pub async fn append(connection: &mut SqliteConnection, tx: i64) -> sqlx::Result<()> {
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    for part in 0..parts_of(tx) {
        sqlx::query("INSERT INTO part VALUES (?, ?, randomblob(?))")
            .bind(tx)
            .bind(part)
            .bind(100 + (tx * 31 + part) % 900)
            .execute(&mut *transaction)
            .await?;
    }
    transaction.commit().await
}

/// `mode` is PASSIVE, FULL, RESTART or TRUNCATE. Being busy is no error.
pub async fn checkpoint(connection: &mut SqliteConnection, mode: &str) -> sqlx::Result<()> {
    connection.execute(AssertSqlSafe(format!("PRAGMA wal_checkpoint({mode})"))).await?;
    Ok(())
}

/// Reads everything once; the number of rows.
pub async fn read(connection: &mut SqliteConnection) -> sqlx::Result<i64> {
    sqlx::query_scalar("SELECT count(*) + coalesce(sum(length(body)), 0) * 0 FROM part").fetch_one(connection).await
}

/// Opens the file with `options` and judges it.
///
/// # Errors
/// If it cannot be opened or read, SQLite finds it corrupt, or it holds half a transaction.
pub async fn judge(options: &SqliteConnectOptions, oracle: &Oracle) -> Result<Found, Box<dyn Error + Send + Sync>> {
    let mut connection = options.clone().connect().await?;
    let integrity: String = sqlx::query_scalar("PRAGMA integrity_check").fetch_one(&mut connection).await?;
    if integrity != "ok" {
        return Err(integrity.into());
    }
    let tables: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sqlite_schema WHERE name = 'part'").fetch_one(&mut connection).await?;
    let mut parts = BTreeMap::new();
    if tables == 1 {
        for row in connection.fetch_all("SELECT tx, count(*) FROM part GROUP BY tx").await? {
            parts.insert(row.try_get::<i64, _>(0)?, row.try_get::<i64, _>(1)?);
        }
    } else if oracle.created {
        return Err("the acknowledged CREATE TABLE is gone".into());
    }
    connection.close().await?;
    if let Some((tx, _)) = parts.iter().find(|(tx, count)| **count != parts_of(**tx)) {
        return Err(format!("half of transaction {tx} is there").into());
    }
    let lost = (0..oracle.acked).filter(|tx| !parts.contains_key(tx)).collect();
    Ok(Found { lost, present: parts.len() as i64 })
}
