//! The entity that is loaded, and payloads that can be made again from where they stand.
//!
//! Each event of an entity has a **stamp**, counted from 1, and its payload follows from the entity and the stamp alone. An entity
//! with one writer has `stamp == version`; where writers share an entity, their stamps meet the versions in any order.

use std::{
    collections::HashSet,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use anyhow::{Context, Result, bail, ensure};
use kuma_core::{Entity, Handle, Kuma};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::progress::Progress;

/// A payload begins with its stamp, so it has at least these bytes.
pub(crate) const PAYLOAD_BYTES_MIN: u32 = 8;
/// Payloads are windows into this many random bytes: making one is a copy, and no two commits hold the same bytes.
const POOL_BYTES: usize = 1 << 16;
/// Events that are read back at once.
const PAGE_EVENTS: usize = 4096;

/// How many events there were, and a checksum of both ends of each payload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) events: u64,
    checksum: u64,
}

#[derive(Serialize, Deserialize)]
pub(crate) enum LoadEvent {
    Loaded(ByteBuf),
}

impl Load {
    fn add(&mut self, payload: &[u8]) {
        let word = |bytes: Option<&[u8; 8]>| bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let ends = word(payload.first_chunk()) ^ word(payload.last_chunk()).rotate_left(32);
        self.events += 1;
        self.checksum = (self.checksum.rotate_left(5) ^ ends).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl Entity for Load {
    const KIND: &'static str = "load";
    type Event = LoadEvent;

    fn apply(&mut self, LoadEvent::Loaded(payload): &LoadEvent) {
        self.add(payload);
    }
}

/// The handle of entity `number`.
pub(crate) fn handle(kuma: &Kuma, number: u64) -> Handle<Load> {
    kuma.entity(id(number))
}

fn id(number: u64) -> String {
    format!("entity-{number:09}")
}

/// Makes payloads.
pub(crate) struct Payloads {
    pool: Vec<u8>,
    bytes: usize,
}

impl Payloads {
    pub(crate) fn new(bytes: u32) -> Self {
        let bytes = bytes.max(PAYLOAD_BYTES_MIN) as usize;
        let words = (POOL_BYTES + bytes).div_ceil(8) as u64;
        Payloads { pool: (0..words).flat_map(|word| mix(word).to_le_bytes()).collect(), bytes }
    }

    /// The payload of this event.
    pub(crate) fn of(&self, entity: u64, stamp: u64) -> ByteBuf {
        let mut payload = self.window(mix(entity) ^ stamp).to_vec();
        if let Some(first) = payload.first_chunk_mut() {
            *first = (stamp ^ mix(entity)).to_le_bytes();
        }
        ByteBuf::from(payload)
    }

    /// The events with these stamps.
    pub(crate) fn events(&self, entity: u64, stamps: std::ops::Range<u64>) -> impl Iterator<Item = LoadEvent> {
        stamps.map(move |stamp| LoadEvent::Loaded(self.of(entity, stamp)))
    }

    /// Random bytes as long as a payload, from a place that `number` decides.
    pub(crate) fn window(&self, number: u64) -> &[u8] {
        let start = mix(number) as usize % POOL_BYTES;
        self.pool.get(start..start + self.bytes).unwrap_or_default()
    }

    fn stamp(entity: u64, payload: &[u8]) -> Option<u64> {
        Some(u64::from_le_bytes(*payload.first_chunk()?) ^ mix(entity))
    }
}

/// The stamps that were given out, for each entity.
pub(crate) struct Stamps(Vec<AtomicU64>);

impl Stamps {
    pub(crate) fn new(entities: u64) -> Self {
        Stamps((0..entities).map(|_| AtomicU64::new(0)).collect())
    }

    /// The next `count` stamps of an entity.
    pub(crate) fn take(&self, entity: u64, count: u64) -> std::ops::Range<u64> {
        let first = self.0.get(entity as usize).map_or(0, |given| given.fetch_add(count, Relaxed)) + 1;
        first..first + count
    }

    pub(crate) fn given(&self, entity: u64) -> u64 {
        self.0.get(entity as usize).map_or(0, |given| given.load(Relaxed))
    }

    pub(crate) fn entities(&self) -> u64 {
        self.0.len() as u64
    }

    pub(crate) fn total(&self) -> u64 {
        self.0.iter().map(|given| given.load(Relaxed)).sum()
    }
}

/// Reads a whole store back: `verify`, then each event and each state through handles.
///
/// # Errors
/// Anything is missing, is too much or differs.
pub(crate) async fn check(
    kuma: &Kuma,
    stamps: &Stamps,
    payloads: &Payloads,
    shared: bool,
    progress: &Progress,
) -> Result<()> {
    progress.phase("verify", 0);
    let found = kuma.verify(|_| {}).await.context("the store cannot be verified")?;
    ensure!(found.is_clean(), "verify found damage: {found:?}");
    let (entities, _, events) = found.totals();
    ensure!(entities == stamps.entities(), "{entities} entities are stored, {} were written", stamps.entities());
    ensure!(events == stamps.total(), "{events} events are stored, {} were written", stamps.total());
    progress.phase("read back", events);
    for entity in 0..stamps.entities() {
        check_entity(kuma, entity, stamps.given(entity), payloads, shared)
            .await
            .with_context(|| format!("{} is not what was written", id(entity)))?;
        progress.add(stamps.given(entity));
    }
    Ok(())
}

async fn check_entity(kuma: &Kuma, entity: u64, events: u64, payloads: &Payloads, shared: bool) -> Result<()> {
    let handle = handle(kuma, entity);
    let mut folded = Load::default();
    let mut seen = HashSet::new();
    loop {
        let page = handle.raw().events(folded.events + 1.., PAGE_EVENTS).await?;
        if page.is_empty() {
            break;
        }
        for event in page {
            let version = event.version.0;
            ensure!(version == folded.events + 1, "version {version} follows {}", folded.events);
            ensure!(event.name == "Loaded", "version {version} is a {:?}", event.name);
            let payload: ByteBuf = rmp_serde::from_slice(&event.data).with_context(|| format!("version {version}"))?;
            let Some(stamp) = Payloads::stamp(entity, &payload) else { bail!("version {version} has no stamp") };
            ensure!(shared || stamp == version, "version {version} holds what was written as {stamp}");
            ensure!((1..=events).contains(&stamp), "version {version} holds {stamp}, which was never written");
            ensure!(!shared || seen.insert(stamp), "version {version} holds {stamp} a second time");
            ensure!(payload == payloads.of(entity, stamp), "the payload of version {version} differs");
            folded.add(&payload);
        }
    }
    ensure!(folded.events == events, "{} events are stored, {events} were written", folded.events);
    let current = handle.read().await?;
    ensure!(current.version().0 == events, "it is at version {}, expected {events}", current.version());
    ensure!(*current == folded, "its state is {:?}, its events give {folded:?}", *current);
    Ok(())
}

/// SplitMix64's finaliser: a cheap bijection that looks random. <https://prng.di.unimi.it/splitmix64.c>
pub(crate) fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_follows_from_its_entity_and_stamp_alone() {
        let payloads = [Payloads::new(200), Payloads::new(200)];
        assert_eq!(payloads[0].of(7, 1), payloads[1].of(7, 1));
        assert_eq!(payloads[0].of(7, 1).len(), 200);
        assert_ne!(payloads[0].of(7, 1), payloads[0].of(7, 2));
        assert_ne!(payloads[0].of(7, 1), payloads[0].of(8, 1));
        assert_eq!(Payloads::stamp(7, &payloads[0].of(7, 42)), Some(42));
        assert_eq!(Payloads::new(PAYLOAD_BYTES_MIN).of(7, 1).len(), 8);
    }

    #[test]
    fn stamps_are_dense_from_one() {
        let stamps = Stamps::new(2);
        assert_eq!([stamps.take(1, 1), stamps.take(1, 3), stamps.take(0, 1)], [1..2, 2..5, 1..2]);
        assert_eq!((stamps.given(1), stamps.total()), (4, 5));
    }

    /// A lost event, an altered one and one too many each end the run with an error.
    #[tokio::test]
    async fn a_store_that_differs_does_not_pass_the_check() {
        let (directory, payloads, stamps) = (tempfile::tempdir().unwrap(), Payloads::new(32), Stamps::new(1));
        let kuma = Kuma::start(kuma_core::Options::new(directory.path()).shards(1)).await.unwrap();
        let entity = handle(&kuma, 0);
        entity.append_all(payloads.events(0, stamps.take(0, 3))).await.unwrap();
        let check = async |stamps: &Stamps| check(&kuma, stamps, &payloads, false, &Progress::hidden()).await;
        check(&stamps).await.unwrap();
        let missing = stamps.take(0, 1);
        assert_eq!(check(&stamps).await.unwrap_err().to_string(), "3 events are stored, 4 were written");
        entity.append_all(payloads.events(1, missing)).await.unwrap();
        let error = format!("{:#}", check(&stamps).await.unwrap_err());
        assert!(
            error.starts_with("entity-000000000 is not what was written: version 4 holds what was written as"),
            "{error}"
        );
        kuma.shutdown().await;
    }
}
