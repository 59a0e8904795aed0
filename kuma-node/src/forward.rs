//! Requests for entities of other nodes: any server of a cluster answers any request of an entity.
//!
//! ```text
//! request ──► scope, body ──► is the slot here? ──yes──► this node's handler ──► answer
//!                               │ no, or not any more: nothing was done
//!                               ▼
//!                            Node::ask_owner ══ link ══► Answerer: the owner's router ──► head and first piece of the answer
//!                                                                                  ◄── the next piece, until there is none
//! ```
//!
//! Invariants:
//! - Whether somebody may ask is looked at where the request comes in, before any part of the body is read. The owner takes the word of a node that
//!   was let into the cluster, and its own word for nothing that comes over HTTP.
//! - What goes over the link is bound to its scope and its slot: the owner looks whether the path is of that slot and needs that scope.
//! - A request is handed on once. Whoever is not the owner (any more) says so, and the first node asks again.
//! - An append without an idempotency key gets one before it leaves, so that it can be asked again whatever becomes of the link.
//! - A store in no cluster has none of this.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use axum::{
    RequestExt, Router,
    body::{Body, Bytes},
    extract::{MatchedPath, RawPathParams, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::{future::BoxFuture, stream};
use http_body_util::BodyExt;
use kuma_cluster::{Answer, Answered, Asked, Repeat};
use kuma_core::{DiskId, Slot, slot_of};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_bytes::ByteBuf;
use tower::ServiceExt;

use crate::{
    access::{self, Caller, Vouched},
    api::{append_stream, entities::IDEMPOTENCY_KEY},
    body::Whole,
    guard::{Elsewhere, REQUEST_ID},
    node::Node,
    problem::Problem,
    tokens::Scope,
};

/// So much of an answer comes with its head, and with each question for more.
const PIECE_BYTES: usize = 1 << 20;
/// Answers that are held for others at once.
const HELD_MAX: usize = 256;
/// An answer of which nothing more is asked for is dropped after this.
const HELD_FOR: Duration = Duration::from_secs(60);
/// How long the next piece of an answer may take.
const PIECE_WITHIN: Duration = Duration::from_secs(60);

/// Headers of a request that say something to its handler.
const OF_REQUEST: [HeaderName; 6] =
    [header::CONTENT_TYPE, header::ACCEPT, header::IF_MATCH, header::IF_NONE_MATCH, IDEMPOTENCY_KEY, REQUEST_ID];
/// Headers of an answer that are about one connection, or that each node makes itself.
const NOT_OF_ANSWER: [HeaderName; 5] =
    [header::CONNECTION, header::TRANSFER_ENCODING, header::CONTENT_LENGTH, header::DATE, REQUEST_ID];

/// Which requests go to the owner of their entity, what they need, and whether they may be sent twice.
const RULES: [(Method, &str, Scope, Repeat); 9] = [
    (Method::POST, "/v1/entities/{kind}/{id}/events", Scope::Append, Repeat::Safe),
    (Method::GET, "/v1/entities/{kind}/{id}", Scope::Read, Repeat::Read),
    (Method::GET, "/v1/entities/{kind}/{id}/events", Scope::Read, Repeat::Read),
    (Method::GET, "/v1/entities/{kind}/{id}/diff", Scope::Read, Repeat::Read),
    (Method::GET, "/v1/entities/{kind}/{id}/outcome", Scope::Read, Repeat::Read),
    (Method::GET, "/v1/entities/{kind}/{id}/export", Scope::Read, Repeat::Read),
    // Asked again, the receipt is the same.
    (Method::DELETE, "/v1/entities/{kind}/{id}", Scope::Erase, Repeat::Safe),
    (Method::POST, "/v1/entities/{kind}/{id}/recreate", Scope::Erase, Repeat::Never),
    (Method::POST, "/v1/entities/{kind}/{id}/restore-to", Scope::Erase, Repeat::Never),
];

/// Requests about a node itself that another one may hand on.
const OF_NODE: [(Method, &str, Scope); 1] = [(Method::GET, "/v1/cluster/moves", Scope::Read)];

fn rule(method: &Method, route: &str) -> Option<(Scope, Repeat)> {
    let method = if *method == Method::HEAD { &Method::GET } else { method };
    let found = RULES.iter().find(|(of, path, ..)| of == method && *path == route);
    found.map(|(_, _, scope, repeat)| (*scope, *repeat))
}

/// The request came over the link, from a node that was let in.
#[derive(Clone, Copy, Debug)]
struct HandedOn {
    slot: Option<Slot>,
    scope: Scope,
}

/// What goes over the link.
#[derive(Serialize, Deserialize)]
enum Question {
    Request(AskedRequest),
    /// The next piece of an answer that is held.
    More {
        held: u64,
    },
    Appends(append_stream::AskedAppends),
}

/// A request whose caller was looked at.
#[derive(Serialize, Deserialize)]
struct AskedRequest {
    method: String,
    uri: String,
    headers: Vec<(String, ByteBuf)>,
    body: ByteBuf,
    scope: Scope,
    token: Option<String>,
}

/// What comes back.
#[derive(Serialize, Deserialize)]
enum Reply {
    Answer(AnsweredRequest),
    Piece(Piece),
    Appends(Vec<append_stream::AskedOutcome>),
    /// It cannot be read here.
    NotKnown,
}

#[derive(Serialize, Deserialize)]
struct AnsweredRequest {
    status: u16,
    headers: Vec<(String, ByteBuf)>,
    piece: Piece,
}

/// A piece of an answer.
#[derive(Serialize, Deserialize)]
struct Piece {
    bytes: ByteBuf,
    /// Under which the rest is asked for; none if this is the last piece.
    held: Option<u64>,
    /// The answer was cut off behind it.
    is_cut_off: bool,
}

fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // A Vec never refuses a byte.
    rmp_serde::to_vec_named(message).unwrap_or_default()
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    rmp_serde::from_slice(bytes).ok()
}

fn not_understood() -> Problem {
    Problem::unavailable(
        "unavailable",
        "the node that owns the entity runs another version, whose answer is not understood; bring all nodes to one version",
    )
}

/// Answers a request here, or has it answered by the node that owns its entity.
pub(crate) async fn forward(State(node): State<Arc<Node>>, request: Request, next: Next) -> Response {
    let Some(cluster) = &node.cluster else { return next.run(request).await };
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("", MatchedPath::as_str);
    let rule = rule(request.method(), route);
    if let Some(handed_on) = request.extensions().get::<HandedOn>().copied() {
        return match may_be_handed_on(request, route, rule.map(|(scope, _)| scope), handed_on).await {
            Ok(request) => next.run(request).await,
            Err(problem) => problem.into_response(),
        };
    }
    let Some((scope, repeat)) = rule else { return next.run(request).await };
    let (slot, request) = match slot_of_request(request).await {
        Ok(found) => found,
        // The handler says what is wrong with it.
        Err(request) => return next.run(request).await,
    };
    match at_owner(&node, cluster, (scope, repeat), slot, request, next).await {
        Ok(response) => response,
        Err(problem) => problem.into_response(),
    }
}

/// Whether a request that came over the link is one that is handed on, of the slot and with the scope that were said.
async fn may_be_handed_on(
    request: Request,
    route: &str,
    needed: Option<Scope>,
    HandedOn { slot, scope }: HandedOn,
) -> Result<Request, Problem> {
    let refuse =
        || Problem::new(StatusCode::FORBIDDEN, "forbidden", "the request is none that one node hands on to another");
    match slot {
        None => {
            let is_known =
                OF_NODE.iter().any(|(method, path, of)| method == request.method() && *path == route && *of == scope);
            if is_known { Ok(request) } else { Err(refuse()) }
        }
        Some(slot) if needed == Some(scope) => match slot_of_request(request).await {
            Ok((found, request)) if found == slot => Ok(request),
            _ => Err(refuse()),
        },
        Some(_) => Err(refuse()),
    }
}

/// The slot of the entity that a request is about; the request alone if it names none that a cluster has.
async fn slot_of_request(mut request: Request) -> Result<(Slot, Request), Request> {
    let Ok(params) = request.extract_parts::<RawPathParams>().await else { return Err(request) };
    let value = |name| params.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned());
    match (value("kind"), value("id")) {
        (Some(kind), Some(id)) if !kind.starts_with("kuma.") => Ok((slot_of(&kind, &id), request)),
        _ => Err(request),
    }
}

async fn at_owner(
    node: &Arc<Node>,
    cluster: &kuma_cluster::Node,
    (scope, repeat): (Scope, Repeat),
    slot: Slot,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let (mut parts, body) = request.into_parts();
    let caller = access::check(&mut parts, node, Some(scope)).await?;
    // For this node's own handler.
    parts.extensions.insert(Vouched { scope, caller: caller.clone() });
    let mut whole = match parts.method {
        Method::POST => Some(Whole::read(node, &parts.headers, body).await?),
        _ => None,
    };
    let bytes = whole.as_ref().map(|whole| whole.bytes.clone()).unwrap_or_default();
    if cluster.is_here(slot) {
        // The handler takes room for it again.
        whole = None;
        let here = Request::from_parts(parts.clone(), Body::from(bytes.clone()));
        let response = next.run(here).await;
        if !response.extensions().get::<Problem>().is_some_and(Problem::is_elsewhere) {
            return Ok(response);
        }
    }
    let mut headers: Vec<(String, ByteBuf)> = Vec::new();
    for name in OF_REQUEST {
        let values = parts.headers.get_all(&name).iter();
        headers.extend(values.map(|value| (name.as_str().to_owned(), ByteBuf::from(value.as_bytes()))));
    }
    let is_append = scope == Scope::Append;
    if is_append && !parts.headers.contains_key(IDEMPOTENCY_KEY) {
        headers.push((IDEMPOTENCY_KEY.as_str().to_owned(), ByteBuf::from(own_key()?)));
    }
    let uri = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let asked = AskedRequest {
        method: parts.method.as_str().to_owned(),
        uri,
        headers,
        body: ByteBuf::from(bytes.to_vec()),
        scope,
        token: caller.token.as_deref().map(str::to_owned),
    };
    let answer = cluster.ask_owner(slot, encode(&Question::Request(asked)), within(node), repeat).await?;
    drop(whole);
    match decode(&answer.body) {
        Some(Reply::Answer(answered)) => response(cluster, &parts.method, answer.disk, answered),
        _ => Err(not_understood()),
    }
}

/// A little less than whoever asks is given.
fn within(node: &Node) -> Duration {
    node.config.request_timeout.mul_f32(0.9)
}

/// A key that no other request has.
fn own_key() -> Result<String, Problem> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|_| Problem::internal("the operating system gives no random bytes; nothing was done"))?;
    Ok(format!("kuma-{}", hex::encode(bytes)))
}

/// The answer of another node as one's own.
fn response(
    cluster: &kuma_cluster::Node,
    method: &Method,
    disk: DiskId,
    answered: AnsweredRequest,
) -> Result<Response, Problem> {
    let AnsweredRequest { status, headers, piece } = answered;
    let Piece { bytes, held, is_cut_off } = piece;
    if is_cut_off {
        return Err(Problem::unavailable(
            "interrupted",
            "the answer of the node that owns the entity was cut off; retry",
        ));
    }
    let body = match held {
        None => Body::from(bytes.into_vec()),
        Some(held) => rest(cluster.clone(), disk, bytes.into_vec(), held),
    };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).map_err(|_| not_understood())?;
    for (name, value) in headers {
        let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_bytes(&value)) else {
            return Err(not_understood());
        };
        // Of a HEAD it is the only one who knows.
        if !NOT_OF_ANSWER.contains(&name) || (name == header::CONTENT_LENGTH && *method == Method::HEAD) {
            response.headers_mut().append(name, value);
        }
    }
    Ok(response)
}

/// An answer of which the first piece is here. If the rest does not come it is cut off, so that nobody takes it for whole.
fn rest(cluster: kuma_cluster::Node, disk: DiskId, first: Vec<u8>, held: u64) -> Body {
    let begin = (cluster, Some(first), Some(held));
    Body::from_stream(stream::try_unfold(begin, move |(cluster, first, held)| async move {
        if let Some(first) = first {
            return Ok(Some((Bytes::from(first), (cluster, None, held))));
        }
        let Some(held) = held else { return Ok(None) };
        let more = cluster.ask_node(disk, encode(&Question::More { held }), PIECE_WITHIN).await;
        let more = more.map_err(|error| {
            tracing::warn!(%error, "the answer of another node was cut off");
            io::Error::other("interrupted")
        })?;
        match decode(&more) {
            Some(Reply::Piece(Piece { bytes, held, is_cut_off: false })) => {
                Ok(Some((Bytes::from(bytes.into_vec()), (cluster, None, held))))
            }
            _ => Err(io::Error::other("interrupted")),
        }
    }))
}

/// Answers what other nodes hand on.
#[derive(Default)]
pub(crate) struct Answerer(Mutex<Option<(Router, Arc<Node>)>>);

impl Answerer {
    /// From now on questions are answered.
    pub(crate) fn begin(&self, router: Router, node: Arc<Node>) {
        *self.0.lock() = Some((router, node));
    }

    /// And now no more.
    pub(crate) fn end(&self) {
        self.0.lock().take();
    }
}

impl Answer for Answerer {
    fn answer(&self, asked: Asked) -> BoxFuture<'static, Answered> {
        let serving = self.0.lock().clone();
        Box::pin(async move {
            // One that starts or stops has done nothing; whoever asks does so again until it is gone or back.
            let Some((router, node)) = serving.filter(|(_, node)| !node.stopping.is_cancelled()) else {
                return Answered::Elsewhere;
            };
            let reply = match (decode(&asked.body), asked.slot) {
                (Some(Question::Request(request)), slot) => answer_request(router, &node, slot, request).await,
                (Some(Question::More { held }), None) => Some(more(&node, held).await),
                (Some(Question::Appends(appends)), Some(slot)) => {
                    append_stream::answer(&node, slot, appends).await.map(Reply::Appends)
                }
                _ => Some(Reply::NotKnown),
            };
            reply.map_or(Answered::Elsewhere, |reply| Answered::Done(encode(&reply)))
        })
    }
}

async fn answer_request(router: Router, node: &Node, slot: Option<Slot>, asked: AskedRequest) -> Option<Reply> {
    let AskedRequest { method, uri, headers, body, scope, token } = asked;
    let (Ok(method), Ok(uri)) = (Method::try_from(method.as_str()), Uri::try_from(uri)) else {
        return Some(Reply::NotKnown);
    };
    let mut request = Request::new(Body::from(body.into_vec()));
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    let Some(headers) = allowed(headers) else { return Some(Reply::NotKnown) };
    *request.headers_mut() = headers;
    let caller = Caller { token: token.as_deref().map(Into::into) };
    request.extensions_mut().insert(Vouched { scope, caller });
    request.extensions_mut().insert(HandedOn { slot, scope });
    // Errors are answers.
    let Ok(response) = router.oneshot(request).await;
    if response.extensions().get::<Elsewhere>().is_some() {
        return None;
    }
    let (parts, body) = response.into_parts();
    let headers = parts.headers.iter();
    let headers = headers.map(|(name, value)| (name.as_str().to_owned(), ByteBuf::from(value.as_bytes()))).collect();
    let piece = piece(node, body).await;
    Some(Reply::Answer(AnsweredRequest { status: parts.status.as_u16(), headers, piece }))
}

/// Headers that are handed on; none if there is another one among them.
fn allowed(headers: Vec<(String, ByteBuf)>) -> Option<HeaderMap> {
    let mut all = HeaderMap::new();
    for (name, value) in headers {
        let (name, value) = (HeaderName::try_from(name).ok()?, HeaderValue::from_bytes(&value).ok()?);
        if !OF_REQUEST.contains(&name) {
            return None;
        }
        all.append(name, value);
    }
    Some(all)
}

/// The next piece of a body; the rest is held.
async fn piece(node: &Node, mut body: Body) -> Piece {
    let mut bytes = Vec::new();
    while bytes.len() < PIECE_BYTES {
        match body.frame().await {
            None => return Piece { bytes: bytes.into(), held: None, is_cut_off: false },
            Some(Err(_)) => return Piece { bytes: ByteBuf::new(), held: None, is_cut_off: true },
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    bytes.extend_from_slice(&data);
                }
            }
        }
    }
    match axum::body::HttpBody::is_end_stream(&body) {
        true => Piece { bytes: bytes.into(), held: None, is_cut_off: false },
        false => match node.held.keep(body) {
            Some(held) => Piece { bytes: bytes.into(), held: Some(held), is_cut_off: false },
            None => Piece { bytes: ByteBuf::new(), held: None, is_cut_off: true },
        },
    }
}

async fn more(node: &Node, held: u64) -> Reply {
    match node.held.take(held) {
        Some(body) => Reply::Piece(piece(node, body).await),
        None => Reply::NotKnown,
    }
}

/// Answers whose next piece another node asks for.
#[derive(Default)]
pub(crate) struct Held {
    bodies: Mutex<HashMap<u64, (Body, Instant)>>,
    next: AtomicU64,
}

impl Held {
    fn keep(&self, body: Body) -> Option<u64> {
        let mut bodies = self.bodies.lock();
        if bodies.len() >= HELD_MAX {
            return None;
        }
        let held = self.next.fetch_add(1, Relaxed);
        bodies.insert(held, (body, Instant::now()));
        Some(held)
    }

    fn take(&self, held: u64) -> Option<Body> {
        self.bodies.lock().remove(&held).map(|(body, _)| body)
    }

    /// Drops what nobody asks for any more.
    pub(crate) fn sweep(&self) {
        self.bodies.lock().retain(|_, (_, since)| since.elapsed() < HELD_FOR);
    }
}

/// Asks other nodes about themselves, all at once: what each says, with the name of the node; an answer that is none is left out.
pub(crate) async fn ask_nodes(node: &Node, uri: &str, scope: Scope, within: Duration) -> Vec<(String, Vec<u8>)> {
    let Some(cluster) = &node.cluster else { return Vec::new() };
    let others = cluster.members().into_iter().filter(|member| member.is_up && !member.is_own);
    let asked = others.map(|member| async move {
        let request = AskedRequest {
            method: Method::GET.as_str().to_owned(),
            uri: uri.to_owned(),
            headers: Vec::new(),
            body: ByteBuf::new(),
            scope,
            token: None,
        };
        let answer = cluster.ask_node(member.disk, encode(&Question::Request(request)), within).await.ok()?;
        match decode(&answer) {
            Some(Reply::Answer(AnsweredRequest { status: 200, piece: Piece { bytes, held: None, .. }, .. })) => {
                Some((member.name, bytes.into_vec()))
            }
            _ => None,
        }
    });
    futures_util::future::join_all(asked).await.into_iter().flatten().collect()
}

/// Has appends of a stream done by the owner of their slot.
pub(crate) async fn ask_appends(
    cluster: &kuma_cluster::Node,
    slot: Slot,
    appends: &append_stream::AskedAppends,
    within: Duration,
) -> Result<Vec<append_stream::AskedOutcome>, Problem> {
    #[derive(Serialize)]
    enum Question<'a> {
        Appends(&'a append_stream::AskedAppends),
    }
    let answer = cluster.ask_owner(slot, encode(&Question::Appends(appends)), within, Repeat::Safe).await?;
    match decode(&answer.body) {
        Some(Reply::Appends(outcomes)) => Ok(outcomes),
        _ => Err(not_understood()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn headers_that_are_not_handed_on_are_not_taken_either() {
        let header = |name: &str| (name.to_owned(), ByteBuf::from(b"x".to_vec()));
        assert_eq!(allowed(vec![header("idempotency-key"), header("if-match")]).unwrap().len(), 2);
        for name in ["authorization", "host", "origin", "not a name", "x-forwarded-for"] {
            assert!(allowed(vec![header("accept"), header(name)]).is_none(), "{name}");
        }
    }

    #[test]
    fn a_head_is_handed_on_as_the_get_that_it_is() {
        assert!(rule(&Method::HEAD, "/v1/entities/{kind}/{id}").is_some());
        assert!(rule(&Method::PUT, "/v1/entities/{kind}/{id}").is_none());
        assert!(rule(&Method::GET, "/v1/audit").is_none());
    }
}
