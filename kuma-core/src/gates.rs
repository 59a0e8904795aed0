//! The gate of each slot: whether requests for its entities are let in. A store that is alone has all of them open.
//!
//! Invariants:
//! - It says no more than who may try: the writer of the shard looks at the slot's token for each commit, whatever the gate says.
//! - A gate is closed before what is behind it is stopped, so that nothing new gets in meanwhile.

use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

use kuma_shard::{SLOTS, Slot};
use tokio::sync::watch;

use crate::Unavailable;

/// Whether requests are let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Gate {
    /// Requests are let in.
    Open,
    /// The slot is about to leave: requests wait for what becomes of that.
    Sealed,
    /// The slot is another node's.
    Closed,
}

pub(crate) struct SlotGates {
    gates: Box<[AtomicU8]>,
    changes: watch::Sender<u64>,
}

impl SlotGates {
    /// All open.
    pub(crate) fn new() -> Self {
        let gates = (0..=SLOTS).map(|_| AtomicU8::new(Gate::Open as u8)).collect();
        SlotGates { gates, changes: watch::Sender::new(0) }
    }

    pub(crate) fn get(&self, slot: Slot) -> Gate {
        match self.gates.get(usize::from(slot.number())).map(|gate| gate.load(SeqCst)) {
            Some(gate) if gate == Gate::Open as u8 => Gate::Open,
            Some(gate) if gate == Gate::Sealed as u8 => Gate::Sealed,
            _ => Gate::Closed,
        }
    }

    pub(crate) fn set(&self, slot: Slot, gate: Gate) {
        if let Some(at) = self.gates.get(usize::from(slot.number())) {
            at.store(gate as u8, SeqCst);
            self.changes.send_modify(|changes| *changes += 1);
        }
    }

    /// Why a request for an entity of this slot is not let in, if it is not.
    pub(crate) fn check(&self, slot: Slot) -> Result<(), Unavailable> {
        match self.get(slot) {
            Gate::Open => Ok(()),
            Gate::Sealed => Err(Unavailable::SlotMoves { slot }),
            Gate::Closed => Err(Unavailable::SlotElsewhere { slot }),
        }
    }

    /// Returns when the gate is not sealed.
    pub(crate) async fn decided(&self, slot: Slot) -> Gate {
        let mut changes = self.changes.subscribe();
        loop {
            changes.borrow_and_update();
            let gate = self.get(slot);
            // The sender is `self`: it is there.
            if gate != Gate::Sealed || changes.changed().await.is_err() {
                return gate;
            }
        }
    }
}
