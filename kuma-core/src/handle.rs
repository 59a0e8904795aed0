//! Handles: how a service speaks to an entity.
//!
//! The typed handle is a thin layer on the raw one; both go the same way. A handle keeps the actor it found last; an actor that
//! left hands a message back, and the handle finds the next one. No write is ever sent twice.

use std::{
    marker::PhantomData,
    ops::{Deref, RangeBounds},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use futures_util::TryStreamExt;
use kuma_shard::EntityHash;
use ractor::MessagingErr;
use serde_bytes::Bytes;
use tokio::sync::oneshot;
use tracing::Instrument;

use crate::{
    Append, AppendError, Command, Direction, Entity, Execute, History, Metadata, NewEvent, Outcome, ReadError,
    RecordedEvent, Refused, Unavailable, Version,
    actor::{Content, EntityMessage, WriteRequest},
    audit,
    body::{Body, EncodedEvents, EventEncoder, Limits},
    identity::Identity,
    kind::{Decoded, Kind},
    live::{Durable, Live},
    micros,
    replay::{self, Opener, Until},
    reply::{OwnAppends, WriteReply, Written},
    retry::{self, RetryKey},
    sequence::Link,
    shard_core::ShardCore,
    store::{self, Inner},
    time_travel::{self, Diff},
};

/// How often a request looks for an entity that keeps leaving before it gives up.
const ROUTES_MAX: usize = 100;
/// Metadata says where an append came from; it is no place for content.
const METADATA_BYTES_MAX: usize = 64 << 10;
/// What an append takes beside its events while it waits.
const APPEND_BYTES: usize = 512;
/// What an overloaded caller is told to wait.
const RETRY_AFTER: Duration = Duration::from_millis(20);

/// The handle of an entity whose type is known. Cheap to clone.
pub struct Handle<E> {
    raw: RawHandle,
    entity: PhantomData<fn() -> E>,
}

impl<E> Clone for Handle<E> {
    fn clone(&self) -> Self {
        Handle { raw: self.raw.clone(), entity: PhantomData }
    }
}

/// The handle of an entity that is known by kind and id only. Cheap to clone.
#[derive(Clone)]
pub struct RawHandle {
    store: Arc<Inner>,
    who: Result<Who, Arc<Refused>>,
    /// The actor that was found last.
    live: Arc<ArcSwapOption<Live>>,
    own: OwnAppends,
    /// Whether it is the store's own, and may write to the store's own kinds.
    is_privileged: bool,
}

#[derive(Clone)]
pub(crate) struct Who {
    pub(crate) kind: Arc<dyn Kind>,
    pub(crate) identity: Arc<Identity>,
}

/// What is to be written, before it is admitted.
pub(crate) struct Write {
    pub(crate) content: Content,
    pub(crate) expected: Option<Version>,
    pub(crate) metadata: Option<Metadata>,
    pub(crate) retry: Option<RetryKey>,
    pub(crate) link: Option<Link>,
}

/// Where the answer to a write comes from.
pub(crate) struct Answer {
    entity: EntityHash,
    has_key: bool,
    outcome: oneshot::Receiver<Result<Written, AppendError>>,
}

impl Answer {
    pub(crate) fn entity(&self) -> EntityHash {
        self.entity
    }

    pub(crate) fn has_key(&self) -> bool {
        self.has_key
    }
}

impl Future for Answer {
    type Output = Result<Written, AppendError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.outcome).poll(context).map(|received| match received {
            Ok(outcome) => outcome,
            Err(_) => {
                let (entity, has_key) = (self.entity, self.has_key);
                Err(AppendError::Unknown { entity, detail: "its actor stopped".to_owned(), has_key })
            }
        })
    }
}

/// An entity's durable state at some version, the newest or an older one. Derefs to the state; sharing it costs nothing, and it does not change.
pub struct Current<E> {
    state: Arc<E>,
    version: Version,
}

impl<E: Entity> Current<E> {
    fn new(Durable { state, version }: Durable) -> Result<Self, ReadError> {
        match Arc::downcast(state) {
            Ok(state) => Ok(Current { state, version }),
            Err(_) => Err(Refused::KindMismatch { kind: E::KIND.to_owned() }.into()),
        }
    }
}

impl<E> Current<E> {
    /// How many events it is folded from.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The state.
    pub fn into_arc(self) -> Arc<E> {
        self.state
    }
}

impl<E> Clone for Current<E> {
    fn clone(&self) -> Self {
        Current { state: self.state.clone(), version: self.version }
    }
}

impl<E> Deref for Current<E> {
    type Target = E;

    fn deref(&self) -> &E {
        &self.state
    }
}

impl<E: std::fmt::Debug> std::fmt::Debug for Current<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Current").field("version", &self.version).field("state", &self.state).finish()
    }
}

impl<E: Entity> Handle<E> {
    pub(crate) fn new(raw: RawHandle) -> Self {
        Handle { raw, entity: PhantomData }
    }

    /// Appends one event. Await it: it returns the new version once the event is durable.
    ///
    /// Neighbours share one disk sync without lingering: a group is what gathered while the previous one was being synced. Durable
    /// means that COMMIT returned under `synchronous = FULL` (unless [`Durability::Normal`](crate::Durability) was asked for). Source: <https://sqlite.org/wal.html>, "Performance Considerations".
    ///
    /// # Errors
    /// [`AppendError::Refused`] and [`AppendError::Unavailable`]: nothing was written. [`AppendError::Unknown`]: look.
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub fn append(&self, event: E::Event) -> Append<'_> {
        self.append_all([event])
    }

    /// Appends several events as one: all of them or none. At most 4096 events and 4 MiB.
    ///
    /// # Errors
    /// As [`Handle::append`].
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub fn append_all(&self, events: impl IntoIterator<Item = E::Event>) -> Append<'_> {
        let events = events.into_iter();
        let mut encoder = EventEncoder::expecting(self.raw.limits(), events.size_hint().0);
        let decoded = events.map(|event| encoder.typed::<E>(&event)).collect::<Result<Vec<E::Event>, _>>();
        Append::new(&self.raw, decoded.and_then(|decoded| Ok((encoder.finish()?, Box::new(decoded) as Decoded))))
    }

    /// Lets a command decide on the entity's newest state. Await it: it returns the command's events once they are durable.
    ///
    /// # Errors
    /// [`ExecuteError::Rejected`](crate::ExecuteError): the command's own answer. Everything else as for [`Handle::append`].
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown. With an [idempotency key](Execute::idempotency_key) it can
    /// be asked again.
    pub fn execute<C: Command<E>>(&self, command: C) -> Execute<'_, E, C> {
        Execute::new(&self.raw, command)
    }

    /// The durable state, from memory: it waits for the disk only for the first use of the entity and for appends that this very
    /// handle (or a clone) has on their way. Whoever was told of an append sees it.
    ///
    /// # Errors
    /// The entity cannot be read, see [`ReadError`].
    /// # Cancel safety
    /// Cancel safe.
    pub async fn read(&self) -> Result<Current<E>, ReadError> {
        Current::new(self.raw.durable().await?)
    }

    /// The entity as it was when it had `version` events.
    ///
    /// # Errors
    /// [`Refused::NoSuchVersion`] if it does not have so many; [`ReadError`] if it cannot be read.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn at_version(&self, version: Version) -> Result<Current<E>, ReadError> {
        Current::new(self.raw.past(Until::Version(version.0)).await?)
    }

    /// The entity as it was at this time: with all that was committed up to it. Commit times never decrease within an entity, also
    /// where the clock was set back. Before its first event it is in its default state, at version 0.
    ///
    /// # Errors
    /// The entity cannot be read.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn at(&self, time: SystemTime) -> Result<Current<E>, ReadError> {
        Current::new(self.raw.past(Until::Time(micros(time))).await?)
    }

    /// What differs between the entity's states at two versions, by their serialized form.
    ///
    /// # Errors
    /// As [`Handle::at_version`], or a state has no JSON form.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn diff(&self, from: Version, to: Version) -> Result<Diff, ReadError> {
        self.raw.diff(from, to).await
    }

    /// The entity's stored events with these versions. See [`RawHandle::history`].
    pub fn history(&self, versions: impl RangeBounds<u64>, direction: Direction) -> History {
        self.raw.history(versions, direction)
    }

    /// What became of the request with this idempotency key. See [`RawHandle::outcome`].
    ///
    /// # Errors
    /// The entity cannot be read, or the key is refused.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn outcome(&self, key: impl AsRef<[u8]>) -> Result<Outcome, ReadError> {
        self.raw.outcome(key).await
    }

    /// The same entity without its type.
    pub fn raw(&self) -> &RawHandle {
        &self.raw
    }
}

impl RawHandle {
    pub(crate) fn new(store: Arc<Inner>, kind: Result<Arc<dyn Kind>, Refused>, kind_name: &str, id: &[u8]) -> Self {
        let who = kind.and_then(|kind| {
            let identity = Arc::new(Identity::new(kind_name, id, store.ids())?);
            Ok(Who { kind, identity })
        });
        RawHandle {
            store,
            who: who.map_err(Arc::new),
            live: Arc::default(),
            own: OwnAppends::default(),
            is_privileged: false,
        }
    }

    pub(crate) fn privileged(self) -> Self {
        RawHandle { is_privileged: true, ..self }
    }

    /// Whether the entity may be written to and erased by whoever has this handle.
    pub(crate) fn check_writable(&self) -> Result<(), Refused> {
        let kind = self.who()?.kind.name();
        match audit::is_reserved(kind) && !self.is_privileged {
            true => Err(Refused::ReservedKind { kind: kind.to_string() }),
            false => Ok(()),
        }
    }

    pub(crate) fn store(&self) -> &Arc<Inner> {
        &self.store
    }

    /// The short name of the entity in logs and errors; none if its kind or id is refused.
    pub fn hash(&self) -> Option<EntityHash> {
        self.who.as_ref().ok().map(|who| who.identity.hash)
    }

    /// The short name of the entity, if its kind and id can be used.
    ///
    /// # Errors
    /// Why they cannot.
    pub fn check(&self) -> Result<EntityHash, Refused> {
        Ok(self.who()?.identity.hash)
    }

    /// Appends events as one: all of them or none. See [`Handle::append`].
    ///
    /// # Errors
    /// As [`Handle::append`].
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub fn append_all(&self, events: impl IntoIterator<Item = NewEvent>) -> Append<'_> {
        Append::new(self, self.prepare(events))
    }

    /// Appends one event. See [`Handle::append`].
    ///
    /// # Errors
    /// As [`Handle::append`].
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub fn append(&self, event: NewEvent) -> Append<'_> {
        self.append_all([event])
    }

    /// The durable state as JSON, with its version. See [`Handle::read`].
    ///
    /// # Errors
    /// The entity cannot be read, or its state has no JSON form.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn read(&self) -> Result<(serde_json::Value, Version), ReadError> {
        self.json(self.durable().await?)
    }

    /// The state as JSON as it was when the entity had `version` events. See [`Handle::at_version`].
    ///
    /// # Errors
    /// As [`Handle::at_version`], or the state has no JSON form.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn at_version(&self, version: Version) -> Result<(serde_json::Value, Version), ReadError> {
        self.json(self.past(Until::Version(version.0)).await?)
    }

    /// The state as JSON as it was at this time, with its version. See [`Handle::at`].
    ///
    /// # Errors
    /// As [`Handle::at`], or the state has no JSON form.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn at(&self, time: SystemTime) -> Result<(serde_json::Value, Version), ReadError> {
        self.json(self.past(Until::Time(micros(time))).await?)
    }

    /// What differs between the entity's states at two versions. See [`Handle::diff`].
    ///
    /// # Errors
    /// As [`RawHandle::at_version`].
    /// # Cancel safety
    /// Cancel safe.
    pub async fn diff(&self, from: Version, to: Version) -> Result<Diff, ReadError> {
        let (before, _) = self.at_version(from).await?;
        let (after, _) = self.at_version(to).await?;
        Ok(Diff { from, to, changes: time_travel::changes(before, &after) })
    }

    /// The stored events with these versions, in either direction, as a stream. It reads a page at a time, and no further than it is
    /// asked to, so that memory stays bounded however long the history is. Events appended meanwhile may or may not be seen.
    ///
    /// They are listed even where the kind's type does not know them, in the shape of the current schema version.
    ///
    /// ```
    /// # use kuma_core::{Direction, Kuma, NewEvent, Options};
    /// # use serde_json::json;
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let kuma = Kuma::start(Options::new(dir.path())).await?;
    /// let order = kuma.raw("order", "7");
    /// order.append(NewEvent::json("Placed", &json!({"total": 5}))?).await?;
    /// let mut newest_first = order.history(.., Direction::Backward);
    /// while let Some(event) = newest_first.next().await {
    ///     let event = event?;
    ///     println!("{} {} {}", event.version, event.name, event.json()?);
    /// }
    /// # kuma.shutdown().await;
    /// # Ok(())
    /// # }
    /// ```
    pub fn history(&self, versions: impl RangeBounds<u64>, direction: Direction) -> History {
        History::of(self.clone(), versions, direction)
    }

    /// What became of the append or command with this idempotency key.
    ///
    /// [`Outcome::NeverSeen`] is not final: a request that was sent may still arrive. Whoever has to know for certain sends the request
    /// again, with the same key.
    ///
    /// # Errors
    /// The entity cannot be read, or the key is refused.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn outcome(&self, key: impl AsRef<[u8]>) -> Result<Outcome, ReadError> {
        let key = retry::check(key.as_ref())?;
        self.ask(|reply| EntityMessage::Outcome { key: key.into(), reply }).await
    }

    /// The first `events_max` of the stored events with these versions, oldest first: the beginning of [`RawHandle::history`].
    ///
    /// # Errors
    /// The entity cannot be read.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn events(
        &self,
        versions: impl RangeBounds<u64>,
        events_max: usize,
    ) -> Result<Vec<RecordedEvent>, ReadError> {
        let mut history = self.history(versions, Direction::Forward);
        let mut events = Vec::new();
        while events.len() < events_max
            && let Some(event) = history.try_next().await?
        {
            events.push(event);
        }
        Ok(events)
    }

    /// Takes the entity out of memory after all it was asked is done; its next use replays it. Kuma does this by itself.
    ///
    /// # Errors
    /// The store is shutting down, or the kind or id is refused.
    /// # Cancel safety
    /// Cancel safe: the entity leaves all the same.
    pub async fn passivate(&self) -> Result<(), ReadError> {
        let Who { identity, .. } = self.who()?;
        let core = self.store.core(identity)?;
        store::passivate(core, identity.hash).await;
        Ok(())
    }

    fn prepare(&self, events: impl IntoIterator<Item = NewEvent>) -> Result<(EncodedEvents, Decoded), Refused> {
        let kind = &self.who()?.kind;
        let mut encoder = EventEncoder::new(self.limits());
        events.into_iter().try_for_each(|event| encoder.raw(&event))?;
        let encoded = encoder.finish()?;
        let body = encoded.body(None).map_err(|error| undecodable(kind.name(), error.to_string()))?;
        let body = Body::parse(&body).map_err(|error| undecodable(kind.name(), error.to_string()))?;
        let items: Vec<(u32, &Bytes)> = body.events;
        // What the kind cannot read back is never written. Whoever appends raw events is seldom the author of its code.
        let decoded = catch_unwind(AssertUnwindSafe(|| kind.decode(&items)))
            .map_err(|_| {
                undecodable(kind.name(), "reading it back panicked; mend its upcaster or `Deserialize`".to_owned())
            })?
            .map_err(|error| undecodable(&error.event, error.detail))?;
        Ok((encoded, decoded))
    }

    pub(crate) fn who(&self) -> Result<&Who, Refused> {
        self.who.as_ref().map_err(|refused| (**refused).clone())
    }

    pub(crate) fn core(&self) -> Result<&Arc<ShardCore>, ReadError> {
        Ok(self.store.core(&self.who()?.identity)?)
    }

    pub(crate) fn limits(&self) -> Limits {
        // What the store itself has to say is small, and must not be refused.
        if self.is_privileged { Limits::DEFAULT } else { self.store.limits }
    }

    /// Hands a write to the entity's actor. Where the answer will come from, and for which entity.
    pub(crate) async fn submit(&self, write: Write) -> Result<Answer, AppendError> {
        self.check_writable()?;
        let Write { content, expected, metadata, retry, link } = write;
        let Who { identity, .. } = self.who()?;
        let core = self.store.core(identity)?;
        let entity = identity.hash;
        if link.as_ref().is_some_and(Link::is_broken) {
            return Err(Unavailable::SequenceBroken { entity }.into());
        }
        let metadata_bytes = metadata.as_ref().map_or(0, Metadata::bytes);
        if metadata_bytes > METADATA_BYTES_MAX {
            return Err(Refused::MetadataTooLarge { bytes: metadata_bytes, bytes_max: METADATA_BYTES_MAX }.into());
        }
        let (bytes, events) = match &content {
            Content::Events(events, _) => (events.bytes, Some(events.count)),
            // What it decides is added once it is known.
            Content::Command(_) => (0, None),
        };
        let span = tracing::debug_span!(
            target: "kuma::append", "append", %entity, slot = %identity.slot, shard = core.shard.number(), events, bytes,
            result = tracing::field::Empty,
        );
        let overloaded = |place: String| {
            core.metrics.overloaded.increment(1);
            Unavailable::Overloaded { place, retry_after: RETRY_AFTER }
        };
        let shard_room = core.shard.budget().take(bytes + metadata_bytes + APPEND_BYTES);
        let shard_room = shard_room.ok_or_else(|| overloaded(format!("for shard {}", core.shard.number())))?;
        let mut live = self.route(core).instrument(span.clone()).await?;
        let entity_room = live.appends.take(1).ok_or_else(|| overloaded(format!("for entity {entity}")))?;
        let (caller, outcome) = oneshot::channel();
        let answer = Answer { entity, has_key: retry.is_some(), outcome };
        let reply = WriteReply {
            caller,
            held: (shard_room, entity_room, self.own.enter()),
            link,
            span,
            metrics: core.metrics.clone(),
            started: Instant::now(),
        };
        let mut message = EntityMessage::Write(Box::new(WriteRequest { content, expected, metadata, retry, reply }));
        for attempt in 0..ROUTES_MAX {
            match live.actor.cast(message) {
                Ok(()) => return Ok(answer),
                // It left, and did not take the message: find the next one.
                Err(MessagingErr::SendErr(back)) => {
                    message = back;
                    live = self.route_again(core, &live, attempt).await?;
                }
                Err(_) => break,
            }
        }
        Err(Unavailable::Interrupted { entity }.into())
    }

    /// The entity as it was.
    async fn past(&self, until: Until) -> Result<Durable, ReadError> {
        let Who { kind, identity } = self.who()?;
        let core = self.core()?;
        let entity = identity.hash;
        let unreadable = |cause| ReadError::unreadable(entity, cause);
        let past = match self.opener().await? {
            Some(opener) => replay::past(core, &**kind, &opener, until).await,
            None => replay::Past::first(&**kind),
        };
        let past = past.map_err(unreadable)?;
        match until {
            Until::Version(asked) if past.version < asked => {
                let (asked, newest) = (Version(asked), Version(past.version));
                Err(Refused::NoSuchVersion { entity, asked, newest }.into())
            }
            _ => Ok(Durable { state: past.state, version: Version(past.version) }),
        }
    }

    /// What it takes to read the entity's events; none if it has none. It is not brought into memory for it.
    pub(crate) async fn opener(&self) -> Result<Option<Opener>, ReadError> {
        let Who { identity, .. } = self.who()?;
        let core = self.core()?;
        let entity = identity.hash;
        // A live entity has its key unwrapped.
        if let Some(live) = core.live(entity) {
            let (reply, answer) = oneshot::channel();
            if live.actor.cast(EntityMessage::Open { reply }).is_ok()
                && let Ok(Ok(opener)) = answer.await
            {
                return Ok(opener);
            }
        }
        // What cannot be folded can still be listed.
        replay::find(core, identity).await.map_err(|cause| ReadError::unreadable(entity, cause))
    }

    fn json(&self, Durable { state, version }: Durable) -> Result<(serde_json::Value, Version), ReadError> {
        let json = self.who()?.kind.json(&state);
        let json = json.map_err(|error| Refused::NoJson { detail: error.to_string() })?;
        Ok((json, version))
    }

    async fn durable(&self) -> Result<Durable, ReadError> {
        if self.own.count() == 0
            && let Some(live) = &*self.live.load()
            && let Some(durable) = live.peek()
        {
            let core = self.store.core(&self.who()?.identity)?;
            live.view.usage.touch(&core.clock);
            return Ok(durable);
        }
        let after_appends = self.own.count() > 0;
        self.ask(|reply| EntityMessage::Read { after_appends, reply }).await
    }

    /// Asks the actor something that can be asked again if it leaves first.
    async fn ask<T>(
        &self,
        message: impl Fn(oneshot::Sender<Result<T, ReadError>>) -> EntityMessage,
    ) -> Result<T, ReadError> {
        let Who { identity, .. } = self.who()?;
        let core = self.store.core(identity)?;
        let mut live = self.route(core).await?;
        for attempt in 0..ROUTES_MAX {
            let (reply, answer) = oneshot::channel();
            if live.actor.cast(message(reply)).is_ok()
                && let Ok(answer) = answer.await
            {
                return answer;
            }
            live = self.route_again(core, &live, attempt).await?;
        }
        Err(Unavailable::Interrupted { entity: identity.hash }.into())
    }

    async fn route(&self, core: &ShardCore) -> Result<Arc<Live>, ReadError> {
        if let Some(live) = &*self.live.load() {
            return Ok(live.clone());
        }
        let Who { kind, identity } = self.who()?;
        let live = store::activate(core, kind, identity).await?;
        self.live.store(Some(live.clone()));
        Ok(live)
    }

    /// The actor after `left`.
    async fn route_again(&self, core: &ShardCore, left: &Arc<Live>, attempt: usize) -> Result<Arc<Live>, ReadError> {
        if self.live.load().as_ref().is_some_and(|live| Arc::ptr_eq(live, left)) {
            self.live.store(None);
        }
        // An actor that has just gone may still stand in the directory until its supervisor hears of it.
        match attempt {
            0..10 => tokio::task::yield_now().await,
            _ => tokio::time::sleep(Duration::from_millis(2)).await,
        }
        self.route(core).await
    }
}

fn undecodable(event: &str, detail: String) -> Refused {
    Refused::Undecodable { event: event.to_owned(), detail }
}
