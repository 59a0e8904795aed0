//! A request with an idempotency key happens once, however often, from wherever and through whatever it is sent; and of a sequence
//! nothing happens behind what failed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common;
use std::{
    cell::Cell,
    collections::BTreeSet,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use crate::common::{
    Account, AccountEvent, Ledger, LedgerEvent, OnDisk, Overdrawn, assert_clean, crash_copy, deposited, directory,
    entered, start, until, withdraw,
};
use futures_util::future::{join_all, try_join_all};
use integration_tests::{eventually, seed};
use kuma_core::{
    AppendError, Appended, Command, Durability, ExecuteError, Handle, Kuma, Metadata, Options, Outcome, Pending,
    ReadError, Refused, Sequence, Unavailable, Version,
};
use parking_lot::Mutex;
use power_loss::{Errno, Fault};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::Serialize;
use tokio::sync::Barrier;
use tracing_subscriber::{Layer, filter::dynamic_filter_fn, layer::SubscriberExt, util::SubscriberInitExt};

const SOON: Duration = Duration::from_secs(10);

async fn entries(ledger: &Handle<Ledger>) -> Vec<u64> {
    ledger.read().await.unwrap().entries.clone()
}

fn first(version: u64) -> Appended {
    Appended { version: Version(version), repeated: false }
}

fn again(version: u64) -> Appended {
    Appended { version: Version(version), repeated: true }
}

async fn send(ledger: &Handle<Ledger>, key: impl AsRef<[u8]>, number: u64) -> Result<Appended, AppendError> {
    ledger.append(entered(number)).idempotency_key(key).submit().await?.appended().await
}

#[track_caller]
fn assert_key_reused(error: AppendError, made: u64) {
    assert!(
        matches!(&error, AppendError::Refused(Refused::KeyReused { version, .. }) if *version == Version(made)),
        "{error:?}"
    );
    assert!(!error.is_retry_safe());
}

fn refused<T: std::fmt::Debug, R: std::fmt::Debug>(outcome: Result<T, ExecuteError<R>>) -> AppendError {
    match outcome {
        Err(ExecuteError::Failed(error)) => error,
        other => panic!("{other:?}"),
    }
}

// ---- one key, many senders

async fn concurrent_sends_commit_once(tasks: u64, rounds: u64) {
    let dir = directory();
    let kuma = start(dir.path(), 2).await;
    for round in 0..rounds {
        let barrier = Arc::new(Barrier::new(tasks as usize));
        let sends = (0..tasks).map(|task| {
            let (kuma, barrier) = (kuma.clone(), barrier.clone());
            tokio::spawn(async move {
                let ledger = kuma.entity::<Ledger>(format!("l-{}", round % 5));
                barrier.wait().await;
                // Everyone expects something else; that is about the attempt.
                let append =
                    ledger.append_all([entered(round), entered(round)]).idempotency_key(format!("key {round}"));
                let correlation = Metadata { correlation: Some(format!("{task}")), ..Metadata::default() };
                append.metadata(correlation).submit().await.unwrap().appended().await.unwrap()
            })
        });
        let told = try_join_all(sends).await.unwrap();
        let versions: BTreeSet<Version> = told.iter().map(|appended| appended.version).collect();
        assert_eq!(versions.into_iter().collect::<Vec<_>>(), [Version(2 * (round / 5 + 1))], "round {round}");
        assert_eq!(
            told.iter().filter(|appended| !appended.repeated).count(),
            1,
            "round {round}: one of them is the first"
        );
    }
    let mut all = Vec::new();
    for number in 0..5 {
        all.extend(entries(&kuma.entity::<Ledger>(format!("l-{number}"))).await);
    }
    all.sort_unstable();
    assert_eq!(all, (0..rounds).flat_map(|round| [round, round]).collect::<Vec<_>>());
    assert_clean(&kuma).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_concurrent_sends_of_a_key_commit_once_and_are_told_the_same_version() {
    concurrent_sends_commit_once(2, 300).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_concurrent_sends_of_a_key_commit_once_and_are_told_the_same_version() {
    concurrent_sends_commit_once(50, 30).await;
}

/// The same with commands, and with the entity leaving memory all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_sends_of_a_command_are_decided_and_committed_once_also_while_the_entity_leaves() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let account = kuma.entity::<Account>("a-1");
    account.append(deposited(10_000)).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let leaver = tokio::spawn({
        let (account, done) = (kuma.entity::<Account>("a-1"), done.clone());
        async move {
            while !done.load(SeqCst) {
                account.raw().passivate().await.unwrap();
                tokio::task::yield_now().await;
            }
        }
    });
    for round in 0..60 {
        let command = withdraw(round + 1);
        let sends = (0..8).map(|_| {
            let (account, command) = (kuma.entity::<Account>("a-1"), command.clone());
            tokio::spawn(async move {
                let since = Instant::now();
                loop {
                    match account.execute(command.clone()).idempotency_key(round.to_le_bytes()).await {
                        Ok(executed) => break executed,
                        // The entity kept leaving. Nothing was done.
                        Err(ExecuteError::Failed(AppendError::Unavailable(Unavailable::Interrupted { .. })))
                            if since.elapsed() < SOON => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
            })
        });
        let told = try_join_all(sends).await.unwrap();
        for executed in &told {
            assert_eq!(executed.version(), Version(round as u64 + 2));
            assert_eq!(executed.events(), [AccountEvent::Withdrawn { amount: round + 1 }]);
        }
        assert_eq!(told.iter().filter(|executed| !executed.is_repeated()).count(), 1);
        assert_eq!(command.decided(), 1, "round {round}");
    }
    done.store(true, SeqCst);
    leaver.await.unwrap();
    assert_eq!(account.read().await.unwrap().balance, 10_000 - (1..=60).sum::<i64>());
    assert_clean(&kuma).await;
}

// ---- while the first one is in flight

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_retry_of_what_is_in_flight_waits_for_it_and_is_told_the_same() {
    let on = OnDisk::new().await;
    let ledger = on.kuma.entity::<Ledger>("l-1");
    ledger.append(entered(0)).await.unwrap();
    assert_eq!(ledger.outcome("key").await.unwrap(), Outcome::NeverSeen);
    on.disk.sync_takes(Duration::from_millis(200));
    let original = ledger.append(entered(1)).idempotency_key("key").submit().await.unwrap();
    on.until_syncing().await;
    assert_eq!(ledger.outcome("key").await.unwrap(), Outcome::InFlight);
    assert_eq!(ledger.outcome("no key").await.unwrap(), Outcome::NeverSeen);
    let other = on.kuma.entity::<Ledger>("l-1");
    let same = other.append(entered(1)).idempotency_key("key").expecting(Version(0)).submit().await.unwrap();
    let different = other.append(entered(2)).idempotency_key("key").submit().await.unwrap();
    let behind = other.append(entered(3)).submit().await.unwrap();
    assert_eq!(original.appended().await.unwrap(), first(2));
    assert_eq!(same.appended().await.unwrap(), again(2));
    assert_key_reused(different.await.unwrap_err(), 2);
    assert_eq!(behind.appended().await.unwrap(), first(3));
    assert_eq!(ledger.outcome("key").await.unwrap(), Outcome::Committed(Version(2)));
    assert_eq!(entries(&ledger).await, [0, 1, 3]);
    assert_clean(&on.kuma).await;
}

/// What is said is either "in flight" or the truth, at any time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_outcome_asked_for_under_load_is_never_ahead_of_the_disk_and_never_goes_back() {
    let on = OnDisk::new().await;
    on.disk.sync_takes(Duration::from_millis(3));
    let mut seen = [0; 3];
    for round in 0..40 {
        let key = format!("key {round}");
        let ledger = on.kuma.entity::<Ledger>("l-1");
        let pending = ledger.append(entered(round)).idempotency_key(&key).submit().await.unwrap();
        let asker = on.kuma.entity::<Ledger>("l-1");
        loop {
            match asker.outcome(&key).await.unwrap() {
                Outcome::InFlight => seen[0] += 1,
                Outcome::Committed(version) => {
                    assert_eq!(version, Version(round + 1));
                    // Whoever hears it may rely on it, also before the sender hears of it.
                    assert!(asker.read().await.unwrap().version() >= version);
                    seen[1] += 1;
                    break;
                }
                Outcome::NeverSeen => panic!("it was submitted before"),
            }
        }
        assert_eq!(pending.await.unwrap(), Version(round + 1));
    }
    println!("in flight {}, committed {}", seen[0], seen[1]);
    assert!(seen[0] > 0, "nothing was ever seen in flight");
}

#[tokio::test]
async fn an_outcome_of_an_entity_that_was_never_written_is_never_seen_and_writes_nothing() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    assert_eq!(ledger.outcome("key").await.unwrap(), Outcome::NeverSeen);
    for key in [vec![], vec![1; 257]] {
        let error = ledger.outcome(&key).await.unwrap_err();
        assert!(matches!(error, ReadError::Refused(Refused::InvalidKey { bytes, .. }) if bytes == key.len()));
    }
    assert_eq!(kuma.verify(|_| {}).await.unwrap().keys, 0);
}

// ---- through passivation, restarts and crashes

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_is_exact_after_passivation_a_restart_and_a_crash() {
    let dir = directory();
    let kuma = start(dir.path(), 2).await;
    async fn make(kuma: &Kuma, round: u64) -> (Appended, Version, Vec<AccountEvent>) {
        let ledger = kuma.entity::<Ledger>("l-1");
        let appended = send(&ledger, "append", 7).await.unwrap();
        let account = kuma.entity::<Account>("a-1");
        if round == 0 {
            account.append(deposited(10)).await.unwrap();
        }
        let command = withdraw(10);
        let executed = account.execute(command.clone()).idempotency_key("command").await.unwrap();
        assert_eq!(executed.is_repeated(), round > 0);
        assert_eq!(command.decided(), u64::from(round == 0), "round {round}");
        for (key, version) in [("append", appended.version), ("other", Version(0))] {
            let expected = if key == "append" { Outcome::Committed(version) } else { Outcome::NeverSeen };
            assert_eq!(ledger.outcome(key).await.unwrap(), expected, "round {round}");
        }
        (appended, executed.version(), executed.into_events())
    }
    let (appended, version, events) = make(&kuma, 0).await;
    assert_eq!((appended, version), (first(1), Version(2)));
    let same = async |kuma: &Kuma, round| {
        assert_eq!(make(kuma, round).await, (again(1), version, events.clone()), "round {round}");
        assert_eq!(kuma.entity::<Account>("a-1").read().await.unwrap().balance, 0);
        assert_clean(kuma).await;
    };
    same(&kuma, 1).await;
    kuma.entity::<Ledger>("l-1").raw().passivate().await.unwrap();
    kuma.entity::<Account>("a-1").raw().passivate().await.unwrap();
    same(&kuma, 2).await;
    let crashed = crash_copy(dir.path());
    kuma.shutdown().await;
    same(&start(crashed.path(), 2).await, 3).await;
    same(&start(dir.path(), 2).await, 4).await;
}

/// The caller is gone before it hears of its commit, and the process is killed then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_between_commit_and_acknowledgement_is_settled_by_a_retry() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    drop(ledger.append(entered(1)).idempotency_key("key").submit().await.unwrap());
    until("it is on the disk", async || {
        let events = kuma.raw("ledger", "l-1").events(.., 9).await.unwrap();
        events.len() == 1
    })
    .await;
    let crashed = crash_copy(dir.path());
    let kuma = start(crashed.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    assert_eq!(ledger.outcome("key").await.unwrap(), Outcome::Committed(Version(1)));
    assert_eq!(send(&ledger, "key", 1).await.unwrap(), again(1));
    assert_eq!(entries(&ledger).await, [1]);
}

/// The power goes at each write and sync of a commit in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wherever_the_power_goes_a_retry_happens_once() {
    let template = OnDisk::new().await;
    let account = template.kuma.entity::<Account>("a-1");
    account.append(deposited(100)).await.unwrap();
    template.kuma.entity::<Ledger>("l-1").append(entered(0)).await.unwrap();
    let (mut told, mut there) = (0, 0);
    for n in 1.. {
        let on = OnDisk::in_directory(crash_copy(template.dir.path())).await;
        on.disk.cut_after(n, n);
        let (ledger, account) = (on.kuma.entity::<Ledger>("l-1"), on.kuma.entity::<Account>("a-1"));
        let appended = send(&ledger, "key", 1).await;
        let executed = account.execute(withdraw(30)).idempotency_key("key").await;
        let was_cut = on.disk.is_cut();
        let on = on.cut(n).await;
        let (ledger, account) = (on.kuma.entity::<Ledger>("l-1"), on.kuma.entity::<Account>("a-1"));
        let outcome = ledger.outcome("key").await.unwrap();
        let retried = send(&ledger, "key", 1).await.unwrap();
        assert_eq!(retried.version, Version(2), "{n}");
        assert_eq!(outcome == Outcome::Committed(Version(2)), retried.repeated, "{n}: {outcome:?}");
        assert!(appended.is_err() || retried.repeated, "{n}: it was acknowledged");
        let withdrawn = account.execute(withdraw(30)).idempotency_key("key").await.unwrap();
        assert!(executed.is_err() || withdrawn.is_repeated(), "{n}: it was acknowledged");
        assert_eq!(
            (withdrawn.version(), withdrawn.events()),
            (Version(2), &[AccountEvent::Withdrawn { amount: 30 }][..])
        );
        assert_eq!((entries(&ledger).await, account.read().await.unwrap().balance), (vec![0, 1], 70), "{n}");
        told += u64::from(appended.is_ok()) + u64::from(executed.is_ok());
        there += u64::from(retried.repeated) + u64::from(withdrawn.is_repeated());
        assert_clean(&on.kuma).await;
        on.kuma.shutdown().await;
        if !was_cut {
            println!("{n} cuts, {told} told, {there} there");
            break;
        }
        assert!(n < 100, "the power never stays");
    }
    template.kuma.shutdown().await;
}

/// Everyone is answered, and what they are told is still true when the store is opened again.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_shutdown_answers_every_request_and_its_retry() {
    for round in 0..6 {
        let on = OnDisk::new().await;
        let account = on.kuma.entity::<Account>("a-1");
        account.append(deposited(10_000)).await.unwrap();
        on.disk.sync_takes(Duration::from_millis(2));
        let answered = Arc::new(AtomicU64::new(0));
        let tasks = (0..6_u64).map(|task| {
            let (kuma, answered) = (on.kuma.clone(), answered.clone());
            tokio::spawn(async move {
                let mut told = Vec::new();
                for number in task * 10..(task + 1) * 10 {
                    // Three times each, under one key.
                    let send = async || {
                        let account = kuma.entity::<Account>("a-1");
                        account.execute(withdraw(number as i64)).idempotency_key(number.to_le_bytes()).await
                    };
                    let outcomes: [_; 3] = tokio::join!(send(), send(), send()).into();
                    answered.fetch_add(1, SeqCst);
                    told.extend(outcomes.map(|outcome| (number, outcome)));
                }
                told
            })
        });
        let tasks: Vec<_> = tasks.collect();
        until("some are answered", async || answered.load(SeqCst) >= 5 * round).await;
        on.kuma.shutdown().await;
        let told = tokio::time::timeout(Duration::from_secs(20), try_join_all(tasks)).await;
        let told = told.expect("somebody is never answered").unwrap().into_iter().flatten();
        let on = OnDisk::in_directory(on.dir).await;
        let account = on.kuma.entity::<Account>("a-1");
        let (mut done, mut not_done) = (0, 0);
        for (number, outcome) in told {
            let there = account.outcome(number.to_le_bytes()).await.unwrap();
            match outcome {
                // Nothing to do is not remembered.
                Ok(_) if number == 0 => {}
                Ok(executed) => {
                    assert_eq!(there, Outcome::Committed(executed.version()), "round {round}: {number}");
                    done += 1;
                }
                Err(error) => {
                    let error = refused::<(), _>(Err(error));
                    assert!(matches!(error, AppendError::Unavailable(_)), "round {round}: {number}: {error:?}");
                    not_done += 1;
                }
            }
        }
        println!("round {round}: {done} done, {not_done} refused");
        for number in 0..60_u64 {
            account.execute(withdraw(number as i64)).idempotency_key(number.to_le_bytes()).await.unwrap();
        }
        assert_eq!(account.read().await.unwrap().balance, 10_000 - (0..60).sum::<i64>(), "round {round}");
        on.kuma.shutdown().await;
    }
}

// ---- other content

#[derive(Clone, Serialize)]
struct Seize {
    amount: i64,
}

impl Command<Account> for Seize {
    type Rejection = Overdrawn;

    fn decide(self, account: &Account) -> Result<Vec<AccountEvent>, Overdrawn> {
        withdraw(self.amount).decide(account)
    }
}

#[tokio::test]
async fn a_key_with_other_content_is_refused_and_nothing_is_written() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let account = kuma.entity::<Account>("a-1");
    account.append(deposited(100)).idempotency_key("deposit").await.unwrap();
    account.execute(withdraw(10)).idempotency_key("withdraw").await.unwrap();
    for round in 0..3 {
        if round == 1 {
            account.raw().passivate().await.unwrap();
        }
        let other = account.append(deposited(101)).idempotency_key("deposit").await;
        assert_key_reused(other.unwrap_err(), 1);
        let more = account.append_all([deposited(100), deposited(100)]).idempotency_key("deposit").await;
        assert_key_reused(more.unwrap_err(), 1);
        let other = account.execute(withdraw(11)).idempotency_key("withdraw").await;
        assert_key_reused(refused(other), 2);
        // The fields are the same, the command is not.
        let namesake = account.execute(Seize { amount: 10 }).idempotency_key("withdraw").await;
        assert_key_reused(refused(namesake), 2);
        // The very events that the command made.
        let append = account.append(AccountEvent::Withdrawn { amount: 10 }).idempotency_key("withdraw").await;
        assert_key_reused(append.unwrap_err(), 2);
        let command = withdraw(100);
        let execute = account.execute(command.clone()).idempotency_key("deposit").await;
        assert_key_reused(refused(execute), 1);
        assert_eq!(command.decided(), 0);
        assert_eq!(account.read().await.unwrap().version(), Version(2));
    }
    // A raw handle says the same in its own words.
    let raw = kuma.raw("account", "a-1");
    let event = |amount| kuma_core::NewEvent::json("Deposited", &serde_json::json!({ "amount": amount })).unwrap();
    assert_eq!(raw.append(event(100)).idempotency_key("deposit").await.unwrap(), Version(1));
    assert_key_reused(raw.append(event(7)).idempotency_key("deposit").await.unwrap_err(), 1);
    assert_clean(&kuma).await;
}

#[tokio::test]
async fn what_is_about_the_attempt_does_not_make_another_request() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    let said = |text: &str| Metadata { correlation: Some(text.to_owned()), ..Metadata::default() };
    let original = ledger.append(entered(1)).idempotency_key("key").metadata(said("first")).expecting(Version(0));
    assert_eq!(original.await.unwrap(), Version(1));
    ledger.append(entered(2)).await.unwrap();
    for expected in [0, 1, 2, 77] {
        let retry =
            ledger.append(entered(1)).idempotency_key("key").metadata(said("again")).expecting(Version(expected));
        assert_eq!(retry.submit().await.unwrap().appended().await.unwrap(), again(1));
    }
    let events = ledger.raw().events(.., 9).await.unwrap();
    assert_eq!(events.len(), 2);
    assert_eq!(events[0].metadata, Some(said("first")), "that of the first attempt stays");
    let account = kuma.entity::<Account>("a-1");
    account.append(deposited(5)).await.unwrap();
    account.execute(withdraw(5)).idempotency_key("key").await.unwrap();
    let retried = account.execute(withdraw(5)).idempotency_key("key").expecting(Version(0)).await.unwrap();
    assert_eq!((retried.version(), retried.is_repeated()), (Version(2), true));
}

// ---- commands

#[tokio::test]
async fn a_retried_command_returns_its_events_without_deciding_again() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let account = kuma.entity::<Account>("a-1");
    account.append(deposited(10)).await.unwrap();
    let command = withdraw(10);
    account.execute(command.clone()).idempotency_key("key").await.unwrap();
    assert_eq!(command.decided(), 1);
    // Now it would be rejected.
    let rejected = account.execute(withdraw(10)).await;
    assert!(matches!(rejected, Err(ExecuteError::Rejected(Overdrawn { missing: 10 }))), "{rejected:?}");
    for _ in 0..3 {
        let retried = account.execute(command.clone()).idempotency_key("key").await.unwrap();
        assert_eq!((retried.version(), retried.is_repeated()), (Version(2), true));
        assert_eq!(retried.into_events(), [AccountEvent::Withdrawn { amount: 10 }]);
        account.raw().passivate().await.unwrap();
    }
    assert_eq!(command.decided(), 1);
    assert_eq!(account.read().await.unwrap().version(), Version(2));
}

#[tokio::test]
async fn a_rejection_or_nothing_to_do_is_not_remembered() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let account = kuma.entity::<Account>("a-1");
    let command = withdraw(10);
    for _ in 0..2 {
        let rejected = account.execute(command.clone()).idempotency_key("key").await;
        assert!(matches!(rejected, Err(ExecuteError::Rejected(Overdrawn { missing: 10 }))), "{rejected:?}");
        assert_eq!(account.outcome("key").await.unwrap(), Outcome::NeverSeen);
    }
    let nothing = account.execute(withdraw(0)).idempotency_key("key").await.unwrap();
    assert_eq!((nothing.version(), nothing.is_repeated(), nothing.events().len()), (Version(0), false, 0));
    // The key was not used up by either.
    account.append(deposited(10)).await.unwrap();
    let done = account.execute(command.clone()).idempotency_key("key").await.unwrap();
    assert_eq!((done.version(), done.is_repeated(), command.decided()), (Version(2), false, 3));
    let refused_ = account.execute(withdraw(0)).idempotency_key("key").await;
    assert_key_reused(refused(refused_), 2);
}

// ---- commits that failed

async fn a_failed_key_is_free(fault: Fault, error: Errno) {
    let on = OnDisk::new().await;
    let ledger = on.kuma.entity::<Ledger>("l-1");
    ledger.append(entered(0)).await.unwrap();
    on.fail_in_log_only();
    on.disk.fail_nth(fault, 1, error);
    let failed = send(&ledger, "key", 1).await.unwrap_err();
    assert!(matches!(failed, AppendError::Unavailable(Unavailable::NotWritten { .. })), "{failed:?}");
    assert!(failed.is_retry_safe());
    let outcome = eventually("the outcome is known", SOON, async || ledger.outcome("key").await.ok()).await;
    assert_eq!(outcome, Outcome::NeverSeen);
    // It was not used: other content is fine as well.
    assert_eq!(send(&ledger, "key", 2).await.unwrap(), first(2));
    assert_eq!(send(&ledger, "key", 2).await.unwrap(), again(2));
    assert_key_reused(send(&ledger, "key", 1).await.unwrap_err(), 2);
    assert_eq!(entries(&ledger).await, [0, 2]);
    assert_clean(&on.kuma).await;
    on.kuma.shutdown().await;
}

#[tokio::test]
async fn a_key_whose_write_failed_can_be_used_again() {
    a_failed_key_is_free(Fault::Write, Errno::Io).await;
}

#[tokio::test]
async fn a_key_whose_sync_failed_can_be_used_again() {
    a_failed_key_is_free(Fault::Sync, Errno::Io).await;
}

#[tokio::test]
async fn a_key_that_found_no_space_can_be_used_again() {
    a_failed_key_is_free(Fault::Write, Errno::Full).await;
}

/// The retry waits for the first one, which fails. Then it is the first one.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_retry_of_what_fails_in_flight_happens_itself_once() {
    for round in 0..4 {
        let on = OnDisk::new().await;
        let ledger = on.kuma.entity::<Ledger>("l-1");
        ledger.append(entered(0)).await.unwrap();
        on.fail_in_log_only();
        on.disk.sync_takes(Duration::from_millis(100));
        on.disk.fail_nth(Fault::Sync, 1, Errno::Io);
        let original = ledger.append(entered(1)).idempotency_key("key").submit().await.unwrap();
        on.until_syncing().await;
        let mut retries = Vec::new();
        for _ in 0..5 {
            let ledger = on.kuma.entity::<Ledger>("l-1");
            retries.push(ledger.append(entered(1)).idempotency_key("key").submit().await.unwrap());
        }
        let failed = original.await.unwrap_err();
        assert!(matches!(&failed, AppendError::Unavailable(Unavailable::NotWritten { .. })), "{failed:?}");
        on.disk.sync_takes(Duration::ZERO);
        let told: Vec<_> = join_all(retries.into_iter().map(Pending::appended)).await;
        for told in &told {
            match told {
                Ok(appended) => assert_eq!(appended.version, Version(2)),
                Err(error) => assert!(error.is_retry_safe(), "{error:?}"),
            }
        }
        let made: Vec<_> = told.iter().flatten().filter(|appended| !appended.repeated).collect();
        assert!(made.len() <= 1, "round {round}: {told:?}");
        assert_eq!(send(&ledger, "key", 1).await.unwrap().version, Version(2));
        assert_eq!(entries(&ledger).await, [0, 1], "round {round}: {told:?}");
        on.kuma.shutdown().await;
    }
}

/// Writers with keys that send again until they hear of success, on a disk that fails every few syncs.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn on_a_disk_that_fails_now_and_then_everything_that_is_sent_until_it_succeeds_happens_once() {
    const WRITERS: u64 = 6;
    const EACH: u64 = 25;
    let on = OnDisk::new().await;
    on.kuma.entity::<Ledger>("l-0").append(entered(u64::MAX)).await.unwrap();
    on.kuma.entity::<Ledger>("l-1").append(entered(u64::MAX)).await.unwrap();
    on.fail_in_log_only();
    on.disk.sync_takes(Duration::from_millis(1));
    (1..=12).for_each(|n| on.disk.fail_nth(Fault::Sync, 4 * n, Errno::Io));
    let writers = (0..WRITERS).map(|writer| {
        let kuma = on.kuma.clone();
        tokio::spawn(async move {
            let mut attempts = 0;
            for number in writer * EACH..(writer + 1) * EACH {
                let ledger = kuma.entity::<Ledger>(format!("l-{}", number % 2));
                let (other, since) = (kuma.entity::<Ledger>(format!("l-{}", number % 2)), Instant::now());
                loop {
                    attempts += 1;
                    let key = number.to_le_bytes();
                    // Two at once, to make it harder.
                    let told = tokio::join!(send(&ledger, key, number), send(&other, key, number));
                    for outcome in [&told.0, &told.1] {
                        assert!(outcome.as_ref().err().is_none_or(AppendError::is_retry_safe), "{outcome:?}");
                    }
                    if told.0.is_ok() || told.1.is_ok() {
                        break;
                    }
                    assert!(since.elapsed() < Duration::from_secs(20), "{number} never succeeds: {told:?}");
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
            attempts
        })
    });
    let attempts: u64 = try_join_all(writers).await.unwrap().into_iter().sum();
    on.disk.heal();
    on.disk.sync_takes(Duration::ZERO);
    println!("{} writes, {attempts} attempts, {} faults", WRITERS * EACH, on.disk.counts().faults_injected);
    assert!(on.disk.counts().faults_injected > 0);
    let mut all = Vec::new();
    for id in ["l-0", "l-1"] {
        let ledger = on.kuma.entity::<Ledger>(id);
        let found = eventually("the file is open", SOON, async || ledger.read().await.ok()).await;
        all.extend(found.entries.iter().copied().filter(|number| *number != u64::MAX));
    }
    all.sort_unstable();
    assert_eq!(all, (0..WRITERS * EACH).collect::<Vec<_>>());
    assert_clean(&on.kuma).await;
    on.kuma.shutdown().await;
}

// ---- what keys are

#[tokio::test]
async fn the_same_key_on_two_entities_names_two_requests() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    for (id, number) in [("l-1", 1), ("l-2", 2)] {
        assert_eq!(send(&kuma.entity::<Ledger>(id), "key", number).await.unwrap(), first(1));
    }
    for (id, number) in [("l-1", 1), ("l-2", 2)] {
        assert_eq!(send(&kuma.entity::<Ledger>(id), "key", number).await.unwrap(), again(1));
    }
}

#[tokio::test]
async fn a_key_has_1_to_256_bytes_of_any_kind() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    let keys = [vec![0], vec![0, 0], vec![b'k'], vec![0xff; 256], vec![0xff; 255]];
    for (number, key) in (0..).zip(&keys) {
        assert_eq!(send(&ledger, key, number).await.unwrap(), first(number + 1), "{key:?}");
    }
    ledger.raw().passivate().await.unwrap();
    for (number, key) in (0..).zip(&keys) {
        assert_eq!(send(&ledger, key, number).await.unwrap(), again(number + 1), "{key:?}");
    }
    for key in [vec![], vec![1; 257], vec![1; 1 << 20]] {
        let error = send(&ledger, &key, 9).await.unwrap_err();
        let bytes = key.len();
        assert!(
            matches!(error, AppendError::Refused(Refused::InvalidKey { bytes: found, bytes_max: 256 }) if found == bytes),
            "{error:?}"
        );
        let error = refused(kuma.entity::<Account>("a-1").execute(withdraw(0)).idempotency_key(&key).await);
        assert!(matches!(error, AppendError::Refused(Refused::InvalidKey { .. })), "{error:?}");
    }
    assert_eq!(ledger.read().await.unwrap().version(), Version(5));
}

/// More than an entity keeps in memory, so that all are looked up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_are_exact_beyond_the_keys_that_are_kept_in_memory() {
    const KEYS: u64 = 16_384 + 200;
    let dir = directory();
    let options = Options::new(dir.path()).shards(1).durability(Durability::Normal).entity_appends_max(30_000);
    let kuma = Kuma::start(options).await.unwrap();
    let ledger = kuma.entity::<Ledger>("l-1");
    let mut pending = Vec::new();
    for number in 0..KEYS {
        let append = ledger.append(entered(number)).idempotency_key(number.to_le_bytes());
        pending.push(append.submit().await.unwrap());
        if pending.len() == 4000 {
            try_join_all(pending.drain(..)).await.unwrap();
        }
    }
    try_join_all(pending).await.unwrap();
    let mut random = StdRng::seed_from_u64(seed("many keys"));
    for round in 0..2 {
        for _ in 0..150 {
            let number = random.random_range(0..KEYS);
            assert_eq!(send(&ledger, number.to_le_bytes(), number).await.unwrap(), again(number + 1));
            assert_key_reused(send(&ledger, number.to_le_bytes(), KEYS).await.unwrap_err(), number + 1);
            let outcome = ledger.outcome(number.to_le_bytes()).await.unwrap();
            assert_eq!(outcome, Outcome::Committed(Version(number + 1)));
        }
        // New ones, two of each in flight.
        let mut pending = Vec::new();
        for number in (KEYS + round * 50..).take(50) {
            for _ in 0..2 {
                let append = ledger.append(entered(number)).idempotency_key(number.to_le_bytes());
                pending.push((number, append.submit().await.unwrap()));
            }
        }
        for (number, pending) in pending {
            assert_eq!(pending.await.unwrap(), Version(number + 1));
        }
        ledger.raw().passivate().await.unwrap();
    }
    assert_eq!(ledger.read().await.unwrap().version(), Version(KEYS + 100));
    assert_eq!(entries(&ledger).await, (0..KEYS + 100).collect::<Vec<_>>());
}

// ---- keys are not told

/// Whatever is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

thread_local! {
    static IS_LOGGED: Cell<bool> = const { Cell::new(false) };
}

fn holds(bytes: &[u8], canary: &[u8]) -> bool {
    bytes.windows(canary.len()).any(|window| window == canary)
}

fn assert_no_file_holds(path: &Path, canaries: &[&[u8]]) {
    for (name, bytes) in common::read_files(path) {
        assert!(canaries.iter().all(|canary| !holds(&bytes, canary)), "{name} holds a canary");
    }
}

/// On one thread, so that all that is logged is caught.
#[tokio::test]
async fn a_key_stands_in_no_file_no_error_and_no_log() {
    const KEY: &str = "canary-of-the-key-5c1f";
    const CONTENT: &str = "canary-of-the-content-9be2";
    let canaries = [KEY.as_bytes(), CONTENT.as_bytes()];
    let log = Log::default();
    let writer = log.clone();
    let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(move || writer.clone());
    // For all threads, as levels are: what other tests log meanwhile is not looked at.
    let only_here = dynamic_filter_fn(|_, _| IS_LOGGED.get());
    tracing_subscriber::registry().with(layer.with_filter(only_here)).init();
    IS_LOGGED.set(true);
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    let event = |number| LedgerEvent::Entered { number, note: CONTENT.to_owned() };
    let append = |number| ledger.append(event(number)).idempotency_key(KEY);
    append(1).await.unwrap();
    append(1).await.unwrap();
    let reused = append(2).await.unwrap_err();
    assert_key_reused(append(2).await.unwrap_err(), 1);
    let long = ledger.append(event(3)).idempotency_key(KEY.repeat(20)).await.unwrap_err();
    ledger.outcome(KEY).await.unwrap();
    for text in [format!("{reused} {reused:?}"), format!("{long} {long:?}")] {
        assert!(!text.contains("canary"), "{text}");
    }
    assert_no_file_holds(crash_copy(dir.path()).path(), &canaries);
    ledger.raw().passivate().await.unwrap();
    append(1).await.unwrap();
    kuma.shutdown().await;
    assert_no_file_holds(dir.path(), &canaries);
    let log = log.0.lock();
    assert!(log.len() > 1000, "nothing was logged");
    assert!(canaries.iter().all(|canary| !holds(&log, canary)), "the log holds a canary");
}

// ---- sequences

fn is_broken(outcome: &Result<Version, AppendError>) -> bool {
    matches!(outcome, Err(AppendError::Unavailable(Unavailable::SequenceBroken { .. })))
}

async fn outcome(submitted: Result<Pending, AppendError>) -> Result<Version, AppendError> {
    submitted?.await
}

/// What fails in the middle of the sequence. Everything before it is committed, nothing behind it.
async fn a_sequence_ends_with(
    fail: impl for<'a> Fn(kuma_core::Append<'a>, &'a Handle<Account>) -> kuma_core::Append<'a>,
    is_right: fn(&AppendError) -> bool,
) {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    for round in 0..10 {
        let account = kuma.entity::<Account>(format!("a-{round}"));
        account.append(deposited(1)).await.unwrap();
        let sequence = Sequence::new();
        let mut submitted = Vec::new();
        for number in 0..10 {
            let append = account.append(deposited(10 + number)).in_sequence(&sequence);
            let append = if number == 3 { fail(append, &account) } else { append };
            submitted.push(append.in_sequence(&sequence).submit().await);
            if round % 2 == 1 && number == 5 {
                // In between the entity leaves and comes back.
                account.raw().passivate().await.unwrap();
            }
        }
        let outcomes = join_all(submitted.into_iter().map(outcome)).await;
        for (number, outcome) in (0..).zip(&outcomes) {
            match number {
                0..3 => assert_eq!(*outcome.as_ref().unwrap(), Version(number + 2)),
                3 => assert!(is_right(outcome.as_ref().unwrap_err()), "{outcome:?}"),
                _ => assert!(is_broken(outcome), "{number}: {outcome:?}"),
            }
        }
        assert!(sequence.is_broken());
        assert!(is_broken(&account.append(deposited(5)).in_sequence(&sequence).await), "it stays broken");
        let now = account.read().await.unwrap();
        assert_eq!((now.version(), now.balance), (Version(4), 1 + 10 + 11 + 12), "round {round}");
        // Others are not concerned, nor is a new sequence.
        account.append(deposited(100)).await.unwrap();
        let fresh = Sequence::new();
        for number in 0..3 {
            assert_eq!(
                account.append(deposited(1)).in_sequence(&fresh).await.unwrap(),
                Version(number + 6),
                "a fresh sequence"
            );
        }
        assert!(!fresh.is_broken());
    }
    assert_clean(&kuma).await;
}

#[tokio::test]
async fn a_sequence_ends_with_an_append_that_expects_the_wrong_version() {
    a_sequence_ends_with(
        |append, _| append.expecting(Version(77)),
        |error| matches!(error, AppendError::Refused(Refused::WrongVersion { .. })),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_sequence_ends_with_an_append_whose_apply_panics() {
    a_sequence_ends_with(
        |_, account| account.append_all([deposited(7), AccountEvent::Poisoned]),
        |error| matches!(error, AppendError::Refused(Refused::ApplyPanicked { .. })),
    )
    .await;
}

#[tokio::test]
async fn a_sequence_ends_with_an_append_that_is_refused_before_it_is_sent() {
    a_sequence_ends_with(
        |_, account| account.append_all([]),
        |error| matches!(error, AppendError::Refused(Refused::Empty)),
    )
    .await;
}

#[tokio::test]
async fn a_sequence_ends_with_an_append_that_finds_no_room() {
    let on = OnDisk::new().await;
    on.kuma.shutdown().await;
    let options = Options::new(on.dir.path()).vfs(on.disk.vfs_name()).entity_appends_max(4);
    let kuma = Kuma::start(options).await.unwrap();
    let ledger = kuma.entity::<Ledger>("l-1");
    ledger.append(entered(0)).await.unwrap();
    on.disk.sync_takes(Duration::from_millis(100));
    let sequence = Sequence::new();
    let mut submitted = Vec::new();
    for number in 1..=8 {
        submitted.push(ledger.append(entered(number)).in_sequence(&sequence).submit().await);
    }
    let outcomes = join_all(submitted.into_iter().map(outcome)).await;
    let done = outcomes.iter().take_while(|outcome| outcome.is_ok()).count();
    assert_eq!(done, 4, "{outcomes:?}");
    assert!(matches!(outcomes[4], Err(AppendError::Unavailable(Unavailable::Overloaded { .. }))), "{outcomes:?}");
    // Also now that there is room again.
    assert!(is_broken(&ledger.append(entered(9)).in_sequence(&sequence).await));
    assert_eq!(entries(&ledger).await, [0, 1, 2, 3, 4]);
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_sequence_ends_with_a_disk_that_fails() {
    for fault in [Fault::Write, Fault::Sync] {
        let on = OnDisk::new().await;
        let ledger = on.kuma.entity::<Ledger>("l-1");
        ledger.append(entered(0)).await.unwrap();
        on.fail_in_log_only();
        on.disk.sync_takes(Duration::from_millis(60));
        let sequence = Sequence::new();
        let before = ledger.append(entered(1)).in_sequence(&sequence).submit().await.unwrap();
        on.until_syncing().await;
        // The group after that.
        on.disk.fail_nth(fault, 1, Errno::Io);
        let mut submitted = Vec::new();
        for number in 2..12 {
            submitted.push(ledger.append(entered(number)).in_sequence(&sequence).submit().await);
        }
        let before = before.await;
        let failed = join_all(submitted.into_iter().map(outcome)).await;
        // The entity is usable again by now; the sequence is not.
        let late = ledger.append(entered(13)).in_sequence(&sequence).await;
        assert!(is_broken(&late), "{late:?}");
        for outcome in &failed {
            assert!(matches!(outcome, Err(AppendError::Unavailable(_))), "{outcome:?}");
        }
        let now = entries(&ledger).await;
        // A failed sync may have been that of the first one.
        assert_eq!(now, if before.is_ok() { vec![0, 1] } else { vec![0] });
        let fresh = Sequence::new();
        for number in 20..23 {
            ledger.append(entered(number)).in_sequence(&fresh).await.unwrap();
        }
        assert_eq!(entries(&ledger).await.len(), now.len() + 3);
        assert_clean(&on.kuma).await;
        on.kuma.shutdown().await;
    }
}

/// The first append to an entity needs a data key, which is stored in a file of its own.
#[tokio::test]
async fn a_sequence_ends_with_a_data_key_that_cannot_be_stored() {
    let on = OnDisk::new().await;
    on.disk.only_files_matching(|path| path.to_string_lossy().ends_with("keys.db-wal"));
    on.disk.fail_nth(Fault::Sync, 1, Errno::Io);
    let ledger = on.kuma.entity::<Ledger>("l-1");
    let sequence = Sequence::new();
    let mut submitted = Vec::new();
    for number in 0..4 {
        let append = ledger.append(entered(number)).idempotency_key(number.to_le_bytes()).in_sequence(&sequence);
        submitted.push(append.submit().await);
    }
    let outcomes = join_all(submitted.into_iter().map(outcome)).await;
    assert!(matches!(outcomes[0], Err(AppendError::Unavailable(Unavailable::NoKey { .. }))), "{outcomes:?}");
    assert!(outcomes[1..].iter().all(is_broken), "{outcomes:?}");
    let account = on.kuma.entity::<Account>("a-1");
    let done = eventually("the keys can be stored again", SOON, async || {
        let done = ledger.append(entered(0)).idempotency_key(0_u64.to_le_bytes()).await;
        assert!(done.as_ref().err().is_none_or(AppendError::is_retry_safe), "{done:?}");
        account.append(deposited(1)).await.ok()?;
        done.ok()
    })
    .await;
    assert_eq!((done, entries(&ledger).await), (Version(1), vec![0]));
    assert_clean(&on.kuma).await;
    on.kuma.shutdown().await;
}

/// A key that is in flight already, for something else: that this append is refused is known only later.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_sequence_ends_with_a_key_that_is_in_flight_for_something_else() {
    let on = OnDisk::new().await;
    let ledger = on.kuma.entity::<Ledger>("l-1");
    ledger.append(entered(0)).await.unwrap();
    on.disk.sync_takes(Duration::from_millis(100));
    let other = ledger.append(entered(1)).idempotency_key("key").submit().await.unwrap();
    let sequence = Sequence::new();
    let reused = ledger.append(entered(2)).idempotency_key("key").in_sequence(&sequence).submit().await.unwrap();
    let behind = ledger.append(entered(3)).in_sequence(&sequence).submit().await.unwrap();
    assert_eq!(other.await.unwrap(), Version(2));
    assert_key_reused(reused.await.unwrap_err(), 2);
    let behind = behind.await;
    assert!(is_broken(&behind), "{behind:?}");
    assert_eq!(entries(&ledger).await, [0, 1]);
}

/// What a client does that timed out: all of it once more, in a new sequence, while the first attempt is still on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_sequence_that_is_sent_again_while_it_is_in_flight_happens_once_and_in_order() {
    for fails in [false, true] {
        let on = OnDisk::new().await;
        let ledger = on.kuma.entity::<Ledger>("l-1");
        ledger.append(entered(0)).await.unwrap();
        on.fail_in_log_only();
        on.disk.sync_takes(Duration::from_millis(50));
        if fails {
            on.disk.fail_nth(Fault::Sync, 2, Errno::Io);
        }
        let mut attempts = Vec::new();
        for attempt in 0..3 {
            let sequence = Sequence::new();
            let handle = on.kuma.entity::<Ledger>("l-1");
            for number in 1..=6 + attempt {
                let append =
                    handle.append(entered(number)).idempotency_key(number.to_le_bytes()).in_sequence(&sequence);
                attempts.push((number, append.submit().await));
            }
            if attempt == 0 {
                on.until_syncing().await;
            }
        }
        for (number, attempt) in attempts {
            match outcome(attempt).await {
                Ok(version) => assert_eq!(version, Version(number + 1)),
                // What came to a sequence that was broken by then is for a new one.
                broken if fails && is_broken(&broken) => {}
                Err(error) => assert!(fails && error.is_retry_safe(), "{number}: {error:?}"),
            }
        }
        let now = eventually("it is read", SOON, async || ledger.read().await.ok()).await.entries.clone();
        assert_eq!(now, (0..now.len() as u64).collect::<Vec<_>>(), "in order, without a gap");
        for number in 1..=8_u64 {
            assert_eq!(send(&ledger, number.to_le_bytes(), number).await.unwrap().version, Version(number + 1));
        }
        assert_eq!(entries(&ledger).await, (0..=8).collect::<Vec<_>>());
        on.kuma.shutdown().await;
    }
}

/// Random faults of all kinds: what is there of a sequence is a beginning of it, and the rest was refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_what_is_there_of_a_sequence_is_a_beginning_of_it() {
    let seed = seed("sequences");
    let mut random = StdRng::seed_from_u64(seed);
    let on = OnDisk::new().await;
    on.kuma.entity::<Account>("a-0").append(deposited(0)).await.unwrap();
    on.fail_in_log_only();
    on.disk.sync_takes(Duration::from_millis(1));
    let (mut whole, mut cut) = (0, 0);
    for round in 0..120_i64 {
        let account = on.kuma.entity::<Account>(format!("a-{}", round % 7));
        let sequence = Sequence::new();
        let (mut submitted, mut beside) = (Vec::new(), Vec::new());
        let length = random.random_range(1..12);
        for number in 0..length {
            let amount = 1000 * (round + 1) + number;
            let mut append = account.append(deposited(amount));
            match random.random_range(0..40) {
                0 => append = append.expecting(Version(1 << 40)),
                1 => append = account.append_all([deposited(amount), AccountEvent::Poisoned]),
                2 => append = account.append_all([]),
                3 => on.disk.fail_nth(Fault::Sync, random.random_range(1..3), Errno::Io),
                4 => on.disk.fail_nth(Fault::Write, random.random_range(1..5), Errno::Full),
                5 | 6 => {
                    // The same key for something else, right before.
                    let key = amount.to_le_bytes();
                    beside.push(account.append(deposited(-1)).idempotency_key(key).submit().await);
                    append = append.idempotency_key(key);
                }
                7 => {
                    let account = account.clone();
                    tokio::spawn(async move { account.raw().passivate().await });
                }
                8 => tokio::time::sleep(Duration::from_micros(random.random_range(0..1500))).await,
                _ => {}
            }
            submitted.push((amount, append.in_sequence(&sequence).submit().await));
        }
        let mut told = Vec::new();
        for (amount, submitted) in submitted {
            told.push((amount, outcome(submitted).await));
        }
        join_all(beside.into_iter().map(outcome)).await;
        let done = told.iter().take_while(|(_, outcome)| outcome.is_ok()).count();
        assert!(
            told[done..].iter().all(|(_, outcome)| outcome.is_err()),
            "KUMA_SEED={seed} round {round}: success behind a failure: {told:?}"
        );
        let unknown =
            told[done..].iter().take_while(|(_, outcome)| matches!(outcome, Err(AppendError::Unknown { .. }))).count();
        let events =
            eventually("the history is read", SOON, async || account.raw().events(.., usize::MAX).await.ok()).await;
        let amounts = events.iter().map(|event| event.json().unwrap()["amount"].as_i64().unwrap());
        let there: Vec<i64> = amounts.filter(|amount| amount / 1000 == round + 1).collect();
        let expected: Vec<i64> = told.iter().map(|(amount, _)| *amount).collect();
        assert!(
            (done..=done + unknown).contains(&there.len()) && expected.starts_with(&there),
            "KUMA_SEED={seed} round {round}: {there:?} is there, told {told:?}"
        );
        if done == told.len() { whole += 1 } else { cut += 1 }
    }
    on.disk.heal();
    println!("{whole} sequences went through, {cut} were cut");
    assert!(whole > 10 && cut > 10);
    until("it is clean", async || on.kuma.verify(|_| {}).await.is_ok_and(|report| report.is_clean())).await;
    on.kuma.shutdown().await;
}
