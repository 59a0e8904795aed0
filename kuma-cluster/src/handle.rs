//! Handles that work on every node: the same calls as those of a store that is alone, wherever the entity is.

use std::{
    future::{Future, IntoFuture},
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use kuma_core::{
    AppendError, Command, Entity, ExecuteError, Gate, Metadata, NewEvent, ReadError, Refused, Slot, Version, slot_of,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    requests::{self, error_of, state_of, unexpected},
    shared::Shared,
    wire::{self, Ask, Reply, Request},
};

/// How long a request looks for its owner, and waits for it, unless it says otherwise.
pub(crate) const WITHIN: Duration = Duration::from_secs(10);

/// The handle of an entity whose type is known, wherever it is. Cheap to clone.
pub struct Handle<E> {
    raw: RawHandle,
    entity: PhantomData<fn() -> E>,
}

impl<E> Clone for Handle<E> {
    fn clone(&self) -> Self {
        Handle { raw: self.raw.clone(), entity: PhantomData }
    }
}

/// The handle of an entity that is known by kind and id only, wherever it is. Cheap to clone.
#[derive(Clone)]
pub struct RawHandle {
    pub(crate) shared: Arc<Shared>,
    pub(crate) here: kuma_core::RawHandle,
    entity_kind: Arc<str>,
    id: Arc<str>,
    slot: Slot,
    pub(crate) within: Duration,
}

impl<E: Entity> Handle<E> {
    pub(crate) fn new(raw: RawHandle) -> Self {
        Handle { raw, entity: PhantomData }
    }

    /// The handle without the type.
    pub fn raw(&self) -> &RawHandle {
        &self.raw
    }

    /// How long a request may take before it is given up. Default: 10 seconds.
    #[must_use]
    pub fn within(mut self, within: Duration) -> Self {
        self.raw.within = within;
        self
    }

    /// Appends one event. Await it: it returns the new version once the event is durable at the node that owns the entity.
    ///
    /// # Errors
    /// As `kuma_core::Handle::append`; and the owner may be out of reach.
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub fn append(&self, event: E::Event) -> Append<'_> {
        self.append_all([event])
    }

    /// Appends several events as one: all of them or none.
    ///
    /// # Errors
    /// As [`Handle::append`].
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub fn append_all(&self, events: impl IntoIterator<Item = E::Event>) -> Append<'_> {
        let events = events.into_iter().map(|event| NewEvent::typed::<E>(&event)).collect();
        Append::new(&self.raw, events)
    }

    /// The durable state, and how many events it is folded from.
    ///
    /// # Errors
    /// The entity cannot be read, or its owner is out of reach.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn read(&self) -> Result<(E, Version), ReadError> {
        let raw = &self.raw;
        if raw.is_here() {
            let read = raw.shared.kuma.entity::<E>(&*raw.id).read().await;
            match read {
                Ok(current) => return Ok(((*current).clone(), current.version())),
                Err(error) if is_moved(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let entity = raw.here.check()?;
        state_of::<E>(entity, raw.ask(Ask::Read).await?)
    }

    /// Lets a command decide on the entity's newest state, at the node that owns it. Await it: it returns the version and the command's events
    /// once they are durable. Every node must know the command ([`NodeOptions::command`](crate::NodeOptions::command)).
    ///
    /// # Errors
    /// [`ExecuteError::Rejected`]: the command's own answer. Everything else as for [`Handle::append`].
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub fn execute<C>(&self, command: C) -> Execute<'_, E, C>
    where
        C: Command<E> + Serialize + DeserializeOwned,
    {
        Execute { raw: &self.raw, command, expected: None, key: None, metadata: None, entity: PhantomData }
    }
}

impl RawHandle {
    pub(crate) fn new(shared: Arc<Shared>, kind: &str, id: &str, here: kuma_core::RawHandle) -> Self {
        let slot = slot_of(kind, id);
        RawHandle { shared, here, entity_kind: kind.into(), id: id.into(), slot, within: WITHIN }
    }

    /// How long a request may take before it is given up. Default: 10 seconds.
    #[must_use]
    pub fn within(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// The slot of the entity.
    pub fn slot(&self) -> Slot {
        self.slot
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

    /// Appends several events as one: all of them or none.
    ///
    /// # Errors
    /// As [`Handle::append`].
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub fn append_all(&self, events: impl IntoIterator<Item = NewEvent>) -> Append<'_> {
        Append::new(self, Ok(events.into_iter().collect()))
    }

    /// The durable state as JSON, with its version.
    ///
    /// # Errors
    /// The entity cannot be read, or its owner is out of reach.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn read(&self) -> Result<(serde_json::Value, Version), ReadError> {
        if self.is_here() {
            match self.here.read().await {
                Err(error) if is_moved(&error) => {}
                read => return read,
            }
        }
        let entity = self.here.check()?;
        match self.ask(Ask::Read).await? {
            Reply::State { state, version } => Ok((state, version)),
            Reply::Failed(failure) => Err(requests::read_error(error_of(entity, failure))),
            _ => Err(requests::read_error(unexpected())),
        }
    }

    /// Whether requests are let in here.
    fn is_here(&self) -> bool {
        self.shared.slots.gate(self.slot) == Gate::Open
    }

    async fn ask(&self, ask: Ask) -> Result<Reply, kuma_core::Unavailable> {
        self.ask_within(ask, self.within).await
    }

    pub(crate) async fn ask_within(&self, ask: Ask, within: Duration) -> Result<Reply, kuma_core::Unavailable> {
        let request = Request { entity_kind: self.entity_kind.to_string(), id: self.id.to_string(), ask };
        requests::ask(&self.shared, request, within).await
    }
}

/// Whether nothing was done because the slot is not here, or not any more.
fn is_moved(error: &ReadError) -> bool {
    use kuma_core::Unavailable::{SlotElsewhere, SlotMoves};
    matches!(error, ReadError::Unavailable(SlotMoves { .. } | SlotElsewhere { .. }))
}

/// A name for a request, that no other one has.
fn own_key() -> Vec<u8> {
    let mut bytes = vec![0; 16];
    // Without random bytes the request has no key, and is refused for it.
    match getrandom::fill(&mut bytes) {
        Ok(()) => bytes,
        Err(_) => Vec::new(),
    }
}

/// An append that is described and not sent yet.
#[must_use = "nothing is sent until it is awaited"]
pub struct Append<'a> {
    raw: &'a RawHandle,
    events: Result<Vec<NewEvent>, Refused>,
    expected: Option<Version>,
    key: Option<Vec<u8>>,
    metadata: Option<Metadata>,
}

impl<'a> Append<'a> {
    fn new(raw: &'a RawHandle, events: Result<Vec<NewEvent>, Refused>) -> Self {
        Append { raw, events, expected: None, key: None, metadata: None }
    }

    /// Refuses the append unless the entity is at this version.
    pub fn expecting(mut self, version: Version) -> Self {
        self.expected = Some(version);
        self
    }

    /// Makes the append happen once, however often it is sent, to whichever node.
    pub fn idempotency_key(mut self, key: impl AsRef<[u8]>) -> Self {
        self.key = Some(key.as_ref().to_vec());
        self
    }

    /// Keeps this beside the events, sealed with them.
    pub fn metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = Some(metadata);
        self
    }

    async fn send(self) -> Result<Version, AppendError> {
        let Append { raw, events, expected, key, metadata } = self;
        let events = events?;
        if raw.is_here() {
            let mut append = raw.here.append_all(events.iter().cloned());
            if let Some(expected) = expected {
                append = append.expecting(expected);
            }
            if let Some(key) = &key {
                append = append.idempotency_key(key);
            }
            if let Some(metadata) = &metadata {
                append = append.metadata(metadata.clone());
            }
            match append.await {
                Err(error) if requests::is_elsewhere(&error) => {}
                done => return done,
            }
        }
        let entity = raw.here.check()?;
        let key = key.unwrap_or_else(own_key);
        match raw.ask(Ask::Append { events, expected, key, metadata }).await? {
            Reply::Appended { version, .. } => Ok(version),
            Reply::Failed(failure) => Err(error_of(entity, failure)),
            _ => Err(unexpected()),
        }
    }
}

impl<'a> IntoFuture for Append<'a> {
    type Output = Result<Version, AppendError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// A command that is described and not sent yet.
#[must_use = "nothing is sent until it is awaited"]
pub struct Execute<'a, E, C> {
    raw: &'a RawHandle,
    command: C,
    expected: Option<Version>,
    key: Option<Vec<u8>>,
    metadata: Option<Metadata>,
    entity: PhantomData<fn() -> E>,
}

/// What a command brought about, at whichever node.
#[derive(Debug)]
pub struct Executed<E: Entity> {
    /// The version that its last event made; of a command that had nothing to do, the version that it was decided on.
    pub version: Version,
    /// The events, which are on the disk.
    pub events: Vec<E::Event>,
    /// Whether this is the outcome of an earlier request with the same idempotency key.
    pub is_repeated: bool,
}

impl<'a, E, C> Execute<'a, E, C>
where
    E: Entity,
    C: Command<E> + Serialize + DeserializeOwned,
    C::Rejection: Serialize + DeserializeOwned,
{
    /// Refuses the command unless the entity is at this version.
    pub fn expecting(mut self, version: Version) -> Self {
        self.expected = Some(version);
        self
    }

    /// Makes the command happen once, however often it is sent, to whichever node.
    pub fn idempotency_key(mut self, key: impl AsRef<[u8]>) -> Self {
        self.key = Some(key.as_ref().to_vec());
        self
    }

    /// Keeps this beside the events, sealed with them.
    pub fn metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = Some(metadata);
        self
    }

    async fn send(self) -> Result<Executed<E>, ExecuteError<C::Rejection>> {
        let Execute { raw, command, expected, key, metadata, .. } = self;
        let entity = raw.here.check().map_err(AppendError::from)?;
        let ask = Ask::Execute {
            command: C::name().to_owned(),
            fields: wire::encode(&command),
            expected,
            key: key.unwrap_or_else(own_key),
            metadata,
        };
        let lost = |what: &str| AppendError::Unknown { entity, detail: what.to_owned(), has_key: true };
        match raw.ask(ask).await.map_err(AppendError::from)? {
            Reply::Executed { version, events, repeated } => {
                let events: Result<Vec<E::Event>, _> = events.iter().map(NewEvent::decode::<E>).collect();
                let events =
                    events.map_err(|_| lost("its events cannot be read here; the nodes run different versions"))?;
                Ok(Executed { version, events, is_repeated: repeated })
            }
            Reply::Rejected(rejection) => match wire::decode(&rejection) {
                Some(rejection) => Err(ExecuteError::Rejected(rejection)),
                None => Err(lost("its rejection cannot be read here; the nodes run different versions").into()),
            },
            Reply::Failed(failure) => Err(error_of(entity, failure).into()),
            _ => Err(unexpected().into()),
        }
    }
}

impl<'a, E, C> IntoFuture for Execute<'a, E, C>
where
    E: Entity,
    C: Command<E> + Serialize + DeserializeOwned + Sync,
    C::Rejection: Serialize + DeserializeOwned,
{
    type Output = Result<Executed<E>, ExecuteError<C::Rejection>>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}
