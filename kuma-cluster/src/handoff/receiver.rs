//! The disk that a slot is given to (R1 to R8 of the protocol).

use kuma_core::{DiskId, Epoch};

use super::{Content, Effect, Message, Safeguard, Staged, Step, Token, TransferId, Txn};

impl Step<'_> {
    /// R2 to R4'. The first that applies.
    pub(super) fn prepare(&mut self, from: DiskId, wanted: Staged, found: Option<Content>) {
        let (record, transfer) = (self.slot.record, wanted.transfer);
        let is_owner = matches!(record.token, Token::Owned(_));
        if wanted.epoch <= record.floor && self.has(Safeguard::FloorRefuses) {
            // The owner itself says nothing: to itself it is not behind.
            if !is_owner {
                self.send(from, Message::Behind { transfer, floor: record.floor });
            }
            return;
        }
        if is_owner {
            return;
        }
        match record.staged {
            Some(staged) if staged.transfer == transfer => {
                return self.send(from, Message::Ready { transfer, content: staged.content });
            }
            Some(staged) if staged.epoch > wanted.epoch => return,
            // It may have been released to what is staged: ask, and keep it.
            Some(staged) if staged.epoch == wanted.epoch && self.has(Safeguard::StagedIsNotReplaced) => {
                return self.send(staged.from, Message::Status { transfer: staged.transfer });
            }
            // One of a lower epoch is dead.
            Some(_) | None => {}
        }
        let content = match found {
            Some(found) if found == wanted.content => found,
            Some(_) | None if self.has(Safeguard::CopyIsReadBack) => {
                return self.send(from, Message::NeedRows { transfer });
            }
            Some(found) => found,
            None => wanted.content,
        };
        self.plan.txn = Some(Txn::Stage(Staged { content, ..wanted }));
        let content = if self.has(Safeguard::DigestOfTheCopy) { content } else { wanted.content };
        self.promise(Safeguard::ReadyAfterCommit, from, Message::Ready { transfer, content });
    }

    /// R5. From whoever gave it, and of this attempt.
    pub(super) fn aborted(&mut self, from: DiskId, transfer: TransferId) {
        if self.slot.record.staged.is_some_and(|staged| (staged.from, staged.transfer) == (from, transfer)) {
            self.plan.txn = Some(Txn::DropStaged { transfer });
        }
    }

    /// R7, R8.
    pub(super) fn grant(&mut self, from: DiskId, transfer: TransferId, epoch: Epoch) {
        let record = self.slot.record;
        if record.floor >= epoch && self.has(Safeguard::FloorRefuses) {
            // It was taken, by this disk or by an owner after it.
            return self.send(from, Message::Taken { transfer });
        }
        match record.staged {
            Some(staged) if staged.transfer == transfer || !self.has(Safeguard::GrantOfThisTransfer) => {
                self.plan.txn = Some(Txn::Take { transfer: staged.transfer, epoch });
                self.promise(Safeguard::TakenAfterCommit, from, Message::Taken { transfer });
                self.plan.on_commit.push(Effect::Serve);
            }
            Some(_) | None => {
                self.plan.now.push(Effect::Alarm("a slot was granted of which there is no prepared copy"));
                self.send(from, Message::NeedData { transfer });
            }
        }
    }
}
