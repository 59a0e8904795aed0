//! Commands are decided one after the other, each on the newest state; whoever hears of a decision can rely on what it was made on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::common::{
    Account, AccountEvent, OnDisk, Overdrawn, Withdraw, assert_clean, deposited, directory, start, until, withdraw,
};
use futures_util::future::{join_all, try_join_all};
use integration_tests::{eventually, seed};
use kuma_core::{
    AppendError, Command, Entity, ExecuteError, Executed, Handle, Metadata, NotWritten, Refused, Unavailable, Version,
};
use power_loss::{Errno, Fault};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

const SOON: Duration = Duration::from_secs(10);

fn withdrawn(amount: i64) -> AccountEvent {
    AccountEvent::Withdrawn { amount }
}

fn failed<T: std::fmt::Debug, R: std::fmt::Debug>(outcome: Result<T, ExecuteError<R>>) -> AppendError {
    match outcome {
        Err(ExecuteError::Failed(error)) => error,
        other => panic!("{other:?}"),
    }
}

async fn balance(account: &Handle<Account>) -> (i64, Version) {
    let account = account.read().await.unwrap();
    (account.balance, account.version())
}

// ---- what a command is decided on

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_command_is_decided_on_what_is_still_in_flight_before_it() {
    let on = OnDisk::new().await;
    let account = on.kuma.entity::<Account>("a-1");
    account.append(deposited(10)).await.unwrap();
    on.disk.sync_takes(Duration::from_millis(150));
    let mut pending = Vec::new();
    // 10 - 4 - 4, then 4 more are not there; but 5 are deposited.
    for amount in [4, 4, 4] {
        pending.push(account.execute(withdraw(amount)).submit().await.unwrap());
    }
    let deposit = account.append(deposited(5)).submit().await.unwrap();
    let last = account.execute(withdraw(7)).submit().await.unwrap();
    let nothing = account.execute(withdraw(0)).submit().await.unwrap();
    on.until_syncing().await;
    assert_eq!(balance(&on.kuma.entity("a-1")).await, (10, Version(1)), "nobody sees it before it is on the disk");
    let mut outcomes = Vec::new();
    for pending in pending {
        outcomes.push(pending.executed().await);
    }
    let versions: Vec<u64> = outcomes.iter().flatten().map(|executed| executed.version().0).collect();
    assert_eq!(versions, [2, 3]);
    assert!(matches!(outcomes[2], Err(ExecuteError::Rejected(Overdrawn { missing: 2 }))), "{outcomes:?}");
    assert_eq!(deposit.await.unwrap(), Version(4));
    assert_eq!(last.executed().await.unwrap().version(), Version(5));
    assert_eq!(nothing.executed().await.unwrap().version(), Version(5));
    assert_eq!(balance(&account).await, (0, Version(5)));
    assert_clean(&on.kuma).await;
}

#[tokio::test]
async fn a_command_tells_its_events_and_the_version_that_they_made() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let account = kuma.entity::<Account>("a-1");
    account.append(deposited(10)).await.unwrap();
    let said = Metadata { correlation: Some("because".into()), ..Metadata::default() };
    let executed = account.execute(withdraw(3)).expecting(Version(1)).metadata(said.clone()).await.unwrap();
    assert_eq!(
        (executed.version(), executed.events(), executed.is_repeated()),
        (Version(2), &[withdrawn(3)][..], false)
    );
    let events = account.raw().events(2.., 9).await.unwrap();
    assert_eq!((events.len(), &events[0].metadata), (1, &Some(said)));
    assert_eq!(events[0].decode::<Account>().unwrap(), withdrawn(3));
    // On a version that it is not at, nothing is decided.
    let command = withdraw(3);
    let error = failed(account.execute(command.clone()).expecting(Version(1)).await);
    assert!(matches!(
        error,
        AppendError::Refused(Refused::WrongVersion { expected: Version(1), actual: Version(2), .. })
    ));
    assert_eq!(command.decided(), 0);
}

#[tokio::test]
async fn a_command_with_nothing_to_do_returns_the_version_and_writes_nothing() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let account = kuma.entity::<Account>("a-1");
    for version in 0..3 {
        let executed = account.execute(withdraw(0)).await.unwrap();
        assert_eq!((executed.version(), executed.events().len(), executed.is_repeated()), (Version(version), 0, false));
        account.append(deposited(1)).await.unwrap();
    }
    assert_eq!(balance(&account).await, (3, Version(3)));
    assert_clean(&kuma).await;
}

/// A service that is asked about accounts that do not exist must not write a key for each of them.
#[tokio::test]
async fn what_is_not_written_to_an_entity_that_was_never_written_leaves_nothing_on_the_disk() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let groups = kuma.stats().keys.groups;
    for number in 0..5 {
        let account = kuma.entity::<Account>(format!("nobody-{number}"));
        let rejected = account.execute(withdraw(1)).await;
        assert!(matches!(rejected, Err(ExecuteError::Rejected(Overdrawn { missing: 1 }))));
        assert_eq!(account.execute(withdraw(0)).idempotency_key("key").await.unwrap().version(), Version(0));
        let error = failed(account.execute(withdraw(1)).expecting(Version(4)).await);
        assert!(matches!(error, AppendError::Refused(Refused::WrongVersion { actual: Version(0), .. })));
        let error = account.append(deposited(1)).expecting(Version(4)).await.unwrap_err();
        assert!(matches!(error, AppendError::Refused(Refused::WrongVersion { actual: Version(0), .. })));
        let error = failed(account.execute(Spend { events: 5000, bytes: 1 }).await);
        assert!(matches!(error, AppendError::Refused(Refused::TooManyEvents { .. })));
        assert_eq!(balance(&account).await, (0, Version(0)));
    }
    let report = kuma.verify(|_| {}).await.unwrap();
    assert_eq!((report.keys, report.keys_without_entity, kuma.stats().keys.groups - groups), (0, 0, 0));
    // And then it is written like any other.
    let account = kuma.entity::<Account>("nobody-0");
    account.execute(Open { amount: 7 }).idempotency_key("key").await.unwrap();
    let again = account.execute(Open { amount: 7 }).idempotency_key("key").await.unwrap();
    assert_eq!((again.version(), again.is_repeated()), (Version(1), true));
    assert_eq!(balance(&account).await, (7, Version(1)));
    assert_clean(&kuma).await;
}

#[derive(Serialize)]
struct Open {
    amount: i64,
}

impl Command<Account> for Open {
    type Rejection = Infallible;

    fn decide(self, _: &Account) -> Result<Vec<AccountEvent>, Infallible> {
        Ok(vec![deposited(self.amount)])
    }
}

// ---- rejections

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_rejection_waits_for_the_state_that_it_was_decided_on() {
    let on = OnDisk::new().await;
    let account = on.kuma.entity::<Account>("a-1");
    account.append(deposited(10)).await.unwrap();
    on.disk.sync_takes(Duration::from_millis(200));
    let first = account.execute(withdraw(10)).submit().await.unwrap();
    on.until_syncing().await;
    let other = on.kuma.entity::<Account>("a-1");
    let (rejected, nothing) = (other.execute(withdraw(10)).await, other.execute(withdraw(0)).await);
    assert!(matches!(rejected, Err(ExecuteError::Rejected(Overdrawn { missing: 10 }))), "{rejected:?}");
    assert_eq!(nothing.unwrap().version(), Version(2));
    assert_eq!(on.disk.counts().syncs_in_flight, 0, "it was answered before the first one was on the disk");
    assert_eq!(first.executed().await.unwrap().version(), Version(2));
}

/// Were it told, the caller would believe in a withdrawal that never happened.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_decided_on_a_state_that_never_became_durable_is_not_told() {
    for (fault, error) in [(Fault::Sync, Errno::Io), (Fault::Write, Errno::Io), (Fault::Write, Errno::Full)] {
        let on = OnDisk::new().await;
        let account = on.kuma.entity::<Account>("a-1");
        account.append(deposited(10)).await.unwrap();
        on.fail_in_log_only();
        on.disk.sync_takes(Duration::from_millis(100));
        on.disk.fail_nth(fault, 1, error);
        // All before the disk has answered.
        let first = account.execute(withdraw(10)).submit().await.unwrap();
        let rejected = account.execute(withdraw(10)).submit().await.unwrap();
        let nothing = account.execute(withdraw(0)).submit().await.unwrap();
        let stale = account.execute(withdraw(1)).expecting(Version(1)).submit().await.unwrap();
        let panics = account.execute(Panics).submit().await.unwrap();
        let first = failed(first.executed().await);
        assert!(matches!(first, AppendError::Unavailable(Unavailable::NotWritten { .. })), "{first:?}");
        let is_void = |error: AppendError| {
            let is_void = matches!(
                &error,
                AppendError::Unavailable(Unavailable::NotWritten {
                    cause: NotWritten::Voided | NotWritten::Io { .. } | NotWritten::DiskFull { .. },
                    ..
                })
            );
            assert!(is_void && error.is_retry_safe(), "{fault:?}: {error:?}");
        };
        is_void(failed(rejected.executed().await));
        is_void(failed(nothing.executed().await));
        is_void(failed(stale.executed().await));
        is_void(failed(panics.executed().await));
        // On the true state there is enough.
        let executed =
            eventually("the disk is well again", SOON, async || account.execute(withdraw(10)).await.ok()).await;
        assert_eq!(executed.version(), Version(2));
        assert_eq!(balance(&account).await, (0, Version(2)));
        assert_clean(&on.kuma).await;
        on.kuma.shutdown().await;
    }
}

// ---- commands that fail

#[derive(Serialize)]
struct Panics;

impl Command<Account> for Panics {
    type Rejection = Overdrawn;

    fn decide(self, _: &Account) -> Result<Vec<AccountEvent>, Overdrawn> {
        panic!("decide panics, as told");
    }
}

#[derive(Serialize)]
struct Poison;

impl Command<Account> for Poison {
    type Rejection = Infallible;

    fn decide(self, _: &Account) -> Result<Vec<AccountEvent>, Infallible> {
        Ok(vec![deposited(1000), AccountEvent::Poisoned])
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_decide_that_panics_is_refused_and_leaves_the_entity_and_its_neighbours_alone() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let (account, neighbour) = (kuma.entity::<Account>("a-1"), kuma.entity::<Account>("a-2"));
    account.append(deposited(100)).await.unwrap();
    for round in 0..10 {
        let before = account.execute(withdraw(1)).submit().await.unwrap();
        let beside = neighbour.append(deposited(1)).submit().await.unwrap();
        let panics = account.execute(Panics).idempotency_key(format!("panics {round}")).submit().await.unwrap();
        let poison = account.execute(Poison).idempotency_key(format!("poison {round}")).submit().await.unwrap();
        let after = account.execute(withdraw(1)).submit().await.unwrap();
        assert_eq!(before.executed().await.unwrap().version(), Version(2 * round + 2));
        let error = failed(panics.executed().await);
        assert!(matches!(error, AppendError::Refused(Refused::CommandPanicked { .. })), "{error:?}");
        let error = failed(poison.executed().await);
        assert!(matches!(error, AppendError::Refused(Refused::ApplyPanicked { .. })), "{error:?}");
        assert_eq!(after.executed().await.unwrap().version(), Version(2 * round + 3));
        assert_eq!(beside.await.unwrap(), Version(round + 1));
        assert_eq!(balance(&account).await, (98 - 2 * round as i64, Version(2 * round + 3)));
    }
    assert_eq!(kuma.stats().shards[0].quarantined, 0, "a request's fault is not the entity's");
    assert_clean(&kuma).await;
    kuma.shutdown().await;
    let kuma = start(dir.path(), 1).await;
    assert_eq!(balance(&kuma.entity("a-1")).await, (80, Version(21)));
}

/// An entity whose events can be of any size.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Shelf {
    items: u64,
}

#[derive(Debug, Serialize, Deserialize)]
enum ShelfEvent {
    Placed { content: String },
}

impl Entity for Shelf {
    const KIND: &'static str = "shelf";
    type Event = ShelfEvent;

    fn apply(&mut self, ShelfEvent::Placed { .. }: &ShelfEvent) {
        self.items += 1;
    }
}

#[derive(Clone, Copy, Serialize)]
struct Spend {
    events: usize,
    bytes: usize,
}

impl Command<Shelf> for Spend {
    type Rejection = Infallible;

    fn decide(self, _: &Shelf) -> Result<Vec<ShelfEvent>, Infallible> {
        Ok((0..self.events).map(|_| ShelfEvent::Placed { content: "x".repeat(self.bytes) }).collect())
    }
}

impl Command<Account> for Spend {
    type Rejection = Infallible;

    fn decide(self, _: &Account) -> Result<Vec<AccountEvent>, Infallible> {
        Ok(vec![deposited(1); self.events])
    }
}

#[tokio::test]
async fn a_command_that_decides_more_than_a_commit_may_hold_is_refused() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let shelf = kuma.entity::<Shelf>("s-1");
    let spend = async |events, bytes| shelf.execute(Spend { events, bytes }).idempotency_key("key").await;
    let refused = |outcome| match failed(outcome) {
        AppendError::Refused(refused) => refused,
        other => panic!("{other:?}"),
    };
    for _ in 0..2 {
        assert!(matches!(refused(spend(4097, 1).await), Refused::TooManyEvents { events_max: 4096 }));
        assert!(matches!(refused(spend(1, 1 << 20).await), Refused::EventTooLarge { index: 0, .. }));
        assert!(matches!(refused(spend(5, 1_000_000).await), Refused::AppendTooLarge { .. }));
        assert_eq!(shelf.read().await.unwrap().version(), Version(0));
    }
    // What fits is taken, up to the last of it; the bytes count against what may wait, and are given back.
    assert_eq!(spend(4096, 1).await.unwrap().version(), Version(4096));
    assert_eq!(shelf.execute(Spend { events: 4, bytes: 1_000_000 }).await.unwrap().events().len(), 4);
    until("the bytes are given back", async || kuma.stats().shards[0].waiting_bytes == 0).await;
    assert_eq!(shelf.read().await.unwrap().items, 4100);
    assert_clean(&kuma).await;
}

// ---- many at once

/// 200 tasks take from one account until it is empty. Each that was told of success took, no other did, and it was never overdrawn.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_withdrawals_at_once_never_overdraw_an_account() {
    const TASKS: u64 = 200;
    const BALANCE: i64 = 3000;
    let seed = seed("withdrawals");
    let dir = directory();
    let kuma = start(dir.path(), 2).await;
    kuma.entity::<Account>("a-1").append(deposited(BALANCE)).await.unwrap();
    let tasks = (0..TASKS).map(|task| {
        let kuma = kuma.clone();
        tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(seed + task);
            let account = kuma.entity::<Account>("a-1");
            let mut taken = Vec::new();
            let mut rejected = 0;
            for _ in 0..10 {
                let amount = random.random_range(1..10);
                match account.execute(withdraw(amount)).await {
                    Ok(executed) => taken.push((executed.version(), amount)),
                    Err(ExecuteError::Rejected(Overdrawn { missing })) => {
                        assert!(missing > 0 && missing <= amount);
                        rejected += 1;
                    }
                    Err(error) => panic!("{error:?}"),
                }
                if random.random_ratio(1, 40) {
                    account.raw().passivate().await.unwrap();
                }
            }
            (taken, rejected)
        })
    });
    let done = try_join_all(tasks).await.unwrap();
    let mut taken: Vec<(Version, i64)> = done.iter().flat_map(|(taken, _)| taken.clone()).collect();
    taken.sort_unstable();
    let rejected: u64 = done.iter().map(|(_, rejected)| rejected).sum();
    println!("{} taken, {rejected} rejected", taken.len());
    let account = kuma.entity::<Account>("a-1");
    let (left, version) = balance(&account).await;
    assert!(left >= 0 && rejected > 0, "{left} left");
    assert_eq!(BALANCE - taken.iter().map(|(_, amount)| amount).sum::<i64>(), left);
    assert_eq!(version.0, 1 + taken.len() as u64);
    // Each was told of its own event.
    let events = account.raw().events(2.., usize::MAX).await.unwrap();
    for (event, (version, amount)) in events.iter().zip(taken) {
        assert_eq!((event.version, event.decode::<Account>().unwrap()), (version, withdrawn(amount)));
    }
    let mut running = BALANCE;
    for event in events {
        running -= event.json().unwrap()["amount"].as_i64().unwrap();
        assert!(running >= 0, "overdrawn at version {}", event.version);
    }
    assert_clean(&kuma).await;
}

/// A future that is dropped, before, while or after it is decided: the command happens once or not at all, and nobody else notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn futures_that_are_dropped_do_no_harm() {
    let seed = seed("dropped futures");
    let on = OnDisk::new().await;
    on.disk.sync_takes(Duration::from_millis(1));
    let account = on.kuma.entity::<Account>("a-1");
    account.append(deposited(100_000)).await.unwrap();
    let told = Arc::new(AtomicU64::new(0));
    let tasks = (0..40).map(|task| {
        let (kuma, told) = (on.kuma.clone(), told.clone());
        tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(seed + task);
            for number in 0..10 {
                let account = kuma.entity::<Account>("a-1");
                let command = account.execute(withdraw(1)).idempotency_key(format!("{task} {number}"));
                let after = Duration::from_micros(random.random_range(0..3000));
                match random.random_range(0..4) {
                    0 => drop(command),
                    1 => drop(command.submit().await.unwrap()),
                    2 => {
                        // Dropped somewhere on the way.
                        if let Ok(executed) = tokio::time::timeout(after, command).await {
                            executed.unwrap();
                            told.fetch_add(1, SeqCst);
                        }
                    }
                    _ => {
                        command.await.unwrap();
                        told.fetch_add(1, SeqCst);
                    }
                }
            }
        })
    });
    join_all(tasks).await.into_iter().for_each(|done| done.unwrap());
    // Behind all that is on its way.
    account.execute(withdraw(0)).await.unwrap();
    let (left, version) = balance(&account).await;
    assert_eq!(100_000 - left, version.0 as i64 - 1);
    assert!(version.0 > told.load(SeqCst));
    until("all room is given back", async || on.kuma.stats().shards[0].waiting_bytes == 0).await;
    // Each once, whatever became of its future.
    for task in 0..40 {
        for number in 0..10 {
            account.execute(withdraw(1)).idempotency_key(format!("{task} {number}")).await.unwrap();
        }
    }
    assert_eq!(balance(&account).await, (100_000 - 400, Version(401)));
    assert_clean(&on.kuma).await;
}

/// An entity of which more may wait than its room; commands that are refused for want of it were not decided.
#[tokio::test]
async fn a_command_that_finds_no_room_was_not_decided() {
    let dir = directory();
    let kuma =
        kuma_core::Kuma::start(kuma_core::Options::new(dir.path()).shards(1).entity_appends_max(8)).await.unwrap();
    let account = kuma.entity::<Account>("a-1");
    account.append(deposited(100)).await.unwrap();
    let command = Withdraw { amount: 1, ..Withdraw::default() };
    let mut outcomes: Vec<Result<Executed<Account>, ExecuteError<Overdrawn>>> = Vec::new();
    let mut pending = Vec::new();
    for _ in 0..20 {
        match account.execute(command.clone()).submit().await {
            Ok(submitted) => pending.push(submitted.executed()),
            Err(error) => outcomes.push(Err(error.into())),
        }
    }
    let overloaded = outcomes.len();
    assert!(overloaded > 0);
    for outcome in outcomes {
        assert!(outcome.as_ref().is_err_and(ExecuteError::is_retry_safe));
        let error = failed(outcome);
        assert!(matches!(error, AppendError::Unavailable(Unavailable::Overloaded { .. })), "{error:?}");
    }
    for done in join_all(pending).await {
        done.unwrap();
    }
    assert_eq!(command.decided(), 20 - overloaded as u64);
    assert_eq!(balance(&account).await.0, 100 - (20 - overloaded as i64));
}
