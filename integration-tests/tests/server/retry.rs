//! What is sent again with its idempotency key happens once, wherever the connection was cut and whenever the server died.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use crate::common::{directory, until};
use crate::http::{Answer, Client, JSON, LINES, Node, NodeProcess, PACK, Reader, connect, soon};
use crate::proxy::Proxy;
use integration_tests::seed;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// How long anybody tries to get through.
const PATIENCE: Duration = Duration::from_secs(60);
/// Entities that all clients append to.
const ENTITIES: u64 = 4;
/// A client's appends end up to so many bytes behind the beginning of a connection.
const REQUEST_BYTES: u64 = 4 << 10;
const STREAM_BYTES: u64 = 32 << 10;

/// An append that its client was told of.
#[derive(Clone, Debug)]
struct Told {
    entity: String,
    client: u64,
    n: u64,
    events: u64,
    version: u64,
}

impl Told {
    fn key(&self) -> String {
        key(self.client, self.n)
    }
}

fn key(client: u64, n: u64) -> String {
    format!("{client}-{n}")
}

fn events(client: u64, n: u64, count: u64) -> Value {
    (0..count).map(|part| json!({"type": "Noted", "data": {"client": client, "n": n, "part": part}})).collect()
}

fn path(entity: &str) -> String {
    format!("/v1/entities/ledger/{entity}/events")
}

/// A moment before the next try.
async fn pause() {
    tokio::time::sleep(Duration::from_millis(3)).await;
}

/// Sends it until an answer comes that is whole and no "try again".
async fn insist(client: &mut Client, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let since = Instant::now();
    loop {
        match soon("an answer", client.try_send(method, path, headers, body)).await {
            Ok(answer) if answer.status >= 500 => {
                assert_eq!(answer.problem().body["retry_safe"], true, "{}", answer.text());
            }
            Ok(answer) => return answer,
            Err(_) => {}
        }
        assert!(since.elapsed() < PATIENCE, "{method} {path} does not get through");
        pause().await;
    }
}

async fn version(client: &mut Client, entity: &str) -> u64 {
    let answer = insist(client, "GET", &format!("/v1/entities/ledger/{entity}"), &[], b"").await;
    match answer.status {
        404 => 0,
        _ => answer.json()["version"].as_u64().unwrap(),
    }
}

async fn history(address: SocketAddr, entity: &str) -> Vec<Value> {
    let lines = ("Accept", "application/x-ndjson");
    let answer = Client::new(address).send("GET", &path(entity), &[lines], b"").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// How an append is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Single,
    Batch,
    Pack,
    IfMatch,
}

/// Appends one after the other, and tries each until it was told its outcome. Now and then it asks for an outcome once more.
async fn append_each(proxy: SocketAddr, number: u64, appends: u64, seed: u64, acked: Arc<AtomicU64>) -> Vec<Told> {
    let mut random = StdRng::seed_from_u64(seed ^ (number << 32));
    let style = [Style::Single, Style::Batch, Style::Pack, Style::IfMatch][(number % 4) as usize];
    let (mut client, mut all) = (Client::new(proxy), Vec::new());
    for n in 0..appends {
        let entity = format!("e-{}", random.random_range(0..ENTITIES));
        let count = if style == Style::Single { 1 } else { random.random_range(1..4) };
        let events = events(number, n, count);
        let (content_type, body) = match style {
            Style::Single => (JSON, events[0].to_string().into_bytes()),
            Style::Pack => (PACK, rmp_serde::to_vec_named(&json!({ "events": events })).unwrap()),
            _ => (JSON, json!({ "events": events }).to_string().into_bytes()),
        };
        let (key, path) = (key(number, n), path(&entity));
        let mut conflict = 0;
        let (told, expected) = loop {
            let expected = match style {
                Style::IfMatch => Some(format!("\"{}\"", version(&mut client, &entity).await)),
                _ => None,
            };
            let mut headers = vec![content_type, ("Idempotency-Key", key.as_str())];
            headers.extend(expected.as_deref().map(|version| ("If-Match", version)));
            let answer = insist(&mut client, "POST", &path, &headers, &body).await;
            if answer.status == 201 {
                break (answer.json(), expected);
            }
            assert_eq!((style, answer.refusal().1.as_str()), (Style::IfMatch, "wrong_version"));
            conflict = answer.json()["actual_version"].as_u64().unwrap();
        };
        let version = told["version"].as_u64().unwrap();
        // A conflict means that none of the tries before it had landed.
        assert!(version >= conflict + count, "{key}: {told} after a conflict at {conflict}");
        acked.fetch_add(1, SeqCst);
        if random.random_range(0..3) == 0 {
            // The version that it expected is stale by now.
            let mut headers = vec![content_type, ("Idempotency-Key", key.as_str())];
            headers.extend(expected.as_deref().map(|version| ("If-Match", version)));
            let again = insist(&mut client, "POST", &path, &headers, &body).await;
            assert_eq!(again.json(), json!({"version": version, "repeated": true}), "{key}");
        }
        all.push(Told { entity, client: number, n, events: count, version });
    }
    all
}

/// Values that come one after the other: lines, or MessagePack.
struct Outcomes {
    reader: Reader,
    is_packed: bool,
    rest: Vec<u8>,
}

impl Outcomes {
    /// None at the end of the stream, or where it was cut.
    async fn next(&mut self) -> Option<Value> {
        if !self.is_packed {
            let line = self.reader.line().await.ok()??;
            return Some(serde_json::from_str(&line).unwrap());
        }
        loop {
            let mut at = std::io::Cursor::new(&self.rest);
            if let Ok(value) = rmp_serde::from_read::<_, Value>(&mut at) {
                let end = at.position() as usize;
                self.rest.drain(..end);
                return Some(value);
            }
            self.rest.extend(self.reader.piece().await.ok()??);
        }
    }
}

struct Message {
    told: Told,
    bytes: Vec<u8>,
}

/// What a client streams, in its order.
fn messages(number: u64, is_packed: bool, count: u64, random: &mut StdRng) -> Vec<Message> {
    let message = |n| {
        let (entity, count) = (format!("e-{}", random.random_range(0..ENTITIES)), random.random_range(1..4));
        let told = Told { entity, client: number, n, events: count, version: 0 };
        let append =
            json!({"kind": "ledger", "id": told.entity, "key": told.key(), "events": events(number, n, count)});
        let bytes = match is_packed {
            true => rmp_serde::to_vec_named(&append).unwrap(),
            false => format!("{append}\n").into_bytes(),
        };
        Message { told, bytes }
    };
    (0..count).map(message).collect()
}

/// Sends the messages over one connection, and returns the outcomes that came.
async fn stream(address: SocketAddr, is_packed: bool, messages: &[Message], random: &mut StdRng) -> Vec<Value> {
    let Ok((mut writer, mut reader)) = connect(address).await else { return Vec::new() };
    let body: Vec<u8> = messages.iter().flat_map(|message| message.bytes.clone()).collect();
    let piece = random.random_range(1..4096);
    let sending = tokio::spawn(async move {
        let content_type = if is_packed { PACK } else { LINES };
        let sent = async {
            writer.begin("POST", "/v1/append", &[content_type]).await?;
            for piece in body.chunks(piece) {
                writer.chunk(piece).await?;
            }
            writer.end().await
        };
        let _ = sent.await;
        writer
    });
    let mut outcomes = Vec::new();
    if let Ok(head) = reader.head().await {
        if head.status == 503 {
            // Streams that were cut have their place until the server has noticed.
            sending.abort();
            return outcomes;
        }
        assert_eq!(head.status, 200);
        let mut coming = Outcomes { reader, is_packed, rest: Vec::new() };
        while let Some(outcome) = coming.next().await {
            outcomes.push(outcome);
            assert_eq!(outcomes.last().unwrap()["n"], outcomes.len(), "outcomes come in the order of the messages");
        }
    }
    sending.abort();
    outcomes
}

/// Whether so many streams can be open at once.
async fn has_places(address: SocketAddr, streams: usize) -> bool {
    let mut open = Vec::new();
    for _ in 0..streams {
        let (mut writer, mut reader) = connect(address).await.unwrap();
        writer.begin("POST", "/v1/append", &[LINES]).await.unwrap();
        // The head of an answer comes with its first outcome.
        writer.chunk(b"{}\n").await.unwrap();
        if reader.head().await.unwrap().status != 200 {
            return false;
        }
        open.push((writer, reader));
    }
    true
}

/// Streams appends, and streams those again whose outcome did not come.
async fn append_streamed(
    proxy: SocketAddr,
    number: u64,
    is_packed: bool,
    appends: u64,
    seed: u64,
    acked: Arc<AtomicU64>,
) -> Vec<Message> {
    let mut random = StdRng::seed_from_u64(seed ^ (number << 32));
    let mut messages = messages(number, is_packed, appends, &mut random);
    let (mut told, since) = (0, Instant::now());
    while told < messages.len() {
        let outcomes = stream(proxy, is_packed, &messages[told..], &mut random).await;
        for outcome in outcomes {
            messages[told].told.version = outcome["version"].as_u64().unwrap_or_else(|| panic!("{outcome}"));
            told += 1;
            acked.fetch_add(1, SeqCst);
        }
        assert!(since.elapsed() < PATIENCE, "client {number} does not get through");
        pause().await;
    }
    messages
}

/// Each event is there once, where it was told to be, and those of a client are in its order.
async fn assert_once(address: SocketAddr, told: &[Told]) {
    let mut by_entity: BTreeMap<&str, Vec<&Told>> = BTreeMap::new();
    for told in told {
        by_entity.entry(&told.entity).or_default().push(told);
    }
    for (entity, told) in by_entity {
        let history = history(address, entity).await;
        let versions: Vec<u64> = history.iter().map(|event| event["version"].as_u64().unwrap()).collect();
        assert!(versions.iter().copied().eq(1..=versions.len() as u64), "{entity}: {versions:?}");
        for told in &told {
            let first = (told.version - told.events) as usize;
            let found: Vec<&Value> = history[first..told.version as usize].iter().map(|event| &event["data"]).collect();
            let parts = |part| json!({"client": told.client, "n": told.n, "part": part});
            let expected: Vec<Value> = (0..told.events).map(parts).collect();
            assert!(found.into_iter().eq(&expected), "{told:?}");
        }
        // What was told is there; so nothing else is, and nothing twice, if there are as many.
        assert_eq!(history.len() as u64, told.iter().map(|told| told.events).sum::<u64>(), "{entity}");
        let mut last = BTreeMap::new();
        for event in &history {
            let place = (event["data"]["n"].as_u64(), event["data"]["part"].as_u64());
            let before = last.insert(event["data"]["client"].as_u64(), place);
            assert!(before.is_none_or(|before| before < place), "{entity}: {event} is behind {before:?}");
        }
    }
}

/// Each outcome is told as it was told before, to whoever asks for it and to whoever sends the append again.
async fn assert_told_again(address: SocketAddr, told: &[Told]) {
    let mut client = Client::new(address);
    for told in told {
        let (key, outcome) = (told.key(), format!("/v1/entities/ledger/{}/outcome", told.entity));
        let found = client.send("GET", &outcome, &[("Idempotency-Key", &key)], b"").await.json();
        assert_eq!(found["version"], told.version, "{told:?}: {found}");
        // With a version that was never true at the same time.
        let headers = [JSON, ("Idempotency-Key", key.as_str()), ("If-Match", "\"1000000\"")];
        let body = json!({"events": events(told.client, told.n, told.events)}).to_string();
        let again = client.send("POST", &path(&told.entity), &headers, body.as_bytes()).await;
        assert_eq!(again.json(), json!({"version": told.version, "repeated": true}), "{told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_append_that_is_sent_again_until_it_is_answered_happens_once() {
    let seed = seed("an_append_that_is_sent_again_until_it_is_answered_happens_once");
    let node = Node::start(|_| {}).await;
    let proxy = Proxy::start(node.address(), seed, REQUEST_BYTES).await;
    let mut clients = JoinSet::new();
    for number in 0..16 {
        clients.spawn(append_each(proxy.address, number, 25, seed, Arc::default()));
    }
    let told = clients.join_all().await.concat();
    let cuts = proxy.cuts();
    println!("{} connections, cut: {cuts:?}", proxy.connections());
    assert!(cuts.iter().all(|cuts| *cuts > 0), "{cuts:?}");
    assert_once(node.address(), &told).await;
    assert_told_again(node.address(), &told).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_cut_and_sent_again_appends_each_message_once_and_in_order() {
    let seed = seed("a_stream_that_is_cut_and_sent_again_appends_each_message_once_and_in_order");
    let mut random = StdRng::seed_from_u64(seed);
    let node = Node::start(|config| config.streams_max = 16).await;
    let proxy = Proxy::start(node.address(), seed, STREAM_BYTES / 4).await;
    let mut clients = JoinSet::new();
    for number in 0..8 {
        let streamed = append_streamed(proxy.address, number, number % 2 == 1, 300, seed, Arc::default());
        clients.spawn(async move { (number % 2 == 1, streamed.await) });
    }
    let streamed = clients.join_all().await;
    let cuts = proxy.cuts();
    println!("{} connections, cut: {cuts:?}", proxy.connections());
    assert!(cuts.iter().sum::<u64>() > 0, "{cuts:?}");
    let told: Vec<Told> =
        streamed.iter().flat_map(|(_, sent)| sent.iter().map(|message| message.told.clone())).collect();
    assert_once(node.address(), &told).await;
    until("those that were cut have given their places back", async || has_places(node.address(), 16).await).await;
    // Those of the last look as well.
    until("a place is free", async || has_places(node.address(), 1).await).await;
    // All of it once more, in one go.
    for (is_packed, sent) in &streamed {
        let outcomes = stream(node.address(), *is_packed, sent, &mut random).await;
        let expected =
            sent.iter().zip(1..).map(|(message, n)| json!({"n": n, "version": message.told.version, "repeated": true}));
        assert!(outcomes.into_iter().eq(expected));
    }
    assert_once(node.address(), &told).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_has_done_once_what_is_sent_again() {
    let seed = seed("a_server_that_is_killed_has_done_once_what_is_sent_again");
    let mut node = NodeProcess::start(&[]).await;
    let proxy = Proxy::start(node.address, seed, STREAM_BYTES).await;
    let acked = Arc::new(AtomicU64::new(0));
    let (mut each, mut streamed) = (JoinSet::new(), JoinSet::new());
    for number in 0..8 {
        each.spawn(append_each(proxy.address, number, 30, seed, acked.clone()));
    }
    for number in 8..12 {
        streamed.spawn(append_streamed(proxy.address, number, number % 2 == 1, 200, seed, acked.clone()));
    }
    let all = 8 * 30 + 4 * 200;
    for quarter in 1..=3 {
        until("more was acknowledged", async || acked.load(SeqCst) >= all * quarter / 4).await;
        node.kill();
        node.start_again().await;
        proxy.point_to(node.address);
    }
    let mut told = each.join_all().await.concat();
    told.extend(streamed.join_all().await.into_iter().flatten().map(|message| message.told));
    println!("{} connections, cut: {:?}", proxy.connections(), proxy.cuts());
    assert_once(node.address, &told).await;
    assert_told_again(node.address, &told).await;
    assert_once(node.address, &told).await;
}

/// Appends, erases and begins anew, each until it is answered.
async fn live_and_die(proxy: SocketAddr, number: u64) {
    let mut client = Client::new(proxy);
    let path = format!("/v1/entities/ledger/mortal-{number}");
    let (of_events, recreate, erase) =
        (format!("{path}/events"), format!("{path}/recreate"), format!("{path}?reason=request+{number}"));
    let (mut receipts, reason) = (BTreeSet::new(), br#"{"reason": "came back"}"#);
    for life in 1..=3 {
        for n in 0..3 {
            // Keys belong to a life: they are the same in each.
            let (key, body) = (key(number, n), json!({"events": events(number, life * 10 + n, 2)}).to_string());
            let headers = [JSON, ("Idempotency-Key", key.as_str())];
            let answer = insist(&mut client, "POST", &of_events, &headers, body.as_bytes()).await;
            assert_eq!((answer.status, &answer.json()["version"]), (201, &json!(2 * (n + 1))), "{}", answer.text());
        }
        let answer = insist(&mut client, "GET", &of_events, &[], b"").await;
        let found = answer.json()["events"].as_array().unwrap().clone();
        let data: Vec<&Value> = found.iter().map(|event| &event["data"]).collect();
        let expected =
            (0..3).flat_map(|n| (0..2).map(move |part| json!({"client": number, "n": life * 10 + n, "part": part})));
        assert!(data.into_iter().eq(&expected.collect::<Vec<_>>()), "life {life}: {}", answer.text());
        let mut receipt = None;
        for _ in 0..2 {
            let answer = insist(&mut client, "DELETE", &erase, &[], b"").await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            let id = answer.json()["receipt"]["id"].as_str().unwrap().to_owned();
            assert_eq!(*receipt.get_or_insert(id.clone()), id, "the same receipt");
        }
        assert!(receipts.insert(receipt), "each life has a receipt of its own");
        let answer = insist(&mut client, "GET", &path, &[], b"").await;
        assert_eq!(answer.refusal(), (410, "erased".to_owned()));
        let answer = insist(&mut client, "POST", &recreate, &[JSON], reason).await;
        match answer.status {
            200 => assert_eq!(answer.json(), json!({"life": life + 1, "version": 0})),
            // It was done, and the answer was lost.
            _ => assert_eq!(answer.refusal(), (409, "not_erased".to_owned())),
        }
        let answer = insist(&mut client, "GET", &path, &[], b"").await;
        assert_eq!(answer.refusal(), (404, "never_written".to_owned()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_and_a_new_life_that_are_sent_again_happen_once() {
    let seed = seed("an_erasure_and_a_new_life_that_are_sent_again_happen_once");
    let node = Node::start(|_| {}).await;
    let proxy = Proxy::start(node.address(), seed, REQUEST_BYTES).await;
    let mut clients = JoinSet::new();
    for number in 0..8 {
        clients.spawn(live_and_die(proxy.address, number));
    }
    clients.join_all().await;
    println!("{} connections, cut: {:?}", proxy.connections(), proxy.cuts());
    let audit = node.client().get("/v1/audit?limit=1000").await.json();
    let count = |name: &str| audit["events"].as_array().unwrap().iter().filter(|event| event["type"] == name).count();
    assert_eq!(count("ErasureRequested"), 8 * 3, "{audit}");
    node.stop().await;
}

/// Imports lines through the command line, while connections are cut and the server dies.
#[tokio::test(flavor = "multi_thread")]
async fn an_import_by_the_command_line_appends_each_line_once_through_cuts_and_the_death_of_the_server() {
    const LINES_COUNT: u64 = 20_000;
    let seed = seed("an_import_by_the_command_line_appends_each_line_once_through_cuts_and_the_death_of_the_server");
    let (mut node, dir) = (NodeProcess::start(&[]).await, directory());
    let proxy = Proxy::cutting(node.address, seed, 256 << 10, 3).await;
    let file = dir.path().join("lines.ndjson");
    let line = |n| json!({"kind": "ledger", "id": format!("e-{}", n % ENTITIES), "type": "Noted", "data": {"n": n}});
    let text: String = (0..LINES_COUNT).map(|n| format!("{}\n", line(n))).collect();
    std::fs::write(&file, text).unwrap();
    let import = || {
        let child = Command::new(env!("CARGO_BIN_EXE_cli_child"))
            .args(["--json", "--url", &format!("http://{}", proxy.address), "import"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        tokio::task::spawn_blocking(move || child.wait_with_output().unwrap())
    };
    let importing = import();
    // Once when it comes for the first time, and once when something of it is there.
    until("the import begins", async || proxy.connections() > 0).await;
    node.kill();
    node.start_again().await;
    proxy.point_to(node.address);
    until("something is imported", async || version(&mut Client::new(node.address), "e-0").await > 0).await;
    node.kill();
    node.start_again().await;
    proxy.point_to(node.address);
    let output = importing.await.unwrap();
    println!(
        "{}\n{} connections, cut: {:?}",
        String::from_utf8_lossy(&output.stderr),
        proxy.connections(),
        proxy.cuts()
    );
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["lines"], &report["events"]), (&json!(LINES_COUNT), &json!(LINES_COUNT)), "{report}");
    for entity in 0..ENTITIES {
        let history = history(node.address, &format!("e-{entity}")).await;
        let found =
            history.iter().map(|event| (event["version"].as_u64().unwrap(), event["data"]["n"].as_u64().unwrap()));
        assert!(found.eq((1..).zip((entity..LINES_COUNT).step_by(ENTITIES as usize))), "e-{entity}");
    }
    // Whole, and once more.
    let output = import().await.unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["events"], &report["new_events"]), (&json!(LINES_COUNT), &json!(0)), "{report}");
}
