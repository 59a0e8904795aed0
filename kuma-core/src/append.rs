//! An append on its way from the caller to the disk.

use std::{
    future::{Future, IntoFuture},
    pin::Pin,
    task::{Context, Poll},
};

use crate::{
    AppendError, Metadata, RawHandle, Refused, Sequence, Version,
    actor::Content,
    body::EncodedEvents,
    handle::{Answer, Write},
    kind::Decoded,
    reply::Written,
    retry::{self, RetryKey},
};

/// An append that is described and not sent yet: `.await` sends it and waits until it is durable, [`Append::submit`] only sends it.
#[must_use = "nothing is sent until it is awaited or submitted"]
pub struct Append<'a> {
    handle: &'a RawHandle,
    prepared: Result<(EncodedEvents, Decoded), Refused>,
    expected: Option<Version>,
    metadata: Option<Metadata>,
    retry: Option<RetryKey>,
    sequence: Option<Sequence>,
}

/// An append on its way. Resolves once it is durable, or was refused. Dropping it changes nothing about the append.
#[must_use = "the outcome is only known when this resolves"]
pub struct Pending(pub(crate) Answer);

/// What became of an append that was not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The version that its last event made.
    pub version: Version,
    /// Whether this is the outcome of an earlier append with the same idempotency key.
    pub repeated: bool,
}

impl Pending {
    /// Resolves like the value itself, and tells whether the append had happened before.
    ///
    /// # Errors
    /// As the append.
    /// # Cancel safety
    /// If the future is dropped the outcome is unknown; nothing changes about the append.
    pub async fn appended(self) -> Result<Appended, AppendError> {
        appended(self.0.await)
    }
}

fn appended(written: Result<Written, AppendError>) -> Result<Appended, AppendError> {
    written.map(|written| match written {
        Written::Repeated(version, _) => Appended { version, repeated: true },
        Written::Committed(version) => Appended { version, repeated: false },
        Written::Rejected => unreachable!("only commands are rejected"),
    })
}

impl Future for Pending {
    type Output = Result<Version, AppendError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|written| appended(written).map(|appended| appended.version))
    }
}

impl<'a> Append<'a> {
    pub(crate) fn new(handle: &'a RawHandle, prepared: Result<(EncodedEvents, Decoded), Refused>) -> Self {
        Append { handle, prepared, expected: None, metadata: None, retry: None, sequence: None }
    }

    /// Refuses the append unless the entity is at this version, [`Version(0)`](Version) for one that has no events.
    pub fn expecting(mut self, version: Version) -> Self {
        self.expected = Some(version);
        self
    }

    /// Makes the append happen once, however often it is sent: an append with the same key and events as one that was committed
    /// returns that one's version and writes nothing, whatever version is expected. The same key with other events is
    /// refused ([`Refused::KeyReused`]). Keys are 1 to 256 bytes, unique within the entity, and kept as long as its events are (as a
    /// keyed hash).
    ///
    /// Metadata and the expected version may differ between attempts; those of the first one stay. Events are compared as they are
    /// encoded: one with a field that has no fixed order (a `HashMap`) should have a `BTreeMap` instead, and a retry of a request that
    /// was sent before [`Entity::SCHEMA`](crate::Entity::SCHEMA) was raised is refused, not doubled.
    pub fn idempotency_key(mut self, key: impl AsRef<[u8]>) -> Self {
        if let Ok((events, _)) = &self.prepared {
            match RetryKey::new(key.as_ref(), retry::fingerprint_of_events(events.items())) {
                Ok(retry) => self.retry = Some(retry),
                Err(refused) => self.prepared = Err(refused),
            }
        }
        self
    }

    /// Keeps this beside the events, sealed with them.
    pub fn metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = Some(metadata);
        self
    }

    /// Refuses the append if an earlier one of the same sequence failed. For appends that are submitted one after the other without
    /// waiting; all of one sequence go to one entity.
    pub fn in_sequence(mut self, sequence: &Sequence) -> Self {
        self.sequence = Some(sequence.clone());
        self
    }

    /// Sends the append and returns as soon as it has its place in the entity's order; appends submitted one after the other are
    /// decided in that order and share disk syncs.
    ///
    /// # Errors
    /// It was refused before it was sent, or there is too much on the way already.
    /// # Cancel safety
    /// Cancel safe until the entity is found: if the future is dropped before it returns, nothing was sent (and its sequence is
    /// broken).
    pub async fn submit(self) -> Result<Pending, AppendError> {
        let Append { handle, prepared, expected, metadata, retry, sequence } = self;
        // From here on, whatever keeps it from being committed breaks its sequence.
        let link = sequence.map(|sequence| sequence.link());
        let (events, decoded) = prepared?;
        let content = Content::Events(events, decoded);
        handle.submit(Write { content, expected, metadata, retry, link }).await.map(Pending)
    }
}

impl<'a> IntoFuture for Append<'a> {
    type Output = Result<Version, AppendError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.submit().await?.await })
    }
}
