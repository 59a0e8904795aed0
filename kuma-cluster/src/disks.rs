//! The disks that a node knows, and how a new one becomes one of them.
//!
//! A data directory has a disk id of its own, new at every restore: to the others, a disk that was restored or wiped is another disk, which owns
//! nothing. Sets of disks only grow, so that two nodes which tell each other what they know come to agree.
//!
//! Invariants:
//! - A message counts between the very disks that it names, and never from one that is retired or removed.
//! - Two disks that take part know each other: a new one takes part only after every member that is named in any answer has answered.
//! - A new disk has destroyed the keys of all tombstones that it was told of before it takes part.

use std::collections::BTreeSet;

use kuma_core::{DiskId, Epoch};
use serde::{Deserialize, Serialize};

use crate::{
    erasure::{Tombstones, Write},
    handoff::{Safeguard, Safeguards},
};

/// What a node knows of disks; durable.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Disks {
    own: DiskId,
    members: BTreeSet<DiskId>,
    /// Replaced by a restored or new disk of the same node: they come back as another disk or not at all.
    retired: BTreeSet<DiskId>,
    /// Somebody attested that they are destroyed.
    removed: BTreeSet<DiskId>,
    is_active: bool,
}

impl Disks {
    /// Of the first disk of a cluster, which takes part from the beginning.
    pub fn founder(own: DiskId) -> Self {
        Disks { is_active: true, ..Disks::joiner(own, []) }
    }

    /// Of a new disk that knows some members, and does not take part yet.
    pub fn joiner(own: DiskId, seeds: impl IntoIterator<Item = DiskId>) -> Self {
        let members = seeds.into_iter().chain([own]).collect();
        Disks { own, members, retired: BTreeSet::new(), removed: BTreeSet::new(), is_active: false }
    }

    /// This node's own disk.
    pub fn own(&self) -> DiskId {
        self.own
    }

    /// Whether it takes part.
    pub fn is_active(&self) -> bool {
        self.is_active
    }

    /// Disks that count, its own one too.
    pub fn members(&self) -> impl Iterator<Item = DiskId> {
        self.members.iter().copied().filter(|disk| self.is_there(*disk))
    }

    /// Disks that were replaced.
    pub fn retired(&self) -> impl Iterator<Item = DiskId> {
        self.retired.iter().copied()
    }

    /// Disks that somebody attested as destroyed.
    pub fn removed(&self) -> impl Iterator<Item = DiskId> {
        self.removed.iter().copied()
    }

    /// Whether a disk is a member and neither replaced nor destroyed.
    pub fn is_there(&self, disk: DiskId) -> bool {
        self.members.contains(&disk) && !self.is_gone(disk)
    }

    /// Whether it is proven that a disk acts no more.
    pub fn is_gone(&self, disk: DiskId) -> bool {
        self.retired.contains(&disk) || self.removed.contains(&disk)
    }

    /// A new disk asks to become a member, in place of another one maybe. To be durable before the answer leaves.
    pub fn admit(&mut self, new: DiskId, replaces: Option<DiskId>, safeguards: Safeguards) {
        if self.is_gone(new) {
            return;
        }
        self.members.insert(new);
        if safeguards.has(Safeguard::JoinRetires) {
            self.retired.extend(replaces.filter(|old| *old != self.own));
        }
    }

    /// Somebody attests that a disk is destroyed. Not its own one: it runs.
    pub fn remove(&mut self, disk: DiskId) {
        self.removed.extend((disk != self.own).then_some(disk));
    }

    /// Takes over what another one knows.
    pub fn merge(&mut self, members: &BTreeSet<DiskId>, retired: &BTreeSet<DiskId>, removed: &BTreeSet<DiskId>) {
        self.members.extend(members);
        self.retired.extend(retired.iter().filter(|disk| **disk != self.own));
        self.removed.extend(removed.iter().filter(|disk| **disk != self.own));
    }

    /// Takes over the sets that another disk has.
    pub fn learn(&mut self, other: &Disks) {
        self.merge(&other.members, &other.retired, &other.removed);
    }

    /// What a member tells a new disk.
    pub fn answer(&self, floor: Epoch, tombstones: &Tombstones) -> JoinAnswer {
        let Disks { members, retired, removed, .. } = self.clone();
        JoinAnswer { floor, members, retired, removed, tombstones: tombstones.clone() }
    }
}

/// The answer of a member to a disk that joins.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JoinAnswer {
    /// The highest epoch that the member knows of the slot.
    pub floor: Epoch,
    /// Disks that it knows.
    pub members: BTreeSet<DiskId>,
    /// Those that were replaced.
    pub retired: BTreeSet<DiskId>,
    /// Those that are destroyed.
    pub removed: BTreeSet<DiskId>,
    /// Lives that are erased, of all slots.
    pub tombstones: Tombstones,
}

/// A disk on its way to become a member; lost in a crash, and begun anew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Join {
    answered: BTreeSet<DiskId>,
}

impl Join {
    /// Whether this disk has answered.
    pub fn has_answered(&self, disk: DiskId) -> bool {
        self.answered.contains(&disk)
    }

    /// Takes an answer. What it returns is to be durable first, and then `disks`, with the floor, before anything else is done; it takes part as
    /// soon as every member that was named has answered.
    #[must_use]
    pub fn answered(
        &mut self,
        disks: &mut Disks,
        tombstones: &Tombstones,
        from: DiskId,
        answer: &JoinAnswer,
        safeguards: Safeguards,
    ) -> Vec<Write> {
        if disks.is_active || !self.answered.insert(from) {
            return Vec::new();
        }
        let before = disks.clone();
        disks.merge(&answer.members, &answer.retired, &answer.removed);
        let asked = if safeguards.has(Safeguard::JoinClosure) { &*disks } else { &before };
        let is_done = asked.members().all(|disk| disk == disks.own || self.answered.contains(&disk));
        disks.is_active = is_done || !safeguards.has(Safeguard::JoinAll);
        tombstones.joined(&answer.tombstones, disks.is_active, safeguards)
    }
}

#[cfg(test)]
mod tests {
    use kuma_core::EntityHash;

    use super::*;
    use crate::erasure::Tombstone;

    fn disk(n: u8) -> DiskId {
        DiskId([n; 16])
    }

    #[test]
    fn a_new_disk_takes_part_when_everybody_who_was_named_has_answered() {
        let (mut first, mut second) = (Disks::founder(disk(1)), Disks::joiner(disk(2), [disk(1)]));
        let none = Tombstones::default();
        first.admit(disk(2), None, Safeguards::ALL);
        first.admit(disk(3), None, Safeguards::ALL);
        let mut join = Join::default();
        let mut hears = |second: &mut Disks, from, answer: JoinAnswer| {
            let _ = join.answered(second, &none, from, &answer, Safeguards::ALL);
        };
        hears(&mut second, disk(1), first.answer(Epoch::FIRST, &none));
        assert!(!second.is_active() && second.is_there(disk(3)), "the third one has not answered");
        hears(&mut second, disk(1), first.answer(Epoch::FIRST, &none));
        assert!(!second.is_active(), "an answer counts once");
        let third = Disks::joiner(disk(3), [disk(1)]);
        hears(&mut second, disk(3), third.answer(Epoch::FIRST, &none));
        assert!(second.is_active());
    }

    #[test]
    fn a_new_disk_has_destroyed_what_is_erased_before_it_takes_part() {
        let (mut first, mut second) = (Disks::founder(disk(1)), Disks::joiner(disk(2), [disk(1)]));
        first.admit(disk(2), None, Safeguards::ALL);
        let tombstone = Tombstone { key_id: [7; 16], id_hash: EntityHash([8; 16]) };
        let mut erased = Tombstones::default();
        erased.committed(&Write::Entomb(tombstone));
        let answer = first.answer(Epoch::FIRST, &erased);
        let writes = Join::default().answered(&mut second, &Tombstones::default(), disk(1), &answer, Safeguards::ALL);
        assert!(second.is_active());
        assert_eq!(writes, [Write::Entomb(tombstone), Write::DestroyAll]);
    }

    #[test]
    fn a_disk_that_was_replaced_is_nobody() {
        let mut first = Disks::founder(disk(1));
        first.admit(disk(2), None, Safeguards::ALL);
        first.admit(disk(12), Some(disk(2)), Safeguards::ALL);
        assert!(first.is_gone(disk(2)) && !first.is_there(disk(2)) && first.is_there(disk(12)));
        first.admit(disk(2), None, Safeguards::ALL);
        assert!(!first.is_there(disk(2)), "it does not come back");
        first.admit(disk(13), Some(disk(1)), Safeguards::ALL);
        assert!(first.is_there(disk(1)), "nobody is told of himself by others");
    }
}
