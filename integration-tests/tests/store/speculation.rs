//! An entity decides on what is not yet on the disk. When the disk refuses, nothing of that future is left: no commit that was
//! decided on it, no answer, no state that anyone has read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::common::{Ledger, assert_clean, directory, entered, until};
use kuma_core::{AppendError, Handle, Kuma, NotWritten, Options, Unavailable, Version};
use power_loss::{Disk, Errno, Fault, PowerLoss};
use tokio::sync::mpsc;

/// A store with one ledger that has one entry, on a disk that can be made to fail.
struct Fixture {
    disk: PowerLoss,
    kuma: Kuma,
    ledger: Handle<Ledger>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    async fn new() -> Fixture {
        let dir = directory();
        let disk = PowerLoss::register(Disk::Honest);
        let kuma = Kuma::start(Options::new(dir.path()).shards(1).vfs(disk.vfs_name())).await.unwrap();
        let ledger = kuma.entity::<Ledger>("l-1");
        ledger.append(entered(0)).await.unwrap();
        // A neighbour in the same file, its key made while the disk is well.
        kuma.entity::<Ledger>("l-2").append(entered(0)).await.unwrap();
        disk.only_files_matching(|path| path.to_string_lossy().ends_with("shard-000.db-wal"));
        Fixture { disk, kuma, ledger, _dir: dir }
    }

    async fn entries(&self) -> Vec<u64> {
        self.kuma.entity::<Ledger>("l-1").read().await.unwrap().entries.clone()
    }
}

fn not_written(outcome: Result<Version, AppendError>) -> NotWritten {
    match outcome {
        Err(AppendError::Unavailable(Unavailable::NotWritten { cause, .. })) => cause,
        other => panic!("{other:?}"),
    }
}

async fn what_was_decided_on_a_failed_commit_is_void(fault: Fault, error: Errno) {
    let fixture = Fixture::new().await;
    let Fixture { disk, kuma, ledger, .. } = &fixture;
    disk.sync_takes(Duration::from_millis(100));
    disk.fail_nth(fault, 1, error);
    let c1 = ledger.append(entered(1)).submit().await.unwrap();
    let c2 = ledger.append(entered(2)).submit().await.unwrap();
    // Right only if c1 and c2 come true; they do not.
    let c3 = ledger.append(entered(3)).expecting(Version(3)).submit().await.unwrap();
    // Wrong on what was decided on; but that was a future that did not come, and on the true state it would be right.
    let stale = ledger.append(entered(4)).expecting(Version(1)).submit().await.unwrap();
    let c1 = not_written(c1.await);
    match error {
        Errno::Full => assert!(matches!(c1, NotWritten::DiskFull { .. }), "{c1:?}"),
        Errno::Io => assert!(matches!(c1, NotWritten::Io { .. }), "{c1:?}"),
    }
    for outcome in [c2.await, c3.await, stale.await] {
        let cause = not_written(outcome);
        assert!(matches!(cause, NotWritten::Voided | NotWritten::Io { .. } | NotWritten::DiskFull { .. }), "{cause:?}");
    }
    assert_eq!(fixture.entries().await, [0]);
    assert_eq!(ledger.append(entered(5)).expecting(Version(1)).await.unwrap(), Version(2));
    assert_eq!(fixture.entries().await, [0, 5]);
    assert_eq!(kuma.entity::<Ledger>("l-2").append(entered(1)).await.unwrap(), Version(2), "the neighbour");
    assert_eq!(disk.counts().faults_injected, 1);
    assert_clean(kuma).await;
    kuma.shutdown().await;
}

#[tokio::test]
async fn what_was_decided_on_a_commit_whose_write_failed_is_void() {
    what_was_decided_on_a_failed_commit_is_void(Fault::Write, Errno::Io).await;
}

#[tokio::test]
async fn what_was_decided_on_a_commit_whose_sync_failed_is_void() {
    what_was_decided_on_a_failed_commit_is_void(Fault::Sync, Errno::Io).await;
}

#[tokio::test]
async fn what_was_decided_on_a_commit_that_found_no_space_is_void() {
    what_was_decided_on_a_failed_commit_is_void(Fault::Write, Errno::Full).await;
}

/// c2 is submitted while c1's group is being synced, so that it would be a group of its own, on a disk that is well again.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_later_group_does_not_carry_what_was_decided_on_a_failed_one() {
    let fixture = Fixture::new().await;
    let Fixture { disk, kuma, ledger, .. } = &fixture;
    disk.sync_takes(Duration::from_millis(300));
    disk.fail_nth(Fault::Sync, 1, Errno::Io);
    let c1 = ledger.append(entered(1)).submit().await.unwrap();
    until("the sync of c1 has begun", async || disk.counts().syncs_in_flight > 0).await;
    let c2 = ledger.append(entered(2)).submit().await.unwrap();
    let stale = ledger.append(entered(3)).expecting(Version(1)).submit().await.unwrap();
    // Another handle does not wait for the disk, and sees nothing of what is on its way.
    assert_eq!(fixture.entries().await, [0]);
    let neighbour = kuma.entity::<Ledger>("l-2");
    let neighbour = neighbour.append(entered(1)).submit().await.unwrap();
    assert!(matches!(not_written(c1.await), NotWritten::Io { .. }));
    assert_eq!(not_written(c2.await), NotWritten::Voided);
    assert_eq!(not_written(stale.await), NotWritten::Voided);
    assert_eq!(neighbour.await.unwrap(), Version(2), "a neighbour in the group after the failed one");
    assert_eq!(ledger.append(entered(4)).await.unwrap(), Version(2));
    assert_eq!(fixture.entries().await, [0, 4]);
    assert_clean(kuma).await;
    kuma.shutdown().await;
}

/// A refusal that was right is still given, once what it was decided on is durable.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_refusal_waits_for_the_state_it_was_decided_on() {
    let fixture = Fixture::new().await;
    let Fixture { disk, ledger, .. } = &fixture;
    disk.sync_takes(Duration::from_millis(300));
    let c1 = ledger.append(entered(1)).submit().await.unwrap();
    until("the sync of c1 has begun", async || disk.counts().syncs_in_flight > 0).await;
    let stale = ledger.append(entered(2)).expecting(Version(1)).submit().await.unwrap();
    let refused = stale.await.unwrap_err();
    assert!(refused.to_string().contains("is at version 2, expected 1"), "{refused}");
    assert_eq!(disk.counts().syncs_in_flight, 0, "it was answered before c1 was on the disk");
    assert_eq!(c1.await.unwrap(), Version(2));
}

/// A disk that fails every few syncs, writers that go on, readers that look all the time: what was read was acknowledged or will
/// be, and what was refused was never read.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_ever_reads_what_was_not_written() {
    let fixture = Fixture::new().await;
    let Fixture { disk, kuma, .. } = &fixture;
    let done = Arc::new(AtomicBool::new(false));
    let reader = tokio::spawn({
        let (done, ledger) = (done.clone(), kuma.entity::<Ledger>("l-1"));
        async move {
            let mut seen: Vec<u64> = Vec::new();
            while !done.load(Relaxed) {
                // Between a failed sync and the next checkpoint nothing can be read.
                if let Ok(ledger) = ledger.read().await {
                    assert!(ledger.entries.starts_with(&seen), "{:?} after {seen:?}", ledger.entries);
                    seen = ledger.entries.clone();
                }
                tokio::task::yield_now().await;
            }
            seen
        }
    });
    disk.sync_takes(Duration::from_millis(1));
    let ledger = kuma.entity::<Ledger>("l-1");
    let (mut written, mut refused) = (vec![0], 0);
    for round in 0..30 {
        disk.fail_nth(Fault::Sync, 2, Errno::Io);
        let mut pending = Vec::new();
        for number in round * 10 + 1..round * 10 + 8 {
            pending.push((number, ledger.append(entered(number)).submit().await));
            if number % 3 == 0 {
                tokio::time::sleep(Duration::from_micros(300)).await;
            }
        }
        for (number, outcome) in pending {
            let outcome = match outcome {
                Ok(pending) => pending.await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(_) => written.push(number),
                Err(error) => {
                    assert!(matches!(error, AppendError::Unavailable(_)), "{error:?}");
                    refused += 1;
                }
            }
        }
    }
    done.store(true, Relaxed);
    let seen = reader.await.unwrap();
    disk.heal();
    assert_eq!(fixture.entries().await, written);
    assert!(written.starts_with(&seen));
    println!("{} written, {refused} refused, {} faults", written.len(), disk.counts().faults_injected);
    assert!(refused > 0 && written.len() > 1, "there was nothing to see");
    assert_clean(kuma).await;
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_handle_reads_its_own_writes_without_awaiting_them() {
    let fixture = Fixture::new().await;
    fixture.disk.sync_takes(Duration::from_millis(2));
    for number in 1..=50 {
        let pending = fixture.ledger.append(entered(number)).submit().await.unwrap();
        // A clone is the same handle.
        let ledger = fixture.ledger.clone().read().await.unwrap();
        assert_eq!((ledger.version(), ledger.entries.last()), (Version(number + 1), Some(&number)));
        assert_eq!(pending.await.unwrap(), Version(number + 1));
    }
}

/// Whoever is told of an append by anyone sees it, from memory, with another handle.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_was_told_of_an_append_reads_it() {
    let dir = directory();
    let kuma = common::start(dir.path(), 1).await;
    let (tell, mut told) = mpsc::unbounded_channel();
    let writers = (0..4).map(|writer| {
        let (kuma, tell) = (kuma.clone(), tell.clone());
        tokio::spawn(async move {
            for number in 0..300 {
                let id = format!("l-{}", (writer + number) % 3);
                let version = kuma.entity::<Ledger>(&id).append(entered(number)).await.unwrap();
                tell.send((id, version)).unwrap();
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    drop(tell);
    let handles: Vec<Handle<Ledger>> = (0..3).map(|number| kuma.entity(format!("l-{number}"))).collect();
    let mut heard = 0;
    while let Some((id, version)) = told.recv().await {
        let ledger = handles[usize::from(id.as_bytes()[2] - b'0')].read().await.unwrap();
        assert!(ledger.version() >= version, "{id}: told of {version}, read {}", ledger.version());
        heard += 1;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(heard, 1200);
}
