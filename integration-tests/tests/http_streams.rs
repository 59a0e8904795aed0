//! Streams of appends, and subscriptions: what is answered, what is told, and in which order, however they end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/http.rs"]
mod http;
#[path = "common/proxy.rs"]
mod proxy;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use common::until;
use http::{Client, JSON, LINES, Node, PACK, Reader, SECRET, Writer, check_problem, connect, soon};
use integration_tests::seed;
use proxy::Proxy;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

fn message(id: &str, key: u64) -> Value {
    json!({"kind": "account", "id": id, "key": format!("k{key}"), "events": [{"type": "Noted", "data": {"n": key}}]})
}

async fn open(address: SocketAddr, content_type: (&str, &str)) -> (Writer, Reader) {
    let (mut writer, reader) = connect(address).await.unwrap();
    writer.begin("POST", "/v1/append", &[content_type]).await.unwrap();
    (writer, reader)
}

async fn outcomes(reader: &mut Reader) -> Vec<Value> {
    let mut outcomes = Vec::new();
    while let Some(line) = soon("an outcome", reader.line()).await.unwrap() {
        outcomes.push(serde_json::from_str(&line).unwrap());
    }
    outcomes
}

#[tokio::test]
async fn thousands_are_on_their_way_at_once_and_are_answered_in_their_order() {
    const MESSAGES: u64 = 4000;
    let node = Node::start(|_| {}).await;
    let (mut writer, mut reader) = open(node.address(), LINES).await;
    // Nothing is read until everything is sent.
    let lines: String = (0..MESSAGES).map(|n| message(&format!("a{}", n % 10), n).to_string() + "\n").collect();
    for chunk in lines.as_bytes().chunks(10_000) {
        soon("room for more", writer.chunk(chunk)).await.unwrap();
    }
    writer.end().await.unwrap();
    assert_eq!(reader.head().await.unwrap().status, 200);
    let outcomes = outcomes(&mut reader).await;
    let expected: Vec<Value> = (0..MESSAGES).map(|n| json!({"n": n + 1, "version": n / 10 + 1})).collect();
    assert_eq!(outcomes, expected);
    node.stop().await;
}

#[tokio::test]
async fn a_message_that_is_wrong_is_answered_and_those_around_it_are_done() {
    let node = Node::start(|_| {}).await;
    let (mut writer, mut reader) = open(node.address(), LINES).await;
    let good = |key: u64| message("a", key).to_string();
    let stale = json!({"kind": "account", "id": "a", "key": "x", "expected_version": 9, "events": [{"type": "Noted"}]});
    let secret = format!(r#"{{"kind":"account","id":"{SECRET}","events":[{{"type":"Noted"}}]}}"#);
    let lines = [
        good(1),
        "{".to_owned(),
        secret,
        r#"{"kind":"_kuma","id":"a","key":"k","events":[{"type":"Noted"}]}"#.to_owned(),
        r#"{"kind":"account","id":"","key":"k","events":[{"type":"Noted"}]}"#.to_owned(),
        r#"{"kind":"account","id":"a","key":"k","events":[]}"#.to_owned(),
        r#"{"kind":"account","id":"a","key":"k","what":1,"events":[{"type":"Noted"}]}"#.to_owned(),
        stale.to_string(),
        String::new(),
        good(2),
        good(1),
    ];
    writer.chunk((lines.join("\n") + "\n").as_bytes()).await.unwrap();
    writer.end().await.unwrap();
    assert_eq!(reader.head().await.unwrap().status, 200);
    let found = outcomes(&mut reader).await;
    assert_eq!((&found[0], &found[8]), (&json!({"n": 1, "version": 1}), &json!({"n": 9, "version": 2})), "{found:?}");
    assert_eq!(found[9], json!({"n": 10, "version": 1, "repeated": true}));
    for (n, outcome) in (2..=8).zip(&found[1..8]) {
        assert_eq!(outcome["n"], n, "{outcome}");
        check_problem(&outcome["problem"]);
    }
    assert_eq!(found[7]["problem"]["code"], "wrong_version");
    assert_eq!(found.len(), 10);
    node.stop().await;
}

#[tokio::test]
async fn message_pack_that_is_wrong_is_answered_and_what_is_too_large_ends_the_stream() {
    let node = Node::start(|config| config.body_bytes_max = 1000).await;
    let (mut writer, mut reader) = open(node.address(), PACK).await;
    let mut bytes = rmp_serde::to_vec_named(&message("a", 1)).unwrap();
    // No value begins with the first, and the second is none of an append.
    bytes.extend([0xc1, 0x2a]);
    bytes.extend(rmp_serde::to_vec_named(&message("a", 2)).unwrap());
    // A text of 4 GiB, as far as it comes.
    bytes.extend([0xdb, 0xff, 0xff, 0xff, 0xff]);
    bytes.extend([b'x'; 2000]);
    writer.chunk(&bytes).await.unwrap();
    let answer = soon("the stream ends", reader.answer()).await.unwrap();
    let mut rest = &answer.body[..];
    let outcomes: Vec<Value> = (0..5).map(|_| rmp_serde::from_read(&mut rest).unwrap()).collect();
    assert!(rest.is_empty());
    assert_eq!((&outcomes[0], &outcomes[3]), (&json!({"n": 1, "version": 1}), &json!({"n": 4, "version": 2})));
    for outcome in [&outcomes[1], &outcomes[2], &outcomes[4]] {
        check_problem(&outcome["problem"]);
    }
    assert_eq!(outcomes[4]["problem"]["code"], "body_too_large");
    assert_eq!(node.client().get("/v1/entities/account/a").await.json()["version"], 2);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_answers_what_it_took_and_keeps_what_it_answered() {
    let node = Node::start(|_| {}).await;
    let (mut writer, mut reader) = open(node.address(), LINES).await;
    let sending = tokio::spawn(async move {
        for n in 0_u64.. {
            let line = message("a", n).to_string() + "\n";
            if writer.chunk(line.as_bytes()).await.is_err() {
                return;
            }
        }
    });
    assert_eq!(reader.head().await.unwrap().status, 200);
    for n in 1..=200 {
        let line = soon("an outcome", reader.line()).await.unwrap().unwrap();
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), json!({"n": n, "version": n}));
    }
    let stopping = tokio::spawn(node.stop());
    // To its end: each one answered was done, and at the end it is said why it ends, or it just ends.
    let mut answered = 200;
    while let Ok(Some(line)) = soon("the rest", reader.line()).await {
        let outcome: Value = serde_json::from_str(&line).unwrap();
        match outcome.get("version") {
            Some(version) => {
                answered += 1;
                assert_eq!(*version, answered);
            }
            None => {
                check_problem(&outcome["problem"]);
                assert_eq!(outcome["problem"]["retry_safe"], true, "{outcome}");
            }
        }
    }
    drop(reader);
    soon("the client notices", sending).await.unwrap();
    let node = Node::in_directory(stopping.await.unwrap(), |_| {}).await;
    let version = node.client().get("/v1/entities/account/a").await.json()["version"].as_u64().unwrap();
    assert!(version >= answered, "{answered} were answered, and {version} are there");
    // Sent again, those are known and the rest is done.
    let lines: String = (0..version + 5).map(|n| message("a", n).to_string() + "\n").collect();
    let answer = node.client().send("POST", "/v1/append", &[LINES], lines.as_bytes()).await.text();
    let found: Vec<Value> = answer.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (n, outcome) in (1..).zip(&found) {
        assert_eq!((&outcome["version"], outcome.get("repeated").is_some()), (&json!(n), n <= version), "{outcome}");
    }
    assert_eq!(found.len() as u64, version + 5);
    node.stop().await;
}

/// What a subscription says, message by message, until `is_enough` or the connection ends; the last checkpoint.
async fn listen(
    address: SocketAddr,
    query: &str,
    checkpoint: Option<&str>,
    mut message: impl FnMut(&str, Value) -> bool,
) -> Option<String> {
    let mut last = checkpoint.map(str::to_owned);
    let Ok((mut writer, mut reader)) = connect(address).await else { return last };
    let resume = checkpoint.map(|checkpoint| ("Last-Event-ID", checkpoint));
    let headers: Vec<_> = resume.into_iter().collect();
    if writer.whole("GET", &format!("/v1/events?{query}"), &headers, b"").await.is_err() {
        return last;
    }
    match reader.head().await {
        Ok(answer) => assert_eq!(answer.status, 200, "{query} {checkpoint:?}"),
        Err(_) => return last,
    }
    let (mut id, mut event, mut data) = (None, String::new(), None);
    while let Ok(Some(line)) = reader.line().await {
        match line.split_once(": ") {
            Some(("id", value)) => id = Some(value.to_owned()),
            Some(("event", value)) => event = value.to_owned(),
            Some(("data", value)) => data = Some(serde_json::from_str(value).unwrap()),
            _ if line.is_empty() => {
                last = id.take().or(last);
                let Some(data) = data.take() else { continue };
                if message(&event, data) {
                    return last;
                }
            }
            _ => {}
        }
    }
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_that_is_cut_again_and_again_misses_nothing() {
    const COMMITS: u64 = 400;
    let seed = seed("cut subscription");
    let mut random = StdRng::seed_from_u64(seed);
    let mut node = Node::start(|_| {}).await;
    let proxy = Proxy::start(node.address(), seed, 4000).await;
    let mut seen: BTreeMap<(String, u64), Value> = BTreeMap::new();
    let (mut checkpoint, mut written, mut listens) = (None, 0_u64, 0);
    let mut events = 0_u64;
    while (seen.len() as u64) < events || written < COMMITS {
        if written == COMMITS / 2 {
            let dir = node.stop().await;
            node = Node::in_directory(dir, |_| {}).await;
            proxy.point_to(node.address());
        }
        let mut client = node.client();
        for _ in 0..random.random_range(1..20).min(COMMITS - written) {
            let id = format!("a{}", random.random_range(0..4));
            let count = random.random_range(1..4);
            let of: Vec<Value> = (0..count).map(|n| json!({"type": "Noted", "data": {"c": written, "n": n}})).collect();
            let body = json!({ "events": of }).to_string();
            assert_eq!(client.post(&format!("/v1/entities/account/{id}/events"), &body).await.status, 201);
            // Another kind, which is not asked for.
            client.post("/v1/entities/other/a/events", r#"{"type":"Noted"}"#).await;
            (written, events) = (written + 1, events + count);
        }
        let wanted = events;
        let listening = listen(proxy.address, "kind=account&from=beginning", checkpoint.as_deref(), |event, data| {
            assert_eq!((event, &data["kind"]), ("event", &json!("account")));
            let version = data["version"].as_u64().unwrap();
            let place = (data["id"].as_str().unwrap().to_owned(), version);
            // In the order of the entity.
            assert!(version == 1 || seen.contains_key(&(place.0.clone(), version - 1)), "{place:?} came too early");
            if let Some(before) = seen.insert(place, data["data"].clone()) {
                assert_eq!(before, data["data"]);
            }
            seen.len() as u64 == wanted
        });
        checkpoint = soon("the events", listening).await;
        listens += 1;
        assert!(listens < 1000, "it gets nowhere");
    }
    assert!(proxy.connections() > 3, "{:?} were cut", proxy.cuts());
    // They are those that are in the store.
    for n in 0..4 {
        let all = node.client().get(&format!("/v1/entities/account/a{n}/events?limit=1000")).await.json();
        for event in all["events"].as_array().unwrap() {
            let place = (format!("a{n}"), event["version"].as_u64().unwrap());
            assert_eq!(seen.remove(&place).as_ref(), Some(&event["data"]));
        }
    }
    assert!(seen.is_empty(), "events that nobody appended: {seen:?}");
    node.stop().await;
}

#[tokio::test]
async fn of_an_erased_entity_it_is_told_that_it_is_and_nothing_else() {
    let node = Node::start(|_| {}).await;
    let mut client = node.client();
    for id in ["gone", "here"] {
        let path = format!("/v1/entities/account/{id}/events");
        assert_eq!(client.post(&path, r#"{"type":"Noted","data":{"n":1}}"#).await.status, 201);
    }
    // Somebody has seen it before it was erased.
    let mut ids = Vec::new();
    let listening = listen(node.address(), "kind=account&from=beginning", None, |_, data| {
        ids.push(data["id"].clone());
        ids.len() == 2
    });
    let checkpoint = soon("both", listening).await;
    assert_eq!(client.send("DELETE", "/v1/entities/account/gone?reason=asked", &[], b"").await.status, 200);
    let listening = listen(node.address(), "kind=account", checkpoint.as_deref(), |event, data| {
        assert_eq!((event, &data["kind"], data.get("id")), ("erased", &json!("account"), None));
        data["receipt"].is_string()
    });
    soon("that it is erased", listening).await;
    // To who begins now it is as if it had never been.
    let mut ids = Vec::new();
    let listening = listen(node.address(), "kind=account&from=beginning", None, |event, data| {
        ids.extend((event == "event").then(|| data["id"].clone()));
        !ids.is_empty()
    });
    soon("the other one", listening).await;
    assert_eq!(ids, ["here"]);
    node.stop().await;
}

#[tokio::test]
async fn a_subscription_begins_where_it_is_told_to_and_ends_with_the_server() {
    let node = Node::start(|_| {}).await;
    let address = node.address();
    let append = async |n: u64| {
        let body = json!({"type": "Noted", "data": n}).to_string();
        assert_eq!(
            Client::new(address).send("POST", "/v1/entities/account/a/events", &[JSON], body.as_bytes()).await.status,
            201
        );
    };
    append(1).await;
    // From now: what is there already does not come.
    let (mut writer, mut reader) = connect(address).await.unwrap();
    writer.whole("GET", "/v1/events?event=account.Noted", &[], b"").await.unwrap();
    assert_eq!(reader.head().await.unwrap().status, 200);
    assert_eq!(soon("the first line", reader.line()).await.unwrap().unwrap(), "retry: 1000");
    append(2).await;
    let mut data = None;
    while data.is_none() {
        let line = soon("an event", reader.line()).await.unwrap().unwrap();
        data = line.strip_prefix("data: ").map(|data| serde_json::from_str::<Value>(data).unwrap());
    }
    assert_eq!(data.unwrap()["data"], 2);
    // From a time before both.
    let mut found = Vec::new();
    let since = "from=2020-01-31T12:00:00Z";
    soon(
        "both",
        listen(address, since, None, |_, data| {
            found.push(data["data"].as_u64().unwrap());
            found.len() == 2
        }),
    )
    .await;
    assert_eq!(found, [1, 2]);
    // Whoever stops reading a moment ago holds no place for ever.
    until("their places are free", async || {
        Client::new(address).get("/v1/status").await.json()["connections"].as_u64().unwrap() <= 2
    })
    .await;
    let stopping = tokio::spawn(node.stop());
    while let Ok(Some(_)) = tokio::time::timeout(Duration::from_secs(20), reader.line()).await.expect("it ends") {}
    stopping.await.unwrap();
}
