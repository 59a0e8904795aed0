//! Helpers of the tests in this directory.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub(crate) mod observed;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use kuma_core::{Command, Entity, Kuma, Options, RecordedEvent};
use power_loss::{Disk, PowerLoss};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

/// An entity that remembers the order of its events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ledger {
    pub(crate) entries: Vec<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum LedgerEvent {
    Entered { number: u64, note: String },
}

impl Entity for Ledger {
    const KIND: &'static str = "ledger";
    type Event = LedgerEvent;

    fn apply(&mut self, event: &LedgerEvent) {
        let LedgerEvent::Entered { number, .. } = event;
        self.entries.push(*number);
    }
}

pub(crate) fn entered(number: u64) -> LedgerEvent {
    LedgerEvent::Entered { number, note: String::new() }
}

/// An entity that commands are decided on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) balance: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum AccountEvent {
    Deposited {
        amount: i64,
    },
    Withdrawn {
        amount: i64,
    },
    /// `apply` panics.
    Poisoned,
}

impl Entity for Account {
    const KIND: &'static str = "account";
    type Event = AccountEvent;

    fn apply(&mut self, event: &AccountEvent) {
        match event {
            AccountEvent::Deposited { amount } => self.balance += amount,
            AccountEvent::Withdrawn { amount } => self.balance -= amount,
            AccountEvent::Poisoned => panic!("apply panics, as told"),
        }
    }
}

pub(crate) fn deposited(amount: i64) -> AccountEvent {
    AccountEvent::Deposited { amount }
}

/// Takes an amount if it is there; nothing to do for 0.
#[derive(Clone, Default, Serialize)]
pub(crate) struct Withdraw {
    pub(crate) amount: i64,
    /// How often it was decided.
    #[serde(skip)]
    pub(crate) decisions: Arc<AtomicU64>,
}

pub(crate) fn withdraw(amount: i64) -> Withdraw {
    Withdraw { amount, decisions: Arc::default() }
}

impl Withdraw {
    pub(crate) fn decided(&self) -> u64 {
        self.decisions.load(SeqCst)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("short of {missing}")]
pub(crate) struct Overdrawn {
    pub(crate) missing: i64,
}

impl Command<Account> for Withdraw {
    type Rejection = Overdrawn;

    fn decide(self, account: &Account) -> Result<Vec<AccountEvent>, Overdrawn> {
        self.decisions.fetch_add(1, SeqCst);
        match (self.amount, account.balance - self.amount) {
            (0, _) => Ok(Vec::new()),
            (_, left) if left < 0 => Err(Overdrawn { missing: -left }),
            _ => Ok(vec![AccountEvent::Withdrawn { amount: self.amount }]),
        }
    }
}

/// A store of one shard on a disk that can be made slow, fail or lose its power.
pub(crate) struct OnDisk {
    pub(crate) disk: PowerLoss,
    pub(crate) kuma: Kuma,
    pub(crate) dir: TempDir,
}

impl OnDisk {
    pub(crate) async fn new() -> OnDisk {
        OnDisk::in_directory(directory()).await
    }

    pub(crate) async fn in_directory(dir: TempDir) -> OnDisk {
        let disk = PowerLoss::register(Disk::Honest);
        let kuma = Kuma::start(Options::new(dir.path()).shards(1).vfs(disk.vfs_name())).await.unwrap();
        OnDisk { disk, kuma, dir }
    }

    /// Whatever fails from now on fails in the shard's log, not in that of the keys.
    pub(crate) fn fail_in_log_only(&self) {
        self.disk.only_files_matching(|path| path.to_string_lossy().ends_with("shard-000.db-wal"));
    }

    /// Returns once a sync has begun.
    pub(crate) async fn until_syncing(&self) {
        until("a sync has begun", async || self.disk.counts().syncs_in_flight > 0).await;
    }

    /// The power goes, and what is left is opened.
    pub(crate) async fn cut(self, seed: u64) -> OnDisk {
        self.disk.cut(seed);
        self.kuma.shutdown().await;
        OnDisk::in_directory(self.dir).await
    }
}

/// A directory in memory where there is one: these tests are about content, not about the disk.
pub(crate) fn directory() -> TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm).unwrap() } else { tempfile::tempdir().unwrap() }
}

pub(crate) async fn start(path: &Path, shards: u16) -> Kuma {
    Kuma::start(Options::new(path).shards(shards)).await.unwrap()
}

/// Waits until `done` says so, and says what for if it never does.
pub(crate) async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done().await {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) async fn assert_clean(kuma: &Kuma) {
    let verification = kuma.verify(|_| {}).await.unwrap();
    assert!(verification.is_clean(), "{verification:#?}");
}

/// An error with all its causes, without what differs from run to run.
pub(crate) fn sentence(error: &dyn std::error::Error, directory: &Path) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // A transparent error repeats its cause's words.
        if !text.contains(&cause.to_string()) {
            text = format!("{text}: {cause}");
        }
        source = cause.source();
    }
    let text = text.replace(&*directory.to_string_lossy(), "[dir]");
    let text = text.replace(&format!("process {}", std::process::id()), "process [pid]");
    redact_hex(&text)
}

/// Replaces runs of 12 and more hex digits.
fn redact_hex(text: &str) -> String {
    let mut redacted = String::new();
    let mut run = String::new();
    for character in text.chars().chain([' ']) {
        if character.is_ascii_digit() || ('a'..='f').contains(&character) {
            run.push(character);
            continue;
        }
        redacted.push_str(if run.len() >= 12 { "[hex]" } else { &run });
        run.clear();
        redacted.push(character);
    }
    redacted.pop();
    redacted
}

/// Everything that the public interface tells of these entities.
pub(crate) async fn history(kuma: &Kuma, kind: &str, id: &str) -> Vec<RecordedEvent> {
    kuma.raw(kind, id).events(.., usize::MAX).await.unwrap()
}

/// The files of a directory, by name.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// Reads all files of a directory that no one in this process has open: SQLite loses its locks where a file of its is closed.
pub(crate) fn read_files(path: &Path) -> Files {
    let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    entries.map(|path| (name(&path), std::fs::read(&path).unwrap())).collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// Makes the directory hold these files, and no others.
pub(crate) fn write_files(path: &Path, files: &Files) {
    std::fs::create_dir_all(path).unwrap();
    for name in read_files(path).keys().filter(|name| !files.contains_key(*name)) {
        std::fs::remove_file(path.join(name)).unwrap();
    }
    for (name, bytes) in files {
        std::fs::write(path.join(name), bytes).unwrap();
    }
    let key = path.join("master.key");
    if key.exists() {
        std::fs::set_permissions(key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
}

/// The files of a store as a power cut would leave them now. Read by another process, for the sake of SQLite's locks.
pub(crate) fn image(path: &Path) -> Files {
    let copy = directory();
    let mut sources: Vec<PathBuf> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    // Shared memory does not survive.
    sources.retain(|source| !name(source).ends_with("-shm") && name(source) != "kuma.lock");
    let copied = std::process::Command::new("cp").args(&sources).arg(copy.path()).status().unwrap();
    assert!(copied.success());
    read_files(copy.path())
}

/// What a process that dies now would leave, in a directory of its own. The store may be in use, as long as no checkpoint runs: less
/// than 2 MiB were written since it was opened.
pub(crate) fn crash_copy(path: &Path) -> TempDir {
    let copy = directory();
    let mut sources: Vec<PathBuf> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    sources.retain(|source| !name(source).ends_with("-shm") && name(source) != "kuma.lock");
    // No watermark may be newer than its database, no commit newer than its key, no page newer than its log.
    sources.sort_by_key(|source| {
        let name = name(source);
        (!name.ends_with(".watermark"), name.starts_with("keys"), name)
    });
    let copied = std::process::Command::new("cp").args(&sources).arg(copy.path()).status().unwrap();
    assert!(copied.success());
    copy
}

/// The commit counter of the newest record of a watermark file.
pub(crate) fn watermark(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    let counter = |record: &[u8]| u64::from_le_bytes(record[4..12].try_into().unwrap());
    bytes.chunks(64).filter(|record| record.starts_with(b"KWM1")).map(counter).max().unwrap()
}
