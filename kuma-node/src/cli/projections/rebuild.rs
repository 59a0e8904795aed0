//! `projections rebuild`: builds a model anew, and waits for it if that is wanted.

use std::time::Duration;

use anyhow::bail;
use clap::Args;

use super::show;
use crate::{
    cli::{
        Exit, Session,
        output::{GOOD, duration},
    },
    client::{Backoff, Client, ProjectionAction, chance},
    wire::ProjectionBody,
};

/// Between two looks.
const EVERY: Duration = Duration::from_millis(500);
/// How often in a row a node may fail to answer meanwhile.
const FAILURES_MAX: u32 = 8;
/// Of the bar.
const STEPS: u64 = 1000;

/// What `projections rebuild` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct RebuildArguments {
    /// The projection
    name: String,
    /// Wait until the new model is served
    #[arg(long)]
    wait: bool,
}

pub(in crate::cli) async fn run(session: &Session, arguments: RebuildArguments) -> anyhow::Result<Exit> {
    let RebuildArguments { name, wait } = arguments;
    let (client, output) = (session.client()?, &session.output);
    let before = client.projection(&name).await?;
    let begun = client.change_projection(&name, ProjectionAction::Rebuild).await?;
    if !wait {
        show::print(session, &begun)?;
        if !output.is_json() {
            output.note("it is built beside the model that is served; projections show tells how far it is");
        }
        return Ok(Exit::Done);
    }
    let bar = output.bar("building {bar:32} {percent} %  {msg}");
    bar.set_length(STEPS);
    let waited = wait_for(&client, &before, begun, |progress, eta| {
        bar.set_position((progress * STEPS as f64) as u64);
        bar.set_message(eta.map(|eta| format!("{} left", duration(eta))).unwrap_or_default());
    });
    let waited = waited.await;
    bar.finish_and_clear();
    let now = waited?;
    if output.is_json() {
        output.json(&now)?;
    } else {
        let model = now.serving.map(|model| model.model).unwrap_or_default();
        output.line(format_args!("{GOOD}{name} is built anew{GOOD:#}, model {model} is served"))?;
    }
    Ok(Exit::Done)
}

async fn wait_for(
    client: &Client,
    before: &ProjectionBody,
    mut now: ProjectionBody,
    mut told: impl FnMut(f64, Option<Duration>),
) -> anyhow::Result<ProjectionBody> {
    let mut backoff = Backoff::new(EVERY, Duration::from_secs(10));
    loop {
        match look(before, &now) {
            Look::Done => return Ok(now),
            Look::Stuck(why) => bail!("{} is not built: {why}", before.name),
            Look::Building { progress, eta } => told(progress, eta),
        }
        tokio::time::sleep(EVERY).await;
        now = loop {
            match client.projection(&before.name).await {
                Ok(now) => break now,
                // It goes on without us; a node that starts anew goes on with it as well.
                Err(error) if error.is_unavailable() && backoff.failures() < FAILURES_MAX => {
                    tokio::time::sleep(backoff.wait(error.retry_after(), chance())).await;
                }
                Err(error) => return Err(error.into()),
            }
        };
        backoff.reset();
    }
}

/// How a rebuild stands.
#[derive(Debug, PartialEq)]
enum Look {
    Done,
    Building { progress: f64, eta: Option<Duration> },
    Stuck(String),
}

/// How the rebuild stands of a projection that was `before` it was asked for.
fn look(before: &ProjectionBody, now: &ProjectionBody) -> Look {
    let served = |projection: &ProjectionBody| projection.serving.as_ref().map(|model| model.model.clone());
    let building = match &now.building {
        // A first model is not built beside another one.
        None if served(now).is_some() && served(now) != served(before) => return Look::Done,
        None => return Look::Building { progress: 0.0, eta: None },
        Some(building) => building,
    };
    if let Some(why) = &building.failure {
        let hint = if now.state == "failed" { "; mend it, then projections retry or skip" } else { "" };
        return Look::Stuck(format!("{why}{hint}"));
    }
    if now.state == "paused" {
        return Look::Stuck("it is paused; projections resume lets it go on".to_owned());
    }
    let eta = building.eta_ms.map(Duration::from_millis);
    Look::Building { progress: building.progress.unwrap_or(0.0).clamp(0.0, 1.0), eta }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ModelBody;

    fn model(model: &str, progress: Option<f64>, failure: Option<&str>) -> ModelBody {
        let failure = failure.map(str::to_owned);
        ModelBody { model: model.to_owned(), state: String::new(), events: 0, progress, eta_ms: Some(1500), failure }
    }

    fn projection(state: &str, serving: Option<ModelBody>, building: Option<ModelBody>) -> ProjectionBody {
        ProjectionBody {
            name: "p".to_owned(),
            version: 1,
            state: state.to_owned(),
            serving,
            building,
            previous: None,
            lag_ms: 0,
            commits_behind: 0,
            file: None,
            file_problem: None,
        }
    }

    #[test]
    fn a_rebuild_is_done_when_another_model_is_served() {
        let before = projection("live", Some(model("1.1", None, None)), None);
        let building = projection("live", Some(model("1.1", None, None)), Some(model("1.2", Some(0.5), None)));
        assert_eq!(look(&before, &building), Look::Building { progress: 0.5, eta: Some(Duration::from_millis(1500)) });
        // Between the request and its beginning.
        assert_eq!(look(&before, &before), Look::Building { progress: 0.0, eta: None });
        assert_eq!(look(&before, &projection("live", Some(model("1.2", None, None)), None)), Look::Done);
        let first = projection("building", None, None);
        assert_eq!(look(&first, &before), Look::Done);
    }

    #[test]
    fn a_rebuild_that_stands_still_is_not_waited_for() {
        let before = projection("live", Some(model("1.1", None, None)), None);
        let failed = projection("failed", before.serving.clone(), Some(model("1.2", None, Some("no such column"))));
        assert!(matches!(look(&before, &failed), Look::Stuck(why) if why.contains("no such column")));
        let paused = projection("paused", before.serving.clone(), Some(model("1.2", None, None)));
        assert!(matches!(look(&before, &paused), Look::Stuck(_)));
    }
}
