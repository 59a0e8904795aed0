//! All that crosses a node: who owns a slot, and how it moves to another node while it is in use.
//!
//! **The ring is a wish; the token is the truth.** A slot is served by the node whose disk holds its token as *owned*, and by nobody else. No timeout
//! ever moves a token: a node that does not answer keeps what it owns, and its slots are unavailable until it is back.
//!
//! Pure rules, without clock, socket or `async`:
//! - [`handoff`]: one slot, as one disk sees it: messages in, transactions and messages out. `integration-tests/handoff-model` runs this very code
//!   against every order of losses, repetitions, delays and crashes, and again with each of its [`Safeguards`] off.
//! - [`disks`]: which disks a node knows, and the barrier that a new one passes before it takes part.
//! - [`erasure`]: one life of an entity, erased on every disk.
//! - [`members`]: the nodes, their names and addresses, and slots that are pinned to one of them.
//! - [`ring`]: where slots should be.
//!
//! And what carries them:
//! - [`link`]: encrypted connections to other nodes, with deadlines and limits.

mod commands;
pub mod disks;
mod erase;
pub mod erasure;
mod erasures;
mod fail_points;
mod feed;
pub mod handle;
pub mod handoff;
mod health;
pub mod link;
mod linked;
pub mod members;
pub mod node;
mod observe;
mod operate;
mod owner;
mod plan;
mod projections;
mod registry;
mod requests;
pub mod ring;
pub mod routes;
mod shared;
mod slot_actor;
pub mod slot_checkpoint;
pub mod subscribe;
#[doc(hidden)]
pub mod testing;
pub mod transport;
pub mod wire;

pub use disks::{Disks, Join, JoinAnswer};
pub use erasure::{Erasure, Tombstone, Tombstones};
pub use feed::{ClusterEvent, ClusterEvents, Happened, Told};
pub use handle::{Append, Execute, Executed, Handle, RawHandle};
pub use handoff::{
    Content, Effect, Envelope, Handoff, Input, Message, Out, Phase, Plan, Safeguard, Safeguards, SlotRecord, Staged,
    Token, TransferId, Txn,
};
pub use health::{Health, HealthReason, HealthState};
pub use link::{Cookie, CookieError, LinkOptions, Links, Peers};
pub use members::{JoinRefused, Member, Members, NodeId, Standing};
pub use node::{MemberStatus, Node, NodeError, NodeOptions, SlotStatus};
pub use operate::{Migrate, slot_of_tag};
pub use owner::{Answer, Answered, AskError, Asked, OwnerAnswer, Repeat};
pub use plan::{NodeShare, RebalancePlan};
pub use ring::{Move, Ring};
pub use shared::{MoveProgress, MoveTotals};
pub use slot_checkpoint::{SlotCheckpoint, SlotCheckpointError};
pub use subscribe::{HeldBack, SourceStatus, StartAt, SubscribeError, Subscription};
