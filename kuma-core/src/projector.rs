//! The projector: feeds one model file, in batches.
//!
//! ```text
//!             ┌────────── pause ──────────► Paused ──resume──┐
//! CatchingUp ─┴─► Live ◄────────────────────────────────────┬┘
//!      │            │                                        │
//!      ├────────────┴─ an event cannot be applied ─► Failed ─┤ retry, skip, or the event was erased
//!      └─ the disk is full, a file cannot be read ─► Waiting ┘ by itself, after a while
//! ```
//!
//! Invariants:
//! - It is the only writer of its file. A batch is one transaction: what its events did, and how far they go.
//! - An event that fails takes its whole batch back; those before it are applied again without it. Nothing is passed over unless it is said.
//! - It stands still while it is failed or paused, and then reads nothing either.
//! - A purge comes between two batches. What is read before it of an entity that is purged is never applied after it.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Weak},
    time::{Duration, Instant, SystemTime},
};

use kuma_shard::{EntityHash, ModelError, ModelFile, ModelProgress, Purged, Skipped, Slot};
use parking_lot::Mutex;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef};
use tokio::{
    sync::{Semaphore, oneshot, watch},
    task::JoinSet,
};

use crate::{
    ApplyError, Filter, Projection, Version,
    feed::{Fed, FeedFrom, FeedItem, FeedPage, PAGES_AHEAD, Standing, feed, guarded},
    micros,
    projection::is_passing,
    store::Inner,
};

/// Events of one transaction; a page that exceeds it is the last one.
const BATCH_EVENTS: usize = 16_384;
/// How soon it is looked again whether it is decided which life of an entity there is.
const UNDECIDED_WAIT: Duration = Duration::from_millis(10);
/// When something passing was in the way; each time twice as long, up to some 30 s.
const RETRY_AFTER: Duration = Duration::from_millis(250);
const RETRIES_DOUBLED: u32 = 7;

/// What a projection is doing.
#[derive(Clone, Debug, PartialEq)]
pub enum ProjectionState {
    /// It applies events that were there before.
    CatchingUp {
        /// Commits that are left, wanted or not.
        commits_left: u64,
        /// How far it is, from 0 to 1.
        progress: f64,
        /// How long it will take about, if that can be told yet.
        eta: Option<Duration>,
    },
    /// It applies events as they come.
    Live,
    /// It stands still at an event that it cannot apply.
    Failed(ProjectionFailure),
    /// It stands still because it was told to.
    Paused,
    /// Something that passes is in the way: a full disk, a file that cannot be read. It is tried again by itself.
    Waiting {
        /// What.
        why: String,
    },
}

/// The event that a projection cannot apply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProjectionFailure {
    /// The shard.
    pub shard: u16,
    /// The place of its commit in the shard's log.
    pub position: u64,
    /// The slot, if it can be read.
    pub slot: Option<Slot>,
    /// The place of its commit in the slot's log, if it can be read.
    pub seq: Option<u64>,
    /// The entity, if that can be told.
    pub entity: Option<EntityHash>,
    /// The event's version, if that can be told.
    pub version: Option<Version>,
    /// What the projection says of it. It may quote the event: show it to those alone who may see that.
    pub error: String,
}

/// What the projector tells about itself.
pub(crate) struct ProjectorView {
    state: Mutex<ProjectionState>,
    /// Of each shard, up to which position everything was applied.
    pub(crate) positions: watch::Sender<Vec<u64>>,
    pub(crate) events: std::sync::atomic::AtomicU64,
}

impl ProjectorView {
    pub(crate) fn state(&self) -> ProjectionState {
        self.state.lock().clone()
    }

    fn set(&self, state: ProjectionState) {
        *self.state.lock() = state;
    }
}

/// What a projector is asked.
pub(crate) enum ProjectorMessage {
    /// From the feeds of a run: those of former ones are of no interest.
    Fed(u64, Box<Fed>),
    /// Apply what has gathered.
    Apply,
    /// Begin to read.
    Run,
    Pause(oneshot::Sender<Result<(), ModelError>>),
    Resume(oneshot::Sender<Result<(), ModelError>>),
    /// Go on from a failure, without the event or with it. Answers whether there was one.
    GoOn {
        skip: bool,
        reply: oneshot::Sender<bool>,
    },
    /// Apply nothing from now on; answers how far it is.
    Hold(oneshot::Sender<Vec<u64>>),
    /// Go on after all.
    Release,
    /// Sync what was applied; answers whether that could be.
    Sync(oneshot::Sender<bool>),
    Purge(PurgeRequest),
    /// Close the file.
    Close(oneshot::Sender<()>),
}

impl ractor::Message for ProjectorMessage {} // local only

/// Lives that are erased, and who waits for them to be gone.
pub(crate) struct PurgeRequest {
    pub(crate) lives: Arc<[PurgedLife]>,
    /// Answered with what the model is about; with none if it is not concerned.
    pub(crate) reply: oneshot::Sender<Result<Option<Arc<Filter>>, ModelError>>,
}

/// A life that is erased.
#[derive(Clone)]
pub(crate) struct PurgedLife {
    pub(crate) key_id: [u8; 16],
    pub(crate) entity: Purged,
}

/// What a projector is made of.
pub(crate) struct ProjectorArguments {
    pub(crate) store: Weak<Inner>,
    pub(crate) definition: Arc<dyn Projection>,
    pub(crate) file: ModelFile,
    pub(crate) purge: PurgeRule,
    pub(crate) view: Arc<ProjectorView>,
    pub(crate) paused: bool,
    /// Called whenever it has caught up.
    pub(crate) caught_up: Box<dyn Fn() + Send + Sync>,
}

/// What a model's file says about erasures.
#[derive(Clone, Debug)]
pub(crate) struct PurgeRule {
    pub(crate) filter: Arc<Filter>,
    /// Empty if the model holds nothing personal.
    pub(crate) sql: Arc<str>,
}

impl PurgeRule {
    /// Those of `lives` that the model may hold something of.
    pub(crate) fn concerned(&self, lives: &[PurgedLife]) -> Vec<Purged> {
        let is_concerned = |life: &&PurgedLife| !self.sql.is_empty() && self.filter.matches_kind(&life.entity.kind);
        lives.iter().filter(is_concerned).map(|life| life.entity.clone()).collect()
    }
}

pub(crate) struct Projector;

pub(crate) struct ProjectorState {
    store: Weak<Inner>,
    definition: Arc<dyn Projection>,
    filter: Arc<Filter>,
    purge: PurgeRule,
    /// None while a batch is being applied, and after the end.
    file: Option<ModelFile>,
    view: Arc<ProjectorView>,
    caught_up: Box<dyn Fn() + Send + Sync>,
    pages: VecDeque<FeedPage>,
    feeds: JoinSet<()>,
    run: u64,
    apply_queued: bool,
    paused: bool,
    held: bool,
    failure: Option<ProjectionFailure>,
    /// Pass over the events that it failed at.
    skips: Vec<ProjectionFailure>,
    retries: u32,
    /// Lives that were purged here and whose erasure is not complete.
    purged: HashSet<[u8; 16]>,
    /// When it began to catch up, and how many commits were left then.
    began: Option<(Instant, u64)>,
}

impl Projector {
    /// Starts a projector under `supervisor`.
    pub(crate) async fn start(
        arguments: ProjectorArguments,
        supervisor: ActorCell,
    ) -> Result<ActorRef<ProjectorMessage>, ractor::SpawnErr> {
        Actor::spawn_linked(None, Projector, arguments, supervisor).await.map(|(projector, _)| projector)
    }
}

impl ProjectorView {
    /// Of a file as it was opened.
    pub(crate) fn of(file: &ModelFile, shards: usize) -> Result<Arc<Self>, ModelError> {
        let mut positions = vec![0; shards];
        let mut events = 0;
        for (shard, (position, applied)) in file.positions()? {
            events += applied;
            if let Some(at) = positions.get_mut(usize::from(shard)) {
                *at = position;
            }
        }
        let state = Mutex::new(ProjectionState::CatchingUp { commits_left: 0, progress: 0.0, eta: None });
        let positions = watch::Sender::new(positions);
        Ok(Arc::new(ProjectorView { state, positions, events: events.into() }))
    }
}

impl Actor for Projector {
    type Msg = ProjectorMessage;
    type State = ProjectorState;
    type Arguments = ProjectorArguments;

    async fn pre_start(
        &self,
        me: ActorRef<ProjectorMessage>,
        arguments: ProjectorArguments,
    ) -> Result<ProjectorState, ActorProcessingErr> {
        let ProjectorArguments { store, definition, file, purge, view, paused, caught_up } = arguments;
        me.cast(ProjectorMessage::Run)?;
        Ok(ProjectorState {
            store,
            filter: Arc::new(definition.filter()),
            definition,
            purge,
            file: Some(file),
            view,
            caught_up,
            pages: VecDeque::new(),
            feeds: JoinSet::new(),
            run: 0,
            apply_queued: false,
            paused,
            held: false,
            failure: None,
            skips: Vec::new(),
            retries: 0,
            purged: HashSet::new(),
            began: None,
        })
    }

    async fn handle(
        &self,
        me: ActorRef<ProjectorMessage>,
        message: ProjectorMessage,
        state: &mut ProjectorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ProjectorMessage::Fed(run, fed) if run == state.run => match *fed {
                Fed::Page(page) => {
                    state.pages.push_back(page);
                    state.queue_apply(&me);
                }
                Fed::Trouble { why, .. } => state.view.set(ProjectionState::Waiting { why }),
            },
            ProjectorMessage::Fed(..) => {}
            ProjectorMessage::Apply => {
                state.apply_queued = false;
                state.apply(&me).await;
            }
            ProjectorMessage::Run => state.run(&me),
            ProjectorMessage::Pause(reply) => {
                state.stand_still();
                state.paused = true;
                state.view.set(ProjectionState::Paused);
                let _ = reply.send(state.note_paused());
            }
            ProjectorMessage::Resume(reply) => {
                state.paused = false;
                let _ = reply.send(state.note_paused());
                state.run(&me);
            }
            ProjectorMessage::GoOn { skip, reply } => {
                let failure = state.failure.take();
                let _ = reply.send(failure.is_some());
                if failure.is_some() {
                    state.skips.extend(failure.filter(|_| skip));
                    state.run(&me);
                }
            }
            ProjectorMessage::Hold(reply) => {
                state.held = true;
                let _ = reply.send(state.view.positions.borrow().clone());
            }
            ProjectorMessage::Sync(reply) => drop(reply.send(state.sync().await)),
            ProjectorMessage::Release => {
                state.held = false;
                state.queue_apply(&me);
            }
            ProjectorMessage::Purge(request) => state.purge(&me, request).await,
            ProjectorMessage::Close(reply) => {
                state.stand_still();
                if let Some(Err(error)) = state.file.take().map(ModelFile::close) {
                    tracing::warn!(projection = state.definition.name(), %error, "a read model was not closed cleanly");
                }
                let _ = reply.send(());
                me.stop(None);
            }
        }
        Ok(())
    }
}

impl ProjectorState {
    fn queue_apply(&mut self, me: &ActorRef<ProjectorMessage>) {
        // Behind all that has gathered. It fails only for an actor on its way out.
        self.apply_queued = self.apply_queued || me.cast(ProjectorMessage::Apply).is_ok();
    }

    fn note_paused(&self) -> Result<(), ModelError> {
        self.file.as_ref().map_or(Ok(()), |file| file.set_meta("paused", if self.paused { "1" } else { "0" }))
    }

    async fn sync(&mut self) -> bool {
        let Some(file) = self.file.take() else { return false };
        let synced = tokio::task::spawn_blocking(move || {
            let synced = file.sync();
            (file, synced)
        });
        let Ok((file, synced)) = synced.await else { return false };
        self.file = Some(file);
        synced.is_ok()
    }

    /// Stops reading, and forgets what was read and not applied.
    fn stand_still(&mut self) {
        self.feeds = JoinSet::new();
        self.run += 1;
        self.pages.clear();
    }

    /// Begins to read behind what was applied.
    fn run(&mut self, me: &ActorRef<ProjectorMessage>) {
        self.stand_still();
        if self.paused {
            return self.view.set(ProjectionState::Paused);
        }
        if let Some(failure) = &self.failure {
            return self.view.set(ProjectionState::Failed(failure.clone()));
        }
        let Some(inner) = self.store.upgrade() else { return };
        let kuma = crate::Kuma { inner };
        let positions = self.view.positions.borrow().clone();
        for ((_, core), after) in kuma.open_shards().zip(positions) {
            let Ok(core) = core else { continue };
            let from = FeedFrom { filter: self.filter.clone(), after, since_us: i64::MIN };
            let (me, run) = (me.clone(), self.run);
            // What bounds the mailbox.
            let room = Arc::new(Semaphore::new(PAGES_AHEAD));
            let take = move |fed| me.cast(ProjectorMessage::Fed(run, Box::new(fed))).is_ok();
            self.feeds.spawn(feed(Arc::downgrade(&kuma.inner), core.clone(), from, room, take));
        }
        self.began = None;
        self.show(&kuma);
    }

    /// Says how far it is.
    fn show(&mut self, kuma: &crate::Kuma) {
        let out_of_use = kuma.open_shards().find_map(|(shard, core)| Some((shard, core.err()?.to_owned())));
        if let Some((shard, why)) = out_of_use {
            let why = format!("shard {shard} is out of use, so that its events are missing: {why}");
            return self.view.set(ProjectionState::Waiting { why });
        }
        let ends = kuma.log_ends().unwrap_or_default();
        let left = behind(&ends, &self.view.positions.borrow());
        // What has just come does not make it late.
        let was_live = matches!(self.view.state(), ProjectionState::Live);
        if left <= NEARLY || was_live && left <= LATE {
            self.began = None;
            self.view.set(ProjectionState::Live);
            return (self.caught_up)();
        }
        let (since, total) = *self.began.get_or_insert((Instant::now(), left));
        let done = total.saturating_sub(left);
        let eta = (done > 0).then(|| since.elapsed().mul_f64(left as f64 / done as f64));
        let all: u64 = ends.iter().sum();
        let progress = 1.0 - left as f64 / all.max(1) as f64;
        self.view.set(ProjectionState::CatchingUp { commits_left: left, progress, eta });
    }

    /// Applies what has gathered.
    async fn apply(&mut self, me: &ActorRef<ProjectorMessage>) {
        if self.held || self.failure.is_some() || self.paused {
            return;
        }
        let (mut batch, mut events) = (Vec::new(), 0);
        while let Some(page) = self.pages.front_mut().filter(|_| events < BATCH_EVENTS) {
            match page.settle(|key_id| self.purged.contains(key_id)).await {
                Ok(Standing::Settled) => {}
                Ok(Standing::Undecided) => {
                    me.send_after(UNDECIDED_WAIT, || ProjectorMessage::Apply);
                    break;
                }
                Err(error) => return self.wait(me, error.to_string()),
            }
            events += page.events();
            batch.extend(self.pages.pop_front());
        }
        let Some(mut file) = (if batch.is_empty() { None } else { self.file.take() }) else { return };
        let Some(inner) = self.store.upgrade() else { return self.file = Some(file) };
        let (definition, skips) = (self.definition.clone(), self.skips.clone());
        let applied = tokio::task::spawn_blocking(move || {
            let applied = apply_batch(&mut file, &*definition, &batch, &skips);
            (file, applied, batch)
        });
        let Ok((file, applied, batch)) = applied.await else {
            // The runtime is shutting down.
            return;
        };
        self.file = Some(file);
        let Applied { positions, events, stopped } = applied;
        if !positions.is_empty() {
            self.view.events.fetch_add(events, std::sync::atomic::Ordering::Relaxed);
            self.view.positions.send_modify(|known| {
                for (shard, position) in &positions {
                    if let Some(at) = known.get_mut(usize::from(*shard)) {
                        *at = *position;
                    }
                }
            });
            self.retries = 0;
            inner.metrics().projected(self.definition.name(), events);
        }
        self.skips.retain(|skip| positions.get(&skip.shard).is_none_or(|at| *at < skip.position));
        drop(batch);
        match stopped {
            None => {
                self.show(&crate::Kuma { inner });
                if !self.pages.is_empty() {
                    self.queue_apply(me);
                }
            }
            Some(Stopped::At(failure)) => self.fail(*failure),
            Some(Stopped::Passing(why)) => self.wait(me, why),
        }
    }

    fn fail(&mut self, failure: ProjectionFailure) {
        let ProjectionFailure { shard, position, slot, seq, entity, version, .. } = &failure;
        let (entity, version) = (entity.map(|entity| entity.to_string()), version.map(|version| version.0));
        let (slot, projection) = (slot.map(Slot::number), self.definition.name());
        // What the projection says may quote the event.
        tracing::error!(
            projection,
            shard,
            position,
            slot,
            seq,
            entity,
            version,
            "a projection cannot apply an event and stands still"
        );
        self.stand_still();
        self.view.set(ProjectionState::Failed(failure.clone()));
        self.failure = Some(failure);
    }

    /// Tries again after a while.
    fn wait(&mut self, me: &ActorRef<ProjectorMessage>, why: String) {
        if self.store.upgrade().is_none_or(|inner| inner.is_closing()) {
            return self.stand_still();
        }
        if self.retries == 0 {
            tracing::warn!(projection = self.definition.name(), %why, "a projection waits; it goes on by itself");
        }
        self.stand_still();
        self.view.set(ProjectionState::Waiting { why });
        me.send_after(RETRY_AFTER * (1 << self.retries.min(RETRIES_DOUBLED)), || ProjectorMessage::Run);
        self.retries += 1;
    }

    /// Deletes what the model holds of these lives.
    async fn purge(&mut self, me: &ActorRef<ProjectorMessage>, PurgeRequest { lives, reply }: PurgeRequest) {
        let Some(mut file) = self.file.take() else { return };
        let (concerned, PurgeRule { filter, sql }) = (self.purge.concerned(&lives), self.purge.clone());
        let purged = tokio::task::spawn_blocking(move || {
            let purged =
                if concerned.is_empty() { Ok(None) } else { file.purge(&sql, &concerned).map(|_| Some(filter)) };
            (file, purged)
        });
        let Ok((file, purged)) = purged.await else { return };
        self.file = Some(file);
        if purged.is_ok() {
            if let Some(inner) = self.store.upgrade() {
                self.purged.retain(|key_id| inner.erasing().fate(*key_id).is_some());
            }
            self.purged.extend(lives.iter().map(|life| life.key_id));
            // What it says of the event that it failed at may be about the entity; the event is gone.
            let is_gone =
                |failure: &ProjectionFailure| lives.iter().any(|life| failure.entity == Some(life.entity.hash));
            self.skips.retain(|skip| !is_gone(skip));
            if self.failure.as_ref().is_some_and(is_gone) {
                self.failure = None;
                self.run(me);
            }
            self.queue_apply(me);
        }
        // Whoever is gone does not want to know.
        let _ = reply.send(purged);
    }
}

/// So few commits behind, it follows; and a model that was being built can take its place.
const NEARLY: u64 = 1024;
/// So many commits behind, it does not follow any more.
const LATE: u64 = 16 * NEARLY;

/// How many commits are behind `positions`.
pub(crate) fn behind(ends: &[u64], positions: &[u64]) -> u64 {
    ends.iter().zip(positions).map(|(end, position)| end.saturating_sub(*position)).sum()
}

/// What became of a batch.
struct Applied {
    /// How far it went.
    positions: std::collections::BTreeMap<u16, u64>,
    events: u64,
    stopped: Option<Stopped>,
}

enum Stopped {
    At(Box<ProjectionFailure>),
    Passing(String),
}

/// Where in a batch an event could not be applied.
struct Place {
    page: usize,
    item: usize,
    why: Stopped,
}

/// Applies the pages in one transaction; if that fails at an event, those before it.
fn apply_batch(
    file: &mut ModelFile,
    definition: &dyn Projection,
    pages: &[FeedPage],
    skips: &[ProjectionFailure],
) -> Applied {
    let whole = (pages.len(), 0);
    match apply_until(file, definition, pages, whole, skips) {
        Ok(Ok((positions, events))) => Applied { positions, events, stopped: None },
        Ok(Err(Place { page, item, why })) => match apply_until(file, definition, pages, (page, item), skips) {
            Ok(Ok((positions, events))) => Applied { positions, events, stopped: Some(why) },
            // It is not the same the second time.
            Ok(Err(Place { why, .. })) => {
                Applied { positions: std::collections::BTreeMap::new(), events: 0, stopped: Some(why) }
            }
            Err(error) => Applied::not_at_all(&error),
        },
        Err(error) => Applied::not_at_all(&error),
    }
}

impl Applied {
    fn not_at_all(error: &ModelError) -> Self {
        let stopped = Some(Stopped::Passing(error.to_string()));
        Applied { positions: std::collections::BTreeMap::new(), events: 0, stopped }
    }
}

type Reached = (std::collections::BTreeMap<u16, u64>, u64);

/// Applies what is before the item `end`.
fn apply_until(
    file: &mut ModelFile,
    definition: &dyn Projection,
    pages: &[FeedPage],
    end: (usize, usize),
    skips: &[ProjectionFailure],
) -> Result<Result<Reached, Place>, ModelError> {
    let mut progress = ModelProgress::default();
    let mut total = 0;
    for (number, page) in pages.iter().enumerate().take(end.0 + 1) {
        let is_cut = number == end.0;
        let items = if is_cut { page.items.get(..end.1).unwrap_or_default() } else { &page.items };
        let last = match page.items.get(end.1).filter(|_| is_cut) {
            Some(first_left) => first_left.position().saturating_sub(1),
            None if is_cut => continue,
            None => page.last,
        };
        let commits = items.iter().filter_map(|item| match item {
            FeedItem::Commit(commit) => Some(commit.events.len() as u64),
            FeedItem::Unreadable { .. } => None,
        });
        let events: u64 = commits.sum();
        total += events;
        let at = progress.positions.entry(page.core.shard.number()).or_insert((0, 0));
        *at = (last, at.1 + events);
        let places = page.places.iter().take_while(|place| place.position <= last);
        progress.places.extend(places.map(|place| (place.slot, (place.seq, place.epoch))));
        let is_passed = |skip: &&ProjectionFailure| {
            skip.shard == page.core.shard.number() && items.iter().any(|item| item.position() == skip.position)
        };
        progress.skipped.extend(skips.iter().filter(is_passed).map(|skip| Skipped {
            at_us: micros(SystemTime::now()),
            shard: skip.shard,
            position: skip.position,
            entity: skip.entity.map(EntityHash::to_hex),
            version: skip.version.map(|version| version.0),
            why: skip.error.clone(),
        }));
    }
    let applied = file.apply(&progress, |model| {
        for (page_number, page) in pages.iter().enumerate().take(end.0 + 1) {
            let items = if page_number == end.0 { page.items.get(..end.1).unwrap_or_default() } else { &page.items };
            for (item_number, item) in items.iter().enumerate() {
                let applied = apply_item(model, definition, page, item, skips);
                applied.map_err(|why| Place { page: page_number, item: item_number, why })?;
            }
        }
        Ok(())
    })?;
    let positions = progress.positions.into_iter().map(|(shard, (position, _))| (shard, position)).collect();
    Ok(applied.map(|()| (positions, total)))
}

fn apply_item(
    model: &kuma_shard::rusqlite::Transaction<'_>,
    definition: &dyn Projection,
    page: &FeedPage,
    item: &FeedItem,
    skips: &[ProjectionFailure],
) -> Result<(), Stopped> {
    let shard = page.core.shard.number();
    let is_skipped = |version: Option<Version>| {
        skips.iter().any(|skip| skip.shard == shard && skip.position == item.position() && skip.version == version)
    };
    let commit = match item {
        FeedItem::Commit(commit) => commit,
        FeedItem::Unreadable { unreadable, .. } if is_skipped(unreadable.version.map(Version)) => return Ok(()),
        FeedItem::Unreadable { position, unreadable } => {
            return Err(Stopped::At(Box::new(ProjectionFailure {
                shard,
                position: *position,
                slot: None,
                seq: None,
                entity: unreadable.entity,
                version: unreadable.version.map(Version),
                error: unreadable.why.clone(),
            })));
        }
    };
    for stored in commit.events.iter().filter(|stored| !is_skipped(Some(stored.event.version))) {
        let failed = |error: String| {
            Stopped::At(Box::new(ProjectionFailure {
                shard,
                position: commit.position,
                slot: Some(stored.slot),
                seq: Some(stored.seq),
                entity: Some(stored.entity),
                version: Some(stored.event.version),
                error,
            }))
        };
        // What it says of its error is its code as well.
        let said = |error: ApplyError| {
            let passing = error.downcast_ref::<kuma_shard::rusqlite::Error>().is_some_and(is_passing);
            (passing, error.to_string())
        };
        match guarded(|| definition.apply(model, stored).map_err(said)) {
            Ok(Ok(())) if model.is_autocommit() => {
                return Err(failed("it ignored an error that rolled its transaction back (OR ROLLBACK?)".to_owned()));
            }
            Ok(Ok(())) => {}
            Ok(Err((true, why))) => return Err(Stopped::Passing(why)),
            Ok(Err((false, why))) => return Err(failed(why)),
            Err(panicked) => return Err(failed(panicked)),
        }
    }
    Ok(())
}
