//! Promise 3 where the log's index is concerned: new commits are noted in memory and written to the index many at a time. Wherever an
//! entity's commits stand, it is read whole.
// A failed unwrap is a failed promise.
#![allow(clippy::unwrap_used)]

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
};

use kuma_core::{Kuma, NewEvent, Options, RawHandle};

/// More commits than are noted before the index is written, twice over.
const COMMITS: u64 = 20_000;
const ENTITIES: u64 = 10;

async fn start(path: &std::path::Path) -> Kuma {
    Kuma::start(Options::new(path).shards(1)).await.unwrap()
}

fn event(number: u64) -> NewEvent {
    NewEvent::json("Numbered", &serde_json::json!({ "number": number })).unwrap()
}

/// Every event up to the newest, each in its place.
async fn read_whole(handle: &RawHandle) -> u64 {
    let events = handle.events(.., usize::MAX).await.unwrap();
    for (place, event) in events.iter().enumerate() {
        assert_eq!(event.version.0, place as u64 + 1);
        assert_eq!(event.json().unwrap()["number"], place as u64 + 1);
    }
    events.len() as u64
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entity_is_read_whole_while_its_commits_move_to_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let kuma = start(dir.path()).await;
    let each = COMMITS / ENTITIES;
    let done = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    let mut readers = Vec::new();
    for entity in 0..ENTITIES {
        let handle = kuma.raw("thing", format!("thing-{entity}"));
        let acked = Arc::new(AtomicU64::new(0));
        let (writer, told) = (handle.clone(), acked.clone());
        writers.push(tokio::spawn(async move {
            let mut waiting = std::collections::VecDeque::new();
            for number in 1..=each {
                waiting.push_back(writer.append(event(number)).submit().await.unwrap());
                if waiting.len() >= 32 {
                    told.store(waiting.pop_front().unwrap().await.unwrap().0, SeqCst);
                }
            }
            for pending in waiting {
                told.store(pending.await.unwrap().0, SeqCst);
            }
        }));
        let done = done.clone();
        readers.push(tokio::spawn(async move {
            let mut reads = 0;
            while !done.load(SeqCst) {
                let least = acked.load(SeqCst);
                assert!(read_whole(&handle).await >= least, "an acknowledged event was not read");
                reads += 1;
            }
            reads
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    done.store(true, SeqCst);
    let mut reads = 0;
    for reader in readers {
        reads += reader.await.unwrap();
    }
    println!("{reads} whole reads while {COMMITS} commits were written");
    assert!(reads > 0);
    for entity in 0..ENTITIES {
        let handle = kuma.raw("thing", format!("thing-{entity}"));
        assert_eq!(read_whole(&handle).await, each);
        // Ranges that begin in the index and end behind it, and the other way round.
        for range in [1..3, each / 2..each / 2 + 5, each - 2..each + 1] {
            let versions: Vec<u64> =
                handle.events(range.clone(), usize::MAX).await.unwrap().iter().map(|event| event.version.0).collect();
            assert_eq!(versions, range.collect::<Vec<_>>());
        }
    }
    let before = kuma.verify(|_| {}).await.unwrap();
    assert!(before.is_clean(), "{before:?}");
    kuma.shutdown().await;
    let kuma = start(dir.path()).await;
    for entity in 0..ENTITIES {
        let handle = kuma.raw("thing", format!("thing-{entity}"));
        assert_eq!(read_whole(&handle).await, each);
        assert_eq!(handle.append(event(each + 1)).await.unwrap().0, each + 1);
    }
    assert!(kuma.verify(|_| {}).await.unwrap().is_clean());
    kuma.shutdown().await;
}
