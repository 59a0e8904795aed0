//! What carries messages between nodes, as the rest of the cluster sees it: requests with a deadline, messages that may be lost, and pieces of
//! slots that stand back behind both.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use kuma_core::DiskId;

pub use crate::link::{CallError, PeerState};

/// Where a node is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// `host:port`.
    pub address: String,
    /// Whom to expect there, if that is known.
    pub disk: Option<DiskId>,
}

/// The links of one node.
pub trait Transport: Send + Sync + 'static {
    /// Asks a node. Never waits for room.
    fn call(&self, to: DiskId, kind: u8, body: Vec<u8>, within: Duration) -> BoxFuture<'_, Result<Vec<u8>, CallError>>;

    /// As [`Transport::call`], behind everything else: for pieces of slots. Waits for its turn.
    fn call_bulk(
        &self,
        to: DiskId,
        kind: u8,
        body: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'_, Result<Vec<u8>, CallError>>;

    /// Sends a message that may be lost.
    fn cast(&self, to: DiskId, kind: u8, body: Vec<u8>);

    /// From now on these are to be linked, and dialed again whenever they are not.
    fn keep_connected(&self, targets: Vec<Target>);

    /// Connects to an address; whom it found there.
    fn dial(&self, address: String) -> BoxFuture<'_, Result<DiskId, String>>;

    /// Whether there is a link.
    fn is_up(&self, disk: DiskId) -> bool;

    /// For how long nothing has come from a disk, if that is known; also when the link is gone.
    fn silence(&self, _: DiskId) -> Option<Duration> {
        None
    }

    /// What is known of each link; nothing where nothing is counted.
    fn peers(&self) -> Vec<PeerState> {
        Vec::new()
    }

    /// Ends all links.
    fn stop(&self) -> BoxFuture<'_, ()>;
}

/// What a node answers to others.
pub trait Serve: Send + Sync + 'static {
    /// Its disk.
    fn own(&self) -> DiskId;

    /// What it says of itself to whoever connects.
    fn hello(&self) -> Vec<u8>;

    /// Whether another one is let in, by its hello: its disk and its incarnation, or a sentence for both sides.
    ///
    /// # Errors
    /// Why not.
    fn admit(&self, hello: &[u8]) -> Result<(DiskId, u64), String>;

    /// A link is there.
    fn up(&self, disk: DiskId);

    /// A link is gone.
    fn down(&self, disk: DiskId, why: &str);

    /// Answers a request, or takes a message; none if it does not know the kind.
    fn serve(self: Arc<Self>, from: DiskId, kind: u8, body: Vec<u8>) -> BoxFuture<'static, Option<Vec<u8>>>;
}
