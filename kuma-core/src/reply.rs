//! The reply to a write, with all that is given back when it is answered.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::AcqRel},
    },
    time::Instant,
};

use kuma_shard::Permit;
use tokio::sync::oneshot;

use crate::{AppendError, Version, kind::Decoded, observe::CoreMetrics, sequence::Link};

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

/// How a write ended that was not refused.
pub(crate) enum Written {
    /// Its events are durable; the last one made this version. Also of a command that had nothing to do: the version it saw.
    Committed(Version),
    /// They were already: an earlier request had the same idempotency key. With its events, if a command asks.
    Repeated(Version, Option<Decoded>),
    /// A command was rejected on a state that is durable.
    Rejected,
}

/// Where the outcome of a write goes. Dropped unanswered, it means "unknown", and its sequence is broken.
pub(crate) struct WriteReply {
    pub(crate) caller: oneshot::Sender<Result<Written, AppendError>>,
    /// Room in the entity's and the shard's queue, and a place among the handle's own appends: free again before the caller hears.
    pub(crate) held: (Permit, Permit, OwnAppend),
    pub(crate) link: Option<Link>,
    /// From admission to the answer.
    pub(crate) span: tracing::Span,
    pub(crate) metrics: Arc<CoreMetrics>,
    pub(crate) started: Instant,
}

impl WriteReply {
    pub(crate) fn send(self, outcome: Result<Written, AppendError>) {
        match outcome {
            Ok(_) => self.link.into_iter().for_each(Link::hold),
            // Before the caller hears of it.
            Err(_) => drop(self.link),
        }
        self.span.record("result", result(&outcome));
        self.metrics.write_ended(&outcome, self.started.elapsed());
        drop(self.held);
        // A caller that is gone does not want to know.
        let _ = self.caller.send(outcome);
    }

    /// Nothing of its sequence may be decided from now on.
    pub(crate) fn break_sequence(&self) {
        self.link.iter().for_each(Link::break_off);
    }

    /// Takes room in the shard's queue for what was only known once the request was decided.
    pub(crate) fn grow(&mut self, bytes: usize) {
        self.held.0.grow(bytes);
    }
}

/// How a write ended, in a word for traces.
fn result(outcome: &Result<Written, AppendError>) -> &'static str {
    match outcome {
        Ok(Written::Committed(_)) => "committed",
        Ok(Written::Repeated(..)) => "repeated",
        Ok(Written::Rejected) => "rejected",
        Err(AppendError::Refused(_)) => "refused",
        Err(AppendError::Unavailable(_)) => "unavailable",
        Err(AppendError::Unknown { .. }) => "unknown",
    }
}
