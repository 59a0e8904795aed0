//! Whoever follows a store forgets with it: what is erased is not handed out any more, that it is erased is said after its last event and before
//! the first one of its next life, and read models are as if the erased had never been.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use common::{directory, until};
use futures_util::future::join_all;
use integration_tests::{
    Probe, TestAppend, options, seed,
    tally::{Tallied, Tally},
};
use kuma_core::{
    Checkpoint, Delivery, EntityHash, EraseError, Filter, Kuma, NewEvent, Options, ProjectionHandle, ProjectionState,
    Reason, Start, Subscription, Version,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);

async fn start(path: &Path) -> Kuma {
    Kuma::start(options(path)).await.unwrap()
}

fn reason() -> Reason {
    Reason::new("a test")
}

async fn place(kuma: &Kuma, id: &str, count: u64) {
    let events = (0..count).map(|n| NewEvent::json("Placed", &json!({ "n": n })).unwrap());
    kuma.raw("order", id).append_all(events).await.unwrap();
}

/// What a subscriber was told of each entity, judged as it comes.
#[derive(Default)]
struct Followed {
    /// Of each entity: the life that was erased last, and the newest life and version of which there was an event.
    entities: HashMap<EntityHash, (u32, u32, u64)>,
    erased: u64,
    events: u64,
}

impl Followed {
    #[track_caller]
    fn take(&mut self, who: &str, delivery: &Delivery) {
        match delivery {
            Delivery::Event(stored) => {
                self.events += 1;
                let (erased, life, version) = self.entities.entry(stored.entity).or_default();
                let (now, at) = (stored.life, stored.event.version.0);
                assert!(now > *erased, "{who}: {} has an event of life {now}, life {erased} was erased", stored.id);
                if now > *life {
                    // The ones before were erased first, where there was any sign of them.
                    assert!(
                        *life == 0 || *erased >= now - 1,
                        "{who}: life {now} of {} begins, {erased} is erased",
                        stored.id
                    );
                    (*life, *version) = (now, 0);
                }
                assert!(now == *life && at > *version, "{who}: version {at} after {version} of life {now} and {life}");
                *version = at;
            }
            Delivery::Erased(told) => {
                self.erased += 1;
                let entry = self.entities.entry(told.entity).or_default();
                let life = told.life.expect("it is known");
                assert!(life > entry.0, "{who}: life {life} is erased, {} was before", entry.0);
                entry.0 = life;
            }
            Delivery::Unreadable(commit) => panic!("{who}: {commit:?}"),
        }
    }
}

// ---- what was read ahead

/// It has read ahead, and is in the middle of a commit of one who is erased then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_ahead_of_the_erased_is_not_handed_out() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1)).await.unwrap();
    place(&kuma, "first", 9).await;
    for round in 0..30 {
        for id in 0..10 {
            place(&kuma, &format!("order-{id}"), 1 + (round + id) % 4).await;
        }
    }
    for erase_first in [false, true] {
        let mut events = kuma.subscribe(Filter::all()).open().await.unwrap();
        let mut followed = Followed::default();
        if !erase_first {
            for _ in 0..4 {
                followed.take("stalled", &events.next().await.unwrap());
            }
        }
        let hash = |id: &str| kuma.raw("order", id).hash().unwrap();
        let victims: Vec<String> = match erase_first {
            false => vec!["first".into(), "order-3".into()],
            true => vec!["order-4".into(), "order-5".into(), "order-6".into()],
        };
        let handles = victims.iter().map(|id| kuma.raw("order", id)).collect::<Vec<_>>();
        let done = kuma.erase_many(handles, reason(), |_, outcome| assert!(outcome.is_ok())).await.unwrap();
        assert_eq!(done.erased, victims.len() as u64);
        let (mut told, mut after) = (BTreeSet::new(), BTreeSet::new());
        while let Some(delivery) = events.next_of_now().await.unwrap() {
            followed.take("stalled", &delivery);
            match delivery {
                Delivery::Erased(erased) => assert!(told.insert(erased.entity)),
                Delivery::Event(stored) => drop(after.insert(stored.entity)),
                Delivery::Unreadable(_) => {}
            }
        }
        let erased: BTreeSet<EntityHash> = victims.iter().map(|id| hash(id)).collect();
        assert_eq!(told, erased);
        assert!(after.is_disjoint(&erased));
        assert_eq!(after.len(), if erase_first { 6 } else { 9 });
    }
    kuma.shutdown().await;
}

// ---- many lives

async fn follow(kuma: Kuma, name: String, mut events: Subscription, seed: u64, done: Arc<AtomicBool>) -> Followed {
    let mut random = StdRng::seed_from_u64(seed);
    let mut followed = Followed::default();
    let (slow, reconnects) = (seed % 3 == 1, seed % 3 == 2);
    loop {
        let next = match done.load(SeqCst) {
            true => match events.next_of_now().await.unwrap() {
                Some(delivery) => delivery,
                None => return followed,
            },
            false => match tokio::time::timeout(Duration::from_millis(random.random_range(0..30)), events.next()).await
            {
                Ok(next) => next.unwrap(),
                Err(_) => continue,
            },
        };
        followed.take(&name, &next);
        if slow && random.random_range(0..8) == 0 {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..15))).await;
        }
        if reconnects && random.random_range(0..20) == 0 {
            let checkpoint: Checkpoint = events.checkpoint().to_string().parse().unwrap();
            // What comes twice of a commit that was handed out in part is not judged.
            for (_, _, version) in followed.entities.values_mut() {
                *version = 0;
            }
            events = kuma.subscribe(Filter::all()).from(Start::Checkpoint(checkpoint)).open().await.unwrap();
        }
    }
}

/// Placed, erased, recreated, restored to an earlier version, and erased again, by many at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_life_ends_before_the_next_one_begins_for_everybody_who_follows() {
    let seed = seed("erasure_followed");
    let dir = directory();
    let kuma = start(dir.path()).await;
    let tally = kuma.projection(Tally { version: 1 }).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let mut followers = Vec::new();
    for number in 0..9 {
        let events = kuma.subscribe(Filter::kind("probe")).open().await.unwrap();
        let name = format!("follower {number}, KUMA_SEED={seed}");
        followers.push(tokio::spawn(follow(kuma.clone(), name, events, seed / 3 * 3 + number, done.clone())));
    }
    let lives = (0..24_u64).map(|number| {
        let kuma = kuma.clone();
        tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(seed << 8 ^ number);
            let probe = kuma.entity::<Probe>(format!("probe-{number}"));
            let (mut erasures, mut append_id) = (0, number << 32);
            for _ in 0..4 {
                for _ in 0..random.random_range(1..12) {
                    append_id += 1;
                    let append = TestAppend { id: append_id, events: random.random_range(1..9), bytes: 20 };
                    probe.append_all(append.events()).await.unwrap();
                }
                if random.random_range(0..3) == 0 {
                    let events = probe.raw().events(.., usize::MAX).await.unwrap();
                    // Only where a commit ends; the first one does.
                    let of = rmp_serde::from_slice::<integration_tests::Note>(&events[0].data).unwrap().of;
                    probe.restore_to(Version(of.into()), reason()).await.unwrap();
                } else {
                    probe.erase(reason()).await.unwrap();
                    probe.recreate(reason()).await.unwrap();
                }
                erasures += 1;
            }
            append_id += 1;
            probe.append_all(TestAppend { id: append_id, events: 2, bytes: 20 }.events()).await.unwrap();
            erasures
        })
    });
    let erasures: u64 = join_all(lives).await.into_iter().map(Result::unwrap).sum();
    done.store(true, SeqCst);
    for follower in followers {
        let followed = follower.await.unwrap();
        assert_eq!(followed.erased, erasures, "KUMA_SEED={seed}");
        assert!(followed.events >= 24);
    }
    assert_same_as_from_scratch(&kuma, &tally, &format!("KUMA_SEED={seed}")).await;
    kuma.shutdown().await;
}

/// Waits until it has, or says at once that it stands still.
async fn caught_up(projection: &ProjectionHandle) {
    let waiting = projection.caught_up(SOON);
    let mut waiting = std::pin::pin!(waiting);
    loop {
        if let Ok(caught_up) = tokio::time::timeout(Duration::from_millis(50), &mut waiting).await {
            return caught_up.unwrap();
        }
        let status = projection.status().await.unwrap();
        for model in status.serving.iter().chain(&status.building) {
            if let Some(ProjectionState::Failed(failure)) = &model.state {
                panic!("{} of {}: {failure:?}", model.model, status.name);
            }
        }
    }
}

/// The model is what the log says, and what a new one says. How many events were ever applied is not compared: some of them are erased.
async fn assert_same_as_from_scratch(kuma: &Kuma, tally: &ProjectionHandle, context: &str) {
    caught_up(tally).await;
    let of_log = Tallied::of_log(kuma, 1).await;
    let same = |model: &Tallied| (model.tally == of_log.tally) && (model.seen == of_log.seen);
    let difference = |model: &Tallied| -> BTreeMap<String, _> {
        let keys: BTreeSet<&String> = model.tally.keys().chain(of_log.tally.keys()).collect();
        let differs = keys.into_iter().filter(|key| model.tally.get(*key) != of_log.tally.get(*key));
        differs.map(|key| (key.clone(), (model.tally.get(key).copied(), of_log.tally.get(key).copied()))).collect()
    };
    let model = Tallied::of_model(tally).await;
    assert!(same(&model), "{context}: model and log: {:?}", difference(&model));
    tally.rebuild().await.unwrap();
    caught_up(tally).await;
    let model = Tallied::of_model(tally).await;
    assert!(same(&model), "{context}: rebuilt model and log: {:?}", difference(&model));
    assert_eq!(model.total, of_log.total, "{context}");
}

/// Many at once, beside appends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_are_erased_while_others_follow() {
    let seed = seed("erase_many_followed");
    let dir = directory();
    let kuma = start(dir.path()).await;
    let tally = kuma.projection(Tally { version: 1 }).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let append = |number: u64, round: u64| {
        let probe = kuma.entity::<Probe>(format!("probe-{number}"));
        let append = TestAppend { id: number << 32 | round, events: 1 + ((number + round) % 5) as u32, bytes: 30 };
        async move { probe.append_all(append.events()).await }
    };
    for round in 0..4 {
        join_all((0..300).map(|number| append(number, round)))
            .await
            .into_iter()
            .for_each(|outcome| assert!(outcome.is_ok()));
    }
    let mut followers = Vec::new();
    for number in 0..6 {
        let events = kuma.subscribe(Filter::all()).open().await.unwrap();
        let name = format!("follower {number}, KUMA_SEED={seed}");
        followers.push(tokio::spawn(follow(kuma.clone(), name, events, seed / 3 * 3 + number, done.clone())));
    }
    let late = async {
        for round in 4..12 {
            // Some of them are refused: they are erased.
            join_all((0..300).step_by(3).map(|number| append(number, round))).await;
        }
    };
    let erased = async {
        let mut erased = 0;
        for part in 0..3_u64 {
            let handles = (part * 100..part * 100 + 60)
                .map(|number| kuma.entity::<Probe>(format!("probe-{number}")).raw().clone());
            let handles: Vec<_> = handles.collect();
            let outcome = kuma.erase_many(handles, reason(), |_, outcome| assert!(outcome.is_ok())).await.unwrap();
            erased += outcome.erased;
        }
        erased
    };
    let ((), erased) = tokio::join!(late, erased);
    assert_eq!(erased, 180);
    done.store(true, SeqCst);
    for follower in followers {
        assert_eq!(follower.await.unwrap().erased, erased);
    }
    assert_same_as_from_scratch(&kuma, &tally, &format!("KUMA_SEED={seed}")).await;
    kuma.shutdown().await;
}

/// Its tombstone is durable, and this store has not come to act on it yet: for a moment the two must not be told apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn an_erasure_is_told_after_the_last_event_also_in_the_instant_in_which_it_begins() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1)).await.unwrap();
    for round in 0..3 {
        for id in ["one", "two"] {
            place(&kuma, id, 1 + round).await;
        }
    }
    let before = kuma.subscribe(Filter::all()).open().await.unwrap().checkpoint();
    let (reached, waits) = std::sync::mpsc::channel();
    let (go_on, told) = std::sync::mpsc::channel::<()>();
    let told = parking_lot::Mutex::new(told);
    fail::cfg_callback("erase.tombstones_durable", move || {
        reached.send(()).unwrap();
        // It fails when the test did.
        let _ = told.lock().recv();
    })
    .unwrap();
    let erasing = {
        let one = kuma.raw("order", "one");
        tokio::spawn(async move { one.erase(reason()).await.unwrap() })
    };
    tokio::task::spawn_blocking(move || waits.recv().unwrap()).await.unwrap();
    let mut followers = Vec::new();
    for start in [Start::Beginning, Start::Checkpoint(before)] {
        let mut events = kuma.subscribe(Filter::all()).from(start).open().await.unwrap();
        let mut followed = Followed::default();
        for _ in 0..3 {
            if let Ok(next) = tokio::time::timeout(Duration::from_millis(300), events.next()).await {
                followed.take("in the instant", &next.unwrap());
            }
        }
        followers.push((events, followed));
    }
    go_on.send(()).unwrap();
    erasing.await.unwrap();
    fail::remove("erase.tombstones_durable");
    let hash = kuma.raw("order", "one").hash().unwrap();
    for (mut events, mut followed) in followers {
        while let Some(delivery) = events.next_of_now().await.unwrap() {
            followed.take("after", &delivery);
        }
        let of_it = followed.entities.get(&hash).copied().unwrap_or_default();
        assert!(of_it.1 == 0 || of_it.0 == 1, "there were events of it, and it was not told that it is erased");
        assert!(followed.events >= 6);
    }
    kuma.shutdown().await;
}

// ---- an erasure that is begun again

/// A read model is purged, its reader goes on with the next life, and the erasure is cut short before the key of the former life is destroyed.
/// It is begun again, and finds rows with the same id: those of the next life, which stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_that_is_begun_again_leaves_the_next_life_in_read_models() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    let tally = kuma.projection(Tally { version: 1 }).await.unwrap();
    let probe = kuma.entity::<Probe>("ann");
    for id in 0..4 {
        probe.append_all(TestAppend { id, events: 2, bytes: 20 }.events()).await.unwrap();
    }
    tally.caught_up(SOON).await.unwrap();
    // Of another projection; its log cannot be cut while somebody outside reads it.
    let other = kuma.projection(Other).await.unwrap();
    other.caught_up(SOON).await.unwrap();
    let reader = rusqlite::Connection::open(dir.path().join("projections/other/v1-1.db")).unwrap();
    reader.execute_batch("BEGIN").unwrap();
    let rows = |connection: &rusqlite::Connection| {
        connection.query_row("SELECT count(*) FROM seen", [], |row| row.get::<_, i64>(0))
    };
    assert_eq!(rows(&reader).unwrap(), 8);
    let restoring = {
        let probe = probe.clone();
        tokio::spawn(async move { probe.restore_to(Version(4), reason()).await })
    };
    // The other one is purged and goes on with the next life, before the erasure is tried again.
    let unfinished = restoring.await.unwrap();
    assert!(matches!(unfinished, Err(EraseError::Unfinished { .. })), "{unfinished:?}");
    until("the next life is in the model", async || {
        let state = tally.status().await.unwrap().serving.unwrap().state.unwrap();
        assert!(!matches!(state, ProjectionState::Failed(_)), "{state:?}");
        let answer = tally.query("SELECT events FROM tally WHERE entity = 'ann'").run().await.unwrap();
        answer.rows == [[4.into()]]
    })
    .await;
    assert_eq!(kuma.erasures_unfinished(), 1);
    reader.execute_batch("COMMIT").unwrap();
    drop(reader);
    until("the erasure is complete", async || kuma.erasures_unfinished() == 0).await;
    other.caught_up(SOON).await.unwrap();
    let answer = other.query("SELECT count(*), max(version) FROM seen").run().await.unwrap();
    assert_eq!(answer.rows, [[4.into(), 4.into()]]);
    assert_same_as_from_scratch(&kuma, &tally, "after an erasure that was begun again").await;
    kuma.shutdown().await;
}

/// Wherever it is cut short, and whether or not the reader of the model had gone on with the next life.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_models_are_right_wherever_an_erasure_was_cut_short() {
    let places =
        ["entombed", "drained", "models_purged", "keys_destroyed", "keys_cut", "rows_erased", "logs_cut", "attested"];
    for (place, restored) in places.iter().flat_map(|place| [(place, false), (place, true)]) {
        let context = format!("cut short when {place}, restored {restored}");
        let dir = directory();
        let kuma = start(dir.path()).await;
        let tally = kuma.projection(Tally { version: 1 }).await.unwrap();
        for id in 0..6 {
            for name in ["ann-of-the-needle", "bob"] {
                kuma.entity::<Probe>(name).append_all(TestAppend { id, events: 2, bytes: 20 }.events()).await.unwrap();
            }
        }
        tally.caught_up(SOON).await.unwrap();
        fail::cfg(format!("erase.{place}"), "panic").unwrap();
        let ann = kuma.entity::<Probe>("ann-of-the-needle");
        match restored {
            true => drop(ann.restore_to(Version(4), reason()).await.unwrap_err()),
            false => drop(ann.erase(reason()).await.unwrap_err()),
        }
        fail::remove(format!("erase.{place}"));
        let mut events = kuma.subscribe(Filter::kind("probe")).open().await.unwrap();
        let mut followed = Followed::default();
        if restored && *place == "models_purged" {
            until("it goes on with the next life", async || {
                let answer = tally.query("SELECT events FROM tally WHERE entity LIKE 'ann%'").run().await.unwrap();
                answer.rows == [[4.into()]]
            })
            .await;
        }
        for _ in 0..5 {
            followed.take(&context, &events.next().await.unwrap());
        }
        let checkpoint = events.checkpoint();
        kuma.shutdown().await;
        drop((kuma, tally, events, ann));

        let kuma = start(dir.path()).await;
        let mut events =
            kuma.subscribe(Filter::kind("probe")).from(Start::Checkpoint(checkpoint)).open().await.unwrap();
        for (_, _, version) in followed.entities.values_mut() {
            // What was handed out of a commit in part comes again.
            *version = 0;
        }
        let tally = kuma.projection(Tally { version: 1 }).await.unwrap();
        until(&context, async || kuma.erasures_unfinished() == 0).await;
        while let Some(delivery) = events.next_of_now().await.unwrap() {
            followed.take(&context, &delivery);
        }
        assert_eq!(kuma.entity::<Probe>("ann-of-the-needle").read().await.is_ok(), restored, "{context}");
        assert_same_as_from_scratch(&kuma, &tally, &context).await;
        kuma.shutdown().await;
    }
}

/// Notes each event.
struct Other;

impl kuma_core::Projection for Other {
    fn name(&self) -> &str {
        "other"
    }

    fn version(&self) -> u32 {
        1
    }

    fn filter(&self) -> Filter {
        Filter::kind("probe")
    }

    fn erasure(&self) -> kuma_core::ErasureRule {
        kuma_core::ErasureRule::column("seen", "entity")
    }

    fn migrations(&self) -> Vec<String> {
        vec!["CREATE TABLE seen(entity TEXT, version INTEGER, PRIMARY KEY(entity, version)) STRICT".to_owned()]
    }

    fn apply(
        &self,
        model: &kuma_core::rusqlite::Transaction<'_>,
        stored: &kuma_core::StoredEvent,
    ) -> Result<(), kuma_core::ApplyError> {
        model.execute("INSERT INTO seen VALUES (?, ?)", (&*stored.id, stored.event.version.0 as i64))?;
        Ok(())
    }
}
