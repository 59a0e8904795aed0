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
    time::Instant,
};

use kuma_crypto::{AppendKeyHash, CommitPlace, IdHash, KeyId, seal_commit_parts, seal_id};
use kuma_shard::{Activation, Commit, CopyId, EntityRow, LogRow, OnSettled, Submission};
use parking_lot::Mutex;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use crate::{
    AppendError, Metadata, Outcome, ReadError, Refused, ReplayError, Unavailable, Version, audit,
    body::{Body, EncodedEvents, Fingerprint},
    command::{Decide, Decision},
    identity::Identity,
    kind::{Decoded, Kind, State},
    live::{Durable, Published, View},
    replay::{self, Opener},
    reply::{WriteReply, Written},
    retry::{KNOWN_KEYS_MAX, KnownKeys, RetryKey},
    sequence::Link,
    shard_core::ShardCore,
    snapshot::ReplayCost,
    snapshotter::SnapshotJob,
    vault::AUDIT_KEY,
};

/// An entity is told at once that a commit of so many bytes is durable. One that is smaller it may hold until its next message: decoded events
/// take several times what they take encoded.
const NUDGE_BYTES: usize = 4 << 10;

/// A write as it reaches the actor, admitted.
pub(crate) struct WriteRequest {
    pub(crate) content: Content,
    pub(crate) expected: Option<Version>,
    pub(crate) metadata: Option<Metadata>,
    pub(crate) retry: Option<RetryKey>,
    pub(crate) reply: WriteReply,
}

/// What is to be written.
pub(crate) enum Content {
    /// These events, encoded and decoded again.
    Events(EncodedEvents, Decoded),
    /// Whatever this decides.
    Command(Box<dyn Decide>),
}

/// What an entity can be asked.
pub(crate) enum EntityMessage {
    /// Append or decide, if the entity is at the expected version. Answered once durable.
    Write(Box<WriteRequest>),
    /// The durable state; after the appends that came before, if `after_appends`.
    Read { after_appends: bool, reply: oneshot::Sender<Result<Durable, ReadError>> },
    /// What it takes to read the entity's stored events; none if it has none.
    Open { reply: oneshot::Sender<Result<Option<Opener>, ReadError>> },
    /// Publish what became durable, for the memory that it takes until then.
    Publish,
    /// What became of the request with this idempotency key.
    Outcome { key: Box<[u8]>, reply: oneshot::Sender<Result<Outcome, ReadError>> },
}

impl ractor::Message for EntityMessage {} // local only: it never crosses a node

impl EntityMessage {
    /// Answers whoever asked. A caller that is gone does not want to know.
    fn refuse(self, error: ReadError) {
        match self {
            EntityMessage::Write(request) => request.reply.send(Err(error.into())),
            EntityMessage::Read { reply, .. } => drop(reply.send(Err(error))),
            EntityMessage::Open { reply } => drop(reply.send(Err(error))),
            EntityMessage::Outcome { reply, .. } => drop(reply.send(Err(error))),
            EntityMessage::Publish => {}
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
    /// The first version of the newest published commit.
    last_first: u64,
    /// Of what is published, on top of the newest snapshot.
    cost: ReplayCost,
    /// Absent until the first append.
    speculative: Option<State>,
    in_flight: VecDeque<InFlight>,
    /// Absent until the first append with an idempotency key.
    keys: Option<Box<KnownKeys>>,
}

struct InFlight {
    last_version: u64,
    body_bytes: u32,
    events: Decoded,
    key: Option<Box<AppendKeyHash>>,
}

impl Loaded {
    fn is_in_flight(&self, key: &AppendKeyHash) -> bool {
        self.in_flight.iter().any(|commit| commit.key.as_deref() == Some(key))
    }
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
        if matches!(message, EntityMessage::Publish) {
            // Nobody uses the entity, and nothing is to be brought into memory for it. Should that fail, nothing is to be left either.
            if state.loaded.is_some() && !state.is_loaded() {
                Box::pin(state.take_after(&me, Wait::Unload)).await;
            }
            return Ok(());
        }
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
    /// The entity has no key yet, and something to be written.
    Key(Box<WriteRequest>),
    /// Another request with the same idempotency key is in flight. Everything else waits along, so that the order stays.
    InFlight(Box<WriteRequest>, Arc<Activation>),
    /// The entity's idempotency keys are not in memory.
    KnownKeys(Box<WriteRequest>),
    /// A request's idempotency key may be stored.
    Lookup(Box<WriteRequest>, AppendKeyHash),
    /// Whether an idempotency key is stored is asked.
    Outcome(AppendKeyHash, oneshot::Sender<Result<Outcome, ReadError>>),
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
            EntityMessage::Write(request) => self.write(me, request),
            EntityMessage::Read { after_appends, reply } => {
                self.read(me, after_appends, reply);
                None
            }
            EntityMessage::Open { reply } => {
                // A caller that is gone does not want to know.
                let _ = reply.send(Ok(loaded.opener.as_ref().map(Opener::share)));
                None
            }
            EntityMessage::Publish => None,
            EntityMessage::Outcome { key, reply } => {
                let key = loaded.opener.as_ref().map(|opener| opener.append_key(&key));
                let outcome = match key {
                    Some(key) if !loaded.is_in_flight(&key) => return Some(Wait::Outcome(key, reply)),
                    Some(_) => Outcome::InFlight,
                    None => Outcome::NeverSeen,
                };
                let _ = reply.send(Ok(outcome));
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
                    Ok(()) => next = self.write(me, request),
                    Err(cause) => {
                        request.reply.send(Err(Unavailable::NoKey { entity: self.identity.hash, cause }.into()))
                    }
                },
                Wait::InFlight(request, activation) => {
                    self.core.settled(&activation).await;
                    next = self.take(me, EntityMessage::Write(request));
                }
                Wait::KnownKeys(request) => match self.load_keys().await {
                    Ok(()) => next = self.write(me, request),
                    Err(cause) => request.reply.send(Err(self.unreadable(cause).into())),
                },
                Wait::Lookup(request, key) => match self.find_append(&key).await {
                    Ok(None) => next = self.decide(me, *request, Some(key)),
                    Ok(Some(row)) => self.repeat(*request, &row),
                    Err(cause) => request.reply.send(Err(self.unreadable(cause).into())),
                },
                Wait::Outcome(key, reply) => {
                    let outcome = self.find_append(&key).await.map(|row| match row {
                        Some(row) => Outcome::Committed(Version(row.version + u64::from(row.count) - 1)),
                        None => Outcome::NeverSeen,
                    });
                    let _ = reply.send(outcome.map_err(|cause| self.unreadable(cause)));
                }
                Wait::Rebuild => self.rebuild().await,
                Wait::Unload => self.unload().await,
            }
        }
    }

    /// Sorts out whether the request happened before; decides it if not.
    fn write(&mut self, me: &ActorRef<EntityMessage>, request: Box<WriteRequest>) -> Option<Wait> {
        if request.reply.link.as_ref().is_some_and(Link::is_broken) {
            let entity = self.identity.hash;
            request.reply.send(Err(Unavailable::SequenceBroken { entity }.into()));
            return None;
        }
        let loaded = self.loaded.as_deref()?;
        // What was never written has no idempotency keys.
        let Some(opener) = &loaded.opener else { return self.decide(me, *request, None) };
        let Some(retry) = &request.retry else { return self.decide(me, *request, None) };
        let key = opener.append_key(&retry.key);
        if loaded.is_in_flight(&key) {
            return Some(Wait::InFlight(request, loaded.activation.clone()));
        }
        match &loaded.keys {
            // What was never committed has no keys.
            None if loaded.created => Some(Wait::KnownKeys(request)),
            Some(known) if known.may_contain(&key) => Some(Wait::Lookup(request, key)),
            _ => self.decide(me, *request, Some(key)),
        }
    }

    /// Answers with the outcome that the request had before.
    fn repeat(&self, request: WriteRequest, row: &LogRow) {
        let Some(opener) = self.loaded.as_deref().and_then(|loaded| loaded.opener.as_ref()) else { return };
        let version = Version(row.version + u64::from(row.count) - 1);
        let fingerprint = request.retry.map(|retry| retry.fingerprint);
        let with_events = matches!(request.content, Content::Command(_));
        let outcome = match original(&*self.kind, opener, row, fingerprint, with_events) {
            Ok(Some(events)) => Ok(Written::Repeated(version, events)),
            Ok(None) => Err(Refused::KeyReused { entity: self.identity.hash, version }.into()),
            Err(cause) => Err(self.unreadable(cause).into()),
        };
        request.reply.send(outcome);
    }

    fn unreadable(&self, cause: ReplayError) -> ReadError {
        ReadError::unreadable(self.identity.hash, cause)
    }

    fn decide(
        &mut self,
        me: &ActorRef<EntityMessage>,
        request: WriteRequest,
        key: Option<AppendKeyHash>,
    ) -> Option<Wait> {
        let WriteRequest { content, expected, metadata, retry, mut reply } = request;
        let span = reply.span.clone();
        let _in_span = span.enter();
        let entity = self.identity.hash;
        let actual = Version(self.loaded.as_deref()?.version);
        if let Some(expected) = expected.filter(|expected| *expected != actual) {
            self.refuse(Refused::WrongVersion { entity, expected, actual }, reply);
            return None;
        }
        let (events, decoded) = match content {
            Content::Events(events, decoded) => (events, decoded),
            Content::Command(command) => {
                let Some(state) = self.newest() else {
                    reply.send(Err(Unavailable::Interrupted { entity }.into()));
                    return Some(Wait::Unload);
                };
                match catch_unwind(AssertUnwindSafe(|| command.decide(&state))) {
                    Ok(Decision::Events(events, decoded)) => {
                        reply.grow(events.bytes);
                        (events, decoded)
                    }
                    Ok(Decision::Nothing) => {
                        self.answer(Ok(Written::Committed(actual)), reply);
                        return None;
                    }
                    Ok(Decision::Rejected) => {
                        self.answer(Ok(Written::Rejected), reply);
                        return None;
                    }
                    Ok(Decision::Refused(refused)) => {
                        self.refuse(refused, reply);
                        return None;
                    }
                    Err(_) => {
                        self.refuse(Refused::CommandPanicked { entity }, reply);
                        return None;
                    }
                }
            }
        };
        if self.loaded.as_deref()?.opener.is_none() {
            // Only now: a request that comes to nothing leaves no key behind.
            let content = Content::Events(events, decoded);
            return Some(Wait::Key(Box::new(WriteRequest { content, expected, metadata, retry, reply })));
        }
        if !self.speculate(&decoded) {
            self.refuse(Refused::ApplyPanicked { entity }, reply);
            return Some(Wait::Rebuild);
        }
        let retry = key.zip(retry.map(|retry| retry.fingerprint));
        if let Err(error) = self.submit(me, events, decoded, metadata.as_ref(), retry, reply) {
            // The state has the events and the log has not: start over.
            tracing::error!(%entity, error = %error, "a commit could not be encoded");
            return Some(Wait::Unload);
        }
        None
    }

    /// The state with all that is in flight.
    fn newest(&self) -> Option<State> {
        let loaded = self.loaded.as_deref()?;
        loaded.speculative.clone().or_else(|| durable(&self.view.published))
    }

    /// The entity's commit with this idempotency key, if there is one.
    async fn find_append(&self, key: &AppendKeyHash) -> Result<Option<LogRow>, ReplayError> {
        let row = self.loaded.as_deref().and_then(|loaded| loaded.opener.as_ref()).map(|opener| opener.row.clone());
        match row {
            Some(row) => Ok(self.core.shard.find_append(&row, &key.0).await?),
            None => Ok(None),
        }
    }

    async fn load_keys(&mut self) -> Result<(), ReplayError> {
        let Some(loaded) = self.loaded.as_deref_mut() else { return Ok(()) };
        let Some(opener) = &loaded.opener else { return Ok(()) };
        // One more than are kept, to see whether these are all.
        let stored = self.core.shard.append_keys(&opener.row, KNOWN_KEYS_MAX as u32 + 1).await?;
        let mut known = KnownKeys::new(&stored);
        loaded.in_flight.iter().filter_map(|commit| commit.key.as_deref()).for_each(|key| known.insert(key));
        loaded.keys = Some(Box::new(known));
        Ok(())
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
        me: &ActorRef<EntityMessage>,
        events: EncodedEvents,
        decoded: Decoded,
        metadata: Option<&Metadata>,
        retry: Option<(AppendKeyHash, Fingerprint)>,
        reply: WriteReply,
    ) -> Result<(), rmp_serde::encode::Error> {
        let Some(loaded) = self.loaded.as_deref_mut() else { return Ok(()) };
        let Some(opener) = &mut loaded.opener else { return Ok(()) };
        let head = events.head(metadata, retry.as_ref().map(|(_, fingerprint)| fingerprint))?;
        let (first_version, count) = (loaded.version + 1, events.count);
        // Monotone per entity, also when the clock jumps back.
        let at_us = self.core.settings.wall_clock.now_us().max(loaded.at_us);
        let row = opener.row.clone();
        let place = CommitPlace {
            kind: &row.kind,
            id_hash: IdHash(row.id_hash.0),
            first_version,
            count,
            at_us,
            key_id: KeyId(row.key_id),
        };
        let body = seal_commit_parts(&opener.key, &place, &[&head, events.items()]);
        let key = retry.map(|(key, _)| key);
        if let Some(key) = &key {
            loaded.keys.get_or_insert_with(|| Box::new(KnownKeys::new(&[]))).insert(key);
        }
        if loaded.in_flight.capacity() == 0 {
            // Most entities never have more than one, and a growing queue would start with room for four.
            loaded.in_flight.reserve_exact(1);
        }
        loaded.version += u64::from(count);
        loaded.at_us = at_us;
        loaded.in_flight.push_back(InFlight {
            last_version: loaded.version,
            // An append has at most 4 MiB.
            body_bytes: body.len() as u32,
            events: decoded,
            key: key.map(Box::new),
        });
        let create = !std::mem::replace(&mut loaded.created, true);
        let append_key = key.map(|key| key.0.to_vec());
        let (entity, version, has_key) = (self.identity.hash, Version(loaded.version), key.is_some());
        // Whoever appends much at once and then nothing would keep it in memory, decoded, until the next sweep.
        let nudged = (body.len() >= NUDGE_BYTES).then(|| me.clone());
        let on_settled = Box::new(move |result: Result<(), _>| {
            if result.is_ok() {
                reply.metrics.events.increment(u64::from(count));
            }
            let written = result.map(|()| Written::Committed(version));
            reply.send(written.map_err(|error| AppendError::from_commit(entity, error, has_key)));
            if let Some(me) = nudged {
                // One that has left has nothing to publish.
                let _ = me.cast(EntityMessage::Publish);
            }
        });
        let activation = loaded.activation.clone();
        let submission = |entity| {
            let commit = Commit { entity, create, first_version, count, at_us, append_key, body };
            Submission { activation, commit: Some(commit), on_settled }
        };
        match create {
            true => self.core.shard.submit_new(|eid| {
                let row = EntityRow { eid, ..(*row).clone() };
                opener.row = Arc::new(row.without_id());
                submission(Arc::new(row))
            }),
            false => self.core.shard.submit(submission(row)),
        }
        Ok(())
    }

    /// Refuses a write once the state that it was decided on is durable; what follows it in its sequence, at once.
    fn refuse(&self, refusal: Refused, reply: WriteReply) {
        reply.break_sequence();
        self.answer(Err(refusal.into()), reply);
    }

    /// Gives an answer that was decided on the newest state, once that state is durable.
    fn answer(&self, answer: Result<Written, AppendError>, reply: WriteReply) {
        let entity = self.identity.hash;
        self.when_settled(Box::new(move |settled| match settled {
            Ok(()) => reply.send(answer),
            // Nothing of it was written, whatever became of those before it.
            Err(error) => reply.send(Err(AppendError::from_commit(entity, error, true))),
        }));
    }

    /// Calls back when all that is in flight is settled, with an error if that failed.
    fn when_settled(&self, on_settled: OnSettled) {
        match self.loaded.as_deref().filter(|loaded| !loaded.in_flight.is_empty()) {
            None => on_settled(Ok(())),
            Some(loaded) => {
                let activation = loaded.activation.clone();
                self.core.shard.submit(Submission { activation, commit: None, on_settled });
            }
        }
    }

    fn read(
        &self,
        me: &ActorRef<EntityMessage>,
        after_appends: bool,
        reply: oneshot::Sender<Result<Durable, ReadError>>,
    ) {
        if after_appends && self.loaded.as_deref().is_some_and(|loaded| !loaded.in_flight.is_empty()) {
            // Whatever becomes of them, the state is read when they are settled. An actor that is gone by then drops the reply, and
            // the reader asks again.
            let (me, again) = (me.clone(), EntityMessage::Read { after_appends: false, reply });
            return self.when_settled(Box::new(move |_| drop(me.cast(again))));
        }
        let durable = self.view.published.lock().as_ref().map(|published| published.durable.clone());
        // A caller that is gone does not want to know.
        let _ = reply.send(durable.ok_or_else(|| Unavailable::Interrupted { entity: self.identity.hash }.into()));
    }

    /// Whether the entity can be used as it is now, with all that became durable published.
    fn is_loaded(&mut self) -> bool {
        self.loaded.as_ref().is_some_and(|loaded| !loaded.activation.is_voided()) && self.publish()
    }

    /// Replays the entity, after whatever is left of an earlier activation was settled: its callers, and their sequences, hear of
    /// their failure before anything else is decided.
    async fn load(&mut self) -> Result<(), ReadError> {
        self.unload().await;
        let span = tracing::debug_span!(
            target: "kuma::activate",
            "activate",
            entity = %self.identity.hash,
            slot = %self.identity.slot,
            shard = self.core.shard.number(),
            version = tracing::field::Empty,
            commits = tracing::field::Empty,
            from_snapshot = tracing::field::Empty,
        );
        tracing::Instrument::instrument(self.replay(), span).await
    }

    async fn replay(&mut self) -> Result<(), ReadError> {
        let entity = self.identity.hash;
        let started = Instant::now();
        self.core.check_quarantine(entity)?;
        let replayed = replay::replay(&self.core, &*self.kind, &self.identity).await.inspect_err(|error| {
            if let ReadError::Unavailable(Unavailable::Unreadable { cause, .. }) = error
                && cause.is_own_fault()
            {
                self.core.record_failure(entity, cause.to_string(), cause.is_damage());
            }
        })?;
        let replay::Replayed { opener, past, cost, snapshot_bytes, misfit } = replayed;
        let from_snapshot = snapshot_bytes > 0;
        self.view.usage.set_snapshot_bytes(snapshot_bytes);
        let span = tracing::Span::current();
        span.record("version", past.version).record("commits", cost.commits).record("from_snapshot", from_snapshot);
        self.core.metrics.activated(from_snapshot, u64::from(cost.commits), started.elapsed());
        let activation = Arc::new(Activation::at(past.version));
        self.view.usage.set_state_bytes(self.kind.memory_bytes(&past.state));
        let durable = Durable { state: past.state, version: Version(past.version) };
        *self.view.published.lock() = Some(Published { durable, activation: activation.clone() });
        self.loaded = Some(Box::new(Loaded {
            activation,
            created: opener.is_some(),
            opener,
            version: past.version,
            at_us: past.at_us,
            last_first: past.last_first,
            cost,
            speculative: None,
            in_flight: VecDeque::new(),
            keys: None,
        }));
        self.save_snapshot(misfit);
        Ok(())
    }

    /// Hands the published state to the snapshotter, if replaying it has become dear, or if what is stored does not fit.
    fn save_snapshot(&mut self, misfit: bool) {
        let Some(policy) = &self.core.settings.snapshots else { return };
        let policy = self.kind.tuning().snapshots.as_ref().unwrap_or(policy);
        let snapshot_bytes = self.view.usage.snapshot_bytes();
        let is_due = |loaded: &&mut Loaded| misfit || loaded.cost.is_due(policy, snapshot_bytes);
        let Some(loaded) = self.loaded.as_deref_mut().filter(is_due) else { return };
        let published = self.view.published.lock().as_ref().map(|published| published.durable.clone());
        let (Some(opener), Some(durable)) = (&loaded.opener, published.filter(|durable| durable.version.0 > 0)) else {
            return;
        };
        let job = SnapshotJob {
            core: self.core.clone(),
            kind: self.kind.clone(),
            view: self.view.clone(),
            opener: opener.share(),
            durable,
            last_first: loaded.last_first,
        };
        if self.core.snapshotter.offer(job) {
            loaded.cost = ReplayCost::default();
        } else {
            self.core.metrics.snapshots_skipped.add(1);
        }
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
            loaded.last_first = durable.version.0 + 1;
            durable.version = Version(commit.last_version);
            loaded.cost.add(commit.body_bytes as usize);
        }
        // Now and then: a large state is not measured for nothing.
        if now.durable.version.0 / 64 != before / 64 {
            let keys = loaded.keys.as_ref().map_or(0, |keys| keys.memory_bytes());
            self.view.usage.set_state_bytes(self.kind.memory_bytes(&now.durable.state) + keys);
        }
        drop(published);
        self.save_snapshot(false);
        true
    }
}

/// The published state.
fn durable(published: &Mutex<Option<Published>>) -> Option<State> {
    published.lock().as_ref().map(|published| published.durable.state.clone())
}

/// The events of a stored commit, if it was made by a request with this fingerprint; decoded only if they are wanted.
#[allow(clippy::type_complexity)]
fn original(
    kind: &dyn Kind,
    opener: &Opener,
    row: &LogRow,
    fingerprint: Option<Fingerprint>,
    with_events: bool,
) -> Result<Option<Option<Decoded>>, ReplayError> {
    let version = Version(row.version);
    let undecodable = |event, detail| ReplayError::undecodable(kind.name(), row.version, event, detail);
    let plaintext = opener.open(row)?;
    let body = Body::parse(&plaintext).map_err(|error| undecodable(String::new(), error.to_string()))?;
    if body.fingerprint.map(|stored| &**stored) != fingerprint.as_ref().map(Fingerprint::as_slice) {
        return Ok(None);
    }
    if !with_events {
        return Ok(Some(None));
    }
    let decoded = catch_unwind(AssertUnwindSafe(|| kind.decode(&body.events)))
        .map_err(|_| ReplayError::Panicked { kind: kind.name().to_string(), version })?;
    decoded.map(|events| Some(Some(events))).map_err(|error| undecodable(error.event, error.detail))
}

/// A key and a row for an entity that has none yet.
async fn new_opener(core: &ShardCore, kind: &dyn Kind, identity: &Identity) -> Result<Opener, crate::VaultError> {
    let (key_id, key) = match audit::is_reserved(kind.name()) {
        true => (AUDIT_KEY, core.vault.key(identity.hash, AUDIT_KEY).await?),
        false => core.vault.create(identity.hash).await?,
    };
    let sealed_id = seal_id(&key, kind.name(), IdHash(identity.hash.0), key_id, &identity.id);
    let row = EntityRow {
        // Its number comes with its first commit.
        eid: 0,
        copy: CopyId::LIVE,
        slot: identity.slot,
        kind: kind.name().clone(),
        id_hash: identity.hash,
        life: 1,
        sealed_id,
        key_id: key_id.0,
        created_at_us: core.settings.wall_clock.now_us(),
        erased_at_us: None,
    };
    Ok(Opener { row: Arc::new(row), key })
}
