//! The audit log: who had what erased, when and why, who was denied what, and what was asked of the cluster. An entity like any other, of a kind that only the store writes to and that cannot be
//! erased; without personal data, as long as the reasons that callers give have none.

use std::sync::Arc;

use kuma_crypto::IdSecret;
use kuma_shard::EntityHash;
use serde::{Deserialize, Serialize};

use crate::{Append, AppendError, Entity, Handle, Kuma, Reason, ReceiptId, Unavailable, Version, store::Inner};

/// The id of the one entity of this kind.
const ID: &str = "erasures";
/// Kinds that begin so are the store's own.
const RESERVED: &str = "kuma.";

/// What the audit log counts. Its history tells the rest: [`Kuma::audit_log`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditLog {
    /// Erasures that were asked for.
    pub requested: u64,
    /// Those that were completed.
    pub completed: u64,
    /// New lives of erased entities.
    pub recreated: u64,
    /// Entities that were to be restored to an earlier version.
    pub restored: u64,
    /// Requests that were denied.
    #[serde(default)]
    pub denied: u64,
    /// What was asked of the cluster through this node.
    #[serde(default)]
    pub operated: u64,
}

/// What the audit log tells. The times are those of its commits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AuditEvent {
    /// An erasure was asked for, and began right after unless something came between. Then it was refused, or nobody was answered.
    ErasureRequested {
        /// The name of the erasure.
        receipt: ReceiptId,
        /// The keyed hash of the entity, in hex.
        entity: String,
        /// Why, in the caller's words.
        why: String,
        /// On whose behalf, in the caller's words.
        by: Option<String>,
    },
    /// An erasure came to its end; the receipt is stored.
    ErasureCompleted {
        /// The name of the erasure.
        receipt: ReceiptId,
    },
    /// An entity was about to be restored to an earlier version, as a new life. The life before is erased under the name of the receipt, if it
    /// came to that.
    Restored {
        /// The name of the erasure of the life before.
        receipt: ReceiptId,
        /// The keyed hash of the entity, in hex.
        entity: String,
        /// Which life it has from then on.
        life: u32,
        /// To which version.
        version: u64,
        /// Why, in the caller's words.
        why: String,
        /// On whose behalf, in the caller's words.
        by: Option<String>,
    },
    /// Requests were denied.
    Denied(Denial),
    /// Something was asked of the cluster, and was done right after unless something came between.
    Operated(Operation),
    /// An erased entity was about to be given a new life.
    Recreated {
        /// The keyed hash of the entity, in hex.
        entity: String,
        /// Which life.
        life: u32,
        /// Why, in the caller's words.
        why: String,
        /// On whose behalf, in the caller's words.
        by: Option<String>,
    },
}

/// Requests that a server denied for one and the same reason, see [`Kuma::audit_denials`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// The name of the token that they came with; none if they had none, or one that is not known.
    pub token: Option<String>,
    /// The right that they would have needed.
    pub scope: String,
    /// What they asked for, without the names of entities: `DELETE /v1/entities/{kind}/{id}`.
    pub request: String,
    /// Why they were denied.
    pub why: String,
    /// How many.
    pub times: u64,
}

/// What an operator asked of the cluster, see [`Kuma::audit_operation`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// The name of the token that it came with; none if it had none.
    pub token: Option<String>,
    /// What: `migrate`, `drain`, `undrain`, `forget`, `attest_destroyed`.
    pub act: String,
    /// The node that it is about, by name, or as it was named.
    pub node: Option<String>,
    /// The slot that it is about.
    pub slot: Option<u16>,
}

impl Entity for AuditLog {
    const KIND: &'static str = "kuma.audit";
    type Event = AuditEvent;

    fn apply(&mut self, event: &AuditEvent) {
        match event {
            AuditEvent::ErasureRequested { .. } => self.requested += 1,
            AuditEvent::ErasureCompleted { .. } => self.completed += 1,
            AuditEvent::Recreated { .. } => self.recreated += 1,
            AuditEvent::Restored { .. } => self.restored += 1,
            AuditEvent::Denied(denial) => self.denied += denial.times,
            AuditEvent::Operated(_) => self.operated += 1,
        }
    }
}

impl AuditEvent {
    pub(crate) fn requested(receipt: ReceiptId, entity: EntityHash, reason: &Reason) -> Self {
        let Reason { why, by } = reason.clone();
        AuditEvent::ErasureRequested { receipt, entity: entity.to_hex(), why, by }
    }

    pub(crate) fn restored(
        receipt: ReceiptId,
        entity: EntityHash,
        life: u32,
        version: Version,
        reason: &Reason,
    ) -> Self {
        let Reason { why, by } = reason.clone();
        AuditEvent::Restored { receipt, entity: entity.to_hex(), life, version: version.0, why, by }
    }

    pub(crate) fn recreated(entity: EntityHash, life: u32, reason: &Reason) -> Self {
        let Reason { why, by } = reason.clone();
        AuditEvent::Recreated { entity: entity.to_hex(), life, why, by }
    }
}

/// By what the audit log is known.
pub(crate) fn entity_hash(ids: &IdSecret) -> EntityHash {
    EntityHash(ids.hash(AuditLog::KIND, ID).0)
}

/// Whether only the store writes to entities of this kind.
pub(crate) fn is_reserved(kind: &str) -> bool {
    kind.starts_with(RESERVED)
}

/// Sends an append to the audit log until there is room for it: what is noted there is not given up because the log, or its shard, is busy.
pub(crate) async fn patiently<'a>(append: impl Fn() -> Append<'a>) -> Result<Version, AppendError> {
    loop {
        match append().await {
            Err(AppendError::Unavailable(Unavailable::Overloaded { retry_after, .. })) => {
                tokio::time::sleep(retry_after).await;
            }
            other => return other,
        }
    }
}

impl Inner {
    /// The audit log for the store itself.
    pub(crate) fn own_audit_log(self: &Arc<Self>) -> Handle<AuditLog> {
        let log = Kuma { inner: self.clone() }.audit_log();
        Handle::new(log.raw().clone().privileged())
    }
}

impl Kuma {
    /// Notes in the audit log that a server denied requests. Returns when that is durable. For servers in front of a store: they gather what
    /// they deny meanwhile, so that whoever asks for nothing but to be denied does not fill the disk.
    ///
    /// # Errors
    /// The audit log cannot be written.
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub async fn audit_denials(&self, denials: Vec<Denial>) -> Result<(), AppendError> {
        let log = self.inner.own_audit_log();
        patiently(|| log.append_all(denials.iter().cloned().map(AuditEvent::Denied))).await.map(drop)
    }

    /// Notes in the audit log what an operator asks of the cluster, before it is done. Returns when that is durable.
    ///
    /// # Errors
    /// The audit log cannot be written.
    /// # Cancel safety
    /// Not cancel safe: if the future is dropped the outcome is unknown.
    pub async fn audit_operation(&self, operation: Operation) -> Result<(), AppendError> {
        let log = self.inner.own_audit_log();
        patiently(|| log.append(AuditEvent::Operated(operation.clone()))).await.map(drop)
    }

    /// The audit log: who had what erased, when and why. Read its history; nobody but the store can append to it.
    pub fn audit_log(&self) -> Handle<AuditLog> {
        self.entity(ID)
    }
}
