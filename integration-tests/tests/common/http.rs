//! An HTTP client without manners: it sends whatever it is told to, byte by byte.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use kuma_node::{Config, Server};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

use crate::common::directory;

/// Longer than anything takes.
pub(crate) const LONG: Duration = Duration::from_secs(20);
/// Stands in ids and payloads, and never in a problem.
pub(crate) const SECRET: &str = "s3cr3t";
pub(crate) const JSON: (&str, &str) = ("Content-Type", "application/json");
pub(crate) const PACK: (&str, &str) = ("Content-Type", "application/msgpack");
pub(crate) const LINES: (&str, &str) = ("Content-Type", "application/x-ndjson");

/// What it must not take for ever.
pub(crate) async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    timeout(LONG, wait).await.unwrap_or_else(|_| panic!("waited in vain: {what}"))
}

/// A configuration for tests: few resources, and nothing is logged.
pub(crate) fn config(data: &Path) -> Config {
    Config { listen: ([127, 0, 0, 1], 0).into(), access_log: false, shards: Some(2), ..Config::new(data) }
}

/// A server in this process.
pub(crate) struct Node {
    pub(crate) server: Server,
    pub(crate) dir: TempDir,
}

impl Node {
    pub(crate) async fn start(change: impl FnOnce(&mut Config)) -> Node {
        Node::in_directory(directory(), change).await
    }

    pub(crate) async fn in_directory(dir: TempDir, change: impl FnOnce(&mut Config)) -> Node {
        let mut config = config(dir.path());
        change(&mut config);
        Node { server: Server::start(config).await.unwrap(), dir }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.server.address()
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.address())
    }

    pub(crate) async fn stop(self) -> TempDir {
        soon("the server stops", self.server.stop()).await;
        self.dir
    }
}

/// A server in a process of its own.
pub(crate) struct NodeProcess {
    child: Child,
    pub(crate) address: SocketAddr,
    arguments: Vec<String>,
    dir: TempDir,
}

impl NodeProcess {
    pub(crate) async fn start(arguments: &[&str]) -> NodeProcess {
        let dir = directory();
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let (child, address) = NodeProcess::launch(dir.path(), &arguments).await;
        NodeProcess { child, address, arguments, dir }
    }

    async fn launch(data: &Path, arguments: &[String]) -> (Child, SocketAddr) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_node_child"))
            .arg(data)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
        let line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
            line
        });
        let address = soon("the server starts", line).await.unwrap().trim().parse().unwrap();
        (child, address)
    }

    /// Ends it at once, as `kill -9` does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again on its directory, after [`NodeProcess::kill`]. It has another address.
    pub(crate) async fn start_again(&mut self) {
        (self.child, self.address) = NodeProcess::launch(self.dir.path(), &self.arguments).await;
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.address)
    }

    /// Bytes of memory that it has.
    pub(crate) fn rss(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("the server has died");
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// From now on the most that it has is noted.
    pub(crate) fn forget_rss_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }

    /// The most that it had.
    pub(crate) fn rss_peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("the server has died");
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The problem that it is: typed, without what was sent, and no fault of the server.
    #[track_caller]
    pub(crate) fn problem(&self) -> Problem {
        assert!(self.status >= 400, "{self:?}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{} {}", self.status, self.text());
        let body = self.json();
        assert_eq!(body["status"], self.status, "{body}");
        check_problem(&body);
        if self.status >= 500 {
            assert_eq!(self.status, 503, "{body}");
            assert!(self.header("retry-after").is_some_and(|after| after.parse::<u32>().unwrap() > 0), "{self:?}");
        }
        Problem { status: self.status, code: body["code"].as_str().unwrap().to_owned(), body }
    }

    /// Status and code.
    #[track_caller]
    pub(crate) fn refusal(&self) -> (u16, String) {
        let problem = self.problem();
        (problem.status, problem.code)
    }
}

/// A problem is typed, and has nothing in it of what was sent.
#[track_caller]
pub(crate) fn check_problem(body: &Value) {
    let code = body["code"].as_str().unwrap_or_else(|| panic!("no code: {body}"));
    assert_eq!(body["type"], format!("urn:kuma:{code}"), "{body}");
    assert!(body["retry_safe"].is_boolean() && body["detail"].is_string() && body["title"].is_string(), "{body}");
    assert!(!body.to_string().contains(SECRET), "what was sent is in the problem: {body}");
}

pub(crate) struct Problem {
    pub(crate) status: u16,
    pub(crate) code: String,
    pub(crate) body: Value,
}

/// How much of a body is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Bytes(u64),
    /// Chunks, of which the next one begins.
    Chunks,
    /// So much of a chunk, and then others.
    Chunk(u64),
    Close,
    Nothing,
}

/// What comes from the server.
pub(crate) struct Reader {
    half: BufReader<OwnedReadHalf>,
    left: Left,
    /// Of a body that is read line by line.
    rest: Vec<u8>,
}

/// What goes to the server.
pub(crate) struct Writer {
    half: OwnedWriteHalf,
}

pub(crate) async fn connect(address: SocketAddr) -> io::Result<(Writer, Reader)> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (read, write) = stream.into_split();
    let reader = Reader { half: BufReader::with_capacity(64 << 10, read), left: Left::Nothing, rest: Vec::new() };
    Ok((Writer { half: write }, reader))
}

fn head(method: &str, path: &str, headers: &[(&str, &str)]) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head
}

impl Writer {
    pub(crate) async fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.half.write_all(bytes).await
    }

    pub(crate) async fn whole(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<()> {
        let mut request = head(method, path, headers).into_bytes();
        request.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
        request.extend_from_slice(body);
        self.raw(&request).await
    }

    /// Begins a request whose body comes in chunks.
    pub(crate) async fn begin(&mut self, method: &str, path: &str, headers: &[(&str, &str)]) -> io::Result<()> {
        let head = head(method, path, headers) + "Transfer-Encoding: chunked\r\n\r\n";
        self.raw(head.as_bytes()).await
    }

    pub(crate) async fn chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
        chunk.extend_from_slice(bytes);
        chunk.extend_from_slice(b"\r\n");
        self.raw(&chunk).await
    }

    pub(crate) async fn end(&mut self) -> io::Result<()> {
        self.raw(b"0\r\n\r\n").await
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Reader {
    async fn text_line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if timeout(LONG, self.half.read_line(&mut line)).await?? == 0 || !line.ends_with('\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }

    /// The head of an answer.
    pub(crate) async fn head(&mut self) -> io::Result<Answer> {
        loop {
            let first = self.text_line().await?;
            let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
            let status: u16 = status.ok_or_else(|| malformed(&first))?;
            let mut answer = Answer { status, headers: Vec::new(), body: Vec::new() };
            loop {
                let line = self.text_line().await?;
                if line.is_empty() {
                    break;
                }
                let (name, value) = line.split_once(':').ok_or_else(|| malformed(&line))?;
                answer.headers.push((name.to_owned(), value.trim().to_owned()));
            }
            if status == 100 {
                continue;
            }
            self.left = match (answer.header("content-length"), answer.header("transfer-encoding")) {
                _ if status == 204 || status == 304 => Left::Nothing,
                (Some(length), _) => Left::Bytes(length.parse().map_err(|_| malformed(length))?),
                (None, Some(_)) => Left::Chunks,
                (None, None) => Left::Close,
            };
            return Ok(answer);
        }
    }

    /// The next piece of a body, as much of it as has come; none at its end.
    pub(crate) async fn piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.left == Left::Chunk(0) {
            self.text_line().await?;
            self.left = Left::Chunks;
        }
        if self.left == Left::Chunks {
            let line = self.text_line().await?;
            self.left = match u64::from_str_radix(&line, 16).map_err(|_| malformed(&line))? {
                0 => {
                    self.text_line().await?;
                    Left::Nothing
                }
                bytes => Left::Chunk(bytes),
            };
        }
        let wanted = match self.left {
            Left::Nothing | Left::Bytes(0) => {
                self.left = Left::Nothing;
                return Ok(None);
            }
            Left::Close => {
                let mut piece = Vec::new();
                timeout(LONG, self.half.read_to_end(&mut piece)).await??;
                self.left = Left::Nothing;
                return Ok(Some(piece));
            }
            Left::Bytes(bytes) | Left::Chunk(bytes) => bytes.min(64 << 10) as usize,
            Left::Chunks => 0,
        };
        let mut piece = vec![0; wanted];
        let read = timeout(LONG, self.half.read(&mut piece)).await??;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        piece.truncate(read);
        if let Left::Bytes(bytes) | Left::Chunk(bytes) = &mut self.left {
            *bytes -= read as u64;
        }
        Ok(Some(piece))
    }

    /// The whole answer.
    pub(crate) async fn answer(&mut self) -> io::Result<Answer> {
        let mut answer = self.head().await?;
        while let Some(piece) = self.piece().await? {
            answer.body.extend_from_slice(&piece);
        }
        Ok(answer)
    }

    /// The next line of a body, without its end; none at the end of the body.
    pub(crate) async fn line(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                let line = std::str::from_utf8(&line).map_err(|_| malformed("not UTF-8"))?;
                return Ok(Some(line.trim_end().to_owned()));
            }
            match self.piece().await? {
                Some(piece) => self.rest.extend_from_slice(&piece),
                None if self.rest.is_empty() => return Ok(None),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// Whether the server has closed the connection, or closes it before long.
    pub(crate) async fn is_closed(&mut self, within: Duration) -> bool {
        let all = async {
            let mut bytes = [0; 4096];
            while let Ok(1..) = self.half.read(&mut bytes).await {}
        };
        timeout(within, all).await.is_ok()
    }
}

/// One connection, on which requests are sent one after the other.
pub(crate) struct Client {
    address: SocketAddr,
    connection: Option<(Writer, Reader)>,
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Client {
        Client { address, connection: None }
    }

    pub(crate) async fn try_send(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Answer> {
        let (mut writer, mut reader) = match self.connection.take() {
            Some(connection) => connection,
            None => connect(self.address).await?,
        };
        writer.whole(method, path, headers, body).await?;
        let answer = reader.answer().await?;
        let closes = answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        if !closes {
            self.connection = Some((writer, reader));
        }
        Ok(answer)
    }

    #[track_caller]
    pub(crate) fn send<'a>(
        &'a mut self,
        method: &'a str,
        path: &'a str,
        headers: &'a [(&'a str, &'a str)],
        body: &'a [u8],
    ) -> impl Future<Output = Answer> + 'a {
        let from = std::panic::Location::caller();
        async move {
            let sent = soon("an answer", self.try_send(method, path, headers, body)).await;
            sent.unwrap_or_else(|error| panic!("{from}: {method} {path}: {error}"))
        }
    }

    pub(crate) async fn get(&mut self, path: &str) -> Answer {
        self.send("GET", path, &[], b"").await
    }

    pub(crate) async fn post(&mut self, path: &str, body: &str) -> Answer {
        self.send("POST", path, &[JSON], body.as_bytes()).await
    }

    /// A request, as it is on the wire.
    pub(crate) async fn exchange(&self, request: &[u8]) -> io::Result<Answer> {
        let (mut writer, mut reader) = connect(self.address).await?;
        // The server may answer, and close, before it has read everything.
        let _ = writer.raw(request).await;
        reader.answer().await
    }
}

/// Appends one event and reads it, as anybody would.
pub(crate) async fn assert_serves(address: SocketAddr) {
    let mut client = Client::new(address);
    let answer = client.post("/v1/entities/probe/p/events", r#"{"type":"Probed","data":{"ok":true}}"#).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    let answer = client.get("/v1/entities/probe/p").await;
    assert_eq!(answer.json()["state"]["ok"], true);
}
