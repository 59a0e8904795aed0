//! Promise 5 under kill -9: an erasure that was cut short completes by itself, or is as if it had never been asked for; never half.
//!
//! A child process appends and erases, and dies at a named place of the erasure, each of them many times. This process opens what it left
//! and looks: at the entities, the receipts, the audit log, and at every byte of every file.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::common::{directory, until};
use crate::traces::{TOKEN, Traces};
use futures_util::{StreamExt, future::join_all, stream};
use integration_tests::{Oracle, Probe, TestAppend, cases, options, seed};
use kuma_core::{
    AppendError, AuditEvent, AuditLog, Kuma, LocalMasterKey, ReadError, Reason, Receipt, ReceiptId, Refused, Version,
};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use tempfile::TempDir;

/// In the order in which an erasure comes to them.
const PLACES: [&str; 10] = [
    "erase.requested",
    "erase.entombed",
    "erase.drained",
    "erase.keys_destroyed",
    "erase.keys_cut",
    "erase.step",
    "erase.rows_erased",
    "erase.logs_cut",
    "erase.attested",
    "erase.finished",
];
const KILLS: u64 = 20;
const VICTIMS: usize = 6;
const NEIGHBOURS: usize = 6;
/// Steps of the history of the first victim.
const LONG: u64 = 3;

fn victim(number: usize) -> String {
    format!("{TOKEN}-{number}")
}

type Acked = (String, TestAppend, Version);

/// A closed store: victims and neighbours, mixed in every page, with snapshots.
struct Template {
    dir: TempDir,
    acked: Vec<Acked>,
    traces: Traces,
}

fn data(dir: &TempDir) -> PathBuf {
    dir.path().join("data")
}

impl Template {
    async fn make() -> Template {
        let dir = directory();
        let data = data(&dir);
        let kuma = Kuma::start(options(&data).snapshot_every(5, 1 << 20)).await.unwrap();
        let mut acked = Vec::new();
        let names: Vec<String> =
            (0..VICTIMS).map(victim).chain((0..NEIGHBOURS).map(|number| format!("neighbour-{number}"))).collect();
        for round in 0..LONG * 256 - 100 {
            let some =
                names.iter().enumerate().filter(|(number, _)| *number == 0 || round % (1 << number.min(&6)) == 0);
            let sent = some.map(|(number, name)| {
                let append = TestAppend {
                    id: round << 16 | number as u64,
                    events: 1 + (round % 3) as u32,
                    bytes: if round % 40 == 8 { 6_000 } else { 60 },
                };
                let handle = kuma.entity::<Probe>(name);
                async move { (name.clone(), append, handle.append_all(append.events()).await.unwrap()) }
            });
            acked.extend(join_all(sent).await);
        }
        kuma.shutdown().await;
        let mut traces = Traces::new();
        note(&mut traces, &data).await;
        Template { dir, acked, traces }
    }

    fn copy(&self) -> TempDir {
        let dir = directory();
        copy(&data(&self.dir), &data(&dir));
        dir
    }
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap().success());
}

/// Notes what a store holds that is not open.
async fn note(traces: &mut Traces, path: &Path) {
    let dir = directory();
    copy(path, &data(&dir));
    let master = LocalMasterKey::from_file(&data(&dir).join("master.key")).unwrap();
    traces.note_all(&data(&dir), &master).await;
}

/// What a child said before it died.
#[derive(Debug, Default)]
struct Said {
    acked: Vec<Acked>,
    asked: bool,
    receipts: Vec<ReceiptId>,
    died: bool,
}

async fn run(path: PathBuf, life: u64, place: &'static str, pass: u64, victims: Vec<String>) -> Said {
    let child = move || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_erase_child"));
        command.arg(path).args([&life.to_string(), place, &pass.to_string(), &victims.join(",")]);
        let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
        let died = output.status.signal() == Some(9);
        let may_end = victims.is_empty() && output.status.success();
        assert!(died || may_end, "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        let mut said = Said { died, ..Said::default() };
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            match *line.split(' ').collect::<Vec<_>>() {
                ["A", entity, id, events, bytes, version] => {
                    let append = TestAppend {
                        id: id.parse().unwrap(),
                        events: events.parse().unwrap(),
                        bytes: bytes.parse().unwrap(),
                    };
                    said.acked.push((entity.to_owned(), append, Version(version.parse().unwrap())));
                }
                ["Q"] => said.asked = true,
                ["D", receipt] => said.receipts.push(receipt.parse().unwrap()),
                _ => panic!("the child said {line:?}"),
            }
        }
        said
    };
    tokio::task::spawn_blocking(child).await.unwrap()
}

#[derive(Debug, Default)]
struct Tally {
    erased: u64,
    untouched: u64,
    again: u64,
    resumed: u64,
    acks: u64,
}

async fn case(template: &Template, place: &'static str, seed: u64) -> Tally {
    let context = format!("{place}, KUMA_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut victims: Vec<String> = (0..VICTIMS).map(victim).collect();
    victims.shuffle(&mut random);
    victims.truncate([1, 1, 2, VICTIMS][random.random_range(0..4)]);
    // A step has several passes only in a long history.
    let pass = match place {
        "erase.step" if victims.contains(&victim(0)) => random.random_range(1..=LONG),
        "erase.step" => random.random_range(1..=victims.len() as u64),
        _ => 1,
    };
    let dir = template.copy();
    let path = data(&dir);
    let said = run(path.clone(), 1, place, pass, victims.clone()).await;
    assert!(said.died && said.asked, "{context}");
    let mut acked = [&template.acked[..], &said.acked].concat();
    let mut tally = Tally { acks: said.acked.len() as u64, ..Tally::default() };
    let mut traces = template.traces.clone();
    note(&mut traces, &path).await;

    // Now and then what goes on with it dies as well, as often as not later on.
    for life in 2..4 {
        if random.random_range(0..3) > 0 {
            break;
        }
        let place = PLACES[random.random_range(1..PLACES.len())];
        let said = run(path.clone(), life, place, random.random_range(1..3), Vec::new()).await;
        tally.again += u64::from(said.died);
        acked.extend(said.acked);
    }

    let kuma = Kuma::start(options(&path)).await.unwrap();
    tally.resumed += u64::from(kuma.erasures_unfinished() > 0);
    let mut erased = BTreeSet::new();
    for id in &victims {
        // From the first moment on.
        let handle = kuma.entity::<Probe>(id);
        match handle.read().await {
            Ok(_) => {}
            Err(ReadError::Refused(Refused::Erased { .. })) => {
                let refused = handle.append_all(TestAppend { id: 7, events: 1, bytes: 1 }.events()).await;
                assert!(matches!(refused, Err(AppendError::Refused(Refused::Erased { .. }))), "{context}: {refused:?}");
                let refused = handle.raw().events(.., 9).await;
                assert!(matches!(refused, Err(ReadError::Refused(Refused::Erased { .. }))), "{context}: {refused:?}");
                erased.insert(id.clone());
            }
            Err(error) => panic!("{context}: {error:?}"),
        }
    }
    assert_eq!(erased.is_empty(), place == "erase.requested", "{context}: {erased:?} of {victims:?}");
    until(&format!("{context}: it completes by itself"), async || kuma.erasures_unfinished() == 0).await;

    let mut receipts = BTreeMap::new();
    for id in &erased {
        let handle = kuma.entity::<Probe>(id);
        let receipt: Receipt = handle.erase(Reason::new("again")).await.unwrap();
        receipt.verify(&kuma.public_key()).unwrap();
        assert_eq!(receipt.receipt.entity, handle.raw().hash().unwrap().to_hex());
        assert_eq!(kuma.receipt(receipt.receipt.id).await.unwrap().as_ref(), Some(&receipt), "{context}");
        let commits: u64 = receipt.receipt.stores.iter().map(|store| store.commits).sum();
        let at_least = acked.iter().filter(|(entity, ..)| entity == id).count() as u64;
        assert!(commits >= at_least, "{context}: {commits} of {at_least} commits in {receipt}");
        traces.look_for(&receipt.receipt.entity);
        receipts.insert(receipt.receipt.id, receipt);
    }
    assert_eq!(receipts.len(), erased.len());
    assert!(
        said.receipts.iter().all(|id| receipts.contains_key(id)),
        "{context}: a receipt that was given is not there"
    );
    traces.assert_none(&path, &context);

    // Asked for once, and completed once; what was never begun may have been asked for.
    let mut told: BTreeMap<ReceiptId, (u32, u32)> = BTreeMap::new();
    for event in kuma.audit_log().raw().events(.., usize::MAX).await.unwrap() {
        match event.decode::<AuditLog>().unwrap() {
            AuditEvent::ErasureRequested { receipt, .. } => told.entry(receipt).or_default().0 += 1,
            AuditEvent::ErasureCompleted { receipt } => told.entry(receipt).or_default().1 += 1,
            other => panic!("{context}: {other:?}"),
        }
    }
    assert!(receipts.keys().all(|id| told.get(id) == Some(&(1, 1))), "{context}: {told:?}");
    assert!(told.iter().all(|(id, times)| receipts.contains_key(id) || *times == (1, 0)), "{context}: {told:?}");

    // Everybody else has what was acknowledged.
    let mut oracle = Oracle::default();
    for (entity, append, version) in acked.into_iter().filter(|(entity, ..)| !erased.contains(entity)) {
        oracle.acked(&entity, append, version);
    }
    oracle.judge(&kuma).await.assert_clean(&context);
    for id in &victims {
        let handle = kuma.entity::<Probe>(id);
        if erased.contains(id) {
            assert_eq!(handle.recreate(Reason::new("back again")).await.unwrap(), 2);
        }
        let before = handle.read().await.unwrap().version();
        assert_eq!(before == Version(0), erased.contains(id), "{context}");
        let after = handle.append_all(TestAppend { id: 9 << 40, events: 1, bytes: 1 }.events()).await.unwrap();
        assert_eq!(after, Version(before.0 + 1), "{context}");
    }
    kuma.shutdown().await;
    traces.assert_none(&path, &format!("{context}, closed"));
    tally.erased = erased.len() as u64;
    tally.untouched = (victims.len() - erased.len()) as u64;
    tally
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erasure_that_is_killed_completes_by_itself_or_was_never_asked_for() {
    let first = seed("erase_crash");
    let template = Template::make().await;
    for (round, place) in PLACES.into_iter().enumerate() {
        let kills = cases(KILLS);
        let cases = (0..kills).map(|kill| {
            let template = &template;
            async move { case(template, place, first.wrapping_add(round as u64 * KILLS + kill)).await }
        });
        let cases: Vec<Tally> = stream::iter(cases).buffer_unordered(3).collect().await;
        let sum = |what: fn(&Tally) -> u64| cases.iter().map(what).sum::<u64>();
        println!(
            "{place}: {kills} kills, {} erased, {} untouched, {} killed again, {} went on at the last start, {} appends acknowledged",
            sum(|tally| tally.erased),
            sum(|tally| tally.untouched),
            sum(|tally| tally.again),
            sum(|tally| tally.resumed),
            sum(|tally| tally.acks)
        );
    }
}
