//! One activation of an entity, as its writer sees it.
//!
//! An entity's actor decides on commits that are not yet durable. If one of them fails, everything decided on top of it is about a
//! past that did not happen. The activation is how both sides agree on that without a message: the writer **voids** it, from then
//! on refuses its commits, and the entity replays before it decides anything again.
//!
//! Invariants:
//! - `committed` only grows, and is raised before the caller hears of it: whoever was told of version `n` finds `committed >= n`.
//! - It is voided after the outcome of the failed group was read back, or while the file may not be read, or where surely nothing was
//!   written, so that a replay that follows sees the truth.
//! - Commits of one activation are dense: the writer accepts only the version that follows the last one it wrote.

use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Shared by an entity's actor, its readers and its shard's writer.
#[derive(Debug)]
pub struct Activation {
    committed: AtomicU64,
    /// The last version handed to the writer; touched by the writer alone.
    written: AtomicU64,
    voided: AtomicBool,
}

impl Activation {
    /// An activation that was replayed up to `version`.
    pub fn at(version: u64) -> Self {
        Activation {
            committed: AtomicU64::new(version),
            written: AtomicU64::new(version),
            voided: AtomicBool::new(false),
        }
    }

    /// The newest durable version.
    pub fn committed(&self) -> u64 {
        self.committed.load(Acquire)
    }

    /// Whether a commit of this activation failed.
    pub fn is_voided(&self) -> bool {
        self.voided.load(Acquire)
    }

    pub(crate) fn void(&self) {
        self.voided.store(true, Release);
    }

    pub(crate) fn commit(&self, version: u64) {
        self.committed.store(version, Release);
    }

    pub(crate) fn written(&self) -> u64 {
        self.written.load(Relaxed)
    }

    pub(crate) fn set_written(&self, version: u64) {
        self.written.store(version, Relaxed);
    }
}
