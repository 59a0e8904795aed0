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
//! The file of a subscription is that of a model without tables of a projection: positions and what goes with them are one transaction.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
    vec,
};

use futures_util::future::join_all;
use kuma_shard::{Acknowledged, EntityHash, ModelError, ParkedRow, Purged, SubscriberFile};
use parking_lot::Mutex;
use ractor::ActorRef;
use tokio::sync::{oneshot, watch};

use crate::{
    Checkpoint, Delivery, Filter, Kuma, Start, StoredEvent, SubscribeError, Subscription, Unreadable,
    checkpoint::EVER,
    erasure::EraserMessage,
    feed::{FeedItem, read_one},
    micros,
    model_query::lag_behind,
    projection::is_name,
    store::Inner,
};

/// Under this name the data directory holds the files of subscriptions.
const SUBSCRIPTIONS: &str = "subscriptions";
/// In the place of a version: the commit cannot be read, and is parked as a whole.
const WHOLE_COMMIT: u64 = 0;
/// What is parked with more words than these is not a reason any more.
const WHY_BYTES_MAX: usize = 4096;

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
    /// The age of the oldest event that is not acknowledged.
    pub lag: Duration,
    /// Commits that are not acknowledged, wanted or not.
    pub commits_behind: u64,
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
    subscription: Subscription,
    shared: Arc<Shared>,
    number: u64,
    superseded: watch::Receiver<u64>,
    /// Parked events that are to be handed out again.
    replays: VecDeque<Parked>,
    /// What is left of one that is being handed out again, with its events.
    replaying: Option<(Parked, vec::IntoIter<StoredEvent>)>,
    /// Numbers of those that were handed out again and are not acknowledged yet.
    replayed: Vec<i64>,
    last: Option<Last>,
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
        for name in names(self.inner.data_dir()).map_err(|source| file_error("", source))? {
            let shared = self.inner.durables().shared(&self.inner, &name).await?;
            let Some(shared) = shared else { continue };
            let (parked, positions) =
                shared.with(|file| Ok((file.parked()?.len() as u64, positions(file, self.open_shards().count())?)))?;
            let (commits_behind, lag) = lag_behind(&self.inner, &positions).await;
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
        if inner.is_clustered() {
            return Err(SubscribeError::Clustered.into());
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
            shared.consumers.lock().insert(number);
            number
        };
        let mut superseded = shared.consumer.subscribe();
        superseded.mark_unchanged();
        let (subscription, confirmed) = match shared.begin(&kuma) {
            Ok(begun) => begun,
            Err(error) => {
                shared.consumers.lock().remove(&number);
                return Err(error);
            }
        };
        let acknowledged = *shared.erasures.borrow();
        if confirmed < acknowledged {
            // The store was closed in between.
            shared.clone().confirm(&kuma, confirmed, acknowledged);
        }
        let (replays, replaying, replayed, last) = (VecDeque::new(), None, Vec::new(), None);
        Ok(DurableSubscription { subscription, shared, number, superseded, replays, replaying, replayed, last })
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
            delivery = self.subscription.next() => delivery?,
            _ = self.superseded.changed() => return Err(self.superseded_error()),
        };
        self.note(&delivery);
        Ok(delivery)
    }

    /// The next one of those that were committed before this was called, or are to be handed out again; none when all of them were handed out.
    ///
    /// # Errors
    /// As [`DurableSubscription::next`].
    /// # Cancel safety
    /// Cancel safe: nothing is lost.
    pub async fn next_of_now(&mut self) -> Result<Option<Delivery>, DurableError> {
        if let Some(replayed) = self.next_replayed().await? {
            return Ok(Some(replayed));
        }
        let delivery = tokio::select! {
            delivery = self.subscription.next_of_now() => delivery?,
            _ = self.superseded.changed() => return Err(self.superseded_error()),
        };
        if let Some(delivery) = &delivery {
            self.note(delivery);
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
            let read =
                read_one(&self.subscription.kuma().inner, &self.shared.filter, parked.shard, parked.position).await;
            let read = read.map_err(|error| SubscribeError::Unavailable { shard: parked.shard, why: error })?;
            self.replays.pop_front();
            match read {
                Some(FeedItem::Commit(mut commit)) => {
                    commit
                        .events
                        .retain(|stored| parked.version == WHOLE_COMMIT || stored.event.version.0 == parked.version);
                    self.replaying = Some((parked, commit.events.into_iter()));
                }
                Some(FeedItem::Unreadable { unreadable, .. }) => {
                    self.last = Some(Last::of(&parked));
                    self.replayed.push(parked.number);
                    return Ok(Some(Delivery::Unreadable(unreadable)));
                }
                // It was erased.
                None => self.replayed.push(parked.number),
            }
        }
    }

    /// Remembers what was handed out last: that is what can be parked.
    fn note(&mut self, delivery: &Delivery) {
        self.last = match (delivery, self.subscription.last_place()) {
            (Delivery::Event(stored), Some((shard, position))) => {
                let (version, entity) = (stored.event.version.0, stored.entity);
                Some(Last { shard, position, version, entity, parked: None })
            }
            (Delivery::Unreadable(Unreadable { shard, position, entity, .. }), _) => {
                // What belongs to nobody known is not erased with anybody.
                let entity = entity.unwrap_or(EntityHash([0; 16]));
                Some(Last { shard: *shard, position: *position, version: WHOLE_COMMIT, entity, parked: None })
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
        let checkpoint = self.subscription.checkpoint();
        self.commit(checkpoint, None).await
    }

    /// Acknowledges what was handed out up to a checkpoint of this consumer, for consumers that work on several events at a time.
    ///
    /// # Errors
    /// As [`DurableSubscription::ack`].
    pub async fn ack_to(&mut self, checkpoint: &Checkpoint) -> Result<(), DurableError> {
        self.commit(checkpoint.clone(), None).await
    }

    /// How far what was handed out reaches, for [`DurableSubscription::ack_to`].
    pub fn checkpoint(&self) -> Checkpoint {
        self.subscription.checkpoint()
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
        let checkpoint = self.subscription.checkpoint();
        let at_us = self.subscription.kuma().inner.now_us();
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
        let (subscription, _) = self.shared.begin(self.subscription.kuma())?;
        self.subscription = subscription;
        self.last = None;
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

    async fn commit(&mut self, checkpoint: Checkpoint, parked: Option<ParkedRow>) -> Result<(), DurableError> {
        self.check()?;
        let Checkpoint { positions, erasures, .. } = checkpoint;
        let mut resolved = self.replayed.clone();
        // What is parked once more stays.
        let stays = parked.as_ref().map(|row| row.number);
        resolved.retain(|number| Some(*number) != stays);
        let positions = (0_u16..).zip(positions).collect();
        let acknowledged = Acknowledged { positions, erasures, resolved, parked };
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
        let before = self.shared.erasures.send_replace(erasures);
        if before < erasures {
            self.shared.clone().confirm(self.subscription.kuma(), before, erasures);
        }
        Ok(())
    }
}

impl Drop for DurableSubscription {
    fn drop(&mut self) {
        self.shared.consumers.lock().remove(&self.number);
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

    /// Begins behind what was acknowledged. Also tells which erasures are confirmed.
    fn begin(&self, kuma: &Kuma) -> Result<(Subscription, i64), DurableError> {
        let ends = kuma.log_ends()?;
        let told = kuma.inner.erasing().entombed();
        let (positions, erasures, confirmed) =
            self.with(|file| Ok((positions(file, ends.len())?, file.number("erasures")?, file.number("confirmed")?)))?;
        let checkpoint = Checkpoint { disk_id: kuma.inner.disk_id(), positions, erasures, since_us: self.since_us };
        checkpoint.check(kuma.inner.disk_id(), &ends).map_err(SubscribeError::from)?;
        let filter = Arc::new(self.filter.clone());
        Ok((Subscription::begin(kuma.clone(), filter, checkpoint, told), confirmed))
    }
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
        let ends = kuma.log_ends()?;
        let newest = *inner.erasing().entombed().borrow();
        let (positions, erasures, since_us) = match start {
            Start::Beginning => (vec![0; ends.len()], newest, EVER),
            Start::Now => (ends, newest, EVER),
            Start::Time(time) => (vec![0; ends.len()], newest, micros(time)),
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
        let meta = [
            ("disk_id", inner.disk_id().to_string()),
            ("filter", serde_json::to_string(filter).unwrap_or_default()),
            ("since", since_us.to_string()),
        ];
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
                    pending.push(subscriber(&name));
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

/// By what receipts call it.
fn subscriber(name: &str) -> String {
    format!("subscription {name}")
}

/// Tells the eraser that a subscription has confirmed the erasures with these numbers; returns when their receipts say so.
async fn confirm(inner: &Arc<Inner>, name: &str, after: i64, last: i64) {
    let (done, told) = oneshot::channel();
    let message = EraserMessage::Confirmed { who: subscriber(name), after, last, done };
    if inner.eraser().is_some_and(|eraser: &ActorRef<EraserMessage>| eraser.cast(message).is_ok()) {
        let _ = told.await;
    }
}
