//! The owner that gives a slot away (G1 to G9 of the protocol).

use kuma_core::{DiskId, Epoch};

use super::{Content, Effect, Message, Out, Phase, Safeguard, Step, Token, TransferId, Txn};

impl Step<'_> {
    /// The epoch of the next owner.
    fn next(&self, epoch: Epoch) -> Epoch {
        match self.has(Safeguard::NewEpochForEachOwner) {
            true => Epoch { counter: epoch.counter + 1, ..epoch },
            false => epoch,
        }
    }

    /// G1.
    pub(super) fn start(&mut self, to: DiskId, transfer: TransferId) {
        let is_target = to != self.disks.own() && self.disks.is_there(to) && self.disks.is_active();
        if self.slot.record.owned().is_some() && self.slot.out.is_none() && is_target {
            self.slot.out = Some(Out { transfer, to, phase: Phase::Copying });
            self.plan.now.push(Effect::Copy(transfer, to));
        }
    }

    /// G2, its beginning.
    pub(super) fn seal(&mut self) {
        if let Some(out) = self.slot.out.as_mut().filter(|out| out.phase == Phase::Copying) {
            out.phase = Phase::Sealing;
            self.plan.now.push(Effect::Park);
        }
    }

    /// G2, its end.
    pub(super) fn drained(&mut self, content: Content) {
        if let Some(out) = self.slot.out.as_mut().filter(|out| out.phase == Phase::Sealing) {
            out.phase = Phase::Sealed(content);
            self.send_prepare();
            if !self.has(Safeguard::ReleaseAfterReady) {
                self.release(content);
            }
        }
    }

    fn send_prepare(&mut self) {
        let (Some(Out { transfer, to, phase: Phase::Sealed(content) }), Some(epoch)) =
            (self.slot.out, self.slot.record.owned())
        else {
            return;
        };
        // Not the one of a mutant: what is prepared is for the next owner.
        let epoch = Epoch { counter: epoch.counter + 1, ..epoch };
        self.send(to, Message::Prepare { transfer, epoch, content });
    }

    /// G3. Needs nobody.
    pub(super) fn abort(&mut self) {
        let Some(out) = self.slot.out else { return };
        match out.phase {
            // There is no way back.
            Phase::Releasing(_) if self.has(Safeguard::NoAbortWhileReleasing) => return,
            Phase::Releasing(_) => {}
            Phase::Copying => self.slot.out = None,
            Phase::Sealing | Phase::Sealed(_) => {
                self.slot.out = None;
                self.plan.now.push(Effect::Unpark);
            }
        }
        self.send(out.to, Message::Abort { transfer: out.transfer });
    }

    /// G4.
    pub(super) fn ready(&mut self, from: DiskId, transfer: TransferId, content: Content) {
        let Some(Out { transfer: current, to, phase: Phase::Sealed(sealed) }) = self.slot.out else { return };
        let is_current = current == transfer || !self.has(Safeguard::ReadyOfThisTransfer);
        let is_equal = content == sealed || !self.has(Safeguard::ReadyWithEqualDigest);
        if from == to && is_current && is_equal {
            self.release(sealed);
        }
    }

    /// Hands the decision to the writer of the shard. Reads end before it gets there.
    fn release(&mut self, sealed: Content) {
        let (Some(out), Some(from)) = (self.slot.out.as_mut(), self.slot.record.owned()) else { return };
        out.phase = Phase::Releasing(sealed);
        let Out { transfer, to, .. } = *out;
        let epoch = self.next(from);
        self.plan.now.push(Effect::StopReads);
        let sealed = self.has(Safeguard::ReleaseOfWhatWasSealed).then_some(sealed);
        self.plan.txn = Some(Txn::Release { from, epoch, to, transfer, sealed });
        self.promise(Safeguard::GrantAfterCommit, to, Message::Grant { transfer, epoch });
    }

    /// G4'.
    pub(super) fn released(&mut self, is_committed: bool) {
        let Some(out) = self.slot.out.filter(|out| matches!(out.phase, Phase::Releasing(_))) else { return };
        self.slot.out = None;
        if !is_committed {
            self.plan.now.push(Effect::Unpark);
            self.send(out.to, Message::Abort { transfer: out.transfer });
        }
    }

    /// G5, and the other messages of which no answer has come.
    pub(super) fn remind(&mut self) {
        match self.slot.record.token {
            Token::Released { epoch, to, transfer, is_taken: false } => {
                self.send(to, Message::Grant { transfer, epoch })
            }
            Token::Owned(_) => self.send_prepare(),
            Token::None | Token::Released { .. } => {}
        }
        if let Some(staged) = self.slot.record.staged {
            self.send(staged.from, Message::Status { transfer: staged.transfer });
        }
    }

    /// G6. Of this very attempt, from the disk that it was released to.
    pub(super) fn taken(&mut self, from: DiskId, transfer: TransferId) {
        let Token::Released { to, transfer: current, is_taken: false, .. } = self.slot.record.token else { return };
        if from == to && (transfer == current || !self.has(Safeguard::TakenOfThisTransfer)) {
            self.confirm(current, to);
        }
    }

    pub(super) fn confirm(&mut self, transfer: TransferId, to: DiskId) {
        self.plan.txn = Some(Txn::ConfirmTaken { transfer });
        self.plan.on_commit.push(Effect::Forward(to));
    }

    /// G7. A vote that came to nothing has left an epoch above the owner's.
    pub(super) fn behind(&mut self, from: DiskId, transfer: TransferId, floor: Epoch) {
        let (Some(out), Some(epoch)) = (self.slot.out, self.slot.record.owned()) else { return };
        if out.transfer != transfer || out.to != from || matches!(out.phase, Phase::Releasing(_)) || floor <= epoch {
            return;
        }
        if floor.term == epoch.term {
            self.plan
                .now
                .push(Effect::Alarm("another disk knows a later owner of this slot: this store is older than it was"));
        } else if self.has(Safeguard::OwnerRaisesItsEpoch) {
            self.slot.out = None;
            self.plan.now.push(Effect::Unpark);
            self.plan.txn = Some(Txn::Raise { from: epoch, to: floor });
        }
    }

    /// G8.
    pub(super) fn need_data(&mut self, from: DiskId, transfer: TransferId) {
        if let Token::Released { epoch, to, transfer: current, is_taken: false } = self.slot.record.token
            && (from, transfer) == (to, current)
        {
            let content = self.slot.record.content;
            self.send(to, Message::Prepare { transfer, epoch, content });
        }
    }

    /// Rows are sent again with the preparation.
    pub(super) fn need_rows(&mut self, from: DiskId, transfer: TransferId) {
        if self.slot.out.is_some_and(|out| (out.to, out.transfer) == (from, transfer)) {
            self.send_prepare();
        }
    }

    /// G9. An attempt counts as open from its beginning until its decision is on the disk.
    pub(super) fn status(&mut self, from: DiskId, transfer: TransferId) {
        if self.slot.out.is_some_and(|out| out.transfer == transfer) {
            return;
        }
        match self.slot.record.token {
            Token::Released { epoch, transfer: current, .. }
                if current == transfer && self.has(Safeguard::StatusOfTheToken) =>
            {
                self.send(from, Message::Grant { transfer, epoch });
            }
            _ => self.send(from, Message::Abort { transfer }),
        }
    }
}
