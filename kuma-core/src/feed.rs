//! The feed: one shard's log as opened events, page by page, first what is there and then what comes. All subscriptions and projections are
//! fed by it.
//!
//! ```text
//! log ──page──► entities and keys looked up ──► opened, upcast, filtered ──► whoever it is for
//!   ▲                                                                              │
//!   └── the end moved, and there is room ◄──────────── a page was used up ─────────┘
//! ```
//!
//! Invariants:
//! - Catching up and following are the same: read from a position to the end, wait until the end moves. There is no seam.
//! - Every commit of a wanted kind that is not erased comes once, in the order of the log, or it is said that it cannot be read.
//! - A reader has so many pages at once and no more. Whoever is slow falls behind in the log, not in memory.
//! - Before a page is handed on it is looked at again ([`FeedPage::settle`]) if an entity was erased since it was read.

use std::{
    collections::{HashMap, HashSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Weak},
    time::Duration,
};

use kuma_crypto::KeyId;
use kuma_shard::{EntityHash, EntityRow, Epoch, LogReader, LogRow, ReadRow, Slot};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    Filter, ReplayError, StoredEvent, VaultError, history,
    kind::{DocumentKind, Kind},
    kind_options::Tuning,
    replay::Opener,
    shard_core::{Fate, ShardCore},
    store::Inner,
};

/// Entities whose keys are kept between two pages.
const LIVES_MAX: usize = 1 << 14;
/// Pages that one reader has at once, of each shard: one that is being used, and the next.
pub(crate) const PAGES_AHEAD: usize = 2;
/// When a page could not be read; each time twice as long, up to some 10 s.
const RETRY_AFTER: Duration = Duration::from_millis(100);
const RETRIES_DOUBLED: u32 = 7;

/// A part of a shard's log.
pub(crate) struct FeedPage {
    pub(crate) core: Arc<ShardCore>,
    /// Everything up to this position is in this page or an earlier one.
    pub(crate) last: u64,
    /// What is wanted of it.
    pub(crate) items: Vec<FeedItem>,
    /// The place of each of its commits, wanted or not, in its slot's log; not of those that were given away with their slot.
    pub(crate) places: Vec<SlotPlace>,
    /// As of which nothing in it is erased.
    generation: u64,
    /// Given back with the page.
    _room: OwnedSemaphorePermit,
}

/// The place of a commit in its slot's log, and the token under which it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotPlace {
    pub(crate) position: u64,
    pub(crate) slot: Slot,
    pub(crate) seq: u64,
    pub(crate) epoch: Epoch,
}

/// A commit, or what stands in its place.
pub(crate) enum FeedItem {
    Commit(FeedCommit),
    Unreadable { position: u64, unreadable: Unreadable },
}

impl FeedItem {
    pub(crate) fn position(&self) -> u64 {
        match self {
            FeedItem::Commit(commit) => commit.position,
            FeedItem::Unreadable { position, .. } => *position,
        }
    }
}

/// The wanted events of a commit.
pub(crate) struct FeedCommit {
    pub(crate) life: Arc<EntityRow>,
    pub(crate) position: u64,
    pub(crate) events: Vec<StoredEvent>,
}

/// A commit that cannot be read: it is damaged, its key is missing, or an upcaster fails on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unreadable {
    /// The shard.
    pub shard: u16,
    /// The place of the commit in the shard's log.
    pub position: u64,
    /// Whose it is, if that can be told.
    pub entity: Option<EntityHash>,
    /// The version of its first event, if that can be told.
    pub version: Option<u64>,
    /// What is wrong.
    pub why: String,
}

/// Whether a page can be handed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Settled,
    /// It is not decided yet which life of an entity there is, or that the former one is erased was not told yet. In a moment.
    Undecided,
}

/// Where a feed begins, and what of it is wanted.
pub(crate) struct FeedFrom {
    pub(crate) filter: Arc<Filter>,
    /// Everything up to this position has been read.
    pub(crate) after: u64,
    /// Commits that are older are not wanted. Microseconds since 1970.
    pub(crate) since_us: i64,
}

/// What a feed says.
pub(crate) enum Fed {
    Page(FeedPage),
    /// A page cannot be read for now; it is tried again.
    Trouble {
        shard: u16,
        why: String,
    },
}

/// Feeds `take` with the log of one shard until the store closes, or `take` wants no more.
pub(crate) async fn feed(
    store: Weak<Inner>,
    core: Arc<ShardCore>,
    from: FeedFrom,
    room: Arc<Semaphore>,
    take: impl Fn(Fed) -> bool,
) {
    let mut end = core.shard.end();
    let mut after = from.after;
    let mut feed = Feed::new(core, from);
    let mut failures = 0;
    loop {
        if *end.borrow_and_update() <= after {
            // It fails when the store closes.
            if end.changed().await.is_err() {
                return;
            }
            continue;
        }
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        // What has come meanwhile is on the same page.
        let newest = *end.borrow_and_update();
        let Some(inner) = store.upgrade() else { return };
        match feed.page(&inner, after, newest, permit).await {
            Ok(page) => {
                failures = 0;
                after = page.last;
                if !take(Fed::Page(page)) {
                    return;
                }
            }
            Err(_) if inner.is_closing() => return,
            Err(error) => {
                drop(inner);
                let shard = feed.core.shard.number();
                if failures == 0 {
                    tracing::warn!(shard, after, %error, "events cannot be read for subscriptions and projections; it is tried again");
                }
                if !take(Fed::Trouble { shard, why: error.to_string() }) {
                    return;
                }
                tokio::time::sleep(retry_after(failures)).await;
                failures += 1;
            }
        }
    }
}

/// How long to wait after so many failures before the one that has just been.
pub(crate) fn retry_after(failures: u32) -> Duration {
    RETRY_AFTER * (1 << failures.min(RETRIES_DOUBLED))
}

/// Reads the commit at this position, if it is not erased.
pub(crate) async fn read_one(
    inner: &Inner,
    filter: &Filter,
    shard: u16,
    position: u64,
) -> Result<Option<FeedItem>, String> {
    let core = inner.core_of_shard(shard).ok_or("its shard is out of use")?;
    let from = FeedFrom { filter: Arc::new(filter.clone()), after: position.saturating_sub(1), since_us: i64::MIN };
    let mut feed = Feed::new(core, from);
    let room = Arc::new(Semaphore::new(1)).acquire_owned().await.map_err(|error| error.to_string())?;
    let page = feed.page(inner, position.saturating_sub(1), position, room).await.map_err(|error| error.to_string())?;
    Ok(page.items.into_iter().next())
}

/// Reads pages of one shard's log.
pub(crate) struct Feed {
    core: Arc<ShardCore>,
    from: FeedFrom,
    reader: LogReader,
    /// Keys and ids, by the numbers of their entities.
    lives: HashMap<i64, Life>,
    /// As of which they are kept.
    generation: u64,
    /// Those that no type is registered for.
    kinds: HashMap<Arc<str>, Arc<dyn Kind>>,
}

enum Life {
    Open {
        opener: Opener,
        id: Arc<str>,
    },
    /// Its key is destroyed.
    Gone,
    Unreadable(String),
}

impl Feed {
    pub(crate) fn new(core: Arc<ShardCore>, from: FeedFrom) -> Self {
        let reader = LogReader::new(core.shard.clone());
        Feed { core, from, reader, lives: HashMap::new(), generation: 0, kinds: HashMap::new() }
    }

    pub(crate) async fn page(
        &mut self,
        inner: &Inner,
        after: u64,
        end: u64,
        room: OwnedSemaphorePermit,
    ) -> Result<FeedPage, ReplayError> {
        // A key that is destroyed is to be in no memory either.
        let generation = self.core.generation();
        if std::mem::replace(&mut self.generation, generation) != generation {
            self.lives.clear();
            self.reader.forget();
        }
        let filter = self.from.filter.clone();
        let read = self.reader.page(after, end, |entity| filter.matches_kind(&entity.kind)).await?;
        let mut page = FeedPage {
            core: self.core.clone(),
            last: read.last,
            items: Vec::with_capacity(read.rows.len()),
            places: Vec::with_capacity(read.rows.len()),
            generation,
            _room: room,
        };
        let wanted = |read: &&ReadRow| {
            !read.row.is_stub() && read.entity.erased_at_us.is_none() && read.row.at_us >= self.from.since_us
        };
        self.learn(read.rows.iter().filter(wanted).map(|read| read.entity.clone()).collect()).await?;
        for ReadRow { entity, row } in read.rows {
            // What was given away with its slot is at the node that owns it now.
            if entity.is_departed() {
                continue;
            }
            page.places.push(SlotPlace { position: row.position, slot: row.slot, seq: row.seq, epoch: row.epoch });
            if row.is_stub() || entity.erased_at_us.is_some() || row.at_us < self.from.since_us {
                continue;
            }
            page.items.extend(self.open(inner, entity, &row));
        }
        if let Some(bad) = read.bad {
            // It is passed, and said that it is.
            page.last = bad.position;
            let (entity, why) = (bad.entity, bad.detail);
            page.items.push(self.unreadable(bad.position, entity, None, format!("the commit {why}")));
        }
        Ok(page)
    }

    /// Looks up keys and ids.
    async fn learn(&mut self, mut entities: Vec<Arc<EntityRow>>) -> Result<(), VaultError> {
        if self.lives.len() > LIVES_MAX {
            self.lives.clear();
        }
        entities.retain(|entity| !self.lives.contains_key(&entity.eid));
        entities.sort_unstable_by_key(|entity| entity.eid);
        entities.dedup_by_key(|entity| entity.eid);
        if entities.is_empty() {
            return Ok(());
        }
        let wanted: Vec<(EntityHash, KeyId)> =
            entities.iter().map(|entity| (entity.id_hash, KeyId(entity.key_id))).collect();
        let keys = self.core.vault.keys(&wanted).await?;
        for (entity, key) in entities.into_iter().zip(keys) {
            let eid = entity.eid;
            let life = match key {
                Ok(key) => {
                    let opener = Opener { row: entity, key };
                    match opener.id() {
                        Ok(id) => Life::Open { opener, id: id.into() },
                        Err(why) => Life::Unreadable(why),
                    }
                }
                Err(VaultError::KeyDestroyed) => Life::Gone,
                Err(error @ VaultError::KeyMissing) => Life::Unreadable(error.to_string()),
                Err(VaultError::MasterKey(error)) if self.core.vault.is_local() => Life::Unreadable(error.to_string()),
                // A service that is down says nothing about the entity.
                Err(error) => return Err(error),
            };
            self.lives.insert(eid, life);
        }
        Ok(())
    }

    fn open(&mut self, inner: &Inner, entity: Arc<EntityRow>, row: &LogRow) -> Option<FeedItem> {
        // What is erased is nobody's any more. A life that may be replaced is handed on or not when that is decided.
        if self.core.erasing().fate(entity.key_id) == Some(Fate::Erased) {
            return None;
        }
        let kind = match inner.kinds.read().get(&*entity.kind) {
            Some(kind) => kind.clone(),
            // Not remembered in the store: it could not be given its Rust type any more.
            None => self
                .kinds
                .entry(entity.kind.clone())
                .or_insert_with(|| Arc::new(DocumentKind::new(&entity.kind, Tuning::default())))
                .clone(),
        };
        let opened = match self.lives.get(&entity.eid)? {
            Life::Gone => return None,
            Life::Unreadable(why) => Err(why.clone()),
            Life::Open { opener, id } => opener
                .open(row)
                .and_then(|plaintext| history::decode(&*kind, row, &plaintext))
                .map(|events| (events, id.clone()))
                .map_err(|error| error.to_string()),
        };
        let (mut events, id) = match opened {
            Ok(opened) => opened,
            Err(why) => {
                let (entity, version) = (Some(entity.id_hash), Some(row.version));
                return Some(self.unreadable(row.position, entity, version, why));
            }
        };
        events.retain(|event| self.from.filter.matches(&entity.kind, &event.name));
        if events.is_empty() {
            return None;
        }
        let stored = |event| StoredEvent {
            slot: row.slot,
            seq: row.seq,
            kind: entity.kind.clone(),
            id: id.clone(),
            entity: entity.id_hash,
            life: entity.life,
            event,
        };
        let events = events.into_iter().map(stored).collect();
        Some(FeedItem::Commit(FeedCommit { position: row.position, events, life: entity }))
    }

    fn unreadable(&self, position: u64, entity: Option<EntityHash>, version: Option<u64>, why: String) -> FeedItem {
        let shard = self.core.shard.number();
        FeedItem::Unreadable { position, unreadable: Unreadable { shard, position, entity, version, why } }
    }
}

impl FeedPage {
    /// Takes out what was erased since the page was read, and says whether the rest can be handed on. `told` says of the name of a life's key
    /// whether whoever the page is for knows that this life is erased.
    pub(crate) async fn settle(&mut self, told: impl Fn(&[u8; 16]) -> bool) -> Result<Standing, kuma_shard::ReadError> {
        let core = self.core.clone();
        let generation = core.generation();
        if generation != self.generation {
            let eids: HashSet<i64> = self.commits().map(|commit| commit.life.eid).collect();
            let erased: HashSet<i64> = core.shard.erased_among(eids).await?.into_iter().collect();
            let is_gone =
                |life: &EntityRow| erased.contains(&life.eid) || core.erasing().fate(life.key_id) == Some(Fate::Erased);
            self.items.retain(|item| !matches!(item, FeedItem::Commit(commit) if is_gone(&commit.life)));
            self.generation = generation;
        }
        if core.erasing().len() == 0 {
            return Ok(Standing::Settled);
        }
        let is_undecided = |life: &EntityRow| {
            let replaced = core.erasing().fate(life.key_id) == Some(Fate::Replaced);
            // The lives before it end, for whoever reads on, before this one begins.
            let former = || core.erasing().lives_of(life.id_hash).into_iter();
            replaced || life.life > 1 && former().any(|key_id| key_id != life.key_id && !told(&key_id))
        };
        match self.commits().any(|commit| is_undecided(&commit.life)) {
            true => Ok(Standing::Undecided),
            false => Ok(Standing::Settled),
        }
    }

    /// Whether something was erased since the page was read or settled.
    pub(crate) fn is_stale(&self) -> bool {
        self.generation != self.core.generation()
    }

    fn commits(&self) -> impl Iterator<Item = &FeedCommit> {
        self.items.iter().filter_map(|item| match item {
            FeedItem::Commit(commit) => Some(commit),
            FeedItem::Unreadable { .. } => None,
        })
    }

    /// How many events are in it.
    pub(crate) fn events(&self) -> usize {
        self.commits().map(|commit| commit.events.len()).sum()
    }
}

/// Runs user code that may panic.
pub(crate) fn guarded<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
        // What it says may quote the event.
        drop(panic);
        "its code panicked".to_owned()
    })
}
