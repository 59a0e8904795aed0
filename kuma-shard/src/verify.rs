//! Verification of a shard: every row against its checksum, all rows against their digest, every index against its table.
//!
//! Invariants:
//! - It runs beside appends: what is compared is the log up to the position, and the digest, at its start.
//! - It never holds an old state open for longer than one page of rows; SQLite's own check of the structure is the exception.

use std::collections::BTreeMap;

use sqlx::{Row, SqlitePool};

use crate::{Digest, EntityHash, EntityRow, LogRow, ReadError, Shard, shard, statements::Bound};

const PAGE_ROWS: u32 = 64;

/// What a look over a whole shard found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardReport {
    /// Entities seen.
    pub entities: u64,
    /// Commits read.
    pub commits: u64,
    /// Events in them.
    pub events: u64,
    /// Damage that belongs to one entity: its hash, or none where even that cannot be read, and what is wrong.
    pub bad_entities: Vec<(Option<EntityHash>, String)>,
    /// Damage that does not belong to one entity.
    pub damage: Vec<String>,
}

impl ShardReport {
    /// Whether all is as it was committed.
    pub fn is_clean(&self) -> bool {
        self.bad_entities.is_empty() && self.damage.is_empty()
    }
}

/// Checks of a commit what its shard cannot: whoever holds the keys.
pub trait CommitCheck: Send {
    /// Says what is wrong with a commit, if anything. (A trait and not an async closure, whose future is not known to be `Send`.)
    fn check(&mut self, entity: &EntityRow, commit: &LogRow) -> impl Future<Output = Result<(), String>> + Send;
}

impl Shard {
    /// Reads everything. `commits` is asked about every commit in the order of the log.
    ///
    /// # Errors
    /// The file cannot be read at all. Damage stands in the report.
    pub async fn verify(&self, commits: &mut impl CommitCheck) -> Result<ShardReport, ReadError> {
        let mut report = ShardReport::default();
        let expected = self.database().audit().await;
        report.damage.extend(integrity(&self.database().readers).await.map_err(|error| self.read_error(error))?);
        let entities = match self.read_entities(&mut report).await {
            Err(error) if error.is_damage() => {
                report.damage.push(words(&error));
                return Ok(report);
            }
            other => other?,
        };
        let end = expected.map_or(u64::MAX, |stored| stored.progress.next_position);
        let mut digest = Digest::default();
        let mut versions = BTreeMap::new();
        let mut after = 0;
        let indexed = expected.map_or(0, |stored| stored.progress.indexed_position);
        let (mut indexed_rows, mut found_by_index) = (0, 0);
        loop {
            let rows = sqlx::query(
                "SELECT * FROM log NOT INDEXED WHERE position > ? AND position < ? ORDER BY position LIMIT ?",
            )
            .bind(i64::try_from(after).unwrap_or(i64::MAX))
            .bind(i64::try_from(end).unwrap_or(i64::MAX))
            .bind(PAGE_ROWS)
            .fetch_all(&self.database().readers)
            .await;
            let rows = match rows.map_err(|error| self.read_error(error)) {
                Err(error) if error.is_damage() => {
                    report.damage.push(words(&error));
                    return Ok(report);
                }
                other => other?,
            };
            let Some(last) = rows.last() else { break };
            let before = after;
            after = last.try_get::<i64, _>("position").map_err(|error| self.read_error(error))?.cast_unsigned();
            for row in &rows {
                let Some(entity) = row.try_get::<i64, _>("eid").ok().and_then(|eid| entities.get(&eid)) else {
                    report.damage.push("a commit belongs to no entity".to_owned());
                    continue;
                };
                let found = match shard::parse(row, entity) {
                    Ok((log_row, hash, checksum)) if hash.checksum() == checksum => {
                        digest.add(&hash);
                        report.commits += 1;
                        report.events += u64::from(log_row.count);
                        let next = versions.entry(entity.eid).or_insert(1);
                        let dense = log_row.version == *next && log_row.slot == entity.slot;
                        *next = log_row.version + u64::from(log_row.count);
                        if dense {
                            commits.check(entity, &log_row).await
                        } else {
                            Err(format!("version {} is out of place", log_row.version))
                        }
                    }
                    Ok((log_row, ..)) => {
                        Err(format!("the row at position {} does not match its checksum", log_row.position))
                    }
                    Err(error) => Err(crate::sqlite::detail(&error)),
                };
                if let Err(detail) = found {
                    report.bad_entities.push((Some(entity.id_hash), detail));
                }
            }
            let positions = rows.iter().filter_map(|row| row.try_get::<i64, _>("position").ok());
            indexed_rows += positions.filter(|position| position.cast_unsigned() <= indexed).count() as u64;
            found_by_index += self.count_indexed(before, after.min(indexed)).await?;
        }
        if indexed_rows != found_by_index || self.index_rows(indexed).await? != indexed_rows {
            report.damage.push("the index of the log is not that of its rows".to_owned());
        }
        if expected.is_some_and(|stored| stored.progress.digest != digest) {
            report.damage.push("the digest of all rows is not the one that was committed".to_owned());
        }
        Ok(report)
    }

    /// How many rows of the log behind `after`, up to `last`, their index leads to.
    async fn count_indexed(&self, after: u64, last: u64) -> Result<u64, ReadError> {
        let count = sqlx::query(
            "SELECT count(*) FROM log CROSS JOIN log_index ON log_index.eid = log.eid AND log_index.version = log.version
             WHERE log_index.position = log.position AND log.position > ? AND log.position <= ?",
        )
        .bind(after.cast_signed())
        .bind(last.cast_signed());
        self.count(count).await
    }

    /// How many rows the index has for positions up to `last`.
    async fn index_rows(&self, last: u64) -> Result<u64, ReadError> {
        self.count(sqlx::query("SELECT count(*) FROM log_index WHERE position <= ?").bind(last.cast_signed())).await
    }

    async fn count(&self, query: Bound) -> Result<u64, ReadError> {
        let row = query.fetch_one(&self.database().readers).await;
        row.and_then(|row| row.try_get::<i64, _>(0)).map(i64::cast_unsigned).map_err(|error| self.read_error(error))
    }

    async fn read_entities(&self, report: &mut ShardReport) -> Result<BTreeMap<i64, EntityRow>, ReadError> {
        let mut entities = BTreeMap::new();
        let mut after = 0;
        loop {
            let page = self.entities(after, 512).await?;
            let Some(last) = page.last() else { return Ok(entities) };
            after = last.as_ref().map_or_else(|eid| *eid, |entity| entity.eid);
            for entity in page {
                report.entities += 1;
                match entity {
                    Ok(entity) => {
                        // A lookup goes by the hash: the index must lead to this very row.
                        let found = self.find_entity(entity.copy, entity.id_hash).await;
                        if found.is_ok_and(|found| found.as_ref() == Some(&entity)) {
                            entities.insert(entity.eid, entity);
                        } else {
                            let detail = "it cannot be found by its hash".to_owned();
                            report.bad_entities.push((Some(entity.id_hash), detail));
                            entities.insert(entity.eid, entity);
                        }
                    }
                    Err(eid) => report.bad_entities.push((None, format!("the row of entity number {eid} is damaged"))),
                }
            }
        }
    }
}

/// SQLite's own check: the structure of every page, and every index against its table.
pub(crate) async fn integrity(readers: &SqlitePool) -> sqlx::Result<Vec<String>> {
    let rows = match sqlx::query("PRAGMA integrity_check(20)").fetch_all(readers).await {
        Err(error) if crate::sqlite::trouble(&error) == crate::sqlite::Trouble::Corrupt => {
            return Ok(vec![crate::sqlite::detail(&error)]);
        }
        other => other?,
    };
    let findings = rows.iter().map(|row| row.try_get::<String, _>(0)).collect::<Result<Vec<_>, _>>()?;
    Ok(findings.into_iter().filter(|finding| finding != "ok").collect())
}

/// An error with its cause, in one line.
pub(crate) fn words(error: &ReadError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
