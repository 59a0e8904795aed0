//! The handoff of one slot, as one disk sees it: state and input in, transactions, messages and effects out.
//!
//! The giver alone decides, in one transaction of its own disk:
//!
//! ```text
//!         giver                                              receiver
//!   OWNED(e) ── start ──► Copying ── seal ──► Sealing ── drained ──► Sealed
//!                            │                                         │ Prepare ──────► copy read back, digest equal
//!                            │◄── abort, alone, at any time ───────────┤                  STAGED(t), durable
//!                            ▼                                         │◄────── Ready ────┘
//!                        OWNED(e)                                  Releasing                  not to be dropped by itself
//!                                                                      │ commit: THE DECISION
//!                                                              RELEASED(e+1, t)
//!                                                                      │ Grant ─────────► OWNED(e+1), durable: serves
//!                                                    keys destroyed ◄──┴────── Taken ─────┘
//! ```
//!
//! Invariants:
//! - At most one disk is owned and able to serve; exactly one has the say: the owner, or the giver whose grant was not taken.
//! - What is released is staged at its target, complete and durable.
//! - A message that promises something ([`Message::Ready`], [`Message::Grant`], [`Message::Taken`]) leaves after the commit that it speaks of.
//! - The absence of a record is no ownership, and no clock is read: every input may come twice, late, in another order, or never.
//! - While a transaction of a slot is on its way nothing else is put in, except while releasing.

mod giver;
mod receiver;
mod safeguards;

pub use kuma_core::{Content, SlotRecord, Staged, Token, TransferId, Txn};
use kuma_core::{DiskId, Epoch};
pub use safeguards::{Safeguard, Safeguards};
use serde::{Deserialize, Serialize};

use crate::disks::Disks;

/// A message between two disks, about one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Envelope {
    /// The disk that sends it.
    pub from: DiskId,
    /// The disk that it is for.
    pub to: DiskId,
    /// What it says.
    pub message: Message,
}

/// What two disks say of a slot to each other. Rows travel beside: in chunks while the giver copies, and the rest with [`Message::Prepare`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Message {
    /// Giver: this is all; check it, keep it, and say so.
    Prepare {
        /// The attempt.
        transfer: TransferId,
        /// Under which the receiver would own the slot.
        epoch: Epoch,
        /// What a whole copy holds.
        content: Content,
    },
    /// Receiver: rows are missing, or the digest is another one; send them again.
    NeedRows {
        /// The attempt.
        transfer: TransferId,
    },
    /// Receiver: a whole copy is on this disk, read back from it.
    Ready {
        /// The attempt.
        transfer: TransferId,
        /// What was read back.
        content: Content,
    },
    /// Receiver: it knows an epoch as high as that one, of a vote that came to nothing maybe.
    Behind {
        /// The attempt.
        transfer: TransferId,
        /// The highest epoch that it knows.
        floor: Epoch,
    },
    /// Giver: this attempt is over, and was not decided.
    Abort {
        /// The attempt.
        transfer: TransferId,
    },
    /// Receiver: what became of this attempt?
    Status {
        /// The attempt.
        transfer: TransferId,
    },
    /// Giver: the slot is the receiver's.
    Grant {
        /// The attempt.
        transfer: TransferId,
        /// Under which the receiver owns the slot from now on.
        epoch: Epoch,
    },
    /// Receiver: it owns the slot, durably.
    Taken {
        /// The attempt.
        transfer: TransferId,
    },
    /// Receiver: it was granted what it does not have. Cannot happen, and heals by itself.
    NeedData {
        /// The attempt.
        transfer: TransferId,
    },
    /// Whoever owns the slot, to everybody: evidence, never authority.
    OwnerIs {
        /// Under which it owns the slot.
        epoch: Epoch,
    },
}

/// How far an attempt is, at the giver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Rows that are committed are copied; everything is served.
    Copying,
    /// Writes are parked, and those that are on their way are awaited.
    Sealing,
    /// Nothing is on its way any more. Strong reads are served.
    Sealed(Content),
    /// The decision is with the writer of the shard, and cannot be called back.
    Releasing(Content),
}

/// The one attempt that an owner works at; lost in a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Out {
    /// The attempt.
    pub transfer: TransferId,
    /// To whom.
    pub to: DiskId,
    /// How far it is.
    pub phase: Phase,
}

/// What happens to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// It is wished that the slot moves (G1).
    Start {
        /// To whom.
        to: DiskId,
        /// A new name of the attempt.
        transfer: TransferId,
    },
    /// The copy has nearly caught up (G2).
    Seal,
    /// All writes that were on their way are committed or refused, and the actors of the slot have stopped (G2).
    Drained(Content),
    /// A timeout, another wish, an operator, a target that is gone (G3).
    Abort,
    /// Of the transaction [`Txn::Release`]: it was committed, or its guard did not hold and nothing was written (G4').
    Released {
        /// Whether it was committed.
        is_committed: bool,
    },
    /// It is time to say again what has not been answered: a grant, a prepared copy's question, the preparation.
    Remind,
    /// A message has come. `found` is what the copy of [`Message::Prepare`] holds, read back from this node's own disk with the rows that came with
    /// it; none if there is none.
    Message {
        /// The message.
        envelope: Envelope,
        /// What was read back.
        found: Option<Content>,
    },
}

/// What follows from an input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Plan {
    /// To be committed by the writer of the shard, with its guard.
    pub txn: Option<Txn>,
    /// To be done at once.
    pub now: Vec<Effect>,
    /// To be done after the commit, and only then.
    pub on_commit: Vec<Effect>,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// A message goes out.
    Send(Envelope),
    /// Committed rows are copied under this attempt.
    Copy(TransferId, DiskId),
    /// Writes are parked; when those on their way are through and the actors have stopped, [`Input::Drained`].
    Park,
    /// Parked writes are done here.
    Unpark,
    /// Parked writes go to the new owner.
    Forward(DiskId),
    /// Strong reads are answered no more.
    StopReads,
    /// The slot is served from now on.
    Serve,
    /// A thing that cannot happen has happened.
    Alarm(&'static str),
}

/// A slot at one disk: its record, which is durable, and what a crash forgets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Handoff {
    /// As of the last commit.
    pub record: SlotRecord,
    /// The attempt that is worked at.
    pub out: Option<Out>,
}

impl Handoff {
    /// After a start: what was worked at is forgotten (G11).
    pub fn boot(record: SlotRecord) -> Self {
        Handoff { record, out: None }
    }

    /// Whether a write may be handed to the writer of the shard. It is refused there once more if the token is not owned any more.
    pub fn may_write(&self) -> bool {
        let is_open = self.out.is_none_or(|out| out.phase == Phase::Copying);
        matches!(self.record.token, Token::Owned(_)) && is_open
    }

    /// Whether a strong read may be answered.
    pub fn may_read(&self, safeguards: Safeguards) -> bool {
        match self.record.token {
            Token::Owned(_) => !matches!(self.out, Some(Out { phase: Phase::Releasing(_), .. })),
            Token::Released { .. } => !safeguards.has(Safeguard::ReadsEndWithRelease),
            Token::None => false,
        }
    }

    /// Whether rows of this attempt are taken (R1). What is staged is never changed. Of keys, [`crate::Tombstones::lets_in`] is asked as well.
    pub fn accepts_rows(&self, disks: &Disks, from: DiskId, transfer: TransferId, safeguards: Safeguards) -> bool {
        let is_staged = self.record.staged.is_some_and(|staged| staged.transfer == transfer);
        let is_receiver = disks.is_active() && disks.is_there(from) && !matches!(self.record.token, Token::Owned(_));
        is_receiver && (!is_staged || !safeguards.has(Safeguard::StagedIsKeptAsItIs))
    }

    /// Takes an input.
    pub fn step(&mut self, disks: &Disks, input: Input, safeguards: Safeguards) -> Plan {
        let mut step = Step { slot: self, disks, safeguards, plan: Plan::default() };
        match input {
            Input::Start { to, transfer } => step.start(to, transfer),
            Input::Seal => step.seal(),
            Input::Drained(content) => step.drained(content),
            Input::Abort => step.abort(),
            Input::Released { is_committed } => step.released(is_committed),
            Input::Remind => step.remind(),
            Input::Message { envelope, found } => step.message(envelope, found),
        }
        step.plan
    }

    /// A transaction was committed.
    pub fn committed(&mut self, txn: &Txn) {
        self.record.apply(txn);
    }
}

/// One step on its way.
struct Step<'a> {
    slot: &'a mut Handoff,
    disks: &'a Disks,
    safeguards: Safeguards,
    plan: Plan,
}

impl Step<'_> {
    fn has(&self, safeguard: Safeguard) -> bool {
        self.safeguards.has(safeguard)
    }

    fn envelope(&self, to: DiskId, message: Message) -> Effect {
        Effect::Send(Envelope { from: self.disks.own(), to, message })
    }

    fn send(&mut self, to: DiskId, message: Message) {
        let effect = self.envelope(to, message);
        self.plan.now.push(effect);
    }

    /// A promise: it leaves after the commit.
    fn promise(&mut self, safeguard: Safeguard, to: DiskId, message: Message) {
        let effect = self.envelope(to, message);
        match self.has(safeguard) {
            true => self.plan.on_commit.push(effect),
            false => self.plan.now.push(effect),
        }
    }

    fn message(&mut self, envelope: Envelope, found: Option<Content>) {
        let Envelope { from, to, message } = envelope;
        // Only between the very disks that it names.
        if to != self.disks.own() || from == to || !self.disks.is_there(from) {
            return;
        }
        // A disk that has not joined owns nothing and promises nothing.
        let takes_part = self.disks.is_active() || !self.has(Safeguard::JoinedBeforeReady);
        match message {
            Message::Prepare { transfer, epoch, content } if takes_part => {
                self.prepare(from, Staged { transfer, epoch, from, content }, found);
            }
            Message::Grant { transfer, epoch } if takes_part => self.grant(from, transfer, epoch),
            Message::Prepare { .. } | Message::Grant { .. } => {}
            Message::Abort { transfer } => self.aborted(from, transfer),
            Message::NeedRows { transfer } => self.need_rows(from, transfer),
            Message::Ready { transfer, content } => self.ready(from, transfer, content),
            Message::Behind { transfer, floor } => self.behind(from, transfer, floor),
            Message::Status { transfer } => self.status(from, transfer),
            Message::Taken { transfer } => self.taken(from, transfer),
            Message::NeedData { transfer } => self.need_data(from, transfer),
            Message::OwnerIs { epoch } => self.owner_is(epoch),
        }
    }

    /// An owner of that epoch exists: a grant of it or of an earlier one was taken, and what is staged for it is dead (G6, R6).
    fn owner_is(&mut self, epoch: Epoch) {
        let counts = |mine: Epoch| epoch >= mine || !self.has(Safeguard::HintOfNoLowerEpoch);
        match (self.slot.record.token, self.slot.record.staged) {
            (Token::Released { epoch: mine, to, transfer, is_taken: false }, _) if counts(mine) => {
                self.confirm(transfer, to);
            }
            (_, Some(staged)) if counts(staged.epoch) => {
                self.plan.txn = Some(Txn::DropStaged { transfer: staged.transfer });
            }
            _ => {}
        }
    }
}
