//! Kuma, embedded: an event store in which each entity is one actor, and each change an immutable event that is sealed with the
//! entity's own key and on the disk before it is acknowledged.
//!
//! ```
//! use kuma_core::{Entity, Kuma, Options, Version};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Default, Clone, Serialize, Deserialize)]
//! struct Account { balance: i64 }
//!
//! #[derive(Serialize, Deserialize)]
//! enum AccountEvent { Deposited { amount: i64 }, Withdrawn { amount: i64 } }
//!
//! impl Entity for Account {
//!     const KIND: &'static str = "account";
//!     type Event = AccountEvent;
//!     fn apply(&mut self, event: &AccountEvent) {
//!         match event {
//!             AccountEvent::Deposited { amount } => self.balance += amount,
//!             AccountEvent::Withdrawn { amount } => self.balance -= amount,
//!         }
//!     }
//! }
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path();
//! let kuma = Kuma::start(Options::new(path)).await?;
//! let account = kuma.entity::<Account>("acc_001");
//! let deposited = account.append(AccountEvent::Deposited { amount: 1000 }).await?; // on the disk when it returns
//! let version = account.append(AccountEvent::Withdrawn { amount: 200 }).expecting(deposited).await?;
//! assert_eq!((account.read().await?.balance, version), (800, Version(2)));
//! kuma.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! What is promised: docs/guarantees.md. How it is built: docs/architecture.md.

mod actor;
mod append;
mod archive;
mod audit;
mod backup;
mod body;
mod checkpoint;
mod cluster_logs;
mod command;
mod durable;
mod elsewhere;
mod entity;
mod erase;
mod erasure;
mod error;
mod evolution;
mod execute;
mod export;
mod feed;
mod filter;
mod gates;
mod handle;
mod history;
mod identity;
mod import;
mod kind;
mod kind_options;
mod ledger;
mod left_out;
mod live;
mod model_dir;
mod model_page;
mod model_query;
mod ndjson;
mod observe;
mod options;
mod projection;
mod projections;
mod projector;
mod receipt;
mod replay;
mod reply;
mod restart;
mod restore;
mod restore_to;
mod retry;
mod root;
mod scan;
mod scrub;
mod sequence;
mod shard_core;
mod slot_feed;
mod slot_snapshots;
mod slots;
mod snapshot;
mod snapshotter;
mod sql_projection;
mod state_shape;
mod store;
mod subscribe;
mod supervisor;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod time_travel;
mod vault;
mod verify;
mod verify_receipt;

pub use append::{Append, Appended, Pending};
pub use audit::{AuditEvent, AuditLog, Denial, Operation};
pub use backup::{
    Backup, BackupContents, BackupError, BackupProgress, BackupReport, BackupStep, KeysBackupReport,
    manifest::{
        Backed, BackupFileEntry, BackupOf, EventsManifest, KeysManifest, LedgerEntry, ManifestError, ShardEntry,
    },
};
pub use checkpoint::{Checkpoint, CheckpointError};
pub use cluster_logs::{
    ClusterEvents, ClusterGauge, ClusterLogs, ClusterPage, ClusterPlace, ClusterReader, FollowFrom,
};
pub use command::{Command, ExecuteError, Executed};
pub use durable::{DurableCheckpoint, DurableError, DurableSubscription, OpenDurable, Parked, SubscriptionStatus};
pub use elsewhere::{Elsewhere, ErasedLife, OtherDisks, ToldReceipt};
pub use entity::{Entity, Metadata, NewEvent, RecordedEvent, Version};
pub use erase::ErasedMany;
pub use error::{AppendError, EraseError, ReadError, Refused, ReplayError, StartError, Unavailable, VaultError};
pub use evolution::Upcasters;
pub use execute::{Execute, Executing};
pub use export::{ExportError, ExportProgress};
pub use feed::Unreadable;
pub use filter::Filter;
pub use gates::Gate;
pub use handle::{Current, Handle, RawHandle};
pub use history::{Direction, History};
pub use identity::slot_of;
pub use import::{Import, ImportError, ImportProblem, ImportProgress, ImportReport};
pub use kind_options::KindOptions;
pub use kuma_crypto::{LocalMasterKey, MasterKey, MasterKeyError, PublicKey};
pub use kuma_shard::{
    CommitError, Content, CopyError, DataDirError, DiskId, Durability, EntityHash, Epoch, ModelError, NotWritten,
    OpenError, QueryError, ReadBack, ReadError as StorageError, SLOTS, ShardReport, Skipped, Slot, SlotRecord, Staged,
    StatsView, Token, TransferId, Txn, rusqlite,
};
pub use ledger::{LedgerError, LedgerSummary};
pub use model_dir::ModelBuild;
pub use model_query::{Answer, AsOf, Query};
pub use ndjson::{LineProblem, Manifest, Unfit};
pub use options::{MasterKeySource, Options, Seat};
pub use projection::{ApplyError, ErasureRule, Projection, StoredEvent};
pub use projections::{ModelStatus, ProjectionError, ProjectionHandle, ProjectionStatus};
pub use projector::{ProjectionFailure, ProjectionState};
pub use receipt::{LastBackups, Reason, Receipt, ReceiptError, ReceiptId, Statement, StoreOutcome};
pub use restore::{Restore, RestoreError, RestoreProgress, RestoreReport, RestoreStep, RestoreWarning};
pub use restore_to::Restored;
pub use retry::Outcome;
pub use scrub::ScrubStats;
pub use sequence::Sequence;
pub use slot_feed::{FedCommit, FedEvent, FedItem, FeedAnswer, FeedAsk, FeedPart, SlotEnds};
pub use slot_snapshots::SlotSnapshot;
pub use slots::{SlotChunk, SlotCopy, SlotError, SlotKey, Slots};
pub use sql_projection::{SqlProjection, SqlProjectionError};
pub use store::{Kuma, ShardStats, Stats};
pub use subscribe::{Delivery, Erased, Start, Subscribe, SubscribeError, Subscription};
pub use time_travel::{Change, Diff};
pub use verify::{EventName, ShardVerification, Verification};
pub use verify_receipt::{Check, ReceiptVerification};

/// Microseconds since 1970; what lies before is 0.
pub(crate) fn micros(at: std::time::SystemTime) -> i64 {
    let since = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// The quick start of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
mod readme {}
