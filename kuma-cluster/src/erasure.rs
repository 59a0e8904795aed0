//! The erasure of one life of an entity, on every disk.
//!
//! Every disk holds its tombstone and has destroyed its key, in whatever copy, and only then it is said to be done.
//!
//! ```text
//!   the owner of the slot                              every other disk that is there
//!   Begin ──► tombstone, key, rows: durable
//!   Begun ──────────── Shred ─────────────────────────► tombstone, key in every copy: durable
//!             answered, by disk ◄──── Shredded ─────────┘
//!             all have ──► Finish: durable ──► Done
//! ```
//!
//! Invariants:
//! - When it is done no disk that takes part has the key: not in the slot, not in a copy that it gave away or has prepared, not in what came ahead.
//! - A tombstone is never taken back. It names the key, so that it does not stop the entity's next life.
//! - No copy brings a key to a disk that holds its tombstone.
//! - An answer is the answer of one disk. Answers are forgotten in a crash and at a handoff: whoever owns the slot then asks anew.
//! - A key ends after its tombstone is durable, so that nothing is unreadable and nobody knows why.
//!
//! What carries it out makes four promises:
//! - Writes are durable in their order, each before the next; what is `on_commit` is done after the last one, and only then.
//! - An erasure that has begun counts as a write on its way: the seal of a handoff waits for it.
//! - Before a disk serves a slot, after a start or a take, it begins what [`Tombstones::calls_for`] says.
//! - Before [`Txn::Stage`](crate::Txn::Stage) it writes what [`Tombstones::of_copy`] says.

use std::collections::{BTreeMap, BTreeSet};

use kuma_core::{DiskId, EntityHash, Epoch};
use serde::{Deserialize, Serialize};

use crate::{
    disks::Disks,
    handoff::{Handoff, Safeguard, Safeguards},
};

/// The name of a key, and with it of one life: 16 random bytes.
pub type KeyId = [u8; 16];

/// That a life is erased, or will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tombstone {
    /// The key that is destroyed.
    pub key_id: KeyId,
    /// Whose life it was.
    pub id_hash: EntityHash,
}

/// All tombstones that a disk holds, of all slots; durable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tombstones {
    by_key: BTreeMap<KeyId, EntityHash>,
}

/// A message between two disks, about one life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Envelope {
    /// The disk that sends it.
    pub from: DiskId,
    /// The disk that it is for.
    pub to: DiskId,
    /// What it says.
    pub message: Message,
}

/// What two disks say of an erasure to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Message {
    /// Owner: hold this tombstone, destroy the key, and say so.
    Shred(Tombstone),
    /// The other one: done, durably.
    Shredded(Tombstone),
}

/// One durable write. Each can be done again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Write {
    /// The tombstone is kept, for the whole node.
    Entomb(Tombstone),
    /// The key is destroyed in every copy that is here, one that is no slot's any more too, and the logs that may have its bytes are cut.
    Destroy {
        /// The key.
        key_id: KeyId,
        /// In a copy that was given away. Always; without it is how a test shows what it is for.
        in_released: bool,
        /// In a prepared copy, and in what came ahead of one. Always, as above.
        in_staged: bool,
    },
    /// The same, for the keys of all tombstones that are held.
    DestroyAll,
    /// The rows become stubs, if the token is owned under this epoch; if not, nothing that comes after it is done.
    Stub {
        /// The life.
        tombstone: Tombstone,
        /// Under which the slot is owned.
        epoch: Epoch,
    },
    /// The erasure is finished, and its receipt made.
    Finish {
        /// The life.
        tombstone: Tombstone,
        /// Disks that somebody attested as destroyed and that have not answered. The receipt names them.
        without: BTreeSet<DiskId>,
    },
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Whoever asked is told that it will be done, whatever happens.
    Accept,
    /// A message goes out.
    Send(Envelope),
    /// Whoever asked is told that it is done. The job is over.
    Done,
}

/// What follows from an input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Plan {
    /// To be made durable, one after the other.
    pub writes: Vec<Write>,
    /// To be done at once.
    pub now: Vec<Effect>,
    /// To be done when all of it is durable, and only then.
    pub on_commit: Vec<Effect>,
}

/// What happens to an erasure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// It was asked for, or found unfinished. Like any write it is parked while the slot is sealed.
    Begin,
    /// What [`Input::Begin`] has planned is durable.
    Begun,
    /// It is time to ask again, or other disks are there.
    Remind,
    /// A message has come.
    Message(Envelope),
}

/// The erasure of one life, at the owner of its slot; lost in a crash, and dropped when the slot is released.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Erasure {
    tombstone: Tombstone,
    /// Its own writes are on their way, or durable.
    has_begun: bool,
    /// Disks that have no key any more, its own one too.
    answered: BTreeSet<DiskId>,
}

impl Erasure {
    /// Of this life. To be followed by [`Input::Begin`].
    pub fn new(tombstone: Tombstone) -> Self {
        Erasure { tombstone, has_begun: false, answered: BTreeSet::new() }
    }

    /// The life.
    pub fn tombstone(&self) -> Tombstone {
        self.tombstone
    }

    /// Disks that it waits for. One that has joined meanwhile is among them, and one that was replaced or destroyed is not.
    pub fn missing(&self, disks: &Disks) -> impl Iterator<Item = DiskId> {
        disks.members().filter(|disk| !self.answered.contains(disk))
    }

    /// Takes an input. Whoever does not own the slot does nothing: the job is the owner's. Nor is anything done while the slot is sealed and the job
    /// has not begun: the plan is empty, and the job to be parked.
    pub fn step(&mut self, slot: &Handoff, disks: &Disks, input: Input, safeguards: Safeguards) -> Plan {
        let Some(epoch) = slot.record.owned().filter(|_| disks.is_active()) else { return Plan::default() };
        match input {
            Input::Begin if slot.may_write() => self.begin(epoch, safeguards),
            Input::Begin => Plan::default(),
            _ if !self.has_begun => Plan::default(),
            Input::Begun => {
                self.answered.insert(disks.own());
                self.ask(disks, safeguards)
            }
            Input::Remind => self.ask(disks, safeguards),
            Input::Message(Envelope { from, to, message }) => {
                let is_answer = message == Message::Shredded(self.tombstone) && to == disks.own() && from != to;
                if !is_answer || !disks.is_there(from) || !self.answered.insert(from) {
                    return Plan::default();
                }
                self.finish(disks, safeguards).unwrap_or_default()
            }
        }
    }

    fn begin(&mut self, epoch: Epoch, safeguards: Safeguards) -> Plan {
        self.has_begun = true;
        let tombstone = self.tombstone;
        let mut writes = Vec::from([Write::Entomb(tombstone), tombstone.destroy(safeguards)]);
        if !safeguards.has(Safeguard::TombstoneBeforeKey) {
            writes.reverse();
        }
        writes.push(Write::Stub { tombstone, epoch });
        Plan { writes, on_commit: Vec::from([Effect::Accept]), ..Plan::default() }
    }

    fn ask(&self, disks: &Disks, safeguards: Safeguards) -> Plan {
        if let Some(plan) = self.finish(disks, safeguards) {
            return plan;
        }
        let own = disks.own();
        let message = Message::Shred(self.tombstone);
        // Its own writes may have failed, and be made again.
        let others = self.missing(disks).filter(|to| *to != own);
        Plan { now: others.map(|to| Effect::Send(Envelope { from: own, to, message })).collect(), ..Plan::default() }
    }

    /// If nobody is waited for.
    fn finish(&self, disks: &Disks, safeguards: Safeguards) -> Option<Plan> {
        let waits = match safeguards.has(Safeguard::ErasedOnEveryDisk) {
            true => self.missing(disks).next().is_some(),
            false => !self.answered.contains(&disks.own()),
        };
        if waits {
            return None;
        }
        let without = disks.removed().filter(|disk| !self.answered.contains(disk)).collect();
        let writes = Vec::from([Write::Finish { tombstone: self.tombstone, without }]);
        Some(Plan { writes, on_commit: Vec::from([Effect::Done]), ..Plan::default() })
    }
}

impl Tombstone {
    fn destroy(self, safeguards: Safeguards) -> Write {
        Write::Destroy {
            key_id: self.key_id,
            in_released: safeguards.has(Safeguard::ShredReachesReleased),
            in_staged: safeguards.has(Safeguard::ShredReachesStaged),
        }
    }
}

impl Tombstones {
    /// Whether the life of this key is erased, or will be.
    pub fn has(&self, key_id: KeyId) -> bool {
        self.by_key.contains_key(&key_id)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Tombstone> {
        self.by_key.iter().map(|(key_id, id_hash)| Tombstone { key_id: *key_id, id_hash: *id_hash })
    }

    /// Whether a key that comes with rows, or with a preparation, is kept (R1); the rows are kept anyway. To be asked in the transaction that keeps
    /// it, or with no [`Write::Entomb`] in between. A take asks no more: what is staged was asked for, and [`Write::Destroy`] reaches it.
    pub fn lets_in(&self, key_id: KeyId, safeguards: Safeguards) -> bool {
        !self.has(key_id) || !safeguards.has(Safeguard::TombstoneKeepsKeyOut)
    }

    /// What is to be durable before a copy is staged that was read back and is whole: the tombstone of each life that is erased in it (R7).
    /// Then the take needs no other file than the slot's.
    pub fn of_copy(&self, erased: impl IntoIterator<Item = Tombstone>, safeguards: Safeguards) -> Vec<Write> {
        let new = erased.into_iter().filter(|tombstone| !self.has(tombstone.key_id));
        new.filter(|_| safeguards.has(Safeguard::CopyBringsTombstones)).map(Write::Entomb).collect()
    }

    /// Whether the owner of a slot begins the erasure of a life that it finds in its copy: its rows are stubs, but it is not known to be finished; or
    /// they are not, and the tombstone is here, because a crash has come after it, or a disk was lost and its last rows with it. That an erasure is
    /// finished may be marked beside the rows, and move with them: all who were there had answered, and who came later was told when it joined.
    pub fn calls_for(&self, life: Tombstone, is_stub: bool, is_finished: bool) -> bool {
        match is_stub {
            true => !is_finished,
            false => self.has(life.key_id),
        }
    }

    /// A disk's part in the erasure of another one. A disk that has not joined does not answer.
    pub fn shred(&self, disks: &Disks, envelope: Envelope, safeguards: Safeguards) -> Plan {
        let Envelope { from, to, message: Message::Shred(tombstone) } = envelope else { return Plan::default() };
        if to != disks.own() || from == to || !disks.is_there(from) || !disks.is_active() {
            return Plan::default();
        }
        let answer = Vec::from([Effect::Send(Envelope { from: to, to: from, message: Message::Shredded(tombstone) })]);
        // A tombstone may be there without the key having ended: a crash came between, or it came with a copy.
        if self.has(tombstone.key_id) && !safeguards.has(Safeguard::EachShredIsCarriedOut) {
            return Plan { now: answer, ..Plan::default() };
        }
        let mut writes = Vec::from([Write::Entomb(tombstone), tombstone.destroy(safeguards)]);
        if !safeguards.has(Safeguard::TombstoneBeforeKey) {
            writes.reverse();
        }
        match safeguards.has(Safeguard::ShreddedAfterCommit) {
            true => Plan { writes, on_commit: answer, ..Plan::default() },
            false => Plan { writes, now: answer, ..Plan::default() },
        }
    }

    /// What a new disk writes of an answer: the tombstones that it has not. Before it takes part all their keys end, of those that came with a backup too.
    pub(crate) fn joined(&self, told: &Tombstones, is_active: bool, safeguards: Safeguards) -> Vec<Write> {
        let new = told.iter().filter(|tombstone| !self.has(tombstone.key_id));
        let new = new.filter(|_| safeguards.has(Safeguard::JoinTombstones)).map(Write::Entomb);
        new.chain(is_active.then_some(Write::DestroyAll)).collect()
    }

    /// A write is durable.
    pub fn committed(&mut self, write: &Write) {
        if let Write::Entomb(Tombstone { key_id, id_hash }) = write {
            self.by_key.entry(*key_id).or_insert(*id_hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::{Content, Input as SlotInput, SlotRecord, TransferId};

    const LIFE: Tombstone = Tombstone { key_id: [1; 16], id_hash: EntityHash([9; 16]) };
    const NEXT_LIFE: Tombstone = Tombstone { key_id: [2; 16], ..LIFE };

    fn disk(n: u8) -> DiskId {
        DiskId([n; 16])
    }

    /// The first disk, which owns the slot, and so many others.
    fn owner(others: u8) -> (Handoff, Disks) {
        let mut disks = Disks::founder(disk(0));
        (1..=others).for_each(|n| disks.admit(disk(n), None, Safeguards::ALL));
        (Handoff::boot(SlotRecord::founded(Content::default())), disks)
    }

    fn message(from: u8, to: u8, message: Message) -> Envelope {
        Envelope { from: disk(from), to: disk(to), message }
    }

    fn shredded(from: u8) -> Input {
        Input::Message(message(from, 0, Message::Shredded(LIFE)))
    }

    fn is_done(plan: &Plan) -> bool {
        plan.on_commit.contains(&Effect::Done)
    }

    fn shred(to: u8) -> Effect {
        Effect::Send(message(0, to, Message::Shred(LIFE)))
    }

    fn entombed() -> Tombstones {
        let mut tombstones = Tombstones::default();
        tombstones.committed(&Write::Entomb(LIFE));
        tombstones
    }

    #[test]
    fn an_erasure_is_accepted_when_it_is_durable_and_done_when_all_have_answered() {
        let (slot, disks) = owner(2);
        let mut erasure = Erasure::new(LIFE);
        let begin = erasure.step(&slot, &disks, Input::Begin, Safeguards::ALL);
        let destroy = Write::Destroy { key_id: LIFE.key_id, in_released: true, in_staged: true };
        let stub = Write::Stub { tombstone: LIFE, epoch: Epoch::FIRST };
        assert_eq!(begin.writes, [Write::Entomb(LIFE), destroy, stub]);
        assert_eq!((begin.now.as_slice(), begin.on_commit.as_slice()), ([].as_slice(), [Effect::Accept].as_slice()));
        assert_eq!(erasure.step(&slot, &disks, Input::Begun, Safeguards::ALL).now, [shred(1), shred(2)]);
        assert!(!is_done(&erasure.step(&slot, &disks, shredded(1), Safeguards::ALL)));
        assert!(!is_done(&erasure.step(&slot, &disks, shredded(1), Safeguards::ALL)), "an answer counts once");
        assert_eq!(erasure.step(&slot, &disks, Input::Remind, Safeguards::ALL).now, [shred(2)]);
        let end = erasure.step(&slot, &disks, shredded(2), Safeguards::ALL);
        assert_eq!(end.writes, [Write::Finish { tombstone: LIFE, without: BTreeSet::new() }]);
        assert!(is_done(&end) && end.now.is_empty());
    }

    #[test]
    fn the_only_node_waits_for_nobody() {
        let (slot, disks) = owner(0);
        let mut erasure = Erasure::new(LIFE);
        erasure.step(&slot, &disks, Input::Begin, Safeguards::ALL);
        assert!(!is_done(&erasure.step(&slot, &disks, shredded(0), Safeguards::ALL)), "not by its own word");
        assert!(is_done(&erasure.step(&slot, &disks, Input::Begun, Safeguards::ALL)));
    }

    #[test]
    fn a_disk_that_has_come_is_asked_and_one_that_has_gone_is_not_waited_for() {
        let (slot, mut disks) = owner(3);
        let mut erasure = Erasure::new(LIFE);
        erasure.step(&slot, &disks, Input::Begin, Safeguards::ALL);
        erasure.step(&slot, &disks, Input::Begun, Safeguards::ALL);
        erasure.step(&slot, &disks, shredded(1), Safeguards::ALL);
        // The first one is replaced after its answer: the answer was the old disk's.
        disks.admit(disk(11), Some(disk(1)), Safeguards::ALL);
        disks.admit(disk(4), None, Safeguards::ALL);
        assert_eq!(erasure.missing(&disks).collect::<Vec<_>>(), [disk(2), disk(3), disk(4), disk(11)]);
        erasure.step(&slot, &disks, shredded(2), Safeguards::ALL);
        erasure.step(&slot, &disks, shredded(11), Safeguards::ALL);
        assert!(!is_done(&erasure.step(&slot, &disks, shredded(4), Safeguards::ALL)), "the third one is down");
        let none = BTreeSet::new();
        disks.merge(&none, &none, &BTreeSet::from([disk(2), disk(3)]));
        let end = erasure.step(&slot, &disks, Input::Remind, Safeguards::ALL);
        let without = BTreeSet::from([disk(3)]);
        assert_eq!(end.writes, [Write::Finish { tombstone: LIFE, without }], "the second one has answered before");
    }

    #[test]
    fn an_erasure_is_parked_while_the_slot_is_sealed_and_is_the_owners() {
        let (mut slot, disks) = owner(1);
        let mut erasure = Erasure::new(LIFE);
        slot.step(&disks, SlotInput::Start { to: disk(1), transfer: TransferId([1; 16]) }, Safeguards::ALL);
        slot.step(&disks, SlotInput::Seal, Safeguards::ALL);
        assert_eq!(erasure.step(&slot, &disks, Input::Begin, Safeguards::ALL), Plan::default());
        assert_eq!(erasure.step(&slot, &disks, Input::Begun, Safeguards::ALL), Plan::default(), "it has not begun");
        slot.step(&disks, SlotInput::Abort, Safeguards::ALL);
        assert!(!erasure.step(&slot, &disks, Input::Begin, Safeguards::ALL).writes.is_empty());
        slot.record = SlotRecord::NONE;
        assert_eq!(erasure.step(&slot, &disks, Input::Begun, Safeguards::ALL), Plan::default());
    }

    #[test]
    fn a_disk_answers_when_the_key_has_ended_and_each_time_anew() {
        let mut disks = Disks::founder(disk(1));
        disks.admit(disk(0), None, Safeguards::ALL);
        let mut tombstones = Tombstones::default();
        for _ in 0..2 {
            let plan = tombstones.shred(&disks, message(0, 1, Message::Shred(LIFE)), Safeguards::ALL);
            assert!(matches!(plan.writes.as_slice(), [Write::Entomb(_), Write::Destroy { .. }]) && plan.now.is_empty());
            assert_eq!(plan.on_commit, [Effect::Send(message(1, 0, Message::Shredded(LIFE)))]);
            plan.writes.iter().for_each(|write| tombstones.committed(write));
        }
        assert_eq!(tombstones.iter().collect::<Vec<_>>(), [LIFE]);
        let nothing = |disks: &Disks, envelope| tombstones.shred(disks, envelope, Safeguards::ALL) == Plan::default();
        assert!(nothing(&disks, message(7, 1, Message::Shred(LIFE))), "from a stranger");
        assert!(nothing(&disks, message(0, 2, Message::Shred(LIFE))), "for another disk");
        assert!(nothing(&Disks::joiner(disk(1), [disk(0)]), message(0, 1, Message::Shred(LIFE))), "not yet joined");
    }

    #[test]
    fn a_tombstone_stops_its_own_life_only() {
        let tombstones = entombed();
        assert!(!tombstones.lets_in(LIFE.key_id, Safeguards::ALL));
        assert!(tombstones.lets_in(NEXT_LIFE.key_id, Safeguards::ALL), "the entity was made anew");
        assert_eq!(tombstones.of_copy([LIFE, NEXT_LIFE], Safeguards::ALL), [Write::Entomb(NEXT_LIFE)]);
    }

    #[test]
    fn whoever_serves_a_slot_goes_on_with_what_is_not_finished() {
        let (none, tombstones) = (Tombstones::default(), entombed());
        assert!(none.calls_for(LIFE, true, false), "erased by an owner before");
        assert!(!tombstones.calls_for(LIFE, true, true), "finished");
        assert!(tombstones.calls_for(LIFE, false, false), "a crash came before the rows");
        assert!(!tombstones.calls_for(NEXT_LIFE, false, false), "alive");
    }
}
