//! The projections of a store: which models there are, which of them is served, and what can be done with them.
//!
//! ```text
//! registered ──► its version is served? ──yes──► fed on
//!                     │ no
//!                     ▼
//!                a model is built beside ──► nearly caught up ──► the old one is held ──► passed it ──► served in its place
//! ```
//!
//! Invariants:
//! - One actor a projection decides which model is served; `serving.json` says so before anybody is answered by it.
//! - A model takes another's place only when it has applied everything that the other one has: no reader ever goes back in time. The first
//!   model is served when it has applied everything that was durable at some moment.
//! - The model that was served before stays, and is purged like the one that is served, until another one becomes the previous.
//! - Models of projections that nobody registered are purged too: their files say how.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Weak, atomic::Ordering::Relaxed},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use futures_util::future::join_all;
use kuma_shard::{FileOptions, ModelError, ModelFile, Purged, QueryError, Skipped};
use parking_lot::Mutex;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::oneshot;

use crate::{
    ErasureRule, Filter, Kuma, Projection, ProjectionState, SqlProjection,
    model_dir::{ModelBuild, ModelDir, Served},
    model_query::{Query, ServedModel, json, lag, open},
    projection::{is_name, quoted},
    projector::{Projector, ProjectorArguments, ProjectorMessage, ProjectorView, PurgeRequest, PurgeRule, PurgedLife},
    root::DONE,
    store::Inner,
};

/// How long a model may need to pass the one that it replaces, which stands still meanwhile.
const SWAP_MAX: Duration = Duration::from_secs(2);
/// How often lags are measured.
const TICK: Duration = Duration::from_secs(5);
/// How long a purge may take. A projection whose code hangs on an event does not come to it.
const PURGE_MAX: Duration = Duration::from_secs(60);

/// Why a projection does not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProjectionError {
    /// Its definition cannot be used.
    #[error("projection {name}: {reason}")]
    Definition {
        /// The projection.
        name: String,
        /// Why.
        reason: String,
    },
    /// The first model is still being built.
    #[error("projection {name} is still being built ({state}); ask again later")]
    NotReady {
        /// The projection.
        name: String,
        /// How far it is.
        state: String,
    },
    /// There is no earlier model, or no code that could feed it.
    #[error("projection {name} cannot be rolled back: {reason}")]
    NoRollback {
        /// The projection.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// It has not failed.
    #[error("projection {name} does not stand still at an event: there is nothing to retry or to skip")]
    NotFailed {
        /// The projection.
        name: String,
    },
    /// There is no such projection.
    #[error("there is no projection {name}")]
    Unknown {
        /// What it was called.
        name: String,
    },
    /// It has not caught up within the time given.
    #[error("projection {name} has not caught up within {after:?}: {state}")]
    Behind {
        /// The projection.
        name: String,
        /// The time given.
        after: Duration,
        /// What it is doing.
        state: String,
    },
    /// The query cannot be answered.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// A file cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The directory of its files cannot be used.
    #[error("the files of projection {name}: {source}")]
    Files {
        /// The projection.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// The store is shutting down.
    #[error("the store is shutting down")]
    ShuttingDown,
}

/// A projection as it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct ProjectionStatus {
    /// The projection.
    pub name: String,
    /// The version of its code.
    pub version: u32,
    /// The model that is served, if there is one.
    pub serving: Option<ModelStatus>,
    /// The model that is being built.
    pub building: Option<ModelStatus>,
    /// The model that was served before.
    pub previous: Option<ModelBuild>,
    /// The age of the oldest event that the model that is served has not applied.
    pub lag: Duration,
    /// Commits behind the model that is served, wanted or not.
    pub commits_behind: u64,
}

/// A model as it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelStatus {
    /// Which one.
    pub model: ModelBuild,
    /// What it is doing; none if it is of an older version whose code is not there: it stands still, and is served until its successor takes
    /// its place.
    pub state: Option<ProjectionState>,
    /// Events that were applied since it was made.
    pub events: u64,
}

/// All projections of a store.
#[derive(Default)]
pub(crate) struct Projections {
    known: Mutex<BTreeMap<String, ProjectionHandle>>,
    /// Held while one is registered, dropped or purged without being known.
    registering: tokio::sync::Mutex<()>,
}

/// A projection of an open store. Cheap to clone.
#[derive(Clone)]
pub struct ProjectionHandle {
    shared: Arc<Shared>,
    actor: ActorRef<ProjectionMessage>,
}

/// What readers look at.
struct Shared {
    store: Weak<Inner>,
    name: String,
    shards: usize,
    served: ArcSwapOption<ServedModel>,
    view: Mutex<View>,
}

#[derive(Clone, Default)]
struct View {
    version: u32,
    /// The version of the model that is to be served: an older one after a rollback.
    wanted: u32,
    serving: Option<(ModelBuild, Option<Arc<ProjectorView>>)>,
    building: Option<(ModelBuild, Arc<ProjectorView>)>,
    previous: Option<ModelBuild>,
}

impl Kuma {
    /// Registers a projection, or a newer version of one, and begins to feed it. Returns at once; see [`ProjectionHandle::caught_up`].
    ///
    /// Register the Rust types of kinds with upcasters first ([`Kuma::register`]).
    ///
    /// ```
    /// # use kuma_core::{Kuma, Options, NewEvent, SqlProjection};
    /// # use std::time::Duration;
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let kuma = Kuma::start(Options::new(dir.path())).await?;
    /// let balances = kuma.projection(SqlProjection::parse("
    ///     -- projection: balances
    ///     -- version: 1
    ///     -- erasure: column balance.account
    ///     CREATE TABLE balance(account TEXT PRIMARY KEY, amount INTEGER NOT NULL) STRICT;
    ///
    ///     -- on account.Deposited
    ///     INSERT INTO balance(account, amount) VALUES (:entity, :data ->> 'amount')
    ///     ON CONFLICT(account) DO UPDATE SET amount = amount + excluded.amount;
    /// ")?).await?;
    /// kuma.raw("account", "acc_001").append(NewEvent::json("Deposited", &serde_json::json!({"amount": 7}))?).await?;
    /// balances.caught_up(Duration::from_secs(10)).await?;
    /// let answer = balances.query("SELECT amount FROM balance WHERE account = ?").bind("acc_001".to_owned()).run().await?;
    /// assert_eq!(answer.json(), serde_json::json!([{"amount": 7}]));
    /// # kuma.shutdown().await;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The definition cannot be used, or its files cannot. What was served before is still served.
    /// # Cancel safety
    /// If the future is dropped it may or may not be registered; register it again.
    pub async fn projection(&self, definition: impl Projection) -> Result<ProjectionHandle, ProjectionError> {
        self.register_projection(Arc::new(definition)).await
    }

    async fn register_projection(&self, definition: Arc<dyn Projection>) -> Result<ProjectionHandle, ProjectionError> {
        let name = definition.name().to_owned();
        check(&*definition)?;
        let inner = &self.inner;
        if inner.is_closing() {
            return Err(ProjectionError::ShuttingDown);
        }
        let projections = inner.projections();
        let _one_at_a_time = projections.registering.lock().await;
        let known = projections.known.lock().get(&name).cloned();
        if let Some(handle) = known {
            handle.ask(|reply| ProjectionMessage::Define(definition, reply)).await??;
            return Ok(handle);
        }
        let shards = self.open_shards().count();
        let shared = Arc::new(Shared {
            store: Arc::downgrade(inner),
            name: name.clone(),
            shards,
            served: ArcSwapOption::empty(),
            view: Mutex::default(),
        });
        let dir = ModelDir::of(inner.data_dir(), &name);
        let arguments = Arguments { shared: shared.clone(), dir, options: inner.file_options().clone() };
        let spawned = Actor::spawn_linked(None, Coordinator, arguments, inner.root_cell()).await;
        let (actor, _) = spawned.map_err(|_| ProjectionError::ShuttingDown)?;
        let handle = ProjectionHandle { shared, actor };
        let defined = handle.ask(|reply| ProjectionMessage::Define(definition, reply)).await;
        if let Err(error) = defined.and_then(|defined| defined) {
            handle.actor.stop(Some(DONE.to_owned()));
            return Err(error);
        }
        projections.known.lock().insert(name, handle.clone());
        Ok(handle)
    }

    /// The projections that are registered, by name.
    pub fn projections(&self) -> Vec<ProjectionHandle> {
        self.inner.projections().known.lock().values().cloned().collect()
    }

    /// A projection that is registered.
    ///
    /// # Errors
    /// [`ProjectionError::Unknown`].
    pub fn find_projection(&self, name: &str) -> Result<ProjectionHandle, ProjectionError> {
        let known = self.inner.projections().known.lock();
        known.get(name).cloned().ok_or_else(|| ProjectionError::Unknown { name: name.to_owned() })
    }

    /// Stops a projection and deletes its models, registered or not. They can be built again at any time.
    ///
    /// # Errors
    /// There is none, or a file cannot be deleted.
    pub async fn drop_projection(&self, name: &str) -> Result<(), ProjectionError> {
        let projections = self.inner.projections();
        let _one_at_a_time = projections.registering.lock().await;
        let known = projections.known.lock().remove(name);
        let is_known = known.is_some();
        if let Some(handle) = known {
            handle.ask(ProjectionMessage::Close).await?;
        }
        let files = |source| ProjectionError::Files { name: name.to_owned(), source };
        let dirs = ModelDir::all(self.inner.data_dir()).map_err(files)?;
        match dirs.into_iter().find(|(found, _)| found == name) {
            Some((_, dir)) => dir.remove_all().map_err(files),
            None if is_known => Ok(()),
            None => Err(ProjectionError::Unknown { name: name.to_owned() }),
        }
    }
}

/// What can be said of a definition without its file.
fn check(definition: &dyn Projection) -> Result<(), ProjectionError> {
    let name = definition.name().to_owned();
    let refuse = |reason: &str| Err(ProjectionError::Definition { name: name.clone(), reason: reason.to_owned() });
    if !is_name(&name) {
        return refuse("a name has lower-case letters, digits and _, at most 64, a letter first");
    }
    if definition.version() == 0 {
        return refuse("versions begin with 1");
    }
    match definition.erasure() {
        ErasureRule::None { reason } if reason.trim().is_empty() => {
            refuse("that it holds nothing personal needs a reason")
        }
        ErasureRule::Columns { columns } if columns.is_empty() => refuse("its erasure rule names no column"),
        ErasureRule::Statements { sql } if sql.trim().is_empty() => refuse("its erasure rule has no statement"),
        _ => Ok(()),
    }
}

impl ProjectionHandle {
    /// The name of the projection.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// A query of the model that is served: one `SELECT`, see [`Query`].
    pub fn query(&self, sql: impl Into<String>) -> Query<'_> {
        Query::new(self, sql.into())
    }

    /// What it is doing, and how late it is.
    ///
    /// # Errors
    /// The store is shutting down.
    pub async fn status(&self) -> Result<ProjectionStatus, ProjectionError> {
        let store = self.store()?;
        let View { version, serving, building, previous, .. } = self.shared.view.lock().clone();
        let status = |model: ModelBuild, view: Option<&Arc<ProjectorView>>| ModelStatus {
            model,
            state: view.map(|view| view.state()),
            events: view.map_or(0, |view| view.events.load(Relaxed)),
        };
        let positions = match (&serving, &building) {
            (Some((_, Some(view))), _) | (None, Some((_, view))) => view.positions.borrow().clone(),
            // It stands still.
            (Some((model, None)), _) => self.positions_of(&store, *model).await?,
            (None, None) => vec![0; self.shared.shards],
        };
        let (commits_behind, lag) = lag(&store, &positions).await;
        Ok(ProjectionStatus {
            name: self.shared.name.clone(),
            version,
            serving: serving.as_ref().map(|(model, view)| status(*model, view.as_ref())),
            building: building.as_ref().map(|(model, view)| status(*model, Some(view))),
            previous,
            lag,
            commits_behind,
        })
    }

    /// How far a model has read that nobody feeds.
    async fn positions_of(&self, store: &Arc<Inner>, model: ModelBuild) -> Result<Vec<u64>, ProjectionError> {
        let path = ModelDir::of(store.data_dir(), &self.shared.name).file(model);
        let (options, mut positions) = (store.file_options().clone(), vec![0; self.shared.shards]);
        let read = blocking(move || ModelFile::open(&path, &options)?.positions()).await?;
        for (shard, (position, _)) in read {
            if let Some(at) = positions.get_mut(usize::from(shard)) {
                *at = position;
            }
        }
        Ok(positions)
    }

    /// Returns when the model of the current version is served and has applied everything that was durable when this was called.
    ///
    /// # Errors
    /// [`ProjectionError::Behind`] if that takes longer than `time_max`.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn caught_up(&self, time_max: Duration) -> Result<(), ProjectionError> {
        let store = self.store()?;
        let ends = Kuma { inner: store }.log_ends().map_err(|error| self.definition_error(&error))?;
        let all_reached = async {
            loop {
                let serving = {
                    let view = self.shared.view.lock();
                    view.serving.clone().filter(|(model, _)| view.building.is_none() && model.version == view.wanted)
                };
                match serving {
                    Some((_, Some(view))) if reached(&view, &ends).await => return,
                    _ => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        match tokio::time::timeout(time_max, all_reached).await {
            Ok(()) => Ok(()),
            Err(_) => {
                let (name, state) = (self.shared.name.clone(), self.state_text());
                Err(ProjectionError::Behind { name, after: time_max, state })
            }
        }
    }

    /// Stands still until it is resumed, also when the store is opened again. What is served stays as it is.
    ///
    /// # Errors
    /// That it does so could not be written.
    pub async fn pause(&self) -> Result<(), ProjectionError> {
        self.ask(|reply| ProjectionMessage::Pause { pause: true, reply }).await?
    }

    /// Goes on after a pause.
    ///
    /// # Errors
    /// That it does so could not be written.
    pub async fn resume(&self) -> Result<(), ProjectionError> {
        self.ask(|reply| ProjectionMessage::Pause { pause: false, reply }).await?
    }

    /// Tries the event again at which it stands still: after its cause is mended.
    ///
    /// # Errors
    /// [`ProjectionError::NotFailed`].
    pub async fn retry(&self) -> Result<(), ProjectionError> {
        self.ask(|reply| ProjectionMessage::GoOn { skip: false, reply }).await?
    }

    /// Passes over the event at which it stands still. The model does not have its effects from then on; it is noted in
    /// [`ProjectionHandle::skipped`].
    ///
    /// # Errors
    /// [`ProjectionError::NotFailed`].
    pub async fn skip(&self) -> Result<(), ProjectionError> {
        self.ask(|reply| ProjectionMessage::GoOn { skip: true, reply }).await?
    }

    /// The events that the model that is served, or else the one that is being built, was told to pass over.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn skipped(&self) -> Result<Vec<Skipped>, ProjectionError> {
        let store = self.store()?;
        let build = {
            let view = self.shared.view.lock();
            let serving = view.serving.as_ref().map(|(build, _)| *build);
            serving.or_else(|| view.building.as_ref().map(|(build, _)| *build))
        };
        let Some(build) = build else { return Ok(Vec::new()) };
        let path = ModelDir::of(store.data_dir(), &self.shared.name).file(build);
        let options = store.file_options().clone();
        let read = move || ModelFile::open(&path, &options)?.skipped();
        Ok(tokio::task::spawn_blocking(read).await.map_err(|_| ProjectionError::ShuttingDown)??)
    }

    /// Builds the model of this version anew, beside the one that is served, and has it take its place. Returns when that has begun.
    ///
    /// # Errors
    /// The file cannot be made.
    pub async fn rebuild(&self) -> Result<(), ProjectionError> {
        self.ask(ProjectionMessage::Rebuild).await?
    }

    /// Serves the model again that was served before. It is fed on where its code is there: that of a projection in SQL always is. It stays,
    /// also when the store is opened again, until another version is registered or it is rebuilt.
    ///
    /// # Errors
    /// [`ProjectionError::NoRollback`].
    pub async fn rollback(&self) -> Result<(), ProjectionError> {
        self.ask(ProjectionMessage::Rollback).await?
    }

    pub(crate) fn store(&self) -> Result<Arc<Inner>, ProjectionError> {
        open(&self.shared.store)
    }

    pub(crate) fn served(&self) -> Option<Arc<ServedModel>> {
        self.shared.served.load_full()
    }

    pub(crate) fn shards(&self) -> usize {
        self.shared.shards
    }

    pub(crate) fn not_ready(&self) -> ProjectionError {
        ProjectionError::NotReady { name: self.shared.name.clone(), state: self.state_text() }
    }

    fn state_text(&self) -> String {
        let view = self.shared.view.lock();
        let building = view.building.as_ref().map(|(_, view)| view.state());
        let serving = || view.serving.as_ref().and_then(|(_, view)| view.as_ref().map(|view| view.state()));
        match building.or_else(serving) {
            Some(state) => state.to_string(),
            None => "its code is not registered".to_owned(),
        }
    }

    fn definition_error(&self, error: &dyn std::fmt::Display) -> ProjectionError {
        ProjectionError::Definition { name: self.shared.name.clone(), reason: error.to_string() }
    }

    async fn ask<T>(
        &self,
        message: impl FnOnce(oneshot::Sender<T>) -> ProjectionMessage,
    ) -> Result<T, ProjectionError> {
        let (reply, answer) = oneshot::channel();
        self.actor.cast(message(reply)).map_err(|_| ProjectionError::ShuttingDown)?;
        answer.await.map_err(|_| ProjectionError::ShuttingDown)
    }
}

/// For messages, without the text of a failure: that may quote an event.
impl std::fmt::Display for ProjectionState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ProjectionState::CatchingUp { commits_left, progress, .. } => {
                write!(f, "catching up, {:.0} % done, {commits_left} commits left", progress * 100.0)
            }
            ProjectionState::Live => f.write_str("live"),
            ProjectionState::Paused => f.write_str("paused"),
            ProjectionState::Waiting { why } => write!(f, "waiting: {why}"),
            ProjectionState::Failed(failure) => {
                write!(f, "failed at position {} of shard {}", failure.position, failure.shard)?;
                match failure.entity {
                    Some(entity) => write!(f, ", entity {entity}"),
                    None => Ok(()),
                }
            }
        }
    }
}

type Done = oneshot::Sender<Result<(), ProjectionError>>;

/// What the actor of a projection is asked.
enum ProjectionMessage {
    Define(Arc<dyn Projection>, Done),
    CaughtUp(ModelBuild),
    Pause { pause: bool, reply: Done },
    GoOn { skip: bool, reply: Done },
    Rebuild(Done),
    Rollback(Done),
    Purge { lives: Arc<[PurgedLife]>, reply: oneshot::Sender<Result<Vec<PurgedModel>, String>> },
    Tick,
    Close(oneshot::Sender<()>),
}

impl ractor::Message for ProjectionMessage {} // local only

/// A model that was purged.
#[derive(Clone, Debug)]
pub(crate) struct PurgedModel {
    /// Its file, from the data directory on.
    pub(crate) file: String,
    /// Of which entities it may have held something.
    pub(crate) filter: Arc<Filter>,
    pub(crate) outcome: &'static str,
}

struct Coordinator;

struct Arguments {
    shared: Arc<Shared>,
    dir: ModelDir,
    options: FileOptions,
}

struct CoordinatorState {
    shared: Arc<Shared>,
    dir: ModelDir,
    options: FileOptions,
    definition: Option<Arc<dyn Projection>>,
    served: Served,
    serving: Option<Model>,
    building: Option<Model>,
}

/// A model with its projector, if there is code for it.
struct Model {
    build: ModelBuild,
    fed: Option<(ActorRef<ProjectorMessage>, Arc<ProjectorView>)>,
}

impl Actor for Coordinator {
    type Msg = ProjectionMessage;
    type State = CoordinatorState;
    type Arguments = Arguments;

    async fn pre_start(
        &self,
        me: ActorRef<ProjectionMessage>,
        Arguments { shared, dir, options }: Arguments,
    ) -> Result<CoordinatorState, ActorProcessingErr> {
        me.send_after(TICK, || ProjectionMessage::Tick);
        let served = Served::default();
        Ok(CoordinatorState { shared, dir, options, definition: None, served, serving: None, building: None })
    }

    async fn handle(
        &self,
        me: ActorRef<ProjectionMessage>,
        message: ProjectionMessage,
        state: &mut CoordinatorState,
    ) -> Result<(), ActorProcessingErr> {
        // A caller that is gone does not want to know.
        match message {
            ProjectionMessage::Define(definition, reply) => drop(reply.send(state.define(&me, definition).await)),
            ProjectionMessage::CaughtUp(build) => state.caught_up(build).await,
            ProjectionMessage::Pause { pause, reply } => drop(reply.send(state.pause(pause).await)),
            ProjectionMessage::GoOn { skip, reply } => drop(reply.send(state.go_on(skip).await)),
            ProjectionMessage::Rebuild(reply) => drop(reply.send(state.rebuild(&me).await)),
            ProjectionMessage::Rollback(reply) => drop(reply.send(state.rollback(&me).await)),
            ProjectionMessage::Purge { lives, reply } => drop(reply.send(state.purge(&me, lives).await)),
            ProjectionMessage::Tick => {
                state.measure().await;
                me.send_after(TICK, || ProjectionMessage::Tick);
            }
            ProjectionMessage::Close(reply) => {
                state.close().await;
                let _ = reply.send(());
                me.stop(Some(DONE.to_owned()));
            }
        }
        Ok(())
    }

    /// A projector that ends was told to, or its file is closed for good: others are not concerned.
    async fn handle_supervisor_evt(
        &self,
        _me: ActorRef<ProjectionMessage>,
        event: SupervisionEvent,
        state: &mut CoordinatorState,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(_, error) = event {
            tracing::error!(projection = state.shared.name, %error, "a projector ended; its model stands still until the store is opened again");
        }
        Ok(())
    }
}

impl CoordinatorState {
    fn files(&self) -> impl Fn(std::io::Error) -> ProjectionError + use<> {
        let name = self.shared.name.clone();
        move |source| ProjectionError::Files { name: name.clone(), source }
    }

    fn refuse(&self, reason: impl Into<String>) -> ProjectionError {
        ProjectionError::Definition { name: self.shared.name.clone(), reason: reason.into() }
    }

    async fn define(
        &mut self,
        me: &ActorRef<ProjectionMessage>,
        definition: Arc<dyn Projection>,
    ) -> Result<(), ProjectionError> {
        let version = definition.version();
        match &self.definition {
            Some(known) if known.version() == version => {
                return match known.source() == definition.source() {
                    true => Ok(()),
                    false => Err(self.refuse(format!("it was changed and its version is still {version}; raise it"))),
                };
            }
            Some(_) => {}
            None => self.find_models(me).await?,
        }
        let former = self.definition.replace(definition);
        // Whatever was being built is of no use any more.
        if let Some(model) = self.building.take_if(|model| model.build.version != version) {
            self.discard(model).await;
        }
        let is_served = self.serving.as_ref().is_some_and(|model| model.build.version == version);
        let stays = self.served.rolled_back && former.is_none();
        let outcome = if is_served || stays {
            self.feed_serving(me).await
        } else {
            self.served.rolled_back = false;
            let fed = self.feed_serving(me).await;
            match fed {
                Ok(()) => self.build(me, false).await,
                Err(error) => Err(error),
            }
        };
        if outcome.is_err() {
            self.definition = former;
        }
        self.publish();
        outcome
    }

    /// Looks at what there is when the projection is registered for the first time since the store was opened.
    async fn find_models(&mut self, _me: &ActorRef<ProjectionMessage>) -> Result<(), ProjectionError> {
        self.dir.create().map_err(self.files())?;
        self.served = self.dir.served().map_err(self.files())?;
        let builds = self.dir.builds().map_err(self.files())?;
        self.served.serving = self.served.serving.filter(|build| builds.contains(build));
        self.served.previous = self.served.previous.filter(|build| builds.contains(build));
        if let Some(build) = self.served.serving {
            match self.open_file(build).await {
                Ok(file) => drop(file.close()),
                Err(error @ ModelError::Newer { .. }) => return Err(error.into()),
                Err(error @ ModelError::Foreign { .. }) => {
                    tracing::error!(projection = self.shared.name, %error, "a read model cannot be used; it is built again");
                    self.dir.remove(build).map_err(self.files())?;
                    self.served.serving = None;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.serving = self.served.serving.map(|build| Model { build, fed: None });
        self.serve();
        Ok(())
    }

    /// Has the model that is served be fed on, if there is code for it.
    async fn feed_serving(&mut self, me: &ActorRef<ProjectionMessage>) -> Result<(), ProjectionError> {
        let Some(build) = self.serving.as_ref().filter(|model| model.fed.is_none()).map(|model| model.build) else {
            return Ok(());
        };
        let Some(code) = self.code_for(build).await? else { return Ok(()) };
        let fed = self.start(me, build, code, None).await?;
        if let Some(model) = &mut self.serving {
            model.fed = Some(fed);
        }
        Ok(())
    }

    /// The code of a model's version: that which is registered, or that which is kept with the model.
    async fn code_for(&self, build: ModelBuild) -> Result<Option<Arc<dyn Projection>>, ProjectionError> {
        if let Some(definition) = self.definition.as_ref().filter(|definition| definition.version() == build.version) {
            return Ok(Some(definition.clone()));
        }
        let file = self.open_file(build).await?;
        let source = file.meta("source")?;
        let _ = file.close();
        let parsed = source.filter(|source| !source.is_empty()).map(|source| SqlProjection::parse(&source));
        Ok(parsed.and_then(Result::ok).map(|projection| Arc::new(projection) as Arc<dyn Projection>))
    }

    /// Begins to build a model of the registered version, or goes on with one that was begun.
    async fn build(&mut self, me: &ActorRef<ProjectionMessage>, anew: bool) -> Result<(), ProjectionError> {
        let Some(definition) = self.definition.clone() else { return Ok(()) };
        let version = definition.version();
        let builds = self.dir.builds().map_err(self.files())?;
        let newest = builds.iter().filter(|build| build.version == version).max().copied();
        // One that was served before catches up from where it stopped.
        let begun = newest.filter(|build| !anew && Some(*build) != self.served.serving);
        let build = match begun {
            Some(build) => build,
            None => ModelBuild { version, build: newest.map_or(1, |newest| newest.build + 1) },
        };
        let fed = match self.start(me, build, definition.clone(), Some(begun.is_none())).await {
            Err(ProjectionError::Model(
                error @ (ModelError::Foreign { .. } | ModelError::MigrationChanged { .. } | ModelError::Sqlite { .. }),
            )) if begun.is_some() => {
                tracing::warn!(projection = self.shared.name, %error, "a read model that was being built cannot be used; it is begun again");
                self.dir.remove(build).map_err(self.files())?;
                self.start(me, build, definition, Some(true)).await?
            }
            other => other?,
        };
        // Others that were left over.
        for old in builds {
            let is_kept = Some(old) == self.served.serving || Some(old) == self.served.previous || old == build;
            if !is_kept && let Err(error) = self.dir.remove(old) {
                tracing::warn!(projection = self.shared.name, %error, "an old read model cannot be deleted");
            }
        }
        self.building = Some(Model { build, fed: Some(fed) });
        Ok(())
    }

    async fn open_file(&self, build: ModelBuild) -> Result<ModelFile, ModelError> {
        let (path, options, disk_id) = (self.dir.file(build), self.options.clone(), self.disk_id());
        let open = move || {
            let file = ModelFile::open(&path, &options)?;
            match file.meta("disk_id")? {
                Some(found) if found == disk_id => Ok(file),
                _ => {
                    let detail = "it was fed by another copy of the store".to_owned();
                    Err(ModelError::Foreign { path: path.clone(), detail })
                }
            }
        };
        blocking(open).await
    }

    fn disk_id(&self) -> String {
        self.shared.store.upgrade().map(|inner| inner.disk_id().to_string()).unwrap_or_default()
    }

    /// Starts the projector of a model, whose file is made if it is to be new.
    async fn start(
        &self,
        me: &ActorRef<ProjectionMessage>,
        build: ModelBuild,
        definition: Arc<dyn Projection>,
        new: Option<bool>,
    ) -> Result<(ActorRef<ProjectorMessage>, Arc<ProjectorView>), ProjectionError> {
        let filter = definition.filter();
        let erasure = definition.erasure();
        let sql = erasure.sql();
        let mut file = match new {
            Some(true) => {
                let text = |value: &dyn Fn() -> serde_json::Result<String>| value().unwrap_or_default();
                let meta = vec![
                    ("disk_id", self.disk_id()),
                    ("name", self.shared.name.clone()),
                    ("version", build.version.to_string()),
                    ("filter", text(&|| serde_json::to_string(&filter))),
                    ("erasure", text(&|| serde_json::to_string(&erasure))),
                    ("source", definition.source().unwrap_or_default().to_owned()),
                ];
                self.dir.remove(build).map_err(self.files())?;
                let (path, options) = (self.dir.file(build), self.options.clone());
                blocking(move || ModelFile::create(&path, &options, &meta)).await?
            }
            _ => self.open_file(build).await?,
        };
        let source = file.meta("source")?.unwrap_or_default();
        if source != definition.source().unwrap_or_default() {
            let _ = file.close();
            let version = build.version;
            return Err(self.refuse(format!("it was changed and its version is still {version}; raise it")));
        }
        // What is registered now is what counts from here on.
        file.set_meta("filter", &serde_json::to_string(&filter).unwrap_or_default())?;
        file.set_meta("erasure", &serde_json::to_string(&erasure).unwrap_or_default())?;
        let (migrations, rule) = (definition.migrations(), sql.clone());
        let migrated = blocking(move || {
            let migrated = file.migrate(&migrations).and_then(|()| file.check_purge(&rule));
            Ok((file, migrated))
        });
        let (file, migrated) = migrated.await?;
        if let Err(error) = migrated {
            let _ = file.close();
            if new == Some(true) {
                let _ = self.dir.remove(build);
            }
            return Err(error.into());
        }
        let view = ProjectorView::of(&file, self.shared.shards)?;
        let paused = file.meta("paused")?.as_deref() == Some("1");
        let caught_up = {
            let (me, shared) = (me.clone(), self.shared.clone());
            let is_served = move || shared.served.load().as_ref().is_some_and(|served| served.build == build);
            Box::new(move || {
                if !is_served() {
                    let _ = me.cast(ProjectionMessage::CaughtUp(build));
                }
            })
        };
        let arguments = ProjectorArguments {
            store: self.shared.store.clone(),
            definition,
            file,
            purge: PurgeRule { filter: Arc::new(filter), sql: sql.into() },
            view: view.clone(),
            paused,
            caught_up,
        };
        let projector = Projector::start(arguments, me.get_cell()).await;
        Ok((projector.map_err(|_| ProjectionError::ShuttingDown)?, view))
    }

    /// Has the model take its place, if that can be now.
    async fn caught_up(&mut self, build: ModelBuild) {
        let Some(building) = self.building.as_ref().filter(|model| model.build == build) else { return };
        let Some((_, view)) = &building.fed else { return };
        let Some(inner) = self.shared.store.upgrade() else { return };
        let old = self.serving.as_ref().and_then(|model| model.fed.as_ref()).map(|(projector, _)| projector.clone());
        if let Some(old) = &old {
            let (reply, held) = oneshot::channel();
            if old.cast(ProjectorMessage::Hold(reply)).is_ok() {
                let _ = held.await;
            }
        }
        // At least what the old one has.
        let Ok(ends) = (Kuma { inner }).log_ends() else { return };
        if !matches!(tokio::time::timeout(SWAP_MAX, reached(view, &ends)).await, Ok(true)) {
            if let Some(old) = old {
                let _ = old.cast(ProjectorMessage::Release);
            }
            return;
        }
        let Some(building) = self.building.take() else { return };
        let former = self.serving.replace(building);
        self.replace_served(former, false).await;
    }

    /// Makes it known that another model is served, in the place of `former`.
    async fn replace_served(&mut self, former: Option<Model>, rolled_back: bool) {
        let previous = former.as_ref().map(|model| model.build);
        let outdated = self
            .served
            .previous
            .filter(|old| Some(*old) != previous && self.serving.as_ref().is_none_or(|model| model.build != *old));
        self.served = Served { serving: self.serving.as_ref().map(|model| model.build), previous, rolled_back };
        if let Err(error) = self.dir.set_served(&self.served) {
            // The next start begins with the former one, which is still there.
            tracing::warn!(projection = self.shared.name, %error, "that another read model is served cannot be written");
        }
        self.serve();
        self.publish();
        tracing::info!(
            projection = self.shared.name,
            model = self.served.serving.map(|build| build.to_string()),
            "a read model is served"
        );
        if let Some(Model { fed: Some((projector, _)), .. }) = former {
            close(&projector).await;
        }
        if let Some(old) = outdated
            && let Err(error) = self.dir.remove(old)
        {
            tracing::warn!(projection = self.shared.name, %error, "an old read model cannot be deleted");
        }
    }

    /// What readers are answered by.
    fn serve(&self) {
        let served = self
            .serving
            .as_ref()
            .map(|model| Arc::new(ServedModel::new(model.build, self.dir.file(model.build), self.options.clone())));
        if let Some(former) = self.shared.served.swap(served) {
            former.close_idle();
        }
    }

    fn publish(&self) {
        let view = |model: &Model| model.fed.as_ref().map(|(_, view)| view.clone());
        let version = self.definition.as_ref().map_or(0, |definition| definition.version());
        let rolled_back = self.serving.as_ref().filter(|_| self.served.rolled_back);
        *self.shared.view.lock() = View {
            version,
            wanted: rolled_back.map_or(version, |model| model.build.version),
            serving: self.serving.as_ref().map(|model| (model.build, view(model))),
            building: self.building.as_ref().and_then(|model| Some((model.build, view(model)?))),
            previous: self.served.previous,
        };
    }

    fn projectors(&self) -> Vec<ActorRef<ProjectorMessage>> {
        let models = self.serving.iter().chain(&self.building);
        models.filter_map(|model| model.fed.as_ref().map(|(projector, _)| projector.clone())).collect()
    }

    async fn pause(&self, pause: bool) -> Result<(), ProjectionError> {
        for projector in self.projectors() {
            let (reply, done) = oneshot::channel();
            let message = if pause { ProjectorMessage::Pause(reply) } else { ProjectorMessage::Resume(reply) };
            projector.cast(message).map_err(|_| ProjectionError::ShuttingDown)?;
            done.await.map_err(|_| ProjectionError::ShuttingDown)??;
        }
        Ok(())
    }

    async fn go_on(&self, skip: bool) -> Result<(), ProjectionError> {
        let mut went_on = false;
        for projector in self.projectors() {
            let (reply, done) = oneshot::channel();
            let asked = projector.cast(ProjectorMessage::GoOn { skip, reply });
            asked.map_err(|_| ProjectionError::ShuttingDown)?;
            went_on |= done.await.map_err(|_| ProjectionError::ShuttingDown)?;
        }
        match went_on {
            true => Ok(()),
            false => Err(ProjectionError::NotFailed { name: self.shared.name.clone() }),
        }
    }

    async fn rebuild(&mut self, me: &ActorRef<ProjectionMessage>) -> Result<(), ProjectionError> {
        if let Some(model) = self.building.take() {
            self.discard(model).await;
        }
        self.served.rolled_back = false;
        let built = self.build(me, true).await;
        self.publish();
        built
    }

    async fn rollback(&mut self, me: &ActorRef<ProjectionMessage>) -> Result<(), ProjectionError> {
        let refuse = |reason| ProjectionError::NoRollback { name: self.shared.name.clone(), reason };
        let previous = self.served.previous.ok_or_else(|| refuse("no earlier model is kept"))?;
        let code = self.code_for(previous).await?;
        let code = code.ok_or_else(|| {
            refuse("the code of the earlier version is not there; deploy it, its model is kept and catches up")
        })?;
        if let Some(model) = self.building.take() {
            self.discard(model).await;
        }
        let fed = self.start(me, previous, code, None).await?;
        let former = self.serving.replace(Model { build: previous, fed: Some(fed) });
        self.replace_served(former, true).await;
        Ok(())
    }

    async fn discard(&self, model: Model) {
        if let Some((projector, _)) = &model.fed {
            close(projector).await;
        }
        if Some(model.build) == self.served.previous {
            return;
        }
        if let Err(error) = self.dir.remove(model.build) {
            tracing::warn!(projection = self.shared.name, %error, "a read model that is of no use cannot be deleted");
        }
    }

    async fn measure(&self) {
        let Some(inner) = self.shared.store.upgrade() else { return };
        let Some((_, view)) = self.serving.as_ref().and_then(|model| model.fed.as_ref()) else { return };
        let positions = view.positions.borrow().clone();
        let (_, lag) = lag(&inner, &positions).await;
        inner.metrics().projection_lag(&self.shared.name, lag, matches!(view.state(), ProjectionState::Failed(_)));
    }

    /// Deletes what any of the models holds of these lives.
    async fn purge(
        &mut self,
        me: &ActorRef<ProjectionMessage>,
        lives: Arc<[PurgedLife]>,
    ) -> Result<Vec<PurgedModel>, String> {
        if let Some(served) = self.shared.served.load_full() {
            served.close_idle();
        }
        let mut purged = Vec::new();
        for build in self.dir.builds().map_err(|error| error.to_string())? {
            let models = self.serving.iter().chain(&self.building);
            let projector =
                models.filter(|model| model.build == build).find_map(|model| Some(model.fed.as_ref()?.0.clone()));
            let outcome = match projector {
                Some(projector) => {
                    let (reply, done) = oneshot::channel();
                    let request = PurgeRequest { lives: lives.clone(), reply };
                    projector.cast(ProjectorMessage::Purge(request)).map_err(|error| error.to_string())?;
                    match tokio::time::timeout(PURGE_MAX, done).await {
                        Ok(Ok(outcome)) => outcome,
                        Ok(Err(_)) => return Err(format!("projection {} is being closed", self.shared.name)),
                        Err(_) => return Err(format!("projection {} is still busy with an event", self.shared.name)),
                    }
                }
                None => purge_file(&self.dir, build, &self.options, lives.clone()).await,
            };
            let file = file_name(&self.shared.name, build);
            match outcome {
                Ok(concerned) => purged.extend(told(file, concerned)),
                Err(error) if is_hopeless(&error) => {
                    tracing::error!(projection = self.shared.name, model = %build, %error, "a read model cannot be purged; it is deleted and built again");
                    self.delete_model(me, build).await?;
                    purged.push(deleted(file));
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(purged)
    }

    /// Deletes a model that cannot be purged, whatever it is to the projection.
    async fn delete_model(&mut self, me: &ActorRef<ProjectionMessage>, build: ModelBuild) -> Result<(), String> {
        let words = |error: &dyn std::fmt::Display| error.to_string();
        let is_it = |model: &mut Model| model.build == build;
        let (serving, building) = (self.serving.take_if(is_it), self.building.take_if(is_it));
        self.served.serving = self.serving.as_ref().map(|model| model.build);
        self.served.previous = self.served.previous.filter(|previous| *previous != build);
        self.serve();
        for model in serving.iter().chain(&building) {
            if let Some((projector, _)) = &model.fed {
                close(projector).await;
            }
        }
        self.dir.set_served(&self.served).map_err(|error| words(&error))?;
        self.dir.remove(build).map_err(|error| words(&error))?;
        if self.building.is_none() && (serving.is_some() || building.is_some()) {
            self.build(me, true).await.map_err(|error| words(&error))?;
        }
        self.publish();
        Ok(())
    }

    async fn close(&mut self) {
        self.shared.served.store(None);
        for projector in self.projectors() {
            close(&projector).await;
        }
        (self.serving, self.building) = (None, None);
    }
}

/// Returns when all up to `ends` was applied; false if that will not be.
async fn reached(view: &ProjectorView, ends: &[u64]) -> bool {
    let mut positions = view.positions.subscribe();
    let is_there = |at: &Vec<u64>| ends.iter().zip(at).all(|(end, position)| position >= end);
    positions.wait_for(is_there).await.is_ok()
}

/// Closes a projector's file; returns when that is done.
async fn close(projector: &ActorRef<ProjectorMessage>) {
    let (reply, closed) = oneshot::channel();
    if projector.cast(ProjectorMessage::Close(reply)).is_ok() {
        let _ = closed.await;
    }
}

fn file_name(name: &str, build: ModelBuild) -> String {
    format!("{}/{name}/{build}.db", crate::model_dir::PROJECTIONS)
}

/// What a receipt says of a model that was concerned.
fn told(file: String, concerned: Option<Arc<Filter>>) -> Option<PurgedModel> {
    Some(PurgedModel { file, filter: concerned?, outcome: "rows deleted; file written anew; log cut" })
}

fn deleted(file: String) -> PurgedModel {
    PurgedModel { file, filter: Arc::default(), outcome: "deleted, because it could not be purged" }
}

/// Whether trying again is of no use: the rule fails, or the file is damaged.
fn is_hopeless(error: &ModelError) -> bool {
    use kuma_shard::rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    match error {
        ModelError::Foreign { .. } => true,
        ModelError::Purge { cause, .. } => !crate::projection::is_passing(cause),
        ModelError::Sqlite { source, .. } => {
            matches!(source.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
        }
        _ => false,
    }
}

/// Purges a model that nobody feeds, by what its file says.
async fn purge_file(
    dir: &ModelDir,
    build: ModelBuild,
    options: &FileOptions,
    lives: Arc<[PurgedLife]>,
) -> Result<Option<Arc<Filter>>, ModelError> {
    let (path, options) = (dir.file(build), options.clone());
    blocking(move || {
        let mut file = ModelFile::open(&path, &options)?;
        let foreign = |detail: &str| ModelError::Foreign { path: path.clone(), detail: detail.to_owned() };
        let filter = file.meta("filter")?.and_then(|text| serde_json::from_str::<Filter>(&text).ok());
        let erasure = file.meta("erasure")?.and_then(|text| serde_json::from_str::<ErasureRule>(&text).ok());
        let (Some(filter), Some(erasure)) = (filter, erasure) else {
            return Err(foreign("it does not say how it is purged"));
        };
        let rule = PurgeRule { filter: Arc::new(filter), sql: erasure.sql().into() };
        let concerned: Vec<Purged> = rule.concerned(&lives);
        let purged = match concerned.is_empty() {
            true => None,
            false => {
                file.purge(&rule.sql, &concerned)?;
                Some(rule.filter)
            }
        };
        file.close()?;
        Ok(purged)
    })
    .await
}

/// Runs something that reads or writes a file.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ModelError> + Send + 'static,
) -> Result<T, ModelError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // It does not panic: the runtime is shutting down.
        Err(error) => Err(ModelError::Foreign { path: std::path::PathBuf::new(), detail: error.to_string() }),
    }
}

impl Projections {
    /// Deletes what any model, of whatever projection, holds of these lives.
    pub(crate) async fn purge(
        &self,
        data_dir: &std::path::Path,
        options: &FileOptions,
        lives: Arc<[PurgedLife]>,
    ) -> Result<Vec<PurgedModel>, String> {
        let _one_at_a_time = self.registering.lock().await;
        let known: HashMap<String, ProjectionHandle> =
            self.known.lock().iter().map(|(name, handle)| (name.clone(), handle.clone())).collect();
        let dirs = ModelDir::all(data_dir).map_err(|error| format!("the files of projections: {error}"))?;
        let purge = dirs.iter().map(async |(name, dir)| match known.get(name) {
            Some(handle) => {
                let asked = handle.ask(|reply| ProjectionMessage::Purge { lives: lives.clone(), reply }).await;
                asked.map_err(|error| error.to_string())?
            }
            None => purge_unknown(name, dir, options, &lives).await,
        });
        let mut purged = Vec::new();
        for outcome in join_all(purge).await {
            purged.extend(outcome?);
        }
        Ok(purged)
    }

    /// Closes every file.
    pub(crate) async fn close(&self) {
        let known: Vec<ProjectionHandle> = std::mem::take(&mut *self.known.lock()).into_values().collect();
        join_all(known.iter().map(|handle| handle.ask(ProjectionMessage::Close))).await;
    }
}

/// Purges the models of a projection that nobody registered.
async fn purge_unknown(
    name: &str,
    dir: &ModelDir,
    options: &FileOptions,
    lives: &Arc<[PurgedLife]>,
) -> Result<Vec<PurgedModel>, String> {
    let mut purged = Vec::new();
    for build in dir.builds().map_err(|error| error.to_string())? {
        let file = file_name(name, build);
        match purge_file(dir, build, options, lives.clone()).await {
            Ok(concerned) => purged.extend(told(file, concerned)),
            Err(error) if is_hopeless(&error) => {
                tracing::error!(projection = name, model = %build, %error, "a read model cannot be purged; it is deleted, and built again when it is registered");
                dir.remove(build).map_err(|error| error.to_string())?;
                purged.push(deleted(file));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(purged)
}

/// What one read model holds of an entity, for an archive.
#[derive(serde::Serialize)]
pub(crate) struct HeldRows {
    projection: String,
    /// Which model.
    model: ModelBuild,
    /// The table; none where the model is purged by statements, which do not say where they find the entity.
    table: Option<String>,
    rows: Vec<serde_json::Map<String, serde_json::Value>>,
}

/// What the models of all projections hold of an entity, as far as their erasure rules say where.
pub(crate) fn held_rows(
    data_dir: &std::path::Path,
    options: &FileOptions,
    kind: &str,
    id: &str,
) -> std::io::Result<Vec<HeldRows>> {
    let mut held = Vec::new();
    for (projection, dir) in ModelDir::all(data_dir)? {
        for model in dir.builds()? {
            let file = ModelFile::open(&dir.file(model), options).map_err(std::io::Error::other)?;
            let meta = |name| file.meta(name).map(Option::unwrap_or_default).map_err(std::io::Error::other);
            let filter: Filter = serde_json::from_str(&meta("filter")?)?;
            let erasure: ErasureRule = serde_json::from_str(&meta("erasure")?)?;
            let projection = projection.clone();
            match erasure {
                _ if !filter.matches_kind(kind) => {}
                ErasureRule::None { .. } => {}
                ErasureRule::Statements { .. } => {
                    held.push(HeldRows { projection, model, table: None, rows: Vec::new() });
                }
                ErasureRule::Columns { columns } => {
                    for (table, column) in columns {
                        let select = format!("SELECT * FROM {} WHERE {} = ?", quoted(&table), quoted(&column));
                        let rows = file.read(|connection| {
                            let mut statement = connection.prepare(&select)?;
                            let columns: Vec<String> =
                                statement.column_names().into_iter().map(str::to_owned).collect();
                            let rows = statement.query_map([id], |row| {
                                let value = |(index, name): (usize, &String)| Ok((name.clone(), json(row.get(index)?)));
                                columns.iter().enumerate().map(value).collect()
                            })?;
                            rows.collect()
                        });
                        let (rows, table) = (rows.map_err(std::io::Error::other)?, Some(table));
                        held.push(HeldRows { projection: projection.clone(), model, table, rows });
                    }
                }
            }
        }
    }
    Ok(held)
}
