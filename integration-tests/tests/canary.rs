//! Promise 5, in bytes: of an erased entity nothing is left in any file, and of a living one nothing can be read in any.
//!
//! Every id, header, idempotency key and payload has a canary in it. As the store runs, the sealed bytes of every entity are noted: its
//! commits, each of its snapshots, its id, its append keys, its key, wrapped and bare. After an erasure all files are searched for
//! them, whole or in part, where SQLite might have left a copy as well: in its log, in what pages do not use, in pages that are free.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/traces.rs"]
mod traces;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    error::Error,
    fmt,
    path::Path,
    sync::{Arc, OnceLock},
};

use common::{assert_clean, crash_copy, directory, until};
use futures_util::{TryStreamExt, future::join_all};
use integration_tests::seed;
use kuma_core::{
    Direction, Entity, Kuma, LocalMasterKey, MasterKey, MasterKeyError, MasterKeySource, Metadata, NewEvent, Options,
    RawHandle, Reason, RecordedEvent, Version,
};
use kuma_crypto::{BoxFuture, KekId, Secret32};
use metrics_util::debugging::{DebuggingRecorder, Snapshotter};
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tempfile::TempDir;
use traces::{TOKEN, Traces, slot_sums};
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, layer::Context, prelude::*, registry::LookupSpan};

/// Its state grows with every event, and so do its snapshots.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Diary {
    pages: Vec<String>,
}

#[derive(Serialize, Deserialize)]
enum DiaryEvent {
    Written { text: String, number: u64 },
}

impl Entity for Diary {
    const KIND: &'static str = "diary";
    type Event = DiaryEvent;

    fn apply(&mut self, DiaryEvent::Written { text, .. }: &DiaryEvent) {
        self.pages.push(text.chars().take(1500).collect());
    }
}

// ---- all that is said

/// Hears all spans and events of this process, at every level.
#[derive(Clone, Default)]
struct Ear(Arc<Mutex<String>>);

struct Words<'a>(&'a mut String);

impl Visit for Words<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.push_str(&format!("{}={value:?} ", field.name()));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.0.push_str(&format!("{}={value} {value:?} ", field.name()));
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Ear {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, _: &span::Id, _: Context<'_, S>) {
        let mut text = self.0.lock();
        text.push_str(attributes.metadata().name());
        attributes.record(&mut Words(&mut text));
        text.push('\n');
    }

    fn on_record(&self, _: &span::Id, values: &span::Record<'_>, _: Context<'_, S>) {
        values.record(&mut Words(&mut self.0.lock()));
    }

    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut text = self.0.lock();
        text.push_str(&format!("{} {} ", event.metadata().level(), event.metadata().target()));
        event.record(&mut Words(&mut text));
        text.push('\n');
    }
}

struct Heard {
    ear: Ear,
    metrics: Snapshotter,
}

/// Listens from the first call on, to all tests of this process.
fn listen() -> &'static Heard {
    static HEARD: OnceLock<Heard> = OnceLock::new();
    HEARD.get_or_init(|| {
        let ear = Ear::default();
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(ear.clone())).unwrap();
        let recorder = DebuggingRecorder::new();
        let metrics = recorder.snapshotter();
        recorder.install().unwrap();
        Heard { ear, metrics }
    })
}

/// An error as somebody may print it.
fn spoken(error: &(dyn Error + 'static)) -> String {
    let mut text = format!("{error} {error:?} {error:#?}");
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(" {cause} {cause:?}"));
        source = cause.source();
    }
    text
}

// ---- the master key

/// A provider whose wrapped keys have the lengths that it likes.
#[derive(Debug)]
struct Padding {
    key: LocalMasterKey,
    longest: u8,
}

impl Padding {
    fn new(key: LocalMasterKey, longest: u8) -> Arc<Self> {
        Arc::new(Padding { key, longest })
    }
}

impl MasterKey for Padding {
    fn current(&self) -> KekId {
        self.key.current()
    }

    fn wrap<'a>(&'a self, secret: &'a Secret32, aad: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>, MasterKeyError>> {
        Box::pin(async move {
            let mut wrapped = self.key.wrap(secret, aad).await?;
            let padding = rand::rng().random_range(0..=self.longest);
            wrapped.extend((0..padding).map(|_| rand::random::<u8>()));
            wrapped.push(padding);
            Ok(wrapped)
        })
    }

    fn unwrap<'a>(&'a self, wrapped: &'a [u8], aad: &'a [u8]) -> BoxFuture<'a, Result<Secret32, MasterKeyError>> {
        Box::pin(async move {
            let padding = usize::from(*wrapped.last().unwrap());
            self.key.unwrap(&wrapped[..wrapped.len() - 1 - padding], aad).await
        })
    }

    fn is_local(&self) -> bool {
        true
    }
}

// ---- the scene

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Who {
    kind: &'static str,
    id: String,
}

/// A store with people in it.
struct Scene {
    random: StdRng,
    dir: TempDir,
    kuma: Kuma,
    master: Arc<Padding>,
    keep_deleted_bytes: bool,
    traces: Traces,
    /// What was written to each.
    written: HashMap<Who, Vec<serde_json::Value>>,
    /// What was said in errors, receipts and exports of names.
    said: String,
}

fn reason() -> Reason {
    Reason::new("request 4711").by("support")
}

impl Scene {
    async fn new(seed: u64, longest: u8, keep_deleted_bytes: bool) -> Scene {
        listen();
        let dir = directory();
        let master = Padding::new(LocalMasterKey::generate(), longest);
        let kuma = Scene::start(dir.path(), &master, keep_deleted_bytes).await;
        Scene {
            random: StdRng::seed_from_u64(seed),
            dir,
            kuma,
            master,
            keep_deleted_bytes,
            traces: Traces::new(),
            written: HashMap::new(),
            said: String::new(),
        }
    }

    async fn start(path: &Path, master: &Arc<Padding>, keep_deleted_bytes: bool) -> Kuma {
        let options = Options::new(path).shards(2).snapshot_every(3, 1 << 20);
        let options = options.master_key(MasterKeySource::Provider(master.clone())).scrub_bytes_per_second(1 << 30);
        let kuma = Kuma::start(if keep_deleted_bytes { options.keep_deleted_bytes() } else { options }).await.unwrap();
        kuma.register::<Diary>().unwrap();
        kuma
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    async fn reopen(&mut self) {
        self.kuma.shutdown().await;
        self.kuma = Scene::start(self.dir.path(), &self.master, self.keep_deleted_bytes).await;
    }

    fn raw(&self, who: &Who) -> RawHandle {
        self.kuma.raw(who.kind, &who.id)
    }

    fn hash(&self, who: &Who) -> String {
        self.raw(who).hash().unwrap().to_hex()
    }

    /// Somebody with a canary in the name; some names are long, so that their rows are.
    fn somebody(&mut self, number: usize) -> Who {
        let kind = ["diary", "form"][number % 2];
        let long =
            if number.is_multiple_of(5) { "x".repeat(self.random.random_range(100..400)) } else { String::new() };
        Who { kind, id: format!("{TOKEN}-{number}-\"ü\"-{long}") }
    }

    fn random_text(&mut self, bytes: usize) -> String {
        let mut text = TOKEN.to_owned();
        while text.len() < bytes {
            text.push_str(&format!("{:016x}", self.random.random::<u64>()));
        }
        text.truncate(bytes.max(TOKEN.len()));
        text
    }

    fn random_bytes(&mut self) -> usize {
        match self.random.random_range(0..100) {
            0 => 300_000,
            1..8 => self.random.random_range(4_000..30_000),
            8..40 => self.random.random_range(200..2_000),
            _ => self.random.random_range(10..200),
        }
    }

    /// Sends appends to all of these, up to three each, at once, so that they share commits. Nobody waits for the answers yet.
    async fn send(&mut self, whom: &[Who]) -> Vec<kuma_core::Pending> {
        let mut pending = Vec::new();
        for who in whom {
            for _ in 0..self.random.random_range(1..=3) {
                let bytes = self.random_bytes();
                let data = json!({"text": self.random_text(bytes), "number": self.random.random::<u32>()});
                let handle = self.raw(who);
                let metadata = Metadata {
                    correlation: Some(self.random_text(20)),
                    causation: None,
                    headers: vec![(self.random_text(20), self.random_text(50))],
                };
                let key = self.random_text(40);
                let event = NewEvent::json("Written", &data).unwrap();
                let sent = handle.append(event).metadata(metadata).idempotency_key(key).submit().await;
                pending.push(sent.unwrap());
                self.written.entry(who.clone()).or_default().push(data);
            }
        }
        pending
    }

    async fn write(&mut self, whom: &[Who]) {
        join_all(self.send(whom).await).await.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
    }

    /// Rounds of appends, and what the files held after each.
    async fn live(&mut self, whom: &[Who], rounds: usize) {
        for _ in 0..rounds {
            let some: Vec<Who> = whom.iter().filter(|_| self.random.random_bool(0.8)).cloned().collect();
            self.write(&some).await;
            for who in whom.iter().step_by(7) {
                self.raw(who).passivate().await.unwrap();
            }
            self.note_all().await;
        }
    }

    async fn note_all(&mut self) {
        let (path, master) = (self.dir.path().to_owned(), self.master.clone());
        self.traces.note_all(&path, &*master).await;
    }

    /// Erases one, and looks.
    async fn erase(&mut self, who: &Who) {
        let receipt = self.raw(who).erase(reason()).await.unwrap();
        receipt.verify(&self.kuma.public_key()).unwrap();
        self.said.push_str(&format!("{receipt} {receipt:?}"));
        self.gone(who);
    }

    fn gone(&mut self, who: &Who) {
        let hash = self.hash(who);
        self.traces.look_for(&hash);
    }

    #[track_caller]
    fn assert_nothing_left(&self, when: &str) {
        self.traces.assert_none(self.dir.path(), when);
    }

    async fn content(&self, who: &Who) -> (Vec<RecordedEvent>, serde_json::Value, Version) {
        let handle = self.raw(who);
        let (state, version) = handle.read().await.unwrap();
        (handle.events(.., usize::MAX).await.unwrap(), state, version)
    }

    /// Whoever is not erased has what was written, and no more.
    async fn assert_all_there(&self, whom: &[Who]) {
        for who in whom {
            let (events, _, version) = self.content(who).await;
            let found: Vec<serde_json::Value> = events.iter().map(|event| event.json().unwrap()).collect();
            assert!(found == self.written[who], "{who:?}: {} events, {version}", events.len());
            assert_eq!(version.0 as usize, events.len());
        }
    }

    /// Does what is refused, and keeps the words.
    async fn provoke(&mut self, who: &Who) {
        let handle = self.raw(who);
        let event = || NewEvent::json("Written", &json!({"text": TOKEN, "number": 1})).unwrap();
        let mut said = String::new();
        let mut keep = |error: Option<&(dyn Error + 'static)>| said.push_str(&error.map(spoken).unwrap_or_default());
        keep(handle.append(event()).expecting(Version(999_999)).await.err().as_ref().map(|error| error as _));
        let key = format!("{TOKEN} again");
        keep(handle.append(event()).idempotency_key(&key).await.err().as_ref().map(|error| error as _));
        let other = NewEvent::json("Written", &json!({"text": "other", "number": 1})).unwrap();
        keep(handle.append(other).idempotency_key(&key).await.err().as_ref().map(|error| error as _));
        let large = NewEvent::json("Written", &json!({"text": TOKEN.repeat(100_000), "number": 1})).unwrap();
        keep(handle.append(large).await.err().as_ref().map(|error| error as _));
        for odd in [json!({"text": 1, "number": TOKEN}), json!({TOKEN: TOKEN}), json!(TOKEN), json!([TOKEN])] {
            let odd = NewEvent::json("Written", &odd).unwrap();
            keep(self.kuma.raw("diary", TOKEN).append(odd).await.err().as_ref().map(|error| error as _));
        }
        keep(self.kuma.raw(who.kind, TOKEN.repeat(50)).read().await.err().as_ref().map(|error| error as _));
        keep(handle.at_version(Version(999_999)).await.err().as_ref().map(|error| error as _));
        keep(handle.read().await.err().as_ref().map(|error| error as _));
        keep(handle.events(.., 9).await.err().as_ref().map(|error| error as _));
        keep(handle.outcome(&key).await.err().as_ref().map(|error| error as _));
        keep(handle.outcome(TOKEN.repeat(900)).await.err().as_ref().map(|error| error as _));
        keep(handle.erase(Reason::new("")).await.err().as_ref().map(|error| error as _));
        keep(handle.recreate(Reason::new("")).await.err().as_ref().map(|error| error as _));
        self.said.push_str(&said);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_byte_of_an_erased_entity_is_in_any_file_and_its_neighbours_are_untouched() {
    let mut scene = Scene::new(seed("canary"), 0, false).await;
    let victims: Vec<Who> = (0..36).map(|number| scene.somebody(number)).collect();
    let neighbours: Vec<Who> = (36..50).map(|number| scene.somebody(number)).collect();
    let all = [&victims[..], &neighbours].concat();
    scene.live(&all, 5).await;
    // One with a history of several steps.
    let long = victims[3].clone();
    for _ in 0..12 {
        scene.write(&vec![long.clone(); 30]).await;
        scene.note_all().await;
    }
    scene.reopen().await;
    scene.live(&all, 4).await;
    scene.provoke(&all[1].clone()).await;
    scene.provoke(&all[49].clone()).await;
    for who in [&all[1], &all[49]] {
        scene.written.get_mut(who).unwrap().push(json!({"text": TOKEN, "number": 1}));
    }

    // Sealed at rest; and the search finds what is there.
    scene.note_all().await;
    scene.assert_nothing_left("before any erasure, in clear");
    println!("{:?}", scene.traces.counts);
    assert!(scene.traces.counts["a commit"] > 1000 && scene.traces.counts["a snapshot"] > 150);
    scene.traces.look_for_everybody();
    let found: BTreeSet<(String, &str)> =
        scene.traces.in_files(scene.path()).into_iter().map(|trace| (trace.of, trace.what)).collect();
    for who in &all {
        let hash = scene.hash(who);
        for what in ["a commit", "a snapshot", "a sealed id", "an append key", "a wrapped key"] {
            assert!(found.contains(&(hash.clone(), what)), "{who:?}: {what} is not found while it is there");
        }
        assert!(!found.contains(&(hash, "a key")));
    }
    scene.traces.look_for_nobody();

    scene.kuma.shutdown().await;
    let before = slot_sums(scene.path());
    scene.reopen().await;
    let mut content = BTreeMap::new();
    for who in &neighbours {
        content.insert(who.id.clone(), scene.content(who).await);
    }

    // The first half: some in memory, some not, some with commits on their way.
    let (first, second) = victims.split_at(20);
    for (number, who) in first[..10].iter().enumerate() {
        let handle = scene.raw(who);
        match number % 3 {
            0 => assert!(handle.read().await.is_ok()),
            1 => handle.passivate().await.unwrap(),
            _ => {}
        }
        let pending = if number % 3 == 2 { scene.send(std::slice::from_ref(who)).await } else { Vec::new() };
        scene.erase(who).await;
        scene.assert_nothing_left(&format!("after erasure {number}, the store running"));
        for outcome in join_all(pending).await {
            let error = outcome.err();
            scene.said.push_str(&error.as_ref().map(|error| spoken(error)).unwrap_or_default());
        }
        scene.provoke(who).await;
    }
    let handles = first[10..].iter().map(|who| scene.raw(who)).collect::<Vec<_>>();
    let many = scene.kuma.erase_many(handles, reason(), |_, outcome| assert!(outcome.is_ok())).await.unwrap();
    assert_eq!((many.erased, many.failed), (10, 0));
    first[10..].iter().for_each(|who| scene.gone(who));
    scene.assert_nothing_left("after many at once");
    assert_clean(&scene.kuma).await;
    scene.kuma.shutdown().await;
    scene.assert_nothing_left("after a clean shutdown");
    let after = slot_sums(scene.path());
    scene.reopen().await;
    scene.assert_nothing_left("after reopening");

    let slot = |who: &Who| i64::from(kuma_core::slot_of(who.kind, &who.id).number());
    // The audit log has a slot of its own.
    let audit = i64::from(kuma_core::SLOTS);
    let touched: BTreeSet<i64> = first.iter().map(slot).chain([audit]).collect();
    for (slot, sum) in &before {
        assert_eq!(after[slot] == *sum, !touched.contains(slot), "slot {slot}");
    }
    for who in &neighbours {
        assert!(scene.content(who).await == content[&who.id], "{who:?}");
    }
    scene.assert_all_there(second).await;

    // Life goes on, in the same pages.
    scene.live(&[second, &neighbours].concat(), 2).await;
    scene.assert_nothing_left("after more appends");
    for _ in 0..5 {
        let large = json!({"text": scene.random_text(900_000), "number": 1});
        scene.raw(&neighbours[0]).append_all(vec![NewEvent::json("Written", &large).unwrap(); 4]).await.unwrap();
        scene.written.get_mut(&neighbours[0]).unwrap().extend(vec![large; 4]);
    }
    let checkpoints = async |kuma: &Kuma| kuma.stats().shards.iter().any(|shard| shard.writer.unwrap().checkpoints > 0);
    until("a checkpoint", async || checkpoints(&scene.kuma).await).await;
    scene.assert_nothing_left("after a checkpoint");
    scene.reopen().await;
    scene.note_all().await;

    // The rest, one after the other: whatever was copied when pages were filled and emptied would be found now.
    let mut rest = second.to_vec();
    rest.shuffle(&mut scene.random);
    for (number, who) in rest.iter().enumerate() {
        scene.note_all().await;
        scene.erase(who).await;
        scene.assert_nothing_left(&format!("after erasure {number} of the rest"));
        if number % 6 == 0 {
            scene.write(&neighbours).await;
        }
    }
    let crashed = crash_copy(scene.path());
    scene.traces.assert_none(crashed.path(), "as a crash would leave it");
    let (master, dead) = (scene.master.clone(), scene.kuma.clone());
    scene.kuma = Scene::start(crashed.path(), &master, false).await;
    scene.assert_all_there(&neighbours).await;
    assert_clean(&scene.kuma).await;
    assert_eq!(scene.kuma.erasures_unfinished(), 0);
    scene.kuma.shutdown().await;
    scene.traces.assert_none(crashed.path(), "after the crash");
    scene.kuma = dead;
    scene.assert_all_there(&neighbours).await;
    assert_clean(&scene.kuma).await;

    // Whatever was said: no canary, no key.
    for event in scene.kuma.audit_log().history(.., Direction::Forward).try_collect::<Vec<_>>().await.unwrap() {
        scene.said.push_str(&format!("{event:?} {}", event.json().unwrap()));
    }
    scene.kuma.shutdown().await;
    scene.assert_nothing_left("at the end");
    scene.traces.look_for_everybody();
    let heard = listen();
    let said = |what: &str, text: &str| {
        let found = scene.traces.in_bytes(text.as_bytes());
        let line = text.lines().find(|line| !scene.traces.in_bytes(line.as_bytes()).is_empty());
        let line = line.map(|line| line.chars().take(600).collect::<String>());
        assert!(found.is_empty(), "{what}: {found:?}: {line:?}");
    };
    let trace = heard.ear.0.lock().clone();
    println!("{} bytes of traces", trace.len());
    assert!(trace.contains("an entity was erased") && trace.contains("TRACE"));
    said("traces", &trace);
    let metrics: Vec<String> = heard
        .metrics
        .snapshot()
        .into_vec()
        .iter()
        .map(|(key, unit, help, _)| format!("{key:?} {unit:?} {help:?}"))
        .collect();
    assert!(metrics.len() > 10);
    said("metrics", &metrics.join("\n"));
    assert!(scene.said.contains("was erased and nothing of it is left"));
    said("errors, receipts and the audit log", &scene.said);
}

/// The kind of a document, read by code that takes its text for numbers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Form;

#[derive(Debug, Serialize, Deserialize)]
#[allow(dead_code)]
enum FormEvent {
    Written { text: Vec<u64> },
}

impl Entity for Form {
    const KIND: &'static str = "form";
    type Event = FormEvent;

    fn apply(&mut self, _: &FormEvent) {}
}

/// What serde says of data that does not fit quotes it. It went into the log, with the reason why the entity failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_the_code_cannot_read_is_not_quoted() {
    let mut scene = Scene::new(seed("canary, misread"), 0, false).await;
    let who = scene.somebody(1);
    scene.write(&vec![who.clone(); 3]).await;
    scene.reopen().await;
    scene.kuma.register::<Form>().unwrap();
    for _ in 0..5 {
        let error = scene.raw(&who).read().await.map(|_| ()).unwrap_err();
        scene.said.push_str(&spoken(&error));
    }
    assert_eq!(scene.kuma.stats().shards.iter().map(|shard| shard.quarantined).sum::<usize>(), 1);
    scene.kuma.verify(|_| {}).await.unwrap();
    scene.kuma.shutdown().await;
    let trace = listen().ear.0.lock().clone();
    assert!(trace.contains("an entity failed"));
    for text in [&trace, &scene.said] {
        assert!(
            scene.traces.in_bytes(text.as_bytes()).is_empty(),
            "{:?}",
            text.lines().find(|line| line.contains(TOKEN))
        );
    }
}

/// A key that was wrapped under three master keys leaves none of the three wrappings, be they of one length or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_was_rotated_leaves_none_of_its_wrappings() {
    for (longest, then) in [(0, 0), (0, 60), (60, 60)] {
        let mut scene = Scene::new(seed("canary, rotated"), longest, false).await;
        let all: Vec<Who> = (0..120).map(|number| scene.somebody(number)).collect();
        scene.write(&all).await;
        scene.note_all().await;
        for _ in 0..2 {
            let newer = LocalMasterKey::generate().with_older(scene.master.key.clone());
            scene.master = Padding::new(newer, then);
            scene.reopen().await;
            assert!(scene.kuma.rotate_master_key().await.unwrap() >= 120);
            scene.note_all().await;
        }
        assert!(scene.traces.counts["a wrapped key"] >= 360, "{:?}", scene.traces.counts);
        let mut order = all.clone();
        order.shuffle(&mut scene.random);
        let (some, others) = order.split_at(80);
        for some in some.chunks(10) {
            let handles: Vec<RawHandle> = some.iter().map(|who| scene.raw(who)).collect();
            scene.kuma.erase_many(handles, reason(), |_, outcome| assert!(outcome.is_ok())).await.unwrap();
            some.iter().for_each(|who| scene.gone(who));
            scene.assert_nothing_left(&format!("{longest} and {then} bytes longer"));
        }
        scene.assert_all_there(others).await;
        scene.reopen().await;
        scene.assert_all_there(others).await;
        assert_clean(&scene.kuma).await;
        scene.kuma.shutdown().await;
        scene.assert_nothing_left("at the end");
    }
}

/// The control: the same search finds what is deleted and not zeroed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_zeroing_the_same_search_finds_what_was_deleted() {
    let mut scene = Scene::new(seed("canary, the control"), 0, true).await;
    let all: Vec<Who> = (0..20).map(|number| scene.somebody(number)).collect();
    scene.live(&all, 4).await;
    let mut found = BTreeSet::new();
    for who in &all[..10] {
        scene.erase(who).await;
        found.extend(scene.traces.in_files(scene.path()).into_iter().map(|trace| trace.what));
    }
    scene.kuma.shutdown().await;
    found.extend(scene.traces.in_files(scene.path()).into_iter().map(|trace| trace.what));
    println!("found without zeroing: {found:?}");
    assert!(found.contains("a commit") && found.contains("a wrapped key"), "{found:?}");
}
