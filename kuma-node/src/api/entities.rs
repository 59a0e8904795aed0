//! Appending to an entity, and reading its state.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use kuma_core::{RawHandle, ReadError, Version};
use serde::Deserialize;
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::{EntityPath, Problems, json, parse_time};
use crate::{
    access::{self, May},
    append_body::{Append, Encoding},
    body::{Path, Query, Whole, encoding},
    node::Node,
    problem::Problem,
    wire,
};

/// The name of the header.
pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// In what an append may be.
pub(crate) const MESSAGE_PACK: [&str; 3] = ["application/msgpack", "application/x-msgpack", "application/vnd.msgpack"];

/// Events, or a single one.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "describes the body; it is read by `append_body`")]
pub(crate) enum AppendRequest {
    /// Events that are appended as one.
    Events(wire::AppendBody),
    /// One event.
    Event(wire::NewEventBody),
}

/// Appends events to an entity.
///
/// All of them or none; they are on the disk when it is answered. With an `Idempotency-Key` the request can be sent again, however it ended: it
/// happens once.
#[utoipa::path(
    post,
    path = "/v1/entities/{kind}/{id}/events",
    operation_id = "append",
    tag = "entities",
    params(
        EntityPath,
        ("Idempotency-Key" = Option<String>, Header, description = "Unique within the entity, 1 to 256 bytes", min_length = 1, max_length = 256),
        ("If-Match" = Option<String>, Header, description = "The version that the entity must be at, in quotes: `\"7\"`", pattern = "^(\"[0-9]{1,19}\"|[0-9]{1,19})$"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: the entity must not have events yet", pattern = "^\\*$"),
    ),
    request_body(content((AppendRequest = "application/json"), (AppendRequest = "application/msgpack"))),
    responses((status = 201, description = "Appended, now or before under the same key", body = wire::Appended, headers(("ETag" = String, description = "The version, in quotes"))), Problems),
)]
pub(crate) async fn append(
    State(node): State<Arc<Node>>,
    _may: May<access::Append>,
    Path(path): Path<EntityPath>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let headers = &parts.headers;
    let encoding = append_encoding(headers)?;
    let key = once(headers, &IDEMPOTENCY_KEY)?.map(|key| key.as_bytes().to_vec());
    let of_header = expected_version(headers)?;
    let whole = Whole::read(&node, headers, body).await?;
    let read = Append::parse(encoding, &whole.bytes)?;
    let expected = match (read.expected, of_header) {
        (Some(body), Some(header)) if body != header => {
            return Err(Problem::bad("invalid_header", "the body and `If-Match` expect different versions"));
        }
        (body, header) => body.or(header),
    };
    let entity = path.entity(&node)?;
    let mut append = entity.append_all(read.events);
    if let Some(expected) = expected {
        append = append.expecting(expected);
    }
    if let Some(metadata) = read.metadata {
        append = append.metadata(metadata);
    }
    if let Some(key) = key {
        append = append.idempotency_key(key);
    }
    let pending = append.submit().await?;
    drop(whole);
    let appended = pending.appended().await?;
    let body = wire::Appended { version: appended.version.0, repeated: appended.repeated };
    Ok((StatusCode::CREATED, [(header::ETAG, etag(appended.version))], axum::Json(body)).into_response())
}

fn append_encoding(headers: &HeaderMap) -> Result<Encoding, Problem> {
    let [first, second, third] = MESSAGE_PACK.map(|name| (name, Encoding::MessagePack));
    encoding(headers, &[("application/json", Encoding::Json), first, second, third])
}

/// A header that must not be there twice.
fn once<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a HeaderValue>, Problem> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    match values.next() {
        None => Ok(first),
        Some(_) => Err(Problem::bad("invalid_header", format!("the header `{name}` is there twice"))),
    }
}

/// What `If-Match` and `If-None-Match` ask for.
fn expected_version(headers: &HeaderMap) -> Result<Option<Version>, Problem> {
    let refuse = |detail: &str| Err(Problem::bad("invalid_header", detail));
    let is_new = match once(headers, &header::IF_NONE_MATCH)? {
        None => None,
        Some(value) if value == "*" => Some(Version(0)),
        Some(_) => return refuse("`If-None-Match` has to be `*`: the entity must not have events yet"),
    };
    let is_at = match once(headers, &header::IF_MATCH)? {
        None => None,
        Some(value) => {
            let text = value.to_str().unwrap_or_default().trim();
            let number = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
            match number.parse() {
                Ok(version) => Some(Version(version)),
                Err(_) => return refuse("`If-Match` has to be one version in quotes, `\"7\"` say"),
            }
        }
    };
    match (is_new, is_at) {
        (Some(_), Some(_)) => refuse("`If-Match` and `If-None-Match` exclude each other"),
        (is_new, is_at) => Ok(is_new.or(is_at)),
    }
}

pub(crate) fn etag(version: Version) -> HeaderValue {
    HeaderValue::try_from(format!("\"{version}\"")).unwrap_or(HeaderValue::from_static("\"\""))
}

/// Which state.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct StateQuery {
    /// The state when the entity had so many events.
    version: Option<u64>,
    /// The state at this time, RFC 3339.
    #[param(format = DateTime)]
    at: Option<String>,
}

/// The state of an entity: now, at a version, or at a time.
///
/// What was acknowledged to anybody is in it.
#[utoipa::path(
    get,
    path = "/v1/entities/{kind}/{id}",
    operation_id = "read",
    tag = "entities",
    params(EntityPath, StateQuery),
    responses((status = 200, description = "The state", body = wire::EntityState, headers(("ETag" = String, description = "The version, in quotes"))), Problems),
)]
pub(crate) async fn state(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Path(path): Path<EntityPath>,
    Query(query): Query<StateQuery>,
) -> Result<Response, Problem> {
    let (state, version) = state_of(&path.entity(&node)?, &query).await?;
    let EntityPath { kind, id } = path;
    let body = wire::EntityState { kind, id, version: version.0, state };
    let mut response = json(StatusCode::OK, &body);
    response.headers_mut().insert(header::ETAG, etag(version));
    Ok(response)
}

async fn state_of(entity: &RawHandle, query: &StateQuery) -> Result<(Value, Version), Problem> {
    let read: Result<(Value, Version), ReadError> = match (query.version, &query.at) {
        (Some(_), Some(_)) => {
            return Err(Problem::bad("invalid_query_string", "`version` and `at` exclude each other"));
        }
        (Some(version), None) => entity.at_version(Version(version)).await,
        (None, Some(at)) => entity.at(parse_time(at)?).await,
        (None, None) => entity.read().await,
    };
    match read? {
        (_, Version(0)) if query.at.is_some() => {
            Err(Problem::new(StatusCode::NOT_FOUND, "never_written", "the entity had no events at that time"))
        }
        (_, Version(0)) => Err(never_written()),
        read => Ok(read),
    }
}

pub(crate) fn never_written() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "never_written", "the entity has no events; the first append makes it")
}
