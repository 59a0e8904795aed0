//! A write or sync fails, for each of those that a small workload makes: nobody is told "durable" who is not, nobody is told "not
//! written" who is, and the store goes on by itself.

#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests are tests too

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use futures_util::future::join_all;
use integration_tests::{Oracle, Probe, TestAppend, eventually, options, seed, start};
use kuma_core::{AppendError, Kuma, NotWritten, StartError, Unavailable, Version};
use power_loss::{Disk, Errno, Fault, PowerLoss};

/// Enough for a store that tries its files again every second.
const SOON: Duration = Duration::from_secs(10);

/// What happens after the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// The store is shut down.
    ShutDown,
    /// The power goes right after a later acknowledgement.
    PowerCut,
    /// Besides, what a process that dies right after the workload would leave is judged too: its files as the page cache has them.
    Crash,
}

/// A store with a few entities in it, to be copied: making one takes longer than copying it.
struct Template {
    directory: tempfile::TempDir,
    kuma: Kuma,
    oracle: Oracle,
}

impl Template {
    /// The store stays open: its copies are what a crash leaves, with all that was appended still in the logs.
    async fn make() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kuma = start(&directory.path().join("data")).await;
        let mut oracle = Oracle::default();
        append_together(&kuma, 1, &["a", "b", "c", "d"], &mut oracle).await;
        assert_eq!(oracle.acks(), 4);
        Template { directory, kuma, oracle }
    }

    fn copy(&self) -> (tempfile::TempDir, PathBuf, Oracle) {
        let (copy, data) = copy_of(&self.directory.path().join("data"));
        (copy, data, self.oracle.clone())
    }

    async fn end(self) {
        self.kuma.shutdown().await;
    }
}

/// A copy of a store that is open and idle.
fn copy_of(data: &Path) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("data");
    // By another process: SQLite's locks are POSIX locks, which this one would lose by closing a file that it has copied.
    assert!(Command::new("cp").arg("-r").arg(data).arg(&copy).status().unwrap().success());
    (directory, copy)
}

/// One append to each entity, all of them at once, so that they share commits. Returns what they were told.
async fn append_together(
    kuma: &Kuma,
    round: u64,
    entities: &[&str],
    oracle: &mut Oracle,
) -> Vec<Result<Version, AppendError>> {
    let appends: Vec<TestAppend> = (0..entities.len() as u64)
        .map(|index| TestAppend { id: round << 32 | index, events: 1 + (index as u32 + round as u32) % 4, bytes: 600 })
        .collect();
    entities.iter().for_each(|entity| oracle.touch(entity));
    let outcomes = join_all(entities.iter().zip(&appends).map(|(entity, append)| {
        let handle = kuma.entity::<Probe>(entity);
        async move { handle.append_all(append.events()).await }
    }))
    .await;
    for ((entity, append), outcome) in entities.iter().zip(&appends).zip(&outcomes) {
        oracle.told(entity, *append, outcome);
    }
    outcomes
}

/// Known entities and new ones, in groups.
async fn workload(kuma: &Kuma, oracle: &mut Oracle) -> Vec<Result<Version, AppendError>> {
    let mut outcomes = Vec::new();
    outcomes.extend(append_together(kuma, 10, &["a", "b", "c", "d"], oracle).await);
    outcomes.extend(append_together(kuma, 11, &["e", "f", "a", "b"], oracle).await);
    outcomes.extend(append_together(kuma, 12, &["a", "b", "a", "c", "e", "g"], oracle).await);
    outcomes
}

/// Appends to an entity until it is acknowledged: after a fault that has passed, it must be.
async fn append_until_acked(kuma: &Kuma, entity: &str, round: u64, oracle: &mut Oracle) {
    let mut attempt = round << 32;
    oracle.touch(entity);
    eventually(&format!("an append to {entity} after the fault"), SOON, async || {
        attempt += 1;
        let append = TestAppend { id: attempt, events: 2, bytes: 100 };
        let outcome = kuma.entity::<Probe>(entity).append_all(append.events()).await;
        oracle.told(entity, append, &outcome);
        outcome.ok()
    })
    .await;
}

async fn judge(data: &Path, oracle: &Oracle, context: &str) {
    let kuma = start(data).await;
    oracle.judge(&kuma).await.assert_clean(context);
    kuma.shutdown().await;
}

#[derive(Debug, Default)]
struct Reached {
    n: u64,
    acked: usize,
    not_written: usize,
    unknown: usize,
}

/// Fails the n-th `what` of the workload, for n = 1, 2, 3, ... until a run has no n-th.
async fn fail_each(what: Fault, error: Errno, then: Then) {
    let template = Template::make().await;
    let mut reached = Reached::default();
    for n in 1.. {
        let context = format!("{what:?} {n} fails with {error:?}, then {then:?}");
        let (_copy, data, mut oracle) = template.copy();
        let power = PowerLoss::register(Disk::Honest);
        let kuma = Kuma::start(options(&data).vfs(power.vfs_name())).await.unwrap();
        power.fail_nth(what, n, error);
        let outcomes = workload(&kuma, &mut oracle).await;
        let struck = power.counts().faults_injected;
        power.heal();
        if then == Then::Crash {
            let (_crashed, crashed) = copy_of(&data);
            judge(&crashed, &oracle, &context).await;
        }
        let failed = outcomes.iter().filter(|outcome| outcome.is_err()).count();
        assert_eq!(failed > 0, struck > 0, "{context}: {struck} faults, told {outcomes:?}");
        for (round, entity) in ["a", "c", "e", "new"].into_iter().enumerate() {
            append_until_acked(&kuma, entity, 100 + round as u64, &mut oracle).await;
        }
        if struck > 0 && then == Then::PowerCut {
            power.cut(n);
        }
        // After a cut there is nothing left that it could harm.
        kuma.shutdown().await;
        judge(&data, &oracle, &context).await;
        reached.n = n;
        reached.acked += outcomes.len() - failed;
        let unknown = outcomes.iter().filter(|outcome| matches!(outcome, Err(AppendError::Unknown { .. }))).count();
        reached.unknown += unknown;
        reached.not_written += failed - unknown;
        if struck == 0 {
            break;
        }
    }
    template.end().await;
    println!("{what:?} fails with {error:?}, then {then:?}: {reached:?}");
    assert!(reached.n > 5 && reached.not_written > 0, "nothing failed: {reached:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_write_or_sync_is_never_acknowledged() {
    fail_each(Fault::Write, Errno::Io, Then::ShutDown).await;
    fail_each(Fault::Sync, Errno::Io, Then::ShutDown).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_never_acknowledged() {
    fail_each(Fault::Write, Errno::Full, Then::Crash).await;
    fail_each(Fault::Sync, Errno::Full, Then::ShutDown).await;
}

/// The page cache shows what a failed sync dropped, and a later sync that succeeds does not bring it back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_after_a_failed_sync_survives_power_loss() {
    fail_each(Fault::Sync, Errno::Io, Then::PowerCut).await;
    fail_each(Fault::Sync, Errno::Full, Then::PowerCut).await;
}

/// "Nothing was written" holds although the page cache may have whole commits of which only the sync failed. (SQLite's unix VFS
/// answers every failed sync with an I/O error, also one for want of space.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_refused_does_not_come_back_with_a_crash() {
    fail_each(Fault::Sync, Errno::Io, Then::Crash).await;
}

/// Syncs fail until the store is closed, so that its logs are left with commits that only the page cache has. The next start reads
/// them; whatever it goes on from must be on the disk before anything is acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_after_failed_syncs_goes_on_from_what_is_on_the_disk() {
    let template = Template::make().await;
    let mut unknown = 0;
    for n in 1..=12 {
        let context = format!("all syncs from {n} on fail, restart, power cut");
        let (_copy, data, mut oracle) = template.copy();
        let power = PowerLoss::register(Disk::Honest);
        let kuma = Kuma::start(options(&data).vfs(power.vfs_name())).await.unwrap();
        power.fail_from_nth(Fault::Sync, n, Errno::Io);
        let outcomes = workload(&kuma, &mut oracle).await;
        unknown += outcomes.iter().filter(|outcome| matches!(outcome, Err(AppendError::Unknown { .. }))).count();
        kuma.shutdown().await;
        power.heal();
        let kuma = Kuma::start(options(&data).vfs(power.vfs_name())).await.unwrap();
        oracle.judge(&kuma).await.assert_clean(&context);
        for (round, entity) in ["a", "b", "c", "d", "e", "f"].into_iter().enumerate() {
            append_until_acked(&kuma, entity, 100 + round as u64, &mut oracle).await;
        }
        power.cut(n);
        kuma.shutdown().await; // there is nothing left that it could harm
        judge(&data, &oracle, &context).await;
    }
    template.end().await;
    println!("12 restarts after failed syncs, {unknown} outcomes unknown");
    assert!(unknown > 0, "nothing was left in doubt");
}

/// The same while a store is made and while one is opened: a typed error, and the next attempt finds all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_is_typed_and_loses_nothing() {
    let template = Template::make().await;
    for (is_new, what) in [(true, Fault::WriteOrSync), (false, Fault::WriteOrSync), (false, Fault::Truncate)] {
        let mut failed_starts = 0;
        // A creation makes some 400 of them, all alike: a page of a schema.
        for n in (1..).step_by(if is_new { 11 } else { 1 }) {
            let context = format!("{what:?} {n} of a start fails, new: {is_new}");
            let (_copy, data, mut oracle) = template.copy();
            if is_new {
                std::fs::remove_dir_all(&data).unwrap();
                oracle = Oracle::default();
            }
            let power = PowerLoss::register(Disk::Honest);
            power.fail_nth(what, n, Errno::Io);
            let started = Kuma::start(options(&data).vfs(power.vfs_name())).await;
            let struck = power.counts().faults_injected;
            match started {
                Ok(kuma) => {
                    assert!(
                        kuma.stats().shards.iter().all(|shard| shard.out_of_use.is_none()),
                        "{context}: a healthy shard"
                    );
                    append_until_acked(&kuma, "a", 50, &mut oracle).await;
                    kuma.shutdown().await;
                }
                Err(StartError::Open(_) | StartError::DataDir(_) | StartError::Vault(_)) => {
                    failed_starts += 1;
                    // In the same process, at once.
                    let kuma = Kuma::start(options(&data).vfs(power.vfs_name())).await.unwrap();
                    append_until_acked(&kuma, "a", 50, &mut oracle).await;
                    kuma.shutdown().await;
                }
                Err(error) => panic!("{context}: {error:?}"),
            }
            judge(&data, &oracle, &context).await;
            if struck == 0 {
                println!("{what:?} of a start, new: {is_new}: {} operations, {failed_starts} starts failed", n - 1);
                break;
            }
        }
    }
    template.end().await;
}

/// Everything fails from the n-th operation on until the disk is well again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_stays_broken_is_reported_and_healed_from() {
    let seed = seed("a_disk_that_stays_broken");
    let template = Template::make().await;
    for (n, what, error) in [
        (1, Fault::WriteOrSync, Errno::Io),
        (2 + seed % 7, Fault::WriteOrSync, Errno::Io),
        (20, Fault::WriteOrSync, Errno::Io),
        (1, Fault::Sync, Errno::Io),
        (3, Fault::Sync, Errno::Io),
        (1, Fault::Write, Errno::Full),
        (2 + seed % 11, Fault::Write, Errno::Full),
    ] {
        let context = format!("all from {what:?} {n} on fail with {error:?}");
        let (_copy, data, mut oracle) = template.copy();
        let power = PowerLoss::register(Disk::Honest);
        let kuma = Kuma::start(options(&data).vfs(power.vfs_name())).await.unwrap();
        let readers: Vec<_> = ["a", "b", "c", "d"].map(|entity| kuma.entity::<Probe>(entity)).into();
        for reader in &readers {
            assert!(reader.read().await.unwrap().version() > Version(0));
        }
        power.fail_from_nth(what, n, error);
        // "d" is left alone: nothing that was decided on it can fail.
        let mut outcomes = Vec::new();
        for round in 20..24 {
            outcomes.extend(append_together(&kuma, round, &["a", "b", "x", "y"], &mut oracle).await);
        }
        for outcome in &outcomes {
            match outcome {
                Ok(_) | Err(AppendError::Unknown { .. } | AppendError::Unavailable(Unavailable::NoKey { .. })) => {}
                Err(AppendError::Unavailable(Unavailable::NotWritten { cause, .. })) => match (error, cause) {
                    (Errno::Full, NotWritten::DiskFull { .. } | NotWritten::Voided) => {}
                    (Errno::Io, NotWritten::Io { .. } | NotWritten::Closed { .. } | NotWritten::Voided) => {}
                    _ => panic!("{context}: {cause:?}"),
                },
                // It was voided, and what is on the disk is not known: it cannot be decided on.
                Err(AppendError::Unavailable(Unavailable::Unreadable { .. })) => {}
                Err(error) => panic!("{context}: {error:?}"),
            }
        }
        assert!(outcomes.last().unwrap().is_err(), "{context}: nothing failed");
        for reader in &readers[2..] {
            assert!(reader.read().await.unwrap().version() > Version(0), "{context}: a live entity is not read");
        }
        if error == Errno::Full {
            for reader in &readers {
                assert!(reader.read().await.unwrap().version() > Version(0), "{context}: reads stop with the space");
            }
        }
        power.heal();
        for (round, entity) in ["a", "b", "c", "d", "x", "y"].into_iter().enumerate() {
            append_until_acked(&kuma, entity, 100 + round as u64, &mut oracle).await;
        }
        oracle.judge(&kuma).await.assert_clean(&context);
        kuma.shutdown().await;
        judge(&data, &oracle, &context).await;
        let acked = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        println!("{context}: {} appends, {acked} acknowledged before, all went on after", outcomes.len());
    }
    template.end().await;
}
