//! Servers in a cluster: any of them answers any request of an entity, whoever owns it, and operators see and move what there is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
use kuma_cluster::{Answer, Answered, AskError, Asked, Cookie, NodeOptions, Repeat};
use kuma_core::slot_of;
use kuma_node::{
    Config, Server,
    tokens::{Scope, TokenFile},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    common::directory,
    http::{Answer as Said, Client, JSON, LINES, Node, connect},
};

/// Longer than anything takes: thousands of slots move.
const LONG: Duration = Duration::from_secs(240);

/// Servers with one cookie.
struct Cluster {
    cookie: TempDir,
    nodes: Vec<Node>,
}

impl Cluster {
    async fn found(change: impl FnOnce(&mut Config)) -> Cluster {
        let cookie = directory();
        write_cookie(&cookie.path().join("cookie"), &Cookie::generate().unwrap());
        let mut cluster = Cluster { cookie, nodes: Vec::new() };
        cluster.join("a", change).await;
        cluster
    }

    /// Three servers, all slots where they should be.
    async fn of_three() -> Cluster {
        let mut cluster = Cluster::found(|_| {}).await;
        cluster.join("b", |_| {}).await;
        cluster.join("c", |_| {}).await;
        cluster.settled().await;
        cluster
    }

    fn cookie_file(&self) -> std::path::PathBuf {
        self.cookie.path().join("cookie")
    }

    fn config(&self, config: &mut Config, name: &str) {
        config.cookie_file = Some(self.cookie_file());
        config.cluster_listen = Some((Ipv4Addr::LOCALHOST, 0).into());
        config.node_name = Some(name.to_owned());
        match self.nodes.first() {
            None => config.found = true,
            Some(first) => config.seeds = vec![first.server.cluster().unwrap().address().to_string()],
        }
    }

    async fn join(&mut self, name: &str, change: impl FnOnce(&mut Config)) {
        let node = Node::start(|config| {
            self.config(config, name);
            change(config);
        });
        let node = node.await;
        soon("the node is ready", async || node.server.cluster().unwrap().is_ready()).await;
        self.nodes.push(node);
    }

    /// Waits until every slot is where it should be, and every node has heard of it.
    async fn settled(&self) {
        soon("all slots are where they should be", async || {
            self.nodes.iter().all(|node| {
                let node = node.server.cluster().unwrap();
                let plan = node.plan();
                node.members().len() == self.nodes.len()
                    && node
                        .members()
                        .iter()
                        .all(|member| member.is_up && member.standing == kuma_cluster::Standing::Member)
                    && plan.moves.is_empty()
                    && plan.without_owner.is_empty()
                    && node.is_settled()
            })
        })
        .await;
    }

    fn name(&self, index: usize) -> String {
        self.nodes[index].server.cluster().unwrap().name()
    }

    /// An id whose entity the node owns.
    fn id_of(&self, owner: usize, kind: &str, prefix: &str) -> String {
        let node = self.nodes[owner].server.cluster().unwrap();
        (0..).map(|n| format!("{prefix}-{n}")).find(|id| node.is_here(slot_of(kind, id))).unwrap()
    }

    async fn stop(self) {
        for node in self.nodes {
            node.stop().await;
        }
    }
}

fn write_cookie(path: &Path, cookie: &Cookie) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, cookie.to_text().as_bytes()).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

async fn soon(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, wait).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

fn event(name: &str, data: Value) -> String {
    json!({ "type": name, "data": data }).to_string()
}

async fn send(node: &Node, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Said {
    node.client().send(method, path, headers, body).await
}

/// `kuma-node` against a server.
async fn cli(node: &Node, arguments: &[&str]) -> (i32, String, String) {
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_cli_child"))
        .args(arguments)
        .env("KUMA_URL", node.server.url())
        .env_remove("KUMA_TOKEN")
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(LONG, output).await.expect("the command takes too long").unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_server_answers_every_request_of_an_entity_whoever_owns_it() {
    let cluster = Cluster::of_three().await;
    let [a, b, c] = &cluster.nodes[..] else { panic!("three nodes") };
    every_request_through_another_node(&cluster, b, c).await;
    retries_through_any_node_happen_once(&cluster, [a, b, c]).await;
    long_answers_come_whole(&cluster, b).await;
    a_subscription_has_the_events_of_all_servers(&cluster, [a, b, c]).await;
    operators_see_the_cluster(&cluster, [a, b, c]).await;
    cluster.stop().await;
}

/// Asks `b` and `c` for what `a` owns.
async fn every_request_through_another_node(cluster: &Cluster, b: &Node, c: &Node) {
    let id = cluster.id_of(0, "order", "o");
    let path = format!("/v1/entities/order/{id}");
    let events = format!("{path}/events");
    let absent = send(b, "GET", &path, &[], b"").await;
    assert_eq!(absent.refusal(), (404, "never_written".to_owned()));

    let placed = send(b, "POST", &events, &[JSON], event("Placed", json!({ "total": 1 })).as_bytes()).await;
    assert_eq!((placed.status, placed.json()), (201, json!({ "version": 1, "repeated": false })), "{placed:?}");
    assert_eq!(placed.header("etag"), Some("\"1\""));
    let id_of_request = ("X-Request-Id", "of-this-test");
    let stale =
        send(c, "POST", &events, &[JSON, ("If-Match", "\"7\""), id_of_request], event("Paid", json!({})).as_bytes())
            .await;
    assert_eq!(stale.refusal(), (412, "wrong_version".to_owned()));
    assert_eq!(
        (stale.json()["actual_version"].clone(), stale.json()["request_id"].clone()),
        (json!(1), json!("of-this-test"))
    );
    assert_eq!(stale.header("x-request-id"), Some("of-this-test"));
    let paid =
        send(c, "POST", &events, &[JSON, ("If-Match", "\"1\"")], event("Paid", json!({ "paid": true })).as_bytes())
            .await;
    assert_eq!((paid.status, paid.json()["version"].clone()), (201, json!(2)));
    let taken = send(c, "POST", &events, &[JSON, ("If-None-Match", "*")], event("Placed", json!({})).as_bytes()).await;
    assert_eq!(taken.refusal(), (412, "wrong_version".to_owned()));
    let no_json = send(b, "POST", &events, &[JSON], b"{\"type\":").await;
    assert_eq!(no_json.refusal(), (400, "invalid_body".to_owned()));
    let packed = send(b, "POST", &events, &[("Content-Type", "text/plain")], b"x").await;
    assert_eq!(packed.refusal(), (415, "unsupported_media_type".to_owned()));

    for node in [b, c] {
        let read = async |rest: &str| send(node, "GET", &format!("{path}{rest}"), &[], b"").await;
        assert_eq!(read("").await.json()["state"], json!({ "total": 1, "paid": true }));
        assert_eq!(read("?version=1").await.json()["state"], json!({ "total": 1 }));
        assert_eq!(read("?version=9").await.refusal(), (404, "no_such_version".to_owned()));
        assert_eq!(read("?at=2000-01-01T00:00:00Z").await.refusal(), (404, "never_written".to_owned()));
        assert_eq!(read("?what=1").await.refusal(), (400, "invalid_query_string".to_owned()));
        let page = read("/events?limit=1").await.json();
        assert_eq!((page["events"].as_array().unwrap().len(), &page["next"]), (1, &json!(2)));
        assert_eq!(read("/diff?from=1").await.json()["changes"].as_array().unwrap().len(), 1);
        let lines = send(node, "GET", &events, &[("Accept", "application/x-ndjson")], b"").await;
        assert_eq!((lines.header("content-type"), lines.text().lines().count()), (Some("application/x-ndjson"), 2));
        let export = read("/export").await;
        assert!(export.text().lines().last().unwrap().contains("manifest"), "{}", export.text());
        let head = {
            // A HEAD has no body, whatever its head says.
            let (mut writer, mut reader) = connect(node.address()).await.unwrap();
            writer.whole("HEAD", &path, &[], b"").await.unwrap();
            reader.head().await.unwrap()
        };
        assert_eq!((head.status, head.header("etag")), (200, Some("\"2\"")));
    }

    let outcome = send(b, "GET", &format!("{path}/outcome"), &[("Idempotency-Key", "never")], b"").await;
    assert_eq!(outcome.json()["outcome"], "never_seen", "{}", outcome.text());
    let erased = send(c, "DELETE", &format!("{path}?reason=asked+for"), &[], b"").await;
    assert_eq!(erased.status, 200, "{}", erased.text());
    let receipt = erased.json();
    let again = send(b, "DELETE", &format!("{path}?reason=asked+for"), &[], b"").await;
    assert_eq!(again.json()["receipt"]["id"], receipt["receipt"]["id"]);
    assert_eq!(send(b, "GET", &path, &[], b"").await.refusal(), (410, "erased".to_owned()));
    let reason = json!({ "reason": "came back" }).to_string();
    let life = send(b, "POST", &format!("{path}/recreate"), &[JSON], reason.as_bytes()).await;
    assert_eq!((life.status, life.json()["life"].clone()), (200, json!(2)), "{}", life.text());
    for version in 1..=3 {
        let noted = send(c, "POST", &events, &[JSON], event("Noted", json!({ "n": version })).as_bytes()).await;
        assert_eq!(noted.json()["version"], version);
    }
    let to = json!({ "version": 2, "reason": "a mistake" }).to_string();
    let restored = send(c, "POST", &format!("{path}/restore-to"), &[JSON], to.as_bytes()).await;
    assert_eq!((restored.status, restored.json()["version"].clone()), (200, json!(2)), "{}", restored.text());
    assert_eq!(send(b, "GET", &path, &[], b"").await.json()["state"], json!({ "n": 2 }));
}

async fn retries_through_any_node_happen_once(cluster: &Cluster, nodes: [&Node; 3]) {
    for owner in 0..3 {
        let id = cluster.id_of(owner, "order", "retried");
        let path = format!("/v1/entities/order/{id}/events");
        let key = ("Idempotency-Key", "the-one");
        for round in 0..2 {
            for (n, node) in nodes.iter().enumerate() {
                let answer = send(node, "POST", &path, &[JSON, key], event("Placed", json!({})).as_bytes()).await;
                let is_first = round == 0 && n == 0;
                assert_eq!((answer.status, answer.json()), (201, json!({ "version": 1, "repeated": !is_first })));
            }
        }
        let other =
            send(nodes[(owner + 1) % 3], "POST", &path, &[JSON, key], event("Paid", json!({})).as_bytes()).await;
        assert_eq!(other.refusal(), (422, "key_reused".to_owned()));
        let outcome = format!("/v1/entities/order/{id}/outcome");
        let outcome = send(nodes[(owner + 2) % 3], "GET", &outcome, &[key], b"").await;
        assert_eq!(outcome.json()["version"], 1, "{}", outcome.text());
    }
}

/// What has more bytes than a message between nodes comes in pieces.
async fn long_answers_come_whole(cluster: &Cluster, b: &Node) {
    let id = cluster.id_of(0, "file", "f");
    let path = format!("/v1/entities/file/{id}");
    let text = "x".repeat(1_000_000);
    for n in 0..6 {
        let body = json!({ "events": [{ "type": "Written", "data": { "n": n, "text": text } }] }).to_string();
        let answer = send(b, "POST", &format!("{path}/events"), &[JSON], body.as_bytes()).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
    }
    let lines = send(b, "GET", &format!("{path}/events"), &[("Accept", "application/x-ndjson")], b"").await;
    let numbers: Vec<Value> =
        lines.text().lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["data"]["n"].clone()).collect();
    assert_eq!(numbers, (0..6).map(|n| json!(n)).collect::<Vec<_>>());
    let export = send(b, "GET", &format!("{path}/export"), &[], b"").await;
    assert_eq!(export.text().lines().count(), 7);
    let page = send(b, "GET", &format!("{path}/events?limit=1000"), &[], b"").await.json();
    assert_eq!(page["events"].as_array().unwrap().len(), 6);
    // More than any append: refused where it is asked, or by the owner, and never cut.
    let huge = "x".repeat(15 << 20);
    let body = event("Written", json!({ "text": huge }));
    let answer = send(b, "POST", &format!("{path}/events"), &[JSON], body.as_bytes()).await;
    assert_eq!(answer.status, 413, "{}", answer.text());
}

async fn operators_see_the_cluster(cluster: &Cluster, [a, b, c]: [&Node; 3]) {
    let members = send(b, "GET", "/v1/cluster/members", &[], b"").await.json();
    let names: Vec<&str> =
        members["members"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let owns: u64 = members["members"].as_array().unwrap().iter().map(|one| one["owns"].as_u64().unwrap()).sum();
    assert_eq!(owns, 4096);
    let slots = send(c, "GET", "/v1/cluster/slots?owner=a", &[], b"").await.json();
    assert_eq!(slots["slots"].as_array().unwrap().len() as u64, members["members"][0]["owns"].as_u64().unwrap());
    for (path, code) in [
        ("/v1/cluster/slots?slot=4096", "invalid_slot"),
        ("/v1/cluster/slots?tag=%7B%7D", "invalid_slot"),
        ("/v1/cluster/slots?what=1", "invalid_query_string"),
    ] {
        assert_eq!(send(c, "GET", path, &[], b"").await.refusal(), (400, code.to_owned()), "{path}");
    }
    let health = send(a, "GET", "/health/cluster", &[], b"").await;
    assert_eq!((health.status, health.json()["status"].clone()), (200, json!("ok")), "{}", health.text());
    let status = send(a, "GET", "/v1/status", &[], b"").await.json();
    assert_eq!((&status["cluster"]["node"], &status["cluster"]["members_up"]), (&json!("a"), &json!(3)));

    // What a drained node would leave goes to the others, and is not moved by asking.
    let plan = send(a, "GET", "/v1/cluster/plan", &[], b"").await.json();
    assert_eq!(plan["moves"], 0);
    let plan = send(a, "GET", "/v1/cluster/plan?without=b", &[], b"").await.json();
    assert_eq!(plan["moves"], members["members"][1]["owns"]);
    assert!(plan["flows"].as_array().unwrap().iter().all(|flow| flow["from"] == "b"), "{plan}");

    // A slot goes where it is asked to, with what is in it, and back.
    // All ids with one tag are in one slot: a tag is looked for whose slot is there.
    let id_with = |tag: &String| format!("x{{{tag}}}-1");
    let is_at_a = |tag: &String| a.server.cluster().unwrap().is_here(slot_of("order", &id_with(tag)));
    let tag = (0..).map(|number| format!("tag-{number}")).find(is_at_a).unwrap();
    let id = id_with(&tag);
    let path = format!("/v1/entities/order/{}", id.replace('{', "%7B").replace('}', "%7D"));
    let answer =
        send(b, "POST", &format!("{path}/events"), &[JSON], event("Placed", json!({ "ok": 1 })).as_bytes()).await;
    assert_eq!(answer.status, 201);
    let mut told = Events::open(a.address()).await;
    let (code, _, err) = cli(c, &["migrate", "--tag", &tag, "--to", "c", "--wait"]).await;
    assert_eq!(code, 0, "{err}");
    let slot = slot_of("order", &id);
    assert!(c.server.cluster().unwrap().is_here(slot));
    let moved = told.until("move_done").await;
    assert_eq!((&moved["slot"], &moved["to"], &moved["node"]), (&json!(slot.number()), &json!("c"), &json!("a")));
    assert!(moved["pause_us"].as_u64().is_some());
    for node in [a, b, c] {
        assert_eq!(send(node, "GET", &path, &[], b"").await.json()["state"], json!({ "ok": 1 }));
    }
    let (_, out, _) = cli(b, &["slots", "--tag", &tag, "--json"]).await;
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&shown["slots"][0]["owner"], &shown["slots"][0]["is_pinned"]), (&json!("c"), &json!(true)));
    let (code, ..) = cli(b, &["migrate", "--tag", &tag, "--unpin", "--wait"]).await;
    assert!(code == 0 && a.server.cluster().unwrap().is_here(slot));

    // What does not fit is refused, with nothing changed.
    let refuse =
        async |path: &str, body: Value| send(a, "POST", path, &[JSON], body.to_string().as_bytes()).await.refusal();
    let migrate = "/v1/cluster/migrate";
    assert_eq!(refuse(migrate, json!({ "slot": 1 })).await, (422, "invalid_migration".to_owned()));
    assert_eq!(
        refuse(migrate, json!({ "slot": 1, "tag": "x", "to": "a" })).await,
        (422, "invalid_migration".to_owned())
    );
    assert_eq!(refuse(migrate, json!({ "slot": 1, "to": "nobody" })).await, (409, "refused_by_cluster".to_owned()));
    assert_eq!(refuse("/v1/cluster/forget", json!({ "node": "b" })).await, (409, "refused_by_cluster".to_owned()));
    assert_eq!(
        refuse("/v1/cluster/forget", json!({ "node": "b", "destroyed": true })).await,
        (409, "refused_by_cluster".to_owned())
    );
    assert_eq!(refuse("/v1/cluster/drain", json!({ "node": "nobody" })).await, (409, "refused_by_cluster".to_owned()));
    let lines = r#"{"kind":"order","id":"i","type":"Placed","data":{}}"#;
    let import = send(a, "POST", "/v1/import?source=x", &[LINES], lines.as_bytes()).await;
    assert_eq!(import.refusal(), (409, "not_in_a_cluster".to_owned()));
    assert_eq!(cluster.name(0), "a");

    // The command line, for people and for programs.
    let (code, out, _) = cli(b, &["members"]).await;
    assert!(code == 0 && out.lines().count() == 3 && out.contains("this one"), "{out}");
    let (_, out, _) = cli(b, &["moves", "--json"]).await;
    let moves: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(moves["nodes"].as_array().unwrap().len(), 3, "{moves}");
    let (code, out, err) = cli(b, &["rebalance", "--dry-run", "--without", "a"]).await;
    assert!(code == 0 && out.lines().count() == 3 && err.contains("slots from a to "), "{out}{err}");
    let (code, ..) = cli(b, &["migrate", "--slot", "1"]).await;
    assert_eq!(code, 2);
    let (code, _, err) = cli(b, &["forget", "a"]).await;
    assert!(code == 2 && err.contains("--yes"), "{err}");
    let (code, out, _) = cli(b, &["status"]).await;
    assert!(code == 0 && out.contains("3 of 3 within reach"), "{out}");
}

/// Subscribed at one server, gone on at another.
async fn a_subscription_has_the_events_of_all_servers(cluster: &Cluster, [a, b, c]: [&Node; 3]) {
    let ids: Vec<String> = (0..3).map(|owner| cluster.id_of(owner, "watched", "w")).collect();
    for id in &ids {
        let path = format!("/v1/entities/watched/{id}/events");
        assert_eq!(send(b, "POST", &path, &[JSON], event("Seen", json!({ "n": 1 })).as_bytes()).await.status, 201);
    }
    let mut told = Told::open(b.address(), "/v1/events?kind=watched&from=beginning", &[]).await;
    let mut seen = BTreeSet::new();
    while seen.len() < ids.len() {
        let event = told.next().await;
        assert!(seen.insert(event["id"].as_str().unwrap().to_owned()), "{event} came twice");
    }
    assert_eq!(seen, ids.iter().cloned().collect());
    let path = format!("/v1/entities/watched/{}/events", ids[0]);
    assert_eq!(send(a, "POST", &path, &[JSON], event("Seen", json!({ "n": 2 })).as_bytes()).await.status, 201);
    let mut gone_on = Told::open(c.address(), "/v1/events?kind=watched", &[("Last-Event-ID", &told.checkpoint)]).await;
    let event = gone_on.next().await;
    assert_eq!((&event["id"], &event["version"]), (&json!(ids[0]), &json!(2)));
    let strange = send(c, "GET", "/v1/events?from=abc", &[], b"").await;
    assert_eq!((strange.status, &strange.json()["code"]), (400, &json!("invalid_checkpoint")));
}

/// `/v1/events` of a server.
struct Told {
    reader: crate::http::Reader,
    _writer: crate::http::Writer,
    checkpoint: String,
}

impl Told {
    async fn open(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Told {
        let (mut writer, mut reader) = connect(address).await.unwrap();
        writer.whole("GET", path, headers, b"").await.unwrap();
        assert_eq!(reader.head().await.unwrap().status, 200);
        Told { reader, _writer: writer, checkpoint: String::new() }
    }

    /// The next event. Erasures are told beside, those of before to whoever goes on at another server.
    async fn next(&mut self) -> Value {
        let mut name = String::new();
        let next = async {
            loop {
                let line = self.reader.line().await.unwrap().expect("the stream has ended");
                if let Some(checkpoint) = line.strip_prefix("id: ") {
                    self.checkpoint = checkpoint.to_owned();
                }
                if let Some(of) = line.strip_prefix("event: ") {
                    name = of.to_owned();
                }
                if let Some(data) = line.strip_prefix("data: ").filter(|_| name == "event") {
                    return serde_json::from_str(data).unwrap();
                }
            }
        };
        tokio::time::timeout(LONG, next).await.expect("nothing came")
    }
}

/// `/v1/cluster/events` of a node.
struct Events {
    reader: crate::http::Reader,
    _writer: crate::http::Writer,
}

impl Events {
    async fn open(address: SocketAddr) -> Events {
        let (mut writer, mut reader) = connect(address).await.unwrap();
        writer.whole("GET", "/v1/cluster/events", &[], b"").await.unwrap();
        assert_eq!(reader.head().await.unwrap().status, 200);
        Events { reader, _writer: writer }
    }

    /// The next event of this name.
    async fn until(&mut self, name: &str) -> Value {
        let next = async {
            loop {
                let line = self.reader.line().await.unwrap().expect("the stream has ended");
                if line == format!("event: {name}") {
                    let data = self.reader.line().await.unwrap().unwrap();
                    return serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
                }
            }
        };
        tokio::time::timeout(LONG, next).await.expect("nothing of that name came")
    }
}

/// Appends of one stream, to entities of all nodes, while a node is drained and another one goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_follow_slots_that_move_and_a_stopped_node_is_told_with_reasons() {
    const ENTITIES: usize = 60;
    const ROUNDS: usize = 40;
    let cluster = Cluster::of_three().await;
    let [a, b, c] = &cluster.nodes[..] else { panic!("three nodes") };
    let (mut writer, mut reader) = connect(b.address()).await.unwrap();
    writer.begin("POST", "/v1/append", &[LINES]).await.unwrap();
    let drained = tokio::spawn({
        let url = c.server.url();
        async move {
            let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_cli_child"));
            command.args(["drain", "--wait"]).env("KUMA_URL", url).stdin(std::process::Stdio::null());
            tokio::time::timeout(LONG, command.kill_on_drop(true).output())
                .await
                .expect("draining takes too long")
                .unwrap()
        }
    });
    let answers = tokio::spawn(async move {
        assert_eq!(reader.head().await.unwrap().status, 200);
        let mut outcomes = Vec::new();
        while outcomes.len() < ENTITIES * ROUNDS {
            let line = reader.line().await.unwrap().expect("the stream has ended");
            outcomes.push(serde_json::from_str::<Value>(&line).unwrap());
        }
        outcomes
    });
    for round in 0..ROUNDS {
        let mut lines = String::new();
        for entity in 0..ENTITIES {
            let append = json!({
                "kind": "sensor", "id": format!("s-{entity}"), "key": format!("k-{round}"),
                "events": [{ "type": "Measured", "data": { "round": round } }],
            });
            lines.push_str(&format!("{append}\n"));
        }
        writer.chunk(lines.as_bytes()).await.unwrap();
        // So that the stream lasts for some of the moves.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let outcomes = tokio::time::timeout(LONG, answers).await.expect("outcomes are missing").unwrap();
    for (n, outcome) in outcomes.iter().enumerate() {
        let expected = json!({ "n": n + 1, "version": n / ENTITIES + 1 });
        assert_eq!(outcome, &expected);
    }
    let output = drained.await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    soon("the drained node owns nothing", async || c.server.cluster().unwrap().owned() == 0).await;
    for entity in 0..ENTITIES {
        let page = send(a, "GET", &format!("/v1/entities/sensor/s-{entity}/events?limit=1000"), &[], b"").await.json();
        let rounds: Vec<u64> =
            page["events"].as_array().unwrap().iter().map(|event| event["data"]["round"].as_u64().unwrap()).collect();
        assert_eq!(rounds, (0..ROUNDS as u64).collect::<Vec<_>>(), "order is kept");
    }
    writer.end().await.unwrap();

    // A node that owns slots goes: what it owns is unavailable, and everybody is told why, and since when.
    let gone = cluster.id_of(1, "sensor", "gone");
    let kept = cluster.id_of(0, "sensor", "kept");
    let [a, b, c] = <[Node; 3]>::try_from(cluster.nodes).unwrap_or_else(|_| panic!("three nodes"));
    let directory = b.stop().await;
    let path = format!("/v1/entities/sensor/{gone}/events");
    let answer = send(&a, "POST", &path, &[JSON], event("Measured", json!({})).as_bytes()).await;
    let problem = answer.problem();
    assert_eq!((problem.status, problem.code.as_str()), (503, "owner_unreachable"), "{}", problem.body);
    assert_eq!(problem.body["retry_safe"], true);
    assert!(problem.body["detail"].as_str().unwrap().contains("node b"), "{}", problem.body);
    let path = format!("/v1/entities/sensor/{kept}/events");
    let served = send(&a, "POST", &path, &[JSON], event("Measured", json!({})).as_bytes()).await;
    assert_eq!(served.status, 201);
    let health = send(&a, "GET", "/health/cluster", &[], b"").await;
    let body = health.json();
    assert_eq!((health.status, body["status"].clone()), (503, json!("unavailable")), "{body}");
    assert_eq!((&body["reasons"][0]["code"], &body["reasons"][0]["node"]), (&json!("unreachable"), &json!("b")));
    assert!(body["reasons"][0]["slots"].as_u64().unwrap() > 1000 && body["reasons"][0]["since_ms"].is_u64(), "{body}");
    let (code, out, _) = cli(&a, &["status"]).await;
    assert!(code == 0 && out.contains("unreachable") && out.contains("2 of 3 within reach"), "{out}");
    // Forgotten, its slots stay with it: that is said, and nothing is taken.
    assert_eq!(cli(&c, &["forget", "b", "--yes", "--json"]).await.0, 0);
    soon("it is forgotten everywhere", async || a.server.cluster().unwrap().members().len() == 2).await;
    let health = send(&a, "GET", "/health/cluster", &[], b"").await.json();
    assert!(health["reasons"].as_array().unwrap().iter().any(|reason| reason["code"] == "without_owner"), "{health}");
    a.stop().await;
    c.stop().await;
    drop((directory, cluster.cookie));
}

/// Rights are those of the token at the server that is asked; the owner knows no such token.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scopes_are_looked_at_where_a_request_comes_in() {
    let tokens = directory();
    let make = |file: &str, name: &str, scopes: &[Scope]| {
        let file = TokenFile::new(tokens.path().join(file));
        file.create(name, scopes, None).unwrap().1.expose().to_owned()
    };
    let reader = format!("Bearer {}", make("b.json", "reader", &[Scope::Read]));
    let eraser = format!("Bearer {}", make("b.json", "eraser", &[Scope::Append, Scope::Erase]));
    let admin = format!("Bearer {}", make("b.json", "admin", &[Scope::Admin]));
    let at_a = format!("Bearer {}", make("a.json", "other", &Scope::ALL));
    let mut cluster = Cluster::found(|config| config.tokens_file = Some(tokens.path().join("a.json"))).await;
    // Both own about half of the slots in the end; all are a's at first.
    cluster.join("b", |config| config.tokens_file = Some(tokens.path().join("b.json"))).await;
    cluster.settled().await;
    let [a, b] = &cluster.nodes[..] else { panic!("two nodes") };
    let id = cluster.id_of(0, "order", "o");
    let path = format!("/v1/entities/order/{id}");
    let events = format!("{path}/events");
    let with = async |node: &Node, token: &str, method: &str, path: &str, body: &str| {
        send(node, method, path, &[JSON, ("Authorization", token)], body.as_bytes()).await
    };
    let placed = event("Placed", json!({ "total": 1 }));
    assert_eq!(with(b, &reader, "POST", &events, &placed).await.refusal(), (403, "forbidden".to_owned()));
    assert_eq!(with(b, &at_a, "POST", &events, &placed).await.refusal(), (401, "unauthorized".to_owned()));
    assert_eq!(send(b, "POST", &events, &[JSON], placed.as_bytes()).await.refusal(), (401, "unauthorized".to_owned()));
    assert_eq!(with(b, &eraser, "POST", &events, &placed).await.status, 201);
    assert_eq!(with(b, &eraser, "GET", &path, "").await.refusal(), (403, "forbidden".to_owned()));
    assert_eq!(with(b, &reader, "GET", &path, "").await.json()["state"], json!({ "total": 1 }));
    assert_eq!(
        with(b, &reader, "DELETE", &format!("{path}?reason=x"), "").await.refusal(),
        (403, "forbidden".to_owned())
    );
    assert_eq!(with(b, &eraser, "DELETE", &format!("{path}?reason=x"), "").await.status, 200);
    // Denied where it was asked, and done where it is owned by the name of the token.
    let audit = with(b, &admin, "GET", "/v1/audit?limit=1000", "").await.text();
    assert!(audit.contains("reader") && audit.contains("scope"), "{audit}");
    let audit = with(a, &at_a, "GET", "/v1/audit?limit=1000", "").await.text();
    assert!(audit.contains("token eraser"), "{audit}");

    // To look at the cluster one has to be able to read, to act on it to be an admin.
    for (method, path, body) in [
        ("POST", "/v1/cluster/migrate", "{}"),
        ("POST", "/v1/cluster/drain", "{}"),
        ("POST", "/v1/cluster/forget", "{\"node\":\"a\"}"),
    ] {
        assert_eq!(with(b, &reader, method, path, body).await.refusal(), (403, "forbidden".to_owned()), "{path}");
    }
    for path in ["members", "slots", "moves", "plan", "events"] {
        let path = format!("/v1/cluster/{path}");
        assert_eq!(with(b, &admin, "GET", &path, "").await.refusal(), (403, "forbidden".to_owned()), "{path}");
    }
    assert_eq!(with(b, &reader, "GET", "/v1/cluster/moves", "").await.json()["nodes"].as_array().unwrap().len(), 2);
    assert_eq!(with(b, &admin, "POST", "/v1/cluster/migrate", "{}").await.status, 202);
    let audit = with(b, &admin, "GET", "/v1/audit?limit=1000", "").await.json();
    let last = audit["events"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["type"], &last["data"]["act"], &last["data"]["token"]),
        (&json!("Operated"), &json!("migrate"), &json!("admin"))
    );
    assert_eq!(send(b, "GET", "/health/cluster", &[], b"").await.status, 200);
    cluster.stop().await;
}

/// A node of the cluster that says what it likes.
struct Silent;

impl Answer for Silent {
    fn answer(&self, _: Asked) -> BoxFuture<'static, Answered> {
        Box::pin(async { Answered::Done(b"what".to_vec()) })
    }
}

/// What goes over the link as a request is held against its scope, its slot and the list of what is handed on at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_over_the_link_is_bound_to_its_scope_and_its_slot() {
    let cluster = Cluster::found(|_| {}).await;
    let server = &cluster.nodes[0];
    let owner = server.server.cluster().unwrap();
    let directory = directory();
    let cookie = Cookie::load_file(&cluster.cookie_file()).unwrap();
    let options = NodeOptions::new(directory.path(), cookie)
        .name("stranger")
        .shards(2)
        .listen((Ipv4Addr::LOCALHOST, 0).into())
        .seed_nodes([owner.address().to_string()])
        .answer(Arc::new(Silent));
    let stranger = kuma_cluster::Node::start(options).await.unwrap();
    // It takes part, and takes no slots.
    soon("the stranger is let in", async || stranger.is_ready()).await;
    owner.drain_node("stranger").await.unwrap();
    soon("the owner owns everything", async || {
        owner.owned() == 4096
            && stranger.plan().without_owner.is_empty()
            && stranger.members().iter().all(|one| !one.is_own || one.owns == 0)
    })
    .await;
    let id = "o-1";
    let slot = slot_of("order", id);
    let answer =
        send(server, "POST", "/v1/entities/order/o-1/events", &[JSON], event("Placed", json!({})).as_bytes()).await;
    assert_eq!(answer.status, 201);

    let within = Duration::from_secs(20);
    let disk = owner.members().into_iter().find(|member| member.is_own).unwrap().disk;
    let request = |method: &str, uri: &str, scope: &str, headers: BTreeMap<&str, &str>| {
        let headers: Vec<(String, Vec<u8>)> =
            headers.into_iter().map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec())).collect();
        let body = br#"{"type":"Paid","data":{}}"#.to_vec();
        let asked =
            json!({ "method": method, "uri": uri, "headers": headers, "body": body, "scope": scope, "token": null });
        rmp_serde::to_vec_named(&json!({ "Request": asked })).unwrap()
    };
    let json_body = || BTreeMap::from([("content-type", "application/json")]);
    let ask =
        async |body: Vec<u8>| stranger.ask_owner(slot, body, within, Repeat::Never).await.map(|answer| answer.body);
    // As it should be: the link itself works.
    let well = ask(request("POST", "/v1/entities/order/o-1/events", "append", json_body())).await.unwrap();
    assert!(status_of(&well) == Some(201), "{:?}", String::from_utf8_lossy(&well));
    for (what, body) in [
        (
            "another scope than the route needs",
            request("DELETE", "/v1/entities/order/o-1?reason=x", "read", BTreeMap::new()),
        ),
        ("a scope that is none", request("GET", "/v1/entities/order/o-1", "root", BTreeMap::new())),
        ("an entity of another slot", request("GET", "/v1/entities/order/o-2", "read", BTreeMap::new())),
        ("the store's own entities", request("GET", "/v1/entities/kuma.audit/x", "read", BTreeMap::new())),
        ("a route that is not handed on", request("GET", "/v1/audit", "admin", BTreeMap::new())),
        ("a route that does not exist", request("GET", "/nothing", "read", BTreeMap::new())),
        ("an address that is none", request("GET", "no uri", "read", BTreeMap::new())),
        ("a method that is none", request("NO METHOD", "/v1/entities/order/o-1", "read", BTreeMap::new())),
        (
            "a header that is not handed on",
            request("GET", "/v1/entities/order/o-1", "read", [("authorization", "x")].into()),
        ),
        ("no message", b"nothing".to_vec()),
        ("an empty message", Vec::new()),
        ("an answer that nobody holds", rmp_serde::to_vec_named(&json!({ "More": { "held": 7 } })).unwrap()),
    ] {
        let answer = ask(body).await.unwrap();
        assert!(!matches!(status_of(&answer), Some(200..=299)), "{what}: {:?}", String::from_utf8_lossy(&answer));
    }
    let node = async |body: Vec<u8>| stranger.ask_node(disk, body, within).await;
    let moves = node(request("GET", "/v1/cluster/moves?here=true", "read", BTreeMap::new())).await.unwrap();
    assert_eq!(status_of(&moves), Some(200));
    for (what, body) in [
        ("an entity, of no slot", request("GET", "/v1/entities/order/o-1", "read", BTreeMap::new())),
        ("an act", request("POST", "/v1/cluster/drain", "admin", json_body())),
        ("tokens' routes", request("GET", "/v1/audit", "admin", BTreeMap::new())),
    ] {
        let answer = node(body).await.unwrap();
        assert!(!matches!(status_of(&answer), Some(200..=299)), "{what}: {:?}", String::from_utf8_lossy(&answer));
    }
    // Nothing of all that was done.
    let read = send(server, "GET", "/v1/entities/order/o-1", &[], b"").await.json();
    assert_eq!(read["version"], 2);
    // And what a stranger says to the server as the owner of something is no answer.
    let said = owner
        .ask_node(stranger.members().into_iter().find(|one| one.is_own).unwrap().disk, b"x".to_vec(), within)
        .await;
    assert_eq!(said.unwrap(), b"what");
    let unknown = owner.ask_node(kuma_core::DiskId([9; 16]), b"x".to_vec(), within).await;
    assert!(matches!(unknown, Err(AskError::Unavailable(_))), "{unknown:?}");
    stranger.shutdown().await;
    cluster.stop().await;
}

/// The HTTP status in an answer over the link; none if it is no HTTP answer.
fn status_of(answer: &[u8]) -> Option<u16> {
    #[derive(Deserialize)]
    struct Head {
        status: u16,
    }
    #[derive(Deserialize)]
    enum Reply {
        Answer(Head),
        NotKnown,
    }
    match rmp_serde::from_slice(answer).expect("it is an answer of a server") {
        Reply::Answer(Head { status }) => Some(status),
        Reply::NotKnown => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_without_a_cluster_is_told_what_to_do_and_one_with_never_runs_alone() {
    let (cookie, data) = (directory(), directory());
    let cookie_file = cookie.path().join("cookie");
    let config = |change: &dyn Fn(&mut Config)| {
        let mut config = crate::http::config(&data.path().join("store"));
        config.cookie_file = Some(cookie_file.clone());
        config.cluster_listen = Some((Ipv4Addr::LOCALHOST, 0).into());
        change(&mut config);
        config
    };
    let refused = async |config: Config| match Server::start(config).await {
        Ok(_) => panic!("it started"),
        Err(error) => error.to_string(),
    };
    let error = refused(config(&|_| {})).await;
    assert!(error.contains("cannot be used as the cluster's cookie"), "{error}");
    write_cookie(&cookie_file, &Cookie::generate().unwrap());
    let error = refused(config(&|_| {})).await;
    assert!(error.contains("--seed HOST:PORT") && error.contains("--found"), "{error}");
    assert!(!data.path().join("store").join("store.json").exists(), "nothing was made");
    let server = Server::start(config(&|config| config.found = true)).await.unwrap();
    let mut client = Client::new(server.address());
    let answer = client.post("/v1/entities/order/o-1/events", &event("Placed", json!({}))).await;
    assert_eq!(answer.status, 201, "a cluster of one serves everything");
    let import = client
        .send("POST", "/v1/import?source=x", &[LINES], br#"{"kind":"order","id":"i","type":"Placed","data":{}}"#)
        .await;
    assert_eq!(import.status, 200, "and imports");
    server.stop().await;
    let error = refused(config(&|config| config.cookie_file = None)).await;
    assert!(error.contains("did not open"), "{error}");
    // It is of a cluster now, and needs neither seeds nor to be founded.
    let server = Server::start(config(&|_| {})).await.unwrap();
    let answer = Client::new(server.address()).get("/v1/entities/order/o-1").await;
    assert_eq!(answer.json()["version"], 1);
    server.stop().await;
}

/// The SQL file is at one server; the events are at both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_projection_at_one_server_has_the_events_of_all() {
    let files = directory();
    let sql = "-- projection: orders\n-- version: 1\n-- erasure: column orders.id\n\nCREATE TABLE orders (id TEXT NOT NULL, total INTEGER NOT NULL) STRICT;\n\n\
               -- on order.Placed\nINSERT INTO orders (id, total) VALUES (:entity, :data ->> 'total');\n";
    std::fs::write(files.path().join("orders.sql"), sql).unwrap();
    let mut cluster = Cluster::found(|_| {}).await;
    cluster.join("b", |config| config.projections_dir = Some(files.path().to_owned())).await;
    cluster.settled().await;
    let ids = [cluster.id_of(0, "order", "at-a"), cluster.id_of(1, "order", "at-b")];
    let [a, b] = &cluster.nodes[..] else { panic!("two servers") };
    for (id, total) in ids.iter().zip([3, 4]) {
        let placed = event("Placed", json!({ "total": total }));
        assert_eq!(a.client().post(&format!("/v1/entities/order/{id}/events"), &placed).await.status, 201);
    }
    let rows = async || {
        let query = json!({ "sql": "SELECT id, total FROM orders ORDER BY total" }).to_string();
        let answer = send(b, "POST", "/v1/projections/orders/query", &[JSON], query.as_bytes()).await;
        if answer.status == 200 { answer.json()["rows"].clone() } else { json!([]) }
    };
    let wanted = json!([{ "id": ids[0], "total": 3 }, { "id": ids[1], "total": 4 }]);
    soon("both are there", async || rows().await == wanted).await;
    let erased = send(a, "DELETE", &format!("/v1/entities/order/{}?reason=asked", ids[1]), &[], b"").await;
    assert_eq!(erased.status, 200, "{erased:?}");
    assert_eq!(rows().await, json!([{ "id": ids[0], "total": 3 }]));
    let other = send(a, "GET", "/v1/projections/orders", &[], b"").await;
    assert_eq!(other.status, 404, "the file is not there");
    cluster.stop().await;
}

/// A store in no cluster says so, and has nothing of it in its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_in_no_cluster_says_so() {
    let node = Node::start(|_| {}).await;
    for path in ["members", "slots", "moves", "plan", "events"] {
        let answer = send(&node, "GET", &format!("/v1/cluster/{path}"), &[], b"").await;
        assert_eq!(answer.refusal(), (409, "not_clustered".to_owned()), "{path}");
    }
    let health = send(&node, "GET", "/health/cluster", &[], b"").await;
    assert_eq!((health.status, health.json()["is_clustered"].clone()), (200, json!(false)));
    let status = send(&node, "GET", "/v1/status", &[], b"").await.json();
    assert!(status.get("cluster").is_none());
    let (code, _, err) = cli(&node, &["members"]).await;
    assert!(code == 1 && err.contains("not_clustered"), "{err}");
    node.stop().await;
}
