//! The entity supervisor of a shard: the only one that makes and ends its entities' actors.
//!
//! ```text
//!  absent ──Activate──► live ──idle, over budget, Passivate──► leaving ──actor gone──► its commits settled ──► absent
//!                         └──────────── actor failed ───────────────────────────────────────▲
//! ```
//!
//! Invariants:
//! - Single activation: entries are added only here, one message at a time, and an entry stays until its actor is gone and all that
//!   it had submitted is settled. Whoever asks for it meanwhile waits.
//! - An actor leaves by `drain`, so that no message is lost; what comes too late comes back to its sender.
//! - A child's end never ends the supervisor (ractor's default would).

use std::{collections::HashMap, sync::Arc, time::Duration};

use kuma_shard::{Activation, Budget, EntityHash, Slot, Submission};
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::oneshot;

use crate::{
    Unavailable,
    actor::{EntityActor, EntityMessage, EntityState},
    identity::Identity,
    kind::Kind,
    live::{ENTITY_BYTES, Live, Usage, View},
    shard_core::{Entry, ShardCore},
};

/// Who is to be activated.
pub(crate) struct Activate {
    pub(crate) kind: Arc<dyn Kind>,
    pub(crate) identity: Arc<Identity>,
    pub(crate) reply: oneshot::Sender<Result<Arc<Live>, Unavailable>>,
}

/// What a supervisor can be asked.
pub(crate) enum SupervisorMessage {
    /// The entity's actor, made if need be.
    Activate(Activate),
    /// Takes the entity out of memory; answered when it is.
    Passivate { entity: EntityHash, done: oneshot::Sender<()> },
    /// Takes all entities of a slot out of memory; answered when the last one is gone. Its gate is closed: none comes in meanwhile.
    LeaveSlot { slot: Slot, done: oneshot::Sender<()> },
    /// All that a gone actor had submitted is settled.
    Settled { entity: EntityHash },
    /// Looks for entities to passivate.
    Sweep,
    /// Passivates all; answered when the last one is gone.
    Stop { done: oneshot::Sender<()> },
}

impl ractor::Message for SupervisorMessage {} // local only

pub(crate) struct EntitySupervisor;

pub(crate) struct SupervisorState {
    core: Arc<ShardCore>,
    /// By the number of the actor, which is local.
    by_actor: HashMap<u64, EntityHash>,
    waiting: HashMap<EntityHash, Vec<Waiter>>,
    stopping: Option<oneshot::Sender<()>>,
    /// How many entries of the directory are not leaving.
    live: usize,
    /// What the states took when they were last looked at.
    state_bytes: usize,
}

/// Whoever waits for an entity to be gone.
enum Waiter {
    Activate(Activate),
    Passivate(oneshot::Sender<()>),
    LeaveSlot(Arc<Told>),
}

/// Tells when it is dropped.
struct Told(Option<oneshot::Sender<()>>);

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            // Whoever is gone does not want to know.
            let _ = done.send(());
        }
    }
}

impl Actor for EntitySupervisor {
    type Msg = SupervisorMessage;
    type State = SupervisorState;
    type Arguments = Arc<ShardCore>;

    async fn pre_start(
        &self,
        me: ActorRef<SupervisorMessage>,
        core: Arc<ShardCore>,
    ) -> Result<SupervisorState, ActorProcessingErr> {
        let period = Duration::from_millis((core.settings.idle_ms_min / 4).clamp(50, 5000));
        // Ends with this actor.
        me.send_interval(period, || SupervisorMessage::Sweep);
        Ok(SupervisorState {
            core,
            by_actor: HashMap::new(),
            waiting: HashMap::new(),
            stopping: None,
            live: 0,
            state_bytes: 0,
        })
    }

    async fn handle(
        &self,
        me: ActorRef<SupervisorMessage>,
        message: SupervisorMessage,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            SupervisorMessage::Activate(request) => state.activate(request, me.get_cell()).await,
            SupervisorMessage::Passivate { entity, done } => state.passivate_one(entity, done),
            SupervisorMessage::LeaveSlot { slot, done } => state.leave_slot(slot, done),
            SupervisorMessage::Settled { entity } => state.gone(entity, me.get_cell()).await,
            SupervisorMessage::Sweep => state.sweep(),
            SupervisorMessage::Stop { done } => {
                state.stopping = Some(done);
                let all: Vec<EntityHash> = state.core.directory.lock().keys().copied().collect();
                all.into_iter().for_each(|entity| state.leave(entity));
                state.finish_stop();
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        me: ActorRef<SupervisorMessage>,
        event: SupervisionEvent,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorTerminated(actor, _, _) => state.actor_ended(&actor, false, me),
            SupervisionEvent::ActorFailed(actor, _) => state.actor_ended(&actor, true, me),
            _ => {}
        }
        Ok(())
    }
}

impl SupervisorState {
    async fn activate(&mut self, request: Activate, me: ActorCell) {
        let entity = request.identity.hash;
        if self.stopping.is_some() {
            let _ = request.reply.send(Err(Unavailable::ShuttingDown));
            return;
        }
        // A request may have passed the gate before it was closed.
        if let Err(elsewhere) = self.core.gates.check(request.identity.slot) {
            let _ = request.reply.send(Err(elsewhere));
            return;
        }
        let entry = self.core.directory.lock().get(&entity).cloned();
        match entry {
            Some(Entry::Live(live)) => {
                let _ = request.reply.send(Ok(live));
            }
            Some(Entry::Leaving(_)) => self.waiting.entry(entity).or_default().push(Waiter::Activate(request)),
            None => {
                let Activate { kind, identity, reply } = request;
                let made = self.make(kind, identity, me).await;
                // A caller that is gone leaves an idle entity behind, which the sweep finds.
                let _ = reply.send(made);
                if self.live * ENTITY_BYTES + self.state_bytes > self.core.settings.memory_bytes_max {
                    self.keep_budget();
                }
            }
        }
    }

    async fn make(
        &mut self,
        kind: Arc<dyn Kind>,
        identity: Arc<Identity>,
        me: ActorCell,
    ) -> Result<Arc<Live>, Unavailable> {
        let (entity, slot) = (identity.hash, identity.slot);
        self.core.check_quarantine(entity)?;
        let view = Arc::new(View::default());
        view.usage.touch(&self.core.clock);
        if let Some(idle_ms) = kind.tuning().idle_ms {
            view.usage.set_idle_ms(idle_ms);
        }
        let state = EntityState { core: self.core.clone(), kind, identity, view: view.clone(), loaded: None };
        let spawned = Actor::spawn_linked(None, EntityActor, state, me).await;
        let (actor, _) = spawned.map_err(|_| Unavailable::Interrupted { entity })?;
        self.by_actor.insert(actor.get_id().pid(), entity);
        let appends = Budget::new(self.core.settings.entity_appends_max);
        let live = Arc::new(Live { actor, view, appends, slot });
        self.core.directory.lock().insert(entity, Entry::Live(live.clone()));
        self.live += 1;
        self.core.metrics.live_entities.increment(1.0);
        Ok(live)
    }

    fn passivate_one(&mut self, entity: EntityHash, done: oneshot::Sender<()>) {
        if !self.core.directory.lock().contains_key(&entity) {
            let _ = done.send(());
            return;
        }
        self.leave(entity);
        self.waiting.entry(entity).or_default().push(Waiter::Passivate(done));
    }

    fn leave_slot(&mut self, slot: Slot, done: oneshot::Sender<()>) {
        let of_slot = |(entity, entry): (&EntityHash, &Entry)| {
            let (Entry::Live(live) | Entry::Leaving(live)) = entry;
            (live.slot == slot).then_some(*entity)
        };
        let entities: Vec<EntityHash> = self.core.directory.lock().iter().filter_map(of_slot).collect();
        // Told when the last one has dropped its part.
        let told = Arc::new(Told(Some(done)));
        for entity in entities {
            self.leave(entity);
            self.waiting.entry(entity).or_default().push(Waiter::LeaveSlot(told.clone()));
        }
    }

    /// Lets a live entity finish what it was asked and go.
    fn leave(&mut self, entity: EntityHash) {
        let mut directory = self.core.directory.lock();
        if let Some(entry) = directory.get_mut(&entity)
            && let Entry::Live(live) = entry
        {
            let live = live.clone();
            *entry = Entry::Leaving(live.clone());
            drop(directory);
            self.live -= 1;
            self.core.metrics.live_entities.decrement(1.0);
            self.core.metrics.passivations.increment(1);
            // An actor that is gone already has told so, or will.
            let _ = live.actor.get_cell().drain();
        }
    }

    fn actor_ended(&mut self, actor: &ActorCell, failed: bool, me: ActorRef<SupervisorMessage>) {
        let Some(entity) = self.by_actor.remove(&actor.get_id().pid()) else { return };
        if failed {
            self.core.record_failure(entity, "its actor failed".to_owned(), false);
        }
        if let Some(entry) = self.core.directory.lock().get_mut(&entity) {
            if matches!(entry, Entry::Live(_)) {
                self.live -= 1;
                self.core.metrics.live_entities.decrement(1.0);
            }
            let (Entry::Live(live) | Entry::Leaving(live)) = &*entry;
            let live = live.clone();
            // Handles that still know it must not read from it: the next activation moves on without it.
            *live.view.published.lock() = None;
            *entry = Entry::Leaving(live);
        }
        // Behind all that it had submitted.
        let on_settled = Box::new(move |_| drop(me.cast(SupervisorMessage::Settled { entity })));
        self.core.shard.submit(Submission { activation: Arc::new(Activation::at(0)), commit: None, on_settled });
    }

    async fn gone(&mut self, entity: EntityHash, me: ActorCell) {
        self.core.directory.lock().remove(&entity);
        for waiter in self.waiting.remove(&entity).unwrap_or_default() {
            match waiter {
                Waiter::Activate(request) => self.activate(request, me.clone()).await,
                Waiter::Passivate(done) => {
                    let _ = done.send(());
                }
                Waiter::LeaveSlot(told) => drop(told),
            }
        }
        self.finish_stop();
    }

    fn finish_stop(&mut self) {
        if self.core.directory.lock().is_empty()
            && let Some(done) = self.stopping.take()
        {
            let _ = done.send(());
        }
    }

    fn sweep(&mut self) {
        self.publish_bursts();
        let (now_ms, idle_ms) = (self.core.clock.now_ms(), self.core.settings.idle_ms);
        let idle = self.live_entities(|usage| usage.is_idle(now_ms, idle_ms));
        idle.into_iter().for_each(|(_, entity, _)| self.leave(entity));
        self.keep_budget();
    }

    /// An entity learns what became durable with its next message. Whoever gets none after a burst would keep the burst's events in
    /// memory until it leaves.
    fn publish_bursts(&self) {
        let behind = |entry: &Entry| match entry {
            Entry::Live(live) => (!live.is_published()).then(|| live.actor.clone()),
            Entry::Leaving(_) => None,
        };
        let behind: Vec<_> = self.core.directory.lock().values().filter_map(behind).collect();
        for actor in behind {
            // One that has left has nothing to publish.
            let _ = actor.cast(EntityMessage::Publish);
        }
    }

    /// Lets the least recently used entities go, down to nine tenths of the budget, so that not every activation has to look.
    fn keep_budget(&mut self) {
        let max = self.core.settings.memory_bytes_max;
        let mut entities = self.live_entities(|_| true);
        let mut bytes: usize = entities.iter().map(|(_, _, bytes)| bytes).sum();
        self.state_bytes = bytes.saturating_sub(entities.len() * ENTITY_BYTES);
        if bytes <= max {
            return;
        }
        entities.sort_unstable();
        for (_, entity, size) in entities {
            if bytes <= max / 10 * 9 {
                break;
            }
            bytes -= size;
            self.leave(entity);
        }
    }

    /// Live entities that nothing waits for: when each was used, and its size.
    fn live_entities(&self, which: impl Fn(&Usage) -> bool) -> Vec<(u64, EntityHash, usize)> {
        let directory = self.core.directory.lock();
        let of = |(entity, entry): (&EntityHash, &Entry)| match entry {
            Entry::Live(live) if live.appends.used() == 0 && which(&live.view.usage) => {
                Some((live.view.usage.used_at_ms(), *entity, live.view.usage.memory_bytes()))
            }
            _ => None,
        };
        directory.iter().filter_map(of).collect()
    }
}
