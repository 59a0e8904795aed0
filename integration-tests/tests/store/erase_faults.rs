//! Erasures with something in the way: a disk that fails, is full or loses its power, a reader, damage, user code that hangs. Whatever
//! it is, nothing acknowledged of others is lost, no receipt is given too early, and what has begun completes by itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::traces;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::common::{Account, Ledger, assert_clean, deposited, directory, entered, until};
use crate::traces::{TOKEN, Traces};
use futures_util::{StreamExt, TryStreamExt, future::join_all, stream};
use integration_tests::{Oracle, Probe, TestAppend, options, seed};
use kuma_core::{
    AppendError, Direction, Entity, EraseError, Kuma, LocalMasterKey, MasterKeySource, Options, RawHandle, ReadError,
    Reason, Receipt, ReceiptId, Refused, Unavailable, slot_of,
};
use parking_lot::{Condvar, Mutex};
use power_loss::{Disk, Errno, Fault, PowerLoss};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

fn reason() -> Reason {
    Reason::new("request 4711")
}

fn is_erased<T>(outcome: &Result<T, ReadError>) -> bool {
    matches!(outcome, Err(ReadError::Refused(Refused::Erased { .. })))
}

fn data(dir: &TempDir) -> PathBuf {
    dir.path().join("data")
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap().success());
}

/// Notes what a store holds, in a copy.
async fn note(traces: &mut Traces, path: &Path) {
    let dir = directory();
    copy(path, &data(&dir));
    let master = LocalMasterKey::from_file(&data(&dir).join("master.key")).unwrap();
    traces.note_all(&data(&dir), &master).await;
}

const VICTIMS: usize = 4;

fn victim(number: usize) -> String {
    format!("{TOKEN}-{number}")
}

/// A closed store of two shards with victims and neighbours.
struct Template {
    dir: TempDir,
    oracle: Oracle,
    traces: Traces,
}

impl Template {
    async fn make() -> Template {
        let (dir, mut oracle) = (directory(), Oracle::default());
        let kuma = Kuma::start(options(&data(&dir)).snapshot_every(4, 1 << 20)).await.unwrap();
        for round in 0..12 {
            let names = (0..VICTIMS).map(victim).chain(["n-1", "n-2", "n-3", "n-4"].map(str::to_owned));
            append(&kuma, names, round, &mut oracle).await;
        }
        // So that there is an audit log.
        let first = kuma.entity::<Ledger>("the first one");
        first.append(entered(1)).await.unwrap();
        first.erase(reason()).await.unwrap();
        kuma.shutdown().await;
        let mut traces = Traces::new();
        note(&mut traces, &data(&dir)).await;
        Template { dir, oracle, traces }
    }

    fn copy(&self) -> TempDir {
        let dir = directory();
        copy(&data(&self.dir), &data(&dir));
        dir
    }
}

/// One append to each, all at once; what they were told.
async fn append(kuma: &Kuma, names: impl Iterator<Item = String>, round: u64, oracle: &mut Oracle) {
    let names: Vec<String> = names.collect();
    let appended = names.iter().enumerate().map(|(number, name)| {
        let append = TestAppend { id: round << 16 | number as u64, events: 2, bytes: 40 << (round % 7) };
        let handle = kuma.entity::<Probe>(name);
        async move { (append, handle.append_all(append.events()).await) }
    });
    for (name, (append, outcome)) in names.iter().zip(join_all(appended).await) {
        oracle.told(name, append, &outcome);
    }
}

fn handles(kuma: &Kuma, victims: &[String]) -> Vec<RawHandle> {
    victims.iter().map(|id| kuma.entity::<Probe>(id).raw().clone()).collect()
}

/// What an oracle knows of everybody but these.
async fn judge(kuma: &Kuma, oracle: &Oracle, erased: &BTreeSet<String>, context: &str) {
    oracle.without(erased).judge(kuma).await.assert_clean(context);
}

/// What is wrong with the disk while entities are erased.
#[derive(Clone, Copy, Debug)]
struct Wrong {
    what: Fault,
    n: u64,
    error: Errno,
    /// Until it is mended, or only once.
    stays: bool,
    /// Only in the file with this in its name.
    file: &'static str,
    then_cut: bool,
}

#[derive(Debug, Default)]
struct Tally {
    cases: u64,
    struck: u64,
    receipts: u64,
    unfinished: u64,
    not_begun: u64,
}

async fn with_wrong_disk(template: &Template, wrong: Wrong) -> Tally {
    let context = format!("{wrong:?}");
    let (dir, mut oracle) = (template.copy(), template.oracle.clone());
    let path = data(&dir);
    let power = PowerLoss::register(Disk::Honest);
    let kuma = Kuma::start(options(&path).vfs(power.vfs_name())).await.unwrap();
    let victims: Vec<String> = (0..VICTIMS - 1).map(victim).collect();
    let mut traces = template.traces.clone();
    power.only_files_matching(move |path| path.to_string_lossy().contains(wrong.file));
    match wrong.stays {
        true => power.fail_from_nth(wrong.what, wrong.n, wrong.error),
        false => power.fail_nth(wrong.what, wrong.n, wrong.error),
    }
    let load = async {
        for round in 100..103 {
            let names = ["n-1", "n-2", "n-3", "new"].map(str::to_owned).into_iter();
            append(&kuma, names, round, &mut oracle).await;
        }
    };
    let erased =
        join_all(handles(&kuma, &victims).into_iter().map(|handle| async move { handle.erase(reason()).await }));
    let (outcomes, ()) = futures_util::future::join(erased, load).await;
    let mut tally = Tally { cases: 1, struck: u64::from(power.counts().faults_injected > 0), ..Tally::default() };
    let mut begun = BTreeSet::new();
    for (id, outcome) in victims.iter().zip(&outcomes) {
        let handle = kuma.entity::<Probe>(id);
        match outcome {
            Ok(receipt) => {
                tally.receipts += 1;
                traces.look_for(&receipt.receipt.entity);
                begun.insert(id.clone());
                assert!(is_erased(&handle.read().await), "{context}");
            }
            Err(EraseError::Unfinished { detail, .. }) => {
                tally.unfinished += 1;
                begun.insert(id.clone());
                let (answer, unknown) = (handle.read().await, detail.contains("not known"));
                assert!(is_erased(&answer) || unknown || wrong.stays && answer.is_err(), "{context}: {answer:?}");
            }
            // "Nothing was erased", and nothing will be.
            Err(EraseError::Unavailable(_)) => tally.not_begun += 1,
            Err(error) => panic!("{context}: {error:?}"),
        }
    }
    assert!(tally.struck == 1 || tally.receipts == victims.len() as u64, "{context}: {outcomes:?}");
    // Whoever has a receipt is gone, at once.
    traces.assert_none(&path, &context);
    power.heal();
    if wrong.then_cut {
        power.cut(wrong.n);
        kuma.shutdown().await;
        traces.assert_none(&path, &format!("{context}, after the cut"));
    }
    let kuma = match wrong.then_cut {
        true => Kuma::start(options(&path)).await.unwrap(),
        false => kuma,
    };
    until(&format!("{context}: it completes by itself"), async || kuma.erasures_unfinished() == 0).await;
    for id in &victims {
        let handle = kuma.entity::<Probe>(id);
        if begun.contains(id) {
            // Its file is opened again within a second.
            let mut receipt = None;
            until(&format!("{context}: the receipt"), async || {
                receipt = handle.erase(reason()).await.ok();
                receipt.is_some()
            })
            .await;
            let receipt = receipt.unwrap();
            traces.look_for(&receipt.receipt.entity);
            receipt.verify(&kuma.public_key()).unwrap();
        } else {
            // Its file is opened again within a second.
            until(&format!("{context}: it was told not to be begun"), async || handle.read().await.is_ok()).await;
        }
    }
    kuma.shutdown().await;
    traces.assert_none(&path, &format!("{context}, closed"));
    let kuma = Kuma::start(options(&path)).await.unwrap();
    assert_eq!(kuma.erasures_unfinished(), 0);
    judge(&kuma, &oracle, &begun, &context).await;
    kuma.shutdown().await;
    traces.assert_none(&path, &format!("{context}, at the end"));
    tally
}

async fn all_wrong(template: &Template, wrongs: impl Iterator<Item = Wrong>) -> Tally {
    let cases = wrongs.map(|wrong| with_wrong_disk(template, wrong));
    let add = async |mut sum: Tally, one: Tally| {
        sum.cases += one.cases;
        sum.struck += one.struck;
        sum.receipts += one.receipts;
        sum.unfinished += one.unfinished;
        sum.not_begun += one.not_begun;
        sum
    };
    // They wait most of the time.
    stream::iter(cases).buffer_unordered(8).fold(Tally::default(), add).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_failed_write_or_sync_an_erasure_completes_by_itself_or_has_not_begun() {
    let template = Template::make().await;
    for (what, error, step) in [
        (Fault::Sync, Errno::Io, 1),
        (Fault::Write, Errno::Io, 3),
        (Fault::Write, Errno::Full, 4),
        (Fault::Truncate, Errno::Io, 1),
    ] {
        let wrong = |n| Wrong { what, n, error, stays: false, file: "", then_cut: false };
        let last = if what == Fault::Truncate { 6 } else { 40 * step };
        let tally = all_wrong(&template, (1..=last).step_by(step as usize).map(wrong)).await;
        println!("{what:?} fails once with {error:?}: {tally:?}");
        assert!(tally.struck > 2 && tally.unfinished > 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_disk_that_stays_broken_or_full_nothing_is_promised_and_it_goes_on_when_it_is_well() {
    let template = Template::make().await;
    for file in ["node.db", "keys.db", "shard-000.db", "shard-001.db", ""] {
        for (what, error) in [(Fault::Write, Errno::Io), (Fault::Sync, Errno::Io), (Fault::Write, Errno::Full)] {
            let wrong = |n| Wrong { what, n, error, stays: true, file, then_cut: false };
            let tally = all_wrong(&template, [1, 2, 3, 4, 6, 9].into_iter().map(wrong)).await;
            println!("{what:?} fails with {error:?} in {file:?} until it is mended: {tally:?}");
        }
    }
}

/// A cut log is a change of a file's length, which is lost with the power like any other. The receipt must not be earlier than it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_comes_back_when_the_power_goes_right_after_the_receipt() {
    let template = Template::make().await;
    for seed in 0..12 {
        let dir = template.copy();
        let path = data(&dir);
        let power = PowerLoss::register(Disk::Honest);
        let kuma = Kuma::start(options(&path).vfs(power.vfs_name())).await.unwrap();
        let mut oracle = template.oracle.clone();
        // What is in the logs.
        append(&kuma, (0..VICTIMS).map(victim).chain(["n-1".to_owned()]), 50, &mut oracle).await;
        append(&kuma, [format!("{TOKEN} is new")].into_iter(), 51, &mut oracle).await;
        let mut traces = template.traces.clone();
        note(&mut traces, &path).await;
        let victims = [victim(0), victim(1), format!("{TOKEN} is new")];
        for handle in handles(&kuma, &victims) {
            let receipt = handle.erase(reason()).await.unwrap();
            traces.look_for(&receipt.receipt.entity);
        }
        traces.assert_none(&path, "with the power on");
        power.cut(seed);
        kuma.shutdown().await;
        traces.assert_none(&path, &format!("after cut {seed}"));
        let kuma = Kuma::start(options(&path)).await.unwrap();
        assert_eq!(kuma.erasures_unfinished(), 0);
        judge(&kuma, &oracle, &victims.into_iter().collect(), "after the cut").await;
        kuma.shutdown().await;
    }
}

/// The power goes at any instant of an erasure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whenever_the_power_goes_an_erasure_completes_or_has_not_begun() {
    let first = seed("erase_faults, power");
    let template = Template::make().await;
    let (mut acked, mut completed, mut untouched) = (0, 0, 0);
    for number in 0..40 {
        let case = first.wrapping_add(number);
        let context = format!("KUMA_SEED={case}");
        let mut random = StdRng::seed_from_u64(case);
        let (dir, mut oracle) = (template.copy(), template.oracle.clone());
        let path = data(&dir);
        let power = PowerLoss::register(Disk::Honest);
        let kuma = Kuma::start(options(&path).vfs(power.vfs_name())).await.unwrap();
        let victims: Vec<String> = (0..random.random_range(1..=VICTIMS)).map(victim).collect();
        power.cut_after(random.random_range(1..500), case);
        let load = async {
            for round in 200.. {
                append(&kuma, ["n-1", "n-2", "n-3"].map(str::to_owned).into_iter(), round, &mut oracle).await;
                if power.is_cut() || round == 260 {
                    return;
                }
            }
        };
        let erased =
            join_all(handles(&kuma, &victims).into_iter().map(|handle| async move { handle.erase(reason()).await }));
        let (outcomes, ()) = futures_util::future::join(erased, load).await;
        power.cut(case);
        kuma.shutdown().await;
        let mut traces = template.traces.clone();
        let mut gone = BTreeSet::new();
        for (id, receipt) in
            victims.iter().zip(&outcomes).filter_map(|(id, outcome)| Some((id, outcome.as_ref().ok()?)))
        {
            traces.look_for(&receipt.receipt.entity);
            gone.insert(id.clone());
        }
        traces.assert_none(&path, &format!("{context}: of those with a receipt"));
        acked += gone.len();
        let kuma = Kuma::start(options(&path)).await.unwrap();
        for (id, outcome) in victims.iter().zip(&outcomes) {
            let answer = kuma.entity::<Probe>(id).read().await;
            match outcome {
                Ok(_) => assert!(is_erased(&answer), "{context}: {answer:?}"),
                Err(EraseError::Unfinished { detail, .. }) if !detail.contains("not known") => {
                    assert!(is_erased(&answer), "{context}: {answer:?}");
                }
                Err(_) => assert!(answer.is_ok() || is_erased(&answer), "{context}: {answer:?}"),
            }
            if answer.is_err() {
                gone.insert(id.clone());
            }
        }
        until(&format!("{context}: it completes"), async || kuma.erasures_unfinished() == 0).await;
        for id in &gone {
            let receipt = kuma.entity::<Probe>(id).erase(reason()).await.unwrap();
            traces.look_for(&receipt.receipt.entity);
        }
        for (id, receipt) in
            victims.iter().zip(&outcomes).filter_map(|(id, outcome)| Some((id, outcome.as_ref().ok()?)))
        {
            assert_eq!(kuma.entity::<Probe>(id).erase(reason()).await.unwrap(), *receipt, "{context}");
        }
        traces.assert_none(&path, &format!("{context}: completed"));
        judge(&kuma, &oracle, &gone, &context).await;
        kuma.shutdown().await;
        completed += gone.len();
        untouched += victims.len() - gone.len();
    }
    println!("40 cuts: {acked} receipts given before, {completed} erased in the end, {untouched} untouched");
    assert!(completed > acked && acked > 0 && untouched > 0);
}

// ---- what is in the way

/// A backup tool, say, that reads the file of a shard for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_delays_the_receipt_and_nobodys_commits() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1)).await.unwrap();
    let (ann, bob) = (kuma.entity::<Ledger>(TOKEN), kuma.entity::<Ledger>("bob"));
    ann.append(entered(1)).await.unwrap();
    let mut traces = Traces::new();
    note(&mut traces, dir.path()).await;
    for patience in [Duration::from_millis(300), Duration::from_secs(13)] {
        let reader = traces::open(&dir.path().join("shard-000.db"));
        reader.execute_batch("BEGIN").unwrap();
        let _: i64 = reader.query_row("SELECT count(*) FROM log", [], |row| row.get(0)).unwrap();
        let erasing = tokio::spawn({
            let ann = ann.clone();
            async move { ann.erase(reason()).await }
        });
        let (since, mut slowest) = (Instant::now(), Duration::ZERO);
        while since.elapsed() < patience {
            let begun = Instant::now();
            bob.append(entered(2)).await.unwrap();
            slowest = slowest.max(begun.elapsed());
        }
        assert!(slowest < Duration::from_secs(2), "an append took {slowest:?}");
        if patience < Duration::from_secs(10) {
            assert!(!erasing.is_finished(), "the receipt was given while the log could not be cut");
            drop(reader);
            erasing.await.unwrap().unwrap();
        } else {
            let error = erasing.await.unwrap().unwrap_err();
            assert!(
                matches!(&error, EraseError::Unfinished { detail, .. } if detail.contains("a reader")),
                "{error:?}"
            );
            assert_eq!(kuma.erasures_unfinished(), 1);
            drop(reader);
            until("it completes", async || kuma.erasures_unfinished() == 0).await;
        }
        traces.look_for(&ann.raw().hash().unwrap().to_hex());
        traces.assert_none(dir.path(), "with the receipt");
        ann.recreate(reason()).await.unwrap();
        ann.append(entered(1)).await.unwrap();
        traces.look_for_nobody();
        note(&mut traces, dir.path()).await;
    }
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// The audit log must not be too busy for what is to be noted in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_are_erased_however_few_appends_an_entity_may_have_waiting() {
    let dir = directory();
    let options = || Options::new(dir.path()).shards(1).entity_appends_max(3);
    let kuma = Kuma::start(options()).await.unwrap();
    let handles: Vec<RawHandle> =
        (0..40).map(|number| kuma.entity::<Ledger>(number.to_string()).raw().clone()).collect();
    for handle in &handles {
        kuma.entity::<Ledger>(handle_id(&handles, handle)).append(entered(1)).await.unwrap();
    }
    let done = kuma.erase_many(handles, reason(), |_, _| {}).await.unwrap();
    assert_eq!((done.erased, done.failed), (40, 0));
    kuma.shutdown().await;
}

fn handle_id(handles: &[RawHandle], handle: &RawHandle) -> String {
    handles.iter().position(|other| other.hash() == handle.hash()).unwrap().to_string()
}

static GATE: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

/// Its code hangs until the gate is opened.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Hanging;

#[derive(Serialize, Deserialize)]
enum HangingEvent {
    Done,
    Hung,
}

impl Entity for Hanging {
    const KIND: &'static str = "hanging";
    type Event = HangingEvent;

    fn apply(&mut self, event: &HangingEvent) {
        if matches!(event, HangingEvent::Hung) {
            let mut open = GATE.0.lock();
            while !*open {
                GATE.1.wait(&mut open);
            }
        }
    }
}

/// One entity that does not come to an end with what it was asked must not keep all others from being erased.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn an_entity_that_hangs_delays_its_own_erasure_and_no_other() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1)).await.unwrap();
    let (hanging, ann, bob) = (kuma.entity::<Hanging>("h"), kuma.entity::<Ledger>("ann"), kuma.entity::<Ledger>("bob"));
    hanging.append(HangingEvent::Done).await.unwrap();
    for ledger in [&ann, &bob] {
        ledger.append(entered(1)).await.unwrap();
    }
    let hung = hanging.append(HangingEvent::Hung).submit().await.unwrap();
    let first = tokio::spawn({
        let handles = [hanging.raw().clone(), ann.raw().clone()];
        async move { join_all(handles.iter().map(|handle| handle.erase(reason()))).await }
    });
    let in_time = tokio::time::timeout(Duration::from_secs(20), bob.erase(reason())).await;
    let in_time = in_time.is_ok_and(|erased| erased.is_ok());
    let both = tokio::time::timeout(Duration::from_secs(20), first).await;
    *GATE.0.lock() = true;
    GATE.1.notify_all();
    assert!(in_time, "it waited for another one");
    let both = both.expect("it waits for ever").unwrap();
    assert!(matches!(both[0], Err(EraseError::Unfinished { .. })), "{both:?}");
    assert!(both[1].is_ok(), "{both:?}");
    // What was on its way when the erasure began is written, or not; it is erased in any case.
    drop(hung.await);
    until("the one that hung is erased too", async || kuma.erasures_unfinished() == 0).await;
    assert!(is_erased(&hanging.read().await.map(|_| ())));
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// A page of the log is damaged that holds nothing but one victim's rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_victim_that_cannot_be_erased_for_damage_does_not_keep_others_from_it() {
    let dir = directory();
    let options = || Options::new(dir.path()).shards(1).no_snapshots().scrub_bytes_per_second(0);
    let kuma = Kuma::start(options()).await.unwrap();
    for (name, rounds) in [("others", 30), ("damaged", 100), ("ann", 30), ("bob", 300)] {
        for id in 0..rounds {
            let append = TestAppend { id, events: 1, bytes: 400 };
            kuma.entity::<Probe>(name).append_all(append.events()).await.unwrap();
        }
    }
    let hash = kuma.entity::<Probe>("damaged").raw().hash().unwrap().to_hex();
    kuma.shutdown().await;
    let file = dir.path().join("shard-000.db");
    // The page with the middle of its history.
    let body: Vec<u8> = traces::open_closed(&file)
        .query_row(
            "SELECT body FROM log JOIN entity USING (eid) WHERE lower(hex(id_hash)) = ? AND version = 50",
            [hash],
            |row| row.get(0),
        )
        .unwrap();
    let sound = std::fs::read(&file).unwrap();
    let mut bytes = sound.clone();
    let place = bytes.windows(body.len()).position(|window| window == body).unwrap() / 4096 * 4096;
    bytes[place..place + 64].fill(0xee);
    std::fs::write(&file, &bytes).unwrap();

    let kuma = Kuma::start(options()).await.unwrap();
    let handles: Vec<RawHandle> = ["damaged", "ann"].iter().map(|id| kuma.entity::<Probe>(id).raw().clone()).collect();
    let outcomes = join_all(handles.iter().map(|handle| handle.erase(reason()))).await;
    println!("{outcomes:?}");
    assert!(matches!(outcomes[0], Err(EraseError::Unfinished { .. })), "{:?}", outcomes[0]);
    assert!(outcomes[1].is_ok(), "{:?}", outcomes[1]);
    kuma.entity::<Probe>("bob").erase(reason()).await.unwrap();
    kuma.entity::<Probe>("others").append_all(TestAppend { id: 99, events: 1, bytes: 1 }.events()).await.unwrap();
    assert_eq!(kuma.erasures_unfinished(), 1);
    assert!(is_erased(&handles[0].read().await.map(|_| ())));
    kuma.shutdown().await;
}

/// A damaged row is a row like any other to an erasure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_victim_with_a_damaged_row_is_erased() {
    let dir = directory();
    let options = || Options::new(dir.path()).shards(1).scrub_bytes_per_second(0);
    let kuma = Kuma::start(options()).await.unwrap();
    let account = kuma.entity::<Account>("ann");
    for _ in 0..5 {
        account.append(deposited(1)).await.unwrap();
    }
    let bob = kuma.entity::<Account>("bob");
    bob.append(deposited(3)).await.unwrap();
    kuma.shutdown().await;
    rusqlite::Connection::open(dir.path().join("shard-000.db"))
        .unwrap()
        .execute("UPDATE log SET body = zeroblob(length(body)) WHERE position = 2", [])
        .unwrap_or_else(|error| panic!("{error}"));
    let kuma = Kuma::start(options()).await.unwrap();
    let account = kuma.entity::<Account>("ann");
    assert!(account.read().await.is_err());
    let receipt = account.erase(reason()).await.unwrap();
    assert_eq!(receipt.receipt.stores.iter().map(|store| store.commits).sum::<u64>(), 5);
    assert!(is_erased(&account.read().await.map(|_| ())));
    assert_eq!(kuma.entity::<Account>("bob").read().await.unwrap().balance, 3);
    kuma.shutdown().await;
}

/// One shard's file is damaged while an erasure in it is not complete. Others are erased; it is, when the file is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_in_a_shard_out_of_use_waits_and_others_do_not() {
    let dir = directory();
    let master = LocalMasterKey::generate();
    let source = MasterKeySource::Provider(Arc::new(master));
    let options = || Options::new(dir.path()).shards(2).master_key(source.clone());
    let audit = slot_of("kuma.audit", "erasures").shard(2);
    let of = |shard: u16| {
        (0..).map(|number| format!("{TOKEN}-{number}")).filter(move |id| slot_of("ledger", id).shard(2) == shard)
    };
    let [waiting, late]: [String; 2] = of(1 - audit).take(2).collect::<Vec<_>>().try_into().unwrap();
    let other = of(audit).next().unwrap();
    let power = PowerLoss::register(Disk::Honest);
    let kuma = Kuma::start(options().vfs(power.vfs_name())).await.unwrap();
    for id in [&waiting, &late, &other] {
        kuma.entity::<Ledger>(id).append(entered(1)).await.unwrap();
    }
    let file = format!("shard-{:03}.db", 1 - audit);
    let broken = format!("{file}-wal");
    power.only_files_matching(move |path| path.to_string_lossy().ends_with(&broken));
    power.fail_from_nth(Fault::Write, 1, Errno::Io);
    let error = kuma.entity::<Ledger>(&waiting).erase(reason()).await.unwrap_err();
    assert!(matches!(error, EraseError::Unfinished { .. }), "{error:?}");
    kuma.shutdown().await;
    power.heal();
    let sound = std::fs::read(dir.path().join(&file)).unwrap();
    std::fs::write(dir.path().join(&file), [&[0xee; 4096], &sound[4096..]].concat()).unwrap();

    let kuma = Kuma::start(options()).await.unwrap();
    assert_eq!(kuma.stats().shards.iter().filter(|shard| shard.out_of_use.is_some()).count(), 1);
    kuma.entity::<Ledger>(&other).erase(reason()).await.unwrap();
    let error = kuma.entity::<Ledger>(&late).erase(reason()).await.unwrap_err();
    assert!(matches!(error, EraseError::Unavailable(Unavailable::ShardOutOfUse { .. })), "{error:?}");
    assert_eq!(kuma.erasures_unfinished(), 1);
    kuma.shutdown().await;

    std::fs::write(dir.path().join(&file), &sound).unwrap();
    let kuma = Kuma::start(options()).await.unwrap();
    assert!(is_erased(&kuma.entity::<Ledger>(&waiting).read().await.map(|_| ())));
    until("it completes", async || kuma.erasures_unfinished() == 0).await;
    let receipt = kuma.entity::<Ledger>(&waiting).erase(reason()).await.unwrap();
    assert!(receipt.receipt.resumed);
    assert_eq!(kuma.entity::<Ledger>(&late).read().await.unwrap().entries, [1]);
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

// ---- what comes late

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_history_that_is_being_read_ends_with_erased() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1)).await.unwrap();
    let probe = kuma.entity::<Probe>("ann");
    for id in 0..600 {
        probe.append_all(TestAppend { id, events: 1, bytes: 100 }.events()).await.unwrap();
    }
    for passivated in [true, false] {
        if passivated {
            probe.raw().passivate().await.unwrap();
        } else {
            probe.read().await.unwrap();
        }
        let mut histories =
            [Direction::Forward, Direction::Backward].map(|direction| probe.raw().history(.., direction));
        for history in &mut histories {
            history.try_next().await.unwrap().unwrap();
        }
        if passivated {
            continue;
        }
        let (mut pipe, mut end) = tokio::io::duplex(64);
        let export = tokio::spawn({
            let kuma = kuma.clone();
            async move { kuma.export_all(&mut pipe, |_| {}).await.map(|_| ()) }
        });
        let mut begun = [0; 32];
        tokio::io::AsyncReadExt::read_exact(&mut end, &mut begun).await.unwrap();
        probe.erase(reason()).await.unwrap();
        for history in &mut histories {
            let mut events = 1;
            let error = loop {
                match history.try_next().await {
                    Ok(Some(_)) => events += 1,
                    Ok(None) => panic!("a history ended after {events} events as if that were all"),
                    Err(error) => break error,
                }
            };
            assert!(is_erased::<()>(&Err(error)));
            assert!(events < 600);
        }
        let drained = tokio::spawn(async move {
            let mut rest = Vec::new();
            let read = tokio::io::AsyncReadExt::read_to_end(&mut end, &mut rest).await;
            read.map(|_| rest.iter().filter(|byte| **byte == b'\n').count())
        });
        // It has the whole entity, or says why not.
        let (exported, lines) = (export.await.unwrap(), drained.await.unwrap().unwrap());
        println!("an export that was running: {exported:?}, {lines} lines");
        assert!(exported.is_err() || lines > 600, "{exported:?}, {lines} lines");
    }
    kuma.shutdown().await;
}

static SAVES: (Mutex<bool>, Condvar) = (Mutex::new(true), Condvar::new());

/// Saving it waits for the gate.
#[derive(Clone, Default)]
struct SlowlySaved(u64);

impl Serialize for SlowlySaved {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut open = SAVES.0.lock();
        while !*open {
            SAVES.1.wait(&mut open);
        }
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for SlowlySaved {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u64::deserialize(deserializer).map(SlowlySaved)
    }
}

#[derive(Serialize, Deserialize)]
enum SlowEvent {
    Added,
}

impl Entity for SlowlySaved {
    const KIND: &'static str = "slowly-saved";
    type Event = SlowEvent;

    fn apply(&mut self, _: &SlowEvent) {
        self.0 += 1;
    }
}

/// A snapshot of the old life comes to the writer after the erasure, and after the new life has begun.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_late_snapshot_of_the_old_life_is_not_written() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1).snapshot_every(3, 1 << 20)).await.unwrap();
    let (slow, other) = (kuma.entity::<SlowlySaved>("ann"), kuma.entity::<Ledger>("bob"));
    slow.append(SlowEvent::Added).await.unwrap();
    *SAVES.0.lock() = false;
    for _ in 0..8 {
        slow.append(SlowEvent::Added).await.unwrap();
        slow.read().await.unwrap();
    }
    slow.erase(reason()).await.unwrap();
    slow.recreate(reason()).await.unwrap();
    slow.append(SlowEvent::Added).await.unwrap();
    *SAVES.0.lock() = true;
    SAVES.1.notify_all();
    // The snapshotter makes one after the other: with one of somebody else's it is through with those before.
    let snapshots = || {
        let connection = traces::open(&dir.path().join("shard-000.db"));
        let mut rows = connection.prepare("SELECT entity.kind, life FROM snapshot JOIN entity USING (eid)").unwrap();
        let rows = rows.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, u32>(1)?))).unwrap();
        rows.map(Result::unwrap).collect::<Vec<_>>()
    };
    until("a snapshot of somebody else", async || {
        other.append(entered(1)).await.unwrap();
        snapshots().iter().any(|(kind, _)| kind == "ledger")
    })
    .await;
    assert!(snapshots().iter().all(|(kind, life)| kind != "slowly-saved" || *life == 2), "{:?}", snapshots());
    slow.raw().passivate().await.unwrap();
    assert_eq!((slow.read().await.unwrap().version().0, slow.read().await.unwrap().0), (1, 1));
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// Appends of the old life that were sent and not answered yet are of the old life; whoever sends later is of the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_appends_of_the_old_life_do_not_reach_the_new_one() {
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1)).await.unwrap();
    for round in 0..30_u64 {
        let ledger = kuma.entity::<Ledger>(format!("ann-{round}"));
        ledger.append(entered(0)).await.unwrap();
        let mut pending = Vec::new();
        for number in 1..=20 {
            pending.push(ledger.append(entered(number)).submit().await.unwrap());
        }
        let (erased, late) = futures_util::future::join(ledger.erase(reason()), join_all(pending)).await;
        erased.unwrap();
        for outcome in late {
            assert!(matches!(outcome, Ok(_) | Err(AppendError::Refused(Refused::Erased { .. }))), "{outcome:?}");
        }
        // A handle that still knows the actor of the old life.
        let old = ledger.clone();
        ledger.recreate(reason()).await.unwrap();
        let (one, two) = futures_util::future::join(
            old.append(entered(100)).into_future(),
            ledger.append(entered(100)).into_future(),
        )
        .await;
        assert_eq!(one.unwrap().0 + two.unwrap().0, 3);
        assert_eq!(ledger.read().await.unwrap().entries, [100, 100]);
    }
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

// ---- odd input

#[tokio::test]
async fn odd_receipts_and_ids_are_refused_and_harm_nothing() {
    let mut random = StdRng::seed_from_u64(seed("odd receipts"));
    let dir = directory();
    let kuma = Kuma::start(Options::new(dir.path()).shards(1)).await.unwrap();
    let ledger = kuma.entity::<Ledger>("ann");
    ledger.append(entered(1)).await.unwrap();
    let receipt = ledger.erase(reason()).await.unwrap();
    let text = receipt.to_string();
    for _ in 0..3_000 {
        let mut bytes = text.clone().into_bytes();
        for _ in 0..random.random_range(1..4) {
            let place = random.random_range(0..bytes.len());
            match random.random_range(0..3) {
                0 => bytes[place] = random.random_range(b' '..b'~'),
                1 => drop(bytes.remove(place)),
                _ => bytes.insert(place, random.random_range(b' '..b'~')),
            }
        }
        let Ok(odd) = String::from_utf8(bytes) else { continue };
        if let Ok(parsed) = odd.parse::<Receipt>() {
            // Neither the case of a hex digit nor space between the fields is a difference.
            let same = parsed.to_string().to_lowercase() == text.to_lowercase();
            assert!(same || parsed.verify(&kuma.public_key()).is_err(), "{odd}");
        }
    }
    for id in ["", "00", &"g".repeat(32), &"0".repeat(31), &"0".repeat(34), "../../etc/passwd"] {
        assert!(id.parse::<ReceiptId>().is_err(), "{id}");
    }
    assert_eq!(kuma.receipt(ReceiptId([7; 16])).await.unwrap(), None);
    assert_eq!(kuma.receipt(receipt.receipt.id).await.unwrap(), Some(receipt));
    kuma.shutdown().await;
}
