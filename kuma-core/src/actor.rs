//! The entity actor: the only writer of one entity's events.
//!
//! It decides on its newest state and does not wait for the disk: a commit goes to the shard's writer together with the caller's
//! reply, and the next message is taken. What is durable is learned from the [`Activation`] that actor and writer share, when the
//! next message comes.
//!
//! ```text
//!           first use                       commit ──► in flight ──COMMIT──► durable, published
//! unloaded ──replay──► loaded ──append──►  /
//!    ▲                   │  ▲──────────────
//!    └── voided (a commit failed), or user code panicked in a way that left no good state
//! ```
//!
//! Invariants:
//! - `speculative` is the published state plus the commits in flight, in order.
//! - A refusal that depends on the state is held until the state it was decided on is durable: it would otherwise be an answer
//!   about a future that may not come.
//! - The mailbox is never lost to a fault of a request, of user code or of the disk: `handle` does not fail, an unloaded entity
//!   replays before its next message, and an actor leaves by `drain`.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::SystemTime,
};

use kuma_crypto::{CommitPlace, IdHash, KeyId, seal_commit_parts, seal_id};
use kuma_shard::{Activation, Commit, CopyId, EntityRow, Submission};
use parking_lot::Mutex;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use crate::{
    AppendError, Metadata, ReadError, Refused, Unavailable, Version,
    body::EncodedEvents,
    identity::Identity,
    kind::{Decoded, Kind, State},
    live::{Durable, Published, View},
    micros,
    replay::{self, Opener},
    reply::AppendReply,
    shard_core::ShardCore,
};

/// An append as it reaches the actor: encoded, decoded again, and admitted.
pub(crate) struct AppendRequest {
    pub(crate) events: EncodedEvents,
    pub(crate) decoded: Decoded,
    pub(crate) expected: Option<Version>,
    pub(crate) metadata: Option<Metadata>,
    pub(crate) reply: AppendReply,
}

/// What an entity can be asked.
pub(crate) enum EntityMessage {
    /// Append, if the entity is at the expected version. Answered once durable.
    Append(Box<AppendRequest>),
    /// The durable state; after the appends that came before, if `after_appends`.
    Read { after_appends: bool, reply: oneshot::Sender<Result<Durable, ReadError>> },
    /// What it takes to read the entity's stored events; none if it has none.
    Open { reply: oneshot::Sender<Result<Option<Opener>, ReadError>> },
}

impl ractor::Message for EntityMessage {} // local only: it never crosses a node

impl EntityMessage {
    /// Answers whoever asked. A caller that is gone does not want to know.
    fn refuse(self, error: ReadError) {
        match self {
            EntityMessage::Append(request) => request.reply.send(Err(error.into())),
            EntityMessage::Read { reply, .. } => drop(reply.send(Err(error))),
            EntityMessage::Open { reply } => drop(reply.send(Err(error))),
        }
    }
}

/// The behaviour. Stateless: everything mutable is in [`EntityState`].
pub(crate) struct EntityActor;

/// What an entity's actor is made of.
pub(crate) struct EntityState {
    pub(crate) core: Arc<ShardCore>,
    pub(crate) kind: Arc<dyn Kind>,
    pub(crate) identity: Arc<Identity>,
    pub(crate) view: Arc<View>,
    /// Boxed: most live entities are idle.
    pub(crate) loaded: Option<Box<Loaded>>,
}

/// An entity that was replayed.
pub(crate) struct Loaded {
    activation: Arc<Activation>,
    opener: Option<Opener>,
    /// Whether the entity's row is stored, or in flight.
    created: bool,
    version: u64,
    at_us: i64,
    /// Absent until the first append.
    speculative: Option<State>,
    in_flight: VecDeque<InFlight>,
}

struct InFlight {
    last_version: u64,
    events: Decoded,
}

impl Actor for EntityActor {
    type Msg = EntityMessage;
    type State = EntityState;
    type Arguments = EntityState;

    async fn pre_start(
        &self,
        _me: ActorRef<EntityMessage>,
        state: EntityState,
    ) -> Result<EntityState, ActorProcessingErr> {
        Ok(state)
    }

    /// Dispatch only. Never `Err` for a refusal: ractor would drop the mailbox.
    async fn handle(
        &self,
        me: ActorRef<EntityMessage>,
        message: EntityMessage,
        state: &mut EntityState,
    ) -> Result<(), ActorProcessingErr> {
        state.view.usage.touch(&state.core.clock);
        if let Some(wait) = state.take(&me, message) {
            Box::pin(state.take_after(&me, wait)).await;
        }
        Ok(())
    }

    async fn post_stop(&self, _me: ActorRef<EntityMessage>, state: &mut EntityState) -> Result<(), ActorProcessingErr> {
        // Whoever activates the entity next must find all that was submitted.
        if let Some(loaded) = state.loaded.take().filter(|loaded| !loaded.in_flight.is_empty()) {
            state.core.settled(&loaded.activation).await;
        }
        Ok(())
    }
}

/// What has to be waited for before a message can be taken, or after it was.
enum Wait {
    /// The entity is not in memory.
    Load(EntityMessage),
    /// The entity has no key yet.
    Key(Box<AppendRequest>),
    /// The newest state was lost.
    Rebuild,
    /// What is in memory is not to be used any more.
    Unload,
}

impl EntityState {
    /// Takes a message, if that needs no waiting; the usual one needs none.
    ///
    /// An actor's task has room for its largest future for as long as it lives, so that whatever an idle entity does not need (replay,
    /// a new key, recovery) is in [`EntityState::take_after`], which is boxed: 2 KiB less for each live entity.
    fn take(&mut self, me: &ActorRef<EntityMessage>, message: EntityMessage) -> Option<Wait> {
        if !self.is_loaded() {
            return Some(Wait::Load(message));
        }
        let loaded = self.loaded.as_deref()?;
        match message {
            EntityMessage::Append(request) if loaded.opener.is_none() => Some(Wait::Key(request)),
            EntityMessage::Append(request) => self.append(*request),
            EntityMessage::Read { after_appends, reply } => {
                self.read(me, after_appends, reply);
                None
            }
            EntityMessage::Open { reply } => {
                // A caller that is gone does not want to know.
                let _ = reply.send(Ok(loaded.opener.as_ref().map(Opener::share)));
                None
            }
        }
    }

    /// Waits for what a message needs, and takes it then.
    async fn take_after(&mut self, me: &ActorRef<EntityMessage>, wait: Wait) {
        let mut next = Some(wait);
        while let Some(wait) = next.take() {
            match wait {
                Wait::Load(message) => match self.load().await {
                    Ok(()) => next = self.take(me, message),
                    Err(error) => message.refuse(error),
                },
                Wait::Key(request) => match self.create_key().await {
                    Ok(()) => next = self.take(me, EntityMessage::Append(request)),
                    Err(cause) => EntityMessage::Append(request)
                        .refuse(Unavailable::NoKey { entity: self.identity.hash, cause }.into()),
                },
                Wait::Rebuild => self.rebuild().await,
                Wait::Unload => self.unload().await,
            }
        }
    }

    fn append(&mut self, request: AppendRequest) -> Option<Wait> {
        let AppendRequest { events, decoded, expected, metadata, reply } = request;
        let entity = self.identity.hash;
        let actual = Version(self.loaded.as_deref()?.version);
        if let Some(expected) = expected.filter(|expected| *expected != actual) {
            self.refuse(Refused::WrongVersion { entity, expected, actual }, reply);
            return None;
        }
        if !self.speculate(&decoded) {
            self.refuse(Refused::ApplyPanicked { entity }, reply);
            return Some(Wait::Rebuild);
        }
        if let Err(error) = self.submit(events, decoded, metadata.as_ref(), reply) {
            // The state has the events and the log has not: start over.
            tracing::error!(%entity, error = %error, "a commit could not be encoded");
            return Some(Wait::Unload);
        }
        None
    }

    async fn create_key(&mut self) -> Result<(), crate::VaultError> {
        let opener = new_opener(&self.core, &*self.kind, &self.identity).await?;
        if let Some(loaded) = self.loaded.as_deref_mut() {
            loaded.opener = Some(opener);
        }
        Ok(())
    }

    /// Applies events to the newest state; false if that panicked and there is no such state any more.
    fn speculate(&mut self, events: &Decoded) -> bool {
        let Some(loaded) = self.loaded.as_deref_mut() else { return false };
        let (kind, published) = (&*self.kind, &self.view.published);
        let before = loaded.speculative.take();
        let applied = catch_unwind(AssertUnwindSafe(|| {
            let mut state = before.or_else(|| Some(kind.copy(&durable(published)?)))?;
            kind.apply(&mut state, events);
            Some(state)
        }));
        loaded.speculative = applied.ok().flatten();
        loaded.speculative.is_some()
    }

    /// Makes the newest state again, after it was lost.
    async fn rebuild(&mut self) {
        let Some(loaded) = self.loaded.as_deref_mut() else { return };
        let (kind, published) = (&*self.kind, &self.view.published);
        let in_flight = &loaded.in_flight;
        let rebuilt = catch_unwind(AssertUnwindSafe(|| {
            let mut state = kind.copy(&durable(published)?);
            in_flight.iter().for_each(|commit| kind.apply(&mut state, &commit.events));
            Some(state)
        }));
        match rebuilt {
            Ok(Some(state)) => loaded.speculative = Some(state),
            // What was applied once does not apply again: only the disk knows better.
            _ => {
                self.core.record_failure(
                    self.identity.hash,
                    "its `apply` panicked on events that it had applied before".into(),
                    false,
                );
                self.unload().await;
            }
        }
    }

    /// Forgets everything but what is stored.
    async fn unload(&mut self) {
        if let Some(loaded) = self.loaded.take() {
            self.core.settled(&loaded.activation).await;
            *self.view.published.lock() = None;
        }
    }

    /// Seals the commit and hands it to the writer, with the reply.
    fn submit(
        &mut self,
        events: EncodedEvents,
        decoded: Decoded,
        metadata: Option<&Metadata>,
        reply: AppendReply,
    ) -> Result<(), rmp_serde::encode::Error> {
        let Some(loaded) = self.loaded.as_deref_mut() else { return Ok(()) };
        let Some(opener) = &mut loaded.opener else { return Ok(()) };
        let head = events.head(metadata)?;
        let (first_version, count) = (loaded.version + 1, events.count);
        // Monotone per entity, also when the clock jumps back.
        let at_us = micros(SystemTime::now()).max(loaded.at_us);
        let row = opener.row.clone();
        let place = CommitPlace {
            kind: &row.kind,
            id_hash: IdHash(row.id_hash.0),
            first_version,
            count,
            at_us,
            key_id: KeyId(row.key_id),
        };
        if !loaded.created {
            opener.row = Arc::new(row.without_id());
        }
        let commit = Commit {
            entity: row.clone(),
            create: !loaded.created,
            first_version,
            count,
            at_us,
            append_key: None,
            body: seal_commit_parts(&opener.key, &place, &[&head, events.items()]),
        };
        loaded.created = true;
        loaded.version += u64::from(count);
        loaded.at_us = at_us;
        if loaded.in_flight.capacity() == 0 {
            // Most entities never have more than one, and a growing queue would start with room for four.
            loaded.in_flight.reserve_exact(1);
        }
        loaded.in_flight.push_back(InFlight { last_version: loaded.version, events: decoded });
        let (entity, version) = (self.identity.hash, Version(loaded.version));
        let on_settled = Box::new(move |result: Result<(), _>| {
            reply.send(result.map(|()| version).map_err(|error| AppendError::from_commit(entity, error)));
        });
        self.core.shard.submit(Submission { activation: loaded.activation.clone(), commit: Some(commit), on_settled });
        Ok(())
    }

    /// Refuses an append once the state that it was decided on is durable.
    fn refuse(&self, refusal: Refused, reply: AppendReply) {
        match self.loaded.as_deref().filter(|loaded| !loaded.in_flight.is_empty()) {
            None => reply.send(Err(refusal.into())),
            Some(loaded) => {
                let entity = self.identity.hash;
                let on_settled = Box::new(move |result: Result<(), _>| {
                    reply.send(Err(match result {
                        Ok(()) => refusal.into(),
                        Err(error) => AppendError::from_commit(entity, error),
                    }));
                });
                self.core.shard.submit(Submission { activation: loaded.activation.clone(), commit: None, on_settled });
            }
        }
    }

    fn read(
        &self,
        me: &ActorRef<EntityMessage>,
        after_appends: bool,
        reply: oneshot::Sender<Result<Durable, ReadError>>,
    ) {
        if let Some(loaded) = self.loaded.as_deref().filter(|loaded| after_appends && !loaded.in_flight.is_empty()) {
            // Whatever becomes of them, the state is read when they are settled. An actor that is gone by then drops the reply, and
            // the reader asks again.
            let (me, again) = (me.clone(), EntityMessage::Read { after_appends: false, reply });
            let on_settled = Box::new(move |_| drop(me.cast(again)));
            let activation = loaded.activation.clone();
            return self.core.shard.submit(Submission { activation, commit: None, on_settled });
        }
        let durable = self.view.published.lock().as_ref().map(|published| published.durable.clone());
        // A caller that is gone does not want to know.
        let _ = reply.send(durable.ok_or_else(|| Unavailable::Interrupted { entity: self.identity.hash }.into()));
    }

    /// Whether the entity can be used as it is now, with all that became durable published.
    fn is_loaded(&mut self) -> bool {
        if self.loaded.as_ref().is_some_and(|loaded| loaded.activation.is_voided()) {
            // The writer refuses what is left of this activation, so that there is nothing to wait for.
            self.loaded = None;
        }
        self.loaded.is_some() && self.publish()
    }

    /// Replays the entity, after whatever is left of an earlier activation was settled.
    async fn load(&mut self) -> Result<(), ReadError> {
        self.unload().await;
        self.replay().await
    }

    async fn replay(&mut self) -> Result<(), ReadError> {
        let entity = self.identity.hash;
        self.core.check_quarantine(entity)?;
        let replayed = replay::replay(&self.core, &*self.kind, &self.identity).await.inspect_err(|error| {
            if let ReadError::Unavailable(Unavailable::Unreadable { cause, .. }) = error
                && cause.is_own_fault()
            {
                self.core.record_failure(entity, cause.to_string(), cause.is_damage());
            }
        })?;
        let activation = Arc::new(Activation::at(replayed.version));
        self.view.usage.set_state_bytes(self.kind.memory_bytes(&replayed.state));
        let durable = Durable { state: replayed.state, version: Version(replayed.version) };
        *self.view.published.lock() = Some(Published { durable, activation: activation.clone() });
        self.loaded = Some(Box::new(Loaded {
            activation,
            created: replayed.opener.is_some(),
            opener: replayed.opener,
            version: replayed.version,
            at_us: replayed.at_us,
            speculative: None,
            in_flight: VecDeque::new(),
        }));
        Ok(())
    }

    /// Publishes the commits that became durable. False if that failed and the entity has to be replayed.
    fn publish(&mut self) -> bool {
        let Some(loaded) = self.loaded.as_deref_mut() else { return true };
        let committed = loaded.activation.committed();
        if loaded.in_flight.front().is_none_or(|commit| commit.last_version > committed) {
            return true;
        }
        let mut published = self.view.published.lock();
        let Some(now) = published.as_mut() else { return false };
        let before = now.durable.version.0;
        while let Some(commit) = loaded.in_flight.pop_front_if(|commit| commit.last_version <= committed) {
            let (kind, durable) = (&*self.kind, &mut now.durable);
            if catch_unwind(AssertUnwindSafe(|| kind.apply(&mut durable.state, &commit.events))).is_err() {
                *published = None;
                let why = "its `apply` panicked on events that it had applied before";
                self.core.record_failure(self.identity.hash, why.into(), false);
                return false;
            }
            durable.version = Version(commit.last_version);
        }
        // Now and then: a large state is not measured for nothing.
        if now.durable.version.0 / 64 != before / 64 {
            self.view.usage.set_state_bytes(self.kind.memory_bytes(&now.durable.state));
        }
        true
    }
}

/// The published state.
fn durable(published: &Mutex<Option<Published>>) -> Option<State> {
    published.lock().as_ref().map(|published| published.durable.state.clone())
}

/// A key and a row for an entity that has none yet.
async fn new_opener(core: &ShardCore, kind: &dyn Kind, identity: &Identity) -> Result<Opener, crate::VaultError> {
    let (key_id, key) = core.vault.create(identity.hash).await?;
    let sealed_id = seal_id(&key, kind.name(), IdHash(identity.hash.0), key_id, &identity.id);
    let row = EntityRow {
        eid: core.shard.allocate_eid(),
        copy: CopyId::GENESIS,
        slot: identity.slot,
        kind: kind.name().clone(),
        id_hash: identity.hash,
        sealed_id,
        key_id: key_id.0,
        created_at_us: micros(SystemTime::now()),
        erased_at_us: None,
    };
    Ok(Opener { row: Arc::new(row), key })
}
