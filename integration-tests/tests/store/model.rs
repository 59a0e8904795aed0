//! Random sequences of all that an entity can be asked, compared step by step with a model that keeps a plain list of events.
//!
//! The model knows no disk and no time but its own. A write is decided by [`Model::step`]; whatever was in flight when the power went
//! is settled by looking: what is there must be a beginning of what was decided, no shorter than what was acknowledged.
//!
//! `KUMA_MODEL_CASES` sets how many sequences, `KUMA_SEED` where they start; a failure names the seed that repeats it alone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::common::{assert_clean, crash_copy, directory};
use futures_util::{StreamExt, TryStreamExt, future::BoxFuture, stream};
use integration_tests::seed;
use kuma_core::{
    AppendError, Change, Command, Diff, Direction, Entity, EraseError, ExecuteError, Handle, Kuma, Metadata, Options,
    Outcome, ReadError, Reason, Receipt, Refused, Version,
};
use power_loss::{Disk, PowerLoss};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tempfile::TempDir;

const STEPS: usize = 25;
const ENTITIES: usize = 3;

// ---- the entity

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Purse {
    balance: i64,
    /// Depends on the order of all events.
    order: u64,
    tags: BTreeMap<String, u64>,
    recent: Vec<i64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum PurseEvent {
    Put { amount: i64 },
    Taken { amount: i64 },
    Tagged { name: String, value: u64 },
    Cleared,
}

impl Entity for Purse {
    const KIND: &'static str = "purse";
    type Event = PurseEvent;

    fn apply(&mut self, event: &PurseEvent) {
        let number = match event {
            PurseEvent::Put { amount } => *amount,
            PurseEvent::Taken { amount } => -amount,
            PurseEvent::Tagged { value, .. } => *value as i64,
            PurseEvent::Cleared => 7,
        };
        self.order = self.order.wrapping_mul(31).wrapping_add(number.cast_unsigned());
        match event {
            PurseEvent::Put { .. } | PurseEvent::Taken { .. } => {
                self.balance += number;
                self.recent.insert(0, number);
                self.recent.truncate(4);
            }
            PurseEvent::Tagged { name, value } => {
                self.tags.insert(name.clone(), *value);
            }
            PurseEvent::Cleared => self.tags.clear(),
        }
    }
}

#[derive(Serialize)]
struct Take {
    amount: i64,
    #[serde(skip)]
    decisions: Arc<AtomicU64>,
}

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("short of {missing}")]
struct Short {
    missing: i64,
}

/// Nothing to do for 0; an even amount is taken in two halves.
fn take(balance: i64, amount: i64) -> Result<Vec<PurseEvent>, Short> {
    match (amount, balance - amount) {
        (0, _) => Ok(Vec::new()),
        (_, left) if left < 0 => Err(Short { missing: -left }),
        (amount, _) if amount % 2 == 0 => Ok(vec![PurseEvent::Taken { amount: amount / 2 }; 2]),
        (amount, _) => Ok(vec![PurseEvent::Taken { amount }]),
    }
}

impl Command<Purse> for Take {
    type Rejection = Short;

    fn decide(self, purse: &Purse) -> Result<Vec<PurseEvent>, Short> {
        self.decisions.fetch_add(1, SeqCst);
        take(purse.balance, self.amount)
    }
}

// ---- what is asked

#[derive(Clone, Debug, PartialEq)]
enum Content {
    Events(Vec<PurseEvent>),
    Take(i64),
}

/// A write as it is sent.
#[derive(Clone, Debug)]
struct Write {
    content: Content,
    key: Option<Vec<u8>>,
    expected: Option<u64>,
    correlation: Option<String>,
}

/// How a write ends.
#[derive(Clone, Debug, PartialEq)]
enum Ending {
    /// The version, the events of a command, and whether it had happened before.
    Done {
        version: u64,
        events: Option<Vec<PurseEvent>>,
        repeated: bool,
    },
    Rejected(i64),
    WrongVersion {
        expected: u64,
        actual: u64,
    },
    KeyReused {
        version: u64,
    },
    Erased,
    /// Nothing was written.
    Unavailable(String),
    /// It may have been written.
    Unknown(String),
}

impl From<AppendError> for Ending {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Refused(Refused::WrongVersion { expected, actual, .. }) => {
                Ending::WrongVersion { expected: expected.0, actual: actual.0 }
            }
            AppendError::Refused(Refused::KeyReused { version, .. }) => Ending::KeyReused { version: version.0 },
            AppendError::Refused(Refused::Erased { .. }) => Ending::Erased,
            AppendError::Refused(other) => panic!("{other:?}"),
            AppendError::Unavailable(error) => Ending::Unavailable(format!("{error:?}")),
            AppendError::Unknown { detail, .. } => Ending::Unknown(detail),
        }
    }
}

// ---- the model

#[derive(Clone, Debug, PartialEq)]
struct Recorded {
    event: PurseEvent,
    at_us: i64,
    correlation: Option<String>,
}

/// What a key was committed with.
#[derive(Clone, Debug)]
struct Keyed {
    content: Content,
    first: u64,
    last: u64,
}

/// One entity, as it should be.
#[derive(Clone, Debug, Default)]
struct Model {
    events: Vec<Recorded>,
    keys: BTreeMap<Vec<u8>, Keyed>,
    /// Every key that was ever sent, with what.
    sent: Vec<(Vec<u8>, Content)>,
    /// Lives before this one.
    former: u32,
    /// Since the last life ended, its receipt.
    erased: Option<Receipt>,
}

impl Model {
    fn version(&self) -> u64 {
        self.events.len() as u64
    }

    fn state(&self, version: u64) -> Purse {
        let mut purse = Purse::default();
        self.events[..version as usize].iter().for_each(|recorded| purse.apply(&recorded.event));
        purse
    }

    fn now(&self) -> Purse {
        self.state(self.version())
    }

    fn slice(&self, first: u64, last: u64) -> Vec<PurseEvent> {
        self.events[first as usize - 1..last as usize].iter().map(|recorded| recorded.event.clone()).collect()
    }

    /// Whether there is something that can be erased.
    fn is_written(&self) -> bool {
        self.former > 0 || self.version() > 0
    }

    fn erase(&mut self, receipt: Receipt) {
        (self.events, self.keys, self.erased) = (Vec::new(), BTreeMap::new(), Some(receipt));
    }

    /// Decides a write, and does what it says. `clock` is what the clock says.
    fn step(&mut self, write: &Write, clock: i64) -> Ending {
        if self.erased.is_some() {
            return Ending::Erased;
        }
        let is_command = matches!(write.content, Content::Take(_));
        if let Some(keyed) = write.key.as_ref().and_then(|key| self.keys.get(key)) {
            let Keyed { content, first, last } = keyed.clone();
            if content != write.content {
                return Ending::KeyReused { version: last };
            }
            let events = is_command.then(|| self.slice(first, last));
            return Ending::Done { version: last, events, repeated: true };
        }
        if let Some(expected) = write.expected.filter(|expected| *expected != self.version()) {
            return Ending::WrongVersion { expected, actual: self.version() };
        }
        let events = match &write.content {
            Content::Events(events) => events.clone(),
            Content::Take(amount) => match take(self.now().balance, *amount) {
                Ok(events) => events,
                Err(Short { missing }) => return Ending::Rejected(missing),
            },
        };
        let first = self.version() + 1;
        let at_us = self.events.last().map_or(clock, |last| last.at_us.max(clock));
        let correlation = &write.correlation;
        self.events.extend(events.iter().map(|event| Recorded {
            event: event.clone(),
            at_us,
            correlation: correlation.clone(),
        }));
        let last = self.version();
        if let Some(key) = write.key.clone().filter(|_| !events.is_empty()) {
            self.keys.insert(key, Keyed { content: write.content.clone(), first, last });
        }
        Ending::Done { version: last, events: is_command.then_some(events), repeated: false }
    }
}

// ---- the world

struct World {
    random: StdRng,
    clock: Arc<AtomicI64>,
    shards: u16,
    power: PowerLoss,
    kuma: Kuma,
    data: PathBuf,
    /// Directories and stores that were left behind; these end at the end.
    left_behind: Vec<(TempDir, Option<Kuma>)>,
    models: Vec<Model>,
    decisions: Arc<AtomicU64>,
    keys: u64,
    trace: Vec<String>,
}

/// On its way.
type Pending = BoxFuture<'static, Ending>;

fn time(us: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(us.max(0).unsigned_abs())
}

async fn open(data: &Path, shards: u16, power: &PowerLoss, clock: &Arc<AtomicI64>) -> Kuma {
    let clock = clock.clone();
    let options = Options::new(data).shards(shards).vfs(power.vfs_name()).snapshot_every(3, 1 << 20);
    Kuma::start(options.wall_clock(move || time(clock.load(SeqCst)))).await.unwrap()
}

impl World {
    async fn new(seed: u64) -> World {
        let mut random = StdRng::seed_from_u64(seed);
        let (clock, shards) = (Arc::new(AtomicI64::new(1_700_000_000_000_000)), random.random_range(1..=2));
        let (dir, power) = (directory(), PowerLoss::register(Disk::Honest));
        let data = dir.path().to_owned();
        let kuma = open(&data, shards, &power, &clock).await;
        let models = vec![Model::default(); ENTITIES];
        World {
            random,
            clock,
            shards,
            power,
            kuma,
            data,
            left_behind: vec![(dir, None)],
            models,
            decisions: Arc::default(),
            keys: 0,
            trace: Vec::new(),
        }
    }

    fn handle(&self, entity: usize) -> Handle<Purse> {
        self.kuma.entity(format!("purse-{entity}"))
    }

    fn note(&mut self, what: impl Into<String>) {
        self.trace.push(what.into());
    }

    fn random_events(&mut self) -> Vec<PurseEvent> {
        let random = &mut self.random;
        let count = random.random_range(1..=5);
        let event = |_| match random.random_range(0..10) {
            0..5 => PurseEvent::Put { amount: random.random_range(1..50) },
            5..7 => PurseEvent::Taken { amount: random.random_range(1..10) },
            7..9 => PurseEvent::Tagged {
                name: ["a", "b/c", "d~e", ""][random.random_range(0..4)].into(),
                value: random.random_range(0..3),
            },
            _ => PurseEvent::Cleared,
        };
        (0..count).map(event).collect()
    }

    fn random_content(&mut self) -> Content {
        match self.random.random_range(0..5) {
            0..3 => Content::Events(self.random_events()),
            _ => Content::Take(self.random.random_range(0..60)),
        }
    }

    /// A write to an entity of which the model is at `version`. Every third has a key, and every other of those one that was used.
    fn random_write(&mut self, entity: usize, version: u64) -> Write {
        let mut content = self.random_content();
        let mut key = None;
        let sent = self.models[entity].sent.len();
        match self.random.random_range(0..12) {
            0..2 => {
                self.keys += 1;
                key = Some(format!("key {}", self.keys).into_bytes());
            }
            2..6 if sent > 0 => {
                // Rather a new one: it may be in flight.
                let newest = sent - self.random.random_range(1..=sent.min(4));
                let index = if self.random.random() { newest } else { self.random.random_range(0..sent) };
                let (used, with) = self.models[entity].sent[index].clone();
                key = Some(used);
                // The same content, mostly.
                if self.random.random_range(0..4) > 0 {
                    content = with;
                }
            }
            _ => {}
        }
        if let Some(key) = &key {
            self.models[entity].sent.push((key.clone(), content.clone()));
        }
        let expected = match self.random.random_range(0..6) {
            0 => Some(version),
            1 => Some(version.wrapping_add(self.random.random_range(1..3))),
            2 if version > 0 => Some(version - 1),
            _ => None,
        };
        let correlation = self.random.random_bool(0.2).then(|| format!("correlation {}", self.keys));
        Write { content, key, expected, correlation }
    }

    async fn submit(&self, entity: usize, write: &Write) -> Pending {
        let handle = self.handle(entity);
        let metadata = write
            .correlation
            .clone()
            .map(|correlation| Metadata { correlation: Some(correlation), ..Metadata::default() });
        match &write.content {
            Content::Events(events) => {
                let mut append = handle.append_all(events.clone());
                if let Some(expected) = write.expected {
                    append = append.expecting(Version(expected));
                }
                if let Some(metadata) = metadata {
                    append = append.metadata(metadata);
                }
                if let Some(key) = &write.key {
                    append = append.idempotency_key(key);
                }
                let pending = append.submit().await;
                Box::pin(async move {
                    let appended = match pending {
                        Ok(pending) => pending.appended().await,
                        Err(error) => Err(error),
                    };
                    match appended {
                        Ok(done) => Ending::Done { version: done.version.0, events: None, repeated: done.repeated },
                        Err(error) => error.into(),
                    }
                })
            }
            Content::Take(amount) => {
                let mut execute = handle.execute(Take { amount: *amount, decisions: self.decisions.clone() });
                if let Some(expected) = write.expected {
                    execute = execute.expecting(Version(expected));
                }
                if let Some(metadata) = metadata {
                    execute = execute.metadata(metadata);
                }
                if let Some(key) = &write.key {
                    execute = execute.idempotency_key(key);
                }
                let pending = execute.submit().await;
                Box::pin(async move {
                    let executed = match pending {
                        Ok(pending) => pending.executed().await,
                        Err(error) => Err(error.into()),
                    };
                    match executed {
                        Ok(done) => Ending::Done {
                            version: done.version().0,
                            repeated: done.is_repeated(),
                            events: Some(done.into_events()),
                        },
                        Err(ExecuteError::Rejected(Short { missing })) => Ending::Rejected(missing),
                        Err(ExecuteError::Failed(error)) => error.into(),
                    }
                })
            }
        }
    }

    fn clock(&self) -> i64 {
        self.clock.load(SeqCst)
    }

    /// Sends one write, which must end as the model says; one that had happened before must not be decided again.
    async fn write(&mut self, entity: usize, write: &Write) {
        let clock = self.clock();
        let expected = self.models[entity].step(write, clock);
        self.note(format!("{entity}: {write:?} -> {expected:?}"));
        let decided = self.decisions.load(SeqCst);
        let ending = self.submit(entity, write).await.await;
        assert_eq!(ending, expected, "{entity}: {write:?}");
        let is_decided = matches!(write.content, Content::Take(_))
            && matches!(expected, Ending::Done { repeated: false, .. } | Ending::Rejected(_));
        assert_eq!(self.decisions.load(SeqCst) - decided, u64::from(is_decided), "decisions of {write:?}");
    }

    /// Several writes, sent before any of them is answered.
    async fn batch(&mut self, end: BatchEnd) {
        let before = self.models.clone();
        let clock = self.clock();
        let count = self.random.random_range(2..=9);
        if let BatchEnd::PowerCut { after, seed } = end {
            self.power.cut_after(after, seed);
        }
        let mut sent: Vec<Vec<(Write, Ending, Pending)>> = Vec::new();
        sent.resize_with(ENTITIES, Vec::new);
        let mut leaving = Vec::new();
        for _ in 0..count {
            let entity = self.random.random_range(0..ENTITIES);
            let version = self.models[entity].version();
            let write = self.random_write(entity, version);
            let expected = self.models[entity].step(&write, clock);
            self.note(format!("{entity}: in flight ({end:?}): {write:?} -> {expected:?}"));
            let pending = self.submit(entity, &write).await;
            sent[entity].push((write, expected, pending));
            if end == BatchEnd::Passivate && self.random.random_bool(0.3) {
                let handle = self.handle(entity);
                leaving.push(tokio::spawn(async move { handle.raw().passivate().await }));
            }
        }
        let mut ended: Vec<Vec<(Write, Ending, Ending)>> = Vec::new();
        for sent in sent {
            let mut endings = Vec::new();
            for (write, expected, pending) in sent {
                endings.push((write, expected, pending.await));
            }
            ended.push(endings);
        }
        for left in leaving {
            left.await.unwrap().unwrap();
        }
        if let BatchEnd::PowerCut { seed, .. } = end {
            self.power.cut(seed);
            self.kuma.shutdown().await;
            self.power = PowerLoss::register(Disk::Honest);
            self.kuma = open(&self.data, self.shards, &self.power, &self.clock).await;
            for (entity, ended) in ended.into_iter().enumerate() {
                self.settle(entity, before[entity].clone(), ended, clock).await;
            }
            return;
        }
        for (write, expected, ending) in ended.into_iter().flatten() {
            assert_eq!(ending, expected, "{write:?}");
        }
    }

    /// After a power cut: what is there is a beginning of what was decided and holds what was told. Then each write with a key is
    /// sent again, and happens once.
    async fn settle(&mut self, entity: usize, before: Model, ended: Vec<(Write, Ending, Ending)>, clock: i64) {
        if self.models[entity].erased.is_some() {
            assert!(
                ended.iter().all(|(.., ending)| matches!(ending, Ending::Erased | Ending::Unavailable(_))),
                "{ended:?}"
            );
            return self.assert_erased(entity).await;
        }
        let history = self.history(entity).await;
        let sent = std::mem::take(&mut self.models[entity].sent);
        let (mut model, mut there, mut missing) = (before, Vec::new(), false);
        for (write, _, ending) in &ended {
            let mut after = model.clone();
            let decided = after.step(write, clock);
            let is_commit = after.version() > model.version();
            missing |= is_commit && after.version() > history.len() as u64;
            match ending {
                // Whoever was told anything about the state was told of one that is on the disk: the one that was in flight, or,
                // where that failed, the one before.
                Ending::Done { .. }
                | Ending::Rejected(_)
                | Ending::WrongVersion { .. }
                | Ending::KeyReused { .. }
                | Ending::Erased => {
                    assert!(!(missing && is_commit), "{entity}: told of {ending:?} for {write:?}, which is not there");
                    assert_eq!(*ending, decided, "{entity}: {write:?}");
                }
                Ending::Unavailable(why) => {
                    assert!(missing || !is_commit, "{entity}: {write:?} is there, told that it is not: {why}");
                }
                Ending::Unknown(_) => {}
            }
            if !missing {
                model = after;
            }
            there.push(!missing && is_commit);
        }
        assert_eq!(history, model.events, "{entity}: what is there is not a beginning of what was decided");
        model.sent = sent;
        self.models[entity] = model;
        self.note(format!("{entity}: after the cut {there:?} are there"));
        for (write, ..) in ended.iter().filter(|(write, ..)| write.key.is_some()) {
            self.write(entity, &Write { expected: None, ..write.clone() }).await;
        }
    }

    async fn assert_erased(&self, entity: usize) {
        let handle = self.handle(entity);
        let erased =
            |error: ReadError| assert!(matches!(error, ReadError::Refused(Refused::Erased { .. })), "{error:?}");
        erased(handle.read().await.map(|_| ()).unwrap_err());
        erased(handle.raw().events(.., 1).await.map(|_| ()).unwrap_err());
        erased(handle.at_version(Version(0)).await.map(|_| ()).unwrap_err());
        erased(handle.outcome("key 1").await.map(|_| ()).unwrap_err());
        erased(handle.diff(Version(0), Version(0)).await.map(|_| ()).unwrap_err());
    }

    /// Erases the entity, with writes on their way, or the power going.
    async fn erase(&mut self, entity: usize) {
        let (handle, model) = (self.handle(entity), self.models[entity].clone());
        let cut = self.random.random_bool(0.2).then(|| (self.random.random_range(1..60), self.random.random()));
        self.note(format!("{entity}: erase, cut after {cut:?}"));
        let mut pending = Vec::new();
        if cut.is_none() && model.is_written() && model.erased.is_none() {
            let mut after = model.clone();
            for _ in 0..self.random.random_range(0..4) {
                let write = self.random_write(entity, after.version());
                let expected = after.step(&write, self.clock());
                self.note(format!("{entity}: in flight: {write:?} -> {expected:?}"));
                pending.push((expected, self.submit(entity, &write).await));
            }
        }
        if let Some((after, seed)) = cut {
            self.power.cut_after(after, seed);
        }
        let outcome = handle.erase(Reason::new("the model")).await;
        for (expected, pending) in pending {
            let ending = pending.await;
            assert!(ending == expected || ending == Ending::Erased, "{ending:?} where {expected:?} was expected");
        }
        if let Some((_, seed)) = cut {
            self.power.cut(seed);
            self.kuma.shutdown().await;
            self.power = PowerLoss::register(Disk::Honest);
            self.kuma = open(&self.data, self.shards, &self.power, &self.clock).await;
            if outcome.is_err()
                && !matches!(self.handle(entity).read().await, Err(ReadError::Refused(Refused::Erased { .. })))
            {
                assert!(
                    !matches!(&outcome, Err(EraseError::Unfinished { detail, .. }) if !detail.contains("not known")),
                    "{outcome:?}"
                );
                return self.note("it had not begun");
            }
            // Whatever had begun completes by itself.
            let deadline = Instant::now() + Duration::from_secs(20);
            while self.kuma.erasures_unfinished() > 0 {
                assert!(Instant::now() < deadline, "waited in vain for the erasure");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        let again = self.handle(entity).erase(Reason::new("again")).await;
        let model = &mut self.models[entity];
        match (outcome, again) {
            (Err(EraseError::Refused(Refused::NeverWritten { .. })), _) => assert!(!model.is_written()),
            (Ok(receipt), Ok(again)) => {
                assert_eq!(receipt, again);
                assert_eq!(receipt.receipt.life, Some(model.former + 1));
                assert!(model.erased.as_ref().is_none_or(|before| *before == receipt), "{receipt:?}");
                model.erase(receipt);
            }
            (Err(_), Ok(receipt)) if cut.is_some() => model.erase(receipt),
            other => panic!("{other:?}"),
        }
    }

    async fn recreate(&mut self, entity: usize) {
        self.note(format!("{entity}: recreate"));
        let outcome = self.handle(entity).recreate(Reason::new("the model")).await;
        let model = &mut self.models[entity];
        match outcome {
            Ok(life) => {
                assert!(model.erased.take().is_some());
                model.former += 1;
                assert_eq!(life, model.former + 1);
            }
            Err(EraseError::Refused(Refused::NotErased { .. })) => assert!(model.erased.is_none()),
            Err(error) => panic!("{error:?}"),
        }
    }

    async fn history(&self, entity: usize) -> Vec<Recorded> {
        let events: Vec<_> = self.handle(entity).history(.., Direction::Forward).try_collect().await.unwrap();
        (1..)
            .zip(events)
            .map(|(version, event)| {
                assert_eq!(event.version, Version(version));
                let at_us = event.at.duration_since(UNIX_EPOCH).unwrap().as_micros() as i64;
                let correlation = event.metadata.clone().and_then(|metadata| metadata.correlation);
                Recorded { event: event.decode::<Purse>().unwrap(), at_us, correlation }
            })
            .collect()
    }

    async fn reopen(&mut self) {
        self.kuma.shutdown().await;
        self.kuma = open(&self.data, self.shards, &self.power, &self.clock).await;
    }

    /// The process dies, all that it was asked being answered; what it leaves is opened elsewhere.
    async fn crash(&mut self) {
        let copy = crash_copy(&self.data);
        self.power = PowerLoss::register(Disk::Honest);
        self.data = copy.path().to_owned();
        let dead = std::mem::replace(&mut self.kuma, open(copy.path(), self.shards, &self.power, &self.clock).await);
        self.left_behind.push((copy, Some(dead)));
    }

    async fn step(&mut self) {
        let entity = self.random.random_range(0..ENTITIES);
        if self.models[entity].erased.is_some() && self.random.random_bool(0.2) {
            self.recreate(entity).await;
        }
        match self.random.random_range(0..100) {
            0..45 => {
                let version = self.models[entity].version();
                let write = self.random_write(entity, version);
                self.write(entity, &write).await;
            }
            45..61 => self.batch(BatchEnd::Await).await,
            61..67 => self.batch(BatchEnd::Passivate).await,
            67..70 => {
                let (after, seed) = (self.random.random_range(1..14), self.random.random());
                self.batch(BatchEnd::PowerCut { after, seed }).await;
            }
            70..78 => {
                self.note(format!("{entity} leaves"));
                self.handle(entity).raw().passivate().await.unwrap();
            }
            78..81 => {
                self.note("reopen");
                self.reopen().await;
            }
            81..84 => {
                self.note("crash");
                self.crash().await;
            }
            84..87 => self.erase(entity).await,
            87..89 => self.recreate(entity).await,
            89..94 => {
                let by = [-30_000_000_000, -1, 0, 1, 5, 1_000_000, 86_400_000_000][self.random.random_range(0..7)];
                self.note(format!("the clock moves by {by}"));
                self.clock.fetch_add(by, SeqCst);
            }
            94..96 => assert_clean(&self.kuma).await,
            _ => self.check(entity).await,
        }
        if self.models[entity].erased.is_some() {
            return self.assert_erased(entity).await;
        }
        let (model, purse) = (&self.models[entity], self.handle(entity).read().await.unwrap());
        assert_eq!((purse.version().0, &*purse), (model.version(), &model.now()), "{entity}: the state");
    }

    /// Everything that can be asked about one entity.
    async fn check(&mut self, entity: usize) {
        self.note(format!("check {entity}"));
        let (handle, model) = (self.handle(entity), self.models[entity].clone());
        if let Some(receipt) = &model.erased {
            assert_eq!(self.kuma.receipt(receipt.receipt.id).await.unwrap().as_ref(), Some(receipt));
            receipt.verify(&self.kuma.public_key()).unwrap();
            return self.assert_erased(entity).await;
        }
        let newest = model.version();
        assert_eq!(self.history(entity).await, model.events);
        assert!(model.events.is_sorted_by_key(|recorded| recorded.at_us));
        for version in 0..=newest {
            let then = handle.at_version(Version(version)).await.unwrap();
            assert_eq!((then.version().0, &*then), (version, &model.state(version)), "{entity} at version {version}");
        }
        let beyond = handle.at_version(Version(newest + 1)).await.unwrap_err();
        assert!(
            matches!(&beyond, kuma_core::ReadError::Refused(Refused::NoSuchVersion { asked, newest: found, .. })
                if (asked.0, found.0) == (newest + 1, newest)),
            "{beyond:?}"
        );
        let times: BTreeSet<i64> =
            model.events.iter().flat_map(|recorded| [-1, 0, 1].map(|by| recorded.at_us + by)).collect();
        for us in times.into_iter().chain([0, self.clock()]) {
            let version = model.events.partition_point(|recorded| recorded.at_us <= us) as u64;
            let then = handle.at(time(us)).await.unwrap();
            assert_eq!((then.version().0, &*then), (version, &model.state(version)), "{entity} at {us}");
        }
        for _ in 0..4 {
            let (a, b) = (self.random.random_range(0..=newest + 2), self.random.random_range(0..=newest + 2));
            let (first, last) = (a.min(b), a.max(b));
            let expected: Vec<u64> = (1..=newest).filter(|version| (first..=last).contains(version)).collect();
            let versions = async |direction| {
                let events: Vec<_> = handle.history(first..=last, direction).try_collect().await.unwrap();
                for event in &events {
                    let recorded = &model.events[event.version.0 as usize - 1];
                    assert_eq!(event.decode::<Purse>().unwrap(), recorded.event);
                    assert_eq!(event.at, time(recorded.at_us));
                }
                events.iter().map(|event| event.version.0).collect::<Vec<_>>()
            };
            assert_eq!(versions(Direction::Forward).await, expected, "{entity}: {first}..={last}");
            let backward: Vec<u64> = expected.iter().rev().copied().collect();
            assert_eq!(versions(Direction::Backward).await, backward, "{entity}: {first}..={last} backward");
            let (from, to) = (a.min(newest), b.min(newest));
            let diff = handle.diff(Version(from), Version(to)).await.unwrap();
            let (before, after) = (to_json(&model.state(from)), to_json(&model.state(to)));
            assert_eq!(patched(before, &diff), after, "{entity}: {from} to {to}: {diff}");
        }
        for (key, _) in &model.sent {
            let expected =
                model.keys.get(key).map_or(Outcome::NeverSeen, |keyed| Outcome::Committed(Version(keyed.last)));
            assert_eq!(handle.outcome(key).await.unwrap(), expected, "{entity}: {}", String::from_utf8_lossy(key));
        }
        assert_eq!(handle.outcome("never sent").await.unwrap(), Outcome::NeverSeen);
        assert_eq!(handle.raw().read().await.unwrap(), (to_json(&model.now()), Version(newest)));
    }

    async fn end(mut self) {
        for entity in 0..ENTITIES {
            self.check(entity).await;
        }
        self.reopen().await;
        for entity in 0..ENTITIES {
            self.check(entity).await;
        }
        assert_clean(&self.kuma).await;
        self.kuma.shutdown().await;
        for (_, dead) in &self.left_behind {
            if let Some(dead) = dead {
                dead.shutdown().await;
            }
        }
    }
}

/// What led to a failure.
impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.trace.join("\n"));
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BatchEnd {
    Await,
    /// Entities are sent away in between.
    Passivate,
    /// The power goes at the n-th write or sync from now.
    PowerCut {
        after: u64,
        seed: u64,
    },
}

fn to_json(purse: &Purse) -> Value {
    serde_json::to_value(purse).unwrap()
}

/// Makes the changes of a diff, one after the other.
fn patched(mut state: Value, diff: &Diff) -> Value {
    for Change { path, before, after } in &diff.changes {
        let Some((parent, name)) = path.rsplit_once('/') else {
            assert_eq!(before.as_ref(), Some(&state));
            state = after.clone().unwrap();
            continue;
        };
        let name = name.replace("~1", "/").replace("~0", "~");
        let there = match state.pointer_mut(parent).unwrap() {
            Value::Object(fields) => match after {
                Some(after) => fields.insert(name, after.clone()),
                None => fields.remove(&name),
            },
            Value::Array(items) => {
                let index: usize = name.parse().unwrap();
                match (before, after) {
                    (None, Some(after)) => {
                        items.insert(index, after.clone());
                        None
                    }
                    (_, Some(after)) => Some(std::mem::replace(&mut items[index], after.clone())),
                    (_, None) => Some(items.remove(index)),
                }
            }
            other => panic!("{path} in {other}"),
        };
        assert_eq!(there, *before, "{path}");
    }
    state
}

async fn run_case(seed: u64) {
    let mut world = World::new(seed).await;
    for _ in 0..STEPS {
        world.step().await;
    }
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_asked_in_whatever_order_the_store_answers_as_the_model_does() {
    let cases: u64 =
        std::env::var("KUMA_MODEL_CASES").map_or(64, |text| text.parse().expect("KUMA_MODEL_CASES is a number"));
    let first = seed("model");
    // They wait for disks and after power cuts most of the time.
    let done = stream::iter(first..first + cases).map(|seed| async move { (seed, tokio::spawn(run_case(seed)).await) });
    let failed: Vec<u64> = done
        .buffer_unordered(6)
        .filter_map(|(seed, outcome)| async move { outcome.is_err().then_some(seed) })
        .collect()
        .await;
    assert!(failed.is_empty(), "repeat with KUMA_MODEL_CASES=1 and one of KUMA_SEED={failed:?}");
}
