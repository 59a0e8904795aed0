//! `projections`: read models.

mod query;
mod rebuild;
mod show;

use clap::{Args, Subcommand};

use super::{Exit, Session};
use crate::client::ProjectionAction;

/// Names a projection.
#[derive(Debug, Args)]
pub(super) struct Name {
    /// The projection
    name: String,
}

/// What can be done with projections.
#[derive(Debug, Subcommand)]
pub(super) enum ProjectionsVerb {
    /// Print all of them, and files that cannot be used
    List,
    /// Print one, its models, and events that it skipped
    Show(Name),
    /// Ask a read model, in SQL
    Query(query::QueryArguments),
    /// Build the model anew, beside the one that is served
    Rebuild(rebuild::RebuildArguments),
    /// Apply no more events
    Pause(Name),
    /// Go on
    Resume(Name),
    /// Try the event again at which it failed
    Retry(Name),
    /// Pass over the event at which it failed, which is noted
    Skip(Name),
    /// Serve the model that was served before
    Rollback(Name),
    /// Drop the projection and delete its models; remove its file first
    Drop(Name),
}

pub(super) async fn run(session: &Session, verb: ProjectionsVerb) -> anyhow::Result<Exit> {
    let (name, action) = match verb {
        ProjectionsVerb::List => return show::list(session).await,
        ProjectionsVerb::Show(Name { name }) => return show::show(session, &name).await,
        ProjectionsVerb::Query(arguments) => return query::run(session, arguments).await,
        ProjectionsVerb::Rebuild(arguments) => return rebuild::run(session, arguments).await,
        ProjectionsVerb::Drop(Name { name }) => return drop_projection(session, &name).await,
        ProjectionsVerb::Pause(Name { name }) => (name, ProjectionAction::Pause),
        ProjectionsVerb::Resume(Name { name }) => (name, ProjectionAction::Resume),
        ProjectionsVerb::Retry(Name { name }) => (name, ProjectionAction::Retry),
        ProjectionsVerb::Skip(Name { name }) => (name, ProjectionAction::Skip),
        ProjectionsVerb::Rollback(Name { name }) => (name, ProjectionAction::Rollback),
    };
    let projection = session.client()?.change_projection(&name, action).await?;
    show::print(session, &projection)?;
    Ok(Exit::Done)
}

async fn drop_projection(session: &Session, name: &str) -> anyhow::Result<Exit> {
    session.client()?.drop_projection(name).await?;
    if session.output.is_json() {
        session.output.json(&serde_json::json!({ "dropped": name }))?;
    } else {
        session.output.line(format_args!("{name} is dropped"))?;
    }
    Ok(Exit::Done)
}
