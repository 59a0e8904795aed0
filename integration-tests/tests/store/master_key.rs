//! The master key: where it comes from, and how it is changed for another one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use crate::common::{
    Files, Ledger, assert_clean, crash_copy, directory, entered, read_files, sentence, until, write_files,
};
use kuma_core::{
    AppendError, Kuma, LocalMasterKey, MasterKey, MasterKeyError, MasterKeySource, Options, ReadError, StartError,
    Unavailable, VaultError,
};
use kuma_crypto::{BoxFuture, KekId, Secret32};

const ENTITIES: u64 = 300;

fn options(data: &Path, key: &Path) -> Options {
    Options::new(data).shards(2).master_key(MasterKeySource::File(key.to_owned()))
}

fn key_line(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    text.lines().find(|line| !line.starts_with('#')).unwrap().to_owned()
}

fn write_key_file(path: &Path, lines: &[&str]) {
    fs::write(path, lines.join("\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

async fn fill(kuma: &Kuma) {
    for number in 0..ENTITIES {
        kuma.entity::<Ledger>(format!("l-{number}")).append(entered(number)).await.unwrap();
    }
}

async fn assert_readable(kuma: &Kuma) {
    for number in 0..ENTITIES {
        assert_eq!(kuma.entity::<Ledger>(format!("l-{number}")).read().await.unwrap().entries, [number]);
    }
    assert_clean(kuma).await;
}

#[tokio::test]
async fn after_a_rotation_the_new_key_opens_everything_and_the_old_one_nothing() {
    let dir = directory();
    let (data, key) = (dir.path().join("data"), dir.path().join("my.key"));
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!data.join("master.key").exists());
    fill(&kuma).await;
    kuma.shutdown().await;
    let old = key_line(&key);

    let other = dir.path().join("other.key");
    LocalMasterKey::create_file(&other).unwrap();
    let new = key_line(&other);
    write_key_file(&key, &[&new, &old]);
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    // Entities of both sides of the rotation.
    kuma.entity::<Ledger>("new").append(entered(1)).await.unwrap();
    assert_eq!(kuma.rotate_master_key().await.unwrap(), ENTITIES);
    assert_eq!(kuma.rotate_master_key().await.unwrap(), 0, "there is nothing left to do");
    assert_readable(&kuma).await;
    kuma.shutdown().await;

    write_key_file(&key, &[&new]);
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    assert_readable(&kuma).await;
    assert_eq!(kuma.entity::<Ledger>("new").read().await.unwrap().entries, [1]);
    kuma.shutdown().await;

    write_key_file(&key, &[&old]);
    let refused = Kuma::start(options(&data, &key)).await.map(|_| ());
    assert!(matches!(refused, Err(StartError::WrongMasterKey(MasterKeyError::UnknownKek { .. }))), "{refused:?}");
}

const VARIABLE: &str = "KUMA_TEST_MASTER_KEY";
const DATA: &str = "KUMA_TEST_DATA";

/// Not a promise: what the process in the test below does.
#[tokio::test]
async fn as_a_process_with_its_key_in_the_environment() {
    let Some(data) = std::env::var_os(DATA) else { return };
    let options = Options::new(data).shards(1).master_key(MasterKeySource::Env(VARIABLE.into()));
    match Kuma::start(options).await {
        Ok(kuma) => {
            let ledger = kuma.entity::<Ledger>("l-1");
            ledger.append(entered(1)).await.unwrap();
            println!("answer: {:?}", ledger.read().await.unwrap().entries);
            kuma.shutdown().await;
        }
        Err(error) => println!("answer: {error}"),
    }
}

/// In processes of their own: an environment is changed for a whole process.
#[test]
fn a_key_in_the_environment_opens_the_store_that_it_made() {
    let dir = directory();
    let data = dir.path().join("data");
    let run = |key: Option<String>| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "master_key::as_a_process_with_its_key_in_the_environment", "--nocapture"])
            .env(DATA, &data);
        command.env_remove(VARIABLE).envs(key.map(|key| (VARIABLE, key)));
        let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
        said.lines().find_map(|line| line.split_once("answer: ")).unwrap().1.to_owned()
    };
    let (key, other) = ("11".repeat(32), "22".repeat(32));
    assert!(run(None).contains("environment variable KUMA_TEST_MASTER_KEY is not set"));
    assert_eq!(run(Some(key.clone())), "[1]");
    let before = files(&data);
    for (nothing, words) in [
        ("", "environment variable KUMA_TEST_MASTER_KEY holds no master key"),
        ("# no key;", "environment variable KUMA_TEST_MASTER_KEY holds no master key"),
        ("hunter2", "line 1 of environment variable KUMA_TEST_MASTER_KEY is not a master key"),
        (&other, "the master key does not open this store"),
    ] {
        let said = run(Some(nothing.to_owned()));
        assert!(said.contains(words) && !said.contains("hunter2"), "{said}");
        assert_unchanged(&data, &before, &said);
    }
    assert_eq!(run(Some(format!("{other};{key}"))), "[1, 1]");
    assert!(run(Some(other)).contains("the master key does not open this store"));
    assert!(!data.join("master.key").exists());
}

/// A service that counts, and can be down.
#[derive(Debug)]
struct Service {
    key: LocalMasterKey,
    calls: AtomicU64,
    down: AtomicBool,
}

impl Service {
    fn call(&self) -> Result<(), MasterKeyError> {
        self.calls.fetch_add(1, Relaxed);
        let down = self.down.load(Relaxed);
        if down { Err(MasterKeyError::Provider { source: "no route".into(), retry_safe: true }) } else { Ok(()) }
    }
}

impl MasterKey for Service {
    fn current(&self) -> KekId {
        self.key.current()
    }

    fn wrap<'a>(&'a self, secret: &'a Secret32, aad: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>, MasterKeyError>> {
        Box::pin(async move {
            self.call()?;
            self.key.wrap(secret, aad).await
        })
    }

    fn unwrap<'a>(&'a self, wrapped: &'a [u8], aad: &'a [u8]) -> BoxFuture<'a, Result<Secret32, MasterKeyError>> {
        Box::pin(async move {
            self.call()?;
            self.key.unwrap(wrapped, aad).await
        })
    }
}

#[tokio::test]
async fn a_provider_that_is_down_makes_entities_unavailable_and_harms_none() {
    let dir = directory();
    let service =
        Arc::new(Service { key: LocalMasterKey::generate(), calls: AtomicU64::new(0), down: AtomicBool::new(false) });
    let options = || Options::new(dir.path()).shards(1).master_key(MasterKeySource::Provider(service.clone()));
    let kuma = Kuma::start(options()).await.unwrap();
    let (known, unknown) = (kuma.entity::<Ledger>("known"), kuma.entity::<Ledger>("unknown"));
    known.append(entered(1)).await.unwrap();
    assert!(service.calls.load(Relaxed) >= 2, "the id secret and one entity");
    assert!(!dir.path().join("master.key").exists());

    service.down.store(true, Relaxed);
    // What is in memory goes on.
    known.append(entered(2)).await.unwrap();
    known.raw().passivate().await.unwrap();
    for _ in 0..5 {
        let error = known.read().await.unwrap_err();
        assert!(matches!(error, ReadError::Unavailable(Unavailable::Unreadable { .. })), "{error:?}");
        let error = unknown.append(entered(1)).await.unwrap_err();
        assert!(error.is_retry_safe() && error.to_string().contains("nothing was written"), "{error:?}");
    }
    // A provider's failure is not the entity's: it is not quarantined.
    service.down.store(false, Relaxed);
    assert_eq!(known.read().await.unwrap().entries, [1, 2]);
    unknown.append(entered(1)).await.unwrap();
    assert_clean(&kuma).await;
    kuma.shutdown().await;

    service.down.store(true, Relaxed);
    let refused = Kuma::start(options()).await.map(|_| ()).unwrap_err();
    let is_provider =
        |error: &StartError| matches!(error, StartError::Vault(VaultError::MasterKey(MasterKeyError::Provider { .. })));
    assert!(is_provider(&refused), "a provider that is down is not a wrong key: {refused:?}");
}

/// All but the lock, which holds the number of the process that opened the store last, and what SQLite needs to look: shared memory,
/// and a log with nothing in it.
fn files(data: &Path) -> Files {
    let mut files = read_files(data);
    let is_scaffold = |name: &str, bytes: &[u8]| name.ends_with("-shm") || name.ends_with("-wal") && bytes.is_empty();
    files.retain(|name, bytes| name != "kuma.lock" && !is_scaffold(name, bytes));
    files
}

#[track_caller]
fn assert_unchanged(data: &Path, before: &Files, what: &str) {
    let after = files(data);
    let names = before.keys().chain(after.keys()).filter(|name| before.get(*name) != after.get(*name));
    let changed: Vec<_> = names.collect();
    assert!(changed.is_empty(), "{what}: {changed:?}");
}

/// Appends to three entities.
async fn fill_three(kuma: &Kuma) {
    for number in 0..3 {
        kuma.entity::<Ledger>(format!("l-{number}")).append(entered(number)).await.unwrap();
    }
}

async fn assert_three_readable(options: Options) {
    let kuma = Kuma::start(options).await.unwrap();
    for number in 0..3 {
        assert_eq!(kuma.entity::<Ledger>(format!("l-{number}")).read().await.unwrap().entries, [number]);
    }
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

async fn refusal(options: Options, dir: &Path) -> String {
    let error = Kuma::start(options).await.map(drop).unwrap_err();
    sentence(&error, dir)
}

#[tokio::test]
async fn without_its_master_key_a_store_says_what_cannot_be_read_and_changes_no_byte() {
    let dir = directory();
    let (data, key) = (dir.path().join("data"), dir.path().join("my.key"));
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    fill_three(&kuma).await;
    let crashed = crash_copy(&data);
    kuma.shutdown().await;
    let right = fs::read_to_string(&key).unwrap();
    // One that was closed, and one that was not: its last commits are in the logs.
    for data in [&data, crashed.path()] {
        let mut before = files(data);
        let cases = [
            (None, "nothing in the store can be read: master key file [dir]/my.key is missing; put the key back"),
            (Some(""), "nothing in the store can be read: [dir]/my.key holds no master key"),
            (Some("# the key was here\n"), "[dir]/my.key holds no master key"),
            (Some("hunter2"), "line 1 of [dir]/my.key is not a master key"),
            (Some(&"77".repeat(32)), "the master key does not open this store; use the one it was created with"),
        ];
        for (content, words) in cases {
            match content {
                None => fs::remove_file(&key).unwrap(),
                Some(content) => write_key_file(&key, &[content]),
            }
            let said = refusal(options(data, &key), dir.path()).await;
            assert!(said.contains(words) && !said.contains("hunter2"), "{said}");
            assert_eq!(key.exists(), content.is_some(), "no key is made for a store that has one");
            let after = files(data);
            if !after.contains_key("keys.db-wal") && before.remove("keys.db-wal").is_some() {
                // The one exception. To see who wrapped them the keys were read, and their log written into their file, as at each
                // start: the same rows at another place.
                assert_eq!(content, Some(&*"77".repeat(32)));
                before.insert("keys.db".into(), after["keys.db"].clone());
            }
            assert_unchanged(data, &before, &said);
        }
        write_key_file(&key, &[&right]);
        assert_three_readable(options(data, &key)).await;
    }
}

#[tokio::test]
async fn a_store_without_keys_db_says_so_changes_no_byte_and_reads_everything_when_it_is_back() {
    let dir = directory();
    let (data, key) = (dir.path().join("data"), dir.path().join("my.key"));
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    fill_three(&kuma).await;
    kuma.shutdown().await;
    let whole = files(&data);
    for lost in [&["keys.db"][..], &["keys.watermark"], &["keys.db", "keys.watermark"]] {
        let mut rest = whole.clone();
        rest.retain(|name, _| !lost.contains(&name.as_str()));
        write_files(&data, &rest);
        let said = refusal(options(&data, &key), dir.path()).await;
        assert!(said.contains(&format!("[dir]/data/{} is missing", lost[0])), "{said}");
        assert!(said.contains("restore the store from a backup"), "{said}");
        assert_unchanged(&data, &rest, &said);
        write_files(&data, &whole);
        assert_three_readable(options(&data, &key)).await;
        write_files(&data, &whole);
    }
}

/// It lacks the keys of entities that were made since. They are not given new ones, which would cut off what they have.
#[tokio::test]
async fn an_older_keys_db_makes_the_entities_it_does_not_know_unavailable_and_no_other() {
    let dir = directory();
    let (data, key) = (dir.path().join("data"), dir.path().join("my.key"));
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    kuma.entity::<Ledger>("l-0").append(entered(0)).await.unwrap();
    kuma.shutdown().await;
    let older = files(&data);
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    for number in 1..3 {
        kuma.entity::<Ledger>(format!("l-{number}")).append(entered(number)).await.unwrap();
    }
    kuma.shutdown().await;
    let whole = files(&data);

    // The watermark of today finds it out at the start.
    let mut mixed = whole.clone();
    mixed.insert("keys.db".into(), older["keys.db"].clone());
    write_files(&data, &mixed);
    let said = refusal(options(&data, &key), dir.path()).await;
    assert!(said.contains("[dir]/data/keys.db is at commit") && said.contains("put the original files back"), "{said}");
    assert_unchanged(&data, &mixed, &said);

    // With the watermark of then nobody can tell before an entity is asked for.
    mixed.insert("keys.watermark".into(), older["keys.watermark"].clone());
    write_files(&data, &mixed);
    // The scrub would find them too, and quarantine them.
    let kuma = Kuma::start(options(&data, &key).scrub_bytes_per_second(0)).await.unwrap();
    assert_eq!(kuma.entity::<Ledger>("l-0").read().await.unwrap().entries, [0]);
    for number in 1..3 {
        let unknown = kuma.entity::<Ledger>(format!("l-{number}"));
        let error = unknown.append(entered(9)).await.unwrap_err();
        assert!(matches!(error, AppendError::Unavailable(Unavailable::Unreadable { .. })), "{error:?}");
        let error = unknown.read().await.unwrap_err();
        let said = sentence(&error, dir.path());
        assert!(said.starts_with("entity [hex] cannot be read") && said.contains("restore keys.db"), "{said}");
    }
    kuma.entity::<Ledger>("new").append(entered(5)).await.unwrap();
    kuma.shutdown().await;
    write_files(&data, &whole);
    assert_three_readable(options(&data, &key)).await;
}

/// The first line of a key file for [`as_a_process_that_is_killed_in_the_middle_of_a_rotation`], and how many wraps it lives.
const ROTATION_KEY: &str = "KUMA_TEST_ROTATION_KEY";
const ROTATION_WRAPS: &str = "KUMA_TEST_ROTATION_WRAPS";

/// Kills its process, as `kill -9` does, instead of one wrap.
#[derive(Debug)]
struct Deadly {
    key: LocalMasterKey,
    wraps: AtomicU64,
    wraps_max: u64,
}

impl MasterKey for Deadly {
    fn current(&self) -> KekId {
        self.key.current()
    }

    fn wrap<'a>(&'a self, secret: &'a Secret32, aad: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>, MasterKeyError>> {
        if self.wraps.fetch_add(1, Relaxed) == self.wraps_max {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        }
        self.key.wrap(secret, aad)
    }

    fn unwrap<'a>(&'a self, wrapped: &'a [u8], aad: &'a [u8]) -> BoxFuture<'a, Result<Secret32, MasterKeyError>> {
        self.key.unwrap(wrapped, aad)
    }
}

/// Not a promise: what the process in the test below does.
#[tokio::test]
async fn as_a_process_that_is_killed_in_the_middle_of_a_rotation() {
    let Some(data) = std::env::var_os(DATA) else { return };
    let Some(key) = std::env::var_os(ROTATION_KEY) else { return };
    let wraps_max = std::env::var(ROTATION_WRAPS).unwrap().parse().unwrap();
    let key = LocalMasterKey::from_file(Path::new(&key)).unwrap();
    let master = Arc::new(Deadly { key, wraps: AtomicU64::new(0), wraps_max });
    let options = Options::new(data).shards(2).master_key(MasterKeySource::Provider(master));
    Kuma::start(options).await.unwrap().rotate_master_key().await.unwrap();
}

#[tokio::test]
async fn a_rotation_that_was_killed_is_finished_by_running_it_again() {
    let dir = directory();
    let (data, key) = (dir.path().join("data"), dir.path().join("my.key"));
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    fill(&kuma).await;
    kuma.shutdown().await;
    let other = dir.path().join("other.key");
    LocalMasterKey::create_file(&other).unwrap();
    let (old, new) = (key_line(&key), key_line(&other));
    write_key_file(&key, &[&new, &old]);
    // The first wrap is the id secret's. Each process goes on where the last one died.
    let mut done = 0;
    for wraps in [0, 1, 200, 260, 40] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "master_key::as_a_process_that_is_killed_in_the_middle_of_a_rotation"]);
        command.env(DATA, &data).env(ROTATION_KEY, &key).env(ROTATION_WRAPS, wraps.to_string());
        let status = command.stdout(std::process::Stdio::null()).status().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "after {wraps} wraps: {status}");
        done += wraps;
    }
    assert!(done > ENTITIES, "without what the others did, none would have come so far");
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    assert_readable(&kuma).await;
    let left = kuma.rotate_master_key().await.unwrap();
    assert!(0 < left && left < ENTITIES, "{left}");
    assert_eq!(kuma.rotate_master_key().await.unwrap(), 0);
    kuma.shutdown().await;
    write_key_file(&key, &[&new]);
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    assert_readable(&kuma).await;
    kuma.shutdown().await;
}

/// Keys that come meanwhile are under the new key already: a rotation does not run after them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_ends_however_fast_new_entities_come() {
    let dir = directory();
    let (data, key) = (dir.path().join("data"), dir.path().join("my.key"));
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    fill_three(&kuma).await;
    kuma.shutdown().await;
    let other = dir.path().join("other.key");
    LocalMasterKey::create_file(&other).unwrap();
    write_key_file(&key, &[&key_line(&other), &key_line(&key)]);
    let kuma = Kuma::start(options(&data, &key)).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..64)
        .map(|writer| {
            let (kuma, stop) = (kuma.clone(), stop.clone());
            tokio::spawn(async move {
                for number in 0.. {
                    if stop.load(Relaxed) {
                        return;
                    }
                    kuma.entity::<Ledger>(format!("{writer}-{number}")).append(entered(0)).await.unwrap();
                }
            })
        })
        .collect();
    until("new entities come", async || kuma.stats().live_entities() > 200).await;
    let rewrapped = tokio::time::timeout(std::time::Duration::from_secs(3), kuma.rotate_master_key()).await;
    stop.store(true, Relaxed);
    futures_util::future::join_all(writers).await;
    assert_eq!(rewrapped.expect("it ends").unwrap(), 3);
    kuma.shutdown().await;
}
