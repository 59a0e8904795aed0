//! Subscriptions: the events of the whole store as a stream, first those that are there and then those that come.
//!
//! ```text
//! feed of shard 0 ──pages──┐
//! feed of shard 1 ──pages──┼──► looked at again ──► next() ──► the subscriber
//! tombstones ──────────────┘     if something was erased
//! ```
//!
//! Invariants:
//! - Events of one entity come in the order of their versions, commits of one slot in the order of their seqs, without gap or duplicate.
//!   Between slots there is no order.
//! - What was erased before it was handed out is not handed out. That an entity is erased is told after its last event, and before the first
//!   one of a later life.
//! - Memory is bounded by two pages a shard, however slow the subscriber: it falls behind in the log.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::{Duration, SystemTime},
    vec,
};

use futures_util::{Stream, stream};
use kuma_shard::{CopyId, EntityHash, EntityRow, Slot, Tombstone};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};

use crate::{
    Checkpoint, CheckpointError, Filter, Kuma, ReceiptId, StoredEvent, Unreadable,
    checkpoint::EVER,
    feed::{Fed, FeedCommit, FeedFrom, FeedItem, FeedPage, PAGES_AHEAD, Standing, feed},
    micros,
    store::Inner,
};

/// Tombstones that are read at once.
const TOMBSTONES_MAX: u32 = 256;
/// How long until it is looked again whether it is decided which life of an entity there is.
const UNDECIDED_WAIT: Duration = Duration::from_millis(10);

/// Where a subscription begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// With the first event of the store.
    Beginning,
    /// With what is committed from now on.
    Now,
    /// With what was committed at this time or later, by the clock of the store. The log is read through from its beginning to find it.
    Time(SystemTime),
    /// Behind what was handed out when this checkpoint was taken.
    Checkpoint(Checkpoint),
}

/// What a subscriber is handed.
#[derive(Clone, Debug, PartialEq)]
pub enum Delivery {
    /// An event.
    Event(StoredEvent),
    /// An entity was erased: forget whatever you keep of it.
    Erased(Erased),
    /// A commit cannot be read. The subscription goes on behind it.
    Unreadable(Unreadable),
}

/// That an entity was erased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Erased {
    /// The entity, by the keyed hash that its events came with. Its id is known to nobody any more.
    pub entity: EntityHash,
    /// The kind; none where nothing of the entity was found.
    pub kind: Option<Arc<str>>,
    /// Which life; none where nothing of it was found.
    pub life: Option<u32>,
    /// The slot.
    pub slot: Slot,
    /// The name of the receipt.
    pub receipt: ReceiptId,
    pub(crate) number: i64,
}

/// Why a subscription cannot begin or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The checkpoint does not fit.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A shard is out of use: its events would be missing.
    #[error("shard {shard} is out of use, so that its events would be missing: {why}")]
    ShardOutOfUse {
        /// The shard.
        shard: u16,
        /// Why.
        why: String,
    },
    /// Events cannot be read for now. It is tried again by itself: call `next` again.
    #[error("events of shard {shard} cannot be read for now ({why}); it is tried again, ask for the next one")]
    Unavailable {
        /// The shard.
        shard: u16,
        /// Why.
        why: String,
    },
    /// What the node knows of erasures cannot be read.
    #[error("erasures cannot be read: {0}; ask for the next one again")]
    Erasures(#[source] kuma_shard::ReadError),
    /// The store is a node's, which has some of the cluster's slots, and others tomorrow.
    #[error(
        "this store is a node of a cluster and has a part of its events only; subscribe to all of them with Node::subscribe"
    )]
    Clustered,
    /// Events of the cluster cannot be had, or not as asked.
    #[error("events of the cluster: {why}")]
    Cluster {
        /// Why, and what to do.
        why: String,
    },
    /// The store is shutting down.
    #[error("the store is shutting down")]
    ShuttingDown,
}

/// A subscription that is being set up, see [`Kuma::subscribe`].
#[must_use = "nothing is subscribed to until it is opened"]
pub struct Subscribe {
    kuma: Kuma,
    filter: Filter,
    start: Start,
}

impl Kuma {
    /// Subscribes to the events that match `filter`. Without more they begin with the first one of the store.
    ///
    /// Register the Rust types of kinds with upcasters first ([`Kuma::register`]): an event is handed out in the shape that is current then.
    ///
    /// ```
    /// # use kuma_core::{Kuma, Options, Filter, Delivery, NewEvent, Start};
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let kuma = Kuma::start(Options::new(dir.path())).await?;
    /// # let deposited = NewEvent::json("Deposited", &serde_json::json!({"amount": 7}))?;
    /// # kuma.raw("account", "acc_001").append(deposited).await?;
    /// let mut events = kuma.subscribe(Filter::kind("account")).from(Start::Beginning).open().await?;
    /// match events.next().await? {
    ///     Delivery::Event(stored) => println!("{} of {}", stored.event.name, stored.id),
    ///     Delivery::Erased(erased) => println!("forget {}", erased.entity.to_hex()),
    ///     Delivery::Unreadable(commit) => eprintln!("{}", commit.why),
    /// }
    /// let checkpoint = events.checkpoint(); // keep it, and go on from there another time
    /// # kuma.shutdown().await;
    /// # Ok(())
    /// # }
    /// ```
    pub fn subscribe(&self, filter: Filter) -> Subscribe {
        Subscribe { kuma: self.clone(), filter, start: Start::Beginning }
    }

    /// Where the log of each shard ends.
    ///
    /// # Errors
    /// A shard is out of use.
    pub(crate) fn log_ends(&self) -> Result<Vec<u64>, SubscribeError> {
        let end = |(shard, core): (u16, Result<&Arc<crate::shard_core::ShardCore>, &str>)| match core {
            Ok(core) => Ok(*core.shard.end().borrow()),
            Err(why) => Err(SubscribeError::ShardOutOfUse { shard, why: why.to_owned() }),
        };
        self.open_shards().map(end).collect()
    }
}

impl Subscribe {
    /// Where it begins.
    pub fn from(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Begins.
    ///
    /// # Errors
    /// The checkpoint does not fit, a shard is out of use, or the store is a node's.
    pub async fn open(self) -> Result<Subscription, SubscribeError> {
        let Subscribe { kuma, filter, start } = self;
        let inner = &kuma.inner;
        if inner.is_closing() {
            return Err(SubscribeError::ShuttingDown);
        }
        if inner.is_clustered() {
            return Err(SubscribeError::Clustered);
        }
        let ends = kuma.log_ends()?;
        // Before anything is read: what is erased from here on is told.
        let told = inner.erasing().entombed();
        let erasures = *told.borrow();
        let at = |positions, since_us| Checkpoint { disk_id: inner.disk_id(), positions, erasures, since_us };
        let checkpoint = match start {
            Start::Beginning => at(vec![0; ends.len()], EVER),
            Start::Now => at(ends, EVER),
            Start::Time(time) => at(vec![0; ends.len()], micros(time)),
            Start::Checkpoint(checkpoint) => {
                checkpoint.check(inner.disk_id(), &ends)?;
                checkpoint
            }
        };
        Ok(Subscription::begin(kuma, Arc::new(filter), checkpoint, told))
    }
}

/// An open subscription. It ends when it is dropped.
pub struct Subscription {
    kuma: Kuma,
    filter: Arc<Filter>,
    pages: mpsc::UnboundedReceiver<Fed>,
    /// The feeds end with it.
    _feeds: JoinSet<()>,
    /// Of what was handed out.
    checkpoint: Checkpoint,
    current: Option<Current>,
    told: watch::Receiver<i64>,
    /// Whether there may be tombstones that were not read yet.
    untold: bool,
    notices: VecDeque<Erased>,
    /// The lives that were told to be erased while others of their entities were on their way.
    told_keys: HashSet<[u8; 16]>,
    /// Whether those among them are known that had been told before it began, or that lie before its beginning.
    told_before: bool,
}

/// A page that is being handed out.
struct Current {
    page: FeedPage,
    /// The position of the commit of which something was handed out last.
    at: u64,
    items: vec::IntoIter<FeedItem>,
    commit: Option<CommitRest>,
    settled: bool,
}

/// What is left of a commit.
struct CommitRest {
    life: Arc<EntityRow>,
    position: u64,
    events: vec::IntoIter<StoredEvent>,
}

impl Subscription {
    pub(crate) fn begin(kuma: Kuma, filter: Arc<Filter>, checkpoint: Checkpoint, told: watch::Receiver<i64>) -> Self {
        let (sender, pages) = mpsc::unbounded_channel();
        let mut feeds = JoinSet::new();
        for ((_, core), after) in kuma.open_shards().zip(&checkpoint.positions) {
            let Ok(core) = core else { continue };
            let sender = sender.clone();
            // What bounds the channel.
            let room = Arc::new(Semaphore::new(PAGES_AHEAD));
            let from = FeedFrom { filter: filter.clone(), after: *after, since_us: checkpoint.since_us };
            let take = move |fed| sender.send(fed).is_ok();
            feeds.spawn(feed(Arc::downgrade(&kuma.inner), core.clone(), from, room, take));
        }
        Subscription {
            kuma,
            filter,
            pages,
            _feeds: feeds,
            checkpoint,
            current: None,
            told,
            untold: true,
            notices: VecDeque::new(),
            told_keys: HashSet::new(),
            told_before: false,
        }
    }

    /// The next event, or that an entity was erased; waits until there is one.
    ///
    /// # Errors
    /// It can be called again, except when the store is shutting down.
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub async fn next(&mut self) -> Result<Delivery, SubscribeError> {
        loop {
            if let Some(delivery) = self.ready().await? {
                return Ok(delivery);
            }
            self.wait().await?;
        }
    }

    /// The next one of those that were committed before this was called; none when all of them were handed out.
    ///
    /// # Errors
    /// As [`Subscription::next`].
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub async fn next_of_now(&mut self) -> Result<Option<Delivery>, SubscribeError> {
        let ends = self.kuma.log_ends()?;
        loop {
            if let Some(delivery) = self.ready().await? {
                return Ok(Some(delivery));
            }
            let is_there = self.checkpoint.positions.iter().zip(&ends).all(|(position, end)| position >= end);
            if self.current.is_none() && is_there {
                return Ok(None);
            }
            self.wait().await?;
        }
    }

    /// Everything that can be handed out without waiting, at most some hundred commits; waits until there is something.
    ///
    /// # Errors
    /// As [`Subscription::next`].
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub async fn next_page(&mut self) -> Result<Vec<Delivery>, SubscribeError> {
        let first = self.next().await?;
        // No more waiting from here on.
        let mut page = Vec::with_capacity(1 + self.current.as_ref().map_or(0, |current| current.items.len()));
        page.push(first);
        while let Some(current) = self.current.as_mut().filter(|current| current.settled && !current.page.is_stale()) {
            match current.next() {
                Some((delivery, position)) => {
                    page.push(delivery);
                    self.pass(position);
                }
                None => self.use_up(),
            }
        }
        Ok(page)
    }

    /// All that follows, as a stream. It ends when the store shuts down.
    pub fn into_stream(self) -> impl Stream<Item = Result<Delivery, SubscribeError>> + Send {
        stream::unfold(self, |mut subscription| async {
            match subscription.next().await {
                Err(SubscribeError::ShuttingDown) => None,
                next => Some((next, subscription)),
            }
        })
    }

    /// Waits until there may be something to hand out.
    async fn wait(&mut self) -> Result<(), SubscribeError> {
        if self.current.is_some() {
            // Undecided.
            let _ = tokio::time::timeout(UNDECIDED_WAIT, self.told.changed()).await;
            self.untold = true;
            return Ok(());
        }
        tokio::select! {
            fed = self.pages.recv() => match fed {
                Some(Fed::Page(page)) => self.take(page),
                Some(Fed::Trouble { shard, why }) => return Err(SubscribeError::Unavailable { shard, why }),
                None => return Err(SubscribeError::ShuttingDown),
            },
            _ = self.told.changed() => self.untold = true,
        }
        Ok(())
    }

    /// How far what was handed out reaches: go on from there with [`Start::Checkpoint`]. Of a commit that was handed out in part, all is
    /// handed out again.
    pub fn checkpoint(&self) -> Checkpoint {
        self.checkpoint.clone()
    }

    /// How many commits are behind what was handed out, wanted or not.
    pub fn behind(&self) -> u64 {
        let ends = self.kuma.log_ends().unwrap_or_default();
        ends.iter().zip(&self.checkpoint.positions).map(|(end, position)| end.saturating_sub(*position)).sum()
    }

    /// The shard and the position of the commit of which something was handed out last.
    pub(crate) fn last_place(&self) -> Option<(u16, u64)> {
        self.current.as_ref().map(|current| (current.page.core.shard.number(), current.at))
    }

    fn take(&mut self, mut page: FeedPage) {
        // What is erased meanwhile is told first.
        self.untold |= self.told.has_changed().unwrap_or(false);
        let items = std::mem::take(&mut page.items);
        self.current = Some(Current { page, at: 0, items: items.into_iter(), commit: None, settled: false });
    }

    /// What can be handed out now.
    async fn ready(&mut self) -> Result<Option<Delivery>, SubscribeError> {
        match self.look().await {
            // Files that are closed, and lives of which it will not be decided any more, are for nobody to wait for.
            Err(_) if self.kuma.inner.is_closing() => Err(SubscribeError::ShuttingDown),
            Ok(None) if self.current.is_some() && self.kuma.inner.is_closing() => Err(SubscribeError::ShuttingDown),
            ready => ready,
        }
    }

    async fn look(&mut self) -> Result<Option<Delivery>, SubscribeError> {
        loop {
            self.learn_told_before().await?;
            self.learn_erasures().await?;
            if let Some(erased) = self.notices.pop_front() {
                self.checkpoint.erasures = erased.number;
                return Ok(Some(Delivery::Erased(erased)));
            }
            let Some(current) = &mut self.current else { return Ok(None) };
            if (!current.settled || current.page.is_stale())
                && current.settle(&self.told_keys).await.map_err(SubscribeError::Erasures)? == Standing::Undecided
            {
                return Ok(None);
            }
            // A tombstone that came while the page was looked at.
            if self.told.has_changed().unwrap_or(false) {
                self.told.mark_unchanged();
                self.untold = true;
                continue;
            }
            match current.next() {
                Some((delivery, position)) => {
                    self.pass(position);
                    return Ok(Some(delivery));
                }
                None => {
                    self.use_up();
                    return Ok(None);
                }
            }
        }
    }

    /// A commit was handed out to its end.
    fn pass(&mut self, position: Option<u64>) {
        if let (Some(position), Some(current)) = (position, &self.current) {
            let shard = usize::from(current.page.core.shard.number());
            if let Some(at) = self.checkpoint.positions.get_mut(shard) {
                *at = position;
            }
        }
    }

    fn use_up(&mut self) {
        let last = self.current.as_ref().map(|current| current.page.last);
        self.pass(last);
        self.current = None;
    }

    /// Finds out which of the lives that are on their way out are not to be told any more: nothing of a next life waits for that.
    async fn learn_told_before(&mut self) -> Result<(), SubscribeError> {
        if self.told_before {
            return Ok(());
        }
        for key_id in self.kuma.inner.erasing().all() {
            let number = self.kuma.inner.node().tombstone_number(key_id).await.map_err(SubscribeError::Erasures)?;
            if number.is_some_and(|number| number <= self.checkpoint.erasures) {
                self.told_keys.insert(key_id);
            }
        }
        self.told_before = true;
        Ok(())
    }

    /// Reads tombstones that came since.
    async fn learn_erasures(&mut self) -> Result<(), SubscribeError> {
        while self.untold && self.notices.is_empty() {
            let page = self.kuma.inner.node().tombstones(self.checkpoint.erasures, TOMBSTONES_MAX).await;
            let mut page = page.map_err(SubscribeError::Erasures)?;
            let told = *self.told.borrow();
            page.retain(|(number, _)| *number <= told);
            let mut notices = VecDeque::with_capacity(page.len());
            for (number, tombstone) in &page {
                let erased = erased(&self.kuma.inner, *number, tombstone).await?;
                // Whose kind is not known may have been wanted.
                if erased.kind.as_deref().is_none_or(|kind| self.filter.matches_kind(kind)) {
                    notices.push_back(erased);
                }
            }
            let is_last = page.len() < TOMBSTONES_MAX as usize;
            let erasing = self.kuma.inner.erasing();
            self.told_keys.retain(|key_id| erasing.fate(*key_id).is_some());
            self.told_keys.extend(
                page.iter().map(|(_, tombstone)| tombstone.key_id).filter(|key_id| erasing.fate(*key_id).is_some()),
            );
            if let Some((number, _)) = page.last().filter(|_| notices.is_empty()) {
                self.checkpoint.erasures = *number;
            }
            self.notices = notices;
            if is_last {
                self.untold = false;
            }
        }
        Ok(())
    }
}

/// What a tombstone says to subscribers.
pub(crate) async fn erased(inner: &Inner, number: i64, tombstone: &Tombstone) -> Result<Erased, SubscribeError> {
    let Tombstone { key_id, id_hash, slot, receipt_id, .. } = *tombstone;
    let life = match inner.core_of_slot(slot) {
        Some(core) => {
            let lives = core.shard.lives(CopyId::LIVE, id_hash).await.map_err(SubscribeError::Erasures)?;
            lives.into_iter().find(|life| life.key_id == key_id)
        }
        None => None,
    };
    let (kind, life) = life.map(|life| (life.kind, life.life)).unzip();
    Ok(Erased { entity: id_hash, kind, life, slot, receipt: ReceiptId(receipt_id), number })
}

impl Current {
    /// Takes out what was erased since.
    async fn settle(&mut self, told: &HashSet<[u8; 16]>) -> Result<Standing, kuma_shard::ReadError> {
        // Back where they are looked at, with what is left of a commit; nothing is lost should this be given up in the middle.
        let rest =
            self.commit.take().filter(|commit| commit.events.len() > 0).map(|CommitRest { life, position, events }| {
                FeedItem::Commit(FeedCommit { life, position, events: events.collect() })
            });
        self.page.items.extend(rest.into_iter().chain(std::mem::take(&mut self.items)));
        let standing = self.page.settle(|key_id| told.contains(key_id)).await?;
        self.items = std::mem::take(&mut self.page.items).into_iter();
        self.settled = standing == Standing::Settled;
        Ok(standing)
    }

    /// The next delivery; and the position of its commit, if that ends with it.
    fn next(&mut self) -> Option<(Delivery, Option<u64>)> {
        loop {
            if let Some(commit) = &mut self.commit {
                if let Some(event) = commit.events.next() {
                    self.at = commit.position;
                    let position = (commit.events.len() == 0).then_some(commit.position);
                    return Some((Delivery::Event(event), position));
                }
                self.commit = None;
            }
            match self.items.next()? {
                FeedItem::Unreadable { position, unreadable } => {
                    return Some((Delivery::Unreadable(unreadable), Some(position)));
                }
                FeedItem::Commit(FeedCommit { life, position, events }) => {
                    self.commit = Some(CommitRest { life, position, events: events.into_iter() });
                }
            }
        }
    }
}
