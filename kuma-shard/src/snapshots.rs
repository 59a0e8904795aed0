//! Snapshots: the saved state of an entity, so that it need not be replayed from its first event.
//!
//! Invariants:
//! - A snapshot is only a cache. It has no position and is in no digest, and it is given up before a commit fails because of it.
//! - It is written by the same writer as the log, and never says more than the log holds then.
//! - The newest one stays. One of another schema replaces it whatever its version: the state of a former shape is of no use.
//! - A new one is a new row at the end; that of the one before is emptied where it stands (see `schema.rs`).

use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use crate::{OnSettled, ReadError, Shard, log_entry::LogEntry, packed};

/// The saved state of one entity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRow {
    /// The number of the entity.
    pub eid: i64,
    /// The version that the state is of.
    pub version: u64,
    /// The shape of the state.
    pub schema: u64,
    /// The state, sealed.
    pub body: Vec<u8>,
}

impl Shard {
    /// The snapshot of the entity with this number. Its body is not verified: the seal does that.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn find_snapshot(&self, eid: i64) -> Result<Option<SnapshotRow>, ReadError> {
        self.check_readable()?;
        let row = sqlx::query("SELECT version, schema, body FROM snapshot WHERE eid = ?")
            .bind(eid)
            .fetch_optional(&self.database().readers)
            .await
            .map_err(|error| self.read_error(error))?;
        let Some(row) = row else { return Ok(None) };
        let number = |name| row.try_get::<i64, _>(name).map(i64::cast_unsigned);
        let read = || {
            Ok(SnapshotRow { eid, version: number("version")?, schema: number("schema")?, body: row.try_get("body")? })
        };
        read().map(Some).map_err(|error| self.read_error(error))
    }

    /// The snapshots of those of these entities that have one of at most so many bytes, until they make `bytes_max` together. As
    /// [`Shard::find_snapshot`].
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn snapshots_of(&self, eids: &[i64], bytes_max: usize) -> Result<Vec<SnapshotRow>, ReadError> {
        self.check_readable()?;
        // Lengths first: to look at one SQLite does not read the body.
        let lengths = "SELECT eid, length(body) FROM snapshot WHERE eid IN (SELECT value FROM json_each(?)) ORDER BY length(body)";
        let lengths = sqlx::query(lengths).bind(packed::numbers(eids)).fetch_all(self.feeders()).await;
        let (mut wanted, mut bytes) = (Vec::new(), 0);
        for row in lengths.map_err(|error| self.read_error(error))? {
            let length: i64 = row.try_get(1).map_err(|error| self.read_error(error))?;
            bytes += length.cast_unsigned() as usize;
            if bytes > bytes_max {
                break;
            }
            wanted.push(row.try_get::<i64, _>(0).map_err(|error| self.read_error(error))?);
        }
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let rows = "SELECT eid, version, schema, body FROM snapshot WHERE eid IN (SELECT value FROM json_each(?))";
        let rows = sqlx::query(rows).bind(packed::numbers(&wanted)).fetch_all(self.feeders()).await;
        let read = |row: &SqliteRow| -> sqlx::Result<SnapshotRow> {
            let number = |name| row.try_get::<i64, _>(name).map(i64::cast_unsigned);
            let (eid, body) = (row.try_get("eid")?, row.try_get("body")?);
            Ok(SnapshotRow { eid, version: number("version")?, schema: number("schema")?, body })
        };
        rows.and_then(|rows| rows.iter().map(read).collect()).map_err(|error| self.read_error(error))
    }

    /// Hands `snapshot`, which is of a durable state, to the writer; it is written with the commits that it gathers with.
    ///
    /// It is settled with `Ok` also where there was no need to write it: there is a newer one of the same schema, or the log does
    /// not hold its version (so that a snapshot of an unknown entity is ignored). An error calls for nothing: the next one will do.
    pub fn save_snapshot(&self, snapshot: SnapshotRow, on_settled: OnSettled) {
        self.hand_in(LogEntry::snapshot(snapshot, on_settled));
    }
}

/// Writes `snapshot` unless there is a newer one of its schema; says whether it did.
pub(crate) async fn save(connection: &mut SqliteConnection, snapshot: &SnapshotRow) -> sqlx::Result<bool> {
    sqlx::query(
        "UPDATE snapshot SET eid = NULL, version = 0, schema = 0, body = x''
         WHERE eid = ? AND (version < ? OR schema <> ?)",
    )
    .bind(snapshot.eid)
    .bind(snapshot.version.cast_signed())
    .bind(snapshot.schema.cast_signed())
    .execute(&mut *connection)
    .await?;
    let done = sqlx::query(
        "INSERT INTO snapshot(eid, version, schema, body)
         SELECT ?1, ?2, ?3, ?4
         WHERE EXISTS (SELECT 1 FROM entity WHERE eid = ?1) AND NOT EXISTS (SELECT 1 FROM snapshot WHERE eid = ?1)",
    )
    .bind(snapshot.eid)
    .bind(snapshot.version.cast_signed())
    .bind(snapshot.schema.cast_signed())
    // A copy: should a commit of the group not fit, the others are written again.
    .bind(snapshot.body.clone())
    .execute(connection)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Empties the snapshot of an entity; says whether there was one.
pub(crate) async fn clear(connection: &mut SqliteConnection, eid: i64) -> sqlx::Result<bool> {
    let clear = "UPDATE snapshot SET eid = NULL, version = 0, schema = 0, body = x'' WHERE eid = ?";
    Ok(sqlx::query(clear).bind(eid).execute(connection).await?.rows_affected() > 0)
}

/// Empties the snapshots of these entities.
pub(crate) async fn clear_all(connection: &mut SqliteConnection, eids: &[i64]) -> sqlx::Result<()> {
    let clear = "UPDATE snapshot SET eid = NULL, version = 0, schema = 0, body = x''
                 WHERE eid IN (SELECT value FROM json_each(?))";
    sqlx::query(clear).bind(packed::numbers(eids)).execute(connection).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        Activation, Commit, CommitError, EntityRow, NotWritten,
        test_shard::{TestShard, commit},
    };

    fn snapshot(entity: &EntityRow, version: u64, schema: u64) -> SnapshotRow {
        SnapshotRow { eid: entity.eid, version, schema, body: format!("state {version}").into_bytes() }
    }

    #[tokio::test]
    async fn the_newest_snapshot_stays_and_one_of_another_schema_replaces_it() {
        let mut shard = TestShard::new().await;
        let entity = shard.entity(1, 0);
        shard.append(&entity, 1..=9).await;
        assert_eq!(shard.find_snapshot(entity.eid).await.unwrap(), None);
        // A schema is a hash: all its bits may be set.
        let (one, other) = (u64::MAX, 7);
        let steps =
            [(5, one, true), (8, one, true), (6, one, false), (8, one, false), (6, other, true), (7, one, true)];
        let mut expected = None;
        for (version, schema, replaces) in steps {
            let offered = snapshot(&entity, version, schema);
            shard.save(offered.clone()).await.unwrap().unwrap();
            if replaces {
                expected = Some(offered);
            }
            assert_eq!(shard.find_snapshot(entity.eid).await.unwrap(), expected, "version {version}, schema {schema}");
        }
        shard.reopen().await;
        assert_eq!(shard.find_snapshot(entity.eid).await.unwrap(), expected);
        shard.stop().await;
    }

    #[tokio::test]
    async fn snapshots_and_commits_share_a_group_and_take_nothing_from_each_other() {
        let mut shard = TestShard::new().await;
        let (old, new) = (shard.entity(1, 0), shard.entity(2, 2));
        shard.append(&old, 1..=2).await;
        let before = shard.database().audit().await.unwrap().stored;
        shard.save(snapshot(&old, 1, 1)).await.unwrap().unwrap();
        let after = shard.database().audit().await.unwrap().stored;
        assert_eq!((after.commits, after.progress), (before.commits + 1, before.progress), "no position, no digest");

        let groups = shard.stats().groups;
        let activations = [Arc::new(Activation::at(0)), Arc::new(Activation::at(2))];
        let settled = [
            // Handed in before the commit that it is of: still one group.
            shard.save(snapshot(&new, 1, 1)),
            shard.submit(&activations[0], commit(&new, 1)),
            shard.submit(&activations[1], commit(&old, 3)),
            shard.save(snapshot(&old, 3, 1)),
        ];
        for settled in settled {
            settled.await.unwrap().unwrap();
        }
        assert_eq!(shard.stats().groups, groups + 1, "they were meant to be one group");
        for _ in 0..2 {
            assert_eq!(shard.find_snapshot(new.eid).await.unwrap(), Some(snapshot(&new, 1, 1)));
            assert_eq!(shard.find_snapshot(old.eid).await.unwrap(), Some(snapshot(&old, 3, 1)));
            assert_eq!(shard.read_log(&old, 0, 9).await.unwrap().len(), 3);
            shard.reopen().await;
        }
        shard.stop().await;
    }

    #[tokio::test]
    async fn a_snapshot_of_an_unknown_entity_is_ignored() {
        let shard = TestShard::new().await;
        let entity = shard.entity(1, 0);
        for version in [0, 1] {
            shard.save(snapshot(&entity, version, 1)).await.unwrap().unwrap();
            assert_eq!(shard.find_snapshot(entity.eid).await.unwrap(), None);
        }
        // Nothing that was learned on the way stands in the way of its creation.
        shard.append(&entity, 1..=1).await;
        shard.save(snapshot(&entity, 1, 1)).await.unwrap().unwrap();
        assert!(shard.find_snapshot(entity.eid).await.unwrap().is_some());
        shard.stop().await;
    }

    /// A commit is refused, by the writer or only by the file, and a snapshot was taken of the state that it would have led to.
    #[tokio::test]
    async fn a_snapshot_of_a_version_that_was_refused_is_not_written() {
        let mut shard = TestShard::new().await;
        let (entity, neighbour) = (shard.entity(1, 0), shard.entity(2, 0));
        shard.append(&entity, 1..=3).await;
        shard.append(&neighbour, 1..=1).await;
        let beside = Arc::new(Activation::at(1));
        // That a key is used twice the writer sees, and that version 5 does not follow; that an entity has a row only the file does.
        let twice = Commit { append_key: commit(&entity, 3).append_key, ..commit(&entity, 4) };
        let skips = commit(&entity, 5);
        let twin = shard.entity(1, 0);
        for (bad, at, version) in [(twice, 3, 2), (skips, 3, 3), (commit(&twin, 1), 0, 4)] {
            let entity = bad.entity.clone();
            let untrue = snapshot(&entity, bad.first_version, 1);
            let (refused, saved, written) = (
                shard.submit(&Arc::new(Activation::at(at)), bad),
                shard.save(untrue),
                shard.submit(&beside, commit(&neighbour, version)),
            );
            let refused = refused.await.unwrap();
            assert!(matches!(refused, Err(CommitError::NotWritten(NotWritten::Conflict { .. }))), "{refused:?}");
            let saved = saved.await.unwrap();
            written.await.unwrap().unwrap();
            assert_eq!(saved.is_ok(), version < 4, "what is written one by one is written without snapshots");
            assert_eq!(shard.find_snapshot(entity.eid).await.unwrap(), None);
            // The writer knows no head by heart then.
            shard.reopen().await;
        }
        shard.save(snapshot(&entity, 4, 1)).await.unwrap().unwrap();
        assert_eq!(shard.find_snapshot(entity.eid).await.unwrap(), None);
        shard.save(snapshot(&entity, 3, 1)).await.unwrap().unwrap();
        assert_eq!(shard.find_snapshot(entity.eid).await.unwrap(), Some(snapshot(&entity, 3, 1)));
        shard.stop().await;
    }

    /// The table of snapshots is damaged. Whatever meets it goes without: commits beside a snapshot are written all the same.
    #[tokio::test]
    async fn a_snapshot_that_cannot_be_written_fails_no_commit() {
        let mut shard = TestShard::new().await;
        let entity = shard.entity(1, 0);
        shard.append(&entity, 1..=2).await;
        shard.save(snapshot(&entity, 1, 1)).await.unwrap().unwrap();
        shard.damage_page_of(b"state 1").await;
        let activation = Arc::new(Activation::at(2));
        let settled = (
            shard.submit(&activation, commit(&entity, 3)),
            shard.save(snapshot(&entity, 2, 1)),
            shard.submit(&activation, commit(&entity, 4)),
        );
        settled.0.await.unwrap().unwrap();
        let refused = settled.1.await.unwrap();
        assert!(matches!(refused, Err(CommitError::NotWritten(NotWritten::Io { .. }))), "{refused:?}");
        settled.2.await.unwrap().unwrap();
        assert_eq!((shard.stats().groups, shard.stats().failures), (1, 0));
        assert!(shard.find_snapshot(entity.eid).await.unwrap_err().is_damage());
        assert_eq!(shard.read_log(&entity, 0, 9).await.unwrap().len(), 4);
        shard.stop().await;
    }

    #[tokio::test]
    async fn a_store_that_stops_refuses_snapshots() {
        let shard = TestShard::new().await;
        let entity = shard.entity(1, 0);
        shard.append(&entity, 1..=1).await;
        shard.stop().await;
        let refused = shard.save(snapshot(&entity, 1, 1)).await.unwrap();
        assert_eq!(refused, Err(NotWritten::Stopping.into()));
    }
}
