//! A disk that loses power, for tests: a SQLite VFS with a volatile write cache.
//!
//! "Durable" is a promise about what is on the platter, and killing a process does not test it: the page cache
//! survives. This VFS wraps SQLite's own `unix` VFS. Reads see every write, as on Linux; but only what was synced
//! survives a [`PowerLoss::cut`]. It works on ordinary sqlx connections, in process, any number of files, connections
//! and threads at once. It can also make the n-th write or sync fail, with the meaning that a failed sync has on Linux.
//!
//! ```
//! use power_loss::{Disk, PowerLoss};
//! use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
//! use sqlx::{ConnectOptions, Connection, Executor};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let directory = tempfile::tempdir()?;
//! let options = SqliteConnectOptions::new()
//!     .filename(directory.path().join("shard.db"))
//!     .create_if_missing(true)
//!     .journal_mode(SqliteJournalMode::Wal)
//!     .synchronous(SqliteSynchronous::Full);
//!
//! let disk = PowerLoss::register(Disk::Honest);
//! let mut connection = options.clone().vfs(disk.vfs_name().to_owned()).connect().await?;
//! connection.execute("CREATE TABLE event (body TEXT)").await?;
//! connection.execute("INSERT INTO event VALUES ('placed')").await?; // acknowledged, hence durable
//! disk.cut(7);
//! assert!(connection.execute("INSERT INTO event VALUES ('paid')").await.is_err());
//!
//! let mut after = options.connect().await?; // the ordinary VFS, on what the cut left
//! let events: Vec<String> = sqlx::query_scalar("SELECT body FROM event").fetch_all(&mut after).await?;
//! assert_eq!(events, ["placed"]);
//! # after.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is modelled
//! - Data: per file, any subset of the unsynced writes survives, in any order, torn between sectors of 512 bytes; a
//!   sector is always one the page cache held at some instant, and bytes beside a write are never damaged (SQLite's
//!   "powersafe overwrite").
//! - Sizes: a prefix of the unsynced changes of the length survives. Where the length survived and the data did not,
//!   there are zeros, as on ext4 and XFS; never the garbage of an earlier file.
//! - Names: a created file may vanish and a deleted one may come back until its directory is synced. The unix VFS syncs
//!   it with the first sync of each handle on a WAL or journal, and in `xDelete` when SQLite asks for it.
//! - Failed syncs: the writes stay visible and are marked clean; only one caller learns of it. (Linux tells each open
//!   descriptor once; telling fewer is the harder test.)
//! - Memory: `-shm` files are gone, and connections opened after the cut share nothing with those before it.
//!
//! # What is not
//! - Directories themselves, and files that the program writes, syncs, renames or deletes without SQLite: they are as
//!   the real file system has them, and what is in a file when its first connection opens it counts as durable. A
//!   directory that the program syncs itself does not count as synced here.
//! - Bits that rot, sectors that can no longer be read, and torn sectors.
//! - Memory mapping: `mmap_size` is answered with 0. So are chunk sizes and size hints: files grow by writes only.
//! - Other processes on the same files, and `locking_style`s other than the default.
//!
//! # Rules for tests
//! - Open a database through one VFS at a time until the cut. SQLite finds locks and shared memory by inode, whatever
//!   the VFS, but this one does not see the writes of another.
//! - After the cut, old connections may be closed before or after the new ones are opened: the cut put new files under
//!   the names.
//! - A durable file costs its size in memory, an unsynced write its size again.
//!
//! # Unsafe code
//! This is the only crate of the workspace that has any, and all of it is in `vfs.rs` and below: a VFS is a table of C
//! functions. Each of them turns its pointers into safe values and calls `machine.rs`, where the rules are.

mod directory;
mod disk;
mod faults;
mod machine;
mod power;
mod rng;
mod vfs;

pub use faults::{Errno, Fault};
pub use power::{Counts, Disk, PowerLoss};
