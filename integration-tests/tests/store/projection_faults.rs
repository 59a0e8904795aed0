//! Projections in trouble: an event that cannot be applied or read, a pause, a file that is damaged, models that take each other's place under
//! load. What is served is always whole, nothing is passed over unless it is said, and no receipt waits for any of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::common::{directory, until};
use integration_tests::{
    Probe, TestAppend,
    tally::{Tallied, Tally, count},
};
use kuma_core::{
    ApplyError, ErasureRule, Filter, Kuma, NewEvent, Options, Projection, ProjectionError, ProjectionFailure,
    ProjectionHandle, ProjectionState, Reason, Receipt, StoredEvent, Version,
    rusqlite::{self, Transaction, types::Value},
};
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);

fn options(path: &Path) -> Options {
    Options::new(path).shards(1).no_snapshots().scrub_bytes_per_second(0)
}

async fn start(path: &Path) -> Kuma {
    Kuma::start(options(path)).await.unwrap()
}

/// Keeps the numbers of events, and fails at those that are poison, until it is mended.
#[derive(Clone)]
struct Items {
    name: &'static str,
    version: u32,
    mended: Arc<AtomicBool>,
}

fn items(name: &'static str, version: u32, mended: bool) -> Items {
    Items { name, version, mended: Arc::new(mended.into()) }
}

/// An error that cannot even be shown.
#[derive(Debug)]
struct Unspeakable;

impl fmt::Display for Unspeakable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("as told")
    }
}

impl std::error::Error for Unspeakable {}

impl Projection for Items {
    fn name(&self) -> &str {
        self.name
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn filter(&self) -> Filter {
        Filter::kind("item")
    }

    fn erasure(&self) -> ErasureRule {
        ErasureRule::column("item", "entity")
    }

    fn migrations(&self) -> Vec<String> {
        vec!["CREATE TABLE item(n INTEGER PRIMARY KEY, entity TEXT NOT NULL, note TEXT) STRICT".to_owned()]
    }

    fn apply(&self, model: &Transaction<'_>, stored: &StoredEvent) -> Result<(), ApplyError> {
        let data = stored.event.json()?;
        let n = data["n"].as_i64().ok_or("there is no n")?;
        let note = data["note"].as_str().unwrap_or_default();
        // What it does before it fails must not stay.
        model.prepare_cached("INSERT INTO item VALUES (?, ?, ?)")?.execute((n, &*stored.id, note))?;
        match (&*stored.event.name, self.mended.load(SeqCst)) {
            ("Poison", false) => Err(format!("item {n} is poison").into()),
            ("Panic", false) => panic!("as told"),
            ("Unspeakable", false) => Err(Box::new(Unspeakable)),
            ("Rollback", false) => {
                let _ = model.execute("INSERT OR ROLLBACK INTO item VALUES (?, '', '')", [n]);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Appends a commit of items with these names, numbered from `first` on; returns the next number.
async fn append(kuma: &Kuma, id: &str, first: i64, names: &[&str]) -> i64 {
    let events = names.iter().zip(first..).map(|(name, n)| NewEvent::json(*name, &json!({ "n": n })).unwrap());
    kuma.raw("item", id).append_all(events).await.unwrap();
    first + names.len() as i64
}

async fn rows(projection: &ProjectionHandle) -> Vec<i64> {
    let answer = projection.query("SELECT n FROM item ORDER BY n").rows_max(usize::MAX).run().await.unwrap();
    answer.rows.iter().map(|row| if let Value::Integer(n) = row[0] { n } else { panic!("{row:?}") }).collect()
}

/// The state of what is served, or else of what is being built.
async fn state(projection: &ProjectionHandle) -> ProjectionState {
    let status = projection.status().await.unwrap();
    status.serving.or(status.building).unwrap().state.unwrap()
}

async fn failure(projection: &ProjectionHandle) -> ProjectionFailure {
    let mut found = None;
    until("it fails", async || {
        if let ProjectionState::Failed(failure) = state(projection).await {
            found = Some(failure);
        }
        found.is_some()
    })
    .await;
    found.unwrap()
}

/// A failure that comes after the one at this version.
async fn next_failure(projection: &ProjectionHandle, version: u64) -> ProjectionFailure {
    let mut found = None;
    until("it fails again", async || {
        found = Some(failure(projection).await);
        found.as_ref().is_some_and(|found| found.version != Some(Version(version)))
    })
    .await;
    found.unwrap()
}

// ---- events that cannot be applied

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_projection_stands_still_before_what_it_cannot_apply_and_others_go_on() {
    let dir = directory();
    let mut kuma = start(dir.path()).await;
    let mut next = 0;
    for round in 0..30 {
        next = append(&kuma, &format!("item-{}", round % 5), next, &["Made", "Made"]).await;
    }
    let before = next;
    // Two in one commit, and what is around them.
    next = append(&kuma, "bad", next, &["Made", "Poison", "Made", "Panic", "Made"]).await;
    for name in ["Unspeakable", "Rollback"] {
        next = append(&kuma, "bad", next, &[name]).await;
        next = append(&kuma, "good", next, &["Made"]).await;
    }
    let hash = kuma.raw("item", "bad").hash().unwrap();

    for live in [false, true] {
        let name = if live { "live" } else { "late" };
        let made = items(name, 1, false);
        let others = items("others", 1, true);
        let projection = kuma.projection(made.clone()).await.unwrap();
        let other = kuma.projection(others).await.unwrap();
        let mut failed = failure(&projection).await;
        let mut bad = Vec::new();
        for (version, what) in [(2, "poison"), (4, "panicked"), (6, "panicked"), (7, "rolled")] {
            assert_eq!((failed.shard, failed.entity, failed.version), (0, Some(hash), Some(Version(version))));
            assert!(failed.error.contains(what) && failed.slot.is_some() && failed.seq.is_some(), "{failed:?}");
            let file = rusqlite::Connection::open(dir.path().join(format!("projections/{name}/v1-1.db"))).unwrap();
            let (count, newest): (i64, i64) =
                file.query_row("SELECT count(*), max(n) FROM item", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
            // All commits before, and nothing of this one.
            let first = before + [0, 0, 5, 7][bad.len()];
            assert_eq!((newest, count), (first - 1, first - bad.iter().filter(|n| **n < first).count() as i64));
            drop(file);
            match (live, version) {
                // Skipped.
                (false, _) => {
                    bad.push(before + [1, 3, 5, 7][bad.len()]);
                    projection.skip().await.unwrap();
                }
                // It fails in the same place however often it is tried, and when it is opened again.
                (true, 2) => {
                    projection.retry().await.unwrap();
                    assert_eq!(failure(&projection).await, failed);
                    assert!(matches!(projection.query("SELECT 1").run().await, Err(ProjectionError::NotReady { .. })));
                    kuma.shutdown().await;
                    drop(kuma);
                    kuma = start(dir.path()).await;
                    let made = items(name, 1, false);
                    let projection = kuma.projection(made.clone()).await.unwrap();
                    assert_eq!(failure(&projection).await, failed);
                    made.mended.store(true, SeqCst);
                    projection.retry().await.unwrap();
                    projection.caught_up(SOON).await.unwrap();
                    assert_eq!(rows(&projection).await, (0..next).collect::<Vec<_>>());
                    assert!(matches!(projection.retry().await, Err(ProjectionError::NotFailed { .. })));
                    assert!(matches!(projection.skip().await, Err(ProjectionError::NotFailed { .. })));
                    assert!(projection.skipped().await.unwrap().is_empty());
                    break;
                }
                _ => unreachable!(),
            }
            if version < 7 {
                failed = next_failure(&projection, version).await;
            }
        }
        if !live {
            projection.caught_up(SOON).await.unwrap();
            let expected: Vec<i64> = (0..next).filter(|n| !bad.contains(n)).collect();
            assert_eq!(rows(&projection).await, expected);
            let skipped = projection.skipped().await.unwrap();
            let versions: Vec<u64> = skipped.iter().map(|skipped| skipped.version.unwrap()).collect();
            assert_eq!(versions, [2, 4, 6, 7]);
            assert!(skipped.iter().all(|skipped| skipped.entity.as_deref() == Some(&*hash.to_hex())));
            other.caught_up(SOON).await.unwrap();
            assert_eq!(rows(&other).await, (0..next).collect::<Vec<_>>());
        }
    }
    kuma.shutdown().await;
}

/// A model that could not apply one event is like the others to an erasure: what could not be applied may go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_takes_away_what_a_projection_fails_at() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let mut next = append(&kuma, "good", 0, &["Made"]).await;
    next = append(&kuma, "bad", next, &["Made"]).await;
    next = append(&kuma, "bad", next, &["Poison", "Poison"]).await;
    next = append(&kuma, "good", next, &["Made"]).await;
    let projection = kuma.projection(items("items", 1, false)).await.unwrap();
    failure(&projection).await;
    projection.skip().await.unwrap();
    next_failure(&projection, 2).await;
    let receipt = kuma.raw("item", "bad").erase(Reason::new("a test")).await.unwrap();
    assert!(receipt.receipt.stores.iter().any(|store| store.store == "projections/items/v1-1.db"), "{receipt}");
    projection.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&projection).await, [0, next - 1]);
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_cannot_be_read_stops_a_projection_until_it_is_told_to_pass_it() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let mut next = 0;
    for round in 0..20 {
        next = append(&kuma, &format!("item-{}", round % 3), next, &["Made"]).await;
    }
    for _ in 0..5 {
        kuma.entity::<Probe>("probe").append_all(TestAppend { id: 1, events: 2, bytes: 3 }.events()).await.unwrap();
    }
    let hash = kuma.raw("item", "item-1").hash().unwrap();
    kuma.shutdown().await;
    drop(kuma);
    let damage = |positions: &[i64]| {
        let file = rusqlite::Connection::open(dir.path().join("shard-000.db")).unwrap();
        for position in positions {
            let damage = "UPDATE log SET body = zeroblob(length(body)) WHERE position = ?";
            assert_eq!(file.execute(damage, [position]).unwrap(), 1);
        }
    };
    damage(&[8, 9]);
    let kuma = start(dir.path()).await;
    let projection = kuma.projection(items("items", 1, true)).await.unwrap();
    let tally = kuma.projection(Tally { version: 1 }).await.unwrap();
    tally.caught_up(SOON).await.unwrap();
    assert_eq!(count(&tally).await.unwrap(), 10, "it is of another kind, and not concerned");
    let failed = failure(&projection).await;
    assert_eq!((failed.shard, failed.position, failed.entity), (0, 8, Some(hash)));
    projection.skip().await.unwrap();
    until("it fails at the next one", async || failure(&projection).await.position == 9).await;
    projection.skip().await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&projection).await, (0..20).filter(|n| ![7, 8].contains(n)).collect::<Vec<_>>());
    let skipped = projection.skipped().await.unwrap();
    assert_eq!(skipped.iter().map(|skipped| skipped.position).collect::<Vec<_>>(), [8, 9]);
    kuma.shutdown().await;
}

// ---- told to stand still

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_lasts_until_it_is_ended() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let mut next = append(&kuma, "one", 0, &["Made", "Made"]).await;
    let projection = kuma.projection(items("items", 1, false)).await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    projection.pause().await.unwrap();
    next = append(&kuma, "one", next, &["Made"]).await;
    assert_eq!(state(&projection).await, ProjectionState::Paused);
    kuma.shutdown().await;
    drop(kuma);
    let kuma = start(dir.path()).await;
    let projection = kuma.projection(items("items", 1, false)).await.unwrap();
    // Another one that is fed says when there was something to apply.
    let other = kuma.projection(items("other", 1, true)).await.unwrap();
    other.caught_up(SOON).await.unwrap();
    assert_eq!(state(&projection).await, ProjectionState::Paused);
    assert_eq!(rows(&projection).await, [0, 1]);
    assert_eq!(projection.status().await.unwrap().commits_behind, 1);
    projection.resume().await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&projection).await, [0, 1, 2]);
    // Whatever it was doing before.
    append(&kuma, "one", next, &["Poison"]).await;
    let failed = failure(&projection).await;
    projection.pause().await.unwrap();
    assert_eq!(state(&projection).await, ProjectionState::Paused);
    projection.resume().await.unwrap();
    assert_eq!(failure(&projection).await, failed);
    projection.skip().await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_for_a_model_is_answered_when_another_one_takes_its_place() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let next = append(&kuma, "one", 0, &["Made"]).await;
    let projection = kuma.projection(items("items", 1, true)).await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    projection.pause().await.unwrap();
    append(&kuma, "one", next, &["Made"]).await;
    // It has looked at what is served, and waits for that.
    let mut waiting = std::pin::pin!(projection.caught_up(SOON));
    assert!(futures_util::poll!(&mut waiting).is_pending());
    projection.rebuild().await.unwrap();
    until("another one is served", async || {
        projection.status().await.unwrap().serving.unwrap().model.to_string() == "v1-2"
    })
    .await;
    waiting.await.unwrap();
    assert_eq!(rows(&projection).await, [0, 1]);
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_projection_that_is_dropped_leaves_no_file_and_can_be_made_again() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    append(&kuma, "one", 0, &["Made", "Made"]).await;
    for registered in [true, false] {
        let projection = kuma.projection(items("items", 2, true)).await.unwrap();
        projection.caught_up(SOON).await.unwrap();
        assert_eq!(rows(&projection).await, [0, 1]);
        let kuma = if registered {
            kuma.clone()
        } else {
            // It is known by its files alone.
            kuma.shutdown().await;
            start(dir.path()).await
        };
        kuma.drop_projection("items").await.unwrap();
        assert!(!dir.path().join("projections/items").exists());
        assert!(matches!(kuma.drop_projection("items").await, Err(ProjectionError::Unknown { .. })));
        assert!(matches!(kuma.find_projection("items").map(drop), Err(ProjectionError::Unknown { .. })));
        assert!(projection.query("SELECT n FROM item").run().await.is_err());
        if !registered {
            kuma.shutdown().await;
        }
    }
}

// ---- models that take each other's place

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_was_gone_back_to_stays_until_there_is_a_newer_version() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let mut next = append(&kuma, "one", 0, &["Made"]).await;
    let projection = kuma.projection(items("items", 1, true)).await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    assert!(matches!(projection.rollback().await, Err(ProjectionError::NoRollback { .. })));
    projection.rebuild().await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    next = append(&kuma, "one", next, &["Made"]).await;
    projection.rollback().await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&projection).await, [0, 1]);
    kuma.shutdown().await;
    drop(kuma);
    let serving = async |projection: &ProjectionHandle| {
        let status = projection.status().await.unwrap();
        (status.serving.unwrap().model.to_string(), status.previous.map(|previous| previous.to_string()))
    };
    let kuma = start(dir.path()).await;
    let projection = kuma.projection(items("items", 1, true)).await.unwrap();
    next = append(&kuma, "one", next, &["Made"]).await;
    projection.caught_up(SOON).await.unwrap();
    assert_eq!(serving(&projection).await, ("v1-1".to_owned(), Some("v1-2".to_owned())));
    assert_eq!(rows(&projection).await, [0, 1, 2]);

    // A newer version; then code of the earlier one is deployed again, and its model catches up.
    for (version, expected) in [(2, ("v2-1", "v1-1")), (1, ("v1-1", "v2-1")), (2, ("v2-1", "v1-1"))] {
        let projection = kuma.projection(items("items", version, true)).await.unwrap();
        next = append(&kuma, "one", next, &["Made"]).await;
        projection.caught_up(SOON).await.unwrap();
        assert_eq!(serving(&projection).await, (expected.0.to_owned(), Some(expected.1.to_owned())));
        assert_eq!(rows(&projection).await, (0..next).collect::<Vec<_>>());
    }
    // Of a projection in Rust there is no other code than what is registered.
    assert!(matches!(projection.rollback().await, Err(ProjectionError::NoRollback { .. })));
    kuma.shutdown().await;
}

/// A reader that asks in a loop, while models are built and take each other's place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_never_see_a_model_that_is_not_whole_nor_one_that_goes_back() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(2)).await.unwrap();
    let first = TestAppend { id: u64::MAX, events: 1, bytes: 20 };
    kuma.entity::<Probe>("probe-0").append_all(first.events()).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4_u64)
        .map(|writer| {
            let (kuma, done) = (kuma.clone(), done.clone());
            tokio::spawn(async move {
                for number in 0.. {
                    if done.load(SeqCst) {
                        return;
                    }
                    let append = TestAppend { id: writer << 32 | number, events: 1 + (number % 5) as u32, bytes: 20 };
                    let id = format!("probe-{}", (writer + number) % 30);
                    kuma.entity::<Probe>(id).append_all(append.events()).await.unwrap();
                }
            })
        })
        .collect();
    let tally = kuma.projection(Tally { version: 1 }).await.unwrap();
    tally.caught_up(SOON).await.unwrap();
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let (tally, done) = (tally.clone(), done.clone());
            tokio::spawn(async move {
                let (mut newest, mut models, mut queries) = (0, BTreeSet::new(), 0_u64);
                while !done.load(SeqCst) {
                    let select =
                        "SELECT events, (SELECT count(*) FROM seen), (SELECT sum(events) FROM tally) FROM total";
                    let answer = tally.query(select).run().await.unwrap();
                    let [Value::Integer(total), Value::Integer(seen), Value::Integer(sum)] = answer.rows[0][..] else {
                        panic!("{answer:?}")
                    };
                    assert!(total == seen && seen == sum, "{answer:?}");
                    assert!(total >= newest && total > 0, "{total} of {:?} after {newest}", answer.as_of);
                    newest = total;
                    queries += 1;
                    models.insert(answer.as_of.model);
                }
                (models.len(), queries)
            })
        })
        .collect();
    for round in 0..24 {
        match round % 4 {
            3 => {
                let version = 2 + round / 4;
                kuma.projection(Tally { version }).await.unwrap();
            }
            _ => tally.rebuild().await.unwrap(),
        }
        tally.caught_up(SOON).await.unwrap();
    }
    done.store(true, SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
    for reader in readers {
        let (models, queries) = reader.await.unwrap();
        println!("{queries} queries were answered by {models} models");
        assert!(models > 3);
    }
    tally.caught_up(SOON).await.unwrap();
    assert_eq!(Tallied::of_model(&tally).await, Tallied::of_log(&kuma, 7).await);
    kuma.shutdown().await;
}

// ---- files

fn model_file(path: &Path, build: &str) -> PathBuf {
    path.join(format!("projections/items/{build}.db"))
}

fn garbage(path: &Path) {
    std::fs::write(path, vec![0xee; 20_000]).unwrap();
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", path.display()));
    }
}

async fn is_ready(projection: &ProjectionHandle) -> bool {
    match projection.query("SELECT n FROM item").run().await {
        Ok(_) => true,
        Err(ProjectionError::NotReady { .. }) => false,
        Err(error) => panic!("{error:?}"),
    }
}

/// A file that is damaged, or gone, is built again, under the same name perhaps. Until it is whole it is not served, also when the store is opened
/// again in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_is_built_in_the_place_of_a_damaged_one_is_served_when_it_is_whole() {
    for how in ["damaged", "gone", "damaged, and deleted by an erasure"] {
        let dir = directory();
        let kuma = start(dir.path()).await;
        let next = append(&kuma, "one", 0, &["Made", "Made"]).await;
        append(&kuma, "two", next, &["Poison"]).await;
        append(&kuma, "victim", next + 1, &["Made"]).await;
        let projection = kuma.projection(items("items", 1, true)).await.unwrap();
        projection.caught_up(SOON).await.unwrap();
        kuma.shutdown().await;
        drop(kuma);
        match how {
            "gone" => std::fs::remove_file(model_file(dir.path(), "v1-1")).unwrap(),
            _ => garbage(&model_file(dir.path(), "v1-1")),
        }
        if how.ends_with("erasure") {
            let kuma = start(dir.path()).await;
            kuma.raw("item", "victim").erase(Reason::new("a test")).await.unwrap();
            assert!(!model_file(dir.path(), "v1-1").exists());
            kuma.shutdown().await;
        }
        for round in 0..3 {
            let kuma = start(dir.path()).await;
            let definition = items("items", 1, false);
            let projection = kuma.projection(definition.clone()).await.unwrap();
            // Half of it is there.
            assert!(!is_ready(&projection).await, "{how}, round {round}: half of a model is served");
            failure(&projection).await;
            assert!(!is_ready(&projection).await, "{how}, round {round}: half of a model is served");
            if round == 2 {
                definition.mended.store(true, SeqCst);
                projection.retry().await.unwrap();
                projection.caught_up(SOON).await.unwrap();
                assert_eq!(rows(&projection).await.len(), if how.ends_with("erasure") { 3 } else { 4 }, "{how}");
            }
            kuma.shutdown().await;
        }
    }
}

/// It was to stay although there was a newer one. It is gone, and so there is nothing to stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_was_gone_back_to_is_built_again_when_it_is_lost() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    append(&kuma, "one", 0, &["Made", "Made"]).await;
    let projection = kuma.projection(items("items", 1, true)).await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    projection.rebuild().await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    projection.rollback().await.unwrap();
    kuma.shutdown().await;
    drop(kuma);
    std::fs::remove_file(model_file(dir.path(), "v1-1")).unwrap();
    let kuma = start(dir.path()).await;
    let projection = kuma.projection(items("items", 1, true)).await.unwrap();
    projection.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&projection).await, [0, 1]);
    kuma.shutdown().await;
}

/// The model to go back to is built again, because it is damaged. Until it is whole it is no model to go back to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_of_a_model_is_not_gone_back_to() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let next = append(&kuma, "one", 0, &["Made", "Made"]).await;
    append(&kuma, "two", next, &["Poison"]).await;
    for version in 1..=2 {
        let projection = kuma.projection(items("items", version, true)).await.unwrap();
        projection.caught_up(SOON).await.unwrap();
    }
    kuma.shutdown().await;
    drop(kuma);
    garbage(&model_file(dir.path(), "v1-1"));
    for round in 0..2 {
        let kuma = start(dir.path()).await;
        let projection = kuma.projection(items("items", 1, false)).await.unwrap();
        until("it fails", async || {
            let building = projection.status().await.unwrap().building;
            matches!(building.unwrap().state, Some(ProjectionState::Failed(_)))
        })
        .await;
        assert_eq!(rows(&projection).await, [0, 1, 2]);
        let back = projection.rollback().await;
        assert!(matches!(back, Err(ProjectionError::NoRollback { .. })), "round {round}: {back:?}");
        assert_eq!(rows(&projection).await, [0, 1, 2], "round {round}");
        kuma.shutdown().await;
    }
}

/// All files of the data directory that hold any of these bytes.
fn holders(path: &Path, needles: &[&str]) -> Vec<String> {
    // By another process, for the sake of SQLite's locks.
    let copy = directory();
    let copied = std::process::Command::new("cp").arg("-r").arg(path).arg(copy.path().join("data")).status().unwrap();
    assert!(copied.success());
    let (mut holders, mut left) = (Vec::new(), vec![copy.path().join("data")]);
    while let Some(next) = left.pop() {
        for path in std::fs::read_dir(next).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                left.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            let holds = |needle: &&&str| bytes.windows(needle.len()).any(|window| window == needle.as_bytes());
            if let Some(needle) = needles.iter().find(holds) {
                holders.push(format!("{} holds {needle}", path.strip_prefix(copy.path()).unwrap().display()));
            }
        }
    }
    holders
}

/// One that is fed, one that failed, one that is paused, one that nobody registered, one that is kept for going back, one that is left over and
/// damaged, one that is empty: of none of them a receipt waits, and in none of them anything is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_state_a_projection_is_in_it_is_purged_before_there_is_a_receipt() {
    const ID: &str = "needle-in-the-id";
    const NOTE: &str = "needle-in-the-payload";
    const OTHERS: &str = "of-somebody-else";
    let dir = directory();
    let kuma = start(dir.path()).await;
    let noted = |name: &str, n: i64, note: &str| {
        NewEvent::json(name, &json!({ "n": n, "note": format!("{note} {n}") })).unwrap()
    };
    for n in 0..200 {
        let (id, note) = if n % 7 == 3 { (ID.to_owned(), NOTE) } else { (format!("other-{}", n % 20), OTHERS) };
        kuma.raw("item", &id).append(noted("Made", n, note)).await.unwrap();
    }
    for name in ["live", "failed", "paused", "unknown", "raised", "damaged", "torn", "empty"] {
        kuma.projection(items(name, 1, false)).await.unwrap().caught_up(SOON).await.unwrap();
    }
    kuma.projection(items("raised", 2, false)).await.unwrap().caught_up(SOON).await.unwrap();
    assert!(!holders(dir.path(), &[ID]).is_empty() && !holders(dir.path(), &[NOTE]).is_empty());
    kuma.shutdown().await;
    drop(kuma);
    let of = |name: &str| dir.path().join(format!("projections/{name}/v1-1.db"));
    // The bytes are there, and it is no database.
    let mut bytes = std::fs::read(of("damaged")).unwrap();
    bytes[..100].fill(0xee);
    std::fs::write(of("damaged"), &bytes).unwrap();
    // It is one, for the most part.
    let mut bytes = std::fs::read(of("torn")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle / 4096 * 4096..].chunks_mut(4096).for_each(|page| page[..32].fill(0xee));
    std::fs::write(of("torn"), &bytes).unwrap();
    std::fs::write(of("empty"), b"").unwrap();

    let kuma = start(dir.path()).await;
    let live = kuma.projection(items("live", 1, true)).await.unwrap();
    kuma.projection(items("raised", 2, true)).await.unwrap();
    let failed = kuma.projection(items("failed", 1, false)).await.unwrap();
    let paused = kuma.projection(items("paused", 1, true)).await.unwrap();
    paused.pause().await.unwrap();
    kuma.raw("item", "other-1").append(noted("Poison", 1_000, OTHERS)).await.unwrap();
    failure(&failed).await;
    kuma.raw("item", ID).append(noted("Made", 1_001, NOTE)).await.unwrap();
    live.caught_up(SOON).await.unwrap();
    let receipt: Receipt =
        tokio::time::timeout(SOON, kuma.raw("item", ID).erase(Reason::new("a test"))).await.unwrap().unwrap();
    let holders_of = || holders(dir.path(), &[ID, NOTE]);
    assert!(holders_of().is_empty(), "{:?}\n{receipt}", holders_of());
    let stores: BTreeSet<&str> = receipt.receipt.stores.iter().map(|store| store.store.as_str()).collect();
    for name in ["live", "failed", "paused", "unknown", "damaged", "torn", "empty"] {
        assert!(stores.contains(&*format!("projections/{name}/v1-1.db")), "{name}: {receipt}");
    }
    assert!(stores.contains("projections/raised/v1-1.db") && stores.contains("projections/raised/v2-1.db"));
    assert!(kuma.raw("item", ID).verify_receipt(&receipt).await.is_clean());
    // What is left is whole.
    live.caught_up(SOON).await.unwrap();
    let expected: Vec<i64> = (0..200).filter(|n| n % 7 != 3).chain([1_000]).collect();
    assert_eq!(rows(&live).await, expected);
    paused.resume().await.unwrap();
    paused.caught_up(SOON).await.unwrap();
    assert_eq!(rows(&paused).await, expected);
    for name in ["unknown", "damaged", "torn", "empty"] {
        let projection = kuma.projection(items(name, 1, true)).await.unwrap();
        projection.caught_up(SOON).await.unwrap();
        assert_eq!(rows(&projection).await, expected, "{name}");
    }
    assert_eq!(rows(&failed).await, expected[..expected.len() - 1]);
    kuma.shutdown().await;
    assert!(holders_of().is_empty(), "{:?}", holders_of());
    // Payloads of others are there, so that looking for them would have found them.
    assert!(!holders(dir.path(), &[OTHERS]).is_empty());
}

// ---- code that panics elsewhere

/// Panics where it is told to.
#[derive(Clone)]
struct Rude(&'static str);

impl Projection for Rude {
    fn name(&self) -> &str {
        "rude"
    }

    fn version(&self) -> u32 {
        1
    }

    fn filter(&self) -> Filter {
        assert!(self.0 != "filter", "as told");
        Filter::kind("item")
    }

    fn erasure(&self) -> ErasureRule {
        ErasureRule::none("it holds nothing")
    }

    fn migrations(&self) -> Vec<String> {
        assert!(self.0 != "migrations", "as told");
        Vec::new()
    }

    fn apply(&self, _: &Transaction<'_>, _: &StoredEvent) -> Result<(), ApplyError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_definition_that_panics_is_refused_and_harms_nobody() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    append(&kuma, "one", 0, &["Made"]).await;
    let other = kuma.projection(items("items", 1, true)).await.unwrap();
    for place in ["filter", "migrations"] {
        let refused = tokio::time::timeout(SOON, kuma.projection(Rude(place))).await.unwrap();
        assert!(refused.is_err(), "{place}");
    }
    other.caught_up(SOON).await.unwrap();
    tokio::time::timeout(SOON, kuma.raw("item", "one").erase(Reason::new("a test"))).await.unwrap().unwrap();
    assert!(rows(&other).await.is_empty());
    // Once it is mended it is taken.
    kuma.projection(Rude("")).await.unwrap().caught_up(SOON).await.unwrap();
    kuma.shutdown().await;
}
