//! Verification of a shard: every row against its checksum, the rows of each slot and all rows against their digests, every index
//! against its table.
//!
//! Invariants:
//! - It runs beside appends: what is compared is the log up to the position, and the digests, at its start.
//! - It never holds an old state open for longer than one page of rows; SQLite's own check of the structure is the exception.
//! - What it keeps is a number for each entity, and the sum of each slot.

use std::collections::{BTreeMap, HashMap};

use sqlx::{Row, SqlitePool};

use crate::{
    Digest, EntityHash, EntityRow, LogRow, ReadError, Shard, Slot,
    book::{Audit, Progress},
    scrub::SoundRow,
    slots::SlotSum,
    statements::Bound,
};

const PAGE_ROWS: u32 = 256;
/// Findings that are kept. Where there are more, the file is beyond a repair entity by entity.
const FINDINGS_MAX: usize = 1000;

/// What a look over a whole shard found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardReport {
    /// Entities seen.
    pub entities: u64,
    /// Commits read.
    pub commits: u64,
    /// Events in them.
    pub events: u64,
    /// Damage that belongs to one entity: its hash, or none where even that cannot be read, and what is wrong. The first 1000 of it.
    pub bad_entities: Vec<(Option<EntityHash>, String)>,
    /// Slots whose rows are not those that were committed, in order.
    pub bad_slots: Vec<Slot>,
    /// Damage that does not belong to one entity; each bad slot is in it too.
    pub damage: Vec<String>,
}

impl ShardReport {
    /// Whether all is as it was committed.
    pub fn is_clean(&self) -> bool {
        self.bad_entities.is_empty() && self.bad_slots.is_empty() && self.damage.is_empty()
    }

    fn bad_entity(&mut self, entity: Option<EntityHash>, detail: String) {
        if self.bad_entities.len() < FINDINGS_MAX {
            self.bad_entities.push((entity, detail));
        }
    }

    /// Compares what each slot holds, and all of them together.
    fn compare(&mut self, expected: &Audit, mut found: BTreeMap<Slot, SlotSum>) {
        let mut digest = Digest::default();
        found.values().for_each(|sum| digest.add_digest(&sum.digest));
        for (slot, expected) in &expected.slots {
            let found = found.remove(slot).unwrap_or_default();
            if found != *expected {
                self.bad_slots.push(*slot);
                self.damage.push(format!(
                    "the digest of slot {slot} is not that of its rows ({} sound rows, {} were committed)",
                    found.len, expected.len
                ));
            }
        }
        for (slot, found) in found {
            self.bad_slots.push(slot);
            self.damage.push(format!("slot {slot} is not of this shard and has {} rows in it", found.len));
        }
        self.bad_slots.sort_unstable();
        if digest != expected.stored.progress.digest {
            self.damage.push("the digest of all rows is not the one that was committed".to_owned());
        }
    }
}

/// Checks of a commit what its shard cannot: whoever holds the keys.
pub trait CommitCheck: Send {
    /// Says what is wrong with a commit, if anything. (A trait and not an async closure, whose future is not known to be `Send`.)
    fn check(&mut self, entity: &EntityRow, commit: &LogRow) -> impl Future<Output = Result<(), String>> + Send;
}

impl Shard {
    /// Reads everything. `commits` is asked about every sound commit in the order of the log.
    ///
    /// # Errors
    /// The file cannot be read at all, or what it should hold is in doubt now. Damage stands in the report.
    pub async fn verify(&self, commits: &mut impl CommitCheck) -> Result<ShardReport, ReadError> {
        let mut report = ShardReport::default();
        match self.look(&mut report, commits).await {
            // The structure is damaged there: what is behind it cannot be looked at.
            Err(error) if error.is_damage() => report.damage.push(words(&error)),
            other => other?,
        }
        Ok(report)
    }

    async fn look(&self, report: &mut ShardReport, commits: &mut impl CommitCheck) -> Result<(), ReadError> {
        let expected = self.database().audit().await?;
        report.damage.extend(integrity(&self.database().readers).await.map_err(|error| self.read_error(error))?);
        self.look_at_entities(report).await?;
        let found = self.look_at_log(report, commits, &expected.stored.progress).await?;
        report.compare(&expected, found);
        Ok(())
    }

    /// Checks each row, and the index on the way; returns what each slot holds.
    async fn look_at_log(
        &self,
        report: &mut ShardReport,
        commits: &mut impl CommitCheck,
        expected: &Progress,
    ) -> Result<BTreeMap<Slot, SlotSum>, ReadError> {
        let mut found: BTreeMap<Slot, SlotSum> = BTreeMap::new();
        // Of each entity the next version: all that is kept of it from page to page.
        let mut versions = HashMap::new();
        let indexed = expected.indexed_position;
        let (mut indexed_rows, mut found_by_index) = (0, 0);
        let mut after = 0;
        loop {
            let page = self.page(after, expected.next_position, PAGE_ROWS).await?;
            let last = page.extent.last;
            for row in page.rows {
                let position = row.as_ref().map_or_else(|bad| bad.position, |sound| sound.row.position);
                indexed_rows += u64::from(position <= indexed);
                match row {
                    Err(bad) => {
                        report.bad_entity(bad.entity, format!("the row at position {position} {}", bad.detail));
                    }
                    Ok(SoundRow { entity, row, hash }) => {
                        found.entry(row.slot).or_default().add(&hash);
                        report.commits += 1;
                        report.events += u64::from(row.count);
                        let next = versions.entry(entity.eid).or_insert(1);
                        let dense = row.version == *next && row.slot == entity.slot;
                        *next = row.version + u64::from(row.count);
                        let checked = match dense {
                            true => commits.check(&entity, &row).await,
                            false => Err(format!("version {} is out of place", row.version)),
                        };
                        if let Err(detail) = checked {
                            report.bad_entity(Some(entity.id_hash), detail);
                        }
                    }
                }
            }
            found_by_index += self.count_indexed(after, last.min(indexed)).await?;
            after = last;
            if !page.extent.more {
                break;
            }
        }
        if indexed_rows != found_by_index || self.index_rows(indexed).await? != indexed_rows {
            report.damage.push("the index of the log is not that of its rows".to_owned());
        }
        Ok(found)
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

    async fn look_at_entities(&self, report: &mut ShardReport) -> Result<(), ReadError> {
        let mut after = 0;
        loop {
            let page = self.entities(after, 512).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.as_ref().map_or_else(|eid| *eid, |entity| entity.eid);
            for entity in page {
                report.entities += 1;
                match entity {
                    Ok(entity) => {
                        // A lookup goes by the hash: the index must lead to this very row.
                        let found = self.find_entity(entity.copy, entity.id_hash).await;
                        if !found.is_ok_and(|found| found.as_ref() == Some(&entity)) {
                            report.bad_entity(Some(entity.id_hash), "it cannot be found by its hash".to_owned());
                        }
                    }
                    Err(eid) => report.bad_entity(None, format!("the row of entity number {eid} is damaged")),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_shard::TestShard;

    /// Counts what it is asked about.
    #[derive(Default)]
    struct Counting(u64);

    impl CommitCheck for Counting {
        async fn check(&mut self, _: &EntityRow, _: &LogRow) -> Result<(), String> {
            self.0 += 1;
            Ok(())
        }
    }

    /// Three entities in three slots; positions 1 to 3, 4 to 6 and 7 to 9. All but the last is in the index and behind the mark.
    async fn shard() -> TestShard {
        let mut shard = TestShard::new().await;
        for (name, slot) in [(1, 0), (2, 18), (3, 4094)] {
            let entity = shard.entity(name, slot);
            shard.append(&entity, 1..=2).await;
            if name == 3 {
                shard.reopen().await;
            }
            shard.append(&entity, 3..=3).await;
        }
        shard
    }

    #[tokio::test]
    async fn every_sound_commit_is_asked_about_once() {
        let shard = shard().await;
        let mut counting = Counting::default();
        let report = shard.verify(&mut counting).await.unwrap();
        assert_eq!((report.entities, report.commits, report.events, counting.0), (3, 9, 9, 9));
        assert!(report.is_clean(), "{report:?}");
        shard.stop().await;
    }

    #[tokio::test]
    async fn damage_is_told_by_entity_and_by_slot() {
        let digest = "the digest of all rows is not the one that was committed";
        let slot = "the digest of slot 18 is not that of its rows (2 sound rows, 3 were committed)";
        for (statement, expected) in [
            ("UPDATE log SET body = x'00' WHERE position = 6", "the row at position 6 does not match its checksum"),
            ("DELETE FROM log WHERE position = 5", "version 3 is out of place"),
        ] {
            let mut shard = shard().await;
            shard.tamper(statement).await;
            let mut counting = Counting::default();
            let report = shard.verify(&mut counting).await.unwrap();
            assert_eq!(report.bad_entities, [(Some(EntityHash([2; 16])), expected.to_owned())]);
            assert_eq!(report.bad_slots, [Slot::new(18)]);
            assert!(
                report.damage.contains(&slot.to_owned()) && report.damage.contains(&digest.to_owned()),
                "{report:?}"
            );
            assert!(report.commits == 8 && counting.0 >= 7 && !report.is_clean());
            shard.stop().await;
        }
    }

    /// Its commits are then those of nobody, and not sound.
    #[tokio::test]
    async fn a_damaged_entity_is_told_by_its_number_and_its_slot() {
        let mut shard = shard().await;
        shard.tamper("UPDATE entity SET kind = 'other' WHERE eid = 2").await;
        let report = shard.verify(&mut Counting::default()).await.unwrap();
        let mut expected = vec![(None, "the row of entity number 2 is damaged".to_owned())];
        expected.extend([4, 5, 6].map(|position| {
            (None, format!("the row at position {position} belongs to an entity whose own row is damaged"))
        }));
        assert_eq!((report.bad_entities, report.bad_slots), (expected, vec![Slot::new(18)]));
        shard.stop().await;
    }

    #[tokio::test]
    async fn a_row_that_the_index_does_not_lead_to_is_noticed() {
        let mut shard = shard().await;
        shard.tamper("DELETE FROM log_index WHERE position = 2").await;
        let report = shard.verify(&mut Counting::default()).await.unwrap();
        assert_eq!(report.damage, ["the index of the log is not that of its rows"]);
        assert!(report.bad_entities.is_empty() && report.bad_slots.is_empty());
        shard.stop().await;
    }

    #[tokio::test]
    async fn verification_beside_appends_compares_what_was_there_at_its_start() {
        let shard = TestShard::new().await;
        let entities: Vec<_> = (0..4).map(|name| shard.entity(name, u64::from(name) * 2)).collect();
        for entity in &entities {
            shard.append(entity, 1..=50).await;
        }
        let append = async {
            for version in 51..=250 {
                for entity in &entities {
                    shard.append(entity, version..=version).await;
                }
                if version % 20 == 0 {
                    shard.persist_marks();
                }
            }
        };
        let verify = async {
            for _ in 0..10 {
                let report = shard.verify(&mut Counting::default()).await.unwrap();
                assert!(report.is_clean(), "{report:?}");
            }
        };
        tokio::join!(append, verify);
        shard.stop().await;
    }
}
