//! Verification of a whole store: what the shards check without keys, and that every commit opens with its entity's key.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use kuma_crypto::KeyId;
use kuma_shard::{CommitCheck, EntityHash, EntityRow, LogRow, ReadError, ShardReport};

use crate::{
    Kuma,
    body::{Body, split},
    replay::Opener,
    scrub::quarantine,
    shard_core::ShardCore,
};

/// Unwrapped keys that are kept while a shard is walked; commits come in the order of the log.
const KEYS_MAX: usize = 65_536;

/// What [`Kuma::verify`] found in one shard.
#[derive(Debug)]
pub struct ShardVerification {
    /// The shard.
    pub shard: u16,
    /// What was found; an error if it could not be looked at.
    pub outcome: Result<ShardReport, String>,
}

/// What events are called in a store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventName {
    /// The kind of their entities.
    pub kind: String,
    /// Their stored name.
    pub name: String,
    /// The schema version that they were written with.
    pub schema: u32,
}

/// What [`Kuma::verify`] found.
#[derive(Debug)]
pub struct Verification {
    /// Each shard.
    pub shards: Vec<ShardVerification>,
    /// Keys in `keys.db`.
    pub keys: u64,
    /// Keys of erased entities, of which only the names are left.
    pub keys_destroyed: u64,
    /// Damage in `keys.db`.
    pub keys_damage: Vec<String>,
    /// Damage in `node.db`.
    pub node_damage: Vec<String>,
    /// Keys that no entity has: what a crash between storing a new key and its first commit leaves behind. Harmless.
    pub keys_without_entity: u64,
    /// How many events of each name and schema version there are: what the code that reads this store must know
    /// (`testing::Corpus`).
    pub event_names: BTreeMap<EventName, u64>,
}

impl Verification {
    /// Whether everything is as it was committed.
    pub fn is_clean(&self) -> bool {
        let clean = |shard: &ShardVerification| shard.outcome.as_ref().is_ok_and(ShardReport::is_clean);
        self.keys_damage.is_empty() && self.node_damage.is_empty() && self.shards.iter().all(clean)
    }

    /// Entities, commits and events seen.
    pub fn totals(&self) -> (u64, u64, u64) {
        let reports = self.shards.iter().filter_map(|shard| shard.outcome.as_ref().ok());
        reports.fold((0, 0, 0), |(entities, commits, events), report| {
            (entities + report.entities, commits + report.commits, events + report.events)
        })
    }

    /// Entities with damage, and what it is.
    pub fn bad_entities(&self) -> impl Iterator<Item = &(Option<EntityHash>, String)> {
        self.shards.iter().filter_map(|shard| shard.outcome.as_ref().ok()).flat_map(|report| &report.bad_entities)
    }
}

impl Kuma {
    /// Reads everything and checks it: each row against its checksum and its seal, all rows of a shard against its committed digest,
    /// each index against its table, each slot against its digest, and that the key of each entity with commits unwraps. Runs beside
    /// appends. `progress` is called with the number of commits checked so far. An entity with damage is quarantined; the others are
    /// not affected.
    ///
    /// # Errors
    /// `keys.db` cannot be read at all. Damage stands in the report.
    pub async fn verify(&self, mut progress: impl FnMut(u64) + Send) -> Result<Verification, ReadError> {
        let mut shards = Vec::new();
        let mut used_keys = HashSet::new();
        let mut event_names = BTreeMap::new();
        let mut checked = 0;
        for (shard, open) in self.open_shards() {
            let outcome = match open {
                Err(why) => Err(why.to_owned()),
                Ok(core) => {
                    let progress = || {
                        checked += 1;
                        progress(checked);
                    };
                    let mut names = HashMap::new();
                    let openers = HashMap::new();
                    let mut check = KeyCheck { core, used_keys: &mut used_keys, names: &mut names, openers, progress };
                    let outcome = core.shard.verify(&mut check).await.map_err(|error| error.to_string());
                    for ((kind, name, schema), count) in names {
                        *event_names.entry(EventName { kind: kind.to_string(), name, schema }).or_default() += count;
                    }
                    let found = outcome.iter().flat_map(|report| &report.bad_entities);
                    for (entity, detail) in found.filter_map(|(entity, detail)| Some((entity.as_ref()?, detail))) {
                        quarantine(core, *entity, detail.clone());
                    }
                    outcome
                }
            };
            shards.push(ShardVerification { shard, outcome });
        }
        let mut keys_without_entity = 0;
        let report = self
            .vault()
            .keys
            .verify(|row| keys_without_entity += u64::from(!row.is_destroyed() && !used_keys.contains(&row.key_id)))
            .await?;
        let node_damage = self.inner.node().verify().await?;
        Ok(Verification {
            shards,
            keys: report.keys,
            keys_destroyed: report.destroyed,
            keys_damage: report.damage,
            node_damage,
            keys_without_entity,
            event_names,
        })
    }
}

/// Checks that each commit opens with its entity's key, and holds what its row says.
struct KeyCheck<'a, F> {
    core: &'a ShardCore,
    used_keys: &'a mut HashSet<[u8; 16]>,
    /// By kind, name and schema version.
    names: &'a mut HashMap<(Arc<str>, String, u32), u64>,
    openers: HashMap<i64, Opener>,
    /// Called after each sound commit.
    progress: F,
}

impl<F: FnMut() + Send> CommitCheck for KeyCheck<'_, F> {
    async fn check(&mut self, row: &EntityRow, commit: &LogRow) -> Result<(), String> {
        if self.core.is_ending(row) {
            return Ok(());
        }
        if row.erased_at_us.is_some() {
            return check_stub(self.core, row, commit).await;
        }
        if self.openers.len() >= KEYS_MAX {
            self.openers.clear();
        }
        if !self.openers.contains_key(&row.eid) {
            let key = self.core.vault.key(row.id_hash, KeyId(row.key_id)).await.map_err(|error| error.to_string())?;
            self.used_keys.insert(row.key_id);
            self.openers.insert(row.eid, Opener { row: row.clone().into(), key });
        }
        let Some(opener) = self.openers.get(&row.eid) else { return Ok(()) };
        opener.check_id()?;
        for (name, schema) in check_commit(opener, commit)? {
            let key = (opener.row.kind.clone(), name, schema);
            *self.names.entry(key).or_default() += 1;
        }
        (self.progress)();
        Ok(())
    }
}

/// Whether a commit of an erased entity is a stub, if not when it was read, then now.
pub(crate) async fn check_stub(core: &ShardCore, entity: &EntityRow, commit: &LogRow) -> Result<(), String> {
    if commit.is_stub() {
        return Ok(());
    }
    let now = core.shard.read_log(entity, commit.version.saturating_sub(1), 1).await;
    let is_there = |rows: &[LogRow]| rows.first().is_some_and(|row| row.version == commit.version && !row.is_stub());
    match now {
        Ok(rows) if is_there(&rows) => Err("it was erased, and a commit of it is still there".to_owned()),
        // What cannot be read now is told of when it is read.
        _ => Ok(()),
    }
}

/// Whether a commit opens and holds what its row says; the names and schema versions of its events.
pub(crate) fn check_commit(opener: &Opener, commit: &LogRow) -> Result<Vec<(String, u32)>, String> {
    let plaintext = opener.open(commit).map_err(|error| error.to_string())?;
    let body = Body::parse(&plaintext).map_err(|error| error.to_string())?;
    if body.events.len() != commit.count as usize {
        return Err(format!("{} events where the row has {}", body.events.len(), commit.count));
    }
    let name = |(schema, event): &(u32, &serde_bytes::Bytes)| {
        let (name, _) = split(event).ok_or("an event has no name")?;
        Ok((name.to_owned(), *schema))
    };
    body.events.iter().map(name).collect()
}
