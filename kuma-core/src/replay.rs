//! Replay: rebuilding an entity from what is stored, as it is now or as it was.
//!
//! Invariants:
//! - Every row is verified (checksum), opened (its place is under the AEAD) and found in its place (versions are dense) before it
//!   is folded in. A fault is a typed error that names the version; nothing is guessed.
//! - A snapshot only saves work: the commit that it ends with must stand in the log, and everything behind it is replayed.
//! - Memory is bounded by a page of rows, whatever the length of the history.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use futures_util::future::join;
use kuma_crypto::{AppendKeyHash, CommitPlace, DataKey, IdHash, KeyId, hash_append_key, open_commit, open_id};
use kuma_shard::{CopyId, EntityRow, LogRow, Shard};

use crate::{
    ReadError, ReplayError, Version,
    body::Body,
    identity::Identity,
    kind::{Kind, State},
    shard_core::ShardCore,
    snapshot::{self, Misfit, ReplayCost, Restored},
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
    pub(crate) past: Past,
    /// What it would cost to do it again.
    pub(crate) cost: ReplayCost,
    /// Of the snapshot that it began with; 0 without one.
    pub(crate) snapshot_bytes: usize,
    /// Whether there is a snapshot that did not fit.
    pub(crate) misfit: bool,
}

/// An entity as it is or was.
pub(crate) struct Past {
    pub(crate) state: State,
    pub(crate) version: u64,
    /// When its newest commit was made; 0 if there is none.
    pub(crate) at_us: i64,
    /// The first version of that commit; 0 if there is none.
    pub(crate) last_first: u64,
}

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    Now,
    /// The state that this many events made.
    Version(u64),
    /// The state as of this time, in microseconds since 1970: all commits up to it.
    Time(i64),
}

/// Rebuilds the entity.
pub(crate) async fn replay(core: &ShardCore, kind: &dyn Kind, identity: &Identity) -> Result<Replayed, ReadError> {
    let entity = identity.hash;
    find_and_fold(core, kind, identity).await.map_err(|cause| ReadError::unreadable(entity, cause))
}

async fn find_and_fold(core: &ShardCore, kind: &dyn Kind, identity: &Identity) -> Result<Replayed, ReplayError> {
    let Some(mut row) = core.shard.find_entity(CopyId::LIVE, identity.hash).await? else {
        let past = Past::first(kind)?;
        let cost = ReplayCost::default();
        return Ok(Replayed { opener: None, past, cost, snapshot_bytes: 0, misfit: false });
    };
    core.check_alive(&row)?;
    if row.kind == *kind.name() {
        // One allocation for all entities of the kind.
        row.kind = kind.name().clone();
    }
    let key = core.vault.key(identity.hash, KeyId(row.key_id)).await?;
    let opener = Opener { row: Arc::new(row.without_id()), key };
    let Folded { past, cost, snapshot_bytes, misfit } = fold_until(core, kind, &opener, Until::Now).await?;
    Ok(Replayed { opener: Some(opener), past, cost, snapshot_bytes, misfit })
}

/// The entity's state as far as `until`.
pub(crate) async fn past(
    core: &ShardCore,
    kind: &dyn Kind,
    opener: &Opener,
    until: Until,
) -> Result<Past, ReplayError> {
    fold_until(core, kind, opener, until).await.map(|folded| folded.past)
}

struct Folded {
    past: Past,
    cost: ReplayCost,
    snapshot_bytes: usize,
    misfit: bool,
}

async fn fold_until(core: &ShardCore, kind: &dyn Kind, opener: &Opener, until: Until) -> Result<Folded, ReplayError> {
    let mut misfit = false;
    let restored = match restore(core, kind, opener).await {
        Ok(restored) => restored.filter(|restored| until.may_begin_at(restored.version)),
        Err(why) => {
            core.metrics.snapshot_ignored(why);
            tracing::info!(entity = %opener.row.id_hash, shard = core.shard.number(), why = why.as_str(), "a snapshot does not fit and is ignored");
            misfit = true;
            None
        }
    };
    if let Some(restored) = restored {
        let snapshot_bytes = restored.bytes;
        match fold_from(core, kind, opener, until, Some(restored)).await? {
            Some((past, cost)) => return Ok(Folded { past, cost, snapshot_bytes, misfit }),
            // It is of a later time than asked for, or the log does not know of it.
            None => misfit = until == Until::Now,
        }
    }
    let folded = fold_from(core, kind, opener, until, None).await?;
    let (past, cost) = match folded {
        Some(folded) => folded,
        None => (Past::first(kind)?, ReplayCost::default()),
    };
    Ok(Folded { past, cost, snapshot_bytes: 0, misfit })
}

/// The entity's snapshot, if there is one.
async fn restore(core: &ShardCore, kind: &dyn Kind, opener: &Opener) -> Result<Option<Restored>, Misfit> {
    if core.settings.snapshots.is_none() {
        return Ok(None);
    }
    let row = core.shard.find_snapshot(opener.row.eid).await.map_err(|_| Misfit::Unreadable)?;
    row.map(|row| snapshot::open(kind, opener, &row)).transpose()
}

/// Folds what follows a snapshot, or everything. None if the snapshot is not one to begin with.
async fn fold_from(
    core: &ShardCore,
    kind: &dyn Kind,
    opener: &Opener,
    until: Until,
    restored: Option<Restored>,
) -> Result<Option<(Past, ReplayCost)>, ReplayError> {
    let mut folding =
        Folding { kind, opener, until, past: Past::first(kind)?, cost: ReplayCost::default(), check: None };
    if let Some(Restored { state, version, last_first, .. }) = restored {
        // The commit that the snapshot ends with is read once more: it has to be there, and its time is needed.
        folding.past = Past { state, version: last_first.saturating_sub(1), at_us: 0, last_first };
        folding.check = Some(version);
    }
    let mut page = opener.page(&core.shard, folding.past.version, FIRST_PAGE_ROWS).await?;
    loop {
        let (rows, is_last) = page;
        let bytes: usize = rows.iter().map(|row| row.body.len()).sum();
        let rows_max = next_page_rows(rows.len(), bytes);
        let next = rows.last().filter(|_| !is_last).map(last_version);
        let next = async {
            match next {
                Some(after) => opener.page(&core.shard, after, rows_max).await.map(Some),
                None => Ok(None),
            }
        };
        // The next page is read while this one is folded.
        let (next, step) = join(next, async { folding.fold_page(&rows) }).await;
        match step? {
            Step::More => {}
            Step::Done => break,
            Step::NotInLog => {
                core.metrics.snapshot_ignored(Misfit::NotInLog);
                return Ok(None);
            }
            Step::TooNew => return Ok(None),
        }
        match next? {
            Some(more) => page = more,
            None if folding.check.is_some() => {
                core.metrics.snapshot_ignored(Misfit::NotInLog);
                return Ok(None);
            }
            None => break,
        }
    }
    Ok(Some((folding.past, folding.cost)))
}

/// What a page led to.
enum Step {
    More,
    /// As far as was asked for.
    Done,
    /// The log does not hold the commit that the snapshot ends with.
    NotInLog,
    /// The snapshot is of a later time than was asked for.
    TooNew,
}

/// A replay on its way.
struct Folding<'a> {
    kind: &'a dyn Kind,
    opener: &'a Opener,
    until: Until,
    past: Past,
    cost: ReplayCost,
    /// The version of the snapshot that it begins with, as long as the log was not compared with it.
    check: Option<u64>,
}

impl Folding<'_> {
    fn fold_page(&mut self, rows: &[LogRow]) -> Result<Step, ReplayError> {
        for row in rows {
            if !self.until.includes(row) {
                return Ok(if self.check.is_some() { Step::TooNew } else { Step::Done });
            }
            match self.check.take() {
                Some(version) if (row.version, last_version(row)) != (self.past.last_first, version) => {
                    return Ok(Step::NotInLog);
                }
                Some(_) => {}
                None => {
                    let plaintext = self.opener.open(row)?;
                    fold(self.kind, &mut self.past.state, row, &plaintext, self.until.events_of(row))?;
                    self.cost.add(row.body.len());
                }
            }
            self.past.version = self.until.clamp(last_version(row));
            self.past.at_us = row.at_us;
            self.past.last_first = row.version;
        }
        Ok(Step::More)
    }
}

fn last_version(row: &LogRow) -> u64 {
    row.version + u64::from(row.count) - 1
}

impl Past {
    /// Before the first event.
    pub(crate) fn first(kind: &dyn Kind) -> Result<Self, ReplayError> {
        let state = catch_unwind(AssertUnwindSafe(|| kind.initial())).map_err(|_| panicked(kind, Version(0)))?;
        Ok(Past { state, version: 0, at_us: 0, last_first: 0 })
    }
}

impl Until {
    /// Whether a snapshot of this version may be begun with; of its time that is not known yet.
    fn may_begin_at(self, version: u64) -> bool {
        match self {
            Until::Version(until) => version <= until,
            Until::Now | Until::Time(_) => true,
        }
    }

    fn includes(self, row: &LogRow) -> bool {
        match self {
            Until::Now => true,
            Until::Version(until) => row.version <= until,
            Until::Time(until) => row.at_us <= until,
        }
    }

    /// How many events of a commit count.
    fn events_of(self, row: &LogRow) -> usize {
        (self.clamp(last_version(row)) + 1 - row.version) as usize
    }

    fn clamp(self, version: u64) -> u64 {
        match self {
            Until::Version(until) => version.min(until),
            Until::Now | Until::Time(_) => version,
        }
    }
}

/// What it takes to read the entity's events without folding them; none if it was never written.
pub(crate) async fn find(core: &ShardCore, identity: &Identity) -> Result<Option<Opener>, ReplayError> {
    let Some(row) = core.shard.find_entity(CopyId::LIVE, identity.hash).await? else { return Ok(None) };
    core.check_alive(&row)?;
    let key = core.vault.key(identity.hash, KeyId(row.key_id)).await?;
    Ok(Some(Opener { row: Arc::new(row), key }))
}

/// Whether there was no reason to stop but the end.
fn is_last(rows: &[LogRow], rows_max: u32) -> bool {
    rows.len() < rows_max as usize && rows.iter().map(|row| row.body.len()).sum::<usize>() < kuma_shard::PAGE_BYTES
}

/// How many rows make a page, going by those that were read.
pub(crate) fn next_page_rows(rows: usize, bytes: usize) -> u32 {
    let row_bytes = (bytes / rows.max(1)).max(1);
    // At most 1024.
    (PAGE_BYTES / row_bytes).clamp(1, 1024) as u32
}

impl Opener {
    /// Another one for the same entity.
    pub(crate) fn share(&self) -> Self {
        Opener { row: self.row.clone(), key: self.key.clone() }
    }

    /// What stands for an idempotency key among this entity's commits.
    pub(crate) fn append_key(&self, key: &[u8]) -> AppendKeyHash {
        hash_append_key(&self.key, key)
    }

    /// The next rows after `version`, which follow it without a gap, and whether they are the last ones.
    pub(crate) async fn page(
        &self,
        shard: &Shard,
        version: u64,
        rows_max: u32,
    ) -> Result<(Vec<LogRow>, bool), ReplayError> {
        let rows = shard.read_log(&self.row, version, rows_max).await?;
        let mut next = version + 1;
        for row in &rows {
            if row.version != next || row.count == 0 {
                return Err(ReplayError::Gap { expected: Version(next), found: Version(row.version) });
            }
            next += u64::from(row.count);
        }
        let is_last = is_last(&rows, rows_max);
        Ok((rows, is_last))
    }

    /// The rows that begin before `version`, newest first, which follow each other without a gap down to version 1, and whether
    /// they are the last ones. If it `joins`, the newest one ends right before `version`.
    pub(crate) async fn page_before(
        &self,
        shard: &Shard,
        version: u64,
        joins: bool,
        rows_max: u32,
    ) -> Result<(Vec<LogRow>, bool), ReplayError> {
        let rows = shard.read_log_before(&self.row, version, rows_max).await?;
        let is_last = is_last(&rows, rows_max);
        check_backward(&rows, joins.then_some(version), is_last)?;
        Ok((rows, is_last))
    }

    /// The plaintext of a commit that was not erased.
    pub(crate) fn open(&self, row: &LogRow) -> Result<Vec<u8>, ReplayError> {
        if row.is_stub() {
            return Err(ReplayError::Erased);
        }
        open_commit(&self.key, &self.place(row), &row.body)
            .map_err(|_| ReplayError::DoesNotOpen { version: Version(row.version) })
    }

    /// Whether the sealed id is this entity's.
    pub(crate) fn check_id(&self) -> Result<(), String> {
        self.id().map(|_| ())
    }

    /// The id. Its row must have it, which that of a live entity has not.
    pub(crate) fn id(&self) -> Result<String, String> {
        let EntityRow { kind, id_hash, key_id, sealed_id, .. } = &*self.row;
        open_id(&self.key, kind, IdHash(id_hash.0), KeyId(*key_id), sealed_id).map_err(|error| error.to_string())
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

/// Whether rows, newest first, follow each other without a gap: from `behind`, where that is known, down to version 1, if they are the
/// last ones.
fn check_backward(rows: &[LogRow], behind: Option<u64>, is_last: bool) -> Result<(), ReplayError> {
    let gap = |behind: u64, found: u64| ReplayError::Gap {
        expected: Version(behind.saturating_sub(1)),
        found: Version(found),
    };
    let mut behind = behind;
    for row in rows {
        if let Some(behind) = behind.filter(|behind| last_version(row) + 1 != *behind || row.count == 0) {
            return Err(gap(behind, last_version(row)));
        }
        behind = Some(row.version);
    }
    match behind {
        Some(first) if is_last && first != 1 => Err(gap(first, 0)),
        _ => Ok(()),
    }
}

/// Folds the first `events_max` events of a commit.
fn fold(
    kind: &dyn Kind,
    state: &mut State,
    row: &LogRow,
    plaintext: &[u8],
    events_max: usize,
) -> Result<(), ReplayError> {
    let version = Version(row.version);
    let undecodable = |event, detail| ReplayError::undecodable(kind.name(), row.version, event, detail);
    let body = Body::parse(plaintext).map_err(|error| undecodable(String::new(), error.to_string()))?;
    if body.events.len() != row.count as usize {
        let detail = format!("{} events where the row has {}", body.events.len(), row.count);
        return Err(undecodable(String::new(), detail));
    }
    let events = &body.events[..events_max.min(body.events.len())];
    // Decoding runs the user's code as well.
    let folded = catch_unwind(AssertUnwindSafe(|| kind.decode(events).map(|decoded| kind.apply(state, &decoded))));
    folded.map_err(|_| panicked(kind, version))?.map_err(|error| undecodable(error.event, error.detail))
}

fn panicked(kind: &dyn Kind, version: Version) -> ReplayError {
    ReplayError::Panicked { kind: kind.name().to_string(), version }
}

#[cfg(test)]
mod tests {
    use kuma_shard::{Epoch, Slot};

    use super::*;

    fn row(&(version, count): &(u64, u32)) -> LogRow {
        let (slot, epoch) = (Slot::new(0), Epoch::FIRST);
        LogRow { position: 0, slot, seq: 0, version, count, at_us: 0, epoch, append_key: None, body: Vec::new() }
    }

    fn gap(versions: &[(u64, u32)], behind: Option<u64>, is_last: bool) -> Option<(u64, u64)> {
        let rows: Vec<LogRow> = versions.iter().map(row).collect();
        match check_backward(&rows, behind, is_last) {
            Ok(()) => None,
            Err(ReplayError::Gap { expected, found }) => Some((expected.0, found.0)),
            Err(other) => panic!("{other:?}"),
        }
    }

    /// A commit that was missing where one page ends and the next begins was once passed over in silence.
    #[test]
    fn a_gap_is_noticed_within_a_page_between_two_and_at_the_end() {
        assert_eq!(gap(&[(7, 2), (4, 3), (1, 3)], None, true), None);
        assert_eq!(gap(&[(7, 2), (4, 3)], Some(9), false), None);
        assert_eq!(gap(&[(7, 2), (4, 2)], None, false), Some((6, 5)), "within a page");
        assert_eq!(gap(&[(7, 2), (4, 3)], Some(10), false), Some((9, 8)), "between two");
        assert_eq!(gap(&[(7, 2), (4, 3)], None, true), Some((3, 0)), "at the end");
        assert_eq!(gap(&[], Some(4), true), Some((3, 0)), "a last page without rows");
        assert_eq!(gap(&[], Some(1), true), None);
        assert_eq!(gap(&[], None, true), None, "there are no events");
    }
}
