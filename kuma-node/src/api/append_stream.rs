//! Appends to any entities over one connection, many on their way at once.
//!
//! ```text
//! body ──► message ──► submitted ──────────────► on the way (first in, first out) ──► outcome ──► answer
//!             │  its entity is not in memory,        ▲
//!             │  has too much waiting,               │
//!             └─ or is another node's ──► lane of the entity, which follows it to the node that owns it
//! ```
//!
//! Invariants:
//! - Messages of one entity are appended in their order.
//! - In a cluster a lane asks the owner for some messages at a time, in their order, and for the next ones when it knows what became of those.
//! - Outcomes come in the order of the messages.
//! - Nothing waits for an entity that is not in memory but what is for the same entity.
//! - Memory is bounded: by the messages on their way, and by their bytes. Whoever does not read outcomes is not read from either.
//! - When the server stops, no more is read; what was read is answered, and then the first that was not.
//! - MessagePack that is none ends the stream: nothing says where the next message begins. A line that is no JSON ends at its end.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    http::header,
    response::{IntoResponse, Response},
};
use futures_util::stream;
use http_body_util::BodyExt;
use kuma_core::{AppendError, Appended, EntityHash, Pending, Slot, Unavailable, slot_of};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::{Problems, entities::MESSAGE_PACK, history::CHUNK_BYTES};
use crate::{
    access::{self, May},
    append_body::{Append, Encoding, invalid},
    body::encoding,
    forward,
    msgpack::{Boundary, Malformed, begins_map},
    node::Node,
    problem::Problem,
    wire,
};

/// Bytes of messages on their way of one stream.
const BYTES_MAX: usize = 16 << 20;
/// What a message takes beside its bytes.
const MESSAGE_BYTES: usize = 512;
/// How long an entity that has too much waiting is tried.
const PATIENCE: Duration = Duration::from_secs(30);
/// Messages that go to another node at once.
const BATCH_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 1 << 20;
/// A stream on which nothing comes for so long is ended.
const IDLE: Duration = Duration::from_secs(600);

/// Appends to any entities, as a stream.
///
/// Each line (or MessagePack value) is an append of its own, with the entity, a key and optionally an expected version; each is answered by one
/// line (or value), in the same order, when it is on the disk. Thousands may be on their way: read the answers while you send. Sent again
/// with the same key, an append happens once.
#[utoipa::path(
    post,
    path = "/v1/append",
    operation_id = "append_stream",
    tag = "streams",
    request_body(
        content((Vec<wire::StreamedAppend> = "application/x-ndjson"), (Vec<wire::StreamedAppend> = "application/msgpack")),
        description = "`StreamedAppend`, one after the other",
    ),
    responses(
        (status = 200, description = "`StreamedOutcome`, one after the other", content((Vec<wire::StreamedOutcome> = "application/x-ndjson"), (Vec<wire::StreamedOutcome> = "application/msgpack"))),
        Problems,
    ),
)]
pub(crate) async fn append(
    State(node): State<Arc<Node>>,
    _may: May<access::Append>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let [first, second, third] = MESSAGE_PACK.map(|name| (name, Encoding::MessagePack));
    let lines = ("application/x-ndjson", Encoding::Json);
    let encoding = encoding(&parts.headers, &[lines, first, second, third])?;
    let permit = node.stream()?;
    let (on_the_way, outcomes) = mpsc::channel(node.config.stream_in_flight_max);
    tokio::spawn(read(node, body, encoding, on_the_way));
    let answer = stream::unfold((outcomes, None, permit), move |(mut outcomes, held, permit)| async move {
        let mut chunk = Vec::with_capacity(4096);
        let first: Entry = match held {
            Some(held) => held,
            None => outcomes.recv().await?,
        };
        first.settle(encoding, &mut chunk).await;
        // What is known by now goes out with it; the first that is not has to wait for the next chunk.
        let mut held = None;
        while chunk.len() < CHUNK_BYTES
            && let Ok(mut next) = outcomes.try_recv()
        {
            match next.poll_now() {
                Some(outcome) => next.write(encoding, outcome, &mut chunk),
                None => {
                    held = Some(next);
                    break;
                }
            }
        }
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(chunk)), (outcomes, held, permit)))
    });
    let content_type = match encoding {
        Encoding::Json => "application/x-ndjson",
        Encoding::MessagePack => "application/msgpack",
    };
    Ok(([(header::CONTENT_TYPE, content_type)], Body::from_stream(answer)).into_response())
}

/// A message on its way.
struct Entry {
    n: u64,
    outcome: Outcome,
    _room: Option<OwnedSemaphorePermit>,
}

/// Where its outcome comes from.
enum Outcome {
    Known(Box<wire::Problem>),
    Pending(Pin<Box<dyn Future<Output = Result<Appended, AppendError>> + Send>>),
    /// Through the lane of its entity.
    Later(oneshot::Receiver<Told>),
}

/// What became of a message.
type Told = Result<Appended, Box<wire::Problem>>;

/// A problem as it is told.
fn told(problem: impl Into<Problem>) -> Box<wire::Problem> {
    Box::new(problem.into().body(None))
}

impl Outcome {
    fn pending(pending: Pending) -> Self {
        Outcome::Pending(Box::pin(pending.appended()))
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Told> {
        match self {
            Outcome::Known(problem) => Poll::Ready(Err(problem.clone())),
            Outcome::Pending(pending) => pending.as_mut().poll(context).map_err(told),
            Outcome::Later(later) => Pin::new(later).poll(context).map(|outcome| {
                // The lane ends with the process alone.
                outcome.unwrap_or_else(|_| Err(told(Problem::stopping())))
            }),
        }
    }
}

impl Entry {
    fn poll_now(&mut self) -> Option<Told> {
        match self.outcome.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(outcome) => Some(outcome),
            Poll::Pending => None,
        }
    }

    async fn settle(mut self, encoding: Encoding, out: &mut Vec<u8>) {
        let outcome = std::future::poll_fn(|context| self.outcome.poll(context)).await;
        self.write(encoding, outcome, out);
    }

    fn write(&self, encoding: Encoding, outcome: Told, out: &mut Vec<u8>) {
        // A Vec never refuses a byte.
        match (encoding, outcome) {
            (Encoding::Json, Ok(Appended { version, repeated })) => {
                let repeated = if repeated { ",\"repeated\":true" } else { "" };
                let _ = std::io::Write::write_fmt(
                    out,
                    format_args!("{{\"n\":{},\"version\":{version}{repeated}}}\n", self.n),
                );
            }
            (Encoding::MessagePack, Ok(Appended { version, repeated })) => {
                let _ = rmp::encode::write_map_len(out, if repeated { 3 } else { 2 });
                let _ = rmp::encode::write_str(out, "n").and_then(|()| rmp::encode::write_uint(out, self.n).map(drop));
                let _ = rmp::encode::write_str(out, "version")
                    .and_then(|()| rmp::encode::write_uint(out, version.0).map(drop));
                if repeated {
                    let _ = rmp::encode::write_str(out, "repeated").map(|()| rmp::encode::write_bool(out, true));
                }
            }
            (encoding, Err(problem)) => {
                let problem = Some(*problem);
                let outcome = wire::StreamedOutcome { n: self.n, version: None, repeated: false, problem };
                match encoding {
                    Encoding::Json => {
                        let _ = serde_json::to_writer(&mut *out, &outcome);
                        out.push(b'\n');
                    }
                    Encoding::MessagePack => drop(rmp_serde::encode::write_named(out, &outcome)),
                }
            }
        }
    }
}

/// Reads messages and sends them on their way, until the stream ends or nobody wants to know.
async fn read(node: Arc<Node>, mut body: Body, encoding: Encoding, on_the_way: mpsc::Sender<Entry>) {
    let lanes = Lanes { node: node.clone(), encoding, waiting: Arc::default() };
    let room = Arc::new(Semaphore::new(BYTES_MAX));
    let mut cutter = Cutter::new(encoding, node.config.body_bytes_max);
    let mut n = 0;
    loop {
        let message = match cutter.next() {
            Ok(Some(message)) => message,
            Ok(None) => {
                let frame = tokio::select! {
                    biased;
                    () = node.stopping.cancelled() => {
                        tell(&on_the_way, n + 1, Problem::stopping()).await;
                        return;
                    }
                    () = on_the_way.closed() => return,
                    frame = tokio::time::timeout(IDLE, body.frame()) => frame,
                };
                match frame {
                    Ok(Some(Ok(frame))) => {
                        if let Ok(data) = frame.into_data() {
                            cutter.push(&data);
                        }
                        continue;
                    }
                    Ok(None) => match cutter.end() {
                        Ok(Some(message)) => message,
                        Ok(None) => return,
                        Err(problem) => {
                            tell(&on_the_way, n + 1, problem).await;
                            return;
                        }
                    },
                    // Cut off, or idle for too long. What was read is answered.
                    Ok(Some(Err(_))) | Err(_) => return,
                }
            }
            Err(problem) => {
                tell(&on_the_way, n + 1, problem).await;
                return;
            }
        };
        n += 1;
        let bytes = (message.len() + MESSAGE_BYTES).min(BYTES_MAX);
        // At most 16 MiB.
        let Ok(permit) = room.clone().acquire_many_owned(bytes as u32).await else { return };
        let Ok(place) = on_the_way.reserve().await else { return };
        let outcome = lanes.submit(message);
        place.send(Entry { n, outcome, _room: Some(permit) });
    }
}

async fn tell(on_the_way: &mpsc::Sender<Entry>, n: u64, problem: Problem) {
    let outcome = Outcome::Known(told(problem));
    // Nobody may want to know any more.
    let _ = on_the_way.send(Entry { n, outcome, _room: None }).await;
}

/// Messages of entities that cannot take them at once, in their order.
#[derive(Clone)]
struct Lanes {
    node: Arc<Node>,
    encoding: Encoding,
    /// By entity; one that is there has a task.
    waiting: Arc<Mutex<HashMap<EntityHash, VecDeque<Job>>>>,
}

/// A message that waits.
struct Job {
    message: Bytes,
    slot: Slot,
    done: oneshot::Sender<Told>,
}

/// A message on its way to its entity.
type Submit = Pin<Box<dyn Future<Output = Result<Pending, AppendError>> + Send>>;

impl Lanes {
    /// Where the message goes, and how it gets there.
    fn parse(&self, message: &[u8]) -> Result<(EntityHash, Slot, Submit), Problem> {
        let Append { kind, id, key, events, expected, metadata } = Append::parse_streamed(self.encoding, message)?;
        let (kind, id, key) = (kind.unwrap_or_default(), id.unwrap_or_default(), key.unwrap_or_default());
        let entity = self.node.kuma.raw(&kind, id.as_bytes());
        let hash = entity.check()?;
        let key = key.into_owned();
        let submit = async move {
            let mut append = entity.append_all(events);
            if let Some(expected) = expected {
                append = append.expecting(expected);
            }
            if let Some(metadata) = metadata {
                append = append.metadata(metadata);
            }
            append.idempotency_key(key).submit().await
        };
        Ok((hash, slot_of(&kind, &id), Box::pin(submit)))
    }

    fn submit(&self, message: Bytes) -> Outcome {
        let known = |problem: Problem| Outcome::Known(told(problem));
        let (entity, slot, mut submit) = match self.parse(&message) {
            Ok(parsed) => parsed,
            Err(problem) => return known(problem),
        };
        let mut waiting = self.waiting.lock();
        if let Some(lane) = waiting.get_mut(&entity) {
            let (done, later) = oneshot::channel();
            lane.push_back(Job { message, slot, done });
            return Outcome::Later(later);
        }
        // An entity in memory takes it at once. If it does not, it is asked again by the lane, with a waker of its own.
        let first = match submit.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(pending)) => return Outcome::pending(pending),
            Poll::Ready(Err(AppendError::Unavailable(Unavailable::Overloaded { .. }))) => None,
            Poll::Ready(Err(error)) => match Problem::from(error) {
                problem if problem.is_elsewhere() && self.node.cluster.is_some() => None,
                problem => return known(problem),
            },
            Poll::Pending => Some(submit),
        };
        waiting.insert(entity, VecDeque::new());
        drop(waiting);
        let (done, later) = oneshot::channel();
        tokio::spawn(self.clone().run(entity, first, Job { message, slot, done }));
        Outcome::Later(later)
    }

    /// Sends what waits for an entity, one after the other.
    async fn run(self, entity: EntityHash, mut first: Option<Submit>, mut job: Job) {
        loop {
            let is_here = self.node.cluster.as_ref().is_none_or(|cluster| cluster.is_here(job.slot));
            let submitted = match is_here {
                true => Some(self.patiently(first.take(), &job.message).await),
                false => None,
            };
            match submitted {
                // The next one is behind it by now, and need not wait for the disk.
                Some(Ok(pending)) => drop(tokio::spawn(async move {
                    let _ = job.done.send(pending.appended().await.map_err(told));
                })),
                Some(Err(problem)) if !problem.is_elsewhere() || self.node.cluster.is_none() => {
                    let _ = job.done.send(Err(told(problem)));
                }
                // Not here, or not any more: nothing was done, and what was before it is settled.
                _ => self.at_owner(entity, job).await,
            }
            let mut waiting = self.waiting.lock();
            match waiting.get_mut(&entity).and_then(VecDeque::pop_front) {
                Some(next) => job = next,
                None => {
                    waiting.remove(&entity);
                    return;
                }
            }
        }
    }

    /// Has a message, and what waits behind it, done by the node that owns the entity.
    async fn at_owner(&self, entity: EntityHash, job: Job) {
        let Some(cluster) = &self.node.cluster else { return };
        let slot = job.slot;
        let mut bytes = job.message.len();
        let mut jobs = VecDeque::from([job]);
        if let Some(lane) = self.waiting.lock().get_mut(&entity) {
            while jobs.len() < BATCH_MAX
                && let Some(next) = lane.front()
                && bytes + next.message.len() <= BATCH_BYTES_MAX
            {
                bytes += next.message.len();
                jobs.extend(lane.pop_front());
            }
        }
        let until = Instant::now() + PATIENCE;
        while !jobs.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            let messages = jobs.iter().map(|job| ByteBuf::from(job.message.to_vec())).collect();
            let asked = AskedAppends { is_json: self.encoding == Encoding::Json, messages };
            match forward::ask_appends(cluster, slot, &asked, left).await {
                Ok(outcomes) => {
                    for outcome in outcomes {
                        let outcome = match outcome {
                            AskedOutcome::Appended { version, repeated } => {
                                Ok(Appended { version: kuma_core::Version(version), repeated })
                            }
                            AskedOutcome::Failed(problem) => Err(Box::new(problem)),
                        };
                        if let Some(job) = jobs.pop_front() {
                            let _ = job.done.send(outcome);
                        }
                    }
                    // What is left was not done there: the slot has gone on.
                }
                Err(problem) => {
                    // Each has a key: sent again, it happens once.
                    let is_unknown = problem.code() == "outcome_unknown";
                    let problem = told(if is_unknown { problem.retry_safe(true) } else { problem });
                    for job in jobs.drain(..) {
                        let _ = job.done.send(Err(problem.clone()));
                    }
                }
            }
        }
    }

    /// Waits for room instead of giving up: the sender waits behind it.
    async fn patiently(&self, first: Option<Submit>, message: &[u8]) -> Result<Pending, Problem> {
        let until = Instant::now() + PATIENCE;
        let mut submit = first;
        loop {
            let now = match submit.take() {
                Some(submit) => submit,
                None => self.parse(message)?.2,
            };
            match now.await {
                Ok(pending) => return Ok(pending),
                Err(AppendError::Unavailable(Unavailable::Overloaded { retry_after, .. }))
                    if Instant::now() < until =>
                {
                    tokio::time::sleep(retry_after).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Messages of one entity, in their order, on their way to its owner.
#[derive(Serialize, Deserialize)]
pub(crate) struct AskedAppends {
    is_json: bool,
    messages: Vec<ByteBuf>,
}

/// What became of one of them there.
#[derive(Serialize, Deserialize)]
pub(crate) enum AskedOutcome {
    Appended { version: u64, repeated: bool },
    Failed(wire::Problem),
}

/// Does appends of another node's stream. What became of the first of them; of the others nothing was done, because the slot is not here any more.
/// None: of none.
pub(crate) async fn answer(node: &Arc<Node>, slot: Slot, asked: AskedAppends) -> Option<Vec<AskedOutcome>> {
    let encoding = if asked.is_json { Encoding::Json } else { Encoding::MessagePack };
    let lanes = Lanes { node: node.clone(), encoding, waiting: Arc::default() };
    let mut on_the_way = Vec::with_capacity(asked.messages.len().min(BATCH_MAX));
    for message in &asked.messages {
        let submitted = match lanes.parse(message) {
            Ok((_, of, _)) if of != slot => Err(invalid("the message is of another slot than was said")),
            Ok((_, _, submit)) => lanes.patiently(Some(submit), message).await,
            Err(problem) => Err(problem),
        };
        if submitted.as_ref().is_err_and(Problem::is_elsewhere) {
            break;
        }
        on_the_way.push(submitted);
    }
    let mut outcomes = Vec::with_capacity(on_the_way.len());
    for submitted in on_the_way {
        let appended = match submitted {
            Ok(pending) => pending.appended().await.map_err(Problem::from),
            Err(problem) => Err(problem),
        };
        match appended {
            Ok(Appended { version, repeated }) => {
                outcomes.push(AskedOutcome::Appended { version: version.0, repeated });
            }
            Err(problem) if problem.is_elsewhere() => break,
            Err(problem) => outcomes.push(AskedOutcome::Failed(problem.body(None))),
        }
    }
    (!outcomes.is_empty()).then_some(outcomes)
}

/// Cuts what comes into messages.
struct Cutter {
    encoding: Encoding,
    bytes_max: usize,
    bytes: bytes::BytesMut,
    /// How far there is no end of a line.
    looked: usize,
    boundary: Boundary,
}

impl Cutter {
    fn new(encoding: Encoding, bytes_max: usize) -> Self {
        Cutter { encoding, bytes_max, bytes: bytes::BytesMut::new(), looked: 0, boundary: Boundary::default() }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message that is whole.
    fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        loop {
            let end = match self.encoding {
                Encoding::MessagePack => {
                    let lost = |why| {
                        invalid(format!("{why}: where the next message begins is not known, and the stream ends here"))
                    };
                    if self.bytes.first().is_some_and(|first| !begins_map(*first)) {
                        return Err(lost(Malformed::Not("a map").to_string()));
                    }
                    self.boundary.find(&self.bytes).map_err(|malformed| lost(malformed.to_string()))?
                }
                Encoding::Json => {
                    let from = self.looked.min(self.bytes.len());
                    let end = memchr::memchr(b'\n', self.bytes.get(from..).unwrap_or_default());
                    self.looked = if end.is_some() { 0 } else { self.bytes.len() };
                    end.map(|at| from + at + 1)
                }
            };
            if end.unwrap_or(self.bytes.len()) > self.bytes_max {
                return Err(Problem::new(
                    axum::http::StatusCode::PAYLOAD_TOO_LARGE,
                    "body_too_large",
                    format!("a message of the stream has more than {} bytes; the stream ends here", self.bytes_max),
                ));
            }
            let Some(end) = end else { return Ok(None) };
            let message = self.bytes.split_to(end).freeze();
            // Empty lines keep a connection open, and say nothing.
            if self.encoding == Encoding::MessagePack || !message.trim_ascii().is_empty() {
                return Ok(Some(message));
            }
        }
    }

    /// What is left when nothing more comes: the last line may have no end.
    fn end(&mut self) -> Result<Option<Bytes>, Problem> {
        let rest = self.bytes.split().freeze();
        match self.encoding {
            _ if rest.trim_ascii().is_empty() => Ok(None),
            Encoding::Json => Ok(Some(rest)),
            Encoding::MessagePack => Err(invalid("the stream ends within a message; nothing of that was done")),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn lines_are_cut_wherever_they_come_apart() {
        let text = b"{\"a\":1}\n\n  \n{\"b\":2}\r\n{\"c\":3}";
        for step in 1..text.len() {
            let mut cutter = Cutter::new(Encoding::Json, 100);
            let mut found = Vec::new();
            for piece in text.chunks(step) {
                cutter.push(piece);
                while let Some(message) = cutter.next().unwrap() {
                    found.push(message.trim_ascii().to_vec());
                }
            }
            found.extend(cutter.end().unwrap().map(|message| message.to_vec()));
            assert_eq!(found, [b"{\"a\":1}".to_vec(), b"{\"b\":2}".to_vec(), b"{\"c\":3}".to_vec()], "{step}");
        }
    }

    #[test]
    fn a_message_without_end_is_refused_before_it_fills_the_memory() {
        for encoding in [Encoding::Json, Encoding::MessagePack] {
            let mut cutter = Cutter::new(encoding, 100);
            // A map with a text of 4 GiB, if one believes it.
            cutter.push(&[0x81, 0xdb, 0xff, 0xff, 0xff, 0xff]);
            assert!(cutter.next().unwrap().is_none());
            cutter.push(&[b'x'; 100]);
            assert_eq!(cutter.next().unwrap_err().code(), "body_too_large");
        }
    }
}
