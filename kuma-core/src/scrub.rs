//! The scrub: reads every stored commit again and again, slowly, so that a rotten one is found before somebody needs it.
//!
//! ```text
//! page of commits ──► checksum, seal* and content ──bad──► quarantine the entity, say which, count
//!        ▲                          │ good
//!        └────── wait, by bytes ────┘            one pass: every shard, from a random place once around; at most one a day
//! ```
//! \* Only where keys are unwrapped in this process. A key management service is not asked for every entity's key over and over; the
//! checksum finds what rots all the same.
//!
//! Invariants:
//! - It never holds more than a page, and never reads faster than it is told to.
//! - A bad row concerns its entity alone; what cannot be read for another reason (the store is closing, a file is out of use) is no
//!   finding.
//!
//! It starts at a random place, so that a store that is restarted often is read evenly too without remembering where it was. It is
//! not [`Kuma::verify`](crate::Kuma::verify), which compares digests, indexes and versions as well, in one go.

use std::{
    collections::{HashMap, hash_map},
    sync::Arc,
    time::{Duration, Instant},
};

use kuma_crypto::KeyId;
use kuma_shard::{EntityHash, EntityRow, LogRow};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use rand::RngExt;

use crate::{replay::Opener, shard_core::ShardCore, supervisor::SupervisorMessage, verify};

const PAGE_ROWS: u32 = 64;
/// Keys that are kept unwrapped, between two pages; commits of one entity stand close to each other as often as not.
const OPENERS_MAX: usize = 1024;
/// What a commit counts as, at the least: to read it is to read a page of the file, and perhaps to unwrap a key.
const COMMIT_COST_BYTES: u64 = 2048;
/// A small store is not read over and over.
const PASS_EVERY: Duration = Duration::from_secs(24 * 3600);
/// When a page could not be read for a reason that is no finding.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// What the scrub has done since the store was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubStats {
    /// Commits read.
    pub commits: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Damaged rows found; the log names their entities.
    pub bad_rows: u64,
    /// Times it has been through everything.
    pub passes: u64,
}

/// Reads the next page.
pub(crate) struct NextPage;

impl ractor::Message for NextPage {} // local only

/// What is scrubbed, and how fast.
pub(crate) struct ScrubArguments {
    pub(crate) shards: Vec<Arc<ShardCore>>,
    pub(crate) bytes_per_second: u64,
}

pub(crate) struct Scrub;

pub(crate) struct ScrubState {
    shards: Vec<Arc<ShardCore>>,
    bytes_per_second: u64,
    /// What is left of this pass, the next part last.
    parts: Vec<Part>,
    openers: HashMap<(u16, i64), Opener>,
    /// As of which they are kept.
    generation: u64,
    pass_began: Instant,
}

/// Commits of a shard behind `after`, up to `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    shard: usize,
    after: u64,
    end: u64,
}

/// Once around: from a place in the first shard to its end, the other shards, and the first one up to that place.
fn around(shards: usize, first: usize, place: u64) -> Vec<Part> {
    let whole = |shard| Part { shard, after: 0, end: u64::MAX };
    let mut parts = vec![Part { after: place, ..whole(first) }];
    parts.extend((1..shards).map(|next| whole((first + next) % shards)));
    parts.push(Part { end: place, ..whole(first) });
    parts.reverse();
    parts
}

impl Actor for Scrub {
    type Msg = NextPage;
    type State = ScrubState;
    type Arguments = ScrubArguments;

    async fn pre_start(
        &self,
        me: ActorRef<NextPage>,
        ScrubArguments { shards, bytes_per_second }: ScrubArguments,
    ) -> Result<ScrubState, ActorProcessingErr> {
        me.cast(NextPage)?;
        let openers = HashMap::new();
        Ok(ScrubState {
            shards,
            bytes_per_second,
            parts: Vec::new(),
            openers,
            generation: 0,
            pass_began: Instant::now(),
        })
    }

    async fn handle(
        &self,
        me: ActorRef<NextPage>,
        NextPage: NextPage,
        state: &mut ScrubState,
    ) -> Result<(), ActorProcessingErr> {
        let wait = state.next_page().await;
        // Ends with this actor.
        me.send_after(wait, || NextPage);
        Ok(())
    }
}

impl ScrubState {
    /// Reads a page, and says how long to wait before the next one.
    async fn next_page(&mut self) -> Duration {
        let Some(part) = self.parts.pop() else {
            self.pass_began = Instant::now();
            self.parts = self.begin_pass().await;
            return Duration::ZERO;
        };
        let Some(core) = self.shards.get(part.shard).cloned() else { return Duration::ZERO };
        let page = match core.shard.scrub_page(part.after, PAGE_ROWS).await {
            Ok(page) => page,
            Err(error) if error.is_damage() => {
                // Whose it is cannot be told; everything behind it in this shard is left to `verify`.
                core.metrics.scrub.bad_rows.add(1);
                tracing::error!(shard = core.shard.number(), after = part.after, %error, "the scrub found damage");
                return RETRY_AFTER;
            }
            Err(error) => {
                tracing::debug!(shard = core.shard.number(), %error, "the scrub waits");
                self.parts.push(part);
                return RETRY_AFTER;
            }
        };
        let cost = page.bytes.max(page.rows.len() as u64 * COMMIT_COST_BYTES);
        for row in page.rows {
            let (position, entity, found) = match row {
                Ok((entity, row)) if row.position <= part.end => {
                    core.metrics.scrub.commits.add(1);
                    (row.position, Some(entity.id_hash), self.check(&core, &entity, &row).await)
                }
                Err(bad) if bad.position <= part.end => (bad.position, bad.entity, Err(bad.detail)),
                _ => continue,
            };
            if let Err(detail) = found {
                report(&core, position, entity, detail);
            }
        }
        core.metrics.scrub.bytes.add(page.bytes);
        match page.next.filter(|next| *next < part.end) {
            Some(next) => self.parts.push(Part { after: next, ..part }),
            None if self.parts.is_empty() => {
                core.metrics.scrub.passes.add(1);
                self.openers.clear();
                return PASS_EVERY.saturating_sub(self.pass_began.elapsed());
            }
            None => {}
        }
        Duration::from_secs_f64(cost as f64 / self.bytes_per_second.max(1) as f64)
    }

    async fn begin_pass(&self) -> Vec<Part> {
        let count = self.shards.len();
        let first = rand::rng().random_range(0..count.max(1));
        let end = match self.shards.get(first) {
            Some(core) => core.shard.log_end().await.unwrap_or(0),
            None => return Vec::new(),
        };
        around(count, first, rand::rng().random_range(0..=end))
    }

    /// What is wrong with a row that matches its checksum, if anything.
    async fn check(&mut self, core: &ShardCore, entity: &EntityRow, row: &LogRow) -> Result<(), String> {
        // A key that is destroyed is to be in no memory either.
        let generation = core.generation();
        if std::mem::replace(&mut self.generation, generation) != generation {
            self.openers.clear();
        }
        if entity.is_departed() {
            // Given away with its slot: its key is the new owner's, and nobody reads it here until it is a stub.
            return Ok(());
        }
        if core.is_ending(entity) || entity.erased_at_us.is_some() {
            return if core.is_ending(entity) { Ok(()) } else { verify::check_stub(core, entity, row).await };
        }
        if row.is_stub() {
            return Err("it is empty, and its entity was not erased".to_owned());
        }
        if !core.vault.is_local() {
            return Ok(());
        }
        let name = (core.shard.number(), entity.eid);
        if self.openers.len() >= OPENERS_MAX {
            self.openers.clear();
        }
        let opener = match self.openers.entry(name) {
            hash_map::Entry::Occupied(known) => known.into_mut(),
            hash_map::Entry::Vacant(place) => {
                let key = match core.vault.key(entity.id_hash, KeyId(entity.key_id)).await {
                    Ok(key) => key,
                    Err(error @ crate::VaultError::KeyMissing) => return Err(error.to_string()),
                    // It was erased while its page was looked at.
                    // A store that is closing says nothing about the row.
                    Err(_) => return Ok(()),
                };
                let opener = Opener { row: entity.clone().into(), key };
                opener.check_id()?;
                place.insert(opener)
            }
        };
        verify::check_commit(opener, row).map(|_| ())
    }
}

/// Says what was found, and keeps its entity out of use for a while.
fn report(core: &ShardCore, position: u64, entity: Option<EntityHash>, detail: String) {
    core.metrics.scrub.bad_rows.add(1);
    let shard = core.shard.number();
    match entity {
        Some(entity) => {
            tracing::error!(shard, position, %entity, %detail, "the scrub found a damaged commit; its entity is quarantined");
            quarantine(core, entity, detail);
        }
        None => tracing::error!(shard, position, %detail, "the scrub found a damaged row that belongs to no entity"),
    }
}

/// Takes an entity with damage out of use: what it has in memory may be right, but what would be appended now could not be read
/// together with what is stored.
pub(crate) fn quarantine(core: &ShardCore, entity: EntityHash, why: String) {
    core.record_failure(entity, why, true);
    let supervisor = core.supervisor.lock().clone();
    if let Some(supervisor) = supervisor {
        let (done, _) = tokio::sync::oneshot::channel();
        // A supervisor that is gone has taken its entities along.
        let _ = supervisor.cast(SupervisorMessage::Passivate { entity, done });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_goes_once_around_from_where_it_begins() {
        let part = |shard, after, end| Part { shard, after, end };
        let mut parts = around(3, 1, 70);
        parts.reverse();
        assert_eq!(parts, [part(1, 70, u64::MAX), part(2, 0, u64::MAX), part(0, 0, u64::MAX), part(1, 0, 70)]);
        let mut parts = around(1, 0, 0);
        parts.reverse();
        assert_eq!(parts, [part(0, 0, u64::MAX), part(0, 0, 0)]);
    }
}
