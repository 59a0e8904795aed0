//! The statements of a group commit, in a few fixed sizes, so that they stay prepared.
//!
//! Each round trip to a connection's thread costs some 20 us of processor time and four context switches; with one event a commit
//! that was more than all the rest. So the usual group is **one** round trip: `BEGIN; UPDATE progress; INSERT; COMMIT`. A script's
//! last insert has room for a power of two of rows; those that are not bound are NULL and are filtered out.
//!
//! No statement says `LIMIT ?`: SQLite looks at the bound number to plan by it, and compiles the statement anew each time that it is run. With
//! `LIMIT 0 + ?` it does not. <https://sqlite.org/c3ref/stmt_status.html> (`SQLITE_STMTSTATUS_REPREPARE`)

use std::sync::LazyLock;

use sqlx::{
    Row, Sqlite, SqliteConnection,
    query::Query,
    sqlite::{SqliteArguments, SqliteRow},
};

use crate::{
    Commit, CopyId, EntityRow, KeyRow, LogRow, Slot, TransferId,
    append_keys::KeyedRow,
    log_book::Place,
    log_row::StoredRow,
    progress::{self, Stored},
    schema,
    slots::SlotImage,
    tail::TailRow,
};

/// A query with some of its parameters bound.
pub(crate) type Bound = Query<'static, Sqlite, SqliteArguments>;

/// Rows in the largest insert.
const ROWS_MAX: usize = 128;
/// Rows that the inserts of a table have room for.
const SIZES: [usize; 4] = [ROWS_MAX, 32, 8, 1];

const LOG_COLUMNS: usize = 11;
const LOG_HEAD: &str =
    "INSERT INTO log(position, slot, seq, eid, version, count, at, epoch, append_key, checksum, body)";
const INCOMING_HEAD: &str =
    "INSERT INTO incoming_log(transfer, seq, slot, entity, version, count, at, epoch, append_key, checksum, body)";
const INCOMING_ENTITY_HEAD: &str = "INSERT OR REPLACE INTO incoming_entity(
    transfer, slot, entity, kind, id_hash, life, sealed_id, key_id, created_at, erased_at, checksum)";
const SLOT_COLUMNS: usize = 16;
const SLOT_HEAD: &str = "INSERT OR REPLACE INTO slot_token(
    slot, state, epoch, floor, last_owned, peer, transfer, next_seq, len, digest,
    staged_transfer, staged_epoch, staged_from, staged_len, staged_digest, checksum)";
const ENTITY_COLUMNS: usize = 11;
const ENTITY_HEAD: &str =
    "INSERT INTO entity(eid, copy, slot, kind, id_hash, life, sealed_id, key_id, created_at, erased_at, checksum)";

/// Whether a script opens the transaction that it commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transaction {
    /// `BEGIN` is part of the script.
    New,
    /// It is open already.
    Open,
}

/// For each power of two up to [`ROWS_MAX`], the script that ends a transaction with so many rows; without and with `BEGIN`.
static LAST: LazyLock<[Vec<&'static str>; 2]> = LazyLock::new(|| {
    let script = |begin: &str, rows: usize| {
        let update = progress::UPDATE;
        let values = values(LOG_COLUMNS, rows);
        leak(format!("{begin}{update}; {LOG_HEAD} SELECT * FROM ({values}) WHERE column1 IS NOT NULL; COMMIT"))
    };
    ["", "BEGIN IMMEDIATE; "].map(|begin| (0..=ROWS_MAX.ilog2()).map(|power| script(begin, 1 << power)).collect())
});
static FULL: LazyLock<&str> = LazyLock::new(|| leak(format!("{LOG_HEAD} {}", values(LOG_COLUMNS, ROWS_MAX))));
static ONE: LazyLock<&str> = LazyLock::new(|| leak(format!("{LOG_HEAD} {}", values(LOG_COLUMNS, 1))));
static ENTITIES: Inserts = LazyLock::new(|| inserts(ENTITY_HEAD, ENTITY_COLUMNS));
static COPIED: Inserts = LazyLock::new(|| inserts(LOG_HEAD, LOG_COLUMNS));
static INCOMING: Inserts = LazyLock::new(|| inserts(INCOMING_HEAD, LOG_COLUMNS));
static INCOMING_ENTITIES: Inserts = LazyLock::new(|| inserts(INCOMING_ENTITY_HEAD, ENTITY_COLUMNS));
static INDEX: Inserts = LazyLock::new(|| inserts("INSERT INTO log_index(eid, version, position)", 3));
/// The first commit with a key keeps it. Were a second one an error, it would fail every group from then on: nothing that could be
/// refused any more is to blame for it.
static KEY_INDEX: Inserts = LazyLock::new(|| inserts("INSERT OR IGNORE INTO key_index(eid, append_key, position)", 3));
static SLOTS: Inserts = LazyLock::new(|| inserts(SLOT_HEAD, SLOT_COLUMNS));
static KEYS: Inserts = LazyLock::new(|| inserts("INSERT INTO data_key(key_id, id_hash, wrapped, created_at)", 4));
static END: LazyLock<&str> = LazyLock::new(|| leak(format!("{}; COMMIT", progress::UPDATE)));

fn values(columns: usize, rows: usize) -> String {
    let row = format!("({})", vec!["?"; columns].join(", "));
    format!("VALUES {}", vec![row; rows].join(", "))
}

/// sqlx takes a string that lives for ever for one that no user had a hand in. There are some thirty of them.
fn leak(statement: String) -> &'static str {
    statement.leak()
}

/// A statement for each of [`SIZES`].
type Inserts = LazyLock<[&'static str; SIZES.len()]>;

/// Rows that are not bound are NULL, and left out.
fn inserts(head: &str, columns: usize) -> [&'static str; SIZES.len()] {
    SIZES.map(|rows| leak(format!("{head} SELECT * FROM ({}) WHERE column1 IS NOT NULL", values(columns, rows))))
}

/// Runs a statement that has no parameters.
pub(crate) async fn execute(connection: &mut SqliteConnection, statement: &'static str) -> sqlx::Result<()> {
    sqlx::query(statement).execute(connection).await.map(|_| ())
}

/// Inserts all but the last rows (at most [`ROWS_MAX`] of them), which are returned.
pub(crate) async fn insert_all_but_last<'a, 'b>(
    connection: &mut SqliteConnection,
    mut rows: &'a [(&'b Commit, Place)],
) -> sqlx::Result<&'a [(&'b Commit, Place)]> {
    while rows.len() > ROWS_MAX {
        let (now, later) = rows.split_at(ROWS_MAX);
        now.iter().fold(sqlx::query(*FULL), bind_commit).execute(&mut *connection).await?;
        rows = later;
    }
    Ok(rows)
}

/// Whether [`insert_all_but_last`] would insert anything.
pub(crate) fn is_one_script(rows: usize) -> bool {
    rows <= ROWS_MAX
}

/// Inserts the last rows and commits, with the progress as of then.
pub(crate) async fn insert_and_commit(
    connection: &mut SqliteConnection,
    transaction: Transaction,
    stored: &Stored,
    rows: &[(&Commit, Place)],
) -> sqlx::Result<()> {
    let power = rows.len().next_power_of_two().ilog2() as usize;
    let scripts = &LAST[usize::from(transaction == Transaction::New)];
    let Some(script) = scripts.get(power) else {
        return Err(sqlx::Error::Protocol("too many rows for a script".to_owned()));
    };
    let query = progress::bind(sqlx::query(*script), stored);
    rows.iter().fold(query, bind_commit).execute(connection).await.map(|_| ())
}

/// Commits, with the progress as of then.
pub(crate) async fn commit(connection: &mut SqliteConnection, stored: &Stored) -> sqlx::Result<()> {
    progress::bind(sqlx::query(*END), stored).execute(connection).await.map(|_| ())
}

/// Makes durable that the log was cut: SQLite does not sync it then, so that its old length, and all that was in it, would come back with
/// a power loss. It syncs the log with the next commit. This one changes nothing, and is a commit all the same: a row that is replaced by
/// itself would be none.
pub(crate) async fn sync_log(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    let same = format!("PRAGMA user_version = {}", schema::FORMAT);
    sqlx::query(sqlx::AssertSqlSafe(same)).execute(connection).await.map(|_| ())
}

/// Inserts one commit.
pub(crate) async fn insert_one(connection: &mut SqliteConnection, row: &(&Commit, Place)) -> sqlx::Result<()> {
    bind_commit(sqlx::query(*ONE), row).execute(connection).await.map(|_| ())
}

/// Inserts new entities.
pub(crate) async fn insert_entities(connection: &mut SqliteConnection, entities: &[&EntityRow]) -> sqlx::Result<()> {
    insert_all(connection, *ENTITIES, entities, |query, entity| bind_entity(query, entity)).await
}

/// Adds rows of the log to its index.
pub(crate) async fn insert_index(connection: &mut SqliteConnection, rows: &[TailRow]) -> sqlx::Result<()> {
    insert_all(connection, *INDEX, rows, |query, row| {
        query.bind(row.eid).bind(row.version.cast_signed()).bind(row.position.cast_signed())
    })
    .await
}

/// Adds rows of the log that have an append key to the index of those.
pub(crate) async fn insert_keys(connection: &mut SqliteConnection, rows: &[KeyedRow]) -> sqlx::Result<()> {
    insert_all(connection, *KEY_INDEX, rows, |query, row| {
        query.bind(row.eid).bind(row.append_key.to_vec()).bind(row.position.cast_signed())
    })
    .await
}

/// Inserts rows of the log that have their places.
pub(crate) async fn insert_copied(connection: &mut SqliteConnection, rows: &[StoredRow]) -> sqlx::Result<()> {
    insert_all(connection, *COPIED, rows, |query, StoredRow { eid, row, checksum }| {
        query
            .bind(row.position.cast_signed())
            .bind(i64::from(row.slot.number()))
            .bind(row.seq.cast_signed())
            .bind(*eid)
            .bind(row.version.cast_signed())
            .bind(i64::from(row.count))
            .bind(row.at_us)
            .bind(row.epoch.to_i64())
            .bind(row.append_key.clone())
            .bind(*checksum)
            .bind(row.body.clone())
    })
    .await
}

/// An entity of a slot that comes in.
pub(crate) struct IncomingEntity<'a> {
    pub(crate) transfer: TransferId,
    pub(crate) slot: Slot,
    pub(crate) entity: &'a EntityRow,
}

/// A row of a slot that comes in, with the number that its entity has at the giver.
pub(crate) struct IncomingRow<'a> {
    pub(crate) transfer: TransferId,
    pub(crate) eid: i64,
    pub(crate) row: &'a LogRow,
    pub(crate) checksum: i64,
}

/// Inserts entities that come in, apart from those of the shard.
pub(crate) async fn insert_incoming_entities(
    connection: &mut SqliteConnection,
    entities: &[IncomingEntity<'_>],
) -> sqlx::Result<()> {
    insert_all(connection, *INCOMING_ENTITIES, entities, |query, incoming| {
        let IncomingEntity { transfer, slot, entity } = incoming;
        query
            .bind(transfer.0.to_vec())
            .bind(i64::from(slot.number()))
            .bind(entity.eid)
            .bind(entity.kind.to_string())
            .bind(entity.id_hash.0.to_vec())
            .bind(entity.life)
            .bind(entity.sealed_id.clone())
            .bind(entity.key_id.to_vec())
            .bind(entity.created_at_us)
            .bind(entity.erased_at_us)
            .bind(EntityRow { copy: CopyId::LIVE, ..(*entity).clone() }.checksum())
    })
    .await
}

/// Inserts rows that come in, apart from the log of the shard.
pub(crate) async fn insert_incoming_rows(
    connection: &mut SqliteConnection,
    rows: &[IncomingRow<'_>],
) -> sqlx::Result<()> {
    insert_all(connection, *INCOMING, rows, |query, incoming| {
        let IncomingRow { transfer, eid, row, checksum } = incoming;
        query
            .bind(transfer.0.to_vec())
            .bind(row.seq.cast_signed())
            .bind(i64::from(row.slot.number()))
            .bind(*eid)
            .bind(row.version.cast_signed())
            .bind(i64::from(row.count))
            .bind(row.at_us)
            .bind(row.epoch.to_i64())
            .bind(row.append_key.clone())
            .bind(*checksum)
            .bind(row.body.clone())
    })
    .await
}

/// Writes slots, in place of those that were written before.
pub(crate) async fn insert_slots(connection: &mut SqliteConnection, slots: &[SlotImage]) -> sqlx::Result<()> {
    insert_all(connection, *SLOTS, slots, |query, image| image.bind(query)).await
}

/// Inserts wrapped keys.
pub(crate) async fn insert_key_rows(connection: &mut SqliteConnection, rows: &[&KeyRow]) -> sqlx::Result<()> {
    insert_all(connection, *KEYS, rows, |query, row| row.bind(query)).await
}

/// Inserts `rows` in the fewest round trips.
async fn insert_all<Row: Sync>(
    connection: &mut SqliteConnection,
    statements: [&'static str; SIZES.len()],
    mut rows: &[Row],
    bind: fn(Bound, &Row) -> Bound,
) -> sqlx::Result<()> {
    while !rows.is_empty() {
        let fits = SIZES.iter().rposition(|size| *size >= rows.len()).unwrap_or(0);
        let (now, later) = rows.split_at(rows.len().min(SIZES[fits]));
        now.iter().fold(sqlx::query(statements[fits]), bind).execute(&mut *connection).await?;
        rows = later;
    }
    Ok(())
}

/// How an entity's log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// With this version; 0 if it has none.
    At(u64),
    /// For good.
    Erased,
}

fn head(row: &SqliteRow) -> sqlx::Result<Head> {
    Ok(if row.try_get(1)? { Head::Erased } else { Head::At(row.try_get::<i64, _>(0)?.cast_unsigned()) })
}

/// The entity's head, given by the newest of its commits, which is at `position`.
pub(crate) async fn head_at(connection: &mut SqliteConnection, position: u64) -> sqlx::Result<Head> {
    let row = sqlx::query(
        "SELECT version + count - 1, (SELECT erased_at FROM entity WHERE entity.eid = log.eid) IS NOT NULL
         FROM log WHERE position = ?",
    )
    .bind(position.cast_signed());
    head(&row.fetch_one(connection).await?)
}

/// The entity's head as far as the index knows.
pub(crate) async fn indexed_head(connection: &mut SqliteConnection, eid: i64) -> sqlx::Result<Head> {
    let row = sqlx::query(
        "SELECT log.version + log.count - 1, (SELECT erased_at FROM entity WHERE entity.eid = log.eid) IS NOT NULL
         FROM log_index CROSS JOIN log ON log.position = log_index.position
         WHERE log_index.eid = ? ORDER BY log_index.version DESC LIMIT 1",
    )
    .bind(eid)
    .fetch_optional(&mut *connection)
    .await?;
    if let Some(row) = row {
        return head(&row);
    }
    // A life without commits.
    let erased = sqlx::query("SELECT erased_at IS NOT NULL FROM entity WHERE eid = ?").bind(eid);
    let erased = erased.fetch_optional(connection).await?.map(|row| row.try_get(0)).transpose()?;
    Ok(if erased == Some(true) { Head::Erased } else { Head::At(0) })
}

fn bind_entity(query: Bound, entity: &EntityRow) -> Bound {
    query
        .bind(entity.eid)
        .bind(entity.copy.0.to_vec())
        .bind(i64::from(entity.slot.number()))
        .bind(entity.kind.to_string())
        .bind(entity.id_hash.0.to_vec())
        .bind(entity.life)
        .bind(entity.sealed_id.clone())
        .bind(entity.key_id.to_vec())
        .bind(entity.created_at_us)
        .bind(entity.erased_at_us)
        .bind(entity.checksum())
}

fn bind_commit(query: Bound, (commit, place): &(&Commit, Place)) -> Bound {
    query
        .bind(place.position.cast_signed())
        .bind(i64::from(commit.entity.slot.number()))
        .bind(place.seq.cast_signed())
        .bind(commit.entity.eid)
        .bind(commit.first_version.cast_signed())
        .bind(i64::from(commit.count))
        .bind(commit.at_us)
        .bind(place.epoch)
        .bind(commit.append_key.clone())
        .bind(place.checksum)
        // A copy: should one commit of the group not fit, the others are written again.
        .bind(commit.body.clone())
}
