//! What can go wrong with a database file, told by what its owner can do about it.

use std::path::PathBuf;

use crate::Slot;

/// Why a database file could not be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A file that belongs to the store is not there. It is never made anew: an empty file in its place would hide the loss.
    #[error("{path} is missing although this store has it; put the file back or restore the store from a backup")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Acknowledged commits are missing from the file.
    #[error(
        "{path} is at commit {found} but its watermark says {expected}: acknowledged events are missing (a lost, truncated or \
         damaged -wal file, or an old copy of the database); put the original files back or restore the store from a backup"
    )]
    BehindWatermark {
        /// The database.
        path: PathBuf,
        /// The commit counter in the file.
        found: u64,
        /// The commit counter that was acknowledged.
        expected: u64,
    },
    /// The rows in the file are not those that were committed.
    #[error("{path} does not hold what was committed to it ({detail}); restore it from a backup")]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// The watermark file is missing or unreadable, so that a loss could not be noticed.
    #[error(
        "the watermark {path} is {state}, so that a loss of acknowledged events would go unnoticed; put it back or restore the store from a backup"
    )]
    NoWatermark {
        /// The watermark file.
        path: PathBuf,
        /// "missing" or "damaged".
        state: &'static str,
    },
    /// The file is part of another store (or of an older life of this one).
    #[error("{path} belongs to another store or to another copy of this one ({detail}); put the right file back")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What differs.
        detail: String,
    },
    /// A newer Kuma wrote the file.
    #[error(
        "{path} has format {found}, this version of Kuma reads up to {supported}; use the newer version, nothing was changed"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// The file's format.
        found: u32,
        /// The newest format known here.
        supported: u32,
    },
    /// The directory or file may not be written.
    #[error("{path} is read-only; Kuma needs to write there, check the permissions and the mount")]
    ReadOnly {
        /// The file or directory.
        path: PathBuf,
    },
    /// There is no space to open the file.
    #[error("no space left on the disk of {path}; free some and start again, nothing was lost")]
    DiskFull {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("could not open {path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// SQLite refused.
    #[error("could not open {path}")]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// The cause.
        #[source]
        source: sqlx::Error,
    },
}

impl OpenError {
    /// Whether the file's content is lost or damaged, so that the file alone is to be kept out of use. Otherwise the surroundings
    /// (permissions, space, the disk) refused, and nothing can be said about the content.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            OpenError::Missing { .. }
                | OpenError::BehindWatermark { .. }
                | OpenError::Damaged { .. }
                | OpenError::NoWatermark { .. }
                | OpenError::Foreign { .. }
        )
    }
}

/// Why nothing was written. A retry cannot double anything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotWritten {
    /// No space. Reads go on; writes go on by themselves when there is space again.
    #[error("no space left on the disk of {file}; free some, writes then go on by themselves")]
    DiskFull {
        /// The database file's name.
        file: String,
    },
    /// The disk failed, and the file was read back: the commit is not in it.
    #[error("the disk failed under {file} ({detail}); the commit was not written, retry after a while")]
    Io {
        /// The database file's name.
        file: String,
        /// SQLite's words.
        detail: String,
    },
    /// The file is closed after a failure that could not be repaired yet; it is tried again by itself.
    #[error("{file} is closed after a failure ({detail}); it is tried again by itself, retry after a while")]
    Closed {
        /// The database file's name.
        file: String,
        /// What happened.
        detail: String,
    },
    /// An earlier commit that this one was decided on failed. A retry is decided on the true state.
    #[error("an earlier commit of the same entity failed, so that this one was not written; retry")]
    Voided,
    /// The commit does not fit what the file holds (a second writer, or a bug); only this entity is affected.
    #[error("the commit does not follow what {file} holds ({detail}); the entity is read again from the disk, retry")]
    Conflict {
        /// The database file's name.
        file: String,
        /// What did not fit.
        detail: String,
    },
    /// This node does not own the slot.
    #[error("slot {slot} is not owned here")]
    NotOwner {
        /// The slot.
        slot: Slot,
    },
    /// The token of the slot is not what a change of it needs.
    #[error("the token of slot {slot} is not what this change needs; nothing was written, look at it again")]
    TokenChanged {
        /// The slot.
        slot: Slot,
    },
    /// Rows of a slot that is being received do not follow those that are there.
    #[error("the rows of slot {slot} go on at {next_seq}; nothing was written, send them from there")]
    RowsMissing {
        /// The slot.
        slot: Slot,
        /// The place of the next row in the slot's log.
        next_seq: u64,
    },
    /// The entity was erased.
    #[error("the entity was erased")]
    Erased,
    /// The store is shutting down.
    #[error("the store is shutting down")]
    Stopping,
}

/// Why a commit was not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// Surely nothing was written.
    #[error(transparent)]
    NotWritten(#[from] NotWritten),
    /// It may or may not have been written: the file could not be read back.
    #[error(
        "the disk failed under {file} ({detail}) and it could not be read back; the commit may or may not have been written"
    )]
    Unknown {
        /// The database file's name.
        file: String,
        /// What happened.
        detail: String,
    },
}

/// Why something could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A row is not what was committed.
    #[error("{file} holds a damaged row at position {position} ({detail})")]
    BadRow {
        /// The database file's name.
        file: String,
        /// The row's place, or 0 where it is not a log row.
        position: u64,
        /// What does not fit.
        detail: String,
    },
    /// The file's structure is damaged.
    #[error("{file} is damaged")]
    Corrupt {
        /// The database file's name.
        file: String,
        /// The cause.
        #[source]
        source: sqlx::Error,
    },
    /// A sync failed and what is on the disk is not known yet; it is found out by itself.
    #[error(
        "{file} is closed after a failed sync until its log was copied; it is tried again by itself, retry after a while"
    )]
    Closed {
        /// The database file's name.
        file: String,
    },
    /// SQLite or the disk refused; a later retry may succeed.
    #[error("could not read {file}")]
    Sqlite {
        /// The database file's name.
        file: String,
        /// The cause.
        #[source]
        source: sqlx::Error,
    },
}

impl ReadError {
    /// Whether stored bytes are damaged, so that a retry will not help.
    pub fn is_damage(&self) -> bool {
        matches!(self, ReadError::BadRow { .. } | ReadError::Corrupt { .. })
    }
}
