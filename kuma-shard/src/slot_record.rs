//! What is durable of a slot: the token and a prepared copy, in the file of the slot's rows.
//!
//! Invariants:
//! - A record is never deleted, and its floor never falls.
//! - A transaction says what must hold for it; if that does not hold nothing is written.

use serde::{Deserialize, Serialize};

use crate::{DiskId, Epoch, TransferId};

/// What a copy of a slot holds: how many rows, and the sum of their hashes (docs/formats.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Content {
    /// Rows, erased ones too.
    pub len: u64,
    /// The sum of their hashes.
    pub digest: [u8; 32],
}

/// Who has the say, as far as this disk goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Token {
    /// Not this disk.
    None,
    /// This disk, under this epoch.
    Owned(Epoch),
    /// This disk gave it away. Kept for ever, as a pointer.
    Released {
        /// Under which the other one owns it.
        epoch: Epoch,
        /// The other one.
        to: DiskId,
        /// By which attempt.
        transfer: TransferId,
        /// Whether the other one said that it owns it. Until then everything is kept.
        is_taken: bool,
    },
}

/// A whole copy, checked and on this disk, which may become the slot by a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Staged {
    /// By which attempt.
    pub transfer: TransferId,
    /// Under which this disk would own it.
    pub epoch: Epoch,
    /// Who gives it.
    pub from: DiskId,
    /// What it holds.
    pub content: Content,
}

/// The durable state of a slot at one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SlotRecord {
    /// Who has the say.
    pub token: Token,
    /// The highest epoch that this disk has owned, released, or promised to a vote. Never falls.
    pub floor: Epoch,
    /// Under which the live copy was last owned here; zero if there is none.
    pub last_owned: Epoch,
    /// What the live copy holds.
    pub content: Content,
    /// A prepared copy.
    pub staged: Option<Staged>,
}

impl SlotRecord {
    /// Of a slot that this disk has nothing of.
    pub const NONE: SlotRecord = SlotRecord {
        token: Token::None,
        floor: Epoch::NEVER,
        last_owned: Epoch::NEVER,
        content: Content { len: 0, digest: [0; 32] },
        staged: None,
    };

    /// Of a slot in a new cluster, at its founder.
    pub fn founded(content: Content) -> Self {
        let (token, floor, last_owned) = (Token::Owned(Epoch::FIRST), Epoch::FIRST, Epoch::FIRST);
        SlotRecord { token, floor, last_owned, content, staged: None }
    }

    /// Under which epoch this disk owns the slot.
    pub fn owned(&self) -> Option<Epoch> {
        match self.token {
            Token::Owned(epoch) => Some(epoch),
            Token::None | Token::Released { .. } => None,
        }
    }

    /// Whether what a transaction needs is so.
    pub fn allows(&self, txn: &Txn) -> bool {
        match *txn {
            Txn::Release { from, sealed, .. } => {
                self.token == Token::Owned(from) && sealed.is_none_or(|sealed| sealed == self.content)
            }
            Txn::Raise { from, to } => self.token == Token::Owned(from) && to > self.floor.max(from),
            Txn::ConfirmTaken { transfer: confirmed } => {
                matches!(self.token, Token::Released { transfer, is_taken: false, .. } if transfer == confirmed)
            }
            Txn::Stage(_) => !matches!(self.token, Token::Owned(_)),
            Txn::DropStaged { transfer } | Txn::Take { transfer, .. } => {
                self.staged.is_some_and(|staged| staged.transfer == transfer)
            }
        }
    }

    /// Writes it. To be asked before: [`SlotRecord::allows`].
    pub fn apply(&mut self, txn: &Txn) {
        match *txn {
            Txn::Release { to, epoch, transfer, .. } => {
                self.token = Token::Released { epoch, to, transfer, is_taken: false };
                self.floor = self.floor.max(epoch);
            }
            Txn::Raise { to, .. } => {
                (self.token, self.last_owned) = (Token::Owned(to), to);
                self.floor = self.floor.max(to);
            }
            Txn::ConfirmTaken { .. } => {
                if let Token::Released { is_taken, .. } = &mut self.token {
                    *is_taken = true;
                }
                (self.last_owned, self.content) = (Epoch::NEVER, Content::default());
            }
            Txn::Stage(staged) => self.staged = Some(staged),
            Txn::DropStaged { .. } => self.staged = None,
            Txn::Take { epoch, .. } => {
                let content = self.staged.take().map(|staged| staged.content).unwrap_or_default();
                (self.token, self.last_owned, self.content) = (Token::Owned(epoch), epoch, content);
                self.floor = self.floor.max(epoch);
            }
        }
    }
}

/// One transaction of the shard's only writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Txn {
    /// **The decision.** If the token is owned under `from`, and the live copy holds what was sealed: it is released.
    Release {
        /// The epoch that ends.
        from: Epoch,
        /// The epoch that begins.
        epoch: Epoch,
        /// To whom.
        to: DiskId,
        /// By which attempt.
        transfer: TransferId,
        /// What the other one has staged. Always there; without it is how a test shows what it is for.
        sealed: Option<Content>,
    },
    /// The only owner raises its own epoch above one that others know.
    Raise {
        /// The epoch that ends.
        from: Epoch,
        /// The epoch that begins.
        to: Epoch,
    },
    /// The grant was taken. The keys of the copy are destroyed with it, and its rows deleted later.
    ConfirmTaken {
        /// By which attempt it was released.
        transfer: TransferId,
    },
    /// A whole copy is kept.
    Stage(Staged),
    /// A prepared copy is dropped.
    DropStaged {
        /// The attempt.
        transfer: TransferId,
    },
    /// A prepared copy becomes the slot. The tombstones of what is erased in it are here already.
    Take {
        /// The attempt.
        transfer: TransferId,
        /// Under which it is owned.
        epoch: Epoch,
    },
}
