//! Handles: how a service speaks to an entity.
//!
//! The typed handle is a thin layer on the raw one; both go the same way. A handle keeps the actor it found last; an actor that
//! left hands a message back, and the handle finds the next one. No append is ever sent twice.

use std::{
    future::{Future, IntoFuture},
    marker::PhantomData,
    ops::{Deref, RangeBounds},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwapOption;
use kuma_shard::EntityHash;
use ractor::MessagingErr;
use tokio::sync::oneshot;

use crate::{
    AppendError, Entity, Metadata, NewEvent, ReadError, RecordedEvent, Refused, Unavailable, Version,
    actor::{AppendRequest, EntityMessage},
    body::{Body, EncodedEvents, EventEncoder, split},
    identity::Identity,
    kind::{Decoded, Kind},
    live::{Durable, Live},
    replay::Opener,
    reply::{AppendReply, OwnAppends},
    shard_core::ShardCore,
    store::{self, Inner},
};

/// How often a request looks for an entity that keeps leaving before it gives up.
const ROUTES_MAX: usize = 100;
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
}

#[derive(Clone)]
struct Who {
    kind: Arc<dyn Kind>,
    identity: Arc<Identity>,
}

/// An entity's durable state at some version. Derefs to the state; sharing it costs nothing, and it does not change.
pub struct Current<E> {
    state: Arc<E>,
    version: Version,
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

/// An append that is described and not sent yet: `.await` sends it and waits until it is durable, [`Append::submit`] only sends it.
#[must_use = "nothing is sent until it is awaited or submitted"]
pub struct Append<'a> {
    handle: &'a RawHandle,
    prepared: Result<(EncodedEvents, Decoded), Refused>,
    expected: Option<Version>,
    metadata: Option<Metadata>,
}

/// An append on its way. Resolves once it is durable, or was refused. Dropping it changes nothing about the append.
#[must_use = "the outcome is only known when this resolves"]
pub struct Pending {
    entity: EntityHash,
    outcome: oneshot::Receiver<Result<Version, AppendError>>,
}

impl Future for Pending {
    type Output = Result<Version, AppendError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.outcome).poll(context).map(|received| match received {
            Ok(outcome) => outcome,
            Err(_) => Err(AppendError::Unknown { entity: self.entity, detail: "its actor stopped".to_owned() }),
        })
    }
}

impl<'a> Append<'a> {
    /// Refuses the append unless the entity is at this version, [`Version(0)`](Version) for one that has no events.
    pub fn expecting(mut self, version: Version) -> Self {
        self.expected = Some(version);
        self
    }

    /// Keeps this beside the events, sealed with them.
    pub fn metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = Some(metadata);
        self
    }

    /// Sends the append and returns as soon as it has its place in the entity's order; appends submitted one after the other are
    /// decided in that order and share disk syncs.
    ///
    /// # Errors
    /// It was refused before it was sent, or there is too much on the way already.
    /// # Cancel safety
    /// Cancel safe until the entity is found: if the future is dropped before it returns, nothing was sent.
    pub async fn submit(self) -> Result<Pending, AppendError> {
        let (events, decoded) = self.prepared?;
        self.handle.submit(events, decoded, self.expected, self.metadata).await
    }
}

impl<'a> IntoFuture for Append<'a> {
    type Output = Result<Version, AppendError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.submit().await?.await })
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
        let mut encoder = EventEncoder::expecting(self.raw.store.limits, events.size_hint().0);
        let decoded = events.map(|event| encoder.typed::<E>(&event)).collect::<Result<Vec<E::Event>, _>>();
        let prepared = decoded.and_then(|decoded| Ok((encoder.finish()?, Box::new(decoded) as Decoded)));
        Append { handle: &self.raw, prepared, expected: None, metadata: None }
    }

    /// The durable state, from memory: it waits for the disk only for the first use of the entity and for appends that this very
    /// handle (or a clone) has on their way. Whoever was told of an append sees it.
    ///
    /// # Errors
    /// The entity cannot be read, see [`ReadError`].
    /// # Cancel safety
    /// Cancel safe.
    pub async fn read(&self) -> Result<Current<E>, ReadError> {
        let Durable { state, version } = self.raw.durable().await?;
        match Arc::downcast(state) {
            Ok(state) => Ok(Current { state, version }),
            Err(_) => Err(Refused::KindMismatch { kind: E::KIND.to_owned() }.into()),
        }
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
        RawHandle { store, who: who.map_err(Arc::new), live: Arc::default(), own: OwnAppends::default() }
    }

    /// The short name of the entity in logs and errors; none if its kind or id is refused.
    pub fn hash(&self) -> Option<EntityHash> {
        self.who.as_ref().ok().map(|who| who.identity.hash)
    }

    /// Appends events as one: all of them or none. See [`Handle::append`].
    ///
    /// # Errors
    /// As [`Handle::append`].
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub fn append_all(&self, events: impl IntoIterator<Item = NewEvent>) -> Append<'_> {
        Append { handle: self, prepared: self.prepare(events), expected: None, metadata: None }
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
        let Durable { state, version } = self.durable().await?;
        let json = self.who()?.kind.json(&state);
        let json =
            json.map_err(|error| Refused::Undecodable { event: "the state".to_owned(), detail: error.to_string() })?;
        Ok((json, version))
    }

    /// Stored events with these versions, oldest first, at most `events_max` of them (and the rest of the last commit's). They are
    /// listed even where the kind cannot fold them.
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
        let Who { identity, .. } = self.who()?;
        let core = self.store.core(identity)?;
        let entity = identity.hash;
        let unreadable = |cause| Unavailable::Unreadable { entity, cause };
        let opener = match self.ask(|reply| EntityMessage::Open { reply }).await {
            // What cannot be folded can still be listed.
            Err(ReadError::Unavailable(Unavailable::Unreadable { .. } | Unavailable::Quarantined { .. })) => {
                crate::replay::find(core, identity).await.map_err(unreadable)?
            }
            opener => opener?,
        };
        let Some(opener) = opener else { return Ok(Vec::new()) };
        read_events(core, &opener, versions, events_max).await.map_err(|cause| unreadable(cause).into())
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
        let mut encoder = EventEncoder::new(self.store.limits);
        events.into_iter().try_for_each(|event| encoder.raw(&event))?;
        let encoded = encoder.finish()?;
        let body = encoded.body(None).map_err(|error| undecodable(kind.name(), error.to_string()))?;
        let body = Body::parse(&body).map_err(|error| undecodable(kind.name(), error.to_string()))?;
        let items: Vec<&[u8]> = body.events.iter().map(|(_, event)| &***event).collect();
        // What the kind cannot read back is never written.
        let decoded = kind.decode(&items).map_err(|error| undecodable(&error.event, error.detail))?;
        Ok((encoded, decoded))
    }

    fn who(&self) -> Result<&Who, Refused> {
        self.who.as_ref().map_err(|refused| (**refused).clone())
    }

    async fn submit(
        &self,
        events: EncodedEvents,
        decoded: Decoded,
        expected: Option<Version>,
        metadata: Option<Metadata>,
    ) -> Result<Pending, AppendError> {
        let Who { identity, .. } = self.who()?;
        let core = self.store.core(identity)?;
        let entity = identity.hash;
        let overloaded = |place: String| Unavailable::Overloaded { place, retry_after: RETRY_AFTER };
        let shard_room = core.shard.budget().take(events.bytes + APPEND_BYTES);
        let shard_room = shard_room.ok_or_else(|| overloaded(format!("for shard {}", core.shard.number())))?;
        let mut live = self.route(core).await?;
        let entity_room = live.appends.take(1).ok_or_else(|| overloaded(format!("for entity {entity}")))?;
        let (caller, outcome) = oneshot::channel();
        let reply = AppendReply { caller, held: (shard_room, entity_room, self.own.enter()) };
        let mut message = EntityMessage::Append(Box::new(AppendRequest { events, decoded, expected, metadata, reply }));
        for attempt in 0..ROUTES_MAX {
            match live.actor.cast(message) {
                Ok(()) => return Ok(Pending { entity, outcome }),
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

/// Reads events through a page at a time.
async fn read_events(
    core: &ShardCore,
    opener: &Opener,
    versions: impl RangeBounds<u64>,
    events_max: usize,
) -> Result<Vec<RecordedEvent>, crate::ReplayError> {
    use std::ops::Bound;
    let first = match versions.start_bound() {
        Bound::Included(first) => *first,
        Bound::Excluded(before) => before + 1,
        Bound::Unbounded => 1,
    };
    let mut events = Vec::new();
    // Commits have no fixed length: start at the newest one that begins at or before the first version wanted.
    let mut after = core.shard.commit_before(&opener.row, first).await?.saturating_sub(1);
    'pages: loop {
        let rows = opener.page(&core.shard, after, 64).await?;
        let Some(last) = rows.last() else { break };
        after = last.version + u64::from(last.count) - 1;
        for row in &rows {
            let plaintext = opener.open(row)?;
            let at = UNIX_EPOCH + Duration::from_micros(row.at_us.max(0).unsigned_abs());
            events.extend(
                decode_row(row.version, at, &plaintext, &opener.row.kind)?
                    .into_iter()
                    .filter(|event| versions.contains(&event.version.0)),
            );
            let beyond = match versions.end_bound() {
                Bound::Included(end) => row.version > *end,
                Bound::Excluded(end) => row.version >= *end,
                Bound::Unbounded => false,
            };
            if beyond || events.len() >= events_max {
                break 'pages;
            }
        }
    }
    Ok(events)
}

/// The events of one commit.
fn decode_row(
    first: u64,
    at: SystemTime,
    plaintext: &[u8],
    kind: &str,
) -> Result<Vec<RecordedEvent>, crate::ReplayError> {
    let version = Version(first);
    let undecodable = |detail: String| crate::ReplayError::Undecodable {
        kind: kind.to_owned(),
        event: String::new(),
        version,
        detail,
    };
    let body = Body::parse(plaintext).map_err(|error| undecodable(error.to_string()))?;
    let metadata = &body.metadata;
    let event = |(version, (schema, event)): (u64, &(u32, &serde_bytes::Bytes))| {
        let (name, data) = split(event).ok_or_else(|| undecodable("it has no name".to_owned()))?;
        Ok(RecordedEvent {
            version: Version(version),
            name: name.to_owned(),
            schema: *schema,
            at,
            metadata: metadata.clone(),
            data: data.to_owned(),
        })
    };
    (first..).zip(&body.events).map(event).collect()
}
