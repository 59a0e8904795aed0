//! `projections list` and `projections show`.

use std::time::Duration;

use anstyle::Style;
use indicatif::HumanCount;
use serde_json::json;

use crate::{
    cli::{
        Exit, Session,
        output::{BAD, WARN, duration, printable},
        table::{Table, pairs},
    },
    wire::{ModelBody, ProjectionBody},
};

pub(super) async fn list(session: &Session) -> anyhow::Result<Exit> {
    let all = session.client()?.projections().await?;
    let output = &session.output;
    if output.is_json() {
        output.json(&all)?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(["name", "state", "version", "model", "events", "lag", "behind", "progress", "file"]);
    for projection in &all.projections {
        let model = projection.serving.as_ref();
        let doing = projection.building.as_ref().or(model);
        table.styled(
            style(&projection.state),
            [
                projection.name.clone(),
                projection.state.clone(),
                projection.version.to_string(),
                model.map_or_else(|| "-".to_owned(), |model| model.model.clone()),
                model.map_or_else(|| "-".to_owned(), |model| HumanCount(model.events).to_string()),
                duration(Duration::from_millis(projection.lag_ms)).to_string(),
                HumanCount(projection.commits_behind).to_string(),
                doing.map_or_else(|| "-".to_owned(), progress),
                projection.file.clone().unwrap_or_else(|| "-".to_owned()),
            ],
        );
    }
    output.table(&table)?;
    for projection in &all.projections {
        if let Some(problem) = &projection.file_problem {
            let file = projection.file.as_deref().unwrap_or("its file");
            output.warn(printable(&format!("{file} is not used as it is now: {problem}")));
        }
    }
    all.refused_files.iter().for_each(|file| output.warn(printable(&format!("{}: {}", file.file, file.problem))));
    Ok(Exit::Done)
}

pub(super) async fn show(session: &Session, name: &str) -> anyhow::Result<Exit> {
    let client = session.client()?;
    let projection = client.projection(name).await?;
    let skipped = client.skipped(name).await?;
    if session.output.is_json() {
        session.output.json(&json!({ "projection": projection, "skipped": skipped }))?;
        return Ok(Exit::Done);
    }
    print(session, &projection)?;
    if !skipped.is_empty() {
        let mut table = Table::new(["skipped at", "shard", "position", "entity", "version", "why"]);
        for event in skipped {
            let version = event.version.map_or_else(|| "-".to_owned(), |version| version.to_string());
            let entity = event.entity.unwrap_or_else(|| "-".to_owned());
            table.row([event.at, event.shard.to_string(), event.position.to_string(), entity, version, event.why]);
        }
        session.output.table(&table)?;
    }
    Ok(Exit::Done)
}

/// Prints a projection as it is now.
pub(super) fn print(session: &Session, projection: &ProjectionBody) -> anyhow::Result<()> {
    if session.output.is_json() {
        return Ok(session.output.json(projection)?);
    }
    let ProjectionBody { name, version, state, serving, building, previous, file, file_problem, .. } = projection;
    let style = style(state);
    let mut rows = vec![
        ("projection", format!("{name}, version {version}")),
        (
            "lag",
            format!(
                "{}, {} commits behind",
                duration(Duration::from_millis(projection.lag_ms)),
                HumanCount(projection.commits_behind)
            ),
        ),
    ];
    for (what, model) in [("serving", serving), ("building", building)] {
        if let Some(model) = model {
            rows.push((what, told(model)));
            rows.extend(model.failure.clone().map(|failure| ("failure", failure)));
        }
    }
    rows.extend(previous.clone().map(|previous| ("previous", previous)));
    rows.extend(file.clone().map(|file| ("file", file)));
    rows.extend(file_problem.clone().map(|problem| ("file problem", problem)));
    session.output.line(format_args!("{style}{}{style:#}", printable(state)))?;
    Ok(session.output.line(pairs(rows).trim_end())?)
}

fn told(model: &ModelBody) -> String {
    match model.progress {
        None => format!("{}: {}, {} events applied", model.model, model.state, HumanCount(model.events)),
        Some(_) => format!(
            "{}: {}, {} events applied, {}",
            model.model,
            model.state,
            HumanCount(model.events),
            progress(model)
        ),
    }
}

/// How far a model is, in a few words.
fn progress(model: &ModelBody) -> String {
    match (model.progress, model.eta_ms) {
        (None, _) => "-".to_owned(),
        (Some(progress), None) => format!("{:.0} %", progress * 100.0),
        (Some(progress), Some(eta)) => {
            format!("{:.0} %, {} left", progress * 100.0, duration(Duration::from_millis(eta)))
        }
    }
}

fn style(state: &str) -> Style {
    match state {
        "failed" => BAD,
        "paused" | "waiting" | "standing" => WARN,
        _ => Style::new(),
    }
}
