//! The file of a durable subscription: how far its consumer has come, and the events that it put aside.
//!
//! It is the file of a model without tables of a projection, and synced with each transaction: what is acknowledged is not handed out again.
//!
//! Invariant: a parked event is kept by its place in the log, never as a copy.

use std::{collections::BTreeMap, path::Path};

use rusqlite::{Connection, Transaction};

use crate::{EntityHash, FileOptions, ModelError, ModelFile, ModelProgress, Purged};

const TABLES: &str = "CREATE TABLE parked(
    number INTEGER PRIMARY KEY, shard INTEGER NOT NULL, position INTEGER NOT NULL, version INTEGER NOT NULL, entity TEXT NOT NULL,
    attempts INTEGER NOT NULL, at INTEGER NOT NULL, why TEXT NOT NULL, UNIQUE (shard, position, version)
) STRICT";
const PURGE: &str = "DELETE FROM parked WHERE entity = :hash";
/// Says of a file that something was parked in it.
const WAS_PARKED: &str = "was_parked";

/// An event that was put aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParkedRow {
    /// Its number in the file; 0 for one that has none yet.
    pub number: i64,
    /// The shard.
    pub shard: u16,
    /// The place of its commit in the shard's log.
    pub position: u64,
    /// The entity's version that it made.
    pub version: u64,
    /// Whose it is.
    pub entity: EntityHash,
    /// How often it was put aside.
    pub attempts: u32,
    /// When, the last time. Microseconds since 1970.
    pub at_us: i64,
    /// Why, in the consumer's words.
    pub why: String,
}

/// What a consumer has done with what it was handed. What it says of shards and positions is of slots and seqs where the file is of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acknowledged {
    /// Of each shard, up to which position everything is acknowledged.
    pub positions: BTreeMap<u16, u64>,
    /// The number of the last tombstone that is.
    pub erasures: i64,
    /// The numbers of parked events that are not parked any more.
    pub resolved: Vec<i64>,
    /// An event that is put aside, perhaps once more.
    pub parked: Option<ParkedRow>,
    /// What else is to be kept with it, by name.
    pub meta: Vec<(&'static str, String)>,
}

/// The open file of a durable subscription.
pub struct SubscriberFile(ModelFile);

impl SubscriberFile {
    /// Makes the file, with `meta`, of a subscription that begins behind `acknowledged`.
    ///
    /// # Errors
    /// It cannot be made, or exists.
    pub fn create(
        path: &Path,
        options: &FileOptions,
        meta: &[(&str, String)],
        acknowledged: &Acknowledged,
    ) -> Result<(), ModelError> {
        let mut file = ModelFile::create(path, options, meta)?;
        file.migrate(&[TABLES.to_owned()])?;
        let mut file = SubscriberFile(file);
        file.acknowledge(acknowledged)?;
        file.set_confirmed(acknowledged.erasures)?;
        file.close()
    }

    /// Opens the file.
    ///
    /// # Errors
    /// It is not the file of a subscription, or cannot be read.
    pub fn open(path: &Path, options: &FileOptions) -> Result<Self, ModelError> {
        let file = ModelFile::open(path, options)?;
        file.sync_each_commit()?;
        Ok(SubscriberFile(file))
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn meta(&self, name: &str) -> Result<Option<String>, ModelError> {
        self.0.meta(name)
    }

    /// What it says of itself, as a number; 0 if it says nothing.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn number(&self, name: &str) -> Result<i64, ModelError> {
        Ok(self.meta(name)?.and_then(|text| text.parse().ok()).unwrap_or_default())
    }

    /// Notes what a consumer has done, in one transaction; durable when it returns.
    ///
    /// # Errors
    /// Nothing of it was noted.
    pub fn acknowledge(&mut self, acknowledged: &Acknowledged) -> Result<(), ModelError> {
        let Acknowledged { positions, erasures, resolved, parked, meta: more } = acknowledged;
        let mut meta = vec![("erasures", erasures.to_string())];
        meta.extend(more.iter().cloned());
        if parked.is_some() {
            meta.push((WAS_PARKED, "1".to_owned()));
        }
        let positions = positions.iter().map(|(shard, position)| (*shard, (*position, 0))).collect();
        let progress = ModelProgress { positions, meta, ..ModelProgress::default() };
        let applied = self.0.apply(&progress, |transaction| {
            let mut delete = transaction.prepare_cached("DELETE FROM parked WHERE number = ?")?;
            resolved.iter().try_for_each(|number| delete.execute([number]).map(drop))?;
            parked.as_ref().map_or(Ok(()), |row| park(transaction, row))
        });
        applied?.map_err(|source| ModelError::Sqlite { path: self.0.path().to_owned(), source })
    }

    /// Of each shard, up to which position everything is acknowledged.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn positions(&self) -> Result<BTreeMap<u16, u64>, ModelError> {
        Ok(self.0.positions()?.into_iter().map(|(shard, (position, _))| (shard, position)).collect())
    }

    /// Writes down anew what the file says in positions of shards, in one transaction: where everything is acknowledged, and by their numbers where
    /// parked events are. Those that are not named are dropped.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn translate(
        &mut self,
        acknowledged: &Acknowledged,
        parked: &BTreeMap<i64, (u16, u64)>,
    ) -> Result<(), ModelError> {
        let positions = acknowledged.positions.iter().map(|(log, position)| (*log, (*position, 0))).collect();
        let progress = ModelProgress { positions, meta: acknowledged.meta.clone(), ..ModelProgress::default() };
        let numbers: Vec<i64> = self.parked()?.iter().map(|row| row.number).collect();
        let applied = self.0.apply(&progress, |transaction| {
            // Out of the way first: the places of some are the former places of others.
            transaction.execute("UPDATE parked SET position = -number, shard = 0", [])?;
            for number in numbers {
                match parked.get(&number) {
                    Some((log, position)) => transaction.execute(
                        "UPDATE parked SET shard = ?, position = ? WHERE number = ?",
                        (log, position.cast_signed(), number),
                    )?,
                    None => transaction.execute("DELETE FROM parked WHERE number = ?", [number])?,
                };
            }
            Ok(())
        });
        applied?.map_err(|source: rusqlite::Error| ModelError::Sqlite { path: self.0.path().to_owned(), source })
    }

    /// Notes that receipts say of the erasures up to this one that they are confirmed.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_confirmed(&self, erasures: i64) -> Result<(), ModelError> {
        self.0.set_meta("confirmed", &erasures.to_string())
    }

    /// What is parked, oldest first.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn parked(&self) -> Result<Vec<ParkedRow>, ModelError> {
        self.0.read(|connection: &Connection| {
            let mut statement = connection.prepare(
                "SELECT number, shard, position, version, entity, attempts, at, why FROM parked ORDER BY number",
            )?;
            let rows = statement.query_map([], |row| {
                let mut entity = [0; 16];
                // It was written by this code alone.
                let _ = hex::decode_to_slice(row.get::<_, String>(4)?, &mut entity);
                Ok(ParkedRow {
                    number: row.get(0)?,
                    shard: row.get(1)?,
                    position: row.get::<_, i64>(2)?.cast_unsigned(),
                    version: row.get::<_, i64>(3)?.cast_unsigned(),
                    entity: EntityHash(entity),
                    attempts: row.get(5)?,
                    at_us: row.get(6)?,
                    why: row.get(7)?,
                })
            })?;
            rows.collect()
        })
    }

    /// Deletes what is parked of these entities, so that it is in no byte of the file.
    ///
    /// # Errors
    /// As [`ModelFile::purge`].
    pub fn purge(&mut self, entities: &[Purged]) -> Result<(), ModelError> {
        // What was parked once may still be in its unused space.
        match self.meta(WAS_PARKED)?.is_some() {
            true => self.0.purge(PURGE, entities).map(drop),
            false => Ok(()),
        }
    }

    /// Closes the file.
    ///
    /// # Errors
    /// As [`ModelFile::close`].
    pub fn close(self) -> Result<(), ModelError> {
        self.0.close()
    }
}

fn park(transaction: &Transaction<'_>, row: &ParkedRow) -> rusqlite::Result<()> {
    let ParkedRow { shard, position, version, entity, at_us, why, .. } = row;
    let insert = "INSERT INTO parked(shard, position, version, entity, attempts, at, why) VALUES (?, ?, ?, ?, 1, ?, ?)
         ON CONFLICT(shard, position, version) DO UPDATE SET attempts = attempts + 1, at = excluded.at, why = excluded.why";
    let values = (shard, position.cast_signed(), version.cast_signed(), entity.to_hex(), at_us, why);
    transaction.prepare_cached(insert)?.execute(values).map(drop)
}
