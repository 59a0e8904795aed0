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

mod coordinator;
mod purge;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Weak, atomic::Ordering::Relaxed},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use coordinator::{Arguments, Coordinator, ProjectionMessage};
use futures_util::future::join_all;
use kuma_shard::{FileOptions, ModelError, ModelFile, QueryError, Skipped};
use parking_lot::Mutex;
use ractor::{Actor, ActorRef};
use tokio::sync::oneshot;

pub(crate) use purge::{HeldRows, PurgedModel, held_rows};

use crate::{
    ErasureRule, Kuma, Projection, ProjectionState,
    model_dir::{ModelBuild, ModelDir},
    model_query::{Query, ServedModel, lag, lag_behind, open},
    projection::is_name,
    projector::{ProjectorView, PurgedLife, applied_in, behind, by_log},
    root::DONE,
    store::Inner,
};

/// Why a projection does not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProjectionError {
    /// Not every node of the cluster can be asked how far its logs go.
    #[error(
        "projection {name}: how far the logs of the cluster go is not known ({why}); ask again when its nodes are in reach"
    )]
    OutOfReach {
        /// The projection.
        name: String,
        /// Why.
        why: String,
    },
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
    /// The age of the oldest event that the model that is served has not applied. In a cluster: for how long it has not had all that is known, or a
    /// node has been out of reach, so that what it has is missing.
    pub lag: Duration,
    /// Commits behind the model that is served, wanted or not; in a cluster as far as is known, and `lag` says for how long some of it is not.
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
    /// On a node of a cluster it is fed with the events of all nodes, wherever slots go, and this node has the whole model; each node that is to
    /// answer queries of it registers it for itself.
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
    /// let answer = balances.query("SELECT amount FROM balance WHERE account = ?").bind("acc_001").run().await?;
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
        let (commits_behind, lag) = match (&serving, &building) {
            (Some((_, Some(view))), _) | (None, Some((_, view))) => lag(&store, view).await,
            // It stands still.
            (Some((model, None)), _) => self.lag_of(&store, *model).await?,
            (None, None) => (0, Duration::ZERO),
        };
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

    /// How far a model is behind that nobody feeds, and for how long it has been.
    async fn lag_of(&self, store: &Arc<Inner>, model: ModelBuild) -> Result<(u64, Duration), ProjectionError> {
        let path = ModelDir::of(store.data_dir(), &self.shared.name).file(model);
        let (options, is_clustered) = (store.file_options().clone(), store.is_clustered());
        let changed = std::fs::metadata(&path).and_then(|file| file.modified());
        let applied = blocking(move || applied_in(&ModelFile::open(&path, &options)?, is_clustered)).await?;
        if !is_clustered {
            return Ok(lag_behind(store, &by_log(applied, self.shared.shards)).await);
        }
        let age = changed.ok().and_then(|changed| changed.elapsed().ok()).unwrap_or_default();
        // A node out of reach is no reason to say nothing.
        let Ok(ends) = self.ends(store).await else { return Ok((0, age)) };
        let behind = behind(&ends, &by_log(applied, ends.len()));
        Ok((behind, if behind == 0 { Duration::ZERO } else { age }))
    }

    /// How far the logs go that it is fed with: of each shard, or in a cluster of each slot.
    async fn ends(&self, store: &Arc<Inner>) -> Result<Vec<u64>, ProjectionError> {
        log_ends(store).await.map_err(|why| ProjectionError::OutOfReach { name: self.shared.name.clone(), why })
    }

    /// Returns when the model of the current version is served and has applied everything that was durable when this was called.
    ///
    /// # Errors
    /// [`ProjectionError::Behind`] if that takes longer than `time_max`; [`ProjectionError::OutOfReach`] if it was not known for so long how far
    /// the logs go.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn caught_up(&self, time_max: Duration) -> Result<(), ProjectionError> {
        let until = tokio::time::Instant::now() + time_max;
        let ends = loop {
            let store = self.store()?;
            match self.ends(&store).await {
                Ok(ends) => break ends,
                // A slot that is on its way is nobody's for a moment.
                Err(_) if store.is_clustered() && tokio::time::Instant::now() < until => {
                    drop(store);
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Err(error) => return Err(error),
            }
        };
        let all_reached = async {
            loop {
                let serving = {
                    let view = self.shared.view.lock();
                    view.serving.clone().filter(|(model, _)| view.building.is_none() && model.version == view.wanted)
                };
                match serving {
                    // Another model may take its place meanwhile.
                    Some((_, Some(view))) => {
                        if let Ok(true) = tokio::time::timeout(LOOK_AGAIN, reached(&view, &ends)).await {
                            return;
                        }
                    }
                    _ => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        match tokio::time::timeout_at(until, all_reached).await {
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

    /// What is told of the model that is served, if it is fed.
    pub(crate) fn serving_view(&self) -> Option<Arc<ProjectorView>> {
        self.shared.view.lock().serving.as_ref().and_then(|(_, view)| view.clone())
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
                match (failure.slot, failure.seq) {
                    (Some(slot), Some(seq)) => write!(f, "failed at commit {seq} of slot {slot}")?,
                    _ => write!(f, "failed at position {} of shard {}", failure.position, failure.shard)?,
                }
                match failure.entity {
                    Some(entity) => write!(f, ", entity {entity}"),
                    None => Ok(()),
                }
            }
        }
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
            None => purge::purge_unknown(name, dir, options, &lives).await,
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

/// How long it is waited for a model until it is looked at again what has become of it.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How far logs go that models are fed with: of each shard, or in a cluster of each slot; or why that is not known, in words.
async fn log_ends(store: &Arc<Inner>) -> Result<Vec<u64>, String> {
    match store.cluster_logs().filter(|_| store.is_clustered()) {
        Some(logs) => logs.ends().await,
        None if store.is_clustered() => Err("this node does not take part in its cluster yet".to_owned()),
        None => Kuma { inner: store.clone() }.log_ends().map_err(|error| error.to_string()),
    }
}

/// Returns when all up to `ends` was applied; false if that will not be.
async fn reached(view: &ProjectorView, ends: &[u64]) -> bool {
    let mut positions = view.positions.subscribe();
    let is_there = |at: &Vec<u64>| ends.iter().zip(at).all(|(end, position)| position >= end);
    positions.wait_for(is_there).await.is_ok()
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
