//! Erasing entities, and the receipts of it.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode, response::Response};
use kuma_core::{Receipt, ReceiptId, Version};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{EntityPath, Problems, document, json};
use crate::{
    access::{self, May},
    body::{JsonBody, Path, Query},
    node::Node,
    problem::Problem,
    whole_number, wire,
};

/// Why it is erased. Name no person: it goes into the audit log, which is never erased.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct EraseQuery {
    /// Why, "request 4711" say.
    #[param(min_length = 1, max_length = 1024, example = "request 4711")]
    reason: String,
    /// On whose behalf. The name of the token is noted by itself.
    #[param(min_length = 1, max_length = 512)]
    by: Option<String>,
    /// Only this life of it, 1 at first. A request that comes late or twice does no harm to the next life then.
    #[param(minimum = 1)]
    life: Option<u32>,
}

/// Erases an entity: destroys its key and deletes its events, and what read models hold of it.
///
/// It cannot be undone. Answered with the signed receipt when nothing of the entity is in any live file; asked again, with the same one.
#[utoipa::path(
    delete,
    path = "/v1/entities/{kind}/{id}",
    operation_id = "erase",
    tag = "erasure",
    params(EntityPath, EraseQuery),
    responses((status = 200, description = "The receipt: keep it", body = document::Receipt), Problems),
)]
pub(crate) async fn erase(
    State(node): State<Arc<Node>>,
    May { caller, .. }: May<access::Erase>,
    Path(path): Path<EntityPath>,
    Query(EraseQuery { reason, by, life }): Query<EraseQuery>,
) -> Result<Response, Problem> {
    check_by(by.as_deref())?;
    let (entity, reason) = (path.entity(&node)?, caller.reason(reason, by));
    let receipt = match life {
        Some(life) => entity.erase_life(life, reason).await?,
        None => entity.erase(reason).await?,
    };
    Ok(json(StatusCode::OK, &receipt))
}

/// So many bytes: there is room behind it for the name of the token, which is added to it.
const BY_BYTES_MAX: usize = 512;

fn check_by(by: Option<&str>) -> Result<(), Problem> {
    match by {
        Some(by) if by.is_empty() || by.len() > BY_BYTES_MAX => {
            let detail = format!("`by` has 1 to {BY_BYTES_MAX} bytes");
            Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_reason", detail))
        }
        _ => Ok(()),
    }
}

/// Starts a new life of an erased entity, with a new key and without events.
#[utoipa::path(
    post,
    path = "/v1/entities/{kind}/{id}/recreate",
    operation_id = "recreate",
    tag = "erasure",
    params(EntityPath),
    request_body = wire::ReasonBody,
    responses((status = 200, description = "The new life", body = wire::LifeBody), Problems),
)]
pub(crate) async fn recreate(
    State(node): State<Arc<Node>>,
    May { caller, .. }: May<access::Erase>,
    Path(path): Path<EntityPath>,
    JsonBody(wire::ReasonBody { reason, by }): JsonBody<wire::ReasonBody>,
) -> Result<Response, Problem> {
    check_by(by.as_deref())?;
    let life = path.entity(&node)?.recreate(caller.reason(reason, by)).await?;
    Ok(json(StatusCode::OK, &wire::LifeBody { life, version: 0 }))
}

/// Restores an entity to an earlier version, as a new life. What came after it is erased.
///
/// Idempotency keys of the life before are forgotten. Make a backup after it.
#[utoipa::path(
    post,
    path = "/v1/entities/{kind}/{id}/restore-to",
    operation_id = "restore_to",
    tag = "erasure",
    params(EntityPath),
    request_body = wire::RestoreToBody,
    responses((status = 200, description = "The new life", body = wire::LifeBody), Problems),
)]
pub(crate) async fn restore_to(
    State(node): State<Arc<Node>>,
    May { caller, .. }: May<access::Erase>,
    Path(path): Path<EntityPath>,
    JsonBody(wire::RestoreToBody { version, reason, by }): JsonBody<wire::RestoreToBody>,
) -> Result<Response, Problem> {
    check_by(by.as_deref())?;
    let entity = path.entity(&node)?;
    let restored = entity.restore_to(Version(version), caller.reason(reason, by)).await?;
    Ok(json(StatusCode::OK, &wire::LifeBody { life: restored.life, version: restored.version.0 }))
}

/// The receipt of an erasure.
#[utoipa::path(
    get,
    path = "/v1/receipts/{receipt_id}",
    operation_id = "receipt",
    tag = "erasure",
    params(("receipt_id" = String, Path, description = "32 hex digits", pattern = "^[0-9A-Fa-f]{32}$")),
    responses((status = 200, description = "The receipt as it is now", body = document::Receipt), Problems),
)]
pub(crate) async fn receipt(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let id: ReceiptId = id.parse().map_err(|_| Problem::bad("invalid_path", "a receipt is named by 32 hex digits"))?;
    match node.kuma.receipt(id).await? {
        Some(receipt) => Ok(json(StatusCode::OK, &receipt)),
        None => Err(Problem::new(StatusCode::NOT_FOUND, "no_such_receipt", "no erasure of this name is complete here")),
    }
}

/// Looks again, at every live file, whether what a receipt says holds.
#[utoipa::path(
    post,
    path = "/v1/receipts/verify",
    operation_id = "verify_receipt",
    tag = "erasure",
    request_body(content = document::Receipt, content_type = "application/json", description = "The receipt"),
    responses((status = 200, description = "What was found", body = wire::ReceiptVerificationBody), Problems),
)]
pub(crate) async fn verify_receipt(
    State(node): State<Arc<Node>>,
    _may: May<access::Erase>,
    JsonBody(receipt): JsonBody<serde_json::Value>,
) -> Result<Response, Problem> {
    let mut receipt = receipt;
    whole_number::in_place(&mut receipt);
    if !has_names(&receipt) {
        return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_receipt", "the body is not a receipt"));
    }
    let receipt: Receipt = receipt.to_string().parse().map_err(|error: kuma_core::ReceiptError| {
        let detail = match error {
            kuma_core::ReceiptError::Newer { .. } => error.to_string(),
            _ => "the body is not a receipt".to_owned(),
        };
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_receipt", detail)
    })?;
    let verification = node.kuma.verify_receipt(&receipt).await;
    let is_clean = verification.is_clean();
    let check = |check: kuma_core::Check| {
        let is_ok = check.outcome.is_ok();
        let (Ok(found) | Err(found)) = check.outcome;
        wire::CheckBody { what: check.what, is_ok, found }
    };
    let checks = verification.checks.into_iter().map(check).collect();
    Ok(json(StatusCode::OK, &wire::ReceiptVerificationBody { is_clean, checks }))
}

/// Whether the parts of a receipt are objects: a list of their fields would be read as well.
fn has_names(receipt: &serde_json::Value) -> bool {
    let part = |at: &str| receipt.pointer(at).is_some_and(serde_json::Value::is_object);
    let stores = receipt.pointer("/receipt/stores").and_then(serde_json::Value::as_array);
    part("/receipt") && part("/receipt/backups") && stores.is_some_and(|all| all.iter().all(|one| one.is_object()))
}

/// The key that receipts are signed with. Keep a copy of it elsewhere.
#[utoipa::path(
    get,
    path = "/v1/public-key",
    operation_id = "public_key",
    tag = "erasure",
    responses((status = 200, description = "The key", body = wire::PublicKeyBody), Problems),
)]
pub(crate) async fn public_key(State(node): State<Arc<Node>>, _may: May<access::AnyToken>) -> Response {
    json(StatusCode::OK, &wire::PublicKeyBody { public_key: node.kuma.public_key().to_string() })
}
