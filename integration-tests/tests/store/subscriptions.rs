//! Subscriptions: nothing is missing and nothing comes twice, for whoever reads fast, slowly, now and then, or again from a checkpoint, while
//! many write; a subscriber that is stuck costs nobody anything.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use crate::common::{directory, until};
use futures_util::future::join_all;
use integration_tests::{options, seed};
use kuma_core::{
    Checkpoint, CheckpointError, Delivery, Entity, Filter, Kuma, MasterKeySource, NewEvent, Options, Restore, Start,
    StoredEvent, SubscribeError, Subscription, Upcasters, Version,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Longer than anything takes.
const LONG: Duration = Duration::from_secs(60);
const WRITERS: u64 = 200;
const ROUNDS: u64 = 8;
const ENTITIES: u64 = 120;
const NAMES: [&str; 3] = ["Placed", "Paid", "Shipped"];

async fn start(path: &Path) -> Kuma {
    Kuma::start(options(path)).await.unwrap()
}

fn event(name: &str, number: u64) -> NewEvent {
    NewEvent::json(name, &json!({ "n": number })).unwrap()
}

/// What it must not take for ever.
async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, wait).await.unwrap_or_else(|_| panic!("waited in vain: {what}"))
}

fn stored(delivery: Delivery) -> StoredEvent {
    match delivery {
        Delivery::Event(stored) => stored,
        other => panic!("{other:?}"),
    }
}

type Key = (String, String, u64);

fn key(stored: &StoredEvent) -> Key {
    (stored.kind.to_string(), stored.id.to_string(), stored.event.version.0)
}

/// What a subscriber was handed, looked at as it came.
#[derive(Default)]
struct Received {
    events: Vec<StoredEvent>,
    /// By slot, the last seq.
    seqs: HashMap<u16, u64>,
    /// By entity, the last version.
    versions: HashMap<(String, String), u64>,
    /// Those that may have been received of a commit in part, and come again then.
    again: BTreeSet<Key>,
}

impl Received {
    /// Takes an event in; `dense` says that none may be missing since the first one of its slot.
    #[track_caller]
    fn take(&mut self, who: &str, stored: StoredEvent, dense: bool) {
        if !self.again.remove(&key(&stored)) {
            self.note(who, stored, dense);
        }
    }

    #[track_caller]
    fn note(&mut self, who: &str, stored: StoredEvent, dense: bool) {
        let (slot, version) = (stored.slot.number(), stored.event.version.0);
        let entity = (stored.kind.to_string(), stored.id.to_string());
        let (last_seq, last_version) = (self.seqs.get(&slot).copied(), self.versions.get(&entity).copied());
        if let Some(last) = last_seq {
            assert!(stored.seq >= last, "{who}: seq {} after {last} in slot {slot}", stored.seq);
            assert!(!dense || stored.seq <= last + 1, "{who}: seq {} after {last} in slot {slot}", stored.seq);
        }
        if let Some(last) = last_version {
            assert!(version > last, "{who}: version {version} after {last} of {entity:?}");
            assert!(!dense || version == last + 1, "{who}: version {version} after {last} of {entity:?}");
        }
        self.seqs.insert(slot, stored.seq);
        self.versions.insert(entity, version);
        self.events.push(stored);
    }

    /// Forgets what was received of a commit in part: it comes again.
    fn keep(&mut self, complete: usize) {
        let events: Vec<StoredEvent> = self.events.drain(..).take(complete).collect();
        (self.seqs, self.versions) = Default::default();
        events.into_iter().for_each(|stored| self.note("what was received before", stored, false));
    }

    fn keys(&self) -> BTreeSet<Key> {
        let keys: BTreeSet<Key> = self.events.iter().map(key).collect();
        assert_eq!(keys.len(), self.events.len());
        keys
    }
}

/// Whether everything was written.
#[derive(Clone, Default)]
struct Written {
    all: Arc<AtomicBool>,
    commits: Arc<AtomicU64>,
}

impl Written {
    fn is_all(&self) -> bool {
        self.all.load(SeqCst)
    }
}

/// The next one, or none when everything was written and handed out.
async fn next(events: &mut Subscription, written: &Written) -> Option<Delivery> {
    loop {
        if written.is_all() {
            return events.next_of_now().await.unwrap();
        }
        // What is given up here is not lost.
        if let Ok(next) = tokio::time::timeout(Duration::from_millis(20), events.next()).await {
            return Some(next.unwrap());
        }
    }
}

/// How a subscriber behaves.
#[derive(Clone, Copy, Debug)]
enum Manner {
    Fast,
    InPages,
    Slow,
    /// Reads some, and then nothing until some hundred commits were written.
    Pausing,
    /// Drops its subscription after some events, in the middle of whatever it is in, and goes on from the text of its checkpoint.
    Reconnecting,
}

async fn receive(
    kuma: Kuma,
    name: String,
    mut events: Subscription,
    filter: Filter,
    (manner, dense, passes, seed): (Manner, bool, bool, u64),
    written: Written,
) -> Received {
    let mut random = StdRng::seed_from_u64(seed);
    let mut received = Received::default();
    let mut left: u32 = random.random_range(1..200);
    // How many events there were at the checkpoint as it is now.
    let (mut checkpoint, mut complete) = (events.checkpoint(), 0);
    loop {
        match manner {
            Manner::InPages if !written.is_all() => {
                let page = tokio::time::timeout(Duration::from_millis(20), events.next_page()).await;
                let page = page.map_or_else(|_| Vec::new(), |page| page.unwrap());
                page.into_iter().for_each(|delivery| received.take(&name, stored(delivery), dense));
                continue;
            }
            Manner::Slow if random.random_range(0..20) == 0 => {
                tokio::time::sleep(Duration::from_millis(random.random_range(0..4))).await;
            }
            Manner::Pausing if left == 0 => {
                left = random.random_range(1..400);
                let until = written.commits.load(SeqCst) + 300;
                while !written.is_all() && written.commits.load(SeqCst) < until {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            Manner::Reconnecting if left == 0 => {
                left = random.random_range(1..300);
                received.keep(complete);
                // A checkpoint that moved with an event may have passed what is not wanted before it, and not the event's own commit.
                received.again.extend(received.events.last().filter(|_| passes).map(key));
                let checkpoint: Checkpoint = checkpoint.to_string().parse().unwrap();
                assert_eq!(checkpoint, events.checkpoint());
                events = kuma.subscribe(filter.clone()).from(Start::Checkpoint(checkpoint)).open().await.unwrap();
            }
            _ => {}
        }
        let Some(delivery) = next(&mut events, &written).await else { return received };
        received.take(&name, stored(delivery), dense);
        left = left.saturating_sub(1);
        let now = events.checkpoint();
        if now != checkpoint {
            (checkpoint, complete) = (now, received.events.len());
        }
    }
}

/// The commits of one writer.
async fn write(kuma: Kuma, writer: u64, rounds: u64, seed: u64, written: Written) -> BTreeMap<Key, String> {
    let mut random = StdRng::seed_from_u64(seed << 8 ^ writer);
    let mut wrote = BTreeMap::new();
    for round in 0..rounds {
        let kind = if random.random_range(0..4) == 0 { "parcel" } else { "order" };
        let id = format!("{kind}-{}", random.random_range(0..ENTITIES));
        let count = [1, 1, 2, 5, 17][random.random_range(0..5)];
        let names: Vec<&str> = (0..count).map(|_| NAMES[random.random_range(0..NAMES.len())]).collect();
        let events = names.iter().map(|name| event(name, writer << 32 | round));
        let last = kuma.raw(kind, &id).append_all(events).await.unwrap().0;
        let first = last + 1 - count;
        wrote.extend(
            names
                .iter()
                .zip(first..)
                .map(|(name, version)| ((kind.to_owned(), id.clone(), version), (*name).to_owned())),
        );
        written.commits.fetch_add(1, SeqCst);
    }
    wrote
}

async fn write_all(kuma: &Kuma, seed: u64, rounds: u64, written: &Written) -> BTreeMap<Key, String> {
    let writers = (0..WRITERS).map(|writer| tokio::spawn(write(kuma.clone(), writer, rounds, seed, written.clone())));
    join_all(writers).await.into_iter().flat_map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_subscriber_gets_every_event_once_and_in_order_while_200_write() {
    let seed = seed("subscriptions");
    let dir = directory();
    let kuma = start(dir.path()).await;
    let written = Written::default();
    let before = write_all(&kuma, seed, 2, &written).await;
    let between = SystemTime::now();
    assert!(!before.is_empty());

    let manners = [Manner::Fast, Manner::InPages, Manner::Slow, Manner::Pausing, Manner::Reconnecting];
    let starts = ["beginning", "now", "time", "checkpoint"];
    let narrow = Filter::event("order", "Paid").and_kind("parcel");
    let mut subscribers = Vec::new();
    for (number, manner) in manners.into_iter().enumerate() {
        for (other, start) in starts.into_iter().enumerate() {
            for (filter, is_all) in [(Filter::all(), true), (narrow.clone(), false)] {
                let name = format!("{manner:?} from {start}, all {is_all}, KUMA_SEED={seed}");
                let from = match start {
                    "beginning" => Start::Beginning,
                    "now" => Start::Now,
                    "time" => Start::Time(between),
                    _ => {
                        // Behind some of those that there are.
                        let mut events = kuma.subscribe(filter.clone()).open().await.unwrap();
                        for _ in 0..37 {
                            events.next().await.unwrap();
                        }
                        Start::Checkpoint(events.checkpoint())
                    }
                };
                let events = kuma.subscribe(filter.clone()).from(from).open().await.unwrap();
                let passes = !is_all || start == "time";
                let how = (manner, is_all, passes, seed + (number * 10 + other) as u64);
                let task = tokio::spawn(receive(kuma.clone(), name.clone(), events, filter, how, written.clone()));
                subscribers.push((name, start, is_all, task));
            }
        }
    }
    let after = write_all(&kuma, seed + 1, ROUNDS, &written).await;
    written.all.store(true, SeqCst);

    let all: BTreeMap<&Key, &String> = before.iter().chain(&after).collect();
    let wanted = |is_all: bool, only_after: bool| -> BTreeSet<Key> {
        let keys = all.iter().filter(|(key, name)| {
            (is_all || narrow.matches(&key.0, name)) && (!only_after || after.contains_key(**key))
        });
        keys.map(|(key, _)| (**key).clone()).collect()
    };
    for (name, start, is_all, task) in subscribers {
        let received = soon(&name, task).await.unwrap();
        let keys = received.keys();
        match start {
            "beginning" => assert!(keys == wanted(is_all, false), "{name}"),
            "now" | "time" => assert!(keys == wanted(is_all, true), "{name}"),
            _ => {
                // All but those that were handed out before the checkpoint: at most 37, and none of what came after.
                let missing: Vec<Key> = wanted(is_all, false).difference(&keys).cloned().collect();
                assert!(missing.len() <= 37 && keys.is_subset(&wanted(is_all, false)), "{name}: {missing:?}");
                assert!(missing.iter().all(|key| before.contains_key(key)), "{name}: {missing:?}");
            }
        }
        for stored in &received.events {
            assert_eq!(stored.event.name, *all[&key(stored)], "{name}");
        }
    }
    for ((kind, id), last) in all.keys().map(|(kind, id, version)| ((kind, id), *version)).collect::<BTreeMap<_, _>>() {
        assert_eq!(kuma.raw(kind, id).read().await.unwrap().1, Version(last));
    }
    kuma.shutdown().await;
}

// ---- a subscriber that does not read

static UPCAST: AtomicU64 = AtomicU64::new(0);

/// Counts how many of its events were opened.
#[derive(Default, Clone, Serialize, Deserialize)]
struct Counted;

#[derive(Serialize, Deserialize)]
enum CountedEvent {
    Written { text: String },
}

impl Entity for Counted {
    const KIND: &'static str = "counted";
    const SCHEMA: u32 = 2;
    type Event = CountedEvent;

    fn apply(&mut self, _: &CountedEvent) {}

    fn upcasters() -> Upcasters {
        Upcasters::new().json(1, "Written", |data| {
            UPCAST.fetch_add(1, SeqCst);
            data
        })
    }
}

/// It takes up two pages of each shard, however much is behind them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_that_is_stuck_holds_two_pages_a_shard_and_nobody_waits_for_it() {
    const COMMITS: u64 = 4_000;
    const BYTES: usize = 8_000;
    let dir = directory();
    let kuma = start(dir.path()).await;
    let text = "x".repeat(BYTES);
    for _ in 0..COMMITS / 200 {
        let appends = (0..200).map(|number| {
            let event = NewEvent::json("Written", &json!({ "text": text })).unwrap();
            let handle = kuma.raw("counted", format!("counted-{number}"));
            async move { handle.append(event).await.unwrap() }
        });
        join_all(appends).await;
    }
    kuma.shutdown().await;
    drop(kuma);
    // From here on whatever opens one of these is counted.
    let kuma = start(dir.path()).await;
    kuma.register::<Counted>().unwrap();
    let mut stuck = kuma.subscribe(Filter::kind("counted")).open().await.unwrap();
    let mut other = kuma.subscribe(Filter::kind("order")).open().await.unwrap();
    until("it has begun", async || UPCAST.load(SeqCst) > 0).await;
    for round in 0..200 {
        kuma.raw("order", format!("order-{round}")).append(event("Placed", round)).await.unwrap();
        stored(soon("another subscriber goes on", other.next()).await.unwrap());
    }
    // 512 rows are the most that a page has; its bytes are fewer than 4 MiB and one row.
    let held = UPCAST.load(SeqCst);
    let page_max = 512_u64.min((4 << 20) / BYTES as u64 + 1);
    println!("{held} of {COMMITS} commits were opened, {page_max} make a page");
    assert!(held > 0 && held <= 2 * 2 * page_max, "{held} of {COMMITS} were opened");
    let mut received = Received::default();
    for _ in 0..COMMITS {
        received.take("stuck", stored(soon("it goes on", stuck.next()).await.unwrap()), true);
    }
    assert_eq!(UPCAST.load(SeqCst), COMMITS, "each was opened once");
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_that_is_dropped_anywhere_leaves_everybody_else_alone() {
    let seed = seed("subscriptions dropped");
    let mut random = StdRng::seed_from_u64(seed);
    let dir = directory();
    let kuma = start(dir.path()).await;
    let mut whole = kuma.subscribe(Filter::all()).open().await.unwrap();
    for round in 0..60 {
        let events = |count: u64| (0..count).map(|number| event("Placed", number)).collect::<Vec<_>>();
        kuma.raw("order", format!("order-{}", round % 7)).append_all(events(1 + round % 5)).await.unwrap();
        let mut dropped = kuma.subscribe(Filter::all()).open().await.unwrap();
        for _ in 0..random.random_range(0..4) {
            // Also while it waits.
            let _ = tokio::time::timeout(Duration::from_micros(random.random_range(0..800)), dropped.next()).await;
        }
    }
    let mut received = Received::default();
    while let Some(delivery) = whole.next_of_now().await.unwrap() {
        received.take("whole", stored(delivery), true);
    }
    assert_eq!(received.events.len(), (0..60).map(|round| 1 + round % 5).sum::<usize>());
    kuma.shutdown().await;
}

// ---- shutting down

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_that_wait_are_told_that_the_store_shuts_down() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    kuma.raw("order", "one").append(event("Placed", 1)).await.unwrap();
    let mut waiting = Vec::new();
    for _ in 0..20 {
        let mut events = kuma.subscribe(Filter::all()).open().await.unwrap();
        stored(events.next().await.unwrap());
        waiting.push(tokio::spawn(async move {
            let end = events.next().await;
            let again = events.next().await;
            (end, again, events.next_of_now().await, events.next_page().await)
        }));
    }
    tokio::task::yield_now().await;
    kuma.shutdown().await;
    for task in waiting {
        let (end, again, now, page) = soon("it is told", task).await.unwrap();
        assert!(matches!(end, Err(SubscribeError::ShuttingDown)), "{end:?}");
        assert!(matches!(again, Err(SubscribeError::ShuttingDown)), "{again:?}");
        assert!(matches!(now, Err(SubscribeError::ShuttingDown) | Ok(None)), "{now:?}");
        assert!(matches!(page, Err(SubscribeError::ShuttingDown)), "{page:?}");
    }
    let refused = kuma.subscribe(Filter::all()).open().await;
    assert!(matches!(refused.map(drop), Err(SubscribeError::ShuttingDown)));
}

/// However much of it was read ahead, and whatever was erased meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_of_a_store_that_is_shut_down_comes_to_its_end() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    for round in 0..50 {
        for id in ["one", "two", "three"] {
            kuma.raw("order", id).append(event("Placed", round)).await.unwrap();
        }
    }
    let mut events = kuma.subscribe(Filter::all()).open().await.unwrap();
    for _ in 0..10 {
        events.next().await.unwrap();
    }
    kuma.raw("order", "two").erase(kuma_core::Reason::new("a test")).await.unwrap();
    kuma.shutdown().await;
    let mut errors = Vec::new();
    let mut deliveries = 0;
    loop {
        match soon("it ends", events.next()).await {
            Ok(_) => deliveries += 1,
            Err(SubscribeError::ShuttingDown) => break,
            Err(error) => errors.push(error.to_string()),
        }
        assert!(errors.len() < 10, "it never says that the store is shutting down: {errors:?}");
    }
    assert!(deliveries <= 150);
}

// ---- checkpoints

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_is_good_for_the_store_that_it_is_of_and_for_no_other() {
    let dir = directory();
    let path = |name: &str| dir.path().join(name);
    let master = || MasterKeySource::File(dir.path().join("data").join("master.key"));
    let options = |name: &str| Options::new(path(name)).shards(2).master_key(master());
    let kuma = Kuma::start(options("data")).await.unwrap();
    for round in 0..10 {
        kuma.raw("order", format!("order-{}", round % 3)).append(event("Placed", round)).await.unwrap();
    }
    kuma.backup(path("events")).run(|_| ()).await.unwrap();
    kuma.backup_keys(path("keys")).await.unwrap();
    let mut events = kuma.subscribe(Filter::all()).open().await.unwrap();
    let mut received = Received::default();
    for _ in 0..4 {
        received.take("before", stored(events.next().await.unwrap()), true);
    }
    let text = events.checkpoint().to_string();
    kuma.shutdown().await;
    drop((kuma, events));

    // The same store, opened again.
    let kuma = Kuma::start(options("data")).await.unwrap();
    kuma.raw("order", "order-9").append(event("Placed", 9)).await.unwrap();
    let from = |text: &str| Start::Checkpoint(text.parse().unwrap());
    let mut events = kuma.subscribe(Filter::all()).from(from(&text)).open().await.unwrap();
    while let Some(delivery) = events.next_of_now().await.unwrap() {
        received.take("after", stored(delivery), true);
    }
    assert_eq!(received.events.len(), 11);

    // One that is ahead.
    let end = events.checkpoint().to_string();
    let mut parts: Vec<String> = end.split('.').map(str::to_owned).collect();
    let position: u64 = parts[2].parse().unwrap();
    parts[2] = (position + 1).to_string();
    let ahead = kuma.subscribe(Filter::all()).from(from(&parts.join("."))).open().await.map(drop).unwrap_err();
    let SubscribeError::Checkpoint(CheckpointError::Ahead { shard: 0, position: found, end }) = ahead else {
        panic!("{ahead:?}")
    };
    assert_eq!((found, end), (position + 1, position));
    // One of a store with fewer shards.
    let fewer = text.rsplit_once('.').unwrap().0;
    let refused = kuma.subscribe(Filter::all()).from(from(fewer)).open().await.map(drop);
    assert!(matches!(refused, Err(SubscribeError::Checkpoint(CheckpointError::OtherCopy))), "{refused:?}");
    kuma.shutdown().await;

    let other = Kuma::start(Options::new(path("other")).shards(2)).await.unwrap();
    for round in 0..40 {
        other.raw("order", format!("order-{round}")).append(event("Placed", round)).await.unwrap();
    }
    let refused = other.subscribe(Filter::all()).from(from(&text)).open().await.map(drop);
    assert!(matches!(refused, Err(SubscribeError::Checkpoint(CheckpointError::OtherCopy))), "{refused:?}");
    other.shutdown().await;

    Restore::new(path("events")).keys(path("keys")).run(options("restored"), |_| ()).await.unwrap();
    let restored = Kuma::start(options("restored")).await.unwrap();
    let refused = restored.subscribe(Filter::all()).from(from(&text)).open().await.map(drop);
    assert!(matches!(refused, Err(SubscribeError::Checkpoint(CheckpointError::OtherCopy))), "{refused:?}");
    restored.shutdown().await;
}

/// Also of one that has not been handed anything yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_a_subscription_from_a_time_does_not_go_back_before_it() {
    let dir = directory();
    let kuma = start(dir.path()).await;
    for round in 0..20 {
        kuma.raw("order", format!("old-{round}")).append(event("Placed", round)).await.unwrap();
    }
    let between = SystemTime::now();
    for round in 0..20 {
        kuma.raw("order", format!("new-{round}")).append(event("Placed", round)).await.unwrap();
    }
    for taken in [0, 1, 5] {
        let mut events = kuma.subscribe(Filter::all()).from(Start::Time(between)).open().await.unwrap();
        let mut received = Received::default();
        for _ in 0..taken {
            received.take("before", stored(events.next().await.unwrap()), true);
        }
        let checkpoint: Checkpoint = events.checkpoint().to_string().parse().unwrap();
        let mut events = kuma.subscribe(Filter::all()).from(Start::Checkpoint(checkpoint)).open().await.unwrap();
        while let Some(delivery) = events.next_of_now().await.unwrap() {
            received.take("after", stored(delivery), true);
        }
        let old = received.events.iter().filter(|stored| stored.id.starts_with("old")).count();
        assert_eq!((old, received.events.len()), (0, 20), "checkpoint after {taken}");
    }
    kuma.shutdown().await;
}

// ---- what cannot be read

static PANICS: AtomicBool = AtomicBool::new(false);

/// Its upcaster panics at one event.
#[derive(Default, Clone, Serialize, Deserialize)]
struct Fragile;

#[derive(Serialize, Deserialize)]
enum FragileEvent {
    Written { n: u64 },
}

impl Entity for Fragile {
    const KIND: &'static str = "fragile";
    const SCHEMA: u32 = 2;
    type Event = FragileEvent;

    fn apply(&mut self, _: &FragileEvent) {}

    fn upcasters() -> Upcasters {
        Upcasters::new().json(1, "Written", |data| {
            assert!(!PANICS.load(SeqCst) || data["n"] != 13, "as told");
            data
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_is_said_once_in_its_place_and_all_else_comes() {
    let dir = directory();
    let options = || Options::new(dir.path()).shards(1).no_snapshots().scrub_bytes_per_second(0);
    let kuma = Kuma::start(options()).await.unwrap();
    kuma.register::<Fragile>().unwrap();
    for n in 0..40 {
        kuma.raw("fragile", format!("fragile-{}", n % 4)).append(event("Written", n)).await.unwrap();
    }
    let hash = |id: &str| kuma.raw("fragile", id).hash().unwrap();
    let hashes: Vec<_> = (0..4).map(|n| hash(&format!("fragile-{n}"))).collect();
    kuma.shutdown().await;
    drop(kuma);
    {
        let file = rusqlite::Connection::open(dir.path().join("shard-000.db")).unwrap();
        for position in [6, 22, 23] {
            let damage = "UPDATE log SET body = zeroblob(length(body)) WHERE position = ?";
            assert_eq!(file.execute(damage, [position]).unwrap(), 1);
        }
    }
    PANICS.store(true, SeqCst);
    let kuma = Kuma::start(options()).await.unwrap();
    kuma.register::<Fragile>().unwrap();
    for (filter, wanted) in
        [(Filter::all(), true), (Filter::event("fragile", "Written"), true), (Filter::kind("parcel"), false)]
    {
        let mut events = kuma.subscribe(filter.clone()).open().await.unwrap();
        let (mut read, mut unreadable) = (Vec::new(), Vec::new());
        while let Some(delivery) = events.next_of_now().await.unwrap() {
            match delivery {
                // The n-th event is at position n + 1.
                Delivery::Event(stored) => read.push(stored.event.json().unwrap()["n"].as_u64().unwrap() + 1),
                Delivery::Unreadable(commit) => {
                    assert_eq!(
                        read.last().copied().unwrap_or(0).max(*unreadable.last().unwrap_or(&0)) + 1,
                        commit.position
                    );
                    let entity = hashes[(commit.position - 1) as usize % 4];
                    assert!(commit.entity.is_none_or(|of| of == entity) && commit.shard == 0, "{commit:?}");
                    unreadable.push(commit.position);
                }
                Delivery::Erased(erased) => panic!("{erased:?}"),
            }
        }
        let expected: &[u64] = if wanted { &[6, 14, 22, 23] } else { &[] };
        assert_eq!(unreadable, expected, "{filter:?}");
        let expected: Vec<u64> = (1..=40).filter(|position| wanted && !unreadable.contains(position)).collect();
        assert_eq!(read, expected, "{filter:?}");
        // And it goes on.
        assert!(events.next_of_now().await.unwrap().is_none());
        kuma.raw("order", "one").append(event("Placed", 1)).await.unwrap();
        if filter == Filter::all() {
            let next = stored(soon("it goes on", events.next()).await.unwrap());
            assert_eq!(&*next.kind, "order");
        }
        // From behind its own checkpoint there is nothing more to say.
        let from = Start::Checkpoint(events.checkpoint());
        let mut again = kuma.subscribe(filter).from(from).open().await.unwrap();
        assert!(again.next_of_now().await.unwrap().is_none());
    }
    kuma.shutdown().await;
}

/// A row that is gone is not passed over in silence, and neither is what stands in the file of an entity that is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_rows_do_not_stop_a_subscription() {
    for (damage, bad) in [
        ("UPDATE log SET count = 7 WHERE position = 5", vec![5]),
        ("UPDATE log SET version = -3 WHERE position = 5", vec![5]),
        ("UPDATE log SET at = at + 1 WHERE position = 5", vec![5]),
        ("UPDATE log SET seq = seq + 100 WHERE position = 5", vec![5]),
        ("UPDATE log SET append_key = x'00' WHERE position = 5", vec![5]),
        ("UPDATE entity SET sealed_id = zeroblob(length(sealed_id)) WHERE eid = 1", vec![1, 4, 7, 10]),
    ] {
        let dir = directory();
        let options = || Options::new(dir.path()).shards(1).no_snapshots().scrub_bytes_per_second(0);
        let kuma = Kuma::start(options()).await.unwrap();
        for n in 0..12 {
            kuma.raw("order", format!("order-{}", n % 3)).append(event("Placed", n)).await.unwrap();
        }
        kuma.shutdown().await;
        drop(kuma);
        rusqlite::Connection::open(dir.path().join("shard-000.db")).unwrap().execute(damage, []).unwrap();
        let kuma = Kuma::start(options()).await.unwrap();
        let mut events = kuma.subscribe(Filter::all()).open().await.unwrap();
        let (mut unreadable, mut read) = (Vec::new(), 0);
        for _ in 0..12 {
            match soon(damage, events.next()).await {
                Ok(Delivery::Event(_)) => read += 1,
                Ok(Delivery::Unreadable(commit)) => unreadable.push(commit.position),
                other => panic!("{damage}: {other:?}"),
            }
        }
        assert_eq!((unreadable, read), (bad.clone(), 12 - bad.len()), "{damage}");
        kuma.shutdown().await;
    }
}
