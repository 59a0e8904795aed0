//! Backups: made beside full load, continued, cut short at any instant, damaged in any byte; and what is restored from them, which
//! holds what was acknowledged and nothing of what was erased.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use integration_tests::{Oracle, Probe, TestAppend, options, seed, start};
use kuma_core::{
    AppendError, BackupError, BackupReport, CopyError, DataDirError, Kuma, LedgerError, MasterKeySource, NewEvent,
    OpenError, Options, Pending, ReadError, Reason, Refused, Restore, RestoreError, RestoreReport, RestoreWarning,
    StartError, Unavailable,
};
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tempfile::TempDir;

/// A store, and where its backups go.
struct Fixture {
    dir: TempDir,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn data(&self) -> PathBuf {
        self.path("data")
    }

    fn master(&self) -> MasterKeySource {
        MasterKeySource::File(self.data().join("master.key"))
    }

    fn options(&self, name: &str) -> Options {
        options(&self.path(name)).master_key(self.master())
    }

    /// Keys and ledger as of now, beside the events.
    async fn back_up(&self, kuma: &Kuma) -> BackupReport {
        let report = kuma.backup(self.path("events")).run(|_| ()).await.unwrap();
        kuma.backup_keys(self.path("keys")).await.unwrap();
        assert!(report.bad_slots.is_empty(), "{:?}", report.bad_slots);
        report
    }

    fn restore(&self) -> Restore {
        Restore::new(self.path("events")).keys(self.path("keys"))
    }

    async fn restored(&self, restore: Restore, name: &str) -> (Kuma, RestoreReport) {
        let report = restore.run(self.options(name), |_| ()).await.unwrap();
        (Kuma::start(self.options(name)).await.unwrap(), report)
    }

    /// Whether a restore is refused; and that nothing is left of it.
    async fn refused(&self, restore: Restore) -> RestoreError {
        let target = self.path("refused");
        let error = restore.run(self.options("refused"), |_| ()).await.unwrap_err();
        assert!(!target.exists(), "{error:?}: something was left at the target");
        error
    }

    async fn ledger(&self, kuma: &Kuma, name: &str) -> PathBuf {
        let path = self.path(name);
        let mut file = tokio::fs::File::create(&path).await.unwrap();
        kuma.export_ledger(&mut file).await.unwrap();
        path
    }
}

/// Appends `count` commits to `entities` entities, many at a time.
async fn fill(kuma: &Kuma, oracle: &mut Oracle, first: u64, count: u64, entities: u64) {
    let mut pending = VecDeque::new();
    for id in first..first + count {
        let entity = format!("entity-{}", id % entities);
        let append = TestAppend { id, events: 1 + (id % 3) as u32, bytes: 120 };
        pending.push_back((
            entity.clone(),
            append,
            kuma.entity::<Probe>(&entity).append_all(append.events()).submit().await.unwrap(),
        ));
        if pending.len() >= 256 {
            let (entity, append, pending) = pending.pop_front().unwrap();
            oracle.acked(&entity, append, pending.await.unwrap());
        }
    }
    for (entity, append, pending) in pending {
        oracle.acked(&entity, append, pending.await.unwrap());
    }
}

/// What each slot holds, by its number.
fn slots(report: &BackupReport) -> BTreeMap<u16, (u64, String)> {
    let slots = report.manifest.shards.iter().flat_map(|shard| &shard.slots);
    slots.map(|(slot, len, digest)| (*slot, (*len, digest.clone()))).collect()
}

async fn slots_now(kuma: &Kuma) -> BTreeMap<u16, (u64, String)> {
    let dir = tempfile::tempdir().unwrap();
    slots(&kuma.backup(dir.path()).run(|_| ()).await.unwrap())
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Appends as fast as it can until it is told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    oracle: Arc<Mutex<Oracle>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn start(kuma: &Kuma) -> Load {
        let mut load = Load { stop: Arc::default(), acked: Arc::default(), oracle: Arc::default(), tasks: Vec::new() };
        for writer in 0..16 {
            let (stop, acked, oracle) = (load.stop.clone(), load.acked.clone(), load.oracle.clone());
            load.tasks.push(tokio::spawn(write(kuma.clone(), writer, stop, acked, oracle)));
        }
        load
    }

    async fn until_acked(&self, acked: u64) {
        while self.acked.load(Relaxed) < acked {
            tokio::task::yield_now().await;
        }
    }

    /// What was acknowledged so far.
    fn oracle(&self) -> Oracle {
        self.oracle.lock().clone()
    }

    async fn stop(self) -> Oracle {
        self.stop.store(true, Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.oracle.lock().clone()
    }
}

async fn write(kuma: Kuma, writer: u64, stop: Arc<AtomicBool>, acked: Arc<AtomicU64>, oracle: Arc<Mutex<Oracle>>) {
    let mut random = StdRng::seed_from_u64(writer);
    let mut in_flight: VecDeque<(String, TestAppend, Pending)> = VecDeque::new();
    for number in 0.. {
        let stopping = stop.load(Relaxed);
        while in_flight.len() >= 32 || (stopping && !in_flight.is_empty()) {
            let (entity, append, pending) = in_flight.pop_front().unwrap();
            let version = pending.await.unwrap();
            oracle.lock().acked(&entity, append, version);
            acked.fetch_add(1, Relaxed);
        }
        if stopping {
            break;
        }
        let entity = format!("load-{writer}-{}", random.random_range(0..40));
        let append = TestAppend {
            id: writer << 40 | number,
            events: random.random_range(1..=4),
            bytes: random.random_range(0..1000),
        };
        let pending = loop {
            match kuma.entity::<Probe>(&entity).append_all(append.events()).submit().await {
                Ok(pending) => break pending,
                Err(AppendError::Unavailable(Unavailable::Overloaded { .. })) => tokio::task::yield_now().await,
                Err(error) => panic!("{error:?}"),
            }
        };
        in_flight.push_back((entity, append, pending));
    }
}

/// The largest that a log of a shard is, looked at all the time.
struct WalWatch {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl WalWatch {
    fn start(data: &Path) -> WalWatch {
        let stop = Arc::<AtomicBool>::default();
        let (stopped, data) = (stop.clone(), data.to_owned());
        let thread = std::thread::spawn(move || {
            let mut most = 0;
            while !stopped.load(Relaxed) {
                for shard in 0..2 {
                    let log = data.join(format!("shard-{shard:03}.db-wal"));
                    most = most.max(fs::metadata(log).map_or(0, |log| log.len()));
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            most
        });
        WalWatch { stop, thread }
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_under_full_load_has_all_that_was_acknowledged_before_it_and_bounds_the_log() {
    const ACKS: u64 = 4_000;
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    let load = Load::start(&kuma);
    load.until_acked(2 * ACKS).await;
    let watch = WalWatch::start(&fixture.data());
    let (since, acked) = (Instant::now(), load.acked.load(Relaxed));
    load.until_acked(acked + ACKS).await;
    let (without, alone) = (watch.stop(), ACKS as f64 / since.elapsed().as_secs_f64());

    let watch = WalWatch::start(&fixture.data());
    let (since, acked, before_first) = (Instant::now(), load.acked.load(Relaxed), load.oracle());
    let first = kuma.backup(fixture.path("events")).run(|_| ()).await.unwrap();
    let took = since.elapsed().as_secs_f64();
    let beside = (load.acked.load(Relaxed) - acked) as f64 / took;
    load.until_acked(load.acked.load(Relaxed) + ACKS / 2).await;
    let before_second = load.oracle();
    let second = fixture.back_up(&kuma).await;
    let with = watch.stop();
    println!(
        "first backup: {} commits, {:.1} MB, {took:.2} s = {:.0} commits/s, read back included; appends/s {alone:.0} without it, \
         {beside:.0} beside it; second one: {} commits; largest log {:.1} MB without, {:.1} MB beside backups",
        first.commits,
        first.bytes as f64 / 1e6,
        first.commits as f64 / took,
        second.commits,
        without as f64 / 1e6,
        with as f64 / 1e6,
    );
    assert!(first.commits as usize >= before_first.acks() && second.commits > 0);
    // It is cut at some 16 MiB, and may overshoot while it is copied.
    assert!(with < 64 << 20, "the log grew to {with} bytes beside a backup, and to {without} without");

    // What was acknowledged while the backup was being made may be in it or not; what was before it is.
    load.stop().await;
    kuma.shutdown().await;
    let (restored, report) = fixture.restored(fixture.restore(), "restored").await;
    assert_eq!(Some(report.contents), second.verified);
    assert_eq!(slots_now(&restored).await, slots(&second));
    assert!(before_second.acks() > before_first.acks());
    before_second.judge(&restored).await.assert_clean("restored");
    restored.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_continued_backup_copies_what_is_new_and_equals_a_fresh_one() {
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    let mut oracle = Oracle::default();
    fill(&kuma, &mut oracle, 1, 5_000, 300).await;
    assert_eq!(fixture.back_up(&kuma).await.commits, 5_000);
    fill(&kuma, &mut oracle, 10_000, 700, 400).await;
    let second = fixture.back_up(&kuma).await;
    assert_eq!(second.commits, 700);
    let fresh = kuma.backup(fixture.path("fresh")).run(|_| ()).await.unwrap();
    assert_eq!((fresh.commits, fresh.verified), (5_700, second.verified));
    assert_eq!(slots(&fresh), slots(&second));
    let third = kuma.backup(fixture.path("events")).without_verification().run(|_| ()).await.unwrap();
    assert_eq!((third.commits, third.bytes, third.verified), (0, 0, None));
    for (second, third) in second.manifest.shards.iter().zip(&third.manifest.shards) {
        assert_eq!((second.file.bytes, &second.slots), (third.file.bytes, &third.slots));
    }
    kuma.shutdown().await;
    // Of the one that was not read back as well.
    let (restored, report) = fixture.restored(fixture.restore(), "restored").await;
    assert_eq!(Some(report.contents), fresh.verified);
    oracle.judge(&restored).await.assert_clean("restored");
    // It has an identity of its own, so that its backups do not go on with those.
    let refused = restored.backup(fixture.path("events")).run(|_| ()).await.unwrap_err();
    assert!(matches!(refused, BackupError::WrongDirectory { .. }), "{refused}");
    restored.shutdown().await;
}

/// Runs the child; kills it some time after it said that it begins, unless it is done by then. Says how long it took.
fn live_and_die(arguments: &[&Path], command: &str, after: Option<Duration>) -> Option<Duration> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_backup_child"))
        .arg(command)
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "R");
    let since = Instant::now();
    if let Some(after) = after {
        std::thread::sleep(after);
        child.kill().unwrap(); // SIGKILL
    }
    let done = lines.next().is_some();
    let took = since.elapsed();
    child.wait().unwrap();
    done.then_some(took)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_killed_leaves_the_one_before_and_is_continued() {
    const KILLS: u64 = 8;
    let mut random = StdRng::seed_from_u64(seed("a_backup_that_is_killed_leaves_the_one_before_and_is_continued"));
    let fixture = Fixture::new();
    let (data, events) = (fixture.data(), fixture.path("events"));
    let mut oracle = Oracle::default();
    let kuma = start(&data).await;
    fill(&kuma, &mut oracle, 1, 4_000, 100).await;
    // Entities that are there from the first backup on, and keys for all that come later.
    fixture.back_up(&kuma).await;
    let first = oracle.clone();
    kuma.shutdown().await;
    let whole = live_and_die(&[&data, &fixture.path("timing")], "backup", None).unwrap();
    let (mut killed, mut inside) = (0, 0);
    for kill in 0..KILLS {
        // Now and then the very first backup into a directory, else one that continues.
        let fresh = kill % 4 == 3;
        let kuma = start(&data).await;
        fill(&kuma, &mut oracle, (kill + 1) << 20, 1_500, 100).await;
        kuma.shutdown().await;
        let directory = if fresh { fixture.path(&format!("fresh-{kill}")) } else { events.clone() };
        let after = whole.mul_f64(random.random_range(0.0..0.8));
        let done = live_and_die(&[&data, &directory], "backup", Some(after)).is_some();
        killed += u64::from(!done);
        inside += u64::from(directory.join("unfinished").exists());
        let restore = Restore::new(&directory).keys(fixture.path("keys"));
        if fresh && !done {
            let refused = fixture.refused(restore).await;
            assert!(matches!(refused, RestoreError::Manifest(_)), "{refused:?}");
        } else if kill % 3 == 0 {
            let name = format!("restored-{kill}");
            let (restored, report) = fixture.restored(restore, &name).await;
            assert!(report.contents.commits >= 4_000, "{report:?}");
            let findings = first.judge(&restored).await;
            assert!(findings.lost.is_empty() && findings.unreadable.is_empty(), "kill {kill}: {findings:?}");
            restored.shutdown().await;
            fs::remove_dir_all(fixture.path(&name)).unwrap();
        }
    }
    println!("{KILLS} backups, {killed} of them killed, {inside} with files changed; a whole one takes {whole:?}");
    assert!(inside >= KILLS / 3, "{inside} of {KILLS} were killed inside");
    let kuma = start(&data).await;
    let last = fixture.back_up(&kuma).await;
    assert_eq!(slots(&last), slots_now(&kuma).await);
    kuma.shutdown().await;
    let (restored, report) = fixture.restored(fixture.restore(), "restored").await;
    assert!(!report.warnings.contains(&RestoreWarning::Unfinished));
    oracle.judge(&restored).await.assert_clean("restored at last");
    restored.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_is_killed_is_opened_by_nobody_and_done_again() {
    const KILLS: u64 = 8;
    let mut random = StdRng::seed_from_u64(seed("a_restore_that_is_killed_is_opened_by_nobody_and_done_again"));
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    let mut oracle = Oracle::default();
    fill(&kuma, &mut oracle, 1, 4_000, 100).await;
    kuma.entity::<Probe>("entity-7").erase(Reason::new("a test")).await.unwrap();
    fixture.back_up(&kuma).await;
    kuma.shutdown().await;
    let master = fixture.data().join("master.key");
    let (events, keys) = (fixture.path("events"), fixture.path("keys"));
    let run = |target: &Path, after| live_and_die(&[&events, &keys, target, &master], "restore", after);
    let whole = run(&fixture.path("timing"), None).unwrap();
    let (target, mut refused) = (fixture.path("restored"), 0);
    for _ in 0..KILLS {
        if run(&target, Some(whole.mul_f64(random.random_range(0.05..0.95)))).is_some() {
            fs::remove_dir_all(&target).unwrap();
            continue;
        }
        // Killed before the first or after the last write it is nothing, or a store.
        match Kuma::start(fixture.options("restored")).await {
            Err(StartError::DataDir(error @ DataDirError::Restoring { .. })) => {
                refused += 1;
                assert!(error.to_string().contains("run the restore again"), "{error}");
            }
            Ok(kuma) => {
                kuma.shutdown().await;
                fs::remove_dir_all(&target).unwrap();
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    println!("{KILLS} restores killed, {refused} of them in the middle; a whole one takes {whole:?}");
    assert!(refused > 0);
    let _ = fs::remove_dir_all(fixture.path("empty"));
    let (restored, _) = fixture.restored(fixture.restore(), "restored").await;
    let erased = restored.entity::<Probe>("entity-7").read().await.unwrap_err();
    assert!(matches!(erased, ReadError::Refused(Refused::Erased { .. })), "{erased}");
    assert!(restored.verify(|_| ()).await.unwrap().is_clean());
    restored.shutdown().await;
}

fn copy_dir(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = files.filter(|path| path.file_name().unwrap() != "backup.lock").collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_cut_missing_or_mixed_up_file_is_refused_by_name() {
    const FLIPS: usize = 20;
    let mut random = StdRng::seed_from_u64(seed("a_damaged_cut_missing_or_mixed_up_file_is_refused_by_name"));
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    let mut oracle = Oracle::default();
    fill(&kuma, &mut oracle, 1, 300, 40).await;
    kuma.entity::<Probe>("entity-3").erase(Reason::new("a test")).await.unwrap();
    fixture.back_up(&kuma).await;
    copy_dir(&fixture.path("events"), &fixture.path("older"));
    copy_dir(&fixture.path("keys"), &fixture.path("older keys"));
    for number in 0..60 {
        append_secret(&kuma, &format!("s-{}", number % 7), number).await;
    }
    kuma.entity::<Probe>("entity-4").erase(Reason::new("a test")).await.unwrap();
    fixture.back_up(&kuma).await;
    kuma.shutdown().await;

    let all: Vec<PathBuf> = ["events", "keys"].iter().flat_map(|name| files(&fixture.path(name))).collect();
    assert_eq!(all.len(), 4 + 3, "{all:?}");
    let (mut flips, mut cuts) = (0, 0);
    for path in &all {
        let bytes = fs::read(path).unwrap();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        for _ in 0..FLIPS {
            let mut altered = bytes.clone();
            let at = random.random_range(0..bytes.len());
            let bit = random.random_range(0..8);
            altered[at] ^= 1 << bit;
            fs::write(path, altered).unwrap();
            let refused = chain(&fixture.refused(fixture.restore()).await);
            assert!(refused.contains(&name), "bit {bit} of byte {at} of {name}: {refused}");
            flips += 1;
        }
        for cut in [0, 1, bytes.len() / 2, bytes.len() - 1, random.random_range(0..bytes.len())] {
            fs::write(path, &bytes[..cut]).unwrap();
            let refused = chain(&fixture.refused(fixture.restore()).await);
            assert!(refused.contains(&name), "{name} cut at {cut}: {refused}");
            cuts += 1;
        }
        fs::remove_file(path).unwrap();
        let refused = chain(&fixture.refused(fixture.restore()).await);
        assert!(refused.contains(&name), "{name} missing: {refused}");
        fs::write(path, bytes).unwrap();
    }
    println!("{flips} flipped bits and {cuts} cuts in {} files, all refused", all.len());

    // In each other's places, and older ones.
    let swap = async |one: &Path, other: &Path| {
        let bytes = fs::read(one).unwrap();
        fs::copy(other, one).unwrap();
        let refused = chain(&fixture.refused(fixture.restore()).await);
        assert!(refused.contains(&*one.file_name().unwrap().to_string_lossy()), "{}: {refused}", one.display());
        fs::write(one, bytes).unwrap();
    };
    let events = |name: &str| fixture.path("events").join(name);
    swap(&events("shard-000.db"), &events("shard-001.db")).await;
    swap(&events("shard-000.db"), &fixture.path("older").join("shard-000.db")).await;
    swap(&events("shard-000.db"), &fixture.data().join("shard-000.db")).await;
    swap(&events("ledger.ndjson"), &fixture.path("older").join("ledger.ndjson")).await;
    swap(&events("manifest.json"), &fixture.path("keys").join("manifest.json")).await;
    let keys = files(&fixture.path("keys")).into_iter().find(|path| path.extension().unwrap() == "db").unwrap();
    let older = files(&fixture.path("older keys")).into_iter().find(|path| path.extension().unwrap() == "db").unwrap();
    swap(&keys, &older).await;
    swap(&keys, &fixture.data().join("keys.db")).await;
    let mixed = Restore::new(fixture.path("keys")).keys(fixture.path("events"));
    assert!(matches!(fixture.refused(mixed).await, RestoreError::Manifest(_)));

    // Nothing was changed by all this.
    let (restored, _) = fixture.restored(fixture.restore(), "restored").await;
    assert!(restored.verify(|_| ()).await.unwrap().is_clean());
    restored.shutdown().await;
}

/// The sealed events and id of the only entity of a kind, and its wrapped key, as they are in the backups.
fn sealed(fixture: &Fixture, kind: &str) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut key_id: Option<Vec<u8>> = None;
    for shard in ["shard-000.db", "shard-001.db"] {
        let file = rusqlite::Connection::open(fixture.path("events").join(shard)).unwrap();
        let mut rows =
            file.prepare("SELECT sealed_id, body, key_id FROM entity JOIN log USING (eid) WHERE kind = ?").unwrap();
        let mut rows = rows.query([kind]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            found.extend([row.get::<_, Vec<u8>>(0).unwrap(), row.get(1).unwrap()]);
            key_id = Some(row.get(2).unwrap());
        }
    }
    let keys = files(&fixture.path("keys")).into_iter().find(|path| path.extension().unwrap() == "db").unwrap();
    let keys = rusqlite::Connection::open(keys).unwrap();
    found.push(
        keys.query_row("SELECT wrapped FROM data_key WHERE key_id = ?", [key_id.unwrap()], |row| row.get(0)).unwrap(),
    );
    assert!(found.iter().all(|bytes| bytes.len() > 16));
    found
}

/// The files of a directory that hold any of these.
fn holding(directory: &Path, needles: &[Vec<u8>]) -> Vec<String> {
    let holds = |path: &PathBuf| {
        let bytes = fs::read(path).unwrap();
        // The last bytes are a tag, which is random.
        needles.iter().any(|needle| {
            let tag = &needle[needle.len() - 16..];
            bytes.windows(16).any(|window| window == tag)
        })
    };
    let found = files(directory).into_iter().filter(|path| path.is_file()).filter(holds);
    found.map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
}

async fn append_secret(kuma: &Kuma, id: &str, number: u64) {
    // Now and then one that does not fit into a page.
    let note = "x".repeat(if number.is_multiple_of(7) { 20_000 } else { 300 });
    let data = serde_json::json!({ "number": number, "note": note });
    kuma.raw("secret", id).append(NewEvent::json("Told", &data).unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_erased_after_the_backup_stays_erased() {
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    let mut oracle = Oracle::default();
    fill(&kuma, &mut oracle, 1, 200, 20).await;
    for number in 1..=30 {
        append_secret(&kuma, "erased", number).await;
    }
    let stale = fixture.ledger(&kuma, "stale.ndjson").await;
    let taken = fixture.back_up(&kuma).await;
    let needles = sealed(&fixture, "secret");
    assert_eq!(holding(&fixture.path("events"), &needles).len(), 1);
    let receipt = kuma.raw("secret", "erased").erase(Reason::new("a test")).await.unwrap();
    assert!(receipt.receipt.backups.events.is_some() && receipt.receipt.backups.keys.is_some(), "{receipt}");
    fs::write(fixture.path("receipt.json"), receipt.to_string()).unwrap();
    let ledger = fixture.ledger(&kuma, "ledger.ndjson").await;

    // With the ledger, and with the receipt alone.
    let restores = [fixture.restore().ledger(&ledger), fixture.restore().receipt(fixture.path("receipt.json"))];
    for (number, restore) in restores.into_iter().enumerate() {
        let name = format!("restored-{number}");
        let (restored, report) = fixture.restored(restore, &name).await;
        assert_eq!((report.erased_again, report.without_key, report.keys_destroyed), (1, 0, 1));
        let warned = report.warnings.iter().any(|warning| matches!(warning, RestoreWarning::NoNewerLedger { .. }));
        assert_eq!(warned, number == 1, "{:?}", report.warnings);
        assert_eq!(restored.erasures_unfinished(), 0);
        let read = restored.raw("secret", "erased").events(1.., 9).await.unwrap_err();
        assert!(matches!(read, ReadError::Refused(Refused::Erased { .. })), "{read}");
        let append =
            restored.raw("secret", "erased").append(NewEvent::json("Told", &1.into()).unwrap()).await.unwrap_err();
        assert!(matches!(append, AppendError::Refused(Refused::Erased { .. })), "{append}");
        let kept = restored.receipt(receipt.receipt.id).await.unwrap().unwrap();
        kept.verify(&kuma.public_key()).unwrap();
        assert_eq!(kept == receipt, number == 1, "with the receipt it is the very one");
        oracle.judge(&restored).await.assert_clean(&name);
        restored.shutdown().await;
        assert_eq!(holding(&fixture.path(&name), &needles), Vec::<String>::new());
        // It starts and stays so.
        let again = Kuma::start(fixture.options(&name)).await.unwrap();
        assert!(again.verify(|_| ()).await.unwrap().is_clean());
        again.shutdown().await;
    }

    // Without them it is back, and the restore says from when on it does not know.
    let (restored, report) = fixture.restored(fixture.restore().ledger(&stale), "stale").await;
    assert_eq!(report.erased_again, 0);
    assert_eq!(restored.raw("secret", "erased").events(1.., 99).await.unwrap().len(), 30);
    let warnings: Vec<String> = report.warnings.iter().map(ToString::to_string).collect();
    let as_of = fs::read_to_string(&stale).unwrap().split("\"as_of\":\"").nth(1).unwrap()[..27].to_owned();
    assert!(warnings[0].contains(&as_of) && warnings[0].contains("stale.ndjson"), "{warnings:?}");
    assert!(warnings[1].contains("erasures after") && report.erasures_known_until >= taken.taken_at, "{warnings:?}");
    restored.shutdown().await;

    // The next backups have nothing of it left.
    let next = fixture.back_up(&kuma).await;
    assert_eq!(next.stubs, 30);
    assert_eq!(holding(&fixture.path("events"), &needles), Vec::<String>::new());
    assert_eq!(holding(&fixture.path("keys"), &needles), Vec::<String>::new());
    let (restored, report) = fixture.restored(fixture.restore(), "next").await;
    assert_eq!((report.erased_again, report.contents.erased), (0, 1));
    let read = restored.raw("secret", "erased").events(1.., 9).await.unwrap_err();
    assert!(matches!(read, ReadError::Refused(Refused::Erased { .. })), "{read}");
    oracle.judge(&restored).await.assert_clean("next");
    restored.shutdown().await;
    kuma.shutdown().await;
}

/// Erasures go on while backups are made; some entities get a new life. Each backup restores to something sound.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backups_beside_erasures_restore_to_what_was_there() {
    let mut random = StdRng::seed_from_u64(seed("backups_beside_erasures_restore_to_what_was_there"));
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    for id in 0..60 {
        for number in 0..8 {
            append_secret(&kuma, &format!("s-{id}"), number).await;
        }
    }
    let mut gone = Vec::new();
    for round in 0..3 {
        let erased: Vec<String> = (0..6).map(|_| format!("s-{}", random.random_range(0..60))).collect();
        let erase = async {
            for id in &erased {
                let handle = kuma.raw("secret", id);
                handle.erase(Reason::new("a test")).await.unwrap();
                if random.random_bool(0.3) {
                    handle.recreate(Reason::new("a test")).await.unwrap();
                }
            }
        };
        let ((), report) = tokio::join!(erase, fixture.back_up(&kuma));
        gone.extend(erased);
        let ledger = fixture.ledger(&kuma, "ledger.ndjson").await;
        let name = format!("restored-{round}");
        let (restored, restored_report) = fixture.restored(fixture.restore().ledger(&ledger), &name).await;
        let verified = restored.verify(|_| ()).await.unwrap();
        assert!(verified.is_clean(), "round {round}: {verified:?}, {report:?}");
        assert_eq!(restored_report.without_key, 0);
        for id in 0..60 {
            let id = format!("s-{id}");
            let read = async |kuma: &Kuma| kuma.raw("secret", &id).events(1.., 99).await.map(|events| events.len());
            match (read(&kuma).await, read(&restored).await) {
                (Ok(here), Ok(there)) => assert_eq!(here, there, "{id}"),
                (Err(here), Err(there)) => assert_eq!(here.to_string(), there.to_string()),
                // A life that began after the backup did.
                (Ok(0), Err(ReadError::Refused(Refused::Erased { .. }))) => {}
                (here, there) => panic!("{id}: {here:?} here, {there:?} there"),
            }
        }
        restored.shutdown().await;
    }
    assert!(!gone.is_empty());
    let last = fixture.back_up(&kuma).await;
    assert_eq!((last.changed_slots.len(), slots(&last)), (0, slots_now(&kuma).await));
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_keys_or_with_what_belongs_to_another_store_nothing_is_restored() {
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    fill(&kuma, &mut Oracle::default(), 1, 50, 5).await;
    fixture.back_up(&kuma).await;
    let other = Fixture::new();
    let stranger = start(&other.data()).await;
    let receipt = async |kuma: &Kuma, name: &str| {
        append_secret(kuma, "erased", 1).await;
        let receipt = kuma.raw("secret", "erased").erase(Reason::new("a test")).await.unwrap();
        fs::write(fixture.path(name), receipt.to_string()).unwrap();
        fixture.path(name)
    };
    let foreign_receipt = receipt(&stranger, "foreign.json").await;
    let own_receipt = receipt(&kuma, "own.json").await;
    other.back_up(&stranger).await;
    let foreign_ledger = other.ledger(&stranger, "ledger.ndjson").await;
    let own_ledger = fixture.ledger(&kuma, "ledger.ndjson").await;

    let error = fixture.refused(Restore::new(fixture.path("events"))).await;
    assert!(matches!(error, RestoreError::NoKeys { .. }) && error.to_string().contains("nothing in"), "{error}");
    let error = fixture.refused(Restore::new(fixture.path("nowhere")).keys(fixture.path("keys"))).await;
    assert!(matches!(error, RestoreError::Manifest(_)), "{error}");
    let error = fixture.refused(Restore::new(fixture.path("events")).keys(other.path("keys"))).await;
    assert!(matches!(error, RestoreError::OtherStore { .. }), "{error}");
    let error = fixture.refused(fixture.restore().ledger(&foreign_ledger)).await;
    assert!(matches!(error, RestoreError::Ledger(LedgerError::OtherStore { .. })), "{error}");
    let error = fixture.refused(fixture.restore().receipt(&foreign_receipt)).await;
    assert!(matches!(&error, RestoreError::Receipt { path, .. } if *path == foreign_receipt), "{error}");
    let text = fs::read_to_string(&own_ledger).unwrap();
    fs::write(&own_ledger, text.replace("\"slot\":", "\"slot\":1")).unwrap();
    let error = fixture.refused(fixture.restore().ledger(&own_ledger)).await;
    assert!(matches!(error, RestoreError::Ledger(_)) && chain(&error).contains("ledger.ndjson"), "{error}");
    let text = fs::read_to_string(&own_receipt).unwrap();
    fs::write(&own_receipt, text.replace("\"slot\": ", "\"slot\": 1")).unwrap();
    let error = fixture.refused(fixture.restore().receipt(&own_receipt)).await;
    assert!(matches!(error, RestoreError::Receipt { .. }), "{error}");

    let elsewhere = fixture.path("refused");
    let with = |options: Options| fixture.restore().run(options, |_| ());
    let error = with(options(&elsewhere)).await.unwrap_err();
    assert!(matches!(error, RestoreError::NoMasterKey(_)), "{error}");
    let error = with(options(&elsewhere).master_key(other.master())).await.unwrap_err();
    assert!(matches!(error, RestoreError::WrongMasterKey { .. }), "{error}");
    let error = with(options(&elsewhere).master_key(fixture.master()).context("other")).await.unwrap_err();
    assert!(matches!(error, RestoreError::OtherStore { .. }), "{error}");
    let error = with(options(&elsewhere).master_key(fixture.master()).shards(3)).await.unwrap_err();
    assert!(matches!(error, RestoreError::Options { .. }), "{error}");
    assert!(!elsewhere.exists());

    // Where there is something nothing is restored, and it stays.
    let error = with(fixture.options("data")).await.unwrap_err();
    assert!(matches!(error, RestoreError::Target(DataDirError::NotEmpty { .. })), "{error}");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("mine.txt"), b"mine").unwrap();
    let error = with(fixture.options("refused")).await.unwrap_err();
    assert!(matches!(error, RestoreError::Target(DataDirError::NotEmpty { .. })), "{error}");
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1);

    // Backups have places of their own.
    for wrong in ["data", "data/backup", "keys"] {
        let error = kuma.backup(fixture.path(wrong)).run(|_| ()).await.unwrap_err();
        assert!(matches!(error, BackupError::WrongDirectory { .. }), "{wrong}: {error}");
    }
    for wrong in ["data", "events"] {
        let error = kuma.backup_keys(fixture.path(wrong)).await.unwrap_err();
        assert!(matches!(error, BackupError::WrongDirectory { .. }), "{wrong}: {error}");
    }
    let error = stranger.backup(fixture.path("events")).run(|_| ()).await.unwrap_err();
    assert!(matches!(error, BackupError::WrongDirectory { .. }), "{error}");
    let (one, two) =
        tokio::join!(kuma.backup(fixture.path("events")).run(|_| ()), kuma.backup(fixture.path("events")).run(|_| ()));
    assert!(matches!(two, Err(BackupError::InUse { .. })), "{two:?}");
    one.unwrap();
    stranger.shutdown().await;
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entities_whose_keys_were_not_backed_up_are_told() {
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    append_secret(&kuma, "known", 1).await;
    kuma.backup_keys(fixture.path("keys")).await.unwrap();
    append_secret(&kuma, "new", 1).await;
    kuma.backup(fixture.path("events")).run(|_| ()).await.unwrap();
    kuma.shutdown().await;
    let (restored, report) = fixture.restored(fixture.restore(), "restored").await;
    assert_eq!((report.without_key, report.without_key_named.len()), (1, 1));
    let is_told = |of: fn(&RestoreWarning) -> bool| report.warnings.iter().any(of);
    assert!(is_told(|warning| matches!(warning, RestoreWarning::KeysOlderThanEvents { .. })));
    assert!(is_told(|warning| matches!(warning, RestoreWarning::EntitiesWithoutKey { entities: 1 })));
    assert_eq!(restored.raw("secret", "known").events(1.., 9).await.unwrap().len(), 1);
    assert!(restored.raw("secret", "new").events(1.., 9).await.is_err());
    restored.shutdown().await;
}

/// The audit log of the first erasure ever is newer than the backup of the keys. Its own key is in it all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_erasure_after_the_keys_were_backed_up_is_carried_out_again() {
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    append_secret(&kuma, "gone", 1).await;
    append_secret(&kuma, "stays", 1).await;
    kuma.backup_keys(fixture.path("keys")).await.unwrap();
    kuma.raw("secret", "gone").erase(Reason::new("request 1").by("support")).await.unwrap();
    kuma.backup(fixture.path("events")).run(|_| ()).await.unwrap();
    kuma.shutdown().await;
    let (restored, report) = fixture.restored(fixture.restore(), "restored").await;
    assert_eq!(report.without_key, 0, "{:?}", report.without_key_named);
    assert_eq!(restored.raw("secret", "stays").events(1.., 9).await.unwrap().len(), 1);
    let refused = restored.raw("secret", "gone").events(1.., 9).await.unwrap_err();
    assert!(matches!(refused, ReadError::Refused(Refused::Erased { .. })), "{refused:?}");
    let log = restored.audit_log().read().await.unwrap();
    assert_eq!((log.requested, log.completed), (1, 1), "what it said of who and why is there");
    restored.shutdown().await;
}

/// What is added to a damaged file would be thought whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_was_damaged_meanwhile_is_not_gone_on_with() {
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    append_secret(&kuma, "one", 1).await;
    fixture.back_up(&kuma).await;
    // Without reading it back it is summed all the same.
    let report = kuma.backup(fixture.path("events")).without_verification().run(|_| ()).await.unwrap();
    assert!(report.manifest.shards.iter().all(|shard| shard.file.blake3.is_some()));
    let path = fixture.path("events").join("shard-000.db");
    let mut bytes = fs::read(&path).unwrap();
    // Unused space that no row and no page is damaged by.
    bytes[405] ^= 1;
    fs::write(&path, bytes).unwrap();
    let refused = kuma.backup(fixture.path("events")).run(|_| ()).await.unwrap_err();
    assert!(matches!(refused, BackupError::Copy(CopyError::Damaged { .. })), "{refused:?}");
    fs::remove_file(&path).unwrap();
    fixture.back_up(&kuma).await;
    kuma.shutdown().await;
    fixture.restored(fixture.restore(), "restored").await.0.shutdown().await;
}

/// A restored store is another one than that which it was restored from: none of their files may be mixed up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_file_of_the_former_store_fits_the_restored_one() {
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    fill(&kuma, &mut Oracle::default(), 1, 100, 10).await;
    fixture.back_up(&kuma).await;
    kuma.shutdown().await;
    let (restored, _) = fixture.restored(fixture.restore(), "restored").await;
    restored.shutdown().await;
    for (from, to) in [("data", "restored"), ("restored", "data")] {
        for file in ["shard-000.db", "shard-000.watermark", "keys.db", "keys.watermark", "node.db", "node.watermark"] {
            let mixed = fixture.path("mixed");
            copy_dir(&fixture.path(to), &mixed);
            fs::copy(fixture.path(from).join(file), mixed.join(file)).unwrap();
            match Kuma::start(fixture.options("mixed")).await {
                Err(StartError::Open(error @ OpenError::Foreign { .. })) => {
                    assert!(error.to_string().contains("another"), "{error}");
                }
                Ok(kuma) if file.starts_with("shard") => {
                    let why = kuma.stats().shards[0].out_of_use.clone().unwrap();
                    assert!(why.contains("another"), "{file}: {why}");
                    // Nor is there a backup of it without that shard.
                    let error = kuma.backup(fixture.path("events-2")).run(|_| ()).await.unwrap_err();
                    assert!(matches!(error, BackupError::ShardOutOfUse { shard: 0, .. }), "{error}");
                    kuma.shutdown().await;
                }
                Ok(_) => panic!("{file} of {from} in {to} was opened"),
                Err(error) => panic!("{file} of {from} in {to}: {error:?}"),
            }
        }
    }
}

/// A small tmpfs, as in `disk_full.rs`.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(kib: u64) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let size = format!("size={kib}k");
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(directory.path()).output();
        match output {
            Ok(output) if output.status.success() => Some(SmallDisk(directory)),
            other => {
                println!("skipped: mount: {other:?}");
                None
            }
        }
    }

    fn resize(&self, kib: u64) {
        let size = format!("remount,size={kib}k");
        assert!(Command::new("mount").args(["-o", &size]).arg(self.0.path()).status().unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_of_the_backup_is_told_and_leaves_the_store_and_the_backup_before() {
    let Some(disk) = SmallDisk::mount(3_000) else { return };
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    let mut oracle = Oracle::default();
    fill(&kuma, &mut oracle, 1, 500, 50).await;
    let events = disk.0.path().join("events");
    let first = kuma.backup(&events).run(|_| ()).await.unwrap();
    kuma.backup_keys(fixture.path("keys")).await.unwrap();
    let before = oracle.clone();
    fill(&kuma, &mut oracle, 10_000, 12_000, 50).await;
    for _ in 0..2 {
        let error = kuma.backup(&events).run(|_| ()).await.unwrap_err();
        assert!(matches!(error, BackupError::Copy(CopyError::DiskFull { .. })), "{error:?}");
        assert!(chain(&error).contains("free some space"), "{}", chain(&error));
    }
    fill(&kuma, &mut oracle, 30_000, 10, 50).await;
    let restore = || Restore::new(&events).keys(fixture.path("keys"));
    let (restored, report) = fixture.restored(restore(), "before").await;
    assert!(report.contents.commits >= first.commits);
    let findings = before.judge(&restored).await;
    assert!(findings.lost.is_empty() && findings.unreadable.is_empty(), "{findings:?}");
    restored.shutdown().await;
    disk.resize(60_000);
    let report = kuma.backup(&events).run(|_| ()).await.unwrap();
    assert!(report.verified.unwrap().commits == 12_510, "{report:?}");
    kuma.shutdown().await;
    let (restored, _) = fixture.restored(restore(), "after").await;
    oracle.judge(&restored).await.assert_clean("after");
    restored.shutdown().await;
    // A full disk of the target: nothing stays.
    let small = SmallDisk::mount(1_500).unwrap();
    let target = small.0.path().join("data");
    let options = options(&target).master_key(fixture.master());
    let error = restore().run(options, |_| ()).await.unwrap_err();
    assert!(chain(&error).contains("no space left"), "{}", chain(&error));
    assert!(!target.exists());
}

/// Somebody keeps an older copy of the keys under a second name: that is theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_before_are_wiped_and_a_damaged_copy_is_made_anew() {
    let fixture = Fixture::new();
    let kuma = start(&fixture.data()).await;
    append_secret(&kuma, "one", 1).await;
    append_secret(&kuma, "two", 1).await;
    fixture.back_up(&kuma).await;
    let copy = |name: &str| fixture.path("keys").join(name);
    fs::hard_link(copy("keys-a.db"), fixture.path("linked")).unwrap();
    let bytes = fs::read(fixture.path("linked")).unwrap();
    // In a task of its own, because a service would.
    let (directory, again) = (fixture.path("keys"), kuma.clone());
    tokio::spawn(async move { again.backup_keys(directory).await }).await.unwrap().unwrap();
    assert!(!copy("keys-a.db").exists() && copy("keys-b.db").exists());
    assert_eq!(fs::read(fixture.path("linked")).unwrap(), bytes);

    let shard = (0..2).map(|shard| fixture.path("events").join(format!("shard-{shard:03}.db")));
    let holds = |path: &PathBuf| {
        let file = rusqlite::Connection::open(path).unwrap();
        file.execute("UPDATE log SET body = x'00' WHERE position = 1", []).unwrap() > 0
    };
    let shard = shard.into_iter().find(holds).unwrap();
    let error = tokio::spawn(kuma.backup(fixture.path("events")).run(|_| ())).await.unwrap().unwrap_err();
    assert!(matches!(&error, BackupError::Copy(CopyError::Damaged { path, .. }) if *path == shard), "{error:?}");
    assert!(chain(&error).contains("delete the file that is named and run it again"), "{}", chain(&error));
    fs::remove_file(&shard).unwrap();
    fixture.back_up(&kuma).await;
    kuma.shutdown().await;
    let (target, restore) = (fixture.options("restored"), fixture.restore());
    let report = tokio::spawn(restore.run(target, |_| ())).await.unwrap().unwrap();
    assert_eq!((report.contents.entities, report.without_key), (2, 0));
}

/// Keys that a master key before the current one wraps, and a clock: what is written says when it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_a_rotated_store_needs_the_keys_that_wrap_it() {
    let fixture = Fixture::new();
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let clock = options(&fixture.data()).wall_clock(move || at);
    let kuma = Kuma::start(clock).await.unwrap();
    append_secret(&kuma, "one", 1).await;
    let report = fixture.back_up(&kuma).await;
    assert_eq!((report.taken_at, report.manifest.of.taken_at.as_str()), (at, "2023-11-14T22:13:20.000000Z"));
    kuma.shutdown().await;
    // The key file with a new key in front of the old one opens it; the new one alone does not.
    let text = fs::read_to_string(fixture.data().join("master.key")).unwrap();
    let write = |name: &str, text: String| {
        use std::os::unix::fs::PermissionsExt;
        fs::write(fixture.path(name), text).unwrap();
        fs::set_permissions(fixture.path(name), fs::Permissions::from_mode(0o600)).unwrap();
        MasterKeySource::File(fixture.path(name))
    };
    let (both, new) = (write("both", format!("{}\n{text}", "7".repeat(64))), write("new", "7".repeat(64)));
    let error = fixture.restore().run(options(&fixture.path("refused")).master_key(new), |_| ()).await.unwrap_err();
    assert!(matches!(error, RestoreError::WrongMasterKey { .. }), "{error}");
    let target = options(&fixture.path("restored")).master_key(both);
    fixture.restore().run(target.clone(), |_| ()).await.unwrap();
    let restored = Kuma::start(target).await.unwrap();
    assert_eq!(restored.raw("secret", "one").events(1.., 9).await.unwrap().len(), 1);
    restored.shutdown().await;
}
