//! The events of an entity, what differs between two of its versions, and what became of a request.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::{TryStreamExt, stream};
use kuma_core::{Direction, History, Outcome, RawHandle, RecordedEvent, Version};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    EntityPath, Problems,
    entities::{IDEMPOTENCY_KEY, never_written},
    json, json_text, lines, time_text,
};
use crate::{
    access::{self, May},
    body::{Path, Query},
    node::Node,
    problem::Problem,
    wire,
};

/// So many bytes are sent at once.
pub(crate) const CHUNK_BYTES: usize = 64 << 10;
const LIMIT_DEFAULT: u64 = 100;
const LIMIT_MAX: u64 = 1000;
/// A page ends when it has grown to so many bytes.
const PAGE_BYTES_MAX: usize = 16 << 20;

/// In which order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Order {
    /// Oldest first.
    #[default]
    Asc,
    /// Newest first.
    Desc,
}

/// Which events.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventsQuery {
    /// The first version that is wanted.
    #[param(minimum = 1)]
    from: Option<u64>,
    /// The last version that is wanted.
    #[param(minimum = 1)]
    to: Option<u64>,
    /// At most so many; 100 by default. Not for NDJSON.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
    /// In which order.
    #[param(inline)]
    order: Option<Order>,
}

/// The events of an entity.
///
/// A page of them; or all, one a line, with `Accept: application/x-ndjson`.
#[utoipa::path(
    get,
    path = "/v1/entities/{kind}/{id}/events",
    operation_id = "history",
    tag = "entities",
    params(EntityPath, EventsQuery),
    responses(
        (status = 200, description = "The events", content((wire::EventsPage = "application/json"), (Vec<wire::EventBody> = "application/x-ndjson"))),
        Problems,
    ),
)]
pub(crate) async fn events(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Path(path): Path<EntityPath>,
    Query(query): Query<EventsQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let entity = path.entity(&node)?;
    let limit = query.limit.unwrap_or(LIMIT_DEFAULT);
    if !(1..=LIMIT_MAX).contains(&limit) || query.from == Some(0) || query.to == Some(0) {
        return Err(Problem::bad("invalid_query_string", "`limit` is 1 to 1000, `from` and `to` are versions from 1"));
    }
    let (from, to, order) = (query.from.unwrap_or(1), query.to.unwrap_or(u64::MAX), query.order.unwrap_or_default());
    let direction = match order {
        Order::Asc => Direction::Forward,
        Order::Desc => Direction::Backward,
    };
    let mut history = entity.history(from..=to, direction);
    let first = history.try_next().await?;
    let Some(first) = first else {
        exists(&entity).await?;
        return Ok(json(StatusCode::OK, &wire::EventsPage { events: Vec::new(), next: None }));
    };
    let wants_lines =
        headers.get(header::ACCEPT).is_some_and(|accept| accept.as_bytes().starts_with(b"application/x-ndjson"));
    if wants_lines {
        let permit = node.stream()?;
        let all = stream::try_unfold((Some(first), history, permit), |(first, mut history, permit)| async move {
            let chunk = chunk(first, &mut history).await?;
            Ok::<_, Problem>((!chunk.is_empty()).then(|| (Bytes::from(chunk), (None, history, permit))))
        });
        return Ok(lines(Body::from_stream(all.map_err(|problem| std::io::Error::other(problem.detail().to_owned())))));
    }
    let mut page = Vec::with_capacity(4096);
    page.extend_from_slice(b"{\"events\":[");
    let (mut count, mut next, mut event) = (0, None, Some(first));
    while let Some(now) = event.take() {
        if count == limit || page.len() > PAGE_BYTES_MAX {
            next = Some(now.version.0);
            break;
        }
        if count > 0 {
            page.push(b',');
        }
        write_event(&mut page, &EventHead::of(&now), &now);
        count += 1;
        event = history.try_next().await?;
    }
    page.extend_from_slice(b"]");
    if let Some(next) = next {
        page.extend_from_slice(format!(",\"next\":{next}").as_bytes());
    }
    page.push(b'}');
    Ok(json_text(page))
}

/// Lines of events, up to the size of a chunk; empty at the end.
async fn chunk(first: Option<RecordedEvent>, history: &mut History) -> Result<Vec<u8>, Problem> {
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    let mut next = match first {
        Some(first) => Some(first),
        None => history.try_next().await?,
    };
    while let Some(event) = next.take() {
        write_event(&mut chunk, &EventHead::of(&event), &event);
        chunk.push(b'\n');
        if chunk.len() < CHUNK_BYTES {
            next = history.try_next().await?;
        }
    }
    Ok(chunk)
}

/// Whether the entity has events.
///
/// # Errors
/// It has none, or cannot be read.
pub(crate) async fn exists(entity: &RawHandle) -> Result<(), Problem> {
    match entity.history(1..=1, Direction::Forward).try_next().await? {
        Some(_) => Ok(()),
        None => Err(never_written()),
    }
}

/// An event but for its data, as [`wire::EventBody`] has it.
#[derive(Serialize)]
pub(crate) struct EventHead<'a> {
    version: u64,
    #[serde(rename = "type")]
    name: &'a str,
    schema: u32,
    at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<MetadataHead<'a>>,
}

#[derive(Serialize)]
struct MetadataHead<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    causation: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    headers: &'a [(String, String)],
}

impl<'a> EventHead<'a> {
    pub(crate) fn of(event: &'a RecordedEvent) -> Self {
        let metadata = event.metadata.as_ref().map(|metadata| MetadataHead {
            correlation: metadata.correlation.as_deref(),
            causation: metadata.causation.as_deref(),
            headers: &metadata.headers,
        });
        let RecordedEvent { version, name, schema, at, .. } = event;
        EventHead { version: version.0, name, schema: *schema, at: time_text(*at), metadata }
    }
}

/// Writes an event: its head, which must be a JSON object that is not empty, and its data, which is JSON text already.
pub(crate) fn write_event(out: &mut Vec<u8>, head: &impl Serialize, event: &RecordedEvent) {
    // A Vec never refuses a byte, and heads are numbers and texts.
    let _ = serde_json::to_writer(&mut *out, head);
    // The closing brace; it comes after the data.
    out.pop();
    match event.json_text() {
        Some(data) => {
            out.extend_from_slice(b",\"data\":");
            out.extend_from_slice(data.as_bytes());
        }
        None => {
            out.extend_from_slice(b",\"data\":null,\"bytes\":\"");
            out.extend_from_slice(BASE64_STANDARD.encode(&event.data).as_bytes());
            out.push(b'"');
        }
    }
    out.push(b'}');
}

/// Two versions.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct DiffQuery {
    /// The version before.
    from: u64,
    /// The version after; the newest by default.
    to: Option<u64>,
}

/// What differs between two versions of an entity.
#[utoipa::path(
    get,
    path = "/v1/entities/{kind}/{id}/diff",
    operation_id = "diff",
    tag = "entities",
    params(EntityPath, DiffQuery),
    responses((status = 200, description = "The changes, in an order in which they can be made", body = wire::DiffBody), Problems),
)]
pub(crate) async fn diff(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Path(path): Path<EntityPath>,
    Query(query): Query<DiffQuery>,
) -> Result<Response, Problem> {
    let entity = path.entity(&node)?;
    exists(&entity).await?;
    let to = match query.to {
        Some(to) => Version(to),
        None => entity.read().await?.1,
    };
    let diff = entity.diff(Version(query.from), to).await?;
    let change =
        |change: kuma_core::Change| wire::ChangeBody { path: change.path, before: change.before, after: change.after };
    let changes = diff.changes.into_iter().map(change).collect();
    Ok(json(StatusCode::OK, &wire::DiffBody { from: diff.from.0, to: diff.to.0, changes }))
}

/// What became of the append with an `Idempotency-Key`.
#[utoipa::path(
    get,
    path = "/v1/entities/{kind}/{id}/outcome",
    operation_id = "outcome",
    tag = "entities",
    params(EntityPath, ("Idempotency-Key" = String, Header, description = "The key of the append, 1 to 256 bytes", min_length = 1, max_length = 256)),
    responses((status = 200, description = "What became of it", body = wire::OutcomeBody), Problems),
)]
pub(crate) async fn outcome(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Path(path): Path<EntityPath>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else {
        return Err(Problem::bad("invalid_header", "the header `Idempotency-Key` is missing"));
    };
    let outcome = match path.entity(&node)?.outcome(key.as_bytes()).await? {
        Outcome::Committed(version) => wire::OutcomeBody::Committed { version: version.0 },
        Outcome::InFlight => wire::OutcomeBody::InFlight,
        Outcome::NeverSeen => wire::OutcomeBody::NeverSeen,
    };
    Ok(json(StatusCode::OK, &outcome))
}
