//! Erasing, as a caller sees it: one entity, many, their receipts, and a new life.

use std::sync::Arc;

use futures_util::future::join_all;
use kuma_crypto::{IdHash, KeyId, PublicKey, seal_id};
use kuma_shard::{CommitError, CopyId, EntityHash, EntityRow, NotWritten};
use tokio::sync::oneshot;

use crate::{
    AppendError, Entity, EraseError, Handle, Kuma, RawHandle, ReadError, Reason, Receipt, ReceiptId, Refused,
    Unavailable, VaultError,
    audit::{AuditEvent, patiently},
    erasure::{EraserMessage, Request},
};

/// Erasures that [`Kuma::erase_many`] asks for at once: a batch in work, and the one behind it.
const IN_FLIGHT: usize = 256;

/// What [`Kuma::erase_many`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErasedMany {
    /// Entities that are erased, now or before.
    pub erased: u64,
    /// Entities that there was nothing of.
    pub never_written: u64,
    /// Entities that could not be erased, or whose erasure is not complete. Ask again.
    pub failed: u64,
}

impl RawHandle {
    /// Erases the entity: all its events, its snapshot, its id and its key, from every live file. Returns the signed receipt once that is
    /// done; an entity that was erased before gives its receipt again.
    ///
    /// Once it has begun there is no way back. From then on everybody is answered [`Refused::Erased`]; what was sent before is
    /// still written, and erased. A crash at any point does no harm: the erasure goes on when the store is opened again. What remains is the
    /// keyed hash of kind and id, and of each commit a stub with its place, version and number of events. Copies elsewhere
    /// (backups, exports, read models of one's own, values that a caller still holds) are not reached; of backups only sealed bytes are left, as soon
    /// as the backup of the keys is gone too.
    ///
    /// `reason` goes into the audit log ([`Kuma::audit_log`]), which is never erased: name neither the person nor the entity in it.
    ///
    /// ```
    /// # use kuma_core::{Kuma, NewEvent, Options, ReadError, Reason, Refused};
    /// # use serde_json::json;
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let kuma = Kuma::start(Options::new(dir.path())).await?;
    /// let customer = kuma.raw("customer", "ann@example.org");
    /// customer.append(NewEvent::json("Registered", &json!({"name": "Ann"}))?).await?;
    /// let receipt = customer.erase(Reason::new("request 4711").by("support")).await?;
    /// receipt.verify(&kuma.public_key())?;
    /// println!("{receipt}"); // JSON: keep it
    /// assert!(matches!(customer.read().await, Err(ReadError::Refused(Refused::Erased { .. }))));
    /// # kuma.shutdown().await;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// See [`EraseError`]: refused, not begun, or begun and not complete.
    /// # Cancel safety
    /// If the future is dropped the erasure may or may not begin; ask again for the receipt.
    pub async fn erase(&self, reason: Reason) -> Result<Receipt, EraseError> {
        self.ask_to_erase(&Arc::new(reason), None).await
    }

    /// Erases this life of the entity and no other: the first life is 1, and [`RawHandle::recreate`] says which one it began. For requests that may
    /// come late or twice: if the entity has another life by now that is left alone, and a life that was erased gives its receipt again.
    ///
    /// # Errors
    /// [`Refused::OtherLife`] if the entity has another life and there is no receipt of this one; all others as [`RawHandle::erase`].
    /// # Cancel safety
    /// As [`RawHandle::erase`].
    pub async fn erase_life(&self, life: u32, reason: Reason) -> Result<Receipt, EraseError> {
        self.ask_to_erase(&Arc::new(reason), Some(life)).await
    }

    async fn ask_to_erase(&self, reason: &Arc<Reason>, life: Option<u32>) -> Result<Receipt, EraseError> {
        reason.check()?;
        self.check_writable()?;
        let who = self.who()?;
        let core = self.core()?.clone();
        let entity = who.identity.hash;
        let (reply, answer) = oneshot::channel();
        let request = Request { entity, core, slot: who.identity.slot, life, reason: reason.clone(), reply };
        let gone = || EraseError::from(Unavailable::ShuttingDown);
        let eraser = self.store().eraser().ok_or_else(gone)?;
        eraser.cast(EraserMessage::Erase(request)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Starts a new life of an erased entity, and returns its number: with a new key, without events, at version 0. Nothing of the
    /// lives before comes back.
    ///
    /// # Errors
    /// [`Refused::NotErased`] if it was not erased, [`Refused::Erased`] while the erasure is not complete yet; the other variants say what is in
    /// the way.
    /// # Cancel safety
    /// If the future is dropped the new life may or may not have begun.
    pub async fn recreate(&self, reason: Reason) -> Result<u32, EraseError> {
        reason.check()?;
        self.check_writable()?;
        let who = self.who()?;
        // In this order: whoever closes the slot's gate waits for work that has begun.
        let _working = self.store().erasing().work_in(who.identity.slot);
        let core = self.core()?;
        let (entity, kind) = (who.identity.hash, who.kind.name());
        let unreadable = |error: kuma_shard::ReadError| EraseError::from(ReadError::unreadable(entity, error));
        let find = async || core.shard.find_entity(CopyId::LIVE, entity).await.map_err(unreadable);
        let Some(former) = find().await?.filter(|row| row.erased_at_us.is_some()) else {
            return Err(Refused::NotErased { entity }.into());
        };
        if core.is_erasing(&former) {
            return Err(Refused::Erased { entity }.into());
        }
        let life = former.life + 1;
        let event = AuditEvent::recreated(entity, life, &reason);
        let audit = self.store().own_audit_log();
        patiently(|| audit.append(event.clone())).await.map_err(not_recreated)?;
        let no_key = |cause: VaultError| EraseError::from(Unavailable::NoKey { entity, cause });
        let (key_id, key) = core.vault.create(entity).await.map_err(no_key)?;
        let row = EntityRow {
            eid: 0,
            life,
            sealed_id: seal_id(&key, kind, IdHash(entity.0), KeyId(key_id.0), &who.identity.id),
            key_id: key_id.0,
            created_at_us: core.settings.wall_clock.now_us(),
            erased_at_us: None,
            ..former
        };
        match core.shard.create_entity(row).await {
            Ok(()) => {}
            // Somebody else was faster.
            Err(CommitError::NotWritten(NotWritten::Conflict { .. }))
                if find().await?.is_some_and(|row| row.life >= life) =>
            {
                return Ok(life);
            }
            Err(error) => return Err(not_recreated(AppendError::from_commit(entity, error, true))),
        }
        Ok(life)
    }
}

fn not_recreated(error: AppendError) -> EraseError {
    match error {
        AppendError::Refused(refused) => refused.into(),
        AppendError::Unavailable(unavailable) => unavailable.into(),
        AppendError::Unknown { entity, detail, .. } => Unavailable::NotErased { entity, detail }.into(),
    }
}

impl<E: Entity> Handle<E> {
    /// Erases the entity. See [`RawHandle::erase`].
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

impl Kuma {
    /// Erases many entities, in batches that share their syncs: much faster than one after the other. `each` is told how each one ended, with
    /// the entity's hash (none if its kind or id is refused); one that fails does not keep the others from being erased. Cut short, it is simply
    /// called again with the same entities.
    ///
    /// # Errors
    /// The reason is refused. Whatever else fails is told to `each`, and counted.
    /// # Cancel safety
    /// Those that had begun when the future is dropped are erased all the same.
    pub async fn erase_many(
        &self,
        entities: impl IntoIterator<Item = RawHandle>,
        reason: Reason,
        mut each: impl FnMut(Option<EntityHash>, &Result<Receipt, EraseError>),
    ) -> Result<ErasedMany, EraseError> {
        reason.check()?;
        let reason = Arc::new(reason);
        let mut done = ErasedMany::default();
        let mut entities = entities.into_iter().peekable();
        while entities.peek().is_some() {
            let batch: Vec<RawHandle> = entities.by_ref().take(IN_FLIGHT).collect();
            let outcomes = join_all(batch.iter().map(|handle| handle.ask_to_erase(&reason, None))).await;
            for (handle, outcome) in batch.iter().zip(outcomes) {
                each(handle.hash(), &outcome);
                match outcome {
                    Ok(_) => done.erased += 1,
                    Err(EraseError::Refused(Refused::NeverWritten { .. })) => done.never_written += 1,
                    Err(_) => done.failed += 1,
                }
            }
        }
        Ok(done)
    }

    /// The receipt of a completed erasure.
    ///
    /// # Errors
    /// `node.db` cannot be read.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn receipt(&self, id: ReceiptId) -> Result<Option<Receipt>, kuma_shard::ReadError> {
        let body = self.inner.node().receipt(id.0).await?;
        // It was written by this store; what is damaged the digest of its file tells.
        Ok(body.and_then(|body| body.parse().ok()))
    }

    /// How many erasures have begun and are not complete. They go on by themselves.
    pub fn erasures_unfinished(&self) -> usize {
        self.inner.erasing().len()
    }

    /// The key that this store's receipts are verified with. Keep a copy of it elsewhere.
    pub fn public_key(&self) -> PublicKey {
        self.vault().node_key().public()
    }
}
