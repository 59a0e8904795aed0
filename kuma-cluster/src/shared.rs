//! What the parts of a node share: its store, its links, what it knows of the others.
//!
//! Invariants:
//! - What the node knows of the cluster is on its disk before anybody is told of it, or acts on it.
//! - A slot has one actor, which alone changes its token.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use kuma_core::{DiskId, Epoch, Kuma, Slot, SlotError, Slots, Token};
use parking_lot::{Mutex, RwLock};
use ractor::{Actor, ActorRef};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore};

use crate::{
    commands::Commands,
    disks::Disks,
    feed::{ClusterEvent, Feed},
    handoff::{Envelope, Message},
    members::{Member, Members, NodeId},
    observe::{Ages, ClusterMetrics},
    owner::Answer,
    registry::RegistryMessage,
    ring::Ring,
    routes::Routes,
    slot_actor::{SlotActor, SlotMessage},
    transport::{Target, Transport},
    wire::{self, Gossip, kind},
};

/// What a node knows of its cluster; durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClusterState {
    pub(crate) format: u32,
    pub(crate) cluster: [u8; 16],
    pub(crate) node: NodeId,
    pub(crate) incarnation: u64,
    pub(crate) members: Members,
    pub(crate) disks: Disks,
}

/// The newest form of [`ClusterState`] that is known here.
pub(crate) const STATE_FORMAT: u32 = 1;

/// The phase of a slot that was granted, and of which the other node has not said yet that it owns it.
pub(crate) const GRANTED: &str = "granted";

/// How far a slot is on its way to another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoveProgress {
    /// The slot.
    pub slot: Slot,
    /// To whom.
    pub to: DiskId,
    /// "copying", "sealed" or "granted".
    pub phase: &'static str,
    /// Rows that are still to be copied, as far as is known.
    pub rows_left: u64,
    /// Rows that were sent.
    pub rows_sent: u64,
    /// When it began.
    pub since: Instant,
    /// Why it comes to nothing, in a word.
    pub trouble: Option<&'static str>,
}

impl MoveProgress {
    pub(crate) fn new(slot: Slot, to: DiskId, rows: u64) -> Self {
        MoveProgress { slot, to, phase: "copying", rows_left: rows, rows_sent: 0, since: Instant::now(), trouble: None }
    }

    /// Whether nothing is in the slot, as far as is known: nobody waits for it.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows_left == 0 && self.rows_sent == 0
    }
}

/// What handoffs have come to since the node was started.
#[derive(Clone, Debug, Default)]
pub struct MoveTotals {
    /// Slots that were given away.
    pub given: u64,
    /// Slots that were taken.
    pub taken: u64,
    /// Attempts that came to nothing.
    pub aborted: u64,
    /// How long writes to a slot that was given away waited: from its seal until the other node said that it owns it. The newest 100,000.
    pub pauses: Vec<Duration>,
}

pub(crate) struct Shared {
    pub(crate) kuma: Kuma,
    pub(crate) slots: Slots,
    pub(crate) own: DiskId,
    pub(crate) name: String,
    pub(crate) context: String,
    pub(crate) commands: Commands,
    pub(crate) transport: OnceLock<Arc<dyn Transport>>,
    pub(crate) registry: OnceLock<ActorRef<RegistryMessage>>,
    state: RwLock<Arc<ClusterState>>,
    /// Where slots should be, as of the state: it takes some milliseconds to compute.
    ring: RwLock<Arc<Ring>>,
    /// One change at a time.
    changing: AsyncMutex<()>,
    pub(crate) routes: Routes,
    actors: AsyncMutex<HashMap<Slot, ActorRef<SlotMessage>>>,
    pub(crate) moves: Mutex<BTreeMap<Slot, MoveProgress>>,
    pub(crate) totals: Mutex<MoveTotals>,
    /// Leave to seal a slot.
    pub(crate) sealing: Arc<Semaphore>,
    /// Room for requests of other nodes that wait for a slot that is on its way, in KiB.
    pub(crate) parking: Arc<Semaphore>,
    /// When a slot came or went last.
    pub(crate) moved_at: Mutex<Option<Instant>>,
    /// Something was given away whose rows are to be collected.
    pub(crate) collect: Notify,
    /// Whether it may serve what it owns: others know that this disk is the newest one of its node.
    pub(crate) has_passed: AtomicBool,
    /// Peers that have passed.
    pub(crate) passed_peers: Mutex<std::collections::HashSet<DiskId>>,
    /// Since when peers are not reached.
    pub(crate) down: Mutex<HashMap<DiskId, Instant>>,
    pub(crate) is_closing: AtomicBool,
    pub(crate) started: Instant,
    /// Answers what the embedder asks of this node.
    pub(crate) answer: Option<Arc<dyn Answer>>,
    pub(crate) feed: Feed,
    pub(crate) metrics: ClusterMetrics,
    pub(crate) ages: Mutex<Ages>,
    /// Leave to read logs for a subscription, of this node or another one: what is read is in memory.
    pub(crate) feeding: Semaphore,
}

/// Subscriptions that are read for at once.
const FEEDING_MAX: usize = 4;

/// Slots of a node that are sealed at once. Each waits for a few commits on both nodes; more of them would wait for each other's.
const SEALED_MAX: usize = 1;
/// KiB of other nodes' requests that wait here for slots that are on their way; whoever asks holds the rest and asks again.
const PARKED_KIB_MAX: usize = 16 << 10;

/// Pauses that are kept.
const PAUSES_MAX: usize = 100_000;

impl Shared {
    pub(crate) fn new(
        kuma: Kuma,
        name: String,
        context: String,
        state: ClusterState,
        commands: Commands,
        answer: Option<Arc<dyn Answer>>,
    ) -> Self {
        let slots = kuma.slots();
        let metrics = ClusterMetrics::new(&context);
        Shared {
            own: slots.disk_id(),
            kuma,
            slots,
            name,
            context,
            commands,
            transport: OnceLock::new(),
            registry: OnceLock::new(),
            ring: RwLock::new(Arc::new(ring_of(&state))),
            state: RwLock::new(Arc::new(state)),
            changing: AsyncMutex::new(()),
            routes: Routes::default(),
            actors: AsyncMutex::default(),
            moves: Mutex::default(),
            totals: Mutex::default(),
            sealing: Arc::new(Semaphore::new(SEALED_MAX)),
            parking: Arc::new(Semaphore::new(PARKED_KIB_MAX)),
            moved_at: Mutex::new(None),
            collect: Notify::new(),
            has_passed: AtomicBool::new(false),
            passed_peers: Mutex::default(),
            down: Mutex::default(),
            is_closing: AtomicBool::new(false),
            started: Instant::now(),
            answer,
            feed: Feed::new(),
            metrics,
            ages: Mutex::default(),
            feeding: Semaphore::new(FEEDING_MAX),
        }
    }

    pub(crate) fn state(&self) -> Arc<ClusterState> {
        self.state.read().clone()
    }

    pub(crate) fn transport(&self) -> Option<&Arc<dyn Transport>> {
        self.transport.get()
    }

    /// Changes what is known; it is durable when this returns. What `change` returns, if anything was changed or not.
    pub(crate) async fn change<T>(&self, change: impl FnOnce(&mut ClusterState) -> T) -> Result<T, SlotError> {
        let _one = self.changing.lock().await;
        let mut next = (*self.state()).clone();
        let result = change(&mut next);
        if next != *self.state() {
            self.slots.keep_cluster(wire::encode(&next)).await?;
            if next.members != self.state().members {
                self.feed.members_changed(&self.state().members, &next.members);
                *self.ring.write() = Arc::new(ring_of(&next));
            }
            *self.state.write() = Arc::new(next);
            self.wake(RegistryMessage::Changed);
        }
        Ok(result)
    }

    /// Tells the registry something.
    pub(crate) fn wake(&self, message: RegistryMessage) {
        if let Some(registry) = self.registry.get() {
            // One that is gone has nothing to do any more.
            let _ = registry.cast(message);
        }
    }

    /// Sends a message that may be lost.
    pub(crate) fn cast<T: Serialize>(&self, to: DiskId, kind: u8, message: &T) {
        if let Some(transport) = self.transport() {
            transport.cast(to, kind, wire::encode(message));
        }
    }

    /// The other disks of the cluster.
    pub(crate) fn peers(&self) -> Vec<DiskId> {
        self.state().disks.members().filter(|disk| *disk != self.own).collect()
    }

    /// Sends a message that may be lost to everybody.
    pub(crate) fn cast_all<T: Serialize>(&self, kind: u8, message: &T) {
        let body = wire::encode(message);
        let Some(transport) = self.transport() else { return };
        self.peers().into_iter().for_each(|disk| transport.cast(disk, kind, body.clone()));
    }

    /// Whether this node owns the slot.
    pub(crate) fn is_owner(&self, slot: Slot) -> bool {
        self.slots.record(slot).is_some_and(|record| record.owned().is_some())
    }

    /// What this node owns.
    pub(crate) fn owns(&self) -> Vec<(Slot, Epoch)> {
        self.slots.owned()
    }

    pub(crate) fn gossip(&self) -> Gossip {
        let state = self.state();
        Gossip {
            members: state.members.clone(),
            disks: state.disks.clone(),
            has_passed: self.has_passed.load(SeqCst),
            owns: if self.has_passed.load(SeqCst) { self.owns() } else { Vec::new() },
        }
    }

    /// Tells everybody all that this node knows.
    pub(crate) fn tell_all(&self) {
        self.cast_all(kind::GOSSIP, &self.gossip());
    }

    /// Another disk says that it owns a slot. What is prepared here for that epoch or an earlier one is dead then, and what was granted was taken: the
    /// disk that would say so may be gone for ever, and until it does requests are not sent on to the owner.
    pub(crate) async fn hear_owner(self: &Arc<Self>, slot: Slot, epoch: Epoch, from: DiskId) {
        self.routes.note(slot, epoch, from);
        let Some(record) = self.slots.record(slot) else { return };
        let is_dead = record.staged.is_some_and(|staged| epoch >= staged.epoch);
        let is_taken = matches!(record.token, Token::Released { epoch: mine, is_taken: false, .. } if epoch >= mine);
        if (is_dead || is_taken)
            && let Some(actor) = self.slot_actor(slot).await
        {
            let envelope = Envelope { from, to: self.own, message: Message::OwnerIs { epoch } };
            // It is told again with the next gossip.
            let _ = actor.cast(SlotMessage::Peer(envelope));
        }
    }

    /// Takes in what another node knows.
    pub(crate) async fn learn(self: &Arc<Self>, from: DiskId, gossip: Gossip) {
        let Gossip { members, disks, has_passed, owns } = gossip;
        for (slot, epoch) in owns {
            self.hear_owner(slot, epoch, from).await;
        }
        let is_news = has_passed && self.passed_peers.lock().insert(from);
        let merged = self
            .change(|state| {
                state.members.merge(&members);
                state.disks.learn(&disks);
            })
            .await;
        if let Err(error) = merged {
            tracing::warn!(target: "kuma::cluster", %error, "what another node knows could not be kept; it will be told again");
        }
        // What is new in the maps wakes it by itself. Nothing is told again for what was known.
        if is_news {
            self.wake(RegistryMessage::Look);
        }
    }

    /// Where the other nodes are.
    pub(crate) fn targets(&self) -> Vec<Target> {
        let state = self.state();
        let others =
            state.members.iter().filter(|(node, member)| *node != state.node && state.disks.is_there(member.disk));
        others.map(|(_, member)| Target { address: member.address.clone(), disk: Some(member.disk) }).collect()
    }

    /// Where slots should be.
    pub(crate) fn ring(&self) -> Arc<Ring> {
        self.ring.read().clone()
    }

    /// The member with this disk.
    pub(crate) fn member_of(&self, disk: DiskId) -> Option<(NodeId, Member)> {
        let state = self.state();
        state.members.iter().find(|(_, member)| member.disk == disk).map(|(node, member)| (node, member.clone()))
    }

    /// What people call the node with this disk.
    pub(crate) fn name_of(&self, disk: DiskId) -> String {
        self.member_of(disk).map_or_else(|| format!("disk {disk}"), |(_, member)| member.name)
    }

    /// How many rows this node has of a slot.
    pub(crate) fn rows_of(&self, slot: Slot) -> u64 {
        self.slots.record(slot).map_or(0, |record| record.content.len)
    }

    /// The actor of a slot, made if need be. None while the node closes.
    pub(crate) async fn slot_actor(self: &Arc<Self>, slot: Slot) -> Option<ActorRef<SlotMessage>> {
        let mut actors = self.actors.lock().await;
        if self.is_closing.load(SeqCst) {
            return None;
        }
        if let Some(actor) = actors.get(&slot) {
            return Some(actor.clone());
        }
        let spawned = Actor::spawn(None, SlotActor, (self.clone(), slot)).await;
        let (actor, _) = spawned
            .inspect_err(
                |error| tracing::error!(target: "kuma::cluster", %slot, %error, "a slot's actor did not start"),
            )
            .ok()?;
        actors.insert(slot, actor.clone());
        Some(actor)
    }

    /// Ends all actors of slots; what they are at comes to its end.
    pub(crate) async fn stop_actors(&self) {
        let actors: Vec<_> = self.actors.lock().await.drain().map(|(_, actor)| actor).collect();
        for actor in actors {
            let _ = actor.stop_and_wait(None, None).await;
        }
    }

    /// A slot of another node has come to this one.
    pub(crate) fn note_taken(&self, slot: Slot) {
        self.metrics.taken();
        self.feed.tell(ClusterEvent::SlotTaken { slot });
    }

    /// A slot of this node has come to another one, or not.
    pub(crate) fn note_end(&self, slot: Slot, pause: Option<Duration>) {
        let progress = self.moves.lock().remove(&slot);
        // Nobody waits for a slot that nothing is in.
        let rest = pause.filter(|_| progress.as_ref().is_some_and(|progress| !progress.is_empty())).unwrap_or_default();
        if let Some(MoveProgress { to, rows_sent, trouble, .. }) = progress {
            let to = self.name_of(to);
            let reason = trouble.unwrap_or("other");
            match pause {
                Some(pause) => {
                    self.metrics.given(pause, rows_sent);
                    self.feed.tell(ClusterEvent::MoveDone { slot, to, rows_sent, pause });
                }
                None => {
                    self.metrics.aborted(reason);
                    self.feed.tell(ClusterEvent::MoveAborted { slot, to, reason });
                }
            }
        }
        *self.moved_at.lock() = Some(Instant::now());
        let mut totals = self.totals.lock();
        match pause {
            Some(pause) => {
                totals.given += 1;
                if totals.pauses.len() >= PAUSES_MAX {
                    totals.pauses.clear();
                }
                totals.pauses.push(pause);
            }
            None => totals.aborted += 1,
        }
        drop(totals);
        self.wake(RegistryMessage::MoveEnded { slot, is_done: pause.is_some(), rest });
    }
}

fn ring_of(state: &ClusterState) -> Ring {
    Ring::new(state.members.on_the_ring(), &state.members.pins())
}
