//! Entities leave memory, and stores end, without losing a message.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common;
use std::time::Duration;

use crate::common::{Ledger, assert_clean, directory, entered, until};
use futures_util::future::join_all;
use kuma_core::{AppendError, Kuma, Options, ReadError, Unavailable, Version};

/// Writers to many entities under the given options; every append that was acknowledged is there, in order, once.
async fn under_pressure(options: impl Fn(Options) -> Options, live_max: usize) {
    const WRITERS: u64 = 8;
    const APPENDS: u64 = 400;
    const ENTITIES: u64 = 100;
    let dir = directory();
    let kuma = Kuma::start(options(Options::new(dir.path()).shards(2))).await.unwrap();
    let writers = (0..WRITERS).map(|writer| {
        let kuma = kuma.clone();
        tokio::spawn(async move {
            let mut pending = Vec::new();
            for number in 0..APPENDS {
                let ledger = kuma.entity::<Ledger>(format!("l-{}", (writer * 7 + number * 13) % ENTITIES));
                pending.push(ledger.append(entered(writer * APPENDS + number)).submit().await.unwrap());
                if pending.len() == 10 {
                    join_all(pending.drain(..))
                        .await
                        .into_iter()
                        .for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
                }
            }
            join_all(pending).await.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
        })
    });
    join_all(writers).await.into_iter().for_each(|done| done.unwrap());
    until("idle entities have left memory", async || kuma.stats().live_entities() <= live_max).await;

    let (mut total, mut all) = (0, Vec::new());
    for number in 0..ENTITIES {
        let ledger = kuma.entity::<Ledger>(format!("l-{number}")).read().await.unwrap();
        assert_eq!(ledger.version().0, ledger.entries.len() as u64);
        for writer in 0..WRITERS {
            let own: Vec<u64> = ledger.entries.iter().copied().filter(|entry| entry / APPENDS == writer).collect();
            assert!(own.is_sorted(), "entity {number}: writer {writer} out of order: {own:?}");
        }
        total += ledger.version().0;
        all.extend_from_slice(&ledger.entries);
    }
    all.sort_unstable();
    assert_eq!((total, all), (WRITERS * APPENDS, (0..WRITERS * APPENDS).collect::<Vec<_>>()));
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_tiny_memory_budget_bounds_live_entities_and_loses_nothing() {
    // Room for 16 entities in each of two shards.
    under_pressure(|options| options.memory_budget(2 * 16 * (12 << 10)), 2 * 18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_tiny_idle_timeout_empties_memory_and_loses_nothing() {
    under_pressure(|options| options.idle_timeout(Duration::from_millis(1)), 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_entity_that_leaves_finishes_what_it_was_asked_and_what_comes_late_finds_the_next_one() {
    let dir = directory();
    let kuma = common::start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    let mut pending = Vec::new();
    for number in 0..2000 {
        match ledger.append(entered(number)).submit().await {
            Ok(append) => pending.push(append),
            Err(error) => panic!("{number}: {error}"),
        }
        if number % 50 == 0 {
            // Not awaited: it races with the appends that follow.
            let ledger = ledger.clone();
            tokio::spawn(async move { ledger.raw().passivate().await });
        }
        if pending.len() == 500 {
            for append in pending.drain(..) {
                append.await.unwrap();
            }
        }
    }
    // Everything that was submitted before is on the disk when this returns, though nobody awaited it.
    ledger.raw().passivate().await.unwrap();
    assert_eq!(kuma.stats().live_entities(), 0);
    assert_eq!(ledger.raw().events(.., usize::MAX).await.unwrap().len(), 2000);
    for append in pending {
        append.await.unwrap();
    }
    assert_eq!(ledger.read().await.unwrap().entries, (0..2000).collect::<Vec<_>>());
    assert_clean(&kuma).await;
}

fn is_shutting_down(error: &Unavailable) -> bool {
    matches!(error, Unavailable::ShuttingDown)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn shutdown_finishes_what_was_submitted_refuses_what_comes_later_and_frees_the_directory() {
    let dir = directory();
    let kuma = common::start(dir.path(), 2).await;
    let mut pending = Vec::new();
    for number in 0..500 {
        let ledger = kuma.entity::<Ledger>(format!("l-{}", number % 20));
        pending.push(ledger.append(entered(number)).submit().await.unwrap());
    }
    tokio::join!(kuma.shutdown(), kuma.shutdown());
    for append in pending {
        append.await.unwrap();
    }
    let ledger = kuma.entity::<Ledger>("l-1");
    match ledger.append(entered(1)).await {
        Err(AppendError::Unavailable(error)) => assert!(is_shutting_down(&error), "{error}"),
        other => panic!("{other:?}"),
    }
    match ledger.read().await {
        Err(ReadError::Unavailable(error)) => assert!(is_shutting_down(&error), "{error}"),
        other => panic!("{other:?}"),
    }
    // Nothing is left to be copied: the logs are gone. And the directory is free, though handles of the old store are still held.
    let left: Vec<String> = common::read_files(dir.path()).into_keys().filter(|name| name.contains("db-")).collect();
    assert!(left.is_empty(), "{left:?}");
    let again = common::start(dir.path(), 2).await;
    assert_eq!(again.verify(|_| {}).await.unwrap().totals(), (20, 500, 500));
    assert_clean(&again).await;
    again.shutdown().await;
    kuma.shutdown().await;
}

/// Appends race with the shutdown: each was written, or was refused and is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_append_that_races_with_shutdown_is_written_or_refused() {
    for _ in 0..20 {
        let dir = directory();
        let kuma = common::start(dir.path(), 2).await;
        let writers: Vec<_> = (0..8)
            .map(|writer| {
                let ledger = kuma.entity::<Ledger>(format!("l-{writer}"));
                tokio::spawn(async move {
                    let mut written = Vec::new();
                    for number in 0.. {
                        match ledger.append(entered(number)).await {
                            Ok(_) => written.push(number),
                            Err(AppendError::Unavailable(_)) => break,
                            Err(error) => panic!("{error:?}"),
                        }
                    }
                    written
                })
            })
            .collect();
        until("all have written something", async || kuma.stats().live_entities() == 8).await;
        kuma.shutdown().await;
        let written = join_all(writers).await;
        drop(kuma);
        let again = common::start(dir.path(), 2).await;
        for (writer, written) in written.into_iter().enumerate() {
            let ledger = again.entity::<Ledger>(format!("l-{writer}")).read().await.unwrap();
            assert_eq!(ledger.entries, written.unwrap(), "writer {writer}");
        }
        again.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn dropping_the_last_handle_frees_the_directory() {
    let dir = directory();
    let kuma = common::start(dir.path(), 2).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    let append = ledger.append(entered(1)).submit().await.unwrap();
    drop(kuma);
    assert!(Kuma::start(Options::new(dir.path())).await.is_err(), "a handle is still there");
    drop(ledger);
    let mut again = None;
    until("the directory is free", async || {
        again = Kuma::start(Options::new(dir.path())).await.ok();
        again.is_some()
    })
    .await;
    assert_eq!(append.await.unwrap(), Version(1));
    assert_eq!(again.unwrap().entity::<Ledger>("l-1").read().await.unwrap().entries, [1]);
}
