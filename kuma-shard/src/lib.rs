//! SQLite files as Kuma uses them: the only crate with SQL in it. It sees sealed bytes only.
//!
//! - [`DataDir`]: the lock and the identity of a data directory.
//! - [`Shard`]: one file, one writer. [`Submission`]s and [`SnapshotRow`]s go in, and are settled once durable; rows come out verified.
//! - [`KeyStore`]: the wrapped keys, in a file of their own.
//! - [`NodeStore`]: who was erased, in a file of its own.
//! - [`ModelFile`], [`ModelReader`]: read models, and queries of them; [`SubscriberFile`]: durable subscriptions.
//! - [`ShardBackup`], [`KeysBackup`]: copies of them in a backup.
//!
//! A database is written by one ractor actor that groups what gathers while a commit is in flight (`writer`), is copied from its
//! log beside it (`checkpointer`), and is compared with its watermark at open (`watermark`). See docs/architecture.md.

mod activation;
mod append_keys;
mod backup_file;
mod book;
mod budget;
mod checkpointer;
mod data_dir;
mod database;
mod entity_row;
mod erase;
mod error;
mod ids;
mod keys;
mod keys_backup;
mod log_book;
mod log_entry;
mod log_reader;
mod log_row;
mod metrics;
mod model;
mod model_reader;
mod model_rights;
mod moving;
mod node;
mod open;
mod packed;
mod progress;
mod reads;
mod replace;
mod residue;
mod row_hash;
mod schema;
mod scrub;
mod shard;
mod shard_backup;
mod shard_restore;
mod slot_record;
mod slots;
mod snapshots;
mod sqlite;
mod statements;
mod stats;
mod subscriber;
mod table_book;
mod tail;
#[cfg(test)]
mod test_shard;
mod verify;
mod watermark;
mod writer;

pub use activation::Activation;
pub use backup_file::CopyError;
pub use budget::{Budget, Permit};
pub use data_dir::{DataDir, DataDirError, STORE_FORMAT, create_directory, sync_directory};
pub use entity_row::EntityRow;
pub use erase::ErasedRows;
pub use error::{CommitError, NotWritten, OpenError, ReadError};
pub use ids::{CopyId, DiskId, EntityHash, Epoch, SLOTS, Slot, TransferId};
pub use keys::{KeyRow, KeyStore, KeysReport};
pub use keys_backup::{KeysBackup, KeysContents};
pub use log_entry::{Commit, OnSettled, Submission};
pub use log_reader::{LogPage, LogReader, ReadRow};
pub use log_row::LogRow;
pub use model::{ModelError, ModelFile, ModelProgress, Purged, Skipped, quoted};
pub use model_reader::{ModelReader, QueryAnswer, QueryError, QueryLimits, QueryParameters};
pub use model_rights::{Guard, Rights};
pub use moving::{ReadBack, SlotRows};
pub use node::{NodeStore, ReceiptRow, Tombstone};
pub use reads::PAGE_BYTES;
pub use residue::{Residue, ResidueFound};
pub use row_hash::Digest;
pub use rusqlite;
pub use schema::FORMAT;
pub use scrub::{BadRow, ScrubPage};
pub use shard::{Shard, ShardOptions};
pub use shard_backup::{CopyProgress, ShardContents, ShardCopied};
pub use shard_restore::{Destroyed, RestoreFileError, ShardBackup, ShardRead};
pub use slot_record::{Content, SlotRecord, Staged, Token, Txn};
pub use snapshots::SnapshotRow;
pub use sqlite::{Durability, FileOptions, missing_build_settings};
pub use stats::StatsView;
pub(crate) use stats::WriterStats;
pub use subscriber::{Acknowledged, ParkedRow, SubscriberFile};
pub use verify::{CommitCheck, ShardReport};
pub use watermark::WATERMARK_DELAY;

/// The first eight bytes of a hash, as SQLite stores an integer.
pub(crate) fn first_eight(hash: &[u8; 32]) -> i64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash;
    i64::from_le_bytes([a, b, c, d, e, f, g, h])
}
