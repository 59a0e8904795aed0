//! A server that answers as it is told to, and remembers what it was asked.
#![allow(dead_code)] // Each test uses what it needs.

use std::{
    convert::Infallible,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::{Request, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use kuma_node::wire::Problem;

/// Long enough for a busy machine: nothing waits for it that goes well.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

type Answer = dyn Fn(usize, &Seen) -> Response + Send + Sync;

pub(crate) struct Fake {
    pub(crate) url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

#[derive(Clone)]
struct Told {
    seen: Arc<Mutex<Vec<Seen>>>,
    answer: Arc<Answer>,
    reads_bodies: bool,
}

impl Fake {
    /// A server that gives the nth request, from 0, this answer.
    pub(crate) async fn start(answer: impl Fn(usize, &Seen) -> Response + Send + Sync + 'static) -> Fake {
        Fake::with(true, answer).await
    }

    pub(crate) async fn with(
        reads_bodies: bool,
        answer: impl Fn(usize, &Seen) -> Response + Send + Sync + 'static,
    ) -> Fake {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = Told { seen: seen.clone(), answer: Arc::new(answer), reads_bodies };
        let router = Router::new().fallback(handle).with_state(told);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Fake { url, seen }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

async fn handle(State(told): State<Told>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = if told.reads_bodies { to_bytes(body, usize::MAX).await.unwrap_or_default() } else { Bytes::new() };
    let path = parts.uri.path_and_query().unwrap().as_str().to_owned();
    let seen = Seen { method: parts.method.to_string(), path, headers: parts.headers, body };
    let n = {
        let mut all = told.seen.lock().unwrap();
        all.push(seen.clone());
        all.len() - 1
    };
    (told.answer)(n, &seen)
}

pub(crate) fn json_body(value: &impl serde::Serialize) -> Body {
    serde_json::to_vec(value).unwrap().into()
}

pub(crate) fn problem(status: u16, code: &str, retry_after_ms: Option<u64>) -> Response {
    let body = Problem {
        kind: format!("urn:kuma:{code}"),
        title: code.to_owned(),
        status,
        code: code.to_owned(),
        detail: format!("{code} happened"),
        retry_safe: retry_after_ms.is_some(),
        retry_after_ms,
        actual_version: None,
        request_id: None,
    };
    (StatusCode::from_u16(status).unwrap(), json_body(&body)).into_response()
}

/// An answer whose connection is cut behind these bytes.
pub(crate) fn cut_behind(text: &'static str) -> Response {
    let pieces = [Ok(Bytes::from(text)), Err(io::Error::other("cut"))];
    let pieces = stream::unfold(pieces.into_iter(), |mut pieces| async move {
        let piece = pieces.next()?;
        if piece.is_err() {
            // What was there before goes out when the body has nothing for once.
            tokio::task::yield_now().await;
        }
        Some((piece, pieces))
    });
    Body::from_stream(pieces).into_response()
}

/// An answer that does not end.
pub(crate) fn open_behind(text: &'static str) -> Response {
    let pieces = stream::unfold(Some(text), |text| async move {
        match text {
            Some(text) => Some((Ok::<_, Infallible>(Bytes::from(text)), None)),
            None => std::future::pending().await,
        }
    });
    Body::from_stream(pieces).into_response()
}
