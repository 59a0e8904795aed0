//! The master key: where it comes from, and how it is changed for another one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

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

use common::{Ledger, assert_clean, directory, entered};
use kuma_core::{
    Kuma, LocalMasterKey, MasterKey, MasterKeyError, MasterKeySource, Options, ReadError, StartError, Unavailable,
    VaultError,
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
        command.args(["--exact", "as_a_process_with_its_key_in_the_environment", "--nocapture"]).env(DATA, &data);
        command.env_remove(VARIABLE).envs(key.map(|key| (VARIABLE, key)));
        let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
        said.lines().find_map(|line| line.split_once("answer: ")).unwrap().1.to_owned()
    };
    let (key, other) = ("11".repeat(32), "22".repeat(32));
    assert!(run(None).contains("environment variable KUMA_TEST_MASTER_KEY is not set"));
    assert_eq!(run(Some(key.clone())), "[1]");
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
