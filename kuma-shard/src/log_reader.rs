//! Reading the log in its order, from a position on: what subscriptions and projections are fed from.
//!
//! Invariants:
//! - Only what is known to be durable is read: positions up to the end that the writer tells of.
//! - Within a slot rows come in the order of their seq, which has no gaps: a row that is not there is damage, and nothing behind it is read.
//! - What a page holds in memory is bounded in rows and in bytes.
//! - It reads through connections of its own, in short pages: neither appends nor activations wait for it, and the log can be cut.

use std::{collections::HashMap, sync::Arc};

use sqlx::{Row, sqlite::SqliteRow};

use crate::{BadRow, EntityHash, EntityRow, LogRow, ReadError, Shard, log_row, packed};

/// Rows of one page, at most and at least; as many as made [`PAGE_BYTES`] in the page before.
const PAGE_ROWS: u32 = 512;
const PAGE_ROWS_MIN: u32 = 16;
/// The row that exceeds it is the last of its page. Every subscription has two pages of every shard, whether anybody reads it or not.
const PAGE_BYTES: usize = 512 << 10;
/// A larger body is fetched by itself, so that a page of the largest rows is no more than 16 MiB.
const INLINE_BYTES: u32 = 32 << 10;
/// Entities that are remembered between two pages.
const ENTITIES_MAX: usize = 1 << 16;

const PAGE: &str =
    "SELECT position, slot, seq, eid, version, count, at, epoch, append_key, checksum, length(body) AS bytes,
     CASE WHEN length(body) <= 32768 THEN body ELSE x'' END AS body
     FROM log NOT INDEXED WHERE position > ? AND position <= ? ORDER BY position LIMIT 0 + ?";

/// A commit in the log, with its entity.
#[derive(Clone, Debug)]
pub struct ReadRow {
    /// Whose it is. It may have been erased since.
    pub entity: Arc<EntityRow>,
    /// The row; it matches its checksum unless it is of an entity that was not wanted, and then it has no body.
    pub row: LogRow,
}

/// A page of the log.
#[derive(Debug)]
pub struct LogPage {
    /// Its rows in the order of the log.
    pub rows: Vec<ReadRow>,
    /// Why it ends before its time: the row that comes next is not what was committed.
    pub bad: Option<BadRow>,
    /// Everything up to this position is in this page or was before it.
    pub last: u64,
}

/// Reads one shard's log.
pub struct LogReader {
    shard: Shard,
    entities: HashMap<i64, Arc<EntityRow>>,
    rows_max: u32,
}

impl LogReader {
    /// Of this shard.
    pub fn new(shard: Shard) -> Self {
        LogReader { shard, entities: HashMap::new(), rows_max: PAGE_ROWS }
    }

    /// Forgets entities that were read before: some may have been erased.
    pub fn forget(&mut self) {
        self.entities.clear();
    }

    /// The next rows behind the position `after`, up to `end`. Only those of entities that are `wanted` have bodies, and are checked.
    ///
    /// # Errors
    /// The file cannot be read, or its structure is damaged.
    /// # Cancel safety
    /// Cancel safe.
    pub async fn page(
        &mut self,
        after: u64,
        end: u64,
        wanted: impl Fn(&EntityRow) -> bool,
    ) -> Result<LogPage, ReadError> {
        self.shard.check_readable()?;
        let query = sqlx::query(PAGE).bind(after.cast_signed()).bind(end.cast_signed()).bind(self.rows_max);
        let rows = query.fetch_all(self.shard.feeders()).await.map_err(|error| self.shard.read_error(error))?;
        let full = rows.len() == self.rows_max as usize;
        self.learn(&rows).await?;
        let mut page = LogPage { rows: Vec::with_capacity(rows.len()), bad: None, last: after };
        let mut bytes = 0;
        for row in &rows {
            let position = page.last + 1;
            match self.check(row, position, &wanted).await? {
                Ok(read) => {
                    bytes += read.row.body.len();
                    page.rows.push(read);
                }
                Err(bad) => {
                    page.bad = Some(bad);
                    return Ok(page);
                }
            }
            page.last = position;
            if bytes > PAGE_BYTES {
                break;
            }
        }
        let read = page.rows.len();
        let fits = PAGE_BYTES / (bytes / read.max(1)).max(1);
        self.rows_max = u32::try_from(fits).unwrap_or(PAGE_ROWS).clamp(PAGE_ROWS_MIN, PAGE_ROWS);
        if read < rows.len() {
            return Ok(page);
        }
        if !full && page.last < end {
            let detail = "was committed and is not there".to_owned();
            page.bad = Some(BadRow { position: page.last + 1, entity: None, detail });
        }
        Ok(page)
    }

    /// Looks up the entities of `rows` that are not known.
    async fn learn(&mut self, rows: &[SqliteRow]) -> Result<(), ReadError> {
        let eids: Result<Vec<i64>, _> = rows.iter().map(|row| row.try_get("eid")).collect();
        let mut eids = eids.map_err(|error| self.shard.read_error(error))?;
        if self.entities.len() > ENTITIES_MAX {
            self.entities.clear();
        }
        eids.retain(|eid| !self.entities.contains_key(eid));
        if eids.is_empty() {
            return Ok(());
        }
        eids.sort_unstable();
        eids.dedup();
        let query = sqlx::query("SELECT * FROM entity WHERE eid IN (SELECT value FROM json_each(?))");
        let found = query.bind(packed::numbers(eids)).fetch_all(self.shard.feeders()).await;
        for row in &found.map_err(|error| self.shard.read_error(error))? {
            // One that is damaged is not there, for those who look for it.
            if let Some(entity) = EntityRow::from_row(row).map_err(|error| self.shard.read_error(error))? {
                self.entities.insert(entity.eid, Arc::new(entity));
            }
        }
        Ok(())
    }

    async fn check(
        &mut self,
        row: &SqliteRow,
        expected: u64,
        wanted: &impl Fn(&EntityRow) -> bool,
    ) -> Result<Result<ReadRow, BadRow>, ReadError> {
        let read_error = |error| self.shard.read_error(error);
        let position = row.try_get::<i64, _>("position").map_err(read_error)?.cast_unsigned();
        let bad = |entity: Option<EntityHash>, detail: &str| {
            Ok(Err(BadRow { position: expected, entity, detail: detail.to_owned() }))
        };
        if position != expected {
            return bad(None, "was committed and is not there");
        }
        let eid: i64 = row.try_get("eid").map_err(read_error)?;
        let Some(entity) = self.entities.get(&eid).cloned() else {
            return bad(None, "belongs to an entity whose own row is damaged or missing");
        };
        let bytes: u32 = row.try_get("bytes").map_err(read_error)?;
        let (mut read, hash, checksum) = log_row::parse(row, &entity).map_err(read_error)?;
        if !wanted(&entity) {
            read.body = Vec::new();
            return Ok(Ok(ReadRow { entity, row: read }));
        }
        let hash = match bytes <= INLINE_BYTES {
            true => hash,
            false => {
                let query = sqlx::query("SELECT * FROM log WHERE position = ?").bind(position.cast_signed());
                let row = query.fetch_one(self.shard.feeders()).await.map_err(read_error)?;
                let (whole, hash, _) = log_row::parse(&row, &entity).map_err(read_error)?;
                // It may be a stub by now, with a checksum of its own.
                let checksum: i64 = row.try_get("checksum").map_err(read_error)?;
                read = whole;
                if hash.checksum() != checksum {
                    return bad(Some(entity.id_hash), "does not match its checksum");
                }
                return Ok(Ok(ReadRow { entity, row: read }));
            }
        };
        if hash.checksum() != checksum {
            return bad(Some(entity.id_hash), "does not match its checksum");
        }
        Ok(Ok(ReadRow { entity, row: read }))
    }
}

impl Shard {
    /// When the commit behind the position `after` was made, in microseconds since 1970; none at the end of the log. Of erased commits no time
    /// is known: it is that of the next one.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn time_behind(&self, after: u64) -> Result<Option<i64>, ReadError> {
        self.check_readable()?;
        let query =
            sqlx::query("SELECT at FROM log NOT INDEXED WHERE position > ? AND at > 0 ORDER BY position LIMIT 1");
        let row = query.bind(after.cast_signed()).fetch_optional(self.feeders()).await;
        row.and_then(|row| row.map(|row| row.try_get(0)).transpose()).map_err(|error| self.read_error(error))
    }

    /// Which of these entities, by their numbers, are erased now.
    ///
    /// # Errors
    /// The file cannot be read.
    pub async fn erased_among(&self, eids: impl IntoIterator<Item = i64>) -> Result<Vec<i64>, ReadError> {
        self.check_readable()?;
        let query = sqlx::query(
            "SELECT eid FROM entity WHERE eid IN (SELECT value FROM json_each(?)) AND erased_at IS NOT NULL",
        );
        let rows = query.bind(packed::numbers(eids)).fetch_all(self.feeders()).await;
        rows.and_then(|rows| rows.iter().map(|row| row.try_get(0)).collect()).map_err(|error| self.read_error(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Activation, Commit,
        test_shard::{TestShard, commit},
    };

    async fn read(shard: &Shard, after: u64) -> (Vec<(u64, u64)>, Option<u64>) {
        let (mut reader, mut after, mut rows) = (LogReader::new(shard.clone()), after, Vec::new());
        let end = *shard.end().borrow();
        while after < end {
            let page = reader.page(after, end, |_| true).await.unwrap();
            rows.extend(page.rows.iter().map(|read| (read.row.position, read.row.version)));
            if let Some(bad) = page.bad {
                return (rows, Some(bad.position));
            }
            assert!(page.last > after);
            after = page.last;
        }
        (rows, None)
    }

    #[tokio::test]
    async fn the_log_is_read_in_order_up_to_what_is_durable() {
        let mut shard = TestShard::new().await;
        assert_eq!(*shard.end().borrow(), 0);
        let (one, two) = (shard.entity(1, 0), shard.entity(2, 2));
        shard.append(&one, 1..=700).await;
        shard.append(&two, 1..=600).await;
        assert_eq!(*shard.end().borrow(), 1300);
        let (rows, bad) = read(&shard, 0).await;
        assert_eq!((rows.len(), bad), (1300, None));
        assert!(rows.iter().zip(1..).all(|((position, _), expected)| *position == expected));
        shard.reopen().await;
        assert_eq!(*shard.end().borrow(), 1300);
        assert_eq!(read(&shard, 1298).await.0, [(1299, 599), (1300, 600)]);
        shard.stop().await;
    }

    #[tokio::test]
    async fn large_commits_are_read_whole_in_pages_that_are_bounded() {
        let shard = TestShard::new().await;
        let entity = shard.entity(1, 0);
        let activation = Arc::new(Activation::at(0));
        for version in 1..=9 {
            let body = vec![7; if version % 2 == 0 { 2_000_000 } else { 100 }];
            shard.submit(&activation, Commit { body, ..commit(&entity, version) }).await.unwrap().unwrap();
        }
        let mut reader = LogReader::new(shard.clone());
        // Each ends with the row that makes it large.
        for (after, last) in [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)] {
            let page = reader.page(after, 9, |_| true).await.unwrap();
            assert_eq!(page.last, last);
            let sizes: Vec<usize> = page.rows.iter().map(|read| read.row.body.len()).collect();
            assert_eq!(sizes, if last == 9 { vec![100] } else { vec![100, 2_000_000] });
        }
        shard.stop().await;
    }

    /// Skipping it silently is what other stores are known for.
    #[tokio::test]
    async fn a_row_that_is_missing_or_damaged_ends_the_page_before_it() {
        for (statement, expected) in [
            ("DELETE FROM log WHERE position = 3", 3),
            ("DELETE FROM log WHERE position = 5", 5),
            ("UPDATE log SET version = 9 WHERE position = 2", 2),
            ("UPDATE entity SET kind = 'other' WHERE eid = 1", 1),
        ] {
            let mut shard = TestShard::new().await;
            let entity = shard.entity(1, 0);
            shard.append(&entity, 1..=5).await;
            shard.tamper(statement).await;
            let (rows, bad) = read(&shard, 0).await;
            assert_eq!((rows.len() as u64, bad), (expected - 1, Some(expected)), "{statement}");
            shard.stop().await;
        }
    }

    #[tokio::test]
    async fn entities_that_are_not_wanted_are_passed_without_their_bodies() {
        let shard = TestShard::new().await;
        let (one, two) = (shard.entity(1, 0), shard.entity(2, 2));
        shard.append(&one, 1..=1).await;
        shard.append(&two, 1..=1).await;
        let mut reader = LogReader::new(shard.clone());
        let page = reader.page(0, 2, |entity| entity.eid == two.eid).await.unwrap();
        assert_eq!(page.rows.iter().map(|read| read.row.body.is_empty()).collect::<Vec<_>>(), [true, false]);
        assert!(shard.time_behind(1).await.unwrap().is_some() && shard.time_behind(2).await.unwrap().is_none());
        shard.stop().await;
    }
}
