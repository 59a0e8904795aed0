//! Who may do what over HTTP, and what is left behind by those who may not.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, TryStreamExt, stream};
use kuma_core::{AuditEvent, AuditLog, Denial, Direction};
use kuma_node::{
    Config, Server, ServerError,
    tokens::{Scope, TokenFile},
};
use reqwest::{Client, Method, StatusCode};
use serde_json::Value;

/// Long enough for a busy machine: nothing waits for it that goes well.
const DEADLINE: Duration = Duration::from_secs(30);

/// Each operation, and the scope that it needs. A route that is new has to be written down here.
const OPERATIONS: &[(&str, &str, Needs)] = &[
    ("POST", "/v1/entities/{kind}/{id}/events", Needs::Scope(Scope::Append)),
    ("GET", "/v1/entities/{kind}/{id}", Needs::Scope(Scope::Read)),
    ("GET", "/v1/entities/{kind}/{id}/events", Needs::Scope(Scope::Read)),
    ("GET", "/v1/entities/{kind}/{id}/diff", Needs::Scope(Scope::Read)),
    ("GET", "/v1/entities/{kind}/{id}/export", Needs::Scope(Scope::Read)),
    ("GET", "/v1/entities/{kind}/{id}/outcome", Needs::Scope(Scope::Read)),
    ("DELETE", "/v1/entities/{kind}/{id}", Needs::Scope(Scope::Erase)),
    ("POST", "/v1/entities/{kind}/{id}/recreate", Needs::Scope(Scope::Erase)),
    ("POST", "/v1/entities/{kind}/{id}/restore-to", Needs::Scope(Scope::Erase)),
    ("GET", "/v1/receipts/{receipt_id}", Needs::Scope(Scope::Read)),
    ("POST", "/v1/receipts/verify", Needs::Scope(Scope::Erase)),
    ("GET", "/v1/public-key", Needs::Token),
    ("POST", "/v1/append", Needs::Scope(Scope::Append)),
    ("POST", "/v1/import", Needs::Scope(Scope::Append)),
    ("GET", "/v1/export", Needs::Scope(Scope::Read)),
    ("GET", "/v1/events", Needs::Scope(Scope::Read)),
    ("GET", "/v1/projections", Needs::Scope(Scope::Read)),
    ("GET", "/v1/projections/{name}", Needs::Scope(Scope::Read)),
    ("GET", "/v1/projections/{name}/skipped", Needs::Scope(Scope::Read)),
    ("POST", "/v1/projections/{name}/query", Needs::Scope(Scope::Read)),
    ("POST", "/v1/projections/{name}/{action}", Needs::Scope(Scope::Admin)),
    ("DELETE", "/v1/projections/{name}", Needs::Scope(Scope::Admin)),
    ("GET", "/v1/audit", Needs::Scope(Scope::Admin)),
    ("GET", "/v1/status", Needs::Token),
    ("POST", "/v1/verify", Needs::Scope(Scope::Admin)),
    ("POST", "/v1/backups/{name}", Needs::Scope(Scope::Admin)),
    ("GET", "/health/live", Needs::Nothing),
    ("GET", "/health/ready", Needs::Nothing),
    ("GET", "/health/cluster", Needs::Nothing),
    ("GET", "/v1/cluster/events", Needs::Scope(Scope::Read)),
    ("GET", "/v1/cluster/members", Needs::Scope(Scope::Read)),
    ("GET", "/v1/cluster/moves", Needs::Scope(Scope::Read)),
    ("GET", "/v1/cluster/plan", Needs::Scope(Scope::Read)),
    ("GET", "/v1/cluster/slots", Needs::Scope(Scope::Read)),
    ("POST", "/v1/cluster/drain", Needs::Scope(Scope::Admin)),
    ("POST", "/v1/cluster/forget", Needs::Scope(Scope::Admin)),
    ("POST", "/v1/cluster/migrate", Needs::Scope(Scope::Admin)),
    ("GET", "/metrics", Needs::Token),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    Scope(Scope),
    /// Any token.
    Token,
    Nothing,
}

/// A path with something in its places; the entity is one that must not turn up anywhere.
fn filled(path: &str) -> String {
    let places = [
        ("{kind}", "account"),
        ("{id}", "secret-entity"),
        ("{receipt_id}", "00112233445566778899aabbccddeeff"),
        ("{name}", "balances"),
        ("{action}", "pause"),
    ];
    let path = places.iter().fold(path.to_owned(), |path, (place, value)| path.replace(place, value));
    assert!(!path.contains('{'), "{path}");
    path
}

fn http() -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().no_proxy().tls_certs_only([]).build().unwrap()
}

struct Node {
    server: Server,
    tokens: TokenFile,
    http: Client,
    _dir: tempfile::TempDir,
}

impl Node {
    async fn start() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let tokens = TokenFile::new(dir.path().join("tokens.json"));
        Node::with(dir, tokens).await
    }

    /// With a token of each scope.
    async fn with_tokens() -> (Node, Texts) {
        let dir = tempfile::tempdir().unwrap();
        let tokens = TokenFile::new(dir.path().join("tokens.json"));
        let texts = Scope::ALL.map(|scope| (scope, create(&tokens, &format!("only-{scope}"), &[scope], None)));
        (Node::with(dir, tokens).await, Texts(texts))
    }

    async fn with(dir: tempfile::TempDir, tokens: TokenFile) -> Node {
        let config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            tokens_file: Some(tokens.path().to_owned()),
            shards: Some(1),
            ..Config::new(dir.path().join("data"))
        };
        Node { server: Server::start(config).await.unwrap(), tokens, http: http(), _dir: dir }
    }

    async fn status(&self, method: &str, path: &str, token: Option<&str>) -> StatusCode {
        self.ask(method, path, token, "").await.0
    }

    /// The head, and as much of the body as there is, if it is whole soon.
    async fn ask(&self, method: &str, path: &str, token: Option<&str>, body: &str) -> (StatusCode, Value) {
        let url = format!("{}{path}", self.server.url());
        let request = self.http.request(Method::from_bytes(method.as_bytes()).unwrap(), url);
        let request = token.into_iter().fold(request, |request, token| request.bearer_auth(token));
        let request = request.header("content-type", "application/json").body(body.to_owned());
        let response = tokio::time::timeout(DEADLINE, request.send()).await.unwrap().unwrap();
        let status = response.status();
        let is_stream = response.headers().get("content-type").is_some_and(|kind| kind == "text/event-stream");
        let text = if is_stream { String::new() } else { response.text().await.unwrap() };
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    async fn append(&self, token: &str) -> StatusCode {
        let path = "/v1/entities/account/secret-entity/events";
        self.ask("POST", path, Some(token), r#"{"type":"Deposited","data":{"amount":1}}"#).await.0
    }

    /// What was denied, and the version of the log.
    async fn denials(&self) -> (Vec<Denial>, u64) {
        let history = self.server.kuma().audit_log();
        let raw = history.raw();
        let events: Vec<_> = raw.history(1.., Direction::Forward).try_collect().await.unwrap();
        let version = events.last().map_or(0, |event| event.version.0);
        let denials = events.iter().filter_map(|event| match event.decode::<AuditLog>().unwrap() {
            AuditEvent::Denied(denial) => Some(denial),
            _ => None,
        });
        (denials.collect(), version)
    }
}

struct Texts([(Scope, String); 4]);

impl Texts {
    fn of(&self, wanted: Scope) -> &str {
        self.0.iter().find(|(scope, _)| *scope == wanted).map(|(_, text)| text.as_str()).unwrap()
    }
}

fn create(tokens: &TokenFile, name: &str, scopes: &[Scope], expires: Option<Duration>) -> String {
    tokens.create(name, scopes, expires).unwrap().1.expose().to_owned()
}

/// Asks again until it is so.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < DEADLINE, "it never came to that: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_operation_needs_its_scope_and_no_other_will_do() {
    let (node, texts) = Node::with_tokens().await;
    let (_, document) = node.ask("GET", "/openapi.json", None, "").await;
    let mut documented = Vec::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys().filter(|key| *key != "parameters") {
            documented.push((method.to_uppercase(), path.clone()));
        }
    }
    let mut written: Vec<_> =
        OPERATIONS.iter().map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned())).collect();
    documented.sort();
    written.sort();
    assert_eq!(documented, written, "the document and the table of this test have the same operations");

    let mut asked = Vec::new();
    for (method, path, needs) in OPERATIONS {
        asked.push((*method, *path, *needs, None));
        asked.extend(Scope::ALL.map(|scope| (*method, *path, *needs, Some(scope))));
    }
    // At once: each append of denials takes its time.
    let (node, texts) = (&node, &texts);
    let mut asked = stream::iter(asked)
        .map(|(method, path, needs, scope)| async move {
            let token = scope.map(|scope| texts.of(scope));
            (method, path, needs, scope, node.ask(method, &filled(path), token, "").await)
        })
        .buffer_unordered(200);
    while let Some((method, path, needs, scope, (status, body))) = asked.next().await {
        let is_denied = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
        let what = format!("{method} {path} with {scope:?}: {status} {body}");
        match (needs, scope) {
            (Needs::Nothing, _) | (Needs::Token, Some(_)) => assert!(!is_denied, "{what}"),
            (_, None) => {
                assert_eq!((status, body["code"].as_str()), (StatusCode::UNAUTHORIZED, Some("unauthorized")), "{what}")
            }
            (Needs::Scope(needed), Some(scope)) if needed == scope => assert!(!is_denied, "{what}"),
            (Needs::Scope(_), Some(_)) => {
                assert_eq!((status, body["code"].as_str()), (StatusCode::FORBIDDEN, Some("forbidden")), "{what}")
            }
        }
    }
    // Nor does HEAD, which is GET without its body, find another way in.
    for path in ["/v1/status", "/v1/entities/account/secret-entity"] {
        assert_eq!(node.status("HEAD", path, None).await, StatusCode::UNAUTHORIZED);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_writing_erasing_and_operating_are_apart() {
    let (node, texts) = Node::with_tokens().await;
    let entity = "/v1/entities/account/secret-entity";
    let erase = format!("{entity}?reason=request");
    assert_eq!(node.append(texts.of(Scope::Append)).await, StatusCode::CREATED);
    for scope in [Scope::Read, Scope::Erase, Scope::Admin] {
        assert_eq!(node.append(texts.of(scope)).await, StatusCode::FORBIDDEN);
    }
    for scope in [Scope::Append, Scope::Erase, Scope::Admin] {
        assert_eq!(node.status("GET", entity, Some(texts.of(scope))).await, StatusCode::FORBIDDEN);
    }
    for scope in [Scope::Append, Scope::Read, Scope::Admin] {
        assert_eq!(node.status("DELETE", &erase, Some(texts.of(scope))).await, StatusCode::FORBIDDEN);
    }
    let (status, state) = node.ask("GET", entity, Some(texts.of(Scope::Read)), "").await;
    assert_eq!((status, &state["version"]), (StatusCode::OK, &1.into()), "nothing of it was done");
    assert_eq!(node.status("DELETE", &erase, Some(texts.of(Scope::Erase))).await, StatusCode::OK);
    let (_, audit) = node.ask("GET", "/v1/audit", Some(texts.of(Scope::Admin)), "").await;
    assert!(audit.to_string().contains("token only-erase"), "who erased is noted: {audit}");
    // The store's own entity is nobody's: it can be neither forged nor erased.
    let own = "/v1/entities/kuma.audit/kuma";
    let (status, _) =
        node.ask("POST", &format!("{own}/events"), Some(texts.of(Scope::Append)), r#"{"type":"Denied"}"#).await;
    assert!(status.is_client_error(), "{status}");
    let status = node.status("DELETE", &format!("{own}?reason=x"), Some(texts.of(Scope::Erase))).await;
    assert!(status.is_client_error(), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_is_in_the_audit_log_when_it_is_answered() {
    let (node, texts) = Node::with_tokens().await;
    let erase = "/v1/entities/account/secret-entity?reason=secret-reason";
    assert_eq!(node.status("DELETE", erase, Some(texts.of(Scope::Admin))).await, StatusCode::FORBIDDEN);
    let denial = |token: Option<&str>, why: &str| Denial {
        token: token.map(str::to_owned),
        scope: "erase".to_owned(),
        request: "DELETE /v1/entities/{kind}/{id}".to_owned(),
        why: why.to_owned(),
        times: 1,
    };
    let scope = denial(Some("only-admin"), "the token does not have the scope");
    assert_eq!(node.denials().await.0, std::slice::from_ref(&scope));
    assert_eq!(node.status("DELETE", erase, None).await, StatusCode::UNAUTHORIZED);
    assert_eq!(node.denials().await.0, [scope.clone(), denial(None, "no token")]);
    let unknown = format!("{}x", &texts.of(Scope::Erase)[..texts.of(Scope::Erase).len() - 1]);
    assert_eq!(node.status("DELETE", erase, Some(&unknown)).await, StatusCode::UNAUTHORIZED);
    assert_eq!(node.denials().await.0, [scope, denial(None, "no token"), denial(None, "the token is not known")]);
    let (status, audit) = node.ask("GET", "/v1/audit", Some(texts.of(Scope::Admin)), "").await;
    assert_eq!((status, audit["events"].as_array().unwrap().len()), (StatusCode::OK, 3));
    let text = audit.to_string();
    for secret in
        ["secret-entity", "secret-reason", &unknown].into_iter().chain(texts.0.iter().map(|(_, text)| text.as_str()))
    {
        assert!(!text.contains(secret), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_denials_at_once_are_counted_in_a_few_commits() {
    let (node, texts) = Node::with_tokens().await;
    let (node, read) = (&node, texts.of(Scope::Read));
    let denied = stream::iter(0..1000)
        .map(|_| async move { node.append(read).await })
        .buffer_unordered(1000)
        .filter(|status| std::future::ready(*status == StatusCode::FORBIDDEN))
        .count()
        .await;
    assert_eq!(denied, 1000);
    let (denials, version) = node.denials().await;
    assert_eq!(denials.iter().map(|denial| denial.times).sum::<u64>(), 1000);
    assert!(version < 100, "{version} entries");
}

/// Two of one name: the old one and the new one of a rotation.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_come_into_force_and_go_without_a_restart() {
    let (node, texts) = Node::with_tokens().await;
    let old = texts.of(Scope::Append);
    let new = create(&node.tokens, "only-append", &[Scope::Append], None);
    until("the new token is taken", async || node.append(&new).await == StatusCode::CREATED).await;
    assert_eq!(node.append(old).await, StatusCode::CREATED, "the old one is in force beside it");
    let old_id = old["kuma_".len()..].split('_').next().unwrap();
    node.tokens.revoke(old_id, false).unwrap();
    until("the old token is refused", async || node.append(old).await == StatusCode::UNAUTHORIZED).await;
    assert_eq!(node.append(&new).await, StatusCode::CREATED);

    let short = create(&node.tokens, "short", &[Scope::Append], Some(Duration::from_secs(4)));
    until("the short one is taken", async || node.append(&short).await == StatusCode::CREATED).await;
    until("it expires", async || node.append(&short).await == StatusCode::UNAUTHORIZED).await;
    let (denials, _) = node.denials().await;
    assert!(
        denials.iter().any(|denial| denial.token.as_deref() == Some("short") && denial.why == "the token has expired")
    );
    assert_eq!(node.append(&new).await, StatusCode::CREATED);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_tokens_that_is_broken_or_gone_lets_nobody_in_and_nobody_out() {
    let (node, texts) = Node::with_tokens().await;
    let good = fs::read(node.tokens.path()).unwrap();
    // In one step, as any editor does it: the look every two seconds sees one or the other.
    let replace = |content: &[u8]| {
        let beside = node.tokens.path().with_extension("beside");
        fs::write(&beside, content).unwrap();
        fs::rename(&beside, node.tokens.path()).unwrap();
    };
    for (what, content) in [("empty", &b""[..]), ("cut", &good[..good.len() / 2]), ("of another kind", b"{}")] {
        replace(content);
        let _ = node.server.reload().await;
        assert!(!node.server.is_open(), "{what}");
        assert_eq!(node.append(texts.of(Scope::Append)).await, StatusCode::CREATED, "{what}");
        assert_eq!(node.status("GET", "/v1/status", None).await, StatusCode::UNAUTHORIZED, "{what}");
    }
    fs::remove_file(node.tokens.path()).unwrap();
    let _ = node.server.reload().await;
    assert!(!node.server.is_open());
    assert_eq!(node.append(texts.of(Scope::Append)).await, StatusCode::CREATED);
    assert_eq!(node.status("GET", "/v1/status", None).await, StatusCode::UNAUTHORIZED);
    // A file that is good again counts, even one with nobody in it.
    replace(br#"{"format":1,"tokens":[]}"#);
    let append = texts.of(Scope::Append);
    until("the revoked ones are refused", async || node.append(append).await == StatusCode::UNAUTHORIZED).await;
    assert_eq!(node.status("GET", "/v1/status", None).await, StatusCode::UNAUTHORIZED);
    assert!(!node.server.is_open());
}

#[tokio::test]
async fn without_tokens_other_machines_are_not_listened_to() {
    let dir = tempfile::tempdir().unwrap();
    for listen in ["0.0.0.0:0", "[::]:0"] {
        let config = Config { listen: listen.parse().unwrap(), ..Config::new(dir.path().join("data")) };
        match Server::start(config).await {
            // There may be no IPv6.
            Err(ServerError::Listen { .. }) if listen.starts_with('[') => {}
            Err(error @ ServerError::NoTokens { .. }) => assert!(error.to_string().contains("kuma-node token create")),
            other => panic!("{:?}", other.map(|server| server.url())),
        }
        assert!(!dir.path().join("data").exists(), "nothing was made");
    }
    // With a token it is.
    let tokens = TokenFile::new(dir.path().join("tokens.json"));
    create(&tokens, "app", &[Scope::Read], None);
    let config = Config {
        listen: "0.0.0.0:0".parse().unwrap(),
        tokens_file: Some(tokens.path().to_owned()),
        shards: Some(1),
        ..Config::new(dir.path().join("data"))
    };
    let server = Server::start(config).await.unwrap();
    assert!(!server.is_open());
    let url = format!("http://127.0.0.1:{}/v1/status", server.address().port());
    assert_eq!(http().get(&url).send().await.unwrap().status(), StatusCode::UNAUTHORIZED);
    server.stop().await;
}

/// A page in a browser on this machine can send requests here, by a name that its owner made point here (DNS rebinding) or from its own origin
/// (CSRF). It can leave neither header out.
#[tokio::test(flavor = "multi_thread")]
async fn without_tokens_pages_of_others_are_refused() {
    let node = Node::start().await;
    assert!(node.server.is_open());
    assert_eq!(node.append("").await, StatusCode::CREATED);
    let url = format!("{}/v1/entities/account/secret-entity/events", node.server.url());
    let port = node.server.address().port();
    let mine = format!("http://localhost:{port}");
    for (name, value, is_refused) in [
        ("host", "evil.example", true),
        ("host", "evil.example:4870", true),
        ("host", "127.0.0.1.evil.example", true),
        ("host", "localhost", false),
        ("origin", "https://evil.example", true),
        ("origin", "null", true),
        ("origin", "http://localhost.evil.example", true),
        ("origin", mine.as_str(), false),
    ] {
        let request = node.http.post(&url).header(name, value).body(r#"{"type":"Deposited","data":{}}"#);
        let response = request.header("content-type", "application/json").send().await.unwrap();
        let is_forbidden = response.status() == StatusCode::FORBIDDEN;
        assert_eq!(is_forbidden, is_refused, "{name}: {value}: {}", response.status());
    }
    let (_, state) = node.ask("GET", "/v1/entities/account/secret-entity", None, "").await;
    assert_eq!(state["version"], 3, "what was refused was not done");
    // Nor is anything told, not even by what needs no token.
    for path in ["/openapi.json", "/health/live", "/v1/status", "/nowhere"] {
        let request = node.http.get(format!("{}{path}", node.server.url())).header("host", "evil.example");
        assert_eq!(request.send().await.unwrap().status(), StatusCode::FORBIDDEN, "{path}");
    }
    // A node that was open is not any more when there is a token.
    create(&node.tokens, "first", &[Scope::Read], None);
    until("a token is needed", async || node.status("GET", "/v1/status", None).await == StatusCode::UNAUTHORIZED).await;
}

/// Kills the process when the test is over, however it ends.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_tokens_nor_ids_nor_data_are_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = TokenFile::new(dir.path().join("tokens.json"));
    let token = create(&tokens, "app", &Scope::ALL, None);
    let mut child = Killed(
        Command::new(env!("CARGO_BIN_EXE_kuma-node"))
            .args(["start", "--listen", "127.0.0.1:0", "--shards", "1", "--log", "debug", "--data"])
            .arg(dir.path().join("data"))
            .arg("--tokens-file")
            .arg(tokens.path())
            .env_remove("KUMA_TOKEN")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut lines = BufReader::new(child.0.stderr.take().unwrap());
    let mut log = String::new();
    let url = loop {
        let start = log.len();
        assert!(lines.read_line(&mut log).unwrap() > 0, "{log}");
        if let Some((_, rest)) = log[start..].split_once("kuma-node is ready") {
            break rest.split("url=").nth(1).unwrap().split_whitespace().next().unwrap().trim_matches('"').to_owned();
        }
    };
    let reader = std::thread::spawn(move || {
        lines.read_to_string(&mut log).unwrap();
        log
    });
    let http = http();
    let ask = async |method: &str, path: &str, token: &str, body: &'static str| {
        let request = http.request(method.parse().unwrap(), format!("{url}{path}")).bearer_auth(token);
        let request =
            request.header("content-type", "application/json").header("idempotency-key", "secret-key").body(body);
        request.send().await.unwrap().status()
    };
    let entity = "/v1/entities/account/secret-entity";
    let body = r#"{"type":"Deposited","data":{"iban":"secret-payload"}}"#;
    assert_eq!(ask("POST", &format!("{entity}/events"), &token, body).await, StatusCode::CREATED);
    assert_eq!(ask("GET", &format!("{entity}?version=1"), &token, "").await, StatusCode::OK);
    assert_eq!(
        ask("POST", &format!("{entity}/events"), &token, r#"{"type":"Deposited","data":{"secret-payload"#).await,
        StatusCode::BAD_REQUEST
    );
    let wrong = format!("{}x", &token[..token.len() - 1]);
    assert_eq!(ask("GET", entity, &wrong, "").await, StatusCode::UNAUTHORIZED);
    assert_eq!(ask("GET", "/v1/entities/account/secret-entity/nowhere", &token, "").await, StatusCode::NOT_FOUND);
    let query = r#"{"sql":"SELECT 'secret-payload'"}"#;
    assert_eq!(ask("POST", "/v1/projections/none/query", &token, query).await, StatusCode::NOT_FOUND);
    assert_eq!(ask("DELETE", &format!("{entity}?reason=secret-reason"), &token, "").await, StatusCode::OK);
    child.0.kill().unwrap();
    let log = reader.join().unwrap();
    assert!(log.contains("DELETE") && log.contains("/v1/entities/{kind}/{id}"), "there is an access log: {log}");
    let id_free = ["secret-entity", "secret-payload", "secret-reason", "secret-key", &token, &wrong, &token[14..]];
    for secret in id_free {
        assert!(!log.contains(secret), "{secret} is in the log:\n{log}");
    }
}
