//! Reading the log page by page, every row checked: for a scrub that never ends, and for verification.
//!
//! Invariants:
//! - What a page holds in memory is bounded in rows and in bytes, however large the commits are.
//! - A bad row is one finding among the rows; only a damaged page of the file ends the reading.

use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use crate::{EntityHash, EntityRow, LogRow, ReadError, Shard, log_row, row_hash::RowHash, sqlite};

/// Of the bodies of one page. A larger commit is a page of its own.
const PAGE_BYTES_MAX: u64 = 4 << 20;

/// One page of a shard's log.
#[derive(Clone, Debug)]
pub struct ScrubPage {
    /// The rows in the order of the log, those that are not what was committed among them.
    pub rows: Vec<Result<(EntityRow, LogRow), BadRow>>,
    /// The position to continue after; none at the end of the log.
    pub next: Option<u64>,
    /// Bytes in the bodies that were read.
    pub bytes: u64,
}

/// A row of the log that is not what was committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRow {
    /// Its place in the shard's log.
    pub position: u64,
    /// Whose it is; none where that cannot be told, because the entity's own row is missing or damaged.
    pub entity: Option<EntityHash>,
    /// What is wrong: the rest of a sentence that begins with the row.
    pub detail: String,
}

/// A row that matches its checksum, of an entity whose row does too.
pub(crate) struct SoundRow {
    pub(crate) entity: EntityRow,
    pub(crate) row: LogRow,
    pub(crate) hash: RowHash,
}

/// One page, with what verification sums up.
pub(crate) struct Page {
    pub(crate) rows: Vec<Result<SoundRow, BadRow>>,
    pub(crate) extent: Extent,
}

/// How far a page reaches.
#[derive(Clone, Copy, Default)]
pub(crate) struct Extent {
    /// The last position.
    pub(crate) last: u64,
    pub(crate) bytes: u64,
    /// Whether there may be more behind it.
    pub(crate) more: bool,
}

impl Shard {
    /// Reads a page of the log behind the position `after`, at most `rows_max` rows and some 4 MiB, and checks each row, and the row
    /// of its entity, against their checksums.
    ///
    /// # Errors
    /// The file cannot be read, or its structure is damaged here ([`ReadError::is_damage`]).
    pub async fn scrub_page(&self, after: u64, rows_max: u32) -> Result<ScrubPage, ReadError> {
        let Page { rows, extent } = self.page(after, u64::MAX, rows_max).await?;
        let rows = rows.into_iter().map(|row| row.map(|SoundRow { entity, row, .. }| (entity, row))).collect();
        Ok(ScrubPage { rows, next: extent.more.then_some(extent.last), bytes: extent.bytes })
    }

    /// The last position of the log as of now; 0 if it has no rows.
    ///
    /// # Errors
    /// The writer is gone.
    pub async fn log_end(&self) -> Result<u64, ReadError> {
        Ok(self.database().audit().await?.stored.progress.next_position.saturating_sub(1))
    }

    /// A page of those rows behind the position `after` that are before `end`.
    pub(crate) async fn page(&self, after: u64, end: u64, rows_max: u32) -> Result<Page, ReadError> {
        self.check_readable()?;
        let mut reader = self.database().readers.acquire().await.map_err(|error| self.read_error(error))?;
        Page::read(&mut reader, after, end, rows_max).await.map_err(|error| self.read_error(error))
    }
}

impl Page {
    /// A page of those rows behind the position `after` that are before `end`.
    pub(crate) async fn read(
        connection: &mut SqliteConnection,
        after: u64,
        end: u64,
        rows_max: u32,
    ) -> sqlx::Result<Page> {
        let extent = Extent::look(connection, after, end, rows_max.max(1)).await?;
        if extent.last <= after {
            return Ok(Page { rows: Vec::new(), extent });
        }
        let rows = sqlx::query(
            "SELECT log.*, entity.copy, entity.slot AS entity_slot, entity.kind, entity.id_hash, entity.life, entity.sealed_id, entity.key_id,
                    entity.created_at, entity.erased_at, entity.checksum AS entity_checksum
             FROM log NOT INDEXED LEFT JOIN entity ON entity.eid = log.eid
             WHERE log.position > ? AND log.position <= ? ORDER BY log.position",
        )
        .bind(stored(after))
        .bind(stored(extent.last))
        .fetch_all(connection)
        .await?;
        Ok(Page { rows: rows.iter().map(check).collect(), extent })
    }
}

impl Extent {
    /// Looks at the lengths alone, for which SQLite need not read the bodies: readers buffer more rows than a page may hold, so that
    /// to stop in the middle of one query would come too late.
    async fn look(connection: &mut SqliteConnection, after: u64, end: u64, rows_max: u32) -> sqlx::Result<Extent> {
        let rows = sqlx::query(
            "SELECT position, length(body) FROM log NOT INDEXED WHERE position > ? AND position < ? ORDER BY position LIMIT 0 + ?",
        )
        .bind(stored(after))
        .bind(stored(end))
        .bind(rows_max)
        .fetch_all(connection)
        .await?;
        let mut extent = Extent { last: after, bytes: 0, more: rows.len() == rows_max as usize };
        for row in &rows {
            let number = |index| row.try_get::<i64, _>(index).map(i64::cast_unsigned);
            let (position, bytes) = (number(0)?, number(1)?);
            if extent.last > after && extent.bytes + bytes > PAGE_BYTES_MAX {
                return Ok(Extent { more: true, ..extent });
            }
            extent.last = position;
            extent.bytes += bytes;
        }
        Ok(extent)
    }
}

/// A position as it is stored; what is beyond every position stays there.
fn stored(position: u64) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}

fn check(row: &SqliteRow) -> Result<SoundRow, BadRow> {
    // It is the row's key: without it the row would not have been found.
    let position = row.try_get::<i64, _>("position").map(i64::cast_unsigned).unwrap_or_default();
    let bad = |entity, detail: &str| BadRow { position, entity, detail: detail.to_owned() };
    let unreadable = |error: sqlx::Error| bad(None, &format!("cannot be read ({})", sqlite::detail(&error)));
    if row.try_get::<Option<i64>, _>("entity_checksum").map_err(unreadable)?.is_none() {
        return Err(bad(None, "belongs to no entity"));
    }
    let entity = EntityRow::from_joined(row).map_err(unreadable)?;
    let entity = entity.ok_or_else(|| bad(None, "belongs to an entity whose own row is damaged"))?;
    let (row, hash, checksum) = log_row::parse(row, &entity).map_err(unreadable)?;
    if hash.checksum() != checksum {
        return Err(bad(Some(entity.id_hash), "does not match its checksum"));
    }
    Ok(SoundRow { entity, row, hash })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        Activation, Commit,
        test_shard::{TestShard, commit},
    };

    /// Positions, and whether each is bad, page by page.
    async fn walk(shard: &Shard, mut after: u64, rows_max: u32) -> Vec<Vec<(u64, bool)>> {
        let mut pages = Vec::new();
        loop {
            let page = shard.scrub_page(after, rows_max).await.unwrap();
            pages.push(
                page.rows
                    .iter()
                    .map(|row| row.as_ref().map_or_else(|bad| (bad.position, true), |(_, row)| (row.position, false)))
                    .collect(),
            );
            let Some(next) = page.next else { return pages };
            after = next;
        }
    }

    #[tokio::test]
    async fn every_row_is_on_one_page_and_bad_ones_are_findings() {
        let mut shard = TestShard::new().await;
        let entities = [shard.entity(1, 0), shard.entity(2, 2), shard.entity(3, 4)];
        for entity in &entities {
            shard.append(entity, 1..=2).await;
        }
        assert_eq!(walk(&shard, 0, 100).await, [(1..=6).map(|position| (position, false)).collect::<Vec<_>>()]);
        assert_eq!(walk(&shard, 4, 100).await, [[(5, false), (6, false)]]);
        assert_eq!(walk(&shard, 6, 100).await, [[]]);
        assert_eq!(walk(&shard, u64::MAX, 100).await, [[]]);
        assert_eq!(walk(&shard, 1, 3).await, [vec![(2, false), (3, false), (4, false)], vec![(5, false), (6, false)]]);
        let page = shard.scrub_page(2, 1).await.unwrap();
        let (entity, row) = page.rows[0].as_ref().unwrap();
        assert_eq!((entity, &row.body), (&*entities[1], &commit(&entities[1], 1).body));
        assert_eq!((page.next, page.bytes), (Some(3), row.body.len() as u64));

        shard.tamper("UPDATE log SET version = 7 WHERE position = 2").await;
        shard.tamper("UPDATE entity SET sealed_id = x'00' WHERE eid = 2").await;
        shard.tamper("DELETE FROM entity WHERE eid = 3").await;
        let page = shard.scrub_page(1, 100).await.unwrap();
        let found: Vec<BadRow> = page.rows.into_iter().map(|row| row.err().unwrap()).collect();
        let bad = |position, entity, detail: &str| BadRow { position, entity, detail: detail.to_owned() };
        let damaged = "belongs to an entity whose own row is damaged";
        assert_eq!(
            found,
            [
                bad(2, Some(entities[0].id_hash), "does not match its checksum"),
                bad(3, None, damaged),
                bad(4, None, damaged),
                bad(5, None, "belongs to no entity"),
                bad(6, None, "belongs to no entity"),
            ]
        );
        shard.stop().await;
    }

    #[tokio::test]
    async fn a_page_ends_before_it_is_too_large() {
        let shard = TestShard::new().await;
        let entity = shard.entity(1, 0);
        let activation = Arc::new(Activation::at(0));
        for (version, mebibytes) in (1..).zip([1, 2, 3, 5, 1, 1]) {
            let body = vec![7; mebibytes << 20];
            shard.submit(&activation, Commit { body, ..commit(&entity, version) }).await.unwrap().unwrap();
        }
        let pages = walk(&shard, 0, 100).await;
        let positions: Vec<Vec<u64>> =
            pages.iter().map(|page| page.iter().map(|(position, _)| *position).collect()).collect();
        assert_eq!(positions, [vec![1, 2], vec![3], vec![4], vec![5, 6]]);
        shard.stop().await;
    }

    #[tokio::test]
    async fn a_damaged_page_of_the_file_is_an_error_that_says_so() {
        let mut shard = TestShard::new().await;
        let entity = shard.entity(1, 0);
        shard.append(&entity, 1..=500).await;
        let page = shard.scrub_page(0, 500).await.unwrap();
        assert_eq!((page.rows.len(), page.next), (500, Some(500)));
        // A leaf in the middle of the log, which opening does not read.
        shard.damage_page_of(format!("{} 250", entity.eid).as_bytes()).await;
        let error = shard.scrub_page(0, 500).await.unwrap_err();
        assert!(error.is_damage(), "{error:?}");
        shard.stop().await;
    }
}
