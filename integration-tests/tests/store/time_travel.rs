//! The past does not change: states and events as of any version or time, of entities in memory or not, while they are written to.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    ops::{Bound, RangeBounds},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering::SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::common::{
    Account, Ledger, OnDisk, assert_clean, deposited, directory, entered, read_files, start, until, withdraw,
    write_files,
};
use futures_util::{StreamExt, TryStreamExt, future::try_join_all};
use kuma_core::{
    Direction, Durability, Handle, Kuma, Metadata, NewEvent, Options, ReadError, Refused, ReplayError, Unavailable,
    Version,
};
use serde_json::json;

const DAY: i64 = 24 * 3600;

/// A store whose clock a test sets, in seconds since 1970; negative is before.
struct Timed {
    clock: Arc<AtomicI64>,
    kuma: Kuma,
    dir: tempfile::TempDir,
}

fn at(seconds: i64) -> SystemTime {
    let since = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { UNIX_EPOCH - since } else { UNIX_EPOCH + since }
}

impl Timed {
    async fn new(seconds: i64) -> Timed {
        Timed::open(directory(), Arc::new(AtomicI64::new(seconds))).await
    }

    async fn open(dir: tempfile::TempDir, clock: Arc<AtomicI64>) -> Timed {
        let now = clock.clone();
        let options = Options::new(dir.path()).shards(1).wall_clock(move || at(now.load(SeqCst)));
        Timed { clock, kuma: Kuma::start(options).await.unwrap(), dir }
    }

    async fn reopen(self) -> Timed {
        self.kuma.shutdown().await;
        Timed::open(self.dir, self.clock).await
    }

    fn set(&self, seconds: i64) {
        self.clock.store(seconds, SeqCst);
    }
}

async fn entries(ledger: &Handle<Ledger>, seconds: i64) -> Vec<u64> {
    ledger.at(at(seconds)).await.unwrap().entries.clone()
}

async fn versions(ledger: &Handle<Ledger>, range: impl RangeBounds<u64>, direction: Direction) -> Vec<u64> {
    ledger.history(range, direction).map_ok(|event| event.version.0).try_collect().await.unwrap()
}

fn no_such_version(error: ReadError) -> (u64, u64) {
    match error {
        ReadError::Refused(Refused::NoSuchVersion { asked, newest, .. }) => (asked.0, newest.0),
        other => panic!("{other:?}"),
    }
}

// ---- by time

#[tokio::test]
async fn a_clock_that_is_set_back_by_years_changes_no_order_and_no_answer_about_the_past() {
    let year = 365 * DAY;
    let mut timed = Timed::new(50 * year).await;
    let ledger = timed.kuma.entity::<Ledger>("l-1");
    ledger.append(entered(1)).await.unwrap();
    timed.set(51 * year);
    ledger.append(entered(2)).await.unwrap();
    // Back by years, also to before 1970, in the same process and in the next.
    for (number, seconds) in [(3, 40 * year), (4, -20 * year), (5, 51 * year - 1)] {
        timed.set(seconds);
        let ledger = timed.kuma.entity::<Ledger>("l-1");
        assert_eq!(ledger.append(entered(number)).await.unwrap(), Version(number));
        if number == 4 {
            timed = timed.reopen().await;
        }
    }
    timed.set(52 * year);
    let ledger = timed.kuma.entity::<Ledger>("l-1");
    ledger.append(entered(6)).await.unwrap();
    for _ in 0..2 {
        let ledger = timed.kuma.entity::<Ledger>("l-1");
        let events: Vec<_> = ledger.history(.., Direction::Forward).try_collect().await.unwrap();
        let times: Vec<i64> =
            events.iter().map(|event| event.at.duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 / year).collect();
        assert_eq!(times, [50, 51, 51, 51, 51, 52]);
        assert_eq!(entries(&ledger, 50 * year).await, [1]);
        assert_eq!(entries(&ledger, 51 * year - 1).await, [1]);
        // All that share a time come at once.
        assert_eq!(entries(&ledger, 51 * year).await, [1, 2, 3, 4, 5]);
        assert_eq!(entries(&ledger, 60 * year).await, [1, 2, 3, 4, 5, 6]);
        assert!(entries(&ledger, 49 * year).await.is_empty());
        ledger.raw().passivate().await.unwrap();
    }
    assert_clean(&timed.kuma).await;
    // A new entity knows nothing of the others' clock.
    timed.set(DAY);
    let young = timed.kuma.entity::<Ledger>("l-2");
    young.append(entered(1)).await.unwrap();
    assert_eq!((entries(&young, DAY).await, entries(&young, DAY - 1).await), (vec![1], vec![]));
}

#[tokio::test]
async fn before_its_first_commit_an_entity_is_in_its_default_state_at_version_0() {
    let timed = Timed::new(100 * DAY).await;
    let ledger = timed.kuma.entity::<Ledger>("l-1");
    ledger.append(entered(1)).await.unwrap();
    for seconds in [-100 * DAY, -1, 0, 1, 100 * DAY - 1] {
        let then = ledger.at(at(seconds)).await.unwrap();
        assert_eq!((then.version(), &*then), (Version(0), &Ledger::default()), "{seconds}");
    }
    assert_eq!(ledger.at_version(Version(0)).await.unwrap().version(), Version(0));
    // Microseconds are what is kept.
    let committed = ledger.raw().events(.., 1).await.unwrap()[0].at;
    assert_eq!(ledger.at(committed).await.unwrap().version(), Version(1));
    assert_eq!(ledger.at(committed - Duration::from_micros(1)).await.unwrap().version(), Version(0));
    assert_eq!(ledger.at(committed + Duration::from_secs(1 << 40)).await.unwrap().version(), Version(1));
    // Without its type it is the same, as JSON.
    assert_eq!(timed.kuma.raw("ledger", "l-1").at(at(0)).await.unwrap(), (json!({ "entries": [] }), Version(0)));
    assert_eq!(timed.kuma.raw("document", "d-1").at(at(0)).await.unwrap(), (json!({}), Version(0)));
}

#[tokio::test]
async fn commits_of_one_instant_are_told_apart_by_version_only() {
    let timed = Timed::new(DAY).await;
    let ledger = timed.kuma.entity::<Ledger>("l-1");
    for number in 1..=5 {
        ledger.append(entered(number)).await.unwrap();
    }
    assert_eq!(entries(&ledger, DAY).await, [1, 2, 3, 4, 5]);
    assert!(entries(&ledger, DAY - 1).await.is_empty());
    assert_eq!(ledger.at_version(Version(3)).await.unwrap().entries, [1, 2, 3]);
}

// ---- by version

#[tokio::test]
async fn a_version_that_is_not_there_yet_is_refused_and_names_the_newest() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    for newest in 0..4 {
        for beyond in [newest + 1, newest + 2, 1 << 40, i64::MAX as u64, u64::MAX] {
            let error = ledger.at_version(Version(beyond)).await.unwrap_err();
            assert_eq!(no_such_version(error), (beyond, newest));
            let error = ledger.diff(Version(0), Version(beyond)).await.unwrap_err();
            assert_eq!(no_such_version(error), (beyond, newest));
        }
        assert_eq!(ledger.at_version(Version(newest)).await.unwrap().version(), Version(newest));
        ledger.append(entered(newest)).await.unwrap();
    }
}

#[tokio::test]
async fn versions_within_a_commit_are_states_and_ranges_like_any_other() {
    let dir = directory();
    // The commits of six events are where snapshots are made as well.
    let kuma = Kuma::start(Options::new(dir.path()).shards(1).snapshot_every(2, 1 << 20)).await.unwrap();
    let ledger = kuma.entity::<Ledger>("l-1");
    for commit in 0..8 {
        let metadata = Metadata { correlation: Some(format!("commit {commit}")), ..Metadata::default() };
        ledger.append_all((1..=6).map(|event| entered(6 * commit + event))).metadata(metadata).await.unwrap();
    }
    for is_live in [true, false] {
        if !is_live {
            ledger.raw().passivate().await.unwrap();
        }
        for version in 0..=48 {
            let then = ledger.at_version(Version(version)).await.unwrap();
            assert_eq!((then.version(), &then.entries), (Version(version), &(1..=version).collect::<Vec<_>>()));
        }
        for first in [0, 1, 2, 6, 7, 8, 12, 13, 47, 48, 49] {
            for last in [0, 1, 5, 6, 7, 12, 13, 30, 48, 49, 1000] {
                let expected: Vec<u64> = (first.max(1)..=last.min(48)).collect();
                assert_eq!(versions(&ledger, first..=last, Direction::Forward).await, expected, "{first}..={last}");
                let backward: Vec<u64> = expected.into_iter().rev().collect();
                assert_eq!(versions(&ledger, first..=last, Direction::Backward).await, backward, "{first}..={last}");
            }
        }
    }
    // What came with a commit stands with each of its events.
    let events: Vec<_> = ledger.history(8..=13, Direction::Backward).try_collect().await.unwrap();
    let said: Vec<_> = events.into_iter().map(|event| event.metadata.unwrap().correlation.unwrap()).collect();
    assert_eq!(said, ["commit 2", "commit 1", "commit 1", "commit 1", "commit 1", "commit 1"]);
}

#[tokio::test]
async fn every_kind_of_range_means_what_it_says() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    for number in 1..=40 {
        ledger.append(entered(number)).await.unwrap();
    }
    let both = async |range: (Bound<u64>, Bound<u64>), expected: Vec<u64>| {
        assert_eq!(versions(&ledger, range, Direction::Forward).await, expected, "{range:?}");
        let backward: Vec<u64> = expected.into_iter().rev().collect();
        assert_eq!(versions(&ledger, range, Direction::Backward).await, backward, "{range:?}");
    };
    use Bound::{Excluded, Included, Unbounded};
    both((Unbounded, Unbounded), (1..=40).collect()).await;
    both((Included(3), Excluded(6)), vec![3, 4, 5]).await;
    both((Excluded(3), Included(6)), vec![4, 5, 6]).await;
    both((Unbounded, Excluded(1)), vec![]).await;
    both((Unbounded, Excluded(0)), vec![]).await;
    both((Unbounded, Included(0)), vec![]).await;
    both((Included(9), Excluded(9)), vec![]).await;
    both((Included(40), Unbounded), vec![40]).await;
    both((Excluded(40), Unbounded), vec![]).await;
    both((Included(u64::MAX), Unbounded), vec![]).await;
    both((Excluded(u64::MAX), Unbounded), vec![]).await;
    both((Included(39), Included(u64::MAX)), vec![39, 40]).await;
    both((Included(i64::MAX as u64), Included(u64::MAX)), vec![]).await;
    // Backwards on purpose.
    both((Included(9), Included(3)), vec![]).await;
}

// ---- entities that are not in memory, or not at all

#[tokio::test]
async fn an_entity_that_was_never_written_has_an_empty_past() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    for is_live in [false, true] {
        assert_eq!(kuma.stats().live_entities(), usize::from(is_live));
        let then = ledger.at_version(Version(0)).await.unwrap();
        assert_eq!((then.version(), &*then), (Version(0), &Ledger::default()));
        assert_eq!(ledger.at(SystemTime::now()).await.unwrap().version(), Version(0));
        assert_eq!(no_such_version(ledger.at_version(Version(1)).await.unwrap_err()), (1, 0));
        assert!(ledger.diff(Version(0), Version(0)).await.unwrap().is_empty());
        for direction in [Direction::Forward, Direction::Backward] {
            assert!(versions(&ledger, .., direction).await.is_empty());
        }
        assert!(ledger.raw().events(.., 9).await.unwrap().is_empty());
        // Now it is in memory, and still not on the disk.
        assert_eq!(ledger.read().await.unwrap().version(), Version(0));
    }
    let report = kuma.verify(|_| {}).await.unwrap();
    assert_eq!((report.totals(), report.keys), ((0, 0, 0), 0));
}

#[tokio::test]
async fn looking_at_the_past_brings_no_entity_into_memory() {
    let dir = directory();
    let kuma = start(dir.path(), 2).await;
    for number in 0..20 {
        let ledger = kuma.entity::<Ledger>(format!("l-{number}"));
        ledger.append_all([entered(1), entered(2)]).await.unwrap();
        ledger.raw().passivate().await.unwrap();
    }
    for number in 0..20 {
        let ledger = kuma.entity::<Ledger>(format!("l-{number}"));
        assert_eq!(versions(&ledger, .., Direction::Forward).await, [1, 2]);
        assert_eq!(versions(&ledger, .., Direction::Backward).await, [2, 1]);
        assert_eq!(ledger.at_version(Version(1)).await.unwrap().entries, [1]);
        assert_eq!(ledger.at(SystemTime::now()).await.unwrap().entries, [1, 2]);
        assert!(!ledger.diff(Version(1), Version(2)).await.unwrap().is_empty());
        assert_eq!(ledger.raw().events(2.., 9).await.unwrap().len(), 1);
    }
    assert_eq!(kuma.stats().live_entities(), 0);
}

// ---- long histories

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_history_of_twenty_thousand_events_streams_in_both_directions_and_stops_where_it_is_let_go() {
    const EVENTS: u64 = 20_000;
    let dir = directory();
    let options = Options::new(dir.path()).shards(1).durability(Durability::Normal).entity_appends_max(EVENTS as usize);
    let kuma = Kuma::start(options).await.unwrap();
    let ledger = kuma.entity::<Ledger>("l-1");
    // A few large commits, and thousands of small ones.
    let mut pending = Vec::new();
    let mut next = 1;
    for size in [4096, 4096, 1, 4096].into_iter().chain(std::iter::repeat(1)) {
        let size = size.min(EVENTS + 1 - next);
        if size == 0 {
            break;
        }
        pending.push(ledger.append_all((next..next + size).map(entered)).submit().await.unwrap());
        next += size;
    }
    try_join_all(pending).await.unwrap();
    for is_live in [true, false] {
        if !is_live {
            ledger.raw().passivate().await.unwrap();
        }
        for direction in [Direction::Forward, Direction::Backward] {
            let mut history = ledger.history(.., direction);
            let mut seen = 0;
            while let Some(event) = history.next().await {
                seen += 1;
                let expected = if direction == Direction::Forward { seen } else { EVENTS + 1 - seen };
                assert_eq!(event.unwrap().version, Version(expected));
            }
            assert_eq!(seen, EVENTS);
            // It stays at its end.
            assert!(history.next().await.is_none());
            // Ten of them, then no more is wanted. As a stream it can be combined.
            let ten: Vec<u64> =
                ledger.history(.., direction).take(10).map_ok(|event| event.version.0).try_collect().await.unwrap();
            assert_eq!(ten.len(), 10);
            drop(ledger.history(.., direction));
        }
        for version in [1, 4096, 4097, 8193, 12_289, 19_999, EVENTS] {
            let then = ledger.at_version(Version(version)).await.unwrap();
            assert_eq!((then.entries.len() as u64, then.entries.last()), (version, Some(&version)));
        }
        assert_eq!(ledger.raw().events(19_990.., 5).await.unwrap().len(), 5);
    }
    // Many that were begun and are not read on.
    let mut begun = Vec::new();
    for _ in 0..200 {
        let mut history = ledger.history(.., Direction::Backward);
        history.next().await.unwrap().unwrap();
        begun.push(history);
    }
    // They hold nothing that others need.
    ledger.append(entered(EVENTS + 1)).await.unwrap();
    for mut history in begun {
        assert_eq!(history.next().await.unwrap().unwrap().version, Version(EVENTS - 1));
    }
}

/// A reader that is let go, or whose store is closed below it.
#[tokio::test]
async fn a_history_that_outlives_its_store_ends_with_a_typed_error() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    for number in 1..=40 {
        ledger.append(entered(number)).await.unwrap();
    }
    let mut history = ledger.history(.., Direction::Forward);
    history.next().await.unwrap().unwrap();
    let unread = ledger.history(.., Direction::Forward);
    kuma.shutdown().await;
    let rest: Vec<Result<_, ReadError>> = history.collect().await;
    let error = rest.last().unwrap().as_ref().unwrap_err();
    assert!(matches!(error, ReadError::Unavailable(_)), "{error:?}");
    assert!(rest[..rest.len() - 1].iter().all(Result::is_ok), "what was read already is told");
    let none: Vec<Result<_, ReadError>> = unread.collect().await;
    assert!(matches!(none[..], [Err(ReadError::Unavailable(Unavailable::ShuttingDown))]), "{none:?}");
}

/// Pages end at different commits in either direction; a commit that is missing there was once passed over in silence.
#[tokio::test]
async fn a_commit_that_is_missing_is_an_error_in_either_direction_wherever_it_was() {
    const COMMITS: u64 = 60;
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("l-1");
    for commit in 0..COMMITS {
        ledger.append_all([entered(2 * commit), entered(2 * commit + 1)]).await.unwrap();
    }
    kuma.shutdown().await;
    let files = read_files(dir.path());
    // The newest one is only known by the digest, which `verify` compares.
    for missing in 0..COMMITS - 1 {
        write_files(dir.path(), &files);
        let file = rusqlite::Connection::open(dir.path().join("shard-000.db")).unwrap();
        let deleted = file.execute("DELETE FROM log_index WHERE version = ?", [2 * missing as i64 + 1]).unwrap();
        file.close().unwrap();
        assert_eq!(deleted, 1);
        let kuma = start(dir.path(), 1).await;
        let ledger = kuma.entity::<Ledger>("l-1");
        for direction in [Direction::Forward, Direction::Backward] {
            let all: Vec<Result<_, ReadError>> = ledger.history(.., direction).collect().await;
            let (last, before) = all.split_last().unwrap();
            assert!(
                matches!(
                    last,
                    Err(ReadError::Unavailable(Unavailable::Unreadable { cause: ReplayError::Gap { .. }, .. }))
                ),
                "{missing} {direction:?}: {last:?}"
            );
            assert!(before.iter().all(Result::is_ok));
        }
        assert!(ledger.read().await.is_err() && ledger.at_version(Version(2 * COMMITS)).await.is_err(), "{missing}");
        kuma.shutdown().await;
    }
}

// ---- differences

#[tokio::test]
async fn a_difference_tells_what_changed_between_two_versions_in_either_direction() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let account = kuma.entity::<Account>("a-1");
    account.append(deposited(10)).await.unwrap();
    account.execute(withdraw(3)).await.unwrap();
    let there = account.diff(Version(1), Version(2)).await.unwrap();
    assert_eq!((there.from, there.to, there.to_string()), (Version(1), Version(2), "~ /balance: 10 -> 7\n".to_owned()));
    assert_eq!(account.diff(Version(2), Version(1)).await.unwrap().to_string(), "~ /balance: 7 -> 10\n");
    assert!(account.diff(Version(2), Version(2)).await.unwrap().is_empty());
    let document = kuma.raw("document", "d-1");
    for data in [
        json!({ "name": "a", "tags": ["x", "y"], "deep": { "one": 1 } }),
        json!({ "name": null, "tags": ["y"], "deep": { "two": 2 } }),
    ] {
        document.append(NewEvent::json("Changed", &data).unwrap()).await.unwrap();
    }
    let lines = async |from, to| {
        let text = document.diff(Version(from), Version(to)).await.unwrap().to_string();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    };
    assert_eq!(
        lines(1, 2).await,
        ["+ /deep/two: 2", "- /name: \"a\"", "- /tags/1: \"y\"", "~ /tags/0: \"x\" -> \"y\""]
    );
    assert_eq!(
        lines(2, 1).await,
        ["+ /name: \"a\"", "+ /tags/1: \"y\"", "- /deep/two: 2", "~ /tags/0: \"y\" -> \"x\""]
    );
    assert_eq!(lines(0, 0).await, Vec::<String>::new());
    assert_eq!(lines(2, 0).await.len(), 2, "its fields are gone");
}

// ---- beside appends

/// What is on its way may never come true.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_past_holds_only_what_is_on_the_disk() {
    let on = OnDisk::new().await;
    let ledger = on.kuma.entity::<Ledger>("l-1");
    ledger.append(entered(1)).await.unwrap();
    on.disk.sync_takes(Duration::from_millis(200));
    let pending = ledger.append(entered(2)).submit().await.unwrap();
    on.until_syncing().await;
    // Also through the very handle that has it on its way.
    for handle in [&ledger, &on.kuma.entity::<Ledger>("l-1")] {
        assert_eq!(versions(handle, .., Direction::Forward).await, [1]);
        assert_eq!(versions(handle, .., Direction::Backward).await, [1]);
        assert_eq!(no_such_version(handle.at_version(Version(2)).await.unwrap_err()), (2, 1));
        assert_eq!(handle.at(SystemTime::now() + Duration::from_secs(9)).await.unwrap().version(), Version(1));
    }
    assert_eq!(on.disk.counts().syncs_in_flight, 1, "it was on the disk by then");
    assert_eq!(pending.await.unwrap(), Version(2));
    assert_eq!(versions(&ledger, .., Direction::Backward).await, [2, 1]);
    assert_eq!(ledger.at_version(Version(2)).await.unwrap().entries, [1, 2]);
}

/// Whoever was told of a version finds it, and nothing that anyone saw ever changes.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_past_is_the_same_for_everyone_while_the_present_goes_on() {
    const APPENDS: u64 = 1500;
    let dir = directory();
    // The clock jumps about.
    let ticks = Arc::new(AtomicI64::new(0));
    let now = move || {
        let tick = ticks.fetch_add(1, SeqCst);
        at(100 * DAY + (tick * 7919) % 5000)
    };
    let options = Options::new(dir.path()).shards(1).snapshot_every(20, 1 << 20).wall_clock(now);
    let kuma = Kuma::start(options).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let newest = Arc::new(AtomicI64::new(0));
    let writer = tokio::spawn({
        let (kuma, done, newest) = (kuma.clone(), done.clone(), newest.clone());
        async move {
            let ledger = kuma.entity::<Ledger>("l-1");
            let mut version = 0;
            while version < APPENDS {
                let size = 1 + version % 4;
                let appended = ledger.append_all((version..version + size).map(entered)).await.unwrap();
                version += size;
                assert_eq!(appended, Version(version));
                newest.store(version as i64, SeqCst);
                if version % 50 == 0 {
                    ledger.raw().passivate().await.unwrap();
                }
            }
            done.store(true, SeqCst);
        }
    });
    until("there is something", async || newest.load(SeqCst) > 0).await;
    let readers = (0..4).map(|reader| {
        let (kuma, done, newest) = (kuma.clone(), done.clone(), newest.clone());
        tokio::spawn(async move {
            let ledger = kuma.entity::<Ledger>("l-1");
            let (mut rounds, mut last_times) = (0, Vec::new());
            while !done.load(SeqCst) || rounds < 3 {
                let told = newest.load(SeqCst) as u64;
                match reader {
                    0 => {
                        let then = ledger.at_version(Version(told)).await.unwrap();
                        assert_eq!(then.entries, (0..told).collect::<Vec<_>>());
                    }
                    1 => {
                        let forward = versions(&ledger, told / 2.., Direction::Forward).await;
                        assert!(forward.last().is_some_and(|last| *last >= told));
                        assert!(forward.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{forward:?}");
                    }
                    2 => {
                        let backward = versions(&ledger, .., Direction::Backward).await;
                        assert!(backward[0] >= told);
                        assert_eq!(backward, (1..=backward[0]).rev().collect::<Vec<_>>());
                    }
                    _ => {
                        let events: Vec<_> = ledger.history(..=told, Direction::Forward).try_collect().await.unwrap();
                        let times: Vec<SystemTime> = events.iter().map(|event| event.at).collect();
                        assert!(times.is_sorted(), "the clock jumped back and took events with it");
                        assert!(times.starts_with(&last_times), "an event's time has changed");
                        let middle = times[times.len() / 2];
                        let then = ledger.at(middle).await.unwrap();
                        assert!(then.version().0 >= times.partition_point(|time| *time <= middle) as u64);
                        assert_eq!(then.entries, (0..then.version().0).collect::<Vec<_>>());
                        last_times = times;
                    }
                }
                rounds += 1;
            }
            rounds
        })
    });
    let rounds = try_join_all(readers).await.unwrap();
    writer.await.unwrap();
    println!("rounds of the readers: {rounds:?}");
    assert_clean(&kuma).await;
}
