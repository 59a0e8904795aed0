//! The logs of a whole cluster, as projections of one of its nodes read them: the store of a node has a part of the slots only.
//!
//! ```text
//! logs of all slots, wherever they are ──page──► what is erased here is taken out ──► one transaction of the model
//!                                                                                   with the seqs of all slots in it
//! ```
//!
//! Invariants:
//! - A page has whole commits, of each slot in the order of their seqs and without gaps, and begins behind the seqs that were asked for.
//! - What says how far a model is are the seqs of slots. A mark saves the reader work and decides nothing.
//! - What this disk knows to be erased, and what a model was purged of, is not applied after that.

use std::{
    collections::HashSet,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::future::BoxFuture;
use kuma_shard::{EntityHash, Slot};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    Delivery, FedItem, Filter, StoredEvent, SubscribeError, Unreadable,
    feed::{Standing, retry_after},
    shard_core::Fate,
    store::Inner,
};

/// The logs of all slots of a cluster, wherever they are.
pub trait ClusterLogs: Send + Sync + 'static {
    /// By slot, the seq of its last commit; or why that cannot be said now, in words.
    fn ends(&self) -> BoxFuture<'_, Result<Vec<u64>, String>>;

    /// Begins to read behind what `from` says.
    fn read(&self, filter: Filter, from: ClusterPlace) -> BoxFuture<'_, Result<Box<dyn ClusterReader>, String>>;

    /// Begins to hand out events behind what `from` says, and erasures.
    fn follow(&self, filter: Filter, from: FollowFrom)
    -> BoxFuture<'_, Result<Box<dyn ClusterEvents>, SubscribeError>>;

    /// The commit with this seq of a slot's log, if it is an entity's that is not erased.
    fn commit(
        &self,
        filter: Filter,
        slot: Slot,
        seq: u64,
        entity: EntityHash,
    ) -> BoxFuture<'_, Result<Option<FedItem>, SubscribeError>>;
}

/// Where events are followed from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FollowFrom {
    /// Of events.
    pub place: ClusterPlace,
    /// The number of the last erasure, of this disk's, that was told.
    pub erasures: i64,
    /// Commits that are older are not wanted. Microseconds since 1970.
    pub since_us: i64,
}

/// Hands out the events of a cluster one by one, and tells of erasures. It ends when it is dropped.
pub trait ClusterEvents: Send + Sync {
    /// As [`crate::Subscription::next`].
    fn next(&mut self) -> BoxFuture<'_, Result<Delivery, SubscribeError>>;

    /// The next one of those that are before `ends`, which are seqs by slot; none when all of them were handed out.
    fn next_before<'a>(&'a mut self, ends: &'a [u64]) -> BoxFuture<'a, Result<Option<Delivery>, SubscribeError>>;

    /// How far what was handed out reaches; of a commit that was handed out in part, all comes again.
    fn place(&self) -> ClusterPlace;

    /// The number of the last erasure that was told.
    fn erasures(&self) -> i64;

    /// The place of the commit of which something was handed out last.
    fn last_place(&self) -> Option<(Slot, u64)>;
}

/// How far the logs of a cluster were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterPlace {
    /// By slot, the seq of the last commit that was read.
    pub seqs: Vec<u64>,
    /// What the reader said with the last page; without it more is read than is needed.
    pub mark: Option<String>,
}

/// Reads the logs of a cluster. It ends when it is dropped.
pub trait ClusterReader: Send {
    /// What comes next; waits until there is something. An error in words: it can be called again, and after some errors fails for ever.
    fn page(&mut self) -> BoxFuture<'_, Result<ClusterPage, String>>;

    /// How far behind it is, to be asked from elsewhere.
    fn gauge(&self) -> Arc<dyn ClusterGauge>;
}

/// Says how far behind a reader is.
pub trait ClusterGauge: Send + Sync {
    /// Commits that it was not given yet, wanted or not, as of what each node said last; or, in words, which node has said nothing yet.
    fn commits_behind(&self) -> Result<u64, String>;

    /// Since when a node has not been reached, so that what it has is missing; none if all are.
    fn cut_off_for(&self) -> Option<Duration>;
}

/// Whole commits of a cluster's logs.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterPage {
    /// What is wanted, and what cannot be read.
    pub items: Vec<FedItem>,
    /// Of each slot with something new, wanted or not, up to which seq it is read at the end of the page.
    pub passed: Vec<(Slot, u64)>,
    /// Where to go on behind the page.
    pub mark: String,
}

/// A page on its way to a model.
pub(crate) struct WidePage {
    pub(crate) items: Vec<WideItem>,
    pub(crate) passed: Vec<(Slot, u64)>,
    pub(crate) mark: String,
    /// Given back with the page.
    _room: OwnedSemaphorePermit,
}

/// A commit, or what stands in its place.
pub(crate) struct WideItem {
    /// None of what is damaged so far that its slot is not known.
    pub(crate) place: Option<(Slot, u64)>,
    pub(crate) what: Result<WideCommit, Unreadable>,
}

pub(crate) struct WideCommit {
    entity: EntityHash,
    life: u32,
    key_id: [u8; 16],
    pub(crate) events: Vec<StoredEvent>,
}

impl From<FedItem> for WideItem {
    fn from(item: FedItem) -> Self {
        let place = item.place();
        let what = match item {
            FedItem::Commit(commit) => {
                let (entity, life, key_id) = (commit.entity, commit.life, commit.key_id);
                Ok(WideCommit { entity, life, key_id, events: commit.into_events().collect() })
            }
            FedItem::Unreadable(_, unreadable) => Err(unreadable),
        };
        WideItem { place, what }
    }
}

impl WidePage {
    /// Takes out what is erased, as this disk knows, and says whether the rest can be applied; see [`crate::feed::FeedPage::settle`].
    pub(crate) async fn settle(
        &mut self,
        inner: &Inner,
        purged: &HashSet<[u8; 16]>,
    ) -> Result<Standing, SubscribeError> {
        let commits = || self.items.iter().filter_map(|item| item.what.as_ref().ok());
        let keys: Vec<[u8; 16]> = commits().map(|commit| commit.key_id).collect::<HashSet<_>>().into_iter().collect();
        let erased = inner.node().tombstones_by_key(&keys).await.map_err(SubscribeError::Erasures)?;
        let erased: HashSet<[u8; 16]> = erased.into_iter().map(|tombstone| tombstone.key_id).collect();
        let erasing = inner.erasing();
        let is_gone = |key_id: &[u8; 16]| {
            erased.contains(key_id) || purged.contains(key_id) || erasing.fate(*key_id) == Some(Fate::Erased)
        };
        let is_undecided = |commit: &WideCommit| {
            let former = || erasing.lives_of(commit.entity).into_iter();
            let is_first = commit.life <= 1;
            !is_first && former().any(|key_id| key_id != commit.key_id && !purged.contains(&key_id))
        };
        if erasing.len() > 0 && commits().any(is_undecided) {
            return Ok(Standing::Undecided);
        }
        self.items.retain(|item| !item.what.as_ref().is_ok_and(|commit| is_gone(&commit.key_id)));
        Ok(Standing::Settled)
    }

    pub(crate) fn events(&self) -> usize {
        self.items.iter().filter_map(|item| item.what.as_ref().ok()).map(|commit| commit.events.len()).sum()
    }
}

/// What such a feed says.
pub(crate) enum WideFed {
    Reading(Arc<dyn ClusterGauge>),
    Page(WidePage),
    /// It cannot be read for now; it is tried again.
    Trouble(String),
}

/// Feeds `take` with the logs of a cluster until the store closes, or `take` wants no more.
pub(crate) async fn feed_wide(
    store: Weak<Inner>,
    logs: Arc<dyn ClusterLogs>,
    filter: Filter,
    from: ClusterPlace,
    room: Arc<Semaphore>,
    take: impl Fn(WideFed) -> bool,
) {
    let is_open = || store.upgrade().is_some_and(|inner| !inner.is_closing());
    let mut failures = 0;
    let mut reader: Option<Box<dyn ClusterReader>> = None;
    while is_open() {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let read = match &mut reader {
            Some(reader) => reader.page().await,
            None => match logs.read(filter.clone(), from.clone()).await {
                Ok(opened) => {
                    if !take(WideFed::Reading(opened.gauge())) {
                        return;
                    }
                    reader.insert(opened).page().await
                }
                Err(why) => Err(why),
            },
        };
        match read {
            Ok(ClusterPage { items, passed, mark }) => {
                failures = 0;
                let items = items.into_iter().map(WideItem::from).collect();
                if !take(WideFed::Page(WidePage { items, passed, mark, _room: permit })) {
                    return;
                }
            }
            Err(_) if !is_open() => return,
            Err(why) => {
                if failures == 0 {
                    tracing::warn!(%why, "the logs of the cluster cannot be read for a projection; it is tried again");
                }
                if !take(WideFed::Trouble(why)) {
                    return;
                }
                tokio::time::sleep(retry_after(failures)).await;
                failures += 1;
            }
        }
    }
}
