//! The HTTP interface: which handler answers what, and the document that says so.

mod admin;
pub(crate) mod append_stream;
mod cluster;
pub(crate) mod document;
pub(crate) mod entities;
mod erasure;
mod export;
mod health;
mod history;
mod projections;
mod subscribe;
mod work;

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;
use utoipa::{
    IntoParams, OpenApi,
    openapi::{
        Components, ContentBuilder, Ref, RefOr, ResponseBuilder,
        security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme},
    },
};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{node::Node, problem::Problem, wire};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Kuma",
        description = "An entity-native event store: append, read, travel in time, subscribe, erase. Errors are problems (RFC 9457) that say whether the same request can be sent again. See docs/http.md.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    components(schemas(wire::Problem, document::SubscribeFrom, document::EventName, wire::StreamedAppend, wire::StreamedOutcome, wire::SubscribedEvent, wire::SubscribedErasure, wire::SubscribedDamage, wire::ClusterEventBody)),
    tags(
        (name = "entities", description = "Events and states of entities"),
        (name = "erasure", description = "Erasing entities, and the receipts of it"),
        (name = "streams", description = "Many entities at once"),
        (name = "projections", description = "SQL read models"),
        (name = "operation", description = "The node itself"),
        (name = "cluster", description = "The nodes, their slots, and how they move"),
    ),
    security(()),
)]
struct Document;

/// Each answer that is a problem.
pub(crate) struct Problems;

impl utoipa::IntoResponses for Problems {
    fn responses() -> BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let schema = Ref::from_schema_name("Problem");
        let content = ContentBuilder::new().schema(Some(schema)).build();
        let response = ResponseBuilder::new()
            .description("It failed: see `code`, `detail` and `retry_safe`")
            .content("application/problem+json", content)
            .build();
        BTreeMap::from([("default".to_owned(), response.into())])
    }
}

/// The routes, and the document of them as one of them.
pub(crate) fn router() -> Router<Arc<Node>> {
    let (router, mut document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(entities::append))
        .routes(routes!(entities::state, erasure::erase))
        .routes(routes!(history::events))
        .routes(routes!(history::diff))
        .routes(routes!(history::outcome))
        .routes(routes!(export::entity))
        .routes(routes!(erasure::recreate))
        .routes(routes!(erasure::restore_to))
        .routes(routes!(erasure::receipt))
        .routes(routes!(erasure::verify_receipt))
        .routes(routes!(erasure::public_key))
        .routes(routes!(append_stream::append))
        .routes(routes!(export::import))
        .routes(routes!(export::all))
        .routes(routes!(subscribe::events))
        .routes(routes!(projections::list))
        .routes(routes!(projections::status, projections::remove))
        .routes(routes!(projections::skipped))
        .routes(routes!(projections::query))
        .routes(routes!(projections::change))
        .routes(routes!(admin::audit))
        .routes(routes!(admin::status))
        .routes(routes!(admin::verify))
        .routes(routes!(admin::backup))
        .routes(routes!(admin::metrics))
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(health::cluster))
        .routes(routes!(cluster::members))
        .routes(routes!(cluster::slots))
        .routes(routes!(cluster::moves))
        .routes(routes!(cluster::plan))
        .routes(routes!(cluster::migrate))
        .routes(routes!(cluster::drain))
        .routes(routes!(cluster::forget))
        .routes(routes!(cluster::events))
        .split_for_parts();
    document.info.version = env!("CARGO_PKG_VERSION").to_owned();
    let components = document.components.get_or_insert_with(Components::default);
    let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    components.security_schemes.insert("token".to_owned(), bearer.into());
    let open = document::text(&document);
    document.security = Some(vec![SecurityRequirement::new("token", [""; 0])]);
    let with_tokens = document::text(&document);
    let served = async move |State(node): State<Arc<Node>>| json_text(if node.is_open() { open } else { with_tokens });
    router.route("/openapi.json", get(served)).fallback(not_found).method_not_allowed_fallback(method_not_allowed)
}

async fn not_found(uri: Uri) -> Problem {
    let hint = if uri.path().starts_with("/v1/entities/") {
        "; an id with a slash or a percent sign has to be percent-encoded"
    } else {
        ""
    };
    Problem::new(
        StatusCode::NOT_FOUND,
        "no_such_route",
        format!("there is nothing at this path; /openapi.json lists what there is{hint}"),
    )
}

async fn method_not_allowed() -> Problem {
    // Methods can be made up, and are not quoted either.
    let detail = "this path has no such method; /openapi.json lists those that it has";
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", detail)
}

/// Names an entity.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(crate) struct EntityPath {
    /// Its kind: 1 to 64 ASCII letters, digits, `_`, `-` or `.`, starting with a letter.
    #[param(pattern = "^[A-Za-z][A-Za-z0-9_.-]{0,63}$", example = "account")]
    pub(crate) kind: String,
    /// Its id: 1 to 512 bytes of UTF-8, percent-encoded.
    #[param(min_length = 1, max_length = 512, example = "acc_001")]
    pub(crate) id: String,
}

impl EntityPath {
    /// The handle of the entity.
    ///
    /// # Errors
    /// It is one of the store's own, which have routes and rights of their own.
    pub(crate) fn entity(&self, node: &Node) -> Result<kuma_core::RawHandle, Problem> {
        check_kind(&self.kind)?;
        Ok(node.kuma.raw(&self.kind, &self.id))
    }
}

/// Whether a kind is for everybody.
///
/// # Errors
/// It is the store's own.
pub(crate) fn check_kind(kind: &str) -> Result<(), Problem> {
    match kind.starts_with("kuma.") {
        false => Ok(()),
        true => Err(Problem::new(
            StatusCode::FORBIDDEN,
            "reserved_kind",
            "kinds that begin with `kuma.` are the store's own; the audit log is at /v1/audit",
        )),
    }
}

/// A time as it is written everywhere: RFC 3339 in UTC, to the microsecond.
pub(crate) fn time_text(at: SystemTime) -> String {
    let at = jiff::Timestamp::try_from(at).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!("{at:.6}")
}

/// Reads such a time, in any zone.
///
/// # Errors
/// It is none.
pub(crate) fn parse_time(text: &str) -> Result<SystemTime, Problem> {
    let at: Result<jiff::Timestamp, _> = text.parse();
    at.map(SystemTime::from).map_err(|_| {
        Problem::bad(
            "invalid_time",
            "a time is written as RFC 3339 has it, 2026-01-31T12:00:00Z say (a `+` has to be `%2B` in a URL)",
        )
    })
}

/// A body that is not JSON through and through, and is answered with 200.
pub(crate) fn lines(body: axum::body::Body) -> Response {
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// JSON that is text already.
pub(crate) fn json_text(text: impl Into<axum::body::Body>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text.into()).into_response()
}

/// JSON with a status.
pub(crate) fn json<T: serde::Serialize>(status: StatusCode, body: &T) -> Response {
    (status, Json(body)).into_response()
}
