//! The documents tell the truth: their examples are executed against a node, and their tables are compared with the code.
//!
//! How a document is read ([`run_blocks`]):
//! - A ```` ```sh ```` block is executed by bash (`-euo pipefail`), one after the other in one directory, with `kuma-node` in its path. Blocks of
//!   `cargo` commands are passed over.
//! - A ```` ```json ```` or ```` ```text ```` block directly behind it is what it prints. In text `...` stands for anything; in JSON the string
//!   `"..."` stands for any value, at the end of a list for any more elements, and as the name of a field for any more fields.
//! - The node is started with the options of the first line that has `kuma-node` and ` start` in it and does not stand in an executed block.
//! - `localhost:4870` is replaced by where the node listens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

/// Long enough for a busy machine: nothing waits for it that goes well.
const DEADLINE: Duration = Duration::from_secs(60);
/// What documents call the node.
const ADDRESS: &str = "localhost:4870";
const HTTP_MD: &str = "docs/http.md";

#[test]
fn the_examples_of_the_reference_are_true() {
    run_blocks(HTTP_MD, None);
}

#[test]
fn the_first_steps_of_the_readme_are_true() {
    run_blocks("README.md", Some("## Over HTTP"));
}

/// Executes the blocks of a document, or of its section with this heading (`## Over HTTP`).
fn run_blocks(path: &str, heading: Option<&str>) {
    if let Some(why) = why_not() {
        eprintln!("SKIPPED, the examples of {path} were not executed: {why}");
        return;
    }
    let text = document(path);
    let blocks = blocks(section(&text, heading).unwrap_or_else(|| panic!("{path} has no section {heading:?}")));
    let scratch = tempfile::tempdir().unwrap();
    let node = Node::start(scratch.path(), &start_arguments(&blocks));
    let mut executed = 0;
    for (n, block) in blocks.iter().enumerate() {
        let place = format!("{path}, line {}", block.line);
        match block.language.as_str() {
            "sh" if block.text.starts_with("cargo ") => {}
            "sh" => {
                let printed = node.run(&block.text, &place);
                executed += 1;
                if let Some(expected) = blocks.get(n + 1).filter(|next| next.is_directly_behind) {
                    let differs = match expected.language.as_str() {
                        "json" => json_differs(&expected.text, &printed),
                        "text" => text_differs(&expected.text, &printed),
                        _ => None,
                    };
                    if let Some(why) = differs {
                        panic!("{place}: {why}\n--- the document says\n{}--- it printed\n{printed}", expected.text);
                    }
                }
            }
            "json" => {
                let is_checked = block.is_directly_behind && n > 0 && blocks[n - 1].language == "sh";
                assert!(is_checked, "{place}: JSON that is not behind an executed block is not checked; call it text");
            }
            _ => {}
        }
    }
    assert!(executed > 0, "{path}: no block was executed");
    eprintln!("{path}: {executed} blocks were executed");
}

/// Why examples cannot be executed here.
fn why_not() -> Option<String> {
    let run = |program: &str, argument: &str| Command::new(program).arg(argument).output().ok();
    if run("bash", "--version").is_none() {
        return Some("there is no bash".to_owned());
    }
    let Some(curl) = run("curl", "--version") else { return Some("there is no curl".to_owned()) };
    let text = String::from_utf8_lossy(&curl.stdout).into_owned();
    let version = text.split_whitespace().nth(1).unwrap_or_default();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let version_of = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (version_of < (7, 82)).then(|| format!("curl {version} has no --json, 7.82 has"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn document(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All of it, or what stands under a heading.
fn section<'a>(text: &'a str, heading: Option<&str>) -> Option<&'a str> {
    let Some(heading) = heading else { return Some(text) };
    let from = text.find(&format!("\n{heading}\n"))? + 1;
    let rest = &text[from + heading.len()..];
    let level = heading.split(' ').next().unwrap_or_default();
    Some(rest.find(&format!("\n{level} ")).map_or(rest, |to| &rest[..to]))
}

#[derive(Debug)]
struct Block {
    line: usize,
    language: String,
    text: String,
    /// Nothing but empty lines is between it and the block before.
    is_directly_behind: bool,
}

fn blocks(text: &str) -> Vec<Block> {
    let (mut blocks, mut open, mut is_directly_behind) = (Vec::new(), None::<Block>, false);
    for (n, line) in text.lines().enumerate() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(language)) => {
                let language = language.split([',', ' ']).next().unwrap_or_default().to_owned();
                open = Some(Block { line: n + 1, language, text: String::new(), is_directly_behind });
            }
            (None, None) => is_directly_behind &= line.trim().is_empty(),
            (Some(_), Some(_)) => {
                blocks.extend(open.take());
                is_directly_behind = true;
            }
            (Some(block), None) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
        }
    }
    assert!(open.is_none(), "a block has no end");
    blocks
}

/// The options that the document starts a node with.
fn start_arguments(blocks: &[Block]) -> Vec<String> {
    let not_executed = blocks.iter().filter(|block| block.language != "sh" || block.text.starts_with("cargo "));
    let mut lines = not_executed.flat_map(|block| block.text.lines());
    let line = lines.find(|line| line.contains("kuma-node") && line.contains(" start"));
    let Some((_, arguments)) = line.and_then(|line| line.split_once(" start")) else {
        return vec!["--data".to_owned(), "./data".to_owned()];
    };
    arguments.split_whitespace().take_while(|word| !word.starts_with(['#', '&'])).map(str::to_owned).collect()
}

/// A node in a process of its own, which ends with it.
struct Node {
    process: Child,
    url: String,
    scratch: PathBuf,
}

impl Node {
    fn start(scratch: &Path, arguments: &[String]) -> Node {
        let log = scratch.join("node.log");
        let process = clean(&mut Command::new(env!("CARGO_BIN_EXE_kuma-node")), scratch)
            .arg("start")
            .args(arguments)
            .args(["--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut node = Node { process, url: String::new(), scratch: scratch.to_owned() };
        let begun = Instant::now();
        while node.url.is_empty() {
            let text = fs::read_to_string(&log).unwrap();
            let ready = text.lines().find(|line| line.contains("kuma-node is ready")).and_then(|line| {
                let (_, url) = line.split_once("url=\"")?;
                url.split_once('"')
            });
            match ready {
                Some((url, _)) => node.url = url.to_owned(),
                None => {
                    let is_there = node.process.try_wait().unwrap().is_none() && begun.elapsed() < DEADLINE;
                    assert!(is_there, "the node did not start:\n{text}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        node
    }

    /// What a script prints.
    fn run(&self, script: &str, place: &str) -> String {
        let script = script.replace(ADDRESS, self.url.trim_start_matches("http://"));
        let (out, err) = (self.scratch.join("node.out"), self.scratch.join("node.err"));
        let mut command = Command::new("bash");
        let path = Path::new(env!("CARGO_BIN_EXE_kuma-node")).parent().unwrap().to_owned();
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let paths = std::env::join_paths(std::iter::once(path).chain(std::env::split_paths(&paths))).unwrap();
        let mut process = clean(&mut command, &self.scratch)
            .args(["-euo", "pipefail", "-c", &script])
            .env("PATH", paths)
            .env("KUMA_URL", &self.url)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(&err).unwrap())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        let status = loop {
            match process.try_wait().unwrap() {
                Some(status) => break status,
                None if begun.elapsed() < DEADLINE => std::thread::sleep(Duration::from_millis(5)),
                None => {
                    process.kill().unwrap();
                    process.wait().unwrap();
                    panic!("{place}: it did not end\n{script}");
                }
            }
        };
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap()).replace('\r', "");
        let (out, err) = (read(&out), read(&err));
        assert!(status.success(), "{place}: {status}\n{script}--- it printed\n{out}\n--- and\n{err}");
        out
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Without what the machine has set: settings of a node, proxies, a .curlrc.
fn clean<'a>(command: &'a mut Command, directory: &Path) -> &'a mut Command {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy().to_lowercase();
        if text.starts_with("kuma_") || text.ends_with("_proxy") {
            command.env_remove(name);
        }
    }
    command.current_dir(directory).env("HOME", directory).env("NO_COLOR", "1")
}

/// Why a text is not what the document says.
fn text_differs(expected: &str, printed: &str) -> Option<String> {
    let (expected, mut rest) = (expected.trim(), printed.trim());
    let parts: Vec<&str> = expected.split("...").collect();
    for (n, part) in parts.iter().enumerate() {
        let is_last = n + 1 == parts.len();
        let found = match () {
            () if n == 0 && is_last => (rest == *part).then_some(0),
            () if n == 0 => rest.starts_with(part).then_some(0),
            () if is_last => rest.ends_with(part).then(|| rest.len() - part.len()),
            () => rest.find(part),
        };
        match found {
            Some(at) => rest = &rest[at + part.len()..],
            None => return Some(format!("`{part}` is not there")),
        }
    }
    None
}

/// Why JSON, one value behind the other, is not what the document says.
fn json_differs(expected: &str, printed: &str) -> Option<String> {
    let values = |text: &str| serde_json::Deserializer::from_str(text).into_iter().collect::<Result<Vec<Value>, _>>();
    let (expected, printed) = match (values(expected), values(printed)) {
        (Ok(expected), Ok(printed)) => (expected, printed),
        (Err(error), _) => return Some(format!("the document's JSON is none: {error}")),
        (_, Err(error)) => return Some(format!("it printed no JSON: {error}")),
    };
    value_differs(&Value::Array(expected), &Value::Array(printed), "")
}

fn value_differs(expected: &Value, printed: &Value, place: &str) -> Option<String> {
    const ANY: &str = "...";
    match (expected, printed) {
        (Value::String(any), _) if any == ANY => None,
        (Value::Array(expected), Value::Array(printed)) => {
            let has_more = expected.last().is_some_and(|last| last == ANY) && printed.len() + 1 >= expected.len();
            let expected = if has_more { &expected[..expected.len() - 1] } else { expected };
            if !has_more && expected.len() != printed.len() {
                return Some(format!("{place}: {} values, and not {}", printed.len(), expected.len()));
            }
            let mut pairs = expected.iter().zip(printed).enumerate();
            pairs.find_map(|(n, (expected, printed))| value_differs(expected, printed, &format!("{place}/{n}")))
        }
        (Value::Object(expected), Value::Object(printed)) => {
            let has_more = expected.contains_key(ANY);
            if let Some(name) = printed.keys().find(|name| !has_more && !expected.contains_key(*name)) {
                return Some(format!("{place}/{name} is printed and not in the document"));
            }
            expected.iter().filter(|(name, _)| *name != ANY).find_map(|(name, value)| {
                let place = format!("{place}/{name}");
                match printed.get(name) {
                    Some(printed) => value_differs(value, printed, &place),
                    None => Some(format!("{place} is in the document and not printed")),
                }
            })
        }
        (expected, printed) if expected == printed => None,
        (expected, printed) => Some(format!("{place}: {printed}, and not {expected}")),
    }
}

/// The rows of the table whose head begins with these cells; each cell without its backticks.
fn table(text: &str, head: &[&str]) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Option<Vec<String>> {
        let line = line.strip_prefix('|')?.strip_suffix('|')?.replace("\\|", "\u{1}");
        Some(line.split('|').map(|cell| cell.trim().replace('`', "").replace('\u{1}', "|")).collect())
    };
    let is_head = |line: &&str| cells(line).is_some_and(|cells| head.iter().zip(cells).all(|(a, b)| *a == b));
    let rows: Vec<_> = text.lines().skip_while(|line| !is_head(line)).skip(2).map_while(cells).collect();
    assert!(!rows.is_empty(), "there is no table {head:?}");
    rows
}

fn sources() -> Vec<(PathBuf, String)> {
    let (mut found, mut directories) = (Vec::new(), vec![root().join("kuma-node/src")]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                // Tests make up codes of their own.
                let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().to_owned();
                found.push((path, text));
            }
        }
    }
    found
}

/// A word in quotes at the beginning of the text, if it may be a code.
fn literal(text: &str) -> Option<&str> {
    let word = text.trim_start().strip_prefix('"')?.split_once('"')?.0;
    let is_code = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    is_code.then_some(word)
}

fn status(name: &str) -> u16 {
    match name {
        "BAD_REQUEST" => 400,
        "UNAUTHORIZED" => 401,
        "FORBIDDEN" => 403,
        "NOT_FOUND" => 404,
        "METHOD_NOT_ALLOWED" => 405,
        "REQUEST_TIMEOUT" => 408,
        "CONFLICT" => 409,
        "GONE" => 410,
        "PRECONDITION_FAILED" => 412,
        "PAYLOAD_TOO_LARGE" => 413,
        "UNSUPPORTED_MEDIA_TYPE" => 415,
        "UNPROCESSABLE_ENTITY" => 422,
        "INTERNAL_SERVER_ERROR" => 500,
        "SERVICE_UNAVAILABLE" => 503,
        "GATEWAY_TIMEOUT" => 504,
        other => panic!("the number of {other} is to be written here"),
    }
}

/// Each code in the source text, with its statuses, and whether each of its places says by its very name that a retry is safe.
fn codes() -> BTreeMap<String, (BTreeSet<u16>, bool)> {
    let mut codes = BTreeMap::<String, (BTreeSet<u16>, bool)>::new();
    for (_, text) in sources() {
        let mut note = |code: &str, status: u16, is_retry_safe: bool| {
            let known = codes.entry(code.to_owned()).or_insert((BTreeSet::new(), true));
            known.0.insert(status);
            known.1 &= is_retry_safe;
        };
        for (call, status, is_retry_safe) in [("Problem::bad(", 400, false), ("Problem::unavailable(", 503, true)] {
            text.split(call).skip(1).filter_map(literal).for_each(|code| note(code, status, is_retry_safe));
        }
        for prefix in ["StatusCode::", "S::"] {
            for rest in text.split(prefix).skip(1) {
                let end = rest.find(|c: char| !c.is_ascii_uppercase() && c != '_').unwrap_or(rest.len());
                let (name, rest) = rest.split_at(end);
                if let Some(code) = rest.strip_prefix(',').and_then(literal) {
                    note(code, status(name), false);
                }
            }
        }
    }
    codes
}

#[test]
fn the_table_of_problems_is_complete() {
    let codes = codes();
    assert!(codes.len() > 50, "the source text is not understood any more: {codes:?}");
    let mut rows = BTreeMap::new();
    for row in table(&document(HTTP_MD), &["code", "status", "retry"]) {
        let statuses: BTreeSet<u16> = row[1].split(", ").map(|status| status.parse().unwrap()).collect();
        assert!(["yes", "no", "see"].contains(&row[2].as_str()), "{row:?}");
        let before = rows.insert(row[0].clone(), (statuses, row[2].clone()));
        assert!(before.is_none(), "{} is there twice", row[0]);
    }
    for (code, (statuses, is_retry_safe)) in &codes {
        let (told, retry) = rows.get(code).unwrap_or_else(|| panic!("{code} is not in the table of {HTTP_MD}"));
        assert_eq!(told, statuses, "{code}");
        assert!(!is_retry_safe || retry == "yes", "{code} can be retried");
    }
    let made_up: Vec<_> = rows.keys().filter(|code| !codes.contains_key(*code)).collect();
    assert!(made_up.is_empty(), "no code has these: {made_up:?}");
}

#[test]
fn the_table_of_limits_is_complete() {
    let rows = table(&document(HTTP_MD), &["setting", "default"]);
    let (_, settings) = sources().into_iter().find(|(path, _)| path.ends_with("config/settings.rs")).unwrap();
    let mut found = 0;
    for setting in settings.split("setting!(\"").skip(1) {
        let Some((name, rest)) = setting.split_once('"') else { continue };
        let Some((_, default)) = rest.split_once("= Value(\"") else { continue };
        let is_limit = (name.ends_with("_max") || name.ends_with("_timeout")) && name != "idle_timeout";
        if is_limit {
            found += 1;
            let default = default.split('"').next().unwrap();
            let row = rows.iter().find(|row| row[0] == name).unwrap_or_else(|| panic!("{name} is not in the table"));
            assert_eq!(row[1], default, "{name}");
        }
    }
    assert_eq!(found, rows.len(), "a setting of the table is not there any more");
}

/// Each route asks for the scope that the table names, and the table has each route of the node's own document.
#[tokio::test]
async fn the_table_of_routes_is_complete_and_its_scopes_are_asked_for() {
    let scratch = tempfile::tempdir().unwrap();
    let scopes = ["append", "read", "erase", "admin"];
    let tokens: Vec<String> = scopes
        .iter()
        .map(|scope| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_kuma-node"));
            let command = clean(&mut command, scratch.path());
            let made =
                command.args(["token", "create", "--data", "./data", "--name", scope, "--scopes", scope, "--json"]);
            let made = made.output().unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            let made: Value = serde_json::from_slice(&made.stdout).unwrap();
            made["token"].as_str().unwrap_or_else(|| panic!("no token in {made}")).to_owned()
        })
        .collect();
    let node = Node::start(scratch.path(), &["--data".to_owned(), "./data".to_owned()]);
    // It may be there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = async |method: &str, route: &str, token: Option<&str>| {
        let path =
            route.replace("{kind}", "k").replace("{id}", "i").replace("{name}", "n").replace("{action}", "pause");
        let request = client.request(method.parse().unwrap(), format!("{}{path}", node.url));
        let request = if let Some(token) = token { request.bearer_auth(token) } else { request };
        // Its head is enough: some bodies have no end.
        request.send().await.unwrap().status().as_u16()
    };
    let rows = table(&document(HTTP_MD), &["route", "scope"]);
    let mut routes = BTreeSet::new();
    for row in &rows {
        let (method, route) = row[0].split_once(' ').unwrap();
        assert!(routes.insert((method.to_lowercase(), route.to_owned())), "{row:?} is there twice");
    }
    // At once: denials are answered once a second.
    let ask = &ask;
    let callers = || std::iter::once(None).chain(scopes.iter().zip(&tokens).map(Some));
    let asked = rows.iter().flat_map(|row| callers().map(move |caller| (row, caller)));
    futures_util::future::join_all(asked.map(async |(row, caller)| {
        let (method, route) = row[0].split_once(' ').unwrap();
        let wanted = row[1].as_str();
        let status = ask(method, route, caller.map(|(_, token)| token.as_str())).await;
        match caller {
            None => assert_eq!(status == 401, wanted != "none", "{row:?}, without a token: {status}"),
            Some((scope, _)) => {
                let is_allowed = *scope == wanted || ["any", "none"].contains(&wanted);
                assert!(status != 401 && (status == 403) != is_allowed, "{row:?}, with {scope}: {status}");
            }
        }
    }))
    .await;
    let document: Value = client.get(format!("{}/openapi.json", node.url)).send().await.unwrap().json().await.unwrap();
    let mut served = BTreeSet::from([("get".to_owned(), "/openapi.json".to_owned())]);
    for (route, methods) in document["paths"].as_object().unwrap() {
        let names = methods
            .as_object()
            .unwrap()
            .keys()
            .filter(|name| ["get", "post", "delete", "put"].contains(&name.as_str()));
        served.extend(names.map(|method| (method.clone(), route.replace("{receipt_id}", "{id}"))));
    }
    assert_eq!(routes, served);
}

#[test]
fn what_is_printed_is_compared() {
    assert_eq!(text_differs("HTTP/1.1 412 ...\n...\netag: \"1\"", "HTTP/1.1 412 Failed\na: b\netag: \"1\"\n"), None);
    assert_eq!(text_differs("a ... c", "a b c"), None);
    for (expected, printed) in [("a", "ab"), ("a ...", "b"), ("a...b...c", "a c"), ("ab...b", "ab"), ("", "x")] {
        assert!(text_differs(expected, printed).is_some(), "{expected}");
    }
    for (expected, printed) in [
        (r#"{"a": "...", "...": "..."}"#, r#"{"a": 1, "b": 2}"#),
        (r#"[1, "..."]"#, "[1, 2, 3]"),
        (r#"[1, "..."]"#, "[1]"),
        ("{\"n\": 1}\n{\"n\": 2}", "{\"n\":1}{\"n\":2}"),
    ] {
        assert_eq!(json_differs(expected, printed), None, "{expected}");
    }
    for (expected, printed) in [
        (r#"{"a": 1}"#, r#"{"a": 1, "b": 2}"#),
        (r#"{"a": 1, "b": "..."}"#, r#"{"a": 1}"#),
        (r#"[1, 2, "..."]"#, "[1]"),
        ("[1]", "[1, 2]"),
        (r#"{"a": {"b": 1}}"#, r#"{"a": {"b": "1"}}"#),
        ("1", "1 2"),
        ("1", "x"),
    ] {
        assert!(json_differs(expected, printed).is_some(), "{expected}");
    }
}

#[test]
fn blocks_are_found() {
    let text = "# A\n\n## B\n```console\n$ kuma-node start --data ./x &\n```\ntext\n```sh\necho\n```\n\n```json\n1\n```\n## C\n```sh\ncargo x\n```\n";
    let found = blocks(section(text, Some("## B")).unwrap());
    let found: Vec<_> = found.iter().map(|block| (block.language.as_str(), block.is_directly_behind)).collect();
    assert_eq!(found, [("console", false), ("sh", false), ("json", true)]);
    assert_eq!(start_arguments(&blocks(text)), ["--data", "./x"]);
    assert!(section(text, Some("## D")).is_none());
}
