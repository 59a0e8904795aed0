//! What is kept in memory, and for how long.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::atomic::{AtomicI64, Ordering::SeqCst},
    time::Duration,
};

use common::{directory, until};
use kuma_core::{AppendError, Entity, Kuma, Metadata, NewEvent, Options, Refused};
use serde::{Deserialize, Deserializer, Serialize};

/// Events in memory.
static EVENTS: AtomicI64 = AtomicI64::new(0);

#[derive(Default, Clone, Serialize, Deserialize)]
struct Meter {
    sum: u64,
}

#[derive(Serialize)]
struct Reading(u64);

impl Reading {
    fn new(value: u64) -> Self {
        EVENTS.fetch_add(1, SeqCst);
        Reading(value)
    }
}

impl<'de> Deserialize<'de> for Reading {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u64::deserialize(deserializer).map(Reading::new)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        EVENTS.fetch_sub(1, SeqCst);
    }
}

#[derive(Serialize, Deserialize)]
enum MeterEvent {
    Read(Reading),
}

impl Entity for Meter {
    const KIND: &'static str = "meter";
    type Event = MeterEvent;
    fn apply(&mut self, MeterEvent::Read(reading): &MeterEvent) {
        self.sum += reading.0;
    }
}

/// An entity applies what became durable with its next message, and keeps the events until then. If there is none, somebody reminds it.
#[tokio::test(flavor = "multi_thread")]
async fn the_events_of_a_burst_leave_memory_although_nobody_asks_for_the_entity_again() {
    let dir = directory();
    let options = Options::new(dir.path()).shards(1).idle_timeout(Duration::from_secs(8));
    let kuma = Kuma::start(options).await.unwrap();
    let meter = kuma.entity::<Meter>("m-1");
    let mut pending = Vec::new();
    for value in 0..500 {
        pending.push(meter.append(MeterEvent::Read(Reading::new(value))).submit().await.unwrap());
    }
    for append in pending {
        append.await.unwrap();
    }
    until("the events leave memory", async || EVENTS.load(SeqCst) == 0).await;
    assert_eq!(kuma.stats().live_entities(), 1, "the entity itself stays for a while");
    assert_eq!(meter.read().await.unwrap().sum, (0..500).sum::<u64>());
    kuma.shutdown().await;
}

#[tokio::test]
async fn metadata_is_bounded() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1)).await.unwrap();
    let order = kuma.raw("order", "7");
    let placed = || NewEvent::json("Placed", &serde_json::json!({})).unwrap();
    let metadata = |bytes| Metadata { correlation: Some("c".repeat(bytes)), ..Metadata::default() };
    order.append(placed()).metadata(metadata(64 << 10)).await.unwrap();
    let refused = order.append(placed()).metadata(metadata((64 << 10) + 1)).await;
    assert!(matches!(refused, Err(AppendError::Refused(Refused::MetadataTooLarge { .. }))), "{refused:?}");
    assert_eq!(order.read().await.unwrap().1.0, 1);
    kuma.shutdown().await;
}

/// A hostile caller may make kinds up without end.
#[tokio::test]
async fn kinds_that_are_made_up_still_work_when_no_more_are_remembered() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1)).await.unwrap();
    for number in 0..5000 {
        assert!(kuma.raw(&format!("kind-{number}"), "1").hash().is_some());
    }
    let late = kuma.raw("kind-4999", "1");
    late.append(NewEvent::json("Made", &serde_json::json!({"up": true})).unwrap()).await.unwrap();
    assert_eq!(kuma.raw("kind-4999", "1").read().await.unwrap().0["up"], true);
    kuma.shutdown().await;
}
