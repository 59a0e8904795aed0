//! The world around the rules: nodes with disks, a network, clients, and what may go wrong.

use std::{collections::BTreeSet, sync::Arc};

use kuma_cluster::{
    Content, Disks, Effect, Envelope, Erasure, Handoff, Input, Join, JoinAnswer, Message, Phase, Plan, Safeguard,
    Safeguards, SlotRecord, Staged, Token, Tombstone, Tombstones, TransferId, Txn,
    erasure::{self, Write},
};
use kuma_core::{DiskId, EntityHash, Epoch};

use crate::log::Log;

/// A configuration: how much of everything there is.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Nodes. The first one owns the slot.
    pub nodes: u8,
    /// Of these, the last so many have to join.
    pub joiners: u8,
    /// Different commands of clients; each may be sent again to any node.
    pub commands: u8,
    /// The highest counter of an epoch.
    pub epochs: u32,
    /// Attempts to hand the slot over.
    pub transfers: u8,
    /// Crashes.
    pub crashes: u8,
    /// Disks that are restored from an older state, or wiped.
    pub restores: u8,
    /// Such a disk is empty.
    pub is_wiped: bool,
    /// Rows are copied ahead of the seal, and appends may fail.
    pub copies: bool,
    /// The owner tells others that it is.
    pub hints: bool,
    /// A client asks for the erasure of the only entity.
    pub erases: bool,
    /// At any moment nothing goes wrong any more, and everybody wants the slot to be at the last node.
    pub calms_down: bool,
    /// What the rules have to do without.
    pub safeguards: Safeguards,
    /// What the world does wrong.
    pub mutant: Mutant,
}

/// What a node does wrong around the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// Nothing.
    None,
    /// It serves a slot of which it has no record.
    ClaimOnAbsent,
    /// The name of an attempt is derived from the epoch.
    TransferDerived,
    /// The seal does not wait for appends on their way.
    NoDrain,
    /// An append does not ask for the token in its own transaction.
    NoTokenInAppend,
    /// Both.
    NoDrainNoTokenInAppend,
    /// Rows that are not committed are copied.
    UncommittedCopied,
    /// Idempotency keys do not move with the rows.
    KeysNotMoved,
    /// Idempotency keys are only in memory.
    KeysInMemory,
    /// A prepared copy is dropped after a while.
    StagedDropped,
    /// A prepared copy is taken after a while, without a grant.
    GrantPresumed,
    /// The giver serves again, though it released the slot.
    ServesAfterRelease,
    /// The pointer of a slot that was given away is deleted.
    PointerDeleted,
    /// The rows are deleted with the release.
    RowsDeletedAtRelease,
    /// A restored disk owns what it owned.
    RestoreOwns,
    /// A restored or wiped disk has the id that it had.
    SameDisk,
    /// A receiver never asks what became of what it has prepared.
    NeverAsks,
    /// An erasure that a crash has interrupted is left as it is.
    ErasureLeft,
    /// An owner that finds an erasure in its copy goes on with it, and does not keep the tombstone.
    FoundNotEntombed,
    /// The seal does not wait for an erasure that has begun.
    SealIgnoresErasure,
    /// A new disk takes over the tombstones, and keeps the keys.
    JoinKeepsKeys,
    /// The answer of a disk that was replaced counts as that of the one in its place.
    AnswerOfTheNode,
}

/// A disk and what runs on it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    generation: u8,
    // Durable.
    disks: Disks,
    log: Log,
    /// Idempotency keys that are looked up.
    keys: u8,
    staged_log: Log,
    /// Rows of an attempt that came ahead, and whether the entity's key is with them.
    chunks: Option<(TransferId, Log, bool)>,
    tombstones: Tombstones,
    /// Whether the entity's key is in the slot, or in what was given away of it.
    has_key: bool,
    staged_has_key: bool,
    /// Whether the erasure is known to be finished: a mark beside the rows, which moves with them.
    is_finished: bool,
    staged_is_finished: bool,
    // Durable in part.
    pub(crate) slot: Handoff,
    // Not durable.
    queue: Log,
    pub(crate) pending: Option<Pending>,
    copied: u8,
    join: Join,
    erasure: Option<Erasure>,
    /// A copy of the durable part, to restore from.
    backup: Option<Box<Backup>>,
}

/// A transaction on its way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Pending {
    txn: Txn,
    then: Vec<Effect>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Backup {
    disks: Disks,
    record: SlotRecord,
    log: Log,
    keys: u8,
    staged_log: Log,
    tombstones: Tombstones,
    has_key: bool,
    is_finished: bool,
}

/// What is in the network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Packet {
    /// Rows that come ahead.
    Chunk {
        /// Of the attempt.
        transfer: TransferId,
        /// From whom.
        from: DiskId,
        /// For whom.
        to: DiskId,
        /// All rows up to here.
        log: Log,
        /// And the entity's key.
        has_key: bool,
    },
    /// A message, with the rows behind `base` if it is a preparation.
    Message {
        /// The message.
        envelope: Envelope,
        /// Rows that the receiver has to have already.
        base: u8,
        /// The whole log.
        log: Log,
        /// And the entity's key.
        has_key: bool,
        /// And the mark that its erasure is finished.
        is_finished: bool,
    },
    /// A message of an erasure.
    Erasure(erasure::Envelope),
    /// A disk asks to join.
    JoinRequest {
        /// The new disk.
        new: DiskId,
        /// For whom.
        to: DiskId,
    },
    /// The answer.
    JoinAnswer {
        /// From whom.
        from: DiskId,
        /// The new disk.
        to: DiskId,
        /// What it says.
        answer: JoinAnswer,
    },
}

impl Packet {
    fn without_rows(envelope: Envelope) -> Self {
        Packet::Message { envelope, base: 0, log: Log::default(), has_key: false, is_finished: false }
    }

    fn to(&self) -> DiskId {
        match self {
            Packet::Chunk { to, .. } | Packet::JoinRequest { to, .. } | Packet::JoinAnswer { to, .. } => *to,
            Packet::Message { envelope, .. } => envelope.to,
            Packet::Erasure(envelope) => envelope.to,
        }
    }
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub(crate) nodes: Vec<Node>,
    /// Shared between states, as a packet does not change.
    network: BTreeSet<Arc<Packet>>,
    // What no node knows.
    /// Commands that were acknowledged.
    acked: u8,
    /// The log as clients have seen it.
    seen: Log,
    /// Attempts that were taken.
    pub(crate) taken: u32,
    /// An acknowledged event may be gone: the only disk that had it is.
    pub(crate) is_lossy: bool,
    pub(crate) is_reordered: bool,
    pub(crate) is_alarmed: bool,
    attempts: u8,
    crashes: u8,
    restores: u8,
    /// Nothing goes wrong any more.
    pub(crate) is_calm: bool,
    /// So many writes of an erasure until a crash; of the step that is being made only.
    writes_left: Option<u8>,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// A client sends a command to a node.
    Request(u8, u8),
    /// A node commits what waits.
    Commit(u8),
    /// That fails.
    Fail(u8),
    /// A node copies rows to another one.
    Copy(u8, u8),
    /// A node seals the slot for another one.
    Seal(u8, u8),
    /// A node gives its attempt up.
    Abort(u8),
    /// A node prepares again with all rows.
    Again(u8),
    /// A transaction on its way ends.
    Committed(u8),
    /// A node asks what became of what it has prepared.
    Ask(u8),
    /// The owner tells another one that it is.
    Tell(u8, u8),
    /// A packet arrives.
    Deliver(Arc<Packet>),
    /// A node crashes; a transaction on its way was committed, or not.
    Crash(u8, bool),
    /// A node begins the erasure that waits, and crashes after so many of its writes.
    CrashInErasure(u8, u8),
    /// A node is told to shred, and crashes after so many writes.
    CrashInShred(erasure::Envelope, u8),
    /// A new disk is answered, and crashes after so many writes.
    CrashInJoin(Arc<Packet>, u8),
    /// The owner asks for what it has not been answered of its erasure.
    Shred(u8),
    /// A backup of a node's disk is made.
    Back(u8),
    /// The disk is replaced by its backup, or by an empty one.
    Restore(u8),
    /// A disk asks to join.
    Join(u8),
    /// What the mutant does.
    Mutate(u8),
    /// From now on nothing goes wrong.
    CalmDown,
}

fn disk(node: u8, generation: u8) -> DiskId {
    let mut id = [0; 16];
    (id[0], id[1]) = (node, generation);
    DiskId(id)
}

fn node_of(disk: DiskId) -> usize {
    usize::from(disk.0[0])
}

fn transfer(number: u8) -> TransferId {
    let mut id = [0; 16];
    id[0] = number;
    TransferId(id)
}

/// The command that erases the entity.
const ERASE: u8 = 7;

/// The only life.
const LIFE: Tombstone = Tombstone { key_id: [1; 16], id_hash: EntityHash([1; 16]) };

impl Node {
    fn own(&self) -> DiskId {
        self.disks.own()
    }

    pub(crate) fn is_active(&self) -> bool {
        self.disks.is_active()
    }

    pub(crate) fn serves(&self) -> bool {
        self.is_active() && matches!(self.slot.record.token, Token::Owned(_))
    }

    pub(crate) fn reads(&self, safeguards: Safeguards) -> bool {
        self.is_active() && self.slot.may_read(safeguards)
    }

    pub(crate) fn log(&self) -> Log {
        self.log
    }

    pub(crate) fn staged_log(&self) -> Log {
        self.staged_log
    }

    /// Whether the entity's key is anywhere on its disk.
    pub(crate) fn has_any_key(&self) -> bool {
        self.has_key || self.staged_has_key || self.chunks.is_some_and(|(_, _, has_key)| has_key)
    }

    /// Whether its rows say that the entity is erased.
    fn is_erased(&self) -> bool {
        self.log.has(ERASE)
    }

    /// Whether the entity can be read, or it is known why not.
    pub(crate) fn knows_the_entity(&self) -> bool {
        self.has_key || self.is_erased() || self.erasure.is_some()
    }

    /// Whether it counts the other one among those that take part.
    pub(crate) fn knows(&self, other: &Node) -> bool {
        self.disks.is_there(other.own())
    }

    fn has_promised_too_early(&self) -> bool {
        self.pending.as_ref().is_some_and(|pending| !matches!(pending.txn, Txn::Release { .. }))
    }
}

impl World {
    /// Whether a log has everything that was acknowledged, in the order in which it was.
    pub(crate) fn is_whole(&self, log: Log) -> bool {
        self.seen.is_prefix_of(log) && self.acked & !log.set() == 0
    }

    pub(crate) fn node(&self, disk: DiskId) -> Option<&Node> {
        self.nodes.get(node_of(disk)).filter(|node| node.own() == disk)
    }

    /// Whether the erasure was said to be done.
    pub(crate) fn is_erasure_acked(&self) -> bool {
        self.acked >> ERASE & 1 == 1
    }

    /// Who has the say: the owner, or the giver whose grant was not taken.
    pub(crate) fn authorities(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| {
            node.is_active()
                && match node.slot.record.token {
                    Token::Owned(_) => true,
                    Token::Released { transfer, to, .. } => {
                        self.taken >> transfer.0[0] & 1 == 0 && self.node(to).is_some_and(Node::is_active)
                    }
                    Token::None => false,
                }
        })
    }

    fn put_in(&mut self, packet: Packet) {
        self.network.insert(Arc::new(packet));
    }

    fn observe(&mut self, log: Log) {
        match self.seen.is_prefix_of(log) {
            true => self.seen = log,
            false => self.is_reordered = true,
        }
    }
}

impl Model {
    /// Three nodes, of which the first owns the slot.
    pub const THREE: Model = Model {
        nodes: 3,
        joiners: 0,
        commands: 1,
        epochs: 3,
        transfers: 3,
        crashes: 1,
        restores: 0,
        is_wiped: false,
        copies: false,
        hints: false,
        erases: false,
        calms_down: false,
        safeguards: Safeguards::ALL,
        mutant: Mutant::None,
    };

    pub(crate) fn begin(&self) -> World {
        let old: Vec<DiskId> = (0..self.nodes - self.joiners).map(|n| disk(n, 0)).collect();
        let node = |n: u8| {
            let is_joiner = n >= self.nodes - self.joiners;
            let disks = match is_joiner {
                true => Disks::joiner(disk(n, 0), [disk(0, 0)]),
                false => {
                    let mut disks = Disks::founder(disk(n, 0));
                    old.iter().for_each(|other| disks.admit(*other, None, Safeguards::ALL));
                    disks
                }
            };
            let record = if n == 0 { SlotRecord::founded(Content::default()) } else { SlotRecord::NONE };
            Node {
                generation: 0,
                disks,
                log: Log::default(),
                keys: 0,
                staged_log: Log::default(),
                chunks: None,
                tombstones: Tombstones::default(),
                has_key: self.erases && n == 0,
                staged_has_key: false,
                is_finished: false,
                staged_is_finished: false,
                slot: Handoff::boot(record),
                queue: Log::default(),
                pending: None,
                copied: 0,
                join: Join::default(),
                erasure: None,
                backup: None,
            }
        };
        World {
            nodes: (0..self.nodes).map(node).collect(),
            network: BTreeSet::new(),
            acked: 0,
            seen: Log::default(),
            taken: 0,
            is_lossy: false,
            is_reordered: false,
            is_alarmed: false,
            attempts: 0,
            crashes: 0,
            restores: 0,
            is_calm: false,
            writes_left: None,
        }
    }

    /// Whether the goal must be reachable from it: not where all attempts and epochs that are looked at are used up, nor where the disk is gone that
    /// has the say.
    pub(crate) fn is_judged(&self, world: &World) -> bool {
        let is_used_up = |node: &Node| node.slot.record.floor.counter >= self.epochs + 2;
        world.is_calm && !world.is_lossy && world.attempts <= self.transfers + 1 && !world.nodes.iter().any(is_used_up)
    }

    pub(crate) fn possible(&self, world: &World, actions: &mut Vec<Action>) {
        let more = if world.is_calm { 3 } else { 0 };
        if self.calms_down && !world.is_calm {
            actions.push(Action::CalmDown);
        }
        for (n, node) in (0_u8..).zip(&world.nodes) {
            if !node.is_active() {
                actions.push(Action::Join(n));
            } else {
                let erase = self.erases.then_some(ERASE);
                actions.extend((1..=self.commands).chain(erase).map(|command| Action::Request(n, command)));
                actions.extend(node.erasure.is_some().then_some(Action::Shred(n)));
                if !node.queue.is_empty() {
                    actions.push(Action::Commit(n));
                    actions.extend((self.copies && self.crashes > 0).then_some(Action::Fail(n)));
                }
                if let Token::Owned(epoch) = node.slot.record.token {
                    for to in (0..self.nodes).filter(|to| *to != n && (!world.is_calm || *to == self.nodes - 1)) {
                        if self.hints {
                            actions.push(Action::Tell(n, to));
                        }
                        let is_new = node.slot.out.is_none();
                        let (epochs, transfers) = (self.epochs + more, self.transfers + more as u8);
                        if epoch.counter < epochs && (!is_new || world.attempts < transfers) {
                            actions.extend(self.copies.then_some(Action::Copy(n, to)));
                            actions.push(Action::Seal(n, to));
                        }
                    }
                }
                if node.slot.out.is_some() {
                    actions.push(Action::Abort(n));
                    actions.extend((node.copied > 0).then_some(Action::Again(n)));
                }
                if node.slot.record.staged.is_some() && self.mutant != Mutant::NeverAsks {
                    actions.push(Action::Ask(n));
                }
                if self.mutant != Mutant::None {
                    actions.push(Action::Mutate(n));
                }
            }
            if node.pending.is_some() {
                actions.push(Action::Committed(n));
            }
            if world.crashes < self.crashes && !world.is_calm {
                actions.push(Action::Crash(n, false));
                actions.extend(node.pending.is_some().then_some(Action::Crash(n, true)));
                if node.queue.has(ERASE) {
                    actions.extend([1, 2].map(|writes| Action::CrashInErasure(n, writes)));
                }
            }
            if world.restores < self.restores && !world.is_calm {
                match self.is_wiped || node.backup.is_some() {
                    true => actions.push(Action::Restore(n)),
                    false => actions.extend(node.is_active().then_some(Action::Back(n))),
                }
            }
        }
        if world.crashes < self.crashes && !world.is_calm {
            let shreds = world.network.iter().filter_map(|packet| match **packet {
                Packet::Erasure(envelope) if matches!(envelope.message, erasure::Message::Shred(_)) => Some(envelope),
                _ => None,
            });
            actions.extend(shreds.flat_map(|envelope| [0, 1].map(|writes| Action::CrashInShred(envelope, writes))));
            let answers =
                world.network.iter().filter(|packet| matches!(***packet, Packet::JoinAnswer { .. }) && self.erases);
            actions.extend(answers.flat_map(|packet| [0, 1].map(|writes| Action::CrashInJoin(packet.clone(), writes))));
        }
        actions.extend(world.network.iter().cloned().map(Action::Deliver));
    }

    pub(crate) fn next(&self, before: &World, action: Action) -> Option<World> {
        let mut world = before.clone();
        self.act(&mut world, action)?;
        (world != *before).then_some(world)
    }

    fn act(&self, world: &mut World, action: Action) -> Option<()> {
        match action {
            Action::Request(n, command) => self.request(world, n, command)?,
            Action::Commit(n) => self.commit(world, n),
            Action::Fail(n) => world.nodes[usize::from(n)].queue = Log::default(),
            Action::Copy(n, to) => self.copy(world, n, to)?,
            Action::Seal(n, to) => self.seal(world, n, to)?,
            Action::Abort(n) => self.put(world, n, Input::Abort),
            Action::Again(n) => {
                world.nodes[usize::from(n)].copied = 0;
                self.put(world, n, Input::Remind);
            }
            Action::Committed(n) => self.committed(world, n)?,
            Action::Ask(n) => self.put(world, n, Input::Remind),
            Action::Tell(n, to) => {
                let Token::Owned(epoch) = world.nodes[usize::from(n)].slot.record.token else { return None };
                let (from, to) = (world.nodes[usize::from(n)].own(), world.nodes[usize::from(to)].own());
                let envelope = Envelope { from, to, message: Message::OwnerIs { epoch } };
                world.put_in(Packet::without_rows(envelope));
            }
            Action::Deliver(packet) => self.deliver(world, &packet)?,
            Action::Crash(n, is_committed) => {
                let node = &mut world.nodes[usize::from(n)];
                if let Some(Pending { txn, .. }) = node.pending.take().filter(|_| is_committed) {
                    if !node.slot.record.allows(&txn) {
                        return None;
                    }
                    self.write(world, n, &txn);
                }
                self.crash(world, n);
            }
            Action::CrashInErasure(n, writes) => {
                world.writes_left = Some(writes);
                self.commit(world, n);
                self.crash(world, n);
            }
            Action::CrashInShred(envelope, writes) => {
                world.writes_left = Some(writes);
                self.deliver(world, &Packet::Erasure(envelope))?;
                self.crash(world, node_of(envelope.to) as u8);
            }
            Action::CrashInJoin(packet, writes) => {
                let n = node_of(packet.to()) as u8;
                world.writes_left = Some(writes);
                self.deliver(world, &packet)?;
                self.crash(world, n);
            }
            Action::Shred(n) => self.erase(world, n, erasure::Input::Remind),
            Action::Back(n) => {
                let node = &mut world.nodes[usize::from(n)];
                let (disks, record, log, keys) = (node.disks.clone(), node.slot.record, node.log, node.keys);
                let (staged_log, tombstones) = (node.staged_log, node.tombstones.clone());
                let (has_key, is_finished) = (node.has_key, node.is_finished);
                let backup = Backup { disks, record, log, keys, staged_log, tombstones, has_key, is_finished };
                node.backup = Some(Box::new(backup));
            }
            Action::Restore(n) => self.restore(world, n),
            Action::Join(n) => {
                let node = &world.nodes[usize::from(n)];
                let (new, others) = (node.own(), node.disks.members().collect::<Vec<_>>());
                for to in others.into_iter().filter(|to| *to != new) {
                    world.put_in(Packet::JoinRequest { new, to });
                }
            }
            Action::Mutate(n) => self.mutate(world, n)?,
            Action::CalmDown => world.is_calm = true,
        }
        Some(())
    }

    fn request(&self, world: &mut World, n: u8, command: u8) -> Option<()> {
        let node = &mut world.nodes[usize::from(n)];
        if node.slot.record.token == Token::None && self.mutant == Mutant::ClaimOnAbsent {
            node.slot.record = SlotRecord::founded(Content::default());
        }
        if !node.slot.may_write() || node.has_promised_too_early() {
            return None;
        }
        if node.keys >> command & 1 == 1 && command == ERASE {
            // It is answered when it is done.
            return None;
        } else if node.keys >> command & 1 == 1 {
            // The answer of then is given again.
            let log = node.log;
            world.acked |= 1 << command;
            world.observe(log);
        } else if !node.queue.has(command) && node.log.len() + node.queue.len() < 4 {
            node.queue.push(command);
        }
        Some(())
    }

    fn commit(&self, world: &mut World, n: u8) {
        let node = &mut world.nodes[usize::from(n)];
        let queue = std::mem::take(&mut node.queue);
        let asks = !matches!(self.mutant, Mutant::NoTokenInAppend | Mutant::NoDrainNoTokenInAppend);
        if matches!(node.slot.record.token, Token::Owned(_)) || !asks {
            for command in queue.commands().filter(|command| *command != ERASE) {
                node.log.push(command);
                node.keys |= 1 << command;
            }
            node.slot.record.content = node.log.content();
            let log = node.log;
            world.acked |= queue.set() & !(1 << ERASE);
            world.observe(log);
            if queue.has(ERASE) {
                self.begin_erasure(world, n);
            }
        }
    }

    fn begin_erasure(&self, world: &mut World, n: u8) {
        world.nodes[usize::from(n)].erasure = Some(Erasure::new(LIFE));
        if self.mutant == Mutant::SealIgnoresErasure {
            // The rows come later.
            world.writes_left = Some(2);
        }
        self.erase(world, n, erasure::Input::Begin);
        if world.writes_left.take().is_none() {
            self.erase(world, n, erasure::Input::Begun);
        }
    }

    /// Puts an input into the erasure that a node works at, and does what follows.
    fn erase(&self, world: &mut World, n: u8, input: erasure::Input) {
        let node = &mut world.nodes[usize::from(n)];
        let Some(erasure) = &mut node.erasure else { return };
        let mut plan = erasure.step(&node.slot, &node.disks, input, self.safeguards);
        if self.mutant == Mutant::FoundNotEntombed && node.is_erased() {
            plan.writes.retain(|write| !matches!(write, Write::Entomb(_)));
        }
        self.carry_out(world, n, &plan);
    }

    /// Whether all of it was done.
    fn carry_out(&self, world: &mut World, n: u8, plan: &erasure::Plan) -> bool {
        self.tell(world, n, &plan.now);
        for write in &plan.writes {
            match &mut world.writes_left {
                Some(0) => return false,
                Some(left) => *left -= 1,
                None => {}
            }
            self.write_erasure(world, n, write);
        }
        self.tell(world, n, &plan.on_commit);
        true
    }

    fn tell(&self, world: &mut World, n: u8, effects: &[erasure::Effect]) {
        for effect in effects {
            match effect {
                erasure::Effect::Accept => {}
                erasure::Effect::Send(envelope) => {
                    world.put_in(Packet::Erasure(*envelope));
                }
                erasure::Effect::Done => {
                    world.acked |= 1 << ERASE;
                    world.nodes[usize::from(n)].erasure = None;
                }
            }
        }
    }

    fn write_erasure(&self, world: &mut World, n: u8, write: &Write) {
        let node = &mut world.nodes[usize::from(n)];
        match *write {
            Write::Entomb(_) => node.tombstones.committed(write),
            Write::Destroy { key_id, in_released, in_staged } if key_id == LIFE.key_id => {
                let is_released = matches!(node.slot.record.token, Token::Released { .. });
                node.has_key &= is_released && !in_released;
                if in_staged {
                    self.destroy_arriving(node);
                }
            }
            Write::DestroyAll if node.tombstones.has(LIFE.key_id) && self.mutant != Mutant::JoinKeepsKeys => {
                node.has_key = false;
                self.destroy_arriving(node);
            }
            Write::Stub { epoch, .. } if node.slot.record.token == Token::Owned(epoch) && !node.is_erased() => {
                node.log.push(ERASE);
                node.keys |= 1 << ERASE;
                node.slot.record.content = node.log.content();
                let log = node.log;
                world.observe(log);
            }
            Write::Finish { .. } => node.is_finished = true,
            Write::Destroy { .. } | Write::DestroyAll | Write::Stub { .. } => {}
        }
    }

    fn destroy_arriving(&self, node: &mut Node) {
        node.staged_has_key = false;
        if let Some((_, _, has_key)) = &mut node.chunks {
            *has_key = false;
        }
    }

    /// Whoever serves a slot goes on with the erasures that it finds.
    fn serve(&self, world: &mut World, n: u8) {
        let node = &world.nodes[usize::from(n)];
        let calls = node.tombstones.calls_for(LIFE, node.is_erased(), node.is_finished);
        if self.erases && node.serves() && calls && self.mutant != Mutant::ErasureLeft {
            self.begin_erasure(world, n);
        }
    }

    fn crash(&self, world: &mut World, n: u8) {
        world.writes_left = None;
        self.forget(&mut world.nodes[usize::from(n)]);
        self.serve(world, n);
        world.crashes += 1;
    }

    /// Begins an attempt if there is none, and says which one it is.
    fn attempt(&self, world: &mut World, n: u8, to: u8) -> Option<(TransferId, DiskId)> {
        let to = world.nodes[usize::from(to)].own();
        if world.nodes[usize::from(n)].slot.out.is_none() {
            let name = match (self.mutant, world.nodes[usize::from(n)].slot.record.token) {
                (Mutant::TransferDerived, Token::Owned(epoch)) => transfer(epoch.counter as u8),
                _ => transfer(world.attempts),
            };
            self.put(world, n, Input::Start { to, transfer: name });
            world.nodes[usize::from(n)].copied = 0;
            world.attempts += 1;
        }
        let out = world.nodes[usize::from(n)].slot.out?;
        (out.to == to && out.phase == Phase::Copying).then_some((out.transfer, to))
    }

    fn copy(&self, world: &mut World, n: u8, to: u8) -> Option<()> {
        let (transfer, to) = self.attempt(world, n, to)?;
        let node = &mut world.nodes[usize::from(n)];
        let mut log = node.log;
        if self.mutant == Mutant::UncommittedCopied {
            node.queue.commands().for_each(|command| log.push(command));
        }
        if log.len() <= node.copied {
            return None;
        }
        node.copied = log.len();
        let (from, has_key) = (node.own(), node.has_key);
        world.put_in(Packet::Chunk { transfer, from, to, log, has_key });
        Some(())
    }

    fn seal(&self, world: &mut World, n: u8, to: u8) -> Option<()> {
        self.attempt(world, n, to)?;
        let node = &world.nodes[usize::from(n)];
        let drains = !matches!(self.mutant, Mutant::NoDrain | Mutant::NoDrainNoTokenInAppend);
        if drains && !node.queue.is_empty() {
            return None;
        }
        let content = node.log.content();
        self.put(world, n, Input::Seal);
        self.put(world, n, Input::Drained(content));
        Some(())
    }

    fn deliver(&self, world: &mut World, packet: &Packet) -> Option<()> {
        let to = packet.to();
        // Another disk is there by now, or none.
        let n = node_of(to) as u8;
        let node = &mut world.nodes[usize::from(n)];
        if node.own() != to || node.has_promised_too_early() {
            return None;
        }
        match *packet {
            Packet::Chunk { transfer, from, log, has_key, .. } => {
                let has_key = has_key && node.tombstones.lets_in(LIFE.key_id, self.safeguards);
                if !node.slot.accepts_rows(&node.disks, from, transfer, self.safeguards) {
                    return None;
                }
                if node.slot.record.staged.is_some_and(|staged| staged.transfer == transfer) {
                    // Only with its safeguard off.
                    node.staged_log = log;
                    return Some(());
                }
                match node.chunks {
                    Some((other, _, _)) if other > transfer => return None,
                    Some((other, had, _)) if other == transfer && had.len() >= log.len() => return None,
                    Some((other, _, had)) if other == transfer => node.chunks = Some((transfer, log, had || has_key)),
                    _ => node.chunks = Some((transfer, log, has_key)),
                }
            }
            Packet::Message { envelope, base, log, has_key, is_finished } => {
                let found = match envelope.message {
                    Message::Prepare { transfer, .. } => self.install(node, transfer, base, log),
                    _ => None,
                };
                let came_ahead = match (envelope.message, node.chunks) {
                    (Message::Prepare { transfer, .. }, Some((other, _, has_key))) => transfer == other && has_key,
                    _ => false,
                };
                let (before, copy) = (node.slot.record.staged, found);
                self.put(world, n, Input::Message { envelope, found: copy.map(Log::content) });
                let node = &mut world.nodes[usize::from(n)];
                // What was prepared is the copy that was found.
                if let (Some(staged), Some(copy)) = (pending_stage(node), copy)
                    && Some(staged) != before
                {
                    let erased = copy.has(ERASE).then_some(LIFE);
                    for write in node.tombstones.of_copy(erased, self.safeguards) {
                        node.tombstones.committed(&write);
                    }
                    node.staged_log = copy;
                    let is_let_in = node.tombstones.lets_in(LIFE.key_id, self.safeguards);
                    node.staged_has_key = is_let_in && (has_key || came_ahead);
                    node.staged_is_finished = is_finished;
                    node.chunks = None;
                }
            }
            Packet::Erasure(envelope) => match envelope.message {
                erasure::Message::Shred(_) => {
                    let plan = node.tombstones.shred(&node.disks, envelope, self.safeguards);
                    self.carry_out(world, n, &plan);
                }
                erasure::Message::Shredded(_) => {
                    let from = match self.mutant {
                        Mutant::AnswerOfTheNode => world.nodes[node_of(envelope.from)].own(),
                        _ => envelope.from,
                    };
                    self.erase(world, n, erasure::Input::Message(erasure::Envelope { from, ..envelope }));
                }
            },
            Packet::JoinRequest { new, .. } => {
                let replaced = (0..new.0[1]).map(|generation| disk(new.0[0], generation)).collect::<Vec<_>>();
                node.disks.admit(new, None, self.safeguards);
                replaced.into_iter().for_each(|old| node.disks.admit(new, Some(old), self.safeguards));
                let (from, answer) = (node.own(), node.disks.answer(node.slot.record.floor, &node.tombstones));
                world.put_in(Packet::JoinAnswer { from, to: new, answer });
            }
            Packet::JoinAnswer { from, ref answer, .. } => {
                let mut disks = node.disks.clone();
                let writes = node.join.answered(&mut disks, &node.tombstones, from, answer, self.safeguards);
                let plan = erasure::Plan { writes, ..erasure::Plan::default() };
                if !self.carry_out(world, n, &plan) {
                    return Some(());
                }
                let node = &mut world.nodes[usize::from(n)];
                if self.safeguards.has(Safeguard::JoinFloors) && !node.disks.is_active() {
                    node.slot.record.floor = node.slot.record.floor.max(answer.floor);
                }
                node.disks = disks;
            }
        }
        Some(())
    }

    /// The rows that came with a preparation, behind those that came ahead: the whole copy, if there is one.
    fn install(&self, node: &Node, transfer: TransferId, base: u8, log: Log) -> Option<Log> {
        let ahead = node.chunks.filter(|(other, ..)| *other == transfer).map(|(_, log, _)| log).unwrap_or_default();
        let mut copy = ahead.first(base);
        if copy.len() < base {
            return None;
        }
        log.commands().skip(usize::from(base)).for_each(|command| copy.push(command));
        Some(copy)
    }

    /// Puts an input into the rules, and does what follows.
    fn put(&self, world: &mut World, n: u8, input: Input) {
        let node = &mut world.nodes[usize::from(n)];
        if node.has_promised_too_early() {
            return;
        }
        let Plan { txn, now, on_commit } = node.slot.step(&node.disks, input, self.safeguards);
        let is_promised = now.iter().any(|effect| is_promise(effect, txn.as_ref()));
        match txn {
            Some(txn) if matches!(txn, Txn::Release { .. }) || is_promised => {
                node.pending = Some(Pending { txn, then: on_commit });
                self.effects(world, n, &now);
            }
            Some(txn) => {
                self.effects(world, n, &now);
                if world.nodes[usize::from(n)].slot.record.allows(&txn) {
                    self.write(world, n, &txn);
                    self.effects(world, n, &on_commit);
                }
            }
            None => self.effects(world, n, &now),
        }
    }

    fn effects(&self, world: &mut World, n: u8, effects: &[Effect]) {
        for effect in effects {
            match *effect {
                Effect::Send(envelope) => self.send(world, n, envelope),
                Effect::Alarm(_) => world.is_alarmed = true,
                // Requests and copies are actions of their own here.
                Effect::Copy(..) | Effect::Park | Effect::Unpark | Effect::Forward(_) | Effect::StopReads => {}
                Effect::Serve => self.serve(world, n),
            }
        }
    }

    fn send(&self, world: &mut World, n: u8, envelope: Envelope) {
        let node = &world.nodes[usize::from(n)];
        match envelope.message {
            // Asked at once, and answered from what is so now.
            Message::Status { .. } => {
                let other = node_of(envelope.to) as u8;
                if world.nodes[usize::from(other)].own() == envelope.to {
                    self.put(world, other, Input::Message { envelope, found: None });
                }
            }
            // The giver may prepare again with everything at any time.
            Message::NeedRows { .. } => {}
            Message::Prepare { .. } => {
                let (base, log) = (node.copied.min(node.log.len()), node.log);
                let (has_key, is_finished) = (node.has_key, node.is_finished);
                world.put_in(Packet::Message { envelope, base, log, has_key, is_finished });
            }
            _ => {
                world.put_in(Packet::without_rows(envelope));
            }
        }
    }

    /// A transaction with its effects on the rows.
    fn write(&self, world: &mut World, n: u8, txn: &Txn) {
        let node = &mut world.nodes[usize::from(n)];
        node.slot.committed(txn);
        match *txn {
            Txn::Take { transfer, .. } => {
                node.log = std::mem::take(&mut node.staged_log);
                node.has_key = std::mem::take(&mut node.staged_has_key);
                node.is_finished = std::mem::take(&mut node.staged_is_finished);
                node.keys = if self.mutant == Mutant::KeysNotMoved { 0 } else { node.log.set() };
                (node.chunks, node.queue) = (None, Log::default());
                world.taken |= 1 << transfer.0[0];
            }
            Txn::ConfirmTaken { .. } => {
                (node.log, node.keys) = (Log::default(), 0);
                (node.has_key, node.is_finished) = (false, false);
            }
            Txn::Release { .. } => {
                node.erasure = None;
                if self.mutant == Mutant::RowsDeletedAtRelease {
                    (node.log, node.keys) = (Log::default(), 0);
                    node.slot.record.content = Content::default();
                }
            }
            Txn::DropStaged { .. } => self.drop_staged(node),
            Txn::Raise { .. } | Txn::Stage(_) => {}
        }
    }

    fn drop_staged(&self, node: &mut Node) {
        node.staged_log = Log::default();
        (node.staged_has_key, node.staged_is_finished) = (false, false);
    }

    fn committed(&self, world: &mut World, n: u8) -> Option<()> {
        let node = &mut world.nodes[usize::from(n)];
        let Pending { txn, then } = node.pending.take()?;
        let is_release = matches!(txn, Txn::Release { .. });
        let is_committed = node.slot.record.allows(&txn);
        if is_committed {
            self.write(world, n, &txn);
        }
        if is_release {
            self.put(world, n, Input::Released { is_committed });
        }
        if is_committed {
            self.effects(world, n, &then);
        }
        Some(())
    }

    /// What is not durable.
    fn forget(&self, node: &mut Node) {
        node.slot = Handoff::boot(node.slot.record);
        (node.queue, node.pending, node.copied, node.join) = (Log::default(), None, 0, Join::default());
        node.erasure = None;
        if self.mutant == Mutant::KeysInMemory {
            node.keys = 0;
        }
        if node.slot.record.staged.is_none() {
            self.drop_staged(node);
        }
    }

    fn restore(&self, world: &mut World, n: u8) {
        let node = &world.nodes[usize::from(n)];
        // Whoever has the say has lost what came after the backup.
        let has_say = world.authorities().any(|other| other.own() == node.own());
        world.is_lossy |= has_say;
        let node = &mut world.nodes[usize::from(n)];
        let is_same = self.mutant == Mutant::SameDisk;
        if !is_same {
            node.generation += 1;
        }
        let own = disk(n, node.generation);
        let others: Vec<DiskId> = node.disks.members().filter(|other| *other != node.own()).collect();
        let retired: BTreeSet<DiskId> = node.disks.retired().collect();
        let mut disks = Disks::joiner(own, others.iter().copied());
        disks.merge(&BTreeSet::new(), &retired, &BTreeSet::new());
        match node.backup.take() {
            Some(backup) if !self.is_wiped => {
                (node.log, node.keys, node.staged_log) = (backup.log, backup.keys, backup.staged_log);
                node.tombstones = backup.tombstones;
                (node.has_key, node.is_finished) = (backup.has_key, backup.is_finished);
                node.slot.record = match self.mutant {
                    // It has forgotten what it promised since.
                    Mutant::SameDisk => {
                        disks = backup.disks;
                        backup.record
                    }
                    Mutant::RestoreOwns => SlotRecord { staged: None, ..backup.record },
                    _ => SlotRecord { token: Token::None, staged: None, ..backup.record },
                };
            }
            _ => {
                (node.log, node.keys, node.staged_log) = (Log::default(), 0, Log::default());
                node.tombstones = Tombstones::default();
                (node.has_key, node.is_finished) = (false, false);
                node.slot.record = SlotRecord::NONE;
                if is_same {
                    disks = node.disks.clone();
                }
            }
        }
        node.disks = disks;
        node.chunks = None;
        self.forget(node);
        world.restores += 1;
    }

    fn mutate(&self, world: &mut World, n: u8) -> Option<()> {
        let node = &mut world.nodes[usize::from(n)];
        let is_begun = node.erasure.is_some() && !node.is_erased();
        let record = &mut node.slot.record;
        match (self.mutant, record.token) {
            (Mutant::ServesAfterRelease, Token::Released { epoch, is_taken: false, .. }) => {
                let epoch = Epoch { counter: epoch.counter + 1, ..epoch };
                (record.token, record.floor) = (Token::Owned(epoch), epoch);
            }
            (Mutant::PointerDeleted, Token::Released { is_taken: true, .. }) => {
                *record = SlotRecord { staged: record.staged, ..SlotRecord::NONE };
            }
            (Mutant::StagedDropped, _) => {
                record.staged.take()?;
            }
            (Mutant::GrantPresumed, _) => {
                let Staged { transfer, epoch, .. } = record.staged?;
                self.write(world, n, &Txn::Take { transfer, epoch });
            }
            (Mutant::SealIgnoresErasure, Token::Owned(epoch)) if is_begun => {
                self.write_erasure(world, n, &Write::Stub { tombstone: LIFE, epoch });
                self.erase(world, n, erasure::Input::Begun);
            }
            _ => return None,
        }
        Some(())
    }
}

/// Whether it says what the transaction has yet to make true.
fn is_promise(effect: &Effect, txn: Option<&Txn>) -> bool {
    let Effect::Send(Envelope { message, .. }) = effect else { return false };
    matches!(
        (message, txn),
        (Message::Ready { .. }, Some(Txn::Stage(_))) | (Message::Taken { .. }, Some(Txn::Take { .. }))
    )
}

/// The copy that is prepared, or about to be.
fn pending_stage(node: &Node) -> Option<Staged> {
    match node.pending.as_ref().map(|pending| pending.txn) {
        Some(Txn::Stage(staged)) => Some(staged),
        _ => node.slot.record.staged,
    }
}
