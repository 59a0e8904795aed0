//! The references of `project`: SQLite itself, in bare loops with prepared statements.

use std::{path::Path, time::Instant};

use anyhow::{Result, ensure};
use rusqlite::Connection;

use super::account::{TABLE, Totals, UPSERT, cents, id};
use crate::store;

/// The pragmas that the file of a read model has.
const PRAGMAS: &str = "
PRAGMA page_size = 4096;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA journal_size_limit = 67108864;
PRAGMA secure_delete = ON;
PRAGMA cache_size = -16000;
PRAGMA temp_store = MEMORY;
PRAGMA foreign_keys = OFF;
PRAGMA mmap_size = 0;
PRAGMA trusted_schema = OFF;
PRAGMA cell_size_check = ON;
";

/// Events of one transaction: as many as a projection that catches up applies at once.
const TRANSACTION_EVENTS: u64 = 16_384;

/// The rows of all shard files, one file after the other, each in the order of its log, with their bodies: how long that took.
pub(crate) fn read_logs(directory: &Path, rows_expected: u64) -> Result<f64> {
    let (start, mut rows_read) = (Instant::now(), 0);
    for connection in store::shard_files(directory)? {
        // As large as that of Kuma's readers.
        connection.execute_batch("PRAGMA cache_size = -2000; PRAGMA mmap_size = 0;")?;
        let mut select = connection.prepare("SELECT * FROM log ORDER BY position")?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let numbers: [i64; 9] = [0, 1, 2, 3, 4, 5, 6, 7, 9].map(|column| row.get(column).unwrap_or_default());
            let body: Vec<u8> = row.get(10)?;
            std::hint::black_box((numbers, body));
            rows_read += 1;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    ensure!(rows_read == rows_expected, "the logs have {rows_read} rows, expected {rows_expected}");
    Ok(seconds)
}

/// The upserts of all events, in the order in which they were committed, into a table of its own: how long that took. Ids and numbers are
/// there before.
pub(crate) fn upsert(directory: &Path, accounts: u64, events: u64, batch: u64, expected: Totals) -> Result<f64> {
    let ids: Vec<String> = (0..accounts).map(id).collect();
    let values: Vec<(usize, i64)> = (0..events)
        .map(|number| {
            let (commit, place) = (number / batch, number % batch);
            let (account, stamp) = (commit % accounts, 1 + commit / accounts * batch + place);
            (account as usize, cents(account, stamp))
        })
        .collect();
    let connection = Connection::open(directory.join("reference.db"))?;
    connection.execute_batch(PRAGMAS)?;
    connection.execute_batch(TABLE)?;
    let (mut begin, mut commit) = (connection.prepare("BEGIN IMMEDIATE")?, connection.prepare("COMMIT")?);
    let mut upsert = connection.prepare(UPSERT)?;
    let start = Instant::now();
    for transaction in values.chunks(TRANSACTION_EVENTS as usize) {
        begin.execute([])?;
        for (account, cents) in transaction {
            upsert.execute((ids.get(*account), cents))?;
        }
        commit.execute([])?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let found = connection.query_row("SELECT count(*), sum(events), sum(cents) FROM total", [], |row| {
        Ok(Totals { accounts: row.get(0)?, events: row.get(1)?, cents: row.get(2)? })
    })?;
    ensure!(found == expected, "the reference has {found:?}, expected {expected:?}");
    Ok(seconds)
}
