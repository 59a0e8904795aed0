//! The reply to an append, with all that is given back when it is answered.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::AcqRel},
};

use kuma_shard::Permit;
use tokio::sync::oneshot;

use crate::{AppendError, Version};

/// Counts a handle's own appends that are on their way.
#[derive(Clone, Debug, Default)]
pub(crate) struct OwnAppends(Arc<AtomicUsize>);

impl OwnAppends {
    pub(crate) fn count(&self) -> usize {
        self.0.load(std::sync::atomic::Ordering::Acquire)
    }

    pub(crate) fn enter(&self) -> OwnAppend {
        self.0.fetch_add(1, AcqRel);
        OwnAppend(self.0.clone())
    }
}

/// One of them.
#[derive(Debug)]
pub(crate) struct OwnAppend(Arc<AtomicUsize>);

impl Drop for OwnAppend {
    fn drop(&mut self) {
        self.0.fetch_sub(1, AcqRel);
    }
}

/// Where the outcome of an append goes. Dropped unanswered, it means "unknown".
pub(crate) struct AppendReply {
    pub(crate) caller: oneshot::Sender<Result<Version, AppendError>>,
    /// Room in the entity's and the shard's queue, and a place among the handle's own appends: free again before the caller hears.
    pub(crate) held: (Permit, Permit, OwnAppend),
}

impl AppendReply {
    pub(crate) fn send(self, outcome: Result<Version, AppendError>) {
        drop(self.held);
        // A caller that is gone does not want to know.
        let _ = self.caller.send(outcome);
    }
}
