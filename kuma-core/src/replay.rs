//! Replay: rebuilding an entity from what is stored.
//!
//! Invariants:
//! - Every row is verified (checksum), opened (its place is under the AEAD) and found in its place (versions are dense) before it
//!   is folded in. A fault is a typed error that names the version; nothing is guessed.
//! - Memory is bounded by a page of rows, whatever the length of the history.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use kuma_crypto::{CommitPlace, DataKey, IdHash, KeyId, open_commit, open_id};
use kuma_shard::{CopyId, EntityRow, LogRow, Shard};

use crate::{
    ReadError, Refused, ReplayError, Unavailable, Version,
    body::Body,
    identity::Identity,
    kind::{Kind, State},
    shard_core::ShardCore,
};

/// The first page is small: most entities are. The next ones follow the size of what was read.
const FIRST_PAGE_ROWS: u32 = 128;
const PAGE_BYTES: usize = 1 << 20;

/// An entity's row with its key.
pub(crate) struct Opener {
    pub(crate) row: Arc<EntityRow>,
    pub(crate) key: DataKey,
}

/// What a replay found.
pub(crate) struct Replayed {
    /// None for an entity that was never written.
    pub(crate) opener: Option<Opener>,
    pub(crate) state: State,
    pub(crate) version: u64,
    pub(crate) at_us: i64,
}

/// Rebuilds the entity.
pub(crate) async fn replay(core: &ShardCore, kind: &dyn Kind, identity: &Identity) -> Result<Replayed, ReadError> {
    let entity = identity.hash;
    match find_and_fold(core, kind, identity).await {
        Ok(Some(replayed)) => Ok(replayed),
        Ok(None) => Err(Refused::Erased { entity }.into()),
        Err(cause) => Err(Unavailable::Unreadable { entity, cause }.into()),
    }
}

async fn find_and_fold(
    core: &ShardCore,
    kind: &dyn Kind,
    identity: &Identity,
) -> Result<Option<Replayed>, ReplayError> {
    let entity = identity.hash;
    let initial = || catch_unwind(AssertUnwindSafe(|| kind.initial())).map_err(|_| panicked(kind, Version(0)));
    let Some(mut row) = core.shard.find_entity(CopyId::GENESIS, entity).await? else {
        return Ok(Some(Replayed { opener: None, state: initial()?, version: 0, at_us: 0 }));
    };
    if row.erased_at_us.is_some() {
        return Ok(None);
    }
    if row.kind == *kind.name() {
        // One allocation for all entities of the kind.
        row.kind = kind.name().clone();
    }
    let key = core.vault.key(entity, KeyId(row.key_id)).await?;
    let opener = Opener { row: Arc::new(row.without_id()), key };
    let (mut state, mut version, mut at_us) = (initial()?, 0, 0);
    let mut rows_max = FIRST_PAGE_ROWS;
    loop {
        let rows = opener.page(&core.shard, version, rows_max).await?;
        let Some(last) = rows.last() else { break };
        at_us = last.at_us;
        let bytes: usize = rows.iter().map(|row| row.body.len()).sum();
        let is_last = rows.len() < rows_max as usize;
        rows_max = next_page_rows(rows.len(), bytes);
        for row in rows {
            let plaintext = opener.open(&row)?;
            fold(kind, &mut state, &row, &plaintext)?;
            version = row.version + u64::from(row.count) - 1;
        }
        if is_last {
            break;
        }
    }
    Ok(Some(Replayed { opener: Some(opener), state, version, at_us }))
}

/// What it takes to read the entity's events without folding them; none if it was never written.
pub(crate) async fn find(core: &ShardCore, identity: &Identity) -> Result<Option<Opener>, ReplayError> {
    let Some(row) = core.shard.find_entity(CopyId::GENESIS, identity.hash).await? else { return Ok(None) };
    let key = core.vault.key(identity.hash, KeyId(row.key_id)).await?;
    Ok(Some(Opener { row: Arc::new(row), key }))
}

fn next_page_rows(rows: usize, bytes: usize) -> u32 {
    let row_bytes = (bytes / rows.max(1)).max(1);
    // At most 1024.
    (PAGE_BYTES / row_bytes).clamp(1, 1024) as u32
}

impl Opener {
    /// Another one for the same entity.
    pub(crate) fn share(&self) -> Self {
        Opener { row: self.row.clone(), key: self.key.clone() }
    }

    /// The next rows after `version`, which follow it without a gap.
    pub(crate) async fn page(&self, shard: &Shard, version: u64, rows_max: u32) -> Result<Vec<LogRow>, ReplayError> {
        let rows = shard.read_log(&self.row, version, rows_max).await?;
        let mut next = version + 1;
        for row in &rows {
            if row.version != next || row.count == 0 {
                return Err(ReplayError::Gap { expected: Version(next), found: Version(row.version) });
            }
            next += u64::from(row.count);
        }
        Ok(rows)
    }

    /// The plaintext of a commit.
    pub(crate) fn open(&self, row: &LogRow) -> Result<Vec<u8>, ReplayError> {
        open_commit(&self.key, &self.place(row), &row.body)
            .map_err(|_| ReplayError::DoesNotOpen { version: Version(row.version) })
    }

    /// Whether the sealed id is this entity's.
    pub(crate) fn check_id(&self) -> Result<(), String> {
        let EntityRow { kind, id_hash, key_id, sealed_id, .. } = &*self.row;
        open_id(&self.key, kind, IdHash(id_hash.0), KeyId(*key_id), sealed_id)
            .map(|_| ())
            .map_err(|error| error.to_string())
    }

    fn place(&self, row: &LogRow) -> CommitPlace<'_> {
        CommitPlace {
            kind: &self.row.kind,
            id_hash: IdHash(self.row.id_hash.0),
            first_version: row.version,
            count: row.count,
            at_us: row.at_us,
            key_id: KeyId(self.row.key_id),
        }
    }
}

fn fold(kind: &dyn Kind, state: &mut State, row: &LogRow, plaintext: &[u8]) -> Result<(), ReplayError> {
    let version = Version(row.version);
    let undecodable = |event: String, detail: String| {
        let kind = kind.name().to_string();
        ReplayError::Undecodable { kind, event, version, detail }
    };
    let body = Body::parse(plaintext).map_err(|error| undecodable(String::new(), error.to_string()))?;
    if body.events.len() != row.count as usize {
        let detail = format!("{} events where the row has {}", body.events.len(), row.count);
        return Err(undecodable(String::new(), detail));
    }
    let events: Vec<&[u8]> = body.events.iter().map(|(_, event)| &***event).collect();
    // Decoding runs the user's code as well.
    let folded = catch_unwind(AssertUnwindSafe(|| kind.decode(&events).map(|decoded| kind.apply(state, &decoded))));
    folded.map_err(|_| panicked(kind, version))?.map_err(|error| undecodable(error.event, error.detail))
}

fn panicked(kind: &dyn Kind, version: Version) -> ReplayError {
    ReplayError::Panicked { kind: kind.name().to_string(), version }
}
