//! Who sends a request again until it is answered, however often the connection is cut and the server killed, has done it once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/http.rs"]
mod http;
#[path = "common/proxy.rs"]
mod proxy;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use http::{Answer, Client, JSON, LINES, Node, NodeProcess, PACK, connect, soon};
use integration_tests::seed;
use kuma_node::client::{ClientOptions, NewEvent};
use proxy::Proxy;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// Some requests and their answers, so that each place of them is hit.
const CUT_WITHIN: usize = 1500;
const SHARED: u64 = 3;
const CLIENTS: u64 = 12;
const APPENDS: u64 = 25;

/// Sends it until there is a whole answer.
async fn insist(client: &mut Client, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let again = async {
        loop {
            match client.try_send(method, path, headers, body).await {
                Ok(answer) if answer.status == 503 => tokio::task::yield_now().await,
                Ok(answer) => return answer,
                // The server may be away for a moment.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(_) => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), again).await.expect("an answer, some time")
}

/// One append of a client: to which entity, and what.
struct Told {
    entity: String,
    key: String,
    version: u64,
    events: Vec<Value>,
}

fn body(events: &[Value], packed: bool) -> Vec<u8> {
    let events: Vec<Value> = events.iter().map(|data| json!({"type": "Noted", "data": data})).collect();
    let body = if events.len() == 1 { events[0].clone() } else { json!({ "events": events }) };
    if packed { rmp_serde::to_vec_named(&body).unwrap() } else { serde_json::to_vec(&body).unwrap() }
}

/// Appends of all shapes, each sent until it is answered.
async fn appends(address: SocketAddr, n: u64, seed: u64) -> Vec<Told> {
    let mut client = Client::new(address);
    let mut random = StdRng::seed_from_u64(seed ^ n);
    let mut told = Vec::new();
    let mut own = 0;
    for append in 0..APPENDS {
        let events: Vec<Value> = (0..random.random_range(1..4))
            .map(|event| json!({"client": n, "append": append, "event": event}))
            .collect();
        let (packed, is_own) = (random.random(), random.random());
        let entity = if is_own { format!("own-{n}") } else { format!("shared-{}", random.random_range(0..SHARED)) };
        let key = format!("{n}/{append}");
        let (path, expected) = (format!("/v1/entities/account/{entity}/events"), format!("\"{own}\""));
        let mut headers = vec![if packed { PACK } else { JSON }, ("Idempotency-Key", &*key)];
        if is_own {
            // Stale as soon as the first one has landed, of which nobody was told.
            headers.push(("If-Match", &expected));
        }
        let answer = insist(&mut client, "POST", &path, &headers, &body(&events, packed)).await;
        assert!([200, 201].contains(&answer.status), "{}", answer.text());
        let version = answer.json()["version"].as_u64().unwrap();
        if is_own {
            own += events.len() as u64;
            assert_eq!(version, own, "nobody else appends to it");
        }
        told.push(Told { entity, key, version, events });
    }
    told
}

/// All events of an entity.
async fn history(client: &mut Client, entity: &str) -> Vec<Value> {
    let mut all: Vec<Value> = Vec::new();
    loop {
        let path = format!("/v1/entities/account/{entity}/events?from={}", all.len() + 1);
        let answer = client.get(&path).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let page = answer.json();
        let events = page["events"].as_array().unwrap();
        if events.is_empty() {
            return all;
        }
        all.extend(events.iter().cloned());
    }
}

/// Each event is there once, where its client was told, and nothing else.
async fn check(address: SocketAddr, told: &[Told]) {
    let mut client = Client::new(address);
    let mut expected: BTreeMap<&str, BTreeMap<u64, &Value>> = BTreeMap::new();
    for Told { entity, version, events, .. } in told {
        let first = version + 1 - events.len() as u64;
        for (at, event) in (first..).zip(events) {
            let other = expected.entry(entity).or_default().insert(at, event);
            assert!(other.is_none(), "two events were told to be version {at} of {entity}");
        }
    }
    for (entity, expected) in expected {
        let found = history(&mut client, entity).await;
        let versions: Vec<_> = found.iter().map(|event| event["version"].as_u64().unwrap()).collect();
        assert_eq!(versions, (1..=expected.len() as u64).collect::<Vec<_>>(), "{entity}");
        let data: Vec<_> = found.iter().map(|event| &event["data"]).collect();
        assert_eq!(data, expected.into_values().collect::<Vec<_>>(), "{entity}");
    }
    // And once more, now that all of them are known.
    for Told { entity, key, version, events } in told {
        let path = format!("/v1/entities/account/{entity}/events");
        let answer = client.send("POST", &path, &[JSON, ("Idempotency-Key", key)], &body(events, false)).await;
        assert_eq!(answer.json(), json!({"version": version, "repeated": true}), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_append_that_is_sent_until_it_is_answered_happens_once() {
    let seed = seed("cuts");
    let node = Node::start(|_| {}).await;
    let proxy = Proxy::start(node.address(), seed, CUT_WITHIN).await;
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        clients.spawn(appends(proxy.address, n, seed));
    }
    let told: Vec<Told> = clients.join_all().await.into_iter().flatten().collect();
    assert!(proxy.cuts() > CLIENTS, "{} connections were cut", proxy.cuts());
    check(node.address(), &told).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_append_that_is_sent_until_it_is_answered_happens_once_though_the_server_is_killed() {
    let seed = seed("kills");
    let mut node = NodeProcess::start(&["shards=2"]).await;
    let proxy = Proxy::start(node.address, seed, CUT_WITHIN).await;
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        clients.spawn(appends(proxy.address, n, seed));
    }
    let mut random = StdRng::seed_from_u64(seed);
    let mut told = Vec::new();
    let mut kills = 0;
    while !clients.is_empty() {
        // Some of them at once, some in the middle of the work.
        let pause = tokio::time::sleep(Duration::from_millis(random.random_range(0..40)));
        tokio::select! {
            Some(ended) = clients.join_next() => told.extend(ended.unwrap()),
            () = pause, if kills < 8 => {
                node = NodeProcess::in_directory(node.kill(), &["shards=2"]).await;
                proxy.moved(node.address);
                kills += 1;
            }
        }
    }
    assert!(kills > 0, "all was done before the first kill");
    check(node.address, &told).await;
}

/// Messages of a stream, sent until each of them has its outcome: how often the connection was opened for that.
async fn stream(address: SocketAddr, n: u64, packed: bool, messages: &[Value]) -> (Vec<Value>, u64) {
    let mut outcomes: Vec<Value> = Vec::new();
    let mut connections = 0;
    while outcomes.len() < messages.len() {
        connections += 1;
        assert!(connections < 500, "stream {n} gets nowhere");
        let Ok((mut writer, mut reader)) = connect(address).await else { continue };
        // All that has no outcome, with the same keys.
        let rest: Vec<Vec<u8>> = messages[outcomes.len()..]
            .iter()
            .map(|message| match packed {
                true => rmp_serde::to_vec_named(message).unwrap(),
                false => format!("{message}\n").into_bytes(),
            })
            .collect();
        let sending = async move {
            writer.begin("POST", "/v1/append", &[if packed { PACK } else { LINES }]).await?;
            for chunk in rest.chunks(16) {
                writer.chunk(&chunk.concat()).await?;
            }
            writer.end().await?;
            // Until the answer has come.
            std::future::pending::<std::io::Result<()>>().await
        };
        let reading = async {
            let answer = reader.head().await?;
            if answer.status != 200 {
                return Ok(());
            }
            let mut bytes = Vec::new();
            while let Some(piece) = reader.piece().await? {
                bytes.extend_from_slice(&piece);
                outcomes.extend(cut_outcomes(&mut bytes, packed));
            }
            assert!(bytes.is_empty(), "half an outcome at the end of an answer");
            Ok::<_, std::io::Error>(())
        };
        // Whichever ends: it is cut, or done.
        let _ = tokio::select! {
            ended = reading => ended,
            ended = sending => ended,
        };
    }
    (outcomes, connections)
}

/// The outcomes that are whole.
fn cut_outcomes(bytes: &mut Vec<u8>, packed: bool) -> Vec<Value> {
    let mut outcomes = Vec::new();
    loop {
        let mut rest = &bytes[..];
        let outcome = match packed {
            true => rmp_serde::from_read(&mut rest).ok(),
            false => rest.iter().position(|byte| *byte == b'\n').map(|end| {
                let outcome = serde_json::from_slice(&rest[..end]).unwrap();
                rest = &rest[end + 1..];
                outcome
            }),
        };
        let used = bytes.len() - rest.len();
        match outcome {
            Some(outcome) => outcomes.push(outcome),
            None => return outcomes,
        }
        bytes.drain(..used);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streamed_appends_that_are_sent_until_they_are_answered_happen_once_and_in_order() {
    const MESSAGES: u64 = 600;
    const ENTITIES: u64 = 7;
    let seed = seed("cut streams");
    let node = Node::start(|_| {}).await;
    let proxy = Proxy::start(node.address(), seed, 12_000).await;
    let mut streams = JoinSet::new();
    for n in 0..6_u64 {
        let address = proxy.address;
        streams.spawn(async move {
            let messages: Vec<Value> = (0..MESSAGES)
                .map(|message| {
                    json!({
                        "kind": "account", "id": format!("stream-{n}-{}", message % ENTITIES), "key": format!("{message}"),
                        "events": [{"type": "Noted", "data": message}],
                    })
                })
                .collect();
            let (outcomes, connections) = stream(address, n, n % 2 == 1, &messages).await;
            (n, outcomes, connections)
        });
    }
    let mut connections = 0;
    for (n, outcomes, opened) in streams.join_all().await {
        connections += opened;
        for (message, outcome) in (0..).zip(&outcomes) {
            assert_eq!(
                outcome["version"].as_u64(),
                Some(message / ENTITIES + 1),
                "stream {n}, message {message}: {outcome}"
            );
        }
        let mut client = node.client();
        for entity in 0..ENTITIES {
            let found = history(&mut client, &format!("stream-{n}-{entity}")).await;
            let found: Vec<u64> = found.iter().map(|event| event["data"].as_u64().unwrap()).collect();
            assert_eq!(found, (entity..MESSAGES).step_by(ENTITIES as usize).collect::<Vec<_>>(), "stream {n}");
        }
    }
    assert!(proxy.cuts() > 0, "{connections} connections, and none was cut");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn erasures_and_new_lives_that_are_asked_for_again_are_the_same() {
    let seed = seed("cut erasures");
    let node = Node::start(|_| {}).await;
    let proxy = Proxy::start(node.address(), seed, 900).await;
    let mut clients = JoinSet::new();
    for n in 0..8 {
        let (address, direct) = (proxy.address, node.address());
        clients.spawn(async move {
            let mut client = Client::new(address);
            for entity in 0..6 {
                let path = format!("/v1/entities/account/erased-{n}-{entity}");
                let events = format!("{path}/events");
                let append = r#"{"type":"Noted","data":{"n":1}}"#.as_bytes();
                insist(&mut client, "POST", &events, &[JSON, ("Idempotency-Key", "a")], append).await;
                let erase = format!("{path}?reason=asked%20for");
                let receipt = insist(&mut client, "DELETE", &erase, &[], b"").await;
                assert_eq!(receipt.status, 200, "{}", receipt.text());
                // Whichever attempt it was that did it.
                let again = Client::new(direct).send("DELETE", &erase, &[], b"").await;
                assert_eq!(again.json(), receipt.json());
                let body = br#"{"reason":"back"}"#;
                let life = insist(&mut client, "POST", &format!("{path}/recreate"), &[JSON], body).await;
                // The first attempt made it; of the next ones it is told that it is not erased.
                assert!(life.status == 200 && life.json()["life"] == 2 || life.status == 409, "{}", life.text());
                insist(&mut client, "POST", &events, &[JSON, ("Idempotency-Key", "a")], append).await;
                let state = Client::new(direct).get(&path).await.json();
                assert_eq!((&state["version"], &state["state"]), (&json!(1), &json!({"n": 1})));
            }
        });
    }
    clients.join_all().await;
    assert!(proxy.cuts() > 8, "{} connections were cut", proxy.cuts());
    node.stop().await;
}

/// The node's own client, as the command line uses it.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_cut_off_again_and_again_appends_once() {
    const APPENDS: u64 = 8;
    let seed = seed("cut client");
    let node = Node::start(|_| {}).await;
    let proxy = Proxy::start(node.address(), seed, 800).await;
    let options = ClientOptions { url: format!("http://{}", proxy.address), token: None, ca_cert: None };
    let client = kuma_node::client::Client::new(&options).unwrap();
    for append in 0..APPENDS {
        let data = serde_json::value::to_raw_value(&append).unwrap();
        let event = NewEvent { name: "Noted".to_owned(), data, schema: 1 };
        let key = format!("k{append}");
        let outcome = soon("an append", async {
            loop {
                // It tries a few times by itself.
                match client.append("account", "c", std::slice::from_ref(&event), None, &key, |_, _| ()).await {
                    Ok(outcome) => break outcome,
                    Err(error) => assert!(error.is_retry_safe(), "{error}"),
                }
            }
        })
        .await;
        assert_eq!(outcome.version, append + 1);
    }
    let found = history(&mut node.client(), "c").await;
    assert_eq!(
        found.iter().map(|event| event["data"].as_u64().unwrap()).collect::<Vec<_>>(),
        (0..APPENDS).collect::<Vec<_>>()
    );
    node.stop().await;
}
