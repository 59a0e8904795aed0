//! What other programs and people rely on: words and bytes that change only on purpose. (Row and record layouts are pinned beside
//! their code; the words of bad input in `bad_input.rs`.)
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common;
use std::{fmt::Write, time::Duration};

use crate::common::{Ledger, directory, entered, sentence};
use insta::assert_snapshot;
use kuma_core::{
    AppendError, CommitError, EntityHash, NotWritten, OpenError, Refused, ReplayError, Slot, Unavailable, VaultError,
    Version,
};

const ENTITY: EntityHash = EntityHash([0xab; 16]);

fn words<E: std::error::Error>(errors: impl IntoIterator<Item = E>) -> String {
    let mut text = String::new();
    for error in errors {
        writeln!(text, "{}", sentence(&error, std::path::Path::new("/nowhere"))).unwrap();
    }
    text
}

#[test]
fn the_words_of_what_was_not_written() {
    let (file, detail) = (|| "shard-003.db".to_owned(), || "disk I/O error".to_owned());
    assert_snapshot!(words([
        NotWritten::DiskFull { file: file() },
        NotWritten::Io { file: file(), detail: detail() },
        NotWritten::Closed { file: file(), detail: detail() },
        NotWritten::Voided,
        NotWritten::Conflict { file: file(), detail: "version 7 where 6 is next".into() },
        NotWritten::NotOwner { slot: Slot::new(77) },
        NotWritten::Stopping,
    ]), @r"
    no space left on the disk of shard-003.db; free some, writes then go on by themselves
    the disk failed under shard-003.db (disk I/O error); the commit was not written, retry after a while
    shard-003.db is closed after a failure (disk I/O error); it is tried again by itself, retry after a while
    an earlier commit of the same entity failed, so that this one was not written; retry
    the commit does not follow what shard-003.db holds (version 7 where 6 is next); the entity is read again from the disk, retry
    slot 77 is not owned here
    the store is shutting down
    ");
    assert_snapshot!(words([
        CommitError::NotWritten(NotWritten::Voided),
        CommitError::Unknown { file: file(), detail: detail() },
    ]), @r"
    an earlier commit of the same entity failed, so that this one was not written; retry
    the disk failed under shard-003.db (disk I/O error) and it could not be read back; the commit may or may not have been written
    ");
}

#[test]
fn the_words_of_an_append_that_failed() {
    let unavailable = [
        Unavailable::Overloaded { place: format!("for entity {ENTITY}"), retry_after: Duration::from_millis(20) },
        Unavailable::NotWritten { entity: ENTITY, cause: NotWritten::DiskFull { file: "shard-003.db".into() } },
        Unavailable::ShardOutOfUse { shard: 3, why: "shard-003.db is damaged".into() },
        Unavailable::Unreadable { entity: ENTITY, cause: ReplayError::DoesNotOpen { version: Version(4) } },
        Unavailable::Unreadable { entity: ENTITY, cause: ReplayError::Gap { expected: Version(4), found: Version(6) } },
        Unavailable::Unreadable { entity: ENTITY, cause: VaultError::KeyMissing.into() },
        Unavailable::Unreadable {
            entity: ENTITY,
            cause: ReplayError::Panicked { kind: "account".into(), version: Version(4) },
        },
        Unavailable::Quarantined {
            entity: ENTITY,
            why: "its actor failed".into(),
            retry_after: Duration::from_secs(4),
        },
        Unavailable::NoKey { entity: ENTITY, cause: VaultError::KeyMissing },
        Unavailable::Interrupted { entity: ENTITY },
        Unavailable::SequenceBroken { entity: ENTITY },
        Unavailable::ShuttingDown,
    ];
    assert_snapshot!(words(unavailable.map(AppendError::from)), @r"
    too much is waiting for entity [hex]; retry after 20ms
    entity [hex]: no space left on the disk of shard-003.db; free some, writes then go on by themselves
    shard 3 is out of use since the store was opened: shard-003.db is damaged
    entity [hex] cannot be read: the commit at version 4 does not open with the entity's key; restore it from a backup
    entity [hex] cannot be read: version 6 stands where 4 belongs; restore it from a backup
    entity [hex] cannot be read: keys.db does not have the entity's key, so that its events cannot be read; restore keys.db from its backup
    entity [hex] cannot be read: the code of kind account panicked on the events at version 4; mend its `apply`, `Default` or `Deserialize`
    entity [hex] is quarantined (its actor failed); it is tried again after 4s
    no key could be stored for entity [hex] (keys.db does not have the entity's key, so that its events cannot be read; restore keys.db from its backup); nothing was written
    entity [hex] stopped before it came to the request; retry
    an earlier append to entity [hex] in the same sequence failed; this one was not written, send it again in a new sequence after that one
    the store is shutting down
    ");
    let refused = [
        Refused::WrongVersion { entity: ENTITY, expected: Version(4), actual: Version(5) },
        Refused::ApplyPanicked { entity: ENTITY },
        Refused::CommandPanicked { entity: ENTITY },
        Refused::KeyReused { entity: ENTITY, version: Version(4) },
        Refused::InvalidKey { bytes: 257, bytes_max: 256 },
        Refused::NoSuchVersion { entity: ENTITY, asked: Version(5), newest: Version(4) },
        Refused::Upcasters { kind: "account".into(), reason: "an upcaster takes Put of schema 3".into() },
        Refused::Erased { entity: ENTITY },
        Refused::NeverWritten { entity: ENTITY },
        Refused::NotErased { entity: ENTITY },
        Refused::OtherLife { entity: ENTITY, asked: 1, actual: 2 },
        Refused::ReservedKind { kind: "kuma.audit".into() },
        Refused::InvalidReason { detail: "it is empty" },
    ];
    assert_snapshot!(words(refused.map(AppendError::from)), @r"
    entity [hex] is at version 5, expected 4; nothing was written, read it again and decide anew
    applying an event to entity [hex] panicked; nothing was written, mend the kind's `apply` or the event
    a command on entity [hex] panicked; nothing was written, mend its `decide`
    entity [hex] has used this idempotency key for another request, which made version 4; nothing was written, use a new key for a new request
    the idempotency key (257 bytes) is refused; a key has 1 to 256 bytes
    entity [hex] is at version 4, there is no version 5 yet
    the upcasters of kind account are refused: an upcaster takes Put of schema 3
    entity [hex] was erased and nothing of it is left; `recreate` starts a new life under the same id
    entity [hex] was never written to; there is nothing to erase
    entity [hex] was not erased; use it as it is
    entity [hex] is in life 2, and life 1 was to be erased; nothing was erased, ask for the life that is meant
    the kind kuma.audit is the store's own: it can be read, but neither written to nor erased
    the reason is refused: it is empty; say in 1 to 1024 bytes why, and by whom, without naming the person
    ");
    let unknown = |has_key| AppendError::Unknown { entity: ENTITY, detail: "disk I/O error".into(), has_key };
    assert_snapshot!(words([unknown(false), unknown(true)]), @r"
    the outcome of the write to entity [hex] is unknown (disk I/O error); read the entity before trying again
    the outcome of the write to entity [hex] is unknown (disk I/O error); send it again with the same idempotency key: it happens once
    ");
}

#[test]
fn the_words_of_a_file_that_cannot_be_opened() {
    let path = || "data/shard-003.db".into();
    assert_snapshot!(words([
        OpenError::Missing { path: path() },
        OpenError::BehindWatermark { path: path(), found: 7, expected: 9 },
        OpenError::Damaged { path: path(), detail: "database disk image is malformed".into() },
        OpenError::NoWatermark { path: "data/shard-003.watermark".into(), state: "missing" },
        OpenError::Foreign { path: path(), detail: "it is \"shard 2\", expected \"shard 3\"".into() },
        OpenError::Newer { path: path(), found: 2, supported: 1 },
        OpenError::ReadOnly { path: path() },
        OpenError::DiskFull { path: path() },
        OpenError::Io { path: path(), source: std::io::ErrorKind::Interrupted.into() },
    ]), @r#"
    data/shard-003.db is missing although this store has it; put the file back or restore the store from a backup
    data/shard-003.db is at commit 7 but its watermark says 9: acknowledged events are missing (a lost, truncated or damaged -wal file, or an old copy of the database); put the original files back or restore the store from a backup
    data/shard-003.db does not hold what was committed to it (database disk image is malformed); restore it from a backup
    the watermark data/shard-003.watermark is missing, so that a loss of acknowledged events would go unnoticed; put it back or restore the store from a backup
    data/shard-003.db belongs to another store or to another copy of this one (it is "shard 2", expected "shard 3"); put the right file back
    data/shard-003.db has format 2, this version of Kuma reads up to 1; use the newer version, nothing was changed
    data/shard-003.db is read-only; Kuma needs to write there, check the permissions and the mount
    no space left on the disk of data/shard-003.db; free some and start again, nothing was lost
    could not open data/shard-003.db: operation interrupted
    "#);
}

/// What a store looks like on the disk: other programs back it up, and the next version opens it.
#[tokio::test]
async fn the_files_of_a_closed_store() {
    let dir = directory();
    let kuma = common::start(dir.path(), 2).await;
    kuma.entity::<Ledger>("l-1").append(entered(1)).await.unwrap();
    kuma.shutdown().await;
    let files = common::read_files(dir.path());
    assert_snapshot!(files.keys().map(String::as_str).collect::<Vec<_>>().join(" "), @"keys.db keys.watermark kuma.lock master.key node.db node.watermark shard-000.db shard-000.watermark shard-001.db shard-001.watermark store.json");
    let identity: serde_json::Value = serde_json::from_slice(&files["store.json"]).unwrap();
    let disk_id = identity["disk_id"].as_str().unwrap();
    assert_eq!(disk_id.len(), 32);
    assert_snapshot!(String::from_utf8(files["store.json"].clone()).unwrap().replace(disk_id, "[disk id]"), @r#"
    {
      "format": 1,
      "state": "ready",
      "context": "kuma",
      "shards": 2,
      "disk_id": "[disk id]"
    }
    "#);
    for name in ["shard-000.db", "shard-001.db", "keys.db", "node.db"] {
        let header = &files[name][..100];
        assert_eq!(&header[..16], b"SQLite format 3\0", "{name}");
        assert_eq!(header[16..18], [0x10, 0x00], "{name}: pages of 4096 bytes");
        assert_eq!(header[18..20], [2, 2], "{name}: a write-ahead log");
        assert_eq!(header[60..64], [0, 0, 0, 4], "{name}: the format");
    }
    assert_eq!(files["keys.watermark"].len(), 128);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(dir.path().join("master.key")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
}
