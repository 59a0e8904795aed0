//! What the process `cluster_child` can be asked, and what it answers: a line of JSON each.

use kuma_core::Entity;
use serde::{Deserialize, Serialize};

/// An entity that remembers all numbers that were noted, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Log {
    /// The numbers.
    pub seen: Vec<u64>,
}

/// The event of a [`Log`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogEvent {
    /// A number.
    Noted {
        /// It is the idempotency key too.
        number: u64,
    },
}

impl Entity for Log {
    const KIND: &'static str = "log";
    type Event = LogEvent;

    fn apply(&mut self, LogEvent::Noted { number }: &LogEvent) {
        self.seen.push(*number);
    }
}

/// A question with its number, which the answer has too.
#[derive(Debug, Serialize, Deserialize)]
pub struct Question {
    /// Its number.
    pub number: u64,
    /// What is asked.
    pub ask: Ask,
}

/// What a node is asked.
#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Append a number to a log, once.
    Append {
        /// The log.
        id: String,
        /// The number.
        number: u64,
        /// The deadline.
        within_ms: u64,
    },
    /// Read a log.
    Read {
        /// The log.
        id: String,
        /// The deadline.
        within_ms: u64,
    },
    /// Want a slot to be at the node of this name.
    Pin {
        /// The slot.
        slot: u64,
        /// The name.
        node: String,
    },
    /// Attest that the disk of this node is destroyed.
    Attest {
        /// Its name.
        node: String,
    },
    /// Wait at a fail point from now on, once.
    Arm {
        /// The place.
        place: String,
    },
    /// Go on from the fail point.
    GoOn,
    /// How it stands.
    Status,
    /// How it stands with a slot.
    Slot {
        /// The slot.
        slot: u64,
    },
    /// Look at everything that is stored.
    Verify,
    /// Register a read model with a row for each number that was noted in any log.
    Project,
    /// What the read model holds, once it has all that there is.
    Model,
    /// End.
    Stop,
}

/// What it says by itself, or answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said {
    /// The node is up, at this address.
    Up {
        /// The address.
        address: String,
    },
    /// It waits at a fail point.
    At {
        /// The place.
        place: String,
    },
    /// An answer.
    Answer {
        /// The number of the question.
        number: u64,
        /// The answer.
        answer: Answer,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done,
    /// It is durable, with this version.
    Appended {
        /// The version.
        version: u64,
    },
    /// What a log holds.
    State {
        /// Its version.
        version: u64,
        /// Its numbers.
        seen: Vec<u64>,
    },
    /// Nothing was done: the owner is out of reach.
    Unreachable {
        /// Its name.
        node: String,
    },
    /// Something else; whether it was done is not known.
    Failed(String),
    /// How it stands.
    Status(Status),
    /// How it stands with a slot.
    Slot(SlotNow),
    /// By log, the numbers in the order of their versions.
    Model(std::collections::BTreeMap<String, Vec<u64>>),
}

/// How it stands with a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether it serves.
    pub is_ready: bool,
    /// Whether each of its slots is where it should be.
    pub is_settled: bool,
    /// Names of the nodes that it reaches, itself among them.
    pub up: Vec<String>,
    /// What it owns.
    pub owned: Vec<u64>,
    /// What the ring gives it.
    pub wished: usize,
    /// Slots that are prepared here, and not granted.
    pub staged: usize,
    /// Slots that are granted, of which the other node has not said that it has them.
    pub granted: usize,
    /// Attempts to give a slot away that came to nothing.
    pub aborted: u64,
}

/// What the token of a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SlotNow {
    /// Nothing.
    None,
    /// Prepared here.
    Staged,
    /// Owned.
    Owned,
    /// Given away, not confirmed.
    Released,
    /// Given away for good.
    Taken,
}
