//! What is on its way between disks. It comes in any order, late, twice or not at all.

use std::{collections::BTreeSet, rc::Rc};

use kuma_cluster::{Envelope, JoinAnswer, TransferId};
use kuma_core::{DiskId, SlotChunk};

/// One message, and what is known of its way.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    /// In the order in which they were sent; a repetition has the number of the first.
    pub(crate) number: u64,
    pub(crate) from: DiskId,
    pub(crate) to: DiskId,
    pub(crate) body: Body,
}

#[derive(Clone, Debug)]
pub(crate) enum Body {
    /// A piece of a slot.
    Chunk { slot: usize, transfer: TransferId, piece: u32, chunk: Rc<SlotChunk> },
    /// The answer to one: it was kept, or not.
    Kept { slot: usize, transfer: TransferId, piece: u32, is_kept: bool },
    /// A message of the handoff.
    Message { slot: usize, envelope: Envelope },
    /// A new disk asks to be let in, in the place of others.
    Join { replaces: Vec<DiskId> },
    /// The answer.
    Joined { answer: Box<JoinAnswer> },
}

/// All that is on its way, and which links are cut.
#[derive(Debug, Default)]
pub(crate) struct Network {
    pub(crate) packets: Vec<Packet>,
    sent: u64,
    /// Between nodes, the lower number first.
    pub(crate) cut: BTreeSet<(usize, usize)>,
    /// Numbers of messages that came at least once.
    pub(crate) came: BTreeSet<u64>,
}

impl Network {
    pub(crate) fn send(&mut self, from: DiskId, to: DiskId, body: Body) {
        self.sent += 1;
        self.packets.push(Packet { number: self.sent, from, to, body });
    }

    pub(crate) fn is_cut(&self, one: usize, other: usize) -> bool {
        self.cut.contains(&(one.min(other), one.max(other)))
    }
}
