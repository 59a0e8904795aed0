//! The reference of `write`: SQLite itself, in a bare loop with prepared statements.
//!
//! The same as Kuma's run has: files, rows, bytes a row, rows a commit, table and indexes, durability and page size. Simpler than
//! Kuma: one thread for each file that inserts row by row and commits, nothing is sealed, checked or reported, and checkpoints run
//! inline at 4000 pages, as SQLite does by itself.

use std::{
    path::Path,
    sync::Barrier,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, anyhow};
use rusqlite::Connection;

use crate::{load::Payloads, usage::Usage};

/// The pragmas that Kuma's writer has, but for `wal_autocheckpoint`.
const PRAGMAS: &str = "
PRAGMA page_size = 4096;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA wal_autocheckpoint = 4000;
PRAGMA journal_size_limit = 67108864;
PRAGMA secure_delete = ON;
PRAGMA cache_size = -16000;
PRAGMA temp_store = MEMORY;
PRAGMA foreign_keys = OFF;
PRAGMA mmap_size = 0;
PRAGMA trusted_schema = OFF;
PRAGMA cell_size_check = ON;
";

/// Kuma's `log`.
const TABLES: &str = "
CREATE TABLE log(
    position INTEGER PRIMARY KEY,
    slot INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    eid INTEGER NOT NULL,
    version INTEGER NOT NULL,
    count INTEGER NOT NULL,
    at INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    append_key BLOB,
    checksum INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX log_by_entity ON log(eid, version);
";

const INSERT: &str = "INSERT INTO log(position, slot, seq, eid, version, count, at, epoch, append_key, checksum, body)
    VALUES (?, ?, ?, ?, ?, ?, ?, 1, NULL, ?, ?)";

/// What the loop is to do.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) files: u64,
    /// Rows in all files.
    pub(crate) rows: u64,
    pub(crate) rows_per_commit: u64,
    /// Events in a row; only written down.
    pub(crate) batch: u64,
    pub(crate) body_bytes: u32,
    pub(crate) entities: u64,
}

/// What it took.
pub(crate) struct Outcome {
    pub(crate) wall: Duration,
    pub(crate) cpu: Duration,
    /// With the last checkpoint, as with Kuma.
    pub(crate) written: Option<u64>,
}

/// Runs the loop in a new directory.
pub(crate) fn run(directory: &Path, plan: &Plan) -> Result<Outcome> {
    std::fs::create_dir(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let open = |file: u64| -> Result<Connection> {
        let connection = Connection::open(directory.join(format!("raw-{file:03}.db")))?;
        connection.execute_batch(PRAGMAS)?;
        connection.execute_batch(TABLES)?;
        Ok(connection)
    };
    let connections: Vec<Connection> =
        (0..plan.files).map(open).collect::<Result<_>>().context("the reference loop")?;
    let bodies = Payloads::new(plan.body_bytes);
    let ready = Barrier::new(connections.len() + 1);
    std::thread::scope(|scope| {
        let start_loop = |(file, connection)| {
            let (bodies, ready) = (&bodies, &ready);
            scope.spawn(move || {
                ready.wait();
                // The connection outlives the measurement: closing it runs a checkpoint.
                fill(&connection, plan, file, bodies).map(|()| connection)
            })
        };
        let threads: Vec<_> = (0..).zip(connections).map(start_loop).collect();
        ready.wait();
        let (start, before) = (Instant::now(), Usage::now());
        let mut open = Vec::new();
        for thread in threads {
            open.push(thread.join().map_err(|_| anyhow!("a thread of the reference loop panicked"))??);
        }
        let (wall, cpu) = (start.elapsed(), Usage::now().since(&before).cpu);
        drop(open);
        Ok(Outcome { wall, cpu, written: Usage::now().since(&before).written })
    })
}

fn fill(connection: &Connection, plan: &Plan, file: u64, bodies: &Payloads) -> rusqlite::Result<()> {
    let share = |total: u64| total / plan.files + u64::from(file < total % plan.files);
    let (rows, entities) = (share(plan.rows), share(plan.entities).max(1));
    let mut begin = connection.prepare("BEGIN IMMEDIATE")?;
    let mut commit = connection.prepare("COMMIT")?;
    let mut insert = connection.prepare(INSERT)?;
    let mut row = 0;
    while row < rows {
        begin.execute([])?;
        let end = rows.min(row + plan.rows_per_commit);
        while row < end {
            let (entity, turn) = (row % entities, row / entities);
            let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as i64;
            let body = bodies.window(row ^ (file << 48));
            let checksum = body.first_chunk().map_or(0, |chunk| i64::from_le_bytes(*chunk));
            let (eid, version) = (entity as i64 + 1, (turn * plan.batch) as i64 + 1);
            let (position, slot) = (row as i64 + 1, (entity % 4096) as i64);
            insert.execute((position, slot, turn as i64, eid, version, plan.batch as i64, at, checksum, body))?;
            row += 1;
        }
        commit.execute([])?;
    }
    Ok(())
}
