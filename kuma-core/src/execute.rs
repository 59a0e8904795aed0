//! A command on its way from the caller to the entity and back.

use std::{
    future::{Future, IntoFuture},
    pin::Pin,
    sync::Arc,
};

use serde::Serialize;

use crate::{
    AppendError, Command, Entity, ExecuteError, Executed, Metadata, RawHandle, Refused, Version,
    actor::Content,
    command::{Slot, TypedCommand},
    handle::{Answer, Write},
    reply::Written,
    retry::{self, RetryKey},
};

/// A command that is described and not sent yet: `.await` sends it and waits for its events to be durable, [`Execute::submit`] only
/// sends it.
#[must_use = "nothing is sent until it is awaited or submitted"]
pub struct Execute<'a, E, C> {
    handle: &'a RawHandle,
    command: C,
    expected: Option<Version>,
    metadata: Option<Metadata>,
    retry: Result<Option<RetryKey>, Refused>,
    entity: std::marker::PhantomData<fn() -> E>,
}

/// A command on its way, see [`Execute::submit`].
#[must_use = "the outcome is only known when this is awaited"]
pub struct Executing<E: Entity, R> {
    answer: Answer,
    slot: Slot<E, R>,
}

impl<'a, E: Entity, C: Command<E>> Execute<'a, E, C> {
    pub(crate) fn new(handle: &'a RawHandle, command: C) -> Self {
        let entity = std::marker::PhantomData;
        Execute { handle, command, expected: None, metadata: None, retry: Ok(None), entity }
    }

    /// Refuses the command unless the entity is at this version.
    pub fn expecting(mut self, version: Version) -> Self {
        self.expected = Some(version);
        self
    }

    /// Keeps this beside the events, sealed with them.
    pub fn metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = Some(metadata);
        self
    }

    /// Makes the command happen once, however often it is sent: the same command with the key of one that was committed returns
    /// that one's version and events, without deciding again. The same key with another command, or other fields, is refused
    /// ([`Refused::KeyReused`]). A rejection, or a command that had nothing to do, is not remembered: a retry decides anew.
    pub fn idempotency_key(mut self, key: impl AsRef<[u8]>) -> Self
    where
        C: Serialize,
    {
        let fields = rmp_serde::to_vec_named(&self.command)
            .map_err(|error| Refused::Undecodable { event: C::name().to_owned(), detail: error.to_string() });
        self.retry = fields.and_then(|fields| {
            RetryKey::new(key.as_ref(), retry::fingerprint_of_command(C::name(), &fields)).map(Some)
        });
        self
    }

    /// Sends the command and returns as soon as it has its place in the entity's order.
    ///
    /// # Errors
    /// It was refused before it was sent, or there is too much on the way already.
    /// # Cancel safety
    /// Cancel safe until the entity is found: if the future is dropped before it returns, nothing was sent.
    pub async fn submit(self) -> Result<Executing<E, C::Rejection>, AppendError> {
        let Execute { handle, command, expected, metadata, retry, .. } = self;
        let slot: Slot<E, C::Rejection> = Arc::default();
        let command = TypedCommand { command, limits: handle.limits(), slot: slot.clone() };
        let content = Content::Command(Box::new(command));
        let answer = handle.submit(Write { content, expected, metadata, retry: retry?, link: None }).await?;
        Ok(Executing { answer, slot })
    }
}

impl<E: Entity, R> Executing<E, R> {
    /// Waits until the command's events are durable, or it is rejected.
    ///
    /// # Errors
    /// As [`Handle::execute`](crate::Handle::execute).
    /// # Cancel safety
    /// If the future is dropped the outcome is unknown; nothing changes about the command.
    pub async fn executed(self) -> Result<Executed<E>, ExecuteError<R>> {
        let Executing { answer, slot } = self;
        let (entity, has_key) = (answer.entity(), answer.has_key());
        let written = answer.await?;
        let decided = slot.lock().take();
        match (written, decided) {
            (Written::Rejected, Some(Err(rejection))) => Err(ExecuteError::Rejected(rejection)),
            (Written::Committed(version), Some(Ok(events))) => Ok(Executed { version, events, repeated: false }),
            (Written::Repeated(version, Some(events)), _) if events.is::<Vec<E::Event>>() => {
                let events = events.downcast().map(|events| *events).unwrap_or_default();
                Ok(Executed { version, events, repeated: true })
            }
            // The actor and this future speak of the same types.
            _ => Err(AppendError::Unknown { entity, detail: "its answer was lost".to_owned(), has_key }.into()),
        }
    }
}

impl<'a, E: Entity, C: Command<E>> IntoFuture for Execute<'a, E, C> {
    type Output = Result<Executed<E>, ExecuteError<C::Rejection>>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.submit().await?.executed().await })
    }
}
