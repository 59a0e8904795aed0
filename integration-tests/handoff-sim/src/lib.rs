//! The handoff of slots on real stores, under faults that follow from a seed.
//!
//! Three to five disks, each with a [`kuma_core::Kuma`] of its own: real tokens, rows, keys and gates in SQLite files. [`kuma_cluster::Handoff`] decides,
//! as it does in a node. Between them is a network that loses, repeats, delays and reorders, whose links are cut; nodes crash before and after a commit,
//! start again from the files as they were at that moment, and lose their disks; clients append, try again and read wherever they like.
//!
//! ```text
//!  seed ──► next event ──► one disk: Handoff::step ──► its store, its gate, packets
//!              ▲                                              │
//!              └────────── oracle: what must hold ◄───────────┘      after each event, and when all is calm
//! ```
//!
//! It is the complement of `handoff-model`, which looks at all orders of few events on disks that are made up: here are few orders of many events, on
//! the disks that the product has.
//!
//! Invariants:
//! - One event at a time, on one thread, each waited for; everything that is drawn comes from the seed. So the same seed is the same run.
//! - Nothing that follows from a clock, a random name or a key is part of the digest of a run.
//! - No fault is put in after the calm has begun; then everything has to settle.
//!
//! Not simulated: the slot's actor and the registry, whose part is played here (`disk.rs` follows `slot_actor.rs`); damage of files; votes. A slot whose
//! say was on a disk that is gone is judged no further.
// This is test code that happens to be a library: a failed unwrap is a failed promise.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod coverage;
mod disk;
mod network;
mod oracle;
mod rng;
mod sim;
mod template;

pub use coverage::Coverage;
pub use sim::{Config, Failure, Mutant, Run, run};
pub use template::Templates;
