//! Durable subscriptions: named, with a checkpoint that the store keeps, and a place for events that their consumer cannot handle.
//!
//! ```text
//!          ┌──────────── not acknowledged: comes again ─────────────┐
//! events ──┴─► next() ──► the consumer ──ack()──► checkpoint        │
//!                 ▲            └──park(why)──► parked ──replay_parked()──┐
//!                 └──────────────────────────────────────────────────────┘
//! ```
//!
//! Invariants:
//! - What was handed out and not acknowledged is handed out again, to whoever consumes next. What was acknowledged is not, once that is durable;
//!   of a commit that was acknowledged in part, all is handed out again.
//! - One consumer at a time: the newest. Those before it are told, and acknowledge nothing any more.
//! - A parked event is kept by its place in the log, never as a copy; it goes with its entity.
//! - An erasure is confirmed by acknowledging it. Receipts say who has not confirmed yet.
//!
//! On a node of a cluster the events are those of all nodes, and whatever speaks of shards and positions here is of slots and seqs
//! (docs/adr/0029-durable-subscriptions-of-a-cluster.md).
//!
//! The file of a subscription is that of a model without tables of a projection: positions and what goes with them are one transaction.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
    vec,
};

use futures_util::future::join_all;
use kuma_shard::{Acknowledged, EntityHash, ModelError, ParkedRow, Purged, ReadError, SLOTS, Slot, SubscriberFile};
use parking_lot::Mutex;
use ractor::ActorRef;
use tokio::sync::{oneshot, watch};

use crate::{
    Checkpoint, Delivery, Filter, Kuma, Start, StoredEvent, SubscribeError, Subscription, Unreadable,
    checkpoint::EVER,
    cluster_logs::{ClusterEvents, ClusterLogs, ClusterPlace, FollowFrom},
    erasure::EraserMessage,
    feed::{FeedItem, read_one},
    micros,
    model_page::MARK,
    model_query::lag_behind,
    projection::is_name,
    slot_feed::FedItem,
    store::Inner,
};

/// Under this name the data directory holds the files of subscriptions.
const SUBSCRIPTIONS: &str = "subscriptions";
/// In the place of a version: the commit cannot be read, and is parked as a whole.
const WHOLE_COMMIT: u64 = 0;
/// What is parked with more words than these is not a reason any more.
const WHY_BYTES_MAX: usize = 4096;
/// Belongs to nobody known, and is not erased with anybody.
const NOBODY: EntityHash = EntityHash([0; 16]);
/// What a file says whose positions are seqs of slots.
const REACH: &str = "reach";
const CLUSTER: &str = "cluster";
/// When something was acknowledged last, in a cluster.
const ACKNOWLEDGED_AT: &str = "acknowledged_at";

/// Why a durable subscription does not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DurableError {
    /// The stream of events.
    #[error(transparent)]
    Subscribe(#[from] SubscribeError),
    /// Its name cannot be one.
    #[error("{name:?} cannot name a subscription: lower-case letters, digits and _, at most 64, a letter first")]
    Name {
        /// What it was to be called.
        name: String,
    },
    /// It exists with another filter.
    #[error("subscription {name} was made for other events; use another name, or drop it and make it anew")]
    OtherFilter {
        /// The subscription.
        name: String,
    },
    /// Somebody else consumes it now.
    #[error("subscription {name} is consumed by somebody else now; what was not acknowledged goes there")]
    Superseded {
        /// The subscription.
        name: String,
    },
    /// There is no such subscription.
    #[error("there is no subscription {name}")]
    Unknown {
        /// What it was called.
        name: String,
    },
    /// There is nothing to park.
    #[error("what was handed out last is no event and no commit; nothing else is parked")]
    NothingToPark,
    /// Its file cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The directory of its file cannot be used.
    #[error("the file of subscription {name}: {source}")]
    File {
        /// The subscription.
        name: String,
        /// Why.
        source: std::io::Error,
    },
}

/// An event that was parked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parked {
    /// Its number among those of the subscription.
    pub number: i64,
    /// The entity.
    pub entity: EntityHash,
    /// The entity's version that the event made; 0 for a commit that could not be read.
    pub version: u64,
    /// How often it was parked.
    pub attempts: u32,
    /// When it was parked last.
    pub at: SystemTime,
    /// Why, in the consumer's words.
    pub why: String,
    shard: u16,
    position: u64,
}

/// A durable subscription as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscriptionStatus {
    /// The subscription.
    pub name: String,
    /// What it is about.
    pub filter: Filter,
    /// Whether somebody consumes it.
    pub is_consumed: bool,
    /// The age of the oldest event that is not acknowledged. On a node of a cluster: how long ago something was acknowledged last, while
    /// something is not. None while a node cannot be asked.
    pub lag: Option<Duration>,
    /// Commits that are not acknowledged, wanted or not. None while a node of the cluster cannot be asked.
    pub commits_behind: Option<u64>,
    /// Events that are parked.
    pub parked: u64,
}

/// All durable subscriptions of a store.
#[derive(Default)]
pub(crate) struct DurableSubscriptions {
    open: tokio::sync::Mutex<BTreeMap<String, Arc<Shared>>>,
}

/// What consumers of one subscription share, and the eraser.
struct Shared {
    name: String,
    filter: Filter,
    since_us: i64,
    /// None once it is closed.
    file: Mutex<Option<SubscriberFile>>,
    /// The number of the newest consumer.
    consumer: watch::Sender<u64>,
    consumers: Mutex<BTreeSet<u64>>,
    /// The number of the last tombstone that was acknowledged.
    erasures: watch::Sender<i64>,
}

/// A durable subscription that is being set up, see [`Kuma::durable_subscription`].
#[must_use = "nothing is subscribed to until it is opened"]
pub struct OpenDurable {
    kuma: Kuma,
    name: String,
    filter: Filter,
    start: Start,
}

/// The consumer of a durable subscription.
pub struct DurableSubscription {
    kuma: Kuma,
    events: Events,
    /// In a cluster: by slot, up to where everything is acknowledged.
    acknowledged: Vec<u64>,
    /// In a cluster: where the slots ended when it was asked for what there is by now.
    now: Option<Vec<u64>>,
    shared: Arc<Shared>,
    number: u64,
    _seat: Seat,
    superseded: watch::Receiver<u64>,
    /// Parked events that are to be handed out again.
    replays: VecDeque<Parked>,
    /// What is left of one that is being handed out again, with its events.
    replaying: Option<(Parked, vec::IntoIter<StoredEvent>)>,
    /// Numbers of those that were handed out again and are not acknowledged yet.
    replayed: Vec<i64>,
    last: Option<Last>,
}

/// That there is a consumer, for as long as it is held.
struct Seat {
    shared: Arc<Shared>,
    number: u64,
}

impl Seat {
    fn take(shared: &Arc<Shared>, number: u64) -> Self {
        shared.consumers.lock().insert(number);
        Seat { shared: shared.clone(), number }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.consumers.lock().remove(&self.number);
    }
}

/// Where the events come from.
enum Events {
    /// The shards of a store that is alone.
    Own(Box<Subscription>),
    /// All slots of the cluster that the store is a node of.
    Cluster(Box<dyn ClusterEvents>),
}

/// How far what a consumer was handed out reaches, for [`DurableSubscription::ack_to`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DurableCheckpoint(Reached);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Reached {
    Own(Checkpoint),
    Cluster { place: ClusterPlace, erasures: i64 },
}

impl Events {
    async fn next(&mut self) -> Result<Delivery, SubscribeError> {
        match self {
            Events::Own(subscription) => subscription.next().await,
            Events::Cluster(events) => events.next().await,
        }
    }

    fn reached(&self) -> DurableCheckpoint {
        DurableCheckpoint(match self {
            Events::Own(subscription) => Reached::Own(subscription.checkpoint()),
            Events::Cluster(events) => Reached::Cluster { place: events.place(), erasures: events.erasures() },
        })
    }

    fn last_place(&self) -> Option<(u16, u64)> {
        match self {
            Events::Own(subscription) => subscription.last_place(),
            Events::Cluster(events) => events.last_place().map(|(slot, seq)| (slot.number(), seq)),
        }
    }
}

/// The event that was handed out last.
struct Last {
    shard: u16,
    position: u64,
    version: u64,
    entity: EntityHash,
    /// Its number among the parked ones, if it was parked before.
    parked: Option<i64>,
}

impl Last {
    fn of(parked: &Parked) -> Self {
        let Parked { shard, position, version, entity, number, .. } = *parked;
        Last { shard, position, version, entity, parked: Some(number) }
    }
}

impl Kuma {
    /// A subscription with a name, whose checkpoint the store keeps: made when it is opened for the first time, gone on with after.
    ///
    /// ```
    /// # use kuma_core::{Kuma, Options, Filter, Delivery, NewEvent};
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let kuma = Kuma::start(Options::new(dir.path())).await?;
    /// # fn send_mail(_: &kuma_core::StoredEvent) -> Result<(), &'static str> { Ok(()) }
    /// # kuma.raw("order", "1").append(NewEvent::json("Paid", &serde_json::json!({}))?).await?;
    /// let mut mailer = kuma.durable_subscription("mailer", Filter::event("order", "Paid")).open().await?;
    /// # for _ in 0..1 {
    /// match mailer.next().await? {
    ///     Delivery::Event(stored) => match send_mail(&stored) {
    ///         Ok(()) => mailer.ack().await?,
    ///         Err(why) => mailer.park(why).await?, // kept for later; the next ones go on
    ///     },
    ///     Delivery::Erased(_) => mailer.ack().await?, // nothing is kept here: confirmed
    ///     Delivery::Unreadable(commit) => mailer.park(commit.why).await?,
    /// }
    /// # }
    /// # kuma.shutdown().await;
    /// # Ok(())
    /// # }
    /// ```
    pub fn durable_subscription(&self, name: impl Into<String>, filter: Filter) -> OpenDurable {
        OpenDurable { kuma: self.clone(), name: name.into(), filter, start: Start::Beginning }
    }

    /// The durable subscriptions, by name.
    ///
    /// # Errors
    /// A file cannot be read.
    pub async fn durable_subscriptions(&self) -> Result<Vec<SubscriptionStatus>, DurableError> {
        let mut found = Vec::new();
        let ends = match self.inner.is_clustered() {
            true => Some(ends_of_slots(&self.inner).await.ok()),
            false => None,
        };
        for name in names(self.inner.data_dir()).map_err(|source| file_error("", source))? {
            let shared = self.inner.durables().shared(&self.inner, &name).await?;
            let Some(shared) = shared else { continue };
            let parked = shared.with(|file| Ok(file.parked()?.len() as u64))?;
            let (commits_behind, lag) = match &ends {
                Some(ends) => {
                    shared.translate(self).await?;
                    let behind = shared.behind(ends.as_deref(), self.inner.now_us())?;
                    (behind.map(|behind| behind.0), behind.map(|behind| behind.1))
                }
                None => {
                    let positions = shared.with(|file| positions(file, self.open_shards().count()))?;
                    let (commits_behind, lag) = lag_behind(&self.inner, &positions).await;
                    (Some(commits_behind), Some(lag))
                }
            };
            let is_consumed = !shared.consumers.lock().is_empty();
            let filter = shared.filter.clone();
            found.push(SubscriptionStatus { name, filter, is_consumed, lag, commits_behind, parked });
        }
        Ok(found)
    }

    /// The events that a durable subscription has parked, oldest first.
    ///
    /// # Errors
    /// [`DurableError::Unknown`], or its file cannot be read.
    pub async fn parked(&self, name: &str) -> Result<Vec<Parked>, DurableError> {
        let shared = self.inner.durables().shared(&self.inner, name).await?;
        let shared = shared.ok_or_else(|| DurableError::Unknown { name: name.to_owned() })?;
        shared.with(|file| parked(file))
    }

    /// Ends a durable subscription and deletes what is kept of it. Receipts do not wait for it any more.
    ///
    /// # Errors
    /// [`DurableError::Unknown`], or its file cannot be deleted.
    pub async fn drop_durable_subscription(&self, name: &str) -> Result<(), DurableError> {
        let durables = self.inner.durables();
        let shared = durables.shared(&self.inner, name).await?;
        let shared = shared.ok_or_else(|| DurableError::Unknown { name: name.to_owned() })?;
        let confirmed = shared.with(|file| file.number("confirmed"))?;
        confirm(&self.inner, name, confirmed, i64::MAX).await;
        let mut open = durables.open.lock().await;
        open.remove(name);
        shared.consumer.send_modify(|newest| *newest += 1);
        drop(shared.file.lock().take().map(SubscriberFile::close));
        remove(self.inner.data_dir(), name)
    }
}

impl OpenDurable {
    /// Where it begins when it is opened for the first time; after that it goes on where it is. Default: [`Start::Beginning`].
    pub fn from(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Becomes the consumer. A consumer that there was before is superseded.
    ///
    /// # Errors
    /// It was made for other events, the checkpoint that it is to begin with does not fit, or its file cannot be used.
    pub async fn open(self) -> Result<DurableSubscription, DurableError> {
        let OpenDurable { kuma, name, filter, start } = self;
        let inner = kuma.inner.clone();
        if !is_name(&name) {
            return Err(DurableError::Name { name });
        }
        let durables = inner.durables();
        let shared = match durables.shared(&inner, &name).await? {
            Some(shared) => shared,
            None => durables.create(&kuma, &name, &filter, start).await?,
        };
        if shared.filter != filter {
            return Err(DurableError::OtherFilter { name });
        }
        let number = {
            let mut number = 0;
            shared.consumer.send_modify(|newest| {
                *newest += 1;
                number = *newest;
            });
            number
        };
        let seat = Seat::take(&shared, number);
        let mut superseded = shared.consumer.subscribe();
        superseded.mark_unchanged();
        let (events, acknowledged, confirmed) = shared.begin(&kuma).await?;
        let erasures = *shared.erasures.borrow();
        if confirmed < erasures {
            // The store was closed in between.
            shared.clone().confirm(&kuma, confirmed, erasures);
        }
        let (replays, replaying, replayed, last) = (VecDeque::new(), None, Vec::new(), None);
        Ok(DurableSubscription {
            kuma,
            events,
            acknowledged,
            now: None,
            shared,
            number,
            _seat: seat,
            superseded,
            replays,
            replaying,
            replayed,
            last,
        })
    }
}

impl DurableSubscription {
    /// The next event, or that an entity was erased; waits until there is one.
    ///
    /// # Errors
    /// [`DurableError::Superseded`] when somebody else became the consumer. It can be called again after the other ones, except when the store
    /// is shutting down.
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub async fn next(&mut self) -> Result<Delivery, DurableError> {
        if let Some(replayed) = self.next_replayed().await? {
            return Ok(replayed);
        }
        let delivery = tokio::select! {
            delivery = self.events.next() => delivery?,
            _ = self.superseded.changed() => return Err(self.superseded_error()),
        };
        self.note(&delivery);
        Ok(delivery)
    }

    /// The next one of those that were committed before this was called, or are to be handed out again; none when all of them were handed out.
    /// On a node of a cluster: before it was called for the first time since it was opened or has last said none. Every owner must be in reach then.
    ///
    /// # Errors
    /// As [`DurableSubscription::next`].
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub async fn next_of_now(&mut self) -> Result<Option<Delivery>, DurableError> {
        if let Some(replayed) = self.next_replayed().await? {
            return Ok(Some(replayed));
        }
        let of_now = async {
            match &mut self.events {
                Events::Own(subscription) => subscription.next_of_now().await,
                Events::Cluster(events) => {
                    let ends = match &mut self.now {
                        Some(ends) => ends,
                        now => now.insert(ends_of_slots(&self.kuma.inner).await?),
                    };
                    events.next_before(ends).await
                }
            }
        };
        let delivery = tokio::select! {
            delivery = of_now => delivery?,
            _ = self.superseded.changed() => return Err(self.superseded_error()),
        };
        match &delivery {
            Some(delivery) => self.note(delivery),
            None => self.now = None,
        }
        Ok(delivery)
    }

    /// The next one of the parked events that are to be handed out again.
    async fn next_replayed(&mut self) -> Result<Option<Delivery>, DurableError> {
        self.check()?;
        loop {
            if let Some((parked, events)) = &mut self.replaying {
                let stored = events.next();
                self.last = stored.is_some().then(|| Last::of(parked));
                if events.len() == 0 {
                    self.replayed.push(parked.number);
                    self.replaying = None;
                }
                if let Some(stored) = stored {
                    return Ok(Some(Delivery::Event(stored)));
                }
            }
            let Some(parked) = self.replays.front().cloned() else { return Ok(None) };
            let read = self.read_parked(&parked).await?;
            self.replays.pop_front();
            match read {
                Some(Ok(mut events)) => {
                    events.retain(|stored| parked.version == WHOLE_COMMIT || stored.event.version.0 == parked.version);
                    self.replaying = Some((parked, events.into_iter()));
                }
                Some(Err(unreadable)) => {
                    self.last = Some(Last::of(&parked));
                    self.replayed.push(parked.number);
                    return Ok(Some(Delivery::Unreadable(unreadable)));
                }
                // It was erased.
                None => self.replayed.push(parked.number),
            }
        }
    }

    /// The events of the commit of a parked one, or why they cannot be read; none if they are erased.
    async fn read_parked(
        &self,
        parked: &Parked,
    ) -> Result<Option<Result<Vec<StoredEvent>, Unreadable>>, SubscribeError> {
        let Parked { shard, position, entity, .. } = *parked;
        let (inner, filter) = (&self.kuma.inner, &self.shared.filter);
        match &self.events {
            Events::Own(_) => {
                let read = read_one(inner, filter, shard, position).await;
                let read = read.map_err(|why| SubscribeError::Unavailable { shard, why })?;
                Ok(read.map(|item| match item {
                    FeedItem::Commit(commit) => Ok(commit.events),
                    FeedItem::Unreadable { unreadable, .. } => Err(unreadable),
                }))
            }
            // It has no entity or no place by which it could be found.
            Events::Cluster(_) if entity == NOBODY || shard >= SLOTS => {
                let why = parked.why.clone();
                Ok(Some(Err(Unreadable { shard, position, entity: None, version: None, why })))
            }
            Events::Cluster(_) => {
                let slot = Slot::new(shard.into());
                let read = logs(inner)?.commit(filter.clone(), slot, position, entity).await?;
                Ok(read.map(|item| match item {
                    FedItem::Commit(commit) => Ok(commit.into_events().collect()),
                    FedItem::Unreadable(_, unreadable) => Err(unreadable),
                }))
            }
        }
    }

    /// Remembers what was handed out last: that is what can be parked.
    fn note(&mut self, delivery: &Delivery) {
        self.last = match (delivery, self.events.last_place()) {
            (Delivery::Event(stored), Some((shard, position))) => {
                let (version, entity) = (stored.event.version.0, stored.entity);
                Some(Last { shard, position, version, entity, parked: None })
            }
            (Delivery::Unreadable(Unreadable { shard, position, entity, .. }), place) => {
                let entity = entity.unwrap_or(NOBODY);
                let (shard, position) = match &self.events {
                    Events::Own(_) => (*shard, *position),
                    // What has no place is named by where it is, behind all slots.
                    Events::Cluster(_) => place.unwrap_or((SLOTS.saturating_add(1).saturating_add(*shard), *position)),
                };
                Some(Last { shard, position, version: WHOLE_COMMIT, entity, parked: None })
            }
            _ => None,
        };
    }

    /// Acknowledges everything that was handed out; durable when it returns.
    ///
    /// # Errors
    /// [`DurableError::Superseded`], or the file cannot be written. What was handed out may be handed out again then.
    /// # Cancel safety
    /// If the future is dropped it may or may not be acknowledged.
    pub async fn ack(&mut self) -> Result<(), DurableError> {
        let checkpoint = self.events.reached();
        self.commit(checkpoint, None).await
    }

    /// Acknowledges what was handed out up to a checkpoint of this consumer, for consumers that work on several events at a time.
    ///
    /// # Errors
    /// As [`DurableSubscription::ack`].
    pub async fn ack_to(&mut self, checkpoint: &DurableCheckpoint) -> Result<(), DurableError> {
        self.commit(checkpoint.clone(), None).await
    }

    /// How far what was handed out reaches, for [`DurableSubscription::ack_to`].
    pub fn checkpoint(&self) -> DurableCheckpoint {
        self.events.reached()
    }

    /// Parks the event, or the commit that cannot be read, that was handed out last, and acknowledges everything that was handed out before it. Do not put anything personal in
    /// `why`; it is deleted when the entity is erased all the same.
    ///
    /// # Errors
    /// [`DurableError::NothingToPark`] if what was handed out last is not an event; otherwise as [`DurableSubscription::ack`].
    pub async fn park(&mut self, why: impl Into<String>) -> Result<(), DurableError> {
        let mut why = why.into();
        let mut end = WHY_BYTES_MAX.min(why.len());
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        why.truncate(end);
        let last = self.last.take().ok_or(DurableError::NothingToPark)?;
        let checkpoint = self.events.reached();
        let at_us = self.kuma.inner.now_us();
        let Last { shard, position, version, entity, parked } = last;
        let number = parked.unwrap_or_default();
        let row = ParkedRow { number, shard, position, version, entity, attempts: 1, at_us, why };
        self.commit(checkpoint, Some(row)).await
    }

    /// Has parked events handed out again, oldest first, before others; returns how many. They are no longer parked once they are acknowledged.
    ///
    /// # Errors
    /// [`DurableError::Superseded`], or the file cannot be read.
    pub async fn replay_parked(&mut self) -> Result<usize, DurableError> {
        self.check()?;
        let parked = self.shared.with(|file| parked(file))?;
        let on_their_way = |parked: &Parked| {
            self.replayed.contains(&parked.number) || self.replays.iter().any(|replay| replay.number == parked.number)
        };
        let before = self.replays.len();
        let more: Vec<Parked> = parked.into_iter().filter(|parked| !on_their_way(parked)).collect();
        self.replays.extend(more);
        Ok(self.replays.len() - before)
    }

    /// Goes back to what was acknowledged last: what came after it is handed out again.
    ///
    /// # Errors
    /// [`DurableError::Superseded`], or the file cannot be read.
    pub async fn redeliver(&mut self) -> Result<(), DurableError> {
        self.check()?;
        (self.events, self.acknowledged, _) = self.shared.begin(&self.kuma).await?;
        (self.last, self.now) = (None, None);
        self.replays.clear();
        self.replaying = None;
        self.replayed.clear();
        Ok(())
    }

    fn check(&self) -> Result<(), DurableError> {
        match *self.shared.consumer.borrow() == self.number {
            true => Ok(()),
            false => Err(self.superseded_error()),
        }
    }

    fn superseded_error(&self) -> DurableError {
        DurableError::Superseded { name: self.shared.name.clone() }
    }

    async fn commit(&mut self, checkpoint: DurableCheckpoint, parked: Option<ParkedRow>) -> Result<(), DurableError> {
        self.check()?;
        let (positions, erasures, meta): (BTreeMap<u16, u64>, _, _) = match checkpoint.0 {
            Reached::Own(Checkpoint { positions, erasures, .. }) => {
                ((0..).zip(positions).collect(), erasures, Vec::new())
            }
            Reached::Cluster { place: ClusterPlace { seqs, mark }, erasures } => {
                let news = (0..).zip(seqs).zip(&self.acknowledged).filter(|((_, seq), before)| seq > before);
                let at = (ACKNOWLEDGED_AT, self.kuma.inner.now_us().to_string());
                (
                    news.map(|(at, _)| at).collect(),
                    erasures,
                    mark.map(|mark| (MARK, mark)).into_iter().chain([at]).collect(),
                )
            }
        };
        let mut resolved = self.replayed.clone();
        // What is parked once more stays.
        let stays = parked.as_ref().map(|row| row.number);
        resolved.retain(|number| Some(*number) != stays);
        let acknowledged = Acknowledged { positions: positions.clone(), erasures, resolved, parked, meta };
        let (shared, number) = (self.shared.clone(), self.number);
        let committed = tokio::task::spawn_blocking(move || {
            shared.with(|file| {
                // Decided where it is written: a newer consumer has read what is there by then, or will.
                if *shared.consumer.borrow() != number {
                    return Ok(false);
                }
                file.acknowledge(&acknowledged).map(|()| true)
            })
        });
        let committed = committed.await.map_err(|_| SubscribeError::ShuttingDown)?;
        if !committed? {
            return Err(self.superseded_error());
        }
        self.replayed.clear();
        for (log, seq) in positions {
            // Of a store that is alone nothing is kept.
            if let Some(at) = self.acknowledged.get_mut(usize::from(log)) {
                *at = seq;
            }
        }
        let before = self.shared.erasures.send_replace(erasures);
        if before < erasures {
            self.shared.clone().confirm(&self.kuma, before, erasures);
        }
        Ok(())
    }
}

fn parked(file: &SubscriberFile) -> Result<Vec<Parked>, ModelError> {
    let parked = |row: ParkedRow| Parked {
        number: row.number,
        entity: row.entity,
        version: row.version,
        attempts: row.attempts,
        at: UNIX_EPOCH + Duration::from_micros(row.at_us.max(0).unsigned_abs()),
        why: row.why,
        shard: row.shard,
        position: row.position,
    };
    Ok(file.parked()?.into_iter().map(parked).collect())
}

fn positions(file: &SubscriberFile, shards: usize) -> Result<Vec<u64>, ModelError> {
    let mut positions = vec![0; shards];
    for (shard, position) in file.positions()? {
        if let Some(at) = positions.get_mut(usize::from(shard)) {
            *at = position;
        }
    }
    Ok(positions)
}

impl Shared {
    /// Does something with the file.
    fn with<T>(&self, work: impl FnOnce(&mut SubscriberFile) -> Result<T, ModelError>) -> Result<T, DurableError> {
        match self.file.lock().as_mut() {
            Some(file) => Ok(work(file)?),
            None => Err(SubscribeError::ShuttingDown.into()),
        }
    }

    /// Has receipts say that erasures are confirmed. Nobody waits for that.
    fn confirm(self: Arc<Self>, kuma: &Kuma, after: i64, last: i64) {
        let inner = kuma.inner.clone();
        tokio::spawn(async move {
            confirm(&inner, &self.name, after, last).await;
            // Otherwise it is done again when it is opened.
            let _ = self.with(|file| file.set_confirmed(last));
        });
    }

    /// Begins behind what was acknowledged. Also tells, in a cluster, what that is by slot; and which erasures are confirmed.
    async fn begin(&self, kuma: &Kuma) -> Result<(Events, Vec<u64>, i64), DurableError> {
        match kuma.inner.is_clustered() {
            true => self.begin_in_cluster(kuma).await,
            false => self.begin_alone(kuma).map(|(events, confirmed)| (events, Vec::new(), confirmed)),
        }
    }

    async fn begin_in_cluster(&self, kuma: &Kuma) -> Result<(Events, Vec<u64>, i64), DurableError> {
        let logs = logs(&kuma.inner)?;
        self.translate(kuma).await?;
        let (seqs, mark, erasures, confirmed) = self.with(|file| {
            let seqs = positions(file, usize::from(SLOTS))?;
            Ok((seqs, file.meta(MARK)?, file.number("erasures")?, file.number("confirmed")?))
        })?;
        let place = ClusterPlace { seqs: seqs.clone(), mark };
        let from = FollowFrom { place, erasures, since_us: self.since_us };
        Ok((Events::Cluster(logs.follow(self.filter.clone(), from).await?), seqs, confirmed))
    }

    /// Has the file of a store that was alone speak of slots and seqs. Those are in the rows at the old positions, wherever their slots are now.
    async fn translate(&self, kuma: &Kuma) -> Result<(), DurableError> {
        let shards = kuma.open_shards().count();
        let before = self.with(|file| match file.meta(REACH)? {
            Some(_) => Ok(None),
            None => Ok(Some((positions(file, shards)?, file.parked()?))),
        })?;
        let Some((before, rows)) = before else { return Ok(()) };
        let failed = |shard| move |error: ReadError| SubscribeError::Unavailable { shard, why: error.to_string() };
        let (mut seqs, mut parked) = (vec![0; usize::from(SLOTS)], BTreeMap::new());
        for ((shard, core), position) in kuma.open_shards().zip(before) {
            let core = core.map_err(|why| SubscribeError::ShardOutOfUse { shard, why: why.to_owned() })?;
            for (slot, seq) in core.shard.seqs_at(position).await.map_err(failed(shard))? {
                if let Some(at) = seqs.get_mut(usize::from(slot.number())) {
                    *at = seq;
                }
            }
            for row in rows.iter().filter(|row| row.shard == shard) {
                if let Some((slot, seq)) = core.shard.place_at(row.position).await.map_err(failed(shard))? {
                    parked.insert(row.number, (slot.number(), seq));
                }
            }
        }
        let meta = vec![(REACH, CLUSTER.to_owned()), (ACKNOWLEDGED_AT, kuma.inner.now_us().to_string())];
        let acknowledged = Acknowledged { positions: (0..).zip(seqs).collect(), meta, ..Acknowledged::default() };
        // Whoever else does it is faster or slower, and both find the same.
        self.with(|file| match file.meta(REACH)? {
            Some(_) => Ok(()),
            None => file.translate(&acknowledged, &parked),
        })
    }

    /// How many commits of a cluster, whose slots end at `ends`, are not acknowledged, and since when; none where that is not known.
    fn behind(&self, ends: Option<&[u64]>, now_us: i64) -> Result<Option<(u64, Duration)>, DurableError> {
        let (seqs, at_us) =
            self.with(|file| Ok((positions(file, usize::from(SLOTS))?, file.number(ACKNOWLEDGED_AT)?)))?;
        let behind = |ends: &[u64]| ends.iter().zip(&seqs).map(|(end, seq)| end.saturating_sub(*seq)).sum();
        let lag = Duration::from_micros(now_us.saturating_sub(at_us).max(0).unsigned_abs());
        Ok(ends.map(behind).map(|behind| (behind, if behind == 0 { Duration::ZERO } else { lag })))
    }

    fn begin_alone(&self, kuma: &Kuma) -> Result<(Events, i64), DurableError> {
        let ends = kuma.log_ends()?;
        let told = kuma.inner.erasing().entombed();
        let (positions, erasures, confirmed) =
            self.with(|file| Ok((positions(file, ends.len())?, file.number("erasures")?, file.number("confirmed")?)))?;
        let checkpoint = Checkpoint { disk_id: kuma.inner.disk_id(), positions, erasures, since_us: self.since_us };
        checkpoint.check(kuma.inner.disk_id(), &ends).map_err(SubscribeError::from)?;
        let filter = Arc::new(self.filter.clone());
        let subscription = Subscription::begin(kuma.clone(), filter, checkpoint, told);
        Ok((Events::Own(Box::new(subscription)), confirmed))
    }
}

/// The logs of the cluster that the store is a node of.
fn logs(inner: &Inner) -> Result<Arc<dyn ClusterLogs>, SubscribeError> {
    let starting = || SubscribeError::Cluster { why: "the node is starting; try again".to_owned() };
    inner.cluster_logs().cloned().ok_or_else(starting)
}

/// Where the logs of all slots of the cluster end.
async fn ends_of_slots(inner: &Inner) -> Result<Vec<u64>, SubscribeError> {
    logs(inner)?.ends().await.map_err(|why| SubscribeError::Cluster { why })
}

fn directory(data_dir: &Path) -> PathBuf {
    data_dir.join(SUBSCRIPTIONS)
}

fn file_error(name: &str, source: std::io::Error) -> DurableError {
    DurableError::File { name: name.to_owned(), source }
}

/// Deletes the file of a subscription, with its log.
fn remove(data_dir: &Path, name: &str) -> Result<(), DurableError> {
    for suffix in [".db-wal", ".db-shm", ".db"] {
        match std::fs::remove_file(directory(data_dir).join(format!("{name}{suffix}"))) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(file_error(name, source)),
            _ => {}
        }
    }
    Ok(())
}

/// The durable subscriptions that there are files of.
fn names(data_dir: &Path) -> std::io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(directory(data_dir)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        names.extend(name.strip_suffix(".db").filter(|name| is_name(name)).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

impl DurableSubscriptions {
    /// What is shared of a subscription, if it exists.
    async fn shared(&self, inner: &Arc<Inner>, name: &str) -> Result<Option<Arc<Shared>>, DurableError> {
        let mut open = self.open.lock().await;
        if let Some(shared) = open.get(name) {
            return Ok(Some(shared.clone()));
        }
        let path = directory(inner.data_dir()).join(format!("{name}.db"));
        if inner.is_closing() {
            return Err(SubscribeError::ShuttingDown.into());
        }
        if !is_name(name) || !path.try_exists().map_err(|source| file_error(name, source))? {
            return Ok(None);
        }
        let file = SubscriberFile::open(&path, inner.file_options())?;
        let shared = Arc::new(read_shared(name, &path, file, &inner.disk_id().to_string())?);
        open.insert(name.to_owned(), shared.clone());
        Ok(Some(shared))
    }

    /// Makes a subscription.
    async fn create(
        &self,
        kuma: &Kuma,
        name: &str,
        filter: &Filter,
        start: Start,
    ) -> Result<Arc<Shared>, DurableError> {
        let inner = &kuma.inner;
        let newest = *inner.erasing().entombed().borrow();
        let is_clustered = inner.is_clustered();
        let ends = match is_clustered {
            // Only for "now" all owners must be in reach.
            true if matches!(start, Start::Now) => ends_of_slots(inner).await?,
            true => vec![0; usize::from(SLOTS)],
            false => kuma.log_ends()?,
        };
        let (positions, erasures, since_us) = match start {
            Start::Beginning => (vec![0; ends.len()], newest, EVER),
            Start::Now => (ends, newest, EVER),
            Start::Time(time) => (vec![0; ends.len()], newest, micros(time)),
            Start::Checkpoint(_) if is_clustered => {
                let why = "a checkpoint of the shards of one store says nothing there; start from the beginning, from now or from a time";
                return Err(SubscribeError::Cluster { why: why.to_owned() }.into());
            }
            Start::Checkpoint(checkpoint) => {
                checkpoint.check(inner.disk_id(), &ends).map_err(SubscribeError::from)?;
                (checkpoint.positions, checkpoint.erasures, checkpoint.since_us)
            }
        };
        let mut open = self.open.lock().await;
        if let Some(shared) = open.get(name) {
            return Ok(shared.clone());
        }
        let directory = directory(inner.data_dir());
        if !directory.try_exists().map_err(|source| file_error(name, source))? {
            kuma_shard::create_directory(&directory).map_err(|source| file_error(name, source))?;
        }
        let mut meta = vec![
            ("disk_id", inner.disk_id().to_string()),
            ("filter", serde_json::to_string(filter).unwrap_or_default()),
            ("since", since_us.to_string()),
            (ACKNOWLEDGED_AT, inner.now_us().to_string()),
        ];
        if is_clustered {
            meta.push((REACH, CLUSTER.to_owned()));
        }
        // Under another name until it says where it begins: it would begin with the first event otherwise.
        let (path, temporary) = (directory.join(format!("{name}.db")), directory.join(format!("{name}.db.new")));
        for suffix in ["", "-wal", "-shm"] {
            let left = directory.join(format!("{name}.db.new{suffix}"));
            match std::fs::remove_file(left) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(file_error(name, source)),
                _ => {}
            }
        }
        let positions = (0_u16..).zip(positions).collect();
        let acknowledged = Acknowledged { positions, erasures, ..Acknowledged::default() };
        SubscriberFile::create(&temporary, inner.file_options(), &meta, &acknowledged)?;
        std::fs::rename(&temporary, &path)
            .and_then(|()| kuma_shard::sync_directory(&directory))
            .map_err(|source| file_error(name, source))?;
        let file = SubscriberFile::open(&path, inner.file_options())?;
        let shared = Arc::new(read_shared(name, &path, file, &inner.disk_id().to_string())?);
        open.insert(name.to_owned(), shared.clone());
        Ok(shared)
    }

    /// Whether there are any.
    pub(crate) fn exist(data_dir: &Path) -> Result<bool, String> {
        names(data_dir).map(|names| !names.is_empty()).map_err(|error| format!("the files of subscriptions: {error}"))
    }

    /// Deletes what is parked of these entities.
    pub(crate) async fn purge(&self, inner: &Arc<Inner>, entities: &[Purged]) -> Result<(), String> {
        for name in names(inner.data_dir()).map_err(|error| error.to_string())? {
            let shared = match self.shared(inner, &name).await {
                Ok(Some(shared)) => shared,
                Ok(None) => continue,
                Err(DurableError::Model(error @ ModelError::Foreign { .. })) => {
                    tracing::error!(subscription = name, %error, "the file of a subscription cannot be used; it is deleted, and the subscription begins anew");
                    remove(inner.data_dir(), &name).map_err(|error| error.to_string())?;
                    continue;
                }
                Err(error) => return Err(format!("subscription {name}: {error}")),
            };
            let concerned: Vec<Purged> =
                entities.iter().filter(|entity| shared.filter.matches_kind(&entity.kind)).cloned().collect();
            let purged = tokio::task::spawn_blocking(move || match concerned.is_empty() {
                true => Ok(()),
                false => shared.with(|file| file.purge(&concerned)),
            });
            match purged.await {
                Ok(purged) => purged.map_err(|error| error.to_string())?,
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }

    /// Of each erasure, given as the kind of its entity and the number of its tombstone, who has not confirmed it. Waits until `until` for those
    /// that are being consumed.
    pub(crate) async fn unconfirmed(
        &self,
        inner: &Arc<Inner>,
        erasures: &[(Arc<str>, i64)],
        until: tokio::time::Instant,
    ) -> Result<Vec<Vec<String>>, String> {
        let mut pending = vec![Vec::new(); erasures.len()];
        let names = names(inner.data_dir()).map_err(|error| error.to_string())?;
        let waiting = names.into_iter().map(async |name| {
            let Ok(Some(shared)) = self.shared(inner, &name).await else { return (name, None) };
            let wanted = erasures.iter().filter(|(kind, _)| shared.filter.matches_kind(kind));
            let last = wanted.map(|(_, number)| *number).max().unwrap_or_default();
            let mut acknowledged = shared.erasures.subscribe();
            if *acknowledged.borrow() < last && !shared.consumers.lock().is_empty() {
                // Whoever is late is pending.
                let _ = tokio::time::timeout_at(until, acknowledged.wait_for(|number| *number >= last)).await;
            }
            let acknowledged = *acknowledged.borrow();
            (name, Some((shared, acknowledged)))
        });
        for (name, shared) in join_all(waiting).await {
            for ((kind, number), pending) in erasures.iter().zip(&mut pending) {
                let is_pending = shared
                    .as_ref()
                    .is_none_or(|(shared, acknowledged)| shared.filter.matches_kind(kind) && acknowledged < number);
                if is_pending {
                    pending.push(subscriber(inner, &name));
                }
            }
        }
        Ok(pending)
    }

    /// Closes every file.
    pub(crate) async fn close(&self) {
        for shared in std::mem::take(&mut *self.open.lock().await).into_values() {
            if let Some(Err(error)) = shared.file.lock().take().map(SubscriberFile::close) {
                tracing::warn!(subscription = shared.name, %error, "the file of a subscription was not closed cleanly");
            }
        }
    }
}

fn read_shared(name: &str, path: &Path, file: SubscriberFile, disk_id: &str) -> Result<Shared, DurableError> {
    let foreign = |detail: &str| ModelError::Foreign { path: path.to_owned(), detail: detail.to_owned() };
    if file.meta("disk_id")?.as_deref() != Some(disk_id) {
        return Err(foreign("it is of another copy of the store").into());
    }
    let filter = file.meta("filter")?.and_then(|text| serde_json::from_str(&text).ok());
    let filter = filter.ok_or_else(|| foreign("it does not say what it is about"))?;
    Ok(Shared {
        name: name.to_owned(),
        filter,
        since_us: file.number("since")?,
        consumer: watch::Sender::new(0),
        consumers: Mutex::default(),
        erasures: watch::Sender::new(file.number("erasures")?),
        file: Mutex::new(Some(file)),
    })
}

/// By what receipts call it. Each node of a cluster may have one of that name.
fn subscriber(inner: &Inner, name: &str) -> String {
    match inner.is_clustered() {
        true => format!("subscription {name} at disk {}", inner.disk_id()),
        false => format!("subscription {name}"),
    }
}

/// Tells the eraser that a subscription has confirmed the erasures with these numbers; returns when their receipts say so.
async fn confirm(inner: &Arc<Inner>, name: &str, after: i64, last: i64) {
    let (done, told) = oneshot::channel();
    let message = EraserMessage::Confirmed { who: subscriber(inner, name), after, last, done };
    if inner.eraser().is_some_and(|eraser: &ActorRef<EraserMessage>| eraser.cast(message).is_ok()) {
        let _ = told.await;
    }
}
