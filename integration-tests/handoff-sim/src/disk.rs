//! A disk with its store, and what runs on it: the part that a slot's actor has in a node.
//!
//! Invariants:
//! - What the rules hold for the record of a slot is what the store's file says, but for a transaction that is on its way.
//! - A crash takes the files as they are, and nothing of what is in memory.

use std::{collections::HashMap, fs, path::PathBuf, rc::Rc};

use kuma_cluster::{Disks, Effect, Envelope, Handoff, Input, Join, Message, Phase, Safeguards, Token, TransferId, Txn};
use kuma_core::{AppendError, Content, DiskId, Gate, Kuma, NewEvent, ReadBack, Seat, Slot, SlotChunk, SlotCopy, Slots};
use serde_json::json;

use crate::{
    coverage::Coverage,
    network::{Body, Network, Packet},
    template::{copy_directory, options},
};

/// The kind of all entities.
pub(crate) const KIND: &str = "counter";

/// What is around a disk.
pub(crate) struct Around {
    pub(crate) network: Network,
    pub(crate) coverage: Coverage,
    pub(crate) safeguards: Safeguards,
    /// What cannot happen, and did.
    pub(crate) alarm: Option<String>,
}

impl Around {
    pub(crate) fn alarm(&mut self, what: impl Into<String>) {
        let what = what.into();
        self.alarm.get_or_insert(what);
    }
}

/// A transaction on its way.
pub(crate) struct Pending {
    pub(crate) txn: Txn,
    then: Vec<Effect>,
}

/// A slot that is copied out.
pub(crate) struct Copying {
    pub(crate) transfer: TransferId,
    pub(crate) to: DiskId,
    /// Absent until it has begun.
    copy: Option<Box<SlotCopy>>,
    /// The piece that is waited for.
    piece: u32,
    waited_for: Option<Rc<SlotChunk>>,
    /// What was sealed.
    sealed: Option<Content>,
    has_rest: bool,
}

impl Copying {
    /// Whether a piece is on its way that was not answered.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waited_for.is_some()
    }
}

/// A slot on one disk.
pub(crate) struct Place {
    pub(crate) slot: Slot,
    pub(crate) handoff: Handoff,
    pub(crate) copying: Option<Copying>,
    /// What of each transfer was read back.
    read: HashMap<TransferId, ReadBack>,
    pub(crate) pending: Option<Pending>,
}

impl Place {
    pub(crate) fn is_sealed(&self) -> bool {
        self.handoff.out.is_some_and(|out| matches!(out.phase, Phase::Sealing | Phase::Sealed(_)))
    }
}

/// An older state of the files.
struct Older {
    directory: PathBuf,
    disks: Disks,
}

pub(crate) struct Disk {
    pub(crate) node: usize,
    /// How many disks the node had before.
    pub(crate) generation: u32,
    pub(crate) id: DiskId,
    root: PathBuf,
    directory: PathBuf,
    directories: u32,
    seat: Seat,
    kuma: Option<Kuma>,
    pub(crate) disks: Disks,
    pub(crate) join: Join,
    pub(crate) places: Vec<Place>,
    older: Option<Older>,
}

impl Disk {
    /// Opens the store in `root/0`.
    pub(crate) async fn new(node: usize, generation: u32, root: PathBuf, seat: Seat, slots: &[Slot]) -> Self {
        let directory = root.join("0");
        let kuma = Kuma::start(options(&directory, seat, None)).await.unwrap();
        let id = kuma.slots().disk_id();
        let place = |slot: &Slot| Place {
            slot: *slot,
            handoff: Handoff::boot(kuma.slots().record(*slot).unwrap()),
            copying: None,
            read: HashMap::new(),
            pending: None,
        };
        let places = slots.iter().map(place).collect();
        let disks = Disks::joiner(id, []);
        let (join, kuma) = (Join::default(), Some(kuma));
        Disk { node, generation, id, root, directory, directories: 1, seat, kuma, disks, join, places, older: None }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.kuma.is_some()
    }

    pub(crate) fn slots(&self) -> Slots {
        self.kuma.as_ref().unwrap().slots()
    }

    pub(crate) fn kuma(&self) -> &Kuma {
        self.kuma.as_ref().unwrap()
    }

    /// Keeps what is known of disks, and opens the gates of what is owned if the disk takes part.
    pub(crate) async fn keep_disks(&mut self, disks: Disks) {
        self.slots().keep_cluster(rmp_serde::to_vec(&disks).unwrap()).await.unwrap();
        self.disks = disks;
        self.set_gates();
    }

    fn set_gates(&self) {
        for place in &self.places {
            let gate = match place.handoff.record {
                record if record.staged.is_some() => Gate::Sealed,
                record if record.owned().is_some() && self.disks.is_active() && !place.is_sealed() => Gate::Open,
                record if record.owned().is_some() && self.disks.is_active() => Gate::Sealed,
                _ => Gate::Closed,
            };
            self.slots().set_gate(place.slot, gate);
        }
    }

    /// Puts one thing into the rules. Its transaction is on its way when this returns.
    pub(crate) fn put(&mut self, around: &mut Around, s: usize, input: Input) {
        let place = &mut self.places[s];
        let before = place.handoff.out;
        let plan = place.handoff.step(&self.disks, input, around.safeguards);
        for effect in plan.now {
            self.carry_out(around, s, effect);
        }
        let place = &mut self.places[s];
        if let Some(txn) = plan.txn
            && place.pending.is_none()
        {
            place.pending = Some(Pending { txn, then: plan.on_commit });
        }
        let is_over = before.is_some() && place.handoff.out.is_none();
        if is_over && place.handoff.record.owned().is_some() {
            place.copying = None;
            around.coverage.aborts += 1;
        }
    }

    fn carry_out(&mut self, around: &mut Around, s: usize, effect: Effect) {
        let slot = self.places[s].slot;
        match effect {
            Effect::Send(envelope) => {
                match envelope.message {
                    Message::NeedRows { .. } => around.coverage.rows_missing += 1,
                    Message::NeedData { .. } => around.alarm("a grant met missing data (I7)"),
                    _ => {}
                }
                around.network.send(envelope.from, envelope.to, Body::Message { slot: s, envelope });
            }
            Effect::Copy(transfer, to) => {
                let (copy, waited_for, sealed) = (None, None, None);
                self.places[s].copying =
                    Some(Copying { transfer, to, copy, piece: 0, waited_for, sealed, has_rest: false });
            }
            // What the seal waits for is waited for where it is asked for.
            Effect::Park | Effect::StopReads => {}
            Effect::Unpark => self.slots().set_gate(slot, Gate::Open),
            Effect::Forward(_) => self.slots().set_gate(slot, Gate::Closed),
            Effect::Serve => {
                self.slots().take_over(slot);
                self.slots().set_gate(slot, Gate::Open);
            }
            Effect::Alarm(what) => around.alarm(what),
        }
    }

    /// Has the writer make the change that is on its way, and does what follows from it.
    pub(crate) async fn commit(&mut self, around: &mut Around, s: usize, is_looked_up: bool) {
        let Some(Pending { txn, then }) = self.places[s].pending.take() else { return };
        let is_committed = self.write(around, s, &txn, is_looked_up).await;
        if is_committed {
            self.committed(around, s, &txn).await;
            for effect in then {
                self.carry_out(around, s, effect);
            }
        }
        if matches!(txn, Txn::Release { .. }) {
            around.coverage.releases_refused += u64::from(!is_committed);
            self.put(around, s, Input::Released { is_committed });
        }
    }

    /// False if it surely did not.
    async fn write(&mut self, around: &mut Around, s: usize, txn: &Txn, is_looked_up: bool) -> bool {
        let (slots, place) = (self.slots(), &mut self.places[s]);
        let mut changed = slots.change(place.slot, *txn).await;
        if is_looked_up && changed.is_ok() {
            // As if the answer had been that nobody knows.
            around.coverage.looked_up += 1;
            changed = slots.change(place.slot, *txn).await;
        }
        let Err(error) = changed else { return true };
        let (mut wanted, record) = (place.handoff.record, slots.record(place.slot).unwrap());
        wanted.apply(txn);
        if error.is_changed() && record.token == wanted.token && record.staged == wanted.staged {
            return true;
        }
        if !error.is_changed() {
            around.alarm(format!("a change of a slot failed: {error}"));
        }
        place.handoff.record = record;
        false
    }

    async fn committed(&mut self, around: &mut Around, s: usize, txn: &Txn) {
        let slots = self.slots();
        let place = &mut self.places[s];
        let (slot, staged) = (place.slot, place.handoff.record.staged);
        place.handoff.committed(txn);
        match *txn {
            Txn::Release { .. } => {
                slots.set_gate(slot, Gate::Closed);
                place.copying = None;
            }
            Txn::Stage(now) => {
                slots.set_gate(slot, Gate::Sealed);
                if let Some(before) = staged.filter(|before| before.transfer != now.transfer) {
                    around.coverage.staged_replaced += 1;
                    self.drop_transfer(around, s, before.transfer).await;
                }
            }
            Txn::DropStaged { transfer } => {
                slots.set_gate(slot, Gate::Closed);
                around.coverage.staged_dropped += 1;
                self.drop_transfer(around, s, transfer).await;
            }
            Txn::Take { transfer, .. } => {
                around.coverage.handoffs += 1;
                self.drop_transfer(around, s, transfer).await;
            }
            Txn::ConfirmTaken { .. } | Txn::Raise { .. } => {}
        }
    }

    async fn drop_transfer(&mut self, around: &mut Around, s: usize, transfer: TransferId) {
        let slots = self.slots();
        let place = &mut self.places[s];
        place.read.remove(&transfer);
        if place.handoff.record.staged.is_some_and(|staged| staged.transfer == transfer) {
            return;
        }
        if let Err(error) = slots.drop_transfer(place.slot, transfer).await {
            around.alarm(format!("what came in could not be dropped: {error}"));
        }
    }

    async fn read_back(&mut self, around: &mut Around, s: usize, transfer: TransferId) -> Option<Content> {
        let slots = self.slots();
        let place = &mut self.places[s];
        let before = place.read.get(&transfer).copied().unwrap_or_default();
        match slots.read_back(place.slot, transfer, before).await {
            Ok(read) => {
                place.read.insert(transfer, read);
                Some(read.content)
            }
            Err(error) => {
                around.alarm(format!("what came in cannot be read back: {error}"));
                None
            }
        }
    }

    /// The slot is wished to be at `to`.
    pub(crate) fn start_move(&mut self, around: &mut Around, s: usize, to: DiskId, transfer: TransferId) {
        let record = self.slots().record(self.places[s].slot).unwrap();
        if self.places[s].handoff.out.is_none() && self.places[s].pending.is_none() {
            self.places[s].handoff.record = record;
            self.put(around, s, Input::Start { to, transfer });
        }
    }

    /// Copies on, sends a piece again that was not answered, or says that nothing is left of what was sealed. What it did, in words.
    pub(crate) async fn copy_on(&mut self, around: &mut Around, s: usize) -> Option<&'static str> {
        let (slots, id) = (self.slots(), self.id);
        let place = &mut self.places[s];
        let copying = place.copying.as_mut()?;
        if copying.copy.is_none() {
            copying.copy = Some(Box::new(slots.copy(place.slot).await.unwrap()));
        }
        let copy = copying.copy.as_mut()?;
        let mut what = "again";
        if copying.waited_for.is_none() {
            let mut chunk = copy.next().await.unwrap();
            if chunk.is_none() && copying.sealed.is_some() && !copying.has_rest {
                copying.has_rest = true;
                chunk = copy.rest().await.unwrap();
            }
            match (chunk, copying.sealed) {
                (Some(chunk), _) => {
                    copying.piece += 1;
                    copying.waited_for = Some(Rc::new(chunk));
                    what = "next";
                }
                (None, Some(content)) => {
                    let is_sealing = place.handoff.out.is_some_and(|out| out.phase == Phase::Sealing);
                    let input = if copy.is_stale() { Input::Abort } else { Input::Drained(content) };
                    if is_sealing {
                        self.put(around, s, input);
                        return Some("drained");
                    }
                    return None;
                }
                (None, None) => return Some("caught up"),
            }
        }
        let (to, transfer, piece) = (copying.to, copying.transfer, copying.piece);
        let chunk = copying.waited_for.clone()?;
        around.network.send(id, to, Body::Chunk { slot: s, transfer, piece, chunk });
        Some(what)
    }

    /// Whether the slot can be sealed: it is copied, and no piece is waited for.
    pub(crate) fn may_seal(&self, s: usize) -> bool {
        let place = &self.places[s];
        let is_copying = place.handoff.out.is_some_and(|out| out.phase == Phase::Copying);
        let has_copy =
            place.copying.as_ref().is_some_and(|copying| copying.copy.is_some() && copying.waited_for.is_none());
        is_copying && has_copy && place.pending.is_none()
    }

    /// Seals a slot while an append to one of its entities is on its way. How that ended.
    pub(crate) async fn seal(
        &mut self,
        around: &mut Around,
        s: usize,
        in_flight: Option<(String, u64)>,
    ) -> Option<Result<u64, AppendError>> {
        self.put(around, s, Input::Seal);
        let (slots, slot) = (self.slots(), self.places[s].slot);
        let mut outcome = None;
        let content = match in_flight {
            Some((entity, key)) => {
                let handle = self.kuma().raw(KIND, entity);
                // It has its place in the entity's order when the gate is sealed.
                let submitted = handle.append(event(key)).idempotency_key(key.to_le_bytes()).submit().await;
                let (written, content) = tokio::join!(
                    async {
                        match submitted {
                            Ok(pending) => pending.await,
                            Err(refused) => Err(refused),
                        }
                    },
                    slots.seal(slot)
                );
                outcome = Some(written.map(|version| version.0));
                content.unwrap()
            }
            None => slots.seal(slot).await.unwrap(),
        };
        if let Some(copying) = self.places[s].copying.as_mut() {
            copying.sealed = Some(content);
        }
        outcome
    }

    /// Something has come. False if it has to wait.
    pub(crate) async fn deliver(&mut self, around: &mut Around, packet: &Packet) -> bool {
        match packet.body {
            Body::Chunk { slot: s, .. } | Body::Kept { slot: s, .. } | Body::Message { slot: s, .. }
                if self.places[s].pending.is_some() =>
            {
                return false;
            }
            Body::Chunk { slot, transfer, piece, ref chunk } => {
                let is_kept = self.keep(around, slot, packet.from, transfer, chunk).await;
                match is_kept {
                    true => around.coverage.pieces += 1,
                    false => around.coverage.pieces_refused += 1,
                }
                around.network.send(self.id, packet.from, Body::Kept { slot, transfer, piece, is_kept });
            }
            Body::Kept { slot, transfer, piece, is_kept } => {
                let place = &mut self.places[slot];
                let waiting = place.copying.as_mut().filter(|copying| {
                    (copying.transfer, copying.piece) == (transfer, piece) && copying.waited_for.is_some()
                });
                match waiting {
                    Some(copying) if is_kept => copying.waited_for = None,
                    Some(_) => self.put(around, slot, Input::Abort),
                    None => {}
                }
            }
            Body::Message { slot, envelope } => self.message(around, slot, envelope).await,
            Body::Join { ref replaces } => {
                let mut disks = self.disks.clone();
                disks.admit(packet.from, None, around.safeguards);
                replaces.iter().for_each(|old| disks.admit(packet.from, Some(*old), around.safeguards));
                self.keep_disks(disks).await;
                let answer = self.disks.answer(kuma_core::Epoch::NEVER, &kuma_cluster::Tombstones::default());
                around.network.send(self.id, packet.from, Body::Joined { answer: Box::new(answer) });
            }
            Body::Joined { ref answer } => {
                let mut disks = self.disks.clone();
                let none = kuma_cluster::Tombstones::default();
                let _ = self.join.answered(&mut disks, &none, packet.from, answer, around.safeguards);
                if disks.is_active() && !self.disks.is_active() {
                    around.coverage.joins += 1;
                }
                if disks != self.disks {
                    self.keep_disks(disks).await;
                }
            }
        }
        true
    }

    async fn message(&mut self, around: &mut Around, s: usize, envelope: Envelope) {
        let found = match envelope.message {
            Message::Prepare { transfer, .. } => self.read_back(around, s, transfer).await,
            _ => None,
        };
        let is_lost = |transfer| {
            let out = self.places[s].handoff.out;
            let out = out.filter(|out| (out.to, out.transfer) == (envelope.from, transfer));
            out.is_some_and(|out| matches!(out.phase, Phase::Sealed(_)))
        };
        if let Message::NeedRows { transfer } = envelope.message
            && is_lost(transfer)
        {
            return self.put(around, s, Input::Abort);
        }
        let token = self.places[s].handoff.record.token;
        self.put(around, s, Input::Message { envelope, found });
        if let (Message::OwnerIs { .. }, Token::Released { .. }) = (envelope.message, token)
            && self.places[s].pending.is_some()
        {
            around.coverage.confirmed_by_hint += 1;
        }
        if let Message::Abort { transfer } = envelope.message
            && self.places[s].pending.is_none()
        {
            self.drop_transfer(around, s, transfer).await;
        }
    }

    async fn keep(
        &mut self,
        around: &mut Around,
        s: usize,
        from: DiskId,
        transfer: TransferId,
        chunk: &SlotChunk,
    ) -> bool {
        let place = &self.places[s];
        if !place.handoff.accepts_rows(&self.disks, from, transfer, around.safeguards) {
            return false;
        }
        if !place.read.contains_key(&transfer) {
            let others: Vec<TransferId> = place.read.keys().copied().collect();
            for other in others {
                self.drop_transfer(around, s, other).await;
            }
        }
        if self.slots().receive(self.places[s].slot, transfer, chunk.clone()).await.is_err() {
            return false;
        }
        self.places[s].read.entry(transfer).or_default();
        self.read_back(around, s, transfer).await.is_some()
    }

    /// The process dies: the files are as they are at this moment. `is_committed` says of each transaction on its way whether it is among them.
    pub(crate) async fn crash(&mut self, around: &mut Around, mut is_committed: impl FnMut() -> bool) {
        around.coverage.crashes += 1;
        for s in 0..self.places.len() {
            let place = &self.places[s];
            around.coverage.crashes_while_sealed += u64::from(place.is_sealed());
            around.coverage.crashes_while_staged += u64::from(place.handoff.record.staged.is_some());
            let Some(Pending { txn, .. }) = self.places[s].pending.take() else { continue };
            if !is_committed() {
                around.coverage.crashes_before_commit += 1;
            } else if self.write(around, s, &txn, false).await {
                self.places[s].handoff.committed(&txn);
                match txn {
                    Txn::Release { .. } => around.coverage.crashes_before_grant += 1,
                    Txn::Stage(_) | Txn::Take { .. } => around.coverage.crashes_before_promise += 1,
                    _ => {}
                }
                // It was taken, though nobody was told.
                around.coverage.handoffs += u64::from(matches!(txn, Txn::Take { .. }));
            }
        }
        self.forget();
        let next = self.next_directory();
        copy_directory(&self.directory, &next);
        self.close().await;
        self.directory = next;
    }

    fn forget(&mut self) {
        self.join = Join::default();
        for place in &mut self.places {
            (place.handoff.out, place.copying, place.pending) = (None, None, None);
            place.read.clear();
        }
    }

    fn next_directory(&mut self) -> PathBuf {
        self.directories += 1;
        self.root.join((self.directories - 1).to_string())
    }

    async fn close(&mut self) {
        if let Some(kuma) = self.kuma.take() {
            kuma.shutdown().await;
        }
        fs::remove_dir_all(&self.directory).unwrap();
    }

    /// The disk is gone.
    pub(crate) async fn destroy(mut self) {
        self.forget();
        self.close().await;
    }

    /// The end of a run.
    pub(crate) async fn stop(&mut self) {
        self.forget();
        if let Some(kuma) = self.kuma.take() {
            kuma.shutdown().await;
        }
    }

    /// Opens the store again, as a node does.
    pub(crate) async fn start(&mut self, around: &mut Around) {
        let opened = Kuma::start(options(&self.directory, self.seat, None)).await;
        let kuma = match opened {
            Ok(kuma) => kuma,
            Err(error) => return around.alarm(format!("a store does not open after a crash: {error}")),
        };
        let slots = kuma.slots();
        self.kuma = Some(kuma);
        slots.records().iter().for_each(|(slot, _)| slots.set_gate(*slot, Gate::Closed));
        slots.index().await.unwrap();
        for (slot, transfer) in slots.leftovers().await.unwrap() {
            slots.drop_transfer(slot, transfer).await.unwrap();
        }
        let kept = slots.cluster().await.unwrap().map(|bytes| rmp_serde::from_slice::<Disks>(&bytes).unwrap());
        if kept.as_ref().is_some_and(|kept| *kept != self.disks) {
            around.alarm("what a node knows of disks is not what it kept");
        }
        for place in &mut self.places {
            let record = slots.record(place.slot).unwrap();
            let before = place.handoff.record;
            if (record.token, record.staged, record.floor) != (before.token, before.staged, before.floor) {
                around.alarm("a record is not what was committed before the crash");
            }
            place.handoff = Handoff::boot(record);
        }
        self.set_gates();
        around.coverage.starts += 1;
    }

    /// Keeps a copy of the files as they are.
    pub(crate) fn keep_older(&mut self) {
        let directory = self.root.join("older");
        let _ = fs::remove_dir_all(&directory);
        copy_directory(&self.directory, &directory);
        self.older = Some(Older { directory, disks: self.disks.clone() });
    }

    /// Somebody puts that copy in place of the files, which no rule allows: the same disk is older than it was. False if there is none.
    pub(crate) async fn go_back(&mut self, around: &mut Around) -> bool {
        let Some(older) = self.older.take() else { return false };
        self.forget();
        self.close().await;
        self.directory = self.next_directory();
        fs::rename(&older.directory, &self.directory).unwrap();
        self.disks = older.disks;
        let kuma = Kuma::start(options(&self.directory, self.seat, None)).await.unwrap();
        for place in &mut self.places {
            place.handoff = Handoff::boot(kuma.slots().record(place.slot).unwrap());
        }
        kuma.shutdown().await;
        self.start(around).await;
        true
    }
}

/// The event of an append.
pub(crate) fn event(key: u64) -> NewEvent {
    NewEvent::json("Counted", &json!({ "key": key })).unwrap()
}
