//! Restoring a store from its backups, as a new one that knows who was erased.
//!
//! ```text
//! manifests, keys, master key, ledgers, receipts, files      all checked before anything is written
//!      │
//!      ▼
//! target "restoring": shards (erased: stubs) ─► keys (erased: destroyed) ─► node.db (tombstones, unfinished)
//!      │                                                   any failure: all of it is removed again
//!      ▼
//! opened by nobody else: every erasure is carried out again and has its receipt ─► read back ─► target "ready"
//! ```
//! Invariants:
//! - What was erased, as far as the ledgers and receipts tell, is erased before the store serves: its sealed bytes and its key never reach
//!   the new files.
//! - A file of the backup that is damaged, cut, missing or in another's place is refused by name.
//! - The new store has an identity of its own: no file of the former one fits it, and none of its files fits the former one.
//! - A restore that did not come to its end is no store; it is begun anew.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use kuma_crypto::{
    IdHash, KekId, KeyId, MasterKey, MasterKeyError, PublicKey, SigningKey, id_secret_aad, node_key_aad, wrap_aad,
    wrapped_by,
};
use kuma_shard::{
    CommitCheck, CopyError, DataDir, DataDirError, Destroyed, DiskId, EntityHash, EntityRow, FileOptions, KeyRow,
    KeysBackup, KeysContents, LogRow, NodeStore, OpenError, ReceiptRow, RestoreFileError, ShardBackup, ShardOptions,
    Tombstone, sync_directory,
};

use crate::{
    Kuma, LedgerError, Options, Receipt, ReceiptError, StartError,
    backup::{
        BackupContents, LEDGER_FILE, UNFINISHED_FILE,
        manifest::{self, EventsManifest, KeysManifest, LedgerEntry, ManifestError, ShardEntry},
    },
    ledger::{self, Ledger, text_of, time_of},
    vault::{AUDIT_KEY, ID_SECRET, NODE_KEY},
};

/// Entities without a key that are told by name.
const NAMED_MAX: usize = 1000;
/// How long the erasures may make no progress.
const ERASE_PATIENCE: Duration = Duration::from_secs(60);
/// What may be in the target: the master key, and a server's tokens with their lock, at their usual places.
const KEEP: [&str; 3] = ["master.key", "tokens.json", "tokens.json.lock"];

/// Why a store was not restored. Nothing is left of it at the target.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// There is no backup of the keys.
    #[error(
        "no backup of the keys was given, and without them nothing in {backup} can be read: give the directory of one; nothing was written"
    )]
    NoKeys {
        /// The backup of the events.
        backup: PathBuf,
    },
    /// There is no master key.
    #[error(
        "no master key, and without it nothing in the backup can be read: name it in the options; nothing was written"
    )]
    NoMasterKey(#[source] MasterKeyError),
    /// The master key is another one.
    #[error(
        "the master key does not open the keys in {keys}, so that nothing could be read: use the one that the store had then; nothing was written"
    )]
    WrongMasterKey {
        /// The backup of the keys.
        keys: PathBuf,
        /// Why.
        #[source]
        source: MasterKeyError,
    },
    /// An option cannot be.
    #[error("the options do not fit the backup: {detail}; nothing was written")]
    Options {
        /// What is wrong.
        detail: String,
    },
    /// A manifest.
    #[error("that is no backup to restore from; take another one, nothing was written")]
    Manifest(#[from] ManifestError),
    /// The backup is that of another store.
    #[error("{path} is a backup of another store ({detail}); nothing was written")]
    OtherStore {
        /// The directory.
        path: PathBuf,
        /// What differs.
        detail: String,
    },
    /// A file is not the one that the manifest names.
    #[error(
        "{path} is not what was backed up ({detail}); put the right file back or take another backup, nothing was restored"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// A file cannot be read, or does not hold what it should.
    #[error("a file of the backup is of no use; put the right file back or take another backup, nothing was restored")]
    Backup(#[from] CopyError),
    /// A ledger is not believed.
    #[error("a ledger cannot be used, and without it what was erased might come back; nothing was written")]
    Ledger(#[from] LedgerError),
    /// A receipt is not believed.
    #[error("the receipt {path} cannot be used, and without it what was erased might come back; nothing was written")]
    Receipt {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ReceiptError,
    },
    /// The target cannot take a store.
    #[error("the store cannot be restored there")]
    Target(#[from] DataDirError),
    /// A file of the new store could not be written.
    #[error("the new store could not be written, and was removed again; restore it when that is mended")]
    TargetFile(#[from] OpenError),
    /// The new store did not open.
    #[error("the restored store did not open, and was removed again")]
    Start(#[from] StartError),
    /// The erasures that are known could not be carried out again.
    #[error(
        "{left} erasures could not be carried out again, so that the store was removed again; look at the log, and restore it when that is mended"
    )]
    Erasures {
        /// How many are not complete.
        left: usize,
    },
    /// What was written is not what was read.
    #[error(
        "the restored store does not hold what was in the backup ({detail}), and was removed again; restore it once more"
    )]
    Result {
        /// What is wrong.
        detail: String,
    },
    /// The operating system refused.
    #[error("{path} cannot be read or written; nothing was restored")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl From<RestoreFileError> for RestoreError {
    fn from(error: RestoreFileError) -> Self {
        match error {
            RestoreFileError::Backup(error) => error.into(),
            RestoreFileError::Target(error) => error.into(),
            other => RestoreError::Result { detail: other.to_string() },
        }
    }
}

/// How far a restore has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoreProgress {
    /// What it does now.
    pub step: RestoreStep,
    /// The shard that it is at, from 1.
    pub shard: u16,
    /// How many there are.
    pub shards: u16,
    /// Commits of this shard so far; erasures that are complete.
    pub commits: u64,
    /// How many there are.
    pub commits_total: u64,
}

/// What a restore does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreStep {
    /// Looks at the files of the backup.
    Check,
    /// Copies and checks each row.
    Copy,
    /// Carries out again what was erased.
    Erase,
    /// Reads the new store.
    Verify,
}

/// What whoever restored a store should know.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RestoreWarning {
    /// No ledger was given that is newer than those in the backups.
    NoNewerLedger {
        /// What the newest one knows.
        known_until: SystemTime,
    },
    /// A ledger that was given is older than the backup.
    StaleLedger {
        /// The file.
        path: PathBuf,
        /// What it knows.
        as_of: SystemTime,
        /// When the backup was made.
        taken_at: SystemTime,
    },
    /// The keys were backed up before the events: those of entities that were new in between are missing.
    KeysOlderThanEvents {
        /// When the keys were.
        keys: SystemTime,
        /// When the events were.
        events: SystemTime,
    },
    /// There is no key for some entities: they cannot be read.
    EntitiesWithoutKey {
        /// How many.
        entities: u64,
    },
    /// The backup was being brought up to date when it was interrupted: some shards are newer than it says.
    Unfinished,
}

impl std::fmt::Display for RestoreWarning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = |at: &SystemTime| text_of(crate::micros(*at));
        match self {
            RestoreWarning::NoNewerLedger { known_until } => write!(
                f,
                "no ledger was given that is newer than the backup: erasures after {} are not known, and what was erased since is back; \
                 restore again with a newer ledger or with the receipts",
                at(known_until)
            ),
            RestoreWarning::StaleLedger { path, as_of, taken_at } => write!(
                f,
                "the ledger {} is of {}, older than the backup of {}: it tells nothing that the backup does not; give a newer one",
                path.display(),
                at(as_of),
                at(taken_at)
            ),
            RestoreWarning::KeysOlderThanEvents { keys, events } => write!(
                f,
                "the keys were backed up at {}, before the events at {}: entities that were new in between have no key; make the \
                 backup of the keys after that of the events",
                at(keys),
                at(events)
            ),
            RestoreWarning::EntitiesWithoutKey { entities } => {
                write!(f, "{entities} entities have no key in the backup of the keys: they cannot be read")
            }
            RestoreWarning::Unfinished => f.write_str(
                "the backup was being brought up to date when it was interrupted: some shards are newer than its manifest says",
            ),
        }
    }
}

/// What a restore did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreReport {
    /// When the backup was made.
    pub taken_at: SystemTime,
    /// What the new store holds.
    pub contents: BackupContents,
    /// Entities that the backup has as they were, and that were erased again.
    pub erased_again: u64,
    /// Keys.
    pub keys: u64,
    /// Keys that are destroyed.
    pub keys_destroyed: u64,
    /// How many entities have no key.
    pub without_key: u64,
    /// Their hashes, at most 1000.
    pub without_key_named: Vec<EntityHash>,
    /// **Erasures that were asked for after this are not known**, but for those whose receipts were given: what was erased since is back.
    pub erasures_known_until: SystemTime,
    /// What to look at.
    pub warnings: Vec<RestoreWarning>,
}

/// A restore that is described and not run yet.
///
/// ```no_run
/// # use kuma_core::{MasterKeySource, Options, Restore};
/// # async fn restore() -> Result<(), Box<dyn std::error::Error>> {
/// let options = Options::new("./data").master_key(MasterKeySource::File("/secrets/master.key".into()));
/// let restored = Restore::new("/backup/events").keys("/backup/keys").ledger("/elsewhere/ledger.ndjson");
/// let report = restored.run(options, |_| ()).await?;
/// report.warnings.iter().for_each(|warning| eprintln!("{warning}"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is read until it is run"]
pub struct Restore {
    backup: PathBuf,
    keys: Option<PathBuf>,
    ledgers: Vec<PathBuf>,
    receipts: Vec<PathBuf>,
    verify: bool,
}

impl Restore {
    /// From the backup of events in `backup` ([`Kuma::backup`]).
    pub fn new(backup: impl AsRef<Path>) -> Self {
        Restore {
            backup: backup.as_ref().to_owned(),
            keys: None,
            ledgers: Vec::new(),
            receipts: Vec::new(),
            verify: true,
        }
    }

    /// With the backup of keys in `directory` ([`Kuma::backup_keys`]). Without one nothing can be read, and nothing is restored.
    pub fn keys(mut self, directory: impl AsRef<Path>) -> Self {
        self.keys = Some(directory.as_ref().to_owned());
        self
    }

    /// With the ledger at `path` ([`Kuma::export_ledger`]): what was erased up to its time stays erased. Give the newest that there is; more
    /// do no harm.
    pub fn ledger(mut self, path: impl AsRef<Path>) -> Self {
        self.ledgers.push(path.as_ref().to_owned());
        self
    }

    /// With the receipt at `path`: what it is about stays erased. For erasures that are newer than the newest ledger.
    pub fn receipt(mut self, path: impl AsRef<Path>) -> Self {
        self.receipts.push(path.as_ref().to_owned());
        self
    }

    /// Does not read the new store back. Every row is checked as it is copied all the same.
    pub fn without_verification(mut self) -> Self {
        self.verify = false;
        self
    }

    /// Restores the store into the data directory of `options`, which must be new or empty (but for a `master.key`), as a store with an
    /// identity of its own. It is closed when this returns; open it with [`Kuma::start`].
    ///
    /// # Errors
    /// See [`RestoreError`]. Nothing is left of it at the target.
    /// # Cancel safety
    /// Not cancel safe: the target holds what no [`Kuma::start`] opens. Run it again, it begins anew.
    pub async fn run(
        self,
        options: Options,
        mut progress: impl FnMut(&RestoreProgress) + Send,
    ) -> Result<RestoreReport, RestoreError> {
        let mut prepared = self.prepare(&options, &mut progress).await?;
        let target = options.data_dir.clone();
        let was_there = target.exists();
        // At most 256.
        let shards = prepared.manifest.shards.len() as u16;
        let data_dir = DataDir::begin_restore(&target, &options.context, shards, &KEEP)?;
        let copied = prepared.copy(&data_dir, &options, &mut progress).await;
        prepared.keys.close().await;
        // Let go of, so that it can be opened.
        drop(data_dir);
        let opened = match copied {
            Ok(report) => self.open(&options, prepared.tombstones.len(), &mut progress).await.map(|()| report),
            Err(error) => Err(error),
        };
        match opened {
            Ok(report) => {
                DataDir::open_restored(&target)?.finish()?;
                Ok(report)
            }
            Err(error) => {
                if let Err(left) = DataDir::open_restored(&target).and_then(DataDir::abandon) {
                    let path = target.display();
                    tracing::error!(%path, error = %left, "a restore failed, and what it made could not be removed; remove it");
                } else if !was_there {
                    // Unless somebody put something else into it meanwhile.
                    let _ = fs::remove_dir(&target);
                }
                Err(error)
            }
        }
    }

    /// Checks all that can be checked before anything is written.
    async fn prepare(
        &self,
        options: &Options,
        progress: &mut (impl FnMut(&RestoreProgress) + Send),
    ) -> Result<Prepared, RestoreError> {
        options.check()?;
        let events: EventsManifest = manifest::read(&self.backup)?;
        check_context(&self.backup, &events.of.context, options)?;
        let Some(keys_directory) = &self.keys else { return Err(RestoreError::NoKeys { backup: self.backup.clone() }) };
        let keys_manifest: KeysManifest = manifest::read(keys_directory)?;
        check_context(keys_directory, &keys_manifest.of.context, options)?;
        if keys_manifest.of.disk_id != events.of.disk_id {
            let detail = format!(
                "its data directory was {}, that of the events {}",
                keys_manifest.of.disk_id, events.of.disk_id
            );
            return Err(RestoreError::OtherStore { path: keys_directory.clone(), detail });
        }
        let found = events.shards.len();
        if found == 0 || found > 256 || options.shards.is_some_and(|shards| usize::from(shards) != found) {
            let asked = options.shards.map_or_else(|| "1 to 256".to_owned(), |shards| shards.to_string());
            return Err(RestoreError::Options { detail: format!("it has {found} shards, expected {asked}") });
        }
        let damaged = |path: &Path| RestoreError::Damaged { path: path.to_owned(), detail: "no identity".to_owned() };
        let disk_id = events.of.disk_id().ok_or_else(|| damaged(&self.backup))?;
        let taken_at_us = events.of.taken_at_us().ok_or_else(|| damaged(&self.backup))?;
        let keys_at_us = keys_manifest.of.taken_at_us().ok_or_else(|| damaged(keys_directory))?;
        let mut warnings = Vec::new();
        if keys_at_us < taken_at_us {
            let (keys, events) = (time_of(keys_at_us), time_of(taken_at_us));
            warnings.push(RestoreWarning::KeysOlderThanEvents { keys, events });
        }
        let is_unfinished = self.backup.join(UNFINISHED_FILE).exists();
        if is_unfinished {
            warnings.push(RestoreWarning::Unfinished);
        }
        let (mut keys, live) = open_keys(keys_directory, &keys_manifest, disk_id).await?;
        let public_key = match check_master_key(keys_directory, &mut keys, options).await {
            Ok(public_key) => public_key,
            Err(error) => {
                keys.close().await;
                return Err(error);
            }
        };
        let erased = self.read_erasures(&events, &keys_manifest, keys_directory, &public_key, options, &mut warnings);
        let checked = match erased {
            Ok(erased) => self.check_shards(&events, disk_id, is_unfinished, progress).await.map(|()| erased),
            Err(error) => Err(error),
        };
        match checked {
            Ok(Erasures { tombstones, receipts, known_until_us }) => Ok(Prepared {
                directory: self.backup.clone(),
                manifest: events,
                disk_id,
                taken_at_us,
                keys,
                live,
                tombstones,
                receipts,
                known_until_us,
                warnings,
            }),
            Err(error) => {
                keys.close().await;
                Err(error)
            }
        }
    }

    /// All ledgers and receipts, those in the backups and those that were given.
    fn read_erasures(
        &self,
        events: &EventsManifest,
        keys: &KeysManifest,
        keys_directory: &Path,
        public_key: &PublicKey,
        options: &Options,
        warnings: &mut Vec<RestoreWarning>,
    ) -> Result<Erasures, RestoreError> {
        let mut by_key = BTreeMap::new();
        let mut known_until_us = 0;
        for (directory, entry) in [(&*self.backup, &events.ledger), (keys_directory, &keys.ledger)] {
            let ledger = read_own_ledger(directory, entry, &options.context, public_key)?;
            known_until_us = known_until_us.max(ledger.as_of_us);
            by_key.extend(ledger.tombstones.into_iter().map(|tombstone| (tombstone.key_id, tombstone)));
        }
        let of_backups_us = known_until_us;
        let taken_at_us = events.of.taken_at_us().unwrap_or_default();
        for path in &self.ledgers {
            let ledger = Ledger::read(path, &options.context, public_key)?;
            if ledger.as_of_us < taken_at_us {
                let (as_of, taken_at) = (time_of(ledger.as_of_us), time_of(taken_at_us));
                warnings.push(RestoreWarning::StaleLedger { path: path.clone(), as_of, taken_at });
            }
            known_until_us = known_until_us.max(ledger.as_of_us);
            by_key.extend(ledger.tombstones.into_iter().map(|tombstone| (tombstone.key_id, tombstone)));
        }
        if known_until_us <= of_backups_us {
            warnings.push(RestoreWarning::NoNewerLedger { known_until: time_of(known_until_us) });
        }
        let mut receipts = Vec::new();
        for path in &self.receipts {
            let (tombstone, receipt) = read_receipt(path, &options.context, public_key)?;
            by_key.entry(tombstone.key_id).or_insert(tombstone);
            receipts.push(receipt);
        }
        let mut tombstones: Vec<Tombstone> = by_key.into_values().collect();
        tombstones.sort_by_key(|tombstone| tombstone.at_us);
        Ok(Erasures { tombstones, receipts, known_until_us })
    }

    /// Whether each file is the one that the manifest names; of a backup that is not finished, whether it holds at least what it says.
    async fn check_shards(
        &self,
        events: &EventsManifest,
        disk_id: DiskId,
        is_unfinished: bool,
        progress: &mut (impl FnMut(&RestoreProgress) + Send),
    ) -> Result<(), RestoreError> {
        // At most 256.
        let shards = events.shards.len() as u16;
        for (number, entry) in (0..).zip(&events.shards) {
            let step = RestoreStep::Check;
            progress(&RestoreProgress { step, shard: number + 1, shards, commits: 0, commits_total: entry.position });
            let backup = ShardBackup::open(&self.backup, number, shards, disk_id).await?;
            let contents = backup.contents();
            backup.close().await;
            let path = self.backup.join(&entry.file.file);
            let damaged = |detail: String| Err(RestoreError::Damaged { path: path.clone(), detail });
            let is_it = ShardEntry::new(entry.file.clone(), &contents) == *entry;
            if contents.commits < entry.commits
                || contents.position < entry.position
                || contents.last_eid < entry.last_entity
            {
                let (found, said) = (contents.position, entry.position);
                return damaged(format!("an older file: it ends at position {found}, the manifest says {said}"));
            }
            if is_unfinished {
                // Its rows tell.
                if contents.commits == entry.commits && !is_it {
                    return damaged("it does not hold what the manifest says".to_owned());
                }
                continue;
            }
            if !is_it {
                return damaged("it does not hold what the manifest says".to_owned());
            }
            check_bytes(&path, &entry.file).await?;
        }
        Ok(())
    }

    /// Opens the new store once, and returns when every erasure is complete and all was read back.
    async fn open(
        &self,
        options: &Options,
        tombstones: usize,
        progress: &mut (impl FnMut(&RestoreProgress) + Send),
    ) -> Result<(), RestoreError> {
        let options = Options { restoring: true, shards: None, scrub_bytes_per_second: 0, ..options.clone() };
        let kuma = Kuma::start(options).await?;
        let looked = async {
            for (shard, open) in kuma.open_shards() {
                if let Err(why) = open {
                    return Err(RestoreError::Result { detail: format!("shard {shard}: {why}") });
                }
            }
            erase_again(&kuma, tombstones, progress).await?;
            if self.verify { read_back(&kuma, progress).await } else { Ok(()) }
        };
        let looked = looked.await;
        kuma.shutdown().await;
        looked
    }
}

/// Who was erased, as far as is known.
struct Erasures {
    tombstones: Vec<Tombstone>,
    receipts: Vec<ReceiptRow>,
    known_until_us: i64,
}

/// All that was checked.
struct Prepared {
    directory: PathBuf,
    manifest: EventsManifest,
    disk_id: DiskId,
    taken_at_us: i64,
    keys: KeysBackup,
    /// The keys that are not destroyed.
    live: HashSet<[u8; 16]>,
    tombstones: Vec<Tombstone>,
    receipts: Vec<ReceiptRow>,
    known_until_us: i64,
    warnings: Vec<RestoreWarning>,
}

impl Prepared {
    /// Makes all files of the new store.
    async fn copy(
        &mut self,
        data_dir: &DataDir,
        options: &Options,
        progress: &mut (impl FnMut(&RestoreProgress) + Send),
    ) -> Result<RestoreReport, RestoreError> {
        let file = FileOptions {
            durability: options.durability,
            vfs: options.vfs.clone(),
            keep_deleted_bytes: options.keep_deleted_bytes,
        };
        let destroyed: Destroyed =
            self.tombstones.iter().map(|tombstone| (tombstone.key_id, tombstone.at_us)).collect();
        let mut report = RestoreReport {
            taken_at: time_of(self.taken_at_us),
            contents: BackupContents::default(),
            erased_again: 0,
            keys: 0,
            keys_destroyed: 0,
            without_key: 0,
            without_key_named: Vec::new(),
            erasures_known_until: time_of(self.known_until_us),
            warnings: std::mem::take(&mut self.warnings),
        };
        let shards = data_dir.shards();
        for number in 0..shards {
            let to = ShardOptions {
                number,
                shards,
                directory: data_dir.path().to_owned(),
                disk_id: data_dir.disk_id(),
                file: file.clone(),
                queue_bytes_max: options.shard_bytes_max,
                owns_slots: true,
            };
            let mut backup = ShardBackup::open(&self.directory, number, shards, self.disk_id).await?;
            let commits_total = backup.contents().position;
            let (live, report) = (&self.live, &mut report);
            let look = |entity: &EntityRow| {
                let has_key = live.contains(&entity.key_id) || entity.key_id == AUDIT_KEY.0;
                if entity.erased_at_us.is_none() && !has_key {
                    report.without_key += 1;
                    if report.without_key_named.len() < NAMED_MAX {
                        report.without_key_named.push(entity.id_hash);
                    }
                }
            };
            let tell = |commits| {
                let step = RestoreStep::Copy;
                progress(&RestoreProgress { step, shard: number + 1, shards, commits, commits_total });
            };
            let read = backup.restore(&to, &destroyed, look, tell).await;
            backup.close().await;
            let read = read?;
            report.contents.add(&read);
            report.erased_again += read.erased_again;
        }
        let path = data_dir.path().to_owned();
        let KeysContents { keys, destroyed: gone, .. } =
            self.keys.restore(&path, data_dir.disk_id(), &file, &destroyed).await?;
        (report.keys, report.keys_destroyed) = (keys, gone);
        NodeStore::restore(path.clone(), data_dir.disk_id(), &file, self.tombstones.clone(), self.receipts.clone())
            .await?;
        sync_directory(&path).map_err(|source| RestoreError::Io { path, source })?;
        if report.without_key > 0 {
            report.warnings.push(RestoreWarning::EntitiesWithoutKey { entities: report.without_key });
        }
        Ok(report)
    }
}

fn check_context(path: &Path, found: &str, options: &Options) -> Result<(), RestoreError> {
    if found == options.context {
        return Ok(());
    }
    let detail = format!("\"{found}\", not \"{}\"", options.context);
    Err(RestoreError::OtherStore { path: path.to_owned(), detail })
}

/// Whether a file is, to the byte, what the manifest says. No connection to it may be open.
async fn check_bytes(path: &Path, entry: &manifest::BackupFileEntry) -> Result<(), RestoreError> {
    let (owned, hashed) = (path.to_owned(), entry.blake3.is_some());
    let measured = tokio::task::spawn_blocking(move || manifest::measure(&owned, hashed)).await;
    let measured = measured.unwrap_or_else(|error| Err(io::Error::other(error)));
    let (bytes, blake3) = measured.map_err(|source| RestoreError::Io { path: path.to_owned(), source })?;
    if bytes == entry.bytes && blake3 == entry.blake3 {
        return Ok(());
    }
    let detail = match bytes == entry.bytes {
        true => "its bytes are not those that the manifest says".to_owned(),
        false => format!("it has {bytes} bytes, the manifest says {}", entry.bytes),
    };
    Err(RestoreError::Damaged { path: path.to_owned(), detail })
}

/// Opens the copy of the keys; says which of them are not destroyed.
async fn open_keys(
    directory: &Path,
    manifest: &KeysManifest,
    disk_id: DiskId,
) -> Result<(KeysBackup, HashSet<[u8; 16]>), RestoreError> {
    let path = directory.join(&manifest.file.file);
    if !path.exists() {
        return Err(CopyError::Missing { path }.into());
    }
    check_bytes(&path, &manifest.file).await?;
    let mut keys = KeysBackup::open(&path, disk_id).await?;
    let KeysContents { keys: found, destroyed, digest } = keys.contents().clone();
    let is_it =
        (found, destroyed) == (manifest.keys, manifest.destroyed) && hex::encode(digest.to_bytes()) == manifest.digest;
    let mut live = HashSet::new();
    let read = keys.each(|row| {
        if !row.is_destroyed() {
            live.insert(row.key_id);
        }
    });
    let read = read.await;
    if read.is_ok() && is_it {
        return Ok((keys, live));
    }
    keys.close().await;
    read?;
    Err(RestoreError::Damaged { path, detail: "it does not hold the keys that the manifest says".to_owned() })
}

/// Whether the master key opens the store's secrets, and a key of each master key that wrapped some. Returns what verifies ledgers and
/// receipts.
async fn check_master_key(
    directory: &Path,
    keys: &mut KeysBackup,
    options: &Options,
) -> Result<PublicKey, RestoreError> {
    let master: Arc<dyn MasterKey> = options.load_master_key(false).map_err(RestoreError::NoMasterKey)?;
    let wrong = |source| RestoreError::WrongMasterKey { keys: directory.to_owned(), source };
    let context = &options.context;
    let missing = || CopyError::Damaged { path: directory.to_owned(), detail: "it has no secrets".to_owned() };
    let secret = keys.secret(ID_SECRET).await?.ok_or_else(missing)?;
    master.unwrap(&secret, &id_secret_aad(context)).await.map_err(wrong)?;
    let secret = keys.secret(NODE_KEY).await?.ok_or_else(missing)?;
    let node_key = master.unwrap(&secret, &node_key_aad(context)).await.map_err(wrong)?;
    let mut one_of_each: BTreeMap<KekId, KeyRow> = BTreeMap::new();
    let mut unreadable = None;
    keys.each(|row| match (row.is_destroyed(), wrapped_by(&row.wrapped)) {
        (true, _) => {}
        (false, Ok(kek)) => drop(one_of_each.entry(kek).or_insert_with(|| row.clone())),
        (false, Err(error)) => unreadable = Some(error),
    })
    .await?;
    if let Some(error) = unreadable {
        return Err(wrong(error));
    }
    for row in one_of_each.values() {
        let aad = wrap_aad(context, IdHash(row.id_hash.0), KeyId(row.key_id));
        master.unwrap(&row.wrapped, &aad).await.map_err(wrong)?;
    }
    Ok(SigningKey::from(node_key).public())
}

fn read_own_ledger(
    directory: &Path,
    entry: &LedgerEntry,
    context: &str,
    public_key: &PublicKey,
) -> Result<Ledger, RestoreError> {
    let path = directory.join(LEDGER_FILE);
    let ledger = Ledger::read(&path, context, public_key)?;
    let is_older = ledger::us_of(&entry.as_of).is_none_or(|as_of_us| ledger.as_of_us < as_of_us);
    if is_older || (ledger.tombstones.len() as u64) < entry.tombstones {
        let detail = format!("an older ledger, of {}: the manifest says {}", text_of(ledger.as_of_us), entry.as_of);
        return Err(RestoreError::Damaged { path, detail });
    }
    Ok(ledger)
}

fn read_receipt(path: &Path, context: &str, public_key: &PublicKey) -> Result<(Tombstone, ReceiptRow), RestoreError> {
    let text = fs::read_to_string(path).map_err(|source| RestoreError::Io { path: path.to_owned(), source })?;
    let refused = |source| RestoreError::Receipt { path: path.to_owned(), source };
    let receipt: Receipt = text.parse().map_err(refused)?;
    receipt.verify(public_key).map_err(refused)?;
    let statement = &receipt.receipt;
    if statement.context != context {
        let detail = format!("it is of the store \"{}\"", statement.context);
        return Err(refused(ReceiptError::Unreadable(detail)));
    }
    let (entity, key, at) = (&statement.entity, &statement.key, &statement.requested_at);
    let tombstone = ledger::tombstone_of(entity, key, statement.slot, &statement.id.to_string(), at);
    let odd = || refused(ReceiptError::Unreadable("a field of it is not what it should be".to_owned()));
    let tombstone = tombstone.ok_or_else(odd)?;
    let body = serde_json::to_string(&receipt).map_err(|error| refused(ReceiptError::Unreadable(error.to_string())))?;
    Ok((tombstone, ReceiptRow { receipt_id: tombstone.receipt_id, key_id: tombstone.key_id, body }))
}

/// Waits until the store has carried out every erasure that it was given.
async fn erase_again(
    kuma: &Kuma,
    tombstones: usize,
    progress: &mut (impl FnMut(&RestoreProgress) + Send),
) -> Result<(), RestoreError> {
    let (mut left, mut since) = (usize::MAX, Instant::now());
    let mut wait = Duration::from_millis(2);
    loop {
        let now = kuma.erasures_unfinished();
        if now == 0 {
            return Ok(());
        }
        if now < left {
            (left, since) = (now, Instant::now());
        } else if since.elapsed() > ERASE_PATIENCE {
            return Err(RestoreError::Erasures { left });
        }
        let commits = tombstones.saturating_sub(now) as u64;
        let step = RestoreStep::Erase;
        progress(&RestoreProgress { step, shard: 0, shards: 0, commits, commits_total: tombstones as u64 });
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_millis(200));
    }
}

/// Without the keys: what they open was not changed.
struct SumsOnly<F>(F);

impl<F: FnMut() + Send> CommitCheck for SumsOnly<F> {
    async fn check(&mut self, _: &EntityRow, _: &LogRow) -> Result<(), String> {
        (self.0)();
        Ok(())
    }
}

/// Reads every row of the new store, and its keys.
async fn read_back(kuma: &Kuma, progress: &mut (impl FnMut(&RestoreProgress) + Send)) -> Result<(), RestoreError> {
    let failed = |detail: String| RestoreError::Result { detail };
    let cores: Vec<_> = kuma.open_shards().filter_map(|(_, open)| open.ok().cloned()).collect();
    // At most 256.
    let shards = cores.len() as u16;
    for core in &cores {
        let (shard, mut commits) = (core.shard.number(), 0);
        let end = core.shard.log_end().await.map_err(|error| failed(error.to_string()))?;
        let mut check = SumsOnly(|| {
            commits += 1;
            let step = RestoreStep::Verify;
            progress(&RestoreProgress { step, shard: shard + 1, shards, commits, commits_total: end });
        });
        let report = core.shard.verify(&mut check).await.map_err(|error| failed(error.to_string()))?;
        if !report.is_clean() {
            let bad = report.bad_entities.len();
            let first = report.damage.into_iter().next();
            let first = first.or_else(|| report.bad_entities.into_iter().next().map(|(_, detail)| detail));
            return Err(failed(format!("shard {shard}: {bad} entities; {}", first.unwrap_or_default())));
        }
    }
    let report = kuma.vault().keys.verify(|_| ()).await.map_err(|error| failed(error.to_string()))?;
    match report.damage.into_iter().next() {
        Some(damage) => Err(failed(damage)),
        None => Ok(()),
    }
}

/// What docs/operations.md shows compiles.
#[cfg(doctest)]
#[doc = include_str!("../../docs/operations.md")]
mod operations {}
