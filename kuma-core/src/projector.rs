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
    collections::{BTreeMap, HashSet, VecDeque},
    sync::{Arc, Weak},
    time::{Duration, Instant, SystemTime},
};

use kuma_shard::{EntityHash, ModelError, ModelFile, Purged, SLOTS, Skipped, Slot};
use parking_lot::Mutex;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef};
use tokio::{
    sync::{Semaphore, oneshot, watch},
    task::JoinSet,
};

use crate::{
    ApplyError, Filter, Projection, Version,
    cluster_logs::{ClusterGauge, ClusterPlace, WideFed, feed_wide},
    feed::{Fed, FeedFrom, PAGES_AHEAD, Standing, feed, guarded},
    micros,
    model_page::{MARK, ModelItem, ModelPage, Reach},
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
/// How often it is looked how far behind the logs of a cluster a model is, also when nothing comes.
const SHOW_EVERY: Duration = Duration::from_millis(250);

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
    /// The shard; in a cluster, where shards are each node's own, the number of the slot.
    pub shard: u16,
    /// The place of its commit in the shard's log; in a cluster in the slot's.
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

impl ProjectionFailure {
    fn is_at(&self, item: &ModelItem<'_>) -> bool {
        (self.shard, self.position) == (item.log, item.position)
    }
}

/// What the projector tells about itself.
pub(crate) struct ProjectorView {
    state: Mutex<ProjectionState>,
    /// Of each shard, up to which position everything was applied; in a cluster of each slot, up to which seq.
    pub(crate) positions: watch::Sender<Vec<u64>>,
    pub(crate) events: std::sync::atomic::AtomicU64,
    /// In a cluster.
    wide: Mutex<WideStanding>,
}

/// How far a model is behind the logs of a cluster, as of a moment ago.
#[derive(Clone, Copy)]
struct WideStanding {
    left: u64,
    /// When it had applied everything that was known.
    caught_up_at: Instant,
    /// Since when a node has not been reached.
    cut_off_since: Option<Instant>,
}

impl ProjectorView {
    pub(crate) fn state(&self) -> ProjectionState {
        self.state.lock().clone()
    }

    fn set(&self, state: ProjectionState) {
        *self.state.lock() = state;
    }

    /// In a cluster: how many commits are left, and for how long at most the oldest of them has been.
    pub(crate) fn wide_lag(&self) -> (u64, Duration) {
        let WideStanding { left, caught_up_at, cut_off_since } = *self.wide.lock();
        let late = if left == 0 { Duration::ZERO } else { caught_up_at.elapsed() };
        (left, late.max(cut_off_since.map_or(Duration::ZERO, |since| since.elapsed())))
    }
}

/// What a projector is asked.
pub(crate) enum ProjectorMessage {
    /// From the feeds of a run: those of former ones are of no interest.
    Fed(u64, Box<Fed>),
    /// The same of a cluster.
    Wide(u64, Box<WideFed>),
    /// Look how far behind it is, in that run.
    Show(u64),
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
    pages: VecDeque<ModelPage>,
    /// Of the logs of a cluster, once they are read.
    gauge: Option<Arc<dyn ClusterGauge>>,
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
    /// Of a file as it was opened, for a store with so many shards, or for one of a cluster.
    pub(crate) fn of(file: &ModelFile, shards: usize, is_clustered: bool) -> Result<Arc<Self>, ModelError> {
        let events: u64 = file.positions()?.values().map(|(_, events)| events).sum();
        let logs = if is_clustered { SLOTS.into() } else { shards };
        let positions = by_log(applied_in(file, is_clustered)?, logs);
        let state = Mutex::new(ProjectionState::CatchingUp { commits_left: 0, progress: 0.0, eta: None });
        let positions = watch::Sender::new(positions);
        let wide = WideStanding { left: 0, caught_up_at: Instant::now(), cut_off_since: None };
        Ok(Arc::new(ProjectorView { state, positions, events: events.into(), wide: Mutex::new(wide) }))
    }
}

/// Up to where a model's file has applied each of the logs that it is fed with: of each shard, or in a cluster of each slot.
pub(crate) fn applied_in(file: &ModelFile, is_clustered: bool) -> Result<BTreeMap<u16, u64>, ModelError> {
    match is_clustered {
        true => file.seqs(),
        false => Ok(file.positions()?.into_iter().map(|(shard, (position, _))| (shard, position)).collect()),
    }
}

/// Places in logs, by the numbers of the logs.
pub(crate) fn by_log(places: impl IntoIterator<Item = (u16, u64)>, logs: usize) -> Vec<u64> {
    let mut by_log = vec![0; logs];
    for (log, place) in places {
        if let Some(at) = by_log.get_mut(usize::from(log)) {
            *at = place;
        }
    }
    by_log
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
            gauge: None,
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
                    state.pages.push_back(ModelPage::Shard(page));
                    state.queue_apply(&me);
                }
                Fed::Trouble { why, .. } => state.view.set(ProjectionState::Waiting { why }),
            },
            ProjectorMessage::Wide(run, fed) if run == state.run => match *fed {
                WideFed::Reading(gauge) => {
                    state.gauge = Some(gauge);
                    state.look(&me);
                }
                WideFed::Page(page) => {
                    state.pages.push_back(ModelPage::Cluster(page));
                    state.queue_apply(&me);
                }
                WideFed::Trouble(why) => state.view.set(ProjectionState::Waiting { why }),
            },
            ProjectorMessage::Show(run) if run == state.run => state.look(&me),
            ProjectorMessage::Fed(..) | ProjectorMessage::Wide(..) | ProjectorMessage::Show(_) => {}
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
        self.gauge = None;
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
        if kuma.inner.is_clustered() {
            return self.run_wide(me, &kuma.inner, positions);
        }
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

    /// Begins to read the logs of a cluster behind what was applied.
    fn run_wide(&mut self, me: &ActorRef<ProjectorMessage>, inner: &Arc<Inner>, seqs: Vec<u64>) {
        let mark = self.file.as_ref().map_or(Ok(None), |file| file.meta(MARK));
        let (Some(logs), Ok(mark)) = (inner.cluster_logs().cloned(), mark) else {
            return self.wait(me, "the logs of the cluster, or the model's file, cannot be read".to_owned());
        };
        let (from, filter) = (ClusterPlace { seqs, mark }, (*self.filter).clone());
        let (run, room, store) = (self.run, Arc::new(Semaphore::new(PAGES_AHEAD)), Arc::downgrade(inner));
        let take = {
            let me = me.clone();
            move |fed| me.cast(ProjectorMessage::Wide(run, Box::new(fed))).is_ok()
        };
        self.feeds.spawn(feed_wide(store, logs, filter, from, room, take));
        self.began = None;
        self.view.set(ProjectionState::CatchingUp { commits_left: 0, progress: 0.0, eta: None });
    }

    /// Says how far it is behind the logs of a cluster, and looks again later.
    fn look(&mut self, me: &ActorRef<ProjectorMessage>) {
        let run = self.run;
        me.send_after(SHOW_EVERY, move || ProjectorMessage::Show(run));
        self.show_wide();
    }

    fn show_wide(&mut self) {
        let Some(gauge) = self.gauge.as_ref().filter(|_| !self.held) else { return };
        let waiting: u64 = self.pages.iter().map(|page| page.events() as u64).sum();
        let left = gauge.commits_behind();
        let cut_off_since = gauge.cut_off_for().and_then(|cut_off| Instant::now().checked_sub(cut_off));
        let left = match left {
            Ok(left) => left + waiting,
            Err(why) => {
                self.view.wide.lock().cut_off_since = cut_off_since;
                return self.view.set(ProjectionState::Waiting { why });
            }
        };
        let caught_up_at = if left == 0 { Instant::now() } else { self.view.wide.lock().caught_up_at };
        *self.view.wide.lock() = WideStanding { left, caught_up_at, cut_off_since };
        let applied: u64 = self.view.positions.borrow().iter().sum();
        self.tell(left, applied + left);
    }

    /// Says how far it is.
    fn show(&mut self, kuma: &crate::Kuma) {
        if kuma.inner.is_clustered() {
            return self.show_wide();
        }
        let out_of_use = kuma.open_shards().find_map(|(shard, core)| Some((shard, core.err()?.to_owned())));
        if let Some((shard, why)) = out_of_use {
            let why = format!("shard {shard} is out of use, so that its events are missing: {why}");
            return self.view.set(ProjectionState::Waiting { why });
        }
        let ends = kuma.log_ends().unwrap_or_default();
        let left = behind(&ends, &self.view.positions.borrow());
        self.tell(left, ends.iter().sum());
    }

    /// Says that so many of `all` commits are left.
    fn tell(&mut self, left: u64, all: u64) {
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
        let progress = 1.0 - left as f64 / all.max(1) as f64;
        self.view.set(ProjectionState::CatchingUp { commits_left: left, progress, eta });
    }

    /// Applies what has gathered.
    async fn apply(&mut self, me: &ActorRef<ProjectorMessage>) {
        if self.held || self.failure.is_some() || self.paused {
            return;
        }
        let Some(inner) = self.store.upgrade() else { return };
        let (mut batch, mut events) = (Vec::new(), 0);
        while let Some(page) = self.pages.front_mut().filter(|_| events < BATCH_EVENTS) {
            match page.settle(&inner, &self.purged).await {
                Ok(Standing::Settled) => {}
                Ok(Standing::Undecided) => {
                    me.send_after(UNDECIDED_WAIT, || ProjectorMessage::Apply);
                    break;
                }
                Err(why) => return self.wait(me, why),
            }
            events += page.events();
            batch.extend(self.pages.pop_front());
        }
        let Some(mut file) = (if batch.is_empty() { None } else { self.file.take() }) else { return };
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
        let Applied { logs, events, stopped } = applied;
        if !logs.is_empty() {
            self.view.events.fetch_add(events, std::sync::atomic::Ordering::Relaxed);
            self.view.positions.send_modify(|known| {
                for (log, position) in &logs {
                    if let Some(at) = known.get_mut(usize::from(*log)) {
                        *at = *position;
                    }
                }
            });
            self.retries = 0;
            inner.metrics().projected(self.definition.name(), events);
        }
        self.skips.retain(|skip| logs.get(&skip.shard).is_none_or(|at| *at < skip.position));
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
    /// How far it went, by log.
    logs: BTreeMap<u16, u64>,
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
    pages: &[ModelPage],
    skips: &[ProjectionFailure],
) -> Applied {
    let whole = (pages.len(), 0);
    match apply_until(file, definition, pages, whole, skips) {
        Ok(Ok(reach)) => Applied::up_to(reach, None),
        Ok(Err(Place { page, item, why })) => match apply_until(file, definition, pages, (page, item), skips) {
            Ok(Ok(reach)) => Applied::up_to(reach, Some(why)),
            // It is not the same the second time.
            Ok(Err(Place { why, .. })) => Applied::up_to(Reach::default(), Some(why)),
            Err(error) => Applied::not_at_all(&error),
        },
        Err(error) => Applied::not_at_all(&error),
    }
}

impl Applied {
    fn up_to(Reach { logs, events, .. }: Reach, stopped: Option<Stopped>) -> Self {
        Applied { logs, events, stopped }
    }

    fn not_at_all(error: &ModelError) -> Self {
        Applied::up_to(Reach::default(), Some(Stopped::Passing(error.to_string())))
    }
}

/// Applies what is before the item `end`.
fn apply_until(
    file: &mut ModelFile,
    definition: &dyn Projection,
    pages: &[ModelPage],
    end: (usize, usize),
    skips: &[ProjectionFailure],
) -> Result<Result<Reach, Place>, ModelError> {
    let mut reach = Reach::default();
    let count = |number: usize, page: &ModelPage| if number == end.0 { end.1 } else { page.len() };
    let pages = || pages.iter().enumerate().take(end.0 + 1);
    for (number, page) in pages() {
        let count = count(number, page);
        page.reach(count, number != end.0, &mut reach);
        let passed = skips.iter().filter(|skip| page.items(count).any(|item| skip.is_at(&item)));
        reach.progress.skipped.extend(passed.map(|skip| Skipped {
            at_us: micros(SystemTime::now()),
            shard: skip.shard,
            position: skip.position,
            entity: skip.entity.map(EntityHash::to_hex),
            version: skip.version.map(|version| version.0),
            why: skip.error.clone(),
        }));
    }
    let applied = file.apply(&reach.progress, |model| {
        for (page_number, page) in pages() {
            for (item_number, item) in page.items(count(page_number, page)).enumerate() {
                let applied = apply_item(model, definition, &item, skips);
                applied.map_err(|why| Place { page: page_number, item: item_number, why })?;
            }
        }
        Ok(())
    })?;
    Ok(applied.map(|()| reach))
}

fn apply_item(
    model: &kuma_shard::rusqlite::Transaction<'_>,
    definition: &dyn Projection,
    item: &ModelItem<'_>,
    skips: &[ProjectionFailure],
) -> Result<(), Stopped> {
    let is_skipped = |version: Option<Version>| skips.iter().any(|skip| skip.is_at(item) && skip.version == version);
    let failed = |entity: Option<EntityHash>, version: Option<Version>, error: String| {
        let (slot, seq) = item.place.unzip();
        let (shard, position) = (item.log, item.position);
        Stopped::At(Box::new(ProjectionFailure { shard, position, slot, seq, entity, version, error }))
    };
    let events = match item.what {
        Ok(events) => events,
        Err(unreadable) if is_skipped(unreadable.version.map(Version)) => return Ok(()),
        Err(unreadable) => {
            return Err(failed(unreadable.entity, unreadable.version.map(Version), unreadable.why.clone()));
        }
    };
    for stored in events.iter().filter(|stored| !is_skipped(Some(stored.event.version))) {
        let failed = |error: String| failed(Some(stored.entity), Some(stored.event.version), error);
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
