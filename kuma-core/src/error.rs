//! Errors, by what a caller can do about them: refused (asking again is pointless), unknown (look before asking again), unavailable
//! (nothing was written; ask again later).

use std::time::Duration;

use kuma_crypto::MasterKeyError;
use kuma_shard::{CommitError, DataDirError, EntityHash, NotWritten, OpenError, Slot};

use crate::{ReceiptId, Version};

/// The request itself cannot be granted. Nothing was written, and nothing will be however often it is repeated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// The entity has moved on.
    #[error(
        "entity {entity} is at version {actual}, expected {expected}; nothing was written, read it again and decide anew"
    )]
    WrongVersion {
        /// The entity.
        entity: EntityHash,
        /// The version that the caller expected.
        expected: Version,
        /// The version that it has.
        actual: Version,
    },
    /// There is nothing to append.
    #[error("an append needs at least one event")]
    Empty,
    /// One event is too large.
    #[error(
        "event {index} of the append has {bytes} bytes, the limit is {bytes_max}; split it, or keep large content elsewhere and append its name"
    )]
    EventTooLarge {
        /// Place in the append, from 0.
        index: u32,
        /// Its encoded size.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// All events together are too large.
    #[error("the append has at least {bytes} bytes, the limit is {bytes_max}; split it")]
    AppendTooLarge {
        /// The encoded size up to the event that was too much.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The metadata is too large.
    #[error("the metadata has {bytes} bytes, the limit is {bytes_max}; keep large content in an event")]
    MetadataTooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// Too many events.
    #[error("the append has more than {events_max} events; split it")]
    TooManyEvents {
        /// The limit.
        events_max: usize,
    },
    /// The id cannot be used.
    #[error("the entity id is refused: {reason}; an id is 1 to 512 bytes of UTF-8")]
    InvalidId {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The kind cannot be used.
    #[error(
        "the kind ({bytes} bytes) is refused; a kind is 1 to 64 ASCII letters, digits, '_', '-' or '.', starting with a letter"
    )]
    InvalidKind {
        /// Its length.
        bytes: usize,
    },
    /// An event cannot be read back from what would be written.
    #[error("an event of {event} cannot be stored: {detail}")]
    Undecodable {
        /// The event's name, or its kind where it has none.
        event: String,
        /// Why.
        detail: String,
    },
    /// The state has no JSON form.
    #[error("the state has no JSON form: {detail}")]
    NoJson {
        /// Why, in serde's words.
        detail: String,
    },
    /// `apply` panicked. The state is as it was before.
    #[error("applying an event to entity {entity} panicked; nothing was written, mend the kind's `apply` or the event")]
    ApplyPanicked {
        /// The entity.
        entity: EntityHash,
    },
    /// A command's `decide` panicked. The state is as it was before.
    #[error("a command on entity {entity} panicked; nothing was written, mend its `decide`")]
    CommandPanicked {
        /// The entity.
        entity: EntityHash,
    },
    /// The idempotency key was used for a request with other content.
    #[error(
        "entity {entity} has used this idempotency key for another request, which made version {version}; nothing was written, use a new key for a new request"
    )]
    KeyReused {
        /// The entity.
        entity: EntityHash,
        /// The version that the other request made.
        version: Version,
    },
    /// The idempotency key cannot be used.
    #[error("the idempotency key ({bytes} bytes) is refused; a key has 1 to {bytes_max} bytes")]
    InvalidKey {
        /// Its length.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The entity has no such version yet.
    #[error("entity {entity} is at version {newest}, there is no version {asked} yet")]
    NoSuchVersion {
        /// The entity.
        entity: EntityHash,
        /// The version that was asked for.
        asked: Version,
        /// The newest one.
        newest: Version,
    },
    /// A kind's upcasters do not fit its schema version.
    #[error("the upcasters of kind {kind} are refused: {reason}")]
    Upcasters {
        /// The kind.
        kind: String,
        /// What is wrong with them.
        reason: String,
    },
    /// The kind is in use with another Rust type, or as a document.
    #[error(
        "the kind {kind} is in use in this process with another type, or as a document without one; use one type for it, and make it known with `Kuma::register` before `Kuma::raw` or an import asks for the kind"
    )]
    KindMismatch {
        /// The kind.
        kind: String,
    },
    /// The entity was erased.
    #[error("entity {entity} was erased and nothing of it is left; `recreate` starts a new life under the same id")]
    Erased {
        /// The entity.
        entity: EntityHash,
    },
    /// Nothing was ever written to the entity, so that there is nothing to erase.
    #[error("entity {entity} was never written to; there is nothing to erase")]
    NeverWritten {
        /// The entity.
        entity: EntityHash,
    },
    /// Only what was erased can be given a new life.
    #[error("entity {entity} was not erased; use it as it is")]
    NotErased {
        /// The entity.
        entity: EntityHash,
    },
    /// The entity has another life than the one that was to be erased.
    #[error(
        "entity {entity} is in life {actual}, and life {asked} was to be erased; nothing was erased, ask for the life that is meant"
    )]
    OtherLife {
        /// The entity.
        entity: EntityHash,
        /// The life that was to be erased.
        asked: u32,
        /// The life that it has.
        actual: u32,
    },
    /// The kind is the store's own.
    #[error("the kind {kind} is the store's own: it can be read, but neither written to nor erased")]
    ReservedKind {
        /// The kind.
        kind: String,
    },
    /// An entity can only be restored to the end of a commit.
    #[error(
        "version {asked} of entity {entity} is in the middle of the commit of versions {first} to {last}; nothing was changed, take the version before it or its last one"
    )]
    WithinCommit {
        /// The entity.
        entity: EntityHash,
        /// The version that was asked for.
        asked: Version,
        /// The first version of the commit.
        first: Version,
        /// Its last one.
        last: Version,
    },
    /// More than is written in one transaction.
    #[error(
        "the history of entity {entity} has more than {bytes_max} bytes; nothing was changed, export it, erase it, recreate it and import what is wanted"
    )]
    HistoryTooLarge {
        /// The entity.
        entity: EntityHash,
        /// The limit.
        bytes_max: usize,
    },
    /// The node that owns the entity refused the request.
    #[error("{detail}")]
    ByOwner {
        /// In that node's words.
        detail: String,
    },
    /// Whoever asks for an erasure has to say why.
    #[error("the reason is refused: {detail}; say in 1 to 1024 bytes why, and by whom, without naming the person")]
    InvalidReason {
        /// What is wrong with it.
        detail: &'static str,
    },
}

/// It cannot be done now. Nothing was written; the same request may succeed later.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// More is waiting than is allowed to.
    #[error("too much is waiting {place}; retry after {retry_after:?}")]
    Overloaded {
        /// "for entity ..." or "for shard ...".
        place: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// The disk refused, and that is certain.
    #[error("entity {entity}: {cause}")]
    NotWritten {
        /// The entity.
        entity: EntityHash,
        /// What refused.
        cause: NotWritten,
    },
    /// The shard's file was not fit to be opened.
    #[error("shard {shard} is out of use since the store was opened: {why}")]
    ShardOutOfUse {
        /// The shard.
        shard: u16,
        /// Why.
        why: String,
    },
    /// The entity cannot be rebuilt from what is stored.
    #[error("entity {entity} cannot be read: {cause}")]
    Unreadable {
        /// The entity.
        entity: EntityHash,
        /// Why.
        #[source]
        cause: ReplayError,
    },
    /// The entity failed too often; its neighbours are not affected.
    #[error("entity {entity} is quarantined ({why}); it is tried again after {retry_after:?}")]
    Quarantined {
        /// The entity.
        entity: EntityHash,
        /// What happened last.
        why: String,
        /// When it is tried again.
        retry_after: Duration,
    },
    /// The entity's new key could not be made durable.
    #[error("no key could be stored for entity {entity} ({cause}); nothing was written")]
    NoKey {
        /// The entity.
        entity: EntityHash,
        /// Why.
        #[source]
        cause: VaultError,
    },
    /// The entity stopped while the request was waiting; nothing was done.
    #[error("entity {entity} stopped before it came to the request; retry")]
    Interrupted {
        /// The entity.
        entity: EntityHash,
    },
    /// An earlier append of the same [`Sequence`](crate::Sequence) failed.
    #[error(
        "an earlier append to entity {entity} in the same sequence failed; this one was not written, send it again in a new sequence after that one"
    )]
    SequenceBroken {
        /// The entity.
        entity: EntityHash,
    },
    /// The entity is being restored to an earlier version.
    #[error("entity {entity} is being restored to an earlier version; retry")]
    BeingRestored {
        /// The entity.
        entity: EntityHash,
    },
    /// An erasure could not be begun.
    #[error("entity {entity} could not be erased ({detail}); ask again")]
    NotErased {
        /// The entity.
        entity: EntityHash,
        /// What is in the way.
        detail: String,
    },
    /// The slot of the entity is on its way to another node.
    #[error("slot {slot} is moving to another node; retry in a moment")]
    SlotMoves {
        /// The slot.
        slot: Slot,
    },
    /// The node that owns the entity does not answer. Its entities wait for it, and for nobody else.
    #[error("slot {slot} is owned by node {node}, which has not been reached for {}; its entities are unavailable until it is back, retry then", seconds(*.since))]
    OwnerUnreachable {
        /// The slot.
        slot: Slot,
        /// What people call the node.
        node: String,
        /// Since when.
        since: Duration,
    },
    /// No answer came in time, from whichever node owns the entity; nothing was done.
    #[error("no node that owns slot {slot} could be asked within {}; retry", seconds(*.within))]
    NoOwnerFound {
        /// The slot.
        slot: Slot,
        /// How long it was tried.
        within: Duration,
    },
    /// The node that owns the entity cannot do it now; nothing was done.
    #[error("{detail}")]
    AtOwner {
        /// In that node's words.
        detail: String,
    },
    /// The slot of the entity is another node's.
    #[error(
        "slot {slot} is not owned by this node; ask the node that owns it, or any node of the cluster by its own interface"
    )]
    SlotElsewhere {
        /// The slot.
        slot: Slot,
    },
    /// The store is shutting down.
    #[error("the store is shutting down")]
    ShuttingDown,
}

/// Why an append failed.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Nothing was written, and a retry is pointless.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Nothing was written; a retry is safe.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// It may or may not have been written, all of it or none.
    #[error("the outcome of the write to entity {entity} is unknown ({detail}); {}", advice(*.has_key))]
    Unknown {
        /// The entity.
        entity: EntityHash,
        /// What happened.
        detail: String,
        /// Whether it had an idempotency key, so that sending it again with the same key is safe.
        has_key: bool,
    },
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

fn advice(has_key: bool) -> &'static str {
    if has_key {
        "send it again with the same idempotency key: it happens once"
    } else {
        "read the entity before trying again"
    }
}

impl AppendError {
    pub(crate) fn from_commit(entity: EntityHash, error: CommitError, has_key: bool) -> Self {
        match error {
            CommitError::NotWritten(NotWritten::Erased) => Refused::Erased { entity }.into(),
            CommitError::NotWritten(cause) => Unavailable::NotWritten { entity, cause }.into(),
            CommitError::Unknown { detail, .. } => AppendError::Unknown { entity, detail, has_key },
        }
    }

    /// Whether the same request can be repeated without any risk of doubling it, and with a chance. Not within a
    /// [`Sequence`](crate::Sequence), which one failure breaks for good: begin a new one.
    pub fn is_retry_safe(&self) -> bool {
        match self {
            AppendError::Unavailable(Unavailable::SequenceBroken { .. }) | AppendError::Refused(_) => false,
            AppendError::Unavailable(_) => true,
            AppendError::Unknown { has_key, .. } => *has_key,
        }
    }
}

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The request cannot be granted.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It cannot be done now.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

impl ReadError {
    /// Why an entity's events could not be had.
    pub(crate) fn unreadable(entity: EntityHash, cause: impl Into<ReplayError>) -> Self {
        match cause.into() {
            ReplayError::Erased | ReplayError::Vault(VaultError::KeyDestroyed) => Refused::Erased { entity }.into(),
            ReplayError::Replaced => Unavailable::BeingRestored { entity }.into(),
            cause => Unavailable::Unreadable { entity, cause }.into(),
        }
    }
}

impl From<ReadError> for AppendError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Refused(refused) => refused.into(),
            ReadError::Unavailable(unavailable) => unavailable.into(),
        }
    }
}

/// Why an erasure did not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EraseError {
    /// It cannot be granted. Nothing was erased.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It could not be begun. Nothing was erased; ask again.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// It has begun and cannot be undone: the entity answers as erased already. What is left is done by the store itself, again and again until
    /// it succeeds, also after a restart. Ask again for the receipt. (Rarely, after a failing disk, it is not known yet whether it has begun; the
    /// detail says so then, and asking again is right in any case.)
    #[error(
        "the erasure {receipt_id} of entity {entity} has begun and goes on by itself, but is not complete ({detail}); ask again for the receipt"
    )]
    Unfinished {
        /// The entity.
        entity: EntityHash,
        /// The name of the erasure.
        receipt_id: ReceiptId,
        /// What is in the way.
        detail: String,
    },
}

impl From<ReadError> for EraseError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Refused(refused) => refused.into(),
            ReadError::Unavailable(unavailable) => unavailable.into(),
        }
    }
}

/// Why an entity could not be rebuilt from its events.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The shard's file.
    #[error(transparent)]
    Storage(#[from] kuma_shard::ReadError),
    /// The key.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// They were erased, perhaps while they were being read.
    #[error("it was erased")]
    Erased,
    /// It is being restored to an earlier version.
    #[error("it is being restored to an earlier version")]
    Replaced,
    /// The sealed events were altered, or belong elsewhere.
    #[error("the commit at version {version} does not open with the entity's key; restore it from a backup")]
    DoesNotOpen {
        /// The first version of the commit.
        version: Version,
    },
    /// Versions are missing.
    #[error("version {found} stands where {expected} belongs; restore it from a backup")]
    Gap {
        /// The version that should come next.
        expected: Version,
        /// The one that does.
        found: Version,
    },
    /// An event that the kind's type does not know. It is kept.
    #[error(
        "event {event} of kind {kind} at version {version} cannot be read ({detail}); nothing is lost, use a version of the kind that knows it"
    )]
    Undecodable {
        /// The kind.
        kind: String,
        /// The event's stored name.
        event: String,
        /// The first version of its commit.
        version: Version,
        /// Why.
        detail: String,
    },
    /// The kind's code panicked.
    #[error(
        "the code of kind {kind} panicked on the events at version {version}; mend its `apply`, `Default` or `Deserialize`"
    )]
    Panicked {
        /// The kind.
        kind: String,
        /// The first version of the commit.
        version: Version,
    },
}

impl ReplayError {
    /// Events of a kind, from `version` on, that its type cannot read.
    pub(crate) fn undecodable(kind: &str, version: u64, event: String, detail: String) -> Self {
        let (kind, version) = (kind.to_owned(), Version(version));
        ReplayError::Undecodable { kind, event, version, detail }
    }

    /// Whether the fault is the entity's own, so that it counts towards its quarantine; a closed file or a KMS that does not
    /// answer is nobody's fault.
    pub(crate) fn is_own_fault(&self) -> bool {
        match self {
            ReplayError::Storage(error) => error.is_damage(),
            ReplayError::Vault(error) => matches!(error, VaultError::KeyMissing),
            _ => true,
        }
    }

    /// Whether stored bytes are damaged, so that trying again cannot help.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            ReplayError::Storage(error) => error.is_damage(),
            ReplayError::DoesNotOpen { .. } | ReplayError::Gap { .. } => true,
            _ => false,
        }
    }
}

/// Why a key could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VaultError {
    /// `keys.db` does not have it.
    #[error(
        "keys.db does not have the entity's key, so that its events cannot be read; restore keys.db from its backup"
    )]
    KeyMissing,
    /// A secret of the store itself is gone, without which none of its entities can be found.
    #[error(
        "keys.db does not have the store's own secret {name}, so that no entity can be found; restore keys.db from its backup"
    )]
    SecretMissing {
        /// Which one.
        name: &'static str,
    },
    /// The key was destroyed: the entity was erased.
    #[error("the entity's key was destroyed when it was erased")]
    KeyDestroyed,
    /// `keys.db` cannot be read.
    #[error(transparent)]
    Read(#[from] kuma_shard::ReadError),
    /// `keys.db` cannot be written.
    #[error(transparent)]
    Write(#[from] CommitError),
    /// The master key does not open it, or its provider does not answer.
    #[error(transparent)]
    MasterKey(#[from] MasterKeyError),
}

/// Why a store could not be started. No stored row was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// An option has a value that cannot be.
    #[error("the option {option} is refused: {reason}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The store is that of a node in a cluster.
    #[error("{path} is the store of a node in a cluster, which must not be opened without it; start the node")]
    Clustered {
        /// The data directory.
        path: std::path::PathBuf,
    },
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// A database file.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The master key.
    #[error("no master key, without which nothing in the store can be read: {0}")]
    MasterKey(#[source] MasterKeyError),
    /// The master key is not the one that this store's keys are wrapped with.
    #[error("the master key does not open this store; use the one it was created with, nothing was changed")]
    WrongMasterKey(#[source] MasterKeyError),
    /// A key of the store could not be had: `keys.db` could not be read or written, or the master key's provider does not answer.
    #[error("the store's own key could not be had, without which nothing in it can be read; no event was changed")]
    Vault(#[source] VaultError),
    /// What is known of erased entities cannot be read, or a key of one that was there again could not be destroyed. An erased entity might be
    /// served otherwise.
    #[error("the erasures of this store could not be checked: {0}")]
    Erasures(String),
    /// An actor could not be started.
    #[error("the store could not start its actors: {0}")]
    Actors(String),
}
