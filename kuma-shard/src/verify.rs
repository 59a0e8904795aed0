//! Verification of a shard: every row against its checksum, the rows of each slot and all rows against their digests, every index
//! against its table.
//!
//! Invariants:
//! - It runs beside appends: what is compared is the log up to the position, and the digests, at its start. Erasures change what is in front
//!   of that position: a slot in which one went on meanwhile is not compared, and said so.
//! - It never holds an old state open for longer than one page of rows; SQLite's own check of the structure is the exception.
//! - What it keeps is a number for each entity, and the sum of each slot.

use std::collections::{BTreeMap, HashMap};

use sqlx::{Row, SqlitePool};

use crate::{
    Digest, EntityHash, EntityRow, LogRow, ReadError, Shard, Slot, book::Audit, progress::Stored, scrub::SoundRow,
    slots::SlotSum,
};

const PAGE_ROWS: u32 = 256;
/// Rows of a stretch of the log, those that have an append key, and of both those that their index leads to.
const COUNT_INDEXED: &str = "
    SELECT count(*), count(log_index.position), count(log.append_key), count(key_index.position)
    FROM log
    LEFT JOIN log_index ON log_index.eid = log.eid AND log_index.version = log.version AND log_index.position = log.position
    LEFT JOIN key_index ON key_index.eid = log.eid AND key_index.append_key = log.append_key AND key_index.position = log.position
    WHERE log.position > ? AND log.position <= ?";
/// Findings that are kept. Where there are more, the file is beyond a repair entity by entity.
const FINDINGS_MAX: usize = 1000;

/// What a look over a whole shard found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardReport {
    /// Entities seen.
    pub entities: u64,
    /// Entities of them that are erased.
    pub erased: u64,
    /// Commits read.
    pub commits: u64,
    /// Events in them.
    pub events: u64,
    /// Stubs of erased commits.
    pub stubs: u64,
    /// Damage that belongs to one entity: its hash, or none where even that cannot be read, and what is wrong. The first 1000 of it.
    pub bad_entities: Vec<(Option<EntityHash>, String)>,
    /// Slots that were not compared with their digests, because something in them was erased, or left, meanwhile, in order. Not damage: verify again.
    pub changed_slots: Vec<Slot>,
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
    fn compare(&mut self, expected: &Audit, now: &Audit, mut found: BTreeMap<Slot, SlotSum>) {
        let mut digest = Digest::default();
        found.values().for_each(|sum| digest.add_digest(&sum.digest));
        let before = &expected.rewrites;
        let changed = |slot: &Slot| now.rewrites.get(slot) != before.get(slot);
        for (slot, expected) in &expected.slots {
            let found = found.remove(slot).unwrap_or_default();
            if changed(slot) {
                self.changed_slots.push(*slot);
            } else if found != *expected {
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
        if now.rewrites == expected.rewrites && digest != expected.stored.progress.digest {
            self.damage.push("the digest of all rows is not the one that was committed".to_owned());
        }
    }
}

/// Checks of a commit what its shard cannot: whoever holds the keys. It is not asked about stubs.
pub trait CommitCheck: Send {
    /// Says what is wrong with a commit, if anything. (A trait and not an async closure, whose future is not known to be `Send`.)
    fn check(&mut self, entity: &EntityRow, commit: &LogRow) -> impl Future<Output = Result<(), String>> + Send;
}

/// Rows that are in an index, or should be, and how many of them it leads to.
#[derive(Clone, Copy, Default)]
struct Indexed {
    rows: u64,
    found: u64,
}

impl Indexed {
    fn add(&mut self, more: Indexed) {
        self.rows += more.rows;
        self.found += more.found;
    }

    /// Whether the index, which has `entries` in all, leads to each row and to nothing else.
    fn is_whole(self, entries: u64) -> bool {
        self.found == self.rows && entries == self.rows
    }
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
        let found = self.look_at_log(report, commits, &expected).await?;
        let now = self.database().audit().await?;
        report.compare(&expected, &now, found);
        Ok(())
    }

    /// Checks each row, and the indexes on the way; returns what each slot holds.
    async fn look_at_log(
        &self,
        report: &mut ShardReport,
        commits: &mut impl CommitCheck,
        expected: &Audit,
    ) -> Result<BTreeMap<Slot, SlotSum>, ReadError> {
        let Audit { stored: Stored { progress: expected, .. }, rewrites, .. } = expected;
        let mut found: BTreeMap<Slot, SlotSum> = BTreeMap::new();
        // Of each entity the next version: all that is kept of it from page to page.
        let mut versions = HashMap::new();
        let indexed = expected.indexed_position;
        let (mut by_version, mut by_key) = (Indexed::default(), Indexed::default());
        let mut after = 0;
        loop {
            let page = self.page(after, expected.next_position, PAGE_ROWS).await?;
            let last = page.extent.last;
            for row in page.rows {
                let position = row.as_ref().map_or_else(|bad| bad.position, |sound| sound.row.position);
                match row {
                    Err(bad) => {
                        report.bad_entity(bad.entity, format!("the row at position {position} {}", bad.detail));
                    }
                    Ok(SoundRow { entity, row, hash }) => {
                        if !entity.is_departed() {
                            found.entry(row.slot).or_default().add(&hash);
                        }
                        match row.is_stub() {
                            true => report.stubs += 1,
                            false => {
                                report.commits += 1;
                                report.events += u64::from(row.count);
                            }
                        }
                        let next = versions.entry(entity.eid).or_insert(1);
                        let dense = row.version == *next && row.slot == entity.slot;
                        *next = row.version + u64::from(row.count);
                        let checked = match (dense, row.is_stub()) {
                            (true, false) if entity.is_departed() => Ok(()),
                            (true, false) => commits.check(&entity, &row).await,
                            (true, true) if entity.erased_at_us.is_some() => Ok(()),
                            (true, true) => Err(format!("version {} is empty", row.version)),
                            (false, _) => Err(format!("version {} is out of place", row.version)),
                        };
                        if let Err(detail) = checked {
                            report.bad_entity(Some(entity.id_hash), detail);
                        }
                    }
                }
            }
            let (versions, keys) = self.count_indexed(after, last.min(indexed)).await?;
            by_version.add(versions);
            by_key.add(keys);
            after = last;
            if !page.extent.more {
                break;
            }
        }
        if !by_version.is_whole(self.count("SELECT count(*) FROM log_index WHERE position <= ?", indexed).await?) {
            report.damage.push("the index of the log is not that of its rows".to_owned());
        }
        // A key that two commits have is one entry, and only one of them is found by it. An erasure takes keys away.
        let is_settled = self.database().audit().await?.rewrites == *rewrites;
        if is_settled
            && !by_key.is_whole(self.count("SELECT count(*) FROM key_index WHERE position <= ?", indexed).await?)
        {
            report.damage.push("the index of append keys is not that of the log's rows".to_owned());
        }
        Ok(found)
    }

    /// The rows of the log behind `after`, up to `last`, that their indexes lead to: by version, and by append key.
    async fn count_indexed(&self, after: u64, last: u64) -> Result<(Indexed, Indexed), ReadError> {
        let query = sqlx::query(COUNT_INDEXED).bind(after.cast_signed()).bind(last.cast_signed());
        let row = query.fetch_one(&self.database().readers).await.map_err(|error| self.read_error(error))?;
        let number = |index| row.try_get::<i64, _>(index).map(i64::cast_unsigned);
        let count = |rows, found| Ok(Indexed { rows: number(rows)?, found: number(found)? });
        count(0, 1).and_then(|versions| Ok((versions, count(2, 3)?))).map_err(|error| self.read_error(error))
    }

    /// What `statement` counts up to the position `last`.
    async fn count(&self, statement: &'static str, last: u64) -> Result<u64, ReadError> {
        let row = sqlx::query(statement).bind(last.cast_signed()).fetch_one(&self.database().readers).await;
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
                        report.erased += u64::from(entity.erased_at_us.is_some());
                        // A lookup goes by the hash: the index must lead to this very life. It may be erased meanwhile.
                        let found = self.lives(entity.copy, entity.id_hash).await;
                        let is_it = |found: &EntityRow| found.eid == entity.eid && found.key_id == entity.key_id;
                        if !found.is_ok_and(|found| found.iter().any(is_it)) {
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
    use std::sync::Arc;

    use super::*;
    use crate::{
        Activation, Commit, CopyId,
        sqlite::PAGE_BYTES,
        test_shard::{TestShard, commit},
    };

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
    async fn append_keys_that_are_not_those_of_the_log_are_noticed() {
        for statement in [
            "DELETE FROM key_index WHERE position = 2",
            "UPDATE key_index SET position = 3 WHERE position = 2",
            "UPDATE key_index SET position = 99 WHERE position = 2",
            "UPDATE key_index SET append_key = x'00' WHERE position = 2",
            "UPDATE key_index SET eid = 7 WHERE position = 3",
            "INSERT INTO key_index VALUES (1, x'00', 2)",
        ] {
            let mut shard = shard().await;
            shard.tamper(statement).await;
            let report = shard.verify(&mut Counting::default()).await.unwrap();
            assert_eq!(report.damage, ["the index of append keys is not that of the log's rows"], "{statement}");
            assert!(report.bad_entities.is_empty() && report.bad_slots.is_empty());
            shard.stop().await;
        }
    }

    /// The writer knows only the keys that are not in the index yet. One that nobody looked up is written again, and must neither
    /// hold up what comes after it nor go unnoticed.
    #[tokio::test]
    async fn a_key_that_two_commits_have_is_noticed_and_in_nobodys_way() {
        let mut shard = shard().await;
        let entity = shard.find_entity(CopyId::LIVE, EntityHash([1; 16])).await.unwrap().map(Arc::new).unwrap();
        let activation = Arc::new(Activation::at(3));
        let twice = Commit { append_key: commit(&entity, 2).append_key, ..commit(&entity, 4) };
        shard.submit(&activation, twice).await.unwrap().unwrap();
        shard.submit(&activation, commit(&entity, 5)).await.unwrap().unwrap();
        shard.reopen().await;
        shard.append(&entity, 6..=7).await;
        let key = commit(&entity, 2).append_key.unwrap();
        assert_eq!(shard.find_append(&entity, &key).await.unwrap().map(|row| row.version), Some(2));
        let report = shard.verify(&mut Counting::default()).await.unwrap();
        assert_eq!(report.damage, ["the index of append keys is not that of the log's rows"]);
        shard.stop().await;
    }

    #[tokio::test]
    async fn rows_of_the_indexes_are_found_by_their_keys() {
        let shard = TestShard::new().await;
        let explain = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {COUNT_INDEXED}"));
        let rows = sqlx::query(explain).fetch_all(&shard.database().readers).await.unwrap();
        let plan: Vec<String> = rows.iter().map(|row| row.get("detail")).collect();
        assert_eq!(
            plan,
            [
                "SEARCH log USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)",
                "SEARCH log_index USING PRIMARY KEY (eid=? AND version=?) LEFT-JOIN",
                "SEARCH key_index USING PRIMARY KEY (eid=? AND append_key=?) LEFT-JOIN"
            ]
        );
        shard.stop().await;
    }

    /// Of the page that holds all of `key_index`, every byte that has a meaning.
    #[tokio::test]
    async fn no_flipped_bit_in_the_append_keys_goes_unnoticed() {
        let mut shard = TestShard::new().await;
        let entities = [shard.entity(1, 0), shard.entity(2, 18)];
        for entity in &entities {
            shard.append(entity, 1..=4).await;
        }
        let root = sqlx::query("SELECT rootpage FROM sqlite_schema WHERE name = 'key_index'");
        let root: i64 = root.fetch_one(&shard.database().readers).await.unwrap().get(0);
        shard.stop().await;
        let path = shard.options.directory.join(shard.file());
        let whole = std::fs::read(&path).unwrap();
        let page = (root as usize - 1) * PAGE_BYTES as usize;
        let (mut noticed, mut harmless) = (0, 0);
        // The head with one pointer a row, and the rows: https://sqlite.org/fileformat2.html, "B-tree Pages".
        let rows = usize::from(u16::from_be_bytes([whole[page + 5], whole[page + 6]]));
        for byte in (0..8 + 2 * 8).chain(rows..PAGE_BYTES as usize) {
            let mut bytes = whole.clone();
            bytes[page + byte] ^= 1 << (byte % 8);
            std::fs::write(&path, bytes).unwrap();
            shard.start().await;
            if shard.verify(&mut Counting::default()).await.unwrap().is_clean() {
                harmless += 1;
                for entity in &entities {
                    for version in 1..=4 {
                        let key = commit(entity, version).append_key.unwrap();
                        let found = shard.find_append(entity, &key).await.unwrap();
                        assert_eq!(found.map(|row| row.version), Some(version), "byte {byte}");
                    }
                    assert_eq!(shard.append_keys(entity, 9).await.unwrap().len(), 4, "byte {byte}");
                }
            } else {
                noticed += 1;
            }
            shard.stop().await;
        }
        assert!(noticed > 100 && harmless < 10, "{noticed} noticed, {harmless} harmless");
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
