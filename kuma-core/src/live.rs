//! A live entity, as its readers see it.
//!
//! Invariants:
//! - What is published is durable.
//! - A reader who was told of version `n` sees at least version `n`: the writer raises [`Activation::committed`] before it tells
//!   anyone, and what is published is only handed out while it is that new. Otherwise the reader asks the actor, which publishes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use kuma_shard::{Activation, Budget, Slot};
use parking_lot::Mutex;
use ractor::ActorRef;

use crate::{Version, actor::EntityMessage, kind::State};

/// The durable state of an entity.
#[derive(Clone)]
pub(crate) struct Durable {
    pub(crate) state: State,
    pub(crate) version: Version,
}

pub(crate) struct Published {
    pub(crate) durable: Durable,
    pub(crate) activation: Arc<Activation>,
}

/// Shared by an entity's handles and its supervisor.
pub(crate) struct Live {
    pub(crate) actor: ActorRef<EntityMessage>,
    pub(crate) view: Arc<View>,
    /// Appends that wait.
    pub(crate) appends: Arc<Budget>,
    pub(crate) slot: Slot,
}

/// What an entity's actor shows.
#[derive(Default)]
pub(crate) struct View {
    pub(crate) published: Mutex<Option<Published>>,
    pub(crate) usage: Usage,
}

impl Live {
    /// The durable state, if it is as new as anyone was told.
    pub(crate) fn peek(&self) -> Option<Durable> {
        let published = self.view.published.lock();
        let Published { durable, activation } = published.as_ref()?;
        (!activation.is_voided() && activation.committed() <= durable.version.0).then(|| durable.clone())
    }
}

impl Live {
    /// Whether nothing durable waits to be published.
    pub(crate) fn is_published(&self) -> bool {
        let published = self.view.published.lock();
        published.as_ref().is_none_or(|now| now.activation.committed() <= now.durable.version.0)
    }
}

/// What the memory budget needs to know of an entity.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    used_at_ms: AtomicU64,
    state_bytes: AtomicUsize,
    snapshot_bytes: AtomicU32,
    /// The idle time of its kind, where it has one of its own; 0 if not.
    idle_ms: AtomicU32,
}

impl Usage {
    pub(crate) fn touch(&self, clock: &Clock) {
        self.used_at_ms.store(clock.now_ms(), Relaxed);
    }

    pub(crate) fn used_at_ms(&self) -> u64 {
        self.used_at_ms.load(Relaxed)
    }

    /// At most 49 days.
    pub(crate) fn set_idle_ms(&self, idle_ms: u64) {
        self.idle_ms.store(u32::try_from(idle_ms).unwrap_or(u32::MAX).max(1), Relaxed);
    }

    /// Whether it was not used for its idle time, or for this one if it has none of its own.
    pub(crate) fn is_idle(&self, now_ms: u64, idle_ms: u64) -> bool {
        let idle_ms = match self.idle_ms.load(Relaxed) {
            0 => idle_ms,
            own => u64::from(own),
        };
        self.used_at_ms() < now_ms.saturating_sub(idle_ms)
    }

    pub(crate) fn set_state_bytes(&self, bytes: usize) {
        self.state_bytes.store(bytes, Relaxed);
    }

    /// The size of the newest snapshot; 0 if there is none.
    pub(crate) fn snapshot_bytes(&self) -> usize {
        self.snapshot_bytes.load(Relaxed) as usize
    }

    pub(crate) fn set_snapshot_bytes(&self, bytes: usize) {
        self.snapshot_bytes.store(u32::try_from(bytes).unwrap_or(u32::MAX), Relaxed);
    }

    /// What an idle actor takes, measured (docs/architecture.md), and its state.
    pub(crate) fn memory_bytes(&self) -> usize {
        ENTITY_BYTES + self.state_bytes.load(Relaxed)
    }
}

/// Measured with `kuma-bench memory`: ractor's mailboxes are most of it.
pub(crate) const ENTITY_BYTES: usize = 12 << 10;

/// Milliseconds since the store was opened.
#[derive(Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Clock { start: Instant::now() }
    }

    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn ms(duration: Duration) -> u64 {
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
    }
}
