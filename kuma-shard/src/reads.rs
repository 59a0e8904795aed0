//! What is read from a shard: entities, and the log of one of them.
//!
//! Invariants:
//! - A row is handed out only if it matches its checksum.
//! - The tail is looked at first and an index then: what moves meanwhile is found twice and handed out once.
//! - Nothing is read while it is not known what is on the disk.
//! - What a page of the log holds in memory is bounded in rows and in bytes, however large the commits are.

use std::collections::BTreeSet;

use sqlx::{Row, sqlite::SqliteRow};

use crate::{
    CopyId, EntityHash, EntityRow, LogRow, ReadError, Shard, log_row, packed, statements::Bound, tail::TailRow,
};

const FIND_KEY: &str = "SELECT position FROM key_index WHERE eid = ? AND append_key = ?";
const LIST_KEYS: &str = "SELECT append_key FROM key_index WHERE eid = ? LIMIT 0 + ?";

/// A page of an entity's log ends with the commit that makes its bodies so large; one that is partly in the index and partly in the tail,
/// with that in each.
pub const PAGE_BYTES: usize = 4 << 20;

/// The rows of the log that `wanted` names, up to the one that makes the page full. To look at a body's length SQLite does not read it;
/// readers buffer whole pages, so that to stop in the middle of one query would come too late.
macro_rules! page_of {
    ($wanted:literal, $order:literal) => {
        concat!(
            "SELECT log.* FROM (
                 SELECT log.position, log.version, sum(length(log.body)) OVER (ORDER BY log.version ",
            $order,
            ") - length(log.body) AS before
                 FROM (",
            $wanted,
            ") AS wanted CROSS JOIN log ON log.position = wanted.position
             ) AS page CROSS JOIN log ON log.position = page.position
             WHERE page.before < 4194304 ORDER BY page.version ",
            $order
        )
    };
}

pub(crate) const AFTER: &str =
    page_of!("SELECT position FROM log_index WHERE eid = ? AND version > ? ORDER BY version LIMIT 0 + ?", "ASC");
const BEFORE: &str =
    page_of!("SELECT position FROM log_index WHERE eid = ? AND version < ? ORDER BY version DESC LIMIT 0 + ?", "DESC");
const NOTED: &str = page_of!("SELECT value AS position FROM json_each(?)", "ASC");
const NOTED_BACKWARD: &str = page_of!("SELECT value AS position FROM json_each(?)", "DESC");

fn is_full(rows: &[LogRow]) -> bool {
    rows.iter().map(|row| row.body.len()).sum::<usize>() >= PAGE_BYTES
}

impl Shard {
    /// The entity with this hash in its newest life, if it was ever written. It may be erased.
    ///
    /// # Errors
    /// The file cannot be read, or the row is damaged.
    pub async fn find_entity(&self, copy: CopyId, id_hash: EntityHash) -> Result<Option<EntityRow>, ReadError> {
        self.check_readable()?;
        let row = sqlx::query("SELECT * FROM entity WHERE copy = ? AND id_hash = ? ORDER BY life DESC LIMIT 1")
            .bind(copy.0.to_vec())
            .bind(id_hash.0.to_vec())
            .fetch_optional(&self.database().readers)
            .await
            .map_err(|error| self.read_error(error))?;
        let Some(row) = row else { return Ok(None) };
        let entity = EntityRow::from_row(&row).map_err(|error| self.read_error(error))?;
        entity.map(Some).ok_or_else(|| self.bad_row(0, "the row of an entity does not match its checksum"))
    }

    /// Commits of `entity` whose first version is above `after`, oldest first: at most `rows_max` of them, and no more than make
    /// [`PAGE_BYTES`]. Fewer than `rows_max` are the last ones, unless they have so many bytes.
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn read_log(&self, entity: &EntityRow, after: u64, rows_max: u32) -> Result<Vec<LogRow>, ReadError> {
        self.check_readable()?;
        // The tail first: what moves from it to the index meanwhile is found there.
        let tail = self.tail().read().after(entity.eid, after);
        let query = sqlx::query(AFTER).bind(entity.eid).bind(after.cast_signed()).bind(rows_max);
        let mut rows = self.log_rows(query, entity).await?;
        if !is_full(&rows) {
            let last = rows.last().map_or(after, |row| row.version);
            let room = (rows_max as usize).saturating_sub(rows.len());
            let behind: Vec<TailRow> = tail.into_iter().filter(|row| row.version > last).take(room).collect();
            rows.extend(self.read_tail(entity, &behind, NOTED).await?);
        }
        Ok(rows)
    }

    /// Commits of `entity` whose first version is below `before`, newest first, bounded like those of [`Shard::read_log`].
    ///
    /// # Errors
    /// The file cannot be read, or a row is damaged.
    pub async fn read_log_before(
        &self,
        entity: &EntityRow,
        before: u64,
        rows_max: u32,
    ) -> Result<Vec<LogRow>, ReadError> {
        self.check_readable()?;
        let tail = self.tail().read().before(entity.eid, before, rows_max as usize);
        // Whatever is older than the oldest row of the tail is in the index, and stays there.
        let before = tail.first().map_or(before, |oldest| oldest.version);
        let room = (rows_max as usize).saturating_sub(tail.len());
        let mut rows = self.read_tail(entity, &tail, NOTED_BACKWARD).await?;
        if room > 0 && !is_full(&rows) {
            let before = i64::try_from(before).unwrap_or(i64::MAX);
            let query = sqlx::query(BEFORE).bind(entity.eid).bind(before).bind(room as i64);
            rows.extend(self.log_rows(query, entity).await?);
        }
        Ok(rows)
    }

    /// The rows of `entity` that `tail` names, by one of the statements for them, until they make a page.
    async fn read_tail(
        &self,
        entity: &EntityRow,
        tail: &[TailRow],
        statement: &'static str,
    ) -> Result<Vec<LogRow>, ReadError> {
        let Some(first) = tail.first() else { return Ok(Vec::new()) };
        let query = sqlx::query(statement).bind(packed::numbers(tail.iter().map(|row| row.position)));
        let rows = self.log_rows(query, entity).await?;
        if rows.len() != tail.len() && !is_full(&rows) {
            return Err(self.bad_row(first.position, "it or a later one that was committed is not there"));
        }
        Ok(rows)
    }

    /// The commit of `entity` that was appended under `append_key`.
    ///
    /// # Errors
    /// The file cannot be read, or the row is damaged.
    pub async fn find_append(&self, entity: &EntityRow, append_key: &[u8]) -> Result<Option<LogRow>, ReadError> {
        self.check_readable()?;
        let noted = self.tail().read().keys().find(entity.eid, append_key);
        let position = match noted {
            Some(position) => Some(position),
            None => self.indexed_key(entity, append_key).await?,
        };
        let Some(position) = position else { return Ok(None) };
        let row = sqlx::query("SELECT * FROM log WHERE position = ?").bind(position.cast_signed());
        let row = row.fetch_optional(&self.database().readers).await.map_err(|error| self.read_error(error))?;
        // From here on the key is known. "Never seen" would have the request happen twice.
        let Some(row) = row else {
            return Err(self.bad_row(position, "an append key leads to it, and it is not there"));
        };
        let found = self.log_row(&row, entity)?;
        let eid: i64 = row.try_get("eid").map_err(|error| self.read_error(error))?;
        if eid != entity.eid || found.append_key.as_deref() != Some(append_key) {
            return Err(self.bad_row(position, "an append key leads to it that is not its own"));
        }
        Ok(Some(found))
    }

    /// Where the index of append keys says that the commit with this one stands.
    async fn indexed_key(&self, entity: &EntityRow, append_key: &[u8]) -> Result<Option<u64>, ReadError> {
        let query = sqlx::query(FIND_KEY).bind(entity.eid).bind(append_key.to_vec());
        let row = query.fetch_optional(&self.database().readers).await.map_err(|error| self.read_error(error))?;
        let position = row.map(|row| row.try_get::<i64, _>(0).map(i64::cast_unsigned)).transpose();
        position.map_err(|error| self.read_error(error))
    }

    /// Append keys of `entity`, in no order that means anything, at most `max` of them. Fewer than `max` are all.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn append_keys(&self, entity: &EntityRow, max: u32) -> Result<Vec<Vec<u8>>, ReadError> {
        self.check_readable()?;
        let enough = max as usize;
        let mut keys: BTreeSet<Vec<u8>> =
            self.tail().read().keys().of(entity.eid).take(enough).map(Vec::from).collect();
        if keys.len() < enough {
            // Up to `max` again: any of them may be among those that were in the tail.
            let rows = sqlx::query(LIST_KEYS).bind(entity.eid).bind(max).fetch_all(&self.database().readers).await;
            let indexed = rows.and_then(|rows| rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<Vec<_>>>());
            keys.extend(indexed.map_err(|error| self.read_error(error))?);
        }
        Ok(keys.into_iter().take(enough).collect())
    }

    /// The first version of the newest commit that begins at or below `version`; 0 if there is none.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn commit_before(&self, entity: &EntityRow, version: u64) -> Result<u64, ReadError> {
        self.check_readable()?;
        if let Some(row) = self.tail().read().at_or_below(entity.eid, version) {
            return Ok(row.version);
        }
        let row = sqlx::query("SELECT coalesce(max(version), 0) FROM log_index WHERE eid = ? AND version <= ?")
            .bind(entity.eid)
            .bind(i64::try_from(version).unwrap_or(i64::MAX))
            .fetch_one(&self.database().readers)
            .await;
        row.and_then(|row| row.try_get::<i64, _>(0)).map(i64::cast_unsigned).map_err(|error| self.read_error(error))
    }

    /// Entities in the order of their numbers, above `after`, at most `rows_max` of them. A damaged row stands as its number alone.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn entities(&self, after: i64, rows_max: u32) -> Result<Vec<Result<EntityRow, i64>>, ReadError> {
        self.check_readable()?;
        let rows = sqlx::query("SELECT * FROM entity WHERE eid > ? ORDER BY eid LIMIT 0 + ?")
            .bind(after)
            .bind(rows_max)
            .fetch_all(&self.database().readers)
            .await
            .map_err(|error| self.read_error(error))?;
        let read = |row: &SqliteRow| -> sqlx::Result<Result<EntityRow, i64>> {
            let eid = row.try_get("eid")?;
            Ok(EntityRow::from_row(row)?.ok_or(eid))
        };
        rows.iter().map(|row| read(row).map_err(|error| self.read_error(error))).collect()
    }

    pub(crate) fn check_readable(&self) -> Result<(), ReadError> {
        if self.database().stats.is_suspect() {
            return Err(ReadError::Closed { file: self.database().file.to_string() });
        }
        Ok(())
    }

    pub(crate) fn read_error(&self, source: sqlx::Error) -> ReadError {
        self.database().read_error(source)
    }

    pub(crate) fn bad_row(&self, position: u64, detail: impl Into<String>) -> ReadError {
        ReadError::BadRow { file: self.database().file.to_string(), position, detail: detail.into() }
    }

    /// The rows that `query` selects, which are those of `entity`.
    async fn log_rows(&self, query: Bound, entity: &EntityRow) -> Result<Vec<LogRow>, ReadError> {
        let rows = query.fetch_all(&self.database().readers).await.map_err(|error| self.read_error(error))?;
        rows.iter().map(|row| self.log_row(row, entity)).collect()
    }

    fn log_row(&self, row: &SqliteRow, entity: &EntityRow) -> Result<LogRow, ReadError> {
        let (row, hash, checksum) = log_row::parse(row, entity).map_err(|error| self.read_error(error))?;
        if hash.checksum() != checksum {
            return Err(self.bad_row(row.position, "it does not match its checksum"));
        }
        Ok(row)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        Activation,
        test_shard::{TestShard, commit},
    };

    async fn plan(shard: &Shard, statement: &str) -> String {
        let explain = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
        let rows = sqlx::query(explain).fetch_all(&shard.database().readers).await.unwrap();
        rows.iter().map(|row| row.get::<String, _>("detail")).collect::<Vec<_>>().join("; ")
    }

    #[tokio::test]
    async fn append_keys_are_looked_up_in_their_index() {
        let shard = TestShard::new().await;
        let found = plan(&shard, FIND_KEY).await;
        assert_eq!(found, "SEARCH key_index USING PRIMARY KEY (eid=? AND append_key=?)");
        let listed = plan(&shard, LIST_KEYS).await;
        assert_eq!(listed, "SEARCH key_index USING PRIMARY KEY (eid=?)");
        shard.stop().await;
    }

    /// Pages from one end to the other, as versions, and that none is larger than it may be.
    async fn pages(shard: &Shard, entity: &Arc<EntityRow>, backward: bool) -> Vec<Vec<u64>> {
        let (mut pages, mut at) = (Vec::new(), if backward { u64::MAX } else { 0 });
        loop {
            let page = match backward {
                true => shard.read_log_before(entity, at, 100).await.unwrap(),
                false => shard.read_log(entity, at, 100).await.unwrap(),
            };
            let Some(last) = page.last() else { return pages };
            let but_one: usize = page[..page.len() - 1].iter().map(|row| row.body.len()).sum();
            assert!(but_one < 2 * PAGE_BYTES);
            at = last.version;
            pages.push(page.iter().map(|row| row.version).collect());
        }
    }

    /// In the tail, in the index, and some here and some there.
    #[tokio::test]
    async fn a_page_of_large_commits_ends_before_it_is_too_large_and_none_is_left_out() {
        let mut shard = TestShard::new().await;
        let entity = shard.entity(1, 0);
        let large = |version| crate::Commit { body: vec![7; 1_500_000], ..commit(&entity, version) };
        let activation = Arc::new(Activation::at(0));
        for version in 1..=7 {
            shard.submit(&activation, large(version)).await.unwrap().unwrap();
            if version == 4 {
                shard.reopen().await;
            }
        }
        for _ in 0..2 {
            let forward = pages(&shard, &entity, false).await;
            assert_eq!(forward.concat(), [1, 2, 3, 4, 5, 6, 7]);
            assert!(forward.len() > 1, "{forward:?}");
            let backward = pages(&shard, &entity, true).await;
            assert_eq!(backward.concat(), [7, 6, 5, 4, 3, 2, 1]);
            assert!(backward.len() > 1, "{backward:?}");
            shard.reopen().await;
        }
        shard.stop().await;
    }

    /// Versions by append key, of the entity's `count` first ones.
    async fn found_by_key(shard: &Shard, entity: &Arc<EntityRow>, count: u64) -> Vec<Option<u64>> {
        let mut found = Vec::new();
        for version in 1..=count {
            let key = commit(entity, version).append_key.unwrap();
            found.push(shard.find_append(entity, &key).await.unwrap().map(|row| row.version));
        }
        found
    }

    /// In the tail, in the index, and some here and some there.
    #[tokio::test]
    async fn a_commit_is_found_by_its_append_key_and_by_no_other_entitys() {
        let mut shard = TestShard::new().await;
        let (entity, other) = (shard.entity(1, 0), shard.entity(2, 0));
        let unkeyed = crate::Commit { append_key: None, ..commit(&other, 1) };
        shard.submit(&Arc::new(Activation::at(0)), unkeyed).await.unwrap().unwrap();
        shard.append(&entity, 1..=3).await;
        for count in [3, 3, 5] {
            assert_eq!(found_by_key(&shard, &entity, count).await, (1..=count).map(Some).collect::<Vec<_>>());
            assert_eq!(found_by_key(&shard, &other, count).await, vec![None; count as usize]);
            assert_eq!(shard.find_append(&entity, b"never").await.unwrap(), None);
            let mut keys = shard.append_keys(&entity, 9).await.unwrap();
            keys.sort();
            let all: Vec<_> = (1..=count).map(|version| commit(&entity, version).append_key.unwrap()).collect();
            assert_eq!(keys, all);
            for max in 0..=count {
                assert_eq!(shard.append_keys(&entity, max as u32).await.unwrap().len(), max as usize);
            }
            assert!(shard.append_keys(&other, 9).await.unwrap().is_empty());
            if shard.tail().read().len() > 0 {
                shard.reopen().await;
            } else {
                shard.append(&entity, 4..=5).await;
            }
        }
        shard.stop().await;
    }

    /// As "never seen" it would have the request happen a second time.
    #[tokio::test]
    async fn a_key_that_leads_to_the_wrong_row_is_damage() {
        for (statement, expected) in [
            ("UPDATE key_index SET position = 3 WHERE position = 2", "leads to it that is not its own"),
            ("UPDATE key_index SET position = 4 WHERE position = 2", "does not match its checksum"),
            ("UPDATE key_index SET position = 99 WHERE position = 2", "it is not there"),
            ("UPDATE log SET append_key = NULL WHERE position = 2", "does not match its checksum"),
            ("UPDATE log SET eid = 2 WHERE position = 2", "leads to it that is not its own"),
        ] {
            let mut shard = TestShard::new().await;
            let (entity, other) = (shard.entity(1, 0), shard.entity(2, 0));
            shard.append(&entity, 1..=3).await;
            shard.append(&other, 1..=1).await;
            shard.tamper(statement).await;
            let key = commit(&entity, 2).append_key.unwrap();
            let error = shard.find_append(&entity, &key).await.unwrap_err();
            assert!(error.is_damage() && error.to_string().contains(expected), "{statement}: {error}");
            shard.stop().await;
        }
    }

    /// Five commits are in the index, five in the tail.
    #[tokio::test]
    async fn the_log_is_read_backwards_across_index_and_tail() {
        let mut shard = TestShard::new().await;
        let (entity, other) = (shard.entity(1, 0), shard.entity(2, 0));
        shard.append(&entity, 1..=5).await;
        shard.append(&other, 1..=2).await;
        shard.reopen().await;
        shard.append(&entity, 6..=10).await;
        shard.append(&other, 3..=3).await;
        for before in (0..=12).chain([u64::MAX]) {
            for rows_max in [0, 1, 4, 5, 7, 99] {
                let rows = shard.read_log_before(&entity, before, rows_max).await.unwrap();
                let found: Vec<u64> = rows.iter().map(|row| row.version).collect();
                let expected: Vec<u64> =
                    (1..=10).rev().filter(|version| *version < before).take(rows_max as usize).collect();
                assert_eq!(found, expected, "before {before}, at most {rows_max}");
            }
        }
        shard.stop().await;
    }

    /// The writer moves the tail to the index all the time; a reader must not see a row twice, and none not at all.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_is_read_beside_appends_has_no_gap_and_no_duplicate() {
        const COMMITS: u64 = 400;
        let shard = Arc::new(TestShard::new().await);
        let entity = shard.entity(1, 0);
        shard.append(&entity, 1..=1).await;
        let writer = tokio::spawn({
            let (shard, entity) = (shard.clone(), entity.clone());
            async move {
                for version in 2..=COMMITS {
                    shard.append(&entity, version..=version).await;
                    if version % 3 == 0 {
                        shard.persist_marks();
                    }
                }
            }
        });
        let mut newest = 1;
        while newest < COMMITS {
            let rows = shard.read_log_before(&entity, u64::MAX, 1000).await.unwrap();
            let versions: Vec<u64> = rows.iter().map(|row| row.version).collect();
            assert!(versions[0] >= newest, "{} after {newest}", versions[0]);
            newest = versions[0];
            assert_eq!(versions, (1..=newest).rev().collect::<Vec<_>>());
            // So do keys. The next one is on its way.
            for version in [1, newest / 2 + 1, newest] {
                let key = commit(&entity, version).append_key.unwrap();
                let found = shard.find_append(&entity, &key).await.unwrap();
                assert_eq!(found.map(|row| row.version), Some(version));
            }
            let keys = shard.append_keys(&entity, 1000).await.unwrap().len() as u64;
            assert!((newest..=COMMITS).contains(&keys), "{keys} keys of {newest} or more");
        }
        writer.await.unwrap();
        shard.stop().await;
    }
}
