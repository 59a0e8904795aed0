//! Read models: what they are doing, questions to them, and what operators do with them.

use std::sync::Arc;

use axum::{
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use kuma_core::{ModelStatus, ProjectionHandle, ProjectionState, ProjectionStatus};
use serde::Deserialize;
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::{Problems, json, time_text};
use crate::{
    access::{self, May},
    body::{JsonBody, Path},
    node::Node,
    problem::Problem,
    wire,
};

const ROWS_MAX: u32 = 10_000;

/// All projections, and the files that cannot be used.
#[utoipa::path(
    get,
    path = "/v1/projections",
    operation_id = "projections",
    tag = "projections",
    responses((status = 200, description = "The projections", body = wire::ProjectionsBody), Problems),
)]
pub(crate) async fn list(State(node): State<Arc<Node>>, _may: May<access::Read>) -> Result<Response, Problem> {
    let mut projections = Vec::new();
    for handle in node.kuma.projections() {
        projections.push(body(&node, handle.status().await?));
    }
    let refused = |(file, problem)| wire::RefusedFile { file, problem };
    let refused_files = node.projections.refused().into_iter().map(refused).collect();
    Ok(json(StatusCode::OK, &wire::ProjectionsBody { projections, refused_files }))
}

/// Names a projection.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(crate) struct ProjectionPath {
    /// Its name.
    #[param(pattern = "^[a-z][a-z0-9_]{0,63}$", example = "balances")]
    name: String,
}

/// A projection as it is now.
#[utoipa::path(
    get,
    path = "/v1/projections/{name}",
    operation_id = "projection",
    tag = "projections",
    params(ProjectionPath),
    responses((status = 200, description = "The projection", body = wire::ProjectionBody), Problems),
)]
pub(crate) async fn status(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Path(ProjectionPath { name }): Path<ProjectionPath>,
) -> Result<Response, Problem> {
    answer(&node, &node.kuma.find_projection(&name)?).await
}

/// Drops a projection and deletes its models. Refused while a file defines it: remove the file first.
#[utoipa::path(
    delete,
    path = "/v1/projections/{name}",
    operation_id = "drop_projection",
    tag = "projections",
    params(ProjectionPath),
    responses((status = 204, description = "It is gone"), Problems),
)]
pub(crate) async fn remove(
    State(node): State<Arc<Node>>,
    _may: May<access::Admin>,
    Path(ProjectionPath { name }): Path<ProjectionPath>,
) -> Result<Response, Problem> {
    node.projections.look(false).await;
    if let (Some(file), _) = node.projections.of(&name) {
        let detail = format!("the file {file} defines it and would bring it back; remove the file first");
        return Err(Problem::new(StatusCode::CONFLICT, "defined_by_file", detail));
    }
    node.kuma.drop_projection(&name).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Events that a projection was told to skip.
#[utoipa::path(
    get,
    path = "/v1/projections/{name}/skipped",
    operation_id = "skipped",
    tag = "projections",
    params(ProjectionPath),
    responses((status = 200, description = "What was skipped", body = Vec<wire::SkippedBody>), Problems),
)]
pub(crate) async fn skipped(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Path(ProjectionPath { name }): Path<ProjectionPath>,
) -> Result<Response, Problem> {
    let skipped = node.kuma.find_projection(&name)?.skipped().await?;
    let skipped = skipped.into_iter().map(|skipped| wire::SkippedBody {
        at: time_text(std::time::UNIX_EPOCH + std::time::Duration::from_micros(skipped.at_us.max(0).cast_unsigned())),
        shard: skipped.shard,
        position: skipped.position,
        entity: skipped.entity,
        version: skipped.version,
        why: skipped.why,
    });
    Ok(json(StatusCode::OK, &skipped.collect::<Vec<_>>()))
}

/// Asks a read model.
///
/// One `SELECT`, on a connection that can only read. The answer says how current it is, and whether it was cut.
#[utoipa::path(
    post,
    path = "/v1/projections/{name}/query",
    operation_id = "query",
    tag = "projections",
    params(ProjectionPath),
    request_body = wire::QueryBody,
    responses((status = 200, description = "The answer", body = wire::AnswerBody), Problems),
)]
pub(crate) async fn query(
    State(node): State<Arc<Node>>,
    _may: May<access::Read>,
    Path(ProjectionPath { name }): Path<ProjectionPath>,
    JsonBody(wire::QueryBody { sql, parameters, rows_max }): JsonBody<wire::QueryBody>,
) -> Result<Response, Problem> {
    let projection = node.kuma.find_projection(&name)?;
    let refuse = |detail: &str| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_query", detail);
    let rows_max = rows_max.unwrap_or(ROWS_MAX);
    if !(1..=ROWS_MAX).contains(&rows_max) {
        return Err(refuse("`rows_max` is 1 to 10000"));
    }
    let mut query = projection.query(sql).rows_max(rows_max as usize);
    match parameters {
        Value::Null => {}
        Value::Array(values) => {
            for value in values {
                query = query.bind(sql_value(value)?);
            }
        }
        Value::Object(values) => {
            for (name, value) in values {
                query = query.bind_named(name, sql_value(value)?);
            }
        }
        _ => return Err(refuse("`parameters` is a list, or an object with names")),
    }
    let answer = query.run().await?;
    let Value::Array(rows) = answer.json() else { return Err(Problem::internal("an answer without rows")) };
    let as_of = &answer.as_of;
    let body = wire::AnswerBody {
        rows,
        truncated: answer.truncated,
        model: as_of.model.to_string(),
        lag_ms: u64::try_from(as_of.lag.as_millis()).unwrap_or(u64::MAX),
        commits_behind: as_of.commits_behind,
        columns: answer.columns,
    };
    Ok(json(StatusCode::OK, &body))
}

fn sql_value(value: Value) -> Result<kuma_core::rusqlite::types::Value, Problem> {
    use kuma_core::rusqlite::types::Value as Sql;
    Ok(match value {
        Value::Null => Sql::Null,
        Value::Bool(value) => Sql::Integer(value.into()),
        Value::String(text) => Sql::Text(text),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Sql::Integer(integer),
            // SQLite's integers have 64 bits with a sign.
            (None, Some(real)) if number.is_f64() => Sql::Real(real),
            _ => {
                let detail = "a parameter is an integer that SQLite cannot hold; send it as text";
                return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_query", detail));
            }
        },
        Value::Array(_) | Value::Object(_) => {
            let detail = "parameters are null, booleans, numbers and text; send JSON as text";
            return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_query", detail));
        }
    })
}

/// What can be done with a projection.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ProjectionAction {
    /// Builds its model anew, beside the one that is served.
    Rebuild,
    /// Applies no more events.
    Pause,
    /// Goes on.
    Resume,
    /// Tries the event again at which it failed.
    Retry,
    /// Passes over the event at which it failed, which is noted.
    Skip,
    /// Serves the model that was served before.
    Rollback,
}

/// Which projection, and what is to be done with it.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(crate) struct ActionPath {
    /// Its name.
    #[param(pattern = "^[a-z][a-z0-9_]{0,63}$", example = "balances")]
    name: String,
    /// What is to be done.
    #[param(inline)]
    action: ProjectionAction,
}

/// Rebuilds, pauses, resumes, retries, skips, or rolls back.
#[utoipa::path(
    post,
    path = "/v1/projections/{name}/{action}",
    operation_id = "change_projection",
    tag = "projections",
    params(ActionPath),
    responses((status = 200, description = "The projection as it is then", body = wire::ProjectionBody), Problems),
)]
pub(crate) async fn change(
    State(node): State<Arc<Node>>,
    _may: May<access::Admin>,
    Path(ActionPath { name, action }): Path<ActionPath>,
) -> Result<Response, Problem> {
    let projection = node.kuma.find_projection(&name)?;
    match action {
        ProjectionAction::Rebuild => projection.rebuild().await?,
        ProjectionAction::Pause => projection.pause().await?,
        ProjectionAction::Resume => projection.resume().await?,
        ProjectionAction::Retry => projection.retry().await?,
        ProjectionAction::Skip => projection.skip().await?,
        ProjectionAction::Rollback => projection.rollback().await?,
    }
    answer(&node, &projection).await
}

async fn answer(node: &Node, projection: &ProjectionHandle) -> Result<Response, Problem> {
    Ok(json(StatusCode::OK, &body(node, projection.status().await?)))
}

fn body(node: &Node, status: ProjectionStatus) -> wire::ProjectionBody {
    let (file, file_problem) = node.projections.of(&status.name);
    wire::ProjectionBody {
        state: state(&status).to_owned(),
        serving: status.serving.map(model),
        building: status.building.map(model),
        previous: status.previous.map(|model| model.to_string()),
        lag_ms: u64::try_from(status.lag.as_millis()).unwrap_or(u64::MAX),
        commits_behind: status.commits_behind,
        name: status.name,
        version: status.version,
        file,
        file_problem,
    }
}

/// In a word; what fails comes first.
fn state(status: &ProjectionStatus) -> &'static str {
    let states = || status.building.iter().chain(&status.serving).filter_map(|model| model.state.as_ref());
    let any = |wanted: fn(&ProjectionState) -> bool| states().any(wanted);
    match &status.serving {
        _ if any(|state| matches!(state, ProjectionState::Failed(_))) => "failed",
        _ if any(|state| matches!(state, ProjectionState::Paused)) => "paused",
        _ if any(|state| matches!(state, ProjectionState::Waiting { .. })) => "waiting",
        None => "building",
        Some(ModelStatus { state: None, .. }) => "standing",
        Some(ModelStatus { state: Some(ProjectionState::Live), .. }) => "live",
        Some(_) => "catching_up",
    }
}

fn model(status: ModelStatus) -> wire::ModelBody {
    let mut body = wire::ModelBody {
        model: status.model.to_string(),
        state: String::new(),
        events: status.events,
        progress: None,
        eta_ms: None,
        failure: None,
    };
    body.state = match status.state {
        None => "stands still: its code is not there".to_owned(),
        Some(ProjectionState::Live) => "live".to_owned(),
        Some(ProjectionState::Paused) => "paused".to_owned(),
        Some(ProjectionState::CatchingUp { commits_left, progress, eta }) => {
            body.progress = Some(progress);
            body.eta_ms = eta.map(|eta| u64::try_from(eta.as_millis()).unwrap_or(u64::MAX));
            format!("catching up, {commits_left} commits left")
        }
        Some(ProjectionState::Failed(failure)) => {
            let place = match (failure.entity, failure.version) {
                (Some(entity), Some(version)) => format!("version {version} of entity {entity}"),
                _ => format!("position {} of shard {}", failure.position, failure.shard),
            };
            body.failure = Some(format!("{place}: {}", failure.error));
            "failed".to_owned()
        }
        Some(ProjectionState::Waiting { why }) => {
            body.failure = Some(why);
            "waiting".to_owned()
        }
    };
    body
}
