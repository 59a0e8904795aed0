//! Damaged, lost and mixed-up files: noticed by opening, reading or verifying, never answered with less than was committed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use crate::common::{
    Files, Ledger, LedgerEvent, assert_clean, directory, image, read_files, sentence, until, watermark, write_files,
};
use futures_util::{StreamExt, future::try_join_all, stream};
use kuma_core::{Kuma, LocalMasterKey, MasterKey, MasterKeySource, Metadata, Options, RecordedEvent};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const FLIPS: usize = 1_000;
const ENTITIES: usize = 200;

/// What each entity was promised to have: its events, and the state as JSON.
type Content = BTreeMap<String, (Vec<RecordedEvent>, serde_json::Value)>;

/// A store as a power cut would leave it, half in its databases and half in their logs.
struct Store {
    master: Arc<dyn MasterKey>,
    shards: u16,
    files: Files,
    content: Content,
}

fn ids() -> impl Iterator<Item = String> {
    (0..ENTITIES).map(|number| format!("entity-{number}"))
}

impl Store {
    fn options(&self, path: &Path) -> Options {
        Options::new(path).shards(self.shards).master_key(MasterKeySource::Provider(self.master.clone()))
    }

    async fn make(shards: u16) -> Store {
        let dir = directory();
        let master: Arc<dyn MasterKey> = Arc::new(LocalMasterKey::generate());
        let mut store = Store { master, shards, files: Files::new(), content: Content::new() };
        // The first part ends up in the databases, the second stays in the logs.
        let kuma = Kuma::start(store.options(dir.path())).await.unwrap();
        append(&kuma, 0, ENTITIES * 3 / 4, 2).await;
        kuma.shutdown().await;
        let before = commits_of(dir.path(), shards);
        drop(kuma);
        let mut kuma = None;
        until("the directory is free", async || {
            kuma = Kuma::start(store.options(dir.path())).await.ok();
            kuma.is_some()
        })
        .await;
        let kuma = kuma.unwrap();
        append(&kuma, ENTITIES / 4, ENTITIES, 2).await;
        until("the watermarks name the newest commits", async || {
            let stats = kuma.stats();
            let groups = stats.shards.iter().map(|shard| shard.writer.unwrap().groups).chain([stats.keys.groups]);
            let expected: Vec<u64> = before.iter().zip(groups).map(|(before, groups)| before + groups).collect();
            commits_of(dir.path(), shards) == expected
        })
        .await;
        store.files = image(dir.path());
        for id in ids() {
            store.content.insert(id.clone(), read(&kuma, &id).await.unwrap());
        }
        kuma.shutdown().await;
        store
    }

    /// How the store fares with these files in place of its own.
    async fn open(&self, path: &Path, files: &Files) -> Result<Kuma, kuma_core::StartError> {
        write_files(path, files);
        Kuma::start(self.options(path)).await
    }
}

fn commits_of(path: &Path, shards: u16) -> Vec<u64> {
    let shards = (0..shards).map(|number| format!("shard-{number:03}.watermark"));
    shards.chain(["keys.watermark".to_owned()]).map(|name| watermark(&path.join(name))).collect()
}

/// Appends `commits` commits of one to ten events to some of the entities. All at once, so that they are few groups.
async fn append(kuma: &Kuma, from: usize, to: usize, commits: u64) {
    let of_entity = |(number, id): (usize, String)| async move {
        let ledger = kuma.entity::<Ledger>(&id);
        let mut pending = Vec::new();
        for commit in 0..commits {
            let events = (0..=(number as u64 + commit) % 10).map(|event| LedgerEvent::Entered {
                number: commit * 10 + event,
                note: format!("{id}, commit {commit}"),
            });
            let metadata = Metadata { correlation: Some(id.clone()), ..Metadata::default() };
            pending.push(ledger.append_all(events).metadata(metadata).submit().await?);
        }
        try_join_all(pending).await
    };
    try_join_all(ids().enumerate().take(to).skip(from).map(of_entity)).await.unwrap();
}

async fn read(kuma: &Kuma, id: &str) -> Result<(Vec<RecordedEvent>, serde_json::Value), kuma_core::ReadError> {
    let handle = kuma.entity::<Ledger>(id);
    let events = handle.raw().events(.., usize::MAX).await?;
    let (state, version) = handle.raw().read().await?;
    assert_eq!(handle.read().await?.version(), version);
    Ok((events, state))
}

/// How a damage was found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Found {
    Open,
    Read,
    Verify,
    /// Everything is as it was committed, and verification agrees: the damage is where nothing is stored.
    Harmless,
    /// Something is not as it was committed, and nobody says so.
    Silent(String),
}

/// Looks at a store through its public interface only.
async fn look(store: &Store, files: &Files) -> Found {
    let dir = directory();
    let kuma = match store.open(dir.path(), files).await {
        Ok(kuma) => kuma,
        Err(_) => return Found::Open,
    };
    let mut found = Vec::new();
    if kuma.stats().shards.iter().any(|shard| shard.out_of_use.is_some()) {
        found.push(Found::Open);
    }
    // What is found already needs no full look, only one at whether what is still served is right.
    let step = if found.is_empty() { 1 } else { 20 };
    let mut wrong = Vec::new();
    for (id, expected) in store.content.iter().step_by(step) {
        match read(&kuma, id).await {
            Err(_) => found.push(Found::Read),
            Ok(content) if content == *expected => {}
            Ok(_) => wrong.push(id.clone()),
        }
    }
    if step == 1 && !kuma.verify(|_| {}).await.is_ok_and(|verification| verification.is_clean()) {
        found.push(Found::Verify);
    }
    kuma.shutdown().await;
    match found.into_iter().min() {
        Some(found) => found,
        None if wrong.is_empty() => Found::Harmless,
        None => Found::Silent(format!("{wrong:?}")),
    }
}

/// A bit of a file.
#[derive(Clone, Debug)]
struct Flip {
    file: String,
    byte: usize,
    bit: u8,
}

impl Flip {
    fn choose(files: &Files, of: impl Fn(&str) -> bool, random: &mut StdRng) -> Flip {
        let candidates: Vec<(&String, usize)> =
            files.iter().filter(|(name, _)| of(name)).map(|(name, bytes)| (name, bytes.len())).collect();
        let total: usize = candidates.iter().map(|(_, length)| length).sum();
        let mut at = random.random_range(0..total);
        for (name, length) in candidates {
            if at < length {
                return Flip { file: name.clone(), byte: at, bit: random.random_range(0..8) };
            }
            at -= length;
        }
        unreachable!("beyond the end of all files");
    }

    fn apply(&self, files: &Files) -> Files {
        let mut files = files.clone();
        files.get_mut(&self.file).unwrap()[self.byte] ^= 1 << self.bit;
        files
    }
}

fn seed() -> u64 {
    let seed = std::env::var("KUMA_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("seed: KUMA_SEED={seed}");
    seed
}

/// 1,000 single bits, or a quarter of them (see [`integration_tests::cases`]), each in a copy of its own.
#[tokio::test(flavor = "multi_thread")]
async fn no_flipped_bit_goes_unnoticed() {
    let store = Arc::new(Store::make(2).await);
    let clean = directory();
    let whole = store.open(clean.path(), &store.files).await.unwrap();
    assert_clean(&whole).await;
    whole.shutdown().await;
    assert_eq!(look(&store, &store.files).await, Found::Harmless, "without any damage");
    let sizes: Vec<(&String, usize)> = store.files.iter().map(|(name, bytes)| (name, bytes.len())).collect();
    println!("{sizes:?}");

    let mut random = StdRng::seed_from_u64(seed());
    type Kind = (&'static str, usize, fn(&str) -> bool);
    let kinds: [Kind; 3] = [
        ("shard databases", 400, |name| name.starts_with("shard-") && name.ends_with(".db")),
        ("shard logs", 300, |name| name.starts_with("shard-") && name.ends_with("-wal")),
        ("keys.db and its log", FLIPS - 700, |name| name.starts_with("keys.db")),
    ];
    let mut silent = Vec::new();
    for (kind, count, of) in kinds {
        let count = integration_tests::cases(count as u64) as usize;
        let flips: Vec<Flip> = (0..count).map(|_| Flip::choose(&store.files, of, &mut random)).collect();
        let looks = stream::iter(flips).map(|flip| {
            let store = store.clone();
            async move {
                let files = flip.apply(&store.files);
                let task = tokio::spawn(async move { look(&store, &files).await });
                let found =
                    tokio::time::timeout(Duration::from_secs(60), task).await.expect("it hangs").expect("it panicked");
                (flip, found)
            }
        });
        let found: Vec<(Flip, Found)> = looks.buffer_unordered(4).collect().await;
        let number = |which: &Found| found.iter().filter(|(_, found)| found == which).count();
        let quiet: Vec<_> = found.iter().filter(|(_, found)| matches!(found, Found::Silent(_))).cloned().collect();
        println!(
            "{kind}: {count} flips: {} found by open, {} by read, {} by verify, {} harmless, {} silent",
            number(&Found::Open),
            number(&Found::Read),
            number(&Found::Verify),
            number(&Found::Harmless),
            quiet.len(),
        );
        silent.extend(quiet);
    }
    assert!(silent.is_empty(), "{silent:#?}");
}

/// What a damage to the files does.
enum Outcome {
    /// Only these shards are out of use, and the sentence has these words.
    OutOfUse(&'static [u16], &'static str),
    /// The store does not start, and the sentence has these words.
    Refused(&'static str),
    /// Nothing was lost.
    Nothing,
}

/// Damages a store, sees that it is refused in the right words and that no byte of what was refused is changed, puts the original
/// files back and finds everything.
async fn damaged(store: &Store, what: &str, outcome: Outcome, damage: impl FnOnce(&mut Files)) {
    let dir = directory();
    let mut files = store.files.clone();
    damage(&mut files);
    let opened = store.open(dir.path(), &files).await;
    let refused: Vec<String> = match (&opened, &outcome) {
        (Ok(kuma), Outcome::OutOfUse(shards, words)) => {
            let stats = kuma.stats();
            let out: Vec<(u16, &String)> =
                stats.shards.iter().filter_map(|shard| Some((shard.shard, shard.out_of_use.as_ref()?))).collect();
            assert_eq!(out.iter().map(|(shard, _)| *shard).collect::<Vec<_>>(), *shards, "{what}");
            assert!(out.iter().all(|(_, why)| why.contains(words)), "{what}: {out:?}");
            for (id, expected) in &store.content {
                match read(kuma, id).await {
                    Ok(content) => assert_eq!(content, *expected, "{what}: {id}"),
                    Err(error) => {
                        assert!(
                            shards.contains(&(kuma_core::slot_of("ledger", id).shard(store.shards))),
                            "{what}: {id}: {error}"
                        );
                        assert!(error.to_string().contains(words), "{what}: {error}");
                    }
                }
            }
            shards.iter().map(|shard| format!("shard-{shard:03}.")).collect()
        }
        (Err(error), Outcome::Refused(words)) => {
            let said = sentence(error, dir.path());
            assert!(said.contains(words), "{what}: {said}");
            files.keys().map(|name| name.split('.').next().unwrap().to_owned()).collect()
        }
        (Ok(kuma), Outcome::Nothing) => {
            assert!(kuma.stats().shards.iter().all(|shard| shard.out_of_use.is_none()), "{what}");
            Vec::new()
        }
        (opened, _) => panic!("{what}: {:?}", opened.as_ref().map(Kuma::stats)),
    };
    if let Ok(kuma) = opened {
        kuma.shutdown().await;
    }
    let mut after = read_files(dir.path());
    let of_refused =
        |name: &str| refused.iter().any(|stem| name.starts_with(stem.as_str())) && !name.starts_with("keys");
    for (name, bytes) in
        files.iter().filter(|(name, _)| of_refused(name) || refused.is_empty() && name.ends_with("json"))
    {
        assert!(after.get(name) == Some(bytes), "{what}: {name} was changed by a refused open");
    }
    // Only what was damaged comes back.
    after.extend(
        store
            .files
            .iter()
            .filter(|(name, bytes)| files.get(*name) != Some(bytes))
            .map(|(name, bytes)| (name.clone(), bytes.clone())),
    );
    let kuma = store.open(dir.path(), &after).await.unwrap();
    for (id, expected) in &store.content {
        assert_eq!(read(&kuma, id).await.unwrap(), *expected, "{what}: {id} after the repair");
    }
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

fn swap(files: &mut Files, one: &str, other: &str) {
    let bytes = (files.remove(one).unwrap(), files.remove(other).unwrap());
    files.insert(one.to_owned(), bytes.1);
    files.insert(other.to_owned(), bytes.0);
}

const LOST: &str = "acknowledged events are missing";

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_log_puts_its_shard_out_of_use_and_nothing_is_deleted() {
    let store = Store::make(3).await;
    let length = store.files["shard-001.db-wal"].len();
    for keep in [0, 1, 31, 32, 33, 4096, length / 2, length - 4096, length - 1] {
        let what = format!("a log of {length} bytes cut to {keep}");
        damaged(&store, &what, Outcome::OutOfUse(&[1], LOST), |files| {
            files.get_mut("shard-001.db-wal").unwrap().truncate(keep)
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_file_puts_its_shard_out_of_use_and_comes_back_with_the_file() {
    let store = Store::make(3).await;
    let lose = async |name: &str, outcome| {
        damaged(&store, &format!("{name} is lost"), outcome, |files| drop(files.remove(name))).await
    };
    lose("shard-000.db-wal", Outcome::OutOfUse(&[0], LOST)).await;
    lose("shard-002.db", Outcome::OutOfUse(&[2], "is missing although this store has it")).await;
    lose(
        "shard-001.watermark",
        Outcome::OutOfUse(&[1], "is missing, so that a loss of acknowledged events would go unnoticed"),
    )
    .await;
    lose("keys.db", Outcome::Refused("keys.db is missing although this store has it")).await;
    lose("keys.db-wal", Outcome::Refused(LOST)).await;
    lose("keys.watermark", Outcome::Refused("is missing, so that a loss")).await;
    lose("store.json", Outcome::Refused("store.json is missing although there is data")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_watermark_is_not_believed() {
    let store = Store::make(3).await;
    damaged(&store, "both records damaged", Outcome::OutOfUse(&[1], "is damaged, so that a loss"), |files| {
        let bytes = files.get_mut("shard-001.watermark").unwrap();
        (bytes[10], bytes[74]) = (!bytes[10], !bytes[74]);
    })
    .await;
    damaged(&store, "an empty watermark", Outcome::OutOfUse(&[1], "is damaged, so that a loss"), |files| {
        files.get_mut("shard-001.watermark").unwrap().clear();
    })
    .await;
    // The older record still says something, and nothing was lost.
    for record in [0, 64] {
        damaged(&store, "one record damaged", Outcome::Nothing, |files| {
            files.get_mut("shard-001.watermark").unwrap()[record + 10] ^= 1
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_in_the_wrong_place_are_not_taken_for_the_right_ones() {
    let store = Store::make(3).await;
    let foreign = "belongs to another store or to another copy of this one";
    damaged(&store, "two shards swapped", Outcome::OutOfUse(&[0, 1], foreign), |files| {
        for extension in ["db", "db-wal", "watermark"] {
            swap(files, &format!("shard-000.{extension}"), &format!("shard-001.{extension}"));
        }
    })
    .await;
    let other = Store::make(3).await;
    damaged(&store, "another store's shard", Outcome::OutOfUse(&[2], foreign), |files| {
        for extension in ["db", "db-wal", "watermark"] {
            let name = format!("shard-002.{extension}");
            files.insert(name.clone(), other.files[&name].clone());
        }
    })
    .await;
    damaged(&store, "another store's watermark", Outcome::OutOfUse(&[2], foreign), |files| {
        files.insert("shard-002.watermark".into(), other.files["shard-002.watermark"].clone());
    })
    .await;
    damaged(&store, "another store's keys", Outcome::Refused(foreign), |files| {
        for name in ["keys.db", "keys.db-wal", "keys.watermark"] {
            files.insert(name.into(), other.files[name].clone());
        }
    })
    .await;
    damaged(&store, "not a database", Outcome::OutOfUse(&[1], "does not hold what was committed to it"), |files| {
        files.insert("shard-001.db".into(), vec![b'x'; 8192]);
    })
    .await;
}

/// The damage is found only by adding up the slots, after the log was found whole: even then no byte may change.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_token_puts_its_shard_out_of_use_and_leaves_the_log_as_it_is() {
    let store = Store::make(3).await;
    damaged(&store, "a token", Outcome::OutOfUse(&[1], "does not hold what was committed to it"), |files| {
        let bytes = files.get_mut("shard-001.db").unwrap();
        let at = bytes.windows(5).rposition(|bytes| bytes == b"owned").unwrap();
        bytes[at + 10] ^= 4;
    })
    .await;
}
