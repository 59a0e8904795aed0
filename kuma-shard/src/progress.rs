//! The `progress` row: one row that each transaction rewrites, under a checksum of its own.

use sqlx::{Row, SqliteConnection};

use crate::{Digest, book::Progress, statements::Bound};

/// What the row holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    /// Transactions so far. The watermark compares it, and a writer reads it back after a failure.
    pub(crate) commits: u64,
    pub(crate) progress: Progress,
}

fn checksum(stored: &Stored) -> i64 {
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(&stored.commits.to_le_bytes());
    bytes[8..16].copy_from_slice(&stored.progress.next_position.to_le_bytes());
    bytes[16..24].copy_from_slice(&stored.progress.mark_position.to_le_bytes());
    bytes[24..32].copy_from_slice(&stored.progress.indexed_position.to_le_bytes());
    bytes[32..64].copy_from_slice(&stored.progress.digest.to_bytes());
    i64::from(crc32c::crc32c(&bytes))
}

/// Rewrites the row; its parameters are bound by [`bind`].
pub(crate) const UPDATE: &str = "UPDATE progress SET commits = ?, next_position = ?, mark_position = ?, indexed_position = ?, digest = ?, checksum = ? WHERE one = 1";

/// Binds the parameters of [`UPDATE`].
pub(crate) fn bind(query: Bound, stored: &Stored) -> Bound {
    query
        .bind(stored.commits.cast_signed())
        .bind(stored.progress.next_position.cast_signed())
        .bind(stored.progress.mark_position.cast_signed())
        .bind(stored.progress.indexed_position.cast_signed())
        .bind(stored.progress.digest.to_bytes().to_vec())
        .bind(checksum(stored))
}

/// Inserts the row of a new file.
pub(crate) async fn insert(connection: &mut SqliteConnection, stored: &Stored) -> sqlx::Result<()> {
    let insert = sqlx::query(
        "INSERT INTO progress(commits, next_position, mark_position, indexed_position, digest, checksum, one) VALUES (?, ?, ?, ?, ?, ?, 1)",
    );
    bind(insert, stored).execute(connection).await?;
    Ok(())
}

/// Reads the row; `None` where it does not match its checksum.
pub(crate) async fn read(connection: &mut SqliteConnection) -> sqlx::Result<Option<Stored>> {
    let row = sqlx::query(
        "SELECT commits, next_position, mark_position, indexed_position, digest, checksum FROM progress WHERE one = 1",
    )
    .fetch_one(connection)
    .await?;
    let number = |index| row.try_get::<i64, _>(index).map(i64::cast_unsigned);
    let Ok(digest) = row.try_get::<Vec<u8>, _>(4)?.try_into() else { return Ok(None) };
    let stored = Stored {
        commits: number(0)?,
        progress: Progress {
            next_position: number(1)?,
            mark_position: number(2)?,
            indexed_position: number(3)?,
            digest: Digest::from_bytes(digest),
        },
    };
    Ok((row.try_get::<i64, _>(5)? == checksum(&stored)).then_some(stored))
}
