//! Named places of a handoff, of a join and of a start, at which tests stop or kill the process. Nothing without the feature `failpoints`.
//!
//! Places before a transaction is handed to its writer, and behind its commit, have the names of what is committed; a message that is *sent* was
//! given to the link, which takes a moment to carry it away.

use kuma_core::Txn;

use crate::handoff::{Effect, Message};

/// A place.
pub(crate) fn fail_point(place: &str) {
    fail::fail_point!(place);
    // Without the feature nobody asks for it.
    let _ = place;
}

/// Before a transaction is handed to the writer of the shard.
pub(crate) fn before_commit(txn: &Txn) {
    match txn {
        Txn::Release { .. } => fail_point("handoff.release.before_submit"),
        Txn::Stage(_) => fail_point("handoff.stage.before_commit"),
        Txn::Take { .. } => fail_point("handoff.take.before_commit"),
        Txn::ConfirmTaken { .. } => fail_point("handoff.taken.before_commit"),
        Txn::DropStaged { .. } | Txn::Raise { .. } => {}
    }
}

/// It is durable, and nobody knows.
pub(crate) fn committed(txn: &Txn) {
    match txn {
        Txn::Release { .. } => fail_point("handoff.release.committed"),
        Txn::Stage(_) => fail_point("handoff.stage.committed"),
        Txn::Take { .. } => fail_point("handoff.take.committed"),
        Txn::ConfirmTaken { .. } => fail_point("handoff.taken.committed"),
        Txn::Raise { .. } => fail_point("handoff.bump.committed"),
        Txn::DropStaged { .. } => {}
    }
}

/// Before something is carried out.
pub(crate) fn before_effect(effect: &Effect) {
    if let Effect::Send(envelope) = effect
        && let Message::Abort { .. } = envelope.message
    {
        fail_point("handoff.abort.before_send");
    }
}

/// A message was given to the link.
pub(crate) fn sent(message: &Message) {
    match message {
        Message::Prepare { .. } => fail_point("handoff.prepare.sent"),
        Message::Ready { .. } => fail_point("handoff.ready.sent"),
        Message::Grant { .. } => fail_point("handoff.grant.sent"),
        Message::Taken { .. } => fail_point("handoff.taken.sent"),
        _ => {}
    }
}
