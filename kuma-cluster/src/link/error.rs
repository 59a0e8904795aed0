//! What can go wrong, by what one can do about it.

use std::{io, net::SocketAddr};

use kuma_core::DiskId;

/// Why the links of a node could not start.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The address cannot be listened on.
    #[error("cannot listen for other nodes on {address}: {source}")]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// What the operating system says.
        source: io::Error,
    },
    /// An actor of the link did not start.
    #[error("the {what} of the link did not start: {reason}")]
    Actor {
        /// Which one.
        what: &'static str,
        /// What ractor says.
        reason: String,
    },
}

/// Why an attempt to reach a node came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name does not resolve.
    #[error("{address} does not resolve: {source}")]
    Resolve {
        /// What was dialed.
        address: String,
        /// What the resolver says.
        source: io::Error,
    },
    /// Nobody answers there.
    #[error("{address} cannot be reached: {source}")]
    Connect {
        /// What was dialed.
        address: String,
        /// What the operating system says about the last of its addresses.
        source: io::Error,
    },
    /// Somebody is there and did not go through with it in time.
    #[error("{address} did not answer in time while {doing}")]
    Timeout {
        /// What was dialed.
        address: String,
        /// How far it got.
        doing: &'static str,
    },
    /// The handshake came to nothing.
    #[error("the handshake failed: the other node has another cookie, or is no Kuma node")]
    WrongCookie,
    /// The other node does not want this one.
    #[error("the other node refused: {by_peer}")]
    Refused {
        /// What it says.
        by_peer: String,
    },
    /// This node does not want the other one; it was told so.
    #[error("refused the other node: {reason}")]
    RefusedPeer {
        /// Why.
        reason: String,
    },
    /// Another disk than the expected one is there.
    #[error("disk {found} is there, disk {expected} was expected")]
    Unexpected {
        /// Which one should be there.
        expected: DiskId,
        /// Which one is.
        found: DiskId,
    },
    /// The connection broke before the link was up.
    #[error("the connection ended before the link was up: {reason}")]
    Lost {
        /// What is known of it.
        reason: String,
    },
    /// The links of this node are stopped.
    #[error("the links of this node are stopped")]
    Stopped,
}

/// Why a request has no answer. [`CallError::is_outcome_unknown`] says whether it may have run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// There is no link to that disk. It did not run.
    #[error("there is no link to that node")]
    NotConnected,
    /// Here or there too much is under way. It did not run.
    #[error("too much is under way to that node; try again in a while")]
    Overloaded,
    /// It came to the peer after its deadline. It did not run.
    #[error("the request reached the other node after its deadline and was not carried out")]
    Expired,
    /// The peer does not know this kind of request; it is older or newer. It did not run.
    #[error("the other node does not know requests of kind {kind}; its version is another one")]
    UnknownKind {
        /// The kind.
        kind: u8,
    },
    /// It is longer than it may be. It did not run.
    #[error("a message of {bytes} bytes is too long; {bytes_max} are allowed")]
    TooLarge {
        /// What it has.
        bytes: usize,
        /// What it may have.
        bytes_max: usize,
    },
    /// No answer in time; it may have run, or still be running.
    #[error("no answer before the deadline; the outcome is unknown")]
    Deadline,
    /// The link went down; it may have run.
    #[error("the link to that node went down; the outcome is unknown")]
    Down,
    /// It ran and ended without an answer.
    #[error("the request ended on the other node without an answer; the outcome is unknown")]
    Failed,
    /// It ran, and its answer is too long or had no room.
    #[error("the other node could not send its answer, which is too long or had no room; the outcome is unknown")]
    ReplyDropped,
}

impl CallError {
    /// Whether the request may have been carried out. If not, it certainly was not and can be repeated or sent elsewhere.
    pub fn is_outcome_unknown(&self) -> bool {
        use CallError::*;
        match self {
            Deadline | Down | Failed | ReplyDropped => true,
            NotConnected | Overloaded | Expired | UnknownKind { .. } | TooLarge { .. } => false,
        }
    }
}
