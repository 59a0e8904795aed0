//! The OpenAPI document of a node against the node: schemathesis sends what the document allows, what it forbids, and what is nearly one of them,
//! and holds each answer against the document.
//!
//! Two runs. The first, without tokens, is the thorough one: examples, the edges of each parameter, random requests, and sequences of requests. The
//! second, with a token, looks whether each operation is closed without it. What schemathesis has to be told is in `http_schema/`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::common;
use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use kuma_node::tokens::{Scope, TokenFile};

use crate::http::Node;

/// A run takes about a minute.
const DEADLINE: Duration = Duration::from_secs(280);
const SEED: &str = "1";

/// The one that the document asks in its examples.
const BALANCES: &str = "-- projection: balances
-- version: 1
-- erasure: column balance.id

CREATE TABLE balance (id TEXT NOT NULL PRIMARY KEY, amount INTEGER NOT NULL) STRICT;

-- on account.*
INSERT INTO balance (id, amount) VALUES (:entity, 1) ON CONFLICT (id) DO UPDATE SET amount = amount + 1;
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_answers_as_its_openapi_document_says_whatever_it_is_asked() {
    let Some(program) = schemathesis() else { return };
    let examples = integration_tests::cases(30).to_string();
    let thorough = ["--max-examples", &examples, "--continue-on-failure"];
    let node = node(None).await;
    fill(&node).await;
    run(&program, &node, &thorough).await;
    node.stop().await;

    let directory = common::directory();
    let tokens = TokenFile::new(directory.path().join("tokens.json"));
    let (_, token) = tokens.create("schema", &Scope::ALL, None).unwrap();
    let authorization = format!("Authorization: Bearer {}", token.expose());
    let node = self::node(Some(tokens.path())).await;
    // Each denial waits to be in the audit log, which takes a second: many at once.
    let closed = ["--header", &authorization, "--phases", "examples,fuzzing", "--max-examples", "3", "--workers", "8"];
    run(&program, &node, &closed).await;
    node.stop().await;
}

/// The program, where it is or can be installed.
fn schemathesis() -> Option<PathBuf> {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("schemathesis-venv");
    let installed = std::process::Command::new("bash").arg(beside("install")).arg(&venv).output();
    let refusal = match installed {
        Ok(output) if output.status.success() => return Some(venv.join("bin/schemathesis")),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(_) => "bash is not installed".to_owned(),
    };
    eprintln!("skipped: {refusal}");
    None
}

fn beside(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/server/schema").join(name)
}

/// A node with the read model that the document's examples name.
async fn node(tokens: Option<&Path>) -> Node {
    let directory = common::directory();
    let projections = directory.path().join("projections");
    std::fs::create_dir(&projections).unwrap();
    std::fs::write(projections.join("balances.sql"), BALANCES).unwrap();
    Node::in_directory(directory, |config| {
        config.data = config.data.join("data");
        config.projections_dir = Some(projections);
        config.tokens_file = tokens.map(Path::to_owned);
    })
    .await
}

/// Appends to the entities that the examples and `hooks.py` name.
async fn fill(node: &Node) {
    let mut client = node.client();
    for id in ["acc_001", "acc_erased"] {
        let path = format!("/v1/entities/account/{id}/events");
        assert_eq!(client.post(&path, r#"{"type": "Deposited", "data": {"balance": 1000}}"#).await.status, 201);
    }
}

async fn run(program: &Path, node: &Node, arguments: &[&str]) {
    // It leaves its notes where it is started.
    let directory = common::directory();
    let started = tokio::process::Command::new(program)
        .arg("--config-file")
        .arg(beside("schemathesis.toml"))
        .arg("run")
        .arg(format!("{}/openapi.json", node.server.url()))
        .args(["--checks", "all", "--seed", SEED, "--no-color", "--request-timeout", "20"])
        .args(arguments)
        .env("SCHEMATHESIS_HOOKS", beside("hooks.py"))
        // Nothing of it belongs among the sources.
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PYTHONIOENCODING", "utf-8")
        .current_dir(directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(DEADLINE, started).await.expect("schemathesis takes too long").unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    println!("seed {SEED}\n{told}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "the node and its document do not agree; what schemathesis found stands above");
}
