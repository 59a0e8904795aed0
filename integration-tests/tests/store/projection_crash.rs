//! Exactly once under kill -9: a process that appends and feeds a projection is killed at random instants, while the model catches up, while it
//! follows, while it is built anew and while it takes another one's place. What is found afterwards is what a fold of the log says, is never
//! less than what a reader saw before, and never half of a model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::common::directory;
use integration_tests::{
    Probe, TestAppend, options, seed,
    tally::{Tallied, Tally, count},
};
use kuma_core::{Kuma, ProjectionError};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const SOON: Duration = Duration::from_secs(60);

/// How many kills; `KUMA_KILLS` says otherwise.
fn kills() -> u64 {
    std::env::var("KUMA_KILLS").map_or(50, |kills| kills.parse().unwrap())
}

fn models(path: &Path) -> PathBuf {
    path.join("projections/tally")
}

/// What the child said before it was killed.
#[derive(Debug, Default)]
struct Said {
    registered: bool,
    /// What a reader saw last.
    seen: Option<i64>,
    refused: u64,
    answered: u64,
}

struct Life {
    number: u64,
    version: u32,
    rebuilds: bool,
    writers: u64,
    /// From its beginning, or from when the projection was registered.
    from_beginning: bool,
    after: Duration,
}

/// Runs a child, and kills it.
fn live(path: &Path, life: &Life) -> Said {
    let Life { number, version, rebuilds, writers, from_beginning, after } = life;
    let mut child = Command::new(env!("CARGO_BIN_EXE_projection_child"))
        .arg(path)
        .args([number.to_string(), version.to_string(), u8::from(*rebuilds).to_string(), writers.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let began = std::thread::spawn({
        let (sender, began) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let mut said = Said::default();
            for line in lines {
                match *line.unwrap().split(' ').collect::<Vec<_>>() {
                    ["R"] => {
                        said.registered = true;
                        let _ = sender.send(());
                    }
                    ["S", count] => {
                        said.answered += 1;
                        said.seen = Some(count.parse().unwrap());
                    }
                    ["N"] => said.refused += 1,
                    // Cut short by its death.
                    _ => {}
                }
            }
            said
        });
        let from_beginning = *from_beginning;
        move || {
            if !from_beginning {
                // It fails if the child ended before.
                let _ = began.recv_timeout(SOON);
            }
            reader
        }
    });
    let reader = began.join().unwrap();
    // The instant is the test's input; nothing is waited for.
    std::thread::sleep(*after);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(9), "{status}: the child failed before it was killed");
    reader.join().unwrap()
}

/// What `serving.json` names.
fn served(path: &Path) -> (Option<String>, Option<String>) {
    let Ok(text) = std::fs::read_to_string(models(path).join("serving.json")) else { return (None, None) };
    let served: serde_json::Value = serde_json::from_str(&text).expect("it is replaced as a whole");
    let name = |which: &str| served[which].as_str().map(str::to_owned);
    (name("serving"), name("previous"))
}

fn files(path: &Path) -> BTreeSet<String> {
    let Ok(entries) = std::fs::read_dir(models(path)) else { return BTreeSet::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[derive(Debug, Default)]
struct Sum {
    kills: u64,
    while_building_first: u64,
    with_leftovers: u64,
    swaps: u64,
    checks: u64,
    answered: u64,
    events: i64,
}

/// Looks at what a child left: without opening it, and after.
async fn look(path: &Path, context: &str, version: u32, seen: i64, tally: &mut Sum) -> i64 {
    let (serving, previous) = served(path);
    let left = files(path);
    for named in serving.iter().chain(&previous) {
        assert!(left.contains(&format!("{named}.db")), "{context}: {named} is named and is not there, {left:?}");
    }
    let kuma = Kuma::start(options(path)).await.unwrap();
    let handle = kuma.projection(Tally { version }).await.unwrap();
    match count(&handle).await {
        Ok(count) => {
            assert!(serving.is_some(), "{context}: nothing was served, and {count} events are");
            assert!(count >= seen, "{context}: {count} events are served, a reader saw {seen}");
        }
        Err(ProjectionError::NotReady { .. }) => {
            // It may have been served in the meantime.
            assert!(serving.is_none() && seen == 0, "{context}: {serving:?} was served, with {seen} events");
        }
        Err(error) => panic!("{context}: {error:?}"),
    }
    handle.caught_up(SOON).await.unwrap_or_else(|error| panic!("{context}: {error}"));
    let expected = Tallied::of_log(&kuma, version).await;
    let found = Tallied::of_model(&handle).await;
    assert_eq!(found.hash(), expected.hash(), "{context}: {} events, expected {}", found.total, expected.total);
    assert_eq!(found, expected, "{context}");
    let status = handle.status().await.unwrap();
    assert_eq!((status.serving.as_ref().unwrap().model.version, status.building), (version, None), "{context}");
    kuma.shutdown().await;
    // The previous one is not opened: its log stays beside it.
    let named: Vec<String> = status
        .serving
        .iter()
        .map(|serving| serving.model)
        .chain(status.previous)
        .map(|model| format!("{model}.db"))
        .collect();
    let is_left_over =
        |file: &String| file != "serving.json" && !named.iter().any(|named| file.starts_with(named.as_str()));
    let left_over: Vec<String> = files(path).into_iter().filter(is_left_over).collect();
    assert!(left_over.is_empty(), "{context}: {left_over:?} beside {named:?}; before it was opened {left:?}");
    assert_eq!(served(path).0, status.serving.map(|serving| serving.model.to_string()), "{context}");
    tally.checks += 1;
    tally.events = expected.total;
    expected.total
}

/// Fills a store that has no projection yet.
async fn fill(path: &Path, commits: u64) {
    let kuma = Kuma::start(options(path)).await.unwrap();
    let appends = (0..commits).map(|id| {
        let append = TestAppend { id, events: 1 + (id % 5) as u32, bytes: 40 };
        let handle = kuma.entity::<Probe>(format!("entity-{}", id % 40));
        async move { handle.append_all(append.events()).await.unwrap() }
    });
    futures_util::stream::StreamExt::for_each_concurrent(futures_util::stream::iter(appends), 128, async |_| ()).await;
    kuma.shutdown().await;
}

async fn campaign(seed: u64, kills: u64, prefilled: u64, rebuilds: bool) -> Sum {
    let mut random = StdRng::seed_from_u64(seed);
    let dir = directory();
    let path = dir.path().to_owned();
    fill(&path, prefilled).await;
    let (mut version, mut seen, mut tally) = (1, 0, Sum::default());
    for number in 1..=kills {
        let before = served(&path);
        if random.random_range(0..3) == 0 {
            // Now and then back to an earlier one.
            version = if version > 1 && random.random_range(0..4) == 0 { version - 1 } else { version + 1 };
        }
        let life = Life {
            number,
            version,
            rebuilds: rebuilds && random.random_range(0..3) > 0,
            writers: if random.random_range(0..5) == 0 { 0 } else { 4 },
            from_beginning: random.random_range(0..6) == 0,
            after: Duration::from_millis(random.random_range(0..250)),
        };
        let context = format!(
            "KUMA_SEED={seed}, life {number}, version {version}, rebuilds {}, writers {}, killed {:?} after its {}",
            life.rebuilds,
            life.writers,
            life.after,
            if life.from_beginning { "beginning" } else { "registration" }
        );
        let lived = path.clone();
        let said = tokio::task::spawn_blocking(move || live(&lived, &life)).await.unwrap();
        tally.kills += 1;
        tally.answered += said.answered;
        // The first answer of a life is not less than the last one of the life before: asserted below, of the last ones.
        assert!(said.seen.is_none_or(|now| now >= seen), "{context}: {said:?}, a reader saw {seen} before");
        assert!(said.refused == 0 || before.0.is_none(), "{context}: {said:?} although {before:?} was served");
        seen = said.seen.unwrap_or(seen);
        let (serving, previous) = served(&path);
        tally.swaps += u64::from(serving != before.0);
        tally.while_building_first += u64::from(serving.is_none());
        let named: Vec<String> = serving.iter().chain(&previous).map(|name| format!("{name}.db")).collect();
        tally.with_leftovers +=
            u64::from(files(&path).iter().any(|file| file.ends_with(".db") && !named.contains(file)));
        if number == kills || random.random_range(0..2) == 0 {
            seen = look(&path, &context, version, seen, &mut tally).await;
        }
    }
    tally
}

async fn run(name: &str, kills: u64) {
    let seed = seed(name);
    let since = Instant::now();
    let (live, beside) = tokio::join!(campaign(seed, kills / 2, 0, false), async {
        campaign(seed + 1, kills - kills / 2, 3_000, true).await
    });
    println!("live: {live:?}\ncatching up, rebuilt and raised: {beside:?}\nin {:?}", since.elapsed());
    assert_eq!(live.kills + beside.kills, kills);
    assert!(live.checks > 0 && beside.checks > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_is_killed_at_any_instant_has_each_event_once() {
    run("projection_crash", kills()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a longer run of the one above"]
async fn a_model_that_is_killed_a_thousand_times_has_each_event_once() {
    run("projection_crash", 1_000).await;
}
