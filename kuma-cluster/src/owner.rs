//! Hands what an embedder makes of bytes to the node that owns a slot, by the rules of [`requests`](crate::requests): it waits while the slot moves,
//! follows it to where it went, and ends at its deadline with what is known then.
//!
//! ```text
//!  ask_owner ──► is the slot here? ──yes──► this node's own answerer
//!                  │ no
//!                  ▼
//!               its owner, as far as is known ──► that node's answerer ──► bytes
//!                  │ "not mine", with a later owner; moving; no link
//!                  ▼
//!               again, until the deadline
//! ```
//!
//! Invariants:
//! - A request goes from the node that was asked to the owner and no further: whoever is not the owner says so, and the first node asks again.
//! - What may not happen twice is sent once. After that an answer that does not come is told as unknown.
//! - Only disks that were let in are answered.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use kuma_core::{DiskId, Epoch, Gate, Slot, Unavailable};
use serde::{Deserialize, Serialize};

use crate::{
    node::Node,
    observe::AskedResult,
    requests::{AGAIN, DOUBTFUL_AFTER, LOOK_AGAIN, giver_out_of_reach, owner_out_of_reach},
    shared::Shared,
    transport::CallError,
    wire::{self, kind},
};

/// How long an owner is looked for, within the deadline of the request.
const LOOK_FOR: Duration = Duration::from_secs(10);

/// What a node is asked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The slot that it is about, which this node owns; none if it is about the node itself.
    pub slot: Option<Slot>,
    /// Who asks: a disk of the cluster.
    pub from: DiskId,
    /// What.
    pub body: Vec<u8>,
}

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answered {
    /// This.
    Done(Vec<u8>),
    /// The slot is not here any more, and nothing was done.
    Elsewhere,
}

/// Answers what other nodes ask, and what this node asks itself. Registered with [`NodeOptions::answer`](crate::NodeOptions::answer).
pub trait Answer: Send + Sync + 'static {
    /// Answers. Bytes from another node are never to be trusted to be well-formed.
    fn answer(&self, asked: Asked) -> BoxFuture<'static, Answered>;
}

/// Whether something may happen twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// It changes nothing: what became of an attempt does not matter.
    Read,
    /// It happens once however often it is asked.
    Safe,
    /// It is sent once.
    Never,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// Nothing was done.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// It may have been done.
    #[error("whether it was done is not known: {detail}")]
    Unknown {
        /// What happened.
        detail: String,
    },
    /// It has more bytes than go to another node. Nothing was done.
    #[error(
        "{bytes} bytes are more than go to another node ({bytes_max}); send it to node {node}, which owns the slot"
    )]
    TooLarge {
        /// What it has.
        bytes: usize,
        /// What it may have.
        bytes_max: usize,
        /// Whose it is.
        node: String,
    },
    /// The other node does not answer such questions, or this one does not. Nothing was done.
    #[error("the node that is asked runs a version that does not know this request; bring all nodes to one version")]
    NotKnown,
}

/// An answer, and whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerAnswer {
    /// What it said.
    pub body: Vec<u8>,
    /// The disk of the node that answered.
    pub disk: DiskId,
}

/// What goes to another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AskFrame {
    /// None: about the node itself.
    slot: Option<Slot>,
    #[serde(with = "serde_bytes")]
    body: Vec<u8>,
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum AskReply {
    Done(#[serde(with = "serde_bytes")] Vec<u8>),
    Elsewhere { owner: Option<(Epoch, DiskId)> },
    NotKnown,
}

impl Node {
    /// Asks the node that owns a slot, be it this one. What the bytes mean is between the answerers ([`NodeOptions::answer`](crate::NodeOptions::answer)).
    ///
    /// # Errors
    /// [`AskError::Unavailable`]: surely nothing was done; the other variants say what is known.
    /// # Cancel safety
    /// If the future is dropped it may or may not be done.
    pub async fn ask_owner(
        &self,
        slot: Slot,
        body: Vec<u8>,
        within: Duration,
        repeat: Repeat,
    ) -> Result<OwnerAnswer, AskError> {
        let began = Instant::now();
        let asked = ask(&self.shared, slot, body, within, repeat).await;
        let metrics = &self.shared.metrics;
        metrics.asked_seconds.record(began.elapsed());
        metrics.asked(match &asked {
            Ok(_) => AskedResult::Answered,
            Err(AskError::Unknown { .. }) => AskedResult::Unknown,
            Err(_) => AskedResult::Unavailable,
        });
        asked
    }

    /// Asks a node about itself.
    ///
    /// # Errors
    /// As [`Node::ask_owner`].
    /// # Cancel safety
    /// If the future is dropped it may or may not be done.
    pub async fn ask_node(&self, disk: DiskId, body: Vec<u8>, within: Duration) -> Result<Vec<u8>, AskError> {
        let shared = &self.shared;
        if disk == shared.own {
            let answer = shared.answer.clone().ok_or(AskError::NotKnown)?;
            return match answer.answer(Asked { slot: None, from: disk, body }).await {
                Answered::Done(body) => Ok(body),
                Answered::Elsewhere => Err(AskError::NotKnown),
            };
        }
        let starting = || Unavailable::AtOwner { detail: "the node is starting; retry".to_owned() };
        let transport = shared.transport().ok_or_else(starting)?;
        let frame = wire::encode(&AskFrame { slot: None, body });
        match transport.call(disk, kind::ASK, frame, within).await {
            Ok(reply) => match wire::decode(&reply) {
                Some(AskReply::Done(body)) => Ok(body),
                _ => Err(AskError::NotKnown),
            },
            Err(error) => Err(called(shared, disk, error)),
        }
    }

    /// What people call the node with this disk.
    pub fn name_of(&self, disk: DiskId) -> String {
        self.shared.name_of(disk)
    }

    /// Whether requests for a slot are answered here.
    pub fn is_here(&self, slot: Slot) -> bool {
        self.shared.slots.gate(slot) == Gate::Open
    }
}

fn called(shared: &Shared, disk: DiskId, error: CallError) -> AskError {
    let node = shared.name_of(disk);
    match error {
        CallError::UnknownKind { .. } => AskError::NotKnown,
        CallError::TooLarge { bytes, bytes_max } => AskError::TooLarge { bytes, bytes_max, node },
        error if error.is_outcome_unknown() => AskError::Unknown { detail: error.to_string() },
        error => Unavailable::AtOwner { detail: format!("node {node}: {error}; retry") }.into(),
    }
}

async fn ask(
    shared: &Arc<Shared>,
    slot: Slot,
    body: Vec<u8>,
    within: Duration,
    repeat: Repeat,
) -> Result<OwnerAnswer, AskError> {
    let answer = shared.answer.clone().ok_or(AskError::NotKnown)?;
    let begun = Instant::now();
    let mut frame = None;
    let mut wait = AGAIN[0];
    // Whether an attempt was sent of which no answer came.
    let mut sent = None;
    loop {
        let left = within.saturating_sub(begun.elapsed());
        let is_closing = shared.is_closing.load(SeqCst);
        if left.is_zero() || is_closing || begun.elapsed() >= LOOK_FOR {
            return Err(match sent {
                Some(detail) => AskError::Unknown { detail },
                None if is_closing => Unavailable::ShuttingDown.into(),
                None => Unavailable::NoOwnerFound { slot, within: begun.elapsed() }.into(),
            });
        }
        match shared.slots.gate(slot) {
            Gate::Open => {
                let asked = Asked { slot: Some(slot), from: shared.own, body: body.clone() };
                if let Answered::Done(body) = answer.answer(asked).await {
                    return Ok(OwnerAnswer { body, disk: shared.own });
                }
            }
            Gate::Sealed => {
                // Decided in a moment, one way or the other; unless whoever decides is out of reach.
                let moment = left.min(LOOK_AGAIN);
                if tokio::time::timeout(moment, shared.slots.decided(slot)).await.is_err()
                    && sent.is_none()
                    && let Some(unreachable) = giver_out_of_reach(shared, slot)
                {
                    return Err(unreachable.into());
                }
                continue;
            }
            Gate::Closed => {}
        }
        let owner = shared.routes.get(slot).filter(|(_, disk)| *disk != shared.own);
        if let (Some((_, disk)), Some(transport)) = (owner, shared.transport()) {
            if !transport.is_up(disk) {
                if sent.is_none()
                    && let Some(unreachable) = owner_out_of_reach(shared, slot, disk, begun).await
                {
                    return Err(unreachable.into());
                }
            } else if transport.silence(disk).is_none_or(|silence| silence < DOUBTFUL_AFTER) {
                let frame =
                    frame.get_or_insert_with(|| wire::encode(&AskFrame { slot: Some(slot), body: body.clone() }));
                match transport.call(disk, kind::ASK, frame.clone(), left).await {
                    Ok(reply) => match wire::decode(&reply) {
                        Some(AskReply::Done(body)) => return Ok(OwnerAnswer { body, disk }),
                        Some(AskReply::Elsewhere { owner }) => {
                            if let Some((epoch, disk)) = owner {
                                shared.routes.note(slot, epoch, disk);
                            }
                        }
                        Some(AskReply::NotKnown) | None => return Err(AskError::NotKnown),
                    },
                    Err(error) if error.is_outcome_unknown() => match repeat {
                        Repeat::Read => {}
                        Repeat::Safe => sent = Some(error.to_string()),
                        Repeat::Never => return Err(AskError::Unknown { detail: error.to_string() }),
                    },
                    Err(error @ (CallError::UnknownKind { .. } | CallError::TooLarge { .. })) => {
                        return Err(called(shared, disk, error));
                    }
                    Err(_) => {}
                }
            }
        }
        tokio::time::sleep(wait.min(within.saturating_sub(begun.elapsed()))).await;
        wait = (wait * 2).min(AGAIN[1]);
    }
}

/// Answers another node; none if it is not to be answered.
///
/// One that has to wait for a slot that is on its way needs room, as every request does (`requests::serve`).
pub(crate) async fn serve(shared: &Arc<Shared>, from: DiskId, frame: AskFrame, bytes: usize) -> Option<AskReply> {
    // Whoever has the cookie has a link; whoever was let in takes part.
    if !shared.state().disks.is_there(from) {
        return None;
    }
    let Some(answer) = shared.answer.clone() else { return Some(AskReply::NotKnown) };
    let AskFrame { slot, body } = frame;
    let Some(slot) = slot else {
        return Some(match answer.answer(Asked { slot: None, from, body }).await {
            Answered::Done(body) => AskReply::Done(body),
            Answered::Elsewhere => AskReply::NotKnown,
        });
    };
    let elsewhere = || AskReply::Elsewhere { owner: shared.routes.get(slot).filter(|(_, disk)| *disk != shared.own) };
    let mut place = None;
    loop {
        if shared.slots.gate(slot) == Gate::Sealed && place.is_none() {
            let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
            place = shared.parking.clone().try_acquire_many_owned(kib).ok();
            if place.is_none() {
                return Some(elsewhere());
            }
        }
        match shared.slots.decided(slot).await {
            Gate::Open => match answer.answer(Asked { slot: Some(slot), from, body: body.clone() }).await {
                Answered::Done(body) => return Some(AskReply::Done(body)),
                Answered::Elsewhere if shared.slots.gate(slot) == Gate::Open => return Some(elsewhere()),
                Answered::Elsewhere => {}
            },
            _ => return Some(elsewhere()),
        }
    }
}
