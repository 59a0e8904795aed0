//! What each request goes through before and behind its handler: limits, a deadline, an id, the access log.
//!
//! Invariants:
//! - Beyond its limits the node answers at once that it is overloaded, and has done nothing.
//! - A panic is one request's: it is answered, logged, and nobody else notices.
//! - The access log has no path but the pattern of the route: no id of an entity is in it.

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;
use tokio::time::timeout;

use crate::{access, api::entities::IDEMPOTENCY_KEY, node::Node, problem::Problem};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Nothing was done, because the slot is another node's. For whoever forwards requests.
#[derive(Clone, Copy)]
pub(crate) struct Elsewhere;

/// Answers a request within its limits.
pub(crate) async fn guard(State(node): State<Arc<Node>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(request.headers());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("(none)", MatchedPath::as_str);
    let method = request.method().clone();
    let is_again_safe = is_again_safe(&method, request.headers());
    let mut response = match admit(&node, route, &request) {
        Err(problem) => problem.into_response(),
        Ok(_turn) => {
            let answered = AssertUnwindSafe(next.run(request)).catch_unwind();
            match timeout(node.config.request_timeout, answered).await {
                Ok(Ok(response)) => response,
                Ok(Err(_)) => {
                    tracing::error!(%method, route, request_id = id, "a request's handler panicked; please report it");
                    Problem::internal("the request met a defect of the server; the node's log has its id")
                        .into_response()
                }
                Err(_) => too_slow(node.config.request_timeout, is_again_safe).into_response(),
            }
        }
    };
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        response = with_id(response, &problem, &id);
        if problem.is_elsewhere() {
            response.extensions_mut().insert(Elsewhere);
        }
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let (status, took) = (response.status(), started.elapsed());
    let route_label = route.to_owned();
    metrics::counter!("kuma_http_requests_total", "method" => label(&method), "route" => route_label.clone(), "status" => status.as_str().to_owned())
        .increment(1);
    metrics::histogram!("kuma_http_request_seconds", "route" => route_label).record(took);
    if node.config.access_log && !route.starts_with("/health/") {
        let took_ms = took.as_secs_f64() * 1e3;
        tracing::info!(target: "kuma::access", %method, route, status = status.as_u16(), took_ms, request_id = id, "request");
    }
    response
}

/// Methods can be made up; labels must not.
fn label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// Whether the request may come in now. What it returns is its turn.
fn admit(node: &Node, route: &str, request: &Request) -> Result<Option<tokio::sync::OwnedSemaphorePermit>, Problem> {
    if node.is_open() {
        access::check_origin(request.uri(), request.headers())?;
    }
    // Whoever looks after the node has to get through, most of all when nobody else does.
    if route.starts_with("/health/") {
        return Ok(None);
    }
    if node.stopping.is_cancelled() {
        return Err(Problem::stopping());
    }
    let full =
        |_| Problem::overloaded("too many requests are being answered at once (`requests_max`); nothing was done");
    node.requests.clone().try_acquire_owned().map(Some).map_err(full)
}

/// Whether the same request can be sent again whatever became of it.
fn is_again_safe(method: &Method, headers: &HeaderMap) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::DELETE) || headers.contains_key(IDEMPOTENCY_KEY)
}

fn too_slow(after: Duration, is_again_safe: bool) -> Problem {
    let advice = match is_again_safe {
        true => "it can be sent again as it is",
        false => "whether it was done is not known: read before you send it again, or use an Idempotency-Key",
    };
    let detail = format!("the request was not answered within {after:?} (`request_timeout`); {advice}");
    Problem::new(StatusCode::GATEWAY_TIMEOUT, "timeout", detail).retry_safe(is_again_safe)
}

/// The same answer, with the id of the request in its body.
fn with_id(response: Response, problem: &Problem, id: &str) -> Response {
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(axum::http::header::CONTENT_LENGTH);
    let text = serde_json::to_vec(&problem.body(Some(id.to_owned()))).unwrap_or_default();
    Response::from_parts(parts, text.into())
}

/// The id that the request came with, if it is fit for a log, or a new one.
fn request_id(headers: &HeaderMap) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static FIRST: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    let given = headers.get(&REQUEST_ID).and_then(|id| id.to_str().ok());
    let is_fit = |id: &&str| {
        (1..=64).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
    };
    match given.filter(is_fit) {
        Some(id) => id.to_owned(),
        None => {
            // Ids of two runs must not be the same; they need not be secret.
            let first = *FIRST.get_or_init(|| getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id()) << 32));
            format!("{:016x}", first.wrapping_add(NEXT.fetch_add(1, Relaxed)))
        }
    }
}
