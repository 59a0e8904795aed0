//! Promise: a file is imported once, however often it is read; what cannot be imported is named by its line, and nothing of it is half
//! there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common;
use std::{
    collections::BTreeMap,
    error::Error,
    fmt::Write as _,
    io::{self, BufRead, BufReader},
    path::Path,
    pin::Pin,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use crate::common::{Account, Ledger, OnDisk, assert_clean, directory, entered, start, until};
use kuma_core::{
    AppendError, ImportError, ImportProblem, ImportProgress, ImportReport, Kuma, LineProblem, Manifest, NewEvent,
    Options, Refused, Version,
};
use power_loss::{Disk, Errno, Fault, PowerLoss};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufRead, AsyncRead, ReadBuf};

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../kuma-core/examples/flights-sample.ndjson");

async fn import(kuma: &Kuma, source: &str, file: impl AsRef<[u8]>) -> Result<ImportReport, ImportError> {
    kuma.import(source).run(file.as_ref(), |_| {}).await
}

async fn exported(kuma: &Kuma) -> String {
    let mut file = Vec::new();
    kuma.export_all(&mut file, |_| {}).await.unwrap();
    String::from_utf8(file).unwrap()
}

/// What a store holds: the events of each entity, with the boundaries of their commits.
type Contents = BTreeMap<(String, String), Vec<(String, Value, Value)>>;

async fn contents(kuma: &Kuma) -> Contents {
    parsed(&exported(kuma).await)
}

/// The events of one entity.
async fn entity(kuma: &Kuma, kind: &str, id: &str) -> Vec<(String, Value, Value)> {
    let mut file = Vec::new();
    kuma.raw(kind, id).export(&mut file).await.unwrap();
    parsed(std::str::from_utf8(&file).unwrap()).into_values().next().unwrap_or_default()
}

fn parsed(export: &str) -> Contents {
    let mut contents = Contents::new();
    for line in export.lines() {
        let mut line: Value = serde_json::from_str(line).unwrap();
        if line.get("manifest").is_none() {
            let text = |field: &str| line[field].as_str().unwrap().to_owned();
            let (name, event) = ((text("kind"), text("id")), text("type"));
            contents.entry(name).or_default().push((event, line["data"].take(), line["commit"].take()));
        }
    }
    contents
}

/// What a store holds that has imported this file and nothing else, without an error.
async fn contents_of(file: &str) -> Contents {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    import(&kuma, "reference", file).await.unwrap();
    let contents = contents(&kuma).await;
    kuma.shutdown().await;
    contents
}

fn line(id: &str, name: &str, data: impl Into<Value>) -> String {
    json!({"kind": "thing", "id": id, "type": name, "data": data.into()}).to_string()
}

/// An export of ledgers with commits of one to four events.
async fn an_export(entities: u64, commits: u64) -> String {
    let dir = directory();
    let kuma = start(dir.path(), 2).await;
    for id in 0..entities {
        let ledger = kuma.entity::<Ledger>(format!("{id}"));
        for commit in 0..commits {
            let events = (0..=(commit + id) % 4).map(|event| entered(100 * commit + event));
            ledger.append_all(events).await.unwrap();
        }
    }
    let file = exported(&kuma).await;
    kuma.shutdown().await;
    file
}

/// An error with all its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        write!(text, ": {cause}").unwrap();
        source = cause.source();
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_imported_once_however_often_it_is_read() {
    let dir = directory();
    let file = std::fs::read(SAMPLE).unwrap();
    let kuma = start(dir.path(), 3).await;
    let first = import(&kuma, "flights", &file).await.unwrap();
    assert_eq!((first.lines, first.commits, first.events, first.new_events()), (2000, 2000, 2000, 2000));
    assert_eq!((first.repeated_commits, first.manifest.clone(), first.truncated), (0, None, false));
    let stored = contents(&kuma).await;
    assert_eq!(first.entities, Some(stored.len() as u64));
    let all = exported(&kuma).await;
    kuma.shutdown().await;

    let kuma = start(dir.path(), 3).await;
    for in_flight in [1, 7, 4096] {
        let again = kuma.import("flights").in_flight(in_flight).run(&file[..], |_| {}).await.unwrap();
        assert_eq!((again.commits, again.repeated_commits, again.repeated_events), (2000, 2000, 2000));
        assert_eq!((again.new_events(), again.entities), (0, first.entities));
    }
    assert_eq!(exported(&kuma).await, all, "nothing was written");
    // Line by line what the file says.
    let mut found: BTreeMap<(String, String), usize> = BTreeMap::new();
    for text in file.split(|byte| *byte == b'\n').filter(|text| !text.is_empty()) {
        let line: Value = serde_json::from_slice(text).unwrap();
        let name = (line["kind"].as_str().unwrap().to_owned(), line["id"].as_str().unwrap().to_owned());
        let place = found.entry(name.clone()).or_default();
        let (event, data, _) = &stored[&name][*place];
        assert_eq!((json!(event), data), (line["type"].clone(), &line["data"]));
        *place += 1;
    }
    // The same file under another name is another file.
    let other = import(&kuma, "flights again", &file).await.unwrap();
    assert_eq!((other.repeated_commits, other.new_events()), (0, 2000));
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// Whoever else has written to an entity: its import finds its own commits again, and nothing else of it.
#[tokio::test]
async fn commits_are_found_again_among_those_of_others() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let other = async |id: u64| {
        for _ in 0..id * 90 {
            kuma.raw("thing", format!("{id}")).append(NewEvent::json("Other", &json!({})).unwrap()).await.unwrap();
        }
    };
    let file: String = (0..200).map(|n| line(&format!("{}", n % 4), "Was", json!({"n": n})) + "\n").collect();
    let (first_half, _) = file.split_at(file.match_indices('\n').nth(99).unwrap().0 + 1);
    for id in 0..4 {
        other(id).await;
    }
    import(&kuma, "f", first_half).await.unwrap();
    for id in 0..4 {
        other(id).await;
    }
    for (repeated, new) in [(100, 100), (200, 0)] {
        let report = import(&kuma, "f", &file).await.unwrap();
        assert_eq!((report.repeated_commits, report.new_events()), (repeated, new));
    }
    for (id, events) in contents(&kuma).await {
        let own: Vec<&Value> = events.iter().filter(|event| event.0 == "Was").map(|event| &event.1["n"]).collect();
        let id: u64 = id.1.parse().unwrap();
        let expected: Vec<Value> = (0..200).filter(|n| n % 4 == id).map(Value::from).collect();
        assert_eq!(own, expected.iter().collect::<Vec<_>>());
        assert_eq!(events.len() as u64, 50 + 2 * 90 * id);
    }
    kuma.shutdown().await;
}

/// Each hostile line, in the middle of a good file: its number and a reason, never what stands in it; nothing of it or behind it of its
/// entity is there; mended in its place, the file is imported to its end.
#[tokio::test]
async fn a_bad_line_stops_the_import_and_the_mended_file_goes_on() {
    let good = |n: u64| line(["a", "b", "secret"][(n % 3) as usize], "Was", json!({"n": n, "secret": "secret"}));
    let deep = "[".repeat(100_000);
    let bad: Vec<(Vec<u8>, &str)> = [
        (r#"{"kind":"thing","id":"secret","type":"Was","data":{"secret":1}"#.to_owned(), "middle"),
        (r#"{"kind":"thing","id":"secret","type":"Was","data":{"secret":1}},"#.to_owned(), "not a JSON object (column"),
        ("secret".to_owned(), "not a JSON object"),
        (r#"["secret"]"#.to_owned(), "not a JSON object"),
        ("\0\0\0\0".to_owned(), "not a JSON object"),
        ("{\"kind\":\"thing\",\"id\":\"secret\0\",\"type\":\"Was\",\"data\":1}".to_owned(), "not a JSON object"),
        (r#"{"id":"secret","type":"Was","data":{"secret":1}}"#.to_owned(), "no field \"kind\""),
        (r#"{"kind":"thing","type":"Was","data":{"secret":1}}"#.to_owned(), "no field \"id\""),
        (r#"{"kind":"thing","id":"secret","data":{"secret":1}}"#.to_owned(), "no field \"type\""),
        (r#"{"kind":"thing","id":"secret","type":"Was"}"#.to_owned(), "no field \"data\""),
        (r#"{"kind":"thing","id":"secret","id":"secret","type":"Was","data":1}"#.to_owned(), "\"id\" twice"),
        (r#"{"kind":"thing","id":"secret","type":"Was","data":1,"data":2}"#.to_owned(), "\"data\" twice"),
        (
            r#"{"kind":"thing","id":"secret","type":"Was","data":1,"secret":2}"#.to_owned(),
            "does not know, with its value at column",
        ),
        (r#"{"kind":"thing","id":["secret"],"type":"Was","data":1}"#.to_owned(), "\"id\" is not a text"),
        (r#"{"kind":"thing","id":"","type":"Was","data":1}"#.to_owned(), "it is empty"),
        (line(&"secret".repeat(100), "Was", 1), "over 512 bytes"),
        (r#"{"kind":"secret thing","id":"a","type":"Was","data":1}"#.to_owned(), "the kind (12 bytes) is refused"),
        (line("secret", "", 1), "\"type\" is not"),
        (line("secret", &"secret".repeat(30), 1), "\"type\" is not"),
        (r#"{"kind":"thing","id":"secret","type":"Was","at":"secret","data":1}"#.to_owned(), "\"at\" is not a time"),
        (r#"{"kind":"thing","id":"secret","type":"Was","schema":-1,"data":1}"#.to_owned(), "\"schema\" is not"),
        (r#"{"kind":"thing","id":"secret","type":"Was","key":"","data":1}"#.to_owned(), "idempotency key (0 bytes)"),
        (
            format!(r#"{{"kind":"thing","id":"secret","type":"Was","data":{deep}1{}}}"#, "]".repeat(100_000)),
            "more than 127 deep",
        ),
        (format!(r#"{{"kind":"thing","id":"secret","type":"Was","data":{deep}"#), "middle"),
        (
            r#"{"kind":"thing","id":"secret","type":"Was","data":123456789012345678901234567890}"#.to_owned(),
            "does not fit",
        ),
        (r#"{"kind":"thing","id":"secret","type":"Was","data":"\ud800"}"#.to_owned(), "not Unicode"),
        (r#"{"kind":"thing","id":"secret","type":"Was","bytes":"secret"}"#.to_owned(), "\"bytes\" is not base64"),
        // Base64 of what is no MessagePack, of two values, of one that a document cannot hold.
        (r#"{"kind":"thing","id":"secret","type":"Was","bytes":"wQ=="}"#.to_owned(), "can read"),
        (r#"{"kind":"thing","id":"secret","type":"Was","bytes":"AQE="}"#.to_owned(), "can read"),
        (r#"{"kind":"thing","id":"secret","type":"Was","bytes":"gQEC"}"#.to_owned(), "can read"),
        (line("secret", "Was", "secret".repeat(200_000)), "event 0 of the append has 12000"),
        (r#"{"manifest":{"format":2}}"#.to_owned(), "format 2"),
        (r#"{"manifest":"secret"}"#.to_owned(), "is not the manifest"),
        (
            r#"{"manifest":{"format":1,"entities":3,"commits":1,"events":1,"sha256":""}}"#.to_owned(),
            "number of commits",
        ),
        (r#"{"manifest":{"format":1,"entities":3,"commits":10,"events":10,"sha256":""}}"#.to_owned(), "digest"),
    ]
    .map(|(text, reason)| (text.into_bytes(), reason))
    .into_iter()
    .chain([
        (b"{\"kind\":\"thing\",\"id\":\"secret\xff\"}".to_vec(), "not UTF-8 (column"),
        (vec![b'x'; (8 << 20) + 1], "longer than 8388608 bytes"),
    ])
    .collect();
    let mended: String = (1..=20).map(|n| good(n) + "\n").collect();
    let expected = contents_of(&mended).await;
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    for (number, (bad, reason)) in bad.iter().enumerate() {
        let mut file: Vec<u8> = (1..=10).flat_map(|n| (good(n) + "\n").into_bytes()).collect();
        file.extend_from_slice(bad);
        file.extend((12..=20).flat_map(|n| ("\n".to_owned() + &good(n)).into_bytes()));
        // Each in entities of its own, so that one store will do.
        let rename = |file: &[u8]| replace(file, b"\"kind\":\"thing\"", format!("\"kind\":\"k{number}\"").as_bytes());
        let source = format!("file {number}");
        let what = String::from_utf8_lossy(&bad[..bad.len().min(80)]);
        let error = import(&kuma, &source, rename(&file)).await.unwrap_err();
        assert!(chain(&error).contains(reason), "{what}: {}", chain(&error));
        assert!(!chain(&error).contains("secret"), "{what}: {}", chain(&error));
        assert_eq!((error.line, error.report.lines), (11, 11), "{what}");
        assert_eq!((error.report.commits, error.report.truncated), (10, false), "{what}");
        let report = import(&kuma, &source, rename(mended.as_bytes())).await.unwrap();
        assert_eq!((report.events, report.repeated_events), (20, 10), "{what}");
    }
    let mut stored = contents(&kuma).await;
    for number in 0..bad.len() {
        for ((_, id), events) in &expected {
            assert_eq!(stored.remove(&(format!("k{number}"), id.clone())).as_ref(), Some(events), "{number}");
        }
    }
    assert!(stored.is_empty(), "{:?}", stored.keys());
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

fn replace(text: &[u8], what: &[u8], with: &[u8]) -> Vec<u8> {
    let (mut replaced, mut rest) = (Vec::new(), text);
    while let Some((first, after)) = rest.split_first() {
        match rest.strip_prefix(what) {
            Some(after) => {
                replaced.extend_from_slice(with);
                rest = after;
            }
            None => {
                replaced.push(*first);
                rest = after;
            }
        }
    }
    replaced
}

/// Wherever a copy ended: whole commits only, the cut is noticed, and the whole file goes on from there.
#[tokio::test]
async fn an_export_that_was_cut_anywhere_is_noticed_and_finished_by_the_whole_one() {
    let file = an_export(2, 5).await;
    let expected = contents_of(&file).await;
    let manifest_at = file.rfind("{\"manifest\"").unwrap();
    let line_ends = file.match_indices('\n').flat_map(|(at, _)| [at - 1, at, at + 1]);
    let cuts: Vec<usize> = line_ends.chain((0..file.len()).step_by(151)).filter(|cut| *cut < file.len() - 1).collect();
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    for (number, cut) in cuts.iter().copied().enumerate() {
        // Each in entities of its own, so that one store will do. The digest changes with the name.
        let rename = |text: &str| text.replace("\"kind\":\"ledger\"", &format!("\"kind\":\"ledger{number:04}\""));
        let whole = rename(&file[..manifest_at]);
        let manifest = remade(&file[manifest_at..], &whole);
        let (kind, source) = (format!("ledger{number:04}"), format!("cut {cut}"));
        let part = if cut <= manifest_at { rename(&file[..cut]) } else { whole.clone() + &file[manifest_at..cut] };
        let outcome = import(&kuma, &source, &part).await;
        if part.is_empty() {
            assert_eq!(outcome.unwrap().events, 0);
        } else {
            let error = outcome.unwrap_err();
            assert!(error.report.truncated && error.report.manifest.is_none(), "cut at {cut}: {error}");
            assert!(error.line <= error.report.lines && error.line > 0, "cut at {cut}: {error}");
        }
        for ((_, id), whole) in &expected {
            let events = entity(&kuma, &kind, id).await;
            assert_eq!(events, whole[..events.len()], "cut at {cut}");
            let next = whole.get(events.len()).map(|(_, _, commit)| commit["first"].as_u64().unwrap() - 1);
            assert_eq!(next.unwrap_or(whole.len() as u64), events.len() as u64, "cut at {cut}: a whole commit");
        }
        let report = import(&kuma, &source, whole + &manifest).await.unwrap();
        assert_eq!((report.truncated, report.manifest.unwrap().entities), (false, 2));
        for ((_, id), whole) in &expected {
            assert_eq!(&entity(&kuma, &kind, id).await, whole, "cut at {cut}");
        }
    }
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}

/// The manifest for other bytes.
fn remade(manifest: &str, bytes: &str) -> String {
    let mut manifest: BTreeMap<String, Manifest> = serde_json::from_str(manifest).unwrap();
    manifest.get_mut("manifest").unwrap().sha256 = sha256(bytes);
    serde_json::to_string(&manifest).unwrap() + "\n"
}

fn sha256(bytes: &str) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

#[tokio::test]
async fn a_manifest_that_does_not_fit_is_refused_and_so_is_what_stands_behind_it() {
    let file = an_export(3, 4).await;
    let (lines, manifest) = file.split_at(file.rfind("{\"manifest\"").unwrap());
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let line_count = lines.lines().count() as u64;
    let wrong = |what: &'static str| move |reason: &ImportProblem| matches!(reason, ImportProblem::WrongManifest { what: found } if found.contains(what));
    let parsed: Value = serde_json::from_str(manifest).unwrap();
    let with = |field: &str, value: Value| {
        let mut manifest = parsed.clone();
        manifest["manifest"][field] = value;
        format!("{lines}{manifest}\n")
    };
    // Another digit in the data: the digest alone knows.
    let digit = lines.find("\"number\":1").unwrap() + 9;
    let altered = format!("{}9{}{manifest}", &lines[..digit], &lines[digit + 1..]);
    for (what, file, line, is_reason) in [
        (
            "digest",
            with("sha256", json!("0".repeat(64))),
            line_count + 1,
            Box::new(wrong("digest")) as Box<dyn Fn(&ImportProblem) -> bool>,
        ),
        ("entities", with("entities", json!(4)), line_count + 1, Box::new(wrong("entities"))),
        ("commits", with("commits", json!(1)), line_count + 1, Box::new(wrong("commits"))),
        ("events", with("events", json!(1)), line_count + 1, Box::new(wrong("events"))),
        (
            "format",
            with("format", json!(7)),
            line_count + 1,
            Box::new(|reason| matches!(reason, ImportProblem::Line(LineProblem::Format { format: 7 }))),
        ),
        (
            "a line is gone",
            lines.split_once('\n').unwrap().1.to_owned() + manifest,
            1,
            Box::new(|reason| matches!(reason, ImportProblem::WrongVersion { .. })),
        ),
        (
            "a second file",
            file.clone() + &file,
            line_count + 2,
            Box::new(|reason| matches!(reason, ImportProblem::AfterManifest)),
        ),
        (
            "no manifest",
            lines.to_owned(),
            line_count,
            Box::new(|reason| matches!(reason, ImportProblem::MissingManifest)),
        ),
    ] {
        let kuma = start(&dir.path().join(what), 1).await;
        let error = import(&kuma, "f", &file).await.unwrap_err();
        assert_eq!(error.line, line, "{what}: {error}");
        assert!(is_reason(&error.reason), "{what}: {error}");
        assert_eq!(error.report.truncated, what == "no manifest");
        assert_eq!(error.report.manifest.is_some(), what == "a second file");
        kuma.shutdown().await;
    }
    let error = import(&kuma, "altered", &altered).await.unwrap_err();
    assert!(wrong("digest")(&error.reason), "{error}");
    assert_eq!(error.report.events, line_count, "the digest is known only at the end");
    kuma.shutdown().await;
}

#[tokio::test]
async fn kinds_that_are_not_expected_are_refused_by_line() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let of_kind = |kind: &str| line("1", "Entered", json!({"number": 1, "note": ""})).replace("thing", kind);
    let file = [of_kind("ledger"), of_kind("ledger"), of_kind("leger"), of_kind("ledger")].join("\n");
    let error = kuma.import("f").only_registered_kinds().run(file.as_bytes(), |_| {}).await.unwrap_err();
    assert!(matches!(error, ImportError { line: 1, reason: ImportProblem::UnknownKind, .. }), "{error}");
    // Being refused did not make the kind a document.
    kuma.register::<Ledger>().unwrap();
    let error = kuma.import("f").only_registered_kinds().run(file.as_bytes(), |_| {}).await.unwrap_err();
    assert!(matches!(error, ImportError { line: 3, reason: ImportProblem::UnknownKind, .. }), "{error}");
    let error = kuma.import("f").kinds(["thing", "ledger"]).run(file.as_bytes(), |_| {}).await.unwrap_err();
    assert!(matches!(error, ImportError { line: 3, reason: ImportProblem::UnknownKind, .. }), "{error}");
    let report = kuma.import("f").kinds(["leger", "ledger"]).run(file.as_bytes(), |_| {}).await.unwrap();
    assert_eq!((report.events, report.new_events()), (4, 2));
    assert_eq!(kuma.entity::<Ledger>("1").read().await.unwrap().entries, [1, 1, 1]);
    kuma.shutdown().await;
}

#[tokio::test]
async fn an_entity_that_has_moved_on_is_a_version_conflict_unless_it_is_the_same_import() {
    let (one, two) = (directory(), directory());
    let (first, second) = (start(one.path(), 1).await, start(two.path(), 1).await);
    let ledger = first.entity::<Ledger>("1");
    ledger.append_all([entered(1), entered(2)]).await.unwrap();
    ledger.append(entered(3)).await.unwrap();
    let file = exported(&first).await;
    // Half of it, by hand.
    let moved = second.entity::<Ledger>("1");
    moved.append(entered(1)).await.unwrap();
    let error = import(&second, "first", &file).await.unwrap_err();
    assert!(
        matches!(
            error,
            ImportError {
                line: 1,
                reason: ImportProblem::WrongVersion { expected: Version(0), actual: Version(1) },
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(moved.read().await.unwrap().entries, [1], "nothing of the commit, and nothing behind it");
    first.shutdown().await;
    // What was imported stays imported, also when the entity has moved on since.
    let third = start(one.path(), 1).await;
    let dir = directory();
    let fourth = start(dir.path(), 1).await;
    fourth.register::<Ledger>().unwrap();
    import(&fourth, "first", &file).await.unwrap();
    fourth.entity::<Ledger>("1").append(entered(4)).await.unwrap();
    let again = import(&fourth, "first", &file).await.unwrap();
    assert_eq!((again.repeated_commits, again.new_events()), (2, 0));
    // Into the store that it came from, nothing can be imported.
    let error = import(&third, "first", &file).await.unwrap_err();
    assert!(matches!(error.reason, ImportProblem::WrongVersion { .. }), "{error}");
    for kuma in [second, third, fourth] {
        kuma.shutdown().await;
    }
}

/// Lines of one commit are appended together wherever they stand, and in the order of their versions.
#[tokio::test]
async fn the_lines_of_a_commit_may_stand_apart() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let of = |id: &str, first: u64, count: u64, version: u64| {
        json!({"kind": "thing", "id": id, "type": "Was", "version": version, "commit": {"first": first, "count": count}, "data": {"v": version}})
            .to_string()
    };
    let lines = [
        of("a", 1, 3, 1),
        of("b", 1, 2, 1),
        of("a", 1, 3, 2),
        of("c", 1, 1, 1),
        line("d", "Was", json!({})),
        of("b", 1, 2, 2),
        of("b", 3, 1, 3),
        of("a", 1, 3, 3),
    ];
    let error = import(&kuma, "f", lines.join("\n")).await.unwrap_err();
    assert!(matches!(error, ImportError { line: 8, reason: ImportProblem::MissingManifest, .. }), "{error}");
    assert_eq!((error.report.commits, error.report.events), (5, 8));
    let spans: Vec<(String, Vec<Value>)> = contents(&kuma)
        .await
        .into_iter()
        .map(|((_, id), events)| (id, events.into_iter().map(|(_, _, commit)| commit["first"].clone()).collect()))
        .collect();
    let expected = [("a", vec![1, 1, 1]), ("b", vec![1, 1, 3]), ("c", vec![1]), ("d", vec![1])];
    assert_eq!(spans, expected.map(|(id, firsts)| (id.to_owned(), firsts.into_iter().map(Value::from).collect())));

    // What does not go on where it should. The line that is named is the one to look at.
    for (what, lines, line, is_reason) in [
        ("a commit begins within another", vec![of("x", 1, 2, 1), of("y", 1, 1, 1), of("x", 2, 1, 2)], 1, 'i'),
        ("a line of its own within a commit", vec![of("x", 1, 2, 1), self::line("x", "Was", 1)], 1, 'i'),
        ("the end", vec![self::line("y", "Was", 1), of("x", 1, 3, 1), of("x", 1, 3, 2)], 2, 'i'),
        ("versions out of order", vec![of("x", 1, 3, 1), of("x", 1, 3, 3)], 2, 'm'),
        ("a version outside of its commit", vec![of("x", 1, 1, 2)], 1, 'm'),
        (
            "a manifest within a commit",
            vec![
                of("x", 1, 2, 1),
                r#"{"manifest":{"format":1,"entities":1,"commits":1,"events":1,"sha256":""}}"#.into(),
            ],
            1,
            'i',
        ),
        ("more events than an append takes", vec![of("x", 1, 5000, 1)], 1, 't'),
        ("a version that cannot be", vec![of("x", u64::MAX, 2, u64::MAX), of("x", u64::MAX, 2, u64::MAX)], 1, 'w'),
    ] {
        let dir = directory();
        let kuma = start(dir.path(), 1).await;
        let error = import(&kuma, "f", lines.join("\n")).await.unwrap_err();
        assert_eq!(error.line, line, "{what}: {error}");
        let found = match error.reason {
            ImportProblem::IncompleteCommit { .. } => 'i',
            ImportProblem::Misplaced => 'm',
            ImportProblem::Refused(Refused::TooManyEvents { .. }) => 't',
            ImportProblem::WrongVersion { .. } => 'w',
            other => panic!("{what}: {other}"),
        };
        assert_eq!(found, is_reason, "{what}");
        assert!(!contents(&kuma).await.contains_key(&("thing".into(), "x".into())), "{what}");
        kuma.shutdown().await;
    }
    kuma.shutdown().await;
}

#[tokio::test]
async fn what_belongs_to_a_commit_is_the_same_in_all_its_lines_or_only_in_the_first() {
    let of = |version: u64, more: Value| {
        let mut line = json!({"kind": "thing", "id": "a", "type": "Was", "commit": {"first": 1, "count": 2}, "data": {"v": version}});
        line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        line.to_string()
    };
    let all = json!({"key": "k", "at": "2013-01-01T06:00:00+01:00", "metadata": {"correlation": "c"}});
    for (second, disagrees) in [
        (json!({}), None),
        (all.clone(), None),
        (json!({"key": "l"}), Some("key")),
        (json!({"at": "2013-01-01T05:00:00Z"}), Some("at")),
        (json!({"metadata": {}}), Some("metadata")),
    ] {
        let dir = directory();
        let kuma = start(dir.path(), 1).await;
        let error = import(&kuma, "f", [of(1, all.clone()), of(2, second)].join("\n")).await.unwrap_err();
        match (error.reason, disagrees) {
            (ImportProblem::MissingManifest, None) => {
                let events = common::history(&kuma, "thing", "a").await;
                for event in &events {
                    let metadata = event.metadata.clone().unwrap();
                    assert_eq!(metadata.correlation.as_deref(), Some("c"));
                    assert_eq!(metadata.headers, [("at".to_owned(), "2013-01-01T06:00:00+01:00".to_owned())]);
                }
                assert_eq!(events.len(), 2);
            }
            (ImportProblem::Disagrees { field }, Some(expected)) => assert_eq!((field, error.line), (expected, 2)),
            (other, expected) => panic!("{expected:?}: {other}"),
        }
        kuma.shutdown().await;
    }
}

/// A key that a line gives makes it happen once in the entity, whatever the file is called and wherever the line stands.
#[tokio::test]
async fn a_key_of_a_line_counts_instead_of_its_number() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let keyed = |key: &str, n: u64| {
        json!({"kind": "thing", "id": "a", "type": "Was", "key": key, "data": {"n": n}}).to_string()
    };
    let report = import(&kuma, "f", [keyed("k", 1), keyed("l", 2)].join("\n")).await.unwrap();
    assert_eq!(report.new_events(), 2);
    let report = import(&kuma, "g", [line("b", "Was", 1), keyed("l", 2), keyed("m", 3), keyed("k", 1)].join("\n"))
        .await
        .unwrap();
    assert_eq!((report.repeated_commits, report.new_events()), (2, 2));
    let error = import(&kuma, "h", [keyed("n", 4), keyed("k", 5)].join("\n")).await.unwrap_err();
    assert!(
        matches!(error, ImportError { line: 2, reason: ImportProblem::KeyReused { version: Version(1) }, .. }),
        "{error}"
    );
    // The same key as by hand.
    let again = NewEvent::json("Was", &json!({"n": 1})).unwrap();
    assert_eq!(kuma.raw("thing", "a").append(again).idempotency_key("k").await.unwrap(), Version(1));
    kuma.shutdown().await;
}

/// The file is not the one that was imported under this name: noticed where it differs, by the entity and by the reading ahead.
#[tokio::test]
async fn another_file_under_the_same_name_is_noticed_where_it_differs() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let lines: Vec<String> = (0..3000).map(|n| line("a", "Was", json!({"n": n}))).collect();
    import(&kuma, "f", lines.join("\n")).await.unwrap();
    for (at, in_flight) in [(0, 4096), (1499, 1), (2999, 16)] {
        let mut other = lines.clone();
        other[at] = line("a", "Was", json!({"n": "other"}));
        let run = kuma.import("f").in_flight(in_flight);
        let error = run.run(other.join("\n").as_bytes(), |_| {}).await.unwrap_err();
        assert!(matches!(error.reason, ImportProblem::KeyReused { .. }), "{error}");
        assert_eq!(error.line, at as u64 + 1);
        assert_eq!(error.report.new_events(), 0);
    }
    kuma.shutdown().await;
}

/// A commit that its kind refuses is found when others are on their way already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_refused_commit_none_of_its_entity_is_there_and_the_lowest_line_is_named() {
    let dir = directory();
    let kuma = start(dir.path(), 2).await;
    kuma.register::<Ledger>().unwrap();
    let of = |n: u64, event: &str| {
        json!({"kind": "ledger", "id": format!("secret {}", n % 10), "type": event, "data": {"number": n, "note": "secret"}}).to_string()
    };
    let mut lines: Vec<String> = (0..1000).map(|n| of(n, "Entered")).collect();
    lines[777] = of(777, "Secret");
    lines[432] = of(432, "Secret");
    // Lines are submitted one after the other, so that this one is refused while it is: by its entity, and last.
    let error = import(&kuma, "f", lines.join("\n")).await.unwrap_err();
    assert!(matches!(error, ImportError { line: 433, reason: ImportProblem::Undecodable, .. }), "{error}");
    assert!(!chain(&error).contains("ecret"), "{}", chain(&error));
    lines[432] = of(432, "Entered");
    let error = import(&kuma, "f", lines.join("\n")).await.unwrap_err();
    assert!(matches!(error, ImportError { line: 778, reason: ImportProblem::Undecodable, .. }), "{error}");
    lines[777] = of(777, "Entered");
    let report = import(&kuma, "f", lines.join("\n")).await.unwrap();
    assert_eq!((report.events, report.repeated_events), (1000, 777));
    for id in 0..10 {
        let expected: Vec<u64> = (0..1000).filter(|n| n % 10 == id).collect();
        assert_eq!(kuma.entity::<Ledger>(format!("secret {id}")).read().await.unwrap().entries, expected);
    }
    kuma.shutdown().await;
}

/// The refusal of a version is an answer that comes while hundreds of later commits of the same entity are on their way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_version_conflict_on_the_way_none_of_its_entity_is_there() {
    let dir = directory();
    let kuma = start(dir.path(), 2).await;
    let of = |n: u64, version: u64| {
        json!({"kind": "thing", "id": format!("{}", n % 2), "type": "Was", "version": version, "data": {"n": n}})
            .to_string()
    };
    // Of entity 1, version 100 is missing.
    let lines: Vec<String> = (0..600).map(|n| of(n, n / 2 + 1 + u64::from(n % 2 == 1 && n > 200))).collect();
    let error = import(&kuma, "f", lines.join("\n")).await.unwrap_err();
    let reason = ImportProblem::WrongVersion { expected: Version(101), actual: Version(100) };
    assert_eq!((error.line, error.reason.to_string()), (202, reason.to_string()));
    let stored = contents(&kuma).await;
    assert_eq!(stored[&("thing".into(), "1".into())].len(), 100);
    assert_eq!(error.report.events, stored.values().map(|events| events.len() as u64).sum::<u64>());
    kuma.shutdown().await;
}

/// No version says that something is missing: that the one before it failed is all that keeps a commit from being written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_commit_that_failed_on_the_way_none_of_its_entity_is_there() {
    let dir = directory();
    let kuma = start(dir.path(), 2).await;
    kuma.register::<Account>().unwrap();
    let of = |id: u64, event: &str, data: Value| {
        json!({"kind": "account", "id": format!("{id}"), "type": event, "data": data}).to_string()
    };
    let mut lines: Vec<String> = (0..600).map(|n| of(n % 3, "Deposited", json!({"amount": 1}))).collect();
    lines[301] = of(1, "Poisoned", Value::Null);
    let error = import(&kuma, "f", lines.join("\n")).await.unwrap_err();
    assert!(matches!(error.reason, ImportProblem::Refused(Refused::ApplyPanicked { .. })), "{error}");
    assert_eq!(error.line, 302);
    assert_eq!(kuma.entity::<Account>("1").read().await.unwrap().balance, 100);
    lines[301] = of(1, "Deposited", json!({"amount": 1000}));
    let report = import(&kuma, "f", lines.join("\n")).await.unwrap();
    assert_eq!((report.events, report.repeated_events), (600, error.report.events));
    for (id, balance) in [(0, 200), (1, 1199), (2, 200)] {
        assert_eq!(kuma.entity::<Account>(format!("{id}")).read().await.unwrap().balance, balance);
    }
    kuma.shutdown().await;
}

/// Gives its bytes, and then something else.
struct Then<'a, R> {
    bytes: &'a [u8],
    then: R,
}

impl<R: FnMut() -> Poll<io::Result<()>> + Unpin> AsyncRead for Then<'_, R> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (now, later) = self.bytes.split_at(self.bytes.len().min(buffer.remaining()).min(1000));
        if now.is_empty() {
            return (self.then)();
        }
        buffer.put_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(()))
    }
}

impl<'a, R: FnMut() -> Poll<io::Result<()>> + Unpin + Send> Then<'a, R> {
    fn reader(bytes: &'a [u8], then: R) -> impl AsyncBufRead + Unpin + Send + use<'a, R> {
        tokio::io::BufReader::new(Then { bytes, then })
    }
}

#[tokio::test]
async fn a_reader_that_fails_is_named_with_its_line_and_what_was_read_is_there() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let file: String = (0..500).map(|n| line("a", "Was", json!({"n": n})) + "\n").collect();
    let reader = Then::reader(file.as_bytes(), || Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())));
    let error = kuma.import("f").run(reader, |_| {}).await.unwrap_err();
    assert!(matches!(&error.reason, ImportProblem::Read(cause) if cause.kind() == io::ErrorKind::ConnectionReset));
    assert_eq!((error.line, error.report.events), (501, 500));
    kuma.shutdown().await;
}

#[tokio::test]
async fn a_line_without_end_does_not_fill_the_memory() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let endless = tokio::io::BufReader::new(tokio::io::repeat(b'['));
    let error = kuma.import("f").run(endless, |_| {}).await.unwrap_err();
    assert!(matches!(error.reason, ImportProblem::Line(LineProblem::TooLong { bytes_max: 8_388_608 })), "{error}");
    // Commits that never become whole do not either.
    let data = "x".repeat(1 << 20);
    let mut n = 0;
    let open = std::iter::from_fn(move || {
        n += 1;
        Some(json!({"kind": "thing", "id": format!("{n}"), "type": "Was", "commit": {"first": 1, "count": 2}, "data": data}).to_string() + "\n")
    });
    let file: String = open.take(100).collect();
    let error = import(&kuma, "g", file).await.unwrap_err();
    assert!(matches!(error.reason, ImportProblem::TooMuchOpen { .. }), "{error}");
    assert!((50..=64).contains(&error.line), "{error}");
    assert!(contents(&kuma).await.is_empty());
    kuma.shutdown().await;
}

#[tokio::test]
async fn progress_grows_and_ends_with_the_report() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let file = an_export(20, 30).await;
    for repeated in [false, true] {
        let mut told: Vec<ImportProgress> = Vec::new();
        let run = kuma.import("f").in_flight(50);
        let report = run.run(file.as_bytes(), |progress| told.push(*progress)).await.unwrap();
        assert!(told.is_sorted_by_key(|p| (p.lines, p.bytes)) && told.is_sorted_by_key(|p| (p.commits, p.events)));
        let last = *told.last().unwrap();
        assert_eq!((last.lines, last.bytes), (report.lines, file.len() as u64));
        assert_eq!(
            (last.commits, last.events, last.repeated),
            (report.commits, report.events, report.repeated_commits)
        );
        assert_eq!(last.repeated, if repeated { 600 } else { 0 });
        assert!(told.len() >= 3);
    }
    kuma.shutdown().await;
}

#[tokio::test]
async fn a_source_has_a_name_that_fits_into_a_key() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    for source in [String::new(), "x".repeat(65)] {
        let error = import(&kuma, &source, line("a", "Was", 1)).await.unwrap_err();
        assert!(matches!(error, ImportError { line: 0, reason: ImportProblem::Source { .. }, .. }), "{error}");
    }
    let longest = format!("{{\"kind\":\"thing\",\"id\":\"{}\",\"type\":\"Was\",\"data\":1}}", "i".repeat(512));
    assert_eq!(import(&kuma, &"x".repeat(64), longest).await.unwrap().events, 1);
    kuma.shutdown().await;
}

/// Blank lines, line ends of another system, and no end at the last line.
#[tokio::test]
async fn files_as_editors_leave_them_are_read() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let file = format!("\n{}\r\n   \r\n\t{}\n\n{}", line("a", "Was", 1), line("a", "Was", 2), line("a", "Was", 3));
    let report = import(&kuma, "f", file).await.unwrap();
    assert_eq!((report.lines, report.events), (6, 3));
    assert_eq!(
        import(&kuma, "empty", "").await.unwrap(),
        ImportReport { entities: Some(0), ..ImportReport::default() }
    );
    kuma.shutdown().await;
}

/// A store that others fill: what was refused as overloaded is sent again, in its order, after what was sent before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_into_a_store_that_is_busy_waits_and_keeps_the_order() {
    let dir = directory();
    let disk = PowerLoss::register(Disk::Honest);
    disk.sync_takes(Duration::from_millis(1));
    let options = Options::new(dir.path()).shards(1).shard_bytes_max(60_000).entity_appends_max(20);
    let options = options.vfs(disk.vfs_name());
    let kuma = Kuma::start(options).await.unwrap();
    let (stop, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    // Each takes nearly all the room there is, again and again.
    let hogs: Vec<_> = (0..2)
        .map(|hog| {
            let (kuma, stop, refused) = (kuma.clone(), stop.clone(), refused.clone());
            tokio::spawn(async move {
                let event = NewEvent::json("Was", &json!({"x": "x".repeat(50_000)})).unwrap();
                while !stop.load(SeqCst) {
                    match kuma.raw("hog", format!("{hog}")).append(event.clone()).await {
                        Ok(_) => {}
                        Err(AppendError::Unavailable(_)) => drop(refused.fetch_add(1, SeqCst)),
                        Err(error) => panic!("{error}"),
                    }
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    let file: String =
        (0..600).map(|n| line(&format!("{}", n / 10), "Was", json!({"n": n, "x": "x".repeat(500)})) + "\n").collect();
    let report = import(&kuma, "f", &file).await.unwrap();
    stop.store(true, SeqCst);
    for hog in hogs {
        hog.await.unwrap();
    }
    assert_eq!((report.events, report.repeated_events), (600, 0));
    assert!(refused.load(SeqCst) > 0, "the store was full now and then");
    let mut stored = contents(&kuma).await;
    stored.retain(|(kind, _), _| kind == "thing");
    assert_eq!(stored, contents_of(&file).await);
    kuma.shutdown().await;
}

/// The future is dropped somewhere; what was submitted goes on or does not; the next run does the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_that_was_dropped_is_finished_by_the_next_one() {
    let file = an_export(5, 60).await;
    let expected = contents_of(&file).await;
    for dropped_at in [1, 40, 200, 299] {
        let dir = directory();
        let kuma = start(dir.path(), 2).await;
        let (dropped, dropping) = tokio::sync::oneshot::channel();
        let mut dropped = Some(dropped);
        let run = kuma.import("f").in_flight(30).run(file.as_bytes(), |progress| {
            if progress.commits >= dropped_at
                && let Some(dropped) = dropped.take()
            {
                dropped.send(()).unwrap();
            }
        });
        tokio::select! {
            biased;
            _ = dropping => {}
            // It may be through before anybody looks.
            _ = run => {}
        }
        kuma.shutdown().await;
        let kuma = start(dir.path(), 2).await;
        let report = import(&kuma, "f", &file).await.unwrap();
        assert!(report.repeated_commits >= dropped_at && report.commits == 300);
        assert_eq!(contents(&kuma).await, expected);
        assert_clean(&kuma).await;
        kuma.shutdown().await;
    }
}

/// The disk fails for a while: the import says so, and goes on when it is run again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_that_the_disk_refused_goes_on_when_it_is_run_again() {
    let file = an_export(5, 60).await;
    let expected = contents_of(&file).await;
    let store = OnDisk::new().await;
    store.fail_in_log_only();
    let mut is_failing = false;
    let run = store.kuma.import("f").in_flight(30).run(file.as_bytes(), |progress| {
        if progress.commits >= 100 && !is_failing {
            is_failing = true;
            store.disk.fail_from_nth(Fault::Write, 1, Errno::Full);
        }
    });
    let error = run.await.unwrap_err();
    assert!(matches!(error.reason, ImportProblem::Store(_)), "{error}");
    assert!(error.report.commits >= 100 && error.line > 0);
    let before = error.report.commits;
    store.disk.heal();
    until("the import goes through", async || match import(&store.kuma, "f", &file).await {
        Ok(report) => {
            assert!(report.repeated_commits >= before && report.commits == 300);
            true
        }
        Err(error) => {
            assert!(matches!(error.reason, ImportProblem::Store(_)), "{error}");
            false
        }
    })
    .await;
    assert_eq!(contents(&store.kuma).await, expected);
    store.kuma.shutdown().await;
}

/// The variable that tells the child of the test below which directory is its own.
const CHILD: &str = "KUMA_IMPORT_CHILD";
const IN_FLIGHT: usize = 64;

/// Not a test: the process that is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the process that is killed by a_killed_import_is_finished_by_the_next_one"]
async fn the_import_that_is_killed() {
    let Some(directory) = std::env::var_os(CHILD) else { return };
    let kuma = start(directory.as_ref(), 2).await;
    let file = tokio::io::BufReader::new(tokio::fs::File::open(Path::new(&directory).join("file")).await.unwrap());
    let run = kuma.import("f").in_flight(IN_FLIGHT).run(file, |progress| println!("commits {}", progress.commits));
    println!("ended {}", run.await.unwrap().commits);
    // It is killed all the same.
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_killed_import_is_finished_by_the_next_one() {
    let file = an_export(20, 200).await;
    let expected = contents_of(&file).await;
    let dir = directory();
    std::fs::write(dir.path().join("file"), &file).unwrap();
    let mut told = 0;
    for kill_at in [1_u64, 500, 501, 1500, 3999] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "import::the_import_that_is_killed", "--ignored", "--nocapture"])
            .env(CHILD, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let Some((_, commits)) = line.split_once("commits ").or_else(|| line.split_once("ended ")) else {
                continue;
            };
            told = commits.parse().unwrap();
            if told >= kill_at || line.contains("ended") {
                break;
            }
        }
        // SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(told >= kill_at);
        let kuma = start(dir.path(), 2).await;
        for (name, events) in contents(&kuma).await {
            assert_eq!(events, expected[&name][..events.len()]);
            let next = expected[&name].get(events.len());
            assert!(next.is_none_or(|(_, _, commit)| commit["first"] == json!(events.len() + 1)), "a whole commit");
        }
        kuma.shutdown().await;
    }
    let kuma = start(dir.path(), 2).await;
    let report = import(&kuma, "f", &file).await.unwrap();
    assert!(report.repeated_commits >= told && report.commits == 4000, "{report:?}, {told} told");
    assert_eq!(contents(&kuma).await, expected);
    assert_clean(&kuma).await;
    kuma.shutdown().await;
}
