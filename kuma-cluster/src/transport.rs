//! What carries messages between nodes, as the rest of the cluster sees it: requests with a deadline, messages that may be lost, and pieces of
//! slots that stand back behind both.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use kuma_core::DiskId;

/// Why a request got no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// There is no link to that node.
    #[error("there is no link to that node")]
    NotConnected,
    /// More waits for that node than is allowed to.
    #[error("too much waits for that node")]
    Overloaded,
    /// No answer came in time: it may have been done.
    #[error("no answer came in time")]
    Deadline,
    /// The link broke: it may have been done.
    #[error("the link broke before an answer came")]
    Down,
    /// The other node does not know such a request.
    #[error("the other node does not know such a request; it runs another version")]
    UnknownKind,
    /// More than a message may have.
    #[error("the message has {bytes} bytes, which is more than a link carries")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

impl CallError {
    /// Whether it may have been done all the same.
    pub fn is_unknown(&self) -> bool {
        matches!(self, CallError::Deadline | CallError::Down)
    }
}

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

    /// Ends all links.
    fn stop(&self) -> BoxFuture<'_, ()>;
}

/// What a node answers to others.
pub trait Serve: Send + Sync + 'static {
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
