//! Erasing an entity wherever it is: the node that owns it does it, and has all others do their part.

use std::{sync::Arc, time::Duration};

use kuma_core::{Entity, EntityHash, EraseError, Reason, Receipt, ReceiptId, Refused, Unavailable};

use crate::{
    handle::{Handle, RawHandle},
    requests::{error_of, unexpected},
    shared::Shared,
    wire::{Ask, Failure, Reply, Request},
};

/// How long an erasure is waited for, unless the handle waits longer. It goes on by itself.
const WITHIN: Duration = Duration::from_secs(30);

impl RawHandle {
    /// Erases the entity on every node: its key is destroyed in every copy, and all its events, its snapshot and its id are deleted. Returns the
    /// signed receipt once each node of the cluster has done its part. The receipt names them.
    ///
    /// The entity answers as erased as soon as it has begun, from which on there is no way back. A node that is down does its part when it comes back;
    /// until then the answer is [`EraseError::Unfinished`], and asking again gives the receipt as soon as there is one.
    ///
    /// # Errors
    /// See [`EraseError`]. Everything can be asked again.
    /// # Cancel safety
    /// If the future is dropped the erasure may or may not begin; ask again for the receipt.
    pub async fn erase(&self, reason: Reason) -> Result<Receipt, EraseError> {
        self.ask_to_erase(reason, None).await
    }

    /// Erases this life of the entity and no other. See [`kuma_core::RawHandle::erase_life`].
    ///
    /// # Errors
    /// As [`RawHandle::erase`]; and [`Refused::OtherLife`] if the entity has another life and there is no receipt of this one.
    /// # Cancel safety
    /// As [`RawHandle::erase`].
    pub async fn erase_life(&self, life: u32, reason: Reason) -> Result<Receipt, EraseError> {
        self.ask_to_erase(reason, Some(life)).await
    }

    async fn ask_to_erase(&self, reason: Reason, life: Option<u32>) -> Result<Receipt, EraseError> {
        let entity = self.here.check()?;
        match self.ask_within(Ask::Erase { reason, life }, self.within.max(WITHIN)).await? {
            Reply::Erased { receipt } => {
                let read = receipt.parse::<Receipt>();
                read.map_err(|error| Unavailable::NotErased { entity, detail: error.to_string() }.into())
            }
            Reply::Failed(failure) => Err(erase_error(entity, failure)),
            _ => Err(as_erase_error(entity, unexpected())),
        }
    }

    /// Starts a new life of an erased entity, and returns its number. See [`kuma_core::RawHandle::recreate`].
    ///
    /// # Errors
    /// [`Refused::NotErased`] if it was not erased, [`Refused::Erased`] while the erasure is not complete on every node.
    /// # Cancel safety
    /// If the future is dropped the new life may or may not have begun.
    pub async fn recreate(&self, reason: Reason) -> Result<u32, EraseError> {
        let entity = self.here.check()?;
        match self.ask_within(Ask::Recreate { reason }, self.within).await? {
            Reply::Recreated { life } => Ok(life),
            Reply::Failed(failure) => Err(erase_error(entity, failure)),
            _ => Err(as_erase_error(entity, unexpected())),
        }
    }
}

impl<E: Entity> Handle<E> {
    /// Erases the entity on every node. See [`RawHandle::erase`].
    ///
    /// # Errors
    /// As [`RawHandle::erase`].
    /// # Cancel safety
    /// As [`RawHandle::erase`].
    pub async fn erase(&self, reason: Reason) -> Result<Receipt, EraseError> {
        self.raw().erase(reason).await
    }

    /// Erases this life of the entity and no other. See [`RawHandle::erase_life`].
    ///
    /// # Errors
    /// As [`RawHandle::erase_life`].
    /// # Cancel safety
    /// As [`RawHandle::erase`].
    pub async fn erase_life(&self, life: u32, reason: Reason) -> Result<Receipt, EraseError> {
        self.raw().erase_life(life, reason).await
    }

    /// Starts a new life of an erased entity. See [`RawHandle::recreate`].
    ///
    /// # Errors
    /// As [`RawHandle::recreate`].
    /// # Cancel safety
    /// As [`RawHandle::recreate`].
    pub async fn recreate(&self, reason: Reason) -> Result<u32, EraseError> {
        self.raw().recreate(reason).await
    }
}

/// Erases an entity of this node; none if its slot is not here, and nothing was done.
pub(crate) async fn answer(shared: &Arc<Shared>, request: &Request) -> Option<Reply> {
    let raw = shared.kuma.raw(&request.entity_kind, &request.id);
    let done = match request.ask.clone() {
        Ask::Erase { reason, life: None } => raw.erase(reason).await.map(erased),
        Ask::Erase { reason, life: Some(life) } => raw.erase_life(life, reason).await.map(erased),
        Ask::Recreate { reason } => raw.recreate(reason).await.map(|life| Reply::Recreated { life }),
        _ => return Some(Reply::Failed(Failure::Refused("it is no erasure".to_owned()))),
    };
    match done {
        Ok(reply) => Some(reply),
        Err(EraseError::Unavailable(Unavailable::SlotMoves { .. } | Unavailable::SlotElsewhere { .. })) => None,
        Err(error) => Some(Reply::Failed(failure_of(error))),
    }
}

fn erased(receipt: Receipt) -> Reply {
    Reply::Erased { receipt: receipt.to_string() }
}

fn failure_of(error: EraseError) -> Failure {
    match error {
        EraseError::Refused(Refused::NeverWritten { .. }) => Failure::NeverWritten,
        EraseError::Refused(Refused::NotErased { .. }) => Failure::NotErased,
        EraseError::Refused(Refused::OtherLife { asked, actual, .. }) => Failure::OtherLife { asked, actual },
        EraseError::Refused(Refused::Erased { .. }) => Failure::Erased,
        EraseError::Refused(refused) => Failure::Refused(refused.to_string()),
        EraseError::Unavailable(unavailable) => Failure::Unavailable(unavailable.to_string()),
        EraseError::Unfinished { receipt_id, detail, .. } => Failure::Unfinished { receipt_id: receipt_id.0, detail },
        other => Failure::Unknown(other.to_string()),
    }
}

fn erase_error(entity: EntityHash, failure: Failure) -> EraseError {
    match failure {
        Failure::NeverWritten => Refused::NeverWritten { entity }.into(),
        Failure::NotErased => Refused::NotErased { entity }.into(),
        Failure::OtherLife { asked, actual } => Refused::OtherLife { entity, asked, actual }.into(),
        Failure::Unfinished { receipt_id, detail } => {
            EraseError::Unfinished { entity, receipt_id: ReceiptId(receipt_id), detail }
        }
        // Whatever became of it: asking again is right, and gives the receipt.
        Failure::Unknown(detail) => Unavailable::NotErased { entity, detail }.into(),
        other => as_erase_error(entity, error_of(entity, other)),
    }
}

fn as_erase_error(entity: EntityHash, error: kuma_core::AppendError) -> EraseError {
    match error {
        kuma_core::AppendError::Refused(refused) => refused.into(),
        kuma_core::AppendError::Unavailable(unavailable) => unavailable.into(),
        kuma_core::AppendError::Unknown { detail, .. } => Unavailable::NotErased { entity, detail }.into(),
    }
}
