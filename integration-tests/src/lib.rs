//! What the tests of promises share: an entity whose events say where they belong, an oracle of what was promised, and a judge that
//! compares the two.
//!
//! Each test append has an id of its own, and every event of it carries that id, its place and the size of the append, with a
//! filler that follows from them. So whatever is found in a store can be told apart: there, whole, unaltered, in its place; or not.
// This is test code that happens to be a library: a failed unwrap is a failed promise.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod cluster_child;
pub mod tally;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kuma_core::{AppendError, Entity, Kuma, Options, RecordedEvent, Version};
use serde::{Deserialize, Serialize};

/// An entity that counts its events and adds up what is in them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// How many events.
    pub events: u64,
    /// The sum of what they say.
    pub sum: u64,
}

/// The event of a [`Probe`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProbeEvent {
    /// One event of a [`TestAppend`].
    Noted(Note),
}

/// Where an event belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The id of its append.
    pub append: u64,
    /// Its place in the append, from 0.
    pub index: u32,
    /// How many events the append has.
    pub of: u32,
    /// Follows from `append` and `index`.
    pub filler: String,
}

impl Entity for Probe {
    const KIND: &'static str = "probe";
    type Event = ProbeEvent;

    fn apply(&mut self, ProbeEvent::Noted(note): &ProbeEvent) {
        self.events += 1;
        self.sum = self.sum.wrapping_add(mix(note.append, note.index));
    }
}

/// An append as a test makes it. Its events follow from these three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TestAppend {
    /// Unique in its store.
    pub id: u64,
    /// How many events.
    pub events: u32,
    /// The length of each event's filler.
    pub bytes: u32,
}

impl TestAppend {
    /// The events.
    pub fn events(self) -> Vec<ProbeEvent> {
        (0..self.events).map(|index| ProbeEvent::Noted(self.note(index))).collect()
    }

    fn note(self, index: u32) -> Note {
        let mut filler = format!("{:016x}", mix(self.id, index)).repeat(self.bytes.div_ceil(16) as usize);
        filler.truncate(self.bytes as usize);
        Note { append: self.id, index, of: self.events, filler }
    }
}

/// The finaliser of SplitMix64.
fn mix(append: u64, index: u32) -> u64 {
    let mut x = append.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(index) << 17);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What callers were told. An append whose outcome nobody was told (or was told to be unknown) may be there or not.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    entities: BTreeMap<String, Told>,
}

#[derive(Clone, Debug, Default)]
struct Told {
    /// With the version of the last event.
    acked: Vec<(TestAppend, Version)>,
    /// "Nothing was written."
    not_written: BTreeSet<u64>,
}

impl Oracle {
    /// The entity may have events; it is judged although nothing was acknowledged yet.
    pub fn touch(&mut self, entity: &str) {
        if !self.entities.contains_key(entity) {
            self.entities.insert(entity.to_owned(), Told::default());
        }
    }

    /// A caller was told how its append ended.
    pub fn told(&mut self, entity: &str, append: TestAppend, outcome: &Result<Version, AppendError>) {
        self.touch(entity);
        match outcome {
            Ok(version) => self.acked(entity, append, *version),
            Err(AppendError::Refused(_) | AppendError::Unavailable(_)) => {
                self.entities.get_mut(entity).unwrap().not_written.insert(append.id);
            }
            Err(AppendError::Unknown { .. }) => {}
        }
    }

    /// A caller was told that its append is durable, and that its last event is `last`.
    pub fn acked(&mut self, entity: &str, append: TestAppend, last: Version) {
        self.touch(entity);
        self.entities.get_mut(entity).unwrap().acked.push((append, last));
    }

    /// What callers were told of all others.
    pub fn without(&self, entities: &BTreeSet<String>) -> Oracle {
        let mut others = self.clone();
        others.entities.retain(|entity, _| !entities.contains(entity));
        others
    }

    /// How many appends were acknowledged.
    pub fn acks(&self) -> usize {
        self.entities.values().map(|told| told.acked.len()).sum()
    }

    /// How many appends were said not to be written.
    pub fn not_written(&self) -> usize {
        self.entities.values().map(|told| told.not_written.len()).sum()
    }

    /// Compares what callers were told with what the store holds, and lets the store verify itself.
    pub async fn judge(&self, kuma: &Kuma) -> Findings {
        let mut findings = Findings::default();
        for (entity, told) in &self.entities {
            let handle = kuma.entity::<Probe>(entity);
            let events = match handle.raw().events(1.., usize::MAX).await {
                Ok(events) => events,
                Err(error) => {
                    findings.unreadable.push(format!("{entity}: {error}"));
                    continue;
                }
            };
            findings.events += events.len() as u64;
            findings.look(entity, told, &events);
            match handle.read().await {
                Ok(now) if now.version().0 == events.len() as u64 && *now == fold(&events) => {}
                Ok(now) => findings.wrong.push(format!("{entity}: its state is {now:?}, of {} events", events.len())),
                Err(error) => findings.unreadable.push(format!("{entity}: {error}")),
            }
        }
        match kuma.verify(|_| ()).await {
            Ok(report) if report.is_clean() => {}
            Ok(report) => findings.unreadable.push(format!("verify: {report:?}")),
            Err(error) => findings.unreadable.push(format!("verify: {error}")),
        }
        findings
    }
}

fn note(event: &RecordedEvent) -> Option<Note> {
    (event.name == "Noted").then(|| rmp_serde::from_slice(&event.data).ok()).flatten()
}

fn fold(events: &[RecordedEvent]) -> Probe {
    let mut probe = Probe::default();
    events.iter().filter_map(note).for_each(|note| probe.apply(&ProbeEvent::Noted(note)));
    probe
}

/// What a judge found. All lists are empty if every promise was kept.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Events that are there.
    pub events: u64,
    /// Acknowledged appends that are not there as they were acknowledged, without an error that says so.
    pub lost: Vec<String>,
    /// Appends that are there although their caller was told that nothing was written; events that nobody appended; halves.
    pub wrong: Vec<String>,
    /// What could not be read, with the typed error, and what `verify` says. A loss that was noticed stands here.
    pub unreadable: Vec<String>,
}

impl Findings {
    /// Whether every promise was kept.
    pub fn is_clean(&self) -> bool {
        self.lost.is_empty() && self.wrong.is_empty() && self.unreadable.is_empty()
    }

    /// # Panics
    /// If a promise was not kept.
    #[track_caller]
    pub fn assert_clean(&self, context: impl std::fmt::Display) {
        let Findings { events, lost, wrong, unreadable } = self;
        assert!(
            self.is_clean(),
            "{context}: {events} events there\n lost: {lost:#?}\n wrong: {wrong:#?}\n unreadable: {unreadable:#?}"
        );
    }

    fn look(&mut self, entity: &str, told: &Told, events: &[RecordedEvent]) {
        let mut found = BTreeMap::new();
        let mut at = 0;
        while let Some(first) = events.get(at) {
            let version = at as u64 + 1;
            let Some(first) = note(first) else {
                self.wrong.push(format!("{entity}: version {version} is no event of a test"));
                at += 1;
                continue;
            };
            let append = TestAppend { id: first.append, events: first.of, bytes: first.filler.len() as u32 };
            let end = at + append.events as usize;
            let whole = (0..append.events).all(|index| {
                let event = events.get(at + index as usize);
                event.is_some_and(|event| {
                    event.version.0 == version + u64::from(index) && note(event).as_ref() == Some(&append.note(index))
                })
            });
            if !whole {
                self.wrong
                    .push(format!("{entity}: {append:?} at version {version} is not whole, in place and unaltered"));
            }
            if found.insert(append.id, (append, Version(end as u64))).is_some() {
                self.wrong.push(format!("{entity}: {append:?} is there twice"));
            }
            at = end.max(at + 1);
        }
        for acked in &told.acked {
            if found.get(&acked.0.id) != Some(acked) {
                self.lost.push(format!("{entity}: {acked:?} was acknowledged, found {:?}", found.get(&acked.0.id)));
            }
        }
        for id in told.not_written.iter().filter(|id| found.contains_key(id)) {
            self.wrong.push(format!("{entity}: append {id} is there, its caller was told that it is not"));
        }
    }
}

/// Options for a small store in `directory`: two shards, so that there is more than one writer.
pub fn options(directory: &Path) -> Options {
    Options::new(directory).shards(2)
}

/// Opens or creates the store that [`options`] describes.
///
/// # Panics
/// If it cannot be opened.
pub async fn start(directory: &Path) -> Kuma {
    Kuma::start(options(directory)).await.unwrap_or_else(|error| panic!("{}: {error:?}", directory.display()))
}

/// A seed for this run, printed; `KUMA_SEED` (or `POWER_LOSS_SEED`) repeats one.
pub fn seed(test: &str) -> u64 {
    let given = std::env::var("KUMA_SEED").or_else(|_| std::env::var("POWER_LOSS_SEED"));
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 % 1_000_000_000;
    let seed = given.map_or_else(|_| now(), |text| text.parse().expect("a seed is a number"));
    println!("{test}: KUMA_SEED={seed}");
    seed
}

/// How many of so many cases of chance a run looks at: a quarter, or with `KUMA_THOROUGH` all of them. Each run takes others, by its seed.
pub fn cases(all: u64) -> u64 {
    match std::env::var_os("KUMA_THOROUGH") {
        Some(_) => all,
        None => all.div_ceil(4),
    }
}

/// Tries until it gets an answer.
///
/// # Panics
/// If there is none within `deadline`.
pub async fn eventually<T>(what: &str, deadline: Duration, mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(answer) = attempt().await {
            return answer;
        }
        assert!(since.elapsed() < deadline, "{what}: not within {deadline:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
