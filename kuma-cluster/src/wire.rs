//! What nodes say to each other, and how it is written: MessagePack with field names, so that fields can be added.
//!
//! Bytes from another node are never trusted to be well-formed: what cannot be read is answered by "not known", and dropped.

use kuma_core::{
    DiskId, EntityHash, Epoch, ErasedLife, FedItem, FeedAnswer, FeedAsk, Filter, Metadata, NewEvent, Reason, Slot,
    SlotChunk, TransferId, Version,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    disks::{Disks, JoinAnswer},
    handoff::Envelope,
    members::{Member, Members, NodeId},
};

/// Each kind of frame has a number, for ever.
pub mod kind {
    /// Maps, and who owns what.
    pub const GOSSIP: u8 = 1;
    /// A message of the handoff.
    pub const HANDOFF: u8 = 2;
    /// A piece of a slot.
    pub const CHUNK: u8 = 3;
    /// Slots that the sender owns.
    pub const OWNS: u8 = 4;
    /// A request for an entity.
    pub const REQUEST: u8 = 5;
    /// A new node asks what cluster this is.
    pub const WELCOME: u8 = 6;
    /// A new disk asks to take part.
    pub const JOIN: u8 = 7;
    /// Lives whose keys are to be destroyed.
    pub const SHRED: u8 = 8;
    /// A page of what is erased, for a disk that joins.
    pub const LEDGER: u8 = 9;
    /// Receipts of erasures.
    pub const RECEIPTS: u8 = 10;
    /// What the embedder asks of a node.
    pub const ASK: u8 = 32;
    /// What should be elsewhere is to be moved now.
    pub const HURRY: u8 = 33;
    /// What comes next in the logs of a node's slots.
    pub const FEED: u8 = 11;
    /// How far the logs of a node's slots go.
    pub const ENDS: u8 = 12;
    /// One commit of a slot's log.
    pub const COMMIT: u8 = 13;
}

/// What each side says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The name of the store.
    pub context: String,
    /// The cluster; none of a node that is in none yet.
    pub cluster: Option<[u8; 16]>,
    /// Its disk.
    pub disk: DiskId,
    /// Counts its starts.
    pub incarnation: u64,
    /// What people call it.
    pub name: String,
}

/// What a node knows, for another one to merge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gossip {
    /// The membership map.
    pub members: Members,
    /// The disks that it knows.
    pub disks: Disks,
    /// Whether it serves, because others told it that it may.
    pub has_passed: bool,
    /// What it owns.
    pub owns: Vec<(Slot, Epoch)>,
}

/// A message of the handoff of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoffFrame {
    /// The slot.
    pub slot: Slot,
    /// The message.
    pub envelope: Envelope,
}

/// A piece of a slot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChunkFrame {
    /// The slot.
    pub slot: Slot,
    /// The attempt.
    pub transfer: TransferId,
    /// Whom it is from.
    pub from: DiskId,
    /// Whom it is for.
    pub to: DiskId,
    /// The piece.
    pub chunk: SlotChunk,
}

/// What became of a piece.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChunkReply {
    /// It is on the disk, and was read back from there.
    Kept,
    /// It is not wanted, or does not fit.
    Refused(String),
}

/// Lives that are erased: the tombstones are to be held, and the keys destroyed in whatever copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShredFrame {
    /// Which.
    pub lives: Vec<ErasedLife>,
}

/// Of which it is done, durably.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShredReply {
    /// The names of the keys, with the receipts of erasures that had been finished before.
    pub done: Vec<([u8; 16], Option<String>)>,
}

/// Asks for what comes next in the logs of a node's slots.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FeedFrame {
    /// What is asked.
    pub ask: FeedAsk,
    /// If there is nothing, how long to wait for something. Milliseconds.
    pub wait_ms: u64,
}

/// What there is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FeedReply {
    /// This.
    Answer(FeedAnswer),
    /// The node does not serve yet.
    NotReady,
}

/// Asks for one commit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommitFrame {
    /// Which of its events.
    pub filter: Filter,
    /// The slot.
    pub slot: Slot,
    /// The place in its log.
    pub seq: u64,
    /// Whose it is.
    pub entity: EntityHash,
}

/// What becomes of that.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum CommitReply {
    /// This; none if it is erased.
    Found(Option<FedItem>),
    /// The slot is another node's, or on its way.
    NotOwner,
    /// It cannot be read, in words.
    Failed(String),
}

/// What a new node is told.
#[derive(Clone, Serialize, Deserialize)]
pub struct Welcome {
    /// The cluster.
    pub cluster: [u8; 16],
    /// What keys the hashes of ids. Inside an encrypted link and nowhere else.
    pub id_secret: [u8; 32],
    /// The nodes.
    pub members: Members,
    /// The disks.
    pub disks: Disks,
}

/// A new disk asks to take part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The node.
    pub node: NodeId,
    /// Where and what it is.
    pub member: Member,
    /// The disk that it takes the place of.
    pub replaces: Option<DiskId>,
}

/// What it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinReply {
    /// It is known from now on, durably.
    Admitted {
        /// For the barrier.
        answer: JoinAnswer,
        /// The nodes.
        members: Members,
    },
    /// It is not.
    Refused(String),
}

/// A request for an entity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The kind of the entity.
    pub entity_kind: String,
    /// Its id.
    pub id: String,
    /// What is asked.
    pub ask: Ask,
}

/// What can be asked of an entity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Ask {
    /// Append these events.
    Append {
        /// The events.
        events: Vec<NewEvent>,
        /// Only at this version.
        expected: Option<Version>,
        /// The request happens once, however often it is sent.
        #[serde(with = "serde_bytes")]
        key: Vec<u8>,
        /// Kept beside the events.
        metadata: Option<Metadata>,
    },
    /// The state.
    Read,
    /// Erase it on every node.
    Erase {
        /// Why.
        reason: Reason,
        /// Which life of it; none: the one that it has.
        life: Option<u32>,
    },
    /// Begin a new life of what is erased.
    Recreate {
        /// Why.
        reason: Reason,
    },
    /// Decide a command.
    Execute {
        /// Its name.
        command: String,
        /// Its fields.
        #[serde(with = "serde_bytes")]
        fields: Vec<u8>,
        /// Only at this version.
        expected: Option<Version>,
        /// The request happens once, however often it is sent.
        #[serde(with = "serde_bytes")]
        key: Vec<u8>,
        /// Kept beside the events.
        metadata: Option<Metadata>,
    },
}

/// What the owner says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// It is durable.
    Appended {
        /// The version that its last event made.
        version: Version,
        /// Whether it had happened before.
        repeated: bool,
    },
    /// The state, as JSON.
    State {
        /// The state.
        state: serde_json::Value,
        /// How many events it is folded from.
        version: Version,
    },
    /// The command was carried out.
    Executed {
        /// The version that its last event made.
        version: Version,
        /// Its events.
        events: Vec<NewEvent>,
        /// Whether it had happened before.
        repeated: bool,
    },
    /// It is erased on every node.
    Erased {
        /// The receipt, as text.
        receipt: String,
    },
    /// A new life has begun.
    Recreated {
        /// Its number.
        life: u32,
    },
    /// The command was rejected; why, as MessagePack.
    Rejected(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The slot is not this node's; whose it is, as far as this node knows.
    Elsewhere {
        /// Under which the other one owns it, and who.
        owner: Option<(Epoch, DiskId)>,
    },
    /// Nothing was done.
    Failed(Failure),
}

/// Why a request came to nothing, or may have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// The entity has moved on.
    WrongVersion {
        /// What was expected.
        expected: Version,
        /// What it is.
        actual: Version,
    },
    /// The key was used for another request.
    KeyReused {
        /// The version that the other one made.
        version: Version,
    },
    /// The entity was erased.
    Erased,
    /// There is nothing to erase.
    NeverWritten,
    /// It was not erased, and has no new life for that.
    NotErased,
    /// It has another life than the one that was to be erased.
    OtherLife {
        /// The life that was to be erased.
        asked: u32,
        /// The life that it has.
        actual: u32,
    },
    /// The erasure has begun and goes on by itself.
    Unfinished {
        /// The name of the erasure.
        receipt_id: [u8; 16],
        /// What is in the way.
        detail: String,
    },
    /// Something else that a repetition does not mend.
    Refused(String),
    /// It cannot be done now; nothing was done.
    Unavailable(String),
    /// It may have been done.
    Unknown(String),
}

/// Writes a message. What is written here can always be written.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(message).unwrap_or_default()
}

/// Reads a message; none if it is none.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    rmp_serde::from_slice(bytes).ok()
}
