//! Whether the node lives, and whether it takes requests. Needs no token, and says nothing that needs one.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode, response::Response};
use kuma_cluster::{HealthReason, HealthState};

use super::json;
use crate::{
    node::Node,
    wire::{ClusterHealthBody, ClusterReasonBody, HealthBody},
};

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

/// Whether the cluster serves every entity, as this node sees it, and what is in the way.
///
/// 200 `ok`: it does. 200 `degraded`: it does, and something is to be looked at. 503 `unavailable`: entities of some slots, or all of them, cannot be served now.
/// A store in no cluster is `ok`.
#[utoipa::path(
    get,
    path = "/health/cluster",
    operation_id = "cluster_health",
    tag = "cluster",
    responses(
        (status = 200, description = "`ok` or `degraded`", body = ClusterHealthBody),
        (status = 503, description = "`unavailable`: some entities cannot be served now", body = ClusterHealthBody),
    ),
    security(()),
)]
pub(crate) async fn cluster(State(node): State<Arc<Node>>) -> Response {
    let needs_token = !node.is_open();
    let Some(cluster) = &node.cluster else {
        let body = ClusterHealthBody { status: "ok".to_owned(), is_clustered: false, reasons: Vec::new(), needs_token };
        return json(StatusCode::OK, &body);
    };
    let health = cluster.health();
    let status = match health.state {
        HealthState::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::OK,
    };
    let reason = |reason: HealthReason| ClusterReasonBody {
        code: reason.code.to_owned(),
        status: reason.state.as_str().to_owned(),
        node: reason.node,
        slots: reason.slots as u64,
        since_ms: reason.since.map(|since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
        detail: reason.detail,
    };
    let reasons = health.reasons.into_iter().map(reason).collect();
    let body = ClusterHealthBody { status: health.state.as_str().to_owned(), is_clustered: true, reasons, needs_token };
    json(status, &body)
}

/// Whether requests are taken, and what is out of use.
pub(crate) fn readiness(node: &Node) -> (StatusCode, HealthBody) {
    let needs_token = !node.is_open();
    let body = |status: &str, reasons| HealthBody { status: status.to_owned(), reasons, needs_token };
    if node.stopping.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, body("stopping", vec!["the node is shutting down".to_owned()]));
    }
    if let Some(cluster) = node.cluster.as_ref().filter(|cluster| !cluster.is_ready()) {
        let of_itself = |reason: &kuma_cluster::HealthReason| matches!(reason.code, "joining" | "not_ready");
        let reasons = cluster.health().reasons.into_iter().filter(of_itself).map(|reason| reason.detail).collect();
        return (StatusCode::SERVICE_UNAVAILABLE, body("starting", reasons));
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
