//! The program as it is operated: a node that is started, asked, signalled and killed.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Long enough for a busy machine: nothing waits for it that goes well.
const DEADLINE: Duration = Duration::from_secs(60);

const BALANCES: &str = "
-- projection: balances
-- version: 1
-- erasure: column balance.account
CREATE TABLE balance(account TEXT PRIMARY KEY, amount INTEGER NOT NULL) STRICT;

-- on account.Deposited
INSERT INTO balance(account, amount) VALUES (:entity, :data ->> 'amount')
ON CONFLICT(account) DO UPDATE SET amount = amount + excluded.amount;
";

/// The program, with nothing of the environment of whoever runs the tests.
fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kuma-node"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KUMA_")) {
        command.env_remove(name);
    }
    command
}

/// Asks again until it is so.
fn until<T>(what: &str, mut is_so: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = is_so() {
            return found;
        }
        assert!(begun.elapsed() < DEADLINE, "it never came to that: {what}");
        std::thread::sleep(Duration::from_millis(30));
    }
}

/// A process whose standard error, or output, is gathered. It is killed with the test.
struct Process {
    child: Child,
    text: Arc<Mutex<String>>,
}

impl Process {
    fn of(mut child: Child, read: impl Read + Send + 'static) -> Process {
        let text = Arc::new(Mutex::new(String::new()));
        let gathered = text.clone();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(read);
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
                gathered.lock().unwrap().push_str(&std::mem::take(&mut line));
            }
        });
        child.stdin.take();
        Process { child, text }
    }

    fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    fn wait_for(&self, what: &str) -> String {
        until(what, || Some(self.text()).filter(|text| text.contains(what)))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(&mut self) -> ExitStatus {
        until("the process ends", || self.child.try_wait().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Node {
    process: Process,
    url: String,
    token: Option<String>,
}

impl Node {
    fn start(data: &Path) -> Node {
        Node::with(data, [] as [&str; 0])
    }

    fn with(data: &Path, more: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Node {
        let mut child = program()
            .args(["start", "--listen", "127.0.0.1:0", "--shards", "2", "--data"])
            .arg(data)
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let process = Process::of(child, stderr);
        let url = until("the node is ready", || {
            let text = process.text();
            let line = text.lines().find(|line| line.contains("kuma-node is ready"))?;
            let url = line.split_once("url=")?.1.split_whitespace().next()?;
            Some(url.trim_matches('"').to_owned())
        });
        Node { process, url, token: None }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = program();
        command.args(words).env("KUMA_URL", &self.url).stdin(Stdio::null());
        if let Some(token) = &self.token {
            command.env("KUMA_TOKEN", token);
        }
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// What a verb prints that succeeds.
    fn text(&self, words: &[&str]) -> String {
        succeeded(words, self.run(words))
    }

    /// The same as JSON.
    fn json(&self, words: &[&str]) -> Value {
        let words = [words, &["--json"]].concat();
        let text = self.text(&words);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{words:?}: {error}: {text}"))
    }

    /// The same as JSON, a document a line.
    fn json_lines(&self, words: &[&str]) -> Vec<Value> {
        let words = [words, &["--json"]].concat();
        let text = self.text(&words);
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{words:?}: {line}"))).collect()
    }

    /// The exit code of a verb that fails, and what it says.
    fn failure(&self, words: &[&str]) -> (i32, String) {
        failed(self.run(words))
    }

    fn append(&self, id: &str, amount: u64) {
        self.text(&["entity", "append", "account", id, "Deposited", &json!({ "amount": amount }).to_string()]);
    }

    /// As a supervisor does it. Returns the log.
    fn terminate(mut self) -> String {
        self.process.signal(Signal::TERM);
        let status = self.process.end();
        assert_eq!(status.code(), Some(0), "{}", self.process.text());
        self.process.wait_for("kuma-node has stopped")
    }
}

fn succeeded(words: &[&str], output: Output) -> String {
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {:?}: {told}", output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    // It went into a pipe.
    assert!(!text.contains('\u{1b}') && !told.contains('\u{1b}'), "{words:?}: {text}{told}");
    text
}

fn failed(output: Output) -> (i32, String) {
    assert!(!output.status.success(), "{output:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn temporary() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    (dir, data)
}

#[test]
fn tokens_are_made_used_listed_and_revoked() {
    let (_dir, data) = temporary();
    let data = path(&data).to_owned();
    let token = |words: &[&str]| {
        let words = [&["token"], words, &["--data", &data]].concat();
        let output = program().args(&words).output().unwrap();
        succeeded(&words, output)
    };
    let operator = token(&["create", "--name", "operator", "--scopes", "admin,read"]).trim().to_owned();
    let reader: Value =
        serde_json::from_str(&token(&["create", "--name", "reader", "--scopes", "read", "--json"])).unwrap();
    let mut node = Node::start(Path::new(&data));
    assert_eq!(node.failure(&["audit"]).0, 1, "no token");
    assert!(node.text(&["status"]).starts_with("ok\n"), "a health check needs none");
    node.token = Some(reader["token"].as_str().unwrap().to_owned());
    assert_eq!(node.json(&["projections", "list"])["projections"], json!([]));
    let (code, told) = node.failure(&["entity", "append", "account", "a", "Deposited", "1"]);
    assert!(code == 1 && told.contains("does not have the scope `append`"), "{told}");
    node.token = None;
    let file = Path::new(&data).join("operator.token");
    fs::write(&file, format!("{operator}\n")).unwrap();
    let audit = node.json_lines(&["audit", "--token-file", path(&file)]);
    // A denial is never forgotten: a health check every few seconds must not be one.
    let denied: Vec<_> = audit.iter().map(|entry| entry["data"]["request"].as_str().unwrap()).collect();
    assert_eq!(denied, ["GET /v1/audit", "POST /v1/entities/{kind}/{id}/events"]);
    let listed: Value = serde_json::from_str(&token(&["list", "--json"])).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 2);
    assert!(!token(&["list"]).contains(&operator[14..]));
    assert!(token(&["revoke", "reader"]).contains("of reader"));
    node.process.signal(Signal::HUP);
    node.token = Some(reader["token"].as_str().unwrap().to_owned());
    until("the revoked token is refused", || {
        node.run(&["projections", "list"]).status.code().filter(|code| *code == 1)
    });
    assert!(!node.terminate().contains(&operator[14..]));
}

#[test]
fn an_entity_is_operated_from_its_first_event_to_its_receipt() {
    let (dir, data) = temporary();
    let node = Node::start(&data);
    let account = |verb, more: &[&'static str]| [&["entity", verb, "account", "a"], more].concat();
    assert_eq!(
        node.text(&account("append", &["Deposited", r#"{"amount":1}"#, "--expect", "0"])),
        "appended: version 1\n"
    );
    let key = ["Deposited", r#"{"amount":2}"#, "--key", "k"];
    assert_eq!(node.json(&account("append", &key)), json!({"version": 2, "repeated": false, "key": "k"}));
    assert_eq!(node.json(&account("append", &key)), json!({"version": 2, "repeated": true, "key": "k"}));
    let (code, told) = node.failure(&account("append", &["Deposited", "1", "--expect", "0"]));
    assert!(code == 1 && told.starts_with("error: "), "{told}");
    assert_eq!(
        node.json(&account("show", &[])),
        json!({"kind": "account", "id": "a", "version": 2, "state": {"amount": 2}})
    );
    assert!(node.text(&account("show", &[])).starts_with("account/a at version 2\n"));
    assert_eq!(node.json(&account("at", &["--version", "1"]))["state"], json!({"amount": 1}));
    let history = node.json_lines(&account("history", &[]));
    assert_eq!(history.iter().map(|event| event["version"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(node.text(&account("history", &["--reverse"])).lines().count(), 2);
    let at = history[0]["at"].as_str().unwrap();
    let then = node.json(&["entity", "at", "account", "a", "--time", at]);
    assert_eq!(then["version"], 1);
    assert_eq!(node.text(&account("diff", &["1", "2"])), "~ /amount: 1 → 2\n");
    assert_eq!(node.json(&account("diff", &["1", "2"]))["changes"][0]["after"], 2);

    let exported = node.text(&account("export", &[]));
    assert!(exported.lines().count() >= 2 && exported.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
    let file = dir.path().join("account.ndjson");
    assert_eq!(node.json(&["entity", "export", "account", "a", "-o", path(&file)])["events"], 2);
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), exported.lines().count());
    assert!(node.text(&account("export", &["--archive"])).lines().count() >= 2);

    let life = node.json(&account("restore-to", &["1", "--reason", "a mistake", "--yes"]));
    assert_eq!(life, json!({"life": 2, "version": 1}));
    let (code, told) = node.failure(&account("erase", &["--reason", "request 1"]));
    assert!(code == 2 && told.contains("--yes"), "there is no terminal to ask on: {told}");
    let file = dir.path().join("receipt.json");
    let receipt = ["entity", "erase", "account", "a", "--reason", "request 1", "--yes", "--receipt", path(&file)];
    let receipt: Value = serde_json::from_str(&node.text(&receipt)).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&fs::read_to_string(&file).unwrap()).unwrap(), receipt);
    let (code, told) = node.failure(&account("show", &[]));
    assert!(code == 1 && told.contains("erased"), "{told}");
    assert_eq!(node.json(&["receipt", "verify", path(&file)])["is_clean"], true);
    assert!(node.text(&["receipt", "verify", path(&file)]).lines().all(|line| line.starts_with("ok")));
    let audit = node.json_lines(&["audit"]);
    let id = audit.last().unwrap()["data"].to_string();
    let id = id.split('"').find(|part| part.len() == 32 && part.bytes().all(|byte| byte.is_ascii_hexdigit())).unwrap();
    assert_eq!(node.json(&["receipt", "show", id]), receipt);
    assert_eq!(node.failure(&["receipt", "show", "00112233445566778899aabbccddeeff"]).0, 1);
    let mut forged = receipt.clone();
    forged["signature"] = json!("00".repeat(64));
    fs::write(&file, forged.to_string()).unwrap();
    let code = node.run(&["receipt", "verify", path(&file)]).status.code();
    assert!(matches!(code, Some(1 | 4)), "{code:?}");
    assert_eq!(node.json(&account("recreate", &["--reason", "came back"])), json!({"life": 3, "version": 0}));
    node.append("a", 5);
    assert_eq!(node.json(&["verify"])["is_clean"], true);
    let status = node.json(&["status"]);
    assert_eq!((&status["health"]["status"], &status["node"]["durability"]), (&json!("ok"), &json!("full")));
    node.terminate();
}

#[test]
fn files_of_projections_are_taken_over_while_the_node_runs() {
    let (dir, data) = temporary();
    let files = dir.path().join("projections");
    fs::create_dir(&files).unwrap();
    fs::write(files.join("balances.sql"), BALANCES).unwrap();
    let node = Node::with(&data, ["--projections-dir", path(&files)]);
    node.append("a", 7);
    let query = |name: &str, sql: &str, rows: Value| {
        until(sql, || {
            let output = node.run(&["projections", "query", name, sql, "--json"]);
            let answer: Value = serde_json::from_slice(&output.stdout).ok()?;
            (answer["rows"] == rows).then_some(())
        });
    };
    query("balances", "SELECT amount FROM balance WHERE account = 'a'", json!([{"amount": 7}]));
    let sql = "SELECT amount FROM balance WHERE account = ?";
    assert_eq!(node.text(&["projections", "query", "balances", sql, "--param", "a"]), "7\n");
    // A new one.
    let other = BALANCES.replace("balances", "totals").replace("amount + excluded.amount", "0");
    fs::write(files.join("totals.sql"), other).unwrap();
    query("totals", "SELECT count(*) AS n FROM balance", json!([{"n": 1}]));
    // One that is broken: what is served goes on, and it is told.
    fs::write(files.join("balances.sql"), BALANCES.replace("INSERT INTO balance", "INSERT INTO blance")).unwrap();
    let problem = until("the broken file is told of", || {
        let list = node.json(&["projections", "list"]);
        list["refused_files"].as_array()?.iter().find(|file| file["file"] == "balances.sql")?["problem"]
            .as_str()
            .map(str::to_owned)
    });
    assert!(problem.contains("blance"), "{problem}");
    node.append("a", 1);
    query("balances", "SELECT amount FROM balance WHERE account = 'a' -- again", json!([{"amount": 8}]));
    let listed = node.run(&["projections", "list"]);
    assert!(
        String::from_utf8(listed.stderr).unwrap().contains("balances.sql"),
        "what is wrong is told beside the table"
    );
    fs::write(files.join("balances.sql"), BALANCES).unwrap();
    until("it is mended", || (node.json(&["projections", "list"])["refused_files"] == json!([])).then_some(()));

    assert_eq!(node.json(&["projections", "pause", "balances"])["state"], "paused");
    node.json(&["projections", "resume", "balances"]);
    node.json(&["projections", "rebuild", "balances"]);
    query("balances", "SELECT amount FROM balance WHERE account = 'a' -- rebuilt", json!([{"amount": 8}]));
    assert_eq!(node.json(&["projections", "show", "balances"])["projection"]["name"], "balances");
    assert!(node.text(&["projections", "show", "balances"]).contains("balances"));
    let (code, told) = node.failure(&["projections", "query", "balances", "DELETE FROM balance"]);
    assert!(code == 1, "{told}");
    let (code, told) = node.failure(&["projections", "drop", "totals"]);
    assert!(code == 1 && told.contains("totals.sql"), "{told}");
    fs::remove_file(files.join("totals.sql")).unwrap();
    until("it can be dropped", || node.run(&["projections", "drop", "totals"]).status.success().then_some(()));
    assert_eq!(node.failure(&["projections", "show", "totals"]).0, 1);
    node.terminate();
}

#[test]
fn a_tail_ends_with_a_checkpoint_that_goes_on() {
    let (_dir, data) = temporary();
    let node = Node::start(&data);
    node.append("a", 1);
    let tail = |from: &str| {
        let words = ["subscriptions", "tail", "--json", "--kind", "account", "--from", from];
        let mut child = node.command(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        (Process::of(child, stdout), stderr)
    };
    let (mut first, mut told) = tail("beginning");
    first.wait_for("\n");
    node.append("b", 2);
    first.wait_for("\"b\"");
    first.signal(Signal::INT);
    assert_eq!(first.end().code(), Some(0));
    let lines: Vec<Value> = first.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ids: Vec<_> = lines.iter().map(|line| line["data"]["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["a", "b"]);
    let mut text = String::new();
    told.read_to_string(&mut text).unwrap();
    let checkpoint = text.split("--from ").nth(1).unwrap().trim();
    assert_eq!(checkpoint, lines[1]["checkpoint"]);
    node.append("c", 3);
    let (mut second, _) = tail(checkpoint);
    let line: Value = serde_json::from_str(second.wait_for("\n").lines().next().unwrap()).unwrap();
    assert_eq!(line["data"]["id"], "c", "nothing comes twice");
    second.signal(Signal::INT);
    assert_eq!(second.end().code(), Some(0));
    // A subscription does not hold up the end of the node.
    let (_open, _) = tail("now");
    node.terminate();
}

#[test]
fn a_backup_becomes_a_store_again() {
    let (dir, data) = temporary();
    let backups = dir.path().join("backups");
    let node = Node::with(&data, ["--backup-dir", path(&backups)]);
    (0..20).for_each(|n| node.append(&format!("a{}", n % 5), n));
    node.text(&["entity", "erase", "account", "a4", "--reason", "request 1", "--yes"]);
    let report = node.json(&["backup", "daily"]);
    assert_eq!((&report["part"], &report["is_verified"]), (&json!("events"), &json!(true)));
    assert_eq!(node.json(&["backup", "daily", "--part", "keys"])["part"], "keys");
    assert_eq!(node.json(&["backup", "daily", "--part", "ledger"])["part"], "ledger");
    assert!(node.text(&["backup", "daily"]).starts_with("backed up to "));
    let before = node.json(&["entity", "show", "account", "a3"]);
    // After the backup: a newer ledger has it.
    node.text(&["entity", "erase", "account", "a0", "--reason", "request 2", "--yes"]);
    node.json(&["backup", "daily", "--part", "ledger"]);
    node.terminate();

    let (restored, daily) = (dir.path().join("restored"), backups.join("daily"));
    let (events, keys, ledger) = (daily.join("events"), daily.join("keys"), daily.join("ledger"));
    let master_key = data.join("master.key");
    let restore = [
        "restore",
        path(&events),
        "--keys",
        path(&keys),
        "--ledger",
        path(&ledger),
        "--data",
        path(&restored),
        "--master-key",
        path(&master_key),
        "--json",
    ];
    let text = succeeded(&restore, program().args(restore).output().unwrap());
    let report: Value = serde_json::from_str(&text).unwrap();
    assert!(report.is_object(), "{report}");
    let (code, told) = failed(program().args(restore).output().unwrap());
    assert!(code == 1 && told.contains("\"error\""), "it is not empty any more: {told}");
    let node = Node::with(&restored, ["--master-key-file", path(&master_key)]);
    assert_eq!(node.json(&["entity", "show", "account", "a3"]), before);
    for erased in ["a0", "a4"] {
        assert!(node.failure(&["entity", "show", "account", erased]).1.contains("erased"));
    }
    assert_eq!(node.json(&["verify"])["is_clean"], true);
    node.terminate();
}

#[test]
fn what_was_exported_is_imported_once() {
    let (dir, data) = temporary();
    let node = Node::start(&data);
    (0..12).for_each(|n| node.append(&format!("a{}", n % 3), n));
    let file = dir.path().join("all.ndjson");
    assert!(node.text(&["export", "-o", path(&file)]).starts_with("exported 12 events in 12 commits of 3 entities"));
    assert_eq!(node.json(&["export", "-o", path(&file)])["events"], 12);
    let piped = node.text(&["export", "-o", "-"]);
    assert!(piped.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
    let state = node.json(&["entity", "show", "account", "a2"]);
    node.terminate();

    let node = Node::start(&dir.path().join("other"));
    let report = node.json(&["import", path(&file)]);
    assert_eq!((&report["events"], &report["new_events"]), (&json!(12), &json!(12)));
    let again = node.json(&["import", path(&file)]);
    assert_eq!(
        (&again["events"], &again["new_events"], &again["repeated_events"]),
        (&json!(12), &json!(0), &json!(12))
    );
    assert!(node.text(&["import", path(&file)]).contains("nothing was new"));
    assert_eq!(node.json(&["entity", "show", "account", "a2"])["state"], state["state"]);
    assert_eq!(node.failure(&["import", "-"]).0, 2, "standard input has no name");
    fs::write(&file, "{\"kind\":\n").unwrap();
    let (code, told) = node.failure(&["import", path(&file), "--source", "broken"]);
    assert!(code == 1 && told.contains("line 1"), "{told}");
    node.terminate();
}

#[test]
fn how_it_ended_is_in_the_exit_code() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let code = |words: &[&str]| failed(program().args(words).stdin(Stdio::null()).output().unwrap());
    for verb in [
        &["status"][..],
        &["verify"],
        &["audit"],
        &["entity", "show", "a", "b"],
        &["bench", "--seconds", "1"],
        &["subscriptions", "tail"],
    ] {
        let (code, told) = code(&[verb, &["--url", &url]].concat());
        assert!(code == 3 && told.contains(&url), "{verb:?}: {code}: {told}");
    }
    let (three, told) = code(&["status", "--json", "--url", &url]);
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((three, &told["exit"]), (3, &json!(3)));
    for wrong in
        [&["nothing"][..], &["entity", "show", "a"], &["status", "--url", "nowhere"], &["start", "--listen", "here"]]
    {
        let (code, told) = code(wrong);
        assert!(matches!(code, 1 | 2) && !told.contains("panicked"), "{wrong:?}: {code}: {told}");
    }
    assert_eq!(code(&["nothing"]).0, 2);
    assert_eq!(code(&["status", "--url", "nowhere"]).0, 2);
}

#[test]
fn settings_and_completions_are_printed_without_a_node() {
    let output = program().args(["completions", "bash"]).output().unwrap();
    assert!(succeeded(&["completions"], output).contains("complete -F _kuma__node"));
    let (dir, _) = temporary();
    let file = dir.path().join("kuma.toml");
    fs::write(&file, "listen = \"127.0.0.1:1\"\nshards = 3\n").unwrap();
    let config = |more: &[&str]| {
        let mut command = program();
        command.args(["config", "--data", "here", "--config", path(&file)]).args(more).env("KUMA_SHARDS", "5");
        succeeded(&["config"], command.output().unwrap())
    };
    let settings: Value = serde_json::from_str(&config(&["--json"])).unwrap();
    let of = |name: &str| {
        settings["settings"].as_array().unwrap().iter().find(|setting| setting["name"] == name).unwrap().clone()
    };
    assert_eq!((&of("data")["value"], &of("data")["origin"]["from"]), (&json!("here"), &json!("flag")));
    assert_eq!(of("shards")["origin"]["variable"], "KUMA_SHARDS");
    assert_eq!(of("listen")["origin"]["from"], "file");
    assert_eq!(of("context")["origin"]["from"], "default");
    assert!(config(&[]).lines().any(|line| line.starts_with("shards\t5\t")));
}

/// Says what a node of HTTP/1.1 is to be sent, in pieces.
struct Stream(TcpStream);

impl Stream {
    fn open(node: &Node, path: &str) -> Stream {
        let address = node.url.strip_prefix("http://").unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        Stream(stream)
    }

    fn line(&mut self, line: &Value) {
        let line = format!("{line}\n");
        self.0.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).unwrap();
    }

    /// What comes until this is in it.
    fn read_until(&mut self, what: &str) -> String {
        let (mut text, mut buffer) = (String::new(), [0; 4096]);
        while !text.contains(what) {
            let read = self.0.read(&mut buffer).unwrap();
            assert!(read > 0, "{what} does not come: {text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
        text
    }
}

#[test]
fn terminated_it_answers_what_it_took_and_keeps_what_it_answered() {
    let (_dir, data) = temporary();
    let node = Node::start(&data);
    let mut stream = Stream::open(&node, "/v1/append");
    let append = |n: u64| json!({"kind": "account", "id": "slow", "key": n.to_string(), "events": [{"type": "Deposited", "data": {"amount": n}}]});
    stream.line(&append(1));
    stream.read_until("\"version\":1");
    (2..=50).for_each(|n| stream.line(&append(n)));
    node.process.signal(Signal::TERM);
    // The stream has no end of its own: the node ends it, in words or by closing it.
    let mut rest = String::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.0.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => rest.push_str(&String::from_utf8_lossy(&buffer[..read])),
            Err(error) => panic!("the stream does not end: {error}: {rest}"),
        }
    }
    node.terminate_when_told();
    let acknowledged = 1 + rest.matches("\"version\":").count() as u64;
    let node = Node::start(&data);
    let version = node.json(&["entity", "show", "account", "slow"])["version"].as_u64().unwrap();
    assert!(version >= acknowledged, "{acknowledged} were acknowledged, {version} are there: {rest}");
    assert_eq!(node.json(&["verify"])["is_clean"], true);
    node.terminate();
}

impl Node {
    /// It was told already.
    fn terminate_when_told(mut self) {
        assert_eq!(self.process.end().code(), Some(0), "{}", self.process.text());
    }
}

#[test]
fn killed_under_load_it_comes_back_whole() {
    let (_dir, data) = temporary();
    let mut node = Node::start(&data);
    let report = node.json(&["bench", "--seconds", "1", "--connections", "4", "--entities", "100"]);
    assert!(report["events"].as_u64().unwrap() > 0 && report["failures"] == 0, "{report}");
    let mut bench = {
        let child =
            node.command(&["bench", "--seconds", "60", "--connections", "8", "--stream", "100", "--entities", "100"]);
        let mut child = { child }.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        Process::of(child, stderr)
    };
    let writes = |node: &Node| {
        let status = node.json(&["status"]);
        status["node"]["shards"].as_array().unwrap().iter().map(|shard| shard["writes"].as_u64().unwrap()).sum::<u64>()
    };
    let before = writes(&node);
    until("the load has begun", || (writes(&node) > before + 500).then_some(()));
    node.process.child.kill().unwrap();
    node.process.child.wait().unwrap();
    assert!(!bench.end().success(), "the load says that it was cut off");
    let node = Node::start(&data);
    let found = node.json(&["verify"]);
    assert_eq!((&found["is_clean"], &found["damage"]), (&json!(true), &json!([])));
    assert!(found["events"].as_u64() >= report["events"].as_u64());
    assert!(node.text(&["verify"]).contains("events"));
    node.terminate();
}

#[test]
fn a_second_node_is_refused_with_a_sentence() {
    let (dir, data) = temporary();
    let node = Node::start(&data);
    let start = |data: &Path, listen: &str| {
        let output = program().args(["start", "--listen", listen, "--data", path(data)]).output().unwrap();
        failed(output)
    };
    let (code, told) = start(&data, "127.0.0.1:0");
    assert_eq!(code, 1);
    let last = told.lines().last().unwrap();
    assert!(last.starts_with("error: ") && last.contains("another process"), "{told}");
    let other = dir.path().join("other");
    let (code, told) = start(&other, node.url.strip_prefix("http://").unwrap());
    assert_eq!(code, 1);
    assert!(told.contains("is another node running there?"), "{told}");
    assert!(!other.exists(), "nothing was made");
    node.append("a", 1);
    node.process.signal(Signal::HUP);
    node.process.wait_for("were read again");
    node.append("a", 2);
    node.terminate();
}
