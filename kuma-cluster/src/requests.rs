//! Requests for entities, wherever their slots are.
//!
//! ```text
//!  handle ──► is the slot here? ──yes──► this node's store
//!                │ no
//!                ▼
//!             its owner, as far as is known ──► answer
//!                │ "not mine", with a later owner; moving; no link
//!                ▼
//!             again, until the deadline
//! ```
//!
//! Invariants:
//! - A write that goes to another node has an idempotency key, its caller's or one of its own: whatever becomes of the link, it happens once.
//! - Only what surely was not done is tried elsewhere without being told: with a key everything can be.
//! - A request ends at its deadline, with what is known then. Before that it is told that the owner is out of reach, within two seconds of the moment
//!   when the owner fell silent: unless it was sent to it already, so that it may have been done.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use kuma_core::{
    AppendError, DiskId, Entity, EntityHash, Gate, ReadError, Refused, Slot, Unavailable, Version, slot_of,
};

use crate::{
    commands::Call,
    erase,
    shared::Shared,
    transport::CallError,
    wire::{self, Ask, Failure, Reply, Request, kind},
};

/// What a request waits between two attempts: at first hardly, then some more.
pub(crate) const AGAIN: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(50)];
/// An owner to which there is no link, and from which nothing has come for so long, is said to be out of reach: a link that can be made again is, in
/// less. It is counted from the last sign of life, not from the end of the link: that of a node which stands still ends by its silence, later than this.
pub(crate) const UNREACHABLE_AFTER: Duration = Duration::from_secs(1);
/// A node says something every 300 ms. One that has not for so long is sent no request until it does: what is sent to a node that stands still may be
/// done or not, and its caller has to wait to be told which.
pub(crate) const DOUBTFUL_AFTER: Duration = Duration::from_millis(800);
/// How often a request that waits for a decision looks whether there is anybody who can make it.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// And one that there never was a link to, in this run of the node.
pub(crate) const NEVER_REACHED_AFTER: Duration = Duration::from_secs(5);

/// Asks whoever owns the slot.
pub(crate) async fn ask(shared: &Arc<Shared>, request: Request, within: Duration) -> Result<Reply, Unavailable> {
    let slot = slot_of(&request.entity_kind, &request.id);
    let begun = Instant::now();
    let mut body = None;
    let mut wait = AGAIN[0];
    // Whether an attempt was sent of which no answer came.
    let mut sent = None;
    loop {
        let left = within.saturating_sub(begun.elapsed());
        if left.is_zero() || shared.is_closing.load(SeqCst) {
            return Err(match sent {
                Some(why) => return Ok(Reply::Failed(Failure::Unknown(why))),
                None if shared.is_closing.load(SeqCst) => Unavailable::ShuttingDown,
                None => Unavailable::NoOwnerFound { slot, within },
            });
        }
        match shared.slots.gate(slot) {
            Gate::Open => {
                if let Some(reply) = answer(shared, &request).await {
                    return Ok(reply);
                }
            }
            Gate::Sealed => {
                // Decided in a moment, one way or the other; unless whoever decides is out of reach.
                let moment = left.min(LOOK_AGAIN);
                if tokio::time::timeout(moment, shared.slots.decided(slot)).await.is_err()
                    && sent.is_none()
                    && let Some(unreachable) = giver_out_of_reach(shared, slot)
                {
                    return Err(unreachable);
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
                    return Err(unreachable);
                }
            } else if transport.silence(disk).is_none_or(|silence| silence < DOUBTFUL_AFTER) {
                let body = body.get_or_insert_with(|| wire::encode(&request));
                match transport.call(disk, kind::REQUEST, body.clone(), left).await {
                    Ok(reply) => match wire::decode(&reply) {
                        Some(Reply::Elsewhere { owner }) => {
                            if let Some((epoch, disk)) = owner {
                                shared.routes.note(slot, epoch, disk);
                            }
                        }
                        Some(Reply::Failed(Failure::Unavailable(detail))) if left > AGAIN[1] * 2 => {
                            tracing::debug!(target: "kuma::cluster", %slot, %detail, "the owner cannot do it now; it is asked again");
                        }
                        Some(reply) => return Ok(reply),
                        None => return Err(unreadable()),
                    },
                    Err(CallError::UnknownKind { .. }) => return Err(unreadable()),
                    Err(CallError::TooLarge { bytes, .. }) => {
                        let why = format!("the request has {bytes} bytes, which is more than goes to another node");
                        return Ok(Reply::Failed(Failure::Refused(why)));
                    }
                    // It does not matter whether something was read.
                    Err(error) if error.is_outcome_unknown() && !matches!(request.ask, Ask::Read) => {
                        sent = Some(error.to_string());
                    }
                    Err(_) => {}
                }
            }
        }
        tokio::time::sleep(wait.min(within.saturating_sub(begun.elapsed()))).await;
        wait = (wait * 2).min(AGAIN[1]);
    }
}

/// Whether an owner to which there is no link has been silent for so long that it is out of reach, for a request that began then.
pub(crate) async fn owner_out_of_reach(
    shared: &Shared,
    slot: Slot,
    disk: DiskId,
    begun: Instant,
) -> Option<Unavailable> {
    let (since, patience) = match silence(shared, disk) {
        Some(since) => (since, UNREACHABLE_AFTER),
        None => (begun.elapsed(), NEVER_REACHED_AFTER),
    };
    if since < patience {
        return None;
    }
    // Whoever asks again at once lets others run: links need the same threads.
    tokio::task::yield_now().await;
    Some(Unavailable::OwnerUnreachable { slot, node: shared.name_of(disk), since })
}

/// For how long there has been no sign of life of a disk to which there is no link, but was one.
pub(crate) fn silence(shared: &Shared, disk: DiskId) -> Option<Duration> {
    let down = shared.down.lock().get(&disk).map(Instant::elapsed);
    down.map(|down| {
        shared.transport().and_then(|transport| transport.silence(disk)).map_or(down, |silence| silence.max(down))
    })
}

/// A slot that was about to come here waits for what its giver decides.
pub(crate) fn giver_out_of_reach(shared: &Shared, slot: Slot) -> Option<Unavailable> {
    let giver = shared.slots.record(slot)?.staged?.from;
    if shared.transport().is_some_and(|transport| transport.is_up(giver)) {
        return None;
    }
    let since = silence(shared, giver).unwrap_or_default();
    let node = shared.name_of(giver);
    (since >= UNREACHABLE_AFTER).then_some(Unavailable::OwnerUnreachable { slot, node, since })
}

fn unreadable() -> Unavailable {
    Unavailable::AtOwner {
        detail: "the node that owns the entity runs a version that does not know this request".to_owned(),
    }
}

/// Does what is asked, if the slot is here; none if it is not, and nothing was done.
pub(crate) async fn answer(shared: &Arc<Shared>, request: &Request) -> Option<Reply> {
    let Request { entity_kind, id, ask } = request;
    let raw = shared.kuma.raw(entity_kind, id);
    let result = match ask.clone() {
        Ask::Append { events, expected, key, metadata } => {
            let mut append = raw.append_all(events).idempotency_key(&key);
            if let Some(expected) = expected {
                append = append.expecting(expected);
            }
            if let Some(metadata) = metadata {
                append = append.metadata(metadata);
            }
            let appended = async { append.submit().await?.appended().await }.await;
            appended.map(|done| Reply::Appended { version: done.version, repeated: done.repeated })
        }
        Ask::Erase { .. } | Ask::Recreate { .. } => return erase::answer(shared, request).await,
        Ask::Read => {
            let read = raw.read().await;
            read.map(|(state, version)| Reply::State { state, version }).map_err(AppendError::from)
        }
        Ask::Execute { command, fields, expected, key, metadata } => {
            let Some(run) = shared.commands.find(entity_kind, &command) else {
                let why = format!(
                    "this node does not know the command {command} of kind {entity_kind}; register it on every node (`Options::command`)"
                );
                return Some(Reply::Failed(Failure::Refused(why)));
            };
            run(Call { kuma: shared.kuma.clone(), id: id.clone(), fields, expected, key, metadata }).await
        }
    };
    match result {
        Ok(reply) => Some(reply),
        Err(error) if is_elsewhere(&error) => None,
        Err(error) => Some(failed(error)),
    }
}

/// Answers a request of another node.
///
/// One that has to wait for a slot that is on its way needs room here. Without room it goes back, and is asked again from where it came from: no
/// node holds more of others' requests than it has memory for.
pub(crate) async fn serve(shared: &Arc<Shared>, request: Request, bytes: usize) -> Reply {
    let slot = slot_of(&request.entity_kind, &request.id);
    let mut place = None;
    loop {
        if shared.slots.gate(slot) == Gate::Sealed && place.is_none() {
            let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
            place = shared.parking.clone().try_acquire_many_owned(kib).ok();
            if place.is_none() {
                return elsewhere(shared, slot);
            }
        }
        match shared.slots.decided(slot).await {
            Gate::Open => match answer(shared, &request).await {
                Some(reply) => return reply,
                None if shared.slots.gate(slot) == Gate::Open => return elsewhere(shared, slot),
                None => {}
            },
            _ => return elsewhere(shared, slot),
        }
    }
}

fn elsewhere(shared: &Shared, slot: Slot) -> Reply {
    Reply::Elsewhere { owner: shared.routes.get(slot).filter(|(_, disk)| *disk != shared.own) }
}

/// Whether nothing was done because the slot is not here, or not any more.
pub(crate) fn is_elsewhere(error: &AppendError) -> bool {
    match error {
        AppendError::Unavailable(unavailable) => match unavailable {
            Unavailable::SlotMoves { .. } | Unavailable::SlotElsewhere { .. } => true,
            Unavailable::NotWritten { cause, .. } => matches!(cause, kuma_core::NotWritten::NotOwner { .. }),
            _ => false,
        },
        _ => false,
    }
}

/// An error as it goes to another node.
pub(crate) fn failed(error: AppendError) -> Reply {
    Reply::Failed(match error {
        AppendError::Refused(refused) => match refused {
            Refused::WrongVersion { expected, actual, .. } => Failure::WrongVersion { expected, actual },
            Refused::KeyReused { version, .. } => Failure::KeyReused { version },
            Refused::Erased { .. } => Failure::Erased,
            other => Failure::Refused(other.to_string()),
        },
        AppendError::Unavailable(unavailable) => Failure::Unavailable(unavailable.to_string()),
        AppendError::Unknown { detail, .. } => Failure::Unknown(detail),
    })
}

/// The same as this node's callers see it.
pub(crate) fn error_of(entity: EntityHash, failure: Failure) -> AppendError {
    match failure {
        Failure::WrongVersion { expected, actual } => Refused::WrongVersion { entity, expected, actual }.into(),
        Failure::KeyReused { version } => Refused::KeyReused { entity, version }.into(),
        Failure::Erased => Refused::Erased { entity }.into(),
        Failure::NeverWritten => Refused::NeverWritten { entity }.into(),
        Failure::NotErased => Refused::NotErased { entity }.into(),
        Failure::OtherLife { asked, actual } => Refused::OtherLife { entity, asked, actual }.into(),
        Failure::Unfinished { detail, .. } => AppendError::Unknown { entity, detail, has_key: true },
        Failure::Refused(detail) => Refused::ByOwner { detail }.into(),
        Failure::Unavailable(detail) => Unavailable::AtOwner { detail }.into(),
        Failure::Unknown(detail) => AppendError::Unknown { entity, detail, has_key: true },
    }
}

/// A reply that no request of this kind has.
pub(crate) fn unexpected() -> AppendError {
    Unavailable::AtOwner { detail: "the node that owns the entity gave an answer to another question".to_owned() }
        .into()
}

/// The state in a reply.
pub(crate) fn state_of<E: Entity>(entity: EntityHash, reply: Reply) -> Result<(E, Version), ReadError> {
    match reply {
        Reply::State { state, version } => {
            let read = serde_json::from_value(state);
            read.map(|state| (state, version)).map_err(|error| Refused::NoJson { detail: error.to_string() }.into())
        }
        Reply::Failed(failure) => Err(read_error(error_of(entity, failure))),
        _ => Err(read_error(unexpected())),
    }
}

pub(crate) fn read_error(error: AppendError) -> ReadError {
    match error {
        AppendError::Refused(refused) => ReadError::Refused(refused),
        AppendError::Unavailable(unavailable) => ReadError::Unavailable(unavailable),
        AppendError::Unknown { detail, .. } => Unavailable::AtOwner { detail }.into(),
    }
}
