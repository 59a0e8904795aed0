//! The command line as a program: what goes where, and with which exit code.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    path::Path,
    process::{Output, Stdio},
};

use crate::fake::{DEADLINE, Fake, cut_behind, json_body, open_behind, problem};
use axum::{http::StatusCode, response::IntoResponse};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::Command,
};

fn command(url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kuma-node"));
    command.args(arguments).env("KUMA_URL", url).env_remove("KUMA_TOKEN").env_remove("NO_COLOR");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn run(url: &str, arguments: &[&str]) -> Output {
    tokio::time::timeout(DEADLINE, command(url, arguments).output()).await.expect("it takes too long").unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn expect(output: &Output, code: i32) -> (String, String) {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "stdout: {out}\nstderr: {err}");
    assert!(!out.contains('\u{1b}') && !err.contains('\u{1b}'), "colours in a pipe");
    (out, err)
}

fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn nobody_there_is_unavailable() {
    let (out, err) = expect(&run(&free_port(), &["status"]).await, 3);
    assert!(out.is_empty() && err.starts_with("error: cannot connect to http://127.0.0.1:"), "{err}");
    let (out, err) = expect(&run(&free_port(), &["status", "--json"]).await, 3);
    let document: Value = serde_json::from_str(&err).unwrap();
    assert!(out.is_empty() && document["exit"] == 3);
}

#[tokio::test]
async fn a_wrong_command_line_is_told_apart() {
    for arguments in [
        &["status", "--what"][..],
        &["entity", "at", "a", "b"],
        &["entity", "append", "a", "b", "T", "no json"],
        &["import", "-"],
        &["--url", "no url", "status"],
    ] {
        expect(&run("http://127.0.0.1:1", arguments).await, 2);
    }
    let (out, _) = expect(&run("", &["--help"]).await, 0);
    assert!(out.contains("Exit codes:"));
    let (out, _) = expect(&run("http://127.0.0.1:1", &["completions", "bash"]).await, 0);
    assert!(out.contains("kuma-node"));
}

#[tokio::test]
async fn a_node_that_takes_no_requests_is_not_healthy() {
    let fake = Fake::start(|_, seen| match seen.path.as_str() {
        "/health/ready" => {
            let body = json_body(&json!({"status": "stopping", "reasons": ["it is shutting down"]}));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
        _ => problem(503, "stopping", Some(1)),
    })
    .await;
    let (out, _) = expect(&run(&fake.url, &["status"]).await, 3);
    assert_eq!(out, "stopping\n  it is shutting down\n");
}

/// A health check has no token.
#[tokio::test]
async fn health_needs_no_token() {
    let fake = Fake::start(|_, seen| match seen.path.as_str() {
        "/health/ready" => json_body(&json!({"status": "ok", "reasons": []})).into_response(),
        _ => problem(401, "no_token", None),
    })
    .await;
    let (out, err) = expect(&run(&fake.url, &["status"]).await, 0);
    assert_eq!(out, "ok\n");
    assert!(err.contains("KUMA_TOKEN"));
}

#[tokio::test]
async fn damage_has_an_exit_code_of_its_own() {
    let done = r#"{"done":{"is_clean":false,"entities":1,"commits":1234,"events":1,"keys":1,"keys_destroyed":0,"damage":["shard 0: a row"]}}"#;
    let fake = Fake::start(move |_, _| format!("{{\"progress\":{{\"commits\":1}}}}\n{done}\n").into_response()).await;
    let (out, _) = expect(&run(&fake.url, &["verify"]).await, 4);
    assert!(out.contains("1,234 commits") && out.contains("damaged: shard 0: a row"), "{out}");
    let (out, _) = expect(&run(&fake.url, &["verify", "--json"]).await, 4);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["damage"][0], "shard 0: a row");
}

#[tokio::test]
async fn nothing_is_erased_without_an_answer() {
    let fake = Fake::start(|_, _| problem(500, "internal", None)).await;
    let (_, err) = expect(&run(&fake.url, &["entity", "erase", "a", "b", "--reason", "r"]).await, 2);
    assert!(err.contains("--yes"));
    assert!(fake.seen().iter().all(|request| request.method == "GET"));
}

/// An erasure that has begun goes on by itself: asking again is asking for the receipt.
#[tokio::test]
async fn an_erasure_is_asked_for_its_receipt_and_saves_it() {
    let fake = Fake::start(|n, _| match n {
        0 => problem(503, "erasure_unfinished", Some(1)),
        _ => r#"{"receipt":{"id":"00"},"signature":"ff"}"#.into_response(),
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("receipt.json");
    let arguments =
        ["entity", "erase", "a", "b/c", "--reason", "r 1", "--by", "me", "--yes", "--receipt", path.to_str().unwrap()];
    let (out, _) = expect(&run(&fake.url, &arguments).await, 0);
    assert_eq!(
        serde_json::from_str::<Value>(&out).unwrap(),
        serde_json::from_str::<Value>(&std::fs::read_to_string(&path).unwrap()).unwrap()
    );
    // The receipt of one erasure does not take the place of another's.
    expect(&run(&fake.url, &arguments).await, 2);
    let seen = fake.seen();
    assert_eq!(seen.len(), 2);
    assert!(
        seen.iter()
            .all(|request| request.method == "DELETE" && request.path == "/v1/entities/a/b%2Fc?reason=r%201&by=me")
    );
}

#[tokio::test]
async fn a_failed_append_tells_its_key() {
    let fake = Fake::start(|_, _| problem(503, "overloaded", Some(1))).await;
    let (_, err) = expect(&run(&fake.url, &["entity", "append", "a", "b", "T", "{}"]).await, 3);
    let seen = fake.seen();
    let key = seen[0].header("idempotency-key").unwrap();
    assert_eq!(key.len(), 32);
    assert!(seen.iter().all(|request| request.header("idempotency-key") == Some(key)));
    assert!(err.contains(&format!("--key {key}")), "{err}");
}

const LINES: &str = "{\"kind\":\"a\",\"id\":\"b\",\"type\":\"T\",\"data\":1}\n";
const PROGRESS: &str = "{\"progress\":{\"lines\":1,\"bytes\":2,\"commits\":1,\"events\":1,\"repeated\":0}}\n";
const REPORT: &str = "{\"done\":{\"lines\":3,\"entities\":1,\"commits\":3,\"events\":3,\"new_events\":2}}\n";

fn file(directory: &Path) -> String {
    let path = directory.join("events.ndjson");
    std::fs::write(&path, LINES.repeat(3)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_import_that_was_cut_off_begins_again_under_the_same_name() {
    let fake = Fake::start(|n, _| match n {
        0 => cut_behind(PROGRESS),
        1 => problem(503, "overloaded", Some(1)),
        _ => REPORT.into_response(),
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let (out, err) = expect(&run(&fake.url, &["import", &file(directory.path())]).await, 0);
    assert!(out.starts_with("the file has 3 events of 1 entities\nimported 2 new events in "), "{out}");
    assert!(
        out.ends_with("1 events were there already\n") && err.matches("beginning again").count() == 2,
        "{out}{err}"
    );
    let seen = fake.seen();
    assert_eq!(seen.len(), 3);
    for request in seen {
        assert_eq!((request.path.as_str(), text(&request.body)), ("/v1/import?source=events.ndjson", LINES.repeat(3)));
    }
}

#[tokio::test]
async fn a_wrong_line_is_not_tried_again() {
    let fake = Fake::start(|_, _| problem(422, "invalid_line", None)).await;
    let directory = tempfile::tempdir().unwrap();
    let (_, err) = expect(&run(&fake.url, &["import", &file(directory.path())]).await, 1);
    assert!(err.contains("invalid_line happened"), "{err}");
    assert_eq!(fake.seen().len(), 1);
}

#[tokio::test]
async fn standard_input_is_imported_under_the_name_that_it_is_given() {
    let fake = Fake::start(|_, _| REPORT.into_response()).await;
    let mut child =
        command(&fake.url, &["import", "-", "--source", "pipe", "--json"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(LINES.as_bytes()).await.unwrap();
    drop(stdin);
    let output = tokio::time::timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    let (out, _) = expect(&output, 0);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["repeated_events"], 1);
    assert_eq!(text(&fake.seen()[0].body), LINES);
}

#[tokio::test]
async fn a_damaged_file_is_named() {
    let fake = Fake::start(|_, _| problem(400, "cut_off", Some(1))).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events.gz");
    std::fs::write(&path, b"\x1f\x8b and no more").unwrap();
    let (_, err) = expect(&run(&fake.url, &["import", path.to_str().unwrap()]).await, 1);
    assert!(err.contains("events.gz"), "{err}");
    expect(&run(&fake.url, &["import", "/does/not/exist"]).await, 1);
}

/// `tail | head -1`: the reader has what it wanted.
#[tokio::test]
async fn a_reader_who_goes_away_ends_it_quietly() {
    let pages = |n: usize, _: &crate::fake::Seen| {
        let event = json!({"version": 1, "type": "T", "schema": 1, "at": "x", "data": "y".repeat(1000)});
        json_body(&json!({"events": vec![event; 1000], "next": n + 1})).into_response()
    };
    let fake = Fake::start(pages).await;
    let mut child = command(&fake.url, &["entity", "history", "a", "b", "--limit", "0"]).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).await.unwrap();
    assert!(line.starts_with("1\tx\tT\t\"yyy"));
    drop(stdout);
    let output = tokio::time::timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(expect(&output, 0).1, "");
}

#[tokio::test]
async fn a_tail_ends_on_an_interrupt_and_tells_where_to_go_on() {
    let fake = Fake::start(|n, _| match n {
        0 => cut_behind("id: c1\nevent: erased\ndata: {\"entity\":\"ff\",\"receipt\":\"00\"}\n\nid: c2\nev"),
        _ => open_behind("id: c2\nevent: erased\ndata: {\"entity\":\"ee\",\"receipt\":\"01\"}\n\n"),
    })
    .await;
    let mut child = command(&fake.url, &["subscriptions", "tail", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for (entity, checkpoint) in [("ff", "c1"), ("ee", "c2")] {
        let line = tokio::time::timeout(DEADLINE, lines.next_line()).await.unwrap().unwrap().unwrap();
        let line: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&line["event"], &line["data"]["entity"], &line["checkpoint"]),
            (&json!("erased"), &json!(entity), &json!(checkpoint))
        );
    }
    let id = rustix::process::Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
    let status = tokio::time::timeout(DEADLINE, child.wait()).await.unwrap().unwrap();
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).await.unwrap();
    assert_eq!(status.code(), Some(0), "{err}");
    assert!(err.contains("connected again; nothing was skipped") && err.ends_with("--from c2\n"), "{err}");
}

#[tokio::test]
async fn an_export_that_was_cut_off_leaves_no_file() {
    let fake = Fake::start(|_, _| cut_behind("{\"kind\":\"a\"}\n")).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("all.ndjson");
    expect(&run(&fake.url, &["export", "--output", path.to_str().unwrap()]).await, 3);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_token_comes_from_a_file() {
    let fake = Fake::start(|_, _| json_body(&json!({"status": "ok", "reasons": []})).into_response()).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "s3cret\n").unwrap();
    run(&fake.url, &["receipt", "show", "00", "--token-file", file.path().to_str().unwrap()]).await;
    assert_eq!(fake.seen()[0].header("authorization"), Some("Bearer s3cret"));
}

/// Without a node: from the backups alone.
#[tokio::test]
async fn a_store_is_restored_from_its_backups() {
    use kuma_core::{Kuma, MasterKeySource, Options};
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let kuma = Kuma::start(Options::new(place("data")).shards(1)).await.unwrap();
    kuma.import("lines").run(&mut LINES.as_bytes(), |_| ()).await.unwrap();
    kuma.backup(place("events")).run(|_| ()).await.unwrap();
    kuma.backup_keys(place("keys")).await.unwrap();
    kuma.shutdown().await;

    let (events, keys, new, key) = (place("events"), place("keys"), place("new"), place("data/master.key"));
    let arguments = ["restore", &events, "--keys", &keys, "--data", &new, "--master-key", &key];
    let (out, err) = expect(&run("http://127.0.0.1:1", &arguments).await, 0);
    assert!(out.starts_with("restored 1 events in 1 commits of 1 entities"), "{out}");
    assert!(err.contains("warning: no ledger was given"), "{err}");
    let restored = Kuma::start(Options::new(&new).master_key(MasterKeySource::File(key.clone().into()))).await.unwrap();
    assert_eq!(restored.raw("a", "b").read().await.unwrap().1.0, 1);
    restored.shutdown().await;
    // What is there is not written over.
    let (out, err) = expect(&run("http://127.0.0.1:1", &arguments).await, 1);
    assert!(out.is_empty() && err.starts_with("error: "), "{err}");
}
