//! The actor of a slot: it puts what happens into the rules of the handoff ([`Handoff::step`]), one thing at a time, and carries out what they say.
//!
//! ```text
//!  registry ──Start──┐                       ┌──► transaction of the shard's writer ──► what was promised
//!  other nodes ──────┼──► Handoff::step ─────┤
//!  timer, copy ──────┘                       └──► messages, copying, gate
//! ```
//!
//! Invariants:
//! - While a transaction of the slot is on its way nothing else is put in: the actor waits for it.
//! - Everything that is copied is asked for again or given up: each wait for another node has an end.
//! - A decision whose outcome is not known is looked up until it is; the slot is served by nobody meanwhile.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use kuma_core::{Content, DiskId, Gate, ReadBack, Slot, SlotChunk, SlotCopy, SlotRecord, Token, TransferId, Txn};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::{
    fail_points::{self, fail_point},
    feed::ClusterEvent,
    handoff::{Effect, Envelope, Handoff, Input, Message, Phase, Safeguards},
    shared::{GRANTED, MoveProgress, Shared},
    transport::Transport,
    wire::{self, ChunkFrame, ChunkReply, HandoffFrame, kind},
};

/// A giver that is sealed serves again after this, alone.
const SEAL_TIMEOUT: Duration = Duration::from_secs(2);
const PREPARE_RESEND: Duration = Duration::from_millis(200);
const GRANT_RESEND: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
const STATUS_POLL: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// A piece that was not kept by then is not waited for.
const CHUNK_WITHIN: Duration = Duration::from_secs(5);
/// What is larger goes as a request of its own, which links take apart.
const BULK_BYTES_MAX: usize = 60 << 10;
/// How often a transaction is tried again whose outcome is not known.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// The step that ends a pause: the other node has said that it owns the slot.
const TAKEN: &str = "taken";

pub(crate) enum SlotMessage {
    /// The slot is wished to be elsewhere.
    Start { to: DiskId },
    /// A message of another node.
    Peer(Envelope),
    /// A piece of the slot.
    Chunk { frame: Box<ChunkFrame>, reply: oneshot::Sender<ChunkReply> },
    /// The copy has caught up, or failed.
    Copied { transfer: TransferId, copy: Result<Caught, String> },
    /// It is time to look what is not answered.
    Tick { number: u64 },
}

impl ractor::Message for SlotMessage {} // local only

/// A copy that has caught up, and the leave to seal its slot.
pub(crate) struct Caught {
    copy: Box<SlotCopy>,
    /// None if nothing is in it.
    leave: Option<OwnedSemaphorePermit>,
}

pub(crate) struct SlotActor;

pub(crate) struct SlotState {
    shared: Arc<Shared>,
    slot: Slot,
    handoff: Handoff,
    /// At the giver: what has been copied so far, once that has caught up.
    copy: Option<Box<SlotCopy>>,
    copying: Option<tokio::task::AbortHandle>,
    /// Held while a slot with rows is sealed: a few at a time, so that each is so for a short time.
    leave: Option<OwnedSemaphorePermit>,
    sealed_at: Option<Instant>,
    /// When each step was done, since the slot was sealed.
    steps: Vec<(&'static str, Duration)>,
    /// At the receiver: a transfer that was taken, whose rows are where they came in, too.
    taken: Option<TransferId>,
    /// At the receiver: what of each transfer was read back.
    read: HashMap<TransferId, ReadBack>,
    /// The timer that counts, and when it is over; none if nothing is waited for.
    timer: Option<(u64, Instant)>,
    ticks: u64,
    /// How long the last one was.
    waited: Duration,
}

impl Actor for SlotActor {
    type Msg = SlotMessage;
    type State = SlotState;
    type Arguments = (Arc<Shared>, Slot);

    async fn pre_start(
        &self,
        me: ActorRef<SlotMessage>,
        (shared, slot): (Arc<Shared>, Slot),
    ) -> Result<SlotState, ActorProcessingErr> {
        let record = shared.slots.record(slot).unwrap_or(SlotRecord::NONE);
        let mut state = SlotState {
            shared,
            slot,
            handoff: Handoff::boot(record),
            copy: None,
            copying: None,
            leave: None,
            sealed_at: None,
            steps: Vec::new(),
            taken: None,
            read: HashMap::new(),
            timer: None,
            ticks: 0,
            waited: Duration::ZERO,
        };
        state.schedule(&me);
        Ok(state)
    }

    async fn handle(
        &self,
        me: ActorRef<SlotMessage>,
        message: SlotMessage,
        state: &mut SlotState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            SlotMessage::Start { to } => state.start(&me, to).await,
            SlotMessage::Peer(envelope) => state.message(&me, envelope).await,
            SlotMessage::Chunk { frame, reply } => {
                let kept = state.keep(*frame).await;
                // A giver that is gone does not want to know.
                let _ = reply.send(kept);
            }
            SlotMessage::Copied { transfer, copy } => state.copied(&me, transfer, copy).await,
            SlotMessage::Tick { number } if state.timer.is_some_and(|(counts, _)| counts == number) => {
                state.timer = None;
                if matches!(state.handoff.record.token, Token::Released { .. }) {
                    // The other node lets itself be waited for: that is no reason for others to wait.
                    state.leave = None;
                }
                let is_late = state.sealed_at.is_some_and(|at| at.elapsed() >= SEAL_TIMEOUT);
                match state.handoff.out {
                    Some(out) if is_late && matches!(out.phase, Phase::Sealed(_)) => {
                        state.progress(|progress| progress.trouble = Some("timeout"));
                        state.put_in(&me, Input::Abort).await
                    }
                    _ => state.put_in(&me, Input::Remind).await,
                }
            }
            // Another one that is over sooner was set meanwhile.
            SlotMessage::Tick { .. } => {}
        }
        state.schedule(&me);
        Ok(())
    }
}

impl SlotState {
    async fn start(&mut self, me: &ActorRef<SlotMessage>, to: DiskId) {
        if self.handoff.out.is_some() {
            return;
        }
        let Some(record) = self.shared.slots.record(self.slot) else { return };
        self.handoff.record = record;
        let Ok(transfer) = TransferId::generate() else { return };
        self.put_in(me, Input::Start { to, transfer }).await;
        if self.handoff.out.is_none() {
            self.shared.note_end(self.slot, None);
        }
    }

    async fn message(&mut self, me: &ActorRef<SlotMessage>, envelope: Envelope) {
        let found = match envelope.message {
            Message::Prepare { transfer, .. } => self.read_back(transfer).await,
            _ => None,
        };
        match envelope.message {
            Message::Ready { .. } => self.note("ready"),
            Message::Taken { .. } => self.note(TAKEN),
            _ => {}
        }
        let is_lost = |transfer| {
            let out = self.handoff.out.filter(|out| (out.to, out.transfer) == (envelope.from, transfer));
            out.is_some_and(|out| matches!(out.phase, Phase::Sealed(_)))
        };
        if let Message::NeedRows { transfer } = envelope.message
            && is_lost(transfer)
        {
            // It had said that it has them: it was started again since. There is no copy any more to send them from.
            return self.put_in(me, Input::Abort).await;
        }
        self.put_in(me, Input::Message { envelope, found }).await;
        if let Message::Status { .. } = envelope.message {
            fail_point("handoff.status.answered");
        }
        if let Message::Abort { transfer } = envelope.message {
            self.drop_transfer(transfer).await;
        }
    }

    /// Puts one thing in, and what follows from it.
    async fn put_in(&mut self, me: &ActorRef<SlotMessage>, input: Input) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let disks = self.shared.state().disks.clone();
            let before = self.handoff.out;
            let plan = self.handoff.step(&disks, input, Safeguards::ALL);
            for effect in plan.now {
                self.carry_out(me, effect, &mut inputs).await;
            }
            if let Some(txn) = plan.txn {
                let is_release = matches!(txn, Txn::Release { .. });
                fail_points::before_commit(&txn);
                let is_committed = self.commit(&txn).await;
                if is_committed {
                    fail_points::committed(&txn);
                    self.committed(&txn).await;
                    for effect in plan.on_commit {
                        self.carry_out(me, effect, &mut inputs).await;
                    }
                }
                if is_release {
                    inputs.push_back(Input::Released { is_committed });
                }
            }
            if let Some(transfer) = self.taken.take() {
                // The slot is served by now.
                self.drop_transfer(transfer).await;
            }
            let is_over = before.is_some() && self.handoff.out.is_none();
            if is_over && self.handoff.record.owned().is_some() {
                self.given_up();
            }
        }
    }

    /// An attempt came to nothing.
    fn given_up(&mut self) {
        if let Some(copying) = self.copying.take() {
            copying.abort();
        }
        (self.copy, self.sealed_at, self.leave) = (None, None, None);
        self.shared.note_end(self.slot, None);
    }

    /// Has the writer make a change; false if it surely did not.
    async fn commit(&mut self, txn: &Txn) -> bool {
        loop {
            let changed = self.shared.slots.change(self.slot, *txn).await;
            let Err(error) = changed else { return true };
            let Some(record) = self.shared.slots.record(self.slot) else { return false };
            let mut wanted = self.handoff.record;
            wanted.apply(txn);
            // It happened all the same, in an attempt before this one.
            let is_there = record.token == wanted.token && record.staged == wanted.staged;
            if error.is_changed() && is_there {
                return true;
            }
            let is_decision = matches!(txn, Txn::Release { .. } | Txn::Take { .. });
            if error.is_changed() || !(is_decision || error.is_unknown()) {
                tracing::debug!(target: "kuma::cluster", slot = %self.slot, %error, "a change of a slot was not made");
                self.handoff.record = record;
                return false;
            }
            tracing::warn!(target: "kuma::cluster", slot = %self.slot, %error, "whether a slot was handed over is not known yet; it is looked up again");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// What follows from a change on this node, beside what the rules say.
    async fn committed(&mut self, txn: &Txn) {
        let (slot, staged) = (self.slot, self.handoff.record.staged);
        self.handoff.committed(txn);
        self.waited = Duration::ZERO;
        let slots = &self.shared.slots;
        match *txn {
            Txn::Release { to, epoch, .. } => {
                self.shared.routes.note(slot, epoch, to);
                slots.set_gate(slot, Gate::Closed);
                self.copy = None;
                self.note("released");
                self.progress(|progress| progress.phase = GRANTED);
            }
            Txn::ConfirmTaken { .. } => {
                if let Some(sealed_at) = self.sealed_at.take() {
                    let said = self.steps.iter().find(|(step, _)| *step == TAKEN).map(|(_, at)| *at);
                    let steps = std::mem::take(&mut self.steps);
                    tracing::debug!(target: "kuma::handoff", %slot, ?steps, "a slot was given away");
                    self.shared.note_end(slot, Some(said.unwrap_or_else(|| sealed_at.elapsed())));
                }
                self.leave = None;
                self.shared.collect.notify_one();
            }
            Txn::Stage(now) => {
                // Requests that come before the grant wait for it.
                slots.set_gate(slot, Gate::Sealed);
                if let Some(before) = staged.filter(|before| before.transfer != now.transfer) {
                    self.drop_transfer(before.transfer).await;
                }
            }
            Txn::DropStaged { transfer } => {
                slots.set_gate(slot, Gate::Closed);
                self.drop_transfer(transfer).await;
            }
            Txn::Take { epoch, transfer } => {
                self.read.remove(&transfer);
                self.taken = staged.filter(|staged| staged.content.len > 0).map(|staged| staged.transfer);
                self.shared.routes.note(slot, epoch, self.shared.own);
                self.shared.totals.lock().taken += 1;
                self.shared.note_taken(slot);
                *self.shared.moved_at.lock() = Some(Instant::now());
                self.shared.collect.notify_one();
            }
            Txn::Raise { .. } => {}
        }
    }

    async fn carry_out(&mut self, me: &ActorRef<SlotMessage>, effect: Effect, inputs: &mut VecDeque<Input>) {
        let slot = self.slot;
        fail_points::before_effect(&effect);
        match effect {
            Effect::Send(envelope) => {
                self.shared.cast(envelope.to, kind::HANDOFF, &HandoffFrame { slot, envelope });
                fail_points::sent(&envelope.message);
            }
            Effect::Copy(transfer, to) => self.begin_copy(me, transfer, to),
            Effect::Park => {
                self.sealed_at = Some(Instant::now());
                self.steps.clear();
                self.progress(|progress| progress.phase = "sealed");
                let drained = tokio::time::timeout(SEAL_TIMEOUT, self.drain()).await;
                self.note("drained");
                inputs.push_back(match drained {
                    Ok(Ok(content)) => Input::Drained(content),
                    Ok(Err(why)) => {
                        tracing::info!(target: "kuma::cluster", %slot, %why, "a slot stays for now");
                        self.progress(|progress| progress.trouble = Some("seal"));
                        Input::Abort
                    }
                    Err(_) => {
                        self.progress(|progress| progress.trouble = Some("timeout"));
                        Input::Abort
                    }
                });
            }
            Effect::Unpark => {
                self.shared.slots.set_gate(slot, Gate::Open);
                if self.shared.slots.is_erasing(slot) {
                    self.shared.slots.resume_erasures();
                }
            }
            // The gate is closed, and the way to the new owner is known: whoever waited goes there.
            Effect::Forward(_) => self.shared.slots.set_gate(slot, Gate::Closed),
            // The gate is sealed: nobody has been let in since.
            Effect::StopReads => {}
            Effect::Serve => {
                self.shared.slots.take_over(slot);
                self.shared.slots.set_gate(slot, Gate::Open);
                if let Some(epoch) = self.handoff.record.owned() {
                    self.shared.cast_all(kind::OWNS, &[(slot, epoch)]);
                }
            }
            Effect::Alarm(what) => {
                tracing::error!(target: "kuma::cluster", %slot, what, "this cannot happen; it heals by itself, please report it");
            }
        }
    }

    /// Copies what there is, beside everything else.
    fn begin_copy(&mut self, me: &ActorRef<SlotMessage>, transfer: TransferId, to: DiskId) {
        let (shared, slot, me) = (self.shared.clone(), self.slot, me.clone());
        shared.moves.lock().insert(slot, MoveProgress::new(slot, to, shared.rows_of(slot)));
        shared.feed.tell(ClusterEvent::MoveStarted { slot, to: shared.name_of(to) });
        let task = tokio::spawn(async move {
            let copy = copy_all(&shared, slot, transfer, to).await;
            // One that is gone copies nothing any more.
            let _ = me.cast(SlotMessage::Copied { transfer, copy });
        });
        self.copying = Some(task.abort_handle());
    }

    async fn copied(&mut self, me: &ActorRef<SlotMessage>, transfer: TransferId, copy: Result<Caught, String>) {
        let is_current = self.handoff.out.is_some_and(|out| out.transfer == transfer && out.phase == Phase::Copying);
        if !is_current {
            return;
        }
        self.copying = None;
        match copy {
            // What is being erased changes under the copy.
            Ok(Caught { copy, leave }) if !copy.is_stale() && !self.shared.slots.is_erasing(self.slot) => {
                (self.copy, self.leave) = (Some(copy), leave);
                self.put_in(me, Input::Seal).await;
            }
            Ok(_) => {
                self.progress(|progress| progress.trouble = Some("erasing"));
                self.put_in(me, Input::Abort).await
            }
            Err(why) => {
                tracing::info!(target: "kuma::cluster", slot = %self.slot, %why, "a slot could not be copied; it stays for now");
                self.progress(|progress| progress.trouble = Some("copy"));
                self.put_in(me, Input::Abort).await;
            }
        }
    }

    /// Stops what the slot is at and sends the rest of it.
    async fn drain(&mut self) -> Result<Content, String> {
        let slot = self.slot;
        let out = self.handoff.out.ok_or("the attempt is over")?;
        let mut copy = self.copy.take().ok_or("there is no copy")?;
        let content = self.shared.slots.seal(slot).await.map_err(|error| error.to_string())?;
        // Requests wait for it: it does not stand back behind them.
        while let Some(chunk) = copy.next().await.map_err(|error| error.to_string())? {
            send(&self.shared, slot, out.transfer, out.to, chunk, Urgency::Awaited).await?;
        }
        if let Some(rest) = copy.rest().await.map_err(|error| error.to_string())? {
            send(&self.shared, slot, out.transfer, out.to, rest, Urgency::Awaited).await?;
        }
        match copy.is_stale() || self.shared.slots.is_erasing(slot) {
            true => Err("something in it is being erased".to_owned()),
            false => Ok(content),
        }
    }

    /// A piece of the slot has come.
    async fn keep(&mut self, frame: ChunkFrame) -> ChunkReply {
        let ChunkFrame { slot, transfer, from, to, chunk } = frame;
        let disks = self.shared.state().disks.clone();
        let is_for_us = to == self.shared.own && slot == self.slot;
        if !is_for_us || !self.handoff.accepts_rows(&disks, from, transfer, Safeguards::ALL) {
            return ChunkReply::Refused("the piece is not wanted".to_owned());
        }
        if !self.read.contains_key(&transfer) {
            // One attempt at a time; those before it are over.
            let others: Vec<TransferId> = self.read.keys().copied().collect();
            for other in others {
                self.drop_transfer(other).await;
            }
        }
        if let Err(error) = self.shared.slots.receive(slot, transfer, chunk).await {
            return ChunkReply::Refused(error.to_string());
        }
        self.read.entry(transfer).or_default();
        match self.read_back(transfer).await {
            Some(_) => ChunkReply::Kept,
            None => ChunkReply::Refused("the piece could not be read back".to_owned()),
        }
    }

    /// What is on this disk of a transfer, read back from there.
    async fn read_back(&mut self, transfer: TransferId) -> Option<Content> {
        let before = self.read.get(&transfer).copied().unwrap_or_default();
        match self.shared.slots.read_back(self.slot, transfer, before).await {
            Ok(read) => {
                self.read.insert(transfer, read);
                Some(read.content)
            }
            Err(error) => {
                tracing::error!(target: "kuma::cluster", slot = %self.slot, %error, "what came in of a slot cannot be read back");
                None
            }
        }
    }

    async fn drop_transfer(&mut self, transfer: TransferId) {
        self.read.remove(&transfer);
        if self.handoff.record.staged.is_some_and(|staged| staged.transfer == transfer) {
            return;
        }
        if let Err(error) = self.shared.slots.drop_transfer(self.slot, transfer).await {
            // It is dropped at the next start.
            tracing::warn!(target: "kuma::cluster", slot = %self.slot, %error, "what came in of a slot could not be dropped");
        }
    }

    fn note(&mut self, step: &'static str) {
        self.steps.extend(self.sealed_at.map(|at| (step, at.elapsed())));
    }

    fn progress(&self, change: impl FnOnce(&mut MoveProgress)) {
        self.shared.moves.lock().get_mut(&self.slot).map(change);
    }

    /// Sets the timer for what is not answered. One that is over sooner stays: what goes on meanwhile, and be it for ever, does not put it off.
    fn schedule(&mut self, me: &ActorRef<SlotMessage>) {
        let between = |[first, last]: [Duration; 2], waited: Duration| (waited * 2).clamp(first, last);
        let is_sealed = self.handoff.out.is_some_and(|out| matches!(out.phase, Phase::Sealed(_)));
        let wait = match self.handoff.record.token {
            Token::Released { is_taken: false, .. } => between(GRANT_RESEND, self.waited),
            _ if is_sealed => PREPARE_RESEND,
            _ if self.handoff.record.staged.is_some() => between(STATUS_POLL, self.waited),
            _ => return,
        };
        let due = Instant::now() + wait;
        if self.timer.is_some_and(|(_, other)| other <= due) {
            return;
        }
        self.waited = wait;
        self.ticks += 1;
        let number = self.ticks;
        self.timer = Some((number, due));
        me.send_after(wait, move || SlotMessage::Tick { number });
    }
}

async fn copy_all(shared: &Shared, slot: Slot, transfer: TransferId, to: DiskId) -> Result<Caught, String> {
    let mut copy = Box::new(shared.slots.copy(slot).await.map_err(|error| error.to_string())?);
    catch_up(shared, slot, transfer, to, &mut copy).await?;
    if shared.moves.lock().get(&slot).is_some_and(MoveProgress::is_empty) {
        return Ok(Caught { copy, leave: None });
    }
    let leave = shared.sealing.clone().acquire_owned().await.map_err(|error| error.to_string())?;
    // What came while others were sealed.
    catch_up(shared, slot, transfer, to, &mut copy).await?;
    Ok(Caught { copy, leave: Some(leave) })
}

async fn catch_up(
    shared: &Shared,
    slot: Slot,
    transfer: TransferId,
    to: DiskId,
    copy: &mut SlotCopy,
) -> Result<(), String> {
    while let Some(chunk) = copy.next().await.map_err(|error| error.to_string())? {
        let rows = chunk.rows.rows.len() as u64;
        send(shared, slot, transfer, to, chunk, Urgency::Beside).await?;
        if let Some(progress) = shared.moves.lock().get_mut(&slot) {
            progress.rows_sent += rows;
            progress.rows_left = copy.rows_left();
        }
    }
    Ok(())
}

/// Whether requests wait for a piece.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Urgency {
    /// The slot is served meanwhile: everything else goes first.
    Beside,
    /// The slot is sealed.
    Awaited,
}

/// Sends a piece and waits until it is on the other disk.
async fn send(
    shared: &Shared,
    slot: Slot,
    transfer: TransferId,
    to: DiskId,
    chunk: SlotChunk,
    urgency: Urgency,
) -> Result<(), String> {
    let transport: &Arc<dyn Transport> = shared.transport().ok_or("the node is starting")?;
    let body = wire::encode(&ChunkFrame { slot, transfer, from: shared.own, to, chunk });
    let reply = match urgency == Urgency::Beside && body.len() <= BULK_BYTES_MAX {
        true => transport.call_bulk(to, kind::CHUNK, body, CHUNK_WITHIN).await,
        false => transport.call(to, kind::CHUNK, body, CHUNK_WITHIN).await,
    };
    fail_point("handoff.start.chunk_sent");
    match reply.map(|reply| wire::decode(&reply)) {
        Ok(Some(ChunkReply::Kept)) => Ok(()),
        Ok(Some(ChunkReply::Refused(why))) => Err(format!("the other node refused a piece: {why}")),
        Ok(None) => Err("the other node's answer cannot be read".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
