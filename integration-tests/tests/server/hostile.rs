//! Whatever is sent to a server, it answers with a typed problem or hangs up, and serves everybody else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::http;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::common::until;
use crate::http::{
    Answer, Client, JSON, LINES, LONG, Node, NodeProcess, PACK, Problem, SECRET, assert_serves, connect, soon,
};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinSet};

const EVENTS: &str = "/v1/entities/account/a/events";
const MIB: u64 = 1 << 20;
/// By how much memory may grow, whatever is sent.
const GROWTH_MAX: u64 = 64 * MIB;

fn event(data: &str) -> String {
    format!(r#"{{"type":"Noted","data":{data}}}"#)
}

async fn version(address: SocketAddr, path: &str) -> u64 {
    let answer = Client::new(address).get(path).await;
    if answer.status == 404 { 0 } else { answer.json()["version"].as_u64().unwrap() }
}

/// Sends the same mebibyte so often, or until the server hangs up.
async fn pour(mut writer: http::Writer, times: usize, chunked: bool) {
    let piece = vec![b'x'; MIB as usize];
    for _ in 0..times {
        let sent = if chunked { writer.chunk(&piece).await } else { writer.raw(&piece).await };
        if sent.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_a_gibibyte_is_refused_and_takes_no_memory() {
    let node = NodeProcess::start(&[]).await;
    assert_serves(node.address).await;
    // Announced.
    let (mut writer, mut reader) = connect(node.address).await.unwrap();
    let head = format!(
        "POST {EVENTS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        1 << 30
    );
    writer.raw(head.as_bytes()).await.unwrap();
    let pouring = tokio::spawn(pour(writer, 1024, false));
    assert_eq!(reader.answer().await.unwrap().refusal(), (413, "body_too_large".to_owned()));
    drop(reader);
    soon("the server hangs up", pouring).await.unwrap();
    // More than anybody has.
    let head = head.replace("1073741824", "18446744073709551615");
    // Hyper refuses that by itself.
    assert_eq!(node.client().exchange(head.as_bytes()).await.unwrap().status, 431);
    // In chunks, as a body that is read whole, as a line of the stream, and as one of an import.
    for (path, content_type) in
        [(EVENTS, JSON), ("/v1/append", LINES), ("/v1/append", PACK), ("/v1/import?source=s", LINES)]
    {
        node.forget_rss_peak();
        let before = node.rss();
        let (mut writer, mut reader) = connect(node.address).await.unwrap();
        writer.begin("POST", path, &[content_type]).await.unwrap();
        if content_type == PACK {
            // A map with a text of 4 GiB.
            writer.chunk(&[0x81, 0xdb, 0xff, 0xff, 0xff, 0xff]).await.unwrap();
        }
        let pouring = tokio::spawn(pour(writer, 1024, true));
        match reader.answer().await {
            Ok(answer) if path == EVENTS => assert_eq!(answer.refusal(), (413, "body_too_large".to_owned())),
            Ok(answer) => {
                let said = answer.text();
                assert!(said.contains("body_too_large") || said.contains("invalid_line"), "{path}: {said}");
            }
            Err(error) => panic!("{path}: {error}"),
        }
        drop(reader);
        soon("the server hangs up", pouring).await.unwrap();
        let peak = node.rss_peak();
        assert!(peak < before + GROWTH_MAX, "{path}: from {} MiB to {} MiB", before / MIB, peak / MIB);
    }
    assert_eq!(version(node.address, "/v1/entities/account/a").await, 0);
    assert_serves(node.address).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_million_headers_and_a_gibibyte_of_them_are_refused_and_take_no_memory() {
    let node = NodeProcess::start(&[]).await;
    assert_serves(node.address).await;
    let before = node.rss();
    let many: Vec<u8> = (0..10_000).flat_map(|n| format!("x-{n}: 1\r\n").into_bytes()).collect();
    let long = vec![b'a'; MIB as usize];
    for (what, begin, more, times) in [
        ("a million headers", &b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n"[..], &many, 100),
        ("a long header", b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nx: ", &long, 1024),
        ("a long path", b"GET /v1/", &long, 1024),
        ("a long name", b"GET / HTTP/1.1\r\n", &long, 1024),
        ("a long method", b"", &long, 1024),
    ] {
        let (mut writer, mut reader) = connect(node.address).await.unwrap();
        let (begin, more) = (begin.to_vec(), more.clone());
        let pouring = tokio::spawn(async move {
            if writer.raw(&begin).await.is_ok() {
                for _ in 0..times {
                    if writer.raw(&more).await.is_err() {
                        return;
                    }
                }
            }
        });
        // Hyper refuses it, or hangs up.
        if let Ok(answer) = reader.answer().await {
            assert!([400, 414, 431].contains(&answer.status), "{what}: {answer:?}");
        }
        drop(reader);
        soon("the server hangs up", pouring).await.unwrap();
        let peak = node.rss_peak();
        assert!(peak < before + GROWTH_MAX, "{what}: from {} MiB to {} MiB", before / MIB, peak / MIB);
    }
    assert_serves(node.address).await;
}

#[tokio::test]
async fn what_is_nested_deep_is_refused_and_the_stack_survives() {
    let node = Node::start(|_| {}).await;
    let mut client = node.client();
    let deep = |open: &str, close: &str| open.repeat(1_000_000) + &close.repeat(1_000_000);
    for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("[", "")] {
        let text = if open == "[" {
            deep(open, close)
        } else {
            format!("{}1{}", open.repeat(1_000_000), close.repeat(1_000_000))
        };
        for body in [event(&text), format!(r#"{{"events":[{}]}}"#, event(&text)), text.clone()] {
            let (status, code) = client.post(EVENTS, &body).await.refusal();
            assert!(
                [400, 422].contains(&status) && ["invalid_body", "invalid_data"].contains(&&*code),
                "{status} {code}"
            );
        }
        for path in ["/v1/receipts/verify", "/v1/entities/account/a/recreate", "/v1/projections/none/query"] {
            let (status, code) = client.post(path, &text).await.refusal();
            assert!([400, 404, 422].contains(&status), "{path}: {status} {code}");
        }
        let message = format!(r#"{{"kind":"account","id":"a","key":"k","events":[{}]}}"#, event(&text));
        let answer = client.send("POST", "/v1/append", &[LINES], message.as_bytes()).await;
        let problem: Value = answer.json();
        http::check_problem(&problem["problem"]);
        let answer = client.send("POST", "/v1/import?source=s", &[LINES], message.as_bytes()).await;
        assert_eq!(answer.refusal(), (422, "invalid_line".to_owned()));
    }
    for marker in [0x91_u8, 0x81] {
        let mut arrays = vec![marker; 1_000_000];
        if marker == 0x81 {
            arrays = [0x81, 0xa1, b'a'].repeat(1_000_000);
        }
        arrays.push(0xc0);
        let mut append = b"\x82\xa4type\xa5Noted\xa4data".to_vec();
        append.extend_from_slice(&arrays);
        assert_eq!(client.send("POST", EVENTS, &[PACK], &append).await.refusal(), (422, "invalid_data".to_owned()));
        assert_eq!(client.send("POST", EVENTS, &[PACK], &arrays).await.refusal().0, 400);
    }
    assert_eq!(version(node.address(), "/v1/entities/account/a").await, 0);
    // As deep as it may be.
    let fits = event(&("[".repeat(120) + &"]".repeat(120)));
    assert_eq!(client.post(EVENTS, &fits).await.status, 201);
    assert_serves(node.address()).await;
    node.stop().await;
}

#[tokio::test]
async fn bytes_that_are_not_utf8_are_refused_wherever_they_stand() {
    let node = Node::start(|_| {}).await;
    let mut client = node.client();
    for body in [
        &b"{\"type\":\"Noted\",\"data\":\"s3cr3t\xff\"}"[..],
        b"{\"type\":\"s3cr3t\xc3\x28\"}",
        b"\xff\xfe\x00",
        b"{\"s3cr3t\xed\xa0\x80\":1}",
    ] {
        assert_eq!(client.send("POST", EVENTS, &[JSON], body).await.refusal(), (400, "invalid_body".to_owned()));
        assert_eq!(
            client.send("POST", "/v1/entities/account/a/recreate", &[JSON], body).await.refusal(),
            (400, "invalid_body".to_owned())
        );
    }
    // A lone surrogate is no character.
    assert_eq!(client.post(EVENTS, r#"{"type":"Noted","data":"\ud800"}"#).await.refusal().0 / 100, 4);
    let pack = b"\x82\xa4type\xa5Noted\xa4data\xa1\xff";
    assert_eq!(client.send("POST", EVENTS, &[PACK], pack).await.refusal().0 / 100, 4);
    for path in
        ["/v1/entities/account/s3cr3t%ff", "/v1/entities/s3cr3t%c3%28/a", "/v1/entities/account/%ed%a0%80/events"]
    {
        assert_eq!(client.get(path).await.refusal(), (400, "invalid_path".to_owned()), "{path}");
    }
    for path in [
        "/v1/entities/account/a?at=s3cr3t%ff",
        "/v1/events?kind=s3cr3t%ff",
        "/v1/entities/account/a?version=s3cr3t",
        "/v1/events?from=s3cr3t",
        "/v1/entities/account/a/events?s3cr3t=1",
    ] {
        let (status, code) = client.get(path).await.refusal();
        assert_eq!(status, 400, "{path}: {code}");
    }
    // As they are on the wire: hyper answers, or the node.
    for request in [
        &b"GET /v1/entities/account/\xff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"[..],
        b"GET /v1/entities/account/a?at=\xff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nx\xff: 1\r\nConnection: close\r\n\r\n",
        b"GET /v1/entities/account/nobody HTTP/1.1\r\nHost: local\xffhost\r\nConnection: close\r\n\r\n",
        b"GET /v1/entities/account/nobody HTTP/1.1\r\nHost: localhost\r\nx: \xff\r\nConnection: close\r\n\r\n",
    ] {
        if let Ok(answer) = client.exchange(request).await {
            assert!((400..500).contains(&answer.status), "{answer:?}");
        }
    }
    for (name, value) in [("Idempotency-Key", "\u{ff}"), ("If-Match", "\"\u{ff}\"")] {
        let answer = client.send("POST", EVENTS, &[JSON, (name, value)], event("1").as_bytes()).await;
        assert!(answer.status == 201 || answer.refusal().0 == 400, "{answer:?}");
    }
    assert_eq!(client.send("GET", "/v1/events", &[("Last-Event-ID", "\u{ff}")], b"").await.refusal().0, 400);
    assert_serves(node.address()).await;
    node.stop().await;
}

/// Every byte, percent-encoded.
fn encoded(id: &str) -> String {
    id.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

#[tokio::test]
async fn a_path_names_one_entity_and_no_file() {
    let node = Node::start(|_| {}).await;
    let mut client = node.client();
    for path in [
        "/v1/entities/../..",
        "/v1/entities/account/../../../../etc/passwd",
        "/v1/../v1/status",
        "//v1/status",
        "/v1//status",
        "/v1/entities//a",
        "/v1/entities/account/",
        "/v1/entities/account//events",
        "/v1/status/",
        "/",
        "/v1/projections/..%2f..%2fetc",
        "/v1/receipts/%2e%2e",
        "/V1/status",
    ] {
        let (status, code) = client.get(path).await.refusal();
        assert!([400, 404].contains(&status), "{path}: {status} {code}");
    }
    for name in ["..", "%2e%2e", "..%2f..%2fetc", "%00", "a%00", "%2fetc", ".hidden", "a%20b", "a%0ab"] {
        let (status, code) = client.send("POST", &format!("/v1/backups/{name}"), &[], b"").await.refusal();
        assert!([400, 404].contains(&status), "{name}: {status} {code}");
    }
    let beside: Vec<_> =
        std::fs::read_dir(node.dir.path().parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let own = format!("{}-backups", node.dir.path().file_name().unwrap().to_string_lossy());
    assert!(!beside.iter().any(|name| *name == *own), "a backup was begun");
    // Ids are taken as they are.
    let ids = [
        "a/b",
        "/",
        "..",
        "../..",
        "a%2fb",
        "%",
        "a b",
        "a+b",
        "?",
        "#",
        "a?version=1",
        "Ünï/cödé",
        "日本",
        "\u{0}",
        "a\u{0}b",
        "\n",
        "\u{202e}",
        ";",
        "a\\b",
        "*",
        ":",
        &"x".repeat(512),
        &"é".repeat(256),
    ];
    for id in ids {
        let path = format!("/v1/entities/account/{}", encoded(id));
        let answer = client.post(&format!("{path}/events"), &event(&json!({ "mine": id }).to_string())).await;
        assert_eq!(answer.status, 201, "{id:?}: {}", answer.text());
        let read = client.get(&path).await.json();
        assert_eq!((&read["id"], &read["state"]["mine"], &read["version"]), (&json!(id), &json!(id), &json!(1)));
        let line = client.get(&format!("{path}/export")).await.text();
        assert!(line.contains(&json!(id).to_string()), "{line}");
    }
    // A plus is a plus in a path.
    assert_eq!(client.get("/v1/entities/account/a+b").await.json()["id"], "a+b");
    for id in ["x".repeat(513), "é".repeat(257), "s3cr3t".repeat(1000)] {
        let path = format!("/v1/entities/account/{}/events", encoded(&id));
        assert_eq!(client.post(&path, &event("1")).await.refusal(), (400, "invalid_id".to_owned()));
    }
    for kind in ["", "1a", "a%2fb", "%00", "..", "K%c3%b6", "_kuma", &"k".repeat(65)] {
        let (status, _) = client.post(&format!("/v1/entities/{kind}/a/events"), &event("1")).await.refusal();
        assert!([400, 403, 404].contains(&status), "{kind}: {status}");
    }
    assert_serves(node.address()).await;
    node.stop().await;
}

/// Shapes of requests that two servers in a row could take for different ones.
#[tokio::test]
async fn a_request_that_can_be_read_in_two_ways_is_refused_or_read_once() {
    let node = Node::start(|config| config.header_timeout = Duration::from_secs(2)).await;
    let body = event(r#""s3cr3t""#);
    let length = body.len();
    let smuggled = "POST /v1/entities/account/smuggled/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{\"type\":\"A\"}";
    let head = format!("POST {EVENTS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n");
    for (what, headers, rest) in [
        ("both", format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n"), format!("0\r\n\r\n{smuggled}")),
        (
            "both, the other way",
            format!("Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"),
            format!("0\r\n\r\n{smuggled}"),
        ),
        ("two lengths", format!("Content-Length: {length}\r\nContent-Length: 0\r\n"), body.clone() + smuggled),
        ("a list of lengths", format!("Content-Length: {length}, 0\r\n"), body.clone() + smuggled),
        ("a length with a sign", format!("Content-Length: +{length}\r\n"), body.clone()),
        ("a negative length", "Content-Length: -1\r\n".to_owned(), body.clone()),
        ("an unknown encoding", "Transfer-Encoding: chunked, gzip\r\n".to_owned(), format!("0\r\n\r\n{smuggled}")),
        ("an encoding in disguise", "Transfer-Encoding: xchunked\r\n".to_owned(), format!("0\r\n\r\n{smuggled}")),
        ("a space before the colon", "Content-Length : 0\r\n".to_owned(), smuggled.to_owned()),
        ("a folded line", "X: a\r\n Content-Length: 0\r\n".to_owned(), smuggled.to_owned()),
        ("a bare CR", "X: a\rContent-Length: 0\r\n".to_owned(), smuggled.to_owned()),
        ("a NUL", "X: a\0b\r\nContent-Length: 0\r\n".to_owned(), smuggled.to_owned()),
        (
            "a chunk that is too long",
            "Transfer-Encoding: chunked\r\n".to_owned(),
            format!("ffffffffffffffff0\r\n{smuggled}"),
        ),
        ("a chunk without a number", "Transfer-Encoding: chunked\r\n".to_owned(), format!("x\r\n{smuggled}")),
        (
            "a chunk without its end",
            "Transfer-Encoding: chunked\r\n".to_owned(),
            format!("{length:x}\r\n{body}X0\r\n\r\n"),
        ),
    ] {
        let request = format!("{head}{headers}\r\n{rest}");
        let answer = node.client().exchange(request.as_bytes()).await;
        if let Ok(answer) = &answer {
            assert!((400..500).contains(&answer.status), "{what}: {answer:?}");
            assert!(!answer.text().contains(SECRET), "{what}: {answer:?}");
        }
        // What RFC 9112 allows is that the chunks count, and that the connection is closed behind them.
        assert_eq!(version(node.address(), "/v1/entities/account/smuggled").await, 0, "{what}: {answer:?}");
        assert_eq!(version(node.address(), "/v1/entities/account/a").await, 0, "{what}: {answer:?}");
    }
    // Two lengths that are the same are one.
    for headers in [format!("Content-Length: {length}\r\nContent-Length: {length}\r\n")] {
        let answer = node.client().exchange(format!("{head}{headers}\r\n{body}").as_bytes()).await.unwrap();
        assert!([201, 400].contains(&answer.status), "{answer:?}");
    }
    for request in [
        "GET / HTTP/9.9\r\n\r\n",
        "GET\r\n\r\n",
        "\r\n\r\n\r\n\r\n",
        "GET /v1/status HTTP/1.1\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nrubbish rubbish rubbish",
        "\u{16}\u{3}\u{1}\u{0}",
    ] {
        let (mut writer, mut reader) = connect(node.address()).await.unwrap();
        writer.raw(request.as_bytes()).await.unwrap();
        let _ = writer.raw(b"Connection: close\r\n\r\n").await;
        assert!(reader.is_closed(LONG).await, "{request:?}");
    }
    assert_serves(node.address()).await;
    node.stop().await;
}

#[tokio::test]
async fn headers_and_methods_that_make_no_sense_are_refused() {
    let node = Node::start(|_| {}).await;
    let mut client = node.client();
    let body = event("1");
    for (status, headers) in [
        (415, vec![]),
        (415, vec![("Content-Type", "text/plain")]),
        (415, vec![("Content-Type", "application/x-www-form-urlencoded")]),
        (415, vec![("Content-Type", "application/jsons3cr3t")]),
        (415, vec![("Content-Type", "\u{ff}")]),
        (400, vec![JSON, ("Idempotency-Key", "s3cr3t"), ("Idempotency-Key", "s3cr3t2")]),
        (400, vec![JSON, ("Idempotency-Key", "")]),
        (400, vec![JSON, ("If-Match", "s3cr3t")]),
        (400, vec![JSON, ("If-Match", "*")]),
        (400, vec![JSON, ("If-Match", "\"1\", \"2\"")]),
        (400, vec![JSON, ("If-Match", "W/\"1\"")]),
        (400, vec![JSON, ("If-Match", "\"-1\"")]),
        (400, vec![JSON, ("If-Match", "\"18446744073709551616\"")]),
        (400, vec![JSON, ("If-Match", "")]),
        (400, vec![JSON, ("If-Match", "\"1\""), ("If-Match", "\"2\"")]),
        (400, vec![JSON, ("If-None-Match", "\"1\"")]),
        (400, vec![JSON, ("If-None-Match", "*"), ("If-Match", "\"1\"")]),
        (412, vec![JSON, ("If-Match", "\"18446744073709551615\"")]),
        (412, vec![JSON, ("If-Match", "7")]),
    ] {
        assert_eq!(client.send("POST", EVENTS, &headers, body.as_bytes()).await.refusal().0, status, "{headers:?}");
    }
    let long = "k".repeat(257);
    let answer = client.send("POST", EVENTS, &[JSON, ("Idempotency-Key", &long)], body.as_bytes()).await;
    assert_eq!(answer.refusal(), (400, "invalid_key".to_owned()));
    for (method, path) in [
        ("PUT", EVENTS),
        ("PATCH", EVENTS),
        ("TRACE", "/v1/status"),
        ("CONNECT", "/v1/status"),
        ("S3CR3T", "/v1/status"),
        ("OPTIONS", "/v1/append"),
        ("POST", "/v1/status"),
        ("DELETE", "/openapi.json"),
        ("GET", "/v1/append"),
        ("post", EVENTS),
    ] {
        let problem = client.send(method, path, &[], b"").await.problem();
        let Problem { status, code, .. } = &problem;
        assert!([404, 405].contains(status), "{method} {path}: {status} {code}");
        assert!(!problem.body.to_string().contains("S3CR3T"), "{}", problem.body);
    }
    assert_eq!(version(node.address(), "/v1/entities/account/a").await, 0);
    for origin in ["https://example.com", "null"] {
        assert_eq!(client.send("GET", "/v1/status", &[("Origin", origin)], b"").await.refusal().0, 403);
    }
    // A charset, another case, and an id of the request that is not fit for a log.
    let headers = [
        ("content-type", "Application/JSON; charset=utf-8"),
        ("X-Request-Id", "s3cr3t s3cr3t"),
        ("Accept-Encoding", "gzip"),
    ];
    let answer = client.send("POST", EVENTS, &headers, body.as_bytes()).await;
    assert_eq!(answer.status, 201);
    assert!(!answer.header("x-request-id").unwrap().contains(SECRET));
    assert_serves(node.address()).await;
    node.stop().await;
}

#[tokio::test]
async fn a_name_that_comes_twice_is_refused() {
    let node = Node::start(|_| {}).await;
    let mut client = node.client();
    for body in [
        r#"{"type":"Noted","data":{"s3cr3t":1,"s3cr3t":2}}"#,
        r#"{"type":"Noted","data":{"a":[{"s3cr3t":1,"\u00733cr3t":2}]}}"#,
        r#"{"type":"Noted","type":"Noted"}"#,
        r#"{"type":"Noted","data":1,"data":2}"#,
        r#"{"events":[{"type":"Noted"}],"events":[]}"#,
        r#"{"events":[{"type":"Noted"}],"expected_version":0,"expected_version":1}"#,
        r#"{"events":[{"type":"Noted"}],"metadata":{"correlation":"s3cr3t","correlation":"b"}}"#,
    ] {
        let (status, code) = client.post(EVENTS, body).await.refusal();
        assert!([400, 422].contains(&status), "{body}: {status} {code}");
    }
    for body in [
        // {"type": "A", "data": {"a": 1, "a": 2}}
        &b"\x82\xa4type\xa1A\xa4data\x82\xa1a\x01\xa1a\x02"[..],
        // {"type": "A", "type": "B"}
        b"\x82\xa4type\xa1A\xa4type\xa1B",
        // {"type": "A", "data": {1: 2}}, then a binary value, an extension, NaN, infinity (of 32 and 64 bits), and a reserved byte
        b"\x82\xa4type\xa1A\xa4data\x81\x01\x02",
        b"\x82\xa4type\xa1A\xa4data\xc4\x01x",
        b"\x82\xa4type\xa1A\xa4data\xd4\x01x",
        b"\x82\xa4type\xa1A\xa4data\xcb\x7f\xf8\0\0\0\0\0\0",
        b"\x82\xa4type\xa1A\xa4data\xcb\x7f\xf0\0\0\0\0\0\0",
        b"\x82\xa4type\xa1A\xa4data\xca\xff\x80\0\0",
        b"\x82\xa4type\xa1A\xa4data\xc1",
        // Lengths that lie, a value that follows, and nothing at all.
        b"\x82\xa4type\xa1A\xa4data\xdd\xff\xff\xff\xff",
        b"\x82\xa4type\xa1A\xa4data\xdf\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa6events\xdd\xff\xff\xff\xff",
        b"\x81\xa4type\xa1A\xc0",
        b"",
    ] {
        let (status, code) = client.send("POST", EVENTS, &[PACK], body).await.refusal();
        assert!([400, 422].contains(&status), "{body:?}: {status} {code}");
    }
    assert_eq!(version(node.address(), "/v1/entities/account/a").await, 0);
    node.stop().await;
}

#[tokio::test]
async fn numbers_come_back_as_they_were_sent_or_are_refused() {
    let node = Node::start(|_| {}).await;
    let mut client = node.client();
    let numbers = r#"[9007199254740993,18446744073709551615,-9223372036854775808,0.1,1e308,5e-324,-0.0,123456789.123456789,2.5e-8]"#;
    let data = format!(r#"{{"n":{numbers}}}"#);
    let sent: Value = serde_json::from_str(numbers).unwrap();
    let pack = rmp_serde::to_vec_named(&json!({"type": "Noted", "data": {"n": sent}})).unwrap();
    for (id, content_type, body) in [("json", JSON, event(&data).into_bytes()), ("pack", PACK, pack)] {
        let path = format!("/v1/entities/account/{id}");
        let answer = client.send("POST", &format!("{path}/events"), &[content_type], &body).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
        let same = |what: &str, found: &Value| {
            // As text, so that -0.0 is not 0.
            assert_eq!(found.to_string(), sent.to_string(), "{id}: {what}");
        };
        same("state", &client.get(&path).await.json()["state"]["n"]);
        same("state at a version", &client.get(&format!("{path}?version=1")).await.json()["state"]["n"]);
        same("events", &client.get(&format!("{path}/events")).await.json()["events"][0]["data"]["n"]);
        let lines = client.send("GET", &format!("{path}/events"), &[("Accept", "application/x-ndjson")], b"").await;
        same("lines", &lines.json()["data"]["n"]);
        let export = client.get(&format!("{path}/export")).await.text();
        let line: Value = export
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .find(|line: &Value| line["data"].is_object())
            .unwrap();
        same("export", &line["data"]["n"]);
        let diff = client.get(&format!("{path}/diff?from=0&to=1")).await.text();
        assert!(diff.contains("18446744073709551615") && diff.contains("9007199254740993"), "{diff}");
    }
    let (mut writer, mut reader) = connect(node.address()).await.unwrap();
    writer.whole("GET", "/v1/events?from=beginning&kind=account", &[], b"").await.unwrap();
    assert_eq!(reader.head().await.unwrap().status, 200);
    let mut seen = 0;
    while seen < 2 {
        let line = soon("an event", reader.line()).await.unwrap().unwrap();
        if let Some(data) = line.strip_prefix("data: ") {
            let found: Value = serde_json::from_str(data).unwrap();
            assert_eq!(found["data"]["n"].to_string(), sent.to_string());
            seen += 1;
        }
    }
    drop((reader, writer));
    for number in [
        "18446744073709551616",
        "-9223372036854775809",
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "-Infinity",
        "0x10",
        "01",
        "1.",
        ".5",
        "+1",
        &"9".repeat(100_000),
    ] {
        let (status, code) = client.post("/v1/entities/account/refused/events", &event(number)).await.refusal();
        assert!(
            [400, 422].contains(&status) && ["invalid_data", "invalid_body"].contains(&&*code),
            "{number:.20}: {status} {code}"
        );
    }
    assert_eq!(version(node.address(), "/v1/entities/account/refused").await, 0);
    node.stop().await;
}

#[tokio::test]
async fn a_body_that_is_cut_off_or_stands_still_does_nothing() {
    let node = Node::start(|config| config.body_idle_timeout = Duration::from_millis(300)).await;
    let body = event("1");
    // Cut off: in a chunk, between chunks, and within an announced length. What came is a whole append each time.
    for cut in ["chunk", "between", "length"] {
        let (mut writer, reader) = connect(node.address()).await.unwrap();
        match cut {
            "length" => {
                let head = format!(
                    "POST {EVENTS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len() + 1
                );
                writer.raw(head.as_bytes()).await.unwrap();
            }
            _ => {
                writer.begin("POST", EVENTS, &[JSON]).await.unwrap();
                writer.chunk(body.as_bytes()).await.unwrap();
                if cut == "chunk" {
                    writer.raw(b"10\r\n  ").await.unwrap();
                }
            }
        }
        drop(writer);
        let mut reader = reader;
        if let Ok(answer) = reader.answer().await {
            assert_eq!(answer.problem().status, 400, "{cut}");
        }
        assert_serves(node.address()).await;
    }
    // Stands still: given up, wherever a body is read.
    for (path, content_type) in [(EVENTS, JSON), ("/v1/receipts/verify", JSON), ("/v1/import?source=s", LINES)] {
        let (mut writer, mut reader) = connect(node.address()).await.unwrap();
        writer.begin("POST", path, &[content_type]).await.unwrap();
        writer.chunk(b"{").await.unwrap();
        let answer = soon("the body is given up", reader.answer()).await.unwrap();
        let problem = match answer.status {
            200 => serde_json::from_str::<Value>(answer.text().lines().last().unwrap()).unwrap()["problem"].clone(),
            _ => answer.problem().body,
        };
        assert_eq!(problem["retry_safe"], true, "{path}: {problem}");
        assert!(["body_too_slow", "cut_off"].contains(&problem["code"].as_str().unwrap()), "{path}: {problem}");
    }
    assert_eq!(version(node.address(), "/v1/entities/account/a").await, 0);
    assert_serves(node.address()).await;
    node.stop().await;
}

/// The 99th percentile of each of reads and appends.
async fn percentiles(address: SocketAddr, samples: usize) -> (Duration, Duration) {
    let mut client = Client::new(address);
    let (mut reads, mut appends) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        let start = Instant::now();
        assert_eq!(client.post("/v1/entities/probe/q/events", r#"{"type":"Probed"}"#).await.status, 201);
        appends.push(start.elapsed());
        let start = Instant::now();
        assert_eq!(client.get("/v1/entities/probe/q").await.status, 200);
        reads.push(start.elapsed());
    }
    let p99 = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() * 99 / 100]
    };
    (p99(reads), p99(appends))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_that_dawdle_are_closed_and_disturb_nobody() {
    const CONNECTIONS: usize = 1000;
    const SAMPLES: usize = 1500;
    /// So that noise is not taken for a disturbance.
    const FLOOR: Duration = Duration::from_millis(8);
    let node = NodeProcess::start(&["header_timeout_ms=5000"]).await;
    percentiles(node.address, 200).await;
    let (reads_before, appends_before) = percentiles(node.address, SAMPLES).await;
    let mut slow = JoinSet::new();
    let begin = Instant::now();
    for n in 0..CONNECTIONS {
        let address = node.address;
        slow.spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // Some say nothing at all, and some begin as HTTP/2 does.
            let text: &[u8] = match n % 4 {
                0 => b"",
                1 => b"PRI * HTTP/2.0\r\n\r\nS",
                _ => b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nx: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            };
            for byte in text {
                if stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_millis(250)) => {}
                    _ = stream.readable() => {}
                }
            }
            let mut rest = Vec::new();
            let closed = tokio::time::timeout(LONG, tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest)).await;
            (closed.is_ok(), rest)
        });
    }
    let mut client = node.client();
    let connections =
        async |client: &mut Client| client.get("/v1/status").await.json()["connections"].as_u64().unwrap();
    until("all are connected", async || connections(&mut client).await >= CONNECTIONS as u64).await;
    let (reads, appends) = percentiles(node.address, SAMPLES).await;
    let still = connections(&mut client).await;
    println!(
        "p99 alone: reads {reads_before:?}, appends {appends_before:?}; with {still} others: reads {reads:?}, appends {appends:?} ({:?} after they began)",
        begin.elapsed()
    );
    assert!(reads < 2 * reads_before.max(FLOOR), "reads: {reads_before:?} became {reads:?}");
    assert!(appends < 2 * appends_before.max(FLOOR), "appends: {appends_before:?} became {appends:?}");
    let mut closed = 0;
    while let Some(ended) = slow.join_next().await {
        let (is_closed, rest) = ended.unwrap();
        assert!(is_closed, "a connection was never closed");
        assert!(
            rest.is_empty() || rest.starts_with(b"HTTP/1.1 408") || !rest.starts_with(b"HTTP/1.1 2"),
            "{:?}",
            String::from_utf8_lossy(&rest)
        );
        closed += 1;
    }
    assert_eq!(closed, CONNECTIONS);
    until("none is left", async || connections(&mut client).await <= 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_are_closed_and_those_within_are_served() {
    const MAX: usize = 50;
    let node = NodeProcess::start(&["connections_max=50"]).await;
    let mut first = node.client();
    assert_eq!(first.get("/v1/status").await.status, 200);
    let mut held = Vec::new();
    for _ in 1..MAX {
        held.push(connect(node.address).await.unwrap());
    }
    // Those that come at the same time are let in in any order.
    until("all are in", async || first.get("/v1/status").await.json()["connections"] == MAX).await;
    for _ in 0..10_000 {
        if let Ok((_writer, mut reader)) = connect(node.address).await {
            assert!(reader.is_closed(LONG).await);
        }
    }
    assert_eq!(first.get("/v1/status").await.json()["connections"], MAX);
    drop(held);
    let served = async || node.client().try_send("GET", "/v1/status", &[], b"").await.is_ok();
    until("there is room again", served).await;
    assert_serves(node.address).await;
}

#[tokio::test]
async fn requests_beyond_the_limit_are_told_when_to_come_back() {
    let node = Node::start(|config| config.requests_max = 1).await;
    let (mut writer, mut reader) = connect(node.address()).await.unwrap();
    writer.begin("POST", EVENTS, &[JSON]).await.unwrap();
    let body = event("1");
    writer.chunk(&body.as_bytes()[..5]).await.unwrap();
    let mut client = node.client();
    // Until the slow one is in.
    let mut refused = None;
    until("it is full", async || {
        let answer = client.get("/v1/status").await;
        refused = (answer.status != 200).then_some(answer);
        refused.is_some()
    })
    .await;
    let problem = refused.unwrap().problem();
    assert_eq!((problem.status, &*problem.code, &problem.body["retry_safe"]), (503, "overloaded", &json!(true)));
    assert!(problem.body["retry_after_ms"].as_u64().unwrap() > 0);
    assert_eq!(client.post(EVENTS, &body).await.refusal(), (503, "overloaded".to_owned()));
    assert_eq!(client.get("/health/live").await.status, 200);
    assert_eq!(client.get("/health/ready").await.status, 200);
    writer.chunk(&body.as_bytes()[5..]).await.unwrap();
    writer.end().await.unwrap();
    assert_eq!(reader.answer().await.unwrap().status, 201);
    assert_serves(node.address()).await;
    assert_eq!(version(node.address(), "/v1/entities/account/a").await, 1);
    node.stop().await;
}

#[tokio::test]
async fn bodies_beyond_the_memory_for_them_are_told_to_come_back() {
    let node = Node::start(|config| config.body_memory_max = 64 << 10).await;
    let body = event(&format!("\"{}\"", "x".repeat(100_000)));
    let mut client = node.client();
    assert_eq!(client.post(EVENTS, &body).await.refusal(), (503, "overloaded".to_owned()));
    assert_serves(node.address()).await;
    node.stop().await;
}

#[tokio::test]
async fn streams_and_subscriptions_beyond_their_limits_are_told_to_come_back() {
    let node = Node::start(|config| (config.streams_max, config.subscriptions_max) = (1, 1)).await;
    let (mut stream_writer, mut stream) = connect(node.address()).await.unwrap();
    stream_writer.begin("POST", "/v1/append", &[LINES]).await.unwrap();
    stream_writer.chunk(b"{}\n").await.unwrap();
    assert_eq!(stream.head().await.unwrap().status, 200);
    let (mut writer, mut subscription) = connect(node.address()).await.unwrap();
    writer.whole("GET", "/v1/events", &[], b"").await.unwrap();
    assert_eq!(subscription.head().await.unwrap().status, 200);
    let mut client = node.client();
    assert_eq!(client.get("/v1/events").await.refusal(), (503, "overloaded".to_owned()));
    assert_eq!(client.get("/v1/export").await.refusal(), (503, "overloaded".to_owned()));
    assert_eq!(client.send("POST", "/v1/append", &[LINES], b"").await.refusal(), (503, "overloaded".to_owned()));
    assert_serves(node.address()).await;
    drop((stream, stream_writer, writer, subscription));
    until("their places are free", async || {
        client.get("/v1/export").await.status == 200 && {
            let (mut writer, mut reader) = connect(node.address()).await.unwrap();
            writer.whole("GET", "/v1/events", &[], b"").await.unwrap();
            reader.head().await.unwrap().status == 200
        }
    })
    .await;
    node.stop().await;
}

/// Gibibytes of answers that nobody takes: the server has what it reads ahead for each of them, and does not collect the rest.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_takes_no_memory() {
    /// For 4 shards, and events of 500 kB.
    const PER_CLIENT_MAX: u64 = 9 * MIB;
    let node = NodeProcess::start(&["memory_budget=8388608", "shards=4"]).await;
    let mut client = node.client();
    let large = event(&format!("{{\"text\":\"{}\"}}", "x".repeat(500_000)));
    for n in 0..100 {
        let path = format!("/v1/entities/large/{n}/events");
        for _ in 0..2 {
            assert_eq!(client.post(&path, &large).await.status, 201);
        }
    }
    // What stays in memory by itself.
    for n in 0..100 {
        assert_eq!(client.get(&format!("/v1/entities/large/{n}")).await.status, 200);
    }
    assert_eq!(client.get("/v1/export").await.status, 200);
    let before = node.rss();
    let mut held = Vec::new();
    for path in ["/v1/events?from=beginning", "/v1/export"] {
        for _ in 0..20 {
            let (mut writer, mut reader) = connect(node.address).await.unwrap();
            writer.whole("GET", path, &[], b"").await.unwrap();
            assert_eq!(reader.head().await.unwrap().status, 200);
            held.push((writer, reader));
        }
    }
    // Until it reads no further.
    let mut last = 0;
    until("the server waits", async || {
        tokio::time::sleep(Duration::from_millis(300)).await;
        std::mem::replace(&mut last, node.rss()).abs_diff(last) < MIB
    })
    .await;
    println!("answers that nobody reads: {} MiB", (last - before) / MIB);
    // Appends whose outcomes nobody takes: the server stops to read them.
    let line = |stream: usize, n: usize| {
        format!(r#"{{"kind":"unread","id":"{stream}-{}","key":"{n}","events":[{{"data":1}}]}}"#, n % 100) + "\n"
    };
    let mut pouring = JoinSet::new();
    for stream in 0..4 {
        let (mut writer, mut reader) = connect(node.address).await.unwrap();
        writer.begin("POST", "/v1/append", &[LINES]).await.unwrap();
        pouring.spawn(async move {
            let mut sent = 0;
            for chunk in 0..2_000 {
                let lines: String = (0..200).map(|n| line(stream, chunk * 200 + n)).collect();
                match tokio::time::timeout(Duration::from_secs(3), writer.chunk(lines.as_bytes())).await {
                    Ok(Ok(())) => sent += 200,
                    Ok(Err(error)) => panic!("{error}"),
                    Err(_) => break,
                }
            }
            assert_eq!(reader.head().await.unwrap().status, 200);
            (sent, writer, reader)
        });
    }
    while let Some(poured) = pouring.join_next().await {
        let (sent, writer, reader) = poured.unwrap();
        assert!(sent < 400_000, "the server reads on, though nobody takes its answers");
        held.push((writer, reader));
    }
    let peak = node.rss();
    let clients = held.len() as u64;
    println!("from {} MiB to {} MiB with {clients} clients", before / MIB, peak / MIB);
    assert!(peak < before + clients * PER_CLIENT_MAX, "from {} MiB to {} MiB", before / MIB, peak / MIB);
    assert_serves(node.address).await;
    drop(held);
    assert_serves(node.address).await;
}

/// What is not a problem of the node's own is still none of the server's faults.
#[test]
fn an_answer_with_a_fault_of_the_server_is_found() {
    let answer = |status: u16| {
        Answer {
        status,
        headers: vec![("content-type".to_owned(), "application/problem+json".to_owned())],
        body: json!({"status": status, "code": "x", "type": "urn:kuma:x", "title": "x", "detail": "x", "retry_safe": true}).to_string().into_bytes(),
    }
    };
    assert_eq!(answer(400).refusal(), (400, "x".to_owned()));
    for status in [500, 503, 504] {
        assert!(std::panic::catch_unwind(|| answer(status).problem()).is_err(), "{status}");
    }
}
