//! Promise: what is exported can be read by anybody, checked by anybody, and imported again to the same bytes.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    pin::Pin,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::common::{Ledger, assert_clean, directory, entered, history, start, until};
use futures_util::TryStreamExt;
use kuma_core::{
    Direction, Entity, ExportError, Kuma, Manifest, Metadata, NewEvent, Options, RawHandle, ReadError, RecordedEvent,
    Unavailable, Upcasters, Version,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::AsyncWrite;

/// 2013-01-01 05:15 UTC.
const NEW_YEAR: u64 = 1_357_017_300;

/// A store in which it is always the same time.
async fn start_at_new_year(path: &std::path::Path) -> Kuma {
    let at = UNIX_EPOCH + Duration::from_micros(NEW_YEAR * 1_000_000 + 42);
    Kuma::start(Options::new(path).shards(1).wall_clock(move || at)).await.unwrap()
}

async fn exported(handle: &RawHandle) -> (String, Manifest) {
    let mut file = Vec::new();
    let manifest = handle.export(&mut file).await.unwrap();
    (String::from_utf8(file).unwrap(), manifest)
}

async fn exported_all(kuma: &Kuma) -> (String, Manifest) {
    let mut file = Vec::new();
    let manifest = kuma.export_all(&mut file, |_| {}).await.unwrap();
    (String::from_utf8(file).unwrap(), manifest)
}

/// The text of the field `data` of each line, as it stands there. It is the last one but for `bytes`.
fn data_texts(file: &str) -> Vec<&str> {
    let events = file.lines().filter(|line| !line.starts_with("{\"manifest\""));
    events.map(|line| line.split_once(",\"data\":").unwrap().1.strip_suffix('}').unwrap()).collect()
}

fn lines(file: &str) -> Vec<Value> {
    file.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A store with one entity that has everything: commits of one event and of several, metadata, data of every shape.
async fn fill(order: &RawHandle) {
    let placed = NewEvent::json("Placed", &json!({"total": 5})).unwrap();
    order.append(placed).await.unwrap();
    let headers = vec![("trace".to_owned(), "ab".to_owned()), ("trace".to_owned(), "\"\n\u{0}".to_owned())];
    let metadata = Metadata { correlation: Some("c".into()), causation: Some("ä".into()), headers };
    let paid = ["Paid", "Packed"].map(|name| NewEvent::json(name, &json!({"by": name})).unwrap().schema(3));
    order.append_all(paid).metadata(metadata).idempotency_key("pay").await.unwrap();
    let sent = NewEvent::json("Sent", &Value::Null).unwrap();
    order.append(sent).await.unwrap();
}

/// Files are kept for years, and read by others.
#[tokio::test]
async fn an_export_is_pinned_to_the_byte() {
    let dir = directory();
    let kuma = start_at_new_year(dir.path()).await;
    let order = kuma.raw("order", "{user-7}/ä");
    fill(&order).await;
    let (file, manifest) = exported(&order).await;
    let common = r#""at":"2013-01-01T05:15:00.000042Z""#;
    let metadata =
        r#""metadata":{"correlation":"c","causation":"ä","headers":[["trace","ab"],["trace","\"\n\u0000"]]}"#;
    let expected = [
        format!(
            r#"{{"kind":"order","id":"{{user-7}}/ä","version":1,"commit":{{"first":1,"count":1}},"type":"Placed","schema":1,{common},"data":{{"total":5}}}}"#
        ),
        format!(
            r#"{{"kind":"order","id":"{{user-7}}/ä","version":2,"commit":{{"first":2,"count":2}},"type":"Paid","schema":3,{common},{metadata},"data":{{"by":"Paid"}}}}"#
        ),
        format!(
            r#"{{"kind":"order","id":"{{user-7}}/ä","version":3,"commit":{{"first":2,"count":2}},"type":"Packed","schema":3,{common},{metadata},"data":{{"by":"Packed"}}}}"#
        ),
        format!(
            r#"{{"kind":"order","id":"{{user-7}}/ä","version":4,"commit":{{"first":4,"count":1}},"type":"Sent","schema":1,{common},"data":null}}"#
        ),
        format!(r#"{{"manifest":{{"format":1,"entities":1,"commits":3,"events":4,"sha256":"{}"}}}}"#, manifest.sha256),
        String::new(),
    ];
    assert_eq!(file, expected.join("\n"));
    assert_eq!(
        Manifest { sha256: String::new(), ..manifest },
        Manifest { format: 1, entities: 1, commits: 3, events: 4, sha256: String::new() }
    );
    kuma.shutdown().await;
}

/// With tools that every system has.
#[tokio::test]
async fn the_digest_is_checked_with_head_and_sha256sum() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    fill(&kuma.raw("order", "7")).await;
    let (file, manifest) = exported_all(&kuma).await;
    let path = dir.path().join("export.ndjson");
    std::fs::write(&path, file).unwrap();
    let command = format!("head -n -1 '{}' | sha256sum", path.display());
    let output = Command::new("sh").args(["-c", &command]).output().unwrap();
    let digest = String::from_utf8(output.stdout).unwrap();
    if output.status.success() && !digest.is_empty() {
        assert_eq!(digest.split(' ').next().unwrap(), manifest.sha256);
    } else {
        println!("skipped: no head or sha256sum here");
    }
    kuma.shutdown().await;
}

/// Every value that JSON and MessagePack have in common, in an order that no map would keep.
#[tokio::test]
async fn what_is_exported_and_imported_is_the_same_to_the_byte() {
    let texts = [
        r#"{"zebra":1,"apple":{"y":[[],{},[{"x":null}]],"b":true},"zebra2":false}"#,
        r#"{"u64":18446744073709551615,"i64":-9223372036854775808,"beyond 2^53":[9007199254740993,-9007199254740993]}"#,
        r#"[0.0,-0.0,0.1,1e+308,1.7976931348623157e+308,5e-324,2.2250738585072014e-308,31.245270191439438,10.357019999999999]"#,
        r#"{"text":"Grüße, 世界 🐻 \u0000\u001f\u007f\"\\ \/ \ufeff","":"an empty name","ä\n":"a name with a break"}"#,
        r#""only text""#,
        "7",
        "null",
    ];
    let (one, two, three) = (directory(), directory(), directory());
    let first = start(one.path(), 2).await;
    let file: String = texts.iter().fold(String::new(), |file, text| {
        file + &format!("{{\"kind\":\"thing\",\"id\":\"1\",\"type\":\"Was\",\"data\":{text}}}\n")
    });
    first.import("texts").run(file.as_bytes(), |_| {}).await.unwrap();
    // Numbers as they are, not only as JSON shows them.
    let stored = history(&first, "thing", "1").await;
    let floats: Vec<f64> = rmp_serde::from_slice(&stored[2].data).unwrap();
    let bits = [0.0, -0.0, 0.1, 1e308, f64::MAX, 5e-324, f64::MIN_POSITIVE, 31.245270191439438, 10.357019999999999];
    assert_eq!(floats.iter().map(|f| f.to_bits()).collect::<Vec<_>>(), bits.map(f64::to_bits));
    let (u64_max, i64_min): (u64, i64) = {
        #[derive(Deserialize)]
        struct Numbers {
            u64: u64,
            i64: i64,
        }
        let numbers: Numbers = rmp_serde::from_slice(&stored[1].data).unwrap();
        (numbers.u64, numbers.i64)
    };
    assert_eq!((u64_max, i64_min), (u64::MAX, i64::MIN));

    let (file, _) = exported(&first.raw("thing", "1")).await;
    // serde_json writes the same characters another way.
    let same = |text: &str| text.replace("\\u007f", "\u{7f}").replace("\\/", "/").replace("\\ufeff", "\u{feff}");
    assert_eq!(data_texts(&file), texts.map(same));
    assert!(!file.contains("\"bytes\""));

    let second = start(two.path(), 1).await;
    second.import("first").run(file.as_bytes(), |_| {}).await.unwrap();
    let again = history(&second, "thing", "1").await;
    assert_eq!(contents(&again), contents(&stored));
    let (file_again, _) = exported(&second.raw("thing", "1")).await;
    assert_eq!(data_texts(&file_again), data_texts(&file));
    let third = start(three.path(), 1).await;
    third.import("second").run(file_again.as_bytes(), |_| {}).await.unwrap();
    assert_eq!(contents(&history(&third, "thing", "1").await), contents(&stored));
    for kuma in [first, second, third] {
        assert_clean(&kuma).await;
        kuma.shutdown().await;
    }
}

/// What an export keeps of an event. Time and metadata are those of the import.
fn contents(events: &[RecordedEvent]) -> Vec<(Version, &str, u32, &[u8])> {
    events.iter().map(|event| (event.version, &*event.name, event.schema, &*event.data)).collect()
}

/// Keeps what JSON does not have.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Document {
    pages: Vec<PageEvent>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum PageEvent {
    Added { picture: Binary, scale: f32, weight: f64, by_number: BTreeMap<u32, String> },
    Emptied,
}

/// Bytes as MessagePack has them, not an array of numbers.
#[derive(Clone, Debug, Default, PartialEq)]
struct Binary(Vec<u8>);

impl Serialize for Binary {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Binary {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Binary;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Binary, E> {
                Ok(Binary(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Visitor)
    }
}

impl Entity for Document {
    const KIND: &'static str = "document";
    type Event = PageEvent;

    fn apply(&mut self, event: &PageEvent) {
        self.pages.push(event.clone());
    }
}

#[tokio::test]
async fn what_json_does_not_have_survives_as_bytes() {
    let (one, two) = (directory(), directory());
    let first = start(one.path(), 1).await;
    let document = first.entity::<Document>("d");
    let pages = [
        PageEvent::Added {
            picture: Binary(vec![0, 255, 10]),
            scale: 0.1,
            weight: f64::NEG_INFINITY,
            by_number: [(7, "seven".into())].into(),
        },
        PageEvent::Emptied,
        PageEvent::Added {
            picture: Binary(vec![7; 100_000]),
            scale: f32::MAX,
            weight: -0.0,
            by_number: BTreeMap::new(),
        },
    ];
    document.append_all(pages.clone()).await.unwrap();
    // An integer that is longer than it needs to be, as another writer of MessagePack may have made it.
    let odd = NewEvent::message_pack("Odd", vec![0x81, 0xa1, b'n', 0xcd, 0, 1]);
    first.raw("thing", "odd").append(odd).await.unwrap();
    let (file, manifest) = exported_all(&first).await;
    let second = start(two.path(), 1).await;
    second.register::<Document>().unwrap();
    let report = second.import("first").run(file.as_bytes(), |_| {}).await.unwrap();
    assert_eq!((report.commits, report.events, report.manifest), (2, 4, Some(manifest)));
    assert_eq!(second.entity::<Document>("d").read().await.unwrap().pages, pages);
    for (kind, id) in [("document", "d"), ("thing", "odd")] {
        assert_eq!(contents(&history(&second, kind, id).await), contents(&history(&first, kind, id).await));
    }
    let lines = lines(&file);
    assert!(lines[0].get("bytes").is_some() && lines[0].get("data").is_none(), "keys that are numbers");
    assert!(lines[1].get("bytes").is_none());
    assert_eq!((&lines[3]["data"], &lines[3]["bytes"]), (&json!({"n": 1}), &json!("gaFuzQAB")));
    for kuma in [first, second] {
        kuma.shutdown().await;
    }
}

#[tokio::test]
async fn commits_keep_their_boundaries_and_versions() {
    let (one, two) = (directory(), directory());
    let (first, second) = (start(one.path(), 2).await, start(two.path(), 3).await);
    for id in 0..5_u64 {
        let ledger = first.entity::<Ledger>(format!("{id}"));
        for commit in 1..=7 {
            ledger.append_all((0..commit).map(|event| entered(100 * commit + event + id))).await.unwrap();
        }
    }
    let (file, manifest) = exported_all(&first).await;
    assert_eq!((manifest.entities, manifest.commits, manifest.events), (5, 35, 5 * 28));
    second.register::<Ledger>().unwrap();
    second.import("first").run(file.as_bytes(), |_| {}).await.unwrap();
    let verified = second.verify(|_| {}).await.unwrap();
    assert_eq!((verified.totals(), verified.is_clean()), ((5, 35, 5 * 28), true));
    for id in 0..5 {
        let (a, b) = (first.raw("ledger", format!("{id}")), second.raw("ledger", format!("{id}")));
        assert_eq!(a.read().await.unwrap(), b.read().await.unwrap());
        let spans = |file: &str| {
            lines(file).iter().map(|line| (line["version"].clone(), line["commit"].clone())).collect::<Vec<_>>()
        };
        assert_eq!(spans(&exported(&a).await.0), spans(&exported(&b).await.0));
    }
    for kuma in [first, second] {
        kuma.shutdown().await;
    }
}

/// The time of an event is that of the first store, however often it moves.
#[tokio::test]
async fn metadata_and_the_original_time_survive() {
    let (one, two, three) = (directory(), directory(), directory());
    let first = start_at_new_year(one.path()).await;
    let order = first.raw("order", "7");
    fill(&order).await;
    let before = history(&first, "order", "7").await;
    let second = start(two.path(), 1).await;
    second.import("first").run(exported(&order).await.0.as_bytes(), |_| {}).await.unwrap();
    let third = start(three.path(), 1).await;
    third.import("second").run(exported_all(&second).await.0.as_bytes(), |_| {}).await.unwrap();
    let at = ("at".to_owned(), "2013-01-01T05:15:00.000042Z".to_owned());
    for kuma in [second, third] {
        for (now, before) in history(&kuma, "order", "7").await.iter().zip(&before) {
            let mut expected = before.metadata.clone().unwrap_or_default();
            expected.headers.push(at.clone());
            assert_eq!(now.metadata, Some(expected));
            assert!(now.at > UNIX_EPOCH + Duration::from_secs(NEW_YEAR) && now.at <= SystemTime::now());
        }
        kuma.shutdown().await;
    }
    first.shutdown().await;
}

/// An entity whose events were called otherwise once.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Counter {
    total: u64,
}

#[derive(Serialize, Deserialize)]
enum CounterEvent {
    Counted { by: u64 },
}

impl Entity for Counter {
    const KIND: &'static str = "counter";
    const SCHEMA: u32 = 2;
    type Event = CounterEvent;

    fn apply(&mut self, event: &CounterEvent) {
        let CounterEvent::Counted { by } = event;
        self.total += by;
    }

    fn upcasters() -> Upcasters {
        Upcasters::new().json(1, "Increased", |data| json!({"by": data["n"]})).rename(1, "Increased", "Counted")
    }
}

#[tokio::test]
async fn events_are_exported_in_the_shape_of_the_current_schema() {
    let (one, two) = (directory(), directory());
    let first = start(one.path(), 1).await;
    let old = NewEvent::json("Increased", &json!({"n": 4})).unwrap();
    first.raw("counter", "c").append(old).await.unwrap();
    let (untyped, _) = exported_all(&first).await;
    assert_eq!((&lines(&untyped)[0]["type"], &lines(&untyped)[0]["schema"]), (&json!("Increased"), &json!(1)));
    first.shutdown().await;
    let first = start(one.path(), 1).await;
    first.register::<Counter>().unwrap();
    let (typed, _) = exported_all(&first).await;
    let line = &lines(&typed)[0];
    assert_eq!((&line["type"], &line["schema"], &line["data"]), (&json!("Counted"), &json!(2), &json!({"by": 4})));
    // Either is imported, and read by the current code.
    let second = start(two.path(), 1).await;
    second.register::<Counter>().unwrap();
    second.import("typed").run(typed.as_bytes(), |_| {}).await.unwrap();
    let other = untyped
        .replace("\"id\":\"c\"", "\"id\":\"d\"")
        .lines()
        .next()
        .unwrap()
        .replace(",\"commit\":{\"first\":1,\"count\":1}", "");
    second.import("untyped").run(other.as_bytes(), |_| {}).await.unwrap();
    for id in ["c", "d"] {
        assert_eq!(second.entity::<Counter>(id).read().await.unwrap().total, 4);
    }
    for kuma in [first, second] {
        kuma.shutdown().await;
    }
}

/// A backup job knows nothing of Rust types; what it does must not keep the service from using them in the same process.
#[tokio::test]
async fn an_export_of_all_has_every_entity_and_leaves_kinds_free() {
    let dir = directory();
    let kuma = start(dir.path(), 3).await;
    for id in 0..600 {
        kuma.entity::<Ledger>(format!("{id}")).append(entered(id)).await.unwrap();
    }
    kuma.shutdown().await;
    let kuma = start(dir.path(), 3).await;
    let (mut file, mut told) = (Vec::new(), Vec::new());
    let manifest = kuma.export_all(&mut file, |progress| told.push(*progress)).await.unwrap();
    assert_eq!((manifest.entities, manifest.commits, manifest.events), (600, 600, 600));
    assert_eq!(told.len(), 600);
    assert!(told.is_sorted_by_key(|progress| (progress.entities, progress.events, progress.bytes)));
    let file = String::from_utf8(file).unwrap();
    let mut ids: Vec<u64> =
        lines(&file).iter().filter_map(|line| line["id"].as_str()).map(|id| id.parse().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..600).collect::<Vec<_>>());
    assert_eq!(kuma.stats().live_entities(), 0, "an export brings nothing into memory");
    assert_eq!(kuma.entity::<Ledger>("5").read().await.unwrap().entries, [5]);
    kuma.shutdown().await;
}

#[tokio::test]
async fn an_export_of_nothing_is_a_manifest_alone() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    // SHA-256 of nothing.
    let expected = "{\"manifest\":{\"format\":1,\"entities\":0,\"commits\":0,\"events\":0,\"sha256\":\"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"}}\n";
    assert_eq!(exported_all(&kuma).await.0, expected);
    assert_eq!(exported(&kuma.raw("order", "never written")).await.0, expected);
    let report = kuma.import("nothing").run(expected.as_bytes(), |_| {}).await.unwrap();
    assert_eq!((report.lines, report.events, report.truncated), (1, 0, false));
    kuma.shutdown().await;
}

/// A writer that takes so many bytes and no more.
struct Full(usize);

impl AsyncWrite for Full {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let taken = bytes.len().min(self.0);
        self.0 -= taken;
        Poll::Ready(if taken == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(taken) })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_writer_that_fails_is_told_apart_from_a_store_that_cannot_be_read() {
    let dir = directory();
    let kuma = start(dir.path(), 1).await;
    let ledger = kuma.entity::<Ledger>("7");
    ledger.append(entered(1)).await.unwrap();
    let error = ledger.export(&mut Full(100)).await.unwrap_err();
    assert!(matches!(&error, ExportError::Write(cause) if cause.kind() == io::ErrorKind::StorageFull), "{error}");
    kuma.shutdown().await;
    let error = ledger.export(&mut Full(0)).await.unwrap_err();
    assert!(matches!(error, ExportError::Read(ReadError::Unavailable(Unavailable::ShuttingDown))), "{error}");
}

/// A file that silently lacks what could not be read would be taken for a whole one.
#[tokio::test]
async fn damage_ends_the_export_and_is_named() {
    for (statement, what) in [
        ("UPDATE log SET body = zeroblob(length(body)) WHERE position = 7", "commit"),
        ("UPDATE entity SET sealed_id = zeroblob(length(sealed_id)) WHERE eid = 3", "row of the entity"),
    ] {
        let dir = directory();
        let kuma = start(dir.path(), 1).await;
        let mut hashes = Vec::new();
        for id in 0..5 {
            let ledger = kuma.entity::<Ledger>(format!("{id}"));
            ledger.append(entered(1)).await.unwrap();
            ledger.append(entered(2)).await.unwrap();
            hashes.push(ledger.raw().hash().unwrap());
        }
        kuma.shutdown().await;
        let shard = rusqlite::Connection::open(dir.path().join("shard-000.db")).unwrap();
        assert_eq!(shard.execute(statement, ()).unwrap(), 1, "{what}");
        drop(shard);
        let kuma = Kuma::start(Options::new(dir.path()).scrub_bytes_per_second(0)).await.unwrap();
        let mut file = Vec::new();
        let error = kuma.export_all(&mut file, |_| {}).await.unwrap_err();
        match (&error, what) {
            (ExportError::Read(ReadError::Unavailable(Unavailable::Unreadable { entity, .. })), "commit") => {
                assert!(hashes.contains(entity) && error.to_string().contains(&entity.to_string()));
            }
            (ExportError::Damaged { shard: 0, number: 3, .. }, "row of the entity") => {}
            _ => panic!("{what}: {error}"),
        }
        assert!(!String::from_utf8(file).unwrap().contains("manifest"), "{what}");
        kuma.shutdown().await;
    }
}

/// Every commit of three events is in the export whole or not at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entity_that_is_written_to_meanwhile_is_exported_in_whole_commits() {
    let (one, two) = (directory(), directory());
    let (kuma, other) = (start(one.path(), 1).await, start(two.path(), 1).await);
    let (ledger, stop) = (kuma.entity::<Ledger>("busy"), Arc::new(AtomicBool::new(false)));
    let writer = tokio::spawn({
        let (ledger, stop) = (ledger.clone(), stop.clone());
        async move {
            let mut number = 0;
            while !stop.load(SeqCst) {
                ledger.append_all((0..3).map(|event| entered(number + event))).await.unwrap();
                number += 3;
            }
        }
    });
    other.register::<Ledger>().unwrap();
    let mut events = 0;
    until("exports grow", async || {
        let (file, manifest) = exported(ledger.raw()).await;
        assert!(manifest.events >= events && manifest.events == 3 * manifest.commits);
        // Each export continues the one before.
        let report = other.import("exports of busy").run(file.as_bytes(), |_| {}).await.unwrap();
        assert_eq!((report.events, report.repeated_events), (manifest.events, events));
        events = manifest.events;
        events > 300
    })
    .await;
    stop.store(true, SeqCst);
    writer.await.unwrap();
    for kuma in [kuma, other] {
        assert_clean(&kuma).await;
        kuma.shutdown().await;
    }
}

/// The whole year, if it is there: `KUMA_FLIGHTS=path/to/flights-2013.ndjson.gz`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs KUMA_FLIGHTS, the file of a year of flights"]
async fn a_year_of_flights_comes_out_as_it_went_in() {
    let path = PathBuf::from(std::env::var_os("KUMA_FLIGHTS").expect("KUMA_FLIGHTS is the path of the file"));
    let input = match path.extension().is_some_and(|extension| extension == "gz") {
        true => Command::new("gzip").arg("-dc").arg(&path).output().unwrap().stdout,
        false => std::fs::read(&path).unwrap(),
    };
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let kuma = Kuma::start(Options::new(one.path())).await.unwrap();
    let report = kuma.import("flights").run(&input[..], |_| {}).await.unwrap();
    assert_eq!((report.events, report.entities, report.repeated_events), (360_379, Some(4_046), 0));

    let mut by_entity: BTreeMap<(String, String), Vec<&str>> = BTreeMap::new();
    let input = String::from_utf8(input).unwrap();
    for line in input.lines() {
        #[derive(Deserialize)]
        struct Name {
            kind: String,
            id: String,
        }
        let Name { kind, id } = serde_json::from_str(line).unwrap();
        by_entity
            .entry((kind, id))
            .or_default()
            .push(line.split_once(",\"data\":").unwrap().1.strip_suffix('}').unwrap());
    }
    assert_eq!(by_entity.len(), 4_046);
    for ((kind, id), texts) in &by_entity {
        let (file, _) = exported(&kuma.raw(kind, id)).await;
        assert_eq!(&data_texts(&file), texts, "{kind}/{id}");
    }
    let (file, manifest) = exported_all(&kuma).await;
    let other = Kuma::start(Options::new(two.path())).await.unwrap();
    let report = other.import("export").run(file.as_bytes(), |_| {}).await.unwrap();
    assert_eq!(report.manifest, Some(manifest));
    for (kind, id) in by_entity.keys().filter(|(_, id)| id.as_str() == "N14228" || id.len() == 3) {
        let [a, b] =
            [&kuma, &other].map(|kuma| kuma.raw(kind, id).history(.., Direction::Forward).try_collect::<Vec<_>>());
        assert_eq!(contents(&a.await.unwrap()), contents(&b.await.unwrap()), "{kind}/{id}");
    }
    for kuma in [kuma, other] {
        assert_clean(&kuma).await;
        kuma.shutdown().await;
    }
}
