//! The actor of one projection: which of its models are fed, and which one is served.
//!
//! Invariants:
//! - It alone makes, serves and deletes the files of its projection, one thing at a time.
//! - The models that are there are: the one that is served, one that is being built, the previous one. Others are left over and deleted.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kuma_shard::{FileOptions, ModelError, ModelFile};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::oneshot;

use super::{
    LOOK_AGAIN, ProjectionError, Shared, View, blocking, log_ends,
    purge::{PurgedModel, deleted, file_name, is_hopeless, purge_file, told},
    reached,
};
use crate::{
    Projection, ProjectionState, SqlProjection,
    model_dir::{ModelBuild, ModelDir, Served},
    model_query::{ServedModel, lag},
    projector::{
        Projector, ProjectorArguments, ProjectorMessage, ProjectorView, PurgeRequest, PurgeRule, PurgedLife, applied_in,
    },
    root::DONE,
};

/// How long a model may need to pass the one that it replaces, which stands still meanwhile.
const SWAP_MAX: Duration = Duration::from_secs(2);
/// How often lags are measured.
const TICK: Duration = Duration::from_secs(5);
/// How long a purge may take. A projection whose code hangs on an event does not come to it.
const PURGE_MAX: Duration = Duration::from_secs(60);

pub(super) type Done = oneshot::Sender<Result<(), ProjectionError>>;

/// What the actor of a projection is asked.
pub(super) enum ProjectionMessage {
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

pub(super) struct Coordinator;

pub(super) struct Arguments {
    pub(super) shared: Arc<Shared>,
    pub(super) dir: ModelDir,
    pub(super) options: FileOptions,
}

pub(super) struct CoordinatorState {
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
        let stays = self.served.rolled_back && former.is_none() && self.serving.is_some();
        self.served.rolled_back &= stays;
        let mut outcome = self.feed_serving(me).await;
        // Also a rebuild that was interrupted is gone on with.
        if outcome.is_ok() && !stays && (!is_served || self.is_being_rebuilt(version)?) {
            outcome = self.build(me, false).await;
        }
        match outcome {
            Ok(()) => self.remove_left_over(),
            Err(_) => self.definition = former,
        }
        self.publish();
        outcome
    }

    /// Whether there is a model of this version that is newer than the one that is served, and never was.
    fn is_being_rebuilt(&self, version: u32) -> Result<bool, ProjectionError> {
        let builds = self.dir.builds().map_err(self.files())?;
        let is_newer = |build: &&ModelBuild| {
            build.version == version && Some(**build) > self.served.serving && Some(**build) != self.served.previous
        };
        Ok(builds.iter().any(|build| is_newer(&build)))
    }

    /// Looks at what there is when the projection is registered for the first time since the store was opened.
    async fn find_models(&mut self, _me: &ActorRef<ProjectionMessage>) -> Result<(), ProjectionError> {
        self.dir.create().map_err(self.files())?;
        let noted = self.dir.served().map_err(self.files())?;
        self.served = noted;
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
        if self.served != noted {
            // What is built from here on may get the name of what is gone.
            self.dir.set_served(&self.served).map_err(self.files())?;
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
                if self.served.previous == Some(build) {
                    // There is nothing to go back to until it is built.
                    self.served.previous = None;
                    self.dir.set_served(&self.served).map_err(self.files())?;
                }
                self.dir.remove(build).map_err(self.files())?;
                self.start(me, build, definition, Some(true)).await?
            }
            other => other?,
        };
        self.building = Some(Model { build, fed: Some(fed) });
        Ok(())
    }

    fn remove_left_over(&self) {
        let kept = [self.served.serving, self.served.previous, self.building.as_ref().map(|model| model.build)];
        for build in self.dir.builds().unwrap_or_default() {
            if !kept.contains(&Some(build))
                && let Err(error) = self.dir.remove(build)
            {
                tracing::warn!(projection = self.shared.name, %error, "an old read model cannot be deleted");
            }
        }
    }

    async fn open_file(&self, build: ModelBuild) -> Result<ModelFile, ModelError> {
        let (path, options, disk_id) = (self.dir.file(build), self.options.clone(), self.disk_id());
        let store = self.shared.store.upgrade();
        let is_clustered = store.as_ref().is_some_and(|inner| inner.is_clustered());
        // Of a cluster with a node out of reach that is not known; the reader finds out then.
        let ends = match store {
            Some(inner) => log_ends(&inner).await.unwrap_or_default(),
            None => Vec::new(),
        };
        let open = move || {
            let file = ModelFile::open(&path, &options)?;
            let foreign = |detail: &str| Err(ModelError::Foreign { path: path.clone(), detail: detail.to_owned() });
            let is_ahead = |(log, place): (u16, u64)| ends.get(usize::from(log)).is_some_and(|end| place > *end);
            match file.meta("disk_id")? {
                Some(found) if found != disk_id => foreign("it was fed by another copy of the store"),
                // What is committed next would be taken for what it has.
                Some(_) if applied_in(&file, is_clustered)?.into_iter().any(is_ahead) => {
                    foreign("it has applied more than there is")
                }
                Some(_) => Ok(file),
                None => foreign("it does not say of which store it is"),
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
        let is_clustered = self.shared.store.upgrade().is_some_and(|inner| inner.is_clustered());
        let view = ProjectorView::of(&file, self.shared.shards, is_clustered)?;
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
        let Some((projector, view)) = &building.fed else { return };
        if stands_still(view) {
            return;
        }
        // Its file is not synced with each batch. What is served is whole also after a power loss.
        let (reply, synced) = oneshot::channel();
        if projector.cast(ProjectorMessage::Sync(reply)).is_err() || !matches!(synced.await, Ok(true)) {
            return;
        }
        let Some(inner) = self.shared.store.upgrade() else { return };
        if inner.is_clustered() && log_ends(&inner).await.is_err() {
            // A node is out of reach. Whatever the model lacks may be there.
            return;
        }
        let old = self.serving.as_ref().and_then(|model| model.fed.as_ref()).map(|(projector, _)| projector.clone());
        if let Some(old) = &old {
            let (reply, held) = oneshot::channel();
            if old.cast(ProjectorMessage::Hold(reply)).is_ok() {
                let _ = held.await;
            }
        }
        // At least what the old one has.
        let passed = match log_ends(&inner).await {
            Ok(ends) => passes(view, &ends).await,
            Err(_) => false,
        };
        if !passed {
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
        self.measure().await;
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
        let (_, lag) = lag(&inner, view).await;
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

fn stands_still(view: &ProjectorView) -> bool {
    !matches!(view.state(), ProjectionState::CatchingUp { .. } | ProjectionState::Live)
}

/// Whether a model comes to these ends in time. One that stands still is not waited for.
async fn passes(view: &ProjectorView, ends: &[u64]) -> bool {
    let until = Instant::now() + SWAP_MAX;
    while Instant::now() < until && !stands_still(view) {
        if let Ok(reached) = tokio::time::timeout(LOOK_AGAIN, reached(view, ends)).await {
            return reached;
        }
    }
    false
}

/// Closes a projector's file; returns when that is done.
async fn close(projector: &ActorRef<ProjectorMessage>) {
    let (reply, closed) = oneshot::channel();
    if projector.cast(ProjectorMessage::Close(reply)).is_ok() {
        let _ = closed.await;
    }
}
