//! The ring-registry: it knows the members, computes where slots should be, and proposes handoffs to the slots' actors.
//!
//! Invariants:
//! - It moves nothing by itself: what it says is a wish, and the slot's actor and token decide.
//! - No more than so many slots of this node are on their way at once, and one that has just been tried is left alone for a while. Of those that
//!   nothing is in there are many.
//! - Moving has time, requests have not: after a slot that somebody waited for, the next one begins no sooner than that pause took.
//! - Nothing is served before another node that serves has said that this disk is the newest one of its node, or all nodes are there
//!   (a whole cluster that starts), or there are no others.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use kuma_core::{DiskId, Epoch, Gate, Slot};
use ractor::{Actor, ActorProcessingErr, ActorRef};

use crate::{
    disks::Join,
    erasure::Tombstones,
    erasures,
    fail_points::fail_point,
    feed::ClusterEvent,
    handoff::Safeguards,
    members::{NodeId, Standing},
    shared::{GRANTED, MoveProgress, Shared},
    slot_actor::SlotMessage,
    transport::Transport,
    wire::{self, JoinReply, JoinRequest, kind},
};

/// How often it looks, beside what it is told.
const EVERY: Duration = Duration::from_millis(250);
/// Slots with rows of this node that are on their way at once, unless the options say otherwise.
pub(crate) const MOVES_MAX: usize = 2;
/// Slots that nothing is in that are on their way beside them: nobody waits for one, and their commits go in groups.
const EMPTY_MAX: usize = 64;
/// The longest rest between two moves, however long requests were held up: on a machine that is slow for other reasons moves go on.
const REST_MAX: Duration = Duration::from_millis(100);
/// After an attempt that came to nothing.
const LEAVE_ALONE: Duration = Duration::from_secs(1);
/// How often everything is told to everybody, in case that something was lost.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// So many attempts to be let in are made before it is said that somebody is waited for.
const SAID_AFTER: u32 = 8;
const JOIN_WITHIN: Duration = Duration::from_secs(2);

pub(crate) enum RegistryMessage {
    /// It is time to look.
    Look,
    /// A link is there.
    Up(DiskId),
    /// What is known of the cluster has changed.
    Changed,
    /// What should be elsewhere is to be moved now, also what was left alone.
    Hurry,
    /// A slot has moved, or not.
    MoveEnded { slot: Slot, is_done: bool, rest: Duration },
    /// Slots may move again.
    Rested,
}

impl ractor::Message for RegistryMessage {} // local only

pub(crate) struct Registry;

pub(crate) struct RegistryState {
    shared: Arc<Shared>,
    moves_max: usize,
    join: Join,
    /// Who has not let this node in yet, and how often that was so.
    waits_for: (Vec<DiskId>, u32),
    left_alone: HashMap<Slot, Instant>,
    /// No slot begins to move before.
    rest_until: Instant,
    told_at: Instant,
    /// Something changed since everybody was told.
    untold: bool,
}

impl Actor for Registry {
    type Msg = RegistryMessage;
    type State = RegistryState;
    type Arguments = (Arc<Shared>, usize);

    async fn pre_start(
        &self,
        me: ActorRef<RegistryMessage>,
        (shared, moves_max): (Arc<Shared>, usize),
    ) -> Result<RegistryState, ActorProcessingErr> {
        // Ends with this actor.
        me.send_interval(EVERY, || RegistryMessage::Look);
        Ok(RegistryState {
            shared,
            moves_max,
            join: Join::default(),
            waits_for: (Vec::new(), 0),
            left_alone: HashMap::new(),
            rest_until: Instant::now(),
            told_at: Instant::now(),
            untold: true,
        })
    }

    async fn handle(
        &self,
        me: ActorRef<RegistryMessage>,
        message: RegistryMessage,
        state: &mut RegistryState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RegistryMessage::Look => state.look().await,
            RegistryMessage::Up(disk) => {
                state.shared.cast(disk, kind::GOSSIP, &state.shared.gossip());
                state.look().await;
            }
            RegistryMessage::Changed => {
                state.untold = true;
                state.look().await;
            }
            RegistryMessage::Hurry => {
                state.left_alone.clear();
                state.look().await;
            }
            RegistryMessage::MoveEnded { slot, is_done, rest } => {
                if !is_done {
                    state.left_alone.insert(slot, Instant::now() + LEAVE_ALONE);
                }
                let rest = rest.min(REST_MAX);
                if !rest.is_zero() {
                    state.rest_until = state.rest_until.max(Instant::now() + rest);
                    me.send_after(rest, || RegistryMessage::Rested);
                }
                state.start_moves().await;
            }
            RegistryMessage::Rested => state.start_moves().await,
        }
        Ok(())
    }
}

impl RegistryState {
    async fn look(&mut self) {
        let shared = self.shared.clone();
        if let Some(transport) = shared.transport() {
            transport.keep_connected(shared.targets());
        }
        if !shared.state().disks.is_active() {
            self.join().await;
        }
        self.pass();
        if self.untold || self.told_at.elapsed() >= TELL_EVERY {
            (self.untold, self.told_at) = (false, Instant::now());
            shared.tell_all();
        }
        self.start_moves().await;
    }

    /// Asks every disk that is known to let this one take part.
    async fn join(&mut self) {
        let shared = self.shared.clone();
        let Some(transport) = shared.transport() else { return };
        let state = shared.state();
        let Some(member) = state.members.get(state.node).cloned() else { return };
        let request = wire::encode(&JoinRequest { node: state.node, member, replaces: None });
        let waiting: Vec<DiskId> =
            state.disks.members().filter(|disk| *disk != shared.own && !self.join.has_answered(*disk)).collect();
        if waiting.is_empty() {
            // Whoever was waited for is gone since, and no answer is to come that would tell. All are asked anew.
            self.join = Join::default();
            return;
        }
        let asked = waiting
            .iter()
            .map(|disk| async { (*disk, transport.call(*disk, kind::JOIN, request.clone(), JOIN_WITHIN).await) });
        let replies = futures_util::future::join_all(asked).await;
        fail_point("join.req_sent");
        for (disk, reply) in replies {
            let reply = reply.ok().and_then(|reply| wire::decode(&reply));
            if let Some(JoinReply::Admitted { .. }) = &reply
                && let Err(why) = erasures::take_over_ledger(&shared, disk).await
            {
                // Asked again.
                tracing::warn!(target: "kuma::cluster", node = %shared.name_of(disk), %why, "what is erased at a node could not be learnt");
                continue;
            }
            match reply {
                Some(JoinReply::Admitted { answer, members }) => {
                    let join = &mut self.join;
                    let kept = shared
                        .change(|state| {
                            state.members.merge(&members);
                            // Its tombstones have come before, and their keys have ended here.
                            let _ =
                                join.answered(&mut state.disks, &Tombstones::default(), disk, &answer, Safeguards::ALL);
                            if state.disks.is_active() {
                                let node = state.node;
                                state.members.set_standing(node, Standing::Member);
                            }
                        })
                        .await;
                    if let Err(error) = kept {
                        // Asked again.
                        self.join = Join::default();
                        tracing::warn!(target: "kuma::cluster", %error, "the answer of a node could not be kept");
                    }
                }
                Some(JoinReply::Refused(why)) => {
                    tracing::error!(target: "kuma::cluster", node = %shared.name_of(disk), %why, "this node is not let in");
                }
                None => {}
            }
        }
        if shared.state().disks.is_active() {
            fail_point("join.activated");
            tracing::info!(target: "kuma::cluster", node = %shared.name, "this node takes part in the cluster");
            self.untold = true;
        }
        self.tell_who_is_waited_for();
    }

    /// Says whose answer is missing, once, when it is so for some time.
    fn tell_who_is_waited_for(&mut self) {
        let shared = &self.shared;
        let disks = shared.state().disks.clone();
        let is_missing = |disk: &DiskId| *disk != shared.own && !self.join.has_answered(*disk);
        let missing: Vec<DiskId> = disks.members().filter(is_missing).collect();
        let looks = if missing == self.waits_for.0 { self.waits_for.1 + 1 } else { 0 };
        if !disks.is_active() && !missing.is_empty() && looks == SAID_AFTER {
            let nodes = missing.iter().map(|disk| shared.name_of(*disk)).collect::<Vec<_>>().join(", ");
            tracing::warn!(target: "kuma::cluster", %nodes, "this node does not take part yet: every node has to let it in, and these have not; attest one to be destroyed if its disk is");
        }
        self.waits_for = (missing, looks);
    }

    /// Serves, once it may.
    fn pass(&mut self) {
        let shared = &self.shared;
        if shared.has_passed.load(SeqCst) || !shared.state().disks.is_active() {
            return;
        }
        let peers = shared.peers();
        let passed: HashSet<DiskId> = shared.passed_peers.lock().clone();
        let is_up = |disk: &DiskId| shared.transport().is_some_and(|transport| transport.is_up(*disk));
        let told = peers.iter().any(|disk| passed.contains(disk) && is_up(disk));
        if !(told || peers.iter().all(is_up)) {
            return;
        }
        fail_point("boot.hello_passed");
        let owns = shared.owns();
        for (slot, epoch) in &owns {
            shared.slots.set_gate(*slot, Gate::Open);
            shared.routes.note(*slot, *epoch, shared.own);
        }
        // Once all gates are open: whoever sees it asks at once.
        shared.has_passed.store(true, SeqCst);
        // What was parked until the gates are open.
        shared.slots.resume_erasures();
        shared.feed.tell(ClusterEvent::Ready);
        tracing::info!(target: "kuma::cluster", slots = owns.len(), "this node serves what it owns");
        self.untold = true;
    }

    /// Slots that should be elsewhere, with where.
    fn wishes(&self) -> Vec<(Slot, Epoch, DiskId)> {
        let shared = &self.shared;
        let state = shared.state();
        let disks: BTreeMap<NodeId, DiskId> = state.members.iter().map(|(node, member)| (node, member.disk)).collect();
        let ring = shared.ring();
        let wish = |(slot, epoch): (Slot, Epoch)| {
            let to = *disks.get(&ring.owner(slot)?)?;
            (to != shared.own).then_some((slot, epoch, to))
        };
        shared.owns().into_iter().filter_map(wish).collect()
    }

    /// What may begin to move now. What was granted to a node that is gone waits for that node, and nothing else for it.
    fn room(&self, transport: &dyn Transport) -> Room {
        let mut room = Room { with_rows: self.moves_max, empty: EMPTY_MAX };
        for progress in self.shared.moves.lock().values() {
            if progress.phase != GRANTED || transport.is_up(progress.to) {
                let left = room.of(progress);
                *left = left.saturating_sub(1);
            }
        }
        if Instant::now() < self.rest_until {
            room.with_rows = 0;
        }
        room
    }

    async fn start_moves(&mut self) {
        let shared = self.shared.clone();
        let Some(transport) = shared.transport() else { return };
        let may = shared.has_passed.load(SeqCst) && !shared.is_closing.load(SeqCst);
        let mut room = self.room(&**transport);
        if !may || !room.is_worth_a_look() {
            return;
        }
        let now = Instant::now();
        self.left_alone.retain(|_, until| *until > now);
        for (slot, _, to) in self.wishes() {
            if room.is_none() {
                return;
            }
            let is_moving = shared.moves.lock().contains_key(&slot);
            if is_moving || self.left_alone.contains_key(&slot) || !transport.is_up(to) || shared.slots.is_erasing(slot)
            {
                continue;
            }
            let progress = MoveProgress::new(slot, to, shared.rows_of(slot));
            let left = room.of(&progress);
            if *left == 0 {
                continue;
            }
            *left -= 1;
            let Some(actor) = shared.slot_actor(slot).await else { return };
            shared.moves.lock().insert(slot, progress);
            if actor.cast(SlotMessage::Start { to }).is_err() {
                shared.moves.lock().remove(&slot);
            }
        }
    }
}

/// How many slots may begin to move.
struct Room {
    with_rows: usize,
    empty: usize,
}

impl Room {
    fn of(&mut self, progress: &MoveProgress) -> &mut usize {
        match progress.is_empty() {
            true => &mut self.empty,
            false => &mut self.with_rows,
        }
    }

    fn is_none(&self) -> bool {
        self.with_rows == 0 && self.empty == 0
    }

    /// To look for slots takes some work: a single one that is empty can wait for more of them.
    fn is_worth_a_look(&self) -> bool {
        self.with_rows > 0 || self.empty >= EMPTY_MAX / 2
    }
}
