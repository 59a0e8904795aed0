//! What all requests share.

use std::{
    sync::{Arc, atomic::AtomicUsize},
    time::Instant,
};

use kuma_core::Kuma;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    Config, denials::Denials, forward::Held, problem::Problem, projection_files::ProjectionFiles, tokens::Tokens,
};

/// A running server, as its requests see it.
pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) kuma: Kuma,
    /// None: the store is in no cluster.
    pub(crate) cluster: Option<kuma_cluster::Node>,
    /// Answers to other nodes that were too long for one message.
    pub(crate) held: Held,
    pub(crate) tokens: Tokens,
    pub(crate) denials: Denials,
    pub(crate) projections: Arc<ProjectionFiles>,
    pub(crate) metrics: PrometheusHandle,
    pub(crate) started: Instant,
    /// Cancelled when the server begins to stop: long answers end then.
    pub(crate) stopping: CancellationToken,
    pub(crate) connections: Arc<AtomicUsize>,
    /// Bytes of bodies in memory, in units of [`BODY_UNIT`].
    pub(crate) body_memory: Arc<Semaphore>,
    pub(crate) requests: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    subscriptions: Arc<Semaphore>,
}

/// A semaphore counts to 2^32 on some machines.
pub(crate) const BODY_UNIT: usize = 4 << 10;

impl Node {
    pub(crate) fn new(
        config: Config,
        kuma: Kuma,
        cluster: Option<kuma_cluster::Node>,
        tokens: Tokens,
        projections: Arc<ProjectionFiles>,
        metrics: PrometheusHandle,
        denials: Denials,
    ) -> Self {
        let permits = |permits: usize| Arc::new(Semaphore::new(permits.clamp(1, Semaphore::MAX_PERMITS)));
        Node {
            denials,
            projections,
            metrics,
            started: Instant::now(),
            stopping: CancellationToken::new(),
            connections: Arc::default(),
            body_memory: permits(config.body_memory_max.div_ceil(BODY_UNIT)),
            requests: permits(config.requests_max),
            streams: permits(config.streams_max),
            subscriptions: permits(config.subscriptions_max),
            config,
            kuma,
            cluster,
            held: Held::default(),
            tokens,
        }
    }

    /// Whether everybody may do everything: there were never tokens, and only this machine is listened to.
    pub(crate) fn is_open(&self) -> bool {
        self.tokens.is_open() && self.config.listen.ip().is_loopback()
    }

    /// Room for one more stream. To be kept until it ends.
    pub(crate) fn stream(&self) -> Result<OwnedSemaphorePermit, Problem> {
        let full = || format!("{} streams are open, more are not allowed (`streams_max`)", self.config.streams_max);
        self.streams.clone().try_acquire_owned().map_err(|_| Problem::overloaded(full()))
    }

    /// Room for one more subscription. To be kept until it ends.
    pub(crate) fn subscription(&self) -> Result<OwnedSemaphorePermit, Problem> {
        let max = self.config.subscriptions_max;
        let full = || format!("{max} subscriptions are open, more are not allowed (`subscriptions_max`)");
        self.subscriptions.clone().try_acquire_owned().map_err(|_| Problem::overloaded(full()))
    }
}
