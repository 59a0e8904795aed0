//! Backups of an open store: its events, and apart from them its keys.
//!
//! ```text
//! events:  ledger ──► each shard, what is new ──► read every row back ──► manifest ──► noted in node.db
//! keys:    all keys, to a new file ──► ledger ──► read back ───────────► manifest ──► the file before is wiped
//! ```
//! Invariants:
//! - A backup of events has no key in it, and one of keys has no event: each is of no use without the other, and keys are kept for as long
//!   as the erasures of their owners allow, not longer.
//! - The manifest comes last. Until then the backup before can be restored, or something newer of each shard: they do not depend on
//!   each other.
//! - What a backup holds was read back and added up before its manifest says so (unless that was turned off).

pub(crate) mod manifest;

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use kuma_shard::{
    CommitError, CopyError, DiskId, KeysBackup, KeysContents, SLOTS, ShardBackup, ShardCopied, ShardRead, Slot,
    create_directory, sync_directory,
};

use crate::{
    Kuma, LedgerError, LedgerSummary,
    ledger::{Ledger, text_of, time_of},
    shard_core::ShardCore,
};
use manifest::{
    Backed, BackupFileEntry, BackupOf, EventsManifest, KeysManifest, LedgerEntry, ManifestError, ShardEntry,
};

pub(crate) const LEDGER_FILE: &str = "ledger.ndjson";
const LEDGER_PARTIAL: &str = "ledger.ndjson.partial";
/// They take turns: the one that the manifest names is whole at any moment.
const KEYS_FILES: [&str; 2] = ["keys-a.db", "keys-b.db"];
const LOCK_FILE: &str = "backup.lock";
/// It is there from the first change until the manifest: meanwhile the files hold more than the manifest says.
pub(crate) const UNFINISHED_FILE: &str = "unfinished";

/// Why a backup was not made. The store is not affected; what could be restored from the directory before still can.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// A shard is out of use.
    #[error(
        "shard {shard} is out of use ({why}), so that there is no whole backup to be made; put its file back or restore the store, the backup before is as it was"
    )]
    ShardOutOfUse {
        /// The shard.
        shard: u16,
        /// Why.
        why: String,
    },
    /// The store is a node's, which has some of the cluster's slots only.
    #[error(
        "this node owns {owned} of {SLOTS} slots, so that a backup of it would be a part of the store that looks like all of it; export every node instead (export_all), as operations.md says"
    )]
    PartOfACluster {
        /// How many it owns.
        owned: usize,
    },
    /// Another backup is being made into this directory.
    #[error("another backup into {path} is on its way; wait for it, or choose another directory")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The directory is no place for this backup.
    #[error("{path} cannot take this backup: {detail}; choose another directory")]
    WrongDirectory {
        /// The directory.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// A file could not be copied, or is not what was copied.
    #[error("the backup did not come to its end; {}", advice(.0))]
    Copy(#[from] CopyError),
    /// The ledger could not be written.
    #[error("the backup did not come to its end; run it again")]
    Ledger(#[from] LedgerError),
    /// The manifest could not be read or written.
    #[error("the backup did not come to its end; run it again")]
    Manifest(#[from] ManifestError),
    /// There is no space for it.
    #[error(
        "no space left on the disk of {path}; free some and run the backup again, the one before can still be restored"
    )]
    DiskFull {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{path} cannot be read or written; run the backup again when that is mended")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The backup was made and can be restored; only that it was made could not be noted.
    #[error("the backup was made, but node.db could not note it, so that receipts will not name it; run it again")]
    NotNoted(#[source] CommitError),
}

fn advice(error: &CopyError) -> &'static str {
    match error {
        CopyError::Source(_) => "run it again; should that not help, look at the store's log",
        CopyError::DamagedSource { .. } => {
            "restore that entity from an earlier backup or erase it, then run it again; the backup before is as it was"
        }
        CopyError::OtherHistory { .. } => {
            "the store was put back to an older state, or this is not its backup: choose a new directory and keep this one"
        }
        CopyError::Missing { .. } | CopyError::Damaged { .. } => {
            "delete the file that is named and run it again: it is copied anew; the store is not affected"
        }
        CopyError::Foreign { .. } => {
            "it is the backup of another store, or of this one before a restore: choose a new directory"
        }
        CopyError::Newer { .. } => "use the newer version",
        CopyError::DiskFull { .. } => "free some space and run it again: it goes on where it was",
        CopyError::ReadOnly { .. } => "check the permissions and the mount",
        _ => "run it again: it goes on where it was",
    }
}

/// How far a backup has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupProgress {
    /// What it does now.
    pub step: BackupStep,
    /// The shard that it is at, from 1.
    pub shard: u16,
    /// How many there are.
    pub shards: u16,
    /// Commits of this shard that were copied, or read back.
    pub commits: u64,
    /// How many there are of them; when copying, of those that are new.
    pub commits_total: u64,
    /// Sealed bytes copied in all.
    pub bytes: u64,
}

/// What a backup does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupStep {
    /// Copies what is new.
    Copy,
    /// Reads back what is there.
    Verify,
}

/// What [`Backup::run`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupReport {
    /// All that was acknowledged then is in the backup.
    pub taken_at: SystemTime,
    /// Commits that were new.
    pub commits: u64,
    /// Their sealed bytes.
    pub bytes: u64,
    /// Commits that the backup had and that are stubs now, because their entities were erased.
    pub stubs: u64,
    /// What was read back; none if that was turned off.
    pub verified: Option<BackupContents>,
    /// Slots whose rows in the store are not those that were committed, although each row is sound: [`Kuma::verify`] tells more.
    pub bad_slots: Vec<Slot>,
    /// Slots that were not compared with the store, because something in them was erased meanwhile.
    pub changed_slots: Vec<Slot>,
    /// The ledger that was put beside it.
    pub ledger: LedgerSummary,
    /// The manifest.
    pub manifest: EventsManifest,
}

/// What a backup holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackupContents {
    /// Entities.
    pub entities: u64,
    /// Entities of them that are erased.
    pub erased: u64,
    /// Commits.
    pub commits: u64,
    /// Their events.
    pub events: u64,
    /// Stubs of erased commits.
    pub stubs: u64,
}

impl BackupContents {
    pub(crate) fn add(&mut self, read: &ShardRead) {
        self.entities += read.entities;
        self.erased += read.erased;
        self.commits += read.commits;
        self.events += read.events;
        self.stubs += read.stubs;
    }
}

/// What [`Kuma::backup_keys`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeysBackupReport {
    /// The keys of all entities that had events then are in it.
    pub taken_at: SystemTime,
    /// Keys.
    pub keys: u64,
    /// Keys that were destroyed.
    pub destroyed: u64,
    /// The ledger that was put beside it.
    pub ledger: LedgerSummary,
    /// The manifest.
    pub manifest: KeysManifest,
}

/// A backup of events that is described and not run yet, see [`Kuma::backup`].
#[derive(Clone)]
#[must_use = "nothing is copied until it is run"]
pub struct Backup {
    kuma: Kuma,
    directory: PathBuf,
    verify: bool,
}

impl Kuma {
    /// Makes a backup of all events in `directory`, or brings the one that is there up to date: only what is new is copied, and what was
    /// erased since becomes stubs in it too. Appends go on meanwhile; all that is acknowledged when it begins is in it.
    ///
    /// **There is no key in it.** Without a backup of the keys ([`Kuma::backup_keys`]), and without the master key, nothing in it can be read. Make
    /// the backup of the keys after this one, in another place, and the ledger ([`Kuma::export_ledger`]) in a third.
    pub fn backup(&self, directory: impl AsRef<Path>) -> Backup {
        Backup { kuma: self.clone(), directory: directory.as_ref().to_owned(), verify: true }
    }

    /// Makes a backup of all wrapped keys in `directory`, in place of the one that is there, which is wiped: keys that were destroyed
    /// since are not in it any more. The master key is not in it either.
    ///
    /// As long as a backup of keys exists that was made before an erasure, that erasure rests on its ledger being replayed by whoever restores
    /// it: keep few of them, and not for long.
    ///
    /// # Errors
    /// See [`BackupError`].
    /// # Cancel safety
    /// Cancel safe: the backup before is as it was.
    pub async fn backup_keys(&self, directory: impl AsRef<Path>) -> Result<KeysBackupReport, BackupError> {
        let directory = directory.as_ref();
        let place = Place::take::<KeysManifest>(self, directory)?;
        let at_us = self.inner.now_us();
        let before = place.before.as_ref().map(|manifest: &KeysManifest| manifest.file.file.clone());
        let name = KEYS_FILES.into_iter().find(|name| before.as_deref() != Some(name)).unwrap_or(KEYS_FILES[0]);
        let path = directory.join(name);
        wipe(&path)?;
        let contents = self.vault().keys.back_up(&path, self.inner.disk_id(), |_| ()).await?;
        read_keys_back(&path, self.inner.disk_id(), &contents).await?;
        // As late as can be: it knows every key that was destroyed while they were copied.
        let ledger = self.new_ledger(directory).await?;
        let entry = put_ledger(directory, &ledger)?;
        let file = entry_of(&path).await?;
        let mut manifest = KeysManifest::new(self.backup_of(Backed::Keys, at_us), file, &contents, entry);
        write_manifest(directory, &mut manifest)?;
        if let Some(before) = before.filter(|before| KEYS_FILES.contains(&before.as_str())) {
            wipe(&directory.join(before))?;
            sync_directory(directory).map_err(|source| io_error(directory, source))?;
        }
        self.note_backup("keys", at_us).await?;
        Ok(KeysBackupReport {
            taken_at: time_of(at_us),
            keys: contents.keys,
            destroyed: contents.destroyed,
            ledger,
            manifest,
        })
    }

    fn backup_of(&self, backup: Backed, at_us: i64) -> BackupOf {
        BackupOf {
            format: manifest::FORMAT,
            backup,
            context: self.context().to_owned(),
            disk_id: self.inner.disk_id().to_string(),
            taken_at: text_of(at_us),
        }
    }

    async fn note_backup(&self, what: &'static str, at_us: i64) -> Result<(), BackupError> {
        self.inner.node().note_backup(what, at_us).await.map_err(BackupError::NotNoted)
    }

    /// Writes the ledger as of now beside the one in `directory`; [`put_ledger`] puts it in its place.
    async fn new_ledger(&self, directory: &Path) -> Result<LedgerSummary, BackupError> {
        let partial = directory.join(LEDGER_PARTIAL);
        let mut file = tokio::fs::File::create(&partial).await.map_err(|source| io_error(&partial, source))?;
        let summary = self.export_ledger(&mut file).await?;
        file.sync_all().await.map_err(|source| io_error(&partial, source))?;
        // It is read as it will be read one day.
        Ledger::read(&partial, self.context(), &self.vault().node_key().public())?;
        Ok(summary)
    }
}

/// Puts a new ledger in the place of the one that is there.
fn put_ledger(directory: &Path, summary: &LedgerSummary) -> Result<LedgerEntry, BackupError> {
    let path = directory.join(LEDGER_FILE);
    let renamed = fs::rename(directory.join(LEDGER_PARTIAL), &path).and_then(|()| sync_directory(directory));
    renamed.map_err(|source| io_error(&path, source))?;
    let LedgerSummary { tombstones, as_of } = *summary;
    Ok(LedgerEntry { file: LEDGER_FILE.to_owned(), tombstones, as_of: text_of(crate::micros(as_of)) })
}

impl Backup {
    /// Does not read back what was copied, nor look at what is there already. Every row is checked before it is copied, and the files are summed,
    /// all the same.
    pub fn without_verification(mut self) -> Self {
        self.verify = false;
        self
    }

    /// Makes the backup. `progress` is told how far it is.
    ///
    /// # Errors
    /// See [`BackupError`]. What could be restored before still can; run it again, it goes on where it was.
    /// # Cancel safety
    /// Cancel safe: what could be restored before still can.
    pub async fn run(self, mut progress: impl FnMut(&BackupProgress) + Send) -> Result<BackupReport, BackupError> {
        let Backup { kuma, directory, verify } = self;
        let owned = kuma.slots().owned().len();
        if kuma.inner.is_clustered() && owned < usize::from(SLOTS) {
            return Err(BackupError::PartOfACluster { owned });
        }
        let _place = Place::take::<EventsManifest>(&kuma, &directory)?;
        let at_us = kuma.inner.now_us();
        let mut shards: Vec<Arc<ShardCore>> = Vec::new();
        for (shard, open) in kuma.open_shards() {
            shards.push(open.map_err(|why| BackupError::ShardOutOfUse { shard, why: why.to_owned() })?.clone());
        }
        // At most 256.
        let count = shards.len() as u16;
        let unfinished = directory.join(UNFINISHED_FILE);
        if verify && !unfinished.exists() {
            check_former(&directory).await?;
        }
        manifest::replace(&unfinished, b"").map_err(|source| io_error(&unfinished, source))?;
        let disk_id = kuma.inner.disk_id();
        let mut now =
            BackupProgress { step: BackupStep::Copy, shard: 0, shards: count, commits: 0, commits_total: 0, bytes: 0 };
        // Before anything is copied: a life that was replaced has its tombstone after the next one is there, so that for each tombstone the
        // copy has that next life.
        let ledger = kuma.new_ledger(&directory).await?;
        let mut copied: Vec<ShardCopied> = Vec::new();
        for core in &shards {
            now.shard += 1;
            let before = now.bytes;
            let tell = |copy: kuma_shard::CopyProgress| {
                now = BackupProgress {
                    commits: copy.commits,
                    commits_total: copy.commits_total,
                    bytes: before + copy.bytes,
                    ..now
                };
                progress(&now);
            };
            copied.push(core.shard.back_up(&directory, disk_id, count, tell).await?);
        }
        let mut verified = verify.then(BackupContents::default);
        let mut entries = Vec::with_capacity(copied.len());
        now.step = BackupStep::Verify;
        for (core, copied) in shards.iter().zip(&copied) {
            let path = directory.join(core.shard.file());
            if let Some(verified) = &mut verified {
                now.shard = core.shard.number() + 1;
                now.commits_total = copied.contents.position;
                let tell = |commits| {
                    now.commits = commits;
                    progress(&now);
                };
                verified.add(&read_back(&directory, count, disk_id, copied, tell).await?);
            }
            entries.push(ShardEntry::new(entry_of(&path).await?, &copied.contents));
        }
        let ledger_entry = put_ledger(&directory, &ledger)?;
        let mut manifest = EventsManifest::new(kuma.backup_of(Backed::Events, at_us), entries, ledger_entry);
        write_manifest(&directory, &mut manifest)?;
        let ended = fs::remove_file(&unfinished).and_then(|()| sync_directory(&directory));
        ended.map_err(|source| io_error(&unfinished, source))?;
        kuma.note_backup("events", at_us).await?;
        let slots = |of: fn(&ShardCopied) -> &Vec<Slot>| copied.iter().flat_map(of).copied().collect::<Vec<Slot>>();
        let report = BackupReport {
            taken_at: time_of(at_us),
            commits: copied.iter().map(|shard| shard.commits).sum(),
            bytes: copied.iter().map(|shard| shard.bytes).sum(),
            stubs: copied.iter().map(|shard| shard.stubs).sum(),
            verified,
            bad_slots: slots(|shard| &shard.bad_slots),
            changed_slots: slots(|shard| &shard.changed_slots),
            ledger,
            manifest,
        };
        if !report.bad_slots.is_empty() {
            let slots = report.bad_slots.len();
            tracing::warn!(slots, "the store does not hold what was committed in some slots; verify it");
        }
        tracing::info!(commits = report.commits, bytes = report.bytes, "a backup was made");
        Ok(report)
    }
}

/// Reads every row of a copy, and whether it holds what it should.
async fn read_back(
    directory: &Path,
    shards: u16,
    disk_id: DiskId,
    copied: &ShardCopied,
    progress: impl FnMut(u64) + Send,
) -> Result<ShardRead, BackupError> {
    let mut backup = ShardBackup::open(directory, copied.contents.shard, shards, disk_id).await?;
    let read = backup.verify(|_| (), progress).await;
    let contents = backup.contents();
    backup.close().await;
    let read = read?;
    if contents != copied.contents {
        let path = directory.to_owned();
        return Err(CopyError::Damaged { path, detail: "a shard is not what was copied".to_owned() }.into());
    }
    Ok(read)
}

async fn read_keys_back(path: &Path, disk_id: DiskId, copied: &KeysContents) -> Result<(), BackupError> {
    let backup = KeysBackup::open(path, disk_id).await?;
    let found = backup.contents().clone();
    backup.close().await;
    match found == *copied {
        true => Ok(()),
        false => {
            let detail = "its keys are not those that were copied".to_owned();
            Err(CopyError::Damaged { path: path.to_owned(), detail }.into())
        }
    }
}

/// Whether the files that are there are, to the byte, what their manifest says: what is added to a damaged file would be thought whole.
async fn check_former(directory: &Path) -> Result<(), BackupError> {
    let Ok(manifest) = manifest::read::<EventsManifest>(directory) else { return Ok(()) };
    for former in manifest.shards.into_iter().map(|shard| shard.file) {
        let path = directory.join(&former.file);
        if path.exists() && former.blake3.is_some() && entry_of(&path).await? != former {
            let detail = "its bytes are not those that the manifest says".to_owned();
            return Err(CopyError::Damaged { path, detail }.into());
        }
    }
    Ok(())
}

/// No connection to the file may be open: this would drop its locks.
async fn entry_of(path: &Path) -> Result<BackupFileEntry, BackupError> {
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let owned = path.to_owned();
    let measured = tokio::task::spawn_blocking(move || manifest::measure(&owned, true)).await;
    let measured = measured.unwrap_or_else(|error| Err(io::Error::other(error)));
    let (bytes, blake3) = measured.map_err(|source| io_error(path, source))?;
    Ok(BackupFileEntry { file, bytes, blake3 })
}

fn write_manifest<M: manifest::Sealed>(directory: &Path, manifest: &mut M) -> Result<(), BackupError> {
    manifest::write(directory, manifest).map_err(|error| match error {
        ManifestError::Io { path, source } => io_error(&path, source),
        other => other.into(),
    })
}

fn io_error(path: &Path, source: io::Error) -> BackupError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull => BackupError::DiskFull { path },
        _ => BackupError::Io { path, source },
    }
}

/// Writes zeros over a file and removes it. What the disk keeps of it elsewhere is out of reach, and a second name of the file is somebody's
/// own copy of it: that is left alone.
fn wipe(path: &Path) -> Result<(), BackupError> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let wiped = (|| {
        let mut file = match OpenOptions::new().write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let metadata = file.metadata()?;
        let mut left = if metadata.nlink() > 1 { 0 } else { metadata.len() };
        while left > 0 {
            let now = left.min(ZEROS.len() as u64);
            file.write_all(&ZEROS[..now as usize])?;
            left -= now;
        }
        file.sync_all()?;
        fs::remove_file(path)
    })();
    wiped.map_err(|source| io_error(path, source))
}

/// A directory that one backup is made in.
struct Place<M> {
    /// The manifest that is there.
    before: Option<M>,
    _lock: Lock,
}

/// Given back by name, so that a child process that is being started does not keep it.
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing follows in any case.
        let _ = self.0.unlock();
    }
}

impl Place<()> {
    /// Makes the directory if it does not exist, and sees that it is one for a backup of this kind and store.
    fn take<M: manifest::Sealed>(kuma: &Kuma, directory: &Path) -> Result<Place<M>, BackupError> {
        let cannot = |source| io_error(directory, source);
        let wrong = |detail: String| BackupError::WrongDirectory { path: directory.to_owned(), detail };
        if !directory.try_exists().map_err(cannot)? {
            create_directory(directory).map_err(cannot)?;
        } else if !directory.is_dir() {
            return Err(wrong("it is not a directory".to_owned()));
        }
        let (here, data) = (directory.canonicalize(), kuma.inner.data_dir().canonicalize());
        if here.map_err(cannot)?.starts_with(data.map_err(cannot)?) {
            return Err(wrong("it is in the data directory of the store".to_owned()));
        }
        if directory.join("store.json").exists() {
            return Err(wrong("it is the data directory of a store".to_owned()));
        }
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(directory.join(LOCK_FILE));
        let lock = lock.map_err(cannot)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(BackupError::InUse { path: directory.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(cannot(error)),
        }
        let lock = Lock(lock);
        let before = match manifest::read::<M>(directory) {
            Ok(before) => Some(before),
            Err(ManifestError::Missing { .. }) => None,
            // It names no store, but the files do.
            Err(error @ ManifestError::Damaged { .. }) => {
                tracing::warn!(%error, "the manifest of a backup is damaged; it is written anew");
                None
            }
            Err(error @ (ManifestError::OtherBackup { .. } | ManifestError::Newer { .. })) => {
                return Err(wrong(error.to_string()));
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(before) = &before {
            let of = before.of();
            if of.context != kuma.context() {
                return Err(wrong(format!("it holds a backup of \"{}\", not of \"{}\"", of.context, kuma.context())));
            }
            if of.disk_id() != Some(kuma.inner.disk_id()) {
                let detail = "it holds a backup of another store of this name, or of this one before a restore";
                return Err(wrong(detail.to_owned()));
            }
        }
        Ok(Place { before, _lock: lock })
    }
}
