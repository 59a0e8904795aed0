//! Promise 8 in the background: what rots is found before anybody needs it, and concerns its entity alone.
#![allow(clippy::unwrap_used)]

use crate::common::{Ledger, directory, entered, until};
use kuma_core::{EntityHash, Kuma, Options, ReadError, Unavailable};

const ENTITIES: u64 = 20;
const EVENTS: u64 = 12;

fn options(path: &std::path::Path) -> Options {
    Options::new(path).shards(1).snapshot_every(5, u64::MAX).scrub_bytes_per_second(0)
}

fn id(number: u64) -> String {
    format!("ledger-{number}")
}

async fn fill(kuma: &Kuma) -> Vec<EntityHash> {
    let mut hashes = Vec::new();
    for number in 0..ENTITIES {
        let ledger = kuma.entity::<Ledger>(id(number));
        for event in 0..EVENTS {
            ledger.append(entered(event)).await.unwrap();
        }
        hashes.push(ledger.raw().hash().unwrap());
    }
    hashes
}

/// Flips a bit in the body of an entity's commit, in a store that is closed.
fn rot(path: &std::path::Path, entity: EntityHash, version: u64) {
    let file = rusqlite::Connection::open(path.join("shard-000.db")).unwrap();
    let select = "SELECT position, body FROM log JOIN entity USING (eid) WHERE id_hash = ? AND version = ?";
    let (position, mut body): (i64, Vec<u8>) =
        file.query_row(select, (entity.0.to_vec(), version as i64), |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    let middle = body.len() / 2;
    body[middle] ^= 0x10;
    assert_eq!(file.execute("UPDATE log SET body = ? WHERE position = ?", (body, position)).unwrap(), 1);
}

/// A snapshot hides the rotten commit from everybody who uses the entity; the scrub finds it all the same.
#[tokio::test(flavor = "multi_thread")]
async fn the_scrub_finds_a_rotten_commit_and_quarantines_its_entity_alone() {
    let dir = directory();
    let kuma = Kuma::start(options(dir.path())).await.unwrap();
    let hashes = fill(&kuma).await;
    kuma.shutdown().await;
    let victim = 7;
    rot(dir.path(), hashes[victim as usize], 2);

    let kuma = Kuma::start(options(dir.path())).await.unwrap();
    let read = kuma.entity::<Ledger>(id(victim)).read().await.unwrap();
    assert_eq!(read.version().0, EVENTS, "its snapshot is newer than the rotten commit");
    kuma.shutdown().await;

    let kuma = Kuma::start(options(dir.path()).scrub_bytes_per_second(1 << 40)).await.unwrap();
    until("the scrub has been through everything", async || kuma.stats().scrub.passes == 1).await;
    let scrub = kuma.stats().scrub;
    assert_eq!((scrub.bad_rows, scrub.commits), (1, ENTITIES * EVENTS - 1));
    let handle = kuma.entity::<Ledger>(id(victim));
    until("the entity is quarantined", async || {
        matches!(handle.read().await, Err(ReadError::Unavailable(Unavailable::Quarantined { .. })))
    })
    .await;
    assert!(handle.append(entered(99)).await.unwrap_err().is_retry_safe());
    for neighbour in (0..ENTITIES).filter(|number| *number != victim) {
        let neighbour = kuma.entity::<Ledger>(id(neighbour));
        assert_eq!(neighbour.append(entered(99)).await.unwrap().0, EVENTS + 1);
    }
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_names_the_entity_and_the_slot_of_a_rotten_commit_and_quarantines_it() {
    let dir = directory();
    let kuma = Kuma::start(options(dir.path())).await.unwrap();
    let hashes = fill(&kuma).await;
    let slot = kuma_core::slot_of("ledger", &id(3));
    kuma.shutdown().await;
    rot(dir.path(), hashes[3], 4);

    let kuma = Kuma::start(options(dir.path())).await.unwrap();
    let mut progress = 0;
    let found = kuma.verify(|commits| progress = commits).await.unwrap();
    assert!(!found.is_clean());
    // The rotten commit, and that the next one does not follow what can be read.
    let bad: Vec<_> = found.bad_entities().collect();
    assert!(!bad.is_empty() && bad.iter().all(|(entity, _)| *entity == Some(hashes[3])), "{bad:?}");
    let report = found.shards[0].outcome.as_ref().unwrap();
    assert_eq!(report.bad_slots, [slot]);
    assert_eq!(progress, ENTITIES * EVENTS - bad.len() as u64);
    let read = kuma.entity::<Ledger>(id(3)).read().await;
    assert!(matches!(read, Err(ReadError::Unavailable(Unavailable::Quarantined { .. }))), "{read:?}");
    assert_eq!(kuma.stats().shards[0].quarantined, 1);
    kuma.shutdown().await;
}

/// What a store holds is listed by name, so that the code that is to read it can be tested against the list.
#[tokio::test]
async fn verify_counts_events_by_kind_name_and_schema() {
    let dir = directory();
    let kuma = Kuma::start(options(dir.path())).await.unwrap();
    fill(&kuma).await;
    let names = kuma.verify(|_| {}).await.unwrap().event_names;
    let names: Vec<_> = names.into_iter().map(|(name, count)| (name.kind, name.name, name.schema, count)).collect();
    assert_eq!(names, [("ledger".to_owned(), "Entered".to_owned(), 1, ENTITIES * EVENTS)]);
    kuma.shutdown().await;
}
