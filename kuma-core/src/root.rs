//! The root of a store's supervision tree.
//!
//! ```text
//! root ── writer of keys.db
//!      ├─ writer of each shard
//!      ├─ entity supervisor of each shard ── entities
//!      ├─ snapshotter
//!      ├─ scrub
//!      ├─ eraser
//!      └─ each projection ── projector of each of its model files
//! ```
//!
//! Invariants:
//! - A child's end never ends the root. An entity supervisor that failed is started again; its entities went with it and are
//!   activated anew on their next use. A writer does not fail short of a bug; if it does, its file is out of use until the store is
//!   opened again: rather unavailable than wrong.

use std::{collections::HashMap, sync::Arc};

use kuma_shard::Activation;
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SpawnErr, SupervisionEvent};
use tokio::sync::oneshot;

use crate::{shard_core::ShardCore, supervisor::EntitySupervisor};

/// The reason of a child that has come to its end.
pub(crate) const DONE: &str = "done";

pub(crate) enum RootMessage {
    /// Starts the entity supervisor of a shard.
    Supervise { core: Arc<ShardCore>, reply: oneshot::Sender<Result<(), SpawnErr>> },
    /// Children that end from now on were told to. Answered once that is noted: news of children overtake messages.
    Stopping { noted: oneshot::Sender<()> },
}

impl ractor::Message for RootMessage {} // local only

pub(crate) struct Root;

#[derive(Default)]
pub(crate) struct RootState {
    supervisors: HashMap<ActorId, Arc<ShardCore>>,
    stopping: bool,
}

impl Actor for Root {
    type Msg = RootMessage;
    type State = RootState;
    type Arguments = ();

    async fn pre_start(&self, _me: ActorRef<RootMessage>, (): ()) -> Result<RootState, ActorProcessingErr> {
        Ok(RootState::default())
    }

    async fn handle(
        &self,
        me: ActorRef<RootMessage>,
        message: RootMessage,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RootMessage::Supervise { core, reply } => {
                let _ = reply.send(state.supervise(core, me.get_cell()).await);
            }
            RootMessage::Stopping { noted } => {
                state.stopping = true;
                let _ = noted.send(());
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        me: ActorRef<RootMessage>,
        event: SupervisionEvent,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        let child = match event {
            SupervisionEvent::ActorTerminated(_, _, Some(reason)) if reason == DONE => return Ok(()),
            SupervisionEvent::ActorFailed(child, _) | SupervisionEvent::ActorTerminated(child, _, _) => child,
            _ => return Ok(()),
        };
        if state.stopping {
            return Ok(());
        }
        match state.supervisors.remove(&child.get_id()) {
            Some(core) => {
                tracing::error!(shard = core.shard.number(), "an entity supervisor ended; it is started again");
                // Whoever is activated next must find all that its predecessor had submitted.
                core.settled(&Arc::new(Activation::at(0))).await;
                core.forget_all();
                if let Err(error) = state.supervise(core.clone(), me.get_cell()).await {
                    tracing::error!(shard = core.shard.number(), %error, "it could not be started; the shard is unavailable");
                }
            }
            None => tracing::error!(
                "a writer, the snapshotter, the scrub, the eraser or a projection ended; what it did is not done until the store is opened again"
            ),
        }
        Ok(())
    }
}

impl RootState {
    async fn supervise(&mut self, core: Arc<ShardCore>, me: ActorCell) -> Result<(), SpawnErr> {
        let (supervisor, _) = Actor::spawn_linked(None, EntitySupervisor, core.clone(), me).await?;
        self.supervisors.insert(supervisor.get_id(), core.clone());
        *core.supervisor.lock() = Some(supervisor);
        Ok(())
    }
}
