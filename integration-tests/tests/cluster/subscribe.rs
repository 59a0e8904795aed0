//! Subscriptions to a whole cluster: every commit of every slot, in order, wherever slots go.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use crate::{
    common::directory,
    nodes::{self, LONG, settled, soon},
};
use integration_tests::seed;
use kuma_cluster::{Node, SlotCheckpoint, SlotCheckpointError, StartAt, SubscribeError, Subscription, testing::Hub};
use kuma_core::{Delivery, Filter, NewEvent, Reason, Slot, StoredEvent, slot_of};
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

async fn start(hub: &Hub, path: &Path, name: &str, seeds: &[&Node]) -> Node {
    let is_new = !path.join("store.json").exists();
    nodes::start(hub.node(path).context("subscriptions").name(name).shards(2), is_new, seeds).await
}

fn event(number: u64) -> NewEvent {
    NewEvent::json("Noted", &json!({ "n": number })).unwrap()
}

fn id(number: u64) -> String {
    format!("thing-{number}")
}

/// A thing whose slot this node owns.
fn thing_of(node: &Node, except: &[&str]) -> String {
    let owned: Vec<Slot> = node.store().slots().owned().into_iter().map(|(slot, _)| slot).collect();
    let is_it = |id: &String| owned.contains(&slot_of("thing", id)) && !except.contains(&id.as_str());
    (0..).map(id).find(is_it).unwrap()
}

/// Writers, and what was acknowledged to them: of each thing, its version.
struct Writing {
    stop: Arc<AtomicBool>,
    done: Arc<Mutex<BTreeMap<String, u64>>>,
    writers: Vec<tokio::task::JoinHandle<()>>,
}

impl Writing {
    fn begin(nodes: &[&Node], things: u64) -> Writing {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeMap::new())));
        let seed = seed("subscribe");
        let writer = |(number, node): (u64, &Node)| {
            let (stop, done, node) = (stop.clone(), done.clone(), node.clone());
            let mut random = StdRng::seed_from_u64(seed ^ number << 20);
            tokio::spawn(async move {
                while !stop.load(SeqCst) {
                    let thing = id(random.random_range(0..things) * 4 + number);
                    let key: [u8; 16] = random.random();
                    let mut tries = 0;
                    let version = loop {
                        match node.raw("thing", &thing).append(event(number)).idempotency_key(key).await {
                            Ok(version) => break version,
                            // Under load a move may take longer than a request waits.
                            Err(error) if tries == 5 => panic!("{error}"),
                            Err(_) => tries += 1,
                        }
                    };
                    done.lock().insert(thing, version.0);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })
        };
        let writers = (0..4).map(|number| writer((number, nodes[number as usize % nodes.len()]))).collect();
        Writing { stop, done, writers }
    }

    fn acknowledged(&self) -> u64 {
        self.done.lock().values().sum()
    }

    async fn end(self) -> BTreeMap<String, u64> {
        self.stop.store(true, SeqCst);
        for writer in self.writers {
            writer.await.unwrap();
        }
        self.done.lock().clone()
    }
}

/// What a subscriber was handed. Each append of these tests is one event, so that seqs are without gaps.
#[derive(Default)]
struct Seen {
    seqs: HashMap<Slot, u64>,
    versions: BTreeMap<String, u64>,
    events: u64,
}

impl Seen {
    fn take(&mut self, stored: &StoredEvent) {
        let seq = self.seqs.entry(stored.slot).or_default();
        assert_eq!(stored.seq, *seq + 1, "of slot {}", stored.slot);
        *seq = stored.seq;
        let version = self.versions.entry(stored.id.to_string()).or_default();
        assert_eq!(stored.event.version.0, *version + 1, "of {}", stored.id);
        *version += 1;
        self.events += 1;
    }

    /// Until it has seen all that was acknowledged.
    async fn catch_up(&mut self, subscription: &mut Subscription, wanted: &BTreeMap<String, u64>) {
        while &self.versions != wanted {
            match tokio::time::timeout(LONG, subscription.next()).await {
                Ok(delivery) => match delivery.unwrap() {
                    Delivery::Event(stored) => self.take(&stored),
                    other => panic!("{other:?}"),
                },
                Err(_) => {
                    let missing = wanted.iter().find(|(id, version)| self.versions.get(*id) != Some(version));
                    panic!(
                        "it never came: {missing:?} {:?} {:?}",
                        subscription.sources(),
                        subscription.held_back().len()
                    )
                }
            }
        }
    }
}

/// A subscriber that reads while others do things.
fn follow(mut subscription: Subscription, stop: Arc<AtomicBool>) -> tokio::task::JoinHandle<(Subscription, Seen)> {
    tokio::spawn(async move {
        let mut seen = Seen::default();
        while !stop.load(SeqCst) {
            if let Ok(delivery) = tokio::time::timeout(Duration::from_millis(100), subscription.next()).await {
                match delivery.unwrap() {
                    Delivery::Event(stored) => seen.take(&stored),
                    other => panic!("{other:?}"),
                }
            }
        }
        (subscription, seen)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_commit_of_every_slot_comes_once_and_in_order_while_nodes_join_and_leave() {
    let (one, two, three) = (directory(), directory(), directory());
    let hub = Hub::new();
    let first = start(&hub, one.path(), "one", &[]).await;
    let writing = Writing::begin(&[&first], 100);
    let stop = Arc::new(AtomicBool::new(false));
    let mut followers = vec![follow(first.subscribe(Filter::all(), StartAt::Beginning).await.unwrap(), stop.clone())];
    soon("there are events", async || writing.acknowledged() > 200).await;
    let second = start(&hub, two.path(), "two", &[&first]).await;
    followers.push(follow(second.subscribe(Filter::all(), StartAt::Beginning).await.unwrap(), stop.clone()));
    settled(&[&first, &second]).await;
    let third = start(&hub, three.path(), "three", &[&second]).await;
    followers.push(follow(third.subscribe(Filter::all(), StartAt::Beginning).await.unwrap(), stop.clone()));
    settled(&[&first, &second, &third]).await;
    second.drain().await.unwrap();
    soon("the second node has given everything away", async || second.owned() == 0).await;
    settled(&[&first, &second, &third]).await;
    let before = writing.acknowledged();
    soon("there are some more", async || writing.acknowledged() > before + 100).await;
    let wanted = writing.end().await;
    stop.store(true, SeqCst);
    for follower in followers {
        let (mut subscription, mut seen) = follower.await.unwrap();
        seen.catch_up(&mut subscription, &wanted).await;
        assert!(subscription.held_back().is_empty());
    }
    // And whoever comes late sees the same.
    let mut late = second.subscribe(Filter::all(), StartAt::Beginning).await.unwrap();
    Seen::default().catch_up(&mut late, &wanted).await;
    for node in [&first, &second, &third] {
        node.shutdown().await;
    }
    assert!(matches!(late.next().await, Err(SubscribeError::ShuttingDown)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_one_node_is_gone_on_from_at_another_without_a_gap_or_a_repetition() {
    let (one, two, three) = (directory(), directory(), directory());
    let hub = Hub::new();
    let first = start(&hub, one.path(), "one", &[]).await;
    let second = start(&hub, two.path(), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    let writing = Writing::begin(&[&first, &second], 50);
    soon("there are events", async || writing.acknowledged() > 300).await;
    let mut seen = Seen::default();
    let mut subscription = first.subscribe(Filter::all(), StartAt::Beginning).await.unwrap();
    let mut nodes = vec![first, second];
    for round in 0..6 {
        if round == 3 {
            // Slots move while nobody reads.
            let third = start(&hub, three.path(), "three", &[&nodes[0]]).await;
            nodes.push(third);
            settled(&nodes.iter().collect::<Vec<_>>()).await;
        }
        let enough = seen.events + 100;
        while seen.events < enough {
            match tokio::time::timeout(LONG, subscription.next()).await.unwrap().unwrap() {
                Delivery::Event(stored) => seen.take(&stored),
                other => panic!("{other:?}"),
            }
        }
        let text = subscription.checkpoint().to_string();
        let checkpoint: SlotCheckpoint = text.parse().unwrap();
        for (slot, seq) in &seen.seqs {
            assert_eq!(checkpoint.seq(*slot), *seq);
        }
        subscription = nodes[(round + 1) % nodes.len()].subscribe_from(Filter::all(), checkpoint).await.unwrap();
    }
    let wanted = writing.end().await;
    seen.catch_up(&mut subscription, &wanted).await;
    // Where all was handed out nothing comes again, nor is it read again.
    let checkpoint = subscription.checkpoint();
    let mut again = nodes[0].subscribe_from(Filter::all(), checkpoint.clone()).await.unwrap();
    soon("it has caught up", async || again.sources().iter().all(|source| source.behind == 0)).await;
    assert!(tokio::time::timeout(Duration::from_millis(500), again.next()).await.is_err());
    // Another cluster has other events.
    let elsewhere = directory();
    let other = start(&Hub::new(), elsewhere.path(), "other", &[]).await;
    let refused = other.subscribe_from(Filter::all(), checkpoint).await;
    assert!(matches!(refused.err(), Some(SubscribeError::Checkpoint(SlotCheckpointError::OtherCluster))));
    for node in nodes.iter().chain([&other]) {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_out_of_reach_holds_back_its_slots_and_no_others_until_it_is_back() {
    let (one, two) = (directory(), directory());
    let hub = Hub::new();
    let first = start(&hub, one.path(), "one", &[]).await;
    let second = start(&hub, two.path(), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    let (here, there) = (thing_of(&first, &[]), thing_of(&second, &[]));
    let mut subscription = first.subscribe(Filter::kind("thing"), StartAt::Now).await.unwrap();
    let mut next = async || match tokio::time::timeout(LONG, subscription.next()).await.unwrap().unwrap() {
        Delivery::Event(stored) => (stored.id.to_string(), stored.event.version.0),
        other => panic!("{other:?}"),
    };
    first.raw("thing", &there).append(event(1)).await.unwrap();
    assert_eq!(next().await, (there.clone(), 1));
    // Written there while this node cannot hear of it.
    hub.cut(first.address(), second.address(), true);
    second.raw("thing", &there).append(event(2)).await.unwrap();
    first.raw("thing", &here).append(event(1)).await.unwrap();
    assert_eq!(next().await, (here.clone(), 1));
    let held = subscription.held_back();
    assert!(held.iter().any(|held| held.slot == slot_of("thing", &there) && held.node.as_deref() == Some("two")));
    assert!(!held.iter().any(|held| held.slot == slot_of("thing", &here)));
    soon("the trouble is shown", async || subscription.sources().iter().any(|source| source.trouble.is_some())).await;
    // "Now" is not known there, and refused rather than guessed; nothing came from there meanwhile.
    let now = first.subscribe(Filter::all(), StartAt::Now).await;
    assert!(matches!(now.err(), Some(SubscribeError::OwnerUnreachable { node: Some(node), .. }) if node == "two"));
    assert!(tokio::time::timeout(Duration::from_millis(300), subscription.next()).await.is_err());
    second.shutdown().await;
    hub.cut(first.address(), second.address(), false);
    let second = start(&hub, two.path(), "two", &[]).await;
    let mut next = async || match tokio::time::timeout(LONG, subscription.next()).await.unwrap().unwrap() {
        Delivery::Event(stored) => (stored.id.to_string(), stored.event.version.0),
        other => panic!("{other:?}"),
    };
    assert_eq!(next().await, (there.clone(), 2));
    first.raw("thing", &there).append(event(3)).await.unwrap();
    assert_eq!(next().await, (there, 3));
    first.shutdown().await;
    second.shutdown().await;
}

/// It falls behind in the logs, not in memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_that_does_not_read_is_not_read_ahead_for() {
    let (one, two) = (directory(), directory());
    let hub = Hub::new();
    let first = start(&hub, one.path(), "one", &[]).await;
    let second = start(&hub, two.path(), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    let (here, there) = (thing_of(&first, &[]), thing_of(&second, &[]));
    let large = "x".repeat(200 << 10);
    for id in [&here, &there] {
        for number in 0..24 {
            let large = NewEvent::json("Large", &json!({ "n": number, "text": large })).unwrap();
            second.raw("thing", id).append(large).await.unwrap();
        }
    }
    let mut subscription = first.subscribe(Filter::all(), StartAt::Beginning).await.unwrap();
    let behind = |subscription: &Subscription| -> Vec<u64> {
        subscription.sources().iter().map(|source| source.behind).collect()
    };
    soon("both are read", async || behind(&subscription).iter().filter(|behind| **behind > 0).count() == 2).await;
    // Two answers of each, of some three events, are held; and no more, however long nobody reads.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(behind(&subscription).iter().all(|behind| *behind >= 12), "{:?}", behind(&subscription));
    let mut seen = Seen::default();
    seen.catch_up(&mut subscription, &[(here, 24), (there, 24)].into()).await;
    assert_eq!(behind(&subscription), [0, 0]);
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_is_told_at_every_node_after_the_last_event_and_before_a_new_life() {
    let (one, two) = (directory(), directory());
    let hub = Hub::new();
    let first = start(&hub, one.path(), "one", &[]).await;
    let second = start(&hub, two.path(), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    let thing = thing_of(&second, &[]);
    let other = thing_of(&second, &[&thing]);
    let mut early = first.subscribe(Filter::all(), StartAt::Beginning).await.unwrap();
    for number in 1..=3 {
        first.raw("thing", &thing).append(event(number)).await.unwrap();
    }
    let next =
        async |subscription: &mut Subscription| tokio::time::timeout(LONG, subscription.next()).await.unwrap().unwrap();
    for number in 1..=2 {
        assert!(matches!(next(&mut early).await, Delivery::Event(stored) if stored.event.version.0 == number));
    }
    let checkpoint = early.checkpoint();
    first.raw("thing", &thing).erase(Reason::new("asked for it")).await.unwrap();
    first.raw("thing", &thing).recreate(Reason::new("came back")).await.unwrap();
    first.raw("thing", &thing).append(event(4)).await.unwrap();
    first.raw("thing", &other).append(event(5)).await.unwrap();
    // The third event is erased: it is not handed out any more once that is told, nor to who goes on elsewhere.
    let mut again = second.subscribe_from(Filter::all(), checkpoint).await.unwrap();
    for subscription in [&mut early, &mut again] {
        let entity = loop {
            match next(subscription).await {
                Delivery::Erased(erased) => break erased.entity,
                // It was on its way before this node told of the erasure.
                Delivery::Event(stored) => assert_eq!((stored.life, stored.event.version.0), (1, 3)),
                other => panic!("{other:?}"),
            }
        };
        let mut events = Vec::new();
        while events.len() < 2 {
            match next(subscription).await {
                Delivery::Event(stored) => events.push((stored.id.to_string(), stored.life, stored.entity == entity)),
                // Told more than once is told.
                Delivery::Erased(erased) => assert_eq!(erased.entity, entity),
                other => panic!("{other:?}"),
            }
        }
        events.sort();
        let mut wanted = vec![(thing.clone(), 2, true), (other.clone(), 1, false)];
        wanted.sort();
        assert_eq!(events, wanted);
    }
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kinds_names_and_times_are_chosen_at_whichever_node_has_the_slot() {
    let (one, two) = (directory(), directory());
    let hub = Hub::new();
    let first = start(&hub, one.path(), "one", &[]).await;
    let second = start(&hub, two.path(), "two", &[&first]).await;
    settled(&[&first, &second]).await;
    for number in 0..20 {
        first.raw("thing", id(number)).append(event(number)).await.unwrap();
        first.raw("other", id(number)).append(event(number)).await.unwrap();
    }
    let time = SystemTime::now();
    for number in 0..20 {
        let paid = NewEvent::json("Paid", &json!({})).unwrap();
        first.raw("thing", id(number)).append_all([event(number), paid]).await.unwrap();
    }
    let filter = || Filter::event("thing", "Paid");
    for start in [StartAt::Beginning, StartAt::Time(time)] {
        let mut subscription = second.subscribe(filter(), start).await.unwrap();
        let mut ids = Vec::new();
        for _ in 0..20 {
            match tokio::time::timeout(LONG, subscription.next()).await.unwrap().unwrap() {
                Delivery::Event(stored) => {
                    assert_eq!((&*stored.event.name, stored.event.version.0), ("Paid", 3));
                    ids.push(stored.id.to_string());
                }
                other => panic!("{other:?}"),
            }
        }
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 20);
        assert!(tokio::time::timeout(Duration::from_millis(300), subscription.next()).await.is_err());
    }
    // A store of a node has a part of all this only, another one tomorrow.
    let part = first.store().subscribe(Filter::all()).open().await;
    assert!(part.err().unwrap().to_string().contains("Node::subscribe"));
    first.shutdown().await;
    second.shutdown().await;
}
