//! `export`: all entities as lines.

use std::path::PathBuf;

use clap::Args;
use indicatif::HumanCount;

use super::{Exit, Session, save};

/// What `export` takes.
#[derive(Debug, Args)]
pub(super) struct ExportArguments {
    /// Where to, - for standard output; the file is there when it is whole
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
}

pub(super) async fn run(session: &Session, arguments: ExportArguments) -> anyhow::Result<Exit> {
    let path = arguments.output.as_path();
    let download = session.client()?.export_all().await?;
    let manifest = save::download(&session.output, download, Some(path)).await?;
    if save::target(Some(path)).is_none() {
        return Ok(Exit::Done);
    }
    if session.output.is_json() {
        session.output.json(&manifest)?;
    } else {
        let [entities, commits, events] = [manifest.entities, manifest.commits, manifest.events].map(HumanCount);
        let path = path.display();
        session
            .output
            .line(format_args!("exported {events} events in {commits} commits of {entities} entities to {path}"))?;
        session.output.note("it is not sealed: it holds ids and events in clear");
    }
    Ok(Exit::Done)
}
