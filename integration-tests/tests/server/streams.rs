//! Streams stay in order and lose nothing: appends that are sent one behind the other, and subscriptions.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::http;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Instant,
};

use crate::common::until;
use crate::http::{Answer, Client, JSON, LINES, Node, NodeProcess, PACK, Reader, Writer, check_problem, connect, soon};
use crate::proxy::Proxy;
use integration_tests::seed;
use kuma_node::{
    ClientOptions,
    client::{Begin, SubscriptionStep},
};
use serde_json::{Value, json};

fn append(id: &str, key: &str, events: u64) -> Value {
    let events: Value = (0..events).map(|part| json!({"type": "Noted", "data": {"key": key, "part": part}})).collect();
    json!({"kind": "ledger", "id": id, "key": key, "events": events})
}

fn expecting(mut append: Value, version: u64) -> Value {
    append["expected_version"] = version.into();
    append
}

fn path(entity: &str) -> String {
    format!("/v1/entities/ledger/{entity}/events")
}

async fn history(address: SocketAddr, entity: &str) -> Vec<Value> {
    let lines = ("Accept", "application/x-ndjson");
    let answer = Client::new(address).send("GET", &path(entity), &[lines], b"").await;
    if answer.status == 404 {
        return Vec::new();
    }
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// How a stream is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Lines,
    Pack,
}

const FORMS: [Form; 2] = [Form::Lines, Form::Pack];

impl Form {
    fn message(self, append: &Value) -> Vec<u8> {
        match self {
            Form::Lines => format!("{append}\n").into_bytes(),
            Form::Pack => rmp_serde::to_vec_named(append).unwrap(),
        }
    }

    fn all<'a>(self, appends: impl IntoIterator<Item = &'a Value>) -> Vec<u8> {
        appends.into_iter().flat_map(|append| self.message(append)).collect()
    }
}

/// A stream of appends that has begun.
async fn begin(address: SocketAddr, form: Form) -> (Writer, Outcomes) {
    let (mut writer, reader) = connect(address).await.unwrap();
    writer.begin("POST", "/v1/append", &[if form == Form::Lines { LINES } else { PACK }]).await.unwrap();
    (writer, Outcomes { reader, form, has_head: false, rest: Vec::new(), n: 0 })
}

/// The outcomes of one.
struct Outcomes {
    reader: Reader,
    form: Form,
    has_head: bool,
    rest: Vec<u8>,
    n: u64,
}

impl Outcomes {
    /// The next one, whose number is the next one as well; none at the end of the stream.
    async fn next(&mut self) -> Option<Value> {
        if !self.has_head {
            assert_eq!(self.reader.head().await.unwrap().status, 200);
            self.has_head = true;
        }
        let outcome = match self.form {
            Form::Lines => serde_json::from_str(&self.reader.line().await.unwrap()?).unwrap(),
            Form::Pack => self.value().await?,
        };
        self.n += 1;
        assert_eq!(outcome["n"], self.n, "{outcome}");
        if let Some(problem) = outcome.get("problem") {
            check_problem(problem);
        }
        Some(outcome)
    }

    async fn value(&mut self) -> Option<Value> {
        loop {
            let mut at = std::io::Cursor::new(&self.rest);
            if let Ok(value) = rmp_serde::from_read::<_, Value>(&mut at) {
                let end = at.position() as usize;
                self.rest.drain(..end);
                return Some(value);
            }
            match self.reader.piece().await.unwrap() {
                Some(piece) => self.rest.extend(piece),
                None => {
                    assert!(self.rest.is_empty(), "the stream ends within an outcome");
                    return None;
                }
            }
        }
    }

    async fn version(&mut self) -> u64 {
        let outcome = self.next().await.expect("one more outcome");
        outcome["version"].as_u64().unwrap_or_else(|| panic!("{outcome}"))
    }

    /// The code of the problem, or `ok`.
    async fn code(&mut self) -> String {
        let outcome = self.next().await.expect("one more outcome");
        outcome["problem"]["code"].as_str().unwrap_or("ok").to_owned()
    }

    async fn assert_end(&mut self) {
        let outcome = self.next().await;
        assert!(outcome.is_none(), "{outcome:?}");
    }
}

/// Sends it all, and waits for the codes of the outcomes.
async fn codes(address: SocketAddr, form: Form, body: &[u8]) -> Vec<String> {
    let (mut writer, mut outcomes) = begin(address, form).await;
    writer.chunk(body).await.unwrap();
    // The server may have hung up already.
    let _ = writer.end().await;
    let mut codes = Vec::new();
    while let Some(outcome) = outcomes.next().await {
        codes.push(outcome["problem"]["code"].as_str().unwrap_or("ok").to_owned());
    }
    codes
}

// ---- appends

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_appends_on_one_connection_are_answered_in_their_order_while_more_are_sent() {
    const MESSAGES: u64 = 8_000;
    let node = Node::start(|_| {}).await;
    for form in FORMS {
        let id = |n: u64| format!("{form:?}-{}", n * n % 31);
        let appends: Vec<Value> = (0..MESSAGES).map(|n| append(&id(n), &n.to_string(), 1)).collect();
        let (mut writer, mut outcomes) = begin(node.address(), form).await;
        let sending = tokio::spawn(async move {
            for some in appends.chunks(100) {
                writer.chunk(&form.all(some)).await.unwrap();
            }
            writer.end().await.unwrap();
            writer
        });
        let mut versions = BTreeMap::new();
        for n in 0..MESSAGES {
            let version = versions.entry(id(n)).or_insert(0);
            *version += 1;
            assert_eq!(outcomes.version().await, *version, "message {n} of {}", id(n));
        }
        outcomes.assert_end().await;
        sending.await.unwrap();
        for (entity, version) in versions {
            let found: Vec<String> = history(node.address(), &entity)
                .await
                .iter()
                .map(|event| event["data"]["key"].as_str().unwrap().to_owned())
                .collect();
            let expected: Vec<String> = (0..MESSAGES).filter(|n| id(*n) == entity).map(|n| n.to_string()).collect();
            assert_eq!((found.len() as u64, found), (version, expected), "{entity}");
        }
    }
    node.stop().await;
}

/// The server reads no more than `stream_in_flight_max` messages ahead of who reads outcomes, and goes on when they are read.
#[tokio::test(flavor = "multi_thread")]
async fn who_sends_everything_before_it_reads_anything_is_answered_everything() {
    let node = Node::start(|config| config.stream_in_flight_max = 64).await;
    for form in FORMS {
        let appends: Vec<Value> =
            (0..3_000).map(|n| append(&format!("{form:?}-{}", n % 7), &n.to_string(), 1)).collect();
        let (mut writer, mut outcomes) = begin(node.address(), form).await;
        // What the server does not read is kept by the system: less than it takes.
        writer.chunk(&form.all(&appends)).await.unwrap();
        writer.end().await.unwrap();
        for n in 0..3_000 {
            assert_eq!(outcomes.version().await, n / 7 + 1);
        }
        outcomes.assert_end().await;
    }
    node.stop().await;
}

#[tokio::test]
async fn a_message_that_is_refused_is_told_by_its_number_and_those_behind_it_are_done() {
    let node = Node::start(|_| {}).await;
    for form in FORMS {
        let (id, other) = (&*format!("{form:?}"), &*format!("{form:?}-other"));
        let without = |field: &str| {
            let mut append = append(id, "x", 1);
            append.as_object_mut().unwrap().remove(field);
            append
        };
        let with = |field: &str, value: Value| {
            let mut append = append(id, "x", 1);
            append[field] = value;
            append
        };
        let cases = [
            (append(id, "a", 1), "ok"),
            (without("key"), "invalid_body"),
            (without("kind"), "invalid_body"),
            (without("id"), "invalid_body"),
            (without("events"), "invalid_body"),
            (with("key", json!("")), "invalid_key"),
            (with("key", json!("k".repeat(257))), "invalid_key"),
            (with("key", json!(7)), "invalid_body"),
            (with("kind", json!("7")), "invalid_kind"),
            (with("kind", json!("kuma.audit")), "reserved_kind"),
            (with("id", json!("")), "invalid_id"),
            (with("events", json!([])), "empty_append"),
            (with("what", json!(1)), "invalid_body"),
            (with("events", json!([{"type": "", "data": 1}])), "invalid_event"),
            (expecting(append(id, "x", 1), 7), "wrong_version"),
            (append(id, "a", 2), "key_reused"),
            (append(other, "b", 1), "ok"),
            // Nothing of those that were refused was done: their key is free.
            (append(id, "x", 1), "ok"),
        ];
        let body = form.all(cases.iter().map(|(append, _)| append));
        let expected: Vec<&str> = cases.iter().map(|(_, code)| *code).collect();
        assert_eq!(codes(node.address(), form, &body).await, expected, "{form:?}");
        assert_eq!(history(node.address(), id).await.len(), 2);
        assert_eq!(history(node.address(), other).await.len(), 1);
    }
    // What is no JSON at all ends at the end of its line.
    let good = Form::Lines.message(&append("j", "a", 1));
    let body = [&good[..], b"what?\n\xff\xfe\n{\"kind\":\n[1]\n\n  \r\n", &good].concat();
    let expected = ["ok", "invalid_body", "invalid_body", "invalid_body", "invalid_body", "ok"];
    assert_eq!(codes(node.address(), Form::Lines, &body).await, expected);
    node.stop().await;
}

#[tokio::test]
async fn an_expected_version_is_compared_with_what_stands_before_it_in_the_stream() {
    let node = Node::start(|_| {}).await;
    for form in FORMS {
        let id = &*format!("{form:?}");
        // Sent at once: each expects what the one before it makes.
        let mut appends: Vec<Value> = (0..50).map(|n| expecting(append(id, &n.to_string(), 2), 2 * n)).collect();
        // The 21st is refused, and with it all that count on it; what expects nothing is done.
        appends[20]["expected_version"] = 7.into();
        appends.push(append(id, "last", 1));
        let (mut writer, mut outcomes) = begin(node.address(), form).await;
        writer.chunk(&form.all(&appends)).await.unwrap();
        writer.end().await.unwrap();
        for n in 0..20 {
            assert_eq!(outcomes.version().await, 2 * n + 2);
        }
        for n in 20..50 {
            let outcome = outcomes.next().await.unwrap();
            let problem = &outcome["problem"];
            assert_eq!((&problem["code"], &problem["actual_version"]), (&json!("wrong_version"), &json!(40)), "{n}");
        }
        assert_eq!(outcomes.version().await, 41);
        outcomes.assert_end().await;
    }
    node.stop().await;
}

/// In MessagePack nothing says where the next message begins, once one is none.
#[tokio::test]
async fn message_pack_that_is_none_ends_the_stream_behind_what_was_answered() {
    let node = Node::start(|_| {}).await;
    let pack = |key: &str| Form::Pack.message(&append("p", key, 1));
    for (what, broken) in [
        ("a byte that means nothing", &b"\xc1"[..]),
        ("such a byte within a map", b"\x81\xa1a\xc1"),
        ("a line of JSON", b"{\"kind\": \"ledger\"}\n"),
        ("a number", b"\x07"),
    ] {
        let body = [pack("a"), pack("b"), broken.to_vec(), pack(what)].concat();
        assert_eq!(codes(node.address(), Form::Pack, &body).await, ["ok", "ok", "invalid_body"], "{what}");
    }
    // A message that ends too early, and one that is too large.
    let half = pack("half");
    let body = [&pack("a")[..], &half[..half.len() - 1]].concat();
    assert_eq!(codes(node.address(), Form::Pack, &body).await, ["ok", "invalid_body"]);
    let body = [&pack("a")[..], b"\x81\xa1a\xdb\xff\xff\xff\xff", &vec![b'x'; 17 << 20]].concat();
    let (mut writer, mut outcomes) = begin(node.address(), Form::Pack).await;
    let sending = tokio::spawn(async move { writer.chunk(&body).await });
    assert_eq!((outcomes.code().await, outcomes.code().await), ("ok".to_owned(), "body_too_large".to_owned()));
    outcomes.assert_end().await;
    drop(sending);
    assert_eq!(history(node.address(), "p").await.len(), 2, "a and b, once each");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_client_that_goes_away_what_was_told_is_there_and_nothing_is_half_there() {
    let node = Node::start(|_| {}).await;
    for (form, round) in FORMS.into_iter().flat_map(|form| (0..5).map(move |round| (form, round))) {
        let id = &*format!("{form:?}-{round}");
        let appends: Vec<Value> = (0..400).map(|n| append(id, &n.to_string(), 3)).collect();
        let (mut writer, mut outcomes) = begin(node.address(), form).await;
        writer.chunk(&form.all(&appends)).await.unwrap();
        let half = form.message(&append(id, "half", 3));
        writer.chunk(&half[..half.len() - 1]).await.unwrap();
        let told = 1 + round * 90;
        for n in 0..told {
            assert_eq!(outcomes.version().await, 3 * (n + 1));
        }
        drop((writer, outcomes));
        // What is on its way may still land. Whenever one looks, it is whole.
        let mut last = 0;
        until("nothing comes any more", async || {
            let now = history(node.address(), id).await.len();
            let is_same = now == last;
            last = now;
            is_same
        })
        .await;
        let found = history(node.address(), id).await;
        assert!(found.len() as u64 >= 3 * told, "{id}: {told} were told, {} are there", found.len());
        for (event, at) in found.iter().zip(0..) {
            assert_eq!(event["data"], json!({"key": (at / 3).to_string(), "part": at % 3}), "{id}");
        }
        assert_eq!(found.len() % 3, 0);
        // The rest, with all of it: as if nothing had happened.
        assert_eq!(codes(node.address(), form, &form.all(&appends)).await, vec!["ok"; 400]);
        assert_eq!(history(node.address(), id).await.len(), 1200);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_answers_what_it_has_read_of_a_stream_and_says_that_it_stops() {
    for form in FORMS {
        let node = Node::start(|_| {}).await;
        let address = node.address();
        let told = Arc::new(AtomicU64::new(0));
        let (mut writer, mut outcomes) = begin(address, form).await;
        let (mut idle_writer, mut idle) = begin(address, form).await;
        idle_writer.chunk(&form.message(&append("idle", "a", 1))).await.unwrap();
        assert_eq!(idle.version().await, 1);
        let sending = tokio::spawn(async move {
            let mut n = 0;
            // Until it is hung up on.
            while writer.chunk(&form.message(&append(&format!("e-{}", n % 5), &n.to_string(), 2))).await.is_ok() {
                n += 1;
                tokio::task::yield_now().await;
            }
        });
        let counted = told.clone();
        let reading = tokio::spawn(async move {
            loop {
                let outcome = outcomes.next().await.expect("the stream says how it ends");
                if let Some(problem) = outcome.get("problem") {
                    assert_eq!((&problem["code"], &problem["retry_safe"]), (&json!("stopping"), &json!(true)));
                    outcomes.assert_end().await;
                    return;
                }
                let n = counted.fetch_add(1, SeqCst);
                assert_eq!(outcome["version"], 2 * (n / 5 + 1), "message {n}");
            }
        });
        until("some are answered", async || told.load(SeqCst) > 100).await;
        let dir = node.stop().await;
        soon("the stream ends", reading).await.unwrap();
        assert_eq!(idle.code().await, "stopping");
        idle.assert_end().await;
        sending.abort();
        let _ = sending.await;
        // What was answered is there, and nothing else: the first message that was not read is the one that was refused.
        let (told, node) = (told.load(SeqCst), Node::in_directory(dir, |_| {}).await);
        for entity in 0..5 {
            let found = history(node.address(), &format!("e-{entity}")).await;
            let keys = (entity..told).step_by(5).flat_map(|n| [n.to_string(), n.to_string()]);
            assert!(found.iter().map(|event| event["data"]["key"].as_str().unwrap()).eq(keys), "{form:?}: e-{entity}");
        }
        node.stop().await;
    }
}

// ---- subscriptions

/// A message of a subscription.
#[derive(Clone, Debug)]
struct Said {
    event: String,
    data: Value,
}

impl Said {
    /// Where its commit stands.
    fn commit(&self) -> (u64, u64) {
        (self.data["slot"].as_u64().unwrap(), self.data["seq"].as_u64().unwrap())
    }

    /// Different for each event of the store.
    fn name(&self) -> (String, u64, u64) {
        let number = |field: &str| self.data[field].as_u64().unwrap();
        (self.data["entity"].as_str().unwrap().to_owned(), number("life"), number("version"))
    }
}

struct Follower {
    reader: Reader,
    /// Open as long as it follows.
    _writer: Writer,
    last_id: String,
    comments: Vec<String>,
}

impl Follower {
    /// Subscribes, and returns when the subscription stands.
    async fn open(
        address: SocketAddr,
        query: &str,
        last_id: Option<&str>,
    ) -> std::io::Result<Result<Follower, Answer>> {
        let (mut writer, mut reader) = connect(address).await?;
        let headers: Vec<(&str, &str)> = last_id.map(|id| ("Last-Event-ID", id)).into_iter().collect();
        writer.whole("GET", &format!("/v1/events{query}"), &headers, b"").await?;
        let mut head = reader.head().await?;
        if head.status != 200 {
            while let Some(piece) = reader.piece().await? {
                head.body.extend(piece);
            }
            return Ok(Err(head));
        }
        assert_eq!(head.header("content-type"), Some("text/event-stream"));
        let last_id = last_id.unwrap_or_default().to_owned();
        let mut follower = Follower { reader, _writer: writer, last_id, comments: Vec::new() };
        // The first block has an id and no message.
        while follower.comments.is_empty() {
            follower.block().await?;
        }
        Ok(Ok(follower))
    }

    async fn to(node: &Node, query: &str) -> Follower {
        soon("the subscription stands", Follower::open(node.address(), query, None)).await.unwrap().unwrap()
    }

    /// One block of lines; the outer none is the end of the stream.
    async fn block(&mut self) -> std::io::Result<Option<Option<Said>>> {
        let (mut id, mut event, mut data) = (None, None, None);
        loop {
            let Some(line) = self.reader.line().await? else { return Ok(None) };
            if line.is_empty() {
                break;
            }
            match line.split_once(": ").unwrap_or((&line, "")) {
                ("", comment) => self.comments.push(comment.to_owned()),
                ("id", value) => id = Some(value.to_owned()),
                ("event", value) => event = Some(value.to_owned()),
                ("data", value) => data = Some(serde_json::from_str(value).unwrap()),
                ("retry", value) => assert_eq!(value, "1000"),
                _ => panic!("{line}"),
            }
        }
        // Only what is whole counts.
        self.last_id = id.unwrap_or(std::mem::take(&mut self.last_id));
        Ok(Some(event.zip(data).map(|(event, data)| Said { event, data })))
    }

    /// The next message; none at the end of the stream.
    async fn try_next(&mut self) -> std::io::Result<Option<Said>> {
        loop {
            match self.block().await? {
                Some(Some(said)) => return Ok(Some(said)),
                Some(None) => {}
                None => return Ok(None),
            }
        }
    }

    #[track_caller]
    fn next(&mut self) -> impl Future<Output = Said> {
        let from = std::panic::Location::caller();
        async move {
            let said = soon("one more message", self.try_next()).await.unwrap();
            said.unwrap_or_else(|| panic!("{from}: the subscription has ended"))
        }
    }

    /// The types of the next so many events.
    async fn types(&mut self, count: usize) -> Vec<String> {
        let mut types = Vec::new();
        for _ in 0..count {
            let said = self.next().await;
            types.push(said.data["type"].as_str().unwrap_or(&said.event).to_owned());
        }
        types
    }
}

async fn post(address: SocketAddr, kind: &str, id: &str, event: &str) {
    let body = json!({"type": event, "data": {"id": id}}).to_string();
    let answer = Client::new(address).post(&format!("/v1/entities/{kind}/{id}/events"), &body).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_that_is_cut_and_goes_on_at_its_last_id_misses_nothing() {
    const COMMITS: u64 = 600;
    let seed = seed("a_subscription_that_is_cut_and_goes_on_at_its_last_id_misses_nothing");
    let node = Node::start(|_| {}).await;
    let address = node.address();
    let proxy = Proxy::start(address, seed, 6 << 10).await;
    // A half is there, and a half comes while it is followed.
    let appends: Vec<Value> =
        (0..COMMITS).map(|n| append(&format!("e-{}", n % 5), &n.to_string(), 1 + n % 4)).collect();
    let all: u64 = (0..COMMITS).map(|n| 1 + n % 4).sum();
    let (first, second) = appends.split_at(appends.len() / 2);
    assert_eq!(codes(address, Form::Lines, &Form::Lines.all(first)).await, vec!["ok"; first.len()]);
    let second = second.to_vec();
    let appending = tokio::spawn(async move {
        for some in second.chunks(10) {
            assert_eq!(codes(address, Form::Lines, &Form::Lines.all(some)).await, vec!["ok"; some.len()]);
        }
    });
    let (mut found, mut versions, mut whole) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    let (mut last_id, mut repeated, since) = (None::<String>, 0, Instant::now());
    while found.len() < all as usize {
        assert!(since.elapsed() < http::LONG, "{} of {all} came", found.len());
        let Ok(opened) = Follower::open(proxy.address, "?from=beginning", last_id.as_deref()).await else { continue };
        let mut follower = opened.unwrap();
        while found.len() < all as usize
            && let Ok(said) = follower.try_next().await
        {
            let said = said.expect("the server does not end it");
            assert_eq!(said.event, "event");
            // What came to its end does not come again, and what was cut apart comes again from its beginning.
            assert!(!whole.contains(&said.commit()), "{said:?} comes again");
            let (key, part) = (said.data["data"]["key"].as_str().unwrap(), said.data["data"]["part"].as_u64().unwrap());
            if part == key.parse::<u64>().unwrap() % 4 {
                whole.insert(said.commit());
            }
            if found.insert(said.name(), said.data.clone()).is_some() {
                repeated += 1;
                continue;
            }
            let version = versions.entry(said.data["id"].to_string()).or_insert(0);
            *version += 1;
            assert_eq!(said.data["version"], *version, "in their order, and none is missing: {said:?}");
        }
        last_id = Some(follower.last_id);
    }
    appending.await.unwrap();
    println!("{} connections, {repeated} of {all} events twice, cut: {:?}", proxy.connections(), proxy.cuts());
    assert!(proxy.connections() > 20 && repeated > 0);
    for entity in 0..5 {
        let history = history(address, &format!("e-{entity}")).await;
        let of_it = found.values().filter(|event| event["id"] == format!("e-{entity}")).map(|event| &event["data"]);
        assert!(history.iter().map(|event| &event["data"]).eq(of_it), "e-{entity}");
    }
    node.stop().await;
}

#[tokio::test]
async fn a_subscription_is_told_of_the_kinds_and_events_that_it_asks_for() {
    let node = Node::start(|_| {}).await;
    let address = node.address();
    let queries = ["?kind=order", "?event=order.Paid&event=account.v2.Opened", "?kind=account.v2&event=order.Paid", ""];
    let mut followers = Vec::new();
    for query in queries {
        followers.push(Follower::to(&node, query).await);
    }
    for (kind, event) in [
        ("order", "Placed"),
        ("account.v2", "Opened"),
        ("order", "Paid"),
        ("account.v2", "Closed"),
        ("account", "Opened"),
    ] {
        post(address, kind, "e", event).await;
    }
    let expected = [
        vec!["order.Paid", "order.Placed"],
        vec!["account.v2.Opened", "order.Paid"],
        vec!["account.v2.Closed", "account.v2.Opened", "order.Paid"],
        vec!["account.Opened", "account.v2.Closed", "account.v2.Opened", "order.Paid", "order.Placed"],
    ];
    for (follower, expected) in followers.iter_mut().zip(&expected) {
        let mut found = Vec::new();
        // Between entities there is no order.
        for _ in 0..expected.len() {
            let said = follower.next().await;
            found.push(format!("{}.{}", said.data["kind"].as_str().unwrap(), said.data["type"].as_str().unwrap()));
        }
        found.sort();
        assert_eq!(found, *expected);
    }
    // What is behind is what comes next: nothing else stood between.
    post(address, "order", "e", "Paid").await;
    for follower in &mut followers {
        assert_eq!(follower.types(1).await, ["Paid"]);
    }
    // Filters that are none.
    for query in ["?kind=kuma.audit", "?event=order", "?entity=order", "?from=yesterday", "?from=now&from=now"] {
        let refused = Follower::open(address, query, None).await.unwrap();
        let Err(answer) = refused else { panic!("{query} is taken") };
        assert!([400, 403].contains(&answer.refusal().0), "{query}");
    }
    let Err(answer) = Follower::open(address, "", Some("what?")).await.unwrap() else { panic!("it is taken") };
    assert_eq!(answer.refusal(), (400, "invalid_checkpoint".to_owned()));
    node.stop().await;
}

#[tokio::test]
async fn a_subscription_begins_where_it_is_told_to() {
    let node = Node::start(|_| {}).await;
    let address = node.address();
    for event in ["First", "Second", "Third"] {
        post(address, "order", "o", event).await;
    }
    let at = Client::new(address).get("/v1/entities/order/o/events").await.json()["events"][1]["at"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut now = Follower::to(&node, "").await;
    let mut also_now = Follower::to(&node, "?from=now").await;
    let mut beginning = Follower::to(&node, "?from=beginning").await;
    let mut time = Follower::to(&node, &format!("?from={at}")).await;
    // A time far behind, in another zone.
    let mut past = Follower::to(&node, "?from=1999-01-01T00:00:00%2B02:00").await;
    assert_eq!(beginning.types(1).await, ["First"]);
    let mut checkpoint = Follower::to(&node, &format!("?from={}", beginning.last_id)).await;
    // The header counts more than `from`.
    let last_id = beginning.last_id.clone();
    let header = Follower::open(address, "?from=now", Some(&last_id)).await.unwrap();
    post(address, "order", "o", "Fourth").await;
    assert_eq!(now.types(1).await, ["Fourth"]);
    assert_eq!(also_now.types(1).await, ["Fourth"]);
    assert_eq!(beginning.types(3).await, ["Second", "Third", "Fourth"]);
    assert_eq!(time.types(3).await, ["Second", "Third", "Fourth"]);
    assert_eq!(past.types(4).await, ["First", "Second", "Third", "Fourth"]);
    assert_eq!(checkpoint.types(3).await, ["Second", "Third", "Fourth"]);
    assert_eq!(header.unwrap().types(3).await, ["Second", "Third", "Fourth"]);
    // Where a subscription stands that has come across nothing yet is where it goes on.
    let idle = Follower::to(&node, "?event=order.Fifth").await.last_id;
    post(address, "order", "o", "Fifth").await;
    let mut resumed = Follower::open(address, "?event=order.Fifth", Some(&idle)).await.unwrap().unwrap();
    assert_eq!(resumed.types(1).await, ["Fifth"]);
    // A checkpoint of another store.
    let other = Node::start(|_| {}).await;
    let Err(answer) = Follower::open(other.address(), "", Some(&last_id)).await.unwrap() else { panic!("it is taken") };
    assert_eq!(answer.refusal(), (409, "invalid_checkpoint".to_owned()));
    other.stop().await;
    node.stop().await;
}

#[tokio::test]
async fn of_an_erased_entity_only_the_erasure_is_told() {
    let node = Node::start(|_| {}).await;
    let (address, mut client) = (node.address(), node.client());
    let mut live = Follower::to(&node, "").await;
    for event in ["First", "Second"] {
        post(address, "order", "gone", event).await;
    }
    let entity = live.next().await.data["entity"].as_str().unwrap().to_owned();
    assert_eq!(live.types(1).await, ["Second"]);
    let before = live.last_id.clone();
    let answer = client.send("DELETE", "/v1/entities/order/gone?reason=r", &[], b"").await;
    let receipt = answer.json()["receipt"]["id"].as_str().unwrap().to_owned();
    let told = json!({"entity": entity, "kind": "order", "life": 1, "receipt": receipt});
    // To who is there, to who was there, and to who comes later.
    let said = live.next().await;
    assert_eq!((said.event.as_str(), &said.data), ("erased", &told));
    let mut resumed = Follower::open(address, "", Some(&before)).await.unwrap().unwrap();
    let said = resumed.next().await;
    assert_eq!((said.event.as_str(), &said.data), ("erased", &told));
    assert_eq!(client.post("/v1/entities/order/gone/recreate", r#"{"reason":"r"}"#).await.status, 200);
    post(address, "order", "gone", "Third").await;
    let mut late = Follower::to(&node, "?from=beginning&kind=order").await;
    for follower in [&mut live, &mut resumed, &mut late] {
        let mut said = follower.next().await;
        if said.event == "erased" {
            // Who comes later need not be told what it never had; if it is, then before the next life.
            assert_eq!(said.data, told);
            said = follower.next().await;
        }
        assert_eq!(
            (&said.data["type"], &said.data["life"], &said.data["version"]),
            (&json!("Third"), &json!(2), &json!(1))
        );
    }
    node.stop().await;
}

#[tokio::test]
async fn a_subscription_on_which_nothing_happens_gives_a_sign_of_life() {
    let node = Node::start(|_| {}).await;
    let mut follower = Follower::to(&node, "?kind=order").await;
    // What it did not ask for is none.
    post(node.address(), "account", "a", "Opened").await;
    while follower.comments.len() < 2 {
        assert!(soon("a sign of life", follower.block()).await.unwrap().is_some_and(|said| said.is_none()));
    }
    assert_eq!(follower.comments, ["kuma", "still here"]);
    post(node.address(), "order", "o", "Placed").await;
    assert_eq!(follower.types(1).await, ["Placed"]);
    node.stop().await;
}

/// It falls behind in the log, not in the memory of the server.
#[tokio::test(flavor = "multi_thread")]
async fn who_reads_slowly_is_told_everything_and_costs_no_memory() {
    const EVENTS: u64 = 100;
    let node = NodeProcess::start(&[]).await;
    let mut client = node.client();
    let mut slow = Vec::new();
    for _ in 0..8 {
        slow.push(Follower::open(node.address, "", None).await.unwrap().unwrap());
    }
    let filler = "x".repeat(256 << 10);
    let append = async |client: &mut Client, n: u64| {
        let body = json!({"type": "Noted", "data": {"n": n, "filler": filler}}).to_string();
        assert_eq!(client.post(&path("e"), &body).await.status, 201);
    };
    for n in 0..10 {
        append(&mut client, n).await;
    }
    node.forget_rss_peak();
    let before = node.rss();
    for n in 10..EVENTS {
        append(&mut client, n).await;
    }
    let grown = node.rss_peak().saturating_sub(before);
    // All of it, once for each, would be 200 MiB.
    assert!(grown < 100 << 20, "{} MiB", grown >> 20);
    for follower in &mut slow {
        for n in 0..EVENTS {
            assert_eq!(follower.next().await.data["data"]["n"], n);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_ends_its_subscriptions_and_they_go_on_where_they_were() {
    let node = Node::start(|_| {}).await;
    let address = node.address();
    let mut idle = Follower::to(&node, "?kind=nothing").await;
    let mut follower = Follower::to(&node, "?from=beginning").await;
    let mut found = Vec::new();
    let told = Arc::new(AtomicU64::new(0));
    let counted = told.clone();
    let appending = tokio::spawn(async move {
        let mut client = Client::new(address);
        for n in 0.. {
            let body = json!({"type": "Noted", "data": n}).to_string();
            match client.try_send("POST", &path(&format!("e-{}", n % 3)), &[JSON], body.as_bytes()).await {
                Ok(answer) if answer.status == 201 => counted.fetch_add(1, SeqCst),
                _ => return,
            };
        }
    });
    let following = tokio::spawn(async move {
        while let Some(said) = follower.try_next().await.unwrap() {
            found.push(said);
        }
        (found, follower.last_id)
    });
    until("some are there", async || told.load(SeqCst) > 50).await;
    let dir = node.stop().await;
    // They end as they should: with the last chunk.
    assert!(soon("the end", idle.try_next()).await.unwrap().is_none());
    let (mut found, last_id) = soon("the end", following).await.unwrap();
    soon("the appends end", appending).await.unwrap();
    let node = Node::in_directory(dir, |_| {}).await;
    for entity in 0..3 {
        post(node.address(), "ledger", &format!("e-{entity}"), "Last").await;
    }
    let mut follower = Follower::open(node.address(), "", Some(&last_id)).await.unwrap().unwrap();
    let mut last = 0;
    while last < 3 {
        let said = follower.next().await;
        last += usize::from(said.data["type"] == "Last");
        found.push(said);
    }
    let mut all = 0;
    for entity in 0..3 {
        let id = format!("e-{entity}");
        let expected: Vec<u64> = (1..=history(node.address(), &id).await.len() as u64).collect();
        let of_it =
            found.iter().filter(|said| said.data["id"] == id).map(|said| said.data["version"].as_u64().unwrap());
        assert_eq!(of_it.collect::<Vec<_>>(), expected, "{id}");
        all += expected.len() as u64;
    }
    assert!(all >= told.load(SeqCst) + 3);
    node.stop().await;
}

/// As the command line follows: by the client, which goes on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_follows_through_cuts_and_another_server() {
    let seed = seed("the_client_follows_through_cuts_and_another_server");
    let node = Node::start(|_| {}).await;
    let proxy = Proxy::cutting(node.address(), seed, 8 << 10, 4).await;
    let appends: Vec<Value> = (0..200).map(|n| append("e", &n.to_string(), 2)).collect();
    let (first, second) = appends.split_at(100);
    assert_eq!(codes(node.address(), Form::Lines, &Form::Lines.all(first)).await, vec!["ok"; 100]);
    let options = ClientOptions { url: format!("http://{}", proxy.address), ..ClientOptions::default() };
    let client = kuma_node::Client::new(&options).unwrap();
    let mut subscription = client.subscribe(&["ledger".to_owned()], &[], Begin::Beginning);
    let (mut found, mut cuts) = (BTreeSet::new(), 0);
    let mut follow = async |until: usize| {
        while found.len() < until {
            match soon("the next step", subscription.next()).await {
                Ok(SubscriptionStep::Message(message)) => {
                    let data: Value = serde_json::from_str(&message.data).unwrap();
                    let version = data["version"].as_u64().unwrap();
                    let is_next = found.last().map_or(1, |last| last + 1) == version;
                    // The first of a commit may come again, if it was cut behind it.
                    assert!(is_next || (found.last() == Some(&version) && version % 2 == 1), "{version}");
                    found.insert(version);
                }
                Ok(SubscriptionStep::Connected) => {}
                Ok(SubscriptionStep::Lost { .. }) => cuts += 1,
                // Nobody was there the first time.
                Err(error) => assert!(error.is_unavailable() && found.is_empty(), "{error}"),
            }
        }
    };
    follow(200).await;
    let node = Node::in_directory(node.stop().await, |_| {}).await;
    proxy.point_to(node.address());
    assert_eq!(codes(node.address(), Form::Lines, &Form::Lines.all(second)).await, vec!["ok"; 100]);
    follow(400).await;
    println!("{cuts} times lost, cut: {:?}", proxy.cuts());
    assert!(cuts > 0);
    node.stop().await;
}
