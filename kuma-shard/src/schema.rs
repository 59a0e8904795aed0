//! The tables, and how a file is made.
//!
//! Invariants:
//! - `PRAGMA user_version` is the format. A file of another one is refused. Formats 1 to 3 were never released.
//! - Cells with secrets or sealed bytes never move: their tables grow at the end only, and a row whose content has to go is shrunk in place
//!   and never deleted. SQLite zeroes what a row leaves behind (`secure_delete`), but not the copy that rebalancing a page leaves in
//!   its unused space (docs/adr/0016-rows-that-do-not-move.md).
//! - The whole schema of a new file is one transaction, so that a crash leaves a file with it or without it.

use sqlx::{Row, SqliteConnection};

use crate::DiskId;

/// The newest file format known here.
pub const FORMAT: u32 = 4;

/// What a database is for. Stored in it, so that files cannot be mixed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A shard, with its number.
    Shard(u16),
    /// The wrapped keys.
    Keys,
    /// What the node knows for ever: who was erased, and the receipts.
    Node,
    /// A copy of a shard in a backup, with its number.
    ShardBackup(u16),
    /// A copy of the wrapped keys.
    KeysBackup,
}

impl Role {
    pub(crate) fn to_text(self) -> String {
        match self {
            Role::Shard(number) => format!("shard {number}"),
            Role::Keys => "keys".to_owned(),
            Role::Node => "node".to_owned(),
            Role::ShardBackup(number) => format!("backup of shard {number}"),
            Role::KeysBackup => "backup of keys".to_owned(),
        }
    }

    fn tables(self) -> &'static str {
        match self {
            Role::Shard(_) => SHARD_TABLES,
            Role::Keys | Role::KeysBackup => KEYS_TABLES,
            Role::Node => NODE_TABLES,
            Role::ShardBackup(_) => SHARD_BACKUP_TABLES,
        }
    }
}

/// In every file. `progress` is one row, rewritten by each transaction: the page of it is all that the commit counter costs.
const COMMON_TABLES: &str = "
CREATE TABLE meta(
    one INTEGER PRIMARY KEY CHECK (one = 1),
    disk_id BLOB NOT NULL,
    role TEXT NOT NULL
) STRICT;
CREATE TABLE progress(
    one INTEGER PRIMARY KEY CHECK (one = 1),
    commits INTEGER NOT NULL,
    next_position INTEGER NOT NULL,
    mark_position INTEGER NOT NULL,
    indexed_position INTEGER NOT NULL,
    digest BLOB NOT NULL,
    checksum INTEGER NOT NULL
) STRICT;
";

const SHARD_TABLES: &str = "
CREATE TABLE entity(
    eid INTEGER PRIMARY KEY,
    copy BLOB NOT NULL,
    slot INTEGER NOT NULL,
    kind TEXT NOT NULL,
    id_hash BLOB NOT NULL,
    life INTEGER NOT NULL,
    sealed_id BLOB NOT NULL,
    key_id BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    erased_at INTEGER,
    checksum INTEGER NOT NULL,
    UNIQUE (copy, id_hash, life)
) STRICT;
CREATE INDEX entity_erased ON entity(eid) WHERE erased_at IS NOT NULL;
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
CREATE TABLE log_index(
    eid INTEGER NOT NULL,
    version INTEGER NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (eid, version)
) STRICT, WITHOUT ROWID;
CREATE TABLE key_index(
    eid INTEGER NOT NULL,
    append_key BLOB NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (eid, append_key)
) STRICT, WITHOUT ROWID;
CREATE TABLE snapshot(
    number INTEGER PRIMARY KEY,
    eid INTEGER UNIQUE,
    version INTEGER NOT NULL,
    schema INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE TABLE slot_token(
    slot INTEGER PRIMARY KEY,
    state TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    floor INTEGER NOT NULL,
    last_owned INTEGER NOT NULL,
    peer BLOB,
    transfer BLOB,
    next_seq INTEGER NOT NULL,
    len INTEGER NOT NULL,
    digest BLOB NOT NULL,
    staged_transfer BLOB,
    staged_epoch INTEGER,
    staged_from BLOB,
    staged_len INTEGER,
    staged_digest BLOB,
    checksum INTEGER NOT NULL
) STRICT;
CREATE TABLE departed(
    transfer BLOB PRIMARY KEY,
    slot INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE incoming_entity(
    number INTEGER PRIMARY KEY,
    transfer BLOB NOT NULL,
    slot INTEGER NOT NULL,
    entity INTEGER NOT NULL,
    kind TEXT NOT NULL,
    id_hash BLOB NOT NULL,
    life INTEGER NOT NULL,
    sealed_id BLOB NOT NULL,
    key_id BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    erased_at INTEGER,
    checksum INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX incoming_entity_place ON incoming_entity(transfer, entity);
CREATE TABLE incoming_log(
    number INTEGER PRIMARY KEY,
    transfer BLOB NOT NULL,
    seq INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    entity INTEGER NOT NULL,
    version INTEGER NOT NULL,
    count INTEGER NOT NULL,
    at INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    append_key BLOB,
    checksum INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX incoming_log_place ON incoming_log(transfer, seq);
";

/// As in a shard, without what is made anew from the log. `erased` has those entities that have nothing but stubs left, here and in the store.
const SHARD_BACKUP_TABLES: &str = "
CREATE TABLE entity(
    eid INTEGER PRIMARY KEY,
    copy BLOB NOT NULL,
    slot INTEGER NOT NULL,
    kind TEXT NOT NULL,
    id_hash BLOB NOT NULL,
    life INTEGER NOT NULL,
    sealed_id BLOB NOT NULL,
    key_id BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    erased_at INTEGER,
    checksum INTEGER NOT NULL
) STRICT;
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
CREATE TABLE slot_token(
    slot INTEGER PRIMARY KEY,
    state TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    floor INTEGER NOT NULL,
    last_owned INTEGER NOT NULL,
    peer BLOB,
    transfer BLOB,
    next_seq INTEGER NOT NULL,
    len INTEGER NOT NULL,
    digest BLOB NOT NULL,
    staged_transfer BLOB,
    staged_epoch INTEGER,
    staged_from BLOB,
    staged_len INTEGER,
    staged_digest BLOB,
    checksum INTEGER NOT NULL
) STRICT;
CREATE TABLE erased(
    eid INTEGER PRIMARY KEY
) STRICT;
";

const KEYS_TABLES: &str = "
CREATE TABLE secret(
    name TEXT PRIMARY KEY,
    wrapped BLOB NOT NULL
) STRICT;
CREATE TABLE data_key(
    number INTEGER PRIMARY KEY,
    key_id BLOB UNIQUE,
    id_hash BLOB NOT NULL,
    wrapped BLOB NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;
";

const NODE_TABLES: &str = "
CREATE TABLE tombstone(
    number INTEGER PRIMARY KEY,
    key_id BLOB NOT NULL UNIQUE,
    id_hash BLOB NOT NULL,
    slot INTEGER NOT NULL,
    receipt_id BLOB NOT NULL,
    at INTEGER NOT NULL
) STRICT;
CREATE INDEX tombstone_entity ON tombstone(id_hash);
CREATE TABLE unfinished(
    key_id BLOB PRIMARY KEY
) STRICT, WITHOUT ROWID;
CREATE TABLE replacing(
    key_id BLOB PRIMARY KEY,
    next_key_id BLOB NOT NULL,
    id_hash BLOB NOT NULL,
    slot INTEGER NOT NULL,
    receipt_id BLOB NOT NULL,
    at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE receipt(
    number INTEGER PRIMARY KEY,
    receipt_id BLOB NOT NULL UNIQUE,
    body TEXT NOT NULL
) STRICT;
CREATE TABLE backup(
    number INTEGER PRIMARY KEY,
    what TEXT NOT NULL,
    at INTEGER NOT NULL
) STRICT;
CREATE TABLE cluster(
    one INTEGER PRIMARY KEY CHECK (one = 1),
    body BLOB NOT NULL
) STRICT;
";

/// Why a file does not fit.
pub(crate) enum Misfit {
    Newer(u32),
    Foreign(String),
    Sqlite(sqlx::Error),
}

impl From<sqlx::Error> for Misfit {
    fn from(error: sqlx::Error) -> Self {
        Misfit::Sqlite(error)
    }
}

/// Makes the tables of a new file, in the caller's transaction.
pub(crate) async fn create(connection: &mut SqliteConnection, role: Role, disk_id: DiskId) -> sqlx::Result<()> {
    sqlx::raw_sql(COMMON_TABLES).execute(&mut *connection).await?;
    sqlx::raw_sql(role.tables()).execute(&mut *connection).await?;
    sqlx::query("INSERT INTO meta(one, disk_id, role) VALUES (1, ?, ?)")
        .bind(disk_id.0.to_vec())
        .bind(role.to_text())
        .execute(&mut *connection)
        .await?;
    // FORMAT. A pragma takes no parameters.
    sqlx::query("PRAGMA user_version = 4").execute(connection).await?;
    Ok(())
}

/// Whether the file is this store's and of a format known here.
pub(crate) async fn check(connection: &mut SqliteConnection, role: Role, disk_id: DiskId) -> Result<(), Misfit> {
    let format: u32 = sqlx::query("PRAGMA user_version").fetch_one(&mut *connection).await?.try_get(0)?;
    if format > FORMAT {
        return Err(Misfit::Newer(format));
    }
    if format == 0 {
        return Err(Misfit::Foreign("it is not a database of Kuma".to_owned()));
    }
    if format < FORMAT {
        return Err(Misfit::Foreign(format!("its format {format} was never released; make the store anew")));
    }
    let row = sqlx::query("SELECT disk_id, role FROM meta WHERE one = 1").fetch_one(connection).await?;
    let found: Vec<u8> = row.try_get(0)?;
    if found != disk_id.0 {
        return Err(Misfit::Foreign(format!("disk id {}, expected {disk_id}", hex::encode(found))));
    }
    let found: String = row.try_get(1)?;
    if found != role.to_text() {
        return Err(Misfit::Foreign(format!("it is \"{found}\", expected \"{}\"", role.to_text())));
    }
    Ok(())
}
