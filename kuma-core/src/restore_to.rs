//! Restoring one entity to an earlier version: its first events begin a new life, and the life before is erased.
//!
//! ```text
//! intent durable ──► one transaction: former life ends, next one is there ──► tombstone ──► erased like any other
//!       └── a crash here: nothing happened        └── a crash here: gone on with at the next start
//! ```
//!
//! Invariants:
//! - There is always exactly one life: the shard's writer replaces one by the other in one transaction.
//! - What the next life holds is what the former one held up to the version: events, metadata and times, sealed anew under a new key. Not its
//!   idempotency keys: they are hashes under the former key.

use std::sync::Arc;

use kuma_crypto::{CommitPlace, DataKey, IdHash, KeyId, seal_commit, seal_id};
use kuma_shard::{Commit, CommitError, CopyId, EntityRow, LogRow, NodeStore, NotWritten, Tombstone};
use tokio::sync::oneshot;

use crate::{
    Entity, EraseError, Handle, RawHandle, ReadError, Reason, Receipt, ReceiptId, Refused, Unavailable, Version,
    audit::AuditEvent,
    erasure::{EraserMessage, drain},
    handle::Who,
    replay::Opener,
    shard_core::{Erasing, Fate, ShardCore},
    store::Inner,
};

/// Sealed bytes that are written in one transaction.
const BYTES_MAX: usize = 64 << 20;
const PAGE_ROWS: u32 = 1024;

/// An entity that was restored to an earlier version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Which life it has now.
    pub life: u32,
    /// The version that it has now.
    pub version: Version,
    /// The receipt of the erasure of the life before.
    pub receipt: Receipt,
}

/// Whoever asks.
pub(crate) struct RestoreRequest {
    pub(crate) who: Who,
    pub(crate) core: Arc<ShardCore>,
    pub(crate) version: Version,
    pub(crate) reason: Arc<Reason>,
    pub(crate) reply: oneshot::Sender<Result<Restored, EraseError>>,
}

/// A life that was replaced, and is to be erased.
pub(crate) struct Replaced {
    pub(crate) tombstone: Tombstone,
    pub(crate) life: u32,
}

impl RawHandle {
    /// Restores the entity to an earlier version, as a new life: it has its first `version` events again, with their metadata and times, and
    /// everything behind them is erased with the life before. The receipt of that erasure is part of the answer.
    ///
    /// `version` must be the last one of a commit, and at least 1. Idempotency keys of the life before are forgotten: a retry of a request
    /// that it had committed would happen once more. While it lasts, the entity answers [`Unavailable::BeingRestored`].
    ///
    /// An entity that is erased cannot be restored. Histories of more than 64 MiB are refused: export and import them.
    ///
    /// # Errors
    /// Nothing was changed, unless it is [`EraseError::Unfinished`]: then the entity is restored, and the erasure of its former life goes on by
    /// itself.
    /// # Cancel safety
    /// If the future is dropped it may or may not be restored.
    pub async fn restore_to(&self, version: Version, reason: Reason) -> Result<Restored, EraseError> {
        reason.check()?;
        self.check_writable()?;
        let (reply, answer) = oneshot::channel();
        let (who, core) = (self.who()?.clone(), self.core()?.clone());
        let request = RestoreRequest { who, core, version, reason: Arc::new(reason), reply };
        let gone = || EraseError::from(Unavailable::ShuttingDown);
        let eraser = self.store().eraser().ok_or_else(gone)?;
        eraser.cast(EraserMessage::Restore(Box::new(request))).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl<E: Entity> Handle<E> {
    /// Restores the entity to an earlier version, as a new life. See [`RawHandle::restore_to`].
    ///
    /// # Errors
    /// As [`RawHandle::restore_to`].
    /// # Cancel safety
    /// As [`RawHandle::restore_to`].
    pub async fn restore_to(&self, version: Version, reason: Reason) -> Result<Restored, EraseError> {
        self.raw().restore_to(version, reason).await
    }
}

/// Replaces the life of an entity; what it returns is to be erased.
pub(crate) async fn replace(
    inner: &Arc<Inner>,
    node: &NodeStore,
    erasing: &Erasing,
    request: &RestoreRequest,
) -> Result<Replaced, EraseError> {
    let RestoreRequest { who, core, version, reason, .. } = request;
    let entity = who.identity.hash;
    let unreadable = |error: kuma_shard::ReadError| EraseError::from(ReadError::unreadable(entity, error));
    let row = core.shard.find_entity(CopyId::LIVE, entity).await.map_err(unreadable)?;
    let row = row.ok_or(Refused::NeverWritten { entity })?;
    core.check_alive(&row).map_err(|cause| ReadError::unreadable(entity, cause))?;
    let key_id = row.key_id;
    // Nobody uses it from here on, until it is settled which life there is.
    erasing.add(key_id, entity, Fate::Replaced);
    if let Err(detail) = drain(core, entity).await {
        erasing.remove(key_id);
        return Err(Unavailable::NotErased { entity, detail: detail.to_owned() }.into());
    }
    let replaced = replace_drained(inner, node, core, who, row, *version, reason).await;
    match &replaced {
        Ok(replaced) => erasing.entomb(&replaced.tombstone),
        Err(Failed { is_settled: true, .. }) => erasing.remove(key_id),
        // Which one there is, is found out as after a crash.
        Err(_) => {}
    }
    replaced.map_err(|failed| failed.error)
}

/// Why a life was not replaced, and whether that is certain.
struct Failed {
    error: EraseError,
    is_settled: bool,
}

impl<E: Into<EraseError>> From<E> for Failed {
    fn from(error: E) -> Self {
        Failed { error: error.into(), is_settled: true }
    }
}

async fn replace_drained(
    inner: &Arc<Inner>,
    node: &NodeStore,
    core: &Arc<ShardCore>,
    who: &Who,
    row: EntityRow,
    version: Version,
    reason: &Reason,
) -> Result<Replaced, Failed> {
    let entity = who.identity.hash;
    let no_key = |cause| Unavailable::NoKey { entity, cause };
    let failed = |error: &dyn std::fmt::Display| Unavailable::NotErased { entity, detail: error.to_string() };
    let key = core.vault.key(entity, KeyId(row.key_id)).await.map_err(no_key)?;
    let opener = Opener { row: Arc::new(row), key };
    let (commits, newest) = read(core, &opener, version).await?;

    let (key_id, key) = core.vault.create(entity).await.map_err(no_key)?;
    let former = &*opener.row;
    let life = former.life + 1;
    let next = EntityRow {
        eid: 0,
        life,
        sealed_id: seal_id(&key, &former.kind, IdHash(entity.0), key_id, &who.identity.id),
        key_id: key_id.0,
        created_at_us: inner.now_us(),
        ..former.clone()
    };
    let sealed = seal(&opener, &key, key_id, &commits)?;
    let mut receipt_id = [0; 16];
    getrandom::fill(&mut receipt_id).map_err(|error| failed(&error))?;
    let at_us = inner.now_us();
    let tombstone = Tombstone { key_id: former.key_id, id_hash: entity, slot: former.slot, receipt_id, at_us };
    let event = AuditEvent::restored(ReceiptId(receipt_id), entity, life, version, reason);
    inner.own_audit_log().append(event).await.map_err(|error| failed(&error))?;
    node.intend(tombstone, key_id.0).await.map_err(|error| failed(&error))?;
    fail::fail_point!("restore.intended");
    let with_row = |row: &Arc<EntityRow>| {
        let commit = |(commit, body): (&LogRow, Vec<u8>)| Commit {
            entity: row.clone(),
            create: commit.version == 1,
            first_version: commit.version,
            count: commit.count,
            at_us: commit.at_us,
            append_key: None,
            body,
        };
        commits.iter().zip(sealed).map(commit).collect()
    };
    match core.shard.replace(former, newest, next, with_row, at_us).await {
        Ok(()) => {}
        Err(error @ CommitError::NotWritten(_)) => {
            let is_settled = node.give_up(former.key_id).await.is_ok();
            let error = match error {
                CommitError::NotWritten(NotWritten::Erased) => Refused::Erased { entity }.into(),
                error => failed(&error).into(),
            };
            return Err(Failed { error, is_settled });
        }
        Err(error) => return Err(Failed { error: failed(&error).into(), is_settled: false }),
    }
    fail::fail_point!("restore.replaced");
    let entombed = node.entomb(vec![tombstone]).await;
    entombed.map_err(|error| Failed {
        error: EraseError::Unfinished { entity, receipt_id: ReceiptId(receipt_id), detail: error.to_string() },
        is_settled: false,
    })?;
    Ok(Replaced { tombstone, life })
}

/// The commits up to `version`, and the entity's newest version.
async fn read(core: &ShardCore, opener: &Opener, version: Version) -> Result<(Vec<LogRow>, u64), EraseError> {
    let entity = opener.row.id_hash;
    let unreadable = |cause| EraseError::from(ReadError::unreadable(entity, cause));
    let (mut commits, mut newest, mut bytes) = (Vec::new(), 0, 0);
    loop {
        let (rows, is_last) = opener.page(&core.shard, newest, PAGE_ROWS).await.map_err(unreadable)?;
        for row in rows {
            newest = row.version + u64::from(row.count) - 1;
            if row.version > version.0 {
                continue;
            }
            if newest > version.0 {
                let (first, last) = (Version(row.version), Version(newest));
                return Err(Refused::WithinCommit { entity, asked: version, first, last }.into());
            }
            bytes += row.body.len();
            if bytes > BYTES_MAX {
                return Err(Refused::HistoryTooLarge { entity, bytes_max: BYTES_MAX }.into());
            }
            commits.push(row);
        }
        if is_last {
            break;
        }
    }
    if newest < version.0 || version.0 == 0 {
        return Err(Refused::NoSuchVersion { entity, asked: version, newest: Version(newest) }.into());
    }
    Ok((commits, newest))
}

/// The bodies of commits under another key.
fn seal(opener: &Opener, key: &DataKey, key_id: KeyId, commits: &[LogRow]) -> Result<Vec<Vec<u8>>, EraseError> {
    let entity = opener.row.id_hash;
    let seal = |commit: &LogRow| {
        let plaintext = opener.open(commit)?;
        let place = CommitPlace {
            kind: &opener.row.kind,
            id_hash: IdHash(entity.0),
            first_version: commit.version,
            count: commit.count,
            at_us: commit.at_us,
            key_id,
        };
        Ok(seal_commit(key, &place, &plaintext))
    };
    let sealed: Result<Vec<Vec<u8>>, crate::ReplayError> = commits.iter().map(seal).collect();
    sealed.map_err(|cause| ReadError::unreadable(entity, cause).into())
}

/// Finds out what became of the lives that were about to be replaced when the store was closed: a tombstone for each that was.
pub(crate) async fn settle(inner: &Inner, node: &NodeStore, erasing: &Erasing) -> Result<(), String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    for (tombstone, next_key_id) in node.intended().await.map_err(|error| words(&error))? {
        // A shard that is out of use tells nothing; neither life is served.
        let Some(core) = inner.core_of_slot(tombstone.slot) else { continue };
        let lives = core.shard.lives(CopyId::LIVE, tombstone.id_hash).await.map_err(|error| words(&error))?;
        if lives.iter().any(|row| row.key_id == next_key_id) {
            node.entomb(vec![tombstone]).await.map_err(|error| words(&error))?;
            erasing.entomb(&tombstone);
        } else {
            inner.vault().keys.destroy(vec![next_key_id]).await.map_err(|error| words(&error))?;
            node.give_up(tombstone.key_id).await.map_err(|error| words(&error))?;
            erasing.remove(tombstone.key_id);
        }
    }
    Ok(())
}
