//! Load over HTTP against a running node: for `kuma-node bench` and the benchmarks.
//!
//! Each event is of a random entity of a fixed number, and carries random text, so that nothing compresses it away. An append's time runs from
//! before it is sent until its answer is there.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use hdrhistogram::Histogram;
use reqwest::{
    RequestBuilder,
    header::{AUTHORIZATION, HeaderValue},
};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};

/// What is sent.
#[derive(Clone, Debug, Serialize)]
pub struct Load {
    /// Over so many connections.
    pub connections: usize,
    /// Events of each append.
    pub batch: usize,
    /// Through the stream `/v1/append`, with so many appends on their way a connection; none for a request each.
    pub in_flight: Option<usize>,
    /// Random text in each event, in bytes.
    pub payload_bytes: usize,
    /// Entities that are appended to.
    pub entities: u64,
    /// MessagePack instead of JSON.
    pub message_pack: bool,
    /// Whether each request has an idempotency key; those of a stream always do.
    pub keys: bool,
    /// How long it lasts; it ends earlier with the last event.
    pub duration: Duration,
    /// How many events at most.
    pub events_max: u64,
}

impl Default for Load {
    fn default() -> Self {
        Load {
            connections: 32,
            batch: 1,
            in_flight: None,
            payload_bytes: 200,
            entities: 10_000,
            message_pack: true,
            keys: false,
            duration: Duration::from_secs(10),
            events_max: u64::MAX,
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// Events that were acknowledged.
    pub events: u64,
    /// Appends that were.
    pub appends: u64,
    /// Appends that were not.
    pub failures: u64,
    /// Why the first of them was not.
    pub failure: Option<String>,
    /// From the first that was sent until the last that was answered.
    pub seconds: f64,
    /// Events that were acknowledged, a second.
    pub events_per_second: f64,
    /// Times of acknowledgement.
    pub p50_ms: f64,
    /// The 99th percentile.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

/// Why no load could be made.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The node cannot be reached.
    #[error("the node cannot be reached")]
    Connect(#[from] reqwest::Error),
    /// It makes no sense.
    #[error("{0}")]
    Options(&'static str),
}

/// A client for a load to a node that is asked over plain HTTP and without a token.
///
/// # Errors
/// The client cannot be made.
pub fn client() -> Result<reqwest::Client, LoadError> {
    // It may be there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(reqwest::Client::builder()
        .pool_max_idle_per_host(usize::MAX)
        .http1_only()
        .no_proxy()
        .tcp_nodelay(true)
        .build()?)
}

/// What all connections of a load share.
struct Run {
    load: Load,
    url: String,
    client: reqwest::Client,
    token: Option<HeaderValue>,
    /// Differs from one run to the next, so that keys do.
    name: u64,
    text: String,
    sent: AtomicU64,
    told: Box<dyn Fn(u64) + Send + Sync>,
    until: Instant,
}

/// What one connection has seen.
struct Seen {
    events: u64,
    appends: u64,
    failures: u64,
    failure: Option<String>,
    times: Histogram<u64>,
}

impl Seen {
    fn new() -> Result<Self, LoadError> {
        let times = Histogram::new(3).map_err(|_| LoadError::Options("no histogram"))?;
        Ok(Seen { events: 0, appends: 0, failures: 0, failure: None, times })
    }

    fn acknowledged(&mut self, events: u64, since: Instant) {
        self.events += events;
        self.appends += 1;
        // It grows with what it is given.
        let _ = self.times.record(u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX));
    }

    fn failed(&mut self, why: String) {
        self.failures += 1;
        self.failure.get_or_insert(why);
    }

    fn add(&mut self, other: Seen) {
        self.events += other.events;
        self.appends += other.appends;
        self.failures += other.failures;
        self.failure = self.failure.take().or(other.failure);
        // Both have the same bounds.
        let _ = self.times.add(other.times);
    }
}

/// A random-looking number that follows from another one (SplitMix64).
fn mixed(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

impl Load {
    /// Sends it to the node at `url` (`http://127.0.0.1:4870`) with a client that has the token, if there is one. `told` is given the number of
    /// events each time some are acknowledged.
    ///
    /// # Errors
    /// The node cannot be reached at all. What fails later is counted.
    pub async fn send(
        self,
        client: reqwest::Client,
        token: Option<HeaderValue>,
        url: &str,
        told: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<LoadReport, LoadError> {
        if self.connections == 0 || self.batch == 0 || self.entities == 0 || self.in_flight == Some(0) {
            return Err(LoadError::Options("connections, batch, entities and in_flight are at least 1"));
        }
        client.get(format!("{url}/health/live")).send().await?;
        let name = getrandom::u64().unwrap_or_default();
        let letter = |number: u64| char::from(b'a' + (mixed(name ^ number) % 26) as u8);
        // Cut out of a longer one, from anywhere.
        let text: String = (0..(1 << 16) + self.payload_bytes as u64).map(letter).collect();
        let (connections, started) = (self.connections, Instant::now());
        let run = Arc::new(Run {
            until: started + self.duration,
            load: self,
            url: url.trim_end_matches('/').to_owned(),
            client,
            token,
            name,
            text,
            sent: AtomicU64::new(0),
            told: Box::new(told),
        });
        let tasks: Vec<_> = (0..connections).map(|_| tokio::spawn(run.clone().connection())).collect();
        let mut all = Seen::new()?;
        for task in tasks {
            match task.await {
                Ok(seen) => all.add(seen?),
                Err(error) => all.failed(error.to_string()),
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        let ms = |quantile| all.times.value_at_quantile(quantile) as f64 / 1e3;
        Ok(LoadReport {
            events: all.events,
            appends: all.appends,
            failures: all.failures,
            seconds,
            events_per_second: all.events as f64 / seconds.max(1e-9),
            p50_ms: ms(0.5),
            p99_ms: ms(0.99),
            max_ms: all.times.max() as f64 / 1e3,
            failure: all.failure,
        })
    }
}

impl Run {
    /// The number of the next append, while there is one.
    fn next(&self) -> Option<u64> {
        let number = self.sent.fetch_add(1, Relaxed);
        let is_left = number.saturating_mul(self.load.batch as u64) < self.load.events_max;
        (is_left && Instant::now() < self.until).then_some(number)
    }

    fn id(&self, append: u64) -> String {
        format!("{:06}", mixed(append) % self.load.entities)
    }

    fn payload(&self, event: u64) -> &str {
        let from = (mixed(event) % (1 << 16)) as usize;
        self.text.get(from..from + self.load.payload_bytes).unwrap_or_default()
    }

    /// The body of an append. `key` stands in those of a stream.
    fn body(&self, append: u64, streamed: Option<&str>, out: &mut Vec<u8>) {
        let first = append.wrapping_mul(self.load.batch as u64);
        let payloads = (0..self.load.batch as u64).map(|event| self.payload(self.name ^ (first + event)));
        if self.load.message_pack {
            // A Vec never refuses a byte.
            let text = |out: &mut Vec<u8>, text: &str| drop(rmp::encode::write_str(out, text));
            let _ = rmp::encode::write_map_len(out, if streamed.is_some() { 4 } else { 1 });
            if let Some(id) = streamed {
                text(out, "kind");
                text(out, "load");
                text(out, "id");
                text(out, id);
                text(out, "key");
                text(out, &self.key(append));
            }
            text(out, "events");
            let _ = rmp::encode::write_array_len(out, self.load.batch as u32);
            for payload in payloads {
                let _ = rmp::encode::write_map_len(out, 2);
                text(out, "type");
                text(out, "Loaded");
                text(out, "data");
                let _ = rmp::encode::write_map_len(out, 1);
                text(out, "payload");
                text(out, payload);
            }
        } else {
            let mut write = |text: &str| out.extend_from_slice(text.as_bytes());
            write("{");
            if let Some(id) = streamed {
                write(&format!("\"kind\":\"load\",\"id\":\"{id}\",\"key\":\"{}\",", self.key(append)));
            }
            write("\"events\":[");
            for (number, payload) in payloads.enumerate() {
                write(if number == 0 { "" } else { "," });
                write("{\"type\":\"Loaded\",\"data\":{\"payload\":\"");
                write(payload);
                write("\"}}");
            }
            write("]}");
            if streamed.is_some() {
                write("\n");
            }
        }
    }

    fn key(&self, append: u64) -> String {
        format!("{:x}-{append:x}", self.name)
    }

    fn authorized(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.token {
            Some(token) => request.header(AUTHORIZATION, token.clone()),
            None => request,
        }
    }

    async fn connection(self: Arc<Self>) -> Result<Seen, LoadError> {
        match self.load.in_flight {
            None => self.requests().await,
            Some(in_flight) => self.stream(in_flight).await,
        }
    }

    /// One request after the other.
    async fn requests(&self) -> Result<Seen, LoadError> {
        let mut seen = Seen::new()?;
        let content_type = if self.load.message_pack { "application/msgpack" } else { "application/json" };
        while let Some(append) = self.next() {
            let mut body = Vec::with_capacity(self.load.batch * (self.load.payload_bytes + 48) + 64);
            self.body(append, None, &mut body);
            let since = Instant::now();
            let url = format!("{}/v1/entities/load/{}/events", self.url, self.id(append));
            let mut request = self.authorized(self.client.post(url)).header("content-type", content_type).body(body);
            if self.load.keys {
                request = request.header("idempotency-key", self.key(append));
            }
            match request.send().await {
                Ok(response) => {
                    let status = response.status();
                    match response.bytes().await {
                        Ok(_) if status.is_success() => {
                            seen.acknowledged(self.load.batch as u64, since);
                            (self.told)(self.load.batch as u64);
                        }
                        Ok(body) => seen.failed(format!("{status}: {}", String::from_utf8_lossy(&body))),
                        Err(error) => seen.failed(error.to_string()),
                    }
                }
                Err(error) => seen.failed(error.to_string()),
            }
        }
        Ok(seen)
    }

    /// One stream.
    async fn stream(self: &Arc<Self>, in_flight: usize) -> Result<Seen, LoadError> {
        let mut seen = Seen::new()?;
        let room = Arc::new(Semaphore::new(in_flight));
        let (sent, mut times) = mpsc::unbounded_channel::<Instant>();
        let run = self.clone();
        let chunks = stream::unfold((run, room.clone(), sent), |(run, room, sent)| async move {
            let mut chunk = Vec::with_capacity(32 << 10);
            // Waits for the first one alone.
            let mut permit = room.clone().acquire_owned().await.ok();
            while let Some(taken) = permit.take() {
                let Some(append) = run.next() else { break };
                taken.forget();
                run.body(append, Some(&run.id(append)), &mut chunk);
                // Whoever reads the outcomes may have given up.
                let _ = sent.send(Instant::now());
                if chunk.len() < 32 << 10 {
                    permit = room.clone().try_acquire_owned().ok();
                }
            }
            (!chunk.is_empty()).then(|| (Ok::<_, std::io::Error>(Bytes::from(chunk)), (run, room, sent)))
        });
        let content_type = if self.load.message_pack { "application/msgpack" } else { "application/x-ndjson" };
        let request =
            self.authorized(self.client.post(format!("{}/v1/append", self.url))).header("content-type", content_type);
        let response = request.body(reqwest::Body::wrap_stream(chunks)).send().await?;
        if !response.status().is_success() {
            seen.failed(format!("{}: {}", response.status(), response.text().await.unwrap_or_default()));
            return Ok(seen);
        }
        let mut outcomes = Outcomes { message_pack: self.load.message_pack, bytes: bytes::BytesMut::new() };
        let mut frames = response.bytes_stream().map_err(|error| error.to_string());
        while let Some(frame) = frames.next().await {
            match frame {
                Ok(frame) => outcomes.bytes.extend_from_slice(&frame),
                Err(error) => {
                    seen.failed(error);
                    break;
                }
            }
            let mut acknowledged = 0;
            while let Some(outcome) = outcomes.next() {
                let Ok(since) = times.try_recv() else { break };
                room.add_permits(1);
                match outcome {
                    Ok(()) => {
                        seen.acknowledged(self.load.batch as u64, since);
                        acknowledged += self.load.batch as u64;
                    }
                    Err(why) => seen.failed(why),
                }
            }
            (self.told)(acknowledged);
        }
        while times.try_recv().is_ok() {
            seen.failed("the stream ended before its outcome came".to_owned());
        }
        Ok(seen)
    }
}

/// Outcomes as they come.
struct Outcomes {
    message_pack: bool,
    bytes: bytes::BytesMut,
}

impl Outcomes {
    fn next(&mut self) -> Option<Result<(), String>> {
        let end = match self.message_pack {
            true => crate::msgpack::Boundary::default().find(&self.bytes).ok().flatten()?,
            false => memchr::memchr(b'\n', &self.bytes)? + 1,
        };
        let outcome = self.bytes.split_to(end);
        // Fields in the order in which they are written: a problem is the last.
        let is_version = match self.message_pack {
            true => memchr::memmem::find(&outcome, b"\xa7version").is_some(),
            false => memchr::memmem::find(&outcome, b",\"version\":").is_some(),
        };
        Some(match is_version {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&outcome).into_owned()),
        })
    }
}
