//! Whether the node lives, and whether it takes requests. Needs no token, and says nothing that needs one.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode, response::Response};

use super::json;
use crate::{node::Node, wire::HealthBody};

/// Whether the process answers.
#[utoipa::path(
    get,
    path = "/health/live",
    operation_id = "live",
    tag = "operation",
    responses((status = 200, description = "It does", body = HealthBody)),
    security(()),
)]
pub(crate) async fn live(State(node): State<Arc<Node>>) -> Response {
    let needs_token = !node.is_open();
    json(StatusCode::OK, &HealthBody { status: "ok".to_owned(), reasons: Vec::new(), needs_token })
}

/// Whether requests are taken.
#[utoipa::path(
    get,
    path = "/health/ready",
    operation_id = "ready",
    tag = "operation",
    responses(
        (status = 200, description = "They are", body = HealthBody),
        (status = 503, description = "They are not: send none", body = HealthBody),
    ),
    security(()),
)]
pub(crate) async fn ready(State(node): State<Arc<Node>>) -> Response {
    let (status, body) = readiness(&node);
    json(status, &body)
}

/// Whether requests are taken, and what is out of use.
pub(crate) fn readiness(node: &Node) -> (StatusCode, HealthBody) {
    let needs_token = !node.is_open();
    let body = |status: &str, reasons| HealthBody { status: status.to_owned(), reasons, needs_token };
    if node.stopping.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, body("stopping", vec!["the node is shutting down".to_owned()]));
    }
    let stats = node.kuma.stats();
    let mut reasons = Vec::new();
    for shard in &stats.shards {
        if shard.out_of_use.is_some() {
            reasons.push(format!("shard {} is out of use, the node's log says why", shard.shard));
        } else if shard.writer.is_some_and(|writer| writer.closed) {
            reasons.push(format!("shard {} cannot be written to for now; it is tried again by itself", shard.shard));
        }
    }
    if stats.keys.closed {
        reasons.push("keys.db cannot be written to for now; it is tried again by itself".to_owned());
    }
    let status = if reasons.is_empty() { "ok" } else { "degraded" };
    (StatusCode::OK, body(status, reasons))
}
