//! The handoff of one slot between up to four nodes, in every order of losses, repetitions, delays and crashes.
//!
//! The decisions are those of the product: [`kuma_cluster::Handoff`], [`kuma_cluster::Join`], [`kuma_cluster::Erasure`] and
//! [`kuma_cluster::Tombstones`] run here as they run in a node. What is modelled is the world around them: the network, the disks, the clients, the log
//! of the slot.
//!
//! - The network is a set of messages that is never emptied: loss, repetition, delay and reordering need nothing more.
//! - A log is a short list of numbers of commands. Its digest is the list itself. Idempotency keys are columns of its rows, and are the log too.
//! - A restored or wiped disk is another disk: a node has a generation.
//! - A crash forgets what is not durable. A transaction on its way may be committed or not.
//! - Two commits are two steps, because others may come between them: the append, and the release. Every other one is a step together with what is
//!   promised after it, because that leaves only then; with such a safeguard off, it is two.
//! - There is one entity, of one life. Its key is in a copy or not, and that it is erased is a row of the log.
//! - The writes of an erasure are one step, and a crash may come between any two of them. That the seal of a handoff does not come between them is the
//!   node's promise; to break it is a mutant.
//! - A question (`Status`) is answered at once: it has no other effect, and can be asked again later.
//!
//! Not modelled: parked requests and forwarding, votes, several slots, a backup whose files are of different moments, copies that wait for their collection.

mod check;
mod live;
mod log;
mod world;

pub use check::{Verdict, check, counterexample};
pub use live::{Liveness, live};
pub use log::Log;
pub use world::{Action, Model, Mutant, Node, Packet, World};
